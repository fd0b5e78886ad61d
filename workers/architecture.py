"""What can be read off a model without looking at its numbers: linear layers, the parts of a head, positions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from configs.errors import InvalidInput
from configs.task_spec import HEADLESS_KINDS, Kind
from subspace_store.formats.peft_config import CLASSIFIER_HEADS
from workers.heads import HeadLayout, owner


def head_layout(
    shell: Any, wider: Any, loaded: Collection[str], kind: Kind, label_names: tuple[str, ...], where: str
) -> HeadLayout:
    """The parameters that a task of a kind may have of its own, and which of them the checkpoint has.

    Args:
        shell: The kind's model with one output.
        wider: The same model with two outputs: a parameter that is larger in it has a row for each output.
        loaded: Names of the parameters that the checkpoint has.
        label_names: Labels of the checkpoint's output layer, if it has one for this kind; else empty.
        where: The checkpoint, for errors.

    Raises:
        InvalidInput: The checkpoint lacks a part of the backbone, which no task can make up for.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in shell.named_parameters()}
    outputs = {name for name, parameter in wider.named_parameters() if tuple(parameter.shape) != shapes[name]}
    label_names = label_names if outputs and outputs <= set(loaded) else ()
    missing = {name for name in shapes if name not in loaded or (name in outputs and not label_names)}
    if kind == "causal_lm":  # its output layer is there, or tied to the embeddings: else it would not be this kind
        missing = {name for name in missing if name.startswith(f"{shell.base_model_prefix}.")}
    _check_backbone(shell, missing, where)
    shared = _shared_layers(shell, kind)
    return HeadLayout(
        shapes={name: shape for name, shape in shapes.items() if name not in shared},
        shared=tuple(sorted(shared)),
        outputs=tuple(sorted(outputs)),
        missing=tuple(sorted(missing)),
        trained=_trained(shell, outputs | missing, kind),
        label_names=label_names,
    )


def linear_shapes(shell: Any, loaded: Collection[str], layout: HeadLayout) -> dict[str, tuple[int, int]]:
    """(N, D) of each linear layer that takes a LoRA: the checkpoint has it, and it is not trained whole."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in shell.named_modules():
        weight = f"{name}.weight"
        if weight not in loaded or weight in layout.shared or inside(weight, layout.trained):
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


def usable_positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None: it states no number.

    RoBERTa and its relatives count positions from after the padding token's index, so that the first rows of the table
    are never used: of 514 rows 512 are left.
    """
    rows = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    offset = position_offset(model)
    return rows if rows is None or offset is None else rows - offset


def position_offset(model: Any) -> int | None:
    """The position of a text's first token, where positions are counted from after the padding token; else None."""
    rows = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if is_table and module.num_embeddings == rows and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return None


def inside(parameter: str, modules: Iterable[str]) -> bool:
    return any(parameter.startswith(f"{module}.") for module in modules)


def _trained(shell: Any, drawn: Collection[str], kind: Kind) -> tuple[str, ...]:
    """The outermost modules of those with a parameter among `drawn` and those outside the backbone that PEFT trains."""
    if kind in HEADLESS_KINDS:
        return tuple(sorted({owner(name) for name in drawn}))
    backbone = f"{shell.base_model_prefix}."
    # PEFT compares the ends of names: DistilBERT's `pre_classifier` matches as well.
    by_name = {name for name, _ in shell.named_modules() if name.endswith(CLASSIFIER_HEADS)}
    chosen = {owner(name) for name in drawn} | {name for name in by_name if not name.startswith(backbone)}
    return tuple(sorted(name for name in chosen if not inside(name, chosen)))


def _check_backbone(shell: Any, missing: Collection[str], where: str) -> None:
    """A pooler may be missing whole; a layer or an embedding may not, nor one half of a module."""
    backbone = f"{shell.base_model_prefix}."
    repeated = tuple(name for name, module in shell.named_modules() if isinstance(module, nn.ModuleList))
    gone = sorted(name for name in missing if name.startswith(backbone))
    for name in gone:
        module = shell.get_submodule(owner(name))
        own = {f"{owner(name)}.{inner}" for inner, _ in module.named_parameters()}
        if not own <= set(gone) or inside(name, repeated) or isinstance(module, nn.Embedding):
            raise InvalidInput(f"weights lack {gone[:8]}", where, "the checkpoint is not complete")


def _shared_layers(shell: Any, kind: Kind) -> set[str]:
    """Parameters of embeddings and of a language model's output layer."""
    embeddings = {
        f"{name}.{part}"
        for name, module in shell.named_modules()
        if isinstance(module, nn.Embedding)
        for part, _ in module.named_parameters()
    }
    output = shell.get_output_embeddings() if kind == "causal_lm" else None
    return embeddings | {
        f"{name}.{part}"
        for name, module in shell.named_modules()
        if output is not None and module is output
        for part, _ in module.named_parameters()
    }
