"""Which programs load an exported adapter, and why others do not. Read from their sources in 2026, none is imported.

The rules, each with its source:

* PEFT (`peft/peft_model.py`) loads every folder; one with a head needs a model that has such a head.
* vLLM (`vllm/lora/peft_helper.py`) refuses `modules_to_save`, so every head, and DoRA. It takes ranks up to
  `--max-lora-rank`, which is one of a few numbers (`vllm/config/lora.py`), and one alpha/r, rsLoRA's too, for all
  modules: patterns are not looked at. It refuses a tensor that is no lora_A or lora_B (`vllm/lora/utils.py`), and any
  layer of a kind that its own code of the base model does not adapt (`vllm/lora/lora_model.py`).
* LoRAX (`server/lorax_server/adapters/lora.py`) looks up lora_A and lora_B by the full names of the base model's layers
  and silently leaves everything else out, a head as well. It stacks each kind of layer in one tensor, and leaves
  the kind out if one of the model's layers is not there. Ranks are filled up (`server/lorax_server/utils/sgmv.py`).
* diffusers (`src/diffusers/loaders/lora_base.py`) loads files whose names begin with a pipeline's component.

Our exports have no patterns, no rsLoRA and no DoRA (peft.py), so these need no rule here. Whether a server knows the
base model's architecture cannot be told from an adapter.
"""

from __future__ import annotations

from collections.abc import Collection

LOADERS = ("peft", "vllm", "lorax", "diffusers")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that `--max-lora-rank` may have."""


def refusals(kind: str, *, rank: int, has_head: bool, modules: Collection[str]) -> dict[str, str]:
    """Loader to the reason why it does not load an export, or not all of it. Those of `LOADERS` without an entry load
    it.

    Args:
        kind: `peft` (a folder) or `diffusers` (a file).
        rank: Rank of every module, as exported.
        has_head: Whether weights are saved whole beside the LoRA.
        modules: Full names of the adapted layers; empty: not known.
    """
    if kind == "diffusers":
        return dict.fromkeys(("peft", "vllm", "lorax"), "a LoRA file of diffusers is no PEFT folder")
    found = {"diffusers": "a PEFT folder names no component of a pipeline"}
    if has_head:
        found["vllm"] = "it has a head of its own (modules_to_save), which vLLM refuses"
        found["lorax"] = "it has a head of its own, which LoRAX silently leaves out"
    elif rank > VLLM_RANKS[-1]:
        found["vllm"] = f"its rank {rank} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank"
    if "lorax" not in found and (partial := partial_kinds(modules)):
        found["lorax"] = f"not every layer has {', '.join(partial)}, and LoRAX leaves out what not every layer has"
    return found


def vllm_max_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` with which vLLM takes this rank; None: there is none."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def partial_kinds(modules: Collection[str]) -> tuple[str, ...]:
    """Kinds of layer (`self_attn.q_proj`) that are not adapted in each of the layers that these names go up to."""
    layers: dict[tuple[str, str], set[int]] = {}
    for name in modules:
        parts = name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            stack, kind = ".".join(parts[:place]), ".".join(parts[place + 1 :])
            layers.setdefault((stack, kind), set()).add(int(parts[place]))
    counts = {stack: max(max(found) for (other, _), found in layers.items() if other == stack) for stack, _ in layers}
    return tuple(sorted(kind for (stack, kind), found in layers.items() if len(found) <= counts[stack]))
