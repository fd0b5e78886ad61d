"""Writes one merge, refinement or restored revision to storage: its files, each read back, and the version that names
them. The log is not changed here.

The new basis is written module by module while the merge computes it, and the old one is freed module by module, so
that memory never holds two of them. Until a record names the version, its files are garbage that `collect` may delete
later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

from torch import Tensor

from configs.errors import RefusedAdapters
from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.files import blobs
from subspace_store.files.tensor_file import Part
from subspace_store.files.version_tensors import VersionTensors, moved, without
from subspace_store.log.version import BlobRef, MergedTask, SubspaceState, Version
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace, empty_module
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock, Transport
from subspace_store.merging.merge import (
    ModuleMerge,
    Tally,
    apart,
    keeps_promises,
    merge_modules,
    place_in_basis,
    renews,
    sized_among,
    threads,
)
from subspace_store.merging.renewal import most_directions, renewed_basis, routed, under_renewed
from subspace_store.merging.subspace_math import update_energy
from subspace_store.module_names import is_renewed, plain, renewed
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.protocol import Storage

SNAPSHOT_EVERY = 64
"""Fewest versions of a lineage between two snapshots of all coefficients. A snapshot is postponed until the transports
written since the last one are larger than it, so that snapshots at most double what transports cost, however many tasks
there are."""

OUTSIDE_MAX = 1e-4
"""Largest share of ‖ΔW‖_F of a refined adapter outside the span of its basis: float32 leaves about 1e-6."""


PrivateParts = Mapping[str, Mapping[str, ModuleUpdate]]
"""Task id to its private parts, by module."""


@dataclass(frozen=True)
class Arrival:
    """A checked adapter that is to be merged, or that replaces the task's present coefficients."""

    task_id: str
    name: str
    adapter: Adapter
    content: bytes | BlobRef
    """The adapter file's bytes, or the object that holds them already."""
    approximate: bool = False
    replaces: str | None = None
    """Id of the task of the parent whose place it takes, see `MergedTask.replaces`."""


@dataclass(frozen=True)
class Written:
    """A version whose files are written, and its tensors as a reader would find them."""

    version: Version
    bases: dict[str, ModuleBasis]
    tasks: dict[str, ModuleTasks]


