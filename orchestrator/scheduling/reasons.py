"""Why a task waits, as a record for programs. The sentence that people read is made from it in api/why.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WaitCode(StrEnum):
    """Why a task waits. Of several that hold at once the first of this list is told; each is a row of
    docs/trouble.md."""

    HELD = "held"
    """Somebody holds `main`."""
    CANARY = "canary"
    """Its version passed the gate, and its canary has not answered enough requests."""
    PAUSED = "paused"
    """The task, its team or the service is paused."""
    DEPENDENCY = "dependency"
    """A task that it comes after is not published yet."""
    NOT_BEFORE = "not-before"
    """Its `not_before` has not come."""
    NEVER_FITS = "never-fits"
    """Its pool has too few places for it, or is no longer in the settings."""
    DRAINED = "drained"
    """Its pool has no worker: those that there were, or the machines that have room for others, are drained."""
    OVER_QUOTA = "over-quota"
    """Its team has its quota, and others leave it nothing to borrow."""
    NO_FREE_PLACE = "no-free-place"
    """All places of its pool that are ready are in use."""
    GANG_INCOMPLETE = "gang-incomplete"
    """Its worker, or the first one of its pool, waits for places for some of its ranks."""
    NO_MACHINE = "no-machine"
    """The workers of its pool wait for a machine that has room for them."""
    RESERVED_FOR = "reserved-for"
    """The free places are kept for a larger task, or for a version that is about to be scored."""
    BASE_MODEL_LOADING = "base-model-loading"
    """No worker of its pool has loaded the base model."""
    STORAGE_AWAY = "storage-away"
    """The store, or the task database, does not answer."""
    STORE_ALARM = "store-alarm"
    """The store does not take what is to be written."""
    ABOUT_TO_START = "about-to-start"
    """It gets the next place: nothing else keeps it."""


class Who(StrEnum):
    """People who can do something about it."""

    TEAM = "team"
    """The team that the task belongs to."""
    PLATFORM = "platform"
    """Those who run the service."""
    NOBODY = "nobody"
    """It ends by itself."""


WHO: dict[WaitCode, Who] = {
    WaitCode.HELD: Who.PLATFORM,
    WaitCode.CANARY: Who.NOBODY,
    WaitCode.PAUSED: Who.TEAM,
    WaitCode.DEPENDENCY: Who.TEAM,
    WaitCode.NOT_BEFORE: Who.TEAM,
    WaitCode.NEVER_FITS: Who.TEAM,
    WaitCode.DRAINED: Who.PLATFORM,
    WaitCode.OVER_QUOTA: Who.PLATFORM,
    WaitCode.NO_FREE_PLACE: Who.NOBODY,
    WaitCode.GANG_INCOMPLETE: Who.PLATFORM,
    WaitCode.NO_MACHINE: Who.PLATFORM,
    WaitCode.RESERVED_FOR: Who.NOBODY,
    WaitCode.BASE_MODEL_LOADING: Who.NOBODY,
    WaitCode.STORAGE_AWAY: Who.PLATFORM,
    WaitCode.STORE_ALARM: Who.PLATFORM,
    WaitCode.ABOUT_TO_START: Who.NOBODY,
}
_PRECEDENCE = {code: place for place, code in enumerate(WaitCode)}


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Why one task waits."""

    code: WaitCode
    pool: str = ""
    """Pool whose places it waits for; empty where the reason is another."""
    about: str = ""
    """Name of what it waits for: a task, a person with a reason, an alarm's text; empty where there is none."""
    since: float | None = None
    """Unix time from which on this has been the reason; None: not known."""
    until: float | None = None
    """Unix time at which it ends by itself; None: not known."""

    is_of_service: bool = False
    """Whether it concerns the whole service, so that a team alone can do nothing about it."""

    @property
    def who(self) -> Who:
        """People who can do something about it."""
        return Who.PLATFORM if self.is_of_service else WHO[self.code]


def first_of(*waits: Wait | None) -> Wait | None:
    """The reason that is told of several; None where there is none."""
    return min(filter(None, waits), key=lambda wait: _PRECEDENCE[wait.code], default=None)
