"""S3 obeys the storage contract, against a real server (moto) on this machine's loopback."""

import hashlib
import itertools
import pickle
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Literal

import botocore.session
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ClientError, EndpointConnectionError
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from urllib3 import HTTPResponse

from configs.errors import Corrupt, NotFound, NotWritten, StoreFull, StoreReadOnly, Unavailable
from configs.settings import StorageSettings
from subspace_store import open_storage
from subspace_store.storage.protocol import Storage
from subspace_store.storage.s3 import ALONE, CUT_TRIES, PART, THREADS, S3Storage
from tests.contracts.storage_contract import StorageContract
from tests.moto_server import CREDENTIALS, free_port, moto_server
from tests.subspace_store.builders import deltas, merged, opened, random_adapter, reading

LOADER = botocore.session.create_loader()
_prefixes = itertools.count()


@pytest.fixture(autouse=True)
def dummy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def one_description_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    # boto3 would parse its own megabytes of JSON for every client of these tests.
    monkeypatch.setattr(botocore.session, "create_loader", lambda *_: LOADER)


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

    def wait_until_sent(self, storage: Storage) -> None:
        """moto says of every upload that it began in 2010: only its parts tell that something was added."""
        assert isinstance(storage, S3Storage)
        client, until = storage._client(), time.monotonic() + 30
        for upload in client.list_multipart_uploads(Bucket=storage.bucket, Prefix=storage.prefix)["Uploads"]:
            where = {"Bucket": storage.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            while not client.list_parts(**where).get("Parts"):
                assert time.monotonic() < until
                time.sleep(0.01)


def test_a_subspace_lives_in_a_bucket(storage: S3Storage, endpoint: str) -> None:
    adapter = random_adapter(1)
    store = opened(storage)
    store.publish(merged(store, {"a": adapter}).number, op_key="p", actor="test")
    settings = StorageSettings(url=storage.url, endpoint_url=endpoint)
    found = deltas(reading(open_storage(settings)).adapter("a"))
    assert all((found[name] - delta).norm() < 1e-5 for name, delta in deltas(adapter).items())


def uploads(storage: S3Storage) -> list[str]:
    """Keys of multipart uploads that were begun and not ended."""
    found = storage._client().list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found]


def send(storage: S3Storage, key: str, content: bytes) -> None:
    with storage.stream(key, 0) as out:
        out.append(content)
        out.finish(b"")


def test_a_stream_that_is_left_early_leaves_no_parts(storage: S3Storage) -> None:
    with storage.stream("blobs/1", 8) as out:
        out.append(bytes(2 * PART))
        assert uploads(storage) == [storage._name("blobs/1")]
    assert uploads(storage) == []


def test_uploads_that_killed_processes_left_are_given_up_however_many_and_only_here(
    storage: S3Storage, endpoint: str
) -> None:
    def begin(where: S3Storage, key: str) -> None:
        where._client().create_multipart_upload(Bucket=where.bucket, Key=where._name(key))

    beside = S3Storage(f"{storage.url}-beside", endpoint_url=endpoint)
    for number in range(12):
        begin(storage, f"blobs/1/{number % 7}")
    begin(storage, "blobs/2/a")
    begin(beside, "blobs/1/a")
    client, list_all = storage._client(), storage._client().list_multipart_uploads

    def in_pages(UploadIdMarker: str = "0", **request: str) -> dict[str, object]:  # which moto does not do
        start = int(UploadIdMarker)
        page, rest = list_all(Bucket=request["Bucket"])["Uploads"][start:][:5], {"NextUploadIdMarker": str(start + 5)}
        return {"Uploads": page, "IsTruncated": len(page) == 5, **rest, "NextKeyMarker": "x"}

    client.list_multipart_uploads = in_pages  # nor does it look at the prefix
    assert storage.abandon("blobs/1/") == 12
    client.list_multipart_uploads = list_all
    assert set(uploads(storage)) == {storage._name("blobs/2/a"), beside._name("blobs/1/a")}
    assert (storage.abandon("blobs/"), beside.abandon("blobs/"), storage.abandon("")) == (1, 1, 0)


def test_an_upload_that_its_writer_ends_meanwhile_is_given_up_all_the_same(storage: S3Storage) -> None:
    storage._client().create_multipart_upload(Bucket=storage.bucket, Key=storage._name("blobs/1/a"))
    abort = storage._client().abort_multipart_upload
    storage._client().abort_multipart_upload = lambda **request: (abort(**request), no_such_upload())
    assert storage.abandon("blobs/1/") == 1
    assert uploads(storage) == []


