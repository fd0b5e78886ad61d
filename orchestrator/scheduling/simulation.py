"""The real scheduler over weeks of arrivals, in seconds: what people would wait for under these settings.

Pure: arrivals and settings in, a report out. Time is a number that jumps from event to event: a task arrives, ends, or
has written the checkpoint for which it was told to stop. At each of them `decide` is handed what the loop of a service
would hand it, so a simulation shows what a service does, not what a model of it would.
"""

from __future__ import annotations

import bisect
import heapq
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.scheduling import estimate
from orchestrator.scheduling.arrivals import Arrival
from orchestrator.scheduling.estimate import Estimate, Told, pace_of
from orchestrator.scheduling.fair_share import POOL, DecayedSum, Running, Share, Use, Waiting, running_order
from orchestrator.scheduling.scheduler import LOOK, Decision, Pool, Situation, decide

CHECKPOINT_SECONDS = 30.0
"""Time from the word to stop to the checkpoint: a step, and an upload."""
TOLD_MAX = 500
"""Number of arrivals that are told an estimate, evenly among all: estimating is most of a simulation's work."""
PACE_TASKS = 50
"""Number of tasks, the newest that ended, from which the next ones are estimated; as in a service."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What became of one arrival."""

    arrival: Arrival
    started_at: float | None = None
    """First start; None: it never started."""
    ended_at: float | None = None
    preemptions: int = 0
    preempted_in_a_row: int = 0
    """Most of its attempts, one after another, that had to give their places back."""
    told: Estimate | None = None
    """Estimate at its arrival."""

    @property
    def wait_seconds(self) -> float | None:
        """From its arrival to its first start."""
        return None if self.started_at is None else self.started_at - self.arrival.at_seconds


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Everything that happened."""

    courses: tuple[Course, ...]
    """One for each arrival, in their order."""
    capacity: int
    shares: Mapping[str, Share]
    place_seconds: Mapping[str, float]
    """Place-seconds that each team used until the last arrival, while all of them could want places."""
    give_back_seconds: tuple[float, ...] = ()
    """For each task for which others were stopped: from the word to its start."""
    end_seconds: float = 0.0

    @property
    def last_arrival(self) -> float:
        return max((course.arrival.at_seconds for course in self.courses), default=0.0)


def simulate(arrivals: Sequence[Arrival], shares: Mapping[str, Share], capacity: int, seed: int = 0) -> Simulation:
    """Let the arrivals go through the scheduler until the last has ended.

    Args:
        arrivals: By time.
        capacity: Places of the one pool, all ready.
        seed: Of the errors with which running tasks say when they end.

    Returns:
        The same for the same arguments.

    Cost:
        A decision for each arrival and each end, some 0.1 ms for ten teams, and `TOLD_MAX` estimates of 1 ms for every
        ten tasks that wait.
    """
    return _World(arrivals, shares, capacity, seed).run()


@dataclass
class _Task:
    """A task that has arrived and has not ended."""

    number: int
    arrival: Arrival
    left: float
    """Seconds that it still has to run."""
    doubt: float
    """Factor by which it misjudges them."""
    since: float = 0.0
    """When its running attempt began."""
    attempt: int = 0
    stops: bool = False
    preempted_at: float | None = None
    in_a_row: int = 0

    @property
    def name(self) -> str:
        return str(self.number)


@dataclass
class _World:
    """The state of a simulation."""

    arrivals: Sequence[Arrival]
    shares: Mapping[str, Share]
    capacity: int
    seed: int
    now: float = 0.0
    decision: Decision = field(default_factory=Decision)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self._tasks = [
            _Task(number, arrival, arrival.seconds, rng.lognormvariate(0.0, 0.1))
            for number, arrival in enumerate(self.arrivals)
        ]
        self._courses = [Course(arrival=arrival) for arrival in self.arrivals]
        self._lines: dict[str, list[tuple[int, float, int, Waiting]]] = {}
        self._running: dict[str, _Task] = {}
        self._events: list[tuple[float, int, int, int]] = [
            (arrival.at_seconds, number, number, 0) for number, arrival in enumerate(self.arrivals)
        ]
        heapq.heapify(self._events)
        self._order = len(self._events)
        self._used: dict[str, DecayedSum] = {}
        self._until = max((arrival.at_seconds for arrival in self.arrivals), default=0.0)
        self._place_seconds: dict[str, float] = dict.fromkeys(
            {*self.shares, *(arrival.team for arrival in self.arrivals)}, 0.0
        )
        self._ended: list[float] = []
        self._told: list[Told] = []
        self._tell_each = max(1, -(-len(self.arrivals) // TOLD_MAX))
        self._asked: dict[int, Estimate] = {}
        """Estimates of tasks that have not started."""
        self._reclaims: dict[str, list[float]] = {}
        self._give_backs: list[float] = []

    def run(self) -> Simulation:
        while self._events:
            self.now = self._events[0][0]
            come = []
            while self._events and self._events[0][0] <= self.now:
                _, _, number, attempt = heapq.heappop(self._events)
                if number < 0:
                    continue  # only the time has come
                if attempt == 0:
                    come.append(self._tasks[number])
                    self._queue(self._tasks[number])
                elif attempt == self._tasks[number].attempt and self._tasks[number].name in self._running:
                    self._leave(self._tasks[number])
            self._tell(come)
            self._decide()
        return Simulation(
            courses=tuple(self._courses),
            capacity=self.capacity,
            shares=self.shares,
            place_seconds=self._place_seconds,
            give_back_seconds=tuple(self._give_backs),
            end_seconds=self.now,
        )

    # --- what happens --------------------------------------------------------------------------------------------

    def _queue(self, task: _Task) -> None:
        arrival = task.arrival
        waiting = Waiting(
            task_id=task.name,
            team=arrival.team,
            priority=arrival.priority,
            submitted_at=arrival.at_seconds,
            ranks=arrival.ranks,
            seconds_max=arrival.max_run_seconds,
            preempted_at=task.preempted_at,
        )
        line = self._lines.setdefault(arrival.team, [])
        bisect.insort(line, (-arrival.priority, arrival.at_seconds, task.number, waiting))

    def _leave(self, task: _Task) -> None:
        """A task has ended, or has written the checkpoint that it was told to write."""
        ran = self.now - task.since
        del self._running[task.name]
        team, ranks = task.arrival.team, task.arrival.ranks
        use = Use(team=team, seconds=ranks * ran, ended_at=self.now)
        self._used[team] = self._used.get(team, DecayedSum()).plus(use)
        self._place_seconds[team] += ranks * max(0.0, min(self.now, self._until) - min(task.since, self._until))
        task.left -= ran
        course = self._courses[task.number]
        if task.stops and task.left > 0:
            task.preempted_at, task.in_a_row = self.now, task.in_a_row + 1
            self._courses[task.number] = replace(
                course,
                preemptions=course.preemptions + 1,
                preempted_in_a_row=max(course.preempted_in_a_row, task.in_a_row),
            )
            self._queue(task)
        else:
            self._courses[task.number] = replace(course, ended_at=self.now)
            self._ended.append(task.arrival.seconds)
        task.stops = False

    def _decide(self) -> None:
        running = self._at_work()
        free = self.capacity - sum(order.ranks for order in running)
        look = max(0, free) + LOOK
        waiting = [one[-1] for line in self._lines.values() for one in line[:look]]
        if not waiting:
            self.decision = Decision()
            return
        self.decision = decide(
            Situation(
                now=self.now,
                pools={POOL: Pool(capacity=self.capacity, ready=self.capacity, free=free)},
                waiting=waiting,
                running=running,
                use_seconds=self._use_seconds(),
                shares=self.shares,
                reserved=self.decision.reserved,
                promised=self.decision.promised,
            )
        )
        if (again_at := self.decision.again_at) is not None:
            heapq.heappush(self._events, (again_at, self._order, -1, 0))
        for start in self.decision.starts:
            self._start(self._tasks[int(start.task_id)])
        for preemption in self.decision.preemptions:
            victim = self._tasks[int(preemption.task_id)]
            victim.stops = True
            self._later(victim, self.now + CHECKPOINT_SECONDS)
            self._reclaims.setdefault(preemption.for_team, []).append(self.now)

    def _start(self, task: _Task) -> None:
        line = self._lines[task.arrival.team]
        at = bisect.bisect_left(line, (-task.arrival.priority, task.arrival.at_seconds, task.number))
        del line[at]
        task.since, task.attempt = self.now, task.attempt + 1
        if task.preempted_at is None:
            task.in_a_row = 0
        self._running[task.name] = task
        self._later(task, self.now + task.left)
        if reclaims := self._reclaims.get(task.arrival.team):
            self._give_backs.append(self.now - reclaims.pop(0))
        course = self._courses[task.number]
        if course.started_at is None:
            self._courses[task.number] = replace(course, started_at=self.now)
            if course.told is not None:
                wait = self.now - task.arrival.at_seconds
                self._told.append(estimate.started(course.told, wait))
                del self._asked[task.number]

    def _later(self, task: _Task, at: float) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, task.number, task.attempt))

    # --- what the scheduler is handed ----------------------------------------------------------------------------

    def _at_work(self) -> list[Running]:
        return [
            Running(
                task.arrival.team,
                task.since,
                task_id=task.name,
                ranks=task.arrival.ranks,
                seconds_left=max(0.0, task.since + task.left - self.now) * task.doubt,
                stops=task.stops,
                was_preempted=task.preempted_at is not None,
            )
            for task in self._running.values()
        ]

    def _use_seconds(self) -> dict[str, float]:
        return {team: used.at_time(self.now) for team, used in self._used.items()}

    def _tell(self, come: Sequence[_Task]) -> None:
        """Tell arrivals when they would start, as `onebasis submit --dry-run` does."""
        asking = [task for task in come if task.number % self._tell_each == 0]
        if not asking:
            return
        running = self._at_work()
        free = self.capacity - sum(order.ranks for order in running)
        waiting = [one[-1] for line in self._lines.values() for one in line]
        by_id = {task.task_id: task for task in waiting}
        order = running_order(waiting, self._use_seconds(), running, self.shares, now=self.now)
        pace = pace_of(self._ended[-PACE_TASKS:])
        for task in asking:
            ahead = order[: order.index(task.name) + 1]
            line = [by_id[task_id] for task_id in ahead]
            known = [*self._told, *self._late()]
            told = estimate.estimate_starts(line, running, free, pace, known, now=self.now, asked=(task.name,)).get(
                task.name
            )
            if told is not None:
                self._asked[task.number] = told
            self._courses[task.number] = replace(self._courses[task.number], told=told)

    def _late(self) -> list[Told]:
        waited = ((told, self.now - self.arrivals[number].at_seconds) for number, told in self._asked.items())
        return [one for told, seconds in waited if (one := estimate.late(told, seconds)) is not None]


# --- what it shows -----------------------------------------------------------------------------------------------


def jain_index(amounts: Iterable[float]) -> float:
    """How evenly amounts are spread, from 1/n (one has all) to 1 (all have the same): (Σx)² / (n·Σx²).

    Source:
        Jain, Chiu, Hawe, A Quantitative Measure of Fairness, DEC TR-301, 1984.
    """
    found = list(amounts)
    squares = sum(amount * amount for amount in found)
    return 1.0 if not squares else sum(found) ** 2 / (len(found) * squares)


def inside(courses: Iterable[Course]) -> float | None:
    """Share of starts that fell into the interval that was told at arrival; None without any."""
    hits = [
        course.told.earliest <= wait <= course.told.latest
        for course in courses
        if course.told is not None and (wait := course.wait_seconds) is not None
    ]
    return statistics.fmean(hits) if hits else None


def report(simulation: Simulation) -> dict[str, Any]:
    """The figures of a simulation, as plain values. What is not known is None.

    `jain` is about the place-seconds that each team used until the last arrival, over its weight, and `utilisation`
    about the same time; `give_back_seconds_max` is the longest time from the word to a borrower to the start of a task
    of the team that the places are for; `start_in_stated_interval` is the share of starts that fell into the interval
    that was told at arrival, for `TOLD_MAX` arrivals.
    """
    courses, shares = simulation.courses, simulation.shares
    used = simulation.place_seconds
    until = simulation.last_arrival
    waited = [course for course in courses if (course.wait_seconds or 0.0) > 0]
    return {
        "tasks": len(courses),
        "never_started": sum(course.started_at is None for course in courses),
        "weeks": until / (7 * 24 * 3600),
        "utilisation": sum(used.values()) / (simulation.capacity * until) if until else None,
        "jain": jain_index(used[team] / shares.get(team, Share()).weight for team in used),
        "preemptions": sum(course.preemptions for course in courses),
        "preempted_in_a_row_max": max((course.preempted_in_a_row for course in courses), default=0),
        "give_back_seconds_max": max(simulation.give_back_seconds, default=None),
        "start_in_stated_interval": inside(courses),
        "start_in_stated_interval_of_those_that_waited": inside(waited),
        "waits": [
            {"team": team, "ranks": ranks, **_waits(courses, team, ranks)}
            for team, ranks in sorted({(course.arrival.team, course.arrival.ranks) for course in courses})
        ],
    }


def _waits(courses: Sequence[Course], team: str, ranks: int) -> dict[str, float | int]:
    seconds = sorted(
        course.wait_seconds
        for course in courses
        if (course.arrival.team, course.arrival.ranks) == (team, ranks) and course.wait_seconds is not None
    )
    if not seconds:
        return {"tasks": 0}
    return {
        "tasks": len(seconds),
        "mean_seconds": statistics.fmean(seconds),
        "p50_seconds": seconds[len(seconds) // 2],
        "p90_seconds": seconds[int(0.9 * len(seconds))],
        "max_seconds": seconds[-1],
    }
