"""Each variant against its definition on dense matrices."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.settings import SubspaceSettings
from subspace_store import Adapter, ModuleUpdate, canonical_update
from subspace_store.merging.merge import merge_adapters
from subspace_store.merging.one_for_all import ONE_FOR_ALL as ways
from subspace_store.merging.one_for_all import TASK_ARITHMETIC_FACTOR, TIES_DENSITY
from subspace_store.merging.variants import VARIANTS, Merged, Variant, merge_all
from tests.subspace_store.builders import BASE, SHAPES, deltas, random_adapter, relative_distance

# Mixed ranks, sizes that differ, and a task in one module only.
ADAPTERS = {
    "a": random_adapter(1, rank=4),
    "b": random_adapter(2, rank=7, size=0.3),
    "c": random_adapter(3, rank=5, shapes={"layer.0.query": SHAPES["layer.0.query"]}),
}
FIXED = SubspaceSettings(rank_fixed=6)
WHOLE = SubspaceSettings(rank_fixed=24)
"""Nothing is truncated: the smaller side of the larger module has 20."""
ONE_FOR_ALL: tuple[Variant, ...] = tuple(ways)  # type: ignore[arg-type]


def dense(updates: Mapping[str, ModuleUpdate]) -> dict[str, Tensor]:
    """ΔW of every module, zero where there is none."""
    return {name: updates[name].delta() if name in updates else torch.zeros(*SHAPES[name]).double() for name in SHAPES}


def stacked(adapters: Mapping[str, Adapter], name: str) -> Tensor:
    return torch.stack([a.modules[name].delta() for a in adapters.values() if name in a.modules])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [FIXED, WHOLE])
def test_the_error_is_the_distance_from_the_delivered_update(variant: Variant, settings: SubspaceSettings) -> None:
    merged = merge_all(ADAPTERS, variant, settings)
    assert set(merged.updates) == set(merged.error) == set(ADAPTERS)
    for task, adapter in ADAPTERS.items():
        delivered, found = dense(adapter.modules), dense(merged.updates[task])
        assert merged.error[task] == pytest.approx(relative_distance(found, delivered, delivered), abs=1e-6)


def test_canonical_is_the_store_s_own_group_merge() -> None:
    merged = merge_all(ADAPTERS, "canonical", FIXED)
    merge = merge_adapters({}, ADAPTERS, FIXED)
    assert merged.error == pytest.approx(merge.tally.error_at_birth, abs=1e-6)
    # Two modules with k = 6 on both sides; a and b have 11 columns in both, c another 5 in the query.
    assert merged.stored_numbers == 6 * (24 + 20 + 16 + 20) + 2 * 6 * (16 + 11)


def test_paper_projects_raw_factors_on_the_singular_vectors_of_their_stack() -> None:
    merged = merge_all(ADAPTERS, "paper", FIXED)
    for name in SHAPES:
        raw = {task: a.modules[name].raw() for task, a in ADAPTERS.items() if name in a.modules}
        p = torch.linalg.svd(torch.cat([b for b, _ in raw.values()], dim=1)).U[:, :6]
        q = torch.linalg.svd(torch.cat([a.T for _, a in raw.values()], dim=1)).U[:, :6]
        for task, (b, a) in raw.items():
            expected = (p @ p.T @ b) @ (q @ q.T @ a.T).T
            assert torch.allclose(merged.updates[task][name].delta(), expected, atol=1e-5)
    assert merged.stored_numbers == merge_all(ADAPTERS, "canonical", FIXED).stored_numbers


def test_paper_depends_on_the_factors_and_canonical_does_not() -> None:
    b, a = torch.randn(24, 4, generator=torch.Generator().manual_seed(5)), torch.eye(4, 20)
    gauge = torch.diag(torch.tensor([100.0, 1.0, 1.0, 0.01]))
    one, other = (
        {**ADAPTERS, "d": Adapter(BASE, "", {"layer.0.query": canonical_update(left, right, 1.0)})}
        for left, right in ((b, a), (b @ gauge, gauge.inverse() @ a))
    )
    errors = {v: [sum(merge_all(s, v, FIXED).error.values()) for s in (one, other)] for v in ("canonical", "paper")}
    assert errors["canonical"][0] == pytest.approx(errors["canonical"][1], rel=1e-4)
    assert abs(errors["paper"][0] - errors["paper"][1]) > 0.05


def test_paper_needs_the_factors_as_they_were_trained() -> None:
    update = replace(ADAPTERS["a"].modules["layer.0.query"], gauge_out_RR=None, gauge_in_RR=None)
    with pytest.raises(InvalidInput, match="not known"):
        merge_all({"a": Adapter(BASE, "", {"layer.0.query": update})}, "paper", FIXED)


def test_mean_is_over_the_tasks_that_adapt_a_module() -> None:
    merged = merge_all(ADAPTERS, "mean", WHOLE)
    for name in SHAPES:
        expected = stacked(ADAPTERS, name).mean(dim=0)
        for task in ADAPTERS:
            assert torch.allclose(merged.updates[task][name].delta(), expected, atol=1e-6)


def test_task_arithmetic_is_the_scaled_sum() -> None:
    merged = merge_all(ADAPTERS, "task_arithmetic", WHOLE)
    for name in SHAPES:
        expected = TASK_ARITHMETIC_FACTOR * stacked(ADAPTERS, name).sum(dim=0)
        assert torch.allclose(merged.updates["a"][name].delta(), expected, atol=1e-6)


def test_ties_trims_elects_by_mass_and_means_what_agrees() -> None:
    merged = merge_all(ADAPTERS, "ties", WHOLE)
    for name in SHAPES:
        every = stacked(ADAPTERS, name).float()
        kept = round(TIES_DENSITY * every[0].numel())
        for delta in every:
            delta[delta.abs() < delta.abs().flatten().sort(descending=True).values[kept - 1]] = 0
        elected = every.sum(dim=0).sign()
        agrees = (every.sign() == elected) & (every != 0)
        expected = torch.where(agrees, every, 0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
        assert torch.allclose(merged.updates["a"][name].delta().float(), expected, atol=1e-5)


def test_ties_keeps_the_mean_of_the_larger_side_where_two_tasks_contradict() -> None:
    def one(values: list[float]) -> Adapter:
        return Adapter(BASE, "", {"m": canonical_update(torch.tensor([values]), torch.eye(len(values)), 1.0)})

    # A fifth of five entries is one: each task keeps its largest, and all keep the same place.
    adapters = {"a": one([3, 1, 0, 0, 0]), "b": one([5, 0, 1, 0, 0]), "c": one([-6, 0, 0, 1, 0])}
    update = merge_all(adapters, "ties", WHOLE).updates["a"]["m"]
    assert torch.allclose(update.delta()[0].float(), torch.tensor([4.0, 0, 0, 0, 0]), atol=1e-5)  # (3 + 5) / 2


@pytest.mark.parametrize("variant", [way for way in ONE_FOR_ALL if way != "iso_c"])  # its directions are all alike
def test_one_adapter_for_all_is_the_best_of_its_rank(variant: Variant) -> None:
    whole, cut = merge_all(ADAPTERS, variant, WHOLE), merge_all(ADAPTERS, variant, FIXED)
    for name in SHAPES:
        u, sigma, vt = torch.linalg.svd(whole.updates["a"][name].delta())
        expected = (u[:, :6] * sigma[:6]) @ vt[:6]
        assert torch.allclose(cut.updates["a"][name].delta(), expected, atol=1e-5)
    assert cut.stored_numbers == 6 * (24 + 20 + 16 + 20)
    assert cut.updates["a"] is cut.updates["b"]


def test_separate_keeps_everything_and_costs_every_lora() -> None:
    merged = merge_all(ADAPTERS, "separate", FIXED)
    assert merged.stored_numbers == 4 * 80 + 7 * 80 + 5 * 44
    assert set(merged.error.values()) == {0.0}
    assert relative_distance(dense(merged.updates["b"]), deltas(ADAPTERS["b"]), deltas(ADAPTERS["b"])) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_of_nothing_and_an_adapter_alone_are_fine(variant: Variant) -> None:
    zero = canonical_update(torch.zeros(24, 4), torch.zeros(4, 20), 1.0)
    nothing = Adapter(BASE, "", {"layer.0.query": zero})
    merged: Merged = merge_all({"zero": nothing}, variant, FIXED)
    assert merged.error == {"zero": 0.0}
    both = merge_all({"zero": nothing, "a": ADAPTERS["a"]}, variant, FIXED)
    assert both.error["a"] < 1 or variant == "dare"  # whose draw adds noise, which many tasks average out
