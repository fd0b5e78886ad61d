"""A task's files go when no version that is left holds it and nothing can bring it back; nobody else's do."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.requests import Cancel
from orchestrator.api.service import Service
from orchestrator.tasks.task_record import TaskRecord, TaskState, born_at, new_task_id, results_key
from orchestrator.unused_files import SUBMISSION_SECONDS, Held, is_unused, nobodys_at
from subspace_store.log.garbage import IDLE_SECONDS
from subspace_store.log.retention import needed
from subspace_store.requests import Expire, Remove, Rollback
from tests.builders import BASE, task_record
from tests.orchestrator.plant import Plant

S = TaskState
FULL = {"method": {"refine_epochs": 1, "share_full": True}}


def files(record: TaskRecord) -> dict[str, str]:
    """What a task may have, by a short name."""
    return {
        "train": record.train_key,
        "eval": record.eval_key,
        "adapter": f"staging/{record.task_id}/1-tok/adapter.safetensors",
        "checkpoint": f"staging/{record.task_id}/1-tok/step-3/state",
        "local": f"results/{record.task_id}/local-1-tok.safetensors",
        "other local": f"results/{record.task_id}/local-1-lost.safetensors",
        "birth": results_key(record.task_id, 3),
        "later": results_key(record.task_id, 5),
    }


def left(record: TaskRecord, held: Held) -> set[str]:
    return {name for name, key in files(record).items() if not is_unused(key, record, held)}


def task(state: TaskState, version: int = 0, **more: Any) -> TaskRecord:
    fields = {
        "staging_key": "staging/t-red-a/1-tok/adapter.safetensors",
        "local_results_key": "results/t-red-a/local-1-tok.safetensors",
    }
    return task_record("red/a", state=state, version=version, **fields | more)


HELD, GONE = Held({"t-red-a"}), Held()
ALL = {"train", "eval", "adapter", "checkpoint", "local", "other local", "birth", "later"}
SCORED = {"eval", "local", "birth", "later"}


@pytest.mark.parametrize(
    ("record", "held", "kept"),
    [
        (task(S.QUEUED), GONE, ALL),
        (task(S.TRAINING), GONE, ALL),
        (task(S.MERGING), GONE, SCORED | {"adapter"}),
        (task(S.EVALUATING, 3), HELD, SCORED | {"adapter"}),
        (task(S.PUBLISHED, 3), HELD, SCORED),
        (task(S.PUBLISHED, 3, spec=FULL), HELD, SCORED | {"train"}),
        (task(S.PARKED, 3), HELD, SCORED),  # rolled back: it may return
        (task(S.PARKED, 3, spec=FULL), HELD, SCORED | {"train"}),
        (task(S.PARKED, 3, spec=FULL), GONE, set()),  # its versions have expired: it cannot
        (task(S.PARKED), GONE, set()),
        (task(S.REJECTED, 3), HELD, set()),
        (task(S.CANCELLED), GONE, set()),
    ],
)
def test_what_is_kept_of_a_task_is_what_it_may_need_again(record: TaskRecord, held: Held, kept: set[str]) -> None:
    assert left(record, held) == kept


def test_scores_of_expired_versions_go_but_those_at_birth_which_later_ones_are_compared_with() -> None:
    expired = Held({"t-red-a"}, {3, 5})
    assert left(task(S.PUBLISHED, 3), expired) == SCORED - {"later"}


def test_an_id_without_a_row_is_nobodys_after_a_while_and_an_id_of_others_never() -> None:
    now = 1_700_000_000.0
    task_id = new_task_id(now)
    assert born_at(task_id) == now
    assert nobodys_at(task_id) == now + SUBMISSION_SECONDS
    for strange in ("t-red-a", "stranger", "", task_id + "0", task_id.upper()):
        assert born_at(strange) is None
        assert nobodys_at(strange) == math.inf


def test_rows_of_a_submission_that_broke_off_go_and_those_of_others_stay(plant: Plant) -> None:
    old, young, slow = (new_task_id(time.time() - age) for age in (2 * SUBMISSION_SECONDS, 0, 2 * SUBMISSION_SECONDS))
    (known,) = plant.submit("red/known", task_id=new_task_id(time.time() - 3 * SUBMISSION_SECONDS))
    plant.cluster.hold = lambda order: True
    for task_id in (old, young, slow, "t-red-other"):
        plant.storage.write(f"data/{task_id}/train-ab.arrow", b"rows")
    with plant.controller.subspaces[BASE].unused_files.submission(slow):  # by this very process, however long it takes
        plant.step(3)
    assert {key.split("/")[1] for key in plant.storage.keys("data/")} == {young, slow, "t-red-other", known.task_id}


def test_rows_that_were_too_young_to_go_are_looked_at_again_as_soon_as_they_are_old_enough(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.unused_files.SUBMISSION_SECONDS", 2.0)
    broken_off = new_task_id()
    plant.storage.write(f"data/{broken_off}/train-ab.arrow", b"rows")
    plant.step()
    assert plant.storage.keys("data/")
    plant.run(lambda: not plant.storage.keys("data/"), limit_seconds=20)


def test_of_all_that_killed_processes_leave_no_key_no_file_and_no_folder_stays(
    make_plant: Callable[..., Plant], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    plant = make_plant(storage={"url": f"file:{folder}"})
    place = folder / BASE
    plant.submit("red/stays", "red/gone", "blue/rolled")
    plant.cluster.hold = lambda order: order.spec.name == "gone"
    plant.run(lambda: plant.get("red/stays").state is S.PUBLISHED and plant.get("blue/rolled").state is S.PUBLISHED)
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    service.tasks.cancel(Cancel(reference="red/gone", by="ann"))
    plant.run(lambda: plant.get("red/gone").state is S.CANCELLED)
    long_ago = time.time() - 2 * IDLE_SECONDS
    broken_off = new_task_id(long_ago)  # its submission was killed between two files …
    plant.storage.write(f"data/{broken_off}/train-ab.arrow", b"rows")
    for name in (
        f"data/{broken_off}/",
        f"data/{new_task_id(long_ago)}/",
        "log/",
        "blobs/0000000001/",
        "checkpoints/",
        "",
    ):
        half = place / name / ".writing-0123456789abcdef"  # … and others while they wrote one, anywhere
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        os.utime(half, (long_ago, long_ago))
    for name in ("staging/empty/1-tok", "results/empty"):
        (place / name).mkdir(parents=True)
        for path in (place / name, (place / name).parent):
            os.utime(path, (long_ago, long_ago))
    now_writing = place / "data" / new_task_id() / ".writing-fedcba9876543210"
    now_writing.parent.mkdir()
    now_writing.write_bytes(b"grows")

    plant.kill()
    plant.step(3)
    records = [plant.get(title) for title in ("red/stays", "blue/rolled")]
    kept = {record.eval_key for record in records} | {"FORMAT"} | set(needed(plant.state))
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {name for name in found - kept if not name.startswith("log/0")} == {
        now_writing.relative_to(place).as_posix()
    }
    assert kept <= found
    empty = [path for path in place.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert empty == []


def test_a_task_that_the_database_forgot_keeps_its_rows_while_a_version_holds_it(plant: Plant) -> None:
    (held,) = plant.submit("red/held", task_id=new_task_id(time.time() - 2 * SUBMISSION_SECONDS))
    plant.run()
    with plant.queue._database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM tasks")
    plant.kill()
    plant.step(3)
    assert plant.storage.read(held.eval_key) == b"evaluation rows"


def test_a_row_that_cannot_be_read_keeps_its_files(plant: Plant) -> None:
    (strange,) = plant.submit("red/strange", task_id=new_task_id(time.time() - 2 * SUBMISSION_SECONDS))
    with plant.queue._database.writing() as connection:
        connection.exec_driver_sql("UPDATE tasks SET record = 'of tomorrow'")
    plant.step(3)
    assert plant.storage.read(strange.train_key) == b"training rows"
    plant.submit("red/other")
    plant.run(lambda: plant.get("red/other").state is S.PUBLISHED)  # all others go on
    assert [told.task_id for told in plant.queue.unreadable()] == [strange.task_id]


def test_one_tasks_end_looks_at_no_other_tasks_files(plant: Plant) -> None:
    plant.submit("red/alpha", "red/beta")
    plant.step(2)
    looked: list[str] = []
    plant.kill()
    plant.wrap = lambda name, part: Watched(part, looked) if name == "storage" else part
    plant.run()
    plant.step(2)
    assert looked[:3] == ["data/", "staging/", "results/"]  # once, at the start
    assert {prefix.split("/")[1] for prefix in looked[3:]} == {"t-red-alpha", "t-red-beta"}


class Watched:
    """A storage that notes which folders are listed."""

    def __init__(self, storage: Any, looked: list[str]) -> None:
        self._storage, self._looked = storage, looked

    def keys(self, prefix: str, *others: Any, **more: Any) -> Any:
        if prefix.split("/")[0] in ("data", "staging", "results"):
            self._looked.append(prefix)
        return self._storage.keys(prefix, *others, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


@pytest.mark.parametrize("spec", [{}, FULL], ids=["strict", "share_full"])
def test_of_a_task_that_was_removed_nothing_is_left_but_what_the_log_says(plant: Plant, spec: dict[str, Any]) -> None:
    (stays,) = plant.submit("red/stays")
    plant.run()
    (gone,) = plant.submit("blue/gone", spec=spec)
    plant.run()
    plant.submit("red/later")
    plant.run()
    for record in (stays, gone):
        for version in (1, 2, 3):
            plant.storage.write(results_key(record.task_id, version), b"scores of rows")
        plant.storage.write(f"results/{record.task_id}/local-1-lost.safetensors", b"scores of rows")
    remove = Remove(task_id=gone.task_id, actor="ann", reason="licence", publish=True, op_key="remove:1")
    plant.cluster.write(BASE, remove).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.get("blue/gone").state is S.PARKED)
    plant.step(3)
    assert plant.storage.read(gone.eval_key) == b"evaluation rows"  # an older version holds it, and may be gone back to
    state = plant.state
    held = tuple(number for number in state.versions if gone.task_id in state.tasks_at(number))
    plant.cluster.write(BASE, Expire(versions=held, actor="ann", op_key="expire:1")).result()
    plant.controller.wake(log_moved=True)
    plant.step(3)
    plant.cluster.replace_store(BASE)  # of a later epoch, which may collect
    plant.cluster.write(BASE, Rollback(version=state.refs["main"], actor="ann", op_key="rollback:1")).result()
    plant.cluster.collect()
    keys = list(plant.storage.keys(""))
    assert [key for key in keys if gone.task_id in key] == []
    # Blobs have no task's name in theirs: all that are left belong to versions without it.
    blobs = {key for key in keys if key.startswith("blobs/")}
    assert blobs == set(needed(plant.state))
    log = {key for key in keys if not key.startswith(("blobs/", "data/", "staging/", "results/"))}
    assert all(b"evaluation rows" not in plant.storage.read(key) for key in log)
    assert plant.storage.read(stays.eval_key) == b"evaluation rows"
    assert plant.get("red/stays").state is S.PUBLISHED


def test_a_task_that_was_cancelled_in_the_queue_leaves_nothing_behind(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(workers=1)
    plant.cluster.hold = lambda order: True
    plant.submit("red/first", "red/second")
    plant.run(lambda: len(plant.cluster.held) == 1)
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    service.tasks.cancel(Cancel(reference="red/second", by="ann"))
    plant.step()
    assert [key for key in plant.storage.keys("") if "t-red-second" in key] == []
