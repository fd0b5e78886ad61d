"""What a stream sends to OpenAI's clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import ActorDiedError

from orchestrator.serving.door import _events
from orchestrator.serving.openai_records import Reply
from workers.serving.question import Answer

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
    *pieces, last, done = sent("he", "llo", ANSWER)
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == "hello"
    assert (last["choices"][0]["finish_reason"], last["system_fingerprint"], done) == ("stop", "version 7", "[DONE]")


def test_a_stream_whose_replica_dies_ends_with_an_error_and_not_as_if_it_were_whole() -> None:
    piece, error = sent("he", ActorDiedError())
    assert piece["choices"][0]["delta"]["content"] == "he"
    assert (error["error"]["message"], error["error"]["code"]) == (
        "nobody could answer: ActorDiedError\n  → ask again",
        "unavailable",
    )
