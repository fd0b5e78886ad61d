"""Log lines, as text or as JSON, with ids that go through everything: of the request, the task and its trace.

What a thread, or an answer to a request, is busy with is said once (`busy_with`), and is then in each of its lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

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
