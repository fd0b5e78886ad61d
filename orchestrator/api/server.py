"""The control plane as a process: `python -m orchestrator.api.server STATE_DIR`. HTTP in front, the loop behind.

It can be killed at any moment: `onebasis up` starts it again, and what it needs to know is in the SQL database,
the version log and the workers themselves.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from configs.errors import InvalidInput, NotFound, OnebasisError, TooLarge, Unavailable
from configs.limits import BYTES_MAX, short, short_text
from configs.plain_text import escaped
from configs.settings import Settings, read_settings
from orchestrator.api.exchange import ALIVE_PATH
from orchestrator.api.requests import Export, Submit
from orchestrator.api.routes import ROUTES, Route, read_request
from orchestrator.api.service import Service
from orchestrator.ray_head import ADDRESS_FILE, TOKEN_FILE
from orchestrator.signs_of_life import CONTROL_PLANE, children, end_now, left_behind, ray_trouble, title_of
from subspace_store import SubspaceReader
from subspace_store.commands.state_folder import LOCK_FILE, SERVER_FILE, SETTINGS_FILE, open_private, service_identity

log = logging.getLogger("onebasis.server")

RAY_SECONDS = 180.0
STOP_SECONDS = 10
"""Longest wait at the end for requests that are not answered yet."""
RELEASE_SECONDS = 30.0
"""Longest wait for the writer to give the store up: one record, after a merge that is under way."""


LOOK_EVERY_SECONDS = 3.0
"""Pause between two looks at the store and the database, three small reads: with the looks themselves, people are told
within ten seconds."""
HEAD_SECONDS = 10.0
"""Longest wait for the head of a request: a connection that says nothing is closed, so that others find a place."""
BODY_SECONDS = 60.0
"""Longest wait for a body."""
SUBMISSIONS_AT_ONCE = 4
"""Submissions that are checked at the same time; others wait. Each is a process that reads files."""
WRITES_AT_ONCE = 16
"""Other requests that write, at the same time: each may wait for a merge. Those that read have threads of their own, so
that `status` answers whatever else is asked for."""
CONNECTIONS_MAX = 500
"""Connections at the same time; more are answered with 503. Below the 1,024 files that a process may open."""


FOLDER_SECONDS = 1.0
"""Interval at which the control plane looks whether its state folder is there."""


class AsciiJson(JSONResponse):
    """An answer all in ASCII: a file's name may hold what no UTF-8 can say (half of a character), as \\udc80."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def api(service: Service, token: str) -> FastAPI:
    """The HTTP API: every route of the table, behind the bearer token."""
    app = FastAPI(title="onebasis", description="One shared low-rank subspace for every team's tasks.")

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else ""
        if not secrets.compare_digest(given.encode(), token.encode()):
            todo = f"send the token that {SERVER_FILE} holds"
            facts = InvalidInput("missing or wrong token", "authorization", todo).as_dict()
            return AsciiJson(facts, status_code=401)
        return await call_next(request)

    @app.exception_handler(OnebasisError)
    def report(_: Request, error: OnebasisError) -> AsciiJson:
        # The rest of a body that is too long is not read, so this connection cannot be used again.
        headers = {"connection": "close"} if isinstance(error, TooLarge) else None
        return AsciiJson(error.as_dict(), error.http_status, headers)

    @app.exception_handler(HTTPException)
    def no_route(request: Request, error: HTTPException) -> AsciiJson:
        what = f"there is no {request.method} {short_text(request.url.path)}"
        told = NotFound(what, todo="/openapi.json lists what there is")
        return AsciiJson(told.as_dict(), status_code=error.status_code)

    @app.exception_handler(Exception)
    def confess(request: Request, error: Exception) -> AsciiJson:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        told = OnebasisError(f"internal error: {type(error).__name__}", todo="its log, control-plane.log, has the rest")
        return AsciiJson(told.as_dict(), status_code=told.http_status)

    @app.get(ALIVE_PATH, include_in_schema=False)
    async def alive() -> AsciiJson:
        return AsciiJson({"pid": os.getpid()})

    submissions, writes = CapacityLimiter(SUBMISSIONS_AT_ONCE), CapacityLimiter(WRITES_AT_ONCE)
    for route in ROUTES:
        threads = submissions if route.record is Submit else writes if route.verb == "POST" else None
        app.add_api_route(
            route.path,
            _endpoint(service, route, threads),
            methods=[route.verb],
            name=route.name,
            description=route.record.__doc__,
            response_class=Response if route.record is Export else AsciiJson,
            openapi_extra=_described(route),
        )
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _endpoint(
    service: Service, route: Route, threads: CapacityLimiter | None
) -> Callable[[Request], Awaitable[Response]]:
    """The function that answers on a route. threads: Threads for its requests; None: those for requests that read."""

    async def answer(request: Request) -> Response:
        names = [name for name, _ in request.query_params.multi_items()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidInput(f"given more than once: {', '.join(map(short, twice))}", route.name, "say it once")
        query, body = dict(request.query_params), await _body(request)

        def work() -> Response:  # reading and writing JSON too: it takes a second for the largest
            asked = read_request(route, request.path_params, query, body)
            answer = service.answer(asked)
            if isinstance(answer, bytes):
                return Response(answer, media_type="application/zip")
            return AsciiJson(answer)

        return await to_thread.run_sync(work, limiter=threads)

    return answer


async def _body(request: Request) -> bytes:
    """The body, if it comes soon and is not too long; one whose header says that it is too long is not read."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 15 or int(said) > BYTES_MAX):
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BYTES_MAX:
                    raise _too_large()
    except TimeoutError:
        raise Unavailable(f"the body did not come within {BODY_SECONDS:.0f} s", todo="send it at once") from None
    except ClientDisconnect:
        raise Unavailable("the connection was closed before the body had come") from None
    return bytes(body)


def _too_large() -> TooLarge:
    return TooLarge(f"the body has more than {BYTES_MAX:,} bytes", "", "put rows into files", BYTES_MAX)


class _Protocol(H11Protocol):
    """uvicorn's protocol, with a limit for the wait for a request's head; uvicorn's own waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_without_head, self.cycle)

    def _close_without_head(self, last: object) -> None:
        """last: The request that was the connection's last when the wait began; None: it had none."""
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def http_server(app: FastAPI) -> Any:
    """uvicorn around the API, with limits for connections that are slow or many."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS_MAX,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def _described(route: Route) -> dict[str, Any]:
    """OpenAPI's description of a route's parameters and body: its record's own schema."""
    schema = route.record.model_json_schema(ref_template="#/components/schemas/{model}")
    fields, required = schema.get("properties", {}), schema.get("required", [])
    placed = [{"name": name, "in": "path", "required": True, "schema": fields[name]} for name in route.in_path]
    rest = {name: field for name, field in fields.items() if name not in route.in_path}
    facts: dict[str, Any] = {"x-role": str(route.role), "parameters": placed}
    if route.verb == "GET":
        facts["parameters"] += [
            {"name": name, "in": "query", "required": name in required, "schema": field} for name, field in rest.items()
        ]
        return facts
    needed = [name for name in required if name in rest]
    body = {"type": "object", "properties": rest, "additionalProperties": False, "required": needed}
    return facts | {"requestBody": {"required": bool(needed), "content": {"application/json": {"schema": body}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for route in ROUTES:
            whole = route.record.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= whole.get("$defs", {})
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"] |= _REFUSALS
        app.openapi_schema = made
    return app.openapi_schema


_REFUSALS = {
    str(status): {"description": words}
    for status, words in (
        (401, "missing or wrong token"),
        (404, "there is no such thing"),
        (409, "somebody moved first, or a rule of the service forbids it"),
        (413, "the body is too long"),
        (422, "the input is wrong"),
        (500, "stored bytes are damaged, or an internal error"),
        (503, "something that is needed is away: wait, then ask again"),
    )
}


class _PlainFormatter(logging.Formatter):
    """Log lines that are safe to show on a terminal, whatever text a worker or a library wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def main(state_dir: Path) -> None:
    """Run until SIGTERM. Phases of the start are written to the log, which `onebasis up` shows."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "alembic", "mlflow", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    settings = read_settings(state_dir / SETTINGS_FILE)
    lock = open_private(state_dir / LOCK_FILE, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Unavailable("another control plane runs on this state folder", str(state_dir)) from None
    threading.Thread(target=_end_with_its_folder, args=(state_dir, lock.fileno()), name="folder", daemon=True).start()
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


class ControlPlane:
    """The parts of the process, in the order in which they start."""

    def __init__(self, settings: Settings, state_dir: Path) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._stop = threading.Event()
        self._started_at = time.time()

    def run(self) -> None:
        """Start everything, serve, and stop everything in the reverse order."""
        from orchestrator.cluster import RayCluster
        from orchestrator.controller import PREEMPT_SECONDS, Controller
        from orchestrator.reports.mlflow_mirror import Mirror
        from orchestrator.tasks.checking import Checker
        from orchestrator.tasks.task_queue import TaskQueue
        from orchestrator.watch import Pulse, Watch
        from subspace_store import open_storage

        settings = self._settings
        log.info("opening the task database and the store")
        queue = TaskQueue(settings.database_url, settings.failures)
        storages = {name: open_storage(settings.storage, name) for name in settings.base_names}
        log.info("joining Ray, starting the writers of %s", ", ".join(settings.base_names))
        address, token_path = self._ray()
        service = service_identity(self._state_dir)
        cluster = RayCluster(settings, address, token_path, service)
        cluster.start()
        stores = {name: SubspaceReader.open(place, settings=settings.subspace) for name, place in storages.items()}
        mirror = Mirror(settings, queue)
        controller = Controller(settings, queue, stores, cluster, service, changed=mirror.wake)
        mirror.follow(lambda: answers.settings)
        checker = Checker()
        answers = Service(
            settings, queue, storages, controller, cluster, lambda: self._health(controller, mirror), checker.check
        )
        loop = threading.Thread(target=controller.run, args=(self._stop,), name="controller", daemon=True)
        is_local = settings.ray.address == "local"
        gcs = Pulse(cluster.probe)
        trouble = partial(ray_trouble, self._state_dir) if is_local else str
        watch = Watch(controller.alarms, controller, mirror, trouble, gcs)
        store_and_database = Pulse(answers.look, LOOK_EVERY_SECONDS)
        for name, run in (("watch", watch.run), ("gcs", gcs.run), ("look", store_and_database.run)):
            threading.Thread(target=run, args=(self._stop,), name=name, daemon=True).start()
        reporter = threading.Thread(target=mirror.run, args=(self._stop,), name="mlflow", daemon=True)
        loop.start()
        reporter.start()
        listener = socket.create_server((settings.server.host, settings.server.port))
        token = secrets.token_hex(32)
        server = http_server(api(answers, token))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.install_signal_handlers = lambda: None
        self._announce(listener, token)
        log.info("ready at %s:%d", *listener.getsockname()[:2])
        checker.start()
        server.run(sockets=[listener])
        log.info("stopping")
        checker.close()
        self._stop.set()
        loop.join(timeout=PREEMPT_SECONDS + 10)
        reporter.join(timeout=60)
        (self._state_dir / SERVER_FILE).unlink(missing_ok=True)
        try:
            cluster.release_stores(RELEASE_SECONDS)
        except OnebasisError as error:
            log.warning("a store stays this service's: %s", error)
        cluster.stop(actors=settings.ray.address != "local")
        queue.close()
        log.info("stopped")

    def _ray(self) -> tuple[str, Path]:
        ray = self._settings.ray
        if ray.address != "local":
            token_path = Path(ray.auth_token_path or "")
            if not token_path.is_file():  # a new one would be made there, and the cluster would not know it
                raise InvalidInput(
                    f"{ray.auth_token_path!r} is no file, and the cluster at {ray.address} wants its token",
                    "ray.auth_token_path",
                    "copy the token file of the cluster's head there (RAY_AUTH_TOKEN_PATH)",
                )
            return ray.address, token_path
        file, until = self._state_dir / ADDRESS_FILE, time.monotonic() + RAY_SECONDS
        while not file.exists():
            if time.monotonic() > until:
                raise Unavailable("the local Ray did not start", str(self._state_dir / "logs/ray.log"))
            time.sleep(0.05)
        return json.loads(file.read_text())["address"], self._state_dir / TOKEN_FILE

    def _announce(self, listener: socket.socket, token: str) -> None:
        host, port = listener.getsockname()[:2]
        facts = {"url": f"http://{host}:{port}", "token": token, "pid": os.getpid()}
        new = self._state_dir / f"{SERVER_FILE}.new"
        with open_private(new, "w") as file:
            json.dump(facts, file)
        new.rename(self._state_dir / SERVER_FILE)

    def _health(self, controller: Any, mirror: Any) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "up_seconds": time.time() - self._started_at,
            "loop_seconds_ago": time.time() - controller.healthy_at,
            "heard_seconds_ago": time.time() - controller.heard_at,
            "workers": controller.describe_workers(),
            "workers_ready": controller.ready_workers,
            "load_errors": {name: error.as_dict() for name, error in controller.load_errors.items()},
            "store_is_open": controller.stores_are_open,
            "store_error": controller.store_error.as_dict() if controller.store_error else None,
            "mlflow_behind": mirror.behind,
            "mlflow_error": mirror.error,
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
