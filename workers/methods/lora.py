"""Method `lora`: an ordinary PEFT LoRA on the base model, and the task's head. The other methods start from this one.

`start_of_a: basis` draws A inside the span of the leased basis, so that a task needs fewer new directions when it is
merged; training may leave it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from configs.errors import InvalidInput
from configs.task_spec import Kind, LoraSpec, TaskSpec
from subspace_store.adapter import Adapter, ModuleUpdate, canonical_update, check_adapter
from subspace_store.formats.peft import PREFIX, check_numbers
from subspace_store.merging.basis import ModuleBasis
from workers.architecture import inside
from workers.base_model import BaseModel
from workers.compatibility import chosen_modules
from workers.heads import owner
from workers.methods import NOTHING, Given
from workers.methods.factors import ADAPTER, factors, lora_layers, spanned
from workers.methods.start import put_factors, ranks_above
from workers.peft_model import TASK_TYPES, with_lora

TRAINS = True
START_OF_A = "kaiming_uniform"  # PEFT's default; B starts at zero


def needs_basis(spec: TaskSpec) -> bool:
    return spec.method.start_of_a == "basis"


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model whose trainable numbers are lora_A, lora_B and the head.

    The head and A are drawn from spec.training.seed: the same in every process. A lies inside the span of those bases
    that are given. A revision starts from given.start in all layers that this has, and in those that the task names.

    Raises:
        InvalidInput: A target module that the base model does not have; lists those it has.
    """
    adapted, start = target_modules(base, spec.lora, spec.kind), given.start
    if start is not None:
        adapted = tuple(name for name in base.module_shapes(spec.kind) if name in {*adapted, *start.modules})
    model = model_with_lora(base, spec, adapted, start, ranks_above(start.modules, spec.lora.r) if start else {})
    _start_inside(model, given.basis, spec.training.seed)
    if start is not None:
        put_factors(model, start.modules)
    return model


def model_with_lora(
    base: BaseModel,
    spec: TaskSpec,
    adapted: tuple[str, ...],
    served: Adapter | None = None,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """PEFT's LoRA in these layers of a task model.

    Args:
        served: Adapter with the head to go on from; default: the checkpoint's head, and what it lacks from the seed.
        ranks: Layers with another rank than lora.r.
    """
    import transformers

    transformers.set_seed(spec.training.seed)
    model = base.task_model(spec, spec.training.seed, served)
    trained = base.head_modules(spec.kind)
    others = {owner(name) for name in (served.head if served else {}) if not inside(name, trained)}
    config = LoraConfig(
        task_type=TASK_TYPES[spec.kind],
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        lora_dropout=spec.lora.lora_dropout,
        use_rslora=spec.lora.use_rslora,
        target_modules=list(adapted),
        modules_to_save=[*trained, *sorted(others)],
        fan_in_fan_out=_stored_transposed(base, adapted),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        # One scale for all layers, so that a learning rate moves each update as far.
        alpha_pattern={re.escape(name): spec.lora.alpha_of(rank) for name, rank in ranks.items()},
    )
    return with_lora(model, config)


def finish(
    prepared: Any, base: BaseModel, spec: TaskSpec, given: Given = NOTHING, info: Mapping[str, str] | None = None
) -> Adapter:
    """Read the trained numbers out of the PEFT model, whatever its factors were made of.

    Args:
        info: Further facts for the adapter's `info`.

    Raises:
        InvalidInput: NaN or infinity; names the module.
    """
    config = prepared.peft_config[ADAPTER]
    with whole(prepared):
        state = {name: tensor for name, tensor in prepared.state_dict().items() if ".lora_" not in name}
        head = {
            name.removeprefix(PREFIX): tensor.detach().float().cpu()
            for name, tensor in sorted(get_peft_model_state_dict(prepared, state, save_embedding_layers=False).items())
        }
        modules = {name: _update(name, layer) for name, layer in sorted(lora_layers(prepared).items())}
    facts = {
        "label_names": json.dumps(spec.data.label_names),
        "start_of_a": "basis" if any(spanned(given.basis, name) for name in modules) else START_OF_A,
        "lora": spec.lora.model_dump_json(),
        "task_type": str(config.task_type or ""),
        "fan_in_fan_out": json.dumps(config.fan_in_fan_out),
        "lora_dropout": json.dumps(config.lora_dropout),
    }
    left = {name: update for name, update in modules.items() if update.rank}
    adapter = Adapter(base.name, base.sha256, left, head, facts | dict(info or {}))
    check_adapter(adapter)
    return adapter


def _update(name: str, layer: LoraLayer) -> ModuleUpdate:
    b_NR, a_RD = factors(layer)
    check_numbers(f"{name}.lora_B", b_NR, "the trained adapter")
    check_numbers(f"{name}.lora_A", a_RD, "the trained adapter")
    return canonical_update(b_NR, a_RD, layer.scaling[ADAPTER])


def _start_inside(model: Any, basis: Mapping[str, ModuleBasis], seed: int) -> None:
    """Draw A again as random rows in span(Q), as long as PEFT's own."""
    draw = torch.Generator().manual_seed(seed)
    for name, layer in lora_layers(model).items():
        if (found := spanned(basis, name)) is not None:
            q_DK, a_RD = found.q_DK, layer.lora_A[ADAPTER].weight
            mix_RK = torch.empty(len(a_RD), q_DK.shape[1]).uniform_(-1, 1, generator=draw) / q_DK.shape[1] ** 0.5
            a_RD.data.copy_(mix_RK @ q_DK.T)


def target_modules(base: BaseModel, lora: LoraSpec, kind: Kind) -> tuple[str, ...]:
    """Full names of the layers to adapt, see `compatibility.chosen_modules`."""
    return chosen_modules(lora.target_modules, base.module_shapes(kind), base.name)


def _stored_transposed(base: BaseModel, adapted: tuple[str, ...]) -> bool:
    """Whether the adapted layers are GPT-2's Conv1D. PEFT has one flag for all."""
    transposed = [name in base.stores_transposed for name in adapted]
    if any(transposed) and not all(transposed):
        raise InvalidInput(
            "some of these layers are stored transposed (Conv1D) and some are not; PEFT cannot adapt both at once",
            "lora.target_modules",
            f"leave out one kind; transposed: {', '.join(sorted(base.stores_transposed)[:4])}, …",
        )
    return bool(transposed and transposed[0])


def whole(model: Any) -> Any:
    """Under DeepSpeed stage 3 parameters are partitioned, and small ones only look whole: gather them."""
    own = (p for name, p in model.named_parameters() if p.requires_grad or ".lora_" in name)
    partitioned = [parameter for parameter in own if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    from workers.deepspeed_engine import gathered

    return gathered(partitioned)
