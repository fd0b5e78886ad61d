"""What a command says while it waits: nobody looks at a silent terminal for longer than ten seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import NoSignOfLife, Unavailable
from subspace_store.commands.state_folder import running_server

Say = Callable[[str], None]

HEALTH_SECONDS = 4.0


class Waiting:
    """Called again and again with the seconds so far, while the control plane is alive and does not reply.

    Args:
        server: Facts that the control plane announced about itself.
        say: Takes a line for people.
    """

    def __init__(self, server: dict[str, Any], say: Say) -> None:
        self._server = server
        self._say = say
        self._told: tuple[str, ...] = ()

    def __call__(self, seconds: float) -> None:
        alarms = self._alarms()
        self._say(f"waiting for the control plane's answer for {seconds:.0f} s; it is alive")
        for alarm in alarms if alarms != self._told else ():
            self._say(f"ALARM {alarm}")
        self._told = alarms

    def _alarms(self) -> tuple[str, ...]:
        from orchestrator.api.client import trust_of
        from orchestrator.api.exchange import NobodyListensError, NotTakenError, exchange
        from orchestrator.api.routes import PREFIX

        try:
            url, token = self._server["url"], self._server["token"]
            reply = exchange(
                f"{url}{PREFIX}/health",
                "GET",
                token=token,
                timeout_seconds=HEALTH_SECONDS,
                trust=trust_of(self._server),
            )
            return tuple(alarm["text"] for alarm in json.loads(reply.content).get("alarms", ()))
        except (NobodyListensError, NotTakenError, Unavailable, ValueError):
            return self._told


def not_asked(error: NoSignOfLife, state_dir: Path) -> NoSignOfLife:
    """As `named`, of a process that took no connection."""
    told = named(error, state_dir)
    return NoSignOfLife(
        f"{told.what}; it took no connection, so nothing was asked of it or done", told.where, told.todo
    )


def named(error: NoSignOfLife, state_dir: Path) -> NoSignOfLife:
    """The error with the process that it is about, and whether that one stands still."""
    from orchestrator.signs_of_life import Life, life_of

    pid = running_server(state_dir.resolve())
    if pid is None:
        return error
    what = f"it {Life.STOPPED}" if life_of(pid) is Life.STOPPED else "it hangs"
    return NoSignOfLife(f"the control plane (pid {pid}) does not answer: {what}", error.where, error.todo)
