"""What each request is answered, as types: read by /openapi.json, and held against every reply of the tests.

Where an answer is a record, its shape is that record. The others are put together of several sources, by views.py and
the methods that requests call; a field that one of these adds is named here, or a test fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from pydantic import TypeAdapter, create_model
from typing_extensions import TypedDict

from configs.document import Request
from configs.settings import Settings
from configs.task_spec import TaskSpec
from orchestrator.api import requests
from orchestrator.tasks.audit_log import AuditRow, Verified
from orchestrator.tasks.task_record import Drain
from orchestrator.tasks.task_rows import NamedEvent, TaskEvent
from orchestrator.tasks.token_book import TokenRecord
from subspace_store import requests as store
from subspace_store.commands.in_doubt import Doubt
from subspace_store.log.version import Hold, MergedTask
from subspace_store.subspace_reader import Footprint

REF = "#/components/schemas/{model}"
HIDDEN = {
    "type": "object",
    "additionalProperties": {"type": "integer"},
    "description": "Lists of this object to how many rows of other teams' tasks were left out of each.",
}

Json = dict[str, Any]
Facts = dict[str, Any]
"""JSON values whose names are not fixed."""


class Told(TypedDict):
    """An error inside an answer."""

    kind: str
    code: str
    what: str
    where: str
    todo: str
    exit_code: NotRequired[int]
    text: NotRequired[str]


class ProblemShape(Told):
    """Why a request was refused (RFC 9457). Classes of errors have further fields, named in configs/errors.py."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


# --- tasks -------------------------------------------------------------------------------------------------------


class Interval(TypedDict):
    """An estimate in seconds from now: the median, and the ends between which four of five fall."""

    seconds: float
    earliest: float
    latest: float


class DeadlineShape(TypedDict):
    at: float
    outlook: Literal["missed", "cannot be met", "may be missed", "met", "unknown"]


class LateShape(TypedDict):
    title: str
    at: float
    outlook: str


class WaitShape(TypedDict):
    """Why a task waits."""

    code: str
    pool: str
    about: str
    since: float | None
    until: float | None
    who: str


class PauseShape(TypedDict):
    by: str
    reason: str
    at: float


class TaskRow(TypedDict):
    """A task in short."""

    task_id: str
    title: str
    team: str
    name: str
    revision: int
    exact_title: str
    base_model: str
    pool: str
    state: str
    reason: str
    trouble: list[str]
    place: int | None
    starts_in_seconds: float | None
    start: Interval | None
    end: Interval | None
    deadline: DeadlineShape | None
    submitted_at: float
    attempt: int
    worker: str
    version: int | None
    metric: str
    eval_rows: int
    base_score: float | None
    local_score: float | None
    doubt: str
    progress: Facts


class ListedTask(TaskRow):
    main_score: float | None
    main_score_problem: str
    gone_from_main: bool
    held: str
    wait: WaitShape | None


class Adapter(TypedDict):
    staging_key: str
    sha256: str
    parameters: int


class PointShape(TypedDict):
    """Figures of training at one step."""

    at: float
    step: int
    loss: float | None
    learning_rate: float | None
    steps: int
    samples_per_second: float | None
    tokens_per_second: float | None
    memory_bytes: int
    resumed_from: int
    method: str
    candidate: str
    machine: dict[str, float | None]


class TrainingShape(TypedDict):
    steps: int
    loss: float | None
    seconds: float | None
    submit_to_first_step_seconds: float | None
    claim_to_first_step_seconds: float | None
    lost_machines: int
    worker_deaths: int
    own_bugs: int
    preemptions: int
    refined_seconds: float | None
    unrefined: str
    share_full: bool
    asked_method: str
    method: str
    compared: Any
    trainable_parameters: int
    basis_version: int
    revises: str
    start: str
    resumed_from: int
    last_point: PointShape | None
    plot: str | None


