"""Rows to what a model reads: token ids or pixels, and labels, as one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from configs.task_spec import TaskSpec
from workers.base_model import BaseModel
from workers.task_data import TextRow


def collator(base: BaseModel, spec: TaskSpec) -> Callable[[Sequence[TextRow]], dict[str, Any]]:
    """A function from rows to the keyword arguments of the task's model, `labels` among them, on the CPU."""

    def collate(rows: Sequence[TextRow]) -> dict[str, Any]:
        encoded = tokenize(base.tokenizer, rows, spec.data.max_length, padding=True, return_tensors="pt")
        return dict(encoded) | {"labels": torch.tensor([row.label for row in rows])}

    return collate


def tokenize(tokenizer: Any, rows: Sequence[TextRow], length_max: int, **options: Any) -> Any:
    """Rows to token ids, cut at length_max; pairs as pairs."""
    texts = [row.text for row in rows]
    pairs = [row.text_pair or "" for row in rows] if rows and rows[0].text_pair is not None else None
    return tokenizer(texts, pairs, truncation=True, max_length=length_max, **options)
