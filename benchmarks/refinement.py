"""What refining is worth where the basis is too small: `make bench-refinement`.

Four of the demo's tasks, one after another, on a real service whose basis may have RANK_MAX directions and no more, so
that every merge takes something from every task. Three times: strictly as merged, each task refined once after its own
merge, and each refined again whenever a merge moved it (`share_full`, which is not strict continual learning).
Prints a table and writes benchmarks/results/refinement.json.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ONEBASIS = str(Path(sys.executable).with_name("onebasis"))
RESULT = ROOT / "benchmarks/results/refinement.json"
RANK_MAX = 12  # the separate adapters have 32 directions
TASKS = ("card-orders", "charges", "top-ups", "account")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "as merged": {},
    "refined once": {"refine_epochs": 1},
    "share_full": {"refine_epochs": 1, "share_full": True},
}


def main() -> None:
    """Measure, print, write."""
    rows = [{"way": way, **run(method)} for way, method in WAYS.items()]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, no GPU",
        "rank_max": RANK_MAX,
        "tasks": TASKS,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")


def run(method: Mapping[str, Any]) -> dict[str, Any]:
    """Start a service, submit one task after another, and read the scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        settings |= {
            "subspace": {"rank_max": RANK_MAX},
            "gate": {"drop_max": 1.0, "merge_gap_max": 1.0},
            "data_roots": [str(ROOT / "examples")],
        }
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        try:
            onebasis(folder, "up", "--config", "settings.yaml")
            for task in TASKS:
                document = yaml.safe_load((ROOT / f"examples/tasks/{task}.yaml").read_text())
                for key in ("train_file", "eval_file"):
                    document["data"][key] = str((ROOT / "examples/tasks" / document["data"][key]).resolve())
                (folder / "task.yaml").write_text(yaml.safe_dump(document | {"method": dict(method)}))
                onebasis(folder, "submit", "task.yaml")
                onebasis(folder, "tasks", "--watch")
            scores = json.loads(onebasis(folder, "scores", "--json"))
        finally:
            onebasis(folder, "down")
    figures = scores["by_version"][-1]
    row = {
        "own_adapters": [task["local"] for task in scores["tasks"]],
        "scores": [cell["score"] for cell in scores["matrix"][-1]],
        "figures": figures,
    }
    print(method or "as merged", *(f"{score:.4f}" for score in row["scores"]), figures, flush=True)
    return row


def onebasis(folder: Path, *arguments: str) -> str:
    done = subprocess.run([ONEBASIS, *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    main()
