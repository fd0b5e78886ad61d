"""Scores: by hand on a few rows, the same whatever the order, and a language model's without padding or cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from configs.errors import InvalidInput
from configs.task_spec import METRICS, TaskSpec
from subspace_store.adapter import Adapter, ModuleUpdate
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import tiny_settings
from workers import evaluation
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import adapted_model, batches_by_length, generate, score_adapter, score_rows
from workers.rows.task_data import CompletionRow, Row, TextRow
from workers.tokens import encode_completion, encode_prompt
from workers.truncation import Length

Tiny = Callable[[str], BaseModel]


def task(kind: str = "sequence_classification", labels: Sequence[str] = (), metric: str = "", **data: Any) -> TaskSpec:
    values = {"train_file": "-", "eval_file": "-", "label_names": labels, "max_length": 16} | data
    values = {"team": "t", "name": "n", "base_model": "tiny", "kind": kind, "data": values}
    return TaskSpec.model_validate(values | ({"metric": metric} if metric else {}))


ABC = task(labels=("a", "b", "c"))
AB = task(labels=("a", "b"))


class ByFirstToken(torch.nn.Module):
    """Answers with the label that stands for the row's first word."""

    device = torch.device("cpu")

    def __init__(self, labels: dict[int, int]) -> None:
        super().__init__()
        self.labels = labels
        self.batches: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        chosen = [self.labels[int(token)] for token in input_ids[:, 1]]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(chosen), 3))


class Says(torch.nn.Module):
    """Puts out the same for every token."""

    device = torch.device("cpu")

    def __init__(self, outputs: Sequence[float]) -> None:
        super().__init__()
        self.outputs = torch.tensor(outputs)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.outputs.expand(*input_ids.shape, -1))


