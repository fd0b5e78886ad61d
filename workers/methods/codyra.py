"""Method `codyra`: ΔW = B·diag(w)·A, and gates w that shrink to zero drop their rank.

Once the dense phase is over, every optimiser step is followed by w ← 1(|w| > κ)·(w − sign(w)·κ), the proximal step of
an L1 penalty. κ rises from 0 to kappa_max. A gate at zero may come back; what is zero at the end is dropped, so the
adapter's rank differs per module.

A gate that no gradient moves loses the sum of all κ: 0.65 in the published 500 steps, less in fewer. What that does to
r 16 on MiniLM, tasks of examples/ with 150 and 60 steps, one seed each (3 points of accuracy are chance):

    κ max                      gates start at    mean rank      accuracy of top-ups and relevance
    0 (never thresholded)      1                 16, 16         76.3, 93.0
    0.005                      1                 16, 16         77.3, 93.5
    0.005                      N(0, 1)           12.2, 14.7     81.2, 94.0
    2.5 / steps, which is Σ κ  1                 14.3, 16       75.8, 91.5
    of 0.65 again              N(0, 1)           6.8, 8.7       78.7, 91.5
    5 / steps                  1                 0              refused: all closed

So κ is not scaled by itself: with gates that start at 1 it would cost a little and drop next to nothing. To get half of
the ranks, as published (8.3 of 16), set kappa_max to 2.5 / steps and gate_start to normal.

Source: CoDyRA (arXiv:2412.01004), its schedule of 500 steps stretched to the task's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from configs.errors import InvalidInput
from configs.task_spec import MethodSpec, TaskSpec
from subspace_store.adapter import Adapter
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, lora
from workers.methods.factors import ADAPTER, GatedFactor, lora_layers
from workers.methods.start import kept_ranks

TRAINS = True
KAPPA_GRID = 50
"""Number of values that κ takes, the first of them 0: the published ramp."""


def needs_basis(spec: TaskSpec) -> bool:
    return False


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model with a gate for each rank. ΔW = 0 at the start, because B = 0.

    A revision starts from the ranks that given.start has left, their gates at 1, and from fresh ones up to lora.r."""
    model = lora.prepare(base, spec, given)
    draw = torch.Generator().manual_seed(spec.training.seed)
    for name, layer in lora_layers(model).items():
        gates_R = torch.ones(layer.r[ADAPTER])
        if spec.method.gate_start == "normal":
            gates_R.normal_(generator=draw)
        gates_R[: kept_ranks(given.start, name)] = 1.0
        layer.lora_A[ADAPTER] = GatedFactor(layer.lora_A[ADAPTER].weight.detach(), gates_R)
    return model


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    if kappa := threshold(spec.method, step, steps):
        _rewrite(_gates(prepared), lambda gates_R: softshrink(gates_R, kappa))


def threshold(method: MethodSpec, step: int, steps: int) -> float:
    """κ after step `step` of `steps`: 0 in the dense phase, then the grid's values one by one up to kappa_max."""
    dense = int(method.dense_fraction * steps)
    if step <= dense:
        return 0.0
    index = min(math.ceil(KAPPA_GRID * (step - dense) / (steps - dense)), KAPPA_GRID - 1)
    return method.kappa_max * index / (KAPPA_GRID - 1)


def finish(prepared: Any, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """The adapter without the ranks whose gate is zero, and without modules that have none left.

    Raises:
        InvalidInput: Every gate is zero.
    """
    with lora.whole(prepared):
        nothing_left = not any(gates_R.any() for gates_R in _gates(prepared))
    if nothing_left:
        raise InvalidInput(
            f"the threshold closed all {spec.lora.r} gates of every module, so nothing was learnt",
            "method.kappa_max",
            f"lower it (it is {spec.method.kappa_max:g}), or raise method.dense_fraction or training.learning_rate",
        )
    return lora.finish(prepared, base, spec, given)


def _gates(model: Any) -> list[nn.Parameter]:
    return [layer.lora_A[ADAPTER].gates_R for layer in lora_layers(model).values()]


def _rewrite(parameters: list[nn.Parameter], change: Callable[[Tensor], Tensor]) -> None:
    """Change parameters between two steps; under DeepSpeed, its own copies of them too."""
    if any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in parameters):
        from workers.deepspeed_engine import rewrite

        rewrite(parameters, change)
        return
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(change(parameter))
