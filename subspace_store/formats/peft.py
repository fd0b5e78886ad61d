"""PEFT's LoRA folders in and out: `adapter_config.json` beside `adapter_model.safetensors`.

`peft` is not imported: the format is two files, and reading them here shows what is understood and what is not.
An adapter that cannot be represented is refused, never trimmed; the error names what cannot be represented.

Axes: N outputs of a module, D inputs, R rank. PEFT stores lora_A as R×D and lora_B as N×R, and its update is
scale·B·A for every kind of layer. `fan_in_fan_out` says only that the base weight is stored as D×N (GPT-2's Conv1D),
so it does not change (U, σ, V); it is kept for the export. Pickles (`adapter_model.bin`) are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from subspace_store.adapter import Adapter, ModuleUpdate, canonical_update, check_adapter
from subspace_store.formats.adapter_files import CARD_FILE, CONFIG_FILE, MODEL_CONFIG_FILE, WEIGHTS_FILE, refuse_pickle
from subspace_store.formats.peft_config import (
    CLASSIFIER_HEADS,
    TARGET_SETTINGS,
    LeftOut,
    Names,
    Scaling,
    check_config,
    ends_of,
    read_config,
    unknown_settings,
)
from subspace_store.formats.weights_file import read_weights, weights_with_facts

PREFIX = "base_model.model."  # PEFT's wrapper, in front of every name of the model
ID2LABEL, BASE_SHA256 = "id2label", "base_model_sha256"
"""Keys in the header of the weights that we write: the label of each output, the sha256 of the base's weights."""
UNKNOWN_SETTINGS = "unknown_settings"
"""Key of `Adapter.info`: the settings of the adapter's folder that nobody here knows, as a JSON list."""
TARGETS = "targets"
"""Key of `Adapter.info`: the settings that say which modules are adapted, as a JSON object, where they do not list
exactly those that have tensors."""
SAVED = "modules_to_save"
"""Key of `Adapter.info`: the modules that the adapter's settings say were saved whole, as a JSON list."""
TRAINED_ON, TRAINED_ON_SHA256 = "trained_on", "trained_on_sha256"
"""Keys of `Adapter.info`: the base model as the adapter's folder names it (base_model_name_or_path), and its digest."""

# Inside a training process every name has the adapter's own name in it, which PEFT takes out when it saves.
_FACTOR = re.compile(r"(.+?)\.lora_([AB])(?:\.([^.]+))?\.weight")
_SAVED_MODULE = re.compile(r"(.+?)\.modules_to_save\.(.+)")
_UNUSED = ".original_module."  # the modules that modules_to_save replaces
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embeddings?|word_embeddings|embed_in|embed_out|wte|lm_head)")


def read_peft_folder(folder: Path, base_model: str, base_sha256: str, open_file: OpenFile = open_anywhere) -> Adapter:
    """Read an adapter that PEFT saved.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base_model, base_sha256: The base model it is taken to belong to; the folder cannot prove it.
        open_file: Opens every file that is read.

    Raises:
        InvalidInput: A file is missing or broken, or see `from_peft`.
    """
    refuse_pickle(folder)
    config = read_config(folder / CONFIG_FILE, open_file)
    tensors, header = read_weights(folder / WEIGHTS_FILE, "name a folder saved by PEFT", open_file)
    beside = folder / MODEL_CONFIG_FILE
    model_config = read_config(beside, open_file) if beside.is_file() else {}
    info = _said(header, config, model_config, str(folder))
    return from_peft(config, tensors, base_model=base_model, base_sha256=base_sha256, where=str(folder), info=info)


def _said(
    header: Mapping[str, str], config: Mapping[str, Any], model_config: Mapping[str, Any], where: str
) -> dict[str, str]:
    """The labels and the base model's digest that an adapter's files name, as facts of it.

    Args:
        header: Facts in the header of the weights, where our own exports name the labels.
        config, model_config: `adapter_config.json`, and the model's `config.json` beside it, where others do.
    """
    info = {TRAINED_ON_SHA256: header[BASE_SHA256]} if header.get(BASE_SHA256) else {}
    said = {f"the header of {WEIGHTS_FILE}": header, CONFIG_FILE: config, MODEL_CONFIG_FILE: model_config}
    named = {
        file: names
        for file, values in said.items()
        if values.get(ID2LABEL) is not None
        and (names := _labels(values[ID2LABEL], file, where)) != [f"LABEL_{index}" for index in range(len(names))]
    }
    if len({json.dumps(names) for names in named.values()}) > 1:
        both = " and ".join(f"{file} {names!r:.300}" for file, names in named.items())
        raise InvalidInput(f"names its outputs in two ways: {both}", where, "take out the one that is wrong")
    return info | ({"label_names": json.dumps(next(iter(named.values())))} if named else {})


