"""A revision takes the place of an earlier one of the same task; an earlier one may be put back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from configs.errors import Conflict, Corrupt, InvalidInput, NameTaken, NotFound, RefusedAdapters
from subspace_store import CANDIDATE, MAIN, Adapter, StagedAdapter, SubspaceReader, SubspaceStore, Version
from subspace_store.adapter import SIZED
from subspace_store.files.tensor_file import TensorFile
from subspace_store.files.version_heads import COEFFICIENTS
from subspace_store.log import fold, retention
from subspace_store.log.version import RowsScore, TaskScore
from subspace_store.log.version_log import checkpoint_key
from subspace_store.requests import Merge, RestoreRevision
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    SHAPES,
    crash_at_merge,
    deltas,
    foundation_adapter,
    fresh_storage,
    in_the_basis,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
    staged,
    trained_in,
)

LOSSY = {"energy_ratio_min": 0.9, "rank_max": 9, "beyond_rank_max": "drop"}
"""Merges take from earlier tasks, so that there is drift to be told."""
ALWAYS = {"rank_max": 9}
"""Directions always join, and nothing is lost."""
PAYS = {"share": "if-it-pays", "seed_directions": 4, "rank_max": 6}
"""The default, with a basis that is soon full: it stays, and revisions have private parts."""


def grown(*groups: str, store: SubspaceStore | None = None, **settings: Any) -> SubspaceStore:
    """Each group of words is merged as one version, a word's adapter always the same; a@2 takes the place of a."""
    store = store or opened(fresh_storage(), **(settings or LOSSY))
    for group in groups:
        revise(store, group)
    return store


def revise(store: SubspaceStore, group: str) -> Version:
    """Merge a group of words."""
    held = {task.name: id_ for id_, task in store.state.tasks_at(store.state.refs[CANDIDATE]).items()}
    names = {word: f"team/{word.partition('@')[0]}" for word in group.split()}
    replaces = {word: held[name] for word, name in names.items() if name in held}
    return merged(store, {word: adapter_of(word) for word in names}, f"merge {group}", replaces)


def adapter_of(word: str) -> Adapter:
    seed = sum(100**place * ord(letter) for place, letter in enumerate(word)) % 10_000
    return random_adapter(seed, rank=2 + seed % 3)


def dense(reader: SubspaceReader, version: int) -> dict[str, Mapping[str, Tensor]]:
    """Every task of a version: dense updates."""
    return {id_: deltas(reader.adapter(id_, version)) for id_ in reader.state.tasks_at(version)}


def is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lacks(held: Mapping[str, Tensor], delivered: Mapping[str, Tensor]) -> float:
    """√(1 − ‖ΔŴ‖²/‖ΔW‖²), as `SubspaceState.errors` has it."""
    energies = [sum(float(delta.square().sum()) for delta in updates.values()) for updates in (held, delivered)]
    return math.sqrt(max(0.0, 1 - energies[0] / energies[1]))


def test_the_old_coefficients_leave_and_the_new_ones_enter() -> None:
    store = grown("a", "b", "c")
    before = dense(store, 3)
    version = revise(store, "a@2 d")
    assert (version.left, [task.replaces for task in version.added]) == (("a",), ["a", None])
    assert list(store.state.tasks_at(4)) == ["b", "c", "a@2", "d"]
    for reader in (store, reading(store.storage)):
        assert all(is_same(updates, before[id_]) for id_, updates in dense(reader, 3).items())
        for module in reader.subspace(4).values():
            assert set(module.tasks.task_ids) == {"b", "c", "a@2", "d"}
    with pytest.raises(NotFound, match=r"version 4 holds no task a\n.*another revision of that task, a@2"):
        store.adapter("a", 4)
    assert verify(reading(store.storage), deep=True) == []


@pytest.mark.parametrize("settings", [LOSSY, PAYS, ALWAYS, {"rank_fixed": 6}], ids=str)
def test_it_is_as_exact_as_a_task_of_its_own_and_the_others_move_as_in_any_merge(settings: dict[str, Any]) -> None:
    store = grown("a b", "c", **settings)
    before = dense(store, 2)
    revise(store, "b@2")
    after, drift, errors = dense(store, 3), store.state.drift(3), store.state.errors(3)
    assert list(drift) == ["a", "c"]
    for id_ in drift:
        delivered = deltas(adapter_of(id_))
        assert relative_distance(after[id_], before[id_], delivered) == pytest.approx(drift[id_], abs=2e-6)
    for id_ in after:
        assert lacks(after[id_], deltas(adapter_of(id_))) == pytest.approx(errors[id_], abs=5e-4)  # a root of rounding
    assert verify(reading(store.storage), deep=True) == []


