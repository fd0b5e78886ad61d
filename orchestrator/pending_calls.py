"""What the control plane has under way on the cluster, what has to wait for a moment, and what wakes the loop.

Nothing here is decided and nothing is lost with it: whoever sent an pending asks for it again after a restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.cluster import Call, Cluster

POLL_SECONDS = 0.02
"""Longest wait for something to land before the queue is looked at: keeps submit-to-start short."""
IDLE_SECONDS = 0.2
RETRY_SECONDS = 1.0
WRITES = ("merge", "refine", "scores", "verdict")
"""PendingCalls to the store: one at a time."""


@dataclass(frozen=True)
class PendingCall:
    """What a call was sent for."""

    kind: str
    """`warm`, `order`, `progress`, or one of `WRITES`."""
    worker: str = ""
    task_ids: tuple[str, ...] = ()
    version: int = 0


class PendingCalls:
    """Sends, and tells what landed. `wake` may be called from any thread, everything else from the loop's alone."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls: dict[Call, PendingCall] = {}
        self._not_before: dict[str, float] = {}
        self._awake = threading.Event()
        self.log_moved = threading.Event()
        """The version log is to be read again."""

    def send(self, pending: PendingCall, start: Callable[[], Call]) -> None:
        self._calls[start()] = pending

    def landed(self, wait_seconds: float | None = None) -> Iterator[tuple[Call, PendingCall]]:
        """Those that are done, each no longer under way once it is taken.

        Args:
            wait_seconds: Longest wait for the first. Default: a moment, and none when something woke the loop.
        """
        if not self._calls:
            self._awake.wait(IDLE_SECONDS)
            return
        if wait_seconds is None:
            wait_seconds = 0.0 if self._awake.is_set() else POLL_SECONDS
        for call in self._cluster.landed(list(self._calls), wait_seconds):
            if pending := self._calls.pop(call, None):
                yield call, pending

    def under_way(self, kind: str, worker: str = "") -> bool:
        return any(e.kind == kind and worker in ("", e.worker) for e in self._calls.values())

    def forget(self, kind: str, worker: str) -> None:
        """Take no notice of what it brings."""
        self._calls = {f: e for f, e in self._calls.items() if (e.kind, e.worker) != (kind, worker)}

    @property
    def writing(self) -> bool:
        return any(self.under_way(kind) for kind in WRITES)

    # --- when to look again ------------------------------------------------------------------------------------

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version log too. Thread-safe."""
        if log_moved:
            self.log_moved.set()
        self._awake.set()

    def later(self, what: str, seconds: float = RETRY_SECONDS) -> None:
        self.not_before(what, time.time() + seconds)

    def not_before(self, what: str, at: float) -> None:
        """at: Unix time."""
        self._not_before[what] = at

    def may(self, what: str) -> bool:
        return time.time() >= self._not_before.get(what, 0.0)

    def woken(self) -> bool:
        """Whether something changed, or what had to wait may be tried now, since the last call."""
        awake = self._awake.is_set()
        if awake:  # else somebody may set it right now, and nobody would have seen it
            self._awake.clear()
        now = time.time()
        due = [what for what, at in self._not_before.items() if now >= at]
        for what in due:
            del self._not_before[what]
        return awake or bool(due)
