"""One service as its users see it: takes a request of any kind, and has it answered where it belongs.

What is asked about tasks is in tasks.py, about versions in versions.py, about the service itself in status.py; each
method is handed a request and returns plain JSON values. The HTTP server calls `answer`; when the service is down, the
command line does, in its own process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from configs.document import Request
from configs.errors import Corrupt, NotLeading, UnreadableTask
from configs.settings import Settings
from orchestrator.alarms import Alarms
from orchestrator.api import requests
from orchestrator.api.answers import Answers
from orchestrator.api.requests import Json, ServiceRequest
from orchestrator.api.routes import route_of
from orchestrator.api.served import Served
from orchestrator.api.sources import Sources
from orchestrator.api.status import ServiceStatus
from orchestrator.api.tasks import Check, Tasks
from orchestrator.api.versions import Versions
from orchestrator.api.webhook_answers import WebhookAnswers
from orchestrator.general_text import general_text
from orchestrator.reload import refuse_lost_teams, taken_without_restart
from orchestrator.tasks.uploads import Uploads
from subspace_store.commands.state_folder import keep_settings, service_identity
from subspace_store.log.store_format import check_place
from subspace_store.requests import RestoreRevision, Rollback, StoreRequest
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster
    from orchestrator.controller import Controller
    from orchestrator.leadership import StandsBy
    from orchestrator.serving.deployment import Deployment
    from orchestrator.tasks.task_queue import TaskQueue


GROW_SECONDS = 60.0
"""Longest wait for the loop to take new settings: it starts actors for them, and may have a write of its own to do."""


class Service:
    """See the module.

    Args:
        queue, controller, cluster: As for `Sources`.
        storages: Base model to where its store lies.
        health: What the process knows of itself.
        check: As for `Tasks`.
        stands_by: Of a control plane that stands by: who leads, now.
        agree: Called with new settings before they are taken. Raises where other control planes have the old ones.
        deployment: What answers over HTTP; None where no service runs.
    """

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue | None,
        storages: Mapping[str, Storage],
        controller: Controller | None = None,
        cluster: Cluster | None = None,
        health: Callable[[], Json] = dict,
        check: Check | None = None,
        alarms: Alarms | None = None,
        stands_by: Callable[[], StandsBy] | None = None,
        agree: Callable[[Settings], None] = lambda settings: None,
        deployment: Deployment | None = None,
    ) -> None:
        self._controller, self._stands_by, self._agree = controller, stands_by, agree
        self._deployment = deployment
        self._sources = Sources(settings, queue, controller, cluster, alarms, stands_by)
        self._reloading = Lock()
        self._of_each = {name: Versions(self._sources, name, storage) for name, storage in storages.items()}
        self._served = served = Served(self._sources, deployment)
        self.tasks = Tasks(self._sources, self._of_each, served, check)
        self.uploads = Uploads(lambda: self._sources.settings)
        self.answers = Answers(self._sources, self.versions)
        self.webhooks = WebhookAnswers(self._sources)
        self.status = ServiceStatus(self._sources, self._of_each, health, self.tasks.deadlines, served)

    @property
    def sources(self) -> Sources:
        """What its answers are made from."""
        return self._sources

    @property
    def settings(self) -> Settings:
        """Those that count now."""
        return self._sources.settings

    def versions(self, base_model: str | None = None) -> Versions:
        """The versions of a base model's subspace; None: of the only one. Of the others nothing large stays in memory.

        Raises:
            NotFound: There is no such base model.
            InvalidInput: There are several, and none is named.
        """
        name = self._sources.settings.base(base_model).name
        for other, versions in self._of_each.items():
            if other != name:
                versions.let_go()
        return self._of_each[name]

    def titles(self) -> dict[str, str]:
        """Id to name of all tasks that any version of any base model brought."""
        states = [versions.refresh() for versions in self._of_each.values()]
        return {task_id: name for state in states for task_id, name in state.names().items()}

    def look(self) -> None:
        """As `ServiceStatus.look`; now and then, delete uploads that nobody uses."""
        with contextlib.suppress(OSError):
            self.uploads.delete_unused()
        self.status.look()

    def answer(self, request: Request, of_teams: Collection[str] | None = None) -> Any:
        """Carry out a request of any kind, whoever asks: who may ask for what is for guard.py to say.

        Args:
            of_teams: Teams whose tasks there are for who asks; None: all.
        """
        try:
            return self._answer(request, of_teams)
        except Corrupt as error:
            subspaces = self._controller.subspaces if self._controller is not None else {}
            if (subspace := subspaces.get(self._about(request))) is not None and not isinstance(error, UnreadableTask):
                subspace.damaged(error)
            raise

    def _about(self, request: Request) -> str:
        """Name of the base model that a request is about; empty where that is not one."""
        named = getattr(request, "base_model", None)
        if named is None and isinstance(request, requests.ShowTask):
            return self._sources.queue.find(request.reference).base_model
        names = self._sources.settings.base_names
        return named or (names[0] if len(names) == 1 else "")

    def reload(self, request: requests.Reload) -> Json:
        """Go on with new settings, as far as they can change without a restart.

        Raises:
            Conflict: Something else is different; names it. Nothing is changed then.
        """
        from subspace_store.log.version_log import other_owner, owned_by_another
        from subspace_store.storage.opening import open_storage
        from subspace_store.subspace_reader import SubspaceReader

        with self._reloading:
            controller, before = self._sources.running("reload"), self._sources.settings
            after = request.settings
            taken = taken_without_restart(before, after, os.cpu_count() or 1)
            if not before.teams.keys() <= after.teams.keys():
                refuse_lost_teams(before, after, self._sources.queue.alive_of_teams())
            new = [base for base in after.bases if base.name not in before.base_names]
            storages = {base.name: open_storage(after.storage, base.name) for base in new}
            us = service_identity(Path(after.state_dir))
            for base in new:
                general_text(base)
                place = storages[base.name]
                check_place(place, base.name, base.weights_sha256)
                if (owner := other_owner(place, us)) is not None:
                    raise owned_by_another(owner, place.url, us)
            stores = {name: SubspaceReader.open(place, settings=after.subspace) for name, place in storages.items()}
            if self._deployment is not None and _url_of(after) != _url_of(before):
                self._deployment.check(after)  # before anything is kept: an address that is taken is refused
            if taken:
                self._agree(after)
                keep_settings(after, Path(after.state_dir))
                # First what answers, then the loop: a task of a new base model is taken in when its workers are warm.
                further = {name: Versions(self._sources, name, place) for name, place in storages.items()}
                self._of_each = self._of_each | further
                self._sources.settings = after
                self.tasks.follow(self._of_each)
                self.status.follow(self._of_each)
                controller.grow(after, stores, GROW_SECONDS)
            if self._deployment is not None and (after.serving or before.serving):
                self._deployment.follow(after)
        return {"taken": taken, "base_models": list(after.base_names), "serving": _url_of(after)}

    def refuse_write(self) -> None:
        """Raise NotLeading where this control plane stands by."""
        if self._stands_by is not None:
            raise self._stands_by().refusal

    def _answer(self, request: Request, of_teams: Collection[str] | None) -> Any:
        if self._stands_by is not None and isinstance(request, requests.Submit) and request.dry_run:
            refusal = self._stands_by().refusal
            what = "a dry run is checked against the base model as the workers have loaded it, which the leader knows"
            raise NotLeading(f"{refusal.what}; {what}", refusal.where, refusal.todo)
        if route_of(request).is_write:
            self.refuse_write()
        match request:
            case requests.ListTasks():
                return self.tasks.page(request, of_teams)
            case requests.ReadEvents():
                return self.tasks.events(request, of_teams)
            case requests.ListWebhooks():
                return self.webhooks.all(request, of_teams)
            case requests.ShowHistory():
                return self.versions(request.base_model).history(request, of_teams)
            case requests.Which():
                self.refuse_write()  # as for Predict
                return self.answers.which(request, of_teams)
            case requests.ShowVersion():
                return self.versions(request.base_model).one(request, of_teams)
            case requests.ShowScores():
                found = self.versions(request.base_model).scores(request, of_teams)
                return {**found, "canary": self._served.canary(found["base_model"], of_teams)}
            case requests.ShowMatrix():
                return self.versions(request.base_model).matrix(request, of_teams)
            case Rollback():
                return self.versions(request.base_model).rollback(request)
            case RestoreRevision():
                return self.versions(request.base_model).restore_revision(request)
            case StoreRequest():
                return self.versions(request.base_model).change(request)
            case ServiceRequest():
                return request.on(self)
        raise TypeError(f"{type(request).__name__} is no request to a service")


def _url_of(settings: Settings) -> str | None:
    """Where what answers over HTTP is to listen; None: nothing is to."""
    return settings.serving.url if settings.serving is not None else None
