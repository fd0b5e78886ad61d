"""The Ray actor around a worker: options only. What it does is in `worker.py`.

Detached and named, so that it and its warm model outlive the control plane that made it.
"""

from __future__ import annotations

from typing import Any

import ray

from configs.settings import BaseModelSettings, StorageSettings, WorkerSettings
from workers.base_model import is_local
from workers.worker import Worker

NAMESPACE = "onebasis"

# `run` blocks for as long as training takes; heartbeats, cancels and a repeated `run` come in beside it.
MAX_CONCURRENCY = 8


def worker_actor(
    name: str,
    base_model: BaseModelSettings,
    storage: StorageSettings,
    folder: str,
    workers: WorkerSettings,
    namespace: str = NAMESPACE,
) -> Any:
    """The actor of that name: the running one, or a new one that starts to load its base model at once.

    Args:
        name: One per worker; the same name finds the same actor from any driver.
        folder: The subspace's name, see `subspace_store.storage.open_storage`.

    Returns:
        A handle with Worker's methods as remote calls. Ray restarts a lost actor, but never repeats a lost call:
        the control plane gives the order again, by the same token.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, int(workers.cpus)))}
    if is_local(base_model.source):
        variables["HF_HUB_OFFLINE"] = "1"
    options = {
        "name": name,
        "namespace": namespace,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": workers.cpus,
        "num_gpus": workers.gpus,
        "max_concurrency": MAX_CONCURRENCY,
        "max_restarts": -1,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": variables},
    }
    handle = ray.remote(Worker).options(**options).remote(base_model, storage, folder, workers.cpus)
    handle.warm.remote()
    return handle
