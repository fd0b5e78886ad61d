"""What is compiled before its first use: told of, ended when asked, done once, and no lock outlives its holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.workers.test_deepspeed_engine import OFFLOAD_OPTIMIZER, Tiny, zero
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_task
from workers import compiled_ops
from workers.compiled_ops import CompilationFailed, Interrupted, compile_first, interruption, python, watched
from workers.trainer import Cancelled

STAMP = "deepspeed 1, torch 2"


class Listener:
    """Somebody who reads what is said, and may want it to stop."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stop_at = ""

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stop(self) -> None:
        if self.stop_at and any(self.stop_at in line for line in self.lines):
            raise Cancelled


@pytest.fixture
def listener() -> Listener:
    return Listener()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def counting(folder: Path) -> list[str]:
    """A compiler that notes each time it is called."""
    return python(f"open({str(folder / 'calls')!r}, 'a').write('x')")


def test_it_is_compiled_once_for_each_release_and_told_of(tmp_path: Path, listener: Listener) -> None:
    with watched(listener.say, listener.stop):
        for stamp in (STAMP, STAMP, "deepspeed 2, torch 2", "deepspeed 2, torch 2"):
            compile_first("cpu_adam", tmp_path / "op", stamp, counting(tmp_path))
    assert (tmp_path / "calls").read_text() == "xx"
    assert listener.lines[0] == "compiles DeepSpeed's cpu_adam, once on this machine; this takes minutes"
    assert listener.lines[1] == "compiled DeepSpeed's cpu_adam in 0 s" or "in 1 s" in listener.lines[1]
    assert len(listener.lines) == 4


def test_who_hears_nothing_may_compile_as_well(tmp_path: Path) -> None:
    compile_first("cpu_adam", tmp_path / "op", STAMP, counting(tmp_path))
    assert (tmp_path / "calls").read_text() == "x"


def test_a_compilation_that_takes_long_says_so_again(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_ops, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(compiled_ops, "TOLD_EVERY_SECONDS", 0.1)
    with watched(listener.say, listener.stop):
        compile_first("cpu_adam", tmp_path, STAMP, python("import time; time.sleep(1)"))
    assert sum("still compiles DeepSpeed's cpu_adam" in line for line in listener.lines) >= 2


def test_a_task_that_is_cancelled_ends_the_compiler_and_all_that_it_started(tmp_path: Path, listener: Listener) -> None:
    nested = python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    listener.stop_at = "compiles"
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught, watched(listener.say, listener.stop):
        compile_first("cpu_adam", tmp_path, STAMP, nested)
    assert time.monotonic() - started < 10
    assert isinstance(interruption(caught.value), Cancelled)
    assert not [child for child in children() if "time.sleep(60)" in " ".join(child.cmdline())]
    compile_first("cpu_adam", tmp_path, STAMP, counting(tmp_path))  # and the next one need not wait
    assert (tmp_path / "calls").exists()


def test_a_lock_that_a_killed_process_left_behind_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "op/lock").touch()  # as torch's, of a process that was killed
    waits_for_torch = python(f"import os, time\nwhile os.path.exists({str(tmp_path / 'op/lock')!r}): time.sleep(0.05)")
    compile_first("cpu_adam", tmp_path / "op", STAMP, waits_for_torch)


def test_a_lock_of_torchs_that_somebody_holds_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    with (tmp_path / "op/lock").open("wb"):
        compile_first("cpu_adam", tmp_path / "op", STAMP, counting(tmp_path))
        assert (tmp_path / "op/lock").exists()


def test_another_process_that_compiles_is_waited_for_even_when_its_worker_was_killed(
    tmp_path: Path, listener: Listener
) -> None:
    slow = python(f"import time; time.sleep(3); open({str(tmp_path / 'calls')!r}, 'a').write('x')")
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from workers.compiled_ops import compile_first\n"
            f"compile_first('cpu_adam', Path({str(tmp_path / 'op')!r}), {STAMP!r}, {slow!r})",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    held = tmp_path / "op/onebasis-lock"
    deadline = time.monotonic() + 30
    while not (held.exists() and psutil.Process(worker.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    with watched(listener.say, listener.stop):
        compile_first("cpu_adam", tmp_path / "op", STAMP, counting(tmp_path))
    assert listener.lines[0] == "waits for another process of this machine that compiles DeepSpeed's cpu_adam"
    assert (tmp_path / "calls").read_text() == "xx"  # the first's result was stamped by nobody, so it is made sure of


def test_what_a_compiler_said_when_it_refused_is_in_the_error(tmp_path: Path) -> None:
    refuses = python("import sys; print('no such header: <x.h>'); sys.exit(1)")
    with pytest.raises(CompilationFailed, match=r"Error building extension 'cpu_adam': no such header: <x\.h>"):
        compile_first("cpu_adam", tmp_path, STAMP, refuses)
    assert not (tmp_path / "onebasis-compiled").exists()


@pytest.mark.filterwarnings("ignore:.torch.distributed.* is deprecated:FutureWarning")
def test_a_task_whose_optimizer_deepspeed_compiles_says_so_and_can_be_cancelled_meanwhile(
    tmp_path: Path, request: pytest.FixtureRequest, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's own Adam, as its users write it, on a machine that has not compiled it yet.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = zero(2, **OFFLOAD_OPTIMIZER) | {"zero_force_ds_cpu_optimizer": True}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    desk = Desk(request.node.name)

    def asked() -> str:
        said = [line for heartbeat in desk.heartbeats for line in heartbeat.log_lines if isinstance(line, str)]
        return "cancel" if any("compiles DeepSpeed's cpu_adam" in line for line in said) else ""

    monkeypatch.setattr(desk, "_asked", asked)
    base = tiny("bert")
    before = {child.pid for child in children()}
    with pytest.raises(Cancelled):
        desk.train(base, sentiment_task(training={"deepspeed": config}))
    assert desk.heartbeats[-1].phase == "loading"
    assert {child.pid for child in children()} <= before
    desk.heartbeats.clear()
    assert desk.train(base, sentiment_task()).steps == 3  # the worker is as good as before
