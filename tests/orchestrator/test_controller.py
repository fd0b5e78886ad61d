"""The loop with a stand-in cluster: what becomes of tasks, and that nothing is lost or done twice on the way."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from configs.errors import Corrupt, InvalidInput, NotFound, NotWritten, OtherBaseModel, StoreFull, Unavailable
from orchestrator import controller, worker_pool
from orchestrator.alarms import AlarmCode
from orchestrator.api.requests import Submit
from orchestrator.api.service import Service
from orchestrator.candidate import EVALUATION_TRIES
from orchestrator.cluster import MachineLost, ProcessEnded
from orchestrator.judging.score_table import evaluations_due
from orchestrator.tasks.task_events import CancelRequested, PreemptRequested, Reason
from orchestrator.tasks.task_record import TaskState, results_key
from orchestrator.tasks.task_rows import LOG
from subspace_store import StagedAdapter, SubspaceState, SubspaceStore
from subspace_store.log.version import Identity
from subspace_store.requests import Hold, Quarantine, Release, Remove, Rollback
from subspace_store.storage.protocol import Storage
from tests.builders import BASE, LAYOUT, adapter, task_spec, with_pools
from tests.orchestrator.plant import Plant
from tests.orchestrator.stand_in_cluster import _landed
from workers.orders import Evaluate, Order, Point, Train
from workers.process_monitor import ProcessEnd
from workers.results import Results, write_results

MakePlant = Callable[..., Plant]


# --- the straight way --------------------------------------------------------------------------------------------


def test_a_task_is_trained_merged_scored_and_published(plant: Plant) -> None:
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.version, task.attempt) == (TaskState.PUBLISHED, 1, 1)
    assert (task.local_score, task.base_score, task.steps, task.train_seconds) == (0.9, 0.5, 10, 2.0)
    state = plant.state
    assert state.refs == {"main": 1, "candidate": 1}
    score = state.scores[1][task.task_id]
    assert (score.score, score.count) == (0.9, 100)
    assert plant.cluster.store_calls == ["merge", "scores", "publish"]


def test_an_import_without_evaluation_rows_is_published_without_a_score(plant: Plant) -> None:
    plant.submit("red/alpha", eval_key="", eval_count=0)
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.get("red/alpha").local_score is None
    assert plant.state.scores == {}
    assert plant.cluster.evaluations == []


def test_tasks_that_wait_together_are_one_version(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.submit("red/a", "red/b", "blue/c")
    plant.run()
    assert plant.merges() == [["blue/c", "red/a", "red/b"]]
    assert {record.version for record in plant.queue.tasks()} == {1}


def test_merging_waits_until_the_version_before_is_judged(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit("red/a")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.submit("red/b", "blue/c")
    plant.run(lambda: plant.states() == {"red/a": "evaluating", "red/b": "merging", "blue/c": "merging"})
    plant.step(5)
    assert plant.merges() == [["red/a"]]
    plant.cluster.release()
    plant.run()
    assert plant.merges() == [["red/a"], ["blue/c", "red/b"]]


def test_while_main_is_held_what_passed_waits_unpublished_and_goes_on_after_the_release(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.submit("red/a")
    plant.run()
    plant.cluster.write(BASE, Hold(reason="audit", actor="ann", op_key="hold:h")).result()
    plant.controller.wake(log_moved=True)
    plant.submit("red/b")
    plant.run(lambda: plant.get("red/b").state is TaskState.EVALUATING)
    plant.submit("red/c")
    plant.run(lambda: plant.get("red/c").state is TaskState.MERGING)  # its training does not wait for the verdict
    plant.step(20)
    assert plant.states() == {"red/a": "published", "red/b": "evaluating", "red/c": "merging"}
    assert plant.state.refs == {"main": 1, "candidate": 2}
    assert plant.cluster.store_calls.count("publish") == 1
    assert plant.cluster.replaced == []
    plant.cluster.write(BASE, Release(actor="ann", op_key="release:r")).result()
    plant.controller.wake(log_moved=True)
    plant.run()
    assert plant.states() == {"red/a": "published", "red/b": "published", "red/c": "published"}
    assert plant.cluster.replaced == []


def test_a_release_that_nobody_told_of_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.candidate.HELD_SECONDS", 0.01)
    plant.open_store()
    plant.cluster.write(BASE, Hold(reason="audit", actor="ann", op_key="hold:h")).result()
    plant.submit("red/a")
    plant.run(lambda: plant.state.scores.get(1) is not None)
    plant.step(3)
    plant.cluster.write(BASE, Release(actor="ann", op_key="release:r")).result()
    plant.run()
    assert plant.states() == {"red/a": "published"}


def test_what_the_gate_refuses_is_refused_while_main_is_held(plant: Plant) -> None:
    plant.open_store()
    plant.cluster.write(BASE, Hold(reason="audit", actor="ann", op_key="hold:h")).result()
    plant.cluster.score = lambda title, held: 0.1
    plant.submit("red/a")
    plant.run()
    assert plant.states() == {"red/a": "rejected"}


def test_a_hold_that_comes_between_the_verdict_and_the_publication_holds(plant: Plant) -> None:
    store = plant.open_store()
    publish = store.publish

    def late(*args: Any, **kwargs: Any) -> None:
        store.publish = publish  # type: ignore[method-assign]
        store.hold("audit", actor="ann")
        publish(*args, **kwargs)

    store.publish = late  # type: ignore[method-assign]
    plant.submit("red/a")
    plant.run(lambda: "publish" in plant.cluster.store_calls)
    plant.run(lambda: plant.controller.subspaces[BASE].store.state.held is not None)
    plant.step(5)
    assert plant.states() == {"red/a": "evaluating"}
    assert plant.cluster.store_calls.count("publish") == 1
    assert (plant.cluster.replaced, plant.state.epoch) == ([], 1)  # refused is not fenced: the writer goes on
    plant.cluster.write(BASE, Release(actor="ann", op_key="release:r")).result()
    plant.controller.wake(log_moved=True)
    plant.run()
    assert plant.states() == {"red/a": "published"}


def test_a_quarantined_task_is_parked_with_the_reason_and_its_group_goes_on(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2)
    bad, _ = plant.submit("red/bad", "red/good")
    plant.open_store()
    plant.cluster.write(
        BASE, Quarantine(task_id=bad.task_id, reason="poisoned data", actor="ann", op_key="quarantine:q")
    ).result()
    plant.run()
    assert plant.states() == {"red/bad": "parked", "red/good": "published"}
    assert "poisoned data" in plant.get("red/bad").reason


def test_one_worker_stays_free_to_score_a_version_that_waits(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.release()
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/b", "red/c")
    # red/a landed and both workers are free. Were both given to training, its version would wait for their end.
    plant.run(lambda: plant.get("red/a").state is TaskState.PUBLISHED, limit_seconds=5)
    assert plant.get("red/b").state is TaskState.TRAINING


def test_teams_take_turns_though_one_submitted_first(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/1", "red/2", "red/3", "blue/1")
    began = []
    for _ in range(4):
        plant.run(lambda: any(isinstance(order, Train) for order in plant.cluster.held))
        began.append(plant.cluster.held[0].spec.team)
        hold = plant.cluster.hold
        plant.cluster.release()
        plant.cluster.hold = hold
    # red starts (its first is oldest) and is charged 2 s of use, so blue's first is next, then red again. Without
    # the charge red would go three times.
    assert began == ["red", "blue", "red", "red"]


def test_training_data_is_deleted_once_trained_and_evaluation_data_is_kept(plant: Plant) -> None:
    (task,) = plant.submit("red/alpha")
    assert plant.storage.read(task.train_key) == b"training rows"
    plant.run()
    with pytest.raises(NotFound):
        plant.storage.read(task.train_key)
    assert plant.storage.read(task.eval_key) == b"evaluation rows"


def files_of(plant: Plant, title: str) -> set[str]:
    """Which of a task's files are there: `train`, `eval`, `upload`."""
    record = plant.get(title)
    kinds = {record.train_key: "train", record.eval_key: "eval"}
    keys = [key for folder in ("data/", "staging/") for key in plant.storage.keys(folder) if record.task_id in key]
    return {kinds.get(key, "upload") for key in keys}


