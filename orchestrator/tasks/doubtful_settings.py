"""Settings that are allowed and can hardly be meant, in sentences for the owner of the task. Pure.

A setting that says what its default says is never named: a file may be written out in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from configs.document import Section
from configs.task_spec import IMAGE_KINDS, DataSpec, LoraSpec, TaskSpec, TrainingSpec
from workers.rows.task_data import columns_of

LEARNING_RATES = (1e-7, 0.1)
WEIGHT_DECAY_MAX = 1.0
CLIPPED_MIN = 1e-3
"""Gradient norm to which nobody clips: Adam's own ε, 1e-8 for each number, would be what is left."""
SHARE_MAX = 0.5
"""Of dropout and of label smoothing."""
SCALES = (0.01, 100.0)
"""Of lora_alpha/r, or of lora_alpha/√r."""
PASSES_MAX = 1000.0
"""Times that a training reads each row: as many as num_train_epochs may be."""
STEPS_MAX = 10_000_000
EVALUATION_ROWS_FEW = 20
# Limits that no training crosses which anybody has published, by a factor of ten or more; not those of a good training.


def doubtful_settings(spec: TaskSpec, row_count: int, ranks: int) -> Iterator[str]:
    """Sentences on what is set and not read, and on what makes a training other than its settings say.

    Args:
        row_count: Number of training rows; 0 for an import.
        ranks: Number of processes that train one task together (`ranks` of its pool).
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
    yield from _of_size(spec)
    yield from _of_length(spec.training, row_count, ranks)
    yield from _of_warmup(spec, row_count, ranks)


def _unread_of_data(spec: TaskSpec) -> set[str]:
    """Keys of `data` that a task of this kind does not read."""
    unread = {key for key in DataSpec.model_fields if key.endswith("_column")} - columns_of(spec).keys()
    if spec.kind != "causal_lm":  # else it says how long an answer may be, whatever the score is
        unread.add("max_new_tokens")
    if spec.kind in IMAGE_KINDS:
        unread.add("max_length")
    if spec.kind != "image_regression":
        unread.add("pck_distance")
    if spec.kind != "image_text":
        unread.add("prompt_template")
    return unread


def _changed(name: str, section: Section, keys: Iterable[str]) -> tuple[str, ...]:
    """Those of the keys whose value is not the default, in the order of the section, with the section's name."""
    default, named = {key: field.get_default() for key, field in type(section).model_fields.items()}, set(keys)
    return tuple(f"{name}.{key}" for key in default if key in named and getattr(section, key) != default[key])


def few_rows(count: int) -> str:
    """A sentence if a score rests on so few evaluation rows that it can hardly be one; else empty."""
    if not 0 < count < EVALUATION_ROWS_FEW:
        return ""
    rows = "one evaluation row" if count == 1 else f"{count} evaluation rows"
    return (
        f"the score rests on {rows}: each is {100 / count:.3g} points of 100, so that chance decides between good and "
        "bad → give a hundred or more"
    )


def _of_size(spec: TaskSpec) -> Iterator[str]:
    """Sentences on numbers that are far from any that trains something."""
    training, lora = spec.training, spec.lora
    rate, (least, most) = training.learning_rate, LEARNING_RATES
    if not least <= rate <= most:
        what = "nothing is learnt at" if rate < least else "what was learnt is lost again at"
        yield f"{what} training.learning_rate {rate:g} → usual for a LoRA is 0.0001 to 0.005"
    if training.weight_decay > WEIGHT_DECAY_MAX:
        yield (
            f"training.weight_decay {training.weight_decay:g} takes more away in each step than is learnt in it → "
            "usual is 0 to 0.1"
        )
    if training.max_grad_norm == 0:
        yield "training.max_grad_norm: 0 means that no gradient is clipped, not that all are → usual is 1"
    elif training.max_grad_norm < CLIPPED_MIN:
        yield f"training.max_grad_norm {training.max_grad_norm:g} leaves next to nothing of a gradient → usual is 1"
    shares = {
        "training.label_smoothing_factor": training.label_smoothing_factor,
        "lora.lora_dropout": lora.lora_dropout,
    }
    for name, share in shares.items():
        if share > SHARE_MAX:
            yield f"{name} {share:g} leaves the smaller part to learn from → usual is 0 to 0.1"
    scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    if not SCALES[0] <= scale <= SCALES[1]:
        root = "√" if lora.use_rslora else ""
        yield f"lora.lora_alpha/{root}r is {scale:g}, the factor before the whole update → usual is 1 or 2"
    for name, steps in (("warmup_steps", training.warmup_steps), ("save_steps", training.save_steps)):
        if steps == 1 and name == "warmup_steps":
            yield (
                "training.warmup_steps: 1 is one step, not all of them; below 1 it would be a share of all steps → "
                "write 0 or more steps, if that is not meant"
            )
        elif steps > 1 and steps != int(steps):
            yield f"training.{name}, {steps:g}, counts as {_count(int(steps), 'step')}: a share is below 1"


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
    passes = steps * per_step / max(1, row_count)
    if not by_epochs and (passes > PASSES_MAX or steps > STEPS_MAX):
        yield (
            f"training.max_steps, {steps:,}, reads each of {row_count:,} rows {passes:,.0f} times → usual is 1 to 20 "
            "times"
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
