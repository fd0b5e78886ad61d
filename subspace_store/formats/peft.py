"""PEFT's LoRA folders in and out: `adapter_config.json` beside `adapter_model.safetensors`.

`peft` is not imported: the format is two files, and reading them here shows what is understood and what is not.
An adapter that cannot be represented is refused by the name of what stands in the way, never trimmed.

Axes: N outputs of a module, D inputs, R rank. PEFT stores lora_A as R×D and lora_B as N×R, and its update is
scale·B·A for every kind of layer. `fan_in_fan_out` says only that the base weight is stored as D×N (GPT-2's Conv1D),
so it does not change (U, σ, V); it is kept for the way back. Pickles (`adapter_model.bin`) are never read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from subspace_store.adapter import Adapter, ModuleUpdate, canonical_update, check_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
WEIGHTS_BYTES_MAX = 8 * 2**30  # an adapter of this size is a full fine-tune under another name
PREFIX = "base_model.model."  # PEFT's wrapper, in front of every name of the model
CLASSIFIER_HEADS = ("classifier", "score")  # what PEFT saves for SEQ_CLS without being asked

# Configuration keys whose value changes what ΔW is, with the values under which it is still scale·B·A.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}
# Starts that leave the base weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them as well, and
# B·A alone is then not the update.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def read_peft_folder(folder: Path, base_model: str, base_sha256: str, open_file: OpenFile = open_anywhere) -> Adapter:
    """Read an adapter that PEFT saved.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base_model, base_sha256: The base model it is taken to belong to; the folder cannot prove it.
        open_file: Opens every file that is read.

    Raises:
        InvalidInput: A file is missing or broken, or see `from_peft`.
    """
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file() and (folder / PICKLE_FILE).is_file():
        raise InvalidInput(
            f"only {PICKLE_FILE} is there, a pickle, which can run code and is never read",
            str(folder),
            "save it again with PeftModel.save_pretrained(..., safe_serialization=True)",
        )
    config = _read_config(folder / CONFIG_FILE, open_file)
    tensors, _ = read_weights(weights_file, "name a folder saved by PEFT", open_file)
    return from_peft(config, tensors, base_model=base_model, base_sha256=base_sha256, where=str(folder))


def read_weights(
    file: Path, todo: str, open_file: OpenFile = open_anywhere
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a stranger's safetensors file, and the facts in its header.

    Raises:
        InvalidInput: Missing, too large or no such file; with this `todo` where it cannot be read.
    """
    try:
        with open_file(file) as opened:
            if os.fstat(opened.fileno()).st_size > WEIGHTS_BYTES_MAX:
                raise InvalidInput(f"is larger than {WEIGHTS_BYTES_MAX} bytes", str(file))
            content = opened.read()
        tensors = load_safetensors(content)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(file), todo) from error
    except SafetensorError as error:
        raise InvalidInput(f"is not a safetensors file: {error}", str(file), "copy or save it again") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def write_peft_folder(folder: Path, adapter: Adapter, base_source: str) -> None:
    """Write an adapter so that `PeftModel.from_pretrained(model, folder)` gives the same logits.

    Args:
        folder: Made if absent; the two files in it are replaced.
        base_source: What others load the base model from: a hub id or a folder.
    """
    config, tensors = to_peft(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"base_model_name_or_path": base_source}, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(save_safetensors(tensors, {"format": "pt"}))


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
        where: What error messages call it.
        info: Further facts to keep with the adapter (label names, start of A).

    Returns:
        An adapter with U·diag(σ)·Vᵀ = scale·B·A in every module and the head's tensors unchanged.

    Raises:
        InvalidInput: Another method than LoRA, DoRA, biases, embeddings, convolutions, unknown or missing tensors,
            shapes that do not fit, NaN; the text names what.
    """
    check_config(config, where)
    pairs, head = _sort_tensors(config, tensors, where)
    _check_targets(config, pairs, where)
    scales = {name: configured_scale(config, name, pair, where) for name, pair in pairs.items()}
    modules = {name: canonical_update(pair["B"], pair["A"], scales[name]) for name, pair in sorted(pairs.items())}
    facts = {
        "task_type": str(config.get("task_type") or ""),
        "fan_in_fan_out": json.dumps(bool(config.get("fan_in_fan_out"))),
        "lora_dropout": json.dumps(config.get("lora_dropout") or 0.0),
    }
    adapter = Adapter(base_model, base_sha256, modules, dict(sorted(head.items())), facts | dict(info or {}))
    check_adapter(adapter)
    return adapter


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
        "task_type": adapter.info.get("task_type", "SEQ_CLS" if adapter.head else "") or None,
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


def _head_modules(adapter: Adapter) -> list[str]:
    """The modules to name in `modules_to_save`; a head of several layers is named by the whole."""
    modules = {name.rpartition(".")[0] for name in adapter.head}
    return sorted({head if (head := name.partition(".")[0]) in CLASSIFIER_HEADS else name for name in modules})


def _read_config(path: Path, open_file: OpenFile) -> dict[str, Any]:
    try:
        with open_file(path) as file:
            config = json.load(file)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "name a folder saved by PEFT") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not valid JSON: {error}", str(path), "copy or save it again") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"must be a JSON object, not {type(config).__name__}", str(path))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a LoRA configuration whose update is not scale·B·A, by the name of what it uses. Raises InvalidInput."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InvalidInput(f"has peft_type {kind!r}; only LORA can be merged", where, "train the task as a LoRA")
    for key, plain in _PLAIN_VALUES.items():
        if config.get(key) not in plain:
            raise InvalidInput(
                f"uses {key}={config[key]!r}, which is more than scale·B·A and would be lost",
                where,
                f"train it again without {key}",
            )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise InvalidInput(
            f"was started with init_lora_weights={start!r}, which changes the base weights as well",
            where,
            "convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise InvalidInput(f"has {key}={config[key]!r}, which must be a mapping of names to numbers", where)
    saved = config.get("modules_to_save") or []
    # A text would be taken letter by letter, and every tensor's name ends with one of them.
    if not isinstance(saved, list | tuple | set) or not all(isinstance(name, str) for name in saved):
        raise InvalidInput(f"has modules_to_save={saved!r}, which must be a list of names", where)
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise InvalidInput(f"has {key}={value!r}, which must be a positive number", where)


def _sort_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split into lora pairs by module and head tensors by name; everything must find its place."""
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX):
            raise InvalidInput(f"has the tensor {key!r}, whose name does not start with {PREFIX!r}", where)
        check_numbers(key, tensor, where)
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif _is_saved_module(config, name):
            head[name] = tensor.float()
        else:
            raise InvalidInput(f"has the tensor {key!r}, {_why_not(name)}", where, "train it without this part")
    for name, pair in pairs.items():
        check_pair(name, pair, where)
    return pairs, head


