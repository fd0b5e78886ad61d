"""What a task would take, when it would end and what it costs: from its own rows and the longest it may take; and when
it starts where something keeps it from the line."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from configs.task_spec import TaskSpec
from orchestrator.api.requests import ListTasks, ShowTask, Submit
from orchestrator.api.service import Service
from orchestrator.tasks import tables
from orchestrator.tasks.task_record import TaskState
from orchestrator.tasks.task_rows import columns_of
from tests.builders import BASE, rows, task_document, write_rows
from tests.orchestrator.plant import Plant
from workers.orders import Train

MakePlant = Callable[..., Plant]


def service(plant: Plant) -> Service:
    return Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)


def ended(plant: Plant, name: str, row_count: int, seconds: float, **fields: Any) -> None:
    """A task that was trained here on so many rows, each read three times, 16 in a step, from its start of 4 s on."""
    (record,) = plant.submit(f"red/{name}")
    done = record.model_copy(
        update={
            "state": TaskState.PUBLISHED,
            "pool": "one",
            "train_count": row_count,
            "claimed_at": 1000.0,
            "first_step_at": 1004.0,
            "train_seconds": seconds,
            "ended_at": 1004.0 + seconds + 30.0,  # merged and scored in half a minute
            "revision": record.revision + 1,
            **fields,
        }
    )
    with plant.queue._database.writing() as connection:
        chosen = tables.tasks.c.task_id == record.task_id
        connection.execute(update(tables.tasks).where(chosen).values(**columns_of(done)))


def document(plant: Plant, title: str, row_count: int, **changes: Any) -> TaskSpec:
    folder = Path(plant.settings.data_roots[0])
    train = write_rows(folder / f"{title.replace('/', '-')}.jsonl", rows(row_count))
    evaluation = write_rows(folder / "eval.jsonl", [{"text": "other", "label": "no"}])
    files = {"train_file": str(train), "eval_file": str(evaluation)}
    defaults: dict[str, Any] = {"method": {"name": "lora"}}
    return TaskSpec.model_validate(task_document(title, **{**defaults, **changes, "data": files}))


def outlook(plant: Plant, row_count: int, **changes: Any) -> dict[str, Any]:
    spec = document(plant, "red/dry", row_count, **changes)
    return dict(service(plant).tasks.submit(Submit(task=spec, dry_run=True, by="ann")))


@pytest.fixture
def plant(make_plant: MakePlant) -> Plant:
    made = make_plant(pools={"one": {"max": 1, "min": 1, "ranks": 2, "gpus": 1}})
    made.run(lambda: made.controller.layout_of(BASE) is not None and made.controller.free_workers == 1)
    made.cluster.hold = lambda order: isinstance(order, Train)
    # 96 rows, three times, are nine steps of 32: 288 rows in 28.8 s.
    for number in range(3):
        ended(plant=made, name=f"before-{number}", row_count=96, seconds=28.8, places=2, spec=_plain(made))
    return made


def _plain(plant: Plant) -> TaskSpec:
    return document(plant, "red/before", 6)


def test_what_a_task_takes_and_costs_follows_from_its_rows_and_its_epochs(plant: Plant) -> None:
    small, large = outlook(plant, 96), outlook(plant, 960)
    assert small["length_seconds"] == pytest.approx(4 + 28.8)
    assert large["length_seconds"] == pytest.approx(4 + 288.0)
    assert large["cost_place_seconds"] == large["cost_gpu_seconds"] == pytest.approx(2 * 292.0)  # two ranks, a GPU each
    assert large["end"]["seconds"] == pytest.approx(large["start"]["seconds"] + 292.0)
    steps = outlook(plant, 96, training={"max_steps": 900})
    assert steps["length_seconds"] == pytest.approx(4 + 2880.0)


def test_a_task_is_no_longer_than_it_may_be_and_is_told_that_it_would_be_stopped(plant: Plant) -> None:
    short = outlook(plant, 960, max_run_seconds=100)
    assert (short["length_seconds"], short["cost_place_seconds"]) == (100.0, 200.0)
    assert short["runs_too_long"] == (
        "it takes about 5 min, by the last 3 tasks like it, and max_run_seconds is 100: it would be stopped and parked"
    )
    assert outlook(plant, 960, max_run_seconds=1000)["runs_too_long"] == ""


@pytest.mark.parametrize(("seconds", "told"), [(250.0, "cannot be met"), (3000.0, "met")])
def test_a_deadline_that_the_tasks_own_length_does_not_meet_is_told(plant: Plant, seconds: float, told: str) -> None:
    at = datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()
    assert outlook(plant, 960, deadline=at)["deadline"]["outlook"] == told


def test_also_while_nobody_knows_when_it_starts(plant: Plant) -> None:
    plant.controller._pool.workers["one-0"].ready = False  # and no load was ever timed
    plant.controller._pool._loads.clear()
    at = datetime.fromtimestamp(time.time() + 250.0, UTC).isoformat()
    found = outlook(plant, 960, deadline=at)
    assert found["start"] is None
    assert found["deadline"]["outlook"] == "cannot be met"


def test_who_waits_behind_a_long_task_is_told_of_its_length(plant: Plant) -> None:
    found = service(plant).tasks
    for title, count in (("red/first", 960), ("red/second", 96)):
        found.submit(Submit(task=document(plant, title, count), by="ann"))
    starts = {row["title"]: row["start"] for row in found.page(ListTasks()) if row["state"] == "queued"}
    assert starts["red/second"]["seconds"] == pytest.approx(292.0, rel=0.1)


def test_a_task_that_comes_after_a_running_one_or_at_a_time_has_an_estimate(plant: Plant) -> None:
    found = service(plant).tasks
    found.submit(Submit(task=document(plant, "red/first", 960), by="ann"))
    plant.run(lambda: bool(plant.cluster.held))
    then = datetime.fromtimestamp(time.time() + 4000.0, UTC).isoformat()
    found.submit(Submit(task=document(plant, "red/behind", 96, after=["red/first"]), by="ann"))
    found.submit(Submit(task=document(plant, "red/later", 96, not_before=then), by="ann"))
    behind, later = (found.one(ShowTask(reference=title)) for title in ("red/behind", "red/later"))
    # 292 s of training, and half a minute until it is published. The worker says nothing of when it ends.
    assert behind["start"]["earliest"] < 322.0 < behind["start"]["latest"]
    assert behind["why"].startswith("comes after red/first; starts in about ")
    assert behind["place"] is None
    assert 3900.0 < later["start"]["earliest"] <= later["start"]["seconds"] <= 4000.0
    # What is told of its start holds for its end: that is 292 s after it may begin, and not before.
    soon = datetime.fromtimestamp(time.time() + 4150.0, UTC).isoformat()
    told = outlook(plant, 960, not_before=then, deadline=soon)
    assert told["deadline"]["outlook"] == "cannot be met"
    found.submit(Submit(task=document(plant, "red/last", 96, after=["red/behind"]), by="ann"))
    assert found.one(ShowTask(reference="red/last"))["start"] is None  # nobody knows when that one is published


def test_a_cold_pool_is_estimated_by_how_long_it_took_to_load_before(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant(pools={"one": {"max": 1, "idle_seconds": 0}})
    plant.run(lambda: plant.controller.layout_of(BASE) is not None and not plant.cluster.workers)
    ended(plant=plant, name="before", row_count=96, seconds=28.8, spec=_plain(plant))
    plant.controller._pool._loads["one"].clear()
    assert outlook(plant, 96)["start"] is None
    plant.controller._pool._loads["one"].append(45.0)
    told = outlook(plant, 96)
    assert told["start"]["earliest"] < 45.0 < told["start"]["latest"]
    assert told["start"]["seconds"] == pytest.approx(45.0)
    assert (
        "no worker of pool one is ready: one is started for the first task that waits; starts in about 45 s"
        in told["why"]
    )
