"""The service from outside: over HTTP when it runs, in this process when it does not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import quote

from configs.errors import InvalidInput, NoSignOfLife, OnebasisError, TooLarge, Unavailable, error_from_dict
from configs.limits import BYTES_MAX
from orchestrator.api.requests import Answer, ChangeMany, Json, Retry, SendPiece, ServiceRequest, Submit, not_running
from orchestrator.api.routes import route_of
from subspace_store.commands.state_folder import SERVER_FILE, SETTINGS_FILE, never_ran
from subspace_store.requests import StoreRequest

if TYPE_CHECKING:
    import ssl

    from orchestrator.api.exchange import Reply
    from orchestrator.api.service import Service


@dataclass(frozen=True)
class Remote:
    """A service on another machine, and a token for it."""

    url: str
    token: str
    ca_file: str = ""
    """Certificates of the authorities that are trusted, in PEM; empty: those of this machine."""
    name: str = ""
    """Name of its context, for people."""


REMOTE: ContextVar[Remote | None] = ContextVar("remote", default=None)
"""Service that commands ask instead of the one in their folder."""

TIMEOUT_SECONDS = 150.0
SUBMIT_TIMEOUT_SECONDS = 7200.0
"""Longest wait for a submission: a gigabyte of rows takes minutes to check."""


class Client:
    """Asks a service: the running one, or one in this process for requests that need no running service."""

    def __init__(self, state_dir: Path, say: Callable[[str], None] | None = None) -> None:
        """say: Takes a line for people while an answer takes long; default: the terminal's stderr."""
        self._state_dir = state_dir
        self._say = say or _note
        self._service: Service | None = None

    @overload
    def ask(self, request: ServiceRequest[Answer]) -> Answer: ...
    @overload
    def ask(self, request: StoreRequest[Any]) -> Json: ...
    def ask(self, request: ServiceRequest[Any] | StoreRequest[Any]) -> Any:
        """Ask, and wait for the answer.

        A request to the store gets a key if it has none.

        Raises:
            OnebasisError: What the service raised, as itself; Unavailable when it went away meanwhile, NoSignOfLife
                when its process is there and answers nothing.
            OutcomeUnknown: It is not known whether a request to the store was done; has the request's key.
        """
        return self._ask(request)

    def send(self, piece: SendPiece, content: bytes) -> Json:
        """Send a piece of a file, as what `Piece.end` answers; raises as `ask`."""
        answer: Json = self._ask(piece, content)
        return answer

    def _ask(self, request: ServiceRequest[Any] | StoreRequest[Any], content: bytes = b"") -> Any:
        request = request.named() if isinstance(request, StoreRequest) else request
        if (remote := REMOTE.get()) is not None:
            return self._ask_remote(remote, request, content)
        if (server := server_facts(self._state_dir)) is not None:
            from orchestrator.api.exchange import HungUpError, NobodyListensError

            try:
                return self._ask_server(server, request, content)
            except NobodyListensError:
                pass  # it was killed and left its address behind: read without it
            except HungUpError:
                if route_of(request).verb != "GET":
                    raise
                # It ended while it was asked, which is the same for who only reads; perhaps another has started since.
                if (server := server_facts(self._state_dir)) is not None:
                    with contextlib.suppress(NobodyListensError, HungUpError):
                        return self._ask_server(server, request, content)
        if isinstance(request, ServiceRequest) and request.needs_service:
            _check_ran(self._state_dir)
            raise not_running(route_of(request).name)  # before anything is read: the store may be away
        from orchestrator.api.access import owner
        from orchestrator.api.guard import Guard
        from subspace_store.commands.terminal import me, telling

        does = request.does if isinstance(request, ServiceRequest) else ServiceRequest.does
        with telling(f"{does}, without a service", self._say):
            # The service knows what it has written, and what may have been.
            return Guard(self._local()).answer(request, owner(me()))

    def _ask_remote(self, remote: Remote, request: ServiceRequest[Any] | StoreRequest[Any], content: bytes) -> Any:
        """Ask a service of another machine: nothing is done here if it is away."""
        from orchestrator.api.exchange import NobodyListensError, NotTakenError
        from orchestrator.api.waiting import Waiting

        server = {"url": remote.url, "token": remote.token, "ca_file": remote.ca_file}
        away = Unavailable("nobody answers there", remote.url, "check the address, the network and the service")
        try:
            with _told_with_its_key(request):
                return _over_http(server, request, Waiting(server, self._say), content)
        except (NobodyListensError, NotTakenError):
            raise away from None
        except NoSignOfLife as error:
            raise NoSignOfLife(error.what, remote.url, "tell those who run the service") from None

    def ask_here(self, request: ServiceRequest[Answer]) -> Answer:
        """Carry out in this process what only reads, whether a service runs or not."""
        return self._local().answer(request)  # type: ignore[no-any-return]

    def _ask_server(
        self, server: dict[str, Any], request: ServiceRequest[Any] | StoreRequest[Any], content: bytes
    ) -> Any:
        from orchestrator.api.exchange import NotTakenError
        from orchestrator.api.waiting import Waiting, named, not_asked

        try:
            with _told_with_its_key(request):
                try:
                    return _over_http(server, request, Waiting(server, self._say), content)
                except NoSignOfLife as error:
                    raise named(error, self._state_dir) from error
        except NotTakenError as error:
            raise not_asked(error.told, self._state_dir) from error

    def _local(self) -> Service:
        if self._service is None:
            from orchestrator.api.service import Service
            from subspace_store.commands.state_folder import service_settings
            from subspace_store.storage.opening import open_storage

            _check_ran(self._state_dir)
            settings = service_settings(self._state_dir)
            storages = {name: open_storage(settings.storage, name) for name in settings.base_names}
            self._service = Service(settings, None, storages)
        return self._service


