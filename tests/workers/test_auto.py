"""Method `auto`: what it sets aside, which form it keeps, and that every candidate is a run like any other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InvalidInput
from configs.settings import SubspaceSettings
from configs.task_spec import TaskSpec
from subspace_store import SubspaceStore
from subspace_store.adapter import Adapter, canonical_update
from subspace_store.files import blobs
from subspace_store.log.version import StagedAdapter
from subspace_store.storage.local import LocalStorage
from tests.subspace_store.builders import BASE, deltas, foundation_adapter, fresh_storage, merged, random_adapter
from tests.workers.test_deepspeed_engine import zero
from tests.workers.test_share import outside
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_rows, sentiment_task, task_of_kind
from workers import training
from workers.base_model import BaseModel
from workers.evaluation import score_adapter
from workers.methods import Given, auto, lora
from workers.methods.factors import ADAPTER, lora_layers
from workers.metrics import classification
from workers.orders import Phase, Point, Progress
from workers.rows import validation
from workers.rows.frozen_rows import open_rows
from workers.rows.task_data import TextRow
from workers.trainer import Cancelled, Preempted, fit

Tiny = Callable[[str], BaseModel]
COUNT = 400


def task(**changes: Any) -> TaskSpec:
    method = {"name": "auto", "directions": "foundation", "foundation": 8} | changes.pop("method", {})
    training = {"learning_rate": 0.05, "max_steps": 12} | changes.pop("training", {})
    lora = {"r": 4} | changes.pop("lora", {})
    return sentiment_task(method=method, training=training, lora=lora, **changes)


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Desk:
    return Desk(request.node.name, train_count=COUNT)


def lines(desk: Desk) -> list[str]:
    return [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, str)]


def test_too_few_rows_are_not_divided_and_the_log_says_what_was_done(tiny: Tiny) -> None:
    few = Desk("few", train_count=40)
    trained = few.train(tiny("bert"), task())
    assert trained.method == "lora"
    assert any("fewer than 24 are too few" in line for line in lines(few))
    (said,) = trained.warnings
    assert said.startswith("auto compares nothing and trains a lora of rank 4: ")
    assert trained.compared == ()
    plain = few.train(tiny("bert"), task(method={"name": "lora"}))
    assert plain.adapter_sha256 == trained.adapter_sha256


def test_answers_are_not_generated_to_choose_a_form() -> None:
    spec = task_of_kind("causal_lm", (), metric="exact_match")
    assert auto.validation_spec(spec).metric == "log_likelihood"


# Which form is kept


def test_forms_keep_the_largest_singular_values_of_all_modules_together() -> None:
    adapter = random_adapter(1, rank=4)
    weak = replace(adapter.modules["layer.0.value"], sigma_R=0.01 * adapter.modules["layer.0.value"].sigma_R)
    adapter = replace(adapter, modules=dict(adapter.modules) | {"layer.0.value": weak})
    sizes = list(auto.forms(adapter))
    assert sizes[-1] is adapter
    whole = sum(float(d.square().sum()) for d in deltas(adapter).values())
    for share, form in zip(auto.SHARES, sizes, strict=True):
        held = sum(float(d.square().sum()) for d in deltas(form).values())
        assert held >= (share - 1e-6) * whole
        if share < 1.0:  # without the weakest direction it keeps is below the share
            assert "layer.0.value" not in form.modules
            assert held - min(float(u.sigma_R[-1]) ** 2 for u in form.modules.values()) < share * whole
    assert [sum(u.numbers for u in form.modules.values()) for form in sizes] == sorted(
        sum(u.numbers for u in form.modules.values()) for form in sizes
    )


def test_the_fewest_numbers_that_lose_no_more_than_is_allowed_are_kept() -> None:
    share, lora = foundation_adapter(1, rank=3, directions=4), random_adapter(2, rank=4)

    def score(adapter: Adapter) -> list[float]:
        kept = sum(u.energy for u in adapter.modules.values())
        is_share = any(u.foundation for u in adapter.modules.values())
        whole = sum(u.energy for u in (share if is_share else lora).modules.values())
        return [(0.80 if is_share else 0.81) - (0.5 if kept < 0.79 * whole else 0.0)] * 30

    kept, said = auto.chosen({"share": share, "lora": lora}, score, 0.02)
    assert kept.method == "share"
    assert kept.score == pytest.approx(0.80)
    sizes = [form.modules.keys() for form in auto.forms(share)]
    assert kept.adapter.modules.keys() == sizes[auto.SHARES.index(0.8)]
    assert kept.adapter.numbers < sum(u.numbers for u in share.modules.values())
    assert len(said) == 3
    assert f"{kept.adapter.numbers:,} numbers" in said[-1]
    assert auto.chosen({"share": share, "lora": lora}, score, 0.005)[0].method == "lora"  # 0.01 would be lost


def test_where_every_cut_loses_the_adapter_stays_whole() -> None:
    lora = random_adapter(2)
    whole = sum(u.energy for u in lora.modules.values())
    kept, _ = auto.chosen({"lora": lora}, lambda a: [sum(u.energy for u in a.modules.values()) / whole] * 30, 0.0)
    assert kept.adapter.numbers == sum(update.numbers for update in lora.modules.values())


def form(*losses: float) -> auto.Form:
    """Scores 0.9 less these losses, in turn, on a hundred rows."""
    return auto.Form("lora", 1.0, random_adapter(1), 1, tuple(0.9 - losses[n % len(losses)] for n in range(100)))


def test_a_cut_is_kept_only_where_the_rows_show_that_it_loses_no_more_than_is_allowed() -> None:
    best = form(0.0)
    assert form(0.004).is_as_good_as(best, best, 0.005)
    assert not form(0.006).is_as_good_as(best, best, 0.005)
    # 0.004 on average again, but known to ± 0.005 only: what the rows cannot show is not assumed.
    assert not form(0.054, -0.046).is_as_good_as(best, best, 0.005)
    assert form(0.054, -0.046).is_as_good_as(best, best, 0.01)
    assert best.is_as_good_as(best, best, 0.0)


def test_what_may_be_lost_is_less_where_there_is_less_to_lose() -> None:
    assert auto.acceptable(0.005, "probability", 0.9) == 0.005
    assert auto.acceptable(0.005, "probability", 0.5) == 0.005
    assert auto.acceptable(0.005, "probability", 0.05) == pytest.approx(0.0005)
    assert auto.acceptable(0.005, "pearson", -0.1) == pytest.approx(0.001)
    assert auto.acceptable(0.005, "log_likelihood", -2.0) == 0.005  # e^-0.005: half a hundredth of the likelihood
    # Labels in millimetres or in kilometres: the same share of their error.
    assert auto.acceptable(0.005, "neg_mean_absolute_error", -40.0) == pytest.approx(0.2)
    assert auto.acceptable(0.005, "neg_mean_absolute_error", -0.04) == pytest.approx(0.0002)


@pytest.mark.parametrize(("right", "is_cut"), [(0.9, True), (0.05, False)])
def test_a_task_that_is_barely_learnt_is_not_cut_to_what_a_well_learnt_one_can_spare(
    right: float, is_cut: bool
) -> None:
    lora = random_adapter(2, rank=4)
    whole = sum(u.energy for u in lora.modules.values())

    def score(adapter: Adapter) -> list[float]:
        kept = sum(u.energy for u in adapter.modules.values())
        return [right - (0.5 * right if kept < 0.79 * whole else 0.003 if kept < 0.9999 * whole else 0.0)] * 30

    kept, _ = auto.chosen({"lora": lora}, score, 0.005)
    assert (kept.score < right) is is_cut


def test_of_two_candidates_neither_has_to_be_shown_no_worse() -> None:
    best, other = form(0.0), form(0.054, -0.046)  # 0.004 ± 0.005 between them
    assert other.is_as_good_as(other, best, 0.005)
    assert not other.is_as_good_as(other, best, 0.003)
    # What a cut of it may lose is the rest, and of that the rows have to show it.
    assert form(0.0545, -0.0455).is_as_good_as(other, best, 0.005)
    assert not form(0.0555, -0.0445).is_as_good_as(other, best, 0.005)


def test_a_candidate_that_the_rows_cannot_tell_from_the_best_is_kept_in_fewer_numbers() -> None:
    few, many = random_adapter(1, rank=1), random_adapter(2, rank=4)

    def score(adapter: Adapter) -> tuple[float, ...]:
        is_few = torch.equal(adapter.modules["layer.0.query"].u_NR[:, 0], few.modules["layer.0.query"].u_NR[:, 0])
        return (form(0.054, -0.046) if is_few else form(0.0)).per_row

    kept, _ = auto.chosen({"share": few, "lora": many}, score, 0.005)
    assert kept.method == "share"


def test_classes_are_compared_by_the_probability_of_the_right_one_whatever_the_metric() -> None:
    for kind in ("sequence_classification", "image_classification"):
        assert auto.validation_spec(task_of_kind(kind)).metric == "probability"
        for metric in ("f1_macro", "matthews_correlation"):
            assert auto.validation_spec(task_of_kind(kind, metric=metric)).metric == "probability_macro"
    assert auto.validation_spec(task_of_kind("sequence_regression")).metric == "pearson"
    assert auto.validation_spec(task_of_kind("causal_lm", metric="rouge_l")).metric == "log_likelihood"


def test_of_a_task_with_a_rare_label_and_a_metric_that_sees_it_no_form_is_kept_that_has_forgotten_that_label() -> None:
    # Nine rows in ten have label 0. What is cut away is all that tells the tenth: it is 0.6 sure of it, and then 0.4.
    whole = random_adapter(1, rank=4)
    expected = [0] * 90 + [1] * 10
    wobble = np.linspace(-0.01, 0.01, 90)

    def score(adapter: Adapter) -> Sequence[float]:
        of_rare = 0.6 if adapter is whole else 0.4
        # What it no longer says of the tenth it gains on the others, as always giving one label does.
        of_right = [*(0.9 + 0.03 * (adapter is not whole) + wobble), *[of_rare] * 10]
        return list(classification(expected, expected, of_right, 2)[metric].per_row)

    metric = auto.validation_spec(task_of_kind("sequence_classification", metric="accuracy")).metric
    assert auto.chosen({"lora": whole}, score, 0.005)[0].numbers < whole.numbers
    metric = auto.validation_spec(task_of_kind("sequence_classification", metric="matthews_correlation")).metric
    assert auto.chosen({"lora": whole}, score, 0.005)[0].numbers == whole.numbers


@pytest.mark.parametrize("seed_directions", [0, 32], ids=["beside the basis", "in the basis"])
def test_a_form_of_auto_is_kept_to_the_last_number_and_any_other_adapter_to_a_share_of_its_energy(
    seed_directions: int,
) -> None:
    whole = random_adapter(1)
    sized = auto.sized(whole, 0.95)
    assert sized.parameter_count < whole.parameter_count
    settings = SubspaceSettings(energy_ratio_min=0.7, seed_directions=seed_directions)
    store = SubspaceStore.open(fresh_storage(), writer="test", base_model=BASE, settings=settings)
    merged(store, {"first": random_adapter(2)})
    merged(store, {"sized": sized})
    merged(store, {"other": random_adapter(4)})
    merged(store, {"last": random_adapter(3)})
    state = store.refresh()
    served = store.adapter("sized", 4)
    for name, update in sized.modules.items():
        assert torch.allclose(served.modules[name].delta(), update.delta(), atol=1e-6)
    assert (state.tasks_at(4)["sized"].private is None) is (seed_directions > 0)
    errors = state.errors(4)
    assert errors["sized"] < 1e-6  # float32
    assert errors["other"] > 0.1
    again = store.remove("other", op_key="remove", actor="test")  # made again from what was delivered
    assert again is not None
    assert store.refresh().errors(again.number)["sized"] < 1e-6


# What is left of a LoRA is trained on


def recovering(enough: int, tried: list[tuple[str, int]]) -> Callable[[str, Adapter], Adapter | None]:
    """A recovery that makes a cut of so many directions or more as good as the whole.

    Args:
        tried: Is told each method and count of directions.
    """

    def train_on(method: str, cut: Adapter) -> Adapter | None:
        tried.append((method, cut.directions))
        return replace(cut, info={"recovered": "well" if cut.directions >= enough else "badly"})

    return train_on


@pytest.mark.parametrize(("enough", "kept_at"), [(1, 2), (3, 4), (5, 8), (9, 0)])
def test_the_smallest_cut_that_recovers_is_kept_and_found_in_few_trainings(enough: int, kept_at: int) -> None:
    lora = random_adapter(2, rank=16)  # two layers
    tried: list[tuple[str, int]] = []

    def score(adapter: Adapter) -> list[float]:
        recovered = adapter.info.get("recovered")
        return [0.9 if adapter is lora else 0.897 if recovered == "well" else 0.6] * 30

    kept, said = auto.chosen({"lora": lora}, score, 0.005, train_on=recovering(enough, tried))
    assert kept.directions == kept_at
    assert kept.adapter.directions == (kept_at or 32)
    assert kept.numbers == auto.leading(lora, kept_at or 32).numbers
    assert len(tried) == len(set(tried)) <= auto.TRIES
    assert sum("and trained on, scores" in line for line in said) == len(tried)
    assert sum(line.endswith(", too little") for line in said) == sum(count < enough for _, count in tried)


def test_no_cut_is_trained_on_that_is_not_smaller_than_one_that_is_good_enough_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "SHARES", (0.9, 1.0))
    drawn, tried = random_adapter(2, rank=16), list[tuple[str, int]]()
    sigmas = [torch.tensor([10.0] * strong + [1.0] * (16 - strong)) for strong in (3, 2)]
    updates = zip(drawn.modules.items(), sigmas, strict=True)
    lora = replace(drawn, modules={name: replace(update, sigma_R=sigma_R) for (name, update), sigma_R in updates})
    assert auto.cut(lora, 0.9).directions == 5
    kept, _ = auto.chosen({"lora": lora}, lambda _: [0.9] * 30, 0.005, train_on=recovering(3, tried))
    assert kept.directions == 2
    assert {count for _, count in tried} <= {2, 4}  # and not 8


def test_a_cut_that_cannot_be_trained_on_costs_nothing_but_the_try() -> None:
    lora = random_adapter(2, rank=16)
    kept, _ = auto.chosen({"lora": lora}, lambda _: [0.9] * 30, 0.005, train_on=lambda method, cut: None)
    assert (kept.directions, kept.share) == (0, auto.SHARES[0])


@pytest.mark.parametrize("worse", ["share", "lora"])
def test_a_candidate_that_is_worse_than_the_other_is_not_trained_on(
    worse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "SHARES", (0.999, 1.0))
    found = {"share": random_adapter(1, rank=16), "lora": random_adapter(2, rank=16)}
    tried: list[tuple[str, int]] = []

    def score(adapter: Adapter) -> list[float]:
        return [0.8 if adapter is found[worse] else 0.9] * 30

    kept, _ = auto.chosen(found, score, 0.005, train_on=recovering(1, tried))
    assert {kept.method} == {method for method, _ in tried} == {*found} - {worse}


def test_the_candidate_with_the_fewest_numbers_is_trained_on_first_and_often_spares_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "SHARES", (0.999, 1.0))
    found = {"lora": random_adapter(2, rank=16), "share": random_adapter(1, rank=16)}
    tried: list[tuple[str, int]] = []

    def numbers(method: str, adapter: Adapter) -> int:
        return adapter.numbers if method == "lora" else adapter.numbers // 2

    kept, _ = auto.chosen(found, lambda _: [0.9] * 30, 0.005, numbers, train_on=recovering(1, tried))
    assert (kept.method, kept.directions, {method for method, _ in tried}) == ("share", 2, {"share"})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_left_is_trained_on_in_its_own_directions_alone_with_steps_of_the_same_size(
    tiny: Tiny, use_rslora: bool
) -> None:
    base = tiny("bert")
    of_lora = {"r": 4, "lora_alpha": 6.0, "use_rslora": use_rslora}
    spec = task(method={"name": "lora"}, lora=of_lora, training={"warmup_steps": 8.0})
    prepared = lora.prepare(base, spec)
    whole = lora.finish(prepared, base, spec)
    layers = list(lora_layers(prepared))
    drawn = torch.Generator().manual_seed(0)
    updates = {
        name: canonical_update(torch.randn(n, 3, generator=drawn), torch.randn(3, d, generator=drawn), 1.0)
        for name, (n, d) in ((name, whole.modules[name].shape) for name in layers)
    }
    weak = replace(updates[layers[-1]], sigma_R=1e-3 * updates[layers[-1]].sigma_R)
    cut = auto.leading(replace(whole, modules=updates | {layers[-1]: weak}), 2 * (len(layers) - 1) + 1)
    assert layers[-1] not in cut.modules
    assert {update.rank for update in cut.modules.values()} == {2, 3}
    asked = auto.recovery(spec, cut)
    model = lora.prepare(base, asked, Given(start=cut))
    assert lora_layers(model).keys() == cut.modules.keys()
    for name, layer in lora_layers(model).items():
        assert layer.r[ADAPTER] == cut.modules[name].rank
        assert layer.scaling[ADAPTER] == pytest.approx(lora_layers(prepared)[name].scaling[ADAPTER])
    again = lora.finish(model, base, asked, Given(start=cut))
    for name, update in again.modules.items():
        assert torch.allclose(update.delta(), cut.modules[name].delta(), rtol=1e-4, atol=1e-3)
    assert (asked.training.max_steps, asked.training.warmup_steps) == (6, 4.0)
    short = spec.model_copy(update={"training": spec.training.model_copy(update={"warmup_steps": 1.0})})
    assert auto.recovery(short, cut).training.warmup_steps == 1.0  # half a step would be half of all steps


# The candidates as runs


Run = tuple[int, int, Adapter, Adapter]
"""Steps, rows, what it begins with, what it ends with."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What is trained, run by run."""
    runs: list[Run] = []

    def fitting(model: Any, base: Any, rows: Any, spec: TaskSpec, *others: Any) -> Any:
        before = lora.finish(model, base, spec)
        run = fit(model, base, rows, spec, *others)
        runs.append((spec.training.max_steps, len(rows), before, lora.finish(model, base, spec)))
        return run

    monkeypatch.setattr(training, "fit", fitting)
    return runs


