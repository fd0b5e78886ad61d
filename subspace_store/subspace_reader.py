"""Reading a subspace: any version's bases, coefficients and tasks. Needs no Ray and no permission to write.

A reader finds the version of a branch once and then reads that version, which never changes, while the writer goes on.
Nothing here writes to storage. Only functions that compute with tensors import torch: its import takes seconds, and
listing versions, their ranks and their tasks does not need it.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from configs.document import Line, VersionNumber
from configs.errors import Conflict, Corrupt, InvalidInput, NotFound
from configs.settings import SubspaceSettings
from subspace_store.files.version_heads import VersionHeads
from subspace_store.log import fold, garbage, retention
from subspace_store.log.branch_moves import BranchMoves
from subspace_store.log.removal import remakes, revisions_along, start_of_remakes
from subspace_store.log.retention import tasks_alive
from subspace_store.log.store_format import check_format
from subspace_store.log.version import CANDIDATE, MAIN, MergedTask, SubspaceState
from subspace_store.log.version_log import VersionLog
from subspace_store.merging.overlap import overlap
from subspace_store.module_names import is_renewed, newest, plain
from subspace_store.parallel import in_order
from subspace_store.storage.protocol import Storage
from subspace_store.strict import LATEST, strict

if TYPE_CHECKING:
    from torch import Tensor

    from subspace_store.adapter import Adapter, ModuleUpdate
    from subspace_store.files.version_tensors import VersionTensors
    from subspace_store.forecast import Forecast
    from subspace_store.merging.basis import ModuleBasis, ModuleSubspace

DEFAULTS = SubspaceSettings()

BYTES_PER_NUMBER = 4
"""Size of a float32: every number that serving needs is one."""


@dataclass(frozen=True, kw_only=True)
class VersionDiff:
    """The differences between two versions.

    Args:
        ranks: Module to (k_out, k_in) in the old and in the new version; (0, 0) where the module has no basis.
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

    @property
    def revised(self) -> tuple[tuple[MergedTask, MergedTask], ...]:
        """Revisions of one task, in the old version and in the new: both are in `removed` and `added` as well."""
        return exchanged(self.removed, self.added)


@dataclass(frozen=True)
class Footprint:
    """How many numbers have to be stored to serve all tasks. Heads are the same in every form and counted by
    themselves."""

    version: int
    tasks: int
    basis_numbers: int
    coefficient_numbers: int
    private_numbers: int
    """Numbers of all tasks' private parts."""
    head_numbers: int
    separate_numbers: int
    """Numbers of the same tasks as separate LoRAs: Σ r·(n+d)."""

    @property
    def total_numbers(self) -> int:
        """Numbers of basis, coefficients and private parts together, which replace the separate LoRAs."""
        return self.basis_numbers + self.coefficient_numbers + self.private_numbers

    @property
    def basis_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.basis_numbers

    @property
    def coefficient_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.coefficient_numbers

    @property
    def private_bytes(self) -> int:
        return BYTES_PER_NUMBER * self.private_numbers

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
        """Size of separate LoRAs divided by that of basis, coefficients and private parts; NaN for an empty version."""
        return self.separate_numbers / self.total_numbers if self.total_numbers else math.nan

    @property
    def ratio_coefficients_only(self) -> float:
        """Size of separate LoRAs divided by that of the coefficients alone. It is too favourable to stand alone: always
        show `ratio_with_basis` beside it."""
        return self.separate_numbers / self.coefficient_numbers if self.coefficient_numbers else math.nan


@dataclass(frozen=True, kw_only=True)
class TaskParts:
    """A task as a version holds it, not multiplied out: for those who answer for many tasks at once.

    Args:
        coefficients: Basis, named as by `SubspaceReader.ranks`, to (E, F), K×R each, float32: P·E·Fᵀ·Qᵀ.
        private: Module to private part, which is added to that.
        kept: The task's head and facts; its modules are not to be used.
    """

    task_id: str
    name: str
    version: int
    coefficients: Mapping[str, tuple[Tensor, Tensor]]
    private: Mapping[str, ModuleUpdate]
    kept: Adapter


@dataclass(frozen=True, kw_only=True)
class CompactionPreview:
    """The effect of merging all tasks at once."""

    version: int
    """The candidate."""
    tasks: int
    numbers_before: int
    """Numbers that serving it needs now, heads not counted."""
    numbers_after: int
    rank_max: int
    """Most directions that a module would have on one side."""


