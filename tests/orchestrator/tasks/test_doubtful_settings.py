"""What is set and has no effect, or another one than it says, is told to the task's owner."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.tasks.doubtful_settings import doubtful_settings, few_rows
from tests.builders import task_spec

CAUSAL: dict[str, Any] = {"kind": "causal_lm", "data": {"label_names": []}}
TEN_STEPS = {"per_device_train_batch_size": 10, "num_train_epochs": 1}
"""Of a hundred rows."""


def said(row_count: int = 100, ranks: int = 1, **changes: Any) -> tuple[str, ...]:
    method = {"name": "lora"} | changes.pop("method", {})
    return tuple(doubtful_settings(task_spec(method=method, **changes), row_count, ranks))


@pytest.mark.parametrize(
    ("training", "steps", "warmup", "highest"),
    [
        ({"warmup_steps": 10}, 10, 10, "0.09"),  # the tenth step, of index 9, has 9/10 of the rate
        ({"warmup_steps": 40}, 10, 40, "0.0225"),
        ({"warmup_steps": 40, "max_steps": 40, "num_train_epochs": 3}, 40, 40, "0.0975"),
        ({"warmup_steps": 0.95}, 10, 10, "0.09"),  # a share is rounded up
        (
            {"warmup_steps": 0.1, "max_steps": 1, "num_train_epochs": 3},
            1,
            1,
            "0",
        ),  # nothing is trained
    ],
)
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_a_warm_up_that_the_run_does_not_outlast_is_told_with_the_rate_that_it_gets_to(
    kind: str, training: dict[str, Any], steps: int, warmup: int, highest: str
) -> None:
    (sentence,) = said(training=TEN_STEPS | {"learning_rate": 0.1, "lr_scheduler_type": kind} | training, row_count=100)
    assert f"the warm-up of {warmup} step" in sentence
    assert f"ends after {steps} step" in sentence
    assert f"the learning rate gets to {highest}, never to 0.1 →" in sentence


@pytest.mark.parametrize("warmup", [0, 9, 0.5, 0.9])
def test_a_warm_up_that_the_run_outlasts_is_not_told(warmup: float) -> None:
    assert said(training=TEN_STEPS | {"warmup_steps": warmup}) == ()


def test_the_warm_up_is_looked_at_in_the_refinement_too() -> None:
    training = TEN_STEPS | {"warmup_steps": 5}
    assert said(training=training, method={"refine_epochs": 0.6}) == ()
    (sentence,) = said(training=training, method={"refine_epochs": 0.5})
    assert "when its refinement ends after 5 steps" in sentence


def test_the_rate_that_is_told_is_the_trainers_own() -> None:
    from torch import nn, optim
    from transformers import get_scheduler

    for steps, warmup in ((10, 10), (10, 9), (3, 40)):
        optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        rates = []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        sentences = said(training={"max_steps": steps, "warmup_steps": warmup, "learning_rate": 0.1})
        assert (max(rates) == 0.1) is (sentences == ())
        assert all(f"gets to {max(rates):g}," in sentence for sentence in sentences)


def test_a_schedule_without_warm_up_does_not_read_it() -> None:
    (sentence,) = said(training=TEN_STEPS | {"warmup_steps": 5, "lr_scheduler_type": "constant"})
    assert sentence.startswith("training.lr_scheduler_type constant has no warm-up")


def test_the_schedule_of_deepspeed_is_its_own() -> None:
    deepspeed = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}
    assert said(training=TEN_STEPS | {"warmup_steps": 50, "deepspeed": deepspeed}) == ()


def test_a_step_of_more_rows_than_there_are_is_told_with_what_becomes_of_the_epochs() -> None:
    (sentence,) = said(training={"per_device_train_batch_size": 512, "gradient_accumulation_steps": 4}, ranks=2)
    assert sentence.startswith(
        "one step takes 4,096 rows, more than the 100 training rows: training.num_train_epochs, 3, is 1 step →"
    )
    (sentence,) = said(training={"per_device_train_batch_size": 250, "max_steps": 10})
    assert "each row is in every step 2.5 times on average" in sentence
    assert said(training={"per_device_train_batch_size": 100}) == ()


def test_epochs_that_are_less_than_one_step_are_told() -> None:
    (sentence,) = said(training={"num_train_epochs": 0.01})
    assert sentence.startswith(
        "training.num_train_epochs, 0.01, of 100 training rows is less than one step of 16 rows: one step is trained"
    )
    assert said(training={"num_train_epochs": 0.16}) == ()


def test_of_steps_and_epochs_the_one_that_is_not_used_is_told() -> None:
    assert said(training={"max_steps": 50}) == ()
    (sentence,) = said(training={"max_steps": 50, "num_train_epochs": 5})
    assert sentence.startswith("training.num_train_epochs, 5, is not used, since training.max_steps says 50 →")
    (sentence,) = said(training={"max_steps": 0})  # three epochs of 100 rows, 16 in a step: 18.75
    assert sentence.startswith("training.max_steps: 0 counts as not given, and the task is trained for 19 steps →")


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ({"data": {"prompt_column": "q", "max_new_tokens": 9}}, "data.prompt_column, data.max_new_tokens"),
        ({"data": {"text_column": "q", "text_pair_column": "p", "label_column": "l"}}, ""),
        (CAUSAL | {"data": {"label_names": [], "text_column": "q", "max_length": 64}}, "data.text_column"),
        (CAUSAL | {"data": {"label_names": [], "max_new_tokens": 9}}, ""),
        (CAUSAL | {"metric": "rouge_l", "data": {"label_names": [], "max_new_tokens": 9}}, ""),
        (
            CAUSAL | {"data": {"label_names": [], "messages_column": "m", "prompt_column": "q"}},
            "data.prompt_column",
        ),
        ({"kind": "image_classification", "data": {"max_length": 64}}, "data.max_length"),
        (
            {"kind": "image_classification", "data": {"max_length": 128, "prompt_template": "{}"}},
            "data.prompt_template",
        ),
        ({"kind": "image_text", "data": {"max_length": 128, "prompt_template": "the {}"}}, ""),
    ],
)
def test_a_setting_of_another_kind_of_task_is_named(task: dict[str, Any], names: str) -> None:
    sentences = said(**task)
    assert [sentence.partition(" →")[0].rpartition(" not read: ")[0] for sentence in sentences] == (
        [f"{names} {'are' if ',' in names else 'is'}"] if names else []
    )


def test_an_import_that_says_how_to_train_is_told_that_nothing_is_trained() -> None:
    task = task_spec(
        method={"name": "import", "adapter": "/mine"},
        data={"train_file": None},
        training={"max_steps": 5, "warmup_steps": 9, "deepspeed": {"zero_optimization": {"stage": 3}}},
        lora={"r": 4},
    )
    assert tuple(doubtful_settings(task, 0, 1)) == (
        "an import trains nothing and does not read training.max_steps, training.warmup_steps, lora.r → take that out",
    )


@pytest.mark.parametrize(
    ("section", "setting", "wrong", "right", "sentence"),
    [
        ("training", "weight_decay", [1000, 1.01], [1, 0.1], "takes more away in each step than is learnt"),
        ("training", "learning_rate", [1e-30, 9e-8], [1e-7, 1e-3, 0.1], "nothing is learnt at training.learning_rate"),
        ("training", "learning_rate", [1, 0.11], [0.1], "what was learnt is lost again at training.learning_rate"),
        ("training", "max_steps", [100_000_000, 10_001], [10_000], "reads each of 100 rows"),  # of ten rows
        ("training", "max_grad_norm", [0], [1, 0.001], "0 means that no gradient is clipped, not that all are"),
        ("training", "max_grad_norm", [1e-30], [0.001], "leaves next to nothing of a gradient"),
        ("training", "label_smoothing_factor", [0.51, 0.99], [0.5, 0.1], "leaves the smaller part to learn from"),
        ("training", "warmup_steps", [1], [0, 0.1, 2], "1 is one step, not all of them"),
        ("training", "warmup_steps", [1.5], [2], "counts as 1 step: a share is below 1"),
        ("training", "save_steps", [10.5], [10, 1, 0.5], "counts as 10 steps: a share is below 1"),
        ("lora", "lora_dropout", [0.51, 0.99], [0.5, 0.1], "leaves the smaller part to learn from"),
        ("lora", "lora_alpha", [801, 0.07], [800, 0.08, 16], "the factor before the whole update"),  # r is 8
    ],
)
def test_a_number_that_trains_nothing_is_told_with_what_is_usual(
    section: str, setting: str, wrong: list[float], right: list[float], sentence: str
) -> None:
    def of(value: float) -> tuple[str, ...]:
        base = {"per_device_train_batch_size": 10, "num_train_epochs": 3} if section == "training" else {}
        return said(**{section: base | {setting: value}}, **({} if section == "training" else {"training": TEN_STEPS}))

    for value in wrong:
        (told,) = of(value)
        assert sentence in told
    for value in right:
        assert of(value) == ()


def test_the_scale_of_rslora_has_the_root_of_the_rank() -> None:
    # 300/√8 is 106, 300/8 is 38.
    assert "lora.lora_alpha/√r is 106" in said(training=TEN_STEPS, lora={"lora_alpha": 300, "use_rslora": True})[0]
    assert said(training=TEN_STEPS, lora={"lora_alpha": 300}) == ()


@pytest.mark.parametrize(
    ("count", "points"), [(1, "100 points"), (3, "33.3 points"), (19, "5.26 points"), (20, ""), (0, "")]
)
def test_a_score_of_a_few_rows_is_told_with_what_one_row_is(count: int, points: str) -> None:
    assert (f"each is {points}" in few_rows(count)) if points else few_rows(count) == ""
