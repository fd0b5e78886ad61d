"""What a task needs of its base model, and whether the base model has it.

Checked at admission, so that nobody waits in the queue for a refusal, and again by the worker, which may have another
base model by then. No model libraries: the control plane only knows a `BaseLayout`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from configs.errors import InvalidInput
from configs.task_spec import ALL_LINEAR, BROUGHT_KINDS, IMAGE_KINDS, TaskSpec
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.formats.peft import TARGETS, TRAINED_ON, TRAINED_ON_SHA256, UNKNOWN_SETTINGS
from subspace_store.formats.peft_config import adapted
from workers.heads import HeadLayout
from workers.metrics import GENERATED

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]
"""Full name of a linear layer to (N, D)."""


def check_lengths(spec: TaskSpec, length_max: int) -> None:
    """Refuse inputs and answers longer than the base model has positions for. Raises InvalidInput."""
    if spec.kind in (*IMAGE_KINDS, *BROUGHT_KINDS) or (spec.method.name == "import" and not spec.data.eval_file):
        return  # there are no texts
    if spec.data.max_length > length_max:
        raise InvalidInput(
            f"{spec.data.max_length} tokens are more than the base model {spec.base_model!r} reads",
            "data.max_length",
            f"set it to {length_max} or less",
        )
    if spec.metric in GENERATED and spec.data.max_new_tokens >= length_max:
        raise InvalidInput(
            f"an answer of {spec.data.max_new_tokens} tokens leaves no room for its prompt: the base model "
            f"{spec.base_model!r} has {length_max} positions",
            "data.max_new_tokens",
            "lower it",
        )


def check_template(spec: TaskSpec, has_template: bool) -> None:
    """Refuse messages that the base model's tokenizer cannot render. Raises InvalidInput."""
    if spec.data.messages_column and spec.kind == "causal_lm" and not has_template:
        raise InvalidInput(
            f"the tokenizer of the base model {spec.base_model!r} has no chat template to render messages with",
            "data.messages_column",
            "give data.prompt_column and data.completion_column, or train on a base model that was made for chat",
        )


def chosen_modules(targets: Sequence[str], shapes: Shapes, base_model: str) -> tuple[str, ...]:
    """Full names of the layers that these names match, whole or by their end, as in PEFT; in the model's order. All of
    them for `all-linear`: the head's are none of these.

    Raises:
        InvalidInput: A name matches no linear layer.
    """
    if tuple(targets) == (ALL_LINEAR,):
        return tuple(shapes)
    for target in targets:
        if not any(_fits(name, target) for name in shapes):
            ends = sorted({name.rpartition(".")[2] for name in shapes})
            raise InvalidInput(
                f"the base model {base_model!r} has no linear layer {target!r}",
                "lora.target_modules",
                f"it has: {', '.join(ends)}",
            )
    return tuple(name for name in shapes if any(_fits(name, target) for target in targets))


def with_full_names(adapter: Adapter, shapes: Shapes, head: HeadLayout, where: str) -> Adapter:
    """An adapter that was trained elsewhere, under the names that this service's task models have.

    One trained on the bare backbone (`encoder.…`) is the same update of the task model (`bert.encoder.…`).

    Args:
        head: Head layout of the task's kind.

    Raises:
        InvalidInput: A module that the base model does not have, or has with another shape; one name that matches
            several modules, or two that match the same, so that one update would be lost.
    """
    modules: dict[str, ModuleUpdate] = {}
    came_as: dict[str, str] = {}
    for name, update in adapter.modules.items():
        full = _full_name(name, shapes, adapter.base_model, where)
        _check_once(full, name, came_as, where)
        if update.shape != shapes[full]:
            raise InvalidInput(
                f"the adapter's '{name}' has shape {update.shape}; the base model's is {shapes[full]}",
                where,
                "was it trained on another base model?",
            )
        modules[full] = update
    known = {*head.shapes, *head.shared}
    parameters: dict[str, Tensor] = {}
    for name, tensor in adapter.head.items():
        found = [name] if name in known else [full for full in known if full.endswith(f".{name}")]
        full = found[0] if len(found) == 1 else name  # `check_head` refuses by its name what matches nothing
        _check_once(full, name, came_as, where)
        parameters[full] = tensor
    return replace(adapter, modules=dict(sorted(modules.items())), head=dict(sorted(parameters.items())))


