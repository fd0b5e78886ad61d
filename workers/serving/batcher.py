"""Puts what many ask at the same time into one batch.

While a pass of the model is under way, the next rows gather; nobody waits for a batch to become full, nor for a
neighbour's long text to be written.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from configs.errors import OnebasisError, Unavailable
from workers.machine import ran_out_of_memory
from workers.serving.canary import Chosen
from workers.serving.question import Answer, Piece, Question
from workers.serving.replica import Replica

log = logging.getLogger("onebasis.serving")

Said = Answer | OnebasisError


@dataclass(frozen=True)
class _Asked:
    """One request."""

    questions: Sequence[Question]
    answers: asyncio.Future[Sequence[Said]]
    found: dict[int, Said] = field(default_factory=dict)
    """What became of its rows so far, by their places."""

    def end(self) -> None:
        """Tell whoever waits. In the event loop's thread."""
        if not self.answers.done():  # else nobody waits any more
            self.answers.set_result([self.found[place] for place in range(len(self.questions))])


def told(error: Exception, task: str) -> OnebasisError:
    """What goes wrong with a row, as whoever asked is told it."""
    if isinstance(error, OnebasisError):
        return error
    if ran_out_of_memory(error):
        return Unavailable("there is not enough memory for it", task, "ask again, or for less")
    log.error("a row could not be answered", exc_info=error)
    return OnebasisError(f"internal error: {type(error).__name__}", task, "the log of the replica has the rest")


class Batcher:
    """One thread in which a replica answers. Its methods are called from one event loop.

    Args:
        rows_max: Rows that are begun together; a single request may have more.
    """

    def __init__(self, replica: Replica, rows_max: int) -> None:
        self._replica, self._rows_max = replica, rows_max
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._waiting: deque[_Asked] = deque()
        self._requests = itertools.count(1)
        self._unanswered = 0
        """Requests that somebody waits for."""
        self._worker: asyncio.Task[None] | None = None
        self._comparing: set[asyncio.Task[None]] = set()
        self.batches = self.rows = 0
        """Batches and rows so far."""
        self.broken: Exception | None = None
        """What ended its work for good: nothing answers any more but another process."""

    async def answer(self, questions: Sequence[Question]) -> Sequence[Said]:
        """Answers in the order of the questions, all that name no version by the same one. When nobody waits for them
        any more, texts are written no further."""
        began = time.monotonic()
        self._unanswered += 1
        try:
            answers = await self._ask(questions)
        finally:
            self._unanswered -= 1
        if questions[0].key and (canary := self._replica.canary) is not None:
            self._compare(canary, time.monotonic() - began, questions, answers)
        return answers

    async def _ask(self, questions: Sequence[Question]) -> Sequence[Said]:
        answers: asyncio.Future[Sequence[Said]] = asyncio.get_running_loop().create_future()
        number = next(self._requests)
        mine = [replace(one, wanted=lambda: not answers.done(), request=number) for one in questions]
        asked = _Asked(mine, answers)
        self._waiting.append(asked)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answers

    def _compare(self, canary: Chosen, seconds: float, questions: Sequence[Question], answers: Sequence[Said]) -> None:
        """Note how long a request took, of those that their key alone gave to one of the two; of one that the canary
        answered, have `main`'s version answer too, if nobody waits. Whoever asked does not wait for it."""
        pairs = zip(questions, answers, strict=True)
        said = [(one, answer) for one, answer in pairs if isinstance(answer, Answer)]
        if not said:
            return
        first, version = questions[0], said[0][1].version
        is_canarys = canary.takes(first.key)
        # Streams and named versions are never the canary's; what it could not answer took both their time.
        if first.wrote is not None or first.version is not None or is_canarys is not (version == canary.version):
            return
        canary.comparison.took(version, seconds, {self._replica.name_of(answer) for _, answer in said})
        if not is_canarys or not canary.is_shadowed(first.key):
            return
        # Of what is drawn no two answers are alike, by whichever version.
        said = [(one, answer) for one, answer in said if not one.writing.temperature or one.writing.seed is not None]
        if not said:
            return
        if self._unanswered:
            canary.comparison.dropped()
            return
        main, _ = canary.comparison.versions
        again = [replace(one, version=main, key="") for one, _ in said]

        async def compare() -> None:
            for (_, theirs), answer in zip(said, await self._ask(again), strict=True):
                if isinstance(answer, Answer):
                    canary.comparison.both(self._replica.name_of(theirs), answer, theirs)

        task = asyncio.create_task(compare())
        self._comparing.add(task)
        task.add_done_callback(self._comparing.discard)

    async def stream(self, question: Question) -> AsyncIterator[Piece | Said]:
        """The pieces of an answer, then all of it, or its error."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Said | Exception]()

        def wrote(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async def ask() -> None:
            try:
                (said,) = await self.answer([replace(question, wrote=wrote)])
                pieces.put_nowait(said)
            except Exception as error:
                pieces.put_nowait(error)

        asking = asyncio.create_task(ask())
        try:
            while isinstance(piece := await pieces.get(), Piece):
                yield piece
            if not isinstance(piece, Answer | OnebasisError):
                raise piece
            yield piece
        finally:
            asking.cancel()

    async def _work(self) -> None:
        loop, is_writing = asyncio.get_running_loop(), False
        while self._waiting or is_writing:
            batch, rows = list[_Asked](), 0
            while self._waiting and (not batch or rows + len(self._waiting[0].questions) <= self._rows_max):
                batch.append(self._waiting.popleft())
                rows += len(batch[-1].questions)
            self.batches, self.rows = self.batches + bool(batch), self.rows + rows
            try:
                is_writing = await loop.run_in_executor(self._thread, self._turn, loop, batch)
            except Exception as error:  # of our own: whoever waits would wait for ever
                self.broken = error
                raise

    def _turn(self, loop: asyncio.AbstractEventLoop, batch: Sequence[_Asked]) -> bool:
        """Begin these requests, and write a token of all texts; returns whether any is still to be written."""
        rows = [(asked, place) for asked in batch for place in range(len(asked.questions))]

        def done(index: int, said: Answer | Exception) -> None:
            asked, place = rows[index]
            if isinstance(said, torch.AcceleratorError):  # of a device that computes nothing more in this process
                self.broken = said
            asked.found[place] = said if isinstance(said, Answer) else told(said, asked.questions[place].task)
            if len(asked.found) == len(asked.questions):
                loop.call_soon_threadsafe(asked.end)

        try:
            if rows:
                self._replica.begin([asked.questions[place] for asked, place in rows], done)
        except Exception as error:  # everybody whose rows are lost is told
            for index, (asked, place) in enumerate(rows):
                if place not in asked.found:
                    done(index, error)
        return self._replica.step()
