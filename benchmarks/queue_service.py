"""The parts of `make bench-queue` that need a real service: started with `onebasis up`, asked over HTTP.

submissions   submissions acknowledged in a second, with 1, 8 and 64 clients at once, while the service is paused
memory        resident memory of the control plane with 100, 1,000, 10,000 and 100,000 tasks that wait
first-step    from a submission to the task's first optimisation step on a warm worker; beside it, in turns, Ray
              Jobs on a Ray of its own on the same machine: from `submit_job` to the first line of a program that
              does nothing
failover      two real control planes on one real Postgres and one Ray: from a kill -9 of the one that leads until the
              other does, three times
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.job_submission import JobSubmissionClient
from sqlalchemy import insert

from configs.document import check_document
from configs.errors import Unavailable
from configs.task_spec import TaskSpec
from orchestrator.api.client import Client
from orchestrator.api.requests import ListTasks, Pause, Resume, ShowTask, Status, Submit
from orchestrator.tasks import tables
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, new_task_id
from orchestrator.tasks.task_rows import columns_of
from tests.acceptance.conftest import ROOT, Site
from tests.acceptance.test_failover import Two, role
from tests.ray_cluster import ray_cluster
from tests.servers.postgres import postgres_server

CLIENTS = (1, 8, 64)
SUBMISSIONS = 64
"""For each number of clients."""
WAITING = (100, 1_000, 10_000, 100_000)
STEPS = 5
"""Tasks, and Ray jobs, of which the median is told."""
TARGET_SECONDS = 0.5
FAILOVERS = 3
TEAM = {"queued_max": 1_000_000}


@contextmanager
def service() -> Iterator[Site]:
    """A running service with one warm worker, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="onebasis-bench-") as name:
        site = Site(Path(name))
        settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
        settings["workers"]["count"] = 1
        settings["teams"] = {"payments": TEAM}
        (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        site.run("up", "--config", "settings.yaml")
        try:
            site.wait("a warm worker", lambda: site.status()["workers_ready"] == 1, 600)
            yield site
        finally:
            site.run("down")


def spec_of(site: Site, name: str, steps: int = 6) -> TaskSpec:
    document = yaml.safe_load(site.task_file(name, steps=steps).read_text())
    document["data"] |= {side: str(site.folder / document["data"][side]) for side in ("train_file", "eval_file")}
    return check_document(document, TaskSpec, "task")


def submissions(site: Site) -> dict[str, Any]:
    """Acknowledged in a second, by the number of clients that submit at once."""
    client = Client(site.folder / ".onebasis")
    client.ask(Pause(reason="benchmark", by="bench"))
    told, first = {}, spec_of(site, "warm-up")
    client.ask(Submit(task=first, by="bench"))

    def submit(spec: TaskSpec) -> None:
        while True:  # on a machine that is busy enough a client is told to ask again, which does nothing twice
            with contextlib.suppress(Unavailable):
                Client(site.folder / ".onebasis", lambda line: None).ask(Submit(task=spec, by="bench"))
                return

    for clients in CLIENTS:
        specs = [first.model_copy(update={"name": f"s-{clients}-{n}"}) for n in range(SUBMISSIONS)]
        seconds = in_threads(clients, specs, submit)
        told[str(clients)] = len(specs) / seconds
        print(f"submissions {clients:3} clients: {told[str(clients)]:.1f} acknowledged a second", flush=True)
    client.ask(Resume(by="bench"))
    return told


def in_threads(count: int, things: list[Any], do: Callable[[Any], Any]) -> float:
    """Seconds that so many threads take to do something with each thing."""
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(do, things))  # raises what went wrong
    return time.perf_counter() - started


def memory(site: Site) -> dict[str, Any]:
    """MiB that a control plane has which was started with so many waiting tasks, and was asked for the status and for
    the newest 200 tasks."""
    client = Client(site.folder / ".onebasis")
    client.ask(Pause(reason="benchmark", by="bench"))
    task_id = client.ask(Submit(task=spec_of(site, "template"), by="bench"))["task_id"]
    queue = TaskQueue(f"sqlite:///{site.folder}/.onebasis/tasks.db")
    template, there, told = queue.get(task_id), 1, {}
    for waiting in WAITING:
        site.kill_control_plane()
        fill(queue, template, waiting - there)
        there = waiting
        site.run("up")
        site.wait("the status", lambda: site.status()["tasks"] is not None, 600)
        for _ in range(3):
            client.ask(Status())
            client.ask(ListTasks())
        told[str(waiting)] = psutil.Process(site.control_plane()).memory_info().rss / 2**20
        print(f"memory {waiting:7,} waiting: {told[str(waiting)]:.0f} MiB", flush=True)
    queue.close()
    return told


