"""Every arrow of the drawing in task_lifecycle.py, and that nothing leaves the drawing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import Conflict
from configs.settings import FailureSettings
from orchestrator.scheduling.fair_share import Use
from orchestrator.tasks.task_events import (
    CameDue,
    CancelRequested,
    Claimed,
    DeadlineForeseen,
    DependencyEnded,
    Event,
    Judged,
    MergeBegun,
    Merged,
    MergeRefused,
    MergeUndone,
    Paused,
    PreemptRequested,
    Reason,
    Refined,
    RefinedAgain,
    RefinementRefused,
    Replaced,
    Restored,
    Resumed,
    RolledBack,
    RunsTooLong,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_lifecycle import Step, advance, needs_training_rows, next_step, seconds_left, used_by
from orchestrator.tasks.task_record import Pause, TaskRecord, TaskState
from orchestrator.tasks.task_rows import narrate
from orchestrator.worker_pool import train_order
from tests.builders import task_record, trained

BUDGETS = FailureSettings(lost_machines_max=2, own_bugs_max=1)


def after(record: TaskRecord, *events: Event) -> TaskRecord:
    for event in events:
        record = advance(record, event, BUDGETS)
    return record


CLAIMED = Claimed(token="tok", worker="worker-0", at=1002.0)
DONE = TrainingDone(trained("tok"), 1010.0)


def queued() -> TaskRecord:
    return task_record()


def training() -> TaskRecord:
    return after(queued(), CLAIMED)


def merging() -> TaskRecord:
    return after(training(), DONE)


def begun() -> TaskRecord:
    return after(merging(), MergeBegun("merge:1"))


def evaluating() -> TaskRecord:
    return after(begun(), Merged(3))


def published() -> TaskRecord:
    return after(evaluating(), Judged(True, "fine", 1020.0))


REFINE = {"method": {"refine_epochs": 1}}
REFINED = TrainingDone(trained("ref", staging_key="staging/x/ref/adapter.safetensors", adapter_sha256="12" * 32), 9.0)


def to_refine() -> TaskRecord:
    return after(task_record(spec=REFINE), CLAIMED, DONE, MergeBegun("merge:1"), Merged(3))


def refining() -> TaskRecord:
    return after(to_refine(), Claimed(token="ref", worker="worker-1", at=1012.0))


def trained_again() -> TaskRecord:
    return after(refining(), REFINED)


def rejected() -> TaskRecord:
    return after(evaluating(), Judged(False, "worse", 1020.0))


def parked() -> TaskRecord:
    return after(training(), TrainingFailed(token="tok", fault="input", message="row 3", at=1010.0))


def rolled_back() -> TaskRecord:
    return after(published(), RolledBack("main is version 2", 1030.0))


def cancelled() -> TaskRecord:
    return after(queued(), CancelRequested("ann", 1001.0))


ALL = (
    queued, training, merging, begun, to_refine, refining, trained_again, evaluating, published,
    rejected, parked, rolled_back, cancelled,
)  # fmt: skip


# --- why, for programs ---------------------------------------------------------------------------------------------


def failed(fault: str) -> TrainingFailed:
    return TrainingFailed(token="tok", fault=fault, message="why", at=1010.0)


@pytest.mark.parametrize(
    ("made", "trouble"),
    [
        (lambda: after(training(), failed("lost")), (Reason.MACHINE_LOST,)),
        (lambda: after(training(), failed("bug")), (Reason.INTERNAL_ERROR,)),
        (lambda: after(training(), failed("preempted")), (Reason.PREEMPTED,)),
        (lambda: after(training(), failed("input")), (Reason.BAD_INPUT,)),
        (lambda: after(training(), CancelRequested("ann", 1.0), failed("cancelled")), (Reason.CANCELLED,)),
        (lambda: after(queued(), CancelRequested("ann", 1.0)), (Reason.CANCELLED,)),
        (lambda: after(merging(), MergeRefused("no", 1.0)), (Reason.MERGE_REFUSED,)),
        (lambda: after(merging(), MergeRefused("two", 1.0, Reason.NAME_TAKEN)), (Reason.NAME_TAKEN,)),
        (lambda: after(evaluating(), Judged(False, "worse", 1.0, ("drop", "min-score"))), ("drop", "min-score")),
        (lambda: after(published(), RolledBack("gone", 1.0)), (Reason.ROLLED_BACK,)),
        (lambda: after(published(), RolledBack("gone", 1.0, Reason.REMOVED)), (Reason.REMOVED,)),
    ],
)
def test_a_task_that_stands_still_says_why_in_codes(made: Any, trouble: tuple[str, ...]) -> None:
    record = made()
    assert record.trouble == trouble
    assert TaskRecord.model_validate_json(record.model_dump_json()).trouble == trouble


@pytest.mark.parametrize("made", [queued, training, merging, evaluating, published, to_refine, refining])
def test_a_task_that_goes_on_is_in_no_trouble(made: Any) -> None:
    assert made().trouble == ()


@pytest.mark.parametrize("event", [CLAIMED, Restored("main holds it", 2)])
def test_what_is_over_is_not_told_any_more(event: Event) -> None:
    before = after(training(), failed("lost")) if event is CLAIMED else rolled_back()
    assert before.trouble
    assert after(before, event).trouble == ()


@pytest.mark.parametrize("made", [rejected, parked, cancelled])
def test_a_record_of_a_release_without_codes_has_the_row_of_its_state(made: Any) -> None:
    old = made().model_dump(mode="json")
    del old["reason_codes"]
    assert TaskRecord.model_validate(old).trouble == (old["state"],)


def test_a_code_of_a_newer_release_is_kept_and_told() -> None:
    newer = parked().model_dump(mode="json") | {"reason_codes": ["not-known-yet"]}
    assert TaskRecord.model_validate(newer).trouble == ("not-known-yet",)


# --- the arrows --------------------------------------------------------------------------------------------------


def test_a_claimed_by_a_worker() -> None:
    record = training()
    assert (record.state, record.attempt, record.token, record.worker) == (TaskState.TRAINING, 1, "tok", "worker-0")
    assert record.claimed_at == 1002.0


def test_b_adapter_in_staging() -> None:
    record = merging()
    assert record.state is TaskState.MERGING
    assert record.staging_key == "staging/x/tok/adapter.safetensors"
    assert (record.local_score, record.base_score, record.train_loss) == (0.9, 0.5, 0.25)
    assert (record.steps, record.train_seconds, record.first_step_at) == (10, 2.0, 1003.0)
    assert (record.adapter_sha256, record.adapter_parameters) == ("ef" * 32, 160)


def test_b_what_was_not_measured_is_none_never_zero_or_nan() -> None:
    outcome = trained("tok", math.nan, base_score=math.nan, train_loss=math.nan, first_step_at=0.0)
    record = after(training(), TrainingDone(outcome, 1010.0))
    assert (record.local_score, record.base_score, record.train_loss) == (None, None, None)
    assert record.first_step_at is None


def test_an_attempt_that_lost_its_lease_cannot_write_over_the_results_of_the_one_that_counts() -> None:
    again = after(
        training(),
        TrainingFailed(token="tok", fault="lost", message="no answer", at=1003.0),
        Claimed(token="tok-2", worker="worker-1", at=1004.0),
    )
    lost, counts = train_order(training()).results_key, train_order(again).results_key
    assert lost != counts
    assert after(again, DONE).local_results_key == ""  # told under a token that is no longer the task's
    assert after(again, TrainingDone(trained("tok-2"), 1010.0)).local_results_key == counts


def test_a_task_without_evaluation_rows_keeps_no_results() -> None:
    record = after(task_record(eval_key=""), CLAIMED)
    assert train_order(record).results_key == after(record, DONE).local_results_key == ""


def test_c_machine_lost_goes_back_to_the_queue() -> None:
    record = after(training(), TrainingFailed(token="tok", fault="lost", message="gone", at=1010.0))
    assert (record.state, record.lost_machines, record.own_bugs, record.token) == (TaskState.QUEUED, 1, 0, "")
    assert record.reason == "gone"
    assert after(record, Claimed(token="tok2", worker="worker-1", at=1011.0)).attempt == 2


def test_c_each_fault_has_a_budget_of_its_own() -> None:
    record = queued()
    # 2 lost machines and 1 bug are allowed: three failures, and it is still in the queue.
    for token, fault in (("1", "lost"), ("2", "bug"), ("3", "lost")):
        record = after(
            record,
            Claimed(token=token, worker="w", at=1.0),
            TrainingFailed(token=token, fault=fault, message="x", at=2.0),
        )
        assert record.state is TaskState.QUEUED
    record = after(
        record,
        Claimed(token="4", worker="w", at=3.0),
        TrainingFailed(token="4", fault="lost", message="last straw", at=4.0),
    )
    assert record.state is TaskState.PARKED
    assert record.reason == "gave up after 3 lost machines and 1 internal errors; last: last straw"
    assert record.ended_at == 4.0


def test_c_workers_that_die_are_counted_apart_from_lost_machines() -> None:
    record = queued()
    for number in range(BUDGETS.worker_deaths_max + 1):
        assert record.state is TaskState.QUEUED
        record = after(
            record,
            Claimed(token=str(number), worker="w", at=1.0),
            TrainingFailed(token=str(number), fault="died", message=f"exit code {number}", at=2.0),
        )
    assert (record.state, record.worker_deaths, record.lost_machines) == (TaskState.PARKED, 4, 0)
    assert record.reason == "gave up after 4 workers that died while they did it; last: exit code 3"
    assert record.reason_codes == (Reason.WORKER_DIED,)


def test_c_rows_that_are_damaged_park_at_once_as_what_they_are() -> None:
    record = after(training(), TrainingFailed(token="tok", fault="rows", message="data/x is gone", at=1.0))
    assert (record.state, record.reason, record.own_bugs) == (TaskState.PARKED, "data/x is gone", 0)
    assert record.reason_codes == (Reason.ROWS_DAMAGED,)


def test_what_is_foreseen_of_a_deadline_is_kept_and_told_once() -> None:
    foreseen = DeadlineForeseen(outlook="cannot be met", message="its deadline cannot be met")
    for before in (queued(), training()):
        record = after(before, foreseen)
        assert record.deadline_outlook == "cannot be met"
        assert after(record, foreseen) is record
        assert after(record, DeadlineForeseen(outlook="", message="it can")).deadline_outlook == ""
    with pytest.raises(Conflict):
        after(evaluating(), foreseen)


def test_c_the_second_bug_parks() -> None:
    record = after(
        training(),
        TrainingFailed(token="tok", fault="bug", message="x", at=1.0),
        Claimed(token="2", worker="w", at=2.0),
    )
    record = after(record, TrainingFailed(token="2", fault="bug", message="y", at=3.0))
    assert (record.state, record.own_bugs) == (TaskState.PARKED, 2)


def test_c_a_users_mistake_parks_at_once() -> None:
    record = parked()
    assert (record.state, record.reason, record.lost_machines) == (TaskState.PARKED, "row 3", 0)


def test_d_merged_into_a_version() -> None:
    assert begun().merge_key == "merge:1"
    assert (evaluating().state, evaluating().version) == (TaskState.EVALUATING, 3)


def test_e_refused_by_the_store() -> None:
    record = after(begun(), MergeRefused("has NaN", 1015.0))
    assert (record.state, record.reason, record.ended_at) == (TaskState.PARKED, "has NaN", 1015.0)


def test_f_the_gate_let_it_pass() -> None:
    assert (published().state, published().version, published().ended_at) == (TaskState.PUBLISHED, 3, 1020.0)


def test_g_the_gate_did_not() -> None:
    assert (rejected().state, rejected().reason) == (TaskState.REJECTED, "worse")


def test_h_main_was_rolled_back_behind_it() -> None:
    assert (rolled_back().state, rolled_back().reason) == (TaskState.PARKED, "main is version 2")
    assert rolled_back().version == 3


def test_i_main_holds_it_again() -> None:
    record = after(rolled_back(), Restored("main is version 3", 3))
    assert (record.state, record.version, record.reason) == (TaskState.PUBLISHED, 3, "main is version 3")


def test_i_main_holds_it_in_a_version_that_was_made_again() -> None:
    record = after(published(), Restored("main is version 7", 6))
    assert (record.state, record.version, record.ended_at) == (TaskState.PUBLISHED, 6, 1020.0)


def test_i_a_task_that_never_was_in_a_version_cannot_be_restored() -> None:
    with pytest.raises(Conflict):
        after(parked(), Restored("main is version 3", 3))


@pytest.mark.parametrize("state", [begun, evaluating])
def test_j_its_version_is_gone_and_it_is_merged_again(state: Any) -> None:
    record = after(state(), MergeUndone("its group failed", alone=True))
    assert (record.state, record.merge_key, record.version, record.merge_alone) == (TaskState.MERGING, "", 0, True)


def test_j_once_alone_always_alone() -> None:
    record = after(
        evaluating(), MergeUndone("group", alone=True), MergeBegun("2"), MergeUndone("rollback", alone=False)
    )
    assert record.merge_alone is True


# --- refining ----------------------------------------------------------------------------------------------------


def test_k_merged_and_to_be_refined() -> None:
    record = to_refine()
    assert (record.state, record.version, record.token, record.worker) == (TaskState.REFINING, 3, "", "")


def test_l_claimed_and_its_coefficients_are_trained() -> None:
    record = refining()
    assert (record.state, record.token, record.worker, record.attempt) == (TaskState.REFINING, "ref", "worker-1", 1)
    record = trained_again()
    assert (record.state, record.token, record.worker) == (TaskState.REFINING, "", "")
    assert (record.refined_key, record.refined_sha256) == ("staging/x/ref/adapter.safetensors", "12" * 32)
    # What was measured before merging stays: the refined task is scored with its version.
    assert (record.staging_key, record.local_score, record.train_loss) == (merging().staging_key, 0.9, 0.25)
    assert (record.train_seconds, record.refined_seconds) == (2.0, 2.0)


@pytest.mark.parametrize("fault", ["lost", "bug", "preempted"])
def test_l_within_the_budgets_it_is_claimed_again(fault: str) -> None:
    record = after(refining(), TrainingFailed(token="ref", fault=fault, message="x", at=1.0))
    assert (record.state, record.token, record.unrefined) == (TaskState.REFINING, "", "")
    assert next_step(record) is Step.REFINE
    assert (record.lost_machines, record.own_bugs, record.preemptions) == tuple(
        int(fault == counted) for counted in ("lost", "bug", "preempted")
    )


def test_m_refined_it_is_judged_in_the_version_that_was_made() -> None:
    record = after(trained_again(), Refined(4))
    assert (record.state, record.version, record.unrefined) == (TaskState.EVALUATING, 4, "")
    assert after(evaluating(), Refined(4)).version == 4  # one of its group, which waited


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (TrainingFailed(token="ref", fault="input", message="too few rows", at=1.0), "too few rows"),
        (RefinementRefused("version 3 went on"), "version 3 went on"),
    ],
)
def test_m_not_refined_it_goes_on_as_it_was_merged(event: Event, why: str) -> None:
    record = after(refining(), event)
    assert (record.state, record.version, record.unrefined) == (TaskState.EVALUATING, 3, why)
    assert after(record, Judged(True, "fine", 1.0)).state is TaskState.PUBLISHED


def test_m_over_the_budgets_it_goes_on_too() -> None:
    record = to_refine()
    for token in "123":
        record = after(
            record,
            Claimed(token=token, worker="w", at=1.0),
            TrainingFailed(token=token, fault="lost", message="gone", at=2.0),
        )
    assert (record.state, record.lost_machines) == (TaskState.EVALUATING, 3)
    assert record.unrefined == "gave up after 3 lost machines and 0 internal errors; last: gone"


def test_j_merged_again_it_is_merged_as_refined_and_once_is_enough() -> None:
    record = after(trained_again(), Refined(4), MergeUndone("its group failed", alone=True))
    assert (record.staging_key, record.adapter_sha256) == (record.refined_key, "12" * 32)
    assert after(record, MergeBegun("2"), Merged(5)).state is TaskState.EVALUATING


def test_a_refinement_again_is_told_of_once() -> None:
    record = after(trained_again(), Refined(4), Judged(True, "fine", 1.0))
    again = RefinedAgain(message="for version 6", token="6-again", seconds=3.0, at=1100.0)
    record = after(record, again)
    assert record.refined_seconds == 5.0
    assert advance(record, again, BUDGETS) is record
    assert after(record, RefinedAgain(message="not refined again")).refined_seconds == 5.0


HOURS = 36_000.0
"""Ten hours; the tasks of these tests are claimed at second 1002."""


@pytest.mark.parametrize("fault", ["cancelled", "preempted", "lost", "input", "bug"])
def test_an_attempt_is_its_teams_however_it_ended(fault: str) -> None:
    told = TrainingFailed(token="tok", fault=fault, message="x", at=1002.0 + HOURS, seconds=HOURS - 2.0)
    assert used_by(training(), told) == Use(team="red", seconds=HOURS - 2.0, ended_at=1002.0 + HOURS)
    # Of a machine that is gone nobody can say: from its start until that was noticed.
    assert used_by(training(), replace(told, seconds=None)) == Use(team="red", seconds=HOURS, ended_at=1002.0 + HOURS)


def test_a_machine_that_was_lost_while_nobody_looked_used_no_more_than_its_lease() -> None:
    lost = TrainingFailed(token="tok", fault="lost", message="x", at=1002.0 + HOURS)
    assert used_by(training(), lost, heard_until=1062.0) == Use(team="red", seconds=60.0, ended_at=1062.0)
    assert used_by(training(), lost, heard_until=2 * HOURS) == Use(team="red", seconds=HOURS, ended_at=1002.0 + HOURS)


def test_a_refinement_is_an_attempt_from_its_own_start_on() -> None:
    lost = TrainingFailed(token="ref", fault="lost", message="x", at=5000.0)
    begun = after(to_refine(), Claimed(token="ref", worker="worker-1", at=4000.0))
    assert used_by(begun, lost) == Use(team="red", seconds=1000.0, ended_at=5000.0)
    assert used_by(begun, TrainingDone(trained("ref", worker_seconds=7.5), 5000.0)) == Use(
        team="red", seconds=7.5, ended_at=5000.0
    )


def test_what_ends_no_attempt_costs_nothing() -> None:
    for event in (
        TrainingFailed(token="old", fault="bug", message="x", at=1.0),
        TrainingDone(trained("old"), 1.0),
        CANCEL,
        PREEMPT,
    ):
        assert used_by(training(), event) is None
    assert used_by(merging(), TrainingDone(trained("tok"), 1.0)) is None  # told a second time


@pytest.mark.parametrize("state", [to_refine, refining])
def test_j_not_yet_refined_it_is_refined_where_it_is_merged_again(state: Any) -> None:
    record = after(state(), MergeUndone("a rollback", alone=False))
    assert (record.state, record.token, record.version) == (TaskState.MERGING, "", 0)
    assert advance(record, REFINED, BUDGETS) is record  # the worker did not hear of it
    assert after(record, MergeBegun("2"), Merged(5)).state is TaskState.REFINING


def test_a_record_can_be_read_again_whatever_was_not_measured() -> None:
    outcome = trained("tok", local_score=math.nan, metrics={"log_likelihood": math.nan, "rouge_l": 0.5})
    record = after(training(), TrainingDone(outcome, 1010.0))
    assert (record.local_score, record.metrics) == (None, {"rouge_l": 0.5})
    assert TaskRecord.model_validate_json(record.model_dump_json()) == record


def test_what_was_not_asked_for_is_not_refined() -> None:
    assert evaluating().state is TaskState.EVALUATING


def test_training_rows_are_needed_until_the_refinement_and_no_longer() -> None:
    needed = {state.__name__ for state in ALL if needs_training_rows(state())}
    assert needed == {"queued", "training", "to_refine", "refining"}
    assert needs_training_rows(after(task_record(spec=REFINE), CLAIMED, DONE))  # merging, refined next


# --- preempting --------------------------------------------------------------------------------------------------

PREEMPT = PreemptRequested("ann")


def test_a_preempted_task_goes_back_to_its_place_and_no_budget_pays_for_it() -> None:
    record = training()
    for number in range(1, 9):  # more often than any budget allows
        asked = after(record, PREEMPT)
        assert (asked.state, asked.preempt_requested) == (TaskState.TRAINING, True)
        record = after(asked, TrainingFailed(token="tok", fault="preempted", message="at step 3", at=1010.0))
        assert (record.state, record.preemptions, record.preempt_requested) == (TaskState.QUEUED, number, False)
        assert (record.lost_machines, record.own_bugs, record.token, record.worker) == (0, 0, "", "")
        assert (record.submitted_at, record.reason) == (1000.0, "at step 3")
        record = after(record, CLAIMED)
    assert record.attempt == 9


def test_a_worker_that_is_lost_before_it_wrote_the_checkpoint_costs_what_a_lost_machine_costs() -> None:
    record = after(training(), PREEMPT, TrainingFailed(token="tok", fault="lost", message="gone", at=1010.0))
    assert (record.lost_machines, record.preemptions, record.preempt_requested) == (1, 0, False)


def test_a_task_that_finished_before_it_heard_of_its_preemption_is_merged() -> None:
    assert after(training(), PREEMPT, DONE).state is TaskState.MERGING


def test_a_task_that_was_cancelled_too_does_not_go_on() -> None:
    record = after(
        training(), PREEMPT, CANCEL, TrainingFailed(token="tok", fault="preempted", message="at step 3", at=1.0)
    )
    assert record.state is TaskState.CANCELLED


@pytest.mark.parametrize("state", [queued, to_refine, lambda: after(training(), PREEMPT)])
def test_preempting_what_waits_already_changes_nothing(state: Any) -> None:
    record = state()
    assert advance(record, PREEMPT, BUDGETS) is record


@pytest.mark.parametrize(
    "state", [merging, begun, trained_again, evaluating, published, rejected, parked, rolled_back, cancelled]
)
def test_what_does_not_run_cannot_be_preempted(state: Any) -> None:
    with pytest.raises(Conflict, match="uses no worker that could be taken from it"):
        after(state(), PREEMPT)


# --- what keeps a task from standing in line --------------------------------------------------------------------------

PAUSE = Paused(by="ann", message="audit", at=1005.0)


def test_a_paused_task_keeps_its_place_and_is_claimed_by_nobody_until_it_is_resumed() -> None:
    record = after(queued(), PAUSE)
    assert (record.state, record.blocked, record.paused) == (
        TaskState.QUEUED, "paused", Pause(by="ann", reason="audit", at=1005.0),
    )  # fmt: skip
    with pytest.raises(Conflict):
        after(record, CLAIMED)
    assert advance(record, Paused(by="bob", at=1006.0), BUDGETS) is record  # the first pause counts
    resumed = after(record, Resumed("bob"))
    assert (resumed.blocked, resumed.paused, resumed.submitted_at) == ("", None, 1000.0)
    assert advance(resumed, Resumed("bob"), BUDGETS) is resumed
    assert after(resumed, CLAIMED).state is TaskState.TRAINING


@pytest.mark.parametrize("state", [state for state in ALL if state not in (queued, training)])
def test_what_neither_waits_nor_trains_cannot_be_paused_and_resuming_it_changes_nothing(state: Any) -> None:
    with pytest.raises(Conflict, match="only what waits or trains can be paused"):
        after(state(), PAUSE)
    record = state()
    assert advance(record, Resumed("ann"), BUDGETS) is record


def test_a_task_that_is_paused_while_it_runs_writes_a_checkpoint_and_waits() -> None:
    record = after(training(), PAUSE)
    assert (record.state, record.preempt_requested, record.gives_back) == (TaskState.TRAINING, True, False)
    record = after(record, failed("preempted"))
    assert (record.state, record.blocked, record.preemptions, record.gave_back_at) == (
        TaskState.QUEUED, "paused", 1, None,
    )  # fmt: skip


def test_what_gave_its_places_back_is_known_until_its_next_attempt_has_ended() -> None:
    record = after(training(), PreemptRequested("team blue", gives_back=True), failed("preempted"))
    assert record.gave_back_at == 1010.0
    record = after(record, CLAIMED)
    assert (record.gave_back_at, record.gives_back) == (1010.0, False)
    assert after(record, failed("lost")).gave_back_at is None
    assert after(training(), PreemptRequested("team blue", gives_back=True), failed("lost")).gave_back_at is None


def ended(task_id: str, published: bool) -> DependencyEnded:
    state = "published" if published else "rejected"
    return DependencyEnded(task_id=task_id, title="red/first", state=state, is_published=published, at=1009.0)


def test_a_task_stands_in_line_when_the_last_that_it_comes_after_is_published() -> None:
    record = task_record(awaits=("t-a", "t-b"))
    assert record.blocked == "dependency"
    record = after(record, ended("t-b", True))
    assert (record.awaits, record.blocked) == (("t-a",), "dependency")
    assert after(record, ended("t-a", True)).blocked == ""
    assert advance(record, ended("t-b", False), BUDGETS) is record  # that was told before


def test_a_task_behind_one_that_was_not_published_is_parked_with_its_name() -> None:
    record = after(task_record(awaits=("t-a", "t-b")), ended("t-b", False))
    assert (record.state, record.reason_codes) == (TaskState.PARKED, (Reason.DEPENDENCY_FAILED,))
    assert record.reason == "comes after red/first (t-b), which is rejected"


def test_a_task_stands_in_line_when_its_time_has_come() -> None:
    record = task_record(not_due=True)
    assert record.blocked == "not-before"
    assert after(record, PAUSE).blocked == "paused"  # the first of several reasons
    assert after(record, CameDue()).blocked == ""


def test_a_task_that_runs_for_longer_than_it_may_is_stopped_and_parked() -> None:
    def longest(seconds: float) -> TaskRecord:
        return after(task_record(spec={"max_run_seconds": seconds}), CLAIMED)

    record = longest(50.0)
    assert seconds_left(record, record.order_at + 10.0) == 40.0  # type: ignore[operator]
    preempted = TrainingFailed(token="tok", fault="preempted", message="at step 3", at=1010.0, seconds=30.0)
    record = after(record, preempted, CLAIMED)
    assert seconds_left(record, record.order_at + 10.0) == 10.0  # type: ignore[operator]
    for fault in ("cancelled", "preempted", "lost"):
        parked = after(record, RunsTooLong(1030.0), failed(fault))
        assert (parked.state, parked.reason_codes) == (TaskState.PARKED, (Reason.RAN_TOO_LONG,))
        assert parked.reason == "ran for longer than its max_run_seconds, 50"
    assert after(record, RunsTooLong(1030.0), DONE).state is TaskState.MERGING  # it had finished
    assert after(record, RunsTooLong(1030.0), CANCEL, failed("cancelled")).state is TaskState.CANCELLED
    assert seconds_left(training(), 1e9) is None


# --- leases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", [TrainingDone(trained("old"), 1.0), TrainingFailed(token="old", fault="bug", message="x", at=1.0)]
)
def test_a_worker_whose_lease_was_replaced_is_ignored(event: Event) -> None:
    record = training()
    assert advance(record, event, BUDGETS) is record


@pytest.mark.parametrize("state", [s for s in ALL if s not in (training, refining)])
def test_a_worker_that_speaks_when_nothing_trains_is_ignored(state: Any) -> None:
    record = state()
    # Queued tasks have no token: a report with an empty one must not pass for theirs.
    for token in (record.token, ""):
        assert advance(record, TrainingDone(trained(token), 1.0), BUDGETS) is record
        assert advance(record, TrainingFailed(token=token, fault="bug", message="x", at=1.0), BUDGETS) is record


# --- cancelling --------------------------------------------------------------------------------------------------

CANCEL = CancelRequested("ann", 1001.0)


@pytest.mark.parametrize("state", [queued, merging])
def test_cancelled_at_once_before_it_is_part_of_a_merge(state: Any) -> None:
    record = after(state(), CANCEL)
    assert (record.state, record.reason, record.ended_at) == (TaskState.CANCELLED, "cancelled by ann", 1001.0)


def test_a_training_task_is_cancelled_when_its_worker_stops() -> None:
    asked = after(training(), CANCEL)
    assert (asked.state, asked.cancel_requested) == (TaskState.TRAINING, True)
    assert (
        after(asked, TrainingFailed(token="tok", fault="cancelled", message="stopped", at=1.0)).state
        is TaskState.CANCELLED
    )


@pytest.mark.parametrize("fault", ["lost", "bug", "input"])
def test_a_cancelled_task_is_not_tried_again_whatever_ends_it(fault: str) -> None:
    assert (
        after(training(), CANCEL, TrainingFailed(token="tok", fault=fault, message="x", at=1.0)).state
        is TaskState.CANCELLED
    )


def test_a_cancelled_task_that_finished_first_is_cancelled_all_the_same() -> None:
    assert after(training(), CANCEL, DONE).state is TaskState.CANCELLED


def test_cancelling_twice_changes_nothing() -> None:
    record = cancelled()
    assert advance(record, CANCEL, BUDGETS) is record


@pytest.mark.parametrize("state", [begun, to_refine, refining, evaluating, published])
def test_what_is_part_of_a_version_is_not_cancelled_but_rolled_back(state: Any) -> None:
    with pytest.raises(
        Conflict, match=r"red/alpha: is (merging|refining|evaluating|published) and cannot .*\n.*rollback"
    ):
        after(state(), CANCEL)


@pytest.mark.parametrize("state", [rejected, parked, rolled_back])
def test_what_has_ended_is_not_cancelled(state: Any) -> None:
    with pytest.raises(Conflict, match="cannot be cancelled"):
        after(state(), CANCEL)


# --- everything else ---------------------------------------------------------------------------------------------

EVENTS: tuple[Event, ...] = (
    CLAIMED,
    MergeBegun("m"),
    Merged(3),
    Refined(4),
    RefinementRefused("x"),
    MergeRefused("x", 1.0),
    MergeUndone("x", True),
    Judged(True, "x", 1.0),
    RolledBack("x", 1.0),
    Replaced("x", 1.0),
    Restored("x", 3),
    CameDue(),
    RunsTooLong(1.0),
)
LEGAL = {
    (queued, CameDue), (training, RunsTooLong),
    (queued, Claimed),
    (merging, MergeBegun), (merging, Merged), (merging, MergeRefused), (merging, MergeUndone),
    (begun, MergeBegun), (begun, Merged), (begun, MergeRefused), (begun, MergeUndone),
    (to_refine, Claimed), (to_refine, Refined), (to_refine, RefinementRefused), (to_refine, MergeUndone),
    (refining, Refined), (refining, RefinementRefused), (refining, MergeUndone),
    (trained_again, Refined), (trained_again, RefinementRefused), (trained_again, MergeUndone),
    (evaluating, Refined), (evaluating, MergeUndone), (evaluating, Judged),
    (published, RolledBack), (published, Replaced), (published, Restored),
    (rolled_back, Replaced), (rolled_back, Restored),
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", ALL, ids=lambda state: state.__name__)
def test_an_event_that_is_no_arrow_is_a_conflict(state: Any, event: Event) -> None:
    if (state, type(event)) in LEGAL:
        assert advance(state(), event, BUDGETS).state in TaskState
    else:
        with pytest.raises(Conflict, match=f"'{type(event).__name__}' cannot happen to a task that is"):
            advance(state(), event, BUDGETS)


def test_the_next_step_is_read_off_the_record_alone() -> None:
    assert [next_step(state()) for state in ALL] == [
        Step.TRAIN, Step.AWAIT_ADAPTER, Step.MERGE, Step.MERGE,
        Step.REFINE, Step.AWAIT_ADAPTER, Step.MERGE_REFINED, Step.JUDGE, *[Step.NOTHING] * 5,
    ]  # fmt: skip


tokens = st.sampled_from(["1", "2", ""])
faults = st.sampled_from(["lost", "bug", "input", "cancelled", "preempted"])
any_event = st.one_of(
    st.builds(Claimed, token=tokens, worker=st.just("w"), at=st.floats(1, 9)),
    st.builds(TrainingDone, tokens.map(trained), st.floats(1, 9)),
    st.builds(TrainingFailed, token=tokens, fault=faults, message=st.just("x"), at=st.floats(1, 9)),
    st.builds(MergeBegun, st.just("m")),
    st.builds(Merged, st.integers(1, 5)),
    st.builds(Refined, st.integers(1, 5)),
    st.builds(RefinementRefused, st.just("x")),
    st.builds(MergeRefused, st.just("x"), st.floats(1, 9)),
    st.builds(MergeUndone, st.just("x"), st.booleans()),
    st.builds(Judged, st.booleans(), st.just("x"), st.floats(1, 9)),
    st.builds(RolledBack, st.just("x"), st.floats(1, 9)),
    st.builds(Restored, st.just("x"), st.integers(1, 5)),
    st.builds(CancelRequested, st.just("ann"), st.floats(1, 9)),
    st.builds(PreemptRequested, st.just("ann"), st.booleans()),
    st.builds(Paused, by=st.just("ann"), at=st.floats(1, 9)),
    st.builds(Resumed, st.just("ann")),
    st.builds(CameDue),
    st.builds(RunsTooLong, st.floats(1, 9)),
    st.builds(
        DependencyEnded,
        task_id=st.sampled_from(["t-a", "t-b"]),
        title=st.just("red/a"),
        state=st.just("rejected"),
        is_published=st.booleans(),
        at=st.floats(1, 9),
    ),
)
ENDED = (TaskState.PUBLISHED, TaskState.REJECTED, TaskState.PARKED, TaskState.CANCELLED)


@given(st.lists(any_event, max_size=30), st.booleans())
def test_whatever_happens_in_whatever_order_a_task_stays_on_the_drawing(events: list[Event], refine: bool) -> None:
    spec = (REFINE if refine else {}) | {"max_run_seconds": 5.0}
    record = task_record(spec=spec, awaits=("t-a",) if refine else (), not_due=not refine)
    for event in events:
        before = record.model_dump_json()
        try:
            record_after = advance(record, event, BUDGETS)
        except Conflict:
            assert record.model_dump_json() == before
            continue
        assert record.model_dump_json() == before  # frozen: the old record is never changed
        # What a database gives back is what was put in.
        assert TaskRecord.model_validate_json(record_after.model_dump_json()) == record_after
        record = record_after
        assert record.state in TaskState
        # A refinement that used a budget up does not end the task: merged again, it is not refined again.
        assert record.lost_machines <= BUDGETS.lost_machines_max + 1
        assert record.own_bugs <= BUDGETS.own_bugs_max + 1
        assert record.state is not TaskState.PUBLISHED or record.version > 0
        assert record.state is not TaskState.TRAINING or (record.worker and record.attempt > 0)
        if record.state in (TaskState.PUBLISHED, TaskState.REJECTED, TaskState.PARKED, TaskState.CANCELLED):
            assert record.ended_at is not None


# --- scores that say nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "constant", "is_doubtful"),
    [(0.6, 0.6, True), (0.4, 0.6, True), (0.1 + 0.2, 0.3, True), (0.61, 0.6, False), (0.6, None, False)],
)
def test_a_score_that_the_most_frequent_label_gets_too_is_a_warning_on_the_task(
    score: float, constant: float | None, is_doubtful: bool
) -> None:
    before = training().model_copy(update={"constant_score": constant, "warnings": ("said at submission",)})
    record = after(before, TrainingDone(trained("tok", score), 1010.0))
    said = (
        f"own adapter: accuracy {score:.4f} is no better than always giving the most frequent label of the evaluation"
    )
    assert record.warnings[0] == "said at submission"
    assert [warning.startswith(said) for warning in record.warnings[1:]] == [True] * is_doubtful


def test_the_line_of_a_trained_task_holds_the_warnings_of_its_training() -> None:
    event = TrainingDone(trained("tok", 0.8, warnings=("3 of 4 training rows are cut", "nothing was compared")), 1010.0)
    line = narrate(after(training(), event), event)
    assert line.endswith(" · 3 of 4 training rows are cut; nothing was compared")


@pytest.mark.parametrize(("base", "is_doubtful"), [(0.8, True), (0.79, False), (math.nan, False)])
def test_a_score_that_the_base_model_alone_gets_too_is_a_warning_on_the_task(base: float, is_doubtful: bool) -> None:
    before = training().model_copy(update={"constant_score": 0.5})
    outcome = trained("tok", 0.8, base_score=base)
    record = after(before, TrainingDone(outcome, 1010.0))
    said = "own adapter: accuracy 0.8000 is no better than the base model alone, which scores 0.8000"
    assert [warning.startswith(said) for warning in record.warnings] == [True] * is_doubtful


def test_what_was_not_measured_is_not_doubted() -> None:
    record = task_record(constant_score=0.5)
    assert record.doubt(None) == record.doubt(math.nan) == ""


# --- revisions ---------------------------------------------------------------------------------------------------


def test_a_task_whose_next_revision_took_its_place_is_replaced_and_comes_back() -> None:
    replaced = after(published(), Replaced("version 3 holds t2 in its place", 9.0))
    assert (replaced.state, replaced.reason, replaced.ended_at) == (
        TaskState.REPLACED,
        "version 3 holds t2 in its place",
        9.0,
    )
    assert (replaced.trouble, next_step(replaced), replaced.version) == ((), Step.NOTHING, published().version)
    back = after(replaced, Restored("main holds it since version 4", 4))
    assert (back.state, back.version, back.reason) == (TaskState.PUBLISHED, 4, "main holds it since version 4")


def test_main_moves_back_and_forth_over_a_revision() -> None:
    gone = after(published(), Replaced("x", 9.0), RolledBack("main is empty", 10.0))
    assert (gone.state, gone.reason_codes) == (TaskState.PARKED, (Reason.ROLLED_BACK,))
    assert after(gone, Replaced("forward again", 11.0)).state is TaskState.REPLACED
    assert after(gone, Replaced("forward again", 11.0)).reason_codes == ()


@pytest.mark.parametrize("before", [queued, training, evaluating, rejected, parked])
def test_only_what_main_held_is_replaced(before: Callable[[], TaskRecord]) -> None:
    with pytest.raises(Conflict):
        after(before(), Replaced("x", 9.0))


@pytest.mark.parametrize("event", [CancelRequested("ann", 1.0), CLAIMED, Paused(by="ann", at=1.0)])
def test_a_replaced_task_is_left_alone(event: Event) -> None:
    with pytest.raises(Conflict):
        after(published(), Replaced("x", 9.0), event)


def test_what_training_says_of_each_revisions_rows_is_kept() -> None:
    outcome = trained("tok", scores_of_rows={"t1": 0.8, "t2": 0.9}, main_scores_of_rows={"t1": 0.85, "t2": 0.4})
    record = after(training(), TrainingDone(outcome, 5.0))
    assert (dict(record.scores_of_rows), dict(record.main_scores_of_rows)) == (
        {"t1": 0.8, "t2": 0.9},
        {"t1": 0.85, "t2": 0.4},
    )
