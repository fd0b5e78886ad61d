"""Turns rows into what a model reads: token ids or pixels, and labels, as one padded batch of tensors.

Padding is on the right here; only generation (`evaluation.py`) pads on the left. No row is looked at before its batch
is made, so the first step does not wait for the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from configs.task_spec import IMAGE_KINDS, TaskSpec
from workers.base_model import BaseModel
from workers.chat_template import template_of
from workers.compatibility import check_template
from workers.rows.task_data import ImageRow, Row
from workers.tokens import encode_completion, tokenize

Batch = dict[str, Any]
IGNORED = -100
"""The label of a token that has no loss, by transformers' convention."""


def collator(base: BaseModel, spec: TaskSpec) -> Callable[[Iterable[Row]], Batch]:
    """A function from rows to the keyword arguments of the task's model, `labels` among them, on the CPU.

    It takes rows one by one, so that of photographs only one at a time need be decoded.

    Labels: class indices (int64), numbers (float32; for image_regression a row of them for each picture), or for
    causal_lm the completion's token ids, and `IGNORED` on the prompt and on padding.

    Raises:
        InvalidInput: The task has messages and the base model's tokenizer no chat template; or, from the function
            itself, a row's messages do not fit the template.
    """
    if spec.kind in IMAGE_KINDS:
        of_labels = torch.float32 if spec.kind == "image_regression" else torch.int64
        return lambda rows: images(base.image_processor, rows, of_labels)
    tokenizer, length_max = base.tokenizer, spec.data.max_length
    if spec.kind == "causal_lm":
        check_template(spec, template_of(tokenizer) is not None)
        return lambda rows: completions(tokenizer, list(rows), length_max)
    label_type = torch.float32 if spec.kind == "sequence_regression" else torch.int64
    return lambda rows: texts(tokenizer, list(rows), length_max, label_type)


def texts(tokenizer: Any, rows: Sequence[Any], length_max: int, label_type: torch.dtype) -> Batch:
    """Texts or pairs, truncated at the end (of a pair, the longer one first)."""
    batch = dict(tokenize(tokenizer, rows, length_max, padding=True, padding_side="right", return_tensors="pt"))
    return batch | {"labels": torch.tensor([row.label for row in rows], dtype=label_type)}


def completions(tokenizer: Any, rows: Sequence[Any], length_max: int) -> Batch:
    """Prompts followed by their completions; see `encode_completion`."""
    encoded = [encode_completion(tokenizer, row, length_max) for row in rows]
    width = max(len(prompt) + len(completion) for prompt, completion in encoded)
    batch = {
        "input_ids": torch.full((len(rows), width), tokenizer.pad_token_id),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for index, (prompt, completion) in enumerate(encoded):
        length = len(prompt) + len(completion)
        batch["input_ids"][index, :length] = torch.tensor(prompt + completion)
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, len(prompt) : length] = torch.tensor(completion)
    return batch


def images(processor: Any, rows: Iterable[Any], label_type: torch.dtype = torch.int64) -> Batch:
    """Pictures as the base model's own processor makes them: resized, rescaled, normalised, channels first, float32."""
    pixels, labels = [], []
    for row in rows:
        made = processor(images=[_as_rgb(row)], input_data_format="channels_last", return_tensors="pt")
        pixels.append(made["pixel_values"])
        labels.append(row.label)
    return {"pixel_values": torch.cat(pixels), "labels": torch.tensor(labels, dtype=label_type)}


def _as_rgb(row: ImageRow) -> Any:
    return np.repeat(row.image, 3, axis=2) if row.image.shape[2] == 1 else row.image
