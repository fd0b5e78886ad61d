"""Rows as the tokens that a model reads: how many, and which are cut. The control plane counts them at submission, too.

No tensors, and no model: a tokenizer alone, as a worker has it or sends it (`packed`).
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from configs.errors import InvalidInput
from configs.task_spec import IMAGE_KINDS, TaskSpec
from workers.chat_template import template_of
from workers.rows.frozen_rows import SomeRows
from workers.rows.task_data import CompletionRow, ImageRow, Row, parts_of
from workers.truncation import Length, check_answers, losses, losses_of_generation

ROWS_AT_ONCE = 256
"""Rows whose tokens are counted at once: a tokenizer takes a hundred bytes for each character, truncated or not."""
MEASURED_CHARACTERS = 2**22
"""About so many characters of the training rows are tokenised before the first step, to tell how many rows are cut:
one to four seconds on one core. A row counts `ROW_CHARACTERS` more than it has."""
ROW_CHARACTERS = 100


def packed(tokenizer: Any) -> bytes:
    """A tokenizer as bytes, for `unpacked` in another process of the service; empty where there is none, or where it
    cannot be packed: then rows are counted by the worker alone."""
    try:
        return b"" if tokenizer is None else pickle.dumps(tokenizer)
    except Exception:  # whatever a tokenizer written in Python holds
        return b""


def unpacked(content: bytes) -> Any:
    """The tokenizer. content: Of `packed`, from a worker of this service and from nowhere else."""
    return pickle.loads(content)


def training_losses(tokenizer: Any, spec: TaskSpec, rows: Sequence[Row], base_model: str) -> tuple[str, ...]:
    """Sentences on training rows, or of very many on the first ones, of which a part is not read.

    Args:
        base_model: Its name, for messages.

    Raises:
        InvalidInput: An answer has no token.

    Cost:
        One to four seconds on one core, or less: see `MEASURED_CHARACTERS`.
    """
    found, which = _measured(tokenizer, spec, rows, "training rows")
    check_answers(found, spec, base_model, which, each=True)
    return losses(found, spec, which)


def evaluation_losses(
    tokenizer: Any, spec: TaskSpec, rows: Sequence[Row], base_model: str, positions: int
) -> tuple[str, ...]:
    """As `training_losses`, for evaluation rows. positions: As in `losses_of_generation`."""
    found, which = _measured(tokenizer, spec, rows, "evaluation rows")
    check_answers(found, spec, base_model, which, each=False)
    return (*losses(found, spec, which), *losses_of_generation(found, spec, positions, which))


def _measured(tokenizer: Any, spec: TaskSpec, rows: Sequence[Row], name: str) -> tuple[list[Length], str]:
    """The lengths of the rows that are measured, and which these are."""
    some = measured_rows(rows)
    return lengths(tokenizer, spec, some), f"{'first ' * (len(some) < len(rows))}{name}"


def lengths(tokenizer: Any, spec: TaskSpec, rows: Sequence[Any]) -> list[Length]:
    """Number of tokens of each row before anything is cut, and the share of those that the tokenizer does not know; 0
    for pictures, which are all the same size.

    Cost:
        As tokenising the rows for training once.
    """
    if spec.kind in IMAGE_KINDS:
        return [Length(0)] * len(rows)
    if spec.kind == "causal_lm":
        encoded = ((row, *_encode(tokenizer, row)) for row in rows)
        return [
            Length(len(given), len(answer), _unknown_of_texts(tokenizer, row, given + answer))
            for row, given, answer in encoded
        ]
    found = (
        tokenize(tokenizer, rows[start : start + ROWS_AT_ONCE], spec.data.max_length + 1)["input_ids"]
        for start in range(0, len(rows), ROWS_AT_ONCE)
    )
    return [length for ids in found for length in text_lengths(tokenizer, spec, ids)]


def text_lengths(tokenizer: Any, spec: TaskSpec, ids: Sequence[Sequence[int]]) -> list[Length]:
    """As `lengths`, of texts that were tokenised with one token more than data.max_length."""
    added = tokenizer.num_special_tokens_to_add(pair=bool(spec.data.text_pair_column))
    return [Length(len(one), unknown=_unknown(tokenizer, one, added)) for one in ids]


def _unknown_of_texts(tokenizer: Any, row: CompletionRow, ids: Sequence[int]) -> float:
    """As in `Length.unknown`, of what people and the model say: what the chat template puts around it is always known,
    and would hide a short message of which nothing is. ids: All tokens of the row."""
    whole = _unknown(tokenizer, ids, 2)
    if not row.is_chat or whole == 1.0 or (whole == 0.0 and tokenizer.unk_token_id is not None):
        return whole  # without such a token, what is not known leaves no trace
    alone = tokenizer([text for _, text in row.turns], add_special_tokens=False)["input_ids"]
    own = [token for text in alone for token in text]
    return _unknown(tokenizer, own, 0) if own else 1.0


def _unknown(tokenizer: Any, ids: Sequence[int], added: int) -> float:
    """As in `Length.unknown`. added: How many of the tokens the tokenizer adds, at most."""
    unknown, others = tokenizer.unk_token_id, (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    if len(ids) <= added:
        return float(added > 0)
    if unknown is None or unknown in others:  # to some a name for a token that ends texts: they know every byte
        return 0.0
    return min(1.0, ids.count(unknown) / (len(ids) - added))


def prompts_of(spec: TaskSpec) -> list[str]:
    """The text that stands for each label, for image_text."""
    return [spec.data.prompt_template.replace("{}", name) for name in spec.data.label_names]


def check_prompts(tokenizer: Any, spec: TaskSpec, length_max: int) -> None:
    """Refuse labels that a text tower cannot tell apart or read.

    Raises:
        InvalidInput: There are none, a prompt is longer than length_max tokens, or two have the same tokens.
    """
    names, prompts = spec.data.label_names, prompts_of(spec)
    if not prompts:
        raise InvalidInput(
            "names no labels, so there is nothing that a picture could be like",
            "data.label_names",
            "name the labels in the task file",
        )
    known: dict[tuple[int, ...], str] = {}
    for name, ids in zip(names, map(tuple, tokenizer(prompts)["input_ids"]), strict=True):
        if len(ids) > length_max:
            raise InvalidInput(
                f"the prompt of {name!r:.100} has {len(ids)} tokens, and the base model {spec.base_model!r} reads "
                f"{length_max}",
                "data.label_names",
                "give it a shorter name, or shorten data.prompt_template",
            )
        if (other := known.setdefault(ids, name)) != name:
            raise InvalidInput(
                f"{other!r:.100} and {name!r:.100} are the same to the base model's tokenizer, and so to the model",
                "data.label_names",
                "write names that differ in more than capital letters or characters that it does not know",
            )


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


def tokenize(tokenizer: Any, rows: Sequence[Any], length_max: int, **options: Any) -> Any:
    """Texts or pairs, truncated at the end (of a pair, the longer one first), as the tokenizer returns them."""
    pairs = [row.text_pair or "" for row in rows] if rows and rows[0].text_pair is not None else None
    return tokenizer([row.text for row in rows], pairs, truncation=True, max_length=length_max, **options)


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


def measured_prompt(tokenizer: Any, row: CompletionRow, length_max: int) -> tuple[list[int], Length]:
    """As `encode_prompt`, and what there was of it."""
    given, _ = _encode(tokenizer, row)
    length = Length(len(given), unknown=_unknown_of_texts(tokenizer, row, given))
    return _cut_left(tokenizer, given, length_max), length


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