def _labels(id2label: Any, file: str, where: str) -> list[str]:
    """The label of each output. id2label: A mapping, or one as JSON; transformers' default names are labels too."""
    try:
        values = json.loads(id2label) if isinstance(id2label, str) else id2label
        labels = {int(index): name for index, name in values.items()}
        names = [labels[index] for index in range(len(labels))]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a label is no text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise InvalidInput(
            f"has an {ID2LABEL} in {file} that gives no label to each output: {error}",
            where,
            "write it as {0: first label, 1: second, …}, or take it out",
        ) from error
    return names


def write_peft_folder(folder: Path, adapter: Adapter, base_source: str) -> None:
    """Write an adapter so that `PeftModel.from_pretrained(model, folder)` gives the same logits.

    The labels of its outputs and the digest of its base model's weights are in the header of the weights, where an
    import finds them, and in the model card. PEFT's configuration has no place for them and warns of unknown keys.

    Args:
        folder: Made if absent; the three files in it are replaced.
        base_source: Source from which others load the base model: a hub id or a folder.
    """
    config, tensors = to_peft(adapter)
    names = adapter.label_names
    facts = {BASE_SHA256: adapter.base_sha256} if adapter.base_sha256 else {}
    if names:
        facts[ID2LABEL] = json.dumps(dict(enumerate(names)), ensure_ascii=False)
        facts["label2id"] = json.dumps({name: index for index, name in enumerate(names)}, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"base_model_name_or_path": base_source}, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(weights_with_facts(tensors, facts))
    (folder / CARD_FILE).write_text(_card(adapter, names, base_source), encoding="utf-8")


def _card(adapter: Adapter, names: Iterable[str], base_source: str) -> str:
    """A model card, as hubs show it."""
    lines = ["---", f"base_model: {json.dumps(base_source, ensure_ascii=False)}", "library_name: peft", "---", ""]
    lines += [f"LoRA for `{adapter.base_model}`, exported by onebasis.", ""]
    if adapter.base_sha256:
        lines += [f"sha256 of the base model's weights: `{adapter.base_sha256}`", ""]
    if names:
        lines += ["| output | label |", "|---|---|"]
        lines += [f"| {index} | {json.dumps(name, ensure_ascii=False)} |" for index, name in enumerate(names)]
        lines += ["", "PEFT does not set them: load the base model with these as `id2label`.", ""]
    return "\n".join(lines)


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    base_model: str,
    base_sha256: str,
    where: str = "adapter",
    info: Mapping[str, str] | None = None,
) -> Adapter:
    """Bring PEFT's configuration and tensors into canonical form.

    Args:
        config: `adapter_config.json` as a mapping; rsLoRA, rank_pattern and alpha_pattern are understood.
        tensors: Names as PEFT saves them (`base_model.model.….lora_A.weight`).
        where: Name of the adapter in error messages.
        info: Further facts to keep with the adapter (label names, how A was initialised).

    Returns:
        An adapter with U·diag(σ)·Vᵀ = scale·B·A in every module and the head's tensors unchanged.

    Raises:
        InvalidInput: Another method than LoRA, DoRA, biases, embeddings, convolutions, unknown or missing tensors,
            shapes that do not fit, NaN; the error names which.
    """
    check_config(config, where)
    names = Names(config)
    pairs, head = _sort_tensors(names, tensors, where)
    _check_targets(config, names, pairs, where)
    scaling = Scaling(config, len(pairs), where)
    scales = {name: scaling.of(name, len(pair["A"])) for name, pair in pairs.items()}
    modules = {name: canonical_update(pair["B"], pair["A"], scales[name]) for name, pair in sorted(pairs.items())}
    facts = {
        "task_type": str(config.get("task_type") or ""),
        "fan_in_fan_out": json.dumps(bool(config.get("fan_in_fan_out"))),
        "lora_dropout": json.dumps(config.get("lora_dropout") or 0.0),
    }
    if config.get("base_model_name_or_path"):
        facts[TRAINED_ON] = str(config["base_model_name_or_path"])
    if names.targets != {*pairs}:
        facts[TARGETS] = json.dumps({key: _listed(config[key]) for key in TARGET_SETTINGS if config.get(key)})
    if saved := config.get("modules_to_save"):
        facts[SAVED] = json.dumps(sorted({*saved}))
    if unknown := unknown_settings(config):
        facts[UNKNOWN_SETTINGS] = json.dumps(unknown)
    adapter = Adapter(base_model, base_sha256, modules, dict(sorted(head.items())), facts | dict(info or {}))
    try:
        check_adapter(adapter)
    except InvalidInput as error:  # it names the module alone
        raise InvalidInput(error.sentence, where, error.todo) from error
    return adapter


