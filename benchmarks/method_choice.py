"""What `auto` decides on real tasks, beside what `lora` and `share` reach there: a part of `training.py methods`.

The tasks are those of examples/. Two are merged, others follow; and one half of a task follows the merge of the other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_runs import METHODS
from configs.task_spec import TaskSpec, read_task_spec
from subspace_store.adapter import Adapter
from subspace_store.log.version import StagedAdapter
from subspace_store.storage.memory import MemoryStorage
from subspace_store.subspace_store import SubspaceStore
from workers.base_model import BaseModel
from workers.evaluation import score_adapter
from workers.methods import Given, auto
from workers.rows.task_data import Row, read_rows
from workers.trainer import Surroundings, fit

TASKS = Path(__file__).resolve().parents[1] / "examples/tasks"
MERGED = ("account", "card-orders")
AFTER = ("top-ups", "charges", "relevance", "contradiction")
TWIN = "top-ups"


def choices(base: BaseModel) -> Iterator[Mapping[str, Any]]:
    """One line for each task, trained with the basis's default of temporary columns."""
    specs = {name: read_task_spec(TASKS / f"{name}.yaml") for name in (*MERGED, *AFTER)}
    train = {name: _rows(spec, spec.data.train_file) for name, spec in specs.items()}
    basis = _merged(base, [_trained(base, specs[name], "lora", train[name]) for name in MERGED], "bench: two tasks")
    for name in AFTER:
        yield {"after": ", ".join(MERGED), "task": name} | _choice(base, specs[name], basis, train[name])
    halves = random.Random(0).sample(train[TWIN], len(train[TWIN]))
    basis = _merged(base, [_trained(base, specs[TWIN], "lora", halves[::2])], "bench: a half")
    for seed in (specs[TWIN].training.seed, 7):  # A starts where the merged one's did, and elsewhere
        training = specs[TWIN].training.model_copy(update={"seed": seed})
        spec = specs[TWIN].model_copy(update={"training": training})
        yield {"after": "its other half", "task": f"{TWIN}, seed {seed}"} | _choice(base, spec, basis, halves[1::2])


def _choice(base: BaseModel, spec: TaskSpec, given: Given, rows: Sequence[Row]) -> dict[str, Any]:
    started = time.perf_counter()
    name, why = auto.choose(base, spec, given, rows, Surroundings())
    seconds = time.perf_counter() - started
    evaluation = _rows(spec, spec.data.eval_file)
    scores = {
        method: score_adapter(base, _trained(base, spec, method, rows, given), evaluation, spec).value
        for method in ("lora", "share")
    }
    return scores | {"auto": name, "tried_out_seconds": seconds, "why": why.partition("because ")[2]}


def _trained(base: BaseModel, spec: TaskSpec, name: str, rows: Sequence[Row], given: Given | None = None) -> Adapter:
    method = METHODS[name]
    started_from = given if given is not None and method.needs_basis(spec) else Given()
    model = method.prepare(base, spec, started_from)
    fit(model, base, rows, spec, Surroundings())
    adapter: Adapter = method.finish(model, base, spec, started_from)
    return adapter


def _merged(base: BaseModel, adapters: Sequence[Adapter], place: str) -> Given:
    """The basis after merging them one by one."""
    store = SubspaceStore.open(MemoryStorage(place), writer="bench", base_model=base.name, base_sha256=base.sha256)
    version = 0
    for number, adapter in enumerate(adapters):
        staged = store.stage(f"staging/{number}/1/adapter.safetensors", adapter)
        arrival = StagedAdapter(task_id=str(number), name=f"bench/{number}", key=staged.key, sha256=staged.sha256)
        version = store.merge([arrival], op_key=str(number), actor="bench").number
    return Given(version=version, basis=store.basis(version))


def _rows(spec: TaskSpec, file: str | None) -> tuple[Row, ...]:
    assert file is not None
    return read_rows(Path(file).read_bytes(), spec, file)