def test_where_the_basis_stays_the_others_do_not_move_by_a_bit() -> None:
    store = grown("a b c", "d", **PAYS)
    before, basis = dense(store, 2), store.basis(2)
    version = revise(store, "b@2")
    assert store.homes(3) == store.homes(2)
    assert version.drift == ()
    for reader in (store, reading(store.storage, **PAYS)):
        assert all(torch.equal(reader.basis(3)[name].p_NK, one.p_NK) for name, one in basis.items())
        after = dense(reader, 3)
        assert all(is_same(after[id_], before[id_]) for id_ in ("a", "c", "d"))
    delivered = deltas(adapter_of("b@2"))
    error = store.state.tasks_at(3)["b@2"].error_at_birth
    assert error**2 <= 1 - store.settings.energy_ratio_min + 1e-9
    assert relative_distance(dense(store, 3)["b@2"], delivered, delivered) == pytest.approx(error, abs=2e-6)


def test_a_revision_that_lies_in_the_basis_costs_its_coefficients_alone() -> None:
    store = grown("a b c", **PAYS)
    inside = trained_in(store.training_basis(1), seed=5)
    merged(store, {"b@2": inside}, replaces={"b@2": "b"})
    task = store.state.tasks_at(2)["b@2"]
    assert (task.private, task.is_sized) == (None, True)
    assert relative_distance(dense(store, 2)["b@2"], deltas(inside), deltas(inside)) < 1e-6
    assert verify(reading(store.storage, **PAYS), deep=True) == []


def test_of_the_modules_that_only_the_old_revision_adapts_nothing_is_left() -> None:
    store = opened(fresh_storage(), **LOSSY)
    merged(store, {"a": random_adapter(1)})
    narrow = random_adapter(2, shapes={"layer.0.query": SHAPES["layer.0.query"]})
    merged(store, {"a@2": narrow}, replaces={"a@2": "a"})
    merged(store, {"b": random_adapter(3)})
    assert set(store.adapter("a@2", 3).modules) == {"layer.0.query"}
    assert verify(reading(store.storage), deep=True) == []


@pytest.mark.parametrize("gone", ["a", "b"])
def test_what_is_no_revision_is_refused_as_before(gone: str) -> None:
    store = grown("a", "b")
    with pytest.raises(NameTaken, match="holds another task of this name, a") as caught:
        merged(store, {"a@2": adapter_of("a@2")})
    assert (caught.value.task_id, caught.value.other_id) == ("a@2", "a")
    with pytest.raises(Conflict, match="was merged as version"):
        merged(store, {gone: adapter_of(gone)}, "again", {gone: gone})


def test_a_revision_of_what_is_not_there_is_refused_and_says_what_is() -> None:
    store = grown("a", "b", "a@2")
    with pytest.raises(NameTaken, match="version 3 holds a@2 under this name, not a, which it would replace") as taken:
        merged(store, {"a@3": adapter_of("c")}, replaces={"a@3": "a"})
    assert taken.value.other_id == "a@2"
    with pytest.raises(RefusedAdapters, match=r"would replace b in version 3, and b is team/b there") as other:
        merged(store, {"c@2": adapter_of("c")}, replaces={"c@2": "b"})
    assert other.value.task_ids == ("c@2",)
    with pytest.raises(RefusedAdapters, match="and no task of this name is there"):
        merged(store, {"c@2": adapter_of("c")}, replaces={"c@2": "c"})
    with pytest.raises(NameTaken, match="holds b@2 under this name, not b"):
        merged(store, {"b@2": adapter_of("c"), "b@3": adapter_of("d")}, replaces={"b@2": "b", "b@3": "b"})
    upload = replace(staged(store, "b", in_the_basis(store, 1, 3)), replaces="a@2")
    with pytest.raises(RefusedAdapters, match="it replaces none"):
        store.refine([upload], op_key="refine", actor="me")
    assert len(store.state.versions) == 3


def test_asked_again_a_replacement_is_the_same_version_and_another_one_is_another_request() -> None:
    store = grown("a", "b")
    version = revise(store, "a@2")
    assert merged(store, {"a@2": adapter_of("a@2")}, "merge a@2", {"a@2": "a"}) == version
    again = opened(store.storage, "next", **LOSSY)
    assert merged(again, {"a@2": adapter_of("a@2")}, "merge a@2", {"a@2": "a"}) == version
    with pytest.raises(Conflict, match="another request was done"):
        merged(again, {"a@2": adapter_of("a@2")}, "merge a@2")


