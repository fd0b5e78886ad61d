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
    """A store's writer was asked to open the store, or to make it."""

    base_model: str


@dataclass(frozen=True)
class Writing:
    """A store's writer was asked for something; each for one thing at a time."""

    base_model: str
    request: StoreRequest[Any]
    asked_at: float = field(default=0.0, compare=False)
    """When, by the monotonic clock."""


@dataclass(frozen=True)
class Sign:
    """A store's writer was asked for a sign of life."""

    base_model: str


PendingCall = Warming | Asking | Ordered | AskingForEnd | Opening | Writing | Sign


class PendingCalls:
    """Makes calls, and says which came back. `wake` may be called from any thread, everything else from the loop's."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls: dict[Call, PendingCall] = {}
        self._not_before: dict[str, float] = {}
        self._awake = threading.Event()

    def send(self, pending: PendingCall, start: Callable[[], Call]) -> None:
        self._calls[start()] = pending

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

    def writing(self, base_model: str) -> StoreRequest[Any] | None:
        """What the writer of a base model's store was asked for, until it answers."""
        asked = (pending for pending in self._calls.values() if isinstance(pending, Writing))
        return next((pending.request for pending in asked if pending.base_model == base_model), None)

    # --- when to look again ------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed that the loop should look at now. Thread-safe."""
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


class StoreCalls:
    """The same calls as far as they are about the store of one base model. What waits here for a moment (`later`) keeps
    no other base model waiting."""

    def __init__(self, calls: PendingCalls, cluster: Cluster, base_model: str) -> None:
        self._calls = calls
        self._cluster = cluster
        self._base_model = base_model
        self.log_moved = threading.Event()
        """The version log is to be read again."""

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version log too. Thread-safe."""
        if log_moved:
            self.log_moved.set()
        self._calls.wake()

    def later(self, what: str, seconds: float | None = None) -> None:
        """As `PendingCalls.later`."""
        self._calls.later(self._mine(what), *(() if seconds is None else (seconds,)))

    def may(self, what: str) -> bool:
        return self._calls.may(self._mine(what))

    def write(self, request: StoreRequest[Any]) -> None:
        """Ask the writer."""
        asked = Writing(self._base_model, request, time.monotonic())
        self._calls.send(asked, lambda: self._cluster.write(self._base_model, request))

    @property
    def writing(self) -> StoreRequest[Any] | None:
        """What the writer was asked for, until it answers."""
        return self._calls.writing(self._base_model)

    def open(self, base_sha256: str) -> None:
        """Make the writer open the store, or make it, unless it does already or has to wait."""
        opening = Opening(self._base_model)
        if not self._calls.under_way(opening) and self.may("open"):
            self._calls.send(opening, lambda: self._cluster.open_store(self._base_model, base_sha256))

    @property
    def asking(self) -> bool:
        """Whether the writer was asked for a sign of life, until it answers."""
        return self._calls.under_way(Sign(self._base_model))

    def ask(self) -> None:
        """Ask the writer for a sign of life."""
        self._calls.send(Sign(self._base_model), lambda: self._cluster.store_sign(self._base_model))

    def replace_writer(self) -> None:
        """End a writer that was fenced; a fresh one acquires the next epoch."""
        self._cluster.replace_store(self._base_model)

    def replace_silent_writer(self) -> None:
        """The same with one that does not answer: what it was asked for is not waited for any more."""
        self._calls.forget(Sign(self._base_model))
        self._calls.forget(Opening(self._base_model))
        self.replace_writer()

    def _mine(self, what: str) -> str:
        return f"{what} of {self._base_model}"
