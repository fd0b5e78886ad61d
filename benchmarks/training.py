"""The figures of training: `make bench-training`. Prints tables and writes benchmarks/results/training.json.

python benchmarks/training.py [PART …] [--dry-run-gpu]

    speed    samples per second of our worker against a bare PyTorch + PEFT loop and against transformers' Trainer alone
    start    seconds to the first step: a process that has to load, and a warm worker
    methods  `share` and `codyra` against `lora`: step time, peak memory, trained numbers
    gang     1, 2 and 4 processes on this machine
    zero     memory per rank and step time of ZeRO's stages, two ranks
    gpu      shapes of a 7B Llama in bfloat16 (benchmarks/training_gpu.py); only where there is a GPU

Without parts: all of them. Contestants take turns, step by step or, where each needs processes, round by round; a ratio
is the median of ratios of what was measured side by side. `cpu_times_…` are the same on the thread's own clock.
--dry-run-gpu runs the code of `gpu` with tiny shapes on the CPU and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from benchmarks import training_runs as runs  # noqa: E402
from configs.settings import BaseModelSettings, StorageSettings  # noqa: E402
from configs.task_spec import TaskSpec  # noqa: E402
from workers.base_model import load_base_model  # noqa: E402
from workers.methods.factors import describe  # noqa: E402

RESULT = ROOT / "benchmarks/results/training.json"
THREADS = 1
Row = dict[str, Any]


# speed: MiniLM, r 8, 16 × 64 tokens, float32; and a small Llama

STEPS = 27
SMALL_LLAMA = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 704, "max_position_embeddings": 64,
}  # fmt: skip


def speed(_: argparse.Namespace) -> Row:
    """Samples per second: ours, a bare loop, Trainer alone."""
    contestants = {"ours": runs.ours, "bare loop": runs.bare, "Trainer alone": runs.trainer_alone}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in speed_cases(Path(folder)).items():
            found = side_by_side({who: partial(run, case) for who, run in contestants.items()})
            rows += [
                {
                    "model": name,
                    "who": who,
                    "samples_per_second": run.samples_per_second,
                    "times_bare": times(run, found["bare loop"]),
                    "times_trainer": times(run, found["Trainer alone"]),
                    "cpu_times_bare": times(run, found["bare loop"], "cpu_seconds"),
                    "cpu_times_trainer": times(run, found["Trainer alone"], "cpu_seconds"),
                    "seconds_around": run.around_seconds,
                }
                for who, run in found.items()
            ]
    show(rows)
    shape = f"r 8, 16 rows of 64 tokens, {STEPS} steps in turns, float32"
    return {"shape": shape, "rows": rows}


def speed_cases(folder: Path) -> dict[str, runs.Case]:
    training = {"max_steps": STEPS, "per_device_train_batch_size": 16}
    minilm = load_base_model(runs.minilm())
    llama = load_base_model(runs.save_llama(folder / "llama", **SMALL_LLAMA))
    return {
        "MiniLM": runs.Case(
            minilm,
            runs.task(minilm, "sequence_classification", ("query", "value"), training=training),
            runs.text_rows(256),
        ),
        "Llama, 4 layers of 256": runs.Case(
            llama, runs.task(llama, "causal_lm", ("q_proj", "v_proj"), training=training), runs.completion_rows(256)
        ),
    }


# start


STARTS, ORDERS = 3, 5


def start(_: argparse.Namespace) -> Row:
    """Seconds to the first step: everything loaded anew, and on a warm worker."""
    found = [in_process([__file__, "start-once"]) for _ in range(STARTS)]
    rows = [
        {
            "imports_seconds": median(one["imports"] for one in found),
            "loading_seconds": median(one["loading"] for one in found),
            "first_order_seconds": median(one["orders"][0] for one in found),
            "warm_order_seconds": median(order for one in found for order in one["orders"][1:]),
        }
    ]
    anew = median(one["imports"] + one["loading"] + one["orders"][0] for one in found)
    rows[0] |= {"anew_seconds": anew, "times_warm": anew / rows[0]["warm_order_seconds"]}
    show(rows)
    shape = f"MiniLM, {STARTS} processes, {ORDERS} orders each, from the order to the first optimisation step"
    return {"shape": shape, "rows": rows}


def start_once() -> Row:
    """In a process of its own: what has to be loaded, then orders one after another."""
    import psutil

    begun = psutil.Process().create_time()
    from workers.orders import Train, Trained
    from workers.worker import Worker

    imported = time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = StorageSettings(url=f"file:{folder}")
        worker = Worker(runs.minilm(), place, "bench", THREADS)
        worker.warm()
        warm, orders = time.time(), []
        lines = [json.dumps({"text": row.text, "label": row.label}) for row in runs.text_rows(64)]
        worker._storage.write("train", "\n".join(lines).encode())
        spec = runs.task(
            worker._base, "sequence_classification", ("query", "value"),
            training={"max_steps": 1, "per_device_train_batch_size": 16},
        )  # fmt: skip
        for number in range(ORDERS):
            given = time.time()
            key = f"staging/t{number}/1-x/adapter.safetensors"
            trained = worker.run(
                Train(
                    token=f"token{number}",
                    task_id=f"t{number}",
                    attempt=1,
                    spec=spec,
                    train_key="train",
                    eval_key="",
                    staging_key=key,
                )
            )
            assert isinstance(trained, Trained), trained
            orders.append(trained.first_step_at - given)
    return {"imports": imported - begun, "loading": warm - imported, "orders": orders}


# methods

K = 32
WAYS: dict[str, Mapping[str, Any]] = {
    "lora": {"name": "lora"},
    "share": {"name": "share"},
    "share, φ = 0": {"name": "share", "directions": "learned", "temporary_columns": 0},
    "share, φ = 8": {"name": "share", "directions": "learned"},
    "codyra": {"name": "codyra"},
}


METHOD_STEPS = 63
"""Differences of one in a hundred are looked for."""


def methods(_: argparse.Namespace) -> Row:
    """Step time and peak memory of the methods, and what each trains."""
    base = load_base_model(runs.minilm())
    targets, rows = ("query", "value"), runs.text_rows(256)
    basis = runs.random_basis(base, targets, K)
    training = {"max_steps": METHOD_STEPS, "per_device_train_batch_size": 16}
    specs = {
        name: runs.task(base, "sequence_classification", targets, training=training, method=way)
        for name, way in WAYS.items()
    }
    cases = {name: runs.Case(base, spec, rows, basis) for name, spec in specs.items()}
    found = side_by_side({name: partial(runs.ours, case) for name, case in cases.items()}, METHOD_STEPS)
    alone = {
        name: run_ranks([order(runs.minilm(), spec.model_copy(update={"training": few(spec)}), k=K)])[0]
        for name, spec in specs.items()
    }
    table = [
        {
            "method": name,
            "step_seconds": run.step_seconds,
            "times_lora": times(found["lora"], run),
            "cpu_times_lora": times(found["lora"], run, "cpu_seconds"),
            "peak_rss_mb": alone[name]["peak_rss_mb"],
            "peak_gpu_mb": alone[name]["gpu_mb"] or None,
            "trained_per_module": statistics.fmean(run.trained.values()),
        }
        for name, run in found.items()
    ]
    show(table)
    numbers = trained_numbers()
    for line in numbers:
        say(line)
    shape = f"MiniLM, query and value of 6 layers, r 8, k = {K}, 16 × 64 tokens, {METHOD_STEPS} steps in turns"
    return {"shape": shape, "rows": table, "trained_numbers": numbers}


def few(spec: TaskSpec) -> Any:
    return spec.training.model_copy(update={"max_steps": runs.WARM_STEPS + 2})


def trained_numbers() -> list[str]:
    """Of modules 768×768 with k = 32: share's coefficients alone, at p = 8 and p = 1, against LoRA's r 8."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 64}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        base = load_base_model(runs.save_llama(Path(folder) / "wide", **sizes, max_position_embeddings=64))
        targets = ("q_proj", "v_proj")
        basis = runs.random_basis(base, targets, K)
        for p in (8, 1):
            spec = runs.task(base, "causal_lm", targets, lora={"r": p}, method=WAYS["share, φ = 0"])
            model = runs.METHODS["share"].prepare(base, spec, runs.Given(version=1, basis=basis))
            lines.append(f"p = {p}: {describe(model, 'share, φ = 0', 8)}")
    return lines


