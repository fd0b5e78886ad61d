"""Method `import`: a PEFT folder trained elsewhere, as it is. A task without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, adapter_from_bytes
from subspace_store.peft_format import read_peft_folder
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given

TRAINS = False


def needs_basis(spec: TaskSpec) -> bool:
    return False


def after_step(prepared: Adapter, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """Read what was brought: `given.frozen`, or where that is empty the folder in spec.method.adapter.

    Raises:
        InvalidInput: See `subspace_store.peft_format.from_peft`.
        Corrupt: The frozen bytes are no adapter.
    """
    if given.frozen:
        return adapter_from_bytes(given.frozen, "the frozen adapter")
    return read_peft_folder(Path(spec.method.adapter or ""), base.name, base.sha256)


def finish(prepared: Adapter, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """Give its modules the names they have in this service's task models, and check that they fit.

    An adapter trained on the bare backbone (`encoder.…`) is the same update of the task model (`bert.encoder.…`).

    Raises:
        InvalidInput: A module that the base model does not have, or with another shape; names it.
    """
    shapes = base.module_shapes()
    modules = {_name_in(base, name): update for name, update in prepared.modules.items()}
    for name, update in modules.items():
        if name not in shapes:
            raise InvalidInput(
                f"the adapter has the module {name!r}, which the base model {base.name!r} does not have",
                spec.method.adapter or "",
                "was it trained on another base model?",
            )
        if update.shape != shapes[name]:
            raise InvalidInput(
                f"the adapter's {name!r} is {update.shape}; in the base model {base.name!r} it is {shapes[name]}",
                spec.method.adapter or "",
                "was it trained on another base model?",
            )
    info = {
        "label_names": json.dumps(spec.data.label_names),
        "start_of_a": "unknown",
        "fan_in_fan_out": json.dumps(all(name in base.stores_transposed for name in modules)),
    }
    return replace(prepared, modules=dict(sorted(modules.items())), info=dict(prepared.info) | info)


def _name_in(base: BaseModel, name: str) -> str:
    prefixed = f"{base.prefix}.{name}"
    return prefixed if name not in base.module_shapes() and prefixed in base.module_shapes() else name
