"""Imports of large libraries without the search for garbage that Python repeats while objects are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import in this block what a process needs for as long as it lives.

    What torch and transformers make while they are imported, half a million objects, is there to stay: looking through
    it takes a quarter of the time until a worker is warm, and some tenths of a second in every full collection
    afterwards. So nothing is collected in this block, and what exists at its end is never looked at again.

    For the beginning of a process alone: later the end of the block would keep what a task has left behind.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
