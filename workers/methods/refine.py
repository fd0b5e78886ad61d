"""The refinement after merging: the new task's own coefficients, trained on its own rows in a version's frozen basis.

Training starts at the task as that version serves it and cannot leave the span of the basis and of the task's private
part, or of the foundation if the task lies there, so that merging the result again needs no new direction. The head is
the task's own and is trained as well.

Source: Share (arXiv:2602.06043), the optional last step of phase 3; never another task's rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.merging.basis import foundation_basis
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, lora
from workers.methods.factors import ADAPTER, SpannedFactor, lora_layers
from workers.methods.start import with_directions_of

TRAINS = True


def needs_basis(spec: TaskSpec) -> bool:
    return True


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model that computes what given.adapter does, to train its coefficients in given.basis and its head.

    Raises:
        InvalidInput: given.adapter adapts a module that given.basis lacks: it is not of this version.
    """
    assert given.adapter is not None, "a refinement starts from the task as a version serves it"
    served = given.adapter
    if unknown := served.modules.keys() - given.basis.keys():
        raise InvalidInput(f"version {given.version} has no basis for {', '.join(sorted(unknown))}", "refinement")
    model = lora.model_with_lora(base, spec, tuple(served.modules), served)
    for name, layer in lora_layers(model).items():
        update = served.modules[name]
        if update.foundation:
            basis = foundation_basis(name, update.shape, update.foundation)
        else:
            basis = with_directions_of(given.basis[name], update)
        root_R = (update.sigma_R / layer.scaling[ADAPTER]).sqrt()  # as much of σ in B as in A
        device = layer.lora_A[ADAPTER].weight.device
        layer.lora_B[ADAPTER] = SpannedFactor.holding(update.u_NR * root_R, basis.p_NK, inward=False, device=device)
        layer.lora_A[ADAPTER] = SpannedFactor.holding(update.v_DR * root_R, basis.q_DK, inward=True, device=device)
    return model


def finish(prepared: Any, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """P·E·Fᵀ·Qᵀ of the trained coefficients, and the head. The adapter's `info` is kept."""
    assert given.adapter is not None
    refined = lora.finish(prepared, base, spec, given)
    # As served, a task with a private part has both ranks; refined, it has its own again, so that ranks do not grow.
    modules = {
        name: replace(update.leading(spec.lora.r), foundation=given.adapter.modules[name].foundation)
        for name, update in refined.modules.items()
    }
    refined = replace(refined, modules=modules)
    return replace(refined, info=dict(given.adapter.info) | {"refined_in": str(given.version)})
