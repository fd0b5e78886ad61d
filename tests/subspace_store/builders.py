"""Adapters, stores and faulty storages for the tests of the subspace store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from configs.errors import Unavailable
from configs.settings import SubspaceSettings
from subspace_store import (
    Adapter,
    StagedAdapter,
    Storage,
    SubspaceReader,
    SubspaceStore,
    Version,
    canonical_update,
    subspace_store,
)
from subspace_store.adapter import SIZED, update_in_foundation
from subspace_store.foundation import foundation_ranks
from subspace_store.merge_writer import Draft, Written
from subspace_store.merging.basis import ModuleBasis
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.protocol import ObjectStream

SHAPES = {"layer.0.query": (24, 20), "layer.0.value": (16, 20)}
BASE = "tiny-base"
_places = itertools.count()


def fresh_storage() -> MemoryStorage:
    """A place in memory that no other test uses."""
    return MemoryStorage(f"test-{next(_places)}")


def random_adapter(
    seed: int, rank: int = 4, shapes: Mapping[str, tuple[int, int]] = SHAPES, size: float = 1.0, base: str = BASE
) -> Adapter:
    """Random updates with singular values that fall by a third each, so that truncation has something to drop."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (n, d) in shapes.items():
        b_NR = torch.randn(n, rank, generator=generator) * 0.66 ** torch.arange(rank)
        modules[name] = canonical_update(b_NR, torch.randn(rank, d, generator=generator), size)
    head = {"classifier.weight": torch.randn(2, 5, generator=generator)}
    return Adapter(base, "", modules, head, {"method": "lora", "seed": str(seed)})


def foundation_adapter(
    seed: int, rank: int = 3, directions: int = 8, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> Adapter:
    """What a worker makes of coefficients that it trained in the foundation."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, shape in shapes.items():
        k_out, k_in = foundation_ranks(shape, directions)
        e_KR, f_KR = torch.randn(k_out, rank, generator=generator), torch.randn(k_in, rank, generator=generator)
        modules[name] = update_in_foundation(name, shape, directions, e_KR, f_KR)
    return replace(random_adapter(seed), modules=modules, info={"method": "share"})


def staged(store: SubspaceStore, task_id: str, adapter: Adapter, replaces: str | None = None) -> StagedAdapter:
    """Upload an adapter. What follows an @ in the id is no part of the task's name: a@2 is called team/a, as a is."""
    ref = store.stage(f"staging/{task_id}/1/adapter.safetensors", adapter)
    name = f"team/{task_id.partition('@')[0]}"
    return StagedAdapter(task_id=task_id, name=name, key=ref.key, sha256=ref.sha256, replaces=replaces)


def merged(
    store: SubspaceStore,
    adapters: Mapping[str, Adapter],
    op_key: str = "",
    replaces: Mapping[str, str] = MappingProxyType({}),
) -> Version:
    """Upload and merge adapters as one version. `replaces`: id of a revision to the id of the one before it."""
    uploads = [staged(store, task_id, adapter, replaces.get(task_id)) for task_id, adapter in adapters.items()]
    return store.merge(uploads, op_key=op_key or "merge " + " ".join(adapters), actor="test")


def in_the_basis(store: SubspaceStore, seed: int, version: int, rank: int = 3) -> Adapter:
    """What a worker makes of coefficients that it trained in a version's basis: P·E·Fᵀ·Qᵀ and a head."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: canonical_update(
            basis.p_NK @ torch.randn(basis.ranks[0], rank, generator=generator),
            torch.randn(rank, basis.ranks[1], generator=generator) @ basis.q_DK.T,
            0.3,
        )
        for name, basis in store.basis(version).items()
    }
    return replace(random_adapter(seed), modules=modules, info={"refined": "yes"})


def trained_in(bases: Mapping[str, ModuleBasis], seed: int, rank: int = 3) -> Adapter:
    """An update inside the span of a basis, as coefficients trained in it are."""
    draw, modules = torch.Generator().manual_seed(seed), {}
    for name, basis in bases.items():
        e_KR, f_KR = (torch.randn(k, rank, generator=draw) for k in basis.ranks)
        modules[name] = canonical_update(basis.p_NK @ e_KR, (basis.q_DK @ f_KR).T, 0.1)
    return Adapter(BASE, "", modules, {}, {SIZED: "score"})


def refined(store: SubspaceStore, adapters: dict[str, Adapter], op_key: str = "refine") -> Version:
    """Upload and refine adapters as one version."""
    uploads = []
    for task, adapter in adapters.items():
        ref = store.stage(f"staging/{task}/{op_key}/adapter.safetensors", adapter)
        name = f"team/{task.partition('@')[0]}"
        uploads.append(StagedAdapter(task_id=task, name=name, key=ref.key, sha256=ref.sha256))
    return store.refine(uploads, op_key=op_key, actor="test")


@contextmanager
def crash_at_merge(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """The process is gone before the files of this merge, counted from here, are written."""

    class Crash(BaseException):
        """No code of ours catches it."""

    write, merges = subspace_store.write_version, itertools.count(1)

    def failing(draft: Draft) -> Written:
        if next(merges) == number:
            raise Crash
        return write(draft)

    with monkeypatch.context() as patched:
        patched.setattr(subspace_store, "write_version", failing)
        with pytest.raises(Crash):
            yield


def reading(storage: Storage, **settings: object) -> SubspaceReader:
    """A reader of the store on this storage."""
    return SubspaceReader.open(storage, settings=settings_with(settings), base_model=BASE)


def opened(storage: Storage | None = None, writer: str = "writer", **settings: object) -> SubspaceStore:
    """A store on this storage, or on a new place in memory."""
    where = fresh_storage() if storage is None else storage
    return SubspaceStore.open(where, settings=settings_with(settings), base_model=BASE, writer=writer)


def settings_with(changes: Mapping[str, object]) -> SubspaceSettings:
    """Settings under which directions always join the basis, so that tests of bases have some; and these changes."""
    return SubspaceSettings.model_validate({"share": "always"} | dict(changes))


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """Dense float64 updates."""
    return {name: update.delta() for name, update in adapter.modules.items()}


def relative_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], norm_of: Mapping[str, Tensor]) -> float:
    """‖one − other‖ / ‖norm_of‖ over all modules."""
    assert one.keys() == other.keys()
    distance = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((distance / sum(float(delta.square().sum()) for delta in norm_of.values())) ** 0.5)


class FaultyStorage:
    """A storage whose create asks `fault` what to do each time: None, "before" or "after" the write it fails."""

    def __init__(self, inner: Storage, fault: Callable[[str], str | None]) -> None:
        self.inner = inner
        self.fault = fault

    @property
    def url(self) -> str:
        return self.inner.url

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        return self.inner.view(key, start, size)

    def write(self, key: str, content: bytes) -> None:
        self.inner.write(key, content)

    def stream(self, key: str, head_size: int) -> AbstractContextManager[ObjectStream]:
        return self.inner.stream(key, head_size)

    def create(self, key: str, content: bytes) -> bool:
        fault = self.fault(key)
        if fault == "before":
            raise Unavailable("connection lost before the write", key)
        done = self.inner.create(key, content)
        if fault == "after":
            raise Unavailable("connection lost after the write", key)
        return done

    def keys(self, prefix: str, after: str = "") -> list[str]:
        return self.inner.keys(prefix, after)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        return self.inner.abandon(prefix, idle_seconds)
