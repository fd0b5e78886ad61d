"""Who starts, who gives places back, and why the others wait: one decision, from facts that are handed in.

Pure: no SQL, no Ray, no clock. The loop carries a decision out (controller.py), the simulator tries thousands of them
(simulation.py), and `onebasis task` reads its reasons.

In the order of their turns (fair_share.py) tasks start while places are free. One that does not fit may
* have places given back by teams that are beyond their quotas, if its own team is within its own: their newest
  attempts write a checkpoint and wait again. Never one that ends within a minute, and never one that follows such a
  stop and has not run for ten minutes, so that each gets on; of the others first those that follow none. The places
  are promised to the task that they were taken for. A task that gave its places back borrows again when nobody within
  a quota wants them, two minutes later at the earliest, and what is behind it in its team's line does not borrow
  before it, for priority and age count inside a team; within its quota it starts at once. A team that reclaims is
  within its quota and one that gives back is beyond it, so no two can take turns.
* or have room reserved on machines that pools share (machines.py), where its pool waits for room for a worker: what
  other pools have there ends when it has nothing to do, and until then starts only tasks that end before the last of it
  does. The first in turn that needs it gets the reservation, and it alone keeps it, so that no stream of small tasks
  starves a large one.

All tasks of a pool take as many places as a worker of it has, so what is free in a pool is never too little for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.scheduling.fair_share import Running, Share, Turns, Waiting
from orchestrator.scheduling.machines import Clearing, Room, Shape, Worker, cleared, growth
from orchestrator.scheduling.reasons import Wait, WaitCode

SOON_SECONDS = 60.0
"""A task that ends this soon is waited for: a checkpoint and a new start cost about as much."""
PATIENCE_SECONDS = 120.0
"""Time for which a task that gave its places back does not borrow again, so that a team that comes with one short task
after another finds them free. No place that a borrower waits for is idle for longer."""
SPARED_SECONDS = 600.0
"""Time for which an attempt is left alone that follows one which gave its places back: ten times what a checkpoint and
a new start cost. Whoever wants the places back waits no longer than that and a checkpoint."""
LOOK = 3
"""Tasks of each team that are looked at beyond as many as could start."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Places of workers that are all alike."""

    capacity: int
    """All places, ready or not: a task that asks for more never fits."""
    ready: int
    """Places whose base model is loaded."""
    free: int
    """Ready places that nothing uses and that are for tasks."""
    kept: int = 0
    """Further free places, kept for a version that is about to be scored."""
    coming: int = 0
    """Places that are expected within a minute: of workers that load, or that the pool may still start."""
    further: int = 0
    """Those of them of workers that it has not asked for yet."""
    shape: Shape | None = None
    """What a worker of it takes on machines; None: it shares them with no other pool."""
    is_short: bool = False
    """Whether a worker that was asked for waits for room on a machine."""
    is_forming: bool = False
    """Whether no worker is ready because gangs wait for places for some of their ranks."""
    is_placeless: bool = False
    """Whether no worker is ready because all that were asked for wait for a place."""
    drained: str = ""
    """Why no worker is ready and none will be, for people, with what takes it back; empty where none of it is
    drained."""
    drained_since: float | None = None
    """Unix time since which that is so."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that one decision is made from."""

    now: float
    pools: Mapping[str, Pool]
    waiting: Sequence[Waiting]
    """Tasks that nothing but places keeps from starting: of each team at least the first few."""
    running: Sequence[Running] = ()
    use_seconds: Mapping[str, float] = field(default_factory=dict)
    """Decayed use per team, in place-seconds."""
    gpu_seconds: Mapping[str, float] = field(default_factory=dict)
    """The same in GPU-seconds."""
    shares: Mapping[str, Share] = field(default_factory=dict)
    machines: Mapping[str, Room] = field(default_factory=dict)
    """Machine to what is free there; none where nothing waits for room, or where others can be added."""
    workers: Sequence[Worker] = ()
    """Workers of all pools, where machines are given; those that are kept for a version left out."""
    reserved: Mapping[str, str] = field(default_factory=dict)
    """Pool to the task that room for a worker of it was reserved for by the decision before."""
    fits_since: float | None = None
    """Unix time since which there has been room for it; None: there was none."""
    promised: Sequence[str] = ()
    """Tasks for which others were told to stop, and which have not started."""
    waits: Mapping[str, Wait] = field(default_factory=dict)
    """Reasons that the decision before gave: one that is still the same keeps its time."""


