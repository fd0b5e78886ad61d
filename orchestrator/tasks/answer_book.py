"""Answers to requests that had a key, in SQL: asked again under its key, a request is answered and not carried out.

A row is written before a request is carried out. One without an answer, which this process does not carry out at the
moment, is left by a process that died meanwhile: its request is carried out anew, as it would be without a key.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import delete, insert, select, update

from configs.errors import Conflict, InvalidInput, OnebasisError, OutcomeUnknown
from orchestrator.tasks import tables
from orchestrator.tasks.database import Database

_kept = tables.kept_answers
KEPT_SECONDS = 86_400.0
"""How long an answer is kept."""
HEADER = "Idempotency-Key"


class AnswerBook:
    """The table. Every method raises DatabaseAway when the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._under_way: set[tuple[str, str]] = set()

    def once(self, name: str, key: str, request_sha256: str, carry_out: Callable[[], Any]) -> Any:
        """The answer to a request: the one that was given before under this key, or a new one, which is kept.

        Args:
            name: Who asks; each has keys of their own.
            request_sha256: Digest of the request.
            carry_out: Makes the answer, JSON values. If it raises, nothing is kept, and the key is free again, but
                where nobody knows whether it was done.

        Raises:
            InvalidInput: Another request had this key.
            Conflict: The same one is carried out at this moment.
        """
        with self._held(name, key):
            known = self._begun(name, key, request_sha256)
            if known is not None:
                return json.loads(known)
            try:
                answer = carry_out()
            except OnebasisError as error:
                if not isinstance(error, OutcomeUnknown):
                    with contextlib.suppress(OnebasisError), self._database.writing() as connection:
                        connection.execute(delete(_kept).where(*_of(name, key)))
                raise
            with contextlib.suppress(OnebasisError), self._database.writing() as connection:  # it is done
                connection.execute(update(_kept).where(*_of(name, key)).values(answer=json.dumps(answer)))
            return answer

    @contextlib.contextmanager
    def _held(self, name: str, key: str) -> Iterator[None]:
        with self._lock:
            if (name, key) in self._under_way:
                raise Conflict("a request with this key is being carried out", HEADER, "wait for its answer")
            self._under_way.add((name, key))
        try:
            yield
        finally:
            with self._lock:
                self._under_way.discard((name, key))

    def _begun(self, name: str, key: str, request_sha256: str) -> str | None:
        """Write down that a request is about to be carried out; the answer, where it was."""
        now = time.time()
        with self._database.writing() as connection:
            connection.execute(delete(_kept).where(_kept.c.at < now - KEPT_SECONDS))
            row = connection.execute(select(_kept.c.request_sha256, _kept.c.answer).where(*_of(name, key))).first()
            if row is None:
                values = {"name": name, "key": key, "request_sha256": request_sha256, "at": now}
                connection.execute(insert(_kept).values(**values))
                return None
        if row.request_sha256 != request_sha256:
            todo = "a key belongs to one request: choose another for this one"
            raise InvalidInput("another request had this key", HEADER, todo)
        return row.answer  # type: ignore[no-any-return]


def _of(name: str, key: str) -> tuple[Any, ...]:
    return _kept.c.name == name, _kept.c.key == key
