"""A team borrows what others leave idle and gives it back: in the loop, with records and orders."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.tasks.task_record import TaskState
from tests.orchestrator.plant import Plant
from workers.orders import Train

MakePlant = Callable[..., Plant]
TEAMS = {"red": {"places": 1}, "blue": {"places": 2}}


def at_work(plant: Plant) -> list[str]:
    return sorted(record.title for record in plant.queue.tasks((TaskState.TRAINING,)))


def test_a_borrower_gives_its_place_back_with_a_checkpoint_and_borrows_no_more(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3, teams=TEAMS)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a", "red/b", "red/c", "red/d")
    plant.run(lambda: len(plant.cluster.held) == 3)
    assert at_work(plant) == ["red/a", "red/b", "red/c"]
    plant.submit("blue/one")
    plant.run(lambda: "blue/one" in at_work(plant))
    # Of red's two that were borrowed one was enough: one of those that began last.
    gave, kept = (("red/b", "red/c"), ("red/c", "red/b"))[plant.get("red/c").preemptions]
    assert at_work(plant) == sorted(["blue/one", "red/a", kept])
    assert (plant.get(gave).preemptions, plant.get(kept).preemptions) == (1, 0)
    assert plant.get(gave).gave_back_at is not None
    events = [event.text for event in plant.queue.events(plant.get(gave).task_id)]
    assert any("team blue, which is within its quota" in text for text in events)
    plant.submit("blue/two", "blue/three")
    plant.run(lambda: "blue/two" in at_work(plant))
    plant.step(3)
    assert at_work(plant) == ["blue/one", "blue/two", "red/a"]  # blue has its two, red its one
    plant.cluster.release()
    plant.run()
    assert set(plant.states().values()) == {"published"}


def test_a_task_that_gave_its_place_back_keeps_its_next_attempt(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, teams={"red": {"places": 1}, "blue": {}})
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a", "red/b")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.submit("blue/one")
    plant.run(lambda: "blue/one" in at_work(plant))
    (gave,) = [record for record in plant.queue.tasks() if record.preemptions]
    assert gave.state is TaskState.QUEUED
    plant.kill()  # all of it is in the records
    plant.cluster.release()
    plant.run()
    again = plant.get(gave.title)
    assert (again.attempt, again.preemptions, again.state) == (2, 1, TaskState.PUBLISHED)
