"""Every route of the API is asked for what its own schema allows and for what it does not, and answers for it.

Nobody works here beside the requests: the loop stands still, so that whatever moves was moved by a request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jsonschema_rs
import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.config import SchemathesisConfig

from configs.limits import BYTES_MAX
from configs.plain_text import odd_character
from configs.settings import Settings
from orchestrator.api.access import Role, owner
from orchestrator.api.callers import Callers
from orchestrator.api.guard import Guard
from orchestrator.api.requests import CreateToken
from orchestrator.api.routes import PREFIX, ROUTES, Route
from orchestrator.api.server import api
from orchestrator.api.service import Service
from orchestrator.api.shapes import problem_schema
from subspace_store.requests import Pin, StoreRequest, Tag
from tests.builders import BASE, task_document
from tests.orchestrator.checked_guard import CheckedGuard
from tests.orchestrator.plant import Plant

TOKEN = "the-token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
PATIENCE_SECONDS = 120
"""Longest wait for an answer: a busy machine is no finding."""
EXAMPLES = 18
"""Of each route and mode, 58 routes twice: enough for each field to be wrong in several ways."""
KNOWN = {200, 304, 404, 409, 413, 422, 503}
"""What a route may answer: never a 5xx but that something is away."""


def unlimited(service: Service) -> Settings:
    """The settings with no limit for a token's pace: here, questions come at once."""
    server = service.settings.server.model_copy(update={"requests_per_second": None})
    return service.settings.model_copy(update={"server": server})


class Still:
    """A service whose loop stands still: two published tasks, one of them tagged and one pinned."""

    def __init__(self, folder: Path) -> None:
        self.plant = Plant(folder)
        self.plant.submit("red/a", "blue/b")
        self.plant.run()
        self.plant.cluster.write(BASE, Tag(name="first", version=1)).result()
        self.plant.cluster.write(BASE, Pin(version=1, owner="ann")).result()
        plant = self.plant
        service = Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)
        callers = Callers(TOKEN, "ann", lambda: service.sources, lambda: unlimited(service))
        self.app: FastAPI = api(lambda: CheckedGuard(service), callers)
        self.beta = plant.queue.find("blue/b").task_id
        asked = (CreateToken(name=f"red-{role}", role=role, team="red") for role in Role)
        self.tokens = {one.role: Guard(service).answer(one, owner("ann"))["token"] for one in asked}

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
    # Each test says who asks; a token of Schemathesis' own would be nobody's.
    config = SchemathesisConfig.from_dict({"generation": {"with-security-parameters": False}})
    return schemathesis.openapi.from_asgi("/openapi.json", still.app, headers=HEADERS, config=config)


def is_wrong(case: Case) -> bool:
    """Whether the body is one that the schema does not allow: a wrong key in a header may be no key at all."""
    parts = case.meta.components if case.meta is not None else {}
    wrong = any(part.value == "body" and info.mode is GenerationMode.NEGATIVE for part, info in parts.items())
    return wrong and isinstance(case.body, dict | list)


