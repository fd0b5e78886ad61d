"""Diffusers' LoRA files in and out: the update of every module decides, and the output of an adapted model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import InvalidInput
from subspace_store import Adapter
from subspace_store.formats.diffusers import read_diffusers_file, to_diffusers, write_diffusers_file
from tests.subspace_store.builders import fresh_storage, merged, opened, random_adapter

BLOCK = "transformer.single_transformer_blocks.0"
RANKS = {
    f"{BLOCK}.attn.to_q": 4,
    f"{BLOCK}.proj_mlp": 2,
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": 3,
}


def pairs(seed: int = 0, ranks: Mapping[str, int] = RANKS) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to B and A."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(24, rank, generator=generator), torch.randn(rank, 16, generator=generator))
        for name, rank in ranks.items()
    }


def file_of(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    names: tuple[str, str] = ("lora_A", "lora_B"),
    alphas: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """A file as diffusers writes it."""
    tensors = {f"{name}.{names[0]}.weight": a for name, (_, a) in factors.items()}
    tensors |= {f"{name}.{names[1]}.weight": b for name, (b, _) in factors.items()}
    tensors |= {f"{name}.alpha": torch.tensor(alpha) for name, alpha in (alphas or {}).items()}
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata)} if metadata is not None else {})
    save_file(tensors | dict(extra or {}), path, header)
    return path


def read(path: Path) -> Adapter:
    return read_diffusers_file(path, "tiny-base", "")


def expect(adapter: Adapter, factors: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]) -> None:
    assert set(adapter.modules) == set(factors)
    for name, (b_NR, a_RD) in factors.items():
        truth = scales[name] * b_NR.double() @ a_RD.double()
        assert float((adapter.modules[name].delta() - truth).norm()) <= 1e-5 * float(truth.norm()), name


ONE = dict.fromkeys(RANKS, 1.0)


@pytest.mark.parametrize(
    "names", [("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")]
)
def test_a_file_that_says_nothing_about_the_scale_means_b_times_a(names: tuple[str, str], tmp_path: Path) -> None:
    expect(read(file_of(tmp_path / "lora.safetensors", pairs(), names)), pairs(), ONE)


def test_alphas_beside_the_factors_are_divided_by_each_modules_rank(tmp_path: Path) -> None:
    path = file_of(tmp_path / "lora.safetensors", pairs(), alphas=dict.fromkeys(RANKS, 6.0))
    expect(read(path), pairs(), {name: 6 / rank for name, rank in RANKS.items()})


def test_a_component_may_have_alphas_and_another_none(tmp_path: Path) -> None:
    alphas = {name: 6.0 for name in RANKS if name.startswith("transformer.")}
    path = file_of(tmp_path / "lora.safetensors", pairs(), alphas=alphas)
    expect(read(path), pairs(), {name: 6 / rank if name in alphas else 1.0 for name, rank in RANKS.items()})


def test_the_configurations_in_the_header_say_the_scales(tmp_path: Path) -> None:
    metadata = {
        "transformer.r": 4,
        "transformer.lora_alpha": 12,
        "transformer.rank_pattern": {"single_transformer_blocks.0.proj_mlp": 2},
        "transformer.alpha_pattern": {"proj_mlp": 10},
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 6,
        "text_encoder.use_rslora": True,
    }
    path = file_of(tmp_path / "lora.safetensors", pairs(), metadata=metadata)
    expect(read(path), pairs(), dict(zip(RANKS, (12 / 4, 10 / 2, 6 / 3**0.5), strict=True)))


def test_a_folder_is_read_by_the_name_that_diffusers_gives_the_file(tmp_path: Path) -> None:
    file_of(tmp_path / "pytorch_lora_weights.safetensors", pairs())
    expect(read(tmp_path), pairs(), ONE)


def test_adapters_of_mixed_ranks_come_out_of_one_subspace_as_they_went_in(tmp_path: Path) -> None:
    store = opened(fresh_storage(), energy_ratio_min=1.0, rank_max=64)
    delivered = {}
    for seed, task in enumerate(("style", "subject")):
        path = file_of(tmp_path / f"{task}.safetensors", pairs(seed), alphas=dict.fromkeys(RANKS, 6.0))
        delivered[task] = read(path)
        merged(store, {task: delivered[task]})
    for seed, task in enumerate(("style", "subject")):
        exported = store.adapter(task, 2)
        assert exported.info["format"] == "diffusers"
        write_diffusers_file(tmp_path / task / "out.safetensors", exported)
        expect(read(tmp_path / task / "out.safetensors"), pairs(seed), {n: 6 / rank for n, rank in RANKS.items()})


def test_what_is_written_has_one_rank_in_a_component_and_needs_no_alpha(tmp_path: Path) -> None:
    adapter = read(file_of(tmp_path / "in.safetensors", pairs()))
    write_diffusers_file(tmp_path / "out.safetensors", adapter)
    written = load_file(tmp_path / "out.safetensors")
    assert {name.rpartition(".lora_")[2] for name in written} == {"A.weight", "B.weight"}
    ranks = {name.removesuffix(".lora_A.weight"): len(t) for name, t in written.items() if "lora_A" in name}
    assert ranks == dict(zip(RANKS, (4, 4, 3), strict=True))


class Denoiser(nn.Module):
    """Modules named as in a transformer of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        attention = nn.ModuleDict({"to_q": nn.Linear(16, 16), "to_out": nn.ModuleList([nn.Linear(16, 16)])})
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": attention, "ff": nn.Linear(16, 16)})])

    def forward(self, x: Tensor) -> Tensor:
        block = self.transformer_blocks[0]
        x = block["attn"]["to_out"][0](torch.tanh(block["attn"]["to_q"](x)))
        return block["ff"](torch.tanh(x))