def fill(queue: TaskQueue, template: TaskRecord, count: int) -> None:
    """Add rows like one, by whole pages."""
    with queue._database.writing() as connection:
        for start in range(0, count, 2000):
            rows = []
            for _ in range(start, min(start + 2000, count)):
                task_id = new_task_id()
                changes = {"task_id": task_id, "name": f"task-{task_id}", "client_key": f"key-{task_id}"}
                spec = template.spec.model_copy(update={"name": changes["name"]})
                record = template.model_copy(update={**changes, "spec": spec, "submitted_at": time.time()})
                rows.append({"task_id": task_id, **columns_of(record)})
            connection.execute(insert(tables.tasks), rows)


def first_step(site: Site) -> dict[str, Any]:
    """Medians of the seconds from a submission to the first step, and of Ray Jobs, in turns."""
    client = Client(site.folder / ".onebasis")
    ours: list[float] = []
    parts: list[float] = []
    theirs: list[float] = []
    with ray_jobs() as job:
        for number in range(STEPS + 1):
            title = f"payments/first-{number}"
            client.ask(Submit(task=spec_of(site, f"first-{number}"), by="bench"))
            site.wait_for_state(title, "published", "parked", "rejected", seconds=600)
            training = client.ask(ShowTask(reference=title))["training"]
            seconds = job()
            if number:  # the first of each pays for what the others find
                ours.append(training["submit_to_first_step_seconds"])
                parts.append(training["claim_to_first_step_seconds"])
                theirs.append(seconds)
            took = training["submit_to_first_step_seconds"]
            print(f"first-step {number}: {took:.2f} s, Ray job {seconds:.2f} s", flush=True)
    told = {
        "submit_to_first_step_seconds": statistics.median(ours),
        "submit_to_first_step_p90_seconds": sorted(ours)[math.ceil(0.9 * len(ours)) - 1],
        "of_it_claim_to_first_step_seconds": statistics.median(parts),
        "ray_jobs_submit_to_running_seconds": statistics.median(theirs),
    }
    told["ray_jobs_over_ours"] = told["ray_jobs_submit_to_running_seconds"] / told["submit_to_first_step_seconds"]
    above = "" if told["submit_to_first_step_seconds"] < TARGET_SECONDS else f"  ABOVE {TARGET_SECONDS}"
    print(", ".join(f"{name} {value:.2f}" for name, value in told.items()) + above, flush=True)
    return told


JOB = f"{sys.executable} -S -c 'import time; print(time.time())'"
RAN = re.compile(r"^(\d+\.\d+)$", re.MULTILINE)
JOBS_SECONDS = 90
"""Longest wait for a new Ray to take its first job: what takes them starts later than Ray."""


@contextmanager
def ray_jobs() -> Iterator[Callable[[], float]]:
    """A function that submits one job to a Ray of its own, and says after how many seconds its program ran."""
    with ray_cluster(cpus=1, has_dashboard=True) as ray:
        token = ray.token.read_text().strip() if ray.token.exists() else ""
        client = _taking_jobs(str(ray.dashboard), token)

        def job() -> float:
            asked = time.time()
            name = client.submit_job(entrypoint=JOB)
            while not (ran := RAN.search(client.get_job_logs(name))):  # before it come lines of Ray's own
                time.sleep(0.01)
            return float(ran[1]) - asked

        yield job


def _taking_jobs(url: str, token: str) -> JobSubmissionClient:
    until = time.monotonic() + JOBS_SECONDS
    while True:
        try:
            client = JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"})
            client.submit_job(entrypoint="true")
            return client
        except (ConnectionError, RuntimeError):
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def failover() -> dict[str, Any]:
    """Seconds from a kill -9 of the leader until the other control plane says that it leads."""
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="onebasis-bench-queue-") as folder,
        postgres_server() as postgres,
        ray_cluster(cpus=1) as ray,
    ):
        two = Two(Path(folder), postgres, ray)
        try:
            for site in two.sites:
                site.run("up", "--config", "settings.yaml")
            for _ in range(FAILOVERS):
                leader = two.leader()
                (other,) = (site for site in two.sites if site is not leader)
                killed = time.monotonic()
                leader.kill_control_plane()
                other.wait("the other to lead", lambda other=other: role(other) == "leads", 60)
                found.append(time.monotonic() - killed)
                leader.run("up")
        finally:
            for site in two.sites:
                site.run("down")
    print(f"failover: {', '.join(f'{seconds:.1f}' for seconds in found)} s", flush=True)
    return {"failover_seconds": statistics.median(found), "failover_seconds_most": max(found)}
