"""PEFT folders in and out, against PEFT itself: the logits decide."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
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
from subspace_store.adapter import Adapter, ModuleUpdate, adapter_from_bytes, adapter_to_bytes, adapter_to_file
from subspace_store.formats.peft import from_peft, read_peft_folder, to_peft, write_peft_folder
from subspace_store.formats.peft_config import _KNOWN, unknown_settings
from subspace_store.formats.weights_file import FILE_BYTES_MAX, read_weights

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
        ("alpha_pattern", {"query": 10**400}, r"alpha_pattern\['query'\]=a whole number of 1329 bits"),
        ("alpha_pattern", {"query": float("nan")}, "alpha_pattern.*nan"),
        ("alpha_pattern", {"(?!key)query": 2}, "cannot be read: (?s:.*)use the modules' full names"),
        ("alpha_pattern", {"((a{1000}){1000}){1000}": 2}, "cannot be read"),
        ("alpha_pattern", {"[[:alpha:]]+": 2}, "cannot be read"),
        ("alpha_pattern", {"(": 2}, "cannot be read"),
        ("rank_pattern", {"query": 4.0}, "positive whole number"),
        ("r", 10**400, "r=a whole number of 1329 bits"),
        ("r", True, "r=True"),
        ("r", "4", "r='4'"),
        ("r", [4], r"r=\[4\]"),
        ("lora_alpha", 10**400, "lora_alpha=a whole number of 1329 bits"),
        ("lora_alpha", float("nan"), "lora_alpha=nan"),
        ("lora_alpha", float("inf"), "lora_alpha=inf"),
        ("lora_alpha", -1, "lora_alpha=-1"),
        ("lora_alpha", 1e300, r"lora_alpha=1e\+300"),
        ("lora_alpha", [[[12]]], "lora_alpha="),
        ("lora_dropout", "0.1", "lora_dropout='0.1'"),
        ("use_rslora", "no", "use_rslora='no'"),
        ("fan_in_fan_out", 1, "fan_in_fan_out=1"),
        ("task_type", ["SEQ_CLS"], "task_type="),
        ("base_model_name_or_path", 7, "base_model_name_or_path=7"),
        ("modules_to_save", ["m"] * 1001, "1,001 modules_to_save"),
        ("target_modules", [1], "target_modules="),
        ("target_modules", ["value"], "which target_modules .* does not name"),
        ("target_modules", ["query", "key"], "names 'key' .* no tensors"),
        ("layers_to_transform", [0], r"layer\.1\..*PEFT leaves alone by layers_to_transform=\[0\]"),
        ("layers_to_transform", 1, r"layer\.0\..*PEFT leaves alone by layers_to_transform=1"),
        ("layers_to_transform", "0", "layers_to_transform='0', which must be whole numbers"),
        ("exclude_modules", ["query"], r"PEFT leaves alone by exclude_modules=\['query'\]"),
        ("exclude_modules", r".*layer\.0\..*", r"layer\.0\..*PEFT leaves alone by exclude_modules"),
        ("exclude_modules", [1], r"exclude_modules=\[1\], which must be names"),
        ("exclude_modules", "(", "pattern in exclude_modules that cannot be read"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused_by_name(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with pytest.raises(InvalidInput, match=said):
        read_peft_folder(edited(folder, **{key: value}), "base", "")


@pytest.mark.parametrize(
    "left_out",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layer"},
        {"exclude_modules": ["layer.0.attention.self.query"]},
        {"exclude_modules": r".*layer\.1.*"},
        {"exclude_modules": "query"},  # a pattern for the whole name: it excludes nothing
    ],
)
def test_what_peft_left_out_of_its_targets_is_not_asked_for(left_out: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"], **left_out), tmp_path)
    adapter = read_peft_folder(folder, "base", "")
    tensors = load_file(folder / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors if ".lora_" in key}
    assert adapter.modules.keys() == adapted


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_small_floats_are_read_as_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    known = load_file(folder / "adapter_model.safetensors")
    exact = read_peft_folder(with_tensors(folder, **{k: t.to(dtype).float() for k, t in known.items()}), "base", "")
    found = read_peft_folder(with_tensors(folder, **{k: t.to(dtype) for k, t in known.items()}), "base", "")
    for name, update in exact.modules.items():
        assert torch.allclose(found.modules[name].delta(), update.delta(), atol=1e-6)


def test_a_setting_that_nobody_knows_is_kept_by_name(tmp_path: Path) -> None:
    folder = edited(saved(trained("bert", target_modules=["query"]), tmp_path), new_scale=3.0, other_default=None)
    assert json.loads(read_peft_folder(folder, "base", "").info["unknown_settings"]) == ["new_scale"]


def test_every_setting_of_peft_itself_is_known() -> None:
    settings = LoraConfig(target_modules=["query"], runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert unknown_settings(settings.to_dict()) == []
    unknown = {field.name for field in dataclasses.fields(LoraConfig)} - {*_KNOWN}
    assert unknown == set(), "read what they mean, then name them in _KNOWN or _PLAIN_VALUES"


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


# --- what is dear to read, or lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(|a)" * 29 + "b", "(a?)" * 29 + "b", "(a+)+b", "(a|aa)+c", "(.*)" * 20 + "x", "a" * 250]
)
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_takes_no_time_whatever_it_says(key: str, pattern: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("attention.self", "a" * 29): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    edited(folder, **{key: {pattern: 4}})
    started = time.process_time()
    read_peft_folder(folder, "base", "")
    assert time.process_time() - started < 2  # backtracking would take 2^29 steps


def test_patterns_are_refused_where_there_are_too_many_to_try(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    patterns = {f"no{number}": 1 for number in range(10_000)}
    assert "query" in str(read_peft_folder(edited(folder, alpha_pattern=patterns), "base", "").modules)
    many = from_peft_of(folder, modules=400)
    started = time.process_time()
    with pytest.raises(InvalidInput, match="10,000 patterns in alpha_pattern for 400 modules, which takes too long"):
        read_peft_folder(many, "base", "")
    assert time.process_time() - started < 5


def from_peft_of(folder: Path, modules: int) -> Path:
    """The folder with the first module's tensors under so many names."""
    pair = {
        part: load_file(folder / "adapter_model.safetensors")[key_of(folder, part)] for part in ("lora_A", "lora_B")
    }
    file = folder / "adapter_model.safetensors"
    save_file(
        {
            f"base_model.model.{number}.query.{part}.weight": tensor.clone()
            for number in range(modules)
            for part, tensor in pair.items()
        },
        file,
    )
    return folder


