"""A direction joins the shared basis where that stores fewer numbers, and only there."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.settings import SubspaceSettings
from subspace_store import Adapter, SubspaceStore, canonical_update
from subspace_store.adapter import SIZED
from subspace_store.merging.merge import ModuleMerge, merge_adapters, merge_module
from subspace_store.merging.subspace_math import weighted_sum
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    BASE,
    deltas,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
    trained_in,
)

SHAPES = {"layer.0.query": (96, 80), "layer.0.value": (64, 80)}
PAYS: dict[str, Any] = {"share": "if-it-pays", "energy_ratio_min": 0.98, "seed_directions": 0}
SHARED = 6


def related(seed: int, rank: int = 4) -> Adapter:
    """An update inside directions that all tasks of this kind share, with a little of its own."""
    own, modules = torch.Generator().manual_seed(seed), {}
    for name, (n, d) in SHAPES.items():
        common = torch.Generator().manual_seed(n)
        left, right = torch.randn(n, SHARED, generator=common), torch.randn(SHARED, d, generator=common)
        b_NR = left @ torch.randn(SHARED, rank, generator=own) + 0.01 * torch.randn(n, rank, generator=own)
        a_RD = torch.randn(rank, SHARED, generator=own) @ right + 0.01 * torch.randn(rank, d, generator=own)
        modules[name] = canonical_update(b_NR, a_RD, 0.1)
    return Adapter(BASE, "", modules, {}, {})


def stream(store: SubspaceStore, adapters: dict[str, Adapter]) -> int:
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    return store.footprint(len(adapters)).total_numbers


def alone(adapters: dict[str, Adapter], energy_ratio_min: float = 0.98) -> int:
    """Numbers of the adapters, each truncated to the same promise by itself."""
    numbers = 0
    for adapter in adapters.values():
        for update in adapter.modules.values():
            energy_R = update.sigma_R.double().square()
            kept_R = energy_R.cumsum(0) / energy_R.sum()
            numbers += (int((kept_R < energy_ratio_min - 1e-9).sum()) + 1) * sum(update.shape)
    return numbers


def test_tasks_that_share_nothing_cost_what_they_cost_alone() -> None:
    adapters = {f"t{i}": random_adapter(i, shapes=SHAPES) for i in range(12)}
    store, always = opened(**PAYS), opened(share="always", energy_ratio_min=0.98)
    numbers = stream(store, adapters)
    first = store.footprint(1)
    assert numbers <= alone(adapters) + first.coefficient_numbers  # the first task's coefficients are the constant
    assert stream(always, adapters) > numbers
    assert (
        max(max(pair) for pair in store.ranks(12).values()) < max(max(pair) for pair in always.ranks(12).values()) / 2
    )
    reader = reading(store.storage)
    for task, adapter in adapters.items():
        whole = deltas(adapter)
        assert relative_distance(deltas(reader.adapter(task, 12)), whole, whole) <= 0.02**0.5 + 1e-5
    assert verify(store, deep=True) == []


def test_tasks_that_share_directions_share_the_basis() -> None:
    adapters = {f"t{i}": related(i) for i in range(12)}
    store = opened(**PAYS)
    numbers = stream(store, adapters)
    assert numbers < 0.5 * alone(adapters)
    assert max(max(pair) for pair in store.ranks(12).values()) <= SHARED + 2
    reader = reading(store.storage)
    for version in (4, 8, 12):
        for task in reader.state.tasks_at(version):
            whole, held = deltas(adapters[task]), deltas(reader.adapter(task, version))
            for name in whole:
                assert float(held[name].square().sum() / whole[name].square().sum()) >= 0.98 - 1e-6
    assert verify(store, deep=True) == []


@pytest.mark.parametrize("seed", range(6))
def test_of_extending_the_basis_and_leaving_it_the_one_with_fewer_numbers_is_taken(seed: int) -> None:
    settings = {share: SubspaceSettings.model_validate({**PAYS, "share": share}) for share in ("always", "if-it-pays")}
    start = merge_adapters({}, {f"t{i}": related(i) for i in range(1 + seed % 3)}, settings["always"]).modules
    new = related(90 + seed) if seed % 2 else random_adapter(90 + seed, shapes=SHAPES)
    for name, before in start.items():
        incoming = {"new": new.modules[name]}
        extended = merge_module(before, incoming, settings["always"])
        kept = merge_module(before, incoming, settings["if-it-pays"])
        assert kept.numbers <= extended.numbers
        assert kept.numbers == numbers_of(kept)
        is_same = torch.equal(kept.basis.p_NK, before.basis.p_NK) and torch.equal(kept.basis.q_DK, before.basis.q_DK)
        assert is_same or kept.numbers == extended.numbers


def numbers_of(merge: ModuleMerge) -> int:
    """Counted from the tensors."""
    settled, basis = merge.settle()[0].settled, merge.basis
    own = sum(u.u_NR.numel() + u.v_DR.numel() for u in merge.new.private.values())
    return basis.p_NK.numel() + basis.q_DK.numel() + settled.e_KS.numel() + settled.f_KS.numel() + own


@pytest.mark.parametrize(("room", "in_basis"), [(0, 0), (4, 1), (5, 2), (8, 2), (9, 3), (32, 3)])
def test_of_a_first_group_as_many_make_the_basis_as_are_needed_for_its_size(room: int, in_basis: int) -> None:
    store = opened(**PAYS | {"seed_directions": room})
    merged(store, {task: sized(random_adapter(seed, shapes=SHAPES)) for seed, task in enumerate("abc")})
    assert set(store.ranks(1).values()) == {(4 * in_basis, 4 * in_basis)}
    assert [task.private is None for task in store.state.tasks_at(1).values()].count(True) == in_basis
    for seed, task in enumerate("abc"):
        whole = deltas(random_adapter(seed, shapes=SHAPES))
        assert relative_distance(deltas(store.adapter(task, 1)), whole, whole) < 1e-6


def test_a_basis_that_stays_is_not_written_again_and_outlives_the_version_that_made_it() -> None:
    store = opened(**PAYS)
    adapters = {f"t{i}": random_adapter(i, shapes=SHAPES, rank=3) for i in range(3)}
    for number, (task, adapter) in enumerate(adapters.items(), start=1):
        version = merged(store, {task: adapter})
        store.publish(version.number, op_key=f"p{number}", actor="test")
    stays = [name for name, ranks in store.ranks(3).items() if ranks == store.ranks(1)[name]]
    assert stays
    one, three = (store.state.versions[number].basis for number in (1, 3))
    assert three.size_bytes < one.size_bytes
    assert 1 in store.state.versions[3].basis_versions
    before = {task: deltas(store.adapter(task, 3)) for task in adapters}
    store.expire([1, 2], op_key="e", actor="test")
    store.collect()
    reader = reading(store.storage)
    for task, known in before.items():
        assert all(torch.equal(delta, known[name]) for name, delta in deltas(reader.adapter(task, 3)).items())
    assert verify(reader, deep=True) == []


# Tasks whose size was found by what their score needs


def sized(adapter: Adapter) -> Adapter:
    return replace(adapter, info=dict(adapter.info) | {SIZED: "score"})


def seeded(directions: int) -> SubspaceStore:
    """A store of three sized tasks of rank 4, the first of which made the basis."""
    store = opened(**PAYS | {"seed_directions": directions})
    for number in range(3):
        merged(store, {f"t{number}": sized(random_adapter(number, shapes=SHAPES))})
    return store


def test_the_first_tasks_make_the_basis_and_are_kept_to_the_last_number() -> None:
    store = seeded(5)
    assert set(store.ranks(3).values()) == {(8, 8)}  # one task of rank 4 is too few, two are enough
    assert [task.private is None for task in store.state.tasks_at(3).values()] == [True, True, False]
    foot = store.footprint(3)
    sides = sum(sum(shape) for shape in SHAPES.values())
    assert (foot.basis_numbers, foot.private_numbers) == (8 * sides, 4 * sides)
    for number in range(3):
        whole = deltas(random_adapter(number, shapes=SHAPES))
        assert relative_distance(deltas(store.adapter(f"t{number}", 3)), whole, whole) < 1e-6


def test_what_is_trained_in_the_basis_costs_its_coefficients_alone_and_moves_nothing() -> None:
    store = seeded(5)
    before = store.footprint(3)
    adapters = {f"in-{number}": trained_in(store.basis(3), number) for number in range(5)}
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    foot = store.footprint(8)
    assert (foot.basis_numbers, foot.private_numbers) == (before.basis_numbers, before.private_numbers)
    assert foot.coefficient_numbers - before.coefficient_numbers == 5 * len(SHAPES) * 3 * (8 + 8)
    assert store.state.versions[8].basis_versions  # the file of the version that made the basis
    reader = reading(store.storage)
    assert verify(reader, deep=True) == []
    for task, adapter in adapters.items():
        whole = deltas(adapter)
        assert relative_distance(deltas(reader.adapter(task, 8)), whole, whole) < 1e-6
    ops = [entry.op for entry in store.history() if entry.op.startswith("merge")]
    assert ops == ["merge-private"] * 8  # an older release stops there, instead of taking from them in a merge


def test_a_later_task_takes_nothing_from_a_sized_one_and_gets_no_more_than_it_was_promised() -> None:
    store = opened(**PAYS | {"seed_directions": 40, "energy_ratio_min": 0.8})
    adapters = {f"t{number}": random_adapter(number, shapes=SHAPES) for number in range(8)}
    for number, (task, adapter) in enumerate(adapters.items()):
        merged(store, {task: sized(adapter) if number % 3 == 1 else adapter})
        errors = store.state.errors(number + 1)
        for place, error in enumerate(errors.values()):
            assert error < 1e-6 if place % 3 == 1 else 0.1 < error <= 0.2**0.5 + 1e-6
    for task, adapter in adapters.items():
        whole, error = deltas(adapter), store.state.errors(8)[task]
        assert relative_distance(deltas(store.adapter(task, 8)), whole, whole) == pytest.approx(error, abs=1e-6)


def test_a_refined_task_that_is_sized_keeps_all_it_was_trained_to() -> None:
    store = seeded(5)
    merged(store, {"in": trained_in(store.basis(3), 1)})
    again = trained_in(store.basis(4), 2)
    refined(store, {"in": again})
    whole = deltas(again)
    assert relative_distance(deltas(store.adapter("in", 5)), whole, whole) < 1e-6
    assert store.state.tasks_at(5)["in"].private is None


def test_removing_a_task_that_made_the_basis_leaves_those_that_were_trained_in_it_as_they_were() -> None:
    store = seeded(5)
    adapters = {f"in-{number}": trained_in(store.basis(3), number, rank=6) for number in range(6)}
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    before = store.footprint(9).total_numbers
    version = store.remove("t0", op_key="remove", actor="test")
    assert version is not None
    # The first of them brings the directions back that it needs, and the others find them there.
    after = store.footprint(version.number)
    assert (after.private_numbers, set(store.ranks(version.number).values())) == (0, {(12, 12)})
    assert after.total_numbers < 1.2 * before
    for task, adapter in adapters.items():
        whole = deltas(adapter)
        assert relative_distance(deltas(store.adapter(task, version.number)), whole, whole) < 1e-6
    assert verify(store, deep=True) == []


def test_a_task_that_needs_few_directions_leaves_sized_ones_all_of_theirs() -> None:
    store = opened(**PAYS | {"energy_ratio_min": 0.5})
    first = sized(random_adapter(1, shapes=SHAPES))
    merged(store, {"first": first})
    leading = {name: update.leading(1) for name, update in first.modules.items()}
    merged(store, {"small": replace(first, modules=leading, info={})})  # half of all energy is in one direction
    assert set(store.ranks(2).values()) == {(4, 4)}
    assert relative_distance(deltas(store.adapter("first", 2)), deltas(first), deltas(first)) < 1e-6


def test_a_refined_task_that_is_private_altogether_has_no_coefficients_any_more() -> None:
    store = opened(seeded(5).storage, **PAYS | {"rank_max": 8})  # the basis is full
    inside, outside = trained_in(store.basis(3), 1), random_adapter(5, rank=1, shapes=SHAPES)
    both = {n: weighted_sum((update, outside.modules[n]), (1.0, 0.5)) for n, update in inside.modules.items()}
    merged(store, {"x": replace(inside, modules=both)})
    assert store.coefficient_numbers(4)["x"] > 0
    assert store.state.tasks_at(4)["x"].private is not None
    refined(store, {"x": sized(random_adapter(6, shapes=SHAPES))})
    assert "x" not in store.coefficient_numbers(5)
    assert store.footprint(5).coefficient_numbers == store.footprint(3).coefficient_numbers
