"""Folders of random base models that talk or see, as `load_base_model` takes them. Small enough for milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant talk here') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def talking_tokenizer(chat: bool = False) -> Any:
    """Bytes, and the words of two sentences; `<s>` before every text, `</s>` to end an answer."""
    bytes_and_words = Tokenizer(models.BPE())
    bytes_and_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_and_words.train_from_iterator(
        ["The capital of France is Paris.", "The colour of grass is green."] * 9, trainer
    )
    bytes_and_words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bytes_and_words.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def save_llama(folder: Path, chat: bool = False, **changes: Any) -> str:
    """A language model with its own output layer."""
    tokenizer = talking_tokenizer(chat)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES | changes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_vit(folder: Path, image_size: int = 16, **changes: Any) -> str:
    """A vision transformer over patches of 4×4, without a head."""
    torch.manual_seed(1)
    ViTModel(
        ViTConfig(image_size=image_size, patch_size=4, **SIZES | changes), add_pooling_layer=False
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path, image_size: int = 16, initializer_factor: float = 4.0, **changes: Any) -> str:
    """A model of two towers, for pictures of 16×16 and texts of at most 24 tokens."""
    tokenizer = talking_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<s>", "</s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    marks = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    text = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, **marks}
    vision = SIZES | {"image_size": image_size, "patch_size": 4}
    of_both = {"initializer_factor": initializer_factor}
    config = CLIPConfig(
        text_config=text | of_both, vision_config=vision | of_both, projection_dim=16, **of_both | changes
    )
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    return str(folder)
