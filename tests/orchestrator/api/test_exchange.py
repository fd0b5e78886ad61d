"""A server that is stopped, hangs, is slow or goes away: what the person at the command line is told, and how soon."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import NoSignOfLife, Unavailable
from orchestrator.api import exchange as module
from orchestrator.api.client import Client
from orchestrator.api.exchange import NobodyListensError, NotTakenError, exchange
from orchestrator.api.requests import ListTasks, Status
from subspace_store.requests import Hold
from tests.orchestrator.site import TOKEN, Site

TOLD_SECONDS = 10.0
SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(3)
        if self.path == "/gone":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("request_", [Status(), ListTasks(), Hold(reason="x")], ids=lambda it: type(it).__name__)
def test_a_stopped_control_plane_is_told_within_ten_seconds(
    server: tuple[str, subprocess.Popen[str]], tmp_path: Path, request_: Status
) -> None:
    url, process = server
    (tmp_path / "server.json").write_text(json.dumps({"url": url, "token": "t", "pid": process.pid}))
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    # Of a request that writes nobody knows whether it was done: then the error says so, and why.
    with pytest.raises(Unavailable, match="no sign of life for 4 s: it is stopped, or hangs"):
        Client(tmp_path).ask(request_)
    assert time.monotonic() - started < TOLD_SECONDS


def test_a_long_request_to_a_stopped_server_is_told_as_soon(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = server
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(NoSignOfLife):  # more than what the kernel's buffers take in
        exchange(f"{url}/", "POST", body=b"x" * (50 * 2**20), timeout_seconds=100)
    assert time.monotonic() - started < TOLD_SECONDS


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a process that listens and takes no more connections."""
    monkeypatch.setattr(module, "SIGN_SECONDS", 0.5)
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            one = opened.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        time.sleep(0.1)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_takes_no_connection_is_not_taken_for_none(full: str) -> None:
    with pytest.raises(NotTakenError):  # a command that took it for dead would write beside it
        exchange(f"{full}/", "GET", timeout_seconds=100)
    with pytest.raises(NobodyListensError):
        exchange("http://127.0.0.1:1/", "GET", timeout_seconds=1)


@pytest.mark.parametrize("request_", [Status(), Hold(reason="x")], ids=lambda it: type(it).__name__)
def test_where_no_connection_came_about_nothing_was_asked_and_no_outcome_is_unknown(
    full: str, tmp_path: Path, request_: Status
) -> None:
    (tmp_path / "server.json").write_text(json.dumps({"url": full, "token": "t", "pid": 0}))
    with pytest.raises(NoSignOfLife, match="it took no connection, so nothing was asked of it or done"):
        Client(tmp_path).ask(request_)


def test_a_slow_server_that_is_alive_is_waited_for_and_the_wait_is_told(
    server: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIGN_SECONDS", 1.0)
    told: list[float] = []
    assert exchange(f"{server[0]}/slow", "GET", timeout_seconds=100, waiting=told.append).status == 200
    assert told
    with pytest.raises(Unavailable, match=r"is alive and has not answered for \d s"):
        exchange(f"{server[0]}/slow", "GET", timeout_seconds=1.5)


def test_a_server_that_goes_away_is_told(server: tuple[str, subprocess.Popen[str]]) -> None:
    with pytest.raises(Unavailable, match="the service did not answer"):
        exchange(f"{server[0]}/gone", "GET", timeout_seconds=100)


def test_the_service_tells_everybody_that_it_is_alive_and_nothing_else(site: Site) -> None:
    for token in (TOKEN, "x", ""):
        answer = exchange(f"{site.url}/alive", "GET", token=token, timeout_seconds=10)
        assert json.loads(answer.content) == {"alive": True}
    assert exchange(f"{site.url}/v1/health", "GET", token="x", timeout_seconds=10).status == 401
