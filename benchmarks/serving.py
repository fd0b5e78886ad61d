"""What answering costs: rows of many tasks in one batch against one adapter. Writes benchmarks/results/serving.json.

    make bench-serving                 what a batch costs (three minutes), `http`, and `revisions` where no figures of
                                       them are known
    make bench-serving BENCH=batch     three minutes: what a batch costs
    make bench-serving BENCH=http      two minutes: a real service that answers over HTTP (serving_service.py)
    make bench-serving BENCH=revisions a quarter of an hour: tasks that learn again and again, of examples/; on text
                                       sets: make bench-revisions (revisions.py)
    make bench-serving BENCH=replicas  fifteen minutes: replicas come and go, on two Ray nodes (serving_replicas.py)
    make bench-serving BENCH=scoring   two minutes: many small tasks scored together, and one after another
    make bench-serving BENCH="routing FOLDER"   ten minutes: which task a text is for (routing.py)

A store of 1,000 tasks on MiniLM-L6: six seeds make the basis, the others are coefficients in it, as `auto` keeps them
of related tasks (rank 16 of some 30 directions), each with a head of three labels. Rows are the evaluation rows of
examples/, 64 a batch. Compared are, in turns, one row set after another: one LoRA of rank 8 in PEFT's layers for all
rows (the reference, 1.0); our mixed batch with 1, 10, 100 and 1,000 tasks in turn; PEFT's own mixed batch
(`adapter_names`), with as many LoRAs as fit into a batch; and one task after another. A ratio is of medians of one run.

Each part is written when it is measured, and changes nothing of the others: `dates` says when each was. Every run ends
with the figures of all parts.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.real_adapters import read  # noqa: E402
from benchmarks.real_streams import base_model  # noqa: E402
from configs.settings import SubspaceSettings  # noqa: E402
from configs.task_spec import Kind, TaskSpec, read_task_spec  # noqa: E402
from subspace_store import Adapter, ModuleUpdate, SubspaceStore  # noqa: E402
from subspace_store.adapter import SIZED  # noqa: E402
from subspace_store.formats.peft import to_peft  # noqa: E402
from subspace_store.storage.protocol import Storage  # noqa: E402
from tests.subspace_store.builders import fresh_storage, merged, random_adapter, trained_in  # noqa: E402
from tests.workers.worker_builders import random_head  # noqa: E402
from workers.base_model import BaseModel  # noqa: E402
from workers.evaluation import adapted_model  # noqa: E402
from workers.features import collator  # noqa: E402
from workers.orders import Evaluate, EvaluateTogether, Progress  # noqa: E402
from workers.peft_model import put_tensors  # noqa: E402
from workers.rows.task_data import Row  # noqa: E402
from workers.serving.mixed_batch import Asked, MixedBatch  # noqa: E402
from workers.worker import evaluate_together, evaluate_version  # noqa: E402

RESULTS = ROOT / "benchmarks/results/serving.json"
TASKS, SEEDS, SEED_RANK, RANK, LABELS = 1000, 6, 5, 16, 3
AT_ONCE = 50
"""Tasks merged in one version."""
ROWS = 64
BATCHES = 12
COUNTS = (1, 10, 100, 1000)
TARGETS = ("query", "value")
KIND: Kind = "sequence_classification"
SCORED, SCORED_ROWS, REPEATS = 40, (20, 64), 3


def main() -> None:
    """Measure, print and write; a part that was not run keeps its figures."""
    asked = sys.argv[1:]
    if asked[:1] == ["routing"] and len(asked) == 2:
        from benchmarks import routing

        keep({"routing": routing.measure(Path(asked[1]))})
    elif asked in ([], *([name] for name in PARTS)):
        for name in asked or ALONE:
            if asked or name != "revisions" or name not in known():
                keep(PARTS[name]())
    else:
        raise SystemExit(__doc__)
    print("\n".join(figures(known())))


def batch() -> dict[str, Any]:
    """What a batch of many tasks costs."""
    torch.set_num_threads(1)
    base = base_model()
    spec = read_task_spec(next(iter(sorted((ROOT / "examples/tasks").glob("*.yaml")))))
    rows = read(spec, spec.data.eval_file, ROWS * BATCHES)
    names = tuple(f"label-{n}" for n in range(LABELS))
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"label_names": names})})
    store = many_tasks(base)
    version = store.state.refs["candidate"]
    return measured(base, spec, store, version, [replace(row, label=0) for row in rows])


def over_http() -> dict[str, Any]:
    """Part `http`."""
    from benchmarks import serving_service

    return serving_service.measure()


def replicas() -> dict[str, Any]:
    """Part `replicas`."""
    from benchmarks import serving_replicas

    return serving_replicas.measure()


def scored() -> dict[str, Any]:
    """Part `scoring`."""
    torch.set_num_threads(1)
    return {"scoring": scoring(base_model())}


def revised() -> dict[str, Any]:
    """Part `revisions`, of the tasks of examples/."""
    from benchmarks import revisions

    return {"revisions": revisions.measure(None)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "batch": batch,
    "http": over_http,
    "revisions": revised,
    "replicas": replicas,
    "scoring": scored,
}
ALONE = ("batch", "http", "revisions")
"""Parts that are run where none is named."""


def scoring(base: BaseModel) -> dict[str, Any]:
    """What a worker takes to score `SCORED` tasks of `count` rows each, in turns: one order for each, and one for all.
    The scores and all rows' results are the same, or this fails."""
    store = many_tasks(base, SCORED)
    version, storage = store.state.refs["candidate"], store.storage
    found: dict[str, Any] = {"tasks": SCORED}
    for count in SCORED_ROWS:
        orders = tuple(_order(base, storage, version, task, count) for task in range(SCORED))
        seconds: dict[str, list[float]] = {"alone": [], "together": []}
        for _ in range(REPEATS):
            began = time.perf_counter()
            alone = [evaluate_version(order, base, storage, store, _unheard, lambda: "") for order in orders]
            seconds["alone"].append(time.perf_counter() - began)
            kept = [storage.read(order.results_key) for order in orders]
            began = time.perf_counter()
            whole = EvaluateTogether(token="", version=version, orders=orders)
            together = evaluate_together(whole, base, storage, store, _unheard, lambda: "")
            seconds["together"].append(time.perf_counter() - began)
            assert [one.score for one in alone] == [getattr(one, "score", None) for one in together.outcomes]
            assert kept == [storage.read(order.results_key) for order in orders]
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        found[f"{count}_rows"] = medians | {"times_faster": medians["alone"] / medians["together"]}
    return found