@dataclass(frozen=True)
class Draft:
    """A version that is to be written: its storage, its parent and its adapters."""

    storage: Storage
    epoch: int
    """Epoch of the writer, part of the new files' keys."""
    tensors: VersionTensors
    """Tensors of the subspace; the parent's basis is freed from them while a merge replaces it."""
    state: SubspaceState
    """State of the log before this version."""
    parent: int
    arrivals: Sequence[Arrival]
    """Adapters, at least one, with shapes that fit the modules. A task that one of them replaces leaves: the merge does
    not look at it."""
    settings: SubspaceSettings
    remakes: int | None = None
    """The version that this one makes again without a task, see `Version.remakes`."""
    removed: tuple[str, ...] = ()
    """Ids of the tasks that were left out, see `Version.removed`."""
    renewed_of: int = 0
    """The version whose renewed bases are carried over if the parent has none; 0: none are."""

    @property
    def number(self) -> int:
        """Number of the version."""
        return max(self.state.versions, default=0) + 1

    def staying(self) -> dict[str, MergedTask]:
        """The parent's tasks without those that leave, in their order."""
        left = self.left
        return {id_: task for id_, task in self.state.tasks_at(self.parent).items() if id_ not in left}

    @property
    def left(self) -> frozenset[str]:
        """Ids of the tasks that leave."""
        return frozenset(arrival.replaces for arrival in self.arrivals if arrival.replaces is not None)

    def bytes_of(self, *refs: BlobRef | None) -> int:
        """Size of those objects that this writer has made."""
        mine = f"blobs/{self.epoch:010d}/"
        return sum(ref.size_bytes for ref in refs if ref is not None and ref.key.startswith(mine))

    def keep(self, arrival: Arrival) -> BlobRef:
        """The object that holds the adapter from now on."""
        content = arrival.content
        return content if isinstance(content, BlobRef) else blobs.write_blob(self.storage, self.epoch, content)

    def tasks(
        self,
        adapters: Sequence[BlobRef],
        coefficients: BlobRef,
        private: Sequence[BlobRef | None],
        delivered: Mapping[str, float],
        errors: Mapping[str, float],
        updates: PrivateParts,
        known: Mapping[str, MergedTask] = MappingProxyType({}),
    ) -> tuple[MergedTask, ...]:
        """The version's records of its new tasks; `adapters` and `private` are in the order of the arrivals.

        known: The same tasks before, where they are refined or restored. As a separate LoRA a task is as large as it
            was brought.
        """
        parts = {task: list(modules.values()) for task, modules in updates.items()}
        return tuple(
            MergedTask(
                task_id=arrival.task_id,
                name=arrival.name,
                version=self.number,
                adapter=adapter,
                coefficients=coefficients,
                delivered_energy=delivered[arrival.task_id],
                rank_total=arrival.adapter.directions,
                error_at_birth=errors[arrival.task_id],
                parameter_count=known.get(arrival.task_id, arrival.adapter).parameter_count,
                head_count=sum(tensor.numel() for tensor in arrival.adapter.head.values()),
                private=rest,
                private_count=sum(update.numbers for update in parts.get(arrival.task_id, ())),
                foundation_count=sum(u.numbers for u in parts.get(arrival.task_id, ()) if u.foundation),
                is_sized=arrival.adapter.is_sized,
                replaces=arrival.replaces,
            )
            for arrival, adapter, rest in zip(self.arrivals, adapters, private, strict=True)
        )

    def keep_private(self, arrival: Arrival, updates: PrivateParts) -> BlobRef | None:
        """The object that holds the private parts of a new task, by module; None if there are none."""
        if arrival.task_id not in updates:
            return None
        return blobs.write_private(self.storage, self.epoch, updates[arrival.task_id])


def write_version(draft: Draft) -> Written:
    """Merge adapters onto a version and write everything but the record.

    Cost:
        As `merge_adapters`; writes the changed modules' bases, their transports, the new tasks, and from time to time a
        snapshot. Memory: one basis, and the arrivals. The merge that makes the renewed bases reads all tasks' private
        parts as well, module by module.
    """
    storage, epoch, state, arrivals = draft.storage, draft.epoch, draft.state, draft.arrivals
    merging = _Merging(draft)
    basis = merging.write_basis()

    # In threads: each file waits for the storage twice, to be written and read back, and leaves the processor free.
    jobs: list[Callable[[], Any]] = [
        partial(blobs.write_transports, storage, epoch, merging.transports),
        partial(blobs.write_coefficients, storage, epoch, merging.arrived),
        *(partial(draft.keep, arrival) for arrival in arrivals),
        *(partial(draft.keep_private, arrival, merging.private) for arrival in arrivals),
        *(merge.settle for merge in merging.merges.values()),
    ]
    transport, coefficients, *rest = in_order(lambda job: job(), jobs, AT_ONCE)
    count = len(arrivals)
    adapters, private = rest[:count], rest[count : 2 * count]
    merging.settle(rest[2 * count :])
    snapshot = None
    if _snapshot_is_due(state.lineage(draft.parent), transport, merging):
        settled = {name: tasks.settled.rounded() for name, tasks in merging.tasks.items() if tasks.task_ids}
        snapshot = blobs.write_coefficients(storage, epoch, settled)
        # From here on a reader starts from the rounded coefficients, so the writer does as well.
        merging.tasks |= {name: ModuleTasks.of(block) for name, block in settled.items()}
    drift = merging.tally.drift
    version = Version(
        number=draft.number,
        parent=draft.parent,
        created_at=time.time(),
        added=draft.tasks(
            adapters, coefficients, private, merging.tally.delivered, merging.tally.error_at_birth, merging.private
        ),
        basis=basis,
        transport=transport,
        basis_versions=tuple(sorted({*merging.elsewhere.values()})),
        module_count=len({*map(plain, merging.ranks)}),
        renewed_count=sum(map(is_renewed, merging.ranks)),
        rank_max=max(max(ranks) for ranks in merging.ranks.values()),
        drift=tuple(round(drift[task], 7) for task in merging.held) if any(drift.values()) else (),
        bytes_written=draft.bytes_of(basis, transport, coefficients, snapshot, *adapters, *private),
        merge_seconds=merging.seconds,
        snapshot=snapshot,
        remakes=draft.remakes,
        removed=draft.removed,
        approximate=tuple(arrival.task_id for arrival in arrivals if arrival.approximate),
    )
    return Written(version, merging.bases, merging.tasks)


