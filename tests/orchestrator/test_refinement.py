"""The loop with a stand-in cluster: what becomes of tasks whose coefficients are trained once more after merging."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from configs.errors import NotFound
from configs.task_spec import TaskSpec
from orchestrator.api.requests import Diff, ListVersions, Submit
from orchestrator.commands import display, version_tables
from orchestrator.tasks.task_events import PreemptRequested
from orchestrator.tasks.task_record import TaskState
from subspace_store import SubspaceReader
from subspace_store.requests import Rollback
from tests.builders import BASE
from tests.orchestrator.plant import Plant
from tests.orchestrator.site import Site
from tests.orchestrator.test_controller import Killed, Mortal
from workers.orders import Evaluate, Order, Train

MakePlant = Callable[..., Plant]
REFINE = {"method": {"refine_epochs": 1}}


def refines(order: Order) -> bool:
    return isinstance(order, Train) and order.refine_version > 0


def energy(plant: Plant, title: str, version: int) -> float:
    """‖ΔW‖² of a task as a version serves it. The stand-in's refinement makes it four times what it was."""
    reader = SubspaceReader.open(plant.storage)
    served = reader.adapter(plant.get(title).task_id, version)
    return sum(update.energy for update in served.modules.values())


def test_a_task_is_trained_merged_refined_scored_and_published(plant: Plant) -> None:
    orders: list[Order] = []
    plant.cluster.hold = lambda order: bool(orders.append(order))
    plant.submit("red/alpha", spec=REFINE | {"training": {"max_steps": 50}})
    plant.run()
    task, state = plant.get("red/alpha"), plant.state
    assert (task.state, task.version, task.attempt, task.unrefined) == (TaskState.PUBLISHED, 2, 1, "")
    assert [(v.number, v.parent, len(v.added), len(v.refined)) for v in state.versions.values()] == [
        (1, 0, 1, 0),
        (2, 1, 0, 1),
    ]
    assert energy(plant, "red/alpha", 2) == pytest.approx(4 * energy(plant, "red/alpha", 1))
    assert plant.cluster.store_calls == ["merge", "refine", "scores", "publish"]
    assert plant.cluster.evaluations == [(2, "red/alpha")]  # version 1 is never judged
    assert (task.local_score, state.scores[2][task.task_id].score) == (0.9, 0.9)
    assert (task.train_seconds, task.refined_seconds) == (2.0, 2.0)
    assert [(spent.what, spent.seconds) for spent in plant.queue.spent(task.task_id)] == [
        ("train", 2.5),
        ("refine", 2.5),
        ("score", 0.5),
    ]  # all of it is the team's
    training, refinement, evaluation = orders
    assert isinstance(training, Train)
    assert isinstance(refinement, Train)
    assert (training.refine_version, refinement.refine_version) == (0, 1)
    assert (training.train_key, training.eval_key) == (refinement.train_key, task.eval_key)
    assert (refinement.eval_key, refinement.results_key) == ("", "")  # it is scored with its version
    assert (refinement.spec.training.num_train_epochs, refinement.spec.training.max_steps) == (1, -1)
    assert refinement.token != training.token
    assert refinement.staging_key != training.staging_key
    assert isinstance(evaluation, Evaluate)
    assert evaluation.results_key == f"results/{task.task_id}/2.safetensors"


def test_training_rows_are_kept_until_the_refinement_is_done_and_no_longer(plant: Plant) -> None:
    plant.cluster.hold = lambda order: refines(order) or isinstance(order, Evaluate)
    (task,) = plant.submit("red/alpha", spec=REFINE)
    plant.run(lambda: len(plant.cluster.held) == 1)
    assert plant.get("red/alpha").state is TaskState.REFINING
    plant.step(3)
    assert plant.storage.read(task.train_key) == b"training rows"
    plant.cluster.release()
    plant.run()
    with pytest.raises(NotFound):
        plant.storage.read(task.train_key)
    plant.step()
    assert list(plant.storage.keys("staging/")) == []


