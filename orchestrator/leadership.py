"""Which of several control planes of one service leads: what each does about it, and what a leader may still do.

Control planes on several machines share one Postgres database. One of them leads: it runs the loop and takes what
people order. The others stand by: they answer what only reads, and one of them leads when the lease is not prolonged
any more. Nothing here trusts a clock of a machine: a lease ends by the database's clock, and a leader that stood still
(stopped, suspended, cut off) is stopped in three ways, of which each is enough for what it guards:

* in SQL, each of its transactions names its number, and is refused once another leader has a higher one (`Database`);
* the store's writer takes no request of a leader with a lower number than it has heard of (`StoreActor`);
* it gives no order to the cluster after the time for which its lease was last prolonged (`Leadership.check`): by its
  own monotonic clock, counted from before it asked.

What to do is the pure `next_move`. With SQLite, or alone on Postgres, a control plane leads at once and always.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from configs.errors import Conflict, InvalidInput, NotLeading, OnebasisError
from configs.settings import Settings
from orchestrator.tasks.leader_lease import LEASE_SECONDS, LeaderLease, Member, Seen, Standing

log = logging.getLogger("onebasis.leadership")

BEAT_SECONDS = 1.0
"""Interval at which a leader prolongs its lease, five times within it."""
LOOK_SECONDS = 0.5
"""Interval at which the others look whether it is over."""
OWN = frozenset({"state_dir", "data_roots", "database_url", "mlflow", "server"})
"""Sections in which the control planes of a service may differ: folders and addresses of their machines."""


class Move(StrEnum):
    """What a control plane does about the lease now."""

    PROLONG = "prolong"
    TAKE = "take"
    STAND_BY = "stand by"
    STEP_DOWN = "step down"


def next_move(seen: Seen, member_id: str, fence: int | None) -> Move:
    """What to do.

    Args:
        fence: Number under which this control plane leads; None: it stands by.
    """
    if fence is not None:
        return Move.PROLONG if seen.fence == fence else Move.STEP_DOWN
    # Its own lease: an earlier process of the same folder had it, which is gone, since its lock on the folder is ours.
    return Move.TAKE if seen.is_over or seen.holder == member_id else Move.STAND_BY


def shared_settings(settings: Settings) -> str:
    """What all control planes of a service must have alike, as JSON."""
    values = settings.model_dump(mode="json", exclude={*OWN})
    values["ray"].pop("auth_token_path")
    return json.dumps(values, sort_keys=True)


def refuse_other_settings(seen: Seen, member_id: str, settings: Settings) -> None:
    """Refuse to join control planes that run with other settings, or on another Ray.

    Raises:
        InvalidInput: With the sections that differ.
    """
    others = [member.name for member in seen.present if member.member_id != member_id]
    if not others or not seen.settings:
        return
    if settings.ray.address == "local":
        what = f"is `local`, and another control plane of this service runs: {', '.join(others)}"
        raise InvalidInput(what, "ray.address", "all of them have to name one Ray cluster, HOST:PORT of its head")
    ours, theirs = json.loads(shared_settings(settings)), json.loads(seen.settings)
    if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        what = f"these settings are not those of the control plane that runs already, {', '.join(others)}"
        raise InvalidInput(what, ", ".join(differing), "make them alike; or end the others first")


@dataclass(frozen=True)
class StandsBy:
    """What a control plane that stands by says of the one that leads."""

    leader: str
    """Its name, for people."""
    refusal: NotLeading
    """The error for what only the leader does."""


class Leadership:
    """One control plane's part in it. `step` again and again, from one thread; everything else from any.

    Args:
        begin: Called with the new number when this control plane leads.
        end: Called when it no longer does.
    """

    def __init__(
        self,
        lease: LeaderLease,
        member: Member,
        settings: str,
        begin: Callable[[int], None],
        end: Callable[[], None],
    ) -> None:
        self._lease = lease
        self._member = member
        self._settings = settings
        self._begin = begin
        self._end = end
        self._fence: int | None = None
        self._holds_until = 0.0
        """Monotonic time until which nobody else can lead."""
        self._is_away = False
        self.seen: Seen | None = None

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop."""
        while not stop.wait(LOOK_SECONDS if self._fence is None else BEAT_SECONDS):
            try:
                self.step()
                self._is_away = False
            except OnebasisError as error:
                if not self._is_away:
                    log.error("who leads cannot be read: %s", error)
                self._is_away = True
            except Exception:
                log.exception("a step of the leadership failed; it is tried again")

    def step(self) -> None:
        """Look, and do the next move."""
        asked = time.monotonic()
        self._lease.beat(self._member)
        self.seen = seen = self._lease.look()
        match next_move(seen, self._member.member_id, self._fence):
            case Move.PROLONG:
                assert self._fence is not None
                if not self._prolong(self._fence):
                    self._step_down()
            case Move.TAKE:
                fence = self._lease.take(seen, self._member, self._settings)
                if fence is not None:
                    log.info("this control plane leads, as number %d", fence)
                    self._fence, self._holds_until = fence, asked + LEASE_SECONDS
                    self.seen = self._lease.look()
                    self._begin(fence)
            case Move.STEP_DOWN:
                self._step_down()

    def _step_down(self) -> None:
        log.warning("another control plane leads by now: this one stands by")
        self._fence = None
        self._end()

    def check(self, fence: int) -> None:
        """Refuse an order to the cluster that another leader could have to answer for.

        Raises:
            NotLeading: The lease of this number is not known to hold now.
        """
        if self._fence != fence or not (time.monotonic() < self._holds_until or self._held_again(fence)):
            raise NotLeading(
                "this control plane could not prolong its lease, and gives no order", todo="wait: another one leads"
            )

    def _held_again(self, fence: int) -> bool:
        """Prolong the lease now: once the database is back, the next order does not wait for the next step."""
        try:
            return self._prolong(fence)
        except OnebasisError:
            return False

    def _prolong(self, fence: int) -> bool:
        asked = time.monotonic()
        if held := self._lease.prolong(fence):
            self._holds_until = asked + LEASE_SECONDS
        return held

    @property
    def leads(self) -> bool:
        return self._fence is not None

    def others(self) -> tuple[Standing, ...]:
        """The other control planes that are there, by age."""
        present = self.seen.present if self.seen else ()
        return tuple(member for member in present if member.member_id != self._member.member_id)

    def follow(self, settings: str) -> None:
        """Lead with these settings from now on (`shared_settings`), which others have to have to join.

        Raises:
            Conflict: Others stand by, with the old ones.
        """
        if others := self.others():
            names = ", ".join(member.name for member in others)
            what = f"other control planes of this service run with the old settings: {names}"
            raise Conflict(what, "", "`onebasis down` there, reload here, then `onebasis up --config FILE` there")
        self._settings = settings
        if self._fence is not None:
            self._lease.keep_settings(self._fence, settings)

    def give_up(self) -> None:
        """Lead no longer, so that another may at once."""
        if (fence := self._fence) is not None:
            self._fence = None
            self._lease.give_up(fence)

    def leave(self) -> None:
        """Give the lease up, if it is this control plane's, and go."""
        self.give_up()
        self._lease.leave(self._member)

    def stands_by(self) -> StandsBy:
        """What this control plane answers for the leader while it stands by."""
        seen = self.seen
        if seen is None or not seen.holder or seen.is_over:
            what, todo = "this control plane stands by, and none leads at the moment", "try again in some seconds"
            return StandsBy("the next leader", NotLeading(what, "", todo))
        what = f"this control plane stands by, and changes nothing: {seen.name} leads ({seen.url})"
        todo = "give the command there; here `status`, `tasks`, `versions` and all that only reads are answered"
        return StandsBy(seen.name, NotLeading(what, "", todo))

    def as_dict(self) -> dict[str, Any] | None:
        """Who leads, since when, and who stands by, as plain values; None before the first look."""
        role = "leads" if self.leads else "stands by"
        return None if self.seen is None else leadership_json(self.seen, role)


def leadership_json(seen: Seen, role: str) -> dict[str, Any]:
    """Who leads, since when, and who stands by, as plain values.

    Args:
        role: What the control plane that says so does, `leads` or `stands by`; empty: it is down.
    """
    led = bool(seen.holder) and not seen.is_over
    leader = {"name": seen.name, "url": seen.url, "since": seen.since, "number": seen.fence} if led else None
    standing_by = [
        {"name": member.name, "url": member.url, "since": member.since}
        for member in seen.present
        if not led or member.member_id != seen.holder
    ]
    return {"role": role, "leader": leader, "standing_by": standing_by}
