"""One HTTP request and its reply, by the standard library: a command that only asks must answer at once.

httpx takes 0.2 seconds of CPU to import and to make a client with; what is asked here is on this machine or this
network, without TLS, proxies or redirects.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlencode, urlsplit

from configs.errors import Unavailable

CONNECT_SECONDS = 5.0
"""On this machine or this network a connection takes milliseconds, also to a process that is busy."""
LOOK_SECONDS = 3.0
"""While the reply is waited for, `waiting` is called this often."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    content_type: str
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


class NobodyListensError(Exception):
    """No connection came about, so nothing was asked."""


def exchange(
    url: str,
    verb: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: Any = None,
    token: str = "",
    timeout_seconds: float,
    waiting: Callable[[float], None] | None = None,
) -> Reply:
    """Ask once, and wait for the reply.

    Args:
        url: Of the route, `http://HOST:PORT/PATH`, quoted.
        query: Written after the path.
        body: Sent as JSON, unless it is None.
        token: Of the bearer.
        timeout_seconds: Until the reply begins, and for each wait after that.
        waiting: Called with the seconds so far while there is no reply. What it raises ends the waiting.

    Raises:
        NobodyListensError: The server is not there.
        Unavailable: It was, and did not answer.
    """
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
    except TimeoutError as error:  # somebody listens, and takes no more connections
        if waiting is not None:
            waiting(CONNECT_SECONDS)
        raise Unavailable("the service takes no connection", url, "see the log in the state folder") from error
    except OSError as error:
        raise NobodyListensError from error
    connection.sock.settimeout(timeout_seconds)
    headers = {"Authorization": f"Bearer {token}"}
    content = None
    if body is not None:
        content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    written = {name: str(value).lower() if isinstance(value, bool) else value for name, value in (query or {}).items()}
    try:
        connection.request(verb, f"{place.path}?{urlencode(written)}" if written else place.path, content, headers)
        _await_reply(connection, timeout_seconds, waiting)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers.get_content_type(), reply.read())
    except (OSError, HTTPException) as error:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise Unavailable(f"the service did not answer: {what}", url, "see the log in the state folder") from error
    finally:
        connection.close()


def _await_reply(connection: HTTPConnection, timeout_seconds: float, waiting: Callable[[float], None] | None) -> None:
    """Until the first byte of the reply is there. A timeout of the socket's own could not be gone on from."""
    began = time.monotonic()
    while not select.select([connection.sock], [], [], LOOK_SECONDS if waiting else timeout_seconds)[0]:
        waited = time.monotonic() - began
        if waited >= timeout_seconds:
            raise TimeoutError(f"no reply in {waited:.0f} s")
        if waiting is not None:
            waiting(waited)
