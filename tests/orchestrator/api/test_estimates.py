"""What was told of starts is compared with when tasks did start, and the next estimates are corrected by it."""

from __future__ import annotations

import pytest

from configs.settings import DEFAULT_POOL
from orchestrator.api import estimates
from orchestrator.api.estimates import Estimates
from orchestrator.scheduling.estimate import KNOWN_MIN, pace_of
from orchestrator.scheduling.fair_share import Running
from orchestrator.tasks.task_events import CancelRequested, Claimed
from tests.orchestrator.plant import Plant

PACES = {DEFAULT_POOL: pace_of([100.0])}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves."""
    now = [5000.0]
    monkeypatch.setattr(estimates.time, "time", lambda: now[0])
    return now


def told(found: Estimates, plant: Plant, asked: str) -> float:
    """Seconds until a task of the line starts, behind one that has 100 s to go."""
    line = found.tell(
        plant.queue.waiting({DEFAULT_POOL: None}), [Running("red", 0.0, seconds_left=100.0)], {}, PACES, [asked]
    )
    return line.starts[asked].seconds


def test_tasks_that_took_longer_than_was_told_move_the_next_estimates(plant: Plant, clock: list[float]) -> None:
    found = Estimates(lambda: plant.queue)
    for number in range(KNOWN_MIN):
        (record,) = plant.submit(f"red/{number}")
        told(found, plant, record.task_id)
        clock[0] += 310.0
        plant.queue.apply(record.task_id, Claimed(token="t", worker="w", at=clock[0]))
    (record,) = plant.submit("red/next")
    assert told(found, plant, record.task_id) == pytest.approx(310.0)


def test_what_was_cancelled_says_nothing_of_starts_and_what_is_late_does(plant: Plant, clock: list[float]) -> None:
    found = Estimates(lambda: plant.queue)
    for number in range(KNOWN_MIN):
        (record,) = plant.submit(f"red/{number}")
        told(found, plant, record.task_id)
        clock[0] += 310.0
        plant.queue.apply(record.task_id, CancelRequested("ann", clock[0]))
    (record,) = plant.submit("red/next")
    assert told(found, plant, record.task_id) == pytest.approx(100.0)
    plant.queue.apply(record.task_id, CancelRequested("ann", clock[0]))
    for number in range(KNOWN_MIN):
        plant.submit(f"blue/{number}")
    waiting = plant.queue.waiting({DEFAULT_POOL: None})
    running = [Running("red", 0.0, seconds_left=100.0) for _ in waiting]
    found.tell(waiting, running, {}, PACES, [task.task_id for task in waiting])  # each in 100 s
    clock[0] += 310.0
    assert told(found, plant, waiting[0].task_id) == pytest.approx(310.0)  # all of them wait still


def test_what_is_only_tried_is_not_remembered(plant: Plant, clock: list[float]) -> None:
    found = Estimates(lambda: plant.queue)
    (record,) = plant.submit("red/there")
    found.tell(
        plant.queue.waiting({DEFAULT_POOL: None}), [], {DEFAULT_POOL: [0.0]}, PACES, [record.task_id], remembered=False
    )
    assert found._asked == {}


def test_a_long_line_is_put_in_order_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took, reads = [0.0], [0.05], [0]

    def read() -> tuple[tuple[()], tuple[()]]:
        reads[0] += 1
        now[0] += took[0]
        return (), ()

    monkeypatch.setattr(estimates.time, "monotonic", lambda: now[0])
    line = estimates.KeptLine(read)
    for _ in range(3):
        line()
    assert reads == [3]  # a short one is always as it is now
    took[0] = 1.0
    for second in range(23):
        now[0] = 100.0 + second
        line()
    assert reads == [3 + 3]  # at 100, 111 and 122
