"""The figures of the subspace store: `make bench-store`. Prints tables and writes benchmarks/results/store.json.

python benchmarks/store.py [PART …] [--data FOLDER] [--adapters FOLDER]

    speed     the T-th merge against the full SVD of all reconstructions and against vlora, and the error of all tasks
    flat      whole commits with 10 and with 1,000 tasks in the subspace, in turns
    large     one merge at the shapes of a 7B Llama: seconds, and peak memory of a process that does nothing else
    latency   commits and loading one task, on a folder and on S3 servers
    basis     whole bases against differences (benchmarks/basis_delta.py)
    accuracy  what merging costs real tasks (benchmarks/real_adapters.py)

Without parts: all of them. Every part says what it left out. ONEBASIS_BENCH_S3=s3://BUCKET/PREFIX,http://HOST:PORT adds
a server to `latency`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests/moto_server.py

import torch  # noqa: E402

from benchmarks.contestants import (  # noqa: E402
    Contestant,
    Factors,
    FullSvd,
    Ours,
    Vlora,
    best_fixed_subspace,
    copied,
    errors,
    leading_by_gram,
    leading_by_svd,
)
from configs.settings import StorageSettings, SubspaceSettings  # noqa: E402
from subspace_store import (  # noqa: E402
    Adapter,
    ModuleUpdate,
    StagedAdapter,
    Storage,
    SubspaceReader,
    SubspaceStore,
    Version,
    canonical_update,
    open_storage,
)
from subspace_store.merging.merge import merge_adapters  # noqa: E402

RESULT = ROOT / "benchmarks/results/store.json"
THREADS = 2
Row = dict[str, Any]


# speed: one module 768×768, r = 8, k = 32

WIDTH, RANK, K = 768, 8, 32
SHARED, OWN = 24, 0.05
"""Directions that all tasks share, and the size of what each has for itself."""
COUNTS = (8, 64, 256)
MODULES = 12
"""Of the whole model."""
LAST = 9
"""Merges up to and including the T-th of which our time is the median."""
ONE_BY_ONE_MAX = 64
"""Up to this T the full SVDs are run one by one; beyond, they take over our state and make the T-th merge only."""


def speed(_: argparse.Namespace) -> Row:
    """Seconds of the T-th merge and of all merges up to it; error of ΔW of all tasks afterwards."""
    adapters = [random_factors(seed, WIDTH, RANK) for seed in range(max(COUNTS))]
    square = (WIDTH, WIDTH)
    rows = [*one_by_one("ours", Ours(square, K), adapters), *whole_commits(adapters)]
    rows += one_by_one("ours, energy weights", Ours(square, K, weighting="energy"), adapters)
    rows += one_by_one("paper's form", Ours(square, K, variant="paper"), adapters)
    for name, leading in (("full SVD", leading_by_svd), ("eigh of Gram", leading_by_gram)):
        rows += one_by_one(name, FullSvd(K, leading), adapters[:ONE_BY_ONE_MAX])
        rows += taken_over(name, leading, adapters)
    if importlib.util.find_spec("vlora"):
        for method in ("absorb", "absorb_incremental"):
            rows += one_by_one(f"vlora {method}", Vlora(K, method), adapters)
    else:
        say("vlora is not installed (make bench-store installs it): left out")
    for count in COUNTS:
        rows += best_subspaces(adapters[:count])
        rows.append({"T": count, "what": "separate LoRAs", "stored_numbers": 2 * WIDTH * RANK * count})
    rows = [row | compared(row, rows) for row in sorted(rows, key=lambda row: int(row["T"]))]
    show(rows)
    wide = [random_factors(seed, WIDTH, RANK, shared=2 * K) for seed in range(COUNTS[1])]
    tight = [
        *one_by_one("ours", Ours(square, K), wide),
        *one_by_one("paper's form", Ours(square, K, variant="paper"), wide),
    ]
    tight = [row for row in [*tight, *best_subspaces(wide)] if row["T"] == len(wide)]
    tight = [row | compared(row, tight) for row in tight]
    say(f"the same with {2 * K} shared directions, twice as many as are kept:")
    show(tight)
    models = whole_models(adapters)
    say(f"a whole model of {MODULES} such modules, each contestant with both cores:")
    show(models)
    shape = f"1 module {WIDTH}×{WIDTH}, r = {RANK}, k = {K}, synthetic, {SHARED} shared directions"
    return {"shape": shape, "rows": rows, "twice_as_many_shared_directions": tight, "whole_model": models}


def whole_models(adapters: Sequence[Factors]) -> list[Row]:
    """The T-th merge of a model of many modules: ours as the store does it, modules in threads; the others one module
    after another with as many BLAS threads. All modules are alike, which no contestant can make use of."""
    rows: list[Row] = []
    ours = Ours((WIDTH, WIDTH), K)
    vlora = Vlora(K, "absorb") if importlib.util.find_spec("vlora") else None
    for count, factors in enumerate(adapters, start=1):
        if count in COUNTS[1:]:
            full: list[Contestant] = [FullSvd(K) for _ in range(MODULES)]
            for other in full:
                other.take_over(ours)  # type: ignore[attr-defined]
            contestants = {"full SVD": full} | ({"vlora absorb": [copied(vlora) for _ in full]} if vlora else {})
            seconds = {"ours": _our_model_seconds(ours, factors)}
            for what, modules in contestants.items():
                seconds[what] = sum(absorbing(module, factors) for module in modules)
            rows += [
                {"T": count, "what": what, "merge_seconds": value, "times_ours": value / seconds["ours"]}
                for what, value in seconds.items()
            ]
        ours.absorb(factors)
        if vlora is not None:
            vlora.absorb(factors)
    return rows


def _our_model_seconds(ours: Ours, factors: Factors) -> float:
    update = canonical_update(factors.b_NR, factors.a_RD, 1.0)
    modules = {f"m{number}": ours.module for number in range(MODULES)}
    adapter = Adapter("bench", "", dict.fromkeys(modules, update))
    seconds = []
    for _ in range(LAST):
        started = time.perf_counter()
        merge_adapters(modules, {"new": adapter}, ours.settings)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def one_by_one(name: str, contestant: Contestant, adapters: Sequence[Factors]) -> Iterator[Row]:
    """Merge all adapters; at every count, what the last merge took and what is left of all tasks."""
    seconds = []
    for count, factors in enumerate(adapters, start=1):
        # Ours is so short that its neighbours are needed; who recomputes everything does the same three times.
        copies = [copied(contestant) for _ in range(2)] if count in COUNTS and not isinstance(contestant, Ours) else []
        again = [absorbing(other, factors) for other in copies]
        seconds.append(absorbing(contestant, factors))
        if count not in COUNTS:
            continue
        found = errors(contestant, adapters[:count])
        yield {
            "T": count,
            "what": name,
            "merge_seconds": statistics.median([seconds[-1], *again] if again else seconds[-LAST:]),
            "total_seconds": sum(seconds),
            "mean_error": statistics.fmean(found),
            "worst_error": max(found),
            "stored_numbers": contestant.stored_numbers,
        }


def absorbing(contestant: Contestant, factors: Factors) -> float:
    started = time.perf_counter()
    contestant.absorb(factors)
    return time.perf_counter() - started


def taken_over(name: str, leading: Callable[[Any, int], Any], adapters: Sequence[Factors]) -> Iterator[Row]:
    ours = Ours((WIDTH, WIDTH), K)
    for count, factors in enumerate(adapters, start=1):
        if count in COUNTS and count > ONE_BY_ONE_MAX:
            seconds = []
            for _ in range(3):
                other = FullSvd(K, leading)
                other.take_over(ours)
                seconds.append(absorbing(other, factors))
            found = errors(other, adapters[:count])
            row = {"T": count, "what": name, "merge_seconds": statistics.median(seconds)}
            yield row | {"mean_error": statistics.fmean(found), "worst_error": max(found)}
        ours.absorb(factors)


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """How much longer than ours, and how much more error than the best fixed subspace, at the same T."""
    same = {other["what"]: other for other in rows if other["T"] == row["T"]}
    ratios = {}
    if "merge_seconds" in row:
        ratios["times_ours"] = row["merge_seconds"] / same["ours"]["merge_seconds"]
    if "mean_error" in row:
        ratios["error_to_hosvd"] = row["mean_error"] / same["HOSVD at once"]["mean_error"]
    return ratios


def best_subspaces(adapters: Sequence[Factors]) -> Iterator[Row]:
    """Nobody who sees adapters one by one can know these: they need all originals."""
    for name, iterations in (("HOSVD at once", 0), ("HOOI, 5 iterations", 5)):
        found = best_fixed_subspace(adapters, K, iterations)
        row = {"T": len(adapters), "what": name, "mean_error": statistics.fmean(found), "worst_error": max(found)}
        yield row | {"stored_numbers": 2 * K * (WIDTH + RANK * len(adapters))}


def whole_commits(adapters: Sequence[Factors]) -> Iterator[Row]:
    with folder_store(SubspaceSettings(rank_fixed=K)) as store:
        seconds = []
        for count, factors in enumerate(adapters, start=1):
            adapter = Adapter("bench", "", {"m": canonical_update(factors.b_NR, factors.a_RD, 1.0)})
            seconds.append(commit(store, f"t{count}", adapter)[0])
            if count in COUNTS:
                median, total = statistics.median(seconds[-LAST:]), sum(seconds)
                yield {"T": count, "what": "ours, whole commit", "merge_seconds": median, "total_seconds": total}


def random_factors(seed: int, width: int, rank: int, module: int = 0, shared: int = SHARED) -> Factors:
    """A LoRA whose update lies in directions that all tasks share, the last half as strong as the first, but for a
    part of its own. As training leaves it, A's rows are equally long and B's columns fall, here by ten."""
    common, own = (torch.Generator().manual_seed(s) for s in (module, 10**6 + 1000 * seed + module))
    strength = torch.logspace(0, -0.3, shared)
    left, right = (torch.randn(width, shared, generator=common) * strength for _ in range(2))
    b = left @ torch.randn(shared, rank, generator=own) / shared**0.5 + OWN * torch.randn(width, rank, generator=own)
    a = right @ torch.randn(shared, rank, generator=own) / shared**0.5 + OWN * torch.randn(width, rank, generator=own)
    return Factors(b * torch.logspace(0, -1, rank), a.T / width**0.5)


# flat: 12 modules 384×384, r = 8, k = 32

SMALL_WIDTH, SMALL_MODULES = 384, 12
FEW, MANY, TURNS = 10, 1000, 15


def flat(_: argparse.Namespace) -> Row:
    """Merges with few and with many tasks in the subspace, in turns, so that both see the same machine."""
    with folder_store(SubspaceSettings(rank_fixed=K)) as few, folder_store(SubspaceSettings(rank_fixed=K)) as many:
        started = time.perf_counter()
        torch.set_num_threads(1)
        for store, count in ((few, FEW), (many, MANY)):
            for number in range(count):
                commit(store, f"t{number}", small_adapter(number))
        torch.set_num_threads(THREADS)
        say(f"filled with {FEW} and {MANY} tasks, one by one, in {time.perf_counter() - started:.0f} s")
        measured: dict[int, list[Row]] = {FEW: [], MANY: []}
        for turn in range(TURNS):
            adapter = small_adapter(10**4 + turn)
            for store, count in ((few, FEW), (many, MANY)):
                seconds, version = commit(store, f"turn{turn}", adapter)
                measured[count].append(
                    {
                        "commit_seconds": seconds,
                        "mathematics_seconds": version.merge_seconds,
                        "bytes": version.bytes_written,
                        "log_record_bytes": record_bytes(store),
                    }
                )
    rows = [{"T": count, **medians(found)} for count, found in measured.items()]
    rows.append({"T": "ratio", **{key: rows[1][key] / rows[0][key] for key in rows[0] if key != "T"}})
    show(rows)
    shape = f"{SMALL_MODULES} modules {SMALL_WIDTH}×{SMALL_WIDTH}, r = {RANK}, k = {K}, folder"
    return {"shape": shape, "merges": TURNS, "rows": rows}


def small_adapter(seed: int) -> Adapter:
    modules = {}
    for module in range(SMALL_MODULES):
        factors = random_factors(seed, SMALL_WIDTH, RANK, module)
        modules[f"layer.{module}"] = canonical_update(factors.b_NR, factors.a_RD, 1.0)
    return Adapter("bench", "", modules)


def record_bytes(store: SubspaceStore) -> int:
    """Size of the log's last record."""
    folder = Path(store.storage.url.removeprefix("file:"))
    return max(folder.rglob("log/0*.json")).stat().st_size


