"""A proxy on loopback that makes a real S3 server full, read-only, away or silent, at a word: for services under test.

It answers as MinIO and Ceph do when their disks are full (507, `XMinioStorageFull`) and as every server does to
credentials that may only read (403, `AccessDenied`).
"""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.servers.cutting_proxy import Forwarding, running


class Mood(StrEnum):
    """What the server behind the proxy seems to be."""

    WELL = "well"
    FULL = "full"
    READ_ONLY = "read-only"
    AWAY = "away"
    SLOW = "slow"
    LATE = "late"


REFUSALS = {Mood.FULL: (507, "XMinioStorageFull"), Mood.READ_ONLY: (403, "AccessDenied")}
LATE_SECONDS = 5.0
"""Time that each write takes of a server that is merely slow."""
SLOW_SECONDS = 15.0
"""Longer than anybody looks at a silent terminal, shorter than boto3 waits for a reply."""


class RefusingProxy(ThreadingHTTPServer):
    """The proxy; set `mood` at any time."""

    daemon_threads = True

    def __init__(self, endpoint_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint_url)
        self.endpoint_url = f"http://127.0.0.1:{self.server_port}"
        self.mood = Mood.WELL

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what this proxy is for."""


class _Handler(Forwarding):
    server: RefusingProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        mood = self.server.mood
        if mood is Mood.AWAY:
            self.close_connection = True
            return
        if mood is Mood.SLOW:
            until = time.monotonic() + SLOW_SECONDS
            while self.server.mood is Mood.SLOW and time.monotonic() < until:
                time.sleep(0.05)
        if mood is Mood.LATE and self.command == "PUT":
            time.sleep(LATE_SECONDS)
        if mood in REFUSALS and self.command in ("PUT", "POST", "DELETE"):
            status, code = REFUSALS[mood]
            content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{mood}</Message></Error>".encode()
            head = (
                f"HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + content)
            return
        self.wfile.write(self._answer_of_the_server(body))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


def refusing_proxy(endpoint_url: str) -> contextlib.AbstractContextManager[RefusingProxy]:
    """The running proxy in front of a server."""
    return running(RefusingProxy(endpoint_url))
