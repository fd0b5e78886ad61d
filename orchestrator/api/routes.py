"""The HTTP routes: one table for the server and for the client.

A route's record says what is asked: its fields are the parameters in the path, and the rest of them the query of a GET
or the JSON body of a POST. The body of a PUT is bytes of a file, and its other fields are in the query. `reference` may
hold a slash (`team/name`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from configs.document import Request
from orchestrator.api import requests
from orchestrator.api.access import About, Role
from subspace_store import requests as store

PREFIX = "/v1"
"""What all paths begin with. Fields may be added to answers; what would break a client gets another number."""


@dataclass(frozen=True)
class Route:
    """One row of the table."""

    name: str
    verb: str
    path: str
    role: Role
    """Role that it needs."""
    about: About
    """What it is about, and so in which teams."""
    record: type[Request]

    @property
    def is_write(self) -> bool:
        """Whether it changes anything."""
        return self.verb != "GET" and self.record not in _TOO_LONG_FOR_A_QUERY

    @property
    def is_audited(self) -> bool:
        """Whether it has rows in the audit log: what writes has, but for the pieces of a file, whose upload has."""
        return self.is_write and self.verb != "PUT"

    @property
    def takes_key(self) -> bool:
        """Whether it takes an `Idempotency-Key`: an answer with a secret is not kept, to be given again."""
        return self.is_audited and self.record not in (requests.CreateToken, requests.RotateToken)

    @property
    def url(self) -> str:
        """Path of its URL, with the fields that stand in it in braces. What Prometheus reads is where it looks."""
        return self.path if self.record is requests.Metrics else PREFIX + self.path

    @property
    def in_path(self) -> tuple[str, ...]:
        """Names of the fields that stand in the path."""
        return tuple(re.findall(r"{(\w+)", self.path))


_TOO_LONG_FOR_A_QUERY = (requests.Predict, requests.Which, requests.ReadTask, requests.MissingFiles)
"""What changes nothing, and is a POST all the same."""

ROUTES: tuple[Route, ...] = (
    Route("status", "GET", "/status", Role.VIEWER, About.SERVICE, requests.Status),
    Route("health", "GET", "/health", Role.VIEWER, About.SERVICE, requests.Health),
    Route("metrics", "GET", "/metrics", Role.VIEWER, About.EVERYTHING, requests.Metrics),
    Route("submit", "POST", "/tasks", Role.SUBMITTER, About.TEAM, requests.Submit),
    Route("read-task", "POST", "/read-task", Role.SUBMITTER, About.SERVICE, requests.ReadTask),
    Route("missing-files", "POST", "/uploads/missing", Role.SUBMITTER, About.TEAM, requests.MissingFiles),
    Route("send-piece", "PUT", "/uploads/{team}/{sha256}", Role.SUBMITTER, About.TEAM, requests.SendPiece),
    Route("upload", "POST", "/uploads", Role.SUBMITTER, About.TEAM, requests.KeepUpload),
    Route("tasks", "GET", "/tasks", Role.VIEWER, About.OWN_TEAMS, requests.ListTasks),
    Route("teams", "GET", "/teams", Role.VIEWER, About.SERVICE, requests.ListTeams),
    Route("task", "GET", "/tasks/{reference:path}", Role.VIEWER, About.TASK, requests.ShowTask),
    Route("cancel", "POST", "/cancel/{reference:path}", Role.SUBMITTER, About.TASK, requests.Cancel),
    Route("preempt", "POST", "/preempt/{reference:path}", Role.MAINTAINER, About.TASK, requests.Preempt),
    Route("retry", "POST", "/retry/{reference:path}", Role.SUBMITTER, About.TASK, requests.Retry),
    Route("pause", "POST", "/pause", Role.MAINTAINER, About.TEAM, requests.Pause),
    Route("resume", "POST", "/resume", Role.MAINTAINER, About.TEAM, requests.Resume),
    Route("settings", "GET", "/settings", Role.ADMIN, About.EVERYTHING, requests.ShowSettings),
    Route("reload", "POST", "/reload", Role.ADMIN, About.EVERYTHING, requests.Reload),
    Route("drain", "POST", "/drain", Role.ADMIN, About.EVERYTHING, requests.DrainWorker),
    Route("change-many", "POST", "/change-many", Role.MAINTAINER, About.TEAM, requests.ChangeMany),
    Route("predict", "POST", "/predict/{reference:path}", Role.VIEWER, About.TASK, requests.Predict),
    Route("events", "GET", "/events", Role.VIEWER, About.OWN_TEAMS, requests.ReadEvents),
    Route("which", "POST", "/which", Role.VIEWER, About.OWN_TEAMS, requests.Which),
    Route("versions", "GET", "/versions", Role.VIEWER, About.SERVICE, requests.ListVersions),
    Route("at", "GET", "/at", Role.VIEWER, About.SERVICE, requests.BranchesAt),
    Route("history", "GET", "/history/{branch}", Role.VIEWER, About.SERVICE, requests.ShowHistory),
    Route("version", "GET", "/versions/{version}", Role.VIEWER, About.SERVICE, requests.ShowVersion),
    Route("diff", "GET", "/diff/{old}/{new}", Role.VIEWER, About.SERVICE, requests.Diff),
    Route("preview-rollback", "GET", "/rollback/{version}", Role.VIEWER, About.SERVICE, requests.PreviewRollback),
    Route("rollback", "POST", "/rollback/{version}", Role.MAINTAINER, About.SERVICE, store.Rollback),
    Route("reject", "POST", "/reject/{version}", Role.MAINTAINER, About.SERVICE, requests.RejectVersion),
    Route("preview-restore", "GET", "/restore-revision/{task_id}", Role.VIEWER, About.MERGED, requests.PreviewRestore),
    Route(
        "restore-revision",
        "POST",
        "/restore-revision/{task_id}",
        Role.MAINTAINER,
        About.MERGED,
        store.RestoreRevision,
    ),
    # Its preview merges as the removal itself does, so it takes who may remove.
    Route("preview-remove", "GET", "/remove/{task_id}", Role.MAINTAINER, About.MERGED, requests.PreviewRemove),
    Route("export", "GET", "/export/{reference:path}", Role.VIEWER, About.TASK, requests.Export),
    Route("scores", "GET", "/scores", Role.VIEWER, About.SERVICE, requests.ShowScores),
    Route("matrix", "GET", "/matrix", Role.VIEWER, About.SERVICE, requests.ShowMatrix),
    Route("flipped", "GET", "/flipped/{reference:path}", Role.VIEWER, About.TASK, requests.ShowFlipped),
    Route("capacity", "GET", "/capacity", Role.VIEWER, About.SERVICE, requests.ShowCapacity),
    Route("storage", "GET", "/storage", Role.VIEWER, About.SERVICE, requests.ShowStorage),
    Route("tag", "POST", "/store/tag", Role.MAINTAINER, About.SERVICE, store.Tag),
    Route("hold", "POST", "/store/hold", Role.MAINTAINER, About.SERVICE, store.Hold),
    Route("release", "POST", "/store/release", Role.MAINTAINER, About.SERVICE, store.Release),
    Route("quarantine", "POST", "/store/quarantine", Role.MAINTAINER, About.MERGED, store.Quarantine),
    Route("unquarantine", "POST", "/store/unquarantine", Role.MAINTAINER, About.MERGED, store.Unquarantine),
    Route("pin", "POST", "/store/pin", Role.MAINTAINER, About.SERVICE, store.Pin),
    Route("unpin", "POST", "/store/unpin", Role.MAINTAINER, About.SERVICE, store.Unpin),
    Route("expire", "POST", "/store/expire", Role.ADMIN, About.EVERYTHING, store.Expire),
    Route("drop-adapters", "POST", "/store/drop-adapters", Role.MAINTAINER, About.MERGED, store.DropAdapters),
    Route("remove", "POST", "/store/remove", Role.MAINTAINER, About.MERGED, store.Remove),
    Route("compact", "POST", "/store/compact", Role.ADMIN, About.EVERYTHING, store.Compact),
    Route("withdraw", "POST", "/store/withdraw", Role.ADMIN, About.EVERYTHING, store.Withdraw),
    Route("webhooks", "GET", "/webhooks", Role.VIEWER, About.OWN_TEAMS, requests.ListWebhooks),
    Route("test-webhook", "POST", "/webhooks/test/{name}", Role.MAINTAINER, About.TEAM, requests.TryWebhook),
    Route("whoami", "GET", "/whoami", Role.VIEWER, About.SERVICE, requests.WhoAmI),
    Route("tokens", "GET", "/tokens", Role.VIEWER, About.SERVICE, requests.ListTokens),
    Route("create-token", "POST", "/tokens", Role.ADMIN, About.TEAM, requests.CreateToken),
    Route("rotate-token", "POST", "/tokens/{token_id}/rotate", Role.VIEWER, About.SERVICE, requests.RotateToken),
    Route("revoke-token", "POST", "/tokens/{token_id}/revoke", Role.VIEWER, About.SERVICE, requests.RevokeToken),
    Route("audit", "GET", "/audit", Role.ADMIN, About.EVERYTHING, requests.ReadAudit),
    Route("verify-audit", "GET", "/audit/verify", Role.ADMIN, About.EVERYTHING, requests.VerifyAudit),
)

_BY_RECORD = {route.record: route for route in ROUTES}


def route_of(request: Request) -> Route:
    """Where a request is asked."""
    return _BY_RECORD[type(request)]


def read_request(route: Route, in_path: dict[str, Any], query: dict[str, str], body: bytes) -> Request:
    """The record that came in over HTTP.

    Args:
        in_path: Strings that stood in the path, by name.
        query: Query of a GET or a PUT; a POST takes none.
        body: Body of a POST: a JSON object; an empty body is one without fields.

    Raises:
        InvalidInput: A value of another type, an unknown field, a field that is given twice.
    """
    return route.record.from_http(in_path, query, body if route.verb == "POST" else None)
