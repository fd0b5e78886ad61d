"""The service over real HTTP, and without it: every route with values, errors as themselves, the offline way."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from configs.errors import Conflict, InvalidInput, NotFound, OnebasisError, OutcomeUnknown, StoreFull, Unavailable
from configs.log_lines import ids, trace_id_of
from configs.task_spec import TaskSpec
from orchestrator.api import views
from orchestrator.api.client import Client
from orchestrator.api.requests import (
    Cancel,
    Diff,
    Export,
    Health,
    ListTasks,
    ListTeams,
    ListVersions,
    Preempt,
    PreviewRemove,
    PreviewRollback,
    ReadEvents,
    ServiceRequest,
    ShowCapacity,
    ShowMatrix,
    ShowScores,
    ShowStorage,
    ShowTask,
    ShowVersion,
    Status,
    Submit,
)
from orchestrator.api.routes import ROUTES
from orchestrator.api.service import Service
from orchestrator.scheduling.scheduler import Decision
from orchestrator.tasks.audit_log import AuditLog
from orchestrator.tasks.doubtful_settings import few_rows
from orchestrator.tasks.task_record import TaskState
from orchestrator.worker_pool import PoolStatus
from subspace_store import SubspaceReader, SubspaceStore
from subspace_store.formats.peft import read_peft_folder
from subspace_store.requests import (
    Expire,
    Hold,
    Merge,
    Publish,
    RecordScores,
    Refine,
    Reject,
    Release,
    Remove,
    Rollback,
    StoreRequest,
    Tag,
)
from tests import builders
from tests.builders import LAYOUT, task_document
from tests.orchestrator.site import TOKEN, Site
from workers.orders import Phase, Train

# --- who may -----------------------------------------------------------------------------------------------------


def test_the_name_of_the_scheme_may_be_written_in_any_case(site: Site) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert httpx.get(f"{site.url}/v1/health", headers={"authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_a_key_names_the_operation_and_not_a_word_that_begins_like_it() -> None:
    assert Hold(reason="audit", op_key="hold:1").op_key == "hold:1"
    with pytest.raises(InvalidInput, match=r"^Hold: op_key: has to begin with hold.*as in hold:monday"):
        Hold(reason="audit", op_key="holdtag:1")


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN[:-1]}])
def test_nobody_gets_anything_without_the_token(site: Site, header: dict[str, str]) -> None:
    with httpx.Client(base_url=site.url, headers=header, trust_env=False) as stranger:
        routes = [(route.verb, route.url) for route in ROUTES]
        for verb, path in [*routes, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing")]:
            answer = stranger.request(verb, path.replace("{reference:path}", "x"))
            assert answer.status_code == 401, path
            assert answer.json()["what"] == "missing or wrong token"
    assert site.client.ask(Status())["tasks"] == {"published": 2}


# --- every route -------------------------------------------------------------------------------------------------


def test_status_tells_what_is_where(site: Site) -> None:
    answer = site.client.ask(Status())
    assert (answer["running"], answer["base_model"], answer["main"], answer["candidate"]) == (True, "tiny", 2, 2)
    assert answer["tasks"] == {"published": 2}
    assert answer["storage"] == site.plant.storage.url
    assert answer["workers"] == {"worker-0": "free", "worker-1": "free"}
    assert answer["footprint"] == site.client.ask(ShowCapacity())["footprint"]


FEW = few_rows(1)
"""What is said of the site's one evaluation row."""


def test_a_dry_run_tells_what_would_be_taken_in_and_takes_nothing(site: Site) -> None:
    answer = site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/dry")), dry_run=True, by="ann"))
    assert answer == {
        "accepted": False,
        "dry_run": True,
        "is_new": True,
        "title": "red/dry",
        "train_rows": 6,
        "eval_rows": 1,
        "warnings": [FEW],
        # Two tasks of 2 s each have ended here, a worker is free; 5 s nobody can promise, and it may be three times as
        # late, as long as it is not known how right estimates are.
        "pool": "default",
        "fits": True,
        "place": 1,
        "start": {"seconds": 0.0, "earliest": 0.0, "latest": 15.0},
        "end": {"seconds": 2.0, "earliest": 2.0, "latest": 17.0},
        "length_seconds": 2.0,
        "cost_place_seconds": 2.0,
        "cost_gpu_seconds": None,
        "runs_too_long": "",
        "deadline": None,
        "wait": {"code": "about-to-start", "pool": "", "about": "", "since": None, "until": None, "who": "nobody"},
        "why": "is about to start; place 1, 0 before it; starts at once, in four of five cases between 0 s and 15 s "
        "(it takes about 2 s, by the last 2 tasks like it)",
    }
    assert len(site.client.ask(ListTasks())) == 2


