"""The store's one writer, as the control plane sees it: whether it could open the store, and whether it answers.

Requests to write go another way (`candidate.py`, `service.py`). Its sign of life is answered beside a write that is
under way, so that a long merge is not taken for silence.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from configs.errors import Fenced, OnebasisError
from orchestrator.alarms import WRITE_CODES, AlarmCode, Ringing
from orchestrator.cluster import Call, Cluster, MachineLost
from orchestrator.pending_calls import StoreCalls
from workers.orders import BaseLayout

log = logging.getLogger("onebasis.controller")

ASK_SECONDS = 1.0
SILENT_SECONDS = 6.0
"""Longest silence before an alarm: it answers in milliseconds; people are told within ten seconds."""
START_SECONDS = 60.0
"""The same for a new process, which first imports its libraries: two seconds, on a crowded machine twenty."""
RETRY_SECONDS = 5.0
ABOUT = "the store's writer"


class StoreWriter:
    """Listens to the writer, and replaces one that stays silent for a whole lease.

    Args:
        refused: Called with an error that only a person can end: a damaged store, or another service's.
    """

    def __init__(
        self,
        cluster: Cluster,
        calls: StoreCalls,
        alarms: Ringing,
        lease_seconds: float,
        refused: Callable[[OnebasisError], None],
    ) -> None:
        self._cluster = cluster
        self._calls = calls
        self._alarms = alarms
        self.lease_seconds = lease_seconds
        self._refused = refused
        self.is_open = False
        """Whether it has opened the store for the base model that the workers have loaded."""
        self.error: OnebasisError | None = None
        """Why it cannot open the store."""
        self._is_there = False
        """Whether the process has answered since it was made."""
        self.heard_at = 0.0
        """Unix time of its last answer."""
        self._asked_at = 0.0
        """Unix time of the last question."""

    def listen(self, layout: BaseLayout | None) -> None:
        """Make it open or create the store, if it has not; and ask it for a sign of life.

        Args:
            layout: Of the base model that the first worker has loaded and checked; a store is made for these weights
                alone. None before that.
        """
        now = time.time()
        if layout and not self.is_open:
            self._calls.open(layout.sha256)
        if not self._calls.asking:
            if now - self._asked_at >= ASK_SECONDS:
                self._asked_at = now
                self._calls.ask()
            return
        if self._alarms.rings(AlarmCode.RAY_DOWN):
            return  # that alarm says why, and a new process could not be made
        silence = now - self._asked_at
        if silence > (SILENT_SECONDS if self._is_there else START_SECONDS):
            what = "the store's writer does not answer: nothing is merged, published or rolled back"
            self._alarms.ring(AlarmCode.STORE_SILENT, ABOUT, what)
        if silence > (self.lease_seconds if self._is_there else 2 * START_SECONDS):
            log.warning("the store's writer has been silent for %.0f s: replacing it", silence)
            self.is_open, self._is_there, self._asked_at = False, False, now
            self._calls.replace_silent_writer()

    def take_sign(self, call: Call) -> None:
        """It answered, or is gone; then Ray makes another, and the next question waits for that one."""
        try:
            self._cluster.result(call)
        except MachineLost as error:
            if self._is_there:
                log.warning("the store's writer is away: %s", error.what)
            self.is_open, self._is_there = False, False
            return
        self._is_there, self.heard_at = True, time.time()
        self._alarms.end(AlarmCode.STORE_SILENT, ABOUT)

    def take_opening(self, call: Call) -> None:
        """It opened the store, or could not."""
        try:
            self._cluster.result(call)
        except MachineLost as error:
            log.debug("the store's writer was lost while it opened the store: %s", error.what)
            self._calls.later("open")
        except Fenced:
            self._calls.replace_writer()
            self._calls.later("open")
        except OnebasisError as error:
            self.error = error
            self._alarms.ring_for(error, "opening the store")
            self._refused(error)
            self._calls.later("open", RETRY_SECONDS)
        else:
            self.is_open, self.error = True, None
            self._calls.wake(log_moved=True)
            self._alarms.end_all("opening the store", *WRITE_CODES)
