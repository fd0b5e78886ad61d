"""Which rows a version answers otherwise: read from the results that every measurement keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from typer.testing import CliRunner

from configs.errors import InvalidInput, NotFound
from configs.task_spec import TaskSpec
from orchestrator.api.access import Caller, Role
from orchestrator.api.requests import ShowFlipped, Submit
from orchestrator.commands import display
from orchestrator.commands.cli import app
from orchestrator.tasks.task_record import TaskRecord, results_key
from tests.builders import write_rows
from tests.orchestrator.site import Site
from workers.results import Results, write_results
from workers.rows.frozen_rows import open_evaluation_rows

ROWS = [{"text": f"question {n}", "label": ("no", "yes")[n % 2]} for n in range(5)]
OWN, FIRST, SECOND = (1, 1, 0, 1, 1), (1, 1, 0, 1, 1), (1, 0, 1, 0, 1)
"""What each row got: by the own adapter, in the version of its birth, and in the next one."""


def keep(site: Site, record: TaskRecord, key: str, version: int, per_row: Sequence[float]) -> None:
    """As a worker keeps them."""
    rows = open_evaluation_rows(site.plant.storage, record.task_id, record.eval_key, {}, record.spec)
    results = Results(
        task_id=record.task_id,
        version=version,
        metric=record.spec.metric,
        eval_sha256=rows.sha256,
        per_row=tuple(map(float, per_row)),
    )
    write_results(site.plant.storage, key, results)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """red/alpha in version 1, moved by blue/beta in version 2, with the results of its rows under both."""
    small = {"rank_max": 2, "beyond_rank_max": "drop"}
    site = Site(tmp_path_factory.mktemp("flipped"), subspace=small, gate={"drift_min": 0.0})
    try:
        document = site.document("red/alpha")
        document["data"]["eval_file"] = str(write_rows(site.folder / "data" / "asked.jsonl", ROWS))
        site.client.ask(Submit(task=TaskSpec.model_validate(document), by="ann"))
        site.wait_for("red/alpha", "published")
        site.publish("blue/beta")
        record = site.plant.get("red/alpha")
        keep(site, record, record.local_results_key, 0, OWN)
        for version, per_row in ((1, FIRST), (2, SECOND)):
            keep(site, record, results_key(record.task_id, version), version, per_row)
        yield site
    finally:
        site.close()


def test_the_rows_that_flipped_are_told_with_what_they_say_the_worst_first(moved: Site) -> None:
    found = moved.client.ask(ShowFlipped(reference="red/alpha"))
    assert (found["version"], found["measured_at"], found["against"], found["rows"]) == (2, 2, 1, 5)
    # Rows 1 and 3 got 1 and get 0, row 2 the other way round: (0 − 1 + 1 − 1 + 0) / 5.
    assert (found["worse"], found["better"]) == (2, 1)
    assert found["mean"] == pytest.approx(-0.2)
    assert found["low"] < -0.2 < found["high"]
    assert [(one["row"], one["before"], one["after"]) for one in found["flipped"]] == [(1, 1, 0), (3, 1, 0), (2, 0, 1)]
    assert found["flipped"][0]["inputs"] == {"text": "question 1"}
    assert [one["expected"] for one in found["flipped"]] == ["yes", "yes", "no"]
    assert len(moved.client.ask(ShowFlipped(reference="red/alpha", limit=2))["flipped"]) == 2


def test_the_command_lists_them(moved: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(moved.folder))
    monkeypatch.setattr(display.console, "width", 200)
    said = CliRunner().invoke(app, ["flipped", "red/alpha", "--version", "2", "--limit", "2"]).output
    assert "red/alpha under version 2, against version 1: 2 of 5 rows worse, 1 better; -0.2000 in the mean of" in said
    rows = [line.split() for line in said.splitlines() if line.strip().endswith(("question 1", "question 3"))]
    assert rows == [[n, "1.0000", "0.0000", "yes", "question", q] for n, q in (("2", "1"), ("4", "3"))]
    assert "1 row that changed less" in said


def test_in_the_version_of_its_birth_a_task_is_compared_with_its_own_adapter(moved: Site) -> None:
    found = moved.client.ask(ShowFlipped(reference="red/alpha", version=1))
    assert (found["version"], found["against"], found["worse"], found["better"], found["flipped"]) == (1, 0, 0, 0, [])


def test_without_kept_results_nothing_is_made_up(moved: Site) -> None:
    with pytest.raises(NotFound, match="results of single rows are not kept of blue/beta"):
        moved.client.ask(ShowFlipped(reference="blue/beta"))
    with pytest.raises(NotFound, match="version 0 has no score of red/alpha"):
        moved.client.ask(ShowFlipped(reference="red/alpha", version=0))


def test_rows_that_are_not_those_which_were_scored_are_not_shown(moved: Site) -> None:
    record = moved.plant.get("red/alpha")
    rows = moved.plant.storage.read(record.eval_key)
    other = moved.plant.get("blue/beta")
    moved.plant.storage.delete(record.eval_key)
    moved.plant.storage.write(record.eval_key, moved.plant.storage.read(other.eval_key))
    try:
        (worst, *_) = moved.client.ask(ShowFlipped(reference="red/alpha"))["flipped"]
        assert (worst["row"], worst["inputs"], worst["expected"]) == (1, None, None)
    finally:
        moved.plant.storage.delete(record.eval_key)
        moved.plant.storage.write(record.eval_key, rows)


def test_another_teams_rows_are_seen_by_nobody_else(moved: Site) -> None:
    with pytest.raises(NotFound, match="there is no such task"):
        moved.guard.answer(ShowFlipped(reference="red/alpha"), Caller("bo", "k", {"blue": Role.ADMIN}))
    with pytest.raises(InvalidInput):
        ShowFlipped(reference="red/alpha", limit=0)