def test_the_same_submission_again_is_the_same_task(site: Site) -> None:
    answer = site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/alpha")), by="ann"))
    assert (answer["accepted"], answer["is_new"], answer["state"]) == (True, False, "published")
    assert len(site.client.ask(ListTasks())) == 2


def test_tasks_are_listed_and_chosen(site: Site) -> None:
    assert [(t["title"], t["state"], t["version"]) for t in site.client.ask(ListTasks())] == [
        ("red/alpha", "published", 1),
        ("blue/beta", "published", 2),
    ]
    assert [(t["local_score"], t["main_score"]) for t in site.client.ask(ListTasks())] == [(0.9, 0.9), (0.9, 0.9)]
    assert (
        site.client.ask(ShowTask(reference="red/alpha"))["main_score"] == 0.9
    )  # what `submit --wait` shows at its end
    assert [t["title"] for t in site.client.ask(ListTasks(team="blue"))] == ["blue/beta"]
    assert site.client.ask(ListTasks(state=TaskState("parked"))) == []
    assert site.client.ask(ListTasks(live=True)) == []
    with pytest.raises(InvalidInput, match="asks for live tasks that are published"):
        site.client.ask(ListTasks(live=True, state=TaskState("published")))


def test_one_task_is_shown_with_why_and_its_history(site: Site) -> None:
    task = site.client.ask(ShowTask(reference="red/alpha"))
    assert (task["local_score"], task["base_score"], task["eval_rows"]) == (0.9, 0.5, 1)
    # Of one evaluation row, its label alone gets 1: the score, in main the same, says nothing.
    few, said = task["warnings"]
    assert few == FEW
    assert said.startswith("own adapter: accuracy 0.9000 is no better than always giving the most frequent label")
    assert task["why"] == "main holds it since version 1"
    assert task["spec"]["team"] == "red"
    assert (task["training"]["steps"], task["training"]["loss"], task["training"]["seconds"]) == (10, 0.25, 2.0)
    kinds = [event["kind"] for event in task["events"]]
    assert kinds == ["submitted", "Claimed", "TrainingDone", "MergeBegun", "Merged", "Judged"]
    assert site.client.ask(ShowTask(reference=task["task_id"][:12]))["title"] == "red/alpha"
    assert site.plant.queue.get(task["task_id"]).submitted_by == "ann"


def test_logs_go_on_after_an_event(site: Site) -> None:
    lines = site.client.ask(ReadEvents(reference="red/alpha"))
    assert lines[0]["text"] == f"submitted; {FEW}"
    assert site.client.ask(ReadEvents(reference="red/alpha", after=lines[1]["event_id"])) == lines[2:]


def test_versions_are_listed_with_their_branches(site: Site) -> None:
    one, two = site.client.ask(ListVersions())
    assert (one["version"], one["parent"], one["added"], one["refs"]) == (1, 0, ["red/alpha"], [])
    assert (two["version"], two["parent"], two["added"], two["task_count"]) == (2, 1, ["blue/beta"], 2)
    assert (one["status"], two["status"], sorted(two["refs"])) == ("published", "published", ["candidate", "main"])
    # Two adapters of two directions each and nothing cut away: four directions.
    assert (one["rank_max"], two["rank_max"]) == (2, 4)


def test_a_first_step_of_an_earlier_attempt_is_not_shown_as_a_negative_wait(site: Site) -> None:
    record = site.plant.queue.find("red/alpha")
    assert record.claimed_at is not None
    earlier = record.model_copy(update={"first_step_at": record.claimed_at - 5})
    shown = views.task_details(earlier, [], site.folder / "none.png")["training"]
    assert shown["claim_to_first_step_seconds"] == 0.0


def test_one_version_is_shown_with_scores_ranks_and_what_it_takes(site: Site) -> None:
    version = site.client.ask(ShowVersion(version=2))
    assert [(t["title"], t["birth"], t["score"]) for t in version["tasks"]] == [
        ("red/alpha", 1, 0.9),
        ("blue/beta", 2, 0.9),
    ]
    assert version["ranks"] == {"layer.0.query": [4, 4], "layer.0.value": [4, 4]}
    # Separate: two tasks of rank 2 in modules of 12×10 and 8×10: 2 · 2 · (22 + 18) = 160 numbers.
    assert version["footprint"]["separate_numbers"] == 160
    # Basis: 4 · (22 + 18) = 160; coefficients: per task and module E and F of 4×2: 2 · 2 · 2 · 8 = 64.
    assert (version["footprint"]["basis_numbers"], version["footprint"]["coefficient_numbers"]) == (160, 64)
    assert version["average_accuracy"] == {"value": pytest.approx(0.9), "n": 2, "half_width_95": pytest.approx(0.0)}
    assert version["merge_gap"]["value"] == pytest.approx(0.0)