def write_refinement(draft: Draft) -> Written:
    """Replace the coefficients of some tasks, each in the bases that hold it, and write everything but the record.

    Args:
        draft: The new version; its arrivals are tasks that the parent holds.

    Returns:
        A version with the parent's basis; all other tasks keep the parent's coefficients, bit for bit.

    Raises:
        RefusedAdapters: Some adapters have more than `OUTSIDE_MAX` outside the span of the parent's basis, and their
            tasks no private parts.

    Cost:
        Reads the bases of the modules that the arrivals adapt; writes the arrivals and their coefficients.
    """
    started = time.perf_counter()
    before = draft.state.tasks_at(draft.parent)
    adapters, private = apart({arrival.task_id: arrival.adapter for arrival in draft.arrivals}, draft.settings)
    # Those that had private parts before: theirs change with the coefficients. The others stay in the basis.
    may_be_private = frozenset(a.task_id for a in draft.arrivals if before[a.task_id].private is not None)
    placed = _placed(draft, _where_they_are(adapters, draft.tensors.tasks(draft.parent)), private, may_be_private)
    errors = placed.errors
    if outside := [task for task, error in errors.items() if error > OUTSIDE_MAX and task not in may_be_private]:
        shares = ", ".join(f"{errors[task]:.1e}" for task in outside)
        raise RefusedAdapters(
            f"has {shares} of its norm outside the basis of version {draft.parent}, more than {OUTSIDE_MAX:.0e}",
            _who(draft.arrivals, outside),
            "refine it in the basis of the version that is the candidate",
            tuple(outside),
        )
    return _write_in_place(draft, placed, time.perf_counter() - started, before)


def write_restored(draft: Draft, known: MergedTask) -> Written:
    """Put one earlier revision of a task back, in the parent's basis as it is, and write everything but the record.

    Args:
        draft: The new version; its one arrival replaces a task of the parent.
        known: The revision as it was merged or refined last.

    Returns:
        A version with the parent's basis; all other tasks keep the parent's coefficients, bit for bit, and what the
        basis lacks of the revision is its private part. If it cannot be `is_in_place`, it is an ordinary merge.

    Cost:
        As `write_refinement`, or as `write_version`.
    """
    if not is_in_place(draft):
        written = write_version(draft)
        added = tuple(replace(task, parameter_count=known.parameter_count) for task in written.version.added)
        return replace(written, version=replace(written.version, added=added))
    started = time.perf_counter()
    placed = restored_in_place(draft)
    return _write_in_place(draft, placed, time.perf_counter() - started, {known.task_id: known})


def is_in_place(draft: Draft) -> bool:
    """Whether a revision can be put back without moving others: merges keep their promises, by private parts; and the
    parent has bases for all modules that the revision adapts. A compaction may have left one out."""
    homes = draft.tensors.homes(draft.parent)
    has_all = all(name in homes for arrival in draft.arrivals for name in arrival.adapter.modules)
    return has_all and keeps_promises(draft.settings)


