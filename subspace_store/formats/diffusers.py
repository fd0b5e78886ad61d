"""Diffusers' LoRA files in and out: one safetensors file, `<component>.<module>.lora_A.weight` and `….lora_B.weight`.

`diffusers` is not imported: the format is the names of the tensors. A module keeps its component in its name
(`transformer.….attn.to_q`, `text_encoder.….q_proj`), so one subspace holds a whole pipeline. The older names
`….lora.down.weight` (A) and `….lora.up.weight` (B) are read as well. The scale is alpha/r, with alpha from a scalar
`….alpha` beside the pair or from the PEFT configuration that newer versions keep in the file's header; with neither it
is 1.

Axes: N outputs of a module, D inputs, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from subspace_store.adapter import Adapter, canonical_update, check_adapter
from subspace_store.formats.adapter_files import DIFFUSERS_FILE, SAVE_AGAIN, refuse_pickle
from subspace_store.formats.peft import check_pair, check_saved, export_rank, padded_factors
from subspace_store.formats.peft_config import Scaling, check_config
from subspace_store.formats.weights_file import read_weights

FORMAT = "diffusers"
METADATA = "lora_adapter_metadata"  # the header's key for the configurations of all components

COMPONENT = re.compile(r"unet|transformer(_2|_ref)?|text_encoder(_[23])?|text_conditioner|connectors")
"""The parts of a pipeline for which diffusers saves LoRAs."""
_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])|(?:lora|lora_linear_layer)\.(down|up))\.weight")

# Pattern of a tensor's name, why such a tensor is refused, and what to do.
_REFUSED = (
    (
        r"lora_(unet|te\d?|transformer|prior)_",
        "a name in Kohya's form, whose `_` cannot be told from dots",
        SAVE_AGAIN,
    ),
    (r".*(dora_scale|lora_magnitude_vector)", "a DoRA magnitude, which cannot be merged", "train it without DoRA"),
    (r".*lora_embedding", "a LoRA of an embedding, which cannot be merged", "train it without this part"),
    (r".*(lokr_|hada_|oft_)", "of another method than LoRA", "train the task as a LoRA"),
    (r".*(\.bias|\.diff_b|\.diff)$", "a bias or a whole weight, which cannot be merged", "train it without this part"),
    (r"(string_to_param|emb_params|clip_[gl]$|bundle_emb)", "a textual inversion, which cannot be merged", ""),
    (r".*_lora\.(down|up)\.", "in the form of diffusers before 0.27", SAVE_AGAIN),
    (r"(diffusion_model|base_model\.model)\.", "which names no component of a pipeline", SAVE_AGAIN),
)


def read_diffusers_file(path: Path, base_model: str, base_sha256: str, open_file: OpenFile = open_anywhere) -> Adapter:
    """Read a LoRA that diffusers saved.

    Args:
        path: The safetensors file, or a folder with `pytorch_lora_weights.safetensors` in it.
        base_model, base_sha256: The pipeline it is taken to belong to; the file cannot prove it.
        open_file: Opens the file.

    Raises:
        InvalidInput: The file is missing or broken, or holds what cannot be represented: Kohya's names, DoRA,
            convolutions, embeddings, biases, textual inversions, pickles; names the tensor.
    """
    refuse_pickle(path)
    file = path / DIFFUSERS_FILE if path.is_dir() else path
    if file.suffix in (".bin", ".pt", ".ckpt"):
        raise InvalidInput("is a pickle, which can run code and is never read", str(path), SAVE_AGAIN)
    tensors, header = read_weights(file, "name a file saved by diffusers", open_file)
    found = _configurations(header, str(path))
    return from_diffusers(tensors, found, base_model=base_model, base_sha256=base_sha256, where=str(path))


def write_diffusers_file(file: Path, adapter: Adapter) -> None:
    """Write an adapter so that a pipeline's `load_lora_weights(file)` adds the same ΔW. See `to_diffusers`."""
    tensors = to_diffusers(adapter)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save_safetensors(tensors, {"format": "pt"}))


