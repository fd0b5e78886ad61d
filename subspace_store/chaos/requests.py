"""The requests of a fault simulation, drawn by the seed from the state that a writer sees.

A request is repeated with its op_key until it is answered, by whichever writer is there. So it holds everything that is
needed to send it again. Nothing is sent from here.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from configs.errors import Corrupt, NotFound
from subspace_store.adapter import SIZED, Adapter, adapter_to_bytes, canonical_update, update_in_foundation
from subspace_store.chaos.model import Model
from subspace_store.digests import digest
from subspace_store.log import retention
from subspace_store.log.version import CANDIDATE, MAIN, StagedAdapter, TaskScore, Version
from subspace_store.merging.basis import ModuleBasis
from subspace_store.subspace_store import SubspaceStore

BASE = "tiny"
SHAPES = {"a": (6, 5), "b": (4, 5)}
"""Shapes of the modules, tiny: a run's time should go into the protocol."""
FOUNDATION = 3
"""Directions of the foundation that some adapters lie in."""
ADAPTERS = 12
"""Number of different adapters; each task takes one of them."""
IN_THE_BASIS = 0.4
"""Share of the merges whose adapters lie in the newest basis of the candidate, as coefficients trained there do."""
MERGES_MAX = 6
GROUP_MAX = 3
ACTOR = "chaos"
NAMES = ("ann", "bob", "cy")
"""Names of tags and of owners of pins: few, so that requests collide."""
PIN_SECONDS = 600
"""Longest pin that ends, in seconds of the simulated clock; a storage call takes one."""


@dataclass
class Request:
    """A request that is repeated until the store answers it."""

    op_key: str
    ask: Callable[[SubspaceStore], int]
    """Sends the request; returns the version that it made or concerned."""
    uploads_of: tuple[str, ...] = ()
    """Ids of the tasks whose uploads it needs."""


