"""What people can ask and order, each as one method that is handed a request and returns plain JSON values.

The HTTP server calls these methods; when the service is down, the command line does, in its own process: reading,
exporting and rolling back need no running service. Requests that read do not wait for torch: what needs it is imported
where it is used.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from configs.document import Request, without_password
from configs.errors import (
    Conflict,
    Corrupt,
    DatabaseAway,
    Fenced,
    InvalidInput,
    NotFound,
    NotWritten,
    OnebasisError,
    OwnedByAnother,
    Unavailable,
    UnreadableTask,
)
from configs.settings import Settings
from orchestrator.alarms import ASKED_FOR, WRITE_CODES, WRITING, AlarmCode, Alarms
from orchestrator.api import requests, views
from orchestrator.api.deadlines import Deadlines
from orchestrator.api.estimates import Estimates, KeptLine, Line, places_in
from orchestrator.api.latest import Latest
from orchestrator.api.requests import Json, ServiceRequest
from orchestrator.api.routes import route_of
from orchestrator.api.why import Surroundings, wait_of, who_holds, why
from orchestrator.judging.forgetting import forgetting_report
from orchestrator.judging.score_table import ScoreTable, newest_scores, score_table
from orchestrator.reports.loss_plot import plot_file
from orchestrator.scheduling.estimate import Pace, ends, pace_of
from orchestrator.scheduling.fair_share import Waiting
from orchestrator.scheduling.pools import described
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.tasks.task_events import CancelRequested, Paused, PreemptRequested, Resumed
from orchestrator.tasks.task_record import ENDED_WITHOUT_RESULT, LIVE, SERVICE, Drain, Pause, TaskRecord, TaskState
from subspace_store.commands.in_doubt import in_doubt, noted, settled
from subspace_store.files.presence import check_files
from subspace_store.log.retention import check_task_is_known
from subspace_store.log.version import CANDIDATE, EMPTY, MAIN, Hold, SubspaceState
from subspace_store.requests import Answer, Compact, Remove, Rollback, StoreRequest, Unquarantine
from subspace_store.storage.create_rule import SCRATCH
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    from configs.task_spec import TaskSpec
    from orchestrator.cluster import Cluster
    from orchestrator.controller import Controller
    from orchestrator.leadership import StandsBy
    from orchestrator.tasks.admission import Draft
    from orchestrator.tasks.task_queue import Placed, TaskQueue
    from subspace_store.subspace_reader import RollbackPreview, SubspaceReader
    from workers.orders import BaseLayout

Check = Callable[["TaskSpec", Settings, "BaseLayout"], "Draft"]
"""`check_submission`, in this or another process."""

LOOK_SECONDS = 3.0
"""Longest wait for the store, or for the database, when a person asks for the status."""
LOOKING = "reading for the status"
"""Part of the service that alarms about this reading name."""
TRIAL_BYTES = 4096
"""Size of the object with which a store that refused a write is tried: a record of the log, and a block of a disk."""
TREND_VERSIONS = 20
"""Newest versions of a lineage whose sizes `capacity` tells."""
PACE_TASKS = 50
"""Number of tasks, the newest that ended, from which the pace of the next ones is estimated."""
CHANGES = {
    "cancel": (TaskState.QUEUED, TaskState.TRAINING, TaskState.MERGING),
    "retry": ENDED_WITHOUT_RESULT,
    "pause": (TaskState.QUEUED, TaskState.TRAINING),
    "resume": (TaskState.QUEUED, TaskState.TRAINING),
}
"""States of the tasks that a change of many is about, unless it names one."""
STORE_SECONDS = 120.0
"""Longest wait for one call to the store: a merge of a large model may be before it."""


class Service:
    """One service as its users see it.

    Args:
        queue: Task queue; None where it is not shared: then the first request about tasks opens it, since importing the
            SQL library takes as long as all the rest of a command.
        controller, cluster: None when the service is down; then what needs a worker is refused with the next step.
        check: How a submission is checked; default: in the thread that asks, which nothing can end.
        stands_by: Of a control plane that stands by: who leads, now.
    """

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue | None,
        storage: Storage,
        controller: Controller | None = None,
        cluster: Cluster | None = None,
        health: Callable[[], Json] = dict,
        check: Check | None = None,
        alarms: Alarms | None = None,
        stands_by: Callable[[], StandsBy] | None = None,
    ) -> None:
        self._stands_by = stands_by
        self._settings = settings
        self._given_queue = queue
        self._storage = storage
        self._controller = controller
        self._cluster = cluster
        self._health = health
        self._alarms = alarms or (controller.alarms if controller is not None else Alarms())
        self._log_read = Latest(self._read_log, storage.url)
        self._counted = Latest(
            lambda: (self._queue.counts(), self._waiting(), self._queue.unreadable()), "the task database"
        )
        self._sized = Latest(lambda: self._footprint(self._store.state.refs[MAIN]), storage.url)
        self._check = check
        self._estimates = Estimates(lambda: self._queue)
        self._kept_line = KeptLine(controller.line if controller is not None else lambda: ((), ()))
        self._deadlines = Deadlines(lambda: self._queue, self._line)
        self._scored_at: tuple[int, Mapping[str, float | None]] = (-1, {})
        """Sequence number of the log, and the scores under `main` then."""

        self._unknown_at = (-1, 0)
        """Sequence number of the log, and how many tasks `main` held then that the task database does not know."""

    @cached_property
    def _store(self) -> SubspaceReader:
        from subspace_store.subspace_reader import SubspaceReader

        return SubspaceReader.open(self._storage)

    @cached_property
    def _queue(self) -> TaskQueue:
        from orchestrator.tasks.task_queue import TaskQueue

        return self._given_queue or TaskQueue(self._settings.database_url, self._settings.failures)

    def answer(self, request: Request) -> Any:
        """Carry out a request of any kind."""
        try:
            return self._answer(request)
        except Corrupt as error:
            if self._controller is not None and not isinstance(error, UnreadableTask):
                self._controller.damaged(error)
            raise

    def _answer(self, request: Request) -> Any:
        if self._stands_by is not None and route_of(request).verb == "POST":
            raise self._stands_by().refusal
        match request:
            case Rollback():
                return self.rollback(request)
            case StoreRequest():
                return self.change(request)
            case ServiceRequest():
                return request.on(self)
        raise TypeError(f"{type(request).__name__} is no request to a service")

    # --- tasks -------------------------------------------------------------------------------------------------

    def submit(self, request: requests.Submit) -> Json:
        """Take a task in, or with dry_run only check it. The same submission again is the same task."""
        controller = self._running("submit")
        from orchestrator.tasks.admission import admit, check_submission, would_admit

        check = self._check or check_submission
        if controller.layout is None:
            causes = "; ".join(f"{name}: {what}" for name, what in sorted(controller.describe_workers().items()))
            raise Unavailable(f"no worker has loaded the base model yet ({causes})", todo="try again when one is free")
        with contextlib.closing(check(request.task, self._settings, controller.layout)) as draft:
            if request.dry_run:
                record, is_new = would_admit(draft, self._settings, self._queue, request.by, request.beside)
                return {
                    **(self._outlook(record) if is_new else {}),
                    "accepted": False,
                    "dry_run": True,
                    "is_new": is_new,
                    "title": f"{draft.spec.team}/{draft.spec.name}",
                    "train_rows": draft.train_count,
                    "eval_rows": draft.eval_count,
                    "warnings": list(draft.warnings),
                }
            record, is_new = admit(draft, self._settings, self._queue, self._storage, request.by, controller.submission)
        controller.wake()
        if record.spec.deadline:
            self._deadlines.add(record.task_id)
        line = self._line([record.task_id]) if record.spec.deadline else None  # else nobody is told when it starts
        return {"accepted": True, "is_new": is_new, "warnings": list(draft.warnings), **self._summary(record, line)}

    def _outlook(self, record: TaskRecord) -> Json:
        """What a task that is not there yet would meet: why it would not start at once, when it starts and ends, and
        what it costs, both from what the last tasks took."""
        controller = self._running("submit")
        task = Waiting(
            task_id=record.task_id,
            team=record.team,
            priority=record.spec.priority,
            submitted_at=record.submitted_at,
            pool=record.pool,
            ranks=controller.ranks[record.pool],
            seconds_max=record.spec.max_run_seconds,
        )
        stands = not record.blocked
        line = self._line([record.task_id], task if stands else None)
        pauses = self._queue.pauses()
        around = Surroundings(
            is_running=True,
            place=line.places.get(record.task_id),
            pace=line.paces.get(record.pool),
            start=line.starts.get(record.task_id),
            pauses=pauses,
            decided=controller.wait_of_another(task) if stands and record.task_id in line.places else None,
            idle_causes=controller.idle_causes(record.pool),
            pools=described(self._settings.pools),
            titles={task_id: found.title for task_id, found in self._queue.among(record.awaits).items()},
            alarms=self._ringing(),
        )
        wait = wait_of(record, around)
        start, pace = around.start, around.pace
        end = ends(start, pace) if start and pace else None
        return {
            "pool": record.pool,
            "fits": wait is None or wait.code is not WaitCode.NEVER_FITS,
            "why": why(record, around),
            "wait": _wait_json(wait),
            "place": around.place,
            "start": views.interval(start),
            "end": views.interval(end),
            "cost_worker_seconds": None if pace is None else pace.seconds,
            "deadline": views.deadline(record, end, record.submitted_at),
        }

    def tasks(self, request: requests.ListTasks) -> list[Json]:
        """The newest tasks, oldest first."""
        states = (request.state,) if request.state else ()
        records = self._queue.page(states, request.team, request.before, request.limit)
        if not records:
            self._known_team(request.team)
        is_any_queued = any(record.state is TaskState.QUEUED for record in records)
        line = self._line([record.task_id for record in records]) if is_any_queued else Line()
        scores, problem = self._main_scores(records)
        gone = set() if problem else self._gone_from_main(self._store.state, records)
        waiting = self._held_up(records)
        reasons = self._waits(records)
        return [
            self._summary(record, line)
            | {
                "main_score": scores.get(record.task_id),
                "main_score_problem": problem,
                "gone_from_main": record.task_id in gone,
                "held": waiting.get(record.task_id, ""),
                "wait": reasons.get(record.task_id),
            }
            for record in records
        ]

    def task(self, request: requests.ShowTask) -> Json:
        """One task by id, beginning of an id, or team/name: state, place, progress, result, events."""
        record = self._queue.find(request.reference)
        line = self._line([record.task_id]) if record.state is TaskState.QUEUED else Line()
        plot, result = plot_file(self._settings.state_dir, record), self._result(record)
        around = self._surroundings(record, line)
        return {
            **self._summary(record, line),
            "main_score": result["score_under_main"] if result else None,
            "gone_from_main": around.is_gone_from_main,
            "why": why(record, around),
            "wait": _wait_json(wait_of(record, around)),
            "result": result,
            "alarms": [alarm.as_dict() for alarm in self._alarms] if record.state in LIVE else [],
            **views.task_details(record, self._queue.events(record.task_id), plot),
            "warnings": views.warnings(record, result),
        }

    def cancel(self, request: requests.Cancel) -> Json:
        """Stop a task that is not part of a version yet."""
        controller = self._running("cancel")
        record = self._queue.find(request.reference)
        after = self._queue.apply(record.task_id, CancelRequested(request.by, time.time()))
        if after.state is TaskState.CANCELLED:
            with contextlib.suppress(Unavailable):  # then the loop does it, which deletes all else as well
                self._storage.delete(after.train_key)
            controller.forget_files(after.task_id)
        controller.wake()
        return self._summary(after)

    def preempt(self, request: requests.Preempt) -> Json:
        """Have a running task write a checkpoint and go back to the queue; it keeps its place and goes on from there.

        A task that waits already stays as it is: asked twice, it is preempted once.
        """
        controller = self._running("preempt")
        record = self._queue.find(request.reference)
        after = self._queue.apply(record.task_id, PreemptRequested(request.by))
        controller.wake()
        return self._summary(after)

    def retry(self, request: requests.Retry) -> Json:
        """Submit a task again that ended without a result; one that is alive stays as it is."""
        return self._retry(self._queue.find(request.reference), request.by)

    def _retry(self, record: TaskRecord, by: str) -> Json:
        if record.state in LIVE:
            return {"accepted": True, "is_new": False, "warnings": [], **self._summary(record)}
        if record.state is TaskState.PUBLISHED:
            raise Conflict("is published", record.title, "submit it under another name to train it anew")
        spec = record.spec.model_copy(update={"client_key": None})  # which is the old task's for ever
        return self.submit(requests.Submit(task=spec, by=by))

    def pause(self, request: requests.Pause) -> Json:
        """Start a task no more, or nothing of a team or of the service. What a task did goes on from its checkpoint."""
        now = time.time()
        if request.reference is not None:
            self._refuse_two(request)
            record = self._queue.find(request.reference)
            after = self._queue.apply(record.task_id, Paused(by=request.by, message=request.reason, at=now))
            self._wake()
            return {**self._summary(after), "paused": _pause_json(after.paused)}
        team = self._known_team(request.team)
        asked = Pause(by=request.by, reason=request.reason, at=now)
        before = self._queue.set_pause(team, asked)
        self._wake()
        return {"team": request.team, "is_new": before is None, "paused": _pause_json(before or asked)}

    def resume(self, request: requests.Resume) -> Json:
        """Take a pause back. Without one nothing changes."""
        if request.reference is not None:
            self._refuse_two(request)
            record = self._queue.find(request.reference)
            after = self._queue.apply(record.task_id, Resumed(request.by))
            self._wake()
            return {**self._summary(after), "paused": None}
        before = self._queue.set_pause(self._known_team(request.team), None)
        self._wake()
        return {"team": request.team, "is_new": before is not None, "paused": None}

    def drain(self, request: requests.DrainWorker) -> Json:
        """Give a worker, or all on a machine, nothing new from now on, or take that back. Kept in the database."""
        controller, what = self._running("drain"), request.what
        known = controller.machines if request.is_node else tuple(sorted(controller.describe_workers()))
        about = {drain.what for drain in self._queue.drains() if drain.is_node == request.is_node}
        if what not in known and what not in about:
            kind = "machine of that address" if request.is_node else "worker of that name"
            raise NotFound(f"there is no {kind}", what, f"there are: {', '.join(known) or 'none'}")
        if request.undo:
            before = self._queue.set_drain(what, request.is_node, None)
            after = None
        else:
            after = Drain(
                what=what,
                is_node=request.is_node,
                by=request.by,
                reason=request.reason,
                at=time.time(),
                waits=request.wait,
            )
            before = self._queue.set_drain(what, request.is_node, after)
        controller.wake()
        workers = [one for one in controller.workers if what == one.name or what in (one.machines or ())]
        return {
            "what": what,
            "is_node": request.is_node,
            "is_new": (before is None) is not request.undo,
            "drain": after.model_dump(mode="json") if after else None,
            "workers": {one.name: str(one) for one in workers},
        }

    def change_many(self, request: requests.ChangeMany) -> Json:
        """The same for many tasks, the oldest first; of several of one name only the newest. What does not belong to a
        task's state is no error: it is told."""
        self._running(request.change)
        if request.team is None and request.state is None:
            raise InvalidInput("names neither a team nor a state", request.change, "add --team, --state or both")
        self._known_team(request.team)
        states = (request.state,) if request.state else CHANGES[request.change]
        newest = {record.title: record for record in self._queue.tasks(states, request.team)}
        done, refused = [], []
        for record in newest.values():
            try:
                done.append(self._change_one(request, record)["title"])
            except OnebasisError as error:
                refused.append({"title": record.title, "error": {**error.as_dict(), "text": str(error)}})
        return {"change": request.change, "done": done, "refused": refused}

    def _change_one(self, request: requests.ChangeMany, record: TaskRecord) -> Json:
        asked, by = record.task_id, request.by
        match request.change:
            case "cancel":
                return self.cancel(requests.Cancel(reference=asked, by=by))
            case "retry":
                return self._retry(self._queue.find(record.title), by)
            case "pause":
                return self.pause(requests.Pause(reference=asked, reason=request.reason, by=by))
            case "resume":
                return self.resume(requests.Resume(reference=asked, by=by))

    def _known_team(self, team: str | None) -> str:
        """The team as the pauses name it; the service where there is none. Raises InvalidInput for an unknown one."""
        if team is not None and team not in self._settings.teams:
            known = ", ".join(sorted(self._settings.teams))
            raise InvalidInput(f"there is no team '{team}'", "team", f"teams of this service: {known}")
        return SERVICE if team is None else team

    def _refuse_two(self, request: requests.Pause | requests.Resume) -> None:
        if request.team is not None:
            raise InvalidInput("names a task and a team", "team", "name one of them")

    def _wake(self) -> None:
        if self._controller is not None:
            self._controller.wake()

    def logs(self, request: requests.ReadLog) -> list[Json]:
        """A task's history after an event id; the points of its curves as JSON."""
        record = self._queue.find(request.reference)
        return [asdict(event) for event in self._queue.events(record.task_id, request.after)]

    # --- versions ----------------------------------------------------------------------------------------------

    def versions(self) -> list[Json]:
        """All versions, oldest first, with the branches that name them."""
        state = self._store.refresh()
        return [views.version_summary(state, version) for _, version in sorted(state.versions.items())]

    def version(self, request: requests.ShowVersion) -> Json:
        """One version: tasks, scores, ranks, drift, what is stored."""
        state, number = self._store.refresh(), request.version
        _check_version(state, number)
        table = self._table(state, number)
        return {
            **views.version_summary(state, state.versions.get(number, EMPTY)),
            "tasks": [views.task_in_version(state, table, number, task_id) for task_id in state.tasks_at(number)],
            "ranks": {name: list(ranks) for name, ranks in self._store.ranks(number).items()},
            "footprint": self._footprint(number),
            **self._figures(table, number, self._queue.among(table.tasks)),
        }

    def diff(self, request: requests.Diff) -> Json:
        """What lies between two versions: tasks, ranks, how far the basis turned, drift and scores per task."""
        state, old, new = self._store.refresh(), request.old, request.new
        for number in (old, new):
            _check_version(state, number)
        before, after = self._table(state, old), self._table(state, new)
        titles = {t.task_id: t.name for v in state.versions.values() for t in v.added}
        scores = {
            titles[task_id]: [
                views.number_or_none(before.score(old, task_id)),
                views.number_or_none(after.score(new, task_id)),
            ]
            for task_id in {*before.tasks, *after.tasks}
        }
        return {**views.plain(asdict(self._store.diff(old, new))), "scores": scores, "titles": titles}

    def preview_rollback(self, request: requests.PreviewRollback) -> Json:
        """What moving `main` to a version would do."""
        state = self._store.refresh()
        _check_version(state, request.version)
        found, refused = self._store.preview_rollback(request.version), ""
        try:
            self._refuse_doubles(found)
            check_files(self._storage, state, request.version)
        except (Conflict, Corrupt) as error:
            refused = str(error)
        return {**views.rollback(found, preview=True, held=False), "refused": refused}

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
        return {**answer, "repeated": not is_new, "main": self._store.refresh().refs[MAIN]}

    def change(self, request: StoreRequest[Any]) -> Json:
        """Tag, hold, pin, expire … through the store's one writer. The same op_key again is the same request."""
        if isinstance(request, (Remove, Compact)) and not request.publish:
            what = "publish has to be true: a candidate that no task waits for is rejected"
            raise InvalidInput(what, request.operation, "set publish")
        request = request.named()
        state = self._store.refresh()
        if isinstance(request, Unquarantine) and request.op_key not in state.op_keys:
            check_task_is_known(state, request.task_id)
        self._write(request)
        self._written()
        return {"operation": request.operation, **request.model_dump(mode="json", exclude={"actor"})}

    def export(self, request: requests.Export) -> bytes:
        """One task at a version as a zipped PEFT folder; default: what `main` holds."""
        from subspace_store.formats.peft import write_peft_folder

        state = self._store.refresh()
        number = state.refs[MAIN] if request.version is None else request.version
        _check_version(state, number)
        task_id = self._task_id_at(state, number, request.reference)
        adapter = self._store.adapter(task_id, number)
        packed = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
            write_peft_folder(Path(folder), adapter, self._settings.base_model.source)
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
        return packed.getvalue()

    def scores(self, request: requests.ShowScores) -> Json:
        """The matrix A[version][task] of the lineage that ends in a version (default `main`), and its means."""
        state = self._store.refresh()
        number = state.refs[MAIN] if request.version is None else request.version
        _check_version(state, number)
        table = self._table(state, number)
        names = {task_id: task.name for task_id, task in state.tasks_at(number).items()}
        records = self._queue.among(table.tasks)
        return {
            "version": number,
            "versions": list(table.versions),
            "tasks": [views.score_column(t, names[t], table.birth[t], records.get(t)) for t in table.tasks],
            "matrix": [[views.cell(table, row, task_id) for task_id in table.tasks] for row in table.versions],
            "by_version": [{"version": row, **self._figures(table, row, records)} for row in table.versions],
            "footprint": self._footprint(number),
        }

    def capacity(self, request: requests.ShowCapacity) -> Json:
        """The numbers that serving a version (default `main`) needs, task by task, and how they came to be so many."""
        state = self._store.refresh()
        number = state.refs[MAIN] if request.version is None else request.version
        _check_version(state, number)
        errors, coefficients = state.errors(number), self._store.coefficient_numbers(number)
        line = [0, *(version.number for version in state.history(number))][-TREND_VERSIONS:]
        return {
            "version": number,
            "footprint": self._footprint(number),
            "rank_max": self._settings.subspace.rank_max,
            "tasks": [
                views.task_size(task, errors[task_id], coefficients.get(task_id, 0))
                for task_id, task in state.tasks_at(number).items()
            ],
            "trend": [asdict(self._store.footprint(version)) for version in line if version not in state.expired],
        }

    def status(self) -> Json:
        """Whether the service is up, what its workers do, how many tasks are in which state, what is wrong.

        Answered within seconds: if the store or the database is late, an alarm rings and its last answer, or None,
        counts.
        """
        state, (counted, waiting) = self._state_soon(), self._counts_soon()
        return {
            "storage": self._storage.url,
            "mlflow": without_password(self._settings.mlflow.tracking_uri),
            "main": state.refs[MAIN] if state else None,
            "candidate": state.refs[CANDIDATE] if state else None,
            "held": asdict(state.held) if state and state.held else None,
            "tasks": counted,
            **waiting,
            "gone_from_main": self._count_gone(state) if state and counted and counted.get(TaskState.PUBLISHED) else 0,
            "not_in_database": self._count_unknown(state) if state and counted is not None else 0,
            "footprint": self._footprint_soon() if state else None,
            "in_doubt": self._requests_in_doubt(state),
            "late": [told.as_dict() for told in self._deadlines.late],
            "left_running": self._left_running(),
            **({} if self._is_up else self._led_elsewhere()),
            **self.health(),
        }

    def _led_elsewhere(self) -> Json:
        """Which other control planes run of this service, whose own here does not."""
        if not self._settings.database_url.startswith("postgresql"):
            return {}
        from orchestrator.leadership import leadership_json
        from orchestrator.tasks.leader_lease import LeaderLease

        with contextlib.suppress(OnebasisError), contextlib.closing(LeaderLease(self._settings.database_url)) as lease:
            found = leadership_json(lease.look(), "")
            if found["leader"] is not None:
                return {"leadership": found}
        return {}

    def _left_running(self) -> list[str]:
        """Title and process id of whatever still runs of a local service without a control plane that answers."""
        if self._is_up or self._settings.ray.address != "local":
            return []
        from orchestrator.ray_head import ADDRESS_FILE, MODULE
        from orchestrator.signs_of_life import ray_processes, title_of
        from subspace_store.commands.state_folder import process_of, running_server

        state_dir = Path(self._settings.state_dir).resolve()
        own = {"control plane": running_server(state_dir), "Ray head": process_of(state_dir / ADDRESS_FILE, MODULE)}
        found = {pid: name for name, pid in own.items() if pid is not None}
        found |= {process.pid: title_of(process) for process in ray_processes(state_dir)}
        return [f"{title} (pid {pid})" for pid, title in found.items()]

    def health(self) -> Json:
        """Whether the service runs, which alarms ring, what the workers do, who held `main` when the log was last read:
        what this process knows by itself."""
        alarms = [alarm.as_dict() for alarm in self._alarms]
        name = self._settings.base_model.name
        state = self._log_read.last  # `look` reads it every few seconds
        held = {"held": asdict(state.held) if state.held else None} if state else {}
        return {"base_model": name, "running": self._is_up, **held, **self._pools(), **self._health(), "alarms": alarms}

    def _pools(self) -> Json:
        """The pools with their workers, and what people have drained; nothing where no service runs."""
        controller = self._controller
        if controller is None:
            return {}
        pools = {name: views.pool(found) for name, found in controller.describe_pools().items()}
        return {"pools": pools, "drains": [drain.model_dump(mode="json") for drain in controller.drains]}

    def look(self) -> None:
        """Look at the store and the database as `status` does, and ring if one is away: nobody else would notice while
        there is nothing to do. Takes 2 · LOOK_SECONDS at most."""
        try:
            self._state_soon()
            self._counts_soon()
        except OnebasisError as error:
            self._alarms.ring_for(error, LOOKING)
        if self._controller is not None:
            with contextlib.suppress(OnebasisError):  # told by what was read before
                self._deadlines.look()
        self._try_to_write()

    def _try_to_write(self) -> None:
        """End the alarm about a write that a person asked for as soon as the store takes a small object: the person may
        never ask again, and nobody else would find out. What the loop has to write, it tries again itself."""
        if not any(alarm.about == ASKED_FOR and alarm.code in WRITE_CODES for alarm in self._alarms):
            return
        key = f"{SCRATCH}{secrets.token_hex(8)}"
        try:
            self._storage.write(key, bytes(TRIAL_BYTES))
            self._storage.delete(key)
        except OnebasisError:
            return  # it rings, with what was refused
        self._alarms.end_all(ASKED_FOR, *WRITE_CODES)

    def _read_log(self) -> SubspaceState:
        from subspace_store.log.store_format import read_format

        state = self._store.refresh()
        if state.seq and read_format(self._storage) is None:  # an empty folder reads as a log without news
            raise Unavailable("the store is not there any more", self._storage.url, "is its disk mounted?")
        return state

    def _state_soon(self) -> SubspaceState | None:
        read, state = self._log_read, self._log_read.last
        try:
            state = read.within(LOOK_SECONDS)
        except Unavailable as error:
            if read.seconds <= LOOK_SECONDS or not read.is_late:  # not slow, as far as is known, but away
                self._alarms.ring_for(error, LOOKING)
                return state
        self._alarms.end_all(LOOKING, *WRITE_CODES)
        if read.seconds > LOOK_SECONDS:
            what = f"{self._storage.url} answers, but a read that takes a moment elsewhere took {read.seconds:.0f} s"
            self._alarms.ring(AlarmCode.STORE_SLOW, LOOKING, what)
        else:
            self._alarms.end(AlarmCode.STORE_SLOW, LOOKING)
        return state

    def _footprint_soon(self) -> Json | None:
        """The size of what `main` holds, or its last one. That the store is late is told by what was read before."""
        with contextlib.suppress(OnebasisError):
            return self._sized.within(LOOK_SECONDS)
        return self._sized.last

    def _counts_soon(self) -> tuple[dict[str, int] | None, Json]:
        """State to number of tasks, and why they wait; None and nothing where the database is late."""
        try:
            counts, waiting, unreadable = self._counted.within(LOOK_SECONDS)
        except Unavailable as error:
            told = DatabaseAway(error.what, error.where, error.todo)
            self._alarms.ring_for(told, LOOKING)
            return None, {}
        self._alarms.end(AlarmCode.DATABASE_AWAY, LOOKING)
        for about in unreadable:
            self._alarms.ring(AlarmCode.UNREADABLE_TASK, about.task_id, about.sentence, about.todo)
        for alarm in self._alarms:
            if alarm.code is AlarmCode.UNREADABLE_TASK and alarm.about not in {told.task_id for told in unreadable}:
                self._alarms.end(alarm.code, alarm.about)
        return counts, waiting

    # --- helpers -----------------------------------------------------------------------------------------------

    @property
    def _is_up(self) -> bool:
        """Whether the service runs, this control plane or another one leading it."""
        return self._controller is not None or self._stands_by is not None

    @property
    def _leader(self) -> str:
        """Name of the control plane that leads, where this one stands by."""
        return self._stands_by().leader if self._stands_by is not None else ""

    def _running(self, what: str) -> Controller:
        if self._controller is None:
            raise requests.not_running(what)
        if self._controller.ousted_by is not None:
            raise self._controller.ousted_by
        return self._controller

    def _write(self, request: StoreRequest[Answer]) -> Answer:
        """Make a writing call. A request whose outcome is unknown is kept, and shown, until the log has the answer."""
        if self._cluster is not None and self._alarms.rings(AlarmCode.RAY_DOWN):
            what = "Ray does not work, so the store's writer cannot be reached: this call wrote nothing"
            raise NotWritten(
                what, todo="`onebasis up` starts it again; then repeat it, with its --op-key if it had one"
            )
        try:
            with noted(Path(self._settings.state_dir), request), request.told_with_its_key():
                answer = self._write_once(request)
        except NotWritten as error:
            if self._controller is not None:  # which, while it has nothing to merge, would not find out
                self._alarms.ring_for(error, ASKED_FOR, f"'{request.operation}' was refused")
            raise
        for about in (WRITING, ASKED_FOR):
            self._alarms.end_all(about, *WRITE_CODES)
        return answer

    def _requests_in_doubt(self, state: SubspaceState | None) -> list[Json]:
        """Requests of unknown outcome: not those that the log has by now, nor those whose record can no longer come."""
        state_dir = Path(self._settings.state_dir)
        for doubt in in_doubt(state_dir):
            if state is not None and (doubt.op_key in state.op_keys or 0 < doubt.seq <= state.seq):
                settled(state_dir, doubt.op_key)
        return [asdict(doubt) for doubt in in_doubt(state_dir)]

    def _write_once(self, request: StoreRequest[Answer]) -> Answer:
        """Write through the running store actor, or with a writer opened for this one call."""
        cluster = self._cluster
        if cluster is not None:
            from orchestrator.cluster import wait_for

            try:
                return cast("Answer", wait_for(cluster, lambda: cluster.write(request), STORE_SECONDS))
            except Fenced:
                # Fenced by a command that wrote while the service was down: a fresh writer opens with the next epoch.
                cluster.replace_store()
            try:
                return cast("Answer", wait_for(cluster, lambda: cluster.write(request), STORE_SECONDS))
            except OwnedByAnother:
                self._written()  # the loop is to see it as well
                raise
        from subspace_store.commands.state_folder import service_identity
        from subspace_store.log.store_format import read_format
        from subspace_store.subspace_store import SubspaceStore

        if read_format(self._storage) is None:
            raise NotFound("there is no store yet", self._storage.url, "the first `onebasis up` makes it")
        base = self._settings.base_model
        writer = SubspaceStore.open(
            self._storage,
            settings=self._settings.subspace,
            base_model=base.name,
            base_sha256=base.weights_sha256,
            writer="command-line",
            service=service_identity(Path(self._settings.state_dir)),
        )
        return request.on(writer)

    def _footprint(self, number: int) -> Json:
        return asdict(self._store.footprint(number)) | {"stored_bytes": self._store.stored_bytes()}

    def _written(self) -> None:
        self._store.refresh()
        if self._controller is not None:
            self._controller.wake(log_moved=True)

    def _refuse_doubles(self, found: RollbackPreview) -> None:
        """A name means one task: none may return while another of its name is alive."""
        returning = {task.name: task.task_id for task in found.returning}
        for record in self._queue.living_of_names(returning).values():
            # A published task vanishes with this very rollback, unless it is the one that returns.
            if record.state is not TaskState.PUBLISHED and record.task_id != returning[record.title]:
                raise Conflict(
                    f"version {found.to_version} holds an older task of this name, and the new one is {record.state}",
                    f"{record.title} ({record.task_id})",
                    f"`onebasis cancel {record.task_id}` first, or wait until it has ended, then roll back again",
                )

    def _summary(self, record: TaskRecord, line: Line | None = None) -> Json:
        progress = self._queue.progress(record.task_id) if views.is_at_work(record) else {}
        return views.task_summary(record, line or Line(), progress, time.time())

    def _line(self, asked: Sequence[str], extra: Waiting | None = None) -> Line:
        """The tasks that stand in line, with the estimates of some; an empty one where no service runs.

        Args:
            extra: A task that is not there yet, and is shown where it would stand.
        """
        controller = self._controller
        if controller is None:
            return Line()
        tasks, running = self._kept_line() if extra is None else controller.line(extra)
        if not controller.ready_workers:
            return Line(places_in(tasks))
        free = controller.free_places
        of_pool = {task.task_id: task.pool for task in tasks}
        paces = {pool: self._pace(pool) for pool in {of_pool[task_id] for task_id in asked if task_id in of_pool}}
        return self._estimates.tell(tasks, running, free, paces, asked, remembered=extra is None)

    def _pace(self, pool: str) -> Pace | None:
        """How long tasks have a worker of a pool, from the last that ended."""
        ended = self._queue.page((TaskState.PUBLISHED, TaskState.REJECTED), limit=PACE_TASKS, pool=pool)
        return pace_of(span for record in ended if (span := _worker_seconds(record)) is not None)

    def _main_scores(self, records: Sequence[TaskRecord]) -> tuple[Mapping[str, float | None], str]:
        """Task id to the score under `main` now, for published tasks; and the reason, if the scores are not known. What
        is read from the log is kept until the log grows."""
        if not any(record.state is TaskState.PUBLISHED for record in records):
            return {}, ""
        try:
            state = self._store.refresh()
        except OnebasisError as error:  # the list of tasks is in the database, and is shown without it
            return {}, str(error)
        if self._scored_at[0] != state.seq:
            scores = newest_scores(state, state.refs[MAIN], self._settings.gate.drift_min)
            self._scored_at = (state.seq, {t: views.number_or_none(cell.score) for t, cell in scores.items()})
        return self._scored_at[1], ""

    def _held_up(self, records: Sequence[TaskRecord]) -> dict[str, str]:
        """Id of each task that waits since `main` is held, to who holds it and why; none if the log cannot be read."""
        if not any(record.state in (TaskState.MERGING, TaskState.EVALUATING) for record in records):
            return {}
        with contextlib.suppress(OnebasisError):  # `main_score_problem` and the alarms tell of it
            state = self._store.refresh()
            return {record.task_id: who_holds(held) for record in records if (held := _hold_over(record, state))}
        return {}

    def _gone_from_main(self, state: SubspaceState, tasks: Collection[TaskRecord | Placed]) -> set[str]:
        """Ids of published tasks that `main` no longer holds, since it was moved while no service ran; the next start
        parks them. None while a service runs, which does so by itself."""
        if self._is_up or not any(task.state is TaskState.PUBLISHED for task in tasks):
            return set()
        held = state.tasks_at(state.refs[MAIN])
        found = {t.task_id for t in tasks if t.state is TaskState.PUBLISHED and t.task_id not in held}
        return found if state.seq else set()  # a place without any log: is its disk mounted?

    def _count_gone(self, state: SubspaceState) -> int:
        with contextlib.suppress(OnebasisError):
            return len(self._gone_from_main(state, self._queue.placed()))
        return 0

    def _count_unknown(self, state: SubspaceState) -> int:
        """How many tasks `main` holds that the task database does not know: it was lost, and the store was not."""
        if self._unknown_at[0] != state.seq:
            held = state.tasks_at(state.refs[MAIN])
            with contextlib.suppress(OnebasisError):
                self._unknown_at = (state.seq, len(held) - len(self._queue.among(held)))
        return self._unknown_at[1]

    def _waits(self, records: Sequence[TaskRecord]) -> dict[str, Json | None]:
        """Id of each of these tasks that is queued to the record of why it waits."""
        queued = [record for record in records if record.state is TaskState.QUEUED]
        if not queued:
            return {}
        pauses, alarms = self._queue.pauses(), self._ringing()
        found = {}
        for record in queued:
            around = Surroundings(
                is_running=self._is_up,
                pauses=pauses,
                decided=self._decided(record),
                alarms=alarms,
                leader=self._leader,
            )
            found[record.task_id] = _wait_json(wait_of(record, around))
        return found

    def _ringing(self) -> dict[AlarmCode, str]:
        """The alarms that ring, as people read them."""
        return {alarm.code: str(alarm) for alarm in self._alarms}

    def _decided(self, record: TaskRecord) -> Wait | None:
        """The scheduler's reason for a task that stands in line."""
        stands = self._controller is not None and record.state is TaskState.QUEUED and not record.blocked
        return self._controller.wait_in_line(record) if self._controller is not None and stands else None

    def _waiting(self) -> Json:
        """Number of queued tasks by team and by the code of their reason; and what is paused."""
        pauses = self._queue.pauses()
        found: dict[str, dict[str, int]] = {}
        for team, pool, blocked, count in self._queue.queued():
            decided = self._controller.decision.behind.get((pool, team)) if self._controller is not None else None
            line = decided.code if decided is not None else WaitCode.NO_FREE_PLACE
            line = line if pool in self._settings.pools else WaitCode.NEVER_FITS
            code = WaitCode.PAUSED if {team, SERVICE} & pauses.keys() else blocked or line
            counts = found.setdefault(team, {})
            counts[str(code)] = counts.get(str(code), 0) + count
        paused = {team: _pause_json(pause) for team, pause in pauses.items() if team}
        return {"waiting": found, "paused": {"service": _pause_json(pauses.get(SERVICE)), "teams": paused}}

    def _titles(self, record: TaskRecord) -> dict[str, str]:
        """Names of the tasks that may be named in the reason why a task waits."""
        named = set(record.awaits)
        if (decided := self._decided(record)) is not None:
            named.add(decided.about)
        return {task_id: found.title for task_id, found in self._queue.among(named - {""}).items()}

    def _surroundings(self, record: TaskRecord, line: Line) -> Surroundings:
        controller, queued = self._controller, record.state is TaskState.QUEUED
        state = self._store.refresh()
        return Surroundings(
            is_running=self._is_up,
            main=state.refs[MAIN],
            is_gone_from_main=record.task_id in self._gone_from_main(state, [record]),
            place=line.places.get(record.task_id),
            pace=line.paces.get(record.pool),
            start=line.starts.get(record.task_id),
            idle_causes=controller.idle_causes(record.pool) if controller else (),
            pools=described(self._settings.pools),
            phase=str(self._queue.progress(record.task_id).get("phase", "")) if views.is_at_work(record) else "",
            held=_hold_over(record, state),
            is_version_refined=controller is not None and controller.is_refining(record.version),
            pauses=self._queue.pauses() if queued else {},
            decided=self._decided(record),
            titles=self._titles(record),
            alarms=self._ringing(),
            leader=self._leader,
        )

    def _result(self, record: TaskRecord) -> Json | None:
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

    def _figures(self, table: ScoreTable, version: int, records: Mapping[str, TaskRecord]) -> Json:
        local = {t: r.local_score for t, r in records.items() if r.local_score is not None}
        return views.describe_report(forgetting_report(table, version, local))

    def _table(self, state: SubspaceState, version: int) -> ScoreTable:
        return score_table(state, version, self._settings.gate.drift_min)

    def _task_id_at(self, state: SubspaceState, version: int, reference: str) -> str:
        """The id of a task in a version, by id or name: of several tasks with that name, the one in the version."""
        held = state.tasks_at(version)
        found = [i for i, task in held.items() if task.name == reference or i.startswith(reference)]
        if len(found) != 1:
            names = ", ".join(task.name for task in held.values()) or "no tasks"
            raise NotFound(f"version {version} has no task '{reference}'", todo=f"it holds: {names}")
        return found[0]


