"""Which task a text is for: how often that is found, and what routing costs. Part `routing` of benchmarks/serving.py.

    make bench-serving BENCH="routing FOLDER"     ten minutes: ten adapters are trained, FOLDER as in bench-store

Ten tasks without a label in common (`disjoint`: four text sets, and six times eleven of BANKING77's intents), and ten
that overlap (`overlapping`: ten times eleven of its intents, each drawn anew, so that many a text is right in several
tasks). Of each, `ROWS` training rows stand for the evaluation rows that a service has, and as many test rows are
routed, by features of the frozen MiniLM and, of the disjoint tasks, by the energy of their updates in the basis that
they were merged into.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_adapters import read, text_task
from benchmarks.real_streams import Case, _cut, base_model, related
from configs.settings import SubspaceSettings
from configs.task_spec import TrainingSpec
from subspace_store import SubspaceStore
from tests.subspace_store.builders import fresh_storage, merged
from workers.base_model import BaseModel
from workers.methods import lora
from workers.rows.task_data import Row, TextRow
from workers.serving.mixed_batch import Asked, MixedBatch
from workers.serving.routing import TOKENS_MAX, Router, features, sums_of
from workers.trainer import Surroundings, fit

ROWS, STEPS, TASKS = 100, 60, 10


def measure(data: Path) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    base, disjoint, overlapping = base_model(), _disjoint(data), list(related(data, TASKS))
    found: dict[str, Any] = {"rows": ROWS}
    for name, cases in (("disjoint", disjoint), ("overlapping", overlapping)):
        found[name] = {"features": _told(cases, _by_features(base, cases))}
    store = _trained(base, disjoint)
    batch = MixedBatch(base, store, store.state.refs["candidate"], lambda parts: specs[parts.task_id])
    specs = {case.spec.name: case.spec for case in disjoint}
    right = {case.spec.name: _right(batch, case) for case in disjoint}
    ways = {"features": _by_features(base, disjoint), "energy": _by_energy(batch, disjoint)}
    found["disjoint"]["energy"] = _told(disjoint, ways["energy"])
    found["disjoint"]["score_when_told"] = _mean(sum(some) / len(some) for some in right.values())
    for way, chosen in ways.items():
        found["disjoint"][way]["score_when_routed"] = _mean(
            sum(is_right and place == at for is_right, place in zip(right[case.spec.name], chosen[at], strict=True))
            / len(chosen[at])
            for at, case in enumerate(disjoint)
        )
    return found


def _disjoint(data: Path) -> list[Case]:
    cases = []
    for name in ("ag_news", "cola", "sst2", "trec6"):
        meta = json.loads((data / name / "meta.json").read_text())
        spec = text_task(meta, data / name / "train.jsonl.gz")
        cases.append(Case(spec, read(spec, spec.data.train_file, 16 * STEPS), read(spec, spec.data.eval_file, ROWS)))
    meta = json.loads((data / "banking77/meta.json").read_text())
    whole = text_task(meta, data / "banking77/train.jsonl.gz")
    train, test = (read(whole, file, 10**6) for file in (whole.data.train_file, whole.data.eval_file))
    for group in range(TASKS - len(cases)):
        chosen = list(range(11 * group, 11 * group + 11))
        names = tuple(whole.data.label_names[place] for place in chosen)
        spec = whole.model_copy(
            update={"name": f"banking-{group}", "data": whole.data.model_copy(update={"label_names": names})}
        )
        cases.append(Case(spec, _cut(train, chosen), _cut(test, chosen)[:ROWS]))
    return cases


def _texts(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows if isinstance(row, TextRow)]


def _by_features(base: BaseModel, cases: Sequence[Case]) -> list[list[int]]:
    """Of each task's test rows the places of the tasks that were chosen."""
    backbone = getattr(base.task_model(cases[0].spec).eval(), base.prefix)
    known = {case.spec.name: sums_of(features(base, backbone, _texts(case.train[:ROWS]))) for case in cases}
    router = Router(known)
    tests = (_texts(case.test[:ROWS]) for case in cases)
    return [router.scores(features(base, backbone, texts)).argmax(dim=1).tolist() for texts in tests]


def _by_energy(batch: MixedBatch, cases: Sequence[Case]) -> list[list[int]]:
    names, found = [case.spec.name for case in cases], []
    for case in cases:
        texts = _texts(case.test)
        some = [batch.energies(texts[at : at + 25], names, TOKENS_MAX) for at in range(0, len(texts), 25)]
        found.append(torch.cat(some).argmax(dim=1).tolist())
    return found


def _trained(base: BaseModel, cases: Sequence[Case]) -> SubspaceStore:
    """A store with an adapter of each."""
    training = TrainingSpec(learning_rate=2e-3, max_steps=STEPS, per_device_train_batch_size=16)
    store = SubspaceStore.open(fresh_storage(), settings=SubspaceSettings(), base_model=base.name, writer="benchmark")
    for case in cases:
        spec = case.spec.model_copy(update={"training": training})
        model = lora.prepare(base, spec)
        fit(model, base, list(case.train), spec, Surroundings())
        merged(store, {spec.name: replace(lora.finish(model, base, spec), base_sha256="")})
        print(f"trained {spec.name}", flush=True)
    return store


def _right(batch: MixedBatch, case: Case) -> list[bool]:
    """Whether the task answers each of its test rows rightly."""
    answers = batch.answer([Asked(case.spec.name, row) for row in case.test])
    labels = [case.spec.data.label_names[int(row.label)] for row in case.test if isinstance(row, TextRow)]
    return [answer.label == label for answer, label in zip(answers, labels, strict=True)]


def _told(cases: Sequence[Case], chosen: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The confusion table, a line for each task; how often the task was right, or at least one that has the label."""
    names, table, right, has = [case.spec.name for case in cases], [], [], []
    for at, (case, places) in enumerate(zip(cases, chosen, strict=True)):
        table.append([list(places).count(place) for place in range(len(cases))])
        right.append(table[-1][at] / len(places))
        labels = [case.spec.data.label_names[int(row.label)] for row in case.test[:ROWS] if isinstance(row, TextRow)]
        knows = (label in cases[place].spec.data.label_names for label, place in zip(labels, places, strict=True))
        has.append(sum(knows) / len(places))
    return {"accuracy": _mean(right), "has_the_label": _mean(has), "tasks": names, "confusion": table}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
