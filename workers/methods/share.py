"""Method `share`: directions are frozen, and a task's coefficients in them are trained.

In the learned directions of a leased basis (the default) the coefficients are a matrix C: ΔW = P·C·Qᵀ, as B = P·C and
A = Qᵀ. With temporary columns beside the basis it is [P, P⁺]·C·[Q, Q⁺]ᵀ, and the columns are trained as well. The
result is an adapter like any other; columns are merged, not thrown away, and a basis that has moved on since the lease
does not matter. Coefficients alone are trained in the renewed basis where there is one (merging/renewal.py), and beside
columns in the first. A module that the basis does not have (the first tasks of a subspace, new target modules) is
trained as a plain LoRA.

Three tasks of eleven BANKING77 intents each, after six others had made the basis (one seed, 100 steps; on test rows):

                                                numbers per module    probability of the right label    accuracy
    LoRA r 8                                                 6,144                             0.872       0.942
    C in 32 learned directions                               1,024                             0.884       0.953
    E and F in 64 directions of the foundation, r 8          1,024                             0.763       0.902

Started at the mean of the six tasks instead of at zero, C reached 0.891 and 0.949. With rows of A half as long as
PEFT draws them it reached (from the mean) 0.875 and 0.946, with rows twice as long 0.884 and 0.944.

In the foundation's directions nothing else is needed, and the merge keeps the coefficients as they are. There B = P·E
and A = Fᵀ·Qᵀ, of the LoRA's rank.

Source: Share (arXiv:2602.06043), phase 2, with all K directions trainable from the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.basis import ModuleBasis, foundation_basis
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, lora
from workers.methods.factors import ADAPTER, SpannedFactor, lora_layers, reach, spanned
from workers.methods.start import ROW, coefficients, with_directions_of

TRAINS = True
COLUMNS_SHARE = 4
"""At most K/4 temporary columns: the range in which the paper found them useful."""


def needs_basis(spec: TaskSpec) -> bool:
    return spec.method.directions == "learned"


def stays_inside(spec: TaskSpec) -> bool:
    """Whether nothing is trained beside the basis: a renewed basis holds all of a task or nothing, and what has columns
    of its own is stored in the first."""
    return needs_basis(spec) and spec.method.temporary_columns == 0


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model with coefficients in the place of A and B. ΔW = 0 at the start, or what given.start says: of a
    revision, whose directions beside the basis are kept with it.

    Raises:
        InvalidInput: More temporary columns than a quarter of every module's basis; or a revision of a task that does
            not lie in the foundation, and is to be trained there. Or see `lora`.
    """
    model = lora.prepare(base, spec, replace(given, basis={}))
    served = given.start.modules if given.start is not None else {}
    if needs_basis(spec):
        put_into_basis(model, spec, given.basis, served)
    else:
        _put_into_foundation(model, base, spec, served)
    return model


def put_into_basis(
    model: Any,
    spec: TaskSpec,
    bases: Mapping[str, ModuleBasis],
    served: Mapping[str, ModuleUpdate] = MappingProxyType({}),
) -> None:
    """Replace A and B by coefficients in every layer of a PEFT model for which there is a basis.

    Args:
        served: Layer to the update that its coefficients start from; default: 0.
    """
    draw, layers = torch.Generator().manual_seed(spec.training.seed), lora_layers(model)
    found = {name: basis for name in layers if (basis := spanned(bases, name)) is not None}
    found |= {name: with_directions_of(found[name], update) for name, update in served.items() if name in found}
    _check_columns(spec.method.temporary_columns, found)
    for name, basis in found.items():
        layer = layers[name]
        count_out, count_in = _temporary_columns(spec, basis)
        out_NC, in_DC = _columns_beside(basis.p_NK, count_out, draw), _columns_beside(basis.q_DK, count_in, draw)
        j_out, j_in = basis.ranks[0] + count_out, basis.ranks[1] + count_in
        device = layer.lora_A[ADAPTER].weight.device
        c_JJ, one_JJ = torch.zeros(j_out, j_in), torch.eye(j_in) * (ROW / reach(len(in_DC), j_in))
        if name in served:
            scale = layer.scaling[ADAPTER] * ROW * reach(len(out_NC), j_out)
            c_JJ[: basis.ranks[0], : basis.ranks[1]] = coefficients(served[name], basis.p_NK, basis.q_DK) / scale
        layer.lora_B[ADAPTER] = SpannedFactor(basis.p_NK, out_NC, c_JJ, inward=False, device=device)
        layer.lora_A[ADAPTER] = SpannedFactor(basis.q_DK, in_DC, one_JJ, inward=True, device=device, frozen=True)


def _put_into_foundation(model: Any, base: BaseModel, spec: TaskSpec, served: Mapping[str, ModuleUpdate]) -> None:
    """Replace A and B by coefficients in the foundation. E = 0; F is drawn so that A is as large as PEFT's own start.
    Both zero would be a saddle without gradient. Where something is served, they start as its factors."""
    draw, shapes = torch.Generator().manual_seed(spec.training.seed), base.module_shapes(spec.kind)
    for name, layer in lora_layers(model).items():
        basis = foundation_basis(name, shapes[name], spec.method.foundation)
        if name in served:
            _refuse_elsewhere(name, served[name], spec)
            device = layer.lora_A[ADAPTER].weight.device
            b, a = layer.lora_B[ADAPTER].weight.detach().cpu(), layer.lora_A[ADAPTER].weight.detach().cpu()
            layer.lora_B[ADAPTER] = SpannedFactor.holding(b, basis.p_NK, inward=False, device=device)
            layer.lora_A[ADAPTER] = SpannedFactor.holding(a.T, basis.q_DK, inward=True, device=device)
            continue
        e_KR, f_KR = (torch.zeros(k, spec.lora.r) for k in basis.ranks)
        f_KR.uniform_(-1, 1, generator=draw).div_(len(basis.q_DK) ** 0.5)  # with the factor's reach: kaiming_uniform
        device, none = layer.lora_A[ADAPTER].weight.device, basis.q_DK.new_empty(0, 0)
        layer.lora_B[ADAPTER] = SpannedFactor(basis.p_NK, none, e_KR, inward=False, device=device)
        layer.lora_A[ADAPTER] = SpannedFactor(basis.q_DK, none, f_KR, inward=True, device=device)


def _refuse_elsewhere(name: str, update: ModuleUpdate, spec: TaskSpec) -> None:
    if update.foundation != spec.method.foundation:
        where = f"{update.foundation} directions of the foundation" if update.foundation else "the learned directions"
        raise InvalidInput(
            f"main serves the revision before this one in {where} of {name}, and method.foundation is "
            f"{spec.method.foundation}: it cannot be where training starts",
            "method.directions",
            "choose the same directions as before, method.name: lora, or start: base",
        )


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
