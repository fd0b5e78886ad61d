"""The Ray side of a gang: a supervising actor, and its ranks as actors on a placement group. Which rank counts as lost,
and what then, is decided in `gang.py`.

The supervisor is detached and named like a worker, and has a worker's methods. The ranks are neither: they die with
it. It loads no base model and asks for no CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.log_lines import LogFormat, write_as_actor
from configs.settings import BaseModelSettings, StorageSettings, WorkerShape
from workers.gang import Call, Gang, NoPlace, needs, no_place
from workers.orders import Order, Outcome, Rank, RankLost
from workers.process_monitor import ProcessEnd
from workers.process_monitor_actor import ANSWER_SECONDS, WAIT_SECONDS, ask_for_end, watch_this_process
from workers.worker_actor import MAX_CONCURRENCY, NAMESPACE, Forwarding, WorkerActor, away_from, detached, reserved

HEAD = "node:__internal_head__"
"""Resource that only Ray's head node has; Ray Serve places its controller by it too."""
PLACE_SECONDS = 60.0
"""Wait this long for a place for every rank, then give up the places there are and ask again from the start."""
LOOK_SECONDS = 0.5
"""Interval at which it is looked whether the order is still wanted, while it waits for places."""
TELL_SECONDS = 5.0
"""A longer wait for places is reported with its reason: where there are some, Ray finds them in less."""
END_SECONDS = 10.0
"""A killed process is gone in milliseconds, unless its machine is out of reach."""


@ray.remote
class GangActor(Forwarding):
    """Makes one Gang and forwards to it. Arguments as in `worker_actor`."""

    def __init__(
        self,
        name: str,
        base_model: BaseModelSettings,
        storage: StorageSettings,
        folder: str,
        workers: WorkerShape,
        avoid: Sequence[str] = (),
        log_format: LogFormat = "text",
    ) -> None:
        write_as_actor(log_format)
        watch_this_process()
        ranks = RayRanks(name, base_model, storage, folder, workers, avoid, log_format)
        self._does = Gang(ranks, workers.lease_seconds)

    def run(self, order: Order) -> Outcome:
        outcome: Outcome = self._does.run(order)
        return outcome

    def pids(self) -> list[tuple[str, int]]:
        pids: list[tuple[str, int]] = self._does.pids()
        return pids


class RayRanks:
    """Implements workers.gang.Ranks: one WorkerActor in each bundle of a placement group."""

    def __init__(
        self,
        name: str,
        base_model: BaseModelSettings,
        storage: StorageSettings,
        folder: str,
        workers: WorkerShape,
        avoid: Sequence[str] = (),
        log_format: LogFormat = "text",
    ) -> None:
        end_ranks(name)  # of a supervisor before this one
        self._name = name
        self._arguments = (base_model, storage, folder, workers.cpus, log_format)
        self._workers = workers
        self._avoid = avoid
        self._actors: list[Any] = []
        self._watched: list[Any] = []
        """Each rank's pending answer to `watched`."""

    @property
    def size(self) -> int:
        return self._workers.ranks

    def start(self, waits: Callable[[str], None]) -> None:
        group = places(self._name, self._workers, self._avoid)
        # When a machine is lost, Ray finds its bundles another place by itself. A bundle is free again only when the
        # process that had it is gone, so no two generations of ranks are ever there at once.
        began = time.monotonic()
        while not group.wait(LOOK_SECONDS):
            waited = time.monotonic() - began
            waits(why := no_place(self._workers, ray.nodes(), self._avoid) if waited > TELL_SECONDS else "")
            if waited > PLACE_SECONDS:
                drained = "take the drain back (`onebasis status` names it), " if self._avoid else ""
                raise NoPlace(
                    why, self._name, f"{drained}add machines, or lower the pool's ranks or its number of workers"
                )
        self._actors = [
            WorkerActor.options(  # type: ignore[attr-defined]
                **reserved(self._workers),
                max_concurrency=MAX_CONCURRENCY,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            ).remote(*self._arguments)
            for index in range(self.size)
        ]
        self._watched = [actor.watched.remote() for actor in self._actors]

    def end_of(self, index: int) -> ProcessEnd | None:
        call = ask_for_end(self._watched[index], ray.get_runtime_context().namespace) if self._watched else None
        try:
            end: ProcessEnd | None = None if call is None else ray.get(call, timeout=WAIT_SECONDS + ANSWER_SECONDS)
        except ray.exceptions.RayError:  # its machine is gone
            return None
        return end

    def end(self, leave: bool) -> None:
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
        until = time.monotonic() + END_SECONDS
        for actor in actors:
            _await_end(actor, until)
        if leave:
            end_ranks(self._name)

    def warm(self, index: int) -> Call:
        return self._actor(index).warm.remote()

    def meeting_place(self, index: int) -> Call:
        return self._actor(index).meeting_place.remote()

    def run(self, index: int, order: Order, rank: Rank) -> Call:
        return self._actor(index).run.remote(order, rank)

    def progress(self, index: int) -> Call:
        return self._actor(index).progress.remote()

    def pid(self, index: int) -> Call:
        return self._actor(index).pid.remote()

    def cancel(self, index: int, token: str) -> Call:
        return self._actor(index).cancel.remote(token)

    def preempt(self, index: int, token: str) -> Call:
        return self._actor(index).preempt.remote(token)

    def _actor(self, index: int) -> Any:
        if not self._actors:
            raise RankLost("it was ended")
        return self._actors[index]

    def landed(self, calls: Sequence[Call], timeout_seconds: float) -> list[Call]:
        done, others = ray.wait(list(calls), num_returns=1, timeout=max(0.0, timeout_seconds))
        if done and others:
            done += ray.wait(others, num_returns=len(others), timeout=0)[0]
        return list(done)

    def result(self, call: Call) -> Any:
        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except ray.exceptions.RayError as error:
            raise RankLost(str(error).split("\n")[0]) from error