# What is known of tasks along a lineage


def test_each_drift_is_that_of_its_task_after_tasks_have_left_and_come_back() -> None:
    store = grown("a", "b", "c", "b@2", "d", "a@2", "e", "c@2")
    store.restore_revision("b", op_key="restore", actor="me")
    revise(store, "f")
    seen = {number: dense(store, number) for number in range(1, 11)}
    assert sum(any(store.state.drift(number).values()) for number in seen) > 4
    for number in range(2, 11):
        drift = store.state.drift(number)
        left = store.state.versions[number].left
        assert list(drift) == [id_ for id_ in seen[number - 1] if id_ not in left]
        for id_ in drift:
            whole = deltas(adapter_of(id_))
            moved = relative_distance(seen[number][id_], seen[number - 1][id_], whole)
            assert moved == pytest.approx(drift[id_], abs=2e-6), (number, id_)
    for number, tasks in seen.items():
        errors = store.state.errors(number)
        assert list(errors) == list(tasks) == list(store.state.births(number))
        for id_, held in store.state.tasks_at(number).items():
            whole = deltas(adapter_of(id_))
            assert lacks(tasks[id_], whole) == pytest.approx(errors[id_], abs=5e-4)  # a root of rounding
            steps = [store.state.drift(n).get(id_, 0.0) for n in range(held.version + 1, number + 1)]
            assert store.state.drift_bound(id_, held.version, number) == pytest.approx(sum(steps))
            assert store.state.drift_bound(id_, number, number) == 0.0
    with pytest.raises(NotFound, match="version 9 holds no task b@2"):
        store.state.drift_bound("b@2", 1, 9)
    assert verify(reading(store.storage), deep=True) == []


def test_a_revision_is_born_in_its_own_version_and_a_restored_one_again() -> None:
    store = grown("a", "b", "a@2")
    assert store.state.births(3) == {"b": 2, "a@2": 3}
    store.restore_revision("a", op_key="restore", actor="me")
    assert store.state.births(4) == {"b": 2, "a": 4}
    assert (store.state.births(2), store.state.births(3)) == ({"a": 1, "b": 2}, {"b": 2, "a@2": 3})
    refined(store, {"a": in_the_basis(store, 1, 4)})
    assert store.state.births(5) == {"b": 2, "a": 5}  # refined before anybody scored version 4
    store.record_scores(5, [TaskScore(task_id="a", score=0.5, count=9)], op_key="s", actor="me")
    refined(store, {"a": in_the_basis(store, 2, 5)}, "refine again")
    assert store.state.births(6) == {"b": 2, "a": 5}


def test_the_scores_on_each_revisions_rows_are_kept_in_the_log() -> None:
    store = grown("a", "a@2")
    parts = (RowsScore(task_id="a", score=0.25, count=4), RowsScore(task_id="a@2", score=math.nan, count=2))
    score = TaskScore(task_id="a@2", score=0.5, count=6, of_rows=parts)
    store.record_scores(2, [score], op_key="s", actor="me")
    (first, second) = reading(store.storage).state.scores[2]["a@2"].of_rows
    assert (first, second.task_id, second.count) == (parts[0], "a@2", 2)
    assert math.isnan(second.score)
    for wrong in (replace(parts[0], score=math.inf), replace(parts[0], count=-1)):
        with pytest.raises(InvalidInput):
            store.record_scores(2, [replace(score, of_rows=(wrong,))], op_key="t", actor="me")


def test_births_go_on_through_a_compaction() -> None:
    store = grown("a", "b", "a@2", **PAYS)
    store.compact(op_key="c", actor="me")
    assert store.state.births(4) == {"b": 2, "a@2": 3}
    assert store.state.tasks_at(4)["a@2"].replaces is None
    revise(store, "b@2")
    assert store.state.births(5) == {"a@2": 3, "b@2": 5}
    store.restore_revision("a", op_key="restore", actor="me")  # it left before the compaction
    assert store.state.births(6) == {"b@2": 5, "a": 6}
    assert verify(reading(store.storage), deep=True) == []


