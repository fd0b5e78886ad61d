"""The one writer of a subspace as a Ray actor. Options and forwarding only; everything happens in SubspaceStore.

Only what writes is here: a reader opens a SubspaceStore of its own and needs no actor.

A restart runs the constructor again, which opens the subspace with the next epoch and fences what may be left of
the process before. Ray never repeats a call by itself: a caller who got no answer asks again with the same op_key.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import ray

from configs.settings import StorageSettings, SubspaceSettings
from subspace_store.requests import Answer, StoreRequest
from subspace_store.storage.opening import open_storage
from subspace_store.subspace_store import SubspaceStore


@ray.remote
class StoreActor:
    """Opens one subspace for writing and forwards to it. Arguments as in `store_actor`."""

    def __init__(
        self,
        storage: StorageSettings,
        folder: str,
        subspace: SubspaceSettings,
        base_model: str = "",
        base_sha256: str = "",
    ) -> None:
        self._store = SubspaceStore.open(
            open_storage(storage, folder),
            settings=subspace,
            base_model=base_model,
            base_sha256=base_sha256,
            writer=f"actor {socket.gethostname()}:{os.getpid()}",
        )

    def do(self, request: StoreRequest[Answer]) -> Answer:
        """Carry a request out."""
        return request.on(self._store)


def store_actor(
    name: str,
    storage: StorageSettings,
    folder: str,
    subspace: SubspaceSettings,
    base_model: str = "",
    base_sha256: str = "",
    **options: Any,
) -> Any:
    """The running store actor of this name, or a new one.

    Args:
        name: Ray's name for it; one per subspace.
        storage, folder: As for `open_storage`.
        subspace, base_model, base_sha256: As for `SubspaceStore.open`.
        options: More of Ray's actor options, such as `namespace`.

    Returns:
        Ray's handle. An error of the constructor (a folder of another base model) arrives with the first call.
    """
    return StoreActor.options(  # type: ignore[attr-defined]
        name=name,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        **options,
    ).remote(storage, folder, subspace, base_model, base_sha256)
