"""Rings when a part of the control plane or its Ray gives no sign of life. In a thread that waits for nobody.

Which process watches which:

| process | its sign of life | deadline | who looks | what heals it |
|---|---|---|---|---|
| control plane | an answer over HTTP; its state in /proc | 5 s | every command (`client.py`), `onebasis up` | `up` |
| the one that leads | its lease is prolonged | `leader_lease.LEASE_SECONDS` | those that stand by | one of them |
| its loop | a turn that ends | `SILENT_SECONDS` | here | what it waits for ends by itself; `up` |
| Ray's head, raylet, GCS | state in /proc; an answer of the GCS | 1 s; `SILENT_SECONDS` | here; the head | `up` |
| worker, gang | an answer to `progress` | `worker_pool.SILENT_SECONDS`; the lease | the loop | the lease's end; `up` |
| worker that loads | the same | `worker_pool.WARM_SILENT_SECONDS` | the loop | the same |
| rank | an answer to `pid` | `gang.NOTICE_SECONDS`; the lease | its gang | the gang; `up` |
| store's writer | an answer to `sign` | `store_writer.SILENT_SECONDS`; the lease | the loop | the same; `up` |
| store, database | a read that is answered | `latest.LOOK_SECONDS` | `Service.look` | themselves |
| store that is slow | how long a record took to write | `candidate.SLOW_SECONDS` | the loop | itself |
| MLflow mirror, traces | no error, and a round that ends | at once; `MIRROR_SECONDS` | here | themselves |

`up` looks at all of them by itself, ends what stands still, and starts what is missing. What a task has reached is in
its record and its checkpoints, not in a process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.alarms import AlarmCode, Alarms

log = logging.getLogger("onebasis.watch")

LOOK_SECONDS = 0.5
SILENT_SECONDS = 8.0
"""Longest silence before an alarm: a turn of the loop, or a call to the GCS, takes milliseconds. People are told within
ten seconds."""
MIRROR_SECONDS = 120.0
"""Longest round of the MLflow mirror: a first one over a thousand tasks takes half of it; and longest time for what the
traces tell with one message."""


class Loop(Protocol):
    """The part of the controller that the watch reads."""

    turned_at: float
    """Unix time at which the last turn of the loop ended, well or not."""
    doing: str


class Mirror(Protocol):
    """The part of the MLflow mirror, and of the traces, that the watch reads."""

    error: str
    working_since: float
    """Unix time at which the round under way began; 0 between two."""


class Pulse:
    """Asks a question again and again, in a thread of its own that may hang with it."""

    def __init__(self, ask: Callable[[], object], every_seconds: float = 2.0) -> None:
        self._ask = ask
        self._every_seconds = every_seconds
        self._asked_at = 0.0
        self.error = ""
        """Why the last question had no answer; empty if it had one."""

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self._asked_at = time.monotonic()
            try:
                self._ask()
                self.error = ""
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}".split("\n")[0]
            self._asked_at = 0.0
            stop.wait(self._every_seconds)

    @property
    def silent_seconds(self) -> float:
        """How long the question under way has been waiting for its answer."""
        asked_at = self._asked_at
        return time.monotonic() - asked_at if asked_at else 0.0


class Watch:
    """Looks at everything with a sign of life, except the workers and the store's writer, which the loop asks itself.

    Args:
        ray_trouble: What is wrong with this machine's Ray processes; empty if nothing is.
        gcs: Pulse that asks Ray's GCS.
    """

    def __init__(
        self,
        alarms: Alarms,
        loop: Loop,
        mirror: Mirror,
        traces: Mirror,
        ray_trouble: Callable[[], str],
        gcs: Pulse | None,
    ) -> None:
        self._alarms = alarms
        self._loop = loop
        self._mirrors = (("MLflow", AlarmCode.MLFLOW_BEHIND, mirror), ("traces", AlarmCode.TRACES_BEHIND, traces))
        self._ray_trouble = ray_trouble
        self._gcs = gcs

    def run(self, stop: threading.Event) -> None:
        """Look until told to stop."""
        while not stop.wait(LOOK_SECONDS):
            try:
                self.look(time.time())
            except Exception:
                log.exception("a look at the signs of life failed")

    def look(self, now: float) -> None:
        """One look at everything. now: Unix time."""
        trouble = self._ray_trouble() or self._gcs_trouble()
        self._set(AlarmCode.RAY_DOWN, "Ray", f"Ray does not work: {trouble}" if trouble else "")
        waited = now - self._loop.turned_at
        # With Ray away the loop may wait for it: one cause, one alarm.
        late = waited > SILENT_SECONDS and not trouble
        what = f"the control plane's loop stands still while it is {self._loop.doing}" if late else ""
        self._set(AlarmCode.LOOP_SILENT, "loop", what)
        for about, code, mirror in self._mirrors:
            self._set(code, about, _trouble_of(mirror, "MLflow does" if about == "MLflow" else "the traces do", now))

    def _gcs_trouble(self) -> str:
        if self._gcs is None:
            return ""
        if self._gcs.silent_seconds > SILENT_SECONDS:
            return "its GCS does not answer"
        return f"its GCS answers with an error: {self._gcs.error}" if self._gcs.error else ""

    def _set(self, code: AlarmCode, about: str, what: str) -> None:
        if what:
            self._alarms.ring(code, about, what)
        else:
            self._alarms.end(code, about)


def _trouble_of(mirror: Mirror, does: str, now: float) -> str:
    """does: `MLflow does`."""
    if mirror.error:
        return f"{does} not show everything: {mirror.error}"
    since = mirror.working_since
    return f"{does} not take what there is" if since and now - since > MIRROR_SECONDS else ""
