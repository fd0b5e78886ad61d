"""A request as a call over HTTP, and a reply as an answer or an error: for all clients, however they send. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from configs.document import Request
from configs.errors import Conflict, NotFound, OnebasisError, TooLarge, Unavailable, error_from_dict
from configs.limits import BYTES_MAX
from orchestrator.api.requests import ChangeMany, Json, ReadEvents, Retry, Submit
from orchestrator.api.routes import route_of

JSON_TYPE = "application/json"
OPENAPI_PATH = "/openapi.json"
NOBODY_ANSWERS = (502, 503, 504)
"""Statuses with which a proxy, or a server at its limit of connections, answers by itself, in a form of its own."""
OTHER_RELEASE = (
    "where it runs, `onebasis upgrade` ends it, keeps a copy of its database, and goes on under this release"
)
BYTES = "application/octet-stream"
END = "end"
"""Name of the last event of a stream, whose data is the error for which it ended."""
TIMEOUT_SECONDS = 150.0
SUBMIT_TIMEOUT_SECONDS = 7200.0
"""Longest wait for a submission: a gigabyte of rows takes minutes to check."""


@dataclass(frozen=True)
class Call:
    """What is sent for a request."""

    verb: str
    path: str
    """Path of the URL, quoted."""
    query: Mapping[str, Any]
    body: bytes | None
    headers: Mapping[str, str]
    timeout_seconds: float
    """Longest wait for the reply."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    content_type: str
    content: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Heard:
    """A piece of a stream of server-sent events."""

    event: str
    """Name; empty where it has none."""
    last_id: str
    """Id of the newest event so far."""
    data: str | None
    """None: nothing happened, and the server is alive."""


class Hearing:
    """Takes the lines of a stream one after another, and makes pieces of them."""

    def __init__(self) -> None:
        self._event, self._last_id = "", ""
        self._data: list[str] = []

    def line(self, text: str) -> Heard | None:
        """Take a line without its end. The piece that it ends; None: it ends none."""
        if not text:
            heard = Heard(self._event, self._last_id, "\n".join(self._data) if self._data else None)
            self._event, self._data = "", []
            return heard
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._event = value
            case "id":
                self._last_id = value
            case "data":
                self._data.append(value)
        return None


class Following:
    """A stream of events that is asked for again whenever it ends: what to ask for next, and what came."""

    def __init__(self, request: ReadEvents) -> None:
        self.request = request
        """What follows on the events that came."""

    def take(self, heard: Heard) -> Json | None:
        """The event that a piece of the stream holds; None: it holds none.

        Raises:
            OnebasisError: For which the service has ended the stream.
        """
        if heard.event == END:
            raise error_from_dict(json.loads(heard.data or "{}"))
        self.request = self.request.model_copy(update={"after": int(heard.last_id)})
        return json.loads(heard.data) if heard.data is not None else None

    def took(self, event: Json) -> Json:
        """The same event, which came in another way."""
        self.request = self.request.model_copy(update={"after": event["event_id"]})
        return event


def call_of(request: Request, sent: bytes = b"", key: str = "") -> Call:
    """The call that asks a request.

    Args:
        sent: Body of a PUT.
        key: Key under which the service carries it out once, however often it is asked; empty: none.

    Raises:
        TooLarge: The server would refuse the body.
    """
    route = route_of(request)
    fields = {name: value for name, value in request.model_dump(mode="json").items() if value is not None}
    in_path = {name: str(fields.pop(name)) for name in route.in_path}
    # Dots too: `..` in a reference would be taken for a way to another route.
    path = re.sub(r"{(\w+)(?::path)?}", lambda found: quote(in_path[found[1]]).replace(".", "%2E"), route.url)
    body = {"POST": json.dumps(fields).encode(), "PUT": sent}.get(route.verb)
    # A server may hang up before its refusal is read.
    if route.verb == "POST" and body is not None and len(body) > BYTES_MAX:
        raise TooLarge(f"the request has more than {BYTES_MAX:,} bytes", "", "put rows into files", BYTES_MAX)
    return Call(
        verb=route.verb,
        path=path,
        query={} if route.verb == "POST" else fields,
        body=body,
        headers={
            **({} if body is None else {"Content-Type": BYTES if route.verb == "PUT" else JSON_TYPE}),
            **({"Idempotency-Key": key} if key else {}),
        },
        timeout_seconds=SUBMIT_TIMEOUT_SECONDS if isinstance(request, (Submit, Retry, ChangeMany)) else TIMEOUT_SECONDS,
    )


def answer_of(reply: Reply, url: str) -> Any:
    """What a reply says: JSON values, or the bytes of a file.

    Raises:
        Conflict: The service is of another release.
        OnebasisError: What the service raised, as itself.
        Unavailable: The service is at its limit of connections, or a proxy before it does not reach it.
    """
    if reply.is_success:
        return json.loads(reply.content) if reply.content_type == JSON_TYPE else reply.content
    try:
        facts = json.loads(reply.content)
    except ValueError:
        facts = {}
    if reply.status == NotFound.http_status and str(facts.get("todo", "")).startswith(OPENAPI_PATH):
        # The service has no such route, of which every command knows: what runs was started by another release.
        raise Conflict("the service that runs is of another release than this command", url, OTHER_RELEASE)
    if "what" in facts:
        raise error_from_dict(facts)
    if reply.status in NOBODY_ANSWERS:
        what = f"HTTP {reply.status}: it takes no more connections now, or a proxy before it does not reach it"
        raise Unavailable(what, url, "try again in a moment; `onebasis status` where it runs shows whether it does")
    raise OnebasisError(f"HTTP {reply.status} from the service", url, "see its log")
