"""What is killed, preempted or ended at any moment goes on: nothing acknowledged is lost, nothing is merged twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from orchestrator.api.requests import ListVersions
from tests.acceptance.conftest import ONEBASIS, ROOT, Site, merged_once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One running service for all of them."""
    site = Site(tmp_path_factory.mktemp("site"))
    settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    # A gate that lets small noisy tasks pass: these tests are about what survives, not about scores.
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    settings["workers"]["heartbeat_seconds"] = 0.3
    (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    site.run("up", "--config", "settings.yaml")
    yield site
    site.run("down")


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
    site.wait("a training step", lambda: site.task("payments/found-again")["progress"].get("step", 0) >= 2)
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
    # Its memory is for tasks and versions: what needs torch is done by other processes.
    assert "libtorch" not in Path(f"/proc/{site.control_plane()}/maps").read_text()


def test_files_that_are_sent_go_on_where_they_were_when_the_control_plane_was_killed(
    site: Site, tmp_path: Path
) -> None:
    size = 400_000_000
    (tmp_path / "rows.parquet").write_bytes(os.urandom(size))  # as large as rows may be; no rows, so it is refused soon
    document = {"team": "payments", "name": "sent", "base_model": "minilm"}
    document |= {"data": {"train_file": "rows.parquet", "eval_fraction": 0.2, "label_names": ["a", "b"]}}  # type: ignore[dict-item]
    (tmp_path / "sent.yaml").write_text(yaml.safe_dump(document))
    token = site.ask("token", "create", "laptop", "--role", "submitter", "--team", "payments")["token"]
    environment = {name: value for name, value in os.environ.items() if name != "ONEBASIS_STATE_DIR"}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    def typed(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [ONEBASIS, *arguments], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
        )  # fmt: skip

    def log_in() -> None:
        url = json.loads((site.folder / ".onebasis/server.json").read_text())["url"]
        done = typed("login", url, "--name", "prod")
        assert "commands ask" in done.communicate(token)[0]

    log_in()
    parts = site.folder / ".onebasis/uploads/payments/parts"
    sending = typed("submit", "sent.yaml")
    site.wait("some of it to come", lambda: sum(part.stat().st_size for part in parts.glob("*")) > 20_000_000)
    site.kill_control_plane()
    sending.send_signal(signal.SIGINT)
    assert "the same command goes on from it" in sending.communicate()[0]
    assert sending.returncode == 130
    (part,) = parts.iterdir()
    come = part.stat().st_size
    assert 20_000_000 < come < size
    site.run("up", "--config", "settings.yaml")
    log_in()
    again = typed("submit", "sent.yaml")
    told = again.communicate()[0]
    assert f"sent 1 file, {(size - come) / 1e6:,.1f} MB" in told  # the rest alone
    assert f"{tmp_path / 'rows.parquet'}: is not a readable parquet file" in told
    assert list(parts.iterdir()) == []
    (whole,) = (parts.parent / "whole").iterdir()
    assert whole.read_bytes() == (tmp_path / "rows.parquet").read_bytes()


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
        before = site.task(title)["task_id"]
        assert site.ask("submit", f"{title.partition('/')[2]}.yaml")["task_id"] == before


def test_a_killed_worker_costs_an_attempt_and_nothing_else(site: Site) -> None:
    site.run("submit", str(site.task_file("worker-dies", steps=60)))
    site.wait("a training step", lambda: site.task("payments/worker-dies")["progress"].get("step", 0) >= 2)
    os.kill(busiest(site.processes("ray::WorkerActor")), signal.SIGKILL)

    task = site.wait_for_state("payments/worker-dies", "published")
    assert task["attempt"] == 2
    assert task["training"]["worker_deaths"] == 1
    assert task["training"]["lost_machines"] == 0
    assert task["training"]["own_bugs"] == 0
    assert merged_once(site, "payments/worker-dies")
    site.wait("both workers to be warm again", lambda: site.status()["workers_ready"] == 2)


def test_a_free_worker_that_dies_is_noticed_and_replaced(site: Site) -> None:
    site.wait("both workers to be free", lambda: list(site.status()["workers"].values()) == ["free", "free"])
    before = site.processes("ray::WorkerActor")
    os.kill(before[0], signal.SIGKILL)
    site.wait("it to be noticed", lambda: site.status()["workers_ready"] == 1, 15)
    site.wait("it to be warm again", lambda: site.status()["workers_ready"] == 2)
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
    assert site.status()["main"] == site.status()["candidate"]


def test_cancelling_a_running_task_stops_it_and_frees_its_worker(site: Site) -> None:
    site.run("submit", str(site.task_file("unwanted", steps=2000)))
    site.wait("a training step", lambda: site.task("payments/unwanted")["progress"].get("step", 0) >= 2)
    site.run("cancel", "payments/unwanted")
    assert site.wait_for_state("payments/unwanted", "cancelled", seconds=20)["version"] is None
    site.wait("its worker to be free", lambda: set(site.status()["workers"].values()) == {"free"}, 20)


def steps_done(site: Site, title: str, state: str) -> int:
    task = site.task(title)
    return int(task["progress"].get("step", 0)) if task["state"] == state else 0


def test_a_preempted_task_goes_on_from_its_checkpoint(site: Site) -> None:
    title = "payments/gives-way"
    site.run("submit", str(site.task_file("gives-way", steps=60)))
    site.wait("training steps", lambda: steps_done(site, title, "training") >= 5)
    assert site.ask("preempt", title)["state"] in ("training", "queued")

    task = site.wait_for_state(title, "published")
    told = task["training"]
    assert (told["preemptions"], told["lost_machines"], told["own_bugs"], task["attempt"]) == (1, 0, 0, 2)
    assert told["steps"] == 60
    assert told["resumed_from"] >= 5


def test_a_service_that_ends_while_it_refines_goes_on_with_the_refinement(site: Site) -> None:
    title = "payments/refined"
    site.run("submit", str(site.task_file("refined", steps=10, method={"refine_epochs": 15})))
    site.wait("refinement steps", lambda: steps_done(site, title, "refining") >= 2)
    site.run("down")
    task = site.ask("task", title)  # read without a running service
    assert (task["state"], task["worker"], task["training"]["preemptions"]) == ("refining", "", 1)
    site.run("up", "--config", "settings.yaml")

    task = site.wait_for_state(title, "published")
    assert task["training"]["unrefined"] == ""
    assert task["training"]["refined_seconds"] > 0
    versions = {version["version"]: version for version in site.look(ListVersions())}
    refined = versions[task["version"]]
    assert (refined["added"], refined["refined"]) == ([], [title])
    assert title in versions[refined["parent"]]["added"]
    assert any("went on from step" in event["text"] for event in task["events"] if event["kind"] == "TrainingDone")
    site.run("store", "verify", "--deep")


def test_two_ups_at_once_start_one_cluster_and_down_ends_it(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["workers"]["count"] = 1
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    up = [ONEBASIS, "up", "--config", "settings.yaml"]
    starting = [
        subprocess.Popen(up, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in starting]
    assert [process.returncode for process in starting] == [0, 0], said
    heads = subprocess.run(["pgrep", "-f", f"orchestrator.ray_head {tmp_path}"], capture_output=True, text=True)
    assert len(heads.stdout.split()) == 1
    subprocess.run([ONEBASIS, "down"], cwd=tmp_path, check=True, capture_output=True)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert left.stdout == ""
