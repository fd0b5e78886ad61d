"""Whatever dies, hangs or fills up, people are told within seconds what it is, and `onebasis up` mends it.

One service with its store behind a proxy goes through it all. Nothing hangs silently for longer than ten seconds, and
nothing says that all is well when it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from tests.acceptance.conftest import ONEBASIS, ROOT, Site, merged_once
from tests.moto_server import CREDENTIALS, moto_server
from tests.servers.refusing_proxy import Mood, RefusingProxy, refusing_proxy

SILENT_SECONDS = 10.0
"""Nobody looks longer at a terminal that says nothing."""


def patience() -> float:
    """The same on a machine that has other work: there a command waits for its CPU before it says its first word."""
    return SILENT_SECONDS * max(1.0, os.getloadavg()[0] / (3 * (os.cpu_count() or 1)))


KILL, STOP = signal.SIGKILL, signal.SIGSTOP


class Matrix(Site):
    """A service whose processes and store are broken one after another."""

    def __init__(self, folder: Path, proxy: RefusingProxy) -> None:
        super().__init__(folder)
        self.proxy = proxy

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

    def is_well(self) -> bool:
        answer = self.status()
        return bool(answer["running"] and answer["workers_ready"] == 1 and not answer["alarms"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """One worker of two ranks, and a store on S3."""
    with (
        pytest.MonkeyPatch.context() as patch,
        moto_server("bucket", **CREDENTIALS) as url,
        refusing_proxy(url) as proxy,
    ):
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        service = Matrix(tmp_path_factory.mktemp("matrix"), proxy)
        settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        settings["storage"] = {"url": "s3://bucket/here", "endpoint_url": proxy.endpoint_url, "region": "us-east-1"}
        settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
        settings["workers"] |= {"count": 1, "ranks": 2, "heartbeat_seconds": 0.3}
        (service.folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        try:
            assert "onebasis is up:" in service.say("up", "--config", "settings.yaml")
            yield service
        finally:
            proxy.mood = Mood.WELL
            service.run("down")
            left = [p.info for p in psutil.process_iter(["cmdline"]) if str(service.folder) in str(p.info["cmdline"])]
            assert left == []


MATRIX = [
    ("control plane", KILL, ("onebasis is down",)),
    ("control plane", STOP, ("is stopped",)),
    ("GangActor", KILL, ()),
    ("GangActor", STOP, ("worker-silent",)),
    ("WorkerActor", KILL, ()),
    ("WorkerActor", STOP, ("worker-silent",)),
    ("StoreActor", KILL, ()),
    ("StoreActor", STOP, ("store-writer-silent",)),
    ("raylet", KILL, ("ray-down",)),
    ("raylet", STOP, ("ray-down",)),
    ("gcs_server", KILL, ("ray-down",)),
    ("gcs_server", STOP, ("ray-down",)),
    ("Ray head", KILL, ("ray-down", "onebasis is down")),
    ("Ray head", STOP, ("ray-down",)),
]


@pytest.mark.kills
@pytest.mark.parametrize(("part", "how", "told"), MATRIX, ids=lambda value: str(getattr(value, "name", value)))
def test_a_process_that_dies_or_hangs_is_told_of_and_up_mends_it(
    service: Matrix, part: str, how: signal.Signals, told: tuple[str, ...]
) -> None:
    pid = service.pid(part)
    os.kill(pid, how)
    if told:
        said = service.alarm(*told)
        assert "onebasis up" in said
        assert "ALARM" in said or "error:" in said or "onebasis is down" in said
    service.say("tasks", expect=None)
    said = service.say("up")
    assert "onebasis is up:" in said  # and not `up, with 1 alarm`
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert service.is_well()


@pytest.mark.kills
@pytest.mark.parametrize("part", ["raylet", "Ray head"])
def test_a_ray_that_stands_still_while_a_task_trains_is_told_of_and_the_task_goes_on(
    service: Matrix, part: str
) -> None:
    title = f"payments/under-load-{part.replace(' ', '-').lower()}"
    service.run("submit", str(service.task_file(title.partition("/")[2], steps=200)))
    service.wait("training", lambda: service.task(title)["state"] == "training")
    os.kill(service.pid(part), STOP)
    said = service.alarm("ray-down")
    assert "is stopped" in said
    assert "docs/trouble.md#ray-down" in said
    service.say("task", title)
    assert "onebasis is up:" in service.say("up")
    service.wait_for_state(title, "published")
    assert merged_once(service, title)


@pytest.mark.kills
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
    service.wait("the alarms to end", service.is_well, 60)


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


@pytest.mark.kills
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


@pytest.mark.kills
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
