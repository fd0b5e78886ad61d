"""The tensors of a version, from its files or from memory: bases per module, coefficients per task.

A version's basis file has the modules that its merge touched; for the others its head names the version that has them.
Coefficients stay where their task's birth or the last snapshot wrote them, and move by the transports since. Safe for
threads; memory is bounded by bytes, so that nothing here grows with the number of versions that are looked at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

from subspace_store.files import blobs
from subspace_store.files.tensor_file import SMALL_BYTES, TensorFile
from subspace_store.log.version import BlobRef, SubspaceState, Version
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock, Transport
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.protocol import Storage

BASES_BYTES = 2**30
"""Bases that stay in memory: several versions of a small model, the newest one of a 7B model."""
TRANSPORTS_BYTES = 2**28
SMALL_BASIS = 2**25
"""Numbers of a basis that is read whole, whoever asks for a task: 128 MiB."""
VERSIONS = 3
"""Versions whose coefficients stay in memory: main, candidate, and one that is being looked at."""
FILES = 256
"""Opened files; each holds its head, and its content below a megabyte."""

V = TypeVar("V")


class VersionTensors:
    """Reads versions of one subspace.

    Args:
        state: Gives the state to look versions up in; versions never change, so any later one will do.
    """

    def __init__(self, storage: Storage, state: Callable[[], SubspaceState]) -> None:
        self._storage = storage
        self._state = state
        self._files: _Recent[TensorFile] = _Recent(FILES)
        self._bases: _Recent[dict[str, ModuleBasis]] = _Recent(BASES_BYTES, _basis_bytes)
        self._transports: _Recent[dict[str, Transport]] = _Recent(TRANSPORTS_BYTES, _transport_bytes)
        self._tasks: _Recent[dict[str, ModuleTasks]] = _Recent(VERSIONS)
        self._lock = threading.RLock()

    # Bases

    def homes(self, number: int) -> dict[str, int]:
        """Every open module to the version whose file has its basis. One small read."""
        if not number:
            return {}
        file = self._basis_file(number)
        return dict(sorted({**dict.fromkeys(file.parts, number), **file.info["elsewhere"]}.items()))

    def shapes(self, number: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """Every open module to ((N, D), (k_out, k_in)), from the heads of files alone."""
        found = {}
        for name, home in self.homes(number).items():
            shapes = self._basis_file(home).shapes(name)
            (n, k_out), (d, k_in) = shapes["p"], shapes["q"]
            found[name] = (n, d), (k_out, k_in)
        return found

    def module_basis(self, number: int, module: str) -> ModuleBasis:
        """One module's basis; nothing else is read."""
        with self._lock:
            known = self._bases.get(self._basis_key(number))
            file = self._basis_file(self.homes(number)[module])
        return blobs.read_basis(file, module) if known is None else known[module]

    def basis(self, number: int) -> dict[str, ModuleBasis]:
        """All modules' bases, kept in memory for the next who asks."""
        with self._lock:
            known = self._bases.get(self._basis_key(number))
            if known is None:
                files = {name: self._basis_file(home) for name, home in self.homes(number).items()}
                threads = AT_ONCE if any(file.ref.size_bytes > SMALL_BYTES for file in files.values()) else 1
                read = in_order(lambda name: blobs.read_basis(files[name], name), list(files), threads)
                known = self._bases.keep(self._basis_key(number), dict(zip(files, read, strict=True)))
            return dict(known)

    def remember_basis(self, number: int) -> None:
        """Read all bases into memory, if a reader of all modules may want them again soon: those of small models."""
        if sum(n * k_out + d * k_in for (n, d), (k_out, k_in) in self.shapes(number).values()) < SMALL_BASIS:
            self.basis(number)

    def take_basis(self, number: int) -> dict[str, ModuleBasis]:
        """What memory holds of a version's basis, and memory forgets it: a merge lets go of it module by module."""
        with self._lock:
            return self._bases.pop(self._basis_key(number)) or {}

    # Coefficients

    def task(self, number: int, task_id: str, modules: Collection[str] | None = None) -> dict[str, TaskBlock]:
        """One task's coefficients in the basis of a version, per module it adapts, float64; no other task is read.

        A fixed function of what is stored, whatever memory holds: a version's task has the same bits for everybody.
        """
        with self._lock:
            line = self._state().lineage(number)
            birth = max(i for i, v in enumerate(line) if any(task.task_id == task_id for task in v.brought))
            start = max((i for i in range(birth, len(line)) if line[i].snapshot is not None), default=birth)
            snapshot = line[start].snapshot
            ref = snapshot or next(t.coefficients for t in line[birth].brought if t.task_id == task_id)
            found = blobs.read_coefficients(self._file(ref, blobs.COEFFICIENTS), task_id)
            blocks = {name: one.moved(None) for name, one in found.items() if modules is None or name in modules}
            self._fetch(line[start + 1 :], coefficients=False)
            for version in line[start + 1 :]:
                transports = self._transport(version)
                blocks = {name: one.moved(transports.get(name)) for name, one in blocks.items()}
            return blocks

    def tasks(self, number: int) -> dict[str, ModuleTasks]:
        """All tasks' coefficients in a version's basis, from the nearest version that is at hand."""
        with self._lock:
            line = self._state().lineage(number)
            start = next((i for i in reversed(range(len(line))) if self._at_hand(line[i])), -1)
            tasks: dict[str, ModuleTasks] = {}
            if start >= 0:
                known, nearest = self._tasks.get(line[start].number), line[start].snapshot
                if known is not None:
                    tasks = known
                elif nearest is not None:
                    file = TensorFile(self._storage, nearest, blobs.COEFFICIENTS)
                    tasks = {name: ModuleTasks.of(block) for name, block in blobs.read_all_coefficients(file).items()}
            rest = line[start + 1 :]
            self._fetch(rest, coefficients=True)
            for version in rest:
                files = [self._file(ref, blobs.COEFFICIENTS) for ref in _coefficients(version)]
                arrivals = [blobs.read_all_coefficients(file) for file in files]
                refined = [task.task_id for task in version.refined]
                tasks = moved(tasks, self._transport(version), arrivals, refined)
            return self._tasks.keep(number, tasks) if number else tasks

    def module(self, number: int, module: str) -> ModuleSubspace:
        """One module with all its tasks."""
        return ModuleSubspace(self.module_basis(number, module), self.tasks(number).get(module, ModuleTasks()))

    def keep(self, number: int, bases: dict[str, ModuleBasis], tasks: dict[str, ModuleTasks]) -> None:
        """Remember what a merge just wrote."""
        with self._lock:
            if bases:  # Else the merge did not have them all: the next who asks reads them.
                self._bases.keep(self._basis_key(number), bases)
            self._tasks.keep(number, tasks)

    # Files

    def _at_hand(self, version: Version) -> bool:
        return self._tasks.get(version.number) is not None or version.snapshot is not None

    def _basis_key(self, number: int) -> str:
        """A refined version has its parent's basis: in memory it is the same one."""
        return self._state().versions[number].basis.key if number else ""

    def _basis_file(self, number: int) -> TensorFile:
        return self._file(self._state().versions[number].basis, blobs.BASIS)

    def _transport(self, version: Version) -> dict[str, Transport]:
        known = self._transports.get(version.number) if version.transport is not None else {}
        if known is None:
            assert version.transport is not None
            known = blobs.read_transports(self._file(version.transport, blobs.TRANSPORT))
            self._transports.keep(version.number, known)
        return known

    def _file(self, ref: BlobRef, kind: str) -> TensorFile:
        with self._lock:
            known = self._files.get(ref.key)
            return self._files.keep(ref.key, TensorFile(self._storage, ref, kind)) if known is None else known

    def _fetch(self, versions: Collection[Version], coefficients: bool) -> None:
        """Open the files of several versions at once, where waiting for each in turn would add up."""
        wanted = {v.transport.key: (v.transport, blobs.TRANSPORT) for v in versions if v.transport is not None}
        if coefficients:
            wanted |= {ref.key: (ref, blobs.COEFFICIENTS) for v in versions for ref in _coefficients(v)}
        missing = [item for key, item in wanted.items() if self._files.get(key) is None]
        threads = AT_ONCE if len(missing) >= AT_ONCE else 1
        for file in in_order(lambda item: TensorFile(self._storage, *item), missing, threads):
            self._files.keep(file.ref.key, file)


