"""What a task keeps that learns again and again: `make bench-revisions`.

Three real tasks whose rows arrive in five portions, each with rows for the gate and test rows of its own. The tasks
share one store; with each portion every task gets its next revision, which is trained on that portion alone, from what
`main` serves, and takes the place of the one before it. Compared are, on the test rows of all portions, by which
nothing is chosen:

* `union`: one training on the rows of all portions together, which a strict service may not do;
* `revisions`: the gate judges each of them on rows of every portion, and `main` keeps what it had where it refuses;
* `without the gate`: the same, and everything is published;
* `newest alone`: a training from the base model on the newest portion.

Each training has EPOCHS passes over its rows. Trainings, merges, scores and verdicts are the service's own code, in
this process. Prints a table and writes part `revisions` of benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.real_adapters import read  # noqa: E402
from benchmarks.real_adapters import tasks as text_tasks  # noqa: E402
from benchmarks.real_streams import base_model  # noqa: E402
from configs.settings import GateSettings  # noqa: E402
from configs.task_spec import TaskSpec, TrainingSpec  # noqa: E402
from orchestrator.judging.gate import judge  # noqa: E402
from orchestrator.judging.score_table import score_table  # noqa: E402
from orchestrator.tasks.task_record import EarlierRows, TaskRecord  # noqa: E402
from subspace_store import Adapter, StagedAdapter, SubspaceStore, adapter_to_bytes  # noqa: E402
from subspace_store.digests import digest  # noqa: E402
from subspace_store.log.version import RowsScore, TaskScore  # noqa: E402
from subspace_store.storage.memory import MemoryStorage  # noqa: E402
from workers.base_model import BaseModel  # noqa: E402
from workers.evaluation import score_adapter  # noqa: E402
from workers.methods import NOTHING, Given, lora  # noqa: E402
from workers.methods.start import with_head_of  # noqa: E402
from workers.rows.task_data import Row  # noqa: E402
from workers.trainer import Surroundings, fit  # noqa: E402

TEXT_SETS = ("trec6", "sst2", "ag-news")
EXAMPLES = ("charges", "top-ups", "card-orders")
PORTIONS, TRAIN_ROWS, GATE_ROWS, TEST_ROWS = 5, 200, 100, 100
"""Rows are of one portion."""
EPOCHS, RATE, MAX_LENGTH = 3.0, 0.003, 32
DRIFT_MIN = 1e-4
GATE = GateSettings()

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A task whose rows arrive in portions."""

    spec: TaskSpec
    train: tuple[tuple[Row, ...], ...]
    gate: tuple[tuple[Row, ...], ...]
    """What the gate judges by: rows of the training file that no training sees."""
    test: tuple[tuple[Row, ...], ...]


def main() -> None:
    """Measure, print, write."""
    from benchmarks import serving  # which measures this, too

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of text sets; default: three tasks of examples/")
    serving.keep({"revisions": measure(parser.parse_args().data)})
    print(f"written to {serving.RESULTS.relative_to(ROOT)}")


def measure(data: Path | None) -> Figures:
    """All ways.

    Args:
        data: Folder of text sets; None: three tasks of examples/.
    """
    torch.set_num_threads(1)
    base, streams = base_model(), list(_streams(data))
    bench = _Bench(base)
    ways: dict[str, list[Figures]] = {way: [] for way in ("union", "revisions", "without the gate", "newest alone")}
    for stream in streams:
        ways["union"].append(bench.alone(stream, [row for part in stream.train for row in part]))
        ways["newest alone"].append(bench.alone(stream, stream.train[-1]))
    ways["revisions"] = bench.revised(streams, with_gate=True)
    ways["without the gate"] = bench.revised(streams, with_gate=False)
    for way, rows in ways.items():
        for row in rows:
            print(f"{way:18} {json.dumps(row)}", flush=True)
    mean = {way: _mean(rows) for way, rows in ways.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, no GPU",
        "data": "examples/" if data is None else "text sets given by --data",
        "portions": PORTIONS,
        "rows_of_a_portion": {
            stream.spec.name: {"train": len(stream.train[0]), "gate": len(stream.gate[0]), "test": len(stream.test[0])}
            for stream in streams
        },
        "tasks": ways,
        "mean": mean,
        "loss_to_union_points": 100 * (mean["union"]["all"] - mean["revisions"]["all"]),
        "earlier_portions_loss_points": 100 * mean["revisions"]["lost_since_new"],
    }


