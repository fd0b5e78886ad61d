"""What many ask at the same time is answered in one batch, each as if alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import NotFound, OnebasisError, Unavailable
from tests.workers.serving.sites import TEXTS, site
from tests.workers.serving.test_replica import replica, said
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.serving.batcher import Batcher, Said
from workers.serving.question import Answer, Piece, Question, Writing
from workers.serving.replica import Replica


def test_what_comes_while_a_batch_is_answered_is_the_next_batch(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made)
    asked = [Question(task, text) for task in made.specs for text in TEXTS]
    alone = said([one.answer([question])[0] for question in asked])
    batcher = Batcher(one, 16)
    wrong = Question("nobody", "Paris")

    async def all_at_once() -> list[Sequence[Said]]:
        return list(await asyncio.gather(*(batcher.answer([question]) for question in [*asked, wrong])))

    found = asyncio.run(all_at_once())
    for answer, (same,) in zip(alone, found[:-1], strict=True):
        assert not isinstance(same, Exception)
        assert (same.label, same.version) == (answer.label, answer.version)
        assert list((same.probabilities or {}).values()) == pytest.approx(
            list((answer.probabilities or {}).values()), abs=1e-6
        )
    assert isinstance(found[-1][0], NotFound)
    assert batcher.rows == len(asked) + 1
    assert batcher.batches == -(-batcher.rows // 16)


def test_a_request_larger_than_a_batch_is_answered_whole(tiny: Callable[[str], BaseModel]) -> None:
    one = replica(site(tiny("bert"), "sequence_classification", ["query"]))
    found = asyncio.run(Batcher(one, 2).answer([Question("seed-0", text) for text in TEXTS]))
    assert len(said(list(found))) == len(TEXTS)


class Scripted(Replica):
    """Answers every row with what it is told to, or fails."""

    def __init__(self, says: dict[str, Answer | Exception]) -> None:
        self.says = says
        self.fails: Exception | None = None

    def begin(self, questions: Sequence[Question], done: Callable[[int, Answer | Exception], None]) -> None:
        if self.fails is not None:
            raise self.fails
        for place, question in enumerate(questions):
            done(place, self.says[question.task])

    def step(self) -> bool:
        return False


def test_an_error_of_ours_is_told_to_all_in_the_batch_and_the_next_one_is_answered() -> None:
    one = Scripted({"t": NotFound("none", "t")})
    one.fails = RuntimeError("no such layer")
    batcher = Batcher(one, 8)

    async def run() -> None:
        failed = await asyncio.gather(*(batcher.answer([Question("t", "x")]) for _ in range(3)))
        assert [str(error).splitlines()[0] for (error,) in failed] == ["t: internal error: RuntimeError"] * 3
        one.fails = None
        (answer,) = await batcher.answer([Question("t", "x")])
        assert isinstance(answer, NotFound)

    asyncio.run(run())


def test_a_row_of_a_request_that_fails_costs_its_other_rows_nothing() -> None:
    right, memory = Answer("right", 1, label="a"), torch.OutOfMemoryError("out of memory")
    batcher = Batcher(Scripted({"right": right, "wrong": KeyError("x"), "large": memory}), 8)

    async def run() -> None:
        asked = [Question(task, "x") for task in ("right", "wrong", "large", "right")]
        first, wrong, large, last = await batcher.answer(asked)
        assert (first, last) == (right, right)
        assert (type(wrong), type(large)) == (OnebasisError, Unavailable)
        assert "KeyError" in str(wrong)
        assert batcher.broken is None

    asyncio.run(run())


def test_a_device_that_computes_nothing_more_is_told_to_ray_serve() -> None:
    batcher = Batcher(Scripted({"t": torch.AcceleratorError("CUDA error: an illegal memory access")}), 8)
    asyncio.run(batcher.answer([Question("t", "x")]))
    assert isinstance(batcher.broken, torch.AcceleratorError)


def test_pieces_arrive_while_it_is_written_and_nobody_listening_ends_it(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    one = replica(site(base, "causal_lm", ["q_proj"], max_new_tokens=40))
    (whole,) = said(one.answer([Question("seed-0", TEXTS[0])]))
    batcher, written = Batcher(one, 8), threading.Event()

    async def run() -> None:
        pieces = [piece async for piece in batcher.stream(Question("seed-0", TEXTS[0]))]
        assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == whole.text
        assert {one.version for one in pieces if not isinstance(one, OnebasisError)} == {whole.version}
        assert pieces[-1] == whole
        assert len(pieces) > 3
        stream = batcher.stream(Question("seed-0", TEXTS[0]))
        first = await anext(stream)
        assert isinstance(first, Piece)
        await stream.aclose()
        (after,) = await batcher.answer([Question("seed-0", TEXTS[0])])
        assert after == whole
        written.set()

    asyncio.run(run())
    assert written.is_set()


def test_nobody_waits_for_a_neighbours_long_answer(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    one = replica(site(base, "causal_lm", ["q_proj"], max_new_tokens=40))
    long = Question("seed-0", TEXTS[0])
    short = [Question("seed-1", TEXTS[1], writing=Writing(new_tokens=2)), Question("nobody", TEXTS[1])]
    alone = one.answer([long, *short])
    assert said(alone[:1])[0].tokens > 20
    batcher = Batcher(one, 8)

    async def run() -> None:
        loop, began = asyncio.get_running_loop(), asyncio.Event()

        def wrote(_: Piece) -> None:
            loop.call_soon_threadsafe(began.set)

        written = asyncio.create_task(batcher.answer([replace(long, wrote=wrote)]))
        await began.wait()
        for question, answer in zip(short, alone[1:], strict=True):
            (found,) = await batcher.answer([question])
            assert str(found) == str(answer)  # no error equals another
            assert not written.done()
        assert await written == alone[:1]

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_written_no_further(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    one, pieces = replica(site(base, "causal_lm", ["q_proj"], max_new_tokens=40)), list[str]()
    batcher, long = Batcher(one, 8), Question("seed-0", TEXTS[0])

    async def run() -> None:
        loop, began = asyncio.get_running_loop(), asyncio.Event()

        def wrote(piece: Piece) -> None:
            pieces.append(piece.text)
            loop.call_soon_threadsafe(began.set)

        left = asyncio.create_task(batcher.answer([replace(long, wrote=wrote)]))
        await began.wait()
        left.cancel()
        (whole,) = said(list(await batcher.answer([long])))
        assert 0 < len("".join(pieces)) < len(whole.text or "") / 2

    asyncio.run(run())
