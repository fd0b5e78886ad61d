"""Once there are enough tasks, each module gets a basis of the leading directions of all of them, beside the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from configs.errors import Corrupt, InvalidInput, RefusedAdapters
from configs.settings import SubspaceSettings
from subspace_store import Adapter, SubspaceReader, SubspaceStore
from subspace_store.commands.app import app
from subspace_store.export import export_tasks
from subspace_store.formats.peft import read_peft_folder
from subspace_store.log import fold, version_log
from subspace_store.log.version import CANDIDATE
from subspace_store.merging.basis import reconstruct
from subspace_store.merging.merge import merge_adapters
from subspace_store.merging.overlap import overlap
from subspace_store.merging.subspace_math import weighted_sum
from subspace_store.merging.variants import merge_all
from subspace_store.module_names import is_renewed, newest, plain, renewed
from subspace_store.storage.local import LocalStorage
from subspace_store.subspace_reader import without_renewal
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    BASE,
    deltas,
    foundation_adapter,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
    trained_in,
)
from tests.subspace_store.test_sharing import SHAPES, sized

TASKS, DIRECTIONS = 5, 6
SETTINGS: dict[str, Any] = {
    "share": "if-it-pays",
    "seed_directions": 8,
    "renew_tasks": TASKS,
    "renew_directions": DIRECTIONS,
}
RENEWED = {renewed(name): (DIRECTIONS, DIRECTIONS) for name in SHAPES}
SIDES = sum(sum(shape) for shape in SHAPES.values())


def firsts(count: int = TASKS, seed: int = 0) -> dict[str, Adapter]:
    """The tasks that make the bases: the first two of rank 4 fill the first basis, the others are beside it."""
    return {f"t{n}": sized(random_adapter(seed + n, shapes=SHAPES)) for n in range(count)}


def renewing(count: int = TASKS, **settings: Any) -> SubspaceStore:
    """A store into which the first tasks were merged one by one."""
    store = opened(**SETTINGS | settings)
    for task, adapter in firsts(count).items():
        merged(store, {task: adapter})
    return store


def with_tasks(count: int = 3) -> tuple[SubspaceStore, dict[str, Adapter]]:
    """The same, with tasks that were trained in the renewed basis."""
    store = renewing()
    adapters = {f"in-{n}": trained_in(store.training_basis(TASKS), n) for n in range(count)}
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    return store, adapters


def error(reader: SubspaceReader, task: str, adapter: Adapter, version: int) -> float:
    whole = deltas(adapter)
    return relative_distance(deltas(reader.adapter(task, version)), whole, whole)


def leading(reader: SubspaceReader, version: int, name: str) -> tuple[Tensor, Tensor]:
    """The directions by the definition, from dense matrices: SVD of all tasks' updates, each divided by its norm, side
    by side; of the transposed ones for the inputs."""
    updates = []
    for task in reader.state.tasks_at(version):
        delta = reader.adapter(task, version).modules[name].delta()
        updates.append(delta / delta.norm())
    sides = torch.cat(updates, dim=1), torch.cat([delta.T for delta in updates], dim=1)
    out, inward = (torch.linalg.svd(side, full_matrices=False)[0][:, :DIRECTIONS] for side in sides)
    return out, inward


def spans_the_leading_directions(reader: SubspaceReader, version: int) -> None:
    for name in SHAPES:
        out, inward = leading(reader, version, name)
        basis = reader.basis(version)[renewed(name)]
        assert overlap(basis.p_NK.numpy(), out.float().numpy()) == pytest.approx(1.0, abs=1e-6)
        assert overlap(basis.q_DK.numpy(), inward.float().numpy()) == pytest.approx(1.0, abs=1e-6)
    assert verify(reader, deep=True) == []


def at(store: SubspaceReader) -> int:
    return store.state.refs[CANDIDATE]


def test_names_of_bases_lead_to_their_modules_and_the_newest_is_the_renewed_one() -> None:
    assert [plain(renewed("a.b")), plain("a.b"), renewed("a.b")] == ["a.b", "a.b", "a.b@2"]
    assert [is_renewed("a.b"), is_renewed(renewed("a.b"))] == [False, True]
    assert newest(["b@2", "a", "b"]) == {"a": "a", "b": "b@2"}


def test_a_module_with_the_mark_in_its_name_is_refused_at_the_door() -> None:
    store = opened(**SETTINGS)
    with pytest.raises(InvalidInput, match="'@' in its name"):
        merged(store, {"x": random_adapter(1, shapes={"layer@2": (24, 20)})})
    assert store.state.versions == {}


# Made once


def test_the_renewed_basis_spans_what_a_direct_svd_of_all_tasks_spans() -> None:
    store = renewing()
    assert not any(map(is_renewed, store.ranks(TASKS - 1)))
    reader = reading(store.storage)
    assert {name: ranks for name, ranks in reader.ranks(TASKS).items() if is_renewed(name)} == RENEWED
    held = reader.state.tasks_at(TASKS).values()
    assert [task.private is None for task in held] == [True, True, False, False, False]  # of both kinds
    spans_the_leading_directions(reader, TASKS)
    bases = reader.basis(TASKS)
    for name in SHAPES:  # neither the first basis nor its first directions
        assert overlap(bases[renewed(name)].p_NK.numpy(), bases[name].p_NK.numpy()) < 0.9
    version = reader.state.versions[TASKS]
    assert (version.module_count, version.renewed_count) == (len(SHAPES), len(SHAPES))


def test_tasks_in_the_foundation_and_a_group_of_new_ones_are_among_those_that_make_it() -> None:
    store = opened(**SETTINGS)
    merged(store, {"inside": sized(foundation_adapter(1, shapes=SHAPES))})
    merged(store, firsts(4))  # the first with a basis and the last of the five at once
    assert RENEWED.items() <= store.ranks(2).items()
    spans_the_leading_directions(reading(store.storage), 2)


def test_a_task_that_is_partly_in_the_first_basis_and_partly_beside_it_counts_as_a_whole() -> None:
    store = renewing(TASKS - 1, rank_max=8)  # the first basis is full
    inside, outside = trained_in(store.basis(TASKS - 1), 1), random_adapter(7, 2, SHAPES)
    both = {n: weighted_sum((update, outside.modules[n]), (1.0, 0.05)) for n, update in inside.modules.items()}
    merged(store, {"both": replace(inside, modules=both)})
    assert store.state.tasks_at(TASKS)["both"].private is not None
    assert store.coefficient_numbers(TASKS)["both"] > 0
    spans_the_leading_directions(reading(store.storage), TASKS)


def test_no_task_moves_by_a_bit_in_that_merge_nor_in_later_ones() -> None:
    store = renewing(TASKS - 1)
    before = {task: deltas(store.adapter(task, TASKS - 1)) for task in firsts(TASKS - 1)}
    adapters = {"t4": firsts()["t4"], "later": sized(random_adapter(50, shapes=SHAPES))}
    merged(store, {"t4": adapters["t4"]})
    merged(store, {"in": trained_in(store.training_basis(TASKS), 1)})
    merged(store, {"later": adapters["later"]})
    reader = reading(store.storage)
    for version in range(TASKS, TASKS + 3):
        for task, known in before.items():
            assert all(torch.equal(delta, known[name]) for name, delta in deltas(reader.adapter(task, version)).items())
        assert not any(reader.state.drift(version).values())
    renewed_before, renewed_after = reader.basis(TASKS), reader.basis(TASKS + 2)
    assert all(torch.equal(renewed_before[name].p_NK, renewed_after[name].p_NK) for name in RENEWED)
    assert {reader.homes(TASKS + 2)[name] for name in RENEWED} == {TASKS}  # written once


def test_adapters_that_are_brought_are_no_reason_to_make_one() -> None:
    # 120 unrelated ones would pay four hundredths for directions that nobody trains in.
    store = opened(**SETTINGS)
    for n in range(TASKS - 1):
        merged(store, {f"brought-{n}": random_adapter(50 + n, shapes=SHAPES)})
    for task, adapter in firsts(TASKS).items():
        assert not any(map(is_renewed, store.ranks(at(store))))
        merged(store, {task: adapter})
    spans_the_leading_directions(reading(store.storage), at(store))


def test_it_costs_its_directions_and_every_count_of_numbers_says_so() -> None:
    store = renewing(TASKS - 1)
    plainly = opened(**SETTINGS | {"renew_tasks": 0})
    for task, adapter in firsts().items():
        merged(plainly, {task: adapter})
    merged(store, {"t4": firsts()["t4"]})
    with_it, without = store.footprint(TASKS), plainly.footprint(TASKS)
    assert with_it.basis_numbers - without.basis_numbers == DIRECTIONS * SIDES
    assert with_it.total_numbers - without.total_numbers == DIRECTIONS * SIDES
    assert not any(map(is_renewed, plainly.ranks(TASKS)))
    in_memory = sum(module.numbers for module in store.subspace(TASKS).values())
    assert in_memory == with_it.total_numbers


@pytest.mark.parametrize(
    "settings",
    [{"renew_tasks": 0}, {"share": "always"}, {"beyond_rank_max": "drop"}, {"rank_fixed": 6}, {"variant": "paper"}],
    ids=str,
)
def test_it_is_made_only_where_promises_are_kept_and_sharing_has_to_pay(settings: dict[str, Any]) -> None:
    store = renewing(TASKS + 1, **settings)
    assert not any(map(is_renewed, store.ranks(TASKS + 1)))
    assert {version.renewed_count for version in store.state.versions.values()} == {0}


def test_a_store_that_has_many_tasks_already_gets_it_at_its_next_merge() -> None:
    store = opened(renewing(TASKS + 2, renew_tasks=0).storage, "newer", **SETTINGS)
    assert store.training_ranks(TASKS + 2) == store.ranks(TASKS + 2)
    merged(store, {"next": sized(random_adapter(60, shapes=SHAPES))})
    assert set(store.training_ranks(TASKS + 3).values()) == {(DIRECTIONS, DIRECTIONS)}
    assert verify(reading(store.storage), deep=True) == []


def test_a_module_with_fewer_directions_gets_none_and_is_trained_in_the_first_basis() -> None:
    store = opened(**SETTINGS)
    wide = "layer.1.wide"
    for number, (task, adapter) in enumerate(firsts().items()):
        extra = random_adapter(number, rank=1, shapes={wide: (40, 30)}) if number < 2 else None
        merged(store, {task: replace(adapter, modules={**adapter.modules, **extra.modules}) if extra else adapter})
    ranks = store.ranks(TASKS)
    assert renewed(wide) not in ranks
    assert RENEWED.items() <= ranks.items()
    assert store.training_ranks(TASKS) == {wide: ranks[wide]} | dict.fromkeys(SHAPES, (DIRECTIONS, DIRECTIONS))
    assert set(store.training_basis(TASKS)) == {wide, *SHAPES}


def test_without_a_store_a_merge_makes_the_same_bases() -> None:
    store = renewing()
    merged(store, {"in": trained_in(store.training_basis(TASKS), 1)})
    modules: Any = {}
    for task, adapter in {**firsts(), "in": trained_in(store.training_basis(TASKS), 1)}.items():
        modules = merge_adapters(modules, {task: adapter}, SubspaceSettings(**SETTINGS), set(firsts())).modules
    assert {name: module.basis.ranks for name, module in modules.items()} == store.ranks(TASKS + 1)
    assert sum(module.numbers for module in modules.values()) == store.footprint(TASKS + 1).total_numbers
    for task in store.state.tasks_at(TASKS + 1):
        found = {name: update.delta() for name, update in reconstruct(modules, task).items()}
        assert relative_distance(found, deltas(store.adapter(task, TASKS + 1)), found) < 1e-6


# Tasks that are trained in it


def test_what_lies_in_it_costs_its_coefficients_there_and_is_kept_exactly() -> None:
    store, adapters = with_tasks()
    before, after = store.footprint(TASKS), store.footprint(TASKS + 3)
    assert after.coefficient_numbers - before.coefficient_numbers == 3 * len(SHAPES) * 3 * 2 * DIRECTIONS
    assert after.total_numbers - before.total_numbers == 3 * len(SHAPES) * 3 * 2 * DIRECTIONS
    reader = reading(store.storage)
    for task, adapter in adapters.items():
        assert reader.coefficient_numbers(TASKS + 3)[task] == len(SHAPES) * 3 * 2 * DIRECTIONS
        assert reader.state.tasks_at(TASKS + 3)[task].private is None
        assert error(reader, task, adapter, TASKS + 3) < 1e-6
        assert reader.adapter(task, TASKS + 3).modules.keys() == SHAPES.keys()
        for name in SHAPES:
            assert task in reader.module(renewed(name), TASKS + 3).tasks.task_ids
            assert task not in reader.module(name, TASKS + 3).tasks.task_ids
    one = reader.adapter("in-0", TASKS + 3, [next(iter(SHAPES))])
    assert list(one.modules) == [next(iter(SHAPES))]
    found = reconstruct(reader.subspace(TASKS + 3), "in-1")
    assert found.keys() == SHAPES.keys()
    assert verify(reader, deep=True) == []


def test_an_update_outside_goes_where_it_went_before_there_was_one() -> None:
    store = renewing()
    plainly = opened(**SETTINGS | {"renew_tasks": 0})
    for task, adapter in firsts().items():
        merged(plainly, {task: adapter})
    inside = trained_in(store.training_basis(TASKS), 1)
    beside = {
        n: weighted_sum((u, random_adapter(7, 1, SHAPES).modules[n]), (1.0, 1e-3)) for n, u in inside.modules.items()
    }
    news = {
        "a LoRA": sized(random_adapter(70, shapes=SHAPES)),
        "of an older lease": trained_in({name: store.basis(TASKS)[name] for name in SHAPES}, 2),
        "almost inside": replace(inside, modules=beside),
    }
    for task, adapter in news.items():
        for one in (store, plainly):
            merged(one, {task: adapter})
    last = TASKS + len(news)
    assert store.coefficient_numbers(last) == plainly.coefficient_numbers(last)
    assert store.footprint(last).private_numbers == plainly.footprint(last).private_numbers
    assert [store.module(name, last).tasks.task_ids for name in RENEWED] == [(), ()]
    for task in news:
        now, then = deltas(store.adapter(task, last)), deltas(plainly.adapter(task, last))
        assert all(torch.equal(now[name], then[name]) for name in now)
    forecasts = (
        store.forecast({"new": random_adapter(71, shapes=SHAPES)}),
        plainly.forecast({"new": random_adapter(71, shapes=SHAPES)}),
    )
    assert forecasts[0].error_at_birth == forecasts[1].error_at_birth


def test_an_adapter_may_lie_in_it_in_one_module_and_not_in_the_other() -> None:
    store = renewing()
    one, other = SHAPES
    inside, outside = trained_in(store.training_basis(TASKS), 1), sized(random_adapter(70, shapes=SHAPES))
    mixed = replace(inside, modules={one: inside.modules[one], other: outside.modules[other]})
    merged(store, {"mixed": mixed, "in": inside})
    reader = reading(store.storage)
    assert reader.module(renewed(one), TASKS + 1).tasks.task_ids == ("mixed", "in")
    assert reader.module(renewed(other), TASKS + 1).tasks.task_ids == ("in",)
    for task, adapter in {"mixed": mixed, "in": inside}.items():
        assert error(reader, task, adapter, TASKS + 1) < 1e-6
    of_mixed = reader.basis_of("mixed", TASKS + 1)
    assert (of_mixed[one].ranks, of_mixed[other].ranks) == ((DIRECTIONS, DIRECTIONS), reader.ranks(TASKS + 1)[other])
    assert verify(reader, deep=True) == []


def test_without_the_routing_such_a_task_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above are for: broken by hand, the numbers tell."""
    monkeypatch.setattr("subspace_store.merge_writer.routed", lambda read, adapters, at_once: dict(adapters))
    store, adapters = with_tasks(1)
    assert store.coefficient_numbers(TASKS + 1).get("in-0") != len(SHAPES) * 3 * 2 * DIRECTIONS
    assert error(store, "in-0", adapters["in-0"], TASKS + 1) < 1e-5  # a promise is kept anyway


