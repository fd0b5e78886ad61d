"""Who asks over real HTTP: what each role may on each route, what a team sees of the others, what is written down."""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import TypeAdapter

from configs.document import Request
from configs.errors import NotAllowed, NotFound
from configs.log_lines import formatter
from configs.settings import RoleName, TracingSettings
from orchestrator.alarms import AlarmCode
from orchestrator.api import requests
from orchestrator.api.access import EVERY_TEAM, About, Caller, Role, check_main, check_role
from orchestrator.api.requests import CreateToken, ServiceRequest, Submit
from orchestrator.api.routes import PREFIX, ROUTES, Route
from orchestrator.reports.traces import Traces
from subspace_store import requests as store_requests
from subspace_store.requests import Merge, Publish, RecordScores, Refine, Reject, StoreRequest
from tests.builders import BASE
from tests.orchestrator.receiver import Receiver
from tests.orchestrator.site import Site
from workers.orders import Train

WRITERS_ALONE = {Merge, Refine, RecordScores, Publish, Reject}
"""What the loop asks of the store, and nobody over HTTP."""
ROLES = [Role(name) for name in get_args(RoleName)]


def all_requests(kind: type[Request]) -> Iterator[type[Request]]:
    for inner in kind.__subclasses__():
        if "[" not in inner.__name__ and inner.__module__ in (requests.__name__, store_requests.__name__):
            yield inner
        yield from all_requests(inner)


def test_every_request_says_which_role_it_needs() -> None:
    named = {*all_requests(ServiceRequest), *all_requests(StoreRequest)}
    assert named - {ServiceRequest, StoreRequest} - WRITERS_ALONE == {route.record for route in ROUTES}
    assert len(named) > 35


# --- decisions ---------------------------------------------------------------------------------------------------


def somebody(**roles: str) -> Caller:
    return Caller("ann", "t1", {team.replace("all", EVERY_TEAM): Role(role) for team, role in roles.items()})


def test_a_role_includes_those_below_it_and_counts_in_its_own_team_alone() -> None:
    for place, role in enumerate(ROLES):
        assert [somebody(red=role).may(other, "red") for other in ROLES] == [i <= place for i in range(len(ROLES))]
        assert not somebody(red=role).may(Role.VIEWER, "blue")
        assert not somebody(red=role).may(Role.VIEWER, EVERY_TEAM)
        assert somebody(all=role).may(role, "any-team-that-comes-later")
    both = somebody(all="viewer", red="maintainer")
    assert (both.role_in("red"), both.role_in("blue"), both.teams) == (Role.MAINTAINER, Role.VIEWER, None)


def test_what_is_not_seen_is_not_there_and_what_is_seen_is_refused_with_who_may() -> None:
    with pytest.raises(NotFound, match="there is no team 'blue'") as of_another:
        check_role(somebody(red="admin"), "submit", Role.SUBMITTER, About.TEAM, ["blue"])
    with pytest.raises(NotFound) as of_nobody:
        check_role(somebody(red="admin"), "submit", Role.SUBMITTER, About.TEAM, ["nothing"])
    assert str(of_another.value) == str(of_nobody.value).replace("nothing", "blue")
    with pytest.raises(NotAllowed, match="submit needs the role submitter in team red, and ann is viewer of red"):
        check_role(somebody(red="viewer"), "submit", Role.SUBMITTER, About.TEAM, ["red"])
    with pytest.raises(NotAllowed, match="reload needs the role admin for all teams"):
        check_role(somebody(red="admin"), "reload", Role.ADMIN, About.EVERYTHING, ())