# large: Llama 7B, all linear layers

LAYERS, LARGE_RANK, LARGE_K = 32, 16, 64
LLAMA = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}


def large(arguments: argparse.Namespace) -> Row:
    """Fill the subspace to k directions with one group, then one more merge, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        if shutil.disk_usage(folder).free < 8 * 2**30:
            say("less than 8 GiB free: left out")
            return {"left_out": "less than 8 GiB free"}
        filled = in_process("large-fill", folder)
        merged = in_process("large-merge", folder)
    row = {
        "modules": merged["modules"],
        "commit_seconds": merged["commit_seconds"],
        "mathematics_seconds": merged["mathematics_seconds"],
        "peak_gib": merged["peak_gib"],
        "bytes_gb": merged["bytes"] / 1e9,
        "adapter_gb": merged["adapter_gb"],
        "filling_seconds": filled["commit_seconds"],
        "filling_peak_gib": filled["peak_gib"],
    }
    show([row])
    shape = f"{merged['modules']} modules of a 7B Llama, r = {LARGE_RANK}, k = {merged['k']}, folder"
    return {"shape": shape, "row": row}


def in_process(step: str, folder: str) -> Row:
    command = [sys.executable, __file__, step, "--scratch", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def large_fill(arguments: argparse.Namespace) -> Row:
    """The subspace before: one group that fills all k directions; and the adapter that the next process merges."""
    store = open_store(f"file:{arguments.scratch}", SubspaceSettings(rank_max=LARGE_K))
    group = {f"t{number}": large_adapter(number) for number in range(LARGE_K // LARGE_RANK)}
    uploads = [upload(store, task, adapter) for task, adapter in group.items()]
    del group
    started = time.perf_counter()
    store.merge(uploads, op_key="fill", actor="bench")
    seconds = time.perf_counter() - started
    one = upload(store, "one", large_adapter(99))
    (Path(arguments.scratch) / "one.json").write_text(json.dumps([one.key, one.sha256, one_gb(store, one)]))
    return {"commit_seconds": seconds, "peak_gib": peak_gib()}


def large_merge(arguments: argparse.Namespace) -> Row:
    key, sha256, adapter_gb = json.loads((Path(arguments.scratch) / "one.json").read_text())
    store = open_store(f"file:{arguments.scratch}", SubspaceSettings(rank_max=LARGE_K))
    started = time.perf_counter()
    version = store.merge(
        [StagedAdapter(task_id="one", name="bench/one", key=key, sha256=sha256)], op_key="one", actor="bench"
    )
    return {
        "commit_seconds": time.perf_counter() - started,
        "mathematics_seconds": version.merge_seconds,
        "peak_gib": peak_gib(),
        "bytes": version.bytes_written,
        "modules": version.module_count,
        "k": version.rank_max,
        "adapter_gb": adapter_gb,
    }


def large_adapter(seed: int) -> Adapter:
    """Random directions of slowly falling strength, so that every direction counts."""
    generator = torch.Generator().manual_seed(seed)
    sigma_R = torch.logspace(0, -0.5, LARGE_RANK)
    modules = {}
    for layer in range(LAYERS):
        for name, (n, d) in LLAMA.items():
            u_NR, v_DR = (torch.linalg.qr(torch.randn(size, LARGE_RANK, generator=generator)).Q for size in (n, d))
            modules[f"model.layers.{layer}.{name}"] = ModuleUpdate(
                u_NR.contiguous(), sigma_R.clone(), v_DR.contiguous()
            )
    return Adapter("bench", "", modules)


def one_gb(store: SubspaceStore, staged: StagedAdapter) -> float:
    return len(store.storage.read(staged.key)) / 1e9


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


# latency: 12 modules 384×384 again, on a folder and on servers

LATENCY_COUNTS = (64, 256)
COMMITS, LOADS = 20, 5


def latency(_: argparse.Namespace) -> Row:
    """Commits one after another, and one task read by a reader that knows nothing yet."""
    rows = []
    with ExitStack() as stack:
        places = {"folder": StorageSettings(url=f"file:{stack.enter_context(tempfile.TemporaryDirectory())}")}
        places["S3 (moto, loopback)"] = stack.enter_context(moto())
        named = os.environ.get("ONEBASIS_BENCH_S3")
        if named:
            url, _, endpoint = named.partition(",")
            places[f"S3 ({endpoint or 'AWS'})"] = StorageSettings(
                url=f"{url}/{time.time_ns()}", endpoint_url=endpoint or None
            )
        else:
            say("ONEBASIS_BENCH_S3 is not set: no other S3 server than moto")
        # Filled once on a folder and copied: merging there takes less time than on a server.
        source = stack.enter_context(folder_store(SubspaceSettings(rank_fixed=K)))
        merged = 0
        for count in LATENCY_COUNTS:
            for number in range(merged, count):
                commit(source, f"t{number}", small_adapter(number))
            merged = count
            for name, place in places.items():
                here = place.model_copy(update={"url": f"{place.url}/{count}"})
                copy_store(source.storage, open_storage(here))
                rows.append({"T": count, "storage": name, **loads(here), **commits(here)})
    show(rows)
    shape = f"{SMALL_MODULES} modules {SMALL_WIDTH}×{SMALL_WIDTH}, r = {RANK}, k = {K}"
    return {"shape": shape, "commits": COMMITS, "loads": LOADS, "rows": rows}


@contextmanager
def moto() -> Iterator[StorageSettings]:
    from tests.moto_server import CREDENTIALS, moto_server

    kept = dict(os.environ)
    with moto_server("bench") as endpoint:
        if not os.environ.get("ONEBASIS_BENCH_S3"):
            os.environ.update(CREDENTIALS)
        try:
            yield StorageSettings(url="s3://bench/store", endpoint_url=endpoint, region="us-east-1")
        finally:
            os.environ.clear()
            os.environ.update(kept)


def copy_store(source: Storage, target: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: target.write(key, source.read(key)), source.keys("")))


def loads(place: StorageSettings) -> Row:
    """The oldest task: it has the most transports behind it."""
    opening, loading = [], []
    for _ in range(LOADS):
        started = time.perf_counter()
        reader = SubspaceReader.open(open_storage(place), base_model="bench")
        opened = time.perf_counter()
        reader.adapter("t0", max(reader.state.versions))
        opening.append(opened - started)
        loading.append(time.perf_counter() - opened)
    return {"open_seconds": statistics.median(opening), "load_task_seconds": statistics.median(loading)}


def commits(place: StorageSettings) -> Row:
    store = open_store(place, SubspaceSettings(rank_fixed=K))
    found = [commit(store, f"commit{number}", small_adapter(10**4 + number)) for number in range(COMMITS)]
    seconds = sorted(seconds for seconds, _ in found)
    return {
        "commit_seconds": statistics.median(seconds),
        "commit_seconds_worst": seconds[-1],
        "bytes": statistics.median(version.bytes_written for _, version in found),
    }


# What all parts use


@contextmanager
def folder_store(settings: SubspaceSettings) -> Iterator[SubspaceStore]:
    with tempfile.TemporaryDirectory() as folder:
        yield open_store(f"file:{folder}", settings)


def open_store(place: str | StorageSettings, settings: SubspaceSettings) -> SubspaceStore:
    place = StorageSettings(url=place) if isinstance(place, str) else place
    return SubspaceStore.open(open_storage(place, "bench"), settings=settings, base_model="bench", writer="bench")


def upload(store: SubspaceStore, task: str, adapter: Adapter) -> StagedAdapter:
    ref = store.stage(f"staging/{task}.safetensors", adapter)
    return StagedAdapter(task_id=task, name=f"bench/{task}", key=ref.key, sha256=ref.sha256)


def commit(store: SubspaceStore, task: str, adapter: Adapter) -> tuple[float, Version]:
    """Merge one adapter. The time is from the upload that lies there to the version that is in the log."""
    staged = upload(store, task, adapter)
    started = time.perf_counter()
    version = store.merge([staged], op_key=task, actor="bench")
    return time.perf_counter() - started, version


def medians(rows: Sequence[Mapping[str, float]]) -> Row:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def show(rows: Sequence[Row]) -> None:
    """Rows as a table; what a row lacks stays empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(keys))]
    for line in lines:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def accuracy(arguments: argparse.Namespace) -> Row:
    """Error of ΔW and accuracy of adapters trained on real tasks, merged in every way."""
    from benchmarks.real_adapters import measure

    return measure(arguments.data, arguments.adapters, arguments.sets, say, show)


