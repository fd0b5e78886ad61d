"""Each alarm says since when, of what and what to do; it rings once for all tries, and ends when the thing works."""

from __future__ import annotations

import logging

import pytest

from configs.errors import Corrupt, DatabaseAway, InvalidInput, OwnedByAnother, StoreFull, StoreReadOnly, Unavailable
from orchestrator.alarms import NEXT_STEP, AlarmCode, Alarms, code_of


def test_an_alarm_that_rings_again_keeps_its_beginning_and_takes_the_newer_cause() -> None:
    alarms = Alarms()
    alarms.ring(AlarmCode.STORE_FULL, "merging", "no space left", "make space")
    (first,) = alarms
    alarms.ring(AlarmCode.STORE_FULL, "merging", "still no space left", "make space")
    (again,) = alarms
    assert (again.since, again.what) == (first.since, "still no space left")
    assert str(again) == "store-full: still no space left → make space (docs/trouble.md#store-full)"
    alarms.end(AlarmCode.STORE_FULL, "merging")
    alarms.end(AlarmCode.STORE_FULL, "merging")
    assert list(alarms) == []


def test_what_is_tried_a_hundred_times_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms()
    with caplog.at_level(logging.INFO, "onebasis.alarms"):
        for _ in range(100):
            alarms.ring(AlarmCode.LOAD_FAILED, "worker-0", "pad token 50257 is outside the embeddings")
        alarms.end(AlarmCode.LOAD_FAILED, "worker-0")
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_the_same_code_rings_for_each_part_of_the_service() -> None:
    alarms = Alarms()
    for name in ("worker-0", "worker-1"):
        alarms.ring(AlarmCode.WORKER_SILENT, name, f"{name} does not answer")
    alarms.end(AlarmCode.WORKER_SILENT, "worker-0")
    assert [alarm.about for alarm in alarms] == ["worker-1"]
    assert alarms.rings(AlarmCode.WORKER_SILENT)
    assert not alarms.rings(AlarmCode.RAY_DOWN)


def test_every_code_has_a_next_step() -> None:
    assert set(NEXT_STEP) == set(AlarmCode)
    assert all(NEXT_STEP.values())


def test_an_error_of_the_store_or_the_database_is_one_alarm() -> None:
    errors = {
        StoreFull("full"): AlarmCode.STORE_FULL,
        StoreReadOnly("read-only"): AlarmCode.STORE_READ_ONLY,
        DatabaseAway("locked"): AlarmCode.DATABASE_AWAY,
        Unavailable("no route"): AlarmCode.STORE_AWAY,
        Corrupt("another sha256"): AlarmCode.STORE_DAMAGED,
        OwnedByAnother("taken", "", "", "id", "there", 0.0): AlarmCode.OUSTED,
        InvalidInput("no such bucket"): AlarmCode.STORE_UNUSABLE,
    }
    assert {error: code_of(error) for error in errors} == errors