def test_a_diff_tells_what_came_and_how_far_the_rest_moved(site: Site) -> None:
    diff = site.client.ask(Diff(old=1, new=2))
    assert [task["name"] for task in diff["added"]] == ["blue/beta"]
    assert diff["removed"] == []
    assert diff["ranks"]["layer.0.query"] == [[2, 2], [4, 4]]
    assert diff["scores"] == {"red/alpha": [0.9, 0.9], "blue/beta": [None, 0.9]}
    (drift,) = diff["drift_bound"].values()
    assert drift == pytest.approx(0.0, abs=1e-5)


def test_the_capacity_tells_what_each_task_stores_and_how_that_grew(site: Site) -> None:
    found = site.client.ask(ShowCapacity())
    assert [(row["version"], row["tasks"]) for row in found["trend"]] == [(0, 0), (1, 1), (2, 2)]
    assert found["trend"][-1].items() <= found["footprint"].items()
    assert {task["title"]: task["separate_numbers"] for task in found["tasks"]} == {"red/alpha": 80, "blue/beta": 80}
    assert sum(task["private_numbers"] for task in found["tasks"]) == found["footprint"]["private_numbers"] == 0
    coefficients = sum(task["coefficient_numbers"] for task in found["tasks"])
    assert coefficients == found["footprint"]["coefficient_numbers"] > 0
    assert found["rank_max"] == 64
    assert found["footprint"]["stored_bytes"] > found["footprint"]["basis_numbers"] * 4
    assert site.client.ask(ShowCapacity(version=0))["tasks"] == []


def test_scores_are_a_matrix_of_versions_and_tasks(site: Site) -> None:
    scores = site.client.ask(ShowScores())
    assert (scores["version"], scores["versions"]) == (2, [1, 2])
    assert [(t["title"], t["birth"], t["local"], t["base"], t["rows"]) for t in scores["tasks"]] == [
        ("red/alpha", 1, 0.9, 0.5, 1),
        ("blue/beta", 2, 0.9, 0.5, 1),
    ]
    assert [[cell["score"] for cell in row] for row in scores["matrix"]] == [[0.9, None], [0.9, 0.9]]
    assert scores["by_version"][0]["forgetting"] == {"value": None, "n": 0, "half_width_95": None}
    assert site.client.ask(ShowScores(version=1))["versions"] == [1]
    assert site.client.ask(ShowScores(version=0))["tasks"] == []


def test_the_matrix_of_a_picture_holds_what_differs_from_the_version_before(site: Site) -> None:
    found = site.client.ask(ShowMatrix())
    assert (found["version"], found["versions"]) == (2, [1, 2])
    assert found["tasks"] == site.client.ask(ShowScores())["tasks"]
    # red/alpha was measured in version 1 and is carried over; blue/beta came in version 2. 100 rows each.
    assert found["news"] == [[[0, 0.9, 100]], [[1, 0.9, 100]]]
    assert site.client.ask(ShowMatrix(version=1))["news"] == [[[0, 0.9, 100]]]
    assert site.client.ask(ShowMatrix(version=0))["news"] == []


def test_the_teams_tell_their_shares_quotas_and_use(site: Site) -> None:
    teams = site.client.ask(ListTeams())["teams"]
    assert set(teams) == {"red", "blue"}
    for facts in teams.values():
        assert (facts["weight"], facts["share"], facts["places"]) == (1.0, 0.5, 0)
        assert facts["places_quota"] is facts["place_hours_a_week_quota"] is None
        assert facts["place_hours_a_week"] > 0.0
        assert (facts["gpu_hours_a_week"], facts["gpu_hours_a_week_quota"]) == (0.0, None)


def test_the_settings_are_told_without_passwords(tmp_path: Path) -> None:
    url, mlflow = "postgresql+psycopg://ann:geheim@db.example.org/onebasis", "http://ann:geheim@mlflow.example.org"
    settings = builders.settings(tmp_path, database_url=url, mlflow={"tracking_uri": mlflow})
    told = Service(settings, None, {}).status.settings()
    assert "geheim" not in json.dumps(told)
    assert told["database_url"] == "postgresql+psycopg://ann:***@db.example.org/onebasis"
    assert told["teams"] == settings.model_dump(mode="json")["teams"]


