"""Which waiting task goes next. Pure: everything it needs comes in, one ordered list goes out.

Between teams: least used first, where use is worker-seconds decayed with a half-life of seven days, divided by
the team's weight; whoever is running or was just admitted is charged at once, so that one team's hundred tasks do
not all start before the next team's first. Inside a team: priority, then age.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

HALF_LIFE_SECONDS = 7 * 24 * 3600.0
"""Long enough that a week of heavy use counts next week; the default of the schedulers people know (Slurm)."""
CHARGE_SECONDS = 60.0
"""Charged at admission until the true cost is known: of the order of one short task."""


@dataclass(frozen=True)
class Waiting:
    """A task that waits for a worker."""

    task_id: str
    team: str
    priority: int
    submitted_at: float


@dataclass(frozen=True)
class Use:
    """Worker-seconds that a team has used, and when they ended."""

    team: str
    seconds: float
    ended_at: float


def decayed_use(uses: Iterable[Use], now: float) -> dict[str, float]:
    """Worker-seconds per team, halved for every seven days since."""
    total: dict[str, float] = {}
    for use in uses:
        age = max(0.0, now - use.ended_at)
        total[use.team] = total.get(use.team, 0.0) + use.seconds * 0.5 ** (age / HALF_LIFE_SECONDS)
    return total


def running_order(
    waiting: Sequence[Waiting],
    use_seconds: Mapping[str, float],
    running: Mapping[str, int],
    weights: Mapping[str, float],
) -> tuple[str, ...]:
    """The order in which waiting tasks would start if nothing else arrived.

    Args:
        waiting: In any order.
        use_seconds: Decayed use per team.
        running: Tasks that run now, per team; each is charged.
        weights: Share per team; a team without one counts 1.

    Returns:
        Task ids, next first. A task's index + 1 is its place in the queue.

    Cost:
        O(n·teams) after sorting.
    """
    lines: dict[str, list[Waiting]] = {}
    for task in sorted(waiting, key=lambda t: (-t.priority, t.submitted_at, t.task_id)):
        lines.setdefault(task.team, []).append(task)
    load = {t: use_seconds.get(t, 0.0) + CHARGE_SECONDS * running.get(t, 0) for t in lines}
    order: list[str] = []
    heads = dict.fromkeys(lines, 0)
    while heads:
        # Equal load: the team whose first task has waited longest.
        team = min(heads, key=lambda t: (load[t] / weights.get(t, 1.0), lines[t][heads[t]].submitted_at, t))
        order.append(lines[team][heads[team]].task_id)
        load[team] += CHARGE_SECONDS
        heads[team] += 1
        if heads[team] == len(lines[team]):
            del heads[team]
    return tuple(order)
