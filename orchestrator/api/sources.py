"""What the answers of one service are made from: its settings, its database, and what runs of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from configs.settings import Settings
from orchestrator.alarms import AlarmCode, Alarms
from orchestrator.api.requests import not_running

if TYPE_CHECKING:
    from orchestrator.cluster import Cluster
    from orchestrator.controller import Controller
    from orchestrator.leadership import StandsBy
    from orchestrator.tasks.answer_book import AnswerBook
    from orchestrator.tasks.audit_log import AuditLog
    from orchestrator.tasks.outbox import Outbox
    from orchestrator.tasks.task_queue import TaskQueue
    from orchestrator.tasks.token_book import TokenBook


class Sources:
    """See the module.

    Args:
        queue: Task queue; None where it is not shared: then the first request about tasks opens it, since importing the
            SQL library takes as long as all the rest of a command.
        controller, cluster: None when the service is down; then what needs a worker is refused with the next step.
        stands_by: Of a control plane that stands by: who leads, now.
    """

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue | None = None,
        controller: Controller | None = None,
        cluster: Cluster | None = None,
        alarms: Alarms | None = None,
        stands_by: Callable[[], StandsBy] | None = None,
    ) -> None:
        self.settings = settings
        """Those that count now: `onebasis reload` replaces them."""
        self.controller = controller
        self.cluster = cluster
        self.alarms = alarms or (controller.alarms if controller is not None else Alarms())
        self.send_soon: Callable[[], None] = lambda: None
        """Has what is new for webhooks sent at once."""
        self._given_queue = queue
        self._stands_by = stands_by

    @cached_property
    def queue(self) -> TaskQueue:
        """The task database."""
        from orchestrator.tasks.task_queue import TaskQueue

        return self._given_queue or TaskQueue(self.settings.database_url, self.settings.failures)

    @cached_property
    def tokens(self) -> TokenBook:
        """The tokens of people and service accounts."""
        from orchestrator.tasks.token_book import TokenBook

        return TokenBook(self.queue.database)

    @cached_property
    def audit(self) -> AuditLog:
        """What was asked, by whom."""
        from orchestrator.tasks.audit_log import AuditLog

        return AuditLog(self.queue.database)

    @cached_property
    def kept_answers(self) -> AnswerBook:
        """What was answered to requests that had a key."""
        from orchestrator.tasks.answer_book import AnswerBook

        return AnswerBook(self.queue.database)

    @cached_property
    def outbox(self) -> Outbox:
        """What webhooks are told of."""
        from orchestrator.tasks.outbox import Outbox

        return Outbox(self.queue.database)

    @property
    def is_up(self) -> bool:
        """Whether the service runs, this control plane or another one leading it."""
        return self.controller is not None or self._stands_by is not None

    @property
    def leader(self) -> str:
        """Name of the control plane that leads, where this one stands by."""
        return self._stands_by().leader if self._stands_by is not None else ""

    def running(self, what: str, base_model: str | None = None) -> Controller:
        """The loop of the running service.

        Args:
            what: What needs it.
            base_model: Base model that it is about.

        Raises:
            Unavailable: No service runs.
            OwnedByAnother: The base model's store belongs to another service by now.
        """
        if self.controller is None:
            raise not_running(what)
        subspace = self.controller.subspaces.get(base_model or "")
        if subspace is not None and subspace.ousted_by is not None:
            raise subspace.ousted_by
        return self.controller

    def wake(self) -> None:
        """Have the loop look at the records again, if it runs."""
        if self.controller is not None:
            self.controller.wake()

    def ringing(self, base_model: str) -> dict[AlarmCode, str]:
        """The alarms that ring and concern a base model, as people read them."""
        return {alarm.code: str(alarm) for alarm in self.alarms.of(base_model)}