def _order(base: BaseModel, storage: Storage, version: int, task: int, count: int) -> Evaluate:
    spec = read_task_spec(next(iter(sorted((ROOT / "examples/tasks").glob("*.yaml")))))
    rows = read(spec, spec.data.eval_file, ROWS * BATCHES)
    names = tuple(f"label-{n}" for n in range(LABELS))
    data = {"train_file": "-", "eval_file": "-", "label_names": names, "max_length": spec.data.max_length}
    some = random.Random(task).sample(list(rows), count)
    lines = [json.dumps({"text": row.text, "label": names[n % LABELS]}) for n, row in enumerate(some)]  # type: ignore[union-attr]
    storage.write(key := f"data/{task}-{count}", "\n".join(lines).encode())
    small = TaskSpec.model_validate(
        {"team": "bench", "name": f"t{task}", "base_model": base.name, "kind": KIND, "data": data}
    )
    return Evaluate(
        token=f"{task}", task_id=f"t{task}", version=version, spec=small, eval_key=key, results_key=f"results/{task}"
    )


def _unheard(_: Progress) -> None:
    """A heartbeat that nobody asks for."""


def known() -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(found: Mapping[str, Any]) -> None:
    """Print a part's figures, and write them beside those of the other parts, with the day of each."""
    print(json.dumps(found, indent=1), flush=True)
    before, today = known(), time.strftime("%Y-%m-%d")
    dates = {"dates": {**before.get("dates", {}), **dict.fromkeys(found, today)}}
    RESULTS.write_text(json.dumps({**before, "date": today, **found, **dates}, indent=1) + "\n")


