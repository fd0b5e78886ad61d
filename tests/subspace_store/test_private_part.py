"""What the shared basis has no room for is kept for its task alone, so that no merge takes a task below its promise."""

import json
import math
from dataclasses import replace

import pytest
import torch

from configs.errors import Corrupt, NotFound, RefusedAdapters
from configs.settings import SubspaceSettings
from subspace_store import Adapter, ModuleUpdate, SubspaceReader, SubspaceStore
from subspace_store.log import fold, version_log
from subspace_store.merging.basis import reconstruct
from subspace_store.merging.merge import merge_adapters
from subspace_store.storage.memory import MemoryStorage
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    BASE,
    SHAPES,
    deltas,
    in_the_basis,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
)

PROMISE = 0.9
TIGHT = {"energy_ratio_min": PROMISE, "rank_max": 6}
"""Six directions a side: one adapter of rank 4 and half of the next."""


def errors(reader: SubspaceReader, version: int, adapters: dict[str, Adapter]) -> dict[str, float]:
    """Error of every task of a version against what was delivered, from dense matrices, all modules together."""
    return {
        task: relative_distance(deltas(reader.adapter(task, version)), deltas(adapters[task]), deltas(adapters[task]))
        for task in reader.state.tasks_at(version)
    }


def kept(reader: SubspaceReader, version: int, adapters: dict[str, Adapter]) -> dict[str, float]:
    """Share of each task's energy that a version holds, in the module where it is least: what is promised."""
    found = {}
    for task in reader.state.tasks_at(version):
        held, whole = deltas(reader.adapter(task, version)), deltas(adapters[task])
        found[task] = min(float(held[n].square().sum() / whole[n].square().sum()) for n in whole)
    return found


def held_shares(reader: SubspaceReader, version: int, adapters: dict[str, Adapter]) -> dict[str, float]:
    """Share of each task's energy that a version holds, all modules together."""
    return {
        task: sum(float(d.square().sum()) for d in deltas(reader.adapter(task, version)).values())
        / sum(float(d.square().sum()) for d in deltas(adapters[task]).values())
        for task in reader.state.tasks_at(version)
    }


def stream(store: SubspaceStore, count: int, first: int = 0) -> dict[str, Adapter]:
    """Merge unrelated adapters one by one."""
    adapters = {f"t{i}": random_adapter(100 + i) for i in range(first, first + count)}
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    return adapters


@pytest.fixture
def store() -> SubspaceStore:
    return opened(**TIGHT)


def test_no_merge_takes_a_task_below_its_promise_however_many_unrelated_ones_come(store: SubspaceStore) -> None:
    adapters = stream(store, 12)
    reader = reading(store.storage)
    allowed = math.sqrt(1 - PROMISE) + 1e-5
    for version in reader.state.versions:
        assert all(error <= allowed for error in errors(reader, version, adapters).values())
        assert all(share >= PROMISE - 1e-6 for share in kept(reader, version, adapters).values())
    assert max(max(pair) for pair in reader.ranks(12).values()) <= 6
    dropping = opened(**TIGHT, beyond_rank_max="drop")
    stream(dropping, 12)
    assert max(errors(dropping, 12, adapters).values()) > 0.8  # what private parts are for


def on_axes(energies: dict[int, float], size: int = 24) -> Adapter:
    """An update of one module that has these energies on unit vectors, the same for outputs and inputs."""
    axes = torch.eye(size)[:, list(energies)]
    sigma = torch.tensor(list(energies.values())).sqrt()
    order = sigma.argsort(descending=True)
    update = ModuleUpdate(axes[:, order].contiguous(), sigma[order].contiguous(), axes[:, order].contiguous())
    return Adapter(BASE, "", {"square": update}, {}, {})


STEEP = {
    # The cap takes the two small directions of `a`, and the last one below the cap is nobody's need.
    "one by one": ([{"a": {0: 0.97, 8: 0.015, 9: 0.015}}, {"b": {1: 0.6, 2: 0.382, 3: 0.018}}], {"rank_max": 4}),
    "a group": (
        [{"a": {0: 0.97, 8: 0.015, 9: 0.015}}, {"b": {1: 0.6, 2: 0.382, 3: 0.018}, "c": {4: 0.6, 5: 0.382, 6: 0.018}}],
        {"rank_max": 4},
    ),
    "by energy": ([{"a": {0: 1.0, 8: 0.25}}, {"b": {1: 2500.0, 2: 25.0}}], {"rank_max": 2, "weighting": "energy"}),
}