@dataclass(frozen=True, kw_only=True)
class RemovalPreview:
    """The effect of making the candidate again without a task."""

    revisions: tuple[str, ...]
    """Ids of the task and of its earlier revisions, which go with it; oldest first."""
    start: int
    """The version that it begins after; 0: the empty subspace."""
    versions: tuple[int, ...]
    """Numbers of the versions that would be made again, oldest first."""
    numbers_before: int
    """Numbers that serving the candidate needs now, heads not counted."""
    numbers_after: int
    """The same without the task. It can be more: directions that it brought into the basis may have served others."""


@dataclass(frozen=True, kw_only=True)
class RollbackPreview:
    """The effect of moving `main`."""

    from_version: int
    to_version: int
    vanishing: tuple[MergedTask, ...]
    """Tasks that `main` holds now and would not hold."""
    returning: tuple[MergedTask, ...]
    """Tasks that `main` does not hold now and would hold again."""

    @property
    def revised(self) -> tuple[tuple[MergedTask, MergedTask], ...]:
        """Revisions of one task, now and afterwards: the one vanishes and the other returns."""
        return exchanged(self.vanishing, self.returning)


@dataclass(frozen=True, kw_only=True)
class RestorePreview:
    """The effect of putting an earlier revision of a task back. No other task would move, unless `own_numbers_after`
    is None."""

    version: int
    """The candidate."""
    restored: MergedTask
    """The earlier revision, as it was merged or refined last."""
    leaving: MergedTask
    """The revision that the candidate holds."""
    error: float
    """‖ΔW − ΔŴ‖_F / ‖ΔW‖_F of the earlier revision in the candidate's basis, with its private part."""
    is_approximate: bool
    """Whether its adapter as delivered was let go: the error is against what the newest version with it has of it."""
    own_numbers_before: int
    """Numbers of the coefficients and private part of the revision that leaves."""
    own_numbers_after: int | None
    """The same of the one that would be back. None: it would be merged as a new task is, so that others may move as in
    any merge: under settings by which merges take from tasks, or where a compaction has left out a module that only
    this revision adapts."""


