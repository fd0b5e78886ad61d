"""A moment that a person types is read in one way, or refused with an example."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from configs.errors import InvalidInput
from orchestrator.commands.moments import moment, shown

NOON = 1_764_504_000.0  # 2025-11-30 12:00 UTC
NOW = NOON + 86_400


@pytest.fixture(autouse=True)
def _in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("typed", "at"),
    [
        ("2025-11-30T12:00:00Z", NOON),
        ("2025-11-30T13:00:00+01:00", NOON),
        ("2025-11-30 13:00", NOON),  # the machine's own time
        ("2025-11-30", NOON - 13 * 3600),  # the first moment of the day, in the machine's own time
        ("2025-11-30 13:00:00.5", NOON + 0.5),
        ("2h ago", NOW - 7200),
        ("1.5 d ago", NOW - 1.5 * 86_400),
        ("90s ago", NOW - 90),
        ("3 min ago", NOW - 180),
        ("1w ago", NOW - 7 * 86_400),
    ],
)
def test_a_moment_is_read(typed: str, at: float) -> None:
    assert moment(typed, NOW) == at


@pytest.mark.parametrize(
    "typed",
    ["", "yesterday", "11/30/2025", "30.11.2025", "2025-11-31", "2025-11", "20251130", "12:00", "2h", "2m ago",
     "-2h ago", "2025-11-30T12", "2025-11-30 12:00 CET", "1764504000", "2025-W48-7", "1h30min ago"],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused_with_examples(typed: str) -> None:
    with pytest.raises(InvalidInput, match=r"not a moment|is no unit") as refused:
        moment(typed, NOW)
    assert "'2h ago'" in str(refused.value)


def test_a_moment_to_come_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"2025-12-01 13:00:01\+01:00 has not come yet"):
        moment("2025-12-01T12:00:01Z", NOW)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("2025-10-26 02:30", ("2025-10-26T02:30:00+02:00", "2025-10-26T02:30:00+01:00")),  # the clocks went back
        ("2025-03-30 02:30", ("2025-03-30T01:30:00+01:00", "2025-03-30T03:30:00+02:00")),  # and forth
    ],
)
def test_a_local_time_that_was_twice_or_never_is_refused(typed: str, meant: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="the clocks here were changed") as refused:
        moment(typed, NOW)
    assert {at in str(refused.value) for at in meant} == {True}
    assert [moment(at, NOW) for at in meant] == sorted(moment(at, NOW) for at in meant)


def test_a_moment_is_shown_with_its_offset() -> None:
    assert shown(NOON) == "2025-11-30 13:00:00+01:00"