# gang: MiniLM, one thread each, rows per rank the same

GANGS = (1, 2, 4)
GANG_ROUNDS, GANG_STEPS = 3, 12


def gang(_: argparse.Namespace) -> Row:
    """Samples per second of all ranks together, each with one thread."""
    base = load_base_model(runs.minilm())
    spec = runs.task(
        base, "sequence_classification", ("query", "value"),
        training={"max_steps": GANG_STEPS, "per_device_train_batch_size": 16},
    )  # fmt: skip
    found = in_turns(
        {str(size): partial(run_ranks, [order(runs.minilm(), spec)] * size) for size in GANGS},
        GANG_ROUNDS,
    )
    rows = []
    for size in GANGS:
        rates = [ranks[0]["samples_per_second"] for ranks in found[str(size)]]
        alone = [ranks[0]["samples_per_second"] for ranks in found["1"]]
        rows.append(
            {
                "processes": size,
                "samples_per_second": median(rates),
                "step_seconds": median(ranks[0]["step_seconds"] for ranks in found[str(size)]),
                "efficiency": median(one / (size * other) for one, other in zip(rates, alone, strict=True)),
            }
        )
    show(rows)
    cores = os.cpu_count() or 1
    note = f"gloo over loopback; this machine has {cores} cores, so {cores} processes is the most that can be faster"
    say(note)
    return {"shape": f"MiniLM, 16 × 64 tokens a rank, {GANG_ROUNDS} rounds", "note": note, "rows": rows}


