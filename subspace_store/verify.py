"""Does a subspace hold what its log says? Reads everything, changes nothing.

Checked: the hash chain, the digest of every blob that a version names, orthonormal bases, transports that are the
products of the bases beside them, and every task's error and drift, measured again from the tensors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from configs.errors import Corrupt, InvalidInput, NotFound
from subspace_store.adapter import ModuleUpdate, adapter_from_bytes
from subspace_store.files import blobs
from subspace_store.files.presence import missing
from subspace_store.files.tensor_file import TensorFile
from subspace_store.files.version_heads import TRANSPORT
from subspace_store.log import retention
from subspace_store.log.fold import to_plain
from subspace_store.log.version import BlobRef, SubspaceState, Version
from subspace_store.log.version_log import VersionLog
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
from subspace_store.merging.coefficients import Transport
from subspace_store.merging.subspace_math import orthonormalise, update_energy
from subspace_store.module_names import is_renewed, plain, renewed
from subspace_store.storage.protocol import Storage
from subspace_store.subspace_reader import SubspaceReader

ERROR_TOLERANCE = 1e-5
"""Relative errors are stored from float64 and measured from float32 coefficients."""

TRANSPORT_TOLERANCE = 1e-6
"""Transports belong to the bases before they were rounded to float32."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the log says."""

    where: str
    what: str
    of: str = ""
    """What the object at `where` holds, and of which version or task; empty where that is not known."""


def verify(store: SubspaceReader, deep: bool = True) -> list[Finding]:
    """Check a subspace as a new reader finds it. An empty list means that everything is as written.

    Args:
        deep: False checks the chain of the log, and that every object which a live version needs is there and has
            its size.

    Cost:
        Reads every record and blob once or twice; one product with the bases for each task and version that changed
        them. Not deep: every record and one byte of each blob.
    """
    findings = _guarded(store.storage.url, lambda: _verify_log(store.storage))
    if findings:
        return findings
    reader = SubspaceReader.open(store.storage)
    check = _verify_objects if deep else _verify_sizes
    holds = {f"{store.storage.url}/{key}": what for key, what in _contents(reader.state).items()}
    # A damaged object is met once more by each version that needs it.
    return list(dict.fromkeys(replace(found, of=holds.get(found.where, "")) for found in check(reader)))


def _contents(state: SubspaceState) -> dict[str, str]:
    """Key of each object that a version names to what it holds, for people."""
    held: dict[str, str] = {}
    for number, version in state.versions.items():
        named = [(version.basis, "the bases"), (version.transport, "the transports"), (version.snapshot, "a snapshot")]
        found = [(ref, f"{what} of version {number}") for ref, what in named]
        for task in version.brought:
            found += [
                (task.adapter, f"the adapter of {task.name} as it was delivered"),
                (task.coefficients, f"the coefficients of the tasks of version {number}"),
                (task.private, f"the private part of {task.name}, of version {number}"),
            ]
        for ref, what in found:
            if ref is not None:
                held.setdefault(ref.key, what)
    return held | {ref.key: "the head of an adapter that was given up" for ref in state.heads.values()}


def _verify_sizes(reader: SubspaceReader) -> list[Finding]:
    needed = retention.needed(reader.state).values()
    return [Finding(error.where, error.what) for error in missing(reader.storage, needed)]


def _verify_objects(reader: SubspaceReader) -> list[Finding]:
    findings: list[Finding] = []
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
    whole, folded = replayed.refresh(), opened.refresh()
    # Checkpoints of before 0.4 did not keep what was asked under a key; what they keep must agree.
    whole = replace(whole, asked={key: asked for key, asked in whole.asked.items() if key in folded.asked})
    if to_plain(whole) != to_plain(folded) and whole.seq == folded.seq:
        return [Finding(f"{storage.url}/checkpoints", "a checkpoint differs from the log it was made of")]
    return []


def _verify_blob(storage: Storage, ref: BlobRef) -> list[Finding]:
    try:
        blobs.check_blob(storage, ref)
    except Corrupt as error:
        return [Finding(error.where, error.what)]
    return []