def test_a_forecast_knows_that_it_costs_nothing_to_lie_in_it() -> None:
    store = renewing()
    found = store.forecast({"in": trained_in(store.training_basis(TASKS), 1)})
    assert found.error_at_birth["in"] < 1e-6
    assert found.spanned["in"] == pytest.approx(1.0, abs=1e-6)
    assert set(found.ranks) == set(RENEWED)
    assert not any(found.drift.values())


def test_a_task_in_it_outlives_the_removal_of_a_task_that_made_it() -> None:
    store, adapters = with_tasks()
    bases = store.basis(TASKS + 3)
    preview = store.preview_remove("t1")
    version = store.remove("t1", op_key="r", actor="ann")
    assert version is not None
    assert version.renewed_count == len(SHAPES)
    reader = reading(store.storage)
    assert preview.numbers_after == reader.footprint(version.number).total_numbers
    for name in RENEWED:
        assert torch.equal(reader.basis(version.number)[name].p_NK, bases[name].p_NK)
    for task, adapter in {**firsts(), **adapters}.items():
        if task != "t1":
            assert error(reader, task, adapter, version.number) < 1e-6
    for task in adapters:
        assert reader.coefficient_numbers(version.number)[task] == len(SHAPES) * 3 * 2 * DIRECTIONS
    assert verify(reader, deep=True) == []
    store.publish(version.number, op_key="p", actor="ann")
    dead = [number for number in store.state.versions if number != version.number]
    store.expire(
        [number for number in dead if number not in {v.number for v in store.state.lineage(version.number)}],
        actor="ann",
    )
    opened(store.storage, "next", **SETTINGS).collect()
    after = reading(store.storage)
    assert error(after, "in-0", adapters["in-0"], version.number) < 1e-6
    assert verify(after, deep=True) == []