def test_the_group_waits_for_those_that_are_refined_and_is_judged_in_their_version(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.hold = refines
    plant.submit("red/a", "red/b", spec=REFINE)
    plant.submit("blue/c")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.step(5)
    assert plant.states() == {"red/a": "refining", "red/b": "refining", "blue/c": "evaluating"}
    assert plant.cluster.evaluations == []
    plant.cluster.release()
    plant.run()
    assert {record.title: (record.state, record.version) for record in plant.queue.tasks()} == dict.fromkeys(
        ("red/a", "red/b", "blue/c"), (TaskState.PUBLISHED, 2)
    )
    assert [sorted(task.name for task in v.refined) for v in plant.state.versions.values()] == [[], ["red/a", "red/b"]]
    assert sorted(plant.cluster.evaluations) == [(2, "blue/c"), (2, "red/a"), (2, "red/b")]
    assert energy(plant, "blue/c", 2) == energy(plant, "blue/c", 1)


def test_older_tasks_that_the_merge_hardly_moved_keep_their_score_through_a_refinement(plant: Plant) -> None:
    plant.submit("red/old")
    plant.run()
    plant.submit("red/new", spec=REFINE)
    plant.run()
    assert plant.cluster.evaluations == [(1, "red/old"), (3, "red/new")]
    assert plant.held() == ["red/new", "red/old"]


def test_the_gate_judges_the_members_of_a_refined_group_by_their_own_scores(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    plant.submit("red/a", spec=REFINE)
    plant.submit("red/bad")
    plant.run()
    assert plant.states() == {"red/a": "published", "red/bad": "rejected"}
    assert "red/bad scores 0.6000 after merging and 0.9000 with its own adapter" in plant.get("red/bad").reason


def test_after_a_failed_group_a_task_is_merged_again_as_refined_and_not_refined_twice(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.score = lambda title, held: 0.6 if title == "red/bad" else 0.9
    plant.submit("red/a", spec=REFINE)
    plant.submit("red/bad")
    plant.run()
    assert plant.merges() == [["red/a", "red/bad"], [], ["red/a"], ["red/bad"]]
    assert plant.cluster.trainings.count("red/a") == 2  # trained, and refined once
    task = plant.get("red/a")
    assert (task.version, task.staging_key) == (3, task.refined_key)
    assert energy(plant, "red/a", 3) == pytest.approx(energy(plant, "red/a", 2))


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        (["", "input"], "fault of kind input"),
        (["", "bug", "bug"], "gave up after 0 lost machines and 2 internal errors; last: fault of kind bug"),
        (["", "outside"], "of its norm outside the basis of version 1"),
        (["", "nan"], "NaN"),
    ],
)
def test_a_task_that_cannot_be_refined_goes_on_as_it_was_merged_and_says_why(
    plant: Plant, faults: list[str], why: str
) -> None:
    plant.cluster.training_faults = {"red/alpha": list(faults)}
    (task,) = plant.submit("red/alpha", spec=REFINE)
    plant.run()
    after = plant.get("red/alpha")
    assert (after.state, after.version) == (TaskState.PUBLISHED, 1)
    assert why in after.unrefined
    told = [event.text for event in plant.queue.events(task.task_id)]
    assert any("goes on as it was merged" in text and why in text for text in told)
    assert plant.cluster.evaluations == [(1, "red/alpha")]
    assert [v.refined for v in plant.state.versions.values()] == [()]
    with pytest.raises(NotFound):
        plant.storage.read(task.train_key)


def test_one_that_left_the_basis_does_not_keep_the_others_from_their_refinement(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.cluster.training_faults = {"red/b": ["", "outside"]}
    plant.submit("red/a", "red/b", "red/c", spec=REFINE)
    plant.run()
    assert {record.title: bool(record.unrefined) for record in plant.queue.tasks()} == {
        "red/a": False,
        "red/b": True,
        "red/c": False,
    }
    assert [sorted(task.name for task in v.refined) for v in plant.state.versions.values()] == [[], ["red/a", "red/c"]]
    assert {record.version for record in plant.queue.tasks()} == {2}


def test_lost_machines_and_preemptions_cost_a_refinement_nothing_but_time(plant: Plant) -> None:
    plant.cluster.training_faults = {"red/alpha": ["", "lost", "away"]}
    plant.cluster.hold = refines
    (task,) = plant.submit("red/alpha", spec=REFINE)
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.queue.apply(task.task_id, PreemptRequested("ann"))
    plant.controller.wake()
    plant.run(lambda: plant.get("red/alpha").preemptions == 1)
    plant.cluster.release()
    plant.run()
    after = plant.get("red/alpha")
    assert (after.state, after.version, after.lost_machines, after.attempt) == (TaskState.PUBLISHED, 2, 1, 1)
    assert plant.state.refs["main"] == 2


def test_a_heartbeat_of_a_refinement_is_taken_and_does_not_stop_it(make_plant: MakePlant) -> None:
    plant = make_plant(workers=1)
    plant.cluster.hold = refines
    (task,) = plant.submit("red/alpha", spec=REFINE)
    plant.run(lambda: len(plant.cluster.held) == 1)
    for worker in plant.controller._pool.workers.values():
        worker.asked_at = 0.0
    plant.run(lambda: plant.queue.progress(task.task_id).get("step") == 3)
    assert len(plant.cluster.held) == 1
    plant.cluster.release()
    plant.run()
    assert plant.get("red/alpha").version == 2


def test_a_worker_is_kept_for_what_is_refined_while_others_wait_to_be_trained(plant: Plant) -> None:
    plant.submit("red/alpha", spec=REFINE)
    plant.cluster.hold = lambda order: order.task_id != "t-red-alpha" or refines(order)
    plant.run(lambda: plant.get("red/alpha").state is TaskState.MERGING)
    plant.submit("red/b", "red/c", "red/d")
    plant.run(lambda: len(plant.cluster.held) == 2)
    assert sorted(refines(order) for order in plant.cluster.held) == [False, True]
    plant.cluster.release()
    plant.run()
    assert set(plant.states().values()) == {"published"}


def test_a_rollback_while_it_is_refined_merges_it_again_and_refines_it_there(plant: Plant) -> None:
    plant.submit("red/old")
    plant.run()
    plant.cluster.hold = refines
    plant.submit("red/alpha", spec=REFINE)
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.cluster.write(BASE, Rollback(version=0, op_key="rollback:roll", actor="ann")).result()
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.state.refs["candidate"] == 3)
    plant.cluster.release()
    plant.run()
    after = plant.get("red/alpha")
    assert (after.state, after.version, plant.states()["red/old"]) == (TaskState.PUBLISHED, 4, "parked")
    assert plant.held() == ["red/alpha"]
    assert energy(plant, "red/alpha", 4) == pytest.approx(4 * energy(plant, "red/alpha", 3))


def test_after_a_rollback_and_forward_again_the_group_has_its_version_of_birth(make_plant: MakePlant) -> None:
    plant = make_plant(workers=3)
    plant.submit("red/a", spec=REFINE)
    plant.submit("blue/b")
    plant.run()
    for version, state in ((0, "parked"), (2, "published")):
        plant.cluster.write(BASE, Rollback(version=version, op_key=f"rollback:roll-{version}", actor="ann")).result()
        plant.controller.wake(log_moved=True)
        plant.run(lambda state=state: set(plant.states().values()) == {state})  # type: ignore[misc]
    assert {record.title: record.version for record in plant.queue.tasks()} == {"red/a": 2, "blue/b": 2}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_refinement_whose_answer_was_lost_is_made_once(plant: Plant, when: str) -> None:
    plant.cluster.store_faults = [("refine", when)]
    plant.submit("red/alpha", spec=REFINE)
    plant.run()
    assert plant.get("red/alpha").version == 2
    assert sorted(plant.state.versions) == [1, 2]


def test_a_database_that_was_restored_from_before_the_refinement_finds_it_in_the_log(plant: Plant) -> None:
    plant.cluster.hold = refines
    plant.submit("red/alpha", spec=REFINE)
    plant.run(lambda: len(plant.cluster.held) == 1)
    old = plant.get("red/alpha")
    plant.cluster.release()
    plant.run()
    plant.kill()
    with plant.queue._database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE tasks SET state = ?, record = ?, revision = ?",
            (str(old.state), old.model_dump_json(), old.revision),
        )
    plant.run()
    after = plant.get("red/alpha")
    assert (after.state, after.version, sorted(plant.state.versions)) == (TaskState.PUBLISHED, 2, [1, 2])


