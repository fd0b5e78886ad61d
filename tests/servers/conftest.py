"""The servers of these tests, one each for the whole run, and places on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.settings import StorageSettings
from tests.servers.ceph import ceph_server
from tests.servers.cutting_proxy import no_waits
from tests.servers.install import is_installed
from tests.servers.ministack import Ministack, ministack_server
from tests.servers.s3rver import s3rver_server
from tests.servers.server import CREDENTIALS, KNOWN, Server, wanted

# The matrices here are small: threads cost more than they save, most of all on a shared machine.
torch.set_num_threads(1)

HONEST = tuple(name for name in wanted() if name != "s3rver")
"""Servers that keep the rules: everything must work on them."""
FIGURE = "figure"
"""Name of a property of a test that is printed."""


@pytest.fixture(autouse=True)
def dummy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ceph_server(_folder("ceph", tmp_path_factory)) as server:
        yield server


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ministack_server(_folder("ministack", tmp_path_factory)) as (server, _):
        yield server


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3rver_server(_folder("s3rver", tmp_path_factory)) as server:
        yield server


@pytest.fixture
def own_ministack(tmp_path: Path) -> Iterator[tuple[Server, Ministack]]:
    """One that the test may kill and start."""
    assert is_installed("ministack")
    with ministack_server(tmp_path) as running:
        yield running


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of servers that ONEBASIS_S3_SERVERS leaves out are not collected."""
    left_out = {prefix + name for name in KNOWN if name not in wanted() for prefix in ("", "own_")}
    dropped = [item for item in items if left_out & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _folder(name: str, folders: pytest.TempPathFactory) -> Path:
    if not is_installed(name):
        pytest.fail(f"the S3 server {name} is not here: `make test-s3` installs it, or says why it cannot")
    return folders.mktemp(name)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.s3) for name in HONEST])
def server(request: pytest.FixtureRequest) -> Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Server)
    return found


@pytest.fixture(
    params=[
        pytest.param("folder", marks=pytest.mark.acceptance),
        *(pytest.param(name, marks=pytest.mark.s3) for name in HONEST),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSettings:
    """An empty place for a store: a folder, or one on each server."""
    if request.param == "folder":
        return StorageSettings(url=f"file:{tmp_path / 'store'}")
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Server)
    return found.place()


@pytest.fixture
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    no_waits(monkeypatch)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What a test puts here is printed at the end of the run, whether or not somebody asks."""
    said: list[str] = []
    yield said
    request.node.user_properties.extend((FIGURE, f"{request.node.name}: {line}") for line in said)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # What a fixture gives a test at its end is in the report of that end alone.
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in (report for report in reports if getattr(report, "when", "") == "teardown"):
        for name, line in report.user_properties:
            if name == FIGURE:
                terminalreporter.write_line(line)
