"""What answers over HTTP now, and which revision of a task it is: as the replicas themselves say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from configs.errors import OnebasisError
from orchestrator.api import latest
from orchestrator.api.latest import Latest
from orchestrator.api.requests import Json
from orchestrator.api.sources import Sources
from orchestrator.tasks.task_record import TaskRecord
from subspace_store.log.version import SubspaceState

if TYPE_CHECKING:
    from orchestrator.serving.deployment import Deployment


class Served:
    """What the replicas say, soon.

    Args:
        deployment: What answers over HTTP; None where no service runs.
    """

    def __init__(self, sources: Sources, deployment: Deployment | None) -> None:
        self._sources = sources
        self._facts = None if deployment is None else Latest(lambda: deployment.facts(sources.settings), "Ray Serve")

    def now(self) -> Json:
        """What answers over HTTP; only where it should be, while Ray Serve is late or away."""
        serving = self._sources.settings.serving
        if self._facts is None or serving is None:
            return {}
        try:
            return self._facts.within(latest.LOOK_SECONDS)
        except Exception as error:  # Ray may raise anything: it is told, and `status` answers
            told = error.what if isinstance(error, OnebasisError) else f"{type(error).__name__}: {error}"
            return {"url": serving.url, "state": "unknown", "message": told, "base_models": {}}

    def canary(self, base_model: str, of_teams: Collection[str] | None = None) -> Json | None:
        """How another version answered its share of the requests, beside `main`'s; None where none does.

        Args:
            of_teams: Teams whose tasks are told; None: all.
        """
        serving = self._sources.settings.serving
        if serving is None or serving.canary is None:
            return None
        found: Json | None = self.now().get("canary", {}).get(base_model)
        if found is None or of_teams is None:
            return found
        tasks = {title: one for title, one in found["tasks"].items() if title.partition("/")[0] in of_teams}
        return {**found, "tasks": tasks}

    def of(self, record: TaskRecord, log: Callable[[], SubspaceState | None]) -> Json | None:
        """What callers get who ask for a task by its name; None where nothing answers over HTTP.

        Args:
            log: What the log of the task's base model says, asked only where something answers; None: not known.
        """
        if not (found := self.now()):
            return None
        state, replicas = log(), found["base_models"].get(record.base_model, [])
        ids = {said["version"]: _held_id(state, record.title, said["version"]) for said in replicas}
        numbers = {
            one.task_id: one.number for one in self._sources.queue.among({i for i in ids.values() if i}).values()
        }
        return {
            "url": found["url"],
            "state": found["state"],
            "message": found.get("message", ""),
            "canary": _of_task(self.canary(record.base_model), record.title),
            "replicas": [
                {
                    "pid": said["pid"],
                    "version": said["version"],
                    "task_id": (task_id := ids[said["version"]]),
                    "revision": numbers.get(task_id) if task_id else None,
                    "trouble": said["trouble"],
                }
                for said in replicas
            ],
        }


def _of_task(canary: Json | None, title: str) -> Json | None:
    if canary is None:
        return None
    counted = canary["tasks"].get(title, {"requests": 0, "rows": 0, "agreed": 0})
    return {"version": canary["version"], "main_version": canary["main_version"], **counted}


def _held_id(state: SubspaceState | None, title: str, version: int) -> str | None:
    """Id of the revision of a task that a version holds."""
    if state is None or version not in state.versions:
        return None
    return next((task_id for task_id, held in state.tasks_at(version).items() if held.name == title), None)
