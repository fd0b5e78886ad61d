"""A proxy on loopback that loses requests and replies by a seeded plan, between a store and a real S3 server.

It understands HTTP far enough to know when a request or a reply is whole; that is what decides whether the server
did the write before the connection was cut. Requests pass unchanged, so signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.retries.standard
import pytest

from subspace_store.log import version_log

PASS = "passed"
BEFORE = "cut before the server saw it"
LOST = "cut after the server did it"
HALF = "cut in the middle of the reply"
LATE = "late"
OWN = "refused for an object that an earlier try had written"
PLAIN_ODDS = {PASS: 70, BEFORE: 10, LOST: 10, HALF: 5, LATE: 5}
CONDITIONAL_ODDS = {PASS: 40, BEFORE: 15, LOST: 30, HALF: 10, LATE: 5}
"""A record of the log is where a lost reply could lose or double a merge: those are cut more often."""
LATE_SECONDS = 0.05
OUTAGE_ODDS = 0.3
"""How often a lost reply to a record is followed by an outage: then the store must give up without knowing."""
OUTAGE_REQUESTS = (30, 50)
"""A record is tried and read six times, each with up to three requests."""


class CuttingProxy(ThreadingHTTPServer):
    """The proxy; `counts` says what it did to how many requests, of the only client there is."""

    daemon_threads = True

    def __init__(self, endpoint_url: str, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint_url)
        self.endpoint_url = f"http://127.0.0.1:{self.server_port}"
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._away = 0
        self._lock = threading.Lock()

    def fate(self, conditional: bool) -> str:
        """What happens to the next request."""
        odds = CONDITIONAL_ODDS if conditional else PLAIN_ODDS
        with self._lock:
            (fate,) = self._random.choices(list(odds), list(odds.values()))
            if self._away:
                fate, self._away = BEFORE, self._away - 1
            elif fate == LOST and conditional and self._random.random() < OUTAGE_ODDS:
                self._away = self._random.randint(*OUTAGE_REQUESTS)
            self.counts[fate] += 1
        return fate

    def cut_at(self, size: int) -> int:
        """How much of a reply of so many bytes arrives: at least its first byte, never its last."""
        with self._lock:
            return self._random.randrange(1, size)

    @property
    def requests(self) -> int:
        """Requests so far."""
        return self.counts.total() - self.counts[OWN]

    @property
    def cuts(self) -> int:
        """Connections cut so far."""
        return sum(self.counts[fate] for fate in (BEFORE, LOST, HALF))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what this proxy is for; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


ProxyT = TypeVar("ProxyT", bound=ThreadingHTTPServer)


class Forwarding(BaseHTTPRequestHandler):
    """Hands a request to the server behind the proxy as it is. `server.target` is its address."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def _answer_of_the_server(self, body: bytes) -> bytes:
        connection = http.client.HTTPConnection(str(self.server.target.hostname), self.server.target.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                # `Expect: 100-continue` was answered here, and is not signed.
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        kept = [pair for pair in answer.getheaders() if pair[0].lower() not in ("transfer-encoding", "connection")]
        if self.command != "HEAD" and answer.status != 204 and not any(n.lower() == "content-length" for n, _ in kept):
            kept.append(("Content-Length", str(len(content))))
        head = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in kept), "", ""]
        return "\r\n".join(head).encode("latin-1") + content

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: hundreds of cuts are the plan."""


class _Handler(Forwarding):
    server: CuttingProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate("If-None-Match" in self.headers)
        if fate == BEFORE:
            self.close_connection = True
            return
        if fate == LATE:
            threading.Event().wait(LATE_SECONDS)
        reply = self._answer_of_the_server(body)
        if fate in (PASS, LATE) and reply.startswith(b"HTTP/1.1 412"):
            self.server.counts[OWN] += 1
        if fate in (LOST, HALF):
            self.close_connection = True
            reply = reply[: self.server.cut_at(len(reply))] if fate == HALF else b""
        self.wfile.write(reply)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


def cutting_proxy(endpoint_url: str, seed: int) -> contextlib.AbstractContextManager[CuttingProxy]:
    """The running proxy in front of a server."""
    return running(CuttingProxy(endpoint_url, seed))


@contextlib.contextmanager
def running(proxy: ProxyT) -> Iterator[ProxyT]:
    """A proxy at work."""
    with proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


def no_waits(patch: pytest.MonkeyPatch) -> None:
    """Retries come at once: connections here do not get better with time."""
    patch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda self, context: 0.0)
    patch.setattr(version_log, "FIRST_WAIT_SECONDS", 0.0)
