"""MLflow shows what the queue and the log say, and nothing else: real MLflow on a SQLite file of its own."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator import pending_calls
from orchestrator.api.mirror import rebuild_mirror
from orchestrator.reports import mlflow_mirror
from orchestrator.reports.mlflow_mirror import Mirror
from orchestrator.tasks import task_queue
from subspace_store.requests import Remove, Rollback
from tests.builders import BASE
from tests.orchestrator.plant import Plant
from tests.orchestrator.test_revising import revise
from workers.machine import machine_figures
from workers.orders import Point

# MLflow's own modules warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


POINTS = (
    Point(at=2000.0, step=5, loss=0.75, learning_rate=0.002, steps=10),
    Point(
        at=2001.0,
        step=10,
        loss=0.25,
        learning_rate=0.001,
        steps=10,
        samples_per_second=80.0,
        tokens_per_second=900.0,
        memory_bytes=512_000_000,
        machine={"cpu_utilization_percentage": 75.0},
    ),
)
SHARE = Point(at=2003.0, step=1, loss=0.3, learning_rate=0.001, method="share", candidate="share")
AGAIN = Point(at=2004.0, step=1, loss=0.1, learning_rate=0.001, method="share", candidate="share on all rows")
REFINED = Point(at=2002.0, step=1, loss=0.2, learning_rate=0.001, steps=10, method="refine")


class Mirrored:
    """A plant and its mirror: red/a in version 1, blue/b in version 2, red/bad rejected, red/wrong parked."""

    def __init__(self, folder: Path) -> None:
        # Two directions are too few for all: every merge moves every task.
        self.plant = Plant(folder, gate={"drift_min": 0}, subspace={"rank_max": 2, "beyond_rank_max": "drop"})
        self.plant.cluster.score = _score
        self.plant.cluster.training_faults = {"red/wrong": ["input"]}
        self.plant.cluster.training_warnings = ("2 of 4 training rows are cut",)
        for title in ("red/a", "blue/b", "red/bad", "red/wrong"):
            (task,) = self.plant.submit(title)
            if title == "red/a":
                self.plant.queue.append_log(task.task_id, ["a line", *POINTS, REFINED, SHARE, AGAIN])
            self.plant.run()
        self.mirror = self.fresh_mirror()
        self.mirror.sync()

    def fresh_mirror(self) -> Mirror:
        """As after a restart of the service."""
        return Mirror(self.plant.settings, self.plant.queue)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.plant.settings.mlflow.tracking_uri)

    def runs(self) -> dict[str, Any]:
        """Name to run."""
        experiment = self.client.get_experiment_by_name("onebasis")
        return {run.info.run_name: run for run in self.client.search_runs([experiment.experiment_id])}

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point, in order."""
        points = self.client.get_metric_history(self.runs()[run].info.run_id, metric)
        return sorted((point.step, point.value) for point in points)

    def roll(self, version: int) -> None:
        self.plant.cluster.write(
            BASE, Rollback(version=version, op_key=f"rollback:{self.plant.state.seq}", actor="ann")
        ).result()
        self.plant.controller.wake(log_moved=True)
        self.plant.step(2)
        self.mirror.sync()

    def facts(self) -> tuple[Any, ...]:
        """Whatever of it a test could change for the next one."""
        return self.plant.settings, self.plant.state, self.plant.states()

    def alias(self) -> int:
        """onebasis's number of the version that the registry calls main."""
        return int(self.client.get_model_version_by_alias("tiny", "main").tags["onebasis.version"])

    def everything(self) -> dict[str, Any]:
        """All that MLflow shows, without its own ids and times, and without how old the picture of scores is."""
        runs = {
            name: {
                "params": run.data.params,
                "tags": {
                    key: value
                    for key, value in run.data.tags.items()
                    if key.startswith("onebasis.") and key != mlflow_mirror.PICTURE_TAG
                },
                "status": run.info.status,
                "metrics": {key: self.history(name, key) for key in run.data.metrics},
            }
            for name, run in self.runs().items()
        }
        versions = {
            v.tags["onebasis.version"]: (dict(v.tags), v.description)
            for v in self.client.search_model_versions("name = 'tiny'")
        }
        return {"runs": runs, "versions": versions, "main": self.alias()}


