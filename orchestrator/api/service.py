"""What people can ask and order, each as one method that returns plain JSON values.

The HTTP server exposes these methods, the command line calls them there, or here in its own process when the
service is down: reading, exporting and rolling back need no running service. Whoever reads waits for no torch: what
needs it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from configs.errors import Fenced, InvalidInput, NotFound, Unavailable
from configs.settings import Settings
from orchestrator.judging.forgetting import ForgettingReport, Mean, forgetting_report
from orchestrator.judging.score_table import ScoreTable, score_table
from orchestrator.reports.loss_plot import plot_file
from orchestrator.tasks.task_events import CancelRequested, PreemptRequested
from orchestrator.tasks.task_history import LOG, PROGRESS, point_of
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store.log.version import CANDIDATE, MAIN, SubspaceState, Version
from subspace_store.requests import Answer, Remove, Rollback, StoreRequest
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster
    from orchestrator.controller import Controller
    from orchestrator.tasks.task_queue import TaskQueue
    from subspace_store.subspace_reader import SubspaceReader

STORE_SECONDS = 120.0
"""Longest wait for one call to the store: a merge of a large model may be before it."""

Json = dict[str, Any]


class Service:
    """One service as its users see it.

    Args:
        queue: None where there is nobody to share it with: it is opened by the first who asks about tasks, since
            importing what speaks SQL takes as long as all the rest of a command.
        controller, cluster: None when the service is down; then what needs a worker is refused with the next step.
    """

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue | None,
        storage: Storage,
        controller: Controller | None = None,
        cluster: Cluster | None = None,
        health: Callable[[], Json] = dict,
    ) -> None:
        self._settings = settings
        self._given_queue = queue
        self._storage = storage
        self._controller = controller
        self._cluster = cluster
        self._health = health

    @cached_property
    def _store(self) -> SubspaceReader:
        from subspace_store.subspace_reader import SubspaceReader

        return SubspaceReader.open(self._storage)

    @cached_property
    def _queue(self) -> TaskQueue:
        from orchestrator.tasks.task_queue import TaskQueue

        return self._given_queue or TaskQueue(self._settings.database_url, self._settings.failures)

    # --- tasks -------------------------------------------------------------------------------------------------

    def submit(self, document: Json, dry_run: bool = False, by: str = "") -> Json:
        """Take a task in, or with dry_run only check it. The same submission again is the same task."""
        from orchestrator.tasks.admission import admit, check_submission

        controller = self._running("submit")
        if controller.layout is None:
            raise Unavailable("the workers are still loading the base model", todo="try again in a few seconds")
        with contextlib.closing(check_submission(document, self._settings, controller.layout)) as draft:
            if dry_run:
                return {
                    "accepted": False,
                    "dry_run": True,
                    "title": f"{draft.spec.team}/{draft.spec.name}",
                    "train_rows": draft.train_count,
                    "eval_rows": draft.eval_count,
                    "warnings": list(draft.warnings),
                }
            record, is_new = admit(draft, self._settings, self._queue, self._storage, by)
        controller.wake()
        return {"accepted": True, "is_new": is_new, "warnings": list(draft.warnings), **self._summary(record)}

    def tasks(self, team: str | None = None, state: str | None = None) -> list[Json]:
        """All tasks, oldest first."""
        if state is not None and state not in list(TaskState):
            raise InvalidInput(f"there is no state '{state}'", "state", f"states: {', '.join(TaskState)}")
        records = self._queue.tasks((TaskState(state),) if state else (), team)
        places = self._places()
        return [self._summary(record, places) for record in records]

    def task(self, reference: str) -> Json:
        """One task by id, beginning of an id, or team/name: state, place, progress, result, events."""
        record = self._queue.find(reference)
        history = self._queue.events(record.task_id)
        points = [point_of(event) for event in history if event.kind == PROGRESS]
        plot = plot_file(self._settings.state_dir, record)
        return {
            **self._summary(record, self._places()),
            "spec": record.spec.model_dump(mode="json"),
            "why": self._why(record),
            "train_rows": record.train_count,
            "eval_sha256": record.eval_sha256,
            "result": self._result(record),
            "adapter": {
                "staging_key": record.staging_key,
                "sha256": record.adapter_sha256,
                "parameters": record.adapter_parameters,
            },
            "training": {
                "steps": record.steps,
                "loss": record.train_loss,
                "seconds": record.train_seconds,
                "submit_to_first_step_seconds": _between(record.submitted_at, record.first_step_at),
                "claim_to_first_step_seconds": _between(record.claimed_at, record.first_step_at),
                "lost_machines": record.lost_machines,
                "own_bugs": record.own_bugs,
                "preemptions": record.preemptions,
                "refined_seconds": record.refined_seconds,
                "unrefined": record.unrefined,
                "share_full": record.spec.method.share_full,
                "method": record.method,
                "trainable_parameters": record.trainable_parameters,
                "basis_version": record.basis_version,
                "resumed_from": record.resumed_from,
                "last_point": _plain(asdict(points[-1])) if points else None,
                "plot": str(plot) if plot.exists() else None,
            },
            "metrics": dict(record.metrics),
            "events": [asdict(event) for event in history if event.kind not in (LOG, PROGRESS)],
        }

    def cancel(self, reference: str, by: str = "") -> Json:
        """Stop a task that is not part of a version yet."""
        controller = self._running("cancel")
        record = self._queue.find(reference)
        after = self._queue.apply(record.task_id, CancelRequested(by or "somebody", time.time()))
        if after.state is TaskState.CANCELLED and after.train_key:
            with contextlib.suppress(Unavailable):  # then the next start of the control plane deletes it
                self._storage.delete(after.train_key)
        controller.wake()
        return self._summary(after)

    def preempt(self, reference: str, by: str = "") -> Json:
        """Have a running task write a checkpoint and go back to the queue; it keeps its place and goes on from there.

        What waits anyway stays as it is: asked twice, it is preempted once.
        """
        controller = self._running("preempt")
        record = self._queue.find(reference)
        after = self._queue.apply(record.task_id, PreemptRequested(by or "somebody"))
        controller.wake()
        return self._summary(after)

    def logs(self, reference: str, after: int = 0) -> list[Json]:
        """A task's history after an event id; the points of its curves as JSON."""
        record = self._queue.find(reference)
        return [asdict(event) for event in self._queue.events(record.task_id, after)]

    # --- versions ----------------------------------------------------------------------------------------------

    def versions(self) -> list[Json]:
        """All versions, oldest first, with the branches that name them."""
        state = self._store.refresh()
        return [self._version(state, version) for _, version in sorted(state.versions.items())]

    def version(self, number: int) -> Json:
        """One version: tasks, scores, ranks, drift, what is stored."""
        state = self._store.refresh()
        _check_version(state, number)
        version = state.versions[number]
        table = self._table(state, number)
        return {
            **self._version(state, version),
            "tasks": [self._task_in(state, table, number, task_id) for task_id in state.tasks_at(number)],
            "ranks": {name: list(ranks) for name, ranks in self._store.ranks(number).items()},
            "footprint": asdict(self._store.footprint(number)),
            **self._figures(table, number, self._records(table)),
        }

    def diff(self, old: int, new: int) -> Json:
        """What lies between two versions: tasks, ranks, how far the basis turned, drift and scores per task."""
        state = self._store.refresh()
        for number in (old, new):
            _check_version(state, number, lowest=0)
        before, after = self._table(state, old), self._table(state, new)
        titles = {t.task_id: t.name for v in state.versions.values() for t in v.added}
        scores = {
            titles[task_id]: [_number(before.score(old, task_id)), _number(after.score(new, task_id))]
            for task_id in {*before.tasks, *after.tasks}
        }
        return {**_plain(asdict(self._store.diff(old, new))), "scores": scores, "titles": titles}

    def rollback(
        self, version: int, preview: bool = False, by: str = "", reason: str = "", key: str = "", hold: bool = False
    ) -> Json:
        """Move `main` to a version, or with preview only tell what would vanish.

        Args:
            key: The same key again is the same rollback.
            hold: Keep `main` there: what passes the gate waits until it is released.
        """
        state = self._store.refresh()
        _check_version(state, version, lowest=0)
        if preview:
            found = self._store.preview_rollback(version)
        else:
            op_key = f"rollback:{key or time.time_ns()}"
            actor = by or "somebody"
            found = self._write(Rollback(version=version, op_key=op_key, actor=actor, reason=reason, hold=hold))
            self._written()
        return {
            "preview": preview,
            "held": hold and not preview,
            "from_version": found.from_version,
            "to_version": found.to_version,
            "vanishing": [task.name for task in found.vanishing],
            "returning": [task.name for task in found.returning],
        }

    def change(self, request: StoreRequest[Any]) -> Json:
        """Tag, hold, pin, expire … through the store's one writer. The same `op_key` again is the same request."""
        if isinstance(request, Remove) and not request.publish:
            raise InvalidInput(
                "publish has to be true: a candidate that no task waits for is rejected", "remove", "set publish"
            )
        if not request.op_key:
            request = request.model_copy(update={"op_key": f"{request.operation}:{time.time_ns()}"})
        self._store.refresh()
        self._write(request)
        self._written()
        return {"operation": request.operation, **request.model_dump(mode="json", exclude={"actor"})}

    def export(self, reference: str, version: int | None = None) -> bytes:
        """One task at a version as a zipped PEFT folder; default: what `main` holds."""
        from subspace_store.formats.peft import write_peft_folder

        state = self._store.refresh()
        number = state.refs[MAIN] if version is None else version
        _check_version(state, number)
        task_id = self._task_id_at(state, number, reference)
        adapter = self._store.adapter(task_id, number)
        packed = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
            write_peft_folder(Path(folder), adapter, self._settings.base_model.source)
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
        return packed.getvalue()

    def scores(self, version: int | None = None) -> Json:
        """The matrix A[version][task] of the lineage that ends in a version (default `main`), and its means."""
        state = self._store.refresh()
        number = state.refs[MAIN] if version is None else version
        _check_version(state, number, lowest=0)
        table = self._table(state, number)
        names = {task_id: task.name for task_id, task in state.tasks_at(number).items()}
        records = self._records(table)
        return {
            "version": number,
            "versions": list(table.versions),
            "tasks": [
                {
                    "task_id": task_id,
                    "title": names[task_id],
                    "birth": table.birth[task_id],
                    "metric": records[task_id].spec.metric if task_id in records else None,
                    "rows": records[task_id].eval_count if task_id in records else None,
                    "base": records[task_id].base_score if task_id in records else None,
                    "local": records[task_id].local_score if task_id in records else None,
                    "share_full": task_id in records and records[task_id].spec.method.share_full,
                }
                for task_id in table.tasks
            ],
            "matrix": [[self._cell(table, row, task_id) for task_id in table.tasks] for row in table.versions],
            "by_version": [{"version": row, **self._figures(table, row, records)} for row in table.versions],
            "footprint": asdict(self._store.footprint(number)),
        }

    def status(self) -> Json:
        """Is it up, what do the workers do, how many tasks are where."""
        state = self._store.refresh()
        return {
            "running": self._controller is not None,
            "base_model": self._settings.base_model.name,
            "storage": self._storage.url,
            "mlflow": self._settings.mlflow.tracking_uri,
            "main": state.refs[MAIN],
            "candidate": state.refs[CANDIDATE],
            "held": asdict(state.held) if state.held else None,
            "tasks": self._queue.counts(),
            **self._health(),
        }

    # --- helpers -----------------------------------------------------------------------------------------------

    def _running(self, what: str) -> Controller:
        if self._controller is None:
            raise Unavailable(f"the service is not running, and {what} needs it", todo="start it with `onebasis up`")
        return self._controller

    def _write(self, request: StoreRequest[Answer]) -> Answer:
        """A writing call: through the running store actor, or with a writer opened for this one call."""
        cluster = self._cluster
        if cluster is not None:
            from orchestrator.cluster import wait_for

            try:
                return cast("Answer", wait_for(cluster, lambda: cluster.write(request), STORE_SECONDS))
            except Fenced:
                # By a command that wrote while the service was down: a fresh one opens with the next epoch.
                cluster.replace_store()
                return cast("Answer", wait_for(cluster, lambda: cluster.write(request), STORE_SECONDS))
        from subspace_store.subspace_store import SubspaceStore

        base = self._settings.base_model
        writer = SubspaceStore.open(
            self._storage,
            settings=self._settings.subspace,
            base_model=base.name,
            base_sha256=base.weights_sha256,
            writer="command-line",
        )
        return request.on(writer)

    def _written(self) -> None:
        self._store.refresh()
        if self._controller is not None:
            self._controller.wake(log_moved=True)

    def _places(self) -> dict[str, int]:
        """Task id to place in the queue, from 1."""
        if self._controller is None:
            return {}
        return {task_id: place for place, task_id in enumerate(self._controller.running_order(self._queue.live()), 1)}

    def _summary(self, record: TaskRecord, places: Mapping[str, int] | None = None) -> Json:
        at_work = next_step(record) is Step.AWAIT_ADAPTER
        return {
            "task_id": record.task_id,
            "title": record.title,
            "team": record.team,
            "name": record.name,
            "state": str(record.state),
            "reason": record.reason,
            "place": (places or {}).get(record.task_id),
            "submitted_at": record.submitted_at,
            "attempt": record.attempt,
            "worker": record.worker if at_work else "",
            "version": record.version or None,
            "metric": record.spec.metric,
            "eval_rows": record.eval_count,
            "base_score": record.base_score,
            "local_score": record.local_score,
            "progress": self._queue.progress(record.task_id) if at_work else {},
        }

    def _why(self, record: TaskRecord) -> str:
        """One sentence on why the task is where it is."""
        if record.state is TaskState.QUEUED:
            place = self._places().get(record.task_id)
            if self._controller is None:
                return "the service is not running; `onebasis up` starts it"
            if not self._controller.ready_workers:
                return f"no worker is ready: {'; '.join(sorted(set(self._controller.describe_workers().values())))}"
            ahead = f"{place - 1} before it" if place else "its turn is coming"
            note = f"; last attempt: {record.reason}" if record.reason else ""
            return f"place {place}: {ahead}, {self._controller.free_workers} workers free{note}"
        at_work = next_step(record) is Step.AWAIT_ADAPTER
        if at_work and self._queue.progress(record.task_id).get("phase") == "waiting":
            return f"{record.worker} waits for places for its ranks; the task's log says for what"
        held = self._store.refresh().held
        if held is not None and record.state is TaskState.EVALUATING:
            return f"version {record.version} waits: main is held by {held.actor}: {held.reason or 'no reason given'}"
        workers = self._controller.describe_workers().values() if self._controller else ()
        refine = any(text.startswith("refining") and text.endswith(f"at version {record.version}") for text in workers)
        if refine and record.state is TaskState.EVALUATING:
            return f"version {record.version} is scored when tasks of it have been refined on their own rows"
        return {
            TaskState.TRAINING: f"{record.worker} is fine-tuning its adapter (attempt {record.attempt})",
            TaskState.MERGING: "its adapter waits for the version before to be judged, then it is merged",
            TaskState.REFINING: f"its coefficients in version {record.version} are trained on its own rows",
            TaskState.EVALUATING: f"version {record.version} is being scored on every task it could have changed",
            TaskState.PUBLISHED: f"main holds it since version {record.version}",
        }.get(record.state, record.reason)

    def _result(self, record: TaskRecord) -> Json | None:
        """What became of the task: its score at birth and under `main` now; None before it is in a version."""
        state = self._store.refresh()
        if not record.version or record.version not in state.versions:
            return None
        at_birth, now = self._table(state, record.version), self._table(state, state.refs[MAIN])
        return {
            "version": record.version,
            "score_at_birth": _number(at_birth.score(record.version, record.task_id)),
            "main": state.refs[MAIN],
            "score_under_main": _number(now.score(state.refs[MAIN], record.task_id)),
        }

    def _version(self, state: SubspaceState, version: Version) -> Json:
        names = [name for name, number in state.refs.items() if number == version.number]
        on_main = any(v.number == version.number for v in state.lineage(state.refs[MAIN]))
        status = (
            "expired" if version.number in state.expired else
            "rejected" if version.number in state.rejected else "published" if on_main else
            "candidate" if CANDIDATE in names else "rolled back"
        )  # fmt: skip
        return {
            "version": version.number,
            "parent": version.parent,
            "status": status,
            "refs": names,
            "reason": state.rejected.get(version.number, ""),
            "created_at": version.created_at,
            "added": [task.name for task in version.added],
            "refined": [task.name for task in version.refined],
            "remakes": version.remakes,
            "removed": _names(state, version.removed),
            "task_count": len(state.tasks_at(version.number)),
            "rank_max": version.rank_max,
            "bytes_written": version.bytes_written,
            "merge_seconds": version.merge_seconds,
        }

    def _task_in(self, state: SubspaceState, table: ScoreTable, number: int, task_id: str) -> Json:
        task = state.tasks_at(number)[task_id]
        return {
            "task_id": task_id,
            "title": task.name,
            "birth": table.birth[task_id],
            "made_in": task.version,  # its coefficients: later than its birth when it was refined since (`share_full`)
            "error_at_birth": task.error_at_birth,
            "drift_bound": state.drift_bound(task_id, task.version, number),
            **self._cell(table, number, task_id),
        }

    def _cell(self, table: ScoreTable, version: int, task_id: str) -> Json:
        cell = table.cells.get(version, {}).get(task_id)
        if cell is None:
            return {"score": None, "measured_at": None, "rows": None}
        return {"score": _number(cell.score), "measured_at": cell.measured_at, "rows": cell.count}

    def _figures(self, table: ScoreTable, version: int, records: Mapping[str, TaskRecord]) -> Json:
        local = {t: r.local_score for t, r in records.items() if r.local_score is not None}
        return describe_report(forgetting_report(table, version, local))

    def _records(self, table: ScoreTable) -> dict[str, TaskRecord]:
        known = {record.task_id: record for record in self._queue.tasks()}
        return {task_id: known[task_id] for task_id in table.tasks if task_id in known}

    def _table(self, state: SubspaceState, version: int) -> ScoreTable:
        return score_table(state, version, self._settings.gate.drift_min)

    def _task_id_at(self, state: SubspaceState, version: int, reference: str) -> str:
        """The id of a task in a version, by id or name: of several lives of a name, the one that is in there."""
        held = state.tasks_at(version)
        found = [i for i, task in held.items() if task.name == reference or (reference and i.startswith(reference))]
        if len(found) != 1:
            names = ", ".join(task.name for task in held.values()) or "no tasks"
            raise NotFound(f"version {version} has no task '{reference}'", todo=f"it holds: {names}")
        return found[0]


def describe_report(report: ForgettingReport) -> Json:
    """The means of a report with their n and interval, NaN as None."""
    return {
        name: {"value": _number(m.value), "n": m.count, "half_width_95": _number(m.half_width)}
        for name, m in vars(report).items()
        if isinstance(m, Mean)
    }


def _check_version(state: SubspaceState, number: int, lowest: int = 1) -> None:
    """NotFound with what there is. Version 0 is the empty subspace."""
    if number not in state.versions and not (number == 0 and lowest == 0):
        newest = max(state.versions, default=0)
        todo = f"versions go from 1 to {newest}; `onebasis versions` lists them" if newest else "none is made yet"
        raise NotFound(f"there is no version {number}", todo=todo)


def _names(state: SubspaceState, task_ids: Collection[str]) -> list[str]:
    """What people call tasks that any version added."""
    if not task_ids:
        return []
    names = {task.task_id: task.name for version in state.versions.values() for task in version.added}
    return [names[task_id] for task_id in task_ids]


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain(value: Any) -> Any:
    """Records of records as JSON: tuples as lists, NaN as None, keys as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value
