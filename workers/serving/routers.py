"""The routers of the versions that a replica answers by: which of a version's tasks a text is for."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import InvalidInput, NotFound
from subspace_store.storage.protocol import Storage
from workers.base_model import BaseModel
from workers.rows.task_data import inputs_of
from workers.serving.mixed_batch import MixedBatch
from workers.serving.question import AUTO
from workers.serving.routing import TOKENS_MAX, Router, Sums, features, read_sums

SHOWN = 3
"""Likeliest tasks that are told."""
ROUTERS_KEPT = 8
LOOK_SECONDS = 60.0
"""How long a router counts that was made while a task had no sums: they may come after the task, from a storage that
was away. Those of pairs and of pictures never come."""
WAYS = ("features", "energy")


@dataclass(frozen=True)
class Routed:
    """Where a text belongs.

    Args:
        scores: The likeliest tasks and their scores, the likeliest first.
        by: How they were found.
    """

    scores: Mapping[str, float]
    by: str


class Routers:
    """Of one store. One caller at a time."""

    def __init__(self, base: BaseModel, storage: Storage) -> None:
        self._base, self._storage = base, storage
        self._sums: dict[str, Sums | None] = {}
        self._made: OrderedDict[Any, tuple[Router | None, float]] = OrderedDict()
        """What finds tasks by features, and until when: for ever, if all of them have sums."""

    def of(self, batch: MixedBatch, held: Mapping[str, str]) -> OneRouter:
        """The router among some tasks of a version.

        Args:
            held: Name of each to its id.

        Raises:
            NotFound: There is none.
        """
        if not held:
            raise NotFound("there is no task to choose from", AUTO, "publish one, or name another version")
        key = (batch.version, *held.values())
        if key not in self._made or time.monotonic() > self._made[key][1]:
            for task_id in held.values():
                if self._sums.get(task_id) is None:  # it may have got some meanwhile
                    self._sums[task_id] = read_sums(self._storage, task_id)
            known = {name: sums for name, t in held.items() if (sums := self._sums[t]) is not None}
            until = math.inf if len(known) == len(held) else time.monotonic() + LOOK_SECONDS
            self._made[key] = Router(known) if known else None, until
        self._made.move_to_end(key)
        while len(self._made) > ROUTERS_KEPT:
            self._made.popitem(last=False)
        return OneRouter(self._base, batch, held, self._made[key][0])


class OneRouter:
    """Chooses among some tasks of one version."""

    def __init__(self, base: BaseModel, batch: MixedBatch, held: Mapping[str, str], router: Router | None) -> None:
        self._base, self._batch, self._held, self._router = base, batch, held, router

    def route(self, texts: Sequence[str], by: str = "") -> list[Routed]:
        """The likeliest tasks of each text.

        Args:
            by: `features`: among those tasks that have sums; `energy`: among those that read one text. Empty: the
                first, where any task has sums.

        Raises:
            InvalidInput: No task has sums and they are asked for; or there is no such way.
        """
        if by not in ("", *WAYS):
            raise InvalidInput(f"a task is not found by '{by:.40}'", AUTO, f"by: {' or '.join(WAYS)}")
        if by == "features" and self._router is None:
            raise InvalidInput("none of these tasks has features of its rows", AUTO, "ask by energy")
        if self._router is not None and by != "energy":
            backbone = self._batch.backbone(next(iter(self._held.values())))
            names, scores_SI = self._router.tasks, self._router.scores(features(self._base, backbone, texts))
        else:
            names = tuple(name for name, task_id in self._held.items() if self._reads_a_text(task_id))
            if not names:
                raise NotFound("none of these tasks reads one text alone", AUTO, "name the task")
            scores_SI = self._batch.energies(texts, [self._held[name] for name in names], TOKENS_MAX)
        way = "energy" if self._router is None or by == "energy" else "features"
        best = scores_SI.topk(min(SHOWN, len(names)), dim=1)
        return [
            Routed({names[i]: score for i, score in zip(places, scores, strict=True)}, way)
            for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _reads_a_text(self, task_id: str) -> bool:
        return set(inputs_of(self._batch.spec(task_id))) <= {"text_column"} or bool(
            {"prompt_column", "messages_column"} & set(inputs_of(self._batch.spec(task_id)))
        )