# zero: a Llama of 110 million parameters, LoRA r 8, two ranks

ZERO_LLAMA = {
    "hidden_size": 768, "num_hidden_layers": 9, "num_attention_heads": 12, "num_key_value_heads": 12,
    "intermediate_size": 2048, "max_position_embeddings": 64,
}  # fmt: skip
ZERO_ROUNDS = 2
SMALL_BUCKETS = {
    "stage3_max_live_parameters": 8e6, "stage3_max_reuse_distance": 8e6, "stage3_prefetch_bucket_size": 4e6,
    "stage3_param_persistence_threshold": 1e4, "reduce_bucket_size": 4e6,
}  # fmt: skip


def zero(_: argparse.Namespace) -> Row:
    """Memory of one rank and step time of ZeRO's stages; stage 3 alone shares out the base model."""
    with tempfile.TemporaryDirectory() as folder:
        settings = runs.save_llama(Path(folder) / "llama", **ZERO_LLAMA)
        base = load_base_model(settings)
        parameters = sum(parameter.numel() for parameter in base.task_model(zero_task(base, None)).parameters())
        orders = {name: order(settings, zero_task(base, config)) for name, config in stages().items()}
        del base
        found = in_turns({name: partial(run_ranks, [one] * 2) for name, one in orders.items()}, ZERO_ROUNDS)
    rows = [
        {
            "stage": name,
            "peak_rss_mb": median(max(rank["peak_rss_mb"] for rank in ranks) for ranks in all_ranks),
            "own_mb": median(max(rank["own_mb"] for rank in ranks) for ranks in all_ranks),
            "gpu_mb": median(max(rank["gpu_mb"] for rank in ranks) for ranks in all_ranks) or None,
            "step_seconds": median(ranks[0]["step_seconds"] for ranks in all_ranks),
        }
        for name, all_ranks in found.items()
    ]
    show(rows)
    note = (
        "peak_rss counts the file's pages, which all processes of a machine share; own is what one process has for "
        "itself after the last step. With LoRA, optimizer states and gradients are small, so stages 1 and 2 save little"
    )
    say(note)
    shape = f"Llama of {parameters / 1e6:.0f} million parameters, float32, 2 ranks of 2 × 64 tokens"
    return {"shape": shape, "note": note, "rows": rows}


def zero_task(base: Any, config: Mapping[str, Any] | None) -> TaskSpec:
    training = {"max_steps": 5, "per_device_train_batch_size": 2, "deepspeed": config}
    return runs.task(base, "causal_lm", ("q_proj", "v_proj"), training=training)


