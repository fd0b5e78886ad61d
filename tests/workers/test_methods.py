"""The methods: what is prepared, and that a finished adapter is what was trained or brought."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InvalidInput
from tests.workers.method_builders import leased, logits
from tests.workers.worker_builders import sentiment_task, task_of_kind
from workers.base_model import BaseModel
from workers.evaluation import adapted_model
from workers.methods import import_adapter, lora
from workers.methods.factors import lora_layers

Tiny = Callable[[str], BaseModel]
TARGETS = {"bert": ("query", "value"), "llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", list(TARGETS))
def test_a_finished_adapter_computes_what_the_trained_model_computed(
    architecture: str, rslora: bool, tiny: Tiny
) -> None:
    base = tiny(architecture)
    spec = sentiment_task(lora={"r": 3, "target_modules": TARGETS[architecture], "use_rslora": rslora})
    model = lora.prepare(base, spec)
    torch.manual_seed(2)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    adapter = lora.finish(model, base, spec)

    again = adapted_model(base, adapter, spec)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    plain = adapted_model(base, adapter, spec, with_update=False)
    assert not torch.allclose(logits(plain), logits(model), atol=1e-3)
    assert adapter.base_sha256 == base.sha256
    assert set(adapter.modules) <= set(base.module_shapes())


def test_a_prepared_lora_trains_a_b_and_the_head_and_nothing_else(tiny: Tiny) -> None:
    model = lora.prepare(tiny("bert"), sentiment_task())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 2 + 2  # 2 layers × (query, value) × (A, B), and the head's weight and bias
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)


def test_a_can_start_inside_the_leased_basis_and_is_as_large_as_ever(tiny: Tiny) -> None:
    base = tiny("bert")
    spec = sentiment_task(method={"start_of_a": "basis"}, lora={"r": 32})
    assert lora.needs_basis(spec)
    assert not lora.needs_basis(sentiment_task())
    given = leased(base, ("query",))
    model, plain = lora.prepare(base, spec, given), lora.prepare(base, spec)
    for name, layer in lora_layers(model).items():
        a_RD, theirs_RD = (
            layers[name].lora_A["default"].weight.detach() for layers in map(lora_layers, (model, plain))
        )
        assert float(a_RD.norm()) == pytest.approx(float(theirs_RD.norm()), rel=0.15)
        if name in given.basis:
            q_DK = given.basis[name].q_DK
            assert torch.allclose(a_RD @ q_DK @ q_DK.T, a_RD, atol=1e-6)
        else:
            assert torch.equal(a_RD, theirs_RD)
        assert not layer.lora_B["default"].weight.any()
    assert lora.finish(model, base, spec, given).info["start_of_a"] == "basis"
    assert lora.finish(plain, base, spec).info["start_of_a"] == "kaiming_uniform"


def test_a_number_that_is_none_is_refused_by_its_module(tiny: Tiny) -> None:
    model = lora.prepare(tiny("bert"), sentiment_task())
    next(iter(lora_layers(model).values())).lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"NaN .*layer\.0\.attention\.self\.query\.lora_B"):
        lora.finish(model, tiny("bert"), sentiment_task())


def test_the_adapter_says_how_it_was_made(tiny: Tiny) -> None:
    spec = sentiment_task()
    info = lora.finish(lora.prepare(tiny("bert"), spec), tiny("bert"), spec).info
    assert json.loads(info["label_names"]) == ["neg", "pos"]
    assert info["start_of_a"] == "kaiming_uniform"
    assert json.loads(info["lora"])["r"] == 2
    assert info["task_type"] == "SEQ_CLS"


def test_an_unknown_target_module_is_answered_with_those_the_base_model_has(tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match="no linear layer 'q_proj'") as caught:
        lora.prepare(tiny("bert"), sentiment_task(lora={"target_modules": ("query", "q_proj")}))
    assert caught.value.todo == "it has: dense, key, query, value"
    assert caught.value.where == "lora.target_modules"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", list(TARGETS))
def test_an_imported_adapter_computes_what_peft_computed(
    architecture: str, tiny: Tiny, peft_folder: Callable[..., str]
) -> None:
    base = tiny(architecture)
    options = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    folder = peft_folder(base, target_modules=list(TARGETS[architecture]), use_rslora=True, **options)
    spec = sentiment_task(method={"name": "import", "adapter": folder})
    adapter = import_adapter.finish(import_adapter.prepare(base, spec), base, spec)

    from peft import PeftModel

    theirs = PeftModel.from_pretrained(base.task_model(task_of_kind("sequence_classification")), folder)
    assert torch.allclose(logits(adapted_model(base, adapter, spec)), logits(theirs), atol=1e-5)
    assert adapter.base_model == "tiny"


def test_an_adapter_of_the_bare_backbone_gets_the_names_of_the_task_model(
    tiny: Tiny, peft_folder: Callable[..., str]
) -> None:
    folder = Path(peft_folder(tiny("bert"), target_modules=["query"]))
    weights = folder / "adapter_model.safetensors"
    save_file({name.replace("model.bert.", "model."): t for name, t in load_file(weights).items()}, weights)
    spec = sentiment_task(method={"name": "import", "adapter": str(folder)})
    adapter = import_adapter.finish(import_adapter.prepare(tiny("bert"), spec), tiny("bert"), spec)
    assert list(adapter.modules) == [f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)]


def test_one_module_under_two_names_is_refused_with_both(tiny: Tiny, peft_folder: Callable[..., str]) -> None:
    folder = Path(peft_folder(tiny("bert"), target_modules=["query"]))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {name.replace("model.bert.", "model."): t.clone() for name, t in tensors.items()}, weights)
    spec = sentiment_task(method={"name": "import", "adapter": str(folder)})
    name = "encoder.layer.0.attention.self.query"
    with pytest.raises(InvalidInput, match=f"'bert.{name}' twice, as '(bert.)?{name}' and as '(bert.)?{name}'"):
        import_adapter.finish(import_adapter.prepare(tiny("bert"), spec), tiny("bert"), spec)


def test_an_adapter_of_another_base_model_is_refused_with_the_module_that_does_not_fit(
    tiny: Tiny, peft_folder: Callable[..., str]
) -> None:
    spec = sentiment_task(method={"name": "import", "adapter": peft_folder(tiny("llama"), target_modules=["q_proj"])})
    with pytest.raises(InvalidInput, match=r"'model\.layers\.0\.self_attn\.q_proj'.*does not have"):
        import_adapter.finish(import_adapter.prepare(tiny("bert"), spec), tiny("bert"), spec)


def test_an_adapter_of_another_width_is_refused_with_both_shapes(tiny: Tiny, peft_folder: Callable[..., str]) -> None:
    folder = Path(peft_folder(tiny("bert"), target_modules=["query"]))
    weights = folder / "adapter_model.safetensors"
    wider = {n: torch.ones(2, 40) if "lora_A" in n else t for n, t in load_file(weights).items()}
    save_file(wider, weights)
    spec = sentiment_task(method={"name": "import", "adapter": str(folder)})
    with pytest.raises(InvalidInput, match=r"\(32, 40\); .* \(32, 32\)"):
        import_adapter.finish(import_adapter.prepare(tiny("bert"), spec), tiny("bert"), spec)


def test_a_head_for_other_labels_is_refused_with_both_shapes(tiny: Tiny, peft_folder: Callable[..., str]) -> None:
    spec = sentiment_task(
        method={"name": "import", "adapter": peft_folder(tiny("bert"), labels=3, target_modules=["query"])}
    )
    adapter = import_adapter.finish(import_adapter.prepare(tiny("bert"), spec), tiny("bert"), spec)
    with pytest.raises(InvalidInput, match=r"shape \(3, 32\); for 2 labels the base model needs \(2, 32\)|\(3,\)"):
        adapted_model(tiny("bert"), adapter, spec)
