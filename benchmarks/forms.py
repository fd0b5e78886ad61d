"""Part `forms` of capacity.py: every way to keep the same tasks, by what it stores and by what the tasks score.

The tasks are the related ones of `related`, with a LoRA of rank 8 each, trained on all rows. Numbers are over those of
that LoRA, points are of accuracy beside it, on the test rows; both are means over the tasks. What `related` found of
onebasis is drawn beside them. LoRAs of other ranks are trained for the first tasks alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import real_streams
from benchmarks.contestants import fixed_bases
from benchmarks.real_streams import ALL, Case, Figures
from configs.settings import SubspaceSettings
from subspace_store import Adapter, ModuleUpdate, canonical_update
from subspace_store.merging.one_for_all import ONE_FOR_ALL
from subspace_store.merging.variants import Variant, merge_all, one_for_all
from workers.base_model import BaseModel
from workers.evaluation import score_adapter

RANKS = (1, 2, 4)
"""Of LoRAs that are trained so small, and of those that are truncated to it."""
TRAINED = 8
"""Number of tasks for which LoRAs of other ranks are trained."""
DIRECTIONS = (8, 16, 32, 64)
"""Directions of a fixed basis."""
RANK = 8
"""Of the one adapter for all."""
TURNS = 5
"""Turns of the joint compression; its loss hardly changes after three."""
ONE_OF_ALL: tuple[Variant, ...] = ("mean", "ties")
"""Of the ways to make one adapter for all, those that are drawn; `one_for_all_of` measures every one."""
JOINT = "joint compression (P·Σ·Qᵀ)"


def measure(base: BaseModel, cases: Sequence[Case], folder: Path, say: Callable[[str], None]) -> Figures:
    """Numbers and points of every form."""
    whole = {case.spec.name: real_streams.trained(base, case, "lora", case.train, folder, ALL) for case in cases}
    own = {case.spec.name: real_streams.score(base, whole[case.spec.name], case) for case in cases}
    full = sum(adapter.parameter_count for adapter in whole.values())
    found: list[Figures] = []

    def add(form: str, size: int, numbers: float, adapters: Mapping[str, Adapter]) -> None:
        some = [case for case in cases if case.spec.name in adapters]
        points = [100 * (real_streams.score(base, adapters[c.spec.name], c) - own[c.spec.name]) for c in some]
        row = {"form": form, "size": size, "tasks": len(some), "numbers_over_lora": numbers}
        error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.nan
        found.append(row | {"points": statistics.fmean(points), "error": error, "worst": min(points)})
        say(json.dumps(found[-1]))

    for rank in RANKS:
        cut = {name: _each(adapter, lambda update, r=rank: update.leading(r)) for name, adapter in whole.items()}
        add("LoRA r 8, truncated", rank, sum(adapter.parameter_count for adapter in cut.values()) / full, cut)
    for name, size, numbers, updates in _merged(whole):
        add(name, size, numbers / full, {task: replace(whole[task], modules=updates[task]) for task in whole})
    for rank in RANKS:
        small = {c.spec.name: _small(base, c, rank, folder) for c in cases[:TRAINED]}
        of_these = sum(whole[name].parameter_count for name in small)
        add("LoRA, trained at its rank", rank, sum(a.parameter_count for a in small.values()) / of_these, small)
    return {"tasks": len(cases), "forms": found}


def one_for_all_of(base: BaseModel, cases: Sequence[Case], folder: Path, say: Callable[[str], None]) -> Figures:
    """Mean accuracy of the tasks where one adapter answers for all, each with its own head, by every way to make it."""
    whole = {case.spec.name: real_streams.trained(base, case, "lora", case.train, folder, ALL) for case in cases}

    def accuracy(common: Mapping[str, ModuleUpdate] | None = None, with_update: bool = True) -> list[float]:
        own = {case: whole[case.spec.name] for case in cases}
        held = own if common is None else {case: replace(adapter, modules=common) for case, adapter in own.items()}
        return [
            score_adapter(base, adapter, case.test, case.spec, with_update=with_update).value
            for case, adapter in held.items()
        ]

    found: Figures = {"names": [case.spec.name for case in cases], "separate": accuracy()}
    found["heads alone"] = accuracy(with_update=False)
    for rank in (RANK, 4 * RANK):
        for way in ONE_FOR_ALL:
            found[f"{way}, rank {rank}"] = accuracy(one_for_all(whole, way, rank))
            say(f"{way:16} rank {rank:3}  {statistics.fmean(found[f'{way}, rank {rank}']):.4f}")
    means = {name: statistics.fmean(scores) for name, scores in found.items() if name != "names"}
    return {"mean": means, "points_above_the_mean_adapter": _above_mean(means)} | found


def _above_mean(means: Mapping[str, float]) -> dict[str, float]:
    return {
        name: 100 * (score - means[f"mean, rank {name.rpartition(' ')[2]}"])
        for name, score in means.items()
        if ", rank " in name
    }


def draw(found: Figures, streams: Mapping[str, Figures], path: Path) -> None:
    """Points against numbers, a line for each way to keep the tasks.

    Args:
        streams: Name to what `related` found of onebasis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for form, mark in zip(dict.fromkeys(row["form"] for row in found["forms"]), "osv^DPX*", strict=False):
        rows = [row for row in found["forms"] if row["form"] == form]
        axes.plot([r["numbers_over_lora"] for r in rows], [r["points"] for r in rows], marker=mark, label=form)
    label = "onebasis (number of tasks)"
    for name, stream in sorted(streams.items()):
        points = statistics.fmean(100 * (row["score"] - row["score_lora"]) for row in stream["tasks"])
        numbers = stream["numbers_over_trained_lora"]
        axes.plot([numbers], [points], "k*", markersize=11, label=label)
        label = ""  # once in the legend
        axes.annotate(name.partition("_")[0], (numbers, points), (0, 7), textcoords="offset points", ha="center")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="numbers kept for each task, over a LoRA of rank 8",
        ylabel="points of accuracy beside that LoRA, mean",
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _merged(whole: Mapping[str, Adapter]) -> Iterator[tuple[str, int, float, Mapping[str, Mapping[str, ModuleUpdate]]]]:
    """(form, size, numbers, updates) of everything that is made of all adapters together."""
    for directions in DIRECTIONS:
        settings = SubspaceSettings(rank_fixed=directions)
        for variant in ("paper", "canonical"):
            merged = merge_all(whole, variant, settings)
            name = {"paper": "Share, the paper's form", "canonical": "one basis for all, fixed size"}[variant]
            yield name, directions, merged.stored_numbers, merged.updates
        yield JOINT, directions, *compressed(whole, directions)
    for variant in ONE_OF_ALL:
        merged = merge_all(whole, variant, SubspaceSettings(rank_fixed=RANK))
        yield f"one adapter for all: {variant}", RANK, merged.stored_numbers, merged.updates


