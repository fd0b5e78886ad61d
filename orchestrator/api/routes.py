"""The HTTP routes: one table for the server and for the client.

A route's record says what is asked: its fields are the parameters in the path, and the rest of them the query of a GET
or the JSON body of a POST. `reference` may hold a slash (`team/name`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from configs.document import Request
from orchestrator.api import requests
from subspace_store import requests as store


class Role(StrEnum):
    """Permission that a request needs; each role includes the roles above it."""

    VIEWER = "viewer"
    SUBMITTER = "submitter"
    MAINTAINER = "maintainer"


@dataclass(frozen=True)
class Route:
    """One row of the table."""

    name: str
    verb: str
    path: str
    role: Role
    record: type[Request]

    @property
    def in_path(self) -> tuple[str, ...]:
        """Names of the fields that stand in the path."""
        return tuple(re.findall(r"{(\w+)", self.path))


ROUTES: tuple[Route, ...] = (
    Route("status", "GET", "/status", Role.VIEWER, requests.Status),
    Route("health", "GET", "/health", Role.VIEWER, requests.Health),
    Route("submit", "POST", "/tasks", Role.SUBMITTER, requests.Submit),
    Route("tasks", "GET", "/tasks", Role.VIEWER, requests.ListTasks),
    Route("task", "GET", "/tasks/{reference:path}", Role.VIEWER, requests.ShowTask),
    Route("cancel", "POST", "/cancel/{reference:path}", Role.SUBMITTER, requests.Cancel),
    Route("preempt", "POST", "/preempt/{reference:path}", Role.MAINTAINER, requests.Preempt),
    Route("retry", "POST", "/retry/{reference:path}", Role.SUBMITTER, requests.Retry),
    Route("pause", "POST", "/pause", Role.MAINTAINER, requests.Pause),
    Route("resume", "POST", "/resume", Role.MAINTAINER, requests.Resume),
    Route("reload", "POST", "/reload", Role.MAINTAINER, requests.Reload),
    Route("drain", "POST", "/drain", Role.MAINTAINER, requests.DrainWorker),
    Route("change-many", "POST", "/change-many", Role.MAINTAINER, requests.ChangeMany),
    Route("logs", "GET", "/logs/{reference:path}", Role.VIEWER, requests.ReadLog),
    Route("versions", "GET", "/versions", Role.VIEWER, requests.ListVersions),
    Route("version", "GET", "/versions/{version}", Role.VIEWER, requests.ShowVersion),
    Route("diff", "GET", "/diff/{old}/{new}", Role.VIEWER, requests.Diff),
    Route("preview-rollback", "GET", "/rollback/{version}", Role.VIEWER, requests.PreviewRollback),
    Route("rollback", "POST", "/rollback/{version}", Role.MAINTAINER, store.Rollback),
    Route("preview-restore", "GET", "/restore-revision/{task_id}", Role.VIEWER, requests.PreviewRestore),
    Route("restore-revision", "POST", "/restore-revision/{task_id}", Role.MAINTAINER, store.RestoreRevision),
    Route("export", "GET", "/export/{reference:path}", Role.VIEWER, requests.Export),
    Route("scores", "GET", "/scores", Role.VIEWER, requests.ShowScores),
    Route("capacity", "GET", "/capacity", Role.VIEWER, requests.ShowCapacity),
    Route("tag", "POST", "/store/tag", Role.MAINTAINER, store.Tag),
    Route("hold", "POST", "/store/hold", Role.MAINTAINER, store.Hold),
    Route("release", "POST", "/store/release", Role.MAINTAINER, store.Release),
    Route("quarantine", "POST", "/store/quarantine", Role.MAINTAINER, store.Quarantine),
    Route("unquarantine", "POST", "/store/unquarantine", Role.MAINTAINER, store.Unquarantine),
    Route("pin", "POST", "/store/pin", Role.MAINTAINER, store.Pin),
    Route("unpin", "POST", "/store/unpin", Role.MAINTAINER, store.Unpin),
    Route("expire", "POST", "/store/expire", Role.MAINTAINER, store.Expire),
    Route("drop-adapters", "POST", "/store/drop-adapters", Role.MAINTAINER, store.DropAdapters),
    Route("remove", "POST", "/store/remove", Role.MAINTAINER, store.Remove),
    Route("compact", "POST", "/store/compact", Role.MAINTAINER, store.Compact),
    Route("withdraw", "POST", "/store/withdraw", Role.MAINTAINER, store.Withdraw),
)

_BY_RECORD = {route.record: route for route in ROUTES}


def route_of(request: Request) -> Route:
    """Where a request is asked."""
    return _BY_RECORD[type(request)]


def read_request(route: Route, in_path: dict[str, Any], query: dict[str, str], body: bytes) -> Request:
    """The record that came in over HTTP.

    Args:
        in_path: Strings that stood in the path, by name.
        query: Query of a GET; a POST takes none.
        body: Body of a POST: a JSON object; an empty body is one without fields.

    Raises:
        InvalidInput: A value of another type, an unknown field, a field that is given twice.
    """
    return route.record.from_http(in_path, query, body if route.verb == "POST" else None)
