"""The two clients over real HTTP: the same requests, the same answers and the same errors, with and without a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

import pytest

from configs.errors import InvalidInput, NotFound, OutcomeUnknown, Unavailable, UnknownToken
from orchestrator.api.client import AsyncClient, Client
from orchestrator.api.requests import Export, ListTasks, Pause, ReadEvents, Resume, ShowMatrix, ShowTask, ShowVersion
from subspace_store.requests import Tag
from tests.orchestrator.site import TOKEN, Site


async def first(count: int, found: AsyncIterator[Any]) -> list[Any]:
    got: list[Any] = []
    async for one in found:
        got.append(one)
        if len(got) == count:
            break
    return got


def asked(site: Site, *requests: Any, token: str = TOKEN) -> list[Any]:
    """What an AsyncClient is answered to each; errors as themselves."""

    async def ask() -> list[Any]:
        async with AsyncClient(site.url, token) as client:
            return await asyncio.gather(*(client.ask(one) for one in requests), return_exceptions=True)

    return asyncio.run(ask())


def test_both_clients_are_answered_the_same(site: Site) -> None:
    requests = [ListTasks(live=False), ShowTask(reference="red/alpha"), ShowVersion(version=2), ShowMatrix()]
    client = Client.at(site.url + "/", TOKEN)
    assert asked(site, *requests) == [client.ask(one) for one in requests]
    (export,) = asked(site, Export(reference="red/alpha"))
    assert export[:2] == b"PK"


def test_errors_are_themselves_in_both(site: Site) -> None:
    wrong = [(ShowTask(reference="red/none"), NotFound), (ListTasks(cursor="none"), NotFound)]
    for (request, kind), found in zip(wrong, asked(site, *(one for one, _ in wrong)), strict=True):
        with pytest.raises(kind) as caught:
            Client.at(site.url, TOKEN).ask(request)
        assert (type(found), found.args) == (kind, caught.value.args)
    (refused,) = asked(site, ListTasks(), token="wrong")
    assert isinstance(refused, UnknownToken)

    async def nobody() -> None:
        async with AsyncClient("http://127.0.0.1:1", TOKEN) as client:
            await client.ask(ListTasks())

    with pytest.raises(Unavailable, match="nobody answers there"):
        asyncio.run(nobody())


class _Overloaded(BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"<h1>503 Service Temporarily Unavailable</h1>")

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_what_a_proxy_answers_by_itself_is_waited_for_and_a_write_is_in_doubt() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Overloaded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client.at(f"http://127.0.0.1:{server.server_port}", TOKEN)
        with pytest.raises(Unavailable, match="HTTP 503: it takes no more connections now, or a proxy"):
            client.ask(ListTasks())
        with pytest.raises(OutcomeUnknown, match="tag:x"):
            client.ask(Tag(name="gold", version=1, op_key="tag:x"))
        server.shutdown()


def test_events_are_followed_and_listed_by_both(site: Site) -> None:
    async def read() -> tuple[list[Any], list[Any]]:
        async with AsyncClient(site.url, TOKEN) as client:
            listed = [event async for event in client.pages(ReadEvents(team="red", limit=3))]
            return listed, await first(4, client.follow(ReadEvents(team="red", after=0)))

    listed, followed = asyncio.run(read())
    client = Client.at(site.url, TOKEN)
    assert listed == list(client.pages(ReadEvents(team="red")))
    assert followed == list(islice(client.follow(ReadEvents(team="red", after=0)), 4)) == [None, *listed[:3]]


@pytest.mark.changes
def test_with_a_key_a_request_is_carried_out_once_whichever_client_repeats_it(site: Site) -> None:
    client = Client.at(site.url, TOKEN)

    async def pause(**about: Any) -> Any:
        async with AsyncClient(site.url, TOKEN) as other:
            return await other.ask(Pause(**about), key="monday")

    told = client.ask(Pause(team="red", reason="why"), key="monday")
    client.ask(Resume(team="red"))
    assert asyncio.run(pause(team="red", reason="why")) == told
    assert site.plant.queue.pauses() == {}
    with pytest.raises(InvalidInput, match="another request had this key"):
        asyncio.run(pause(team="blue"))
    tagged = [client.ask(Tag(name="gold", version=1), key="gold") for _ in range(2)]
    assert tagged[0] == tagged[1]
