"""The tensors of a version, from its files or from memory: bases per module, coefficients and private parts per task.

Bases and coefficients go by the names of bases, private parts by those of modules (module_names.py).

The head of a file says what it holds (version_heads.py). Coefficients are read from the file of the task's birth or of
the last snapshot, and brought to the version by the transports since. Safe for threads; memory has a limit in bytes, so
that it does not grow with the number of versions that are read.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from subspace_store.adapter import ModuleUpdate
from subspace_store.files import blobs
from subspace_store.files.tensor_file import SMALL_BYTES, TensorFile
from subspace_store.files.version_heads import (
    COEFFICIENTS,
    PRIVATE,
    TRANSPORT,
    Recent,
    VersionHeads,
    coefficient_files,
)
from subspace_store.log.version import MergedTask, Version
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock, Transport
from subspace_store.module_names import is_renewed, plain
from subspace_store.parallel import AT_ONCE, in_order

BASES_BYTES = 2**30
"""Bytes of bases that are kept in memory: several versions of a small model, the newest one of a 7B model."""
TRANSPORTS_BYTES = 2**28
SMALL_BASIS = 2**25
"""Numbers in a basis up to which it is read whole even if one task is asked for: 128 MiB."""
VERSIONS = 3
"""Number of versions whose coefficients are kept in memory: main, candidate, and one that somebody looks at."""


class VersionTensors:
    """Reads versions of one subspace.

    Args:
        heads: Finds the files; shared with readers that need no tensors.
    """

    def __init__(self, heads: VersionHeads) -> None:
        self._heads = heads
        self._bases: Recent[dict[str, ModuleBasis]] = Recent(BASES_BYTES, _basis_bytes)
        self._transports: Recent[dict[str, Transport]] = Recent(TRANSPORTS_BYTES, _transport_bytes)
        self._tasks: Recent[dict[str, ModuleTasks]] = Recent(VERSIONS)
        self._lock = threading.RLock()

    # Bases

    def homes(self, number: int) -> dict[str, int]:
        """See `VersionHeads.homes`."""
        return self._heads.homes(number)

    def shapes(self, number: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """See `VersionHeads.shapes`."""
        return self._heads.shapes(number)

    def module_basis(self, number: int, module: str) -> ModuleBasis:
        """One module's basis; nothing else is read."""
        with self._lock:
            known = self._bases.get(self._heads.basis_key(number))
            file = self._heads.basis_file(self.homes(number)[module])
        return blobs.read_basis(file, module) if known is None else known[module]

    def basis(self, number: int) -> dict[str, ModuleBasis]:
        """All modules' bases, kept in memory for later calls."""
        with self._lock:
            known = self._bases.get(self._heads.basis_key(number))
            if known is None:
                files = {name: self._heads.basis_file(home) for name, home in self.homes(number).items()}
                threads = AT_ONCE if any(file.ref.size_bytes > SMALL_BYTES for file in files.values()) else 1
                read = in_order(lambda name: blobs.read_basis(files[name], name), list(files), threads)
                known = self._bases.keep(self._heads.basis_key(number), dict(zip(files, read, strict=True)))
            return dict(known)

    def renewed(self, number: int) -> dict[str, ModuleBasis]:
        """The renewed bases, by their names; no other is read."""
        names = [name for name in self.homes(number) if is_renewed(name)]
        return dict(zip(names, in_order(lambda name: self.module_basis(number, name), names, AT_ONCE), strict=True))

    def remember_basis(self, number: int) -> None:
        """Read all bases into memory if they are small: a reader of all modules may need them again soon."""
        if sum(n * k_out + d * k_in for (n, d), (k_out, k_in) in self.shapes(number).values()) < SMALL_BASIS:
            self.basis(number)

    def take_basis(self, number: int) -> dict[str, ModuleBasis]:
        """Remove a version's basis from memory and return it: a merge then frees it module by module."""
        with self._lock:
            return self._bases.pop(self._heads.basis_key(number)) or {}

    # Coefficients

    def task(self, number: int, task_id: str, modules: Collection[str] | None = None) -> dict[str, TaskBlock]:
        """One task's coefficients in the basis of a version, per module it adapts, float64; no other task is read.

        Args:
            modules: Only of these modules, whichever basis they are in.

        The result is a fixed function of the stored bytes, whatever is in memory: the same bits for every caller.
        """
        with self._lock:
            line = self._heads.lineage(number)
            birth = max(i for i, v in enumerate(line) if any(task.task_id == task_id for task in v.brought))
            start = max((i for i in range(birth, len(line)) if line[i].snapshot is not None), default=birth)
            snapshot = line[start].snapshot
            ref = snapshot or next(t.coefficients for t in line[birth].brought if t.task_id == task_id)
            file = self._heads.file(ref, COEFFICIENTS)
            brought = next(task for task in line[birth].brought if task.task_id == task_id)
            is_whole = brought.private is not None and task_id not in file.info["tasks"]  # it has no coefficients
            found = {} if is_whole else blobs.read_coefficients(file, task_id)
            blocks = {name: one.moved(None) for name, one in found.items() if modules is None or plain(name) in modules}
            self._heads.fetch(line[start + 1 :], coefficients=False)
            for version in line[start + 1 :]:
                transports = self._transport(version)
                blocks = {name: one.moved(transports.get(name)) for name, one in blocks.items()}
            return blocks

    def tasks(self, number: int) -> dict[str, ModuleTasks]:
        """All tasks' coefficients in a version's basis, from the nearest version that is in memory or in a snapshot."""
        with self._lock:
            line = self._heads.lineage(number)
            start = next((i for i in reversed(range(len(line))) if self._at_hand(line[i])), -1)
            tasks: dict[str, ModuleTasks] = {}
            if start >= 0:
                known, nearest = self._tasks.get(line[start].number), line[start].snapshot
                if known is not None:
                    tasks = known
                elif nearest is not None:
                    file = TensorFile(self._heads.storage, nearest, COEFFICIENTS)
                    tasks = {name: ModuleTasks.of(block) for name, block in blobs.read_all_coefficients(file).items()}
            rest = line[start + 1 :]
            files = coefficient_files(rest)
            self._heads.fetch(rest)
            for version, refs in zip(rest, files, strict=True):
                arrivals = [blobs.read_all_coefficients(self._heads.file(ref, COEFFICIENTS)) for ref in refs]
                gone = [*version.left, *(task.task_id for task in version.refined)]
                tasks = moved(tasks, self._transport(version), arrivals, gone)
            return self._tasks.keep(number, tasks) if number else tasks

    def module(self, number: int, module: str) -> ModuleSubspace:
        """One module with all its tasks."""
        return ModuleSubspace(self.module_basis(number, module), self.tasks(number).get(module, ModuleTasks()))

    # Private parts

    def private(self, task: MergedTask, modules: Collection[str] | None = None) -> dict[str, ModuleUpdate]:
        """A task's private parts, by module; only of these modules, where they are named."""
        if task.private is None:
            return {}
        file = self._heads.file(task.private, PRIVATE)
        return {name: blobs.read_private(file, name) for name in file.parts if modules is None or name in modules}

    def private_by_module(
        self, tasks: Collection[MergedTask], modules: Collection[str] | None = None
    ) -> dict[str, dict[str, ModuleUpdate]]:
        """Module to task id to private part, of those of the tasks that have some."""
        some = [task for task in tasks if task.private is not None]
        found: dict[str, dict[str, ModuleUpdate]] = {}
        for task, parts in zip(some, in_order(lambda t: self.private(t, modules), some, AT_ONCE), strict=True):
            for name, update in parts.items():
                found.setdefault(name, {})[task.task_id] = update
        return found

    def keep(self, number: int, bases: dict[str, ModuleBasis], tasks: dict[str, ModuleTasks]) -> None:
        """Keep in memory what a merge has just written."""
        with self._lock:
            if bases:  # Else the merge did not have all of them: the next reader reads them.
                self._bases.keep(self._heads.basis_key(number), bases)
            self._tasks.keep(number, tasks)

    # Files

    def _at_hand(self, version: Version) -> bool:
        return self._tasks.get(version.number) is not None or version.snapshot is not None

    def _transport(self, version: Version) -> dict[str, Transport]:
        known = self._transports.get(version.number) if version.transport is not None else {}
        if known is None:
            assert version.transport is not None
            known = blobs.read_transports(self._heads.file(version.transport, TRANSPORT))
            self._transports.keep(version.number, known)
        return known


