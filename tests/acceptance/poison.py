"""Tasks that take their worker down, without a word about it in the program: a thread in each Ray worker of a test's
service looks whether the process trains a task with one of these names, and if it does, does what the name says.

Python imports `sitecustomize` from PYTHONPATH when it starts; the one that `written` makes starts the thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CGROUP = "POISON_CGROUP"
"""Environment variable with the memory cgroup that a process enters before it eats memory."""


def written(folder: Path) -> Path:
    """A folder for PYTHONPATH."""
    folder.mkdir()
    lines = ("import sys", f"sys.path.append({str(ROOT)!r})", "from tests.acceptance.poison import begin", "begin()")
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return folder


def begin() -> None:
    """In a Ray worker, look for ever; in any other process, nothing."""
    if b"default_worker.py" in Path("/proc/self/cmdline").read_bytes():
        threading.Thread(target=_look_for_ever, daemon=True).start()


def _look_for_ever() -> None:
    while True:
        time.sleep(0.05)
        kill = KILLS.get(_trained())
        if kill is not None:
            kill()


def _trained() -> str:
    """Name of the task whose optimisation steps this process does now; empty: none."""
    for frame in sys._current_frames().values():
        here: Any = frame
        is_stepping = False
        while here is not None:
            is_stepping |= here.f_code.co_name == "training_step"
            if here.f_code.co_name == "train_task" and is_stepping:
                return str(here.f_locals["order"].spec.name)
            here = here.f_back
    return ""


def _eat() -> None:
    if folder := os.environ.get(CGROUP):
        (Path(folder) / "cgroup.procs").write_text(str(os.getpid()))
    kept = []
    while True:
        kept.append(bytearray(b"x") * (32 << 20))
        time.sleep(0.02)


KILLS = {
    "exits": lambda: os._exit(3),
    "kills-itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "eats-memory": _eat,
}
