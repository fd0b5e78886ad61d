"""S3 obeys the storage contract, against a real server (moto) on this machine's loopback."""

import itertools
from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError

from configs.errors import NotFound, Unavailable
from configs.settings import StorageSettings
from subspace_store import open_storage
from subspace_store.s3_storage import PART, S3Storage
from tests.contracts.storage_contract import StorageContract
from tests.moto_server import CREDENTIALS, free_port, moto_server
from tests.subspace_store.builders import deltas, merged, opened, random_adapter

_prefixes = itertools.count()


@pytest.fixture(autouse=True)
def dummy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    # Ten keys a page, so that a listing of 45 takes five pages and not five seconds.
    with moto_server("versions", MOTO_S3_DEFAULT_MAX_KEYS="10") as url:
        yield url


@pytest.fixture
def storage(endpoint: str) -> S3Storage:
    return S3Storage(f"s3://versions/test/{next(_prefixes)}", endpoint_url=endpoint)


class TestS3Storage(StorageContract):
    many_keys = 45

    @pytest.fixture
    def storage(self, endpoint: str) -> S3Storage:
        return S3Storage(f"s3://versions/contract/{next(_prefixes)}", endpoint_url=endpoint)


def test_a_subspace_lives_in_a_bucket(storage: S3Storage, endpoint: str) -> None:
    adapter = random_adapter(1)
    store = opened(storage)
    store.publish(merged(store, {"a": adapter}).number, op_key="p", actor="test")
    settings = StorageSettings(url=storage.url, endpoint_url=endpoint)
    found = deltas(opened(open_storage(settings), writer=None).adapter("a"))
    assert all((found[name] - delta).norm() < 1e-5 for name, delta in deltas(adapter).items())


def uploads(storage: S3Storage) -> list[str]:
    """Keys of multipart uploads that were begun and not ended."""
    found = storage._client().list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found]


def test_a_stream_that_is_left_early_leaves_no_parts(storage: S3Storage) -> None:
    with storage.stream("blobs/1", 8) as out:
        out.append(bytes(2 * PART))
        assert uploads(storage) == [storage._name("blobs/1")]
    assert uploads(storage) == []


def test_a_missing_bucket_says_so(endpoint: str) -> None:
    storage = S3Storage("s3://no-such-bucket/x", endpoint_url=endpoint)
    for act in (lambda: storage.read("a"), lambda: storage.write("a", b""), lambda: storage.keys("")):
        with pytest.raises(Unavailable, match="create the bucket 'no-such-bucket'"):
            act()


def test_a_server_that_is_away_is_unavailable_with_its_address() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=address):
        S3Storage("s3://versions/x", endpoint_url=address).read("a")


def test_missing_credentials_say_which_variables_to_set(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Unavailable, match="set AWS_ACCESS_KEY_ID"):
        S3Storage("s3://versions/x", endpoint_url=endpoint).read("a")


class AnswersWith:
    """A client whose put answers with these error codes in turn, then succeeds."""

    def __init__(self, *codes: str) -> None:
        self.codes = list(codes)
        self.puts = 0

    def put_object(self, **request: object) -> None:
        self.puts += 1
        assert request.get("IfNoneMatch") == "*"
        if self.codes:
            raise ClientError({"Error": {"Code": self.codes.pop(0)}}, "PutObject")


def answering(*codes: str) -> S3Storage:
    storage = S3Storage("s3://versions/x")
    storage._connection = AnswersWith(*codes)
    return storage


def test_a_409_of_two_creates_at_once_is_tried_again() -> None:
    assert answering("ConditionalRequestConflict", "ConditionalRequestConflict").create("a", b"") is True
    assert answering("ConditionalRequestConflict", "PreconditionFailed").create("a", b"") is False


@pytest.mark.parametrize(
    ("code", "error"),
    [
        # Not the task's mistake: InvalidInput would park every task while the credentials are out of date.
        ("AccessDenied", Unavailable),
        ("ExpiredToken", Unavailable),
        ("SignatureDoesNotMatch", Unavailable),
        ("PermanentRedirect", Unavailable),
        ("NoSuchBucket", Unavailable),
        ("NoSuchKey", NotFound),
        ("SlowDown", Unavailable),
        ("InternalError", Unavailable),
        ("503", Unavailable),
    ],
)
def test_an_answer_of_the_server_becomes_the_error_that_says_what_to_do(code: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="s3://versions/x/a"):
        answering(code).create("a", b"")
