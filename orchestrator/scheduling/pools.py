"""Which pool a task gets, and how many workers a pool has. Pure: settings and counts come in, a choice goes out.

A pool is a group of workers that are all alike. A task is given to one pool when it is submitted, and stays there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import InvalidInput
from configs.settings import DEFAULT_POOL, WORKER, PoolSettings
from configs.task_spec import ResourceSpec
from orchestrator.scheduling.machines import Shape
from workers.gang import needs as room_for_a_rank

ANY = ResourceSpec()
"""What a task needs that asks for nothing."""


def pools_of(pools: Mapping[str, PoolSettings], base_model: str) -> dict[str, PoolSettings]:
    """The pools whose workers load a base model."""
    return {name: pool for name, pool in pools.items() if pool.base_model == base_model}


def chosen_pool(pools: Mapping[str, PoolSettings], named: str | None, needs: ResourceSpec | None) -> str:
    """Name of the pool that a task gets: the one that it names, or the smallest that has what it needs.

    Args:
        pools: Those of its base model.

    Raises:
        InvalidInput: There is no such pool, or none that fits; says what there is.
    """
    if named is not None:
        if named not in pools:
            raise InvalidInput(f"there is no pool '{named}' for its base model", "pool", f"pools: {told(pools)}")
        return named
    fitting = [name for name, pool in pools.items() if fits(pool, needs or ANY)]
    if not fitting:
        asked = needs or ANY
        what = f"no pool has {counted_ranks(asked.ranks)} with {asked.gpus:g} GPUs each"
        raise InvalidInput(what, "resources", f"ask for what would fit: {told(pools)}")
    return min(fitting, key=lambda name: size(name, pools[name]))


def fits(pool: PoolSettings, needs: ResourceSpec) -> bool:
    """Whether each worker of a pool has what a task needs."""
    return needs.ranks <= pool.ranks and needs.gpus <= pool.gpus


def size(name: str, pool: PoolSettings) -> tuple[int, float, float, float, str]:
    """What pools are compared by, the smallest first; of equal ones the first by name."""
    return pool.ranks, pool.gpus, pool.cpus, pool.memory_gb or 0.0, name


def described(pools: Mapping[str, PoolSettings]) -> dict[str, str]:
    """Pool to what it has, for people, the smallest first."""
    names = sorted(pools, key=lambda name: size(name, pools[name]))
    return {name: f"{counted_ranks(pools[name].ranks)} with {pools[name].gpus:g} GPUs each" for name in names}


def told(pools: Mapping[str, PoolSettings]) -> str:
    """The same in one line."""
    return "; ".join(f"'{name}', {has}" for name, has in described(pools).items()) or "none"


def counted_ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def worker_name(pool: str, number: int) -> str:
    """Name of a worker, from 0; that of its Ray actor too."""
    return f"{WORKER if pool == DEFAULT_POOL else pool}-{number}"


def pool_of(worker: str) -> str:
    """Name of the pool that a worker belongs to."""
    pool = worker.rpartition("-")[0]
    return DEFAULT_POOL if pool == WORKER else pool


def number_of(worker: str) -> int:
    """Number of a worker in its pool; -1 where its name is none."""
    number = worker.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def shape_of(settings: PoolSettings) -> Shape:
    """What a worker of a pool takes on machines."""
    return Shape(ranks=settings.ranks, needs=room_for_a_rank(settings), min=settings.min)


# --- how many workers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A worker of a pool, as far as its number matters."""

    name: str
    idle_since: float | None = None
    """Unix time since which it has nothing to do, or was started in vain; None: it is at work."""
    loads: bool = False
    """Whether it loads the base model: it has not had nothing to do yet, whatever `idle_since` says."""
    ends: bool = False
    """Whether it is drained: it gets nothing new, and ends when it has nothing to do."""


@dataclass(frozen=True)
class Change:
    """Workers that a pool gets, and workers that end."""

    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


def resized(
    pool: str,
    settings: PoolSettings,
    seats: Sequence[Seat],
    wanted: int,
    now: float,
    taken: Collection[str] = (),
    starts_max: int | None = None,
) -> Change:
    """Which workers a pool starts and ends now.

    Args:
        seats: Its workers, ready or not.
        wanted: Workers beside those at work for which there is something to do.
        taken: Names of workers that are drained, whether they are there or not: each is a worker less.
        starts_max: Most workers that it may start now, while room is made for another pool; None: as many as it wants.
    """
    ends = [seat.name for seat in seats if seat.ends and seat.idle_since is not None]
    stays = [seat for seat in seats if not seat.ends]
    out = len({*taken})
    least, most = max(0, settings.min - out), max(0, settings.max - out)
    at_work = sum(seat.idle_since is None for seat in stays)
    target = min(most, max(least, at_work + wanted))
    names = {seat.name for seat in seats} | {*taken}
    more = target - len(stays)
    starts = _free_names(pool, names, more if starts_max is None else min(more, starts_max))
    idle = sorted((seat for seat in stays if seat.idle_since is not None and not seat.loads), key=_longest_idle)
    loading = sum(seat.idle_since is not None and seat.loads for seat in stays)  # of too many, those end later
    for seat in idle[: max(0, len(stays) - target - loading)]:
        if now - (seat.idle_since or 0.0) >= settings.idle_seconds:
            ends.append(seat.name)
    return Change(starts, tuple(ends))


def ends_at(settings: PoolSettings, seats: Iterable[Seat]) -> float | None:
    """Unix time at which the next idle worker may end; None: none is idle."""
    idle = [seat.idle_since for seat in seats if seat.idle_since is not None and not seat.loads]
    return min(idle) + settings.idle_seconds if idle else None


def _longest_idle(seat: Seat) -> tuple[float, int]:
    return seat.idle_since or 0.0, -number_of(seat.name)


def _free_names(pool: str, names: Collection[str], count: int) -> tuple[str, ...]:
    """The first names of workers that nobody has."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        if (name := worker_name(pool, number)) not in names:
            found.append(name)
        number += 1
    return tuple(found)
