"""One HTTP request and its reply, by the standard library: a command that only asks must answer at once.

httpx takes 0.2 seconds of CPU to import and to make a client with; what is asked here is on this machine or this
network, without TLS, proxies or redirects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlencode, urlsplit

from configs.errors import Unavailable


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
    body: bytes | None = None,
    token: str = "",
    timeout_seconds: float,
) -> Reply:
    """Ask once, and wait for the reply.

    Args:
        url: Of the route, `http://HOST:PORT/PATH`, quoted.
        query: Written after the path.
        body: JSON; None: the request has none.
        token: Of the bearer.
        timeout_seconds: For each wait of the connection.

    Raises:
        NobodyListensError: The server is not there.
        Unavailable: It was, and did not answer.
    """
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=timeout_seconds)
    try:
        connection.connect()
    except OSError as error:
        raise NobodyListensError from error
    headers = {"Authorization": f"Bearer {token}"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    written = {name: str(value).lower() if isinstance(value, bool) else value for name, value in (query or {}).items()}
    try:
        connection.request(verb, f"{place.path}?{urlencode(written)}" if written else place.path, body, headers)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers.get_content_type(), reply.read())
    except (OSError, HTTPException) as error:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise Unavailable(f"the service did not answer: {what}", url, "see the log in the state folder") from error
    finally:
        connection.close()
