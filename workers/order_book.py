"""Orders done one after another in one thread, each once by its token.

What Worker and Gang have in common; what an order is about does not matter here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from workers.orders import Outcome

OUTCOMES_KEPT = 64  # a control plane asks again within minutes; an outcome is a few hundred bytes

Result = TypeVar("Result")


class OrderBook:
    """One thread, and the outcomes of the orders it did."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onebasis-work")
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, Future[Outcome]] = OrderedDict()

    def run(self, token: str, work: Callable[[], Outcome]) -> Outcome:
        """Do the work, or wait for the work that was begun under the same token.

        Raises:
            What `work` raises; then nothing is remembered, and the order may be given again.
        """
        with self._lock:
            future = self._outcomes.get(token)
            if future is None:
                future = self._outcomes[token] = self._thread.submit(self._remembered, token, work)
            self._outcomes.move_to_end(token)
            self._forget_old()
        return future.result()

    def between(self, work: Callable[[], Result]) -> Future[Result]:
        """Do work that is not an order in the same thread."""
        return self._thread.submit(work)

    @property
    def is_busy(self) -> bool:
        """Whether an order was given and is not done."""
        with self._lock:
            return any(not future.done() for future in self._outcomes.values())

    def is_open(self, token: str) -> bool:
        """Whether an order was given and is not done."""
        with self._lock:
            future = self._outcomes.get(token)
            return future is not None and not future.done()

    def _remembered(self, token: str, work: Callable[[], Outcome]) -> Outcome:
        try:
            return work()
        except BaseException:
            with self._lock:
                del self._outcomes[token]
            raise

    def _forget_old(self) -> None:
        for token in [token for token, future in self._outcomes.items() if future.done()]:
            if len(self._outcomes) <= OUTCOMES_KEPT:
                return
            del self._outcomes[token]