def moved(
    before: Mapping[str, ModuleTasks],
    transports: Mapping[str, Transport],
    arrivals: Collection[Mapping[str, TaskBlock]],
    refined: Collection[str] = (),
) -> dict[str, ModuleTasks]:
    """Coefficients of one version from those of its parent. `refined`: arrivals that were there before, as others."""
    before = {name: tasks.without(refined) for name, tasks in before.items()} if refined else before
    after = {name: tasks.moved(transports[name]) if name in transports else tasks for name, tasks in before.items()}
    for arrival in arrivals:
        for name, block in arrival.items():
            after[name] = after.get(name, ModuleTasks()).joined(block)
    return after


def _coefficients(version: Version) -> list[BlobRef]:
    """The files with the coefficients of the tasks that a version brought; several tasks share one."""
    return list(dict.fromkeys(task.coefficients for task in version.brought))


def _basis_bytes(bases: dict[str, ModuleBasis]) -> int:
    return sum(4 * (basis.p_NK.numel() + basis.q_DK.numel()) for basis in bases.values())


def _transport_bytes(transports: dict[str, Transport]) -> int:
    return sum(8 * (transport.out.numel() + transport.inward.numel()) for transport in transports.values())


class _Recent(Generic[V]):
    """The most recently used values up to a total size; the newest stays whatever its size."""

    def __init__(self, limit: int, size: Callable[[V], int] = lambda value: 1) -> None:
        self._limit, self._size = limit, size
        self._values: OrderedDict[int | str, tuple[V, int]] = OrderedDict()
        self._total = 0

    def get(self, key: int | str) -> V | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def keep(self, key: int | str, value: V) -> V:
        self.pop(key)
        self._values[key] = (value, self._size(value))
        self._total += self._values[key][1]
        while self._total > self._limit and len(self._values) > 1:
            self.pop(next(iter(self._values)))
        return value

    def pop(self, key: int | str) -> V | None:
        value, size = self._values.pop(key, (None, 0))
        self._total -= size
        return value
