"""The world of the fault simulation: one disk, machines that take turns at every storage call, and what goes wrong.

Every machine runs the real, blocking store code in a thread of its own, but only the one that holds the turn runs, and
the turn moves only here, by the seed: at a storage call, or where a lock is taken by another thread. So a schedule is a
sequence of random numbers: the same seed gives the same one. Inside `World.simulated` the store's modules also see this
world's clock, names and locks, and their thread pools make one call after another. Nothing here knows what the store
promises: that is in model.py, which receives every effect on the disk.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from configs.errors import NotFound
from subspace_store.storage.memory import MemoryStorage

CRASH_BEFORE = "crash before the effect"
CRASH_AFTER = "crash after the effect"
LOST_REQUEST = "request lost"
LOST_REPLY = "reply lost after the effect"
LATE = "no reply, the effect comes late"
CRASH_LATE = "crash, the effect comes late"
CUT = "cut off for some calls"
TWICE = "request carried out twice"
STALL = "stall"
FULL = "no space for some calls"
ON_READS = (CRASH_BEFORE, LOST_REQUEST, CUT, STALL)
FAULTS = (*ON_READS, CRASH_AFTER, LOST_REPLY, LATE, CRASH_LATE, TWICE, FULL)
"""Kinds of faults. All of them can happen to a write."""

RATES = (0.0, 0.005, 0.02, 0.05)
"""Faults per storage call; a seed draws one. Above 0.05 hardly any merge gets through."""
STICKINESS = (0.3, 0.7, 0.9)
"""Chance that the machine at work makes its next call before any other makes one; a seed draws one."""
COMMIT_TIMES = 4
STALL_STEPS = 200
LATE_STEPS = 150
"""Longest stall and longest delay, in steps: several merges of another machine fit in."""
CUT_CALLS = 30
"""Longest cut, in calls of one process: more than the log's attempts, so that it must leave an outcome unknown."""
FULL_CALLS = 30
"""Longest time without space, in writes of one process."""
STEPS_MAX = 50_000
"""Most steps of a run: twenty times those of the longest seeds."""
CONSTANTS = {"FIRST_WAIT_SECONDS": 0.0, "CHECKPOINT_EVERY": 8, "SNAPSHOT_EVERY": 3}
"""Constants that are smaller in the simulation, so that a short run meets checkpoints and snapshots."""


T = TypeVar("T")


class Crash(BaseException):
    """The process dies at this call. Not an `Exception`: the code under test must not catch it and go on."""


class Violation(BaseException):
    """A promise that was not kept. Not an `Exception`, for the same reason."""


class Observer(Protocol):
    """Receives every effect on the disk, in the order in which they happen; raises Violation."""

    def created(self, key: str, content: bytes) -> None: ...

    def written(self, key: str, before: bytes | None, content: bytes) -> None: ...

    def deleted(self, key: str) -> None: ...


@dataclass(eq=False)
class Machine:
    """A thread: it runs one process after another, or joins the process of another machine."""

    name: str
    turn: threading.Lock = field(default_factory=threading.Lock)
    sleeps_until: int = 0
    processes: int = 0
    """Number of processes that it has begun so far."""


