"""Reading a subspace: any version's bases, coefficients and tasks. Needs no Ray and no permission to write.

A reader resolves a branch to a version once and then reads that version, which never changes, while the writer goes
on. Nothing here writes to storage.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from configs.errors import NotFound
from subspace_store import blobs, version_log
from subspace_store.adapter import Adapter, adapter_from_bytes
from subspace_store.merge import ModuleBasis, ModuleSubspace, ModuleTasks, reconstruct
from subspace_store.storage import Storage
from subspace_store.subspace_math import overlap
from subspace_store.version import MAIN, MergedTask, SubspaceState, Version
from subspace_store.version_log import VersionLog

VERSIONS_IN_MEMORY = 3
"""Versions whose coefficients stay in memory: main, candidate, and one that is being looked at."""
READS_AT_ONCE = 8
BYTES_PER_NUMBER = 4
"""Everything is served as float32."""


@dataclass(frozen=True)
class VersionDiff:
    """What lies between two versions.

    Args:
        ranks: Module to (k_out, k_in) in the old and in the new version; (0, 0) where it is not open.
        overlap: Module to ‖P'ᵀP‖²_F/k of outputs and inputs: the share of the old directions that the new basis spans.
        drift_bound: Task id, for tasks in both, to a bound on ‖ΔŴ_old − ΔŴ_new‖_F / ‖ΔW‖_F: the sum of the drifts on
            the way from one to the other through their last common ancestor.
    """

    old: int
    new: int
    added: tuple[MergedTask, ...]
    removed: tuple[MergedTask, ...]
    ranks: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    overlap: Mapping[str, tuple[float, float]]
    drift_bound: Mapping[str, float]


@dataclass(frozen=True)
class Footprint:
    """Numbers that serving needs, all as float32. Heads are the same in every column and counted apart."""

    version: int
    tasks: int
    basis_numbers: int
    coefficient_numbers: int
    head_numbers: int
    separate_numbers: int
    """The same tasks as separate LoRAs: Σ r·(n+d)."""

    @property
    def total_numbers(self) -> int:
        """Basis and coefficients: what replaces the separate LoRAs."""
        return self.basis_numbers + self.coefficient_numbers

    @property
    def basis_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.basis_numbers

    @property
    def coefficient_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.coefficient_numbers

    @property
    def head_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.head_numbers

    @property
    def total_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.total_numbers

    @property
    def separate_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.separate_numbers

    @property
    def ratio_with_basis(self) -> float:
        """Separate LoRAs over basis and coefficients; NaN for an empty version."""
        return self.separate_numbers / self.total_numbers if self.total_numbers else math.nan

    @property
    def ratio_coefficients_only(self) -> float:
        """Separate LoRAs over coefficients alone: the flattering number, never to be shown without the other."""
        return self.separate_numbers / self.coefficient_numbers if self.coefficient_numbers else math.nan


@dataclass(frozen=True)
class HistoryEntry:
    """One line of the log, for people."""

    seq: int
    time: float
    epoch: int
    writer: str
    actor: str
    op: str
    summary: str


class SubspaceReader:
    """What can be asked of a subspace. `SubspaceStore.open` without a writer gives one that cannot write."""

    def __init__(self, storage: Storage, log: VersionLog) -> None:
        self.storage = storage
        self._log = log
        self._tasks: OrderedDict[int, dict[str, ModuleTasks]] = OrderedDict()
        self._bases: OrderedDict[int, dict[str, ModuleBasis]] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def state(self) -> SubspaceState:
        """What the log said when it was last read."""
        return self._log.state

    def resolve(self, ref: str | int) -> int:
        """The version that a branch, a tag or a number names now: take it once, then read that version.

        Raises:
            NotFound: Nothing of this name.
        """
        return self.state.resolve(ref)

    def refresh(self) -> SubspaceState:
        """Read what was added to the log since. One small read if nothing was."""
        return self._log.refresh()

    def adapter(self, task_id: str, version: int | None = None) -> Adapter:
        """A task as a version holds it: P·E·Fᵀ·Qᵀ per module in canonical form, with its own head.

        Args:
            version: Default `main`.

        Raises:
            NotFound: The version does not hold the task.
        """
        number, task = self._find(task_id, version)
        delivered = self._read_delivered(task)
        modules = reconstruct(self._subspace(number), task_id)
        return Adapter(delivered.base_model, delivered.base_sha256, modules, delivered.head, delivered.info)

    def delivered(self, task_id: str) -> Adapter:
        """A task's adapter as it was handed over; the newest, if it was merged more than once."""
        births = [task for v in self.state.versions.values() for task in v.added if task.task_id == task_id]
        if not births:
            raise NotFound(f"no version ever held the task {task_id}", self.storage.url)
        return self._read_delivered(max(births, key=lambda task: task.version))

    def basis(self, version: int | None = None) -> dict[str, ModuleBasis]:
        """P, Q and λ per module at a version, default `main`; nothing at version 0."""
        number = self.state.refs[MAIN] if version is None else self._known(version)
        with self._lock:
            return dict(self._basis(number))

    def subspace(self, version: int | None = None) -> dict[str, ModuleSubspace]:
        """Everything at a version, default `main`: bases and all tasks' coefficients, per module."""
        return self._subspace(self.state.refs[MAIN] if version is None else self._known(version))

    def diff(self, old: int, new: int) -> VersionDiff:
        """What lies between two versions; see `VersionDiff`."""
        state = self.state
        old_tasks, new_tasks = (state.tasks_at(self._known(number)) for number in (old, new))
        old_basis, new_basis = self.basis(old), self.basis(new)
        # The same task merged twice is two births: only the same birth can drift.
        same = {task for task, merged in old_tasks.items() if new_tasks.get(task) == merged}
        common = max({v.number for v in state.lineage(old)} & {v.number for v in state.lineage(new)}, default=0)
        return VersionDiff(
            old,
            new,
            tuple(merged for task, merged in new_tasks.items() if task not in same),
            tuple(merged for task, merged in old_tasks.items() if task not in same),
            ranks={
                name: (_ranks(old_basis, name), _ranks(new_basis, name)) for name in sorted({*old_basis, *new_basis})
            },
            overlap={
                name: (overlap(basis.p_NK, new_basis[name].p_NK), overlap(basis.q_DK, new_basis[name].q_DK))
                for name, basis in sorted(old_basis.items())
                if name in new_basis
            },
            drift_bound={
                task: state.drift_bound(task, common, old) + state.drift_bound(task, common, new)
                for task in old_tasks
                if task in same
            },
        )

    def footprint(self, version: int | None = None) -> Footprint:
        """Numbers that serving a version needs, beside separate LoRAs of the same tasks."""
        number = self.state.refs[MAIN] if version is None else self._known(version)
        tasks = self.state.tasks_at(number).values()
        modules = self._subspace(number).values()
        return Footprint(
            number,
            len(tasks),
            basis_numbers=sum(m.basis.p_NK.numel() + m.basis.q_DK.numel() for m in modules),
            coefficient_numbers=sum(m.tasks.e_KS.numel() + m.tasks.f_KS.numel() for m in modules),
            head_numbers=sum(task.head_count for task in tasks),
            separate_numbers=sum(task.parameter_count for task in tasks),
        )

    def history(self) -> list[HistoryEntry]:
        """The log for people, oldest first. Reads every record."""
        return [HistoryEntry(r.seq, r.time, r.epoch, r.writer, r.actor, r.op, _summary(r)) for r in self._log.records()]

    # Versions in memory

    def _subspace(self, number: int) -> dict[str, ModuleSubspace]:
        with self._lock:
            basis, tasks = self._basis(number), self._coefficients(number)
            return {name: ModuleSubspace(basis[name], tasks[name]) for name in basis}

    def _basis(self, number: int) -> dict[str, ModuleBasis]:
        if number == 0:
            return {}
        if number not in self._bases:
            ref = self.state.versions[number].basis
            content = blobs.read_blob(self.storage, ref)
            self._keep(self._bases, number, blobs.basis_from_bytes(content, f"{self.storage.url}/{ref.key}"))
        return self._bases[number]

    def _coefficients(self, number: int) -> dict[str, ModuleTasks]:
        """All tasks' coefficients in a version's basis, from the nearest version that is at hand."""
        line = list(self.state.lineage(number))
        start = next((i for i in reversed(range(len(line))) if self._at_hand(line[i])), -1)
        tasks: dict[str, ModuleTasks] = {}
        if start >= 0:
            nearest = line[start]
            if nearest.number in self._tasks:
                tasks = self._tasks[nearest.number]
            elif nearest.snapshot is not None:
                tasks = blobs.tasks_from_bytes(blobs.read_blob(self.storage, nearest.snapshot), nearest.snapshot.key)
        rest = line[start + 1 :]
        refs = [ref for v in rest for ref in (v.transport, *(task.coefficients for task in v.added))]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            contents = dict(zip(refs, pool.map(lambda ref: blobs.read_blob(self.storage, ref), refs), strict=True))
        for version in rest:
            transports = blobs.transport_from_bytes(contents[version.transport], version.transport.key)
            arrivals = [
                blobs.tasks_from_bytes(contents[task.coefficients], task.coefficients.key) for task in version.added
            ]
            tasks = blobs.move_tasks(tasks, transports, arrivals)
        if number:
            self._keep(self._tasks, number, tasks)
        return tasks

    def _at_hand(self, version: Version) -> bool:
        return version.number in self._tasks or version.snapshot is not None

    @staticmethod
    def _keep(cache: OrderedDict[int, Any], number: int, value: Any) -> None:
        cache[number] = value
        cache.move_to_end(number)
        while len(cache) > VERSIONS_IN_MEMORY:
            cache.popitem(last=False)

    # Looking things up

    def _known(self, version: int) -> int:
        if version and version not in self.state.versions:
            raise NotFound(
                f"there is no version {version}", self.storage.url, f"{len(self.state.versions)} versions exist"
            )
        if version in self.state.expired:
            raise NotFound(f"version {version} has expired", self.storage.url, "pin what you need for long")
        return version

    def _find(self, task_id: str, version: int | None) -> tuple[int, MergedTask]:
        number = self.state.refs[MAIN] if version is None else self._known(version)
        tasks = self.state.tasks_at(number)
        if task_id not in tasks:
            raise NotFound(f"version {number} holds no task {task_id}", self.storage.url)
        return number, tasks[task_id]

    def _read_delivered(self, task: MergedTask) -> Adapter:
        content = blobs.read_blob(self.storage, task.adapter)
        return adapter_from_bytes(content, f"{self.storage.url}/{task.adapter.key}")


