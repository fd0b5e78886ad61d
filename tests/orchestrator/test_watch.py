"""What gives no sign of life is told of within seconds, whatever the thread that should have given it hangs in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import watch
from orchestrator.alarms import Alarms
from orchestrator.ray_head import ADDRESS_FILE, MODULE, TOKEN_VARIABLE
from orchestrator.signs_of_life import Life, end_now, life_of, ray_processes, ray_trouble, stopped
from orchestrator.watch import Pulse, Watch


@dataclass
class Loop:
    turned_at: float = 1000.0
    doing: str = "reading the version log"


@dataclass
class Mirror:
    error: str = ""
    working_since: float = 0.0


def rung(alarms: Alarms) -> dict[str, str]:
    return {str(alarm.code): alarm.what for alarm in alarms}


def test_a_loop_that_stands_still_is_told_of_with_what_it_does_and_forgotten_when_it_turns() -> None:
    alarms, loop = Alarms(), Loop()
    looker = Watch(alarms, loop, Mirror(), Mirror(), str, None)
    looker.look(1000.0 + watch.SILENT_SECONDS)
    assert rung(alarms) == {}
    looker.look(1001.0 + watch.SILENT_SECONDS)
    assert "while it is reading the version log" in rung(alarms)["loop-silent"]
    loop.turned_at = 1001.0 + watch.SILENT_SECONDS
    looker.look(1001.0 + watch.SILENT_SECONDS)
    assert rung(alarms) == {}


def test_a_ray_that_is_down_is_one_alarm_although_the_loop_waits_for_it() -> None:
    alarms = Alarms()
    Watch(alarms, Loop(), Mirror(), Mirror(), lambda: "its raylet (pid 7) is gone", None).look(2000.0)
    assert rung(alarms) == {"ray-down": "Ray does not work: its raylet (pid 7) is gone"}


@pytest.mark.parametrize(("code", "other"), [("mlflow-behind", "traces"), ("traces-behind", "MLflow")])
def test_a_mirror_that_fails_or_takes_for_ever_is_told_of(code: str, other: str) -> None:
    alarms, mirror = Alarms(), Mirror(error="MlflowException: experiment 1 is gone")
    both = (mirror, Mirror()) if other == "traces" else (Mirror(), mirror)
    looker = Watch(alarms, Loop(), *both, str, None)
    looker.look(1000.0)
    assert "not show everything: MlflowException: experiment 1 is gone" in rung(alarms)[code]
    mirror.error, mirror.working_since = "", 1000.0 - watch.MIRROR_SECONDS - 1
    looker.look(1000.0)
    assert list(rung(alarms)) == [code]
    assert "not take what there is" in rung(alarms)[code]
    mirror.working_since = 0.0
    looker.look(1000.0)
    assert rung(alarms) == {}


def test_a_question_that_is_never_answered_is_seen_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.05)
    stop, answered = threading.Event(), threading.Event()
    pulse = Pulse(lambda: answered.wait(60), every_seconds=0.01)
    asking = threading.Thread(target=pulse.run, args=(stop,))
    asking.start()
    alarms = Alarms()
    looker = Watch(alarms, Loop(), Mirror(), Mirror(), str, pulse)
    time.sleep(0.1)
    looker.look(1000.0)
    assert rung(alarms) == {"ray-down": "Ray does not work: its GCS does not answer"}
    answered.set()
    stop.set()
    asking.join(10)
    looker.look(1000.0)
    assert rung(alarms) == {}


# --- processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like this folder's Ray head, with a child as its raylet, both with the folder's token."""
    code = (
        "import subprocess; c = subprocess.Popen(['ray::IDLE', '60'], executable='/bin/sleep'); print(c.pid); c.wait()"
    )
    environment = os.environ | {TOKEN_VARIABLE: str((tmp_path / "ray_token").resolve())}
    command = [sys.executable, "-u", "-c", code, MODULE, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    parts = {"raylet": int(process.stdout.readline())}
    (tmp_path / ADDRESS_FILE).write_text(json.dumps({"address": "here:1", "pid": process.pid, "parts": parts}))
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    end_now(ray_processes(tmp_path))


def raylet_of(folder: Path) -> int:
    return int(json.loads((folder / ADDRESS_FILE).read_text())["parts"]["raylet"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_raylet_that_is_gone_or_stands_still_is_named_with_its_process_id(
    tmp_path: Path, head: subprocess.Popen[bytes], how: signal.Signals
) -> None:
    raylet = raylet_of(tmp_path)
    assert ray_trouble(tmp_path) == ""
    os.kill(raylet, how)
    until = time.monotonic() + 10
    while not (said := ray_trouble(tmp_path)):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert f"(pid {raylet})" in said or "its head" in said
    assert ("is stopped" in said) == (how is signal.SIGSTOP)


def test_a_head_of_another_folder_under_the_same_number_is_not_this_ones(
    tmp_path: Path, head: subprocess.Popen[bytes]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / ADDRESS_FILE).write_text((tmp_path / ADDRESS_FILE).read_text())
    assert ray_trouble(other) == "its head is gone"
    assert ray_processes(other) == []


def test_what_lost_its_parent_and_stands_still_is_found_by_its_token_and_ended(
    tmp_path: Path, head: subprocess.Popen[bytes]
) -> None:
    raylet = raylet_of(tmp_path)
    os.kill(raylet, signal.SIGSTOP)
    head.kill()
    head.wait()
    while life_of(raylet) is not Life.STOPPED:
        time.sleep(0.01)
    somebodys = subprocess.Popen(  # an editor, from a shell that exported the token to ask this Ray something
        ["/bin/sleep", "60"], env=os.environ | {TOKEN_VARIABLE: str((tmp_path / "ray_token").resolve())}
    )
    assert [process.pid for process in stopped(ray_processes(tmp_path))] == [raylet]
    end_now(ray_processes(tmp_path))
    assert life_of(raylet) is Life.GONE
    assert life_of(somebodys.pid) is Life.RUNS
    somebodys.kill()
    somebodys.wait()
