"""Starting, mending and ending the service's own processes on this machine: the Ray head and the control plane.

Only processes that this state folder names, or that have its Ray's token, are ever ended, and only after a look at what
they are. `up` mends by ending what stands still and starting what is missing: what a task has reached is in its record.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from configs.errors import (
    Conflict,
    InvalidInput,
    NoSignOfLife,
    OnebasisError,
    OwnedByAnother,
    Unavailable,
    UnsafeStorage,
    error_from_dict,
)
from configs.settings import Settings, read_settings
from orchestrator.alarms import AlarmCode
from orchestrator.api.client import Client, server_facts
from orchestrator.api.requests import Health, Status
from orchestrator.commands.attention import tell_new
from orchestrator.ray_head import ADDRESS_FILE, MODULE, TOKEN_FILE, ray_environment
from orchestrator.reload import refuse_lost_teams
from orchestrator.scheduling.pools import pool_of
from orchestrator.signs_of_life import (
    Life,
    end_now,
    left_behind,
    life_of,
    ray_processes,
    ray_trouble,
    stopped,
    title_of,
)
from subspace_store.commands.state_folder import (
    LOCK_FILE,
    RESTORE_FILE,
    SERVER_FILE,
    SETTINGS_FILE,
    join_service,
    keep_settings,
    keep_source,
    make_private,
    member_id,
    open_private,
    process_of,
    running_server,
    service_identity,
    service_settings,
    settings_text,
)
from subspace_store.commands.terminal import TELL_SECONDS, counted, silent_seconds, telling
from subspace_store.doctor import examine
from subspace_store.log.store_format import check_place
from subspace_store.log.version import MAIN
from subspace_store.log.version_log import VersionLog, other_owner, owned_by_another
from subspace_store.storage.opening import open_storage

START_SECONDS = 180.0
STAY_SECONDS = 1.0
"""Interval at which `up --stay` looks whether the service still runs."""
TRY_AGAIN = "mend what it says, then `onebasis up` again"
STOP_SECONDS = 150.0
"""Longest wait for the control plane to end: running tasks write a checkpoint, and MLflow is updated once more."""

QUICK_SECONDS = 10.0
"""The same for a start that failed: nothing trains yet."""
UNSEEN_SECONDS = 40.0
"""Longest wait for a control plane that has no address: it gives the store up before it ends, or is about to start."""
UNFINISHED = frozenset({AlarmCode.RAY_DOWN, AlarmCode.LOOP_SILENT, AlarmCode.STORE_SILENT, AlarmCode.WORKER_SILENT})
"""Alarms with which the service is not up yet: `up` reports them and waits for their end."""

Say = Callable[[str], None]


def settings_to_run_with(config: Path | None, state_dir: Path) -> Settings:
    """The settings of a service in this folder: those of the file that is named, else those of the last `up` here, else
    the ones for trying out.

    Raises:
        InvalidInput: They cannot be read, or are of a service in another folder.
    """
    kept = state_dir / SETTINGS_FILE
    chosen = config or (kept if kept.exists() else Path(sys.modules["configs"].__path__[0]) / "local.yaml")
    settings = read_settings(chosen)
    if config is None and not kept.exists():
        settings = read_settings(chosen, root=state_dir.resolve().parent)
    if Path(settings.state_dir).resolve() != state_dir.resolve():
        raise InvalidInput(
            f"state_dir is {settings.state_dir}, but this command looks in {state_dir.resolve()}",
            str(chosen),
            f"add --state-dir {settings.state_dir} here and to later commands, or set ONEBASIS_STATE_DIR",
        )
    return settings


def up(
    settings: Settings,
    say: Say,
    take_over: bool = False,
    config: Path | None = None,
    removed: Collection[str] = (),
) -> dict[str, Any]:
    """Start what is not running; safe to repeat, also after a kill -9 of anything.

    Args:
        removed: Base models that may leave the service although they have tasks.
        take_over: Make the store this service's, even if another service owns it: that one stops.
        config: The file that the settings were read from, if it was named.

    Returns:
        The service's status, with every worker warm.

    Raises:
        Conflict: It runs with other settings, or a base model that has tasks is not in these.
        UnusableStore: The store belongs to another base model, or lies where two writers overwrite each other.
        OwnedByAnother: The store belongs to another service.
        Unavailable: Something did not start; quotes the end of its log.
    """
    state_dir = Path(settings.state_dir)
    if (state_dir / RESTORE_FILE).exists():
        todo = "`onebasis restore` with the same backup and settings goes on with it"
        raise Conflict("a backup is being restored here, or its restoring was cut off", str(state_dir), todo)
    _prepare(settings, state_dir)
    started: list[subprocess.Popen[bytes]] = []
    try:
        with _alone(state_dir, say):
            with telling("looking at what runs here", say):
                _end_what_stands_still(settings, state_dir, say)
            _await_what_ends(state_dir, say)
            with telling("looking for what was left behind", say):
                _end_left_behind(state_dir, say)
            if running_server(state_dir) is None:
                if settings.production:
                    _refuse_unsafe_storage(settings, say)
                _join_the_service(settings, state_dir, say)
                _refuse_lost_base_models(settings, state_dir, removed)
                _refuse_lost_teams(settings, state_dir)
                with telling(f"reading the store at {settings.storage.url}", say):
                    _own_the_store(settings, state_dir, take_over, say)
            with telling("starting Ray and the control plane", say):
                _start_what_is_missing(settings, state_dir, say, started, config)
        return _wait_for_workers(settings, state_dir, say)
    except BaseException as error:
        if started:
            # Of Ctrl-C the command tells, once: nothing failed.
            why = "" if isinstance(error, KeyboardInterrupt) else "it did not come up: "
            say(f"{why}ending what was started")
            _end_started(started, state_dir)
        raise


def _end_what_stands_still(settings: Settings, state_dir: Path, say: Say) -> None:
    """End each process that gives no sign of life, so that it is made anew."""
    server = running_server(state_dir)
    if server is not None and (what := _silence(state_dir, server)):
        say(f"{what}: ending it")
        _kill_server(server)
    if settings.ray.address != "local":
        return  # its machines are not the service's; the control plane replaces its own actors
    if (state_dir / ADDRESS_FILE).exists() and (trouble := ray_trouble(state_dir)):
        say(f"Ray does not work: {trouble}. Ending what is left; tasks go on from a checkpoint or begin again")
        if (server := running_server(state_dir)) is not None:
            _kill_server(server)  # on SIGTERM it would wait for the cluster that is not there
        _end_ray(state_dir, 0.0)
    for process in stopped(ray_processes(state_dir)):
        say(f"{title_of(process)} (pid {process.pid}) {Life.STOPPED}: ending it, another takes its place")
        end_now([process])


def _silence(state_dir: Path, server: int) -> str:
    """Why a running control plane has to be ended; empty if it answers."""
    try:
        Client(state_dir, lambda _: None).ask(Health())
    except NoSignOfLife as error:
        return error.what
    except Unavailable as error:
        if running_server(state_dir) == server:
            return f"the control plane (pid {server}) does not answer: {error.what}"
    return ""


def _await_what_ends(state_dir: Path, say: Say) -> None:
    """Wait for a control plane that ends already, as after Ctrl-C in `down`: it takes no requests, and keeps the next
    one from starting."""
    server = running_server(state_dir)
    if server is not None and not _is_running(state_dir):
        say(f"the control plane (pid {server}) is ending, as it was told before: waiting for it, then starting anew")
        with telling("waiting for what trains to write a checkpoint", say):
            _end(server, STOP_SECONDS)
        (state_dir / SERVER_FILE).unlink(missing_ok=True)
    elif server is None and _is_locked(state_dir):
        say("a control plane is there that takes no requests: waiting until it has ended, or has started")
        until = time.monotonic() + UNSEEN_SECONDS
        while _is_locked(state_dir) and running_server(state_dir) is None and time.monotonic() < until:
            time.sleep(0.05)


def _is_running(state_dir: Path) -> bool:
    """Whether the control plane takes requests and means to go on."""
    try:
        return bool(Client(state_dir, lambda _: None).ask(Health())["running"])
    except Unavailable:  # it ended while it was asked: one that hangs has been ended before
        return False


def _is_locked(state_dir: Path) -> bool:
    """Whether a control plane has this folder: before it announces itself, and until its last moment."""
    with open_private(state_dir / LOCK_FILE, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _kill_server(pid: int) -> None:
    """Kill it, which is safe at any moment: its records are made for that."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _await_end(pid)


