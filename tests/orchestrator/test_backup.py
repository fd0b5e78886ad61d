"""A service is backed up while it merges, lost with all it had, restored, and goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.errors import Conflict, Exit, NotFound, Unavailable
from configs.settings import StorageSettings
from orchestrator import backup
from orchestrator.api.requests import Submit
from orchestrator.backup import archive_at, make_backup, read_backup, restore
from orchestrator.commands import processes
from orchestrator.commands.cli import app
from orchestrator.tasks.task_queue import TaskQueue
from subspace_store import SubspaceReader
from subspace_store.archive import Archive
from subspace_store.commands.state_folder import RESTORE_FILE, service_identity, service_settings
from subspace_store.export import export_tasks
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.opening import open_storage
from subspace_store.verify import verify
from tests.builders import settings
from tests.moto_server import CREDENTIALS, moto_server
from tests.orchestrator.plant import Plant
from tests.orchestrator.site import Site
from tests.orchestrator.stand_in_cluster import StandInCluster


def quiet(_: str) -> None:
    """What a command says meanwhile is not looked at here."""


def places(folder: Path) -> dict[str, Any]:
    return {"storage": {"url": f"file:{folder}/store"}}


def exported(plant_settings: Any, into: Path) -> dict[str, bytes]:
    """Every file of every task of every version that is alive, bit for bit."""
    found = {}
    for name in plant_settings.base_names:
        reader = SubspaceReader.open(open_storage(plant_settings.storage, name))
        assert verify(reader, deep=True) == []
        for version in sorted(reader.state.versions):
            export_tasks(reader, into / str(version), version, base_source="somewhere")
    for path in sorted(into.rglob("*")):
        if path.is_file() and path.name != "adapters.json":  # which says where it lies
            found[str(path.relative_to(into))] = path.read_bytes()
    shutil.rmtree(into)
    return found


def published(folder: Path) -> Site:
    """A service on disk with two versions of main."""
    site = Site(folder, **places(folder))
    service_identity(folder)
    for title in ("red/alpha", "blue/beta"):
        site.publish(title)
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One that no test changes."""
    site = published(tmp_path_factory.mktemp("site") / "state")
    yield site
    site.close()


def test_a_service_that_is_lost_is_restored_and_goes_on(tmp_path: Path) -> None:
    site = published(tmp_path / "state")
    mine, archive = site.plant.settings, archive_at(f"file:{tmp_path}/backups", None)
    for number in range(3):  # the loop merges them while they are copied
        site.client.ask(Submit(task=_task(site, f"red/more-{number}"), by="ann"))
    made, new = make_backup(mine, site.folder, archive, quiet)
    assert new.objects > 5
    for number in range(3):
        site.wait_for(f"red/more-{number}", "published")
    whole, _ = make_backup(mine, site.folder, Archive(archive.storage), quiet)
    identity = service_identity(site.folder)
    everything = exported(mine, tmp_path / "one")
    tasks = {task.task_id: task.state for task in site.plant.queue.tasks()}
    site.close()
    shutil.rmtree(site.folder)

    # The one that was made during merges: a state that was, in which the service goes on.
    assert restore(made, archive, mine, quiet) == made.objects
    earlier = exported(mine, tmp_path / "two")
    assert any(path.startswith("2/") for path in earlier)
    assert earlier.items() <= everything.items()
    shutil.rmtree(site.folder)

    assert restore(whole, archive, mine, quiet) == whole.objects
    assert exported(mine, tmp_path / "three") == everything
    assert service_identity(site.folder) == identity
    assert service_settings(site.folder) == mine
    again = Plant(site.folder, **places(site.folder))
    again.cluster = StandInCluster(again.settings, again.storages, site.plant.service)
    again.service = site.plant.service
    assert {task.task_id: task.state for task in again.queue.tasks()} == tasks
    again.submit("blue/new")
    again.run()
    assert again.states()["blue/new"] == "published"
    assert "blue/new" in again.held()
    assert "red/alpha" in again.held()
    again.queue.close()


def _task(site: Site, title: str) -> Any:
    from configs.task_spec import TaskSpec

    return TaskSpec.model_validate(site.document(title))