def _score(title: str, held: frozenset[str]) -> float:
    """red/a loses 0.02 once blue/b is there; red/bad loses everything."""
    return 0.1 if title == "red/bad" else 0.88 if title == "red/a" and "blue/b" in held else 0.9


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Mirrored]]:
    """The file's own, made by the first test that asks."""
    made: list[Mirrored] = []
    yield made
    for mirrored in made:
        mirrored.plant.queue.close()


@pytest.fixture
def mirrored(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    _shared: list[Mirrored],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Mirrored]:
    """The tests share one and leave it as it was; a test that is marked `changes` gets one of its own."""
    monkeypatch.setattr(pending_calls, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(pending_calls, "POLL_SECONDS", 0.0)
    if request.node.get_closest_marker("changes"):
        own = Mirrored(tmp_path_factory.mktemp("mlflow"))
        yield own
        own.plant.queue.close()
        return
    if not _shared:
        _shared.append(Mirrored(tmp_path_factory.mktemp("mlflow")))
    (shared,) = _shared
    before = shared.facts()
    yield shared
    assert shared.facts() == before, "the test changed the plant that it shares: mark it with `changes`"


def test_every_task_is_a_run_with_its_parameters_and_scores(mirrored: Mirrored) -> None:
    runs = mirrored.runs()
    assert sorted(runs) == ["blue/b", "red/a", "red/bad", "red/wrong", "subspace tiny"]
    run = runs["red/a"].data
    assert (run.params["team"], run.params["method"], run.params["lora.r"]) == ("red", "auto", "8")
    assert (run.params["trained.method"], run.params["trained.parameters"]) == ("auto", "96")
    assert run.metrics["local.f1_macro"] == 0.75
    assert (run.metrics["local_score"], run.metrics["base_score"], run.metrics["train_loss"]) == (0.9, 0.5, 0.25)
    assert {name: run.info.status for name, run in runs.items() if name != "subspace tiny"} == {
        "red/a": "FINISHED",
        "blue/b": "FINISHED",
        "red/bad": "FAILED",
        "red/wrong": "FAILED",
    }
    assert runs["red/wrong"].data.tags["onebasis.reason"] == "fault of kind input"
    assert runs["red/a"].data.tags["onebasis.warnings"].startswith("2 of 4 training rows are cut")
    assert "onebasis.warnings" not in runs["red/wrong"].data.tags
    assert "local_score" not in runs["red/wrong"].data.metrics  # not measured is absent, not 0


def test_a_tasks_score_and_loss_are_curves_over_versions_and_steps(mirrored: Mirrored) -> None:
    assert mirrored.history("red/a", "score") == [(1, 0.9), (2, 0.88)]
    assert mirrored.history("red/a", "train.loss") == [(5, 0.75), (10, 0.25)]
    assert mirrored.history("red/a", "train.learning_rate") == [(5, 0.002), (10, 0.001)]
    # Not measured at step 5 is no point.
    assert mirrored.history("red/a", "train.samples_per_second") == [(10, 80.0)]
    assert mirrored.history("red/a", "train.tokens_per_second") == [(10, 900.0)]
    assert mirrored.history("red/a", "train.memory_megabytes") == [(10, 512.0)]
    assert mirrored.history("red/a", "refine.loss") == [(1, 0.2)]  # its steps are its own


def test_each_training_of_auto_is_a_curve_of_its_own(mirrored: Mirrored) -> None:
    assert mirrored.history("red/a", "train.share.loss") == [(1, 0.3)]
    assert mirrored.history("red/a", "train.share_on_all_rows.loss") == [(1, 0.1)]


def test_what_the_workers_machine_did_is_where_mlflow_shows_system_metrics(mirrored: Mirrored) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    assert mirrored.history("red/a", "system/cpu_utilization_percentage") == [(10, 75.0)]
    monitor = CPUMonitor()
    monitor.collect_metrics()
    assert set(monitor.aggregate_metrics()) <= set(machine_figures())  # MLflow's own names


def test_every_trained_task_has_its_loss_plot_beside_the_state_and_in_its_run(mirrored: Mirrored) -> None:
    folder = Path(mirrored.plant.settings.state_dir)
    task_id = mirrored.plant.get("red/a").task_id
    assert [path.relative_to(folder).as_posix() for path in folder.glob("plots/**/*.png")] == [
        f"plots/red/a-{task_id}.png"
    ]
    run = mirrored.runs()["red/a"].info.run_id
    assert [file.path for file in mirrored.client.list_artifacts(run)] == ["loss.png"]


@pytest.mark.usefixtures("_no_waiting")
def test_curves_and_plot_grow_while_a_task_trains_and_though_mlflow_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = Plant(tmp_path)
    plant.cluster.hold = lambda order: True
    (task,) = plant.submit("red/a")
    plant.run(lambda: plant.states()["red/a"] == "training")
    mirror = Mirror(plant.settings, plant.queue)
    drawn: list[list[Point]] = []
    monkeypatch.setattr(mlflow_mirror, "draw_loss_plot", lambda points, title, path: drawn.append(points))
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_open", lambda: 1 / 0)
        plant.queue.append_log(task.task_id, POINTS[:1])
        with pytest.raises(ZeroDivisionError):
            mirror.sync()
    mirror.sync()
    assert drawn == [list(POINTS[:1])]
    plant.queue.append_log(task.task_id, [*POINTS[1:], REFINED])
    mirror.sync()
    assert len(drawn) == 1  # too soon: a curve that grows is shown every ten seconds
    mirror._counted.clear()
    client, sent = mirror._client, list[Any]()
    send = client.log_batch
    monkeypatch.setattr(
        client, "log_batch", lambda run, **what: (sent.extend(what.get("metrics", ())), send(run, **what))
    )
    mirror.sync()
    mirror.sync()
    assert drawn[1:] == [list(POINTS)]
    # The first point has been there: MLflow would look for it again, and for each of ten thousand.
    assert {(metric.key, metric.step) for metric in sent if metric.key.endswith(".loss")} == {
        ("train.loss", 10),
        ("refine.loss", 1),
    }
    run = client.search_runs([mirror._experiment])[0]
    assert run.info.status == "RUNNING"
    history = client.get_metric_history(run.info.run_id, "train.loss")
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (5, 0.75, 2_000_000),
        (10, 0.25, 2_001_000),
    ]
    assert mirror._look_at < math.inf
    plant.queue.close()


