"""The errors of onebasis, grouped by what the person or program that meets one should do.

```
OnebasisError
├── InvalidInput   fix the input and submit again; never retried
│   ├── RefusedAdapters   some of several cannot be merged: which, it says
│   ├── TooLarge   a document or a body has more bytes than one may have
│   ├── TooSlow    checking what was submitted takes longer than it may
│   ├── UnknownToken  no token, or one that is not known, ended or was revoked: sign in again
│   ├── NotAllowed  the role of who asks is too low: ask somebody who has it
│   └── UnusableStore     no store of this service can be at this address
│       ├── OtherBaseModel   the store there belongs to another base model
│       └── UnsafeStorage    the server lets two writers overwrite each other
├── NotFound       no such task, version, team for you
│   └── MissingAdapters   some of several are not there: which, it says
├── Conflict       someone moved first: read again, then retry at once
│   ├── NameTaken  another task of the same name is there
│   ├── Held       somebody keeps `main` where it is: it says who
│   ├── Fenced     a newer writer opened the subspace: open it anew
│   └── OwnedByAnother   the store is another service's: a person decides whose
├── Unavailable    a machine or a network was away: wait, then retry
│   ├── QueueFull  a team has as many tasks waiting as it may
│   ├── WorkersBusy  no worker is free to answer at once
│   ├── TooManyRequests  a token has asked more often than it may: wait as long as the error says
│   ├── NotLeading  another control plane of the service leads: ask there
│   ├── DatabaseAway   the task database does not answer: nothing of the request was kept
│   ├── NoSignOfLife   the control plane is there and does not answer: it is stopped, or hangs
│   ├── OutcomeUnknown  nobody knows whether a request was done: its key is in the error
│   └── NotWritten      the storage refused the write: the request has failed, and is not done later
│       ├── StoreFull      the storage has no space left
│       └── StoreReadOnly  the storage may be read and not written
├── Rejected       the result is worse than the rule allows: a person decides
└── Corrupt        stored bytes are not what was written: stop, touch nothing
    └── UnreadableTask  a task's row says what this release cannot read; all other tasks go on
```

An error carries facts: what is wrong, where, and what to do next. They are positional and handed on to
`Exception.__init__`, because Ray sends errors between processes by pickle, which rebuilds them from `args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Self


class Exit(IntEnum):
    """What a command's exit code says: one for each group of errors, and for each end of a task that was waited for."""

    DONE = 0, "done; the task that was waited for is published"
    INTERNAL = 1, "an error inside onebasis; of `onebasis doctor`: a check failed"
    INPUT = 2, "wrong usage or input: correct it"
    NOT_FOUND = 3, "no such task, version or name"
    CONFLICT = 4, "somebody else came first, or it is taken: look again"
    UNAVAILABLE = 5, "a machine or a network is away: try again later"
    REJECTED = 6, "the gate rejected the task"
    CORRUPT = 7, "stored bytes are not what was written: stop"
    PARKED = 8, "the task is parked: a person decides"
    CANCELLED = 9, "the task was cancelled"
    DOWN = 10, "the service does not run, says `onebasis status`: start it"
    INTERRUPTED = 130, "interrupted with Ctrl-C"

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Exit:
        code = int.__new__(cls, number)
        code._value_ = number
        code.meaning = meaning
        return code


