"""The honest table: `make bench-streams BENCH="--data FOLDER"` writes benchmarks/results/streams/ and docs/quality.md.

    --orders ten,glue      streams of benchmarks/streams/orders.py, one after another; or hundred: adapters only;
                           superni is of the language model that `make smollm2` makes, images and image-text are of
                           those that `make picture-models` makes
    --seeds 0,1,2          seeds of all trainings, of which all rows are done before the next one begins
    --rows separate,auto   rows of benchmarks/streams/ways.py; default: all
    --general-text FILE    text by which it is measured what a language model loses by its tasks
    --adapters FOLDER      the adapters of `hundred`, see benchmarks/streams/hundred.py
    --steps N              optimisation steps of each training; default: see the same file
    --test-rows N          most test rows of each task
    --keep FOLDER          where trained adapters and scores lie: kill it at any moment and start it again
    --all-versions         score every task under every version, not only under its first and the last
    --results FOLDER       one file for each stream, and summary.json; default: benchmarks/results/streams. Learning
                           rates that a file has are not searched for again
    --docs FOLDER          where quality.md gets its tables and plots; default: docs
    --report               write tables, plots and summary.json anew and measure nothing

Trainings, merges and scores are the service's own code, in this process on one thread; the queue and the workers'
processes are left out. Hours on one core: see docs/quality.md for what was run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import picture_models, smollm2  # noqa: E402
from benchmarks.real_streams import base_model, keep  # noqa: E402
from benchmarks.streams import report  # noqa: E402
from benchmarks.streams.hundred import hundred  # noqa: E402
from benchmarks.streams.kept import Kept  # noqa: E402
from benchmarks.streams.orders import GRIDS, LENGTHS, ORDERS, Length, Stream, base_of, of_order, stream  # noqa: E402
from benchmarks.streams.table import figures  # noqa: E402
from benchmarks.streams.ways import WAYS  # noqa: E402
from benchmarks.streams.workshop import Workshop  # noqa: E402
from orchestrator.general_text import beginning_of  # noqa: E402
from workers.base_model import BaseModel  # noqa: E402

REFERENCE = "separate"
BASES: Mapping[str, Callable[[], BaseModel]] = {
    "minilm": base_model,
    "smollm2": smollm2.base_model,
    **{name: partial(picture_models.base_model, name) for name in picture_models.MAKERS},
}


def main(argv: list[str] | None = None) -> None:
    """Measure what is asked for, row by row, and write each as soon as it is known."""
    asked = arguments(argv)
    if not asked.report:
        for seed in asked.seeds:
            for order in asked.orders:
                measure(asked, order, seed)
    report.write(asked.results, asked.docs)


def measure(asked: argparse.Namespace, order: str, seed: int) -> None:
    """All rows of one stream with one seed."""
    of = base_of(order)
    asked_for = {"steps": asked.steps, "test_rows": asked.test_rows}
    length = replace(LENGTHS[of], **{name: count for name, count in asked_for.items() if count is not None})
    grid = stream(asked.data, "grid", of, GRIDS[of], 0, length)
    text = "" if asked.general_text is None else beginning_of(asked.general_text)
    file = asked.results / f"{order}.json"
    base = BASES[of]()
    # Those that are pretrained here may be pretrained anew: what was trained on others is not theirs.
    folder = asked.keep / (f"{of}-{base.sha256[:12]}" if of in picture_models.MAKERS else of)
    shop = Workshop(base, Kept(folder, say), grid, say, text, rates_of(file, length))
    on = hundred(asked.data, asked.adapters) if order == "hundred" else of_order(asked.data, order, seed, length)
    reference = figures(shop, on, WAYS[REFERENCE](shop, on), {}, whole=False)["scores"]
    for name in asked.rows:
        learned = WAYS[name](shop, on)
        found = figures(shop, on, learned, {} if name == REFERENCE else reference, whole=asked.all_versions)
        write(file, seed, name, found, shop, on, length)
        say(
            f"{order} seed {seed} {name}: average {found['average']:.4f}, loss {found['mean_loss_points']:.2f} points, "
            f"forgetting {found['forgetting_points']}, {found['bytes_shared'] + found['bytes_own']:,} bytes"
        )


def rates_of(file: Path, length: Length) -> dict[str, dict[float, float]]:
    """Method to the learning rates that were tried and their scores, as a stream's file has them.

    Raises:
        SystemExit: Its rows are of trainings of another length, beside which no row may be put.
    """
    if not file.is_file():
        return {}
    known = json.loads(file.read_text())
    if known["length"] != vars(length):
        raise SystemExit(
            f"{file} has rows of {known['length']}, not of {vars(length)}: name another folder (--results)"
        )
    return {
        name: {float(rate): score for rate, score in tried.items()} for name, tried in known["learning_rates"].items()
    }


def write(file: Path, seed: int, name: str, found: dict[str, Any], shop: Workshop, on: Stream, length: Length) -> None:
    """Put a row into the stream's file, beside those that are there."""
    known = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "learning_rates": {}}
    known |= {
        "stream": on.name,
        "tasks": [case.spec.name for case in on.cases],
        "metrics": {case.spec.name: case.spec.metric for case in on.cases},
        "test_rows": {case.spec.name: len(case.test) for case in on.cases},
        "length": vars(length),
        "base_model": {"name": base_of(on.name), "sha256": shop.base.sha256},
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, no GPU, one thread",
        "date": time.strftime("%Y-%m-%d"),
    }
    known["learning_rates"] |= {
        method: {str(rate): score for rate, score in scores.items()} for method, scores in shop.rates.items()
    }
    known["rows"].setdefault(name, {})[str(seed)] = found
    file.parent.mkdir(parents=True, exist_ok=True)
    keep(file, (json.dumps(known, indent=1) + "\n").encode())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--general-text", type=Path)
    parser.add_argument("--adapters", type=Path, default=Path(tempfile.gettempdir()) / "onebasis-capacity/related")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "onebasis-streams")
    parser.add_argument("--orders", type=_names((*ORDERS, "hundred")), default=["ten"])
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--rows", type=_names(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--all-versions", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/streams")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args(argv)
    if not asked.report and asked.data is None:
        parser.error("the streams are made of real sets: give their folder with --data")
    return asked


def _names(known: Any) -> Any:
    """Reads names of a list, each of which has to be known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return read


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
