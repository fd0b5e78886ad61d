"""What HTTP gives whoever asks again: a request that is carried out once, an answer that has not changed, the next
page; and errors in the one form that all programs read."""

from __future__ import annotations

import re
import threading
from typing import Any

import httpx
import pytest
from fastapi import Request

from configs.errors import LEAVES, Conflict
from orchestrator.api.entrance import PROBLEM, Problem
from orchestrator.api.requests import ListTasks, ListVersions, ReadAudit, ReadEvents
from orchestrator.tasks.answer_book import KEPT_SECONDS, AnswerBook
from tests.orchestrator.site import TOKEN, Site


def ask(site: Site, verb: str, path: str, key: str = "", body: Any = None, **headers: str) -> httpx.Response:
    said = {"authorization": f"Bearer {TOKEN}", **({"idempotency-key": key} if key else {}), **headers}
    with httpx.Client(base_url=site.url, headers=said, trust_env=False) as client:
        return client.request(verb, f"/v1{path}", json=body)


# --- once --------------------------------------------------------------------------------------------------------


@pytest.mark.changes
def test_a_request_with_a_key_is_carried_out_once_and_answered_as_the_first_time(site: Site) -> None:
    paused = ask(site, "POST", "/pause", "monday", {"team": "red", "reason": "audit"})
    assert (paused.status_code, paused.json()["is_new"]) == (200, True)
    ask(site, "POST", "/resume", body={"team": "red"})
    again = ask(site, "POST", "/pause", "monday", {"team": "red", "reason": "audit"})
    assert again.json() == paused.json()
    assert site.plant.queue.pauses() == {}  # it was not carried out again
    other = ask(site, "POST", "/pause", "monday", {"team": "red", "reason": "another"})
    assert (other.status_code, other.json()["what"]) == (422, "another request had this key")
    assert ask(site, "POST", "/resume", "monday", {"team": "red"}).status_code == 422


@pytest.mark.changes
def test_a_request_to_the_store_has_the_key_in_the_log(site: Site) -> None:
    first = ask(site, "POST", "/store/tag", "gold", {"name": "gold", "version": 1}).json()
    records = site.plant.state.seq
    assert ask(site, "POST", "/store/tag", "gold", {"name": "gold", "version": 1}).json() == first
    assert site.plant.state.seq == records
    with site.plant.queue.database.writing() as connection:  # a process that died before it could keep its answer
        connection.exec_driver_sql("UPDATE kept_answers SET answer = NULL")
    assert ask(site, "POST", "/store/tag", "gold", {"name": "gold", "version": 1}).status_code == 200
    assert site.plant.state.seq == records


@pytest.mark.changes
def test_what_was_refused_is_not_kept_and_a_secret_never_is(site: Site) -> None:
    assert ask(site, "POST", "/cancel/red/nothing", "k", {}).status_code == 404
    assert ask(site, "POST", "/pause", "k", {"team": "red"}).status_code == 200  # so the key is free again
    for path, body in (("/tokens", {"name": "bob", "role": "viewer"}), ("/tokens/abc/rotate", {})):
        assert "secret" in ask(site, "POST", path, "t", body).json()["what"]
    assert ask(site, "POST", "/pause", "x" * 201, {"team": "red"}).json()["where"] == "Idempotency-Key"


def test_a_key_belongs_to_who_chose_it_for_a_day_and_to_one_request_at_a_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, done = AnswerBook(site.plant.queue.database), []
    release, begun = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert release.wait(10)
        return "slow"

    first = threading.Thread(target=lambda: done.append(book.once("ann", "k", "1", slow)))
    first.start()
    begun.wait(10)
    with pytest.raises(Conflict, match="is being carried out"):
        book.once("ann", "k", "1", lambda: "twice")
    assert book.once("bob", "k", "2", lambda: "bob's") == "bob's"
    release.set()
    first.join()
    assert done == [book.once("ann", "k", "1", lambda: "twice")] == ["slow"]
    from orchestrator.tasks import answer_book

    now = answer_book.time.time()
    monkeypatch.setattr(answer_book.time, "time", lambda: now + KEPT_SECONDS + 1)
    assert book.once("ann", "k", "another", lambda: "a day later") == "a day later"


# --- not changed, and the next page ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tasks", "/versions", "/versions/2", "/matrix", "/scores"])
def test_who_has_an_answer_already_is_told_so(site: Site, path: str) -> None:
    first = ask(site, "GET", path)
    again = ask(site, "GET", path, **{"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert ask(site, "GET", path, **{"if-none-match": '"other"'}).json() == first.json()


def test_another_answer_has_another_tag(site: Site) -> None:
    tags = [ask(site, "GET", path).headers["etag"] for path in ("/versions", "/versions?limit=1", "/versions?cursor=1")]
    assert len({*tags}) == 3


@pytest.mark.parametrize("path", ["/tasks?limit=1", "/versions?limit=1", "/events?limit=2", "/audit?limit=1&cursor=0"])
def test_pages_follow_on_each_other_until_there_is_no_more(site: Site, path: str) -> None:
    whole = ask(site, "GET", path.partition("?")[0] + ("?cursor=0" if "audit" in path else "")).json()
    found, pages, url = [], 0, path
    while url:
        answer = ask(site, "GET", url)
        found.append(answer.json())
        assert len(answer.json()) <= 2
        url = answer.links["next"]["url"].removeprefix("/v1") if "next" in answer.links else ""
        pages += 1
        assert pages < 100
    rows = [row for page in (reversed(found) if "/tasks" in path else found) for row in page]
    assert rows == whole[: len(rows)]
    assert len(rows) >= 2
    record = {"/tasks": ListTasks(limit=1), "/versions": ListVersions(limit=1), "/events": ReadEvents(limit=2)}
    asked = record.get(path.partition("?")[0], ReadAudit(limit=1, cursor=0))
    assert list(site.client.pages(asked)) == [row for page in found for row in page]


# --- errors ------------------------------------------------------------------------------------------------------


def test_errors_are_problems_of_one_type_for_each_class(site: Site) -> None:
    answer = ask(site, "GET", "/tasks/red/nothing")
    told = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (told["type"], told["status"]) == (f"{PROBLEM}not-found", 404)
    assert told["title"] == "There is no such task, version, team or key for you"
    assert told["detail"] == "'red/nothing': there is no such task"
    assert {"kind", "code", "what", "where", "todo"} <= told.keys()
    request = Request({"type": "http", "state": {"request_id": "r-1"}})
    problems = [Problem(request, leaf("what", "where", "todo", *(1 for _ in leaf.facts))) for leaf in LEAVES]
    types = [re.findall(rb'"type":"([^"]+)","title":"([^"]+)"', bytes(problem.body))[0] for problem in problems]
    assert len({kind for kind, _ in types}) == len({title for _, title in types}) == len(LEAVES)
    for path, status in (("/nothing", 404), ("/store/hold", 405)):
        assert ask(site, "GET", path).json()["status"] == status
