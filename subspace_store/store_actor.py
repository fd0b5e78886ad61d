"""The one writer of a subspace as a Ray actor. Options and forwarding only; everything happens in SubspaceStore.

Only what writes is here: a reader opens a SubspaceStore of its own and needs no actor.

A restart runs the constructor again, which opens the subspace with the next epoch and fences what may be left of
the process before. Ray never repeats a call by itself: a caller who got no answer asks again with the same op_key.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import ray

from configs.settings import StorageSettings, SubspaceSettings
from subspace_store.log.version import StagedAdapter, TaskScore, Version
from subspace_store.refs import RollbackPreview
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

    def merge(self, adapters: Sequence[StagedAdapter], *, op_key: str, actor: str) -> Version:
        return self._store.merge(adapters, op_key=op_key, actor=actor)

    def refine(self, adapters: Sequence[StagedAdapter], *, op_key: str, actor: str) -> Version:
        return self._store.refine(adapters, op_key=op_key, actor=actor)

    def record_scores(self, version: int, scores: Sequence[TaskScore], *, op_key: str, actor: str) -> None:
        self._store.record_scores(version, scores, op_key=op_key, actor=actor)

    def publish(self, version: int, *, op_key: str, actor: str) -> None:
        self._store.publish(version, op_key=op_key, actor=actor)

    def reject(self, version: int, reason: str, *, op_key: str, actor: str) -> None:
        self._store.reject(version, reason, op_key=op_key, actor=actor)

    def rollback(
        self, version: int, *, op_key: str, actor: str, reason: str = "", hold: bool = False
    ) -> RollbackPreview:
        return self._store.rollback(version, op_key=op_key, actor=actor, reason=reason, hold=hold)

    def tag(self, name: str, version: int, *, op_key: str, actor: str) -> None:
        self._store.tag(name, version, op_key=op_key, actor=actor)

    def hold(self, reason: str, *, op_key: str, actor: str) -> None:
        self._store.hold(reason, op_key=op_key, actor=actor)

    def release(self, *, op_key: str, actor: str) -> None:
        self._store.release(op_key=op_key, actor=actor)

    def quarantine(self, task_id: str, reason: str, *, op_key: str, actor: str) -> None:
        self._store.quarantine(task_id, reason, op_key=op_key, actor=actor)

    def unquarantine(self, task_id: str, *, op_key: str, actor: str) -> None:
        self._store.unquarantine(task_id, op_key=op_key, actor=actor)

    def pin(self, version: int, owner: str, until: float | None = None, *, op_key: str, actor: str) -> None:
        self._store.pin(version, owner, until, op_key=op_key, actor=actor)

    def unpin(self, version: int, owner: str, *, op_key: str, actor: str) -> None:
        self._store.unpin(version, owner, op_key=op_key, actor=actor)

    def expire(self, versions: Sequence[int], *, now: float, op_key: str, actor: str) -> None:
        self._store.expire(versions, now=now, op_key=op_key, actor=actor)

    def drop_adapters(self, task_ids: Sequence[str], *, op_key: str, actor: str) -> None:
        self._store.drop_adapters(task_ids, op_key=op_key, actor=actor)

    def remove(
        self, task_id: str, *, op_key: str, actor: str, reason: str = "", publish: bool = False
    ) -> Version | None:
        return self._store.remove(task_id, op_key=op_key, actor=actor, reason=reason, publish=publish)


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