def test_an_export_is_what_peft_reads_and_a_card(site: Site, tmp_path: Path) -> None:
    packed = site.client.ask(Export(reference="red/alpha", version=2))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert archive.namelist() == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        archive.extractall(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-source"
    again = read_peft_folder(tmp_path, "tiny", LAYOUT.sha256)
    task_id = site.client.ask(ShowTask(reference="red/alpha"))["task_id"]
    stored = SubspaceReader.open(site.plant.storage).adapter(task_id, 2)
    for name, update in stored.modules.items():
        assert torch.allclose(again.modules[name].delta(), update.delta(), atol=1e-5)
    assert torch.equal(again.head["classifier.weight"], stored.head["classifier.weight"])


def test_a_preview_of_a_rollback_changes_nothing(site: Site) -> None:
    before = site.plant.state
    answer = site.client.ask(PreviewRollback(version=1))
    assert answer == {
        "base_model": "tiny",
        "preview": True,
        "held": False,
        "from_version": 2,
        "to_version": 1,
        "vanishing": ["blue/beta"],
        "returning": [],
        "refused": "",
    }
    assert site.plant.state == before
    assert site.client.ask(Status())["tasks"] == {"published": 2}


@pytest.mark.changes
def test_what_a_removal_would_do_is_told_before_and_what_is_left_can_be_collected(site: Site) -> None:
    before, alpha = site.plant.state, site.plant.get("red/alpha").task_id
    told = site.client.ask(PreviewRemove(task_id=alpha))
    assert (told["title"], told["revisions"], told["start"], told["versions"]) == ("red/alpha", [alpha], 0, [2])
    assert (told["refused"], site.plant.state) == ("", before)
    site.client.ask(Hold(reason="audit"))
    assert "main is held" in site.client.ask(PreviewRemove(task_id=alpha))["refused"]
    site.client.ask(Release())
    site.client.ask(Remove(task_id=alpha, publish=True, reason="licence"))
    assert site.plant.held() == ["blue/beta"]
    serving = site.client.ask(ShowCapacity())["footprint"]
    numbers = sum(serving[f"{kind}_numbers"] for kind in ("basis", "coefficient", "private"))
    assert (told["numbers_after"], told["numbers_before"] > numbers) == (numbers, True)
    whole = site.client.ask(ShowStorage())
    assert (whole["versions"], whole["expired"], whole["garbage_objects"]) == (3, [], 0)
    site.client.ask(Expire(versions=(1, 2)))
    left = site.client.ask(ShowStorage())
    garbage = SubspaceReader.open(site.plant.storage).collectable()
    assert left["expired"] == [1, 2]
    assert left["garbage_objects"] == len(garbage.keys) > 0
    assert left["garbage_bytes"] == sum(len(site.plant.storage.read(key)) for key in garbage.blobs)
    assert left["stored_bytes"] == whole["stored_bytes"] - left["garbage_bytes"]


@pytest.mark.changes
def test_a_rollback_moves_main_and_back_and_the_tasks_follow(site: Site) -> None:
    answer = site.client.ask(Rollback(version=1, reason="try", actor="ann", op_key="rollback:one"))
    assert (answer["preview"], answer["vanishing"]) == (False, ["blue/beta"])
    assert site.wait_for("blue/beta", "parked")["reason"].startswith("main was rolled back to version 1")
    assert [v["status"] for v in site.client.ask(ListVersions())] == ["published", "rolled back"]
    # The same key again is the same rollback: it answers as before and writes nothing.
    seq = site.plant.state.seq
    again = site.client.ask(Rollback(version=1, reason="try", actor="ann", op_key="rollback:one"))
    assert again == answer | {"repeated": True}
    assert answer["repeated"] is False
    assert site.plant.state.seq == seq
    assert site.client.ask(Rollback(version=2, actor="ann", op_key="rollback:two"))["returning"] == ["blue/beta"]
    site.wait_for("blue/beta", "published")


@pytest.mark.changes
def test_a_training_task_shows_its_place_and_progress_and_is_cancelled(site: Site) -> None:
    cluster = site.plant.cluster
    cluster.hold = lambda order: isinstance(order, Train)
    try:
        for name in ("one", "two", "three"):
            site.client.ask(Submit(task=TaskSpec.model_validate(site.document(f"red/{name}")), by="ann"))
        site.wait_for("red/two", "training")
        waiting = site.client.ask(ShowTask(reference="red/three"))
        assert (waiting["state"], waiting["place"]) == ("queued", 1)
        live = site.client.ask(ListTasks(live=True))
        assert [(t["title"], t["state"]) for t in live] == [
            ("red/one", "training"),
            ("red/two", "training"),
            ("red/three", "queued"),
        ]
        assert site.client.ask(ListTeams())["teams"]["red"]["places"] == 2
        interval = r"in four of five cases between \d+ s and \d+ s"
        start = rf"starts (at once|in about \d s), {interval} \(it takes about 2 s, by the last 2 tasks like it\)"
        assert re.fullmatch(rf"all places are in use; place 1, 0 before it; {start}", waiting["why"])
        assert (waiting["wait"]["code"], waiting["wait"]["who"]) == ("no-free-place", "nobody")
        assert 0 <= waiting["starts_in_seconds"] <= 2
        assert site.client.ask(Cancel(reference="red/three", by="ann"))["state"] == "cancelled"
        rows, until = f"data/{waiting['task_id']}/", time.monotonic() + 10
        while site.plant.storage.keys(rows):  # never trained, never read again
            assert time.monotonic() < until
            time.sleep(0.01)
        for name in ("one", "two"):
            assert site.client.ask(Cancel(reference=f"red/{name}", by="ann"))["state"] == "training"
            site.wait_for(f"red/{name}", "cancelled")
    finally:
        cluster.release()


@pytest.mark.changes
def test_a_task_says_why_no_worker_takes_it_or_gets_on_with_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, controller = site.plant.cluster, site.plant.controller
    cluster.hold = lambda order: isinstance(order, Train)
    training = cluster.progress

    def progress(worker: str) -> Future[Any]:
        """Of a gang that has lost a machine."""
        found: Future[Any] = Future()
        found.set_result(replace(training(worker).result(), phase=Phase.WAITING))
        return found

    monkeypatch.setattr(cluster, "progress", progress)
    try:
        titles = [f"red/waits-{number}" for number in range(3)]
        for title in titles:
            site.client.ask(Submit(task=TaskSpec.model_validate(site.document(title)), by="ann"))
        while "waits for places for its ranks" not in site.client.ask(ShowTask(reference=titles[1]))["why"]:
            time.sleep(0.01)
        task_id = site.client.ask(ShowTask(reference=titles[1]))["task_id"]
        doing = site.client.ask(Status())["workers"].values()
        assert f"waits for places for its ranks, then training {task_id}" in doing
        with monkeypatch.context() as patch:  # all are being formed anew, and there is no place for any
            patch.setattr(PoolStatus, "ready", 0)
            patch.setattr(controller, "decision", Decision())
            patch.setattr(controller, "idle_causes", lambda pool: ("no place for 2 ranks",) * 2)
            assert site.client.ask(ShowTask(reference=titles[2]))["why"].startswith(
                "no machine has room for a worker: no place for 2 ranks"
            )
        for title in titles:
            site.client.ask(Cancel(reference=title, by="ann"))
            site.wait_for(title, "cancelled")
    finally:
        cluster.release()


@pytest.mark.changes
def test_tasks_that_wait_because_main_is_held_say_so_and_who_holds_it(site: Site) -> None:
    site.client.ask(Hold(reason="audit", actor="ann"))
    site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/first")), by="ann"))
    site.wait_for("red/first", "evaluating")
    site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/behind")), by="ann"))
    site.wait_for("red/behind", "merging")
    said = "main is held by ann: audit"
    rows = {row["title"]: row["held"] for row in site.client.ask(ListTasks())}
    assert (rows["red/first"], rows["red/behind"], rows["red/alpha"]) == (said, said, "")
    assert site.client.ask(ShowTask(reference="red/behind"))["why"] == (
        f"its adapter, behind the version before it, waits: {said}"
    )
    site.client.ask(Release(actor="ann"))
    site.wait_for("red/behind", "published")
    assert {row["held"] for row in site.client.ask(ListTasks())} == {""}


@pytest.mark.changes
def test_a_preempted_task_waits_in_its_place_and_asking_again_changes_nothing(site: Site) -> None:
    cluster = site.plant.cluster
    cluster.hold = lambda order: isinstance(order, Train)
    try:
        for name in ("four", "five", "six"):
            site.client.ask(Submit(task=TaskSpec.model_validate(site.document(f"red/{name}")), by="ann"))
        site.wait_for("red/five", "training")
        assert site.client.ask(Preempt(reference="red/four", by="ann"))["state"] == "training"
        task = site.wait_for("red/four", "training", attempt=2)  # the oldest is the next again
        assert task["training"]["preemptions"] == 1
        assert "now queued · fault preempted · preempted at step 3" in [event["text"] for event in task["events"]]
        assert site.client.ask(Preempt(reference="red/six", by="ann"))["state"] == "queued"  # it waits anyway
        for name in ("six", "five", "four"):
            site.client.ask(Cancel(reference=f"red/{name}", by="ann"))
            site.wait_for(f"red/{name}", "cancelled")
    finally:
        cluster.release()


# --- errors ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[ServiceRequest[Any] | StoreRequest[Any], type[OnebasisError]]] = [
    (ShowVersion(version=99), NotFound),
    (Diff(old=1, new=99), NotFound),
    (PreviewRollback(version=99), NotFound),
    (Rollback(version=99), NotFound),
    (ShowScores(version=99), NotFound),
    (ShowCapacity(version=99), NotFound),
    (ShowTask(reference="red/nobody"), NotFound),
    (ShowTask(reference="no?such#task %41"), NotFound),
    (ShowTask(reference="../status"), NotFound),
    (Cancel(reference="../rollback/0"), NotFound),
    (Export(reference="red/nobody"), NotFound),
    (Submit(task=TaskSpec.model_validate(task_document("green/x"))), InvalidInput),
    (Cancel(reference="red/alpha", by="ann"), Conflict),
    (Preempt(reference="red/alpha", by="ann"), Conflict),
    (Tag(name="x", version=99), NotFound),
    (Expire(versions=(2,)), Conflict),
    (Remove(task_id="red/alpha"), InvalidInput),
]


