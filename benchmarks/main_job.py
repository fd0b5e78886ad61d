"""The figures of the main job: `make bench`. Prints a table and writes benchmarks/results/main_job.json.

1. Merging: seconds and bytes per merge as the subspace fills, the difference from the full SVD of all
   reconstructions, and the ratio of their times, all in one run.
2. Latency: from `onebasis submit` to the first training step on a warm worker, on a real service.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from configs.settings import StorageSettings, SubspaceSettings
from subspace_store import Adapter, StagedAdapter, SubspaceStore, canonical_update, open_storage

ROOT = Path(__file__).resolve().parents[1]
ONEBASIS = str(Path(sys.executable).with_name("onebasis"))
RESULT = ROOT / "benchmarks/results/main_job.json"

WIDTH, MODULES, RANK = 384, 12, 8  # MiniLM-L6: query and value of six layers
RANK_MAX = 32
TASKS = 64
SUBMISSIONS = 10


def main() -> None:
    """Measure, print, write."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, no GPU",
        "merging": merging(),
        "latency": latency(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


def merging() -> dict[str, Any]:
    """Merge random adapters one by one, and redo each merge as the full SVD of all reconstructions."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(StorageSettings(url=f"file:{folder}"), "bench")
        store = SubspaceStore.open(storage, settings=SubspaceSettings(rank_fixed=RANK_MAX), base_model="b", writer="w")
        adapters: dict[str, Adapter] = {}
        full: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        rows, snapshots = [], 0
        for number in range(1, TASKS + 1):
            task_id = f"t{number:03d}"
            adapters[task_id] = random_adapter()
            blob = store.stage(f"staging/{task_id}.safetensors", adapters[task_id])
            started = time.perf_counter()
            version = store.merge(
                [StagedAdapter(task_id=task_id, name=f"bench/{task_id}", key=blob.key, sha256=blob.sha256)],
                op_key=task_id,
                actor="bench",
            )
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            full_merge(full, adapters, task_id, store.ranks(version.number))
            full_seconds = time.perf_counter() - started
            snapshots += version.snapshot.size_bytes if version.snapshot else 0
            if number in (4, 8, 16, 32, 63):
                difference = max(largest_difference(store, full, adapters, t) for t in adapters)
                rows.append(
                    {
                        "tasks": number,
                        "bytes": version.bytes_written,
                        "log_record_bytes": newest_record_bytes(Path(folder)),
                        "commit_seconds": seconds,
                        "mathematics_seconds": version.merge_seconds,
                        "full_svd_seconds": full_seconds,
                        "times_faster": full_seconds / version.merge_seconds,
                        "largest_relative_difference": difference,
                    }
                )
                print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    # One version in 64 also writes all coefficients anew, so that a reader needs at most 64 transports.
    shape = f"{MODULES} modules {WIDTH}×{WIDTH}, r = {RANK}, k = {RANK_MAX}"
    return {"shape": shape, "rows": rows, "snapshot_bytes_per_merge": snapshots / TASKS}


def random_adapter() -> Adapter:
    """A LoRA of a trained one's shape and spectrum: half of it in directions that all tasks share."""
    modules = {}
    for number in range(MODULES):
        generator = torch.Generator().manual_seed(number)
        shared = torch.randn(WIDTH, RANK, generator=generator), torch.randn(RANK, WIDTH, generator=generator)
        b = shared[0] @ torch.randn(RANK, RANK) / RANK**0.5 + torch.randn(WIDTH, RANK)
        a = torch.randn(RANK, RANK) @ shared[1] / RANK**0.5 + torch.randn(RANK, WIDTH)
        modules[f"layer.{number}"] = canonical_update(b * torch.logspace(0, -1, RANK), a, 1e-3)
    return Adapter("b", "", modules)


def full_merge(full: dict[str, Any], adapters: dict[str, Adapter], new: str, ranks: Any) -> None:
    """Share's merge as the paper writes it: stack all reconstructions and the new adapter, SVD of each side."""
    for module, update in adapters[new].modules.items():
        u, s, v = update.u_NR.double(), update.sigma_R.double(), update.v_DR.double()
        sides = full.setdefault(module, {})
        sides[new] = (u * s / s.norm(), v * s / s.norm())
        kept = []
        for side in (0, 1):
            stack = torch.cat([pair[side] for pair in sides.values()], dim=1)
            basis = torch.linalg.svd(stack, full_matrices=False)[0][:, : ranks[module][side]]
            kept.append([basis @ (basis.T @ pair[side]) for pair in sides.values()])
        full[module] = dict(zip(sides, zip(*kept, strict=True), strict=True))


def largest_difference(store: SubspaceStore, full: dict[str, Any], adapters: dict[str, Adapter], task_id: str) -> float:
    """max over modules of ‖ours − full‖_F / ‖full‖_F of a task's merged update."""
    merged = store.adapter(task_id, max(store.state.versions))
    worst = 0.0
    for module, update in adapters[task_id].modules.items():
        s = update.sigma_R.double()
        x, y = full[module][task_id]
        expected = (x * s.norm()) @ (y * (s.norm() / s)).T
        worst = max(worst, float((merged.modules[module].delta() - expected).norm() / expected.norm()))
    return worst


def newest_record_bytes(folder: Path) -> int:
    """Size of the log's last record: what grows with the tasks, one drift for each."""
    return max(folder.rglob("log/0*.json")).stat().st_size


def latency() -> dict[str, Any]:
    """Submit small tasks one after another to a real service; from submission to the first step, as it records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
        settings["data_roots"] = [str(ROOT / "examples")]
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        started = time.perf_counter()
        onebasis(folder, "up", "--config", "settings.yaml")
        up_seconds = time.perf_counter() - started
        try:
            found = [one_submission(folder, number) for number in range(SUBMISSIONS)]
            taken, typed = (sorted(column) for column in zip(*found, strict=True))
        finally:
            onebasis(folder, "down")
    result = {
        "up_seconds": up_seconds,
        "taken_to_first_step_seconds": {"median": statistics.median(taken), "worst": taken[-1], "n": len(taken)},
        "typed_to_first_step_seconds": {"median": statistics.median(typed), "worst": typed[-1], "n": len(typed)},
    }
    print(json.dumps(result))
    return result


def one_submission(folder: Path, number: int) -> tuple[float, float]:
    """Seconds to the start of the first optimisation step: since the service took the task, since it was typed."""
    document = yaml.safe_load((ROOT / "examples/tasks/card-orders.yaml").read_text())
    document["name"] = f"bench-{number}"
    document["training"]["max_steps"] = 2
    for key in ("train_file", "eval_file"):
        document["data"][key] = str((ROOT / "examples/tasks" / document["data"][key]).resolve())
    (folder / "task.yaml").write_text(yaml.safe_dump(document))
    typed_at = time.time()
    task_id = json.loads(onebasis(folder, "submit", "task.yaml", "--json"))["task_id"]
    while True:
        task = json.loads(onebasis(folder, "task", task_id, "--json"))
        if task["state"] in ("published", "rejected", "parked"):
            taken = float(task["training"]["submit_to_first_step_seconds"])
            return taken, task["submitted_at"] + taken - typed_at
        time.sleep(0.3)


def onebasis(folder: Path, *arguments: str) -> str:
    """Run a command in the folder."""
    return subprocess.run([ONEBASIS, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