def _check_ran(state_dir: Path) -> None:
    """Refuse a folder where no service has run; of a service whose folder was deleted, tell what is left."""
    if (state_dir / SETTINGS_FILE).exists():
        return
    from orchestrator.signs_of_life import left_behind, title_of

    if left := left_behind(state_dir):
        named = ", ".join(f"{title_of(process)} (pid {process.pid})" for process in left)
        what = f"the state folder was deleted while its service ran; still there: {named}"
        raise Unavailable(what, str(state_dir.resolve()), "`onebasis down` ends them")
    raise never_ran(state_dir)


def _told_with_its_key(request: ServiceRequest[Any] | StoreRequest[Any]) -> contextlib.AbstractContextManager[None]:
    return request.told_with_its_key() if isinstance(request, StoreRequest) else contextlib.nullcontext()


def server_facts(state_dir: Path) -> dict[str, Any] | None:
    """Address, token and process id of the running control plane; None when none announced itself."""
    try:
        facts = json.loads((state_dir / SERVER_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and {"url", "token"} <= facts.keys() else None


def trust_of(server: dict[str, Any]) -> ssl.SSLContext | None:
    """What certificate a server has to show; None: it speaks no TLS."""
    if not server["url"].startswith("https:"):
        return None
    import ssl

    if own := server.get("cert_file"):
        from orchestrator.api.exchange import trusting

        return trusting(Path(own).read_text())
    try:
        return ssl.create_default_context(cafile=server.get("ca_file") or None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"holds no certificates: {error}", server["ca_file"], "name a file in PEM") from error


def _note(line: str) -> None:
    from subspace_store.commands.terminal import note

    note(line)


def _over_http(
    server: dict[str, Any],
    request: ServiceRequest[Any] | StoreRequest[Any],
    waiting: Callable[[float], None],
    sent: bytes,
) -> Any:
    """sent: Body of a PUT."""
    route = route_of(request)
    fields = {name: value for name, value in request.model_dump(mode="json").items() if value is not None}
    in_path = {name: str(fields.pop(name)) for name in route.in_path}
    # Dots too: `..` in a reference would be taken for a way to another route.
    url = re.sub(r"{(\w+)(?::path)?}", lambda found: quote(in_path[found[1]]).replace(".", "%2E"), route.path)
    from orchestrator.api.exchange import exchange

    content = {"POST": json.dumps(fields).encode(), "PUT": sent}.get(route.verb)
    # A server may hang up before its refusal is read.
    if route.verb == "POST" and content is not None and len(content) > BYTES_MAX:
        raise TooLarge(f"the request has more than {BYTES_MAX:,} bytes", "", "put rows into files", BYTES_MAX)
    answer = exchange(
        server["url"] + url,
        route.verb,
        query=None if route.verb == "POST" else fields,
        body=content,
        content_type="application/octet-stream" if route.verb == "PUT" else "application/json",
        token=server["token"],
        timeout_seconds=SUBMIT_TIMEOUT_SECONDS if isinstance(request, (Submit, Retry, ChangeMany)) else TIMEOUT_SECONDS,
        waiting=waiting,
        trust=trust_of(server),
    )
    if answer.is_success:
        return answer.content if answer.content_type == "application/zip" else json.loads(answer.content)
    raise _error(answer, server["url"] + url)


def _error(answer: Reply, url: str) -> OnebasisError:
    try:
        facts = json.loads(answer.content)
    except ValueError:
        facts = {}
    if "what" in facts:
        return error_from_dict(facts)
    return OnebasisError(f"HTTP {answer.status} from the service", url, "see its log")