@pytest.mark.parametrize(("request_", "leaf"), WRONG, ids=lambda value: str(value)[:40])
def test_an_error_comes_over_http_as_the_same_class_with_the_same_text(
    site: Site, request_: ServiceRequest[Any] | StoreRequest[Any], leaf: type[OnebasisError]
) -> None:
    with pytest.raises(leaf) as here:
        site.service.answer(request_)
    with pytest.raises(leaf) as there:
        site.client.ask(request_)
    assert str(there.value) == str(here.value)
    assert type(there.value) is type(here.value)


def test_every_request_of_the_store_and_the_service_has_one_route_or_is_the_loops_own() -> None:
    asked = {kind for base in (ServiceRequest, StoreRequest) for kind in _leaves(base)}
    loops_own = {Merge, Refine, RecordScores, Publish, Reject}
    assert {route.record for route in ROUTES} == asked - loops_own
    assert len({(route.verb, route.url) for route in ROUTES}) == len({route.name for route in ROUTES}) == len(ROUTES)


def _leaves(kind: type[Any]) -> set[type[Any]]:
    """The records themselves: between them and their base pydantic puts one class for each kind of answer."""
    if not kind.__subclasses__() and kind.__pydantic_generic_metadata__["origin"] is None:
        return {kind}
    return {leaf for sub in kind.__subclasses__() for leaf in _leaves(sub)}


