"""One HTTP request and its reply, by the standard library: a command that only asks must answer at once.

httpx takes 0.2 seconds of CPU to import and to make a client with; what is asked here is on this machine or this
network, without proxies or redirects. Over TLS a proxy may stand in front of the service, whose sign of life would not
be the service's: there, the reply is waited for as long as it may take, and no longer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ssl import SSLCertVerificationError as CertificateError
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlencode, urlsplit

from configs.errors import InvalidInput, NoSignOfLife, Unavailable
from orchestrator.api.calls import Heard, Hearing, Reply

if TYPE_CHECKING:
    import ssl

ALIVE_PATH = "/alive"
"""Route that the server answers without doing anything."""
EVENT_STREAM = "text/event-stream"
SIGN_SECONDS = 4.0
"""Longest silence before a server is asked whether it is alive, and longest wait for that answer: a person is told
within 10 s."""
BLOCK_BYTES = 2**16
"""Bytes of a body that are sent within SIGN_SECONDS at the least."""


class RefusedError(Exception):
    """The server answered, and not with a stream."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.reply = reply


class NobodyListensError(Exception):
    """No connection came about, so nothing was asked."""


class HungUpError(Unavailable):
    """The connection ended before the reply had come: the server was killed, or ended and started again."""


class NotTakenError(Exception):
    """A process listens and took no connection in time: nothing was asked of it. `told`: the error for people."""

    def __init__(self, told: NoSignOfLife) -> None:
        super().__init__(told)
        self.told = told


def trusting(certificate: str) -> ssl.SSLContext:
    """Trust in this very certificate, in PEM, whatever name it is made out for: our own service's."""
    import ssl

    trust = ssl.create_default_context(cadata=certificate)
    trust.check_hostname = False
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return trust


def exchange(
    url: str,
    verb: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    token: str = "",
    timeout_seconds: float,
    waiting: Callable[[float], None] | None = None,
    trust: ssl.SSLContext | None = None,
) -> Reply:
    """Ask once, and wait for the reply as long as the server is alive.

    Args:
        url: Address of the route, `http://HOST:PORT/PATH`, quoted.
        query: Parameters that are written after the path.
        body: What is sent; None: the request has none.
        headers: Further headers.
        token: Bearer token.
        timeout_seconds: Longest wait for the reply.
        waiting: Called every few seconds with the seconds so far, while the server is alive and does not reply.
        trust: What certificate it has to show; needed for `https://`.

    Raises:
        NobodyListensError: The server is not there.
        NotTakenError: It is there and takes no connection. Said within SIGN_SECONDS.
        NoSignOfLife: It is there, stopped or hanging. Said within 2 · SIGN_SECONDS.
        HungUpError: It went away before it replied.
        Unavailable: The time was over.
    """
    place = urlsplit(url)
    connection = _connected(url, trust)
    said = {"Authorization": f"Bearer {token}", **(headers or {})}
    if body is not None:
        said["Content-Length"] = str(len(body))
    try:
        connection.request(verb, _with_query(place.path, query), None if body is None else _blocks(body), said)
        if trust is None:
            _await_reply(connection, url, token, timeout_seconds, waiting)
        else:
            connection.sock.settimeout(timeout_seconds)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers.get_content_type(), reply.read())
    except TimeoutError as error:  # while it was sent, or in the middle of the reply
        if trust is not None:
            what = f"has not answered for {timeout_seconds:.0f} s"
            raise Unavailable(what, f"{place.scheme}://{place.netloc}", "look at `onebasis status`") from error
        raise _no_sign(url) from error
    except (OSError, HTTPException) as error:
        raise _hung_up(url, error) from error
    finally:
        connection.close()