class Result(TypedDict):
    """Scores of a task that a version holds."""

    version: int
    score_at_birth: float | None
    main: int
    score_under_main: float | None


class RevisionShape(TypedDict):
    revision: int
    task_id: str
    state: str
    revises: str
    version: int | None
    submitted_at: float
    train_rows: int
    new_eval_rows: int
    local_score: float | None
    main_score: float | None


class ScoresOfRows(TypedDict):
    """Scores of a task's newest revision on the rows of one of them."""

    revision: int
    task_id: str
    first: float | None
    main_before: float | None
    own: float | None
    under_main: float | None


class AlarmShape(TypedDict):
    code: str
    about: str
    what: str
    todo: str
    since: float
    text: str
    base_model: NotRequired[str]


class SideShape(TypedDict):
    """Requests that a version answered, with times of the last ones."""

    requests: int
    p50_seconds: float | None
    p99_seconds: float | None


class ComparedShape(TypedDict):
    """Requests of a task that the canary answered, rows that `main` answered too, and those that both answered
    alike."""

    requests: int
    rows: int
    agreed: int


class CanaryShape(TypedDict):
    main_version: int
    version: int
    main: SideShape
    canary: SideShape
    failed: int
    """Requests that the canary could not answer, and `main` did."""
    not_compared: int
    tasks: dict[str, ComparedShape]


class CanaryOfTask(ComparedShape):
    version: int
    main_version: int


class ReplicaOfTask(TypedDict):
    """A process that answers, and which revision of the task it does by."""

    pid: int
    version: int
    task_id: str | None
    revision: int | None
    trouble: str


class ServedShape(TypedDict):
    """What callers get who ask for the task by its name over HTTP."""

    url: str
    state: str
    message: str
    canary: CanaryOfTask | None
    replicas: list[ReplicaOfTask]


class TaskShape(TaskRow):
    """All of a task."""

    served: ServedShape | None

    main_score: float | None
    gone_from_main: bool
    why: str
    wait: WaitShape | None
    result: Result | None
    alarms: list[AlarmShape]
    revisions: list[RevisionShape]
    scores_of_rows: list[ScoresOfRows]
    spec: TaskSpec
    train_rows: int
    eval_sha256: str
    adapter: Adapter
    training: TrainingShape
    metrics: dict[str, float | None]
    events: list[TaskEvent]
    warnings: list[str]


class Accepted(TaskRow):
    """A task that was taken in, or that was there already."""

    accepted: Literal[True]
    is_new: bool
    warnings: list[str]


class Outlook(TypedDict):
    """What a dry run has found; of a task that is there already, without what it would meet."""

    accepted: Literal[False]
    dry_run: Literal[True]
    is_new: bool
    title: str
    train_rows: int
    eval_rows: int
    warnings: list[str]
    pool: NotRequired[str]
    fits: NotRequired[bool]
    why: NotRequired[str]
    wait: NotRequired[WaitShape | None]
    place: NotRequired[int | None]
    start: NotRequired[Interval | None]
    end: NotRequired[Interval | None]
    length_seconds: NotRequired[float | None]
    cost_place_seconds: NotRequired[float | None]
    cost_gpu_seconds: NotRequired[float | None]
    runs_too_long: NotRequired[str]
    deadline: NotRequired[DeadlineShape | None]


class PausedTask(TaskRow):
    is_new: bool
    paused: PauseShape | None


class PausedTeam(TypedDict):
    """A team's pause; without a team, that of the service."""

    team: str | None
    is_new: bool
    paused: PauseShape | None


class Drained(TypedDict):
    what: str
    is_node: bool
    is_new: bool
    drain: Drain | None
    workers: dict[str, str]


class Unchanged(TypedDict):
    title: str
    why: str


class RefusedTask(TypedDict):
    title: str
    error: Told


class ChangedMany(TypedDict):
    change: requests.Change
    done: list[str]
    unchanged: list[Unchanged]
    refused: list[RefusedTask]


