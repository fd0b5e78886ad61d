"""What people ask about tasks: submitted, listed, shown, cancelled, retried, paused.

What needs torch is imported where it is used: a request that reads does not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING

from configs.errors import Conflict, InvalidInput, NotFound, OnebasisError, Unavailable
from configs.log_lines import busy_with
from configs.settings import Settings
from orchestrator.api import requests, views
from orchestrator.api.deadlines import Deadlines
from orchestrator.api.estimates import Estimates, KeptLine, Line, places_in
from orchestrator.api.feed import Interest
from orchestrator.api.lengths import Lengths, due_in, in_line, least_seconds, with_later
from orchestrator.api.requests import Json
from orchestrator.api.served import Served
from orchestrator.api.sources import Sources
from orchestrator.api.versions import Versions, hold_over
from orchestrator.api.views import pause_json
from orchestrator.api.why import Surroundings, wait_of, why
from orchestrator.reports.loss_plot import plot_file
from orchestrator.scheduling.estimate import DEPTH_MAX, Pace, duration, ends, kept_from_borrowing
from orchestrator.scheduling.fair_share import STEADY_WEEKS, Waiting
from orchestrator.scheduling.pools import described
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.tasks.task_events import CancelRequested, Paused, PreemptRequested, Resumed
from orchestrator.tasks.task_record import ENDED_WITHOUT_RESULT, LIVE, SERVICE, Drain, Pause, TaskRecord, TaskState
from subspace_store.log.version import MAIN, SubspaceState

if TYPE_CHECKING:
    from configs.task_spec import TaskSpec
    from orchestrator.tasks.admission import Draft
    from workers.orders import BaseLayout

log = logging.getLogger("onebasis.server")

Check = Callable[["TaskSpec", Settings, "BaseLayout"], "Draft"]
"""`check_submission`, in this or another process."""

CHANGES = {
    "cancel": (TaskState.QUEUED, TaskState.TRAINING, TaskState.MERGING),
    "retry": ENDED_WITHOUT_RESULT,
    "pause": (TaskState.QUEUED, TaskState.TRAINING),
    "resume": (TaskState.QUEUED, TaskState.TRAINING),
}
"""States of the tasks that a change of many is about, unless it names one."""


class Tasks:
    """The tasks of one service as its users see them.

    Args:
        versions: Base model to the versions of its subspace.
        served: What answers over HTTP.
        check: How a submission is checked; default: in the thread that asks, which nothing can end.
    """

    def __init__(
        self, sources: Sources, versions: Mapping[str, Versions], served: Served, check: Check | None = None
    ) -> None:
        self._sources = sources
        self._versions = versions
        self._served = served
        self._check = check
        self._estimates = Estimates(lambda: sources.queue)
        self._lengths = Lengths(sources)
        controller = sources.controller
        self._kept_line = KeptLine(controller.line if controller is not None else lambda: ((), ()))
        self.deadlines = Deadlines(lambda: sources.queue, self._line)
        """Those that cannot be met."""

    def follow(self, versions: Mapping[str, Versions]) -> None:
        """Answer for these base models from now on."""
        self._versions = versions

    def submit(self, request: requests.Submit) -> Json:
        """Take a task in, or with dry_run only check it. The same submission again is the same task."""
        controller = self._sources.running("submit")
        from orchestrator.tasks.admission import admit, base_model_of, check_submission, would_admit

        check, name = self._check or check_submission, base_model_of(request.task, self._sources.settings).name
        self._sources.running("submit", name)
        if (layout := controller.layout_of(name)) is None:
            workers = controller.describe_workers(name)
            causes = "; ".join(f"{worker}: {what}" for worker, what in sorted(workers.items()))
            broken = [error for worker, error in controller.load_errors.items() if worker in workers]
            todo = broken[0].todo if broken else ""
            what = f"no worker has loaded the base model {name} yet ({causes})"
            raise Unavailable(what, "submit", todo or "try again when one has; `onebasis workers` shows it")
        with contextlib.closing(check(request.task, self._sources.settings, layout)) as draft:
            if request.dry_run:
                record, is_new = would_admit(
                    draft, self._sources.settings, self._sources.queue, request.by, request.beside
                )
                return {
                    **(self._outlook(record) if is_new else {}),
                    "accepted": False,
                    "dry_run": True,
                    "is_new": is_new,
                    "title": f"{draft.spec.team}/{draft.spec.name}",
                    "train_rows": draft.train_count,
                    "eval_rows": draft.eval_count,
                    "warnings": list(draft.warnings),
                }
            record, is_new = admit(
                draft,
                self._sources.settings,
                self._sources.queue,
                self._versions[name].storage,
                request.by,
                controller.subspaces[name].unused_files.submission,
            )
        with busy_with(task_id=record.task_id):  # the line by which a request's id leads to its task
            log.info("%s is %s", record.exact_title, "taken in" if is_new else "there already")
        controller.wake()
        if record.spec.deadline:
            self.deadlines.add(record.task_id)
        line = self._line([record]) if record.spec.deadline else None  # else nobody is told when it starts
        return {"accepted": True, "is_new": is_new, "warnings": list(draft.warnings), **self._summary(record, line)}

    def _outlook(self, record: TaskRecord) -> Json:
        """What a task that is not there yet would meet: why it would not start at once, when it starts and ends, and
        what it costs, both from what the last tasks took."""
        controller = self._sources.running("submit")
        task = in_line(record, controller.ranks[record.pool])
        stands = not record.blocked
        line = self._line([record], task if stands else None)
        pauses = self._sources.queue.pauses()
        around = Surroundings(
            is_running=True,
            place=line.places.get(record.task_id),
            pace=line.length_of(record),
            start=line.starts.get(record.task_id),
            pauses=pauses,
            decided=controller.wait_of_another(task) if stands and record.task_id in line.places else None,
            idle_causes=controller.idle_causes(record.pool),
            pools=described(self._sources.settings.pools),
            titles={task_id: found.title for task_id, found in self._sources.queue.among(record.awaits).items()},
            alarms=self._sources.ringing(record.base_model),
        )
        wait = wait_of(record, around)
        start, length, ranks = around.start, around.pace, controller.ranks[record.pool]
        end = ends(start, length) if start and length else None
        gpus = self._sources.settings.pools[record.pool].gpus
        whole = pace.of(replace(task, seconds_max=None)) if (pace := line.paces.get(record.pool)) else None
        return {
            "pool": record.pool,
            "fits": wait is None or wait.code is not WaitCode.NEVER_FITS,
            "why": why(record, around),
            "wait": _wait_json(wait),
            "place": around.place,
            "start": views.interval(start),
            "end": views.interval(end),
            "length_seconds": None if length is None else length.seconds,
            "cost_place_seconds": None if length is None else ranks * length.seconds,
            "cost_gpu_seconds": None if length is None or not gpus else gpus * ranks * length.seconds,
            "runs_too_long": _runs_too_long(record, whole),
            "deadline": views.deadline(
                record,
                end,
                record.submitted_at,
                least=least_seconds(record, length, line.leads.get(record.task_id, 0.0)),
            ),
        }

    def page(self, request: requests.ListTasks, of_teams: Collection[str] | None = None) -> list[Json]:
        """The newest tasks, oldest first. of_teams: Teams whose tasks there are for who asks; None: all."""
        if request.live and request.state not in (None, *LIVE):
            raise InvalidInput(f"asks for live tasks that are {request.state}", "live", "leave one of the two out")
        states = (request.state,) if request.state else tuple(LIVE) if request.live else ()
        base_model = request.base_model
        records = self._sources.queue.page(
            states, request.team, request.cursor, request.limit, base_model=base_model, of_teams=of_teams
        )
        if not records:
            self._known_team(request.team)
            self._sources.settings.base(base_model) if base_model is not None else None
        is_any_queued = any(record.state is TaskState.QUEUED for record in records)
        line = self._line(records) if is_any_queued else Line()
        found = self._in_subspaces(records)
        reasons = self._waits(records)
        return [
            self._summary(record, line) | found[record.task_id] | {"wait": reasons.get(record.task_id)}
            for record in records
        ]

    def _in_subspaces(self, records: Sequence[TaskRecord]) -> dict[str, Json]:
        """Id of each task to what its subspace says: its score in `main`, whether it is gone, who holds `main`."""
        found = {}
        for name in {record.base_model for record in records}:
            mine, versions = [r for r in records if r.base_model == name], self._versions.get(name)
            scores, problem = versions.main_scores(mine) if versions is not None else ({}, "")
            gone = versions.gone_from_main(versions.state, mine) if versions is not None and not problem else set()
            waiting = versions.held_up(mine) if versions is not None else {}
            for record in mine:
                found[record.task_id] = {
                    "main_score": scores.get(record.task_id),
                    "main_score_problem": problem,
                    "gone_from_main": record.task_id in gone,
                    "held": waiting.get(record.task_id, ""),
                }
        return found

    def one(self, request: requests.ShowTask) -> Json:
        """One task by id, beginning of an id, or team/name: state, place, progress, result, events."""
        record = self._sources.queue.find(request.reference)
        is_queued = record.state is TaskState.QUEUED
        line = self._line([record]) if is_queued else Line()
        versions = self._versions.get(record.base_model)
        plot = plot_file(self._sources.settings.state_dir, record)
        result = versions.result(record) if versions is not None else None
        around = self._surroundings(record, line)
        return {
            **self._summary(record, line),
            "main_score": result["score_under_main"] if result else None,
            "gone_from_main": around.is_gone_from_main,
            "why": why(record, around),
            "wait": _wait_json(wait_of(record, around)),
            "result": result,
            "alarms": [a.as_dict() for a in self._sources.alarms.of(record.base_model)] if record.state in LIVE else [],
            "revisions": self._revisions(record),
            "served": self._served.of(record, versions.state_soon if versions is not None else lambda: None),
            "scores_of_rows": versions.scores_of_rows(record) if versions is not None else [],
            **views.task_details(record, self._sources.queue.events(record.task_id), plot),
            "warnings": views.warnings(record, result),
        }

    def teams(self) -> Json:
        """What each team may have, has now and had lately. A team's share is that of all places, while all teams want
        more than there is; its hours a week are those that its quota is compared with."""
        settings, (_, running) = self._sources.settings.teams, self._kept_line()
        weights = sum(team.weight for team in settings.values())
        now, queue = time.time(), self._sources.queue
        used, gpus = queue.use_of_teams(now), queue.gpu_use_of_teams(now)
        return {
            "teams": {
                name: {
                    "weight": team.weight,
                    "share": team.weight / weights,
                    "places_quota": team.places,
                    "place_hours_a_week_quota": team.place_hours_a_week,
                    "gpu_hours_a_week_quota": team.gpu_hours_a_week,
                    "places": sum(order.ranks for order in running if order.team == name),
                    "place_hours_a_week": used.get(name, 0.0) / STEADY_WEEKS / 3600,
                    "gpu_hours_a_week": gpus.get(name, 0.0) / STEADY_WEEKS / 3600,
                }
                for name, team in settings.items()
            }
        }

    def _revisions(self, record: TaskRecord) -> list[Json]:
        """All revisions of a task, oldest first; the task alone where it has one."""
        revisions = self._sources.queue.revisions(record)
        found = self._in_subspaces(revisions)
        return [views.revision(one, found[one.task_id]["main_score"]) for one in revisions]

    def cancel(self, request: requests.Cancel) -> Json:
        """Stop a task that is not part of a version yet."""
        controller = self._sources.running("cancel")
        record = self._sources.queue.find(request.reference)
        after = self._sources.queue.apply(record.task_id, CancelRequested(request.by, time.time()))
        versions = self._versions.get(after.base_model)
        if after.state is TaskState.CANCELLED and versions is not None:
            with contextlib.suppress(Unavailable):  # then the loop does it, which deletes all else as well
                versions.storage.delete(after.train_key)
            controller.subspaces[after.base_model].unused_files.due((after.task_id,))
        controller.wake()
        return self._summary(after)

    def preempt(self, request: requests.Preempt) -> Json:
        """Have a running task write a checkpoint and go back to the queue; it keeps its place and goes on from there.

        A task that waits already stays as it is: asked twice, it is preempted once.
        """
        controller = self._sources.running("preempt")
        record = self._sources.queue.find(request.reference)
        after = self._sources.queue.apply(record.task_id, PreemptRequested(request.by))
        controller.wake()
        return self._summary(after)

    def retry(self, request: requests.Retry) -> Json:
        """Submit a task again that ended without a result; one that is alive stays as it is."""
        return self._retry(self._sources.queue.find(request.reference), request.by)

    def _retry(self, record: TaskRecord, by: str) -> Json:
        if record.state in LIVE:
            return {"accepted": True, "is_new": False, "warnings": [], **self._summary(record)}
        if record.state is TaskState.PUBLISHED:
            todo = "submit it under another name to train it anew, or new rows with `onebasis submit --revise FILE`"
            raise Conflict("is published", record.title, todo)
        if record.state is TaskState.REPLACED:
            todo = f"`onebasis rollback-task {record.title} --to {record.number}` brings it back"
            raise Conflict("another revision took its place", record.exact_title, todo)
        spec = record.spec.model_copy(update={"client_key": None})  # which is the old task's for ever
        return self.submit(requests.Submit(task=spec, by=by))

    def pause(self, request: requests.Pause) -> Json:
        """Start a task no more, or nothing of a team or of the service. What a task did goes on from its checkpoint."""
        now = time.time()
        if request.reference is not None:
            self._refuse_two(request)
            record = self._sources.queue.find(request.reference)
            after = self._sources.queue.apply(record.task_id, Paused(by=request.by, message=request.reason, at=now))
            self._sources.wake()
            return {
                **self._summary(after),
                "is_new": record.paused is None,
                "paused": pause_json(after.paused),
            }
        team = self._known_team(request.team)
        asked = Pause(by=request.by, reason=request.reason, at=now)
        before = self._sources.queue.set_pause(team, asked)
        self._sources.wake()
        return {"team": request.team, "is_new": before is None, "paused": pause_json(before or asked)}

    def resume(self, request: requests.Resume) -> Json:
        """Take a pause back. Without one nothing changes."""
        if request.reference is not None:
            self._refuse_two(request)
            record = self._sources.queue.find(request.reference)
            after = self._sources.queue.apply(record.task_id, Resumed(request.by))
            self._sources.wake()
            return {**self._summary(after), "is_new": record.paused is not None, "paused": None}
        before = self._sources.queue.set_pause(self._known_team(request.team), None)
        self._sources.wake()
        return {"team": request.team, "is_new": before is not None, "paused": None}

    def drain(self, request: requests.DrainWorker) -> Json:
        """Give a worker, or all on a machine, nothing new from now on, or take that back. Kept in the database."""
        controller, what = self._sources.running("drain"), request.what
        known = controller.machines if request.is_node else tuple(sorted(controller.describe_workers()))
        about = {drain.what for drain in self._sources.queue.drains() if drain.is_node == request.is_node}
        if what not in known and what not in about:
            kind = "machine of that address" if request.is_node else "worker of that name"
            raise NotFound(f"there is no {kind}", what, f"there are: {', '.join(known) or 'none'}")
        if request.undo:
            before = self._sources.queue.set_drain(what, request.is_node, None)
            after = None
        else:
            after = Drain(
                what=what,
                is_node=request.is_node,
                by=request.by,
                reason=request.reason,
                at=time.time(),
                lets_end=request.let_end,
            )
            before = self._sources.queue.set_drain(what, request.is_node, after)
        controller.wake()
        workers = [one for one in controller.workers if what == one.name or what in (one.machines or ())]
        return {
            "what": what,
            "is_node": request.is_node,
            "is_new": (before is None) is not request.undo,
            "drain": after.model_dump(mode="json") if after else None,
            "workers": {one.name: str(one) for one in workers},
        }

    def change_many(self, request: requests.ChangeMany) -> Json:
        """The same for many tasks, the oldest first (`cancel`: the newest); of several of one name only the newest.
        What does not belong to a task's state is no error: it is told, and so is a task with nothing to do."""
        self._sources.running(request.change)
        if request.team is request.state is request.base_model is None:
            what = "names neither a team nor a state nor a base model"
            raise InvalidInput(what, request.change, "add --team, --state or --base-model, or several of them")
        self._known_team(request.team)
        self._sources.settings.base(request.base_model) if request.base_model is not None else None
        states = (request.state,) if request.state else CHANGES[request.change]
        found = self._sources.queue.tasks(states, request.team, request.base_model)
        newest = list({record.title: record for record in found}.values())
        done, unchanged, refused = [], [], []
        # A task ends before the one that it comes after, which would otherwise park it.
        for record in reversed(newest) if request.change == "cancel" else newest:
            if request.change == "retry":  # of that name another may be alive by now
                record = self._sources.queue.find(record.title)
            if why_not := _nothing_to_do(request.change, record):
                unchanged.append({"title": record.title, "why": why_not})
                continue
            try:
                done.append(self._change_one(request, record)["title"])
            except OnebasisError as error:
                told = {**error.as_dict(), "exit_code": int(error.exit_code), "text": str(error)}
                refused.append({"title": record.title, "error": told})
        return {"change": request.change, "done": done, "unchanged": unchanged, "refused": refused}

    def _change_one(self, request: requests.ChangeMany, record: TaskRecord) -> Json:
        asked, by = record.task_id, request.by
        match request.change:
            case "cancel":
                return self.cancel(requests.Cancel(reference=asked, by=by))
            case "retry":
                return self._retry(record, by)
            case "pause":
                return self.pause(requests.Pause(reference=asked, reason=request.reason, by=by))
            case "resume":
                return self.resume(requests.Resume(reference=asked, by=by))

    def _known_team(self, team: str | None) -> str:
        """The team as the pauses name it; the service where there is none. Raises InvalidInput for an unknown one."""
        if team is not None and team not in self._sources.settings.teams:
            known = ", ".join(sorted(self._sources.settings.teams))
            raise InvalidInput(f"there is no team '{team}'", "team", f"teams of this service: {known}")
        return SERVICE if team is None else team

    def _refuse_two(self, request: requests.Pause | requests.Resume) -> None:
        if request.team is not None:
            raise InvalidInput("names a task and a team", "team", "name one of them")

    def events(self, request: requests.ReadEvents, of_teams: Collection[str] | None = None) -> list[Json]:
        """A page of what happened. of_teams: Teams whose tasks there are for who asks; None: all."""
        queue, wanted = self._sources.queue, self.interest(request, of_teams)
        return [asdict(event) for event in queue.told(request.after or 0, request.limit, **vars(wanted))]

    def interest(self, request: requests.ReadEvents, of_teams: Collection[str] | None) -> Interest:
        """Which events a request is about. of_teams: As for `events`."""
        if request.team is not None:
            self._known_team(request.team)
            of_teams = {request.team} if of_teams is None or request.team in of_teams else ()
        return Interest(
            task_id=self._sources.queue.find(request.reference).task_id if request.reference is not None else None,
            of_teams=None if of_teams is None else frozenset(of_teams),
            kinds=frozenset(filter(None, request.kinds.split(","))),
        )

    def _summary(self, record: TaskRecord, line: Line | None = None) -> Json:
        progress = self._sources.queue.progress(record.task_id) if views.is_at_work(record) else {}
        return views.task_summary(record, line or Line(), progress, time.time())

    def _line(self, asked: Sequence[TaskRecord], extra: Waiting | None = None) -> Line:
        """The tasks that stand in line, with the estimates of some; an empty one where no service runs.

        Args:
            asked: Tasks, queued or not; those among them that something keeps from the line are estimated where it is
                known for how long.
            extra: A task that is not there yet, and is shown where it would stand.
        """
        controller = self._sources.controller
        if controller is None:
            return Line()
        tasks, running = self._kept_line() if extra is None else controller.line(extra)
        pauses, ranks = self._sources.queue.pauses(), controller.ranks
        waiting = [r for r in asked if r.state is TaskState.QUEUED and r.pool in ranks]
        blocked = [r for r in waiting if r.blocked and not {r.team, SERVICE} & pauses.keys()]
        known = cache(self._lengths.known)
        leads = self._lengths.comes_in(blocked, known)
        later = [in_line(record, ranks[record.pool]) for record in blocked if record.task_id in leads]
        pools = {record.pool for record in waiting}
        line = [task for pool in pools for task in [one for one in tasks if one.pool == pool][:DEPTH_MAX]]
        line = with_later(self._lengths.with_rows(line), later)
        now = time.time()
        kept = {record.task_id: seconds for record in blocked if (seconds := due_in(record, now))}
        expected = kept_from_borrowing(line, running, controller.shares, now) | leads
        found = self._estimates.tell(
            line,
            running,
            {pool: controller.seconds_until_free(pool) for pool in pools},
            {pool: known(pool).pace for pool in pools},
            [record.task_id for record in waiting],
            remembered=extra is None,
            kept=kept,
            expected=expected,
        )
        return replace(found, places=places_in(tasks), leads=leads)

    def _waits(self, records: Sequence[TaskRecord]) -> dict[str, Json | None]:
        """Id of each of these tasks that is queued to the record of why it waits."""
        queued = [record for record in records if record.state is TaskState.QUEUED]
        if not queued:
            return {}
        pauses = self._sources.queue.pauses()
        alarms = {name: self._sources.ringing(name) for name in {record.base_model for record in queued}}
        found = {}
        for record in queued:
            around = Surroundings(
                is_running=self._sources.is_up,
                pauses=pauses,
                decided=self._decided(record),
                alarms=alarms[record.base_model],
                leader=self._sources.leader,
            )
            found[record.task_id] = _wait_json(wait_of(record, around))
        return found

    def _trial(self, base_model: str) -> tuple[int, str, float] | None:
        """The version that waits for its canary."""
        controller = self._sources.controller
        subspace = controller.subspaces.get(base_model) if controller is not None else None
        return subspace.candidate.trial.waiting if subspace is not None else None

    def _decided(self, record: TaskRecord) -> Wait | None:
        """The scheduler's reason for a task that stands in line."""
        controller, stands = self._sources.controller, record.state is TaskState.QUEUED and not record.blocked
        return controller.wait_in_line(record) if controller is not None and stands else None

    def _titles(self, record: TaskRecord) -> dict[str, str]:
        """Names of the tasks that may be named in the reason why a task waits."""
        named = set(record.awaits)
        if (decided := self._decided(record)) is not None:
            named.add(decided.about)
        return {task_id: found.title for task_id, found in self._sources.queue.among(named - {""}).items()}

    def _surroundings(self, record: TaskRecord, line: Line) -> Surroundings:
        controller, queued = self._sources.controller, record.state is TaskState.QUEUED
        versions, name = self._versions.get(record.base_model), record.base_model
        state = versions.refresh() if versions is not None else SubspaceState()
        return Surroundings(
            is_running=self._sources.is_up,
            main=state.refs[MAIN],
            is_gone_from_main=versions is not None and record.task_id in versions.gone_from_main(state, [record]),
            place=line.places.get(record.task_id),
            pace=line.length_of(record),
            start=line.starts.get(record.task_id),
            idle_causes=controller.idle_causes(record.pool) if controller else (),
            pools=described(self._sources.settings.pools),
            phase=str(self._sources.queue.progress(record.task_id).get("phase", ""))
            if views.is_at_work(record)
            else "",
            held=hold_over(record, state),
            is_version_refined=controller is not None and controller.is_refining(name, record.version),
            pauses=self._sources.queue.pauses() if queued else {},
            decided=self._decided(record),
            titles=self._titles(record),
            alarms=self._sources.ringing(name),
            trial=self._trial(name),
            leader=self._sources.leader,
        )


def _nothing_to_do(change: requests.Change, record: TaskRecord) -> str:
    """Why a change asked for of many tasks leaves this one as it is; empty where there is something to do."""
    match change:
        case "retry" if record.state in LIVE:
            return f"is {record.state}: only what ended without a result is submitted again"
        case "resume" if record.paused is None:
            return "is not paused itself"
        case "pause" if record.paused is not None:
            return f"is paused already, by {record.paused.by}"
        case "cancel" if record.state is TaskState.CANCELLED:
            return "is cancelled already"
    return ""


def _wait_json(wait: Wait | None) -> Json | None:
    if wait is None:
        return None
    told = {name: value for name, value in vars(wait).items() if name != "is_of_service"}
    return {**told, "who": str(wait.who)}


def _runs_too_long(record: TaskRecord, length: Pace | None) -> str:
    """That a task will probably be stopped for its own `max_run_seconds`; empty where it will not, or nobody knows."""
    most = record.spec.max_run_seconds
    if most is None or length is None or length.seconds <= most:
        return ""
    by = "the one task before" if length.count == 1 else f"the last {length.count} tasks like it"
    return (
        f"it takes about {duration(length.seconds)}, by {by}, and max_run_seconds is {most:g}: it would be stopped and "
        "parked"
    )