def figures(found: Mapping[str, Any]) -> list[str]:
    """A line for each figure that was ever measured; `revisions` are those of `make bench-revisions`."""
    lines = []
    if ratios := found.get("throughput_over_one_lora"):
        lines += [f"{ratio:9.2f}  rows a second over those of one LoRA: {way}" for way, ratio in ratios.items()]
        lines.append(
            f"{found['largest_difference']:9.1e}  largest difference of a probability to the exported adapters"
        )
        alone = f"a LoRA of rank 8: {found['bytes_per_lora_r8']:,}"
        lines.append(f"{found['bytes_per_task']:9,.0f}  bytes of a task in its file, its head among them ({alone})")
    for clients, took in found.get("http", {}).items():
        lines.append(
            f"{took['p50_ms']:9.0f}  ms, median answer over HTTP, {clients}; 99th of 100: {took['p99_ms']:.0f}"
        )
    if (seconds := found.get("publish_to_served_seconds")) is not None:
        most = found["publish_to_served_seconds_most"]
        lines.append(f"{seconds:9.2f}  s, median from where main moved until a reply names it; most: {most:.2f}")
    if replicas := found.get("replicas"):
        lines.append(f"{replicas['second_replica_seconds']:9.0f}  s of load until a second replica answers")
        lines.append(f"{replicas['node_lost']['longest_gap_seconds']:9.1f}  s without a reply when a node is lost")
    if scoring := found.get("scoring"):
        faster = ", ".join(f"{scoring[f'{count}_rows']['times_faster']:.1f}" for count in SCORED_ROWS)
        lines.append(f"{faster:>9}  times faster scored together than alone, tasks of {SCORED_ROWS} rows")
    if routing := found.get("routing"):
        disjoint = routing["disjoint"]
        lines += [
            f"{disjoint[way]['accuracy']:9.2f}  of texts found their task by {way}" for way in ("features", "energy")
        ]
    if revisions := found.get("revisions"):
        lines.append(
            f"{revisions['loss_to_union_points']:9.2f}  points that revisions lose to one training on the union"
        )
        lost = revisions["earlier_portions_loss_points"]
        lines.append(f"{lost:9.2f}  points that their earlier portions have lost since they were new")
    return lines


def many_tasks(base: BaseModel, count: int = TASKS) -> SubspaceStore:
    """A store in memory: seeds, and tasks inside their basis."""
    settings = SubspaceSettings(renew_tasks=0)
    store = SubspaceStore.open(fresh_storage(), settings=settings, base_model=base.name, writer="benchmark")
    shapes = {n: s for n, s in base.module_shapes(KIND).items() if n.endswith(TARGETS)}

    def adapter(seed: int, modules: Mapping[str, ModuleUpdate]) -> Adapter:
        head = random_head(base.heads[KIND], LABELS, seed, 0.1)
        return Adapter(base.name, "", modules, head, {SIZED: "score"})

    for seed in range(SEEDS):
        merged(store, {f"seed-{seed}": adapter(seed, random_adapter(seed, SEED_RANK, shapes, 0.02).modules)})
    bases = store.training_basis(SEEDS)
    for start in range(0, count, AT_ONCE):
        tasks = range(start, min(count, start + AT_ONCE))
        merged(store, {f"t{task}": adapter(task, trained_in(bases, 1000 + task, RANK).modules) for task in tasks})
    return store


