"""Streams of events over real HTTP: each event once, whoever is cut off; to those alone who may see it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import httpx
import pytest

from configs.errors import Exit
from orchestrator.api import server
from orchestrator.api.client import Client
from orchestrator.api.feed import RECENT_MAX
from orchestrator.api.requests import CreateToken, ReadEvents, RevokeToken
from tests.orchestrator.site import TOKEN, Site

STREAM = {"accept": "text/event-stream"}


def heard(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event of a stream, as far as it goes."""
    said: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            said[name] = value
        else:
            if "data" in said:
                found = json.loads(said["data"])
                assert said.get("event") or said["id"] == str(found["event_id"])
                yield said.get("event", ""), found
            said = {}


def listening(site: Site, token: str = TOKEN, last: int | None = None, **query: Any) -> Any:
    headers = {**STREAM, "authorization": f"Bearer {token}"} | (
        {"last-event-id": str(last)} if last is not None else {}
    )
    return httpx.stream("GET", f"{site.url}/v1/events", params=query, headers=headers, timeout=10, trust_env=False)


def say(site: Site, title: str, *lines: str) -> None:
    queue = site.plant.queue
    queue.append(queue.find(title).task_id, [("log", line) for line in lines])


def token_of(site: Site, name: str, team: str | None = "red") -> dict[str, Any]:
    return site.client.ask(CreateToken(name=name, role="viewer", team=team))


def test_whoever_is_cut_off_again_and_again_has_every_event_once(site: Site) -> None:
    lines = [f"line {number}" for number in range(200)]
    before = list(site.client.pages(ReadEvents(team="red")))

    def write() -> None:
        for line in lines:
            say(site, "red/alpha", line)

    writer, got = threading.Thread(target=write), []
    writer.start()
    while (left := len(before) + len(lines) - len(got)) > 0:
        with listening(site, last=got[-1]["event_id"] if got else 0, after=0, team="red") as answer:  # as browsers send
            got += [event for _, event in islice(heard(answer), min(left, 37))]
    writer.join()
    assert [one["event_id"] for one in got] == [
        one["event_id"] for one in site.client.pages(ReadEvents(team="red", limit=7))
    ]
    assert [one["text"] for one in got if one["text"].startswith("line ")] == lines
    assert {one["title"] for one in got} == {"red/alpha"}


def test_sixty_streams_hear_the_same_without_a_thread_for_each(site: Site) -> None:
    async def first_of(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> int:
        async with client.stream("GET", f"{site.url}/v1/events", headers=STREAM) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            begun.release()
            async for line in lines:
                if line.startswith("data:"):
                    return int(json.loads(line[5:])["event_id"])
        raise AssertionError("it ended")

    async def listen() -> tuple[set[int], int]:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=30, trust_env=False) as client:
            begun = asyncio.Semaphore(0)
            streams = [asyncio.create_task(first_of(client, begun)) for _ in range(60)]
            for _ in streams:
                await begun.acquire()
            threads = threading.active_count()
            say(site, "red/alpha", "for all")
            return set(await asyncio.gather(*streams)), threads

    before = threading.active_count()
    found, threads = asyncio.run(listen())
    (newest,) = found
    assert newest == site.plant.queue.newest_event()
    assert threads - before < 50  # those that read for any request: forty at the most
    feed = site._server.config.app.state.feed
    until = time.monotonic() + 10
    while feed.count and time.monotonic() < until:
        say(site, "red/alpha", "who is there?")  # that somebody has gone is found out by sending
    assert feed.count == 0


