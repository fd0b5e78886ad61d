"""What `main` named when, and how it came there, as people ask it of a service that runs or is down."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.api.access import Caller, Role, owner
from orchestrator.api.requests import BranchesAt, ShowHistory
from orchestrator.commands import display
from orchestrator.commands.cli import app
from orchestrator.commands.moments import shown
from subspace_store import SubspaceReader
from subspace_store.formats.peft import read_peft_folder
from subspace_store.requests import Expire, Hold, Release, Rollback
from tests.builders import LAYOUT
from tests.orchestrator.site import Site

Onebasis = Callable[..., Result]
RED = Caller("rita", "k1", {"red": Role.VIEWER})


@pytest.fixture
def onebasis(site: Site, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    monkeypatch.setattr(display.console, "width", 240)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.mark.changes
def test_the_history_of_main_tells_who_moved_it_why_and_what_it_did_to_tasks_and_scores(
    site: Site, onebasis: Onebasis
) -> None:
    site.client.ask(Rollback(version=1, reason="beta smells", hold=True, actor="x"))
    site.client.ask(Release(actor="x"))
    site.client.ask(Rollback(version=2, actor="x"))
    moves = json.loads(onebasis("history", "--json").output)["moves"]
    assert [(m["actor"], m["how"], m["reason"], m["from"], m["to"]) for m in moves[::-1]] == [
        ("gate", "published", "passed the gate", 0, 1),
        ("gate", "published", "passed the gate", 1, 2),
        ("ann", "rolled back", "beta smells", 2, 1),
        ("ann", "released", "", 1, 1),
        ("ann", "rolled back", "", 1, 2),
    ]
    assert [(m["came"], m["left"]) for m in moves[::-1]] == [
        (["red/alpha"], []),
        (["blue/beta"], []),
        ([], ["blue/beta"]),
        ([], []),
        (["blue/beta"], []),
    ]
    # The stand-in scores every task 0.9; red/alpha keeps its score, blue/beta comes with one and takes it along.
    assert [m["scores"] for m in moves[::-1]] == [
        {"red/alpha": [None, 0.9]},
        {"blue/beta": [None, 0.9]},
        {"blue/beta": [0.9, None]},
        {},
        {"blue/beta": [None, 0.9]},
    ]
    assert moves[3]["stayed"] == {"tasks": 1, "measured": 1, "before": 0.9, "after": 0.9}
    table = onebasis("history", "main").output
    line = next(line for line in table.splitlines() if "beta smells" in line)
    for words in (shown(moves[2]["time"]), "ann", "rolled back and held", "v2", "v1", "-blue/beta 0.9000"):
        assert words in line
    assert "+blue/beta 0.9000" in table
    candidate = json.loads(onebasis("history", "candidate", "--json").output)["moves"]
    assert [m["how"] for m in candidate[::-1]] == ["merged", "merged", "rolled back", "rolled back"]
    # Page by page it is the same.
    page = onebasis("history", "--limit", "2", "--json")
    assert json.loads(page.stdout)["moves"] == moves[:2]
    assert f"--before {moves[1]['seq']}" in page.stderr
    rest = json.loads(onebasis("history", "--before", str(moves[1]["seq"]), "--json").stdout)
    assert (rest["moves"], rest["before"]) == (moves[2:], None)
    # Who sees one team has the means of that team's tasks alone.
    site.publish("red/gamma")
    stayed = [site.guard.answer(ShowHistory(branch="main"), who)["moves"][0]["stayed"] for who in (owner("ann"), RED)]
    assert [one["tasks"] for one in stayed] == [2, 1]


def test_nothing_of_another_team_is_in_it(site: Site) -> None:
    whole = site.client.ask(ShowHistory(branch="main"))
    mine = site.guard.answer(ShowHistory(branch="main"), RED)
    assert "beta" in json.dumps(whole)
    assert "beta" not in json.dumps(mine)
    assert [m["scores"] for m in mine["moves"][::-1]] == [{"red/alpha": [None, 0.9]}, {}]
    assert [m["stayed"]["tasks"] for m in mine["moves"][::-1]] == [0, 1]
    then = site.guard.answer(BranchesAt(at=whole["moves"][0]["time"]), RED)
    assert (then["tasks"], then["hidden"]) == (["red/alpha"], {"tasks": 1})


def test_versions_at_a_moment_are_what_main_was_then(site: Site, onebasis: Onebasis) -> None:
    newest, first = json.loads(onebasis("history", "--json").output)["moves"]
    for at, version, tasks in (
        (newest["time"], 2, ["blue/beta", "red/alpha"]),
        (newest["time"] - 0.0001, 1, ["red/alpha"]),
        (first["time"], 1, ["red/alpha"]),
    ):
        answer = site.client.ask(BranchesAt(at=at))
        assert (answer["branches"]["main"], answer["tasks"]) == (version, tasks)
    table = onebasis("versions", "--at", "0s ago").output
    assert "main named version 2" in table
    assert "main held blue/beta, red/alpha" in table
    for typed, said in (
        ("yesterday", "'2h ago'"),
        ("2099-01-01", "has not come yet"),
        ("1999-01-01", "there was no store yet"),
    ):
        refused = onebasis("versions", "--at", typed)
        assert refused.exit_code > 0
        assert said in refused.stderr


@pytest.mark.changes
def test_an_export_at_a_moment_is_what_main_held_then_until_that_version_has_expired(
    site: Site, onebasis: Onebasis, tmp_path: Path
) -> None:
    moved = site.client.ask(ShowHistory(branch="main"))["moves"][0]["time"]
    at = datetime.fromtimestamp(moved + 0.001, tz=UTC).isoformat()
    site.client.ask(Rollback(version=1, actor="x"))
    gone = onebasis("export", "blue/beta", "--output", str(tmp_path / "now"))
    assert "version 1 has no task 'blue/beta'" in gone.stderr
    then = onebasis("export", "blue/beta", "--at", at, "--output", str(tmp_path / "then"))
    assert then.exit_code == 0, then.stderr
    assert "main named version 2 at" in then.stderr
    written = read_peft_folder(tmp_path / "then", "tiny", LAYOUT.sha256)
    task_id = next(t for t, task in site.plant.state.tasks_at(2).items() if task.name == "blue/beta")
    held = SubspaceReader.open(site.plant.storage).adapter(task_id, 2)
    assert written.modules.keys() == held.modules.keys()
    both = onebasis("export", "blue/beta", "--at", at, "--version", "2", "--output", str(tmp_path / "both"))
    assert "leave one of them out" in both.stderr
    site.client.ask(Expire(versions=(2,), actor="x"))
    expired = onebasis("export", "blue/beta", "--at", at, "--output", str(tmp_path / "expired"))
    assert expired.exit_code > 0
    assert "version 2" in expired.stderr
    assert "has expired" in expired.stderr
    assert "onebasis history main" in expired.stderr
    assert "has expired since" in onebasis("versions", "--at", at).output


@pytest.mark.changes
def test_a_service_that_is_down_is_asked_the_same_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path / "site", storage={"url": f"file:{tmp_path / 'store'}"})
    try:
        site.publish("red/alpha")
        site.client.ask(Hold(reason="audit", actor="x"))
        up = site.client.ask(ShowHistory(branch="main"))
    finally:
        site.close()
    (site.folder / "server.json").unlink()
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    down = CliRunner().invoke(app, ["history", "--json"])
    assert json.loads(down.stdout) == up
    assert [move["how"] for move in up["moves"]] == ["held", "published"]
