"""Rows and adapters in a bucket, on a real S3 server: what a task is trained on is what lies there, and nothing else is
read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from configs.document import check_document
from configs.errors import InvalidInput, TooLarge, Unavailable
from configs.task_spec import TaskSpec
from orchestrator.tasks.admission import check_submission
from orchestrator.tasks.uploads import team_folder
from subspace_store.formats.peft import write_peft_folder
from subspace_store.storage.s3 import S3Storage
from tests.builders import LAYOUT, adapter, rows, settings, task_document, write_rows
from tests.moto_server import CREDENTIALS, moto_server

BUCKET = "rows"
TRAIN, EVAL = rows(6), [{"text": f"other {number}", "label": number % 2} for number in range(4)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto_server(BUCKET) as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    found = boto3.session.Session().resource("s3", endpoint_url=server).Bucket(BUCKET)
    yield found
    found.objects.all().delete()


class Desk:
    """Team red may name what lies below `s3://rows/red`, team blue what lies below `s3://rows/blue`."""

    def __init__(self, folder: Path, server: str, bucket: Any, **server_settings: Any) -> None:
        self.folder, self.bucket = folder, bucket
        teams = {
            team: {"data_buckets": [{"url": f"s3://{BUCKET}/{team}", "endpoint_url": server}]}
            for team in ("red", "blue")
        }
        self.settings = settings(folder, teams=teams, data_roots=[str(folder / "data")], server=server_settings)

    def put(self, name: str, path: Path) -> str:
        self.bucket.upload_file(str(path), name)
        return f"s3://{BUCKET}/{name}"

    def check(self, train: str, evaluation: str, **changes: Any) -> Any:
        data = {"train_file": train, "eval_file": evaluation} | changes.pop("data", {})
        training = {"per_device_train_batch_size": 1}
        document = task_document("red/alpha", **{"method": {"name": "lora"}, "training": training} | changes, data=data)
        draft = check_submission(check_document(document, TaskSpec, "task"), self.settings, LAYOUT)
        draft.close()
        return draft

    def is_clean(self) -> bool:
        brought = team_folder(self.settings, "red").brought
        return not brought.exists() or not list(brought.iterdir())


@pytest.fixture
def desk(tmp_path: Path, server: str, bucket: Any) -> Desk:
    return Desk(tmp_path, server, bucket)


def test_a_task_of_a_bucket_is_that_of_the_same_files_and_keeps_its_places(desk: Desk) -> None:
    train, held = (
        write_rows(desk.folder / "data" / f"{name}.jsonl", some) for name, some in (("t", TRAIN), ("e", EVAL))
    )
    here = desk.check(str(train), str(held))
    there = desk.check(desk.put("red/t.jsonl", train), desk.put("red/deep/er/e.jsonl", held))
    assert there.content_sha256 == here.content_sha256
    assert (there.train_count, there.eval_count) == (6, 4)
    named = there.spec.data
    assert (named.train_file, named.eval_file) == (
        "s3://rows/red/t.jsonl",
        "s3://rows/red/deep/er/e.jsonl",
    )
    assert desk.is_clean()


@pytest.mark.parametrize(
    "place",
    [
        "s3://rows/blue/t.jsonl",
        "s3://rows/red-too/t.jsonl",
        "s3://rows/t.jsonl",
        "s3://rows/red",
        "s3://other/red/t.jsonl",
    ],
)
def test_nothing_outside_the_teams_part_of_a_bucket_is_read(desk: Desk, place: str) -> None:
    file = write_rows(desk.folder / "data/t.jsonl", TRAIN)
    for name in ("blue/t.jsonl", "red-too/t.jsonl", "t.jsonl"):
        desk.put(name, file)
    with pytest.raises(InvalidInput, match="in no part of a bucket that this service reads") as caught:
        desk.check(place, str(file))
    assert (caught.value.where, caught.value.todo) == ("data.train_file", "name something below one of: s3://rows/red")


@pytest.mark.parametrize(
    "place", ["s3://rows/red/../blue/t.jsonl", "s3://rows//red/t.jsonl", "s3://rows/red/./t.jsonl", "s3://"]
)
def test_a_place_that_can_be_read_in_two_ways_is_refused(desk: Desk, place: str) -> None:
    with pytest.raises(InvalidInput, match="names no place in a bucket"):
        desk.check(place, place)


def test_a_bad_row_is_told_by_the_name_in_the_bucket(desk: Desk) -> None:
    bad = write_rows(desk.folder / "data/t.jsonl", [*TRAIN, {"text": "so", "label": "maybe"}])
    place = desk.put("red/t.jsonl", bad)
    with pytest.raises(InvalidInput, match=rf"{place}, row 7: label 'maybe'") as caught:
        desk.check(place, place)
    assert str(desk.folder) not in str(caught.value)
    assert desk.is_clean()


def test_what_is_not_there_or_too_large_is_refused(tmp_path: Path, server: str, bucket: Any) -> None:
    desk = Desk(tmp_path, server, bucket, upload_bytes_max=200)
    small = desk.put("red/t.jsonl", write_rows(tmp_path / "data/t.jsonl", TRAIN[:2]))
    with pytest.raises(InvalidInput, match="no such object, and none below it"):
        desk.check(small, "s3://rows/red/none.jsonl")
    large = desk.put("red/large.jsonl", write_rows(tmp_path / "data/l.jsonl", TRAIN * 10))
    with pytest.raises(TooLarge, match=r"s3://rows/red/large\.jsonl has more than the 200 bytes"):
        desk.check(small, large)
    assert desk.is_clean()


def test_all_that_a_submission_names_together_is_limited_too(tmp_path: Path, server: str, bucket: Any) -> None:
    desk = Desk(tmp_path, server, bucket, upload_team_bytes_max=700)
    file = write_rows(tmp_path / "data/t.jsonl", TRAIN * 3)
    assert 350 < file.stat().st_size < 700
    first, second = desk.put("red/t.jsonl", file), desk.put("red/e.jsonl", file)
    with pytest.raises(TooLarge, match="that may be read of it"):
        desk.check(first, second)
    assert desk.is_clean()


def test_an_object_that_is_also_a_folder_is_read_as_neither(desk: Desk) -> None:
    file = write_rows(desk.folder / "data/t.jsonl", TRAIN)
    place, _ = desk.put("red/t.jsonl", file), desk.put("red/t.jsonl/part.jsonl", file)
    with pytest.raises(InvalidInput, match="is an object, and others lie below it"):
        desk.check(place, place)


def test_an_answer_that_is_cut_is_asked_for_again_and_a_part_of_it_is_no_file(desk: Desk, server: str) -> None:
    content = b"".join(b"%9d\n" % number for number in range(100_000))
    desk.bucket.put_object(Key="red/long.jsonl", Body=content)
    storage, cuts = S3Storage(f"s3://{BUCKET}/red", endpoint_url=server), [1000, 200_000, None]
    client = storage._client()
    asked, storage._connection = client.get_object, SimpleNamespace()

    def get_object(**what: Any) -> Any:
        answer, cut = asked(**what), cuts.pop(0)
        body = answer["Body"].read()[:cut]
        return answer | {"Body": SimpleNamespace(iter_chunks=lambda size: [body], close=lambda: None)}

    storage._connection.get_object = get_object
    with tempfile.TemporaryFile() as file:
        assert storage.download("long.jsonl", file, len(content))
        file.seek(0)
        assert file.read() == content
    cuts += [0, 1000, 1000]
    with tempfile.TemporaryFile() as file, pytest.raises(Unavailable, match="the answer was cut 3 times"):
        storage.download("long.jsonl", file, len(content))


@pytest.mark.parametrize("url", ["https://rows/red", "s3://", "s3://rows/../red", "s3://rows//red"])
def test_a_part_of_a_bucket_that_is_none_is_refused_with_the_settings(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"data_buckets\.0\.url"):
        settings(tmp_path, data_buckets=[{"url": url}])


def test_an_adapter_is_imported_from_a_folder_of_a_bucket_without_what_lies_beside_it(desk: Desk) -> None:
    folder = desk.folder / "data/peft"
    write_peft_folder(folder, adapter(1), "tiny-source")
    (folder / "optimizer.bin").write_bytes(b"x" * 1000)
    for file in folder.iterdir():
        desk.put(f"red/peft/{file.name}", file)
    held = desk.put("red/e.jsonl", write_rows(desk.folder / "data/e.jsonl", EVAL))
    here, there = (
        desk.check(None, held, method={"name": "import", "adapter": place}, training={})  # type: ignore[arg-type]
        for place in (str(folder), "s3://rows/red/peft/")
    )
    assert there.brought_sha256 == here.brought_sha256
    assert desk.is_clean()
