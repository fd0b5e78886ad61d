"""What people may ask of a service: one frozen record for each request.

The same object is what a command makes, what travels over HTTP, and what the service is handed. To follow a request, go
to its `on`, and from there to the method of the service. Requests to the store's writer alone are in
`subspace_store/requests.py`; routes.py lists both.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, Field

from configs.document import Line, Name, OfBaseModel, Request, Title, VersionNumber
from configs.errors import Unavailable
from configs.settings import RoleName, Settings
from configs.task_spec import TaskSpec
from configs.uploads import FILES_MAX, SentFile, Sha256, Size, check_names
from orchestrator.tasks.task_record import TaskState
from subspace_store.strict import Moment

if TYPE_CHECKING:
    from orchestrator.api.service import Service
    from orchestrator.tasks.uploads import Piece

Json = dict[str, Any]
Answer = TypeVar("Answer")

PAGE = 200
"""Number of tasks that are listed unless more are asked for."""
PAGE_MAX = 10_000
EVENTS = 1000
"""The same of events."""
MOVES = 20
"""Number of moves of a branch that are listed unless more are asked for."""
FLIPPED, FLIPPED_MAX = 50, 1000
"""Rows that flipped: listed unless more are asked for, and at most."""
PREDICTIONS_MAX = 256
"""Most rows of one request to be answered: a worker is kept from other work for so long."""

Reference = Annotated[Line, Field(min_length=1, description="an id, the beginning of one, team/name, or team/name@2")]
"""An id, the beginning of one, team/name, or team/name@2: its second revision."""
TokenId = Annotated[str, Field(pattern="^[0-9a-z-]{1,40}$", description="the id of a token")]


def _named_well(files: dict[str, SentFile]) -> dict[str, SentFile]:
    check_names(files)
    return files


SentFiles = Annotated[
    dict[str, SentFile],
    Field(min_length=1, max_length=FILES_MAX, description="a name, relative, for each file of an upload"),
    AfterValidator(_named_well),
]
EventNumber = Annotated[int, Field(ge=0, le=2**53)]


class ServiceRequest(Request, Generic[Answer]):
    """A request to the service, running or not."""

    needs_service: ClassVar[bool] = False
    """Whether only a running service can carry it out."""
    does: ClassVar[str] = "reading the store and the task database"
    """What the process that asks does where no service runs, for people who wait for it."""

    def on(self, service: Service) -> Answer:
        """Carry it out."""
        raise NotImplementedError

    def next_page(self, answer: Answer) -> Self | None:
        """The request for what follows on an answer; None: nothing does."""
        return None


def not_running(operation: str) -> Unavailable:
    """The error for a request that only a running service can carry out."""
    return Unavailable(f"the service is not running, and {operation} needs it", todo="start it with `onebasis up`")


class Status(ServiceRequest[Json]):
    """Whether the service is up, what its workers do, how many tasks are in which state."""

    def on(self, service: Service) -> Json:
        return service.status.status()


class Health(ServiceRequest[Json]):
    """Which alarms ring and what the workers do. Answered at once: neither the store nor the database is asked."""

    def on(self, service: Service) -> Json:
        return service.status.health()


class Metrics(ServiceRequest[str]):
    """What `status` says, and how many requests there were, in Prometheus' text format."""

    def on(self, service: Service) -> str:
        from orchestrator.reports.prometheus import metrics

        return metrics(service.status.status())


class Submit(ServiceRequest[Json]):
    """Take a task in. The same submission again is the same task."""

    needs_service = True
    task: TaskSpec
    dry_run: bool = False
    """Check everything, take nothing in."""
    beside: tuple[Title, ...] = ()
    """Tasks that will be submitted before this one: a dry run lets it come after them."""
    by: Line = "somebody"
    """Person who submits."""

    def on(self, service: Service) -> Json:
        return service.tasks.submit(self)


class ReadTask(ServiceRequest[Json]):
    """What a task file says, read as `onebasis submit` reads it, and which files have to be sent with it. For programs
    that read no YAML, such as a browser's page. Takes nothing in."""

    lines: Annotated[tuple[str, ...], Field(min_length=1, description="the lines of a task file")]

    def on(self, service: Service) -> Json:
        from orchestrator.api.sent_tasks import read_task

        return read_task(self.lines)


class MissingFiles(ServiceRequest[Json]):
    """Which files of an upload have to be sent, and from which byte on."""

    needs_service = True
    team: Name
    files: SentFiles

    def on(self, service: Service) -> Json:
        service.refuse_write()  # it writes nothing, and the leader's disk has the files
        return service.uploads.missing(self.team, self.files)


