"""Whether processes of this machine live, stand still or are gone, and which of them belong to a state folder.

Only /proc is read (through psutil), so nothing here can hang on a process that does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from orchestrator.ray_head import ADDRESS_FILE, MODULE, TOKEN_FILE, TOKEN_VARIABLE


class Life(StrEnum):
    """What /proc says of a process."""

    RUNS = "runs"
    STOPPED = "is stopped (SIGSTOP, a debugger, or Ctrl-Z)"
    GONE = "is gone"


def life_of(pid: int) -> Life:
    """A process that has ended and whose parent has not looked yet is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return Life.GONE
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return Life.GONE
    return Life.STOPPED if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else Life.RUNS


def ray_trouble(state_dir: Path) -> str:
    """What is wrong with the processes of this machine's Ray; empty while all of them run."""
    facts: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((state_dir / ADDRESS_FILE).read_text())
    if not _is_head(facts.get("pid", 0), state_dir):
        return str(facts.get("ended") or "its head is gone")
    for name, pid in {"head": facts["pid"], **facts.get("parts", {})}.items():
        if (life := life_of(pid)) is not Life.RUNS:
            return f"its {name} (pid {pid}) {life}"
    return ""


def _is_head(pid: int, state_dir: Path) -> bool:
    """A number may be another process's by now."""
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return MODULE in command and str(state_dir) in command


def title_of(process: psutil.Process) -> str:
    """Name of a process for people: `ray::WorkerActor.run` is `WorkerActor`, a program is its file's name."""
    try:
        first = (process.cmdline() or [process.name()])[0].split(" ")[0]
    except psutil.Error:
        return "process"
    return first.removeprefix("ray::").partition(".")[0] if first.startswith("ray::") else Path(first).name


def ray_processes(state_dir: Path) -> list[psutil.Process]:
    """Processes of the Ray of a state folder: those that were given its token. The head and the control plane, which
    have it too, are Python modules of ours and are not among them; what has lost its parent is.
    """
    wanted, found = str((state_dir / TOKEN_FILE).resolve()), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(TOKEN_VARIABLE) == wanted and not _is_ours(process.cmdline()):
                found.append(process)
    return found


def children() -> list[psutil.Process]:
    """Those that this process has started."""
    found: list[psutil.Process] = psutil.Process().children()
    return found


def _is_ours(command: list[str]) -> bool:
    return "orchestrator.api.server" in command or MODULE in command


def stopped(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that stand still."""
    return [process for process in processes if life_of(process.pid) is Life.STOPPED]


def end_now(processes: Iterable[psutil.Process], wait_seconds: float = 10.0) -> None:
    """SIGKILL, and wait until they are gone. psutil looks whether a number still means the same process."""
    ended = list(processes)
    for process in ended:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(ended, timeout=wait_seconds)
