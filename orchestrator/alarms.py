"""What is wrong with the service now, for people: each alarm has a code, a cause and a next step.

An alarm rings from the moment that somebody notices until the same thing is seen to work again. Nothing is decided by
it: the part that noticed goes on trying. Each code has its row in docs/trouble.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from configs.errors import (
    Corrupt,
    DatabaseAway,
    NotWritten,
    OnebasisError,
    OwnedByAnother,
    StoreFull,
    StoreReadOnly,
    Unavailable,
    row_of,
)

log = logging.getLogger("onebasis.alarms")

BEGUN_MAX = 1000


class AlarmCode(StrEnum):
    """Code of an alarm: the error's code, where an error has the same meaning."""

    STORE_DAMAGED = "store-damaged"
    OUSTED = "owned-by-another"
    STORE_FULL = "store-full"
    STORE_READ_ONLY = "store-read-only"
    STORE_AWAY = "store-away"
    STORE_SLOW = "store-slow"
    NOT_WRITTEN = "not-written"
    STORE_UNUSABLE = "unusable-store"
    STORE_SILENT = "store-writer-silent"
    RAY_DOWN = "ray-down"
    WORKER_SILENT = "worker-silent"
    WORKER_SLOW = "base-model-loads-slowly"
    LOAD_FAILED = "base-model-not-loaded"
    MLFLOW_BEHIND = "mlflow-behind"
    TRACES_BEHIND = "traces-behind"
    DATABASE_AWAY = "database-away"
    LOOP_SILENT = "loop-silent"
    STEP_FAILED = "step-failed"
    UNREADABLE_TASK = "unreadable-task"


NEXT_STEP: dict[AlarmCode, str] = {
    AlarmCode.STORE_DAMAGED: "nothing is merged or published: stop with `onebasis down`, then `onebasis store verify`",
    AlarmCode.OUSTED: "`onebasis up --take-over` makes the store this service's again",
    AlarmCode.STORE_FULL: "make space there; what waits for it goes on by itself",
    AlarmCode.STORE_READ_ONLY: "let this user write there; what waits for it goes on by itself",
    AlarmCode.STORE_AWAY: "check the address and the network; what waits for it goes on by itself",
    AlarmCode.STORE_SLOW: "look at the network, the server and its disk; all goes on, as slowly",
    AlarmCode.NOT_WRITTEN: "look at what the storage says; what waits for it goes on by itself",
    AlarmCode.STORE_UNUSABLE: "correct what it says, then `onebasis down` and `onebasis up`",
    AlarmCode.STORE_SILENT: "it is replaced by itself when its lease ends, and by `onebasis up` at once",
    AlarmCode.RAY_DOWN: "`onebasis up` starts it again; tasks go on from their last checkpoints, or begin again",
    AlarmCode.WORKER_SILENT: "it is replaced by itself when its lease ends, and by `onebasis up` at once",
    AlarmCode.WORKER_SLOW: "a large model takes minutes; else look at what the machine does, and at the worker's log",
    AlarmCode.LOAD_FAILED: "correct what it says; it is tried again every 30 s, and after `onebasis down` and `up`",
    AlarmCode.MLFLOW_BEHIND: "check mlflow.tracking_uri; the service goes on without, and tries again by itself",
    AlarmCode.TRACES_BEHIND: "check tracing.endpoint and the collector; nothing is lost, and it is told later",
    AlarmCode.DATABASE_AWAY: "check database_url and that the database runs; it is tried again by itself",
    AlarmCode.LOOP_SILENT: "wait for what it does; `onebasis up` restarts a control plane that is stopped",
    AlarmCode.STEP_FAILED: "it is tried again by itself; report what control-plane.log says",
    AlarmCode.UNREADABLE_TASK: "start the release that wrote it; all other tasks go on",
}


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong."""

    code: AlarmCode
    about: str
    """Part of the service that it concerns: a worker's name, `merging`, an address."""
    what: str
    """Cause, with the numbers."""
    todo: str
    """Next step for the person who reads it."""
    since: float
    """Unix time at which it began to ring."""
    base_model: str = ""
    """Base model that it concerns; empty where it concerns all."""

    def __str__(self) -> str:
        return f"{self.code}: {self.what} → {self.todo} ({row_of(self.code)})"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for `--json` and HTTP, with the sentence in it."""
        return {**asdict(self), "text": str(self)}


class Ringing(Protocol):
    """What a part of the service needs of the alarms."""

    def ring(self, code: AlarmCode, about: str, what: str, todo: str = "") -> None: ...

    def ring_for(self, error: OnebasisError, about: str, doing: str = "") -> None: ...

    def end(self, code: AlarmCode, about: str) -> None: ...

    def end_all(self, about: str, *codes: AlarmCode) -> None: ...

    def rings(self, code: AlarmCode) -> bool: ...


class Alarms:
    """The alarms that ring now. Every method may be called from any thread; none waits for anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ringing: dict[tuple[AlarmCode, str, str], Alarm] = {}
        self.begun: deque[Alarm] = deque(maxlen=BEGUN_MAX)
        """Those that began to ring and that nobody has taken from here yet, the oldest first."""
        self.names_base_models = False
        """Whether an alarm's text says which base model it concerns: with a single one there is nothing to say."""

    def of(self, base_model: str) -> AlarmsOf:
        """The alarms of one base model: one that rings or ends there leaves those of the others as they are."""
        return AlarmsOf(self, base_model)

    def ring(self, code: AlarmCode, about: str, what: str, todo: str = "", base_model: str = "") -> None:
        """Begin to ring an alarm, or change its cause. It is written to the log once, not at every try.

        Args:
            todo: Default: the next step that the code has.
            base_model: Base model that it concerns; default: all.
        """
        if base_model and self.names_base_models:
            what = f"base model {base_model}: {what}"
        with self._lock:
            before = self._ringing.get((code, about, base_model))
            since = before.since if before else time.time()
            alarm = Alarm(code, about, what, todo or NEXT_STEP[code], since, base_model)
            self._ringing[code, about, base_model] = alarm
        if before is None:
            self.begun.append(alarm)
            log.error("ALARM %s (%s)", alarm, about)

    def ring_for(self, error: OnebasisError, about: str, doing: str = "", base_model: str = "") -> None:
        """Ring for an error that a part of the service met with the store or the database, and which it tries again.

        Of what may keep a write from the store, the last thing that was met counts.

        Args:
            doing: What failed, for people; default: `about`.
        """
        code = code_of(error)
        if code in WRITE_CODES:
            self.end_all(about, *(other for other in WRITE_CODES if other is not code), base_model=base_model)
        # The error's own next step is for a person who has to ask again; these errors are tried again here.
        todo = "" if code in TRIED_AGAIN else error.todo
        self.ring(code, about, f"{doing or about}: {error.sentence}", todo, base_model)

    def end(self, code: AlarmCode, about: str, base_model: str = "") -> None:
        """End an alarm, if it rings."""
        with self._lock:
            alarm = self._ringing.pop((code, about, base_model), None)
        if alarm is not None:
            log.info("over after %.0f s: %s (%s)", time.time() - alarm.since, alarm.code, about)

    def end_all(self, about: str, *codes: AlarmCode, base_model: str = "") -> None:
        """End the alarms of these codes for a part of the service."""
        for code in codes:
            self.end(code, about, base_model)

    def __iter__(self) -> Iterator[Alarm]:
        """Those that ring, the oldest first."""
        with self._lock:
            ringing = list(self._ringing.values())
        return iter(sorted(ringing, key=lambda alarm: alarm.since))

    def rings(self, code: AlarmCode) -> bool:
        """Whether one of this code rings."""
        return any(alarm.code is code for alarm in self)


