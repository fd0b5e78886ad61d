"""What people ask about the versions of a subspace: listed, compared, scored, rolled back, exported, tagged.

Reading, exporting and rolling back need no running service. What needs torch is imported where it is used.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import tempfile
import time
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from configs.errors import (
    Conflict,
    Corrupt,
    Fenced,
    InvalidInput,
    NotFound,
    NotWritten,
    OnebasisError,
    OwnedByAnother,
    Unavailable,
)
from orchestrator.alarms import ASKED_FOR, WRITE_CODES, WRITING, AlarmCode
from orchestrator.api import latest, requests, views
from orchestrator.api.latest import LOOKING, Latest
from orchestrator.api.requests import Json
from orchestrator.api.sources import Sources
from orchestrator.api.why import who_holds
from orchestrator.judging.forgetting import forgetting_report
from orchestrator.judging.score_table import ScoreTable, newest_scores, rows_of, score_table
from orchestrator.tasks.task_events import Reason
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store.commands.in_doubt import in_doubt, noted, settled
from subspace_store.files.presence import check_files
from subspace_store.log.retention import check_judged, check_not_held, check_task_is_known
from subspace_store.log.version import CANDIDATE, EMPTY, MAIN, Hold, MergedTask, SubspaceState
from subspace_store.requests import (
    Answer,
    Compact,
    Reject,
    Remove,
    RestoreRevision,
    Rollback,
    StoreRequest,
    Unquarantine,
)
from subspace_store.storage.create_rule import SCRATCH
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    from orchestrator.tasks.task_queue import Placed
    from subspace_store.subspace_reader import RollbackPreview, SubspaceReader

TRIAL_BYTES = 4096
"""Size of the object with which a store that refused a write is tried: a record of the log, and a block of a disk."""
TREND_VERSIONS = 20
"""Newest versions of a lineage whose sizes `capacity` tells."""
STORE_SECONDS = 120.0
"""Longest wait for one call to the store: a merge of a large model may be before it."""


class Versions:
    """The versions of one subspace as its users see them.

    Args:
        name: Of the base model.
    """

    def __init__(self, sources: Sources, name: str, storage: Storage) -> None:
        self.name = name
        self._sources = sources
        self._alarms = sources.alarms.of(name)
        self.storage = storage
        self._log_read = Latest(self._read_log, storage.url)
        self._sized = Latest(lambda: self._footprint(self.state.refs[MAIN]), storage.url)
        self._scored_at: tuple[int, Mapping[str, float | None]] = (-1, {})
        """Sequence number of the log, and the scores under `main` then."""
        self._unknown_at = (-1, 0)
        """Sequence number of the log, and how many tasks `main` held then that the task database does not know."""

    @cached_property
    def _store(self) -> SubspaceReader:
        from subspace_store.subspace_reader import SubspaceReader

        return SubspaceReader.open(self.storage)

    @property
    def state(self) -> SubspaceState:
        """What the log said when it was last read."""
        return self._store.state

    @property
    def last_read(self) -> SubspaceState | None:
        """The same, as `state_soon` read it; None before that."""
        return self._log_read.last

    def refresh(self) -> SubspaceState:
        """What the log says now."""
        return self._store.refresh()

    def let_go(self) -> None:
        """Keep no tensors that an export or a comparison has read: the bases of one large model take gigabytes."""
        if "_store" in self.__dict__:
            self._store.let_go()

    def all(self) -> list[Json]:
        """All versions, oldest first, with the branches that name them."""
        state = self._store.refresh()
        found = (views.version_summary(state, version) for _, version in sorted(state.versions.items()))
        return [{**row, "base_model": self.name} for row in found]

    def named_at(self, request: requests.BranchesAt) -> Json:
        """Which versions the branches named at a moment, and what `main` held then.

        Raises:
            InvalidInput: The moment has not come.
            NotFound: There was no store.
        """
        if request.at > (now := time.time()):
            what = f"that moment comes in {request.at - now:.0f} s"
            raise InvalidInput(what, "at", "name one that has passed; `onebasis versions` shows what is now")
        state = self._store.refresh()
        named, seq = self._store.moves.at(request.at)
        main = named[MAIN]
        return {
            "base_model": self.name,
            "at": request.at,
            "seq": seq,
            "branches": named,
            "expired": main in state.expired,
            "tasks": sorted(task.name for task in state.tasks_at(main).values()),
        }

    def history(self, request: requests.ShowHistory, of_teams: Collection[str] | None = None) -> Json:
        """The moves of a branch, the newest first, and what each did to tasks and their scores. of_teams: As for
        `scores`.

        Cost:
            A read of each record of the log back to the last move that is shown, once for this service; the scores as
            `rows_of`. No tensor is read.
        """
        state = self._store.refresh()
        found = list(islice(self._store.moves.newest_first(request.branch, request.before), request.limit + 1))
        moves = found[: request.limit]
        versions = {number for move in moves for number in (move.before, move.after)}
        rows = rows_of(state, versions, self._sources.settings.gate.drift_min)
        held = {number: _named(state, number, of_teams) for number in versions}
        return {
            "base_model": self.name,
            "branch": request.branch,
            "moves": [views.move(state, move, held, rows) for move in moves],
            "before": moves[-1].seq if len(found) > len(moves) else None,
        }

    def one(self, request: requests.ShowVersion, of_teams: Collection[str] | None = None) -> Json:
        """One version: tasks, scores, ranks, drift, what is stored. of_teams: As for `scores`."""
        state, number = self._store.refresh(), request.version
        _check_version(state, number)
        table, hidden = _of_teams(self._table(state, number), state, of_teams)
        return {
            **views.version_summary(state, state.versions.get(number, EMPTY)),
            "base_model": self.name,
            "tasks": [views.task_in_version(state, table, number, task_id) for task_id in table.tasks],
            **hidden,
            "ranks": {name: list(ranks) for name, ranks in self._store.ranks(number).items()},
            "footprint": self._footprint(number),
            **self._figures(table, number, self._sources.queue.among(table.tasks)),
        }

    def diff(self, request: requests.Diff) -> Json:
        """What lies between two versions: tasks, ranks, how far the basis turned, drift and scores per task."""
        state, old, new = self._store.refresh(), request.old, request.new
        for number in (old, new):
            _check_version(state, number)
        before, after = self._scores_of_names(state, old), self._scores_of_names(state, new)
        scores = {name: [before.get(name), after.get(name)] for name in {**before, **after}}
        found = views.plain(asdict(self._store.diff(old, new)))
        return {**found, "base_model": self.name, "scores": scores, "titles": state.names()}

    def preview_rollback(self, request: requests.PreviewRollback) -> Json:
        """What moving `main` to a version would do."""
        state = self._store.refresh()
        _check_version(state, request.version)
        found, refused = self._store.preview_rollback(request.version), ""
        try:
            self._refuse_doubles(found)
            check_files(self.storage, state, request.version)
        except (Conflict, Corrupt) as error:
            refused = str(error)
        return {**views.rollback(found, preview=True, held=False), "base_model": self.name, "refused": refused}

    def rollback(self, request: Rollback) -> Json:
        """Move `main` to a version. The same op_key again is the same rollback."""
        state = self._store.refresh()
        _check_version(state, request.version)
        request = request.named()
        is_new = request.op_key not in state.op_keys
        if is_new:
            self._refuse_doubles(self._store.preview_rollback(request.version))
        found = self._write(request)
        self._written()
        answer = views.rollback(found, preview=False, held=request.hold, op_key=request.op_key)
        main = self._store.refresh().refs[MAIN]
        return {**answer, "base_model": self.name, "repeated": not is_new, "main": main}

    def reject(self, request: requests.RejectVersion) -> Json:
        """Reject the candidate, as the gate would: the loop finds it in the log. The same again is done already.

        Raises:
            Conflict: It does not wait to be published: it is, or is rejected, or is not the candidate, or its tasks are
                being refined.
        """
        self._sources.running("reject")
        state, number = self._store.refresh(), request.version
        _check_version(state, number)
        key = f"{Reject.operation}:{number}:by-a-person"
        is_new = key not in state.op_keys
        if is_new:
            self._check_waits(state, number)
            reason = f"{request.by} refused it: {request.reason}"
            codes = (str(Reason.REFUSED),)
            self._write(Reject(version=number, reason=reason, codes=codes, op_key=key, actor=request.by))
            self._written()
            state = self._store.state
        return {
            "base_model": self.name,
            "version": number,
            "tasks": [task.name for task in state.versions[number].added],
            "reason": state.rejected[number],
            "main": state.refs[MAIN],
            "repeated": not is_new,
        }

    def _check_waits(self, state: SubspaceState, number: int) -> None:
        """Raise Conflict for a version that no verdict is awaited for."""
        if number in state.rejected:
            raise Conflict(f"version {number} is rejected already: {state.rejected[number]}")
        if number == 0 or number in state.published or state.refs[MAIN] == number:
            raise Conflict(f"version {number} is published", todo="`onebasis rollback` moves main away from it")
        if state.refs[CANDIDATE] != number:
            what = f"version {number} does not wait to be published: the candidate is version {state.refs[CANDIDATE]}"
            raise Conflict(what, todo="`onebasis versions` shows what each one is")
        if self._sources.queue.tasks([TaskState.REFINING], base_model=self.name):
            raise Conflict(f"tasks of version {number} are being refined", todo="ask again when that has ended")

    def preview_restore(self, request: requests.PreviewRestore) -> Json:
        """What putting an earlier revision of a task back would do."""
        state = self._store.refresh()
        found = self._store.preview_restore(request.task_id)
        return {
            "preview": True,
            "base_model": self.name,
            "title": found.restored.name,
            "task_id": request.task_id,
            "leaving": found.leaving.task_id,
            "version": found.version,
            "error": found.error,
            "approximate": found.is_approximate,
            "others_move": found.own_numbers_after is None,
            "refused": _refusal(state),
        }

    def restore_revision(self, request: RestoreRevision) -> Json:
        """Put an earlier revision of a task back, and move `main` there. The same op_key again is the same request."""
        _check_published(request)
        request = request.named()
        is_new = request.op_key not in self._store.refresh().op_keys
        made = self._write(request)
        self._written()
        (entry,) = made.added
        return {
            "preview": False,
            "base_model": self.name,
            "title": entry.name,
            "task_id": request.task_id,
            "leaving": entry.replaces,
            "version": made.number,
            "error": entry.error_at_birth,
            "approximate": bool(made.approximate),
            "others_move": made.transport is not None,
            "repeated": not is_new,
            "main": self._store.refresh().refs[MAIN],
            "op_key": request.op_key,
        }

    def preview_remove(self, request: requests.PreviewRemove) -> Json:
        """What removing a task would do, as `onebasis store remove` tells it without `--yes`."""
        state = self._store.refresh()
        found = self._store.preview_remove(request.task_id)
        title = state.names()[request.task_id]
        told = {"preview": True, "base_model": self.name, "task_id": request.task_id, "title": title}
        return {**told, **views.plain(asdict(found)), "refused": _refusal(state)}

    def stored(self) -> Json:
        """What the store takes, and what of it no version needs any more."""
        found, state = self._store.collectable(), self._store.state
        return {
            "base_model": self.name,
            "storage": self.storage.url,
            "versions": len(state.versions),
            "expired": sorted(state.expired),
            "rejected": sorted({*state.rejected} - {*state.expired}),
            "stored_bytes": self._store.stored_bytes(),
            "garbage_objects": len(found.keys),
            "garbage_bytes": found.size_bytes,
        }

    def change(self, request: StoreRequest[Any]) -> Json:
        """Tag, hold, pin, expire … through the store's one writer. The same op_key again is the same request."""
        if isinstance(request, (Remove, Compact)):
            _check_published(request)
        request = request.named()
        state = self._store.refresh()
        if isinstance(request, Unquarantine) and request.op_key not in state.op_keys:
            check_task_is_known(state, request.task_id)
        self._write(request)
        self._written()
        told = request.model_dump(mode="json", exclude={"actor"})
        return {"operation": request.operation, **told, "base_model": self.name}

    def held(self, reference: str, version: int | None) -> tuple[int, MergedTask]:
        """A version, default `main`, and a task as it holds it.

        Args:
            reference: An id, the beginning of one, or `team/name`.

        Raises:
            NotFound: It holds no such task, or there is no such version.
        """
        state, number = self._at(version)
        return number, state.tasks_at(number)[self._task_id_at(state, number, reference)]

    def export(self, request: requests.Export) -> bytes:
        """One task at a version as a zipped folder, of PEFT or of diffusers as it came; default: what `main` holds."""
        from subspace_store.formats.adapters import write_adapter

        number, task = self.held(request.reference, request.version)
        adapter = self._store.adapter(task.task_id, number)
        packed = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
            write_adapter(Path(folder), adapter, self._sources.settings.base(self.name).source)
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
        return packed.getvalue()

    def scores(self, request: requests.ShowScores, of_teams: Collection[str] | None = None) -> Json:
        """The matrix A[version][task] of the lineage that ends in a version (default `main`), and its means.

        Args:
            of_teams: Teams whose tasks are in it and in its means; None: all.
        """
        table, records, frame = self._scored(request.version, of_teams)
        return {
            **frame,
            "matrix": [[views.cell(table, row, task_id) for task_id in table.tasks] for row in table.versions],
            "by_version": [{"version": row, **self._figures(table, row, records)} for row in table.versions],
            "footprint": self._footprint(frame["version"]),
        }

    def matrix(self, request: requests.ShowMatrix, of_teams: Collection[str] | None = None) -> Json:
        """The matrix as a picture needs it. of_teams: As for `scores`.

        Cost:
            A cell that is carried over costs nothing in the answer: it is as long as what was measured, and not as what
            could be shown, 500,000 cells of 1,000 tasks under 500 versions. Only the column of a revision has, for the
            rows of each revision, a score per version.
        """
        table, _, frame = self._scored(request.version, of_teams)
        return {**frame, "news": views.news(table)}

    def flipped(self, record: TaskRecord, version: int | None, limit: int) -> Json:
        """See `orchestrator.api.flipped`. version: Default: what `main` holds."""
        from orchestrator.api.flipped import flipped

        state, number = self._at(version)
        found = flipped(record, self._table(state, number), number, self.storage, limit)
        return {"base_model": self.name, **found}

    def capacity(self, request: requests.ShowCapacity) -> Json:
        """The numbers that serving a version (default `main`) needs, task by task, and how they came to be so many."""
        state, number = self._at(request.version)
        errors, coefficients = state.errors(number), self._store.coefficient_numbers(number)
        line = [0, *(version.number for version in state.history(number))][-TREND_VERSIONS:]
        return {
            "base_model": self.name,
            "version": number,
            "footprint": self._footprint(number),
            "rank_max": self._sources.settings.subspace.rank_max,
            "tasks": [
                views.task_size(task, errors[task_id], coefficients.get(task_id, 0))
                for task_id, task in state.tasks_at(number).items()
            ],
            "trend": [asdict(self._store.footprint(version)) for version in line if version not in state.expired],
        }

    # --- helpers -----------------------------------------------------------------------------------------------

    def main_scores(self, records: Sequence[TaskRecord]) -> tuple[Mapping[str, float | None], str]:
        """Task id to the score under `main` now, for published tasks; and the reason, if the scores are not known. What
        is read from the log is kept until the log grows."""
        if not any(record.state is TaskState.PUBLISHED for record in records):
            return {}, ""
        try:
            state = self._store.refresh()
        except OnebasisError as error:  # the list of tasks is in the database, and is shown without it
            return {}, str(error)
        if self._scored_at[0] != state.seq:
            scores = newest_scores(state, state.refs[MAIN], self._sources.settings.gate.drift_min)
            self._scored_at = (state.seq, {t: views.number_or_none(cell.score) for t, cell in scores.items()})
        return self._scored_at[1], ""

    def held_up(self, records: Sequence[TaskRecord]) -> dict[str, str]:
        """Id of each task that waits since `main` is held, to who holds it and why; none if the log cannot be read."""
        if not any(record.state in (TaskState.MERGING, TaskState.EVALUATING) for record in records):
            return {}
        with contextlib.suppress(OnebasisError):  # `main_score_problem` and the alarms tell of it
            state = self._store.refresh()
            return {record.task_id: who_holds(held) for record in records if (held := hold_over(record, state))}
        return {}

    def gone_from_main(self, state: SubspaceState, tasks: Collection[TaskRecord | Placed]) -> set[str]:
        """Ids of published tasks that `main` no longer holds, since it was moved while no service ran; the next start
        parks them. None while a service runs, which does so by itself."""
        if self._sources.is_up or not any(task.state is TaskState.PUBLISHED for task in tasks):
            return set()
        held = state.tasks_at(state.refs[MAIN])
        found = {t.task_id for t in tasks if t.state is TaskState.PUBLISHED and t.task_id not in held}
        return found if state.seq else set()  # a place without any log: is its disk mounted?

    def count_gone(self, state: SubspaceState) -> int:
        with contextlib.suppress(OnebasisError):
            return len(self.gone_from_main(state, self._sources.queue.placed(self.name)))
        return 0

    def count_unknown(self, state: SubspaceState) -> int:
        """How many tasks `main` holds that the task database does not know: it was lost, and the store was not."""
        if self._unknown_at[0] != state.seq:
            held = state.tasks_at(state.refs[MAIN])
            with contextlib.suppress(OnebasisError):
                self._unknown_at = (state.seq, len(held) - len(self._sources.queue.among(held)))
        return self._unknown_at[1]

    def result(self, record: TaskRecord) -> Json | None:
        """What became of the task: its score at birth and under `main` now; None before it is in a version."""
        state = self._store.refresh()
        if not record.version or record.version not in state.versions:
            return None
        main = state.refs[MAIN]
        at_birth, now = self._table(state, record.version), self._table(state, main)
        return {
            "version": record.version,
            "score_at_birth": views.number_or_none(at_birth.score(record.version, record.task_id)),
            "main": main,
            "score_under_main": views.number_or_none(now.score(main, record.task_id)),
        }

    def scores_of_rows(self, record: TaskRecord) -> list[Json]:
        """Of a revision that is scored on the rows of several: its scores on those of each, oldest first."""
        if not record.earlier_rows:
            return []
        state = self._store.refresh()
        main = state.refs[MAIN]
        table = self._table(state, main)
        return [
            {
                "revision": number,
                "task_id": task_id,
                "first": views.number_or_none(table.first_on_rows(main + 1, task_id)),
                "main_before": record.main_scores_of_rows.get(task_id),
                "own": record.scores_of_rows.get(task_id),
                "under_main": views.number_or_none(table.on_rows(main, task_id)),
            }
            for task_id, number in record.numbers_of_rows.items()
        ]

    def _read_log(self) -> SubspaceState:
        from subspace_store.log.store_format import read_format

        state = self._store.refresh()
        if state.seq and read_format(self.storage) is None:  # an empty folder reads as a log without news
            raise Unavailable("the store is not there any more", self.storage.url, "is its disk mounted?")
        return state

    def state_soon(self) -> SubspaceState | None:
        read, state = self._log_read, self._log_read.last
        try:
            state = read.within(latest.LOOK_SECONDS)
        except Unavailable as error:
            if read.seconds <= latest.LOOK_SECONDS or not read.is_late:  # not slow, as far as is known, but away
                self._alarms.ring_for(error, LOOKING)
                return state
        self._alarms.end_all(LOOKING, *WRITE_CODES)
        if read.seconds > latest.LOOK_SECONDS:
            what = f"{self.storage.url} answers, but a read that takes a moment elsewhere took {read.seconds:.0f} s"
            self._alarms.ring(AlarmCode.STORE_SLOW, LOOKING, what)
        else:
            self._alarms.end(AlarmCode.STORE_SLOW, LOOKING)
        return state

    def footprint_soon(self) -> Json | None:
        """The size of what `main` holds, or its last one. That the store is late is told by what was read before."""
        with contextlib.suppress(OnebasisError):
            return self._sized.within(latest.LOOK_SECONDS)
        return self._sized.last

    def requests_in_doubt(self, state: SubspaceState | None) -> list[Json]:
        """Requests of unknown outcome: not those that the log has by now, nor those whose record can no longer come."""
        state_dir, settings = Path(self._sources.settings.state_dir), self._sources.settings
        # Of a request that named no base model: when it was made, there was one alone.
        mine = [doubt for doubt in in_doubt(state_dir) if (doubt.base_model or settings.base_names[0]) == self.name]
        found = []
        for doubt in mine:
            if state is not None and (doubt.op_key in state.op_keys or 0 < doubt.seq <= state.seq):
                settled(state_dir, doubt.op_key)
            else:
                found.append(asdict(doubt))
        return found

    def try_to_write(self) -> None:
        """End the alarm about a write that a person asked for as soon as the store takes a small object: the person may
        never ask again, and nobody else would find out. What the loop has to write, it tries again itself."""
        if not any(alarm.about == ASKED_FOR and alarm.code in WRITE_CODES for alarm in self._alarms):
            return
        key = f"{SCRATCH}{secrets.token_hex(8)}"
        try:
            self.storage.write(key, bytes(TRIAL_BYTES))
            self.storage.delete(key)
        except OnebasisError:
            return  # it rings, with what was refused
        self._alarms.end_all(ASKED_FOR, *WRITE_CODES)

    def _write(self, request: StoreRequest[Answer]) -> Answer:
        """Make a writing call. A request whose outcome is unknown is kept, and shown, until the log has the answer."""
        if self._sources.cluster is not None and self._alarms.rings(AlarmCode.RAY_DOWN):
            what = "Ray does not work, so the store's writer cannot be reached: this call wrote nothing"
            raise NotWritten(
                what, todo="`onebasis up` starts it again; then repeat it, with its --op-key if it had one"
            )
        try:
            with noted(Path(self._sources.settings.state_dir), request), request.told_with_its_key():
                answer = self._write_once(request)
        except NotWritten as error:
            if self._sources.controller is not None:  # which, while it has nothing to merge, would not find out
                self._alarms.ring_for(error, ASKED_FOR, f"'{request.operation}' was refused")
            raise
        for about in (WRITING, ASKED_FOR):
            self._alarms.end_all(about, *WRITE_CODES)
        return answer

    def _write_once(self, request: StoreRequest[Answer]) -> Answer:
        """Write through the running store actor, or with a writer opened for this one call."""
        cluster = self._sources.cluster
        if cluster is not None:
            from orchestrator.cluster import wait_for

            try:
                return cast("Answer", wait_for(cluster, lambda: cluster.write(self.name, request), STORE_SECONDS))
            except Fenced:
                # Fenced by a command that wrote while the service was down: a fresh writer opens with the next epoch.
                cluster.replace_store(self.name)
            try:
                return cast("Answer", wait_for(cluster, lambda: cluster.write(self.name, request), STORE_SECONDS))
            except OwnedByAnother:
                self._written()  # the loop is to see it as well
                raise
        from subspace_store.commands.state_folder import service_identity
        from subspace_store.log.store_format import read_format
        from subspace_store.subspace_store import SubspaceStore

        if read_format(self.storage) is None:
            raise NotFound("there is no store yet", self.storage.url, "the first `onebasis up` makes it")
        base = self._sources.settings.base(self.name)
        writer = SubspaceStore.open(
            self.storage,
            settings=self._sources.settings.subspace,
            base_model=base.name,
            base_sha256=base.weights_sha256,
            writer="command-line",
            service=service_identity(Path(self._sources.settings.state_dir)),
        )
        return request.on(writer)

    def _footprint(self, number: int) -> Json:
        return asdict(self._store.footprint(number)) | {"stored_bytes": self._store.stored_bytes()}

    def _written(self) -> None:
        self._store.refresh()
        if self._sources.controller is not None:
            self._sources.controller.subspaces[self.name].calls.wake(log_moved=True)

    def _refuse_doubles(self, found: RollbackPreview) -> None:
        """A name means one task: none may return while another of its name is alive."""
        returning = {task.name: task.task_id for task in found.returning}
        living = self._sources.queue.living_of_names(returning)
        for record in (one for alive in living.values() for one in alive):
            # A published task vanishes with this very rollback, unless it is the one that returns; and a revision on
            # its way finds out when it is to be merged.
            is_waiting = record.state is not TaskState.PUBLISHED and not record.revises
            if is_waiting and record.task_id != returning[record.title]:
                raise Conflict(
                    f"version {found.to_version} holds an older task of this name, and the new one is {record.state}",
                    f"{record.title} ({record.task_id})",
                    f"`onebasis cancel {record.task_id}` first, or wait until it has ended, then roll back again",
                )

    def _at(self, version: int | None) -> tuple[SubspaceState, int]:
        """What the log says now, and a version that it has, default `main`.

        Raises:
            NotFound: There is no such version.
        """
        state = self._store.refresh()
        number = state.refs[MAIN] if version is None else version
        _check_version(state, number)
        return state, number

    def _scored(
        self, version: int | None, of_teams: Collection[str] | None
    ) -> tuple[ScoreTable, Mapping[str, TaskRecord], Json]:
        """The table of a version (default `main`) with the tasks of some teams alone, their records, and what every
        answer says of it."""
        state, number = self._at(version)
        table, hidden = _of_teams(self._table(state, number), state, of_teams)
        held, records = state.tasks_at(number), self._sources.queue.among(table.tasks)
        frame = {
            "base_model": self.name,
            "version": number,
            **hidden,
            "versions": list(table.versions),
            "tasks": [views.score_column(table, number, held[t].name, t, records.get(t)) for t in table.tasks],
        }
        return table, records, frame

    def _figures(self, table: ScoreTable, version: int, records: Mapping[str, TaskRecord]) -> Json:
        local = {t: r.local_score for t, r in records.items() if r.local_score is not None}
        return views.describe_report(forgetting_report(table, version, local))

    def _table(self, state: SubspaceState, version: int) -> ScoreTable:
        return score_table(state, version, self._sources.settings.gate.drift_min)

    def _scores_of_names(self, state: SubspaceState, version: int) -> dict[str, float | None]:
        """Name to score: of two revisions of a task a version holds one."""
        table = self._table(state, version)
        held = state.tasks_at(version).items()
        return {task.name: views.number_or_none(table.score(version, task_id)) for task_id, task in held}

    def _task_id_at(self, state: SubspaceState, version: int, reference: str) -> str:
        """The id of a task in a version, by id or name: of several tasks with that name, the one in the version."""
        held = state.tasks_at(version)
        found = [i for i, task in held.items() if task.name == reference or i.startswith(reference)]
        if len(found) != 1:
            names = ", ".join(task.name for task in held.values()) or "no tasks"
            raise NotFound(f"version {version} has no task '{reference}'", todo=f"it holds: {names}")
        return found[0]


