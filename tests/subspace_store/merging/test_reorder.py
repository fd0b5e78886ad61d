"""What a reorder report says, against a store that merged in that order."""

import itertools

import pytest

from configs.settings import SubspaceSettings
from subspace_store.merging.reorder import Spread, reorder
from subspace_store.merging.variants import merge_all
from tests.subspace_store.builders import SHAPES, deltas, merged, opened, random_adapter, relative_distance

ADAPTERS = {
    "a": random_adapter(1, rank=4),
    "b": random_adapter(2, rank=6, size=0.3),
    "c": random_adapter(3, rank=5, shapes={"layer.0.query": SHAPES["layer.0.query"]}),
    "d": random_adapter(4, rank=5),
}
TIGHT = SubspaceSettings(rank_fixed=6)


def test_the_given_order_has_the_errors_of_a_store_that_merged_in_it() -> None:
    store = opened(rank_fixed=6)
    for task, adapter in ADAPTERS.items():
        merged(store, {task: adapter})
    report = reorder(ADAPTERS, TIGHT, orders=1)
    for task, adapter in ADAPTERS.items():
        original = deltas(adapter)
        measured = relative_distance(deltas(store.adapter(task, 4)), original, original)
        assert report.given[task] == pytest.approx(measured, abs=1e-6)


def test_other_orders_are_the_same_adapters_given_in_another_order() -> None:
    report = reorder(ADAPTERS, TIGHT, orders=3, seed=5)
    every = [
        reorder({task: ADAPTERS[task] for task in order}, TIGHT, orders=0).given
        for order in itertools.permutations(ADAPTERS)
    ]
    for errors in report.others:
        assert any(errors == pytest.approx(possible, abs=1e-9) for possible in every)
    assert len({tuple(errors[task] for task in ADAPTERS) for errors in report.others}) == 3


def test_the_order_matters_when_something_must_go_and_not_otherwise() -> None:
    tight, roomy = (reorder(ADAPTERS, settings) for settings in (TIGHT, SubspaceSettings(energy_ratio_min=1.0)))
    assert tight.of_task("a").high > 1.05 * tight.of_task("a").low
    assert roomy.of_mean.high < 1e-6


def test_at_once_is_the_group_merge_and_better_than_the_mean_of_all_orders() -> None:
    report = reorder(ADAPTERS, TIGHT)
    assert report.at_once == merge_all(ADAPTERS, "canonical", TIGHT).error
    assert sum(report.at_once.values()) / 4 < report.of_mean.median
    paper = TIGHT.model_copy(update={"variant": "paper"})
    assert reorder(ADAPTERS, paper, orders=0).at_once == merge_all(ADAPTERS, "paper", TIGHT).error


def test_a_seed_names_its_orders() -> None:
    assert reorder(ADAPTERS, TIGHT, orders=4, seed=1) == reorder(ADAPTERS, TIGHT, orders=4, seed=1)
    assert reorder(ADAPTERS, TIGHT, orders=4, seed=1) != reorder(ADAPTERS, TIGHT, orders=4, seed=2)


def test_a_spread_counts_the_given_order_too() -> None:
    report = reorder(ADAPTERS, TIGHT, orders=2)
    errors = sorted([report.given["b"], report.others[0]["b"], report.others[1]["b"]])
    assert report.of_task("b") == Spread(*errors)
