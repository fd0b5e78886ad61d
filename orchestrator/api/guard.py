"""Who asks stands in front of the service: what they may, what they see, and the audit log of what they changed.

A request goes through five steps: what it names is found among what the caller sees; its role and the rules of `main`
are looked up; the caller's name is written into it; it is carried out between two rows of the audit log; and the answer
is shown without other teams' tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from configs import log_lines
from configs.document import Request
from configs.errors import InvalidInput, NotFound, OnebasisError
from configs.uploads import upload_id
from orchestrator.api import requests
from orchestrator.api.access import (
    EVERY_TEAM,
    EVERY_TEAM_TOLD,
    About,
    Caller,
    Role,
    after_another_team,
    check_given,
    check_main,
    check_role,
    no_such_team,
)
from orchestrator.api.feed import Interest
from orchestrator.api.requests import Json
from orchestrator.api.routes import Route, route_of
from orchestrator.api.service import Service
from orchestrator.api.shown import Eyes, names_in, shown, shown_error, task_ids_in
from subspace_store.requests import StoreRequest

if TYPE_CHECKING:
    from orchestrator.tasks.task_queue import TaskQueue
    from orchestrator.tasks.task_rows import NamedEvent

SECONDS_A_DAY = 86_400.0


class Guard:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def queue(self) -> TaskQueue:
        """The task database."""
        return self._service.sources.queue

    def answer(self, request: Request, caller: Caller, key: str = "") -> Any:
        """Carry out a request for somebody, or refuse it.

        Args:
            key: Key under which a request that writes is carried out once, however often it is asked; empty: none.
        """
        teams = caller.teams
        try:
            answer = self._answer(request, caller, key)
        except OnebasisError as error:
            if teams is None:
                raise
            raise shown_error(error, self._eyes(teams, error.args, request)) from None
        return answer if teams is None else shown(answer, self._eyes(teams, answer, request))

    def _answer(self, request: Request, caller: Caller, key: str) -> Any:
        route = route_of(request)
        if route.is_write:
            self._service.refuse_write()
        with self._audited(route, request, caller):
            permitted = self._permitted(route, request, caller)
            if key and route.is_audited and not getattr(request, "dry_run", False):
                return self._once(key, request, permitted, caller)
            return self._carried_out(permitted, caller)

    def _carried_out(self, request: Request, caller: Caller) -> Any:
        match request:
            case requests.WhoAmI():
                return _who(caller)
            case requests.ListTokens():
                return self._list_tokens(caller)
            case requests.CreateToken():
                return self._create_token(request, caller)
            case requests.RotateToken():
                return self._rotate_token(request, caller)
            case requests.RevokeToken():
                return self._revoke_token(request, caller)
        return self._service.answer(request, caller.teams)

    def _once(self, key: str, request: Request, permitted: Request, caller: Caller) -> Any:
        """Carry a request out once under its key. The store has keys of its own, so what it was asked is done once even
        where this process dies meanwhile."""
        if isinstance(permitted, StoreRequest) and not permitted.op_key:
            own = hashlib.sha256(f"{caller.name}\n{key}".encode()).hexdigest()[:16]
            permitted = permitted.model_copy(update={"op_key": f"{permitted.operation}:{own}"})
        if not route_of(request).takes_key:
            what = "an answer with a secret is not kept, so it could not be given a second time"
            raise InvalidInput(what, "Idempotency-Key", "ask without a key; `onebasis token list` shows what was made")
        asked = f"{route_of(request).name}\n{request.model_dump_json()}"
        digest = hashlib.sha256(asked.encode()).hexdigest()
        book = self._service.sources.kept_answers
        return book.once(caller.name, key, digest, lambda: self._carried_out(permitted, caller))

    # --- streams -----------------------------------------------------------------------------------------------

    def follow(self, request: requests.ReadEvents, caller: Caller) -> Interest:
        """Which events a stream for somebody is about. Raises what refuses it."""
        try:
            permitted = self._permitted(route_of(request), request, caller)
            assert isinstance(permitted, requests.ReadEvents)
            return self._service.tasks.interest(permitted, caller.teams)
        except OnebasisError as error:
            if caller.teams is None:
                raise
            raise shown_error(error, self._eyes(caller.teams, error.args, request)) from None

    def show(self, events: Sequence[NamedEvent], teams: frozenset[str] | None) -> list[Json]:
        """Events of these teams' tasks as their people see them; None: as those who see all."""
        told = [asdict(event) for event in events]
        if teams is None:
            return told
        eyes = self._eyes(teams, told, requests.ReadEvents())
        return [shown(event, eyes) for event in told]

    # --- may they ----------------------------------------------------------------------------------------------

    def _permitted(self, route: Route, request: Request, caller: Caller) -> Request:
        """The request as it is carried out. Raises what refuses it."""
        request, named = self._named(request, caller)
        teams = self._teams_of(route, request, caller, named)
        check_role(caller, route.name, route.role, route.about, teams)
        does = "retry" if getattr(request, "change", "") == "retry" else route.name
        check_main(caller, does, self._service.settings.main, teams, holds=bool(getattr(request, "hold", False)))
        actor = "actor" if "actor" in type(request).model_fields else "by"
        return request.model_copy(update={actor: caller.name}) if actor in type(request).model_fields else request

    def _named(self, request: Request, caller: Caller) -> tuple[Request, str]:
        """The request with the task that it names by id, as the caller sees it, so that no other one can be meant; and
        that task's team, empty where it names none, or where the caller sees all."""
        teams = caller.teams
        if teams is None:
            return request, ""
        match request:
            case requests.Submit() if refusal := after_another_team(caller, request.task.after):
                raise refusal
            case requests.Export() | requests.Predict():
                # Of several revisions of a name the version has one, so the name stays as it is.
                found = self._service.sources.queue.find(request.reference, teams)
                return request if "/" in request.reference else _of_task(request, found.task_id), found.team
        reference = getattr(request, "reference", None)
        if reference is None:
            return request, ""
        found = self._service.sources.queue.find(reference, teams)
        return _of_task(request, found.task_id), found.team

    def _teams_of(self, route: Route, request: Request, caller: Caller, named: str) -> Collection[str]:
        """The teams that a request is about, where that is to be known. named: Team of the task that it names."""
        reference = getattr(request, "reference", None)
        if route.about is About.TASK or (route.about in (About.TEAM, About.OWN_TEAMS) and reference is not None):
            # Whoever sees all teams may name what the database lost; nobody else comes here with it.
            return (EVERY_TEAM,) if caller.teams is None else (named,)
        if route.about is About.MERGED:
            return self._teams_of_merged(request, caller)
        if route.about in (About.TEAM, About.OWN_TEAMS):
            task = getattr(request, "task", None)
            team = task.team if task is not None else getattr(request, "team", None)
            if team is None:
                return (EVERY_TEAM,) if route.about is About.TEAM else ()
            if caller.role_in(team) is None:
                raise no_such_team(caller, team)
            return (team,)
        return ()

    def _teams_of_merged(self, request: Request, caller: Caller) -> Collection[str]:
        """Teams of the tasks in versions that a request names. Raises NotFound for those that the caller does not
        see."""
        if caller.teams is None:
            return (EVERY_TEAM,)
        named = getattr(request, "task_ids", None) or (getattr(request, "task_id", ""),)
        teams = self._teams_of_ids(named)
        for task_id in named:
            if teams.get(task_id) not in caller.teams:
                raise NotFound("there is no such task", repr(task_id), "`onebasis tasks` lists ids and names")
        return sorted({teams[task_id] for task_id in named})

    def _teams_of_ids(self, task_ids: Collection[str]) -> dict[str, str]:
        """Id to team, of those tasks that the database or the store knows."""
        found = self._service.sources.queue.teams_of(task_ids)
        if missing := set(task_ids) - found.keys():
            titles = self._service.titles()
            found |= {task_id: titles[task_id].partition("/")[0] for task_id in missing & titles.keys()}
        return found

    # --- what they see -----------------------------------------------------------------------------------------

    def _eyes(self, teams: frozenset[str], answer: Any, request: Request) -> Eyes:
        service = self._service
        known = {*service.settings.teams}
        of_ids: dict[str, str] = {}
        with contextlib.suppress(OnebasisError):  # then no id is shown
            known |= service.sources.queue.teams()
            if ids := task_ids_in(answer):
                of_ids = self._teams_of_ids(ids)
        others = frozenset({*known, *of_ids.values()} - teams)
        return Eyes(
            teams, others, lambda task_id: of_ids.get(task_id) in teams, names_in(request.model_dump(mode="json"))
        )

    # --- the audit log -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _audited(self, route: Route, request: Request, caller: Caller) -> Iterator[None]:
        """A context to carry a request out in: what writes has a row before it, and one with its outcome."""
        if not route.is_audited or getattr(request, "dry_run", False):
            yield
            return
        from orchestrator.tasks.audit_log import DONE

        audit = self._service.sources.audit
        busy = log_lines.now()
        ids = {"request_id": busy.request_id, "traceparent": busy.traceparent}
        about = told(request) | {name: value for name, value in ids.items() if value}
        asked = audit.asked(caller.name, caller.token_id, route.name, about)
        outcome = "error"
        try:
            yield
            outcome = DONE
        except OnebasisError as error:
            outcome = error.row
            raise
        finally:
            with contextlib.suppress(OnebasisError):  # the first row stands, and nobody has to ask twice for this one
                audit.ended(asked, outcome)

    # --- tokens ------------------------------------------------------------------------------------------------

    def _list_tokens(self, caller: Caller) -> list[Json]:
        found = self._service.sources.tokens.all()
        return [asdict(one) for one in found if one.token_id == caller.token_id or caller.may(Role.ADMIN, one.team)]

    def _create_token(self, request: requests.CreateToken, caller: Caller) -> Json:
        from orchestrator.tasks.token_book import TokenRecord

        team, now = request.team or EVERY_TEAM, time.time()
        if team not in (EVERY_TEAM, *self._service.settings.teams):
            raise no_such_team(caller, team, self._service.settings.teams)
        check_given(caller, Role(request.role), team)
        wanted = TokenRecord(
            token_id="",
            name=request.name,
            kind=request.kind,
            team=team,
            role=request.role,
            created_at=now,
            created_by=caller.name,
            expires_at=None if request.days is None else now + request.days * SECONDS_A_DAY,
        )
        made, secret = self._service.sources.tokens.create(wanted)
        return {**asdict(made), "token": secret}

    def _rotate_token(self, request: requests.RotateToken, caller: Caller) -> Json:
        self._check_token(request.token_id, caller)
        made, secret = self._service.sources.tokens.rotate(request.token_id, caller.name, request.grace_seconds)
        return {**asdict(made), "token": secret, "replaces": request.token_id}

    def _revoke_token(self, request: requests.RevokeToken, caller: Caller) -> Json:
        self._check_token(request.token_id, caller)
        return asdict(self._service.sources.tokens.revoke(request.token_id))

    def _check_token(self, token_id: str, caller: Caller) -> None:
        """Raise NotFound for a token that is neither the caller's own nor one of a team in which it is an admin."""
        from orchestrator.tasks.token_book import no_such_token

        if token_id != caller.token_id and not caller.may(Role.ADMIN, self._service.sources.tokens.get(token_id).team):
            raise no_such_token(token_id)


def _who(caller: Caller) -> Json:
    roles = {team or EVERY_TEAM_TOLD: str(role) for team, role in caller.roles.items()}
    return {"name": caller.name, "token_id": caller.token_id, "roles": roles, "expires_at": caller.expires_at}


def _of_task(request: Request, task_id: str) -> Request:
    return request.model_copy(update={"reference": task_id})


def told(request: Request) -> dict[str, Any]:
    """A request as the audit log keeps it: of documents, which may be long and name places, the digest."""
    fields = request.model_dump(mode="json", exclude={"by", "actor", "task", "settings"}, exclude_none=True)
    for name in ("task", "settings"):
        document = getattr(request, name, None)
        if document is not None:
            fields[f"{name}_sha256"] = hashlib.sha256(document.model_dump_json().encode()).hexdigest()
    if isinstance(request, requests.KeepUpload):
        sizes = [file.bytes for file in request.files.values()]
        fields["files"] = {"upload_id": upload_id(request.files), "count": len(sizes), "bytes": sum(sizes)}
    if isinstance(request, requests.Submit):
        fields["title"] = f"{request.task.team}/{request.task.name}"
    return fields
