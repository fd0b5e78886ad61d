"""The base model of a worker: loaded once, shared by every task of every kind, never changed.

`BaseModel.task_model` builds a task's model in milliseconds: an empty shell of the architecture, the shared tensors
put into it by reference, and a fresh head. `trust_remote_code` is never set.

One checkpoint serves all kinds of task that its architecture has. Layers have the same names in each, so that all
tasks of a base model share one subspace. What a classifier or a regressor has outside the backbone, or what the
checkpoint does not bring, is the *head*: it is trained with the task and travels with its adapter. A causal language
model has none: its output layer belongs to the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_utils import set_zero3_state
from transformers.pytorch_utils import Conv1D

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from configs.task_spec import Kind, TaskSpec
from workers.weights import check_quantization, load_checkpoint, quiet_transformers, resolve_source, weights_digest

AUTO_CLASSES: dict[Kind, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "sequence_regression": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
    "causal_lm": AutoModelForCausalLM,  # last: it has all the parameters that the others share
}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt")
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# By what transformers, PEFT and accelerate know a model with quantised layers.
QUANTIZED_FLAGS = (
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "hf_quantizer",
    "hf_device_map",
)


class BaseModel:
    """A loaded base model. Make it with `load_base_model`.

    Args:
        settings: What it was loaded by.
        loaded: A transformers model that holds the weights.
        missing: Names of its parameters that the checkpoint lacks.
        kinds: Which kinds of task its architecture has.
        tokenizer, image_processor: The checkpoint's own; None if it has none.

    Raises:
        InvalidInput: The checkpoint lacks a part of a module.
    """

    def __init__(
        self,
        settings: BaseModelSettings,
        loaded: Any,
        missing: set[str],
        kinds: tuple[Kind, ...],
        tokenizer: Any,
        image_processor: Any,
    ) -> None:
        self.name = settings.name
        self.sha256 = settings.weights_sha256
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.prefix: str = loaded.base_model_prefix
        """Name of the backbone inside the task model (`bert`, `model`, `transformer`)."""
        self.device: torch.device = loaded.device
        self.stores_transposed = {name for name, module in loaded.named_modules() if isinstance(module, Conv1D)}
        """Modules whose weight is D×N: PEFT calls this fan_in_fan_out."""
        self._config = loaded.config
        self._generation_config = getattr(loaded, "generation_config", None)
        self._is_float32 = settings.dtype == "float32" and settings.quantization == "none"
        self._quantized = _quantized_modules(loaded) if settings.quantization != "none" else {}
        self._flags = {
            flag: getattr(loaded, flag) for flag in QUANTIZED_FLAGS if self._quantized and hasattr(loaded, flag)
        }
        parameters = {
            name: parameter.detach()
            for name, parameter in loaded.named_parameters()
            if name not in missing and (name.startswith(f"{self.prefix}.") or "causal_lm" in kinds)
        }
        self._shared = {name: tensor for name, tensor in parameters.items() if not _inside(name, self._quantized)}
        stored = loaded.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in loaded.named_buffers() if name in stored}
        self._heads: dict[Kind, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        shells = {type(loaded): loaded}
        for kind in kinds:
            made = AUTO_CLASSES[kind]._model_mapping[type(self._config)]
            if made not in shells:
                shells[made] = self._shell(kind, copy.deepcopy(self._config))
            shell = shells[made]
            heads = _head_modules(shell, parameters.keys(), kind, settings.source)
            shapes = _linear_shapes(shell, heads)
            if shapes == (self._shapes or shapes):  # else its adapters would not fit the others' subspace
                self._heads[kind], self._shapes = heads, shapes

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of task that it can be adapted to."""
        return tuple(self._heads)

    @property
    def length_max(self) -> int:
        """Longest input in tokens; without positions to run out of, 10⁹."""
        limits = (
            getattr(self._config, "max_position_embeddings", None),
            getattr(self.tokenizer, "model_max_length", None),
        )
        return int(min((limit for limit in limits if limit), default=10**9))

    @property
    def is_quantized(self) -> bool:
        """Whether its linear layers are bitsandbytes', which all tasks share whole."""
        return bool(self._quantized)

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, D) of every linear layer that may be adapted, by its name in the task model, whatever the kind."""
        return dict(self._shapes)

    def head_modules(self, kind: Kind) -> tuple[str, ...]:
        """Modules of the task model that belong to the task."""
        return self._heads[kind]

    def task_model(self, spec: TaskSpec, seed: int = 0) -> Any:
        """A task's model around the shared weights.

        Args:
            spec: Its kind and label names say what the model puts out.
            seed: The head's; the same seed gives the same head in every process.

        Returns:
            A transformers model whose tensors *are* the shared ones, without gradient, and a head in float32.

        Raises:
            InvalidInput: The base model does not have this kind.

        Cost:
            About 30 ms for 6 layers, 0 bytes of weights.
        """
        if spec.kind not in self._heads:
            raise InvalidInput(
                f"the base model {self.name!r} has no {spec.kind}", "kind", f"it has: {', '.join(self.kinds)}"
            )
        config = copy.deepcopy(self._config)
        if spec.kind == "sequence_regression":
            config.num_labels, config.problem_type = 1, "regression"
        elif spec.kind != "causal_lm":
            config.id2label = dict(enumerate(spec.data.label_names))
            config.label2id = {name: index for index, name in enumerate(spec.data.label_names)}
            config.problem_type = "single_label_classification"
        model = self._shell(spec.kind, config)
        # Each task gets Parameter objects of its own: a flag, a gradient or a partition set on one stays there.
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        model.load_state_dict(self._shared | buffers, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.tie_weights()
        self._share_quantized(model)
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self._heads[spec.kind]:
                module = model.get_submodule(name).to_empty(device="cpu").float()
                module.apply(model._init_weights).requires_grad_(True)
                if not self._is_float32:
                    module.register_forward_pre_hook(_cast_inputs)
        if spec.kind == "causal_lm":
            model.generation_config = copy.deepcopy(self._generation_config)
        return model.to(self.device)

    def _shell(self, kind: Kind, config: Any) -> Any:
        """The architecture without numbers, but with the buffers that are computed.

        While a task trains under ZeRO-3, transformers would partition every model made; the state says that it is done.
        """
        with init_empty_weights(include_buffers=False), set_zero3_state():
            return AUTO_CLASSES[kind].from_config(config)

    def _share_quantized(self, model: Any) -> None:
        """Quantised weights keep their scales beside them, so that the whole layers are shared; PEFT wraps them."""
        for name, module in self._quantized.items():
            model.set_submodule(name, module)
        for flag, value in self._flags.items():
            setattr(model, flag, value)


def load_base_model(settings: BaseModelSettings) -> BaseModel:
    """Load tokenizer or image processor, configuration and weights.

    Args:
        settings: Where it is, what its weights must hash to, and how to hold them.

    Raises:
        InvalidInput: No such source, no safetensors weights, or other weights than `weights_sha256` says; a
            quantisation that this machine cannot do; a model for no kind of task.
        Unavailable: The hub cannot be reached.
    """
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else "cpu"
    check_quantization(settings, device)  # what cannot be done is said before gigabytes are read
    folder = resolve_source(settings.source)
    sha256 = weights_digest(folder)
    if sha256 != settings.weights_sha256:
        raise InvalidInput(
            f"weights have sha256 {sha256}, but base_model.weights_sha256 is {settings.weights_sha256}",
            str(folder),
            "restore the original weights, or start a new service with a new subspace for these",
        )
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer, image_processor = _tokenizer(folder), _image_processor(folder)
    kinds = _kinds(config, tokenizer, image_processor, str(folder))
    loaded, missing = load_checkpoint(folder, AUTO_CLASSES[kinds[-1]], settings, device)
    if kinds[-1] == "causal_lm" and any(not name.startswith(f"{loaded.base_model_prefix}.") for name in missing):
        kinds = kinds[:-1]  # a checkpoint of the backbone alone has no output layer
        if not kinds:
            raise InvalidInput("weights lack the output layer", str(folder), "save the whole causal language model")
    if tokenizer is not None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.use_cache = False
    loaded.config.tie_word_embeddings = bool(loaded.all_tied_weights_keys)  # tied as loaded, whatever it said
    return BaseModel(settings, loaded, missing, kinds, tokenizer, image_processor)


def _kinds(config: Any, tokenizer: Any, image_processor: Any, where: str) -> tuple[Kind, ...]:
    """The kinds that the architecture and what lies beside the weights allow, `causal_lm` last.

    transformers lists BERT and its relatives among the causal language models too: they can be built as decoders. As
    they were trained they see what they would have to predict.
    """
    sees_ahead = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    kinds = tuple(
        kind
        for kind, auto_class in AUTO_CLASSES.items()
        if type(config) in auto_class._model_mapping
        and (image_processor if kind == "image_classification" else tokenizer) is not None
        and not (kind == "causal_lm" and sees_ahead)
    )
    if not kinds:
        raise InvalidInput(
            f"a {config.model_type} model with {'a' if tokenizer else 'no'} tokenizer and "
            f"{'an' if image_processor else 'no'} image processor beside it is good for no kind of task",
            where,
            f"kinds are: {', '.join(AUTO_CLASSES)}; save the tokenizer or the image processor into the folder as well",
        )
    return kinds


def _tokenizer(folder: Path) -> Any:
    has_one = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_one else None


def _image_processor(folder: Path) -> Any:
    """On PIL and numpy: without torchvision, and the same pixels on every machine."""
    has_one = (folder / IMAGE_PROCESSOR_FILE).is_file()
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil") if has_one else None


def _inside(parameter: str, modules: Iterable[str]) -> bool:
    return any(parameter.startswith(f"{module}.") for module in modules)


def _head_modules(shell: Any, loaded: Collection[str], kind: Kind, where: str) -> tuple[str, ...]:
    """Modules outside the backbone, and modules inside it for which the checkpoint has nothing (often a pooler)."""
    names = [name for name, _ in shell.named_parameters()]
    backbone = f"{shell.base_model_prefix}."
    outside = {name.partition(".")[0] for name in names if not name.startswith(backbone) and kind != "causal_lm"}
    missing = {name for name in names if name.startswith(backbone) and name not in loaded}
    unloaded = {name.rpartition(".")[0] for name in missing}
    for name in unloaded:
        own = {f"{name}.{inner}" for inner, _ in shell.get_submodule(name).named_parameters()}
        if not own <= missing:
            raise InvalidInput(f"weights lack {sorted(own & missing)}", where, "the checkpoint is not complete")
    return tuple(sorted(outside | unloaded))


def _linear_shapes(shell: Any, head_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of the linear layers of the backbone, the head's left out."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in shell.named_modules():
        if not name.startswith(f"{shell.base_model_prefix}.") or _inside(f"{name}.", head_modules):
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    return shapes


def _quantized_modules(loaded: Any) -> dict[str, nn.Module]:
    """bitsandbytes' layers: subclasses of nn.Linear, all of them in the backbone."""
    return {
        name: module
        for name, module in loaded.named_modules()
        if isinstance(module, nn.Linear)
        and type(module) is not nn.Linear
        and name.startswith(f"{loaded.base_model_prefix}.")
    }


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a head: what a backbone of another dtype hands over, in the head's own."""
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)
