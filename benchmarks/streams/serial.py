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
from subspace_store import Adapter, ModuleUpdate, canonical_update
from workers.base_model import BaseModel
from workers.features import collator
from workers.methods import lora
from workers.methods.factors import ADAPTER, lora_layers

ORTHOGONALITY = 0.5
"""Weight of O-LoRA's penalty: its authors' λ₁ (arXiv:2310.14152)."""

FISHER_ROWS = 64
STRENGTHS = (1.0, 100.0, 10_000.0)
"""Of EWC's penalty: the one is taken that scores best on validation rows, at the rate of sequential training."""

Modules = Mapping[str, ModuleUpdate]
Step = Callable[[Case, Adapter | None, int], tuple[Case, Change]]
"""From a task, what the one before it has left, and the number of those before: the task as it is to be trained, and
what is done to its model before the first step."""
Serve = Callable[[Sequence[Modules]], Modules]
"""From what each task has left, in order, the update that serves all of them."""


def newest(updates: Sequence[Modules]) -> Modules:
    """What the last task has left."""
    return updates[-1]


def go_on(case: Case, before: Adapter | None, count: int) -> tuple[Case, Change]:
    """The same two factors, trained on."""
    return case, _each(before.modules, lambda layer, b_NR, a_RD: _put(layer, b_NR, a_RD)) if before else nothing


def beside(case: Case, before: Adapter | None, count: int) -> tuple[Case, Change]:
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

    return replace(case, spec=case.spec.model_copy(update={"lora": grown})), _each(before.modules, freeze)


def from_orthogonal(case: Case, before: Adapter | None, count: int) -> tuple[Case, Change]:
    """SLAO: A starts at the orthonormal rows of the A before it, B where it was. What its authors start B at is not
    known to us.

    Source: arXiv:2512.23017.
    """

    def put(layer: Any, b_NR: Tensor, a_RD: Tensor) -> None:
        q_DR, r_RR = torch.linalg.qr(a_RD.T)
        _put(layer, b_NR, (q_DR * r_RR.diagonal().sign()).T)

    return case, _each(before.modules, put) if before else nothing


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


class Consolidating:
    """Elastic weight consolidation, online: going on costs strength/2·Σ F·(θ − θ*)², θ* being the factors that the task
    before has left, and F the sum of all earlier tasks' Fisher diagonals. Its gradient is added to that of the loss.

    Source: Kirkpatrick et al. (PNAS 2017); one penalty for all earlier tasks: Schwarz et al. (ICML 2018).
    """

    def __init__(self, base: BaseModel, strength: float) -> None:
        self._base, self._strength = base, strength
        self._last: Case | None = None
        self._new: list[tuple[Case, Adapter]] = []
        """Tasks whose Fisher diagonal is not in the sum yet: it is only needed where something is trained."""
        self._fisher: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, case: Case, before: Adapter | None, count: int) -> tuple[Case, Change]:
        last, self._last = self._last, case
        if before is None or last is None:
            return case, nothing
        self._new.append((last, before))

        def change(model: Any) -> None:
            self._add_up()
            go_on(case, before, count)[1](model)
            for name, layer in lora_layers(model).items():
                for side, weight in zip((layer.lora_B, layer.lora_A), self._fisher[name], strict=True):
                    hold(side[ADAPTER].weight, self._strength * weight)

        return case, change

    def _add_up(self) -> None:
        while self._new:
            for name, (of_b, of_a) in fisher(self._base, *self._new.pop(0)).items():
                known_b, known_a = self._fisher.get(name, (torch.zeros_like(of_b), torch.zeros_like(of_a)))
                self._fisher[name] = known_b + of_b, known_a + of_a


def hold(parameter: Tensor, weight: Tensor) -> None:
    """Add weight·(θ − θ*) to the gradient of a parameter, θ* being what it is now."""
    start = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient + weight * (parameter.detach() - start))


def fisher(base: BaseModel, case: Case, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to the Fisher diagonal of B and of A: the mean of the squared gradient of a row's loss, over some of the
    task's training rows with their own labels."""
    model = lora.model_with_lora(base, case.spec, tuple(adapter.modules), adapter)
    go_on(case, adapter, 1)[1](model)
    model.eval()
    layers, collate = lora_layers(model), collator(base, case.spec)
    sums = {
        name: [torch.zeros_like(side[ADAPTER].weight) for side in (layer.lora_B, layer.lora_A)]
        for name, layer in layers.items()
    }
    rows = case.train[:FISHER_ROWS]
    for row in rows:
        model.zero_grad()
        model(**collate([row])).loss.backward()
        for name, layer in layers.items():
            for total, side in zip(sums[name], (layer.lora_B, layer.lora_A), strict=True):
                total += side[ADAPTER].weight.grad.square() / len(rows)
    return {name: (of_b, of_a) for name, (of_b, of_a) in sums.items()}


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
