"""The machines, as the controller sees them: orders to workers, calls to the store, and what comes back.

The only file that speaks to Ray on the control plane's side. `Cluster` is the seam; tests of the controller use a
stand-in with threads.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from configs.errors import Unavailable
from configs.settings import Settings, StorageSettings
from orchestrator.ray_head import ray_environment
from orchestrator.scheduling.pools import pool_of
from subspace_store.digests import digest
from subspace_store.log.version import Identity
from subspace_store.requests import StoreRequest
from workers.gang import room_on
from workers.orders import Order

if TYPE_CHECKING:
    from workers.serving.question import Question

STORE = "@store-"
"""Name of the store's writer."""
Call = Any
"""A pending call; opaque to the controller."""


class MachineLost(Unavailable):
    """The process that should have answered is gone; whether it did its work is unknown."""


class ProcessEnded(MachineLost):
    """It is known that the process has ended, or could not be made."""


class Cluster(Protocol):
    """Gives work out and collects what came of it."""

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers that there are, whichever control plane started them."""
        ...

    def start_worker(self, worker: str) -> None:
        """Find a worker again or start it; returns at once. Where there is no room, Ray keeps it waiting for a machine,
        and an autoscaler sees that."""
        ...

    def end_worker(self, worker: str) -> None:
        """End a worker, or take back that it was asked for; its places are free again."""
        ...

    def machines_of(self, worker: str) -> tuple[str, ...]:
        """Addresses of the machines that a worker is on; none while it waits for a place."""
        ...

    @property
    def machines(self) -> tuple[str, ...]:
        """Addresses of the machines that are up."""
        ...

    def avoid(self, machines: Collection[str]) -> None:
        """Place nothing new on these machines from now on; they are named by their addresses. What waits for a place
        already keeps to those that it was told when it was asked for."""
        ...

    def large_enough(self, pool: str, machines: Collection[str]) -> tuple[str, ...]:
        """Those of these machines that are up and that, with nothing else on them, have room for a rank of a pool."""
        ...

    def room(self) -> dict[str, dict[str, float]]:
        """Address of each machine that is up and not avoided to what is free there, by Ray's names of resources."""
        ...

    def run(self, worker: str, order: Order) -> Call:
        """Give an order; the call's result is an Outcome."""
        ...

    def answer(self, worker: str, questions: Sequence[Question]) -> Call:
        """Ask a worker of one rank what tasks answer; the result is a list of answers and errors, or the call fails
        with WorkersBusy."""
        ...

    def warm(self, worker: str) -> Call:
        """Ask a worker to load the base model; the result is its BaseLayout once it is ready."""
        ...

    def progress(self, worker: str) -> Call:
        """Ask a worker what it is doing; the result is a Progress."""
        ...

    def end_of(self, worker: str) -> Call | None:
        """Ask how the process of a worker ended that is gone; the result is a ProcessEnd, or None where nobody knows.

        Returns:
            The call, which may never come back; None where there is nobody to be asked.
        """
        ...

    def cancel(self, worker: str, token: str) -> None:
        """Tell a worker to stop an order."""
        ...

    def preempt(self, worker: str, token: str) -> None:
        """Tell a worker to write a checkpoint and stop; training that goes on later starts from there."""
        ...

    def replace(self, worker: str) -> None:
        """End a worker that does not answer; a fresh one takes its name."""
        ...

    def write(self, base_model: str, request: StoreRequest[Any]) -> Call:
        """Ask the one writer of a base model's store; the call's result is the request's answer."""
        ...

    def open_store(self, base_model: str, base_sha256: str) -> Call:
        """Make the writer open or create the store: a worker has loaded the base model, and these are its weights."""
        ...

    def store_sign(self, base_model: str) -> Call:
        """Ask the writer for a sign of life, beside what it is writing; the result is its process id."""
        ...

    def replace_store(self, base_model: str) -> None:
        """End a writer that was fenced or is silent; a fresh one acquires the next epoch."""
        ...

    def follow(self, settings: Settings) -> None:
        """Start what further base models of new settings need: a writer for each."""
        ...

    def landed(self, calls: Sequence[Call], timeout_seconds: float) -> list[Call]:
        """The calls that are done, after waiting at most this long for the first."""
        ...

    def result(self, call: Call) -> Any:
        """Result of a call that is done.

        Raises:
            ProcessEnded: The process is known to be gone; MachineLost when it is out of reach.
            Else the exception of the other side.
        """
        ...


