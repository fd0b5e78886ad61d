"""What the heads of a version's files say: which bases there are, their shapes and ranks. No tensor is read.

Bases go by their names (module_names.py): a module's own for the first one, `@2` after it for the renewed one.

A version's basis file holds the modules that its merge changed; for the others its head names the version that holds
them. Works without torch, so that listing versions starts quickly.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from subspace_store.files.tensor_file import TensorFile
from subspace_store.log.version import BlobRef, SubspaceState, Version, still_held
from subspace_store.module_names import plain
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    import numpy as np

BASIS = "onebasis-basis-2"
TRANSPORT = "onebasis-transport-2"
COEFFICIENTS = "onebasis-coefficients-2"
PRIVATE = "onebasis-private-1"
"""Kinds of tensor files."""

FILES = 256
"""Number of opened files that are kept; each holds its head, and its content if that is below a megabyte."""

V = TypeVar("V")


class VersionHeads:
    """Reads the heads of versions of one subspace. Safe for threads.

    Args:
        state: Gives the state in which versions are looked up; versions never change, so any later state will do.
    """

    def __init__(self, storage: Storage, state: Callable[[], SubspaceState]) -> None:
        self.storage = storage
        self._state = state
        self._files: Recent[TensorFile] = Recent(FILES)
        self._lock = threading.RLock()

    def lineage(self, number: int) -> tuple[Version, ...]:
        """The versions from the first to this one."""
        return self._state().lineage(number)

    def basis_key(self, number: int) -> str:
        """The key of the object with a version's basis. A refined version shares that of its parent."""
        return self._state().versions[number].basis.key if number else ""

    def homes(self, number: int) -> dict[str, int]:
        """Every basis to the version whose file holds it. One small read."""
        if not number:
            return {}
        file = self.basis_file(number)
        return dict(sorted({**dict.fromkeys(file.parts, number), **file.info["elsewhere"]}.items()))

    def shapes(self, number: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """Every basis to ((N, D), (k_out, k_in))."""
        found = {}
        for name, home in self.homes(number).items():
            shapes = self.basis_file(home).shapes(name)
            (n, k_out), (d, k_in) = shapes["p"], shapes["q"]
            found[name] = (n, d), (k_out, k_in)
        return found

    def module_shapes(self, number: int) -> dict[str, tuple[int, int]]:
        """Every module that has a basis to (N, D)."""
        return {plain(name): shape for name, (shape, _) in self.shapes(number).items()}

    def layouts(self, number: int) -> dict[str, list[tuple[str, int]]]:
        """Every task that has coefficients to the bases in which it has them, each with its rank there; a merge changes
        no task's rank.

        Cost:
            The heads of the coefficients' files since the last snapshot.
        """
        with self._lock:
            line = self.lineage(number)
            start = max((index for index, version in enumerate(line) if version.snapshot is not None), default=-1)
            snapshot = line[start].snapshot if start >= 0 else None
            layouts = _layouts(self.file(snapshot, COEFFICIENTS)) if snapshot is not None else {}
            rest = line[start + 1 :]
            files = coefficient_files(rest)
            self.fetch(rest, transports=False)
            for version, refs in zip(rest, files, strict=True):
                # Those that left; and those that were refined, which may be private altogether now.
                for task_id in (*version.left, *(task.task_id for task in version.refined)):
                    layouts.pop(task_id, None)
                for ref in refs:
                    layouts |= _layouts(self.file(ref, COEFFICIENTS))
        return layouts

    def basis_arrays(self, number: int, module: str) -> dict[str, np.ndarray[Any, Any]]:
        """P and Q of one module (`p`, `q`, float32), for a reader without torch. Their digest is checked."""
        return self.basis_file(self.homes(number)[module]).arrays(module)

    def basis_file(self, number: int) -> TensorFile:
        """The file that a version wrote its basis to, or that it shares with its parent."""
        return self.file(self._state().versions[number].basis, BASIS)

    def file(self, ref: BlobRef, kind: str) -> TensorFile:
        """A file by its name in the log; it stays open for later calls."""
        with self._lock:
            known = self._files.get(ref.key)
            return self._files.keep(ref.key, TensorFile(self.storage, ref, kind)) if known is None else known

    def fetch(self, versions: Sequence[Version], *, transports: bool = True, coefficients: bool = True) -> None:
        """Open the files of the end of a lineage at once, where waiting for each in turn would add up."""
        wanted: dict[str, tuple[BlobRef, str]] = {}
        if transports:
            wanted |= {v.transport.key: (v.transport, TRANSPORT) for v in versions if v.transport is not None}
        if coefficients:
            wanted |= {ref.key: (ref, COEFFICIENTS) for refs in coefficient_files(versions) for ref in refs}
        with self._lock:
            missing = [item for key, item in wanted.items() if self._files.get(key) is None]
            threads = AT_ONCE if len(missing) >= AT_ONCE else 1
            for file in in_order(lambda item: TensorFile(self.storage, *item), missing, threads):
                self._files.keep(file.ref.key, file)


def coefficient_files(line: Sequence[Version]) -> list[list[BlobRef]]:
    """Of each version at the end of a lineage the files with the coefficients of the tasks that it brought and that the
    last one holds. Several tasks share a file; those of tasks that left are not needed, and may be gone."""
    return [list(dict.fromkeys(task.coefficients for task in tasks)) for tasks in still_held(line)]


def task_layout(info: Mapping[str, Any], task: str) -> list[tuple[str, int]]:
    """(module, rank) of a task in the order of its numbers, from the head of a coefficients file."""
    return [(name, rank) for name, rank in info["layouts"][info["tasks"][task]]]


def _layouts(file: TensorFile) -> dict[str, list[tuple[str, int]]]:
    return {task: task_layout(file.info, task) for task in file.info["tasks"]}


class Recent(Generic[V]):
    """The most recently used values up to a total size; the newest stays even if it is larger."""

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
