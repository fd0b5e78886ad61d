"""Coefficients in the foundation are kept exactly, cost what they have numbers, and no merge touches them."""

import hashlib
from dataclasses import replace

import pytest
import torch

from configs.errors import Corrupt, InvalidInput
from subspace_store import Adapter, SubspaceReader, SubspaceStore
from subspace_store.adapter import adapter_from_bytes, adapter_to_bytes
from subspace_store.foundation import foundation
from subspace_store.log import fold
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    deltas,
    foundation_adapter,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
)

SHAPE = (48, 20)


def error(reader: SubspaceReader, task: str, version: int, adapter: Adapter) -> float:
    whole = deltas(adapter)
    return relative_distance(deltas(reader.adapter(task, version)), whole, whole)


def test_the_same_directions_come_out_on_every_machine() -> None:
    p_NK, q_DK = foundation("layer.0.query", (5, 4), 2)
    # Written once, by hand from the digests: a change here makes every stored coefficient mean something else.
    bits = hashlib.shake_256(b"signs-1/layer.0.query/out/0").digest(1)[0]
    first = torch.tensor([1.0 if bits >> (7 - i) & 1 else -1.0 for i in range(5)]) / 5**0.5
    assert torch.allclose(p_NK[:, 0], first, atol=1e-7)
    second = [-0.365148, -0.547723, 0.365148, -0.547723, -0.365148]
    assert p_NK[:, 1].tolist() == pytest.approx(second, abs=1e-6)
    assert q_DK[:, 0].tolist() == pytest.approx([0.5, -0.5, -0.5, -0.5], abs=1e-6)
    assert q_DK[:, 1].tolist() == pytest.approx([0.288675, -0.288675, -0.288675, 0.866025], abs=1e-6)


def test_columns_are_orthonormal_and_a_smaller_foundation_begins_a_larger_one() -> None:
    for small, large in zip(foundation("m", SHAPE, 6), foundation("m", SHAPE, 20), strict=True):
        assert torch.allclose(large.T @ large, torch.eye(20), atol=1e-6)
        assert torch.allclose(small, large[:, :6], atol=1e-6)
    p_NK, q_DK = foundation("m", SHAPE, 30)
    assert (p_NK.shape, q_DK.shape) == ((48, 30), (20, 20))
    other = foundation("n", SHAPE, 6)[0]
    assert (foundation("m", SHAPE, 6)[0].T @ other).abs().max() < 0.6  # another module, other directions


def test_an_adapters_file_holds_coefficients_and_gives_the_same_update() -> None:
    adapter = foundation_adapter(1, shapes={"wide": (300, 200)})
    content = adapter_to_bytes(adapter)
    found = adapter_from_bytes(content)
    assert found.modules["wide"].foundation == 8
    assert relative_distance(deltas(found), deltas(adapter), deltas(adapter)) < 1e-6
    assert len(content) < 4 * 3 * (8 + 8) + 1500 < len(adapter_to_bytes(replace(adapter, modules=plain(adapter))))
    left_NR, right_RD = found.modules["wide"].raw()
    assert torch.allclose(left_NR @ right_RD, found.modules["wide"].delta(), atol=1e-5)


def plain(adapter: Adapter) -> dict[str, object]:
    """The same updates without the fact that they lie in the foundation."""
    return {name: replace(update, foundation=0) for name, update in adapter.modules.items()}


def test_what_does_not_lie_in_the_foundation_is_not_written_as_if_it_did() -> None:
    adapter = random_adapter(1)
    said = {name: replace(update, foundation=8) for name, update in adapter.modules.items()}
    with pytest.raises(InvalidInput, match="outside"):
        adapter_to_bytes(replace(adapter, modules=said))


def test_another_way_to_make_a_foundation_is_refused() -> None:
    content = adapter_to_bytes(foundation_adapter(1))
    with pytest.raises(Corrupt, match="signs-9"):
        adapter_from_bytes(content.replace(b"signs-1", b"signs-9"))


def test_coefficients_that_do_not_fit_their_foundation_are_refused() -> None:
    content = adapter_to_bytes(foundation_adapter(1))
    damaged = content.replace(rb"\"layer.0.query\": [24, 20, 8]", rb"\"layer.0.query\": [24, 20, 9]")
    assert damaged != content
    with pytest.raises(Corrupt, match="foundation of"):
        adapter_from_bytes(damaged)


@pytest.fixture
def store() -> SubspaceStore:
    return opened(energy_ratio_min=0.9, rank_max=6)


