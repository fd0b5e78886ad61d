"""One rank of a gang in a process of its own: `python -m tests.workers.rank_process INDEX SIZE FOLDER SOURCE`.

Runs every order in FOLDER/orders.json (name, training section) one after another, as a warm rank does, and writes what
it saw to FOLDER/<name>-<index>.json.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from subspace_store import SubspaceReader
from subspace_store.storage.local import LocalStorage
from tests.workers.worker_builders import mapped_weights, sentiment_task, tiny_settings
from workers.base_model import load_base_model
from workers.orders import Point, Progress, Rank, Train
from workers.rank_group import listen
from workers.trainer import Cancelled, Preempted
from workers.training import train_task


def main(index: int, size: int, folder: Path, source: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = load_base_model(tiny_settings(source))
    storage = LocalStorage(str(folder / "store"))
    store = SubspaceReader.open(storage)
    for wanted in json.loads((folder / "orders.json").read_text()):
        name = wanted["name"]
        points: list[Point] = []
        seen = [0]
        layers: list[str] = []

        def report(progress: Progress, points: list[Point] = points, seen: list[int] = seen) -> None:
            seen[0] = progress.step
            points.extend(line for line in progress.log_lines if isinstance(line, Point))

        def pass_layer(module: Any, *_: Any, layers: list[str] = layers) -> None:
            layers += [type(module).__name__] * type(module).__name__.endswith("DecoderLayer")

        def asked(wanted: Any = wanted, seen: list[int] = seen, layers: list[str] = layers) -> Any:
            if index and len(layers) >= wanted.get("cancel_at_layer", math.inf):  # rank 0 hears of it from rank 1 alone
                return "cancel"
            return "preempt" if seen[0] + 1 >= wanted.get("preempt_at", math.inf) else ""

        task = wanted.get("task", name)
        spec = sentiment_task(**wanted["spec"])
        key = f"staging/{task}/1-{name}/adapter.safetensors"
        order = Train(
            token=name,
            task_id=task,
            attempt=1,
            spec=spec,
            train_key=f"data/{spec.kind}",
            eval_key=f"data/{spec.kind}",
            staging_key=key,
        )
        port = meeting_point(folder / f"{name}.port", index)
        rank = Rank(index=index, size=size, master_address="127.0.0.1", master_port=port)
        passed = torch.nn.modules.module.register_module_forward_hook(pass_layer)
        try:
            trained = train_task(order, base, storage, store, report, asked, rank)
            told = {
                "score": trained.local_score,
                "base_score": trained.base_score,
                "steps": trained.steps,
                "resumed_from": trained.resumed_from,
                "method": trained.method,
                "staging_key": trained.staging_key,
            }
        except Preempted:
            told = {"preempted": True}
        except Cancelled:
            told = {"cancelled_in_step": seen[0] + 1, "layers": len(layers)}
        finally:
            passed.remove()
        told["copied_kilobytes"] = sum(copied for file in mapped_weights(Path(source)).values() for _, copied in file)
        told["imported_deepspeed"] = "deepspeed" in sys.modules
        told["losses"] = [[point.step, point.loss] for point in points]
        (folder / f"{name}-{index}.json").write_text(json.dumps(told))


def meeting_point(file: Path, index: int) -> int:
    """The port at which rank 0 listens: it takes one and tells the others, as a gang does over Ray."""
    if index == 0:
        port = listen("127.0.0.1")
        LocalStorage(str(file.parent)).write(file.name, str(port).encode())  # complete or not there at all
        return port
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(file.read_text())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
