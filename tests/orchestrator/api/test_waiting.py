"""Whoever asks is never left in silence: what does not answer is named, and what is late is told of."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import NoSignOfLife, NotWritten, Unavailable
from orchestrator.alarms import AlarmCode
from orchestrator.api import exchange, latest
from orchestrator.api.client import Client
from orchestrator.api.latest import Latest
from orchestrator.api.requests import Health, ListTasks, Status
from orchestrator.signs_of_life import Life, life_of
from subspace_store.commands import terminal
from subspace_store.commands.terminal import telling
from subspace_store.requests import Hold, Rollback
from tests.orchestrator.site import Site


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SIGN_SECONDS", 0.2)
    monkeypatch.setattr(terminal, "FIRST_SECONDS", 0.1)


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[socket.socket]:
    """Somebody who takes connections and answers nothing, announced as this folder's control plane."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (tmp_path / "server.json").write_text(json.dumps({"url": url, "token": "t", "pid": os.getpid()}))
        yield listener


def test_a_control_plane_that_is_stopped_is_named_with_its_process_id(tmp_path: Path, deaf: socket.socket) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)", "orchestrator.api.server", str(tmp_path)]
    process = subprocess.Popen(command)
    try:
        facts = json.loads((tmp_path / "server.json").read_text())
        (tmp_path / "server.json").write_text(json.dumps(facts | {"pid": process.pid}))
        while b"server" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        while life_of(process.pid) is not Life.STOPPED:
            time.sleep(0.01)
        with pytest.raises(NoSignOfLife, match=f"pid {process.pid}.*is stopped"):
            Client(tmp_path, lambda _: None).ask(Status())
    finally:
        process.kill()
        process.wait()


@pytest.mark.changes
def test_an_answer_that_takes_long_is_waited_for_and_the_alarms_are_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    really = site.service.tasks.page

    def slow(request: Any, of_teams: Any) -> Any:
        while not any("ALARM" in line for line in said):
            time.sleep(0.01)
        return really(request, of_teams)

    monkeypatch.setattr(exchange, "SIGN_SECONDS", 1.0)
    monkeypatch.setattr(site.service.tasks, "page", slow)
    site.plant.controller.alarms.ring(AlarmCode.RAY_DOWN, "Ray", "its raylet (pid 7) is gone")
    answer = Client(site.folder, said.append).ask(ListTasks())
    assert [row["title"] for row in answer] == ["red/alpha", "blue/beta"]
    assert "it is alive" in said[0]
    assert said[1].startswith("ALARM ray-down: its raylet (pid 7) is gone → `onebasis up` starts it again")


@pytest.mark.changes
def test_what_is_to_be_written_while_ray_is_down_is_refused_at_once_and_is_not_in_doubt(site: Site) -> None:
    alarms, seq = site.plant.controller.alarms, site.plant.state.seq
    alarms.ring(AlarmCode.RAY_DOWN, "Ray", "its raylet (pid 7) is gone")
    for request in (Hold(reason="why"), Rollback(version=1)):
        with pytest.raises(NotWritten, match="Ray does not work"):
            site.client.ask(request)
    alarms.end(AlarmCode.RAY_DOWN, "Ray")
    assert site.client.ask(Status())["alarms"] == []
    assert site.client.ask(Status())["in_doubt"] == []
    assert site.plant.state.seq == seq
    site.client.ask(Hold(reason="why"))
    assert site.plant.state.seq == seq + 1


