"""Room on machines that pools share: which workers would have to go so that one of another pool fits. Pure.

A *room* is what a machine has free, by Ray's names of resources (`CPU`, `GPU`, `memory`), as in `workers.gang.needs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Room = Mapping[str, float]
EPSILON = 1e-6
"""Ray counts in ten thousandths."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a worker of a pool takes."""

    ranks: int = 1
    needs: Room
    """Room that each rank takes; all ranks of a worker are alike."""
    min: int = 0
    """Workers that the pool always keeps."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker that is there or was asked for, as far as the room that it takes matters."""

    name: str
    pool: str
    machines: tuple[str, ...] = ()
    """Machines that it is on; none while it waits for room."""
    is_idle: bool = False
    """Whether it has nothing to do, so that it can be ended at once."""
    ends_in: float | None = None
    """Seconds until what it does ends; None: not known."""


@dataclass(frozen=True)
class Clearing:
    """The room that is made for a worker of one pool."""

    workers: tuple[Worker, ...]
    """Workers of other pools that have to go; none where it fits already."""
    machines: frozenset[str]
    """Machines that it then fits on."""

    @property
    def is_idle(self) -> bool:
        """Whether all that has to go has nothing to do."""
        return all(worker.is_idle for worker in self.workers)

    @property
    def gap_seconds(self) -> float:
        """Seconds until the last of them is done. Not known counts as now: then nothing may be put into the gap."""
        seconds = [0.0 if one.is_idle else one.ends_in for one in self.workers]
        return 0.0 if None in seconds else max((one for one in seconds if one is not None), default=0.0)


def ranks_on(room: Room, needs: Room) -> int:
    """Ranks for which a machine has room."""
    counts = [int((room.get(kind, 0.0) + EPSILON) // amount) for kind, amount in needs.items() if amount > 0]
    return min(counts, default=0)


def cleared(
    pool: str, shapes: Mapping[str, Shape], machines: Mapping[str, Room], workers: Iterable[Worker]
) -> Clearing | None:
    """Which workers of other pools have to go so that one more of a pool fits, those first that are done first.

    Args:
        machines: Machine to what is free there.
        workers: Those that there are, of all pools. As many of each as it always keeps stay.

    Returns:
        None where it does not fit whoever goes.

    Cost:
        O(w·log w + m) for w workers and m machines.
    """
    shape = shapes[pool]
    floor = _Floor(shape, machines)
    chosen: list[Worker] = []
    others = [worker for worker in workers if worker.pool != pool and worker.machines and worker.pool in shapes]
    may_go = {name: -one.min for name, one in shapes.items()}
    for worker in others:
        may_go[worker.pool] += 1
    for worker in sorted(others, key=_done_in):
        if floor.count >= shape.ranks:
            break
        if may_go[worker.pool] > 0:
            may_go[worker.pool] -= 1
            floor.change(worker, shapes[worker.pool], 1)
            chosen.append(worker)
    if floor.count < shape.ranks:
        return None
    for worker in reversed(chosen[:-1]):  # the last one was needed; of the others, those that are done last may stay
        floor.change(worker, shapes[worker.pool], -1)
        if floor.count >= shape.ranks:
            chosen.remove(worker)
        else:
            floor.change(worker, shapes[worker.pool], 1)
    return Clearing(tuple(chosen), floor.chosen(chosen))


def growth(clearing: Clearing, pool: str, shapes: Mapping[str, Shape], machines: Mapping[str, Room]) -> dict[str, int]:
    """Other pool to the workers that it may still start while room is made for a worker of one: as many as fit
    elsewhere, and none where Ray could place them in that room."""
    found = {}
    for name, shape in shapes.items():
        if name != pool:
            counts = {machine: ranks_on(room, shape.needs) for machine, room in machines.items()}
            is_apart = not any(counts.get(machine) for machine in clearing.machines)
            found[name] = sum(counts.values()) // shape.ranks if is_apart else 0
    return found


class _Floor:
    """Ranks of one shape for which machines have room, while workers come and go."""

    def __init__(self, shape: Shape, machines: Mapping[str, Room]) -> None:
        self._shape = shape
        self._rooms = {machine: dict(room) for machine, room in machines.items()}
        self._counts = {machine: ranks_on(room, shape.needs) for machine, room in self._rooms.items()}
        self.count = sum(self._counts.values())

    def change(self, worker: Worker, shape: Shape, sign: int) -> None:
        """A worker gives its room back (1), or keeps it after all (-1)."""
        for machine, ranks in _spread(worker, shape):
            room = self._rooms.get(machine)
            if room is None:
                continue  # the machine is drained, or gone
            for kind, amount in shape.needs.items():
                room[kind] = room.get(kind, 0.0) + sign * ranks * amount
            count = ranks_on(room, self._shape.needs)
            self.count += count - self._counts[machine]
            self._counts[machine] = count

    def chosen(self, workers: Sequence[Worker]) -> frozenset[str]:
        """Machines for a worker: those that others leave first, then those with the most room."""
        left = {machine for worker in workers for machine in worker.machines}
        order = sorted(self._counts, key=lambda machine: (machine not in left, -self._counts[machine], machine))
        found, count = [], 0
        for machine in order:
            if count < self._shape.ranks and self._counts[machine]:
                found.append(machine)
                count += self._counts[machine]
        return frozenset(found)


def _spread(worker: Worker, shape: Shape) -> Iterable[tuple[str, int]]:
    """Machine to the ranks of a worker on it, as evenly as can be: Ray tells only which machines these are."""
    each, more = divmod(shape.ranks, len(worker.machines))
    return [(machine, each + (number < more)) for number, machine in enumerate(worker.machines)]


def _done_in(worker: Worker) -> tuple[bool, float, str]:
    """Idle ones first, then by their ends; what does not say when it ends is last."""
    return (
        not worker.is_idle,
        0.0 if worker.is_idle else math.inf if worker.ends_in is None else worker.ends_in,
        worker.name,
    )