def test_nothing_of_another_team_is_heard(site: Site) -> None:
    secret = token_of(site, "listener")["token"]
    beta = site.plant.queue.find("blue/beta").task_id
    with listening(site, secret, after=0) as answer:
        found = heard(answer)
        told = [next(found)[1]]
        say(site, "blue/beta", "hidden")
        say(site, "red/alpha", f"comes after blue/beta ({beta})", "enough")
        while told[-1]["text"] != "enough":
            told.append(next(found)[1])
    assert {event["title"] for event in told} == {"red/alpha"}
    assert told[-2]["text"] == "comes after another team's task (another team's task)"
    for query in ({"team": "blue"}, {"reference": "blue/beta"}, {"reference": beta}):
        with listening(site, secret, **query) as answer:
            assert (answer.status_code, answer.read() and answer.json()["kind"]) == (404, "not-found")


def test_a_stream_is_of_what_was_asked_for(site: Site) -> None:
    with listening(site, after=0, reference="red/alpha", kinds="Claimed,Judged") as answer:
        assert [event["kind"] for _, event in islice(heard(answer), 2)] == ["Claimed", "Judged"]
    asked = {"authorization": f"Bearer {TOKEN}", **STREAM, "last-event-id": "seven"}
    refused = httpx.get(f"{site.url}/v1/events", headers=asked, trust_env=False)
    assert (refused.status_code, refused.json()["where"]) == (422, "Last-Event-ID")
    page = httpx.get(f"{site.url}/v1/events", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
    assert page.headers["content-type"] == "application/json"  # who does not ask for a stream gets a page


@pytest.mark.changes
def test_a_token_that_is_revoked_hears_no_more(site: Site) -> None:
    made = token_of(site, "leaver")
    with listening(site, made["token"], after=0) as answer:
        found = heard(answer)
        assert next(found)[0] == ""
        site.client.ask(RevokeToken(token_id=made["token_id"]))
        name, error = list(found)[-1]
    assert (name, error["code"]) == ("end", "unknown-token")


@pytest.mark.changes
def test_a_stream_ends_with_the_service_and_a_client_goes_on_with_what_is_left(site: Site) -> None:
    following = site.client.follow(ReadEvents(reference="blue/beta", after=0))
    until_now = site.plant.queue.told(0, 1000, task_id=site.plant.queue.find("blue/beta").task_id)
    got = [event for event in islice(following, 1 + len(until_now)) if event is not None]
    assert [event["event_id"] for event in got] == [event.event_id for event in until_now]
    with listening(site, after=site.plant.queue.newest_event()) as answer:
        began = time.monotonic()
        threading.Thread(target=setattr, args=(site._server, "should_exit", True)).start()
        (name, error) = list(heard(answer))[-1]
        assert time.monotonic() - began < server.STOP_SECONDS
    assert (name, error["kind"], error["what"]) == ("end", "unavailable", "the control plane ends")
    site._http.join(10)
    say(site, "blue/beta", "written while nobody served")
    assert next(event for event in following if event)["text"] == "written while nobody served"


@pytest.mark.changes
def test_who_takes_nothing_is_cut_off_and_misses_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TAKE_SECONDS", 0.2)
    lines = ["x" * 2000 for _ in range(RECENT_MAX + 1000)]  # more than memory keeps, and than a socket takes
    with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2]))) as connection:
        head = (
            f"GET /v1/events?after=0 HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nAuthorization: Bearer {TOKEN}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode())
        connection.recv(100)
        say(site, "red/alpha", *lines)
        feed, until = site._server.config.app.state.feed, time.monotonic() + 20
        while feed.count and time.monotonic() < until:
            time.sleep(0.05)
        assert feed.count == 0
    behind = [event for event in islice(site.client.follow(ReadEvents(after=0, kinds="log")), len(lines)) if event]
    assert [event["text"] for event in behind if event["text"] in lines][:10] == lines[:10]


def test_a_followed_log_ends_with_its_task(site: Site) -> None:
    from typer.testing import CliRunner

    from orchestrator.commands.cli import app

    done = CliRunner().invoke(app, ["logs", "red/alpha", "--follow", "--json", "--state-dir", str(site.folder)])
    assert done.exit_code == Exit.DONE, done.output
    assert json.loads(done.stdout) == list(Client(site.folder).pages(ReadEvents(reference="red/alpha")))
