"""The linear algebra of one module's subspace: pure functions on tensors, nothing stored, nothing remembered.

Axes: N outputs of a module (D inputs are the other side, same functions), K directions of the basis before,
J directions of a basis after, C new columns, F directions that they add, S coefficient columns of all tasks side by
side, T tasks, R rank.
Everything is computed in float64 on the CPU; only what is stored is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_store.adapter import ModuleUpdate

ROUNDING = 1e-6
"""Share of an update's norm below which its part outside a basis is float32 rounding, not information. Rounding is 6e-8
of the adapter itself, and 8e-7 of a basis that was rounded at each of 300 merges (measured 2026-11-21). Other tasks do
not count: an update that is 1e-8 times as large as theirs is information as well."""

SLACK = 1e-12
"""Relative difference below which two energies count as equal: ROUNDING squared. Sums of float64 squares in different
orders differ by far less."""

SMALLEST_NORM = torch.finfo(torch.float32).tiny
"""Smallest norm of an update that is not rounding: the weight of a smaller one would not be a float32."""

TASKS_PER_CHUNK = 128
"""Tasks whose K×K energy tables are held at once; 128 tables of 64×64 doubles are 4 MiB."""


def orthonormalise(basis_NK: Tensor) -> Tensor:
    """The float64 basis that a stored float32 one stands for: Gram-Schmidt in column order, by Cholesky.

    Rounding to float32 leaves PᵀP = 1 + O(1e-7), and energies computed with that would be wrong by 1e-7 of
    themselves: a drift of √1e-7 = 3e-4 that never happened. This is a fixed function of the stored bytes, so
    every process that opens a version works with the same basis.

    Args:
        basis_NK: Columns that are orthonormal to about 1e-6.

    Returns:
        Orthonormal float64 columns of the same span; the leading columns span what the leading columns spanned.

    Cost:
        2NK².
    """
    columns_NK = basis_NK.double()
    if columns_NK.shape[1] == 0:
        return columns_NK
    lower_KK = torch.linalg.cholesky(columns_NK.T @ columns_NK)
    result: Tensor = torch.linalg.solve_triangular(lower_KK.T, columns_NK, upper=True, left=False)
    return result


@dataclass(frozen=True)
class Extension:
    """A basis after columns were added, strongest direction first."""

    directions_NJ: Tensor
    """Orthonormal columns, float64."""
    energy_J: Tensor
    """Squared singular values of all merged updates, the new ones included."""
    transport_JK: Tensor
    """The old basis in the new directions: directionsᵀ·basis."""

    def ordered(self, places_J: Tensor) -> Extension:
        """The same directions in another order."""
        return Extension(self.directions_NJ[:, places_J], self.energy_J[places_J], self.transport_JK[places_J])


def extend_basis(
    basis_NK: Tensor, energy_K: Tensor, columns_NC: Tensor, size_C: Tensor, *, stays: bool = False
) -> Extension:
    """Left singular vectors of [P·√λ, X] without forming more than a (K+C)×(K+C) core.

    Args:
        basis_NK: Orthonormal, float64.
        energy_K: λ, the squared singular values of everything merged before.
        columns_NC: X, the weighted columns that arrive, float64.
        size_C: Norm of the update that each column belongs to; rounding is relative to it, see `ROUNDING`.
        stays: Whether the basis is wanted as it is, with what the columns add after it, strongest first.

    Returns:
        J ≤ K + C directions that span the basis and, of each column, everything above its rounding.

    Cost:
        O(N·(K+C)² + (K+C)³), independent of the number of earlier merges.

    Source:
        M. Brand, Fast low-rank modifications of the thin singular value decomposition (2006), sections 2–3.
    """
    count_K = len(energy_K)
    projected_KC = basis_NK.T @ columns_NC
    residual_NC = columns_NC - basis_NK @ projected_KC
    # Project once more: a column that lies almost inside the span leaves a residual that is mostly rounding.
    again_KC = basis_NK.T @ residual_NC
    projected_KC, residual_NC = projected_KC + again_KC, residual_NC - basis_NK @ again_KC
    # Each column relative to its update's norm, so that a large update does not hide what a small one adds.
    size_C = torch.where(size_C > 0, size_C, torch.ones_like(size_C))
    fresh_NC, triangle_CC = torch.linalg.qr(residual_NC / size_C)
    fresh_CF, share_F, _ = torch.linalg.svd(triangle_CC, full_matrices=False)
    fresh_CF = fresh_CF[:, share_F > ROUNDING]
    core = triangle_CC.new_zeros(count_K + fresh_CF.shape[1], count_K + columns_NC.shape[1])
    core[:count_K, :count_K].diagonal().copy_(energy_K.clamp(min=0).sqrt())
    core[:count_K, count_K:] = projected_KC
    core[count_K:, count_K:] = fresh_CF.T @ triangle_CC * size_C
    if core.numel() == 0:
        return Extension(basis_NK, energy_K, torch.eye(count_K, dtype=basis_NK.dtype))
    if stays:
        fresh_FF, sigma_F, _ = torch.linalg.svd(core[count_K:], full_matrices=False)
        turn_JJ = torch.eye(len(core), dtype=core.dtype)
        turn_JJ[count_K:, count_K:] = fresh_FF
        energy_J = torch.cat([core[:count_K].square().sum(dim=1), sigma_F.square()])
    else:
        turn_JJ, sigma_J, _ = torch.linalg.svd(core, full_matrices=False)
        energy_J = sigma_J.square()
    # Transposed: a basis lies in memory column by column (`orthonormalise`), and this product takes half the time.
    fresh_JC = (fresh_CF @ turn_JJ[count_K:]).T
    directions_JN = torch.addmm(fresh_JC @ fresh_NC.T, turn_JJ[:count_K].T, basis_NK.T)
    return Extension(directions_JN.T, energy_J, turn_JJ[:count_K].T)


def update_energy(update: ModuleUpdate) -> float:
    """‖U·diag(σ)·Vᵀ‖²_F of the float32 factors as they are, not as if they were exactly orthonormal."""
    left_NR = update.u_NR.double() * update.sigma_R.double()
    return float(((left_NR.T @ left_NR) * (update.v_DR.double().T @ update.v_DR.double())).sum())


def weight(update: ModuleUpdate, weighting: str) -> float:
    """Weight w of a task's columns among those of all tasks; 1 for an update that is zero in float32, which has no
    direction to protect.

    Args:
        weighting: See `SubspaceSettings`.
    """
    energy = update_energy(update)
    return 1.0 if weighting == "energy" or energy < SMALLEST_NORM**2 else 1 / math.sqrt(energy)


def kept_energy(e_KS: Tensor, f_KS: Tensor, ranks: Sequence[int]) -> Tensor:
    """‖E_i·F_iᵀ‖²_F of every task, float64.

    Cost:
        O(K·S·R) in one batch: tr(EᵀE·FᵀF) needs only R×R Gram matrices.
    """
    e_TRK, f_TRK = by_task(e_KS, ranks), by_task(f_KS, ranks)
    return ((e_TRK @ e_TRK.mT) * (f_TRK @ f_TRK.mT)).sum(dim=(1, 2))


def choose_ranks(
    e_JS: Tensor,
    f_JS: Tensor,
    ranks: Sequence[int],
    delivered_T: Tensor,
    promised_T: Tensor,
    *,
    rank_max: int,
    cost: tuple[int, int],
) -> tuple[int, int]:
    """How many leading directions each side keeps.

    Each task must keep min(promised, what rank_max directions per side can hold). So a task that rank_max has already
    taken below its share in an earlier merge loses more only where rank_max forces it again.

    Args:
        e_JS, f_JS: Coefficients of all tasks in the full bases after the merge, strongest direction first.
        ranks: Rank of each task; they add up to S.
        delivered_T: ‖ΔW_i‖²_F of each task in this module.
        promised_T: Energy that each is promised, of what it was delivered; infinite: all that it has.
        cost: Count of numbers that one direction of each side stores: (N, D).

    Returns:
        The (k_out, k_in) that is allowed and stores the fewest numbers, N·k_out + D·k_in.

    Cost:
        2·T·J²·R, J ≤ rank_max: the energies for every (k_out, k_in) at once are a two-dimensional running sum.
    """
    e_KS, f_KS = e_JS[:rank_max], f_JS[:rank_max]
    worst: Tensor | None = None
    for kept_TKK, some in _kept_tables(e_KS, f_KS, ranks):
        delivered_t = delivered_T[some]
        required_T = torch.minimum(kept_TKK[:, -1, -1], promised_T[some])
        scale_T = torch.where(delivered_t > 0, delivered_t, torch.ones_like(delivered_t))
        spare_KK = ((kept_TKK - required_T[:, None, None]) / scale_T[:, None, None]).amin(dim=0)
        worst = spare_KK if worst is None else torch.minimum(worst, spare_KK)
    if worst is None:
        return len(e_KS), len(f_KS)
    price_KK = cost[0] * torch.arange(len(e_KS) + 1)[:, None] + cost[1] * torch.arange(len(f_KS) + 1)[None, :]
    allowed_KK = torch.where(worst >= -SLACK, price_KK.double(), torch.inf)
    k_out, k_in = divmod(int(allowed_KK.argmin()), len(f_KS) + 1)
    return k_out, k_in


def canonical_in_basis(p_NK: Tensor, q_DK: Tensor, e_KR: Tensor, f_KR: Tensor) -> ModuleUpdate:
    """P·E·Fᵀ·Qᵀ as U·diag(σ)·Vᵀ, rank min(K_out, K_in, R), float32.

    Cost:
        O((N+D)·K·R): the SVD is of an R×R core.
    """
    u_KR, sigma_R, v_KR = thin_svd(e_KR, f_KR)
    return rounded_update(p_NK @ u_KR, sigma_R, q_DK @ v_KR)


def thin_svd(left_NC: Tensor, right_DC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ and V of L·Rᵀ, which is never formed. O((N+D)·C²)."""
    q_out, r_out = torch.linalg.qr(left_NC)
    q_in, r_in = torch.linalg.qr(right_DC)
    u, sigma_R, vt = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return q_out @ u, sigma_R, q_in @ vt.T


