"""What has failed is told as failed; what is in doubt is shown, can be asked for again and can be withdrawn. Nothing is
done later by itself."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from configs.errors import Conflict, NotWritten, Unavailable
from orchestrator.api.service import Service
from orchestrator.commands.cli import app
from subspace_store.commands.in_doubt import in_doubt, noted
from subspace_store.log import version_log
from subspace_store.requests import Hold, Withdraw
from subspace_store.storage.local import LocalStorage
from tests.orchestrator.site import Site

Onebasis = Callable[..., Result]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A service whose store is a folder, with red/alpha in version 1 of main."""
    monkeypatch.setattr(version_log, "FIRST_WAIT_SECONDS", 0.0)
    site = Site(tmp_path, storage={"url": f"file:{tmp_path / 'store'}"})
    try:
        site.publish("red/alpha")
        yield site
    finally:
        site.close()


@pytest.fixture
def onebasis(site: Site, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    monkeypatch.setenv("USER", "ann")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """A folder in which no file can be made."""

    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("subspace_store.storage.local._FileStream._opened", refuse)
        yield


@contextmanager
def without_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A storage of which nobody knows whether it has a record."""

    def create(self: LocalStorage, key: str, content: bytes) -> bool:
        raise Unavailable("no answer", key)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "create", create)
        yield


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(errno.ENOSPC, "store-full", "make space"), (errno.EROFS, "store-read-only", "mount it for writing")],
)
def test_a_rollback_on_a_full_or_read_only_store_has_failed_and_is_not_done_when_it_is_mended(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch, number: int, code: str, said: str
) -> None:
    with refusing(monkeypatch, number):
        told, told_json = onebasis("rollback", "0"), onebasis("rollback", "0", "--json")
    assert (told.exit_code, told_json.exit_code) == (5, 5)
    assert said in told.stderr
    assert "unknown" not in told.stderr
    assert json.loads(told_json.stdout)["error"]["code"] == code
    site.publish("blue/beta")  # the next write
    assert site.plant.held() == ["blue/beta", "red/alpha"]
    assert site.plant.states() == {"red/alpha": "published", "blue/beta": "published"}
    assert json.loads(onebasis("status", "--json").stdout)["in_doubt"] == []


def test_a_rollback_of_unknown_outcome_is_shown_with_its_key_and_not_done_by_the_next_write(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_answers(monkeypatch):
        told = onebasis("rollback", "0")
    assert told.exit_code == 5
    key = re.search(r"--op-key (rollback:\w+)", told.stderr)
    assert key is not None
    assert f"onebasis store withdraw {key[1]}" in told.stderr
    (doubt,) = json.loads(onebasis("status", "--json").stdout)["in_doubt"]
    assert (doubt["op_key"], doubt["operation"], doubt["actor"]) == (key[1], "rollback", "ann")
    assert f"--op-key {key[1]}" in onebasis("status").stdout
    site.publish("blue/beta")
    assert json.loads(onebasis("status", "--json").stdout)["in_doubt"] == []  # it is known by now
    assert site.plant.held() == ["blue/beta", "red/alpha"]
    again = onebasis("rollback", "0", "--op-key", key[1], "--json")
    assert json.loads(again.stdout)["op_key"] == key[1]
    assert site.plant.held() == []
    repeated = json.loads(onebasis("rollback", "0", "--op-key", key[1], "--json").stdout)
    assert repeated == json.loads(again.stdout) | {"repeated": True}
    assert "was done before" in onebasis("rollback", "0", "--op-key", key[1]).stdout


def test_a_request_stays_in_doubt_when_the_control_plane_is_started_again(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_answers(monkeypatch):
        assert onebasis("rollback", "0", "--op-key", "rollback of ann").exit_code == 5
    before = json.loads(onebasis("status", "--json").stdout)["in_doubt"]
    assert [doubt["op_key"] for doubt in before] == ["rollback of ann"]
    (site.folder / "server.json").rename(site.folder / "away.json")  # down: this process answers by itself
    assert json.loads(onebasis("status", "--json").stdout)["in_doubt"] == before
    assert "IN DOUBT" in onebasis("status").stdout
    (site.folder / "away.json").rename(site.folder / "server.json")
    again = Service(site.plant.settings, site.plant.queue, site.plant.storages, site.plant.controller)
    assert again.status.status()["in_doubt"] == before
    site.client.ask(Withdraw(request_key="rollback of ann", actor="ann"))
    assert again.status.status()["in_doubt"] == []


def test_a_request_whose_process_was_killed_is_in_doubt_and_one_under_way_is_not(tmp_path: Path) -> None:
    program = """
import pathlib, sys
from subspace_store.commands.in_doubt import noted
from subspace_store.requests import Hold
with noted(pathlib.Path(sys.argv[1]), Hold(reason="why", actor="ann", op_key="hold:1")):
    print("asked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    asking = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert asking.stdout is not None
    assert asking.stdout.readline() == b"asked\n"
    assert in_doubt(tmp_path) == []
    asking.kill()
    asking.communicate()
    (doubt,) = in_doubt(tmp_path)
    assert (doubt.op_key, doubt.operation, doubt.actor) == ("hold:1", "hold", "ann")
    again = Hold(reason="why", actor="ann", op_key="hold:1")
    with pytest.raises(NotWritten), noted(tmp_path, again):
        raise NotWritten("the store is away", "there")  # that says nothing about the first attempt
    assert in_doubt(tmp_path) == [doubt]
    with noted(tmp_path, again):
        pass
    assert in_doubt(tmp_path) == []


def test_a_request_in_doubt_is_withdrawn_or_said_to_be_done(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    withdraw = Withdraw(request_key="rollback of ann", actor="ann")
    with without_answers(monkeypatch):
        told = json.loads(onebasis("rollback", "0", "--op-key", "rollback of ann", "--json").stdout)["error"]
        assert (told["code"], told["op_key"]) == ("outcome-unknown", "rollback of ann")
        with pytest.raises(NotWritten, match="what became of rollback 'rollback of ann' before it is not known yet"):
            site.client.ask(withdraw)
    site.client.ask(withdraw)
    assert json.loads(onebasis("status", "--json").stdout)["in_doubt"] == []
    assert site.plant.held() == ["red/alpha"]
    assert onebasis("rollback", "0", "--op-key", "rollback of ann").exit_code == 0
    with pytest.raises(Conflict, match="'rollback of ann' was done"):
        site.client.ask(withdraw)
