"""What a subspace of many tasks stores, and what the tasks lose: writes benchmarks/results/capacity.json.

    make bench-capacity                                    two minutes: random adapters, the worst case
    make bench-capacity BENCH=sharing                      two minutes: 1,000 tasks that were trained in one basis
    make bench-capacity BENCH=pictures                     a minute: ten LoRAs at the shapes of Stable Diffusion 1.5
    make bench-capacity BENCH="unrelated [--data FOLDER]"  real tasks that have nothing in common: the six of examples/,
                                                           with --data ten; two to four minutes a task on one core, once
    make bench-capacity BENCH="related --data FOLDER --tasks N"    N tasks cut from one data set
    make bench-capacity BENCH="directions --data FOLDER"           what a basis is worth, by the tasks that made it
    make bench-capacity BENCH="forms --data FOLDER --tasks N"      other ways to keep the same tasks, and a plot
    make bench-capacity BENCH="one --data FOLDER --tasks N"        one adapter for all of them, by every way to make it

`random`: adapters at the shapes of MiniLM-L6's query and value (12 modules 384×384, rank 8, singular values that fall
by a third each) are merged one by one under the default settings, with private parts and without (`beyond_rank_max:
drop`). Every task is then read back from the files and compared with what was delivered, module by module. `sharing`:
six such adapters make the basis, then tasks come that lie in its span, as coefficients trained in it do. `pictures`:
random factors of rank 16 for the 128 attention layers of its UNet, and for the 48 of its text encoder in every third
LoRA. The others are in benchmarks/real_streams.py. --keep FOLDER: where trained adapters are kept (default: the
temporary folder).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import forms, real_streams  # noqa: E402
from configs.settings import SubspaceSettings  # noqa: E402
from subspace_store import Adapter, SubspaceReader, SubspaceStore, canonical_update  # noqa: E402
from subspace_store.formats.diffusers import from_diffusers  # noqa: E402
from subspace_store.merging.basis import ModuleBasis  # noqa: E402
from tests.stable_diffusion import random_lora  # noqa: E402
from tests.subspace_store.builders import BASE, fresh_storage, merged, random_adapter  # noqa: E402
from workers.methods import auto  # noqa: E402

PARTS = ("random", "sharing", "pictures", "unrelated", "related", "directions", "forms", "one")
TASKS, RANK = 120, 8
PICTURES, PICTURES_RANK = 10, 16
SHARING, SEEDS, SEED_RANK = 1000, 6, 5
SHAPES = {f"layer.{layer}.{part}": (384, 384) for layer in range(6) for part in ("query", "value")}
RESULTS = ROOT / "benchmarks/results/capacity.json"
FORMS_PLOT = ROOT / "docs/capacity-forms.png"


def main() -> None:
    """Measure a part, print it and write its figures beside those of the other parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, default=PARTS[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--renew-tasks", type=int, default=SubspaceSettings().renew_tasks)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "onebasis-capacity")
    asked = parser.parse_args()
    name: str = asked.part
    if name == "random":
        adapters = {f"t{i}": random_adapter(i, RANK, SHAPES) for i in range(TASKS)}
        found = {"tasks": TASKS, "private": stream(adapters, "private"), "drop": stream(adapters, "drop")}
    elif name == "sharing":
        found = sharing()
    elif name == "pictures":
        loras = {f"t{i}": random_lora(i, PICTURES_RANK, with_text=i % 3 == 0) for i in range(PICTURES)}
        adapters = {
            task: from_diffusers(tensors, {}, base_model=BASE, base_sha256="") for task, tensors in loras.items()
        }
        found = {"tasks": PICTURES, "private": stream(adapters, "private")}
    elif name == "directions":
        found = real_streams.directions(asked.data, asked.keep / "related", say)
    elif name in ("forms", "one"):
        cases = tuple(real_streams.related(asked.data, asked.tasks))
        measured = forms.measure if name == "forms" else forms.one_for_all_of
        found = measured(real_streams.base_model(), cases, asked.keep / "related", say)
    else:
        related = name == "related"
        cases = real_streams.related(asked.data, asked.tasks) if related else real_streams.unrelated(asked.data)
        merging = SubspaceSettings(renew_tasks=asked.renew_tasks)
        found = real_streams.measure(cases, asked.keep / name, say, merging)
        name = f"{len(found['tasks'])}_{name}"
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = {"date": time.strftime("%Y-%m-%d")} | found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known[name], indent=1))
    if name == "forms":
        forms.draw(found, {key: part for key, part in known.items() if key.endswith("_related")}, FORMS_PLOT)
    if isinstance(found.get("tasks"), list):
        draw(found["tasks"], ROOT / "docs" / f"capacity-{name.replace('_', '-')}.png")


