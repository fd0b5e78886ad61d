"""`onebasis task` says what callers over HTTP really get, as the replicas themselves tell it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.settings import CanarySettings, ServingSettings
from orchestrator.api.access import Caller, Role, owner
from orchestrator.api.requests import ShowScores, ShowTask
from orchestrator.api.service import Service
from orchestrator.commands import display, version_tables
from tests.builders import BASE
from tests.orchestrator.checked_guard import CheckedGuard
from tests.orchestrator.plant import Plant


class Replicas:
    """What Ray Serve says, in its place."""

    def __init__(self, *versions: tuple[int, str], canary: dict[str, Any] | None = None) -> None:
        self.canary = {} if canary is None else {"canary": {BASE: canary}}
        self.replicas = [{"pid": 10 + n, "version": v, "trouble": why} for n, (v, why) in enumerate(versions)]

    def facts(self, settings: Any) -> dict[str, Any]:
        return {"url": settings.serving.url, "state": "running", "base_models": {BASE: self.replicas}, **self.canary}


@pytest.fixture
def revised(tmp_path: Path, _no_waiting: None) -> Plant:
    """red/alpha in version 1, its second revision in version 2."""
    plant = Plant(tmp_path, serving=ServingSettings().model_dump())
    (first,) = plant.submit("red/alpha")
    plant.run()
    plant.submit("red/alpha", task_id="t-second", client_key="second", revises=first.task_id, number=2)
    plant.run(lambda: plant.queue.find("t-second").state == "published")
    return plant


def service_of(plant: Plant, replicas: Replicas) -> Service:
    return Service(
        plant.settings,
        plant.queue,
        plant.storages,
        plant.controller,
        plant.cluster,
        deployment=replicas,  # type: ignore[arg-type]
    )


def asked(plant: Plant, replicas: Replicas, **request: str) -> Any:
    return service_of(plant, replicas).answer(ShowTask(**request))


def test_a_task_says_which_revision_each_replica_answers_with_and_why_one_is_behind(
    revised: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    replicas = Replicas((2, ""), (2, ""), (1, "the bucket is away"))
    found = asked(revised, replicas, reference="red/alpha")
    told = [(one["revision"], one["version"], one["trouble"]) for one in found["served"]["replicas"]]
    assert told == [(2, 2, ""), (2, 2, ""), (1, 1, "the bucket is away")]
    display.task(found)
    line = next(line for line in capsys.readouterr().out.splitlines() if "served" in line)
    assert "revision 2 by version 2: 2 replicas; revision 1 by version 1: 1 replica" in line
    assert "replica 12 keeps version 1: the bucket is away" in line


def test_a_version_without_the_task_and_replicas_that_are_not_there_are_told_as_that(
    revised: Plant, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(revised, Replicas((0, "")), reference="red/alpha")["served"]["replicas"][0]["task_id"] is None
    display.task(asked(revised, Replicas(), reference="red/alpha"))
    assert "by nobody: what answers is running" in capsys.readouterr().out


def test_where_nothing_is_to_answer_nothing_is_told(plant: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    plant.submit("red/alpha")
    plant.run()
    found = asked(plant, Replicas((1, "")), reference="red/alpha")
    assert found["served"] is None
    display.task(found)
    assert "served " not in capsys.readouterr().out


def test_scores_and_task_show_how_the_canary_answers_what_is_really_asked(
    make_plant: Callable[..., Plant], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display.console, "width", 300)
    plant = make_plant(serving=ServingSettings(canary=CanarySettings(share=0.5)).model_dump())
    plant.submit("red/alpha", "blue/beta")
    plant.run()
    side = {"requests": 30, "p50_seconds": 0.012, "p99_seconds": 0.04}
    tasks = {
        "red/alpha": {"requests": 20, "rows": 10, "agreed": 9},
        "blue/beta": {"requests": 10, "rows": 5, "agreed": 5},
    }
    compared = {
        "main_version": 1, "version": 2, "main": {**side, "requests": 70, "p50_seconds": 0.011}, "canary": side,
        "failed": 1, "not_compared": 15, "tasks": tasks,
    }  # fmt: skip
    service = service_of(plant, Replicas((1, ""), canary=compared))
    found = CheckedGuard(service).answer(ShowScores(), owner("ann"))
    assert found["canary"] == compared
    version_tables.scores(found)
    shown = capsys.readouterr().out
    assert (
        "canary version 2 answered 30 of 100 requests, 12 ms against 11 ms (median); it agreed with version 1 on 14 of "
        "15 rows, least in red/alpha (9 of 10), blue/beta (5 of 5); could not answer 1"
    ) in shown
    mine = CheckedGuard(service).answer(ShowScores(), Caller("rita", "k", {"red": Role.VIEWER}))
    assert [*mine["canary"]["tasks"]] == ["red/alpha"]
    one = CheckedGuard(service).answer(ShowTask(reference="red/alpha"), owner("ann"))
    assert one["served"]["canary"] == {"version": 2, "main_version": 1, "requests": 20, "rows": 10, "agreed": 9}
    display.task(one)
    told = "canary     version 2 answered 20 requests of it; it agreed with version 1 on 9 of 10 rows"
    assert told in capsys.readouterr().out
    assert CheckedGuard(service_of(plant, Replicas((1, "")))).answer(ShowScores(), owner("ann"))["canary"] is None