def test_a_stream_of_both_kinds_keeps_the_foundations_exactly_and_the_others_promises(store: SubspaceStore) -> None:
    adapters: dict[str, Adapter] = {}
    for i in range(10):
        new = {f"t{i}": foundation_adapter(i) if i % 2 else random_adapter(i)}
        merged(store, new)
        adapters |= new
    reader = reading(store.storage)
    for version in reader.state.versions:
        for task in reader.state.tasks_at(version):
            allowed = 1e-6 if int(task[1:]) % 2 else 0.1**0.5 + 1e-5
            assert error(reader, task, version, adapters[task]) <= allowed
    assert all(reader.state.errors(10)[f"t{i}"] == 0.0 for i in (1, 3, 5, 7, 9))
    assert verify(store, deep=True) == []


def test_the_basis_is_the_same_whether_a_task_of_the_foundation_came_between_or_not() -> None:
    with_it, without = opened(), opened()
    for store in (with_it, without):
        merged(store, {"a": random_adapter(1)})
    merged(with_it, {"x": foundation_adapter(3)})
    for store in (with_it, without):
        merged(store, {"b": random_adapter(2)})
    found, expected = with_it.subspace(3), without.subspace(2)
    for name, module in expected.items():
        assert torch.equal(found[name].basis.p_NK, module.basis.p_NK)
    assert all(torch.equal(d, deltas(without.adapter("b", 2))[n]) for n, d in deltas(with_it.adapter("b", 3)).items())
    assert not any(fold.PRIVATE["merge"] == entry.op for entry in without.history())


def test_a_version_whose_tasks_are_all_in_the_foundation_has_no_directions(store: SubspaceStore) -> None:
    adapter = foundation_adapter(1)
    merged(store, {"a": adapter})
    assert set(store.ranks(1).values()) == {(0, 0)}
    reader = reading(store.storage)
    assert error(reader, "a", 1, adapter) < 1e-6
    assert verify(store, deep=True) == []
    merged(store, {"b": foundation_adapter(2), "c": random_adapter(3)})  # a group of both
    reader.refresh()
    assert error(reader, "a", 2, adapter) < 1e-6
    assert min(min(pair) for pair in store.ranks(2).values()) > 0
    assert verify(store, deep=True) == []


def test_what_a_task_costs_is_its_coefficients(store: SubspaceStore) -> None:
    merged(store, {"a": foundation_adapter(1, rank=3, directions=8)})
    foot = store.footprint(1)
    assert (foot.coefficient_numbers, foot.private_numbers, foot.basis_numbers) == (2 * 3 * (8 + 8), 0, 0)
    assert foot.separate_numbers == 3 * (24 + 20 + 16 + 20)


def test_an_adapter_may_lie_in_the_foundation_in_some_modules_only(store: SubspaceStore) -> None:
    mixed = foundation_adapter(5)
    modules = dict(mixed.modules) | {"layer.0.value": random_adapter(5).modules["layer.0.value"]}
    mixed = replace(mixed, modules=modules)
    merged(store, {"a": random_adapter(1)})
    merged(store, {"m": mixed})
    merged(store, {"b": random_adapter(2)})
    reader = reading(store.storage)
    held, whole = deltas(reader.adapter("m", 3)), deltas(mixed)
    assert float((held["layer.0.query"] - whole["layer.0.query"]).norm()) < 1e-5
    lost = (held["layer.0.value"] - whole["layer.0.value"]).square().sum() / whole["layer.0.value"].square().sum()
    assert float(lost) <= 0.1 + 1e-6
    assert verify(store, deep=True) == []


def test_removal_refinement_rollback_and_forecast_know_it(store: SubspaceStore) -> None:
    adapters = {"a": foundation_adapter(1), "b": random_adapter(2), "c": foundation_adapter(3)}
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    known = store.forecast({"new": foundation_adapter(7)})
    assert known.error_at_birth["new"] == 0.0
    assert known.spanned["new"] == pytest.approx(1.0, abs=1e-5)
    assert not any(known.drift.values())
    assert not known.ranks
    again = foundation_adapter(9)
    refined(store, {"c": replace(again, head=adapters["c"].head)})
    reader = reading(store.storage)
    assert error(reader, "c", 4, again) < 1e-6
    assert error(reader, "a", 4, adapters["a"]) < 1e-6
    version = store.remove("b", op_key="r", actor="test").number
    reader.refresh()
    assert set(reader.state.tasks_at(version)) == {"a", "c"}
    assert error(reader, "a", version, adapters["a"]) < 1e-6
    assert error(reader, "c", version, again) < 1e-6  # as refined
    assert verify(store, deep=True) == []


def test_the_old_form_merges_it_like_any_other() -> None:
    store = opened(beyond_rank_max="drop", rank_max=6, energy_ratio_min=0.9)
    merged(store, {"a": foundation_adapter(1)})
    assert store.state.tasks_at(1)["a"].private is None
    assert store.ranks(1)["layer.0.query"] != (0, 0)