def test_a_state_folder_that_was_moved_does_not_show_what_another_service_holds(site: Site, tmp_path: Path) -> None:
    # Its settings name the database and the store by their full paths, where a newer service may be by now.
    (tmp_path / "settings.yaml").write_text((site.folder / "settings.yaml").read_text())
    with pytest.raises(Unavailable, match=f"its service belongs in {site.folder}"):
        Client(tmp_path).ask(ListVersions())


@pytest.mark.changes
def test_a_refused_request_neither_ends_the_writer_nor_fences_it(site: Site) -> None:
    site.client.ask(Tag(name="gold", version=1))
    site.client.ask(Hold(reason="audit", actor="ann"))
    replaced, before = list(site.plant.cluster.replaced), site.plant.state
    for refused in (Tag(name="gold", version=2), Hold(reason="mine", actor="bob"), Expire(versions=(2,))):
        with pytest.raises(Conflict):
            site.client.ask(refused)
    assert site.plant.state == before  # the epoch too
    assert site.plant.cluster.replaced == replaced
    site.client.ask(Release(actor="ann"))


@pytest.mark.changes
def test_a_task_does_not_return_while_another_of_its_name_is_alive(site: Site) -> None:
    main = site.plant.state.refs["main"]
    site.publish("red/twice")
    with_it = site.plant.state.refs["main"]
    old = site.client.ask(ShowTask(reference="red/twice"))["task_id"]
    site.client.ask(Rollback(version=main))
    site.wait_for("red/twice", "parked")
    site.plant.cluster.hold = lambda order: isinstance(order, Train)
    try:
        again = Submit(task=TaskSpec.model_validate(site.document("red/twice", priority=1)))
        new = site.client.ask(again)["task_id"]
        with pytest.raises(Conflict, match=rf"(?s)red/twice \({new}\).*holds an older task of this name.*cancel {new}"):
            site.client.ask(Rollback(version=with_it))
        assert f"red/twice ({new})" in site.client.ask(PreviewRollback(version=with_it))["refused"]
        assert site.plant.state.refs["main"] == main
        site.client.ask(Cancel(reference=new))
        site.wait_for("red/twice", "cancelled")
    finally:
        site.plant.cluster.release()
    assert site.client.ask(PreviewRollback(version=with_it))["refused"] == ""
    assert site.client.ask(Rollback(version=with_it))["returning"] == ["red/twice"]
    until = time.monotonic() + 10
    while site.client.ask(ShowTask(reference=old))["state"] != "published":
        assert time.monotonic() < until
        time.sleep(0.01)


# --- without the server ------------------------------------------------------------------------------------------


@pytest.fixture
def offline(site: Site, tmp_path: Path) -> Client:
    """A client of the same state whose server was killed and left its address behind."""
    settings = site.plant.settings.model_copy(update={"state_dir": str(tmp_path)})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (tmp_path / "service_id").write_text(site.plant.service.service_id)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    (tmp_path / "server.json").write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "token": TOKEN, "pid": 1}))
    return Client(tmp_path)