def restored_in_place(draft: Draft) -> Placement:
    """The arrivals in the parent's bases, wherever each update lies; what these lack is private."""
    tensors, parent = draft.tensors, draft.parent
    homes = tensors.homes(parent)
    adapters, private = apart({arrival.task_id: arrival.adapter for arrival in draft.arrivals}, draft.settings)
    adapters = routed(lambda name: tensors.module_basis(parent, name) if name in homes else None, adapters)
    return _placed(draft, adapters, private, may_be_private=tuple(adapters))


def _write_in_place(draft: Draft, placed: Placement, seconds: float, known: Mapping[str, MergedTask]) -> Written:
    """Write a version with the parent's basis: tasks refined, or a revision restored. known: See `Draft.tasks`."""
    coefficients = blobs.write_coefficients(draft.storage, draft.epoch, placed.blocks)
    adapters = [draft.keep(arrival) for arrival in draft.arrivals]
    private = [draft.keep_private(arrival, placed.private) for arrival in draft.arrivals]
    old = draft.state.versions[draft.parent]
    brought = draft.tasks(adapters, coefficients, private, placed.delivered, placed.errors, placed.private, known)
    version = Version(
        number=draft.number,
        parent=draft.parent,
        created_at=time.time(),
        added=brought if draft.left else (),
        basis=old.basis,
        transport=None,
        basis_versions=old.basis_versions,
        module_count=old.module_count,
        renewed_count=old.renewed_count,
        rank_max=old.rank_max,
        bytes_written=draft.bytes_of(coefficients, *adapters, *private),
        merge_seconds=seconds,
        approximate=tuple(arrival.task_id for arrival in draft.arrivals if arrival.approximate),
        refined=() if draft.left else brought,
    )
    gone = [*draft.left, *(arrival.task_id for arrival in draft.arrivals)]
    tasks = moved(draft.tensors.tasks(draft.parent), {}, [placed.blocks], gone)
    return Written(version, {}, tasks)


@dataclass(frozen=True)
class Placement:
    """Tasks in unchanged bases."""

    blocks: dict[str, TaskBlock]
    """Basis to coefficients in it."""
    private: dict[str, dict[str, ModuleUpdate]]
    """Task id to private parts, by module."""
    delivered: dict[str, float]
    """Task id to ‖ΔW‖²_F."""
    missed: dict[str, float]
    """Task id to ‖ΔW − ΔŴ‖²_F."""

    @property
    def numbers(self) -> int:
        """Numbers of all their coefficients and private parts."""
        own = sum(update.numbers for updates in self.private.values() for update in updates.values())
        blocks = self.blocks.values()
        return own + sum(block.e_KS.numel() + block.f_KS.numel() for block in blocks)

    @property
    def errors(self) -> dict[str, float]:
        """Task id to ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F."""
        return {task: (self.missed[task] / energy) ** 0.5 if energy else 0.0 for task, energy in self.delivered.items()}


def _placed(
    draft: Draft,
    adapters: Mapping[str, Adapter],
    private: dict[str, dict[str, ModuleUpdate]],
    may_be_private: Collection[str],
) -> Placement:
    """The arrivals in the parent's bases.

    Args:
        adapters: Their updates by the names of the bases that they are placed in.
        private: What is kept of them exactly, see `apart`.
        may_be_private: Tasks that may have private parts, for what lies outside the basis.
    """
    tensors, parent, arrivals = draft.tensors, draft.parent, draft.arrivals
    blocks: dict[str, TaskBlock] = {}
    sized = sized_among(adapters)
    delivered = {
        arrival.task_id: sum(map(update_energy, private.get(arrival.task_id, {}).values())) for arrival in arrivals
    }
    missed = dict.fromkeys(delivered, 0.0)
    for name in sorted({name for adapter in adapters.values() for name in adapter.modules}):
        incoming = {task: adapter.modules[name] for task, adapter in adapters.items() if name in adapter.modules}
        if name not in tensors.homes(parent):
            what = f"adapts {name}, which version {parent} has no basis for"
            raise RefusedAdapters(what, _who(arrivals, incoming), "", tuple(incoming))
        place = place_in_basis(tensors.module_basis(parent, name), incoming, draft.settings, may_be_private, sized)
        if place.arrivals.task_ids:
            blocks[name] = place.arrivals
        for task, update in place.private.items():
            private.setdefault(task, {})[plain(name)] = update
        for task, energy, outside in zip(
            place.task_ids, place.delivered_T.tolist(), place.missed_T.tolist(), strict=True
        ):
            delivered[task] += energy
            missed[task] += outside
    return Placement(blocks, private, delivered, missed)