def test_what_was_removed_after_a_compaction_and_merged_again_is_born_again() -> None:
    store = grown("a", "b", **PAYS)
    store.compact(op_key="c", actor="me")
    store.remove("a", op_key="r", actor="me")
    assert store.state.births(4) == {"b": 2}
    merged(store, {"a": adapter_of("a")}, "again")
    assert store.state.births(5) == {"b": 2, "a": 5}


def test_a_refinement_right_after_a_compaction_makes_no_task_younger() -> None:
    store = grown("a", "b", **PAYS)
    store.compact(op_key="c", actor="me")
    refined(store, {"a": in_the_basis(store, 1, 3)})
    assert store.state.births(4) == {"a": 1, "b": 2}


def test_revisions_are_known_by_any_of_them_oldest_first() -> None:
    store = grown("a", "b", "a@2", "a@3", "c")
    store.restore_revision("a", op_key="restore", actor="me")
    assert [store.state.revisions(id_) for id_ in ("a", "a@2", "a@3")] == [("a", "a@2", "a@3")] * 3
    assert (store.state.revisions("b"), store.state.revisions("z")) == (("b",), ("z",))


def test_the_sizes_are_those_of_what_is_there() -> None:
    store = grown("a b", "c", "b@2", **PAYS)
    foot = reading(store.storage, **PAYS).footprint(3)
    held = store.state.tasks_at(3).values()
    assert (foot.tasks, foot.separate_numbers) == (3, sum(task.parameter_count for task in held))
    modules = store.subspace(3).values()
    assert foot.total_numbers == sum(module.numbers for module in modules)
    assert set(store.coefficient_numbers(3)) <= {"a", "c", "b@2"}


@pytest.mark.parametrize("settings", [LOSSY, PAYS], ids=str)
def test_a_forecast_of_a_revision_is_what_its_merge_does(settings: dict[str, Any]) -> None:
    store = grown("a", "b", "c", **settings)
    told = store.forecast({"a@2": adapter_of("a@2")}, replaces={"a@2": "a"})
    assert set(told.drift) == set(told.error) == {"b", "c"}
    version = revise(store, "a@2")
    assert told.error_at_birth == {"a@2": pytest.approx(version.added[0].error_at_birth, abs=1e-6)}
    assert told.drift == pytest.approx(store.state.drift(4), abs=1e-6)
    assert {id_: error for id_, error in store.state.errors(4).items() if id_ in told.error} == pytest.approx(
        dict(told.error), abs=1e-6
    )
    with pytest.raises(NotFound, match="holds no task a"):
        store.forecast({"a@3": adapter_of("a@3")}, replaces={"a@3": "a"})


def test_the_difference_of_two_versions_tells_revisions_from_other_tasks() -> None:
    store = grown("a", "b", "a@2 c")
    diff = store.diff(2, 3)
    assert [(old.task_id, new.task_id) for old, new in diff.revised] == [("a", "a@2")]
    assert ([t.task_id for t in diff.added], [t.task_id for t in diff.removed]) == (["a@2", "c"], ["a"])
    assert diff.drift_bound == {"b": pytest.approx(store.state.drift(3)["b"])}
    store.publish(3, op_key="p", actor="me")
    back = store.preview_rollback(0)
    assert (back.revised, len(back.vanishing)) == ((), 3)


def test_rolling_main_back_brings_the_old_revision_back() -> None:
    store = grown("a", "b")
    store.publish(2, op_key="p2", actor="me")
    before = dense(store, 2)
    revise(store, "a@2")
    store.publish(3, op_key="p3", actor="me")
    lost = store.lost_by("a")
    assert lost is not None
    assert lost.op == "publish"
    preview = store.rollback(2, op_key="back", actor="me")
    assert [(old.task_id, new.task_id) for old, new in preview.revised] == [("a@2", "a")]
    assert all(is_same(dense(store, 2)[id_], before[id_]) for id_ in before)
    assert store.lost_by("a") is None


# What stays, and what goes


