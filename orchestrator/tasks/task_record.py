"""A task as the control plane knows it: one frozen record, the whole truth about it between two events.

No Ray, no torch, no SQL here: a restarted control plane loads these records and goes on.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping
from enum import StrEnum

from pydantic import Field

from configs.document import Section
from configs.task_spec import REGRESSION_KINDS, TaskSpec
from orchestrator.scheduling.reasons import WaitCode


class TaskState(StrEnum):
    """Where a task is in its life; the arrows are in task_lifecycle.py."""

    QUEUED = "queued"
    TRAINING = "training"
    MERGING = "merging"
    REFINING = "refining"
    EVALUATING = "evaluating"
    PUBLISHED = "published"
    REPLACED = "replaced"
    REJECTED = "rejected"
    PARKED = "parked"
    CANCELLED = "cancelled"


LIVE = (TaskState.QUEUED, TaskState.TRAINING, TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING)
"""States in which the control plane still has something to do for the task."""

IN_FLIGHT = (TaskState.TRAINING, TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING)
"""Those of them in which it no longer waits for its first order."""

AT_WORK = (TaskState.TRAINING, TaskState.REFINING)
"""States in which a worker may have an order for the task's adapter."""

ENDED_WITHOUT_RESULT = (TaskState.REJECTED, TaskState.PARKED, TaskState.CANCELLED)
"""States after which the same task may be submitted anew under its name."""

OUT_OF_LINE = (*ENDED_WITHOUT_RESULT, TaskState.REPLACED)
"""States in which a task does not have its name any more: what is submitted or served under it is another one."""


SERVICE = ""
"""Team of a pause that holds for the whole service."""
BLOCKS = (WaitCode.PAUSED, WaitCode.DEPENDENCY, WaitCode.NOT_BEFORE)
"""What may keep a queued task from standing in line, the first that is told before the others."""


ROUNDING = 1e-9
"""Scores are quotients of integers, computed in several ways."""


class Pause(Section):
    """A person's wish that nothing is started."""

    by: str
    reason: str = ""
    at: float


class Drain(Section):
    """A person's wish that a worker, or all on a machine, get nothing new and end, before maintenance."""

    what: str
    """Name of the worker, or address of the machine."""
    is_node: bool = False
    """Whether it is a machine."""
    by: str
    reason: str = ""
    at: float
    lets_end: bool = False
    """Whether what trains there ends first; else it writes a checkpoint and waits in the queue again."""

    def __str__(self) -> str:
        return f"{self._name} is drained by {self.by}: {self.reason or 'no reason given'}"

    @property
    def told(self) -> str:
        """The same with since when, and what takes it back."""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.at))
        undo = f"onebasis drain --undo {'--node ' if self.is_node else ''}{self.what}"
        why = self.reason or "no reason given"
        return f"{self._name} is drained by {self.by} since {since}: {why} (`{undo}` takes it back)"

    @property
    def _name(self) -> str:
        return f"the machine {self.what}" if self.is_node else self.what


class EarlierRows(Section):
    """Evaluation rows that an earlier revision of a task brought: the later ones are scored on them too."""

    task_id: str
    """Id of that revision."""
    number: int
    """Its number."""
    eval_key: str
    eval_count: int
    eval_sha256: str


