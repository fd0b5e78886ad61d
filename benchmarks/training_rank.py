"""One rank of a gang in a process of its own: `python benchmarks/training_rank.py ORDER`, ORDER a JSON object.

Trains the task and prints, as its last line, how fast it was and what memory it took. A process alone is a gang of one,
and the only way to know what one method takes at most.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from benchmarks import training_runs
from configs.settings import BaseModelSettings
from configs.task_spec import TaskSpec
from workers.base_model import load_base_model
from workers.orders import Rank
from workers.rank_group import joined, listen


def main(order: dict[str, Any]) -> None:
    """Load, train, tell."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(order["threads"])
    base = load_base_model(BaseModelSettings(**order["base_model"]))
    spec = TaskSpec(**order["spec"])
    make = training_runs.completion_rows if spec.kind == "causal_lm" else training_runs.text_rows
    basis = training_runs.random_basis(base, spec.lora.target_modules, order["k"]) if order["k"] else {}
    case = training_runs.Case(base, spec, make(order["rows"]), basis)
    rank = Rank(index=order["index"], size=order["size"], master_address="127.0.0.1", master_port=order["port"])
    if rank.leads:
        listen(rank.master_address, rank.master_port)
    with joined(rank, spec.training.deepspeed) as group:
        run = training_runs.ours(case, training_runs.Clock(spec.training.max_steps), group)
    memory = psutil.Process().memory_full_info()
    told = {
        "samples_per_second": run.samples_per_second,
        "step_seconds": run.step_seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "own_mb": memory.uss / 1e6,
        "gpu_mb": run.gpu_bytes / 1e6,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
