"""Every route of the API is asked for what its own schema allows and for what it does not, and answers for it.

Nobody works here beside the requests: the loop stands still, so that whatever moves was moved by a request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.config import SchemathesisConfig

from orchestrator.api.routes import ROUTES, Route
from orchestrator.api.server import api
from orchestrator.api.service import Service
from subspace_store.requests import Pin, StoreRequest, Tag
from tests.orchestrator.plant import Plant

TOKEN = "the-token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
EXAMPLES = 30
"""Of each route and mode: enough for each field to be wrong in several ways."""
KNOWN = {200, 404, 409, 422, 503}
"""What a route may answer: never a 5xx but that something is away."""


class Still:
    """A service whose loop stands still: two published tasks, one of them tagged and one pinned."""

    def __init__(self, folder: Path) -> None:
        self.plant = Plant(folder)
        self.plant.submit("red/a", "blue/b")
        self.plant.run()
        self.plant.cluster.write(Tag(name="first", version=1)).result()
        self.plant.cluster.write(Pin(version=1, owner="ann")).result()
        plant = self.plant
        self.app: FastAPI = api(
            Service(plant.settings, plant.queue, plant.storage, plant.controller, plant.cluster), TOKEN
        )

    def facts(self) -> tuple[Any, ...]:
        """Everything that a request could have changed."""
        storage = self.plant.storage
        return self.plant.state, self.plant.states(), {key: storage.read(key) for key in storage.keys("")}


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Still]:
    made = Still(tmp_path_factory.mktemp("still"))
    yield made
    made.plant.queue.close()


@pytest.fixture(scope="module")
def schema(still: Still) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", still.app, headers=HEADERS, config=SchemathesisConfig())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_whatever_is_asked_is_answered_and_what_is_refused_changes_nothing(
    still: Still, schema: Any, route: Route, mode: GenerationMode
) -> None:
    operation = schema[route.path.replace(":path", "")][route.verb.lower()]
    if mode is GenerationMode.NEGATIVE and not route.record.model_fields:
        return  # nothing can be wrong where nothing is said

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: Case) -> None:
        before = still.facts()
        answer = case.call(headers=HEADERS)
        assert answer.status_code in KNOWN, f"{answer.status_code} {answer.text}"
        if answer.status_code != 200:
            assert still.facts() == before
            assert {"kind", "what"} <= answer.json().keys()
        elif mode is GenerationMode.NEGATIVE and isinstance(case.body, dict | list):
            raise AssertionError(f"was taken: {case.body}")

    ask()


# --- by hand: what was found in the field ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/store/expire", {"versions": ["1"]}),
        ("/store/expire", {"versions": [1], "now": 0}),
        ("/store/expire", {"versions": [True]}),
        ("/store/expire", {"versions": 1}),
        ("/store/remove", {"task_id": "x", "publish": "no"}),
        ("/store/remove", {"task_id": "x", "publish": 1}),
        ("/store/tag", {"name": "x", "version": "main"}),
        ("/store/tag", {"name": "main", "version": 1}),
        ("/store/tag", {"name": "candidate", "version": 1}),
        ("/store/tag", {"name": "7", "version": 1}),
        ("/store/tag", {"name": "x", "version": 1.0}),
        ("/store/tag", {"name": "x", "version": -1}),
        ("/store/pin", {"version": 1, "owner": "ann", "until": "2030"}),
        ("/store/pin", {"version": 1, "owner": ""}),
        ("/store/hold", {"reason": 3}),
        ("/store/hold", {"reason": "\x1b[31mred"}),
        ("/store/hold", {"reason": "x" * 5_000_000}),
        ("/store/quarantine", {"task_id": "x", "reason": ""}),
        ("/store/tag", {"operation": "expire", "arguments": {}}),
        ("/rollback/1", {"version": 2}),
        ("/rollback/1", {"hold": "yes"}),
        ("/rollback/one", {}),
        ("/tasks", {"team": "red", "name": "x"}),
        ("/tasks", {"task": {"team": "red", "name": "x", "base_model": "tiny", "priority": "3", "data": {}}}),
        ("/cancel/red/a", {"by": None}),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused_with_its_name_and_changes_nothing(
    still: Still, path: str, body: dict[str, Any]
) -> None:
    before = still.facts()
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.post(path, content=json.dumps(body))
    assert answer.status_code == 422, answer.text
    assert answer.json()["kind"] == "invalid-input"
    assert still.facts() == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"reason": "x", "reason": "y"}',
        b'{"reason": "\\ud800"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"reason": NaN}',
        b'{"reason": ' + b"9" * 10_000 + b"}",
        b'{"reason": "' + b"x" * (17 * 2**20) + b'"}',
    ],
    ids=lambda body: str(body[:20]),
)
def test_a_body_that_is_no_plain_json_object_is_refused(still: Still, body: bytes) -> None:
    before = still.facts()
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.post("/store/hold", content=body)
    assert answer.status_code == 422, answer.text
    assert len(answer.text) < 5_000
    assert still.facts() == before


@pytest.mark.parametrize(
    "path", ["/tasks?limit=3.5", "/tasks?limit=0", "/tasks?state=asleep", "/tasks?now=0", "/tasks?limit=1&limit=2",
             "/versions/one", "/versions/-1", "/versions/1e3", f"/versions/{10**30}", "/diff/1/x",
             "/logs/red/a?after=-1", f"/logs/red/a?after={2**80}", "/tasks/red%00a", "/scores?version=",
             "/export/red/a?version=main"]
)  # fmt: skip
def test_a_wrong_parameter_is_refused_with_its_name(still: Still, path: str) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.get(path)
    assert answer.status_code == 422, answer.text
    assert answer.json()["kind"] == "invalid-input"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_the_schema_says_of_each_route_what_its_record_says(still: Still, route: Route) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        told = client.get("/openapi.json").json()["paths"][route.path.replace(":path", "")][route.verb.lower()]
    names = {parameter["name"] for parameter in told.get("parameters", [])}
    if route.verb == "POST":
        names |= told["requestBody"]["content"]["application/json"]["schema"]["properties"].keys()
    assert names == route.record.model_fields.keys()
    assert told["x-role"] == str(route.role)
    assert issubclass(route.record, StoreRequest) <= (route.verb == "POST")
