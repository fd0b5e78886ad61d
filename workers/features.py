"""Turns rows into what a model reads: token ids or pixels, and labels, as one padded batch of tensors.

Padding is on the right here; only generation (`evaluation.py`) pads on the left. No row is looked at before its batch
is made, so the first step does not wait for the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from workers.base_model import BaseModel
from workers.chat_template import template_of
from workers.compatibility import check_template
from workers.rows.frozen_rows import SomeRows
from workers.rows.task_data import CompletionRow, ImageRow, Row, parts_of
from workers.truncation import Length

Batch = dict[str, Any]
IGNORED = -100
"""The label of a token that has no loss, by transformers' convention."""
ROWS_AT_ONCE = 256
"""Rows whose tokens are counted at once: a tokenizer takes a hundred bytes for each character, truncated or not."""
MEASURED_CHARACTERS = 2**22
"""About so many characters of the training rows are tokenised before the first step, to tell how many rows are cut:
one to four seconds on one core. A row counts `ROW_CHARACTERS` more than it has."""
ROW_CHARACTERS = 100


def collator(base: BaseModel, spec: TaskSpec) -> Callable[[Iterable[Row]], Batch]:
    """A function from rows to the keyword arguments of the task's model, `labels` among them, on the CPU.

    It takes rows one by one, so that of photographs only one at a time need be decoded.

    Labels: class indices (int64), numbers (float32), or for causal_lm the completion's token ids, and `IGNORED` on the
    prompt and on padding.

    Raises:
        InvalidInput: The task has messages and the base model's tokenizer no chat template; or, from the function
            itself, a row's messages do not fit the template.
    """
    if spec.kind == "image_classification":
        return lambda rows: images(base.image_processor, rows)
    tokenizer, length_max = base.tokenizer, spec.data.max_length
    if spec.kind == "causal_lm":
        check_template(spec, template_of(tokenizer) is not None)
        return lambda rows: completions(tokenizer, list(rows), length_max)
    label_type = torch.float32 if spec.kind == "sequence_regression" else torch.int64
    return lambda rows: texts(tokenizer, list(rows), length_max, label_type)


def lengths(base: BaseModel, spec: TaskSpec, rows: Sequence[Any]) -> list[Length]:
    """Number of tokens of each row before anything is cut; 0 for pictures, which are all the same size.

    Cost:
        As tokenising the rows for training once.
    """
    if spec.kind == "image_classification":
        return [Length(0)] * len(rows)
    if spec.kind == "causal_lm":
        return [Length(*map(len, _encode(base.tokenizer, row))) for row in rows]
    return [
        Length(len(ids))
        for start in range(0, len(rows), ROWS_AT_ONCE)
        for ids in _tokenize(base.tokenizer, rows[start : start + ROWS_AT_ONCE], spec.data.max_length + 1)["input_ids"]
    ]


def measured_rows(rows: Sequence[Row]) -> Sequence[Row]:
    """The first of some rows, as many as `MEASURED_CHARACTERS` allow, at least one; of pictures all."""
    left = MEASURED_CHARACTERS
    for place, row in enumerate(rows):
        if isinstance(row, ImageRow):
            break
        left -= ROW_CHARACTERS + sum(map(len, parts_of(row)))
        if left <= 0:
            return SomeRows(rows, range(place + 1))
    return rows


def texts(tokenizer: Any, rows: Sequence[Any], length_max: int, label_type: torch.dtype) -> Batch:
    """Texts or pairs, truncated at the end (of a pair, the longer one first)."""
    batch = dict(_tokenize(tokenizer, rows, length_max, padding=True, padding_side="right", return_tensors="pt"))
    return batch | {"labels": torch.tensor([row.label for row in rows], dtype=label_type)}


def _tokenize(tokenizer: Any, rows: Sequence[Any], length_max: int, **options: Any) -> Any:
    pairs = [row.text_pair or "" for row in rows] if rows and rows[0].text_pair is not None else None
    return tokenizer([row.text for row in rows], pairs, truncation=True, max_length=length_max, **options)


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


def encode_completion(tokenizer: Any, row: CompletionRow, length_max: int) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the completion with its end token.

    Too long a row loses the start of its prompt (not its BOS token) first; then, if the completion alone is too long,
    the completion's end, and with it the end token: the model must not learn to stop there. At least one token of
    context stays. The prompt's tokens are those that generation starts from, whatever follows.
    """
    prompt, completion = _encode(tokenizer, row)
    completion = completion[: length_max - 1]
    return _cut_left(tokenizer, prompt, length_max - len(completion)), completion


def encode_prompt(tokenizer: Any, row: CompletionRow, length_max: int) -> list[int]:
    """Token ids to generate from, the last `length_max` of them."""
    return _cut_left(tokenizer, _encode(tokenizer, row)[0], length_max)


def _encode(tokenizer: Any, row: CompletionRow) -> tuple[list[int], list[int]]:
    given, answer = _render(tokenizer, row) if row.is_chat else (row.turns[0][1], row.completion)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt, together = ids(given), ids(given + answer)
    # Where the two texts would share a token, the answer is tokenised alone: generation has no such token.
    completion = together[len(prompt) :] if together[: len(prompt)] == prompt else ids(answer)
    end = tokenizer.eos_token_id
    if end in completion:  # a template adds its own, and sometimes a line break after it that is never generated
        completion = completion[: len(completion) - completion[::-1].index(end)]
    elif end is not None:
        completion.append(end)
    if not row.is_chat:
        prompt = [*_first_token(tokenizer), *prompt]
    return prompt or [tokenizer.pad_token_id if end is None else end], completion


def _render(tokenizer: Any, row: CompletionRow) -> tuple[str, str]:
    template = template_of(tokenizer)
    if template is None:
        raise InvalidInput("the base model's tokenizer has no chat template", "data.messages_column")
    return template.render(row.turns)


def _first_token(tokenizer: Any) -> list[int]:
    """The BOS token that the tokenizer puts before every text, if it does (Llama's `<s>`; GPT-2 puts none)."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and tokenizer("")["input_ids"][:1] == [start] else []


def _cut_left(tokenizer: Any, prompt: list[int], length: int) -> list[int]:
    if len(prompt) <= length:
        return prompt
    marked = length > 1 and prompt[0] == tokenizer.bos_token_id
    return [prompt[0], *prompt[len(prompt) - length + 1 :]] if marked else prompt[len(prompt) - length :]


def images(processor: Any, rows: Iterable[Any]) -> Batch:
    """Pictures as the base model's own processor makes them: resized, rescaled, normalised, channels first, float32."""
    pixels, labels = [], []
    for row in rows:
        made = processor(images=[_as_rgb(row)], input_data_format="channels_last", return_tensors="pt")
        pixels.append(made["pixel_values"])
        labels.append(row.label)
    return {"pixel_values": torch.cat(pixels), "labels": torch.tensor(labels)}


def _as_rgb(row: ImageRow) -> Any:
    return np.repeat(row.image, 3, axis=2) if row.image.shape[2] == 1 else row.image
