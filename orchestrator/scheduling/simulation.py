"""The real scheduler over weeks of arrivals, in seconds: what people would wait for under these settings.

Pure: arrivals and settings in, a report out. Time is a number that jumps from event to event: a task arrives, ends, or
has written the checkpoint for which it was told to stop; a worker has loaded its base model, or has been idle for long.
At each of them `decide` and `resized` are handed what the loop of a service would hand them, so a simulation shows what
a service does, not what a model of it would.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.errors import InvalidInput
from configs.settings import PoolSettings
from orchestrator.scheduling import estimate
from orchestrator.scheduling.arrivals import Arrival
from orchestrator.scheduling.estimate import Estimate, Told, pace_of
from orchestrator.scheduling.fair_share import DecayedSum, Running, Share, Use, Waiting, running_order
from orchestrator.scheduling.machines import Room, Worker, ranks_on
from orchestrator.scheduling.pools import Seat, ends_at, resized, shape_of
from orchestrator.scheduling.scheduler import LOOK, SPARED_SECONDS, Decision, Pool, Situation, decide
from workers.gang import GB, needed

LOAD_SECONDS = 60.0
"""Time from asking for a worker until its base model is loaded, where a machine is there, unless another is given: a
small one takes ten seconds, one of 7B from a slow disk two minutes."""
PLACE_SECONDS = 5.0
"""Time after which it is looked what room there is for a worker that found none; as in a service."""
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
    """Most of its attempts, one after another, that had to give their places back, each before it had run for as long
    as one is left alone that follows such an attempt."""
    told: Estimate | None = None
    """Estimate at its arrival."""
    queued_at: tuple[float, ...] = ()
    """When it stood in line: at its arrival, and after each attempt that had to give its places back."""
    begun_at: tuple[float, ...] = ()
    """When each of its attempts began."""

    @property
    def wait_seconds(self) -> float | None:
        """From its arrival to its first start."""
        return None if self.started_at is None else self.started_at - self.arrival.at_seconds


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Everything that happened."""

    courses: tuple[Course, ...]
    """One for each arrival, in their order."""
    pools: Mapping[str, PoolSettings]
    shares: Mapping[str, Share]
    there_seconds: Mapping[str, float]
    """Pool to the place-seconds that its workers were there until the last arrival, at work or not."""
    used_seconds: Mapping[str, float]
    """The same of those that tasks had."""
    place_seconds: Mapping[str, float]
    """Place-seconds that each team used until the last arrival, while all of them could want places."""
    give_back_seconds: tuple[float, ...] = ()
    """For each task for which others were stopped: from the word to its start."""
    load_seconds: float = LOAD_SECONDS
    """Time from asking for a worker until it is ready, as assumed."""
    end_seconds: float = 0.0
    machines: Sequence[Room] = ()
    """What each machine has that the pools share; none: there was room for all."""

    @property
    def last_arrival(self) -> float:
        return max((course.arrival.at_seconds for course in self.courses), default=0.0)


def simulate(
    arrivals: Sequence[Arrival],
    shares: Mapping[str, Share],
    pools: Mapping[str, PoolSettings],
    seed: int = 0,
    load_seconds: float = LOAD_SECONDS,
    machines: Sequence[Room] = (),
) -> Simulation:
    """Let the arrivals go through the scheduler until the last has ended.

    Args:
        arrivals: By time.
        pools: Each with `min` workers that are ready at once.
        seed: Of the errors with which running tasks say when they end.
        load_seconds: Time from asking for a worker until it is ready, where there is room for it.
        machines: What each machine has that the pools share, by Ray's names of resources; default: room for all.

    Returns:
        The same for the same arguments.

    Cost:
        A decision for each arrival and each end, some 0.1 ms for ten teams, and `TOLD_MAX` estimates of 1 ms for every
        ten tasks that wait.
    """
    return _World(arrivals, shares, pools, seed, load_seconds, machines).run()


def machines_alike(
    pools: Mapping[str, PoolSettings], count: int, cpus: float, gpus: float, memory_gb: float
) -> tuple[Room, ...]:
    """So many machines for `simulate`, each with these resources.

    Raises:
        InvalidInput: They have no room for the workers that a pool always keeps, or for one; names the pool.
    """
    room = {"CPU": cpus, "GPU": gpus, "memory": memory_gb * GB}
    for name, pool in pools.items():
        workers = count * ranks_on(room, shape_of(pool).needs) // pool.ranks
        if workers < max(1, pool.min):
            what = (
                f"the machines have room for {workers} workers of pool '{name}', and it has {max(1, pool.min)} or more"
            )
            raise InvalidInput(what, "machines", f"a worker of it takes {pool.ranks} times {needed(pool)}")
    return (room,) * count


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
class _Worker:
    """A worker that is there, or was asked for."""

    name: str
    ready_at: float
    """When it has loaded the base model; infinite while no machine has room for it."""
    since: float
    idle_since: float | None
    machines: tuple[int, ...] = ()
    """Machine of each of its ranks."""