def _check_once(full: str, name: str, came_as: dict[str, str], where: str) -> None:
    if full in came_as:
        raise InvalidInput(
            f"the adapter changes '{full}' twice, as '{came_as[full]}' and as '{name}'",
            where,
            "keep one of the two in the file: which is meant, nobody can tell",
        )
    came_as[full] = name


def trained_elsewhere(adapter: Adapter, called: Iterable[str]) -> str:
    """A warning if an adapter says that it was trained on another base model; else empty.

    Shapes alone prove nothing: every BERT of one size has the same.

    Args:
        called: Names by which this service's base model is known.
    """
    digest, name = adapter.info.get(TRAINED_ON_SHA256, ""), adapter.info.get(TRAINED_ON, "")
    if digest:
        if digest == adapter.base_sha256:
            return ""
        said = f"base weights with sha256 {digest[:16]}…, and this service's are {adapter.base_sha256[:16]}…"
    else:
        last = _plain(_last_part(name))
        if not last or any(last in _plain(known) for known in called):
            return ""
        said = f"'{name}', and this service's base model is {' or '.join(repr(known) for known in called)}"
    return f"the adapter was trained on {said}: if that is another model, its scores will be those of chance"


def not_understood(adapter: Adapter) -> str:
    """A warning if an adapter's folder has settings that nobody here knows; else empty."""
    names = json.loads(adapter.info.get(UNKNOWN_SETTINGS, "[]"))
    if not names:
        return ""
    return (
        f"adapter_config.json sets {', '.join(names[:5])}, which this release does not know: if that changes what the "
        "adapter computes, it is read wrongly; compare a few of its answers with your own program's"
    )


def incomplete(adapter: Adapter, shapes: Shapes) -> str:
    """A warning if the base model has modules that an adapter's settings name and its file has no tensors for.

    Args:
        adapter: With full names.
    """
    settings = json.loads(adapter.info.get(TARGETS, "{}"))
    absent = [name for name in adapted(settings, shapes, "adapter") if name not in adapter.modules]
    if not absent:
        return ""
    count = len(absent) + len(adapter.modules)
    return (
        f"target_modules names {count} modules of the base model, and the file has no tensors for {len(absent)} of "
        f"them, '{absent[0]}' among them: these stay as the base model has them; if they were trained, save it again"
    )


def without_effect(adapter: Adapter, rounding: Mapping[str, float]) -> str:
    """A warning if an adapter's update is zero in every module, or too small to change an output; else empty.

    Args:
        adapter: With full names.
        rounding: As in `BaseLayout`. A module that is not in it may change something, however little.
    """
    norms = {name: float(update.sigma_R[0]) if update.rank else 0.0 for name, update in adapter.modules.items()}
    if not any(norms.values()):
        what = "the adapter changes nothing: in every module lora_A or lora_B is all zeros, as before training"
    elif all(norm < rounding.get(name, 0.0) or not norm for name, norm in norms.items()):
        largest = max(norms, key=lambda name: norms[name] / rounding.get(name, 1.0))
        what = (
            "the adapter changes nothing: in every module its update is less than the rounding of the base model's own "
            f"numbers; it comes nearest in '{largest}', with norm {norms[largest]:.1e}, where that is "
            f"{rounding[largest]:.1e}"
        )
    else:
        return ""
    return what + ("; its head alone is its own" if adapter.head else "")


_NAMES_NOTHING = re.compile(
    r"\.+|(base[-_]?)?model|(last[-_])?checkpoint([-_]?\d+)?|final|main|latest|output|\d+", re.I
)
"""Folders in which any model may lie."""


def _last_part(name: str) -> str:
    """The model's own name in a hub id, a path, or a path inside a hub's cache."""
    cached = re.search(r"models--[^/]*--([^/]+)/", name)
    parts = [part for part in name.split("/") if part and not _NAMES_NOTHING.fullmatch(part)]
    return cached[1] if cached else parts[-1] if parts else ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _full_name(name: str, shapes: Shapes, base_model: str, where: str) -> str:
    found: Sequence[str] = [name] if name in shapes else [full for full in shapes if full.endswith(f".{name}")]
    if not found:
        raise InvalidInput(
            f"the adapter changes '{name}', which the base model '{base_model}' does not have",
            where,
            "was it trained on another base model?",
        )
    if len(found) > 1:
        raise InvalidInput(
            f"the adapter changes '{name}', which may be any of {len(found)} modules, '{found[0]}' and '{found[1]}' "
            "among them",
            where,
            "save it again under full names",
        )
    return found[0]


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
