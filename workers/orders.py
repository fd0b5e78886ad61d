"""What the control plane asks of a worker and what the worker answers: frozen records, sent through Ray.

An order is idempotent by its token: given twice, it is done once and answered twice. So a control plane that was
restarted gives its orders again and finds the running work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from configs.errors import Corrupt, OnebasisError, Unavailable
from configs.task_spec import Kind, TaskSpec
from workers.chat_template import ChatTemplate
from workers.heads import HeadLayout


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which process of a gang this is. All ranks of a gang get the same order, each with its own rank."""

    index: int = 0
    size: int = 1
    master_address: str = "127.0.0.1"
    """Where rank 0 listens for the others."""
    master_port: int = 0

    @property
    def leads(self) -> bool:
        """Rank 0 alone reports, writes checkpoints and stages the adapter."""
        return self.index == 0


ALONE = Rank()


class RankLost(Unavailable):
    """A rank's process or machine is gone, does not answer, or does not reach the other ranks."""


class RankSilent(RankLost):
    """A rank does not answer: nobody says that its process has ended."""


class RowsDamaged(Corrupt):
    """The frozen rows of a task that is to be trained are gone or damaged; nothing else needs them."""


class RankDied(RankLost):
    """A rank's process ended while its machine went on: what it did is to blame."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Turn a task into an adapter in staging, and score it before merging."""

    token: str
    task_id: str
    attempt: int
    spec: TaskSpec
    train_key: str
    """Storage key of the frozen training rows; for `import`, of the adapter in canonical form."""
    eval_key: str
    """Storage key of the frozen evaluation rows; empty when an import brought none."""
    staging_key: str
    """Key for the adapter: `staging/<task>/<attempt>-<token>/adapter.safetensors`. Checkpoints go beside it; those of
    the task's earlier attempts are found below `staging/<task>/`."""
    results_key: str = ""
    """Storage key for each evaluation row's result with the adapter before merging; empty: not kept."""
    revises: str = ""
    """Id of the revision whose place it will take: what `main` serves of it is where training starts, unless
    `spec.start` is `base`, and is scored on all rows. Empty: it revises none."""
    earlier_rows: Mapping[str, str] = field(default_factory=dict)
    """Id of each revision before it to the storage key of its evaluation rows, oldest first: scored on them too."""
    refine_version: int = 0
    """Above 0: instead of method.name, train the task's own coefficients in this version's frozen basis."""
    again: bool = False
    """Whether this refines a published task for a later version (`share_full`): the task holds no lease for it."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score one task under one version."""

    token: str
    task_id: str
    version: int
    spec: TaskSpec
    eval_key: str
    """Storage key of its evaluation rows; empty if only revisions before it have some."""
    results_key: str = ""
    """Storage key for each evaluation row's result; empty: not kept."""
    earlier_rows: Mapping[str, str] = field(default_factory=dict)
    """As in `Train`."""
    general_text: str = field(default="", repr=False)
    """Text on which it is measured what the language model loses by the task; empty: not measured."""


@dataclass(frozen=True, kw_only=True)
class EvaluateTogether:
    """Score several tasks under one version, in mixed batches; see `workers/mixed_scoring.py`."""

    token: str
    version: int
    orders: tuple[Evaluate, ...]
    """One for each task, all of classifications of texts."""


Order = Train | Evaluate | EvaluateTogether


@dataclass(frozen=True, kw_only=True)
class BaseLayout:
    """What a warm worker knows of its base model; the control plane checks submissions against it."""

    sha256: str
    module_shapes: Mapping[str, tuple[int, int]]
    """(N, D) of every linear layer that may be adapted."""
    length_max: int
    """Longest input in tokens."""
    kinds: tuple[Kind, ...]
    """The kinds of task that the base model can be adapted to."""
    heads: Mapping[Kind, HeadLayout] = field(default_factory=dict)
    """Head layout of each kind: what its tasks have beside the shared layers."""
    called: tuple[str, ...] = ()
    """Names by which the checkpoint itself says it is known; often none."""
    chat_template: ChatTemplate | None = None
    """How its tokenizer renders messages; None where it cannot."""
    tokenizer: bytes = field(default=b"", repr=False)
    """Its tokenizer, as `workers.tokens.packed` has it; empty without one. A vocabulary of 30,000 words takes 1 MB."""
    rounding: Mapping[str, float] = field(default_factory=dict)
    """Layer to the spectral norm below which an update of it is lost in the rounding of the layer's own outputs;
    without the quantised ones."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Figures of training at one step: a line of its log, and a point of its curves."""

    at: float
    """Unix time."""
    step: int
    loss: float
    """Mean over the steps since the point before."""
    learning_rate: float
    steps: int = 0
    samples_per_second: float = float("nan")
    tokens_per_second: float = float("nan")
    memory_bytes: int = 0
    """Memory, speeds and steps have the same meaning as in `Progress`."""
    resumed_from: int = 0
    """Step of the checkpoint that this attempt went on from; 0: from the start."""
    method: str = ""
    """Method; `refine` for a refinement, whose steps are counted separately."""
    candidate: str = ""
    """Which of the trainings of `auto` it belongs to, each with a curve of its own: a method, or `METHOD on all rows`
    for the last. Empty where the task is trained once."""
    machine: Mapping[str, float] = field(default_factory=dict)
    """Figures of the machine of rank 0, see workers/machine.py."""


LogLine = str | Point