def _end_ray(state_dir: Path, patience_seconds: float = QUICK_SECONDS) -> None:
    """End the head, and all processes with its token that outlived it: those that stand still, or lost their parent.

    Args:
        patience_seconds: How long the head may take to end in order. Without a raylet or a GCS it would wait for them.
    """
    if (head := _running_ray(state_dir)) is not None:
        _end(head, patience_seconds)
    end_now(ray_processes(state_dir))
    (state_dir / ADDRESS_FILE).unlink(missing_ok=True)


def _end_started(started: list[subprocess.Popen[bytes]], state_dir: Path) -> None:
    """End what this `up` started: the control plane first, which still needs Ray to end its work."""
    for process in reversed(started):
        if process.poll() is None:
            _end(process.pid, QUICK_SECONDS)
        process.wait()
        if MODULE in process.args:  # type: ignore[operator]
            _end_ray(state_dir)
        else:
            (state_dir / SERVER_FILE).unlink(missing_ok=True)


def _prepare(settings: Settings, state_dir: Path) -> None:
    """Make what the service writes to, for its owner alone: settings, databases and logs may contain a password."""
    for folder in (state_dir, state_dir / "logs"):
        make_private(folder)
    with open_private(state_dir / ".gitignore", "w") as file:
        file.write("*\n")
    for url in (settings.database_url, settings.mlflow.tracking_uri):
        database = Path(url.partition(":///")[2].partition("?")[0])
        if url.startswith("sqlite") and database.parent.is_dir():
            open_private(database, "a").close()  # SQLite gives its other files the rights of this one


