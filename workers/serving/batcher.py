"""Puts what many ask at the same time into one batch.

While one batch is answered, the next one gathers; nobody waits for a batch to become full.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from configs.errors import OnebasisError
from workers.serving.canary import Chosen
from workers.serving.question import Answer, Question
from workers.serving.replica import Replica

Said = Answer | OnebasisError


@dataclass(frozen=True)
class _Asked:
    at: float
    questions: Sequence[Question]
    answers: asyncio.Future[Sequence[Said]]


class Batcher:
    """One thread in which a replica answers. Its methods are called from one event loop.

    Args:
        rows_max: Rows of a batch; a single request may have more.
    """

    def __init__(self, replica: Replica, rows_max: int) -> None:
        self._replica, self._rows_max = replica, rows_max
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._waiting: deque[_Asked] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._comparing: set[asyncio.Task[None]] = set()
        self.batches = self.rows = 0
        """Batches and rows so far."""

    async def answer(self, questions: Sequence[Question]) -> Sequence[Said]:
        """Answers in the order of the questions, all that name no version by the same one."""
        asked = _Asked(time.monotonic(), questions, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        answers = await asked.answers
        if questions[0].key and (canary := self._replica.canary) is not None:
            self._compare(canary, asked, answers)
        return answers

    def _compare(self, canary: Chosen, asked: _Asked, answers: Sequence[Said]) -> None:
        """Note how long a request took; of one that the canary answered, have `main`'s version answer too, if nobody
        waits. Whoever asked does not wait for it."""
        pairs = zip(asked.questions, answers, strict=True)
        said = [(one, answer) for one, answer in pairs if isinstance(answer, Answer)]
        if not said:
            return
        version = said[0][1].version
        canary.comparison.took(version, time.monotonic() - asked.at, {one.task for one, _ in said})
        if version != canary.version or not canary.is_shadowed(asked.questions[0].key):
            return
        if self._waiting:
            canary.comparison.dropped()
            return
        main, _ = canary.comparison.versions
        again = [replace(one, version=main, key="") for one, _ in said]

        async def compare() -> None:
            for (one, theirs), answer in zip(said, await self.answer(again), strict=True):
                if isinstance(answer, Answer):
                    canary.comparison.both(one.task, answer, theirs)

        task = asyncio.create_task(compare())
        self._comparing.add(task)
        task.add_done_callback(self._comparing.discard)

    async def stream(self, question: Question) -> AsyncIterator[str | Said]:
        """The pieces of an answer, then all of it, or its error. When nobody listens any more, it is written no
        further."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | Said | Exception]()
        is_heard = True

        def wrote(piece: str) -> bool:
            if piece:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            return is_heard

        async def ask() -> None:
            try:
                (said,) = await self.answer([replace(question, wrote=wrote)])
                pieces.put_nowait(said)
            except Exception as error:
                pieces.put_nowait(error)

        asking = asyncio.create_task(ask())
        try:
            while isinstance(piece := await pieces.get(), str):
                yield piece
            if not isinstance(piece, Answer | OnebasisError):
                raise piece
            yield piece
        finally:
            is_heard = False
            asking.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft()]
            rows = len(batch[0].questions)
            while self._waiting and rows + len(self._waiting[0].questions) <= self._rows_max:
                batch.append(self._waiting.popleft())
                rows += len(batch[-1].questions)
            self.batches, self.rows = self.batches + 1, self.rows + rows
            questions = [question for asked in batch for question in asked.questions]
            try:
                answers = await loop.run_in_executor(self._thread, self._replica.answer, questions)
            except Exception as error:  # everybody in the batch is told
                for asked in batch:
                    if not asked.answers.done():
                        asked.answers.set_exception(error)
                continue
            for asked in batch:
                some, answers = answers[: len(asked.questions)], answers[len(asked.questions) :]
                if not asked.answers.done():  # nobody waits any more
                    asked.answers.set_result(some)