def test_removed_itself_it_leaves_the_basis_to_others() -> None:
    store, adapters = with_tasks(2)
    version = store.remove("in-0", op_key="r", actor="ann")
    assert version is not None
    assert error(store, "in-1", adapters["in-1"], version.number) < 1e-6
    assert "in-0" not in store.coefficient_numbers(version.number)
    assert RENEWED.items() <= store.ranks(version.number).items()


@pytest.mark.parametrize("all_inside", [False, True])
def test_a_compaction_carries_it_over_and_places_there_what_lies_in_it(all_inside: bool) -> None:
    store, adapters = with_tasks()
    if all_inside:
        for task in firsts():
            store.remove(task, op_key=f"remove {task}", actor="ann")
    number = at(store)
    bases, before = (
        store.basis(number),
        {task: deltas(store.adapter(task, number)) for task in store.state.tasks_at(number)},
    )
    preview = store.preview_compact()
    version = store.compact(op_key="c", actor="ann")
    reader = reading(store.storage)
    assert (version.renewed_count, version.module_count) == (len(SHAPES), len(SHAPES))
    assert preview.numbers_after == reader.footprint(version.number).total_numbers
    for name in RENEWED:
        assert torch.equal(reader.basis(version.number)[name].p_NK, bases[name].p_NK)
    for task, known in before.items():
        assert relative_distance(deltas(reader.adapter(task, version.number)), known, known) < 1e-6
    for task in adapters:
        assert reader.coefficient_numbers(version.number)[task] == len(SHAPES) * 3 * 2 * DIRECTIONS
    if all_inside:
        assert [reader.ranks(version.number)[name] for name in SHAPES] == [(0, 0)] * len(SHAPES)
    assert verify(reader, deep=True) == []
    merged(store, {"after": trained_in(store.training_basis(version.number), 9)})
    assert store.coefficient_numbers(at(store))["after"] == len(SHAPES) * 3 * 2 * DIRECTIONS