def from_diffusers(
    tensors: Mapping[str, Tensor],
    configurations: Mapping[str, Mapping[str, Any]],
    *,
    base_model: str,
    base_sha256: str,
    where: str = "adapter",
) -> Adapter:
    """Bring diffusers' tensors into canonical form.

    Args:
        tensors: Names as diffusers saves them, with the component in front.
        configurations: Component to its PEFT configuration; a component without one has its scales in the tensors.

    Raises:
        InvalidInput: As `read_diffusers_file`.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        _check_name(key, where)
        check_saved(key, tensor, where)
        if match := _FACTOR.fullmatch(key):
            pair, factor = pairs.setdefault(match[1], {}), "A" if match[2] == "A" or match[3] == "down" else "B"
            if factor in pair:
                raise InvalidInput(f"has two lora_{factor} for the module {match[1]!r}", where, SAVE_AGAIN)
            pair[factor] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise InvalidInput(f"has the tensor {key!r}, which is neither a factor of a LoRA nor its alpha", where)
    if not pairs:
        raise InvalidInput("has no lora_A and lora_B", where, "the file is empty or of another kind")
    if unused := alphas.keys() - pairs.keys():
        raise InvalidInput(f"has an alpha but no tensors for {sorted(unused)[0]!r}", where, "the file is not complete")
    scalings = {component: Scaling(config, len(pairs), where) for component, config in configurations.items()}
    modules = {}
    for name, pair in sorted(pairs.items()):
        check_pair(name, pair, where)
        modules[name] = canonical_update(pair["B"], pair["A"], _scale(name, pair, alphas, scalings, where))
    adapter = Adapter(base_model, base_sha256, modules, info={"format": FORMAT})
    check_adapter(adapter)
    return adapter


def to_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """Write an adapter's tensors under diffusers' names with scale 1 and, within a component, one rank.

    No alpha is written and none is needed: without one, every version of diffusers uses alpha = rank. Older versions
    take one rank for a whole component, hence modules of a smaller rank are filled up with zeros.

    Raises:
        InvalidInput: A module outside the components of a pipeline, or a head; diffusers has no place for them.
    """
    for name in (*adapter.head, *adapter.modules):
        if name in adapter.head or not COMPONENT.fullmatch(_component(name)):
            raise InvalidInput(f"has {name!r}, for which a file of diffusers has no place", todo="export it as PEFT")
    tensors: dict[str, Tensor] = {}
    for _, names in groupby(sorted(adapter.modules, key=_component), _component):
        members = {name: adapter.modules[name] for name in names}
        rank = export_rank(members.values())
        for name, update in members.items():
            b_NR, a_RD = padded_factors(update, rank)
            tensors |= {f"{name}.lora_A.weight": a_RD, f"{name}.lora_B.weight": b_NR}
    return tensors


def _component(name: str) -> str:
    return name.partition(".")[0]


def _check_name(key: str, where: str) -> None:
    for pattern, why, todo in _REFUSED:
        if re.match(pattern, key):
            raise InvalidInput(f"has the tensor {key!r}, {why}", where, todo)
    if not COMPONENT.fullmatch(_component(key)):
        raise InvalidInput(f"has the tensor {key!r}, which names no component of a pipeline", where, SAVE_AGAIN)


def _scale(
    name: str,
    pair: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    scalings: Mapping[str, Scaling],
    where: str,
) -> float:
    component, _, module = name.partition(".")
    rank = len(pair["A"])
    if component in scalings:
        if name in alphas:
            raise InvalidInput(f"says the scale of {name!r} twice, as alpha and in {METADATA}", where, SAVE_AGAIN)
        return scalings[component].of(module, rank)
    if any(_component(other) == component for other in alphas) and name not in alphas:
        raise InvalidInput(f"has no alpha for {name!r} but for other modules", where, "the file is not complete")
    return alphas.get(name, rank) / rank


def _configurations(header: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """The header's flat `<component>.<key>` values, checked, by component."""
    try:
        flat = json.loads(header.get(METADATA) or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"has {METADATA} that is not valid JSON: {error}", where, SAVE_AGAIN) from error
    if not isinstance(flat, dict):
        raise InvalidInput(f"has {METADATA} that is not a JSON object", where, SAVE_AGAIN)
    configurations: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        configurations.setdefault(component, {"peft_type": "LORA"})[name] = value
    for config in configurations.values():
        check_config(config, where)
    return configurations