def measured(
    base: BaseModel, spec: TaskSpec, store: SubspaceStore, version: int, rows: Sequence[Row]
) -> dict[str, Any]:
    """Times in turns, and the largest difference to the exported adapters."""
    ours = MixedBatch(base, store, version, lambda _: spec)
    draw = random.Random(0)
    ours.answer([Asked(f"t{task}", rows[0]) for task in range(TASKS)])  # all tasks are in memory
    collate = collator(base, spec)
    one = adapted_model(base, _lora(base, store.adapter("t0", version)), spec).eval()
    many, names = _many(base, spec, store, version)

    def alone(batch: Sequence[Row]) -> None:
        inputs = collate(batch)
        inputs.pop("labels")
        with torch.inference_mode():
            one(**inputs).logits.softmax(dim=-1).tolist()

    def peft_mixed(batch: Sequence[Row]) -> None:
        inputs = collate(batch)
        inputs.pop("labels")
        with torch.inference_mode():
            many(**inputs, adapter_names=[names[i % len(names)] for i in range(len(batch))]).logits.tolist()

    def mixed(count: int) -> Callable[[Sequence[Row]], Any]:
        return lambda batch: ours.answer([Asked(f"t{draw.randrange(count)}", row) for row in batch])

    def one_by_one(batch: Sequence[Row]) -> None:
        for row in batch:
            ours.answer([Asked(f"t{draw.randrange(TASKS)}", row)])

    ways: dict[str, Callable[[Sequence[Row]], Any]] = {"one LoRA": alone}
    ways |= {f"mixed, {count} tasks": mixed(count) for count in COUNTS}
    ways |= {"PEFT's mixed batch, 64 LoRAs": peft_mixed, "one task after another": one_by_one}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for start in range(0, len(rows) - ROWS + 1, ROWS):
        batch = rows[start : start + ROWS]
        for way, answer in ways.items():
            began = time.perf_counter()
            answer(batch)
            seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    throughput = {way: medians["one LoRA"] / value for way, value in medians.items()}
    return {
        "mixed_1000_over_one": throughput["mixed, 1000 tasks"],
        "largest_difference": largest_difference(base, spec, store, version, ours, rows[:8]),
        "throughput_over_one_lora": throughput,
        "rows_per_second_of_one_lora": ROWS / medians["one LoRA"],
        "bytes_per_task": ours.bytes_in_file / TASKS,
        "bytes_per_lora_r8": 4
        * 8
        * sum(sum(shape) for n, shape in base.module_shapes().items() if n.endswith(TARGETS)),
        "basis_bytes": store.footprint(version).basis_bytes,
    }


def largest_difference(
    base: BaseModel, spec: TaskSpec, store: SubspaceStore, version: int, ours: MixedBatch, rows: Sequence[Row]
) -> float:
    """Of a probability, between the mixed batch and each task's exported adapter in PEFT's layers."""
    tasks, worst = [f"t{n}" for n in range(0, TASKS, TASKS // 20)], 0.0
    answers = ours.answer([Asked(task, row) for task in tasks for row in rows])
    for place, task in enumerate(tasks):
        model = adapted_model(base, store.adapter(task, version), spec).eval()
        inputs = collator(base, spec)(rows)
        inputs.pop("labels")
        with torch.inference_mode():
            expected = model(**inputs).logits.softmax(dim=-1)
        for answer, wanted in zip(answers[place * len(rows) :], expected, strict=False):
            assert answer.probabilities is not None
            worst = max(worst, float((torch.tensor(list(answer.probabilities.values())) - wanted).abs().max()))
    return worst


def _lora(base: BaseModel, adapter: Adapter) -> Adapter:
    """As large as a LoRA of rank 8."""
    return replace(adapter, modules={name: update.leading(8) for name, update in adapter.modules.items()})


def _many(base: BaseModel, spec: TaskSpec, store: SubspaceStore, version: int) -> tuple[Any, list[str]]:
    """A PEFT model with a LoRA of rank 8 for each row of a batch; heads are left out, since PEFT cannot mix them."""
    from peft import LoraConfig

    from workers.peft_model import with_lora

    model, names = None, [f"a{n}" for n in range(ROWS)]
    for number, name in enumerate(names):
        config, tensors = to_peft(replace(_lora(base, store.adapter(f"t{number}", version)), head={}))
        settings = LoraConfig(**config | {"task_type": None})
        if model is None:
            model = with_lora(base.task_model(spec), settings)
            put_tensors(model, tensors)
            names[0] = "default"
        else:
            model.add_adapter(name, settings)
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(model, tensors, adapter_name=name)
    assert model is not None
    return model.eval(), names


if __name__ == "__main__":
    main()