def stages() -> dict[str, Mapping[str, Any] | None]:
    """The files to copy, stage 0 made of the first, and stage 3 with buckets that suit a small model."""
    files = {stage: json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text()) for stage in (1, 2, 3)}
    third = files[3]["zero_optimization"]
    return {
        "without DeepSpeed": None,
        "0": files[1] | {"zero_optimization": {"stage": 0}},
        "1": files[1],
        "2": files[2],
        "3": files[3],
        "3, small buckets": files[3] | {"zero_optimization": third | SMALL_BUCKETS},
    }


# gpu


def gpu(arguments: argparse.Namespace) -> Row:
    """A 7B Llama's shapes in bfloat16: lora, share, codyra against plain PEFT, and a merge on the GPU."""
    from benchmarks.training_gpu import LLAMA_7B, TINY, measure

    if arguments.dry_run_gpu:
        return measure(TINY, torch.device("cpu"), say, show)
    if not torch.cuda.is_available():
        say("left out: torch sees no GPU here (--dry-run-gpu runs the same code with tiny shapes)")
        return {}
    return measure(LLAMA_7B, torch.device("cuda"), say, show)


# What all parts use


def side_by_side(
    contestants: Mapping[str, Callable[[runs.Clock], runs.Run]], steps: int = STEPS
) -> dict[str, runs.Run]:
    """Step by step in turns."""
    return dict(zip(contestants, runs.Turns(list(contestants.values()), steps).play(), strict=True))


def times(one: runs.Run, other: runs.Run, clock: str = "seconds") -> float:
    """How many times as fast one is: the median of steps side by side."""
    return median(theirs / mine for mine, theirs in zip(getattr(one, clock), getattr(other, clock), strict=True))


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Every round each contestant once, another one first each time."""
    found: dict[str, list[Any]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(contestants[name]())
    return found


def order(base_model: BaseModelSettings, spec: TaskSpec, k: int = 0) -> Row:
    """What training_rank.py is told, but for its place."""
    return {
        "base_model": base_model.model_dump(mode="json"),
        "spec": spec.model_dump(mode="json"),
        "rows": 64,
        "k": k,
        "threads": THREADS,
    }


def run_ranks(orders: Sequence[Row]) -> list[Row]:
    """One process each, all at once; what each told, in the order of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(ROOT / "benchmarks/training_rank.py")
    places = [one | {"index": index, "size": len(orders), "port": port} for index, one in enumerate(orders)]
    processes = [begin([script, json.dumps(place)]) for place in places]
    return [told(process) for process in processes]


def in_process(arguments: Sequence[str]) -> Row:
    """Run Python and take the JSON of its last line."""
    return told(begin(arguments))


def begin(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment)


def told(process: subprocess.Popen[str]) -> Row:
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err[-3000:])
    return dict(json.loads(out.splitlines()[-1]))


def median(values: Any) -> float:
    return statistics.median(list(values))


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def show(rows: Sequence[Row]) -> None:
    """Rows as a table; what no row has gets no column."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    lines = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> str:
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = f"{os.cpu_count()} cores, {platform.machine()}, {THREADS} torch thread, load {os.getloadavg()[0]:.0f}"
    return f"{cores}, {chip}, torch {torch.__version__}"


PARTS = {"speed": speed, "start": start, "methods": methods, "gang": gang, "zero": zero, "gpu": gpu}


def main() -> None:
    """Measure, print, write. Parts that were not run keep the figures they had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "start-once"], metavar="PART")
    parser.add_argument("--dry-run-gpu", action="store_true", help="tiny shapes on the CPU, nothing is written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    if arguments.parts == ["start-once"]:
        print(json.dumps(start_once()))
        return
    for name in arguments.parts or (["gpu"] if arguments.dry_run_gpu else PARTS):
        print(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        started = time.perf_counter()
        figures = PARTS[name](arguments)
        say(f"{time.perf_counter() - started:.0f} s")
        if figures and not arguments.dry_run_gpu:
            result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
            result[name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **figures}
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not arguments.dry_run_gpu:
        print(f"written to {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
