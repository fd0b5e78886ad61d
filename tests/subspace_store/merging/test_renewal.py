"""The leading directions of many tasks, and which updates lie in them."""

from __future__ import annotations

import pytest
import torch

from configs.settings import SubspaceSettings
from subspace_store import ModuleUpdate, canonical_update
from subspace_store.merging import renewal
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace, empty_module
from subspace_store.merging.overlap import overlap
from subspace_store.merging.renewal import renewed_basis, routed
from subspace_store.module_names import renewed
from tests.subspace_store.builders import SHAPES, random_adapter, trained_in

SHAPE = (24, 20)
NAME = "layer.0.query"


def settings(directions: int, **others: object) -> SubspaceSettings:
    return SubspaceSettings.model_validate({"renew_directions": directions} | others)


def privately(count: int, rank: int = 4, size: float = 1.0) -> ModuleSubspace:
    """A module whose tasks are all beside its basis."""
    adapters = {f"t{seed}": random_adapter(seed, rank, {NAME: SHAPE}, size) for seed in range(count)}
    private = {task: adapter.modules[NAME] for task, adapter in adapters.items()}
    return ModuleSubspace(empty_module(SHAPE).basis, empty_module(SHAPE).tasks, private)


def direct(updates: list[ModuleUpdate], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U of all updates side by side, each divided by its norm, and the squares of its singular values."""
    whole = torch.cat([update.delta() / update.delta().norm() for update in updates], dim=1)
    u_NJ, sigma_J, _ = torch.linalg.svd(whole, full_matrices=False)
    return u_NJ[:, :count], sigma_J[:count].square()


@pytest.mark.parametrize("folded_at", [2, 0.5])
def test_however_often_columns_are_folded_the_directions_and_energies_are_those_of_all(
    folded_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "FOLDED_AT", folded_at)
    module = privately(30)
    basis = renewed_basis(module, settings(5))
    assert basis is not None
    assert basis.ranks == (5, 5)
    out_NK, energy_K = direct(list(module.private.values()), 5)
    assert overlap(basis.p_NK.numpy(), out_NK.float().numpy()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(basis.lam_out_K, energy_K, rtol=1e-6)
    assert torch.allclose(basis.p_NK.T @ basis.p_NK, torch.eye(5), atol=1e-6)


def test_a_large_update_weighs_as_much_as_a_small_one_unless_energy_is_what_counts() -> None:
    module, large = privately(4, rank=2), random_adapter(9, 2, {NAME: SHAPE}, size=1e4).modules[NAME]
    module = ModuleSubspace(module.basis, module.tasks, {**module.private, "large": large})
    equal, by_energy = (renewed_basis(module, settings(2, weighting=name)) for name in ("equal", "energy"))
    assert equal is not None
    assert by_energy is not None
    assert overlap(large.u_NR.numpy(), by_energy.p_NK.numpy()) == pytest.approx(1.0, abs=1e-4)
    assert overlap(large.u_NR.numpy(), equal.p_NK.numpy()) < 0.9


def test_fewer_directions_than_are_wanted_make_none_and_rank_max_is_the_most() -> None:
    assert renewed_basis(privately(2, rank=2), settings(5)) is None  # 4 of them
    assert renewed_basis(privately(30), settings(21)) is None  # the module has 20 inputs
    same = privately(1).private["t0"]
    twice = ModuleSubspace(*(getattr(privately(1), part) for part in ("basis", "tasks")), {"a": same, "b": same})
    assert renewed_basis(twice, settings(5)) is None  # eight columns, four directions
    assert renewed_basis(empty_module(SHAPE), settings(1)) is None
    basis = renewed_basis(privately(30), settings(5, rank_max=3))
    assert basis is not None
    assert basis.ranks == (3, 3)


@pytest.mark.parametrize(
    ("beside", "is_inside"), [(0.0, True), (3e-6, True), (3e-5, False), (1e-3, False), (1.0, False)]
)
def test_an_update_lies_in_a_basis_if_no_more_than_rounding_is_outside(beside: float, is_inside: bool) -> None:
    bases: dict[str, ModuleBasis] = {}
    for name, shape in SHAPES.items():
        sides = (
            torch.linalg.qr(torch.randn(size, 5, generator=torch.Generator().manual_seed(size)))[0] for size in shape
        )
        bases[name] = ModuleBasis(*sides, *(torch.ones(5, dtype=torch.float64) for _ in range(2)))
    inside = trained_in(bases, 1)
    update = inside.modules[NAME]
    left_NR = update.u_NR * update.sigma_R
    rest_NR = torch.randn(left_NR.shape, generator=torch.Generator().manual_seed(1))
    rest_NR -= bases[NAME].p_NK @ (bases[NAME].p_NK.T @ rest_NR)
    left_NR = left_NR + beside * update.energy**0.5 / (rest_NR.norm()) * rest_NR
    inside.modules[NAME] = canonical_update(left_NR, update.v_DR.T, 1.0)  # type: ignore[index]
    found = routed(lambda name: bases[NAME] if name == renewed(NAME) else None, {"t": inside})["t"]
    assert set(found.modules) == {renewed(NAME) if is_inside else NAME, "layer.0.value"}
