"""Where a revision is trained from: at what `main` serves, by every method; and what its order reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput
from configs.settings import SubspaceSettings
from configs.task_spec import TaskSpec
from subspace_store import StagedAdapter, SubspaceStore
from subspace_store.adapter import Adapter
from tests.workers.method_builders import logits, train_by_chance
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.evaluation import adapted_model, score_served
from workers.methods import Given, codyra, lora, share
from workers.methods.factors import lora_layers
from workers.methods.start import with_head_of
from workers.orders import Evaluate, Trained
from workers.rows.frozen_rows import open_evaluation_rows
from workers.rows.task_data import TextRow
from workers.trainer import Preempted
from workers.worker import evaluate_version

Tiny = Callable[[str], BaseModel]
TARGETS = {"bert": ("query", "value"), "llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
OLD = "t-old"


def task(architecture: str = "bert", **changes: Any) -> TaskSpec:
    lora_part = {"r": 3, "lora_alpha": 12, "target_modules": TARGETS[architecture]} | changes.pop("lora", {})
    return sentiment_task(lora=lora_part, **changes)


def chance(base: BaseModel, spec: TaskSpec, seed: int, method: Any = lora, given: Given = Given()) -> Adapter:  # noqa: B008
    model = method.prepare(base, spec, given)
    train_by_chance(model, seed)
    adapter: Adapter = method.finish(model, base, spec, given)
    return adapter


def store_of(desk: Desk, base: BaseModel, **adapters: Adapter) -> SubspaceStore:
    """A store with these tasks in `main`, whose basis has room for a part of each: the rest is private."""
    settings = SubspaceSettings(rank_max=4, share="always")
    store = SubspaceStore.open(
        desk.storage, settings=settings, base_model=base.name, base_sha256=base.sha256, writer="test"
    )
    for name, adapter in adapters.items():
        task_id = f"t-{name}"
        ref = store.stage(f"staging/{task_id}", adapter)
        staged = StagedAdapter(task_id=task_id, name=f"red/{name}", key=ref.key, sha256=ref.sha256)
        version = store.merge([staged], op_key=f"merge:{name}", actor="test")
        store.publish(version.number, op_key=f"publish:{name}", actor="test")
    return store


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Desk:
    return Desk(request.node.name)


def start(store: SubspaceStore, base: BaseModel, spec: TaskSpec) -> Given:
    served = store.adapter(OLD)
    return Given(version=2, basis=store.basis_of(OLD), start=with_head_of(base, served, spec))


# --- the methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    ("method", "settings"),
    [(lora, {"name": "lora"}), (codyra, {"name": "codyra"}), (codyra, {"name": "codyra", "gate_start": "normal"}),
     (share, {"name": "share"}), (share, {"name": "share", "temporary_columns": 0})],
)  # fmt: skip
def test_every_method_starts_at_what_main_serves(
    method: Any, settings: dict[str, Any], architecture: str, desk: Desk, tiny: Tiny
) -> None:
    base, spec = tiny(architecture), task(architecture, method=settings)
    other, old = (chance(base, spec, seed) for seed in (1, 2))
    store = store_of(desk, base, other=other, old=old)
    model = method.prepare(base, spec, start(store, base, spec))
    assert torch.allclose(logits(model), logits(adapted_model(base, store.adapter(OLD), spec)), atol=2e-4)
    fresh = method.prepare(base, spec, replace(start(store, base, spec), start=None))
    assert not torch.allclose(logits(model), logits(fresh), atol=1e-2)
    handed = method.finish(model, base, spec, start(store, base, spec))
    for name, update in store.adapter(OLD).modules.items():
        difference = handed.modules[name].delta() - update.delta()
        assert float(difference.norm() / update.delta().norm()) < 1e-4


def test_a_lora_goes_on_with_all_ranks_of_a_revision_that_has_more_than_it_asks_for(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    old = chance(base, task(lora={"r": 6}), 2)
    store = store_of(desk, base, old=old)
    spec = task(lora={"r": 2, "target_modules": ("query", "value", "key")})
    given = start(store, base, spec)
    model = lora.prepare(base, spec, given)
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert ranks == {"query": 6, "value": 6, "key": 2}
    assert torch.allclose(logits(model), logits(adapted_model(base, store.adapter(OLD), task())), atol=2e-4)


def test_the_revisions_of_a_task_do_not_grow_in_rank(desk: Desk, tiny: Tiny) -> None:
    """A private part beside the basis makes none: what is trained has the task's own rank again."""
    base, spec = tiny("bert"), task()
    store = store_of(desk, base, other=chance(base, spec, 1), old=chance(base, spec, 2))
    assert store.state.tasks_at(2)[OLD].private_count > 0
    model = lora.prepare(base, spec, start(store, base, spec))
    assert {layer.r["default"] for layer in lora_layers(model).values()} == {3}


