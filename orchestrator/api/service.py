"""One service as its users see it: takes a request of any kind, and has it answered where it belongs.

What is asked about tasks is in tasks.py, about versions in versions.py, about the service itself in status.py; each
method is handed a request and returns plain JSON values. The HTTP server calls `answer`; when the service is down, the
command line does, in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs.document import Request
from configs.errors import Corrupt, UnreadableTask
from configs.settings import Settings
from orchestrator.alarms import Alarms
from orchestrator.api.requests import Json, ServiceRequest
from orchestrator.api.sources import Sources
from orchestrator.api.status import ServiceStatus
from orchestrator.api.tasks import Check, Tasks
from orchestrator.api.versions import Versions
from subspace_store.requests import Rollback, StoreRequest
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster
    from orchestrator.controller import Controller
    from orchestrator.tasks.task_queue import TaskQueue


class Service:
    """See the module.

    Args:
        queue, controller, cluster: As for `Sources`.
        health: What the process knows of itself.
        check: As for `Tasks`.
    """

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue | None,
        storage: Storage,
        controller: Controller | None = None,
        cluster: Cluster | None = None,
        health: Callable[[], Json] = dict,
        check: Check | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        self._controller = controller
        sources = Sources(settings, queue, controller, cluster, alarms)
        self.versions = Versions(sources, storage)
        self.tasks = Tasks(sources, self.versions, check)
        self.status = ServiceStatus(sources, self.versions, health)

    def look(self) -> None:
        """As `ServiceStatus.look`."""
        self.status.look()

    def answer(self, request: Request) -> Any:
        """Carry out a request of any kind."""
        try:
            return self._answer(request)
        except Corrupt as error:
            if self._controller is not None and not isinstance(error, UnreadableTask):
                self._controller.damaged(error)
            raise

    def _answer(self, request: Request) -> Any:
        match request:
            case Rollback():
                return self.versions.rollback(request)
            case StoreRequest():
                return self.versions.change(request)
            case ServiceRequest():
                return request.on(self)
        raise TypeError(f"{type(request).__name__} is no request to a service")
