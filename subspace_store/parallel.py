"""`map` in threads, with the results in order."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AT_ONCE = 8
"""Number of requests that one reader sends at the same time: reading waits for the storage, not for the processor."""

A = TypeVar("A")
B = TypeVar("B")


def in_order(function: Callable[[A], B], items: Sequence[A], workers: int) -> Iterator[B]:
    """`map`, a few items ahead in threads.

    Each thread uses one BLAS thread: with more, they wait for each other, on a busy machine a hundred times longer than
    they compute.
    """
    waiting = deque[Future[B]]()
    with _ONE_BLAS_THREAD:
        if workers < 2:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(workers) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


class _OneBlasThread:
    """One BLAS thread while any thread is inside. The setting belongs to the whole process: the last thread to leave
    restores what the first one found."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            # If torch was not imported, nothing multiplies with it: this file must not import it.
            torch = sys.modules.get("torch")
            if torch is not None and not self._inside:
                self._before = torch.get_num_threads()
                torch.set_num_threads(1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._before:
                sys.modules["torch"].set_num_threads(self._before)
                self._before = 0


_ONE_BLAS_THREAD = _OneBlasThread()
