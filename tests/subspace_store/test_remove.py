"""Removing a task: the versions above it are as if it had never been there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.errors import Conflict, NotFound
from subspace_store import CANDIDATE, MAIN, Adapter, SubspaceStore
from subspace_store.adapter import SIZED
from subspace_store.log.removal import remakes
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    SHAPES,
    crash_at_merge,
    deltas,
    fresh_storage,
    merged,
    opened,
    random_adapter,
    reading,
)

SETTINGS = {"energy_ratio_min": 0.9, "rank_max": 9}


def grown(*groups: str, writer: str = "writer") -> SubspaceStore:
    """Each group of letters is merged as one version; a letter's adapter is always the same."""
    store = opened(fresh_storage(), writer=writer, **SETTINGS)
    for group in groups:
        merged(store, {letter: adapter_of(letter) for letter in group})
    return store


def adapter_of(letter: str) -> Adapter:
    return random_adapter(ord(letter), rank=2 + ord(letter) % 3)


def same(one: SubspaceStore, other: SubspaceStore) -> None:
    """Bit for bit: bases and every task."""
    mine, theirs = (store.state.refs[CANDIDATE] for store in (one, other))
    assert list(one.state.tasks_at(mine)) == list(other.state.tasks_at(theirs))
    for name, basis in one.basis(mine).items():
        assert torch.equal(basis.p_NK, other.basis(theirs)[name].p_NK)
        assert torch.equal(basis.lam_in_K, other.basis(theirs)[name].lam_in_K)
    for task in one.state.tasks_at(mine):
        for name, update in deltas(one.adapter(task, mine)).items():
            assert torch.equal(update, deltas(other.adapter(task, theirs))[name])


@pytest.mark.parametrize(
    ("groups", "gone", "rest"),
    [
        (("a", "b", "c", "d"), "b", ("a", "c", "d")),
        (("a", "b", "c"), "a", ("b", "c")),
        (("a", "b", "c"), "c", ("a", "b")),
        (("ab", "cde", "f"), "d", ("ab", "ce", "f")),
    ],
)
def test_what_remains_is_as_if_the_task_had_never_been_there(
    groups: tuple[str, ...], gone: str, rest: tuple[str, ...]
) -> None:
    store = grown(*groups)
    store.remove(gone, op_key="r", actor="me")
    same(store, grown(*rest))
    assert verify(store, deep=True) == []


@pytest.mark.parametrize("gone", ["a", "b", "d", "e"])
def test_what_is_told_before_is_what_is_made(gone: str) -> None:
    store = grown("a", "b", "cd", "e")
    before = store.state
    told = [remake.version.number for remake in remakes(before, gone, 4)]
    done = store.remove(gone, op_key="r", actor="me", publish=False)
    made = [version for version in store.state.versions.values() if version.number > 4]
    assert [version.remakes for version in made] == told
    line = {v.number for v in store.state.lineage(done.number if done else 0)}
    assert set(store.state.replaced) == {v.number for v in before.lineage(4)} - line
    assert set(store.state.replaced.values()) <= {done.number if done else 0}
    assert reading(store.storage, **SETTINGS).state == store.state


@pytest.mark.parametrize("gone", ["a", "b", "d", "e"])
@pytest.mark.parametrize("changes", [{}, {"share": "if-it-pays"}, {"rank_max": 4}], ids=str)
def test_the_numbers_that_are_told_before_are_those_that_it_takes(gone: str, changes: dict[str, Any]) -> None:
    store = opened(fresh_storage(), **SETTINGS | changes)
    for group in ("a", "b", "cd", "e"):
        merged(store, {letter: adapter_of(letter) for letter in group})
    old = store.footprint(4).total_numbers
    told = store.preview_remove(gone)
    assert store.state.refs[CANDIDATE] == 4
    store.remove(gone, op_key="r", actor="me")
    new = store.footprint(store.state.refs[CANDIDATE]).total_numbers
    assert (told.numbers_before, told.numbers_after) == (old, new)
    assert told.versions == {"a": (2, 3, 4), "b": (3, 4), "d": (3, 4), "e": ()}[gone]
    assert told.start == {"a": 0, "b": 1, "d": 2, "e": 3}[gone]


def test_a_task_that_was_sized_is_counted_as_it_will_be_merged_again() -> None:
    store = opened(fresh_storage(), **SETTINGS)
    merged(store, {"a": adapter_of("a")})
    merged(store, {"b": replace(adapter_of("b"), info={SIZED: "held"})})
    merged(store, {"c": adapter_of("c")})
    told = store.preview_remove("a")
    store.remove("a", op_key="r", actor="me")
    assert told.numbers_after == store.footprint(store.state.refs[CANDIDATE]).total_numbers


def test_only_a_task_that_the_candidate_holds_can_be_previewed() -> None:
    with pytest.raises(NotFound):
        grown("a").preview_remove("z")


@pytest.mark.parametrize(("dead", "begins_after"), [([2], 1), ([1, 2], 0)])
def test_it_begins_after_a_version_that_is_alive(dead: list[int], begins_after: int) -> None:
    store = opened(grown("a", "b", "c", "d").storage, writer="successor", **SETTINGS)
    store.expire(dead, actor="me")
    store.collect()
    version = store.remove("c", op_key="r", actor="me")
    assert version is not None
    assert store.state.lineage(version.number)[begins_after].remakes == begins_after + 1
    same(store, grown("a", "b", "d"))
    assert verify(store) == []
    assert store.collect().blobs == ()