@pytest.mark.parametrize("case", STEEP)
def test_a_cap_that_leaves_room_which_nobody_needs_breaks_no_promise_either(case: str) -> None:
    groups, settings = STEEP[case]
    store, adapters = opened(energy_ratio_min=0.98, **settings), {}
    for group in groups:
        new = {task: on_axes(energies) for task, energies in group.items()}
        merged(store, new)
        adapters |= new
    version = store.state.refs["candidate"]
    assert min(kept(reading(store.storage), version, adapters).values()) >= 0.98 - 1e-6


def test_a_task_that_the_basis_has_no_room_for_moves_no_other_by_a_bit(store: SubspaceStore) -> None:
    stream(store, 4)
    before = {task: deltas(store.adapter(task, 4)) for task in store.state.tasks_at(4)}
    stream(store, 6, first=4)
    reader = reading(store.storage)
    for task, known in before.items():
        found = deltas(reader.adapter(task, 10))
        assert all(torch.equal(found[name], known[name]) for name in known)
    assert all(drift == 0.0 for version in range(5, 11) for drift in reader.state.drift(version).values())


def test_the_log_says_the_errors_that_are(store: SubspaceStore) -> None:
    adapters = stream(store, 8)
    found = errors(reading(store.storage), 8, adapters)
    logged, errors_now = store.state.tasks_at(8), store.state.errors(8)
    assert logged["t7"].private is not None
    still = [task for task in found if errors_now[task] == logged[task].error_at_birth]  # no merge has moved them
    assert set(still) >= {f"t{i}" for i in range(3, 8)}
    assert {t: logged[t].error_at_birth for t in still} == pytest.approx({t: found[t] for t in still}, abs=1e-5)
    shares = {task: 1 - lost**2 for task, lost in errors_now.items()}
    assert shares == pytest.approx(held_shares(reading(store.storage), 8, adapters), abs=1e-5)
    assert store.forecast({"new": random_adapter(99)}).error_at_birth["new"] <= math.sqrt(1 - PROMISE) + 1e-5


def test_a_promise_of_everything_is_kept_to_rounding() -> None:
    store = opened(energy_ratio_min=1.0, rank_max=2)
    adapters = stream(store, 5)
    assert max(errors(reading(store.storage), 5, adapters).values()) < 1e-5


def test_unrelated_tasks_store_no_more_than_each_truncated_alone_beside_the_basis(store: SubspaceStore) -> None:
    adapters = stream(store, 30)
    alone = 0
    for adapter in adapters.values():
        for update in adapter.modules.values():
            energy_R = update.sigma_R.double().square()
            rank = int((energy_R.flip(0).cumsum(0).flip(0) > (1 - PROMISE) * energy_R.sum()).sum())
            alone += rank * sum(update.shape)
    foot = store.footprint(30)
    assert foot.private_numbers > 0
    assert foot.coefficient_numbers + foot.private_numbers <= alone
    assert foot.total_numbers == foot.basis_numbers + foot.coefficient_numbers + foot.private_numbers


def test_a_task_inside_the_basis_has_no_private_part(store: SubspaceStore) -> None:
    stream(store, 6)
    merged(store, {"inside": in_the_basis(store, 1, 6)})
    assert store.state.tasks_at(7)["inside"].private is None
    assert store.state.tasks_at(7)["inside"].private_count == 0


def test_a_version_reads_the_same_from_a_snapshot_and_after_older_ones_expired(
    store: SubspaceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 3)
    adapters = stream(store, 8)
    assert any(version.snapshot for version in store.state.versions.values())
    for number in range(1, 9):
        store.publish(number, op_key=f"p{number}", actor="a") if number == 8 else None
    store.expire(list(range(1, 8)), actor="a")
    assert opened(store.storage, "next", **TIGHT).collect().deleted
    reader = reading(store.storage)
    assert max(errors(reader, 8, adapters).values()) <= math.sqrt(1 - PROMISE) + 1e-5
    assert verify(reader, deep=True) == []
    modules = reader.subspace(8)
    for task in adapters:
        found = {name: update.delta() for name, update in reconstruct(modules, task).items()}
        assert relative_distance(found, deltas(reader.adapter(task, 8)), deltas(adapters[task])) < 1e-6


def test_a_damaged_private_part_is_found_and_not_served(store: SubspaceStore) -> None:
    stream(store, 5)
    ref = store.state.tasks_at(5)["t4"].private
    assert ref is not None
    content = bytearray(store.storage.read(ref.key))
    content[-60] ^= 1
    store.storage.write(ref.key, bytes(content))
    reader = reading(store.storage)
    assert [finding.where for finding in verify(reader, deep=True) if ref.key in finding.where]
    with pytest.raises(Corrupt):
        reader.adapter("t4", 5)