def test_a_model_that_peft_adapts_with_the_exported_file_gives_the_same_output(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_out.0", "ff"], rank_pattern={"ff": 2})
    trained = inject_adapter_in_model(config, Denoiser())
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    tensors = {f"transformer.{name}": t for name, t in get_peft_model_state_dict(trained).items()}
    metadata = {f"transformer.{key}": config.to_dict()[key] for key in ("r", "lora_alpha", "rank_pattern")}
    path = file_of(tmp_path / "in.safetensors", {}, metadata=metadata, extra=tensors)
    store = opened(fresh_storage(), energy_ratio_min=1.0, rank_max=64)
    merged(store, {"mine": read(path)})

    # What diffusers' loader does with a file without metadata: rank and modules from the tensors, alpha = rank.
    exported = {name.removeprefix("transformer."): t for name, t in to_diffusers(store.adapter("mine", 1)).items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in exported})
    again = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=modules), Denoiser())
    assert not set_peft_model_state_dict(again, exported).unexpected_keys

    x = torch.randn(5, 16)
    with torch.inference_mode():
        expected, base = trained(x), Denoiser()(x)
        assert float((again(x) - expected).norm()) <= 1e-5 * float(expected.norm())
        assert float((base - expected).norm()) > 0.1 * float(expected.norm())


QUERY = f"{BLOCK}.attn.to_q"


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", (4, 16), "Kohya's form"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", (), "Kohya's form"),
        (f"{QUERY}.lora_magnitude_vector", (24,), "DoRA magnitude"),
        (f"{QUERY}.dora_scale", (24,), "DoRA magnitude"),
        ("text_encoder.token_embedding.lora_embedding_A", (4, 16), "LoRA of an embedding"),
        (f"{QUERY}.lokr_w1", (4, 4), "another method than LoRA"),
        (f"{QUERY}.lora_B.bias", (24,), "a bias"),
        (f"{QUERY}.diff", (24, 16), "a whole weight"),
        ("emb_params", (2, 16), "textual inversion"),
        ("clip_l", (2, 16), "textual inversion"),
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", (4, 16), "before 0.27"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", (4, 16), "names no component"),
        ("base_model.model.to_q.lora_A.weight", (4, 16), "names no component"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", (4, 16), "names no component"),
        (f"{BLOCK}.norm.weight", (16,), "neither a factor of a LoRA nor its alpha"),
        (f"{BLOCK}.ff.alpha", (), "alpha but no tensors"),
        (f"{BLOCK}.ff.lora_A.weight", (4, 16), "no lora_B"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    key: str, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path / "lora.safetensors", pairs(), extra={key: torch.ones(shape)})
    with pytest.raises(InvalidInput, match=said) as error:
        read(path)
    assert key.removesuffix(".alpha").removesuffix(".lora_A.weight") in error.value.what
    assert error.value.where == str(path)


def test_a_convolution_is_refused_by_name(tmp_path: Path) -> None:
    conv = {"unet.conv_in": (torch.ones(24, 4, 1, 1), torch.ones(4, 3, 3, 3))}
    with pytest.raises(InvalidInput, match=r"'unet\.conv_in'.*convolutions"):
        read(file_of(tmp_path / "lora.safetensors", pairs() | conv))


@pytest.mark.parametrize(
    ("alphas", "metadata", "said"),
    [
        ({QUERY: 4.0}, {}, "no alpha for .*proj_mlp' but for other modules"),
        ({QUERY: 4.0}, {"transformer.r": 4, "transformer.lora_alpha": 4}, "says the scale of .*to_q' twice"),
        ({}, {"transformer.r": 4, "transformer.lora_alpha": 4}, "rank 2 in 'single.*says 4"),
        ({}, {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.use_dora": True}, "use_dora"),
        ({}, [1], "not a JSON object"),
    ],
)
def test_scales_that_contradict_each_other_are_refused(
    alphas: dict[str, float], metadata: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said):
        read(file_of(tmp_path / "lora.safetensors", pairs(), alphas=alphas, metadata=metadata or None))


def test_an_infinite_number_is_refused_by_name(tmp_path: Path) -> None:
    factors = pairs()
    factors[QUERY][0][0, 0] = float("inf")
    with pytest.raises(InvalidInput, match=re.escape(f"{QUERY}.lora_B.weight")):
        read(file_of(tmp_path / "lora.safetensors", factors))


def test_a_factor_that_is_there_under_both_names_is_refused(tmp_path: Path) -> None:
    found = pairs()
    module, (_, a) = next(iter(found.items()))
    file = file_of(tmp_path / "two.safetensors", found, extra={f"{module}.lora.down.weight": 2 * a})
    with pytest.raises(InvalidInput, match=f"has two lora_A for the module '{re.escape(module)}'"):
        read(file)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(InvalidInput, match="pickle, which can run code and is never read"):
            read(path)


@pytest.mark.parametrize("content", [None, b"{", b"\xff" * 20])
def test_a_missing_or_broken_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=re.escape(str(path))):
        read(path)


def test_an_adapter_of_a_language_model_has_no_place_in_such_a_file() -> None:
    with pytest.raises(InvalidInput, match=r"'classifier\.weight'.*no place"):
        to_diffusers(random_adapter(1))
