"""Waits, before a version is published, until a canary has answered enough of what is really asked by it.

The canary answers by `candidate` from the moment at which a version is merged. What the replicas have counted is asked
in a thread of its own, so that the loop waits for nobody. How well the answers agree decides nothing here: people look
at it while the version waits (`onebasis scores`), and a program may be asked (`gate.pre_publish`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from configs.settings import GateSettings

log = logging.getLogger("onebasis.controller")

Facts = Mapping[str, Any]
ALL = ""
"""Stands for all tasks together, where a title would stand."""
LOOK_SECONDS = 2.0
"""Interval at which the replicas are asked."""


def answered(facts: Facts, base_model: str, version: int, revised: Collection[str]) -> dict[str, int]:
    """How many requests a canary has answered by a version: of each revision that it brings, by its title; of a version
    that brings none, of all tasks together. A task that `main` does not hold yet has nobody who asks for it.

    Args:
        facts: What `Deployment.facts` says.
    """
    found = facts.get("canary", {}).get(base_model)
    if found is None or found["version"] != version:
        return dict.fromkeys(revised or (ALL,), 0)
    if not revised:
        return {ALL: found["canary"]["requests"]}
    return {title: found["tasks"].get(title, {}).get("requests", 0) for title in revised}


class CanaryTrial:
    """See the module; of the versions of one base model.

    Args:
        ask: What answers over HTTP, as `Deployment.facts` says it. May wait, and raise anything.
        wake: Called when enough has been answered, from any thread.
    """

    def __init__(self, base_model: str, ask: Callable[[], Facts], wake: Callable[[], None]) -> None:
        self._base_model, self._ask, self._wake = base_model, ask, wake
        self._version = 0
        self._most: dict[str, int] = {}
        """The most that was ever told of the version: a replica that ends takes its numbers along."""
        self._figures: Facts | None = None
        """What the replicas said of the version last."""
        self._told: dict[int, str] = {}
        self._looked_at = -LOOK_SECONDS
        self._looking: threading.Thread | None = None
        self.waiting: tuple[int, str, float] | None = None
        """Version that waits, how far it is, for people, and the Unix time until which it waits."""

    def is_over(self, version: int, revised: Collection[str], since: float, settings: GateSettings) -> bool:
        """Whether a version has been tried enough, or for long enough. Never waits.

        Args:
            revised: Titles of the tasks of which it brings a revision.
            since: Unix time at which it was merged: since then the canary answers by it.
        """
        least = settings.canary_requests_min
        if least is None:
            self.waiting = None
            return True
        if version != self._version:
            self._version, self._most, self._figures = version, {}, None
        known = {one: self._most.get(one, 0) for one in (*revised,) or (ALL,)}
        far, until = _told(known, least), since + settings.canary_seconds_max
        if all(count >= least for count in known.values()) or time.time() >= until:
            is_enough = all(count >= least for count in known.values())
            limit = "" if is_enough else f", and gate.canary_seconds_max ({settings.canary_seconds_max:g} s) is over"
            self._told = {version: f"the canary answered {far}{limit}"}
            self.waiting = None
            return True
        if self.waiting is None or self.waiting[0] != version:
            log.info("version %d of %s passed the gate, and waits for its canary", version, self._base_model)
        self.waiting = (version, f"its canary has answered {far}", until)
        self._look(version, tuple(revised), least)
        return False

    def told(self, version: int) -> str:
        """What the trial of a version ended with, for people; empty where there was none."""
        return self._told.get(version, "")

    def figures(self, version: int) -> Facts | None:
        """How the canary has answered by a version, as `status` shows it; None: nothing was heard of it."""
        return self._figures if version == self._version else None

    def _look(self, version: int, revised: Collection[str], least: int) -> None:
        is_looking = self._looking is not None and self._looking.is_alive()
        if is_looking or time.monotonic() < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()

        def look() -> None:
            try:
                facts = self._ask()
                found = answered(facts, self._base_model, version, revised)
            except Exception as error:  # whatever Ray says: nothing is known, and it is asked again
                log.debug("the replicas say nothing of their canary: %s", error)
                return
            if version != self._version:
                return
            said = facts.get("canary", {}).get(self._base_model)
            self._figures = said if said is not None and said["version"] == version else self._figures
            self._most = {one: max(count, self._most.get(one, 0)) for one, count in found.items()}
            if all(count >= least for count in self._most.values()):
                self._wake()

        self._looking = threading.Thread(target=look, name="canary", daemon=True)
        self._looking.start()


def _told(known: Mapping[str, int], least: int) -> str:
    """`3 of 50 requests of payments/charges`."""
    return ", ".join(f"{n} of {least} requests{f' of {title}' if title else ''}" for title, n in sorted(known.items()))
