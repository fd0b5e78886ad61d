"""The base model of a worker: loaded once, shared by every task, never changed.

`classifier_for` builds a task's model in milliseconds: an empty shell of the architecture, the shared tensors put
into it by reference, and a fresh head. Weights are read from safetensors only, and `trust_remote_code` is never set.

Everything in the task model that the checkpoint does not bring, or that lies outside the backbone, is the *head*:
it is trained with the task and travels with its adapter.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from configs.errors import InvalidInput, Unavailable
from configs.settings import BaseModelSettings, is_local
from configs.task_spec import TaskSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # weights, configuration, tokenizer; no code, no pickles


class BaseModel:
    """A loaded base model. Make it with `load_base_model`.

    Args:
        name: What task files call it.
        sha256: Digest of its weights, see `weights_digest`.
        tokenizer: The checkpoint's own fast tokenizer.
        template: A task model whose backbone holds the shared tensors.
        head_modules: Modules of the task model that belong to the task.
    """

    def __init__(self, name: str, sha256: str, tokenizer: Any, template: Any, head_modules: tuple[str, ...]) -> None:
        self.name = name
        self.sha256 = sha256
        self.tokenizer = tokenizer
        self.head_modules = head_modules
        self.prefix: str = template.base_model_prefix
        """Name of the backbone inside the task model (`bert`, `model`, `transformer`)."""
        self._config = template.config
        self._shapes = _linear_shapes(template, head_modules)
        self.stores_transposed = {name for name, module in template.named_modules() if isinstance(module, Conv1D)}
        """Modules whose weight is D×N: PEFT calls this fan_in_fan_out."""
        self._shared: dict[str, Tensor] = {
            name: parameter.detach()
            for name, parameter in template.named_parameters()
            if not _inside(name, head_modules)
        }
        self.device = next(iter(self._shared.values())).device

    @property
    def length_max(self) -> int:
        """Longest input in tokens."""
        positions = getattr(self._config, "max_position_embeddings", None) or 10**9
        return int(min(self.tokenizer.model_max_length, positions))

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, D) of every linear layer that may be adapted, by its name in the task model."""
        return dict(self._shapes)

    def task_model(self, spec: TaskSpec, seed: int = 0) -> Any:
        """A task's model around the shared weights; see `classifier_for`."""
        return self.classifier_for(spec.data.label_names, seed)

    def classifier_for(self, label_names: Sequence[str], seed: int = 0) -> Any:
        """A task model around the shared weights.

        Args:
            label_names: In the order of the outputs.
            seed: The head's; the same seed gives the same head in every process.

        Returns:
            A transformers model whose backbone tensors *are* the shared ones, without gradient. Nothing is copied.

        Cost:
            About 30 ms for 6 layers, 0 bytes of weights.
        """
        config = copy.deepcopy(self._config)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
        config.problem_type = "single_label_classification"
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(config)
        # Each task gets Parameter objects of its own: a flag, a gradient or a partition set on one stays there.
        model.load_state_dict(self._shared, strict=False, assign=True)
        for name in self._shared:
            model.get_parameter(name).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self.head_modules:
                module = model.get_submodule(name).to_empty(device="cpu")
                module.apply(model._init_weights)
        return model.to(self.device)


def load_base_model(settings: BaseModelSettings, device: str | None = None) -> BaseModel:
    """Load tokenizer, configuration and weights.

    Args:
        settings: Where it is and what its weights must hash to.
        device: Default: the first GPU if there is one.

    Raises:
        InvalidInput: No such source, no safetensors weights, or other weights than `weights_sha256` says.
        Unavailable: The hub cannot be reached.
    """
    folder = resolve_source(settings.source)
    sha256 = weights_digest(folder)
    if sha256 != settings.weights_sha256:
        raise InvalidInput(
            f"weights have sha256 {sha256}, but base_model.weights_sha256 is {settings.weights_sha256}",
            str(folder),
            "restore the original weights, or start a new service with a new subspace for these",
        )
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # float32 on every machine: a task's score must not depend on where it ran.
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    heads = _head_modules(model, set(loading["missing_keys"]), str(folder))
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return BaseModel(settings.name, sha256, tokenizer, model, heads)


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
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"has no config.json: {folder}", source, "name a folder saved by save_pretrained")
    return folder


def weights_digest(folder: Path) -> str:
    """sha256 of `model.safetensors`; with shards, sha256 of their digests' text in the order of their names."""
    if (folder / INDEX_FILE).is_file():
        shards = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
        return hashlib.sha256("".join(_file_digest(folder / shard) for shard in shards).encode()).hexdigest()
    if not (folder / WEIGHTS_FILE).is_file():
        raise InvalidInput(f"has no {WEIGHTS_FILE}", str(folder), "save the base model with safetensors")
    return _file_digest(folder / WEIGHTS_FILE)


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


def _inside(parameter: str, modules: Sequence[str]) -> bool:
    return any(parameter.startswith(f"{module}.") for module in modules)


def _head_modules(model: Any, missing: set[str], where: str) -> tuple[str, ...]:
    """Modules outside the backbone, and modules inside it for which the checkpoint has nothing (often a pooler)."""
    backbone = f"{model.base_model_prefix}."
    outside = {name.partition(".")[0] for name, _ in model.named_parameters() if not name.startswith(backbone)}
    unloaded = {name.rpartition(".")[0] for name in missing if name.startswith(backbone)}
    for name in unloaded:
        own = {f"{name}.{inner}" for inner, _ in model.get_submodule(name).named_parameters()}
        if not own <= missing:
            raise InvalidInput(f"weights lack {sorted(own & missing)}", where, "the checkpoint is not complete")
    return tuple(sorted(outside | unloaded))


def _linear_shapes(model: Any, head_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if _inside(f"{name}.", head_modules):
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the report on the new head and the progress bar: both are expected here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