class RayCluster:
    """Detached named actors: for each base model the writer of its store, and the workers or gangs of all pools. They
    outlive us."""

    def __init__(self, settings: Settings, address: str, token_path: Path, service: Identity) -> None:
        """Join a running Ray cluster on behalf of a service. Actors are started by `start`."""
        os.environ.update(ray_environment(token_path))
        import ray

        self._ray = ray
        self.settings = settings
        """Those that count now; `follow` also starts what they need."""
        self._service = service
        self._namespace = namespace(settings.storage, service)
        try:
            ray.init(address=address, namespace=self._namespace, log_to_driver=False, configure_logging=False)
        except Exception as error:
            todo = (
                "see whether its head runs, and whether this machine is one of the cluster's: "
                f"`ray start --address={address} --num-cpus=0` makes it one"
            )
            raise Unavailable(f"cannot join the Ray cluster: {error}", address, todo) from error
        self._avoid: frozenset[str] = frozenset()
        self._actors: dict[str, Any] = {}
        self._watched: dict[str, Call] = {}
        """Worker to its pending answer on who sees how its process ends."""
        self._leader = 0
        self._may: Callable[[], None] = _always

    def led(self, number: int, may: Callable[[], None]) -> RayCluster:
        """The same cluster, for one leader of several control planes.

        Args:
            number: Its number: the store's writer takes nothing from one with a lower number than it has heard of.
            may: Raises NotLeading when this leader must give no order any more.
        """
        found = copy.copy(self)
        found._leader, found._may, found._actors, found._watched = number, may, {}, {}
        return found

    def start(self) -> None:
        """Find the stores' writers again or start them; end workers of pools that are no longer in the settings."""
        for name in self.settings.base_names:
            self._store(name)
        writers = {writer_name(base) for base in self.settings.base_names}
        for name in self._named():
            if name not in writers and pool_of(name) not in self.settings.pools:
                self._kill(name)

    def follow(self, settings: Settings) -> None:
        self.settings = settings
        self.start()

    def release_stores(self, timeout_seconds: float) -> None:
        """Have the writers give their stores up, so that another service may have them.

        Raises:
            Unavailable: No answer in time: the store stays this service's.
        """
        calls = {base.name: self._store(base.name).release.remote(self._leader) for base in self.settings.bases}
        until = time.monotonic() + timeout_seconds
        for name, call in calls.items():
            if not self.landed([call], max(0.0, until - time.monotonic())):
                raise Unavailable(f"the store of {name} was not released in time", todo="it stays this service's")
            self.result(call)

    def stop(self, actors: bool) -> None:
        """Leave the cluster; with `actors`, end the writers and the workers too."""
        if actors:
            for name in self._named():
                self._kill(name)
            from workers.process_monitor_actor import end_monitors

            end_monitors(self._namespace)
        self._ray.shutdown()

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(name for name in self._named() if pool_of(name) in self.settings.pools)

    def start_worker(self, worker: str) -> None:
        self._may()
        self._actor(worker)

    def end_worker(self, worker: str) -> None:
        self._may()
        self._end(worker)

    def machines_of(self, worker: str) -> tuple[str, ...]:
        if self.settings.pools[pool_of(worker)].ranks > 1:
            from workers.gang_actor import machines_of

            return self._addresses(machines_of(worker))
        # Not ray.util.state: that asks the dashboard, which a cluster may be without.
        found = self._ray._private.state.actors(self._actor(worker)._actor_id.hex())
        address = found.get("Address", {})
        return self._addresses([address["NodeID"]]) if address.get("IPAddress") else ()

    @property
    def machines(self) -> tuple[str, ...]:
        return tuple(sorted({node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]}))

    def avoid(self, machines: Collection[str]) -> None:
        self._avoid = frozenset(machines)

    def large_enough(self, pool: str, machines: Collection[str]) -> tuple[str, ...]:
        up = (node for node in self._ray.nodes() if node["Alive"] and node["NodeManagerAddress"] in machines)
        found = {node["NodeManagerAddress"] for node in up if room_on(self.settings.pools[pool], node)}
        return tuple(sorted(found))

    def room(self) -> dict[str, dict[str, float]]:
        free = self._ray._private.state.available_resources_per_node()
        found: dict[str, dict[str, float]] = {}
        for node in self._ray.nodes():
            address = node["NodeManagerAddress"]
            if node["Alive"] and address not in self._avoid:
                room = found.setdefault(address, {})
                for kind, amount in free.get(node["NodeID"], {}).items():
                    room[kind] = room.get(kind, 0.0) + amount
        return found

    def _addresses(self, node_ids: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted({node["NodeManagerAddress"] for node in self._ray.nodes() if node["NodeID"] in node_ids}))

    def _named(self) -> list[str]:
        """Names of this service's writers and workers. What watches how processes end stays as long as they do."""
        from workers.process_monitor_actor import PREFIX

        return sorted(name for name in self._ray.util.list_named_actors() if not name.startswith(PREFIX))

    def run(self, worker: str, order: Order) -> Call:
        self._may()
        return self._actor(worker).run.remote(order)

    def answer(self, worker: str, questions: Sequence[Question]) -> Call:
        self._may()
        return self._actor(worker).answer.remote(list(questions))

    def warm(self, worker: str) -> Call:
        self._watched[worker] = self._actor(worker).watched.remote()
        return self._actor(worker).warm.remote()

    def end_of(self, worker: str) -> Call | None:
        from workers.process_monitor_actor import ask_for_end

        watched = self._watched.pop(worker, None)
        return None if watched is None else ask_for_end(watched, self._namespace)

    def progress(self, worker: str) -> Call:
        return self._actor(worker).progress.remote()

    def cancel(self, worker: str, token: str) -> None:
        self._may()
        self._actor(worker).cancel.remote(token)

    def preempt(self, worker: str, token: str) -> None:
        self._may()
        self._actor(worker).preempt.remote(token)

    def replace(self, worker: str) -> None:
        self._may()
        self._end(worker)

    def write(self, base_model: str, request: StoreRequest[Any]) -> Call:
        self._may()
        return self._store(base_model).do.remote(request, self._leader)

    def open_store(self, base_model: str, base_sha256: str) -> Call:
        self._may()
        return self._store(base_model).open.remote(base_sha256, self._leader)

    def store_sign(self, base_model: str) -> Call:
        return self._store(base_model).pid.remote(self._leader)

    def replace_store(self, base_model: str) -> None:
        self._may()
        self._end(writer_name(base_model))

    def probe(self) -> None:
        """Ask the GCS which machines there are.

        Raises:
            Unavailable: None of them is alive.
        """
        nodes = self._ray.nodes()
        if not any(node["Alive"] for node in nodes):
            raise Unavailable(f"none of its {len(nodes)} machines is alive")

    def landed(self, calls: Sequence[Call], timeout_seconds: float) -> list[Call]:
        done, _ = self._ray.wait(list(calls), num_returns=1, timeout=timeout_seconds, fetch_local=False)
        if not done:
            return []
        more, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        return list(more)

    def result(self, call: Call) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.ActorUnavailableError as error:
            raise MachineLost("its process is out of reach") from error
        except (errors.RayActorError, errors.WorkerCrashedError) as error:
            raise ProcessEnded(_cause(error)) from error
        except errors.RayTaskError as error:
            # Ray wraps what the other side raised; callers catch our errors as themselves.
            raise (error.cause if isinstance(error.cause, Exception) else error) from None

    def _end(self, name: str) -> None:
        self._kill(name)
        # The name is free a moment after the kill; get_if_exists would find the dying actor before that.
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                self._ray.get_actor(name)
            except ValueError:
                return
            time.sleep(0.05)

    def _kill(self, name: str) -> None:
        self._actors.pop(name, None)
        self._watched.pop(name, None)  # its end says nothing about what it did
        with contextlib.suppress(ValueError):  # ended already; a gang restarted to be ended would leave places
            self._ray.kill(self._ray.get_actor(name), no_restart=True)
        pool = self.settings.pools.get(pool_of(name))
        if not name.startswith(STORE) and (pool is None or pool.ranks > 1):
            from workers.gang_actor import end_ranks

            end_ranks(name)

    def _store(self, base_model: str) -> Any:
        name = writer_name(base_model)
        if name not in self._actors:
            # Here and not above: the controller and its tests need this file's Protocol, not Ray.
            from subspace_store.store_actor import store_actor

            settings = self.settings
            self._actors[name] = store_actor(
                name,
                settings.storage,
                base_model,
                settings.subspace,
                settings.base(base_model),
                self._service,
                self._leader,
                settings.log_format,
                namespace=self._namespace,
            )
        return self._actors[name]

    def _actor(self, name: str) -> Any:
        if name not in self._actors:
            from workers.gang_actor import gang_actor
            from workers.worker_actor import worker_actor

            settings, pool = self.settings, self.settings.pools[pool_of(name)]
            base = settings.base(pool.base_model)
            avoid = [node["NodeID"] for node in self._ray.nodes() if node["NodeManagerAddress"] in self._avoid]
            one_worker = worker_actor if pool.ranks == 1 else gang_actor
            self._actors[name] = one_worker(
                name, base, settings.storage, base.name, pool, self._namespace, avoid, settings.log_format
            )
        return self._actors[name]


