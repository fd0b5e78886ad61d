"""Any sequence of operations on a store, as hypothesis thinks it up, against a model of a few dictionaries."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from configs.errors import Conflict, InvalidInput, OnebasisError
from subspace_store import CANDIDATE, MAIN, Adapter, SubspaceStore
from subspace_store.log.retention import named_by
from tests.subspace_store.builders import (
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

SHAPES = {"a": (6, 5), "b": (4, 5)}
RANK_MAX = 4
"""Binds: later merges move earlier tasks, but never one that stands in a version."""
ADAPTERS = [random_adapter(i, 1 + i % 3, {name: SHAPES[name] for name in "ab"[: 1 + i % 2]}) for i in range(6)]
TASK = st.sampled_from(ADAPTERS)
CHOICE = st.integers(0, 999)
"""Which of those that there are."""

Tasks = dict[str, dict[str, Tensor]]


def held(store: SubspaceStore, number: int) -> Tasks:
    """Every task of a version: dense updates per module."""
    return {task: deltas(store.adapter(task, number)) for task in store.state.tasks_at(number)}


def name_of(task: str) -> str:
    """What all revisions of a task have in common."""
    return task.partition("@")[0]


class StoreMachine(RuleBasedStateMachine):
    """The model: what each version was when it was new, and the names."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = fresh_storage()
        self.store = opened(self.storage, rank_max=RANK_MAX)
        self.epoch = 1
        self.tasks = 0
        """Ever merged; they are named in order."""
        self.versions: dict[int, Tasks] = {0: {}}
        self.parents: dict[int, int] = {}
        self.refs = {CANDIDATE: 0, MAIN: 0}
        self.published = {0}
        self.rejected: set[int] = set()
        self.tags: dict[str, int] = {}
        self.pins: set[int] = set()
        self.expired: set[int] = set()
        self.held = False

    # Rules

    @rule(adapters=st.lists(TASK, min_size=1, max_size=3))
    def merge(self, adapters: list[Adapter]) -> None:
        names = [f"t{self.tasks + i}" for i in range(len(adapters))]
        self.tasks += len(adapters)
        version = merged(self.store, dict(zip(names, adapters, strict=True)))
        assert version.number == max(self.versions) + 1
        assert version.parent == self.refs[CANDIDATE]
        self.versions[version.number] = held(self.store, version.number)
        assert list(self.versions[version.number]) == [*self.versions[version.parent], *names]
        self.refs[CANDIDATE] = version.number
        # Asked again, it is the same version.
        again = merged(self.store, dict(zip(names, adapters, strict=True)))
        assert again == version

    @precondition(lambda self: self.versions[self.refs[CANDIDATE]])
    @rule(choice=CHOICE, adapter=TASK, other=st.none() | TASK)
    def revise(self, choice: int, adapter: Adapter, other: Adapter | None) -> None:
        before = self.versions[self.refs[CANDIDATE]]
        old = list(before)[choice % len(before)]
        new = {f"{name_of(old)}@{self.tasks}": adapter} | ({f"t{self.tasks}": other} if other else {})
        self.tasks += 1
        replaces = {next(iter(new)): old}
        version = merged(self.store, new, replaces=replaces)
        assert version == merged(self.store, new, replaces=replaces)
        self.versions[version.number] = held(self.store, version.number)
        self.refs[CANDIDATE] = version.number
        assert list(self.versions[version.number]) == [*(task for task in before if task != old), *new]

    @precondition(lambda self: self.earlier_revisions())
    @rule(choice=CHOICE, publish=st.booleans())
    def restore(self, choice: int, publish: bool) -> None:
        before, asked = self.versions[self.refs[CANDIDATE]], self.asked()
        task = self.earlier_revisions()[choice % len(self.earlier_revisions())]
        if publish and (self.held or self.refs[CANDIDATE] != self.refs[MAIN]):
            self.refused(lambda: self.store.restore_revision(task, publish=True, **asked))
            return
        error = self.store.preview_restore(task).error
        version = self.store.restore_revision(task, publish=publish, **asked)
        assert version == self.store.restore_revision(task, publish=publish, **asked)
        after = held(self.store, version.number)
        assert list(after) == [*(one for one in before if name_of(one) != name_of(task)), task]
        assert all(torch.equal(d, before[one][n]) for one in after if one != task for n, d in after[one].items())
        assert abs(version.added[0].error_at_birth - error) < 1e-6
        self.versions[version.number] = after
        self.refs = {CANDIDATE: version.number, MAIN: version.number if publish else self.refs[MAIN]}
        self.published |= {self.refs[MAIN]}

    @precondition(lambda self: self.versions[self.refs[CANDIDATE]])
    @rule(choice=CHOICE)
    def refine(self, choice: int) -> None:
        parent = self.refs[CANDIDATE]
        before = self.versions[parent]
        task = list(before)[choice % len(before)]
        adapter = in_the_basis(self.store, choice, parent, rank=1 + choice % 3)
        op_key = f"refine after {self.store.state.seq} of {self.epoch}"
        version = refined(self.store, {task: adapter}, op_key)
        assert version == refined(self.store, {task: adapter}, op_key)
        self.versions[version.number] = held(self.store, version.number)
        self.refs[CANDIDATE] = version.number
        assert list(self.versions[version.number]) == list(before)
        for other, updates in self.versions[version.number].items():
            if other == task:
                assert relative_distance(updates, deltas(adapter), deltas(adapter)) < 1e-6
            else:
                assert all(torch.equal(delta, before[other][name]) for name, delta in updates.items())

    @rule()
    def publish(self) -> None:
        number = self.refs[CANDIDATE]
        if self.held:
            with pytest.raises(Conflict, match="held"):
                self.store.publish(number, **self.asked())
        else:
            self.store.publish(number, **self.asked())
            self.published.add(number)
            self.refs[MAIN] = number

    @precondition(lambda self: self.refs[CANDIDATE] != self.refs[MAIN])
    @rule()
    def reject(self) -> None:
        number = self.refs[CANDIDATE]
        self.store.reject(number, "worse", **self.asked())
        self.rejected.add(number)
        self.refs[CANDIDATE] = self.refs[MAIN]

    @rule(choice=CHOICE, hold=st.booleans())
    def roll_back(self, choice: int, hold: bool) -> None:
        number = self.any_version(choice)
        if number in self.published - self.rejected - self.expired:
            preview = self.store.rollback(number, hold=hold, **self.asked())
            before, after = {*self.versions[self.refs[MAIN]]}, {*self.versions[number]}
            assert {task.task_id for task in preview.vanishing} == before - after
            assert {task.task_id for task in preview.returning} == after - before
            self.refs = {CANDIDATE: number, MAIN: number}
            self.held |= hold
        else:
            self.refused(lambda: self.store.rollback(number, **self.asked()))

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.store.release(**self.asked())
        self.held = False

    @rule(choice=CHOICE, name=st.sampled_from(["gold", "silver"]))
    def tag(self, choice: int, name: str) -> None:
        number = self.any_version(choice)
        if number not in self.expired | self.rejected and self.tags.get(name, number) == number:
            self.store.tag(name, number, **self.asked())
            self.tags[name] = number
        else:
            self.refused(lambda: self.store.tag(name, number, **self.asked()))

    @rule(choice=CHOICE)
    def pin(self, choice: int) -> None:
        number = self.any_version(choice)
        if number in self.expired:
            self.refused(lambda: self.store.pin(number, "ann", **self.asked()))
        else:
            self.store.pin(number, "ann", **self.asked())
            self.pins.add(number)

    @precondition(lambda self: self.pins)
    @rule(choice=CHOICE)
    def unpin(self, choice: int) -> None:
        number = sorted(self.pins)[choice % len(self.pins)]
        self.store.unpin(number, "ann", **self.asked())
        self.pins.discard(number)

    @rule(choice=CHOICE)
    def expire(self, choice: int) -> None:
        number = self.any_version(choice)
        named = {*self.refs.values(), *self.tags.values(), *self.pins, 0}
        assert (number in named) == bool(number == 0 or named_by(self.store.state, number, now=0))
        if number in named:
            self.refused(lambda: self.store.expire([number], **self.asked()))
        else:
            self.store.expire([number], **self.asked())
            self.expired.add(number)

    @precondition(lambda self: self.versions[self.refs[CANDIDATE]])
    @rule(choice=CHOICE, publish=st.booleans())
    def remove(self, choice: int, publish: bool) -> None:
        before = self.versions[self.refs[CANDIDATE]]
        gone = list(before)[choice % len(before)]
        if publish and (self.held or self.refs[CANDIDATE] != self.refs[MAIN]):
            self.refused(lambda: self.store.remove(gone, publish=True, **self.asked()))
            return
        asked = self.asked()
        version = self.store.remove(gone, publish=publish, **asked)
        assert version == self.store.remove(gone, publish=publish, **asked)
        for number in self.store.state.versions.keys() - self.versions.keys():
            self.versions[number] = held(self.store, number)  # on the way there, a version for each that was remade
            assert name_of(gone) not in map(name_of, self.versions[number])
        number = version.number if version else 0
        assert self.versions[number].keys() == before.keys() - {gone}
        self.refs[CANDIDATE] = number
        if publish:
            self.refs[MAIN] = number
            self.published.add(number)

    @precondition(lambda self: self.versions[self.refs[MAIN]])
    @rule(choice=CHOICE)
    def drop_adapters(self, choice: int) -> None:
        tasks = list(self.versions[self.refs[MAIN]])
        gone = tasks[choice % len(tasks)]
        try:
            self.store.drop_adapters([gone], **self.asked())
        except Conflict:
            # It was removed and merged again, and that version is not published yet.
            assert any(gone in self.versions[number] for number in self.versions.keys() - self.published)

    @rule()
    def collect(self) -> None:
        found = self.store.collect(uploads_in_use=tuple)
        assert found.deleted
        assert not self.storage.keys("staging/")

    @rule()
    def reopen(self) -> None:
        """Another process writes from now on."""
        self.store = opened(self.storage, f"writer {self.epoch + 1}", rank_max=RANK_MAX)
        self.epoch += 1

    # What always holds

    @invariant()
    def names_are_those_of_the_model(self) -> None:
        state = self.store.state
        assert state.epoch == self.epoch
        assert state.refs == self.refs
        assert state.tags == self.tags
        assert {*state.pins} == self.pins
        assert {*state.expired} == self.expired
        assert {*state.rejected} == self.rejected
        assert {*state.published} == self.published
        assert (state.held is not None) == self.held

    @invariant()
    def every_version_that_lives_is_what_it_was_to_a_new_reader(self) -> None:
        reader = reading(self.storage)
        for number in self.versions.keys() - self.expired:
            for task, updates in held(reader, number).items():
                for name, delta in updates.items():
                    assert torch.equal(delta, self.versions[number][task][name]), (number, task, name)

    def teardown(self) -> None:
        """What expired and nobody needs is gone in the end."""
        self.reopen()
        self.collect()
        self.every_version_that_lives_is_what_it_was_to_a_new_reader()
        if not self.versions.keys() - self.expired - {0}:
            assert not self.storage.keys("blobs/")

    # Small things

    def earlier_revisions(self) -> list[str]:
        """Tasks that a version holds that may be read and that the candidate holds another revision of."""
        there = self.versions[self.refs[CANDIDATE]]
        alive = sorted(self.versions.keys() - self.expired - self.rejected)
        found = dict.fromkeys(task for number in alive for task in self.versions[number])
        return [task for task in found if task not in there and name_of(task) in map(name_of, there)]

    def any_version(self, choice: int) -> int:
        return sorted(self.versions)[choice % len(self.versions)]

    def asked(self) -> dict[str, Any]:
        """Who asks."""
        return {"actor": "test", "op_key": f"request after {self.store.state.seq} of {self.epoch}"}

    @staticmethod
    def refused(call: Any) -> None:
        with pytest.raises(OnebasisError) as caught:
            call()
        assert isinstance(caught.value, Conflict | InvalidInput)


@pytest.fixture(autouse=True)
def _snapshots_are_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 3)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=30,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
