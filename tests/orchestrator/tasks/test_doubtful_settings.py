"""What is set and has no effect, or another one than it says, is told to the task's owner."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.tasks.doubtful_settings import doubtful_settings
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
        ({"warmup_steps": 10}, 10, 10, "0.9"),  # the tenth step, of index 9, has 9/10 of the rate
        ({"warmup_steps": 40}, 10, 40, "0.225"),
        ({"warmup_steps": 40, "max_steps": 40, "num_train_epochs": 3}, 40, 40, "0.975"),
        ({"warmup_steps": 0.95}, 10, 10, "0.9"),  # a share is rounded up
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
    (sentence,) = said(training=TEN_STEPS | {"learning_rate": 1.0, "lr_scheduler_type": kind} | training, row_count=100)
    assert f"the warm-up of {warmup} step" in sentence
    assert f"ends after {steps} step" in sentence
    assert f"the learning rate gets to {highest}, never to 1 →" in sentence


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
        optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        rates = []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        sentences = said(training={"max_steps": steps, "warmup_steps": warmup, "learning_rate": 1.0})
        assert (max(rates) == 1.0) is (sentences == ())
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
        (CAUSAL | {"data": {"label_names": [], "max_new_tokens": 9}}, "data.max_new_tokens"),
        (CAUSAL | {"metric": "rouge_l", "data": {"label_names": [], "max_new_tokens": 9}}, ""),
        (
            CAUSAL | {"data": {"label_names": [], "messages_column": "m", "prompt_column": "q"}},
            "data.prompt_column",
        ),
        ({"kind": "image_classification", "data": {"max_length": 64}}, "data.max_length"),
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
