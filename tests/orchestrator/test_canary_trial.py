"""A version that passed the gate waits until its canary has answered enough of what is asked, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from configs.errors import Conflict, NotFound
from configs.settings import GateSettings
from orchestrator import canary_trial
from orchestrator.api.requests import RejectVersion, ShowTask
from orchestrator.api.service import Service
from orchestrator.canary_trial import CanaryTrial, answered
from orchestrator.controller import Controller
from tests.builders import BASE
from tests.orchestrator.plant import Plant
from workers.orders import Train

Plants = Callable[..., Plant]
SERVING = {"canary": {"version": "candidate", "share": 0.5}}


def facts(version: int, requests: int = 0, **of_tasks: int) -> dict[str, Any]:
    """What the replicas say of their canary; of tasks of team red."""
    tasks = {f"red/{name}": {"requests": count, "rows": count, "agreed": count} for name, count in of_tasks.items()}
    side = {"requests": requests, "p50_seconds": None, "p99_seconds": None}
    counted = {"main": side, "canary": side, "failed": 0, "not_compared": 0, "tasks": tasks}
    return {"canary": {BASE: {"main_version": version - 1, "version": version, **counted}}}


def test_of_a_revision_its_own_requests_count_and_of_new_tasks_those_of_all() -> None:
    said = facts(4, requests=30, alpha=7)
    assert answered(said, BASE, 4, ["red/alpha", "red/gamma"]) == {"red/alpha": 7, "red/gamma": 0}
    assert answered(said, BASE, 4, []) == {"": 30}
    assert answered(said, BASE, 5, []) == {"": 0}  # what an earlier candidate has answered says nothing of this one
    assert answered({}, BASE, 4, ["red/alpha"]) == {"red/alpha": 0}


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary_trial, "LOOK_SECONDS", 0.0)


def until_over(trial: CanaryTrial, gate: GateSettings, since: float) -> None:
    until = time.monotonic() + 10
    while not trial.is_over(2, ["red/alpha"], since, gate):
        assert time.monotonic() < until, trial.waiting
        time.sleep(0.01)


def test_a_replica_that_ends_takes_nothing_away_and_one_that_is_away_is_asked_again() -> None:
    said: list[Any] = [facts(2, alpha=3), facts(2, alpha=1), RuntimeError("Ray Serve is away"), facts(2, alpha=4)]
    woken: list[bool] = []
    trial = CanaryTrial(BASE, lambda: _raised(said.pop(0) if len(said) > 1 else said[0]), lambda: woken.append(True))
    gate = GateSettings(canary_requests_min=4)
    assert not trial.is_over(2, ["red/alpha"], time.time(), gate)
    until_over(trial, gate, time.time())
    assert trial.told(2) == "the canary answered 4 of 4 requests of red/alpha"
    assert woken
    assert (trial.figures(2), trial.figures(3)) == (facts(2, alpha=4)["canary"][BASE], None)
    assert trial.waiting is None


def _raised(said: Any) -> Any:
    if isinstance(said, Exception):
        raise said
    return said


def test_it_waits_no_longer_than_it_may_counted_from_the_merge_and_says_what_is_missing() -> None:
    trial = CanaryTrial(BASE, dict, lambda: None)
    gate = GateSettings(canary_requests_min=4, canary_seconds_max=60)
    assert not trial.is_over(2, [], time.time() - 50, gate)
    assert trial.waiting is not None
    assert trial.waiting[:2] == (2, "its canary has answered 0 of 4 requests")
    assert trial.is_over(2, [], time.time() - 61, gate)  # as of a control plane that was started again
    told = "the canary answered 0 of 4 requests, and gate.canary_seconds_max (60 s) is over"
    assert (trial.told(2), trial.told(3)) == (told, "")


@pytest.fixture
def tried(make_plant: Plants) -> tuple[Plant, dict[str, Any]]:
    """red/alpha in version 1, and a gate that lets a version pass with three requests; and what the replicas say."""
    plant = make_plant(gate={"canary_requests_min": 3}, serving=SERVING)
    said: dict[str, Any] = facts(1, requests=3)
    made = plant.controller
    plant._controller = Controller(
        made._settings,
        plant.queue,
        {name: subspace.store for name, subspace in made.subspaces.items()},
        plant.cluster,
        plant.service,
        answering=lambda: said,
    )
    plant.submit("red/alpha")
    plant.run()
    return plant, said


def test_a_revision_is_published_when_its_task_was_asked_for_and_says_so_meanwhile(
    tried: tuple[Plant, dict[str, Any]],
) -> None:
    plant, said = tried
    first = plant.get("red/alpha")
    assert plant.queue.events(first.task_id)[-1].text.endswith("version 1; the canary answered 3 of 3 requests")
    said |= facts(2, requests=90, beta=88, alpha=2)
    plant.submit("red/alpha", task_id="t-second", client_key="second", revises=first.task_id, number=2)
    second = lambda: plant.queue.find("t-second")  # noqa: E731
    waits = lambda: plant.controller.subspaces[BASE].candidate.trial.waiting  # noqa: E731
    plant.run(lambda: (waits() or (0, ""))[1].endswith("2 of 3 requests of red/alpha"))
    assert (second().state, plant.state.refs) == ("evaluating", {"main": 1, "candidate": 2})
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    shown = service.answer(ShowTask(reference="t-second"))
    assert (shown["wait"]["code"], shown["wait"]["who"]) == ("canary", "nobody")
    assert shown["wait"]["until"] == pytest.approx(plant.state.versions[2].created_at + 3600)
    assert "version 2 passed the gate, and its canary has answered 2 of 3 requests of red/alpha; it is" in shown["why"]
    said |= facts(2, requests=91, beta=88, alpha=3)
    plant.run(lambda: second().state == "published")
    assert plant.state.refs["main"] == 2


def test_a_person_refuses_the_version_that_waits_and_no_other(tried: tuple[Plant, dict[str, Any]]) -> None:
    plant, said = tried
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    refuse = lambda number: service.answer(RejectVersion(version=number, reason="slower", by="mia"))  # noqa: E731
    with pytest.raises(Conflict, match="version 1 is published"):
        refuse(1)
    with pytest.raises(NotFound):
        refuse(9)
    said |= facts(2, requests=0)
    plant.submit("red/beta")
    plant.run(lambda: plant.controller.subspaces[BASE].candidate.trial.waiting is not None)
    told = refuse(2)
    assert (told["tasks"], told["main"], told["repeated"]) == (["red/beta"], 1, False)
    assert plant.state.refs == {"main": 1, "candidate": 1}
    plant.run(lambda: plant.get("red/beta").state == "rejected")
    beta = plant.get("red/beta")
    assert (beta.reason, beta.reason_codes) == ("mia refused it: slower", ("refused",))
    assert refuse(2)["repeated"] is True
    # What comes after it is judged as ever, and published.
    said |= facts(3, requests=3)
    plant.submit("red/gamma")
    plant.run(lambda: plant.get("red/gamma").state == "published")
    assert (plant.held(), plant.state.refs["main"]) == (["red/alpha", "red/gamma"], 3)


def test_of_several_tasks_in_a_refused_version_each_waits_again_by_itself(tried: tuple[Plant, dict[str, Any]]) -> None:
    plant, said = tried
    service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/beta", "red/gamma")
    plant.run(lambda: len(plant.cluster.held) == 2)
    said |= facts(2)
    plant.cluster.release()
    plant.run(lambda: plant.controller.subspaces[BASE].candidate.trial.waiting is not None)
    assert len(service.answer(RejectVersion(version=2, reason="no", by="mia"))["tasks"]) == 2
    said |= facts(3)
    plant.run(lambda: plant.controller.subspaces[BASE].candidate.trial.waiting[0] == 3)
    assert plant.merges() == [["red/alpha"], ["red/beta", "red/gamma"], ["red/beta"]]
    assert sorted(plant.states().values()) == ["evaluating", "merging", "published"]
