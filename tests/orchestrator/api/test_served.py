"""`onebasis task` says what callers over HTTP really get, as the replicas themselves tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.settings import ServingSettings
from orchestrator.api.requests import ShowTask
from orchestrator.api.service import Service
from orchestrator.commands import display
from tests.builders import BASE
from tests.orchestrator.plant import Plant


class Replicas:
    """What Ray Serve says, in its place."""

    def __init__(self, *versions: tuple[int, str]) -> None:
        self.replicas = [{"pid": 10 + n, "version": v, "trouble": why} for n, (v, why) in enumerate(versions)]

    def facts(self, settings: Any) -> dict[str, Any]:
        return {"url": settings.serving.url, "state": "running", "base_models": {BASE: self.replicas}}


@pytest.fixture
def revised(tmp_path: Path, _no_waiting: None) -> Plant:
    """red/alpha in version 1, its second revision in version 2."""
    plant = Plant(tmp_path, serving=ServingSettings().model_dump())
    (first,) = plant.submit("red/alpha")
    plant.run()
    plant.submit("red/alpha", task_id="t-second", client_key="second", revises=first.task_id, number=2)
    plant.run(lambda: plant.queue.find("t-second").state == "published")
    return plant


def asked(plant: Plant, replicas: Replicas, **request: str) -> Any:
    service = Service(
        plant.settings,
        plant.queue,
        plant.storages,
        plant.controller,
        plant.cluster,
        deployment=replicas,  # type: ignore[arg-type]
    )
    return service.answer(ShowTask(**request))


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
