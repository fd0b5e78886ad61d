"""What is known of the one unjudged version, in memory alone: after a restart it is asked for again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.settings import FailureSettings
from orchestrator.tasks.task_record import TaskRecord
from subspace_store import StagedAdapter
from subspace_store.log.version import TaskScore


@dataclass(frozen=True)
class ScoringFailure:
    """Why a task has no score."""

    task_id: str
    text: str


@dataclass
class VerdictInProgress:
    """What the workers reported on the one unjudged version so far."""

    version: int = 0
    """Number of the version; 0: between two versions."""
    plain: bool = False
    """Whether the next version is judged as merged, since the one before failed because of a task refined again."""
    again: tuple[TaskRecord, ...] = ()
    """Older tasks that its merge moved, to be refined first (`share_full`)."""
    refined: dict[str, StagedAdapter] = field(default_factory=dict)
    """Task id to the adapter, of those in `again`."""
    unrefined: set[str] = field(default_factory=set)
    """Ids of those in `again` that stay as the merge left them."""
    read_at: int = -1
    """Sequence number of the log at which the two below were worked out: with a thousand tasks that takes a third of a
    second, and every score that comes in is a step."""
    records: Mapping[str, TaskRecord] = field(default_factory=dict)
    """Task id to record, of all that the version holds."""
    due: tuple[str, ...] = ()
    """Ids of the tasks to be scored."""
    scores: dict[str, TaskScore] = field(default_factory=dict)
    failures: list[ScoringFailure] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """Task id to the number of orders to score it, or to refine it again, that ended with their machine, or by a fault
    of ours."""
    died: Counter[str] = field(default_factory=Counter)
    """The same of those that ended with their process while its machine went on."""
    lost_as: str = ""
    """How the last of them ended."""
    apart: set[str] = field(default_factory=set)
    """Ids of the tasks that are scored alone, since an order to score them came to nothing."""
    tries: int = 0
    """Number of orders without a result: the next one needs another token, since a worker remembers its answers."""

    def begin(self, version: int = 0, *, plain: bool = False, again: tuple[TaskRecord, ...] = ()) -> None:
        """Forget what is known of the version before."""
        vars(self).update(vars(VerdictInProgress(version, plain, again)))

    def count(self, task_id: str, fault: str) -> None:
        """Count an order for the version that ended without a result. The budgets are as large as those of a task's
        training, and apart from them: what a task used up while it trained says nothing of its scoring."""
        (self.died if fault == "died" else self.lost)[task_id] += 1

    def gives_up(self, task_id: str, settings: FailureSettings, did: str) -> str:
        """Why a task's orders for the version are not given again: more of them ended so than a budget pays for; empty
        while they are.

        Args:
            did: What the workers did, for people.
        """
        if (deaths := self.died[task_id]) > settings.worker_deaths_max:
            return f"{deaths} workers died while they {did} it"
        if (lost := self.lost[task_id]) > settings.lost_machines_max:
            return f"{lost} workers were lost while they {did} it"
        return ""
