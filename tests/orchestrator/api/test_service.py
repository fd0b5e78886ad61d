"""What the service does beside its answers: it notices what is wrong, and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from configs.errors import Corrupt, NotLeading, OnebasisError, StoreFull, StoreReadOnly, Unavailable
from configs.settings import ServingSettings, Settings
from orchestrator.alarms import AlarmCode
from orchestrator.api import latest
from orchestrator.api.requests import Export, PreviewRollback, Reload, Status, Submit
from orchestrator.api.service import Service
from orchestrator.commands import display
from orchestrator.leadership import StandsBy
from orchestrator.serving.deployment import Deployment
from orchestrator.tasks.task_queue import TaskQueue
from subspace_store import Storage, SubspaceStore
from subspace_store.commands.state_folder import SETTINGS_FILE
from subspace_store.requests import Rollback, Tag
from tests.builders import BASE, task_spec
from tests.orchestrator.plant import Plant


def service_of(plant: Plant) -> Service:
    return Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)


@pytest.fixture
def damaged(plant: Plant) -> Plant:
    """Three published versions. The files that the first one wrote are deleted, of which the others need some."""
    for title in ("red/alpha", "blue/beta", "red/gamma"):
        plant.submit(title)
        plant.run()
    for key in plant.storage.keys("blobs/"):
        if key in {ref.key for ref in plant.state.versions[1].blobs}:
            plant.storage.delete(key)
    return plant


def test_a_rollback_to_a_version_whose_files_are_gone_is_refused_and_the_damage_stops_all_writing(
    damaged: Plant,
) -> None:
    service = service_of(damaged)
    preview = service.answer(PreviewRollback(version=1))
    assert "version 1 needs" in preview["refused"]
    assert not list(damaged.controller.alarms)  # a preview is refused, and only that
    with pytest.raises(Corrupt, match="version 1 needs"):
        service.answer(Rollback(version=1, actor="ann", op_key="rollback:1"))
    assert damaged.state.refs["main"] == 3
    assert [alarm.code for alarm in damaged.controller.alarms] == [AlarmCode.STORE_DAMAGED]
    damaged.submit("blue/delta")
    damaged.run(until=lambda: damaged.states()["blue/delta"] == "merging")
    damaged.step(20)
    assert damaged.states()["blue/delta"] == "merging"
    assert damaged.cluster.store_calls.count("merge") == 3


class RayServe:
    """Stands for a `Deployment` whose Ray Serve hangs, or fails: a real one does neither on demand."""

    def __init__(self, error: Exception | None) -> None:
        self._error, self.may_answer = error, threading.Event()

    def facts(self, settings: Settings) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        self.may_answer.wait(20)
        return {"url": settings.serving.url, "state": "running", "base_models": {}} if settings.serving else {}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, "no answer within 0 s"),
        (RuntimeError("the controller is gone"), "RuntimeError: the controller is gone"),
        (Unavailable("Ray is away"), "Ray is away"),
    ],
)
def test_a_status_does_not_wait_for_ray_serve_and_says_that_it_does_not_answer(
    make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch, error: Exception | None, told: str
) -> None:
    monkeypatch.setattr(latest, "LOOK_SECONDS", 0.05)
    plant, hangs = make_plant(serving={"port": 1}), RayServe(error)
    deployment = cast("Deployment", hangs)
    service = Service(
        plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster, deployment=deployment
    )
    serving = service.answer(Status())["serving"]
    assert serving == {"url": "http://127.0.0.1:1", "state": "unknown", "message": told, "base_models": {}}
    if error is None:
        monkeypatch.setattr(latest, "LOOK_SECONDS", 10.0)
        hangs.may_answer.set()
        assert service.answer(Status())["serving"]["state"] == "running"


class Taken:
    """Stands for a `Deployment` where somebody else listens at the new address."""

    def __init__(self) -> None:
        self.followed = 0

    def check(self, settings: Settings) -> None:
        raise Unavailable("something else listens there")

    def follow(self, settings: Settings) -> None:
        self.followed += 1


def test_an_address_that_is_taken_is_refused_before_the_settings_are_kept(make_plant: Callable[..., Plant]) -> None:
    plant, deployment = make_plant(serving={"port": 8101}), Taken()
    service = Service(
        plant.settings,
        plant.queue,
        plant.storages,
        plant.controller,
        plant.cluster,
        deployment=cast("Deployment", deployment),
    )
    before = service.settings
    changed = before.model_copy(update={"serving": ServingSettings(port=8102)})
    with pytest.raises(Unavailable, match="something else listens there"):
        service.answer(Reload(settings=changed))
    assert (service.settings, deployment.followed) == (before, 0)
    assert not (Path(before.state_dir) / SETTINGS_FILE).exists()


def test_tasks_of_main_that_a_new_task_database_does_not_know_are_counted(
    plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for title in ("red/alpha", "blue/beta"):
        plant.submit(title)
        plant.run()
    assert service_of(plant).answer(Status())["not_in_database"] == 0
    empty = TaskQueue(f"sqlite:///{tmp_path}/new.sqlite", plant.settings.failures)
    told = Service(plant.settings, empty, plant.storages).answer(Status())
    assert (told["main"], told["not_in_database"], told["tasks"]) == (2, 2, {})
    display.status(told)
    assert "main (version 2) holds 2 tasks that the task database does not know" in capsys.readouterr().out


class Refusing:
    """A storage that takes no writes while `error` is set."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.error: OnebasisError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def write(self, key: str, content: bytes) -> None:
        if self.error is not None:
            raise self.error
        self._storage.write(key, content)


def test_an_alarm_about_a_refused_request_names_it_and_ends_when_there_is_room(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.submit("red/alpha")
    plant.run()
    storage = Refusing(plant.storage)
    service = Service(plant.settings, plant.queue, {BASE: cast("Storage", storage)}, plant.controller, plant.cluster)

    def told() -> list[tuple[str, str]]:
        return [(alarm.code, alarm.what) for alarm in plant.controller.alarms]

    for error in (StoreFull("no space left", "disk"), StoreReadOnly("no right to write", "disk")):
        storage.error = error

        def refused(*_: Any, error: OnebasisError = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(SubspaceStore, "tag", refused)
        with pytest.raises(type(error)):
            service.answer(Tag(name="gold", version=1, actor="ann"))
        service.look()  # there is no room yet; and of two causes, the last is told
        assert told() == [(error.code, f"'tag' was refused: {error.sentence}")]
    storage.error = None
    service.look()
    assert told() == []
    assert plant.storage.keys("doctor/") == []


def test_what_a_person_finds_damaged_is_an_alarm_from_then_on(damaged: Plant) -> None:
    with pytest.raises(Corrupt):
        service_of(damaged).answer(Export(reference="red/alpha"))
    assert damaged.controller.alarms.rings(AlarmCode.STORE_DAMAGED)


def test_a_control_plane_that_stands_by_says_why_it_cannot_even_try_a_submission(plant: Plant) -> None:
    refusal = NotLeading("this control plane stands by, and changes nothing: other leads", "", "give the command there")
    stands_by = Service(plant.settings, plant.queue, plant.storages, stands_by=lambda: StandsBy("other", refusal))
    for dry_run in (True, False):
        with pytest.raises(NotLeading, match="other leads") as told:
            stands_by.answer(Submit(task=task_spec(), dry_run=dry_run))
        assert ("a dry run is checked against the base model" in str(told.value)) is dry_run
