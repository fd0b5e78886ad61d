"""A task as the control plane knows it: one frozen record, the whole truth about it between two events.

No Ray, no torch, no SQL here: a restarted control plane loads these records and goes on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from enum import StrEnum

from pydantic import Field

from configs.document import Section
from configs.task_spec import TaskSpec
from orchestrator.scheduling.fair_share import Use


class TaskState(StrEnum):
    """Where a task is in its life; the arrows are in task_lifecycle.py."""

    QUEUED = "queued"
    TRAINING = "training"
    MERGING = "merging"
    REFINING = "refining"
    EVALUATING = "evaluating"
    PUBLISHED = "published"
    REJECTED = "rejected"
    PARKED = "parked"
    CANCELLED = "cancelled"


LIVE = (TaskState.QUEUED, TaskState.TRAINING, TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING)
"""States in which the control plane still owes the task something."""

AT_WORK = (TaskState.TRAINING, TaskState.REFINING)
"""States in which a worker may have an order for the task's adapter."""

ENDED_WITHOUT_RESULT = (TaskState.REJECTED, TaskState.PARKED, TaskState.CANCELLED)
"""States after which the same task may be submitted anew under its name."""


class TaskRecord(Section):
    """One task. Optional numbers are None where not measured, never 0."""

    task_id: str
    team: str
    name: str
    client_key: str
    spec: TaskSpec
    submitted_at: float
    """Unix seconds, as all times here."""
    submitted_by: str = ""
    train_key: str = ""
    """Storage key of the frozen training rows; empty for an import."""
    train_count: int = 0
    eval_key: str = ""
    """Storage key of the frozen evaluation rows; empty when an import brought none."""
    eval_count: int = 0
    eval_sha256: str = ""

    state: TaskState = TaskState.QUEUED
    revision: int = 0
    """Counts the writes; a writer that read an older revision is refused."""
    reason: str = ""
    """Why it is rejected, parked or cancelled, for people."""
    cancel_requested: bool = False

    attempt: int = 0
    token: str = ""
    """Lease of the running attempt: a report that names another one is stale."""
    worker: str = ""
    claimed_at: float | None = None
    lost_machines: int = 0
    own_bugs: int = 0
    preemptions: int = 0
    """How often it gave up its worker, with a checkpoint. For people: no budget pays for it."""
    preempt_requested: bool = False
    """Its running attempt shall write a checkpoint and go back to the queue."""

    first_step_at: float | None = None
    train_seconds: float | None = None
    train_loss: float | None = None
    steps: int = 0
    staging_key: str = ""
    local_results_key: str = ""
    """Of what each evaluation row scored with that attempt's adapter; empty without evaluation rows."""
    adapter_sha256: str = ""
    adapter_parameters: int = 0
    local_score: float | None = None
    base_score: float | None = None
    metrics: Mapping[str, float] = Field(default_factory=dict)
    """All metrics of the kind for its own adapter before merging."""
    method: str = ""
    """What `auto` chose, else the spec's method.name."""
    trainable_parameters: int = 0
    """Numbers that were trained, the head not counted."""
    basis_version: int = 0
    """Version whose basis was leased for training; 0: none."""
    resumed_from: int = 0
    """Step of the checkpoint that the last attempt went on from; 0: from the start."""

    merge_key: str = ""
    """Operation key of the merge it is part of: the same merge asked for again is the same version."""
    merge_alone: bool = False
    """Its group failed the gate: it is merged by itself, so that the culprit shows."""
    version: int = 0
    """Version of birth in the lineage of `main`: the first that is judged with it. 0 before merging."""
    refined_key: str = ""
    """Storage key of its adapter after the refinement; empty when there was none."""
    refined_sha256: str = ""
    refined_seconds: float | None = None
    again_token: str = ""
    """Order of the last refinement in a later version (`share_full`): told of it twice, it counts once."""
    used_seconds: float | None = None
    """After such a refinement: what the task cost its team, earlier seconds worth what they were at `used_until`."""
    used_until: float = 0.0
    unrefined: str = ""
    """Why it was not refined, though it was to be."""
    ended_at: float | None = None

    @property
    def title(self) -> str:
        """`team/name`, what people call it."""
        return f"{self.team}/{self.name}"

    @property
    def use(self) -> Use | None:
        """What it cost its team; None before it was trained."""
        if self.claimed_at is None or self.train_seconds is None:
            return None
        if self.used_seconds is not None:
            return Use(self.team, self.used_seconds, self.used_until)
        seconds = self.train_seconds + (self.refined_seconds or 0.0)
        return Use(self.team, seconds, self.claimed_at + seconds)


def new_task_id(now: float | None = None) -> str:
    """An id that sorts by time and is unique without a counter: ids outlive a lost database in the version log."""
    # 48 bits: of a thousand tasks in one second no two may write to the same keys of the storage.
    return f"t{int(now if now is not None else time.time()):09x}{secrets.token_hex(6)}"


def staging_key(task_id: str, attempt: int, token: str) -> str:
    """Where one attempt puts its adapter; no two attempts share a key."""
    return f"staging/{task_id}/{attempt}-{token}/adapter.safetensors"


def results_key(task_id: str, version: int) -> str:
    """Where is kept what each evaluation row scored under a version: the same, whoever scored it."""
    return f"results/{task_id}/{version}.safetensors"


def local_results(record: TaskRecord) -> str:
    """The same with the adapter of the running attempt, before merging; no two attempts share a key.

    Two may run at once, for one that lost its lease may not know it, and their adapters differ. Empty without rows.
    """
    name = f"local-{record.attempt}-{record.token}"
    return f"results/{record.task_id}/{name}.safetensors" if record.eval_key else ""