problem = jsonschema_rs.validator_for(problem_schema())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_whatever_is_asked_is_answered_and_what_is_refused_changes_nothing(
    still: Still, schema: Any, route: Route, mode: GenerationMode
) -> None:
    operation = schema[route.url.replace(":path", "")][route.verb.lower()]
    if mode is GenerationMode.NEGATIVE and not route.record.model_fields:
        return  # nothing can be wrong where nothing is said

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: Case) -> None:
        before = still.facts()
        answer = case.call(headers=HEADERS, timeout=PATIENCE_SECONDS)
        assert answer.status_code in KNOWN, f"{answer.status_code} {answer.text}"
        if answer.status_code not in (200, 304):
            assert still.facts() == before
            assert problem.is_valid(answer.json()), answer.text
        elif is_wrong(case):
            raise AssertionError(f"was taken: {case.body}")

    ask()


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_whatever_a_team_asks_shows_nothing_of_another(still: Still, schema: Any, route: Route, role: str) -> None:
    operation = schema[route.url.replace(":path", "")][route.verb.lower()]
    headers = {"authorization": f"Bearer {still.tokens[role]}"}

    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(max_examples=EXAMPLES // 6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: Case) -> None:
        answer = case.call(headers=headers, timeout=PATIENCE_SECONDS)
        assert answer.status_code in KNOWN | {403}, f"{answer.status_code} {answer.text}"
        assert b"blue/b" not in answer.content
        assert still.beta.encode() not in answer.content

    ask()


# --- hostile values ----------------------------------------------------------------------------------------------

HOSTILE_TEXT = st.sampled_from(
    [
        "",
        "\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "\ud800", "a\udcffb", "\0", "a\nb", "\r", "\u2028",
        "\u202e",        "../..", "a/b/c", "%00", "%2e%2e", "'; drop table tasks; --", "[red]markup[/red]", "[/]",
        "{0.__class__}", "%s%n",
        "no", "1e3", "9" * 400, "x" * 3000, "x" * 5000, "(|a)" * 29 + "b", "ﷺ" * 1000, "🏳️‍🌈", "e\u0301" * 500,
    ]
) | st.text(st.characters(codec=None), max_size=50)  # fmt: skip
HOSTILE_NUMBER = st.sampled_from([10**400, -(10**30), 2**63, 2**53 + 1, 1e308, -0.0, 5e-324, -1]) | st.integers()
HOSTILE = st.recursive(
    HOSTILE_TEXT | HOSTILE_NUMBER | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE_TEXT, inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = "#/components/schemas/"
NESTED = "[" * 500 + "]" * 500


def likely(name: str) -> st.SearchStrategy[Any]:
    """A value for a field: hostile, or for a task one that is right but for a part of it."""
    if name != "task":
        return HOSTILE_TEXT | HOSTILE
    places = ("name", "base_model", "client_key", "priority", "data", "training", "lora", "method")
    wrong = st.dictionaries(st.sampled_from(places), HOSTILE_TEXT | HOSTILE, min_size=1, max_size=2)
    inner = st.dictionaries(
        st.sampled_from(["text_column", "train_file", "eval_file", "label_names", "max_length"]), HOSTILE, max_size=2
    )
    return st.builds(lambda top, data: task_document("red/x", data=data) | top, wrong, inner) | HOSTILE


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_hostile_values_are_answered_in_plain_words_and_what_is_refused_changes_nothing(
    still: Still, route: Route
) -> None:
    fields = {name: likely(name) for name in route.record.model_fields if name not in route.in_path}
    in_path = st.fixed_dictionaries({name: HOSTILE_TEXT | st.sampled_from(["1", "red/a"]) for name in route.in_path})

    @given(placed=in_path, said=st.fixed_dictionaries({}, optional=fields))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(placed: dict[str, str], said: dict[str, Any]) -> None:
        before = still.facts()
        url = route.url.replace(":path", "")
        for name, value in placed.items():
            url = url.replace(f"{{{name}}}", quote(value, safe="", errors="surrogatepass"))
        with TestClient(still.app, headers=HEADERS, raise_server_exceptions=False) as client:
            if route.verb == "POST":
                answer = client.post(url, content=json.dumps(said))
            else:
                answer = client.request(route.verb, f"{url}?{urlencode(said, errors='surrogatepass')}")
        # 405: an empty part of a path makes it another one, which takes no PUT.
        is_answer = answer.status_code in (KNOWN | {405} if route.verb == "PUT" else KNOWN)
        assert is_answer, f"{answer.status_code} {answer.text}"
        if answer.status_code != 200:
            assert odd_character(answer.text) is None
            assert still.facts() == before
            assert len(answer.json()["what"]) < 8000

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
        ("/store/hold", {"reason": "x" * 2001}),
        ("/store/quarantine", {"task_id": "x", "reason": ""}),
        ("/store/tag", {"operation": "expire", "arguments": {}}),
        ("/rollback/1", {"version": 2}),
        ("/rollback/1", {"hold": "yes"}),
        ("/rollback/one", {}),
        ("/tasks", {"team": "red", "name": "x"}),
        ("/tasks", {"task": {"team": "red", "name": "x", "base_model": "tiny", "priority": "3", "data": {}}}),
        ("/cancel/red/a", {"by": None}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_type_is_refused_with_its_name_and_changes_nothing(
    still: Still, path: str, body: dict[str, Any]
) -> None:
    before = still.facts()
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.post(PREFIX + path, content=json.dumps(body))
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
        b'{"reason": ' + NESTED.encode() + b"}",
        b'{"task": {"lora": {"lora_alpha": 1' + b"0" * 400 + b"}}}",
        b'{"reason": 1e400}',
        b'{"reason": NaN}',
        b'{"reason": ' + b"9" * 10_000 + b"}",
        b'{"reason": "' + b"x" * (3 * 2**20) + b'"}',
        b'{"reason": "' + b"x" * (17 * 2**20) + b'"}',
    ],
    ids=lambda body: str(body[:20]),
)
def test_a_body_that_is_no_plain_json_object_is_refused(still: Still, body: bytes) -> None:
    before = still.facts()
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.post(f"{PREFIX}/store/hold", content=body)
    assert answer.status_code == (422 if len(body) <= BYTES_MAX else 413), answer.text
    assert len(answer.text) < 5_000
    assert still.facts() == before


@pytest.mark.parametrize(
    "path", ["/tasks?limit=3.5", "/tasks?limit=0", "/tasks?state=asleep", "/tasks?now=0", "/tasks?limit=1&limit=2",
             "/versions/one", "/versions/-1", "/versions/1e3", f"/versions/{10**30}", "/diff/1/x",
             "/events?after=-1", f"/events?after={2**80}", "/events?kinds=log,,x", "/tasks/red%00a", "/scores?version=",
             "/export/red/a?version=main"]
)  # fmt: skip
def test_a_wrong_parameter_is_refused_with_its_name(still: Still, path: str) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        answer = client.get(PREFIX + path)
    assert answer.status_code == 422, answer.text
    assert answer.json()["kind"] == "invalid-input"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_the_schema_says_of_each_route_what_its_record_says(still: Still, route: Route) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        told = client.get("/openapi.json").json()["paths"][route.url.replace(":path", "")][route.verb.lower()]
    names = {parameter["name"] for parameter in told.get("parameters", []) if parameter["in"] != "header"}
    if route.verb == "POST":
        names |= told["requestBody"]["content"]["application/json"]["schema"]["properties"].keys()
    assert names == route.record.model_fields.keys()
    assert told["x-role"] == str(route.role)
    assert issubclass(route.record, StoreRequest) <= (route.verb == "POST")


def test_the_schema_is_openapi_and_says_of_each_route_what_it_answers(still: Still) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **document["components"]})
    for route in ROUTES:
        told = document["paths"][route.url.replace(":path", "")][route.verb.lower()]["responses"]
        (schema, *_) = (content["schema"] for content in told["200"]["content"].values())
        assert schema, route.name
        for status in ("401", "403", "404", "409", "422", "503"):
            assert told[status]["content"] == {"application/problem+json": {"schema": {"$ref": f"{SCHEMAS}Problem"}}}
    named = set(re.findall(f'"{SCHEMAS}(\\w+)"', json.dumps(document)))
    assert named <= document["components"]["schemas"].keys()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_the_headers_in_the_schema_are_those_that_count(still: Still, route: Route) -> None:
    url = route.url.replace(":path", "").replace("{token_id}", "abc")
    with TestClient(still.app, headers=HEADERS) as client:
        told = client.get("/openapi.json").json()["paths"][route.url.replace(":path", "")][route.verb.lower()]
        headers = {one["name"] for one in told["parameters"] if one["in"] == "header"}
        assert ("Last-Event-ID" in headers) is (route.name == "events")
        if route.verb == "GET" and not route.record.model_json_schema().get("required"):
            answer, said = client.get(url), told["responses"]["200"].get("headers", {})
            assert ("etag" in answer.headers) is ("If-None-Match" in headers) is ("ETag" in said)
        if route.is_audited and "Idempotency-Key" not in headers:
            likely = {"name": "x", "role": "viewer"}
            body = {name: value for name, value in likely.items() if name in route.record.model_fields}
            answer = client.post(url, json=body, headers={"idempotency-key": "k"})
            assert answer.json()["where"] == "Idempotency-Key"


def test_the_schema_says_that_a_bearer_token_is_needed(still: Still) -> None:
    with TestClient(still.app, headers=HEADERS) as client:
        document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"token": []}]