def test_the_subspaces_run_has_every_score_at_its_versions_step(mirrored: Mirrored) -> None:
    assert mirrored.history("subspace tiny", "score.red/a") == [(1, 0.9), (2, 0.88)]
    assert mirrored.history("subspace tiny", "score.blue/b") == [(2, 0.9)]
    # Version 2: (0.88 + 0.90) / 2 = 0.89; red/a: 0.88 − 0.90 = −0.02; forgetting 0.90 − 0.88 = 0.02.
    assert mirrored.history("subspace tiny", "average_accuracy") == [(1, 0.9), (2, pytest.approx(0.89))]
    assert mirrored.history("subspace tiny", "backward_transfer") == [(2, pytest.approx(-0.02))]
    assert mirrored.history("subspace tiny", "forgetting") == [(2, pytest.approx(0.02))]
    assert mirrored.history("subspace tiny", "tasks") == [(1, 1.0), (2, 2.0)]


def test_published_versions_are_in_the_registry_and_main_is_the_alias(mirrored: Mirrored) -> None:
    found = mirrored.client.search_model_versions("name = 'tiny'")
    assert sorted((v.tags["onebasis.version"], v.description) for v in found) == [
        ("1", "holds red/a"),
        ("2", "holds blue/b, red/a"),
    ]
    assert mirrored.alias() == 2


def test_the_picture_is_beside_the_state_and_among_the_artifacts(mirrored: Mirrored) -> None:
    folder = Path(mirrored.plant.settings.state_dir)
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    run = mirrored.runs()["subspace tiny"].info.run_id
    assert "scores.png" in {file.path for file in mirrored.client.list_artifacts(run)}
    kept = json.loads(next(folder.glob("mlflow-artifacts/**/versions/2/version.json")).read_text())
    assert kept["tasks"] == ["blue/b", "red/a"]