class AlarmsOf:
    """The alarms of one base model; those that concern all are no part of it, except in `rings`."""

    def __init__(self, alarms: Alarms, base_model: str) -> None:
        self._alarms = alarms
        self._base_model = base_model

    def ring(self, code: AlarmCode, about: str, what: str, todo: str = "") -> None:
        """As `Alarms.ring`."""
        self._alarms.ring(code, about, what, todo, self._base_model)

    def ring_for(self, error: OnebasisError, about: str, doing: str = "") -> None:
        """As `Alarms.ring_for`."""
        self._alarms.ring_for(error, about, doing, self._base_model)

    def end(self, code: AlarmCode, about: str) -> None:
        """As `Alarms.end`."""
        self._alarms.end(code, about, self._base_model)

    def end_all(self, about: str, *codes: AlarmCode) -> None:
        """As `Alarms.end_all`."""
        self._alarms.end_all(about, *codes, base_model=self._base_model)

    def rings(self, code: AlarmCode) -> bool:
        """Whether one of this code rings that concerns this base model, or all."""
        return any(alarm.code is code for alarm in self)

    def __iter__(self) -> Iterator[Alarm]:
        """Those that ring and concern this base model, or all."""
        return (alarm for alarm in self._alarms if alarm.base_model in ("", self._base_model))


WRITING = "merging and publishing"
"""Part of the service that alarms about its own writing to the store name."""
ASKED_FOR = "what people asked for"
"""The same where a person asked for what was to be written."""
WRITE_CODES = (
    AlarmCode.STORE_FULL,
    AlarmCode.STORE_READ_ONLY,
    AlarmCode.NOT_WRITTEN,
    AlarmCode.STORE_AWAY,
    AlarmCode.STORE_UNUSABLE,
)
"""Alarms of what may keep a write from the store; a write that went through ends them."""


LOOP = "the control plane's loop"
"""Part of the service that alarms about a failed step name."""
LOOP_CODES = (*WRITE_CODES, AlarmCode.DATABASE_AWAY, AlarmCode.STEP_FAILED)
"""Alarms that a step which goes through ends."""

TRIED_AGAIN = frozenset({AlarmCode.STORE_FULL, AlarmCode.STORE_READ_ONLY, AlarmCode.NOT_WRITTEN, AlarmCode.STORE_AWAY})


def code_of(error: OnebasisError) -> AlarmCode:
    """The alarm code for an error of the store or the database."""
    match error:
        case OwnedByAnother():
            return AlarmCode.OUSTED
        case StoreFull():
            return AlarmCode.STORE_FULL
        case StoreReadOnly():
            return AlarmCode.STORE_READ_ONLY
        case NotWritten():
            return AlarmCode.NOT_WRITTEN
        case DatabaseAway():
            return AlarmCode.DATABASE_AWAY
        case Corrupt():
            return AlarmCode.STORE_DAMAGED
        case Unavailable():
            return AlarmCode.STORE_AWAY
    return AlarmCode.STORE_UNUSABLE
