"""A task's private part: what of its update the shared basis does not hold, kept for this task alone.

ΔŴ = P·E·Fᵀ·Qᵀ + U·diag(σ)·Vᵀ. A merge that has no room for a task's directions, or would have to take them from
another task, puts what is missing into the private part. No later merge touches it, so no later merge can take it.

Axes: N outputs of a module, D inputs, K directions, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_store.adapter import ModuleUpdate
from subspace_store.merging.subspace_math import rounded_update, thin_svd, weighted_sum

ROUNDED = 1e-10
"""Share of an update's energy that the rounding of bases and coefficients to float32 may take without breaking a
promise: an error of 1e-5, ten times what it takes."""


@dataclass(frozen=True)
class Division:
    """How one module of a new task is divided between the shared basis and the task itself."""

    update: ModuleUpdate | None
    """The private part; None: the basis holds enough."""
    is_whole: bool
    """Whether the private part is the whole update, so that the task needs no coefficients in this module."""
    missed: float
    """‖ΔW − ΔŴ‖²_F with the private part."""


def divided(
    left_NR: Tensor, right_DR: Tensor, p_NK: Tensor, q_DK: Tensor, e_KR: Tensor, f_KR: Tensor, energy_ratio_min: float
) -> Division:
    """Keep the promise to a task in a module, with the fewest numbers.

    Args:
        left_NR, right_DR: L·Rᵀ = ΔW, float64.
        p_NK, q_DK: The bases after the merge, orthonormal, float64.
        e_KR, f_KR: PᵀL and QᵀR.
        energy_ratio_min: The promise: ‖ΔW − ΔŴ‖² is at most (1 − energy_ratio_min)·‖ΔW‖².

    Returns:
        Either the rest of ΔW beside the coefficients, or the whole update as a private part without coefficients,
        whichever stores fewer numbers. Both are truncated SVDs: no private part of a smaller rank would do.

    Cost:
        O((N+D)·R²).
    """
    u_NR, sigma_R, v_DR = thin_svd(left_NR, right_DR)
    delivered = float(sigma_R.square().sum())
    allowed = (1 - energy_ratio_min + ROUNDED) * delivered
    # L·Rᵀ − P·E·(Q·F)ᵀ = (L − P·E)·Rᵀ + P·E·(R − Q·F)ᵀ
    inside_NR = p_NK @ e_KR
    rest = thin_svd(
        torch.cat([left_NR - inside_NR, inside_NR], dim=1), torch.cat([right_DR, right_DR - q_DK @ f_KR], dim=1)
    )
    missed = float(rest[1].square().sum())
    if missed <= allowed:
        return Division(None, False, missed)
    beside, beside_missed = _truncated(*rest, allowed)
    whole, whole_missed = _truncated(u_NR, sigma_R, v_DR, allowed)
    coefficients = e_KR.numel() + f_KR.numel()
    if private_numbers(whole) < private_numbers(beside) + coefficients:
        return Division(whole, True, whole_missed)
    return Division(beside, False, beside_missed)


def with_private(shared: ModuleUpdate | None, private: ModuleUpdate | None) -> ModuleUpdate:
    """The sum of what the basis holds of a task and its private part, in canonical form. At least one is given.

    Cost:
        O((N+D)·R²).
    """
    if shared is None or private is None:
        one = shared or private
        assert one is not None
        return one
    return weighted_sum((shared, private), (1.0, 1.0))


def private_numbers(update: ModuleUpdate) -> int:
    """Numbers that a private part stores: U·diag(σ) and V, as two factors."""
    return update.rank * sum(update.shape)


def _truncated(u_NR: Tensor, sigma_R: Tensor, v_DR: Tensor, allowed: float) -> tuple[ModuleUpdate, float]:
    """The fewest leading directions beyond which at most `allowed` is lost, and what is lost."""
    tail_R = sigma_R.square().flip(0).cumsum(0).flip(0)  # tail_R[i]: lost if i directions are kept
    rank = int((tail_R > allowed).sum())
    lost = float(tail_R[rank]) if rank < len(tail_R) else 0.0
    return rounded_update(u_NR[:, :rank], sigma_R[:rank], v_DR[:, :rank]), lost