class TaskRecord(Section):
    """One task, or one revision of it. Optional numbers are None where not measured, never 0."""

    task_id: str
    team: str
    name: str
    client_key: str
    spec: TaskSpec
    submitted_at: float
    """Unix seconds, as all times here."""
    submitted_by: str = ""
    traceparent: str = ""
    """What the request that submitted it said of the trace that it belongs to (W3C Trace Context); empty: nothing."""
    train_key: str = ""
    """Storage key of the frozen training rows; empty for an import."""
    train_count: int = 0
    eval_key: str = ""
    """Storage key of the frozen evaluation rows; empty when an import brought none."""
    eval_count: int = 0
    eval_sha256: str = ""
    constant_score: float | None = None
    """Score of always giving the evaluation rows' most frequent label; None where there is no such score."""
    content_sha256: str = ""
    """Digest of the submission, see `admission.content_sha256`; empty in records of release 0.3."""
    brought_sha256: str = ""
    """Digest of what the training rows say, or of the adapter to import; empty in older records."""
    warnings: tuple[str, ...] = ()
    """Sentences on what was doubtful at submission, and on what training made doubtful."""

    number: int = 1
    """Which revision of the task it is, from 1; `revision`, below, is another count."""
    revises: str = ""
    """Id of the revision whose place it takes when it is merged; empty: of none."""
    earlier_rows: tuple[EarlierRows, ...] = ()
    """Evaluation rows of the revisions before it, oldest first. Its scores are on these and its own together."""

    pool: str = ""
    """Pool whose workers train it; empty in records of releases up to 0.3."""

    state: TaskState = TaskState.QUEUED
    revision: int = 0
    """Counts the writes; a writer that read an older revision is refused."""
    reason: str = ""
    """Why it is rejected, parked or cancelled, or waits again, for people."""
    reason_codes: tuple[str, ...] = ()
    """The same for programs: codes of `task_events.Reason` and `gate.Rule`, each a row of docs/trouble.md. Text,
    because a newer release may know more of them. Empty in records of releases up to 0.3."""
    cancel_requested: bool = False
    paused: Pause | None = None
    """Pause of this task alone; those of its team and of the service are no part of it."""
    awaits: tuple[str, ...] = ()
    """Ids of the tasks in `spec.after` that are not published yet."""
    not_due: bool = False
    """Whether its `spec.not_before` has not come."""

    deadline_outlook: str = ""
    """What was foreseen last of its `spec.deadline`: `missed`, `cannot be met`; empty: nothing bad."""

    attempt: int = 0
    token: str = ""
    """Lease of the running attempt: a report that names another one is stale."""
    worker: str = ""
    places: int = 1
    """Places of that worker: its ranks."""
    gpus: float = 0.0
    """GPUs of each of them."""
    claimed_at: float | None = None
    """When a worker last got the order to train it."""
    order_at: float | None = None
    """When a worker last got an order for it: to train it, or to refine it."""
    lost_machines: int = 0
    worker_deaths: int = 0
    """How many of its attempts ended with the process that did them, while the machine went on."""
    own_bugs: int = 0
    preemptions: int = 0
    """How often it gave up its worker, with a checkpoint. For people: it counts against no budget."""
    preempt_requested: bool = False
    """Whether its running attempt should write a checkpoint and go back to the queue."""
    gives_back: bool = False
    """Whether it should do so because its team is beyond its quota."""
    gave_back_at: float | None = None
    """When the attempt before the running, or the next, one ended for that; None: it ended otherwise, or there was
    none."""

    ran_seconds: float = 0.0
    """Seconds for which workers had it in earlier attempts."""
    ran_too_long: bool = False
    """Whether its running attempt is stopped for `spec.max_run_seconds`."""

    first_step_at: float | None = None
    train_seconds: float | None = None
    train_loss: float | None = None
    steps: int = 0
    staging_key: str = ""
    local_results_key: str = ""
    """Storage key of each evaluation row's result with that attempt's adapter; empty without evaluation rows."""
    adapter_sha256: str = ""
    adapter_parameters: int = 0
    local_score: float | None = None
    base_score: float | None = None
    metrics: Mapping[str, float] = Field(default_factory=dict)
    """All metrics of the kind for its own adapter before merging."""
    scores_of_rows: Mapping[str, float] = Field(default_factory=dict)
    """Of a revision: id of the revision that brought evaluation rows to the score of its own adapter on them."""
    main_scores_of_rows: Mapping[str, float] = Field(default_factory=dict)
    """The same of what `main` answered when it was trained."""
    method: str = ""
    """Method that `auto` chose, else the spec's method.name."""
    compared: tuple[str, ...] | None = None
    """Methods that `auto` compared, none if it was trained as a plain `lora`; None: not `auto`, or not known."""
    trainable_parameters: int = 0
    """Numbers that were trained, the head not counted."""
    basis_version: int = 0
    """Version whose basis was leased for training; 0: none."""
    resumed_from: int = 0
    """Step of the checkpoint that the last attempt went on from; 0: from the start."""

    merge_key: str = ""
    """Operation key of the merge it is part of: the same merge asked for again is the same version."""
    merge_alone: bool = False
    """Its group failed the gate: it is merged by itself, which shows the task at fault."""
    version: int = 0
    """Version of birth in the lineage of `main`: the first that is judged with it. 0 before merging."""
    refined_key: str = ""
    """Storage key of its adapter after the refinement; empty when there was none."""
    refined_sha256: str = ""
    refined_seconds: float | None = None
    again_token: str = ""
    """Token of the order of the last refinement in a later version (`share_full`): reported twice, it counts once."""
    unrefined: str = ""
    """Why it was not refined, though it was to be."""
    ended_at: float | None = None

    @property
    def blocked(self) -> str:
        """Code of what keeps it from standing in line, while it is queued; empty where it stands in line. Of several
        the first in the order of `orchestrator.scheduling.reasons.WaitCode`."""
        if self.state is not TaskState.QUEUED:
            return ""
        holds = zip(BLOCKS, (self.paused, self.awaits, self.not_due), strict=True)
        return next((str(code) for code, what in holds if what), "")

    @property
    def trouble(self) -> tuple[str, ...]:
        """Codes of the rows of docs/trouble.md that say what to do; empty where nothing is wrong."""
        ended = (str(self.state),) if self.state in ENDED_WITHOUT_RESULT else ()
        return self.reason_codes or ended

    @property
    def base_model(self) -> str:
        """Name of the base model whose subspace it belongs to."""
        return self.spec.base_model

    @property
    def title(self) -> str:
        """`team/name`, what people call it: one task of the service, whatever its base model."""
        return f"{self.team}/{self.name}"

    @property
    def exact_title(self) -> str:
        """The same with the number of a later revision: `team/name@2`."""
        return self.title if self.number == 1 else f"{self.title}@{self.number}"

    @property
    def came_to_something(self) -> bool:
        """Whether it is, or was, or may still be a revision that `main` serves: its number belongs to it."""
        given_up = self.state in (TaskState.REJECTED, TaskState.CANCELLED)
        return not given_up and not (self.state is TaskState.PARKED and not self.version)

    @property
    def own_rows(self) -> EarlierRows:
        """Its evaluation rows, as later revisions know them."""
        return EarlierRows(
            task_id=self.task_id,
            number=self.number,
            eval_key=self.eval_key,
            eval_count=self.eval_count,
            eval_sha256=self.eval_sha256,
        )

    @property
    def is_scored(self) -> bool:
        """Whether there are evaluation rows, of its own or of a revision before it."""
        return bool(self.eval_key or self.earlier_rows)

    @property
    def scored_count(self) -> int:
        """Number of the evaluation rows that it is scored on, those of revisions before it included."""
        return self.eval_count + sum(rows.eval_count for rows in self.earlier_rows)

    @property
    def numbers_of_rows(self) -> dict[str, int]:
        """Id of each revision whose evaluation rows it is scored on to that revision's number, oldest first."""
        own = {self.task_id: self.number} if self.eval_key else {}
        return {rows.task_id: rows.number for rows in self.earlier_rows} | own

    def rows_asked(self, ranks: int) -> float:
        """Rows that it is to be trained on, one as often as it is read; 0 where it is not trained here.

        Args:
            ranks: Processes that train it together.
        """
        if self.spec.method.name == "import" or not self.train_count:
            return 0.0
        return float(self.spec.training.steps(self.train_count, ranks) * self.spec.training.rows_per_step(ranks))

    def doubt(self, score: float | None, base_score: float | None = None) -> str:
        """A warning where a score of this task does not show that anything was learnt; else empty.

        Args:
            base_score: Score of the base model alone, where the record does not hold it yet.
        """
        constant, base = self.constant_score, self.base_score if base_score is None else base_score
        if score is None or math.isnan(score):
            return ""
        if constant is None or score > constant + ROUNDING:
            if base is None or not score <= base + ROUNDING:  # nor where it is NaN
                return ""
            return (
                f"{self.spec.metric} {score:.4f} is no better than the base model alone, which scores {base:.4f}: look "
                "at the labels, the learning rate and the number of steps"
            )
        is_number = self.spec.kind in REGRESSION_KINDS
        answer = "the same number" if is_number else "the most frequent label of the evaluation rows"
        return (
            f"{self.spec.metric} {score:.4f} is no better than always giving {answer}, which scores {constant:.4f}: "
            "look at the labels, the learning rate and the number of steps"
        )


