"""The contents of the log's blobs: bases, transports, coefficients and private parts as tensor files, adapters as plain
content.

A file has one part per module (bases, transports, private parts) or per task (coefficients), so that one of them is
read without the rest. Axes as in merge.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.document import Line
from configs.errors import Corrupt, InvalidInput, NotFound
from subspace_store.adapter import (
    Adapter,
    ModuleUpdate,
    adapter_to_bytes,
    foundation_facts,
    update_from_tensors,
    update_tensors,
)
from subspace_store.digests import digest
from subspace_store.files.tensor_file import Part, TensorFile, blob_key, pack, write_tensors
from subspace_store.files.version_heads import BASIS, COEFFICIENTS, PRIVATE, TRANSPORT, task_layout
from subspace_store.log.version import BlobRef
from subspace_store.merging.basis import ModuleBasis
from subspace_store.merging.coefficients import TaskBlock, Transport
from subspace_store.storage.protocol import Storage
from subspace_store.strict import strict

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest entry of |PᵀP − 1| in a stored float32 basis; rounding alone leaves about 1e-7."""


# Plain content: adapters as they were delivered


def write_blob(storage: Storage, epoch: int, content: bytes) -> BlobRef:
    """Write bytes under a new name, read them back and compare.

    Raises:
        Corrupt: The storage gave back other bytes than it took.
    """
    return write_content(storage, blob_key(epoch), content)


@strict
def stage(storage: Storage, key: Line, adapter: Adapter) -> BlobRef:
    """Upload an adapter for a later merge. Not part of the log: any worker may upload, and unused uploads get deleted.

    Args:
        key: Storage key below `staging/` that names the task and the attempt.

    Raises:
        InvalidInput: A key anywhere else, or an adapter that no file could hold.
    """
    if not key.startswith("staging/"):
        raise InvalidInput("an upload belongs below staging/", key, "use staging/TASK/ATTEMPT/adapter.safetensors")
    return write_content(storage, key, adapter_to_bytes(adapter))


def write_content(storage: Storage, key: str, content: bytes) -> BlobRef:
    """Write bytes under a given name, read them back and compare. Raises as `write_blob` does."""
    ref = BlobRef(key=key, size_bytes=len(content), sha256=digest(content))
    storage.write(key, content)
    read_blob(storage, ref)
    return ref


def read_blob(storage: Storage, ref: BlobRef) -> bytes:
    """The bytes that a record names.

    Raises:
        Corrupt: The bytes are missing, or are not those that were written.
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


def check_blob(storage: Storage, ref: BlobRef) -> None:
    """Compare any blob with its digests. Raises Corrupt."""
    if ref.head_bytes:
        TensorFile(storage, ref, "").check()
    else:
        read_blob(storage, ref)


# Bases: a part per module that the version's merge changed; the head says which version's file has the others


def pack_basis(module: str, basis: ModuleBasis) -> Part:
    """P, Q (float32) and λ (float64) of one module, as a part of a basis file."""
    # Float64 first: what follows stays aligned for readers that map the file.
    return pack(module, {"lam_out": basis.lam_out_K, "lam_in": basis.lam_in_K, "p": basis.p_NK, "q": basis.q_DK})


def write_basis(
    storage: Storage, epoch: int, modules: Sequence[str], elsewhere: Mapping[str, int], parts: Iterable[Part]
) -> BlobRef:
    """Write the bases of a merge while it computes them.

    Args:
        modules: Names of the modules that the merge may change, in the order of `parts`.
        elsewhere: Every module to the version whose file has its basis; `parts` takes out those that it yields.
        parts: Results of `pack_basis`, of the modules whose basis did change.
    """
    names = dict.fromkeys(modules, ("lam_out", "lam_in", "p", "q"))
    return write_tensors(storage, epoch, BASIS, {"elsewhere": elsewhere}, names, parts)


def read_basis(file: TensorFile, module: str) -> ModuleBasis:
    """One module's basis.

    Raises:
        Corrupt: The file is damaged, or its columns are not orthonormal.
    """
    tensors = file.part(module)
    basis = ModuleBasis(tensors["p"], tensors["q"], tensors["lam_out"], tensors["lam_in"])
    check_basis(basis, f"{file.where} {module}")
    return basis


def check_basis(basis: ModuleBasis, where: str) -> None:
    """Refuse columns that are not orthonormal, or not finite. Raises Corrupt."""
    for side, columns in (("outputs", basis.p_NK), ("inputs", basis.q_DK)):
        error = orthonormality_error(columns)
        if not error <= ORTHONORMAL_TOLERANCE:
            raise Corrupt(f"the basis of the {side} is off by {error:.1e}", where)


def orthonormality_error(columns_NK: Tensor) -> float:
    """Largest entry of |PᵀP − 1|; 0 for no columns; NaN if a column has one."""
    gram_KK = (columns_NK.T @ columns_NK).double()
    return float((gram_KK - torch.eye(len(gram_KK), dtype=torch.float64)).abs().max()) if len(gram_KK) else 0.0


# Transports: a part per module that had a basis before and is changed


def write_transports(storage: Storage, epoch: int, transports: Mapping[str, Transport]) -> BlobRef:
    """R_out and R_in (float64) of the modules that changed."""
    parts = [pack(name, {"out": t.out, "in": t.inward}) for name, t in sorted(transports.items())]
    return write_tensors(storage, epoch, TRANSPORT, {}, {part.name: ("out", "in") for part in parts}, parts)


def read_transports(file: TensorFile) -> dict[str, Transport]:
    """All modules' transports. Raises Corrupt."""
    return {name: Transport(tensors["out"], tensors["in"]) for name, tensors in file.all().items()}


