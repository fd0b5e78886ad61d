"""Log lines, as text or as JSON, with ids that go through everything: of the request, the task and its trace.

What a thread, or an answer to a request, is busy with is said once (`busy_with`), and is then in each of its lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import IO, Any, Literal

from pythonjsonlogger.json import JsonFormatter

from configs.document import without_password
from configs.plain_text import escaped

LogFormat = Literal["text", "json"]

TRACEPARENT = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
"""A header of W3C Trace Context: version, trace, span, flags."""


@dataclass(frozen=True, kw_only=True)
class BusyWith:
    """What is being done. Empty: nothing of that kind."""

    request_id: str = ""
    """Id of an HTTP request, which its answer has too."""
    task_id: str = ""
    traceparent: str = ""
    """What the request said of the trace that it belongs to (W3C Trace Context)."""


_now: ContextVar[BusyWith] = ContextVar("busy_with", default=BusyWith())  # noqa: B039  it is frozen


def now() -> BusyWith:
    """What is being done here."""
    return _now.get()


@contextlib.contextmanager
def busy_with(**ids: str) -> Iterator[None]:
    """A block in which something is done; what was being done before is done on, unless it is named too."""
    token = _now.set(replace(_now.get(), **ids))
    try:
        yield
    finally:
        _now.reset(token)


def trace_id_of(task_id: str) -> int:
    """Id of a task's trace: 128 bits, the same for ever."""
    return id_of("trace", task_id, size=16)


def id_of(*what: object, size: int = 8) -> int:
    """An id of so many bytes, the same for the same; never 0, which stands for none."""
    told = "\n".join(map(str, ("onebasis", *what))).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:size], "big") or 1


# --- lines -------------------------------------------------------------------------------------------------------


def write_to(stream: IO[str], form: LogFormat, level: int = logging.INFO) -> logging.Handler:
    """Have all of this process's log lines written to a stream; of other libraries' lines those from `level` on.

    Returns:
        What writes them.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(form))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)
    logging.getLogger("onebasis").setLevel(logging.INFO)
    return handler


def write_as_actor(form: LogFormat) -> None:
    """The same for a process of Ray's, whose errors go to a file on its machine; what libraries warn of, too."""
    write_to(sys.stderr, form, logging.WARNING)
    logging.captureWarnings(True)


def formatter(form: LogFormat) -> logging.Formatter:
    """What makes lines of records."""
    return _JsonLines() if form == "json" else _TextLines("%(asctime)s %(levelname)s %(name)s: %(message)s")


class _TextLines(logging.Formatter):
    """Lines that are safe to show on a terminal, whatever text a worker or a library wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class _JsonLines(JsonFormatter):
    """One object a line: time (UTC), level, logger, message, `exception` where it failed, the ids that there are."""

    def __init__(self) -> None:
        super().__init__(["message"], rename_fields={"exc_info": "exception"})

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        at = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        log_data |= {"time": at, "level": record.levelname, "logger": record.name}
        super().add_fields(log_data, record, message_dict)
        log_data |= ids()


def ids() -> dict[str, str]:
    """The ids of what is being done here."""
    busy = now()
    found = {"request_id": busy.request_id, "task_id": busy.task_id}
    if busy.task_id:
        found["trace_id"] = f"{trace_id_of(busy.task_id):032x}"
    elif busy.traceparent:
        found["trace_id"] = busy.traceparent.split("-")[1]
    return {name: value for name, value in found.items() if value}


@contextlib.contextmanager
def warnings_told(tell: Callable[[str], None], most: int = 20) -> Iterator[None]:
    """A block whose warnings, and those of the libraries that it uses, are told to somebody, each once, if it is done
    for a task.

    Args:
        most: How many.
    """
    handler = _Telling(tell, most)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


class _Telling(logging.Handler):
    """Tells what is warned of where the same is being done: in other threads something else is."""

    def __init__(self, tell: Callable[[str], None], most: int) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._most, self._busy, self._told = tell, most, now(), set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        is_its_own = self._busy.task_id and now() == self._busy
        if not is_its_own or len(self._told) >= self._most:
            return
        with contextlib.suppress(Exception):  # as all handlers: a line that cannot be made ends nobody's work
            line = without_password(f"{record.levelname.lower()}: {record.getMessage()}".splitlines()[0])
            if line not in self._told:
                self._told.add(line)
                self._tell(line)
