"""Which real tasks come in which order, with their rows. Reads the folder of text sets that `--data` names."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.real_adapters import read, text_task
from benchmarks.real_streams import Case
from benchmarks.streams.kept import Made
from configs.task_spec import Metric, TrainingSpec

TEN = ("trec6", "cola", "sst2", "stsb", "mrpc", "banking77", "ag_news", "qnli", "mnli", "rte")
ORDERS: Mapping[str, tuple[str, ...]] = {
    "ten": TEN,
    "glue": ("cola", "mrpc", "rte", "stsb", "qnli", "sst2"),
    "four": ("rte", "mrpc", "cola", "sst2"),
    **{f"random-{seed}": tuple(random.Random(seed).sample(TEN, len(TEN))) for seed in (1, 2, 3)},
}
"""`glue` is the order of Share's Table 1 (arXiv:2602.06043), `four` that of arXiv:2603.27707."""
METRICS: Mapping[str, Metric] = {"cola": "matthews_correlation", "stsb": "pearson"}
"""The field's own, where it is not accuracy."""


@dataclass(frozen=True)
class Length:
    """How long each task is trained, and how much of it is read."""

    steps: int = 60
    train_rows: int = 1200
    test_rows: int = 200
    max_length: int = 32
    rows_per_step: int = 16


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they come."""

    name: str
    cases: tuple[Case, ...]
    at_once: int = 1
    """Tasks of one merge."""
    loras: Mapping[str, Made] = field(default_factory=dict)
    """Task to its LoRA, where adapters come and no rows."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tasks are there after each merge."""
        return (*range(self.at_once, len(self.cases), self.at_once), len(self.cases))


def stream(data: Path, name: str, tasks: Sequence[str], seed: int, length: Length) -> Stream:
    """Some text sets of a folder, in this order, each learnt with this seed."""
    return Stream(name, tuple(_case(data, task, seed, length) for task in tasks))


def _case(data: Path, name: str, seed: int, length: Length) -> Case:
    """A text set with its first rows. The learning rate is still to be set."""
    meta, file = data / name / "meta.json", data / name / "train.jsonl.gz"
    if not meta.is_file():
        raise SystemExit(f"{data} has no folder {name} with meta.json: name the folder of the text sets")
    spec = text_task(json.loads(meta.read_text()), file)
    training = TrainingSpec(
        max_steps=length.steps, per_device_train_batch_size=length.rows_per_step, warmup_steps=0.1, seed=seed
    )
    of_data = spec.data.model_copy(update={"max_length": length.max_length})
    spec = spec.model_copy(update={"training": training, "data": of_data, "metric": METRICS.get(name, spec.metric)})
    train, test = spec.data.train_file, spec.data.eval_file
    return Case(spec, read(spec, train, length.train_rows), read(spec, test, length.test_rows))
