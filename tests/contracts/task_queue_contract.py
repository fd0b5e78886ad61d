"""What the task queue must do on every database, as one class of tests. A database gives a `url`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select, update

from configs.errors import Conflict, InvalidInput, NameTaken, NotFound, NotLeading, QueueFull, UnreadableTask
from configs.settings import DEFAULT_POOL, FailureSettings
from orchestrator.scheduling.fair_share import HALF_LIFE_SECONDS, Use, Waiting
from orchestrator.tasks import tables
from orchestrator.tasks.task_events import (
    CameDue,
    CancelRequested,
    Claimed,
    Judged,
    MergeBegun,
    Merged,
    PreemptRequested,
    Replaced,
    Restored,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_queue import NOBODY, TaskQueue
from orchestrator.tasks.task_record import Drain, Pause, TaskRecord, TaskState
from orchestrator.tasks.task_rows import LOG, PROGRESS
from tests.builders import BASE, task_record, trained
from workers.orders import Point

ALL = {DEFAULT_POOL: None}


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


def narrated(queue: TaskQueue, task_id: str) -> str:
    """All that is told of a task."""
    return "\n".join(event.text for event in queue.events(task_id))


def stored_text(queue: TaskQueue, task_id: str) -> str:
    with queue._database.reading() as connection:
        chosen = select(tables.tasks.c.record).where(tables.tasks.c.task_id == task_id)
        return str(connection.execute(chosen).scalar_one())


def write_text(queue: TaskQueue, task_id: str, text: str) -> None:
    """Put something else where a record was."""
    with queue._database.writing() as connection:
        connection.execute(update(tables.tasks).where(tables.tasks.c.task_id == task_id).values(record=text))


def rewrite(queue: TaskQueue, task_id: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a stored record as another release would have written it."""
    stored = json.loads(stored_text(queue, task_id))
    change(stored)
    write_text(queue, task_id, json.dumps(stored))


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

    def test_under_another_leader_nothing_is_written_and_all_is_read(self, queue: TaskQueue, url: str) -> None:
        record = task_record()
        queue.add(record)
        leader, late = TaskQueue(url, fence=0), TaskQueue(url, fence=NOBODY)
        leader.apply(record.task_id, Claimed(token="tok", worker="worker-0", at=1.0))
        before = queue.get(record.task_id)
        for write in (
            lambda: late.apply(record.task_id, CancelRequested("ann", 1.0)),
            lambda: late.add(task_record("red/other", task_id="t-2")),
            lambda: late.append(record.task_id, [("log", "late")]),
            lambda: late.heartbeat(record.task_id, "tok", 9.0, {}),
            lambda: late.set_pause("red", Pause(by="ann", reason="", at=1.0)),
        ):
            with pytest.raises(NotLeading):
                write()
        assert late.tasks() == queue.tasks() == [before]
        assert [event.kind for event in queue.events(record.task_id)] == ["submitted", "Claimed"]
        leader.close()
        late.close()

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

    # --- what keeps a task from standing in line ---

    def test_a_task_stands_in_line_when_what_it_comes_after_is_published(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/first", state=TaskState.EVALUATING, version=3))
        queue.add(task_record("blue/done", state=TaskState.PUBLISHED, version=2))
        behind, _ = queue.add(task_record("red/behind", {"after": ["red/first", "blue/done"]}))
        assert (behind.awaits, queue.waiting(ALL), queue.is_anyone_waiting(ALL)) == (("t-red-first",), [], False)
        queue.apply("t-red-first", Judged(True, "fine", 5.0))
        assert [waiting.task_id for waiting in queue.waiting({DEFAULT_POOL: 1})] == ["t-red-behind"]
        assert "red/first" in narrated(queue, "t-red-behind")

    def test_all_tasks_behind_one_that_is_not_published_are_parked_with_it(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/first"))
        queue.add(task_record("red/second", {"after": ["red/first"]}))
        queue.add(task_record("blue/third", {"after": ["red/second"]}))
        queue.apply("t-red-first", CancelRequested("ann", 5.0))
        for title, before in (("red/second", "red/first"), ("blue/third", "red/second")):
            record = queue.find(title)
            assert (record.state, record.reason_codes) == (TaskState.PARKED, ("dependency-failed",))
            assert record.reason.startswith(f"comes after {before} ")

    def test_a_task_behind_what_is_not_there_or_has_failed_is_refused(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/failed", state=TaskState.PARKED))
        for title in ("red/failed", "red/nobody"):
            record = task_record("red/behind", {"after": [title]})
            with pytest.raises(InvalidInput, match=title):
                queue.check(record, 5)
            with pytest.raises(InvalidInput, match=title):
                queue.add(record)
        queue.check(task_record("red/behind", {"after": ["red/nobody"]}), 5, beside=["red/nobody"])
        assert len(queue.tasks()) == 1

    def test_tasks_come_due_in_the_order_of_their_times(self, queue: TaskQueue) -> None:
        for number in (3, 1, 2):
            spec = {"not_before": f"1970-01-01T00:0{number}:00Z"}
            queue.add(task_record(f"red/at-{number}", spec, not_due=True))
        assert queue.waiting(ALL) == []
        assert queue.due(now=30.0) == ([], 60.0)
        assert queue.due(now=130.0) == (["t-red-at-1", "t-red-at-2"], 180.0)
        for task_id in queue.due(now=130.0)[0]:
            queue.apply(task_id, CameDue())
        assert queue.due(now=500.0) == (["t-red-at-3"], None)
        assert {waiting.task_id for waiting in queue.waiting(ALL)} == {"t-red-at-1", "t-red-at-2"}

    def test_a_pause_is_kept_until_it_is_taken_back_and_the_first_counts(self, queue: TaskQueue) -> None:
        ann, bob = Pause(by="ann", reason="audit", at=2.0), Pause(by="bob", at=3.0)
        assert queue.set_pause("red", ann) is None
        assert queue.set_pause("red", bob) == ann
        assert queue.set_pause("", bob) is None
        assert queue.pauses() == {"red": ann, "": bob}
        assert (queue.set_pause("red", None), queue.set_pause("red", None)) == (ann, None)
        assert queue.pauses() == {"": bob}

    def test_who_gave_its_place_back_is_known_in_the_line(self, queue: TaskQueue) -> None:
        queue.add(task_record(spec={"max_run_seconds": 50.0}))
        assert queue.waiting(ALL)[0].seconds_max == 50.0
        queue.apply("t-red-alpha", Claimed(token="tok", worker="worker-0", at=1.0))
        queue.apply("t-red-alpha", PreemptRequested("team blue", gives_back=True))
        queue.apply("t-red-alpha", TrainingFailed(token="tok", fault="preempted", message="x", at=9.0))
        assert [waiting.preempted_at for waiting in queue.waiting(ALL)] == [9.0]
        assert (queue.is_anyone_waiting(ALL), queue.is_anyone_waiting(ALL, without=["red"])) == (True, False)
        assert queue.waiting(ALL, without=["red"]) == queue.waiting({DEFAULT_POOL: 1}, without=["red"]) == []

    def test_a_teams_tasks_that_have_not_ended_are_counted_and_a_drain_is_kept_as_it_was_asked_for(
        self, queue: TaskQueue
    ) -> None:
        for title in ("red/a", "red/b", "blue/c"):
            queue.add(task_record(title))
        queue.apply("t-red-a", CancelRequested("ann", 5.0))
        assert queue.alive_of_teams() == {"red": 1, "blue": 1}
        asked = Drain(what="worker-0", by="ann", at=5.0, lets_end=True)
        assert (queue.set_drain("worker-0", False, asked), queue.drains()) == (None, [asked])
        assert queue.set_drain("worker-0", False, None) == asked

    # --- advancing ---

    def test_of_eight_that_claim_at_once_one_wins(self, queue: TaskQueue) -> None:
        for turn in range(4):
            record = task_record(f"red/c-{turn}")
            queue.add(record)
            claims = [Claimed(token=f"tok-{n}", worker=f"worker-{n}", at=1.0) for n in range(8)]
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
        queue.apply(record.task_id, Claimed(token="tok", worker="worker-0", at=1.0))
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
        queue.apply(record.task_id, Claimed(token="tok", worker="worker-0", at=1.0))
        how = {"method": "share", "basis_version": 3, "trainable_parameters": 12288, "resumed_from": 500}
        queue.apply(record.task_id, TrainingDone(trained("tok", **how), 2.0))
        queue.apply(record.task_id, Merged(4))
        assert not queue.heartbeat(record.task_id, "tok", 100.0, {})  # the lease of the training
        queue.apply(record.task_id, Claimed(token="ref", worker="worker-1", at=3.0))
        assert queue.heartbeat(record.task_id, "ref", 100.0, {"step": 7})
        queue.apply(record.task_id, TrainingFailed(token="ref", fault="input", message="too few rows", at=4.0))
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
        before = queue.apply(record.task_id, Claimed(token="new", worker="worker-0", at=1.0))
        assert queue.apply(record.task_id, TrainingDone(trained("old"), 2.0)) == before
        assert queue.apply(record.task_id, TrainingFailed(token="old", fault="bug", message="x", at=2.0)) == before
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
            queue.apply(record.task_id, Claimed(token=token, worker="w", at=1.0))
            record = queue.apply(record.task_id, TrainingFailed(token=token, fault="lost", message="gone", at=2.0))
        assert (record.state, record.lost_machines) == (TaskState.PARKED, 3)

    # --- heartbeats ---

    def test_a_heartbeat_keeps_progress_while_its_lease_is_the_tasks(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        assert queue.progress(record.task_id) == {}
        queue.apply(record.task_id, Claimed(token="tok", worker="worker-0", at=1.0))
        assert queue.heartbeat(record.task_id, "tok", 61.0, {"step": 3, "loss": None}) is True
        assert queue.progress(record.task_id) == {"step": 3, "loss": None}

    def test_a_heartbeat_under_another_token_is_refused_and_changes_nothing(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        assert queue.heartbeat(record.task_id, "", 61.0, {"step": 1}) is False  # it is not training
        queue.apply(record.task_id, Claimed(token="new", worker="worker-0", at=1.0))
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
        told = Point(
            at=7.0,
            step=10,
            loss=0.25,
            learning_rate=0.002,
            steps=20,
            samples_per_second=30.0,
            memory_bytes=4,
            resumed_from=5,
            machine={"cpu": 90.0},
        )
        queue.append_log(record.task_id, ["a line", told])
        old, new = queue.curve(record.task_id)
        assert (old.step, old.loss, old.learning_rate, old.steps) == (5, 0.5, 0.001, 0)
        assert old.at == queue.events(record.task_id)[1].at
        assert new == told
        assert "tokens" not in queue.events(record.task_id)[-1].text  # not measured is left out: JSON knows no NaN

    # --- pages ---

    def test_pages_follow_each_other_by_age_and_lose_nothing_while_tasks_change(self, queue: TaskQueue) -> None:
        records = [task_record(f"red/{n}", task_id=f"t-{9 - n}", submitted_at=10.0 + n // 3) for n in range(9)]
        for record in records:
            queue.add(record)
        expected = [record.task_id for record in sorted(records, key=lambda r: (r.submitted_at, r.task_id))]
        newest = queue.page(limit=4)
        queue.apply(newest[-1].task_id, CancelRequested("ann", 1.0))
        middle = queue.page(before=newest[0].task_id, limit=4)
        oldest = queue.page(before=middle[0].task_id, limit=4)
        assert [record.task_id for record in (*oldest, *middle, *newest)] == expected
        assert (len(middle), len(oldest)) == (4, 1)
        assert queue.page(team="red", before=expected[1], limit=3) == oldest
        assert queue.page(before=expected[0]) == []
        assert queue.page((TaskState.CANCELLED,)) == [queue.get(newest[-1].task_id)]
        with pytest.raises(NotFound):
            queue.page(before="t-nobody")

    def test_whoever_follows_the_tasks_is_told_of_those_that_changed(self, queue: TaskQueue) -> None:
        assert queue.changes(0) == ([], 0)
        one, two = task_record("red/one"), task_record("red/two")
        for record in (one, two):
            queue.add(record)
        told, after = queue.changes(0)
        assert told == [one, two]
        assert queue.changes(after) == ([], after)
        claimed = queue.apply(two.task_id, Claimed(token="tok", worker="w", at=1.0))
        told, later = queue.changes(after)
        assert told == [claimed]
        queue.append_log(one.task_id, ["a line", Point(at=1.0, step=5, loss=0.5, learning_rate=0.1)])
        assert queue.changes(later)[0] == []  # lines of a log change no record

    def test_many_ids_are_asked_for_at_once(self, queue: TaskQueue) -> None:
        record = task_record()
        queue.add(record)
        ids = [record.task_id, *(f"t-{n}" for n in range(40_000))]  # more than SQLite takes in one statement
        assert queue.among(ids) == {record.task_id: record}
        assert queue.known(ids) == {record.task_id}
        assert queue.teams_of(ids) == {record.task_id: record.team}
        assert queue.among([]) == {}

    # --- what the loop asks ---

    def test_waiting_tasks_come_without_their_records_and_each_teams_line_in_its_order(self, queue: TaskQueue) -> None:
        assert queue.waiting(ALL) == queue.waiting({DEFAULT_POOL: 3}) == []
        assert not queue.is_anyone_waiting(ALL)
        for team in ("red", "blue", "a-team"):
            for n in range(4):
                queue.add(task_record(f"{team}/{n}", submitted_at=10.0 + n, spec={"priority": 5 if n == 2 else -n}))
        queue.apply("t-blue-0", Claimed(token="tok", worker="w", at=1.0))
        assert queue.is_anyone_waiting(ALL)
        line = {team: [w for w in queue.waiting(ALL) if w.team == team] for team in ("red", "blue", "a-team")}
        assert line["red"] == [
            Waiting(task_id="t-red-2", team="red", priority=5, submitted_at=12.0),
            Waiting(task_id="t-red-0", team="red", priority=0, submitted_at=10.0),
            Waiting(task_id="t-red-1", team="red", priority=-1, submitted_at=11.0),
            Waiting(task_id="t-red-3", team="red", priority=-3, submitted_at=13.0),
        ]
        assert [w.task_id for w in line["blue"]] == ["t-blue-2", "t-blue-1", "t-blue-3"]
        heads = queue.waiting({DEFAULT_POOL: 2})
        assert len(heads) == 6
        assert all([w for w in heads if w.team == team] == tasks[:2] for team, tasks in line.items())
        assert [record.task_id for record in queue.in_flight()] == ["t-blue-0"]

    def test_the_places_of_tasks_that_main_may_hold_come_without_their_records(self, queue: TaskQueue) -> None:
        for n, state in enumerate(("published", "parked", "parked", "rejected", "evaluating")):
            queue.add(task_record(f"red/{n}", state=TaskState(state), version=0 if n == 2 else n + 1))
        assert sorted((at.task_id, at.version) for at in queue.placed(BASE)) == [("t-red-0", 1), ("t-red-1", 2)]
        assert queue.is_anyone_unjudged(BASE)
        queue.apply("t-red-4", Judged(True, "", 1.0))
        assert not queue.is_anyone_unjudged(BASE)
        assert ("t-red-4", TaskState.PUBLISHED, 5) in [(at.task_id, at.state, at.version) for at in queue.placed(BASE)]

    # --- names that can return ---

    def test_a_name_that_was_submitted_again_is_told_to_whoever_wants_to_roll_back(self, queue: TaskQueue) -> None:
        parked = task_record("red/a", task_id="t-old", state=TaskState.PARKED, version=3)
        queue.add(parked)
        assert queue.living_of_names(["red/a", "red/b"]) == {}
        new = task_record("red/a", task_id="t-new")
        assert queue.add(new)[1]
        assert queue.living_of_names(["red/a", "red/b"]) == {"red/a": [new]}

    def test_of_two_tasks_of_one_name_the_older_does_not_come_back_while_the_newer_lives(
        self, queue: TaskQueue
    ) -> None:
        queue.add(task_record("red/a", task_id="t-old", state=TaskState.PARKED, version=3))
        queue.add(task_record("red/a", task_id="t-new"))
        back = Restored("main holds it since version 3", 3)
        with pytest.raises(NameTaken) as caught:
            queue.apply("t-old", back)
        assert (caught.value.task_id, caught.value.other_id) == ("t-old", "t-new")
        assert queue.try_apply(["t-old"], back) == []
        assert queue.get("t-old").state is TaskState.PARKED
        queue.apply("t-new", CancelRequested("ann", 1.0))
        assert queue.apply("t-old", back).state is TaskState.PUBLISHED

    # --- revisions ---

    @staticmethod
    def line(queue: TaskQueue) -> None:
        """A task with three revisions: the first replaced, the second rejected, then published, and a fourth try."""
        for task_id, number, revises, state in (
            ("t-1", 1, "", TaskState.REPLACED),
            ("t-2a", 2, "t-1", TaskState.REJECTED),
            ("t-2", 2, "t-1", TaskState.PUBLISHED),
            ("t-3", 3, "t-2", TaskState.QUEUED),
        ):
            age = {"t-1": 1.0, "t-2a": 2.0, "t-2": 3.0, "t-3": 4.0}[task_id]
            version = 0 if state is TaskState.QUEUED else int(age)
            queue.add(
                task_record(
                    "red/a", task_id=task_id, number=number, revises=revises, submitted_at=age, version=version
                ).model_copy(update={"state": state})
            )

    def test_a_revision_is_found_by_its_number_and_the_newest_one_by_the_name(self, queue: TaskQueue) -> None:
        queue.add(task_record("red/a", task_id="t-0", state=TaskState.CANCELLED, submitted_at=0.5))
        self.line(queue)
        assert [one.task_id for one in queue.revisions(queue.get("t-2"))] == ["t-1", "t-2a", "t-2", "t-3"]
        assert [one.task_id for one in queue.revisions(queue.get("t-0"))] == ["t-0"]
        assert queue.find("red/a").task_id == "t-3"
        assert [queue.find(f"red/a@{number}").task_id for number in (1, 2, 3)] == ["t-1", "t-2", "t-3"]
        with pytest.raises(NotFound, match="there is no revision 4"):
            queue.find("red/a@4")
        assert {at.task_id: at.state for at in queue.placed(BASE)} == {
            "t-1": TaskState.REPLACED,
            "t-2": TaskState.PUBLISHED,
        }
        assert {one.task_id for one in queue.living_of_names(["red/a"])["red/a"]} == {"t-2", "t-3"}

    def test_a_task_after_a_revised_one_waits_for_the_revision_on_its_way(self, queue: TaskQueue) -> None:
        self.line(queue)
        behind, _ = queue.add(task_record("red/b", {"after": ("red/a",)}))
        assert behind.awaits == ("t-3",)
        queue.apply("t-3", CancelRequested("ann", 5.0))
        later, _ = queue.add(task_record("red/c", {"after": ("red/a",)}))
        assert later.awaits == ()  # the newest that is alive is published

    def test_an_earlier_revision_comes_back_though_the_next_one_is_on_its_way(self, queue: TaskQueue) -> None:
        self.line(queue)
        with pytest.raises(NameTaken):
            queue.apply("t-1", Restored("main holds it since version 4", 4))  # beside the published second
        queue.apply("t-2", Replaced("in its place", 5.0))
        assert queue.apply("t-1", Restored("main holds it since version 4", 4)).state is TaskState.PUBLISHED

    # --- a full queue ---

    def test_a_full_queue_is_told_with_the_team_and_its_limit_and_takes_the_same_submission_again(
        self, queue: TaskQueue
    ) -> None:
        first = task_record("red/a", client_key="k")
        assert queue.add(first, queued_max=1)[1]
        with pytest.raises(QueueFull) as caught:
            queue.add(task_record("red/b"), queued_max=1)
        assert (caught.value.team, caught.value.limit) == ("red", 1)
        with pytest.raises(QueueFull):
            queue.check(task_record("red/other"), 1)
        assert queue.add(task_record("red/a", task_id="t-2", client_key="k"), queued_max=1) == (first, False)
        queue.check(task_record("blue/other"), 1)
        queue.apply(first.task_id, Claimed(token="tok", worker="w", at=1.0))
        assert queue.add(task_record("red/b"), queued_max=1)[1]

    def test_of_eight_that_want_the_last_place_at_once_one_gets_it(self, queue: TaskQueue) -> None:
        found = at_once(8, lambda n: queue.add(task_record(f"red/{n}"), queued_max=1))
        assert sum(isinstance(answer, QueueFull) for answer in found) == 7
        assert len(queue.tasks()) == 1

    # --- what was used ---

    def test_ten_hours_that_were_cancelled_cost_ten_hours(self, queue: TaskQueue) -> None:
        queue.add(task_record())
        queue.apply("t-red-alpha", Claimed(token="tok", worker="w", at=0.0))
        queue.apply("t-red-alpha", CancelRequested("ann", 36_000.0))
        queue.apply(
            "t-red-alpha",
            TrainingFailed(token="tok", fault="cancelled", message="stopped", at=36_000.0, seconds=35_990.0),
        )
        assert queue.use_of_teams(36_000.0) == {"red": 35_990.0}

    def test_every_attempt_costs_its_own_time_and_none_is_counted_twice(self, queue: TaskQueue) -> None:
        queue.add(task_record(spec={"method": {"refine_epochs": 1}}))
        steps = [
            Claimed(token="one", worker="w", at=0.0),
            TrainingFailed(
                token="one", fault="lost", message="gone", at=100.0
            ),  # nobody can say: 100 s until it was noticed
            Claimed(token="two", worker="w", at=200.0),
            TrainingFailed(token="two", fault="preempted", message="at step 3", at=250.0, seconds=40.0),
            Claimed(token="three", worker="w", at=300.0),
            TrainingDone(trained("three", worker_seconds=7.0), 308.0),
            Merged(1),
            Claimed(token="four", worker="w", at=400.0),
            TrainingDone(trained("four", worker_seconds=3.0), 404.0),
        ]
        for event in steps:
            queue.apply("t-red-alpha", event)
            if isinstance(event, TrainingDone | TrainingFailed):
                queue.apply("t-red-alpha", event)  # a restarted control plane hears of it again
        for _ in range(2):
            queue.charge(
                "t-red-alpha", Use(team="red", seconds=1.5, ended_at=410.0), token="2-t-red-alpha-0", what="score"
            )
        assert [(spent.what, spent.seconds, spent.ended_at) for spent in queue.spent("t-red-alpha")] == [
            ("train", 100.0, 100.0),
            ("train", 40.0, 250.0),
            ("train", 7.0, 308.0),
            ("refine", 3.0, 404.0),
            ("score", 1.5, 410.0),
        ]
        assert queue.use_of_teams(410.0) == {"red": pytest.approx(151.5, rel=1e-3)}
        assert queue.use_of_teams(410.0 + HALF_LIFE_SECONDS) == {"red": pytest.approx(151.5 / 2, rel=1e-3)}

    def test_a_lost_machine_costs_no_more_than_the_lease_that_it_last_asked_for(self, queue: TaskQueue) -> None:
        queue.add(task_record())
        queue.apply("t-red-alpha", Claimed(token="one", worker="w", at=0.0))
        queue.heartbeat("t-red-alpha", "one", 90.0, {"step": 1})
        queue.apply(
            "t-red-alpha",
            TrainingFailed(token="one", fault="lost", message="the service was down for days", at=200_000.0),
        )
        queue.apply("t-red-alpha", Claimed(token="two", worker="w", at=200_100.0))
        assert queue.progress("t-red-alpha") == {}  # what the first attempt told is not the second's
        queue.apply(
            "t-red-alpha", TrainingFailed(token="two", fault="lost", message="before its first heartbeat", at=200_130.0)
        )
        assert [spent.seconds for spent in queue.spent("t-red-alpha")] == [90.0, 30.0]

    def test_of_eight_that_charge_at_once_all_count(self, queue: TaskQueue) -> None:
        for turn in range(3):
            found = at_once(
                8,
                lambda n, turn=turn: queue.charge(
                    "t", Use(team="red", seconds=1.0, ended_at=5.0), token=f"{turn}-{n % 4}", what="score"
                ),
            )
            assert found == [None] * 8
        assert queue.use_of_teams(5.0) == {"red": 12.0}  # four tokens each time, each told twice
        assert len(queue.spent("t")) == 12

    # --- what other releases wrote ---

    def test_fields_of_another_release_are_left_aside_and_kept_when_the_row_is_written_back(
        self, queue: TaskQueue
    ) -> None:
        record = task_record()
        queue.add(record)

        def newer(stored: dict[str, Any]) -> None:
            stored |= {"mood": "fine"}
            stored["spec"]["lora"]["alpha_of_tomorrow"] = [1, 2]
            del stored["lost_machines"], stored["spec"]["priority"]

        rewrite(queue, record.task_id, newer)
        assert queue.get(record.task_id) == record
        assert queue.tasks() == [record]
        queue.apply(record.task_id, Claimed(token="tok", worker="w", at=1.0))
        stored = json.loads(stored_text(queue, record.task_id))
        assert (stored["mood"], stored["spec"]["lora"]["alpha_of_tomorrow"]) == ("fine", [1, 2])
        assert (stored["state"], stored["token"]) == ("training", "tok")
        assert queue.unreadable() == ()

    @pytest.mark.parametrize("text", ["", "nonsense", "{}", "[]", '{"state": "asleep"}', "asleep", "[" * 5000])
    def test_a_row_that_cannot_be_read_is_named_and_stops_nothing_else(self, queue: TaskQueue, text: str) -> None:
        for name in "abc":
            queue.add(task_record(f"red/{name}"))
        if text == "asleep":
            rewrite(queue, "t-red-b", lambda stored: stored.update(state="asleep"))
        else:
            write_text(queue, "t-red-b", text)
        assert [record.name for record in queue.tasks()] == ["a", "c"]
        assert [record.name for record in queue.page(limit=2)] == ["c"]
        assert set(queue.among(["t-red-a", "t-red-b"])) == {"t-red-a"}
        assert [told.task_id for told in queue.unreadable()] == ["t-red-b"]
        assert "task red/b (t-red-b): its row in the task database cannot be read" in str(queue.unreadable()[0])
        for ask in (
            queue.get,
            queue.find,
            lambda task_id: queue.apply(task_id, Claimed(token="tok", worker="w", at=1.0)),
        ):
            with pytest.raises(UnreadableTask, match="t-red-b"):
                ask("t-red-b")
        assert queue.try_apply(["t-red-b"], Claimed(token="tok", worker="w", at=1.0)) == []
        assert [w.task_id for w in queue.waiting({DEFAULT_POOL: 2})] == ["t-red-a", "t-red-c"]
        assert queue.counts() == {"queued": 3}
        write_text(queue, "t-red-b", task_record("red/b").model_dump_json())  # restored from a backup
        assert len(queue.tasks()) == 3
        assert queue.unreadable() == ()

    def test_points_of_another_release_are_read_as_far_as_they_can_be(self, queue: TaskQueue) -> None:
        queue.add(task_record())
        told = '{"at": 1.0, "step": 5, "loss": 0.5, "learning_rate": 0.1, "of_tomorrow": 3}'
        queue.append("t-red-alpha", [(PROGRESS, told), (PROGRESS, "nonsense"), (PROGRESS, "[]"), (PROGRESS, "{}")])
        assert queue.curve("t-red-alpha") == [Point(at=1.0, step=5, loss=0.5, learning_rate=0.1)]

    @pytest.mark.parametrize("after", [-1, 2**63, 2**200, -(2**200)])
    def test_a_history_may_be_asked_for_after_any_number(self, queue: TaskQueue, after: int) -> None:
        queue.add(task_record())
        assert len(queue.events("t-red-alpha", after)) == (1 if after < 0 else 0)

    def test_events_are_numbered_as_they_are_committed(self, queue: TaskQueue) -> None:
        for title in ("red/a", "blue/b"):
            queue.add(task_record(title))
        known = queue.newest_event()
        with ThreadPoolExecutor(1) as other:
            with queue.database.writing() as connection:
                queue._append(connection, "t-red-a", [("log", "written first, and committed last")], 1.0)
                quick = other.submit(queue.append, "t-blue-b", [("log", "committed first")])
                if queue.database.is_postgres:  # SQLite has one writer at a time
                    quick.result(10)
                read = queue.told(known, 10)
            quick.result(10)
        last = read[-1].event_id if read else known
        texts = [event.text for event in (*read, *queue.told(last, 10))]
        assert sorted(texts) == ["committed first", "written first, and committed last"]

    @pytest.mark.parametrize("value", ["a\0b", "\ud800"])
    def test_what_no_database_can_hold_is_refused_or_not_found(self, queue: TaskQueue, value: str) -> None:
        with pytest.raises((InvalidInput, NotFound)):
            queue.find(value)
        with pytest.raises((InvalidInput, NotFound)):
            queue.get(value)
        with pytest.raises((InvalidInput, NotFound)):
            queue.page(before=value)

    def test_what_was_written_is_there_when_it_is_opened_again(self, queue: TaskQueue, url: str) -> None:
        record = task_record()
        queue.add(record)
        record = queue.apply(record.task_id, Claimed(token="tok", worker="w", at=1.0))
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
