"""Fixtures of the control plane's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator import pending_calls
from tests.orchestrator.plant import Plant
from tests.orchestrator.site import Site

# The matrices here are tiny: threads cost more than they save.
torch.set_num_threads(1)


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop waits before it tries again is real seconds; nothing here takes any."""
    monkeypatch.setattr(pending_calls, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(pending_calls, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(pending_calls.PendingCalls.later, "__defaults__", (0.0,))


@pytest.fixture
def plant(tmp_path: Path, _no_waiting: None) -> Plant:
    """Two workers, an empty queue, an empty store."""
    return Plant(tmp_path)


@pytest.fixture
def make_plant(tmp_path: Path, _no_waiting: None) -> Iterator[Callable[..., Plant]]:
    """Plants with other workers or settings, each in a folder of its own."""
    made: list[Plant] = []

    def make(workers: int = 2, **changes: object) -> Plant:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Plant(folder, workers, **changes))
        return made[-1]

    yield make
    for plant in made:
        plant.queue.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that listens, with red/alpha in version 1 and blue/beta in version 2 of main."""
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        for title in ("red/alpha", "blue/beta"):
            site.publish(title)
        yield site
    finally:
        site.close()
