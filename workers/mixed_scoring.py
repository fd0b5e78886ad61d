"""Scores of many tasks under one version at once: their rows go through the base model in mixed batches.

A task's answers are those of its own model: the same updates, in another order of operations, so that outputs differ by
rounding. Where rounding could decide an answer, that is where the two likeliest labels are almost equally likely, the
row is answered again by the task's own model, in the very batch in which it would have been. What is counted from
answers is then the same to the bit; what is computed from outputs (`probability`) differs by 1e-6.

Axes: S rows, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import InvalidInput, NotFound, OnebasisError
from configs.task_spec import TaskSpec
from subspace_store.subspace_reader import SubspaceReader
from workers.base_model import BaseModel
from workers.evaluation import (
    Predictions,
    Reading,
    Score,
    adapted_model,
    batches_by_length,
    predict,
    score_adapter,
    scored,
)
from workers.rows.task_data import Row
from workers.serving.mixed_batch import Asked, MixedBatch

TIE = 1e-4
"""Largest difference of a row's two largest outputs, relative to the largest where that is above 1, that counts as a
tie. In float32 the outputs of the two ways differ by less than 1e-5 (tests/workers/serving), so that no answer with a
larger difference can be another one. Tenfold, one task of MiniLM in three had such a row, and its own model to load."""


@dataclass(frozen=True)
class Scored:
    """A task to be scored.

    Args:
        spec: Of a classification of texts.
        rows: In memory while the task is scored.
    """

    task_id: str
    spec: TaskSpec
    rows: Sequence[Row]


def score_together(
    base: BaseModel,
    store: SubspaceReader,
    version: int,
    tasks: Sequence[Scored],
    between_batches: Callable[[], None] = lambda: None,
) -> Mapping[str, Score | OnebasisError]:
    """Score tasks under a version. What is wrong with one of them is told in its place, and no other fails for it.

    Args:
        between_batches: As in `score_adapter`; what it raises is raised.

    Returns:
        Task id to the score that `score_adapter` gives for the version's adapter of it, or to why there is none.

    Raises:
        Corrupt, Unavailable: The store could not be read.
        torch.OutOfMemoryError: The tasks need too much memory together.
    """
    specs = {task.task_id: task.spec for task in tasks}
    batch = MixedBatch(base, store, version, lambda parts: specs[parts.task_id], between_batches)
    found: dict[str, Score | OnebasisError] = {}
    mixed: list[tuple[Scored, Reading]] = []
    for task in tasks:
        try:
            if batch.is_mixed(task.task_id):
                mixed.append((task, Reading.of(base, task.rows, task.spec)))
            else:
                adapter = store.adapter(task.task_id, version)
                found[task.task_id] = score_adapter(base, adapter, task.rows, task.spec, between_batches)
        except (InvalidInput, NotFound) as error:
            found[task.task_id] = error
    rows = [list(task.rows) for task, _ in mixed]
    outputs = batch.outputs([Asked(task.task_id, row) for (task, _), some in zip(mixed, rows, strict=True)
                             for row in some]) if mixed else []  # fmt: skip
    for (task, reading), some in zip(mixed, rows, strict=True):
        logits_SL, outputs = torch.stack(outputs[: len(some)]), outputs[len(some) :]
        predictions = Predictions(len(some), task.spec)
        predictions.take(range(len(some)), [row.label for row in some], logits_SL)  # type: ignore[union-attr]
        try:
            if ties := set(_ties(logits_SL)):
                model = adapted_model(base, store.adapter(task.task_id, version), task.spec).eval()
                again = [chosen for chosen in batches_by_length(reading.counts) if ties.intersection(chosen)]
                with torch.inference_mode():
                    predict(model, base, task.rows, again, predictions, between_batches)
            found[task.task_id] = scored(predictions.measured_on(), task.rows, task.spec, reading)
        except InvalidInput as error:
            found[task.task_id] = error
    return found


def _ties(logits_SL: Tensor) -> list[int]:
    """Places of the rows whose two largest outputs are so near that rounding could exchange them."""
    first_S, second_S = logits_SL.float().topk(2, dim=-1).values.unbind(dim=-1)
    near_S = first_S - second_S <= TIE * first_S.abs().clamp(min=1.0)
    return [int(place) for place in near_S.nonzero().squeeze(-1)]