class Phase(StrEnum):
    """What a worker does."""

    IDLE = "idle"
    WAITING = "waiting"
    """Its ranks have no places yet."""
    LOADING = "loading"
    TRAINING = "training"
    SCORING = "scoring"
    SAVING = "saving"


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """When a worker did a part of an order, by its machine's clock."""

    phase: Phase
    candidate: str = ""
    """As in `Point`."""
    began: float
    """Unix time; so is `ended`."""
    ended: float


@dataclass(frozen=True, kw_only=True)
class DoneAt:
    """Where and when an order was done. For traces: nothing is decided by it."""

    node: str = ""
    """Name of the machine; of a gang, that of rank 0. Empty: nobody can say, the worker was lost."""
    phases: tuple[PhaseTime, ...] = ()
    """What the worker did in turn; of a gang, rank 0."""


NOWHERE = DoneAt()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The adapter is in staging."""

    token: str
    staging_key: str
    adapter_sha256: str
    adapter_parameters: int
    score_count: int
    """Number of evaluation rows; 0 when there are none, and then the scores are NaN."""
    local_score: float
    """Score with the task's own adapter, before merging."""
    base_score: float
    """Score of the base model under the task's own head, without the adapter."""
    steps: int
    """Steps of all trainings: `auto` has several."""
    train_loss: float
    """Mean loss of the training that the adapter comes from."""
    seconds: float
    first_step_at: float
    """Unix time at which the first optimisation step began; 0 for an import."""
    log_lines: tuple[LogLine, ...] = ()
    """Lines that no heartbeat has fetched."""
    method: str = ""
    """Method that `auto` chose, else method.name."""
    compared: tuple[str, ...] | None = None
    """Methods that `auto` compared, none if it was trained as a plain `lora`. None: the task did not ask for `auto`."""
    trainable_parameters: int = 0
    """Numbers that were trained, the head not counted."""
    basis_version: int = 0
    """Version whose basis was leased for training; 0 when none was."""
    resumed_from: int = 0
    """Step of the checkpoint that this attempt went on from; 0: from the start."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the kind for the adapter before merging, by name; the task's own is `local_score`."""
    scores_of_rows: Mapping[str, float] = field(default_factory=dict)
    """Of a revision: id of the revision that brought evaluation rows to the score on them before merging."""
    main_scores_of_rows: Mapping[str, float] = field(default_factory=dict)
    """The same of what `main` serves of the revision before it."""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the scores doubtful, for the owner of the task."""
    worker_seconds: float | None = field(default=None, compare=False)
    """Time that the order had the worker, loading, scoring and saving included. None: the worker cannot say."""
    done_at: DoneAt = field(default=NOWHERE, compare=False)
    """Where and when its parts were done."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A[version][task]."""

    token: str
    score: float
    count: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the kind, by name; the task's own is `score`."""
    of_rows: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Of a revision: id of the revision that brought evaluation rows to the score on them, and their number."""
    general_loss: float | None = None
    """What the language model loses by the task, see `workers/general_loss.py`; None where it was not measured."""
    worker_seconds: float | None = field(default=None, compare=False)
    """As in `Trained`."""
    done_at: DoneAt = field(default=NOWHERE, compare=False)
    """As in `Trained`."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The order could not be done; whose fault decides what happens next."""

    token: str
    fault: str
    """`input` (the user's: never retried), `bug` (ours), `cancelled`, `preempted` (a checkpoint is there, unless no
    step was done; costs no budget), `lost` (a machine, as the controller says; or a rank, as its gang says), `died`
    (said by the same: the process that did it ended, by itself or by a signal, and its machine went on), `rows` (the
    service's copy of the task's rows is gone or damaged: never retried), or `damaged`
    (the store, as the controller says: stored bytes are not what was written; costs no budget)."""
    message: str
    cause: OnebasisError | None = None
    """Error that says what is damaged, for `damaged`."""
    detail: str = ""
    """Traceback, for `bug`."""
    log_lines: tuple[LogLine, ...] = ()
    """Lines that no heartbeat has fetched."""
    worker_seconds: float | None = field(default=None, compare=False)
    """As in `Trained`; None for what was lost."""
    done_at: DoneAt = field(default=NOWHERE, compare=False)
    """As in `Trained`."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedTogether:
    """What became of each of the orders."""

    token: str
    outcomes: tuple[Evaluated | Failed, ...]
    """In the order of the orders."""
    seconds: float
    worker_seconds: float | None = field(default=None, compare=False)
    """As in `Trained`."""
    done_at: DoneAt = field(default=NOWHERE, compare=False)
    """As in `Trained`."""


Outcome = Trained | Evaluated | EvaluatedTogether | Failed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker is doing now; a heartbeat."""

    token: str = ""
    phase: Phase = Phase.IDLE
    trouble: OnebasisError | None = None
    """Error that keeps it from going on: the storage does not take its writes, or a rank does not answer."""
    candidate: str = ""
    """As in `Point`; its steps are then a part of those of all."""
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    learning_rate: float = float("nan")
    samples_per_second: float = float("nan")
    tokens_per_second: float = float("nan")
    """Of all ranks, padding not counted; NaN for images."""
    memory_bytes: int = 0
    """Most memory taken so far by one rank: the GPU's, or the process's where there is none."""
    seconds_left: float = float("nan")
    first_step_at: float = 0.0
    log_lines: tuple[LogLine, ...] = field(default=())
    """Lines since the heartbeat before."""