def test_a_compaction_makes_none() -> None:
    store = opened(renewing(TASKS + 1, renew_tasks=0).storage, "newer", **SETTINGS)
    preview = store.preview_compact()
    version = store.compact(op_key="c", actor="ann")
    assert version.renewed_count == 0
    assert preview.numbers_after == store.footprint(version.number).total_numbers


def test_a_refinement_trains_a_task_in_the_basis_that_holds_it() -> None:
    store, adapters = with_tasks(2)
    holding = store.basis_of("in-0", TASKS + 2)
    assert {name: basis.ranks for name, basis in holding.items()} == store.training_ranks(TASKS + 2)
    assert store.basis_of("t0", TASKS + 2)["layer.0.query"].ranks == store.ranks(TASKS + 2)["layer.0.query"]
    again = trained_in(holding, 20)
    version = refined(store, {"in-0": again})
    assert version.renewed_count == len(SHAPES)
    reader = reading(store.storage)
    assert error(reader, "in-0", again, version.number) < 1e-6
    assert error(reader, "in-1", adapters["in-1"], version.number) < 1e-6
    assert reader.coefficient_numbers(version.number)["in-0"] == len(SHAPES) * 3 * 2 * DIRECTIONS
    assert verify(reader, deep=True) == []
    with pytest.raises(RefusedAdapters, match="outside the basis"):
        refined(store, {"in-1": random_adapter(1, shapes=SHAPES)}, "elsewhere")
    assert version.number == at(store)