def weighted_sum(updates: Sequence[ModuleUpdate], weights: Sequence[float]) -> ModuleUpdate:
    """Σ w·ΔW in canonical form, from the factors side by side, never dense."""
    left_NC = torch.cat([w * (u.u_NR.double() * u.sigma_R.double()) for w, u in zip(weights, updates, strict=True)], 1)
    return rounded_update(*thin_svd(left_NC, torch.cat([u.v_DR.double() for u in updates], dim=1)))


def rounded_update(u_NR: Tensor, sigma_R: Tensor, v_DR: Tensor) -> ModuleUpdate:
    """U·diag(σ)·Vᵀ as a file holds it: float32."""
    return ModuleUpdate(*(part.float().contiguous() for part in (u_NR, sigma_R, v_DR)))


def _kept_tables(e_KS: Tensor, f_KS: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, slice]]:
    """For each chunk of tasks: table[i, a, b] = energy of task i in the leading a and b directions; their places."""
    column = 0
    for first in range(0, len(ranks), TASKS_PER_CHUNK):
        chunk = ranks[first : first + TASKS_PER_CHUNK]
        columns = slice(column, column + sum(chunk))
        column = columns.stop
        e_TRK, f_TRK = by_task(e_KS[:, columns], chunk), by_task(f_KS[:, columns], chunk)
        squares_TKK = (e_TRK.mT @ f_TRK).square()
        kept_TKK = squares_TKK.new_zeros(len(chunk), len(e_KS) + 1, len(f_KS) + 1)
        kept_TKK[:, 1:, 1:] = squares_TKK.cumsum(dim=1).cumsum(dim=2)
        yield kept_TKK, slice(first, first + len(chunk))


def by_task(stack_KS: Tensor, ranks: Sequence[int]) -> Tensor:
    """Columns side by side as T×R×K, tasks of smaller rank filled with zero rows."""
    if len(set(ranks)) == 1:
        return stack_KS.T.reshape(len(ranks), ranks[0], stack_KS.shape[0])
    ranks_T = torch.tensor(list(ranks), dtype=torch.long)
    task_S = torch.repeat_interleave(torch.arange(len(ranks)), ranks_T)
    slot_S = torch.arange(len(task_S)) - (ranks_T.cumsum(0) - ranks_T)[task_S]
    padded_TRK = stack_KS.new_zeros(len(ranks), max(ranks, default=0), stack_KS.shape[0])
    padded_TRK[task_S, slot_S] = stack_KS.T
    return padded_TRK
