"""What the log says about versions, as frozen records. Everything here is plain data: no tensors, no storage.

A version is what the subspace was after one merge. Its basis and its tasks' coefficients are blobs that these
records name; the records themselves live in the log and are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator

from configs.document import Line
from configs.errors import NotFound
from subspace_store.strict import TaskId

CANDIDATE = "candidate"
MAIN = "main"
DIGITS_MAX = 15
"""Most digits of a version's number that a person types."""


def number_in(text: str) -> int | None:
    """The version's number that a person typed, also as tables show it (v3); None: it is no number."""
    digits = text.removeprefix("v")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= DIGITS_MAX else None


@dataclass(frozen=True, kw_only=True)
class BlobRef:
    """An immutable object: its key, its length and its digest."""

    key: str
    size_bytes: int
    sha256: str
    """Digest of the object; of a tensor file the digest of its head, which names the sha256 of every part."""
    head_bytes: int = 0
    """Length of a tensor file's head; 0 for other content."""


@dataclass(frozen=True, kw_only=True)
class MergedTask:
    """A task as one version added it. Written once, in the record of that version, by which the task was merged or
    refined."""

    task_id: str
    name: str
    """`team/task`, for people."""
    version: int
    """Number of the version that added it."""
    adapter: BlobRef
    """The adapter as it was delivered, with the head."""
    coefficients: BlobRef
    """E, F, σ per module in the basis of that version."""
    delivered_energy: float
    """Σ over modules of ‖ΔW‖²_F."""
    rank_total: int
    """Σ over modules of the rank."""
    error_at_birth: float
    """‖ΔW − ΔŴ‖_F / ‖ΔW‖_F over all modules, right after its merge."""
    parameter_count: int = 0
    """Numbers in an equivalent separate LoRA: Σ r·(n+d)."""
    head_count: int = 0
    """Numbers in its head."""
    private: BlobRef | None = None
    """The private parts of its update, module by module; None: the basis holds enough of all of them."""
    private_count: int = 0
    """Numbers in the private parts."""
    foundation_count: int = 0
    """How many of these are coefficients in the foundation."""
    is_sized: bool = False
    """Whether it has no more numbers than its score needs, so that no merge may take anything from it."""
    replaces: str | None = None
    """Id of the task whose place it took in this version: the revision before it, of the same name. None: none."""


@dataclass(frozen=True, kw_only=True)
class StagedAdapter:
    """An adapter that a worker uploaded, waiting for its merge."""

    task_id: TaskId
    name: TaskId
    """`team/task`, for people."""
    key: Line
    """Storage key of the upload, as given to `SubspaceStore.stage`."""
    sha256: Line
    replaces: TaskId | None = None
    """Id of the revision whose place it takes: a task of the same name, which leaves; None: none leaves."""


@dataclass(frozen=True)
class Identity:
    """A service, told apart from all others that might write to the same store."""

    service_id: str
    """Random id, kept in the service's state folder."""
    name: str
    """Where it runs, for people."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The service that a store belongs to: no other may write there."""

    service_id: str
    name: str
    """Where it runs, for people."""
    since: float
    """Unix seconds."""

    def is_another_than(self, service: Identity | None) -> bool:
        """Whether `service` is not the owner; None is no service, so never the owner."""
        return service is None or service.service_id != self.service_id


