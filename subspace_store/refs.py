"""The names of versions: scored, published, rejected, rolled back, tagged, held, pinned, given up. One record each.

No version is made here (subspace_store.py makes them), and no tensor is read but the heads of adapters that are let go.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from configs.document import Line, VersionNumber
from configs.errors import (
    Conflict,
    Corrupt,
    Fenced,
    InvalidInput,
    NotFound,
    NotWritten,
    OutcomeUnknown,
    Unavailable,
)
from subspace_store.adapter import adapter_to_bytes
from subspace_store.files import blobs
from subspace_store.files.presence import check_files
from subspace_store.log import fold, garbage, retention
from subspace_store.log.version import CANDIDATE, MAIN, RowsScore, SubspaceState, TaskScore
from subspace_store.strict import Days, Moment, TaskId, Text, strict
from subspace_store.subspace_reader import RollbackPreview, SubspaceReader, rollback_preview

SECONDS_A_DAY = 86400.0
COUNT_MAX = 2**53
"""Rows that a score is measured on: no more than JSON's readers keep exactly."""


class Refs(SubspaceReader):
    """What a writer does with versions that are there. A part of `SubspaceStore`, which is what one opens."""

    @strict
    def record_scores(self, version: VersionNumber, scores: Sequence[TaskScore], *, op_key: Line, actor: Line) -> None:
        """Write measured scores of a version; a task's later score replaces its earlier one. NaN is kept.

        Raises:
            NotFound: No such version, or a task that it does not hold.
            InvalidInput: An infinite score, or fewer rows than none.
        """
        with self._writing():
            if self._done(op_key, fold.asked(fold.SCORES, version=version)) is not None:
                return
            held = self.state.tasks_at(self._known(version))
            for score in scores:
                if score.task_id not in held:
                    raise NotFound(f"version {version} holds no task {score.task_id}")
                if score.general_loss is not None and not math.isfinite(score.general_loss):
                    raise InvalidInput("a loss has to be a number", score.task_id, "write null if it was not measured")
                measured: tuple[TaskScore | RowsScore, ...] = (score, *score.of_rows)
                for one in measured:
                    if math.isinf(one.score):
                        todo = "write NaN if it was not measured"
                        raise InvalidInput("a score cannot be infinite", score.task_id, todo)
                    if not 0 <= one.count <= COUNT_MAX:
                        raise InvalidInput(
                            f"measured on {one.count:.3g} rows", score.task_id, "give how many there were"
                        )
            body = {"version": version, "scores": tuple(scores)}
            self._log.commit(fold.SCORES, op_key=op_key, actor=actor, body=body)

    @strict
    def publish(self, version: VersionNumber, *, op_key: Line, actor: Line) -> None:
        """Move `main` to the candidate.

        Raises:
            Conflict: `version` is not the candidate any more, or `main` is held.
        """
        with self._writing():
            if self._done(op_key, fold.asked(fold.PUBLISH, version=version)) is None:
                self._require_candidate(version)
                retention.check_not_held(self.state)
                body = {"version": version}
                self._log.commit(fold.PUBLISH, op_key=op_key, actor=actor, refs={MAIN: version}, body=body)

    @strict
    def reject(
        self,
        version: VersionNumber,
        reason: Text,
        *,
        op_key: Line,
        actor: Line,
        task_ids: Sequence[TaskId] = (),
        codes: Sequence[Line] = (),
    ) -> None:
        """Mark the candidate as rejected and move `candidate` back to `main`. The version stays readable.

        Args:
            task_ids: Tasks whose scores broke a rule of the gate.
            codes: Rules that were broken, for programs.

        Raises:
            Conflict: `version` is not the candidate any more, or is published already.
        """
        with self._writing():
            if self._done(op_key, fold.asked(fold.REJECT, version=version)) is None:
                self._require_candidate(version)
                main = self.state.refs[MAIN]
                if version == main:
                    raise Conflict(f"version {version} is published", todo="roll back instead")
                body = {"version": version, "reason": reason, "task_ids": tuple(task_ids), "codes": tuple(codes)}
                self._log.commit(fold.REJECT, op_key=op_key, actor=actor, refs={CANDIDATE: main}, body=body)

    @strict
    def rollback(
        self, version: VersionNumber, *, op_key: Line, actor: Line, reason: Line = "", hold: bool = False
    ) -> RollbackPreview:
        """Move `main` and `candidate` to a version, backwards or forwards again, in one record.

        Args:
            hold: Hold `main` there as well, in the same record; see `hold`.

        Cost:
            One record, and one byte of each object that the version needs. Nothing is copied or deleted.

        Raises:
            Corrupt: Something that the version needs is gone.
            Else as `preview_rollback`.
        """
        with self._writing():
            if self._done(op_key, fold.asked(fold.ROLLBACK, version=version, hold=hold)) is None:
                preview = self.preview_rollback(version)
                check_files(self.storage, self.state, version)
                body = {"version": version, "from": preview.from_version, "reason": reason, "hold": hold}
                refs = {MAIN: version, CANDIDATE: version}
                self._log.commit(fold.ROLLBACK, op_key=op_key, actor=actor, refs=refs, body=body)
                return preview
        return self._rollback_done(op_key)

    # Names, and what they keep. Each is one record. Asked for what is so already, it is one too if it has a key, so
    # that the key belongs to this request from then on; without a key it is none.

    @strict
    def tag(self, name: Line, version: VersionNumber, *, actor: Line, op_key: Line = "") -> None:
        """Name a version for ever. A tagged version never expires.

        Raises:
            InvalidInput: A name that a branch or a version has or could have; a rejected or expired version.
            NotFound: No such version.
            Conflict: The tag names another version.
        """
        asked = fold.asked(fold.TAG, name=name, version=version)
        self._change(lambda state: retention.tag(state, name, version), actor, op_key, asked)

    @strict
    def hold(self, reason: Line, *, actor: Line, op_key: Line = "") -> None:
        """Keep `main` where it is: publishing is refused, merging and rolling back go on.

        Raises:
            Conflict: Somebody holds it already, or for another reason.
        """
        asked = fold.asked(fold.HOLD, reason=reason)
        self._change(lambda state: retention.hold(state, reason, actor), actor, op_key, asked)

    @strict
    def release(self, *, actor: Line, op_key: Line = "") -> None:
        """Let publishing move `main` again."""
        self._change(retention.release, actor, op_key, fold.asked(fold.RELEASE))

    @strict
    def quarantine(self, task_id: Line, reason: Line, *, actor: Line, op_key: Line = "") -> None:
        """Keep a task from being merged. Versions that hold it stay as they are."""
        asked = fold.asked(fold.QUARANTINE, task_id=task_id, reason=reason)
        self._change(lambda state: retention.quarantine(state, task_id, reason), actor, op_key, asked)

    @strict
    def unquarantine(self, task_id: Line, *, actor: Line, op_key: Line = "") -> None:
        """Let a task be merged again."""
        asked = fold.asked(fold.UNQUARANTINE, task_id=task_id)
        self._change(lambda state: retention.unquarantine(state, task_id), actor, op_key, asked)

    @strict
    def pin(
        self,
        version: VersionNumber,
        owner: Line,
        until: Moment | None = None,
        *,
        days: Days | None = None,
        actor: Line,
        op_key: Line = "",
    ) -> None:
        """Keep a version from expiring; the same owner again moves the end.

        Args:
            until: Unix seconds; None: until `unpin`.
            days: Instead of `until`: days from the moment at which the pin is written. The same request again, under
                its key, is the same number of days.

        Raises:
            InvalidInput: An expired version, no owner, or two ends.
            NotFound: No such version.
        """
        if until is not None and days is not None:
            raise InvalidInput("a pin has one end", todo="give `until` or `days`")
        end = until if days is None else time.time() + days * SECONDS_A_DAY
        how = until if days is None else f"{days} days"
        asked = fold.asked(fold.PIN, version=version, owner=owner, asked=how)
        self._change(lambda state: retention.pin(state, version, owner, end, how), actor, op_key, asked)

    @strict
    def unpin(self, version: VersionNumber, owner: Line, *, actor: Line, op_key: Line = "") -> None:
        """Give a pin up."""
        asked = fold.asked(fold.UNPIN, version=version, owner=owner)
        self._change(lambda state: retention.unpin(state, version, owner), actor, op_key, asked)

    @strict
    def expire(self, versions: Sequence[VersionNumber], *, actor: Line, op_key: Line = "") -> None:
        """Give versions up for ever; `collect` deletes what only they needed. See `retention.expirable`.

        Raises:
            Conflict: A branch, a tag or a pin names one of them. None has expired then.
            NotFound: No such version.
        """
        asked = fold.asked(fold.EXPIRE, asked=sorted({*versions}))
        self._change(lambda state: retention.expire(state, versions, time.time()), actor, op_key, asked)

    @strict
    def drop_adapters(self, task_ids: Sequence[TaskId], *, actor: Line, op_key: Line = "") -> None:
        """Let go of adapters as they were delivered; heads and what the subspace holds of the tasks stay.

        For ever: `delivered` has nothing to give then, and when another task is removed these are merged again
        approximately.

        Raises:
            NotFound: A task that no live version holds.
            Conflict: A task that is not published yet.
        """
        asked = fold.asked(fold.DROP_ADAPTERS, asked=sorted({*task_ids}))
        with self._writing():
            if self._done(op_key, asked) is not None:
                return
            heads = {
                key: blobs.write_blob(
                    self.storage, self._log.epoch, adapter_to_bytes(replace(self._read_delivered(task), modules={}))
                )
                for key, task in retention.droppable(self.state, task_ids).items()
            }
            self._change(lambda _: retention.drop(heads, task_ids), actor, op_key, asked)

    @strict
    def collect(self, *, uploads_in_use: Callable[[], Collection[str]] | None = None) -> garbage.Collected:
        """Delete what no live version needs; see `garbage.collect`. `collectable` only tells.

        Does not wait for a merge that is under way: another thread may call it.
        """
        return garbage.collect(self._log, uploads_in_use=uploads_in_use, really=True)

    def _change(self, judge: Callable[[SubspaceState], retention.Change], actor: str, op_key: str, asked: str) -> None:
        with self._writing():
            if self._done(op_key, asked) is not None:
                return
            change = judge(self.state)
            if change.alters or op_key:
                self._log.commit(change.op, op_key=op_key, actor=actor, body=change.body)
            else:
                # No record will tell us that a newer writer has changed it since: look.
                self._log.refresh()
                self._log.settle()

    @strict
    def withdraw(self, op_key: Line) -> None:
        """Make sure that a request of unknown outcome is not done any more, or find that it was done.

        Raises:
            Conflict: It was done: the log has it.
            Unavailable: The storage was away: nothing is known yet.
        """
        with self._writing():
            self._log.settle()
            self._log.refresh()
            if op_key in self.state.op_keys:
                version = self.state.op_keys[op_key]
                raise Conflict(
                    f"{op_key!r} was done" + (f", it made or concerns version {version}" if version else ""),
                    self.storage.url,
                    "`onebasis store log` shows it; what it moved can be moved back with `onebasis rollback`",
                )

    # Requests

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One request.

        A refusal is judged by what this writer has folded. Where a newer one has written since, it is not worth
        anything: what is gone may have been collected, what is taken may be free. Then `Fenced` is the answer.

        Raises:
            OutcomeUnknown: The record may be on its way.
            NotWritten: There is none, whatever it was that failed before it.
        """
        with self._lock:
            try:
                with self._judged_by_the_newest():
                    yield
            except (OutcomeUnknown, NotWritten):
                raise
            except Unavailable as error:
                raise NotWritten(f"nothing was written: {error.what}", error.where, error.todo) from error

    @contextlib.contextmanager
    def _judged_by_the_newest(self) -> Iterator[None]:
        try:
            yield
        except (InvalidInput, NotFound, Conflict, Corrupt) as refusal:
            if not isinstance(refusal, Fenced):
                self._log.refresh()
                self._log.settle()
            raise

    def _done(self, op_key: str, asked: str) -> int | None:
        """The version that this request made or concerned, if it was done; after any unknown outcome is settled.

        Args:
            asked: The request in short; see `fold.asked`.

        Raises:
            Conflict: Another request was done under this key: answered as done, this one would be lost silently.
        """
        if op_key not in self.state.op_keys:
            self._log.settle(op_key)
        if not op_key or op_key not in self.state.op_keys:
            return None
        if (known := self.state.asked.get(op_key, asked)) != asked:
            raise another_request(op_key, known.split()[0])
        return self.state.op_keys[op_key]

    def _rollback_done(self, op_key: str) -> RollbackPreview:
        body = next(record.body for record in self._log.records(newest_first=True) if record.op_key == op_key)
        return rollback_preview(self.state, int(body.get("from", body["version"])), int(body["version"]))

    def _require_candidate(self, version: int) -> None:
        candidate = self.state.refs[CANDIDATE]
        if self._known(version) != candidate:
            raise Conflict(f"the candidate is version {candidate}, not {version}", self.storage.url, "judge that one")


def another_request(op_key: str, operation: str) -> Conflict:
    """The error for a key that names another request."""
    return Conflict(
        f"under op_key {op_key!r} another request was done, a {operation}",
        todo="ask under another key, or none; `onebasis store log` shows what was done under this one",
    )