class Requests:
    """Makes requests.

    Args:
        random: Random numbers of the seed.
        model: Model that records what will be merged, and knows what is done already.
        now: The simulated clock.
    """

    def __init__(self, random: random.Random, model: Model, now: Callable[[], float]) -> None:
        self._random, self._model, self._now = random, model, now
        self._merges_left = random.randint(1, MERGES_MAX)
        self._adapters: dict[str, Adapter] = {}
        self._names: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def kinds(self) -> dict[Callable[[SubspaceStore], Request | None], int]:
        """Functions that make a request from a writer's state, or None if there is nothing to ask for; each with its
        weight."""
        merging: dict[Callable[[SubspaceStore], Request | None], int] = {self._merge: 12, self._revise: 6}
        return (merging if self._merges_left else {}) | {
            self._merge_again: 4,
            self._restore: 4,
            self._refine: 4,
            self._judge: 12,
            self._roll_back: 2,
            self._score: 1,
            self._tag: 1,
            self._pin: 3,
            self._hold: 2,
            self._quarantine: 1,
            self._expire: 6,
            self._remove: 4,
            self._compact: 2,
            self._drop: 2,
        }

    def _merge(self, store: SubspaceStore) -> Request:
        return self._merging(self._new(store))

    def _revise(self, store: SubspaceStore) -> Request | None:
        """New tasks, some of which take the place of tasks of the candidate."""
        held = list(store.state.tasks_at(store.state.refs[CANDIDATE]).values())
        if not held:
            return None
        adapters = self._new(store)
        old = self._random.sample(held, min(len(held), self._random.randint(1, len(adapters))))
        replaces = dict(zip(adapters, [task.task_id for task in old], strict=False))
        self._names |= dict(zip(adapters, [task.name for task in old], strict=False))
        return self._merging(adapters, replaces)

    def _new(self, store: SubspaceStore) -> dict[str, Adapter]:
        """Adapters of one or more new tasks."""
        self._merges_left -= 1
        count = self._random.choices(range(1, GROUP_MAX + 1), (6, 2, 1))[0]
        renewed = store.training_basis(store.state.refs[CANDIDATE]) if self._random.random() < IN_THE_BASIS else {}
        adapters = {
            f"t{self._next('task')}": _in_the_basis(number, renewed) if renewed else _adapter(number)
            for number in (self._random.randrange(ADAPTERS) for _ in range(count))
        }
        self._adapters |= adapters
        self._names |= {task: f"team/{task}" for task in adapters}
        self._model.delivered |= {task: dense(adapter) for task, adapter in adapters.items()}
        return adapters

    def _merge_again(self, store: SubspaceStore) -> Request | None:
        """A task that was merged and is not on the candidate any more: it was rejected, rolled back, removed, or is an
        earlier revision of one that is there."""
        task, names = self._some_that_left(store)
        if task is None:
            return None
        other = names.get(self._names[task])
        return self._merging({task: self._adapters[task]}, {task: other} if other else {})

    def _restore(self, store: SubspaceStore) -> Request | None:
        """An earlier revision of a task of the candidate, or, sometimes, what is none."""
        task, names = self._some_that_left(store)
        if task is None or (self._names[task] not in names and self._random.random() < 0.7):
            return None
        op_key, publish = f"restore-{self._next('restore')}", self._random.random() < 0.3
        self._model.restoring[op_key] = task, publish
        return Request(op_key, lambda s: s.restore_revision(task, op_key=op_key, actor=ACTOR, publish=publish).number)

    def _some_that_left(self, store: SubspaceStore) -> tuple[str | None, dict[str, str]]:
        """A task that was merged and is not on the candidate, and the candidate's tasks by their names."""
        held = store.state.tasks_at(store.state.refs[CANDIDATE])
        tasks = [task for task in self._merged() if task not in held]
        return (self._random.choice(tasks) if tasks else None), {task.name: id_ for id_, task in held.items()}

    def _refine(self, store: SubspaceStore) -> Request | None:
        """Refine a task of the candidate to −ΔW, which lies in the span of its basis as ΔW does."""
        candidate = store.state.refs[CANDIDATE]
        tasks = list(store.state.tasks_at(candidate))
        if not tasks:
            return None
        task = self._random.choice(tasks)
        served = store.adapter(task, candidate)
        turned = {name: replace(update, u_NR=-update.u_NR) for name, update in served.modules.items()}
        adapter = replace(served, modules=turned, head={name: -tensor for name, tensor in served.head.items()})
        self._model.refined[digest(adapter_to_bytes(adapter))] = dense(adapter)
        request = self._uploading("refine", {task: adapter}, SubspaceStore.refine)
        self._model.candidates[request.op_key] = candidate
        return request

    def _merging(self, adapters: Mapping[str, Adapter], replaces: Mapping[str, str] = MappingProxyType({})) -> Request:
        request = self._uploading("revise" if replaces else "merge", adapters, SubspaceStore.merge, replaces)
        self._model.asked[request.op_key] = {task: replaces.get(task) for task in adapters}
        return request

    def _uploading(
        self,
        kind: str,
        adapters: Mapping[str, Adapter],
        ask_for: Callable[..., Version],
        replaces: Mapping[str, str] = MappingProxyType({}),
    ) -> Request:
        number = self._next(kind)
        op_key = f"{kind}-{number}"
        uploads: dict[str, StagedAdapter] = {}

        def ask(store: SubspaceStore) -> int:
            for task, adapter in adapters.items():
                if task not in uploads:
                    try:
                        ref = store.stage(f"staging/{task}/{op_key}/adapter.safetensors", adapter)
                    except Corrupt as error:
                        raise NotFound("another writer was asked too, merged it, and collected the upload") from error
                    uploads[task] = StagedAdapter(
                        task_id=task,
                        name=self._names[task],
                        key=ref.key,
                        sha256=ref.sha256,
                        replaces=replaces.get(task),
                    )
            return ask_for(store, [uploads[task] for task in adapters], op_key=op_key, actor=ACTOR).number

        return Request(op_key, ask, uploads_of=tuple(adapters))

    def _judge(self, store: SubspaceStore) -> Request | None:
        candidate = store.state.refs[CANDIDATE]
        if candidate == store.state.refs[MAIN]:
            return None
        if self._random.random() < 0.8:
            return self._request("publish", candidate, lambda s, **keys: s.publish(candidate, **keys))
        return self._request("reject", candidate, lambda s, **keys: s.reject(candidate, "chaos", **keys))

    def _roll_back(self, store: SubspaceStore) -> Request | None:
        allowed = [n for n in store.state.published if n not in {*store.state.expired, store.state.refs[MAIN]}]
        if not allowed:
            return None
        number, hold = self._random.choice(allowed), self._random.random() < 0.2
        return self._request("rollback", number, lambda s, **keys: s.rollback(number, hold=hold, **keys))

    def _score(self, store: SubspaceStore) -> Request | None:
        number = store.state.refs[CANDIDATE]
        if number == 0:
            return None
        scores = [TaskScore(task_id=task, score=0.5, count=10) for task in store.state.tasks_at(number)]
        return self._request("scores", number, lambda s, **keys: s.record_scores(number, scores, **keys))

    def _tag(self, store: SubspaceStore) -> Request:
        name, number = self._random.choice(NAMES), self._some(store)
        return self._request("tag", number, lambda s, **keys: s.tag(name, number, **keys))

    def _pin(self, store: SubspaceStore) -> Request:
        owner, number = self._random.choice(NAMES), self._some(store)
        if self._random.random() < 0.4:
            return self._request("unpin", number, lambda s, **keys: s.unpin(number, owner, **keys))
        until = self._random.choice([None, self._now() + self._random.randint(1, PIN_SECONDS)])
        return self._request("pin", number, lambda s, **keys: s.pin(number, owner, until, **keys))

    def _hold(self, store: SubspaceStore) -> Request:
        if self._random.random() < 0.3:
            return self._request("hold", 0, lambda s, **keys: s.hold("chaos", **keys))
        return self._request("release", 0, lambda s, **keys: s.release(**keys))

    def _quarantine(self, store: SubspaceStore) -> Request | None:
        tasks = self._merged()
        if not tasks:
            return None
        task = self._random.choice(tasks)
        if self._random.random() < 0.5:
            return self._request("unquarantine", 0, lambda s, **keys: s.unquarantine(task, **keys))
        return self._request("quarantine", 0, lambda s, **keys: s.quarantine(task, "chaos", **keys))

    def _expire(self, store: SubspaceStore) -> Request | None:
        """Expire versions that may expire in this writer's state, or, sometimes, versions that may not."""
        now = self._now()
        dying = retention.expirable(store.state, 1, now)
        if self._random.random() < 0.2:
            dying = list(store.state.versions)
        dying = self._random.sample(dying, self._random.randint(0, min(2, len(dying))))
        if not dying:
            return None
        return self._request("expire", 0, lambda s, **keys: s.expire(dying, **keys))

    def _remove(self, store: SubspaceStore) -> Request | None:
        tasks = list(store.state.tasks_at(store.state.refs[CANDIDATE]))
        if not tasks:
            return None
        task, publish = self._random.choice(tasks), self._random.random() < 0.3

        def ask(store: SubspaceStore, **keys: str) -> int:
            version = store.remove(task, publish=publish, **keys)
            return version.number if version else 0

        return self._request("remove", None, ask)

    def _compact(self, store: SubspaceStore) -> Request | None:
        if not store.state.refs[CANDIDATE]:
            return None
        publish = self._random.random() < 0.3
        return self._request("compact", None, lambda s, **keys: s.compact(publish=publish, **keys).number)

    def _drop(self, store: SubspaceStore) -> Request | None:
        tasks = list(store.state.tasks_at(store.state.refs[MAIN]))
        if not tasks:
            return None
        task = self._random.choice(tasks)
        return self._request("drop", 0, lambda s, **keys: s.drop_adapters([task], **keys))

    def _merged(self) -> list[str]:
        asked, done = self._model.asked, self._model.done
        return list(dict.fromkeys(task for op_key in asked if op_key in done for task in asked[op_key]))

    def _some(self, store: SubspaceStore) -> int:
        return self._random.choice([0, *store.state.versions])

    def _request(self, kind: str, version: int | None, ask: Callable[..., Any]) -> Request:
        """A request about an existing version; 0 if it is about none; None if the answer is the version it made."""
        op_key = f"{kind}-{self._next(kind)}"

        def answer(store: SubspaceStore) -> int:
            made = ask(store, op_key=op_key, actor=ACTOR)
            return int(made) if version is None else version

        return Request(op_key, answer)

    def _next(self, kind: str) -> int:
        self._numbers[kind] += 1
        return self._numbers[kind]


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {name: update.delta() for name, update in adapter.modules.items()} | dict(adapter.head)


