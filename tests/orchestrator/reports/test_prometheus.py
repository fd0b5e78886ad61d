"""What Prometheus reads is what the service says, and the alert rules ask for nothing else."""

from __future__ import annotations

import re

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.docs.pages import ROOT
from tests.orchestrator.site import TOKEN, Site

RULES = ROOT / "configs/prometheus/alerts.yaml"
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


def test_the_alert_rules_ask_for_metrics_that_there_are(site: Site) -> None:
    site.publish("red/alpha")
    there = {name for name, _ in scraped(site)} | {"onebasis_alarm", "onebasis_loop_age_seconds"}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    for rule in rules:
        asked = set(re.findall(r"onebasis_\w+", rule["expr"]))
        assert asked
        assert asked <= there, rule["alert"]
        assert rule["annotations"]["summary"]
    text = (ROOT / "orchestrator/reports/prometheus.py").read_text()
    assert '"onebasis_alarm"' in text
    assert '"onebasis_loop_age_seconds"' in text