@pytest.mark.parametrize("step", ["UploadPart", "CompleteMultipartUpload", "HeadObject"])
def test_a_server_that_goes_away_during_a_stream_is_unavailable_and_nothing_is_left(
    storage: S3Storage, step: str
) -> None:
    def away(**_: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://away")

    storage._client().meta.events.register(f"before-call.s3.{step}", away)
    with pytest.raises(Unavailable, match="http://away"):
        send(storage, "blobs/1", bytes(2 * PART))
    assert uploads(storage) == []
    assert storage.keys("") == (["blobs/1"] if step == "HeadObject" else [])  # there, but nobody has seen its size


def no_such_upload(**_: object) -> None:
    raise ClientError({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload")


def test_a_completion_whose_reply_was_lost_is_done(storage: S3Storage) -> None:
    # boto3's own second try finds no upload any more, because the first one ended it.
    client, complete = storage._client(), storage._client().complete_multipart_upload
    client.complete_multipart_upload = lambda **request: (complete(**request), no_such_upload())
    send(storage, "blobs/1", b"x" * 2 * PART)
    assert storage.read("blobs/1") == b"x" * 2 * PART


def test_an_upload_that_somebody_ended_is_not_done(storage: S3Storage) -> None:
    storage._client().complete_multipart_upload = no_such_upload
    with pytest.raises(Unavailable, match="NoSuchUpload"):
        send(storage, "blobs/1", bytes(2 * PART))


def test_an_object_of_another_size_than_was_sent_is_corrupt(storage: S3Storage) -> None:
    client, upload_part = storage._client(), storage._client().upload_part
    client.upload_part = lambda **request: upload_part(**request | {"Body": request["Body"][:-1]})
    with pytest.raises(Corrupt, match=f"{3 * PART - 3} bytes after {3 * PART}"):
        send(storage, "blobs/1", bytes(3 * PART))


def test_a_stream_waits_for_the_network_instead_of_filling_memory(storage: S3Storage) -> None:
    network, sent = threading.Event(), list[int]()

    def slow(PartNumber: int, **_: object) -> dict[str, str]:
        network.wait()
        sent.append(PartNumber)
        return {"ETag": "1"}

    storage._client().upload_part = slow
    with storage.stream("blobs/1", 0) as out:
        out.append(bytes((THREADS + 1) * PART))  # the first part is kept, THREADS travel
        one_more = threading.Thread(target=out.append, args=(bytes(PART),))
        one_more.start()
        one_more.join(0.1)
        waits = one_more.is_alive()
        network.set()
        one_more.join(60)
    assert waits
    assert set(range(2, THREADS + 2)) <= set(sent)


def test_a_large_object_is_read_in_parts_of_one_object(storage: S3Storage) -> None:
    old, new = random.Random(0).randbytes(ALONE + PART + 5), random.Random(1).randbytes(ALONE + PART + 5)
    storage.write("blobs/1", old)
    asked: list[tuple[str, str]] = []

    def note(params: dict[str, dict[str, str]], **_: object) -> None:
        asked.append((params["headers"]["Range"], params["headers"].get("If-Match", "")))

    storage._client().meta.events.register("before-call.s3.GetObject", note)
    assert storage.read("blobs/1") == old
    assert [what for what, _ in sorted(asked, key=lambda ask: len(ask[0]))] == [
        f"bytes=0-{ALONE - 1}",
        f"bytes={ALONE}-{ALONE + PART - 1}",
        f"bytes={ALONE + PART}-{ALONE + PART + 4}",
    ]
    assert bytes(storage.view("blobs/1", 3, ALONE + 9)) == old[3 : ALONE + 12]

    class ReplacedMeanwhile(S3Storage):
        replaced = False

        def _range(self, key: str, start: int, size: int, **condition: str) -> tuple[bytes, int, str]:
            answer = super()._range(key, start, size, **condition)
            if not self.replaced:
                self.replaced = True
                self.write(key, new)
            return answer

    assert ReplacedMeanwhile(storage.url, endpoint_url=storage.endpoint_url).read("blobs/1") == new


class CutAnswers(BaseHTTPRequestHandler):
    """Answers `bytes=0-…` of an object of ten bytes; the first `cuts` answers end after five."""

    cuts = 0

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Length", "10")
        self.send_header("Content-Range", "bytes 0-9/10")
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(b"0123456789"[: 5 if type(self).cuts > 0 else 10])
        type(self).cuts -= 1

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("cuts", [0, 1, 2, 3])
def test_an_answer_that_is_cut_is_asked_for_again(cuts: int) -> None:
    class Handler(CutAnswers):
        pass

    Handler.cuts = cuts
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        storage = S3Storage("s3://versions", endpoint_url=f"http://127.0.0.1:{server.server_port}")
        try:
            if cuts < CUT_TRIES:
                assert storage.read("a") == b"0123456789"
            else:
                with pytest.raises(Unavailable, match="was cut 3 times"):
                    storage.read("a")
        finally:
            server.shutdown()


def test_more_keys_than_one_page_of_a_thousand_are_listed() -> None:
    names = [f"log/{number:020d}.json" for number in range(1_002)]
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        storage = S3Storage("s3://thousand", endpoint_url="http://{}:{}".format(*server.get_host_and_port()))
        storage._client().create_bucket(Bucket="thousand")
        for name in names:  # behind the server's back: a thousand requests would take five seconds
            s3_backends["123456789012"]["aws"].put_object("thousand", name, b".")
        page = storage._client().list_objects_v2(Bucket="thousand")
        assert (page["KeyCount"], page["IsTruncated"]) == (1_000, True)
        assert storage.keys("log/") == names
        assert storage.keys("log/", after=names[0]) == names[1:]
    finally:
        server.stop()


@pytest.mark.parametrize(("sse", "key"), [("AES256", None), ("aws:kms", None), ("aws:kms", "the-key")])
def test_every_write_asks_for_the_encryption_of_the_settings(
    storage: S3Storage, endpoint: str, sse: Literal["AES256", "aws:kms"], key: str | None
) -> None:
    settings = StorageSettings(url=storage.url, endpoint_url=endpoint, sse=sse, sse_kms_key_id=key)
    encrypted = pickle.loads(pickle.dumps(open_storage(settings)))
    encrypted.write("written", b"")
    encrypted.create("created", b"")
    for size in (1, 2 * PART):
        send(encrypted, f"sent-{size}", bytes(size))
    for name in encrypted.keys(""):
        head = encrypted._client().head_object(Bucket=encrypted.bucket, Key=encrypted._name(name))
        assert (head["ServerSideEncryption"], head.get("SSEKMSKeyId")) == (sse, key), name
    assert len(encrypted.keys("")) == 4


@pytest.mark.parametrize(
    ("endpoint_url", "path_style", "address"),
    [
        (None, None, "https://versions.s3.amazonaws.com/x/a"),
        (None, True, "https://s3.amazonaws.com/versions/x/a"),
        ("https://s3.example.org", None, "https://s3.example.org/versions/x/a"),
        ("https://s3.example.org", True, "https://s3.example.org/versions/x/a"),
        ("https://s3.example.org", False, "https://versions.s3.example.org/x/a"),
    ],
)
def test_the_bucket_stands_in_the_path_or_in_the_host(
    endpoint_url: str | None, path_style: bool | None, address: str
) -> None:
    settings = StorageSettings(url="s3://versions/x", endpoint_url=endpoint_url, path_style=path_style)
    storage = pickle.loads(pickle.dumps(open_storage(settings)))
    link = storage._client().generate_presigned_url("get_object", {"Bucket": storage.bucket, "Key": storage._name("a")})
    assert link.partition("?")[0] == address


@pytest.mark.parametrize("endpoint_url", [None, "http://s3.example.org"])
def test_a_body_goes_as_it_is_with_its_sha256_in_the_signature(endpoint_url: str | None) -> None:
    storage = S3Storage("s3://versions/x", endpoint_url=endpoint_url)
    sent: list[AWSPreparedRequest] = []

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        sent.append(request)
        return AWSResponse(request.url, 200, {"ETag": '"1"'}, HTTPResponse(BytesIO(), preload_content=False))

    storage._client().meta.events.register("before-send.s3", answer)
    storage.write("a", b"written")
    storage.create("a", b"created")
    storage._client().upload_part(Bucket="versions", Key="a", UploadId="1", PartNumber=1, Body=bytearray(b"part"))
    bodies = [getattr(request.body, "getvalue", lambda r=request: bytes(r.body))() for request in sent]
    assert bodies == [b"written", b"created", b"part"]
    for request, body in zip(sent, bodies, strict=True):
        names = {name.lower() for name in request.headers}
        assert request.headers["x-amz-content-sha256"].decode() == hashlib.sha256(body).hexdigest()
        assert not {name for name in names if "checksum" in name or name in ("x-amz-trailer", "content-encoding")}


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


class Refuses(BaseHTTPRequestHandler):
    """A server that answers every PUT in one way, at first perhaps with another."""

    status, code = 403, "AccessDenied"
    first: tuple[int, str] | None = None

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        (status, code), Refuses.first = Refuses.first or (Refuses.status, Refuses.code), None
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Storage]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    yield S3Storage("s3://versions/x", endpoint_url=f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", StoreReadOnly),
        (405, "MethodNotAllowed", StoreReadOnly),
        (403, "QuotaExceeded", StoreFull),  # Ceph
        (507, "XMinioStorageFull", StoreFull),
        (400, "XMinioAdminBucketQuotaExceeded", StoreFull),
        (403, "InvalidAccessKeyId", NotWritten),
        (404, "NoSuchBucket", NotWritten),
        (400, "InvalidRequest", NotWritten),
        (500, "InternalError", Unavailable),
        (503, "SlowDown", Unavailable),
    ],
)
def test_a_write_that_the_server_refused_has_failed_and_one_that_broke_it_is_in_doubt(
    refusing: S3Storage, monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(Refuses, "status", status)
    monkeypatch.setattr(Refuses, "code", code)
    for act in (refusing.create, refusing.write):
        with pytest.raises(Unavailable) as told:
            act("log/1", b"record")
        assert type(told.value) is error


def test_a_refusal_that_came_after_a_request_without_an_answer_proves_nothing(
    refusing: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refuses, "first", (500, "InternalError"))  # it may have been stored all the same
    with pytest.raises(Unavailable) as told:
        refusing.create("log/1", b"record")
    assert not isinstance(told.value, NotWritten)


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
        ("InvalidRequest", Unavailable),  # Ceph's answer to an encryption it has no keys for
    ],
)
def test_an_answer_of_the_server_becomes_the_error_that_says_what_to_do(code: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="s3://versions/x/a"):
        answering(code).create("a", b"")