def test_the_lineage_says_what_was_made_again_and_the_old_versions_stay_readable() -> None:
    store = grown("a", "b", "c", "d")
    old = deltas(store.adapter("b", 4))
    version = store.remove("b", op_key="r", actor="me", reason="licence")
    assert version is not None
    assert [(v.number, v.parent, v.remakes, v.removed) for v in store.state.lineage(version.number)] == [
        (1, 0, None, ()),
        (5, 1, 3, ("b",)),
        (6, 5, 4, ("b",)),
    ]
    assert store.state.refs == {CANDIDATE: 6, MAIN: 0}
    assert all(torch.equal(old[name], update) for name, update in deltas(store.adapter("b", 4)).items())
    assert store.history()[-1].summary == "team/b: version 4 → 6: licence"
    store.remove("c", op_key="r2", actor="me")
    assert store.state.versions[store.state.refs[CANDIDATE]].removed == ("b", "c")
    assert list(store.state.tasks_at(store.state.refs[CANDIDATE])) == ["a", "d"]


def test_the_last_task_leaves_the_empty_subspace() -> None:
    store = grown("a")
    assert store.remove("a", op_key="r", actor="me") is None
    assert store.state.refs[CANDIDATE] == 0
    merged(store, {"a": adapter_of("a")}, op_key="again")
    assert list(store.state.tasks_at(2)) == ["a"]


def test_asked_twice_it_is_done_once_and_interrupted_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown("a", "b", "c", "d", "e")
    with crash_at_merge(monkeypatch, 2):
        store.remove("b", op_key="r", actor="me")
    assert store.state.refs[CANDIDATE] == 5
    again = opened(store.storage, writer="next", **SETTINGS)
    version = again.remove("b", op_key="r", actor="me")
    assert version is not None
    assert again.remove("b", op_key="r", actor="me") == version
    assert version.number == 8  # one of the three was made before the crash
    same(again, grown("a", "c", "d", "e"))


def test_publishing_moves_main_in_the_same_record_unless_it_is_held() -> None:
    store = grown("a", "b")
    store.publish(2, op_key="p", actor="me")
    store.hold("audit", actor="boss")
    with pytest.raises(Conflict, match="audit"):
        store.remove("a", op_key="r", actor="me", publish=True)
    store.release(actor="boss")
    store.remove("a", op_key="r", actor="me", publish=True)
    assert store.state.refs == {CANDIDATE: 3, MAIN: 3}
    assert store.preview_rollback(2).returning[0].task_id == "a"


def test_what_no_gate_has_judged_is_not_published_along() -> None:
    store = grown("a", "b")
    store.publish(2, op_key="p", actor="me")
    merged(store, {"c": adapter_of("c")})
    for gone in "ac":
        with pytest.raises(Conflict, match="version 3, the candidate, is not judged yet"):
            store.remove(gone, op_key="r", actor="me", publish=True)
    assert (store.state.refs, len(store.state.versions)) == ({CANDIDATE: 3, MAIN: 2}, 3)
    store.reject(3, "forgot", op_key="j", actor="gate")
    version = store.remove("a", op_key="r", actor="me", publish=True)
    assert version is not None
    assert store.remove("a", op_key="r", actor="me", publish=True) == version
    assert list(store.state.tasks_at(store.state.refs[MAIN])) == ["b"]


def test_a_task_that_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound, match="holds no task z"):
        grown("a").remove("z", op_key="r", actor="me")


def test_other_modules_of_the_removed_task_close_again() -> None:
    store = grown("a")
    wide = random_adapter(5, shapes={**SHAPES, "layer.1.query": (12, 8)})
    merged(store, {"w": wide})
    merged(store, {"b": adapter_of("b")})
    assert set(store.ranks(3)) == {*SHAPES, "layer.1.query"}
    store.remove("w", op_key="r", actor="me")
    assert set(store.ranks(4)) == set(SHAPES)
    same(store, grown("a", "b"))


@pytest.mark.parametrize("gone", ["c", "b"])  # the newest task, for which nothing is made again, and an older one
def test_the_log_tells_a_task_that_was_removed_from_one_that_was_rolled_back(gone: str) -> None:
    store = grown("a", "b", "c")
    store.publish(3, op_key="p", actor="me")
    assert (store.lost_by(gone), store.lost_by("z")) == (None, None)
    store.remove(gone, op_key="r", actor="ann", reason="licence", publish=True)
    merged(store, {"d": adapter_of("d")})
    store.publish(store.state.refs[CANDIDATE], op_key="p2", actor="me")
    lost = store.lost_by(gone)
    assert lost is not None
    assert (lost.op, lost.actor, lost.summary.endswith(": licence")) == ("remove", "ann", True)
    store.rollback(3, op_key="back", actor="me")
    assert store.lost_by(gone) is None
    store.rollback(0, op_key="further", actor="me")
    assert [getattr(store.lost_by(task), "op", None) for task in "abcd"] == ["rollback"] * 4