def _streams(data: Path | None) -> Sequence[Stream]:
    """Three tasks of the text sets, or of examples/."""
    found = []
    for name, spec in text_tasks(data).items():
        if spec.name not in (EXAMPLES if data is None else TEXT_SETS):
            continue
        training = TrainingSpec(
            learning_rate=RATE, num_train_epochs=EPOCHS, per_device_train_batch_size=16, warmup_steps=0.1
        )
        short = spec.data.model_copy(update={"max_length": MAX_LENGTH})
        spec = spec.model_copy(update={"training": training, "name": name.replace("_", "-"), "data": short})
        trained = _portions(spec, spec.data.train_file, TRAIN_ROWS + GATE_ROWS)
        split = [len(rows) * TRAIN_ROWS // (TRAIN_ROWS + GATE_ROWS) for rows in trained]
        found.append(
            Stream(
                spec,
                tuple(rows[:count] for rows, count in zip(trained, split, strict=True)),
                tuple(rows[count:] for rows, count in zip(trained, split, strict=True)),
                _portions(spec, spec.data.eval_file, TEST_ROWS),
            )
        )
    return found


def _portions(spec: TaskSpec, file: str | None, count: int) -> tuple[tuple[Row, ...], ...]:
    """Portions of at most so many rows each, in a drawn order, the same every time."""
    rows = list(read(spec, file, 10**6))
    random.Random(0).shuffle(rows)
    count = min(count, len(rows) // PORTIONS)
    return tuple(tuple(rows[place * count : (place + 1) * count]) for place in range(PORTIONS))


class _Bench:
    """Trainings and scores; equal ones are done once."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._trained: dict[str, Adapter] = {}

    def train(self, spec: TaskSpec, rows: Sequence[Row], start: Adapter | None = None) -> Adapter:
        """A LoRA, from the base model or from what is served."""
        key = digest(repr((spec.name, rows)).encode() + (adapter_to_bytes(start) if start else b""))
        if key not in self._trained:
            given = NOTHING if start is None else Given(start=with_head_of(self._base, start, spec))
            model = lora.prepare(self._base, spec, given)
            began = time.monotonic()
            fit(model, self._base, rows, spec, Surroundings())
            self._trained[key] = lora.finish(model, self._base, spec, given)
            print(f"  trained {spec.name} on {len(rows)} rows in {time.monotonic() - began:.0f} s", flush=True)
        return self._trained[key]

    def scores(self, adapter: Adapter, stream: Stream, portions: Sequence[Sequence[Row]]) -> list[float]:
        """The score on the rows of each portion."""
        return [score_adapter(self._base, adapter, rows, stream.spec).value for rows in portions]

    def alone(self, stream: Stream, rows: Sequence[Row]) -> Figures:
        """A training from the base model, not merged."""
        return _figures(stream, self.scores(self.train(stream.spec, rows), stream, stream.test))

    def revised(self, streams: Sequence[Stream], with_gate: bool) -> list[Figures]:
        """All portions of all tasks, one after another, in one store."""
        base = self._base
        store = SubspaceStore.open(
            MemoryStorage(f"revisions-{with_gate}"), base_model=base.name, base_sha256=base.sha256, writer="benchmark"
        )
        live: dict[str, TaskRecord] = {}
        first: dict[str, list[float]] = {stream.spec.name: [] for stream in streams}
        refused: dict[str, list[str]] = {stream.spec.name: [] for stream in streams}
        for portion in range(PORTIONS):
            for stream in streams:
                name = stream.spec.name
                record = self._revision(store, stream, portion, live.get(name))
                served = store.adapter(record.revises) if record.revises else None
                adapter = self.train(stream.spec, stream.train[portion], served)
                seen = slice(portion + 1)
                before = self.scores(served, stream, stream.gate[seen]) if served is not None else []
                record = record.model_copy(update={"main_scores_of_rows": _by_rows(record, before)})
                verdict = self._merged(store, stream, record, adapter, portion, live)
                number = store.state.refs["candidate"]
                if verdict and with_gate:
                    refused[name].append(f"portion {portion + 1}: {verdict}")
                    store.reject(number, verdict, op_key=f"reject:{number}", actor="benchmark")
                else:
                    store.publish(number, op_key=f"publish:{number}", actor="benchmark")
                    live[name] = record
                served = store.adapter(live[name].task_id)
                first[name] += self.scores(served, stream, stream.test[portion : portion + 1])
        rows = []
        for stream in streams:
            name = stream.spec.name
            now = self.scores(store.adapter(live[name].task_id), stream, stream.test)
            lost = statistics.fmean(then - end for then, end in zip(first[name][:-1], now[:-1], strict=True))
            rows.append(_figures(stream, now) | {"lost_since_new": lost, "refused": refused[name]})
        return rows

    def _revision(self, store: SubspaceStore, stream: Stream, portion: int, before: TaskRecord | None) -> TaskRecord:
        name = stream.spec.name
        earlier: tuple[EarlierRows, ...] = ()
        if before is not None:
            # A portion whose revision was refused left no rows that count: it is not there for the gate.
            own = EarlierRows(task_id=before.task_id, number=before.number, eval_key="-", eval_count=0, eval_sha256="")
            earlier = (*before.earlier_rows, own)
        return TaskRecord(
            task_id=f"{name}-{portion}",
            team=stream.spec.team,
            name=name,
            client_key=f"{name}-{portion}",
            spec=stream.spec,
            submitted_at=0.0,
            eval_key="-",
            number=portion + 1,
            revises=before.task_id if before else "",
            earlier_rows=earlier,
        )

    def _merged(
        self,
        store: SubspaceStore,
        stream: Stream,
        record: TaskRecord,
        adapter: Adapter,
        portion: int,
        live: Mapping[str, TaskRecord],
    ) -> str:
        """Merge a revision, record its scores; what the gate says against it, empty where nothing."""
        ref = store.stage(f"staging/{record.task_id}", adapter)
        staged = StagedAdapter(
            task_id=record.task_id, name=record.title, key=ref.key, sha256=ref.sha256, replaces=record.revises or None
        )
        version = store.merge([staged], op_key=f"merge:{record.task_id}", actor="benchmark")
        held = store.adapter(record.task_id, version.number)
        scores = _by_rows(record, self.scores(held, stream, stream.gate[: portion + 1]))
        parts = tuple(
            RowsScore(task_id=task_id, score=score, count=len(stream.gate[0])) for task_id, score in scores.items()
        )
        whole = TaskScore(
            task_id=record.task_id,
            score=statistics.fmean(scores.values()),
            count=len(parts) * len(stream.gate[0]),
            of_rows=parts if record.revises else (),
        )
        store.record_scores(version.number, [whole], op_key=f"scores:{version.number}", actor="benchmark")
        table = score_table(store.state, version.number, DRIFT_MIN)
        known = {one.task_id: one for one in live.values() if one.task_id != record.revises} | {record.task_id: record}
        decision = judge(table, version.number, known, GATE)
        return "" if decision.passed else decision.summary


def _by_rows(record: TaskRecord, scores: Sequence[float]) -> dict[str, float]:
    """Id of the revision that brought test rows to the score on them. A revision's number is its portion's."""
    return {task_id: scores[number - 1] for task_id, number in record.numbers_of_rows.items()} if scores else {}


def _figures(stream: Stream, scores: Sequence[float]) -> Figures:
    return {
        "task": stream.spec.name,
        "all": statistics.fmean(scores),
        "earlier": statistics.fmean(scores[:-1]),
        "newest": scores[-1],
    }


def _mean(rows: Sequence[Figures]) -> Figures:
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    return {key: statistics.fmean(row[key] for row in rows) for key in keys}


if __name__ == "__main__":
    main()
