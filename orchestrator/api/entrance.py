"""What every request passes before the API and every answer after it: an id, who asks, how often, and how long it took.

Plain ASGI: it hands on what the server hands it, in the same task, so that a stream costs nothing here and a client
that leaves is heard of where the answer is made.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Mapping
from random import getrandbits
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse

from configs.errors import OnebasisError, TooLarge, TooManyRequests, UnknownToken
from configs.log_lines import TRACEPARENT, busy_with
from orchestrator.api.exchange import ALIVE_PATH
from orchestrator.reports.prometheus import Meter

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from orchestrator.api.access import Caller
    from orchestrator.api.callers import Callers

requested = logging.getLogger("onebasis.requests")

PAGE_PATH, FILES_PATH = "/", "/web/"
"""Where the web page is, and below which its files are: both are sent to everybody."""
LOOKUPS_AT_ONCE = 16
"""Tokens that are looked up at the same time: each is one read of the database."""
PROBLEM = "urn:onebasis:problem:"
"""What the types of errors begin with; their codes follow, as docs/trouble.md has them."""
REQUEST_ID = "X-Request-Id"
"""Header with the id of a request: who asks may choose it, the answer has it, and so have log lines and the audit
log."""


class AsciiJson(JSONResponse):
    """An answer all in ASCII: a file's name may hold what no UTF-8 can say (half of a character), as \\udc80."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Problem(AsciiJson):
    """An error in the form of RFC 9457: its type is that of the error's class, and beside the fields that all problems
    have it has those of our errors."""

    media_type = "application/problem+json"

    def __init__(self, request: Request, error: OnebasisError, status: int | None = None) -> None:
        code, request_id = status or error.http_status, request.state.request_id
        about = {"type": f"{PROBLEM}{error.row}", "title": error.title, "status": code, "detail": error.sentence}
        facts = {**about, **error.as_dict(), "request_id": request_id}
        super().__init__(facts, code, {**_headers(error), REQUEST_ID: request_id})


def _headers(error: OnebasisError) -> Mapping[str, str]:
    match error:
        case TooLarge():  # the rest of the body is not read, so this connection cannot be used again
            return {"connection": "close"}
        case UnknownToken():
            return {"www-authenticate": "Bearer"}
        case TooManyRequests():
            return {"retry-after": str(math.ceil(error.retry_seconds))}
    return {}


class Entrance:
    """See the module.

    Args:
        meter: Counts every answer but those that everybody gets.
        lookups: Threads in which tokens are looked up.
    """

    def __init__(self, app: ASGIApp, callers: Callers, meter: Meter, lookups: CapacityLimiter) -> None:
        self._app, self._callers, self._meter, self._lookups = app, callers, meter, lookups

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = request_id = _request_id(request)
        path: str = scope["path"]
        if path in (ALIVE_PATH, PAGE_PATH) or path.startswith(FILES_PATH):
            await self._app(scope, receive, send)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        secret = request.state.secret = given if scheme.lower() == "bearer" else ""
        try:
            request.state.caller = await self._caller(secret)
        except OnebasisError as error:
            await Problem(request, error)(scope, receive, send)
            return
        began, is_answered = time.perf_counter(), False

        async def counted(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                self._count(scope, message["status"], time.perf_counter() - began)
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with busy_with(request_id=request_id, traceparent=_traceparent(request)):
            try:
                await self._app(scope, receive, counted)
            except Exception:
                if not is_answered:  # the server's outermost layer answers it
                    self._count(scope, 500, time.perf_counter() - began)
                raise

    async def _caller(self, secret: str) -> Caller:
        if (owner := self._callers.of_owner(secret)) is not None:  # without a thread
            return owner
        return await to_thread.run_sync(self._callers.of, secret, limiter=self._lookups)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "name", "none")
        if scope["method"] == "POST":
            requested.info("%s: %d in %.3f s", route, status, seconds)
        self._meter.count(route, status, seconds)


def _request_id(request: Request) -> str:
    """What a request calls itself; or a new id, where that is nothing, or nothing that a log should have."""
    said: str = request.headers.get(REQUEST_ID, "")
    if re.fullmatch("[A-Za-z0-9._-]{1,64}", said):
        return said
    # It is no secret. To ask the system for random bytes lets go of the interpreter, which on a busy service comes back
    # a millisecond later.
    return f"{getrandbits(128):032x}"


def _traceparent(request: Request) -> str:
    """The trace that a request belongs to; empty where it names none, or not as W3C Trace Context has it."""
    said: str = request.headers.get("traceparent", "")
    return said if TRACEPARENT.fullmatch(said) else ""
