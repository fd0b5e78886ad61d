"""Merging against the plain form: dense reconstructions of all tasks, stacked, and a whole SVD each time."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from configs.settings import SubspaceSettings
from subspace_store import CANDIDATE, Adapter, ModuleUpdate, canonical_update
from subspace_store.merging.basis import ModuleSubspace, reconstruct
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock, Transport
from subspace_store.merging.merge import merge_adapters
from subspace_store.parallel import in_order
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    BASE,
    SHAPES,
    deltas,
    fresh_storage,
    merged,
    opened,
    random_adapter,
    reading,
    relative_distance,
)

# Mixed ranks, a group commit, a small task between large ones, and a task in one module only.
ROUNDS: list[dict[str, Adapter]] = [
    {"a": random_adapter(1, rank=4)},
    {"b": random_adapter(2, rank=7, size=0.01)},
    {"c": random_adapter(3, rank=2), "d": random_adapter(4, rank=5), "e": random_adapter(5, rank=3)},
    {"f": random_adapter(6, rank=6, shapes={"layer.0.query": SHAPES["layer.0.query"]})},
    {"g": random_adapter(7, rank=1)},
    {"h": random_adapter(8, rank=4, shapes={**SHAPES, "layer.1.dense": (10, 30)})},
]


class FullSvd:
    """Share's own form in one module: every task's reconstruction is kept dense and stacked again at each merge."""

    def __init__(self, weighting: str) -> None:
        self.weighting = weighting
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.sigma: dict[str, Tensor] = {}
        self.weight: dict[str, float] = {}

    def merge(self, incoming: Mapping[str, ModuleUpdate], ranks: tuple[int, int]) -> None:
        for task, update in incoming.items():
            self.sigma[task] = update.sigma_R.double()
            self.left[task] = update.u_NR.double() * self.sigma[task]
            self.right[task] = update.v_DR.double()
            self.weight[task] = 1 / float(update.delta().norm()) if self.weighting == "equal" else 1.0
        p = self._leading([self.weight[t] * self.left[t] for t in self.left], ranks[0])
        q = self._leading([self.weight[t] * self.right[t] * self.sigma[t] for t in self.left], ranks[1])
        for task in self.left:
            self.left[task] = p @ (p.T @ self.left[task])
            self.right[task] = q @ (q.T @ self.right[task])

    def delta(self, task: str) -> Tensor:
        return self.left[task] @ self.right[task].T

    @staticmethod
    def _leading(stacks: list[Tensor], rank: int) -> Tensor:
        return torch.linalg.svd(torch.cat(stacks, dim=1), full_matrices=False).U[:, :rank]


@pytest.mark.parametrize("weighting", ["equal", "energy"])
@pytest.mark.parametrize(
    "limit",
    [
        {"rank_fixed": 6},
        {"energy_ratio_min": 0.8},
        {"energy_ratio_min": 1.0, "rank_max": 9, "beyond_rank_max": "drop"},
    ],
)
def test_every_old_task_is_what_a_full_svd_of_all_reconstructions_leaves(
    weighting: str, limit: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = fresh_storage()
    store = opened(storage, weighting=weighting, **limit)
    reference: dict[str, FullSvd] = {}
    delivered: dict[str, dict[str, Tensor]] = {}
    worst = 0.0
    for round_ in ROUNDS:
        delivered |= {task: deltas(adapter) for task, adapter in round_.items()}
        version = merged(store, round_)
        for name in {name for adapter in round_.values() for name in adapter.modules}:
            incoming = {task: adapter.modules[name] for task, adapter in round_.items() if name in adapter.modules}
            reference.setdefault(name, FullSvd(weighting)).merge(incoming, store.basis(version.number)[name].ranks)
        reader = reading(storage)  # old coefficients come through storage and the transports
        for task, original in delivered.items():
            expected = {name: reference[name].delta(task) for name in original}
            found = deltas(reader.adapter(task, version.number))
            worst = max(worst, relative_distance(found, expected, original))
    with capsys.disabled():
        print(f"\n  largest relative difference to the full SVD, {weighting} {limit}: {worst:.1e}")
    assert worst <= 1e-6
    assert any(relative_distance(deltas(store.adapter(t, 6)), d, d) > 0.05 for t, d in delivered.items())


def test_reopening_between_merges_changes_no_bit() -> None:
    kept, reopened = fresh_storage(), fresh_storage()
    store = opened(kept)
    for round_ in ROUNDS:
        merged(store, round_)
        merged(opened(reopened), round_)
    other = reading(reopened)
    for task in other.state.tasks_at(6):
        one, two = store.adapter(task, 6), other.adapter(task, 6)
        for name, update in one.modules.items():
            assert torch.equal(update.u_NR, two.modules[name].u_NR)
            assert torch.equal(update.sigma_R, two.modules[name].sigma_R)
            assert torch.equal(update.v_DR, two.modules[name].v_DR)
    # What a merge says of tasks before it is computed from memory, which rounds in another order.
    assert store.state.versions[6].drift == pytest.approx(other.state.versions[6].drift, abs=2e-7)


def test_a_first_adapter_that_fits_comes_back_whole() -> None:
    store = opened(energy_ratio_min=1.0)
    version = merged(store, {"a": ROUNDS[0]["a"]})
    original = deltas(ROUNDS[0]["a"])
    assert relative_distance(deltas(store.adapter("a", 1)), original, original) < 2e-7
    # And the number says so: an energy computed carelessly in float32 would report 3e-4.
    assert version.added[0].error_at_birth < 1e-7


def test_drift_and_error_are_the_measured_changes() -> None:
    store = opened(energy_ratio_min=0.7)
    before: dict[str, dict[str, Tensor]] = {}
    delivered: dict[str, dict[str, Tensor]] = {}
    moved = 0.0
    for round_ in ROUNDS:
        version = merged(store, round_)
        delivered |= {task: deltas(adapter) for task, adapter in round_.items()}
        now = {task: deltas(store.adapter(task, version.number)) for task in delivered}
        drift = store.state.drift(version.number)
        assert drift.keys() == before.keys()
        for task, old in before.items():
            assert drift[task] == pytest.approx(relative_distance(now[task], old, delivered[task]), abs=1e-6)
            moved = max(moved, drift[task])
        for task in version.added:
            error = relative_distance(now[task.task_id], delivered[task.task_id], delivered[task.task_id])
            assert task.error_at_birth == pytest.approx(error, abs=1e-6)
        before = now
    assert moved > 0.05


@pytest.mark.parametrize("angle", range(1, 20))
def test_what_is_lost_is_never_negative(angle: int) -> None:
    sin, cos = math.sin(angle), math.cos(angle)
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    tasks = ModuleTasks.of(TaskBlock(("a",), (2,), torch.tensor([[1.0], [0.01]]) * turn, turn, torch.ones(2), one, one))
    both, first, second, none = torch.eye(2).double(), *torch.eye(2).double().split(1), torch.zeros(0, 2).double()
    tasks, lost_T = tasks.truncated(Transport(both, first), Transport(none, second))
    assert float(lost_T) == pytest.approx(1e-4, abs=2e-7)
    # What lies in the other side's direction has gone with that one: nothing is left to lose.
    tasks, lost_T = tasks.truncated(Transport(first, first[:, :1]), Transport(second, none[:, :1]))
    assert 0 <= float(lost_T) < 1e-10


def test_two_at_work_at_once_leave_the_number_of_blas_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one, other = (in_order(abs, [1, 2, 3], workers) for workers in (1, 2))
        assert (next(one), next(other), torch.get_num_threads()) == (1, 1, 1)
        assert (list(one), list(other)) == ([2, 3], [2, 3])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_merge_that_takes_nothing_reports_no_drift() -> None:
    store = opened(energy_ratio_min=1.0)
    merged(store, {"a": random_adapter(1, rank=2)})
    merged(store, {"b": random_adapter(2, rank=2)})
    assert store.state.drift(2)["a"] < 1e-6


def test_the_bound_of_two_versions_holds() -> None:
    store = opened(energy_ratio_min=0.7)
    for round_ in ROUNDS:
        merged(store, round_)
    original = deltas(ROUNDS[0]["a"])
    moved = relative_distance(deltas(store.adapter("a", 1)), deltas(store.adapter("a", 6)), original)
    bound = store.state.drift_bound("a", 1, 6)
    assert moved <= bound + 1e-6
    assert bound < 4 * moved


@pytest.mark.parametrize("ratio", [0.7, 0.95])
def test_every_task_keeps_its_share_in_every_module_after_all_merges(ratio: float) -> None:
    store = opened(energy_ratio_min=ratio, rank_max=64)
    for round_ in ROUNDS:
        version = merged(store, round_)
        for task in store.state.tasks_at(version.number):
            for name, update in store.adapter(task, version.number).modules.items():
                share = update.energy / store.delivered(task).modules[name].energy
                assert share >= ratio - 1e-6, (version.number, task, name)
    # Not by keeping everything: all ranks together would be 31 in this module of 24×20.
    assert max(store.basis(version.number)["layer.0.query"].ranks) < 20


def test_the_cap_binds_before_the_promise() -> None:
    store = opened(energy_ratio_min=1.0, rank_max=3)
    for round_ in ROUNDS[:3]:
        version = merged(store, round_)
    assert {b.ranks for b in store.basis(version.number).values()} == {(3, 3)}


def test_a_fixed_rank_is_that_rank_or_what_there_is() -> None:
    store = opened(rank_fixed=6)
    for round_ in ROUNDS[:2]:
        merged(store, round_)
    assert [store.basis(number)["layer.0.query"].ranks for number in (1, 2)] == [(4, 4), (6, 6)]


def test_equal_weights_protect_a_small_task_and_energy_does_not() -> None:
    errors = {}
    for weighting in ("equal", "energy"):
        store = opened(weighting=weighting, rank_fixed=6)
        merged(store, {"large": random_adapter(1, rank=6, size=10), "small": random_adapter(2, rank=6, size=0.01)})
        errors[weighting] = store.state.tasks_at(1)["small"].error_at_birth
    assert errors["equal"] < 0.8 * errors["energy"]


@pytest.mark.parametrize("size", [1e-8, 1e-12])
@pytest.mark.parametrize("groups", [["small", "large"], ["large", "small"], ["small large"], ["large small", "more"]])
def test_a_task_of_any_size_is_kept_while_there_is_room(size: float, groups: list[str]) -> None:
    adapters = {"small": random_adapter(1, size=size), "large": random_adapter(2), "more": random_adapter(3)}
    store = opened(weighting="energy", energy_ratio_min=0.98)
    for group in groups:
        merged(store, {task: adapters[task] for task in group.split()})
    newest = store.state.refs[CANDIDATE]
    reader = reading(store.storage)
    for task in store.state.tasks_at(newest):
        original = deltas(adapters[task])
        assert relative_distance(deltas(reader.adapter(task, newest)), original, original) <= 0.02**0.5 + 1e-6
    assert verify(store) == []


def test_the_rounding_of_a_large_task_is_no_direction_of_its_own() -> None:
    store = opened(weighting="energy", energy_ratio_min=1.0)
    merged(store, {"large": random_adapter(2, rank=4), "small": random_adapter(1, rank=2, size=1e-8)})
    merged(store, {"again": random_adapter(2, rank=4)})  # its rounding is larger than all of the small one
    assert set(store.ranks(2).values()) == {(6, 6)}


def test_a_basis_that_loses_old_directions_says_so_in_the_drift() -> None:
    # Raw factors of sizes from 1e-4 to 1e4, which the paper stacks: those of the second hide small ones of the first.
    def adapter(seed: int, exponents: list[float]) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        sizes = 10.0 ** torch.tensor(exponents)
        n, d = SHAPES["layer.0.query"]
        b, a = torch.randn(n, 4, generator=generator), torch.randn(4, d, generator=generator)
        return Adapter(BASE, "", {"layer.0.query": canonical_update(b * sizes, a / sizes[:, None], 1.0)})

    store = opened(variant="paper", rank_max=11)
    merged(store, {"a": adapter(1, [-4, -2, 0, 2])})
    merged(store, {"b": adapter(2, [4, 3, -1, -3])})
    merged(store, {"c": adapter(3, [1, 4, -4, 0])})
    assert max(store.state.drift(3).values()) > 0.01  # 12 directions in 11
    assert verify(store) == []


@pytest.mark.parametrize("variant", ["canonical", "paper"])
def test_adapters_of_one_span_need_no_new_directions_however_many_merges_rounded_the_basis(variant: str) -> None:
    generator = torch.Generator().manual_seed(1)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((24, 4), (4, 20)))
    settings, modules = SubspaceSettings.model_validate({"variant": variant, "rank_fixed": 12}), {}
    for number in range(100):
        mix = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
        adapter = Adapter(BASE, "", {"layer.0.query": canonical_update(b @ mix[0], mix[1] @ a, 1.0)})
        modules = dict(merge_adapters(modules, {f"t{number}": adapter}, settings).modules)
    assert modules["layer.0.query"].basis.ranks == (4, 4)


@pytest.mark.parametrize("limit", [{"rank_max": 1}, {"rank_fixed": 1}])
@pytest.mark.parametrize("groups", [["a b"], ["a", "b"], ["zero", "a b"]])
def test_the_two_sides_of_one_direction_are_not_of_two_tasks(limit: dict[str, int], groups: list[str]) -> None:
    # a = e1·e1ᵀ + 0.9·e2·e2ᵀ and b = 0.9·e2·e3ᵀ: the strongest output is e2 (1.62), the strongest input e1 (1).
    def adapter(*entries: tuple[int, int, float]) -> Adapter:
        (n, d), values = SHAPES["layer.0.query"], torch.tensor([value for *_, value in entries])
        rows, columns = torch.eye(n)[:, [i for i, *_ in entries]], torch.eye(d)[[j for _, j, _ in entries]]
        return Adapter(BASE, "", {"layer.0.query": canonical_update(rows * values, columns, 1.0)})

    adapters = {"a": adapter((0, 0, 1.0), (1, 1, 0.9)), "b": adapter((1, 2, 0.9)), "zero": zero_adapter(2)}
    store = opened(weighting="energy", **limit)
    for group in groups:
        version = merged(store, {task: adapters[task] for task in group.split()})
    assert set(store.ranks(version.number).values()) == {(1, 1)}
    kept = [sum(u.energy for u in store.adapter(task, version.number).modules.values()) for task in "ab"]
    assert max(kept) > 0.8
    assert verify(store) == []


def zero_adapter(rank: int) -> Adapter:
    n, d = SHAPES["layer.0.query"]
    update = canonical_update(torch.zeros(n, rank), torch.zeros(rank, d), 1.0)
    return Adapter(BASE, "", {"layer.0.query": update})


@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_of_nothing_merges_first_last_and_alone(rank: int) -> None:
    store = opened()
    assert merged(store, {"zero": zero_adapter(rank)}).rank_max == 0
    merged(store, {"a": random_adapter(1)})
    version = merged(store, {"later": zero_adapter(rank)})
    assert version.added[0].error_at_birth == 0.0
    assert store.state.drift(3)["zero"] == 0.0
    reader = reading(store.storage)
    for task in ("zero", "later"):
        assert float(deltas(reader.adapter(task, 3))["layer.0.query"].norm()) == 0.0
    original = deltas(random_adapter(1))
    assert relative_distance(deltas(reader.adapter("a", 3)), original, original) < 0.15  # 2 % of the energy may go


def test_the_same_adapter_twice_needs_no_new_directions() -> None:
    store = opened(energy_ratio_min=1.0)
    merged(store, {"a": ROUNDS[0]["a"]})
    merged(store, {"again": ROUNDS[0]["a"]})
    assert [b.ranks for b in store.basis(2).values()] == [b.ranks for b in store.basis(1).values()]


def test_modules_that_a_merge_does_not_touch_stay_as_they_are() -> None:
    modules: dict[str, ModuleSubspace] = dict(merge_adapters({}, {"a": random_adapter(1)}, SubspaceSettings()).modules)
    one = {"b": random_adapter(2, shapes={"layer.0.value": SHAPES["layer.0.value"]})}
    merge = merge_adapters(modules, one, SubspaceSettings())
    assert merge.modules["layer.0.query"] is modules["layer.0.query"]
    assert set(merge.transports) == {"layer.0.value"}
    assert set(reconstruct(merge.modules, "b")) == {"layer.0.value"}
