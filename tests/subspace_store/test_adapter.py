"""An adapter in canonical form, and the factors it came from."""

import dataclasses
import math

import pytest
import torch

from configs.errors import InvalidInput
from subspace_store.adapter import (
    Adapter,
    ModuleUpdate,
    adapter_from_bytes,
    adapter_to_bytes,
    canonical_update,
    check_adapter,
)
from tests.subspace_store.builders import random_adapter


def factors(n: int = 30, d: int = 20, rank: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, rank, generator=generator), torch.randn(rank, d, generator=generator)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= 1e-6 * float(other.norm())


def test_the_factors_an_update_came_from_can_be_had_again() -> None:
    b_NR, a_RD = factors()
    update = canonical_update(b_NR, a_RD, scale=0.3)
    raw_b, raw_a = update.raw()
    assert raw_b.dtype == raw_a.dtype == torch.float64
    assert close(raw_b, 0.3 * b_NR.double())
    assert close(raw_a, a_RD.double())


def test_the_factors_survive_where_they_cancel_in_the_update() -> None:
    b_NR, a_RD = factors()
    b_NR[:, 4] = b_NR[:, 3]
    a_RD[4] = -a_RD[3]  # rank 3 is left of 5
    raw_b, raw_a = canonical_update(b_NR, a_RD, scale=1.0).raw()
    assert close(raw_b, b_NR.double())
    assert close(raw_a, a_RD.double())


def test_the_factors_come_back_from_a_file() -> None:
    adapter = random_adapter(1)
    again = adapter_from_bytes(adapter_to_bytes(adapter))
    for name, update in adapter.modules.items():
        for one, other in zip(again.modules[name].raw(), update.raw(), strict=True):
            assert torch.equal(one, other)


def test_a_file_without_factors_is_still_read_and_says_so_when_asked() -> None:
    full = random_adapter(1)
    bare = {n: ModuleUpdate(u.u_NR, u.sigma_R, u.v_DR) for n, u in full.modules.items()}
    content = adapter_to_bytes(dataclasses.replace(full, modules=bare))
    assert b"gauge" not in content
    for update in adapter_from_bytes(content).modules.values():
        with pytest.raises(InvalidInput, match=r"B and A .* are not known"):
            update.raw()


def test_a_rank_above_the_modules_size_is_reduced_to_what_reaches_the_update() -> None:
    b_NR, a_RD = factors(n=3, d=20, rank=5)
    update = canonical_update(b_NR, a_RD, scale=2.0)
    check_adapter(Adapter("base", "", {"m": update}))
    assert update.rank == 3
    assert close(update.delta(), 2.0 * b_NR.double() @ a_RD.double())
    with pytest.raises(InvalidInput):
        update.raw()


@pytest.mark.parametrize(
    ("gauge", "said"),
    [
        ({"gauge_in_RR": None}, "both must be 4×4, or none"),
        ({"gauge_out_RR": torch.ones(4, 3)}, "both must be 4×4, or none"),
        ({"gauge_in_RR": torch.full((4, 4), math.nan)}, r"gauge_in: has NaN"),
    ],
)
def test_a_gauge_that_does_not_fit_is_refused_with_its_module(gauge: dict[str, torch.Tensor], said: str) -> None:
    adapter = random_adapter(1)
    broken = dataclasses.replace(adapter.modules["layer.0.query"], **gauge)
    with pytest.raises(InvalidInput, match=said) as error:
        check_adapter(dataclasses.replace(adapter, modules={**adapter.modules, "layer.0.query": broken}))
    assert error.value.where.startswith("layer.0.query")


def test_modules_may_share_a_tensor() -> None:
    one = random_adapter(1)
    shared = dataclasses.replace(one, modules={"a": one.modules["layer.0.query"], "b": one.modules["layer.0.query"]})
    assert torch.equal(
        adapter_from_bytes(adapter_to_bytes(shared)).modules["b"].u_NR, one.modules["layer.0.query"].u_NR
    )