def _refuse_unsafe_storage(settings: Settings, say: Say) -> None:
    """Refuse, for production, a place that breaks one of the promises that a store relies on."""
    for base in settings.bases:
        storage = open_storage(settings.storage, base.name)
        with telling(f"examining {storage.url}", say):
            broken = [check for check in examine(storage) if not check.ok]
        if broken:
            told = "; ".join(f"{check.name}: {check.what}" for check in broken)
            raise UnsafeStorage(
                f"production: true, and this place fails the doctor: {told}", storage.url, broken[0].todo
            )


def _own_the_store(settings: Settings, state_dir: Path, take_over: bool, say: Say) -> None:
    """Refuse a place that cannot hold this service's store, and a store of another service, before anything is started;
    or take the store over."""
    service = service_identity(state_dir)
    for base in settings.bases:
        storage = open_storage(settings.storage, base.name)
        check_place(storage, base.name, base.weights_sha256)
        if (owner := other_owner(storage, service)) is None:
            continue
        if not take_over:
            raise owned_by_another(owner, storage.url, service)
        say(f"taking the store at {storage.url} over from {owner.name}, which stops at its next write")
        writer = VersionLog(storage, f"up of {service.name}")
        writer.open()
        writer.acquire(service.name, service, claim=True, force=True)


def _refuse_lost_base_models(settings: Settings, state_dir: Path, removed: Collection[str]) -> None:
    """Refuse settings without a base model that had tasks when the service last ran, unless it is meant."""
    if not (state_dir / SETTINGS_FILE).exists():
        return
    before = service_settings(state_dir)
    for name in before.base_names:
        if name in settings.base_names or name in removed:
            continue
        from orchestrator.tasks.task_queue import TaskQueue

        queue = TaskQueue(before.database_url, before.failures)
        try:
            alive = queue.alive_of_base_models().get(name, 0)
        finally:
            queue.close()
        state = VersionLog(open_storage(before.storage, name)).open()
        held = len(state.tasks_at(state.refs[MAIN]))
        if alive or held:
            raise Conflict(
                f"these settings no longer have the base model {name}, of which the database has "
                f"{counted(alive, 'living task')} and main holds {counted(held, 'task')}",
                "base_models",
                f"write it back; or, on purpose: add `--remove-base-model {name}`. Its store stays where it is, and "
                "its tasks wait until it is back",
            )


