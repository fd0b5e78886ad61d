"""What `up` does before anything runs: whose actors are found again, and whose are not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import (
    Conflict,
    Exit,
    Fenced,
    InvalidInput,
    OtherBaseModel,
    OwnedByAnother,
    Unavailable,
    UnsafeStorage,
)
from configs.settings import RaySettings, ServerSettings
from orchestrator.api.control_plane import ControlPlane
from orchestrator.cluster import namespace
from orchestrator.commands import processes
from orchestrator.commands.cli import app
from orchestrator.ray_head import TOKEN_VARIABLE
from orchestrator.signs_of_life import Life, left_behind, life_of, ray_processes
from orchestrator.tasks.task_events import CancelRequested
from orchestrator.tasks.task_queue import TaskQueue
from subspace_store.commands.state_folder import SERVER_MODULE, keep_settings, running_server, service_identity
from subspace_store.log.version import Identity
from subspace_store.log.version_log import VersionLog
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.opening import open_storage
from tests.builders import SHA256, settings, task_record


@pytest.fixture
def head(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like the Ray head of this state folder."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", "orchestrator.ray_head", str(tmp_path)]
    process = subprocess.Popen(command)
    (tmp_path / processes.ADDRESS_FILE).write_text(json.dumps({"address": "127.0.0.1:1", "pid": process.pid}))
    while processes._running_ray(tmp_path) is None:  # a new process has no command line for a moment
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_ray_that_was_started_with_the_same_settings_is_found_again(
    tmp_path: Path, head: subprocess.Popen[bytes]
) -> None:
    same = settings(tmp_path)
    processes._keep_settings(same, tmp_path, is_running=False)
    processes._end_ray_of_other_settings(same, tmp_path, lambda _: None)
    assert head.poll() is None


def test_a_ray_that_was_started_with_other_settings_is_ended(tmp_path: Path, head: subprocess.Popen[bytes]) -> None:
    # Its store actor would go on merging into the old place.
    processes._keep_settings(settings(tmp_path), tmp_path, is_running=False)
    other, said = settings(tmp_path, storage={"url": "s3://elsewhere"}), []
    processes._end_ray_of_other_settings(other, tmp_path, said.append)
    assert head.wait(5) != 0
    assert len(said) == 1


@pytest.mark.parametrize(("config", "named"), [(None, ""), ("o.yaml", " --config o.yaml")])
def test_other_settings_of_a_running_service_are_refused_with_how_to_change_to_them(
    tmp_path: Path, config: str | None, named: str
) -> None:
    processes._keep_settings(settings(tmp_path), tmp_path, is_running=False)
    other = settings(tmp_path, storage={"url": "s3://elsewhere"})
    with pytest.raises(Conflict, match="runs with other settings") as told:
        processes._keep_settings(other, tmp_path, True, Path(config) if config else None)
    todo = f"`onebasis down`, then `onebasis up{named}`; or `onebasis reload{named}`, which says what it can take"
    assert told.value.todo == todo


def test_settings_without_a_base_model_that_has_tasks_are_refused_unless_it_is_meant(tmp_path: Path) -> None:
    names = ("small", "large")
    bases = [{"name": name, "source": "x", "weights_sha256": SHA256} for name in names]
    before, after = settings(tmp_path, base_model=None, base_models=bases), settings(tmp_path, base_model=bases[0])
    processes._refuse_lost_base_models(after, tmp_path, ())  # nothing has run here yet
    keep_settings(before, tmp_path)
    processes._refuse_lost_base_models(after, tmp_path, ())  # it ran, and nobody submitted anything
    queue = TaskQueue(before.database_url)
    queue.add(task_record("red/alpha", spec={"base_model": "large"}))
    queue.add(task_record("red/beta", spec={"base_model": "small"}))
    queue.close()
    with pytest.raises(Conflict, match="large, of which the database has 1 living task and main holds 0 tasks") as told:
        processes._refuse_lost_base_models(after, tmp_path, ())
    assert "add `--remove-base-model large`" in told.value.todo
    processes._refuse_lost_base_models(after, tmp_path, ["large"])
    processes._refuse_lost_base_models(before, tmp_path, ())


def test_services_of_one_base_model_with_their_own_storage_have_their_own_actors(tmp_path: Path) -> None:
    mine = Identity("one", "here")
    one, two = (namespace(settings(tmp_path, storage={"url": f"s3://bucket/{name}"}).storage, mine) for name in "ab")
    assert one != two
    assert one == namespace(settings(tmp_path, storage={"url": "s3://bucket/a"}).storage, mine)
    assert one != namespace(settings(tmp_path, storage={"url": "s3://bucket/a"}).storage, Identity("two", "there"))


@pytest.mark.parametrize("token", [None, "no-such-token"])
def test_a_cluster_whose_token_is_not_there_is_not_joined_and_none_is_made_up(
    tmp_path: Path, token: str | None
) -> None:
    path = None if token is None else str(tmp_path / token)
    there = settings(tmp_path).model_copy(update={"ray": RaySettings(address="head:6379", auth_token_path=path)})
    with pytest.raises(InvalidInput, match=r"ray\.auth_token_path"):
        ControlPlane(there, tmp_path)._ray()
    assert not (tmp_path / "no-such-token").exists()


ENDS_SLOWLY = """
import fcntl, pathlib, signal, sys, time
lock = open(pathlib.Path(sys.argv[2]) / "server.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has been told already
print("locked", flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize(
    ("ends_with", "said_of_it"),
    [
        (KeyboardInterrupt(), "ending what was started"),
        (Unavailable("worker-0 cannot load the base model"), "it did not come up: ending what was started"),
    ],
    ids=["Ctrl-C", "a failure"],
)
def test_up_ends_what_it_started_and_says_that_it_did_not_come_up_only_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_with: BaseException, said_of_it: str
) -> None:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def starts(
        ours: object, state_dir: object, say: object, processes: list[subprocess.Popen[bytes]], *_: object
    ) -> None:
        processes.append(started)

    def waits(*_: object) -> None:
        raise ends_with

    monkeypatch.setattr(processes, "_own_the_store", lambda *_: None)
    monkeypatch.setattr(processes, "_start_what_is_missing", starts)
    monkeypatch.setattr(processes, "_wait_for_workers", waits)
    said: list[str] = []
    with pytest.raises(type(ends_with)):
        processes.up(settings(tmp_path), said.append)
    assert said == [said_of_it]
    assert started.poll() is not None


def test_up_counts_the_silence_before_it_waits_for_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A killed store is opened anew in ten seconds: `up` had said nothing of it for as long as it took to start, and
    # then for eight seconds more.
    asked: list[object] = []

    class Opens:
        def __init__(self, *_: object) -> None: ...

        def ask(self, request: object) -> dict[str, object]:
            asked.append(request)
            return {"running": True, "alarms": [], "store_is_open": len(asked) > 1}

    monkeypatch.setattr(processes, "Client", Opens)
    monkeypatch.setattr(processes, "silent_seconds", lambda: processes.TELL_SECONDS - 4)
    said: list[str] = []
    processes._wait_for_workers(settings(tmp_path), tmp_path, said.append)
    assert said == []
    asked.clear()
    monkeypatch.setattr(processes, "silent_seconds", lambda: processes.TELL_SECONDS + 0.1)
    processes._wait_for_workers(settings(tmp_path), tmp_path, said.append)
    assert said == ["asking every process"]


@pytest.mark.parametrize("has_address", [True, False], ids=["it trains", "it gives the store up"])
def test_up_waits_for_a_control_plane_that_an_interrupted_down_is_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_address: bool
) -> None:
    ours = settings(tmp_path)
    processes._keep_settings(ours, tmp_path, is_running=False)
    command = [sys.executable, "-c", ENDS_SLOWLY, "orchestrator.api.server", str(tmp_path)]
    ending = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert ending.stdout is not None
    ending.stdout.readline()
    if has_address:  # as after SIGTERM: nobody listens there any more
        facts = {"url": "http://127.0.0.1:1", "token": "t", "pid": ending.pid}
        (tmp_path / "server.json").write_text(json.dumps(facts))
    alive: list[int | None] = []
    monkeypatch.setattr(processes, "_own_the_store", lambda *_: None)
    monkeypatch.setattr(processes, "_start_what_is_missing", lambda *_: alive.append(ending.poll()))
    monkeypatch.setattr(processes, "_wait_for_workers", lambda *_: {})
    said: list[str] = []
    try:
        processes.up(ours, said.append)
        assert alive == [0]
        assert len(said) == 1
        assert not (tmp_path / "server.json").exists()
    finally:
        ending.kill()
        ending.wait()
        ending.stdout.close()


