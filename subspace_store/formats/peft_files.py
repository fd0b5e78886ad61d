"""The files of a PEFT folder, by name. Without torch: a command that sends such a folder only copies it."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InvalidInput

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
MODEL_CONFIG_FILE = "config.json"
"""The model's own configuration, which some programs save beside an adapter."""
READ_FILES = (CONFIG_FILE, WEIGHTS_FILE, MODEL_CONFIG_FILE)
"""All that is read; other files, such as checkpoints of a training, may be there."""


def refuse_pickle(folder: Path) -> None:
    """Raise InvalidInput for a folder whose weights are a pickle alone."""
    if not (folder / WEIGHTS_FILE).is_file() and (folder / PICKLE_FILE).is_file():
        raise InvalidInput(
            f"only {PICKLE_FILE} is there, a pickle, which can run code and is never read",
            str(folder),
            "save it again with PeftModel.save_pretrained(..., safe_serialization=True)",
        )