def test_it_is_exported_and_read_from_a_snapshot_and_given_up_adapters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("subspace_store.merge_writer._snapshot_is_due", lambda *given: True)
    store, adapters = with_tasks()
    assert store.state.versions[TASKS + 1].snapshot is not None
    store.publish(TASKS + 3, op_key="p", actor="ann")
    store.drop_adapters(["in-0", "t0"], actor="ann")
    store.expire(list(range(1, TASKS + 3)), actor="ann")
    opened(store.storage, "next", **SETTINGS).collect()
    reader = reading(store.storage)
    for task, adapter in adapters.items():
        assert error(reader, task, adapter, TASKS + 3) < 1e-6
    assert verify(reader, deep=True) == []
    (found,) = export_tasks(reader, tmp_path, tasks=["in-1"], base_source="base")
    whole = deltas(adapters["in-1"])
    assert relative_distance(deltas(read_peft_folder(tmp_path / found.name, BASE, "")), whole, whole) < 1e-6
    store = opened(store.storage, "again", **SETTINGS)
    version = store.remove("t3", op_key="r", actor="ann")  # in-0 is merged again from its coefficients
    assert version is not None
    assert error(store, "in-0", adapters["in-0"], version.number) < 1e-6
    assert store.coefficient_numbers(version.number)["in-0"] == len(SHAPES) * 3 * 2 * DIRECTIONS