def test_of_a_task_that_ended_only_what_it_may_need_again_is_kept(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.score = lambda title, held: 0.1 if title == "red/forgets" else 0.9
    plant.cluster.training_faults = {"red/wrong": ["input"]}
    bad, *_ = plant.submit("red/refused", "red/good", "red/forgets", "red/wrong")
    plant.open_store()
    plant.cluster.write(
        BASE, Quarantine(task_id=bad.task_id, reason="why", actor="ann", op_key="quarantine:q")
    ).result()
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.run(lambda: len(plant.cluster.held) > 0)
    assert files_of(plant, "red/good") == {"eval", "upload"}
    plant.cluster.release()
    plant.run()
    plant.step(2)
    assert plant.states() == {
        "red/refused": "parked", "red/good": "published", "red/forgets": "rejected", "red/wrong": "parked"
    }  # fmt: skip
    assert files_of(plant, "red/good") == {"eval"}
    for title in ("red/refused", "red/forgets", "red/wrong"):
        assert files_of(plant, title) == set()
    plant.cluster.write(BASE, Rollback(version=0, actor="ann", op_key="rollback:b")).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.get("red/good").state is TaskState.PARKED)
    plant.kill()
    plant.step(2)
    assert files_of(plant, "red/good") == {"eval"}  # it may come back, and be scored again


def test_of_two_lives_of_a_name_the_older_comes_back_where_the_newer_goes(plant: Plant) -> None:
    (old,) = plant.submit("red/a")
    plant.run()
    plant.cluster.write(BASE, Rollback(version=0, actor="ann", op_key="rollback:1")).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.queue.get(old.task_id).state is TaskState.PARKED)
    (new,) = plant.submit("red/a", task_id="t-a-new")  # older in the order of the rows' ids: it is not looked at first
    plant.run(lambda: plant.queue.get(new.task_id).state is TaskState.PUBLISHED)
    plant.cluster.write(BASE, Rollback(version=1, actor="ann", op_key="rollback:2")).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.queue.get(old.task_id).state is TaskState.PUBLISHED)
    assert plant.queue.get(new.task_id).state is TaskState.PARKED
    assert plant.held() == ["red/a"]


def test_files_that_were_left_by_a_task_that_ended_go_at_the_next_start_and_those_of_strangers_stay(
    plant: Plant,
) -> None:
    plant.submit("red/alpha")
    plant.run()
    record = plant.get("red/alpha")
    plant.storage.write(record.staging_key, b"an upload that came back")
    plant.storage.write("staging/stranger/1/adapter.safetensors", b"of another database")
    plant.kill()
    plant.step(2)
    assert plant.storage.keys("staging/") == ["staging/stranger/1/adapter.safetensors"]


def test_a_task_that_hardly_moved_is_not_scored_again(make_plant: MakePlant) -> None:
    plant = make_plant(gate={"drift_min": 0.5})
    plant.submit("red/a")
    plant.run()
    plant.submit("red/b")
    plant.run()
    assert plant.cluster.evaluations == [(1, "red/a"), (2, "red/b")]


def test_a_task_that_moved_is_scored_again(make_plant: MakePlant) -> None:
    # Two directions for two adapters of two directions each: the second merge must turn the first task.
    plant = make_plant(gate={"drift_min": 1e-4}, subspace={"rank_fixed": 2})
    plant.submit("red/a")
    plant.run()
    plant.submit("red/b")
    plant.run()
    assert sorted(plant.cluster.evaluations) == [(1, "red/a"), (2, "red/a"), (2, "red/b")]


# --- the gate ----------------------------------------------------------------------------------------------------


