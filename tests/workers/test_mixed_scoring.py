"""Tasks that are scored together have the scores that each has alone, row by row, ties and broken neighbours or not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store import SubspaceStore
from subspace_store.adapter import SIZED
from tests.subspace_store.builders import fresh_storage, merged, random_adapter
from tests.workers.serving.sites import TEXTS, Site, site
from tests.workers.worker_builders import random_head, sentiment_task
from workers import mixed_scoring
from workers.base_model import BaseModel
from workers.evaluation import Score, score_adapter
from workers.mixed_scoring import Scored, score_together
from workers.rows.task_data import TextRow
from workers.trainer import Cancelled

SHAPES = {"bert.encoder.layer.0.attention.self.query": (32, 32)}


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], BaseModel]) -> Site:
    return site(tiny("bert"), "sequence_classification", ["query"])


def rows_of(spec: TaskSpec, count: int = 23) -> list[TextRow]:
    labels = len(spec.data.label_names)
    draw = random.Random(count)
    words = " ".join(TEXTS).split()
    texts = (" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(count))
    return [TextRow(text, None, draw.randrange(labels)) for text in texts]


def tasks_of(made: Site) -> list[Scored]:
    return [Scored(task, spec, rows_of(spec, 9 + place)) for place, (task, spec) in enumerate(made.specs.items())]


def alone(made: Site, task: Scored) -> Score:
    return score_adapter(made.base, made.store.adapter(task.task_id, made.version), task.rows, task.spec)


def test_each_score_and_each_row_of_it_is_that_of_the_tasks_own_model(made: Site) -> None:
    tasks = tasks_of(made)
    found = score_together(made.base, made.store, made.version, tasks)
    assert len(tasks) == len(found) == 9
    for task in tasks:
        score, expected = found[task.task_id], alone(made, task)
        assert isinstance(score, Score)
        assert (score.value, score.per_row, score.count) == (expected.value, expected.per_row, len(task.rows))
        assert score.warnings == expected.warnings
        for name, value in expected.metrics.items():
            assert score.metrics[name] == pytest.approx(value, abs=1e-5 if name.startswith("probability") else 0)
    assert len({score.value for score in found.values() if isinstance(score, Score)}) > 3  # the tasks differ


def tied(tiny: Callable[[str], BaseModel]) -> Site:
    """A task whose two labels are the same but for rounding, and one beside it."""
    base = tiny("bert")
    store, specs = SubspaceStore.open(fresh_storage(), base_model=base.name, writer="test"), {}
    for number, name in enumerate(("tied", "other")):
        head = random_head(base.heads["sequence_classification"], 2, number)
        if name == "tied":
            for key, tensor in head.items():
                if len(tensor) == 2:
                    head[key] = torch.stack([tensor[0], tensor[0] * (1 + 1e-7)])
        made = replace(random_adapter(number, 2, SHAPES, 0.4), base_model=base.name, head=head, info={SIZED: "score"})
        version = merged(store, {name: made})
        specs[name] = sentiment_task()
    return Site(base, store, specs, version.number)


def test_where_rounding_could_decide_the_tasks_own_model_answers(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tied(tiny)
    tasks = [Scored(name, spec, rows_of(spec, 200)) for name, spec in made.specs.items()]
    expected = alone(made, tasks[0])
    assert 20 < sum(expected.per_row) < 180  # rounding decides, both ways
    found = score_together(made.base, made.store, made.version, tasks)["tied"]
    assert isinstance(found, Score)
    assert found.per_row == expected.per_row
    monkeypatch.setattr(mixed_scoring, "TIE", -1.0)
    unheeded = score_together(made.base, made.store, made.version, tasks)["tied"]
    assert isinstance(unheeded, Score)
    assert unheeded.per_row != expected.per_row  # what would happen without it


def test_a_task_whose_outputs_are_no_numbers_fails_and_its_neighbours_are_scored(made: Site) -> None:
    store = SubspaceStore.open(fresh_storage(), base_model=made.base.name, writer="test")
    for number, name in enumerate(("well", "broken")):
        head = random_head(made.base.heads["sequence_classification"], 2, number)
        if name == "broken":  # their sum is more than float32 has
            head = {key: 3e38 * tensor.sign() for key, tensor in head.items()}
        adapter = replace(
            random_adapter(number, 2, SHAPES), base_model=made.base.name, head=head, info={SIZED: "score"}
        )
        version = merged(store, {name: adapter}).number
    tasks = [Scored(name, sentiment_task(), rows_of(sentiment_task())) for name in ("broken", "well", "nobody")]
    found = score_together(made.base, store, version, tasks)
    assert isinstance(found["well"], Score)
    assert isinstance(found["broken"], InvalidInput)
    assert "the model's output is no number" in str(found["broken"])
    assert "nobody" in str(found["nobody"])


def test_what_asks_to_stop_is_asked_before_every_batch(made: Site) -> None:
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        score_together(made.base, made.store, made.version, tasks_of(made), stop)
