"""Refining tasks: other coefficients in the same basis, for these tasks alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.errors import Conflict, InvalidInput, NotFound, Unavailable
from subspace_store import (
    CANDIDATE,
    MAIN,
    StagedAdapter,
    SubspaceStore,
    TaskScore,
    adapter_to_bytes,
    canonical_update,
)
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    SHAPES,
    FaultyStorage,
    crash_at_merge,
    deltas,
    fresh_storage,
    in_the_basis,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
)

SETTINGS = {"energy_ratio_min": 0.9, "rank_max": 9}
"""So that merging takes something from every task."""


def grown(*groups: str) -> SubspaceStore:
    """Each group of letters is merged as one version."""
    store = opened(fresh_storage(), **SETTINGS)
    for group in groups:
        merged(store, {letter: random_adapter(ord(letter)) for letter in group})
    return store


def bits(store: SubspaceStore, version: int, *tasks: str) -> list[Tensor]:
    reader = reading(store.storage)
    return [delta for task in tasks for delta in deltas(reader.adapter(task, version)).values()]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_a_refined_task_is_what_was_handed_over_and_no_other_task_moves_by_a_bit() -> None:
    store = grown("ab", "cd", "e")
    before, old_c = bits(store, 3, "a", "b", "d", "e"), bits(store, 3, "c")
    adapter = in_the_basis(store, 7, version=3)
    version = refined(store, {"c": adapter})
    assert (version.number, version.parent, store.state.refs[CANDIDATE]) == (4, 3, 4)
    assert identical(bits(store, 4, "a", "b", "d", "e"), before)
    for reader in (store, reading(store.storage)):
        served = reader.adapter("c", 4)
        assert relative_distance(deltas(served), deltas(adapter), deltas(adapter)) < 1e-6
        assert torch.equal(served.head["classifier.weight"], adapter.head["classifier.weight"])
        assert served.info == {"refined": "yes"}
    assert identical(bits(store, 3, "c"), old_c)  # the version before keeps what it was
    assert store.state.drift(4) == dict.fromkeys("abcde", 0.0)
    assert verify(store) == []


def test_its_version_writes_coefficients_and_the_adapter_and_nothing_of_the_basis() -> None:
    store = grown("ab", "c")
    keys = set(store.storage.keys("blobs/"))
    adapter = in_the_basis(store, 7, version=2)
    version = refined(store, {"c": adapter})
    new = set(store.storage.keys("blobs/")) - keys
    (entry,) = version.refined
    assert new == {entry.adapter.key, entry.coefficients.key}
    assert version.bytes_written == sum(len(store.storage.read(key)) for key in new)
    assert (version.basis, version.transport, version.added) == (store.state.versions[2].basis, None, ())
    assert entry.delivered_energy == pytest.approx(sum(u.energy for u in adapter.modules.values()))
    assert (entry.version, entry.error_at_birth < 1e-6) == (3, True)
    assert store.state.errors(3)["c"] == entry.error_at_birth
    assert store.ranks(3) == store.ranks(2)
    assert store.history()[-1].summary == "version 3: team/c"


def test_a_group_is_refined_in_one_version() -> None:
    store = grown("a", "bcd")
    adapters = {task: in_the_basis(store, ord(task), version=2) for task in "db"}
    untouched = bits(store, 2, "a", "c")
    version = refined(store, adapters)
    assert [task.task_id for task in version.refined] == ["d", "b"]
    assert list(store.state.tasks_at(3)) == ["a", "b", "c", "d"]  # each in its old place
    assert identical(bits(store, 3, "a", "c"), untouched)
    for task, adapter in adapters.items():
        assert relative_distance(deltas(store.adapter(task, 3)), deltas(adapter), deltas(adapter)) < 1e-6


def test_what_is_merged_later_finds_the_refined_coefficients() -> None:
    store = grown("ab")
    adapter = in_the_basis(store, 7, version=1)
    refined(store, {"b": adapter})
    for letter in "cdef":
        merged(store, {letter: random_adapter(ord(letter))})
    state = store.state
    bound = state.tasks_at(6)["b"].error_at_birth + state.drift_bound("b", 2, 6)
    moved = relative_distance(deltas(store.adapter("b", 6)), deltas(adapter), deltas(adapter))
    assert 0 < moved <= bound + 1e-6
    assert verify(reading(store.storage)) == []  # drifts of the writer's memory are those of the files
    again = opened(store.storage, writer="next", **SETTINGS)
    assert identical(bits(store, 6, *"abcdef"), [d for t in "abcdef" for d in deltas(again.adapter(t, 6)).values()])


def test_a_task_may_be_refined_again_and_after_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 2)
    monkeypatch.setitem(SETTINGS, "rank_max", 24)  # room for all: a basis that stays writes no transports
    store = grown("a", "b", "c", "d")
    assert any(version.snapshot for version in store.state.versions.values())
    for number, op_key in ((4, "once"), (5, "twice")):
        adapter = in_the_basis(store, number, version=number)
        version = refined(store, {"a": adapter}, op_key)
        assert relative_distance(deltas(store.adapter("a", version.number)), deltas(adapter), deltas(adapter)) < 1e-6
    merged(store, {"e": random_adapter(9)})
    merged(store, {"f": random_adapter(10)})
    assert any(version.snapshot for number, version in store.state.versions.items() if number > 6)
    assert verify(store) == []


def test_an_adapter_with_something_outside_the_basis_is_refused_with_how_much() -> None:
    store = grown("ab")
    inside = in_the_basis(store, 7, version=1)
    name, update = next(iter(inside.modules.items()))
    outside = replace(random_adapter(5).modules[name], sigma_R=torch.tensor([3e-4, 0, 0, 0]) * update.sigma_R[0])
    mixed = canonical_update(
        torch.cat([update.u_NR * update.sigma_R, outside.u_NR * outside.sigma_R], dim=1),
        torch.cat([update.v_DR, outside.v_DR], dim=1).T,
        1.0,
    )
    keys = store.storage.keys("blobs/")
    with pytest.raises(InvalidInput, match=r"task team/b \(b\): has [12]\.\de-04 of its norm outside .* version 1"):
        refined(store, {"b": replace(inside, modules={**inside.modules, name: mixed})})
    with pytest.raises(InvalidInput, match=r"(?s)task team/b \(b\).*layer.9, which version 1 has no basis for"):
        refined(store, {"b": replace(inside, modules={**inside.modules, "layer.9": update})})
    assert (store.storage.keys("blobs/"), store.state.refs[CANDIDATE]) == (keys, 1)


def test_only_a_task_that_the_candidate_holds_is_refined_and_each_once() -> None:
    store = grown("ab", "c")
    store.rollback(0, op_key="r", actor="me")
    adapter = in_the_basis(store, 7, version=1)
    with pytest.raises(NotFound, match="version 0 does not hold it"):
        refined(store, {"a": adapter})
    store = grown("a")
    ref = store.stage("staging/a/1/adapter.safetensors", adapter)
    with pytest.raises(InvalidInput, match="named twice"):
        store.refine(
            [StagedAdapter(task_id="a", name="team/a", key=ref.key, sha256=ref.sha256)] * 2, op_key="k", actor="test"
        )
    store.quarantine("a", "its data is wrong", actor="ann")
    with pytest.raises(InvalidInput, match="its data is wrong"):
        refined(store, {"a": in_the_basis(store, 7, version=1)})


def test_the_same_request_again_is_the_same_version() -> None:
    store = grown("ab")
    adapter = in_the_basis(store, 7, version=1)
    first = refined(store, {"b": adapter}, "k")
    keys = store.storage.keys("blobs/") + store.storage.keys("log/0")
    assert refined(store, {"b": adapter}, "k") == first
    assert store.storage.keys("blobs/") + store.storage.keys("log/0") == keys
    assert refined(opened(store.storage, writer="successor", **SETTINGS), {"b": adapter}, "k") == first


def test_a_fenced_writer_refines_nothing() -> None:
    store = grown("ab")
    adapter = in_the_basis(store, 7, version=1)
    newer = opened(store.storage, writer="newer", **SETTINGS)
    with pytest.raises(Conflict, match="newer"):
        refined(store, {"b": adapter})
    assert newer.refresh().refs[CANDIDATE] == 1
    assert refined(newer, {"b": adapter}).number == 2


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_writer_that_dies_between_its_files_and_its_record_leaves_a_store_that_goes_on(fault: str) -> None:
    inner = grown("ab").storage
    faults: list[str] = []
    store = opened(
        FaultyStorage(inner, lambda key: faults[0] if faults and key.startswith("log/") else None), **SETTINGS
    )
    store._log._wait = lambda seconds: None
    adapter, old = in_the_basis(store, 7, version=1), bits(store, 1, "a")
    faults.append(fault)
    if fault == "before":
        with pytest.raises(Unavailable, match="the outcome of refine is unknown"):
            refined(store, {"b": adapter})
    else:  # it was written, only the answer was lost
        assert refined(store, {"b": adapter}).number == 2
    again = opened(inner, writer="next", **SETTINGS)
    assert again.state.refs[CANDIDATE] == (1 if fault == "before" else 2)
    assert refined(again, {"b": adapter}).number == 2
    assert identical(bits(again, 2, "a"), old)
    assert verify(again) == []
    again.collect()
    assert again.collect().blobs == ()
    assert verify(again) == []


def test_a_rollback_to_before_serves_what_was_before_and_forward_the_refined() -> None:
    store = grown("ab")
    store.publish(1, op_key="p1", actor="gate")
    adapter, old = in_the_basis(store, 7, version=1), bits(store, 1, "b")
    refined(store, {"b": adapter})
    store.publish(2, op_key="p2", actor="gate")
    preview = store.rollback(1, op_key="r1", actor="me")
    assert (preview.vanishing, preview.returning) == ((), ())
    assert identical([*deltas(store.adapter("b")).values()], old)
    store.rollback(2, op_key="r2", actor="me")
    assert relative_distance(deltas(store.adapter("b")), deltas(adapter), deltas(adapter)) < 1e-6
    assert store.state.refs == {CANDIDATE: 2, MAIN: 2}


def test_removing_another_task_merges_the_refined_adapter_again() -> None:
    store = grown("ab", "c")
    adapter = in_the_basis(store, 7, version=2)
    refined(store, {"b": adapter})
    merged(store, {"d": random_adapter(ord("d"))})
    assert adapter_to_bytes(store.delivered("b")) == adapter_to_bytes(adapter)
    version = store.remove("c", op_key="r", actor="me")
    assert version is not None
    # b was refined after c came, in a basis that c had a part in: so everything from b's birth on is made again.
    assert [(v.remakes, [t.task_id for t in v.added]) for v in store.state.lineage(version.number)] == [
        (1, ["a", "b"]),
        (4, ["d"]),
    ]
    assert store.state.tasks_at(version.number)["b"].adapter == store.state.versions[3].refined[0].adapter
    expected = opened(fresh_storage(), **SETTINGS)
    merged(expected, {"a": random_adapter(ord("a")), "b": adapter})
    merged(expected, {"d": random_adapter(ord("d"))})
    assert identical(bits(store, version.number, *"abd"), bits(expected, 2, *"abd"))
    assert verify(store) == []


def test_removing_a_task_that_came_after_a_refinement_leaves_the_refinement_as_it_is() -> None:
    store = grown("ab")
    refined(store, {"b": in_the_basis(store, 7, version=1)})
    merged(store, {"c": random_adapter(1)})
    merged(store, {"d": random_adapter(2)})
    old = bits(store, 2, "a", "b")
    version = store.remove("c", op_key="r", actor="me")
    assert version is not None
    assert [v.number for v in store.state.lineage(version.number)] == [1, 2, 5]
    assert identical(bits(store, 2, "a", "b"), old)
    removed = store.remove("b", op_key="r2", actor="me")  # the refined one itself
    assert removed is not None
    assert list(store.state.tasks_at(removed.number)) == ["a", "d"]
    assert verify(store) == []


def test_an_expired_refinement_is_not_lost_when_a_later_task_is_removed() -> None:
    store = grown("ab")
    adapter = in_the_basis(store, 7, version=1)
    refined(store, {"b": adapter})
    merged(store, {"c": random_adapter(1)})
    store = opened(store.storage, writer="next", **SETTINGS)
    store.expire([2], actor="me")  # version 1, which has b unrefined, is alive
    store.collect()
    assert verify(store) == []
    store.remove("c", op_key="r", actor="me")
    now = store.state.refs[CANDIDATE]
    assert list(store.state.tasks_at(now)) == ["a", "b"]
    lost = relative_distance(deltas(store.adapter("b", now)), deltas(adapter), deltas(adapter))
    assert lost == pytest.approx(store.state.tasks_at(now)["b"].error_at_birth, abs=1e-5)
    assert verify(store) == []


def test_collecting_keeps_what_a_refined_version_reads_of_its_expired_parent() -> None:
    store = grown("ab", "c")
    adapter = in_the_basis(store, 7, version=2)
    refined(store, {"c": adapter})
    store = opened(store.storage, writer="next", **SETTINGS)
    store.expire([1, 2], actor="me")
    before = bits(store, 3, *"abc")
    dead = store.collect().blobs
    assert store.state.versions[2].added[0].coefficients.key not in dead  # the way to version 3 leads through it
    assert store.state.versions[3].basis.key not in dead
    assert identical(bits(store, 3, *"abc"), before)
    assert verify(store) == []
    store.publish(3, op_key="p", actor="gate")
    store.drop_adapters(["c"], actor="me")
    assert identical(bits(store, 3, *"abc"), before)
    with pytest.raises(NotFound, match="was let go"):
        store.delivered("c")


def test_a_task_is_born_in_the_version_that_was_the_first_to_be_judged_however_often_it_is_refined() -> None:
    store = grown("a", "bc")
    refined(store, {"b": in_the_basis(store, 7, version=2)})
    assert store.state.births(3) == {"a": 1, "b": 3, "c": 3}  # c came in version 2, which nobody scored
    store.record_scores(3, [TaskScore(task_id=task, score=0.5, count=10) for task in "abc"], op_key="s", actor="gate")
    refined(store, {"c": in_the_basis(store, 8, version=3)}, "later")
    assert store.state.births(4) == {"a": 1, "b": 3, "c": 3}


def test_shapes_of_a_module_stay_those_of_the_parent_for_a_task_that_adapts_fewer() -> None:
    store = grown("ab")
    adapter = in_the_basis(store, 7, version=1)
    name = "layer.0.query"
    refined(store, {"b": replace(adapter, modules={name: adapter.modules[name]})})
    assert list(store.adapter("b", 2).modules) == [name]
    merged(store, {"c": random_adapter(3)})
    assert list(store.adapter("b", 3).modules) == [name]
    assert set(store.ranks(3)) == set(SHAPES)
    assert verify(store) == []


@pytest.mark.parametrize("task", ["d", "a"])  # younger than the removed task, and older
def test_a_removal_that_was_interrupted_before_a_refinement_does_not_lose_it(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = grown("ab", "c", "d", "e")
    with crash_at_merge(monkeypatch, 2):
        store.remove("c", op_key="r", actor="me")
    assert store.state.versions[5].remakes == 3  # d, as it was delivered
    adapter = in_the_basis(store, 7, version=4)
    refined(store, {task: adapter})
    version = store.remove("c", op_key="r", actor="me")
    assert version is not None
    held = store.state.tasks_at(version.number)
    assert sorted(held) == ["a", "b", "d", "e"]
    lost = relative_distance(deltas(store.adapter(task, version.number)), deltas(adapter), deltas(adapter))
    state = store.state
    assert lost <= held[task].error_at_birth + state.drift_bound(task, held[task].version, version.number) + 1e-5
    assert verify(store) == []
