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


@dataclass(frozen=True)
class Frame:
    """Orthonormal directions of both sides, float64, that span an update and the basis.

    Written in it, an update and a basis are as small as the frame has directions, and no long QR is needed to compare
    them. A merge has such a frame at hand.
    """

    out_NJ: Tensor
    inward_DJ: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the module's weight."""
        return int(self.out_NJ.shape[0]), int(self.inward_DJ.shape[0])


def divided(
    frame: Frame,
    update: tuple[Tensor, Tensor],
    basis: tuple[Tensor, Tensor],
    coefficients: tuple[Tensor, Tensor],
    energy_ratio_min: float,
) -> Division:
    """Keep the promise to a task in a module, with the fewest numbers.

    Args:
        update: L and R of ΔW = L·Rᵀ, in the frame: J×R.
        basis: P and Q after the merge, in the frame: J×K, orthonormal.
        coefficients: E = PᵀL and F = QᵀR: K×R.
        energy_ratio_min: The promise: ‖ΔW − ΔŴ‖² is at most (1 − energy_ratio_min)·‖ΔW‖².

    Returns:
        Either the rest of ΔW beside the coefficients, or the whole update as a private part without coefficients,
        whichever stores fewer numbers. Both are truncated SVDs: no private part of a smaller rank would do.

    Cost:
        O(J·(K+R)·R), and O((N+D)·J·R) for the private part.
    """
    (left_JR, right_JR), (p_JK, q_JK), (e_KR, f_KR) = update, basis, coefficients
    whole = thin_svd(left_JR, right_JR)
    allowed = (1 - energy_ratio_min + ROUNDED) * float(whole[1].square().sum())
    # L·Rᵀ − P·E·(Q·F)ᵀ = (L − P·E)·Rᵀ + P·E·(R − Q·F)ᵀ
    inside_JR = p_JK @ e_KR
    rest = thin_svd(
        torch.cat([left_JR - inside_JR, inside_JR], dim=1), torch.cat([right_JR, right_JR - q_JK @ f_KR], dim=1)
    )
    ranks = [_rank_beyond(sigma_R, allowed) for _, sigma_R, _ in (whole, rest)]
    if not ranks[1]:
        return Division(None, False, float(rest[1].square().sum()))
    is_whole = (ranks[0] - ranks[1]) * sum(frame.shape) < e_KR.numel() + f_KR.numel()
    (u_JR, sigma_R, v_JR), rank = (whole, ranks[0]) if is_whole else (rest, ranks[1])
    private = rounded_update(frame.out_NJ @ u_JR[:, :rank], sigma_R[:rank], frame.inward_DJ @ v_JR[:, :rank])
    return Division(private, is_whole, float(sigma_R[rank:].square().sum()))


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


def rank_needed(sigma_R: Tensor, energy_ratio_min: float) -> int:
    """The fewest leading directions of an update that keep a promise."""
    return _rank_beyond(sigma_R, (1 - energy_ratio_min + ROUNDED) * float(sigma_R.square().sum()))


def _rank_beyond(sigma_R: Tensor, allowed: float) -> int:
    """The fewest leading directions beyond which at most `allowed` energy is lost."""
    tail_R = sigma_R.square().flip(0).cumsum(0).flip(0)  # tail_R[i]: lost if i directions are kept
    return int((tail_R > allowed).sum())