class SendPiece(ServiceRequest["Piece"]):
    """Send a piece of a file, which is the body: at most 8 MiB. Pieces of a file come in order; one of what has come
    already changes nothing, so that any may be repeated."""

    needs_service = True
    team: Name
    sha256: Sha256
    """Digest of the whole file."""
    bytes: Size
    """Its size."""
    offset: Size
    """Place of the piece's first byte in it."""

    def on(self, service: Service) -> Piece:
        return service.uploads.piece(self.team, SentFile(sha256=self.sha256, bytes=self.bytes), self.offset)


class KeepUpload(ServiceRequest[Json]):
    """Make an upload of files that have all come: from then on task documents may name it."""

    needs_service = True
    team: Name
    files: SentFiles

    def on(self, service: Service) -> Json:
        return service.uploads.keep(self.team, self.files)


class ListTasks(ServiceRequest[list[Json]]):
    """The newest tasks, oldest first."""

    team: Name | None = None
    state: TaskState | None = None
    base_model: OfBaseModel = None
    """Only tasks of this base model; None: of all."""
    live: bool = False
    """Only tasks that have not ended."""
    cursor: Line = ""
    """Id of a task: only older tasks are listed. Empty: the newest ones."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = PAGE
    """Tasks in the answer, at most."""

    def on(self, service: Service) -> list[Json]:
        return service.tasks.page(self)

    def next_page(self, answer: list[Json]) -> Self | None:
        return self.model_copy(update={"cursor": answer[0]["task_id"]}) if len(answer) == self.limit else None


class ListTeams(ServiceRequest[Json]):
    """The teams: weights, shares, quotas, and what they use now and used lately."""

    def on(self, service: Service) -> Json:
        return service.tasks.teams()


class ShowTask(ServiceRequest[Json]):
    """One task: state, place in the queue, progress, result, events."""

    reference: Reference

    def on(self, service: Service) -> Json:
        return service.tasks.one(self)


class Cancel(ServiceRequest[Json]):
    """Stop a task that is not part of a version yet."""

    needs_service = True
    reference: Reference
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.cancel(self)


class Preempt(ServiceRequest[Json]):
    """Have a running task write a checkpoint and go back to the queue."""

    needs_service = True
    reference: Reference
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.preempt(self)


class Retry(ServiceRequest[Json]):
    """Submit a task again that is parked, rejected or cancelled: the same document, its files as they are now."""

    needs_service = True
    reference: Reference
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.retry(self)


class Pause(ServiceRequest[Json]):
    """Start a task no more, or nothing of a team, or, with neither of them, nothing at all."""

    reference: Reference | None = None
    team: Name | None = None
    reason: Line = ""
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.pause(self)


class Resume(ServiceRequest[Json]):
    """Take a pause back: of a task, a team or, with neither of them, of the service."""

    reference: Reference | None = None
    team: Name | None = None
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.resume(self)


class DrainWorker(ServiceRequest[Json]):
    """Give a worker, or all that are on a machine, nothing new, and end them when they have nothing to do: before
    maintenance."""

    needs_service = True
    what: Annotated[Line, Field(min_length=1, max_length=255)]
    """Name of the worker, or address of the machine."""
    is_node: bool = False
    """Whether it is a machine."""
    let_end: bool = False
    """Whether what trains there ends first; else it writes a checkpoint and waits in the queue again."""
    undo: bool = False
    """Take it back."""
    reason: Line = ""
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.drain(self)


Branch = Literal["main", "candidate"]
"""A branch of a subspace."""
Change = Literal["cancel", "retry", "pause", "resume"]
"""What can be done to many tasks at once."""


class ChangeMany(ServiceRequest[Json]):
    """Cancel, retry, pause or resume the tasks of a team, in a state, or of a base model; of all that are named."""

    needs_service = True
    change: Change
    team: Name | None = None
    state: TaskState | None = None
    base_model: OfBaseModel = None
    """Only tasks of this base model; None: of all."""
    reason: Line = ""
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.tasks.change_many(self)


class Predict(ServiceRequest[Json]):
    """Have a published task answer rows: by a worker that is free, or, without a service, by the process that asks."""

    does = "loading the base model, and answering"
    reference: Reference
    inputs: Annotated[tuple[Json | str, ...], Field(min_length=1, max_length=PREDICTIONS_MAX)]
    """Rows, each with its inputs by their canonical names: `text` and `text_pair`, `prompt`, `messages`, or `image` as
    base64; or a text alone where the task reads one text."""
    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        service.refuse_write()  # it writes nothing, and the leader has the workers
        return service.answers.predict(self)


Way = Literal["features", "energy"]


class Which(ServiceRequest[Json]):
    """Find the task that each text is for, and have it answer. As `Predict`, but of no task by name."""

    does = "loading the base model, and answering"
    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=PREDICTIONS_MAX)]
    way: Way | None = None
    """By the base model's features of each task's evaluation rows, or without any row by the updates themselves.
    Default: by features where a task has some."""
    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None


class ReadEvents(ServiceRequest[list[Json]]):
    """What happened to tasks, with the lines of their logs and the points of their curves, oldest first: a page of it,
    or, as `text/event-stream`, what comes as well. A stream goes on behind the event that `Last-Event-ID` names."""

    reference: Reference | None = None
    """Only events of this task."""
    team: Name | None = None
    """Only events of this team's tasks."""
    kinds: Annotated[str, Field(pattern="^([A-Za-z]{1,40}(,[A-Za-z]{1,40}){0,39})?$")] = ""
    """Only events of these kinds, with commas between them; empty: of all."""
    after: EventNumber | None = None
    """Number of an event: only later ones. None: a page begins with the first one, a stream with the next one."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = EVENTS
    """Events of a page, at most."""

    def on(self, service: Service) -> list[Json]:
        return service.tasks.events(self)

    def next_page(self, answer: list[Json]) -> Self | None:
        return self.model_copy(update={"after": answer[-1]["event_id"]}) if len(answer) == self.limit else None


class ListVersions(ServiceRequest[list[Json]]):
    """The versions, oldest first: all of them, or a page."""

    base_model: OfBaseModel = None
    cursor: VersionNumber | None = None
    """Number of a version: only later ones are listed. None: from the first one on."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] | None = None
    """Versions in the answer, at most; None: any number."""

    def on(self, service: Service) -> list[Json]:
        later = [row for row in service.versions(self.base_model).all() if row["version"] > (self.cursor or 0)]
        return later[: self.limit]

    def next_page(self, answer: list[Json]) -> Self | None:
        return self.model_copy(update={"cursor": answer[-1]["version"]}) if len(answer) == self.limit else None


