"""Who asks: the caller that a bearer token belongs to, and how often it may ask.

Three kinds of tokens count: the one in the state folder, made anew at each start, for whoever may read that folder;
those in the database; and, where the settings name an identity provider, those that it signs.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable

from configs.errors import OnebasisError, TooManyRequests, UnknownToken
from configs.settings import Settings
from orchestrator.api.access import Caller, Role, owner
from orchestrator.api.oidc import Provider
from orchestrator.api.sources import Sources
from orchestrator.tasks.token_book import PREFIX
from subspace_store.commands.state_folder import SERVER_FILE

TODO = f"send the token that {SERVER_FILE} holds, or one of your own: `onebasis login`"
BURST_SECONDS = 10.0
"""How long a token that was silent may ask as fast as it likes: so many seconds' worth of requests are let through."""
WATCHED_MAX = 10_000
"""Tokens whose pace is remembered; more are forgotten, the oldest first."""


class Callers:
    """See the module. Every method may be called from any thread.

    Args:
        owner_token: The token in the state folder.
        owner_name: Name of whoever owns that folder.
        sources: What answers are made from, at the moment; raises Unavailable where nothing is.
        settings: Those that count now.
    """

    def __init__(
        self,
        owner_token: str,
        owner_name: str,
        sources: Callable[[], Sources],
        settings: Callable[[], Settings],
    ) -> None:
        self._owner_token = owner_token.encode()
        self._owner = owner(owner_name)
        self._sources, self._settings = sources, settings
        self._paces = Paces()
        self._provider: Provider | None = None

    def of_owner(self, secret: str) -> Caller | None:
        """The caller whose token is that of the state folder: found without asking anybody."""
        return self._owner if secrets.compare_digest(secret.encode(), self._owner_token) else None

    def of(self, secret: str, counts: bool = True) -> Caller:
        """The caller that a token belongs to.

        Args:
            counts: Whether this is a request of theirs, of which there may be so many in a second.

        Raises:
            UnknownToken: It is none, has ended or was revoked, or its provider gives its bearer nothing here.
            TooManyRequests: It was used more often than it may be.
            Unavailable: The database, or the provider, is away.
        """
        caller = self.of_owner(secret)
        if caller is not None:
            return caller
        caller = self._of_book(secret) if secret.startswith(PREFIX) else self._of_provider(secret)
        if counts and (limit := self._settings().server.requests_per_second) is not None:
            self._paces.check(caller.token_id, limit, time.monotonic())
        return caller

    def _of_book(self, secret: str) -> Caller:
        book, now = self._sources().tokens, time.time()
        found = book.find(secret)
        if found is None:
            raise unknown()
        if not found.counts_at(now):
            ended = "was revoked" if found.revoked_at is not None and found.revoked_at <= now else "has ended"
            raise UnknownToken(f"the token {found.token_id} {ended}", "authorization", "ask an admin for a new one")
        with contextlib.suppress(OnebasisError):  # one that stands by writes nothing, and reading needs no write
            book.used(found, now)
        return Caller(found.name, found.token_id, {found.team: Role(found.role)}, found.expires_at)

    def _of_provider(self, secret: str) -> Caller:
        settings = self._settings().oidc
        if settings is None or secret.count(".") != 2:
            raise unknown()
        if self._provider is None or self._provider.settings != settings:
            self._provider = Provider(settings)
        return self._provider.caller(secret)


def unknown() -> UnknownToken:
    """The error for a token that nobody was given, and for none."""
    return UnknownToken("missing or wrong token", "authorization", TODO)


class Paces:
    """How often each token asks: a bucket of requests that fills with time, up to BURST_SECONDS' worth."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}
        """Token id to the requests that were left in its bucket, and when."""

    def check(self, token_id: str, per_second: float, now: float) -> None:
        """Count a request. Raises TooManyRequests, and counts nothing, where the bucket is empty."""
        most = max(1.0, per_second * BURST_SECONDS)
        with self._lock:
            left, at = self._left.pop(token_id, (most, now))
            left = min(most, left + (now - at) * per_second)
            is_allowed = left >= 1.0
            self._left[token_id] = (left - 1.0 if is_allowed else left, now)
            if len(self._left) > WATCHED_MAX:
                del self._left[next(iter(self._left))]
        if not is_allowed:
            wait = (1.0 - left) / per_second
            what = f"this token asks more often than {per_second:g} times a second"
            raise TooManyRequests(what, "server.requests_per_second", f"wait {wait:.1f} s, then ask again", wait)
