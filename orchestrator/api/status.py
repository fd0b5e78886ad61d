"""What people ask about the service itself: whether it is up, what its workers do, what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from configs.document import without_password
from configs.errors import DatabaseAway, OnebasisError, Unavailable
from orchestrator.alarms import AlarmCode
from orchestrator.api import latest
from orchestrator.api.latest import LOOKING, Latest
from orchestrator.api.requests import Json
from orchestrator.api.sources import Sources
from orchestrator.api.versions import Versions
from orchestrator.api.views import pause_json
from orchestrator.scheduling.reasons import WaitCode
from orchestrator.tasks.task_record import SERVICE, TaskState
from subspace_store.log.version import CANDIDATE, MAIN


class ServiceStatus:
    """One service as its users see it.

    Args:
        health: What the process knows of itself.
    """

    def __init__(self, sources: Sources, versions: Versions, health: Callable[[], Json]) -> None:
        self._sources = sources
        self._versions = versions
        self._health = health
        self._counted = Latest(
            lambda: (sources.queue.counts(), self._waiting(), sources.queue.unreadable()), "the task database"
        )

    def status(self) -> Json:
        """Whether the service is up, what its workers do, how many tasks are in which state, what is wrong.

        Answered within seconds: if the store or the database is late, an alarm rings and its last answer, or None,
        counts.
        """
        state, (counted, waiting) = self._versions.state_soon(), self._counts_soon()
        return {
            "storage": self._versions.storage.url,
            "mlflow": without_password(self._sources.settings.mlflow.tracking_uri),
            "main": state.refs[MAIN] if state else None,
            "candidate": state.refs[CANDIDATE] if state else None,
            "held": asdict(state.held) if state and state.held else None,
            "tasks": counted,
            **waiting,
            "gone_from_main": self._versions.count_gone(state)
            if state and counted and counted.get(TaskState.PUBLISHED)
            else 0,
            "not_in_database": self._versions.count_unknown(state) if state and counted is not None else 0,
            "footprint": self._versions.footprint_soon() if state else None,
            "in_doubt": self._versions.requests_in_doubt(state),
            "left_running": self._left_running(),
            **self.health(),
        }

    def health(self) -> Json:
        """Whether the service runs, which alarms ring, what the workers do, who held `main` when the log was last read:
        what this process knows by itself."""
        alarms = [alarm.as_dict() for alarm in self._sources.alarms]
        name = self._sources.settings.base_model.name
        state = self._versions.last_read  # `look` reads it every few seconds
        held = {"held": asdict(state.held) if state.held else None} if state else {}
        running = self._sources.controller is not None
        return {"base_model": name, "running": running, **held, **self._health(), "alarms": alarms}

    def look(self) -> None:
        """Look at the store and the database as `status` does, and ring if one is away: nobody else would notice while
        there is nothing to do. Takes 2 · latest.LOOK_SECONDS at most."""
        try:
            self._versions.state_soon()
            self._counts_soon()
        except OnebasisError as error:
            self._sources.alarms.ring_for(error, LOOKING)
        self._versions.try_to_write()

    def _left_running(self) -> list[str]:
        """Title and process id of whatever still runs of a local service without a control plane that answers."""
        if self._sources.controller is not None or self._sources.settings.ray.address != "local":
            return []
        from orchestrator.ray_head import ADDRESS_FILE, MODULE
        from orchestrator.signs_of_life import ray_processes, title_of
        from subspace_store.commands.state_folder import process_of, running_server

        state_dir = Path(self._sources.settings.state_dir).resolve()
        own = {"control plane": running_server(state_dir), "Ray head": process_of(state_dir / ADDRESS_FILE, MODULE)}
        found = {pid: name for name, pid in own.items() if pid is not None}
        found |= {process.pid: title_of(process) for process in ray_processes(state_dir)}
        return [f"{title} (pid {pid})" for pid, title in found.items()]

    def _counts_soon(self) -> tuple[dict[str, int] | None, Json]:
        """State to number of tasks, and why they wait; None and nothing where the database is late."""
        try:
            counts, waiting, unreadable = self._counted.within(latest.LOOK_SECONDS)
        except Unavailable as error:
            told = DatabaseAway(error.what, error.where, error.todo)
            self._sources.alarms.ring_for(told, LOOKING)
            return None, {}
        self._sources.alarms.end(AlarmCode.DATABASE_AWAY, LOOKING)
        for about in unreadable:
            self._sources.alarms.ring(AlarmCode.UNREADABLE_TASK, about.task_id, about.sentence, about.todo)
        for alarm in self._sources.alarms:
            if alarm.code is AlarmCode.UNREADABLE_TASK and alarm.about not in {told.task_id for told in unreadable}:
                self._sources.alarms.end(alarm.code, alarm.about)
        return counts, waiting

    def _waiting(self) -> Json:
        """Number of queued tasks by team and by the code of their reason; and what is paused."""
        pauses = self._sources.queue.pauses()
        found: dict[str, dict[str, int]] = {}
        for team, blocked, count in self._sources.queue.queued():
            decided = (
                self._sources.controller.decision.behind.get(team) if self._sources.controller is not None else None
            )
            line = decided.code if decided is not None else WaitCode.NO_FREE_PLACE
            code = WaitCode.PAUSED if {team, SERVICE} & pauses.keys() else blocked or line
            counts = found.setdefault(team, {})
            counts[str(code)] = counts.get(str(code), 0) + count
        paused = {team: pause_json(pause) for team, pause in pauses.items() if team}
        return {"waiting": found, "paused": {"service": pause_json(pauses.get(SERVICE)), "teams": paused}}