# Private parts: a file per task, with a part per module


def write_private(storage: Storage, epoch: int, updates: Mapping[str, ModuleUpdate]) -> BlobRef:
    """One task's private parts (float32), by module; those that lie in the foundation as coefficients there."""
    parts = [pack(name, update_tensors(name, update)) for name, update in sorted(updates.items())]
    names = {part.name: [tensor for tensor, _, _ in part.layout] for part in parts}
    return write_tensors(storage, epoch, PRIVATE, foundation_facts(updates), names, parts)


def read_private(file: TensorFile, module: str) -> ModuleUpdate:
    """A task's private part in one module. Raises Corrupt."""
    return update_from_tensors(module, file.part(module), file.info, file.where)


# Coefficients: a part per task, its modules one after another


def write_coefficients(storage: Storage, epoch: int, modules: Mapping[str, TaskBlock]) -> BlobRef:
    """Coefficients of some tasks, each in a part of its own; E, F and σ as float32.

    Args:
        modules: Module name to the tasks that adapt it.
    """
    bases = {name: (len(block.e_KS), len(block.f_KS)) for name, block in modules.items()}
    members: dict[str, dict[str, TaskBlock]] = {}
    for name, block in modules.items():
        for task, one in block.each():
            members.setdefault(task, {})[name] = one
    # Most tasks adapt the same modules with the same ranks: each such layout is written once.
    shapes = {task: tuple((name, one.ranks[0]) for name, one in parts.items()) for task, parts in members.items()}
    layouts = list(dict.fromkeys(shapes.values()))
    info = {
        "bases": bases,
        "layouts": layouts,
        "tasks": {task: layouts.index(shape) for task, shape in shapes.items()},
    }
    packed = (pack(task, _flat(parts)) for task, parts in members.items())
    return write_tensors(storage, epoch, COEFFICIENTS, info, dict.fromkeys(members, ("facts", "ef", "sigma")), packed)


def read_coefficients(file: TensorFile, task: str) -> dict[str, TaskBlock]:
    """One task's coefficients per module it adapts. Raises Corrupt."""
    tensors = file.part(task)
    return _unflat(task, task_layout(file.info, task), file.info["bases"], tensors)


def read_all_coefficients(file: TensorFile) -> dict[str, TaskBlock]:
    """Module name to all tasks of a file side by side, in the file's order. Raises Corrupt."""
    info = file.info
    pieces: dict[str, list[TaskBlock]] = {}
    for task, tensors in file.all().items():
        for name, block in _unflat(task, task_layout(info, task), info["bases"], tensors).items():
            pieces.setdefault(name, []).append(block)
    return {name: TaskBlock.joined(blocks) for name, blocks in pieces.items()}


def _flat(parts: Mapping[str, TaskBlock]) -> dict[str, Tensor]:
    """One task's blocks as three vectors: (w, ‖ΔW‖²) per module; E and F; σ."""
    facts = torch.cat([torch.cat([one.weight_T, one.delivered_T]) for one in parts.values()])
    ef = torch.cat([part.reshape(-1) for one in parts.values() for part in (one.e_KS.float(), one.f_KS.float())])
    return {"facts": facts, "ef": ef, "sigma": torch.cat([one.sigma_S for one in parts.values()])}


def _unflat(
    task: str, layout: Sequence[tuple[str, int]], bases: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, TaskBlock]:
    blocks, at, column = {}, 0, 0
    for index, (name, rank) in enumerate(layout):
        k_out, k_in = bases[name]
        middle, end = at + k_out * rank, at + (k_out + k_in) * rank
        blocks[name] = TaskBlock(
            (task,),
            (rank,),
            tensors["ef"][at:middle].reshape(k_out, rank),
            tensors["ef"][middle:end].reshape(k_in, rank),
            tensors["sigma"][column : column + rank],
            tensors["facts"][2 * index : 2 * index + 1],
            tensors["facts"][2 * index + 1 : 2 * index + 2],
        )
        at, column = end, column + rank
    return blocks