@dataclass(frozen=True)
class Start:
    """A task that starts now."""

    task_id: str
    pool: str


@dataclass(frozen=True)
class Preemption:
    """A running task that is to write a checkpoint and give its places back."""

    task_id: str
    team: str
    """Its team, which is beyond its quota."""
    for_task: str
    """Task that gets the places."""
    for_team: str
    """Team of that task, which is within its quota."""


@dataclass(frozen=True)
class Decision:
    """What is done now, and why the rest waits."""

    starts: tuple[Start, ...] = ()
    preemptions: tuple[Preemption, ...] = ()
    waits: Mapping[str, Wait] = field(default_factory=dict)
    """Reason of each task that was looked at and does not start."""
    behind: Mapping[tuple[str, str], Wait] = field(default_factory=dict)
    """Pool and team to the reason of the tasks that were not looked at: they wait for what those before them wait
    for."""
    reserved: Mapping[str, str] = field(default_factory=dict)
    """Pool to the task that room for a worker of it is reserved for."""
    kept: frozenset[str] = frozenset()
    """Idle workers of other pools whose room that is: only tasks of `starts` that nobody else can take get them."""
    ends: tuple[str, ...] = ()
    """Workers that end now for it."""
    growth: Mapping[str, int] = field(default_factory=dict)
    """Pool to the workers that it may start meanwhile; as many as it wants where it is not named."""
    fits_since: float | None = None
    """As in `Situation`."""
    promised: tuple[str, ...] = ()
    """Tasks for which others were told to stop, and which do not start yet."""
    again_at: float | None = None
    """Unix time at which to decide anew though nothing has happened; None: there is none."""

    def wait_of(self, task_id: str, pool: str, team: str) -> Wait | None:
        """Why a task in line waits; None where its team had none in its pool's line when this was decided."""
        if any(start.task_id == task_id for start in self.starts):
            return Wait(code=WaitCode.ABOUT_TO_START)
        return self.waits.get(task_id) or self.behind.get((pool, team))


def decide(situation: Situation) -> Decision:
    """The decision for a situation.

    Cost:
        O(n·log n) for the n tasks in `waiting`, and O(m·log m) for the m running ones of each task that does not fit;
        however many more wait.
    """
    return _Round(situation).decision()


class _Room:
    """What is left of a pool's places while one decision is made."""

    def __init__(self, pool: Pool, running: Iterable[Running]) -> None:
        self.pool = pool
        self.free = pool.free
        self.running = sorted(running, key=_ends_in)
        self.soon = pool.coming + sum(order.ranks for order in self.running if order.stops or _ends_soon(order))
        """Places that come back within a minute and are promised to nobody."""
        self.kept = 0
        """Free places whose room is another pool's."""
        self.gap_seconds = 0.0
        """Seconds until it is needed."""
        self.is_held = False
        """Whether its next place is not its own, for the same reason: of a worker that has to go, or that it may not
        start."""

    @property
    def open_places(self) -> int:
        """Free places that a task of any length may take."""
        return self.free - self.kept

    def has_place(self, task: Waiting) -> bool:
        """Whether a task may start now; it is then taken off the room that is left."""
        ends_before = task.seconds_max is not None and task.seconds_max <= self.gap_seconds
        if task.ranks > (self.free if ends_before else self.open_places):
            return False
        self.free -= task.ranks
        self.kept = min(self.kept, self.free)
        return True

    def promise(self, task: Waiting) -> None:
        """Keep what is free, and what comes back within a minute, for a task."""
        now = min(self.open_places, task.ranks)
        self.free -= now
        self.soon -= task.ranks - now

    def hold(self, gone: Sequence[Worker], gap_seconds: float, ranks: int, growth: int) -> None:
        """Some of its room is another pool's.

        Args:
            gone: Workers of it that have to go.
            ranks: Places of each.
            growth: Workers that it may start all the same.
        """
        idle = sum(worker.is_idle for worker in gone)
        soon = sum(not one.is_idle and one.ends_in is not None and one.ends_in <= SOON_SECONDS for one in gone)
        lost = max(0, self.pool.further - ranks * growth)
        self.kept, self.gap_seconds = min(ranks * idle, self.free), gap_seconds
        self.soon -= ranks * soon + lost
        self.is_held = bool(gone) or lost > 0 or self.pool.is_short


