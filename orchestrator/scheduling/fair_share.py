"""Whose turn it is. Pure: everything it needs comes in.

Between teams: least used first, where use is place-seconds, of which those with GPUs count more, decayed with a
half-life of seven days, divided by the team's weight; what runs is charged while it runs, and what was just given out
at once, so that one team's hundred tasks do not all start before the next team's first. A team that has its quota comes
after those that have not, and borrows what they leave. Inside a team: priority, then age.

A place is room for one rank. In a pool whose workers have one rank, a place is a worker.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from configs.settings import DEFAULT_POOL, TeamSettings

HALF_LIFE_SECONDS = 7 * 24 * 3600.0
"""Half-life of past use: long enough that a week of heavy use counts next week; Slurm's default, which people know."""
STEADY_WEEKS = 1 / math.log(2)
"""Decayed sum, in weeks, of one place that has always been in use: a quota of a week's hours is reached where the
decayed use is this many times the quota."""
CHARGE_SECONDS = 60.0
"""Seconds charged for each place at the start, until the true cost is known: about one short task."""

GPU_WORTH = 9.0
"""GPU-seconds count this many times beside place-seconds: a place with a whole GPU counts as ten without. Rented, it
costs ten to twenty times as much."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A task that waits for places."""

    task_id: str
    team: str
    priority: int
    submitted_at: float
    pool: str = DEFAULT_POOL
    """Pool whose places it takes."""
    ranks: int = 1
    """Places that it takes, all at once."""
    gpus: float = 0.0
    """GPUs of each of them."""
    seconds_max: float | None = None
    """Longest that it may run once it has started; None: not known."""
    preempted_at: float | None = None
    """When its last attempt had to give its places back; None: its last attempt, if any, ended otherwise."""
    rows: float = 0.0
    """Rows that it is to be trained on, one as often as it is read; 0: not known. For estimates alone."""
    method: str = ""
    """Method that it asks for. For estimates alone."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """Worker-seconds that one order used, and when it ended."""

    team: str
    seconds: float
    ended_at: float
    places: int = 1
    """Places of the worker, each of which is charged."""
    gpus: float = 0.0
    """GPUs of each of them."""


@dataclass(frozen=True)
class Running:
    """An order that a worker has now."""

    team: str
    since: float
    least_seconds: float = CHARGE_SECONDS
    """Seconds charged from the first moment on; then the time it has run, once that is more."""
    task_id: str = ""
    """Task whose attempt it is; empty for what is done for a version, which is not preempted."""
    pool: str = DEFAULT_POOL
    ranks: int = 1
    """Places that it has."""
    gpus: float = 0.0
    """GPUs of each of them."""
    seconds_left: float | None = None
    """Seconds until it ends; None: not known."""
    stops: bool = False
    """Whether it was told to stop: its places come back with its next checkpoint."""
    was_preempted: bool = False
    """Whether the attempt before this one had to give its places back: this one is left alone for a while."""
    seconds_max: float | None = None
    """Longest that it may run; None: not known. This and what follows is for estimates alone."""
    rows: float = 0.0
    """Rows that it is trained on; 0: not known."""
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a team may have."""

    weight: float = 1.0
    """Share of all places, relative to the weights of the other teams."""
    places: int | None = None
    """Quota of places at once; None: none is set, and the team is never over it."""
    place_seconds_a_week: float | None = None
    """Quota of place-seconds in a week, on average; None: none is set."""
    gpu_seconds_a_week: float | None = None
    """Quota of GPU-seconds in a week, on average; None: none is set."""


@dataclass(frozen=True)
class DecayedSum:
    """Place-seconds and GPU-seconds of a team, each halved for every seven days from its end to `at`.

    One number stands for all uses so far: the same decay works on all of them alike.
    """

    seconds: float = 0.0
    at: float = 0.0
    gpu_seconds: float = 0.0

    def at_time(self, now: float) -> float:
        """Place-seconds at a time; not decayed if the clock went back."""
        return self.seconds * self._left(now)

    def gpus_at_time(self, now: float) -> float:
        """GPU-seconds at a time."""
        return self.gpu_seconds * self._left(now)

    def _left(self, now: float) -> float:
        return float(0.5 ** (max(0.0, now - self.at) / HALF_LIFE_SECONDS))

    def plus(self, use: Use) -> DecayedSum:
        """The sum with one more use. In any order of the uses the sum is the same."""
        newest, seconds = max(self.at, use.ended_at), use.seconds * use.places
        more = DecayedSum(seconds, use.ended_at, seconds * use.gpus)
        return DecayedSum(
            self.at_time(newest) + more.at_time(newest), newest, self.gpus_at_time(newest) + more.gpus_at_time(newest)
        )


def running_seconds(running: Iterable[Running], now: float) -> dict[str, float]:
    """Place-seconds per team of the orders that have not ended: a task of ten hours counts before it is done."""
    return _summed((order.team, _charged_seconds(order, now)) for order in running)


def running_gpu_seconds(running: Iterable[Running], now: float) -> dict[str, float]:
    """The same in GPU-seconds."""
    return _summed((order.team, order.gpus * _charged_seconds(order, now)) for order in running)


def _charged_seconds(order: Running, now: float) -> float:
    return order.ranks * max(order.least_seconds, now - order.since)