@pytest.mark.changes
def test_the_status_of_a_service_whose_store_does_not_answer_comes_in_time_and_says_so(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latest, "LOOK_SECONDS", 0.2)
    assert site.client.ask(Status())["alarms"] == []
    answers, really = threading.Event(), site.service.versions()._store.refresh

    def hangs() -> Any:
        answers.wait(60)
        return really()

    monkeypatch.setattr(site.service.versions()._store, "refresh", hangs)
    began = time.monotonic()
    status = site.client.ask(Status())
    assert time.monotonic() - began < 5
    assert (status["main"], status["running"]) == (2, True)  # as it was when the store last answered
    (alarm,) = status["alarms"]
    assert alarm["code"] == "store-away"
    assert "no answer within" in alarm["text"]
    assert site.client.ask(Health())["alarms"] == [alarm]
    answers.set()
    while site.client.ask(Status())["alarms"]:
        assert time.monotonic() - began < 10


@pytest.mark.changes
def test_a_store_that_answers_late_is_told_as_slow_and_not_as_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "LOOK_SECONDS", 0.1)
    really, hangs = site.service.versions()._store.refresh, threading.Event()

    def slowly() -> Any:
        hangs.wait(60) if hangs_for_good else time.sleep(0.4)
        return really()

    def looked() -> set[str]:
        site.service.look()
        return {str(alarm.code) for alarm in site.plant.controller.alarms}

    hangs_for_good = False
    site.service.look()
    monkeypatch.setattr(site.service.versions()._store, "refresh", slowly)
    assert looked() == {"store-away"}  # as far as anybody knows
    until = time.monotonic() + 10
    while looked() != {"store-slow"}:
        assert time.monotonic() < until
    assert [looked() for _ in range(12)] == [{"store-slow"}] * 12  # whether an answer comes just now or not
    (alarm,) = site.plant.controller.alarms
    assert "answers, but a read that takes a moment elsewhere took 0 s" in alarm.what
    hangs_for_good = True  # and now it is away
    while "store-away" not in looked():
        assert time.monotonic() < until
    hangs.set()
    monkeypatch.setattr(site.service.versions()._store, "refresh", really)
    while looked():
        assert time.monotonic() < until


@pytest.mark.changes
def test_an_idle_service_whose_store_or_database_is_away_notices_by_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise Unavailable("no answer", "there")

    def codes() -> list[str]:
        return [alarm["code"] for alarm in site.client.ask(Health())["alarms"]]  # asks neither

    site.service.look()
    assert codes() == []
    with monkeypatch.context() as patched:
        patched.setattr(site.service.versions()._store, "refresh", away)
        patched.setattr(site.plant.queue, "counts", away)
        site.service.look()
        assert sorted(codes()) == ["database-away", "store-away"]
    with monkeypatch.context() as patched:  # a disk that is not mounted is an empty folder
        patched.setattr("subspace_store.log.store_format.read_format", lambda _: None)
        site.service.look()
        assert codes() == ["store-away"]
    site.service.look()
    assert codes() == []


@pytest.mark.changes
def test_a_database_that_is_away_is_an_alarm_of_the_status(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise Unavailable("the task database does not answer", "sqlite")

    monkeypatch.setattr(site.plant.queue, "counts", away)
    status = site.client.ask(Status())
    assert status["tasks"] is None
    assert [alarm["code"] for alarm in status["alarms"]] == ["database-away"]


def test_one_question_is_under_way_at_a_time_and_its_answer_is_kept() -> None:
    asked, may = [], threading.Event()

    def ask() -> int:
        asked.append(1)
        may.wait(10)
        return len(asked)

    latest = Latest(ask, "somewhere")
    for _ in range(3):
        with pytest.raises(Unavailable, match="no answer within 0 s"):
            latest.within(0.01)
    assert (len(asked), latest.last) == (1, None)
    may.set()
    while latest.last is None:  # kept, although nobody waits for it any more
        time.sleep(0.01)
    assert latest.within(10) in (1, 2)
    assert latest.last in (1, 2)


def test_what_takes_long_in_this_process_is_told_of() -> None:
    said: list[str] = []
    with telling("reading the store", said.append):
        while not said:
            time.sleep(0.01)
    assert said == ["still reading the store, for 0 s"]
    with telling("reading the store", said.append):
        pass
    assert len(said) == 1
