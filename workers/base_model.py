"""The base model of a worker: loaded once, shared by every task of every kind, never changed.

`BaseModel.task_model` builds a task's model in milliseconds: an empty shell of the architecture, the shared tensors
put into it by reference, and a fresh head. `trust_remote_code` is never set.

One checkpoint serves all kinds of task that its architecture has. Layers of the backbone have the same names in each,
so that all tasks of a base model share one subspace. Output layers, and what the checkpoint lacks, are the *head*
(`heads.py`): they are trained with the task and travel with its adapter. What the checkpoint has after the backbone is
kept. A causal language model has no head: its output layer belongs to the checkpoint. Nor has a model that compares
pictures with texts (two_towers.py). Of a pipeline that makes pictures only the layers' shapes are known (`Pipeline`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_utils import set_zero3_state
from transformers.pytorch_utils import Conv1D

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from configs.task_spec import CLASSIFICATION_KINDS, HEADLESS_KINDS, Kind, TaskSpec
from subspace_store.adapter import Adapter
from workers.architecture import head_layout, inside, linear_shapes, usable_positions
from workers.heads import NO_HEAD, HeadLayout, check_head, kept_outputs, owner
from workers.model_folder import (
    AUTO_CLASSES,
    called_of,
    image_processor_of,
    kinds_of,
    reads_texts,
    settle_padding,
    tokenizer_of,
)
from workers.pipeline_folder import is_pipeline, linear_layers
from workers.two_towers import PromptedClip, prompt_tokens
from workers.weights import (
    Loaded,
    check_quantization,
    load_checkpoint,
    load_head,
    outside_backbone,
    quiet_transformers,
    resolve_source,
    weights_digest,
)

# Attributes by which transformers, PEFT and accelerate recognise a model with quantised layers.
QUANTIZED_FLAGS = (
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "hf_quantizer",
    "hf_device_map",
)

ROWS_OF_EACH = 64
"""Rows of a weight matrix that tell how large its rows are."""


class BaseModel:
    """A loaded base model. Make it with `load_base_model`.

    Args:
        settings: Settings that it was loaded with.
        loaded: A transformers model that holds the weights.
        found: Parameters that the checkpoint has outside the backbone, by the class of model they are for.
        label_names: Labels of the checkpoint's own output layer, by the class of model it is for.
        kinds: Kinds of task that its architecture has.
        tokenizer, image_processor: The checkpoint's own; None if it has none.
        called: Names by which the checkpoint says it is known.

    Raises:
        InvalidInput: The checkpoint lacks a part of the backbone, or none of its layers was quantised.
    """

    def __init__(
        self,
        settings: BaseModelSettings,
        loaded: Loaded,
        found: Mapping[Any, Mapping[str, Tensor]],
        label_names: Mapping[Any, tuple[str, ...]],
        kinds: tuple[Kind, ...],
        tokenizer: Any,
        image_processor: Any,
        called: tuple[str, ...] = (),
    ) -> None:
        model = loaded.model
        self.name = settings.name
        self.sha256 = settings.weights_sha256
        self.called = called
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.prefix: str = model.base_model_prefix
        """Name of the backbone inside the task model (`bert`, `model`, `transformer`)."""
        self.device: torch.device = model.device
        self.stores_transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        """Modules whose weight is D×N: PEFT calls this fan_in_fan_out."""
        self._positions = usable_positions(model)
        self._config = model.config
        self._generation_config = getattr(model, "generation_config", None)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._is_float32 = settings.dtype == "float32" and settings.quantization == "none"
        self._quantized = _quantized_modules(model) if settings.quantization != "none" else {}
        if settings.quantization != "none" and not self._quantized:
            raise InvalidInput(
                f"a {model.config.model_type} model is not read with {settings.quantization}: its layers lie in no one "
                "backbone",
                "base_model.quantization",
                "set it to none (dtype bfloat16 halves the memory)",
            )
        self._flags = {
            flag: getattr(model, flag) for flag in QUANTIZED_FLAGS if self._quantized and hasattr(model, flag)
        }
        parameters = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name not in loaded.missing and (name.startswith(f"{self.prefix}.") or {*kinds} & {*HEADLESS_KINDS})
        }
        self._shared = {name: tensor for name, tensor in parameters.items() if not inside(name, self._quantized)}
        stored = model.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        self._heads: dict[Kind, HeadLayout] = {}
        self._found: dict[Kind, dict[str, Tensor]] = {}
        """Parameters that the checkpoint has outside the backbone, by kind: frozen, or the start of training."""
        self._shapes: dict[Kind, dict[str, tuple[int, int]]] = {}
        for kind in kinds:
            made = AUTO_CLASSES[kind]._model_mapping[type(self._config)]
            shell, wider = (self._shell(kind, self._with_outputs(count)) for count in (1, 2))
            mine = {
                name: tensor.to(device=self.device, dtype=self._dtype)
                for name, tensor in ({} if kind in HEADLESS_KINDS else found.get(made, {})).items()
                if name not in parameters
            }
            names = parameters.keys() | mine.keys()
            layout = head_layout(shell, wider, names, kind, label_names.get(made, ()), settings.source)
            if kind != "causal_lm":
                layout = replace(layout, configured_names=_labels_of(self._config))
            shapes = linear_shapes(shell, names, layout)
            # A kind whose backbone has other layers is left out: its adapters would not fit the others' subspace.
            if all(self._backbone(shapes) == self._backbone(other) for other in self._shapes.values()):
                self._heads[kind], self._found[kind], self._shapes[kind] = layout, mine, shapes

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of task that it can be adapted to."""
        return tuple(self._heads)

    @property
    def length_max(self) -> int:
        """Longest input in tokens; 10⁹ where the number of positions is not limited."""
        limits = (self._positions, getattr(self.tokenizer, "model_max_length", None))
        return int(min((limit for limit in limits if limit), default=10**9))

    @property
    def is_quantized(self) -> bool:
        """Whether its linear layers are quantised ones of bitsandbytes, which tasks share as whole layers."""
        return bool(self._quantized)

    @property
    def heads(self) -> Mapping[Kind, HeadLayout]:
        """Head layout of each kind: what its tasks have beside the shared layers."""
        return self._heads

    def module_shapes(self, kind: Kind | None = None) -> dict[str, tuple[int, int]]:
        """(N, D) of every linear layer that may be adapted, by its name in the task model.

        Args:
            kind: Kind of the task. Some kinds have a layer after the backbone that others lack. None: of any kind.
        """
        if kind is not None:
            return dict(self._shapes[kind])
        return {name: shape for shapes in self._shapes.values() for name, shape in shapes.items()}

    def rounding(self) -> dict[str, float]:
        """Layer to the spectral norm below which an update of it is lost in the rounding of the layer's own outputs.

        An input x moves an output by |ΔW·x| ≤ ‖ΔW‖₂·‖x‖, where the output itself is about ‖w‖·‖x‖ for a row w of W. So
        it is u·‖w‖, with the unit roundoff u of the base model's dtype and the root mean square over rows.

        Returns:
            Only layers whose weights are shared as they are: those of a head and quantised ones are left out.

        Cost:
            Reads `ROWS_OF_EACH` rows of each layer.
        """
        found = {}
        for name, (rows, _) in self.module_shapes().items():
            weight = self._shared.get(f"{name}.weight")
            if weight is not None:
                some = torch.linspace(0, rows - 1, min(rows, ROWS_OF_EACH), device=weight.device).long()
                rows_SD = (weight.T if name in self.stores_transposed else weight)[some].float()
                found[name] = float(rows_SD.square().sum(1).mean().sqrt()) * torch.finfo(weight.dtype).eps / 2
        return found

    def head_modules(self, kind: Kind) -> tuple[str, ...]:
        """Modules of the task model that are trained with the task, see `HeadLayout.trained`."""
        return self._heads[kind].trained

    def task_model(self, spec: TaskSpec, seed: int = 0, adapter: Adapter | None = None) -> Any:
        """A task's model around the shared weights.

        Parts of the head that the checkpoint has are kept. Training starts from its output layer, if that is for the
        same labels (`heads.kept_outputs`).

        Args:
            spec: Its kind and label names say what the model puts out.
            seed: Seed for what the checkpoint lacks; the same seed gives the same head in every process.
            adapter: Adapter to take the head from; then nothing is drawn.

        Returns:
            A transformers model whose tensors *are* the shared ones, without gradient; the trained part of its head is
            in float32.

        Raises:
            InvalidInput: The base model does not have this kind; or see `heads.check_head`.

        Cost:
            About 30 ms for 6 layers, 0 bytes of weights.
        """
        if spec.kind not in self._heads:
            raise InvalidInput(
                f"the base model {self.name!r} has no {spec.kind}", "kind", f"it has: {', '.join(self.kinds)}"
            )
        layout, brought = self._heads[spec.kind], {} if adapter is None else adapter.head
        if adapter is not None:
            check_head(adapter, spec, layout)
        config = copy.deepcopy(self._config)
        if spec.kind == "sequence_regression":
            config.num_labels, config.problem_type = 1, "regression"
        elif spec.kind not in HEADLESS_KINDS:
            config.id2label = dict(enumerate(spec.data.label_names))
            config.label2id = {name: index for index, name in enumerate(spec.data.label_names)}
            is_class = spec.kind in CLASSIFICATION_KINDS
            config.problem_type = "single_label_classification" if is_class else "regression"
        model = self._shell(spec.kind, config)
        found = self._found[spec.kind]
        frozen = {name: tensor for name, tensor in found.items() if not inside(name, layout.trained)}
        # Each task gets Parameter objects of its own: a flag, a gradient or a partition set on one stays there.
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        model.load_state_dict(self._shared | frozen | buffers, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.tie_weights()
        self._share_quantized(model, {owner(name) for name in brought})
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in layout.trained:
                module = model.get_submodule(name).to_empty(device="cpu").float()
                module.apply(model._init_weights).requires_grad_(True)
        outputs = kept_outputs(layout, spec)
        for name, tensor in found.items():
            if name not in frozen and (outputs is not None or name not in layout.outputs):
                rows = list(outputs or ()) if name in layout.outputs else slice(None)
                model.get_parameter(name).data.copy_(tensor[rows])
        for name, tensor in brought.items():
            self._put(model, name, tensor, layout)
        if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
            raise InvalidInput(f"nothing has weights for {empty[:3]}", "adapter", "save it with these parameters")
        if not self._is_float32:
            self._cast_between(model, layout)
        if spec.kind == "causal_lm":
            model.generation_config = copy.deepcopy(self._generation_config)
        if spec.kind == "image_text":
            model.prompts = prompt_tokens(self.tokenizer, spec, self.length_max)
        return model.to(self.device)

    def head(self, spec: TaskSpec, adapter: Adapter) -> dict[str, Tensor]:
        """The parameters that a task has after the backbone, by their names in `task_model`, without making a model.

        Raises:
            InvalidInput: See `heads.check_head`.

        Returns:
            Those of the adapter, and of the checkpoint where the adapter brings none; the trained part in float32.
        """
        layout, found = self._heads[spec.kind], self._found[spec.kind]
        check_head(adapter, spec, layout)
        outputs = kept_outputs(layout, spec)
        head: dict[str, Tensor] = {}
        for name in layout.shapes:
            tensor = adapter.head.get(name)
            if tensor is None and name in found:
                tensor = found[name][list(outputs or ())] if name in layout.outputs else found[name]
            if tensor is not None and not name.startswith(f"{self.prefix}."):
                dtype = torch.float32 if inside(name, layout.trained) else self._dtype
                head[name] = tensor.to(device=self.device, dtype=dtype)
        return head

    def is_inside_backbone(self, spec: TaskSpec, adapter: Adapter) -> bool:
        """Whether the task has parameters of its own inside the backbone, which others cannot share then."""
        layout = self._heads[spec.kind]
        own = {*adapter.head, *(name for name in layout.shapes if inside(name, layout.trained))}
        return any(name.startswith(f"{self.prefix}.") for name in own)

    def _put(self, model: Any, name: str, tensor: Tensor, layout: HeadLayout) -> None:
        """Put a parameter of the task's own in the place of the shared one, which is not written to."""
        if inside(name, layout.trained):
            model.get_parameter(name).data.copy_(tensor)
        else:  # in the base model's dtype, as in PEFT: the layers before and after it are the base model's
            module = model.get_submodule(owner(name))
            own = nn.Parameter(tensor.to(device=self.device, dtype=self._dtype).clone(), requires_grad=False)
            setattr(module, name.rpartition(".")[2], own)

    def _cast_between(self, model: Any, layout: HeadLayout) -> None:
        """Make each module after the backbone accept the output of the one before, whatever its dtype."""
        for name in layout.trained:
            model.get_submodule(name).register_forward_pre_hook(_cast_inputs)
        for name, module in model.named_modules():
            is_behind = name and not f"{name}.".startswith(f"{self.prefix}.") and not inside(f"{name}.", layout.trained)
            if is_behind and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(_cast_inputs)

    def _backbone(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        return {name: shape for name, shape in shapes.items() if name.startswith(f"{self.prefix}.")}

    def _with_outputs(self, count: int) -> Any:
        config = copy.deepcopy(self._config)
        config.num_labels = count
        return config

    def _shell(self, kind: Kind, config: Any) -> Any:
        """The architecture without weights, but with the buffers that are computed.

        While a task trains under ZeRO-3, transformers would partition every model made; this state says that it has
        been done.
        """
        make = PromptedClip._from_config if kind == "image_text" else AUTO_CLASSES[kind].from_config
        with init_empty_weights(include_buffers=False), set_zero3_state():
            return make(config)

    def _share_quantized(self, model: Any, own: Collection[str]) -> None:
        """Share whole quantised layers, since their weights keep scales beside them; PEFT wraps the layers.

        Args:
            own: Modules that the task has of its own.
        """
        for name, module in self._quantized.items():
            if name not in own:
                model.set_submodule(name, module)
        for flag, value in self._flags.items():
            setattr(model, flag, value)


class Pipeline(BaseModel):
    """A pipeline that makes pictures, of which only the layers are known: what was trained elsewhere is imported,
    merged and exported for it. Nothing is trained, scored or answered by it, and no weights are in memory.

    Args:
        settings: Settings that it was found with.
        shapes: (N, D) of every layer, by its name in diffusers' LoRA files.
        called: Names by which it is known.

    Raises:
        InvalidInput: The settings say how to hold weights, and none are held.
    """

    def __init__(
        self, settings: BaseModelSettings, shapes: Mapping[str, tuple[int, int]], called: tuple[str, ...]
    ) -> None:
        if settings.quantization != "none":
            raise InvalidInput(
                "of a pipeline that makes pictures no weights are held",
                "base_model.quantization",
                "leave it out",
            )
        self.name, self.sha256, self.called = settings.name, settings.weights_sha256, called
        self.tokenizer = self.image_processor = None
        self.prefix = ""
        self.device = torch.device("cpu")
        self.stores_transposed = set()
        self._positions = None
        self._quantized, self._shared = {}, {}
        self._heads = {"text_to_image": NO_HEAD}
        self._shapes = {"text_to_image": dict(shapes)}

    def task_model(self, spec: TaskSpec, seed: int = 0, adapter: Adapter | None = None) -> Any:
        """Raises InvalidInput: nothing is trained, scored or answered by it."""
        raise InvalidInput(
            f"nothing is trained, scored or answered by {self.name!r}, a pipeline that makes pictures",
            f"{spec.team}/{spec.name}",
            "`onebasis export` writes the LoRA that diffusers loads",
        )


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
    check_quantization(settings, device)  # refused before gigabytes are read
    folder = resolve_source(settings.source)
    sha256 = weights_digest(folder)
    if sha256 != settings.weights_sha256:
        raise InvalidInput(
            f"weights have sha256 {sha256}, but base_model.weights_sha256 is {settings.weights_sha256}",
            str(folder),
            f'if these are the weights that you mean, write `weights_sha256: "{sha256}"` below `base_model:` in the '
            "settings file of `onebasis up --config FILE`; else, and for a store of the other weights, restore those",
        )
    if is_pipeline(folder):
        return Pipeline(settings, linear_layers(folder), called_of(folder, settings))
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer, image_processor = tokenizer_of(folder), image_processor_of(folder)
    kinds = kinds_of(config, tokenizer, image_processor, str(folder))
    loaded = load_checkpoint(folder, AUTO_CLASSES[kinds[-1]], settings, device)
    backbone = f"{loaded.model.base_model_prefix}."
    if kinds[-1] == "image_text" and loaded.missing:  # a classifier's checkpoint, say, has one tower
        kinds = kinds[:-1]
        loaded = load_checkpoint(folder, AUTO_CLASSES[kinds[-1]], settings, device)
    if kinds[-1] == "causal_lm" and any(not name.startswith(backbone) for name in loaded.missing):
        kinds = kinds[:-1]  # a checkpoint of the backbone alone, or of a classifier, has no such output layer
        if not kinds:
            raise InvalidInput("weights lack the output layer", str(folder), "save the whole causal language model")
    if any(reads_texts(kind) for kind in kinds):
        settle_padding(tokenizer, getattr(loaded.model, "text_model", loaded.model), str(folder))
    loaded.model.config.use_cache = False
    loaded.model.config.tie_word_embeddings = bool(loaded.model.all_tied_weights_keys)  # as loaded, whatever it said
    found, label_names = _found_heads(folder, config, kinds, loaded)
    return BaseModel(
        settings, loaded, found, label_names, kinds, tokenizer, image_processor, called_of(folder, settings)
    )


def _labels_of(config: Any) -> tuple[str, ...]:
    """The labels that a configuration names, by output."""
    return tuple(str(config.id2label[index]) for index in range(config.num_labels) if index in config.id2label)


def _found_heads(
    folder: Path, config: Any, kinds: Sequence[Kind], loaded: Loaded
) -> tuple[dict[Any, dict[str, Tensor]], dict[Any, tuple[str, ...]]]:
    """Parameters that the checkpoint has outside the backbone, and labels of its output layer, by class of model."""
    found: dict[Any, dict[str, Tensor]] = {}
    names: dict[Any, tuple[str, ...]] = {}
    for kind in kinds:
        made = AUTO_CLASSES[kind]._model_mapping[type(config)]
        if kind in HEADLESS_KINDS or made in found:
            continue
        if made is type(loaded.model):
            found[made] = outside_backbone(loaded)
        else:  # the weights were loaded as a language model, which has no place for a classifier
            found[made] = load_head(folder, AUTO_CLASSES[kind]) if loaded.has_more else {}
        # A model that labels tokens has a `classifier` as well, of the same shape.
        if made.__name__ in (config.architectures or ()):
            names[made] = _labels_of(config)
    return found, names


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
    """Hook before a module: cast its inputs to its own dtype, since the backbone may have another."""
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for value in inputs)
