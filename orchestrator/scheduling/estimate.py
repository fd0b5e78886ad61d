"""When a waiting task would start, as an interval that should hold in four of five cases. Pure; no guess where nothing
is known.

Two steps. What is known: each task before it takes as long as one of the last tasks took here, drawn at random, on the
place that is free first; that is done many times over. What is not known (who will come and go first, how work
changes): the estimates that were told before are compared with when those tasks did start, and the interval is moved
and widened by what they missed.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from orchestrator.scheduling.fair_share import Running, Waiting

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
NEAR = 60
"""Number of those that correct one estimate: the ones that were most like it."""
MARGIN = 0.06
"""Share by which more starts than promised should fall inside: of the last ones half miss the promise by chance."""
GAIN = 2.0
"""How strongly the interval is widened for each start too few inside: twice as far as the shortfall, so that a few
dozen starts are enough when work has changed."""
GRAIN_SECONDS = 5.0
"""Seconds that nobody can promise: a start that is told for now is right if it comes within them."""


@dataclass(frozen=True)
class Pace:
    """How long a task has its worker here."""

    seconds: float
    """The median, from the claim to the adapter."""
    count: int
    """Number of tasks that it is the median of."""
    spans: tuple[float, ...] = ()
    """What each of them took, in rising order."""


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


@dataclass(frozen=True)
class Told:
    """An estimate that somebody was told, and when the task did start."""

    seconds: float
    """Its `drawn`."""
    took: float
    """Seconds until it started; of one that has not, the seconds for which it has waited longer than was estimated."""
    inside: bool | None = None
    """Whether it started in the interval that was told; None: it has not started."""


def pace_of(spans: Iterable[float]) -> Pace | None:
    """The pace of tasks that ended. None without any: then it is not known.

    Args:
        spans: Seconds that each task had its worker.
    """
    known = sorted(span for span in spans if span >= 0)
    return Pace(statistics.median(known), len(known), tuple(known)) if known else None


def estimate_starts(
    line: Sequence[Waiting],
    running: Sequence[Running],
    free: int,
    pace: Pace | None,
    told: Sequence[Told] = (),
    *,
    now: float,
    asked: Collection[str] | None = None,
) -> dict[str, Estimate]:
    """When tasks of a line start, if all of it start one after another.

    Args:
        line: Tasks of one pool in their running order.
        running: What runs now in that pool. What does not say when it ends takes as long as one of the last tasks that
            took longer than it has by now.
        free: Places that are free now.
        told: Earlier estimates of which it is known how they ended, oldest first.
        now: Unix seconds, as `since` of what runs.
        asked: Ids of the tasks; default: all.

    Returns:
        Task id to its estimate. Left out where it is not known: too few places, no task to know the pace from, or too
        many tasks before it.

    Cost:
        O(n·DRAWS·log places) for the n in `line`, `DEPTH_MAX` at most, and O(KNOWN_MAX·log KNOWN_MAX) for each asked.
    """
    places = free + sum(order.ranks for order in running)
    if pace is None or not pace.spans or not places:
        return {}
    rng = random.Random(len(line))  # the same question has the same answer
    near = line[:DEPTH_MAX]
    futures = [_starts(near, running, free, pace, now, rng) for _ in range(DRAWS)]
    known = [(_log(one.seconds), _log(one.took)) for one in told[-KNOWN_MAX:]]
    tail = tail_of(told)
    found = {}
    for number, task in enumerate(near):
        if task.ranks <= places and (asked is None or task.task_id in asked):
            drawn = sorted(starts[number] for starts in futures)
            found[task.task_id] = _corrected(drawn, known, tail)
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


def _corrected(drawn: Sequence[float], known: Sequence[tuple[float, float]], tail: float) -> Estimate:
    """The estimate from the starts that were drawn, moved and widened by what those like it missed.

    Its interval then holds as often as it would have held for them, whatever they missed it for, as long as the future
    is like the past (split conformal prediction: Vovk et al., Algorithmic Learning in a Random World, 2005).

    Args:
        known: Logarithms of what was estimated and what it took, of earlier estimates.
    """
    drawn_median = drawn[len(drawn) // 2]
    level = _log(drawn_median)
    like = sorted(known, key=lambda one: abs(one[0] - level))[:NEAR]
    missed = sorted([took - estimated for estimated, took in like] + (PRIOR if len(like) < KNOWN_MIN else []))
    below = math.floor(tail * (len(missed) + 1)) - 1
    low, median, high = (
        _seconds(level + missed[place]) for place in (max(0, below), len(missed) // 2, min(-1, -1 - below))
    )
    if len(like) < KNOWN_MIN:
        low = min(low, drawn[int(tail * len(drawn))])
        high = max(high, drawn[min(len(drawn) - 1, int((1 - tail) * len(drawn)))])
    return Estimate(median, low, high + GRAIN_SECONDS, drawn_median)


def _starts(
    line: Sequence[Waiting], running: Sequence[Running], free: int, pace: Pace, now: float, rng: random.Random
) -> list[float]:
    """Seconds until each task starts, in one future."""
    ends = [0.0] * free
    for order in running:
        ends += [_left(order, pace, now, rng)] * order.ranks
    ends.sort()
    found = []
    for task in line:
        if task.ranks > len(ends):
            found.append(math.inf)  # it never fits
            continue
        start = ends[task.ranks - 1]
        found.append(start)
        end = start + rng.choice(pace.spans)
        del ends[: task.ranks]
        at = bisect.bisect(ends, end)
        ends[at:at] = [end] * task.ranks
    return found


def _left(order: Running, pace: Pace, now: float, rng: random.Random) -> float:
    if order.stops:
        return 0.0
    if order.seconds_left is not None:
        return max(0.0, order.seconds_left)
    ran = now - order.since
    longer = pace.spans[bisect.bisect(pace.spans, ran) :]
    return rng.choice(longer) - ran if longer else 0.0


def _log(seconds: float) -> float:
    return math.log(seconds + GRAIN_SECONDS)


def _seconds(level: float) -> float:
    return max(0.0, math.exp(level) - GRAIN_SECONDS)


def late(estimate: Estimate, waited: float) -> Told | None:
    """What is known already of an estimate whose task has not started: that it took longer, where it has."""
    return Told(estimate.drawn, waited) if waited > estimate.drawn else None


def started(estimate: Estimate, waited: float) -> Told:
    """What is known of an estimate whose task has started."""
    return Told(estimate.drawn, waited, estimate.earliest <= waited <= estimate.latest)


def ends(start: Estimate, pace: Pace) -> Estimate:
    """When a task ends that starts then: trained, not merged or scored."""
    spans = pace.spans or (pace.seconds,)
    low, high = (spans[int(share * (len(spans) - 1))] for share in (0.1, 0.9))
    return Estimate(start.seconds + pace.seconds, start.earliest + low, start.latest + high, start.drawn + pace.seconds)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as precise as an estimate is."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
