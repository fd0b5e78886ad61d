"""The control plane as a process: `python -m orchestrator.api.server STATE_DIR`. HTTP in front, the loop behind.

It can be killed at any moment: `onebasis up` starts it again, and what it needs to know is in the SQL database,
the version log and the workers themselves.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from configs.document import Request as Document
from configs.errors import InvalidInput, NotFound, OnebasisError, TooLarge, Unavailable
from configs.limits import BYTES_MAX, short, short_text
from configs.log_lines import busy_with, write_to
from configs.settings import TlsSettings, read_settings
from orchestrator.api import requests
from orchestrator.api.callers import Callers
from orchestrator.api.calls import OPENAPI_PATH
from orchestrator.api.entrance import FILES_PATH, LOOKUPS_AT_ONCE, PAGE_PATH, AsciiJson, Entrance, Problem
from orchestrator.api.exchange import ALIVE_PATH, EVENT_STREAM
from orchestrator.api.feed import Feed, Interest
from orchestrator.api.guard import Guard
from orchestrator.api.requests import Export, Metrics, ReadEvents, ServiceRequest, Submit
from orchestrator.api.routes import ROUTES, Route, read_request
from orchestrator.api.shapes import REF, problem_schema, schema_of
from orchestrator.reports import prometheus
from orchestrator.signs_of_life import CONTROL_PLANE, children, end_now, left_behind, title_of
from orchestrator.tasks.answer_book import HEADER
from orchestrator.tasks.uploads import PIECE_BYTES_MAX
from orchestrator.web.pages import INDEX, read_pages
from subspace_store.commands.state_folder import LOCK_FILE, SETTINGS_FILE, open_private

log = logging.getLogger("onebasis.server")
requested = logging.getLogger("onebasis.requests")

STOP_SECONDS = 10
"""Longest wait at the end for requests that are not answered yet."""


HEAD_SECONDS = 10.0
"""Longest wait for the head of a request: a connection that says nothing is closed, so that others find a place."""
BODY_SECONDS = 60.0
"""Longest wait for a body."""
SUBMISSIONS_AT_ONCE = 4
"""Submissions that are checked at the same time; others wait. Each is a process that reads files."""
WRITES_AT_ONCE = 16
"""Other requests that write, at the same time: each may wait for a merge. Those that read have threads of their own, so
that `status` answers whatever else is asked for."""
PIECES_AT_ONCE = 8
"""Pieces of files that are written at the same time: each waits for the disk."""
CHUNK_BYTES = 2**18
"""Bytes of a piece in memory: so much for each connection."""
READS_FOR_STREAMS = 4
"""Reads of the database for streams, at the same time."""
TAKE_SECONDS = 60.0
"""How long a client may take nothing of what is sent to it before it is cut off."""
KEY_MAX = 200
"""Characters of an idempotency key."""
CONNECTIONS_MAX = 500
"""Connections at the same time; more are answered with 503. Below the 1,024 files that a process may open."""


FOLDER_SECONDS = 1.0
"""Interval at which the control plane looks whether its state folder is there."""


def api(guard: Callable[[], Guard], callers: Callers) -> FastAPI:
    """The HTTP API: every route of the table, behind bearer tokens.

    Args:
        guard: What carries requests out, at the moment. Raises Unavailable where nothing does.
    """
    app = FastAPI(title="onebasis", description="One shared low-rank subspace for every team's tasks.")
    app.state.is_ending = lambda: False
    streams = CapacityLimiter(READS_FOR_STREAMS)
    feed = app.state.feed = Feed(
        guard, lambda work: to_thread.run_sync(work, limiter=streams), lambda: app.state.is_ending()
    )

    meter, lookups = prometheus.Meter(), CapacityLimiter(LOOKUPS_AT_ONCE)
    app.add_middleware(Entrance, callers=callers, meter=meter, lookups=lookups)

    @app.exception_handler(OnebasisError)
    def report(request: Request, error: OnebasisError) -> Problem:
        return Problem(request, error)

    @app.exception_handler(HTTPException)
    def no_route(request: Request, error: HTTPException) -> Problem:
        what = f"there is no {request.method} {short_text(request.url.path)}"
        told = NotFound(what, todo=f"{OPENAPI_PATH} lists what there is")
        return Problem(request, told, error.status_code)

    @app.exception_handler(Exception)
    def confess(request: Request, error: Exception) -> Problem:
        with busy_with(request_id=request.state.request_id):
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        todo = f"its log, control-plane.log, has the rest (request {request.state.request_id})"
        told = OnebasisError(f"internal error: {type(error).__name__}", todo=todo)
        return Problem(request, told)

    @app.get(ALIVE_PATH, include_in_schema=False)
    async def alive() -> AsciiJson:  # needs no token: who waits for an answer asks it, and so do load balancers
        return AsciiJson({"alive": True})

    pages = read_pages()

    @app.api_route(PAGE_PATH, methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route(f"{FILES_PATH}{{name:path}}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:  # the same for everybody: what it shows, it asks for with a token
        name = request.path_params.get("name", INDEX)
        if (file := pages.get(name)) is None:
            raise NotFound(f"the web page has no file {short_text(name)}", todo="it begins at /")
        said = request.headers
        sent = file.answer(said.get("accept-encoding", ""), said.get("if-none-match", ""))
        return Response(sent.content, sent.status, dict(sent.headers))

    submissions, writes = CapacityLimiter(SUBMISSIONS_AT_ONCE), CapacityLimiter(WRITES_AT_ONCE)
    pieces = CapacityLimiter(PIECES_AT_ONCE)

    async def still(request: Request) -> None:
        await to_thread.run_sync(partial(callers.of, request.state.secret, counts=False), limiter=lookups)

    for route in ROUTES:
        threads = submissions if route.record is Submit else writes if route.verb == "POST" else None
        endpoint = (
            _piece_endpoint(guard, route, pieces) if route.verb == "PUT" else _endpoint(guard, route, threads, meter)
        )
        app.add_api_route(
            route.url,
            _or_stream(guard, route, feed, still, endpoint) if route.record is ReadEvents else endpoint,
            methods=[route.verb],
            name=route.name,
            description=route.record.__doc__,
            response_class=Response if route.record in (Export, Metrics) else AsciiJson,
            openapi_extra=_described(route),
        )
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _endpoint(
    guard: Callable[[], Guard], route: Route, threads: CapacityLimiter | None, meter: prometheus.Meter
) -> Callable[[Request], Awaitable[Response]]:
    """The function that answers on a route. threads: Threads for its requests; None: those for requests that read."""

    async def answer(request: Request) -> Response:
        query, body = _query(request, route), await _body(request)

        def work() -> Response:  # reading and writing JSON too: it takes a second for the largest
            asked = read_request(route, request.path_params, query, body)
            answer = guard().answer(asked, request.state.caller, _key(request))
            if isinstance(answer, bytes):
                return Response(answer, media_type="application/zip")
            if isinstance(asked, Metrics):
                return Response(answer + meter.text(), media_type=prometheus.CONTENT_TYPE)
            return _unless_known(request, AsciiJson(answer, headers=_links(route, asked, answer)))

        return await to_thread.run_sync(work, limiter=threads)

    return answer


def _key(request: Request) -> str:
    """The key under which a request is carried out once; empty: none. Raises InvalidInput."""
    key = request.headers.get(HEADER, "")
    if len(key) > KEY_MAX or not (key.isascii() and key.isprintable()):
        raise InvalidInput(f"is longer than {KEY_MAX} characters, or has odd ones", HEADER, "send a random one")
    return key


def _links(route: Route, asked: Document, answer: Any) -> dict[str, str]:
    """Headers that say where an answer goes on."""
    following = asked.next_page(answer) if isinstance(asked, ServiceRequest) else None
    if following is None:
        return {}
    query = following.model_dump(mode="json", exclude_defaults=True)
    return {"link": f'<{route.url}?{urlencode(query)}>; rel="next"'}


def _unless_known(request: Request, answer: AsciiJson) -> Response:
    """An answer; or, to who has it already, that it has not changed. Only what was read has a tag."""
    if request.method != "GET":
        return answer
    tag = f'"{hashlib.sha256(answer.body).hexdigest()[:32]}"'
    answer.headers.update({"etag": tag, "cache-control": "private, no-cache", "vary": "Authorization, Accept"})
    known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
    if tag not in known and "*" not in known:
        return answer
    kept = {name: answer.headers[name] for name in ("etag", "cache-control", "vary", "link") if name in answer.headers}
    return Response(status_code=304, headers=kept)


def _piece_endpoint(
    guard: Callable[[], Guard], route: Route, threads: CapacityLimiter
) -> Callable[[Request], Awaitable[Response]]:
    """The function that takes pieces of files: who may not send one is refused before it is read, and it goes to the
    disk as it comes."""

    async def answer(request: Request) -> Response:
        query, caller = _query(request, route), request.state.caller

        def begin() -> Any:
            return guard().answer(read_request(route, request.path_params, query, b""), caller)

        chunks = _chunks(request, PIECE_BYTES_MAX)
        try:
            piece = await to_thread.run_sync(begin, limiter=threads)
        except OnebasisError:
            async for _ in chunks:  # a client that still sends would not read the refusal
                pass
            raise
        try:
            held = bytearray()
            async for chunk in chunks:
                held += chunk
                if len(held) >= CHUNK_BYTES:
                    await to_thread.run_sync(piece.write, bytes(held), limiter=threads)
                    held.clear()
            if held:
                await to_thread.run_sync(piece.write, bytes(held), limiter=threads)
            return AsciiJson(await to_thread.run_sync(piece.end, limiter=threads))
        finally:
            piece.close()

    return answer


def _or_stream(
    guard: Callable[[], Guard],
    route: Route,
    feed: Feed,
    still: Callable[[Request], Awaitable[None]],
    page: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """The function that answers with a page of events, or, for who accepts one, with a stream. still: Raises what keeps
    its caller from going on."""

    async def answer(request: Request) -> Response:
        if EVENT_STREAM not in request.headers.get("accept", ""):
            return await page(request)
        query, caller = _query(request, route), request.state.caller

        def begin() -> tuple[Interest, int | None]:
            asked = read_request(route, request.path_params, query, b"")
            assert isinstance(asked, ReadEvents)
            return guard().follow(asked, caller), _last_event(request, asked.after)

        interest, after = await to_thread.run_sync(begin)
        pieces = feed.stream(interest, after, caller.teams, partial(still, request))
        first = await anext(pieces)

        async def sent() -> AsyncIterator[bytes]:
            async with aclosing(pieces):
                yield first
                async for piece in pieces:
                    yield piece

        # No proxy is to wait until a piece is full.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(sent(), media_type=EVENT_STREAM, headers=headers)

    return answer


def _last_event(request: Request, after: int | None) -> int | None:
    """Number of the last event that whoever asks has: what a browser sends when it connects again counts more than what
    stands in the address. Raises InvalidInput."""
    last = request.headers.get("last-event-id", "")
    if not last:
        return after
    if not (last.isascii() and last.isdecimal() and len(last) <= 16):
        raise InvalidInput("is no number of an event", "Last-Event-ID", "send the id of the last event that came")
    return int(last)


def _query(request: Request, route: Route) -> dict[str, str]:
    """What stands behind the question mark. Raises InvalidInput where a name stands twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput(f"given more than once: {', '.join(map(short, twice))}", route.name, "say it once")
    return dict(request.query_params)


