"""Other ways to merge many adapters, behind one function, for comparison.

All of them are pure and see every adapter at once, as delivered: nothing here knows versions or storage. Only
`canonical`, `paper` and `separate` keep an update of its own for each task. Axes: N outputs, D inputs, R rank, C
columns of several updates side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.basis import ModuleSubspace, reconstruct
from subspace_store.merging.merge import merge_adapters
from subspace_store.merging.one_for_all import ONE_FOR_ALL
from subspace_store.merging.subspace_math import weighted_sum

Variant = Literal[
    "canonical", "paper", "mean", "ties", "task_arithmetic", "dare", "tsv", "iso_c", "core_ties", "separate"
]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Merged:
    """The result of one variant for all adapters."""

    updates: Mapping[str, Mapping[str, ModuleUpdate]]
    """Task id to module to update. What is in one_for_all.py gives every task the same updates."""
    stored_numbers: int
    """Numbers that have to be stored to serve all tasks, heads not counted."""
    error: Mapping[str, float]
    """Task id to ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F over all modules; ΔW is zero in a module that the task does not adapt."""


def merge_all(
    adapters: Mapping[str, Adapter],
    variant: Variant,
    settings: SubspaceSettings,
    start: Mapping[str, ModuleSubspace] = MappingProxyType({}),
) -> Merged:
    """Merge all adapters at once.

    Args:
        adapters: Task id to adapter; ranks and modules may differ.
        variant: `canonical` is this store's merge, as one group. `paper` is Share's (arXiv:2602.06043): raw B and A
            stacked, a fixed number of directions. Not centred, unlike the paper's code: that fits the basis on
            centred columns and projects uncentred ones without keeping the mean, which loses 35 % of a single
            adapter. `separate` keeps every LoRA. The others, in one_for_all.py, are one adapter for all tasks, of
            rank `settings.rank_fixed` or else `rank_max`, the mean being over the tasks that adapt a module.
        settings: `weighting` and `energy_ratio_min` count for `canonical` alone.
        start: Renewed bases, for `canonical` alone: what was trained in them takes its coefficients there.

    Raises:
        InvalidInput: `paper`, and an adapter whose factors B and A are not known.

    Cost:
        `ties` and `dare` form each module's ΔW densely and take its full SVD. The others do not.
    """
    if variant == "separate":
        kept = {task: adapter.modules for task, adapter in adapters.items()}
        return Merged(kept, sum(a.parameter_count for a in adapters.values()), dict.fromkeys(adapters, 0.0))
    if variant in ("canonical", "paper"):
        begin = start if variant == "canonical" else {}
        modules = merge_adapters(begin, adapters, settings.model_copy(update={"variant": variant})).modules
        updates = {task: reconstruct(modules, task) for task in adapters}
        return Merged(updates, sum(module.numbers for module in modules.values()), _errors(adapters, updates))
    common = one_for_all(adapters, variant, settings.rank_fixed or settings.rank_max)
    everyone = dict.fromkeys(adapters, common)
    return Merged(everyone, sum(u.rank * sum(u.shape) for u in common.values()), _errors(adapters, everyone))


def one_for_all(adapters: Mapping[str, Adapter], variant: str, rank: int) -> dict[str, ModuleUpdate]:
    """Module to the one update of all tasks that adapt it, of at most this rank. variant: One of `ONE_FOR_ALL`."""
    of_modules = _by_module(adapters).items()
    return {name: ONE_FOR_ALL[variant](list(updates.values())).leading(rank) for name, updates in of_modules}


def _by_module(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, ModuleUpdate]]:
    """Module to task to update, for the tasks that adapt it."""
    names = sorted({name for adapter in adapters.values() for name in adapter.modules})
    return {name: {task: a.modules[name] for task, a in adapters.items() if name in a.modules} for name in names}


def _errors(adapters: Mapping[str, Adapter], found: Mapping[str, Mapping[str, ModuleUpdate]]) -> dict[str, float]:
    return {task: relative_error(adapter.modules, found[task]) for task, adapter in adapters.items()}


def relative_error(delivered: Mapping[str, ModuleUpdate], found: Mapping[str, ModuleUpdate]) -> float:
    """‖ΔW − ΔŴ‖_F / ‖ΔW‖_F over all modules of either; 0 if nothing was delivered.

    Cost:
        O((N+D)·R²) per module: from the factors, without cancellation.
    """
    missed = 0.0
    for name in sorted(delivered.keys() | found.keys()):
        pair = [(1.0, delivered.get(name)), (-1.0, found.get(name))]
        weights, updates = zip(*((w, update) for w, update in pair if update is not None), strict=True)
        missed += weighted_sum(updates, weights).energy
    energy = sum(update.energy for update in delivered.values())
    return math.sqrt(missed / energy) if energy else 0.0