class TeamShape(TypedDict):
    weight: float
    share: float
    places_quota: int | None
    place_hours_a_week_quota: float | None
    gpu_hours_a_week_quota: float | None
    places: int
    place_hours_a_week: float
    gpu_hours_a_week: float


class TeamsShape(TypedDict):
    teams: dict[str, TeamShape]


class Predictions(TypedDict):
    """Each row's answer: a label with probabilities, a value, a text, or an error."""

    task: str
    base_model: str
    version: int
    answers: list[Facts]


class FileToSend(TypedDict):
    """What a task document names that has to be sent."""

    key: str
    place: str
    folder: str
    """Folder of the upload that it is to be in."""
    only: list[str]
    """Names of the files that are read, of a folder; empty: all."""


class ReadTaskShape(TypedDict):
    title: str
    task: TaskSpec
    files: list[FileToSend]


PieceShape = TypedDict("PieceShape", {"from": int, "is_whole": bool})
MissingFile = TypedDict("MissingFile", {"sha256": str, "bytes": int, "from": int})


class UploadShape(TypedDict):
    upload_id: str
    is_kept: bool
    missing: list[MissingFile]


class KeptUpload(TypedDict):
    upload_id: str
    files: int
    bytes: int
    is_new: bool


class Found(TypedDict):
    """For each text the task that it is for, with its answer, or an error."""

    base_model: str
    version: int
    answers: list[Facts]


# --- versions ----------------------------------------------------------------------------------------------------


class VersionRow(TypedDict):
    """A version in short."""

    version: int
    parent: int
    status: str
    refs: list[str]
    tags: list[str]
    reason: str
    created_at: float
    added: list[str]
    refined: list[str]
    remakes: int | None
    removed: list[str]
    task_count: int
    rank_max: int
    bytes_written: int
    merge_seconds: float
    base_model: str


class ScoreCell(TypedDict):
    """A score, and where it was measured."""

    score: float | None
    measured_at: int | None
    rows: int | None
    general_loss: float | None
    """What the language model loses by the task, in nats for each token of `base_model.general_text`."""


class HeldTask(ScoreCell):
    """A task as a version holds it."""

    task_id: str
    title: str
    birth: int
    made_in: int
    error_at_birth: float
    error: float


class MeanShape(TypedDict):
    value: float | None
    n: int
    half_width_95: float | None


class Means(TypedDict):
    average_accuracy: MeanShape
    backward_transfer: MeanShape
    forgetting: MeanShape
    merge_gap: MeanShape


class MeansOfVersion(Means):
    version: int


class StoredFootprint(TypedDict):
    """How many numbers have to be stored to serve all tasks of a version, and what the store takes."""

    version: int
    tasks: int
    basis_numbers: int
    coefficient_numbers: int
    private_numbers: int
    head_numbers: int
    separate_numbers: int
    stored_bytes: int


class VersionShape(VersionRow, Means):
    """All of a version."""

    tasks: list[HeldTask]
    ranks: dict[str, list[int]]
    footprint: StoredFootprint


class DiffShape(TypedDict):
    """What lies between two versions."""

    old: int
    new: int
    added: list[MergedTask]
    removed: list[MergedTask]
    ranks: dict[str, list[list[int]]]
    overlap: dict[str, list[float | None]]
    drift_bound: dict[str, float | None]
    base_model: str
    scores: dict[str, list[float | None]]
    titles: dict[str, str]


class RowsOfRevision(TypedDict):
    task_id: str
    rows: int
    scores: list[float | None]
    revision: int | None
    main_before: float | None
    local: float | None


class ScoreColumn(TypedDict):
    task_id: str
    title: str
    birth: int
    metric: str | None
    rows: int | None
    base: float | None
    local: float | None
    share_full: bool
    revision: int | None
    of_rows: list[RowsOfRevision]