def _refuse_lost_teams(settings: Settings, state_dir: Path) -> None:
    """Refuse settings without a team whose tasks had not ended when the service last ran."""
    if not (state_dir / SETTINGS_FILE).exists():
        return
    before = service_settings(state_dir)
    if before.teams.keys() <= settings.teams.keys():
        return
    from orchestrator.tasks.task_queue import TaskQueue

    queue = TaskQueue(before.database_url, before.failures)
    try:
        refuse_lost_teams(before, settings, queue.alive_of_teams())
    finally:
        queue.close()


def _join_the_service(settings: Settings, state_dir: Path, say: Say) -> None:
    """Be one of the control planes of the service that the database belongs to; it is this folder's if it was nobody's.

    Raises:
        InvalidInput: Others of them run, with other settings.
    """
    if not settings.database_url.startswith("postgresql"):
        return
    # Imported here: with SQLite, which most have, there is no need to wait for the SQL library.
    from orchestrator.leadership import refuse_other_settings, shared_settings
    from orchestrator.tasks.leader_lease import LeaderLease

    with (
        telling("asking the task database for other control planes", say),
        contextlib.closing(LeaderLease(settings.database_url)) as lease,
    ):
        seen = lease.look()
        refuse_other_settings(seen, member_id(state_dir), settings)
        own = service_identity(state_dir).service_id
        if (service_id := lease.claim_service(own, shared_settings(settings))) != own:
            who = f", which {seen.name} leads" if seen.holder and not seen.is_over else ""
            say(f"joining the service that this database belongs to{who}")
            join_service(state_dir, service_id)


@contextlib.contextmanager
def _alone(state_dir: Path, say: Say) -> Iterator[None]:
    """Allow one `up` or `down` at a time: two that start at once would start two clusters, and one would never end."""
    with open_private(state_dir / "up.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another `onebasis up` or `down` here to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_what_is_missing(
    settings: Settings, state_dir: Path, say: Say, started: list[subprocess.Popen[bytes]], config: Path | None
) -> None:
    """started: Collects the processes that were started, so that they can be ended when the rest fails."""
    running = running_server(state_dir)
    if running is not None and settings.ray.address == "local" and _running_ray(state_dir) is None:
        say("Ray is gone: starting it and the control plane again")
        _kill_server(running)  # on SIGTERM it would wait for the cluster that is not there
        running = None
    if running is None:
        _refuse_taken_port(settings)
        _end_ray_of_other_settings(settings, state_dir, say)
    _keep_settings(settings, state_dir, running is not None, config)
    if running is None:
        head = _start_ray(settings, state_dir, say) if settings.ray.address == "local" else None
        if head is not None:
            started.append(head)
        say("starting the control plane")
        (state_dir / SERVER_FILE).unlink(missing_ok=True)
        # Beside Ray, not after it: its imports take as long as Ray's start, and it waits for Ray's address itself.
        command = [sys.executable, "-m", "orchestrator.api.server", str(state_dir)]
        server = _start(command, state_dir, "control-plane.log", _umask(settings))
        started.append(server)
        if head is not None:
            _wait(lambda: (state_dir / ADDRESS_FILE).exists(), head, state_dir / "logs/ray.log", "Ray")
        _wait(
            lambda: server_facts(state_dir) is not None, server, state_dir / "logs/control-plane.log", "control plane"
        )


