"""The control plane as a process: `python -m orchestrator.api.server STATE_DIR`. HTTP in front, the loop behind.

It can be killed at any moment: `onebasis up` starts it again, and what it needs to know is in the SQL database,
the version log and the workers themselves.
"""

from __future__ import annotations

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

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from configs.errors import InvalidInput, NotFound, OnebasisError, Unavailable
from configs.settings import Settings, read_settings
from orchestrator.api.requests import Export
from orchestrator.api.routes import ROUTES, Route, read_request
from orchestrator.api.service import Service
from orchestrator.ray_head import ADDRESS_FILE, TOKEN_FILE
from subspace_store import SubspaceReader
from subspace_store.commands.state_folder import SERVER_FILE, SETTINGS_FILE, open_private, service_identity

log = logging.getLogger("onebasis.server")

LOCK_FILE = "server.lock"
RAY_SECONDS = 180.0
RELEASE_SECONDS = 30.0
"""One record: a merge that is under way goes before it."""


BODY_BYTES_MAX = 16 * 2**20
"""Of a request. A task document is some kilobytes: rows come in files, not in bodies."""


def api(service: Service, token: str) -> FastAPI:
    """The HTTP API: every route of the table, behind the bearer token."""
    app = FastAPI(title="onebasis", description="One shared low-rank subspace for every team's tasks.")

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), token.encode()):
            todo = f"send the token that {SERVER_FILE} holds"
            facts = InvalidInput("missing or wrong token", "authorization", todo).as_dict()
            return JSONResponse(facts, status_code=401)
        return await call_next(request)

    @app.exception_handler(OnebasisError)
    def report(_: Request, error: OnebasisError) -> JSONResponse:
        return JSONResponse(error.as_dict(), status_code=error.http_status)

    @app.exception_handler(HTTPException)
    def no_route(request: Request, error: HTTPException) -> JSONResponse:
        what = f"there is no {request.method} {request.url.path}"
        told = NotFound(what, todo="/openapi.json lists what there is")
        return JSONResponse(told.as_dict(), status_code=error.status_code)

    @app.exception_handler(Exception)
    def confess(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        told = OnebasisError(f"internal error: {type(error).__name__}", todo="its log, control-plane.log, has the rest")
        return JSONResponse(told.as_dict(), status_code=told.http_status)

    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(service, route),
            methods=[route.verb],
            name=route.name,
            description=route.record.__doc__,
            response_class=Response if route.record is Export else JSONResponse,
            openapi_extra=_described(route),
        )
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _endpoint(service: Service, route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        names = [name for name, _ in request.query_params.multi_items()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidInput(f"given more than once: {', '.join(twice)}", route.name, "say it once")
        asked = read_request(route, request.path_params, dict(request.query_params), await _body(request))
        answer = await run_in_threadpool(service.answer, asked)
        if isinstance(answer, bytes):
            return Response(answer, media_type="application/zip")
        return JSONResponse(answer)

    return answer


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise InvalidInput(f"the body is longer than {BODY_BYTES_MAX} bytes", todo="put rows into files")
    return bytes(body)


def _described(route: Route) -> dict[str, Any]:
    """What OpenAPI says of a route's parameters and body: its record's own schema."""
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
        (422, "the input is wrong"),
        (500, "stored bytes are damaged, or an internal error"),
        (503, "something that is needed is away: wait, then ask again"),
    )
}


def main(state_dir: Path) -> None:
    """Run until SIGTERM. Phases of the start are written to the log, which `onebasis up` shows."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "alembic", "mlflow", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    settings = read_settings(state_dir / SETTINGS_FILE)
    lock = open_private(state_dir / LOCK_FILE, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Unavailable("another control plane runs on this state folder", str(state_dir)) from None
    ControlPlane(settings, state_dir).run()


class ControlPlane:
    """The parts of the process, in the order in which they start."""

    def __init__(self, settings: Settings, state_dir: Path) -> None:
        self._settings = settings
        self._state_dir = state_dir
        self._stop = threading.Event()
        self._started_at = time.time()

    def run(self) -> None:
        """Start everything, serve, and put everything down in the reverse order."""
        import uvicorn

        from orchestrator.cluster import RayCluster
        from orchestrator.controller import PREEMPT_SECONDS, Controller
        from orchestrator.reports.mlflow_mirror import Mirror
        from orchestrator.tasks.task_queue import TaskQueue
        from subspace_store import open_storage

        settings = self._settings
        log.info("opening the task database and the store")
        queue = TaskQueue(settings.database_url, settings.failures)
        storage = open_storage(settings.storage, settings.base_model.name)
        log.info("joining Ray, starting the store actor and %d workers", settings.workers.count)
        address, token_path = self._ray()
        service = service_identity(self._state_dir)
        cluster = RayCluster(settings, address, token_path, service)
        cluster.start()
        store = SubspaceReader.open(storage, settings=settings.subspace)
        mirror = Mirror(settings, queue, SubspaceReader.open(storage, settings=settings.subspace))
        controller = Controller(settings, queue, storage, store, cluster, service, changed=mirror.wake)
        answers = Service(settings, queue, storage, controller, cluster, lambda: self._health(controller, mirror))
        loop = threading.Thread(target=controller.run, args=(self._stop,), name="controller", daemon=True)
        reporter = threading.Thread(target=mirror.run, args=(self._stop,), name="mlflow", daemon=True)
        loop.start()
        reporter.start()
        listener = socket.create_server((settings.server.host, settings.server.port))
        token = secrets.token_hex(32)
        server = uvicorn.Server(uvicorn.Config(api(answers, token), log_level="warning", access_log=False))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._announce(listener, token)
        log.info("ready at %s:%d", *listener.getsockname()[:2])
        server.run(sockets=[listener])
        log.info("stopping")
        self._stop.set()
        loop.join(timeout=PREEMPT_SECONDS + 10)
        reporter.join(timeout=60)
        (self._state_dir / SERVER_FILE).unlink(missing_ok=True)
        try:
            cluster.release_store(RELEASE_SECONDS)
        except OnebasisError as error:
            log.warning("the store stays this service's: %s", error)
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
            "workers": controller.describe_workers(),
            "workers_ready": controller.ready_workers,
            "load_errors": {name: error.as_dict() for name, error in controller.load_errors.items()},
            "store_is_open": controller.store_is_open,
            "store_error": controller.store_error.as_dict() if controller.store_error else None,
            "alarm": controller.alarm,
            "mlflow_behind": mirror.behind,
            "mlflow_error": mirror.error,
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