def _listed(value: Any) -> Any:
    """As JSON has it: a PEFT configuration in memory has sets."""
    return sorted(value) if isinstance(value, set | tuple) else value


def to_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write an adapter in PEFT's form with scale 1 and one rank: B = U·diag(σ), A = Vᵀ, alpha = r.

    Modules of a smaller rank are filled up with zeros. PEFT could say their ranks in patterns, but servers read none
    (loaders.py).

    Returns:
        The configuration (a plain dict for `peft.LoraConfig` or JSON) and the tensors under PEFT's names.
    """
    rank = export_rank(adapter.modules.values())
    tensors = {PREFIX + name: tensor.detach().contiguous() for name, tensor in adapter.head.items()}
    for name, update in adapter.modules.items():
        b_NR, a_RD = padded_factors(update, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_RD
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_NR
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(adapter.modules),
        "modules_to_save": _head_modules(adapter) or None,
        "fan_in_fan_out": json.loads(adapter.info.get("fan_in_fan_out", "false")),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return config, tensors


def export_rank(updates: Iterable[ModuleUpdate]) -> int:
    """The one rank that all these modules are written with; at least 1, because PEFT has no rank 0."""
    return max(1, *(update.rank for update in updates))


def padded_factors(update: ModuleUpdate, rank: int) -> tuple[Tensor, Tensor]:
    """U·diag(σ) (N×rank) and Vᵀ (rank×D), filled up with zeros: the same ΔW with scale 1."""
    missing = rank - update.rank
    b_NR = torch.nn.functional.pad(update.u_NR * update.sigma_R, (0, missing))
    return b_NR.contiguous(), torch.nn.functional.pad(update.v_DR, (0, missing)).T.contiguous()


def _task_type(adapter: Adapter) -> str | None:
    """PEFT's name of the task type. SEQ_CLS requires a classifier in the file, whether it was trained or not."""
    known = adapter.info.get("task_type", "SEQ_CLS" if adapter.head else "")
    return None if known == "SEQ_CLS" and not adapter.head else known or None


def _head_modules(adapter: Adapter) -> list[str]:
    """The modules to name in `modules_to_save`. A classifier that PEFT saves by default is saved as a whole."""
    modules = {name.rpartition(".")[0] for name in adapter.head}
    whole = CLASSIFIER_HEADS if _task_type(adapter) == "SEQ_CLS" else ()
    return sorted({top if (top := name.partition(".")[0]) in whole else name for name in modules})


def _sort_tensors(
    names: Names, tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split into lora pairs by module and head tensors by name; any other tensor is refused."""
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    adapter_name = _adapter_name(tensors, where)
    _check_prefix(tensors, where)
    for key, tensor in tensors.items():
        if _UNUSED in key:
            continue
        check_saved(key, tensor, where)
        name = key.removeprefix(PREFIX)
        saved = _SAVED_MODULE.fullmatch(name)
        if saved is None and (match := _FACTOR.fullmatch(name)):
            pair = pairs.setdefault(match[1], {})
            if match[2] in pair:
                raise InvalidInput(f"has lora_{match[2]} of {match[1]!r} twice, under two names", where, "keep one")
            pair[match[2]] = tensor
            continue
        if saved:
            name = f"{saved[1]}.{saved[2].removeprefix(f'{adapter_name}.')}"
        if saved or names.saves(name):
            head[name] = tensor.to(torch.float32, copy=True)  # the tensor may be a view of a file
        else:
            why, todo = _why_not(name)
            raise InvalidInput(f"has the tensor {key!r}, {why}", where, todo)
    for name, pair in pairs.items():
        check_pair(name, pair, where)
    return pairs, head


def _adapter_name(tensors: Mapping[str, Tensor], where: str) -> str:
    """The adapter's own name, where the names of tensors have it in them; empty if they do not."""
    factors = (_FACTOR.fullmatch(key) for key in tensors if not _SAVED_MODULE.fullmatch(key))
    found = {match[3] or "" for match in factors if match}
    if len(found) > 1:
        called = ", ".join(repr(name) if name else "one without a name" for name in sorted(found))
        raise InvalidInput(
            f"holds {len(found)} adapters: {called}",
            where,
            "save each into a folder of its own (PEFT: save_pretrained(..., selected_adapters=[name]))",
        )
    return next(iter(found), "")


def _check_prefix(tensors: Mapping[str, Tensor], where: str) -> None:
    """All tensors have PEFT's wrapper in their names, or none has, as when they were taken out of a model by hand."""
    without = [key for key in tensors if not key.startswith(PREFIX)]
    if without and len(without) < len(tensors):
        raise InvalidInput(
            f"has the tensor {without[0]!r}, whose name does not start with {PREFIX!r} as those of others do",
            where,
            f"rename it to {PREFIX + without[0]!r} if that is what it is, or take it out",
        )


def check_numbers(key: str, tensor: Tensor, where: str) -> None:
    """Refuse whole numbers, NaN and infinity. Raises InvalidInput with the tensor's name."""
    if not tensor.is_floating_point():
        raise InvalidInput(f"has the tensor {key!r} of type {tensor.dtype}; only real numbers are read", where)
    # An eight-bit float knows few operations; it is read like any other.
    if not bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all()):
        raise InvalidInput(f"has NaN or infinite values in {key!r}", where, "train it with a lower learning rate")