def stay(state_dir: Path, say: Say) -> None:
    """Wait while the service runs, for what restarts it: systemd, a container. SIGTERM and Ctrl-C end
    the service in order.

    Raises:
        Unavailable: The control plane or this machine's Ray has ended by itself: the next `up` goes on.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    is_local = (state_dir / ADDRESS_FILE).exists()
    while not told.wait(STAY_SECONDS):
        server = running_server(state_dir)
        trouble = ray_trouble(state_dir) if is_local and server is not None else ""
        if server is None or life_of(server) is Life.GONE or trouble:
            log = state_dir / "logs/control-plane.log"
            what = (
                f"Ray does not work: {trouble}"
                if trouble
                else f"the control plane ended; its log ends with\n  {_end_of(log)}"
            )
            raise Unavailable(what, str(log), "`onebasis up` goes on")
    down(state_dir, say)


def down(state_dir: Path, say: Say) -> bool:
    """End the control plane and a local Ray. Running tasks write a checkpoint first, and go on from it at the next
    `up`.

    Returns:
        False when nothing was running.
    """
    if not state_dir.exists():
        return _end_left_behind(state_dir, say)
    with _alone(state_dir, say):
        ended = _end_what_runs(state_dir, say)
        return _end_left_behind(state_dir, say) or ended


def _end_left_behind(state_dir: Path, say: Say) -> bool:
    """End what runs of a service whose state folder was here and is gone. Returns whether there was anything."""
    if state_dir.exists() and _is_locked(state_dir):
        return False  # a control plane of the folder that is there starts or ends, and has no address
    left = left_behind(state_dir)
    if left:
        named = ", ".join(f"{title_of(process)} (pid {process.pid})" for process in left)
        say(f"the state folder of a running service was deleted: ending what is left of it, {named}")
        end_now(left)
    return bool(left)


def _end_what_runs(state_dir: Path, say: Say) -> bool:
    ended = False
    if (server := running_server(state_dir)) is not None:
        has_ray = not (state_dir / ADDRESS_FILE).exists() or not ray_trouble(state_dir)
        if has_ray and life_of(server) is Life.RUNS:
            say(_what_ends(state_dir))
            _end(server, STOP_SECONDS)
        else:  # it would wait for Ray, which is not there, or not get the signal
            say("ending the control plane, which cannot end in order; what trains goes on from its last checkpoint")
            _kill_server(server)
        ended = True
    (state_dir / SERVER_FILE).unlink(missing_ok=True)
    if _running_ray(state_dir) is not None or ray_processes(state_dir):
        say("ending the Ray cluster")
        _end_ray(state_dir, 0.0 if ray_trouble(state_dir) else QUICK_SECONDS)
        ended = True
    (state_dir / ADDRESS_FILE).unlink(missing_ok=True)
    return ended


def _what_ends(state_dir: Path) -> str:
    """What `down` does, for people: of several control planes, the others go on."""
    with contextlib.suppress(OnebasisError):  # it may be of another release, too
        leadership = Client(state_dir, lambda _: None).ask(Health()).get("leadership") or {}
        if leadership.get("role") == "stands by":
            return f"ending this control plane, which stands by; {(leadership['leader'] or {}).get('name')} leads on"
        if others := [member["name"] for member in leadership.get("standing_by", ())]:
            return f"ending this control plane: one of those that stand by leads on, {', '.join(others)}"
    return "ending the control plane; what trains writes a checkpoint"


def _start_ray(settings: Settings, state_dir: Path, say: Say) -> subprocess.Popen[bytes] | None:
    """The head that starts; None when one runs."""
    if _running_ray(state_dir) is not None:
        return None
    say("starting Ray on this machine")
    (state_dir / ADDRESS_FILE).unlink(missing_ok=True)
    cpus = max(os.cpu_count() or 1, settings.cpus_at_most)
    command = [sys.executable, "-m", MODULE, str(state_dir), str(cpus)]
    return _start(command, state_dir, "ray.log", _umask(settings))


def _umask(settings: Settings) -> int:
    """Umask for the service's files: others get no access. But who may read a store in a folder of its own is for the
    person to say, by their umask (-1)."""
    kind, _, folder = settings.storage.url.partition(":")
    is_elsewhere = kind == "file" and not Path(folder).is_relative_to(settings.state_dir)
    return -1 if is_elsewhere else 0o077


def _start(command: list[str], state_dir: Path, log_name: str, umask: int) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: Ctrl-C in the terminal that started it does not reach it."""
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
    """The status once every worker is warm, and each process has given a sign of life since now."""
    began = time.monotonic()
    until, said_at = began + START_SECONDS, began - silent_seconds()
    client, said, told = Client(state_dir, say), "", set[str]()
    while True:
        health: dict[str, Any] = client.ask(Health())
        if (health.get("leadership") or {}).get("role") == "stands by":
            found: dict[str, Any] = client.ask(Status())
            return found
        pools: dict[str, Any] = health.get("pools", {})
        out = [pool_of(drain["what"]) for drain in health.get("drains", ()) if not drain["is_node"]]
        least = {name: max(0, pool["min"] - out.count(name)) for name, pool in pools.items()}
        all_workers = sum(least.values())
        ready = sum(min(pool["ready"], least[name]) for name, pool in pools.items())
        alarms = health["alarms"]
        unfinished = [alarm["text"] for alarm in alarms if alarm["code"] in UNFINISHED]
        heard = health.get("heard_seconds_ago", 0.0) <= time.monotonic() - began
        store_error = error_from_dict(health["store_error"]) if health.get("store_error") else None
        if store_error is not None and not isinstance(store_error, Unavailable):
            raise store_error
        for alarm in alarms:
            if alarm["code"] == AlarmCode.OUSTED:
                raise OwnedByAnother(alarm["what"], str(state_dir), alarm["todo"], "", "", 0.0)
        # The service itself waits for a store that is full or away, and its status reports it.
        is_open = health.get("store_is_open", True) or store_error is not None
        if ready == all_workers and is_open and heard and not unfinished:
            status: dict[str, Any] = client.ask(Status())
            return status
        log = state_dir / "logs/control-plane.log"
        if not health["running"]:
            raise Unavailable(f"the control plane ended; its log ends with\n  {_end_of(log)}", str(log), TRY_AGAIN)
        workers = counted(max(1, all_workers), "worker")  # one has to load before anything can be submitted
        line = f"loading the base model on {workers} ({ready} warm)" if ready < all_workers else "asking every process"
        now = time.monotonic()
        if (line != said and ready < all_workers) or now - said_at > TELL_SECONDS:
            say(line if line != said else f"still {line}, for {now - began:.0f} s")
            said, said_at = line, now
        tell_new(alarms, told, say)
        broken = [error_from_dict(error) for error in health.get("load_errors", {}).values()]
        if broken or time.monotonic() > until:
            late = f"{ready} of {all_workers} workers are warm after {START_SECONDS:.0f} s"
            causes = [str(error) for error in broken[:1]] or unfinished or [late]
            raise Unavailable("\n  ".join(causes), todo=f"{TRY_AGAIN}; the log is {log}")
        time.sleep(0.1)


