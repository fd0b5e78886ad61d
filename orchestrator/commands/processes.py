"""Starting and ending the service's own processes on this machine: the Ray head and the control plane.

Only processes that this state folder names are ever ended, and only after a look at what they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from configs.errors import Conflict, InvalidInput, Unavailable, error_from_dict
from configs.settings import Settings
from orchestrator.api.client import Client, server_facts
from orchestrator.api.requests import Status
from orchestrator.ray_head import ADDRESS_FILE, TOKEN_FILE, ray_environment
from subspace_store.commands.state_folder import (
    make_private,
    open_private,
    process_of,
    running_server,
    service_identity,
)
from subspace_store.log.store_format import check_place
from subspace_store.log.version_log import VersionLog, owned_by_another
from subspace_store.storage.opening import open_storage

START_SECONDS = 180.0
TRY_AGAIN = "mend what it says, then `onebasis up` again"
STOP_SECONDS = 150.0
"""Before the control plane ends, what trains may write a checkpoint, and MLflow be brought up to date once more."""

Say = Callable[[str], None]


def up(settings: Settings, say: Say, take_over: bool = False) -> dict[str, Any]:
    """Start what is not running; safe to repeat, also after a kill -9 of anything.

    Args:
        take_over: Make the store this service's, whoever's it is: the other service stops.

    Returns:
        The service's status, with every worker warm.

    Raises:
        Conflict: It runs with other settings.
        UnusableStore: The store belongs to another base model, or lies where two writers overwrite each other.
        OwnedByAnother: The store belongs to another service.
        Unavailable: Something did not start; quotes the end of its log.
    """
    state_dir = Path(settings.state_dir)
    _prepare(settings, state_dir)
    with _alone(state_dir, say):
        if running_server(state_dir) is None:
            _own_the_store(settings, state_dir, take_over, say)
        _start_what_is_missing(settings, state_dir, say)
    return _wait_for_workers(settings, state_dir, say)


def _prepare(settings: Settings, state_dir: Path) -> None:
    """Make what the service writes to, for its owner alone: settings, databases and logs may tell a password."""
    for folder in (state_dir, state_dir / "logs"):
        make_private(folder)
    with open_private(state_dir / ".gitignore", "w") as file:
        file.write("*\n")
    for url in (settings.database_url, settings.mlflow.tracking_uri):
        database = Path(url.partition(":///")[2].partition("?")[0])
        if url.startswith("sqlite") and database.parent.is_dir():
            open_private(database, "a").close()  # SQLite gives its other files the rights of this one


def _own_the_store(settings: Settings, state_dir: Path, take_over: bool, say: Say) -> None:
    """Refuse a place that cannot hold this service's store, and a store of another service, before anything is started;
    or take that over."""
    storage = open_storage(settings.storage, settings.base_model.name)
    check_place(storage, settings.base_model.name, settings.base_model.weights_sha256)
    log = VersionLog(storage)
    owner, service = log.open().owner, service_identity(state_dir)
    if owner is None or not owner.is_another_than(service):
        return
    if not take_over:
        raise owned_by_another(owner, storage.url)
    say(f"taking the store over from {owner.name}, which stops at its next write")
    writer = VersionLog(storage, f"up of {service.name}")
    writer.open()
    writer.acquire(service.name, service, claim=True, force=True)


@contextlib.contextmanager
def _alone(state_dir: Path, say: Say) -> Iterator[None]:
    """One `up` or `down` at a time: two that start at once would start two clusters, and one would never end."""
    with open_private(state_dir / "up.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another `onebasis up` or `down` here to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_what_is_missing(settings: Settings, state_dir: Path, say: Say) -> None:
    running = running_server(state_dir)
    if running is not None and settings.ray.address == "local" and _running_ray(state_dir) is None:
        say("Ray is gone: starting it and the control plane again")
        os.kill(running, signal.SIGKILL)  # asked politely it would wait for the cluster that is not there
        _await_end(running)
        running = None
    if running is None:
        _refuse_taken_port(settings)
        _end_ray_of_other_settings(settings, state_dir, say)
    _keep_settings(settings, state_dir, running is not None)
    if running is None:
        head = _start_ray(settings, state_dir, say) if settings.ray.address == "local" else None
        say("starting the control plane")
        (state_dir / "server.json").unlink(missing_ok=True)
        # Beside Ray, not after it: its imports take as long as Ray's start, and it waits for Ray's address itself.
        command = [sys.executable, "-m", "orchestrator.api.server", str(state_dir)]
        server = _start(command, state_dir, "control-plane.log", _umask(settings))
        if head is not None:
            _wait(lambda: (state_dir / ADDRESS_FILE).exists(), head, state_dir / "logs/ray.log", "Ray")
        _wait(
            lambda: server_facts(state_dir) is not None, server, state_dir / "logs/control-plane.log", "control plane"
        )


def down(state_dir: Path, say: Say) -> bool:
    """End the control plane and a local Ray. What trains writes a checkpoint first, and goes on from it at the next
    `up`.

    Returns:
        False when nothing was running.
    """
    if not state_dir.exists():
        return False
    with _alone(state_dir, say):
        return _end_what_runs(state_dir, say)


def _end_what_runs(state_dir: Path, say: Say) -> bool:
    ended = False
    for name, module, file in (
        ("control plane", "orchestrator.api.server", "server.json"),
        ("Ray cluster", "orchestrator.ray_head", ADDRESS_FILE),
    ):
        pid = process_of(state_dir / file, module)
        if pid is not None:
            say(f"ending the {name}" + ("; what trains writes a checkpoint" if file == "server.json" else ""))
            _end(pid)
            ended = True
        (state_dir / file).unlink(missing_ok=True)
    return ended


def _start_ray(settings: Settings, state_dir: Path, say: Say) -> subprocess.Popen[bytes] | None:
    """The starting head; None when one runs."""
    if _running_ray(state_dir) is not None:
        return None
    say("starting Ray on this machine")
    (state_dir / ADDRESS_FILE).unlink(missing_ok=True)
    workers = settings.workers
    cpus = max(os.cpu_count() or 1, math.ceil(workers.count * workers.ranks * workers.cpus))
    command = [sys.executable, "-m", "orchestrator.ray_head", str(state_dir), str(cpus)]
    return _start(command, state_dir, "ray.log", _umask(settings))


def _umask(settings: Settings) -> int:
    """What others may not do with the service's files: anything. But a store in a folder of its own is for whom the
    person lets read it, as their umask (-1) says."""
    kind, _, folder = settings.storage.url.partition(":")
    is_elsewhere = kind == "file" and not Path(folder).is_relative_to(settings.state_dir)
    return -1 if is_elsewhere else 0o077


def _start(command: list[str], state_dir: Path, log_name: str, umask: int) -> subprocess.Popen[bytes]:
    """A process of its own session: Ctrl-C in the terminal that started it does not reach it."""
    with open_private(state_dir / "logs" / log_name, "a") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=umask,
            env=os.environ | ray_environment(state_dir / TOKEN_FILE),
        )


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, name: str) -> None:
    until = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise Unavailable(f"the {name} did not start; its log ends with\n  {_end_of(log)}", str(log), TRY_AGAIN)
        time.sleep(0.05)


def _end_of(log: Path) -> str:
    return "\n  ".join(log.read_text(errors="replace").splitlines()[-12:])


def _refuse_taken_port(settings: Settings) -> None:
    host, port = settings.server.host, settings.server.port
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {host}:{port}: {error.strerror}", "server", "set server.port to another one, or to 0"
        ) from error


def _wait_for_workers(settings: Settings, state_dir: Path, say: Say) -> dict[str, Any]:
    until = time.monotonic() + START_SECONDS
    client, said = Client(state_dir), ""
    while True:
        status: dict[str, Any] = client.ask(Status())
        ready, all_workers = status.get("workers_ready", 0), settings.workers.count
        if status.get("store_error"):
            raise error_from_dict(status["store_error"])
        if ready == all_workers and status.get("store_is_open", True):
            return status
        if not status["running"]:
            log = state_dir / "logs/control-plane.log"
            raise Unavailable(f"the control plane ended; its log ends with\n  {_end_of(log)}", str(log), TRY_AGAIN)
        workers = "1 worker" if all_workers == 1 else f"{all_workers} workers"
        if said != (said := f"loading the base model on {workers} ({ready} warm)"):
            say(said)
        broken = [error_from_dict(error) for error in status.get("load_errors", {}).values()]
        if broken or time.monotonic() > until:
            raise Unavailable(
                str(broken[0]) if broken else f"{ready} of {all_workers} workers are warm after {START_SECONDS:.0f} s",
                todo=f"see {state_dir / 'logs/control-plane.log'}; `onebasis down` ends what runs",
            )
        time.sleep(0.1)


def _keep_settings(settings: Settings, state_dir: Path, is_running: bool) -> None:
    """Write the settings beside what they made, so that later commands need no option."""
    text, file = _as_text(settings), state_dir / "settings.yaml"
    if is_running and file.read_text() != text:
        raise Conflict("the service runs with other settings", str(file), "`onebasis down`, then `onebasis up` again")
    with open_private(file, "w") as kept:
        kept.write(text)


def _end_ray_of_other_settings(settings: Settings, state_dir: Path, say: Say) -> None:
    """A Ray that outlived a killed control plane holds a store and workers with the settings of then."""
    file, pid = state_dir / "settings.yaml", _running_ray(state_dir)
    if pid is not None and (not file.exists() or file.read_text() != _as_text(settings)):
        say("the settings have changed: ending the Ray that was started with the old ones")
        _end(pid)


def _as_text(settings: Settings) -> str:
    return "# Written by `onebasis up`.\n" + yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _running_ray(state_dir: Path) -> int | None:
    return process_of(state_dir / ADDRESS_FILE, "orchestrator.ray_head")


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    _await_end(pid)


def _await_end(pid: int) -> None:
    until = time.monotonic() + STOP_SECONDS
    while _lives(pid):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
