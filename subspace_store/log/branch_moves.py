"""How a branch came to be where it is: each record of the log that moved it, or held it. No tensor is read.

The fold keeps where a branch is, not how it came there, so the records are read, newest first, as far back as somebody
asks. They never change: what was read once is kept, a line for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from configs.errors import NotFound
from subspace_store.log import fold
from subspace_store.log.version import MAIN
from subspace_store.log.version_log import VersionLog
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.strict import as_line

PUBLISHED = "published"
ROLLED_BACK = "rolled back"
RESTORED = "restored"
HELD = "held"
RELEASED = "released"
HOW: Mapping[str, str] = MappingProxyType(
    {
        fold.MERGE: "merged",
        fold.REFINE: "refined",
        fold.PUBLISH: PUBLISHED,
        fold.REJECT: "rejected",
        fold.ROLLBACK: ROLLED_BACK,
        fold.REMOVE: "removed",
        fold.COMPACT: "compacted",
        fold.HOLD: HELD,
        fold.RELEASE: RELEASED,
    }
)
"""Operation of a record to what it did to a branch, for people."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One record that moved a branch, or held or released `main` where it was."""

    seq: int
    """Sequence number of the record."""
    time: float
    """Unix seconds, by the clock of the machine that wrote it."""
    actor: str
    """Who did it: a person, or `gate` or `controller` for the service itself."""
    how: str
    """One of the values of `HOW`, or `restored`: an earlier revision was put back."""
    reason: str
    """As the person or the gate gave it, or what the operation says; empty where none was given."""
    before: int
    """Version that the branch named before."""
    after: int
    """Version that it names afterwards; the same where it was held or released."""
    holds: bool = False
    """Whether `main` is held there from then on."""


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What a record says of branches."""

    seq: int
    time: float
    actor: str
    how: str
    reason: str
    refs: Mapping[str, int]
    holds: bool


class BranchMoves:
    """Reads the moves off a log. Safe for several threads: the worst is a record that is read twice."""

    def __init__(self, log: VersionLog) -> None:
        self._log = log
        self._kept: dict[int, _Mark] = {}

    def newest_first(self, branch: str, below: int | None = None) -> Iterator[Move]:
        """The moves of a branch, the newest first, as far as the log was folded.

        Args:
            below: Sequence number: only moves of earlier records; None: all.

        Cost:
            A read of each record back to the move before the last one that is taken, once for this object, some at the
            same time.
        """
        waiting: list[_Mark] = []  # until an earlier record says where the branch was before them
        for mark in self._marks(below):
            if branch in mark.refs:
                yield from (_move(later, branch, mark.refs[branch]) for later in waiting)
                waiting = [mark]
            elif branch == MAIN and mark.how in (HELD, RELEASED):
                waiting.append(mark)
        yield from (_move(later, branch, 0) for later in waiting)

    def at(self, moment: float) -> tuple[dict[str, int], int]:
        """Branch to the version that it named at a moment, and the sequence number of the last record until then.

        Args:
            moment: Unix seconds.

        Raises:
            NotFound: The log is younger.
        """
        named: dict[str, int] = dict.fromkeys(self._log.state.refs, 0)
        missing, last = set(named), 0
        for mark in self._marks(None):
            if mark.time > moment and not last:
                continue
            last = last or mark.seq
            for branch in missing & mark.refs.keys():
                named[branch] = mark.refs[branch]
            missing -= mark.refs.keys()
            if not missing:
                break
        if not last:
            raise NotFound("there was no store yet", self._log.storage.url, "name a later moment")
        return named, last

    def since(self, seq: int) -> Iterator[Move]:
        """The moves of `main` after a record, oldest first. Reads the records back to the move before them."""
        newer: list[Move] = []
        for move in self.newest_first(MAIN):
            if move.seq <= seq:
                break
            newer.append(move)
        yield from reversed(newer)

    def _marks(self, below: int | None) -> Iterator[_Mark]:
        newest = self._log.state.seq if below is None else min(self._log.state.seq, below - 1)
        yield from in_order(self._mark, range(newest, 0, -1), AT_ONCE)

    def _mark(self, seq: int) -> _Mark:
        if seq not in self._kept:
            self._kept[seq] = _mark(self._log.record(seq))
        return self._kept[seq]


def _mark(record: fold.Record) -> _Mark:
    how = HOW.get(fold.plain(record.op), "")
    if record.op in fold.MAKES_VERSION and MAIN in record.refs:
        how = RESTORED
    return _Mark(
        seq=record.seq,
        time=record.time,
        actor=record.actor,
        how=how,
        reason=_reason(record.op, record.body),
        refs=dict(record.refs) if how else {},
        holds=record.op == fold.HOLD or (record.op == fold.ROLLBACK and bool(record.body.get("hold"))),
    )


def _reason(op: str, body: Mapping[str, Any]) -> str:
    if op == fold.REMOVE:
        return as_line(": ".join(filter(None, (f"{body['task']} was removed", str(body.get("reason") or "")))))
    if op == fold.COMPACT:
        return "all tasks merged at once"
    if op == fold.PUBLISH:
        return "passed the gate"
    return as_line(str(body.get("reason") or ""))


def _move(mark: _Mark, branch: str, before: int) -> Move:
    return Move(
        seq=mark.seq,
        time=mark.time,
        actor=mark.actor,
        how=mark.how,
        reason=mark.reason,
        before=before,
        after=mark.refs.get(branch, before),
        holds=mark.holds and branch == MAIN,
    )