def _named(state: SubspaceState, version: int, of_teams: Collection[str] | None) -> dict[str, MergedTask]:
    """Name to task, of those that a version holds; of some teams alone."""
    tasks = state.tasks_at(version).values()
    return {task.name: task for task in tasks if of_teams is None or task.name.partition("/")[0] in of_teams}


def _of_teams(table: ScoreTable, state: SubspaceState, of_teams: Collection[str] | None) -> tuple[ScoreTable, Json]:
    """The table with the tasks of some teams alone, and how many are left out, as an answer says it."""
    if of_teams is None:
        return table, {}
    names = state.names()
    mine = tuple(t for t in table.tasks if names[t].partition("/")[0] in of_teams)
    count = len(table.tasks) - len(mine)
    return replace(table, tasks=mine), {"hidden": {"tasks": count}} if count else {}


def hold_over(record: TaskRecord, state: SubspaceState) -> Hold | None:
    """The hold of `main` that a task waits for: in the version that is the candidate, or trained and behind it."""
    is_behind = record.state is TaskState.MERGING and state.refs[CANDIDATE] != state.refs[MAIN]
    return state.held if record.state is TaskState.EVALUATING or is_behind else None


def _check_published(request: Remove | Compact | RestoreRevision) -> None:
    if not request.publish:
        what = "publish has to be true: a candidate that no task waits for is rejected"
        raise InvalidInput(what, request.operation, "set publish")


def _refusal(state: SubspaceState) -> str:
    """Why a move of `main` to a version that is made for it would be refused now; empty where it would not."""
    try:
        check_not_held(state)
        check_judged(state)
    except Conflict as error:
        return str(error)
    return ""


def _check_version(state: SubspaceState, number: int) -> None:
    """Raise NotFound, with the versions there are, for an unknown one. Version 0 is the empty subspace."""
    if number and number not in state.versions:
        newest = max(state.versions, default=0)
        todo = f"versions go from 0 to {newest}; `onebasis versions` lists them" if newest else "none is made yet"
        raise NotFound(f"there is no version {number}", todo=todo)