def _hold_over(record: TaskRecord, state: SubspaceState) -> Hold | None:
    """The hold of `main` that a task waits for: in the version that is the candidate, or trained and behind it."""
    is_behind = record.state is TaskState.MERGING and state.refs[CANDIDATE] != state.refs[MAIN]
    return state.held if record.state is TaskState.EVALUATING or is_behind else None


def _wait_json(wait: Wait | None) -> Json | None:
    return None if wait is None else {**asdict(wait), "who": str(wait.who)}


def _pause_json(pause: Pause | None) -> Json | None:
    return None if pause is None else pause.model_dump(mode="json")


def _worker_seconds(record: TaskRecord) -> float | None:
    """How long a task had its worker, from the claim to the adapter; None: it was not trained here."""
    if record.train_seconds is None or record.spec.method.name == "import":
        return None
    start = max(0.0, record.first_step_at - record.claimed_at) if record.first_step_at and record.claimed_at else 0.0
    return start + record.train_seconds


def _check_version(state: SubspaceState, number: int) -> None:
    """Raise NotFound, with the versions there are, for an unknown one. Version 0 is the empty subspace."""
    if number and number not in state.versions:
        newest = max(state.versions, default=0)
        todo = f"versions go from 0 to {newest}; `onebasis versions` lists them" if newest else "none is made yet"
        raise NotFound(f"there is no version {number}", todo=todo)
