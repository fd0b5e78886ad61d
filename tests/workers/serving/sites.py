"""Stores with tasks of one base model, each with its update in another place, for tests of what answers for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from configs.settings import SubspaceSettings
from configs.task_spec import Kind, TaskSpec
from subspace_store import Adapter, SubspaceStore
from subspace_store.adapter import SIZED, ModuleUpdate
from subspace_store.merging.subspace_math import weighted_sum
from tests.subspace_store.builders import foundation_adapter, fresh_storage, merged, random_adapter, trained_in
from tests.workers.worker_builders import random_head, task_of_kind
from workers.base_model import BaseModel
from workers.evaluation import adapted_model
from workers.features import collator
from workers.rows.reading import READING, reading_of
from workers.rows.task_data import Row
from workers.serving.mixed_batch import Asked, MixedBatch
from workers.serving.question import Answer

TEXTS = (
    "The capital of France is Paris.",
    "The colour of grass is green.",
    "Paris",
    "is the grass of France green?",
    "of of of of",
)
DIRECTIONS = 5
"""Of both bases: what has no room there is private."""


@dataclass(frozen=True)
class Site:
    """A store with tasks of one base model, each with its update in another place."""

    base: BaseModel
    store: SubspaceStore
    specs: Mapping[str, TaskSpec]
    version: int

    def answers(self, asked: Sequence[tuple[str, Row]], version: int | None = None) -> list[Answer]:
        batch = mixed(self, version=self.version if version is None else version)
        return batch.answer([Asked(task, row) for task, row in asked])

    def alone(self, task: str, rows: Sequence[Row]) -> torch.Tensor:
        """Outputs of the task's exported adapter in PEFT's layers."""
        model = adapted_model(self.base, self.store.adapter(task, self.version), self.specs[task]).eval()
        batch = collator(self.base, self.specs[task])(rows)
        batch.pop("labels")
        with torch.inference_mode():
            return model(**batch).logits  # type: ignore[no-any-return]


def mixed(
    made: Site, specs: Mapping[str, TaskSpec] | None = None, version: int | None = None, **args: int
) -> MixedBatch:
    known = made.specs if specs is None else specs
    return MixedBatch(made.base, made.store, version or made.version, lambda parts: known[parts.task_id], **args)


def site(base: BaseModel, kind: Kind, targets: Sequence[str], **data: object) -> Site:
    """Tasks whose updates lie in the first basis (and partly in a private part), in the renewed one, in the foundation,
    and in a private part alone."""
    settings = SubspaceSettings(rank_max=DIRECTIONS, seed_directions=DIRECTIONS, renew_tasks=4)
    store = SubspaceStore.open(fresh_storage(), settings=settings, base_model=base.name, writer="test")
    shapes = {n: s for n, s in base.module_shapes(kind).items() if n.endswith(tuple(targets))}
    specs: dict[str, TaskSpec] = {}

    def merge(task: str, modules: Mapping[str, ModuleUpdate], labels: int) -> None:
        spec = task_of_kind(kind, [f"{task}-{n}" for n in range(labels)])
        specs[task] = spec.model_copy(update={"data": spec.data.model_copy(update=data)})
        head = random_head(base.heads[kind], 1 if kind == "sequence_regression" else labels, len(specs))
        facts = {SIZED: "score", "fan_in_fan_out": json.dumps(bool(base.stores_transposed))}
        facts[READING] = reading_of(specs[task])
        version = merged(store, {task: Adapter(base.name, "", modules, head, facts)})
        store.publish(version.number, op_key=f"publish {task}", actor="test")

    for number in range(4):
        merge(f"seed-{number}", random_adapter(number, 2 + number % 2, shapes, 0.4).modules, 2 + number % 2)
    bases = store.training_basis(4)
    for number in range(2):
        merge(f"renewed-{number}", trained_in(bases, 50 + number).modules, 3)
    inside, beside = trained_in(store.basis(4), 60).modules, random_adapter(61, 1, shapes).modules
    merge("partly", {name: weighted_sum([inside[name], beside[name]], [2.0, 0.2]) for name in shapes}, 2)
    merge("foundation", foundation_adapter(70, directions=4, shapes=shapes).modules, 2)
    merge("private", random_adapter(77, 1, shapes, 0.4).modules, 2)
    return Site(base, store, specs, store.state.refs["candidate"])