@dataclass
class _World:
    """The state of a simulation."""

    arrivals: Sequence[Arrival]
    shares: Mapping[str, Share]
    pools: Mapping[str, PoolSettings]
    seed: int
    load_seconds: float
    machines: Sequence[Room] = ()
    now: float = 0.0
    decision: Decision = field(default_factory=Decision)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self._tasks = [
            _Task(number, arrival, arrival.seconds, rng.lognormvariate(0.0, 0.1))
            for number, arrival in enumerate(self.arrivals)
        ]
        self._courses = [Course(arrival=arrival) for arrival in self.arrivals]
        self._lines: dict[tuple[str, str], list[tuple[int, float, int, Waiting]]] = {}
        self._running: dict[str, _Task] = {}
        self._events: list[tuple[float, int, int, int]] = [
            (arrival.at_seconds, number, number, 0) for number, arrival in enumerate(self.arrivals)
        ]
        heapq.heapify(self._events)
        self._used: dict[str, DecayedSum] = {}
        self._until = max((arrival.at_seconds for arrival in self.arrivals), default=0.0)
        self._order = len(self._events)
        self._coming: set[float] = set()
        """Times at which it is decided anew."""
        self._workers: dict[str, list[_Worker]] = {name: [] for name in self.pools}
        self._has: dict[str, list[_Worker]] = {}
        """Task to its workers."""
        self._free = [dict(room) for room in self.machines]
        """What each machine has left."""
        self._there: dict[str, float] = dict.fromkeys(self.pools, 0.0)
        self._used_in: dict[str, float] = dict.fromkeys(self.pools, 0.0)
        for name in self.pools:
            self._resize(name, wanted=0, ready_at=0.0)
        self._place_seconds: dict[str, float] = dict.fromkeys(
            {*self.shares, *(arrival.team for arrival in self.arrivals)}, 0.0
        )
        self._ended: dict[str, list[float]] = {name: [] for name in self.pools}
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
        for name in self.pools:
            for worker in self._workers[name]:
                self._count(name, worker)
        return Simulation(
            courses=tuple(self._courses),
            pools=self.pools,
            shares=self.shares,
            there_seconds=self._there,
            used_seconds=self._used_in,
            place_seconds=self._place_seconds,
            load_seconds=self.load_seconds,
            give_back_seconds=tuple(self._give_backs),
            end_seconds=self.now,
            machines=tuple(self.machines),
        )

    # --- what happens --------------------------------------------------------------------------------------------

    def _queue(self, task: _Task) -> None:
        arrival = task.arrival
        waiting = Waiting(
            task_id=task.name,
            team=arrival.team,
            priority=arrival.priority,
            submitted_at=arrival.at_seconds,
            pool=arrival.pool,
            ranks=arrival.ranks,
            gpus=self.pools[arrival.pool].gpus,
            seconds_max=arrival.max_run_seconds,
            preempted_at=task.preempted_at,
        )
        line = self._lines.setdefault((arrival.pool, arrival.team), [])
        bisect.insort(line, (-arrival.priority, arrival.at_seconds, task.number, waiting))
        course = self._courses[task.number]
        self._courses[task.number] = replace(course, queued_at=(*course.queued_at, self.now))

    def _leave(self, task: _Task) -> None:
        """A task has ended, or has written the checkpoint that it was told to write."""
        ran = self.now - task.since
        del self._running[task.name]
        for worker in self._has.pop(task.name):
            worker.idle_since = self.now
        team, ranks = task.arrival.team, task.arrival.ranks
        gpus = self.pools[task.arrival.pool].gpus
        use = Use(team=team, seconds=ran, ended_at=self.now, places=ranks, gpus=gpus)
        self._used[team] = self._used.get(team, DecayedSum()).plus(use)
        in_time = ranks * max(0.0, min(self.now, self._until) - min(task.since, self._until))
        self._place_seconds[team] += in_time
        self._used_in[task.arrival.pool] += in_time
        task.left -= ran
        course = self._courses[task.number]
        if task.stops and task.left > 0:
            task.preempted_at, task.in_a_row = self.now, task.in_a_row + 1 if ran < SPARED_SECONDS else 1
            self._courses[task.number] = replace(
                course,
                preemptions=course.preemptions + 1,
                preempted_in_a_row=max(course.preempted_in_a_row, task.in_a_row),
            )
            self._queue(task)
        else:
            self._courses[task.number] = replace(course, ended_at=self.now)
            self._ended[task.arrival.pool].append(task.arrival.seconds)
        task.stops = False

    def _decide(self) -> None:
        running = self._at_work()
        pools = {name: self._pool(name) for name in self.pools}
        look = {name: (pool.free + pool.coming) // self.pools[name].ranks + LOOK for name, pool in pools.items()}
        waiting = [one[-1] for (pool, _), line in self._lines.items() for one in line[: look[pool]]]
        if not waiting:
            self.decision = Decision()
            self._resize_all(())
            return
        self.decision = decide(
            Situation(
                now=self.now,
                pools=pools,
                waiting=waiting,
                running=running,
                use_seconds=self._use_seconds(),
                gpu_seconds=self._gpu_seconds(),
                shares=self.shares,
                machines=self._room(),
                workers=self._on_machines(),
                reserved=self.decision.reserved,
                fits_since=self.decision.fits_since,
                promised=self.decision.promised,
            )
        )
        if (again_at := self.decision.again_at) is not None:
            self._come_back(again_at)
        for start in self.decision.starts:
            self._start(self._tasks[int(start.task_id)])
        self._resize_all(waiting)
        for preemption in self.decision.preemptions:
            victim = self._tasks[int(preemption.task_id)]
            victim.stops = True
            self._later(victim, self.now + CHECKPOINT_SECONDS)
            self._reclaims.setdefault(preemption.for_team, []).append(self.now)

    def _start(self, task: _Task) -> None:
        line = self._lines[task.arrival.pool, task.arrival.team]
        at = bisect.bisect_left(line, (-task.arrival.priority, task.arrival.at_seconds, task.number))
        del line[at]
        task.since, task.attempt = self.now, task.attempt + 1
        self._running[task.name] = task
        self._has[task.name] = self._given(task)
        self._later(task, self.now + task.left)
        if reclaims := self._reclaims.get(task.arrival.team):
            self._give_backs.append(self.now - reclaims.pop(0))
        course = self._courses[task.number]
        course = self._courses[task.number] = replace(course, begun_at=(*course.begun_at, self.now))
        if course.started_at is None:
            self._courses[task.number] = replace(course, started_at=self.now)
            if course.told is not None:
                wait = self.now - task.arrival.at_seconds
                self._told.append(estimate.started(course.told, wait))
                del self._asked[task.number]

    def _later(self, task: _Task, at: float) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, task.number, task.attempt))

    # --- workers -------------------------------------------------------------------------------------------------

    def _given(self, task: _Task) -> list[_Worker]:
        """The workers that a task gets: as many as have its places together."""
        pool = task.arrival.pool
        free = [one for one in self._workers[pool] if one.idle_since is not None and one.ready_at <= self.now]
        free.sort(key=lambda worker: worker.name in self.decision.kept)
        given = free[: -(-task.arrival.ranks // self.pools[pool].ranks)]
        for worker in given:
            worker.idle_since = None
        return given

    def _resize_all(self, waiting: Sequence[Waiting]) -> None:
        waits = self.decision.waits
        for name, workers in self._workers.items():
            for worker in [one for one in workers if one.name in self.decision.ends and one.idle_since is not None]:
                self._end(name, worker)
        self._place()
        for name in self.pools:
            mine = (waits.get(task.task_id) for task in waiting if task.pool == name)
            wanted = sum(wait is not None and wait.until is None for wait in mine)
            self._resize(name, wanted, self.now + self.load_seconds)
        self._place()

    def _resize(self, pool: str, wanted: int, ready_at: float) -> None:
        settings, workers = self.pools[pool], self._workers[pool]
        seats = [
            Seat(name=one.name, idle_since=one.idle_since, loads=self.now < one.ready_at < math.inf) for one in workers
        ]
        change = resized(pool, settings, seats, wanted, self.now, starts_max=self.decision.growth.get(pool))
        for name in change.starts:
            workers.append(worker := _Worker(name, ready_at, self.now, ready_at))
            if not self.machines or self._find_room(pool, worker):
                self._come_back(ready_at)
            else:
                worker.ready_at = worker.since = math.inf
                worker.idle_since = self.now
                self._come_back(self.now + PLACE_SECONDS)
        for worker in [one for one in workers if one.name in change.ends]:
            self._end(pool, worker)
        if len(workers) > settings.min and (at := ends_at(settings, seats)) is not None and at > self.now:
            self._come_back(at)

    def _end(self, pool: str, worker: _Worker) -> None:
        self._count(pool, worker)
        self._workers[pool].remove(worker)
        for machine in worker.machines:
            for kind, amount in shape_of(self.pools[pool]).needs.items():
                self._free[machine][kind] += amount

    def _place(self) -> None:
        """Find room for workers that wait for some, as Ray does."""
        for name, workers in self._workers.items():
            for worker in workers:
                if math.isinf(worker.ready_at) and self._find_room(name, worker):
                    worker.since = self.now
                    worker.ready_at = worker.idle_since = self.now + self.load_seconds
                    self._come_back(worker.ready_at)

    def _find_room(self, pool: str, worker: _Worker) -> bool:
        shape, found = shape_of(self.pools[pool]), list[int]()
        for number, room in enumerate(self._free):
            found += [number] * min(ranks_on(room, shape.needs), shape.ranks - len(found))
        if len(found) < shape.ranks:
            return False
        worker.machines = tuple(found)
        for machine in found:
            for kind, amount in shape.needs.items():
                self._free[machine][kind] -= amount
        return True

    def _room(self) -> dict[str, Room]:
        """As a service sees it: nothing while no worker waits for room."""
        is_any_short = any(math.isinf(one.ready_at) for workers in self._workers.values() for one in workers)
        return {str(number): room for number, room in enumerate(self._free)} if is_any_short else {}

    def _on_machines(self) -> list[Worker]:
        at_work = {id(worker): self._tasks[int(task)] for task, workers in self._has.items() for worker in workers}
        return [
            Worker(
                name=one.name,
                pool=name,
                machines=tuple(dict.fromkeys(map(str, one.machines))),
                is_idle=one.idle_since is not None and one.ready_at <= self.now,
                ends_in=self._left(at_work[id(one)]) if id(one) in at_work else None,
            )
            for name, workers in (self._workers.items() if self.machines else ())
            for one in workers
        ]

    def _left(self, task: _Task) -> float:
        """Seconds until a task ends, as it says."""
        return max(0.0, task.since + task.left - self.now) * task.doubt

    def _count(self, pool: str, worker: _Worker) -> None:
        """Add the time for which a worker that ends was there."""
        there = max(0.0, min(self.now, self._until) - min(worker.since, self._until))  # none where it never had room
        self._there[pool] += self.pools[pool].ranks * there

    def _come_back(self, at: float) -> None:
        """Decide anew at this time, though nothing happens to a task."""
        if at > self.now and at not in self._coming:
            self._coming.add(at)
            self._order += 1
            heapq.heappush(self._events, (at, self._order, -1, 0))

    def _pool(self, name: str) -> Pool:
        settings, workers = self.pools[name], self._workers[name]
        ready = [one for one in workers if one.ready_at <= self.now]
        is_short = any(math.isinf(one.ready_at) for one in workers)
        further = 0 if is_short else settings.max - len(workers)
        return Pool(
            capacity=settings.ranks * settings.max,
            ready=settings.ranks * len(ready),
            free=settings.ranks * sum(one.idle_since is not None for one in ready),
            coming=settings.ranks * (further + sum(self.now < one.ready_at < math.inf for one in workers)),
            further=settings.ranks * further,
            shape=shape_of(settings),
            is_short=is_short,
            is_placeless=bool(workers) and all(math.isinf(one.ready_at) for one in workers),
        )

    # --- what the scheduler is handed ----------------------------------------------------------------------------

    def _at_work(self) -> list[Running]:
        return [
            Running(
                task.arrival.team,
                task.since,
                task_id=task.name,
                pool=task.arrival.pool,
                ranks=task.arrival.ranks,
                gpus=self.pools[task.arrival.pool].gpus,
                seconds_left=self._left(task),
                stops=task.stops,
                was_preempted=task.preempted_at is not None,
            )
            for task in self._running.values()
        ]

    def _use_seconds(self) -> dict[str, float]:
        return {team: used.at_time(self.now) for team, used in self._used.items()}

    def _gpu_seconds(self) -> dict[str, float]:
        return {team: used.gpus_at_time(self.now) for team, used in self._used.items()}

    def _tell(self, come: Sequence[_Task]) -> None:
        """Tell arrivals when they would start, as `onebasis submit --dry-run` does."""
        asking = [task for task in come if task.number % self._tell_each == 0]
        if not asking:
            return
        running = self._at_work()
        waiting = [one[-1] for line in self._lines.values() for one in line]
        by_id = {task.task_id: task for task in waiting}
        order = running_order(
            waiting, self._use_seconds(), running, self.shares, now=self.now, gpu_seconds=self._gpu_seconds()
        )
        expected = estimate.kept_from_borrowing([by_id[task_id] for task_id in order], running, self.shares, self.now)
        for task in asking:
            name = task.arrival.pool
            pace = pace_of(self._ended[name][-PACE_TASKS:])
            ahead = (by_id[task_id] for task_id in order[: order.index(task.name) + 1])
            line = [one for one in ahead if one.pool == name]
            there = [one for one in running if one.pool == name]
            known, asked, coming = [*self._told, *self._waiting()], (task.name,), self._loading(name)
            free = self._pool(name).free
            told = estimate.estimate_starts(
                line, there, free, pace, known, now=self.now, asked=asked, coming=coming, expected=expected
            ).get(task.name)
            if told is not None:
                self._asked[task.number] = told
            self._courses[task.number] = replace(self._courses[task.number], told=told)

    def _loading(self, name: str) -> list[float]:
        """Seconds until each place is free that the pool's workers will have once they have loaded."""
        settings, workers = self.pools[name], self._workers[name]
        seconds = [one.ready_at - self.now for one in workers if self.now < one.ready_at < math.inf]
        seconds += [self.load_seconds] * (self._pool(name).further // settings.ranks)
        return [one for one in seconds for _ in range(settings.ranks)]

    def _waiting(self) -> list[Told]:
        return [
            estimate.waiting(told, self.now - self.arrivals[number].at_seconds) for number, told in self._asked.items()
        ]


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

    `jain` is about the place-seconds that each team used until the last arrival, over its weight, None where there was
    nothing to share: one team alone, or nobody waited; `utilisation` is about the same time. `give_back_seconds_max` is
    the longest time from the word to a borrower to the start of a task of the team that the places are for;
    `preempted_in_a_row_max` is 1 at the most: see `Course.preempted_in_a_row`;
    `start_in_stated_interval` is the share of starts that fell into the interval that was told at arrival, for
    `TOLD_MAX` arrivals.
    """
    courses, shares = simulation.courses, simulation.shares
    used = simulation.place_seconds
    until = simulation.last_arrival
    waited = [course for course in courses if (course.wait_seconds or 0.0) > 0]
    return {
        "tasks": len(courses),
        "never_started": sum(course.started_at is None for course in courses),
        "weeks": until / (7 * 24 * 3600),
        "utilisation": _share(simulation.used_seconds, simulation.there_seconds),
        "jain": jain_index(used[team] / shares.get(team, Share()).weight for team in used)
        if waited and any(used.values()) and len({course.arrival.team for course in courses}) > 1
        else None,
        "load_seconds": simulation.load_seconds,
        "machines": len(simulation.machines) or None,
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "preemptions": sum(course.preemptions for course in courses),
        "preemptions_of_one_task_max": max((course.preemptions for course in courses), default=0),
        "preempted_in_a_row_max": max((course.preempted_in_a_row for course in courses), default=0),
        "give_back_seconds_max": max(simulation.give_back_seconds, default=None),
        "start_in_stated_interval": inside(courses),
        "start_in_stated_interval_of_those_that_waited": inside(waited),
        "waits": [
            {"team": team, "pool": pool, "ranks": ranks, **_waits(courses, team, pool, ranks)}
            for team, pool, ranks in sorted({_kind(course) for course in courses})
        ],
        "pools": [
            {
                "pool": name,
                "workers_max": pool.max,
                "workers_mean": simulation.there_seconds[name] / pool.ranks / until if until else None,
                "utilisation": _share({name: simulation.used_seconds[name]}, {name: simulation.there_seconds[name]}),
            }
            for name, pool in simulation.pools.items()
        ],
    }


def _kind(course: Course) -> tuple[str, str, int]:
    return course.arrival.team, course.arrival.pool, course.arrival.ranks


def _share(used: Mapping[str, float], there: Mapping[str, float]) -> float | None:
    """Share of the place-seconds that were there and that tasks had; None where there were none."""
    total = sum(there.values())
    return sum(used.values()) / total if total else None


def _waits(courses: Sequence[Course], *kind: str | int) -> dict[str, float | int]:
    seconds = sorted(
        course.wait_seconds for course in courses if _kind(course) == kind and course.wait_seconds is not None
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
