"""A pipeline with the names and shapes of Stable Diffusion 1.5 and no numbers: files that are headers and holes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]

TEXT_WIDTH = 768


def unet_layers() -> dict[str, tuple[int, int]]:
    """(N, D) of the 128 attention layers of the UNet, those that LoRAs of pictures are trained on."""
    blocks = {f"down_blocks.{level}.attentions.{n}": 320 << level for level in (0, 1, 2) for n in (0, 1)}
    blocks |= {"mid_block.attentions.0": 1280}
    blocks |= {f"up_blocks.{level}.attentions.{n}": 1280 >> (level - 1) for level in (1, 2, 3) for n in (0, 1, 2)}
    layers = {}
    for block, width in blocks.items():
        for attention, seen in (("attn1", width), ("attn2", TEXT_WIDTH)):
            for name, inputs in (("to_q", width), ("to_k", seen), ("to_v", seen), ("to_out.0", width)):
                layers[f"{block}.transformer_blocks.0.{attention}.{name}"] = (width, inputs)
    return layers


def text_layers() -> dict[str, tuple[int, int]]:
    """(N, D) of the attention layers of the text encoder."""
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    places = (f"text_model.encoder.layers.{layer}.self_attn.{name}" for layer in range(12) for name in names)
    return dict.fromkeys(places, (TEXT_WIDTH, TEXT_WIDTH))


def save_pipeline(folder: Path, unet: Shapes | None = None, text_encoder: Shapes | None = None) -> str:
    """A pipeline's folder. A file takes as much of the disk as its header."""
    parts = {
        "unet": ("diffusion_pytorch_model", unet_layers() if unet is None else unet),
        "text_encoder": ("model", text_layers() if text_encoder is None else text_encoder),
        "vae": ("diffusion_pytorch_model", {"encoder.mid_block.attentions.0.to_q": (512, 512)}),
    }
    for part, (name, shapes) in parts.items():
        (folder / part).mkdir(parents=True)
        _write_holes(folder / part / f"{name}.safetensors", shapes)
    index = {part: ["diffusers", "Part"] for part in parts} | {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def _write_holes(file: Path, shapes: Shapes) -> None:
    header, end = {}, 0
    for name, (outputs, inputs) in shapes.items():
        begin, end = end, end + 2 * outputs * inputs
        header[f"{name}.weight"] = {"dtype": "F16", "shape": [outputs, inputs], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def random_lora(seed: int, rank: int = 4, with_text: bool = False) -> dict[str, Tensor]:
    """The tensors of a LoRA file for that pipeline, as diffusers names them, in float16 as people share them."""
    generator = torch.Generator().manual_seed(seed)
    layers = {f"unet.{name}": shape for name, shape in unet_layers().items()}
    layers |= {f"text_encoder.{name}": shape for name, shape in text_layers().items()} if with_text else {}
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        a_RD = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        b_NR = torch.randn(outputs, rank, generator=generator) / 10
        tensors |= {f"{name}.lora_A.weight": a_RD.half(), f"{name}.lora_B.weight": b_NR.half()}
    return tensors