class ScoreFrame(TypedDict):
    base_model: str
    version: int
    versions: list[int]
    tasks: list[ScoreColumn]


class Scores(ScoreFrame):
    """A[version][task] with the means of each version."""

    matrix: list[list[ScoreCell]]
    by_version: list[MeansOfVersion]
    footprint: StoredFootprint
    canary: CanaryShape | None
    """How another version answers a share of what is asked; None: none does."""


class Matrix(ScoreFrame):
    """A[version][task] as what changed: for each version, column, score and rows."""

    news: list[list[list[float | None]]]


class TaskSize(TypedDict):
    task_id: str
    title: str
    separate_numbers: int
    coefficient_numbers: int
    private_numbers: int
    foundation_numbers: int
    error_at_birth: float
    error: float


class FlippedRow(TypedDict):
    """An evaluation row, and its share in the two scores."""

    row: int
    """Its place among the task's evaluation rows, from 0."""
    before: float
    after: float
    inputs: Facts | None
    """None for pictures, and where the rows are not the compared ones any more."""
    expected: str | None


class FlippedShape(TypedDict):
    base_model: str
    task_id: str
    title: str
    metric: str
    version: int
    measured_at: int
    """Version whose measurement counts in this one."""
    against: int
    """Version that it is compared with; 0: the task's own adapter, before merging."""
    rows: int
    worse: int
    better: int
    mean: float
    low: float | None
    high: float | None
    """Ends of the mean's 95 % interval; None where too few rows say nothing of it."""
    flipped: list[FlippedRow]


class Capacity(TypedDict):
    base_model: str
    version: int
    footprint: StoredFootprint
    rank_max: int
    tasks: list[TaskSize]
    trend: list[Footprint]


class Named(TypedDict):
    """Which versions the branches named at a moment, and what `main` held."""

    base_model: str
    at: float
    seq: int
    branches: dict[str, int]
    expired: bool
    tasks: list[str]


class Stayed(TypedDict):
    """Tasks that both versions hold, how many of them have a score in both, and the means of these scores."""

    tasks: int
    measured: int
    before: float | None
    after: float | None


MoveShape = TypedDict(
    "MoveShape",
    {
        "seq": int,
        "time": float,
        "actor": str,
        "how": str,
        "reason": str,
        "holds": bool,
        "from": int,
        "to": int,
        "expired": bool,
        "came": list[str],
        "left": list[str],
        "replaced": list[str],
        "changed": list[str],
        "scores": dict[str, list[float | None]],
        "stayed": Stayed,
    },
)
"""A move of a branch, and what it did to tasks."""


class History(TypedDict):
    """Moves of a branch, the newest first. before: What to ask for the next page with; null: there is none."""

    base_model: str
    branch: str
    moves: list[MoveShape]
    before: int | None


class RollbackShape(TypedDict):
    preview: bool
    held: bool
    from_version: int
    to_version: int
    vanishing: list[str]
    returning: list[str]
    base_model: str


class RollbackPreviewed(RollbackShape):
    refused: str


class RolledBackTo(RollbackShape):
    op_key: str
    repeated: bool
    main: int


class RejectedVersion(TypedDict):
    """A version that a person refused. tasks: titles of those that it brought; of several, each is merged again by
    itself."""

    base_model: str
    version: int
    tasks: list[str]
    reason: str
    main: int
    repeated: bool


class RestoreShape(TypedDict):
    preview: bool
    base_model: str
    title: str
    task_id: str
    leaving: str
    version: int
    error: float
    approximate: bool
    others_move: bool


class RestorePreviewed(RestoreShape):
    refused: str


class RestoredTo(RestoreShape):
    repeated: bool
    main: int
    op_key: str


class RemovalPreviewed(TypedDict):
    """What removing a task would do. revisions: ids of it and of its earlier ones, which go with it. start: version
    after which those are made again that hold it. Numbers: what serving all tasks takes, heads not counted."""

    preview: bool
    base_model: str
    task_id: str
    title: str
    revisions: list[str]
    start: int
    versions: list[int]
    numbers_before: int
    numbers_after: int
    refused: str