def test_what_only_the_old_revision_needs_goes_when_the_versions_that_hold_it_expire() -> None:
    store = grown("a", "b c", "a@2")
    store.publish(3, op_key="p", actor="me")
    old = store.state.versions[1].added[0]
    assert store.delivered("a").modules.keys() == adapter_of("a").modules.keys()
    store.expire([1], actor="me")
    assert old.coefficients.key in retention.needed(store.state)  # version 2 holds it
    assert opened(store.storage, "next", **LOSSY).collect().deleted
    assert dense(reading(store.storage), 2).keys() == {"a", "b", "c"}
    writer = opened(store.storage, "third", **LOSSY)
    writer.expire([2], actor="me")
    assert {old.coefficients.key, old.adapter.key} <= {*writer.collectable().blobs} | {*store.storage.keys("blobs/")}
    writer = opened(store.storage, "fourth", **LOSSY)
    assert {old.coefficients.key, old.adapter.key} <= {*writer.collect().blobs}
    after = reading(store.storage)
    assert dense(after, 3).keys() == {"b", "c", "a@2"}
    assert set(after.coefficient_numbers(3)) == {"b", "c", "a@2"}
    assert after.subspace(3).keys() == set(SHAPES)
    assert verify(after, deep=True) == []
    with pytest.raises(NotFound, match="no version holds the task a"):
        after.delivered("a")
    with pytest.raises(NotFound, match=r"no version that can be read holds the task a\n"):
        writer.restore_revision("a", op_key="r", actor="me")
    grown("d", store=writer)
    assert verify(reading(store.storage), deep=True) == []


def test_a_snapshot_after_a_revision_has_no_trace_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 2)
    store = grown("a", "b", "a@2", "c", "b@2")
    snapshots = {n: v.snapshot for n, v in store.state.versions.items() if v.snapshot}
    assert len(snapshots) > 1
    for number, ref in snapshots.items():
        assert set(TensorFile(store.storage, ref, COEFFICIENTS).info["tasks"]) == set(store.state.tasks_at(number))
    fresh = reading(store.storage)
    for number in store.state.versions:
        assert set(fresh.coefficient_numbers(number)) == set(store.state.tasks_at(number))
        assert dense(fresh, number).keys() == store.state.tasks_at(number).keys()
    assert verify(fresh, deep=True) == []


def test_an_adapter_of_an_old_revision_can_be_let_go() -> None:
    store = grown("a", "b", "a@2")
    store.publish(3, op_key="p", actor="me")
    held = dense(store, 2)["a"]
    store.drop_adapters(["a"], actor="me")
    assert opened(store.storage, "next", **LOSSY).collect().blobs == (store.state.versions[1].added[0].adapter.key,)
    store = opened(store.storage, "third", **LOSSY)
    told = store.preview_restore("a")
    assert told.is_approximate
    version = store.restore_revision("a", op_key="r", actor="me")
    assert version.approximate == ("a",)
    assert relative_distance(dense(store, 4)["a"], held, held) == pytest.approx(told.error, abs=2e-6)
    assert verify(reading(store.storage), deep=True) == []


# Putting an earlier revision back


@pytest.mark.parametrize("settings", [PAYS, ALWAYS], ids=str)
def test_an_earlier_revision_is_put_back_and_nothing_else_moves(settings: dict[str, Any]) -> None:
    store = grown("a b c", "d", "b@2", "e", **settings)
    before = dense(store, 4)
    told = store.preview_restore("b")
    assert len(store.state.versions) == 4
    version = store.restore_revision("b", op_key="restore-revision:1", actor="me")
    assert (version.left, version.parent, version.transport, version.drift) == (("b@2",), 4, None, ())
    assert list(store.state.tasks_at(5)) == ["a", "c", "d", "e", "b"]
    assert store.state.refs == {CANDIDATE: 5, MAIN: 0}
    for reader in (store, reading(store.storage, **settings)):
        after = dense(reader, 5)
        assert all(is_same(after[id_], before[id_]) for id_ in ("a", "c", "d", "e"))
        delivered = deltas(adapter_of("b"))
        error = relative_distance(after["b"], delivered, delivered)
        assert error == pytest.approx(store.state.errors(5)["b"], abs=2e-6) == pytest.approx(told.error, abs=2e-6)
    assert told.error**2 <= 1 - store.settings.energy_ratio_min + 1e-9
    own = store.coefficient_numbers(5).get("b", 0) + version.added[0].private_count
    assert (told.leaving.task_id, told.restored.task_id, told.own_numbers_after) == ("b@2", "b", own)
    assert version.added[0].adapter == store.state.versions[1].added[1].adapter
    assert store.restore_revision("b", op_key="restore-revision:1", actor="me") == version
    revise(store, "f")
    assert verify(reading(store.storage, **settings), deep=True) == []


