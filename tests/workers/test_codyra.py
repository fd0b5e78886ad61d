"""Method `codyra`: the schedule, the proximal step, and the ranks that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput
from configs.task_spec import MethodSpec, TaskSpec
from tests.workers.method_builders import gradients, logits, train_by_chance
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.evaluation import adapted_model
from workers.methods import codyra
from workers.methods.factors import describe, lora_layers, trainable_numbers

Tiny = Callable[[str], BaseModel]
PUBLISHED = MethodSpec(name="codyra")


def task(r: int = 4, **method: Any) -> TaskSpec:
    return sentiment_task(method={"name": "codyra"} | method, lora={"r": r})


def gates(model: Any) -> list[torch.Tensor]:
    return [layer.lora_A["default"].gates_R.data for layer in lora_layers(model).values()]


def test_the_published_run_of_500_steps_has_the_published_thresholds() -> None:
    kappas = [codyra.threshold(PUBLISHED, step, 500) for step in range(1, 501)]
    assert kappas[:250] == [0.0] * 250  # the dense half
    assert kappas[250:255] == [0.005 / 49] * 5  # then one step up the grid of 50 values every 5 steps
    assert kappas[255:260] == [2 * 0.005 / 49] * 5
    assert kappas[490:] == [0.005] * 10  # the 49th step up is reached at 491 and stays
    assert sum(kappas) == pytest.approx(0.65)


@pytest.mark.parametrize("steps", [1, 2, 7, 60, 5000])
@pytest.mark.parametrize("dense", [0.0, 0.5, 0.9])
def test_however_many_steps_the_ramp_ends_at_kappa_max(steps: int, dense: float) -> None:
    method = MethodSpec(name="codyra", dense_fraction=dense, kappa_max=0.02)
    kappas = [codyra.threshold(method, step, steps) for step in range(1, steps + 1)]
    assert kappas == sorted(kappas)
    assert kappas[-1] == 0.02
    assert kappas.count(0.0) == int(dense * steps)


def test_a_step_pulls_every_gate_towards_zero_by_kappa_and_closes_those_within_it(tiny: Tiny) -> None:
    spec = task(kappa_max=0.5, dense_fraction=0.0)
    model = codyra.prepare(tiny("bert"), spec)
    for gates_R in gates(model):
        gates_R.copy_(torch.tensor([2.0, -0.75, 0.5, -0.25]))
    codyra.after_step(model, spec, 10, 10)
    for gates_R in gates(model):
        assert torch.equal(gates_R, torch.tensor([1.5, -0.25, 0.0, 0.0]))


def test_in_the_dense_phase_gates_are_left_alone(tiny: Tiny) -> None:
    model = codyra.prepare(tiny("bert"), task(gate_start="normal"))
    before = [gates_R.clone() for gates_R in gates(model)]
    codyra.after_step(model, task(), 5, 10)
    assert all(torch.equal(now, was) for now, was in zip(gates(model), before, strict=True))


@pytest.mark.parametrize("start", ["ones", "normal"])
def test_codyra_starts_as_the_base_model_and_with_a_gradient(start: str, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(gate_start=start)
    model = codyra.prepare(base, spec)
    assert torch.equal(logits(model), logits(base.task_model(spec, spec.training.seed)))
    assert gradients(model)["lora_B.weight"] > 0
    train_by_chance(model)
    found = gradients(model)
    assert found.keys() == {"lora_A.weight", "lora_A.gates_R", "lora_B.weight"}
    assert all(size > 0 for size in found.values())


def test_each_module_keeps_the_rank_of_its_open_gates_and_the_function_stays(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(gate_start="normal")
    model = codyra.prepare(base, spec)
    train_by_chance(model)
    for count, gates_R in enumerate(gates(model), start=1):  # modules keep 1, 2, 3 and 4 ranks
        gates_R[count:] = 0
    adapter = codyra.finish(model, base, spec)
    assert [adapter.modules[name].rank for name in lora_layers(model)] == [1, 2, 3, 4]
    assert torch.allclose(logits(adapted_model(base, adapter, spec)), logits(model), atol=1e-5)


def test_a_module_without_an_open_gate_is_no_part_of_the_adapter(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    model = codyra.prepare(base, spec)
    train_by_chance(model)
    gates(model)[0].zero_()
    adapter = codyra.finish(model, base, spec)
    assert set(adapter.modules) == set(list(lora_layers(model))[1:])
    assert torch.allclose(logits(adapted_model(base, adapter, spec)), logits(model), atol=1e-5)


def test_when_every_gate_is_closed_the_task_is_told_what_to_change(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(kappa_max=2.0, dense_fraction=0.0)
    model = codyra.prepare(base, spec)
    codyra.after_step(model, spec, 1, 1)
    with pytest.raises(InvalidInput, match="closed all 4 gates of every module") as caught:
        codyra.finish(model, base, spec)
    assert caught.value.where == "method.kappa_max"
    assert "it is 2" in caught.value.todo


def test_the_published_start_alone_leaves_about_half_of_the_ranks(tiny: Tiny) -> None:
    # Σκ = 0.65: a gate from N(0, 1) that no gradient moves survives when |w| > 0.65, with probability 0.516.
    spec = task(r=64, gate_start="normal")
    model = codyra.prepare(tiny("bert"), spec)
    for step in range(1, 501):
        codyra.after_step(model, spec, step, 500)
    left = torch.cat(gates(model)) != 0
    assert 0.45 < float(left.float().mean()) < 0.58  # 256 gates: a standard deviation is 0.03
    ones = codyra.prepare(tiny("bert"), task(r=64))
    for step in range(1, 501):
        codyra.after_step(ones, spec, step, 500)
    assert torch.allclose(torch.cat(gates(ones)), torch.tensor(0.35), atol=1e-5)


def test_gates_add_one_number_per_rank(tiny: Tiny) -> None:
    model = codyra.prepare(tiny("bert"), task())
    assert set(trainable_numbers(model).values()) == {4 * (32 + 32) + 4}
    assert describe(model, "codyra", 4).startswith("codyra: 260 trained numbers per module in 4 modules; LoRA r 4 ")
