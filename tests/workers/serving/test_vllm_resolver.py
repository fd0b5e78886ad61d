"""vLLM is given what `main` holds of a task, when it is asked for and whenever that changes."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import NotFound
from subspace_store import Adapter, SubspaceStore
from subspace_store.formats.peft import read_peft_folder
from subspace_store.storage.local import LocalStorage
from subspace_store.subspace_reader import SubspaceReader
from tests.subspace_store.builders import merged, random_adapter
from tests.workers.serving.vllm_server import IS_REAL, Vllm, listening, request_class
from workers.serving import vllm_resolver
from workers.serving.vllm_resolver import StoreResolver
from workers.weights import weights_digest

KEY = "a key of vLLM"


def headless(seed: int) -> Adapter:
    return dataclasses.replace(random_adapter(seed), head={}, info={})


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base model that vLLM was started with, by its relative path."""
    folder = tmp_path / "the-base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_resolver, "resolve_source", lambda source: tmp_path / source)
    return folder


@pytest.fixture
def store(tmp_path: Path, base: Path) -> SubspaceStore:
    """`main` is version 1: a language task, and one with a head."""
    store = SubspaceStore.open(
        LocalStorage(str(tmp_path / "store")), base_model="tiny", base_sha256=weights_digest(base), writer="test"
    )
    merged(store, {"charges": tiny(headless(1)), "labels": tiny(random_adapter(2))})
    publish(store)
    return store


def tiny(adapter: Adapter) -> Adapter:
    return dataclasses.replace(adapter, base_model="tiny")


def publish(store: SubspaceStore) -> None:
    number = store.state.refs["candidate"]
    store.publish(number, op_key=f"publish {number}", actor="test")


def revise(store: SubspaceStore, before: str, task: str, seed: int) -> None:
    """Publish a revision that takes the place of the one before it."""
    merged(store, {task: tiny(headless(seed))}, replaces={task: before})
    publish(store)


