"""Does a subspace hold what its log says? Reads everything, changes nothing.

Checked: the hash chain, the digest of every blob that a version names, orthonormal bases, transports that are the
products of the bases beside them, and every task's error and drift, measured again from the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.errors import Corrupt, InvalidInput, NotFound
from subspace_store import blobs, retention
from subspace_store.adapter import ModuleUpdate, adapter_from_bytes
from subspace_store.merge import ModuleBasis, ModuleSubspace, ModuleTasks
from subspace_store.storage import Storage
from subspace_store.subspace_math import orthonormalise, update_energy
from subspace_store.subspace_store import SubspaceStore
from subspace_store.version import BlobRef, MergedTask, Version
from subspace_store.version_log import VersionLog, to_plain

ERROR_TOLERANCE = 1e-5
"""Relative errors are stored from float64 and measured from float32 coefficients."""

TRANSPORT_TOLERANCE = 1e-9
"""Transports are stored in float64; another machine's BLAS may sum in another order."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the log says."""

    where: str
    what: str


def verify(store: SubspaceStore) -> list[Finding]:
    """Check a subspace as a new reader finds it. An empty list means that everything is as written.

    Cost:
        Reads every record and blob once or twice; one product with the bases per task and version.
    """
    findings = _guarded(store.storage.url, lambda: _verify_log(store.storage))
    if findings:
        return findings
    reader = SubspaceStore.open(store.storage)
    needed, checked = retention.needed(reader.state), set()
    for version in retention.alive(reader.state):
        refs = [needed[ref.key] for ref in version.blobs if ref.key in needed]
        broken = [finding for ref in refs for finding in _verify_blob(reader.storage, ref)]
        findings += broken or _guarded(f"version {version.number}", partial(_verify_version, reader, version))
        checked |= {ref.key for ref in refs}
    # What live versions need of expired ones.
    rest = [ref for key, ref in needed.items() if key not in checked]
    return findings + [finding for ref in rest for finding in _verify_blob(reader.storage, ref)]


def _verify_log(storage: Storage) -> list[Finding]:
    """Fold the log from its first record, and compare with what the newest checkpoint leads to."""
    replayed, opened = VersionLog(storage), VersionLog(storage)
    replayed.refresh()
    opened.open()
    # A writer may be at work: bring both to the same record.
    if to_plain(replayed.refresh()) != to_plain(opened.refresh()) and replayed.state.seq == opened.state.seq:
        return [Finding(f"{storage.url}/checkpoints", "a checkpoint differs from the log it was made of")]
    return []


def _verify_blob(storage: Storage, ref: BlobRef) -> list[Finding]:
    try:
        blobs.read_blob(storage, ref)
    except Corrupt as error:
        return [Finding(error.where, error.what)]
    return []


def _verify_version(reader: SubspaceStore, version: Version) -> list[Finding]:
    after = reader.subspace(version.number)
    findings = _verify_bases(version, {name: module.basis for name, module in after.items()})
    for task in version.added:
        if task.adapter.key not in reader.state.heads:
            findings += _verify_birth(reader.storage, task, after)
    if version.parent in reader.state.expired:  # nothing to compare it with any more
        return findings
    before = reader.subspace(version.parent)
    findings += _verify_transports(reader.storage, version, before, after)
    for task_id, drift in reader.state.drift(version.number).items():
        measured = _relative_change(before, after, task_id)
        if abs(measured - drift) > ERROR_TOLERANCE:
            findings.append(
                Finding(f"version {version.number}", f"task {task_id} drifted {measured:.3e}, the log says {drift:.3e}")
            )
    return findings


