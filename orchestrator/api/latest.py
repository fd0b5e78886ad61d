"""An answer that may be late, so that a status does not wait for a storage that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from configs.errors import Unavailable

Answer = TypeVar("Answer")

LOOK_SECONDS = 3.0
"""Longest wait for the store, or for the database, when a person asks for the status."""
LOOKING = "reading for the status"
"""Part of the service that alarms about this reading name."""


class Latest(Generic[Answer]):
    """Asks in a thread of its own, one at a time, and keeps the last answer.

    Args:
        ask: Function that gets the answer; may take any time.
        where: Name of what it asks, for people.
    """

    def __init__(self, ask: Callable[[], Answer], where: str) -> None:
        self._ask = ask
        self._where = where
        self._lock = threading.Lock()
        self._asking: Future[Answer] | None = None
        self._asked_at = 0.0
        self.last: Answer | None = None
        """The newest answer, also one that came too late for whoever asked; None before the first."""
        self.seconds = 0.0
        """How long the newest answer took."""

    @property
    def is_late(self) -> bool:
        """Whether a question waits for its answer no longer than two of the kind that the last one was."""
        waits = self._asking is not None and not self._asking.done()
        return waits and time.monotonic() - self._asked_at <= 2 * self.seconds

    def within(self, seconds: float) -> Answer:
        """The answer, if it comes in time.

        Raises:
            Unavailable: It does not; it is still waited for. Else what `ask` raises.
        """
        with self._lock:
            if self._asking is None or self._asking.done():
                self._asking, self._asked_at = Future(), time.monotonic()
                # No pool: its threads are waited for when the process ends.
                threading.Thread(target=self._run, args=(self._asking,), daemon=True).start()
            asking = self._asking
        try:
            return asking.result(seconds)
        except TimeoutError:
            raise Unavailable(f"no answer within {seconds:.0f} s", self._where) from None

    def _run(self, asking: Future[Answer]) -> None:
        try:
            answer = self._ask()
        except Exception as error:
            asking.set_exception(error)
            return
        self.last, self.seconds = answer, time.monotonic() - self._asked_at
        asking.set_result(answer)
