"""Method `import`: an adapter that was trained elsewhere, as it is. A task without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, adapter_from_bytes
from subspace_store.formats.adapters import read_adapter
from workers.base_model import BaseModel
from workers.compatibility import with_full_names
from workers.methods import NOTHING, Given

TRAINS = False


def needs_basis(spec: TaskSpec) -> bool:
    return False


def after_step(prepared: Adapter, spec: TaskSpec, step: int, steps: int) -> None:
    pass


def prepare(base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """Read the adapter: `given.frozen`, or where that is empty what spec.method.adapter names.

    Raises:
        InvalidInput: See `subspace_store.formats.adapters.read_adapter`.
        Corrupt: The frozen bytes are no adapter.
    """
    if given.frozen:
        return adapter_from_bytes(given.frozen, "the frozen adapter")
    return read_adapter(Path(spec.method.adapter or ""), base.name, base.sha256)


def finish(prepared: Adapter, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
    """See `compatibility.with_full_names`: in an adapter that admission froze, the names are full already."""
    where = spec.method.adapter or ""
    named = with_full_names(prepared, base.module_shapes(spec.kind), base.heads[spec.kind], where)
    info = {"label_names": json.dumps(spec.data.label_names)} if spec.data.label_names else {}
    info |= {
        "start_of_a": "unknown",
        "fan_in_fan_out": json.dumps(all(name in base.stores_transposed for name in named.modules)),
    }
    return replace(named, info=dict(prepared.info) | info)
