"""What is told of rows that are longer than a model reads: how many, which part is lost, and what to do."""

from __future__ import annotations

from tests.workers.worker_builders import task_of_kind
from workers.rows.task_data import CompletionRow
from workers.tokens import _unknown_of_texts
from workers.truncation import Length, losses

COMPLETIONS = task_of_kind("causal_lm")  # data.max_length is 16


def test_a_row_that_just_fits_is_read_whole() -> None:
    for spec in (COMPLETIONS, task_of_kind("sequence_classification"), task_of_kind("sequence_regression")):
        assert losses([Length(16), Length(10, 6)][spec is COMPLETIONS :], spec, "training rows") == ()
    assert losses([Length(0)] * 3, task_of_kind("image_classification"), "training rows") == ()


def test_where_the_answer_is_cut_it_is_not_told_as_a_cut_prompt() -> None:
    # 15 tokens of an answer leave one for the prompt, 16 lose one of theirs.
    answer, prompt = losses([Length(9, 16), Length(9, 15), Length(9, 8), Length(2, 2)], COMPLETIONS, "training rows")
    assert answer.startswith("1 of 4 training rows have an answer for which data.max_length, 16 tokens, leaves no room")
    assert "the answer's end is cut off" in answer
    assert prompt.startswith("2 of 4 training rows have more tokens than data.max_length, 16: the beginning of their ")


def test_rows_of_whose_answer_nothing_is_left_are_told_first() -> None:
    (empty,) = losses([Length(3, 0), Length(3, 2)], COMPLETIONS, "evaluation rows")
    assert empty.startswith("1 of 2 evaluation rows say nothing about the task: ")


def test_of_pairs_the_longer_text_is_cut() -> None:
    spec = task_of_kind("sequence_classification")
    pairs = spec.model_copy(update={"data": spec.data.model_copy(update={"text_pair_column": "b"})})
    (said,) = losses([Length(17)], pairs, "evaluation rows")
    assert "the end of the longer text is not read" in said


class Words:
    """A tokenizer that knows the words of its chat template, and no emoji."""

    unk_token_id, eos_token_id, bos_token_id, pad_token_id = 0, 1, None, None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0 if word == "\N{GRINNING FACE}" else 7 for word in text.split()] for text in texts]}


def test_of_a_chat_only_what_is_said_counts_as_known_or_not() -> None:
    around = [5] * 20  # what the template writes around two turns
    emojis = CompletionRow((("user", "\N{GRINNING FACE}"), ("assistant", "\N{GRINNING FACE}")), True)
    assert _unknown_of_texts(Words(), emojis, [*around, 0, 0, 1]) == 1.0  # not 2 of 21
    mixed = CompletionRow((("user", "one two three"), ("assistant", "\N{GRINNING FACE}")), True)
    assert _unknown_of_texts(Words(), mixed, [*around, 7, 7, 7, 0, 1]) == 0.25
    assert _unknown_of_texts(Words(), mixed, [*around, 7, 7, 7, 1]) == 0.0


class Silent(Words):
    """One that makes nothing at all of what it does not know."""

    unk_token_id = None  # type: ignore[assignment]

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        found = super().__call__(texts, add_special_tokens)["input_ids"]
        return {"input_ids": [[token for token in ids if token] for ids in found]}


def test_a_chat_of_which_no_token_is_made_is_not_known() -> None:
    emojis = CompletionRow((("user", "\N{GRINNING FACE}"), ("assistant", "\N{GRINNING FACE}")), True)
    assert _unknown_of_texts(Silent(), emojis, [5] * 20) == 1.0
    mixed = CompletionRow((("user", "one two three"), ("assistant", "\N{GRINNING FACE}")), True)
    assert _unknown_of_texts(Silent(), mixed, [*[5] * 20, 7, 7, 7, 1]) == 0.0
