"""Immutable tensors on storage: how bases, transports and coefficients are written, read back and checked.

A blob has a name that is never used twice and a digest in the record that names it, so it needs no lock and any
copy of it is as good as another. Axes as in merge.py.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import Corrupt, NotFound
from subspace_store.adapter import digest
from subspace_store.merge import ModuleBasis, ModuleTasks, Transport, no_tasks
from subspace_store.storage import Storage
from subspace_store.version import BlobRef

BASIS = "onebasis-basis-1"
TRANSPORT = "onebasis-transport-1"
COEFFICIENTS = "onebasis-coefficients-1"

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest entry of |PᵀP − 1| in a stored float32 basis; rounding alone leaves about 1e-7."""


def write_blob(storage: Storage, epoch: int, content: bytes) -> BlobRef:
    """Write bytes under a new name, read them back and compare.

    Raises:
        Corrupt: The storage gave back other bytes than it took.
    """
    # Names sort by time; 8 random bytes keep two writers in one nanosecond apart.
    key = f"blobs/{epoch:010d}/{time.time_ns():016x}{secrets.token_hex(8)}.safetensors"
    ref = BlobRef(key, len(content), digest(content))
    storage.write(key, content)
    read_blob(storage, ref)
    return ref


def read_blob(storage: Storage, ref: BlobRef) -> bytes:
    """The bytes that a record names.

    Raises:
        Corrupt: They are gone, or are not what was written.
    """
    where = f"{storage.url}/{ref.key}"
    try:
        content = storage.read(ref.key)
    except NotFound as error:
        raise Corrupt("the object that the log names is gone", where, "restore it from a backup") from error
    if len(content) != ref.size_bytes or digest(content) != ref.sha256:
        raise Corrupt(
            f"has sha256 {digest(content)[:12]}… and {len(content)} bytes; "
            f"the log says {ref.sha256[:12]}… and {ref.size_bytes}",
            where,
            "restore the object from a backup; nothing was changed",
        )
    return content


def basis_to_bytes(bases: Mapping[str, ModuleBasis]) -> bytes:
    """P, Q (float32) and λ (float64) of every module; the same bases give the same bytes."""
    tensors: dict[str, Tensor] = {}
    for name, basis in bases.items():
        parts = {"p": basis.p_NK, "q": basis.q_DK, "lam_out": basis.lam_out_K, "lam_in": basis.lam_in_K}
        tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
    return _to_bytes(tensors, BASIS, {})


def basis_from_bytes(content: bytes, where: str) -> dict[str, ModuleBasis]:
    """Read `basis_to_bytes`.

    Raises:
        Corrupt: No such file, or columns that are not orthonormal.
    """
    modules, _ = _by_module(content, BASIS, where)
    bases = {n: ModuleBasis(parts["p"], parts["q"], parts["lam_out"], parts["lam_in"]) for n, parts in modules.items()}
    for name, basis in bases.items():
        for side, columns in (("outputs", basis.p_NK), ("inputs", basis.q_DK)):
            error = orthonormality_error(columns)
            if not error <= ORTHONORMAL_TOLERANCE:
                raise Corrupt(f"the basis of the {side} of {name} is off by {error:.1e}", where)
    return bases


def orthonormality_error(columns_NK: Tensor) -> float:
    """Largest entry of |PᵀP − 1|; 0 for no columns; NaN if there is one."""
    gram_KK = columns_NK.double().T @ columns_NK.double()
    return float((gram_KK - torch.eye(len(gram_KK), dtype=torch.float64)).abs().max()) if len(gram_KK) else 0.0


def transport_to_bytes(transports: Mapping[str, Transport]) -> bytes:
    """R_out and R_in (float64) of the modules that changed; the same transports give the same bytes."""
    tensors = {f"{n}/out": transport.out for n, transport in transports.items()}
    return _to_bytes(tensors | {f"{n}/in": t.inward for n, t in transports.items()}, TRANSPORT, {})


def transport_from_bytes(content: bytes, where: str) -> dict[str, Transport]:
    """Read `transport_to_bytes`. Raises Corrupt."""
    modules, _ = _by_module(content, TRANSPORT, where)
    return {name: Transport(parts["out"], parts["in"]) for name, parts in modules.items()}


def tasks_to_bytes(modules: Mapping[str, ModuleTasks], dtype: torch.dtype) -> bytes:
    """Coefficients of one task at birth (float32) or of all tasks in a snapshot (float64, as they are in memory)."""
    tensors: dict[str, Tensor] = {}
    layout: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for name, tasks in modules.items():
        parts = {"e": tasks.e_KS.to(dtype), "f": tasks.f_KS.to(dtype), "sigma": tasks.sigma_S}
        parts |= {"weight": tasks.weight_T, "delivered": tasks.delivered_T}
        tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        layout[name] = (tasks.task_ids, tasks.ranks)
    return _to_bytes(tensors, COEFFICIENTS, layout)


def tasks_from_bytes(content: bytes, where: str) -> dict[str, ModuleTasks]:
    """Read `tasks_to_bytes`. Raises Corrupt."""
    modules, layout = _by_module(content, COEFFICIENTS, where)
    result = {}
    for name, parts in modules.items():
        task_ids, ranks = layout[name]
        e_KS, f_KS = parts["e"].double(), parts["f"].double()
        result[name] = ModuleTasks(
            tuple(task_ids), tuple(ranks), e_KS, f_KS, parts["sigma"], parts["weight"], parts["delivered"]
        )
    return result


def move_tasks(
    before: Mapping[str, ModuleTasks],
    transports: Mapping[str, Transport],
    arrivals: Sequence[Mapping[str, ModuleTasks]],
) -> dict[str, ModuleTasks]:
    """Coefficients of one version from those of its parent: the same products in the same order as the merge did.

    So a reader that follows the log holds, bit for bit, what the writer holds.
    """
    after = {name: tasks.moved(transports[name]) if name in transports else tasks for name, tasks in before.items()}
    for arrival in arrivals:
        for name, tasks in arrival.items():
            after[name] = after.get(name, no_tasks((len(tasks.e_KS), len(tasks.f_KS)))).joined(tasks)
    return after


def _to_bytes(tensors: Mapping[str, Tensor], kind: str, layout: Mapping[str, object]) -> bytes:
    header = json.dumps({"format": kind, "layout": layout}, sort_keys=True)
    # Cloned: safetensors refuses tensors that share memory. One header value: it writes several in hash order.
    owned = {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}
    return bytes(save_safetensors(owned, {"onebasis": header}))


def _by_module(content: bytes, kind: str, where: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["onebasis"])
        tensors = load_safetensors(content)
    except (SafetensorError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise Corrupt(f"is not a tensor file of this store: {error}", where) from error
    if header.get("format") != kind:
        raise Corrupt(f"has format {header.get('format')!r}, this code reads {kind!r}", where)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        # Cloned: memory of its own is aligned, and products of aligned operands have the same bits everywhere.
        modules.setdefault(name, {})[part] = tensor.clone()
    return modules, header["layout"]
