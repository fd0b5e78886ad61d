"""The weights of a base model: where they lie, whether they are the right ones, and a model that holds them.

transformers maps safetensors files into memory and copies nothing as long as the file has the dtype that is asked
for. All processes of a machine that load one folder then share its pages, and 14 GB of weights cost the second worker
nothing. Three things make a private copy: another `base_model.dtype` than the file's (save the checkpoint in that
dtype), a GPU, and writing, which is why nothing here writes (a written page would be copied, the file never changes).

Nothing here knows of tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from configs.errors import InvalidInput, Unavailable
from configs.places import is_local
from configs.settings import BaseModelSettings
from workers.pipeline_folder import is_pipeline, shards, weight_files

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGESTS_AT_ONCE = 4  # of shards: one core reads 1 to 2 GB/s, and the 140 GB of a 70B model would take it two minutes
# Weights, configuration, tokenizer with its chat template, image processor; no code, no pickles.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_source(source: str) -> Path:
    """The folder of a `package:NAME/FOLDER`, a folder or a hub id (which is downloaded if it is not there yet).

    Raises:
        InvalidInput: It is not there.
        Unavailable: The hub cannot be reached.
    """
    if source.startswith("package:"):
        package, _, inner = source.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise InvalidInput(f"there is no Python package {package!r} here", source, f"pip install {package}")
        folder = Path(found.submodule_search_locations[0]) / inner
    elif is_local(source):
        folder = Path(source).expanduser()
    else:
        folder = _download(source)
    if not (folder / "config.json").is_file() and not is_pipeline(folder):
        raise InvalidInput(f"has no config.json: {folder}", source, "name a folder saved by save_pretrained")
    return folder


def weights_digest(folder: Path) -> str:
    """sha256 of `model.safetensors`; with shards, and of a pipeline's parts that take a LoRA, sha256 of the files'
    digests' text in the order of their names."""
    if is_pipeline(folder):
        return _digest_of_all(list(weight_files(folder).values()))
    if (folder / INDEX_FILE).is_file():
        return _digest_of_all(shards(folder / INDEX_FILE))
    if not (folder / WEIGHTS_FILE).is_file():
        raise InvalidInput(f"has no {WEIGHTS_FILE}", str(folder), "save the base model with safetensors")
    return _file_digest(folder / WEIGHTS_FILE)


@dataclass(frozen=True)
class Loaded:
    """A transformers model with a checkpoint's weights in it."""

    model: Any
    missing: frozenset[str]
    """Names of its parameters that the checkpoint lacks, or has in another shape: random numbers are in them."""
    has_more: bool
    """Whether the checkpoint has weights that this class of model has no place for."""


def load_checkpoint(folder: Path, auto_class: Any, settings: BaseModelSettings, device: str) -> Loaded:
    """A model of one class with the folder's weights in it.

    Args:
        auto_class: `AutoModelFor…`.
        device: `cuda`, or `cpu` for the mapped file itself.

    Cost:
        On the CPU 0.04 s for 6 layers and no memory, if the file has the dtype of the settings.
    """
    return _load(
        folder,
        auto_class,
        dtype=getattr(torch, settings.dtype),
        **(_quantization_options(settings) if settings.quantization != "none" else {}),
        **(_straight_to_the_gpu() if device == "cuda" else {}),
    )


def load_head(folder: Path, auto_class: Any) -> dict[str, Tensor]:
    """Parameters that the checkpoint has outside the backbone for one class of model, in the file's own dtype, on the
    host.

    Cost:
        As `load_checkpoint` on the CPU; the backbone is mapped and released unread.
    """
    loaded = _load(folder, auto_class, dtype="auto")
    return {name: tensor.clone() for name, tensor in outside_backbone(loaded).items()}


def outside_backbone(loaded: Loaded) -> dict[str, Tensor]:
    """The checkpoint's own parameters outside the backbone of the model that they were loaded into."""
    backbone = f"{loaded.model.base_model_prefix}."
    return {
        name: parameter.detach()
        for name, parameter in loaded.model.named_parameters()
        if not name.startswith(backbone) and name not in loaded.missing
    }


def _load(folder: Path, auto_class: Any, **options: Any) -> Loaded:
    with quiet_transformers():
        model, loading = auto_class.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an output layer for other labels; in the backbone it is refused
            **options,
        )
    other_shape = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
    return Loaded(model, frozenset(loading["missing_keys"]) | other_shape, bool(loading["unexpected_keys"]))


def check_quantization(settings: BaseModelSettings, device: str) -> None:
    """Refuse what this machine cannot do. Raises InvalidInput: there is no GPU, or no bitsandbytes."""
    if settings.quantization == "none":
        return
    if device == "cpu":
        raise InvalidInput(
            f"{settings.quantization} needs a GPU, and this worker has none or base_model.device keeps it away",
            "base_model.quantization",
            "set it to none (dtype bfloat16 halves the memory), or give the workers GPUs (workers.gpus, device auto)",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidInput(
            f"{settings.quantization} needs the package bitsandbytes, which is not installed here",
            "base_model.quantization",
            'pip install "onebasis[gpu]" on every machine with workers, or set it to none',
        )


def _straight_to_the_gpu() -> dict[str, Any]:
    """Options that make `from_pretrained` move and cast each tensor as it is read: the host never holds all of them.

    By the device's number: for accelerate `cuda` is not `cuda:0`, and it refuses to train a quantised model elsewhere.
    """
    return {"device_map": {"": torch.cuda.current_device()}}


def _quantization_options(settings: BaseModelSettings) -> dict[str, Any]:
    """Options of `from_pretrained` with which bitsandbytes quantises linear layers while they are read.

    Source:
        nf4 with quantised constants: QLoRA (arXiv:2305.14314); int8: LLM.int8() (arXiv:2208.07339).
    """
    if settings.quantization == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        )
    return {"quantization_config": config}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the report on new heads, the progress bar and notes on image processors: all expected here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _digest_of_all(files: Sequence[Path]) -> str:
    with ThreadPoolExecutor(DIGESTS_AT_ONCE) as pool:
        return hashlib.sha256("".join(pool.map(_file_digest, files)).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InvalidInput(f"is no folder here and no model on the hub: {error}", source, "check the name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"the hub cannot be reached and the model is not cached: {error}", source) from error
