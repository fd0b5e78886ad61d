"""The requests to a subspace's one writer: one frozen record for each.

A command makes the object, HTTP and Ray carry it, and the writer carries it out. A request's `on` calls the method of
the store that does it. A request holds nothing that the writer itself knows, such as the time.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from pydantic import Field, field_validator

from configs.document import NAME_PATTERN, Line, OfBaseModel, Request, VersionNumber
from configs.errors import NotWritten, OutcomeUnknown, Unavailable
from subspace_store.log.version import StagedAdapter, TaskScore
from subspace_store.log.version_log import outcome_unknown
from subspace_store.strict import Days, Moment, TaskId, Text

if TYPE_CHECKING:
    from subspace_store.log.version import Version
    from subspace_store.subspace_reader import RollbackPreview
    from subspace_store.subspace_store import SubspaceStore

Answer = TypeVar("Answer")


class StoreRequest(Request, Generic[Answer]):
    """A request to the writer, which may be repeated until it is answered."""

    operation: ClassVar[str]
    """Name of the operation in routes, commands and keys."""
    actor: Line = "somebody"
    """Person or part of the service that asks; kept in the log."""
    base_model: OfBaseModel = None
    """Names the store for a service that has several; a writer has one, and does not look at it."""
    op_key: Line = Field("", description="a text that begins with the name of the request")
    """Key of this request, beginning with the operation: a request that is repeated under its key is done once."""

    @field_validator("op_key")
    @classmethod
    def _key_names_no_other_request(cls, key: str) -> str:
        rest = key.removeprefix(cls.operation)
        if key and (rest == key or rest[:1].isalpha()):
            raise ValueError(
                f"has to begin with {cls.operation}, the name of the request, as in {cls.operation}:monday"
            )
        return key

    def named(self) -> Self:
        """The same request under a key, so that it can be asked again until it is answered."""
        return self if self.op_key else self.model_copy(update={"op_key": f"{self.operation}:{secrets.token_hex(8)}"})

    @contextlib.contextmanager
    def told_with_its_key(self) -> Iterator[None]:
        """A context to send the request in: an error that leaves the outcome unknown names the key to ask again under.

        Raises:
            OutcomeUnknown: Instead of any other `Unavailable` that does not say that the request has failed.
        """
        try:
            yield
        except (OutcomeUnknown, NotWritten):
            raise
        except Unavailable as error:
            what = f"the outcome of {self.operation} is unknown: {error.what}"
            raise outcome_unknown(what, self.op_key, error.where) from error

    def on(self, store: SubspaceStore) -> Answer:
        """Carry the request out."""
        raise NotImplementedError


class Merge(StoreRequest["Version"]):
    """Merge staged adapters into one version on `candidate`."""

    operation = "merge"
    adapters: tuple[StagedAdapter, ...]

    def on(self, store: SubspaceStore) -> Version:
        return store.merge(self.adapters, op_key=self.op_key, actor=self.actor)


class Refine(StoreRequest["Version"]):
    """Replace the adapters of tasks that the candidate holds by refined ones."""

    operation = "refine"
    adapters: tuple[StagedAdapter, ...]

    def on(self, store: SubspaceStore) -> Version:
        return store.refine(self.adapters, op_key=self.op_key, actor=self.actor)


class RestoreRevision(StoreRequest["Version"]):
    """Put an earlier revision of a task in the place of the one that the candidate holds."""

    operation = "restore-revision"
    task_id: TaskId
    """Id of the earlier revision."""
    publish: bool = False
    """Whether to move `main` as well."""

    def on(self, store: SubspaceStore) -> Version:
        return store.restore_revision(self.task_id, op_key=self.op_key, actor=self.actor, publish=self.publish)


class RecordScores(StoreRequest[None]):
    """Write measured scores of a version."""

    operation = "scores"
    version: VersionNumber
    scores: tuple[TaskScore, ...]

    def on(self, store: SubspaceStore) -> None:
        store.record_scores(self.version, self.scores, op_key=self.op_key, actor=self.actor)


class Publish(StoreRequest[None]):
    """Move `main` to the candidate."""

    operation = "publish"
    version: VersionNumber

    def on(self, store: SubspaceStore) -> None:
        store.publish(self.version, op_key=self.op_key, actor=self.actor)


class Reject(StoreRequest[None]):
    """Mark the candidate as rejected."""

    operation = "reject"
    version: VersionNumber
    reason: Text
    task_ids: tuple[TaskId, ...] = ()
    """Ids of the tasks whose scores broke a rule of the gate."""
    codes: tuple[Line, ...] = ()
    """Codes of the rules that were broken, for programs."""

    def on(self, store: SubspaceStore) -> None:
        store.reject(
            self.version,
            self.reason,
            task_ids=self.task_ids,
            codes=self.codes,
            op_key=self.op_key,
            actor=self.actor,
        )


class Rollback(StoreRequest["RollbackPreview"]):
    """Move `main` and `candidate` to a version, backwards or forwards again."""

    operation = "rollback"
    version: VersionNumber
    reason: Line = ""
    hold: bool = False
    """Whether to keep `main` there as well."""

    def on(self, store: SubspaceStore) -> RollbackPreview:
        return store.rollback(self.version, op_key=self.op_key, actor=self.actor, reason=self.reason, hold=self.hold)


class Tag(StoreRequest[None]):
    """Name a version for ever."""

    operation = "tag"
    name: str = Field(pattern=NAME_PATTERN)
    version: VersionNumber

    def on(self, store: SubspaceStore) -> None:
        store.tag(self.name, self.version, op_key=self.op_key, actor=self.actor)


class Hold(StoreRequest[None]):
    """Keep `main` where it is."""

    operation = "hold"
    reason: Line

    def on(self, store: SubspaceStore) -> None:
        store.hold(self.reason, op_key=self.op_key, actor=self.actor)


class Release(StoreRequest[None]):
    """Let publishing move `main` again."""

    operation = "release"

    def on(self, store: SubspaceStore) -> None:
        store.release(op_key=self.op_key, actor=self.actor)


class Quarantine(StoreRequest[None]):
    """Keep a task from being merged."""

    operation = "quarantine"
    task_id: Line
    reason: Line

    def on(self, store: SubspaceStore) -> None:
        store.quarantine(self.task_id, self.reason, op_key=self.op_key, actor=self.actor)


class Unquarantine(StoreRequest[None]):
    """Let a task be merged again."""

    operation = "unquarantine"
    task_id: Line

    def on(self, store: SubspaceStore) -> None:
        store.unquarantine(self.task_id, op_key=self.op_key, actor=self.actor)


class Pin(StoreRequest[None]):
    """Keep a version from expiring; a second pin of the same owner moves the end."""

    operation = "pin"
    version: VersionNumber
    owner: Line
    until: Moment | None = None
    """End of the pin, in Unix seconds; None: until it is unpinned."""
    days: Days | None = None
    """Instead of `until`: days from the moment at which the pin is written."""

    def on(self, store: SubspaceStore) -> None:
        store.pin(self.version, self.owner, self.until, days=self.days, op_key=self.op_key, actor=self.actor)


class Unpin(StoreRequest[None]):
    """Give a pin up."""

    operation = "unpin"
    version: VersionNumber
    owner: Line

    def on(self, store: SubspaceStore) -> None:
        store.unpin(self.version, self.owner, op_key=self.op_key, actor=self.actor)


class Expire(StoreRequest[None]):
    """Give versions up for ever."""

    operation = "expire"
    versions: tuple[VersionNumber, ...]

    def on(self, store: SubspaceStore) -> None:
        store.expire(self.versions, op_key=self.op_key, actor=self.actor)


class DropAdapters(StoreRequest[None]):
    """Give up tasks' adapters as they were delivered, for ever."""

    operation = "drop-adapters"
    task_ids: tuple[TaskId, ...]

    def on(self, store: SubspaceStore) -> None:
        store.drop_adapters(self.task_ids, op_key=self.op_key, actor=self.actor)


class Remove(StoreRequest["Version | None"]):
    """Make the candidate again without a task."""

    operation = "remove"
    task_id: Line
    reason: Line = ""
    publish: bool = False
    """Whether to move `main` as well."""

    def on(self, store: SubspaceStore) -> Version | None:
        return store.remove(
            self.task_id, op_key=self.op_key, actor=self.actor, reason=self.reason, publish=self.publish
        )


class Compact(StoreRequest["Version"]):
    """Merge all tasks of the candidate at once."""

    operation = "compact"
    publish: bool = False
    """Whether to move `main` as well."""

    def on(self, store: SubspaceStore) -> Version:
        return store.compact(op_key=self.op_key, actor=self.actor, publish=self.publish)


class Withdraw(StoreRequest[None]):
    """Make sure that a request whose outcome is unknown is not done any more, or tell that it was done."""

    operation = "withdraw"
    request_key: TaskId
    """The op_key of that request."""

    def on(self, store: SubspaceStore) -> None:
        store.withdraw(self.request_key)