class OnebasisError(Exception):
    """Base of every error that onebasis raises on purpose.

    Args:
        what: What was wrong, with the numbers.
        where: The file, key path, task, module or address it is about; empty when `what` says it.
        todo: What the reader can do next; empty when there is nothing to do.
        facts: Values for programs, one for each name in the class's `facts`.
    """

    kind: ClassVar[str] = "error"
    """The group, by what the caller does next."""
    code: ClassVar[str] = ""
    """Name of the class inside its group, for a caller that must tell two classes apart; empty: the group's."""
    exit_code: ClassVar[Exit] = Exit.INTERNAL
    http_status: ClassVar[int] = 500

    facts: ClassVar[tuple[str, ...]] = ()
    """Names of the class's attributes beside the text, in the order of the arguments."""

    def __init__(self, what: str, where: str = "", todo: str = "", *facts: Any) -> None:
        super().__init__(what, where, todo, *facts)
        self.what = what
        self.where = where
        self.todo = todo
        for name, value in zip(self.facts, facts, strict=True):
            setattr(self, name, value)

    @property
    def row(self) -> str:
        """The code under which docs/trouble.md says what to do: the class's own, else the group's."""
        return self.code or self.kind

    @property
    def title(self) -> str:
        """What all errors of the class have in common, in one sentence."""
        return (type(self).__doc__ or self.row).partition(". ")[0].strip().rstrip(".").partition("\n")[0]

    @property
    def sentence(self) -> str:
        """What was wrong and where, in one sentence, without the next step."""
        return f"{self.where}: {self.what}" if self.where else self.what

    def __str__(self) -> str:
        return f"{self.sentence}\n  → {self.todo}" if self.todo else self.sentence

    def as_dict(self) -> dict[str, Any]:
        """The error as plain values, for `--json` and HTTP."""
        text = {"what": self.what, "where": self.where, "todo": self.todo}
        known = {name: getattr(self, name) for name in self.facts}
        return {"kind": self.kind, "code": self.row, **text, **known}

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same error in which other names stand for some; itself where it has none of them."""
        told = tuple(renamed(fact, names) if isinstance(fact, str) else fact for fact in self.args)
        return self if told == self.args else type(self)(*told)


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A text in which other names stand for some, as for a file whose path means nothing to the reader."""
    for name, other in names.items():
        text = text.replace(name, other)
    return text


class InvalidInput(OnebasisError):
    """The input is wrong: fix it and submit again. Never retried by a machine."""

    kind = "invalid-input"
    exit_code = Exit.INPUT
    http_status = 422


class RefusedAdapters(InvalidInput):
    """Some of the adapters that were handed over cannot be taken; nothing was written."""

    code = "refused-adapters"
    facts = ("task_ids",)
    task_ids: tuple[str, ...]


class TooLarge(InvalidInput):
    """A document or the body of a request has more bytes than `limit`; it was not read."""

    code = "too-large"
    http_status = 413
    facts = ("limit",)
    limit: int


class TooSlow(InvalidInput):
    """Checking a submission took longer than `limit` seconds and was ended; nothing was taken in."""

    code = "too-slow"
    facts = ("limit",)
    limit: float


class UnknownToken(InvalidInput):
    """The request has no token, or one that is not known, has ended or was revoked."""

    code = "unknown-token"
    http_status = 401


class NotAllowed(InvalidInput):
    """Who asks sees what it is about and may not do it: somebody with a higher role, or of another team, may."""

    code = "not-allowed"
    http_status = 403


class UnusableStore(InvalidInput):
    """What is at the store's address cannot be a store of this service: a person chooses another address or setting."""

    code = "unusable-store"


class OtherBaseModel(UnusableStore):
    """The store belongs to another base model, or to other weights of the same name."""

    code = "other-base-model"


class UnsafeStorage(UnusableStore):
    """The server does not keep the rule that one of two writers is refused: a store there would lose versions."""

    code = "unsafe-storage"


class NotFound(OnebasisError):
    """There is no such task, version, team or key for you."""

    kind = "not-found"
    exit_code = Exit.NOT_FOUND
    http_status = 404


class MissingAdapters(NotFound):
    """Some of the adapters that were handed over, or their tasks, are not there; nothing was written."""

    code = "missing-adapters"
    facts = ("task_ids",)
    task_ids: tuple[str, ...]


class Conflict(OnebasisError):
    """Someone moved first: read again, then retry at once."""

    kind = "conflict"
    exit_code = Exit.CONFLICT
    http_status = 409


class NameTaken(Conflict):
    """Another task of the same name is there: a name means one task."""

    code = "name-taken"
    facts = ("task_id", "other_id")
    task_id: str
    """Id of the task that was to be added."""
    other_id: str
    """Id of the task that has the name."""


class Held(Conflict):
    """Somebody keeps `main` where it is."""

    code = "held"
    facts = ("actor", "reason")
    actor: str
    reason: str
    """Reason that the person gave; empty: none."""


class Fenced(Conflict):
    """A newer writer has opened the subspace: this one writes no more, and has to be opened anew."""

    code = "fenced"


