"""What the task queue must do on every database, as one class of tests. A database gives a `url`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from configs.errors import Conflict, NotFound
from configs.settings import FailureSettings
from orchestrator.scheduling.fair_share import Use
from orchestrator.tasks.task_events import (
    CancelRequested,
    Claimed,
    Judged,
    MergeBegun,
    Merged,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_history import LOG, PROGRESS
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState
from tests.builders import task_record, trained
from workers.orders import Point


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act(n)` returned or raised in `count` threads that start together."""
    ready = Barrier(count)

    def run(number: int) -> Any:
        ready.wait()
        try:
            return act(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class TaskQueueContract:
    """Subclass as `TestXTaskQueue` with a fixture `url` of an empty database."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def queue(self, url: str) -> Iterator[TaskQueue]:
        queue = TaskQueue(url, FailureSettings(lost_machines_max=2))
        yield queue
        queue.close()

    def test_a_record_comes_back_as_it_was_put_in(self, queue: TaskQueue) -> None:
        record = task_record(spec={"priority": 7, "training": {"seed": 3}}, local_score=0.1 + 0.2, reason="a → b 'c'")
        assert queue.add(record) == (record, True)
        assert queue.get(record.task_id) == record
        assert [(event.kind, event.text) for event in queue.events(record.task_id)] == [("submitted", "submitted")]

    # --- taking in ---

    def test_the_same_client_key_of_a_team_is_the_same_task(self, queue: TaskQueue) -> None:
        first = task_record(client_key="k")
        queue.add(first)
        again = task_record("red/other-name", task_id="t-2", client_key="k")
        assert queue.add(again) == (first, False)
        assert queue.tasks() == [first]
        assert len(queue.events(first.task_id)) == 1

    def test_the_same_client_key_of_another_team_is_another_task(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/a", client_key="k"))
        assert queue.add(task_record("blue/a", client_key="k"))[1] is True

    @pytest.mark.parametrize("state", [TaskState.QUEUED, TaskState.EVALUATING, TaskState.PUBLISHED])
    def test_a_name_is_taken_while_its_task_lives(self, queue: TaskQueue, state: TaskState) -> None:
        queue.add(task_record("red/a", state=state))
        with pytest.raises(Conflict, match=f"red/a: task t-red-a of that name is {state}"):
            queue.add(task_record("red/a", task_id="t-2"))
        assert len(queue.tasks()) == 1
        assert queue.events("t-2") == []

    @pytest.mark.parametrize("state", [TaskState.PARKED, TaskState.REJECTED, TaskState.CANCELLED])
    def test_a_name_is_free_after_its_task_ended_without_a_result(self, queue: TaskQueue, state: TaskState) -> None:
        queue.add(task_record("red/a", state=state))
        assert queue.add(task_record("red/a", task_id="t-2"))[1] is True

    def test_of_eight_that_submit_the_same_at_once_all_get_one_task(self, queue: TaskQueue) -> None:
        for turn in range(4):
            title = f"red/same-{turn}"
            tasks = [task_record(title, task_id=f"t-{turn}-{n}", client_key=f"k{turn}") for n in range(8)]
            found = at_once(8, lambda n, tasks=tasks: queue.add(tasks[n]))
            assert not [answer for answer in found if isinstance(answer, Exception)]
            assert [is_new for _, is_new in found].count(True) == 1
            assert len({record.task_id for record, _ in found}) == 1

    def test_of_eight_that_want_one_name_at_once_one_gets_it(self, queue: TaskQueue) -> None:
        for turn in range(4):
            tasks = [task_record(f"red/n-{turn}", task_id=f"t-{turn}-{n}") for n in range(8)]
            found = at_once(8, lambda n, tasks=tasks: queue.add(tasks[n]))
            assert sum(isinstance(answer, Conflict) for answer in found) == 7
        assert len(queue.tasks()) == 4

    # --- advancing ---

    def test_of_eight_that_claim_at_once_one_wins(self, queue: TaskQueue) -> None:
        for turn in range(4):
            record = task_record(f"red/c-{turn}")
            queue.add(record)
            claims = [Claimed(f"tok-{n}", f"worker-{n}", 1.0) for n in range(8)]
            found = at_once(8, lambda n, r=record, c=claims: queue.apply(r.task_id, c[n]))
            winners = [answer for answer in found if isinstance(answer, TaskRecord)]
            assert len(winners) == 1
            assert sum(isinstance(answer, Conflict) for answer in found) == 7
            assert queue.get(record.task_id) == winners[0]
            kinds = [event.kind for event in queue.events(record.task_id)]
            assert kinds == ["submitted", "Claimed"]

    def test_every_write_counts_the_revision_and_appends_its_event(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        queue.apply(record.task_id, Claimed("tok", "worker-0", 1.0))
        after = queue.apply(record.task_id, TrainingDone(trained("tok"), 2.0))
        assert (after.revision, after.state) == (2, TaskState.MERGING)
        assert queue.get(record.task_id) == after
        history = [(event.kind, event.text) for event in queue.events(record.task_id)]
        assert history[1:] == [
            ("Claimed", "now training · worker worker-0"),
            ("TrainingDone", "now merging · own adapter scores 0.9000"),
        ]

    def test_the_history_tells_how_an_adapter_came_about_and_why_it_was_not_refined(self, queue: TaskQueue) -> None:
        record = task_record(spec={"method": {"name": "auto", "refine_epochs": 1}})
        queue.add(record)
        queue.apply(record.task_id, Claimed("tok", "worker-0", 1.0))
        how = {"method": "share", "basis_version": 3, "trainable_parameters": 12288, "resumed_from": 500}
        queue.apply(record.task_id, TrainingDone(trained("tok", **how), 2.0))
        queue.apply(record.task_id, Merged(4))
        assert not queue.heartbeat(record.task_id, "tok", 100.0, {})  # the lease of the training
        queue.apply(record.task_id, Claimed("ref", "worker-1", 3.0))
        assert queue.heartbeat(record.task_id, "ref", 100.0, {"step": 7})
        queue.apply(record.task_id, TrainingFailed("ref", "input", "too few rows", 4.0))
        assert [event.text for event in queue.events(record.task_id)][2:] == [
            "now merging · method share · in the basis of version 3 · 12,288 numbers trained · went on from step 500 · "
            "own adapter scores 0.9000",
            "now refining · version 4",
            "now refining · worker worker-1",
            "now evaluating · fault input · goes on as it was merged: too few rows",
        ]

    def test_a_stale_worker_changes_nothing_and_leaves_no_event(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        before = queue.apply(record.task_id, Claimed("new", "worker-0", 1.0))
        assert queue.apply(record.task_id, TrainingDone(trained("old"), 2.0)) == before
        assert queue.apply(record.task_id, TrainingFailed("old", "bug", "x", 2.0)) == before
        assert len(queue.events(record.task_id)) == 2

    def test_several_advance_together_or_not_at_all(self, queue: TaskQueue) -> None:
        merging = [task_record(f"red/{n}", state=TaskState.MERGING) for n in "ab"]
        waiting = task_record("red/c")
        for record in (*merging, waiting):
            queue.add(record)
        ids = [record.task_id for record in (*merging, waiting)]
        with pytest.raises(Conflict):
            queue.apply_all(ids, MergeBegun("m"))
        with pytest.raises(NotFound):
            queue.apply_all([*ids[:2], "t-nobody"], MergeBegun("m"))
        assert [queue.get(task_id).merge_key for task_id in ids] == ["", "", ""]
        assert [len(queue.events(task_id)) for task_id in ids] == [1, 1, 1]
        assert [record.merge_key for record in queue.apply_all(ids[:2], MergeBegun("m"))] == ["m", "m"]

    def test_the_budgets_of_the_settings_count(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        for token in "123":  # two lost machines are allowed here, the third parks
            queue.apply(record.task_id, Claimed(token, "w", 1.0))
            record = queue.apply(record.task_id, TrainingFailed(token, "lost", "gone", 2.0))
        assert (record.state, record.lost_machines) == (TaskState.PARKED, 3)

    # --- heartbeats ---

    def test_a_heartbeat_keeps_progress_while_its_lease_is_the_tasks(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        assert queue.progress(record.task_id) == {}
        queue.apply(record.task_id, Claimed("tok", "worker-0", 1.0))
        assert queue.heartbeat(record.task_id, "tok", 61.0, {"step": 3, "loss": None}) is True
        assert queue.progress(record.task_id) == {"step": 3, "loss": None}

    def test_a_heartbeat_under_another_token_is_refused_and_changes_nothing(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        assert queue.heartbeat(record.task_id, "", 61.0, {"step": 1}) is False  # it is not training
        queue.apply(record.task_id, Claimed("new", "worker-0", 1.0))
        assert queue.heartbeat(record.task_id, "old", 61.0, {"step": 9}) is False
        assert queue.progress(record.task_id) == {}
        queue.apply(record.task_id, TrainingDone(trained("new"), 2.0))
        assert queue.heartbeat(record.task_id, "new", 61.0, {"step": 9}) is False

    # --- reading ---

    def test_tasks_are_listed_by_age_and_chosen_by_state_and_team(self, queue: TaskQueue) -> None:
        young = task_record("red/young", submitted_at=30.0)
        old = task_record("blue/old", submitted_at=10.0)
        done = task_record("red/done", submitted_at=20.0, state=TaskState.PUBLISHED)
        for record in (young, old, done):
            queue.add(record)
        assert queue.tasks() == [old, done, young]
        assert queue.tasks(team="red") == [done, young]
        assert queue.tasks((TaskState.PUBLISHED, TaskState.PARKED)) == [done]
        assert queue.tasks((TaskState.QUEUED,), team="blue") == [old]
        assert queue.live() == [old, young]

    def test_tasks_are_counted_by_state(self, queue: TaskQueue) -> None:
        assert queue.counts() == {}
        records = [task_record(f"red/{name}") for name in "abc"]
        for record in records:
            queue.add(record)
        queue.apply(records[0].task_id, CancelRequested("ann", 1.0))
        assert queue.counts() == {"cancelled": 1, "queued": 2}

    def test_a_task_is_found_by_id_by_its_beginning_and_by_name(self, queue: TaskQueue) -> None:
        one, two = task_record("red/a", task_id="tabc1"), task_record("blue/a", task_id="tabd2")
        queue.add(one)
        queue.add(two)
        assert queue.find("tabc1") == queue.find("tabc") == queue.find("red/a") == one
        assert queue.find("blue/a") == two
        with pytest.raises(NotFound, match="'tab': several tasks begin like this"):
            queue.find("tab")

    def test_of_several_lives_of_a_name_the_newest_is_found(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/a", task_id="t1", submitted_at=1.0, state=TaskState.PARKED))
        second = task_record("red/a", task_id="t2", submitted_at=2.0)
        queue.add(second)
        assert queue.find("red/a") == second

    @pytest.mark.parametrize("reference", ["nobody", "red/nobody", "", "/", "t%", "t_red_a", "red/"])
    def test_what_is_not_there_is_not_found(self, queue: TaskQueue, reference: str) -> None:
        queue.add(task_record("red/a", task_id="t-red-a"))
        with pytest.raises(NotFound):
            queue.find(reference)

    def test_a_history_is_read_in_the_order_it_was_written_and_from_any_point(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        queue.append_log(record.task_id, [f"line {n}" for n in range(20)])
        queue.append("t-other", [(LOG, "not mine")])
        events = queue.events(record.task_id)
        assert [event.text for event in events[1:21]] == [f"line {n}" for n in range(20)]
        assert [event.event_id for event in events] == sorted(event.event_id for event in events)
        assert {event.kind for event in events[1:]} == {LOG}
        assert queue.events(record.task_id, after=events[15].event_id) == events[16:]

    def test_points_of_the_curves_come_back_as_they_were_told_and_stay_readable_where_less_was_kept(
        self, queue: TaskQueue
    ) -> None:
        record = task_record()
        queue.add(record)
        queue.append(record.task_id, [(PROGRESS, '{"step": 5, "loss": 0.5, "learning_rate": 0.001}')])  # a row of old
        told = Point(7.0, 10, 0.25, 0.002, 20, 30.0, memory_bytes=4, resumed_from=5, machine={"cpu": 90.0})
        queue.append_log(record.task_id, ["a line", told])
        old, new = queue.curve(record.task_id)
        assert (old.step, old.loss, old.learning_rate, old.steps) == (5, 0.5, 0.001, 0)
        assert old.at == queue.events(record.task_id)[1].at
        assert new == told
        assert "tokens" not in queue.events(record.task_id)[-1].text  # not measured is left out: JSON knows no NaN

    def test_use_is_what_was_trained_since(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        queue.apply(record.task_id, Claimed("tok", "w", 100.0))
        queue.apply(record.task_id, TrainingDone(trained("tok", seconds=7.0), 108.0))
        assert queue.uses(since=106.0) == [Use("red", 7.0, 107.0)]  # claimed at 100 + 7 s
        assert queue.uses(since=107.0) == []

    def test_what_was_written_is_there_when_it_is_opened_again(self, queue: TaskQueue, url: str) -> None:
        record = task_record()
        queue.add(record)
        record = queue.apply(record.task_id, Claimed("tok", "w", 1.0))
        queue.close()
        again = TaskQueue(url)
        assert again.get(record.task_id) == record
        assert len(again.events(record.task_id)) == 2
        for event in (TrainingDone(trained("tok"), 2.0), MergeBegun("m"), Merged(1), Judged(True, "", 3.0)):
            record = again.apply(record.task_id, event)
        assert record.state is TaskState.PUBLISHED
        with pytest.raises(Conflict):
            again.apply(record.task_id, CancelRequested("ann", 4.0))
        again.close()
