"""A trace for each task, from submit to commit: the same whoever tells it, and held up by nobody."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from configs.errors import InvalidInput, Unavailable
from configs.log_lines import trace_id_of
from configs.settings import TracingSettings
from orchestrator.alarms import AlarmCode, Alarms
from orchestrator.reports import traces as module
from orchestrator.reports.spans import caller_of
from orchestrator.reports.traces import HEADERS, Traces
from orchestrator.tasks.task_rows import LifeEvent
from orchestrator.tasks.trace_book import TraceBook
from orchestrator.watch import Watch
from tests.orchestrator.plant import Plant
from tests.orchestrator.receiver import Receiver
from tests.orchestrator.site import TOKEN, Site
from workers.orders import Train

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""The example of W3C Trace Context."""


class Collector(Receiver):
    """A receiver that reads OTLP."""

    @property
    def spans(self) -> list[Any]:
        """All spans that came, each as often as it came."""
        messages = [ExportTraceServiceRequest.FromString(body) for _, body in self.came]
        return [span for one in messages for r in one.resource_spans for s in r.scope_spans for span in s.spans]

    def of(self, task_id: str) -> dict[str, Any]:
        """Name to span of a task's trace; of several of one name the last."""
        trace = trace_id_of(task_id).to_bytes(16, "big")
        return {span.name: span for span in self.spans if span.trace_id == trace}

    @property
    def ids(self) -> list[tuple[bytes, bytes]]:
        return [(span.trace_id, span.span_id) for span in self.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


def facts(span: Any) -> dict[str, Any]:
    """Attributes as values."""
    read = {"string_value": str, "int_value": int, "double_value": float, "array_value": lambda v: [
        one.string_value for one in v.values]}  # fmt: skip
    kinds = {one.key: (one.value.WhichOneof("value"), one.value) for one in span.attributes}
    return {key.removeprefix("onebasis."): read[kind](getattr(value, kind)) for key, (kind, value) in kinds.items()}


def _parents(spans: dict[str, Any]) -> dict[str, str]:
    """Name of each span to that of the one that it is a part of."""
    named = {span.span_id: name for name, span in spans.items()}
    return {name: named[span.parent_span_id] if span.parent_span_id else "" for name, span in spans.items()}


def traces(plant: Plant) -> Traces:
    return Traces(plant.queue, lambda: plant.settings, "here")


def told(plant: Plant) -> Traces:
    """One that was there before anything happened."""
    made = traces(plant)
    made.look()
    return made


def test_a_trace_tells_what_happened_to_a_task_when_and_where(
    make_plant: Callable[..., Plant], collector: Collector
) -> None:
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    began = time.time()
    plant.submit("red/alpha", "blue/beta", submitted_at=began, traceparent=CALLER)
    plant.run()
    teller.look()
    record = plant.get("red/alpha")
    spans = collector.of(record.task_id)
    assert _parents(spans) == {
        "task": "",
        **dict.fromkeys(("queued", "training", "merging", "evaluating"), "task"),
        "train": "training",
        "merge": "merging",
        "score": "evaluating",
        **dict.fromkeys(("train: loading", "train: training", "train: scoring", "train: saving"), "train"),
        **dict.fromkeys(("score: loading", "score: scoring"), "score"),
    }
    ends = {name: (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9) for name, span in spans.items()}
    assert ends["task"][0] == pytest.approx(began)
    assert record.ended_at is not None
    assert record.ended_at - 1e-3 <= ends["task"][1] <= time.time()
    line = [ends[state] for state in ("queued", "training", "merging", "evaluating")]
    assert [one[1] for one in line[:-1]] == [one[0] for one in line[1:]]
    assert (line[0][0], line[-1][1]) == ends["task"]
    assert ends["train"][1] - ends["train"][0] == pytest.approx(2.5, abs=1e-3)
    assert ends["train: saving"][1] - ends["train: saving"][0] == pytest.approx(0.1, abs=1e-3)
    version = plant.state.versions[record.version]
    whose = {"task_id": record.task_id, "team": "red", "base_model": "tiny", "pool": record.pool}
    root = facts(spans["task"])
    assert root == whose | {
        "task": "red/alpha", "kind": record.spec.kind, "method": record.method, "attempts": 1, "steps": 10,
        "train_rows": record.train_count, "eval_rows": record.eval_count, "state": "published",
        "version": record.version,
    }  # fmt: skip
    worker = facts(spans["training"])["worker"]
    assert worker.startswith("worker-")
    assert facts(spans["training"]) == whose | {"attempt": 1, "worker": worker}
    assert facts(spans["train"]) == whose | {"worker": worker, "places": 1, "seconds": 2.5, "node": "node-a"}
    assert facts(spans["score"])["version"] == record.version
    assert facts(spans["merge"]) == whose | {
        "merge_key": record.merge_key, "version": record.version, "merge_seconds": version.merge_seconds,
        "bytes_written": version.bytes_written,
    }  # fmt: skip
    (link,) = spans["task"].links
    assert (link.trace_id.hex(), link.span_id.hex()) == tuple(CALLER.split("-")[1:3])
    assert [event.name for event in spans["merging"].events] == ["MergeBegun"]
    assert not any(span.status.code for span in collector.spans)
    (one,) = ExportTraceServiceRequest.FromString(collector.came[0][1]).resource_spans
    resource = {pair.key: pair.value.string_value for pair in one.resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("onebasis", "here")
    assert len(collector.ids) == len(set(collector.ids))
    assert teller.behind == 0


def test_what_went_wrong_is_a_code_and_no_text(make_plant: Callable[..., Plant], collector: Collector) -> None:
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    plant.cluster.training_faults = {"red/alpha": ["lost", ""], "red/beta": ["input"]}
    plant.submit("red/alpha", "red/beta")
    plant.run()
    teller.look()
    first = next(span for span in collector.spans if span.name == "training" and span.status.code)
    assert (first.status.code, first.status.message) == (2, "machine-lost")
    assert facts(first)["reason_codes"] == ["machine-lost"]
    alpha, beta = (collector.of(plant.get(title).task_id) for title in ("red/alpha", "red/beta"))
    assert facts(alpha["task"])["attempts"] == 2
    assert not alpha["task"].status.code
    assert (beta["task"].status.code, beta["task"].status.message) == (2, "bad-input")
    assert facts(beta["task"])["state"] == "parked"
    assert b"fault of kind" not in b"".join(body for _, body in collector.came)


def test_what_is_rolled_back_later_is_a_moment_in_the_same_trace(
    make_plant: Callable[..., Plant], collector: Collector
) -> None:
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    (record,) = plant.submit("red/alpha")
    plant.run()
    teller.look()
    before = len(collector.spans)
    plant.open_store().rollback(0, op_key="r", actor="ann", reason="a reason that is a secret")
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.states() == {"red/alpha": "parked"})
    teller.look()
    (moment,) = collector.spans[before:]
    assert (moment.name, moment.parent_span_id) == ("parked", collector.of(record.task_id)["task"].span_id)
    assert moment.start_time_unix_nano == moment.end_time_unix_nano
    assert facts(moment)["reason_codes"] == ["rolled-back"]
    assert b"secret" not in collector.came[-1][1]


def test_whoever_tells_it_again_tells_the_same(make_plant: Callable[..., Plant], collector: Collector) -> None:
    plant = make_plant(tracing={"endpoint": collector.url})
    book = TraceBook(plant.queue.database)
    told(plant)
    begun = book.told_until()
    assert begun == 0
    plant.submit("red/alpha")
    plant.run()
    traces(plant).look()
    first = list(collector.spans)
    traces(plant).look()
    assert collector.spans == first  # nothing twice, as long as nobody dies
    book.told(begun)  # as if the process had died between the message and the note of it
    plant.kill()
    traces(plant).look()
    assert collector.spans == [*first, *first]


def test_it_is_told_in_parts_as_it_happens_and_each_span_once(
    make_plant: Callable[..., Plant], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS_AT_ONCE", 2)
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    plant.cluster.hold = lambda order: isinstance(order, Train)
    plant.submit("red/alpha", "red/beta")
    plant.run(lambda: len(plant.cluster.held) == 2)
    while teller.look():
        pass
    assert {span.name for span in collector.spans} == {"queued"}
    plant.cluster.release()
    plant.run()
    while teller.look():
        pass
    assert len(collector.ids) == len(set(collector.ids))
    assert [span.name for span in collector.spans].count("task") == 2


def test_what_ended_before_anybody_asked_for_traces_is_not_told(
    make_plant: Callable[..., Plant], collector: Collector
) -> None:
    plant = make_plant()
    teller = traces(plant)
    plant.submit("red/alpha")
    plant.run()
    assert teller.look() is False
    assert teller.behind is None
    plant.settings = plant.settings.model_copy(
        update={"tracing": plant.settings.tracing.model_copy(update={"endpoint": collector.url})}
    )
    told(plant)
    plant.submit("red/beta")
    plant.run()
    teller.look()
    assert {facts(span)["task_id"] for span in collector.spans} == {plant.get("red/beta").task_id}


def test_a_state_whose_beginning_is_not_known_has_no_span(
    make_plant: Callable[..., Plant], collector: Collector
) -> None:
    from orchestrator.reports.spans import spans_of

    plant = make_plant()
    (record,) = plant.submit("red/alpha")
    known = {"revision": 3, "attempt": 1, "version": 0}
    # An older release wrote the events before these: nobody knows since when it trained.
    life = [
        LifeEvent(7, 2020.0, "PreemptRequested", known | {"state": "training"}),
        LifeEvent(8, 2030.0, "TrainingDone", known | {"state": "merging"}),
        LifeEvent(9, 2040.0, "MergeRefused", known | {"state": "parked", "codes": ["merge-refused"]}),
    ]
    assert [(span.name, span.began, span.ended) for span in spans_of(record, life, [], 0)] == [
        ("merging", 2030.0, 2040.0),
        ("task", record.submitted_at, 2040.0),
    ]


@pytest.mark.parametrize(("status", "error"), [(503, Unavailable), (401, InvalidInput), (302, InvalidInput)])
def test_a_collector_that_refuses_is_asked_again_and_misses_nothing(
    make_plant: Callable[..., Plant], status: int, error: type[Exception]
) -> None:
    refuses = [True]
    collector = Collector(lambda number: (status, b"") if refuses else (200, b""))
    plant = make_plant(tracing={"endpoint": f"{collector.url}/v1/traces"})
    teller = told(plant)
    plant.submit("red/alpha")
    plant.run()
    with pytest.raises(error, match=str(status)):
        teller.look()
    assert teller.behind
    refuses.clear()
    before = len(collector.came)
    teller.look()
    assert len(collector.came) == before + 1
    assert collector.came[0][1] == collector.came[-1][1]
    assert teller.behind == 0
    collector.close()


class Quiet:
    """A mirror of which there is nothing to tell."""

    error = ""
    working_since = 0.0


def test_a_collector_that_hangs_or_is_gone_rings_and_holds_up_nothing(
    bare_site: Site, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "RETRY_SECONDS", (0.01,))
    collector.hangs.set()
    plant, stop = bare_site.plant, threading.Event()
    endpoint = [collector.url]
    settings = lambda: plant.settings.model_copy(  # noqa: E731
        update={"tracing": plant.settings.tracing.model_copy(update={"endpoint": endpoint[0]})}
    )
    teller = Traces(plant.queue, settings)
    teller.look()
    thread = threading.Thread(target=teller.run, args=(stop,))
    with caplog.at_level(logging.WARNING, "onebasis.traces"):
        thread.start()
        bare_site.publish("red/alpha")  # within its own time
        until = time.monotonic() + 60
        while "no answer within" not in teller.error or not teller.behind:
            assert time.monotonic() < until
            time.sleep(0.01)
        endpoint[0] = "http://127.0.0.1:9"
        while "ConnectionRefusedError" not in teller.error:
            assert time.monotonic() < until
            time.sleep(0.01)
        alarms = Alarms()
        watch = Watch(alarms, plant.controller, Quiet(), teller, str, None)
        watch.look(time.time())
        (rings,) = (alarm for alarm in alarms if alarm.code == AlarmCode.TRACES_BEHIND)
        assert "ConnectionRefusedError" in rings.what
        well = Collector()
        endpoint[0] = well.url
        while teller.behind or teller.error or not well.came:
            assert time.monotonic() < until
            time.sleep(0.01)
    watch.look(time.time())
    assert AlarmCode.TRACES_BEHIND not in {alarm.code for alarm in alarms}
    stop.set()
    thread.join(10)
    assert facts(well.of(plant.get("red/alpha").task_id)["task"])["state"] == "published"
    said = [one.getMessage() for one in caplog.records if one.name == "onebasis.traces"]
    assert len(said) == len(set(said))  # once, and not at every try
    well.close()


def test_a_collector_that_takes_a_part_is_told_of(
    make_plant: Callable[..., Plant], caplog: pytest.LogCaptureFixture
) -> None:
    answer = ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(rejected_spans=3))
    collector = Collector(lambda number: (200, answer.SerializeToString()))
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    plant.submit("red/alpha")
    plant.run()
    teller.look()
    assert "did not take 3 spans" in caplog.text
    assert teller.behind == 0
    collector.close()


def test_headers_come_from_the_environment_and_are_shown_nowhere(
    make_plant: Callable[..., Plant],
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv(HEADERS, "Authorization=Bearer%20canary-of-a-token,x-tenant=red")
    plant = make_plant(tracing={"endpoint": collector.url})
    teller = told(plant)
    plant.submit("red/alpha")
    plant.run()
    teller.look()
    (headers, body) = collector.came[0]
    sent = {name.lower(): value for name, value in headers.items()}
    assert (sent["authorization"], sent["x-tenant"]) == ("Bearer canary-of-a-token", "red")
    assert sent["content-type"] == "application/x-protobuf"
    assert b"canary" not in body
    monkeypatch.setenv(HEADERS, "authorization=canary\n2")
    plant.submit("red/beta")
    plant.run()
    with pytest.raises(Unavailable) as caught:
        teller.look()
    assert "canary" not in str(caught.value)
    assert "canary" not in caplog.text


def test_a_submission_is_linked_to_the_trace_of_who_asked(bare_site: Site) -> None:
    for number, (said, known) in enumerate(
        [(CALLER, CALLER), ("", ""), (CALLER.upper(), ""), (f"{CALLER}-more", ""), ("00-" + "0" * 400, "")]
    ):
        body = {"task": bare_site.document(f"red/number-{number}")}
        headers = {"authorization": f"Bearer {TOKEN}"} | ({"traceparent": said} if said else {})
        answer = httpx.post(f"{bare_site.url}/v1/tasks", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert bare_site.plant.get(f"red/number-{number}").traceparent == known
    assert caller_of(CALLER) == (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7)
    assert caller_of(f"00-{'0' * 32}-{'1' * 16}-01") is None


def test_a_request_that_writes_is_a_part_of_the_trace_of_who_asked(bare_site: Site, collector: Collector) -> None:
    tracing = TracingSettings(endpoint=collector.url)
    settings = bare_site.plant.settings.model_copy(update={"tracing": tracing})
    teller = Traces(bare_site.plant.queue, lambda: settings)
    teller.look()
    headers = {"authorization": f"Bearer {TOKEN}", "traceparent": CALLER, "x-request-id": "the-one"}
    with httpx.Client(base_url=bare_site.url, headers=headers) as client:
        began = time.time()
        assert client.post("/v1/pause", json={}).status_code == 200
        del client.headers["traceparent"]
        assert client.post("/v1/cancel/red/nothing", json={}).status_code == 404
        assert client.get("/v1/status").status_code == 200
    teller.look()
    pause, cancel = collector.spans
    assert (pause.trace_id.hex(), pause.parent_span_id.hex()) == tuple(CALLER.split("-")[1:3])
    assert (pause.name, facts(pause)) == ("pause", {"request_id": "the-one", "outcome": "done"})
    assert pause.kind == type(pause).SPAN_KIND_SERVER
    assert began - 1 < pause.start_time_unix_nano / 1e9 <= pause.end_time_unix_nano / 1e9 < time.time() + 1
    assert cancel.parent_span_id == b""
    assert (cancel.name, cancel.status.code, cancel.status.message) == ("cancel", 2, "not-found")
    assert b"ann" not in collector.came[0][1]
    teller.look()
    assert len(collector.came) == 1


KILLED = """
import os, sys
from pathlib import Path
from orchestrator.reports import traces
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.trace_book import TraceBook
from tests.builders import settings

def dies(self, number, what="traces"):
    os.kill(os.getpid(), 9)

TraceBook.told = dies
TraceBook.told_until = lambda self, what="traces": 0
made = settings(Path(sys.argv[1]), tracing={"endpoint": sys.argv[2]})
traces.Traces(TaskQueue(made.database_url), lambda: made, "here").look()
"""


def test_a_process_that_is_killed_before_it_noted_what_it_told_loses_nothing(
    make_plant: Callable[..., Plant], collector: Collector, tmp_path: Path
) -> None:
    plant = make_plant(tracing={"endpoint": collector.url})
    told(plant)
    plant.submit("red/alpha")
    plant.run()
    folder = plant.settings.state_dir
    ended = subprocess.run([sys.executable, "-c", KILLED, folder, collector.url], env=os.environ, timeout=60)
    assert ended.returncode == -9
    first = list(collector.spans)
    assert any(span.name == "task" for span in first)
    traces(plant).look()
    assert collector.spans == [*first, *first]
