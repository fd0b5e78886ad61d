"""Settings that are allowed and can hardly be meant, in sentences for the owner of the task. Pure.

A setting that says what its default says is never named: a file may be written out in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from configs.document import Section
from configs.task_spec import DataSpec, LoraSpec, TaskSpec, TrainingSpec
from workers.metrics import GENERATED
from workers.rows.task_data import columns_of


def doubtful_settings(spec: TaskSpec, row_count: int, ranks: int) -> Iterator[str]:
    """Sentences on what is set and not read, and on what makes a training other than its settings say.

    Args:
        row_count: Number of training rows; 0 for an import.
        ranks: Number of processes that train one task together (`workers.ranks`).
    """
    if names := ", ".join(f"method.{name}" for name in spec.method.without_effect):
        yield (
            f"the method {spec.method.name} does not read {names} → take that out, or name the method that it is for"
        )
    if unread := _changed("data", spec.data, _unread_of_data(spec)):
        rows = ", the rows are chats" if spec.data.messages_column and spec.kind == "causal_lm" else ""
        are = "is" if len(unread) == 1 else "are"
        yield (
            f"{', '.join(unread)} {are} not read: the kind is {spec.kind}, the metric {spec.metric}{rows} → take that "
            "out"
        )
    if spec.method.name == "import":
        # Only how the base model is held while the adapter is scored is read.
        training = _changed("training", spec.training, TrainingSpec.model_fields.keys() - {"deepspeed"})
        if names := ", ".join((*training, *_changed("lora", spec.lora, LoraSpec.model_fields))):
            yield f"an import trains nothing and does not read {names} → take that out"
        return
    yield from _of_length(spec.training, row_count, ranks)
    yield from _of_warmup(spec, row_count, ranks)


def _unread_of_data(spec: TaskSpec) -> set[str]:
    """Keys of `data` that a task of this kind does not read."""
    unread = {key for key in DataSpec.model_fields if key.endswith("_column")} - columns_of(spec).keys()
    if spec.metric not in GENERATED:
        unread.add("max_new_tokens")
    if spec.kind == "image_classification":
        unread.add("max_length")
    return unread


def _changed(name: str, section: Section, keys: Iterable[str]) -> tuple[str, ...]:
    """Those of the keys whose value is not the default, in the order of the section, with the section's name."""
    default, named = {key: field.get_default() for key, field in type(section).model_fields.items()}, set(keys)
    return tuple(f"{name}.{key}" for key in default if key in named and getattr(section, key) != default[key])


def _of_length(training: TrainingSpec, row_count: int, ranks: int) -> Iterator[str]:
    epochs, steps, per_step = training.num_train_epochs, training.steps(row_count, ranks), training.rows_per_step(ranks)
    by_epochs = training.max_steps <= 0
    if not by_epochs and _changed("training", training, ("num_train_epochs",)):
        yield (
            f"training.num_train_epochs, {epochs:g}, is not used, since training.max_steps says {steps:,} → take one "
            "of the two out"
        )
    if training.max_steps == 0:
        yield (
            f"training.max_steps: 0 counts as not given, and the task is trained for {_count(steps, 'step')} → leave "
            "it out, or write the number of steps"
        )
    if per_step > row_count:
        what = (
            f"training.num_train_epochs, {epochs:g}, is {_count(steps, 'step')}"
            if by_epochs
            else f"each row is in every step {per_step / row_count:.1f} times on average"
        )
        yield (
            f"one step takes {per_step:,} rows, more than the {row_count:,} training rows: {what} → lower "
            "training.per_device_train_batch_size or gradient_accumulation_steps"
        )
    elif by_epochs and epochs * row_count < per_step:
        yield (
            f"training.num_train_epochs, {epochs:g}, of {row_count:,} training rows is less than one step of "
            f"{per_step:,} rows: one step is trained → raise it, or give training.max_steps"
        )


def _of_warmup(spec: TaskSpec, row_count: int, ranks: int) -> Iterator[str]:
    training = spec.training
    if not training.warmup_steps or "scheduler" in (training.deepspeed or {}):
        return
    if training.lr_scheduler_type == "constant":
        yield (
            "training.lr_scheduler_type constant has no warm-up: training.warmup_steps is not used → write "
            "constant_with_warmup, or take it out"
        )
        return
    refining = training.model_copy(update={"max_steps": -1, "num_train_epochs": spec.method.refine_epochs})
    runs = {"the training": training} | ({"its refinement": refining} if spec.method.refine_epochs else {})
    for run, of in runs.items():
        steps = of.steps(row_count, ranks)
        share = training.warmup_steps < 1
        warmup = math.ceil(steps * training.warmup_steps) if share else int(training.warmup_steps)
        if warmup >= steps:  # the first step has the rate 0, and only the one after the warm-up the whole rate
            most = training.learning_rate * (steps - 1) / warmup
            todo = "write fewer, or a share of all steps, below 1" if not share else "train for more steps, or write 0"
            yield (
                f"the warm-up of {_count(warmup, 'step')} (training.warmup_steps) is not over when {run} ends after "
                f"{_count(steps, 'step')}: the learning rate gets to {most:g}, never to {training.learning_rate:g} → "
                f"{todo}"
            )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
