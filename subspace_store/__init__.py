"""The shared basis of one base model: merging, versions, storage. A plain library: no Ray, no model, no network
unless the storage is on one.

```python
store = SubspaceStore.open(open_storage(StorageSettings(url="file:store")), base_model="minilm", writer="me")
upload = store.stage("staging/t1/1/adapter.safetensors", adapter)
staged = StagedAdapter(task_id="t1", name="team/task", key=upload.key, sha256=upload.sha256)
version = store.merge([staged], op_key="t1", actor="me")
store.publish(version.number, op_key="publish-1", actor="me")
adapter = store.adapter("t1")
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace_store.adapter import (
        Adapter,
        ModuleUpdate,
        adapter_from_bytes,
        adapter_to_bytes,
        canonical_update,
        check_adapter,
    )
    from subspace_store.digests import digest
    from subspace_store.log.version import (
        CANDIDATE,
        MAIN,
        BlobRef,
        MergedTask,
        StagedAdapter,
        SubspaceState,
        TaskScore,
        Version,
    )
    from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
    from subspace_store.storage.opening import open_storage
    from subspace_store.storage.protocol import Storage
    from subspace_store.subspace_reader import Footprint, HistoryEntry, RollbackPreview, SubspaceReader, VersionDiff
    from subspace_store.subspace_store import SubspaceStore

__all__ = [
    "CANDIDATE",
    "MAIN",
    "Adapter",
    "BlobRef",
    "Footprint",
    "HistoryEntry",
    "MergedTask",
    "ModuleBasis",
    "ModuleSubspace",
    "ModuleUpdate",
    "RollbackPreview",
    "StagedAdapter",
    "Storage",
    "SubspaceReader",
    "SubspaceState",
    "SubspaceStore",
    "TaskScore",
    "Version",
    "VersionDiff",
    "adapter_from_bytes",
    "adapter_to_bytes",
    "canonical_update",
    "check_adapter",
    "digest",
    "open_storage",
]

_HOMES = {
    "Adapter": "subspace_store.adapter",
    "BlobRef": "subspace_store.log.version",
    "CANDIDATE": "subspace_store.log.version",
    "Footprint": "subspace_store.subspace_reader",
    "HistoryEntry": "subspace_store.subspace_reader",
    "MAIN": "subspace_store.log.version",
    "MergedTask": "subspace_store.log.version",
    "ModuleBasis": "subspace_store.merging.basis",
    "ModuleSubspace": "subspace_store.merging.basis",
    "ModuleUpdate": "subspace_store.adapter",
    "RollbackPreview": "subspace_store.subspace_reader",
    "StagedAdapter": "subspace_store.log.version",
    "Storage": "subspace_store.storage.protocol",
    "SubspaceReader": "subspace_store.subspace_reader",
    "SubspaceState": "subspace_store.log.version",
    "SubspaceStore": "subspace_store.subspace_store",
    "TaskScore": "subspace_store.log.version",
    "Version": "subspace_store.log.version",
    "VersionDiff": "subspace_store.subspace_reader",
    "adapter_from_bytes": "subspace_store.adapter",
    "adapter_to_bytes": "subspace_store.adapter",
    "canonical_update": "subspace_store.adapter",
    "check_adapter": "subspace_store.adapter",
    "digest": "subspace_store.digests",
    "open_storage": "subspace_store.storage.opening",
}
"""Name to the file that defines it. A file is imported at the first use of a name: reading a log needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