def new_task_id(now: float | None = None) -> str:
    """An id that sorts by time and is unique without a counter: ids outlive a lost database in the version log."""
    # 48 bits: of a thousand tasks in one second no two may write to the same keys of the storage.
    return f"t{int(now if now is not None else time.time()):09x}{secrets.token_hex(6)}"


def born_at(task_id: str) -> float | None:
    """Unix time at which `new_task_id` made an id, to the second; None: something else made it."""
    found = re.fullmatch("t([0-9a-f]{9})[0-9a-f]{12}", task_id)
    return float(int(found[1], 16)) if found else None


def staging_key(task_id: str, attempt: int, token: str) -> str:
    """Storage key of one attempt's adapter; no two attempts share a key."""
    return f"staging/{task_id}/{attempt}-{token}/adapter.safetensors"


def results_key(task_id: str, version: int) -> str:
    """Storage key of each evaluation row's result under a version: the same key, whichever worker scored it."""
    return f"results/{task_id}/{version}.safetensors"


def local_results(record: TaskRecord) -> str:
    """The same with the adapter of the running attempt, before merging; no two attempts share a key.

    Two attempts may run at once, since one that lost its lease may not know it, and their adapters differ. Empty
    without rows.
    """
    name = f"local-{record.attempt}-{record.token}"
    return f"results/{record.task_id}/{name}.safetensors" if record.is_scored else ""
