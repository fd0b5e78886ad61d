"""A real task that learns again: submitted, published, revised from new rows alone, and put back."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import Exit
from tests.acceptance.conftest import ROOT, Site

pytestmark = pytest.mark.timeout(900)
INTENTS = 3
TITLE, OTHER = "payments/charges", "cards/other"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service with two published tasks of three intents of BANKING77 each, the first of which knows two of them."""
    site = Site(tmp_path_factory.mktemp("revisions"))
    settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["workers"]["count"] = 1
    settings["subspace"] = {"energy_ratio_min": 1.0}  # so that a task is served as it was delivered, to rounding
    (site.folder / "one-worker.yaml").write_text(yaml.safe_dump(settings))
    texts = _texts()
    first = task_file(site, "first", {0: texts[0][:40], 1: texts[1][:40]})
    other = task_file(site, "other", {n: texts[n + INTENTS][:40] for n in range(INTENTS)}, title=OTHER)
    try:
        site.run("up", "--config", "one-worker.yaml")
        site.run("submit", "--wait", str(first))
        site.run("submit", "--wait", str(other))
        yield site
    finally:
        site.run("down")


def _texts() -> list[list[str]]:
    """The texts of some intents, an intent in each list."""
    found: dict[int, list[str]] = {}
    with gzip.open(ROOT / "examples/data/banking_charges.train.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["label"], []).append(row["text"])
    return [texts for _, texts in sorted(found.items())]


def task_file(site: Site, name: str, texts: dict[int, list[str]], title: str = TITLE, **changes: Any) -> Path:
    """A task over these texts by label, every other one of them for evaluation."""
    team, _, task = title.partition("/")
    for side, start in (("train", 0), ("eval", 1)):
        rows = [{"text": text, "label": label} for label, group in texts.items() for text in group[start::2]]
        (site.folder / f"{name}.{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "team": team,
        "name": task,
        "base_model": "minilm",
        "data": {
            "train_file": f"{name}.train.jsonl",
            "eval_file": f"{name}.eval.jsonl",
            "label_names": [f"intent_{number}" for number in range(max(texts) + 1)],
            "max_length": 24,
        },
        "method": {"name": "lora"},
        "training": {"learning_rate": 0.003, "max_steps": 30, "per_device_train_batch_size": 8},
        "lora": {"r": 4, "lora_alpha": 8},
    }
    path = site.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def exported(site: Site, title: str, name: str) -> dict[str, Tensor]:
    folder = site.folder / name
    site.run("export", title, "-o", str(folder))
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B·A by module, and the head as it is."""
    made = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, b in tensors.items():
        if ".lora_B." in name:
            made[name.partition(".lora_B.")[0]] = b.double() @ tensors[name.replace("lora_B", "lora_A")].double()
    return made


def test_new_rows_for_a_published_name_are_refused_with_the_way_to_revise_it(site: Site) -> None:
    texts = _texts()
    again = task_file(site, "unasked", {0: texts[0][40:60], 1: texts[1][40:60]})
    said = site.run("submit", str(again), expect=Exit.CONFLICT)
    assert "onebasis submit --revise" in said


def test_a_revision_that_learns_the_new_rows_alone_and_forgets_the_others_is_rejected(site: Site) -> None:
    """Rows of one new label: what is trained on nothing else answers with it alone."""
    texts = _texts()
    forgetful = task_file(site, "forgetful", {2: texts[2][:60]})
    found = site.ask("submit", "--wait", "--revise", str(forgetful), expect=Exit.REJECTED)
    assert found["trouble"] == ["earlier-rows"]
    assert "on the rows of revision 1" in found["reason"]
    assert site.task(TITLE)["revisions"][0]["state"] == "published"


def test_a_task_learns_from_new_rows_and_a_new_label_and_goes_back(site: Site) -> None:
    texts = _texts()
    before, other = exported(site, TITLE, "before"), exported(site, OTHER, "other-before")
    rows = {0: texts[0][40:60], 1: texts[1][40:60], 2: texts[2][:40]}
    second = task_file(site, "second", rows)
    found = site.ask("submit", "--wait", "--revise", str(second))
    assert (found["exact_title"], found["state"]) == (f"{TITLE}@2", "published")
    assert [(one["revision"], one["state"]) for one in found["revisions"] if one["state"] != "rejected"] == [
        (1, "replaced"),
        (2, "published"),
    ]

    scores = site.ask("scores")
    column = next(task for task in scores["tasks"] if task["title"] == TITLE)
    old, new = column["of_rows"]
    assert (old["revision"], old["rows"], new["revision"], new["rows"]) == (1, 40, 2, 40)
    assert old["scores"][-1] >= old["scores"][0] - 0.03  # what the gate lets pass
    assert new["scores"][-1] > new["main_before"]
    place = scores["tasks"].index(column)
    whole = (old["scores"][-1] + new["scores"][-1]) / 2
    assert scores["matrix"][-1][place]["score"] == pytest.approx(whole)
    shown = site.run("scores")
    assert "@1" in shown
    assert "@2" in shown
    main = site.ask("status")["main"]

    preview = site.ask("rollback-task", TITLE, "--to", "1", "--preview")
    assert (preview["preview"], preview["task_id"], preview["others_move"]) == (True, column_id(found, 1), False)
    assert site.ask("status")["main"] == main
    done = site.ask("rollback-task", TITLE, "--to", "1")
    assert (done["leaving"], done["error"]) == (found["task_id"], pytest.approx(preview["error"], abs=1e-4))
    assert site.ask("status")["main"] == done["version"] == main + 1
    site.wait_for_state(f"{TITLE}@2", "replaced")
    assert site.task(f"{TITLE}@1")["state"] == "published"

    after = exported(site, TITLE, "after")
    assert after.keys() == before.keys()
    for name, tensor in updates(after).items():
        was = updates(before)[name]
        assert float((tensor - was).norm()) <= 1e-4 * float(was.norm()), name
    same = exported(site, OTHER, "other-after")
    site.run("rollback", str(main))  # the second revision is there again
    site.wait_for_state(f"{TITLE}@2", "published")
    between = exported(site, OTHER, "other-between")
    assert all((same[name] == between[name]).all() for name in same)  # going back moved it by no bit
    assert other.keys() == same.keys()
    site.run("store", "restore-revision", column_id(found, 1), "--yes")  # the store's own command, while it is served
    site.wait_for_state(f"{TITLE}@1", "published")


def column_id(found: dict[str, Any], number: int) -> str:
    return str(next(one["task_id"] for one in found["revisions"] if one["revision"] == number))
