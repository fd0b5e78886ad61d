"""What holds for all tests: none reads what the person who runs them has logged in to."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="onebasis-config-")
os.environ.pop("ONEBASIS_CONTEXT", None)

gc.disable()


def pytest_collection_finish() -> None:
    """What was imported until here stays, so the collector need not look at it a thousand times."""
    gc.freeze()
    gc.enable()
