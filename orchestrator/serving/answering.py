"""A process that answers for one base model: a replica of a Ray Serve deployment. What it does: workers/serving."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.settings import BaseModelSettings, CanarySettings, StorageSettings
from subspace_store.quick_imports import quick_imports

if TYPE_CHECKING:
    from workers.serving.batcher import Said
    from workers.serving.question import Piece, Question

FOLLOW_SECONDS = 0.5
"""Interval at which it looks where `main` is: one small read of the storage."""


class Answering:
    """Loads a base model, answers, and follows `main`.

    Args:
        folder: The subspace's name, see `subspace_store.storage.protocol.open_storage`.
        cpus: Threads for torch.
        rows_max: Rows of a batch.
    """

    def __init__(
        self, base_model: BaseModelSettings, storage: StorageSettings, folder: str, cpus: float, rows_max: int
    ) -> None:
        from workers.worker_actor import set_environment

        set_environment(base_model, cpus)
        with quick_imports():
            import torch

            from subspace_store.storage.opening import open_storage
            from subspace_store.subspace_reader import SubspaceReader
            from workers.base_model import load_base_model
            from workers.serving.batcher import Batcher
            from workers.serving.replica import Replica

        torch.set_num_threads(max(1, int(cpus)))
        base = load_base_model(base_model)
        self._replica = Replica(base, SubspaceReader.open(open_storage(storage, folder)), rows_max)
        self._batcher = Batcher(self._replica, rows_max)
        self._following = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._following.start()

    async def answer(self, questions: Sequence[Question]) -> Sequence[Said]:
        """As `Batcher.answer`."""
        return await self._batcher.answer(questions)

    async def stream(self, question: Question) -> AsyncIterator[Piece | Said]:
        """As `Batcher.stream`."""
        async for piece in self._batcher.stream(question):
            yield piece

    def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Ray Serve with what changes while a replica runs (`user_config`)."""
        canary = changed.get("canary")
        self._replica.set_canary(CanarySettings.model_validate(canary) if canary else None)

    def facts(self) -> dict[str, Any]:
        """What this replica answers by, and how much it has answered."""
        replica = self._replica
        return {
            "pid": os.getpid(),
            "version": replica.version,
            "trouble": replica.trouble,
            "batches": self._batcher.batches,
            "rows": self._batcher.rows,
            "canary": replica.canary.comparison.as_dict() if replica.canary is not None else None,
            "canary_trouble": replica.canary_trouble,
        }

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that is not well."""
        if not self._following.is_alive():
            raise RuntimeError("it no longer follows main")
        if self._batcher.broken is not None:
            raise RuntimeError(f"it answers nothing more: {self._batcher.broken}")

    def _follow(self) -> None:
        wait = threading.Event()
        while not wait.wait(FOLLOW_SECONDS):
            self._replica.follow()
