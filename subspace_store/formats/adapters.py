"""An adapter in and out, in the form that it came in: a PEFT folder, or a LoRA file of diffusers."""

from __future__ import annotations

from pathlib import Path

from configs.places import OpenFile, open_anywhere
from subspace_store.adapter import Adapter
from subspace_store.formats.adapter_files import DIFFUSERS_FILE, is_diffusers
from subspace_store.formats.diffusers import FORMAT, read_diffusers_file, write_diffusers_file
from subspace_store.formats.peft import read_peft_folder, write_peft_folder


def read_adapter(path: Path, base_model: str, base_sha256: str = "", open_file: OpenFile = open_anywhere) -> Adapter:
    """Read a PEFT folder, a folder with diffusers' `pytorch_lora_weights.safetensors`, or such a file by any name.

    Raises:
        InvalidInput: See `is_diffusers`, `read_peft_folder` and `read_diffusers_file`.
    """
    if is_diffusers(path):
        return read_diffusers_file(path, base_model, base_sha256, open_file)
    return read_peft_folder(path, base_model, base_sha256, open_file)


def write_adapter(folder: Path, adapter: Adapter, base_source: str) -> None:
    """Write an adapter as diffusers' file if it came as one, else as a PEFT folder.

    Args:
        base_source: As for `write_peft_folder`.
    """
    if adapter.info.get("format") == FORMAT:
        write_diffusers_file(folder / DIFFUSERS_FILE, adapter)
    else:
        write_peft_folder(folder, adapter, base_source)
