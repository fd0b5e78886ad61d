"""The one writer of a subspace as a Ray actor. Options and forwarding only; everything happens in SubspaceStore.

Only writing goes through here: a reader opens a SubspaceReader of its own and needs no actor.

An existing store is opened at once. A new one is made when a worker has loaded the base model and checked its
weights (`open`): the store then names, for ever, the base model that it belongs to.

A restart runs the constructor again, which opens the subspace with the next epoch and fences what may be left of
the previous process. Ray never repeats a call by itself: a caller that got no answer asks again with the same op_key.

The store is imported in the actor's process alone: the process that asks needs no torch for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from configs.errors import NotLeading, NotWritten, OnebasisError
from configs.log_lines import LogFormat, write_as_actor
from configs.settings import BaseModelSettings, StorageSettings, SubspaceSettings
from subspace_store.log.store_format import read_format
from subspace_store.log.version import Identity
from subspace_store.quick_imports import quick_imports
from subspace_store.requests import Answer, StoreRequest
from subspace_store.storage.opening import open_storage

if TYPE_CHECKING:
    from subspace_store.subspace_store import SubspaceStore


log = logging.getLogger("onebasis.store")


@ray.remote(concurrency_groups={"signs": 1})
class StoreActor:
    """Opens one subspace for writing and carries requests out. Arguments as in `store_actor`."""

    def __init__(
        self,
        storage: StorageSettings,
        folder: str,
        subspace: SubspaceSettings,
        base: BaseModelSettings,
        service: Identity,
        leader: int = 0,
        log_format: LogFormat = "text",
    ) -> None:
        write_as_actor(log_format)
        self._leader, self._lock = leader, threading.Lock()
        self._place, self._subspace, self._base = open_storage(storage, folder), subspace, base
        self._service = service
        self._store: SubspaceStore | None = None
        # The first request raises what is wrong: an error in an actor's constructor does not reach a caller as itself.
        with contextlib.suppress(OnebasisError):
            self._opened()

    def open(self, base_sha256: str, leader: int = 0) -> None:
        """Open the store, or make it. Called when a worker has loaded the base model and checked its weights.

        Raises: As `SubspaceStore.open`, and as `do`.
        """
        self._heed(leader)
        if self._store is None:
            self._store = self._open(base_sha256)

    def do(self, request: StoreRequest[Answer], leader: int = 0) -> Answer:
        """Carry a request out.

        Args:
            leader: Number of the control plane that asks, of several.

        Raises:
            NotLeading: One with a higher number has asked before.
        """
        self._heed(leader)
        began = time.monotonic()
        answer = request.on(self._opened())
        log.info("%s %s by %s: %.2f s", request.operation, request.op_key, request.actor, time.monotonic() - began)
        return answer

    @ray.method(concurrency_group="signs")  # type: ignore[untyped-decorator]
    def pid(self, leader: int = 0) -> int:
        """Process id, as a sign of life: answered beside a request that is under way. Raises NotLeading, as `do`."""
        self._heed(leader)
        return os.getpid()

    def release(self, leader: int = 0) -> None:
        """Give the store up when the service ends: any service may have it then. Raises NotLeading, as `do`."""
        self._heed(leader)
        if read_format(self._place) is not None:
            self._opened().release_ownership(self._service, actor=self._service.name)

    def _heed(self, leader: int) -> None:
        with self._lock:
            if leader < self._leader:
                what = f"control plane number {self._leader} leads by now, and this was asked by number {leader}"
                raise NotLeading(what, self._place.url, "nothing was written; `onebasis status` shows which one leads")
            self._leader = leader

    def _opened(self) -> SubspaceStore:
        if self._store is None:
            if read_format(self._place) is None:
                what = "there is no store yet: it is made when a worker has loaded the base model"
                raise NotWritten(what, self._place.url, "try again when `onebasis status` shows a free worker")
            self._store = self._open(self._base.weights_sha256)
        return self._store

    def _open(self, base_sha256: str) -> SubspaceStore:
        with quick_imports():
            from subspace_store.subspace_store import SubspaceStore

        return SubspaceStore.open(
            self._place,
            settings=self._subspace,
            base_model=self._base.name,
            base_sha256=base_sha256,
            writer=f"actor {socket.gethostname()}:{os.getpid()}",
            service=self._service,
            claim=True,
        )


def store_actor(
    name: str,
    storage: StorageSettings,
    folder: str,
    subspace: SubspaceSettings,
    base: BaseModelSettings,
    service: Identity,
    leader: int = 0,
    log_format: LogFormat = "text",
    **options: Any,
) -> Any:
    """The running store actor of this name, or a new one.

    Args:
        name: Ray's name for the actor; one per subspace.
        storage, folder: As for `open_storage`.
        subspace, base, service: As for `SubspaceStore.open`; the store belongs to the service then.
        leader: Number of the control plane that makes it, of several.
        options: More of Ray's actor options, such as `namespace`.

    Returns:
        Ray's handle. If the store cannot be opened (it belongs to another base model or service), `do` raises why.
    """
    return StoreActor.options(  # type: ignore[attr-defined]
        name=name,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        **options,
    ).remote(storage, folder, subspace, base, service, leader, log_format)