@dataclass(frozen=True, kw_only=True)
class Version:
    """One state of the subspace.

    Args:
        number: 1, 2, 3, …; never reused. Version 0 is the empty subspace and has no record.
        parent: The version it was merged on.
        added: Tasks that it added.
        basis: File with P, Q, λ of the modules that this merge changed.
        transport: File with R_out, R_in of the changed modules, from the parent's basis to this one; None where the
            basis is the parent's: tasks were refined, or an earlier revision was restored.
        basis_versions: Older versions whose basis files hold the modules that this merge did not change.
        module_count: Number of modules that have a basis.
        renewed_count: Number of modules that have a renewed basis beside the first.
        rank_max: Most directions that a module has on one side.
        drift: ‖ΔŴ_parent − ΔŴ_this‖_F / ‖ΔW‖_F of each earlier task that stayed, in the order of
            `SubspaceState.tasks_at(parent)`, seven decimals; empty if nothing was truncated. See `SubspaceState.drift`.
        bytes_written: Size of all blobs of this merge.
        merge_seconds: Time of the computations that the new basis depends on.
        snapshot: File with all coefficients in this version's basis; None for most versions. Some have one, so that a
            reader need not start at version 1.
        remakes: The version that this one is made again from, without `removed`; None for an ordinary merge. Compacted,
            it holds all tasks of that version, and its parent is the empty subspace.
        removed: Ids of tasks that this version was made without.
        approximate: Ids of added tasks that were merged from their coefficients, because the adapters as delivered
            were gone.
        refined: Tasks of the parent whose coefficients this version replaces, in the parent's basis: `basis` names the
            parent's file, and no other task moves. Such a version adds none.
    """

    number: int
    parent: int
    created_at: float
    added: tuple[MergedTask, ...]
    basis: BlobRef
    transport: BlobRef | None
    basis_versions: tuple[int, ...] = ()
    module_count: int = 0
    renewed_count: int = 0
    rank_max: int = 0
    drift: tuple[float, ...] = ()
    bytes_written: int = 0
    merge_seconds: float = 0.0
    snapshot: BlobRef | None = None
    remakes: int | None = None
    removed: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    refined: tuple[MergedTask, ...] = ()

    @property
    def is_compaction(self) -> bool:
        """Whether it holds the tasks of another version, merged at once; none of them moved."""
        return not self.parent and self.remakes is not None and not self.removed

    @property
    def brought(self) -> tuple[MergedTask, ...]:
        """The tasks whose adapters and coefficients this version's own record names."""
        return (*self.added, *self.refined)

    @property
    def left(self) -> tuple[str, ...]:
        """Ids of the tasks of the parent that it does not hold any more: another revision took their place."""
        return tuple(task.replaces for task in self.added if task.replaces is not None)

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """The blobs that its own record names; `retention.needed` gives all that it needs."""
        of_tasks = (ref for task in self.brought for ref in (task.adapter, task.coefficients, task.private))
        return tuple(r for r in (self.basis, *of_tasks, self.transport, self.snapshot) if r is not None)


def _nan_if_null(value: object) -> object:
    return math.nan if value is None else value


@dataclass(frozen=True, kw_only=True)
class RowsScore:
    """A score of a task on the evaluation rows that one of its revisions brought."""

    task_id: str
    """Id of that revision."""
    score: Annotated[float, BeforeValidator(_nan_if_null)]
    count: int


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A measured score: A[version][task]."""

    task_id: str
    score: Annotated[float, BeforeValidator(_nan_if_null)]
    """NaN where it could not be measured; the log writes null."""
    count: int
    """Evaluation rows it was measured on."""
    of_rows: tuple[RowsScore, ...] = ()
    """The same for the rows of each revision, oldest first, where it is scored on those of several."""
    general_loss: float | None = None
    """What the language model loses by the task on general text, in nats for each token; None where not measured."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Why `main` stands still, although versions pass the gate."""

    actor: str
    reason: str
    time: float


EMPTY = Version(
    number=0, parent=0, created_at=0.0, added=(), basis=BlobRef(key="", size_bytes=0, sha256=""), transport=None
)
"""Version 0, the empty subspace, for those who show it: no record names it, and it has no blob."""


