"""Weeks of arrivals to simulate: the tests' and the benchmark's."""

from __future__ import annotations

import random

from orchestrator.scheduling.arrivals import Arrival

WEEK = 7 * 24 * 3600.0
TEAMS = 6


def weeks(
    seed: int, hours: float, weeks: float = 2.0, ranks: tuple[int, ...] = (1,), per_week: float = 300.0
) -> tuple[Arrival, ...]:
    """Arrivals of six teams by day, each team as many, with tasks of very different lengths.

    Args:
        hours: Mean length of a task.
        ranks: Sizes, each as likely.
    """
    rng = random.Random(seed)
    found = []
    for team in range(TEAMS):
        at = 0.0
        while (at := at + rng.expovariate(2 * per_week / TEAMS / WEEK)) < weeks * WEEK:
            if 8 <= at % 86400 / 3600 < 20:
                seconds = 3600 * hours * rng.lognormvariate(-0.5, 1.0)
                found.append(
                    Arrival(
                        at_seconds=at,
                        team=f"team-{team}",
                        seconds=seconds,
                        ranks=rng.choice(ranks),
                        max_run_seconds=seconds * rng.uniform(1.0, 2.0),
                    )
                )
    return tuple(sorted(found, key=lambda one: one.at_seconds))