def test_lists_of_names_are_looked_up_and_not_compared_one_by_one(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    names = [f"no{number}" for number in range(200_000)]
    started = time.process_time()
    with pytest.raises(InvalidInput, match="names 'no0' in target_modules but has no tensors"):
        read_peft_folder(edited(from_peft_of(folder, modules=4000), target_modules=[*names, "query"]), "base", "")
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"r": ' * 5000, "not valid JSON"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"peft_type": "LORA", "r": 4, "r": 8}', "the key 'r' stands twice"),
        ("{" + " " * 4 * 2**20 + "}", r"has 4,194,306 bytes, more than the 4,194,304 that are read"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 1, "bias": ' + "[" * 400 + "]" * 400 + "}", "uses bias="),
    ],
)
def test_a_configuration_that_is_deep_long_or_says_one_thing_twice_is_refused(
    content: str, said: str, tmp_path: Path
) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(InvalidInput, match=said):
        read_peft_folder(folder, "base", "")


def weights_of(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        weights_of({}, length=2**63),
        weights_of({}, length=2**64 - 1),
        weights_of({}, length=99_000_000),
        weights_of({"a": tensor(0, 64, [16]), "b": tensor(32, 64, [8])}),
        weights_of({"a": tensor(0, 64, [-16])}),
        weights_of({"a": tensor(0, 64, [16.5])}),
        weights_of({"a": tensor(0, 10**12, [250 * 10**9])}),
        weights_of({"a": tensor(0, 64, [2**62, 2**62])}),
        weights_of({"a": tensor(0, 64, [17])}),
        weights_of({"a": tensor(64, 0, [16])}),
        weights_of({"a": tensor(0, 32, [8])}),
        weights_of({"a": tensor(0, 64, [128], "F4")}),
        weights_of({"a": tensor(0, 64, [64], "F8_E8M0")}),
        weights_of({"a": tensor(0, 64, [16], "NO")}),
        weights_of({"a": {"dtype": "F32"}}),
        weights_of({"a": None}),
        weights_of([1, 2]),
        weights_of({"__metadata__": [1]}),
        weights_of(b"[" * 100_000),
        weights_of(b'{"a":' * 100_000),
        weights_of(b"\xff\xfe{}"),
        weights_of({f"t{number}": tensor(0, 0, [0]) for number in range(100_001)}, b""),
    ],
    ids=range(24),
)
def test_weights_whose_header_lies_are_refused_by_the_files_name_at_once(content: bytes, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(content)
    started = time.process_time()
    with pytest.raises(InvalidInput, match="is not a safetensors file that can be read") as caught:
        read_peft_folder(folder, "base", "")
    assert caught.value.where == str(folder / "adapter_model.safetensors")
    assert time.process_time() - started < 5


def test_weights_that_are_larger_than_any_adapter_are_not_read_at_all(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(8 * 2**30 + 1)  # a hole: it takes no room
    with pytest.raises(InvalidInput, match="has 8,589,934,593 bytes, more than"):
        read_peft_folder(folder, "base", "")


# --- what other programs write -------------------------------------------------------------------------------------


def renamed(folder: Path, old: str, new: str) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file({re.sub(old, new, name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("name", ["default", "my adapter", "weight", "lora_A"])
def test_an_adapters_own_name_inside_the_names_of_tensors_is_taken_out(name: str, tmp_path: Path) -> None:
    model = trained("bert", target_modules=["query", "value"])
    expected = read_peft_folder(saved(model, tmp_path / "plain"), "base", "")
    other = renamed(saved(model, tmp_path / "named"), r"(lora_[AB])\.", rf"\1.{name}.")
    renamed(other, r"classifier\.", f"classifier.modules_to_save.{name}.")
    with_tensors(other, **{"base_model.model.classifier.original_module.weight": torch.zeros(3, 16)})
    found = read_peft_folder(other, "base", "")
    assert found.head.keys() == expected.head.keys()
    assert all(torch.equal(found.head[key], expected.head[key]) for key in expected.head)
    assert all(torch.equal(found.modules[key].delta(), expected.modules[key].delta()) for key in expected.modules)


def test_two_adapters_in_one_file_are_refused_with_both_names(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    renamed(folder, r"(layer\.1.*lora_[AB])\.", r"\1.second.")
    with pytest.raises(InvalidInput, match="holds 2 adapters: one without a name, 'second'"):
        read_peft_folder(folder, "base", "")


def test_tensors_that_were_taken_out_of_a_model_without_pefts_wrapper_are_read(tmp_path: Path) -> None:
    model = trained("bert", target_modules=["query"])
    expected = read_peft_folder(saved(model, tmp_path / "plain"), "base", "")
    found = read_peft_folder(renamed(saved(model, tmp_path / "bare"), r"^base_model\.model\.", ""), "base", "")
    assert found.modules.keys() == expected.modules.keys()
    assert found.head.keys() == expected.head.keys()


@pytest.mark.parametrize("part", ["lora_A", "classifier.weight"])
def test_tensors_that_zero_3_left_empty_are_told_as_that(part: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with_tensors(folder, **{key_of(folder, part): torch.zeros(0)})
    with pytest.raises(InvalidInput, match=r"of shape \(0,\): it was saved from ZeRO-3 without gathering") as caught:
        read_peft_folder(folder, "base", "")
    assert "GatheredParameters" in caught.value.todo


def test_one_ranks_flat_part_of_a_matrix_is_told_as_that(tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with_tensors(folder, **{key_of(folder, "lora_A"): torch.zeros(32)})
    with pytest.raises(InvalidInput, match=r"with shape \(32,\): one rank's flat part of a matrix"):
        read_peft_folder(folder, "base", "")


@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("bert.embeddings.word_embeddings.weight", "save_embedding_layers=False"),
        ("model.embed_tokens.weight", "save_embedding_layers=False"),
        ("lm_head.weight", "save_embedding_layers=False"),
        ("bert.encoder.layer.0.attention.self.query.base_layer.weight", "save the adapter alone"),
        ("bert.pooler.dense.weight", "list its module in modules_to_save"),
        ("bert.encoder.layer.0.attention.self.query.lora_embedding_A", "without the embedding in target_modules"),
    ],
)
def test_what_lies_beside_a_lora_is_refused_with_what_helps(name: str, todo: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    with pytest.raises(InvalidInput, match=re.escape(name)) as caught:
        read_peft_folder(with_tensors(folder, **{f"base_model.model.{name}": torch.ones(2, 2)}), "base", "")
    assert todo in caught.value.todo


def test_an_export_says_its_labels_and_the_digest_of_its_base_model(tmp_path: Path) -> None:
    adapter = read_peft_folder(saved(trained("bert", target_modules=["query"]), tmp_path / "in"), "base", "ab" * 32)
    labels = {"label_names": json.dumps(["größer", 'a "quoted" | one', "c"])}
    write_peft_folder(tmp_path / "out", replace(adapter, info={**adapter.info, **labels}), "some/base")
    again = read_peft_folder(tmp_path / "out", "base", "cd" * 32)
    assert json.loads(again.info["label_names"]) == ["größer", 'a "quoted" | one', "c"]
    assert (again.info["trained_on"], again.info["trained_on_sha256"]) == ("some/base", "ab" * 32)
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label2id"]) == {"größer": 0, 'a "quoted" | one': 1, "c": 2}
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith('---\nbase_model: "some/base"\nlibrary_name: peft\n---\n')
    assert "ab" * 32 in card
    assert '| 0 | "größer" |' in card


def test_the_same_adapter_is_written_as_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    adapter = read_peft_folder(saved(trained("bert", target_modules=["query"]), tmp_path / "in"), "base", "ab" * 32)
    named = replace(adapter, info={**adapter.info, "label_names": '["a", "b", "c"]'})
    write_peft_folder(tmp_path / "out", named, "some/base")
    content = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header) == sorted(header)  # not in the order of hashes
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize("labels", ["[1, 2]", '{"0": "a", "2": "b"}', '{"0": 5}', "no", "[" * 5000])
def test_labels_in_a_header_that_name_no_output_are_refused(labels: str, tmp_path: Path) -> None:
    folder = saved(trained("bert", target_modules=["query"]), tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "id2label": labels})
    with pytest.raises(InvalidInput, match=r"id2label in the header of adapter_model\.safetensors that gives no label"):
        read_peft_folder(folder, "base", "")


def test_weights_are_views_of_their_file_and_not_in_memory(tmp_path: Path) -> None:
    file = saved(trained("bert", target_modules=["query"]), tmp_path) / "adapter_model.safetensors"
    tensors, _ = read_weights(file, "")
    assert len(tensors) > 3
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == {
        next(iter(tensors.values())).untyped_storage().data_ptr()
    }
    assert all(tensor.untyped_storage().nbytes() == file.stat().st_size for tensor in tensors.values())
    expected = load_file(file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    read = read_peft_folder(file.parent, "tiny", "")
    for parameter in (*read.head.values(), *(update.u_NR for update in read.modules.values())):
        assert parameter.untyped_storage().nbytes() < file.stat().st_size  # what is kept is no view of the file


def test_tensors_that_are_not_aligned_are_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert read_weights(file, "")[0]["a"].tolist() == [1.5, -2.0]


def test_weights_that_are_too_large_are_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as made:
        made.truncate(FILE_BYTES_MAX + 1)  # a hole: it takes no space
    with pytest.raises(InvalidInput, match="2,147,483,649 bytes, more than the 2,147,483,648 that are read") as caught:
        read_weights(file, "")
    assert caught.value.todo == "save it in bfloat16, or with a smaller rank"


def test_an_adapter_written_to_a_file_is_the_same_bytes(tmp_path: Path) -> None:
    adapter = read_peft_folder(saved(trained("bert", target_modules=["query"]), tmp_path), "tiny", "")
    same = next(iter(adapter.modules.values()))
    adapter = replace(adapter, modules={**adapter.modules, "again": same})  # tensors that share their memory
    adapter_to_file(adapter, tmp_path / "written")
    assert (tmp_path / "written").read_bytes() == adapter_to_bytes(adapter)
    assert adapter_from_bytes(adapter_to_bytes(adapter)).modules.keys() == adapter.modules.keys()
