"""Where a revision is trained from: what `main` serves of the revision before it, put into the model of its own task.

Nothing of it is lost on the way: a layer whose update has a higher rank than the task asks for is given that rank, and
the head keeps the place of each label that it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.basis import ModuleBasis
from workers.base_model import BaseModel
from workers.evaluation import spec_of
from workers.methods.factors import ADAPTER, lora_layers

ROUNDING = 1e-5
"""Share of an update's norm below which a direction of it is float32 rounding."""
ROW = 3**-0.5
"""Length of a row of A as PEFT draws it (kaiming_uniform with a = √5). Rows, and directions of a basis, of this length
make one learning rate move ΔW as far under every method."""


def with_head_of(base: BaseModel, served: Adapter, spec: TaskSpec) -> Adapter:
    """The served revision with a head for the labels of a task: the rows of new labels are drawn from the task's seed.

    Raises:
        InvalidInput: The task's labels do not begin with the served ones.
    """
    known, asked = served.label_names, spec.data.label_names
    if known == asked or not known:
        return served
    if asked[: len(known)] != known:
        raise InvalidInput(
            f"main serves the labels {list(known)!r:.300}, and this revision has {list(asked)!r:.300}",
            "data.label_names",
            "list the labels of the revision before it first, in their order, and new ones after them",
        )
    before, fresh = base.head(spec_of(served, spec), served), base.task_model(spec, spec.training.seed)
    head = dict(served.head)
    for name in base.heads[spec.kind].outputs:
        drawn = fresh.get_parameter(name).detach()[len(known) :]
        head[name] = torch.cat([before[name].cpu().float(), drawn.cpu().float()])
    return replace(served, head=head, info=dict(served.info) | {"label_names": json.dumps(asked)})


def ranks_above(served: Mapping[str, ModuleUpdate], rank: int) -> dict[str, int]:
    """Module to rank, of those whose update has more directions than a rank."""
    return {name: found for name, update in served.items() if (found := _rank(update)) > rank}


def put_factors(model: Any, served: Mapping[str, ModuleUpdate]) -> None:
    """Make the factors of a PEFT model what is served; ranks that it does not have stay as they were drawn."""
    for name, layer in lora_layers(model).items():
        if (update := served.get(name)) is None:
            continue
        rank = _rank(update)
        b_NR, a_RD = layer.lora_B[ADAPTER].weight.data, layer.lora_A[ADAPTER].weight.data
        scale = ROW * layer.scaling[ADAPTER]
        b_NR[:, :rank] = (update.u_NR[:, :rank] * (update.sigma_R[:rank] / scale)).to(b_NR)
        a_RD[:rank] = (update.v_DR[:, :rank].T * ROW).to(a_RD)


def kept_ranks(served: Adapter | None, name: str) -> int:
    """How many of a layer's ranks hold what is served."""
    update = served.modules.get(name) if served is not None else None
    return 0 if update is None else _rank(update)


def coefficients(update: ModuleUpdate, p_NK: Tensor, q_DK: Tensor) -> Tensor:
    """Pᵀ·ΔW·Q, K_out×K_in, float64."""
    left_KR = p_NK.double().T @ (update.u_NR.double() * update.sigma_R.double())
    return left_KR @ (q_DK.double().T @ update.v_DR.double()).T


def with_directions_of(basis: ModuleBasis, update: ModuleUpdate) -> ModuleBasis:
    """The basis and, after it, the directions of a task's private part: they are the task's own, and its coefficients
    in them are trained with the others. The basis itself where there are none."""
    p_NK, q_DK = _widened(basis.p_NK, update.u_NR * update.sigma_R), _widened(basis.q_DK, update.v_DR * update.sigma_R)
    return replace(basis, p_NK=p_NK, q_DK=q_DK)


def _widened(basis_NK: Tensor, columns_NR: Tensor) -> Tensor:
    exact_NK, columns_NR = basis_NK.double(), columns_NR.double()
    rest_NR = columns_NR - exact_NK @ (exact_NK.T @ columns_NR)
    u_NR, size_R, _ = torch.linalg.svd(rest_NR - exact_NK @ (exact_NK.T @ rest_NR), full_matrices=False)
    return torch.cat([basis_NK, u_NR[:, size_R > ROUNDING * columns_NR.norm()].float()], dim=1)


def _rank(update: ModuleUpdate) -> int:
    return int((update.sigma_R > ROUNDING * update.sigma_R.norm()).sum())