@dataclass(frozen=True)
class SubspaceState:
    """The fold of the log: everything that is known about versions at one sequence number."""

    seq: int = 0
    epoch: int = 0
    head_sha256: str = ""
    versions: Mapping[int, Version] = field(default_factory=dict)
    refs: Mapping[str, int] = field(default_factory=lambda: {CANDIDATE: 0, MAIN: 0})
    scores: Mapping[int, Mapping[str, TaskScore]] = field(default_factory=dict)
    """Version to task id to measured score."""
    published: tuple[int, ...] = (0,)
    """Versions that `main` was moved to past the gate; the empty one needs none."""
    rejected: Mapping[int, str] = field(default_factory=dict)
    """Version to the reason why the gate did not let it pass."""
    rejected_for: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Version to the ids of the tasks whose scores broke a rule of the gate; none where no score was the reason."""
    rejected_by: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Version to the rules of the gate that it broke, for programs; none where an older release rejected it."""
    op_keys: Mapping[str, int] = field(default_factory=dict)
    """Operation key to the version it made or concerned (0: none): the answer to the same request again."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """Operation key to the request in short (`fold.asked`); none for what a checkpoint of before 0.4 holds."""
    tags: Mapping[str, int] = field(default_factory=dict)
    """Names that people gave to versions, for ever."""
    held: Hold | None = None
    """The hold that keeps `main` where it is; None: publishing moves it."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Id of a task that must not be merged to the reason why."""
    pins: Mapping[int, Mapping[str, float | None]] = field(default_factory=dict)
    """Version to the owners of pins on it, each with the end of the pin (Unix seconds; None: for ever)."""
    expired: tuple[int, ...] = ()
    """Versions that were given up for ever: nothing may name them again, and their blobs may be deleted."""
    replaced: Mapping[int, int] = field(default_factory=dict)
    """Version that was made again, without a task or all tasks at once, to the version in its place."""
    compacted: tuple[int, ...] = ()
    """Versions that were made again as one, all tasks at once."""
    owner: Owner | None = None
    """The service that the store belongs to; None: any writer may open it."""
    heads: Mapping[str, BlobRef] = field(default_factory=dict)
    """Key of a delivered adapter that was given up to the object that keeps its head and facts."""

    def resolve(self, ref: str | int) -> int:
        """The version that a branch, a tag or a number names.

        Raises:
            NotFound: Nothing of this name.
        """
        names, text = {**self.tags, **self.refs}, str(ref)
        number = names[text] if text in names else number_in(text)
        if number is None or (number != 0 and number not in self.versions):
            newest = max(self.versions, default=0)
            raise NotFound(f"there is no version {ref!r:.80}", todo=f"name 0 to {newest}, or one of {', '.join(names)}")
        return number

    def lineage(self, number: int) -> tuple[Version, ...]:
        """The versions from the first up to `number`, along parents."""
        line: list[Version] = []
        while number:
            line.append(self.versions[number])
            number = line[-1].parent
        return tuple(reversed(line))

    def history(self, number: int) -> tuple[Version, ...]:
        """The lineage, and before a compaction the versions that it put into one: what the tasks went through."""
        line = self.lineage(number)
        if not line:
            return line
        first = line[0]
        while first.removed and first.remakes is not None:  # a removal made it again
            first = self.versions[first.remakes]
        return (*self.history(first.remakes), *line) if first.is_compaction and first.remakes else line

    def tasks_at(self, number: int) -> dict[str, MergedTask]:
        """The tasks that a version holds, in the order in which they joined: a revision when it took the place of
        another; of a task that was refined, the newest entry in its old place."""
        held: dict[str, MergedTask] = {}
        for version in self.lineage(number):
            for task_id in version.left:
                del held[task_id]
            held |= {task.task_id: task for task in version.brought}
        return held

    def names(self) -> dict[str, str]:
        """Task id to name of all tasks that any version brought. Revisions of a task share its name."""
        return {task.task_id: task.name for version in self.versions.values() for task in version.added}

    def revisions(self, task_id: str) -> tuple[str, ...]:
        """Ids of the task and of all that took its place, or whose place it took, in any version; oldest first."""
        near: dict[str, set[str]] = {}
        first: dict[str, int] = {}
        for number, version in sorted(self.versions.items()):
            for task in version.added:
                first.setdefault(task.task_id, number)
                if task.replaces is not None:
                    near.setdefault(task.task_id, set()).add(task.replaces)
                    near.setdefault(task.replaces, set()).add(task.task_id)
        found, open_ids = {task_id}, [task_id]
        while open_ids:
            more = near.get(open_ids.pop(), set()) - found
            found |= more
            open_ids += more
        return tuple(sorted(found, key=lambda id_: first.get(id_, 0)))

    def births(self, number: int) -> dict[str, int]:
        """Task id to the version that was the first to be judged by its score, of all tasks that a version holds: the
        one that brought it, or the refinement that was made of that one before anybody scored it. A revision that was
        restored is born again."""
        births: dict[str, int] = {}
        for version in self.history(number):
            # What a removal took from a compaction was there before it; merged again, it is born again.
            for task_id in (*version.left, *version.removed):
                births.pop(task_id, None)
            if version.refined and not self.scores.get(version.parent):
                added = (task.task_id for task in self.versions[version.parent].added)
                births |= {id_: version.number for id_ in added if births.get(id_) == version.parent}
            births |= {task.task_id: version.number for task in version.added if task.task_id not in births}
        return {task_id: births[task_id] for task_id in self.tasks_at(number)}

    def drift(self, number: int) -> dict[str, float]:
        """Task id to how far the merge of a version moved it, for every task that was there before and stayed."""
        version = self.versions[number]
        stayed = [task_id for task_id in self.tasks_at(version.parent) if task_id not in version.left]
        return dict(zip(stayed, version.drift, strict=True)) if version.drift else dict.fromkeys(stayed, 0.0)

    def drift_bound(self, task_id: str, since: int, until: int) -> float:
        """Sum of the task's relative drifts after version `since` up to `until`: a bound on how far it moved. Of a
        revision that left and was restored, since then."""
        # Tasks join at the end, so a task's place changes only when one before it leaves.
        joined: dict[str, int] = {}
        count, place, bound = 0, -1, 0.0
        for version in self.lineage(until):
            for left in version.left:
                place -= joined.pop(left) < joined.get(task_id, 0)
            if task_id in joined and version.number > since and version.drift:
                bound += version.drift[place]
            for task in version.added:
                count += 1
                if task.task_id == task_id:
                    place, bound = len(joined), 0.0
                joined[task.task_id] = count
        if task_id not in joined:
            raise NotFound(f"version {until} holds no task {task_id}")
        return bound

    def errors(self, number: int) -> dict[str, float]:
        """Task id to its error at a version: √(1 − ‖ΔŴ‖²/‖ΔW‖²), from the energy that the version holds of it.

        Exact, not a bound: every truncation is an orthogonal projection, so the energy that is lost is its error at
        birth and all its drifts since, each squared, added up.
        """
        lost: dict[str, float] = {}
        for version in self.lineage(number):
            for task_id in version.left:
                del lost[task_id]
            for task_id, drift in zip(lost, version.drift, strict=False):
                lost[task_id] += drift**2
            lost |= {task.task_id: task.error_at_birth**2 for task in version.brought}
        return {task_id: math.sqrt(energy) for task_id, energy in lost.items()}


def still_held(line: Sequence[Version]) -> list[tuple[MergedTask, ...]]:
    """Of each version of a lineage, or of its end, the tasks that it brought and that have not left since."""
    found: list[tuple[MergedTask, ...]] = []
    gone: set[str] = set()
    for version in reversed(line):
        found.append(tuple(task for task in version.brought if task.task_id not in gone))
        gone = gone_before(version, gone)
    return found[::-1]


def gone_before(version: Version, gone: Collection[str]) -> set[str]:
    """Ids of the tasks of a version's parent that a later version does not hold any more. gone: The same for the tasks
    of this version."""
    return {*gone} - {task.task_id for task in version.added} | {*version.left}