class BranchesAt(ServiceRequest[Json]):
    """Which versions the branches named at a moment, and what `main` held then."""

    at: Annotated[Moment, Field(description="a moment that has passed, in Unix seconds")]
    """Unix seconds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).named_at(self)


class ShowHistory(ServiceRequest[Json]):
    """The moves of a branch, the newest first: when, who, why, from which version to which, what that did to tasks."""

    branch: Branch
    before: Annotated[int, Field(ge=1, le=2**53, description="the number of a record of the version log")] | None = None
    """Sequence number of a move: only earlier ones are listed. None: the newest ones."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = MOVES
    """Moves in the answer, at most."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).history(self)


class ShowVersion(ServiceRequest[Json]):
    """One version: tasks, scores, ranks, drift, what is stored."""

    version: VersionNumber
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).one(self)


class Diff(ServiceRequest[Json]):
    """What lies between two versions."""

    old: VersionNumber
    new: VersionNumber
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).diff(self)


class PreviewRollback(ServiceRequest[Json]):
    """What moving `main` to a version would do. Changes nothing."""

    version: VersionNumber
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).preview_rollback(self)


class RejectVersion(ServiceRequest[Json]):
    """Refuse the version that waits to be published: for its canary, for a check, or since `main` is held. As one that
    the gate rejects, it stays readable, and `main` stays where it is."""

    needs_service = True
    version: VersionNumber
    reason: Annotated[Line, Field(min_length=1, description="why, in a line that the log keeps")]
    base_model: OfBaseModel = None
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).reject(self)


class PreviewRestore(ServiceRequest[Json]):
    """What putting an earlier revision of a task back would do. Changes nothing."""

    task_id: Line
    """Id of the earlier revision."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).preview_restore(self)


class PreviewRemove(ServiceRequest[Json]):
    """What removing a task from the versions would do: merged without it, in memory. Changes nothing."""

    task_id: Line
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).preview_remove(self)


class Export(ServiceRequest[bytes]):
    """One task at a version as a zipped PEFT folder."""

    reference: Reference
    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> bytes:
        return service.versions(self.base_model).export(self)


class ShowCapacity(ServiceRequest[Json]):
    """What a version's tasks store, shared and private, against separate adapters."""

    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).capacity(self)


class ShowStorage(ServiceRequest[Json]):
    """What a store takes, and what of it no version needs any more. Lists the storage, and deletes nothing."""

    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).stored()


