"""Method `share`: what is frozen, what is trained, and what is handed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.merging.basis import ModuleBasis
from tests.workers.method_builders import ROW, gradients, leased, logits, random_basis, train_by_chance
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.evaluation import adapted_model
from workers.methods import Given, lora, share
from workers.methods.factors import SpannedFactor, describe, lora_layers, trainable_numbers
from workers.peft_model import with_lora

Tiny = Callable[[str], BaseModel]
TARGETS = {"bert": ("query", "value"), "llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


def task(columns: int | None = None, r: int = 3, architecture: str = "bert") -> TaskSpec:
    return sentiment_task(
        method={"name": "share", "directions": "learned", "temporary_columns": columns},
        lora={"r": r, "target_modules": TARGETS[architecture]},
    )


def outside(update: Tensor, basis: ModuleBasis) -> float:
    """Share of ΔW's norm that lies outside span(P) or span(Q)."""
    p_NK, q_DK = basis.p_NK.double(), basis.q_DK.double()
    return float((update - p_NK @ (p_NK.T @ update @ q_DK) @ q_DK.T).norm() / update.norm())


def wide_model(ranks: tuple[int, int], columns: int | None, r: int) -> nn.Module:
    """One layer of 768×768 under `share`."""
    model = with_lora(nn.Sequential(nn.Linear(768, 768)), LoraConfig(r=r, target_modules=["0"]))
    share.put_into_basis(model, task(columns, r), {"0": random_basis((768, 768), ranks)})
    return model


