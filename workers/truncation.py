"""What of its rows a model does not read, because they are too long, or in characters that its tokenizer does not know,
in sentences for the owner of the task. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from workers.metrics import GENERATED


@dataclass(frozen=True)
class Length:
    """Tokens of a row before anything is cut."""

    given: int
    """Tokens of what the model is given: the text, both texts, or the prompt; of texts at most one more than
    data.max_length. 0 for a picture."""
    answer: int = 0
    """Tokens of the answer, its end token among them; 0 for rows that have none."""
    unknown: float = 0.0
    """Share of the row's own tokens, without those that the tokenizer adds, which stand for something that it does not
    know; 1 where it makes no token of the row."""

    def read(self, longest: int) -> int:
        """How many of them are read if data.max_length is so many."""
        return min(self.given + self.answer, longest)


def losses(lengths: Sequence[Length], spec: TaskSpec, rows: str) -> tuple[str, ...]:
    """Sentences on rows of which a part is not read; none where all is read.

    Args:
        rows: Which rows they are, for the sentences: `evaluation rows`.
    """
    count, longest = f"of {len(lengths):,} {rows}", spec.data.max_length
    return (*unknown_characters(lengths, count), *_of_cut(lengths, spec, count, longest))


def unknown_characters(lengths: Sequence[Length], count: str) -> Iterator[str]:
    """A sentence on rows in characters that the tokenizer does not know, if there are some. count: `of 5 rows`."""
    if mostly := sum(length.unknown > 0.5 for length in lengths):
        nothing = sum(length.unknown == 1 for length in lengths)
        whole = f"{nothing:,} of them whole" if 0 < nothing < mostly else "whole" if nothing else "for more than half"
        yield (
            f"{mostly:,} {count} are in characters that the base model's tokenizer does not know, {whole}: in the "
            "place of each the model reads nothing, or the same unknown token → drop these rows, or write them in a "
            "script that it knows"
        )


def _of_cut(lengths: Sequence[Length], spec: TaskSpec, count: str, longest: int) -> tuple[str, ...]:
    if spec.kind != "causal_lm":
        end = "the end of the longer text" if spec.data.text_pair_column else "their end"
        if cut := sum(length.given > longest for length in lengths):
            todo = "raise it as far as the base model allows, or shorten them"
            return (f"{cut:,} {count} have more tokens than data.max_length, {longest}: {end} is not read → {todo}",)
        return ()
    return tuple(_of_completions(lengths, longest, count))


def losses_of_generation(
    lengths: Sequence[Length], spec: TaskSpec, positions: int, rows: str = "evaluation rows"
) -> tuple[str, ...]:
    """As `losses`, for answers that a language model generates.

    Args:
        positions: How many tokens the base model has room for.
    """
    if spec.metric not in GENERATED:
        return ()
    count, new_max = f"of {len(lengths):,} {rows}", spec.data.max_new_tokens
    said = []
    room = positions - new_max
    if room < spec.data.max_length and (cut := sum(length.given > room for length in lengths)):
        said.append(
            f"{cut:,} {count} have a prompt of more than {room} tokens: data.max_new_tokens, {new_max}, leaves no room "
            "for more, and its beginning is not read → lower data.max_new_tokens, or shorten the prompts"
        )
    if late := sum(length.answer > new_max + 1 for length in lengths):  # the end token need not be written
        said.append(
            f"{late:,} {count} have an answer of more tokens than data.max_new_tokens, {new_max}: none so long is "
            "written → raise data.max_new_tokens"
        )
    return tuple(said)


def check_answers(lengths: Sequence[Length], spec: TaskSpec, base_model: str, rows: str, each: bool) -> None:
    """Refuse answers of which a language model reads no token: they can be neither learnt nor scored.

    Args:
        rows: As in `losses`.
        each: Refuse one such row (in a step by itself, its loss would be 0/0), and not only if all are such.

    Raises:
        InvalidInput: With how many there are, and the first of them.
    """
    empty = [row for row, length in enumerate(lengths, start=1) if not length.answer]
    if spec.kind == "causal_lm" and empty and (each or len(empty) == len(lengths)):
        raise InvalidInput(
            f"the tokenizer of the base model {base_model!r} makes no token of the answer of {len(empty):,} of "
            f"{len(lengths):,} {rows}, the first of them row {empty[0]:,}",
            "data",
            "give answers in a script that it knows, or drop these rows",
        )


def _of_completions(lengths: Sequence[Length], longest: int, count: str) -> Iterator[str]:
    if empty := sum(not length.answer for length in lengths):
        yield (
            f"{empty:,} {count} say nothing about the task: the tokenizer of the base model makes no token of their "
            "answer → write the answers in a script that it knows, or drop these rows"
        )
    answers = sum(length.answer > longest - 1 for length in lengths)
    if answers:
        yield (
            f"{answers:,} {count} have an answer for which data.max_length, {longest} tokens, leaves no room: the "
            "answer's end is cut off, and nearly all of the prompt → raise data.max_length, or shorten the answers"
        )
    if prompts := sum(length.given + length.answer > longest for length in lengths) - answers:
        yield (
            f"{prompts:,} {count} have more tokens than data.max_length, {longest}: the beginning of their prompt is "
            "not read (the answer is) → raise data.max_length, or shorten the prompts"
        )
