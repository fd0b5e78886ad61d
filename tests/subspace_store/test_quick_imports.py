"""What a process imports at its beginning is never looked at by the collector, and what it makes later is."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from subspace_store.quick_imports import quick_imports

class Knot:
    def __init__(self):
        self.me = self

looked = []
gc.callbacks.append(lambda phase, _: looked.append(phase))
with quick_imports():
    import decimal, email.parser, html.parser
    kept = [[] for _ in range(10_000)]
assert not looked, looked
assert gc.isenabled() and gc.get_freeze_count() > 10_000
later = weakref.ref(Knot())
gc.collect()
assert later() is None

gc.disable()
try:
    with quick_imports():
        raise ImportError
except ImportError:
    pass
assert not gc.isenabled(), "whoever had switched it off finds it as it was"
"""


def test_nothing_is_collected_while_libraries_are_imported_and_everything_afterwards() -> None:
    # In a process of its own: what is frozen stays frozen.
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