@pytest.mark.changes
def test_people_see_what_is_refined_and_what_could_not_be(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = site.plant.cluster
    cluster.hold = refines
    cluster.training_faults = {"red/two": ["", "input"]}
    for title in ("red/one", "red/two"):
        site.client.ask(
            Submit(task=TaskSpec.model_validate(site.document(title, method={"refine_epochs": 2})), by="ann")
        )
        while not cluster.held:
            time.sleep(0.01)
        task = site.wait_for(title, "refining")
        assert task["why"] == f"its coefficients in version {task['version']} are trained on its own rows"
        assert task["worker"].startswith("worker-")
        cluster.release()
        cluster.hold = refines
        task = site.wait_for(title, "published")
        display.task(task)
    version_tables.versions(site.client.ask(ListVersions()))
    version_tables.diff(site.client.ask(Diff(old=3, new=4)))
    shown = capsys.readouterr().out
    assert "refined    its coefficients, after merging, in 2.0 s" in shown
    assert "unrefined  fault of kind input" in shown
    assert "red/one refined" in shown
    assert "~ red/one (refined, or merged anew)" in shown


def _check(plant: Plant) -> None:
    assert plant.states() == {"red/a": "published", "blue/b": "published"}
    assert {record.version for record in plant.queue.tasks()} == {max(plant.state.versions)}
    assert energy(plant, "red/a", 2) == pytest.approx(4 * energy(plant, "red/a", 1))
    assert [len(v.added) for v in plant.state.versions.values()] == [2, 0]


def test_a_control_plane_that_dies_before_any_call_refines_once_all_the_same(make_plant: MakePlant) -> None:
    call, died = 0, True
    while died:
        call, died = call + 1, False
        plant = make_plant()
        countdown = [call]
        plant.wrap = lambda name, part, countdown=countdown: Mortal(part, countdown)
        plant.submit("red/a", spec=REFINE)
        plant.submit("blue/b")
        try:
            plant.run()
        except Killed:
            died = True
            plant.kill()
            plant.run()
        try:
            if len(plant.state.versions) == 2:
                _check(plant)
            else:  # killed between the two trainings: two versions of one task each, and one refinement
                assert plant.states() == {"red/a": "published", "blue/b": "published"}
                assert [len(v.added) + len(v.refined) for v in plant.state.versions.values()] == [1, 1, 1]
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"died before call {call}") from error
    assert call > 15


def test_a_task_without_a_score_is_judged_by_its_error_also_beside_one_that_is_refined(make_plant: MakePlant) -> None:
    plant = make_plant(subspace={"rank_max": 2, "beyond_rank_max": "drop", "energy_ratio_min": 1.0})
    plant.cluster.hold = lambda order: isinstance(order, Train) and not order.refine_version
    plant.submit("red/refined", spec=REFINE)
    plant.submit("red/silent", eval_key="")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.cluster.release()  # both are trained, and merged as one version
    plant.run()
    silent = plant.get("red/silent")
    assert silent.state is TaskState.REJECTED
    assert silent.reason_codes == ("error-at-birth",)
    assert plant.states()["red/refined"] == "published"