@pytest.mark.parametrize(
    "request_",
    [
        ListVersions(),
        ShowVersion(version=2),
        Diff(old=1, new=2),
        ShowScores(),
        ShowCapacity(),
        ReadEvents(reference="red/alpha"),
        PreviewRollback(version=1),
        Export(reference="blue/beta"),
    ],
    ids=lambda request: type(request).__name__,
)
def test_reading_gives_the_same_with_the_server_gone(
    site: Site, offline: Client, request_: ServiceRequest[Any]
) -> None:
    assert _without_dates(offline.ask(request_)) == _without_dates(site.client.ask(request_))


def _without_dates(answer: Any) -> Any:
    """A zip holds the time at which it was packed."""
    if not isinstance(answer, bytes):
        return answer
    with zipfile.ZipFile(io.BytesIO(answer)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@contextlib.contextmanager
def hanging_up(how: str, then: Callable[[], None] = lambda: None) -> Iterator[str]:
    """A server that takes every connection and ends it without a reply; `then` is called before it does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.recv(65536)
                    then()
                    if how == "reset":
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize(
    "request_",
    [ShowTask(reference="red/alpha"), ListTasks(), ReadEvents(reference="red/alpha"), ListVersions()],
    ids=lambda request: type(request).__name__,
)
def test_a_server_that_ends_while_it_is_asked_is_as_one_that_is_not_there(
    site: Site, offline: Client, tmp_path: Path, request_: ServiceRequest[Any], how: str
) -> None:
    without_server = offline.ask(request_)
    with hanging_up(how) as url:
        (tmp_path / "server.json").write_text(json.dumps({"url": url, "token": TOKEN, "pid": 1}))
        assert offline.ask(request_) == without_server
        assert offline.ask(Health())["running"] is False
        with pytest.raises(OutcomeUnknown):  # of what changes something nobody knows whether it was done
            offline.ask(Hold(reason="audit", actor="ann"))


def test_a_server_that_was_started_again_while_the_one_before_was_asked_gives_the_answer(
    site: Site, offline: Client, tmp_path: Path
) -> None:
    facts = tmp_path / "server.json"

    def another_starts() -> None:
        facts.write_text(json.dumps({"url": site.url, "token": TOKEN, "pid": 1}))

    with hanging_up("reset", another_starts) as url:
        facts.write_text(json.dumps({"url": url, "token": TOKEN, "pid": 1}))
        assert offline.ask(Health())["running"] is True


def test_the_status_says_that_it_does_not_run(offline: Client) -> None:
    assert offline.ask(Status())["running"] is False


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (Submit(task=TaskSpec.model_validate(task_document("red/x"))), "submit"),
        (Cancel(reference="red/alpha"), "cancel"),
        (Preempt(reference="red/alpha"), "preempt"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_needs_the_service_is_refused_with_the_next_step(
    offline: Client, request_: ServiceRequest[Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At once, without a look at the store, which may be away.
    monkeypatch.setattr("subspace_store.storage.opening.open_storage", _must_not_be_called)
    with pytest.raises(Unavailable, match=f"(?s)the service is not running, and {what} needs it.*onebasis up"):
        offline.ask(request_)


def _must_not_be_called(*_: object) -> None:
    raise AssertionError("nothing needs to be read for that")


@pytest.mark.parametrize(
    "request_",
    [ListVersions(), Rollback(version=0), Submit(task=TaskSpec.model_validate(task_document("red/x")))],
    ids=lambda request: type(request).__name__,
)
def test_a_folder_in_which_nothing_ever_ran_says_so(tmp_path: Path, request_: ServiceRequest[Any]) -> None:
    with pytest.raises(Unavailable, match=r"(?s)^no onebasis service has run here.*onebasis up") as told:
        Client(tmp_path).ask(request_)
    assert not isinstance(told.value, OutcomeUnknown)  # nothing was sent


@pytest.mark.changes
def test_a_rollback_without_the_server_is_followed_by_the_service(site: Site, offline: Client) -> None:
    # The writer that the command line opens fences the service's own, which opens anew at its next write.
    held = site.plant.held()
    site.plant.cluster.replaced.clear()
    gone = offline.ask(Rollback(version=1, actor="ann", op_key="rollback:off-1"))["vanishing"]
    assert sorted([*gone, "red/alpha"]) == held
    assert site.client.ask(Status())["main"] == 1
    # Nobody has parked what vanished yet.
    lost = offline.ask(ShowTask(reference="blue/beta"))
    assert (lost["state"], lost["gone_from_main"]) == ("published", True)
    assert lost["why"] == "main (version 1) no longer holds it; the next `onebasis up` parks it"
    listed = {row["title"]: row["gone_from_main"] for row in offline.ask(ListTasks(state=TaskState.PUBLISHED))}
    assert (listed["red/alpha"], listed["blue/beta"]) == (False, True)
    assert offline.ask(Status())["gone_from_main"] == len(gone)
    assert offline.ask(ShowTask(reference="red/alpha"))["why"] == "main holds it since version 1"
    site.plant.controller.wake(log_moved=True)  # as a start of the service does
    site.wait_for("blue/beta", "parked")
    site.publish("red/gamma")
    assert site.plant.held() == ["red/alpha", "red/gamma"]
    assert site.plant.cluster.replaced == ["store"]


@pytest.mark.changes
def test_a_rollback_by_the_service_after_one_without_it_is_done(site: Site, offline: Client) -> None:
    site.plant.cluster.replaced.clear()
    newest = site.client.ask(Status())["main"]
    offline.ask(Rollback(version=1, actor="ann", op_key="rollback:off-2"))
    # The service's own writer is fenced now and has not noticed.
    assert site.client.ask(Rollback(version=newest, actor="ann", op_key="rollback:on-2"))["to_version"] == newest
    assert site.client.ask(Status())["main"] == newest
    assert site.plant.cluster.replaced == ["store"]


@pytest.mark.changes
def test_a_write_that_the_store_refuses_is_an_alarm_until_one_succeeds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, *args: object, **keys: object) -> None:
        raise StoreFull("no space is left", "file:store", "make room")

    with monkeypatch.context() as patched:
        patched.setattr(SubspaceStore, "hold", full)
        with pytest.raises(StoreFull):
            site.client.ask(Hold(reason="audit", actor="ann"))
        assert [alarm["code"] for alarm in site.client.ask(Status())["alarms"]] == ["store-full"]
    site.client.ask(Hold(reason="audit", actor="ann"))
    assert site.client.ask(Status())["alarms"] == []
    assert (site.client.ask(Health())["held"] or {})["reason"] == "audit"


@pytest.mark.parametrize("said", ["from-a-proxy.7", "", "two words", "x" * 65, "canary\x1b"])
def test_a_request_has_one_id_in_its_answer_its_errors_the_log_and_the_audit_log(
    site: Site, caplog: pytest.LogCaptureFixture, said: str
) -> None:
    caplog.set_level(logging.INFO, "onebasis.requests")
    headers = {"authorization": f"Bearer {TOKEN}"} | ({"x-request-id": said} if said else {})
    seen: list[dict[str, str]] = []
    caplog.handler.addFilter(lambda record: seen.append(ids()) or True)
    answers = [
        httpx.get(f"{site.url}/v1/status", headers=headers),
        httpx.get(f"{site.url}/v1/tasks/nothing", headers=headers),
        httpx.get(f"{site.url}/v1/status", headers=headers | {"authorization": "Bearer wrong"}),
        httpx.get(f"{site.url}/v1/nowhere", headers=headers),
        httpx.post(f"{site.url}/v1/cancel/nothing", headers=headers, json={}),
    ]
    given = [answer.headers["x-request-id"] for answer in answers]
    is_taken = said == "from-a-proxy.7"
    assert [one == said for one in given] == [is_taken] * 5
    assert len(set(given)) == (1 if is_taken else 5)
    assert all(re.fullmatch("[A-Za-z0-9._-]{1,64}", one) for one in given)
    assert [answer.status_code for answer in answers] == [200, 404, 401, 404, 404]
    assert [answer.json()["request_id"] for answer in answers[1:]] == given[1:]
    assert {one["request_id"] for one in seen if one} == {given[-1]}
    asked = next(row for row in reversed(AuditLog(site.plant.queue.database).newest(10)) if row.about)
    assert json.loads(asked.about)["request_id"] == given[-1]


@pytest.mark.changes
def test_a_line_leads_from_a_requests_id_to_its_task(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "onebasis.server")
    seen: list[dict[str, str]] = []
    caplog.handler.addFilter(lambda record: seen.append(ids()) or True)
    headers = {"authorization": f"Bearer {TOKEN}", "x-request-id": "the-one"}
    answer = httpx.post(f"{site.url}/v1/tasks", headers=headers, json={"task": site.document("red/gamma")})
    task_id = answer.json()["task_id"]
    assert {"request_id": "the-one", "task_id": task_id, "trace_id": f"{trace_id_of(task_id):032x}"} in seen


def test_a_mistake_of_our_own_is_told_with_the_requests_id_and_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: Any) -> None:
        raise RuntimeError("canary")

    headers = {"authorization": f"Bearer {TOKEN}", "x-request-id": "the-one"}
    with monkeypatch.context() as wrong:
        wrong.setattr(site.guard, "answer", mistaken)
        answer = httpx.get(f"{site.url}/v1/teams", headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"], answer.json()["request_id"]) == (500, *2 * ["the-one"])
    assert answer.headers["content-type"] == "application/problem+json"
    assert "canary" not in answer.text
    counted = httpx.get(f"{site.url}/metrics", headers=headers).text
    assert 'onebasis_http_requests_total{route="teams",status="500"} 1.0' in counted