async def _body(request: Request) -> bytes:
    """The body, if it comes soon and is not too long."""
    body = bytearray()
    async for chunk in _chunks(request, BYTES_MAX):
        body += chunk
    return bytes(body)


async def _chunks(request: Request, bytes_max: int) -> AsyncIterator[bytes]:
    """The body as it comes, if it comes soon and is not too long; one whose header says that it is too long is not
    read."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 15 or int(said) > bytes_max):
        raise _too_large(bytes_max)
    until, size = time.monotonic() + BODY_SECONDS, 0
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(until - time.monotonic()):
                chunk = await anext(stream, None)
        except TimeoutError:
            what = f"the body did not come within {BODY_SECONDS:.0f} s"
            raise Unavailable(what, todo="send it at once, or less of it") from None
        except ClientDisconnect:
            raise Unavailable("the connection was closed before the body had come") from None
        if chunk is None:
            return
        if (size := size + len(chunk)) > bytes_max:
            raise _too_large(bytes_max)
        yield chunk


def _too_large(bytes_max: int) -> TooLarge:
    return TooLarge(f"the body has more than {bytes_max:,} bytes", "", "put rows into files", bytes_max)


class _Protocol(H11Protocol):
    """uvicorn's protocol, with limits for the wait for a request's head, and for a client that takes nothing of what is
    sent; uvicorn's own waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._pauses = 0
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.loop.call_later(TAKE_SECONDS, self._close_untaken, self._pauses)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._pauses += 1

    def _close_untaken(self, pauses: int) -> None:
        """pauses: Number of pauses before the one that began then."""
        if self._pauses == pauses and not self.transport.is_closing():
            log.info("a client took nothing of what was sent for %.0f s, and is cut off", TAKE_SECONDS)
            self.transport.abort()

    def _await_head(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_without_head, self.cycle)

    def _close_without_head(self, last: object) -> None:
        """last: The request that was the connection's last when the wait began; None: it had none."""
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def http_server(app: FastAPI, tls: TlsSettings | None = None) -> Any:
    """uvicorn around the API, with limits for connections that are slow or many."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=STOP_SECONDS,
        ssl_certfile=tls.cert_file if tls else None,
        ssl_keyfile=tls.key_file if tls else None,
    )
    server = uvicorn.Server(config)
    app.state.is_ending = lambda: server.should_exit
    return server


def _described(route: Route) -> dict[str, Any]:
    """OpenAPI's description of a route's parameters and body: its record's own schema."""
    schema = route.record.model_json_schema(ref_template=REF)
    fields, required = schema.get("properties", {}), schema.get("required", [])
    placed = [{"name": name, "in": "path", "required": True, "schema": fields[name]} for name in route.in_path]
    rest = {name: field for name, field in fields.items() if name not in route.in_path}
    facts: dict[str, Any] = {"x-role": str(route.role), "parameters": placed, "responses": _answers(route)}
    headers: dict[str, Any] = {}
    if route.takes_key:
        headers[HEADER] = {"type": "string", "minLength": 1, "maxLength": KEY_MAX, "pattern": "^[!-~]+$"}
    if _has_tag(route):
        headers["If-None-Match"] = {"type": "string", "pattern": '^"[0-9a-f]{32}"$'}
    if route.record is ReadEvents:
        headers["Last-Event-ID"] = {"type": "string", "pattern": "^[0-9]{1,16}$"}
    facts["parameters"] += [
        {"name": name, "in": "header", "required": False, "schema": schema} for name, schema in headers.items()
    ]
    if route.verb != "POST":
        facts["parameters"] += [
            {"name": name, "in": "query", "required": name in required, "schema": field} for name, field in rest.items()
        ]
        raw = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        return facts | ({"requestBody": {"required": True, "content": raw}} if route.verb == "PUT" else {})
    needed = [name for name in required if name in rest]
    body = {"type": "object", "properties": rest, "additionalProperties": False, "required": needed}
    return facts | {"requestBody": {"required": bool(needed), "content": {"application/json": {"schema": body}}}}