def test_answers_come_back_in_the_order_of_the_rows_though_batches_go_by_length(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "ROWS_PER_BATCH", 2)
    words = ["one", "two", "three"]
    ids = tiny("bert").tokenizer.convert_tokens_to_ids(words)
    model = ByFirstToken({token: label for label, token in enumerate(ids)})
    rows = [
        TextRow("three x x x x", None, 2),
        TextRow("one", None, 0),
        TextRow("two x x x", None, 0),
        TextRow("two", None, 1),
    ]
    score = score_rows(model, tiny("bert"), rows, ABC)
    assert score.per_row == (1, 1, 0, 1)
    assert (score.value, score.count) == (0.75, 4)
    # F1 of a: 2·1/(2+1); of b: 2·1/(1+2); of c: 1
    assert score.metrics["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert sorted(score.metrics) == sorted(METRICS["sequence_classification"])
    assert model.batches == [(2, 3), (2, 7)]  # two short rows padded to 3 tokens, two long ones to 7
    # Softmax of the outputs 1, 0, 0: what the right label gets, row by row; the third row's is not the answer.
    answer, other = math.e / (math.e + 2), 1 / (math.e + 2)
    by_row = score_rows(model, tiny("bert"), rows, ABC.model_copy(update={"metric": "probability"}))
    assert by_row.per_row == pytest.approx((answer, answer, other, answer))
    assert by_row.value == score.metrics["probability"] == pytest.approx((3 * answer + other) / 4)


def test_the_value_and_the_rows_are_those_of_the_tasks_own_metric(tiny: Tiny) -> None:
    ids = tiny("bert").tokenizer.convert_tokens_to_ids(["one", "two"])
    model = ByFirstToken({token: label for label, token in enumerate(ids)})
    rows = [TextRow(text, None, label) for text, label in [("one", 0), ("one", 1), ("two", 1), ("two", 1)]]
    score = score_rows(model, tiny("bert"), rows, task(labels=("a", "b"), metric="matthews_correlation"))
    assert score.value == score.metrics["matthews_correlation"] == pytest.approx(2 / 12**0.5)
    assert sum(score.per_row) / 4 == pytest.approx(score.value)


def test_rows_that_are_read_in_part_are_told(tiny: Tiny) -> None:
    ids = tiny("bert").tokenizer.convert_tokens_to_ids(["one"])
    rows = [TextRow("one" + " x" * words, None, 0) for words in (0, 5, 12, 13, 99)]  # and the two marks
    score = score_rows(ByFirstToken({ids[0]: 0}), tiny("bert"), rows, ABC)
    (said,) = score.warnings
    assert said.startswith("1 of 5 evaluation rows have more tokens than data.max_length, 16: their end is not read → ")
    assert score_rows(ByFirstToken({ids[0]: 0}), tiny("bert"), rows[:4], ABC).warnings == ()  # one has just 16


def test_answers_that_cannot_be_written_and_prompts_that_generation_has_no_room_for_are_told(talker: BaseModel) -> None:
    spec = task("causal_lm", metric="exact_match", max_length=64, max_new_tokens=60)  # of 64 positions
    said = score_rows(talker.task_model(spec), talker, QUESTIONS[:1], spec).warnings
    assert [line.partition(": ")[0] for line in said] == ["1 of 1 evaluation rows have a prompt of more than 4 tokens"]
    spec = task("causal_lm", metric="exact_match", max_length=32, max_new_tokens=1)
    rows = [question("The", " grass"), question("The", " grass is green and the grass is green")]
    (line,) = score_rows(talker.task_model(spec), talker, rows, spec).warnings
    assert line.startswith("1 of 2 evaluation rows have an answer of more tokens than data.max_new_tokens, 1: ")


@pytest.mark.parametrize(("tokens_max", "batches"), [(100, [[2, 0, 3], [1]]), (6, [[2, 0], [3], [1]]), (1, None)])
def test_a_batch_has_as_many_rows_as_its_longest_allows(tokens_max: int, batches: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(evaluation, "ROWS_PER_BATCH", 3)
    assert batches_by_length([3, 9, 2, 5], tokens_max) == (batches or [[2], [0], [3], [1]])


@pytest.mark.parametrize("kind", ["sequence_classification", "sequence_regression", "causal_lm"])
def test_a_score_is_the_same_in_every_run_and_whatever_was_drawn_before(kind: str, talker: BaseModel) -> None:
    spec = task(kind, ("neg", "pos") if kind == "sequence_classification" else ())
    rows: list[Row] = [TextRow(f"grass is {'green ' * (place % 7)}", None, place % 2) for place in range(70)]
    if kind == "causal_lm":
        rows = [question("grass " * (place % 5), "is green") for place in range(70)]
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        scores.append(score_rows(talker.task_model(spec, 3), talker, rows, spec))
    assert scores[0] == scores[1]


def test_dropout_is_off_while_scoring(tiny: Tiny) -> None:
    model = tiny("bert").task_model(AB).train()
    score_rows(model, tiny("bert"), [TextRow("x", None, 0)], AB)
    assert not model.training


def test_a_model_is_asked_before_every_batch_whether_to_stop(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ROWS_PER_BATCH", 1)
    asked: list[int] = []

    def stop_at_the_second() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    rows = [TextRow("x", None, 0)] * 3
    with pytest.raises(KeyboardInterrupt):
        score_rows(tiny("bert").task_model(AB), tiny("bert"), rows, AB, stop_at_the_second)
    assert len(asked) == 2


def test_a_regression_is_scored_by_its_one_output(tiny: Tiny) -> None:
    class Length(Says):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=attention_mask.sum(dim=1, keepdim=True).float())

    rows = [TextRow("x " * count, None, label) for count, label in [(3, 1.0), (1, 0.25), (2, 0.5)]]
    score = score_rows(Length([0.0]), tiny("bert"), rows, task("sequence_regression", metric="spearman"))
    assert score.value == pytest.approx(1.0)
    # Deviations of 5, 3, 4 from 4, and of 1, 1/4, 1/2 from 7/12: (5 + 4) / 12 / √(2 · 42/144)
    assert score.metrics["pearson"] == pytest.approx(0.75 / (2 * 42 / 144) ** 0.5)


# Language models


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    # Large numbers, so that a random model's answers depend on what it reads.
    return load_base_model(tiny_settings(save_llama(tmp_path_factory.mktemp("talker"), initializer_range=0.3)))


def question(prompt: str, completion: str) -> CompletionRow:
    return CompletionRow((("user", prompt), ("assistant", completion)), is_chat=False)


QUESTIONS = [
    question("The capital of France is", " Paris."),
    question("grass", " is green."),
    question("The colour of grass", " green"),
]


def test_log_likelihood_is_that_of_each_row_alone(talker: BaseModel) -> None:
    spec = task("causal_lm")
    model = talker.task_model(spec).eval()
    log_probabilities = []
    for row in QUESTIONS:
        prompt, completion = encode_completion(talker.tokenizer, row, 16)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        log_probabilities.append([float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(completion)])
    score = score_rows(model, talker, QUESTIONS, spec)
    everything = [value for row in log_probabilities for value in row]
    assert score.value == pytest.approx(sum(everything) / len(everything), abs=1e-5)
    assert score.metrics == {"log_likelihood": score.value, "perplexity": pytest.approx(math.exp(-score.value))}
    assert sum(score.per_row) / 3 == pytest.approx(score.value)


def test_answers_are_the_greedy_ones_whatever_stands_beside_them_in_the_batch(talker: BaseModel) -> None:
    spec = task("causal_lm", metric="exact_match", max_new_tokens=5)
    model = talker.task_model(spec).eval()
    greedy = []
    for row in QUESTIONS:  # one row, no padding, no cache
        ids = encode_prompt(talker.tokenizer, row, 16)
        start = len(ids)
        while len(ids) < start + 5 and ids[-1] != talker.tokenizer.eos_token_id:
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        greedy.append(talker.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert len(set(greedy)) == 3
    rows = [question(row.turns[0][1], greedy[place] if place else "else") for place, row in enumerate(QUESTIONS)]
    score = score_rows(model, talker, rows, spec)
    assert score.per_row == (0, 1, 1)
    assert score.value == pytest.approx(2 / 3)
    assert sorted(score.metrics) == ["exact_match", "log_likelihood", "perplexity", "rouge_l"]


def test_the_checkpoints_own_way_to_generate_is_not_used(talker: BaseModel) -> None:
    spec = task("causal_lm", metric="rouge_l", max_new_tokens=8)
    scores = []
    for owned in (GenerationConfig(), GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0)):
        model = talker.task_model(spec)
        model.generation_config = owned
        scores.append(score_rows(model, talker, QUESTIONS, spec))
    assert scores[0] == scores[1]


def test_an_adapted_model_generates_with_its_update(talker: BaseModel) -> None:
    spec = task("causal_lm", metric="rouge_l", max_new_tokens=8)
    name = "model.layers.1.mlp.down_proj"
    update = ModuleUpdate(torch.eye(32)[:, :2], torch.full((2,), 40.0), torch.eye(64)[:, :2])
    adapter = Adapter("tiny", "", {name: update}, {}, {})
    models = [adapted_model(talker, adapter, spec, with_update) for with_update in (True, False)]
    for model in models:
        model.generation_config = GenerationConfig(do_sample=True, temperature=5.0)
    answers = [generate(model, talker, QUESTIONS, spec) for model in models]
    assert answers[0] != answers[1]
    merged = talker.task_model(spec)
    weight = merged.get_parameter(f"{name}.weight")
    weight.data = weight.data + update.delta().float()
    assert generate(merged, talker, QUESTIONS, spec) == answers[0]
    assert score_adapter(talker, adapter, QUESTIONS, spec).count == 3


def test_a_long_answer_can_be_stopped_between_two_tokens(talker: BaseModel) -> None:
    asked: list[int] = []

    def stop_at_the_fifth() -> None:
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt

    spec = task("causal_lm", metric="exact_match", max_new_tokens=30)
    model = talker.task_model(spec)
    with pytest.raises(KeyboardInterrupt):
        score_rows(model, talker, QUESTIONS[:1], spec, stop_at_the_fifth)


def test_a_prompt_leaves_room_for_the_answer_in_the_models_positions(talker: BaseModel) -> None:
    # 64 positions, 60 of them for the answer: the prompt's last 4 tokens.
    spec = task("causal_lm", metric="exact_match", max_length=64, max_new_tokens=60)
    seen: list[int] = []
    model = talker.task_model(spec)
    model.register_forward_pre_hook(lambda _, args, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    generate(model, talker, QUESTIONS[:1], spec)
    assert seen[0] == 4


def test_outputs_that_are_too_sure_cost_a_hundred_nats_and_no_more(talker: BaseModel) -> None:
    count = len(talker.tokenizer)
    score = score_rows(Says([0.0] + [1e30] * (count - 1)), talker, [question("x", "<pad>")], task("causal_lm"))
    assert score.value == pytest.approx((-100.0 - math.log(count - 1)) / 2)


class BrokenAtThree(Says):
    """Puts out what is no number for texts of three tokens and more, their first and last marks not counted."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        outputs = self.outputs.repeat(len(input_ids), 1)
        outputs[attention_mask.sum(dim=1) >= 5, -1] = math.nan
        return SimpleNamespace(logits=outputs)


@pytest.mark.parametrize("kind", ["sequence_classification", "sequence_regression"])
def test_a_model_whose_output_is_no_number_has_no_score_and_the_rows_are_named(kind: str, tiny: Tiny) -> None:
    spec = AB if kind == "sequence_classification" else task(kind)
    rows = [TextRow("x " * words, None, number % 2) for number, words in enumerate([1, 2, 4, 1, 3])]
    model = BrokenAtThree([0.0, 1.0] if spec is AB else [0.0])
    with pytest.raises(InvalidInput) as caught:
        score_rows(model, tiny("bert"), rows, spec)
    assert f"{spec.metric} cannot be computed: for 2 of 5 evaluation rows, one of them row 3," in str(caught.value)


@pytest.mark.parametrize("metric", ["log_likelihood", "exact_match", "rouge_l"])
def test_a_language_model_whose_output_is_no_number_has_no_score(metric: str, talker: BaseModel) -> None:
    model = Says([math.nan] * len(talker.tokenizer))
    with pytest.raises(InvalidInput, match=f"{metric} cannot be computed: for 1 of 1 evaluation rows"):
        score_rows(model, talker, [question("x", "<pad>")], task("causal_lm", metric=metric))


def test_completions_of_which_the_tokenizer_makes_nothing_have_no_score(
    talker: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "lengths", lambda base, spec, rows: [Length(1)] * len(rows))
    with pytest.raises(InvalidInput, match="makes no token of the answer of 1 of 1 evaluation rows"):
        score_rows(Says([0.0] * len(talker.tokenizer)), talker, [question("x", "y")], task("causal_lm"))


# What comes with an adapter


def test_an_adapter_without_a_head_cannot_be_scored_and_says_why(tiny: Tiny) -> None:
    update = ModuleUpdate(torch.eye(32)[:, :1], torch.ones(1), torch.eye(32)[:, :1])
    headless = Adapter("tiny", "", {"bert.encoder.layer.0.attention.self.query": update})
    with pytest.raises(InvalidInput, match="no head"):
        adapted_model(tiny("bert"), headless, AB)


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_an_adapter_that_brings_a_layer_of_the_base_model_is_refused_and_the_base_stays_as_it_was(
    kind: str, talker: BaseModel
) -> None:
    spec = task(kind, ("a", "b") if kind == "sequence_classification" else ())
    name = "lm_head.weight" if kind == "causal_lm" else "model.embed_tokens.weight"
    before = talker.task_model(spec).get_parameter(name).clone()
    update = ModuleUpdate(torch.eye(32)[:, :1], torch.ones(1), torch.eye(64)[:, :1])
    adapter = Adapter("tiny", "", {"model.layers.1.mlp.down_proj": update}, {name: torch.zeros_like(before)})
    with pytest.raises(InvalidInput, match="belongs to the base model 'tiny'"):
        adapted_model(talker, adapter, spec)
    assert torch.equal(talker.task_model(spec).get_parameter(name), before)


@pytest.mark.parametrize("count", [0, 1])
def test_a_module_without_directions_changes_nothing(count: int, tiny: Tiny) -> None:
    base = tiny("bert")
    head = {f"classifier.{name}": torch.ones_like(p) for name, p in base.task_model(AB).classifier.named_parameters()}
    empty = ModuleUpdate(torch.zeros(32, count), torch.zeros(count), torch.zeros(32, count))
    adapter = Adapter("tiny", "", {"bert.encoder.layer.0.attention.self.query": empty}, head, {"task_type": "SEQ_CLS"})
    tokens = {"input_ids": torch.tensor([[101, 2307, 102]])}
    with torch.inference_mode():
        with_it = adapted_model(base, adapter, AB).eval()(**tokens).logits
        without = adapted_model(base, adapter, AB, with_update=False).eval()(**tokens).logits
    assert torch.equal(with_it, without)
