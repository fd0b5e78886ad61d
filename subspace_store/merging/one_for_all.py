"""One update for all tasks: what each known way makes of theirs, module by module. Pure.

What turns with the axes (mean, task arithmetic, TSV, Iso-C) is computed in the tasks' common basis, where a module's
update is a small core M_i, ΔW_i = P·M_i·Qᵀ: the result is that of the full matrices, which are never formed. What looks
at single entries depends on the axes: TIES and DARE look at those of ΔW, as published; `core_ties` at those of the
cores, as Core Space does.

Axes: N outputs, D inputs, R rank, K directions of the common basis, T tasks.

Source:
    TIES: Yadav et al., NeurIPS 2023. DARE: Yu et al., ICML 2024. TSV-M: Gargiulo et al., CVPR 2025. Iso-C: Marczak et
    al., ICML 2025. Core Space: Panariello et al., NeurIPS 2025.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_store.adapter import ModuleUpdate
from subspace_store.merging.subspace_math import rounded_update, weighted_sum

TIES_DENSITY = 0.2
"""Share of the entries that a task keeps, by magnitude, and a factor of 1 afterwards: Yadav et al., TIES-Merging
(NeurIPS 2023), for when no validation set is at hand."""

TASK_ARITHMETIC_FACTOR = 0.4
"""λ of the sum. Ilharco et al., Editing models with task arithmetic (ICLR 2023) tune it and find 0.3 to 0.5 good;
0.4 is what TIES-Merging quotes as their recommendation without a validation set."""

DARE_DROP = 0.9
"""Share of the entries that DARE drops by chance; what is left is divided by 1 − 0.9. The largest that its authors find
without loss on small models. The draw is a fixed one for each task's place."""

SMALLEST = 1e-9
"""Singular value, relative to the largest, below which a direction is rounding."""

OneForAll = Callable[[Sequence[ModuleUpdate]], ModuleUpdate]


@dataclass(frozen=True)
class Cores:
    """All tasks' updates of one module in their common basis, float64."""

    p_NK: Tensor
    q_DK: Tensor
    m_TKK: Tensor
    """ΔW_i = P·M_i·Qᵀ, exact to float64."""

    def update(self, m_KK: Tensor) -> ModuleUpdate:
        """P·M·Qᵀ in canonical form, without the directions that are rounding."""
        u_KR, sigma_R, vt_RK = torch.linalg.svd(m_KK, full_matrices=False)
        kept = max(1, int((sigma_R > SMALLEST * sigma_R.max()).sum()))
        return rounded_update(self.p_NK @ u_KR[:, :kept], sigma_R[:kept], self.q_DK @ vt_RK[:kept].T)


def cores(updates: Sequence[ModuleUpdate]) -> Cores:
    """The common basis of some updates, and each of them in it. Its axes are the directions of most energy in all of
    them together, strongest first, so that they are the same whatever B and A the updates were.

    Cost:
        O((N+D)·C²), C the sum of their ranks, or of N and D where that is less: one SVD of each side.
    """
    p_NK, q_DK = (
        _span([getattr(update, side).double() * update.sigma_R.double() for update in updates])
        for side in ("u_NR", "v_DR")
    )
    m_TKK = torch.stack(
        [(p_NK.T @ (u.u_NR.double() * u.sigma_R.double())) @ (q_DK.T @ u.v_DR.double()).T for u in updates]
    )
    return Cores(p_NK, q_DK, m_TKK)


def _span(columns: Sequence[Tensor]) -> Tensor:
    u_NK, sigma_K, _ = torch.linalg.svd(torch.cat(list(columns), dim=1), full_matrices=False)
    kept = max(1, int((sigma_K > SMALLEST * sigma_K.max()).sum()))
    span_NK: Tensor = u_NK[:, :kept]
    return span_NK


