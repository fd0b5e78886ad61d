"""Compaction: all tasks merged at once, in fewer numbers, with no promise broken and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from configs.errors import Conflict, InvalidInput
from subspace_store import Adapter, SubspaceStore
from subspace_store.adapter import SIZED
from subspace_store.log.version import CANDIDATE, MAIN
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    crash_at_merge,
    deltas,
    merged,
    opened,
    random_adapter,
    reading,
    relative_distance,
)

SHAPES = {"layer.0.query": (96, 80), "layer.0.value": (64, 80)}
PAYS: dict[str, Any] = {"share": "if-it-pays", "energy_ratio_min": 0.98, "seed_directions": 4}
SIDES = sum(sum(shape) for shape in SHAPES.values())


def filled(adapters: Mapping[str, Adapter]) -> SubspaceStore:
    """A store into which the adapters were merged one by one, each published."""
    store = opened(**PAYS)
    for task, adapter in adapters.items():
        version = merged(store, {task: adapter}).number
        store.publish(version, op_key=f"publish {version}", actor="test")
    return store


def equals(count: int) -> dict[str, Adapter]:
    """One task that nobody else resembles, and after it the same adapter under several names."""
    return {"other": random_adapter(1, shapes=SHAPES)} | {
        f"same-{number}": random_adapter(2, shapes=SHAPES) for number in range(count)
    }


def test_tasks_that_came_one_by_one_and_are_equal_are_stored_once() -> None:
    store = filled(equals(6))
    before = store.footprint(7)
    preview = store.preview_compact()
    version = store.compact(op_key="c", actor="test")
    after = store.footprint(version.number)
    assert (preview.version, preview.tasks) == (7, 7)
    assert (preview.numbers_before, preview.numbers_after) == (before.total_numbers, after.total_numbers)
    # Both kinds in the basis, or one of them in it and the other private: eight directions and small coefficients.
    assert after.total_numbers <= 8 * SIDES + 7 * 2 * len(SHAPES) * 8 * 4 < 0.5 * before.total_numbers
    assert set(store.state.tasks_at(version.number)) == set(equals(6))
    for task, adapter in equals(6).items():
        whole, held = deltas(adapter), deltas(store.adapter(task, version.number))
        for name in whole:
            assert float(held[name].square().sum() / whole[name].square().sum()) >= 0.98 - 1e-6
        error = store.state.errors(version.number)[task]
        assert relative_distance(held, whole, whole) == pytest.approx(error, abs=1e-6)
    assert verify(store, deep=True) == []


def test_tasks_that_have_nothing_in_common_take_no_more_than_before() -> None:
    adapters = {f"t{number}": random_adapter(number, shapes=SHAPES) for number in range(10)}
    store = filled(adapters)
    before = store.footprint(10).total_numbers
    version = store.compact(op_key="c", actor="test")
    assert store.footprint(version.number).total_numbers <= before + 2 * len(SHAPES) * 4 * 4  # coefficients of one
    assert set(store.ranks(version.number).values()) == {(4, 4)}  # the first task's


def test_no_task_moves_and_none_forgets_what_it_was_promised() -> None:
    adapters = {f"t{number}": random_adapter(number, shapes=SHAPES) for number in range(5)}
    adapters["t1"] = replace(adapters["t1"], info={SIZED: "score"})
    store = filled(adapters)
    store.drop_adapters(["t2", "t3"], op_key="d", actor="test")
    before, errors = {task: deltas(store.adapter(task, 5)) for task in adapters}, store.state.errors(5)
    store = opened(store.storage, **PAYS | {"energy_ratio_min": 0.5})  # of what will be merged from now on
    for key in ("c", "again"):
        version = store.compact(op_key=key, actor="test")
        assert version.approximate == ()
        assert store.state.errors(version.number) == pytest.approx(errors)
        for task in adapters:
            now = deltas(store.adapter(task, version.number))
            assert relative_distance(now, before[task], before[task]) < 1e-6
    merged(store, {"later": random_adapter(9, shapes=SHAPES)})
    for task in adapters:
        now = deltas(store.adapter(task, store.state.refs[CANDIDATE]))
        assert relative_distance(now, before[task], before[task]) < 1e-6
    assert verify(store, deep=True) == []


def test_it_is_the_candidate_and_main_follows_if_asked_and_a_rollback_goes_back() -> None:
    store = filled(equals(3))
    version = store.compact(op_key="c", actor="test", publish=True)
    assert (version.parent, version.remakes, version.number) == (0, 4, 5)
    assert store.state.refs == {CANDIDATE: 5, MAIN: 5}
    assert store.state.compacted == (1, 2, 3, 4)
    assert [v.number for v in store.state.history(5)] == [1, 2, 3, 4, 5]
    assert store.state.births(5) == {"other": 1, "same-0": 2, "same-1": 3, "same-2": 4}
    later = merged(store, {"new": random_adapter(9, shapes=SHAPES)})
    assert later.parent == 5
    store.reject(later.number, "the gate", op_key="r", actor="test")
    store.rollback(4, op_key="back", actor="test")
    assert store.state.refs == {CANDIDATE: 4, MAIN: 4}
    assert reading(store.storage).history()[-1].op == "rollback"
    assert [entry.summary for entry in store.history() if entry.op == "compact"] == ["version 4 → 5: all tasks at once"]


def test_the_same_request_again_answers_with_its_version_and_another_under_its_key_is_refused() -> None:
    store = filled(equals(3))
    version = store.compact(op_key="c", actor="test")
    assert store.compact(op_key="c", actor="test").number == version.number
    assert max(store.state.versions) == version.number
    with pytest.raises(Conflict, match="another request"):
        store.compact(op_key="c", actor="test", publish=True)


def test_interrupted_before_its_record_it_goes_on_from_the_version_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = filled(equals(3))
    with crash_at_merge(monkeypatch, 1):
        store.compact(op_key="c", actor="test")
    commit = store._log.commit

    class Crash(BaseException):
        """No code of ours catches it."""

    def failing(op: str, **named: object) -> object:
        if op == "compact":
            raise Crash
        return commit(op, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(store._log, "commit", failing)
    with pytest.raises(Crash):
        store.compact(op_key="c", actor="test")
    monkeypatch.undo()
    other = opened(store.storage, "other", **PAYS)
    assert (max(other.state.versions), other.state.refs[CANDIDATE]) == (5, 4)
    assert other.compact(op_key="c", actor="test").number == 5
    assert other.state.refs[CANDIDATE] == 5


def test_a_task_that_is_removed_afterwards_leaves_the_others_as_they_were() -> None:
    store = filled(equals(3))
    store.compact(op_key="c", actor="test", publish=True)
    version = store.remove("same-1", op_key="r", actor="test")
    assert version is not None
    assert store.state.births(version.number) == {"other": 1, "same-0": 2, "same-2": 4}
    assert verify(store, deep=True) == []


def test_main_does_not_move_past_a_hold_or_to_what_no_gate_has_judged_and_nothing_is_no_subspace() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        opened(**PAYS).compact(op_key="c", actor="test")
    store = filled(equals(2))
    merged(store, {"new": random_adapter(9, shapes=SHAPES)})
    with pytest.raises(Conflict):
        store.compact(op_key="c1", actor="test", publish=True)
    store.reject(4, "the gate", op_key="r", actor="test")
    store.hold("people look at it", op_key="h", actor="test")
    with pytest.raises(Conflict, match="held"):
        store.compact(op_key="c2", actor="test", publish=True)
    assert max(store.state.versions) == 4


@pytest.mark.parametrize("settings", [{"rank_fixed": 4}, {"variant": "paper"}, {"beyond_rank_max": "drop"}])
def test_under_settings_that_take_from_tasks_nothing_is_compacted(settings: dict[str, Any]) -> None:
    store = opened(filled(equals(2)).storage, **PAYS | settings)
    for act in (store.preview_compact, lambda: store.compact(op_key="c", actor="test")):
        with pytest.raises(InvalidInput, match="takes nothing from any task"):
            act()
    assert max(store.state.versions) == 3