class StorageShape(TypedDict):
    """What a store takes. stored_bytes: of what the versions need that have not expired. garbage: what none of them
    needs, with what is written at this moment; garbage_bytes: of those objects that a version once named."""

    base_model: str
    storage: str
    versions: int
    expired: list[int]
    rejected: list[int]
    stored_bytes: int
    garbage_objects: int
    garbage_bytes: int


# --- the service -------------------------------------------------------------------------------------------------


class WorkerShape(TypedDict):
    state: str
    does: str
    machines: list[str]


class PoolShape(TypedDict):
    base_model: str
    ranks: int
    min: int
    max: int
    ready: int
    busy: int
    warm: int
    starting: int
    drained: int
    workers: dict[str, WorkerShape]


class OfBase(TypedDict):
    base_model: str
    held: NotRequired[Hold | None]


class HealthShape(TypedDict):
    """What the process knows by itself; what only a running service knows is left out where none runs."""

    base_model: str | None
    held: NotRequired[Hold | None]
    base_models: list[OfBase]
    running: bool
    alarms: list[AlarmShape]
    pools: NotRequired[dict[str, PoolShape]]
    drains: NotRequired[list[Drain]]
    pid: NotRequired[int]
    up_seconds: NotRequired[float]
    leadership: NotRequired[Facts]
    loop_seconds_ago: NotRequired[float]
    heard_seconds_ago: NotRequired[float]
    workers: NotRequired[dict[str, str]]
    workers_ready: NotRequired[int]
    load_errors: NotRequired[dict[str, Facts]]
    store_is_open: NotRequired[bool]
    store_error: NotRequired[Facts | None]
    mlflow_behind: NotRequired[bool | int]
    mlflow_error: NotRequired[str | None]
    traces_behind: NotRequired[int | None]
    traces_error: NotRequired[str]


class StatusOfBase(TypedDict):
    base_model: str
    storage: str
    main: int | None
    candidate: int | None
    held: Hold | None
    gone_from_main: int
    not_in_database: int
    footprint: StoredFootprint | None
    in_doubt: list[Doubt]


class Pauses(TypedDict):
    service: PauseShape | None
    teams: dict[str, PauseShape]


class StatusShape(HealthShape):
    """Health, with what the store and the database say. What belongs to one base model is null where there are
    several."""

    mlflow: str
    storage: str | None
    main: int | None
    candidate: int | None
    gone_from_main: int
    not_in_database: int
    footprint: StoredFootprint | None
    in_doubt: list[Doubt]
    tasks: dict[str, int] | None
    waiting: NotRequired[dict[str, dict[str, int]]]
    left_base_models: NotRequired[dict[str, int]]
    paused: NotRequired[Pauses]
    late: list[LateShape]
    left_running: list[str]
    serving: Facts
    base_models: list[StatusOfBase]  # type: ignore[misc]  # more is said of each here


class Who(TypedDict):
    name: str
    token_id: str
    roles: dict[str, str]
    expires_at: float | None


class TokenShape(TypedDict):
    token_id: str
    name: str
    kind: str
    team: str
    role: str
    created_at: float
    created_by: str
    expires_at: float | None
    used_at: float | None
    revoked_at: float | None


class NewToken(TokenShape):
    """A token with its secret, which is shown once."""

    token: str


class RotatedToken(NewToken):
    replaces: str


class DeliveryShape(TypedDict):
    """A message to a webhook, and what became of it."""

    id: str
    webhook: str
    kind: str
    time: float
    task_id: str | None
    title: str | None
    base_model: str | None
    version: int | None
    sentence: str
    tries: int
    status: str
    answer: str
    tried_at: float | None
    due_at: float | None


