"""The loop with a stand-in cluster: what becomes of a published task that learns again from new rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.errors import Conflict, NameTaken
from orchestrator.api.requests import Diff, PreviewRestore, ShowScores, ShowTask
from orchestrator.api.service import Service
from orchestrator.tasks.task_events import Reason
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store import SubspaceReader
from subspace_store.requests import Expire, Remove, RestoreRevision, Rollback
from tests.orchestrator.plant import Plant
from workers.orders import Evaluate, Order, Train

ALPHA = "red/alpha"


def revise(plant: Plant, before: TaskRecord, **fields: Any) -> TaskRecord:
    """The next revision of a task in the queue, as admission makes it."""
    number = fields.pop("number", before.number + 1)
    facts = {
        "task_id": f"{before.task_id.partition('@')[0]}@{number}",
        "number": number,
        "revises": before.task_id,
        "earlier_rows": (*before.earlier_rows, before.own_rows),
    }
    (record,) = plant.submit(before.title, **facts | fields, spec={"revises": True})
    return record


def service(plant: Plant) -> Service:
    return Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)


def state_of(plant: Plant, record: TaskRecord) -> TaskState:
    return plant.queue.get(record.task_id).state


def served(plant: Plant, task_id: str) -> dict[str, torch.Tensor]:
    """What `main` serves of a task, to the last bit."""
    adapter = SubspaceReader.open(plant.storage).adapter(task_id)
    return {f"{name}.{part}": getattr(update, part) for name, update in adapter.modules.items()
            for part in ("u_NR", "sigma_R", "v_DR")}  # fmt: skip


def test_a_revision_takes_the_place_of_the_one_before_it_in_one_version(plant: Plant) -> None:
    orders: list[Order] = []
    plant.cluster.hold = lambda order: bool(orders.append(order))
    first, other = plant.submit(ALPHA, "blue/beta")
    plant.run()
    second = revise(plant, first)
    plant.run()
    assert {task_id: plant.queue.get(task_id).state for task_id in (first.task_id, second.task_id, other.task_id)} == {
        first.task_id: TaskState.REPLACED,
        second.task_id: TaskState.PUBLISHED,
        other.task_id: TaskState.PUBLISHED,
    }
    state = plant.state
    assert [*state.tasks_at(state.refs["main"])] == [other.task_id, second.task_id]
    made = state.versions[state.refs["main"]]
    assert [(task.task_id, task.replaces) for task in made.added] == [(second.task_id, first.task_id)]
    training = next(order for order in orders if isinstance(order, Train) and order.task_id == second.task_id)
    assert (training.revises, dict(training.earlier_rows)) == (first.task_id, {first.task_id: first.eval_key})
    scoring = next(order for order in orders if isinstance(order, Evaluate) and order.task_id == second.task_id)
    assert dict(scoring.earlier_rows) == {first.task_id: first.eval_key}
    assert f"onebasis rollback-task {ALPHA} --to 1" in plant.queue.get(first.task_id).reason


def test_the_scores_on_each_revisions_rows_are_in_the_log_and_shown(plant: Plant) -> None:
    plant.cluster.score = lambda title, held: 0.88
    (first,) = plant.submit(ALPHA)
    plant.run()
    scored = {"t-red-alpha": 0.875, "t-red-alpha@2": 0.95}
    plant.cluster.on_rows = lambda task_id, brought_by: scored[brought_by]
    plant.cluster.main_on_rows = lambda task_id, brought_by: {"t-red-alpha": 0.88, "t-red-alpha@2": 0.6}[brought_by]
    second = revise(plant, first)
    plant.run()
    written = plant.state.scores[2][second.task_id]
    assert (written.score, written.count) == (0.88, 200)
    assert [(part.task_id, part.score, part.count) for part in written.of_rows] == [
        (first.task_id, 0.875, 100),
        (second.task_id, 0.95, 100),
    ]
    (column,) = service(plant).answer(ShowScores())["tasks"]
    assert (column["task_id"], column["revision"], column["rows"]) == (second.task_id, 2, 200)
    assert [
        (part["revision"], part["rows"], part["main_before"], part["local"], part["scores"])
        for part in column["of_rows"]
    ] == [(1, 100, 0.88, 0.875, [0.88, 0.875]), (2, 100, 0.6, 0.95, [None, 0.95])]
    shown = service(plant).answer(ShowTask(reference=ALPHA))
    assert (shown["task_id"], shown["exact_title"]) == (second.task_id, f"{ALPHA}@2")
    assert [(one["revision"], one["state"]) for one in shown["revisions"]] == [(1, "replaced"), (2, "published")]
    assert [(part["revision"], part["first"], part["under_main"]) for part in shown["scores_of_rows"]] == [
        (1, 0.88, 0.875),
        (2, 0.95, 0.95),
    ]
    assert service(plant).answer(ShowTask(reference=f"{ALPHA}@1"))["task_id"] == first.task_id


def test_what_lies_between_two_revisions_of_a_task_shows_the_score_of_each(plant: Plant) -> None:
    plant.cluster.score = lambda title, held: 0.88
    (first,) = plant.submit(ALPHA)
    plant.run()
    plant.cluster.score = lambda title, held: 0.91
    revise(plant, first)
    plant.run()
    assert service(plant).answer(Diff(old=1, new=2))["scores"] == {ALPHA: [0.88, 0.91]}
    assert service(plant).answer(Diff(old=2, new=1))["scores"] == {ALPHA: [0.91, 0.88]}


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        (0.86, 0.95, "earlier-rows", "would fall from 0.9000 to 0.8600 on the rows of revision 1"),
        (0.9, 0.8, "new-rows", "scores 0.8000 on the new rows, those of revision 2, where main scored 0.8000"),
    ],
)
def test_the_gate_refuses_a_revision_that_forgets_or_gains_nothing(
    plant: Plant, old: float, new: float, code: str, said: str
) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    plant.cluster.on_rows = lambda task_id, brought_by: old if brought_by == first.task_id else new
    second = revise(plant, first)
    plant.run()
    refused = plant.queue.get(second.task_id)
    assert (refused.state, refused.reason_codes) == (TaskState.REJECTED, (code,))
    assert said in refused.reason
    assert state_of(plant, first) is TaskState.PUBLISHED
    assert plant.held() == [ALPHA]
    assert plant.state.refs == {"candidate": 1, "main": 1}
    # The next try is the second revision again, and the number is its own: the one that came to nothing is not meant.
    plant.cluster.on_rows = lambda task_id, brought_by: 0.9
    third = revise(plant, first, number=2, task_id="t-red-alpha-again")
    plant.run()
    assert plant.queue.find(f"{ALPHA}@2").task_id == third.task_id
    assert [one.task_id for one in plant.queue.revisions(first)] == [first.task_id, second.task_id, third.task_id]


def test_what_is_lost_on_earlier_rows_does_not_add_up_from_revision_to_revision(plant: Plant) -> None:
    """drop_max is 0.03, and each revision loses 0.02 against the one before it: the second such loss is refused."""
    (record,) = plant.submit(ALPHA)
    plant.run()
    lost = iter((0.88, 0.86))
    for number in (2, 3):
        now = next(lost)
        plant.cluster.on_rows = lambda task_id, brought_by, now=now: now if brought_by == "t-red-alpha" else 0.95
        record = revise(plant, record)
        plant.run()
        state = TaskState.PUBLISHED if number == 2 else TaskState.REJECTED
        assert state_of(plant, record) is state
    assert "from 0.9000 to 0.8600 on the rows of revision 1" in plant.queue.get(record.task_id).reason


def test_no_other_task_moves_by_a_bit_where_the_basis_spans_the_revision(plant: Plant) -> None:
    first, other = plant.submit(ALPHA, "blue/beta")
    plant.run()
    second = revise(plant, first)
    plant.run()
    back = RestoreRevision(task_id=first.task_id, publish=True)
    before = served(plant, other.task_id)
    answer = service(plant).answer(back)  # its directions are all in the basis by now
    assert (answer["leaving"], answer["main"]) == (second.task_id, answer["version"])
    assert answer["error"] < 1e-6
    after = served(plant, other.task_id)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plant.run(lambda: state_of(plant, first) is TaskState.PUBLISHED)
    assert (state_of(plant, first), state_of(plant, second)) == (TaskState.PUBLISHED, TaskState.REPLACED)
    assert plant.get(ALPHA).task_id == first.task_id


def test_an_earlier_revision_is_put_back_scored_and_revised_once_more(plant: Plant) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    second = revise(plant, first)
    plant.run()
    preview = service(plant).answer(PreviewRestore(task_id=first.task_id))
    assert (preview["leaving"], preview["others_move"], preview["refused"]) == (second.task_id, False, "")
    made = service(plant).answer(RestoreRevision(task_id=first.task_id, publish=True, op_key="restore-revision:1"))
    again = service(plant).answer(RestoreRevision(task_id=first.task_id, publish=True, op_key="restore-revision:1"))
    assert (made["repeated"], again["repeated"], again["version"]) == (False, True, made["version"])
    plant.run(lambda: made["version"] in plant.state.scores)  # no gate judges it, and it is scored all the same
    with pytest.raises(Conflict, match="the candidate, holds it"):
        service(plant).answer(PreviewRestore(task_id=first.task_id))
    third = revise(plant, plant.queue.get(first.task_id), number=3)
    plant.run()
    numbers = [(one.number, one.state) for one in plant.queue.revisions(third)]
    assert numbers == [(1, TaskState.REPLACED), (2, TaskState.REPLACED), (3, TaskState.PUBLISHED)]


def test_a_rollback_of_main_brings_the_earlier_revision_back_and_forward_again(plant: Plant) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    second = revise(plant, first)
    plant.run()
    for version, states in (
        (1, (TaskState.PUBLISHED, TaskState.PARKED)),
        (2, (TaskState.REPLACED, TaskState.PUBLISHED)),
        (0, (TaskState.PARKED, TaskState.PARKED)),
        (2, (TaskState.REPLACED, TaskState.PUBLISHED)),
    ):
        service(plant).answer(Rollback(version=version))
        plant.run(lambda wanted=states: (state_of(plant, first), state_of(plant, second)) == wanted)
    assert plant.queue.get(second.task_id).reason_codes == ()


def third_held_at(plant: Plant, order: type[Order]) -> tuple[TaskRecord, TaskRecord, TaskRecord]:
    """Three revisions of a task: one replaced, one published, and one that is given such an order and no more."""
    (first,) = plant.submit(ALPHA)
    plant.run()
    second = revise(plant, first)
    plant.run()
    plant.cluster.hold = lambda given: isinstance(given, order)
    return first, second, revise(plant, second)


def test_a_rollback_while_a_revision_is_trained_lets_the_earlier_one_come_back(plant: Plant) -> None:
    first, second, third = third_held_at(plant, Train)
    plant.run(lambda: state_of(plant, third) is TaskState.TRAINING)
    service(plant).answer(Rollback(version=1))
    plant.run(lambda: state_of(plant, first) is TaskState.PUBLISHED)
    plant.cluster.release()
    plant.run(lambda: state_of(plant, third) is TaskState.PARKED)
    parked = plant.queue.get(third.task_id)
    assert (parked.reason_codes, parked.reason) == ((Reason.BAD_INPUT,), f"main does not hold {second.task_id}")
    assert plant.held() == [ALPHA]


def test_a_revision_whose_earlier_one_left_main_before_it_was_merged_is_parked(plant: Plant) -> None:
    first, _, third = third_held_at(plant, Evaluate)
    plant.run(lambda: state_of(plant, third) is TaskState.EVALUATING and len(plant.cluster.held) == 1)
    service(plant).answer(Rollback(version=1))  # third was to take the place of the second
    plant.cluster.release()
    plant.run(lambda: state_of(plant, third) is TaskState.PARKED)
    parked = plant.queue.get(third.task_id)
    assert parked.reason_codes == (Reason.NAME_TAKEN,)
    assert f"train it again as a revision of {first.task_id}" in parked.reason
    assert (state_of(plant, first), plant.held()) == (TaskState.PUBLISHED, [ALPHA])


def test_a_group_that_fails_is_merged_one_by_one_and_the_revision_still_replaces(plant: Plant) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    plant.cluster.hold = lambda order: isinstance(order, Train)
    second = revise(plant, first)
    (bad,) = plant.submit("blue/bad")
    plant.run(lambda: len(plant.cluster.held) == 2)
    plant.cluster.score = lambda title, held: 0.1 if title == "blue/bad" else 0.9
    plant.cluster.release()
    plant.run()
    assert (state_of(plant, second), state_of(plant, bad)) == (TaskState.PUBLISHED, TaskState.REJECTED)
    assert [*plant.state.tasks_at(plant.state.refs["main"])] == [second.task_id]


def test_a_control_plane_that_dies_at_any_step_ends_with_the_same_revision(plant: Plant) -> None:
    (record,) = plant.submit(ALPHA)
    plant.run()
    for steps in range(1, 12):
        before, record = record, revise(plant, record)
        plant.step(steps)
        plant.kill()
        plant.run(lambda now=record: state_of(plant, now) is TaskState.PUBLISHED)
        plant.run()
        assert state_of(plant, before) is TaskState.REPLACED
        assert [*plant.state.tasks_at(plant.state.refs["main"])] == [record.task_id]
    assert plant.merges() == [[ALPHA]] * 12


def test_removing_a_task_takes_all_its_revisions_and_their_rows(plant: Plant) -> None:
    first, other = plant.submit(ALPHA, "blue/beta")
    plant.run()
    second = revise(plant, first)
    plant.run()
    assert plant.storage.keys(first.eval_key)  # the second is scored on them
    service(plant).answer(Remove(task_id=second.task_id, publish=True))
    plant.run(lambda: state_of(plant, second) is TaskState.PARKED)
    assert [plant.queue.get(one.task_id).reason_codes for one in (first, second)] == [(Reason.REMOVED,)] * 2
    assert plant.held() == ["blue/beta"]
    main = plant.state.refs["main"]
    old = tuple(number for number in plant.state.versions if number != main)
    service(plant).answer(Expire(versions=old))
    plant.run(lambda: not plant.storage.keys(f"data/{first.task_id}/") and not plant.storage.keys(second.eval_key))
    assert plant.storage.keys(other.eval_key)


def test_a_revisions_rows_stay_while_a_later_one_is_scored_on_them(plant: Plant) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    second = revise(plant, first)
    plant.run()
    service(plant).answer(Expire(versions=(1,)))
    plant.step(8)  # the log is read, and then all files are looked at
    assert plant.storage.keys(first.eval_key)
    plant.submit("blue/beta")
    plant.run()
    assert state_of(plant, second) is TaskState.PUBLISHED


def test_a_name_is_given_to_one_revision_on_its_way_and_to_no_other_task(plant: Plant) -> None:
    (first,) = plant.submit(ALPHA)
    plant.run()
    plant.cluster.hold = lambda order: isinstance(order, Train)
    second = revise(plant, first)
    with pytest.raises(NameTaken, match=r"red/alpha@2 \(t-red-alpha@2\) is queued\n.*onebasis cancel"):
        revise(plant, first, number=3)
    with pytest.raises(NameTaken, match="onebasis submit --revise"):
        plant.submit(ALPHA, task_id="t-new")
    plant.cluster.release()
    plant.run()
    with pytest.raises(Conflict, match="in this very moment"):
        revise(plant, first, number=3)
    assert state_of(plant, second) is TaskState.PUBLISHED


MakePlant = Callable[..., Plant]


def test_a_task_behind_a_revised_one_starts(make_plant: MakePlant) -> None:
    plant = make_plant()
    (first,) = plant.submit(ALPHA)
    plant.run()
    revise(plant, first)
    plant.run()
    (behind,) = plant.submit("blue/behind", spec={"after": (ALPHA,)})
    plant.run()
    assert state_of(plant, behind) is TaskState.PUBLISHED
