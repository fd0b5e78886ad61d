"""What holds for all tests: none reads what the person who runs them has logged in to."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest

_CONFIG = tempfile.TemporaryDirectory(prefix="onebasis-config-")
os.environ["XDG_CONFIG_HOME"] = _CONFIG.name
os.environ.pop("ONEBASIS_CONTEXT", None)

gc.disable()

LONGEST = (
    "tests/acceptance/test_main_job.py",
    "tests/acceptance/test_kill_matrix.py",
    "tests/workers/test_rank_group.py",  # no service: not all processes begin by starting Ray
    "tests/docs/test_blocks_run.py",
    "tests/acceptance/test_interruptions.py",
    "tests/acceptance/test_serving.py",
    "tests/acceptance/test_gang.py",
    "tests/acceptance/test_poison.py",
    "tests/acceptance/test_pools.py",
    "tests/acceptance/test_base_models.py",
    "tests/acceptance/test_two_services.py",
)
"""Files of minutes, the longest first: they are given to processes, and none of them may be what all wait for."""


def pytest_collection_finish() -> None:
    """What was imported until here stays, so the collector need not look at it a thousand times."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files; all others keep their order."""
    places = {Path(config.rootpath, file): place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