@functools.cache
def _adapter(number: int) -> Adapter:
    """One of a few random adapters: ranks 1 to 3, most on one module, some on both, some in the foundation, some kept
    whole."""
    generator = torch.Generator().manual_seed(number)
    rank = 1 + number % 3
    modules = {}
    for name, (n, d) in list(SHAPES.items())[: 1 + (number % 4 == 3)]:
        if number % 5 == 1:
            e_KR, f_KR = (torch.randn(FOUNDATION, rank, generator=generator) for _ in range(2))
            modules[name] = update_in_foundation(name, (n, d), FOUNDATION, e_KR, f_KR)
        else:
            b_NR, a_RD = torch.randn(n, rank, generator=generator), torch.randn(rank, d, generator=generator)
            modules[name] = canonical_update(b_NR, a_RD, scale=0.5)
    info = {SIZED: "score"} if number % 7 == 2 else {}
    return Adapter(BASE, "", modules, {"head": torch.randn(2, generator=generator)}, info)


def _in_the_basis(number: int, bases: Mapping[str, ModuleBasis]) -> Adapter:
    """An adapter with one direction of each basis, kept whole, in the modules that have one."""
    adapter, modules = _adapter(number), {}
    for name, basis in bases.items():
        if min(basis.ranks):
            out, inward = (side[:, number % side.shape[1]][:, None] for side in (basis.p_NK, basis.q_DK))
            modules[name] = canonical_update(out, inward.T, scale=1.0 + number / ADAPTERS)
    return replace(adapter, modules=modules, info={SIZED: "score"}) if modules else adapter
