"""Events as they come, to everybody who listens: one reader of the database feeds all streams of a process.

The newest events are in memory. A stream that is further behind reads the database, as far as its listener takes what
is sent, so a slow listener costs no memory and misses nothing. Whoever goes on behind the number of the last event that
came has every event once: numbers grow in the order in which events are committed.

A stream is text in the form of server-sent events: each event has its number as `id` and JSON as `data`; silence is
filled with comments; and the last event is called `end` and holds the error for which the stream ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.errors import OnebasisError, Unavailable
from orchestrator.api.calls import END

if TYPE_CHECKING:
    from orchestrator.api.guard import Guard
    from orchestrator.tasks.task_rows import NamedEvent

log = logging.getLogger("onebasis.server")

Run = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Calls a function that waits for the database in a thread."""
Teams = frozenset[str] | None
"""Teams whose tasks somebody sees; None: all."""

POLL_SECONDS = 0.25
"""Pause between two looks at the database while anybody listens."""
HEARTBEAT_SECONDS = 2.0
"""Longest silence of a stream: below the time after which clients ask whether a silent server is alive."""
CHECK_SECONDS = 2.0
"""Interval at which a stream's token is looked up again: one that was revoked ends it."""
RECENT_MAX = 4000
"""Events in memory at most, half a kilobyte each."""
PAGE = 500
"""Events that are read at once."""
RETRY_MILLISECONDS = 1000
"""Pause that browsers are asked to make before they connect again."""
STREAMS_MAX = 300
"""Streams of a process: below its connections, so that others get an answer."""


@dataclass(frozen=True)
class Interest:
    """Which events somebody wants and may see."""

    task_id: str | None
    """Only those of this task."""
    of_teams: Teams
    kinds: frozenset[str]
    """Only those of these kinds; empty: of all."""

    def wants(self, event: NamedEvent) -> bool:
        is_mine = self.of_teams is None or event.team in self.of_teams
        return is_mine and self.task_id in (None, event.task_id) and (not self.kinds or event.kind in self.kinds)


@dataclass
class _Entry:
    """An event in memory, and what is sent of it, by the teams of those to whom it is sent."""

    event: NamedEvent
    texts: dict[Teams, bytes] = field(default_factory=dict)


