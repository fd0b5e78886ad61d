"""PEFT folders in and out, against PEFT itself: the logits decide."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from configs.errors import InvalidInput
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.formats.peft import from_peft, read_peft_folder, to_peft, write_peft_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),  # PEFT's guess about a lora_bias
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

SMALL = {"vocab_size": 64, "pad_token_id": 0, "num_labels": 3}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SMALL),
    "llama": LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        **SMALL,
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL),
}
TOKENS = torch.tensor([[5, 9, 33, 60, 2], [7, 7, 12, 1, 3]])


def base_model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture]).eval()


def trained(architecture: str, **options: Any) -> PeftModel:
    """A PEFT model that looks trained: B and the head are not what they started as."""
    config = LoraConfig(**({"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 12, "lora_dropout": 0.1} | options))
    model = get_peft_model(base_model(architecture), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return folder


def key_of(folder: Path, part: str) -> str:
    return next(name for name in load_file(folder / "adapter_model.safetensors") if part in name)


CASES = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["query", "value"], "use_rslora": True}),
    ("bert", {"target_modules": "all-linear", "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 7}}),
    ("bert", {"target_modules": ["query", "dense"], "alpha_pattern": {"query": 3}, "rank_pattern": {"query": 2}}),
    (
        "bert",
        {
            "target_modules": ["key"],
            "use_rslora": True,
            "rank_pattern": {"layer.0.*key": 9},
            "alpha_pattern": {"key": 5},
        },
    ),
    ("bert", {"target_modules": r".*layer\.1.*(query|value)"}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_an_adapter_that_goes_in_and_out_again_gives_the_same_logits(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(architecture, **options)
    adapter = read_peft_folder(saved(model, tmp_path / "in"), "base", "")
    write_peft_folder(tmp_path / "out", adapter, "some/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        again = PeftModel.from_pretrained(base_model(architecture), tmp_path / "out").eval()

    assert not torch.allclose(logits(model), logits(base_model(architecture)), atol=1e-2)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_the_update_of_every_module_is_what_peft_itself_would_add(architecture: str, options: dict[str, Any]) -> None:
    model = trained(architecture, **options)
    adapter = from_peft(
        model.peft_config["default"].to_dict(), get_peft_model_state_dict(model), base_model="base", base_sha256=""
    )

    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        weight_update = layer.get_delta_weight("default")
        stored_transposed = bool(options.get("fan_in_fan_out"))
        expected = weight_update.T if stored_transposed else weight_update
        assert torch.allclose(adapter.modules[name].delta().float(), expected, atol=1e-6)


def test_the_head_travels_with_the_adapter_unchanged(tmp_path: Path) -> None:
    model = trained("bert", target_modules=["query"])
    adapter = read_peft_folder(saved(model, tmp_path), "base", "")

    head = model.get_base_model().classifier.modules_to_save["default"]
    assert set(adapter.head) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(adapter.head["classifier.weight"], head.weight)
    assert torch.equal(adapter.head["classifier.bias"], head.bias)


def test_a_head_of_no_task_type_is_not_said_to_classify_text(tmp_path: Path) -> None:
    # A model that reads pictures has such a head, and PEFT's SEQ_CLS would hand it token ids.
    model = trained("bert", target_modules=["query"], task_type=None, modules_to_save=["classifier"])
    config, tensors = to_peft(read_peft_folder(saved(model, tmp_path), "base", ""))
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    assert "base_model.model.classifier.weight" in tensors


def test_what_is_written_has_scale_one_and_singular_values_in_b(tmp_path: Path) -> None:
    adapter = read_peft_folder(saved(trained("bert", target_modules=["query"]), tmp_path), "base", "")
    config, tensors = to_peft(adapter)

    assert config["lora_alpha"] == config["r"] == 4
    a_RD = tensors["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"]
    b_NR = tensors["base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"]
    sigma_R = adapter.modules["bert.encoder.layer.0.attention.self.query"].sigma_R
    assert torch.allclose(a_RD @ a_RD.T, torch.eye(4), atol=1e-6)
    assert torch.allclose(b_NR.norm(dim=0), sigma_R, atol=1e-6)


def test_modules_of_all_ranks_are_written_with_one_because_servers_read_no_patterns(tmp_path: Path) -> None:
    mixed = trained("bert", target_modules=["query", "value"], rank_pattern={"layer.0.*value": 5})
    full = read_peft_folder(saved(mixed, tmp_path / "in"), "base", "")
    empty = ModuleUpdate(torch.zeros(16, 0), torch.zeros(0), torch.zeros(16, 0))
    name = "bert.encoder.layer.1.attention.self.query"
    adapter = Adapter("base", "", {**full.modules, name: empty}, full.head, full.info)
    write_peft_folder(tmp_path / "out", adapter, "some/base")

    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert not config.keys() & {"rank_pattern", "alpha_pattern"}
    shapes = {tuple(t.shape) for n, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_" in n}
    assert shapes == {(5, 16), (16, 5)}
    model = PeftModel.from_pretrained(base_model("bert"), tmp_path / "out").get_base_model()
    for module, update in adapter.modules.items():
        added = model.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(added.double(), update.delta(), atol=1e-6)


def test_a_dora_adapter_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"], use_dora=True), tmp_path)
    with pytest.raises(InvalidInput, match="use_dora"):
        read_peft_folder(folder, "base", "")
    with pytest.raises(InvalidInput, match="DoRA magnitude"):
        read_peft_folder(edited(folder, use_dora=False), "base", "")


def test_a_lora_bias_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"], lora_bias=True), tmp_path)
    with pytest.raises(InvalidInput, match="lora_bias"):
        read_peft_folder(folder, "base", "")
    with pytest.raises(InvalidInput, match="bias, which cannot be merged"):
        read_peft_folder(edited(folder, lora_bias=False), "base", "")


def test_trained_biases_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"], bias="lora_only"), tmp_path)
    with pytest.raises(InvalidInput, match="bias='lora_only'"):
        read_peft_folder(folder, "base", "")


def test_a_lora_of_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query", "position_embeddings"]), tmp_path)
    with pytest.raises(InvalidInput, match="LoRA of an embedding"):
        read_peft_folder(folder, "base", "")


def test_a_lora_of_a_convolution_is_refused_by_name(tmp_path: Path) -> None:
    model = get_peft_model(
        torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 4, 3)}), LoraConfig(target_modules=["conv"], r=2)
    )
    with pytest.raises(InvalidInput, match=r"'conv'.*convolutions"):
        read_peft_folder(saved(model, tmp_path), "base", "")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "IA3", "peft_type 'IA3'"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices"),
        ("target_parameters", ["experts.down"], "target_parameters"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("init_lora_weights", "pissa_niter_4", "changes the base weights"),
        ("r", 0, "r=0"),
        ("r", 5, "rank 4 in .*says 5"),
        ("lora_alpha", "12", "lora_alpha='12'"),
        ("alpha_pattern", {"query": -1}, "alpha_pattern"),
        ("rank_pattern", ["query"], "rank_pattern=.*mapping"),
        ("modules_to_save", "classifier", "modules_to_save='classifier'.*list"),
        ("modules_to_save", 5, "modules_to_save=5.*list"),
        ("alpha_pattern", {"(a+)+b": 2}, "too complicated"),
        ("alpha_pattern", {"(": 2}, "broken pattern"),
        ("target_modules", ["value"], "which target_modules .* does not name"),
        ("target_modules", ["query", "key"], "names 'key' .* no tensors"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused_by_name(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with pytest.raises(InvalidInput, match=said):
        read_peft_folder(edited(folder, **{key: value}), "base", "")


def test_a_missing_half_of_a_pair_is_refused_with_its_module(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    key = key_of(folder, "layer.1.attention.self.query.lora_B")
    with pytest.raises(InvalidInput, match=r"no lora_B for the module 'bert\.encoder\.layer\.1"):
        read_peft_folder(with_tensors(folder, **{key: None}), "base", "")


@pytest.mark.parametrize("name", ["base_model.model.bert.embeddings.weight", "stray.weight"])
def test_a_tensor_of_unknown_use_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with pytest.raises(InvalidInput, match=re.escape(name)):
        read_peft_folder(with_tensors(folder, **{name: torch.zeros(2)}), "base", "")


def test_shapes_of_b_and_a_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with pytest.raises(InvalidInput, match="ranks do not fit"):
        read_peft_folder(with_tensors(folder, **{key_of(folder, "lora_A"): torch.zeros(3, 16)}), "base", "")


@pytest.mark.parametrize("part", ["lora_A", "classifier.weight"])
def test_a_tensor_with_nan_is_refused_by_name(part: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    key = key_of(folder, part)
    broken = load_file(folder / "adapter_model.safetensors")[key]
    broken[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=re.escape(key)):
        read_peft_folder(with_tensors(folder, **{key: broken}), "base", "")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InvalidInput, match="pickle, which can run code and is never read"):
        read_peft_folder(folder, "base", "")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
def test_a_missing_or_broken_file_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=re.escape(name)):
        read_peft_folder(folder, "base", "")
