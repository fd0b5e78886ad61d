"""A worker's machine is cut off for longer than a lease, and comes back: nothing is ended, merged or counted twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from configs.settings import StorageSettings
from orchestrator.ray_head import ray_environment
from subspace_store import open_storage
from tests.acceptance.conftest import ROOT, Site, merged_once
from tests.network import TwoMachines, two_machines, why_not

LEASE_SECONDS = 8.0
STEPS = 60


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[TwoMachines]:
    """This machine and a namespace beside it, with room for one worker each."""
    if reason := why_not():
        pytest.skip(f"NOT TESTED: a machine that is cut off. Two machines cannot be made here: {reason}")
    with two_machines(ray_environment(tmp_path / "token")) as machines:
        machines.start_head(cpus=1)
        machines.start_other(cpus=1)
        yield machines


@pytest.fixture
def site(tmp_path: Path, machines: TwoMachines) -> Iterator[Site]:
    site = Site(tmp_path)
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    settings["workers"] |= {"count": 2, "heartbeat_seconds": 0.3, "lease_seconds": LEASE_SECONDS}
    settings["ray"] = {"address": machines.address, "auth_token_path": str(tmp_path / "token")}
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    site.run("up", "--config", "settings.yaml")
    yield site
    site.run("down")


def workers_there(machines: TwoMachines) -> list[int]:
    """Process ids of the workers on the other machine, as this one counts them."""
    found = []
    for process in psutil.Process(machines._processes[machines.other].pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::WorkerActor"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_machine_that_was_cut_off_for_longer_than_a_lease_ends_no_other_run_and_writes_nothing(
    site: Site, machines: TwoMachines
) -> None:
    titles = ("payments/here", "payments/there")
    for title in titles:
        site.run("submit", str(site.task_file(title.partition("/")[2], steps=STEPS)))
    for title in titles:
        site.wait("both to train", lambda title=title: site.task(title)["progress"].get("step", 0) >= 2)
    (cut_off,) = workers_there(machines)
    before = {title: site.task(title) for title in titles}
    tokens = {title: staged(site, task) for title, task in before.items()}

    machines.cut()
    site.wait(
        "the run of the machine that is cut off to count as lost",
        lambda: any(site.task(title)["training"]["lost_machines"] for title in titles),
        60,
    )
    lost = next(title for title in titles if site.task(title)["training"]["lost_machines"])
    healthy = next(title for title in titles if title != lost)
    until = time.monotonic() + LEASE_SECONDS  # both the lease of the worker and Ray's own patience are over by then
    while time.monotonic() < until:
        assert site.task(healthy)["attempt"] == 1
        time.sleep(0.5)
    assert psutil.pid_exists(cut_off)  # it lives, and goes on for all it knows
    machines.mend()

    ended = {title: site.wait_for_state(title, "published", seconds=300) for title in titles}
    assert merged_once(site, *titles)
    assert (ended[healthy]["attempt"], ended[healthy]["training"]["lost_machines"]) == (1, 0)
    assert kinds(ended[healthy]).count("Claimed") == 1
    assert "TrainingFailed" not in kinds(ended[healthy])
    # Lost once, although a lease ended, Ray gave the machine up, and the machine came back.
    assert (ended[lost]["attempt"], ended[lost]["training"]["lost_machines"]) == (2, 1)
    assert (kinds(ended[lost]).count("Claimed"), kinds(ended[lost]).count("TrainingFailed")) == (2, 1)
    assert (kinds(ended[lost]).count("TrainingDone"), kinds(ended[lost]).count("Merged")) == (1, 1)
    said = next(event["text"] for event in ended[lost]["events"] if event["kind"] == "TrainingFailed")
    assert "lost" in said
    # What the machine that was cut off has trained is in no version, and its files are gone.
    site.wait("the old worker to end", lambda: not psutil.pid_exists(cut_off), 60)
    place = open_storage(StorageSettings(url=f"file:{site.folder}/.onebasis/store"), "minilm")
    site.wait("its files to be deleted", lambda: not list(place.keys(tokens[lost])), 60)
    site.run("store", "verify", "--deep")


def kinds(task: dict[str, Any]) -> list[str]:
    return [event["kind"] for event in task["events"]]


def staged(site: Site, task: dict[str, Any]) -> str:
    """Prefix of what an attempt has in staging."""
    return f"staging/{task['task_id']}/{task['attempt']}-"