@dataclass(frozen=True, kw_only=True)
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
    """Everything that can be read from a subspace. `SubspaceStore` can also write."""

    def __init__(
        self, storage: Storage, log: VersionLog, base: tuple[str, str], settings: SubspaceSettings = DEFAULTS
    ) -> None:
        self.storage = storage
        self._log = log
        self.base_model, self.base_sha256 = base
        self.settings = settings
        self._heads = VersionHeads(storage, lambda: log.state)
        self._moves = BranchMoves(log)
        self._lock = threading.RLock()

    @classmethod
    @strict
    def open(
        cls, storage: Storage, *, settings: SubspaceSettings = DEFAULTS, base_model: Line = "", base_sha256: Line = ""
    ) -> SubspaceReader:
        """Open a subspace to read it: nothing is ever written, not even where the folder is empty.

        Args:
            settings: How merges are done, for `forecast`.
            base_model, base_sha256: Checked against the folder where both are known; empty is unknown.

        Raises:
            InvalidInput: The folder belongs to another base model, or has a format that is no longer read.
            Corrupt: The format is newer, or records of the log are missing.
        """
        base = check_format(storage, base_model, base_sha256)
        log = VersionLog(storage)
        log.open()
        return SubspaceReader(storage, log, base, settings)

    @cached_property
    def _tensors(self) -> VersionTensors:
        from subspace_store.files.version_tensors import VersionTensors

        return VersionTensors(self._heads)

    @strict
    def let_go(self) -> None:
        """Keep no tensors that were read: whoever asks again reads them again."""
        self.__dict__.pop("_tensors", None)

    @property
    def state(self) -> SubspaceState:
        """The state of the log when it was last read."""
        return self._log.state

    @strict
    def resolve(self, ref: Line | int) -> int:
        """The version that a branch, a tag or a number names now: resolve it once, then read that version.

        Raises:
            NotFound: There is no such branch, tag or version.
        """
        return self.state.resolve(ref)

    @strict
    def refresh(self) -> SubspaceState:
        """Read the records that were added to the log since the last read. One small read if there are none."""
        return self._log.refresh()

    @strict
    def adapter(
        self, task_id: Line, version: VersionNumber | None = None, modules: Sequence[str] | None = None
    ) -> Adapter:
        """A task as a version holds it: P·E·Fᵀ·Qᵀ and its private part, per module in canonical form, with its own
        head.

        Args:
            version: Default `main`.
            modules: Only these; default all that the task adapts.

        Raises:
            NotFound: The version does not hold the task, or the task does not adapt one of these modules.

        Cost:
            Reads the bases of these modules, the task's own coefficients and the transports since they were written,
            and no coefficients of other tasks.
        """
        from subspace_store.adapter import Adapter
        from subspace_store.merging.basis import reconstruct_module
        from subspace_store.merging.merge import threads
        from subspace_store.merging.private_part import with_private

        with self._reading(version) as number:
            task = self._find(task_id, number)
            kept = self._read_head(task)
            blocks = self._tensors.task(number, task_id, modules)
            private = self._tensors.private(task, modules)
            bases = {plain(basis): basis for basis in blocks}
            names = sorted({*bases, *private})
            if unknown := set(modules or ()) - set(names):
                raise NotFound(f"task {task.name} does not adapt {', '.join(sorted(unknown))}", self.storage.url)
            if modules is None:
                self._tensors.remember_basis(number)
            rows = sum(sum(shape) for name, (shape, _) in self._heads.shapes(number).items() if name in names)

            def update(name: str) -> ModuleUpdate:
                shared = None
                if (basis := bases.get(name)) is not None:
                    shared = reconstruct_module(self._tensors.module_basis(number, basis), blocks[basis])
                return with_private(shared, private.get(name))

            updates = in_order(update, names, threads(rows))
        return Adapter(kept.base_model, kept.base_sha256, dict(zip(names, updates, strict=True)), kept.head, kept.info)

    @strict
    def parts(self, task_id: Line, version: VersionNumber | None = None) -> TaskParts:
        """A task as a version holds it, default `main`, not multiplied out.

        Raises:
            NotFound: The version does not hold the task.

        Cost:
            Reads the task's own coefficients and private part, and the transports since they were written; no basis,
            and nothing of other tasks.
        """
        with self._reading(version) as number:
            task = self._find(task_id, number)
            blocks, kept = self._tensors.task(number, task_id), self._read_head(task)
            private = self._tensors.private(task)
        coefficients = {basis: (block.e_KS.float(), block.f_KS.float()) for basis, block in blocks.items()}
        return TaskParts(
            task_id=task_id, name=task.name, version=number, coefficients=coefficients, private=private, kept=kept
        )

    @strict
    def delivered(self, task_id: Line) -> Adapter:
        """A task's adapter as it was handed over; the newest, if it was merged more than once.

        Raises:
            NotFound: No live version holds the task, or the adapter was given up.
        """
        births = [task for task in tasks_alive(self.state) if task.task_id == task_id]
        if not births:
            raise NotFound(f"no version holds the task {task_id}", self.storage.url)
        return self._read_delivered(max(births, key=lambda task: task.version))

    @strict
    def ranks(self, version: VersionNumber | None = None) -> dict[str, tuple[int, int]]:
        """(k_out, k_in) per basis at a version, default `main`: by module, and `@2` after its name for a renewed one.
        Reads no tensors."""
        with self._reading(version) as number:
            return {name: ranks for name, (_, ranks) in self._heads.shapes(number).items()}

    @strict
    def homes(self, version: VersionNumber | None = None) -> dict[str, int]:
        """Basis, named as by `ranks`, to the version whose file holds it at a version, default `main`: the one that
        changed it last. Reads no tensors."""
        with self._reading(version) as number:
            return self._heads.homes(number)

    @strict
    def basis(self, version: VersionNumber | None = None) -> dict[str, ModuleBasis]:
        """P, Q and λ of each basis, named as by `ranks`, at a version, default `main`; nothing at version 0."""
        with self._reading(version) as number:
            return self._tensors.basis(number)

    @strict
    def training_ranks(self, version: VersionNumber | None = None) -> dict[str, tuple[int, int]]:
        """(k_out, k_in) of `training_basis`, per module. Reads no tensors."""
        ranks = self.ranks(version)
        return {module: ranks[name] for module, name in newest(ranks).items()}

    @strict
    def training_basis(self, version: VersionNumber | None = None) -> dict[str, ModuleBasis]:
        """The basis in which a task's coefficients are to be trained, per module at a version, default `main`: the
        renewed one where there is one. What is trained in it, and nothing beside it, costs its coefficients alone."""
        bases = self.basis(version)
        return {module: bases[name] for module, name in newest(bases).items()}

    @strict
    def basis_of(self, task_id: Line, version: VersionNumber | None = None) -> dict[str, ModuleBasis]:
        """The basis that holds a task, per module at a version, default `main`: the renewed one where the task has
        coefficients in that.

        Raises:
            NotFound: The version does not hold the task.
        """
        with self._reading(version) as number:
            self._find(task_id, number)
            bases, held = self._tensors.basis(number), self._tensors.task(number, task_id)
        names = {name: name for name in bases if not is_renewed(name)} | {plain(name): name for name in held}
        return {module: bases[name] for module, name in names.items()}

    @strict
    def renewed(self, version: VersionNumber | None = None) -> dict[str, ModuleSubspace]:
        """The renewed bases of a version, default `main`, named as by `ranks`, and no task in them: where a subspace
        begins that is made again."""
        from subspace_store.merging.renewal import without_tasks

        with self._reading(version) as number:
            return without_tasks(self._tensors.renewed(number))

    @strict
    def module(
        self, name: str, version: VersionNumber | None = None, private_of: Sequence[str] | None = None
    ) -> ModuleSubspace:
        """One module at a version, default `main`: its bases, and all tasks' coefficients in it.

        Args:
            name: Of the module; or of its renewed basis, for the tasks in that. Private parts come with the module.
            private_of: Ids of the tasks whose private parts are read; default all. Each is a file.

        Raises:
            NotFound: The version has no such module.
        """
        with self._reading(version) as number:
            if name not in self._heads.homes(number):
                raise NotFound(f"version {number} has no module {name}", self.storage.url)
            held = [
                task for id_, task in self.state.tasks_at(number).items() if private_of is None or id_ in private_of
            ]
            private = self._tensors.private_by_module(held, (name,)).get(name, {})
            return replace(self._tensors.module(number, name), private=private)

    @strict
    def subspace(self, version: VersionNumber | None = None) -> dict[str, ModuleSubspace]:
        """Everything at a version, default `main`: bases and all tasks' coefficients, named as by `ranks`."""
        from subspace_store.merging.basis import ModuleSubspace
        from subspace_store.merging.coefficients import ModuleTasks

        with self._reading(version) as number:
            tasks = self._tensors.tasks(number)
            private = self._tensors.private_by_module(self.state.tasks_at(number).values())
            return {
                name: ModuleSubspace(basis, tasks.get(name, ModuleTasks()), private.get(name, {}))
                for name, basis in self._tensors.basis(number).items()
            }

    @strict
    def diff(self, old: VersionNumber, new: VersionNumber) -> VersionDiff:
        """The differences between two versions; see `VersionDiff`."""
        state = self.state
        old_tasks, new_tasks = (state.tasks_at(self._known(number)) for number in (old, new))
        old_ranks, new_ranks = self.ranks(old), self.ranks(new)
        with self._reading(old), self._reading(new):
            overlaps = {name: self._overlap(old, new, name) for name in sorted(old_ranks) if name in new_ranks}
        # A task that was merged twice has two births; drift is measured from one birth alone.
        same = {task for task, merged in old_tasks.items() if new_tasks.get(task) == merged}
        common = max({v.number for v in state.lineage(old)} & {v.number for v in state.lineage(new)}, default=0)
        return VersionDiff(
            old=old,
            new=new,
            added=tuple(merged for task, merged in new_tasks.items() if task not in same),
            removed=tuple(merged for task, merged in old_tasks.items() if task not in same),
            ranks={
                name: (old_ranks.get(name, (0, 0)), new_ranks.get(name, (0, 0)))
                for name in sorted({*old_ranks, *new_ranks})
            },
            overlap=overlaps,
            drift_bound={
                task: state.drift_bound(task, common, old) + state.drift_bound(task, common, new)
                for task in old_tasks
                if task in same
            },
        )

    @strict
    def preview_rollback(self, version: VersionNumber) -> RollbackPreview:
        """The effect that `rollback` would have; changes nothing.

        Raises:
            NotFound: No such version. 0 is the empty subspace.
            InvalidInput: A version that was rejected or has expired, or that no gate has let pass yet.
        """
        return rollback_preview(self.state, self.state.refs[MAIN], self._allowed(version))

    @strict
    def preview_compact(self) -> CompactionPreview:
        """The effect that `SubspaceStore.compact` would have; changes nothing.

        Raises:
            InvalidInput: See `SubspaceStore.compact`.

        Cost:
            As `SubspaceStore.compact`, but for writing.
        """
        from subspace_store.merging.merge import merge_adapters

        with self._reading(self.state.refs[CANDIDATE]) as number:
            tasks = self.state.tasks_at(number)
            merge = merge_adapters(self.renewed(number), self._held(number), without_renewal(self.settings))
            return CompactionPreview(
                version=number,
                tasks=len(tasks),
                numbers_before=self.footprint(number).total_numbers,
                numbers_after=sum(module.numbers for module in merge.modules.values()),
                rank_max=max((max(module.basis.ranks) for module in merge.modules.values()), default=0),
            )

    @strict
    def preview_remove(self, task_id: Line) -> RemovalPreview:
        """The effect that `SubspaceStore.remove` would have; changes nothing.

        Raises:
            NotFound: The candidate does not hold the task.

        Cost:
            As `SubspaceStore.remove`, but for writing. Memory: the whole subspace, and one group of adapters.
        """
        from subspace_store.merging.merge import merge_adapters, sized_among

        with self._reading(self.state.refs[CANDIDATE]) as number:
            self._find(task_id, number)
            start = start_of_remakes(self.state, task_id, number)
            again = remakes(self.state, task_id, number)
            before = self.footprint(number).total_numbers
            if again:
                modules: Mapping[str, ModuleSubspace] = self.subspace(start) if start else {}
                if not any(map(is_renewed, modules)):
                    modules = {**modules, **self.renewed(number)}
                held = self.state.tasks_at(start).values()
                sized, names = {task.task_id for task in held if task.is_sized}, {t.name: t.task_id for t in held}
                for remake in again:
                    left = {names[task.name] for task in remake.tasks if task.name in names}
                    adapters = {task.task_id: self._to_merge_again(task, number) for task in remake.tasks}
                    modules = {name: module.without(left) for name, module in modules.items()}
                    modules = merge_adapters(modules, adapters, self.settings, sized - left).modules
                    sized = sized - left | sized_among(adapters)
                    names |= {task.name: task.task_id for task in remake.tasks}
                after = sum(module.numbers for module in modules.values())
            else:
                after = self.footprint(start).total_numbers
        return RemovalPreview(
            revisions=revisions_along(self.state, task_id, number),
            start=start,
            versions=tuple(remake.version.number for remake in again),
            numbers_before=before,
            numbers_after=after,
        )

    @strict
    def preview_restore(self, task_id: Line) -> RestorePreview:
        """The effect that `SubspaceStore.restore_revision` would have; changes nothing.

        Raises: As `SubspaceStore.restore_revision`.

        Cost:
            Reads the bases of the modules that the revision adapts.
        """
        from subspace_store.merge_writer import Arrival, Draft, is_in_place, restored_in_place

        with self._reading(self.state.refs[CANDIDATE]) as number:
            earlier, present = self._restorable(task_id)
            adapter = self._to_merge_again(earlier, number)
            arrival = Arrival(task_id, earlier.name, adapter, earlier.adapter, replaces=present.task_id)
            draft = Draft(self.storage, 0, self._tensors, self.state, number, [arrival], self.settings)
            placed = restored_in_place(draft) if is_in_place(draft) else None
            error = (
                self.forecast({task_id: adapter}, number, {task_id: present.task_id}).error_at_birth[task_id]
                if placed is None
                else placed.errors[task_id]
            )
            own = self.coefficient_numbers(number).get(present.task_id, 0) + present.private_count
        return RestorePreview(
            version=number,
            restored=earlier,
            leaving=present,
            error=error,
            is_approximate=earlier.adapter.key in self.state.heads,
            own_numbers_before=own,
            own_numbers_after=None if placed is None else placed.numbers,
        )

    @strict
    def collectable(self, *, uploads_in_use: Callable[[], Collection[str]] | None = None) -> garbage.Collected:
        """The objects that no live version needs; deletes nothing. See `garbage.collect`."""
        return garbage.collect(self._log, uploads_in_use=uploads_in_use, really=False)

    @strict
    def forecast(
        self,
        adapters: Mapping[str, Adapter],
        version: VersionNumber | None = None,
        replaces: Mapping[str, str] | None = None,
    ) -> Forecast:
        """What merging adapters would cost each task, before doing it and without data. Changes nothing.

        Args:
            adapters: Id to adapter, at least one; ids of the version's tasks are not allowed.
            version: The version to merge onto; default the candidate.
            replaces: Id of an adapter to the id of the task whose place it would take; default: none leaves.

        Raises:
            InvalidInput: An adapter that could not be merged here, or an id that is taken.
            NotFound: The version does not hold a task that is to be replaced.
        """
        from subspace_store.adapter import check_adapter
        from subspace_store.forecast import forecast

        if not adapters:
            raise InvalidInput("a forecast needs at least one adapter")
        parent = self.state.refs[CANDIDATE] if version is None else self._known(version)
        with self._reading(parent):
            shapes = self._heads.module_shapes(parent)
            for id_, adapter in adapters.items():
                if id_ in self.state.tasks_at(parent):
                    raise InvalidInput("is a task that this version holds already", id_, "choose another id")
                check_adapter(adapter)
                self._check(adapter, shapes)
                shapes |= {name: update.shape for name, update in adapter.modules.items()}
            replaces = replaces or {}
            if len({*replaces.values()}) < len(replaces) or not replaces.keys() <= adapters.keys():
                raise InvalidInput("names a task twice, or an adapter that is not there", "replaces")
            left = [self._find(id_, parent).task_id for id_ in replaces.values()]
            return forecast(self._tensors, self.state, parent, adapters, self.settings, left)

    @strict
    def coefficient_numbers(self, version: VersionNumber | None = None) -> dict[str, int]:
        """Numbers of each task's coefficients in the basis of a version, default `main`; none for a task without any.
        Reads no tensors."""
        with self._reading(version) as number:
            shapes = self._heads.shapes(number)
            return {
                task: sum(rank * sum(shapes[name][1]) for name, rank in layout)
                for task, layout in self._heads.layouts(number).items()
            }

    @strict
    def footprint(self, version: VersionNumber | None = None) -> Footprint:
        """How many numbers serving a version needs, and separate LoRAs of the same tasks. Reads no tensors."""
        with self._reading(version) as number:
            merged, coefficients = self.state.tasks_at(number).values(), self.coefficient_numbers(number)
            shapes = self._heads.shapes(number)
        return Footprint(
            number,
            len(merged),
            basis_numbers=sum(n * k_out + d * k_in for (n, d), (k_out, k_in) in shapes.values()),
            coefficient_numbers=sum(coefficients.values()) + sum(task.foundation_count for task in merged),
            private_numbers=sum(task.private_count - task.foundation_count for task in merged),
            head_numbers=sum(task.head_count for task in merged),
            separate_numbers=sum(task.parameter_count for task in merged),
        )

    @strict
    def stored_bytes(self) -> int:
        """Bytes of all objects that the living versions need: every version's files, and adapters as delivered."""
        return sum(ref.size_bytes for ref in retention.needed(self.state).values())

    @strict
    def history(self) -> list[HistoryEntry]:
        """The log for people, oldest first. Reads every record."""
        return [_entry(record) for record in self._log.records()]

    @property
    def moves(self) -> BranchMoves:
        """How the branches came to be where they are."""
        return self._moves

    @strict
    def lost_by(self, task_id: Line) -> HistoryEntry | None:
        """The record by which `main` lost a task: a rollback, the task's own removal, or the one that published another
        revision of it. None if `main` never held it.

        Cost:
            Reads the log backwards, up to that record.
        """
        lost = None
        for record in self._log.records(newest_first=True):
            if MAIN in record.refs:
                if task_id in self.state.tasks_at(record.refs[MAIN]):
                    return lost
                lost = _entry(record)
        return None

    # Looking things up

    def _check(self, adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Check that an adapter can be merged here. `shapes`: (N, D) of each module that has a basis, or will have one
        then."""
        self._check_base(adapter)
        for name, update in adapter.modules.items():
            if shapes.get(name, update.shape) != update.shape:
                raise InvalidInput(f"has shape {update.shape}, the subspace has {shapes[name]}", name)
        if self.settings.variant == "paper":
            for update in adapter.modules.values():
                update.raw()

    def _check_base(self, adapter: Adapter) -> None:
        for what, theirs, ours in (
            ("base model", adapter.base_model, self.base_model),
            ("base model's sha256", adapter.base_sha256, self.base_sha256),
        ):
            # An adapter always has its base model's name; the digest may be unknown to it or to the subspace.
            if ours and theirs != ours and (theirs or what == "base model"):
                raise InvalidInput(
                    f"the {what} is {theirs!r}, this subspace has {ours!r}", todo="train on this subspace's base model"
                )

    @contextlib.contextmanager
    def _reading(self, version: int | None) -> Iterator[int]:
        """Read a version. If it has expired meanwhile, missing objects are not reported as damage."""
        number = self._number(version)
        try:
            yield number
        except Corrupt:
            self.refresh()
            self._known(number)
            raise

    def _number(self, version: int | None) -> int:
        return self.state.refs[MAIN] if version is None else self._known(version)

    def _overlap(self, old: int, new: int, module: str) -> tuple[float, float]:
        before, after = (self._heads.basis_arrays(number, module) for number in (old, new))
        return overlap(before["p"], after["p"]), overlap(before["q"], after["q"])

    def _known(self, version: int) -> int:
        if version and version not in self.state.versions:
            raise NotFound(
                f"there is no version {version}", self.storage.url, f"{len(self.state.versions)} versions exist"
            )
        if version in self.state.expired:
            raise NotFound(f"version {version} has expired", self.storage.url, "pin what you need for long")
        return version

    def _allowed(self, version: int) -> int:
        retention.check_usable(self.state, version)
        if version not in self.state.published:
            raise InvalidInput(
                f"version {version} never passed the gate", self.storage.url, "name a version that `main` was before"
            )
        return version

    def _find(self, task_id: str, number: int) -> MergedTask:
        tasks = self.state.tasks_at(number)
        if task_id not in tasks:
            others = [id_ for id_ in self.state.revisions(task_id) if id_ in tasks]
            todo = f"it holds another revision of that task, {others[0]}: name that one" if others else ""
            raise NotFound(f"version {number} holds no task {task_id}", self.storage.url, todo)
        return tasks[task_id]

    def _read_delivered(self, task: MergedTask) -> Adapter:
        from subspace_store.adapter import adapter_from_bytes
        from subspace_store.files import blobs

        key = task.adapter.key
        if key not in self.state.heads:
            try:
                return adapter_from_bytes(blobs.read_blob(self.storage, task.adapter), f"{self.storage.url}/{key}")
            except Corrupt:
                # A missing object is no damage if it was given up and collected since this state was read.
                if key not in self.refresh().heads:
                    raise
        raise NotFound(
            "its adapter as delivered was let go, only what the subspace holds of it is kept",
            f"task {task.name} ({task.task_id})",
            "read it as a version holds it (`adapter`, `onebasis export`)",
        )

    def _to_merge_again(self, task: MergedTask, version: int) -> Adapter:
        """A task's adapter as it was delivered. If that is gone, as this version has it, or where it has left, the
        newest that has it; and then to the last number, so that being merged again costs it nothing."""
        if task.adapter.key not in self.state.heads:
            return self._read_delivered(task)
        if self.state.tasks_at(version).get(task.task_id) != task:
            entries = {one.number: self.state.tasks_at(one.number) for one in reversed(retention.alive(self.state))}
            having = [number for number, held in entries.items() if task.task_id in held]
            # Of one that was refined since, and whose versions before that have expired, what it became.
            version = next((number for number in having if entries[number][task.task_id] == task), having[0])
        return _to_the_last_number(self.adapter(task.task_id, version))

    def _restorable(self, task_id: str) -> tuple[MergedTask, MergedTask]:
        """An earlier revision as it was merged or refined last, and the revision that the candidate holds.

        Raises:
            NotFound, Conflict, RefusedAdapters: See `SubspaceStore.restore_revision`.
        """
        state, candidate = self.state, self.state.refs[CANDIDATE]
        held = state.tasks_at(candidate)
        if task_id in held:
            raise Conflict(f"version {candidate}, the candidate, holds it", f"task {held[task_id].name} ({task_id})")
        entries = [task for task in tasks_alive(state, but=state.rejected) if task.task_id == task_id]
        if not entries:
            todo = "its adapter is gone; submit the task again"
            raise NotFound(f"no version that can be read holds the task {task_id}", self.storage.url, todo)
        earlier = max(entries, key=lambda task: task.version)
        line = {*state.revisions(task_id)}
        present = next((task for task in held.values() if task.name == earlier.name and task.task_id in line), None)
        if present is None:
            who, what = f"task {earlier.name} ({task_id})", "holds no other revision of it, whose place it could take"
            raise NotFound(f"version {candidate}, the candidate, {what}", who, "submit the task again")
        retention.check_mergeable(state, {task_id: earlier.name})
        return earlier, present

    def _held(self, version: int) -> dict[str, Adapter]:
        """All tasks as a version holds them, to be merged at once without any of them moving.

        Raises:
            InvalidInput: Merges are made under settings that take from tasks.
        """
        from subspace_store.merging.merge import keeps_promises

        if not keeps_promises(self.settings):
            what = "a compaction takes nothing from any task, and under these settings a merge does"
            todo = "leave out subspace.rank_fixed, variant: paper and beyond_rank_max: drop"
            raise InvalidInput(what, "compact", todo)
        return {id_: _to_the_last_number(self.adapter(id_, version)) for id_ in self.state.tasks_at(version)}

    def _read_head(self, task: MergedTask) -> Adapter:
        """A task's head and facts, with or without its modules."""
        from subspace_store.adapter import adapter_from_bytes
        from subspace_store.files import blobs

        try:
            return self._read_delivered(task)
        except NotFound:
            head = self.state.heads[task.adapter.key]
        return adapter_from_bytes(blobs.read_blob(self.storage, head), f"{self.storage.url}/{head.key}", head_only=True)


def without_renewal(settings: SubspaceSettings) -> SubspaceSettings:
    """Settings for a merge of all tasks at once: it keeps the renewed bases that are there, and makes none."""
    return settings.model_copy(update={"renew_tasks": 0})


def _to_the_last_number(adapter: Adapter) -> Adapter:
    """The same adapter, from which no merge takes anything."""
    from subspace_store.adapter import SIZED

    return replace(adapter, info=dict(adapter.info) | {SIZED: adapter.info.get(SIZED, "held")})


def exchanged(before: Iterable[MergedTask], after: Iterable[MergedTask]) -> tuple[tuple[MergedTask, MergedTask], ...]:
    """Pairs of different tasks of one name: revisions of one task, of which a version holds one."""
    names = {task.name: task for task in before}
    pairs = ((names[task.name], task) for task in after if task.name in names)
    return tuple((old, new) for old, new in pairs if old.task_id != new.task_id)


def rollback_preview(state: SubspaceState, old: int, new: int) -> RollbackPreview:
    """The effect of moving `main` from one version to another."""
    before, after = state.tasks_at(old), state.tasks_at(new)
    return RollbackPreview(
        from_version=old,
        to_version=new,
        vanishing=tuple(merged for task, merged in before.items() if task not in after),
        returning=tuple(merged for task, merged in after.items() if task not in before),
    )


def _entry(record: fold.Record) -> HistoryEntry:
    return HistoryEntry(
        seq=record.seq,
        time=record.time,
        epoch=record.epoch,
        writer=record.writer,
        actor=record.actor,
        op=record.op,
        summary=_summary(record),
    )


def _summary(record: fold.Record) -> str:
    """The record's body in one line."""
    body = record.body
    if record.op in fold.MAKES_VERSION:
        brought = body["version"]["added"] or body["version"]["refined"]
        names = (f"{task['name']} (revision replaced)" if task.get("replaces") else task["name"] for task in brought)
        return f"version {body['version']['number']}: {', '.join(names)}"
    if record.op == fold.SCORES:
        count = len(body["scores"])
        return f"version {body['version']}: {count} {'score' if count == 1 else 'scores'}"
    if record.op == fold.REJECT:
        return f"version {body['version']}: {body['reason']}"
    if record.op == fold.ROLLBACK:
        return f"version {body['from']} → {body['version']}" + (f": {body['reason']}" if body["reason"] else "")
    if record.op == fold.ACQUIRE:
        return f"epoch {record.epoch}"
    if record.op == fold.EXPIRE:
        return f"versions {', '.join(map(str, body['versions']))}"
    if record.op == fold.PIN and body["until"] is not None:
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(0.0, min(body["until"], LATEST))))
        return f"version {body['version']}: {body['owner']}, until {until} UTC"
    if record.op == fold.REMOVE:
        why = f": {body['reason']}" if body["reason"] else ""
        return f"{body['task']}: version {body['from']} → {body['version']}{why}"
    if record.op == fold.COMPACT:
        return f"version {body['from']} → {body['version']}: all tasks at once"
    if record.op == fold.DROP_ADAPTERS:
        count = len(body["heads"])
        return f"{count} {'adapter' if count == 1 else 'adapters'}"
    about = [f"version {body['version']}"] if "version" in body else []
    return ": ".join(about + [body[key] for key in ("name", "task_id", "owner", "reason") if body.get(key)])
