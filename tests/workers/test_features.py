"""What a model reads: labels in the right place and type, rows cut where they may be, pixels as the base wants them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from tests.workers.tiny_bases import save_vit, talking_tokenizer
from tests.workers.worker_builders import tiny_settings
from workers import tokens
from workers.base_model import BaseModel, load_base_model
from workers.features import IGNORED, collator, completions
from workers.rows.task_data import CompletionRow, ImageRow, TextRow
from workers.tokens import encode_completion, encode_prompt, lengths
from workers.truncation import Length

Tiny = Callable[[str], BaseModel]


def spec(kind: str, **data: Any) -> TaskSpec:
    labels = ("a", "b", "c") if "classification" in kind else ()
    values = {"train_file": "-", "eval_file": "-", "label_names": labels, "max_length": 16} | data
    return TaskSpec.model_validate({"team": "t", "name": "n", "base_model": "tiny", "kind": kind, "data": values})


def question(prompt: str, completion: str) -> CompletionRow:
    return CompletionRow((("user", prompt), ("assistant", completion)), is_chat=False)


def chat(*contents: str, first: str = "user") -> CompletionRow:
    other = "assistant" if first == "user" else "user"
    turns = tuple((first if place % 2 == 0 else other, content) for place, content in enumerate(contents))
    return CompletionRow(turns, is_chat=True)


@pytest.fixture(scope="module")
def talking() -> Any:
    return talking_tokenizer()


@pytest.fixture(scope="module")
def chatting() -> Any:
    return talking_tokenizer(chat=True)


def test_the_tokens_of_many_rows_are_counted_some_rows_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 3)
    base, seen = tiny("bert"), list[int]()

    class Counting:
        def __call__(self, texts: list[str], pairs: list[str], **options: Any) -> Any:
            seen.append(len(texts))
            return base.tokenizer(texts, pairs, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(base.tokenizer, name)

    rows = [TextRow("x " * words, "y", 0) for words in (1, 2, 5, 3, 1, 2, 9)]
    counts = lengths(Counting(), spec("sequence_classification", text_pair_column="p"), rows)
    assert [length.given for length in counts] == [5, 6, 9, 7, 5, 6, 13]  # the words, y, and three marks
    assert seen == [3, 3, 1]


def test_as_many_rows_are_measured_as_a_number_of_characters_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MEASURED_CHARACTERS", 300)
    rows = [TextRow("x" * 20, "y" * 5, 0)] * 7  # 125 each
    assert list(tokens.measured_rows(rows)) == rows[:3]
    assert list(tokens.measured_rows(rows[:3])) == rows[:3]
    assert list(tokens.measured_rows([question("x" * 1000, "y")] * 2)) == [question("x" * 1000, "y")]
    pictures = [ImageRow(np.zeros((1, 1, 3), dtype=np.uint8), 0)] * 9
    assert tokens.measured_rows(pictures) == pictures


def test_class_labels_are_whole_numbers_and_what_a_regression_learns_is_not(tiny: Tiny) -> None:
    rows = [TextRow("one", None, 1), TextRow("two three", None, 2)]
    classes = collator(tiny("bert"), spec("sequence_classification"))(rows)["labels"]
    numbers = collator(tiny("bert"), spec("sequence_regression"))([TextRow("one", None, 3), TextRow("two", None, 0.5)])
    assert (classes.dtype, classes.tolist()) == (torch.int64, [1, 2])
    assert (numbers["labels"].dtype, numbers["labels"].tolist()) == (torch.float32, [3.0, 0.5])


def test_pairs_are_given_to_the_model_as_pairs_and_the_longer_text_is_cut(tiny: Tiny) -> None:
    batch = collator(tiny("bert"), spec("sequence_classification", max_length=7))([TextRow("one", "two " * 9, 0)])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]  # [CLS] one [SEP] | two two two [SEP]


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny("bert").tokenizer, "padding_side", "left")
    rows, task = [TextRow("one", None, 0), TextRow("one two three", None, 0)], spec("sequence_classification")
    assert collator(tiny("bert"), task)(rows)["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert lengths(tiny("bert").tokenizer, task, rows) == [Length(3), Length(5)]


def test_the_loss_of_a_language_model_is_on_the_completion_and_its_end_alone(talking: Any) -> None:
    rows = [question("The capital of France is", " Paris."), question("The", " grass")]
    batch = completions(talking, rows, 16)
    long, short = batch["labels"].tolist()
    assert talking.convert_ids_to_tokens(long[6:]) == ["ĠParis", ".", "</s>"]
    assert talking.decode(batch["input_ids"][0]) == "<s>The capital of France is Paris.</s>"
    assert long[:6] == [IGNORED] * 6  # <s> and five words
    assert talking.convert_ids_to_tokens(short[2:4]) == ["Ġgrass", "</s>"]
    assert (short[:2], short[4:]) == ([IGNORED] * 2, [IGNORED] * 5)  # padding is on the right
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 4]
    assert batch["input_ids"][1, 4:].tolist() == [talking.pad_token_id] * 5


def test_too_long_a_row_loses_the_start_of_its_prompt_and_no_word_of_its_completion(talking: Any) -> None:
    prompt, completion = encode_completion(talking, question("The capital of France is", " Paris."), 6)
    assert talking.convert_ids_to_tokens(prompt) == ["<s>", "ĠFrance", "Ġis"]
    assert talking.convert_ids_to_tokens(completion) == ["ĠParis", ".", "</s>"]


def test_a_completion_that_is_too_long_by_itself_loses_its_end_and_keeps_a_token_of_context(talking: Any) -> None:
    prompt, completion = encode_completion(talking, question("The", " capital of France is Paris."), 4)
    assert len(prompt) == 1
    assert talking.convert_ids_to_tokens(completion) == ["Ġcapital", "Ġof", "ĠFrance"]  # and no </s>: it goes on


def test_what_is_generated_from_is_what_was_trained_on_though_the_completion_could_share_a_token(talking: Any) -> None:
    # Together "Par" and "is" would be other tokens than one after the other.
    row = question("The capital of France is Par", "is.")
    prompt, completion = encode_completion(talking, row, 64)
    assert prompt == encode_prompt(talking, row, 64)
    assert prompt + completion[:-1] != talking("The capital of France is Paris.")["input_ids"]
    assert talking.decode(prompt + completion) == "<s>The capital of France is Paris.</s>"


def test_a_prompt_without_a_token_still_gives_the_completion_a_place_to_start() -> None:
    talking = talking_tokenizer()
    talking.bos_token = None
    prompt, completion = encode_completion(talking, question("", "grass"), 16)
    assert (talking.decode(prompt), talking.decode(completion)) == ("</s>", "grass</s>")


def test_messages_are_written_by_the_tokenizers_template_and_only_the_last_answer_is_learnt(chatting: Any) -> None:
    prompt, completion = encode_completion(chatting, chat("grass?", "green", "France?", "Paris."), 64)
    assert chatting.decode(prompt) == "<|user|>grass?</s>\n<|assistant|>green</s>\n<|user|>France?</s>\n<|assistant|>"
    assert chatting.decode(completion) == "Paris.</s>"  # the line break that the template writes behind is nobody's


def test_messages_without_a_template_are_refused_before_anything_is_trained(tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match="no chat template") as raised:
        collator(tiny("llama"), spec("causal_lm", messages_column="messages"))
    assert raised.value.where == "data.messages_column"
    assert "data.prompt_column" in raised.value.todo


def test_messages_that_the_template_refuses_are_the_users_mistake(chatting: Any) -> None:
    row = CompletionRow((("system", "be brief"), ("user", "France?"), ("assistant", "Paris.")), is_chat=True)
    with pytest.raises(InvalidInput, match=r"only user and assistant talk here.*system, user, assistant"):
        encode_completion(chatting, row, 64)


def test_a_picture_becomes_what_the_base_models_processor_says(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_vit(tmp_path)))
    grey = np.zeros((28, 20, 1), dtype=np.uint8)
    colour = np.full((16, 16, 3), (255, 0, 51), dtype=np.uint8)
    batch = collator(base, spec("image_classification"))([ImageRow(grey, 2), ImageRow(colour, 0)])
    assert batch["labels"].tolist() == [2, 0]
    pixels = batch["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((2, 3, 16, 16), torch.float32)
    # (value / 255 − 0.5) / 0.5, channel by channel
    assert pixels[0].unique().tolist() == [-1.0]
    assert pixels[1].mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_of_a_batch_of_photographs_no_more_than_two_are_in_memory_at_once(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_vit(tmp_path)))
    pictures: list[weakref.ref[Any]] = []
    alive = []

    def decoded() -> Iterator[ImageRow]:
        for label in range(4):
            row = ImageRow(np.zeros((40, 40, 3), dtype=np.uint8), label)
            pictures.append(weakref.ref(row.image))
            alive.append(sum(picture() is not None for picture in pictures))
            yield row
            del row

    rows = decoded()
    assert collator(base, spec("image_classification"))(rows)["labels"].tolist() == [0, 1, 2, 3]
    assert max(alive) == 2  # the next is decoded while the one before is still held


def test_a_picture_of_three_rows_is_not_taken_for_three_channels(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_vit(tmp_path)))
    picture = np.zeros((3, 16, 3), dtype=np.uint8)
    picture[:, :, 0] = 255
    pixels = collator(base, spec("image_classification"))([ImageRow(picture, 0)])["pixel_values"]
    assert pixels[0].mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -1.0, -1.0])
