"""The version log: the only commit point. A record per state change, created once, never overwritten.

Protocol: the next record's slot is taken with create-if-absent. On anything but success the slot is read. If it is
empty, the same bytes are created again. If our record is in it, it was committed after all. A record of a higher epoch
means that we are fenced, and we stop. Another record of our own epoch means that two writers use one epoch, which must
never happen, and we stop with an alarm.
A write that the storage refused has failed, and is forgotten. One whose outcome stays unknown is kept until it is
settled: the same request, asked again, finishes it; before any other request its slot is taken with an acquisition,
so that it is in the log by then or never will be. Nothing is done later by itself, and nothing is ever cleaned up here.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from configs.errors import (
    Conflict,
    Corrupt,
    Fenced,
    InvalidInput,
    NotFound,
    NotWritten,
    OnebasisError,
    OutcomeUnknown,
    OwnedByAnother,
    Unavailable,
)
from subspace_store.digests import digest
from subspace_store.log.fold import ACQUIRE, Record, checked, fold, log_key, to_plain
from subspace_store.log.version import Identity, Owner, SubspaceState
from subspace_store.storage.protocol import Storage
from subspace_store.strict import TEXT_MAX, as_escaped_text

CHECKPOINT_EVERY = 64
HINT = "log/_hint"
STATE_WITH_PRIVATE = "state_with_private"
"""Name of the state in a checkpoint that knows of private parts. A release that does not finds no `state` there, and
stops at the record that first names one."""
STATE_WITH_RENEWED = "state_with_renewed"
"""The same for renewed bases."""
STATE_WITH_REPLACED = "state_with_replaced"
"""The same for revisions that took the place of others."""
TRIES = 6
"""Number of attempts at one slot: about three seconds with the waits below; then the caller decides."""
FIRST_WAIT_SECONDS = 0.1
ACQUIRE_TRIES = 20
"""Number of attempts to acquire: other writers may take the slot first."""


def checkpoint_key(seq: int) -> str:
    """Key of the folded state after record `seq`."""
    return f"checkpoints/{seq:020d}.json"


def other_owner(storage: Storage, service: Identity) -> Owner | None:
    """The owner of the store at a place, if that is another service."""
    owner = VersionLog(storage).open().owner
    return owner if owner is not None and owner.is_another_than(service) else None


def owned_by_another(owner: Owner, where: str, service: Identity | None = None) -> OwnedByAnother:
    """The error for a program that wants to write to a store of another service. service: The one that wants to."""
    since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(owner.since))
    if service is not None and owner.name == service.name:
        return OwnedByAnother(
            f"this store belongs since {since} UTC to the service that was in this very folder, {owner.name}; its "
            "state folder was deleted or made anew",
            where,
            "restore that folder from a backup; or `onebasis up --take-over` goes on with the store alone: `main` "
            "stays as it is, and a new task database does not know its tasks",
            owner.service_id,
            owner.name,
            owner.since,
        )
    return OwnedByAnother(
        f"this store belongs to the service {owner.name} since {since} UTC",
        where,
        "end that service with `onebasis down`; or, if it is gone for good, take the store over with `onebasis up "
        "--take-over`: the other stops then",
        owner.service_id,
        owner.name,
        owner.since,
    )


def outcome_unknown(what: str, op_key: str, where: str, seq: int = 0) -> OutcomeUnknown:
    """The error for a request that was sent and not answered.

    Args:
        what: What went wrong.
        seq: See `OutcomeUnknown`.
    """
    key = shlex.quote(op_key)
    again = f"ask again with --op-key {key}: whatever became of this, it is done once" if op_key else "ask again"
    withdraw = f"; or `onebasis store withdraw {key}`: if it was not done yet, it never will be" if op_key else ""
    return OutcomeUnknown(what, where, again + withdraw, op_key, seq)


class VersionLog:
    """Reads the log, and writes it if opened with a writer's name. Safe for threads of one process.

    Args:
        storage: Where the log is.
        writer: Name of the writing process, for people; None: the log is only read.
        wait: Function that sleeps between attempts; a test passes one that does not.
    """

    def __init__(self, storage: Storage, writer: str | None = None, wait: Callable[[float], None] = time.sleep) -> None:
        self.storage = storage
        self.writer = writer
        self.state = SubspaceState()
        self.epoch = 0
        self._wait = wait
        self._stopped: OnebasisError | None = None
        self._pending: tuple[Record, bytes] | None = None
        """The write whose outcome is unknown."""
        self._acquisitions: set[str] = set()
        """Write ids of this writer's own acquisitions, also of those whose outcome is unknown."""
        self._lock = threading.RLock()

    def open(self) -> SubspaceState:
        """Fold the whole log: start from the newest undamaged checkpoint, then go record by record.

        Raises:
            Corrupt: A broken chain, or a record missing before later ones.
        """
        with self._lock:
            self.state = self._from_checkpoint()
            self.refresh()
            later = [key for key in self.storage.keys("log/", after=log_key(self.state.seq)) if key != HINT]
            self.refresh()  # A record may have been created since; a hole in front of later ones stays.
            if later and log_key(self.state.seq) < later[0]:
                raise Corrupt(
                    f"record {self.state.seq + 1} is missing, but {later[0]} exists",
                    f"{self.storage.url}/log",
                    "restore the log from a backup",
                )
            return self.state

    def refresh(self) -> SubspaceState:
        """Fold the records that were added since the last read. One read if there are none."""
        with self._lock:
            while (found := self._read(self.state.seq + 1)) is not None:
                self._fold(*found)
            return self.state

    def acquire(self, actor: str, service: Identity | None = None, *, claim: bool = False, force: bool = False) -> int:
        """Take the next epoch. Every older writer finds its next slot taken and stops.

        Args:
            service: The service that this writer writes for.
            claim: Whether the store belongs to `service` from now on; else its owner stays.
            force: Whether to write although another service owns the store.

        Raises:
            OwnedByAnother: The store belongs to another service.
            Conflict: Other writers kept taking the slot first.
            NotWritten: The storage was away, is full or refuses writes.
        """
        return self._acquire(actor, service, {"owner": service} if claim else {}, force)

    def release(self, actor: str, service: Identity) -> None:
        """Give the store up, so that any service may have it; does nothing if it belongs to another by now.

        This writer goes on under the next epoch.
        """
        with self._lock:
            owner = self.refresh().owner
            if owner is not None and owner.service_id == service.service_id:
                self._acquire(actor, service, {"owner": None}, force=False)

    def _acquire(self, actor: str, service: Identity | None, body: Mapping[str, Any], force: bool) -> int:
        with self._lock:
            for _ in range(ACQUIRE_TRIES):
                if not force:
                    self._refuse_owned(service)
                try:
                    record = self._take_next_epoch(actor, body)
                except OutcomeUnknown as error:  # an unused epoch does no harm
                    raise NotWritten(f"cannot be opened for writing: {error.what}", error.where, "try again") from error
                self.refresh()
                if record is not None:
                    if self.state.epoch > record.epoch:
                        break
                    return self.epoch
            raise Conflict("other writers keep opening this subspace", self.storage.url, "stop them, then try again")

    def _take_next_epoch(self, actor: str, body: Mapping[str, Any]) -> Record | None:
        """Put an acquisition into the next slot and fold it; None if another record is in the slot."""
        record, content = self._next(ACQUIRE, actor, self.state.epoch + 1, "", {}, body)
        self._acquisitions.add(record.write_id)
        winner = self._take_slot(record, content)
        if winner.write_id != record.write_id:
            return None
        if self.state.seq < record.seq:
            self._fold(record, digest(content))
        return record

    def _refuse_owned(self, service: Identity | None) -> None:
        owner = self.state.owner
        if owner is not None and owner.is_another_than(service):
            raise owned_by_another(owner, self.storage.url, service)

    def commit(
        self,
        op: str,
        *,
        op_key: str,
        actor: str,
        refs: Mapping[str, int] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> SubspaceState:
        """Append one record: when this returns, it is durable and folded.

        Raises:
            NotWritten: The storage refused it: it is not in the log, and will not be.
            OutcomeUnknown: Whether it is in the log is not known; see `settle`.
            Conflict: Fenced: a newer writer has opened the subspace. This object writes no more.
            InvalidInput: A body that no reader could fold.
            Corrupt: Another writer uses our epoch: an alarm. This object writes no more.
        """
        with self._lock:
            self.settle(op_key)
            record, content = self._next(op, actor, self.epoch, op_key, refs or {}, body or {})
            try:
                # A record that this code could not read again must never get a slot.
                fold(self.state, record, digest(content))
            except Corrupt as error:
                # Nothing that is stored is damaged: the new record is wrong.
                raise InvalidInput(f"cannot be written: {error.what}", op, "nothing was written; correct it") from error
            self._pending = (record, content)
            try:
                self._finish(record, content)
            except NotWritten:
                self._pending = None
                raise
            self._checkpoint()
            return self.state

    def settle(self, op_key: str = "") -> None:
        """Settle a write whose outcome is unknown, if there is one: afterwards every outcome is known.

        Args:
            op_key: Key of the present request. If the write in doubt has the same key, it is finished; else it is
                either in the log by now, or will never be.

        Raises:
            OutcomeUnknown: The write in doubt is this request's own, and stays in doubt.
            NotWritten: It is another request's, and stays in doubt: nothing was done of this request.
            Conflict, Corrupt: As `commit`.
            InvalidInput: This log was opened for reading.
        """
        with self._lock:
            if self.writer is None or not self.epoch:
                raise InvalidInput("this log is open for reading", self.storage.url, "open it with a writer's name")
            if self._stopped is None and self._pending is not None:
                self._settle(*self._pending, op_key)
            if self._stopped is not None:
                raise type(self._stopped)(*self._stopped.args)
            if self.state.epoch > self.epoch:
                # Seen while reading: slots after the newer writer's record must not be taken with our epoch.
                self._stopped = Fenced(
                    f"a newer writer opened this subspace with epoch {self.state.epoch}, after our {self.epoch}",
                    self.storage.url,
                    "read again through the new writer; this one has stopped",
                )
                raise self._stopped

    def _settle(self, record: Record, content: bytes, op_key: str) -> None:
        is_asked_again = bool(op_key) and record.op_key == op_key
        try:
            self.refresh()
            if self._pending is not None and is_asked_again:
                self._finish(record, content, in_doubt=True)
            elif self._pending is not None:
                self._take_next_epoch(self.writer or "", {})
                self.refresh()
        except OutcomeUnknown as error:
            if is_asked_again:
                raise
            what = f"nothing was begun: what became of {record.op} {record.op_key!r} before it is not known yet"
            raise NotWritten(f"{what} ({error.what})", error.where, "try again") from error
        except Unavailable as error:
            if is_asked_again:
                raise outcome_unknown(error.what, op_key, error.where, record.seq) from error
            raise

    def records(self, newest_first: bool = False) -> Iterator[Record]:
        """Every record up to the last that was folded. One read each."""
        last = self.state.seq
        yield from map(self.record, range(last, 0, -1) if newest_first else range(1, last + 1))

    def record(self, seq: int) -> Record:
        """A record that was folded. One read. Raises Corrupt where it is gone."""
        found = self._read(seq)
        if found is None:
            raise Corrupt("the record is gone", f"{self.storage.url}/{log_key(seq)}", "restore it from a backup")
        return found[0]

    def _finish(self, record: Record, content: bytes, in_doubt: bool = False) -> None:
        winner = self._take_slot(record, content, in_doubt)
        if winner.write_id == record.write_id and self.state.seq < record.seq:
            self._fold(record, digest(content))
        elif winner.write_id != record.write_id:
            self.refresh()
            if self._stopped is not None:
                raise self._stopped

    def _lost(self, record: Record, winner: Record) -> OnebasisError:
        where = f"{self.storage.url}/{log_key(record.seq)}"
        if winner.epoch > record.epoch:
            return Fenced(
                f"writer {winner.writer!r} opened this subspace with epoch {winner.epoch}, after our {record.epoch}",
                where,
                "read again through the new writer; this one has stopped",
            )
        return Corrupt(
            f"epoch {winner.epoch} is used by two writers, {winner.writer!r} and {record.writer!r}",
            where,
            "stop all writers: the storage may ignore create-if-absent (`If-None-Match: *`); use one that honours it",
        )

    def _take_slot(self, record: Record, content: bytes, in_doubt: bool = False) -> Record:
        """Try until a record is in the slot, and return it; the caller judges whose it is.

        Args:
            in_doubt: Whether an earlier attempt may still be on its way.

        Raises:
            NotWritten: Every attempt was refused: none is on its way.
            OutcomeUnknown: The slot was empty, or could not be read, up to the last attempt.
        """
        key, trouble = log_key(record.seq), "the slot is still empty"
        for attempt in range(TRIES):
            if attempt:
                self._wait(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                if self.storage.create(key, content):
                    return record
                in_doubt = True
            except NotWritten as refusal:
                if not in_doubt:
                    raise
                trouble = refusal.what
            except Unavailable as error:
                in_doubt, trouble = True, error.what
            try:
                found = self._read(record.seq)
            except Unavailable as error:
                trouble = error.what
                continue
            if found is not None:
                return found[0]
        what = f"the outcome of {record.op} is unknown after {TRIES} tries: {trouble}"
        raise outcome_unknown(what, record.op_key, f"{self.storage.url}/{key}", record.seq)

    def _next(
        self, op: str, actor: str, epoch: int, op_key: str, refs: Mapping[str, int], body: Mapping[str, Any]
    ) -> tuple[Record, bytes]:
        record = Record(
            seq=self.state.seq + 1,
            prev_sha256=self.state.head_sha256,
            write_id=secrets.token_hex(16),
            epoch=epoch,
            writer=self.writer or "",
            time=time.time(),
            actor=actor,
            op=op,
            op_key=op_key,
            refs=refs,
            body=to_plain(body),
        )
        return record, _to_json(record)

    def _read(self, seq: int) -> tuple[Record, str] | None:
        key = log_key(seq)
        try:
            content = self.storage.read(key)
        except NotFound:
            return None
        where = f"{self.storage.url}/{key}"
        return checked(Record, _from_json(content, where), where), digest(content)

    def _fold(self, record: Record, sha256: str) -> None:
        self.state = fold(self.state, record, sha256)
        if record.write_id in self._acquisitions:
            self.epoch = record.epoch
        if self._pending is not None and self._pending[0].seq == record.seq:
            (pending, _), self._pending = self._pending, None
            if record.write_id not in (pending.write_id, *self._acquisitions):
                self._stopped = self._lost(pending, record)

    def _from_checkpoint(self) -> SubspaceState:
        for seq in self._checkpoints():
            where = f"{self.storage.url}/{checkpoint_key(seq)}"
            try:
                envelope = _from_json(self.storage.read(checkpoint_key(seq)), where)
                names = ("state", STATE_WITH_PRIVATE, STATE_WITH_RENEWED, STATE_WITH_REPLACED)
                plain = next((envelope[name] for name in names if name in envelope), None)
                state = checked(SubspaceState, plain, where)
                record = self.storage.read(log_key(seq))
            except (NotFound, Corrupt, TypeError):
                continue
            if envelope.get("sha256") == digest(_to_json(plain)) and (state.seq, state.head_sha256) == (
                seq,
                digest(record),
            ):
                return state
        return SubspaceState()

    def _checkpoints(self) -> Iterator[int]:
        """Sequence numbers of checkpoints to try, newest first. The hint only saves listing them."""
        with contextlib.suppress(NotFound, ValueError):
            yield int(self.storage.read(HINT))
        names = [key.removeprefix("checkpoints/").removesuffix(".json") for key in self.storage.keys("checkpoints/")]
        yield from sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _checkpoint(self) -> None:
        """Best effort: a checkpoint can always be made again from the log."""
        state = self.state
        if state.seq % CHECKPOINT_EVERY:
            return
        folded = _to_json(state)
        versions = state.versions.values()
        if any(version.left for version in versions):
            name = STATE_WITH_REPLACED
        elif any(version.renewed_count for version in versions):
            name = STATE_WITH_RENEWED
        else:
            name = STATE_WITH_PRIVATE if any(t.private for v in versions for t in v.brought) else "state"
        content = b'{"sha256":"%s","%s":%s}' % (digest(folded).encode(), name.encode(), folded)
        try:
            self.storage.write(checkpoint_key(state.seq), content)
            self.storage.write(HINT, str(state.seq).encode())
        except Unavailable:
            return


def _to_json(record: Any) -> bytes:
    return json.dumps(to_plain(record), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _from_json(content: bytes, where: str) -> Any:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"is not JSON: {error}", where, "restore it from a backup") from error
    return _as_text(values) if len(content) > TEXT_MAX or _SUSPICIOUS.search(content) else values


_SUSPICIOUS = re.compile(rb"\\(u00[01]|u007[fF]|u00[89]|u[dD][89a-fA-F]|[bfr])")
"""Escapes that may be a control character or half of a character (a surrogate), in JSON that `_to_json` wrote."""


def _as_text(values: Any) -> Any:
    """The same values; characters of strings that are not plain text are escaped, strings that are too long are cut.

    Releases before 0.4 took any string as a reason or a name, and the log keeps it: such a string must not reach a
    terminal, nor break an HTTP answer.
    """
    if isinstance(values, dict):
        return {as_escaped_text(key): _as_text(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_as_text(value) for value in values]
    return as_escaped_text(values) if isinstance(values, str) else values