def test_a_group_that_fails_the_gate_is_merged_one_by_one_and_only_the_culprit_is_rejected(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(workers=3)
    # red/bad scores 0.9 by itself and 0.6 after merging: a gap of 0.3, above merge_gap_max 0.05.
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    plant.submit("red/a", "red/bad", "blue/c")
    plant.run()
    assert plant.states() == {"red/a": "published", "red/bad": "rejected", "blue/c": "published"}
    assert plant.merges() == [["blue/c", "red/a", "red/bad"], ["red/a"], ["red/bad"], ["blue/c"]]
    assert plant.held() == ["blue/c", "red/a"]
    assert "red/bad scores 0.6000 after merging and 0.9000 with its own adapter" in plant.get("red/bad").reason
    assert sorted(plant.state.rejected) == [1, 3]


def test_what_made_the_difference_is_told_row_by_row(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3, gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"})
    plant.cluster.score = lambda title, held: 0.8 if title == "red/a" and "blue/b" in held else 0.9
    (old,) = plant.submit("red/a")
    # 9 of 10 rows are right at birth, 8 afterwards: differences of −1 and nine times 0, mean −0.1, deviation 0.3162,
    # and 2.262 of its standard errors of 0.1 on either side.
    at_birth = Results(task_id=old.task_id, version=1, metric="accuracy", eval_sha256="ab", per_row=(1.0,) * 9 + (0.0,))
    for results in (at_birth, replace(at_birth, version=2, per_row=(1.0,) * 8 + (0.0,) * 2)):
        write_results(plant.storage, results_key(results.task_id, results.version), results)
    plant.run()
    plant.submit("blue/b")
    plant.run()
    assert plant.get("blue/b").reason == (
        "red/a would fall from 0.9000 at birth to 0.8000, more than gate.drop_max 0.03 "
        "(0.1000 lower on the same 10 rows, 95 % interval -0.1262 to 0.3262)"
    )


@pytest.mark.parametrize(
    ("rows", "told"), [("ab", " (0.5000 lower on the same 2 rows, 95 % interval"), ("of others", "")]
)
def test_a_new_task_is_compared_row_by_row_with_the_adapter_of_the_attempt_that_counts(
    rows: str, told: str, make_plant: MakePlant
) -> None:
    plant = make_plant()
    plant.cluster.score = lambda title, held: 0.4
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    (task,) = plant.submit("red/a")
    plant.run(lambda: plant.merges() == [["red/a"]])
    own = Results(task_id=task.task_id, version=0, metric="accuracy", eval_sha256="ab", per_row=(1.0, 1.0))
    write_results(plant.storage, plant.get("red/a").local_results_key, own)
    lost = f"results/{task.task_id}/local-1-of-a-lost-lease.safetensors"
    write_results(plant.storage, lost, replace(own, per_row=(0.0, 0.0)))
    merged = replace(own, version=1, eval_sha256=rows, per_row=(1.0, 0.0))
    write_results(plant.storage, results_key(task.task_id, 1), merged)
    plant.cluster.release()
    plant.run()
    reason = plant.get("red/a").reason
    assert f"a gap above gate.merge_gap_max 0.05{told}" in reason
    assert ("on the same" in reason) == bool(told)


def test_results_go_with_the_evaluation_rows(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    tasks = plant.submit("red/a", "red/bad")
    for task in tasks:
        for name in ("1", "local-1-another", "local-2-another"):
            plant.storage.write(f"results/{task.task_id}/{name}.safetensors", b"rows")
    plant.run()
    kept = plant.get("red/a").local_results_key
    plant.storage.write(kept, b"rows")
    plant.step()
    assert sorted(plant.storage.keys("results/")) == sorted([results_key(tasks[0].task_id, 1), kept])


def test_newcomers_do_not_overtake_the_tasks_of_a_group_that_failed(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit("red/a", "red/bad")
    plant.run(lambda: plant.merges() == [["red/a", "red/bad"]])
    plant.submit("blue/new")
    plant.run(lambda: plant.get("blue/new").state is TaskState.MERGING)
    plant.cluster.release()
    plant.run()
    assert plant.merges() == [["red/a", "red/bad"], ["red/a"], ["red/bad"], ["blue/new"]]


def test_a_task_that_harms_an_earlier_one_is_rejected_and_the_earlier_one_stays(make_plant: MakePlant) -> None:
    plant = make_plant(
        gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"}
    )  # too few for both: red/a moves
    plant.cluster.score = lambda title, held: 0.8 if title == "red/a" and "blue/b" in held else 0.9
    plant.submit("red/a")
    plant.run()
    plant.submit("blue/b")
    plant.run()
    assert plant.states() == {"red/a": "published", "blue/b": "rejected"}
    assert plant.get("blue/b").reason.startswith("red/a would fall from 0.9000 at birth to 0.8000")
    assert plant.get("blue/b").trouble == ("drop",)
    assert plant.held() == plant.held("candidate") == ["red/a"]


def test_an_evaluation_that_always_fails_rejects_the_version_after_its_tries(plant: Plant) -> None:
    plant.cluster.evaluation_faults = {"red/alpha": ["bug"] * EVALUATION_TRIES}
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "rejected"}
    assert "it could not be scored" in plant.get("red/alpha").reason
    assert plant.get("red/alpha").trouble == ("not-scored",)
    assert "fault of kind bug" in plant.get("red/alpha").reason
    assert len(plant.cluster.evaluations) == EVALUATION_TRIES == 3


def test_an_evaluation_that_fails_twice_is_done_a_third_time(plant: Plant) -> None:
    plant.cluster.evaluation_faults = {"red/alpha": ["bug", "lost"]}
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}


@pytest.mark.parametrize("fault", ["lost", "rank lost"])
def test_workers_that_are_lost_while_scoring_say_nothing_against_the_version(plant: Plant, fault: str) -> None:
    plant.cluster.evaluation_faults = {"red/alpha": [fault] * (EVALUATION_TRIES + 1)}
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}


def test_what_is_to_be_scored_is_worked_out_once_for_all_scores_that_come_in(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def due(state: SubspaceState, version: int, drift_max: float) -> tuple[str, ...]:
        calls.append(version)
        return evaluations_due(state, version, drift_max)

    monkeypatch.setattr("orchestrator.candidate.evaluations_due", due)
    plant = make_plant(workers=8)
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit(*(f"red/task-{n}" for n in range(8)))
    plant.run(lambda: len(plant.cluster.held) == 8)
    while plant.cluster.held:
        plant.cluster._do(*plant.cluster._held.pop(0))
        plant.step()
    plant.run()
    assert plant.held() == [f"red/task-{n}" for n in range(8)]
    assert calls.count(1) <= 3  # moved, before the scores are written, after


def test_scoring_that_takes_its_worker_down_every_time_ends_and_names_the_task(plant: Plant) -> None:
    lost_max = plant.settings.failures.lost_machines_max
    plant.cluster.evaluation_faults = {"red/alpha": ["lost"] * (lost_max + 1)}
    plant.submit("red/alpha")
    plant.run()
    reason = f"it could not be scored: red/alpha: {lost_max + 1} workers were lost while they scored it; last: "
    assert plant.states() == {"red/alpha": "rejected"}
    assert plant.get("red/alpha").reason.startswith(reason)
    assert "was lost: worker-" in plant.get("red/alpha").reason.removeprefix(reason)
    plant.submit("blue/beta")
    plant.run()
    assert plant.states() == {"red/alpha": "rejected", "blue/beta": "published"}


def test_deaths_while_a_version_is_scored_have_the_budget_for_deaths_and_none_of_the_trainings(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(workers=1, failures={"worker_deaths_max": 1, "lost_machines_max": 5})
    plant.cluster.training_faults = {"red/alpha": ["lost"]}  # it dies while it trains, too
    plant.cluster.evaluation_faults = {"red/alpha": ["lost"] * 2}
    plant.cluster.ends = {"worker-0": [ProcessEnd(pid=pid, signal=9) for pid in (7, 8, 9)]}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.worker_deaths) == (TaskState.REJECTED, 1)
    assert task.reason.startswith(
        "it could not be scored: red/alpha: 2 workers died while they scored it; last: worker-0"
    )
    assert "(pid 9) died: it was ended by signal 9" in task.reason
    plant.cluster.evaluation_faults = {"blue/beta": ["lost"]}  # once is within it
    plant.cluster.ends = {"worker-0": [ProcessEnd(pid=10, signal=9)]}
    plant.submit("blue/beta")
    plant.run()
    assert plant.states()["blue/beta"] == "published"


def test_a_score_that_is_not_a_number_is_no_score(plant: Plant) -> None:
    plant.cluster.score = lambda title, held: float("nan")
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "rejected"}
    assert "its score is not a number" in plant.get("red/alpha").reason
    assert plant.state.scores == {}


def alarms_of(plant: Plant) -> str:
    """What rings, as people see it."""
    return "\n".join(map(str, plant.controller.alarms))


def test_a_damaged_store_stops_merging_and_parks_nobody(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise Corrupt("record 3 has another sha256", "log/3.json")

    monkeypatch.setattr(SubspaceStore, "merge", damaged)
    plant.submit("red/alpha", "blue/beta")
    plant.run(until=lambda: bool(list(plant.controller.alarms)))
    plant.step(20)
    assert set(plant.states().values()) <= {"merging", "training", "queued"}
    assert plant.cluster.store_calls == ["merge"]
    assert "record 3 has another sha256" in alarms_of(plant)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_evaluation_that_meets_a_damaged_store_rejects_nobody(make_plant: MakePlant, workers: int) -> None:
    plant = make_plant(workers=workers)
    plant.cluster.evaluation_faults = {"red/alpha": ["damaged"] * 9}
    plant.submit("red/alpha")
    plant.run(until=lambda: plant.controller.alarms.rings(AlarmCode.STORE_DAMAGED))
    plant.submit("blue/beta")
    plant.run(until=lambda: plant.states()["blue/beta"] == "merging")  # training goes on, with one worker too
    plant.step(20)
    assert plant.states() == {"red/alpha": "evaluating", "blue/beta": "merging"}
    assert plant.cluster.store_calls == ["merge"]
    assert len(plant.cluster.evaluations) == 1
    assert "blobs/1: the object that the log names is gone" in alarms_of(plant)
    plant.cluster.evaluation_faults = {}  # somebody restored it, and started the service anew
    plant.kill()
    plant.run()
    assert plant.states() == {"red/alpha": "published", "blue/beta": "published"}


def test_a_training_that_meets_a_damaged_store_waits_and_keeps_nobody_from_training(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.cluster.training_faults = {"red/alpha": ["damaged"] * 9}
    plant.submit("red/alpha", "blue/beta")
    plant.run(until=lambda: plant.states()["blue/beta"] == "merging")
    plant.step(20)
    task = plant.get("red/alpha")
    assert (task.state, task.own_bugs, task.lost_machines) == (TaskState.QUEUED, 0, 0)
    assert task.reason_codes == (Reason.STORE_DAMAGED,)
    assert plant.cluster.trainings == ["red/alpha", "blue/beta"]
    assert plant.controller.alarms.rings(AlarmCode.STORE_DAMAGED)
    plant.cluster.training_faults = {}
    plant.kill()
    plant.run()
    assert plant.states() == {"red/alpha": "published", "blue/beta": "published"}


def test_a_service_that_starts_tells_that_files_of_main_are_gone_and_merges_nothing(plant: Plant) -> None:
    plant.submit("red/alpha")
    plant.run()
    gone = plant.state.versions[1].added[0].coefficients
    plant.storage.delete(gone.key)
    plant.kill()
    plant.submit("blue/beta")
    plant.run(until=lambda: plant.states()["blue/beta"] == "merging")
    plant.step(20)
    assert plant.cluster.store_calls == ["merge", "scores", "publish"]
    assert "version 1 needs 1 objects that are not as they were written" in alarms_of(plant)
    assert gone.key in alarms_of(plant)


# --- faults of training ------------------------------------------------------------------------------------------


def test_a_task_whose_worker_is_lost_is_trained_again_and_published(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["lost"]}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.attempt, task.lost_machines, task.own_bugs) == (TaskState.PUBLISHED, 2, 1, 0)
    assert task.staging_key.startswith(f"staging/{task.task_id}/2-")


@pytest.mark.parametrize("kind", [Train, Evaluate])
def test_a_machine_that_takes_several_workers_with_it_is_one_loss_for_its_task(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch, kind: type[Order]
) -> None:
    monkeypatch.setattr(worker_pool, "SURE_SECONDS", 0.2)
    plant = _asks_at_every_step(make_plant(workers=3, failures={"lost_machines_max": 1}))
    plant.cluster.hold = lambda order: isinstance(order, kind)
    plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.machine_dies()  # with all three: two are idle, and answer until they notice
    plant.cluster.hold = lambda order: False
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.lost_machines) == (TaskState.PUBLISHED, int(kind is Train))
    assert plant.cluster.lost_orders == 1


def test_a_worker_that_does_not_answer_gets_no_order(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "SILENT_SECONDS", 0.0)
    plant = _asks_at_every_step(plant)
    plant.run(lambda: plant.controller.ready_workers == 2)
    plant.cluster.silent = {"worker-0"}
    plant.run(lambda: "worker-silent" in alarms_of(plant), 5)
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.cluster._memory["worker-0"] == {}


def test_a_task_that_kills_its_worker_each_time_is_parked_with_what_killed_it(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1, failures={"worker_deaths_max": 1})
    plant.cluster.training_faults = {"red/alpha": ["lost", "lost"]}
    plant.cluster.ends = {"worker-0": [ProcessEnd(pid=7, exit_code=3), ProcessEnd(pid=8, signal=9, peak_bytes=2**30)]}
    plant.submit("red/alpha")
    plant.submit("blue/beta")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.worker_deaths, task.lost_machines) == (TaskState.PARKED, 2, 0)
    assert task.reason_codes == (Reason.WORKER_DIED,)
    assert task.reason == (
        "gave up after 2 workers that died while they did it; last: worker-0 (pid 8) died: it was ended by signal 9 "
        "(SIGKILL); it had at least 1.00 GiB"
    )
    other = plant.get("blue/beta")
    assert (other.state, other.attempt, other.worker_deaths) == (TaskState.PUBLISHED, 1, 0)


