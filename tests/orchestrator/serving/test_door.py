"""What OpenAI's clients are sent: the models they may ask, and streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, ObjectLostError, OutOfMemoryError
from ray.serve.exceptions import BackPressureError

from configs.errors import Unavailable
from configs.settings import StorageSettings
from orchestrator.serving.door import Door, _events
from orchestrator.serving.lodge import Lodge, digest_of
from orchestrator.serving.openai_records import Reply
from subspace_store import SubspaceStore, open_storage
from tests.subspace_store.builders import BASE, merged, random_adapter
from workers.serving.question import Answer, Piece, Question

ANSWER = Answer("t1", 7, text="hello", tokens=2, prompt_tokens=3, ended="stop")


def sent(*pieces: Any) -> list[Any]:
    """The events of a stream of these pieces; an exception is raised in its place."""

    async def rest() -> AsyncIterator[Any]:
        for piece in pieces[1:]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def gather() -> list[str]:
        return [event async for event in _events(pieces[0], rest(), Reply(True, "support/replies"), False)]

    lines = [event.removeprefix("data: ").strip() for event in asyncio.run(gather())]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_stream_is_its_pieces_the_end_and_the_version() -> None:
    *pieces, last, done = sent(Piece("he", 7), Piece("llo", 7), ANSWER)
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == "hello"
    assert {piece["system_fingerprint"] for piece in pieces} == {"version 7"}
    assert (last["choices"][0]["finish_reason"], last["system_fingerprint"], done) == ("stop", "version 7", "[DONE]")


def test_a_stream_whose_replica_dies_ends_with_an_error_and_not_as_if_it_were_whole() -> None:
    piece, error = sent(Piece("he", 7), ActorDiedError())
    assert piece["choices"][0]["delta"]["content"] == "he"
    assert (error["error"]["message"], error["error"]["code"]) == (
        "nobody could answer: ActorDiedError\n  → ask again",
        "unavailable",
    )


def test_who_comes_when_too_many_wait_is_told_so() -> None:
    said = sent(Piece("he", 7), BackPressureError(num_queued_requests=5, max_queued_requests=4))[1]["error"]
    assert "too many wait for an answer" in said["message"]
    assert said["code"] == "unavailable"


class Replicas:
    """What a door asks: each call is answered, or ended, by the next of these."""

    def __init__(self, *said: Any) -> None:
        self.said, self.asked = list(said), 0
        self.answer = self.stream = self

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, _: Any) -> Any:
        self.asked += 1
        found = self.said.pop(0)

        async def one() -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        async def pieces() -> AsyncIterator[Any]:
            yield await one()

        return pieces() if self.is_stream else one()

    is_stream = False


class Streaming(Replicas):
    is_stream = True


def request(method: str, path: str, body: Any = None) -> Request:
    headers = [(b"authorization", b"Bearer secret")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    return Request({**scope, "server": ("127.0.0.1", 1), "scheme": "http"}, receive)


def door_to(folder: Path, replicas: Replicas) -> Door:
    storage = StorageSettings(url=f"file:{folder}")
    SubspaceStore.open(open_storage(storage, BASE), base_model=BASE, writer="test")
    return Door("app", storage, Lodge("http://127.0.0.1:1", "", None, digest_of("secret")), {BASE: replicas})


@pytest.mark.parametrize(
    "died",
    [
        ActorDiedError(),
        ActorUnavailableError("away", b"0" * 16),
        OutOfMemoryError("the worker was ended"),
        NodeDiedError("the machine is gone"),
        ObjectLostError("0" * 56, b"", ""),
    ],
    ids=lambda died: type(died).__name__,
)
def test_where_a_replica_dies_another_one_answers(tmp_path: Path, died: Exception) -> None:
    replicas = Replicas(died, [ANSWER])
    found = asyncio.run(door_to(tmp_path, replicas).answer(BASE, [Question("t1", "a")]))
    assert (found, replicas.asked) == ([ANSWER], 2)


def test_where_a_replica_dies_before_the_first_piece_another_one_writes(tmp_path: Path) -> None:
    replicas = Streaming(ActorUnavailableError("away", b"0" * 16), Piece("he", 7))
    first, _ = asyncio.run(door_to(tmp_path, replicas).stream(BASE, Question("t1", "a")))
    assert (first, replicas.asked) == (Piece("he", 7), 2)


def test_a_stream_names_its_version_before_its_first_piece(tmp_path: Path) -> None:
    storage = open_storage(StorageSettings(url=f"file:{tmp_path}"), BASE)
    store = SubspaceStore.open(storage, base_model=BASE, writer="test")
    version = merged(store, {"first": random_adapter(1)})
    store.publish(version.number, op_key="publish", actor="test")
    door = door_to(tmp_path, Streaming(Piece("he", 7)))
    name = store.state.tasks_at(version.number)["first"].name
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    reply = asyncio.run(door(request("POST", "/v1/chat/completions", body)))
    assert (reply.status_code, reply.headers["x-onebasis-version"]) == (200, "7")


@pytest.mark.parametrize("kind", [Replicas, Streaming])
def test_a_question_that_replicas_die_of_does_not_end_all_of_them(tmp_path: Path, kind: type[Replicas]) -> None:
    replicas = kind(*[ActorDiedError() for _ in range(5)])
    door, question = door_to(tmp_path, replicas), Question("t1", "a")
    with pytest.raises(Unavailable, match="2 replicas ended before they had answered it"):
        asyncio.run(door.answer(BASE, [question]) if kind is Replicas else door.stream(BASE, question))
    assert replicas.asked == 2


def test_what_is_wrong_with_a_question_is_asked_once(tmp_path: Path) -> None:
    replicas = Replicas(BackPressureError(num_queued_requests=5, max_queued_requests=4))
    with pytest.raises(BackPressureError):
        asyncio.run(door_to(tmp_path, replicas).answer(BASE, [Question("t1", "a")]))
    assert replicas.asked == 1


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v1/models", 200, "first"),
        ("/v1/models/{title}", 200, "first"),
        ("/v1/models/{encoded}", 200, "first"),
        ("/v1/models/talk/nothing", 404, "main holds no such task"),
        ("/v2/models", 404, "there is no GET /v2/models"),
    ],
)
def test_the_models_are_the_tasks_of_main_all_or_one(tmp_path: Path, path: str, status: int, said: str) -> None:
    storage = StorageSettings(url=f"file:{tmp_path}")
    store = SubspaceStore.open(open_storage(storage, BASE), base_model=BASE, writer="test")
    version = merged(store, {"first": random_adapter(1), "second": random_adapter(2)})
    store.publish(version.number, op_key="publish", actor="test")
    title = store.state.tasks_at(version.number)["first"].name
    door = Door("app", storage, Lodge("http://127.0.0.1:1", "", None, digest_of("secret")), {BASE: None})
    asked = path.format(title=title, encoded=title.replace("/", "%2F"))
    reply = asyncio.run(door(request("GET", asked)))
    assert reply.status_code == status
    content = json.loads(bytes(reply.body))
    assert said in json.dumps(content)
    if status == 200:
        models = content.get("data", [content])
        assert models[0]["id"] == title
        assert len(models) == (2 if path == "/v1/models" else 1)
        assert models[0]["version"] == version.number
