"""What Prometheus reads is what the service says, and the alert rules and the dashboard ask for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.alarms import Alarm, AlarmCode
from orchestrator.reports.prometheus import Meter, metrics
from orchestrator.scheduling.reasons import WaitCode
from tests.docs.pages import ROOT
from tests.orchestrator.site import TOKEN, Site

RULES = ROOT / "configs/prometheus/alerts.yaml"
DASHBOARD = ROOT / "configs/prometheus/dashboard.json"
Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def site(bare_site: Site) -> Site:
    return bare_site


def scraped(site: Site, token: str = TOKEN) -> Found:
    answer = httpx.get(f"{site.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert answer.status_code == 200, answer.text
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(found: Found, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


def test_what_is_scraped_is_what_the_service_says(site: Site) -> None:
    before = scraped(site)
    assert of(before, "onebasis_running") == 1
    assert of(before, "onebasis_tasks", state="published") in (None, 0)
    site.publish("red/alpha")
    (base,) = site.plant.settings.base_names
    httpx.get(f"{site.url}/nowhere", headers={"Authorization": f"Bearer {TOKEN}"})
    after = scraped(site)
    assert of(after, "onebasis_tasks", state="published") == 1
    assert of(after, "onebasis_version", base_model=base, branch="main") == 1
    assert of(after, "onebasis_workers", pool="default", state="warm") == 1
    assert of(after, "onebasis_main_held", base_model=base) == 0
    footprint = site.service.versions().footprint_soon()
    assert footprint is not None
    assert of(after, "onebasis_stored_bytes", base_model=base) == footprint["stored_bytes"]
    assert of(after, "onebasis_http_requests_total", route="submit", status="200") == 1
    assert of(after, "onebasis_http_requests_total", route="none", status="404") == 1
    assert of(after, "onebasis_http_request_seconds_count", route="metrics") == 1
    assert not any("alpha" in str(key) for key in after)


def test_only_who_sees_all_teams_may_scrape(site: Site) -> None:
    answer = httpx.get(f"{site.url}/metrics")
    assert answer.status_code == 401


# --- alert rules, dashboard ----------------------------------------------------------------------------------------

Labels = frozenset[str]
TARGET: Labels = frozenset({"instance", "job"})
"""Labels that Prometheus itself adds."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Labels]]:
    """Each metric that a service exports to its labels: those of one with a published task, an alarm that rings, tasks
    that wait, replicas that answer."""
    site = Site(tmp_path_factory.mktemp("exported"), workers=1)
    site.publish("red/alpha")
    status = httpx.get(f"{site.url}/v1/status", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    (base,) = status["base_models"]
    alarm = Alarm(AlarmCode.STORE_FULL, "merging", "what", "todo", 0.0, base["base_model"])
    more = {
        "waiting": {"red": {WaitCode.PAUSED: 1}},
        "alarms": [alarm.as_dict()],
        "serving": {"base_models": {base["base_model"]: [{"version": 1, "rows": 2}]}},
        "loop_seconds_ago": 0.1,
        "heard_seconds_ago": 0.1,
        "mlflow_behind": True,
        "base_models": [base | {"footprint": site.service.versions().footprint_soon()}],
    }
    of_requests = Meter()
    of_requests.count("tasks", 200, 0.1)
    found: dict[str, Labels] = {}
    for family in text_string_to_metric_families(metrics(status | more) + of_requests.text()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, frozenset()) | sample.labels.keys()
    assert {name for name, _ in scraped(site)} <= found.keys()
    yield found
    site.close()


def check(expression: str, exported: dict[str, Labels]) -> Labels:
    """Refuse a query that is none, or that asks for what is not exported. Returns the labels of its answer, as far as
    an aggregation says them."""
    asked, kept = set[str](), set[str]()

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            assert part.name in exported, f"{part.name} is not exported"
            asked.add(part.name)
            for matcher in part.matchers.matchers:
                assert matcher.name in exported[part.name] | TARGET, f"{part.name} has no label {matcher.name}"
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            kept.update(part.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    assert asked, "asks for nothing"
    there = frozenset(label for name in asked for label in exported[name])
    assert kept <= there | TARGET, f"{kept - there} is no label of {asked}"
    return frozenset(kept) if kept else there


def named(text: str) -> set[str]:
    """Labels that a text shows: `{{ $labels.code }}` of a rule, `{{code}}` of a panel."""
    return set(re.findall(r"{{ *\$labels\.(\w+) *}}", text)) | set(re.findall(r"{{(\w+)}}", text))


def test_the_alert_rules_ask_for_metrics_and_labels_that_there_are(exported: dict[str, Labels]) -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        there = check(rule["expr"], exported)
        assert named(rule["annotations"]["summary"]) <= there, rule["alert"]
        assert promql_parser.parse_duration(rule["for"])
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(exported: dict[str, Labels]) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    shown = set[str]()
    for panel in (one for one in dashboard["panels"] if one["type"] != "row"):
        assert panel["description"].endswith("."), panel["title"]
        for target in panel["targets"]:
            asked = target["expr"]
            assert set(re.findall(r"\$(\w+)", asked)) <= variables.keys() | {"__rate_interval"}
            there = check(asked.replace("$__rate_interval", "5m"), exported)
            assert named(target.get("legendFormat", "")) <= there, panel["title"]
            shown |= set(re.findall(r"onebasis_\w+", asked))
    for variable in variables.values():
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            assert asked is not None
            assert asked[2] in exported[asked[1]] | TARGET, variable["name"]
    # Whatever is exported is on it: of a histogram, its buckets.
    forms = {re.sub(r"_(created|sum|count)$", "_bucket", name) for name in exported if "http_request_seconds" in name}
    whole = {name for name in exported if "http_request" not in name} | forms | {"onebasis_http_requests_total"}
    assert shown == whole


def test_panels_lie_beside_each_other_and_have_numbers_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in (panel["gridPos"],)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("max(onebasis_loop_age)", "onebasis_loop_age is not exported"),
        ('sum(onebasis_tasks{sate="queued"})', "onebasis_tasks has no label sate"),
        ("sum by (pool) (onebasis_tasks)", "is no label of"),
        ("vector(1)", "asks for nothing"),
    ],
)
def test_a_query_for_what_is_not_there_is_found(exported: dict[str, Labels], query: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check(query, exported)