def listen(
    url: str,
    *,
    query: Mapping[str, Any] | None = None,
    token: str = "",
    trust: ssl.SSLContext | None = None,
) -> Iterator[Heard]:
    """Ask for a stream of server-sent events, and hear them as they come, until the server ends it.

    Args:
        url, query, token, trust: As for `exchange`.

    Raises:
        RefusedError: It answered something else.
        NobodyListensError, NotTakenError: As `exchange`.
        NoSignOfLife: It was silent for SIGN_SECONDS: a server that lives says so more often.
        HungUpError: It went away.
    """
    connection = _connected(url, trust)
    headers = {"Authorization": f"Bearer {token}", "Accept": EVENT_STREAM}
    try:
        connection.request("GET", _with_query(urlsplit(url).path, query), None, headers)
        reply = connection.getresponse()
        if (kind := reply.headers.get_content_type()) != EVENT_STREAM:
            raise RefusedError(Reply(reply.status, kind, reply.read()))
        hearing = Hearing()
        for line in iter(reply.readline, b""):
            if (heard := hearing.line(line.decode().rstrip("\r\n"))) is not None:
                yield heard
    except TimeoutError as error:
        raise _no_sign(url) from error
    except (OSError, HTTPException) as error:
        raise _hung_up(url, error) from error
    finally:
        connection.close()


def _connected(url: str, trust: ssl.SSLContext | None) -> HTTPConnection:
    """A connection to a server, or the error that says why there is none."""
    connection = _connection(urlsplit(url), trust)
    try:
        connection.connect()
    except CertificateError as error:
        what = f"its certificate is not trusted: {error.verify_message or error}"
        raise InvalidInput(what, url, "`onebasis login URL --ca-file FILE` names an authority of your own") from error
    except TimeoutError as error:  # the listening process takes no more connections, or its machine does not answer
        raise NotTakenError(_no_sign(url)) from error
    except OSError as error:
        raise NobodyListensError from error
    return connection


def _with_query(path: str, query: Mapping[str, Any] | None) -> str:
    written = {name: str(value).lower() if isinstance(value, bool) else value for name, value in (query or {}).items()}
    return f"{path}?{urlencode(written)}" if written else path


def _hung_up(url: str, error: Exception) -> HungUpError:
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    todo = "`onebasis status` shows whether it runs, `onebasis up` starts it"
    return HungUpError(f"the service did not answer: {what}", url, todo)


def _blocks(body: bytes) -> Iterator[bytes]:
    """The body in parts, since the connection's limit of seconds counts for each: a long one over a slow line takes
    minutes."""
    for start in range(0, len(body), BLOCK_BYTES):
        yield body[start : start + BLOCK_BYTES]


def _connection(place: SplitResult, trust: ssl.SSLContext | None) -> HTTPConnection:
    if place.scheme == "https":
        return HTTPSConnection(place.hostname or "", place.port, timeout=SIGN_SECONDS, context=trust)
    return HTTPConnection(place.hostname or "", place.port, timeout=SIGN_SECONDS)


def _await_reply(
    connection: HTTPConnection,
    url: str,
    token: str,
    timeout_seconds: float,
    waiting: Callable[[float], None] | None,
) -> None:
    """Return when the reply begins."""
    started = time.monotonic()
    while not select.select([connection.sock], [], [], SIGN_SECONDS)[0]:
        waited = time.monotonic() - started
        if not _is_alive(url, token):
            raise _no_sign(url)
        if waited > timeout_seconds:
            raise Unavailable(
                f"the service is alive and has not answered for {waited:.0f} s", url, "look at `onebasis status`"
            )
        if waiting is not None:
            waiting(waited)


def _is_alive(url: str, token: str) -> bool:
    """Whether the server answers anything at all, soon."""
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=SIGN_SECONDS)
    try:
        connection.request("GET", ALIVE_PATH, headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _no_sign(url: str) -> NoSignOfLife:
    place = urlsplit(url)
    return NoSignOfLife(
        f"the control plane has given no sign of life for {SIGN_SECONDS:.0f} s: it is stopped, or hangs",
        f"{place.scheme}://{place.netloc}",
        "`onebasis up` mends it; what trains goes on",
    )