def test_ways_to_merge_are_compared_and_orders_tried_with_the_bases_that_tasks_were_trained_in(tmp_path: Path) -> None:
    store = opened(LocalStorage(str(tmp_path)), **SETTINGS)
    adapters = firsts()
    for task, adapter in adapters.items():
        merged(store, {task: adapter})
    adapters["in"] = trained_in(store.training_basis(TASKS), 1)
    store.publish(merged(store, {"in": adapters["in"]}).number, op_key="p", actor="ann")
    settings, start = without_renewal(SubspaceSettings()), store.renewed(TASKS + 1)
    with_it, without = (merge_all(adapters, "canonical", settings, begin) for begin in (start, {}))
    # In the first basis, or beside it, the task takes more than its coefficients.
    assert with_it.stored_numbers - DIRECTIONS * SIDES < without.stored_numbers
    run = CliRunner().invoke(app, ["compare", "--json", "--store", store.storage.url])
    assert json.loads(run.stdout)["canonical"]["stored_numbers"] == with_it.stored_numbers
    assert json.loads(run.stdout)["canonical"]["error"]["in"] < 1e-6
    run = CliRunner().invoke(app, ["reorder", "--orders", "2", "--json", "--store", store.storage.url])
    assert max(row["orders"]["high"] for row in json.loads(run.stdout)["tasks"]) < 1e-5


def test_a_difference_of_versions_names_the_bases_that_are_new() -> None:
    store = renewing()
    found = store.diff(TASKS - 1, TASKS)
    assert {name: ranks for name, ranks in found.ranks.items() if is_renewed(name)} == {
        name: ((0, 0), ranks) for name, ranks in RENEWED.items()
    }
    assert set(found.overlap) == set(SHAPES)


def test_verify_finds_a_task_that_both_bases_of_a_module_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = with_tasks(1)
    module = SubspaceReader.module

    def twice(self: SubspaceReader, name: str, version: Any = None, private_of: Any = None) -> Any:
        return module(self, renewed(plain(name)) if version == TASKS + 1 else name, version, private_of)

    monkeypatch.setattr(SubspaceReader, "module", twice)
    assert any("coefficients in both bases" in finding.what for finding in verify(store, deep=True))


def test_a_release_that_does_not_know_renewed_bases_stops_instead_of_reading_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(version_log, "CHECKPOINT_EVERY", 3)
    store, _ = with_tasks(1)
    refined(store, {"in-0": trained_in(store.training_basis(TASKS), 3)})
    ops = [entry.op for entry in store.history() if entry.op != "acquire"]
    assert ops == ["merge-private"] * (TASKS - 1) + ["merge-renewed"] * 2 + ["refine-renewed"]
    assert at(opened(store.storage, "newer", **SETTINGS)) == TASKS + 2
    keys = store.storage.keys("checkpoints/")
    assert any(version_log.STATE_WITH_RENEWED in json.loads(store.storage.read(key)) for key in keys)
    # As the release before reads.
    monkeypatch.setattr(fold, "MAKES_VERSION", fold.MAKES_VERSION - set(fold.RENEWED.values()))
    monkeypatch.setattr(version_log, "STATE_WITH_RENEWED", "state")
    with pytest.raises(Corrupt, match="merge-renewed"):
        reading(store.storage)