def mean(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """(1/T)·Σ ΔW_i."""
    return weighted_sum(updates, [1 / len(updates)] * len(updates))


def task_arithmetic(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """λ·Σ ΔW_i."""
    return weighted_sum(updates, [TASK_ARITHMETIC_FACTOR] * len(updates))


def ties(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """Trim, elect signs, disjoint mean, on ΔW: B and A are not unique, so their single entries have no meaning. Forms
    three matrices at a time."""
    return _dense(_elected(len(updates), lambda place: updates[place].delta().float()))


def core_ties(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """The same on the entries of the cores, whose axes are the directions that the tasks have in common."""
    shared = cores(updates)
    return shared.update(_elected(len(updates), lambda place: shared.m_TKK[place]))


def dare(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """The mean of what is left of each ΔW when most entries were dropped by chance and the others enlarged."""
    total_ND = torch.zeros(updates[0].shape)
    for place, update in enumerate(updates):
        draw = torch.Generator().manual_seed(zlib.crc32(f"dare {place} of {tuple(update.shape)}".encode()))
        kept_ND = torch.rand(tuple(update.shape), generator=draw) >= DARE_DROP
        total_ND += update.delta().float() * kept_ND / (1 - DARE_DROP)
    return _dense(total_ND / len(updates))


def tsv(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """Σ of all tasks' singular triples, the vectors of each side made orthonormal first, so that none is counted twice.
    Each task keeps its largest min(N, D)/T."""
    most = max(1, min(updates[0].shape) // len(updates))
    led = [update.leading(min(most, update.rank)) for update in updates]
    shared, sigma_C = cores(led), torch.cat([update.sigma_R.double() for update in led])
    left_KC, right_KC = (
        _orthonormal(basis.T @ torch.cat([getattr(update, side).double() for update in led], dim=1))
        for basis, side in ((shared.p_NK, "u_NR"), (shared.q_DK, "v_DR"))
    )
    return shared.update((left_KC * sigma_C) @ right_KC.T)


def iso_c(updates: Sequence[ModuleUpdate]) -> ModuleUpdate:
    """Σ ΔW_i with all its singular values replaced by their mean: no task's directions count more than another's. The
    mean is over the directions that the sum has; the published one is of full fine-tuning, where it has all."""
    shared = cores(updates)
    u_KR, sigma_R, vt_RK = torch.linalg.svd(shared.m_TKK.sum(dim=0), full_matrices=False)
    has_R = sigma_R > SMALLEST * sigma_R.max()
    if not bool(has_R.any()):
        return shared.update(shared.m_TKK.sum(dim=0))
    alike_R = sigma_R[has_R].mean().expand(int(has_R.sum()))
    # In the order that they had: what is cut off for a smaller rank is what the sum had least of.
    return rounded_update(shared.p_NK @ u_KR[:, has_R], alike_R, shared.q_DK @ vt_RK[has_R].T)


ONE_FOR_ALL: Mapping[str, OneForAll] = {
    "mean": mean,
    "ties": ties,
    "task_arithmetic": task_arithmetic,
    "dare": dare,
    "tsv": tsv,
    "iso_c": iso_c,
    "core_ties": core_ties,
}
"""Name of each way to what it makes of the updates of one module, at least one."""


def _orthonormal(columns_KC: Tensor) -> Tensor:
    """The matrix with orthonormal columns, or rows where there are more columns than rows, nearest to a matrix."""
    u, _, vt = torch.linalg.svd(columns_KC, full_matrices=False)
    nearest_KC: Tensor = u @ vt
    return nearest_KC


def _elected(count: int, delta_of: Callable[[int], Tensor]) -> Tensor:
    """Of trimmed matrices the mean of the entries whose sign is that of the sum, over those that have one there.

    Args:
        delta_of: Makes one of `count` matrices, twice.
    """
    total: Tensor = sum((_trimmed(delta_of(place)) for place in range(1, count)), _trimmed(delta_of(0)))
    agreeing, number = torch.zeros_like(total), torch.zeros_like(total)
    for place in range(count):
        delta = _trimmed(delta_of(place))
        agrees = delta * total > 0
        agreeing += delta * agrees
        number += agrees
    return agreeing / number.clamp(min=1)


def _trimmed(delta: Tensor) -> Tensor:
    """A matrix with its entries of largest magnitude only."""
    dropped = delta.numel() - max(1, round(TIES_DENSITY * delta.numel()))
    if not dropped:
        return delta
    threshold = delta.abs().flatten().kthvalue(dropped).values
    return torch.where(delta.abs() > threshold, delta, torch.zeros_like(delta))


def _dense(delta_ND: Tensor) -> ModuleUpdate:
    u_NR, sigma_R, vt_RD = torch.linalg.svd(delta_ND, full_matrices=False)
    return ModuleUpdate(u_NR, sigma_R, vt_RD.T)