def test_a_bucket_takes_a_backup_and_a_folder_elsewhere_takes_it_back(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with moto_server("backups") as url:
        archive = archive_at("s3://backups/onebasis", site.plant.settings.storage, url)
        made, _ = make_backup(site.plant.settings, site.folder, archive, quiet)
        other = settings(tmp_path / "other", **places(tmp_path / "other"))
        found = read_backup(archive_at("s3://backups/onebasis", StorageSettings(), url))
        assert found == made
        restore(found, archive, other, quiet)
    assert exported(other, tmp_path / "one") == exported(site.plant.settings, tmp_path / "two")


class FullAfter(LocalStorage):
    """A disk that is full after some writes."""

    left = 5

    def write(self, key: str, content: bytes) -> None:
        if key.startswith("objects/"):
            if not self.left:
                raise Unavailable("the disk is full", key)
            self.left -= 1
        super().write(key, content)


def test_a_backup_that_was_cut_off_is_none_and_the_next_one_uses_what_it_copied(site: Site, tmp_path: Path) -> None:
    place = FullAfter(str(tmp_path / "backups"))
    with pytest.raises(Unavailable):
        make_backup(site.plant.settings, site.folder, Archive(place), quiet)
    cut_off = Archive(LocalStorage(str(tmp_path / "backups")))
    with pytest.raises(NotFound, match="cut off"):
        read_backup(cut_off)
    assert len(cut_off.cut_off()) == 1
    made, new = make_backup(site.plant.settings, site.folder, cut_off, quiet)
    assert 0 < new.objects < made.objects
    assert read_backup(cut_off) == made


def test_what_is_there_is_never_written_over(site: Site, tmp_path: Path) -> None:
    mine, archive = site.plant.settings, archive_at(f"file:{tmp_path}/backups", None)
    made, _ = make_backup(mine, site.folder, archive, quiet)
    with pytest.raises(Conflict, match="a service is here"):
        restore(made, archive, mine, quiet)
    elsewhere = settings(tmp_path / "new", **places(tmp_path / "new"))
    taken = elsewhere.model_copy(update={"database_url": mine.database_url})
    with pytest.raises(Conflict, match="tables of onebasis"):
        restore(made, archive, taken, quiet)
    with pytest.raises(Conflict, match="something is there"):
        restore(made, archive, elsewhere.model_copy(update={"storage": mine.storage}), quiet)
    assert not (tmp_path / "new/service_id").exists()


def test_until_a_restore_has_ended_nothing_starts_there_and_it_can_be_done_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_at(f"file:{tmp_path}/backups", None)
    made, _ = make_backup(site.plant.settings, site.folder, archive, quiet)
    other = settings(tmp_path / "other", **places(tmp_path / "other"))
    with monkeypatch.context() as broken:
        broken.setattr(backup, "load", lambda url, lines: (_ for _ in ()).throw(Unavailable("killed", "")))
        with pytest.raises(Unavailable):
            restore(made, archive, other, quiet)
    with pytest.raises(Conflict, match="being restored"):
        processes.up(other, quiet)
    with pytest.raises(Conflict, match="another restore"):
        restore(made, archive, other.model_copy(update={"production": False, "oidc": None, "teams": {}}), quiet)
    assert restore(made, archive, other, quiet) == made.objects
    assert not (tmp_path / "other" / RESTORE_FILE).exists()
    queue = TaskQueue(other.database_url)
    assert {task.title for task in queue.tasks()} == {"red/alpha", "blue/beta"}
    queue.close()


def test_a_backup_inside_of_the_store_is_refused(site: Site) -> None:
    archive = archive_at(f"file:{site.folder}/store/tiny/backups", None)
    with pytest.raises(backup.InvalidInput, match="lies in the store"):
        make_backup(site.plant.settings, site.folder, archive, quiet)


def test_the_commands_say_what_they_did(site: Site, tmp_path: Path) -> None:
    def run(*typed: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*typed, "--json", "--state-dir", str(site.folder)])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    place = str(tmp_path / "backups")
    assert run("restore", place, code=Exit.NOT_FOUND)["error"]["code"] == "not-found"
    made = run("backup", place)
    assert made["new_objects"] > 5
    assert run("backup", place)["new_bytes"] == 0
    assert run("restore", place, "--list")[0]["backup"] == made["backup"]
    assert run("restore", place, code=Exit.CONFLICT)["error"]["what"] == "a service is here"
    assert (tmp_path / "backups").stat().st_mode & 0o077 == 0
