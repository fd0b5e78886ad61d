"""What people ask about webhooks: which there are, what they were sent, whether one works.

Of an address the host alone is shown, and nothing of a secret: what is behind the host is often one itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from configs.errors import NotFound
from configs.settings import WebhookSettings
from orchestrator.api.requests import Json, ListWebhooks, TryWebhook
from orchestrator.api.sources import Sources
from orchestrator.tasks.happenings import TEST, Happening

if TYPE_CHECKING:
    from orchestrator.tasks.outbox import Delivery

TEST_SECONDS = 15.0
"""Longest wait for the answer to a test: an attempt takes at most ten, and the look before it one."""
POLL_SECONDS = 0.05


class WebhookAnswers:
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def all(self, request: ListWebhooks, of_teams: Collection[str] | None = None) -> Json:
        """The webhooks and their newest deliveries. of_teams: Teams whose webhooks there are; None: all, and the
        service's own."""
        hooks = {
            name: (team, hook)
            for name, (team, hook) in self._sources.settings.hooks.items()
            if (of_teams is None or team in of_teams) and request.team in (None, team)
        }
        outbox = self._sources.outbox
        waiting, deliveries = outbox.waiting(), outbox.newest(hooks, request.limit)
        last = {one.hook: one for one in reversed(deliveries) if one.tries}
        return {
            "webhooks": [
                {
                    "webhook": name,
                    "team": team or None,
                    "host": hook.host,
                    "events": list(hook.events),
                    "waiting": waiting.get(name, 0),
                    "last": _delivery(last[name]) if name in last else None,
                }
                for name, (team, hook) in hooks.items()
            ],
            "deliveries": [_delivery(one) for one in deliveries],
        }

    def test(self, request: TryWebhook) -> Json:
        """Send a test, and wait until it was tried once.

        Raises:
            NotFound: There is no such webhook.
        """
        self._sources.running("a test of a webhook")
        name = f"{request.team}/{request.name}" if request.team else request.name
        hook = self._found(name)
        happening = Happening(
            key=f"test:{secrets.token_hex(8)}",
            kind=TEST,
            at=time.time(),
            sentence=f"{request.by} tests the webhook {name}",
            team=request.team or "",
        )
        outbox = self._sources.outbox
        outbox.test(happening, name)
        self._sources.send_soon()
        until = time.monotonic() + TEST_SECONDS
        while not (found := outbox.of(name, happening.key)).answer and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return {"webhook": name, "host": hook.host, **_delivery(found)}

    def _found(self, name: str) -> WebhookSettings:
        hooks = self._sources.settings.hooks
        if name not in hooks:
            raise NotFound(f"there is no webhook '{name}'", todo="`onebasis webhooks list` shows those that there are")
        return hooks[name][1]


def _delivery(one: Delivery) -> Json:
    told = one.happening
    return {
        "id": told.message_id,
        "webhook": one.hook,
        "kind": told.kind,
        "time": told.at,
        "task_id": told.task_id or None,
        "title": told.title or None,
        "base_model": told.base_model or None,
        "version": told.version,
        "sentence": told.sentence,
        "tries": one.tries,
        "status": one.status,
        "answer": one.answer,
        "tried_at": one.tried_at,
        "due_at": one.due_at,
    }