def test_a_task_whose_worker_is_ended_for_the_memory_of_another_process_is_not_charged(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["lost"]}
    end = ProcessEnd(pid=7, signal=9, out_of_memory="the kernel ended it", is_largest=False)
    plant.cluster.ends = {"worker-0": [end], "worker-1": [end]}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.worker_deaths, task.lost_machines) == (TaskState.PUBLISHED, 0, 1)


def test_a_task_goes_on_when_nobody_says_how_its_worker_ended(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "END_SECONDS", 0.05)
    monkeypatch.setattr(plant.cluster, "end_of", lambda worker: Future())  # the machine is gone with who saw it
    plant.cluster.training_faults = {"red/alpha": ["lost"]}
    plant.submit("red/alpha")
    plant.run(lambda: plant.states() == {"red/alpha": "published"}, 10)
    assert (plant.get("red/alpha").worker_deaths, plant.get("red/alpha").lost_machines) == (0, 1)


def test_a_worker_that_does_not_stop_when_it_is_told_to_is_ended_and_its_task_is_cancelled(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "CANCEL_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(plant.cluster, "cancel", lambda worker, token: None)  # one step that takes for ever
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.queue.apply(plant.get("red/alpha").task_id, CancelRequested("ann", time.time()))
    plant.controller.wake()
    plant.run(lambda: plant.states() == {"red/alpha": "cancelled"}, 10)
    task = plant.get("red/alpha")
    assert task.reason == "cancelled; it did not stop within 0 s, so worker-0 was ended"
    assert (plant.cluster.replaced, task.lost_machines, task.worker_deaths) == (["worker-0"], 0, 0)
    plant.cluster.hold = lambda order: False
    plant.submit("red/beta")
    plant.run()
    assert plant.states()["red/beta"] == "published"


def test_an_error_outside_the_workers_own_handling_counts_as_a_lost_machine(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["crash"]}
    plant.submit("red/alpha")
    plant.run()
    assert (plant.get("red/alpha").state, plant.get("red/alpha").lost_machines) == ("published", 1)


def test_a_storage_that_is_away_costs_a_task_nothing_but_time(plant: Plant) -> None:
    outage = ["away"] * 20  # longer than any budget: lost_machines_max is 5
    plant.cluster.training_faults = {"red/alpha": outage.copy()}
    plant.cluster.evaluation_faults = {"red/alpha": outage.copy()}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.attempt, task.lost_machines, task.own_bugs) == (TaskState.PUBLISHED, 1, 0, 0)


def test_an_order_that_cannot_be_sent_is_sent_again(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    run, failing = plant.cluster.run, iter([Unavailable("Ray is away")])

    def run_or_fail(worker: str, order: Train | Evaluate) -> Any:
        for error in failing:
            raise error
        return run(worker, order)

    monkeypatch.setattr(plant.cluster, "run", run_or_fail)
    plant.submit("red/alpha")
    with pytest.raises(Unavailable):
        plant.run()
    plant.controller.wake()  # as `run` does after a step that failed
    plant.run()
    assert (plant.get("red/alpha").state, plant.get("red/alpha").attempt) == (TaskState.PUBLISHED, 1)


def test_a_users_mistake_parks_at_once_with_its_message(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["input"]}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.reason, task.attempt) == (TaskState.PARKED, "fault of kind input", 1)


def test_our_own_bug_is_tried_once_more_and_its_traceback_is_in_the_tasks_log(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["bug"]}
    plant.submit("red/alpha")
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.own_bugs) == (TaskState.PUBLISHED, 1)
    logged = [event.text for event in plant.queue.events(task.task_id) if event.kind == LOG]
    # The traceback of the first attempt, then what the second one's heartbeats had not fetched.
    assert logged == ["traceback", "of two lines", "the last line of the log"]