class _Round:
    """One decision in the making."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        running = situation.running
        self._rooms = {
            name: _Room(pool, (order for order in running if order.pool == name))
            for name, pool in situation.pools.items()
        }
        self._turns = Turns(
            situation.waiting, situation.use_seconds, running, situation.shares, situation.now, situation.gpu_seconds
        )
        self._starts: list[Start] = []
        self._preemptions: list[Preemption] = []
        self._waits: dict[str, Wait] = {}
        self._reserved: dict[str, str] = {}
        self._clearing: Clearing | None = None
        """Room that is made for the task that it is reserved for."""
        self._growth: dict[str, int] = {}
        self._fits_since: float | None = None
        self._promised: list[str] = []
        self._again_at: list[float] = []
        """Times at which to decide anew."""
        self._gave_back: dict[tuple[str, str], tuple[float, str]] = {}
        """Pool and team to when its foremost task that gave its places back may borrow again, and that task."""

    def decision(self) -> Decision:
        for task in self._kept():
            if not self._turns.borrows(task) and self._may_start(task):
                self._starts.append(Start(task.task_id, task.pool))
                self._turns.take(task)
        while (following := self._turns.next()) is not None:
            if following.task_id not in self._waits and self._may_start(following):
                self._starts.append(Start(following.task_id, following.pool))
                self._turns.take(following)
            else:
                self._turns.skip(following)
        return Decision(
            tuple(self._starts),
            tuple(self._preemptions),
            self._waits,
            self._behind(),
            self._reserved,
            self._kept_workers(),
            self._ends(),
            self._growth,
            self._fits_since,
            tuple(self._promised),
            min(self._again_at, default=None),
        )

    def _kept_workers(self) -> frozenset[str]:
        workers = self._clearing.workers if self._clearing is not None else ()
        return frozenset(worker.name for worker in workers if worker.is_idle)

    def _ends(self) -> tuple[str, ...]:
        """What ends so that the room is there: all of it once none of it has anything to do, and what other pools have
        asked for and would get it first."""
        if self._clearing is None:
            return ()
        waiting = (one for one in self._situation.workers if not one.machines and one.pool not in self._reserved)
        gone = self._clearing.workers if self._clearing.is_idle else ()
        return tuple(worker.name for worker in (*gone, *waiting))

    def _kept(self) -> list[Waiting]:
        """Tasks that are looked at before all others. Each has been the first in turn, and the places that it waits
        for, or for which others were stopped, must not go to another."""
        reserved = self._situation.reserved.values()
        kept = {task_id: place for place, task_id in enumerate((*self._situation.promised, *reserved))}
        found = (task for task in self._situation.waiting if task.task_id in kept)
        return sorted(found, key=lambda task: kept[task.task_id])

    def _behind(self) -> dict[tuple[str, str], Wait]:
        found = {}
        for task in self._situation.waiting:
            wait = self._waits.get(task.task_id)
            if wait is not None and wait.code in _OF_ALL:
                about = wait.about or (task.task_id if wait.until is not None else "")
                found[task.pool, task.team] = replace(wait, about=about)
            else:
                found.setdefault((task.pool, task.team), Wait(code=WaitCode.NO_FREE_PLACE, pool=task.pool))
        return found

    def _may_start(self, task: Waiting) -> bool:
        room = self._rooms.get(task.pool)
        if room is None or task.ranks > room.pool.capacity:
            self._wait(task, WaitCode.NEVER_FITS)
        elif not room.pool.ready and room.is_held:
            self._wait(task, WaitCode.RESERVED_FOR, about=self._holder)
        elif not room.pool.ready:
            if not self._turns.borrows(task):
                self._reserve(task, room)
            wait = of_a_pool_without_workers(task.pool, room.pool)
            self._wait(task, wait.code, wait.about, since=wait.since)
        elif (gave_back := self._borrows_behind(task)) is not None:
            until, first = gave_back
            self._wait(task, WaitCode.OVER_QUOTA, first if first != task.task_id else "", until)
        elif room.has_place(task):
            return True
        elif self._turns.borrows(task):
            self._wait(task, WaitCode.OVER_QUOTA)
        else:
            self._hold_up(task, room)
        return False

    def _borrows_behind(self, task: Waiting) -> tuple[float, str] | None:
        """When a task may borrow that gave its places back, or is in its team's line behind one that did, and which of
        them that is; None where nothing but places keeps it from starting."""
        if not self._turns.borrows(task):
            return None
        line = task.pool, task.team
        if (until := borrows_from(task)) > self._situation.now:  # of several the first borrows first
            self._gave_back.setdefault(line, (until, task.task_id))
        return self._gave_back.get(line)

    def _hold_up(self, task: Waiting, room: _Room) -> None:
        """A task within its team's quota does not fit: have places given back, or reserve them, and say why it
        waits."""
        lacks = task.ranks - room.open_places
        taken = self._given_back(task, room, lacks - room.soon)
        for order in taken:
            self._preemptions.append(Preemption(order.task_id, order.team, task.task_id, task.team))
            room.soon += order.ranks
        if lacks <= room.soon:
            if taken or task.task_id in self._situation.promised:
                self._promised.append(task.task_id)
            room.promise(task)
            self._turns.promise(task)
            self._wait(task, WaitCode.ABOUT_TO_START, about=next((order.task_id for order in taken), ""))
        elif room.pool.kept or room.kept or room.is_held:
            self._wait(task, WaitCode.RESERVED_FOR, about=self._holder if room.kept or room.is_held else "")
        else:
            self._reserve(task, room)
            self._wait(task, WaitCode.NO_FREE_PLACE)

    @property
    def _holder(self) -> str:
        """Task that room on machines is reserved for."""
        return next(iter(self._reserved.values()), "")

    def _reserve(self, task: Waiting, room: _Room) -> None:
        """Reserve room for a worker of a task's pool, if that waits for some and nobody has a reservation."""
        situation, shapes = self._situation, self._shapes
        if self._reserved or not room.pool.is_short or task.pool not in shapes or not situation.machines:
            return
        clearing = cleared(task.pool, shapes, situation.machines, situation.workers)
        if clearing is None:
            return
        own = min((_ends_in(order) for order in room.running), default=math.inf)
        if not clearing.is_idle and own <= clearing.gap_seconds:
            return  # a worker of its own pool is free before
        if not clearing.workers:
            # Ray has room and is about to use it. Where it does not, it sees something that is not known here.
            was_reserved = task.task_id in situation.reserved.values()
            since = situation.fits_since or situation.now
            if not was_reserved or situation.now - since > SOON_SECONDS:
                return
            self._fits_since = since
            self._again_at.append(since + SOON_SECONDS + 1)
        self._clearing = clearing
        self._reserved[task.pool] = task.task_id
        self._growth = growth(clearing, task.pool, shapes, situation.machines)
        for name, other in self._rooms.items():
            if name != task.pool and name in shapes:
                gone = [one for one in clearing.workers if one.pool == name]
                other.hold(gone, clearing.gap_seconds, shapes[name].ranks, self._growth[name])

    @property
    def _shapes(self) -> dict[str, Shape]:
        pools = self._situation.pools
        return {name: pool.shape for name, pool in pools.items() if pool.shape is not None}

    def _given_back(self, task: Waiting, room: _Room, lacks: int) -> tuple[Running, ...]:
        """Attempts of teams beyond their quotas that give so many places back; none if they have too few."""
        if lacks <= 0:
            return ()
        excess: dict[str, float] = {}
        for order in room.running:
            excess.setdefault(order.team, self._turns.excess(order.team))
        told = {preemption.task_id for preemption in self._preemptions}
        for order in self._situation.running:  # in other pools too: a quota is of all places
            if order.team in excess and (order.stops or order.task_id in told):
                excess[order.team] -= order.ranks
        can = [order for order in room.running if self._may_be_preempted(order) and order.task_id not in told]
        chosen: list[Running] = []
        while lacks > 0:
            of_excess = [order for order in can if excess[order.team] > 0 and order.team != task.team]
            if not of_excess:
                spared = (_spared_until(order) for order in room.running if excess[order.team] > 0)
                self._again_at += [until for until in spared if until > self._situation.now]
                return ()
            # The team that is furthest beyond its quota, and of its attempts the one that began last.
            newest = max(of_excess, key=lambda order: (excess[order.team], order.team, *_newest(order)))
            chosen.append(newest)
            can.remove(newest)
            excess[newest.team] -= newest.ranks
            lacks -= newest.ranks
        return tuple(chosen)

    def _may_be_preempted(self, order: Running) -> bool:
        is_spared = _spared_until(order) > self._situation.now
        return bool(order.task_id) and not (order.stops or is_spared or _ends_soon(order))

    def _wait(
        self,
        task: Waiting,
        code: WaitCode,
        about: str = "",
        until: float | None = None,
        since: float | None = None,
    ) -> None:
        """Note why a task waits. since: Default: since this was the reason first."""
        before = self._situation.waits.get(task.task_id)
        if since is None:
            since = before.since if before is not None and before.code is code else self._situation.now
        self._again_at += [] if until is None else [until]
        self._waits[task.task_id] = Wait(code=code, pool=task.pool, about=about, since=since, until=until)


