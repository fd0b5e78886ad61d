"""Requests whose outcome is unknown, kept in the state folder: whatever ends meanwhile, `status` still shows them.

A request is noted before it is sent, and the note deleted when the outcome is known. While it is under way its note is
locked; the lock ends with the process, so a note of a process that was killed is one in doubt, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from configs.errors import OnebasisError, OutcomeUnknown
from subspace_store.commands.state_folder import open_private
from subspace_store.digests import digest
from subspace_store.requests import StoreRequest, Withdraw

FOLDER = "in_doubt"


@dataclass(frozen=True)
class Doubt:
    """A request of which nobody knows whether it was done."""

    op_key: str
    operation: str
    actor: str
    at: float
    """Unix time of the request."""
    what: str = "the process that was asked for it ended before it had an answer"
    """What went wrong."""
    seq: int = 0
    """Sequence number of the record that it may become; 0: not known."""
    base_model: str | None = None
    """Name of the base model whose store was meant; None: of the only one."""


@contextlib.contextmanager
def noted(state_dir: Path, request: StoreRequest[Any]) -> Iterator[None]:
    """A context to carry a request out in."""
    file = _file(state_dir, request.op_key)
    was_in_doubt = file.exists()
    doubt = Doubt(request.op_key, request.operation, request.actor, time.time(), base_model=request.base_model)
    with contextlib.ExitStack() as open_files:
        note: TextIO | None = None
        with contextlib.suppress(OSError):  # a full disk keeps nobody from asking
            file.parent.mkdir(mode=0o700, exist_ok=True)
            note = open_files.enter_context(open_private(file, "a"))
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # taken: the same request is under way already
            if not was_in_doubt:
                _write(note, doubt)
        try:
            yield
        except OutcomeUnknown as error:
            if note is not None:
                with contextlib.suppress(OSError):
                    _write(note, replace(doubt, what=error.what, seq=error.seq))
            raise
        except OnebasisError:  # this attempt has failed; an earlier one is in doubt as before
            if not was_in_doubt:
                file.unlink(missing_ok=True)
            raise
        file.unlink(missing_ok=True)
    if isinstance(request, Withdraw):
        settled(state_dir, request.request_key)


def in_doubt(state_dir: Path) -> list[Doubt]:
    """The requests in doubt, the oldest first; not those under way."""
    found = []
    for file in (state_dir / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError), open(file, encoding="utf-8") as note:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.append(Doubt(**json.load(note)))
    return sorted(found, key=lambda doubt: doubt.at)


def settled(state_dir: Path, op_key: str) -> None:
    """The outcome of a request is known: it is in doubt no more."""
    _file(state_dir, op_key).unlink(missing_ok=True)


def _file(state_dir: Path, op_key: str) -> Path:
    return state_dir / FOLDER / f"{digest(op_key.encode())[:32]}.json"


def _write(note: TextIO, doubt: Doubt) -> None:
    note.seek(0)
    note.truncate()
    json.dump(asdict(doubt), note)
    note.flush()