class World:
    """The disk, the turns and the faults of one seed.

    Args:
        seed: Seed of all random numbers: it decides everything.
        observer: Receives every effect.
    """

    def __init__(self, seed: int, observer: Observer) -> None:
        self.random = random.Random(seed)
        self.disk = MemoryStorage("chaos")
        for key in self.disk.keys(""):
            self.disk.delete(key)
        self.observer = observer
        self.fault_rate = self.random.choice(RATES)
        self.kinds = {kind for kind in FAULTS if self.random.random() < 0.7}
        self.stickiness = self.random.choice(STICKINESS)
        self.step = 0
        self.counts: Counter[str] = Counter()
        self.trace: list[str] = []
        self.violation: str | None = None
        self.lands_late = False
        """Whether the present effect on the disk is of a call that nobody waits for any more."""
        self._late: list[tuple[int, int, str, Callable[[], object]]] = []
        self.running: Machine | None = None
        """The machine that has the turn; None while there are no faults: before the machines start and after all have
        ended."""
        self._alive: list[Machine] = []
        self._over = threading.Lock()
        self._names = 0

    # Turns

    def run(self, programs: Iterable[tuple[str, Callable[[Machine], None]]]) -> None:
        """Run the machines' programs until all have ended or a promise was broken."""
        threads = []
        for name, program in programs:
            machine = Machine(name)
            machine.turn.acquire()
            self._alive.append(machine)
            threads.append(threading.Thread(target=self._live, args=(machine, program), daemon=True))
        self._over.acquire()
        for thread in threads:
            thread.start()
        self._choose(None).turn.release()
        self._over.acquire()
        for thread in threads:
            thread.join()
        self.running = None

    def switch(self, machine: Machine) -> None:
        """A storage call is about to happen: let late effects land, and perhaps other machines run first."""
        self._tick()
        chosen = self._choose(machine)
        if chosen is not machine:
            chosen.turn.release()
            machine.turn.acquire()
            self.running = machine
        if self.violation:
            raise Violation(self.violation)

    def settle(self) -> None:
        """Let every effect that is still on its way land."""
        while self._late:
            self.step = max(self.step, self._late[0][0])
            self._tick()

    def _live(self, machine: Machine, program: Callable[[Machine], None]) -> None:
        machine.turn.acquire()
        self.running = machine
        try:
            if not self.violation:
                program(machine)
        except Violation as broken:
            self.violation = self.violation or str(broken)
        except BaseException:
            self.violation = self.violation or f"unexpected: {traceback.format_exc()}"
        self._alive.remove(machine)
        (self._choose(None).turn if self._alive else self._over).release()

    def _choose(self, current: Machine | None) -> Machine:
        goes_on = current and not self.violation and current.sleeps_until <= self.step
        if current and goes_on and self.random.random() < self.stickiness:
            return current
        awake = [machine for machine in self._alive if machine.sleeps_until <= self.step]
        if awake:
            return self.random.choice(awake)
        first = min(self._alive, key=lambda machine: machine.sleeps_until)
        self.step = first.sleeps_until
        return first

    def _tick(self) -> None:
        self.step += 1
        if self.step > STEPS_MAX:
            raise Violation("no end: the machines go on for ever")
        while self._late and self._late[0][0] <= self.step:
            _, _, what, effect = self._late.pop(0)
            self.note("disk", f"{what} lands")
            self.lands_late = True
            effect()
            self.lands_late = False

    def later(self, what: str, effect: Callable[[], object]) -> None:
        """Let an effect happen later, when nobody waits for it any more."""
        due = self.step + self.random.randint(1, LATE_STEPS)
        self._late.append((due, len(self.trace), what, effect))
        self._late.sort(key=lambda late: late[:2])

    # Faults

    def fault(self, kinds: tuple[str, ...], times: int = 1) -> str | None:
        """The kind of fault that happens at this call, if any.

        Args:
            times: Factor by which a fault is likelier than at other calls.
        """
        if self.random.random() >= times * self.fault_rate:
            return None
        possible = [kind for kind in kinds if kind in self.kinds]
        kind = self.random.choice(possible) if possible else None
        if kind:
            self.counts[kind] += 1
        return kind

    def note(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.step:6d} {who:5s} {what}")

    # Effects

    def create(self, key: str, content: bytes) -> bool:
        if not self.disk.create(key, content):
            return False
        self.observer.created(key, content)
        return True

    def write(self, key: str, content: bytes) -> None:
        try:
            before: bytes | None = self.disk.read(key)
        except NotFound:
            before = None
        self.disk.write(key, content)
        self.observer.written(key, before, content)

    def delete(self, key: str) -> None:
        self.disk.delete(key)
        self.observer.deleted(key)

    # What the store's modules see instead of this machine

    @contextlib.contextmanager
    def simulated(self) -> Iterator[None]:
        """While it lasts, the store's modules have this world's clock, names and constants, and no threads.

        This applies to the whole process: nothing else may use the store meanwhile.
        """
        stand_in = _StandIn(self)
        swaps: list[tuple[object, object]] = [
            (time, stand_in),
            (secrets, stand_in),
            (threading, stand_in),
            (ThreadPoolExecutor, _InLine),
        ]
        patched: list[tuple[object, str, object]] = []
        for name, module in list(sys.modules.items()):
            if name.startswith("subspace_store.") and not name.startswith("subspace_store.chaos"):
                for attribute, value in list(vars(module).items()):
                    new: object = CONSTANTS.get(attribute, next((other for old, other in swaps if value is old), value))
                    if new is not value:
                        patched.append((module, attribute, value))
                        setattr(module, attribute, new)
        try:
            yield
        finally:
            for place, attribute, value in patched:
                setattr(place, attribute, value)

    def now(self) -> float:
        """Time of the simulated clock, in seconds."""
        return 1e9 + self.step

    def next_name(self) -> int:
        self._names += 1
        return self._names


class _StandIn:
    """Stands for the modules `time`, `secrets` and `threading`: counts instead of measuring or drawing."""

    def __init__(self, world: World) -> None:
        self.world = world

    def time(self) -> float:
        return self.world.now()

    def time_ns(self) -> int:
        return (10**9 + self.world.step) * 10**9

    def perf_counter(self) -> float:
        return float(self.world.step)

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        """Return at once: other machines run at the next storage call."""

    def token_hex(self, count: int) -> str:
        return f"{self.world.next_name():0{2 * count}x}"

    def RLock(self) -> _TurnLock:
        return _TurnLock(self.world)

    Lock = RLock


class _TurnLock:
    """A lock: a machine that waits for it passes the turn on instead of keeping it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.holder: Machine | None = None
        self.depth = 0

    def __enter__(self) -> _TurnLock:
        machine = self.world.running
        while self.depth and self.holder is not machine:
            assert machine is not None
            self.world.switch(machine)
        self.holder = machine
        self.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


class _InLine:
    """Stands for ThreadPoolExecutor: the calls are made one after another by the machine that asks."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __enter__(self) -> _InLine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def shutdown(self, **options: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return map(function, *items)

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future
