"""The linear algebra against the plain way to do it: whole SVDs, dense updates, all combinations tried."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_store.adapter import ModuleUpdate
from subspace_store.merging.subspace_math import (
    canonical_in_basis,
    choose_ranks,
    extend_basis,
    kept_energy,
    orthonormalise,
    update_energy,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed)).Q


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), k=st.integers(0, 6), c=st.integers(0, 6), inside=st.booleans(), seed=st.integers(0, 99))
def test_extending_equals_the_svd_of_weighted_basis_and_columns(
    n: int, k: int, c: int, inside: bool, seed: int
) -> None:
    k = min(k, n)
    basis, energy = orthonormal(n, k, seed), random(k, seed=seed + 1).square()
    columns = basis @ random(k, c, seed=seed + 2) if inside else random(n, c, seed=seed + 2)
    extension = extend_basis(basis, energy, columns, columns.norm(dim=0))
    directions, energies = extension.directions_NJ, extension.energy_J
    assert torch.allclose(extension.transport_JK, directions.T @ basis, atol=1e-12)
    whole = torch.cat([basis * energy.sqrt(), columns], dim=1)
    # The same Gram matrix is the same left singular vectors and values.
    assert torch.allclose(directions * energies @ directions.T, whole @ whole.T, atol=1e-10)
    assert torch.allclose(directions.T @ directions, torch.eye(len(energies), dtype=torch.float64), atol=1e-9)
    assert bool((energies.diff() <= 0).all())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), k=st.integers(0, 6), c=st.integers(0, 6), inside=st.booleans(), seed=st.integers(0, 99))
def test_a_basis_that_stays_is_followed_by_what_the_columns_add(
    n: int, k: int, c: int, inside: bool, seed: int
) -> None:
    k = min(k, n)
    basis, energy = orthonormal(n, k, seed), random(k, seed=seed + 1).square()
    columns = basis @ random(k, c, seed=seed + 2) if inside else random(n, c, seed=seed + 2)
    extension = extend_basis(basis, energy, columns, columns.norm(dim=0), stays=True)
    directions, energies = extension.directions_NJ, extension.energy_J
    assert torch.allclose(directions[:, :k], basis, atol=1e-12)
    assert torch.allclose(extension.transport_JK, directions.T @ basis, atol=1e-12)
    assert torch.allclose(directions.T @ directions, torch.eye(len(energies), dtype=torch.float64), atol=1e-9)
    rest = columns - basis @ (basis.T @ columns)
    assert torch.allclose(rest, directions[:, k:] @ (directions[:, k:].T @ rest), atol=1e-9)
    held = (directions.T @ columns).square().sum(dim=1)
    assert torch.allclose(energies, held + torch.cat([energy, torch.zeros(len(energies) - k).double()]), atol=1e-9)
    assert bool((energies[k:].diff() <= 1e-12).all())


def test_columns_almost_inside_the_span_do_not_spoil_orthogonality() -> None:
    basis = orthonormal(50, 8)
    columns = basis @ random(8, 3, seed=1) + 1e-6 * random(50, 3, seed=2)
    directions = extend_basis(basis, torch.ones(8, dtype=torch.float64), columns, columns.norm(dim=0)).directions_NJ
    assert directions.shape == (50, 11)
    # One projection alone leaves rounding over residual, 1e-16 / 1e-6.
    assert float((directions.T @ directions - torch.eye(11)).abs().max()) < 1e-13


def test_rounding_noise_is_no_direction() -> None:
    basis = orthonormal(50, 8)
    columns = basis @ random(8, 3, seed=1) + 1e-9 * random(50, 3, seed=2)
    extension = extend_basis(basis, torch.ones(8, dtype=torch.float64), columns, columns.norm(dim=0))
    assert extension.directions_NJ.shape == (50, 8)


def test_a_rounded_basis_is_made_orthonormal_without_leaving_its_leading_spans() -> None:
    stored = orthonormal(200, 20).float()
    basis = orthonormalise(stored)
    assert float((basis.T @ basis - torch.eye(20)).abs().max()) < 1e-14
    for k in (1, 7, 20):
        lead = stored[:, :k].double()
        assert float((lead - basis[:, :k] @ (basis[:, :k].T @ lead)).norm()) < 1e-13


def test_kept_energy_is_the_dense_norm_for_tasks_of_mixed_rank() -> None:
    ranks = (3, 0, 1, 5)
    e, f = random(6, 9, seed=1), random(4, 9, seed=2)
    starts = [sum(ranks[:i]) for i in range(4)]
    dense = [(e[:, s : s + r] @ f[:, s : s + r].T).square().sum() for s, r in zip(starts, ranks, strict=True)]
    assert torch.allclose(kept_energy(e, f, ranks), torch.stack(dense))


def test_energy_of_factors_that_are_not_quite_orthonormal_is_that_of_their_product() -> None:
    update = ModuleUpdate(random(9, 3).float(), torch.tensor([3.0, 2.0, 1.0]), random(7, 3, seed=1).float())
    assert update_energy(update) == pytest.approx(float(update.delta().square().sum()), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0])
def test_the_chosen_ranks_are_the_cheapest_of_all_that_keep_every_tasks_share(seed: int, ratio: float) -> None:
    ranks, n, d = (2, 3, 1), 30, 20
    scale = 0.6 ** torch.arange(6, dtype=torch.float64)[:, None]
    e, f = random(6, 6, seed=seed) * scale, random(5, 6, seed=seed + 50) * scale[:5]
    starts = (0, 2, 5)
    delivered = kept_energy(e, f, ranks)

    def keeps(a: int, b: int) -> bool:
        parts = [(e[:a, s : s + r] @ f[:b, s : s + r].T).square().sum() for s, r in zip(starts, ranks, strict=True)]
        return bool((torch.stack(parts) >= (ratio - 1e-12) * delivered).all())

    best = min(n * a + d * b for a, b in itertools.product(range(7), range(6)) if keeps(a, b))
    a, b = choose_ranks(e, f, ranks, delivered, ratio * delivered, rank_max=64, cost=(n, d))
    assert keeps(a, b)
    assert n * a + d * b == best


def test_a_task_below_its_share_loses_nothing_more_unless_the_cap_forces_it() -> None:
    # One task, energy 1 in each of four directions, of eight delivered: below 90 % already.
    e = f = torch.eye(4, dtype=torch.float64)
    delivered = torch.tensor([8.0], dtype=torch.float64)
    assert choose_ranks(e, f, (4,), delivered, 0.9 * delivered, rank_max=64, cost=(1, 1)) == (4, 4)
    assert choose_ranks(e, f, (4,), delivered, 0.9 * delivered, rank_max=3, cost=(1, 1)) == (3, 3)
    # With 4 of 8 delivered and a share of one quarter, 2 of the 4 may go.
    assert choose_ranks(e, f, (4,), delivered, 0.25 * delivered, rank_max=64, cost=(1, 1)) == (2, 2)


def test_more_tasks_than_one_chunk_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    e, f = random(6, 12, seed=3), random(6, 12, seed=4)
    ranks, delivered = (2, 3, 1, 4, 2), kept_energy(e, f, (2, 3, 1, 4, 2))
    whole = choose_ranks(e, f, ranks, delivered, 0.8 * delivered, rank_max=64, cost=(3, 2))
    monkeypatch.setattr("subspace_store.merging.subspace_math.TASKS_PER_CHUNK", 2)
    assert choose_ranks(e, f, ranks, delivered, 0.8 * delivered, rank_max=64, cost=(3, 2)) == whole


@pytest.mark.parametrize(("k_out", "k_in", "rank"), [(5, 4, 3), (2, 4, 3), (3, 1, 3), (0, 4, 3), (4, 4, 0)])
def test_the_canonical_form_is_the_same_update(k_out: int, k_in: int, rank: int) -> None:
    p, q, e, f = orthonormal(9, k_out), orthonormal(7, k_in, 1), random(k_out, rank, seed=2), random(k_in, rank, seed=3)
    update = canonical_in_basis(p, q, e, f)
    assert update.rank == min(k_out, k_in, rank)
    assert torch.allclose(update.delta(), p @ e @ f.T @ q.T, atol=1e-5)
    assert bool((update.sigma_R.diff() <= 0).all())
