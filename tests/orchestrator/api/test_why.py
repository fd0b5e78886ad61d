"""Why a task waits: one reason of several, always by the same order, and the sentence that is made of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from orchestrator.alarms import AlarmCode
from orchestrator.api.why import Surroundings, wait_of, why
from orchestrator.scheduling.estimate import Estimate, Pace
from orchestrator.scheduling.reasons import WHO, Wait, WaitCode, Who, first_of
from orchestrator.tasks.task_record import Pause, TaskRecord, TaskState
from subspace_store.log.version import Hold
from tests.builders import task_record

HELD = Hold(actor="ann", reason="audit", time=900.0)
FULL = {AlarmCode.STORE_FULL: "store-full: no space left"}
START = Estimate(120.0, 60.0, 600.0, 120.0)


def around(**facts: Any) -> Surroundings:
    return Surroundings(**{"is_running": True, "place": 3, "pace": Pace(90.0, 7), "start": START} | facts)


def decided(code: WaitCode, **facts: Any) -> Surroundings:
    return around(decided=Wait(code=code, **facts), titles={"t9": "blue/large"}, idle_causes=["loading", "loading"])


REST = (
    "place 3, 2 before it; starts in about 2 min, in four of five cases between 60 s and 10 min (it takes about 90 s, "
    "by the last 7 tasks like it)"
)
THEN = REST.removeprefix("place 3, 2 before it; ")
AT = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(5000.0))


@pytest.mark.parametrize(
    ("record", "facts", "code", "said"),
    [
        (task_record(), decided(WaitCode.NO_FREE_PLACE), "no-free-place", f"all places are in use; {REST}"),
        (
            task_record(),
            decided(WaitCode.OVER_QUOTA),
            "over-quota",
            f"its team has its quota, and others leave it nothing to borrow; {REST}",
        ),
        (
            task_record(),
            decided(WaitCode.OVER_QUOTA, until=5000.0),
            "over-quota",
            f"gave its place back, and borrows none before {AT}; {REST}",
        ),
        (
            task_record(),
            decided(WaitCode.OVER_QUOTA, until=5000.0, about="t9"),
            "over-quota",
            "its team has its quota; before it borrows blue/large, which gave its place back and borrows none before "
            f"{AT}; {REST}",
        ),
        (
            task_record(),
            decided(WaitCode.DRAINED, about="worker-0 is drained by ann"),
            "drained",
            "no worker is left: worker-0 is drained by ann",
        ),
        (task_record(), decided(WaitCode.NO_MACHINE), "no-machine", "no machine has room for a worker: loading"),
        (
            task_record(),
            decided(WaitCode.RESERVED_FOR, about="t9"),
            "reserved-for",
            f"free places are kept for blue/large; {REST}",
        ),
        (
            task_record(),
            decided(WaitCode.RESERVED_FOR),
            "reserved-for",
            f"free places are kept for a version that is about to be scored; {REST}",
        ),
        (
            task_record(),
            decided(WaitCode.ABOUT_TO_START, about="t9"),
            "about-to-start",
            f"is about to start, when blue/large has written its checkpoint; {REST}",
        ),
        (
            task_record(),
            around(decided=Wait(code=WaitCode.NEVER_FITS), pools={"small": "1 rank of 2 CPUs"}),
            "never-fits",
            "no pool of its base model takes it; there are: 'small', 1 rank of 2 CPUs",
        ),
        (
            task_record(),
            decided(WaitCode.BASE_MODEL_LOADING),
            "base-model-loading",
            f"no worker is ready: loading; {THEN}",
        ),
        (
            task_record(not_due=True, spec={"not_before": "1970-01-01T01:23:20Z"}),
            around(),
            "not-before",
            f"is not started before {AT}; {THEN}",
        ),
        (
            task_record(awaits=("t9", "t7"), reason="lost"),
            around(titles={"t9": "blue/large"}, start=None),
            "dependency",
            "comes after blue/large, t7; last attempt: lost",
        ),
        (
            task_record(paused=Pause(by="ann", at=900.0)),
            around(),
            "paused",
            "it is paused by ann: no reason given",
        ),
        (
            task_record(state=TaskState.TRAINING, token="t", worker="worker-1"),
            around(phase="waiting"),
            "gang-incomplete",
            "worker-1 waits for places for its ranks; the task's log says for what",
        ),
        (
            task_record(state=TaskState.EVALUATING, version=4),
            around(held=HELD),
            "held",
            "version 4 waits: main is held by ann: audit",
        ),
        (
            task_record(state=TaskState.MERGING),
            around(alarms=FULL),
            "store-alarm",
            "waits for the store: store-full: no space left",
        ),
        (
            task_record(state=TaskState.MERGING),
            around(alarms=FULL | {AlarmCode.STORE_AWAY: "store-away: gone"}),
            "storage-away",
            "waits for the store: store-away: gone",
        ),
    ],
)  # fmt: skip
def test_a_reason_is_a_record_and_a_sentence(record: TaskRecord, facts: Surroundings, code: str, said: str) -> None:
    wait = wait_of(record, facts)
    assert wait is not None
    assert wait.code == code
    assert why(record, facts) == said


def test_of_several_reasons_the_first_in_the_list_is_told() -> None:
    record = task_record(
        awaits=("t9",), not_due=True, spec={"not_before": "1970-01-01T01:23:20Z"}, paused=Pause(by="ann", at=3.0)
    )
    service = {"": Pause(by="bob", reason="maintenance", at=1.0), "red": Pause(by="cid", at=2.0)}
    told = []
    for facts in (around(held=HELD, pauses=service), around(pauses=service), around(pauses={"red": service["red"]})):
        wait = wait_of(record, facts)
        assert wait is not None
        told.append((str(wait.code), wait.about.split(" by ")[1], wait.since))
    assert told == [
        ("held", "ann: audit", 900.0),
        ("paused", "bob: maintenance", 1.0),
        ("paused", "cid: no reason given", 2.0),
    ]
    lifted = record.model_copy(update={"paused": None})
    assert [wait.code for wait in (wait_of(lifted, around()),) if wait] == [WaitCode.DEPENDENCY]
    assert first_of(*(Wait(code=code) for code in reversed(WaitCode))) == Wait(code=WaitCode.HELD)
    assert first_of(None, None) is None


def test_nobody_waits_for_anything_where_no_service_runs_or_nothing_is_to_be_done() -> None:
    assert wait_of(task_record(), around(is_running=False)) is None
    assert why(task_record(), around(is_running=False)) == "the service is not running; `onebasis up` starts it"
    for state in (TaskState.PUBLISHED, TaskState.PARKED, TaskState.TRAINING):
        assert wait_of(task_record(state=state, token="t"), around(alarms=FULL)) is None


def test_a_start_that_nobody_can_know_is_not_guessed() -> None:
    without = decided(WaitCode.NO_FREE_PLACE)
    assert why(task_record(), Surroundings(is_running=True, place=1, decided=without.decided)).endswith(
        "its start cannot be estimated: no task has been trained here yet"
    )
    far = Surroundings(is_running=True, place=2000, pace=Pace(9.0, 1), decided=without.decided)
    assert why(task_record(), far).endswith("place 2000, 1999 before it; its start is not known")


def test_every_reason_says_who_can_change_it() -> None:
    assert set(WHO) == set(WaitCode)
    assert {Wait(code=code).who for code in WaitCode} == set(Who)


def test_a_team_ends_its_own_pause_and_not_that_of_the_service() -> None:
    pause = Pause(by="ann", at=1.0, reason="")
    of_team, of_all = (wait_of(task_record("red/a"), around(pauses={who: pause})) for who in ("red", ""))
    of_task = wait_of(task_record("red/a", paused=pause), around())
    assert [wait.who for wait in (of_team, of_all, of_task) if wait] == [Who.TEAM, Who.PLATFORM, Who.TEAM]