def _verify_transports(
    storage: Storage, version: Version, before: Mapping[str, ModuleSubspace], after: Mapping[str, ModuleSubspace]
) -> list[Finding]:
    """R must be P'ᵀP of the two bases; where none was written the bases must be the same."""
    written = blobs.transport_from_bytes(blobs.read_blob(storage, version.transport), version.transport.key)
    findings = []
    for name, module in before.items():
        for side in ("p_NK", "q_DK"):
            old, new = orthonormalise(getattr(module.basis, side)), orthonormalise(getattr(after[name].basis, side))
            product = new.T @ old
            found = getattr(written[name], "out" if side == "p_NK" else "inward") if name in written else None
            expected = torch.eye(old.shape[1], dtype=torch.float64) if found is None else found
            if product.shape != expected.shape or not bool((product - expected).abs().le(TRANSPORT_TOLERANCE).all()):
                findings.append(Finding(f"version {version.number}", f"the transport of {name} does not fit its bases"))
    return findings


def _verify_bases(version: Version, bases: Mapping[str, ModuleBasis]) -> list[Finding]:
    where = f"version {version.number}"
    findings = []
    rank_max = max((max(basis.ranks) for basis in bases.values()), default=0)
    if (len(bases), rank_max) != (version.module_count, version.rank_max):
        text = f"has {len(bases)} modules of rank {rank_max}, the log says {version.module_count} of {version.rank_max}"
        findings.append(Finding(where, text))
    for name, basis in bases.items():
        for energy in (basis.lam_out_K, basis.lam_in_K):
            if not bool(torch.isfinite(energy).all()) or bool((energy < 0).any()):
                findings.append(Finding(where, f"{name} has energies that are negative or not finite"))
    return findings


def _verify_birth(storage: Storage, task: MergedTask, after: Mapping[str, ModuleSubspace]) -> list[Finding]:
    ref = task.adapter
    delivered = adapter_from_bytes(blobs.read_blob(storage, ref), ref.key).modules
    missed = sum(_squared_distance(update, after[name], task.task_id) for name, update in delivered.items())
    energy = sum(update_energy(update) for update in delivered.values())
    measured = math.sqrt(missed / energy) if energy else 0.0
    if abs(measured - task.error_at_birth) > ERROR_TOLERANCE:
        text = f"its error at birth is {measured:.3e}, the log says {task.error_at_birth:.3e}"
        return [Finding(f"task {task.name} ({task.task_id})", text)]
    return []


def _squared_distance(update: ModuleUpdate, module: ModuleSubspace, task_id: str) -> float:
    """‖ΔW − ΔŴ‖²_F without a dense N×D matrix."""
    left_NR, right_DR = _factors(module, task_id)
    return _gram_norm(
        torch.cat([update.u_NR.double() * update.sigma_R.double(), -left_NR], dim=1),
        torch.cat([update.v_DR.double(), right_DR], dim=1),
    )


def _relative_change(before: Mapping[str, ModuleSubspace], after: Mapping[str, ModuleSubspace], task_id: str) -> float:
    moved = delivered = 0.0
    for name, module in before.items():
        if task_id in module.tasks.task_ids:
            (old_left, old_right), (left, right) = _factors(module, task_id), _factors(after[name], task_id)
            moved += _gram_norm(torch.cat([old_left, -left], dim=1), torch.cat([old_right, right], dim=1))
            delivered += float(module.tasks.only(task_id).delivered_T[0])
    return math.sqrt(moved / delivered) if delivered else 0.0


def _factors(module: ModuleSubspace, task_id: str) -> tuple[Tensor, Tensor]:
    one: ModuleTasks = module.tasks.only(task_id)
    return orthonormalise(module.basis.p_NK) @ one.e_KS, orthonormalise(module.basis.q_DK) @ one.f_KS


def _gram_norm(left_NC: Tensor, right_DC: Tensor) -> float:
    """‖L·Rᵀ‖²_F through QR: Gram matrices would cancel to √1e-16."""
    core = torch.linalg.qr(left_NC, mode="r").R @ torch.linalg.qr(right_DC, mode="r").R.T
    return float(core.square().sum())


def _guarded(where: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A damaged object is a finding, not the end of the check."""
    try:
        return check()
    except (Corrupt, NotFound, InvalidInput) as error:
        return [Finding(error.where or where, error.what)]
