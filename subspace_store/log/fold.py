"""What each record of the log changes: the state is the fold of the records. Pure."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from configs.errors import Corrupt
from subspace_store.digests import digest
from subspace_store.log.version import MAIN, BlobRef, Hold, Identity, Owner, SubspaceState, TaskScore, Version
from subspace_store.strict import as_line

ACQUIRE = "acquire"

MERGE = "merge"

REFINE = "refine"

MERGE_PRIVATE = "merge-private"

REFINE_PRIVATE = "refine-private"

MERGE_RENEWED = "merge-renewed"

REFINE_RENEWED = "refine-renewed"

MERGE_REPLACING = "merge-replacing"

SCORES = "scores"

PUBLISH = "publish"

REJECT = "reject"

ROLLBACK = "rollback"

REMOVE = "remove"

COMPACT = "compact"

TAG = "tag"

HOLD = "hold"

RELEASE = "release"

QUARANTINE = "quarantine"

UNQUARANTINE = "unquarantine"

PIN = "pin"

UNPIN = "unpin"

EXPIRE = "expire"

DROP_ADAPTERS = "drop-adapters"

IDENTITY: Mapping[str, tuple[str, ...]] = {
    SCORES: ("version",),
    PUBLISH: ("version",),
    REJECT: ("version",),
    ROLLBACK: ("version", "hold"),
    REMOVE: ("task_id", "publish"),
    COMPACT: ("publish",),
    TAG: ("name", "version"),
    HOLD: ("reason",),
    QUARANTINE: ("task_id", "reason"),
    UNQUARANTINE: ("task_id",),
    PIN: ("version", "owner", "asked"),  # the end as it was asked for: thirty days are a later moment each time
    UNPIN: ("version", "owner"),
    EXPIRE: ("asked",),
    DROP_ADAPTERS: ("asked",),
}
"""What of a record's body makes another request of it: under one op_key only the same may be asked again."""

