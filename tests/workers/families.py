"""Tiny, randomly made models of many families, saved as their users find them: backbone, language model, classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.workers.tiny_bases import talking_tokenizer

Saved = Literal["backbone", "language model", "classifier"]
WORDS = 320
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = {**SIZES, "vocab_size": WORDS, "pad_token_id": 0, "max_position_embeddings": 64, "initializer_range": 0.5}
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """One architecture as transformers has it."""

    model: str
    """Name of its classes, without what they are for: `Bert`."""
    config: dict[str, Any]
    targets: tuple[str, ...]
    """Layers that a LoRA adapts."""
    language_model: str = "ForMaskedLM"
    backbone: str = "Model"


FAMILIES = {
    "bert": Family("Bert", ENCODER, ("query", "value")),
    "roberta": Family("Roberta", ENCODER, ("query", "value")),
    "electra": Family("Electra", ENCODER | {"embedding_size": 16}, ("query", "value")),
    "deberta": Family("Deberta", ENCODER | {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}, ("in_proj",)),
    "deberta-v2": Family("DebertaV2", ENCODER, ("query_proj", "value_proj")),
    "distilbert": Family(
        "DistilBert",
        {
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "vocab_size": WORDS,
            "pad_token_id": 0,
            "initializer_range": 0.5,
        },
        ("q_lin", "v_lin"),
    ),
    "modernbert": Family(
        "ModernBert",
        ENCODER | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        ("Wqkv", "Wo"),
    ),
    "mpnet": Family("MPNet", ENCODER | {"pad_token_id": 0}, ("attn.q", "attn.v")),
    "llama": Family("Llama", DECODER, ("q_proj", "v_proj"), "ForCausalLM"),
    "qwen2": Family("Qwen2", DECODER, ("q_proj", "down_proj"), "ForCausalLM"),
    "gpt2": Family(
        "GPT2",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "vocab_size": WORDS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.5,
        },
        ("c_attn",),
        "LMHeadModel",
    ),
    "vit": Family("ViT", SIZES | {"image_size": 16, "patch_size": 8, "initializer_range": 0.5}, ("q_proj", "v_proj")),
}


def save(family: str, what: Saved, folder: Path, labels: int = 3, **options: Any) -> str:
    """A checkpoint, its weights all random and none zero, with a tokenizer or an image processor beside it."""
    found = FAMILIES[family]
    config = getattr(transformers, f"{found.model}Config")(**found.config | {"num_labels": labels, **options})
    task = "ForImageClassification" if family == "vit" else "ForSequenceClassification"
    ends = {"backbone": found.backbone, "language model": found.language_model, "classifier": task}
    torch.manual_seed(1)
    model = getattr(transformers, found.model + ends[what])(config)
    shake(model, lambda name: True, 0.02)
    model.save_pretrained(folder)
    if family == "vit":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tokenizer = talking_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.save_pretrained(folder)
    return str(folder)


def shake(model: Any, chosen: Callable[[str], bool], size: float = 0.3, seed: int = 2) -> None:
    """Give parameters other values, as training would."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.data.add_(size * torch.randn(parameter.shape, generator=draw))


def reloaded(family: str, source: str, labels: int, folder: Path | None = None) -> Any:
    """What transformers makes of a checkpoint, and PEFT of an adapter's folder."""
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    torch.manual_seed(99)
    model = auto.from_pretrained(source, num_labels=labels, ignore_mismatched_sizes=True)
    if family != "vit":
        model.config.pad_token_id = 0
    return (model if folder is None else PeftModel.from_pretrained(model, folder)).eval()


def trained_elsewhere(family: str, source: str, labels: int, folder: Path, **options: Any) -> Path:
    """The folder of an adapter that another program trained with PEFT on a checkpoint, its head included."""
    kind = {"task_type": None, "modules_to_save": ["classifier"]} if family == "vit" else {"task_type": "SEQ_CLS"}
    settings = {"r": 2, "target_modules": list(FAMILIES[family].targets), "fan_in_fan_out": family == "gpt2", **kind}
    model = get_peft_model(reloaded(family, source, labels), LoraConfig(**settings | options))
    shake(model, lambda name: "lora_" in name or "modules_to_save" in name)
    model.save_pretrained(folder)
    return folder


def inputs(family: str) -> dict[str, torch.Tensor]:
    if family == "vit":
        return {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[1, 30, 40, 50, 2], [1, 60, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(family: str, model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs(family)).logits  # type: ignore[no-any-return]