class ShowScores(ServiceRequest[Json]):
    """The matrix A[version][task] of the lineage that ends in a version, and its means."""

    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).scores(self)


class ShowMatrix(ServiceRequest[Json]):
    """The matrix A[version][task] as a picture needs it: of each version the cells that differ from the one before."""

    version: VersionNumber | None = None
    """Default: what `main` holds."""
    base_model: OfBaseModel = None

    def on(self, service: Service) -> Json:
        return service.versions(self.base_model).matrix(self)


class ShowFlipped(ServiceRequest[Json]):
    """The evaluation rows of a task that a version answers otherwise than at the task's birth; of the version that it
    was born in, otherwise than its own adapter did. Those that changed most, the worst first."""

    reference: Reference
    version: VersionNumber | None = None
    """Default: what `main` holds."""
    limit: Annotated[int, Field(ge=1, le=FLIPPED_MAX)] = FLIPPED
    """Rows in the answer, at most."""

    def on(self, service: Service) -> Json:
        record = service.sources.queue.find(self.reference)
        return service.versions(record.base_model).flipped(record, self.version, self.limit)


class ShowSettings(ServiceRequest[Json]):
    """The settings that count now, without passwords."""

    def on(self, service: Service) -> Json:
        return service.status.settings()


class Reload(ServiceRequest[Json]):
    """Go on with new settings, as far as they can change without a restart; the rest is refused by name."""

    needs_service = True
    settings: Settings
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.reload(self)


class ListWebhooks(ServiceRequest[Json]):
    """The webhooks: where they are, what they are told of, how many deliveries wait, and the newest deliveries."""

    team: Name | None = None
    """Only those of this team; None: all that the caller sees."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = PAGE
    """Deliveries in the answer, at most."""

    def on(self, service: Service) -> Json:
        return service.webhooks.all(self)


class TryWebhook(ServiceRequest[Json]):
    """Send a webhook a message of kind `test`, as every other one is sent, and wait for what it answers."""

    needs_service = True
    name: Name
    team: Name | None = None
    """Team that it belongs to; None: it is the service's."""
    by: Line = "somebody"

    def on(self, service: Service) -> Json:
        return service.webhooks.test(self)


class WhoAmI(ServiceRequest[Json]):
    """Who asks, as the service knows it: name, roles, until when."""


class ListTokens(ServiceRequest[list[Json]]):
    """The tokens of the teams in which who asks is an admin, and its own; their secrets nobody can show."""


class CreateToken(ServiceRequest[Json]):
    """Make a token. The answer has it, once: it is kept as a digest."""

    name: Annotated[Line, Field(min_length=1, max_length=120, description="the name of a person or service account")]
    """Person or service account whose it is, as records name it."""
    role: RoleName
    team: Name | None = None
    """Team that it is for; None: all teams."""
    kind: Literal["person", "service"] = "person"
    days: Annotated[float, Field(gt=0, le=3650)] | None = 90.0
    """Days after which it ends; None: never."""
    by: Line = "somebody"


class RotateToken(ServiceRequest[Json]):
    """Make a new token in place of an old one: same account, team and role. Everybody may rotate their own."""

    token_id: TokenId
    grace_seconds: Annotated[float, Field(ge=0, le=604_800)] = 0.0
    """How long the old one still counts."""
    by: Line = "somebody"


class RevokeToken(ServiceRequest[Json]):
    """Let a token count no more. Everybody may revoke their own."""

    token_id: TokenId
    by: Line = "somebody"


class ReadAudit(ServiceRequest[list[Json]]):
    """Rows of the audit log, the oldest first: the newest ones, or those after a number."""

    cursor: EventNumber | None = None
    """Number of a row: only later ones are listed. None: the newest rows."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = PAGE
    """Rows in the answer, at most."""

    def on(self, service: Service) -> list[Json]:
        audit = service.sources.audit
        rows = audit.newest(self.limit) if self.cursor is None else audit.page(self.cursor, self.limit)
        return [asdict(row) for row in rows]

    def next_page(self, answer: list[Json]) -> Self | None:
        is_more = self.cursor is not None and len(answer) == self.limit
        return self.model_copy(update={"cursor": answer[-1]["seq"]}) if is_more else None


class VerifyAudit(ServiceRequest[Json]):
    """Read the audit log's whole chain of digests, and say whether it is as it was written."""

    known: Annotated[str, Field(pattern="^([0-9a-f]{64})?$", description="the digest of a row, or nothing")] = ""
    """Digest of a row that was noted earlier: rows that were cut off at the end are found by it."""

    def on(self, service: Service) -> Json:
        return asdict(service.sources.audit.verify(self.known))
