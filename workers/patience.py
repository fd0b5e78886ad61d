"""Writes finished work, however long the storage does not take it.

An adapter that was trained for hours is not thrown away because a disk is full: the worker keeps it in memory and tries
again until there is space, or until somebody wants the worker for something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import Unavailable
from workers.orders import Phase, Progress
from workers.trainer import Asked, Cancelled, Preempted, Report

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 5.0
LOOK_SECONDS = 0.1
"""Interval at which it looks whether the control plane wants the worker to stop."""


class Patience:
    """Calls a write again and again until the storage takes it.

    Args:
        token: Token of the order.
        report: Called with what the order waits for, and once more when it goes on.
        asked: Request of the control plane; no collective operation, since only the rank that writes waits.
    """

    def __init__(self, token: str, report: Report, asked: Callable[[], Asked]) -> None:
        self._token = token
        self._report = report
        self._asked = asked

    def __call__(self, write: Callable[[], Result]) -> Result:
        """Write.

        Raises:
            Cancelled, Preempted: Asked for while it waited; what was to be written is lost.
        """
        wait, told = FIRST_WAIT_SECONDS, ""
        while True:
            try:
                return write()
            except Unavailable as error:
                line = f"finished, and waits for the storage: {error.what}"
                lines = (line,) if line != told else ()
                self._report(Progress(token=self._token, phase=Phase.SAVING, trouble=error, log_lines=lines))
                told = line
            self._wait(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if wanted := self._asked():
                raise Cancelled if wanted == "cancel" else Preempted("its result could not be written")
            time.sleep(LOOK_SECONDS)
