"""When a waiting task would start, as an interval that should hold in four of five cases. Pure; no guess where nothing
is known.

Two steps. What is known: each task before it takes as long as one of the last tasks took here, drawn at random, on the
place that is free first; that is done many times over. Of a task whose rows are counted, it is what it would take for
as many rows, and no task takes longer than it may. What is not known (who will come and go first, how work
changes): the estimates that were told before are compared with when those tasks did start, and the interval is moved
and widened by what they missed. Those whose tasks still wait count as well: where there is too little for all, what has
started already is what went quickly.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from orchestrator.scheduling.fair_share import Running, Share, Waiting
from orchestrator.scheduling.scheduler import borrows_from

SHARE_INSIDE = 0.8
"""Share of starts that should fall into the interval that was told."""
DRAWS = 30
"""Number of times that the future is drawn: the ends of the interval are then known to a few of a hundred."""
DEPTH_MAX = 1000
"""Longest line for whose last task a start is estimated: what is behind a thousand tasks starts nobody knows when."""
KNOWN_MIN = 30
"""Number of estimates of which it is known how they ended, from which on nothing but them counts."""
PRIOR = [math.log(factor) for factor in (1 / 3, 1 / 2, 2 / 3, 0.8, 1.0, 1.0, 1.25, 1.5, 2.0, 3.0)]
"""What estimates miss before anything is known, as logarithms of factors: who comes later and goes first makes a start
three times as late as easily as who is cancelled makes it earlier."""
KNOWN_MAX = 400
"""Number of those that count, the newest: work changes."""
NEAR_TASKS = 10
"""Number of tasks that ended from which the length of one is estimated: those of the most similar number of rows."""
NEAR = 60
"""Number of those that correct one estimate: the ones that were most like it, and what still waits among them."""
MARGIN = 0.06
"""Share by which more starts than promised should fall inside: of the last ones half miss the promise by chance."""
GAIN = 1.0
"""How strongly the interval is widened for each start too few inside: by the shortfall, at either end."""
EPSILON = 1e-9
"""Share that is lost where shares are multiplied."""
GRAIN_SECONDS = 5.0
"""Seconds that nobody can promise: a start that is told for now is right if it comes within them."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """How long one task had its worker here."""

    seconds: float
    """From the claim to the adapter."""
    rest: float = 0.0
    """Those of them that do not grow with its rows: until its first step."""
    rows: float = 0.0
    """Rows that it was to take, one as often as it is read; 0: not known."""
    method: str = ""
    """Method that it asked for: `auto` takes its rows several times."""

    def of(self, rows: float) -> float:
        """What a task of so many rows would take."""
        return self.rest + max(0.0, self.seconds - self.rest) * rows / self.rows


@dataclass(frozen=True)
class Pace:
    """How long a task has its worker here."""

    seconds: float
    """The median, from the claim to the adapter."""
    count: int
    """Number of tasks that it is the median of."""
    spans: tuple[float, ...] = ()
    """What each of them took, in rising order."""
    known: tuple[Span, ...] = ()
    """The same of those whose rows are known."""

    def of(self, task: Waiting | Running) -> Pace:
        """How long one task has its worker: by its rows, where they are known, and no longer than it may."""
        return self._for(task.rows, task.method, task.seconds_max)

    def _for(self, rows: float, method: str, seconds_max: float | None) -> Pace:
        return _limited(self._by_rows(rows, method), seconds_max)

    def _by_rows(self, rows: float, method: str) -> Pace:
        alike = [one for one in self.known if one.method == method] or self.known
        if not rows or not alike:
            return self
        near = sorted(alike, key=lambda one: abs(math.log(one.rows / rows)))[:NEAR_TASKS]
        spans = sorted(one.of(rows) for one in near)
        return Pace(statistics.median(spans), len(spans), tuple(spans))


@dataclass(frozen=True)
class Estimate:
    """When a task starts, in seconds from the moment at which this was told."""

    seconds: float
    """Median."""
    earliest: float
    """One of ten starts earlier."""
    latest: float
    """One of ten starts later."""
    drawn: float
    """Median before it was corrected by earlier estimates."""
    least: float = 0.0
    """Seconds before which it cannot start: no part of them is guessed, or corrected."""


@dataclass(frozen=True)
class Told:
    """An estimate that somebody was told, and when the task did start."""

    seconds: float
    """Its `drawn`, beyond its `least`."""
    took: float
    """Seconds until it started, beyond the same; of one that waits, the seconds so far."""
    inside: bool | None = None
    """Whether it started in the interval that was told; None: it waits, and may yet."""
    waits: bool = False
    """Whether it has not started: it takes longer than `took`, and nobody knows how much."""


def _limited(pace: Pace, seconds_max: float | None) -> Pace:
    if seconds_max is None or not pace.spans or pace.spans[-1] <= seconds_max:
        return pace
    spans = tuple(min(span, seconds_max) for span in pace.spans)
    return Pace(statistics.median(spans), pace.count, spans)


def pace_of(spans: Iterable[Span | float]) -> Pace | None:
    """The pace of tasks that ended. None without any: then it is not known.

    Args:
        spans: How long each task had its worker, or the seconds alone.
    """
    found = [span if isinstance(span, Span) else Span(seconds=span) for span in spans]
    known = [span for span in found if span.seconds >= 0]
    if not known:
        return None
    seconds = sorted(span.seconds for span in known)
    return Pace(statistics.median(seconds), len(seconds), tuple(seconds), tuple(one for one in known if one.rows > 0))


def kept_from_borrowing(
    line: Sequence[Waiting], running: Sequence[Running], shares: Mapping[str, Share], now: float
) -> dict[str, float]:
    """Seconds for which tasks do not borrow, since they, or one before them in their team's line, gave their places
    back; less where their team is within its quota before.

    Args:
        line: Of any pools, in their running order.
        running: What runs, in all pools.
        now: Unix seconds, as `since` of what runs.
    """
    found: dict[str, float] = {}
    banned: dict[tuple[str, str], float] = {}
    for task in line:
        share, key = shares.get(task.team), (task.pool, task.team)
        if share is None:
            continue
        if key not in banned and (until := borrows_from(task)) > now:
            banned[key] = min(until - now, _within_quota(task, running, share.places))
        if seconds := banned.get(key):
            found[task.task_id] = seconds
    return found


def _within_quota(task: Waiting, running: Sequence[Running], quota: int | None) -> float:
    """Seconds until a task would not take its team beyond its quota of places, if its team starts nothing else."""
    if quota is None:
        return math.inf  # its week is used up
    held = sorted(((_told_left(order), order.ranks) for order in running if order.team == task.team), reverse=True)
    at, places = 0.0, sum(ranks for _, ranks in held) + task.ranks
    while places > quota and held:
        at, ranks = held.pop()
        places -= ranks
    return at if places <= quota else math.inf


def _told_left(order: Running) -> float:
    return 0.0 if order.stops else math.inf if order.seconds_left is None else max(0.0, order.seconds_left)


def estimate_starts(
    line: Sequence[Waiting],
    running: Sequence[Running],
    free: int,
    pace: Pace | None,
    told: Sequence[Told] = (),
    *,
    now: float,
    asked: Collection[str] | None = None,
    coming: Sequence[float] = (),
    kept: Mapping[str, float] | None = None,
    expected: Mapping[str, float] | None = None,
) -> dict[str, Estimate]:
    """When tasks of a line start, if all of it start one after another.

    Args:
        line: Tasks of one pool in their running order.
        running: What runs now in that pool. What does not say when it ends takes as long as one of the last tasks that
            took longer than it has by now.
        free: Places that are free now.
        told: Earlier estimates, oldest first, those whose tasks still wait last.
        now: Unix seconds, as `since` of what runs.
        asked: Ids of the tasks; default: all.
        coming: For each place that workers will have once they have loaded, the seconds until then.
        kept: Task id to the seconds for which it cannot start though there are places: others go first meanwhile.
        expected: The same where it is not sure, and could be less.

    Returns:
        Task id to its estimate. Left out where it is not known: too few places, no task to know the pace from, or too
        many tasks before it.

    Cost:
        O(n·DRAWS·log places) for the n in `line`, `DEPTH_MAX` at most, and O(KNOWN_MAX·log KNOWN_MAX) for each asked.
    """
    places = free + len(coming) + sum(order.ranks for order in running)
    if pace is None or not pace.spans or not places:
        return {}
    rng = random.Random(len(line))  # the same question has the same answer
    near = line[:DEPTH_MAX]
    own = cache(lambda rows, method, seconds_max: pace._for(rows, method, seconds_max).spans)
    spans = [own(task.rows, task.method, task.seconds_max) for task in near]
    runs = [(order, own(order.rows, order.method, order.seconds_max)) for order in running]
    there = [0.0] * free + list(coming)
    sure = kept or {}
    until = {**(expected or {})}
    for task_id, seconds in sure.items():
        until[task_id] = max(seconds, until.get(task_id, 0.0))
    futures = [_starts(near, spans, runs, there, until, now, rng) for _ in range(DRAWS)]
    known = [*[one for one in told if not one.waits][-KNOWN_MAX:], *(one for one in told if one.waits)]
    tail = tail_of(told)
    found = {}
    for number, task in enumerate(near):
        if task.ranks <= places and (asked is None or task.task_id in asked):
            drawn = sorted(starts[number] for starts in futures)
            found[task.task_id] = _corrected(drawn, known, tail, sure.get(task.task_id, 0.0))
    return found


def tail_of(told: Sequence[Told]) -> float:
    """Share of starts that is left out at each end of an interval: a tenth, or less while too few start inside.

    Source:
        The idea of Gibbs and Candès, Adaptive Conformal Inference Under Distribution Shift (arXiv:2106.00170): what is
        missed is a signal to widen, whatever the reason.
    """
    hits = [one.inside for one in told if one.inside is not None][-NEAR:]
    if len(hits) < len(PRIOR):
        return (1 - SHARE_INSIDE) / 2
    missing = max(0.0, SHARE_INSIDE + MARGIN - sum(hits) / len(hits))
    return max(0.0, (1 - SHARE_INSIDE) / 2 - GAIN * missing)


def _corrected(drawn: Sequence[float], known: Sequence[Told], tail: float, least: float) -> Estimate:
    """The estimate from the starts that were drawn, moved and widened by what those like it missed.

    Its interval then holds as often as it would have held for them, whatever they missed it for, as long as the future
    is like the past (split conformal prediction: Vovk et al., Algorithmic Learning in a Random World, 2005).

    Args:
        known: Earlier estimates.
        least: Seconds before which it cannot start.
    """
    drawn = [start - least for start in drawn]
    drawn_median = drawn[len(drawn) // 2]
    level = _log(drawn_median)
    like = _like(level, known)
    missed = [(_log(one.took) - _log(one.seconds), one.waits) for one in like]
    is_sure = sum(not one.waits for one in like) >= KNOWN_MIN
    shares = _shares(missed if is_sure else [*missed, *((factor, False) for factor in PRIOR)])
    step = 1 / len(shares)  # the one that is estimated is one more
    below = next((miss for miss, share in reversed(shares) if share <= tail * (1 + step) + EPSILON), shares[0][0])
    median, above = (
        next((miss for miss, share in shares if share >= least_share - EPSILON), shares[-1][0])
        for least_share in (0.5, (1 - tail) * (1 + step))
    )
    low, high = _seconds(level + below), _seconds(level + above)
    if not is_sure:
        low = min(low, drawn[int(tail * len(drawn))])
        high = max(high, drawn[min(len(drawn) - 1, int((1 - tail) * len(drawn)))])
    middle = _seconds(level + median)
    return Estimate(least + middle, least + low, least + high + GRAIN_SECONDS, least + drawn_median, least)


def _like(level: float, known: Sequence[Told]) -> list[Told]:
    """Of earlier estimates those that were most like one: so many that `NEAR` of them have started."""
    found, count = [], 0
    for one in sorted(known, key=lambda one: abs(_log(one.seconds) - level)):
        found.append(one)
        count += not one.waits
        if count == NEAR:
            break
    return found


def _shares(missed: Iterable[tuple[float, bool]]) -> list[tuple[float, float]]:
    """What was missed, in rising order, each with the share of all that miss it by that or less.

    Args:
        missed: With whether it is more than that, since the task still waits.

    Source:
        Kaplan and Meier, Nonparametric Estimation from Incomplete Observations, 1958.
    """
    ordered = sorted(missed)
    found, more = [], 1.0
    for place, (miss, is_more) in enumerate(ordered):
        more *= 1.0 if is_more else 1 - 1 / (len(ordered) - place)
        found.append((miss, 1 - more))
    return found


def _starts(
    line: Sequence[Waiting],
    spans: Sequence[Sequence[float]],
    running: Sequence[tuple[Running, Sequence[float]]],
    there: Sequence[float],
    kept: Mapping[str, float],
    now: float,
    rng: random.Random,
) -> list[float]:
    """Seconds until each task starts, in one future.

    Args:
        spans: For each task of the line what it may take, in rising order.
        running: What runs, with the same of it.
        there: Seconds until places are free that nothing runs on.
    """
    ends = list(there)
    for order, usual in running:
        ends += [_left(order, usual, now, rng)] * order.ranks
    ends.sort()
    found = [math.inf] * len(line)  # what never fits
    aside: list[tuple[float, int]] = []
    """Tasks that do not start yet, and from when on they do: the others have the places until then."""

    def give(number: int, at_least: float = 0.0) -> None:
        task = line[number]
        found[number] = start = max(at_least, ends[task.ranks - 1])
        end = start + rng.choice(spans[number])
        del ends[: task.ranks]
        at = bisect.bisect(ends, end)
        ends[at:at] = [end] * task.ranks

    for number, task in enumerate(line):
        if task.ranks > len(ends):
            continue
        while aside and aside[0][0] <= ends[line[aside[0][1]].ranks - 1]:
            give(heapq.heappop(aside)[1])
        if kept.get(task.task_id, 0.0) > ends[task.ranks - 1]:
            heapq.heappush(aside, (kept[task.task_id], number))
        else:
            give(number)
    while aside:
        at, number = heapq.heappop(aside)
        give(number, at)
    return found


def _left(order: Running, spans: Sequence[float], now: float, rng: random.Random) -> float:
    if order.stops:
        return 0.0
    if order.seconds_left is not None:
        return max(0.0, order.seconds_left)
    ran = now - order.since
    longer = spans[bisect.bisect(spans, ran) :]
    return rng.choice(longer) - ran if longer else 0.0


def _log(seconds: float) -> float:
    return math.log(seconds + GRAIN_SECONDS)


def _seconds(level: float) -> float:
    return max(0.0, math.exp(level) - GRAIN_SECONDS)


def waiting(estimate: Estimate, waited: float) -> Told:
    """What is known already of an estimate whose task has not started."""
    is_late = waited > estimate.latest
    return Told(*_beyond(estimate, waited), inside=False if is_late else None, waits=True)


def started(estimate: Estimate, waited: float) -> Told:
    """What is known of an estimate whose task has started."""
    return Told(*_beyond(estimate, waited), inside=estimate.earliest <= waited <= estimate.latest)


def _beyond(estimate: Estimate, waited: float) -> tuple[float, float]:
    return estimate.drawn - estimate.least, max(0.0, waited - estimate.least)


def ends(start: Estimate, pace: Pace) -> Estimate:
    """When a task ends that starts then: trained, not merged or scored. pace: The task's own, see `Pace.of`."""
    spans = pace.spans or (pace.seconds,)
    low, high = (spans[int(share * (len(spans) - 1))] for share in (0.1, 0.9))
    return Estimate(start.seconds + pace.seconds, start.earliest + low, start.latest + high, start.drawn + pace.seconds)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as precise as an estimate is."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
