"""One update for all tasks, by each way against the same written down naively on full matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from subspace_store.adapter import ModuleUpdate, canonical_update
from subspace_store.merging import one_for_all
from subspace_store.merging.one_for_all import DARE_DROP, ONE_FOR_ALL, cores
from tests.subspace_store.builders import random_adapter

SHAPE = (24, 18)
UPDATES = [random_adapter(n, rank=r, shapes={"m": SHAPE}).modules["m"] for n, r in enumerate((2, 3, 4))]
"""Nine directions of at most 18."""
DELTAS = torch.stack([update.delta().double() for update in UPDATES])


def polar(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def naive_tsv() -> Tensor:
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in DELTAS]
    led = [slice(min(min(SHAPE) // len(DELTAS), int((s > 1e-6).sum()))) for _, s, _ in parts]
    left = torch.cat([u[:, some] for (u, _, _), some in zip(parts, led, strict=True)], dim=1)
    right = torch.cat([vt[some].T for (_, _, vt), some in zip(parts, led, strict=True)], dim=1)
    sigma = torch.cat([s[some] for (_, s, _), some in zip(parts, led, strict=True)])
    return polar(left) @ torch.diag(sigma) @ polar(right).T


def naive_iso_c() -> Tensor:
    u, sigma, vt = torch.linalg.svd(DELTAS.sum(dim=0), full_matrices=False)
    has = sigma > 1e-6
    assert int(has.sum()) == 9
    return sigma[has].mean() * u[:, has] @ vt[has]


def naive_core_ties() -> Tensor:
    """TIES on the cores, the axes being the singular vectors of all updates side by side, and one above the other."""
    p, s, _ = torch.linalg.svd(torch.cat(list(DELTAS), dim=1), full_matrices=False)
    _, z, qt = torch.linalg.svd(torch.cat(list(DELTAS), dim=0), full_matrices=False)
    p, q = p[:, s > 1e-6], qt[z > 1e-6].T
    trimmed = []
    for delta in DELTAS:
        core = p.T @ delta @ q
        kept = round(one_for_all.TIES_DENSITY * core.numel())
        least = core.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(core.abs() >= least, core, 0.0))
    every = torch.stack(trimmed)
    agrees = (every.sign() == every.sum(dim=0).sign()) & (every != 0)
    return p @ (torch.where(agrees, every, 0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)) @ q.T


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("mean", lambda: DELTAS.mean(dim=0)),
        ("task_arithmetic", lambda: 0.4 * DELTAS.sum(dim=0)),
        ("tsv", naive_tsv),
        ("iso_c", naive_iso_c),
        ("core_ties", naive_core_ties),
    ],
)
def test_it_is_what_the_full_matrices_give(variant: str, expected: Callable[[], Tensor]) -> None:
    found = ONE_FOR_ALL[variant](UPDATES)
    assert torch.allclose(found.delta().double(), expected(), atol=1e-5)
    assert found.rank <= 9
    again = [canonical_update(3 * u.u_NR * u.sigma_R, u.v_DR.T / 3, 1.0) for u in UPDATES]  # other factors, same ΔW
    assert torch.allclose(ONE_FOR_ALL[variant](again).delta(), found.delta(), atol=1e-5)


def test_the_cores_are_the_updates_in_the_common_basis_of_all() -> None:
    shared = cores(UPDATES)
    assert shared.m_TKK.shape == (3, 9, 9)
    for core, delta in zip(shared.m_TKK, DELTAS, strict=True):
        assert torch.allclose(shared.p_NK @ core @ shared.q_DK.T, delta, atol=1e-6)
    assert torch.allclose(shared.p_NK.T @ shared.p_NK, torch.eye(9).double(), atol=1e-9)


def test_dare_keeps_a_tenth_enlarged_by_ten_and_always_the_same() -> None:
    found = ONE_FOR_ALL["dare"](UPDATES[:1]).delta()
    kept = found.abs() > 1e-3
    assert 0.04 < float(kept.double().mean()) < 0.16  # 0.1 of 432, four standard deviations
    assert torch.allclose(found[kept].double(), DELTAS[0][kept] / (1 - DARE_DROP), atol=1e-4)
    assert torch.equal(found, ONE_FOR_ALL["dare"](UPDATES[:1]).delta())
    many = ONE_FOR_ALL["dare"]([UPDATES[0]] * 400).delta().double()  # what is dropped comes back on average
    assert float((many - DELTAS[0]).norm() / DELTAS[0].norm()) == pytest.approx((9 / 400) ** 0.5, rel=0.2)


@pytest.mark.parametrize("variant", sorted(ONE_FOR_ALL))
def test_more_directions_than_the_layer_has_and_updates_of_nothing_are_fine(variant: str) -> None:
    wide = [random_adapter(n, rank=8, shapes={"m": (12, 10)}).modules["m"] for n in range(5)]
    nothing = ModuleUpdate(torch.eye(12)[:, :1], torch.zeros(1), torch.eye(10)[:, :1])
    for updates in (wide, [*wide, nothing], [nothing], [nothing, nothing]):
        found = ONE_FOR_ALL[variant](updates)
        assert found.shape == (12, 10)
        assert bool(found.delta().isfinite().all())
    assert float(found.delta().norm()) == 0.0
