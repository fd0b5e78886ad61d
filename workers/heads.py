"""The head of a task: what its model has beside the layers that all tasks share, and where each part comes from.

transformers puts a task's model together from the checkpoint and draws at random what the checkpoint lacks. PEFT trains
`classifier` and `score`, and what `modules_to_save` lists. Here it is the same, with one difference: what neither the
checkpoint nor an imported adapter has is refused by name, because nobody else would draw the same numbers.

No torch: the control plane checks submissions by a `HeadLayout` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import InvalidInput
from configs.task_spec import CLASSIFICATION_KINDS, Kind, TaskSpec

if TYPE_CHECKING:
    from subspace_store.adapter import Adapter

OUTPUT_COUNTS: dict[Kind, int] = {"sequence_regression": 1}


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The parameters of one kind's task model, as far as a task may have its own."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each parameter that an adapter may bring whole: all but those in `shared`. For one output."""
    shared: tuple[str, ...] = ()
    """Names of embeddings and of a language model's output layer, which always belong to the base model."""
    outputs: tuple[str, ...] = ()
    """Names of the parameters that have one row for each output."""
    missing: tuple[str, ...] = ()
    """Names of the parameters that the checkpoint lacks."""
    trained: tuple[str, ...] = ()
    """Modules that are trained with the task: the output layers, PEFT's `classifier` and `score`, what is missing."""
    label_names: tuple[str, ...] = ()
    """Labels of the checkpoint's own output layer, by output; empty: it has none. `LABEL_0`, …: not known."""
    configured_names: tuple[str, ...] = ()
    """Labels that the checkpoint's config.json names (id2label), whether it has an output layer or not."""


NO_HEAD = HeadLayout(shapes={})
"""Of tasks that have an update and nothing else."""


def kept_outputs(layout: HeadLayout, spec: TaskSpec) -> tuple[int, ...] | None:
    """The checkpoint's output for each output of the task, from which training starts.

    Returns:
        Indices into `layout.label_names`, by name where names are known. None: the checkpoint has no output layer or
        one for other labels, and a new one is drawn.
    """
    theirs, ours = layout.label_names, spec.data.label_names
    count = OUTPUT_COUNTS.get(spec.kind, len(ours))
    if len(theirs) != count or not count:
        return None
    if spec.kind in OUTPUT_COUNTS or _are_unknown(theirs):
        return tuple(range(count))
    return tuple(theirs.index(name) for name in ours) if {*theirs} == {*ours} else None


def told(layout: HeadLayout, spec: TaskSpec) -> str:
    """Where the parts of the head come from when a task is trained, for its log; empty without a head."""
    kept = kept_outputs(layout, spec) is not None
    drawn = {name for name in layout.missing if name in layout.shapes}
    drawn |= set() if kept else {*layout.outputs}
    starts = sorted({owner(name) for name in drawn})
    trained = [module for module in layout.trained if not all(_inside(name, module, drawn) for name in layout.shapes)]
    parts = [f"{', '.join(starts)} drawn from the seed"] if starts else []
    parts += [f"{', '.join(trained)} from the checkpoint"] if trained else []
    return f"head: trained are {'; '.join(parts)}" if parts else ""


def _inside(name: str, module: str, drawn: set[str]) -> bool:
    """Whether a parameter is no reason to keep this module: it lies elsewhere, or is drawn."""
    return not name.startswith(f"{module}.") or name in drawn


def check_head(adapter: Adapter, spec: TaskSpec, layout: HeadLayout, is_scored: bool = True) -> None:
    """Refuse an adapter's head that is not the task's, or that leaves a part to chance.

    Args:
        layout: Head layout of the task's kind.
        is_scored: Whether the adapter will be scored. If not, one without any head passes: it is a LoRA and nothing
            else.

    Raises:
        InvalidInput: A parameter that the model does not have or that all tasks share; another number of outputs than
            the task has labels, or other labels; a part that neither the adapter nor the checkpoint has.
    """
    if not adapter.head and not is_scored:
        return
    _check_output_count(adapter, spec, layout)
    for name, tensor in adapter.head.items():
        _check_parameter(name, tuple(tensor.shape), adapter, spec, layout)
    if absent := sorted({*layout.missing} - adapter.head.keys()):
        if not adapter.head:
            raise InvalidInput(
                f"the adapter has no head, so it cannot be scored: the base model's checkpoint lacks {_listed(absent)}",
                todo="import an adapter that was saved with its classifier (modules_to_save), or leave out "
                "data.eval_file",
            )
        raise InvalidInput(
            f"the adapter's head is not whole: neither it nor the base model's checkpoint has {_listed(absent)}. "
            "Where it was trained they were random numbers, which were not saved",
            todo=f"train it with {sorted({name.rpartition('.')[0] for name in absent})} in modules_to_save, or on a "
            "base model whose checkpoint has them",
        )
    _check_labels(adapter, spec, layout)


def check_whole(adapter: Adapter, layout: HeadLayout, saved: str, where: str) -> None:
    """Refuse an adapter whose file lacks a part of the head that was saved where it was trained: the checkpoint's own
    part, taken in its place, would be another. PEFT names `classifier` and `score` for every classifier: only what the
    base model has can be lacking.

    Args:
        adapter: With full names.
        saved: The names in modules_to_save, as a JSON list. PEFT compares the ends of names with them.

    Raises:
        InvalidInput: A module of these without tensors, or a layer of which a part is there.
    """
    names, begun = tuple(json.loads(saved)), {owner(name) for name in adapter.head}
    for name in sorted({*layout.shapes, *layout.shared} - adapter.head.keys()):
        if owner(name) in begun:
            raise InvalidInput(f"has a part of '{owner(name)}', and not '{name}'", where, "the file is not complete")
        if module := next((outer for outer in _outers(name) if outer.endswith(names)), ""):
            raise InvalidInput(
                f"names {next(end for end in names if module.endswith(end))!r} in modules_to_save but has no tensors "
                f"for '{owner(name)}'",
                where,
                "the file is not complete: save it again; or, if this module was not trained, take the name out",
            )


