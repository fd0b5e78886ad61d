"""Retry, pause, resume, cancel, of one task or of many: asked twice, done once; each wait has its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from configs.errors import Conflict, InvalidInput
from configs.task_spec import TaskSpec
from orchestrator.api.requests import Cancel, ChangeMany, ListTasks, Pause, Resume, Retry, ShowTask, Status, Submit
from orchestrator.tasks.task_record import TaskState
from tests.orchestrator.site import Site

pytestmark = pytest.mark.changes


@pytest.fixture
def busy(site: Site) -> Iterator[Site]:
    """Both workers train, and go on with it until the test ends."""
    site.train("red/one", "red/two")
    yield site
    site.plant.cluster.release()


def submit(site: Site, title: str, **changes: Any) -> dict[str, Any]:
    spec = TaskSpec.model_validate(site.document(title, **changes))
    return dict(site.client.ask(Submit(task=spec, by="ann")))


def wait(site: Site, title: str) -> dict[str, Any]:
    return dict(site.client.ask(ShowTask(reference=title))["wait"])


def test_a_paused_team_starts_nothing_and_says_who_paused_it_until_it_is_resumed(site: Site) -> None:
    paused = site.client.ask(Pause(team="red", reason="audit", by="ann"))
    assert (paused["is_new"], paused["paused"]["by"]) == (True, "ann")
    assert site.client.ask(Pause(team="red", by="bob")) == paused | {"is_new": False}
    submit(site, "red/waits")
    site.publish("blue/goes")
    task = site.client.ask(ShowTask(reference="red/waits"))
    assert task["state"] == "queued"
    assert task["why"] == "team red is paused by ann: audit"
    assert (task["wait"]["code"], task["wait"]["since"]) == ("paused", paused["paused"]["at"])
    status = site.client.ask(Status())
    assert status["waiting"] == {"red": {"paused": 1}}
    assert status["paused"] == {"service": None, "teams": {"red": paused["paused"]}}
    assert site.client.ask(Resume(team="red", by="bob"))["is_new"] is True
    assert site.client.ask(Resume(team="red", by="bob"))["is_new"] is False
    site.wait_for("red/waits", "published")


def test_a_paused_service_starts_nothing(site: Site) -> None:
    site.client.ask(Pause(reason="maintenance", by="ann"))
    submit(site, "blue/waits")
    assert site.client.ask(ShowTask(reference="blue/waits"))["why"] == "the service is paused by ann: maintenance"
    site.client.ask(Resume(by="ann"))
    site.wait_for("blue/waits", "published")


def test_a_paused_task_gives_its_worker_up_and_goes_on_when_it_is_resumed(busy: Site) -> None:
    submit(busy, "red/three")
    assert busy.client.ask(Pause(reference="red/one", reason="wrong rows?", by="ann"))["paused"]["by"] == "ann"
    busy.wait_for("red/three", "training")
    one = busy.wait_for("red/one", "queued")
    assert one["why"].startswith("it is paused by ann: wrong rows?")
    assert one["place"] is None
    busy.client.ask(Resume(reference="red/one", by="ann"))
    assert busy.client.ask(ShowTask(reference="red/one"))["place"] == 1
    busy.plant.cluster.release()
    assert busy.wait_for("red/one", "published")["attempt"] == 2


def test_what_is_published_cannot_be_paused(site: Site) -> None:
    with pytest.raises(Conflict, match="red/alpha"):
        site.client.ask(Pause(reference="red/alpha", by="ann"))


@pytest.mark.parametrize(
    "request_", [Pause(reference="red/alpha", team="red"), Resume(reference="red/alpha", team="red")]
)
def test_a_task_and_its_team_are_not_paused_at_once(site: Site, request_: Any) -> None:
    with pytest.raises(InvalidInput, match="names a task and a team"):
        site.client.ask(request_)


def test_an_unknown_team_is_refused_with_those_there_are(site: Site) -> None:
    for request in (Pause(team="green"), Resume(team="green"), ChangeMany(change="cancel", team="green")):
        with pytest.raises(InvalidInput, match="teams of this service: blue, red"):
            site.client.ask(request)


def test_a_task_that_ended_without_a_result_is_submitted_again_once(busy: Site) -> None:
    first = submit(busy, "red/again", client_key="mine")
    busy.client.ask(Cancel(reference="red/again", by="ann"))
    again = busy.client.ask(Retry(reference="red/again", by="ann"))
    assert again["is_new"]
    assert (again["state"], again["title"]) == ("queued", "red/again")
    assert again["task_id"] != first["task_id"]
    for reference in ("red/again", first["task_id"]):  # the old one too: the same submission is alive
        once = busy.client.ask(Retry(reference=reference, by="bob"))
        assert (once["is_new"], once["task_id"]) == (False, again["task_id"])
    with pytest.raises(Conflict, match="is published"):
        busy.client.ask(Retry(reference="red/alpha"))


def test_a_task_behind_another_waits_for_it_and_is_retried_with_it(busy: Site) -> None:
    submit(busy, "red/first")
    submit(busy, "red/second", after=["red/first"])
    task = busy.client.ask(ShowTask(reference="red/second"))
    assert task["why"] == "comes after red/first"
    assert (task["wait"]["code"], task["wait"]["who"], task["place"]) == ("dependency", "team", None)
    busy.client.ask(Cancel(reference="red/first", by="ann"))
    parked = busy.wait_for("red/second", "parked")
    assert parked["trouble"] == ["dependency-failed"]
    with pytest.raises(InvalidInput, match="`onebasis retry red/first` first"):
        busy.client.ask(Retry(reference="red/second"))
    answer = busy.client.ask(ChangeMany(change="retry", team="red", by="ann"))
    assert (answer["done"], answer["refused"]) == (["red/first", "red/second"], [])
    busy.plant.cluster.release()
    busy.wait_for("red/second", "published")


def test_all_tasks_of_a_team_in_a_state_are_cancelled_at_once(busy: Site) -> None:
    for title in ("red/a", "blue/b", "red/c"):
        submit(busy, title)
    submit(busy, "red/behind", after=["red/c"])
    answer = busy.client.ask(ChangeMany(change="cancel", team="red", state=TaskState.QUEUED, by="ann"))
    # A task before the one that it comes after, whose end would park it.
    assert answer == {"change": "cancel", "done": ["red/behind", "red/c", "red/a"], "unchanged": [], "refused": []}
    states = {row["title"]: row["state"] for row in busy.client.ask(ListTasks())}
    assert (states["red/one"], states["blue/b"], states["red/c"]) == ("training", "queued", "cancelled")
    assert states["red/behind"] == "cancelled"
    with pytest.raises(InvalidInput, match="neither a team nor a state"):
        busy.client.ask(ChangeMany(change="cancel"))


def test_of_many_tasks_those_with_nothing_to_do_are_told_and_not_changed(busy: Site) -> None:
    for title in ("red/a", "red/b"):
        submit(busy, title)
    busy.client.ask(Pause(reference="red/a", by="ann"))

    def many(change: Any, **of: Any) -> dict[str, Any]:
        return dict(busy.client.ask(ChangeMany(change=change, by="ann", **of)))

    queued = TaskState.QUEUED
    retried = many("retry", state=queued)
    assert retried["done"] == []
    told = "is queued: only what ended without a result is submitted again"
    assert retried["unchanged"] == [{"title": title, "why": told} for title in ("red/a", "red/b")]
    assert many("pause", state=queued) | {"change": ""} == {
        "change": "",
        "done": ["red/b"],
        "unchanged": [{"title": "red/a", "why": "is paused already, by ann"}],
        "refused": [],
    }
    busy.client.ask(Resume(reference="red/b", by="ann"))
    resumed = many("resume", state=queued)
    assert (resumed["done"], resumed["unchanged"]) == (["red/a"], [{"title": "red/b", "why": "is not paused itself"}])
    assert [busy.client.ask(Resume(reference="red/a", by="ann"))["is_new"] for _ in range(2)] == [False, False]
    busy.client.ask(Cancel(reference="red/a", by="ann"))
    submit(busy, "red/a", priority=1)
    assert many("retry", state=TaskState.CANCELLED)["unchanged"][0]["title"] == "red/a"  # another of its name is alive


def test_what_does_not_belong_to_a_tasks_state_is_told_and_stops_nothing(site: Site) -> None:
    answer = site.client.ask(ChangeMany(change="cancel", team="red", state=TaskState.PUBLISHED, by="ann"))
    assert answer["done"] == []
    (refused,) = answer["refused"]
    assert (refused["title"], refused["error"]["code"]) == ("red/alpha", "conflict")


def test_a_task_whose_time_has_not_come_says_when_it_does(site: Site) -> None:
    submit(site, "red/later", not_before="2999-01-01T00:00:00Z")
    told = wait(site, "red/later")
    assert (told["code"], told["until"]) == ("not-before", 32472144000.0)
    assert "is not started before 2999-01-01" in site.client.ask(ShowTask(reference="red/later"))["why"]
    assert site.client.ask(Status())["waiting"] == {"red": {"not-before": 1}}
    with pytest.raises(InvalidInput, match="has passed already"):
        submit(site, "red/late", deadline="1999-01-01T00:00:00Z")


def test_a_task_that_runs_for_longer_than_it_may_is_parked(busy: Site) -> None:
    busy.client.ask(Cancel(reference="red/one", by="ann"))
    submit(busy, "red/long", max_run_seconds=0.01)
    parked = busy.wait_for("red/long", "parked")
    assert parked["trouble"] == ["ran-too-long"]
    ended = [event["text"] for event in parked["events"] if event["kind"] == "TrainingFailed"]
    assert ended == ["now parked · fault too-long · stopped: it ran for longer than its max_run_seconds, 0.01"]