def test_an_adapter_with_nan_parks_its_own_task_only(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.training_faults = {"red/bad": ["nan"]}
    plant.submit("red/a", "red/bad", "blue/c")
    plant.run()
    assert plant.states() == {"red/a": "published", "red/bad": "parked", "blue/c": "published"}
    assert "has NaN or infinite values" in plant.get("red/bad").reason
    assert plant.held() == ["blue/c", "red/a"]


def test_a_task_is_cancelled_while_it_trains(plant: Plant) -> None:
    plant.cluster.hold = lambda order: True
    (task,) = plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.queue.apply(task.task_id, CancelRequested("ann", time.time()))
    plant.controller.wake()
    plant.run()
    assert plant.states() == {"red/alpha": "cancelled"}
    assert plant.controller.free_workers == 2
    assert plant.merges() == []


def test_a_cancelled_task_is_not_merged_though_its_worker_finished_first(plant: Plant) -> None:
    plant.cluster.hold = lambda order: True
    (task,) = plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.release()
    plant.queue.apply(task.task_id, CancelRequested("ann", time.time()))
    plant.run()
    assert plant.states() == {"red/alpha": "cancelled"}


def test_a_preempted_task_is_the_next_again_and_its_checkpoint_is_there_until_it_is_trained(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(workers=1)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    task, _ = plant.submit("red/alpha", "red/beta")
    plant.run(lambda: len(plant.cluster.held) == 1)
    checkpoint = plant.cluster.held[0].staging_key.replace("adapter.safetensors", "step-3/state")
    plant.queue.apply(task.task_id, PreemptRequested("ann"))
    plant.controller.wake()
    plant.run(lambda: plant.get("red/alpha").attempt == 2)
    (order,) = plant.cluster.held  # not red/beta, which is younger
    assert (order.task_id, plant.get("red/alpha").preemptions) == (task.task_id, 1)
    assert list(plant.storage.keys(f"staging/{task.task_id}/")) == [checkpoint]
    plant.cluster.release()
    plant.run(lambda: plant.get("red/alpha").state is TaskState.MERGING)
    assert list(plant.storage.keys(f"staging/{task.task_id}/")) == [plant.get("red/alpha").staging_key]


def test_when_the_service_ends_what_trains_writes_a_checkpoint_and_goes_on_at_the_next_start(plant: Plant) -> None:
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a", "red/b", "red/c")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.controller.run(_stopped())
    assert plant.states() == dict.fromkeys(("red/a", "red/b", "red/c"), "queued")  # and none was begun
    assert plant.get("red/a").reason == "the service ended; it goes on from its last checkpoint"
    assert [plant.get(title).preemptions for title in ("red/a", "red/b", "red/c")] == [1, 1, 0]
    assert len([key for key in plant.storage.keys("staging/") if key.endswith("state")]) == 2
    plant.cluster.release()
    plant.kill()
    plant.run()
    assert set(plant.states().values()) == {"published"}
    assert [plant.get(title).attempt for title in ("red/a", "red/b", "red/c")] == [2, 2, 1]


def test_a_worker_that_writes_no_checkpoint_in_time_is_not_waited_for_and_its_task_is_not_lost(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "PREEMPT_SECONDS", 0.0)
    monkeypatch.setattr(plant.cluster, "preempt", lambda worker, token: None)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.controller.run(_stopped())
    assert plant.states() == {"red/a": "training"}
    plant.kill()
    plant.cluster.release()
    plant.run()
    assert (plant.states(), plant.get("red/a").attempt) == ({"red/a": "published"}, 1)


def _stopped() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


def test_training_data_of_a_task_that_was_given_up_is_deleted_too(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["input"]}
    (task,) = plant.submit("red/alpha")
    plant.run()
    with pytest.raises(NotFound):
        plant.storage.read(task.train_key)


# --- workers that fall silent or vanish --------------------------------------------------------------------------


def test_a_heartbeat_brings_progress_log_lines_and_a_point_of_the_loss_curve(make_plant: MakePlant) -> None:
    plant = _with_heartbeats(make_plant, lease_seconds=60)
    plant.cluster.hold = lambda order: True
    (task,) = plant.submit("red/alpha")
    plant.run(lambda: bool(plant.queue.progress(task.task_id)))
    progress = plant.queue.progress(task.task_id)
    assert (progress["phase"], progress["step"], progress["steps"], progress["loss"]) == ("training", 3, 10, 0.5)
    assert progress["samples_per_second"] is None  # NaN was not measured
    lines = plant.queue.events(task.task_id)
    assert "a line of the log" in [line.text for line in lines if line.kind == LOG]
    told = Point(at=1007.0, step=3, loss=0.5, learning_rate=0.001, steps=10)
    assert repr(told) in map(repr, plant.queue.curve(task.task_id))  # some of it NaN, which equals nothing


def test_a_worker_that_is_silent_for_a_lease_is_replaced_and_its_task_trained_again(make_plant: MakePlant) -> None:
    plant = _with_heartbeats(make_plant, lease_seconds=0.05)
    plant.cluster.hold = lambda order: True
    plant.cluster.silent = {"worker-0"}
    plant.submit("red/alpha")
    plant.run(lambda: plant.get("red/alpha").lost_machines == 1)
    assert plant.cluster.replaced == ["worker-0"]
    plant.cluster.release()
    plant.run()
    assert plant.get("red/alpha").attempt == 2
    assert plant.states() == {"red/alpha": "published"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("pad token 50257 is outside the embeddings"), "ValueError: pad token 50257"),
        (
            InvalidInput("has other weights", "base_model.weights_sha256"),
            "base_model.weights_sha256: has other weights",
        ),
        (Unavailable("the hub is away", "hub"), "hub: the hub is away"),
        (KeyError("model.embed"), "KeyError: 'model.embed'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_base_model_that_does_not_load_is_told_with_its_cause_and_logged_once(
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    told: str,
) -> None:
    def fails(worker: str) -> Future[Any]:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed

    monkeypatch.setattr(worker_pool, "LOAD_AGAIN_SECONDS", 0.0)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(plant.cluster, "warm", fails)
        plant.step(20)
        assert told in alarms_of(plant)
        assert told.split(": ", 1)[1] in plant.controller.describe_workers()["worker-0"]
        assert set(plant.controller.load_errors) == {"worker-0", "worker-1"}
        assert sum(told in record.getMessage() for record in caplog.records) == 2  # once for each worker
    plant.submit("red/alpha")
    plant.run()
    assert alarms_of(plant) == ""


def test_a_worker_whose_process_ends_while_it_loads_is_told_of_and_made_anew(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(worker: str) -> Future[Any]:
        ended: Future[Any] = Future()
        ended.set_exception(ProcessEnded("the kernel killed it for its memory"))
        return ended

    monkeypatch.setattr(worker_pool, "LOAD_AGAIN_SECONDS", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(plant.cluster, "warm", ends)
        plant.step(6)
        assert "its process ends while it loads: the kernel killed it for its memory" in alarms_of(plant)
        assert sorted(plant.cluster.replaced) == ["worker-0", "worker-1"]
        assert "it is tried again in 60 s" in alarms_of(plant)


def test_a_worker_that_ends_while_it_loads_is_made_anew_after_longer_and_longer_waits(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    later = plant.controller._pending_calls.later

    def no_wait(what: str, seconds: float = 1.0) -> None:
        waits.append(seconds)
        later(what, 0.0)

    def gone(worker: str) -> Future[Any]:
        ended: Future[Any] = Future()
        ended.set_exception(MachineLost("its process is out of reach"))
        plant.cluster.ends = {worker: [ProcessEnd(pid=7, signal=11)]}
        return ended

    monkeypatch.setattr(plant.controller._pending_calls, "later", no_wait)
    monkeypatch.setattr(plant.cluster, "warm", gone)
    plant.step(40)
    assert "its process ends while it loads: it was ended by signal 11 (SIGSEGV)" in alarms_of(plant)
    told = [seconds for seconds in waits if seconds >= worker_pool.LOAD_AGAIN_SECONDS]
    assert {30.0, 60.0, 120.0, 240.0} == set(told)


def test_a_worker_that_loads_says_for_how_long_and_one_that_never_answers_is_replaced(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, loads = _asks_at_every_step(plant), plant.cluster.warm
    with monkeypatch.context() as patch:
        patch.setattr(plant.cluster, "warm", lambda worker: Future())
        plant.step(2)
        assert plant.controller.describe_workers()["worker-1"] == "loading the base model for 0 s"
        patch.setattr(worker_pool, "WARM_SLOW_SECONDS", 0.0)
        plant.step(2)
        assert "base-model-loads-slowly" in alarms_of(plant)  # it answers, so it is left alone
        assert plant.cluster.replaced == []
        patch.setattr(worker_pool, "WARM_SILENT_SECONDS", 0.01)
        plant.cluster.silent = {"worker-1"}
        patch.setattr(plant.cluster, "warm", loads)  # the process that takes its place
        plant.run(lambda: plant.cluster.replaced == ["worker-1"], 5)
        plant.run(lambda: plant.controller.ready_workers == 1, 5)
    assert "worker-1" not in alarms_of(plant)


def test_a_worker_that_does_not_answer_is_told_of_before_its_lease_ends(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "SILENT_SECONDS", 0.02)
    plant = _with_heartbeats(make_plant, lease_seconds=60)
    plant.run(lambda: plant.controller.ready_workers == 2, 5)
    plant.cluster.silent = {"worker-0"}
    plant.run(lambda: "worker-silent" in alarms_of(plant), 5)
    assert plant.controller.describe_workers() == {"worker-0": "does not answer; last seen free", "worker-1": "free"}
    assert plant.cluster.replaced == []


def test_a_worker_that_waits_for_a_full_store_rings_for_it(make_plant: MakePlant) -> None:
    plant = _with_heartbeats(make_plant, lease_seconds=60)
    plant.cluster.hold = lambda order: True
    full = StoreFull("no space left on device", "/store")
    plant.cluster.trouble = full
    plant.submit("red/alpha")
    plant.run(lambda: "store-full: worker-0: /store: no space left on device" in alarms_of(plant), 5)
    plant.cluster.trouble = None
    plant.cluster.release()
    plant.run()
    assert plant.get("red/alpha").attempt == 1
    assert alarms_of(plant) == ""


def test_a_loop_that_was_held_up_does_not_take_its_own_absence_for_its_workers_silence(make_plant: MakePlant) -> None:
    plant = _with_heartbeats(make_plant, lease_seconds=0.05, heartbeat_seconds=0.04)
    plant.cluster.hold = lambda order: True
    plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.step(3)  # what was asked is answered, and it is too early to ask again
    time.sleep(0.1)
    plant.step(3)
    assert plant.cluster.replaced == []


def test_a_task_of_a_worker_that_is_gone_after_a_restart_goes_on_with_a_new_one(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(workers=2)
    plant.cluster.hold = lambda order: True
    plant.submit("red/a", "red/b")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.kill()
    del plant.cluster._memory["worker-1"]
    plant.cluster.release()
    plant.run()
    assert plant.states() == {"red/a": "published", "red/b": "published"}
    assert [record.lost_machines for record in plant.queue.tasks()] == [0, 0]


def test_after_a_restart_a_worker_that_trains_is_not_given_a_scoring_that_would_wait_behind_it(plant: Plant) -> None:
    plant.cluster.hold = lambda order: isinstance(order, Evaluate) or order.spec.name == "slow"
    plant.submit("red/slow", "blue/quick")
    plant.run(lambda: len(plant.cluster.held) == 2)
    assert plant.get("red/slow").worker == "worker-0"
    plant.kill()
    plant.run(lambda: plant.controller.free_workers == 0 < plant.controller.ready_workers)
    assert plant.controller.describe_workers() == {
        "worker-0": f"training {plant.get('red/slow').task_id}",
        "worker-1": f"scoring {plant.get('blue/quick').task_id} at version 1",
    }


def test_a_task_whose_worker_does_not_come_back_after_a_restart_is_given_to_another(make_plant: MakePlant) -> None:
    plant = _with_heartbeats(make_plant, lease_seconds=0.05)
    plant.cluster.hold = lambda order: True
    plant.submit("red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)
    assert plant.get("red/alpha").worker == "worker-0"
    plant.kill()
    plant.cluster._memory["worker-0"] = {}
    plant.cluster._held.clear()
    plant.cluster.hold = lambda order: False
    plant.cluster.warm = lambda worker: Future() if worker == "worker-0" else _landed(LAYOUT)  # type: ignore[method-assign]
    plant.run()
    task = plant.get("red/alpha")
    assert (task.state, task.attempt, task.lost_machines) == (TaskState.PUBLISHED, 2, 1)


def _asks_at_every_step(plant: Plant) -> Plant:
    plant.settings = with_pools(plant.settings, heartbeat_seconds=1e-6, lease_seconds=60)
    return plant


def _with_heartbeats(make_plant: MakePlant, lease_seconds: float, heartbeat_seconds: float = 1e-6) -> Plant:
    """A plant that asks its workers at every step."""
    plant = make_plant()
    seconds = {"heartbeat_seconds": heartbeat_seconds, "lease_seconds": lease_seconds}
    plant.settings = with_pools(plant.settings, **seconds)
    return plant


# --- answers that are lost, writers that are fenced --------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["merge", "scores", "publish"])
def test_a_store_call_whose_answer_was_lost_is_done_once(plant: Plant, method: str, when: str) -> None:
    plant.cluster.store_faults = [(method, when), (method, when)]
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.merges() == [["red/alpha"]]
    assert plant.held() == ["red/alpha"]
    # Not done: asked three times. Done: the log tells of scores and of `main`; a merge is asked for by its key again.
    assert plant.cluster.store_calls.count(method) == (1 if when == "after" and method != "merge" else 3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rejection_whose_answer_was_lost_is_done_once(plant: Plant, when: str) -> None:
    plant.cluster.score = lambda title, held: 0.1
    plant.cluster.store_faults = [("reject", when)]
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "rejected"}
    assert sorted(plant.state.rejected) == [1]


def test_a_fenced_writer_is_replaced_and_the_task_is_merged_once(plant: Plant) -> None:
    plant.run(lambda: plant.controller.ready_workers == 2)
    SubspaceStore.open(plant.storage, base_model="tiny", writer="somebody else", service=plant.service)
    plant.submit("red/alpha")
    plant.run()
    assert plant.cluster.replaced == ["store"]
    assert plant.merges() == [["red/alpha"]]
    assert plant.states() == {"red/alpha": "published"}


def test_a_log_that_cannot_be_read_once_after_a_merge_does_not_undo_the_merge(plant: Plant) -> None:
    store = plant.controller.subspaces[BASE].store
    failing = iter([Unavailable("the storage is away")])
    refresh = store.refresh

    def refresh_or_fail() -> Any:
        if plant.cluster.store_calls.count("merge") == 1:
            for error in failing:
                raise error
        return refresh()

    store.refresh = refresh_or_fail  # type: ignore[method-assign]
    plant.submit("red/alpha")
    plant.run(lambda: plant.controller.alarms.rings(AlarmCode.STORE_AWAY))
    plant.run()
    assert not list(plant.controller.alarms)
    assert plant.merges() == [["red/alpha"]]
    assert plant.states() == {"red/alpha": "published"}


def test_a_task_that_a_restored_database_has_forgotten_to_be_merged_is_not_merged_again(plant: Plant) -> None:
    (before,) = plant.submit("red/alpha")
    plant.run()
    plant.queue.close()
    plant.settings = plant.settings.model_copy(update={"database_url": f"{plant.settings.database_url}.restored"})
    plant.kill()
    plant.queue.add(before)  # as it was when the backup was made: queued
    plant.storage.write(before.train_key, b"training rows")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.get("red/alpha").version == 1
    assert plant.merges() == [["red/alpha"]]


def test_a_candidate_that_no_task_waits_for_is_dropped_before_the_next_merge(plant: Plant) -> None:
    store = plant.open_store()
    ref = store.stage("staging/orphan/1/adapter.safetensors", adapter(7))
    store.merge(
        [StagedAdapter(task_id="orphan", name="red/orphan", key=ref.key, sha256=ref.sha256)],
        op_key="lost",
        actor="test",
    )
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.held() == ["red/alpha"]
    assert plant.state.rejected == {1: "no task waits for it"}


# --- rollback ----------------------------------------------------------------------------------------------------


def test_a_rollback_parks_the_tasks_that_vanish_and_rolling_forward_restores_them(plant: Plant) -> None:
    for title in ("red/a", "red/b", "blue/c"):
        plant.submit(title)
        plant.run()
    _roll(plant, 1)
    assert plant.states() == {"red/a": "published", "red/b": "parked", "blue/c": "parked"}
    assert plant.get("red/b").reason == (
        "main was rolled back to version 1, before this task's 2; "
        "`onebasis rollback 2` brings it back, or submit it again"
    )
    assert plant.get("red/b").trouble == ("rolled-back",)
    _roll(plant, 2)
    assert plant.states() == {"red/a": "published", "red/b": "published", "blue/c": "parked"}
    assert plant.get("red/b").trouble == ()
    _roll(plant, 0)
    assert set(plant.states().values()) == {"parked"}
    _roll(plant, 3)
    assert set(plant.states().values()) == {"published"}


def _remove(plant: Plant, title: str) -> None:
    plant.cluster.write(
        BASE,
        Remove(
            task_id=plant.get(title).task_id,
            op_key=f"remove:remove {title} {plant.state.seq}",
            actor="ann",
            publish=True,
        ),
    ).result()
    plant.controller.wake(log_moved=True)
    plant.step(3)


def test_the_newest_task_is_told_that_it_was_removed_and_not_that_main_was_rolled_back(plant: Plant) -> None:
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    _remove(plant, "red/b")
    assert plant.states() == {"red/a": "published", "red/b": "parked"}
    assert plant.get("red/b").reason == (
        "removed from the subspace: main is version 1 again; submit it again to merge it"
    )
    assert plant.get("red/b").trouble == ("removed",)


def test_a_removed_task_is_parked_and_told_so_and_the_others_have_their_new_versions_of_birth(plant: Plant) -> None:
    for title in ("red/a", "red/b", "blue/c", "blue/d"):
        plant.submit(title)
        plant.run()
    _remove(plant, "red/b")
    assert plant.states() == {"red/a": "published", "red/b": "parked", "blue/c": "published", "blue/d": "published"}
    assert plant.get("red/b").reason == (
        "removed from the subspace: version 5 was made again without it; submit it again to merge it"
    )
    assert plant.get("red/b").trouble == ("removed",)
    assert [plant.get(title).version for title in ("red/a", "blue/c", "blue/d")] == [1, 5, 6]
    _roll(plant, 1)  # version 5 was on the way to 6 and never main: nobody can roll to it
    assert plant.get("blue/c").reason == (
        "main was rolled back to version 1, before this task's 5; "
        "`onebasis rollback 6` brings it back, or submit it again"
    )
    _roll(plant, 4)
    assert set(plant.states().values()) == {"published"}
    assert [plant.get(title).version for title in ("red/a", "red/b", "blue/c", "blue/d")] == [1, 2, 3, 4]
    _roll(plant, 6)
    assert plant.states()["red/b"] == "parked"
    assert plant.get("blue/c").version == 5


def test_a_removed_task_is_merged_again_when_it_is_submitted_again(plant: Plant) -> None:
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    _remove(plant, "red/a")
    plant.submit("red/a", task_id="t-again")
    plant.run()
    assert plant.held() == ["red/a", "red/b"]
    assert sorted((r.title, r.state, r.version) for r in plant.queue.tasks()) == [
        ("red/a", "parked", 1), ("red/a", "published", 4), ("red/b", "published", 3),
    ]  # fmt: skip


def test_a_removal_before_the_task_heard_of_its_publication_is_followed(plant: Plant) -> None:
    plant.submit("red/a")
    plant.run()
    plant.submit("red/b")
    plant.run(lambda: plant.held() == ["red/a", "red/b"])
    assert plant.get("red/b").state is TaskState.EVALUATING
    task_id = plant.get("red/a").task_id
    plant.cluster.write(BASE, Remove(task_id=task_id, op_key="remove:r", actor="ann", publish=True)).result()
    plant.kill()
    plant.run()
    plant.step(3)
    assert plant.states() == {"red/a": "parked", "red/b": "published"}
    assert plant.get("red/b").version == 3


def test_tasks_that_were_merged_again_are_scored_with_the_next_version_and_guarded_from_then_on(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(
        gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"}
    )  # every merge moves every task
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    _remove(plant, "red/a")
    plant.submit("blue/c")
    plant.run()
    b, c = (plant.get(title).task_id for title in ("red/b", "blue/c"))
    assert plant.state.scores[4].keys() == {b, c}  # version 3 was never scored
    plant.cluster.score = lambda title, held: 0.5 if title == "red/b" and "blue/d" in held else 0.9
    plant.submit("blue/d")
    plant.run()
    assert plant.states()["blue/d"] == "rejected"
    assert "red/b would fall from 0.9000 at birth to 0.5000" in plant.get("blue/d").reason


def test_what_a_removal_made_again_is_scored_without_being_asked_for_and_once(make_plant: MakePlant) -> None:
    plant = make_plant(gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"})
    for title in ("red/a", "red/b", "red/c"):
        plant.submit(title)
        plant.run()
    plant.cluster.score = lambda title, held: 0.7 if "red/a" not in held else 0.9
    _remove(plant, "red/a")
    version = plant.state.refs["main"]
    assert version > 3
    plant.run(lambda: bool(plant.state.scores.get(version)))
    scored = {task_id: score.score for task_id, score in plant.state.scores[version].items()}
    assert scored == {plant.get("red/b").task_id: 0.7, plant.get("red/c").task_id: 0.7}
    scorings = plant.cluster.store_calls.count("scores")
    plant.kill()
    plant.step(20)
    assert plant.cluster.store_calls.count("scores") == scorings


def test_what_a_removal_made_again_is_scored_before_the_next_task_is_merged_and_judged(make_plant: MakePlant) -> None:
    plant = make_plant(gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"})
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    plant.cluster.score = lambda title, held: 0.2 if title == "red/b" and "red/c" in held else 0.9
    plant.submit("red/c")
    plant.run(lambda: plant.states()["red/c"] == "training")
    _remove(plant, "red/a")
    plant.run()
    assert plant.states()["red/c"] == "rejected"
    assert "red/b would fall from 0.9000 at birth to 0.2000" in plant.get("red/c").reason


def test_what_cannot_be_scored_after_a_removal_stays_without_a_score_and_stops_nothing(make_plant: MakePlant) -> None:
    plant = make_plant(gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"})
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    plant.cluster.score = lambda title, held: float("nan") if "red/a" not in held and "blue/c" not in held else 0.9
    _remove(plant, "red/a")
    plant.step(60)
    assert plant.state.refs["main"] not in plant.state.scores
    assert len(plant.cluster.evaluations) < 12  # it is given up, not tried for ever
    plant.submit("blue/c")
    plant.run()
    assert plant.states()["blue/c"] == "published"


def test_a_rollback_while_the_control_plane_was_down_is_followed_when_it_starts(plant: Plant) -> None:
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    writer = SubspaceStore.open(plant.storage, base_model="tiny", writer="command line", service=plant.service)
    writer.rollback(1, op_key="r", actor="ann")
    plant.kill()
    plant.run(lambda: plant.states() == {"red/a": "published", "red/b": "parked"})


def test_a_task_merged_after_a_rollback_stands_on_what_main_holds_then(plant: Plant) -> None:
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    _roll(plant, 1)
    plant.submit("blue/c")
    plant.run()
    assert plant.held() == ["blue/c", "red/a"]
    assert plant.state.versions[3].parent == 1


def test_a_rollback_between_merge_and_verdict_merges_the_task_again_on_the_new_main(plant: Plant) -> None:
    for title in ("red/a", "red/b"):
        plant.submit(title)
        plant.run()
    plant.cluster.hold = lambda order: isinstance(order, Evaluate)
    plant.submit("blue/c")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.write(BASE, Rollback(version=1, op_key="rollback:r", actor="ann")).result()
    plant.cluster.release()
    plant.controller.wake(log_moved=True)
    plant.run()
    assert plant.states() == {"red/a": "published", "red/b": "parked", "blue/c": "published"}
    assert plant.merges() == [["red/a"], ["red/b"], ["blue/c"], ["blue/c"]]
    assert plant.held() == ["blue/c", "red/a"]
    assert plant.get("blue/c").version == 4


def test_a_version_rolled_back_before_its_task_heard_of_its_publication_stays_rolled_back(plant: Plant) -> None:
    plant.submit("red/a")
    plant.run()
    plant.submit("red/b")
    plant.run(lambda: plant.held() == ["red/a", "red/b"])
    assert plant.get("red/b").state is TaskState.EVALUATING  # `main` moved, the control plane has not seen it yet
    plant.cluster.write(BASE, Rollback(version=1, op_key="rollback:r", actor="ann")).result()
    plant.kill()
    plant.run()
    plant.step(3)
    assert plant.states() == {"red/a": "published", "red/b": "parked"}
    assert plant.held() == plant.held("candidate") == ["red/a"]
    _roll(plant, 2)
    assert plant.states() == {"red/a": "published", "red/b": "published"}


def test_a_stricter_gate_after_a_restart_asks_for_the_scores_that_are_missing(make_plant: MakePlant) -> None:
    plant = make_plant(gate={"drift_min": 10.0}, subspace={"rank_fixed": 2})
    plant.submit("red/a")
    plant.run()
    plant.submit("blue/b")
    plant.cluster.store_faults = [("publish", "before")]
    plant.run(lambda: plant.cluster.store_calls.count("publish") == 2)
    assert plant.cluster.evaluations == [(1, "red/a"), (2, "blue/b")]
    plant.kill()
    plant.settings = plant.settings.model_copy(
        update={"gate": plant.settings.gate.model_copy(update={"drift_min": 0.0})}
    )
    plant.run()
    assert plant.cluster.evaluations == [(1, "red/a"), (2, "blue/b"), (2, "red/a")]
    assert plant.states() == {"red/a": "published", "blue/b": "published"}


def _roll(plant: Plant, version: int) -> None:
    plant.cluster.write(
        BASE, Rollback(version=version, op_key=f"rollback:to {version} at {plant.state.seq}", actor="ann")
    ).result()
    plant.controller.wake(log_moved=True)
    plant.step(2)


# --- a control plane that dies -----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ended here. No `except Exception` may hold it up."""


class Mortal:
    """Forwards to a part of the plant, and dies at the n-th call of all that write or give orders."""

    calls = ("apply", "try_apply", "delete", "run", "store", "cancel")

    def __init__(self, part: Any, countdown: list[int]) -> None:
        self._part, self._countdown = part, countdown
        # From 3.12 on, Python asks whether something is a Storage without __getattr__.
        for name in Storage.__annotations__.keys() | vars(Storage).keys():
            if not name.startswith("_") and hasattr(part, name):
                setattr(self, name, self.__getattr__(name))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name not in self.calls:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._countdown[0] -= 1
            if self._countdown[0] == 0:
                raise Killed
            return found(*args, **kwargs)

        return call


STORY = {"red/wrong": "parked", "blue/unlucky": "published", "red/bad": "rejected"}


def _story(plant: Plant, *titles: str) -> None:
    """Tasks with all kinds of ends: trained twice and published, rejected after its group was, parked."""
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    plant.cluster.training_faults = {"red/wrong": ["input"], "blue/unlucky": ["lost"]}
    plant.submit(*(titles or STORY))


def _check_story(plant: Plant) -> None:
    assert plant.states() == {title: STORY[title] for title in plant.states()}
    assert plant.held() == plant.held("candidate") == ["blue/unlucky"]
    state = plant.state
    births = {task.task_id: v.number for v in state.lineage(state.refs["main"]) for task in v.added}
    assert {r.task_id: r.version for r in plant.queue.tasks((TaskState.PUBLISHED,))} == births
    merged = [tuple(sorted(task.task_id for task in v.added)) for v in state.versions.values()]
    assert len(merged) == len(set(merged)), f"a group was merged twice: {merged}"
    assert all(score.score == 0.9 for v in births.values() for t, score in state.scores[v].items() if t in births)
    for record in plant.queue.tasks():
        with pytest.raises(NotFound):
            plant.storage.read(record.train_key)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_story_without_a_death(make_plant: MakePlant, workers: int) -> None:
    plant = make_plant(workers)
    _story(plant)
    plant.run()
    _check_story(plant)


@pytest.mark.parametrize("steps", range(1, 21))
def test_a_control_plane_that_dies_between_two_steps_changes_no_result(make_plant: MakePlant, steps: int) -> None:
    plant = make_plant()
    _story(plant)
    for _ in range(2):  # twice: dying while recovering must do no harm either
        plant.step(steps)
        plant.kill()
    plant.run()
    _check_story(plant)


def test_a_control_plane_that_dies_before_any_call_inside_a_step_changes_no_result(make_plant: MakePlant) -> None:
    # Dying after a call is dying before the next: between two calls there is nothing that lasts.
    call, died = 0, True
    while died:  # until a run has fewer calls than that
        call, died = call + 1, False
        plant = make_plant()
        countdown = [call]
        plant.wrap = lambda name, part, countdown=countdown: Mortal(part, countdown)
        _story(plant, "blue/unlucky", "red/bad")
        try:
            plant.run()
        except Killed:
            died = True
            plant.kill()
            plant.run()
        try:
            _check_story(plant)
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"died before call {call}") from error
    assert call > 15  # two tasks need at least that many calls


# --- whose store it is -------------------------------------------------------------------------------------------


def _taken_over(plant: Plant) -> None:
    SubspaceStore.open(plant.storage, writer="other", service=Identity("other", "there"), claim=True, force=True)


def test_a_service_whose_store_was_taken_over_stops_and_says_who_has_it(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.submit("red/old")
    plant.run()
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a", "red/b")
    plant.run(lambda: plant.states()["red/a"] == "training")
    _taken_over(plant)
    before = plant.state
    plant.controller.wake(log_moved=True)
    plant.step(6)
    assert plant.states() == {"red/old": "published", "red/a": "queued", "red/b": "queued"}  # with a checkpoint
    assert "belongs to the service there" in alarms_of(plant)
    assert "onebasis up --take-over" in alarms_of(plant)
    assert plant.state == before


def test_a_service_that_finds_out_when_it_writes_stops_as_well(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/a")
    plant.run(lambda: plant.states()["red/a"] == "training")
    _taken_over(plant)
    before = plant.state
    plant.cluster.release()
    plant.run(lambda: bool(alarms_of(plant)))
    plant.step(5)
    assert (plant.states(), plant.state) == ({"red/a": "merging"}, before)


def test_a_command_of_the_same_service_fences_its_writer_which_opens_anew(make_plant: MakePlant) -> None:
    plant = make_plant()
    plant.open_store()
    SubspaceStore.open(plant.storage, writer="command line", service=plant.service)
    plant.submit("red/a")
    plant.run()
    assert plant.states() == {"red/a": "published"}
    assert alarms_of(plant) == ""
    assert plant.cluster.replaced == ["store"]


# --- which base model a store belongs to ---------------------------------------------------------------------------


def test_a_store_is_made_only_when_a_worker_has_loaded_the_base_model(make_plant: MakePlant) -> None:
    plant = make_plant()
    wrong_weights = InvalidInput("weights have another sha256", "base_model", "correct the digest")
    plant.cluster.load_error = wrong_weights
    plant.submit("red/a")
    plant.step(5)
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    with pytest.raises(Unavailable, match="weights have another sha256") as refused:
        service.answer(Submit(task=task_spec("red/b"), by="ann"))
    assert refused.value.todo == "correct the digest"  # to try again would change nothing
    assert plant.controller.load_errors == {"worker-0": wrong_weights, "worker-1": wrong_weights}
    assert [key for key in plant.storage.keys("") if not key.startswith("data/")] == []
    with pytest.raises(NotWritten, match="no store yet"):
        plant.cluster.write(BASE, Hold(reason="audit", actor="ann", op_key="hold:h")).result()
    plant.cluster.load_error = None  # the settings are corrected
    plant.kill()
    plant.run()
    assert plant.states() == {"red/a": "published"}
    assert json.loads(plant.storage.read("FORMAT"))["base_sha256"] == LAYOUT.sha256


def test_a_store_of_other_weights_is_told_of_and_no_task_is_refused_for_it(make_plant: MakePlant) -> None:
    plant = make_plant()
    format_2 = {"format": 2, "base_model": BASE, "base_sha256": 64 * "0"}
    plant.storage.write("FORMAT", json.dumps(format_2).encode())
    plant.submit("red/a")
    plant.run(lambda: bool(alarms_of(plant)))
    assert isinstance(plant.controller.store_error, OtherBaseModel)
    assert "correct base_model.weights_sha256" in str(plant.controller.store_error)
    plant.step(5)
    assert plant.states() == {"red/a": "merging"}
    assert not plant.controller.stores_are_open
    assert plant.storage.keys("log/") == []
