"""Method `share`: directions are frozen, and a task's coefficients in them are trained: B = P·E and A = Fᵀ·Qᵀ.

In the foundation's directions (the default) nothing else is needed, and the merge keeps the coefficients as they are.

In the learned ones of a leased basis a few temporary columns beside it are trained as well: B = [P, P⁺]·E. Afterwards
they are an adapter like any other; the columns are merged, not thrown away, and a basis that has moved on since the
lease does not matter. A module that the basis does not have (the first tasks of a subspace, new target modules) is
trained as a plain LoRA.

Source: Share (arXiv:2602.06043), phase 2, with all K directions trainable from the start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.merging.basis import ModuleBasis, foundation_basis
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, lora
from workers.methods.factors import ADAPTER, SpannedFactor, lora_layers, spanned

TRAINS = True
COLUMNS_SHARE = 4
"""At most K/4 temporary columns: the range in which the paper found them useful."""


def needs_basis(spec: TaskSpec) -> bool:
    return spec.method.directions == "learned"


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model with coefficients in the place of A and B: ΔW = 0 at the start, because E = 0.

    F is drawn so that A is as large as PEFT's own start. Both zero would be a saddle without gradient.

    Raises:
        InvalidInput: More temporary columns than a quarter of every module's basis. Or see `lora`.
    """
    model = lora.prepare(base, spec)
    put_into_span(model, spec, given.basis if needs_basis(spec) else _foundations(base, spec, lora_layers(model)))
    return model


def put_into_span(model: Any, spec: TaskSpec, bases: Mapping[str, ModuleBasis]) -> None:
    """Replace A and B by coefficients in every layer of a PEFT model for which there is a basis."""
    draw, layers = torch.Generator().manual_seed(spec.training.seed), lora_layers(model)
    found = {name: basis for name in layers if (basis := spanned(bases, name)) is not None}
    if needs_basis(spec):
        _check_columns(spec.method.temporary_columns, found)
    for name, basis in found.items():
        layer = layers[name]
        count_out, count_in = _temporary_columns(spec, basis) if needs_basis(spec) else (0, 0)
        out_NC = _columns_beside(basis.p_NK, count_out, draw)
        in_DC = _columns_beside(basis.q_DK, count_in, draw)
        e_JR = torch.zeros(basis.ranks[0] + count_out, spec.lora.r)
        f_JR = torch.empty(basis.ranks[1] + count_in, spec.lora.r)
        f_JR.uniform_(-1, 1, generator=draw).div_(len(in_DC) ** 0.5)  # with the factor's reach: kaiming_uniform of A
        device = layer.lora_A[ADAPTER].weight.device
        layer.lora_B[ADAPTER] = SpannedFactor(basis.p_NK, out_NC, e_JR, inward=False, device=device)
        layer.lora_A[ADAPTER] = SpannedFactor(basis.q_DK, in_DC, f_JR, inward=True, device=device)


def finish(prepared: Any, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """[P, P⁺]·E·Fᵀ·[Q, Q⁺]ᵀ. Updates in the foundation say so; of learned directions `info` names the modules that were
    trained as plain LoRA."""
    if needs_basis(spec):
        plain = [name for name in lora_layers(prepared) if spanned(given.basis, name) is None]
        return lora.finish(prepared, base, spec, given, {"plain_modules": json.dumps(plain)})
    adapter = lora.finish(prepared, base, spec, given)
    directions = spec.method.foundation
    modules = {name: replace(u.leading(directions), foundation=directions) for name, u in adapter.modules.items()}
    return replace(adapter, modules=modules)


def _foundations(base: BaseModel, spec: TaskSpec, names: Iterable[str]) -> dict[str, ModuleBasis]:
    shapes = base.module_shapes(spec.kind)
    return {name: foundation_basis(name, shapes[name], spec.method.foundation) for name in names}


def _check_columns(asked: int | None, bases: Mapping[str, ModuleBasis]) -> None:
    """Refuse a number that no module has room for. The merges decide how large each basis is; no team can know."""
    most = max((k // COLUMNS_SHARE for basis in bases.values() for k in basis.ranks), default=asked)
    if asked is not None and most is not None and asked > most:
        raise InvalidInput(
            f"{asked} temporary columns are more than a quarter of every module's basis: at most {most} have room",
            "method.temporary_columns",
            f"set {most} or less, or leave it out for a quarter of each module's basis",
        )


def _temporary_columns(spec: TaskSpec, basis: ModuleBasis) -> tuple[int, int]:
    """φ of both sides: as many as asked for, a quarter of the basis at most, and no more than there is room for."""
    asked = spec.method.temporary_columns
    wanted = spec.lora.r if asked is None else asked
    sides = zip(basis.shape, basis.ranks, strict=True)
    count_out, count_in = (min(wanted, k // COLUMNS_SHARE, size - k) for size, k in sides)
    return count_out, count_in


def _columns_beside(basis_NK: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Random orthonormal columns, orthogonal to the basis."""
    columns_NC = torch.randn(len(basis_NK), count, generator=draw, dtype=torch.float64)
    for _ in range(2):  # twice: the first projection is of a basis rounded to float32
        columns_NC, _ = torch.linalg.qr(columns_NC - basis_NK.double() @ (basis_NK.double().T @ columns_NC))
    return columns_NC.float()
