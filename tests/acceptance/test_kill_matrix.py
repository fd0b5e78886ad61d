"""Whatever dies, hangs or fills up, people are told within seconds what it is, and no task comes out otherwise.

One service goes through it all: its task database is a real Postgres, its store a real S3 server behind a proxy, its
MLflow a server. Nothing hangs silently for longer than ten seconds, and nothing says that all is well when it is not.

The table: each process is killed (SIGKILL) at a moment at which one task is in each of four states, by `in_each`, and
once more while a task is in the fifth, `refining`, which only the task that is judged next can be in:

| killed | queued | training | merging | evaluating | refining |
|---|---|---|---|---|---|
| control plane, worker (a gang's supervisor), rank, store actor, raylet, GCS, Ray head, MLflow, Postgres, S3 server |
  waits for a worker | between two steps | trained, behind the version that is judged | scored, while `main` is held |
  merged, between two steps |

Afterwards each of the five is what it is without any kill: published, in one version (refined: in one more), with the
same score, and with no attempt more than what was killed has cost it. Kills in the middle of a merge's own writes are
in test_interruptions.py (the store's writer) and in tests/servers/test_kills.py (the S3 server and the writer, at every
write). What is marked `stops` takes a quarter of an hour more, and `make test-kills` runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import yaml

from configs.errors import Held
from configs.task_spec import read_task_spec
from orchestrator.api.client import Client
from orchestrator.api.requests import ListVersions, Submit
from subspace_store.requests import Hold, Release
from tests.acceptance.conftest import ONEBASIS, ROOT, Site, merged_once
from tests.moto_server import free_port
from tests.servers.ministack import ministack_server
from tests.servers.postgres import postgres_server
from tests.servers.refusing_proxy import Mood, RefusingProxy, refusing_proxy
from tests.servers.server import CREDENTIALS, start, stop

SILENT_SECONDS = 10.0
"""Nobody looks longer at a terminal that says nothing."""


def patience() -> float:
    """The same on a machine that has other work: there a command waits for its CPU before it says its first word."""
    return SILENT_SECONDS * max(1.0, os.getloadavg()[0] / (3 * (os.cpu_count() or 1)))


KILL, STOP = signal.SIGKILL, signal.SIGSTOP


class Matrix(Site):
    """A service whose processes and store are broken one after another."""

    def __init__(self, folder: Path, proxy: RefusingProxy, servers: Mapping[str, Restarted]) -> None:
        super().__init__(folder)
        self.proxy = proxy
        self.servers = servers

    def pid(self, part: str) -> int:
        """Process id of a part, by the name that `MATRIX` gives it."""
        if part == "control plane":
            return int(json.loads((self.folder / ".onebasis/server.json").read_text())["pid"])
        ray = json.loads((self.folder / ".onebasis/ray.json").read_text())
        if part == "Ray head":
            return int(ray["pid"])
        if part in ray["parts"]:
            return int(ray["parts"][part])
        self.wait(f"one {part}", lambda: bool(self.processes(f"ray::{part}")))
        return self.processes(f"ray::{part}")[-1]

    def say(self, *arguments: str, expect: int | None = 0) -> str:
        """What a command prints, while it is never silent for longer than ten seconds."""
        command = subprocess.Popen(
            [ONEBASIS, *arguments], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert command.stdout is not None
        os.set_blocking(command.stdout.fileno(), False)
        said, spoke_at = b"", time.monotonic()
        while command.poll() is None:
            if new := command.stdout.read():
                said, spoke_at = said + new, time.monotonic()
            silence = time.monotonic() - spoke_at
            assert silence < patience(), f"{arguments} was silent after {said!r}"
            time.sleep(0.05)
        said += command.stdout.read() or b""
        command.stdout.close()
        text = said.decode()
        assert expect is None or command.returncode == expect, (
            f"{arguments}: {command.returncode}\n{text}\n{self.log()}"
        )
        return text

    def alarm(self, *codes: str, seconds: float = 0.0) -> str:
        """What `status` says once one of the alarms rings, or the control plane is told to be silent or down.

        Args:
            seconds: What may take so long before it, such as training.
        """
        until = time.monotonic() + seconds + patience()
        while True:
            said = self.say("status", expect=None)
            if any(code in said for code in codes):
                return said
            assert time.monotonic() < until, f"none of {codes} in\n{said}\n{self.log()}"
            time.sleep(0.1)

    def submit(self, name: str, steps: int, refine_epochs: float = 0.0) -> str:
        """Submit without the wait for a command to start. Returns the task's title."""
        method = {"name": "lora", "refine_epochs": refine_epochs}
        self.look(Submit(task=read_task_spec(self.task_file(name, steps=steps, method=method))))
        return f"payments/{name}"

    def step_in(self, state: str, title: str) -> int:
        """The step at which a task is, if it is in that state."""
        task = self.task(title)
        return int(task["progress"].get("step", 0)) if task["state"] == state else 0

    def in_each(self, name: str) -> dict[str, str]:
        """Bring one task into each state, and keep `main` where it is so that they stay there: state to title."""
        with contextlib.suppress(Held):  # a row that failed has left it so, and should be the only one to fail
            Client(self.folder / ".onebasis").ask(Hold(reason=f"until {name} was killed"))
        found = {}
        for state in ("evaluating", "merging"):
            found[state] = self.submit(f"{state}-{name}", steps=2)
            self.wait_for_state(found[state], state)
        found["training"] = self.submit(f"training-{name}", steps=40)
        found["queued"] = self.submit(f"queued-{name}", steps=2)
        self.wait("training", lambda: self.step_in("training", found["training"]) >= 2)
        assert [self.task(title)["state"] for title in found.values()] == [*found]
        return found

    def in_refining(self, name: str) -> str:
        """Bring a task to where it is refined. Returns its title."""
        title = self.submit(f"refining-{name}", steps=2, refine_epochs=10)
        self.wait("refinement steps", lambda: self.step_in("refining", title) >= 2)
        return title

    def let_go(self, titles: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Let `main` move, and wait until all are published: state to task."""
        Client(self.folder / ".onebasis").ask(Release())
        return {state: self.wait_for_state(title, "published", "parked") for state, title in titles.items()}

    def kill(self, part: str, told: Sequence[str]) -> None:
        """Kill a part, see that people are told of it, and bring it back, also where they are not: another row is to
        find it there."""
        if (server := self.servers.get(part)) is not None:
            server.kill()
        else:
            os.kill(self.pid(part), KILL)
        try:
            if told:
                said = self.alarm(*told)
                assert "ALARM" in said or "error:" in said or "onebasis is down" in said
                self.say("tasks", expect=None)
        except AssertionError:
            self.run("up") if server is None else server.start()
            raise
        if server is not None:
            server.start()
        else:
            _, up, after = self.say("up").partition("onebasis is up")
            assert up
            rang = {*re.findall(r"ALARM ([\w-]+)", after)}
            assert rang <= {"store-slow"}  # as it does on a busy machine, whatever was killed
        self.wait("the alarms to end", self.is_well, 180)

    def is_well(self) -> bool:
        answer = self.status()
        return bool(answer["running"] and answer["workers_ready"] == 1 and not answer["alarms"])


class MlflowServer:
    """A tracking server that can be killed with all its processes, and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = [f"--backend-store-uri=sqlite:///{self._folder}/mlflow.db", f"--artifacts-destination={self._folder}"]
        command = [str(Path(ONEBASIS).with_name("mlflow")), "server", "--host=127.0.0.1", f"--port={self._port}"]
        log = self._folder / "mlflow.log"
        self._process = start([*command, "--workers=1", *where], log, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def wait(self) -> None:
        """Return when it listens. Its imports take ten seconds, and a minute where there is other work."""
        until = time.monotonic() + 180
        while not self._listens():
            assert time.monotonic() < until, (self._folder / "mlflow.log").read_text()[-3000:]
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def kill(self) -> None:
        """kill -9 of all its processes."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
        stop(self._process)


class Restarted(Protocol):
    """A server beside the service."""

    def start(self) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """One worker of two ranks; a store on S3, the tasks in Postgres, MLflow a server."""
    folder = tmp_path_factory.mktemp("matrix")
    mlflow = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    with contextlib.ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        mlflow.start()
        undo.callback(mlflow.kill)
        postgres = undo.enter_context(postgres_server())
        s3, ministack = undo.enter_context(ministack_server(tmp_path_factory.mktemp("ministack")))
        proxy = undo.enter_context(refusing_proxy(s3.endpoint_url))
        servers = {"MLflow": mlflow, "Postgres": postgres, "S3 server": ministack}
        service = Matrix(folder, proxy, servers)
        settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        settings["storage"] = s3.place().model_dump(exclude_none=True) | {"endpoint_url": proxy.endpoint_url}
        settings["database_url"] = postgres.url
        settings["mlflow"] = {"tracking_uri": mlflow.url}
        # Tasks of earlier rows keep their scores: only what a row is about is scored.
        settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0, "drift_min": 100.0}
        settings["workers"] |= {"count": 1, "ranks": 2, "heartbeat_seconds": 0.3}
        (service.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        mlflow.wait()
        try:
            assert "onebasis is up:" in service.say("up", "--config", "settings.yaml")
            yield service
        finally:
            proxy.mood = Mood.WELL
            service.run("down")
            left = [p.info for p in psutil.process_iter(["cmdline"]) if str(service.folder) in str(p.info["cmdline"])]
            assert left == []


BUDGETS = ("worker_deaths", "lost_machines")
NO, DEATH, PERHAPS = ((0, 0),), ((1, 0),), ((0, 0), (0, 1))
KILLS = [
    # what, the alarm or the word that tells of it, what the task that trains may pay, by `BUDGETS`
    ("control plane", ("onebasis is down",), NO),
    ("GangActor", (), DEATH),
    ("WorkerActor", (), DEATH),
    ("StoreActor", (), NO),
    # The control plane may see the loss before `up` ends it, or not: then the order is given again.
    ("raylet", ("ray-down",), PERHAPS),
    ("gcs_server", ("ray-down",), PERHAPS),
    ("Ray head", ("ray-down", "onebasis is down"), PERHAPS),
    ("MLflow", ("mlflow-behind",), NO),
    ("Postgres", ("database-away",), NO),
    ("S3 server", ("store-away",), NO),
]
WITH_THE_HEAD = ("raylet", "gcs_server")
"""Parts of the Ray head, with which they end: by themselves they are killed by `make test-kills` alone."""


def as_name(part: str) -> str:
    """A part, as what a task may be called."""
    return part.replace(" ", "-").replace("_", "-").lower()


def rows(by_themselves: Collection[str]) -> list[Any]:
    """The table, of which these parts are killed by `make test-kills` alone."""
    return [
        pytest.param(*row, id=as_name(row[0]), marks=[pytest.mark.stops] if row[0] in by_themselves else [])
        for row in KILLS
    ]


@pytest.fixture(scope="module")
def undisturbed(service: Matrix) -> dict[str, dict[str, Any]]:
    """State in which a task was when nothing was killed, to what became of it."""
    return {state: outcome(task) for state, task in service.let_go(service.in_each("nothing")).items()}


@pytest.mark.parametrize(("part", "told", "may_pay"), rows(WITH_THE_HEAD))
def test_what_is_killed_with_a_task_in_each_state_changes_nothing_of_what_becomes_of_them(
    service: Matrix,
    undisturbed: dict[str, dict[str, Any]],
    part: str,
    told: tuple[str, ...],
    may_pay: tuple[tuple[int, int], ...],
) -> None:
    titles = service.in_each(as_name(part))
    service.kill(part, told)
    tasks = service.let_go(titles)
    assert merged_once(service, *titles.values())
    assert service.status()["main"] == service.status()["candidate"]
    paid = tuple(tasks["training"]["training"][budget] for budget in BUDGETS)
    assert paid in may_pay
    found = {state: outcome(task, paid if state == "training" else (0, 0)) for state, task in tasks.items()}
    assert found == undisturbed


WITHOUT_REFINING = {row[0] for row in KILLS} - {"control plane", "GangActor", "StoreActor"}
"""What has no part in a refinement of its own: during one it is killed by `make test-kills` alone."""


@pytest.fixture(scope="module")
def undisturbed_refinement(service: Matrix) -> dict[str, Any]:
    """What becomes of a task that is refined while nothing is killed."""
    return refined_outcome(service, service.in_refining("nothing"))


@pytest.mark.parametrize(("part", "told", "may_pay"), rows(WITHOUT_REFINING))
def test_what_is_killed_while_a_task_is_refined_changes_nothing_of_what_becomes_of_it(
    service: Matrix,
    undisturbed_refinement: dict[str, Any],
    part: str,
    told: tuple[str, ...],
    may_pay: tuple[tuple[int, int], ...],
) -> None:
    title = service.in_refining(as_name(part))
    service.kill(part, told)
    service.wait_for_state(title, "published", "parked")
    training = service.task(title)["training"]
    paid = tuple(training[budget] for budget in BUDGETS)
    assert paid in may_pay
    assert refined_outcome(service, title, paid) == undisturbed_refinement


def refined_outcome(service: Matrix, title: str, paid: Sequence[int] = (0, 0)) -> dict[str, Any]:
    """What became of a task that was refined, with the versions that it is in."""
    task = service.wait_for_state(title, "published", "parked")
    versions = [version for version in service.look(ListVersions()) if version["status"] == "published"]
    return outcome(task, paid) | {
        "attempts": task["attempt"],  # of trainings: a refinement that goes on counts none
        "score in main": task["main_score"],
        "unrefined": task["training"]["unrefined"],
        "added": [title in version["added"] for version in versions].count(True),
        "refined": [title in version["refined"] for version in versions].count(True),
    }


def outcome(task: dict[str, Any], paid: Sequence[int] = (0, 0)) -> dict[str, Any]:
    """What became of a task. paid: Attempts that what was killed has cost it, by `BUDGETS`, which are left out."""
    training = task["training"]
    return {
        "state": task["state"],
        "score": task["local_score"],
        "steps": training["steps"],
        "attempts": task["attempt"] - sum(paid),
        **{budget: training[budget] - count for budget, count in zip(BUDGETS, paid, strict=True)},
        "own_bugs": training["own_bugs"],
        "preemptions": training["preemptions"],
        "merged": [event["kind"] for event in task["events"]].count("Merged"),
        "judged": [event["kind"] for event in task["events"]].count("Judged"),
    }


STOPS = [
    ("control plane", ("is stopped",)),
    ("GangActor", ("worker-silent",)),
    ("WorkerActor", ("worker-silent",)),
    ("StoreActor", ("store-writer-silent",)),
    ("raylet", ("ray-down",)),
    ("gcs_server", ("ray-down",)),
    ("Ray head", ("ray-down",)),
]


@pytest.mark.stops
@pytest.mark.parametrize(("part", "told"), STOPS, ids=[as_name(part) for part, _ in STOPS])
def test_a_process_that_stands_still_is_told_of_and_up_mends_it_while_a_task_trains(
    service: Matrix, part: str, told: tuple[str, ...]
) -> None:
    title = service.submit(f"stopped-{as_name(part)}", steps=5000)
    service.wait("training", lambda: service.step_in("training", title) >= 2)
    step = service.step_in("training", title)
    pid = service.pid(part)
    os.kill(pid, STOP)
    said = service.alarm(*told)
    assert "onebasis up" in said
    assert "ALARM" in said or "error:" in said
    service.say("task", title, expect=None)
    said = service.say("up")
    assert "onebasis is up:" in said  # and not `up, with 1 alarm`
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    service.wait("the alarms to end", service.is_well, 180)
    service.wait("the task to go on", lambda: service.step_in("training", title) > step + 2)
    service.run("cancel", title)
    service.wait_for_state(title, "cancelled")


@pytest.mark.stops
def test_while_each_write_takes_seconds_nobody_waits_silently_and_the_task_is_published(service: Matrix) -> None:
    service.proxy.mood = Mood.LATE
    try:
        service.say("submit", str(service.task_file("late-writes", steps=4)))
        service.say("store", "hold", "why", expect=None)
        service.say("store", "release", expect=None)
        service.say("status")
        service.wait_for_state("payments/late-writes", "published", seconds=300)
        assert merged_once(service, "payments/late-writes")
    finally:
        service.proxy.mood = Mood.WELL
    service.wait("the alarms to end", service.is_well, 180)


@pytest.mark.stops
def test_everything_killed_at_once_is_started_again_and_the_task_goes_on(service: Matrix) -> None:
    service.run("submit", str(service.task_file("everything", steps=30)))
    service.wait("training", lambda: service.task("payments/everything")["state"] == "training")
    for process in [
        psutil.Process(service.pid("control plane")),
        psutil.Process(service.pid("Ray head")),
        *psutil.Process(service.pid("Ray head")).children(recursive=True),
    ]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert "onebasis is down" in service.say("status", expect=10)
    assert "onebasis is up:" in service.say("up")
    service.wait_for_state("payments/everything", "published")
    assert merged_once(service, "payments/everything")


@pytest.mark.stops
@pytest.mark.parametrize(("mood", "code"), [(Mood.FULL, "store-full"), (Mood.READ_ONLY, "store-read-only")])
def test_what_is_trained_waits_for_a_store_that_takes_nothing(service: Matrix, mood: Mood, code: str) -> None:
    name = f"meets-a-{mood}-store"
    service.run("submit", str(service.task_file(name, steps=4)))
    service.proxy.mood = mood
    try:
        said = service.alarm(code, seconds=60)
        assert f"docs/trouble.md#{code}" in said
        assert code in service.say("up")  # it runs, and does not say that all is well
        time.sleep(3)
        assert service.task(f"payments/{name}")["attempt"] <= 1
    finally:
        service.proxy.mood = Mood.WELL
    task = service.wait_for_state(f"payments/{name}", "published")
    assert task["attempt"] == 1
    assert [event["kind"] for event in task["events"]].count("Claimed") == 1
    service.wait("the alarm to end", service.is_well, 30)


@pytest.mark.stops
@pytest.mark.parametrize("mood", [Mood.AWAY, Mood.SLOW])
def test_a_store_that_does_not_answer_is_told_of_and_nobody_waits_silently(service: Matrix, mood: Mood) -> None:
    service.proxy.mood = mood
    try:
        said = service.alarm("store-away")
        assert "endpoint" in said or "no answer" in said or "s3://" in said
        service.say("versions", expect=None)
        service.say("rollback", "0", "--preview", expect=None)
    finally:
        service.proxy.mood = Mood.WELL
    service.wait("the alarm to end", service.is_well, 60)


def test_an_up_that_is_interrupted_leaves_nothing_running(tmp_path: Path) -> None:
    starting = subprocess.Popen(
        [ONEBASIS, "up"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )
    assert starting.stdout is not None
    said = b""
    while b"starting the control plane" not in said:
        said += starting.stdout.readline()
    until = time.monotonic() + 60
    while not (tmp_path / ".onebasis/ray.json").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    starting.send_signal(signal.SIGINT)
    said += starting.communicate(timeout=120)[0]
    assert starting.returncode == 130
    assert b"ending what was started" in said
    assert b"did not come up" not in said
    left = [p.info for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert left == []
