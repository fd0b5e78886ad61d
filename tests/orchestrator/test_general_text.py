"""What a language model loses by its tasks: from the file in the settings to the scores and the gate's verdict."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from configs.errors import InvalidInput
from orchestrator.api import views
from orchestrator.general_text import CHARACTERS, LEAST, general_text
from orchestrator.judging.score_table import score_table
from orchestrator.reports.mlflow_mirror import Mirror
from tests.builders import BASE, SHA256, settings
from tests.orchestrator.plant import Plant

TEXT = "Some pages about everything and nothing. " * 100
CAUSAL: Mapping[str, Any] = {"kind": "causal_lm", "data": {"label_names": None}}


def base_with(file: Path, **gate: Any) -> dict[str, Any]:
    return {
        "base_model": {"name": BASE, "source": "s", "weights_sha256": SHA256, "general_text": str(file)},
        "gate": gate,
    }


def read(file: Path) -> str:
    return general_text(settings(**base_with(file)).base(BASE))


def test_the_beginning_of_a_text_is_read_plain_or_packed(tmp_path: Path) -> None:
    assert general_text(settings().base(BASE)) == ""
    (plain := tmp_path / "pages.txt").write_text("Grüße! " * 10_000, encoding="utf-8")
    assert read(plain) == ("Grüße! " * 10_000)[:CHARACTERS]
    (packed := tmp_path / "pages.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert read(packed) == TEXT
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows' editors write it
        plain.write_bytes(TEXT.replace(". ", ".\r\n").encode(encoding))
        assert read(plain) == TEXT.replace(". ", ".\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.txt", None, "cannot be read"),
        ("pages.txt", "Grüße ".encode("latin-1") * 1000, "is not UTF-8: byte 0xfc at character 3"),
        ("pages.txt", TEXT.encode("utf-16-le"), "holds zero bytes: it is UTF-16 without its mark"),
        ("pages.txt", b"<!DOCTYPE html>" + TEXT.encode(), "a web page"),
        ("pages.txt", b"x" * (LEAST - 1), "has 1,999 characters, too few to measure by"),
        ("pages.txt", b" \n" * LEAST, "has 0 characters"),
        ("pages.txt.gz", TEXT.encode(), "cannot be read"),  # not packed
        ("pages.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-30], "cannot be read"),
    ],
)
def test_what_cannot_be_measured_by_is_refused_when_the_service_starts(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=said):
        Plant(tmp_path, **base_with(tmp_path / name)).step()


def test_a_limit_needs_a_text_to_measure_by() -> None:
    with pytest.raises(ValidationError, match="general_loss_max needs a base model with general_text"):
        settings(gate={"general_loss_max": 0.1})


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    (file := tmp_path / "pages.txt").write_text(TEXT)
    return file


def lost(plant: Plant, title: str) -> float:
    version = plant.state.refs["main"]
    return score_table(plant.state, version, 0.1).general_loss(version, plant.get(title).task_id)


def test_the_loss_of_each_language_task_is_kept_with_its_scores(tmp_path: Path, pages: Path) -> None:
    plant = Plant(tmp_path, **base_with(pages))
    plant.cluster.general_loss = lambda title, _: {"red/one": 0.01, "blue/two": -0.02}[title]
    plant.submit("red/one", "blue/two", spec=CAUSAL)
    plant.submit("red/labels")
    plant.run()
    assert lost(plant, "red/one") == 0.01
    assert lost(plant, "blue/two") == -0.02
    assert lost(plant, "red/labels") != lost(plant, "red/labels")  # NaN: a classification has no text to lose
    assert plant.cluster.general_texts == {"red/one": TEXT, "blue/two": TEXT, "red/labels": ""}


def test_the_loss_is_shown_in_the_matrix_and_in_mlflow(tmp_path: Path, pages: Path) -> None:
    plant = Plant(tmp_path, **base_with(pages))
    plant.cluster.general_loss = lambda title, _: 0.25
    plant.submit("red/one", spec=CAUSAL)
    plant.submit("red/labels")
    plant.run()
    version = plant.state.refs["main"]
    table = score_table(plant.state, version, 0.1)
    ids = [plant.get(title).task_id for title in ("red/one", "red/labels")]
    assert [views.cell(table, version, task_id)["general_loss"] for task_id in ids] == [0.25, None]
    Mirror(plant.settings, plant.queue).sync()
    client = MlflowClient(plant.settings.mlflow.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("onebasis").experiment_id])
    shown = {run.info.run_name: run.data.metrics.get("general_loss") for run in runs}
    assert (shown["red/one"], shown["red/labels"]) == (0.25, None)


def test_a_task_that_costs_too_much_is_rejected_alone_and_the_reason_has_the_figures(
    tmp_path: Path, pages: Path
) -> None:
    plant = Plant(tmp_path, **base_with(pages, general_loss_max=0.1))
    plant.cluster.general_loss = lambda title, _: 0.25 if title == "red/dear" else 0.1
    plant.submit("red/dear", "blue/cheap", spec=CAUSAL)
    plant.run()
    assert plant.states() == {"red/dear": "rejected", "blue/cheap": "published"}
    reason = plant.get("red/dear").reason
    assert "makes the base model lose 0.250 nats for each token of general text" in reason
    assert "more than gate.general_loss_max 0.1" in reason


def test_a_merge_that_lifts_an_earlier_task_above_the_limit_is_refused(tmp_path: Path, pages: Path) -> None:
    plant = Plant(tmp_path, subspace={"rank_fixed": 2}, **base_with(pages, general_loss_max=0.1, drift_min=0))
    plant.cluster.general_loss = lambda title, held: 0.3 if title == "red/one" and "blue/two" in held else 0.05
    plant.submit("red/one", spec=CAUSAL)
    plant.run()
    plant.submit("blue/two", spec=CAUSAL)
    plant.run()
    assert plant.states() == {"red/one": "published", "blue/two": "rejected"}


def test_what_was_published_above_the_limit_holds_nobody_up(tmp_path: Path, pages: Path) -> None:
    """The limit came later: the task is there, and the next one is not at fault."""
    plant = Plant(tmp_path, **base_with(pages, drift_min=0))
    plant.cluster.general_loss = lambda title, _: 0.3 if title == "red/one" else 0.0
    plant.submit("red/one", spec=CAUSAL)
    plant.run()
    asked = plant.settings.gate.model_copy(update={"general_loss_max": 0.1})
    plant.controller.subspaces[BASE].follow(plant.settings.model_copy(update={"gate": asked}))
    plant.submit("blue/two", spec=CAUSAL)
    plant.run()
    assert plant.states() == {"red/one": "published", "blue/two": "published"}
