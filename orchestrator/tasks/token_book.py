"""The tokens of people and service accounts in SQL: made, found, rotated, revoked. What they may: api/access.py.

A token is 256 random bits, and the database keeps their SHA-256. Slow hashes are for passwords, which can be guessed:
nobody guesses one of 2²⁵⁶, and a slow hash would cost each request a tenth of a second. So who reads the database
cannot ask for anything with what is in it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, insert, select, update

from configs.errors import InvalidInput, NotFound
from orchestrator.tasks import tables
from orchestrator.tasks.database import Database

_tokens = tables.tokens
PREFIX = "onebasis_"
"""Beginning of each token, so that programs which look for secrets in code and logs find it."""
SECRET_BYTES = 32
USED_SECONDS = 60.0
"""Least time between two notes of a token's last use: who asks ten times a second writes once a minute."""


@dataclass(frozen=True)
class TokenRecord:
    """One token, without its secret."""

    token_id: str
    """Names it in lists and in the audit log."""
    name: str
    """Person or service account whose it is."""
    kind: str
    """`person` or `service`."""
    team: str
    """Team that it is for; empty: all."""
    role: str
    created_at: float
    created_by: str
    expires_at: float | None = None
    """Unix time; None: never."""
    used_at: float | None = None
    """Unix time of its last use, to the minute; None: never."""
    revoked_at: float | None = None
    """Unix time from which on it counts no more; None: it does."""

    def counts_at(self, now: float) -> bool:
        """Whether it opens anything."""
        is_over = self.expires_at is not None and self.expires_at <= now
        return not is_over and (self.revoked_at is None or self.revoked_at > now)


class TokenBook:
    """The table of tokens. Every method raises DatabaseAway when the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, record: TokenRecord) -> tuple[TokenRecord, str]:
        """Keep a new token of which all but the id is given.

        Returns:
            The record, and the token itself: nobody can find it out again.

        Raises:
            InvalidInput: The name is that of an account of the other kind.
        """
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        made = replace(record, token_id=secrets.token_hex(6))
        with self._database.writing() as connection:
            kinds = select(_tokens.c.kind).where(_tokens.c.name == made.name, _tokens.c.kind != made.kind).limit(1)
            if (other := connection.execute(kinds).scalar()) is not None:
                raise InvalidInput(f"{made.name} is a {other} already", "name", "choose another name")
            connection.execute(insert(_tokens).values(sha256=_digest(secret), **vars(made)))
        return made, secret

    def find(self, secret: str) -> TokenRecord | None:
        """The token that somebody showed, whether it counts or not; None: nobody was given it."""
        with self._database.reading() as connection:
            row = connection.execute(select(*_COLUMNS).where(_tokens.c.sha256 == _digest(secret))).first()
        return None if row is None else _record(row)

    def get(self, token_id: str) -> TokenRecord:
        """The token of an id. Raises NotFound."""
        with self._database.reading() as connection:
            row = connection.execute(select(*_COLUMNS).where(_tokens.c.token_id == token_id)).first()
        if row is None:
            raise no_such_token(token_id)
        return _record(row)

    def all(self) -> list[TokenRecord]:
        """All of them, the oldest first, those too that count no more."""
        chosen = select(*_COLUMNS).order_by(_tokens.c.created_at, _tokens.c.token_id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(chosen)]

    def rotate(self, token_id: str, by: str, grace_seconds: float = 0.0) -> tuple[TokenRecord, str]:
        """Replace a token by a new one for the same account, team and role.

        Args:
            grace_seconds: How long the old one still counts.

        Raises:
            NotFound: There is none of this id.
            InvalidInput: It counts no more.
        """
        now, old = time.time(), self.get(token_id)
        if not old.counts_at(now):
            raise InvalidInput("has ended or was revoked", f"token {token_id}", "create a new one")
        lifetime = old.expires_at - old.created_at if old.expires_at is not None else None
        fresh = replace(old, created_at=now, created_by=by, used_at=None, revoked_at=None)
        made = self.create(replace(fresh, expires_at=None if lifetime is None else now + lifetime))
        self._change(token_id, revoked_at=now + grace_seconds)
        return made

    def revoke(self, token_id: str) -> TokenRecord:
        """Let a token count no more, from now on. One that was revoked before stays as it is."""
        now, found = time.time(), self.get(token_id)
        if found.revoked_at is None or found.revoked_at > now:
            self._change(token_id, revoked_at=now)
        return self.get(token_id)

    def used(self, record: TokenRecord, now: float) -> None:
        """Note that a token was used, if that was not noted a moment ago."""
        if record.used_at is None or now - record.used_at >= USED_SECONDS:
            self._change(record.token_id, used_at=now)

    def _change(self, token_id: str, **values: Any) -> None:
        with self._database.writing() as connection:
            connection.execute(update(_tokens).where(_tokens.c.token_id == token_id).values(**values))


def no_such_token(token_id: str) -> NotFound:
    """The error for a token that is not there, or not for who asks."""
    return NotFound("there is no such token", repr(token_id), "`onebasis token list` lists them")


_COLUMNS = tuple(column for column in _tokens.c if column.name != "sha256")


def _record(row: Row[*tuple[Any, ...]]) -> TokenRecord:
    return TokenRecord(**row._mapping)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
