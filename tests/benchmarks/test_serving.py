"""What `make bench-serving` prints at its end is what its file holds, and no part takes figures of another away."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import revisions, routing, serving, serving_replicas, serving_service
from benchmarks.serving import RESULTS, figures


def test_every_figure_that_was_measured_is_printed_and_no_other() -> None:
    known = json.loads(RESULTS.read_text())
    printed = figures(known)
    found = {line[9:].strip(): line[:9].strip() for line in printed}
    assert len(found) == len(printed)
    ratio = found["rows a second over those of one LoRA: mixed, 1000 tasks"]
    assert float(ratio) == round(known["mixed_1000_over_one"], 2)
    (served,) = [value for text, value in found.items() if text.startswith("s, median from where main moved")]
    assert float(served) == round(known["publish_to_served_seconds"], 2)
    for clients, took in known["http"].items():
        (text,) = [text for text in found if f"over HTTP, {clients}" in text]
        assert (found[text], text.split()[-1]) == (f"{took['p50_ms']:.0f}", f"{took['p99_ms']:.0f}")
    (union,) = [value for text, value in found.items() if "the union" in text]
    assert float(union) == round(known["revisions"]["loss_to_union_points"], 2)
    (earlier,) = [value for text, value in found.items() if "earlier portions" in text]
    assert float(earlier) == round(known["revisions"]["earlier_portions_loss_points"], 2)
    assert figures({"http": known["http"]}) == [line for line in printed if "over HTTP" in line]
    assert figures({}) == []


NAMED = ("mixed_1000_over_one", "largest_difference", "publish_to_served_seconds", "revisions")
REPLICAS = {"second_replica_seconds": 40.0, "node_lost": {"longest_gap_seconds": 1.0}}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of results that is not there yet; each part returns at once what it measured last."""
    known, file = json.loads(RESULTS.read_text()), tmp_path / "serving.json"
    monkeypatch.setattr(serving, "RESULTS", file)
    other = ("http", "publish_to_served_seconds", "publish_to_served_seconds_most", "revisions", "scoring", "routing")
    batch = {name: value for name, value in known.items() if name not in (*other, "replicas", "date", "dates")}
    monkeypatch.setattr(serving_service, "measure", lambda: {name: known[name] for name in other[:3]})
    monkeypatch.setattr(revisions, "measure", lambda data: known["revisions"] | {"data": str(data)})
    monkeypatch.setattr(serving_replicas, "measure", lambda: {"replicas": REPLICAS})
    monkeypatch.setattr(routing, "measure", lambda folder: known["routing"])
    parts = serving.PARTS | {"batch": lambda: batch, "scoring": lambda: {"scoring": known["scoring"]}}
    monkeypatch.setattr(serving, "PARTS", parts)
    return file


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, module: Any = serving) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    module.main()


def test_alone_it_writes_every_figure_that_is_promised(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch)
    found = json.loads(results.read_text())
    assert {*NAMED} <= found.keys()
    assert {"loss_to_union_points", "earlier_portions_loss_points"} <= found["revisions"].keys()
    assert {*NAMED} <= found["dates"].keys()


def test_no_part_takes_figures_of_another_away(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = json.loads(RESULTS.read_text()) | {"dates": {"http": "2026-01-01", "scoring": "2026-01-02"}}
    results.write_text(json.dumps(whole))
    before = {*whole}
    ways: list[tuple[str, ...]] = [(), *((name,) for name in serving.PARTS), ("routing", str(tmp_path))]
    for arguments in ways:
        run(monkeypatch, *arguments)
        assert {*json.loads(results.read_text())} >= before, arguments
    results.write_text(json.dumps(whole))
    run(monkeypatch, "http")
    found = json.loads(results.read_text())
    assert found["dates"]["scoring"] == "2026-01-02"  # what was not measured is not of today
    assert found["dates"]["http"] == found["date"]
    assert {name: found[name] for name in before - {"date", "dates"}} == {
        name: whole[name] for name in before - {"date", "dates"}
    }


def test_revisions_of_text_sets_are_not_replaced_by_those_of_the_examples_unasked(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(revisions, "ROOT", results.parent)
    run(monkeypatch, "--data", str(tmp_path), module=revisions)
    run(monkeypatch)
    assert json.loads(results.read_text())["revisions"]["data"] == str(tmp_path)
    run(monkeypatch, "revisions")
    assert json.loads(results.read_text())["revisions"]["data"] == "None"
    with pytest.raises(SystemExit):
        run(monkeypatch, "nothing")
