"""Which waiting task goes next. Pure: everything it needs comes in, one ordered list goes out.

Between teams: least used first, where use is worker-seconds decayed with a half-life of seven days, divided by
the team's weight; what runs is charged while it runs, and what was just given out at once, so that one team's hundred
tasks do not all start before the next team's first. Inside a team: priority, then age.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

HALF_LIFE_SECONDS = 7 * 24 * 3600.0
"""Half-life of past use: long enough that a week of heavy use counts next week; Slurm's default, which people know."""
CHARGE_SECONDS = 60.0
"""Worker-seconds charged at the start, until the true cost is known: about one short task."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A task that waits for a worker."""

    task_id: str
    team: str
    priority: int
    submitted_at: float


@dataclass(frozen=True, kw_only=True)
class Use:
    """Worker-seconds that one order used, and when it ended."""

    team: str
    seconds: float
    ended_at: float


@dataclass(frozen=True)
class Running:
    """An order that a worker has now."""

    team: str
    since: float
    least_seconds: float = CHARGE_SECONDS
    """Worker-seconds charged from the first moment on; then the time it has run, once that is more."""


@dataclass(frozen=True)
class DecayedSum:
    """Worker-seconds of a team, each halved for every seven days from its end to `at`.

    One number stands for all uses so far: the same decay works on all of them alike.
    """

    seconds: float = 0.0
    at: float = 0.0

    def at_time(self, now: float) -> float:
        """Value at a time; not decayed if the clock went back."""
        return float(self.seconds * 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_SECONDS))

    def plus(self, use: Use) -> DecayedSum:
        """The sum with one more use. In any order of the uses the sum is the same."""
        newest = max(self.at, use.ended_at)
        return DecayedSum(self.at_time(newest) + DecayedSum(use.seconds, use.ended_at).at_time(newest), newest)


def running_seconds(running: Iterable[Running], now: float) -> dict[str, float]:
    """Worker-seconds per team of the orders that have not ended: a task of ten hours counts before it is done."""
    total: dict[str, float] = {}
    for order in running:
        total[order.team] = total.get(order.team, 0.0) + max(order.least_seconds, now - order.since)
    return total


def running_order(
    waiting: Iterable[Waiting],
    use_seconds: Mapping[str, float],
    running: Mapping[str, float],
    weights: Mapping[str, float],
    limit: int | None = None,
) -> tuple[str, ...]:
    """The order in which waiting tasks would start if nothing else arrived.

    Args:
        waiting: In any order.
        use_seconds: Decayed use per team.
        running: Worker-seconds per team of what runs now, see `running_seconds`.
        weights: Share per team; a team without one counts 1.
        limit: Number of ids to return; default: all. `waiting` then needs only each team's first `limit`.

    Returns:
        Task ids, next first. A task's index + 1 is its place in the queue.

    Cost:
        O(n·log n) for the n in `waiting`.
    """
    lines: dict[str, list[Waiting]] = {}
    for task in sorted(waiting, key=lambda t: (-t.priority, t.submitted_at, t.task_id)):
        lines.setdefault(task.team, []).append(task)
    return tuple(itertools.islice(_merged(lines, use_seconds, running, weights), limit))


def _merged(
    lines: Mapping[str, list[Waiting]],
    use_seconds: Mapping[str, float],
    running: Mapping[str, float],
    weights: Mapping[str, float],
) -> Iterator[str]:
    """The teams' lines as one: each time the team with the least load gives its next."""
    load = {team: use_seconds.get(team, 0.0) + running.get(team, 0.0) for team in lines}

    def entry(team: str, place: int) -> tuple[float, float, str, int]:
        # Equal load: the team whose first task has waited longest.
        return load[team] / weights.get(team, 1.0), lines[team][place].submitted_at, team, place

    heads = [entry(team, 0) for team in lines]
    heapq.heapify(heads)
    while heads:
        _, _, team, place = heads[0]
        yield lines[team][place].task_id
        load[team] += CHARGE_SECONDS
        if place + 1 < len(lines[team]):
            heapq.heapreplace(heads, entry(team, place + 1))
        else:
            heapq.heappop(heads)