def compressed(whole: Mapping[str, Adapter], directions: int) -> tuple[int, dict[str, dict[str, ModuleUpdate]]]:
    """Numbers, and P·Σ_t·Qᵀ of each task with a full K×K matrix Σ_t: bases fitted to all tasks in turns.

    Source: the joint compression of Brüel-Gabrielsson et al., Compress then Serve (arXiv:2407.00066), with each task
    divided by its norm.
    """
    found: dict[str, dict[str, ModuleUpdate]] = {task: {} for task in whole}
    numbers = 0
    for name in next(iter(whole.values())).modules:
        updates = {task: adapter.modules[name] for task, adapter in whole.items()}
        p_NK, q_DK = fixed_bases(list(updates.values()), directions, TURNS)
        for task, u in updates.items():
            b_NR = p_NK @ (p_NK.T @ (u.u_NR.double() * u.sigma_R.double()))
            found[task][name] = canonical_update(b_NR.float(), (q_DK @ (q_DK.T @ u.v_DR.double())).T.float(), 1.0)
        numbers += directions * sum(next(iter(updates.values())).shape) + len(whole) * directions**2
    return numbers, found


def _small(base: BaseModel, case: Case, rank: int, folder: Path) -> Adapter:
    """A LoRA of another rank, with the scaling of the others."""
    lora = case.spec.lora
    alpha = lora.lora_alpha * rank / lora.r
    spec = case.spec.model_copy(update={"lora": lora.model_copy(update={"r": rank, "lora_alpha": alpha})})
    return real_streams.trained(base, replace(case, spec=spec), "lora", case.train, folder, f"{ALL}-r{rank}")


def _each(adapter: Adapter, change: Callable[[ModuleUpdate], Any]) -> Adapter:
    return replace(adapter, modules={name: change(update) for name, update in adapter.modules.items()})
