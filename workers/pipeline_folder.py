"""A pipeline that makes pictures, as diffusers saves it: which of its parts take a LoRA, and their layers' shapes.

`diffusers` is not imported, and no weights are loaded: a subspace needs the layers' names and shapes alone, which are
in the headers of the files. Names are those that diffusers gives in its LoRA files, with the part in front
(`unet.….attn1.to_q`, `text_encoder.….q_proj`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.errors import InvalidInput
from subspace_store.formats.diffusers import COMPONENT

PIPELINE_FILE = "model_index.json"
_NAMES = ("diffusion_pytorch_model", "model")
"""What diffusers, and transformers, call the weights of a part."""
_SAVE_AGAIN = "save the pipeline with save_pretrained, with safetensors"


def is_pipeline(folder: Path) -> bool:
    """Whether a base model's folder is a pipeline of diffusers."""
    return (folder / PIPELINE_FILE).is_file()


def weight_files(folder: Path) -> dict[str, Path]:
    """The files of weights of all parts that take a LoRA: part and name (`unet/….safetensors`) to file, by name.

    Raises:
        InvalidInput: There is no such part; or one that the pipeline names is not there, has no weights, or only those
            of a variant (fp16).
    """
    # A part that the pipeline does without is named as [null, null].
    named = _said(folder / PIPELINE_FILE).items()
    parts = [name for name, made in named if COMPONENT.fullmatch(name) and made and made != [None, None]]
    if not parts:
        raise InvalidInput(
            "has no part that takes a LoRA (a unet, a transformer, a text_encoder)", str(folder), _SAVE_AGAIN
        )
    return {f"{part}/{file.name}": file for part in sorted(parts) for file in _of_part(folder / part)}


def shards(index: Path) -> list[Path]:
    """The files that an index of weights names, by name. Raises InvalidInput: it cannot be read."""
    return [index.with_name(name) for name in sorted(set(_said(index, "weight_map").values()))]


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """(N, D) of every matrix of weights, by its layer's name; embeddings among them, for which nobody saves a LoRA that
    is taken.

    Raises:
        InvalidInput: As `weight_files`; or a file is not whole.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, file in weight_files(folder).items():
        part = name.partition("/")[0]
        try:
            with safe_open(file, "pt") as opened:
                for key in list(opened.keys()):
                    shape = opened.get_slice(key).get_shape()
                    if key.endswith(".weight") and len(shape) == 2:
                        shapes[f"{part}.{key.removesuffix('.weight')}"] = (int(shape[0]), int(shape[1]))
        except (SafetensorError, OSError) as error:
            raise InvalidInput(f"cannot be read: {error}", str(file), "copy it again") from error
    return dict(sorted(shapes.items()))


def _of_part(folder: Path) -> list[Path]:
    for name in _NAMES:
        if (index := folder / f"{name}.safetensors.index.json").is_file():
            files = shards(index)
        else:
            files = [folder / f"{name}.safetensors"]
        if all(file.is_file() for file in files):
            return files
    if not folder.is_dir():
        raise InvalidInput(f"has no {folder.name}, which {PIPELINE_FILE} names", str(folder.parent), _SAVE_AGAIN)
    variants = sorted(file.name for file in folder.glob("*.safetensors"))
    what = f"has only {', '.join(variants[:3])}, of a variant or a part of the files" if variants else "has no weights"
    raise InvalidInput(what, str(folder), _SAVE_AGAIN)


def _said(file: Path, key: str = "") -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = said[key] if key else said
        return {str(name): value for name, value in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidInput(f"cannot be read: {error}", str(file), "copy it again") from error