def say(line: str) -> None:
    print(line, flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A stream of tasks: what all of them take together, task by task, and what each scores beside LoRA."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = range(1, len(rows) + 1)
    sums = {
        "LoRA of rank 8": [row["numbers_trained"] for row in rows],
        "each LoRA alone, cut to what its score needs": [row["numbers_alone"] for row in rows],
        "in the subspace": [row["numbers"] for row in rows],
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for label, numbers in sums.items():
        left.plot(places, [total / 1e6 for total in itertools.accumulate(numbers)], label=label)
    left.set(xlabel="tasks", ylabel="million numbers, heads aside")
    left.legend(fontsize=8)
    for kept in ("lora", "share"):
        chosen = [row for row in rows if row["kept"] == kept]
        points = [100 * (row["score"] - row["score_lora"]) for row in chosen]
        label = {"lora": "kept as a LoRA", "share": "kept as coefficients in the basis"}[kept]
        right.scatter([row["numbers"] for row in chosen], points, label=label, s=18)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="numbers that the task added", ylabel="points of accuracy beside LoRA of rank 8", xscale="log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def sharing() -> dict[str, Any]:
    """Merge tasks that lie in the span of a basis, one by one, and measure what they cost."""
    store = SubspaceStore.open(fresh_storage(), settings=SubspaceSettings(), base_model=BASE, writer="benchmark")
    for i in range(SEEDS):
        merged(store, {f"seed-{i}": auto.sized(random_adapter(i, SEED_RANK, SHAPES), 1.0)})
    bases, before = store.basis(SEEDS), store.footprint(SEEDS).total_numbers
    adapters = {f"t{i}": auto.sized(trained_in(bases, i), 1.0) for i in range(SHARING)}
    seconds = []
    for task, adapter in adapters.items():
        started = time.perf_counter()
        merged(store, {task: adapter})
        seconds.append(time.perf_counter() - started)
    last = store.state.refs["candidate"]
    reader = SubspaceReader.open(store.storage, base_model=BASE)
    numbers = reader.footprint(last).total_numbers - before
    return {
        "tasks": SHARING,
        "broken_promises": sum(held(reader, last, task, adapter) < 1 - 1e-6 for task, adapter in adapters.items()),
        "worst_error": max(missing(reader, last, task, adapter) for task, adapter in list(adapters.items())[::100]),
        "numbers_per_task_over_lora_r8": numbers / SHARING / sum(RANK * sum(shape) for shape in SHAPES.values()),
        "merge_seconds_1000_over_10": statistics.median(seconds[-10:]) / statistics.median(seconds[:10]),
        "seconds": {"first_ten": statistics.median(seconds[:10]), "last_ten": statistics.median(seconds[-10:])},
    }


def trained_in(bases: Mapping[str, ModuleBasis], seed: int) -> Adapter:
    """What a worker makes of random coefficients in a basis."""
    draw, modules = torch.Generator().manual_seed(seed), {}
    for name, basis in bases.items():
        e_KR, f_KR = (torch.randn(k, RANK, generator=draw) for k in basis.ranks)
        modules[name] = canonical_update(basis.p_NK @ e_KR, (basis.q_DK @ f_KR).T, 0.1)
    return Adapter(BASE, "", modules, {}, {})


def stream(adapters: dict[str, Adapter], beyond: str) -> dict[str, Any]:
    """Merge all, one by one, and measure what the last version holds."""
    settings = SubspaceSettings.model_validate({"beyond_rank_max": beyond})
    store = SubspaceStore.open(fresh_storage(), settings=settings, base_model=BASE, writer="benchmark")
    seconds = []
    for task, adapter in adapters.items():
        started = time.perf_counter()
        merged(store, {task: adapter})
        seconds.append(time.perf_counter() - started)
    last = store.state.refs["candidate"]
    reader = SubspaceReader.open(store.storage, settings=settings, base_model=BASE)
    shares = {task: held(reader, last, task, adapter) for task, adapter in adapters.items()}
    errors = [missing(reader, last, task, adapter) for task, adapter in adapters.items()]
    foot = reader.footprint(last)
    trained = sum(adapter.parameter_count for adapter in adapters.values())
    alone = sum(real_streams.truncated_alone(adapter, settings.energy_ratio_min) for adapter in adapters.values())
    at_once = reader.preview_compact().numbers_after
    return {
        "broken_promises": sum(share < settings.energy_ratio_min - 1e-6 for share in shares.values()),
        "error": {"median": statistics.median(errors), "worst": max(errors)},
        "numbers_over_trained_lora": foot.total_numbers / trained,
        "numbers_over_best_separate": foot.total_numbers / alone,
        "over_offline_optimum": foot.total_numbers / at_once,
        "merge_seconds_last_ten_over_first_ten": statistics.median(seconds[-10:]) / statistics.median(seconds[:10]),
    }


def held(reader: SubspaceReader, version: int, task: str, adapter: Adapter) -> float:
    """Share of a task's energy that a version holds, in the module where it is least."""
    found = reader.adapter(task, version).modules
    return min(found[name].energy / update.energy for name, update in adapter.modules.items())


def missing(reader: SubspaceReader, version: int, task: str, adapter: Adapter) -> float:
    """‖ΔW − ΔŴ‖_F / ‖ΔW‖_F over all modules, of dense matrices."""
    found = reader.adapter(task, version).modules
    missed = sum(float((found[n].delta() - u.delta()).square().sum()) for n, u in adapter.modules.items())
    return float((missed / sum(update.energy for update in adapter.modules.values())) ** 0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
