"""Would it pay to write only new directions instead of a touched module's whole basis? `make bench-store` runs it.

A merge turns every direction: P' = [P, P⁺]·U. Written whole, P' has N·k numbers; as a difference P⁺ and U, N·c with c
the rank that arrived, and a reader of the c-th version since the last whole one multiplies c times. This measures both
ways on the shapes of a 7B model (one of 32 layers, bytes scaled up), and what a reader pays.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from configs.settings import StorageSettings
from subspace_store import Storage, open_storage
from subspace_store.files.tensor_file import TensorFile, pack, write_tensors

SIDES = [4096] * 11 + [11008] * 3  # one layer: q, k, v, o of 4096×4096; gate, up, down of 11008×4096
LAYERS, K, RANK = 32, 64, 16
DELTAS = (0, 1, 3, 7)


def measure() -> dict[str, Any]:
    """Seconds and bytes per merge for writing, and per version for reading after so many differences."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(n, K, generator=generator) for n in SIDES]
    fresh = [torch.randn(n, RANK, generator=generator) for n in SIDES]
    turns = [torch.randn(K + RANK, K, generator=generator).double() / 9 for _ in SIDES]
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(StorageSettings(url=f"file:{folder}"))
        whole, whole_seconds = _written(storage, [{"p": p} for p in bases])
        delta, delta_seconds = _written(storage, [{"u": u, "p": f} for f, u in zip(fresh, turns, strict=True)])
        reading = {count: _read_seconds(whole, delta, count) for count in DELTAS}
    return {
        "shape": f"7B: {LAYERS * len(SIDES) // 2} modules, k = {K}, r = {RANK}; one layer measured, times {LAYERS}",
        "whole": {"bytes": LAYERS * whole.ref.size_bytes, "write_seconds": LAYERS * whole_seconds},
        "difference": {"bytes": LAYERS * delta.ref.size_bytes, "write_seconds": LAYERS * delta_seconds},
        "read_seconds_after_so_many_differences": {count: LAYERS * seconds for count, seconds in reading.items()},
    }


def _written(storage: Storage, parts: list[dict[str, Tensor]]) -> tuple[TensorFile, float]:
    """Write, flush, read back and compare, as a merge does."""
    names = {str(i): tuple(part) for i, part in enumerate(parts)}
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        ref = write_tensors(storage, 1, "bench", {}, names, (pack(str(i), part) for i, part in enumerate(parts)))
        best = min(best, time.perf_counter() - started)
    return TensorFile(storage, ref, "bench"), best


def _read_seconds(whole: TensorFile, delta: TensorFile, count: int) -> float:
    """Read and check a whole basis, then apply differences."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        bases = [part["p"].double() for part in whole.all().values()]
        for _ in range(count):
            for i, part in enumerate(delta.all().values()):
                bases[i] = torch.cat([bases[i], part["p"].double()], dim=1) @ part["u"]
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    import json

    print(json.dumps(measure(), indent=1))
