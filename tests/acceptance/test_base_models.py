"""One real service with two base models of its own: a task to each, a rollback of one, a third by `reload`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.settings import StorageSettings
from orchestrator.api.requests import ListVersions
from subspace_store import SubspaceReader, open_storage
from tests.acceptance.conftest import ROOT, Site
from tests.workers.tiny_bases import save_llama
from workers.weights import weights_digest

TALKS = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "The colour of grass is", "completion": " green."},
]
PATIENCE_SECONDS = 600
"""A crowded machine loads three base models one after another."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "tiny").mkdir()
    save_llama(tmp_path / "tiny")
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    minilm = settings.pop("base_model")
    tiny = {"name": "tiny", "source": str(tmp_path / "tiny"), "weights_sha256": weights_digest(tmp_path / "tiny")}
    settings["base_models"] = [minilm, tiny]
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    del settings["workers"]
    settings["pools"] = {
        "encoders": {"base_model": "minilm", "min": 1, "max": 1, "cpus": 0.5},
        "talkers": {"base_model": "tiny", "min": 1, "max": 1, "cpus": 0.5},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.run("down")


def talk(site: Site, name: str, team: str = "cards") -> Path:
    """A small task of the language model."""
    (site.folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TALKS * 8))
    document = {
        "team": team,
        "name": name,
        "base_model": "tiny",
        "kind": "causal_lm",
        "data": {
            "train_file": "talk.jsonl",
            "eval_file": "talk.jsonl",
            "eval_is_train": True,  # this test is not about what it learns
            "prompt_column": "prompt",
            "completion_column": "completion",
            "max_length": 32,
        },
        "training": {"learning_rate": 0.005, "max_steps": 6, "per_device_train_batch_size": 4},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "method": {"name": "lora"},
    }
    path = site.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def reader(site: Site, name: str) -> SubspaceReader:
    return SubspaceReader.open(open_storage(StorageSettings(url=f"file:{site.folder}/.onebasis/store"), name))


def titles(site: Site, name: str) -> list[str]:
    """What a base model's main holds."""
    state = reader(site, name).refresh()
    return sorted(task.name for task in state.tasks_at(state.refs["main"]).values())


def test_two_base_models_go_their_own_ways_and_a_third_joins_while_they_run(site: Site) -> None:
    said = site.run("up", "--config", "settings.yaml")
    assert "2 base models" in said
    for path in (site.task_file("intents", pool="encoders"), talk(site, "facts")):
        site.run("submit", str(path))
    for title in ("payments/intents", "cards/facts"):
        site.wait_for_state(title, "published", seconds=PATIENCE_SECONDS)
    assert (titles(site, "minilm"), titles(site, "tiny")) == (["payments/intents"], ["cards/facts"])

    # What needs a base model and names none is refused with the names; what names one speaks of that one.
    assert "add --base-model: one of minilm, tiny" in site.run("versions", expect=2)
    assert "add --base-model: one of minilm, tiny" in site.run("store", "tags", expect=2)
    assert [row["added"] for row in site.ask("versions", "--base-model", "tiny")] == [["cards/facts"]]
    assert site.ask("scores", "--base-model", "minilm")["tasks"][0]["title"] == "payments/intents"
    site.run("store", "tag", "gold", "1", "--base-model", "minilm")
    assert site.ask("store", "tags", "--base-model", "minilm") == {"gold": 1}
    assert site.ask("store", "tags", "--base-model", "tiny") == {}

    # A rollback of one leaves the other's main, and its tasks, as they are.
    before = reader(site, "minilm").refresh()
    assert site.ask("rollback", "0", "--base-model", "tiny")["base_model"] == "tiny"
    site.wait_for_state("cards/facts", "parked", seconds=PATIENCE_SECONDS)
    assert titles(site, "tiny") == []
    assert reader(site, "minilm").refresh() == before
    assert site.task("payments/intents")["state"] == "published"

    # A third base model joins the running service; a change that needs a restart is refused by its name.
    settings = yaml.safe_load((site.folder / "settings.yaml").read_text())
    pid = site.control_plane()
    third = settings["base_models"][0] | {"name": "third"}
    settings["base_models"].append(third)
    settings["pools"]["thirds"] = {"base_model": "third", "min": 1, "max": 1, "cpus": 0.5}
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings | {"subspace": {"rank_max": 8}}))
    assert "cannot change subspace.rank_max; nothing was taken" in site.run("reload", expect=4)
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert site.ask("reload")["taken"] == ["base_models.third", "pools.thirds"]
    assert site.ask("reload")["taken"] == []
    site.wait("the third to be warm", lambda: site.status()["pools"]["thirds"]["ready"] == 1, PATIENCE_SECONDS)
    site.run("submit", str(site.task_file("more", base_model="third")))
    site.wait_for_state("payments/more", "published", seconds=PATIENCE_SECONDS)
    assert titles(site, "third") == ["payments/more"]
    assert reader(site, "minilm").refresh() == before
    assert site.control_plane() == pid
    assert site.look(ListVersions(base_model="third"))[0]["status"] == "published"

    # One that has tasks leaves neither the running service nor the next one by mistake.
    settings["base_models"].pop()
    del settings["pools"]["thirds"]
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert "--remove-base-model third" in site.run("reload", expect=4)
    site.run("down")
    refused = site.run("up", "--config", "settings.yaml", expect=4)
    assert "third, of which the database has 1 living task and main holds 1 task" in refused
    assert not (site.folder / ".onebasis/ray.json").exists()  # nothing was started
    assert "2 base models" in site.run("up", "--config", "settings.yaml", "--remove-base-model", "third")
    assert site.task("payments/more")["state"] == "published"
    assert titles(site, "third") == ["payments/more"]  # its store stays where it is