def test_ranks_that_a_served_module_lacks_are_fresh_ones_that_can_be_trained(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    store = store_of(desk, base, old=chance(base, task(lora={"r": 1}), 2))
    for method, name in ((lora, "lora"), (codyra, "codyra")):
        spec = task(method={"name": name})
        model = method.prepare(base, spec, start(store, base, spec))
        for layer in lora_layers(model).values():
            b_NR, a = layer.lora_B["default"].weight, layer.lora_A["default"]
            assert (b_NR.norm(dim=0) > 0).tolist() == [True, False, False]
            assert (a.weight.norm(dim=1) > 0.1).all()
            assert method is lora or a.gates_R.tolist() == [1.0, 1.0, 1.0]


def test_coefficients_in_the_foundation_start_there_and_nowhere_else(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    spec = task(method={"name": "share", "directions": "foundation", "foundation": 8})
    store = store_of(desk, base, old=chance(base, spec, 2, share))
    model = share.prepare(base, spec, start(store, base, spec))
    assert torch.allclose(logits(model), logits(adapted_model(base, store.adapter(OLD), spec)), atol=2e-4)
    handed = share.finish(model, base, spec, start(store, base, spec))
    assert {update.foundation for update in handed.modules.values()} == {8}
    elsewhere = task(method={"name": "share", "directions": "foundation", "foundation": 9})
    with pytest.raises(InvalidInput, match=r"8 directions of the foundation .* method\.foundation is 9"):
        share.prepare(base, elsewhere, start(store, base, elsewhere))


# --- the head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_new_label_gets_a_row_of_the_head_and_the_old_ones_keep_theirs(
    architecture: str, desk: Desk, tiny: Tiny
) -> None:
    base, before = tiny(architecture), task(architecture)
    store = store_of(desk, base, old=chance(base, before, 2))
    spec = task(architecture, data={"label_names": ("neg", "pos", "odd")})
    grown = with_head_of(base, store.adapter(OLD), spec)
    assert grown.label_names == ("neg", "pos", "odd")
    for name in base.heads[spec.kind].outputs:
        assert torch.equal(grown.head[name][:2], store.adapter(OLD).head[name].float())
        assert grown.head[name].shape[0] == 3
    model = lora.prepare(base, spec, start(store, base, spec))
    old = logits(adapted_model(base, store.adapter(OLD), before))
    assert torch.allclose(logits(model)[:, :2], old, atol=2e-4)


@pytest.mark.parametrize("names", [("pos", "neg"), ("neg", "odd", "pos"), ("neg", "odd")])
def test_labels_that_do_not_begin_with_the_old_ones_are_refused(names: tuple[str, ...], desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    store = store_of(desk, base, old=chance(base, task(), 2))
    with pytest.raises(InvalidInput, match="list the labels of the revision before it first"):
        with_head_of(base, store.adapter(OLD), task(data={"label_names": names}))


def test_main_never_answers_with_a_label_that_it_does_not_know(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    store = store_of(desk, base, old=chance(base, task(), 2))
    spec = task(data={"label_names": ("neg", "pos", "odd")}, metric="probability")
    rows = [TextRow("a great film", None, 1), TextRow("an odd film", None, 2)]
    score = score_served(base, store.adapter(OLD), rows, spec, lambda: None)
    assert score.per_row[1] == 0.0
    assert 0 < score.per_row[0] < 1
    # What it says of the labels that it knows is what it said before.
    two = score_served(base, store.adapter(OLD), rows[:1], task(metric="probability"), lambda: None)
    assert score.per_row[0] == pytest.approx(two.per_row[0], abs=1e-6)  # in a batch of another size


# --- the order -----------------------------------------------------------------------------------------------------


def revised(desk: Desk, base: BaseModel, spec: TaskSpec, **changes: Any) -> Trained:
    desk.storage.write("data/old", desk.storage.read("data/eval").replace(b"film", b"play"))
    given = {"task_id": "t-new", "revises": OLD, "earlier_rows": {OLD: "data/old"}}
    return desk.train(base, spec, **given | changes)


@pytest.mark.parametrize("method", ["lora", "share", "codyra", "auto"])
def test_a_revisions_order_is_scored_on_the_rows_of_both(method: str, desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(method={"name": method}, training={"learning_rate": 1e-9})
    store = store_of(desk, base, other=chance(base, spec, 1), old=chance(base, spec, 2))
    trained = revised(desk, base, spec)
    assert (trained.score_count, [*trained.scores_of_rows], [*trained.main_scores_of_rows]) == (
        20,
        [OLD, "t-new"],
        [OLD, "t-new"],
    )
    # Almost nothing was learnt: all is as `main` has it, which another start would not show.
    assert dict(trained.scores_of_rows) == dict(trained.main_scores_of_rows)
    mean = sum(trained.scores_of_rows.values()) / 2
    assert trained.local_score == pytest.approx(mean)
    assert trained.method == ("lora" if method == "auto" else method)
    for name, update in store.adapter(OLD).modules.items():
        difference = desk.staged(trained).modules[name].delta() - update.delta()
        # codyra's threshold takes a little of every gate, in three steps at most 3 · 0.005.
        assert float(difference.norm() / update.delta().norm()) < (0.015 if method == "codyra" else 1e-3)
    said = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, str)]
    assert any(f"from what version 2 serves of {OLD}" in line for line in said)


def test_a_fresh_start_is_one_that_knows_nothing_of_main_and_is_compared_with_it(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    spec = task(start="base", revises=True)
    store_of(desk, base, old=chance(base, spec, 2))
    trained = revised(desk, base, spec)
    first = desk.train(base, task())
    for name, update in desk.staged(first).modules.items():
        assert torch.equal(update.delta(), desk.staged(trained).modules[name].delta())
    assert [*trained.main_scores_of_rows] == [OLD, "t-new"]


def main_moves(store: SubspaceStore, adapter: Adapter) -> None:
    """One more task is published."""
    ref = store.stage("staging/t-later", adapter)
    staged = StagedAdapter(task_id="t-later", name="red/later", key=ref.key, sha256=ref.sha256)
    store.publish(store.merge([staged], op_key="merge:later", actor="t").number, op_key="publish:later", actor="t")


def test_a_revision_that_was_interrupted_ends_with_the_same_bytes(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(training={"max_steps": 4})
    store = store_of(desk, base, old=chance(base, spec, 2))
    whole = revised(desk, base, spec)
    for key in desk.storage.keys("staging/task-1/"):
        desk.storage.delete(key)
    desk.preempt_at_step = 3
    with pytest.raises(Preempted):
        revised(desk, base, spec)
    desk.preempt_at_step = math.inf
    main_moves(store, chance(base, spec, 3))
    again = revised(desk, base, spec)  # `main` has moved meanwhile: it goes on from where it started
    assert again.resumed_from > 0
    assert again.adapter_sha256 == whole.adapter_sha256


def test_an_interrupted_revision_begins_anew_when_the_version_that_it_started_from_has_expired(
    desk: Desk, tiny: Tiny
) -> None:
    base, spec = tiny("bert"), task(training={"max_steps": 4})
    store = store_of(desk, base, old=chance(base, spec, 2))
    desk.preempt_at_step = 3
    with pytest.raises(Preempted):
        revised(desk, base, spec)
    desk.preempt_at_step = math.inf
    main_moves(store, chance(base, spec, 3))
    store.expire([1], actor="t")
    again = revised(desk, base, spec)
    assert again.resumed_from == 0
    said = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, str)]
    (forgot,) = (line for line in said if line.startswith("does not go on from the checkpoint of step "))
    assert "what it started from is gone (main (version 1) does not hold" in forgot
    assert any(f"from what version 2 serves of {OLD}" in line for line in said)


def test_what_main_does_not_hold_any_more_is_told(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    store_of(desk, base, other=chance(base, spec, 1))
    for start_at in ("main", "base"):
        with pytest.raises(InvalidInput, match=r"main \(version 1\) does not hold the revision .* t-old"):
            revised(desk, base, spec.model_copy(update={"start": start_at}))


def test_earlier_evaluation_rows_that_are_trained_on_are_told(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    store_of(desk, base, old=chance(base, spec, 2))
    lines = desk.storage.read("data/train").splitlines()
    desk.storage.write("data/known", b"\n".join([*lines[:3], json.dumps({"text": "new", "label": "pos"}).encode()]))
    trained = revised(desk, base, spec, earlier_rows={OLD: "data/known"})
    assert any("3 of the evaluation rows of earlier revisions are training rows" in said for said in trained.warnings)


def test_a_version_scores_a_revision_on_each_revisions_rows(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task()
    store = store_of(desk, base, old=chance(base, spec, 2))
    revised(desk, base, spec)
    order = Evaluate(
        token="e",
        task_id=OLD,
        version=1,
        spec=spec,
        eval_key="data/eval",
        earlier_rows={"t-first": "data/old"},
        results_key="results/x",
    )
    found = evaluate_version(order, base, desk.storage, store, desk.heartbeats.append, lambda: "")
    rows = open_evaluation_rows(desk.storage, OLD, "data/eval", {"t-first": "data/old"}, spec)
    by_itself = {
        brought_by: score_served(base, store.adapter(OLD), rows[places], spec, lambda: None).value
        for brought_by, places in rows.of_revisions.items()
    }
    assert {brought_by: value for brought_by, (value, _) in found.of_rows.items()} == by_itself
    assert [count for _, count in found.of_rows.values()] == [10, 10]
    assert found.count == 20
    alone = evaluate_version(replace(order, token="f", earlier_rows={}), base, desk.storage, store,
                             desk.heartbeats.append, lambda: "")  # fmt: skip
    assert (dict(alone.of_rows), alone.score) == ({}, by_itself[OLD])