def test_main_is_moved_by_those_whom_the_settings_name(site: Site) -> None:
    read = type(site.plant.settings.main).model_validate
    strict = read({"publish": {"role": "submitter", "teams": ["red"]}, "hold": {"role": "admin"}})
    check_main(somebody(red="submitter"), "submit", strict, ["red"])
    with pytest.raises(NotAllowed, match="submit needs the role submitter of red, since `main` is protected"):
        check_main(somebody(blue="admin"), "submit", strict, ["blue"])
    check_main(somebody(red="maintainer"), "rollback", strict, [])
    with pytest.raises(NotAllowed, match=r"role admin"):
        check_main(somebody(red="maintainer"), "rollback", strict, [], holds=True)
    check_main(somebody(all="admin"), "submit", strict, ["blue"])
    check_main(somebody(blue="viewer"), "tasks", strict, [])  # which moves nothing


# --- over HTTP ---------------------------------------------------------------------------------------------------


class People:
    """Tokens of everybody who could be meant, made through the API."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tokens: dict[str, str] = {}

    def ask(self, who: str, verb: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
        """who: `viewer of red`, `admin of all teams`."""
        if who not in self.tokens:
            role, _, team = who.partition(" of ")
            asked = CreateToken(name=who, role=role, team=None if team == "all teams" else team)  # type: ignore[arg-type]
            self.tokens[who] = self.site.client.ask(asked)["token"]
        headers = {"authorization": f"Bearer {self.tokens[who]}", "x-request-id": "the-one"}
        with httpx.Client(base_url=self.site.url, headers=headers, trust_env=False) as client:
            return client.request(verb, path if path == "/metrics" else PREFIX + path, json=body, params=query)


@pytest.fixture
def people(site: Site) -> People:
    return People(site)


def a_request(route: Route, site: Site, task: str, team: str) -> tuple[str, Any, dict[str, Any]]:
    """Path, body and query of a request on a route, about a task or a team: one that changes nothing if it passes."""
    task_id = site.plant.queue.find("red/alpha").task_id if task == "red/alpha" else "t" + "0" * 21
    likely = {
        "reference": task, "version": 1, "old": 1, "new": 2, "team": team, "token_id": "000000000000",
        "task_id": task_id, "task_ids": [task_id], "name": "some-name", "reason": "why", "role": "viewer",
        "what": "no-worker", "change": "cancel", "owner": "ann", "versions": [1], "op_key": f"{route.name}:x",
        "request_key": "tag:x", "inputs": ["Paris"], "settings": site.plant.settings.model_dump(mode="json"),
        "files": {"rows.jsonl": {"sha256": "ab" * 32, "bytes": 3}}, "sha256": "ab" * 32, "bytes": 3, "offset": 3,
        "branch": "main", "at": time.time(), "lines": ["team: red"],
        "task": {**site.document(f"{team}/fresh"), "base_model": "not-here"},
    }  # fmt: skip
    fields = {name: likely[name] for name, field in route.record.model_fields.items() if name in likely and (
        field.is_required() or name == "team")}  # fmt: skip
    path = re.sub(r"{(\w+)(?::path)?}", lambda found: str(fields.pop(found[1])), route.path)
    return (path, fields, {}) if route.verb == "POST" else (path, None, fields)


NAMES_OF_BLUE = re.compile(r"blue|beta|secret-reason")


@pytest.mark.changes
def test_each_route_with_each_role_answers_as_the_table_says_and_shows_nothing_of_another_team(site: Site) -> None:
    people, beta = People(site), site.plant.queue.find("blue/beta").task_id
    site.client.ask(requests.Pause(team="blue", reason="secret-reason"))
    for route in ROUTES:
        for role in ROLES:
            who = f"{role} of red"
            path, body, query = a_request(route, site, "red/alpha", "red")
            answer = people.ask(who, route.verb, path, body, **query)
            is_enough = role.includes(route.role) and route.about is not About.EVERYTHING
            rules = site.plant.settings.main
            assert (answer.status_code == 403) is not is_enough, (route.name, who, answer.text, rules)
            assert answer.status_code < 500 or answer.json()["code"] != "error", (route.name, who, answer.text)
            if not path.startswith("/export"):
                assert not NAMES_OF_BLUE.search(answer.text), (route.name, who, answer.text)
                assert beta not in answer.text, (route.name, answer.text)


@pytest.mark.parametrize("role", ROLES)
def test_a_task_of_another_team_is_answered_as_one_that_is_not_there(site: Site, people: People, role: Role) -> None:
    beta = site.plant.queue.find("blue/beta").task_id
    who = f"{role} of red"
    for route in ROUTES:
        if "reference" not in route.record.model_fields:
            continue
        answers = []
        for task in ("blue/beta", "blue/nothing", beta, beta[:14], "t" + "f" * 21, "t" + "f" * 13):
            path, body, query = a_request(route, site, task, "blue")
            for fields in (body, query):
                if fields:
                    fields.pop("team", None)
            if "{reference" not in route.path:
                (body if body is not None else query)["reference"] = task  # type: ignore[index]
            answer = people.ask(who, route.verb, path, body, **query)
            answers.append((answer.status_code, answer.text.replace(task, "X")))
        assert answers[0] == answers[1], route.name
        assert answers[0][0] == 404, (route.name, answers[0])
        assert len({*answers[2:]}) == 1, (route.name, answers)


def test_nothing_of_another_team_can_be_named_on_the_way(site: Site, people: People) -> None:
    who, beta = "admin of red", site.plant.queue.find("blue/beta").task_id
    after = [{**site.document("red/late"), "after": [title]} for title in ("blue/beta", "blue/nothing")]
    refused = [people.ask(who, "POST", "/tasks", {"task": task, "dry_run": True}) for task in after]
    assert [answer.status_code for answer in refused] == [422, 422]
    assert refused[0].text.replace("blue/beta", "X") == refused[1].text.replace("blue/nothing", "X")
    older = [people.ask(who, "GET", "/tasks", cursor=task_id) for task_id in (beta, "t" + "f" * 21)]
    assert [answer.status_code for answer in older] == [404, 404]
    assert older[0].text.replace(beta, "X") == older[1].text.replace("t" + "f" * 21, "X")
    for body in ({"task_id": beta, "reason": "why"}, {"task_id": "t" + "f" * 21, "reason": "why"}):
        answer = people.ask(who, "POST", "/store/quarantine", body)
        assert (answer.status_code, answer.json()["what"]) == (404, "there is no such task")
    for team in ("blue", "no-such-team"):
        for verb, path, body, query in (
            ("GET", "/tasks", None, {"team": team}),
            ("POST", "/pause", {"team": team}, {}),
            ("POST", "/change-many", {"change": "cancel", "team": team}, {}),
            ("POST", "/tokens", {"name": "x", "role": "viewer", "team": team}, {}),
        ):
            answer = people.ask(who, verb, path, body, **query)
            assert (answer.status_code, answer.json()["what"]) == (404, f"there is no team '{team}'"), path


def test_a_team_sees_its_own_rows_and_the_counts_of_others(site: Site, people: People) -> None:
    def both(path: str, **query: Any) -> tuple[Any, Any]:
        red, everybody = (people.ask(f"viewer of {team}", "GET", path, **query) for team in ("red", "all teams"))
        assert (red.status_code, everybody.status_code) == (200, 200)
        return red.json(), everybody.json()

    red, all_of_it = both("/tasks")
    assert ([row["title"] for row in red], len(all_of_it)) == (["red/alpha"], 2)
    red, all_of_it = both("/versions")
    assert [(row["version"], row["task_count"]) for row in red] == [(1, 1), (2, 2)]
    assert [(row["added"], row.get("hidden")) for row in red] == [(["red/alpha"], None), ([], {"added": 1})]
    assert [row["added"] for row in all_of_it] == [["red/alpha"], ["blue/beta"]]
    red, all_of_it = both("/versions/2")
    assert ([row["title"] for row in red["tasks"]], red["hidden"]) == (["red/alpha"], {"tasks": 1, "added": 1})
    assert len(all_of_it["tasks"]) == 2
    red, all_of_it = both("/scores")
    columns = [[task["title"] for task in answer["tasks"]] for answer in (red, all_of_it)]
    assert columns == [["red/alpha"], ["red/alpha", "blue/beta"]]
    # The mean over its own tasks is what its own column says: no other team's score can be computed from it.
    assert red["by_version"][-1]["average_accuracy"] == {
        "value": red["matrix"][-1][0]["score"], "n": 1, "half_width_95": None,
    }  # fmt: skip
    assert [row[0] for row in red["matrix"]] == [row[0] for row in all_of_it["matrix"]]
    red, all_of_it = both("/matrix")
    assert [len(answer["tasks"]) for answer in (red, all_of_it)] == [1, 2]
    assert (red["news"], red["hidden"]) == ([all_of_it["news"][0], []], {"tasks": 1})
    red, all_of_it = both("/teams")
    assert (set(red["teams"]), set(all_of_it["teams"])) == ({"red"}, {"red", "blue"})
    red, all_of_it = both("/diff/1/2")
    assert (red["scores"].keys(), all_of_it["scores"].keys()) == ({"red/alpha"}, {"red/alpha", "blue/beta"})
    red, _ = both("/rollback/1")
    assert (red["vanishing"], red["hidden"], red["to_version"]) == ([], {"vanishing": 1}, 1)


def test_the_name_in_records_is_the_one_that_was_proved(site: Site, people: People) -> None:
    paused = people.ask("maintainer of red", "POST", "/pause", {"team": "red", "by": "the boss"})
    assert paused.json()["paused"]["by"] == "maintainer of red"
    people.ask("maintainer of red", "POST", "/resume", {"team": "red", "by": "the boss"})
    last = site.client.ask(requests.ReadAudit(limit=2))
    assert [(row["name"], row["request"], row["outcome"]) for row in last] == [
        ("maintainer of red", "resume", "asked"),
        ("maintainer of red", "resume", "done"),
    ]


def test_me_and_what_i_may(people: People) -> None:
    told = people.ask("submitter of red", "GET", "/whoami").json()
    assert (told["name"], told["roles"]) == ("submitter of red", {"red": "submitter"})
    assert people.ask("viewer of all teams", "GET", "/whoami").json()["roles"] == {"all teams": "viewer"}


@pytest.mark.changes
def test_a_protected_main_is_left_to_those_whom_the_settings_name(site: Site) -> None:
    people = People(site)
    settings = site.plant.settings.model_dump(mode="json") | {
        "main": {"rollback": {"role": "admin"}, "publish": {"role": "submitter", "teams": ["red"]}}
    }
    site.service.sources.settings = TypeAdapter(type(site.plant.settings)).validate_python(settings)
    refused = people.ask("maintainer of red", "POST", "/rollback/1", {"op_key": "rollback:1"})
    assert (refused.status_code, refused.json()["where"]) == (403, "main.rollback")
    assert "the role admin" in refused.json()["what"]
    refused = people.ask("maintainer of red", "POST", "/reject/2", {"reason": "no"})
    assert (refused.status_code, refused.json()["where"]) == (403, "main.rollback")
    refused = people.ask("admin of blue", "POST", "/tasks", {"task": site.document("blue/fresh")})
    assert (refused.status_code, refused.json()["where"]) == (403, "main.publish")
    assert people.ask("admin of red", "POST", "/rollback/1", {"op_key": "rollback:1"}).status_code == 200


@pytest.mark.changes
def test_what_others_do_is_told_without_their_names_while_it_goes_on(site: Site) -> None:
    people, ids = People(site), [site.plant.queue.find("blue/beta").task_id]
    site.plant.cluster.hold = lambda order: isinstance(order, Train)
    for title in ("blue/one", "blue/two", "red/waits", "blue/late"):
        soon = datetime.datetime.fromtimestamp(time.time() + 1.0, datetime.UTC).isoformat()
        late = {"deadline": soon} if title == "blue/late" else {}
        told = people.ask("admin of all teams", "POST", "/tasks", {"task": {**site.document(title), **late}})
        assert told.status_code == 200, told.text
        ids.append(told.json()["task_id"]) if title.startswith("blue") else None
    for title in ("blue/one", "blue/two"):
        site.wait_for(title, "training")
    people.ask("admin of all teams", "POST", "/pause", {"reference": "blue/late", "reason": "secret-reason"})
    while not site.service.tasks.deadlines.late:
        site.service.tasks.deadlines.look()
    site.plant.controller.alarms.ring(AlarmCode.STEP_FAILED, ids[1], f"{ids[1]}: blue/one cannot be read")
    everything = people.ask("viewer of all teams", "GET", "/status").text
    assert all(name in everything for name in (ids[1], "blue/one", "blue/late", '"blue"'))
    for path in ("/status", "/health", "/tasks", "/tasks/red/waits", "/events?reference=red/waits"):
        told = people.ask("viewer of red", "GET", path)
        assert told.status_code == 200
        assert not NAMES_OF_BLUE.search(told.text), told.text
        assert not any(task_id in told.text for task_id in ids), told.text
    told = people.ask("viewer of red", "GET", "/status").json()
    assert told["tasks"] == {"published": 2, "queued": 2, "training": 2}  # counts stay
    assert told["workers"] == {f"worker-{n}": "training another team's task" for n in (0, 1)}
    assert [alarm["what"] for alarm in told["alarms"]] == ["another team's task: another team's task cannot be read"]
    site.plant.cluster.release()


def test_why_the_gate_rejected_a_task_names_no_other_team(tmp_path: Path) -> None:
    few = {"rank_max": 2, "beyond_rank_max": "drop"}  # directions, too few for both tasks: the first one moves
    site = Site(tmp_path, gate={"drift_min": 0.0}, subspace=few)
    try:
        site.publish("blue/beta")
        people, beta = People(site), site.plant.queue.find("blue/beta").task_id
        site.plant.cluster.score = lambda title, held: 0.1 if title == "blue/beta" and "red/harmful" in held else 0.9
        people.ask("submitter of red", "POST", "/tasks", {"task": site.document("red/harmful")})
        reason = site.wait_for("red/harmful", "rejected")["reason"]
        assert "blue/beta" in reason
        told = people.ask("viewer of red", "GET", "/tasks/red/harmful").json()["reason"]
        assert told == reason.replace("blue/beta", "another team's task").replace(beta, "another team's task")
        for path in ("/tasks/red/harmful", "/events?reference=red/harmful", "/versions", "/versions/2"):
            answer = people.ask("viewer of red", "GET", path)
            assert not NAMES_OF_BLUE.search(answer.text), answer.text
            assert beta not in answer.text
    finally:
        site.close()


# --- tokens ------------------------------------------------------------------------------------------------------


def test_a_token_ends_is_rotated_and_revoked(site: Site, people: People) -> None:
    people.ask("viewer of red", "GET", "/whoami")
    own = people.ask("viewer of red", "GET", "/whoami").json()["token_id"]
    assert [row["token_id"] for row in people.ask("viewer of red", "GET", "/tokens").json()] == [own]
    fresh = people.ask("viewer of red", "POST", f"/tokens/{own}/rotate", {"grace_seconds": 3600.0}).json()
    assert (fresh["name"], fresh["role"], fresh["team"]) == ("viewer of red", "viewer", "red")
    assert people.ask("viewer of red", "GET", "/whoami").status_code == 200  # in its grace
    old, people.tokens["viewer of red"] = people.tokens["viewer of red"], fresh["token"]
    assert people.ask("viewer of red", "GET", "/whoami").json()["token_id"] == fresh["token_id"]
    assert site.client.ask(requests.RevokeToken(token_id=own))["revoked_at"] is not None
    people.tokens["viewer of red"] = old
    refused = people.ask("viewer of red", "GET", "/tasks")
    assert (refused.status_code, refused.json()["code"]) == (401, "unknown-token")
    assert refused.json()["what"] == f"the token {own} was revoked"
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_token_counts_until_it_ends_and_no_longer(site: Site, people: People) -> None:
    made = site.client.ask(CreateToken(name="robot", kind="service", role="viewer", team="red", days=1e-9))
    people.tokens["robot"] = made["token"]
    refused = people.ask("robot", "GET", "/whoami")
    assert (refused.status_code, refused.json()["what"]) == (401, f"the token {made['token_id']} has ended")


def test_nobody_gives_more_than_they_have_nor_ends_what_is_not_theirs(people: People) -> None:
    everybodys = people.ask("viewer of all teams", "GET", "/whoami").json()["token_id"]
    blues = people.ask("viewer of blue", "GET", "/whoami").json()["token_id"]
    for body in ({"name": "x", "role": "viewer"}, {"name": "x", "role": "viewer", "team": "blue"}):
        assert people.ask("admin of red", "POST", "/tokens", body).status_code in (403, 404)
    misspelt = people.ask(
        "admin of all teams", "POST", "/tokens", {"name": "x", "role": "viewer", "team": "rde"}
    ).json()
    assert (misspelt["what"], misspelt["todo"]) == ("there is no team 'rde'", "teams of this service: blue, red")
    made = people.ask("admin of red", "POST", "/tokens", {"name": "x", "role": "admin", "team": "red"})
    assert made.status_code == 200
    for who in ("admin of red", "viewer of red"):
        for token_id in (everybodys, blues, "ffffffffffff"):
            for what in ("rotate", "revoke"):
                answer = people.ask(who, "POST", f"/tokens/{token_id}/{what}", {})
                assert (answer.status_code, answer.json()["what"]) == (404, "there is no such token")
    assert people.ask("viewer of red", "POST", f"/tokens/{made.json()['token_id']}/revoke", {}).status_code == 404
    assert people.ask("admin of red", "POST", f"/tokens/{made.json()['token_id']}/revoke", {}).status_code == 200
    shown = {row["team"] for row in people.ask("admin of red", "GET", "/tokens").json()}
    assert shown == {"red"}


def test_who_asks_too_often_is_told_how_long_to_wait(site: Site, people: People) -> None:
    before = site.service.sources.settings
    server = before.server.model_copy(update={"requests_per_second": 0.01})
    site.service.sources.settings = before.model_copy(update={"server": server})
    try:
        answers = [people.ask("viewer of red", "GET", "/whoami") for _ in range(8)]
        assert [answer.status_code for answer in answers] == [200] + [429] * 7
        refused = answers[-1]
        assert refused.json()["code"] == "too-many-requests"
        assert 1 <= int(refused.headers["retry-after"]) <= 100  # a hundredth of a request a second
        assert int(refused.headers["retry-after"]) > 40  # however slow the machine is
        assert people.ask("viewer of blue", "GET", "/whoami").status_code == 200
        for _ in range(8):
            site.client.ask(requests.WhoAmI())  # the owner of the state folder is not counted
    finally:
        site.service.sources.settings = before


# --- the audit log -----------------------------------------------------------------------------------------------


def test_what_was_refused_is_in_the_log_too(site: Site, people: People) -> None:
    people.ask("viewer of red", "POST", "/store/tag", {"name": "gold", "version": 1})
    asked, ended = site.client.ask(requests.ReadAudit(limit=2))
    assert (asked["name"], asked["request"], asked["outcome"], json.loads(asked["about"])["name"]) == (
        "viewer of red", "tag", "asked", "gold",
    )  # fmt: skip
    assert (ended["of"], ended["outcome"]) == (asked["seq"], "not-allowed")
    assert asked["token_id"] == people.ask("viewer of red", "GET", "/whoami").json()["token_id"]


def test_a_dry_run_and_what_reads_leave_no_row(site: Site, people: People) -> None:
    before = site.client.ask(requests.VerifyAudit())["rows"]
    people.ask("submitter of red", "GET", "/tasks")
    made = site.client.ask(requests.VerifyAudit())["rows"]
    people.ask("submitter of red", "POST", "/tasks", {"task": site.document("red/dry"), "dry_run": True})
    assert (made - before, site.client.ask(requests.VerifyAudit())["rows"] - made) == (2, 0)  # the token was made


@pytest.mark.changes
def test_a_row_that_was_changed_or_taken_out_is_found(site: Site) -> None:
    for name in ("one", "two", "three"):
        site.client.ask(store_requests.Tag(name=name, version=1))
    whole = site.client.ask(requests.VerifyAudit())
    assert (whole["problem"], whole["rows"] % 2) == ("", 0)
    head, row = whole["head"], whole["rows"] - 3
    assert site.client.ask(requests.VerifyAudit(known=head))["holds_known"] is True

    def changed(statement: str) -> dict[str, Any]:
        with site.plant.queue.database.writing() as connection:
            connection.exec_driver_sql(statement)
        return site.client.ask(requests.VerifyAudit(known=head))

    found = changed(f"UPDATE audit SET name = 'bob' WHERE seq = {row}")
    assert (found["rows"], found["problem"]) == (row - 1, f"row {row} was changed")
    changed(f"UPDATE audit SET name = 'ann' WHERE seq = {row}")
    assert site.client.ask(requests.VerifyAudit())["problem"] == ""
    # What is cut off at the end breaks no chain: the digest that was noted is no longer in it.
    found = changed(f"DELETE FROM audit WHERE seq > {row}")
    assert (found["problem"], found["holds_known"]) == ("", False)
    found = changed(f"DELETE FROM audit WHERE seq = {row - 1}")
    assert found["problem"] == f"row {row - 1} is missing"


def test_a_submission_is_written_down_by_its_name_and_digest(site: Site, people: People) -> None:
    document = {**site.document("red/never"), "base_model": "not-here"}
    people.ask("submitter of red", "POST", "/tasks", {"task": document})
    asked, ended = site.client.ask(requests.ReadAudit(limit=2))
    about = json.loads(asked["about"])
    assert (about["title"], len(about["task_sha256"]), ended["outcome"]) == ("red/never", 64, "invalid-input")
    assert BASE not in asked["about"]


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.changes
def test_a_token_is_in_no_answer_no_log_no_event_no_trace_and_no_file(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    lines, collector = io.StringIO(), Receiver()
    in_json = logging.StreamHandler(lines)
    in_json.setFormatter(formatter("json"))
    logging.getLogger().addHandler(in_json)
    tracing = TracingSettings(endpoint=collector.url)
    traces = Traces(site.plant.queue, lambda: site.plant.settings.model_copy(update={"tracing": tracing}))
    traces.look()
    people = People(site)
    said = [people.ask("admin of all teams", "GET", "/status").text]
    canary = people.tokens["admin of all teams"]
    for route in ROUTES:
        path, body, query = a_request(route, site, "red/alpha", "red")
        said.append(people.ask("admin of all teams", route.verb, path, body, **query).text)
        # Where a client puts it by mistake: it is refused, and not told to others.
        people.ask("admin of all teams", "POST", "/pause", {"team": "red", "token": canary})
    wrong = canary[:-3] + "xyz"
    people.tokens["wrong"] = wrong
    said.append(people.ask("wrong", "GET", "/status").text)
    site.client.ask(Submit.from_http({}, {}, json.dumps({"task": site.document("red/one")}).encode()))
    said.append(json.dumps([row.text for row in site.plant.queue.events(site.plant.queue.find("red/one").task_id)]))
    said.append(json.dumps(site.client.ask(requests.ReadAudit(limit=10_000))))
    said.append(caplog.text)
    logging.getLogger().removeHandler(in_json)
    site.wait_for("red/one", "published")
    traces.look()
    collector.close()
    told = [body.decode("latin-1") for _, body in collector.came]
    assert "onebasis.requests" in lines.getvalue()
    assert any("red/one" in text for text in told)
    for text in (*said, lines.getvalue(), *told):
        assert canary not in text
        assert wrong not in text
    with site.plant.queue.database.reading() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    for file in site.folder.rglob("*"):
        if file.is_file():
            assert canary.encode() not in file.read_bytes(), file
