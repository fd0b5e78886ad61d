"""A gang: N processes that work on one order together. Here is which rank is waited for, which is lost, and what then.

A plain class, tested without Ray; the processes are behind `Ranks`, whose Ray side is `gang_actor.py`. Nothing is
trained here, and no library of the ranks is imported.

Every rank gets every order, each with its `Rank`; the outcome is rank 0's. A rank that fails or is gone leaves the
others in a collective operation that may never end. So they get a short grace period, then all are ended, and the next
order gets new ones.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from configs.errors import Corrupt, InvalidInput, Unavailable
from configs.settings import WorkerShape
from workers.order_book import OrderBook
from workers.orders import (
    BaseLayout,
    Evaluated,
    EvaluatedTogether,
    Failed,
    LogLine,
    Order,
    Outcome,
    Phase,
    Progress,
    Rank,
    RankDied,
    RankLost,
    RankSilent,
    Trained,
)
from workers.process_monitor import ProcessEnd

GB = 10**9
WATCH_SECONDS = 0.5
"""Interval at which ranks at work are asked for a sign of life, and told which order to stop."""
NOTICE_SECONDS = 6.0
"""Silence after which a rank at work is reported; it is lost when its lease ends."""
START_SECONDS = 180.0
"""Longest silence of a new process: it imports torch before it answers for the first time."""
GRACE_SECONDS = 10.0
"""Time from the first failure (or rank 0's outcome) until the ranks that are still at work are ended: gloo notices a
dead peer in 3 s, and rank 0's own message says more than the supervisor's would."""
SAID_BY_TEAMS = ("input", "cancelled", "preempted", "rows")
"""Faults that no other rank's end can have caused: they outweigh everything but a success."""


class NoPlace(Unavailable):
    """There is no place for all ranks of a gang. An order waits for one; `warm` raises this."""


Call = Any
"""A pending call to a rank; opaque here."""


class Ranks(Protocol):
    """The processes of a gang, in their places."""

    @property
    def size(self) -> int: ...

    def start(self, waits: Callable[[str], None]) -> None:
        """Start all of them, in the places of earlier ones where these places still exist.

        Args:
            waits: Called again and again while there is no place, with the reason, which is empty in the first seconds.
                Its exception ends the wait.

        Raises:
            NoPlace: There has been no place for all of them for a while.
        """
        ...

    def end_of(self, index: int) -> ProcessEnd | None:
        """How a rank's process ended, within seconds; None: it lives, or nobody knows."""
        ...

    def end(self, leave: bool) -> None:
        """Kill all of them; returns when they are dead. `leave`: give up their places too."""
        ...

    def warm(self, index: int) -> Call:
        """Make one rank load the base model; see WorkerActor for the result of each call."""
        ...

    def meeting_place(self, index: int) -> Call: ...

    def run(self, index: int, order: Order, rank: Rank) -> Call: ...

    def progress(self, index: int) -> Call: ...

    def pid(self, index: int) -> Call: ...

    def cancel(self, index: int, token: str) -> Call: ...

    def preempt(self, index: int, token: str) -> Call: ...

    def landed(self, calls: Sequence[Call], timeout_seconds: float) -> list[Call]:
        """The calls that are done, after waiting at most this long for the first."""
        ...

    def result(self, call: Call) -> Any:
        """Result of a call that is done. Raises RankLost, or the exception of the other side."""
        ...


class Gang:
    """Does orders with all ranks. Has the methods of a worker.

    Args:
        ranks: The processes; none has been started.
        lease_seconds: Silence after which a rank is lost.
    """

    def __init__(self, ranks: Ranks, lease_seconds: float) -> None:
        self._ranks = ranks
        self._lease_seconds = lease_seconds
        self._book = OrderBook()
        self._lock = threading.Lock()
        self._nodes: tuple[str, ...] = ()
        """Address of each rank's machine; empty while there is no whole gang."""
        self._layout: BaseLayout | None = None
        """Layout that the ranks reported once they were warm; later ranks report the same."""
        self._token = ""
        self._stops: dict[str, str] = {}
        """Token of an order to `cancel` or `preempt`: what the ranks should do with it."""
        self._progress = Progress()
        self._lines: list[LogLine] = []
        """Lines for the log of the task under way."""
        self._silent: RankLost | None = None
        """The rank at work that does not answer, and is not lost yet."""
        self._told = ("", "")
        """Token, and the reason why its ranks wait for places: logged once for each reason, not every minute."""

    def warm(self) -> BaseLayout:
        """Start the ranks if there are none, and load the base model in each.

        Returns:
            What the control plane needs to know of the base model.

        Raises:
            InvalidInput, Unavailable: See `load_base_model`; RankLost or no place for a rank.
        """
        # Answered while an order is under way: a restarted control plane waits for this before it asks for the order.
        if self._token and self._layout:
            return self._layout
        return self._book.between(self._warm).result()

    def run(self, order: Order) -> Outcome:
        """Do an order, or wait for the one with the same token, also after the ranks were restarted.

        Returns:
            Rank 0's outcome; if it has none, another rank's failure, or `lost`.

        Raises:
            Unavailable: A rank's machine was lost before it began, or the storage was away; the order may be given
                again. That a rank's process died while it loaded is an outcome, `died`. Where
                there is no place for the ranks, the order waits until there is one or it is stopped.
        """
        return self._book.run(order.token, lambda: self._outcome(order))

    def progress(self) -> Progress:
        """What rank 0 is doing, with the log lines since the call before.

        Raises:
            Unavailable: No order is under way, and a rank is missing; `warm` makes the gang whole.
        """
        token = self._token
        if not token:
            if not self._nodes:
                raise Unavailable("the gang is being formed")
            progress: Progress = self._all(self._ranks.progress)[0]
            return progress
        if self._nodes:
            call = self._ranks.progress(0)
            # Not for long: the watch over all ranks reports a rank 0 that does not answer.
            if self._ranks.landed([call], min(NOTICE_SECONDS, self._lease_seconds) / 2):
                with contextlib.suppress(RankLost):  # `run` reports it
                    self._note(token, self._ranks.result(call))
        with self._lock:
            lines, self._lines = tuple(self._lines), []
            trouble = self._silent or self._progress.trouble
            return replace(self._progress, token=token, trouble=trouble, log_lines=lines)

    def cancel(self, token: str) -> bool:
        """Stop an order as its ranks stop it, all at one place; its outcome is then `Failed` with fault `cancelled`.

        Returns:
            False when it is done or was never given; then nothing happens.
        """
        return self._tell(token, "cancel")

    def preempt(self, token: str) -> bool:
        """Write a checkpoint and stop; see Worker.preempt."""
        return self._tell(token, "preempt")

    def pids(self) -> list[tuple[str, int]]:
        """Each rank's machine and its process id there, for people and for tests that kill one."""
        return list(zip(self._nodes, self._all(self._ranks.pid), strict=True))

    # --- an order ------------------------------------------------------------------------------------------------

    def _outcome(self, order: Order) -> Outcome:
        with self._lock:
            self._token, self._progress, self._lines = order.token, Progress(token=order.token, phase=Phase.LOADING), []
        try:
            places = self._placed()
            self._progress = Progress(token=order.token, phase=Phase.LOADING)
            self._loaded()  # each may take its time; once they have the order, they do not wait long for each other
            where = ", ".join(f"{count} on {node}" for node, count in Counter(self._nodes).items())
            self._lines.append(f"{self._ranks.size} ranks: {where}")
            outcome = self._supervised(order, *places[0])
        except Unavailable as error:
            stop = self._stops.get(order.token)
            if stop is None and isinstance(error, RankDied):
                # Told, and charged to the budget for such ends: given again in silence, it could go on for ever.
                self._disband()
                what = f"while the base model was loaded, {error.what}"
                return Failed(token=order.token, fault="died", message=what, log_lines=tuple(self._lines))
            if stop is None:
                raise
            fault = "cancelled" if stop == "cancel" else "preempted"
            # If the order were given again, the stop would be lost. It had no place yet, so it used no worker time.
            return Failed(token=order.token, fault=fault, message=f"{fault} while it waited", worker_seconds=0.0)
        finally:
            with self._lock:
                self._token = ""
                self._stops.pop(order.token, None)
        lines = (*self._lines, *getattr(outcome, "log_lines", ()))
        return outcome if isinstance(outcome, Evaluated | EvaluatedTogether) else replace(outcome, log_lines=lines)

    def _supervised(self, order: Order, address: str, port: int) -> Outcome:
        size = self._ranks.size
        answers = self._answers(
            {
                self._ranks.run(i, order, Rank(index=i, size=size, master_address=address, master_port=port)): i
                for i in range(size)
            }
        )
        if len(answers) < size or any(isinstance(answer, RankLost) for answer in answers.values()):
            self._disband()
        return _verdict(order.token, answers)

    def _answers(self, calls: dict[Call, int]) -> dict[int, Any]:
        """Each rank's answer, or why it gave none, in the order of arrival.

        Once rank 0 is done or one has failed, the others have a grace period; a rank that is not done by then is
        missing.
        """
        answers: dict[int, Any] = {}
        watch, until = _Watch(self._ranks), math.inf
        while calls and time.monotonic() < until:
            for call in self._ranks.landed(list(calls), min(WATCH_SECONDS, until - time.monotonic())):
                answers[calls.pop(call)] = self._answer(call)
            silence = self._lease_seconds if until == math.inf else GRACE_SECONDS / 2
            if watch.is_due():
                lost = watch.silent(calls.values(), silence)
                self._silent = self._noticed(watch.unanswered(calls.values(), NOTICE_SECONDS))
                for index in lost:
                    answers[index] = RankSilent(f"no answer for {silence:.0f} s")
                    calls = {call: other for call, other in calls.items() if other != index}
                stop = self._stops.get(self._token)
                for index in calls.values() if stop else ():
                    tell = self._ranks.cancel if stop == "cancel" else self._ranks.preempt
                    tell(index, self._token)
            if 0 in answers or any(isinstance(answer, Failed | Exception) for answer in answers.values()):
                until = min(until, time.monotonic() + GRACE_SECONDS)
        self._silent = None
        lost = [index for index, answer in answers.items() if isinstance(answer, RankLost)]
        # How the others ended follows from the first; each answer may take a while, and the machines wait for it.
        return {index: self._named(index, answer, index in lost[:1]) for index, answer in answers.items()}

    def _noticed(self, indices: Sequence[int]) -> RankLost | None:
        if not indices:
            return None
        names = ", ".join(f"{index} on {self._nodes[index]}" if self._nodes else str(index) for index in indices)
        what = f"rank {names} of {self._ranks.size} does not answer; it is lost after {self._lease_seconds:.0f} s"
        return RankLost(what)

    def _answer(self, call: Call) -> Any:
        try:
            return self._ranks.result(call)
        except Exception as error:
            return error

    def _named(self, index: int, answer: Any, asks_for_end: bool) -> Any:
        if isinstance(answer, RankLost):
            node = f" on {self._nodes[index]}" if self._nodes else ""
            rank = f"rank {index} of {self._ranks.size}{node}"
            end = self._ranks.end_of(index) if asks_for_end and not isinstance(answer, RankSilent) else None
            if end is not None and end.is_its_own:
                return RankDied(f"{rank} (pid {end.pid}) died: {end}", answer.where, answer.todo)
            cause = answer.what if end is None else str(end)
            return RankLost(f"{rank} was lost: {cause}", answer.where, answer.todo)
        return answer

    def _tell(self, token: str, stop: str) -> bool:
        if not self._book.is_open(token):
            return False
        with self._lock:
            if self._stops.get(token) != "cancel":
                self._stops[token] = stop
        return True

    def _note(self, token: str, progress: Progress) -> None:
        with self._lock:
            if progress.token == token == self._token:
                self._progress = progress
                self._lines += progress.log_lines

    # --- the ranks -----------------------------------------------------------------------------------------------

    def _warm(self) -> BaseLayout:
        self._formed()
        return self._loaded()

    def _loaded(self) -> BaseLayout:
        layouts: list[BaseLayout] = self._all(self._ranks.warm)
        if len({layout.sha256 for layout in layouts}) > 1:
            raise InvalidInput("the ranks loaded different weights", ", ".join(self._nodes), "make the sources equal")
        self._layout = layouts[0]
        return layouts[0]

    def _placed(self) -> list[tuple[str, int]]:
        """As `_formed`, but waits as long as there is no place."""
        again = True
        while True:
            try:
                return self._formed()
            except NoPlace:
                continue
            except RankLost:
                if not again:
                    raise
                again = False  # the places were on a machine that is gone, and Ray had not noticed

    def _formed(self) -> list[tuple[str, int]]:
        """(address, free port) of each rank, all of them there."""
        try:
            if self._nodes:
                return self._met()
        except RankLost:
            self._disband()
        try:
            self._ranks.start(self._waits)
            return self._met(starting=True)
        except BaseException:
            self._disband(leave=True)  # a place that is silent for so long may be gone without Ray's knowing
            raise

    def _waits(self, why: str) -> None:
        with self._lock:
            if why:
                self._progress = replace(self._progress, phase=Phase.WAITING)
            if why and self._told != (self._token, why):
                self._told = (self._token, why)
                self._lines.append(f"waits: {why}")
        if self._token in self._stops:
            raise Unavailable("no longer wanted")

    def _met(self, starting: bool = False) -> list[tuple[str, int]]:
        places = self._all(self._ranks.meeting_place, starting)
        self._nodes = tuple(address for address, _ in places)
        return places

    def _disband(self, leave: bool = False) -> None:
        self._nodes = ()
        self._ranks.end(leave)

    def _all(self, ask: Callable[[int], Call], starting: bool = False) -> list[Any]:
        """Ask every rank; the answers in the order of the ranks. An answer may take any time while its rank is alive.

        Raises:
            RankLost: One is gone or silent. Or the exception of the other side.
        """
        calls = {ask(index): index for index in range(self._ranks.size)}
        answers: dict[int, Any] = {}
        watch = _Watch(self._ranks)
        silence = START_SECONDS if starting else self._lease_seconds
        while calls:
            for call in self._ranks.landed(list(calls), WATCH_SECONDS):
                answers[calls.pop(call)] = self._answer(call)
            if watch.is_due():
                silent = watch.silent(calls.values(), silence)
                answers |= {index: RankSilent(f"no answer for {silence:.0f} s") for index in silent}
            for index, answer in answers.items():
                if isinstance(answer, Exception):
                    raise self._named(index, answer, True)
        return [answers[index] for index in sorted(answers)]


class _Watch:
    """Asks ranks again and again whether they are there."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: dict[int, tuple[Call, float]] = {}
        self._asked_at = -math.inf

    def is_due(self) -> bool:
        """Whether it is time to ask again: not after every answer, since there are as many answers as ranks."""
        return time.monotonic() - self._asked_at >= WATCH_SECONDS

    def silent(self, indices: Iterable[int], limit_seconds: float) -> list[int]:
        """Ranks that left their last question unanswered for so long. A rank that is gone shows in its other calls."""
        now, found = time.monotonic(), []
        self._asked_at = now
        answered = set(self._ranks.landed([call for call, _ in self._asked.values()], 0)) if self._asked else set()
        for index in indices:
            call, asked_at = self._asked.get(index, (None, now))
            if call is None or call in answered:
                self._asked[index] = (self._ranks.pid(index), now)
            elif now - asked_at > limit_seconds:
                found.append(index)
        return found

    def unanswered(self, indices: Iterable[int], limit_seconds: float) -> list[int]:
        """Ranks that had left their last question unanswered for so long when `silent` looked."""
        asked = {index: self._asked[index][1] for index in indices if index in self._asked}
        return [index for index, at in asked.items() if self._asked_at - at > limit_seconds]


def needs(workers: WorkerShape) -> dict[str, float]:
    """Resources that one rank needs of its machine, by Ray's names."""
    every = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": int((workers.memory_gb or 0) * GB)}
    return {kind: count for kind, count in every.items() if count}


def needed(workers: WorkerShape) -> str:
    """The same, for people."""
    memory = f" and {workers.memory_gb:g} GB of memory" if workers.memory_gb else ""
    return f"{workers.cpus:g} CPUs and {workers.gpus:g} GPUs{memory}"


def room_on(workers: WorkerShape, node: Mapping[str, Any]) -> int:
    """Ranks for which a machine has room with nothing else on it. node: One of `ray.nodes`."""
    return min(int(node["Resources"].get(kind, 0) // count) for kind, count in needs(workers).items())


def no_place(workers: WorkerShape, nodes: Sequence[Mapping[str, Any]], avoid: Collection[str] = ()) -> str:
    """Why a gang finds no place on these machines, for people.

    Args:
        nodes: Result of `ray.nodes`.
        avoid: Ids of those on which it is not placed: they are drained.
    """
    every = [node for node in nodes if node["Alive"]]
    up = [node for node in every if node["NodeID"] not in avoid]
    room = sum(room_on(workers, node) for node in up)
    drained = sorted(node["NodeManagerAddress"] for node in every if node["NodeID"] in avoid and room_on(workers, node))
    down = sorted({node["NodeManagerAddress"] for node in nodes} - {node["NodeManagerAddress"] for node in every})
    missing = f" ({', '.join(down[:8])} went away)" if down else ""
    taken = ", but something else has taken it" if room >= workers.ranks else ""
    out = f"; drained, and not counted: {', '.join(drained[:8])}" if drained else ""
    return (
        f"no place for {workers.ranks} ranks with {needed(workers)} each: the {len(up)} "
        f"machines that are up{missing} have room for {room}{taken}{out}"
    )


def _verdict(token: str, answers: dict[int, Any]) -> Outcome:
    """One outcome from those of the ranks, given in the order of arrival: the first failure caused the others.

    Raises:
        Unavailable: The first failure was one of the storage.
        Corrupt: A rank read bytes that are not what was written.
    """
    lead = answers.get(0)
    if isinstance(lead, Trained | Evaluated | EvaluatedTogether):
        return lead
    lines = lead.log_lines if isinstance(lead, Failed) else ()
    failures = list(answers.values())
    said = [failure for failure in failures if isinstance(failure, Failed)]
    for fault in SAID_BY_TEAMS:
        for failure in said:
            if failure.fault == fault:
                return replace(failure, log_lines=lines)
    if damage := next((failure for failure in failures if isinstance(failure, Corrupt)), None):
        raise damage
    for failure in failures:
        if isinstance(failure, RankLost):
            fault = "died" if isinstance(failure, RankDied) else "lost"
            return Failed(token=token, fault=fault, message=str(failure), log_lines=lines)
    first = failures[0]
    if isinstance(first, Failed):
        return replace(first, log_lines=lines)
    if isinstance(first, Unavailable):
        raise first
    return Failed(token=token, fault="bug", message=f"{type(first).__name__}: {first}", log_lines=lines)
