"""Ways in which one task's training starts from what the tasks before it have left, and what then serves them all.

Factors are taken up as they were trained (B and A, not the canonical form), so that training goes on where it was.

Axes: N outputs, D inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_streams import Case
from benchmarks.streams.workshop import Change, nothing
from subspace_store import ModuleUpdate, canonical_update
from workers.methods.factors import ADAPTER, lora_layers

ORTHOGONALITY = 0.5
"""Weight of O-LoRA's penalty: its authors' λ₁ (arXiv:2310.14152)."""

Modules = Mapping[str, ModuleUpdate]
Step = Callable[[Case, Modules, int], tuple[Case, Change]]
"""From a task, what those before it have left, and their number: the task as it is to be trained, and what is done to
its model before the first step."""
Serve = Callable[[Sequence[Modules]], Modules]
"""From what each task has left, in order, the update that serves all of them."""


def newest(updates: Sequence[Modules]) -> Modules:
    """What the last task has left."""
    return updates[-1]


def go_on(case: Case, before: Modules, count: int) -> tuple[Case, Change]:
    """The same two factors, trained on."""
    return case, _each(before, lambda layer, b_NR, a_RD: _put(layer, b_NR, a_RD)) if before else nothing


def beside(case: Case, before: Modules, count: int) -> tuple[Case, Change]:
    """O-LoRA: the earlier ranks stay as they are, and as many new ones are trained beside them. Of the penalty
    λ·Σ|A_new·A_oldᵀ| the gradient is added to that of the loss.

    Source: Wang et al., Orthogonal subspace learning for language model continual learning (EMNLP 2023).
    """
    if not before:
        return case, nothing
    lora = case.spec.lora
    grown = lora.model_copy(update={"r": lora.r * (count + 1), "lora_alpha": lora.lora_alpha * (count + 1)})

    def freeze(layer: Any, b_NR: Tensor, a_RD: Tensor) -> None:
        old = len(a_RD)
        b, a = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
        with torch.no_grad():
            b[:, :old] = b_NR / layer.scaling[ADAPTER]
            a[:old] = a_RD
        fixed_RD = a[:old].detach().clone()

        def of_a(gradient_RD: Tensor) -> Tensor:
            push_RD = ORTHOGONALITY * (a[old:].detach() @ fixed_RD.T).sign() @ fixed_RD
            return torch.cat([torch.zeros_like(fixed_RD), gradient_RD[old:] + push_RD])

        def of_b(gradient_NR: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(gradient_NR[:, :old]), gradient_NR[:, old:]], dim=1)

        a.register_hook(of_a)
        b.register_hook(of_b)

    return replace(case, spec=case.spec.model_copy(update={"lora": grown})), _each(before, freeze)


def from_orthogonal(case: Case, before: Modules, count: int) -> tuple[Case, Change]:
    """SLAO: A starts at the orthonormal rows of the A before it, B where it was. What its authors start B at is not
    known to us.

    Source: arXiv:2512.23017.
    """

    def put(layer: Any, b_NR: Tensor, a_RD: Tensor) -> None:
        q_DR, r_RR = torch.linalg.qr(a_RD.T)
        _put(layer, b_NR, (q_DR * r_RR.diagonal().sign()).T)

    return case, _each(before, put) if before else nothing


def averaged(updates: Sequence[Modules]) -> Modules:
    """SLAO: the newest A, and B_merged ← B_merged + (B − B_merged)/√i for the i-th task."""
    found = {}
    for name in updates[-1]:
        b_NR, a_RD = updates[0][name].raw()
        for place, modules in enumerate(updates[1:], start=2):
            newest_NR, a_RD = modules[name].raw()
            b_NR = b_NR + (newest_NR - b_NR) / math.sqrt(place)
        found[name] = canonical_update(b_NR.float(), a_RD.float(), 1.0)
    return found


def _each(before: Modules, change: Callable[[Any, Tensor, Tensor], None]) -> Change:
    """Change every adapted layer of a model, given what was there: scale·B and A."""

    def changed(model: Any) -> None:
        for name, layer in lora_layers(model).items():
            left_NR, a_RD = before[name].raw()
            change(layer, left_NR.float(), a_RD.float())

    return changed


def _put(layer: Any, left_NR: Tensor, a_RD: Tensor) -> None:
    with torch.no_grad():
        layer.lora_B[ADAPTER].weight.copy_(left_NR / layer.scaling[ADAPTER])
        layer.lora_A[ADAPTER].weight.copy_(a_RD)
