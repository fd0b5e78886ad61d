"""The service from outside: over HTTP when it runs, in this process when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from configs.errors import InvalidInput, NoSignOfLife, Unavailable
from orchestrator.api.calls import Call, Following, Heard, Hearing, Reply, answer_of, call_of
from orchestrator.api.requests import Answer, Json, ReadEvents, SendPiece, ServiceRequest, not_running
from orchestrator.api.routes import route_of
from subspace_store.commands.state_folder import SERVER_FILE, SETTINGS_FILE, never_ran
from subspace_store.requests import StoreRequest

if TYPE_CHECKING:
    import ssl

    import httpx

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

    def as_server(self) -> dict[str, Any]:
        """The same as `server_facts`."""
        return {"url": self.url, "token": self.token, "ca_file": self.ca_file}


REMOTE: ContextVar[Remote | None] = ContextVar("remote", default=None)
"""Service that commands ask instead of the one in their folder."""

AGAIN_SECONDS = 0.5
"""Pause before a stream that ended is asked for again, or, without a service, the database."""


class Client:
    """Asks a service: the running one, or one in this process for requests that need no running service."""

    def __init__(self, state_dir: Path, say: Callable[[str], None] | None = None, remote: Remote | None = None) -> None:
        """
        Args:
            say: Takes a line for people while an answer takes long; default: the terminal's stderr.
            remote: Service that is asked instead of the one of the state folder; default: REMOTE.
        """
        self._state_dir = state_dir
        self._say = say or _note
        self._given = remote
        self._service: Service | None = None

    @classmethod
    def at(cls, url: str, token: str, ca_file: str = "") -> Client:
        """A client of the service at an address. ca_file: As `Remote.ca_file`."""
        return cls(Path(), remote=Remote(url.rstrip("/"), token, ca_file))

    @property
    def _remote(self) -> Remote | None:
        return self._given or REMOTE.get()

    @overload
    def ask(self, request: ServiceRequest[Answer], key: str = "") -> Answer: ...
    @overload
    def ask(self, request: StoreRequest[Any], key: str = "") -> Json: ...
    def ask(self, request: ServiceRequest[Any] | StoreRequest[Any], key: str = "") -> Any:
        """Ask, and wait for the answer.

        A request to the store gets a key of the store if it has none.

        Args:
            key: Key under which a service that runs carries the request out once, within a day; empty: none.

        Raises:
            OnebasisError: What the service raised, as itself; Unavailable when it went away meanwhile, NoSignOfLife
                when its process is there and answers nothing.
            OutcomeUnknown: It is not known whether a request to the store was done; has the request's key.
        """
        return self._ask(request, key=key)

    def pages(self, request: ServiceRequest[list[Json]]) -> Iterator[Json]:
        """All rows of a list, page by page; raises as `ask`."""
        following: ServiceRequest[list[Json]] | None = request
        while following is not None:
            rows = self.ask(following)
            yield from rows
            following = following.next_page(rows)

    def send(self, piece: SendPiece, content: bytes) -> Json:
        """Send a piece of a file, as what `Piece.end` answers; raises as `ask`."""
        answer: Json = self._ask(piece, content)
        return answer

    def follow(self, request: ReadEvents) -> Iterator[Json | None]:
        """Events as they come, without an end, each once: whenever the connection ends, it goes on behind the last
        one. While no service runs here, those that are in the database.

        Returns:
            Events; and None at the beginning, and whenever nothing has happened for a few seconds: whoever follows may
            look at something else.

        Raises:
            OnebasisError: As `ask`.
        """
        from orchestrator.api.exchange import NobodyListensError, NotTakenError

        following = Following(request)
        while True:
            try:
                for heard in self._hear(following.request):
                    yield following.take(heard)
            except (Unavailable, NobodyListensError, NotTakenError):
                # Whether it ended, stands still, or is another one by now, is found out by asking.
                asked = following.request
                for event in self.ask(asked) if asked.after is not None else ():
                    yield following.took(event)
            yield None
            time.sleep(AGAIN_SECONDS)

    def _hear(self, request: ReadEvents) -> Iterator[Heard]:
        from orchestrator.api.exchange import NobodyListensError, RefusedError, listen

        remote = self._remote
        server = remote.as_server() if remote is not None else server_facts(self._state_dir)
        if server is None:
            raise NobodyListensError
        call = call_of(request)
        try:
            yield from listen(
                server["url"] + call.path, query=call.query, token=server["token"], trust=trust_of(server)
            )
        except RefusedError as error:
            answer_of(error.reply, server["url"] + call.path)

    def _ask(self, request: ServiceRequest[Any] | StoreRequest[Any], content: bytes = b"", key: str = "") -> Any:
        request = request.named() if isinstance(request, StoreRequest) and not key else request
        call = call_of(request, content, key)
        if (remote := self._remote) is not None:
            return self._ask_remote(remote, request, call)
        if (server := server_facts(self._state_dir)) is not None:
            from orchestrator.api.exchange import HungUpError, NobodyListensError

            try:
                return self._ask_server(server, request, call)
            except NobodyListensError:
                pass  # it was killed and left its address behind: read without it
            except HungUpError:
                if route_of(request).verb != "GET":
                    raise
                # It ended while it was asked, which is the same for who only reads; perhaps another has started since.
                if (server := server_facts(self._state_dir)) is not None:
                    with contextlib.suppress(NobodyListensError, HungUpError):
                        return self._ask_server(server, request, call)
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

    def _ask_remote(self, remote: Remote, request: ServiceRequest[Any] | StoreRequest[Any], call: Call) -> Any:
        """Ask a service of another machine: nothing is done here if it is away."""
        from orchestrator.api.exchange import NobodyListensError, NotTakenError
        from orchestrator.api.waiting import Waiting

        server = remote.as_server()
        away = Unavailable("nobody answers there", remote.url, "check the address, the network and the service")
        try:
            with _told_with_its_key(request):
                return _over_http(server, call, Waiting(server, self._say))
        except (NobodyListensError, NotTakenError):
            raise away from None
        except NoSignOfLife as error:
            raise NoSignOfLife(error.what, remote.url, "tell those who run the service") from None

    def ask_here(self, request: ServiceRequest[Answer]) -> Answer:
        """Carry out in this process what only reads, whether a service runs or not."""
        return self._local().answer(request)  # type: ignore[no-any-return]

    def _ask_server(self, server: dict[str, Any], request: ServiceRequest[Any] | StoreRequest[Any], call: Call) -> Any:
        from orchestrator.api.exchange import NotTakenError
        from orchestrator.api.waiting import Waiting, named, not_asked

        try:
            with _told_with_its_key(request):
                try:
                    return _over_http(server, call, Waiting(server, self._say))
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


class AsyncClient:
    """The same for programs with an event loop: asks the service at an address, and no other.

    Args:
        ca_file: As `Remote.ca_file`.
    """

    def __init__(self, url: str, token: str, ca_file: str = "") -> None:
        import httpx

        self._server = Remote(url.rstrip("/"), token, ca_file).as_server()
        self._http = httpx.AsyncClient(
            base_url=self._server["url"],
            headers={"Authorization": f"Bearer {token}"},
            verify=trust_of(self._server) or True,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    @overload
    async def ask(self, request: ServiceRequest[Answer], key: str = "") -> Answer: ...
    @overload
    async def ask(self, request: StoreRequest[Any], key: str = "") -> Json: ...
    async def ask(self, request: ServiceRequest[Any] | StoreRequest[Any], key: str = "") -> Any:
        """As `Client.ask`."""
        import httpx

        request = request.named() if isinstance(request, StoreRequest) and not key else request
        call = call_of(request, key=key)
        with _told_with_its_key(request):
            try:
                reply = await self._http.request(
                    call.verb,
                    call.path,
                    params=dict(call.query),
                    content=call.body,
                    headers=dict(call.headers),
                    timeout=call.timeout_seconds,
                )
            except httpx.HTTPError as error:
                raise _away(self._server["url"], error) from error
            return answer_of(_reply(reply, reply.content), self._server["url"] + call.path)

    async def pages(self, request: ServiceRequest[list[Json]]) -> AsyncIterator[Json]:
        """As `Client.pages`."""
        following: ServiceRequest[list[Json]] | None = request
        while following is not None:
            rows = await self.ask(following)
            for row in rows:
                yield row
            following = following.next_page(rows)

    async def follow(self, request: ReadEvents) -> AsyncIterator[Json | None]:
        """As `Client.follow`; while the service is away, nothing comes but None."""
        following = Following(request)
        while True:
            with contextlib.suppress(Unavailable):
                async for heard in self._hear(following.request):
                    yield following.take(heard)
            yield None
            await asyncio.sleep(AGAIN_SECONDS)

    async def _hear(self, request: ReadEvents) -> AsyncIterator[Heard]:
        import httpx

        from orchestrator.api.exchange import EVENT_STREAM, SIGN_SECONDS

        call, hearing = call_of(request), Hearing()
        headers = {"Accept": EVENT_STREAM}
        asked = self._http.stream("GET", call.path, params=dict(call.query), headers=headers, timeout=SIGN_SECONDS)
        try:
            async with asked as reply:
                if reply.is_error:
                    answer_of(_reply(reply, await reply.aread()), self._server["url"] + call.path)
                async for line in reply.aiter_lines():
                    if (heard := hearing.line(line)) is not None:
                        yield heard
        except httpx.HTTPError as error:
            raise _away(self._server["url"], error) from error


def _reply(reply: httpx.Response, content: bytes) -> Reply:
    return Reply(reply.status_code, reply.headers.get("content-type", "").partition(";")[0], content)


def _away(url: str, error: Exception) -> Unavailable:
    what = f"nobody answers there: {type(error).__name__}: {error}".rstrip(": ")
    return Unavailable(what, url, "check the address, the network and the service")


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


def _over_http(server: dict[str, Any], call: Call, waiting: Callable[[float], None]) -> Any:
    from orchestrator.api.exchange import exchange

    url = server["url"] + call.path
    reply = exchange(
        url,
        call.verb,
        query=call.query,
        body=call.body,
        headers=call.headers,
        token=server["token"],
        timeout_seconds=call.timeout_seconds,
        waiting=waiting,
        trust=trust_of(server),
    )
    return answer_of(reply, url)
