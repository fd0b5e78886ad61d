"""All that workers do is charged to the team whose task they do it for, and once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.tasks.task_events import CancelRequested, Claimed, PreemptRequested, TrainingFailed
from orchestrator.tasks.task_record import TaskState
from tests.orchestrator.plant import Plant
from workers.orders import Evaluate, Train

MakePlant = Callable[..., Plant]
TRAIN, SCORE = 2.5, 0.5
"""Worker-seconds that the stand-in cluster's workers tell of."""


def spent(plant: Plant, title: str) -> list[tuple[str, float]]:
    return [(one.what, one.seconds) for one in plant.queue.spent(plant.get(title).task_id)]


def places(plant: Plant) -> dict[str, int]:
    """Id of each task that stands in line to its place, from 1."""
    return {task.task_id: place for place, task in enumerate(plant.controller.line()[0], 1)}


def test_scoring_is_charged_to_the_team_of_the_task_that_is_scored(make_plant: MakePlant) -> None:
    tight = {"energy_ratio_min": 0.5, "rank_max": 2, "beyond_rank_max": "drop"}
    plant = make_plant(subspace=tight, gate={"drop_max": 1.0, "merge_gap_max": 1.0})
    plant.submit("red/first")
    plant.run()
    plant.submit("blue/second")
    plant.run()
    # Blue's merge moved red's task, which is scored again: that is red's task, kept as good as it was.
    assert spent(plant, "red/first") == [("train", TRAIN), ("score", SCORE), ("score", SCORE)]
    assert spent(plant, "blue/second") == [("train", TRAIN), ("score", SCORE)]


@pytest.mark.parametrize("what", ["cancel", "preempt"])
def test_an_attempt_that_was_stopped_is_charged_for_the_time_that_it_ran(plant: Plant, what: str) -> None:
    plant.cluster.hold = lambda order: isinstance(order, Train)
    (task,) = plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    with plant.queue._database.writing() as connection:  # it has run for ten hours
        connection.exec_driver_sql(
            "UPDATE tasks SET record = json_set(record, '$.order_at', json_extract(record, '$.order_at') - 36000)"
        )
    plant.queue.apply(task.task_id, CancelRequested("ann", 1.0) if what == "cancel" else PreemptRequested("ann"))
    plant.controller.wake()
    plant.run(lambda: len(spent(plant, "red/alpha")) == 1)
    ((kind, seconds),) = spent(plant, "red/alpha")
    assert kind == "train"
    assert seconds == pytest.approx(36_000.0, abs=10.0)


def test_ten_hours_that_are_not_over_let_the_other_team_go_first(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2)
    plant.cluster.hold = lambda order: True
    (long,) = plant.submit("red/long")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.submit("red/older", "blue/a", "blue/b", "blue/c")
    plant.run(lambda: len(plant.cluster.held) == 2)
    assert list(places(plant)) == ["t-red-older", "t-blue-b", "t-blue-c"]  # a minute each, so far
    with plant.queue._database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE tasks SET record = json_set(record, '$.order_at', json_extract(record, '$.order_at') - 36000) "
            f"WHERE task_id = '{long.task_id}'"
        )
    assert list(places(plant)) == ["t-blue-b", "t-blue-c", "t-red-older"]
    assert places(plant)["t-blue-b"] == 1


def test_a_place_with_a_gpu_is_charged_for_it_also_while_versions_are_scored(make_plant: MakePlant) -> None:
    plant = make_plant(pools={"half": {"max": 1, "gpus": 0.5}, "none": {"max": 1}})
    plant.submit("red/gpu", pool="half")
    plant.submit("blue/cpu", pool="none")
    plant.run()
    assert {one.gpus for one in plant.queue.spent(plant.get("blue/cpu").task_id) if one.what == "train"} == {0.0}
    found = [one for one in plant.queue.spent(plant.get("red/gpu").task_id) if one.gpus]
    assert ("train", TRAIN, 0.5) in [(one.what, one.seconds, one.gpus) for one in found]
    used = plant.queue.gpu_use_of_teams(0.0)["red"]
    assert used == pytest.approx(sum(0.5 * one.seconds for one in found), rel=1e-3)
    (waiting,) = plant.submit("red/next", pool="half")
    (task,), _ = plant.controller.line()
    assert (task.task_id, task.gpus) == (waiting.task_id, 0.5)


def test_a_restart_counts_nothing_twice(plant: Plant) -> None:
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.kill()
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.release()
    plant.step(1)
    plant.kill()  # whatever landed in that step is asked for again, and the worker remembers
    plant.run()
    assert spent(plant, "red/alpha") == [("train", TRAIN), ("score", SCORE)]
    assert plant.queue.use_of_teams(0.0) == {"red": pytest.approx(TRAIN + SCORE, rel=1e-3)}  # it decays meanwhile


def test_scoring_that_was_lost_is_charged_and_so_is_the_next_try(plant: Plant) -> None:
    plant.cluster.evaluation_faults = {"red/alpha": ["lost"]}
    plant.submit("red/alpha")
    plant.run()
    kinds = [kind for kind, _ in spent(plant, "red/alpha")]
    assert kinds == ["train", "score", "score"]
    assert plant.get("red/alpha").state is TaskState.PUBLISHED


def test_time_that_a_worker_lost_because_the_storage_was_away_is_charged_too(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["away"]}
    plant.submit("red/alpha")
    plant.run()
    assert [kind for kind, _ in spent(plant, "red/alpha")] == ["away", "train", "score"]


def test_a_task_whose_worker_was_lost_twice_has_paid_for_both(plant: Plant) -> None:
    (task,) = plant.submit("red/alpha")
    for number, token in enumerate("ab"):
        plant.queue.apply(task.task_id, Claimed(token=token, worker="w", at=100.0 * number))
        plant.queue.apply(
            task.task_id, TrainingFailed(token=token, fault="lost", message="gone", at=100.0 * number + 30.0)
        )
    assert spent(plant, "red/alpha") == [("train", 30.0), ("train", 30.0)]
