"""What a service is and does, as Prometheus reads it: names begin with onebasis_ and have units; no task is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
"""Upper bounds of the classes of durations, in seconds: a submission may take minutes."""


class Meter:
    """Counts the requests to the HTTP API."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "onebasis_http_requests",
            "Requests, by the route's name and the status of the answer.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "onebasis_http_request_seconds",
            "Time from the head of a request to the head of its answer.",
            ("route",),
            buckets=BUCKETS,
            registry=self._registry,
        )

    def count(self, route: str, status: int, seconds: float) -> None:
        """route: Its name in the table; what matches none has to be one name, or strangers could invent any number."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> str:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry).decode()


def metrics(status: Mapping[str, Any]) -> str:
    """What `status` says, in Prometheus' text format. What is not known is left out, and never 0."""
    registry = CollectorRegistry()
    registry.register(_Status(status))
    return generate_latest(registry).decode()


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _one("onebasis_running", "1 while the loop runs here or elsewhere.", float(bool(status["running"])))
        yield _many(
            "onebasis_tasks",
            "Tasks by state.",
            ("state",),
            {(state,): count for state, count in (status["tasks"] or {}).items()},
        )
        yield _many(
            "onebasis_tasks_waiting",
            "Tasks that wait, by team and by the code of the reason.",
            ("team", "code"),
            {(team, code): n for team, codes in status.get("waiting", {}).items() for code, n in codes.items()},
        )
        yield _many(
            "onebasis_workers",
            "Workers by pool and by what they do.",
            ("pool", "state"),
            {
                (name, state): pool[state]
                for name, pool in status.get("pools", {}).items()
                for state in ("warm", "busy", "starting", "drained")
            },
        )
        yield _many(
            "onebasis_alarm",
            "1 for each alarm that rings, by its code in docs/trouble.md.",
            ("code", "base_model"),
            {(alarm["code"], alarm["base_model"]): 1 for alarm in status["alarms"]},
        )
        yield _one("onebasis_late_tasks", "Tasks whose deadline cannot be met.", len(status["late"]))
        for name, words, key in (
            ("onebasis_loop_age_seconds", "Time since the loop's last good step.", "loop_seconds_ago"),
            ("onebasis_silence_seconds", "Longest silence of a worker or a store's writer.", "heard_seconds_ago"),
            ("onebasis_mlflow_behind", "1 while MLflow does not have every event yet.", "mlflow_behind"),
            ("onebasis_traces_behind_events", "Events that the traces do not show yet.", "traces_behind"),
        ):
            if isinstance(status.get(key), int | float):
                yield _one(name, words, status[key])
        yield from self._of_base_models()
        yield from self._of_serving()

    def _of_base_models(self) -> Iterator[Metric]:
        bases = {base["base_model"]: base for base in self._status["base_models"]}
        yield _many(
            "onebasis_version",
            "Number of the version that a branch names.",
            ("base_model", "branch"),
            {
                (name, branch): base[branch]
                for name, base in bases.items()
                for branch in ("main", "candidate")
                if base.get(branch) is not None
            },
        )
        yield _many(
            "onebasis_main_held",
            "1 while a person keeps main where it is.",
            ("base_model",),
            {(name,): float(base.get("held") is not None) for name, base in bases.items()},
        )
        sizes = {name: base["footprint"] for name, base in bases.items() if base.get("footprint")}
        yield _many(
            "onebasis_stored_bytes",
            "Bytes of what main needs, in the store.",
            ("base_model",),
            {(name,): size["stored_bytes"] for name, size in sizes.items()},
        )
        yield _many(
            "onebasis_stored_numbers",
            "Numbers that main stores: shared, each task's own, and what separate LoRAs would.",
            ("base_model", "part"),
            {
                (name, part): size[f"{part}_numbers"]
                for name, size in sizes.items()
                for part in ("basis", "coefficient", "private", "head", "separate")
            },
        )

    def _of_serving(self) -> Iterator[Metric]:
        replicas = (self._status.get("serving") or {}).get("base_models", {})
        yield _many(
            "onebasis_serving_replicas",
            "Replicas that answer, by the version that they answer by.",
            ("base_model", "version"),
            {
                (name, str(version)): sum(one["version"] == version for one in some)
                for name, some in replicas.items()
                for version in sorted({one["version"] for one in some})
            },
        )
        yield _many(
            "onebasis_serving_rows",
            "Rows that the present replicas have answered.",
            ("base_model",),
            {(name,): sum(one["rows"] for one in some) for name, some in replicas.items()},
        )


def _one(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)


def _many(name: str, words: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
