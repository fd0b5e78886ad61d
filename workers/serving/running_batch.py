"""Rows that a language model writes together, and whose number changes between two tokens.

A row that comes reads its prompt in a pass of its own, and is joined to the others from its second token on; a row that
has ended leaves at once. So nobody waits for a neighbour's long answer. Room is what rows take now, not what they may
take one day: where they grow out of it, those that came last wait, and are read again, their tokens so far behind their
prompts. The same becomes of rows whose pass fails: they are read again in halves, so that a row that fails by itself
costs no other, and a pass that needs too much memory becomes two smaller ones.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from workers.evaluation import ROWS_PER_BATCH, TOKENS_PER_BATCH
from workers.machine import ran_out_of_memory
from workers.serving.lane import Lane, Over, Writer, lanes_of
from workers.serving.writing import Pen

log = logging.getLogger("onebasis.serving")

SPARE = 32
"""Columns that every row must have to grow before another row is begun, or lanes are made one again."""
CALM_STEPS = 256
"""Steps without a failure after which there is twice the room again, after memory ran out."""


class RunningBatch:
    """The rows that one model writes now, and those that wait for room.

    Args:
        between_tokens: Called before every token; may raise to stop.
        rows_max: Rows that are written at once.
        room: Columns of keys and values that they have at most, padding counted; a single row may have more.
    """

    def __init__(
        self,
        writer: Writer,
        pad_id: int,
        between_tokens: Callable[[], None],
        rows_max: int = ROWS_PER_BATCH,
        room: int = TOKENS_PER_BATCH,
    ) -> None:
        self._writer, self._pad_id, self._between, self._rows_max = writer, pad_id, between_tokens, rows_max
        self._room_max = self._room = room
        self._calm = 0
        """Steps since memory ran out."""
        self._waiting: deque[Pen] = deque()
        self._apart: deque[list[Pen]] = deque()
        """Rows of passes that failed, to be read again by themselves before others begin."""
        self._empty = Lane(writer, pad_id)
        self._lanes: list[Lane] = []
        self._open: dict[Pen, None] = {}
        """All rows that have not ended, in the order in which they came."""

    @property
    def pens(self) -> list[Pen]:
        """The rows that are still to be written."""
        return list(self._open)

    @property
    def columns(self) -> int:
        """Columns of keys and values that rows have now, padding counted."""
        return sum(lane.columns for lane in self._lanes)

    @property
    def lanes(self) -> list[list[Pen]]:
        """The rows that are written now: those of one pass together."""
        return [lane.pens for lane in self._lanes]

    def add(self, pens: Sequence[Pen]) -> None:
        """Rows that are to be written, too: from the next step on, or as soon as there is room."""
        self._waiting.extend(pens)
        self._open |= dict.fromkeys(pens)

    def step(self) -> Over:
        """Write a token of every row that has room.

        Returns:
            The rows that are written no further, each with what went wrong, or None: of a pass that fails, a row that
            fails by itself, too. Where `between_tokens` raises, all rows.

        Cost:
            A pass over one token of each row of a lane, and where rows begin, one over their prompts.
        """
        try:
            self._between()
        except Exception as error:
            over: Over = dict.fromkeys(self._open, error)
            self._waiting.clear()
            self._apart.clear()
            self._lanes = []
        else:
            with torch.inference_mode():
                over = self._write()
        for pen in over:
            del self._open[pen]
        return over

    def _write(self) -> Over:
        over = self._grow()
        for lane in list(self._lanes):
            over |= self._passed(lane, lane.pens, lane.go_on)
        begun = self._admitted()
        for places in lanes_of([pen.length for pen in begun], self._room):
            lane, pens = Lane(self._writer, self._pad_id), [begun[place] for place in places]
            self._lanes.append(lane)
            over |= self._passed(lane, pens, partial(lane.begin, pens))
        self._lanes = [lane for lane in self._lanes if lane.pens]
        return over | self._arrange() if begun or over else over

    def _passed(self, lane: Lane, pens: Sequence[Pen], write: Callable[[], Over]) -> Over:
        """What becomes of a lane's rows in a pass; where it fails, the lane is gone."""
        try:
            return write()
        except Exception as error:
            self._lanes.remove(lane)
            return self._failed(list(pens), error)

    def _failed(self, pens: list[Pen], error: Exception) -> Over:
        """Have rows of which nothing is left but their tokens read again. A row that fails alone is over,
        unless it may be for the memory that others have."""
        error = error.with_traceback(None)  # whose frames hold all that the pass had made
        over: Over = {pen: None for pen in pens if pen.ended}
        pens = [pen for pen in pens if not pen.ended]
        is_memory = ran_out_of_memory(error)
        log.warning("a pass of %d rows failed: %s: %.300s", len(pens), type(error).__name__, error)
        if is_memory:
            used = self.columns + sum(pen.length for pen in pens)
            self._calm, self._room = 0, max(1, min(self._room, used) // 2)
            torch.cuda.empty_cache()  # does nothing without a GPU
        if len(pens) > 1:
            half = len(pens) // 2
            self._apart.extendleft((pens[half:], pens[:half]))
        elif is_memory and self._lanes:  # they make room for it, and it is over if it fails once more
            writing = self._writing
            self._waiting.extendleft(pen for pen in reversed(self._open) if pen in writing)
            self._lanes = []
            self._apart.appendleft(pens)
        else:
            over |= dict.fromkeys(pens, error)
        return over

    def _grow(self) -> Over:
        """See to it that every row has room for a token more: in more lanes, or those that came last leave."""
        self._calm += 1
        if self._room < self._room_max and self._calm % CALM_STEPS == 0:
            self._room = min(self._room_max, 2 * self._room)
        pens = self._writing
        if self.columns + len(pens) <= self._room or not self._empty.is_joined:
            return {}
        stay = [pen for pen in self._open if pen in pens]
        while len(stay) > 1 and not self._has_room(stay):
            self._waiting.appendleft(stay.pop())
        try:
            parts = [(lane, [pen for pen in lane.pens if pen in stay]) for lane in self._lanes]
            self._lanes = [lane.only(some) for lane, some in parts if some]
        except Exception as error:
            self._lanes = []
            return self._failed(stay, error)
        return self._arrange()

    def _arrange(self) -> Over:
        """Have the rows in as few lanes as have room."""
        pens, before = list(self._writing), self._lanes
        groups = lanes_of([pen.length + SPARE for pen in pens], self._room)
        has_room = self.columns + len(pens) <= self._room
        if not self._empty.is_joined or (has_room and len(groups) >= len(before)):
            return {}
        self._lanes = []
        try:
            for group in groups:
                chosen = {pens[place] for place in group}
                parts = [(lane, [pen for pen in lane.pens if pen in chosen]) for lane in before]
                first, *others = [lane.only(some) for lane, some in parts if some]
                for other in others:
                    first.join(other)
                self._lanes.append(first)
        except Exception as error:
            self._lanes = []
            return self._failed(pens, error)
        return {}

    def _admitted(self) -> list[Pen]:
        """Those that wait and that there is room for, in their order: rows that failed by themselves."""
        pens = list(self._writing)
        if pens and not self._empty.is_joined:
            return []
        if self._apart:
            return self._apart.popleft() if not pens or self._has_room([*pens, *self._apart[0]]) else []
        found = list[Pen]()
        while self._waiting and len(pens) < self._rows_max:
            pens.append(self._waiting[0])
            if len(pens) > 1 and not self._has_room(pens):
                break
            found.append(self._waiting.popleft())
        return found

    @property
    def _writing(self) -> dict[Pen, None]:
        return dict.fromkeys(pen for lane in self._lanes for pen in lane.pens)

    def _has_room(self, pens: Sequence[Pen]) -> bool:
        """Whether rows can be written beside each other for a while. Rows that no other joins or leaves need all their
        room at once."""
        if not self._empty.is_joined:
            return len(pens) * max(pen.longest for pen in pens) <= self._room
        lengths = [pen.length + min(SPARE, pen.longest - pen.length) for pen in pens]
        return sum(len(lane) * lengths[lane[0]] for lane in lanes_of(lengths, self._room)) <= self._room