@pytest.mark.parametrize("settings", [LOSSY, {"rank_fixed": 6}], ids=str)
def test_where_merges_take_from_tasks_a_revision_is_merged_again(settings: dict[str, Any]) -> None:
    store = grown("a b c", "d", "b@2", "e", **settings)
    told = store.preview_restore("b")
    assert told.own_numbers_after is None
    store.restore_revision("b", op_key="r", actor="me")
    task, delivered = store.state.tasks_at(5)["b"], deltas(adapter_of("b"))
    assert relative_distance(dense(store, 5)["b"], delivered, delivered) == pytest.approx(told.error, abs=2e-6)
    assert task.error_at_birth == pytest.approx(told.error, abs=2e-6)
    assert verify(reading(store.storage, **settings), deep=True) == []


def test_a_revision_in_the_renewed_basis_or_in_the_foundation_is_put_back_where_it_was() -> None:
    settings = {"share": "if-it-pays", "seed_directions": 4, "renew_tasks": 3, "renew_directions": 5}
    store = opened(fresh_storage(), **settings)
    for number in range(1, 4):
        adapter = replace(random_adapter(number), info={SIZED: "score"})
        merged(store, {f"t{number}": adapter})
    inside = trained_in(store.training_basis(3), 1)
    merged(store, {"in": inside, "f": foundation_adapter(5)})
    merged(store, {"in@2": random_adapter(8), "f@2": random_adapter(9)}, replaces={"in@2": "in", "f@2": "f"})
    for name, adapter in (("in", inside), ("f", foundation_adapter(5))):
        old = store.state.versions[4].added[0 if name == "in" else 1]
        number = store.restore_revision(name, op_key=f"r {name}", actor="me").number
        task = store.state.tasks_at(number)[name]
        assert (task.private_count, task.foundation_count) == (old.private_count, old.foundation_count)
        assert relative_distance(dense(store, number)[name], deltas(adapter), deltas(adapter)) < 1e-6
    assert verify(reading(store.storage, **settings), deep=True) == []


def test_after_a_compaction_without_its_module_a_revision_is_merged() -> None:
    store = opened(fresh_storage(), **PAYS)
    wide = random_adapter(1, shapes={**SHAPES, "layer.1.query": (12, 8)})
    merged(store, {"a": wide, "b": random_adapter(2)})
    revise(store, "a@2")
    store.compact(op_key="c", actor="me")
    assert "layer.1.query" not in store.ranks(3)
    told = store.preview_restore("a")
    assert told.own_numbers_after is None
    store.restore_revision("a", op_key="r", actor="me")
    assert store.state.tasks_at(4)["a"].error_at_birth == pytest.approx(told.error, abs=1e-6)
    assert relative_distance(dense(store, 4)["a"], deltas(wide), deltas(wide)) == pytest.approx(told.error, abs=1e-6)
    assert verify(reading(store.storage, **PAYS), deep=True) == []


@pytest.mark.parametrize("settings", [PAYS, LOSSY], ids=str)
def test_a_refined_revision_is_put_back_as_it_was_refined(settings: dict[str, Any]) -> None:
    store = grown("a", "b", **settings)
    again = in_the_basis(store, 3, 2)
    refined(store, {"a": again})
    before = store.state.tasks_at(3)["a"]
    revise(store, "a@2")
    store.restore_revision("a", op_key="r", actor="me")
    task = store.state.tasks_at(5)["a"]
    assert (task.adapter, task.parameter_count) == (before.adapter, before.parameter_count)
    assert relative_distance(dense(store, 5)["a"], deltas(again), deltas(again)) == pytest.approx(
        task.error_at_birth, abs=2e-6
    )


def test_what_cannot_be_put_back_is_refused_with_the_reason() -> None:
    store = grown("a", "b", "a@2")
    for asked in (store.preview_restore, lambda id_: store.restore_revision(id_, op_key="r", actor="me")):
        with pytest.raises(Conflict, match="version 3, the candidate, holds it"):
            asked("a@2")
        with pytest.raises(NotFound, match="no version that can be read holds the task z"):
            asked("z")
    store.quarantine("a", "its rows are wrong", actor="me")
    with pytest.raises(RefusedAdapters, match="its rows are wrong"):
        store.preview_restore("a")
    store.unquarantine("a", actor="me")
    revise(store, "a@3")
    store.publish(4, op_key="p", actor="me")
    revise(store, "a@4")
    store.reject(5, "worse", op_key="j", actor="gate")
    with pytest.raises(NotFound, match="no version that can be read holds the task a@4"):
        store.preview_restore("a@4")
    store.remove("a@3", op_key="x", actor="me")
    with pytest.raises(NotFound, match="holds no other revision of it"):
        store.preview_restore("a")
    merged(store, {"a@9": adapter_of("a@9")})  # a new task of the same name is no revision of it
    with pytest.raises(NotFound, match="holds no other revision of it"):
        store.preview_restore("a")


