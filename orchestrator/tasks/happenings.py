"""What others are told of: a record for each thing that happened, and to which webhooks it goes. Pure.

A happening is kept in SQL in the very transaction of what it tells of (outbox.py), or is derived from the version log,
whose records never change; so none is lost and none is told twice, whoever leads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from configs.settings import WebhookSettings
from orchestrator.tasks.task_record import TaskRecord, TaskState

Kind = Literal["published", "rejected", "parked", "cancelled", "rolled-back", "held", "alarm", "test"]
ENDS: tuple[Kind, ...] = ("published", "rejected", "parked", "cancelled")
"""Kinds that `ended` stands for."""
TEST: Kind = "test"
"""What somebody sends to see whether a webhook works."""
WAITS_SECONDS = (5, 60, 300, 1800, 3600, 7200, 14_400, 28_800)
"""Waits after each attempt that failed: some fifteen hours, then it is given up."""
SENTENCE_MAX = 2000


@dataclass(frozen=True, kw_only=True)
class Happening:
    """One thing that happened."""

    key: str
    """Names it for ever: told again under the same key, it is one."""
    kind: Kind
    at: float
    """Unix seconds."""
    sentence: str
    """For people."""
    team: str = ""
    """Team whose task it is about; empty: it is about all."""
    task_id: str = ""
    title: str = ""
    """`team/task`."""
    base_model: str = ""
    version: int | None = None
    """Version that it is about; None: none."""

    @property
    def message_id(self) -> str:
        """The id that receivers know it by: the same at every attempt."""
        return f"evt_{self.key.replace(':', '_')}"

    def body(self, sentence: str) -> dict[str, Any]:
        """What is sent. sentence: For those who read it there."""
        return {
            "id": self.message_id,
            "time": datetime.fromtimestamp(self.at, tz=UTC).isoformat(timespec="milliseconds"),
            "kind": self.kind,
            "team": self.team or None,
            "task": {"id": self.task_id, "title": self.title} if self.task_id else None,
            "base_model": self.base_model or None,
            "version": self.version,
            "sentence": sentence,
        }


def of_task(before: TaskRecord, after: TaskRecord, at: float) -> Happening | None:
    """What an event made of a task, if others are told of it."""
    told: dict[TaskState, tuple[Kind, str]] = {
        TaskState.PUBLISHED: ("published", f"is published in version {after.version}"),
        TaskState.REJECTED: ("rejected", f"was rejected: {after.reason}"),
        TaskState.PARKED: ("parked", f"is parked: {after.reason}"),
        TaskState.CANCELLED: ("cancelled", "was cancelled"),
    }
    if after.state is before.state or after.state not in told:
        return None
    kind, words = told[after.state]
    return Happening(
        key=f"task:{after.task_id}:{after.revision}",
        kind=kind,
        at=at,
        sentence=f"{after.exact_title} {words}"[:SENTENCE_MAX],
        team=after.team,
        task_id=after.task_id,
        title=after.title,
        base_model=after.base_model,
        version=after.version or None,
    )


def receivers(happening: Happening, hooks: Mapping[str, tuple[str, WebhookSettings]]) -> tuple[str, ...]:
    """Names of the webhooks that are told: of its kind, and of its team or of all."""
    return tuple(
        name
        for name, (team, hook) in hooks.items()
        if happening.team in ("", team) or not team
        if happening.kind in hook.events or ("ended" in hook.events and happening.kind in ENDS)
    )


def next_attempt(tries: int, now: float) -> float:
    """Unix time of the attempt after so many."""
    return now + WAITS_SECONDS[min(tries, len(WAITS_SECONDS)) - 1]


def is_last(tries: int) -> bool:
    """Whether nothing is sent again after so many attempts."""
    return tries > len(WAITS_SECONDS)
