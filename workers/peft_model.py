"""The one call that puts a LoRA into a model, for training and for scoring."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import Kind

TASK_TYPES: dict[Kind, str | None] = {  # of the kinds that are trained
    "sequence_classification": "SEQ_CLS",
    "sequence_regression": "SEQ_CLS",
    "image_classification": None,  # PEFT's SEQ_CLS would hand token ids to the model
    "image_regression": None,
    "image_text": None,
    "causal_lm": "CAUSAL_LM",
}
"""PEFT's task type for each kind of task."""


def with_lora(model: Any, config: LoraConfig) -> Any:
    """The model with lora_A, lora_B and a copy of its head in it; those alone have a gradient."""
    with warnings.catch_warnings():
        # peft 0.21 asks for a name that transformers 5 has renamed.
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    _keep_from_broadcast(adapted)
    return adapted


def _keep_from_broadcast(model: Any) -> None:
    """Tell DDP and DeepSpeed that rank 0 need not send the frozen weights to the others.

    All ranks have mapped files with one digest. Writing the same numbers over them again would give each rank a copy
    of the whole base model, and for 14 GB of it the sending takes longer than many tasks.
    """
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model._ddp_params_and_buffers_to_ignore = list(frozen)  # what DDP's own setter, untyped, does
    for parameter in frozen.values():
        parameter.ds_optim_param = True  # DeepSpeed's own mark for base weights that are not to be broadcast


def put_tensors(model: Any, tensors: dict[str, Tensor]) -> None:
    """Load an adapter's tensors, by PEFT's names.

    Raises:
        InvalidInput: The model has no place for one, or does not get one it needs.
    """
    loaded = set_peft_model_state_dict(model, tensors)
    missing = [name for name in loaded.missing_keys if "lora_" in name or "modules_to_save" in name]
    if loaded.unexpected_keys or missing:
        raise InvalidInput(
            f"does not fit the base model: unknown {loaded.unexpected_keys[:3]}, missing {missing[:3]}", "adapter"
        )