def moved(
    before: Mapping[str, ModuleTasks],
    transports: Mapping[str, Transport],
    arrivals: Collection[Mapping[str, TaskBlock]],
    gone: Collection[str] = (),
) -> dict[str, ModuleTasks]:
    """Coefficients of one version from those of its parent.

    Args:
        gone: Ids of the parent's tasks whose coefficients are not taken over: they left, or were refined.
    """
    before = without(before, gone)
    after = {name: tasks.moved(transports[name]) if name in transports else tasks for name, tasks in before.items()}
    for arrival in arrivals:
        for name, block in arrival.items():
            after[name] = after.get(name, ModuleTasks()).joined(block)
    return after


def without(tasks: Mapping[str, ModuleTasks], gone: Collection[str]) -> Mapping[str, ModuleTasks]:
    """The coefficients of all tasks but these, which are not looked at otherwise; the others' stay as they are."""
    return {name: block.without(gone) for name, block in tasks.items()} if gone else tasks


def _basis_bytes(bases: dict[str, ModuleBasis]) -> int:
    return sum(4 * (basis.p_NK.numel() + basis.q_DK.numel()) for basis in bases.values())


def _transport_bytes(transports: dict[str, Transport]) -> int:
    return sum(8 * (transport.out.numel() + transport.inward.numel()) for transport in transports.values())