def test_under_the_key_of_another_request_nothing_is_put_back() -> None:
    store = grown("a", "b", "a@2")
    with pytest.raises(Conflict, match="another request was done"):
        store.restore_revision("a", op_key="merge b", actor="me")


# Removing


@pytest.mark.parametrize(
    ("groups", "gone", "rest"),
    [
        (("a", "b", "a@2", "c"), "b", ("a", "a@2", "c")),
        (("a b", "c", "b@2 d", "e"), "d", ("a b", "c", "b@2", "e")),
        (("a b", "c", "b@2 d", "e"), "b@2", ("a", "c", "d", "e")),
        (("x", "a", "a@2", "b", "a@3"), "a@3", ("x", "b")),
        (("a", "b", "a@2"), "a@2", ("b",)),
        (("a", "b", "a@2", "b@2"), "b@2", ("a", "a@2")),
    ],
)
def test_what_remains_is_as_if_no_revision_of_the_task_had_ever_been_there(
    groups: tuple[str, ...], gone: str, rest: tuple[str, ...]
) -> None:
    store = grown(*groups)
    line = {id_ for id_ in {w for g in groups for w in g.split()} if id_.split("@")[0] == gone.split("@")[0]}
    told = store.preview_remove(gone)
    assert {*told.revisions} == line
    version = store.remove(gone, op_key="r", actor="me")
    assert version is not None
    for one in store.state.lineage(version.number):
        assert line.isdisjoint(store.state.tasks_at(one.number))
        assert all(line.isdisjoint(module.tasks.task_ids) for module in store.subspace(one.number).values())
        assert one.remakes is None or line <= {*one.removed}
    assert told.numbers_after == store.footprint(version.number).total_numbers
    other = grown(*rest)
    newest = other.state.refs[CANDIDATE]
    assert list(store.state.tasks_at(version.number)) == list(other.state.tasks_at(newest))
    mine, theirs = dense(store, version.number), dense(other, newest)
    assert all(is_same(mine[id_], theirs[id_]) for id_ in theirs)
    assert store.state.errors(version.number) == other.state.errors(newest)
    assert verify(reading(store.storage), deep=True) == []


def test_an_earlier_revision_is_not_removed_by_itself() -> None:
    store = grown("a", "b", "a@2")
    with pytest.raises(NotFound, match="it holds another revision of that task, a@2"):
        store.remove("a", op_key="r", actor="me")


def test_a_revision_that_was_put_back_is_made_again_in_its_turn() -> None:
    store = grown("a", "b", "a@2", "c")
    store.restore_revision("a", op_key="r", actor="me")
    revise(store, "d")
    store.remove("b", op_key="x", actor="me")
    number = store.state.refs[CANDIDATE]
    assert [[t.task_id for t in v.added] for v in store.state.lineage(number)] == [["a"], ["a@2"], ["c"], ["a"], ["d"]]
    assert [v.left for v in store.state.lineage(number)] == [(), ("a",), (), ("a@2",), ()]
    assert list(store.state.tasks_at(number)) == ["c", "a", "d"]
    assert verify(reading(store.storage), deep=True) == []


def test_where_an_old_revision_is_gone_the_later_one_takes_its_place_when_others_are_removed() -> None:
    store = grown("a", "b", "a@2", "c", "a@3", "d")
    store.publish(6, op_key="p", actor="me")
    store.expire([1, 2, 3, 4], actor="me")
    store = opened(store.storage, "next", **LOSSY)
    store.collect()
    told = store.preview_remove("b")
    assert told.start == 0
    version = store.remove("b", op_key="x", actor="me")
    assert version is not None
    line = store.state.lineage(version.number)
    assert [[(t.task_id, t.replaces) for t in v.added] for v in line] == [[("c", None)], [("a@3", None)], [("d", None)]]
    assert store.footprint(version.number).total_numbers == told.numbers_after
    assert store.state.revisions("a@3") == ("a", "a@2", "a@3")
    assert verify(reading(store.storage), deep=True) == []


