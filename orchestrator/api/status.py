"""What people ask about the service itself: whether it is up, what its workers do, what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from configs.document import without_password
from configs.errors import DatabaseAway, OnebasisError, Unavailable
from orchestrator.alarms import AlarmCode
from orchestrator.api import latest, views
from orchestrator.api.deadlines import Deadlines
from orchestrator.api.latest import LOOKING, Latest
from orchestrator.api.requests import Json
from orchestrator.api.served import Served
from orchestrator.api.sources import Sources
from orchestrator.api.versions import Versions
from orchestrator.api.views import pause_json
from orchestrator.scheduling.reasons import WaitCode
from orchestrator.tasks.task_record import SERVICE, TaskState
from subspace_store.log.version import CANDIDATE, MAIN, SubspaceState


class ServiceStatus:
    """One service as its users see it.

    Args:
        versions: Base model to the versions of its subspace.
        health: What the process knows of itself.
        deadlines: Those that cannot be met.
        served: What answers over HTTP.
    """

    def __init__(
        self,
        sources: Sources,
        versions: Mapping[str, Versions],
        health: Callable[[], Json],
        deadlines: Deadlines,
        served: Served,
    ) -> None:
        self._served = served
        self._sources = sources
        self._versions = versions
        self._health = health
        self._deadlines = deadlines
        self._counted = Latest(
            lambda: (sources.queue.counts(), self._waiting(), sources.queue.unreadable()), "the task database"
        )

    def follow(self, versions: Mapping[str, Versions]) -> None:
        """Answer for these base models from now on."""
        self._versions = versions

    def status(self) -> Json:
        """Whether the service is up, what its workers do, how many tasks are in which state, what is wrong.

        Answered within seconds: if the store or the database is late, an alarm rings and its last answer, or None,
        counts.
        """
        states, (counted, waiting) = self._states_soon(), self._counts_soon()
        with ThreadPoolExecutor(len(self._versions)) as threads:  # each may wait for its store
            of_each = list(threads.map(lambda name: self._of_one(name, states[name], counted), self._versions))
        facts = of_each[0] if len(of_each) == 1 else _of_several(of_each)
        return {
            "mlflow": without_password(self._sources.settings.mlflow.tracking_uri),
            **facts,
            "tasks": counted,
            **waiting,
            "late": [told.as_dict() for told in self._deadlines.late],
            "left_running": self._left_running(),
            **({} if self._sources.is_up else self._led_elsewhere()),
            **self.health(),
            "serving": self._served.now(),
            "base_models": of_each,
        }

    def _of_one(self, name: str, state: SubspaceState | None, counted: Mapping[str, int] | None) -> Json:
        """What there is to tell of one base model's subspace.

        Args:
            state: What its log says; None: not known.
            counted: State to number of tasks, of all base models; None: not known.
        """
        versions = self._versions[name]
        are_published = bool(counted and counted.get(TaskState.PUBLISHED))
        return {
            "base_model": name,
            "storage": versions.storage.url,
            "main": state.refs[MAIN] if state else None,
            "candidate": state.refs[CANDIDATE] if state else None,
            "held": asdict(state.held) if state and state.held else None,
            "gone_from_main": versions.count_gone(state) if state and are_published else 0,
            "not_in_database": versions.count_unknown(state) if state and counted is not None else 0,
            "footprint": versions.footprint_soon() if state else None,
            "in_doubt": versions.requests_in_doubt(state),
        }

    def _states_soon(self) -> dict[str, SubspaceState | None]:
        """Base model to what its log says, as `Versions.state_soon`: all are asked at once."""
        if len(self._versions) == 1:
            return {name: versions.state_soon() for name, versions in self._versions.items()}
        with ThreadPoolExecutor(len(self._versions)) as threads:
            return dict(zip(self._versions, threads.map(Versions.state_soon, self._versions.values()), strict=True))

    def health(self) -> Json:
        """Whether the service runs, which alarms ring, what the workers do, who held `main` when the log was last read:
        what this process knows by itself."""
        alarms = [alarm.as_dict() for alarm in self._sources.alarms]
        of_each = [{"base_model": name, **_held(versions)} for name, versions in self._versions.items()]
        facts = of_each[0] if len(of_each) == 1 else {"base_model": None}
        return {
            **facts,
            "base_models": of_each,
            "running": self._sources.is_up,
            **self._pools(),
            **self._health(),
            "alarms": alarms,
        }

    def _pools(self) -> Json:
        """The pools with their workers, and what people have drained; nothing where no service runs."""
        controller = self._sources.controller
        if controller is None:
            return {}
        pools = {name: views.pool(found) for name, found in controller.describe_pools().items()}
        return {"pools": pools, "drains": [drain.model_dump(mode="json") for drain in controller.drains]}

    def settings(self) -> Json:
        """The settings that count now, without passwords."""
        found = self._sources.settings.model_dump(mode="json")
        found["database_url"] = without_password(found["database_url"])
        found["mlflow"]["tracking_uri"] = without_password(found["mlflow"]["tracking_uri"])
        _hide_paths(found)
        return found

    def look(self) -> None:
        """Look at the stores and the database as `status` does, and ring if one is away: nobody else would notice while
        there is nothing to do. Takes 2 · latest.LOOK_SECONDS at most."""
        try:
            self._states_soon()
            self._counts_soon()
        except OnebasisError as error:
            self._sources.alarms.ring_for(error, LOOKING)
        if self._sources.controller is not None:
            with contextlib.suppress(OnebasisError):  # told by what was read before
                self._deadlines.look()
        for versions in list(self._versions.values()):
            versions.try_to_write()

    def _led_elsewhere(self) -> Json:
        """Which other control planes run of this service, whose own here does not."""
        url = self._sources.settings.database_url
        if not url.startswith("postgresql"):
            return {}
        from orchestrator.leadership import leadership_json
        from orchestrator.tasks.leader_lease import LeaderLease

        with contextlib.suppress(OnebasisError), contextlib.closing(LeaderLease(url)) as lease:
            found = leadership_json(lease.look(), "")
            if found["leader"] is not None:
                return {"leadership": found}
        return {}

    def _left_running(self) -> list[str]:
        """Title and process id of whatever still runs of a local service without a control plane that answers."""
        if self._sources.is_up or self._sources.settings.ray.address != "local":
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
        controller = self._sources.controller
        for team, pool, blocked, count in self._sources.queue.queued():
            decided = controller.decision.behind.get((pool, team)) if controller is not None else None
            line = decided.code if decided is not None else WaitCode.NO_FREE_PLACE
            line = line if pool in self._sources.settings.pools else WaitCode.NEVER_FITS
            code = WaitCode.PAUSED if {team, SERVICE} & pauses.keys() else blocked or line
            counts = found.setdefault(team, {})
            counts[str(code)] = counts.get(str(code), 0) + count
        paused = {team: pause_json(pause) for team, pause in pauses.items() if team}
        known = self._sources.settings.base_names
        alive = self._sources.queue.alive_of_base_models()
        return {
            "waiting": found,
            "left_base_models": {name: count for name, count in alive.items() if name not in known},
            "paused": {"service": pause_json(pauses.get(SERVICE)), "teams": paused},
        }


def _held(versions: Versions) -> Json:
    state = versions.last_read  # `look` reads it every few seconds
    return {"held": asdict(state.held) if state.held else None} if state else {}


def _of_several(of_each: Sequence[Json]) -> Json:
    """The facts that stand for the whole service: sums. What belongs to one base model is not known of several."""
    single = ("base_model", "storage", "main", "candidate", "held", "footprint")
    return {
        **dict.fromkeys(single),
        "gone_from_main": sum(one["gone_from_main"] for one in of_each),
        "not_in_database": sum(one["not_in_database"] for one in of_each),
        "in_doubt": [doubt for one in of_each for doubt in one["in_doubt"]],
    }


def _hide_paths(value: Json) -> None:
    """Leave of the URLs of webhooks the host: what is behind it is often a secret."""
    hooks = [hook for its in (value, *value["teams"].values()) for hook in its["webhooks"].values()]
    asked = (value["gate"]["pre_publish"] or {}).get("http")
    for hook in (*hooks, *([asked] if asked else [])):
        place = urlsplit(hook["url"])
        hook["url"] = f"{place.scheme}://{place.netloc}" + ("/***" if place.path.strip("/") or place.query else "")
