"""Score a model on frozen rows.

The same rows, model and machine give the same score: rows are put into batches by length, in a fixed order, and
nothing is drawn. A score after training and the score of a version come from the same function on the same kind of
model, so that their difference is what merging cost and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from configs.errors import InvalidInput
from configs.task_spec import DataSpec, Metric
from subspace_store.adapter import Adapter
from subspace_store.peft_format import to_peft
from workers.base_model import BaseModel
from workers.features import tokenize
from workers.peft_model import put_tensors, with_lora
from workers.task_data import TextRow

ROWS_PER_BATCH = 64  # rows of similar length; on one CPU core 32 to 128 are equally fast for MiniLM


@dataclass(frozen=True)
class Score:
    """What a model got right."""

    value: float
    correct: tuple[bool, ...]
    """Per row, in the order of the rows: for paired comparisons between versions."""

    @property
    def count(self) -> int:
        return len(self.correct)


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TextRow],
    data: DataSpec,
    metric: Metric,
    between_batches: Callable[[], None] = lambda: None,
) -> Score:
    """Predict every row and compare.

    Args:
        model: A classifier whose outputs are in the order of data.label_names.
        metric: `accuracy`, `f1_macro` (mean over all label_names, a label never seen or predicted counts 0) or
            `matthews_correlation`, by scikit-learn's definitions.
        between_batches: Called before every batch; may raise to stop.

    Returns:
        The score, and per row whether it was right.
    """
    encoded = tokenize(tokenizer, rows, data.max_length)
    order = sorted(range(len(rows)), key=lambda index: (len(encoded["input_ids"][index]), index))
    predicted = [0] * len(rows)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), ROWS_PER_BATCH):
            between_batches()
            chosen = order[start : start + ROWS_PER_BATCH]
            features = {key: [values[index] for index in chosen] for key, values in encoded.items()}
            batch = tokenizer.pad(features, padding=True, return_tensors="pt").to(model.device)
            for index, label in zip(chosen, model(**batch).logits.argmax(dim=-1).tolist(), strict=True):
                predicted[index] = label
    expected = [int(row.label) for row in rows]
    value = measure(metric, expected, predicted, len(data.label_names))
    return Score(value, tuple(left == right for left, right in zip(expected, predicted, strict=True)))


def measure(metric: Metric, expected: Sequence[int], predicted: Sequence[int], label_count: int) -> float:
    """One of the three scores, by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "accuracy":
        return float(accuracy_score(expected, predicted))
    if metric == "f1_macro":
        return float(f1_score(expected, predicted, labels=range(label_count), average="macro", zero_division=0))
    return float(matthews_corrcoef(expected, predicted))


def adapted_classifier(base: BaseModel, adapter: Adapter, label_names: Sequence[str], with_update: bool = True) -> Any:
    """A task model with an adapter and its head in it.

    Args:
        with_update: False leaves ΔW out and keeps the head: the base model's score under the task's own head.

    Raises:
        InvalidInput: The head or a module does not fit the base model or the labels; names it.
    """
    model = base.classifier_for(label_names)
    _put_head(model, adapter, len(label_names))
    if not with_update:
        return model
    config, tensors = to_peft(adapter)
    model = with_lora(model, LoraConfig(**config))
    put_tensors(model, tensors)
    return model


def _put_head(model: Any, adapter: Adapter, label_count: int) -> None:
    if not adapter.head:
        raise InvalidInput(
            "the adapter has no classification head, so it cannot be scored",
            todo="import an adapter trained with task_type SEQ_CLS, or leave out data.eval_file",
        )
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.head.items():
        if name not in parameters:
            raise InvalidInput("the base model has no such parameter for the adapter's head", name)
        if parameters[name].shape != tensor.shape:
            raise InvalidInput(
                f"the adapter's head has shape {tuple(tensor.shape)}; for {label_count} labels the base model needs "
                f"{tuple(parameters[name].shape)}",
                name,
                "data.label_names must list the labels the adapter was trained with, in that order",
            )
        parameters[name].data.copy_(tensor)
