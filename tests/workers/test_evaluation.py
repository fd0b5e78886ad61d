"""Scores: by hand on four rows, and the same whatever the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput
from configs.task_spec import DataSpec
from subspace_store.adapter import Adapter, ModuleUpdate
from tests.workers.worker_builders import sentiment_rows
from workers import evaluation
from workers.base_model import BaseModel
from workers.evaluation import adapted_classifier, measure, score_rows
from workers.task_data import TextRow, read_rows

Tiny = Callable[[str], BaseModel]
DATA = DataSpec(label_names=("a", "b", "c"), max_length=16)


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


def test_the_three_scores_are_what_the_hand_computes() -> None:
    expected, predicted = [0, 0, 1, 1], [0, 1, 1, 1]
    # F1 of 0: precision 1, recall 1/2: 2/3; of 1: precision 2/3, recall 1: 4/5; a third label without rows: 0.
    assert measure("accuracy", expected, predicted, 2) == 0.75
    assert measure("f1_macro", expected, predicted, 2) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert measure("f1_macro", expected, predicted, 3) == pytest.approx((2 / 3 + 4 / 5) / 3)
    # (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2·1 − 1·0) / √(3·2·2·1)
    assert measure("matthews_correlation", expected, predicted, 2) == pytest.approx(2 / 12**0.5)


def test_answers_come_back_in_the_order_of_the_rows_though_batches_go_by_length(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "ROWS_PER_BATCH", 2)
    tokenizer = tiny("bert").tokenizer
    words = ["one", "two", "three"]
    model = ByFirstToken({tokenizer.convert_tokens_to_ids(word): label for label, word in enumerate(words)})
    rows = [
        TextRow("three x x x x", None, 2),
        TextRow("one", None, 0),
        TextRow("two x x x", None, 0),
        TextRow("two", None, 1),
    ]
    score = score_rows(model, tokenizer, rows, DATA, "accuracy")
    assert score.correct == (True, True, False, True)
    assert (score.value, score.count) == (0.75, 4)
    assert model.batches == [(2, 3), (2, 7)]  # two short rows padded to 3 tokens, two long ones to 7


def test_a_score_is_the_same_in_every_run_and_whatever_was_drawn_before(tiny: Tiny) -> None:
    rows = read_rows(sentiment_rows(70), DATA.model_copy(update={"label_names": ("neg", "pos")}))
    base = tiny("bert")
    scores = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        scores.append(score_rows(base.classifier_for(["neg", "pos"], 3), base.tokenizer, rows, DATA, "accuracy"))
    assert scores[0] == scores[1]


def test_dropout_is_off_while_scoring(tiny: Tiny) -> None:
    model = tiny("bert").classifier_for(["a", "b"]).train()
    score_rows(model, tiny("bert").tokenizer, [TextRow("x", None, 0)], DATA, "accuracy")
    assert not model.training


def test_pairs_are_given_to_the_model_as_pairs(tiny: Tiny) -> None:
    seen: list[Any] = []

    class Spy(ByFirstToken):
        def forward(self, input_ids: torch.Tensor, **more: Any) -> SimpleNamespace:
            seen.append(more["token_type_ids"])
            return super().forward(input_ids)

    tokenizer = tiny("bert").tokenizer
    model = Spy({tokenizer.convert_tokens_to_ids("one"): 0})
    score_rows(model, tokenizer, [TextRow("one", "two", 0)], DATA, "accuracy")
    assert seen[0].tolist() == [[0, 0, 0, 1, 1]]  # [CLS] one [SEP] | two [SEP]


def test_a_model_is_asked_before_every_batch_whether_to_stop(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ROWS_PER_BATCH", 1)
    asked: list[int] = []

    def stop_at_the_second() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    rows: Sequence[TextRow] = [TextRow("x", None, 0)] * 3
    with pytest.raises(KeyboardInterrupt):
        score_rows(
            tiny("bert").classifier_for(["a", "b"]), tiny("bert").tokenizer, rows, DATA, "accuracy", stop_at_the_second
        )
    assert len(asked) == 2


def test_an_adapter_without_a_head_cannot_be_scored_and_says_why(tiny: Tiny) -> None:
    update = ModuleUpdate(torch.eye(32)[:, :1], torch.ones(1), torch.eye(32)[:, :1])
    headless = Adapter("tiny", "", {"bert.encoder.layer.0.attention.self.query": update})
    with pytest.raises(InvalidInput, match="no classification head"):
        adapted_classifier(tiny("bert"), headless, ("a", "b"))


@pytest.mark.parametrize("count", [0, 1])
def test_a_module_without_directions_changes_nothing(count: int, tiny: Tiny) -> None:
    base = tiny("bert")
    head = {name: torch.ones_like(p) for name, p in base.classifier_for(["a", "b"]).classifier.named_parameters()}
    head = {f"classifier.{name}": tensor for name, tensor in head.items()}
    empty = ModuleUpdate(torch.zeros(32, count), torch.zeros(count), torch.zeros(32, count))
    adapter = Adapter("tiny", "", {"bert.encoder.layer.0.attention.self.query": empty}, head, {"task_type": "SEQ_CLS"})
    tokens = {"input_ids": torch.tensor([[101, 2307, 102]])}
    with torch.inference_mode():
        with_it = adapted_classifier(base, adapter, ("a", "b")).eval()(**tokens).logits
        without = adapted_classifier(base, adapter, ("a", "b"), with_update=False).eval()(**tokens).logits
    assert torch.equal(with_it, without)
