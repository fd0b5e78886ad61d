"""The shared basis of one base model: merging, versions, storage. A plain library: no Ray, no model, no network
unless the storage is on one.

```python
store = SubspaceStore.open(open_storage(StorageSettings(url="file:store")), base_model="minilm", writer="me")
upload = store.stage("staging/t1/1/adapter.safetensors", adapter)
version = store.merge([StagedAdapter("t1", "team/task", upload.key, upload.sha256)], op_key="t1", actor="me")
store.publish(version.number, op_key="publish-1", actor="me")
adapter = store.adapter("t1")
```
"""

from subspace_store.adapter import (
    Adapter,
    ModuleUpdate,
    adapter_from_bytes,
    adapter_to_bytes,
    canonical_update,
    check_adapter,
    digest,
)
from subspace_store.branches import RollbackPreview
from subspace_store.merge import ModuleBasis, ModuleSubspace
from subspace_store.storage import Storage, open_storage
from subspace_store.subspace_reader import Footprint, HistoryEntry, SubspaceReader, VersionDiff
from subspace_store.subspace_store import SubspaceStore
from subspace_store.version import (
    CANDIDATE,
    MAIN,
    BlobRef,
    MergedTask,
    StagedAdapter,
    SubspaceState,
    TaskScore,
    Version,
)

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
