"""Part `accuracy` of benchmarks/store.py: what merging costs real tasks, with adapters trained here.

Two sets of adapters on MiniLM-L6: `one A`, all trained from one seed, and `own A`, each from a seed of its own, as
teams that know nothing of each other would. Trained adapters are kept in a folder, so that training happens once:
two to five minutes a task on one core, short texts first.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.settings import SubspaceSettings, read_settings
from configs.task_spec import DataSpec, LoraSpec, TaskSpec, TrainingSpec, read_task_spec
from subspace_store import Adapter, ModuleUpdate, adapter_from_bytes, adapter_to_bytes
from subspace_store.merging.reorder import reorder
from subspace_store.merging.variants import Variant, merge_all
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import score_adapter
from workers.methods import lora
from workers.rows.task_data import Row, read_rows
from workers.trainer import Surroundings, fit

ROOT = Path(__file__).resolve().parents[1]
TRAIN_ROWS, EVAL_ROWS = 2000, 400
MAX_LENGTH = 64
ONE_SEED, FIRST_OWN_SEED = 42, 100
LONG_TEXTS = ("boolq", "rte")
"""Left out of `own A`: they train twice as long as the others and learn little on this backbone."""
ORDERS = 5
CONTESTANTS: tuple[tuple[str, Variant, dict[str, str]], ...] = (
    ("canonical, equal", "canonical", {"weighting": "equal"}),
    ("canonical, energy", "canonical", {"weighting": "energy"}),
    ("paper", "paper", {}),
    ("mean", "mean", {}),
    ("ties", "ties", {}),
    ("task_arithmetic", "task_arithmetic", {}),
)
RANKS = {"one A": (16, 32), "own A": (32, 48)}
SCORED = {
    "one A": {16: ("canonical, equal", "canonical, energy", "paper"), 32: tuple(name for name, *_ in CONTESTANTS)},
    "own A": {32: ("canonical, equal", "paper")},
}
"""What is put into the model as well: 400 rows of 64 tokens take ten seconds of a core, and there are ten tasks."""

Figures = dict[str, Any]


def measure(
    data: Path | None,
    folder: Path,
    kinds: Sequence[str],
    say: Callable[[str], None],
    show: Callable[[list[Figures]], None],
) -> Figures:
    """Error of ΔW and accuracy of every variant, and the errors of merging one by one in several orders."""
    if data is None:
        say("no --data: the six tasks of examples/ instead of ten text sets")
        folder = folder / "examples"
    specs = tasks(data)
    settings = read_settings(ROOT / "configs/local.yaml").bases[0]
    base = load_base_model(settings.model_copy(update={"device": "cpu"}))
    result: Figures = {"tasks": list(specs), "data": "examples/" if data is None else "text sets given by --data"}
    for kind, adapters in trained(base, specs, folder, kinds).items():
        say(f"{kind}: {len(adapters)} tasks")
        rows = list(_rows(base, specs, adapters, kind))
        show([{key: value for key, value in row.items() if key != "accuracy"} for row in rows])
        orders = [_orders(adapters, rank, variant) for rank in RANKS[kind] for variant in ("canonical", "paper")]
        show(orders)
        result[kind] = {"rows": rows, "one_by_one": orders}
    return result


def _rows(
    base: BaseModel, specs: Mapping[str, TaskSpec], adapters: Mapping[str, Adapter], kind: str
) -> Iterator[Figures]:
    evaluation = {name: read(specs[name], specs[name].data.eval_file, EVAL_ROWS) for name in adapters}

    def accuracy(updates: Mapping[str, Mapping[str, ModuleUpdate]], with_update: bool = True) -> Figures:
        scores = {
            name: score_adapter(
                base, replace(adapter, modules=updates[name]), evaluation[name], specs[name], with_update=with_update
            ).value
            for name, adapter in adapters.items()
        }
        return {"mean_accuracy": 100 * statistics.fmean(scores.values()), "accuracy": scores}

    delivered = merge_all(adapters, "separate", SubspaceSettings())
    yield {"k": "", "what": "separate", "stored_numbers": delivered.stored_numbers, **accuracy(delivered.updates)}
    yield {"k": "", "what": "heads alone", **accuracy(delivered.updates, with_update=False)}
    for rank in RANKS[kind]:
        for name, variant, settings in CONTESTANTS:
            merged = merge_all(adapters, variant, SubspaceSettings.model_validate({"rank_fixed": rank, **settings}))
            yield {
                "k": rank,
                "what": name,
                "mean_error": statistics.fmean(merged.error.values()),
                "worst_error": max(merged.error.values()),
                "stored_numbers": merged.stored_numbers,
                **(accuracy(merged.updates) if name in SCORED[kind].get(rank, ()) else {}),
            }


def _orders(adapters: Mapping[str, Adapter], rank: int, variant: str) -> Figures:
    settings = SubspaceSettings.model_validate({"rank_fixed": rank, "variant": variant})
    report = reorder(adapters, settings, ORDERS)
    mean, at_once = report.of_mean, statistics.fmean(report.at_once.values())
    return {
        "k": rank,
        "one by one": variant,
        "orders": ORDERS + 1,
        "mean_error_least": mean.low,
        "mean_error": mean.median,
        "mean_error_most": mean.high,
        "at_once": at_once,
        "to_at_once": mean.median / at_once,
    }


def tasks(data: Path | None) -> dict[str, TaskSpec]:
    """The classification tasks of a folder of text sets (one folder each: meta.json, train.jsonl.gz, test.jsonl.gz), or
    the six of examples/ if there is none. Short texts first."""
    if data is None:
        specs = [read_task_spec(path) for path in sorted((ROOT / "examples/tasks").glob("*.yaml"))]
        return {spec.name: spec for spec in specs}
    metas = [json.loads(file.read_text()) for file in data.glob("*/meta.json")]
    files = {meta["name"]: data / meta["name"] / "train.jsonl.gz" for meta in metas if meta["label_names"]}
    if not files:
        raise SystemExit(f"--data {data}: no folder in it has a meta.json with label_names: no text sets")
    return {
        meta["name"]: text_task(meta, files[meta["name"]])
        for meta in sorted((meta for meta in metas if meta["name"] in files), key=lambda m: _size(files[m["name"]], m))
    }


def _size(file: Path, meta: Figures) -> float:
    return file.stat().st_size / int(meta["n_train"])


def text_task(meta: Figures, file: Path) -> TaskSpec:
    """The task of a text set: its classes, or numbers where it has none."""
    return TaskSpec(
        team="bench",
        name=meta["name"].replace("_", "-"),
        base_model="minilm",
        kind="sequence_classification" if meta["label_names"] else "sequence_regression",
        data=DataSpec(
            train_file=str(file),
            eval_file=str(file.with_name("test.jsonl.gz")),
            text_pair_column="text_b" if meta["kind"].startswith("pair") else None,
            label_names=tuple(meta["label_names"] or ()),
            max_length=MAX_LENGTH,
        ),
        training=TrainingSpec(learning_rate=1e-3, num_train_epochs=3, per_device_train_batch_size=16),
        lora=LoraSpec(r=8, lora_alpha=16, target_modules=("query", "value")),
    )


def trained(
    base: BaseModel, specs: Mapping[str, TaskSpec], folder: Path, kinds: Sequence[str]
) -> dict[str, dict[str, Adapter]]:
    """Sets of adapters, those that are not in the folder yet trained and put there."""
    sets: dict[str, dict[str, Adapter]] = {kind: {} for kind in kinds}
    for kind, adapters in sets.items():
        for number, (name, spec) in enumerate(specs.items()):
            if kind == "own A" and name in LONG_TEXTS:
                continue
            file = folder / kind.replace(" ", "-") / f"{name}.safetensors"
            if not file.is_file():
                _train(base, spec, ONE_SEED if kind == "one A" else FIRST_OWN_SEED + number, file)
            adapters[name] = adapter_from_bytes(file.read_bytes(), str(file))
    return sets


def _train(base: BaseModel, spec: TaskSpec, seed: int, file: Path) -> None:
    started = time.perf_counter()
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"seed": seed})})
    model = lora.prepare(base, spec)
    fit(model, base, read(spec, spec.data.train_file, TRAIN_ROWS), spec, Surroundings())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(adapter_to_bytes(lora.finish(model, base, spec)))
    print(f"  trained {file.parent.name}/{file.stem} in {time.perf_counter() - started:.0f} s", flush=True)


def read(spec: TaskSpec, file: str | None, limit: int) -> tuple[Row, ...]:
    """The first rows of a task's file."""
    assert file is not None
    return read_rows(Path(file).read_bytes(), spec, file)[:limit]
