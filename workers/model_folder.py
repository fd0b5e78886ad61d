"""Files beside the weights in a base model's folder: tokenizer or image processor, and the kinds of task they allow.

Nothing here knows of tasks, and no weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPConfig,
)

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from configs.task_spec import IMAGE_KINDS, Kind
from workers.architecture import position_offset
from workers.pipeline_folder import PIPELINE_FILE, is_pipeline

AUTO_CLASSES: dict[Kind, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "sequence_regression": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
    "image_regression": AutoModelForImageClassification,
    "image_text": AutoModelForZeroShotImageClassification,
    "causal_lm": AutoModelForCausalLM,  # these two last: they have all the parameters that the others share
}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt")
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"


def settle_padding(tokenizer: Any, model: Any, where: str) -> None:
    """Make the model use the tokenizer's padding token. Raises InvalidInput if it has no embedding row for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InvalidInput("the tokenizer has neither a padding token nor an end token", where, "give it a pad_token")
    rows = model.get_input_embeddings().weight.shape[0]
    said = tokenizer("one two")["input_ids"]
    for token in (tokenizer.pad_token_id, *said):
        if token >= rows:
            what = "padding token" if token == tokenizer.pad_token_id else "token"
            raise InvalidInput(
                f"the tokenizer's {what} {tokenizer.convert_ids_to_tokens(token)!r} has the number {token}, and the "
                f"model's embeddings have {rows} rows, 0 to {rows - 1}",
                where,
                "name a pad_token in tokenizer_config.json that the model has (often its eos_token), or save the model "
                "again after model.resize_token_embeddings(len(tokenizer))",
            )
    if position_offset(model) is None:  # else positions are counted from after the checkpoint's own padding token
        model.config.pad_token_id = tokenizer.pad_token_id


def called_of(folder: Path, settings: BaseModelSettings) -> tuple[str, ...]:
    """Names by which the model may be known elsewhere: what people load it as, what its configuration says."""
    file = folder / (PIPELINE_FILE if is_pipeline(folder) else "config.json")
    said = json.loads(file.read_text(encoding="utf-8")).get("_name_or_path")
    return tuple(dict.fromkeys(name for name in (settings.name, settings.source, said) if name))


def kinds_of(config: Any, tokenizer: Any, image_processor: Any, where: str) -> tuple[Kind, ...]:
    """The kinds that the architecture and what lies beside the weights allow, one of `HEADLESS_KINDS` last.

    transformers lists BERT and its relatives among the causal language models too: they can be built as decoders. But
    as they were trained, they see the tokens that they would have to predict.
    """
    sees_ahead = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    kinds = tuple(
        kind
        for kind, auto_class in AUTO_CLASSES.items()
        if type(config) in auto_class._model_mapping
        and (image_processor is not None or kind not in IMAGE_KINDS)
        and (tokenizer is not None or not reads_texts(kind))
        and not (kind == "causal_lm" and sees_ahead)
        # Others of two towers read their prompts in ways of their own: SigLIP's are padded to the whole length.
        and (kind != "image_text" or type(config) is CLIPConfig)
    )
    if not kinds:
        raise InvalidInput(
            f"a {config.model_type} model with {'a' if tokenizer else 'no'} tokenizer and "
            f"{'an' if image_processor else 'no'} image processor beside it is good for no kind of task",
            where,
            f"kinds are: {', '.join(AUTO_CLASSES)}; save the tokenizer or the image processor into the folder as well",
        )
    return kinds


def reads_texts(kind: Kind) -> bool:
    return kind not in IMAGE_KINDS or kind == "image_text"


def tokenizer_of(folder: Path) -> Any:
    has_one = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_one else None


def image_processor_of(folder: Path) -> Any:
    """The image processor on PIL and numpy: without torchvision, and the same pixels on every machine."""
    has_one = (folder / IMAGE_PROCESSOR_FILE).is_file()
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil") if has_one else None
