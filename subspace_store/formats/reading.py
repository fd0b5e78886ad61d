"""One function that reads an adapter of any supported format: a PEFT folder, or a LoRA file of diffusers."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InvalidInput
from subspace_store.adapter import Adapter
from subspace_store.formats.diffusers import WEIGHTS_FILE as DIFFUSERS_FILE
from subspace_store.formats.diffusers import read_diffusers_file
from subspace_store.formats.peft import read_peft_folder


def read_adapter(path: Path, base_model: str, base_sha256: str = "") -> Adapter:
    """Read a PEFT folder, a folder with diffusers' `pytorch_lora_weights.safetensors`, or such a file by any name.

    Raises:
        InvalidInput: Nothing is there, or see `read_peft_folder` and `read_diffusers_file`.
    """
    if path.is_file() or (path / DIFFUSERS_FILE).is_file():
        return read_diffusers_file(path, base_model, base_sha256)
    if not path.is_dir():
        raise InvalidInput(
            "there is no such folder or file", str(path), "name a folder that PEFT saved, or a LoRA file"
        )
    return read_peft_folder(path, base_model, base_sha256)