def test_a_removed_task_takes_its_private_part_along(store: SubspaceStore) -> None:
    adapters = stream(store, 6)
    version = store.remove("t4", op_key="gone", actor="a")
    assert version is not None
    left = errors(reading(store.storage), version.number, adapters)
    assert set(left) == set(adapters) - {"t4"}
    assert max(left.values()) <= math.sqrt(1 - PROMISE) + 1e-5
    assert verify(store, deep=True) == []


def test_a_refinement_keeps_what_is_beside_the_basis(store: SubspaceStore) -> None:
    stream(store, 6)
    served, first = store.adapter("t5", 6), store.state.tasks_at(6)["t5"]
    assert first.private is not None
    for sign in (-1, 1):
        turned = {name: ModuleUpdate(sign * u.u_NR, u.sigma_R, u.v_DR) for name, u in served.modules.items()}
        version = refined(store, {"t5": replace(served, modules=turned)}, f"turn {sign}")
        reader = reading(store.storage)
        now = deltas(reader.adapter("t5", version.number))
        distance = relative_distance(now, {n: sign * d for n, d in deltas(served).items()}, deltas(served))
        assert distance <= math.sqrt(1 - PROMISE) + 1e-5
        again = reader.state.tasks_at(version.number)["t5"]
        assert again.private is not None
        assert again.private_count <= first.private_count
        assert again.parameter_count == first.parameter_count  # what a separate LoRA is compared with
        assert verify(reader, deep=True) == []
    with pytest.raises(RefusedAdapters, match="outside the basis"):  # a task in the basis has none to go to
        refined(store, {"t0": random_adapter(1)}, op_key="other")


def test_one_module_alone_is_read_with_its_private_part(store: SubspaceStore) -> None:
    stream(store, 5)
    name = next(iter(SHAPES))
    whole, one = store.adapter("t4", 5), store.adapter("t4", 5, [name])
    assert torch.equal(one.modules[name].delta(), whole.modules[name].delta())
    with pytest.raises(NotFound, match="does not adapt nothing"):
        store.adapter("t4", 5, ["nothing"])


def test_a_release_that_does_not_know_private_parts_stops_instead_of_reading_without_them(
    store: SubspaceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_log, "CHECKPOINT_EVERY", 4)
    stream(store, 6)
    records = [json.loads(store.storage.read(f"log/{seq:020d}.json")) for seq in range(1, store.state.seq + 1)]
    with_private = {n for n, v in store.state.versions.items() if any(t.private for t in v.added)}
    assert with_private >= {3, 4, 5, 6}
    expected = ["merge-private" if number in with_private else "merge" for number in range(1, 7)]
    assert [r["op"] for r in records] == ["acquire", *expected]
    assert opened(store.storage, "newer", **TIGHT).state.tasks_at(6).keys() == store.state.tasks_at(6).keys()
    # As 0.3 reads: two operations make versions, and a checkpoint has its state under `state`.
    monkeypatch.setattr(fold, "MAKES_VERSION", frozenset({fold.MERGE, fold.REFINE}))
    monkeypatch.setattr(version_log, "STATE_WITH_PRIVATE", "state")
    with pytest.raises(Corrupt, match="merge-private"):
        reading(store.storage)


def test_the_same_request_again_is_the_same_version_with_its_private_part(store: SubspaceStore) -> None:
    stream(store, 5)
    assert merged(store, {"t4": random_adapter(104)}) == store.state.versions[5]
    assert len(store.state.versions) == 5


def test_without_a_store_the_merge_keeps_its_promises_as_well() -> None:
    settings = SubspaceSettings(**TIGHT)
    adapters = {f"t{i}": random_adapter(i) for i in range(8)}
    modules = {}
    for task, adapter in adapters.items():
        modules = merge_adapters(modules, {task: adapter}, settings).modules
    for task, adapter in adapters.items():
        found = {name: update.delta() for name, update in reconstruct(modules, task).items()}
        assert relative_distance(found, deltas(adapter), deltas(adapter)) <= math.sqrt(1 - PROMISE) + 1e-5


def test_comparisons_have_no_private_parts() -> None:
    for settings in ({"rank_fixed": 6}, {"variant": "paper", "rank_max": 6}, {**TIGHT, "beyond_rank_max": "drop"}):
        store = opened(MemoryStorage(f"none-{len(settings)}-{next(iter(settings))}"), **settings)
        stream(store, 4)
        assert all(task.private is None for task in store.state.tasks_at(4).values())
