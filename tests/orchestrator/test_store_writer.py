"""The store's writer is heard, and what it cannot do is told: nobody's task pays for a full disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.errors import InvalidInput, StoreFull, StoreReadOnly, Unavailable
from orchestrator import candidate, store_writer, subspace
from orchestrator.controller import Controller
from orchestrator.subspace import tell
from subspace_store import SubspaceStore
from tests.builders import with_pools
from tests.orchestrator.plant import Plant

MakePlant = Callable[..., Plant]


def codes(plant: Plant) -> set[str]:
    return {str(alarm.code) for alarm in plant.controller.alarms}


def leased(plant: Plant, seconds: float) -> Plant:
    plant.settings = with_pools(plant.settings, lease_seconds=seconds)
    return plant


def test_a_silent_writer_rings_and_is_replaced_when_its_lease_ends(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(store_writer, "SILENT_SECONDS", 0.0)
    leased(plant, 0.2)
    plant.step(3)
    assert codes(plant) == set()
    plant.cluster.silent = {"store"}
    plant.run(lambda: "store-writer-silent" in codes(plant), 10)
    assert plant.cluster.replaced == []
    plant.run(lambda: plant.cluster.replaced == ["store"], 10)
    plant.run(lambda: codes(plant) == set(), 10)


def test_a_writer_that_cannot_open_the_store_is_told_of_before_any_task(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "RETRY_SECONDS", 0.0)
    refuses = True

    def opened(base_model: str) -> SubspaceStore:
        if refuses:
            raise StoreReadOnly("the file system refused: Read-only file system", "/store/log/0.json")
        return really(base_model)

    really = plant.cluster._open_store
    monkeypatch.setattr(plant.cluster, "_open_store", opened)
    plant.run(lambda: codes(plant) == {"store-read-only"}, 10)
    (alarm,) = plant.controller.alarms
    assert "Read-only file system" in alarm.what
    refuses = False
    plant.run(lambda: codes(plant) == set(), 10)


@pytest.mark.parametrize("error", [StoreFull, StoreReadOnly, Unavailable, InvalidInput, RuntimeError])
def test_a_publication_that_cannot_be_written_rings_and_goes_on_when_it_can(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(candidate, "FULL_SECONDS", 0.0)
    really, refuses = SubspaceStore.publish, True

    def publish(store: SubspaceStore, *args: Any, **options: Any) -> Any:
        if refuses:
            raise error("the cause is this")
        return really(store, *args, **options)

    monkeypatch.setattr(SubspaceStore, "publish", publish)
    plant.submit("red/alpha")
    plant.run(lambda: codes(plant) != set(), 10)
    (alarm,) = plant.controller.alarms
    assert "the cause is this" in alarm.what
    plant.step(10)
    assert len(list(plant.controller.alarms)) == 1
    refuses = False
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert plant.get("red/alpha").attempt == 1
    assert codes(plant) == set()


def test_a_small_record_that_takes_long_to_write_rings_until_one_is_quick(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, "SLOW_SECONDS", 0.0)
    plant.submit("red/alpha")
    plant.run()
    assert codes(plant) == {"store-slow"}
    (alarm,) = plant.controller.alarms
    assert "'publish', one small record, took 0 s: the storage is slow" in alarm.what
    monkeypatch.setattr(candidate, "SLOW_SECONDS", 60.0)
    plant.submit("red/beta")
    plant.run()
    assert codes(plant) == set()


class NoDeletes:
    """A storage that lets nobody delete."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def delete(self, key: str) -> None:
        raise StoreReadOnly("the file system refused", key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_storage_that_lets_nobody_delete_stops_no_task(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "DELETE_AGAIN_SECONDS", 0.0)
    plant.wrap = lambda name, part: NoDeletes(part) if name == "storage" else part
    plant.submit("red/alpha", "blue/beta")
    plant.run()
    assert set(plant.states().values()) == {"published"}
    assert codes(plant) == {"store-read-only"}


def test_a_step_that_fails_rings_with_what_the_loop_was_doing(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    loop = plant.controller
    monkeypatch.setattr(Controller, "_train", broken)
    for _ in range(3):
        try:
            loop.step()
        except ZeroDivisionError as error:
            tell(error, loop.alarms, loop.doing)
        loop.wake()
    (alarm,) = loop.alarms
    assert alarm.code == "step-failed"
    assert "giving orders: ZeroDivisionError: a bug" in alarm.what