@pytest.mark.changes
def test_scores_are_drawn_within_a_share_of_the_time_and_at_the_end(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, drawn = mirrored.mirror, list[list[int]]()
    monkeypatch.setattr(mlflow_mirror, "draw_heat_map", lambda table, *_: drawn.append(table.versions))
    mirrored.roll(1)  # the fixture drew version 2 a moment ago
    mirror.sync()
    assert drawn == []
    assert mirror._look_at <= time.monotonic() + mlflow_mirror.LIVE_SECONDS_MAX
    mirror._picture_at.clear()  # that moment is over
    mirror.sync()
    assert [len(versions) for versions in drawn] == [1]
    mirror.sync()
    mirrored.fresh_mirror().sync()  # what is drawn stays drawn, whoever looks
    assert (len(drawn), mirror._look_at) == (1, math.inf)
    mirrored.roll(2)
    stop = threading.Event()
    stop.set()
    mirror.run(stop)
    assert [len(versions) for versions in drawn] == [1, 2]


@pytest.mark.changes
def test_a_new_version_sends_a_tasks_new_scores_alone(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    client, told = mirrored.mirror._client, list[tuple[str, Any]]()
    for name in ("log_batch", "get_run", "log_artifact", "set_terminated"):
        real = getattr(client, name)
        monkeypatch.setattr(
            client,
            name,
            lambda run, *rest, _name=name, _real=real, **what: (
                told.append((_name, run, what)),
                _real(run, *rest, **what),
            )[1],
        )
    run = mirrored.runs()["red/a"].info.run_id
    mirrored.plant.submit("red/c")
    mirrored.plant.run()
    mirrored.mirror.sync()
    ours = [(name, what) for name, asked, what in told if asked == run]
    assert [name for name, _ in ours] == ["log_batch"]
    assert [(m.key, m.step, m.value) for m in ours[0][1]["metrics"]] == [("score", 4, 0.88)]
    before = mirrored.everything()
    mirrored.fresh_mirror().sync()
    assert mirrored.everything() == before


@pytest.mark.changes
def test_a_new_version_sends_no_curve_of_what_ended_again(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    client, sent = mirrored.mirror._client, list[str]()
    send = client.log_batch
    noting = lambda run, **what: (sent.extend(m.key for m in what.get("metrics", ())), send(run, **what))  # noqa: E731
    monkeypatch.setattr(client, "log_batch", noting)
    mirrored.roll(1)
    mirrored.roll(2)
    assert "score" in sent
    assert "train.loss" not in sent


@pytest.mark.changes
def test_the_mark_of_a_release_of_2026_11_is_read(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mirrored.runs()["red/a"]
    shown, _, _ = run.data.tags[mlflow_mirror.DONE_TAG].rpartition("/")
    mirrored.client.set_tag(run.info.run_id, mlflow_mirror.DONE_TAG, shown)
    sent = list[str]()
    send = mlflow.MlflowClient.log_batch

    def noting(client: Any, of: str, **what: Any) -> None:
        sent.extend(metric.key for metric in what["metrics"] if of == run.info.run_id)
        send(client, of, **what)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", noting)
    mirrored.fresh_mirror().sync()
    assert {*sent} == {"score", "merge_gap"}  # of all versions, since they were not counted


def test_the_interval_of_what_grows_has_an_end(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored.mirror.sync()
    assert mirrored.mirror._live_seconds == mlflow_mirror.LIVE_SECONDS
    monkeypatch.setattr(mlflow_mirror, "LIVE_SHARE", 1e-9)
    mirrored.mirror.sync()
    assert mirrored.mirror._live_seconds == mlflow_mirror.LIVE_SECONDS_MAX


def test_a_second_sync_changes_nothing(mirrored: Mirrored) -> None:
    before = mirrored.everything()
    mirrored.mirror.sync()
    mirrored.fresh_mirror().sync()
    assert mirrored.everything() == before


@pytest.mark.changes
def test_the_alias_follows_a_rollback_and_back_without_a_point_twice(mirrored: Mirrored) -> None:
    mirrored.roll(1)
    assert mirrored.alias() == 1
    assert mirrored.runs()["blue/b"].info.status == "FAILED"
    assert mirrored.runs()["blue/b"].data.tags["onebasis.state"] == "parked"
    mirrored.roll(2)
    assert mirrored.alias() == 2
    assert mirrored.runs()["blue/b"].info.status == "FINISHED"
    assert mirrored.history("subspace tiny", "score.red/a") == [(1, 0.9), (2, 0.88)]
    assert mirrored.history("blue/b", "local_score") == [(0, 0.9)]


@pytest.mark.changes
def test_after_a_rollback_to_nothing_no_version_is_called_main(mirrored: Mirrored) -> None:
    from mlflow.exceptions import MlflowException

    before = mirrored.everything()
    mirrored.roll(0)
    with pytest.raises(MlflowException, match="alias main not found"):
        mirrored.alias()
    mirrored.fresh_mirror().sync()
    mirrored.roll(2)
    assert mirrored.alias() == 2
    assert mirrored.everything()["versions"] == before["versions"]
    assert mirrored.history("subspace tiny", "score.red/a") == [(1, 0.9), (2, 0.88)]


def test_a_sync_with_nothing_new_asks_mlflow_for_no_task(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    get_run = type(mirrored.client).get_run
    monkeypatch.setattr(type(mirrored.client), "get_run", lambda me, run: asked.append(run) or get_run(me, run))
    mirrored.mirror.sync()
    assert set(asked) <= {mirrored.runs()["subspace tiny"].info.run_id}


@pytest.mark.usefixtures("_no_waiting")
def test_after_a_removal_the_rest_is_shown_where_it_is_now(tmp_path: Path) -> None:
    made = Mirrored(tmp_path)  # a world of its own: the others' goes on
    task_id = made.plant.get("red/a").task_id
    made.plant.cluster.write(BASE, Remove(task_id=task_id, op_key="remove:r", actor="ann", publish=True)).result()
    made.plant.controller.wake(log_moved=True)
    made.plant.step(3)
    made.mirror.sync()
    remade = made.plant.state.refs["main"]
    assert made.alias() == remade
    assert made.runs()["red/a"].data.tags["onebasis.state"] == "parked"
    assert made.runs()["blue/b"].data.tags["onebasis.state"] == "published"
    made.plant.run(lambda: remade in made.plant.state.scores)  # scored without being asked for
    made.plant.submit("blue/c")
    made.plant.run()
    made.mirror.sync()
    assert made.history("blue/b", "score") == [(2, 0.9), (remade, 0.9), (remade + 1, 0.9)]
    assert made.history("blue/b", "merge_gap") == [(2, 0.0), (remade, 0.0)]
    before = made.everything()
    made.fresh_mirror().sync()
    assert made.everything() == before
    made.plant.queue.close()


def test_a_revision_is_a_run_of_its_own_with_the_scores_on_each_revisions_rows(plant: Plant) -> None:
    (first,) = plant.submit("red/a")
    plant.run()
    scored = {first.task_id: 0.89, f"{first.task_id}@2": 0.95}
    plant.cluster.on_rows = lambda task_id, brought_by: scored[brought_by]
    second = revise(plant, first)
    plant.run()
    Mirror(plant.settings, plant.queue).sync()
    client = mlflow.MlflowClient(plant.settings.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name("onebasis")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {"red/a", "red/a@2"} <= set(runs)
    assert [runs[name].info.status for name in ("red/a", "red/a@2")] == ["FINISHED", "FINISHED"]
    assert [runs[name].data.params["revision"] for name in ("red/a", "red/a@2")] == ["1", "2"]
    found = runs["red/a@2"].data.metrics
    assert {name: value for name, value in found.items() if "rows_of" in name} == {
        "score.rows_of_revision_1": 0.89,
        "score.rows_of_revision_2": 0.95,
        "local_score.rows_of_revision_1": 0.89,
        "local_score.rows_of_revision_2": 0.95,
        "main_score_before.rows_of_revision_1": 0.8,
        "main_score_before.rows_of_revision_2": 0.8,
    }
    assert plant.queue.get(second.task_id).exact_title == "red/a@2"


@pytest.mark.changes
def test_a_deleted_database_is_rebuilt_the_same(mirrored: Mirrored) -> None:
    before = mirrored.everything()
    settings = mirrored.plant.settings
    elsewhere = settings.mlflow.tracking_uri.replace("mlflow.db", "mlflow-new.db")
    # Another file, as a deleted one is; MLflow keeps connections to the old one open in this process.
    mlflow = settings.mlflow.model_copy(update={"tracking_uri": elsewhere})
    mirrored.plant.settings = settings.model_copy(update={"mlflow": mlflow})
    mirrored.fresh_mirror().sync()
    assert mirrored.everything() == before


def test_what_somebody_changed_in_mlflow_is_made_anew_from_the_database_and_the_log(
    mirrored: Mirrored, tmp_path: Path
) -> None:
    before = mirrored.everything()
    mirrored.client.delete_run(mirrored.runs()["blue/b"].info.run_id)
    mirrored.client.log_metric(mirrored.runs()["red/a"].info.run_id, "score", 123.0, step=9)
    assert mirrored.everything() != before
    name = rebuild_mirror(mirrored.plant.settings, tmp_path)
    assert mirrored.everything() == before
    assert mirrored.client.get_experiment_by_name(name).lifecycle_stage == "deleted"
    mirrored.mirror = mirrored.fresh_mirror()  # the one before knows the runs that were put aside


def test_mlflow_being_away_is_told_and_tried_again(mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    mirror, stop, calls = mirrored.fresh_mirror(), threading.Event(), []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            stop.set()
        raise ConnectionError("no route to mlflow")

    monkeypatch.setattr("orchestrator.reports.mlflow_mirror.RETRY_SECONDS", 0.0)
    monkeypatch.setattr(mirror, "sync", fail)
    mirror.run(stop)
    assert len(calls) >= 2
    assert mirror.error == "ConnectionError: no route to mlflow"
    assert mirror.behind


@pytest.mark.changes
def test_an_experiment_that_was_deleted_in_mlflow_is_restored_with_the_runs_it_had(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setattr("orchestrator.reports.mlflow_mirror.RETRY_SECONDS", 0.0)
    before = mirrored.runs()["red/a"].info.run_id
    experiment = mirrored.client.get_experiment_by_name("onebasis")
    mirrored.client.delete_experiment(experiment.experiment_id)
    mirrored.plant.submit("red/afterwards")
    mirrored.plant.run()
    mirror, stop, errors = mirrored.mirror, threading.Event(), list[str]()
    sync = mirror.sync

    def watched() -> None:
        errors.append(mirror.error)
        if len(errors) > 5:
            stop.set()
        sync()
        stop.set()

    monkeypatch.setattr(mirror, "sync", watched)
    mirror.wake()
    mirror.run(stop)
    assert mirror.error == ""
    assert mirrored.client.get_experiment_by_name("onebasis").lifecycle_stage == "active"
    assert mirrored.runs()["red/a"].info.run_id == before
    assert "red/afterwards" in mirrored.runs()


@pytest.mark.changes
def test_what_ended_long_ago_is_not_read_again_and_a_row_that_cannot_be_read_stops_nothing(
    mirrored: Mirrored, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrored.fresh_mirror()
    mirror.sync()
    read: list[str] = []
    whole = task_queue.record_of

    def noted(task_id: str, title: str, text: str) -> Any:
        read.append(title)
        return whole(task_id, title, text)

    monkeypatch.setattr(task_queue, "record_of", noted)
    (late,) = mirrored.plant.submit("red/late")
    mirror.sync()
    held = {"red/a", "blue/b"} & set(mirrored.plant.held())
    assert set(read) == {"red/late", *held}
    assert "red/late" in mirrored.runs()
    with mirrored.plant.queue._database.writing() as connection:
        connection.exec_driver_sql("UPDATE tasks SET record = 'of tomorrow' WHERE task_id = 't-red-late'")
    mirrored.fresh_mirror().sync()
    assert [told.task_id for told in mirrored.plant.queue.unreadable()] == [late.task_id]