class OwnedByAnother(Conflict):
    """The store belongs to another service, which alone may write to it: a person decides whose it is."""

    code = "owned-by-another"
    facts = ("service_id", "name", "since")
    service_id: str
    name: str
    """Machine and folder of that service, for people."""
    since: float
    """Unix seconds."""


class Unavailable(OnebasisError):
    """A machine or a network was away: wait, then retry."""

    kind = "unavailable"
    exit_code = Exit.UNAVAILABLE
    http_status = 503


class QueueFull(Unavailable):
    """A team has as many tasks waiting as it may. `limit`: how many those are."""

    code = "queue-full"
    facts = ("team", "limit")
    team: str
    limit: int


class WorkersBusy(Unavailable):
    """No worker of the base model is free to answer at once: each trains, loads, or has ended."""

    code = "workers-busy"


class TooManyRequests(Unavailable):
    """A token has asked more often than it may. `retry_seconds`: how long to wait; nothing was done."""

    code = "too-many-requests"
    http_status = 429
    facts = ("retry_seconds",)
    retry_seconds: float


class DatabaseAway(Unavailable):
    """The task database does not answer, is locked, full or read-only; nothing of the request was kept."""

    code = "database-away"


class NotLeading(Unavailable):
    """This control plane stands by, or was overtaken while it stood still: another one leads; nothing was written."""

    code = "not-leading"


class NoSignOfLife(Unavailable):
    """The control plane's process is there and answers nothing at all: it is stopped, or hangs."""

    code = "no-sign-of-life"


class OutcomeUnknown(Unavailable):
    """The request was sent and not answered: it was done, or not. Asked again under the same key, it is done once."""

    code = "outcome-unknown"
    facts = ("op_key", "seq")
    op_key: str
    seq: int
    """Of the record that it would be; 0 where that is not known. Once the log has a record of this number, the request
    was done, or never will be unless it is asked again."""


class NotWritten(Unavailable):
    """The storage refused the write: what was asked for has failed, and is not done later."""

    code = "not-written"


class StoreFull(NotWritten):
    """The storage has no space left; what was asked for has failed, and is not done later."""

    code = "store-full"


class StoreReadOnly(NotWritten):
    """The storage may be read and not written; what was asked for has failed, and is not done later."""

    code = "store-read-only"


class Rejected(OnebasisError):
    """The result is worse than the rule allows: a person decides."""

    kind = "rejected"
    exit_code = Exit.REJECTED
    http_status = 409


class Corrupt(OnebasisError):
    """Stored bytes are not what was written: stop, touch nothing."""

    kind = "corrupt"
    exit_code = Exit.CORRUPT
    http_status = 500


class UnreadableTask(Corrupt):
    """A task's row in the database says what this release cannot read."""

    code = "unreadable-task"
    facts = ("task_id",)
    task_id: str


LEAVES: tuple[type[OnebasisError], ...] = (
    InvalidInput,
    RefusedAdapters,
    TooLarge,
    TooSlow,
    UnknownToken,
    NotAllowed,
    UnusableStore,
    OtherBaseModel,
    UnsafeStorage,
    NotFound,
    MissingAdapters,
    Conflict,
    NameTaken,
    Held,
    Fenced,
    OwnedByAnother,
    Unavailable,
    QueueFull,
    WorkersBusy,
    TooManyRequests,
    DatabaseAway,
    NotLeading,
    NoSignOfLife,
    OutcomeUnknown,
    NotWritten,
    StoreFull,
    StoreReadOnly,
    Rejected,
    Corrupt,
    UnreadableTask,
)


def row_of(code: str) -> str:
    """Where the book of trouble tells what a code means and what to do: of an error, an alarm, a task's reason."""
    return f"docs/trouble.md#{code}"


def error_from_dict(facts: Mapping[str, Any]) -> OnebasisError:
    """Rebuild an error from `OnebasisError.as_dict`, as a client of the HTTP API does. An unknown code is its kind."""
    leaf = _leaf(facts.get("code")) or _leaf(facts.get("kind")) or OnebasisError
    known = (tuple(value) if isinstance(value := facts.get(name), list) else value for name in leaf.facts)
    return leaf(facts.get("what", "unknown error"), facts.get("where", ""), facts.get("todo", ""), *known)


def _leaf(code: Any) -> type[OnebasisError] | None:
    return next((leaf for leaf in LEAVES if (leaf.code or leaf.kind) == code), None)