@pytest.mark.parametrize("columns", [0, None])
def test_share_starts_as_the_base_model_and_not_on_a_saddle(columns: int | None, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(columns)
    model = share.prepare(base, spec, leased(base, TARGETS["bert"]))
    assert torch.equal(logits(model), logits(base.task_model(spec, spec.training.seed)))
    found = gradients(model)
    assert found["lora_B.weight"] > 0  # C starts at zero and moves first, then the columns have a gradient as well
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.add_(0.1)
    assert all(size > 0 for size in gradients(model).values())


def test_the_rows_of_a_are_as_long_as_a_plain_loras(tiny: Tiny) -> None:
    """So that one learning rate moves the update as far, however many directions there are."""
    base = tiny("bert")
    plain = lora.prepare(base, task(r=32))
    for columns in (0, None):
        for name, layer in lora_layers(share.prepare(base, task(columns), leased(base, TARGETS["bert"]))).items():
            lengths = layer.lora_A["default"].exact().detach().norm(dim=1)
            theirs = float(lora_layers(plain)[name].lora_A["default"].weight.detach().norm(dim=1).mean())
            assert len(lengths) == 8 + (0 if columns == 0 else 2)
            assert torch.allclose(lengths, torch.full_like(lengths, theirs), rtol=0.15)
            assert layer.lora_B["default"].reach == pytest.approx((32 / (12 + (0 if columns == 0 else 3))) ** 0.5)


@pytest.mark.parametrize("columns", [0, None])
@pytest.mark.parametrize("architecture", list(TARGETS))
def test_the_adapter_handed_over_computes_what_was_trained(architecture: str, columns: int | None, tiny: Tiny) -> None:
    base, spec = tiny(architecture), task(columns, architecture=architecture)
    given = leased(base, TARGETS[architecture])
    model = share.prepare(base, spec, given)
    assert all(isinstance(layer.lora_A["default"], SpannedFactor) for layer in lora_layers(model).values())
    train_by_chance(model)
    adapter = share.finish(model, base, spec, given)
    again = adapted_model(base, adapter, spec)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert not torch.allclose(logits(again), logits(base.task_model(spec)), atol=1e-3)


@pytest.mark.parametrize(("columns", "inside"), [(0, True), (2, False)])
def test_coefficients_alone_stay_in_the_span_and_temporary_columns_leave_it(
    columns: int, inside: bool, tiny: Tiny
) -> None:
    base, spec = tiny("bert"), task(columns)
    given = leased(base, TARGETS["bert"])
    model = share.prepare(base, spec, given)
    train_by_chance(model)
    adapter = share.finish(model, base, spec, given)
    for name, update in adapter.modules.items():
        assert (outside(update.delta(), given.basis[name]) < 1e-6) is inside


def test_training_leaves_the_basis_as_it_was_to_the_last_bit(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    given = leased(base, TARGETS["bert"])
    before = {name: (basis.p_NK.clone(), basis.q_DK.clone()) for name, basis in given.basis.items()}
    model = share.prepare(base, spec, given).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**ROW, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    for name, layer in lora_layers(model).items():
        for factor, leased_NK, was_NK in zip(
            (layer.lora_B, layer.lora_A), (given.basis[name].p_NK, given.basis[name].q_DK), before[name], strict=True
        ):
            assert torch.equal(factor["default"].basis_NK, was_NK)
            assert torch.equal(leased_NK, was_NK)


def test_temporary_columns_are_orthonormal_and_orthogonal_to_the_basis(tiny: Tiny) -> None:
    given = leased(tiny("bert"), TARGETS["bert"])
    model = share.prepare(tiny("bert"), task(2), given)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            whole = torch.cat([factor.basis_NK, factor.columns_NC.detach()], dim=1)
            assert torch.allclose(whole.T @ whole, torch.eye(whole.shape[1]), atol=1e-5)


def test_a_quarter_of_each_basis_is_the_default_and_never_more_than_the_rank(tiny: Tiny) -> None:
    base = tiny("bert")
    for r, expected in ((3, (3, 2)), (1, (1, 1))):  # bases of 12 and 8 directions: quarters 3 and 2
        layer = next(iter(lora_layers(share.prepare(base, task(r=r), leased(base, TARGETS["bert"]))).values()))
        counts = (layer.lora_B["default"].columns_NC.shape[1], layer.lora_A["default"].columns_NC.shape[1])
        assert counts == expected


def test_more_columns_than_a_quarter_of_the_basis_are_cut_where_they_do_not_fit(tiny: Tiny) -> None:
    base = tiny("bert")
    layer = next(iter(lora_layers(share.prepare(base, task(3), leased(base, TARGETS["bert"]))).values()))
    assert layer.lora_B["default"].columns_NC.shape[1] == 3
    assert layer.lora_A["default"].columns_NC.shape[1] == 2


def test_more_columns_than_a_quarter_of_every_basis_are_refused_with_the_number_that_fits(tiny: Tiny) -> None:
    base = tiny("bert")
    with pytest.raises(InvalidInput, match=r"4 temporary columns are more than a quarter .* at most 3") as caught:
        share.prepare(base, task(4), leased(base, TARGETS["bert"]))
    assert caught.value.where == "method.temporary_columns"
    assert caught.value.todo.startswith("set 3 or less")
    share.prepare(base, task(4))  # nothing to be more than a quarter of


def test_a_basis_of_the_whole_space_leaves_no_room_for_columns(tiny: Tiny) -> None:
    base = tiny("bert")
    model = share.prepare(base, task(), leased(base, TARGETS["bert"], ranks=(32, 31)))
    layer = next(iter(lora_layers(model).values()))
    assert layer.lora_B["default"].columns_NC is None
    assert layer.lora_A["default"].columns_NC.shape[1] == 1


def test_modules_without_a_basis_are_trained_as_plain_lora_and_named(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(0)
    given = leased(base, ("query",))
    model = share.prepare(base, spec, given)
    train_by_chance(model)
    adapter = share.finish(model, base, spec, given)
    plain = [name for name in adapter.modules if name.endswith("value")]
    assert json.loads(adapter.info["plain_modules"]) == plain
    assert {name: isinstance(layer.lora_A["default"], nn.Linear) for name, layer in lora_layers(model).items()} == {
        name: name in plain for name in adapter.modules
    }
    assert torch.allclose(logits(adapted_model(base, adapter, spec)), logits(model), atol=1e-5)


def test_in_an_empty_subspace_share_is_lora(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    model, plain = share.prepare(base, spec), lora.prepare(base, spec)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_empty_side_counts_as_no_basis(tiny: Tiny) -> None:
    base = tiny("bert")
    empty = replace(leased(base, ("query",)), basis=leased(base, ("query",), ranks=(4, 0)).basis)
    model = share.prepare(base, task(), empty)
    assert all(isinstance(layer.lora_A["default"], nn.Linear) for layer in lora_layers(model).values())


def test_the_same_seed_draws_the_same_start_in_every_process(tiny: Tiny) -> None:
    base, given = tiny("bert"), leased(tiny("bert"), TARGETS["bert"])
    first, second = (share.prepare(base, task(), given) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_coefficients_are_twelve_times_fewer_numbers_than_lora_at_768() -> None:
    # 32·32 = 1,024 against r·(n+d) = 8·1,536 = 12,288, whatever the rank.
    model = wide_model((32, 32), 0, 8)
    assert trainable_numbers(model) == {"0": 1024} == trainable_numbers(wide_model((32, 32), 0, 1))
    text = "share: 1,024 trained numbers per module in 1 module; LoRA r 8 would have 12,288 (12×)"
    assert describe(model, "share", 8) == text


def test_temporary_columns_as_many_as_the_rank_cost_as_much_as_lora_and_the_line_says_so() -> None:
    # (32 + 8)² coefficients, and on each side 8 columns of 768: 1,600 + 12,288.
    assert describe(wide_model((32, 32), None, 8), "share", 8).endswith("12,288 (0.885×)")


def test_gradient_checkpointing_gives_the_same_gradients(tiny: Tiny) -> None:
    found = []
    for checkpointing in (False, True):
        model = share.prepare(tiny("bert"), task(), leased(tiny("bert"), TARGETS["bert"]))
        train_by_chance(model)
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() == {"lora_A.columns_NC", "lora_B.columns_NC", "lora_B.weight"}
    assert all(torch.allclose(found[1][name], size, rtol=1e-5) for name, size in found[0].items())


def test_a_model_rounded_to_bfloat16_hands_over_the_basis_as_it_was_leased(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(0)
    given = leased(base, TARGETS["bert"])
    model = share.prepare(base, spec, given)
    train_by_chance(model)
    adapter: Adapter = share.finish(model.bfloat16(), base, spec, given)  # as DeepSpeed's bf16 mode does
    assert all(outside(update.delta(), given.basis[name]) < 1e-6 for name, update in adapter.modules.items())


def test_under_autocast_the_factor_is_formed_in_float32(tiny: Tiny) -> None:
    base = tiny("bert")
    model = share.prepare(base, task(0), leased(base, TARGETS["bert"]))
    train_by_chance(model)
    factor = next(iter(lora_layers(model).values())).lora_B["default"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = factor(torch.eye(8))
    assert torch.equal(rounded, factor.exact().float().bfloat16().T)


def test_coefficients_in_bfloat16_and_a_basis_in_float32_train_together(tiny: Tiny) -> None:
    """DeepSpeed's bf16 mode casts parameters and leaves buffers as they are."""
    base = tiny("bert")
    model = share.prepare(base, task(1), leased(base, TARGETS["bert"]))
    train_by_chance(model)
    factor = next(iter(lora_layers(model).values())).lora_B["default"]
    for parameter in factor.parameters():
        parameter.data = parameter.data.bfloat16()
    answer = factor(torch.eye(9, dtype=torch.bfloat16))
    assert torch.equal(answer, factor.exact().float().bfloat16().T)
    answer.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factor.parameters())


def test_a_finished_share_says_where_it_started(tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    given = leased(base, TARGETS["bert"])
    assert share.finish(share.prepare(base, spec, given), base, spec, given).info["start_of_a"] == "basis"
    assert share.finish(share.prepare(base, spec), base, spec, Given()).info["start_of_a"] == "kaiming_uniform"