def test_what_was_refined_and_then_revised_is_made_again_as_what_it_became() -> None:
    store = grown("t u", **PAYS)
    store.publish(1, op_key="p1", actor="me")
    refined(store, {"t": adapter_of("t")})
    store.publish(2, op_key="p2", actor="me")
    store.drop_adapters(["t"], actor="me")
    store.pin(2, owner="me", until=None, actor="me")
    store.rollback(1, op_key="back", actor="me", reason="")
    revise(store, "t@2")
    store.publish(3, op_key="p3", actor="me")
    store.expire([1], actor="me")
    assert store.preview_remove("u").numbers_after
    version = store.remove("u", op_key="x", actor="me")
    assert version is not None
    assert list(store.state.tasks_at(version.number)) == ["t@2"]
    assert verify(reading(store.storage), deep=True) == []


def test_a_revision_that_came_back_may_follow_itself_when_the_one_between_is_gone() -> None:
    store = grown("a", "b", "c", "a@2")
    store.restore_revision("a", op_key="r", actor="me")
    revise(store, "d")
    store.publish(6, op_key="p", actor="me")
    store.expire([3, 4, 5], actor="me")
    store = opened(store.storage, "next", **LOSSY)
    store.collect()
    version = store.remove("b", op_key="x", actor="me")
    assert version is not None
    line = store.state.lineage(version.number)
    assert [[(t.task_id, t.replaces) for t in v.added] for v in line] == [
        [("a", None)],
        [("c", None)],
        [("a", "a")],
        [("d", None)],
    ]
    assert list(store.state.tasks_at(version.number)) == ["c", "a", "d"]
    delivered = deltas(adapter_of("a"))
    error = lacks(dense(store, version.number)["a"], delivered)
    assert error == pytest.approx(store.state.errors(version.number)["a"], abs=5e-4)
    assert verify(reading(store.storage), deep=True) == []


def test_interrupted_a_removal_across_revisions_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown("a", "b", "c", "a@2", "d")
    with crash_at_merge(monkeypatch, 3):
        store.remove("b", op_key="r", actor="me")
    again = opened(store.storage, "next", **LOSSY)
    version = again.remove("b", op_key="r", actor="me")
    assert version is not None
    assert version.number == 8  # of the three that are made again, two were made before
    assert list(again.state.tasks_at(8)) == ["c", "a@2", "d"]


# How it is stored


def test_an_older_release_stops_at_the_record_and_at_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", 2)
    store = grown("a", "b", "a@2")
    ops = [record.op for record in store._log.records()]
    assert ops == ["acquire", "merge", "merge", "merge-replacing"]
    assert b'"state_with_replaced":{' in store.storage.read(checkpoint_key(4))
    assert b'"state":{' in store.storage.read(checkpoint_key(2))
    monkeypatch.setattr(fold, "MAKES_VERSION", fold.MAKES_VERSION - {fold.MERGE_REPLACING})
    for key in store.storage.keys("checkpoints/"):
        store.storage.delete(key)
    with pytest.raises(Corrupt, match="operation 'merge-replacing' that this code does not know"):
        reading(store.storage)


def test_verify_finds_coefficients_that_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown("a", "b", "a@2")
    monkeypatch.setattr("subspace_store.files.version_tensors.without", lambda tasks, gone: tasks)
    found = [finding.what for finding in verify(reading(store.storage), deep=True)]
    assert any("has coefficients of task a, which the version does not hold" in what for what in found)


def test_a_replacement_reads_no_more_than_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    store = grown("a", "b", "c", "d", **ALWAYS)
    read = type(store.storage).view

    def counting(self: Any, key: str, start: int = 0, size: int | None = None) -> memoryview:
        reads.append(key)
        return read(self, key, start, size)

    monkeypatch.setattr(type(store.storage), "view", counting)
    coefficients = {task.coefficients.key for version in store.state.versions.values() for task in version.added}
    counts = []
    for group in ("e", "b@2"):
        reads.clear()
        revise(store, group)
        counts.append(len(reads))
        assert coefficients.isdisjoint(reads)
    assert counts[1] <= counts[0]


def test_a_request_says_what_a_revision_replaces() -> None:
    facts = {"task_id": "a@2", "name": "team/a", "key": "staging/k", "sha256": "0", "replaces": "a"}
    asked = Merge.model_validate_json(json.dumps({"adapters": [facts]}))
    assert asked.adapters == (StagedAdapter(**facts),)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Merge.model_validate_json(json.dumps({"adapters": [facts | {"replaces": 7}]}))
    store = grown("a", "b", "a@2")
    request = RestoreRevision(task_id="a", actor="me").named()
    assert request.op_key.startswith("restore-revision:")
    assert request.on(store).left == ("a@2",)