def test_a_lora_that_recovers_from_a_cut_is_kept_so_small_and_made_once_more_on_all_rows(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, ran: list[Run]
) -> None:
    choose = auto.chosen

    def lenient(found: Any, score: Any, loss_max: float, *others: Any) -> Any:
        return choose(found, score, 1.0, *others)

    monkeypatch.setattr(auto, "chosen", lenient)
    monkeypatch.setattr(auto, "SHARES", (0.999, 1.0))
    trained = desk.train(tiny("bert"), task(method={"candidates": ("lora",)}))
    adapter, count = desk.staged(trained), len(ran)
    assert adapter.is_sized
    assert json.loads(adapter.info["lora"])["r"] == 4
    whole = ran[0][3]
    kept = adapter.directions
    assert kept == max(1, round(auto.SIZES[0] * whole.directions))
    assert [steps for steps, *_ in ran] == [12, *[6] * (count - 1)]
    rest = len(validation.set_aside(open_rows(desk.storage, "data/train", task()))[0])
    assert [rows for _, rows, *_ in ran] == [*[rest] * (count - 1), COUNT]
    assert trained.steps == sum(steps for steps, *_ in ran)
    for _, _, begin, end in ran[1:]:
        left = auto.leading(whole, end.directions)
        for name, delta in deltas(begin).items():
            assert torch.allclose(delta, deltas(left)[name], atol=1e-5)
            assert not torch.allclose(delta, deltas(end)[name], atol=1e-5)
    for name, delta in deltas(adapter).items():
        assert torch.allclose(delta, deltas(ran[-1][3])[name], atol=1e-6)
    names = {beat.candidate for beat in desk.heartbeats if beat.phase is Phase.TRAINING}
    assert {"lora", f"lora cut to {kept}", "lora on all rows"} <= names
    assert len(names) == count


