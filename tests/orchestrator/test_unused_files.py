"""A task's files go when no version that is left holds it and nothing can bring it back; nobody else's do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.api.requests import Cancel
from orchestrator.api.service import Service
from orchestrator.tasks.task_record import TaskRecord, TaskState, born_at, new_task_id, results_key
from orchestrator.unused_files import SUBMISSION_SECONDS, Held, is_nobodys, is_unused
from subspace_store.log.retention import needed
from subspace_store.requests import Expire, Remove, Rollback
from tests.builders import task_record
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


def test_an_id_without_a_row_is_nobodys_when_no_submission_can_be_under_way() -> None:
    now = 1_700_000_000.0
    task_id = new_task_id(now)
    assert born_at(task_id) == now
    assert not is_nobodys(task_id, now + SUBMISSION_SECONDS)
    assert is_nobodys(task_id, now + SUBMISSION_SECONDS + 1)
    assert SUBMISSION_SECONDS >= 3600
    for strange in ("t-red-a", "stranger", "", task_id + "0", task_id.upper()):
        assert born_at(strange) is None
        assert not is_nobodys(strange, now + 1e9)


def test_rows_of_a_submission_that_broke_off_go_after_an_hour_and_those_of_known_tasks_never(plant: Plant) -> None:
    old, young = new_task_id(time.time() - 2 * SUBMISSION_SECONDS), new_task_id()
    (known,) = plant.submit("red/known", task_id=new_task_id(time.time() - 3 * SUBMISSION_SECONDS))
    plant.cluster.hold = lambda order: True
    for task_id in (old, young, "t-red-other"):
        plant.storage.write(f"data/{task_id}/train-ab.arrow", b"rows")
    plant.step(3)
    assert {key.split("/")[1] for key in plant.storage.keys("data/")} == {young, "t-red-other", known.task_id}


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
    plant.cluster.write(remove).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.get("blue/gone").state is S.PARKED)
    plant.step(3)
    assert plant.storage.read(gone.eval_key) == b"evaluation rows"  # an older version holds it, and may be gone back to
    state = plant.state
    held = tuple(number for number in state.versions if gone.task_id in state.tasks_at(number))
    plant.cluster.write(Expire(versions=held, actor="ann", op_key="expire:1")).result()
    plant.controller.wake(log_moved=True)
    plant.step(3)
    plant.cluster.replace_store()  # of a later epoch, which may collect
    plant.cluster.write(Rollback(version=state.refs["main"], actor="ann", op_key="rollback:1")).result()
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
    service = Service(plant.settings, plant.queue, plant.storage, plant.controller, plant.cluster)
    service.cancel(Cancel(reference="red/second", by="ann"))
    plant.step()
    assert [key for key in plant.storage.keys("") if "t-red-second" in key] == []
