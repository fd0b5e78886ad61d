"""What can happen to a task: one frozen record for each kind of event."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from workers.orders import NOWHERE, DoneAt, Trained


class Reason(StrEnum):
    """Why a task waits again, is parked, rejected or cancelled, or was not refined, for programs and for the book of
    trouble. The rules of the gate are further codes: `orchestrator.judging.gate.Rule`."""

    BAD_INPUT = "bad-input"
    """A worker found the task's rows, settings or adapter unusable."""
    MACHINE_LOST = "machine-lost"
    """The worker that had it is gone, or gave no sign of life."""
    WORKER_DIED = "worker-died"
    """The process that had it ended while its machine went on: the task itself may have ended it."""
    INTERNAL_ERROR = "internal-error"
    """An error of ours, or one that nobody foresaw, ended an attempt."""
    ROWS_DAMAGED = "rows-damaged"
    """The service's copy of its rows is gone, or is not what was written."""
    PREEMPTED = "preempted"
    """Its worker was needed for something else, or the service ended: it goes on from its checkpoint."""
    STORE_DAMAGED = "store-damaged"
    """A worker read bytes of the store that are not what was written: it waits until a person has looked."""
    MERGE_REFUSED = "merge-refused"
    """The store cannot take its adapter."""
    NAME_TAKEN = "name-taken"
    """`main` came back to an older task of the same name meanwhile."""
    NOT_SCORED = "not-scored"
    """The version that it was merged into could not be scored."""
    PRE_PUBLISH = "pre-publish"
    """What the settings name is asked before a version is published, and it refused."""
    PRE_PUBLISH_FAILED = "pre-publish-failed"
    """It gave no answer, and the settings refuse then."""
    REFUSED = "refused"
    """A person refused its version before it was published."""
    ROLLED_BACK = "rolled-back"
    """`main` was moved to a version from before it."""
    REMOVED = "removed"
    """The versions were made again without it."""
    CANCELLED = "cancelled"
    """Somebody asked for it."""
    DEPENDENCY_FAILED = "dependency-failed"
    """A task that it was to come after ended without being published."""
    RAN_TOO_LONG = "ran-too-long"
    """Workers had it for longer than its own `max_run_seconds`."""
    UNREFINED = "unrefined"
    """It goes on as it was merged, though it was to be refined."""


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A worker got the task under a fresh lease."""

    token: str
    worker: str
    at: float
    places: int = 1
    """Places of the worker."""
    gpus: float = 0.0
    """GPUs of each of them."""


@dataclass(frozen=True)
class TrainingDone:
    """The worker handed over an adapter."""

    outcome: Trained
    at: float


@dataclass(frozen=True, kw_only=True)
class TrainingFailed:
    """The worker could not train the task. fault: one of those of `workers.orders.Failed`."""

    token: str
    fault: str
    message: str
    at: float
    seconds: float | None = None
    """Worker-seconds of the attempt; None: not known, and the time since its start counts."""
    done_at: DoneAt = NOWHERE


@dataclass(frozen=True)
class MergeBegun:
    """The task is part of the merge `merge_key` from now on."""

    merge_key: str


@dataclass(frozen=True)
class Merged:
    """The store committed `version` with this task in it."""

    version: int
    merge_seconds: float | None = None
    """As in `Version`; None: not known."""
    bytes_written: int | None = None


@dataclass(frozen=True)
class Refined:
    """The store committed `version`: the version that the task was in, with refined coefficients of some tasks."""

    version: int


@dataclass(frozen=True)
class RefinementRefused:
    """The store will not take the refined adapter, or the version went on without it."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RefinedAgain:
    """A worker trained its coefficients once more, in a later version (`share_full`); or why it could not."""

    message: str
    token: str = ""
    """Token of its order; empty where it could not."""
    seconds: float = 0.0
    at: float = 0.0


@dataclass(frozen=True)
class MergeRefused:
    """The store will not take this adapter."""

    message: str
    at: float
    code: Reason = Reason.MERGE_REFUSED


@dataclass(frozen=True)
class MergeUndone:
    """The version it was merged into is no longer the candidate."""

    message: str
    alone: bool


@dataclass(frozen=True)
class Judged:
    """The gate's decision on the task's version."""

    passed: bool
    message: str
    at: float
    codes: tuple[str, ...] = ()
    """Rules that were broken, or why there was no score; empty where it passed, or where an older release rejected
    it."""


@dataclass(frozen=True)
class RolledBack:
    """`main` no longer holds the task."""

    message: str
    at: float
    code: Reason = Reason.ROLLED_BACK


@dataclass(frozen=True)
class Replaced:
    """`main` holds another revision of the task in its place."""

    message: str
    at: float


@dataclass(frozen=True)
class Restored:
    """`main` holds the task again, or holds it since another version, as some were made again without a task."""

    message: str
    version: int
    """Version of its birth now."""


@dataclass(frozen=True)
class CancelRequested:
    """Somebody wants it to stop."""

    by: str
    at: float


@dataclass(frozen=True)
class PreemptRequested:
    """Somebody wants its worker for something else: the task should write a checkpoint and go back to the queue."""

    by: str
    gives_back: bool = False
    """Whether its team is beyond its quota, and another wants the places: `by` names that team."""


@dataclass(frozen=True, kw_only=True)
class Paused:
    """Somebody wants it not to run: what waits stays in its place, what runs writes a checkpoint and waits."""

    by: str
    message: str = ""
    at: float


@dataclass(frozen=True)
class Resumed:
    """Somebody lets it go on."""

    by: str


@dataclass(frozen=True)
class PoolGiven:
    """It has another pool: its own is no longer in the settings, or a release without pools took it in."""

    pool: str


@dataclass(frozen=True)
class CameDue:
    """Its `not_before` has come."""


@dataclass(frozen=True, kw_only=True)
class DependencyEnded:
    """A task that it comes after is published, or ended otherwise."""

    task_id: str
    title: str
    state: str
    """What became of that task."""
    is_published: bool
    at: float


@dataclass(frozen=True)
class RunsTooLong:
    """Its workers have had it for longer than its `max_run_seconds`."""

    at: float


@dataclass(frozen=True, kw_only=True)
class DeadlineForeseen:
    """What is foreseen of its deadline has changed."""

    outlook: str
    """`missed`, `cannot be met`; empty: it can be met again."""
    message: str


Event = (
    Claimed
    | TrainingDone
    | TrainingFailed
    | MergeBegun
    | Merged
    | Refined
    | RefinementRefused
    | RefinedAgain
    | MergeRefused
    | MergeUndone
    | Judged
    | RolledBack
    | Replaced
    | Restored
    | CancelRequested
    | PreemptRequested
    | Paused
    | Resumed
    | PoolGiven
    | CameDue
    | DependencyEnded
    | RunsTooLong
    | DeadlineForeseen
)
