"""Tells an OpenTelemetry collector what became of each task, from submit to commit: in a thread of its own.

The leader's alone. A mirror as MLflow is: everything is read from SQL, where it was written with what it tells of, and
how far it was told is kept there. So a collector that is away holds nothing up and misses nothing. What a killed
process, or one that was overtaken, told last is told again by the next one, under the same ids: see spans.py.

Sent as OTLP over HTTP by its own messages, and not by the SDK: that one tells of what this very process does now.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import version
from urllib.parse import unquote, urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

from configs.errors import InvalidInput, OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.reports.spans import Attribute, Span, span_of_request, spans_of
from orchestrator.tasks.audit_log import AuditLog
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.trace_book import REQUESTS, TraceBook

log = logging.getLogger("onebasis.traces")

LOOK_SECONDS = 2.0
"""Interval at which what is new is looked for: each look is ten questions to the database, however little happened."""
TIMEOUT_SECONDS = 10.0
RETRY_SECONDS = (2.0, 5.0, 15.0, 60.0)
"""Waits after tries that failed, one after another; the last for all further ones."""
EVENTS_AT_ONCE = 500
"""Events whose spans are one message: some hundred kilobytes."""
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
"""Environment variable that every sender of OTLP reads: `name=value,name=value`, percent-encoded; such as a token."""
PATH = "/v1/traces"
ANSWER_BYTES_MAX = 65_536


class Traces:
    """See the module.

    Args:
        settings: Those that count now.
        instance: Name of this service, for who has several.
    """

    def __init__(self, queue: TaskQueue, settings: Callable[[], Settings], instance: str = "") -> None:
        self._queue, self._settings, self._instance = queue, settings, instance
        self._book, self._audit = TraceBook(queue.database), AuditLog(queue.database)
        self.behind: int | None = None
        """Number of events that the collector was not told of yet; None: there is no collector, or nobody has
        looked."""
        self.error = ""
        """Why the last try failed, for people."""
        self.working_since = 0.0
        """Unix time at which the look under way began; 0 between two."""
        self._tries = 0

    def run(self, stop: threading.Event) -> None:
        """Tell until told to stop, and once more then."""
        last = False
        while not last:
            last = stop.is_set()
            try:
                while self._timed_look() and not stop.is_set():
                    pass
                self.error, self._tries = "", 0
                stop.wait(LOOK_SECONDS)
            except Exception as error:  # whatever it is: the service goes on without
                said = error.sentence if isinstance(error, OnebasisError) else f"{type(error).__name__}: {error}"
                if said != self.error:  # once, and not at every try
                    log.warning("traces wait: %s", said)
                self.error = said
                stop.wait(RETRY_SECONDS[min(self._tries, len(RETRY_SECONDS) - 1)])
                self._tries += 1

    def _timed_look(self) -> bool:
        self.working_since = time.time()
        try:
            return self.look()
        finally:
            self.working_since = 0.0

    def look(self) -> bool:
        """Tell what is new.

        Returns:
            Whether there may be more.

        Raises:
            Unavailable: The collector, or the database, is away.
            InvalidInput: The collector refuses what it is sent.
        """
        endpoint = self._settings().tracing.endpoint
        if endpoint is None:
            self.behind = None
            return False
        is_more = self._look_at_tasks(endpoint)
        return self._look_at_requests(endpoint) or is_more

    def _look_at_requests(self, endpoint: str) -> bool:
        """Tell of requests that write, as the audit log has them."""
        told = self._book.told_until(REQUESTS)
        if told is None:
            (last,) = self._audit.newest(1) or (None,)
            self._book.told(last.seq if last else 0, REQUESTS)
            return False
        rows = self._audit.page(told, EVENTS_AT_ONCE)
        if not rows:
            return False
        ended = [row for row in rows if row.of != row.seq]
        asked = {row.seq: row for row in self._audit.among({row.of for row in ended})}
        if spans := [span_of_request(asked[row.of], row) for row in ended]:
            send(endpoint, spans, self._instance)
        self._book.told(rows[-1].seq, REQUESTS)
        return len(rows) == EVENTS_AT_ONCE

    def _look_at_tasks(self, endpoint: str) -> bool:
        newest, told = self._book.newest(), self._book.told_until()
        if told is None:  # of tasks that ended before anybody asked for traces there are none
            self._book.told(newest)
            told = newest
        self.behind = max(0, newest - told)
        if not self.behind:
            return False
        changed = self._book.changed(told, EVENTS_AT_ONCE)
        is_full = len(changed) == EVENTS_AT_ONCE
        until = changed[-1][0] if is_full else max([newest, *(event_id for event_id, *_ in changed)])
        spans = self._spans({task_id for _, task_id, moves in changed if moves}, told, until)
        if spans:
            send(endpoint, spans, self._instance)
        self._book.told(until)
        self.behind = max(0, newest - until)
        return is_full

    def _spans(self, task_ids: Iterable[str], after: int, until: int) -> list[Span]:
        records = self._queue.among(sorted(task_ids))
        if not records:
            return []
        lives, orders = self._book.lives(records, until), self._queue.spent_by(records)
        return [
            span
            for task_id, record in records.items()
            for span in spans_of(record, lives[task_id], orders[task_id], after)
        ]


def send(endpoint: str, spans: Sequence[Span], instance: str = "") -> None:
    """Send spans once. Redirects are not followed.

    Args:
        endpoint: See `TracingSettings.endpoint`.

    Raises:
        Unavailable: It did not answer, or not in time, or asks to be asked later.
        InvalidInput: It refuses them.
    """
    place = urlsplit(endpoint)
    kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
    path = place.path if place.path.endswith(PATH) else place.path.rstrip("/") + PATH
    headers = {"content-type": "application/x-protobuf", "user-agent": f"onebasis/{version('onebasis')}"}
    try:
        connection = kind(place.hostname or "", place.port, timeout=TIMEOUT_SECONDS)
    except ValueError as error:  # a port that is none
        raise InvalidInput(f"is no address: {error}", "tracing.endpoint", "correct it in the settings") from error
    try:
        connection.request("POST", path, message_of(spans, instance).SerializeToString(), headers | _own_headers())
        reply = connection.getresponse()
        content = reply.read(ANSWER_BYTES_MAX)
    except TimeoutError as error:
        raise Unavailable(f"no answer within {TIMEOUT_SECONDS:.0f} s", place.netloc) from error
    except ssl.SSLCertVerificationError as error:
        raise Unavailable(f"its certificate is not trusted: {error.verify_message}", place.netloc) from error
    except (OSError, HTTPException, UnicodeError, ValueError) as error:
        raise Unavailable(f"no answer: {type(error).__name__}", place.netloc) from error
    finally:
        connection.close()
    if reply.status in (429, 502, 503, 504):
        raise Unavailable(f"asks to be asked later: status {reply.status}", place.netloc)
    if not 200 <= reply.status < 300:
        what = f"refuses traces: status {reply.status}"
        raise InvalidInput(what, place.netloc, f"look at tracing.endpoint, {HEADERS} and the collector's own log")
    _warn_of_refused(content, place.netloc)


def _warn_of_refused(content: bytes, host: str) -> None:
    """A collector may take a part, and asks then not to be sent the rest again."""
    try:
        said = ExportTraceServiceResponse.FromString(content).partial_success
    except DecodeError:  # an answer in another form says no more than its status
        return
    if said.rejected_spans:
        log.warning("the collector at %s did not take %d spans", host, said.rejected_spans)


def _own_headers() -> dict[str, str]:
    """Headers that the environment asks for. Never shown or logged."""
    pairs = (one.partition("=") for one in os.environ.get(HEADERS, "").split(","))
    return {unquote(name).strip().lower(): unquote(value).strip() for name, _, value in pairs if name.strip()}


def message_of(spans: Sequence[Span], instance: str = "") -> ExportTraceServiceRequest:
    """Spans as OTLP has them."""
    service: dict[str, Attribute] = {
        "service.name": "onebasis",
        "service.version": version("onebasis"),
        "service.instance.id": instance or socket.gethostname(),
    }
    scope = ScopeSpans(scope=InstrumentationScope(name="onebasis"), spans=[_message(span) for span in spans])
    resource = Resource(attributes=_pairs(service.items()))
    return ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope])])


def _message(span: Span) -> Message:
    links = [Message.Link(trace_id=_bytes(trace, 16), span_id=_bytes(its, 8)) for trace, its in span.links]
    events = [Message.Event(name=name, time_unix_nano=_nanoseconds(at)) for name, at in span.moments]
    return Message(
        trace_id=_bytes(span.trace_id, 16),
        span_id=_bytes(span.span_id, 8),
        parent_span_id=b"" if span.parent_id is None else _bytes(span.parent_id, 8),
        name=span.name,
        kind=Message.SPAN_KIND_SERVER if span.is_request else Message.SPAN_KIND_INTERNAL,
        start_time_unix_nano=_nanoseconds(span.began),
        end_time_unix_nano=_nanoseconds(span.ended),
        attributes=_pairs(span.attributes.items()),
        events=events,
        links=links,
        status=None if span.trouble is None else Status(code=Status.STATUS_CODE_ERROR, message=span.trouble),
    )


def _pairs(facts: Iterable[tuple[str, Attribute]]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(fact)) for name, fact in facts]


def _value(fact: Attribute) -> AnyValue:
    match fact:
        case bool():
            return AnyValue(bool_value=fact)
        case int():
            return AnyValue(int_value=fact)
        case float():
            return AnyValue(double_value=fact)
        case str():
            return AnyValue(string_value=fact)
    return AnyValue(array_value=ArrayValue(values=[_value(one) for one in fact]))


def _bytes(number: int, size: int) -> bytes:
    return number.to_bytes(size, "big")


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)
