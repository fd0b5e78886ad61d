"""Killing any process at any moment loses nothing that was acknowledged and merges nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import ONEBASIS, Site, merged_once


def busiest(pids: list[int]) -> int:
    """The process that uses most CPU now."""
    before = {pid: cpu_ticks(pid) for pid in pids}
    time.sleep(0.5)
    return max(pids, key=lambda pid: cpu_ticks(pid) - before[pid])


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_killed_control_plane_finds_its_running_training_again(site: Site) -> None:
    site.run("submit", str(site.task_file("found-again", steps=40)))
    site.wait("a training step", lambda: site.ask("task", "payments/found-again")["progress"].get("step", 0) >= 2)
    workers = set(site.processes("ray::WorkerActor"))
    site.kill_control_plane()
    assert site.ask("task", "payments/found-again")["state"] == "training"  # read without a running service
    site.run("up", "--config", "settings.yaml")

    task = site.wait_for_state("payments/found-again", "published")
    assert task["attempt"] == 1  # the same attempt went on: a lost one would have been requeued
    assert [e["kind"] for e in task["events"]].count("Claimed") == 1
    assert task["training"]["steps"] == 40
    assert len(workers) == 2
    assert workers == set(site.processes("ray::WorkerActor"))  # the warm workers were kept
    assert merged_once(site, "payments/found-again")


@pytest.mark.parametrize("delay_seconds", [0.0, 1.5, 2.5, 3.2])
def test_a_control_plane_killed_at_any_moment_merges_every_acknowledged_task_once(
    site: Site, delay_seconds: float
) -> None:
    names = [f"moment-{int(10 * delay_seconds)}-{team}" for team in ("payments", "cards")]
    teams = ["payments", "cards"]
    for name, team in zip(names, teams, strict=True):
        site.run("submit", str(site.task_file(name, team=team)))
    time.sleep(delay_seconds)
    site.kill_control_plane()
    site.run("up", "--config", "settings.yaml")

    titles = [f"{team}/{name}" for name, team in zip(names, teams, strict=True)]
    for title in titles:
        site.wait_for_state(title, "published")
    assert merged_once(site, *titles)
    for title in titles:  # and submitting once more is still the same task
        before = site.ask("task", title)["task_id"]
        assert site.ask("submit", f"{title.partition('/')[2]}.yaml")["task_id"] == before


def test_a_killed_worker_costs_an_attempt_and_nothing_else(site: Site) -> None:
    site.run("submit", str(site.task_file("worker-dies", steps=60)))
    site.wait("a training step", lambda: site.ask("task", "payments/worker-dies")["progress"].get("step", 0) >= 2)
    os.kill(busiest(site.processes("ray::WorkerActor")), signal.SIGKILL)

    task = site.wait_for_state("payments/worker-dies", "published")
    assert task["attempt"] == 2
    assert task["training"]["lost_machines"] == 1
    assert task["training"]["own_bugs"] == 0
    assert merged_once(site, "payments/worker-dies")
    site.wait("both workers to be warm again", lambda: site.ask("status")["workers_ready"] == 2)


def test_a_free_worker_that_dies_is_noticed_and_replaced(site: Site) -> None:
    site.wait("both workers to be free", lambda: list(site.ask("status")["workers"].values()) == ["free", "free"])
    before = site.processes("ray::WorkerActor")
    os.kill(before[0], signal.SIGKILL)
    site.wait("it to be noticed", lambda: site.ask("status")["workers_ready"] == 1, 15)
    site.wait("it to be warm again", lambda: site.ask("status")["workers_ready"] == 2)
    assert before[0] not in site.processes("ray::WorkerActor")


def test_a_store_killed_while_tasks_are_merged_comes_back_and_merges_them_once(site: Site) -> None:
    titles = [f"{team}/store-dies" for team in ("payments", "cards", "knowledge")]
    for team in ("payments", "cards", "knowledge"):
        path = site.task_file("store-dies", team=team, steps=4)
        site.run("submit", str(path))
    for _ in range(4):
        time.sleep(1.5)  # 4 steps take a second or two: training ends, merges and verdicts are asked for meanwhile
        for pid in site.processes("ray::StoreActor"):
            os.kill(pid, signal.SIGKILL)
    for title in titles:
        task = site.wait_for_state(title, "published")
        assert task["training"]["own_bugs"] == task["training"]["lost_machines"] == 0
    assert merged_once(site, *titles)
    assert site.ask("status")["main"] == site.ask("status")["candidate"]


def test_cancelling_a_running_task_stops_it_and_frees_its_worker(site: Site) -> None:
    site.run("submit", str(site.task_file("unwanted", steps=2000)))
    site.wait("a training step", lambda: site.ask("task", "payments/unwanted")["progress"].get("step", 0) >= 2)
    site.run("cancel", "payments/unwanted")
    assert site.wait_for_state("payments/unwanted", "cancelled", seconds=20)["version"] is None
    site.wait("its worker to be free", lambda: set(site.ask("status")["workers"].values()) == {"free"}, 20)


def test_two_ups_at_once_start_one_cluster_and_down_ends_it(tmp_path: Path) -> None:
    starting = [
        subprocess.Popen([ONEBASIS, "up"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in starting]
    assert [process.returncode for process in starting] == [0, 0], said
    heads = subprocess.run(["pgrep", "-f", f"orchestrator.ray_head {tmp_path}"], capture_output=True, text=True)
    assert len(heads.stdout.split()) == 1
    subprocess.run([ONEBASIS, "down"], cwd=tmp_path, check=True, capture_output=True)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert left.stdout == ""