def basis(arguments: argparse.Namespace) -> Row:
    """Whole bases against differences: what a merge would save, what readers would pay."""
    from benchmarks.basis_delta import measure

    figures = measure()
    ways = ("whole", "difference")
    show([{"written as": way, **figures[way]} for way in ways])
    seconds = figures["read_seconds_after_so_many_differences"].items()
    show([{"differences": count, "read_seconds": value} for count, value in seconds])
    return figures


PARTS = {"speed": speed, "flat": flat, "large": large, "basis": basis, "latency": latency, "accuracy": accuracy}
STEPS = {"large-fill": large_fill, "large-merge": large_merge}
"""Run by `large` in processes of their own; they print JSON."""


def main() -> None:
    """Measure, print, write. Parts that were not run keep the figures they had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, *STEPS], metavar="PART")
    parser.add_argument("--data", type=Path, help="folder of text sets for `accuracy`; default: the demo's six tasks")
    parser.add_argument(
        "--adapters", type=Path, default=ROOT / ".onebasis-bench/adapters", help="where trained adapters are kept"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=("one A", "own A"),
        default=("one A", "own A"),
        help="which adapters `accuracy` takes",
    )
    parser.add_argument("--scratch", default=None, help="folder with 8 GiB free for `large`")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.parts and arguments.parts[0] in STEPS:
        print(json.dumps(STEPS[arguments.parts[0]](arguments)))
        return
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name in arguments.parts or PARTS:
        print(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        started = time.perf_counter()
        figures = PARTS[name](arguments)
        result[name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), **figures}
        say(f"{time.perf_counter() - started:.0f} s")
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {THREADS} torch threads, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