def _where_they_are(adapters: Mapping[str, Adapter], tasks: Mapping[str, ModuleTasks]) -> dict[str, Adapter]:
    """The same adapters, with their updates by the names of the bases that hold their tasks.

    Args:
        tasks: Basis to the tasks that have coefficients in it.
    """
    held = {name: set(block.task_ids) for name, block in tasks.items() if is_renewed(name)}
    return {
        task: under_renewed(adapter, [plain(name) for name, its in held.items() if task in its])
        for task, adapter in adapters.items()
    }


def _who(arrivals: Sequence[Arrival], tasks: Collection[str]) -> str:
    return ", ".join(f"task {arrival.name} ({arrival.task_id})" for arrival in arrivals if arrival.task_id in tasks)


class _Merging:
    """A merge in progress: frees the parent's modules and collects the results, module by module."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        tensors, parent = draft.tensors, draft.parent
        self.held = draft.staying()
        """The earlier tasks that stay."""
        self._sized = {task.task_id for task in self.held.values() if task.is_sized}
        self._homes = tensors.homes(parent)
        self._before = tensors.take_basis(parent)
        self._carried = {} if any(map(is_renewed, self._homes)) else tensors.renewed(draft.renewed_of)
        rest, self.private = apart({a.task_id: a.adapter for a in draft.arrivals}, draft.settings)
        shapes = {name: update.shape for a in draft.arrivals for name, update in a.adapter.modules.items()}
        self._adapters = routed(self._basis, rest, threads(sum(map(sum, shapes.values()))))
        shapes |= {name: basis.shape for name, basis in self._carried.items()}
        new = {plain(name): shape for name, shape in shapes.items() if plain(name) not in self._homes}
        changed = {name for adapter in self._adapters.values() for name in adapter.modules}
        self._empty = {name: empty_module(shape).basis for name, shape in sorted(new.items()) if name not in changed}
        """Bases without directions, of modules that are new and of whose tasks the first basis holds nothing: they are
        kept exactly, see `apart`, or lie in the renewed one."""
        self.touched = [*sorted(changed), *self._empty]
        self.elsewhere = dict(self._homes)
        """Basis to the version whose file holds it; until it is merged, that of a changed one too."""
        self.tasks = dict(without(tensors.tasks(parent), draft.left))
        others = [name for name in self._homes if name not in self.touched]
        self.bases = {name: self._before[name] for name in others if name in self._before}
        before = tensors.shapes(parent)
        self.ranks = {name: before[name][1] for name in others}
        self.merges: dict[str, ModuleMerge] = {}
        self.transports: dict[str, Transport] = {}
        self.arrived: dict[str, TaskBlock] = {}
        self.tally = Tally({task.task_id: task.delivered_energy for task in self.held.values()})
        self.seconds = 0.0
        self.tally.add_exact(self.private)
        for name in others:
            self.tally.add_untouched(self.tasks.get(name, ModuleTasks()))

    def write_basis(self) -> BlobRef:
        """Merge and write. The new basis is kept whole in memory only if the old one was."""
        draft = self._draft
        names = [*self.touched, *self._carried]
        sized = len(self._sized) + sum(arrival.adapter.is_sized for arrival in draft.arrivals)
        is_renewing = renews({*self._homes, *self._carried}, sized, draft.settings)
        if is_renewing:
            names += [renewed(name) for name in sorted({*self._homes, *self.touched})]
        parts = chain(self._parts(), self._renewed_parts() if is_renewing else ())
        ref = blobs.write_basis(draft.storage, draft.epoch, names, self.elsewhere, parts)
        if len(self.bases) < len(self.ranks):
            self.bases = {}
        return ref

    def settle(self, settled: Sequence[tuple[ModuleTasks, Tensor]]) -> None:
        """Collect the results of `settle` of each merge, in their order."""
        for (name, merge), (tasks, lost_T) in zip(self.merges.items(), settled, strict=True):
            self.tasks[name] = tasks
            self.tally.add(merge, lost_T)

    def _parts(self) -> Iterator[Part]:
        started = time.perf_counter()
        for name, merge in merge_modules(self._read, self._adapters, self._draft.settings, self._sized):
            self.merges[name] = merge
            if name in self._homes and not merge.stays:
                self.transports[name] = merge.transport
            if merge.new.arrivals.task_ids:
                self.arrived[name] = merge.new.arrivals
            for task, update in merge.new.private.items():
                self.private.setdefault(task, {})[name] = update
            blobs.check_basis(merge.basis, f"merging {name}")
            self.seconds += time.perf_counter() - started
            self.bases[name], self.ranks[name] = merge.basis, merge.basis.ranks
            if not merge.stays:
                self.elsewhere.pop(name, None)
                yield blobs.pack_basis(name, merge.basis)
            started = time.perf_counter()
        for name, basis in (self._empty | self._carried).items():
            self.bases[name], self.ranks[name] = basis, basis.ranks
            yield blobs.pack_basis(name, basis)

    def _renewed_parts(self) -> Iterator[Part]:
        """The renewed bases of all modules after the merge, a few at the same time."""
        started = time.perf_counter()
        names, rows = sorted(self.ranks), sum(sum(basis.shape) for basis in self.bases.values())
        for name, basis in zip(names, in_order(self._renew, names, threads(rows)), strict=True):
            if basis is not None:
                key = renewed(name)
                blobs.check_basis(basis, f"renewing {name}")
                self.seconds += time.perf_counter() - started
                self.bases[key], self.ranks[key] = basis, basis.ranks
                yield blobs.pack_basis(key, basis)
                started = time.perf_counter()

    def _renew(self, name: str) -> ModuleBasis | None:
        """The renewed basis of one module: of what the earlier tasks and the new ones are after the merge."""
        draft = self._draft
        basis = self.bases.get(name) or draft.tensors.module_basis(draft.parent, name)
        if min(basis.shape) < most_directions(draft.settings):
            return None  # at every merge: nothing is read for it
        tasks = self.merges[name].settle()[0] if name in self.merges else self.tasks.get(name, ModuleTasks())
        private = draft.tensors.private_by_module(self.held.values(), (name,)).get(name, {})
        private |= {task: updates[name] for task, updates in self.private.items() if name in updates}
        return renewed_basis(ModuleSubspace(basis, tasks, private), draft.settings)

    def _basis(self, name: str) -> ModuleBasis | None:
        """A basis before the merge, which stays where it is."""
        if name not in self._homes:
            return self._carried.get(name)
        return self._before.get(name) or self._draft.tensors.module_basis(self._draft.parent, name)

    def _read(self, name: str) -> ModuleSubspace | None:
        """A basis before the merge with its tasks, removed from memory."""
        basis = self._basis(name)
        self._before.pop(name, None)
        return None if basis is None else ModuleSubspace(basis, self.tasks.get(name, ModuleTasks()))


def _snapshot_is_due(line: Sequence[Version], transport: BlobRef, merging: _Merging) -> bool:
    since = 0
    for version in reversed(line):
        if version.snapshot is not None:
            break
        since += 1
    written = transport.size_bytes + sum(v.transport.size_bytes for v in line[len(line) - since :] if v.transport)
    size = sum(4 * sum(merging.ranks[name]) * sum(tasks.ranks) for name, tasks in merging.tasks.items())
    return since + 1 >= SNAPSHOT_EVERY and written >= size
