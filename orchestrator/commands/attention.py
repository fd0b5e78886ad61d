"""What a command that waits tells of the service meanwhile: that it is down, what is wrong with it, and that
somebody holds `main`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from configs.errors import Unavailable
from orchestrator.api.client import Client
from orchestrator.api.requests import Health, Json, ReadEvents
from subspace_store.commands.terminal import note

WATCH_SECONDS = 0.5
"""Shortest pause between two looks at tasks."""
LOOK_SECONDS = 3.0
"""Interval between two looks at the service."""
DOWN_SECONDS = 60.0
"""How long a service may be down before the command gives up: somebody may be starting it again."""


def tell_new(alarms: Sequence[Json], told: set[str], say: Callable[[str], None]) -> None:
    """Say each alarm that was not said before. `told`: those that were; grows."""
    for alarm in alarms:
        if alarm["text"] not in told:
            told.add(alarm["text"])
            say(f"ALARM {alarm['text']}")


class Attention:
    """Looks at the service now and then, for a command that waits for tasks.

    Args:
        say: Takes a line for people.
    """

    def __init__(self, client: Client, say: Callable[[str], None] = note) -> None:
        self._client = client
        self._say = say
        self._next_look = 0.0
        self._down_since: float | None = None
        self._told: set[str] = set()
        self._held: dict[str | None, Json | None] = {}

    def look(self) -> None:
        """Tell what is new, if it is time to look.

        Raises:
            Unavailable: The service has been down for too long.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        health = self._client.ask(Health())
        if not health["running"]:
            self._is_down(now)
            return
        if self._down_since is not None:
            self._say("the service is up again")
            self._down_since = None
        tell_new(health["alarms"], self._told, self._say)
        bases = health.get("base_models") or [health]
        for base in bases:
            if "held" in base:  # the service has read the log since it started
                self._tell_hold(base["held"], base.get("base_model") if len(bases) > 1 else None)

    def _tell_hold(self, held: Json | None, base_model: str | None) -> None:
        """Say that `main` is held, or no longer: what is trained waits as long, without a sign of its own.

        Args:
            base_model: Base model whose `main` it is; None: of the only one.
        """
        if held == self._held.get(base_model):
            return
        self._held[base_model] = held
        main, option = ("main", "") if base_model is None else (f"main of {base_model}", f" --base-model {base_model}")
        if held is None:
            self._say(f"{main} is no longer held")
            return
        self._say(
            f"{main} is held by {held['actor']}: {held['reason'] or 'no reason given'}; new versions wait until "
            f"`onebasis store release{option}` lets it move"
        )

    def _is_down(self, now: float) -> None:
        if self._down_since is None:
            self._down_since = now
            self._say(
                f"the service is down, and nothing goes on until `onebasis up`; waiting {DOWN_SECONDS:.0f} s for it"
            )
        elif now - self._down_since >= DOWN_SECONDS:
            what = f"the service has been down for {now - self._down_since:.0f} s; the tasks stay as they are"
            raise Unavailable(what, todo="start it with `onebasis up`, then repeat this command")


class UntilNews:
    """Between two looks at tasks: until something happens to one of them, or a moment has passed, and for
    WATCH_SECONDS at the least.

    Args:
        asked: Events that are waited for.
        task_ids: Tasks whose events they have to be; None: any task's.
    """

    def __init__(self, client: Client, asked: ReadEvents, task_ids: Collection[str] | None = None) -> None:
        self._task_ids = task_ids
        self._news = client.follow(asked)

    def __call__(self) -> None:
        began = time.monotonic()
        for event in self._news:
            is_ours = event is None or self._task_ids is None or event["task_id"] in self._task_ids
            if is_ours or time.monotonic() - began > LOOK_SECONDS:
                break
        time.sleep(max(0.0, began + WATCH_SECONDS - time.monotonic()))