def _outers(parameter: str) -> list[str]:
    """All modules that a parameter lies in, the outermost first."""
    parts = parameter.split(".")
    return [".".join(parts[:stop]) for stop in range(1, len(parts))]


def _check_output_count(adapter: Adapter, spec: TaskSpec, layout: HeadLayout) -> None:
    """Without rows to score an import needs no label names, and then any number of outputs is right that a classifier
    can have, if it is that of the labels which the adapter itself names."""
    if spec.kind not in CLASSIFICATION_KINDS or spec.data.label_names:
        return
    brought = {name: tuple(adapter.head[name].shape) for name in layout.outputs if name in adapter.head}
    counts = {name: shape[0] if shape else 0 for name, shape in brought.items()}
    labels = len(adapter.label_names)
    for name, count in counts.items():
        if count < 2:
            raise InvalidInput(
                f"the adapter's head has {count} output, and a {spec.kind} has two or more",
                name,
                "set kind: sequence_regression if it says a number; else save the adapter again",
            )
        if labels and count != labels:
            raise InvalidInput(
                f"the adapter's head has {count} outputs, and the adapter names {labels} labels",
                name,
                "the file is damaged, or its id2label is another model's: correct it",
            )
        if count != next(iter(counts.values())):
            raise InvalidInput(
                f"the parts of the adapter's head have other numbers of outputs: {counts}", name, "save it again"
            )


def _check_parameter(name: str, shape: tuple[int, ...], adapter: Adapter, spec: TaskSpec, layout: HeadLayout) -> None:
    if name in layout.shared:  # its tensor is shared by all tasks, and large
        raise InvalidInput(
            f"the adapter brings its own weights for a layer that belongs to the base model {adapter.base_model!r}",
            name,
            "train it without this layer in modules_to_save; adapt it with LoRA instead",
        )
    if name not in layout.shapes:
        raise InvalidInput("the base model has no such parameter for the adapter's head", name)
    if owner(name) in adapter.modules:
        raise InvalidInput("the adapter brings this layer whole and changes it by a LoRA as well", name, "keep one")
    needed = layout.shapes[name]
    count = OUTPUT_COUNTS.get(spec.kind, len(spec.data.label_names))
    if name in layout.outputs:
        # Without rows to score an import needs no label names; then any number of outputs is right.
        needed = (count or (shape[0] if shape else 0), *needed[1:])
    if shape != needed:
        of_outputs = f"for {count} outputs " if name in layout.outputs else ""
        raise InvalidInput(
            f"the adapter's head has shape {shape}; {of_outputs}the base model needs {needed}",
            name,
            "data.label_names must list the labels the adapter was trained with, in that order"
            if name in layout.outputs
            else "was it trained on another base model?",
        )


def _check_labels(adapter: Adapter, spec: TaskSpec, layout: HeadLayout) -> None:
    """Compare the task's labels with those that the adapter or, where it has no output layer, the checkpoint names."""
    said = adapter.label_names
    of = "the adapter's outputs"
    if layout.outputs and not {*layout.outputs} & adapter.head.keys():
        said, of = layout.label_names, "the adapter has no output layer, and the checkpoint's outputs"
    count = OUTPUT_COUNTS.get(spec.kind, len(spec.data.label_names))
    if not said or not count:
        return
    only_counted = spec.kind in OUTPUT_COUNTS or _are_unknown(said)
    is_right = len(said) == count if only_counted else said == spec.data.label_names
    if not is_right:
        raise InvalidInput(
            f"{of} are {list(said)!r:.300}; data.label_names are {list(spec.data.label_names)!r:.300}",
            "data.label_names",
            "list the labels of the outputs, in their order",
        )


def doubtful_labels(adapter: Adapter, spec: TaskSpec, layout: HeadLayout) -> str:
    """A warning if nothing says that an adapter's outputs are the task's labels, and the checkpoint's config.json names
    others; else empty.

    Raises:
        InvalidInput: It names the same labels in another order: one of the two is wrong.
    """
    ours, theirs = spec.data.label_names, layout.configured_names
    brings_outputs = bool({*layout.outputs} & adapter.head.keys())
    is_said = bool(adapter.label_names) and not _are_unknown(adapter.label_names)
    if not brings_outputs or is_said or spec.kind in OUTPUT_COUNTS or len(theirs) != len(ours) or ours == theirs:
        return ""
    if _are_unknown(theirs):
        return ""
    both = (
        f"the base model's config.json names the outputs {list(theirs)!r:.300}, and data.label_names "
        f"{list(ours)!r:.300}"
    )
    if {*ours} != {*theirs}:
        return f"{both}: the adapter's own output layer is taken to be for data.label_names"
    raise InvalidInput(
        both,
        "data.label_names",
        "list them in the order of the adapter's outputs; if that is not the order of config.json, write it into "
        "adapter_config.json as id2label",
    )


def owner(parameter: str) -> str:
    """The module that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def _are_unknown(names: tuple[str, ...]) -> bool:
    """Whether these are the names that transformers gives to unnamed labels."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