@pytest.fixture
def resolver(store: SubspaceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreResolver:
    monkeypatch.setattr(vllm_resolver, "FOLLOW_SECONDS", 10**6)  # the tests look themselves
    return StoreResolver(SubspaceReader.open(store.storage), tmp_path / "vllm", "http://x", request_class(), KEY)


@pytest.fixture
def vllm(resolver: StoreResolver) -> Iterator[Vllm]:
    with listening(resolver, KEY) as vllm:
        resolver._server = vllm.url
        yield vllm


def assert_answers(vllm: Vllm, task: str, store: SubspaceStore, version: int) -> None:
    """That vLLM's folder for a task holds what the store's version holds."""
    folder = vllm.folder(task)
    assert folder is not None
    found, expected = read_peft_folder(Path(folder), "tiny", ""), store.adapter(task.split("/")[1], version)
    for name, update in expected.modules.items():
        assert torch.allclose(found.modules[name].delta(), update.delta(), atol=1e-5)


def test_a_task_is_answered_by_what_main_holds_and_read_once(vllm: Vllm, store: SubspaceStore) -> None:
    first = vllm.ask("team/charges")
    assert first is not None
    assert_answers(vllm, "team/charges", store, 1)
    assert vllm.ask("team/charges") == first
    assert vllm.loads == [first]


def test_what_main_does_not_hold_is_left_to_other_resolvers(vllm: Vllm) -> None:
    assert vllm.ask("team/nobody") is None
    assert vllm.ask("the-base-of-somebody") is None
    assert vllm.loads == []


def test_a_task_that_vllm_cannot_load_is_refused_with_the_reason(vllm: Vllm) -> None:
    with pytest.raises(ValueError, match=r"team/labels.*vLLM cannot load it: it has a head of its own.*onebasis serve"):
        vllm.ask("team/labels")


def test_a_publish_and_a_rollback_are_answered_by_at_the_next_look(
    vllm: Vllm, resolver: StoreResolver, store: SubspaceStore
) -> None:
    vllm.ask("team/charges")
    revise(store, "charges", "charges@2", seed=3)
    assert_answers(vllm, "team/charges", store, 1)  # not yet looked
    resolver.follow()
    folder = vllm.folder("team/charges")
    assert folder is not None
    found = read_peft_folder(Path(folder), "tiny", "")
    for name, update in store.adapter("charges@2", 2).modules.items():
        assert torch.allclose(found.modules[name].delta(), update.delta(), atol=1e-5)
    store.rollback(1, reason="worse", op_key="back", actor="test")
    resolver.follow()
    assert_answers(vllm, "team/charges", store, 1)
    assert len(vllm.loads) == 3


def test_a_task_that_did_not_change_is_left_alone(vllm: Vllm, resolver: StoreResolver, store: SubspaceStore) -> None:
    first = vllm.ask("team/charges")
    merged(store, {"other": tiny(dataclasses.replace(store.adapter("charges"), info={}))})
    publish(store)
    resolver.follow()
    if vllm.loads == [first]:
        assert vllm.folder("team/charges") == first
    else:  # the merge moved it: then what it was given holds the new version
        assert_answers(vllm, "team/charges", store, 2)
    loads = len(vllm.loads)
    resolver.follow()
    assert len(vllm.loads) == loads


def test_a_task_that_was_removed_is_let_go(vllm: Vllm, resolver: StoreResolver, store: SubspaceStore) -> None:
    vllm.ask("team/charges")
    store.remove("charges", op_key="remove", actor="test")
    publish(store)
    resolver.follow()
    assert vllm.folder("team/charges") is None
    assert vllm.ask("team/charges") is None


def test_while_vllm_refuses_it_is_told_once_and_tried_again(
    vllm: Vllm, resolver: StoreResolver, store: SubspaceStore, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.ask("team/charges")
    revise(store, "charges", "charges@2", seed=3)
    headers, resolver._headers = resolver._headers, {}
    resolver.follow()
    resolver.follow()
    told = [record.message for record in caplog.records if "goes on answering" in record.message]
    assert len(told) == 1
    assert "team+charges@v1" in told[0]
    assert "401" in told[0]
    assert_answers(vllm, "team/charges", store, 1)
    resolver._headers = headers
    resolver.follow()
    assert len(vllm.loads) == 2


def test_adapters_of_other_weights_are_refused(vllm: Vllm, base: Path) -> None:
    save_file({"weight": torch.zeros(3)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"the-base: vLLM has other weights.*start vLLM with"):
        vllm.ask("team/charges")
    assert vllm.loads == []


def test_folders_of_versions_that_nobody_is_answered_by_are_deleted(
    vllm: Vllm, resolver: StoreResolver, store: SubspaceStore, tmp_path: Path
) -> None:
    vllm.ask("team/charges")
    before = "charges"
    for number in (2, 3, 4):
        task = f"charges@{number}"
        revise(store, before, task, seed=number + 10)
        resolver.follow()
        before = task
    left = sorted(folder.name for folder in (tmp_path / "vllm").iterdir() if folder.is_dir())
    assert left == ["team+charges@v3", "team+charges@v4"]


def test_a_task_may_be_resolved_while_vllm_takes_what_is_new(
    vllm: Vllm, resolver: StoreResolver, store: SubspaceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.ask("team/charges")
    revise(store, "charges", "charges@2", seed=3)
    found = []

    def ask(path: str, **values: Any) -> None:
        # vLLM answers a load when nobody resolves the same name: whoever does must not wait for the follower.
        asker = threading.Thread(target=lambda: found.append(resolver.adapter("the-base", "team/charges")))
        asker.start()
        asker.join(20)

    monkeypatch.setattr(resolver, "_ask", ask)
    resolver.follow()
    assert [folder.name for folder in found if folder is not None] == ["team+charges@v2"]


def test_vllm_finds_the_plugin_and_without_a_store_it_does_nothing(
    store: SubspaceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import entry_points

    (plugin,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "onebasis"]
    registered: dict[str, Any] = {}
    if IS_REAL:
        from vllm.lora.resolver import LoRAResolverRegistry

        monkeypatch.setattr(LoRAResolverRegistry, "resolvers", registered)
    else:
        modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver")}
        modules["vllm.lora.request"].LoRARequest = request_class()  # type: ignore[attr-defined]
        modules["vllm.lora.resolver"].LoRAResolver = SimpleNamespace(register=lambda cls: cls)  # type: ignore[attr-defined]
        registry = SimpleNamespace(register_resolver=registered.__setitem__)
        modules["vllm.lora.resolver"].LoRAResolverRegistry = registry  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    plugin.load()()
    assert registered == {}
    monkeypatch.setenv("ONEBASIS_STORE", f"file:{tmp_path}")
    with pytest.raises(NotFound, match="FORMAT"):  # the folder above
        plugin.load()()
    assert registered == {}
    monkeypatch.setenv("ONEBASIS_STORE", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("ONEBASIS_VLLM_FOLDER", str(tmp_path / "written"))
    plugin.load()()
    resolver = registered["onebasis"]
    folder = resolver.adapter("the-base", "team/charges")
    assert folder == tmp_path / "written/team+charges@v1"
    shutil.rmtree(folder)
