"""A forecast is what the merge then does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.errors import InvalidInput
from subspace_store import Adapter, canonical_update
from subspace_store.adapter import SIZED
from tests.subspace_store.builders import BASE, SHAPES, merged, opened, random_adapter


@pytest.mark.parametrize("beyond", ["private", "drop"])
def test_a_forecast_is_what_the_merge_then_does(beyond: str) -> None:
    store = opened(rank_max=7, energy_ratio_min=0.9, beyond_rank_max=beyond)
    for number in range(4):
        merged(store, {f"t{number}": random_adapter(number)})
    news = {"x": random_adapter(8), "y": random_adapter(9, shapes={"layer.9.new": (10, 6), **SHAPES})}
    before = dict(store.state.refs)
    found = store.forecast(news)
    assert store.state.refs == before
    old_ranks = store.ranks(4)
    version = merged(store, news)
    assert found.parent == 4
    assert found.error_at_birth == pytest.approx({t.task_id: t.error_at_birth for t in version.added}, rel=1e-6)
    assert found.drift == pytest.approx(store.state.drift(5), rel=1e-4)
    assert found.error == pytest.approx(
        {task: error for task, error in store.state.errors(5).items() if task not in news}, rel=1e-4
    )
    ranks = store.ranks(5)
    assert found.ranks == {name: (old_ranks.get(name, (0, 0)), ranks[name]) for name in ranks}
    assert (max(found.drift.values()) > 0.01) == (beyond == "drop")


def test_what_the_basis_spans_is_told_without_merging() -> None:
    store = opened(energy_ratio_min=1.0)
    merged(store, {"a": random_adapter(1)})
    n, d = SHAPES["layer.0.query"]
    inside = store.delivered("a")
    basis = store.basis(1)["layer.0.query"]
    outside_N = torch.linalg.qr(torch.cat([basis.p_NK, torch.randn(n, 1)], dim=1)).Q[:, -1:]
    outside = Adapter(BASE, "", {"layer.0.query": canonical_update(outside_N, torch.randn(1, d), 1.0)})
    found = store.forecast({"inside": inside, "outside": outside}, version=1)
    assert found.spanned["inside"] == pytest.approx(1.0, abs=1e-6)
    assert found.spanned["outside"] == pytest.approx(0.0, abs=1e-6)
    assert store.forecast({"x": inside}, version=0).spanned == {"x": 0.0}


def test_what_could_not_be_merged_is_refused() -> None:
    store = opened()
    merged(store, {"a": random_adapter(1)})
    with pytest.raises(InvalidInput, match="the subspace has"):
        store.forecast({"x": random_adapter(2, shapes={"layer.0.query": (5, 5)})})
    with pytest.raises(InvalidInput, match="a: is a task that this version holds already"):
        store.forecast({"a": random_adapter(2)})


def test_what_is_kept_whole_is_spanned_as_far_as_the_basis_spans_it_and_loses_nothing() -> None:
    store = opened()
    known = random_adapter(1)
    merged(store, {"a": known})
    whole = {
        name: replace(adapter, info={SIZED: "score"}) for name, adapter in (("k", known), ("n", random_adapter(2)))
    }
    found = store.forecast(whole, version=1)
    assert found.spanned["k"] == pytest.approx(1.0, abs=1e-5)
    assert found.spanned["n"] < 0.9
    assert found.error_at_birth == {"k": 0.0, "n": 0.0}
