"""The Ray actor around a worker: options and forwarding only. What it does is in `worker.py`.

Detached and named, so that it and its warm model outlive the control plane that made it. The worker is imported in
the actor's process alone: the process that gives orders needs neither torch nor transformers for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.util

from configs.errors import OnebasisError
from configs.log_lines import LogFormat, write_as_actor
from configs.places import is_local
from configs.settings import BaseModelSettings, StorageSettings, WorkerShape
from subspace_store.quick_imports import quick_imports
from workers.gang import GB
from workers.orders import ALONE, BaseLayout, Order, Outcome, Progress, Rank
from workers.process_monitor_actor import Watched, watch_this_process, watched

if TYPE_CHECKING:
    from workers.serving.question import Answer, Question

NAMESPACE = "onebasis"

# `run` blocks for as long as training takes; heartbeats and cancels come in beside it, and one more `run` that waits
# for the same work after each restart of the control plane.
MAX_CONCURRENCY = 32


class Forwarding:
    """What the actors of a worker and of a gang have in common: their methods, but for `run`."""

    _does: Any
    """The Worker or Gang."""

    def warm(self) -> BaseLayout:
        layout: BaseLayout = self._does.warm()
        return layout

    def progress(self) -> Progress:
        progress: Progress = self._does.progress()
        return progress

    def cancel(self, token: str) -> bool:
        return bool(self._does.cancel(token))

    def preempt(self, token: str) -> bool:
        return bool(self._does.preempt(token))

    def pid(self) -> int:
        return os.getpid()

    def watched(self) -> Watched:
        """Who sees how this process ends. Asked while it lives."""
        return watched()


@ray.remote
class WorkerActor(Forwarding):
    """Makes one Worker and forwards to it. Arguments as in `worker_actor`."""

    def __init__(
        self,
        base_model: BaseModelSettings,
        storage: StorageSettings,
        folder: str,
        cpus: float,
        log_format: LogFormat = "text",
    ) -> None:
        write_as_actor(log_format)
        watch_this_process()
        set_environment(base_model, cpus)
        os.environ.update(_interface_environment(ray.util.get_node_ip_address()))
        with quick_imports():
            from workers.worker import Worker

        self._does = Worker(base_model, storage, folder, cpus)

    def run(self, order: Order, rank: Rank = ALONE) -> Outcome:
        watch_this_process()  # a monitor that was killed has forgotten it
        outcome: Outcome = self._does.run(order, rank)
        return outcome

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
        found: Sequence[Answer | OnebasisError] = self._does.answer(questions)
        return found

    def meeting_place(self) -> tuple[str, int]:
        """This machine's address for other machines, and the port at which this rank waits for them."""
        from workers.rank_group import listen

        address: str = ray.util.get_node_ip_address()
        return address, listen(address)


def set_environment(base_model: BaseModelSettings, cpus: float) -> None:
    """What an actor that loads a base model needs. Read when the libraries are imported, so before that."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # tasks of many sizes follow here
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # an actor without GPUs sees all of them
    if is_local(base_model.source):
        os.environ["HF_HUB_OFFLINE"] = "1"


def worker_actor(
    name: str,
    base_model: BaseModelSettings,
    storage: StorageSettings,
    folder: str,
    workers: WorkerShape,
    namespace: str = NAMESPACE,
    avoid: Sequence[str] = (),
    log_format: LogFormat = "text",
) -> Any:
    """The actor of that name: the running one, or a new one that starts to load its base model at once.

    Args:
        name: One per worker; the same name finds the same actor from any driver.
        folder: The subspace's name, see `subspace_store.storage.protocol.open_storage`.
        avoid: Ids of the machines on which a new one is not placed.

    Returns:
        A handle with WorkerActor's methods as remote calls. Ray restarts a lost actor, but never repeats a lost
        call: the control plane gives the order again, by the same token.
    """
    options = detached(name, namespace) | reserved(workers) | ({"label_selector": away_from(avoid)} if avoid else {})
    handle = WorkerActor.options(**options).remote(  # type: ignore[attr-defined]
        base_model, storage, folder, workers.cpus, log_format
    )
    handle.warm.remote()
    return handle


def reserved(workers: WorkerShape) -> dict[str, Any]:
    """What Ray reserves for one rank, as options of its actor."""
    memory = {"memory": int(workers.memory_gb * GB)} if workers.memory_gb else {}
    return {"num_cpus": workers.cpus, "num_gpus": workers.gpus} | memory


def away_from(nodes: Sequence[str]) -> dict[str, str]:
    """Ray's label selector for any machine but these, by their ids."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"}


def detached(name: str, namespace: str) -> dict[str, Any]:
    """Options of an actor that any driver finds by its name, that Ray makes again and whose calls it never repeats."""
    return {
        "name": name,
        "namespace": namespace,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_concurrency": MAX_CONCURRENCY,
        "max_restarts": -1,
        "max_task_retries": 0,
    }


def _interface_environment(address: str) -> dict[str, str]:
    """Environment that makes ranks use the network that Ray uses: gloo would take the address that the host's own name
    resolves to, NCCL any interface. Values that are set on the machine take precedence."""
    names = (name for name, entries in psutil.net_if_addrs().items() if address in {e.address for e in entries})
    name = next(names, None)
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ()
    return {variable: str(name) for variable in variables if variable not in os.environ}