def writer_name(base_model: str) -> str:
    """Name of the actor that writes to a base model's store: no worker's, since no name begins with `@`."""
    return f"{STORE}{base_model}"


def _always() -> None:
    """A control plane without others may always give orders."""


def _cause(error: Exception) -> str:
    """The cause in one line: where an actor's constructor failed, Ray's text ends with the constructor's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if "creation task" in lines[0] and len(lines) > 1 else lines[0]


def namespace(storage: StorageSettings, service: Identity) -> str:
    """Ray's namespace of a service's actors, whatever base models it has by now.

    With the service and its storage in it: two services on one Ray cluster must not find each other's actors.
    """
    place = f"{storage.endpoint_url or ''} {storage.url} {service.service_id}"
    return f"onebasis-{digest(place.encode())[:12]}"


def wait_for(cluster: Cluster, start: Callable[[], Call], timeout_seconds: float) -> Any:
    """Make one call to the cluster and wait for its result, again if the machine was lost meanwhile.

    Only for calls that may be made twice: the store's carry an op_key.

    Raises:
        Unavailable: No answer in time.
    """
    until = time.monotonic() + timeout_seconds
    while True:
        call = start()
        if not cluster.landed([call], max(0.0, until - time.monotonic())):
            raise Unavailable("no answer in time", todo="try again; asking twice does no harm")
        try:
            return cluster.result(call)
        except MachineLost:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)
