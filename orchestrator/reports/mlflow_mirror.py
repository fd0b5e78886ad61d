"""MLflow as a mirror of what happened: one run per task, one for the subspace, its versions in the registry.

A mirror only: everything here is read from the task queue and the version log, so MLflow can be deleted and is
rebuilt at the next start. It runs in a thread of its own; MLflow being away or slow stops nothing, and the pictures
in the state folder are drawn all the same. System metrics are those of the worker's machine, as its points tell them:
MLflow's own monitor would show this process's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.document import without_password
from configs.errors import OnebasisError
from configs.settings import Settings
from orchestrator.judging.forgetting import forgetting_report
from orchestrator.judging.score_table import ScoreTable, score_table
from orchestrator.reports.heat_map import draw_heat_map
from orchestrator.reports.loss_plot import draw_loss_plot, plot_file
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import LIVE, TaskRecord, TaskState
from subspace_store import SubspaceReader, open_storage
from subspace_store.log.version import MAIN, SubspaceState
from workers.orders import Point

log = logging.getLogger("onebasis.mlflow")

RETRY_SECONDS = 10.0
LIVE_SECONDS = 10.0
"""Shortest interval at which the curves of running tasks are shown anew."""
LIVE_SECONDS_MAX = 60.0
"""The longest. Between the two it is such that the mirror works for `LIVE_SHARE` of the time: with many tasks, or an
MLflow that is slow, it becomes longer."""
LIVE_SHARE = 0.05
"""As much for each picture of scores: with many tasks, to draw one takes seconds."""
TASK_TAG = "onebasis.task_id"
SUBSPACE_TAG = "onebasis.subspace"
DONE_TAG = "onebasis.logged"
"""Tag of what a run shows: the newest version on the subspace's run, a `_Mark` on a task's run."""
PICTURE_TAG = "onebasis.drawn"
"""Tag on the subspace's run of the newest version that its picture shows, which may be an older one for a while."""
Points = dict[tuple[str, int, float], float | None]
"""(metric, step, Unix time at which it came about) to value. MLflow ignores a point that it has with the same time;
with the time of logging, every sync would add it once more."""
TAG_CHARACTERS = 5000
"""Most characters of a tag, for any MLflow."""
BATCH = 1000
"""Metrics, parameters and tags in one call: MLflow's own limit, and 100 times faster than one by one."""


@dataclass(frozen=True)
class _Mark:
    """What a task's run shows of it: its tag `DONE_TAG`."""

    shown: str = ""
    """See `Mirror._shown`: the record's revision comes first."""
    newest: int = 0
    """Newest version with a score."""
    count: int = 0
    """Versions with a score."""

    @classmethod
    def read(cls, tag: str) -> _Mark:
        """What `str` wrote, or a release of 2026-11, which did not count the versions. Of any other tag nothing is
        known."""
        shown, _, versions = tag.rpartition(":")
        newest, _, count = versions.partition("/")
        is_known = newest.isdecimal() and (count or "0").isdecimal()
        return cls(shown, int(newest), int(count or 0)) if is_known else cls()

    def __str__(self) -> str:
        return f"{self.shown}:{self.newest}/{self.count}"

    @property
    def revision(self) -> str:
        return self.shown.partition(":")[0]

    def unsent(self, versions: Sequence[int]) -> Sequence[int]:
        """Those of all versions with a score whose scores the run lacks."""
        newer = [version for version in versions if version > self.newest]
        # An older one may have been scored late, or left with a rollback: then all are sent, and what is there stays.
        return newer if len(versions) - len(newer) == self.count else versions


