"""The loop with a stand-in cluster: tasks whose owners let them be trained again when a later merge moves them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from configs.errors import NotFound
from configs.task_spec import TaskSpec
from orchestrator.api.requests import ShowScores, ShowTask, ShowVersion
from orchestrator.api.service import Service
from orchestrator.commands import version_tables
from orchestrator.tasks.task_record import TaskState
from orchestrator.tasks.task_rows import LOG
from subspace_store import SubspaceReader, adapter_to_bytes
from subspace_store.requests import Expire, Quarantine, Remove, Rollback
from subspace_store.verify import verify
from tests.builders import BASE, task_document
from tests.orchestrator.plant import Plant
from tests.orchestrator.test_controller import Killed, Mortal
from tests.orchestrator.test_refinement import energy, refines
from workers.orders import Order, Train

MakePlant = Callable[..., Plant]
FULL = {"method": {"refine_epochs": 1, "share_full": True}}
TIGHT = {
    "subspace": {"energy_ratio_min": 1.0, "rank_max": 2, "beyond_rank_max": "drop"},
    "gate": {"drop_max": 1.0, "merge_gap_max": 1.0},
}
"""A basis so small that every merge moves every task."""


def refined(plant: Plant) -> dict[int, list[str]]:
    """Version to the titles that it refined."""
    return {v.number: sorted(task.name for task in v.refined) for v in plant.state.versions.values() if v.refined}


def told(plant: Plant, title: str) -> list[str]:
    history = plant.queue.events(plant.get(title).task_id)
    return [event.text for event in history if event.kind == "RefinedAgain"]


@pytest.fixture
def full(make_plant: MakePlant) -> Plant:
    """red/old, which may be refined again, in versions 1 and 2 of main; red/plain, which may not, in 3."""
    plant = make_plant(workers=2, **TIGHT)
    plant.submit("red/old", spec=FULL)
    plant.run()
    return plant


def test_a_task_that_a_later_merge_moves_is_refined_again_and_scored_in_that_version(full: Plant) -> None:
    full.cluster.evaluations.clear()
    orders: list[Order] = []
    full.cluster.hold = lambda order: bool(orders.append(order))
    full.submit("blue/new")
    full.run()
    old, new = full.get("red/old"), full.get("blue/new")
    assert (old.state, old.version, new.state, new.version) == (TaskState.PUBLISHED, 2, TaskState.PUBLISHED, 4)
    assert refined(full) == {2: ["red/old"], 4: ["red/old"]}
    assert energy(full, "red/old", 4) == pytest.approx(4 * energy(full, "red/old", 3))
    assert energy(full, "blue/new", 4) == energy(full, "blue/new", 3)
    assert sorted(full.cluster.evaluations) == [(4, "blue/new"), (4, "red/old")]  # version 3 is never judged
    again = next(order for order in orders if refines(order))
    assert isinstance(again, Train)
    assert (again.task_id, again.refine_version, again.again, again.eval_key) == (old.task_id, 3, True, "")
    assert (again.spec.training.num_train_epochs, again.train_key) == (1, old.train_key)
    assert full.state.births(4) == {old.task_id: 2, new.task_id: 4}  # forgetting is told against the first score
    assert verify(SubspaceReader.open(full.storage)) == []


def test_its_time_is_its_team_s_and_its_history_says_what_happened(full: Plant) -> None:
    full.cluster.hold = lambda order: False
    before = full.get("red/old").refined_seconds
    full.submit("blue/new")
    full.run()
    assert (before, full.get("red/old").refined_seconds) == (2.0, 4.0)
    assert told(full, "red/old") == ["now published · refined again, for version 3 (share_full)"]
    lines = [e.text for e in full.queue.events(full.get("red/old").task_id) if e.kind == LOG]
    assert lines.count("the last line of the log") == 3  # trained, refined, refined again
    spent = full.queue.spent(full.get("red/old").task_id)
    assert [(one.what, one.seconds) for one in spent] == [
        ("train", 2.5),
        ("refine", 2.5),
        ("score", 0.5),
        ("refine again", 2.5),
        ("score", 0.5),
    ]  # in version 2, then in 4


def test_what_a_worker_remembers_after_a_restart_is_charged_and_told_once(full: Plant) -> None:
    full.cluster.hold = lambda order: isinstance(order, Train) and order.task_id != full.get("red/old").task_id
    full.submit("blue/new", spec={"method": {"refine_epochs": 1}})
    full.run(lambda: len(full.cluster.held) == 1)
    full.cluster.release()
    full.cluster.hold = lambda order: refines(order) and order.task_id != full.get("red/old").task_id
    full.run(lambda: full.get("red/old").refined_seconds == 4.0)
    full.kill()
    full.cluster.release()
    full.run()
    assert refined(full) == {2: ["red/old"], 4: ["blue/new", "red/old"]}
    assert full.get("red/old").refined_seconds == 4.0
    assert len(told(full, "red/old")) == 1
    lines = [e.text for e in full.queue.events(full.get("red/old").task_id) if e.kind == LOG]
    assert lines.count("the last line of the log") == 3


def test_only_those_that_allow_it_and_that_were_moved_are_refined_again(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, **TIGHT)
    plant.submit("red/plain", spec={"method": {"refine_epochs": 1}})
    plant.submit("red/full", spec=FULL)
    plant.run()
    plant.submit("blue/new")
    plant.run()
    assert list(refined(plant).values())[-1] == ["red/full"]
    roomy = make_plant(workers=2)
    roomy.submit("red/full", spec=FULL)
    roomy.run()
    roomy.submit("blue/new")
    roomy.run()
    assert refined(roomy) == {2: ["red/full"]}  # with room for both the merge moved nobody
    assert roomy.get("blue/new").version == 3


def test_a_newcomer_s_refinement_and_the_old_tasks_are_one_version(full: Plant) -> None:
    full.submit("blue/new", spec={"method": {"refine_epochs": 1}})
    full.run()
    assert refined(full) == {2: ["red/old"], 4: ["blue/new", "red/old"]}
    assert full.get("blue/new").version == 4


def test_its_rows_are_kept_while_it_lives_and_no_longer(full: Plant) -> None:
    old = full.get("red/old")
    full.step(3)
    assert full.storage.read(old.train_key) == b"training rows"
    full.cluster.write(BASE, Rollback(version=0, op_key="rollback:r", actor="ann")).result()
    full.controller.wake(log_moved=True)
    full.run(lambda: full.get("red/old").state is TaskState.PARKED)
    full.controller.subspaces[BASE].unused_files.delete_all(time.time())
    assert full.storage.read(old.train_key) == b"training rows"  # main may come back
    rejected = full.submit("red/bad", spec=FULL | {"gate": {"min_score": 0.99}})[0]
    full.run()
    full.step()
    assert full.get("red/bad").state is TaskState.REJECTED
    with pytest.raises(NotFound):
        full.storage.read(rejected.train_key)


def test_who_cannot_be_refined_again_stays_as_the_merge_left_it(full: Plant) -> None:
    full.storage.delete(full.get("red/old").train_key)
    full.cluster.training_faults = {"red/old": ["input"]}
    full.submit("blue/new")
    full.run()
    assert refined(full) == {2: ["red/old"]}
    assert full.states() == {"red/old": "published", "blue/new": "published"}
    assert told(full, "red/old") == [
        "now published · not refined again, for version 3 (share_full): fault of kind input"
    ]


def test_one_that_left_the_basis_does_not_keep_the_newcomer_from_its_refinement(full: Plant) -> None:
    full.cluster.training_faults = {"red/old": ["outside"]}
    full.submit("blue/new", spec={"method": {"refine_epochs": 1}})
    full.run()
    assert refined(full) == {2: ["red/old"], 4: ["blue/new"]}
    assert told(full, "red/old")[-1].startswith("now published · not refined again: ")


@pytest.mark.parametrize("fault", ["lost", "away", "bug", "crash"])
def test_a_refinement_that_failed_is_tried_again(full: Plant, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    full.cluster.training_faults = {"red/old": [fault]}
    full.cluster.evaluation_faults = {"blue/new": ["bug"] if fault == "bug" else []}
    full.submit("blue/new")
    full.run()
    assert refined(full) == {2: ["red/old"], 4: ["red/old"]}
    assert caplog.text.count("traceback\nof two lines") == (2 if fault == "bug" else 0)


def test_one_that_takes_its_worker_down_every_time_is_given_up_and_scored(full: Plant) -> None:
    lost_max = full.settings.failures.lost_machines_max
    full.cluster.training_faults = {"red/old": ["lost"] * (lost_max + 1)}
    full.submit("blue/new")
    full.run()
    assert refined(full) == {2: ["red/old"]}
    assert full.states() == {"red/old": "published", "blue/new": "published"}
    assert "not refined again" in told(full, "red/old")[-1]


def test_a_heartbeat_does_not_stop_it_and_it_has_no_lease(full: Plant) -> None:
    full.cluster.hold = refines
    full.submit("blue/new")
    full.run(lambda: len(full.cluster.held) == 1)
    for worker in full.controller._pool.workers.values():
        worker.asked_at = 0.0
    before = list(full.cluster.held)
    full.step(5)
    service = Service(full.settings, full.queue, full.storages, full.controller, full.cluster)
    assert (
        service.tasks.one(ShowTask(reference="blue/new"))["why"]
        == "version 3 is scored when tasks of it have been refined on their own rows"
    )
    assert full.cluster.held == before  # nobody told it to stop
    lines = [event.text for event in full.queue.events(full.get("red/old").task_id) if event.kind == LOG]
    assert "a line of the log" in lines
    assert full.get("red/old").state is TaskState.PUBLISHED
    full.cluster.release()
    full.run()
    assert refined(full) == {2: ["red/old"], 4: ["red/old"]}


def test_its_adapter_is_not_swept_away_while_the_version_waits(full: Plant) -> None:
    full.cluster.hold = lambda order: refines(order) and not getattr(order, "again", False)
    full.submit("blue/new", spec={"method": {"refine_epochs": 1}})
    full.run(lambda: len(full.cluster.held) == 1 and full.get("red/old").refined_seconds == 4.0)
    staged = [key for key in full.storage.keys("staging/") if full.get("red/old").task_id in key]
    full.controller.subspaces[BASE].unused_files.delete_all(time.time())
    assert [key for key in full.storage.keys("staging/") if full.get("red/old").task_id in key] == staged != []
    full.cluster.release()
    full.run()
    full.step()
    assert list(full.storage.keys("staging/")) == []


def test_a_version_that_the_gate_refuses_leaves_the_old_task_as_it_was(full: Plant) -> None:
    before = energy(full, "red/old", 2)
    full.submit("blue/bad", spec={"gate": {"min_score": 0.99}})
    full.run()
    assert full.states() == {"red/old": "published", "blue/bad": "rejected"}
    assert full.state.refs == {"main": 2, "candidate": 2}
    assert energy(full, "red/old", full.state.refs["main"]) == before


def test_a_control_plane_that_dies_before_any_call_refines_again_once_all_the_same(make_plant: MakePlant) -> None:
    call, died = 0, True
    while died:
        call, died = call + 1, False
        plant = make_plant(workers=2, **TIGHT)
        plant.submit("red/old", spec=FULL)
        plant.run()
        plant.kill()
        countdown = [call]
        plant.wrap = lambda name, part, countdown=countdown: Mortal(part, countdown)
        plant.submit("blue/new")
        try:
            plant.run()
        except Killed:
            died = True
            plant.kill()
            plant.run()
        assert plant.states() == {"red/old": "published", "blue/new": "published"}, call
        assert refined(plant) == {2: ["red/old"], 4: ["red/old"]}, call
    assert call > 8


def test_share_full_needs_to_know_how_long() -> None:
    with pytest.raises(ValueError, match=r"method.share_full needs method.refine_epochs"):
        TaskSpec.model_validate(task_document(method={"share_full": True}))


def test_what_is_published_is_not_refined_for_a_verdict_that_was_not_taken_yet(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, **TIGHT)
    plant.submit("red/old", spec=FULL, eval_key="", eval_count=0)  # without rows it is never known not to have moved
    plant.run()
    plant.cluster.training_faults = {"red/old": ["input"]}
    plant.submit("blue/new")
    plant.run(lambda: plant.state.refs["main"] == 3)
    assert plant.get("blue/new").state is TaskState.EVALUATING
    plant.kill()
    for answers in plant.cluster._memory.values():
        answers.clear()
    plant.run()
    assert refined(plant) == {2: ["red/old"]}


def test_without_rows_it_is_refined_again_only_when_it_moved_as_far_as_would_be_scored_again(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(workers=2, **TIGHT | {"gate": TIGHT["gate"] | {"drift_min": 10.0}})
    plant.submit("red/old", spec=FULL, eval_key="", eval_count=0)
    plant.run()
    plant.submit("blue/new")
    plant.run()
    assert 0 < plant.state.drift(3)[plant.get("red/old").task_id] < 10
    assert refined(plant) == {2: ["red/old"]}


def test_a_quarantined_task_is_not_trained_for_a_version_that_would_not_take_it(full: Plant) -> None:
    full.cluster.write(BASE, Quarantine(task_id=full.get("red/old").task_id, reason="suspicious", actor="ann")).result()
    full.controller.wake(log_moved=True)
    full.cluster.trainings.clear()
    full.submit("blue/new")
    full.run()
    assert full.cluster.trainings == ["blue/new"]


def test_a_rollback_calls_off_the_refinement_of_a_version_that_is_gone_and_nothing_of_it_stays(full: Plant) -> None:
    full.cluster.hold = refines
    full.submit("blue/new")
    full.run(lambda: len(full.cluster.held) == 1)
    full.cluster.write(BASE, Rollback(version=0, op_key="rollback:r", actor="ann")).result()
    full.controller.wake(log_moved=True)
    full.run()
    assert full.cluster.held == []
    assert full.states() == {"red/old": "parked", "blue/new": "published"}
    full.step(2)
    assert list(full.storage.keys("staging/")) == []


def test_a_service_that_ends_does_not_use_up_the_tries_of_a_refinement(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, failures={"lost_machines_max": 0}, **TIGHT)
    plant.submit("red/old", spec=FULL)
    plant.run()
    plant.cluster.hold = refines
    plant.submit("blue/new")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.controller._preempt_all()
    assert plant.cluster.held == []
    plant.kill()
    plant.cluster.hold = lambda order: False
    plant.run()  # the worker remembers that it was preempted, and says so once more
    assert refined(plant) == {2: ["red/old"], 4: ["red/old"]}


def test_newcomers_are_trained_while_many_tasks_are_refined_again(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, **TIGHT)
    plant.submit("red/a", "red/b", "red/c", spec=FULL)
    plant.run()
    plant.cluster.hold = refines
    plant.submit("blue/new")
    plant.run(lambda: len(plant.cluster.held) == 2)  # nobody else waits: both workers refine
    plant.submit("blue/late")
    worker, order, future = plant.cluster._held.pop(0)
    plant.cluster._do(worker, order, future)
    plant.run(lambda: plant.get("blue/late").state is TaskState.MERGING)
    plant.run(lambda: len(plant.cluster.held) == 2)  # and it is the third one's turn
    plant.cluster.release()
    plant.run()
    assert refined(plant)[4] == ["red/a", "red/b", "red/c"]


def test_a_version_that_was_scored_before_a_restart_is_judged_by_these_scores(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, **TIGHT)
    plant.submit("red/old", spec=FULL, eval_key="", eval_count=0)
    plant.run()
    plant.cluster.training_faults = {"red/old": ["input"]}
    plant.submit("blue/bad", spec={"gate": {"min_score": 0.99}})
    plant.run(lambda: 3 in plant.state.scores)
    plant.kill()
    for answers in plant.cluster._memory.values():
        answers.clear()
    plant.run()
    assert plant.states() == {"red/old": "published", "blue/bad": "rejected"}
    assert refined(plant) == {2: ["red/old"]}


def test_its_birth_is_told_the_same_everywhere_and_beside_it_where_it_was_refined(
    full: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    full.submit("blue/new")
    full.run()
    service = Service(full.settings, full.queue, full.storages, full.controller, full.cluster)
    version = service.versions().one(ShowVersion(version=4))
    assert [(t["title"], t["birth"], t["made_in"]) for t in version["tasks"]] == [("red/old", 2, 4), ("blue/new", 4, 3)]
    assert [t["birth"] for t in service.versions().scores(ShowScores())["tasks"]] == [2, 4]
    version_tables.version(version)
    shown = capsys.readouterr().out
    assert "v2, refined v4" in shown
    assert "v4, refined" not in shown


def served(plant: Plant, title: str) -> bytes:
    """A task as `main` serves it, bit by bit."""
    return adapter_to_bytes(SubspaceReader.open(plant.storage).adapter(plant.get(title).task_id))


@pytest.mark.parametrize("gone", ["red/old", "blue/new", "blue/newer"])
def test_after_a_removal_records_follow_what_was_made_again(full: Plant, gone: str) -> None:
    for title in ("blue/new", "blue/newer"):
        full.submit(title)
        full.run()
    full.cluster.write(
        BASE, Remove(task_id=full.get(gone).task_id, op_key="remove:r", actor="ann", publish=True)
    ).result()
    full.controller.wake(log_moved=True)
    full.run(lambda: full.get(gone).state is TaskState.PARKED)
    births = full.state.births(full.state.refs["main"])
    assert {r.task_id: r.version for r in full.queue.tasks() if r.title != gone} == births
    full.submit("blue/later")
    full.run()
    main = full.state.refs["main"]
    assert full.get("blue/later").version == main
    assert refined(full).get(main) == (None if gone == "red/old" else ["red/old"])
    assert verify(SubspaceReader.open(full.storage)) == []


def test_a_rollback_while_it_is_refined_and_forward_again_serves_the_same_numbers(full: Plant) -> None:
    full.submit("blue/new")
    full.run()
    before, main = served(full, "red/old"), full.state.refs["main"]
    full.cluster.hold = refines
    full.submit("blue/later")
    full.run(lambda: len(full.cluster.held) == 1)
    for version in (2, main):
        full.cluster.write(BASE, Rollback(version=version, op_key=f"rollback:to {version}", actor="ann")).result()
    assert served(full, "red/old") == before
    full.controller.wake(log_moved=True)
    full.cluster.release()
    full.run()
    assert full.states() == {"red/old": "published", "blue/new": "published", "blue/later": "published"}
    assert list(refined(full).values())[-1] == ["red/old"]
    assert verify(SubspaceReader.open(full.storage)) == []


def test_expired_versions_take_nothing_that_it_needs(full: Plant) -> None:
    full.submit("blue/new")
    full.run()
    before = served(full, "red/old")
    full.cluster.write(BASE, Expire(versions=(1, 2, 3), actor="ann", op_key="expire:expire")).result()
    full.cluster.replace_store(BASE)  # of a later epoch, which may collect
    assert full.cluster.collect().blobs
    assert served(full, "red/old") == before
    full.submit("blue/later")
    full.run()
    assert list(refined(full).values())[-1] == ["red/old"]


def test_each_of_a_refused_group_is_judged_with_it_refined_for_that_version(make_plant: MakePlant) -> None:
    plant = make_plant(workers=4, **TIGHT)
    plant.submit("red/old", spec=FULL)
    plant.run()
    plant.cluster.hold = lambda order: True
    plant.submit("blue/bad", spec={"gate": {"min_score": 0.99}})
    plant.submit("blue/good")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.cluster.release()
    plant.run()
    assert plant.states() == {"red/old": "published", "blue/bad": "rejected", "blue/good": "published"}
    assert refined(plant) == {version: ["red/old"] for version in (2, 4, 6, 8)}
    assert plant.state.rejected.keys() == {4, 6}
    plant.step(2)
    assert list(plant.storage.keys("staging/")) == []


def test_a_newcomer_is_not_refused_for_what_an_older_task_made_of_its_refinement(make_plant: MakePlant) -> None:
    plant = make_plant(workers=2, **TIGHT | {"gate": {"drop_max": 0.5, "merge_gap_max": 1.0}})
    plant.submit("red/old", spec=FULL)
    plant.run()

    def score(title: str, held: frozenset[str]) -> float:
        state = plant.state
        spoilt = title == "red/old" and "blue/new" in held and state.versions[state.refs["candidate"]].refined
        return 0.1 if spoilt else 0.9

    plant.cluster.score = score
    plant.submit("blue/new")
    plant.run()
    assert plant.states() == {"red/old": "published", "blue/new": "published"}
    assert refined(plant) == {2: ["red/old"], 4: ["red/old"]}
    assert (list(plant.state.rejected), plant.state.refs["main"]) == ([4], 5)
    plant.cluster.score = lambda title, held: 0.9
    plant.submit("blue/next")
    plant.run()
    assert list(refined(plant).values())[-1] == ["red/old"]  # it was for that one merge


def test_whose_score_it_was_is_a_fact_and_not_a_word_in_the_reason(make_plant: MakePlant) -> None:
    # The name of the older task is the beginning of the newcomer's: only red/ab is at fault here.
    plant = make_plant(workers=2, **TIGHT | {"gate": {"drop_max": 1.0, "merge_gap_max": 0.1}})
    plant.submit("red/a", spec=FULL)
    plant.run()
    plant.cluster.score = lambda title, held: 0.2 if title == "red/ab" else 0.9
    newcomer = plant.submit("red/ab")[0]
    plant.run()
    assert plant.states() == {"red/a": "published", "red/ab": "rejected"}
    assert refined(plant) == {2: ["red/a"], 4: ["red/a"]}
    assert dict(plant.state.rejected_for) == {4: (newcomer.task_id,)}
    assert max(plant.state.versions) == 4  # it is not merged and judged once more
