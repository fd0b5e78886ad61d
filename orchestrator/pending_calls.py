"""What the control plane has under way on the cluster, what has to wait for a moment, and what wakes the loop.

Nothing here is decided and nothing is lost with it: each call is made again after a restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cluster import Call, Cluster
from subspace_store.requests import StoreRequest

POLL_SECONDS = 0.02
"""Longest wait for a call to come back before the queue is looked at: keeps submit-to-start short."""
IDLE_SECONDS = 0.2
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Warming:
    """A worker was asked to load the base model."""

    worker: str


@dataclass(frozen=True)
class Asking:
    """A worker was asked what it does."""

    worker: str


@dataclass(frozen=True)
class Ordered:
    """A worker was given an order."""

    worker: str


@dataclass(frozen=True)
class AskingForEnd:
    """It was asked how the process of a worker ended that had an order, or loaded the base model."""

    worker: str


@dataclass(frozen=True)
class Opening:
    """The store's writer was asked to open the store, or to make it."""


@dataclass(frozen=True)
class Writing:
    """The store's writer was asked for something; one at a time."""

    request: StoreRequest[Any]
    asked_at: float = field(default=0.0, compare=False)
    """When, by the monotonic clock."""


@dataclass(frozen=True)
class Sign:
    """The store's writer was asked for a sign of life."""


PendingCall = Warming | Asking | Ordered | AskingForEnd | Opening | Writing | Sign


class PendingCalls:
    """Makes calls, and says which came back. `wake` may be called from any thread, everything else from the loop's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls: dict[Call, PendingCall] = {}
        self._not_before: dict[str, float] = {}
        self._awake = threading.Event()
        self.log_moved = threading.Event()
        """The version log is to be read again."""

    def send(self, pending: PendingCall, start: Callable[[], Call]) -> None:
        self._calls[start()] = pending

    def write(self, request: StoreRequest[Any]) -> None:
        """Ask the store's writer."""
        self.send(Writing(request, time.monotonic()), lambda: self._cluster.write(request))

    def landed(self, wait_seconds: float | None = None) -> Iterator[tuple[Call, PendingCall]]:
        """Calls that came back, each no longer pending once it is taken.

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

    def under_way(self, pending: PendingCall) -> bool:
        return pending in self._calls.values()

    def forget(self, pending: PendingCall) -> None:
        """Ignore the call's result."""
        self._calls = {call: other for call, other in self._calls.items() if other != pending}

    @property
    def writing(self) -> StoreRequest[Any] | None:
        """What the store's writer was asked for, until it answers."""
        return next((pending.request for pending in self._calls.values() if isinstance(pending, Writing)), None)

    # --- when to look again ------------------------------------------------------------------------------------

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version log too. Thread-safe."""
        if log_moved:
            self.log_moved.set()
        self._awake.set()

    def later(self, what: str, seconds: float = RETRY_SECONDS) -> None:
        self.not_before(what, time.time() + seconds)

    def not_before(self, what: str, at: float) -> None:
        """Do `what` at this time at the earliest. at: Unix time."""
        self._not_before[what] = at

    def may(self, what: str) -> bool:
        return time.time() >= self._not_before.get(what, 0.0)

    def woken(self) -> bool:
        """Whether something changed, or what had to wait may be tried now, since the last call."""
        awake = self._awake.is_set()
        if awake:  # an unconditional clear could lose a wake that comes right now
            self._awake.clear()
        now = time.time()
        due = [what for what, at in self._not_before.items() if now >= at]
        for what in due:
            del self._not_before[what]
        return awake or bool(due)