def _ranks(bases: Mapping[str, ModuleBasis], name: str) -> tuple[int, int]:
    return bases[name].ranks if name in bases else (0, 0)


def _summary(record: version_log.Record) -> str:
    """The record's body in one line."""
    body = record.body
    if record.op == version_log.MERGE:
        names = ", ".join(task["name"] for task in body["version"]["added"])
        return f"version {body['version']['number']}: {names}"
    if record.op == version_log.SCORES:
        return f"version {body['version']}: {len(body['scores'])} scores"
    if record.op == version_log.REJECT:
        return f"version {body['version']}: {body['reason']}"
    if record.op == version_log.ROLLBACK:
        return f"version {body['from']} → {body['version']}" + (f": {body['reason']}" if body["reason"] else "")
    if record.op == version_log.ACQUIRE:
        return f"epoch {record.epoch}"
    if record.op == version_log.EXPIRE:
        return f"versions {', '.join(map(str, body['versions']))}"
    if record.op == version_log.PIN and body["until"] is not None:
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(body["until"]))
        return f"version {body['version']}: {body['owner']}, until {until} UTC"
    if record.op == version_log.DROP_ADAPTERS:
        return f"{len(body['heads'])} adapters"
    about = [f"version {body['version']}"] if "version" in body else []
    return ": ".join(about + [body[key] for key in ("name", "task_id", "owner", "reason") if body.get(key)])