def check_saved(key: str, tensor: Tensor, where: str) -> None:
    """As `check_numbers`, for a file that somebody else wrote; also refuse a tensor that was saved without numbers."""
    check_numbers(key, tensor, where)
    if not tensor.numel():
        raise InvalidInput(
            f"has no numbers in {key!r}, of shape {tuple(tensor.shape)}: it was saved from ZeRO-3 without gathering",
            where,
            "save it again inside deepspeed.zero.GatheredParameters(model.parameters()), or train with "
            "stage3_gather_16bit_weights_on_model_save: true",
        )


def _why_not(name: str) -> tuple[str, str]:
    """Why a tensor is not read, and what to do."""
    if "lora_embedding" in name:
        return "a LoRA of an embedding, which cannot be merged", "train it without the embedding in target_modules"
    if "lora_magnitude_vector" in name:
        return "a DoRA magnitude, which cannot be merged", "train it with use_dora=False"
    if ".base_layer." in name:
        return "a weight of the base model itself", "save the adapter alone: PeftModel.save_pretrained does"
    if name.endswith(".bias"):
        return "a bias, which cannot be merged", "train it with bias='none' and lora_bias=False"
    module = name.rpartition(".")[0]
    if _EMBEDDING.fullmatch(module):
        return (
            f"the whole weight of {module!r}, which PEFT saves beside a LoRA when the vocabulary was resized or the "
            "layer is a target",
            "if it was not trained, save again with save_pretrained(..., save_embedding_layers=False); if it was, the "
            "base model's own cannot stand in for it: train without it",
        )
    return (
        "which is neither lora_A, lora_B nor part of modules_to_save",
        f"rename it as PEFT does ({PREFIX}MODULE.lora_A.weight); if it is a part of the head, list its module in "
        f"modules_to_save of {CONFIG_FILE}; if it was not trained, take it out",
    )


def check_pair(name: str, pair: Mapping[str, Tensor], where: str) -> None:
    """Refuse half a pair, convolutions and ranks that do not fit. Raises InvalidInput with the module's name."""
    for part in "AB":
        if part not in pair:
            raise InvalidInput(f"has no lora_{part} for the module {name!r}", where, "the file is not complete")
        shape = tuple(pair[part].shape)
        if len(shape) == 1:
            raise InvalidInput(
                f"has lora_{part} of {name!r} with shape {shape}: one rank's flat part of a matrix",
                where,
                "save it again with all parts gathered (FSDP: summon_full_params, or a full state dict)",
            )
        if len(shape) != 2:
            raise InvalidInput(
                f"has lora_{part} of {name!r} with shape {shape}; convolutions cannot be merged",
                where,
                "train it without convolutions in target_modules",
            )
    b_NR, a_RD = pair["B"], pair["A"]
    if b_NR.shape[1] != a_RD.shape[0]:
        raise InvalidInput(
            f"has B {tuple(b_NR.shape)} and A {tuple(a_RD.shape)} in {name!r}, whose ranks do not fit", where
        )


def _check_targets(config: Mapping[str, Any], names: Names, pairs: Mapping[str, Any], where: str) -> None:
    """Every lora pair belongs to a module that PEFT adapts, and every listed target module has one."""
    if not pairs:
        raise InvalidInput("has no lora_A and lora_B", where, "the file is empty or of another kind")
    left_out = LeftOut(config, where)
    for name in pairs:
        if rule := left_out.rule_for(name):
            raise InvalidInput(
                f"has tensors for {name!r}, which PEFT leaves alone by {rule}={config[rule]!r:.200}",
                where,
                "take the tensors out, or the setting: which of the two is meant, nobody can tell",
            )
    if names.targets is None:
        return  # names are checked against the model's own
    ends = {name: {*ends_of(name)} for name in pairs}
    for name, found in ends.items():
        if not found & names.targets:
            raise InvalidInput(
                f"has tensors for {name!r}, which target_modules {sorted(names.targets)!r:.200} does not name", where
            )
    if absent := sorted(names.targets - set().union(*ends.values())):
        raise InvalidInput(
            f"names {absent[0]!r} in target_modules but has no tensors for it",
            where,
            "the file is not complete; or, if the base model has no such module, take the name out",
        )