def test_preempted_while_what_is_left_is_trained_on_it_goes_on_there(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "SIZES", (1 / 4,))
    monkeypatch.setattr(auto, "SHARES", (0.999, 1.0))
    base, spec = tiny("bert"), task(method={"candidates": ("lora",)}, training={"save_steps": 1})
    expected = Desk("whole", train_count=COUNT).train(base, spec)
    desk.preempt_at_step = 12 + 2
    with pytest.raises(Preempted):
        desk.train(base, spec)
    desk.preempt_at_step = math.inf
    desk.heartbeats.clear()
    trained = desk.train(base, spec)
    points = [p for beat in desk.heartbeats for p in beat.log_lines if isinstance(p, Point)]
    assert (points[0].candidate, points[0].resumed_from > 0) == ("lora cut to 4", True)
    assert trained.adapter_sha256 == expected.adapter_sha256
    assert trained.steps == expected.steps


@pytest.fixture
def cuts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained on after a cut."""
    for name, nothing in {"SIZES": (), "TRIES": 0, "RECOVERY": 0.0}.items():
        monkeypatch.setattr(auto, name, nothing)


@pytest.mark.usefixtures("cuts_alone")
def test_both_are_trained_without_the_validation_rows_and_what_is_kept_once_more_with_them(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    forms: list[auto.Form] = []
    candidates = auto.chosen

    def seen(found: Any, score: Any, loss_max: float, *others: Any) -> Any:
        asked.append(set(found))
        kept, said = candidates(found, score, 0.2, *others)  # enough for something to be cut off
        forms.append(kept)
        return kept, said

    monkeypatch.setattr(auto, "chosen", seen)
    base, spec = tiny("bert"), task()
    trained = desk.train(base, spec)
    adapter = desk.staged(trained)
    assert asked == [{"share", "lora"}]
    said = [line for line in lines(desk) if line.startswith("auto: ")]
    assert len(said) == 5
    assert sum("; it loses 0." in line for line in said[:2]) == 1  # the other one is the best
    assert said[4] == f"auto: {adapter.numbers:,} numbers are kept"
    assert said[2].startswith(f"auto: {trained.method}, cut to ")
    assert said[3] == f"auto: {trained.method} is trained once more, on all {COUNT} rows"
    assert adapter.is_sized
    alone = Desk("alone", train_count=COUNT)
    whole = alone.staged(alone.train(base, task(method={"name": trained.method})))
    (form,) = forms
    assert form.share < 1.0
    expected = auto.cut(whole, form.share)  # of what the method makes of all rows
    assert adapter.parameter_count < whole.parameter_count
    assert adapter.modules.keys() == expected.modules.keys()
    for name, update in adapter.modules.items():
        assert update.rank == expected.modules[name].rank
        assert torch.allclose(update.sigma_R, expected.modules[name].sigma_R, rtol=1e-5)


@pytest.mark.usefixtures("cuts_alone")
def test_where_few_rows_were_set_aside_what_was_chosen_is_not_trained_again(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "FEW", 1.0)
    trained = desk.train(tiny("bert"), task())
    assert desk.staged(trained).is_sized
    assert not any("once more" in line for line in lines(desk))
    assert {beat.steps for beat in desk.heartbeats if beat.phase is Phase.TRAINING} == {trained.steps} == {2 * 12}


def test_if_the_last_training_fails_what_was_judged_is_kept_and_the_owner_is_told(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(model: Any, base: Any, rows: Any, *others: Any) -> Any:
        if len(rows) == COUNT:
            raise InvalidInput("the loss is nan at step 3 of 12", "training.learning_rate", "lower it")
        return fit(model, base, rows, *others)

    monkeypatch.setattr(training, "fit", failing)
    trained = desk.train(tiny("bert"), task())
    assert desk.staged(trained).is_sized
    assert any("auto kept what was trained without the validation rows" in said for said in trained.warnings)


@pytest.mark.usefixtures("cuts_alone")
def test_the_candidates_see_no_validation_row_and_the_choice_sees_no_other(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on, judged_on = list[set[str]](), list[set[str]]()

    def fitting(model: Any, base: Any, rows: Any, *others: Any) -> Any:
        trained_on.append({row.text for row in rows})
        return fit(model, base, rows, *others)

    def judging(base: Any, adapter: Any, rows: Any, *others: Any, **named: Any) -> Any:
        judged_on.append({row.text for row in rows})
        return score_adapter(base, adapter, rows, *others, **named)

    monkeypatch.setattr(training, "fit", fitting)
    monkeypatch.setattr(training, "score_adapter", judging)
    desk.train(tiny("bert"), task())
    sides = validation.set_aside(open_rows(desk.storage, "data/train", task()))
    rest, aside = ({row.text for row in side if isinstance(row, TextRow)} for side in sides)
    assert trained_on == [rest, rest, rest | aside]
    assert len(judged_on) > 2
    assert all(texts == aside for texts in judged_on[:-1])  # the last are the rows that are reported on


def test_progress_counts_the_steps_of_all_candidates_and_never_goes_back(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), task())
    beats = [beat for beat in desk.heartbeats if beat.step]
    steps = [beat.step for beat in beats if beat.phase is Phase.TRAINING]
    assert steps == sorted(steps)
    assert all(beat.step <= beat.steps <= 3 * 12 + 4 * 6 for beat in beats if beat.phase is Phase.TRAINING)
    assert max(steps) == beats[-1].steps == trained.steps
    assert trained.first_step_at == min(beat.first_step_at for beat in beats if beat.first_step_at)


def test_the_time_that_is_left_has_the_candidates_that_follow_in_it() -> None:
    said: list[Progress] = []
    report = auto.among(said.append, "share", 0, 1.0, 2.0)
    report(Progress(step=5, steps=10, seconds_left=20.0))
    report(Progress(step=10, steps=10, seconds_left=0.0))
    auto.among(said.append, "lora", 20, 1.0, 0.0)(Progress(step=5, steps=10, seconds_left=20.0))
    auto.among(said.append, "lora cut to 2", 10, 0.25, 1.0)(Progress(step=2, steps=5, seconds_left=12.0))
    assert [(beat.step, beat.steps, beat.seconds_left) for beat in said] == [
        (5, 30, 100.0),
        (10, 30, 80.0),
        (25, 30, 20.0),
        (12, 35, 92.0),
    ]


@pytest.mark.usefixtures("cuts_alone")
def test_each_line_point_and_heartbeat_names_the_training_that_it_belongs_to(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), task())
    last = f"{trained.method} on all rows"
    points = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, Point)]
    assert list(dict.fromkeys(point.candidate for point in points)) == ["share", "lora", last]
    assert {(point.candidate.partition(" ")[0], point.method) for point in points} == {
        ("share", "share"),
        ("lora", "lora"),
    }
    assert {beat.candidate for beat in desk.heartbeats if beat.phase is Phase.TRAINING} == {"share", "lora", last}
    for name in ("share", "lora", last):
        assert f"{name}: task task-1: method {name.partition(' ')[0]}" in lines(desk)
    assert not any(line.startswith("lora: lora: ") for line in lines(desk))
    assert trained.compared == ("share", "lora")
    alone = Desk("alone", train_count=COUNT)
    assert alone.train(tiny("bert"), task(method={"name": "lora"})).compared is None
    assert {p.candidate for beat in alone.heartbeats for p in beat.log_lines if isinstance(p, Point)} == {""}


# Coefficients in the basis of main


def published(desk: Desk, base: BaseModel, **settings: Any) -> SubspaceStore:
    """A store whose `main` holds one task, a LoRA of rank 4: four directions in every module."""
    first = desk.train(base, sentiment_task(lora={"r": 4}, training={"learning_rate": 0.05}))
    settings = SubspaceSettings(energy_ratio_min=1.0, seed_directions=4, **settings)
    store = SubspaceStore.open(
        desk.storage, settings=settings, writer="test", base_model=base.name, base_sha256=base.sha256
    )
    key = "staging/t1/sized/adapter.safetensors"
    sha256 = blobs.stage(desk.storage, key, auto.sized(desk.staged(first), 1.0)).sha256
    staged = StagedAdapter(task_id="t1", name="team-a/first", key=key, sha256=sha256)
    store.publish(store.merge([staged], op_key="m1", actor="test").number, op_key="p1", actor="test")
    desk.heartbeats.clear()
    return store


def in_the_basis(**lora: Any) -> TaskSpec:
    training = {"learning_rate": 0.05, "max_steps": 12}
    return sentiment_task(method={"name": "auto"}, training=training, lora=lora)


RENEWED = {"renew_tasks": 1, "renew_directions": 3}
"""As soon as the first task is there, its three leading directions stand beside its four."""


@pytest.mark.parametrize(("settings", "directions"), [({}, 4), (RENEWED, 3)], ids=["first basis", "renewed basis"])
def test_what_was_trained_in_the_basis_of_main_costs_its_coefficients_and_is_kept_exactly(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], directions: int
) -> None:
    forms: list[auto.Form] = []
    choose = auto.chosen

    def share_wins(found: Any, score: Any, loss_max: float, numbers: Any, *others: Any) -> Any:
        assert set(found) == {"share", "lora"}
        kept, said = choose({"share": found["share"]}, score, loss_max, numbers)
        forms.append(kept)
        return kept, said

    monkeypatch.setattr(auto, "chosen", share_wins)
    monkeypatch.setattr(auto, "WORTH_TRAINING_IN", directions)
    base = tiny("bert")
    store = published(desk, base, **settings)
    trained = desk.train(base, in_the_basis(r=2), staging_key="staging/t2/1-a/adapter.safetensors")
    assert (trained.method, trained.basis_version, trained.compared) == ("share", 1, ("share", "lora"))
    basis, adapter, (form,) = store.training_basis(1), desk.staged(trained), forms
    assert {one.ranks for one in basis.values()} == {(directions, directions)}
    assert adapter.is_sized
    each = 2 * directions
    assert form.numbers == sum(update.rank * each for update in form.adapter.modules.values())
    for name, update in adapter.modules.items():
        assert outside(update.delta(), basis[name]) < 1e-6
    before = store.footprint(1).total_numbers
    staged = StagedAdapter(task_id="t2", name="team-a/second", key=trained.staging_key, sha256=trained.adapter_sha256)
    store.merge([staged], op_key="m2", actor="test")
    task = store.state.tasks_at(2)["t2"]
    assert (task.private, task.is_sized) == (None, True)
    assert store.footprint(2).total_numbers - before == sum(each * update.rank for update in adapter.modules.values())
    served = store.adapter("t2", 2)
    for name, update in adapter.modules.items():
        assert torch.allclose(served.modules[name].delta(), update.delta(), atol=1e-6)
    # A refinement goes on in the basis that holds the task, and another's in that one's.
    for task_id, ranks in {"t2": directions, "t1": 4}.items():
        key = f"staging/{task_id}/2-r/adapter.safetensors"
        order = {"task_id": task_id, "refine_version": store.state.refs["candidate"], "staging_key": key}
        again = desk.train(base, sentiment_task(lora={"r": 4}, method={"refine_epochs": 1}), **order)
        task = StagedAdapter(
            task_id=task_id, name=store.state.tasks_at(2)[task_id].name, key=key, sha256=again.adapter_sha256
        )
        version = store.refine([task], op_key=f"refine {task_id}", actor="test").number
        held, refined = store.basis_of(task_id, version), desk.staged(again)
        for name, update in refined.modules.items():
            assert held[name].ranks == (ranks, ranks)
            assert outside(update.delta(), held[name]) < 1e-5
            found = store.adapter(task_id, version).modules[name].delta()
            assert torch.allclose(found, update.delta(), atol=1e-5)


@pytest.mark.parametrize(("settings", "directions"), [({}, 4), (RENEWED, 3)], ids=["first basis", "renewed basis"])
def test_what_a_cut_leaves_of_coefficients_is_trained_on_in_the_same_basis(
    desk: Desk,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    ran: list[Run],
    settings: dict[str, Any],
    directions: int,
) -> None:
    choose = auto.chosen

    def lenient(found: Any, score: Any, loss_max: float, *others: Any) -> Any:
        return choose({"share": found["share"]}, score, 1.0, *others)

    monkeypatch.setattr(auto, "chosen", lenient)
    monkeypatch.setattr(auto, "SHARES", (0.999, 1.0))
    monkeypatch.setattr(auto, "WORTH_TRAINING_IN", directions)
    base = tiny("bert")
    store = published(desk, base, **settings)
    ran.clear()
    trained = desk.train(base, in_the_basis(r=2), staging_key="staging/t2/1-a/adapter.safetensors")
    adapter, (_, _, _, whole) = desk.staged(trained), ran[0]
    assert (trained.method, trained.basis_version) == ("share", 1)
    assert adapter.is_sized
    assert json.loads(adapter.info["lora"])["r"] == 2
    assert "refined_in" not in adapter.info
    kept = adapter.directions
    assert kept == max(1, round(auto.SIZES[0] * whole.directions))
    left, (_, rows, begin, end) = auto.leading(whole, kept), ran[-1]
    assert rows == COUNT
    for name, delta in deltas(adapter).items():
        assert torch.allclose(deltas(begin)[name], deltas(left)[name], atol=1e-5)
        assert torch.allclose(deltas(end)[name], delta, atol=1e-5)
        assert not torch.allclose(delta, deltas(left)[name], atol=1e-5)
        assert outside(delta, store.training_basis(1)[name]) < 1e-6
    before = store.footprint(1).total_numbers
    staged = StagedAdapter(task_id="t2", name="team-a/second", key=trained.staging_key, sha256=trained.adapter_sha256)
    store.merge([staged], op_key="m2", actor="test")
    assert store.state.tasks_at(2)["t2"].private is None
    assert store.footprint(2).total_numbers - before == 2 * directions * kept
    for name, delta in deltas(store.adapter("t2", 2)).items():
        assert torch.allclose(delta, deltas(adapter)[name], atol=1e-6)
    assert f"auto: what is left of share is trained on once more, on all {COUNT} rows" in lines(desk)
    assert {f"share cut to {kept}", "share on all rows"} <= {beat.candidate for beat in desk.heartbeats}


@pytest.mark.parametrize(("columns", "directions"), [(0, 3), (1, 5)])
def test_coefficients_alone_are_trained_in_the_renewed_basis_and_with_columns_in_the_first(
    desk: Desk, tiny: Tiny, columns: int, directions: int
) -> None:
    base = tiny("bert")
    store = published(desk, base, **RENEWED)
    method = {"name": "share", "temporary_columns": columns}
    spec = sentiment_task(method=method, training={"learning_rate": 0.05, "max_steps": 12}, lora={"r": 2})
    trained = desk.train(base, spec, staging_key="staging/t2/1-a/adapter.safetensors")
    staged = StagedAdapter(task_id="t2", name="team-a/second", key=trained.staging_key, sha256=trained.adapter_sha256)
    store.merge([staged], op_key="m2", actor="test")
    # The first basis has four directions, and one column of each module is new to it.
    assert {basis.ranks for basis in store.basis_of("t2", 2).values()} == {(directions, directions)}
    assert store.state.tasks_at(2)["t2"].private is None


def test_a_basis_with_few_directions_is_not_trained_in(desk: Desk, tiny: Tiny) -> None:
    base = tiny("bert")
    published(desk, base)
    trained = desk.train(base, in_the_basis(r=2), staging_key="staging/t2/1-a/adapter.safetensors")
    assert (trained.method, trained.compared) == ("lora", ("lora",))
    assert "auto: no coefficients are trained, the basis of `main` has too few directions yet" in lines(desk)
    points = [p for beat in desk.heartbeats for p in beat.log_lines if isinstance(p, Point)]
    assert {point.method for point in points} == {"lora"}
    assert trained.steps >= 12 + 6


def test_the_directions_that_count_are_those_of_the_layers_that_are_adapted() -> None:
    ranks = {"query": (24, 25), "value": (40, 23)}
    assert auto.is_large_enough(ranks, ("query", "value"))
    assert not auto.is_large_enough(ranks, ("value", "key"))
    adapter = random_adapter(1, rank=3)
    (query, _), (value, other) = adapter.modules.items()
    assert auto.numbers(adapter, {}) == adapter.numbers
    assert auto.numbers(adapter, {query: (5, 7), value: (4, 0)}) == 3 * 12 + 3 * sum(other.shape)


def test_one_candidate_means_that_only_the_size_is_found(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), task(method={"candidates": ("lora",)}))
    assert trained.method == "lora"
    assert {point.method for beat in desk.heartbeats for point in beat.log_lines if isinstance(point, Point)} == {
        "lora"
    }


def test_a_candidate_whose_loss_is_no_number_loses_and_the_other_is_kept(desk: Desk, tiny: Tiny) -> None:
    spec = task(method={"candidates": ("codyra", "lora"), "kappa_max": 1e6, "dense_fraction": 0.0})
    trained = desk.train(tiny("bert"), spec)
    assert trained.method == "lora"
    assert any("codyra cannot be trained: " in line for line in lines(desk))
    with pytest.raises(InvalidInput, match="closed all"):
        desk.train(tiny("bert"), task(method={"candidates": ("codyra",), "kappa_max": 1e6, "dense_fraction": 0.0}))


def test_a_candidate_that_fails_at_its_end_leaves_no_checkpoint_in_the_way_of_the_next(desk: Desk, tiny: Tiny) -> None:
    spec = task(method={"candidates": ("codyra",), "kappa_max": 1e6, "dense_fraction": 0.0}, training={"save_steps": 2})
    with pytest.raises(InvalidInput, match="closed all"):
        desk.train(tiny("bert"), spec)
    assert any(isinstance(line, Point) and line.step == 12 for beat in desk.heartbeats for line in beat.log_lines)
    assert [key for key in desk.storage.keys("staging/") if "checkpoint-" in key] == []


def test_a_preempted_race_goes_on_from_the_candidate_and_the_step_it_was_at(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(training={"save_steps": 2})
    expected = Desk("whole", train_count=COUNT).train(base, spec)
    seen = []

    def asked() -> Any:
        points = [p for beat in desk.heartbeats for p in beat.log_lines if isinstance(p, Point)]
        seen.append(len(points))
        return "preempt" if any(p.method == "lora" and p.step >= 4 for p in points) else ""

    desk._asked, plain = asked, desk._asked  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        desk.train(base, spec)
    desk._asked = plain  # type: ignore[method-assign]
    desk.heartbeats.clear()
    trained = desk.train(base, spec)
    assert "share: was trained by an earlier attempt" in lines(desk)
    points = [p for beat in desk.heartbeats for p in beat.log_lines if isinstance(p, Point)]
    assert points[0].method == "lora"
    assert points[0].resumed_from >= 4
    assert ("share" if trained.method == "lora" else "lora", False) not in {
        (p.method, p.resumed_from > 0) for p in points
    }
    assert (trained.method, trained.adapter_sha256) == (expected.method, expected.adapter_sha256)
    assert (trained.steps, trained.trainable_parameters) == (expected.steps, expected.trainable_parameters)
    assert trained.compared == ("share", "lora")


@pytest.mark.usefixtures("cuts_alone")
def test_preempted_in_the_last_training_it_goes_on_there(desk: Desk, tiny: Tiny) -> None:
    base, spec = tiny("bert"), task(training={"save_steps": 2})
    expected = Desk("whole", train_count=COUNT).train(base, spec)
    desk.preempt_at_step = 2 * 12 + 5
    with pytest.raises(Preempted):
        desk.train(base, spec)
    desk.preempt_at_step = math.inf
    desk.heartbeats.clear()
    trained = desk.train(base, spec)
    points = [p for beat in desk.heartbeats for p in beat.log_lines if isinstance(p, Point)]
    assert {(p.method, p.resumed_from > 0) for p in points} == {(trained.method, True)}
    assert trained.adapter_sha256 == expected.adapter_sha256


def test_it_is_cancelled_between_two_steps(desk: Desk, tiny: Tiny) -> None:
    desk.cancel_at_step = 3
    with pytest.raises(Cancelled):
        desk.train(tiny("bert"), task())


@pytest.mark.acceptance  # two ranks in processes of their own
@pytest.mark.parametrize("deepspeed", [None, zero(2)], ids=["ddp", "zero2"])
def test_the_ranks_of_a_gang_agree_on_the_form(
    deepspeed: dict[str, Any] | None, tiny_source: Callable[[str], str], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    storage.write("data/sequence_classification", sentiment_rows(COUNT, seed=1))
    spec = task(training={"deepspeed": deepspeed, "per_device_train_batch_size": 4}).model_dump(
        mode="json", include={"kind", "metric", "training", "lora", "method"}
    )
    orders = [{"name": "race", "spec": spec}]
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    command = [sys.executable, "-m", "tests.workers.rank_process"]
    ranks = [subprocess.Popen([*command, str(index), "2", str(tmp_path), tiny_source("bert")]) for index in range(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    told = json.loads((tmp_path / "race-0.json").read_text())
    assert told["method"] in ("share", "lora")
    steps = [step for step, _ in told["losses"]]
    assert steps[: 2 * 12] == [*range(1, 13)] * 2  # both candidates
    assert told["steps"] == len(steps) >= 2 * 12 + 6
