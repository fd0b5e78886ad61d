"""The files of an adapter's folder, by name: PEFT's and diffusers'. Without torch: a command that sends such a folder
only copies it."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InvalidInput

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
MODEL_CONFIG_FILE = "config.json"
"""The model's own configuration, which some programs save beside an adapter."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
DIFFUSERS_PICKLE_FILE = "pytorch_lora_weights.bin"
SAVE_AGAIN = "load it in diffusers and save it with the pipeline's save_lora_weights"
READ_FILES = (CONFIG_FILE, WEIGHTS_FILE, MODEL_CONFIG_FILE, DIFFUSERS_FILE)
"""All that is read; other files, such as checkpoints of a training, may be there."""


def refuse_pickle(folder: Path) -> None:
    """Raise InvalidInput for a folder whose weights are a pickle alone."""
    if any((folder / name).is_file() for name in (WEIGHTS_FILE, DIFFUSERS_FILE)):
        return
    for name, todo in _PICKLES.items():
        if (folder / name).is_file():
            raise InvalidInput(
                f"only {name} is there, a pickle, which can run code and is never read", str(folder), todo
            )


def is_diffusers(place: Path) -> bool:
    """Whether this is a LoRA of diffusers, a file by any name or a folder with one in it; else it is a PEFT folder.

    Raises:
        InvalidInput: Nothing is there, only a pickle is, or it may be either.
    """
    if not place.exists():
        raise InvalidInput(
            "there is no such folder or file", str(place), "name a folder that PEFT saved, or a LoRA file"
        )
    refuse_pickle(place)
    if not place.is_dir() or not (place / DIFFUSERS_FILE).is_file():
        return place.is_file()
    if (place / CONFIG_FILE).is_file() or (place / WEIGHTS_FILE).is_file():
        raise InvalidInput(
            f"has an adapter of PEFT and {DIFFUSERS_FILE}: which of them is meant, nobody can tell",
            str(place),
            "name the file, or move the other one away",
        )
    return True


_PICKLES = {
    PICKLE_FILE: "save it again with PeftModel.save_pretrained(..., safe_serialization=True)",
    DIFFUSERS_PICKLE_FILE: SAVE_AGAIN,
}