class Mirror:
    """Brings MLflow up to date whenever it is woken. It reads the stores by itself: nobody else waits for it."""

    def __init__(self, settings: Settings, queue: TaskQueue) -> None:
        self._settings = settings
        self._queue = queue
        self._stores: dict[str, SubspaceReader] = {}
        """Base model to a reader of its store, opened when it is first looked at."""
        self._newest: Callable[[], Settings] = lambda: settings
        self._awake = threading.Event()
        self._awake.set()
        self._client: Any = None
        self._experiment = ""
        self._runs: dict[str, str] = {}
        self._marks: dict[str, _Mark] = {}
        """Task id to what its run shows: with a thousand tasks, asking MLflow for each would take seconds."""
        self._params: dict[str, set[str]] = {}
        """Task id to the parameters that its run has."""
        self._drawn: dict[str, str] = {}
        """Task id to what its loss plot shows."""
        self._plotted: dict[str, int] = {}
        """Id of a task that has not ended to the number of points in its loss plot."""
        self._counted: dict[str, tuple[float, int]] = {}
        """Id of a running task to the time until which its curve is taken to be as long as it was, and that length."""
        self._sent: dict[str, int] = {}
        """Id of a task that has not ended to the number of points of its curve that its run has: MLflow looks for each
        figure that it has already, one by one, and a curve would be sent as often as it grows."""
        self._live_seconds = LIVE_SECONDS
        self._seen = 0
        """Number up to which the queue's changes are mirrored: see `TaskQueue.changes`."""
        self._look_at = math.inf
        """Time of the next look without a call of `wake`."""
        self._picture_at: dict[str, float] = {}
        """Base model to the time before which its scores are not drawn again."""
        self._late_picture_at = math.inf
        """Time at which a picture that is older than what the run shows is drawn."""
        self.behind = True
        """Whether there is something that MLflow does not show yet."""
        self.working_since = 0.0
        """Unix time at which the round under way began; 0 between two."""
        self.error = ""
        """Why the last try failed, for people."""

    def follow(self, settings: Callable[[], Settings]) -> None:
        """Go by the settings that count whenever it looks: `reload` may bring another base model."""
        self._newest = settings

    def wake(self) -> None:
        """Call when there is something new. Safe from any thread; returns at once."""
        self.behind = True
        self._awake.set()

    def run(self, stop: threading.Event) -> None:
        """Mirror until told to stop, and once more then."""
        last = False
        while not last:
            last = stop.is_set()
            if not last:
                self._awake.wait(0.5)
            is_late = last and self._late_picture_at < math.inf
            if not self._awake.is_set() and not is_late and time.monotonic() < self._look_at:
                continue
            self._awake.clear()
            self.working_since = time.time()
            try:
                if last:
                    self._picture_at.clear()  # however recently they were drawn: nothing draws them later
                self.sync()
                self.error = ""
                self.behind = self._awake.is_set()
            except Exception as error:  # whatever MLflow or its database raises: the service goes on without
                self.error = without_password(f"{type(error).__name__}: {error}")
                log.warning("MLflow is behind: %s", self.error)
                self._forget()
                self._awake.set()
                self.working_since = 0.0
                stop.wait(RETRY_SECONDS)
            self.working_since = 0.0

    def sync(self) -> None:
        """Bring MLflow to what the queue and the log say now. Running it twice changes nothing."""
        begun = time.monotonic()
        self._late_picture_at = math.inf
        changed, following = self._queue.changes(self._seen)
        live = self._queue.in_flight()
        training = any(record.state is TaskState.TRAINING for record in live)
        records = {record.task_id: record for record in (*changed, *live)}
        for record in records.values():
            self._draw_loss(record)
        self._open()
        self._settings = self._newest()
        errors = []
        for name in self._settings.base_names:
            mine = {task_id: record for task_id, record in records.items() if record.base_model == name}
            try:
                self._mirror_base_model(name, mine)
            except OnebasisError as error:  # its store is away or damaged: the others are shown all the same
                errors.append(error)
        if errors:
            raise errors[0]
        self._seen = following  # not before all is there: what failed is read again
        wanted = (time.monotonic() - begun) / LIVE_SHARE
        self._live_seconds = min(max(LIVE_SECONDS, wanted), LIVE_SECONDS_MAX)
        live_at = time.monotonic() + self._live_seconds if training else math.inf
        self._look_at = min(live_at, self._late_picture_at)

    def begin_anew(self) -> str:
        """Put aside what MLflow shows of this service: the next `sync` makes all of it again.

        Runs are deleted in MLflow's sense, under another experiment's name, and can be restored there. Registered
        versions name them, and are made anew.

        Returns:
            Name of the deleted experiment.
        """
        from mlflow.exceptions import MlflowException

        self._open()
        name = f"{self._settings.mlflow.experiment} until {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}"
        self._client.rename_experiment(self._experiment, name)
        self._client.delete_experiment(self._experiment)
        for base in self._settings.base_names:
            with contextlib.suppress(MlflowException):  # nothing was published yet
                self._client.delete_registered_model(base)
        self._forget()
        return name

    def _mirror_base_model(self, name: str, records: Mapping[str, TaskRecord]) -> None:
        """Bring MLflow to what the log of a base model's store says, and these tasks of it to their records."""
        if name not in self._stores:
            storage = open_storage(self._settings.storage, name)
            self._stores[name] = SubspaceReader.open(storage, settings=self._settings.subspace)
        state = self._stores[name].refresh()
        table = score_table(state, state.refs[MAIN], self._settings.gate.drift_min)
        held = self._queue.among(table.tasks)  # each new version may have new scores of them
        for record in {**records, **held}.values():
            self._mirror_task(record, state, table)
        if table.versions:
            self._mirror_subspace(name, state, table, held)
        elif len(state.published) > 1:
            self._unpoint_alias(name)

    def _open(self) -> None:
        if self._client is not None:
            return
        # MLflow's own client would ask a server that is gone for four minutes before it says so; a round that failed is
        # tried again here, and people are told within ten seconds. What the environment says is left as it is.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its migrations write a page to the log
        logging.getLogger("alembic").setLevel(logging.WARNING)
        settings = self._settings.mlflow
        mlflow.set_tracking_uri(settings.tracking_uri)
        client = MlflowClient(settings.tracking_uri)
        found = client.get_experiment_by_name(settings.experiment)
        if found is None:
            self._experiment = client.create_experiment(settings.experiment, self._artifact_location())
        else:
            self._experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":  # in its user interface; its name stays taken, and its runs are kept
                log.warning("MLflow's experiment '%s' was deleted: restoring it", settings.experiment)
                client.restore_experiment(self._experiment)
        self._client = client

    def _forget(self) -> None:
        """Look for everything anew: somebody may have deleted, in MLflow, what was found or made there."""
        self._client = None
        self._runs.clear()
        self._marks.clear()
        self._params.clear()
        self._sent.clear()
        self._seen = 0

    def _artifact_location(self) -> str | None:
        settings = self._settings.mlflow
        if settings.artifact_location or not settings.tracking_uri.startswith("sqlite"):
            return settings.artifact_location
        return (Path(self._settings.state_dir) / "mlflow-artifacts").as_uri()

    def _run(self, tag: str, value: str, name: str) -> str:
        """The id of the run with this tag; made if there is none."""
        if value not in self._runs:
            found = self._client.search_runs([self._experiment], f"tags.`{tag}` = '{value}'", max_results=1)
            self._runs[value] = (
                found[0].info.run_id
                if found
                else self._client.create_run(self._experiment, tags={tag: value}, run_name=name).info.run_id
            )
        return self._runs[value]

    # --- one task ----------------------------------------------------------------------------------------------

    def _mirror_task(self, record: TaskRecord, state: SubspaceState, table: ScoreTable) -> None:
        rows = [v for v in table.versions if record.task_id in table.cells[v]]
        mark = _Mark(self._shown(record), rows[-1] if rows else 0, len(rows))
        known = self._marks.get(record.task_id)
        if known == mark:
            return
        run = self._run(TASK_TAG, record.task_id, record.exact_title)
        if known is None:
            data = self._client.get_run(run).data
            known, self._params[record.task_id] = _Mark.read(data.tags.get(DONE_TAG, "")), set(data.params)
            if known == mark:
                self._marks[record.task_id] = mark
                return
        params = {k: v for k, v in _params(record).items() if k not in self._params[record.task_id]}
        tags = {DONE_TAG: str(mark)}
        if record.state not in LIVE and known.revision == mark.revision:
            # It has ended, and all else was shown when it did: a new version changes no more than its scores.
            self._log_batch(run, _scores(record, state, table, known.unsent(rows)), params, tags)
        else:
            self._mirror_training(run, record, _scores(record, state, table, rows), params, tags)
        self._params[record.task_id] |= params.keys()
        self._marks[record.task_id] = mark

    def _mirror_training(
        self, run: str, record: TaskRecord, scores: Points, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Show all that is known of a task, but for the points of its curve that its run has."""
        curve = self._queue.curve(record.task_id)
        metrics = _figures_of_training(record) | scores
        for point in curve[self._sent.get(record.task_id, 0) :]:
            metrics |= _figures(point)
        if (plot := plot_file(self._settings.state_dir, record)).exists():
            self._log_plot(run, plot)
        told = {"onebasis.state": str(record.state), "onebasis.reason": record.reason[:500]}
        told |= {"onebasis.warnings": "\n".join(record.warnings)[:TAG_CHARACTERS]} if record.warnings else {}
        self._log_batch(run, metrics, params, {**told, **tags})
        if record.state in LIVE:
            self._sent[record.task_id] = len(curve)
        else:
            self._sent.pop(record.task_id, None)
            is_fine = record.state in (TaskState.PUBLISHED, TaskState.REPLACED)
            self._client.set_terminated(run, "FINISHED" if is_fine else "FAILED")

    def _shown(self, record: TaskRecord) -> str:
        """A text that changes with all that a task's run and plot show of its training; while it trains, now and
        then."""
        if record.state is not TaskState.TRAINING:
            self._counted.pop(record.task_id, None)
            return f"{record.revision}:"
        until, count = self._counted.get(record.task_id, (0.0, 0))
        if time.monotonic() >= until:
            count = len(self._queue.curve(record.task_id))
            self._counted[record.task_id] = (time.monotonic() + self._live_seconds, count)
        return f"{record.revision}:{count}"

    def _draw_loss(self, record: TaskRecord) -> None:
        path, shown = plot_file(self._settings.state_dir, record), self._shown(record)
        # What has ended was drawn by the service that saw it end.
        known = self._drawn.get(record.task_id, shown if record.state not in LIVE and path.exists() else "")
        if shown != known:
            points = [point for point in self._queue.curve(record.task_id) if point.method != "refine"]
            if points and len(points) != self._plotted.get(record.task_id):  # its revision alone may have changed
                draw_loss_plot(points, record.title, path)
            self._plotted[record.task_id] = len(points)
        if record.state not in LIVE:
            self._plotted.pop(record.task_id, None)
        self._drawn[record.task_id] = shown

    def _log_plot(self, run: str, plot: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._client.log_artifact(run, shutil.copy(plot, Path(folder) / "loss.png"))

    # --- the subspace ------------------------------------------------------------------------------------------

    def _mirror_subspace(
        self, name: str, state: SubspaceState, table: ScoreTable, records: Mapping[str, TaskRecord]
    ) -> None:
        run = self._run(SUBSPACE_TAG, name, f"subspace {name}")
        main = state.refs[MAIN]
        tags = self._client.get_run(run).data.tags
        if (done := tags.get(DONE_TAG, "")) != str(main):
            self._mirror_versions(name, run, state, table, records, int(done or 0))
            self._point_alias(name, main)
            self._client.set_tag(run, DONE_TAG, str(main))
        if tags.get(PICTURE_TAG, "") != str(main):
            self._draw_in_time(name, run, state, table)

    def _mirror_versions(
        self,
        name: str,
        run: str,
        state: SubspaceState,
        table: ScoreTable,
        records: Mapping[str, TaskRecord],
        logged: int,
    ) -> None:
        local = {t: r.local_score for t, r in records.items() if r.local_score is not None}
        registered = self._registered(name)
        for version in table.versions:
            # Numbers are never reused, so after a rollback only what is new is written.
            if version > logged or version not in registered:
                self._mirror_version(run, state, table, version, local)
                if version not in registered:
                    self._register(name, run, state, version)

    def _draw_in_time(self, name: str, run: str, state: SubspaceState, table: ScoreTable) -> None:
        """Draw the scores, unless that would take more than its share of the time: then a later round does."""
        begun = time.monotonic()
        if begun < (due := self._picture_at.get(name, 0.0)):
            self._late_picture_at = min(self._late_picture_at, due)
            return
        self._draw(name, run, state, table)
        self._client.set_tag(run, PICTURE_TAG, str(state.refs[MAIN]))
        wanted = (time.monotonic() - begun) / LIVE_SHARE
        self._picture_at[name] = time.monotonic() + min(wanted, LIVE_SECONDS_MAX)

    def _mirror_version(
        self, run: str, state: SubspaceState, table: ScoreTable, number: int, local: Mapping[str, float]
    ) -> None:
        version, titles = state.versions[number], {t: task.name for t, task in state.tasks_at(number).items()}
        report = forgetting_report(table, number, local)
        values = {f"score.{titles[t]}": table.score(number, t) for t in titles} | {
            "average_accuracy": report.average_accuracy.value,
            "backward_transfer": report.backward_transfer.value,
            "forgetting": report.forgetting.value,
            "merge_gap": report.merge_gap.value,
            "tasks": float(len(titles)),
            "rank_max": float(version.rank_max),
            "bytes_written": float(version.bytes_written),
            "merge_seconds": version.merge_seconds,
        }
        self._log_batch(run, {(key, number, version.created_at): value for key, value in values.items()})

    def _draw(self, name: str, run: str, state: SubspaceState, table: ScoreTable) -> None:
        titles = {task_id: task.name for task_id, task in state.tasks_at(table.versions[-1]).items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.png"
            if not draw_heat_map(table, titles, path):
                return
            self._client.log_artifact(run, str(path))
            if self._settings.mlflow.tracking_uri.startswith("sqlite"):
                file = "scores.png" if name == self._settings.base_names[0] else f"scores-{name}.png"
                shutil.copy(path, Path(self._settings.state_dir) / file)

    # --- the registry ------------------------------------------------------------------------------------------

    def _registered(self, name: str) -> dict[int, str]:
        """Our version number to the registry's own, which counts only what was published."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(
                name, description="Versions of the shared subspace. The tag `onebasis.version` is onebasis's number."
            )
            return {}
        found = self._client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return {int(v.tags["onebasis.version"]): v.version for v in found if "onebasis.version" in v.tags}

    def _register(self, name: str, run: str, state: SubspaceState, number: int) -> None:
        version = state.versions[number]
        titles = sorted(task.name for task in state.tasks_at(number).values())
        facts = {
            "onebasis.version": str(number),
            "onebasis.parent": str(version.parent),
            "onebasis.basis_sha256": version.basis.sha256,
            "onebasis.store": self._settings.storage.url,
        }
        folder = f"versions/{number}"
        self._client.log_dict(run, facts | {"tasks": titles, "basis": version.basis.key}, f"{folder}/version.json")
        source = f"{self._client.get_run(run).info.artifact_uri}/{folder}"
        self._client.create_model_version(name, source, run, tags=facts, description=f"holds {', '.join(titles)}")

    def _point_alias(self, name: str, main: int) -> None:
        number = self._registered(name).get(main)
        if number is not None:
            self._client.set_registered_model_alias(name, MAIN, number)

    def _unpoint_alias(self, name: str) -> None:
        """Remove the alias: `main` was rolled back to the empty subspace, which is no version of the registry."""
        run = self._run(SUBSPACE_TAG, name, f"subspace {name}")
        if self._client.get_run(run).data.tags.get(DONE_TAG, "") != "0":
            if self._registered(name):
                self._client.delete_registered_model_alias(name, MAIN)
            self._client.set_tag(run, DONE_TAG, "0")

    def _log_batch(
        self,
        run: str,
        metrics: Points,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        known = [
            Metric(key, value, int(at * 1000), step)
            for (key, step, at), value in metrics.items()
            if value is not None and value == value  # NaN is not measured: MLflow would draw it as a point
        ]
        texts = {
            "params": [Param(key, value[:500]) for key, value in (params or {}).items()],
            "tags": [RunTag(key, value) for key, value in (tags or {}).items()],
        }
        alone = len(known) + len(texts["params"]) + len(texts["tags"]) > BATCH
        for start in range(0, len(known) if alone else 0, BATCH):
            self._client.log_batch(run, metrics=known[start : start + BATCH])
        rest = texts if alone else {"metrics": known, **texts}
        if any(rest.values()):
            self._client.log_batch(run, **rest)


def _figures_of_training(record: TaskRecord) -> Points:
    """What became of a task before it was merged."""
    begun = record.submitted_at
    metrics: Points = {
        ("base_score", 0, begun): record.base_score,
        ("local_score", 0, begun): record.local_score,
        ("train_loss", 0, begun): record.train_loss,
        ("train_seconds", 0, begun): record.train_seconds,
    }
    metrics |= {(f"local.{name}", 0, begun): value for name, value in record.metrics.items()}
    if record.adapter_parameters:
        metrics["adapter_parameters", 0, begun] = float(record.adapter_parameters)
    for task_id, number in (record.numbers_of_rows if record.earlier_rows else {}).items():
        name = f"rows_of_revision_{number}"
        metrics[f"local_score.{name}", 0, begun] = record.scores_of_rows.get(task_id)
        metrics[f"main_score_before.{name}", 0, begun] = record.main_scores_of_rows.get(task_id)
    return metrics


def _scores(record: TaskRecord, state: SubspaceState, table: ScoreTable, versions: Sequence[int]) -> Points:
    """A task's scores under these versions."""
    made = {version: state.versions[version].created_at for version in versions}
    metrics: Points = {("score", v, at): table.score(v, record.task_id) for v, at in made.items()}
    lost = {version: table.general_loss(version, record.task_id) for version in versions}
    metrics |= {("general_loss", v, made[v]): loss for v, loss in lost.items() if not math.isnan(loss)}
    for task_id, number in (record.numbers_of_rows if record.earlier_rows else {}).items():
        name = f"score.rows_of_revision_{number}"
        metrics |= {(name, v, at): table.on_rows(v, task_id) for v, at in made.items()}
    birth = table.birth.get(record.task_id)
    if versions and versions[0] == birth and record.local_score is not None:
        metrics["merge_gap", birth, made[birth]] = record.local_score - table.score(birth, record.task_id)
    return metrics


def _figures(point: Point) -> Points:
    told = ("loss", "learning_rate", "samples_per_second", "tokens_per_second")
    part = "refine" if point.method == "refine" else "train"
    if point.candidate:  # of `auto`, whose trainings have the same steps
        part += f".{point.candidate.replace(' ', '_')}"
    values = {f"{part}.{name}": getattr(point, name) for name in told}
    if point.memory_bytes:
        values[f"{part}.memory_megabytes"] = point.memory_bytes / 1e6
    # By MLflow's own names, so that its page shows them as system metrics.
    values |= {f"system/{name}": value for name, value in point.machine.items()}
    return {(name, point.step, point.at): value for name, value in values.items()}


def _params(record: TaskRecord) -> dict[str, str]:
    spec = record.spec
    flat = {
        "team": spec.team,
        "revision": record.number,
        "base_model": spec.base_model,
        "metric": spec.metric,
        "method": spec.method.name,
        "train_rows": record.train_count,
        "eval_rows": record.scored_count,
        "eval_sha256": record.eval_sha256,
        **{f"training.{key}": value for key, value in spec.training.model_dump().items()},
        **{f"lora.{key}": value for key, value in spec.lora.model_dump().items()},
    }
    if record.train_seconds is not None:  # a run's parameters never change
        flat |= {
            "trained.method": record.method,
            **({"trained.compared": ", ".join(record.compared) or "nothing"} if record.compared is not None else {}),
            "trained.parameters": record.trainable_parameters,
            "trained.basis_version": record.basis_version,
            "trained.resumed_from": record.resumed_from,
        }
    return {key: str(value) for key, value in flat.items()}
