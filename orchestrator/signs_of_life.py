"""Whether processes of this machine live, stand still or are gone, and which of them belong to a state folder.

Only /proc is read (through psutil), so nothing here can hang on a process that does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from orchestrator.ray_head import ADDRESS_FILE, MODULE, TOKEN_FILE, TOKEN_VARIABLE
from subspace_store.commands.state_folder import SERVER_MODULE, process_of, running_server

CONTROL_PLANE = "control plane"
"""Title of its process."""


class Life(StrEnum):
    """What /proc says of a process."""

    RUNS = "runs"
    STOPPED = "is stopped (SIGSTOP, a debugger, or Ctrl-Z)"
    GONE = "is gone"


def life_of(pid: int) -> Life:
    """The state of a process; a zombie (ended, not yet reaped by its parent) counts as gone."""
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
    """Whether a process id is still the head's: it may be another process's by now."""
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return MODULE in command and str(state_dir) in command


def title_of(process: psutil.Process) -> str:
    """Name of a process for people: `ray::WorkerActor.run` is `WorkerActor`, a program is its file's name."""
    try:
        command = process.cmdline() or [process.name()]
    except psutil.Error:
        return "process"
    for module, title in ((SERVER_MODULE, CONTROL_PLANE), (MODULE, "Ray head")):
        if module in command:
            return title
    first = command[0].split(" ")[0]
    return first.removeprefix("ray::").partition(".")[0] if first.startswith("ray::") else Path(first).name


def ray_processes(state_dir: Path) -> list[psutil.Process]:
    """Ray's own processes that were given the token of a state folder: raylet, GCS, agents, workers; also those that
    have lost their parent.

    A process that a person starts from a shell with the same token is not one of them: it must also be a program of
    Ray's package, or have a title that Ray gave it.
    """
    wanted, found = str((state_dir / TOKEN_FILE).resolve()), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(TOKEN_VARIABLE) == wanted and _is_rays(process.cmdline()):
                found.append(process)
    return found


def left_behind(state_dir: Path) -> list[psutil.Process]:
    """Processes of a service whose state folder was at this path and is gone: deleted, or made anew. The files of the
    folder that is there name none of them."""
    folder = state_dir.resolve()
    server, head = running_server(folder), process_of(folder / ADDRESS_FILE, MODULE)
    found = [] if head is not None else ray_processes(folder)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            is_ours = str(folder) in command and (SERVER_MODULE in command or MODULE in command)
            if is_ours and process.pid not in (server, head) and life_of(process.pid) is not Life.GONE:
                found.append(process)
    return found


def _is_rays(command: list[str]) -> bool:
    spec = importlib.util.find_spec("ray")  # found, not imported: that takes a second
    package = f"{(spec.submodule_search_locations or [''])[0]}/" if spec else ""
    titled = bool(command) and command[0].startswith("ray::")
    return titled or (bool(package) and any(argument.startswith(package) for argument in command[:4]))


def children() -> list[psutil.Process]:
    """Processes that this process has started."""
    found: list[psutil.Process] = psutil.Process().children()
    return found


def stopped(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes that stand still."""
    return [process for process in processes if life_of(process.pid) is Life.STOPPED]


def end_now(processes: Iterable[psutil.Process], wait_seconds: float = 10.0) -> None:
    """SIGKILL, and wait until they are gone. psutil checks that an id still means the same process."""
    ended = list(processes)
    for process in ended:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(ended, timeout=wait_seconds)
