"""Fixtures of the control plane's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator import pending_calls, worker_pool
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
    monkeypatch.setattr(worker_pool, "SURE_SECONDS", 0.0)


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


def _published(folder: Path) -> Site:
    site = Site(folder)
    try:
        for title in ("red/alpha", "blue/beta"):
            site.publish(title)
    except BaseException:
        site.close()
        raise
    return site


@pytest.fixture
def bare_site(tmp_path: Path) -> Iterator[Site]:
    """A service that listens, with one worker and nothing submitted yet."""
    site = Site(tmp_path / "state", workers=1)
    yield site
    site.close()


@pytest.fixture(scope="module")
def _shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Site]]:
    """The file's own, made by the first test that asks."""
    made: list[Site] = []
    yield made
    for site in made:
        site.close()


@pytest.fixture
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _shared_site: list[Site]
) -> Iterator[Site]:
    """A service that listens, with red/alpha in version 1 and blue/beta in version 2 of main.

    The tests of a file share one and leave it as it was, in whatever order they run; a test that is marked `changes`
    gets one of its own.
    """
    if request.node.get_closest_marker("changes"):
        own = _published(tmp_path_factory.mktemp("site"))
        yield own
        own.close()
        return
    if not _shared_site:
        _shared_site.append(_published(tmp_path_factory.mktemp("site")))
    (shared,) = _shared_site
    before = shared.facts()
    yield shared
    assert shared.facts() == before, "the test changed the service that it shares: mark it with `changes`"