class Feed:
    """See the module. Belongs to one event loop; streams go on when another control plane begins to lead.

    Args:
        guard: What shows events without other teams' tasks, at the moment. Raises Unavailable where nothing does.
        run: See `Run`.
        is_ending: Whether this process ends.
    """

    def __init__(self, guard: Callable[[], Guard], run: Run, is_ending: Callable[[], bool]) -> None:
        self._guard, self._run, self._is_ending = guard, run, is_ending
        self._listeners: Counter[Teams] = Counter()
        self._recent: list[_Entry] = []
        self._floor = self._newest = 0
        """All events behind the first number, up to the second, are in memory."""
        self._tick = asyncio.Event()
        """Set, and replaced, after each look at the database."""
        self._ended: OnebasisError | None = None
        self._beginning = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """Number of streams."""
        return self._listeners.total()

    async def stream(
        self, interest: Interest, after: int | None, teams: Teams, check: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[bytes]:
        """The events that somebody wants, as they are sent. The first piece comes at once and holds no event.

        Args:
            after: Number of the last event that is known; None: the newest one.
            teams: Teams of who listens.
            check: Looks up whether they may still listen. Raises why not.

        Raises:
            Unavailable: There are too many streams, or the database is away: instead of the first piece.
        """
        if self.count >= STREAMS_MAX:
            raise Unavailable(f"{STREAMS_MAX} streams are open, as many as may be", "events", "try again later")
        self._listeners[teams] += 1
        try:
            async with self._beginning:
                await self._begin()
            at = self._newest if after is None else after
            yield f"retry: {RETRY_MILLISECONDS}\nid: {at}\n\n".encode()
            sent = checked = time.monotonic()
            while True:
                tick, ended = self._tick, self._ended
                text, at = await self._next(interest, at, teams)
                now = time.monotonic()
                if text or now - sent >= HEARTBEAT_SECONDS:
                    yield text or f": nothing new\nid: {at}\n\n".encode()
                    sent = now
                if now - checked >= CHECK_SECONDS:
                    ended, checked = ended or await _refusal(check), now
                if ended is not None:
                    yield f"event: {END}\ndata: {_json(ended.as_dict())}\n\n".encode()
                    return
                if at >= self._newest:
                    await tick.wait()
        finally:
            self._listeners -= Counter([teams])
            if not self.count and self._reader is not None:
                self._reader.cancel()
                self._reader = None

    async def _begin(self) -> None:
        """Have the reader run."""
        if self._reader is not None and not self._reader.done():
            return
        self._newest = self._floor = await self._run(lambda: self._guard().queue.newest_event())
        self._recent, self._ended, self._tick = [], None, asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name="feed")

    async def _read(self) -> None:
        """Look for new events again and again."""
        try:
            while not self._is_ending():
                try:
                    self._keep(await self._run(partial(self._newer, tuple(self._listeners))))
                except OnebasisError as error:  # the database is away, and so is whatever could be told
                    log.debug("no events: %s", error.sentence)
                self._wake()
                await asyncio.sleep(POLL_SECONDS)
            self._ended = Unavailable("the control plane ends", "events", "ask again, behind the last event that came")
        except Exception as error:
            log.exception("streams end")
            self._ended = OnebasisError(f"internal error: {type(error).__name__}", "events", "see control-plane.log")
        self._wake()

    def _wake(self) -> None:
        tick, self._tick = self._tick, asyncio.Event()
        tick.set()

    def _newer(self, teams: Collection[Teams]) -> list[_Entry]:
        """What happened since the last look, and its text for these teams. Waits for the database."""
        entries = [_Entry(event) for event in self._guard().queue.told(self._newest, PAGE)]
        for some in teams:
            self._show(entries, some)
        return entries

    def _show(self, entries: list[_Entry], teams: Teams) -> None:
        """Make the text of events for teams, where it is not there and may be sent to them."""
        unseen = [one for one in entries if teams not in one.texts and (teams is None or one.event.team in teams)]
        if unseen:
            for entry, text in zip(unseen, self._texts([one.event for one in unseen], teams), strict=True):
                entry.texts[teams] = text

    def _texts(self, events: list[NamedEvent], teams: Teams) -> list[bytes]:
        told = self._guard().show(events, teams)
        return [f"id: {one['event_id']}\ndata: {_json(one)}\n\n".encode() for one in told]

    def _keep(self, entries: list[_Entry]) -> None:
        if not entries:
            return
        self._recent += entries
        self._newest = entries[-1].event.event_id
        if len(self._recent) > RECENT_MAX:
            half = RECENT_MAX // 2
            self._floor = self._recent[-half - 1].event.event_id
            self._recent = self._recent[-half:]

    async def _next(self, interest: Interest, at: int, teams: Teams) -> tuple[bytes, int]:
        """What follows on an event, as one text, and the number of the last event that was looked at."""
        if at >= self._floor:
            newest, begin = self._newest, bisect_right(self._recent, at, key=lambda entry: entry.event.event_id)
            found = [entry for entry in self._recent[begin:] if interest.wants(entry.event)]
            if any(teams not in entry.texts for entry in found):  # whoever listens has just come
                await self._run(partial(self._show, found, teams))
            return b"".join(entry.texts[teams] for entry in found), max(at, newest)
        newest = self._newest

        def page() -> tuple[bytes, int]:
            events = self._guard().queue.told(at, PAGE, until=newest, **vars(interest))
            return b"".join(self._texts(events, teams)), events[-1].event_id if len(events) == PAGE else newest

        try:
            text, last = await self._run(page)
        except OnebasisError:  # the database is away: asked again at the next look
            await asyncio.sleep(POLL_SECONDS)
            return b"", at
        return text, last


async def _refusal(check: Callable[[], Awaitable[None]]) -> OnebasisError | None:
    """Why somebody may not listen any more; None: they may, or nobody can say."""
    try:
        await check()
    except Unavailable:  # the database is away, so there is nothing to hear either
        return None
    except OnebasisError as error:
        return error
    return None


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