class WebhookShape(TypedDict):
    webhook: str
    team: str | None
    host: str
    events: list[str]
    waiting: int
    last: DeliveryShape | None


class Webhooks(TypedDict):
    webhooks: list[WebhookShape]
    deliveries: list[DeliveryShape]


class TriedWebhook(DeliveryShape):
    host: str


class Reloaded(TypedDict):
    taken: list[str]
    base_models: list[str]
    serving: str | None


SHAPES: Mapping[type[Request], Any] = {
    requests.Status: StatusShape,
    requests.Health: HealthShape,
    requests.Submit: Accepted | Outlook,
    requests.ReadTask: ReadTaskShape,
    requests.MissingFiles: UploadShape,
    requests.SendPiece: PieceShape,
    requests.KeepUpload: KeptUpload,
    requests.ListTasks: list[ListedTask],
    requests.ListTeams: TeamsShape,
    requests.ShowTask: TaskShape,
    requests.Cancel: TaskRow,
    requests.Preempt: TaskRow,
    requests.Retry: Accepted,
    requests.Pause: PausedTask | PausedTeam,
    requests.Resume: PausedTask | PausedTeam,
    requests.ShowSettings: Settings,
    requests.Reload: Reloaded,
    requests.DrainWorker: Drained,
    requests.ChangeMany: ChangedMany,
    requests.Predict: Predictions,
    requests.Which: Found,
    requests.BranchesAt: Named,
    requests.ShowHistory: History,
    requests.ListWebhooks: Webhooks,
    requests.TryWebhook: TriedWebhook,
    requests.ReadEvents: list[NamedEvent],
    requests.ListVersions: list[VersionRow],
    requests.ShowVersion: VersionShape,
    requests.Diff: DiffShape,
    requests.PreviewRollback: RollbackPreviewed,
    store.Rollback: RolledBackTo,
    requests.RejectVersion: RejectedVersion,
    requests.PreviewRestore: RestorePreviewed,
    store.RestoreRevision: RestoredTo,
    requests.PreviewRemove: RemovalPreviewed,
    requests.ShowStorage: StorageShape,
    requests.ShowScores: Scores,
    requests.ShowMatrix: Matrix,
    requests.ShowFlipped: FlippedShape,
    requests.ShowCapacity: Capacity,
    requests.WhoAmI: Who,
    requests.ListTokens: list[TokenRecord],
    requests.CreateToken: NewToken,
    requests.RotateToken: RotatedToken,
    requests.RevokeToken: TokenRecord,
    requests.ReadAudit: list[AuditRow],
    requests.VerifyAudit: Verified,
}


def schema_of(record: type[Request]) -> tuple[Json, Json]:
    """The JSON schema of what a request is answered, and the schemas that it names, by their names.

    Raises:
        KeyError: Nobody has said what it is answered.
    """
    schema = TypeAdapter(_shape_of(record)).json_schema(ref_template=REF)
    named = schema.pop("$defs", {})
    for one in (schema, *named.values()):
        _add_hidden(one)
    return schema, named


def problem_schema() -> Json:
    """The JSON schema of an error."""
    return TypeAdapter(ProblemShape).json_schema(ref_template=REF)


def _shape_of(record: type[Request]) -> Any:
    if record in SHAPES or not issubclass(record, store.StoreRequest):
        return SHAPES[record]
    # What changes the store in another way is answered with what was asked for, and by whose name it was done.
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in record.model_fields.items() if name not in ("actor",)
    }
    fields |= {"operation": (Literal[record.operation], ...), "base_model": (str, ...), "op_key": (str, ...)}
    return create_model(f"{record.__name__}Done", **fields)


def _add_hidden(schema: Json) -> None:
    """Whatever holds a list may say how much of it the caller does not see: see shown.py."""
    properties = schema.get("properties", {})
    if any(inner.get("type") == "array" or "prefixItems" in inner for inner in properties.values()):
        properties["hidden"] = HIDDEN
