"""The life of a task as spans: what a trace of it consists of. Pure.

One trace is one task (of a task with revisions, one revision). Its ids are digests of what its spans stand for, so that
whoever tells a span again, after a restart or as another leader, tells the same one. No text that a person, a file or
an error wrote is part of it: names, numbers, times and codes are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from configs.log_lines import TRACEPARENT, id_of, trace_id_of
from orchestrator.tasks.audit_log import DONE, AuditRow
from orchestrator.tasks.task_events import Claimed, MergeBegun, Merged, Reason
from orchestrator.tasks.task_queue import Spent
from orchestrator.tasks.task_record import LIVE, TaskRecord, TaskState
from orchestrator.tasks.task_rows import LifeEvent, done_at_of

Attribute = str | int | float | bool | Sequence[str]
WITH_LEASE = ("train", "refine")
"""Orders that belong to the state in which the task had the lease for them; the others by the time at which they
ended."""
NO_TROUBLE = (Reason.PREEMPTED, Reason.CANCELLED)
FAILED = (TaskState.REJECTED, TaskState.PARKED)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took a while."""

    trace_id: int
    """128 bits."""
    span_id: int
    """64 bits."""
    parent_id: int | None
    """None: it is the trace's first."""
    name: str
    """A word of which there are few."""
    began: float
    """Unix time; so is `ended`."""
    ended: float
    attributes: Mapping[str, Attribute]
    trouble: str | None = None
    """Codes of what went wrong; None: nothing did."""
    moments: tuple[tuple[str, float], ...] = ()
    """What happened meanwhile, and when."""
    links: tuple[tuple[int, int], ...] = field(default=())
    """(trace id, span id) of spans of others that led to it."""
    is_request: bool = False
    """Whether it is the answer to a request over HTTP."""


def spans_of(record: TaskRecord, life: Sequence[LifeEvent], orders: Sequence[Spent], after: int) -> list[Span]:
    """The spans that ended with a task's events behind a number.

    Args:
        record: The task; what changes of it is read off its events.
        life: All its events that have facts, oldest first.
        orders: What workers did for it.
    """
    return list(_Trace(record, orders).spans(life, after))


def span_of_request(asked: AuditRow, ended: AuditRow) -> Span:
    """A request that writes, from its two rows in the audit log: a part of the caller's trace, where it named one."""
    about = json.loads(asked.about)
    mine = id_of("request", asked.sha256)
    trace_id, parent_id = caller_of(about.get("traceparent", "")) or (id_of("request", asked.sha256, size=16), None)
    return Span(
        trace_id=trace_id,
        span_id=mine,
        parent_id=parent_id,
        name=asked.request,
        began=asked.at,
        ended=max(asked.at, ended.at),
        attributes={"onebasis.request_id": about.get("request_id", ""), "onebasis.outcome": ended.outcome},
        trouble=None if ended.outcome == DONE else ended.outcome,
        is_request=True,
    )


def caller_of(traceparent: str) -> tuple[int, int] | None:
    """(trace id, span id) that a W3C `traceparent` header names; None where it is none."""
    found = TRACEPARENT.fullmatch(traceparent)
    ids = (int(found[1], 16), int(found[2], 16)) if found else (0, 0)
    return ids if all(ids) else None


