"""Method `auto`: `share` where it learns the task in the leased basis as fast as a LoRA does, else `lora`.

Both are trained for a few steps on the same rows in the same order, and thrown away. Every step meets rows that neither
has seen, so its loss, taken before the step, is one on unseen rows. No row of the evaluation is looked at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from workers.base_model import BaseModel
from workers.batches import schedule
from workers.deepspeed_engine import is_parted, release
from workers.methods import NOTHING, Given, Method, lora, share
from workers.methods.factors import spanned
from workers.orders import Point, Progress
from workers.rows.task_data import Row
from workers.trainer import OutOfMemory, Surroundings, fit

TRIAL_STEPS = 24
"""Steps of each trial. With 16 the tasks below lie closer together, and 32 and 48 tell no more of them apart."""
STEPS_MIN = 8
BEHIND_MAX = 0.1
"""Largest part of what was learnt that `share` may lack, a standard error included.

Tasks of examples/ on MiniLM after one to four merges (bases of 4 to 19 of 384 directions), one or two seeds, φ by
default and 0. First numbers: what share learnt in 24 steps as a part of all that was learnt, less the standard error.
Last ones: its accuracy after the whole run, less LoRA's, in points (on 200 to 250 rows: 3 are chance).

    top-ups after two topics of its data set      0.92 to 0.99    0 to +5; one of six runs 0.80, −5
    top-ups after the other half of its rows      1.06 to 1.23    −2 to +4, with the merged one's A or another
    contradiction after QNLI and MNLI             1.37, 1.61      +2; but its 20 steps may be chance
    charges after two topics of its data set      0.73, 0.81      −8, −4
    top-ups and charges after QNLI and MNLI       0.50 to 0.83    −14 to 0
    relevance after either                        −0.11 to 0.46   −18 to −4; one of eight runs 0.13, 0

So tasks that get `share` lose nothing, and a few that would not have lost get `lora`, which is never wrong. Tried
before, without success: how much the basis spans of a short LoRA run's energy, or of a sketch of the gradients."""


def choose(base: BaseModel, spec: TaskSpec, given: Given, rows: Sequence[Row], around: Surroundings) -> tuple[str, str]:
    """The method to train with, and why, in a line. The same answer every time, and on every rank.

    Args:
        given: With the leased basis.
        around: The ranks, all of which must call this, and what the control plane asks of them.

    Raises:
        InvalidInput: A target module that the base model does not have.
        OutOfMemory: Only in a gang, whose other ranks wait for this one. A process by itself takes `lora`.
        Cancelled, Preempted: Between two steps.

    Cost:
        Twice `TRIAL_STEPS` steps, but half of the task's own at most.
    """
    missing = [name for name in lora.target_modules(base, spec.lora, spec.kind) if spanned(given.basis, name) is None]
    if missing:
        return "lora", f"auto: lora, because the basis lacks {len(missing)} of the modules"
    if is_parted(spec):
        return "lora", "auto: lora, because with ZeRO stage 3 the task is not tried out first"
    steps = min(TRIAL_STEPS, schedule(spec.training, len(rows), around.group.rank).steps // 4)
    if steps < STEPS_MIN:
        return "lora", "auto: lora, because the task has too few steps to be tried out first"
    try:
        with_lora, with_share = (_losses(method, steps, base, spec, given, rows, around) for method in (lora, share))
    except InvalidInput as error:
        if isinstance(error, OutOfMemory) and around.group.rank.size > 1:
            raise
        return "lora", f"auto: lora, because trying the task out failed: {error}"
    return verdict(with_lora, with_share)


def verdict(with_lora: Sequence[float], with_share: Sequence[float]) -> tuple[str, str]:
    """`share` if it ends behind LoRA by no more than BEHIND_MAX of what was learnt; `lora` if nothing was.

    What was learnt is how far the better of the two lowered the loss, from the first quarter of the steps to the last.

    Args:
        with_lora, with_share: The loss of each step, of at least `STEPS_MIN` steps on the same rows.
    """
    quarter = len(with_lora) // 4
    learnt, noise = max(_fall(losses, quarter) for losses in (with_lora, with_share))
    pairs = zip(with_share[-quarter:], with_lora[-quarter:], strict=True)
    gap, error = _mean([inside - free for inside, free in pairs])
    steps, end = len(with_lora), statistics.fmean(with_lora[-quarter:])
    if learnt < 2 * noise:
        said = f"{steps} steps taught neither more than chance: loss {end:.3g} ± {noise:.1g}"
        return "lora", f"auto: lora, because {said}"
    name = "share" if gap + error <= BEHIND_MAX * learnt else "lora"
    return name, (
        f"auto: {name}, because after {steps} steps share's loss was {abs(gap):.2g} ± {error:.1g} "
        f"{'above' if gap > 0 else 'below'} lora's of {end:.3g}; up to {BEHIND_MAX * learnt:.2g} above means share"
    )


def _fall(losses: Sequence[float], quarter: int) -> tuple[float, float]:
    (start, start_error), (end, end_error) = _mean(losses[:quarter]), _mean(losses[-quarter:])
    return start - end, math.hypot(start_error, end_error)


def _mean(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean with its standard error."""
    return statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def _losses(
    method: Method,
    steps: int,
    base: BaseModel,
    spec: TaskSpec,
    given: Given,
    rows: Sequence[Row],
    around: Surroundings,
) -> list[float]:
    """The loss of each of the task's first steps, at its own learning rate without decay."""
    losses: list[float] = []

    def hear(progress: Progress) -> None:
        losses.extend(line.loss for line in progress.log_lines if isinstance(line, Point))

    training = spec.training
    whole, warmup = schedule(training, len(rows), around.group.rank).steps, training.warmup_steps
    first = {
        "max_steps": steps,
        "warmup_steps": float(warmup if warmup >= 1 else math.ceil(warmup * whole)),
        "lr_scheduler_type": "constant_with_warmup",
    }
    short = spec.model_copy(update={"training": training.model_copy(update=first)})
    model = method.prepare(base, short, given if method.needs_basis(spec) else NOTHING)
    run = fit(model, base, rows, short, replace(around, report=hear))
    if run.engine is not None:
        release(run.engine)
    return losses
