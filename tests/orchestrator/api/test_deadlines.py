"""A deadline that cannot be met is told once, and taken back once when it can be met again."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from configs.task_spec import TaskSpec
from orchestrator.api.deadlines import Deadlines, foreseen
from orchestrator.api.estimates import Line
from orchestrator.api.requests import Cancel, Pause, Resume, ShowTask, Status, Submit
from orchestrator.commands import display
from orchestrator.scheduling.estimate import Estimate, pace_of
from orchestrator.tasks.task_record import TaskState
from tests.builders import task_record
from tests.orchestrator.site import Site


def line(task_id: str, earliest: float, median: float) -> Line:
    """The line of one task that starts then; tasks have a worker for 10 s."""
    return Line({task_id: 1}, {task_id: Estimate(median, earliest, 2 * median, median)}, {"default": pace_of([10.0])})


@pytest.mark.parametrize(
    ("before", "now", "earliest", "median", "outlook"),
    [
        ("", 100.0, 10.0, 50.0, ""),  # trained between 120 and …, 160 in the middle: 200 can be met
        ("", 100.0, 80.0, 95.0, ""),  # 190 at the earliest
        ("", 100.0, 95.0, 99.0, "cannot be met"),  # 205 at the earliest
        ("cannot be met", 100.0, 80.0, 95.0, "cannot be met"),  # 190 at the earliest, and 205 in the middle
        ("cannot be met", 100.0, 70.0, 80.0, ""),  # 190 in the middle
        ("", 200.0, 0.0, 0.0, "missed"),
        ("cannot be met", 200.0, 0.0, 0.0, "missed"),
    ],
)
def test_what_is_foreseen_follows_from_the_estimate_and_wavers_less(
    before: str, now: float, earliest: float, median: float, outlook: str
) -> None:
    record = task_record(spec={"deadline": "1970-01-01T00:03:20Z"}, deadline_outlook=before)  # at 200
    found, message = foreseen(record, line(record.task_id, earliest, median), {}, now)
    assert found == outlook
    assert bool(message) or found == before
    if found == "cannot be met" and not before:
        assert message.endswith("cannot be met: it is trained in 105 s at the earliest".replace("105 s", "2 min"))


def test_what_trains_is_judged_by_what_its_worker_says() -> None:
    record = task_record(spec={"deadline": "1970-01-01T00:03:20Z"}, state=TaskState.TRAINING)
    assert foreseen(record, Line(), {"seconds_left": 101.0}, 100.0)[0] == "cannot be met"
    assert foreseen(record, Line(), {"seconds_left": 99.0}, 100.0)[0] == ""
    assert foreseen(record, Line(), {}, 100.0) == ("", "")  # it has not said


@pytest.mark.changes
def test_it_is_told_once_and_taken_back_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.client.ask(Pause(reason="so that it waits", by="ann"))
    deadline = datetime.fromtimestamp(time.time() + 100, UTC).isoformat()
    spec = TaskSpec.model_validate(site.document("red/soon", deadline=deadline))
    task_id = site.client.ask(Submit(task=spec, by="ann"))["task_id"]
    starts = line(task_id, 1000.0, 2000.0)
    deadlines = Deadlines(lambda: site.plant.queue, lambda asked: starts)

    def told() -> list[str]:
        events = site.client.ask(ShowTask(reference="red/soon"))["events"]
        return [event["text"] for event in events if event["kind"] == "DeadlineForeseen"]

    for _ in range(3):
        deadlines.look()
    assert [late.outlook for late in deadlines.late] == ["cannot be met"]
    assert len(told()) == 1
    assert "cannot be met: it is trained in 17 min at the earliest" in told()[0]

    site.service.status._deadlines = deadlines  # what the service itself estimates depends on how quick this machine is
    status = site.client.ask(Status())
    assert [late["title"] for late in status["late"]] == ["red/soon"]
    display.status(status)
    assert "red/soon: its deadline" in capsys.readouterr().out

    starts = line(task_id, 1.0, 2.0)
    for _ in range(3):
        deadlines.look()
    assert deadlines.late == ()
    assert len(told()) == 2
    assert "can be met again: it is trained in about 12 s" in told()[1]

    # A service that was started anew finds it by itself.
    again = Deadlines(lambda: site.plant.queue, lambda asked: line(task_id, 1000.0, 2000.0))
    again.look()
    assert [late.title for late in again.late] == ["red/soon"]
    site.client.ask(Cancel(reference="red/soon", by="ann"))
    again.look()
    assert again.late == ()
    site.client.ask(Resume(by="ann"))