def _summed(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for team, seconds in parts:
        total[team] = total.get(team, 0.0) + seconds
    return total


def running_order(
    waiting: Iterable[Waiting],
    use_seconds: Mapping[str, float],
    running: Iterable[Running] = (),
    shares: Mapping[str, Share] | None = None,
    *,
    now: float,
    limit: int | None = None,
    gpu_seconds: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """The order in which waiting tasks would start if nothing else arrived and nothing ended.

    Args:
        waiting: In any order.
        use_seconds: Decayed use per team, in place-seconds.
        running: What runs now, and is charged.
        shares: Share per team; a team without one has the weight 1 and no quota.
        limit: Number of ids to return; default: all. `waiting` then needs only each team's first `limit`.
        gpu_seconds: Decayed use per team, in GPU-seconds.

    Returns:
        Task ids, next first. A task's index + 1 is its place in the queue.

    Cost:
        O(n·log n) for the n in `waiting`.
    """
    turns = Turns(waiting, use_seconds, running, shares or {}, now, gpu_seconds or {})
    return tuple(itertools.islice((task.task_id for task in turns.all()), limit))


class Turns:
    """The teams' lines as one: each time the team with the least load is next. For one decision, which changes it.

    Args:
        As `running_order`.
    """

    def __init__(
        self,
        waiting: Iterable[Waiting],
        use_seconds: Mapping[str, float],
        running: Iterable[Running],
        shares: Mapping[str, Share],
        now: float,
        gpu_seconds: Mapping[str, float],
    ) -> None:
        running = tuple(running)
        self._shares = shares
        self._lines: dict[str, list[Waiting]] = {}
        for task in sorted(waiting, key=lambda t: (-t.priority, t.submitted_at, t.task_id)):
            self._lines.setdefault(task.team, []).append(task)
        at_work, gpus_at_work = running_seconds(running, now), running_gpu_seconds(running, now)
        teams = {*self._lines, *at_work}
        self._places = {team: use_seconds.get(team, 0.0) + at_work.get(team, 0.0) for team in teams}
        """Place-seconds of each team, decayed use and what runs."""
        self._gpus = {team: gpu_seconds.get(team, 0.0) + gpus_at_work.get(team, 0.0) for team in teams}
        """The same in GPU-seconds."""
        self.load = {team: self._places[team] + GPU_WORTH * self._gpus[team] for team in teams}
        """What the teams are compared by: place-seconds, those with GPUs counting more."""
        self.held: dict[str, int] = {}
        """Places that each team has."""
        for order in running:
            self.held[order.team] = self.held.get(order.team, 0) + order.ranks
        self._spent = {team for team in self.load if self._is_spent(team)}
        self._place = dict.fromkeys(self._lines, 0)
        self._heads = [self._entry(team) for team in self._lines]
        heapq.heapify(self._heads)

    def next(self) -> Waiting | None:
        """The task whose turn it is; None when all have had theirs."""
        while self._heads:
            entry = self._heads[0]
            team = entry[-1]
            if self._place[team] == len(self._lines[team]):
                heapq.heappop(self._heads)
            elif entry != (
                now := self._entry(team)
            ):  # its load, or its first task, is another one by now: it goes back
                heapq.heapreplace(self._heads, now)
            else:
                return self._task(team)
        return None

    def take(self, task: Waiting) -> None:
        """A task starts, in its turn or before: its team is charged."""
        self.load[task.team] += CHARGE_SECONDS * task.ranks * (1 + GPU_WORTH * task.gpus)
        self.promise(task)
        self.skip(task)

    def promise(self, task: Waiting) -> None:
        """Places that come back are a task's: its team has them as far as its quota goes."""
        self.held[task.team] = self.held.get(task.team, 0) + task.ranks

    def skip(self, task: Waiting) -> None:
        """A task is no longer in line."""
        line, place = self._lines[task.team], self._place[task.team]
        if task is line[place]:
            self._place[task.team] += 1
        else:
            line.remove(task)

    def all(self) -> Iterator[Waiting]:
        """All tasks, each started when it is its turn."""
        while (task := self.next()) is not None:
            yield task
            self.take(task)

    def borrows(self, task: Waiting) -> bool:
        """Whether the task, started now, would take its team beyond its quota."""
        quota = self._share(task.team).places
        return task.team in self._spent or (quota is not None and self.held.get(task.team, 0) + task.ranks > quota)

    def excess(self, team: str) -> float:
        """Places that a team has beyond its quota; none where it has no quota, all where its week is used up."""
        held, quota = self.held.get(team, 0), self._share(team).places
        if team in self._spent:
            return held
        return 0 if quota is None else max(0, held - quota)

    def _is_spent(self, team: str) -> bool:
        share = self._share(team)
        quotas = (self._places[team], share.place_seconds_a_week), (self._gpus[team], share.gpu_seconds_a_week)
        return any(quota is not None and used >= quota * STEADY_WEEKS for used, quota in quotas)

    def _share(self, team: str) -> Share:
        return self._shares.get(team, _NO_SHARE)

    def _task(self, team: str) -> Waiting:
        return self._lines[team][self._place[team]]

    def _entry(self, team: str) -> tuple[bool, float, float, str]:
        # Equal load: the team whose first task has waited longest.
        task = self._task(team)
        return self.borrows(task), self.load[team] / self._share(team).weight, task.submitted_at, team


_NO_SHARE = Share()


def shares_of(teams: Mapping[str, TeamSettings]) -> dict[str, Share]:
    """What the settings let each team have."""
    return {
        team: Share(
            weight=settings.weight,
            places=settings.places,
            place_seconds_a_week=None if (hours := settings.place_hours_a_week) is None else 3600 * hours,
            gpu_seconds_a_week=None if (hours := settings.gpu_hours_a_week) is None else 3600 * hours,
        )
        for team, settings in teams.items()
    }
