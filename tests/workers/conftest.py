"""Base models for the workers' tests: random ones of two layers, and the real MiniLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.workers.worker_builders import MINILM, task_of_kind, tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.weights import resolve_source
from workers.worker import warm_up


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a random model of an architecture, with MiniLM's tokenizer, or an image processor of 16×16 pixels.

    `llama-lm` and `llama-tied` have an output layer of their own or their embeddings', the others are backbones.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(MINILM.source))
    small = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    made: dict[str, str] = {}

    def build(architecture: str) -> Any:
        torch.manual_seed(1)
        if architecture == "bert":
            return BertModel(BertConfig(max_position_embeddings=64, **sizes, **small))
        if architecture == "bert-without-pooler":
            return BertModel(BertConfig(max_position_embeddings=64, **sizes, **small), add_pooling_layer=False)
        if architecture == "llama":
            return LlamaModel(LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **sizes, **small))
        if architecture in ("llama-lm", "llama-tied"):
            is_tied = architecture == "llama-tied"
            config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **sizes, **small)
            config.tie_word_embeddings = is_tied
            return LlamaForCausalLM(config)
        if architecture == "vit":
            return ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes))
        marks = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        return GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **marks, **small))

    def source(architecture: str) -> str:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            build(architecture).save_pretrained(folder)
            if architecture == "vit":
                ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
            else:
                tokenizer.save_pretrained(folder)
            made[architecture] = str(folder)
        return made[architecture]

    return source


@pytest.fixture(scope="session")
def tiny(tiny_source: Callable[[str], str]) -> Callable[[str], BaseModel]:
    """A loaded random base model of an architecture, shared by all tests."""
    loaded: dict[str, BaseModel] = {}

    def base(architecture: str) -> BaseModel:
        if architecture not in loaded:
            loaded[architecture] = load_base_model(tiny_settings(tiny_source(architecture)))
            if len(loaded) == 1:  # else each training looks for garbage among the libraries' objects
                warm_up(loaded[architecture])
        return loaded[architecture]

    return base


@pytest.fixture
def peft_folder(tmp_path: Path) -> Callable[..., str]:
    """Saves an adapter of a base model with PEFT's own code and gives its folder."""
    from peft import LoraConfig

    from workers.peft_model import with_lora

    def make(base: BaseModel, labels: int = 2, **options: Any) -> str:
        model = with_lora(
            base.task_model(task_of_kind("sequence_classification", [str(n) for n in range(labels)])),
            LoraConfig(task_type="SEQ_CLS", r=2, **options),
        )
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return str(tmp_path / "adapter")

    return make
