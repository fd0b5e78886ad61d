"""Tells others of what happens, over HTTP: the leader's, in threads of its own. Nothing is decided by it.

What is told is in SQL (tasks/outbox.py): of tasks it is written with them, of `main` it is read off the version log, of
alarms it is what began to ring. Each webhook has a thread of its own while it is sent something, so one that hangs or
refuses delays no other, nor anything else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from configs.errors import InvalidInput, NotLeading, OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.alarms import Alarm, Alarms
from orchestrator.api.shown import Eyes
from orchestrator.signed_post import Answer, post
from orchestrator.tasks.happenings import Happening, receivers
from orchestrator.tasks.outbox import Delivery, Outbox
from subspace_store import SubspaceReader
from subspace_store.log.branch_moves import HELD, RESTORED, ROLLED_BACK, Move

log = logging.getLogger("onebasis.webhooks")

LOOK_SECONDS = 1.0
AWAY_SECONDS = 10.0
"""Pause after a look that failed: the database or a store was away, which is told by others."""
FORGET_SECONDS = 3600.0
GONE = 410
"""Status by which a receiver says that it wants nothing more."""


class Webhooks:
    """See the module.

    Args:
        settings: Those that count now.
        stores: Base model to the reader that the loop keeps up to date.
    """

    def __init__(
        self,
        outbox: Outbox,
        settings: Callable[[], Settings],
        stores: Callable[[], Mapping[str, SubspaceReader]],
        alarms: Alarms,
    ) -> None:
        self._outbox, self._settings, self._stores, self._alarms = outbox, settings, stores, alarms
        self._woken = threading.Event()
        self._sending: dict[str, threading.Thread] = {}
        self._looked_at: dict[str, int] = {}
        """Base model to the last record of its log that was looked at."""
        self._forget_at = 0.0
        self._is_away = False

    def wake(self) -> None:
        """There is something to send. Thread-safe."""
        self._woken.set()

    def run(self, stop: threading.Event) -> None:
        """Look and send until told to stop. What is under way then is sent to its end, or by the next leader."""
        while not stop.is_set():
            try:
                self.look(stop)
                self._is_away = False
            except Exception as error:
                if not self._is_away:  # once, and not at every try
                    log.warning("webhooks wait: %s", error if isinstance(error, OnebasisError) else repr(error))
                self._is_away = True
                stop.wait(AWAY_SECONDS)
            self._woken.wait(LOOK_SECONDS)
            self._woken.clear()

    def look(self, stop: threading.Event) -> None:
        """Keep what is new, give it out, and begin to send what is due."""
        now, hooks = time.time(), self._settings().hooks
        self._tell_alarms()
        for base_model, store in self._stores().items():
            self._tell_moves(base_model, store)
        self._outbox.give_out(lambda happening: receivers(happening, hooks), now)
        if now >= self._forget_at:
            self._outbox.forget(tuple(hooks), now)
            self._forget_at = now + FORGET_SECONDS
        self._sending = {hook: thread for hook, thread in self._sending.items() if thread.is_alive()}
        for hook in self._outbox.hooks_due(now) & hooks.keys() - self._sending.keys():
            thread = threading.Thread(target=self._send_all, args=(hook, stop), name=f"webhook {hook}", daemon=True)
            self._sending[hook] = thread
            thread.start()

    # --- what is new -------------------------------------------------------------------------------------------

    def _tell_alarms(self) -> None:
        while self._alarms.begun:
            self._outbox.tell([_of_alarm(self._alarms.begun[0])])
            self._alarms.begun.popleft()  # not before it is kept

    def _tell_moves(self, base_model: str, store: SubspaceReader) -> None:
        seq = store.state.seq
        if self._looked_at.get(base_model) == seq:
            return
        told = self._outbox.told_until(base_model)
        if told is None or told < seq:  # of a log that nobody was told of, the past is no news
            moves = [] if told is None else list(store.moves.since(told))
            self._outbox.tell_log(base_model, seq, [one for move in moves for one in _of_move(base_model, move)])
        self._looked_at[base_model] = seq

    # --- sending -----------------------------------------------------------------------------------------------

    def _send_all(self, hook: str, stop: threading.Event) -> None:
        """Send what is due for one webhook, the oldest first, until an attempt fails."""
        try:
            while not stop.is_set():
                delivery = self._outbox.take(hook, time.time())
                if delivery is None or not self._send(delivery):
                    return
        except NotLeading:
            return  # whoever leads now has it
        except OnebasisError as error:
            log.warning("webhook %s waits: %s", hook, error)

    def _send(self, delivery: Delivery) -> bool:
        """One attempt. Returns whether it was taken."""
        settings = self._settings()
        team, hook = settings.hooks.get(delivery.hook, ("", None))
        if hook is None:
            self._outbox.failed(delivery, "the settings have it no more", is_final=True)
            return True
        happening = delivery.happening
        try:
            answer = post(hook, happening.message_id, happening.body(_seen_by(team, happening, settings)))
        except (InvalidInput, Unavailable) as error:
            self._failed(delivery, error.what)
            return False
        if not answer.is_success:
            self._failed(delivery, _told(answer), answer.status == GONE)
            return False
        self._outbox.taken(delivery, _told(answer))
        return True

    def _failed(self, delivery: Delivery, answer: str, is_final: bool = False) -> None:
        log.warning("webhook %s, attempt %d of %s: %s", delivery.hook, delivery.tries, delivery.happening.kind, answer)
        self._outbox.failed(delivery, answer, is_final)


def _told(answer: Answer) -> str:
    """A status in words. What else the other server said is not kept: it could be anything, of secrets too."""
    if 300 <= answer.status < 400:
        return f"status {answer.status}: redirects are not followed"
    return f"status {answer.status}" + (": it wants nothing more" if answer.status == GONE else "")


def _seen_by(team: str, happening: Happening, settings: Settings) -> str:
    """The sentence, for a team's webhook without other teams' tasks."""
    if not team:
        return happening.sentence
    others = frozenset(settings.teams) - {team}
    return Eyes(frozenset({team}), others, lambda task_id: task_id == happening.task_id).text(happening.sentence)


def _of_alarm(alarm: Alarm) -> Happening:
    return Happening(
        key=f"alarm:{alarm.code}:{int(alarm.since * 1e6)}",
        kind="alarm",
        at=alarm.since,
        sentence=str(alarm),
        base_model=alarm.base_model,
    )


def _of_move(base_model: str, move: Move) -> list[Happening]:
    """What is told of one record of the version log."""
    why = f": {move.reason}" if move.reason else ""
    told = []
    if move.how in (ROLLED_BACK, RESTORED):
        what = f"{move.actor} moved main of {base_model} from version {move.before} to version {move.after}{why}"
        told.append(("rolled-back", what))
    if move.holds or move.how == HELD:
        told.append(("held", f"{move.actor} holds main of {base_model} at version {move.after}{why}"))
    return [
        Happening(
            key=f"log:{base_model}:{move.seq}:{kind}",
            kind=kind,  # type: ignore[arg-type]
            at=move.time,
            sentence=sentence,
            base_model=base_model,
            version=move.after,
        )
        for kind, sentence in told
    ]