def test_a_control_plane_is_known_by_any_name_of_its_folder_so_mlflow_is_not_rebuilt_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir, link = tmp_path / ".onebasis", tmp_path / "link"
    state_dir.mkdir()
    link.symlink_to(state_dir)
    named = [SERVER_MODULE, str(state_dir)]
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *named])
    (state_dir / "server.json").write_text(json.dumps({"pid": running.pid}))
    processes._keep_settings(settings(state_dir), state_dir, is_running=False)
    monkeypatch.chdir(tmp_path)
    try:
        while running_server(state_dir) is None:  # a new process has no command line for a moment
            time.sleep(0.01)
        assert [running_server(Path(name)) for name in (".onebasis", "link", str(link))] == 3 * [running.pid]
        (tmp_path / "other").mkdir()
        shutil.copy(state_dir / "server.json", tmp_path / "other")
        assert running_server(Path("other")) is None
        done = CliRunner().invoke(app, ["mlflow", "rebuild"])
        assert (done.exit_code, "the service runs, and writes to MLflow itself" in done.output) == (Exit.CONFLICT, True)
    finally:
        running.kill()
        running.wait()


def test_the_status_of_an_ended_service_names_what_still_runs_of_it(
    tmp_path: Path, head: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after Ctrl-C in `down`, or a killed control plane.
    processes._keep_settings(settings(tmp_path), tmp_path, is_running=False)
    worker = subprocess.Popen(
        ["ray::WorkerActor.run", "-c", "import time; time.sleep(60)"],
        executable=sys.executable,
        env=os.environ | {TOKEN_VARIABLE: str(tmp_path / "ray_token")},
    )
    try:
        while not ray_processes(tmp_path):
            time.sleep(0.01)
        monkeypatch.setenv("ONEBASIS_STATE_DIR", str(tmp_path))
        said = CliRunner().invoke(app, ["status"]).stdout
        assert "onebasis is down" in said
        both = f"still running: Ray head (pid {head.pid}), WorkerActor (pid {worker.pid}) (`onebasis down` ends them"
        assert both in said
    finally:
        for process in (worker, head):
            process.kill()
            process.wait()
    told = CliRunner().invoke(app, ["status"])
    assert "still running" not in told.stdout
    assert told.exit_code == CliRunner().invoke(app, ["status", "--json"]).exit_code == Exit.DOWN == 10


def test_what_runs_after_its_state_folder_was_deleted_is_told_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "gone", tmp_path / "gone-too"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = [subprocess.Popen([*sleep, module, str(folder)]) for module in ("orchestrator.api.server", processes.MODULE)]
    strange = subprocess.Popen([*sleep, processes.MODULE, str(other)])
    try:
        while len(left_behind(folder)) < 2 or not left_behind(other):
            time.sleep(0.01)
        monkeypatch.setenv("ONEBASIS_STATE_DIR", str(folder))
        told = CliRunner().invoke(app, ["status"])
        both = f"control plane (pid {left[0].pid}), Ray head (pid {left[1].pid})"
        assert told.exit_code == 5
        assert f"the state folder was deleted while its service ran; still there: {both}" in told.output
        said: list[str] = []
        assert processes.down(folder, said.append)
        assert said == [f"the state folder of a running service was deleted: ending what is left of it, {both}"]
        assert [life_of(process.pid) for process in left] == [Life.GONE, Life.GONE]
        assert strange.poll() is None  # another folder's
        assert not processes.down(folder, said.append)
    finally:
        for process in (*left, strange):
            process.kill()
            process.wait()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_control_plane_whose_state_folder_is_deleted_ends_with_what_it_started(
    tmp_path: Path, is_made_anew: bool
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    head = subprocess.Popen([*sleep, processes.MODULE, str(folder)])
    watch = (
        "import subprocess, sys; from pathlib import Path; from orchestrator.api import server\n"
        "folder = Path(sys.argv[2]); lock = open(folder / server.LOCK_FILE, 'w')\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "server._end_with_its_folder(folder, lock.fileno())"
    )
    plane = subprocess.Popen(
        [sys.executable, "-c", watch, "orchestrator.api.server", str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert plane.stdout is not None
        child = int(plane.stdout.readline())
        time.sleep(1.5)
        assert plane.poll() is None  # while the folder is there, nothing happens
        shutil.rmtree(folder)
        if is_made_anew:
            folder.mkdir()
            (folder / "server.lock").touch()
        assert plane.wait(10) == 1
        assert head.wait(5) != 0
        assert life_of(child) is Life.GONE
    finally:
        for process in (plane, head):
            process.kill()
            process.wait()
        if plane.stdout is not None:
            plane.stdout.close()


def test_a_store_of_the_service_that_was_in_this_very_folder_is_not_told_as_a_strangers(tmp_path: Path) -> None:
    ours = settings(tmp_path / "state", storage={"url": f"file:{tmp_path}/store"})
    folder = Path(ours.state_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = VersionLog(open_storage(ours.storage, ours.bases[0].name))
    log.open()
    log.acquire("before", service_identity(folder), claim=True)
    (folder / "service_id").unlink()
    with pytest.raises(OwnedByAnother, match="that was in this very folder") as told:
        processes._own_the_store(ours, folder, False, lambda _: None)
    assert "--take-over" in told.value.todo
    assert "end that service" not in told.value.todo


def test_a_port_that_is_taken_is_named_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = settings().model_copy(
            update={"state_dir": str(tmp_path), "server": ServerSettings(host="127.0.0.1", port=port)}
        )
        said: list[str] = []
        with pytest.raises(InvalidInput, match=f"cannot listen on 127.0.0.1:{port}"):
            processes.up(wanted, said.append)
    assert said == []
    assert not list((tmp_path / "logs").iterdir())


def test_a_local_ray_has_cpus_for_every_rank_of_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(processes, "_start", lambda command, *_: started.append(command))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    wanted = settings(tmp_path, workers={"count": 3, "ranks": 4, "cpus": 1.2})
    processes._start_ray(wanted, tmp_path, lambda _: None)
    assert started[0][-1] == "15"  # 3 × 4 × 1.2 = 14.4, and Ray counts whole ones


def test_a_store_of_another_service_is_refused_before_anything_starts_and_taken_over_deliberately(
    tmp_path: Path,
) -> None:
    mine = settings(tmp_path, storage={"url": f"file:{tmp_path}/place"}).model_copy(
        update={"state_dir": str(tmp_path / "mine")}
    )
    (tmp_path / "mine").mkdir()
    storage = open_storage(mine.storage, mine.bases[0].name)
    theirs = VersionLog(storage, "theirs")
    theirs.open()
    theirs.acquire("theirs", Identity("theirs", "there:/folder"), claim=True)
    said: list[str] = []
    with pytest.raises(OwnedByAnother, match=r"(?s)belongs to the service there:/folder.*onebasis up --take-over"):
        processes.up(mine, said.append)
    assert (said, list((tmp_path / "mine").glob("*.json"))) == ([], [])
    processes._own_the_store(mine, tmp_path / "mine", True, said.append)
    assert len(said) == 1
    owner = VersionLog(storage).open().owner
    assert owner is not None
    assert owner.service_id == (tmp_path / "mine/service_id").read_text()
    processes._own_the_store(mine, tmp_path / "mine", False, said.append)  # from now on it is this one's
    with pytest.raises(Fenced):
        theirs.commit("hold", op_key="", actor="theirs", body={"reason": "x"})


def opened_to_others(folder: Path) -> list[str]:
    """What anybody but the owner may read or enter, below a folder and itself."""
    paths = [folder, *folder.rglob("*")]
    return [str(path.relative_to(folder)) for path in paths if path.lstat().st_mode & 0o077]


@pytest.mark.parametrize("old_mode", [None, 0o644])
def test_everything_below_the_state_folder_is_its_owners_alone(tmp_path: Path, old_mode: int | None) -> None:
    previous = os.umask(0o022)
    try:
        folder = tmp_path / "state"
        secret = settings(folder, mlflow={"tracking_uri": f"sqlite:///{folder}/mlflow.db"})
        if old_mode is not None:  # what an older release left
            (folder / "logs").mkdir(parents=True)
            for name in ("settings.yaml", "tasks.db", "mlflow.db", "up.lock", "logs/control-plane.log", "ray.json"):
                (folder / name).touch(old_mode)
        processes._prepare(secret, folder)
        with processes._alone(folder, lambda _: None):
            processes._keep_settings(secret, folder, is_running=False)
        service_identity(folder)
        queue = TaskQueue(secret.database_url)
        queue.add(task_record())
        code = "import sys, pathlib; (pathlib.Path(sys.argv[1]) / 'made-by-the-service').touch(); print('said')"
        command = [sys.executable, "-c", code, str(folder)]
        assert processes._start(command, folder, "control-plane.log", processes._umask(secret)).wait() == 0
        ControlPlane(secret, folder)._announce("http://127.0.0.1:1")
        written = {path.name for path in folder.rglob("*")}
        queue.close()
    finally:
        os.umask(previous)
    assert written >= {
        "settings.yaml", "service_id", "server.json", "up.lock", "tasks.db", "mlflow.db", "control-plane.log",
        "ray_token", "made-by-the-service",
    }  # fmt: skip
    assert opened_to_others(folder) == []


def test_a_store_in_a_folder_of_its_own_is_for_whom_the_umask_lets_in(tmp_path: Path) -> None:
    assert processes._umask(settings(tmp_path)) == 0o077
    assert processes._umask(settings(tmp_path, storage={"url": "s3://bucket/here"})) == 0o077
    assert processes._umask(settings(tmp_path, storage={"url": "file:/shared/store"})) == -1


def test_up_refuses_a_store_of_other_weights_before_anything_is_started(tmp_path: Path) -> None:
    mine = settings(tmp_path, storage={"url": f"file:{tmp_path / 'store'}"})
    place = open_storage(mine.storage, mine.bases[0].name)
    other = {"format": 2, "base_model": mine.bases[0].name, "base_sha256": 64 * "0"}
    place.write("FORMAT", json.dumps(other).encode())
    with pytest.raises(OtherBaseModel, match=r"(?s)weights_sha256 '0000.*correct base_model\.weights_sha256"):
        processes.up(mine, lambda _: None)
    assert list((tmp_path / "logs").iterdir()) == []
    assert place.keys("") == ["FORMAT"]


def test_up_refuses_a_storage_that_lets_two_writers_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(self: LocalStorage, key: str, content: bytes) -> bool:
        self.write(key, content)
        return True

    monkeypatch.setattr(LocalStorage, "create", overwrite)
    mine = settings(tmp_path, storage={"url": f"file:{tmp_path / 'store'}"})
    with pytest.raises(UnsafeStorage, match="If-None-Match"):
        processes.up(mine, lambda _: None)
    assert list((tmp_path / "logs").iterdir()) == []
    assert open_storage(mine.storage, mine.bases[0].name).keys("") == []


def test_settings_without_a_team_whose_tasks_have_not_ended_are_refused(tmp_path: Path) -> None:
    before = settings(tmp_path)
    after = before.model_copy(update={"teams": {"blue": before.teams["blue"]}})
    processes._refuse_lost_teams(after, tmp_path)  # nothing has run here yet
    keep_settings(before, tmp_path)
    queue = TaskQueue(before.database_url)
    ended, alive = (task_record(title, client_key=title) for title in ("red/ended", "red/alive"))
    queue.add(ended)
    queue.apply(ended.task_id, CancelRequested("ann", 5.0))
    processes._refuse_lost_teams(after, tmp_path)
    queue.add(alive)
    queue.close()
    with pytest.raises(Conflict, match=r"tasks have not ended: red \(1 task\)") as told:
        processes._refuse_lost_teams(after, tmp_path)
    assert "write them back" in told.value.todo
    processes._refuse_lost_teams(before, tmp_path)
