"""Whose a token is, as the door finds it out: the control plane knows, and is asked once in a while."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from configs.errors import OnebasisError, Unavailable, UnknownToken, error_from_dict
from orchestrator.api.access import EVERY_TEAM_TOLD
from orchestrator.api.callers import Paces, unknown
from orchestrator.api.exchange import NobodyListensError, NotTakenError, exchange, trusting
from orchestrator.api.routes import PREFIX

KNOWN_SECONDS = 30.0
"""How long an answer of the control plane counts: a token that was revoked is taken for so long."""
AWAY_SECONDS = 3600.0
"""How long it counts while the control plane is away."""
ASK_SECONDS = 10.0
PAUSE_SECONDS = 5.0
"""How long nobody asks a control plane that was just found to be away: one that hangs costs a caller `ASK_SECONDS`."""
KEPT_MAX = 10_000
"""Tokens that are remembered; more are forgotten, the oldest first."""


def digest_of(secret: str) -> str:
    """What of a token is kept: of 256 random bits nobody finds the token again."""
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True)
class Lodge:
    """What is needed to find it out.

    Args:
        url: Address of the control plane.
        certificate: The control plane's, in PEM; empty: it speaks no TLS.
        per_second: Most requests of one token, on average; None: any number.
        owner: Digest of the token of the state folder.
    """

    url: str
    certificate: str
    per_second: float | None
    owner: str


class Lodger:
    """Finds out whose tokens are. Every method may be called from any thread."""

    def __init__(self, lodge: Lodge) -> None:
        self._lodge = lodge
        self._paces = Paces()
        self._lock = threading.Lock()
        self._paused: tuple[float, OnebasisError] | None = None
        """Until when nobody is asked, and why."""
        self._known: OrderedDict[str, tuple[float, frozenset[str] | None]] = OrderedDict()
        """Digest to when it was found out, and the teams."""

    def teams_of(self, secret: str) -> frozenset[str] | None:
        """Teams whose tasks a token may ask; None: all.

        Raises:
            UnknownToken: It is nobody's, or counts no more.
            TooManyRequests: It was used more often than it may be.
            Unavailable: The control plane is away, and the token was not seen within the last hour.
        """
        digest, now = digest_of(secret), time.monotonic()
        if digest == self._lodge.owner:
            return None
        if self._lodge.per_second is not None:
            self._paces.check(digest, self._lodge.per_second, now)
        with self._lock:
            at, teams = self._known.get(digest, (float("-inf"), None))
        if now - at <= KNOWN_SECONDS:
            return teams
        try:
            if self._paused is not None and now < self._paused[0] and secret:
                raise self._paused[1]
            teams = self._ask(secret)
        except UnknownToken:  # it was revoked, or has ended: nor does it count once the control plane is away
            with self._lock:
                self._known.pop(digest, None)
            raise
        except OnebasisError as error:  # away, or it has too much to do to say
            if self._paused is None or self._paused[1] is not error:
                self._paused = time.monotonic() + PAUSE_SECONDS, error
            if now - at <= AWAY_SECONDS:
                return teams
            raise
        with self._lock:
            self._paused = None
            self._known[digest] = now, teams
            self._known.move_to_end(digest)
            if len(self._known) > KEPT_MAX:
                self._known.popitem(last=False)
        return teams

    def _ask(self, secret: str) -> frozenset[str] | None:
        if not secret:
            raise unknown()
        trust = trusting(self._lodge.certificate) if self._lodge.certificate else None
        try:
            reply = exchange(
                f"{self._lodge.url}{PREFIX}/whoami", "GET", token=secret, timeout_seconds=ASK_SECONDS, trust=trust
            )
            facts = json.loads(reply.content)
        except (NobodyListensError, NotTakenError, OnebasisError, ValueError) as error:
            what = "the control plane is away, and it alone knows whose a token is"
            raise Unavailable(what, self._lodge.url, "ask again when it is back: `onebasis up`") from error
        if not reply.is_success:
            raise error_from_dict(facts)
        roles = facts["roles"]
        return None if EVERY_TEAM_TOLD in roles else frozenset(roles)