PRIVATE = {MERGE: MERGE_PRIVATE, REFINE: REFINE_PRIVATE}
"""What an operation is called whose version holds private parts. A release that does not know them stops at the record,
instead of reading tasks without them."""
RENEWED = {MERGE: MERGE_RENEWED, REFINE: REFINE_RENEWED}
"""The same for a version that has renewed bases, with private parts or without."""
REPLACING = {MERGE: MERGE_REPLACING}
"""The same for a version that tasks of its parent have left, whatever else it has."""
MAKES_VERSION = frozenset({*PRIVATE, *(said for names in (PRIVATE, RENEWED, REPLACING) for said in names.values())})
_PLAIN = {said: plain for names in (PRIVATE, RENEWED, REPLACING) for plain, said in names.items()}

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One state change, as stored. `refs` are the refs it moves; `body` depends on `op`."""

    seq: int
    prev_sha256: str
    write_id: str
    epoch: int
    writer: str
    time: float
    actor: str
    op: str
    op_key: str = ""
    refs: Mapping[str, int] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


def log_key(seq: int) -> str:
    """Storage key of record `seq`."""
    return f"log/{seq:020d}.json"


def to_plain(record: Any) -> Any:
    """A record as values that JSON knows; NaN becomes null."""
    if isinstance(record, tuple | list) and set(map(type, record)) == {float}:  # a record has one for each task
        return [None if math.isnan(value) else value for value in record]
    if isinstance(record, float):
        return None if math.isnan(record) else record
    if record is None or isinstance(record, str | int):
        return record
    if isinstance(record, list | tuple):
        return [to_plain(value) for value in record]
    if isinstance(record, Mapping):
        return {str(key): to_plain(value) for key, value in record.items()}
    return {item.name: to_plain(getattr(record, item.name)) for item in dataclasses.fields(record)}


def making(op: str, version: Version) -> str:
    """The operation of the record that names a version."""
    if version.left:
        return REPLACING[op]
    if version.renewed_count:
        return RENEWED[op]
    return PRIVATE[op] if any(task.private is not None or task.is_sized for task in version.brought) else op


def plain(op: str) -> str:
    """An operation without what its name says of the version that it makes: `merge` for `merge-private`."""
    return _PLAIN.get(op, op)


def asked(op: str, **named: Any) -> str:
    """A request in short, to know it again. named: What `IDENTITY` lists for the operation; what is missing is None."""
    op = plain(op)
    values = [named.get(key) or None for key in IDENTITY.get(op, ())]
    return f"{op} {digest(json.dumps(values).encode())[:16]}"


def fold(state: SubspaceState, record: Record, sha256: str) -> SubspaceState:
    """The state after one more record. Pure.

    Args:
        sha256: Of the record's bytes; the next record must name it.

    Raises:
        Corrupt: The record does not follow from the state.
    """
    where = log_key(record.seq)
    if record.seq != state.seq + 1 or record.prev_sha256 != state.head_sha256:
        raise Corrupt(
            f"follows record {record.prev_sha256[:12] or '(none)'}, but record {state.seq} is "
            f"{state.head_sha256[:12] or '(none)'}: the chain is broken",
            where,
            "restore the log from a backup",
        )
    if record.epoch != state.epoch + (record.op == ACQUIRE):
        raise Corrupt(f"{record.op} has epoch {record.epoch} after epoch {state.epoch}", where)
    changes: dict[str, Any] = {"seq": record.seq, "epoch": record.epoch, "head_sha256": sha256}
    changes["refs"] = {**state.refs, **record.refs}
    try:
        changes |= _changes(state, record, where)
        concerned = record.body.get("version", 0)
        if record.op_key:
            number = concerned["number"] if record.op in MAKES_VERSION else concerned
            changes["op_keys"] = {**state.op_keys, record.op_key: int(number)}
            named = {**record.body, "publish": MAIN in record.refs}
            if all(key in named for key in IDENTITY.get(record.op, ())):  # records of before 0.4 do not say all of it
                changes["asked"] = {**state.asked, record.op_key: asked(record.op, **named)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"is no {record.op} of this format: {error!r}", where, "restore it from a backup") from error
    return replace(state, **changes)


def _changes(state: SubspaceState, record: Record, where: str) -> dict[str, Any]:
    """The fields that an operation changes beside refs. Whether it is allowed was judged when it was written."""
    op, body = record.op, record.body
    if op in MAKES_VERSION:
        version = checked(Version, body["version"], where)
        made = {"versions": {**state.versions, version.number: version}}
        is_published = MAIN in record.refs  # a person put a revision back, and no gate was asked
        return made | ({"published": tuple(sorted({*state.published, version.number}))} if is_published else {})
    if op == SCORES:
        number = int(body["version"])
        scores = {score.task_id: score for score in checked(tuple[TaskScore, ...], body["scores"], where)}
        return {"scores": {**state.scores, number: {**state.scores.get(number, {}), **scores}}}
    if op == REJECT:
        number = int(body["version"])
        culprits = tuple(map(str, body.get("task_ids", ())))  # records of before 0.4 have the sentence alone
        codes = tuple(map(str, body.get("codes", ())))  # since 0.4 as well
        rejected = {"rejected": {**state.rejected, number: str(body["reason"])}}
        return (
            rejected
            | ({"rejected_for": {**state.rejected_for, number: culprits}} if culprits else {})
            | ({"rejected_by": {**state.rejected_by, number: codes}} if codes else {})
        )
    if op == PUBLISH:
        return {"published": tuple(sorted({*state.published, int(body["version"])}))}
    if op == ROLLBACK:
        held = _hold(record) if body.get("hold") else state.held
        return {"held": held}
    if op == TAG:
        return {"tags": {**state.tags, str(body["name"]): int(body["version"])}}
    if op == HOLD:
        hold = _hold(record)  # asked for again under another key, it began when it began
        return {"held": state.held if state.held and hold == replace(state.held, time=hold.time) else hold}
    if op == RELEASE:
        return {"held": None}
    if op == QUARANTINE:
        return {"quarantined": {**state.quarantined, str(body["task_id"]): as_line(str(body["reason"]))}}
    if op == UNQUARANTINE:
        return {"quarantined": {t: why for t, why in state.quarantined.items() if t != body["task_id"]}}
    if op == PIN:
        until = None if body["until"] is None else float(body["until"])
        mine = {str(body["owner"]): until}
        return {"pins": {**state.pins, int(body["version"]): {**state.pins.get(int(body["version"]), {}), **mine}}}
    if op == UNPIN:
        number = int(body["version"])
        others = {owner: until for owner, until in state.pins.get(number, {}).items() if owner != body["owner"]}
        rest = {n: owners for n, owners in state.pins.items() if n != number}
        return {"pins": {**rest, number: others} if others else rest}
    if op == EXPIRE:
        dead = {int(number) for number in body["versions"]}
        pins = {number: owners for number, owners in state.pins.items() if number not in dead}
        return {"expired": tuple(sorted({*state.expired, *dead})), "pins": pins}
    if op == DROP_ADAPTERS:
        heads = checked(dict[str, BlobRef], body["heads"], where)
        return {"heads": {**state.heads, **heads}}
    if op in (REMOVE, COMPACT):
        done, moved = int(body["version"]), int(body["version"]) if MAIN in record.refs else 0
        gone = {v.number for v in state.lineage(int(body.get("from", done)))} - {v.number for v in state.lineage(done)}
        published = tuple(sorted({*state.published, moved}))
        ended = {"compacted": tuple(sorted({*state.compacted, *gone}))} if op == COMPACT else {}
        return {"published": published, "replaced": {**state.replaced, **dict.fromkeys(sorted(gone), done)}} | ended
    if op == ACQUIRE:
        if "owner" not in body:  # by a writer that leaves the owner as it is, or before 0.4
            return {}
        claimed = body["owner"] and Identity(str(body["owner"]["service_id"]), str(body["owner"]["name"]))
        same = claimed and state.owner and claimed.service_id == state.owner.service_id
        since = state.owner.since if same and state.owner else record.time
        return {"owner": Owner(service_id=claimed.service_id, name=claimed.name, since=since) if claimed else None}
    raise Corrupt(f"has an operation {op!r} that this code does not know", where, "use a newer onebasis")


def _hold(record: Record) -> Hold:
    return Hold(actor=record.actor, reason=as_line(str(record.body["reason"])), time=record.time)


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """The adapter for a type, made when it is first needed, so that a command that reads few kinds starts sooner."""
    return TypeAdapter(kind)


def checked(kind: type[T], plain: Any, where: str) -> T:
    """Plain values as an object of the type `kind`. Raises Corrupt."""
    try:
        found: T = _reader(cast(Any, kind)).validate_python(plain)
        return found
    except ValidationError as error:
        raise Corrupt(
            f"is not a record of this format: {error}", where, "restore it, or use a newer onebasis"
        ) from error
