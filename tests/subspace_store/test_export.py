"""Exports: whole folders under names that never change their meaning, in the form that servers take."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound
from subspace_store import Adapter, StagedAdapter, Storage, SubspaceStore
from subspace_store.export import export_name, export_one, export_tasks
from subspace_store.formats.diffusers import read_diffusers_file
from subspace_store.formats.peft import read_peft_folder
from subspace_store.merging.one_for_all import ONE_FOR_ALL
from subspace_store.subspace_reader import SubspaceReader
from tests.subspace_store.builders import fresh_storage, merged, opened, random_adapter, reading


def headless(adapter: Adapter, **info: str) -> Adapter:
    return dataclasses.replace(adapter, head={}, info=info)


def two_versions() -> tuple[Storage, SubspaceReader]:
    """Version 1 holds a task with a head, version 2 one without as well, of mixed ranks; `main` is version 2."""
    storage = fresh_storage()
    store = opened(storage, rank_fixed=6)
    merged(store, {"headed": random_adapter(1)})
    other, wide = random_adapter(2, rank=2), random_adapter(2, rank=3)
    mixed = {name: (wide if "value" in name else other).modules[name] for name in other.modules}
    merged(store, {"bare": headless(dataclasses.replace(other, modules=mixed))})
    store.publish(2, op_key="publish", actor="test")
    return storage, reading(storage)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with the time it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_holds(folder: Path, adapter: Adapter) -> None:
    read = read_peft_folder(folder, adapter.base_model, "")
    assert set(read.modules) == set(adapter.modules)
    for name, update in adapter.modules.items():
        assert torch.allclose(read.modules[name].delta(), update.delta(), atol=1e-6)
    assert {name: t.tolist() for name, t in read.head.items()} == {n: t.tolist() for n, t in adapter.head.items()}


def test_all_tasks_of_main_are_written_at_once_and_hold_what_the_version_holds(tmp_path: Path) -> None:
    _, reader = two_versions()
    exported = export_tasks(reader, tmp_path / "new/folder", base_source="some/base")
    assert [(e.name, e.task, e.task_id, e.version) for e in exported] == [
        ("team+headed@v2", "team/headed", "headed", 2),
        ("team+bare@v2", "team/bare", "bare", 2),
    ]
    for one in exported:
        assert_holds(tmp_path / "new/folder" / one.name, reader.adapter(one.task_id, 2))
    names = {path.name for path in (tmp_path / "new/folder").iterdir()}
    assert names == {"team+headed@v2", "team+bare@v2", "adapters.json"}


def test_an_export_says_its_labels_and_the_digest_of_its_base_model(tmp_path: Path) -> None:
    store = opened(fresh_storage())
    labelled = dataclasses.replace(random_adapter(1), info={"label_names": json.dumps(["no", "yes"])})
    merged(store, {"labelled": dataclasses.replace(labelled, base_sha256="ab" * 32)})
    store.publish(1, op_key="publish", actor="test")
    (exported,) = export_tasks(store, tmp_path, base_source="some/base")
    facts = json.loads((tmp_path / exported.name / "onebasis.json").read_text())
    assert (facts["label_names"], facts["base_sha256"]) == (["no", "yes"], exported.base_sha256)
    assert exported.base_sha256
    assert {*facts["files"]} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    (entry,) = json.loads((tmp_path / "adapters.json").read_text())
    assert entry["label_names"] == ["no", "yes"]
    read = read_peft_folder(tmp_path / exported.name, "base", "")
    assert json.loads(read.info["label_names"]) == ["no", "yes"]
    assert export_tasks(store, tmp_path, base_source="some/base") == [exported]


def test_every_version_has_names_of_its_own(tmp_path: Path) -> None:
    _, reader = two_versions()
    export_tasks(reader, tmp_path, version=1, base_source="base")
    first = contents(tmp_path / "team+headed@v1")
    export_tasks(reader, tmp_path, version=2, tasks=["headed"], base_source="base")
    assert contents(tmp_path / "team+headed@v1") == first
    for number in (1, 2):
        assert_holds(tmp_path / f"team+headed@v{number}", reader.adapter("headed", number))
    index = json.loads((tmp_path / "adapters.json").read_text())
    assert [entry["name"] for entry in index] == ["team+headed@v1", "team+headed@v2"]


def test_exporting_again_writes_nothing_anew_and_answers_the_same(tmp_path: Path) -> None:
    _, reader = two_versions()
    first = export_tasks(reader, tmp_path, base_source="base")
    before = contents(tmp_path)
    assert export_tasks(reader, tmp_path, base_source="base") == first
    after = contents(tmp_path)
    assert after.pop("adapters.json")[0] == before.pop("adapters.json")[0]
    assert after == before


@pytest.mark.parametrize("change", ["a weight", "no facts", "other facts", "another base", "another store"])
def test_a_name_that_holds_something_else_is_refused_and_left_as_it_is(change: str, tmp_path: Path) -> None:
    _, reader = two_versions()
    export_tasks(reader, tmp_path, tasks=["team/bare"], base_source="base")
    place = tmp_path / "team+bare@v2"
    if change == "a weight":
        content = bytearray((place / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (place / "adapter_model.safetensors").write_bytes(content)
    elif change == "no facts":
        (place / "onebasis.json").unlink()
    elif change == "other facts":
        facts = json.loads((place / "onebasis.json").read_text())
        (place / "onebasis.json").write_text(json.dumps(facts | {"files": []}))
    elif change == "another store":
        store = opened(fresh_storage(), rank_fixed=5)
        merged(store, {"headed": random_adapter(1)})
        merged(store, {"bare": headless(random_adapter(2))})
        store.publish(2, op_key="publish", actor="test")
        reader = store
    before = contents(place)
    with pytest.raises(Conflict, match=re.escape("team+bare@v2")):
        export_tasks(reader, tmp_path, base_source="other" if change == "another base" else "base")
    assert contents(place) == before


def test_names_of_different_tasks_are_different_path_parts() -> None:
    tasks = [
        "a/b",
        "a_/b",
        "a__b/c",
        "a/b__c",
        "a+b/c",
        "a/b+c",
        "a/b@v1",
        "a",
        "../a",
        "a/..",
        "a/b/c",
        "a%2Fb",
        "ä b",
    ]
    names = [export_name(task, 1) for task in tasks]
    assert len(set(names)) == len(tasks)
    assert all(re.fullmatch(r"[A-Za-z0-9%+._~-]+@v1", name) and name.count("@") == 1 for name in names)
    assert export_name("team-1/my_task.2", 12) == "team-1+my_task.2@v12"


def test_what_vllm_is_given_is_exactly_what_it_takes(tmp_path: Path) -> None:
    _, reader = two_versions()
    export_tasks(reader, tmp_path, base_source="some/base")
    index = {entry["task"]: entry for entry in json.loads((tmp_path / "adapters.json").read_text())}
    # It makes a record of the JSON's keys and refuses others; and it refuses modules_to_save.
    path = str(tmp_path / "team+bare@v2")
    assert index["team/bare"]["vllm"] == {"name": "team+bare@v2", "path": path, "base_model_name": "some/base"}
    assert index["team/headed"]["vllm"] is None
    assert index["team/bare"]["rank"] == 3
    config = json.loads((tmp_path / "team+bare@v2/adapter_config.json").read_text())
    assert (config["modules_to_save"], config.get("use_dora", False)) == (None, False)
    assert config["base_model_name_or_path"] == "some/base"


def test_every_export_says_which_programs_load_it_and_why_others_do_not(tmp_path: Path) -> None:
    _, reader = two_versions()
    headed, bare = export_tasks(reader, tmp_path, base_source="some/base")
    assert headed.loads_in == ("peft",)
    assert "vLLM refuses" in headed.refused_by["vllm"]
    assert "LoRAX silently leaves out" in headed.refused_by["lorax"]
    assert bare.loads_in == ("peft", "vllm", "lorax")
    for entry in json.loads((tmp_path / "adapters.json").read_text()):
        one = headed if entry["task"] == headed.task else bare
        written = json.loads((tmp_path / one.name / "onebasis.json").read_text())
        for facts in (entry, written):
            assert facts["loads_in"] == list(one.loads_in)
            assert facts["refused_by"] == one.refused_by
            assert facts["vllm_max_lora_rank"] == (8 if one is bare else None)  # rank 3, and the numbers it may be


def test_a_folder_that_onebasis_03_exported_is_known_and_listed_with_who_loads_it(tmp_path: Path) -> None:
    _, reader = two_versions()
    first = export_tasks(reader, tmp_path, base_source="base")
    for one in first:
        file = tmp_path / one.name / "onebasis.json"
        new = ("loads_in", "refused_by", "vllm_max_lora_rank")
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new}))
    assert export_tasks(reader, tmp_path, base_source="base") == first
    assert all(entry["refused_by"] for entry in json.loads((tmp_path / "adapters.json").read_text()))


def test_modules_of_mixed_ranks_go_out_with_one_rank_and_scale_one_as_servers_assume(tmp_path: Path) -> None:
    _, reader = two_versions()
    export_tasks(reader, tmp_path, tasks=["bare"], base_source="base")
    config = json.loads((tmp_path / "team+bare@v2/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "team+bare@v2/adapter_model.safetensors")
    adapter = reader.adapter("bare")
    assert sorted(update.rank for update in adapter.modules.values()) == [2, 3]
    for name, update in adapter.modules.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert len(a) == b.shape[1] == config["r"]
        assert torch.allclose(config["lora_alpha"] / config["r"] * b @ a, update.delta(), atol=1e-6)


def test_an_adapter_that_came_from_diffusers_goes_out_as_its_file(tmp_path: Path) -> None:
    store = opened(fresh_storage())
    shapes = {"transformer.blocks.0.to_q": (12, 10), "text_encoder.layers.0.q_proj": (8, 10)}
    merged(store, {"style": headless(random_adapter(1, shapes=shapes), format="diffusers")})
    (exported,) = export_tasks(store, tmp_path, version=1, base_source="base")
    assert exported.format == "diffusers"
    read = read_diffusers_file(tmp_path / exported.name, "tiny-base", "")
    for name, update in store.adapter("style", 1).modules.items():
        assert torch.allclose(read.modules[name].delta(), update.delta(), atol=1e-6)
    assert exported.loads_in == ("diffusers",)
    assert json.loads((tmp_path / "adapters.json").read_text())[0]["vllm"] is None


def test_an_export_that_fails_leaves_whole_folders_and_nothing_half_written(tmp_path: Path) -> None:
    storage, reader = two_versions()
    storage.delete(reader.state.tasks_at(2)["bare"].adapter.key)
    with pytest.raises(Corrupt, match=r"1 of 2 adapters were written to .* export others than team/bare"):
        export_tasks(reader, tmp_path, base_source="base")
    assert {path.name for path in tmp_path.iterdir()} == {"team+headed@v2", "adapters.json"}
    assert_holds(tmp_path / "team+headed@v2", reader.adapter("headed"))
    assert [entry["task"] for entry in json.loads((tmp_path / "adapters.json").read_text())] == ["team/headed"]


def test_a_folder_that_a_killed_export_left_is_neither_used_nor_listed(tmp_path: Path) -> None:
    _, reader = two_versions()
    export_tasks(reader, tmp_path / "other", base_source="base")
    shutil.copytree(tmp_path / "other/team+bare@v2", tmp_path / "here/.partial-0123")
    export_tasks(reader, tmp_path / "here", tasks=["headed"], base_source="base")
    assert [entry["task"] for entry in json.loads((tmp_path / "here/adapters.json").read_text())] == ["team/headed"]


def test_exports_at_the_same_time_agree(tmp_path: Path) -> None:
    storage, _ = two_versions()
    readers = [reading(storage) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda reader: export_tasks(reader, tmp_path, base_source="base"), readers))
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert {path.name for path in tmp_path.iterdir()} == {"team+headed@v2", "team+bare@v2", "adapters.json"}


def test_tasks_and_versions_that_are_not_there_are_named(tmp_path: Path) -> None:
    _, reader = two_versions()
    with pytest.raises(NotFound, match="version 1 holds no task team/bare"):
        export_tasks(reader, tmp_path, version=1, tasks=["team/bare"], base_source="base")
    with pytest.raises(NotFound, match="no version 9"):
        export_tasks(reader, tmp_path, version=9, base_source="base")
    assert export_tasks(reader, tmp_path, version=0, base_source="base") == []


def test_two_tasks_of_one_name_are_told_apart_by_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: SubspaceStore = opened(fresh_storage())
    monkeypatch.setattr(store, "_refuse_doubles", lambda *_: None)  # stores of before 0.4 may hold such
    for task_id in ("one", "two"):
        ref = store.stage(f"staging/{task_id}/1/adapter.safetensors", random_adapter(len(task_id)))
        store.merge(
            [StagedAdapter(task_id=task_id, name="team/same", key=ref.key, sha256=ref.sha256)],
            op_key=task_id,
            actor="test",
        )
    with pytest.raises(InvalidInput, match="several tasks named team/same"):
        export_tasks(store, tmp_path, version=2, base_source="base")
    (exported,) = export_tasks(store, tmp_path, version=2, tasks=["two"], base_source="base")
    assert exported.task_id == "two"
    with pytest.raises(Conflict):
        export_tasks(store, tmp_path, version=2, tasks=["one"], base_source="base")


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    _, reader = two_versions()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot write there"):
        export_tasks(reader, tmp_path / "file", base_source="base")


@pytest.mark.parametrize("way", ["mean", "tsv"])
def test_one_adapter_for_all_is_made_of_what_the_version_holds_and_says_what_it_is(way: str, tmp_path: Path) -> None:
    _, reader = two_versions()
    found = export_one(reader, tmp_path, way=way, rank=5, base_source="some/base")
    held = [reader.adapter(task, 2) for task in ("headed", "bare")]
    expected = {n: ONE_FOR_ALL[way]([a.modules[n] for a in held]).leading(5) for n in held[0].modules}
    assert_holds(tmp_path / f"one={way}@v2", headless(dataclasses.replace(held[0], modules=expected)))
    assert (found.name, found.rank, found.one_for_all, found.has_head) == (f"one={way}@v2", 5, way, False)
    assert found.of_tasks == ("team/headed", "team/bare")
    assert "the heads of 1 of 2 tasks" in found.left_out
    assert 0 < found.errors["team/bare"] < 2
    assert "vllm" in found.loads_in
    assert export_one(reader, tmp_path, way=way, rank=5, base_source="some/base") == found  # again: left alone
    with pytest.raises(Conflict, match="holds something else"):
        export_one(reader, tmp_path, way=way, rank=4, base_source="some/base")
    listed = json.loads((tmp_path / "adapters.json").read_text())
    assert [(entry["name"], entry["one_for_all"]) for entry in listed] == [(f"one={way}@v2", way)]


def test_one_adapter_is_refused_where_there_is_nothing_to_make_it_of(tmp_path: Path) -> None:
    _, reader = two_versions()
    with pytest.raises(InvalidInput, match="there is no way 'best' to make one of all"):
        export_one(reader, tmp_path, way="best", rank=5, base_source="b")
    with pytest.raises(InvalidInput, match="holds 1 of them"):
        export_one(reader, tmp_path, tasks=["bare"], way="mean", rank=5, base_source="b")
    storage = fresh_storage()
    store = opened(storage)
    merged(store, {"a": headless(random_adapter(1)), "b": headless(random_adapter(2), fan_in_fan_out="true")})
    with pytest.raises(InvalidInput, match="the other way round"):
        export_one(reading(storage), tmp_path, 1, way="mean", rank=5, base_source="b")
    assert not list(tmp_path.iterdir())
