"""Identity on real models: an adapter that is imported, merged with another and exported gives the same logits.

The models are small and random; what PEFT makes of the folder as it was delivered is the truth. Two adapters that
nobody here trained are among them (tests/data/gpt2_adapters), on a random GPT-2 layer of the real width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from subspace_store import Adapter
from subspace_store.export import export_tasks
from subspace_store.formats.peft import read_peft_folder
from tests.subspace_store.builders import fresh_storage, merged, opened

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

REAL = Path(__file__).parents[2] / "data/gpt2_adapters"
TOKENS = torch.tensor([[5, 9, 33, 60, 2], [7, 7, 12, 1, 3]])
WORDS = {"vocab_size": 64, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def classifier() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return AutoModelForSequenceClassification.from_config(BertConfig(**sizes, num_labels=3, **WORDS))


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **HEADS, **WORDS))


def gpt2(width: int = 16, layers: int = 2) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1, **WORDS)
    )


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "mixed ranks and alphas": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"q_proj": 3, "down_proj": 20},
        },
    ),
    "mixed ranks with rslora": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 9}},
    ),
    "transposed weights": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "a rank above a module's size": (llama, {"target_modules": ["k_proj"], "r": 12}),
    "a head": (classifier, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "a head of two modules": (
        classifier,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "bert.pooler"]},
    ),
    "weights in bfloat16": (llama, {"target_modules": "all-linear"}),
}


def base_of(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def delivered(make: Callable[[], PreTrainedModel], folder: Path, seed: int, **options: Any) -> Path:
    """The folder of an adapter that looks trained: B and the head are not what they started as."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}
    model = get_peft_model(base_of(make), LoraConfig(**(settings | options)))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def adapted(make: Callable[[], PreTrainedModel], folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base_of(make), folder).eval())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def exported(adapters: Mapping[str, Adapter], folder: Path) -> dict[str, Path]:
    """The adapters' folders after all were merged, one by one, into a subspace whose k does not bind."""
    store = opened(fresh_storage(), energy_ratio_min=1.0, rank_max=4096)
    for task_id, adapter in adapters.items():
        merged(store, {task_id: adapter})
    exports = export_tasks(store, folder, version=len(adapters), base_source="some/base")
    return {export.task_id: folder / export.name for export in exports}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_was_merged_with_another_and_exported_gives_the_logits_it_was_delivered_with(
    case: str, tmp_path: Path
) -> None:
    make, options = CASES[case]
    folder = delivered(make, tmp_path / "in", seed=1, **options)
    if case == "weights in bfloat16":
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    other = delivered(make, tmp_path / "other", seed=2, **options)
    adapters = {"mine": read_peft_folder(folder, "tiny-base", ""), "other": read_peft_folder(other, "tiny-base", "")}
    exports = exported(adapters, tmp_path / "out")

    expected = adapted(make, folder)
    assert distance(adapted(make, exports["mine"]), expected) <= 1e-5
    assert distance(logits(base_of(make)), expected) > 1e-2
    assert distance(adapted(make, other), expected) > 1e-2


def test_adapters_of_gpt2_that_others_trained_come_out_of_one_subspace_as_they_went_in(tmp_path: Path) -> None:
    adapters = {domain: read_peft_folder(REAL / domain, "tiny-base", "") for domain in ("legal", "medical")}
    exports = exported(adapters, tmp_path)
    for domain, adapter in adapters.items():
        assert set(adapter.modules) == {
            f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        }
        again = read_peft_folder(exports[domain], "tiny-base", "")
        for name, update in adapter.modules.items():
            assert distance(again.modules[name].delta(), update.delta()) <= 1e-5

    def base() -> PreTrainedModel:
        return gpt2(width=768, layers=1)

    truth = {domain: adapted(base, REAL / domain) for domain in adapters}
    for domain, expected in truth.items():
        assert distance(adapted(base, exports[domain]), expected) <= 1e-5
        assert distance(logits(base_of(base)), expected) > 1e-3
    assert distance(truth["legal"], truth["medical"]) > 1e-3