def _keep_settings(settings: Settings, state_dir: Path, is_running: bool, config: Path | None = None) -> None:
    """Write the settings beside what they made, so that later commands need no option."""
    file = state_dir / SETTINGS_FILE
    if is_running and file.read_text() != settings_text(settings):
        named = f" --config {config}" if config else ""  # alone `up` would take those of before
        todo = f"`onebasis down`, then `onebasis up{named}`; or `onebasis reload{named}`, which says what it can take"
        raise Conflict("the service runs with other settings", str(file), todo)
    keep_settings(settings, state_dir)
    if config is not None:
        keep_source(state_dir, config)


def _end_ray_of_other_settings(settings: Settings, state_dir: Path, say: Say) -> None:
    """End a Ray that outlived a killed control plane if its store and workers have the settings of then."""
    file, pid = state_dir / SETTINGS_FILE, _running_ray(state_dir)
    if pid is not None and (not file.exists() or file.read_text() != settings_text(settings)):
        say("the settings have changed: ending the Ray that was started with the old ones")
        _end_ray(state_dir)


def _running_ray(state_dir: Path) -> int | None:
    return process_of(state_dir / ADDRESS_FILE, MODULE)


def _end(pid: int, patience_seconds: float) -> None:
    politely = patience_seconds > 0 and life_of(pid) is Life.RUNS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM if politely else signal.SIGKILL)
    _await_end(pid, patience_seconds)


def _await_end(pid: int, patience_seconds: float = QUICK_SECONDS) -> None:
    until = time.monotonic() + patience_seconds
    while life_of(pid) is not Life.GONE:
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