class _Trace:
    def __init__(self, record: TaskRecord, orders: Sequence[Spent]) -> None:
        self._record, self._orders = record, orders
        self._trace_id = trace_id_of(record.task_id)
        self._root = id_of(record.task_id, "task")

    def spans(self, life: Sequence[LifeEvent], after: int) -> Iterator[Span]:
        state, held = "", list[LifeEvent]()
        """State so far, and its events from the first on; none where it began before events had facts."""
        for event in life:
            if event.facts["state"] == state:
                held += [event] if held else []
                continue
            if event.event_id > after and state in LIVE:
                yield from self._state(state, held, event) if held else ()
                if event.facts["state"] not in LIVE:
                    yield self._task(event)
            elif event.event_id > after and state:
                yield self._moved(event)
            held = [event] if state or event.kind == "submitted" else []
            state = event.facts["state"]

    def _task(self, end: LifeEvent) -> Span:
        """The first span: from submission to the end."""
        record = self._record
        facts: dict[str, Attribute] = {
            "task": record.exact_title,
            "kind": record.spec.kind,
            "method": record.method or record.spec.method.name,
            "attempts": end.facts["attempt"],
            "steps": record.steps,
            "train_rows": record.train_count,
            "eval_rows": record.scored_count,
        }
        caller = caller_of(record.traceparent)
        return self._span(
            "task", self._root, None, record.submitted_at, end.at, facts | _facts(end), _trouble(end),
            links=(caller,) if caller else (),
        )  # fmt: skip

    def _state(self, state: str, held: Sequence[LifeEvent], end: LifeEvent) -> Iterator[Span]:
        """The time in one state, and below it what workers and the store's writer did then."""
        first = held[0]
        mine = id_of(self._record.task_id, "state", end.facts["revision"])
        facts: dict[str, Attribute] = {"attempt": first.facts["attempt"]}
        if first.facts.get("worker"):
            facts["worker"] = first.facts["worker"]
        if codes := end.facts.get("codes"):
            facts["reason_codes"] = codes
        moments = tuple((event.kind, event.at) for event in held[1:])
        yield self._span(state, mine, self._root, first.at, end.at, facts, _trouble(end), moments)
        if end.kind == Merged.__name__:
            yield from self._merge(mine, held, end)
        tokens = {event.facts.get("token") for event in held if event.kind == Claimed.__name__}
        for order in self._orders:
            is_in_time = order.what not in WITH_LEASE and first.at < order.ended_at <= end.at
            if order.token in tokens or is_in_time:
                yield from self._order(mine, order)

    def _merge(self, parent: int, held: Sequence[LifeEvent], end: LifeEvent) -> Iterator[Span]:
        """The store's writer at work: from its order to the record in the version log."""
        begun = next((event for event in reversed(held) if event.kind == MergeBegun.__name__), None)
        if begun is None:
            return
        names = ("merge_seconds", "bytes_written")
        facts: dict[str, Attribute] = {name: end.facts[name] for name in names if name in end.facts}
        key = begun.facts["merge_key"]
        facts |= {"merge_key": key, "version": end.facts["version"]}
        yield self._span("merge", id_of(self._record.task_id, "merge", key), parent, begun.at, end.at, facts)

    def _order(self, parent: int, order: Spent) -> Iterator[Span]:
        """What a worker did, and below it its phases, by the clock of its machine."""
        done_at, mine = done_at_of(order.done_at), id_of(self._record.task_id, "order", order.token)
        facts: dict[str, Attribute] = {"worker": order.worker, "places": order.places, "seconds": order.seconds}
        if done_at.node:
            facts["node"] = done_at.node
        if order.what == "score" and (version := order.token.partition("-")[0]).isdecimal():
            facts["version"] = int(version)
        # Of an order for several tasks each is charged a part: its phases tell how long all of it took.
        began = min([order.ended_at - order.seconds, *(phase.began for phase in done_at.phases[:1])])
        yield self._span(order.what, mine, parent, began, order.ended_at, facts)
        for number, phase in enumerate(done_at.phases):
            own: dict[str, Attribute] = {"candidate": phase.candidate} if phase.candidate else {}
            own |= {"node": done_at.node, "worker": order.worker}
            one = id_of(self._record.task_id, "phase", order.token, number)
            yield self._span(f"{order.what}: {phase.phase}", one, mine, phase.began, phase.ended, own)

    def _moved(self, event: LifeEvent) -> Span:
        """A moment after the end: it was rolled back, replaced or restored."""
        mine = id_of(self._record.task_id, "state", event.facts["revision"])
        return self._span(event.facts["state"], mine, self._root, event.at, event.at, _facts(event))

    def _span(
        self,
        name: str,
        span_id: int,
        parent_id: int | None,
        began: float,
        ended: float,
        facts: Mapping[str, Attribute],
        trouble: str | None = None,
        moments: tuple[tuple[str, float], ...] = (),
        links: tuple[tuple[int, int], ...] = (),
    ) -> Span:
        record = self._record
        whose: dict[str, Attribute] = {
            "task_id": record.task_id,
            "team": record.team,
            "base_model": record.base_model,
            "pool": record.pool,
        }
        return Span(
            trace_id=self._trace_id,
            span_id=span_id,
            parent_id=parent_id,
            name=name,
            began=began,
            ended=max(began, ended),
            attributes={f"onebasis.{key}": value for key, value in {**whose, **facts}.items()},
            trouble=trouble,
            moments=moments,
            links=links,
        )


def _facts(event: LifeEvent) -> dict[str, Attribute]:
    """What a task came to."""
    names = {"state": "state", "version": "version", "codes": "reason_codes"}
    return {told: event.facts[name] for name, told in names.items() if event.facts.get(name)}


def _trouble(end: LifeEvent) -> str | None:
    """Codes, where a state ended because something went wrong."""
    codes = [code for code in end.facts.get("codes", ()) if code not in NO_TROUBLE]
    return ", ".join(codes) if codes or end.facts["state"] in FAILED else None
