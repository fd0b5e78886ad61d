"""Many tasks that a merge touched are scored in one order; what goes wrong with one of them, or with the worker, does
not take the others down."""

from __future__ import annotations

import pytest

from tests.orchestrator.plant import Plant
from tests.orchestrator.stand_in_cluster import RowCount
from workers.orders import Evaluate, EvaluateTogether

TITLES = ("red/a", "red/b", "red/c", "blue/d", "blue/e")


@pytest.fixture
def waiting(plant: Plant) -> Plant:
    """Five tasks are trained, and will be merged and scored together once nothing is held any more."""
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit("red/first")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.submit(*TITLES, eval_count=20)
    plant.run(lambda: all(plant.states()[title] == "merging" for title in TITLES))
    plant.cluster.hold = lambda order: False
    return plant


def published(plant: Plant) -> bool:
    plant.cluster.release()
    plant.run()
    return set(plant.states().values()) == {"published"}


def test_five_tasks_of_a_version_are_scored_in_one_order_and_each_team_pays_for_its_own(waiting: Plant) -> None:
    plant = waiting
    assert published(plant)
    assert plant.cluster.together == [3, 2]
    spent = [use for title in TITLES for use in plant.queue.spent(plant.get(title).task_id) if use.what == "score"]
    assert [use.team for use in spent] == ["red"] * 3 + ["blue"] * 2
    assert [use.seconds for use in spent] == [2 / 3] * 3 + [2 / 2] * 2  # 2 s an order
    version = plant.get("red/a").version
    assert {score.count for score in plant.state.scores[version].values()} == {RowCount}


@pytest.mark.parametrize("fault", ["bug", "input"])
def test_a_task_that_fails_is_scored_again_alone_and_its_neighbours_keep_theirs(waiting: Plant, fault: str) -> None:
    plant = waiting
    plant.cluster.evaluation_faults["red/b"] = [fault]
    assert published(plant)
    assert plant.cluster.together == [3, 2]
    counted = [title for _, title in plant.cluster.evaluations]
    assert sorted(counted) == sorted(["red/first", *TITLES, "red/b"])


@pytest.mark.parametrize("fault", ["lost", "crash", "rank lost"])
def test_if_the_worker_is_lost_each_task_is_scored_alone_on_a_budget_of_its_own(waiting: Plant, fault: str) -> None:
    plant = waiting
    plant.cluster.evaluation_faults["red/b"] = [fault]
    assert published(plant)
    assert plant.cluster.together == [3, 2]


def test_a_task_that_can_never_be_scored_is_the_one_that_is_rejected(waiting: Plant) -> None:
    plant = waiting
    plant.cluster.evaluation_faults["red/b"] = ["bug"] * 99
    published(plant)
    states = plant.states()
    assert states.pop("red/b") == "rejected"
    assert set(states.values()) == {"published"}


def test_a_control_plane_that_is_killed_gives_the_same_order_again(waiting: Plant) -> None:
    plant = waiting
    plant.cluster.hold = lambda order: isinstance(order, EvaluateTogether)
    plant.cluster.release()
    plant.cluster.hold = lambda order: isinstance(order, EvaluateTogether)
    plant.run(lambda: len(plant.cluster.held) == 2)
    before = [order.token for order in plant.cluster.held]
    plant.kill()
    plant.step(9)
    assert [order.token for order in plant.cluster.held] == before  # known again, not begun beside it
    assert published(plant)
    assert plant.cluster.together == [3, 2]