def places(name: str, workers: WorkerShape, avoid: Sequence[str] = ()) -> Any:
    """The placement group of a gang of this name: the one that there is, or a new one, which may have to wait."""
    try:
        return get_placement_group(_group_name(name))
    except ValueError:
        bundles = [needs(workers)] * workers.ranks
        selector = [away_from(avoid)] * workers.ranks if avoid else None
        return placement_group(
            bundles, workers.placement, _group_name(name), lifetime="detached", bundle_label_selector=selector
        )


def machines_of(name: str) -> tuple[str, ...]:
    """Ids of the machines on which the ranks of a gang are; none while it has no place for each of them."""
    try:
        table = placement_group_table(get_placement_group(_group_name(name)))
    except ValueError:
        return ()
    return tuple(sorted({*table["bundles_to_node_id"].values()})) if table["state"] == "CREATED" else ()


def end_ranks(name: str) -> None:
    """End what a supervisor of this name may have left: its placement group, and with it all that runs there."""
    try:
        group = get_placement_group(_group_name(name))
    except ValueError:
        return
    remove_placement_group(group)


def gang_actor(
    name: str,
    base_model: BaseModelSettings,
    storage: StorageSettings,
    folder: str,
    workers: WorkerShape,
    namespace: str = NAMESPACE,
    avoid: Sequence[str] = (),
    log_format: LogFormat = "text",
) -> Any:
    """The gang of that name: the running one, or a new one that starts to form at once.

    Args:
        As in `worker_actor`; `ranks` of `workers` says how many, its `placement` how close together.

    Returns:
        A handle with a worker's methods as remote calls.
    """
    # On the head's machine, whose loss ends everything anyway: the gang depends on no further machine.
    options = detached(name, namespace) | {"num_cpus": 0, "resources": {HEAD: 0.001}}
    handle = GangActor.options(**options).remote(  # type: ignore[attr-defined]
        name, base_model, storage, folder, workers, avoid, log_format
    )
    handle.warm.remote()
    return handle


def _group_name(name: str) -> str:
    return f"{name}-ranks"


def _await_end(actor: Any, until: float) -> None:
    while time.monotonic() < until:
        try:
            ray.get(actor.pid.remote(), timeout=END_SECONDS)
        except ray.exceptions.RayError:
            return
        time.sleep(0.05)