def _verify_version(reader: SubspaceReader, version: Version) -> list[Finding]:
    """Everything about one version that can be measured again, one module at a time."""
    where = f"version {version.number}"
    ranks = reader.ranks(version.number)
    modules = sorted({*map(plain, ranks)})
    found = len(modules), sum(map(is_renewed, ranks)), max((max(pair) for pair in ranks.values()), default=0)
    logged = version.module_count, version.renewed_count, version.rank_max
    findings = []
    if found != logged:
        text = "has {} modules, {} of them with a renewed basis, of rank {}, the log says {}, {} and {}"
        findings.append(Finding(where, text.format(*found, *logged)))
    born = {task.task_id: task for task in version.brought if task.adapter.key not in reader.state.heads}
    delivered = {id_: adapter_from_bytes(blobs.read_blob(reader.storage, t.adapter), t.name) for id_, t in born.items()}
    # Nothing to compare it with once the parent has expired.
    parent = None if version.parent in reader.state.expired else version.parent
    before_ranks = reader.ranks(parent) if parent else {}
    file = None if version.transport is None else TensorFile(reader.storage, version.transport, TRANSPORT)
    written = {} if file is None else blobs.read_transports(file)
    # They are other adapters now, or none: no drift to be measured.
    replaced = {*version.left, *(task.task_id for task in version.refined)}
    held_now = reader.state.tasks_at(version.number)
    missed, energy, private = dict.fromkeys(born, 0.0), defaultdict[str, float](float), Counter[str]()
    moved = dict.fromkeys(reader.state.tasks_at(version.parent), 0.0)
    brought = [task.task_id for task in version.brought]
    homes, before_homes = reader.homes(version.number), reader.homes(parent) if parent else {}
    for module in modules:
        names = [name for name in (module, renewed(module)) if name in ranks]
        both = [_orthonormal(reader.module(name, version.number, brought)) for name in names]
        for id_, update in both[0].private.items():
            private[id_] += update.numbers
        twice = Counter(id_ for one in both for id_ in one.tasks.task_ids)
        findings += [
            Finding(where, f"{module} has coefficients of task {id_}, which the version does not hold")
            for id_ in twice
            if id_ not in held_now
        ]
        findings += [
            Finding(where, f"task {id_} has coefficients in both bases of {module}") for id_ in twice if twice[id_] > 1
        ]
        for id_, adapter in delivered.items():
            if module in adapter.modules:
                missed[id_] += _squared_distance(adapter.modules[module], both, id_)
                energy[id_] += update_energy(adapter.modules[module])
        for name, after in zip(names, both, strict=True):
            findings += [Finding(where, f"{name} {what}") for what in _energies(after.basis)]
            # Where the version wrote nothing of a basis, earlier tasks are what they were, by the same bytes.
            is_as_before = homes[name] == before_homes.get(name) and name not in written and version.snapshot is None
            if name not in before_ranks or is_as_before:
                continue
            before = _orthonormal(reader.module(name, parent, ()))
            if not _fits(written.get(name), before.basis, after.basis):
                findings.append(Finding(where, f"the transport of {name} does not fit its bases"))
            for id_ in before.tasks.task_ids:
                if id_ in replaced:
                    continue
                one, other = _dense_factors([before], id_), _dense_factors([after], id_)
                moved[id_] += _gram_norm(torch.cat([one[0], -other[0]], dim=1), torch.cat([one[1], other[1]], dim=1))
    for task in version.brought:
        if private[task.task_id] != task.private_count:
            counted = f"has {private[task.task_id]} numbers in private parts, the log says {task.private_count}"
            findings.append(Finding(where, f"task {task.name} {counted}"))
    for id_, task in born.items():
        findings += _differs(
            f"task {task.name} ({id_})", "its error at birth is", missed[id_], energy[id_], task.error_at_birth
        )
    if parent is not None:
        held = reader.state.tasks_at(parent)
        for id_, drift in reader.state.drift(version.number).items():
            if id_ not in replaced:
                whole = held[id_].delivered_energy
                findings += _differs(where, f"task {id_} drifted", moved[id_], whole, drift)
    return findings


def _orthonormal(module: ModuleSubspace) -> ModuleSubspace:
    """The module with the float64 bases that the stored float32 ones stand for."""
    basis = module.basis
    return replace(module, basis=replace(basis, p_NK=orthonormalise(basis.p_NK), q_DK=orthonormalise(basis.q_DK)))


def _energies(basis: ModuleBasis) -> Iterator[str]:
    for energy in (basis.lam_out_K, basis.lam_in_K):
        if not bool(torch.isfinite(energy).all()) or bool((energy < 0).any()):
            yield "has energies that are negative or not finite"


def _fits(written: Transport | None, before: ModuleBasis, after: ModuleBasis) -> bool:
    """Check that R is P'ᵀP of the two bases; where no R was written the bases must be the same."""
    sides = (
        (before.p_NK, after.p_NK, None if written is None else written.out),
        (before.q_DK, after.q_DK, None if written is None else written.inward),
    )
    for old, new, found in sides:
        product = new.T @ old
        expected = torch.eye(old.shape[1], dtype=torch.float64) if found is None else found
        if product.shape != expected.shape or not bool((product - expected).abs().le(TRANSPORT_TOLERANCE).all()):
            return False
    return True


def _differs(where: str, what: str, energy: float, delivered: float, logged: float) -> list[Finding]:
    measured = math.sqrt(energy / delivered) if delivered else 0.0
    if abs(measured - logged) <= ERROR_TOLERANCE:
        return []
    return [Finding(where, f"{what} {measured:.3e}, the log says {logged:.3e}")]


def _squared_distance(update: ModuleUpdate, bases: Sequence[ModuleSubspace], task_id: str) -> float:
    """‖ΔW − ΔŴ‖²_F without a dense N×D matrix; `bases`: all of one module, the first one with the private parts."""
    left_NR, right_DR = _dense_factors(bases, task_id)
    lefts, rights = [update.u_NR.double() * update.sigma_R.double(), -left_NR], [update.v_DR.double(), right_DR]
    if (rest := bases[0].private.get(task_id)) is not None:
        lefts.append(-rest.u_NR.double() * rest.sigma_R.double())
        rights.append(rest.v_DR.double())
    return _gram_norm(torch.cat(lefts, dim=1), torch.cat(rights, dim=1))


def _dense_factors(bases: Sequence[ModuleSubspace], task_id: str) -> tuple[Tensor, Tensor]:
    """P·E and Q·F of one task, in the one of these bases of a module that holds it."""
    for module in bases:
        if (one := module.tasks.only((task_id,))) is not None:
            return module.basis.p_NK @ one.e_KS, module.basis.q_DK @ one.f_KS
    if task_id not in bases[0].private:
        raise Corrupt("its coefficients are gone", f"task {task_id}")
    n, d = bases[0].basis.shape
    return torch.zeros(n, 0, dtype=torch.float64), torch.zeros(d, 0, dtype=torch.float64)


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
