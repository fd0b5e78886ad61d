"""How a process ended is known to whoever watched it, although its parent ignores it as Ray's does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.process_monitor import ProcessEnd, ProcessMonitor, memory_limit, ray_verdict

TELLS = tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 15)
"""Whether this kernel tells the exit status of another's child."""


@pytest.fixture(autouse=True)
def ignored() -> Iterator[None]:
    """The kernel forgets children at once, as those of a raylet."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture(scope="module")
def monitor() -> ProcessMonitor:
    return ProcessMonitor()


def end(monitor: ProcessMonitor, code: str) -> ProcessEnd:
    """How a process ends that does this once it is watched."""
    process = subprocess.Popen([sys.executable, "-c", f"import os, time; input(); {code}"], stdin=subprocess.PIPE)
    monitor.watch(process.pid)
    process.communicate(b"\n")
    found = monitor.end_of(process.pid, 10.0)
    assert found is not None
    assert found.pid == process.pid
    return found


@pytest.mark.parametrize(
    ("code", "exit_code", "number", "told"),
    [
        ("os._exit(3)", 3, None, "it ended itself with exit code 3"),
        ("os._exit(0)", 0, None, "it ended itself with exit code 0"),
        ("os.kill(os.getpid(), 9)", None, 9, "it was ended by signal 9 (SIGKILL)"),
        ("os.abort()", None, 6, "it was ended by signal 6 (SIGABRT)"),
    ],
)
def test_an_exit_code_is_told_from_a_signal(
    monitor: ProcessMonitor, code: str, exit_code: int | None, number: int | None, told: str
) -> None:
    found = end(monitor, code)
    assert (found.exit_code, found.signal) == ((exit_code, number) if TELLS else (None, None))
    assert str(found).startswith(told if TELLS else "its exit code or signal is not known")
    assert found.is_its_own


def test_the_memory_that_it_had_is_told_with_the_limit(monitor: ProcessMonitor) -> None:
    found = end(monitor, "kept = b'x' * (200 << 20); time.sleep(1); os._exit(3)")
    assert 200 << 20 <= found.peak_bytes < 400 << 20
    assert (found.limit_bytes, found.limit_of) == memory_limit(os.getpid())
    assert f"; it had at least {found.peak_bytes / 2**30:.2f} GiB of the " in str(found)


def test_of_a_process_that_lives_there_is_no_end(monitor: ProcessMonitor) -> None:
    started = time.monotonic()
    monitor.watch(os.getpid())
    assert monitor.end_of(os.getpid(), 0.1) is None
    assert monitor.end_of(os.getppid(), 60.0) is None  # at once: nothing is waited for
    assert time.monotonic() - started < 30


def test_of_one_that_is_gone_and_was_not_watched_it_is_known_that_it_ended(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{gone.pid}").exists():
        time.sleep(0.01)
    assert ProcessMonitor().end_of(gone.pid, 60.0) == ProcessEnd(pid=gone.pid)
    log = tmp_path / "raylet.out"
    log.write_text(f"OOM kill reason: too much\nSelected to kill: (A, pid={gone.pid}, actual memory used=4.16GB)\n")
    end = ProcessMonitor(log).end_of(gone.pid, 60.0)
    assert str(end) == "memory ran out: Ray's memory monitor ended it (too much; it used 4.16 GB)"


def test_one_that_was_ended_for_memory_while_another_had_more_is_not_to_blame() -> None:
    facts = {"pid": 7, "signal": 9, "peak_bytes": 2**30, "out_of_memory": "the kernel ended it"}
    assert ProcessEnd(**facts).is_its_own
    small = ProcessEnd(**facts, is_largest=False)
    assert not small.is_its_own
    assert str(small) == (
        "memory ran out: the kernel ended it; it had at least 1.00 GiB; another worker of the machine had more"
    )
    assert ProcessEnd(pid=7, exit_code=3, is_largest=False).is_its_own


def test_the_verdict_of_rays_memory_monitor_is_read_from_the_raylets_log(tmp_path: Path) -> None:
    log = tmp_path / "raylet.out"
    log.write_text(
        "OOM kill reason: Memory usage 1B exceeded threshold of 0B\n"
        "Selected to kill: (Actor(1): task name=A.run, pid=66, actual memory used=4.16GB)\n"
        "OOM kill reason: Memory usage 6972481536B exceeded threshold of 6950834688B (27.5% of 25276502016B limit)\n"
        "Ray killed 1 worker(s) based on the killing policy\n"
        "Considered workers: [\n"
        "Selected to kill: (Actor(2): task name=A.run, pid=777, actual memory used=4.16GB, worker ID=1)\n"
        "Selected to kill: (Actor(3): task name=M.__init__, pid=778, actual memory used=0.06GB, worker ID=2)\n"
    )
    told = "(Memory usage 6972481536B exceeded threshold of 6950834688B (27.5% of 25276502016B limit); it used 4.16 GB)"
    assert ray_verdict(log, 777) == (f"Ray's memory monitor ended it {told}", True)
    assert ray_verdict(log, 778)[1] is False
    assert ray_verdict(log, 77) == ray_verdict(log, 7) == ray_verdict(tmp_path / "none", 777) == ("", True)