_OF_NO_WORKER = (
    WaitCode.DRAINED,
    WaitCode.GANG_INCOMPLETE,
    WaitCode.NO_MACHINE,
    WaitCode.BASE_MODEL_LOADING,
)
"""Reasons of a pool of which no worker is ready."""
_OF_ALL = (WaitCode.OVER_QUOTA, WaitCode.RESERVED_FOR, *_OF_NO_WORKER)
"""Reasons that hold for a team's later tasks as well."""


def borrows_from(task: Waiting) -> float:
    """Unix time from which a task may borrow; 0 where its last attempt did not have to give its places back."""
    return 0.0 if task.preempted_at is None else task.preempted_at + PATIENCE_SECONDS


def of_a_pool_without_workers(name: str, pool: Pool) -> Wait:
    """Why tasks wait for a pool of which no worker is ready."""
    if pool.drained:
        return Wait(code=WaitCode.DRAINED, pool=name, about=pool.drained, since=pool.drained_since)
    code = (
        WaitCode.GANG_INCOMPLETE if pool.is_forming else
        WaitCode.NO_MACHINE if pool.is_placeless else WaitCode.BASE_MODEL_LOADING
    )  # fmt: skip
    return Wait(code=code, pool=name)


def _ends_in(order: Running) -> float:
    """Seconds until its places come back. Not known counts as now: then nothing may be put into the gap before it."""
    return 0.0 if order.stops or order.seconds_left is None else max(0.0, order.seconds_left)


def _ends_soon(order: Running) -> bool:
    return order.seconds_left is not None and order.seconds_left <= SOON_SECONDS


def _spared_until(order: Running) -> float:
    """Unix time until which an attempt is left alone."""
    return order.since + SPARED_SECONDS if order.was_preempted else -math.inf


def _newest(order: Running) -> tuple[bool, float, str]:
    """What attempts are compared by: of two the larger one gives back first."""
    return not order.was_preempted, order.since, order.task_id
