"""A direction joins the shared basis where that stores fewer numbers, and only there."""

import pytest
import torch

from configs.settings import SubspaceSettings
from subspace_store import Adapter, SubspaceStore, canonical_update
from subspace_store.merging.merge import ModuleMerge, merge_adapters, merge_module
from subspace_store.verify import verify
from tests.subspace_store.builders import BASE, deltas, merged, opened, random_adapter, reading, relative_distance

SHAPES = {"layer.0.query": (96, 80), "layer.0.value": (64, 80)}
PAYS = {"share": "if-it-pays", "energy_ratio_min": 0.98}
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


def test_a_first_group_makes_the_basis() -> None:
    store = opened(**PAYS)
    merged(store, {"a": random_adapter(1), "b": random_adapter(2)})
    assert min(min(pair) for pair in store.ranks(1).values()) > 0
    assert store.footprint(1).private_numbers == 0


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
