"""Method `lora`: an ordinary PEFT LoRA on the base model, and a fresh head."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict

from configs.errors import InvalidInput
from configs.task_spec import LoraSpec, TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.peft_format import from_peft
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given
from workers.peft_model import TASK_TYPES, with_lora

TRAINS = True
START_OF_A = "kaiming_uniform"  # PEFT's default; B starts at zero


def needs_basis(spec: TaskSpec) -> bool:
    return False


def after_step(prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
    """A PEFT model whose trainable numbers are lora_A, lora_B and the head.

    The head and A are drawn from spec.training.seed: the same in every process.

    Raises:
        InvalidInput: A target module that the base model does not have; lists those it has.
    """
    import transformers

    adapted = target_modules(base, spec.lora)
    transformers.set_seed(spec.training.seed)
    model = base.task_model(spec, spec.training.seed)
    config = LoraConfig(
        task_type=TASK_TYPES[spec.kind],
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        lora_dropout=spec.lora.lora_dropout,
        use_rslora=spec.lora.use_rslora,
        target_modules=list(adapted),
        modules_to_save=list(base.head_modules(spec.kind)),
        fan_in_fan_out=_stored_transposed(base, adapted),
    )
    return with_lora(model, config)


def finish(prepared: Any, base: BaseModel, spec: TaskSpec) -> Adapter:
    """Read the trained numbers out of the PEFT model."""
    config = prepared.peft_config["default"].to_dict()
    with _whole(prepared):
        tensors = get_peft_model_state_dict(prepared, save_embedding_layers=False)
        tensors = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    info = {
        "label_names": json.dumps(spec.data.label_names),
        "start_of_a": START_OF_A,
        "lora": spec.lora.model_dump_json(),
    }
    return from_peft(config, tensors, base.name, base.sha256, "the trained adapter", info)


def target_modules(base: BaseModel, lora: LoraSpec) -> tuple[str, ...]:
    """Full names of the layers to adapt, in the model's order.

    Every name in lora.target_modules must match a linear layer, whole or at its end, as in PEFT.
    """
    shapes = base.module_shapes()
    for target in lora.target_modules:
        if not any(_matches(name, target) for name in shapes):
            ends = sorted({name.rpartition(".")[2] for name in shapes})
            raise InvalidInput(
                f"the base model {base.name!r} has no linear layer {target!r}",
                "lora.target_modules",
                f"it has: {', '.join(ends)}",
            )
    return tuple(name for name in shapes if any(_matches(name, target) for target in lora.target_modules))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


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


def _whole(model: Any) -> Any:
    """Under DeepSpeed stage 3 parameters are partitioned, and small ones only look whole: gather them."""
    partitioned = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    from workers.deepspeed_engine import gathered

    return gathered(partitioned)
