"""The refinement after merging: it starts at the served task and stays in the version's basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from configs.errors import InvalidInput
from configs.settings import SubspaceSettings
from subspace_store.merging.basis import ModuleSubspace, reconstruct
from subspace_store.merging.merge import merge_adapters
from tests.workers.method_builders import logits, train_by_chance
from tests.workers.test_share import outside
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.evaluation import adapted_model
from workers.methods import Given, auto, lora, refine
from workers.methods.factors import lora_layers, trainable_numbers

Tiny = Callable[[str], BaseModel]
SPEC = sentiment_task(lora={"r": 4, "lora_alpha": 12})
SETTINGS = SubspaceSettings(rank_max=6, beyond_rank_max="drop")


def served(base: BaseModel) -> tuple[Given, Mapping[str, ModuleSubspace]]:
    """Task `b` as a version serves it whose six directions cannot hold both of its tasks whole."""
    adapters = {}
    for seed, name in enumerate("ab", start=5):
        model = lora.prepare(base, SPEC)
        train_by_chance(model, seed)
        adapters[name] = lora.finish(model, base, SPEC)
    merge = merge_adapters({}, adapters, SETTINGS)
    assert 0.05 < merge.tally.error_at_birth["b"] < 0.95
    adapter = replace(adapters["b"], modules=reconstruct(merge.modules, "b"))
    return Given(version=2, basis={name: m.basis for name, m in merge.modules.items()}, adapter=adapter), merge.modules


def test_a_refinement_starts_at_the_task_as_it_is_served_head_included(tiny: Tiny) -> None:
    given, _ = served(tiny("bert"))
    assert given.adapter is not None
    model = refine.prepare(tiny("bert"), SPEC, given)
    expected = logits(adapted_model(tiny("bert"), given.adapter, SPEC))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny("bert").task_model(SPEC, SPEC.training.seed)), atol=1e-2)


def test_refined_coefficients_and_head_are_handed_over_and_nothing_leaves_the_basis(tiny: Tiny) -> None:
    base = tiny("bert")
    given, _ = served(base)
    assert given.adapter is not None
    model = refine.prepare(base, SPEC, given)
    train_by_chance(model)
    refined = refine.finish(model, base, SPEC, given)
    assert torch.allclose(logits(adapted_model(base, refined, SPEC)), logits(model), atol=1e-5)
    for name, update in refined.modules.items():
        assert outside(update.delta(), given.basis[name]) < 1e-6
        assert not torch.allclose(update.delta(), given.adapter.modules[name].delta(), atol=1e-2)
    assert not torch.equal(refined.head["classifier.weight"], given.adapter.head["classifier.weight"])
    assert refined.info == {**given.adapter.info, "refined_in": "2"}


def test_an_adapter_that_auto_sized_has_no_more_directions_afterwards(tiny: Tiny) -> None:
    base = tiny("bert")
    given, _ = served(base)
    assert given.adapter is not None
    sized = replace(given, adapter=auto.sized(given.adapter, 0.5))
    assert sized.adapter is not None
    model = refine.prepare(base, SPEC, sized)
    train_by_chance(model)
    refined = refine.finish(model, base, SPEC, sized)
    assert refined.is_sized
    ranks = {name: update.rank for name, update in sized.adapter.modules.items()}
    assert {name: update.rank for name, update in refined.modules.items()} == ranks
    assert min(ranks.values()) < SPEC.lora.r


def test_only_coefficients_and_the_head_are_trained(tiny: Tiny) -> None:
    given, _ = served(tiny("bert"))
    model = refine.prepare(tiny("bert"), SPEC, given)
    for name, count in trainable_numbers(model).items():
        assert count == 4 * sum(given.basis[name].ranks)  # rank × (k_out + k_in)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * len(lora_layers(model)) + 2


def test_merging_a_refined_task_needs_no_new_direction(tiny: Tiny) -> None:
    given, modules = served(tiny("bert"))
    model = refine.prepare(tiny("bert"), SPEC, given)
    train_by_chance(model)
    refined = refine.finish(model, tiny("bert"), SPEC, given)
    again = merge_adapters(modules, {"c": refined}, SETTINGS)
    assert again.tally.error_at_birth["c"] < 1e-5
    assert {n: m.basis.ranks for n, m in again.modules.items()} == {n: m.basis.ranks for n, m in modules.items()}


def test_a_refinement_trains_the_private_part_along_and_keeps_what_it_starts_from(tiny: Tiny) -> None:
    base, settings = tiny("bert"), SubspaceSettings(rank_max=3, energy_ratio_min=0.95)
    adapters = {}
    for seed, name in enumerate("abc", start=5):
        model = lora.prepare(base, SPEC)
        train_by_chance(model, seed)
        adapters[name] = lora.finish(model, base, SPEC)
    modules = merge_adapters({}, adapters, settings).modules
    assert all("c" in module.private for module in modules.values())
    adapter = replace(adapters["c"], modules=reconstruct(modules, "c"))
    given = Given(version=2, basis={name: m.basis for name, m in modules.items()}, adapter=adapter)
    model = refine.prepare(base, SPEC, given)
    assert torch.allclose(logits(model), logits(adapted_model(base, adapter, SPEC)), atol=1e-4)
    train_by_chance(model)
    refined = refine.finish(model, base, SPEC, given)
    for name, update in refined.modules.items():
        assert outside(update.delta(), given.basis[name]) > 0.1  # as the task was
        assert update.rank <= adapter.modules[name].rank
    assert torch.allclose(logits(adapted_model(base, refined, SPEC)), logits(model), atol=1e-4)


def test_a_task_of_a_smaller_rank_and_fewer_modules_keeps_both(tiny: Tiny) -> None:
    base = tiny("bert")
    given, _ = served(base)
    assert given.adapter is not None
    name, update = next(iter(given.adapter.modules.items()))
    smaller = replace(
        update, u_NR=update.u_NR[:, :2], sigma_R=update.sigma_R[:2], v_DR=update.v_DR[:, :2], gauge_out_RR=None
    )
    given = replace(given, adapter=replace(given.adapter, modules={name: replace(smaller, gauge_in_RR=None)}))
    model = refine.prepare(base, SPEC, given)
    refined = refine.finish(model, base, SPEC, given)
    assert {n: u.rank for n, u in refined.modules.items()} == {name: 2}
    assert torch.allclose(refined.modules[name].delta(), smaller.delta(), atol=1e-5)


def test_a_task_of_another_version_is_refused(tiny: Tiny) -> None:
    given, _ = served(tiny("bert"))
    with pytest.raises(InvalidInput, match="version 2 has no basis for bert"):
        refine.prepare(tiny("bert"), SPEC, replace(given, basis={}))