def _answers(route: Route) -> dict[str, Any]:
    """OpenAPI's description of what a route answers, refusals apart."""
    done: dict[str, Any] = {"description": "done"}
    match route.record:
        case requests.Export:
            return {"200": done | {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}}
        case requests.Metrics:
            return {"200": done | {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    content: dict[str, Any] = {"application/json": {"schema": schema_of(route.record)[0]}}
    if route.record is ReadEvents:
        content[EVENT_STREAM] = {"schema": {"type": "string"}}
    if not _has_tag(route):
        return {"200": done | {"content": content}}
    known = {"304": {"description": "the answer is that of the ETag in If-None-Match"}}
    text = {"schema": {"type": "string"}}
    headers = {"ETag": text} | ({"Link": text} if _has_pages(route) else {})
    return {"200": done | {"content": content, "headers": headers}, **known}


def _has_tag(route: Route) -> bool:
    """Whether its answers have an `ETag`: what is read as JSON."""
    return route.verb == "GET" and route.record not in (requests.Export, requests.Metrics)


def _has_pages(route: Route) -> bool:
    """Whether its answers may say where the next page is."""
    return getattr(route.record, "next_page", None) is not ServiceRequest.next_page


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for route in ROUTES:
            schemas |= route.record.model_json_schema(ref_template=REF).get("$defs", {})
            if route.record not in (requests.Export, requests.Metrics):
                schemas |= schema_of(route.record)[1]
        schemas["Problem"] = problem_schema()
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"] |= _REFUSALS
        app.openapi_schema = made
    return app.openapi_schema


_PROBLEM = {"$ref": REF.format(model="Problem")}
_REFUSALS = {
    str(status): {
        "description": words,
        "content": {Problem.media_type: {"schema": {"$ref": REF.format(model="Problem")}}},
    }
    for status, words in (
        (401, "missing or wrong token"),
        (403, "the role of who asks is too low"),
        (404, "there is no such thing"),
        (409, "somebody moved first, or a rule of the service forbids it"),
        (413, "the body is too long"),
        (422, "the input is wrong"),
        (429, "this token asks too often: wait as long as Retry-After says"),
        (500, "stored bytes are damaged, or an internal error"),
        (503, "something that is needed is away: wait, then ask again"),
    )
}


def main(state_dir: Path) -> None:
    """Run until SIGTERM. Phases of the start are written to the log, which `onebasis up` shows."""
    settings = read_settings(state_dir / SETTINGS_FILE)
    write_to(sys.stderr, settings.log_format)
    for noisy in ("httpx", "alembic", "mlflow", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    lock = open_private(state_dir / LOCK_FILE, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Unavailable("another control plane runs on this state folder", str(state_dir)) from None
    threading.Thread(target=_end_with_its_folder, args=(state_dir, lock.fileno()), name="folder", daemon=True).start()
    from orchestrator.api.control_plane import ControlPlane

    ControlPlane(settings, state_dir).run()


def _end_with_its_folder(state_dir: Path, lock: int) -> None:
    """End this process and what it started when its state folder is deleted, or another one is at its path.

    Without its database and its files nothing can be done in order, and a command could not find these processes; a
    control plane may be killed at any moment. lock: The file that this process holds there.
    """
    while _is_there(state_dir / LOCK_FILE, lock):
        time.sleep(FOLDER_SECONDS)
    log.error("the state folder %s was deleted, or another one is there: ending with all that was started", state_dir)
    end_now([*(process for process in left_behind(state_dir) if title_of(process) != CONTROL_PLANE), *children()], 2.0)
    os._exit(1)


def _is_there(file: Path, handle: int) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a disk that does not answer is not a folder that is gone
        return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