def check_numbers(key: str, tensor: Tensor, where: str) -> None:
    """Refuse whole numbers, NaN and infinity. Raises InvalidInput with the tensor's name."""
    if not tensor.is_floating_point():
        raise InvalidInput(f"has the tensor {key!r} of type {tensor.dtype}; only real numbers are read", where)
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidInput(f"has NaN or infinite values in {key!r}", where, "train it with a lower learning rate")


def _why_not(name: str) -> str:
    if "lora_embedding" in name:
        return "a LoRA of an embedding, which cannot be merged"
    if "lora_magnitude_vector" in name:
        return "a DoRA magnitude, which cannot be merged"
    if name.endswith(".bias"):
        return "a bias, which cannot be merged"
    return "which is neither lora_A, lora_B nor part of modules_to_save"


def _is_saved_module(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor lies in a module that PEFT saves whole; PEFT, too, compares the ends of names."""
    saved = tuple(config.get("modules_to_save") or ())
    if config.get("task_type") == "SEQ_CLS":
        saved += CLASSIFIER_HEADS
    if "lora_" in name or not saved:
        return False
    parts = name.split(".")
    return any(".".join(parts[:stop]).endswith(saved) for stop in range(1, len(parts)))


def check_pair(name: str, pair: Mapping[str, Tensor], where: str) -> None:
    """Refuse half a pair, convolutions and ranks that do not fit. Raises InvalidInput with the module's name."""
    for part in "AB":
        if part not in pair:
            raise InvalidInput(f"has no lora_{part} for the module {name!r}", where, "the file is not complete")
        if pair[part].ndim != 2:
            raise InvalidInput(
                f"has lora_{part} of {name!r} with shape {tuple(pair[part].shape)}; convolutions cannot be merged",
                where,
            )
    b_NR, a_RD = pair["B"], pair["A"]
    if b_NR.shape[1] != a_RD.shape[0]:
        raise InvalidInput(
            f"has B {tuple(b_NR.shape)} and A {tuple(a_RD.shape)} in {name!r}, whose ranks do not fit", where
        )


def _check_targets(config: Mapping[str, Any], pairs: Mapping[str, Any], where: str) -> None:
    """Every lora pair belongs to a target module, and every listed target module has one."""
    if not pairs:
        raise InvalidInput("has no lora_A and lora_B", where, "the file is empty or of another kind")
    targets = config.get("target_modules")
    if not isinstance(targets, list | tuple | set):
        return  # a pattern or `all-linear`: what it means only the model knows, and names are checked against that
    for name in pairs:
        if not any(name == target or name.endswith(f".{target}") for target in targets):
            raise InvalidInput(f"has tensors for {name!r}, which target_modules {targets} does not name", where)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in pairs):
            raise InvalidInput(
                f"names {target!r} in target_modules but has no tensors for it",
                where,
                "the file is not complete; or, if the base model has no such module, take the name out",
            )


def configured_scale(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor], where: str) -> float:
    """PEFT's scaling of one module: alpha/r, or alpha/√r with rsLoRA.

    Raises:
        InvalidInput: Another rank than the configuration says, or a pattern that cannot be read.
    """
    rank = pair["A"].shape[0]
    if rank != (said := _pattern_value(config, "rank_pattern", name, where) or config["r"]):
        raise InvalidInput(f"has rank {rank} in {name!r}, but its configuration says {said}", where)
    alpha = float(_pattern_value(config, "alpha_pattern", name, where) or config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_value(config: Mapping[str, Any], key: str, name: str, where: str) -> float | None:
    """The value of the first pattern that matches the end of a module's name, by PEFT's own rule."""
    for pattern, value in (config.get(key) or {}).items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise InvalidInput(f"has {key}[{pattern!r}]={value!r}, which must be a positive number", where)
        if _compile(pattern, key, where).match(name):
            return value
    return None


def _compile(pattern: str, key: str, where: str) -> re.Pattern[str]:
    # The pattern comes from a stranger's file. Two repetitions at most, none of a group, bound the time of a match.
    if len(pattern) > 256 or sum(pattern.count(sign) for sign in "*+{") > 2 or re.search(r"\)[*+{]", pattern):
        raise InvalidInput(f"has a pattern in {key} that is too complicated: {pattern!r:.80}", where, "use full names")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise InvalidInput(f"has a broken pattern in {key}: {pattern!r}: {error}", where) from error
