"""`submit --revise`, `task`, `scores` and `rollback-task` as a person types them, against a service over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from configs.errors import Exit
from orchestrator.commands import display
from orchestrator.commands.cli import app
from tests.builders import write_rows
from tests.orchestrator.site import Site

Onebasis = Callable[..., Result]
TITLE = "red/alpha"


@pytest.fixture
def revised_site(tmp_path: Path) -> Iterator[Site]:
    """A service with one published task."""
    site = Site(tmp_path)
    try:
        site.publish(TITLE)
        yield site
    finally:
        site.close()


@pytest.fixture
def onebasis(revised_site: Site, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(revised_site.folder))
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(display.console, "width", 200)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def file_of(site: Site, number: int, **changes: Any) -> str:
    document = site.document(TITLE, **changes)
    for side in ("train", "eval"):
        rows = [{"text": f"{side} {number} {i}", "label": i % 2} for i in range(6)]
        document["data"][f"{side}_file"] = str(write_rows(site.folder / "data" / f"{side}{number}.jsonl", rows))
    path = site.folder / f"alpha-{number}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_a_published_task_is_revised_listed_and_put_back(revised_site: Site, onebasis: Onebasis) -> None:
    site = revised_site
    refused = onebasis("submit", file_of(site, 2))
    assert refused.exit_code == Exit.CONFLICT
    assert "onebasis submit --revise" in refused.output
    checked = onebasis("submit", file_of(site, 2), "--revise", "--dry-run")
    assert checked.exit_code == 0, checked.output
    done = onebasis("submit", file_of(site, 2), "--revise", "--wait", "--json")
    assert done.exit_code == 0, done.output
    second = json.loads(done.output)
    assert (second["revision"], second["exact_title"], second["state"]) == (2, f"{TITLE}@2", "published")
    known = onebasis("submit", file_of(site, 2, revises=True))  # the file says it: the same submission
    assert f"{TITLE}@2 is task {second['task_id']}, published (known already" in known.output
    again = onebasis("submit", file_of(site, 2), "--revise", "--wait")
    assert again.exit_code == 0
    shown = onebasis("task", TITLE).output
    assert f"{TITLE}@2" in shown
    assert "revision 1" in shown
    assert "rows of @1" in shown
    assert json.loads(onebasis("task", f"{TITLE}@1", "--json").output)["state"] == "replaced"
    assert onebasis("task", f"{TITLE}@7").exit_code == Exit.NOT_FOUND
    assert f"{TITLE} on the rows of" in onebasis("scores").output
    preview = json.loads(onebasis("rollback-task", TITLE, "--to", "1", "--preview", "--json").output)
    assert (preview["preview"], preview["leaving"], preview["revision"]) == (True, second["task_id"], 1)
    told = onebasis("rollback-task", TITLE, "--to", "1")
    assert told.exit_code == 0, told.output
    assert f"{TITLE}@1 is back in the place of {second['task_id']}, with an error of" in told.output
    site.wait_for(f"{TITLE}@1", "published")
    site.wait_for(f"{TITLE}@2", "replaced")
    twice = onebasis("rollback-task", TITLE, "--to", "1")
    assert twice.exit_code == Exit.CONFLICT
    assert "holds it" in twice.output
    back = onebasis("rollback-task", second["task_id"], "--to", "2", "--op-key", "restore-revision:x")
    assert back.exit_code == 0, back.output
    assert "was done before" in onebasis("rollback-task", TITLE, "--to", "2", "--op-key", "restore-revision:x").output
    site.wait_for(f"{TITLE}@2", "published")
