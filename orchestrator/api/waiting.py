"""What a command does while it waits: nobody looks at a silent terminal for longer than ten seconds.

A control plane that stands still is told of, with its process id; one that is at work says what is wrong, if anything.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import ControlPlaneSilent, Unavailable
from subspace_store.commands.state_folder import running_server

Say = Callable[[str], None]

LOOK_SECONDS = 3.0
"""Of waiting until somebody looks whether the control plane is alive, and again."""
HEALTH_SECONDS = 4.0
"""A control plane answers this in milliseconds, and in a second where the machine is crowded."""
TELL_SECONDS = 8.0
"""People are told this often that it takes longer."""
RESTART = "`onebasis up` restarts it; nothing that was acknowledged is lost"


class Waiting:
    """Called again and again while a reply is waited for.

    Args:
        server: What the control plane announced of itself.
        say: Takes a line for people.
    """

    def __init__(self, state_dir: Path, server: dict[str, Any], say: Say) -> None:
        self._state_dir = state_dir
        self._server = server
        self._say = say
        self._unanswered = 0
        self._told_at = 0.0
        self._told: tuple[str, ...] = ()

    def __call__(self, seconds: float) -> None:
        """seconds: How long the reply has been waited for.

        Raises:
            ControlPlaneSilent: The control plane stands still, or answers nothing at all.
        """
        from orchestrator.api.exchange import NobodyListensError, exchange
        from orchestrator.signs_of_life import Life, life_of

        pid = running_server(self._state_dir.resolve())
        if pid is not None and life_of(pid) is Life.STOPPED:
            raise ControlPlaneSilent(
                f"the control plane (pid {pid}) does not answer: it {Life.STOPPED}", "", RESTART, pid
            )
        pid = self._server["pid"] if pid is None else pid
        try:
            url, token = self._server["url"], self._server["token"]
            reply = exchange(f"{url}/health", "GET", token=token, timeout_seconds=HEALTH_SECONDS)
            alarms = tuple(alarm["text"] for alarm in json.loads(reply.content).get("alarms", ()))
        except (NobodyListensError, Unavailable, ValueError):
            self._unanswered += 1
            if self._unanswered > 1:
                what = f"the control plane (pid {pid}) answers nothing for {seconds + HEALTH_SECONDS:.0f} s"
                raise ControlPlaneSilent(what, "", RESTART, pid) from None
            self._say(f"the control plane (pid {pid}) does not answer; waiting for it a little longer")
            return
        self._unanswered = 0
        if alarms != self._told or seconds - self._told_at >= (TELL_SECONDS if self._told_at else 2 * LOOK_SECONDS - 1):
            self._told, self._told_at = alarms, seconds
            self._say(f"waiting for the control plane's answer for {seconds:.0f} s; it is alive")
            for alarm in alarms:
                self._say(f"ALARM {alarm}")


@contextlib.contextmanager
def telling(what: str, say: Say) -> Iterator[None]:
    """Tell people what is going on in the block, if it takes longer than a few seconds."""
    done = threading.Event()

    def tell() -> None:
        waited = 2 * LOOK_SECONDS
        if done.wait(waited):
            return
        say(f"still {what}, for {waited:.0f} s")
        while not done.wait(TELL_SECONDS):
            waited += TELL_SECONDS
            say(f"still {what}, for {waited:.0f} s")

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
