"""The control plane's process: leads or stands by, and what is started and ended for each of the two.

One control plane of a service leads: the loop, the MLflow mirror and what checks submissions belong to the time in
which it does, and are made anew when it leads again. The HTTP API, the connection to Ray and the storage stay.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import Conflict, InvalidInput, OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.api.callers import Callers
from orchestrator.api.guard import Guard
from orchestrator.api.server import api, http_server
from orchestrator.api.service import Service
from orchestrator.cluster import RayCluster, namespace
from orchestrator.controller import PREEMPT_SECONDS, Controller
from orchestrator.leadership import Leadership, refuse_other_settings, shared_settings
from orchestrator.ray_head import ADDRESS_FILE, TOKEN_FILE
from orchestrator.reports.mlflow_mirror import Mirror
from orchestrator.reports.traces import Traces
from orchestrator.reports.webhooks import Webhooks
from orchestrator.serving.deployment import Deployment
from orchestrator.signs_of_life import ray_trouble
from orchestrator.tasks.checking import Checker
from orchestrator.tasks.leader_lease import LeaderLease, Member
from orchestrator.tasks.task_queue import NOBODY, TaskQueue
from orchestrator.watch import Pulse, Watch
from subspace_store import SubspaceReader, open_storage
from subspace_store.commands.state_folder import SERVER_FILE, member_id, open_private, service_identity
from subspace_store.commands.terminal import me

log = logging.getLogger("onebasis.server")

RAY_SECONDS = 180.0
RELEASE_SECONDS = 30.0
"""Longest wait for the writer to give the store up: one record, after a merge that is under way."""
HAND_OVER_SECONDS = 5.0
"""Longest wait for the loop to end when another control plane goes on. What it does after that, it may not."""
TRACES_SECONDS = 2.0
"""Longest wait at the end for a collector. What it was not told by then, it is told by the next control plane."""
LOOK_EVERY_SECONDS = 3.0
"""Pause between two looks at the store and the database, three small reads: with the looks themselves, people are told
within ten seconds."""


class ControlPlane:
    """The parts of the process, in the order in which they start."""

    def __init__(self, settings: Settings, state_dir: Path) -> None:
        self.settings = settings
        self.state_dir = state_dir
        self.identity = service_identity(state_dir)
        self.storages = {name: open_storage(settings.storage, name) for name in settings.base_names}
        self.leadership: Leadership | None = None
        """Part in the leadership, where several control planes may share a database."""
        self.token = secrets.token_hex(32)
        """What callers have to send."""
        self.url = ""
        """Address of the HTTP API, once it is known."""
        self.cluster: RayCluster
        self._stop = threading.Event()
        self._started_at = time.time()
        self._duty: Leading | StandingBy | None = None
        """What this process does now; None for the moment between the two."""
        self._failure: Exception | None = None
        """Why this process could not begin to lead."""
        self._looking: threading.Thread | None = None
        self._changing = threading.Lock()
        self._is_ending = False

    def run(self) -> None:
        """Start everything, serve, and stop everything in the reverse order."""
        settings = self.settings
        log.info("opening the task database and the store")
        listener = socket.create_server((settings.server.host, settings.server.port))
        scheme = "https" if settings.server.tls else "http"
        self.url = url = "{}://{}:{}".format(scheme, *listener.getsockname()[:2])
        lease = LeaderLease(settings.database_url) if settings.database_url.startswith("postgresql") else None
        log.info("joining Ray, starting the store actor and the workers of %d pools", len(settings.pools))
        address, token_path = self._ray()
        self.cluster = RayCluster(settings, address, token_path, self.identity)
        if lease is None:
            self._take_up(None)
        else:
            self._join(lease, url)
        callers = Callers(self.token, me(), lambda: self._service().sources, lambda: self.settings)
        server = http_server(api(lambda: Guard(self._service()), callers), settings.server.tls)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.install_signal_handlers = lambda: None
        self._announce(url)
        log.info("ready at %s", url)
        server.run(sockets=[listener])
        log.info("stopping")
        self._end(lease)
        log.info("stopped")

    def _service(self) -> Service:
        """What answers, as what this process is at the moment."""
        duty = self._duty
        if duty is None:
            raise Unavailable("this control plane begins or ends to lead", todo="try again in a moment")
        return duty.service

    def agree(self, settings: Settings) -> None:
        """Go on with these settings, if no other control plane has the old ones. Raises Conflict."""
        if self.leadership is not None:
            self.leadership.follow(shared_settings(settings))
        self.settings = self.cluster.settings = settings
        self.storages = {name: open_storage(settings.storage, name) for name in settings.base_names}

    def _join(self, lease: LeaderLease, url: str) -> None:
        """Lead if nobody does; else stand by, and look from now on whether somebody still does."""
        seen = lease.look()
        member = Member(member_id(self.state_dir), self.identity.name, url)
        refuse_other_settings(seen, member.member_id, self.settings)
        shared = shared_settings(self.settings)
        if lease.claim_service(self.identity.service_id, shared) != self.identity.service_id:
            what = f"this database belongs to another service than {self.identity.name}"
            raise Conflict(what, "database_url", "`onebasis up` lets this folder join it")
        self.leadership = leadership = Leadership(lease, member, shared, self._lead, self._stand_by)
        leadership.step()
        self._looking = threading.Thread(target=leadership.run, args=(self._stop,), name="leadership", daemon=True)
        self._looking.start()
        with self._changing:  # free when it has begun to lead
            failure = self._failure
        if failure is not None:
            leadership.leave()
            raise failure
        if not leadership.leads:
            self._stand_by()

    def _lead(self, fence: int) -> None:
        """Begin to lead in a thread of its own, beside which the lease is prolonged."""
        is_begun = threading.Event()

        def begin() -> None:
            with self._changing:
                is_begun.set()
                if self._is_ending:
                    assert self.leadership is not None
                    self.leadership.give_up()
                    return
                try:
                    self._take_up(fence)
                except Exception as error:
                    log.exception("this control plane cannot lead, and gives its lease up")
                    self._failure = error
                    assert self.leadership is not None
                    self.leadership.give_up()

        threading.Thread(target=begin, name="lead", daemon=True).start()
        is_begun.wait()

    def _take_up(self, fence: int | None) -> None:
        """Lead. fence: Number of this leader; None: there is no other control plane."""
        before = self._duty
        self._duty = Leading(self, fence)
        if before is not None:
            before.end()

    def _stand_by(self) -> None:
        with self._changing:
            if self._is_ending:
                return
            before, self._duty = self._duty, None
            if before is not None:
                before.end(hands_over=True)
            self._duty = StandingBy(self)

    def _end(self, lease: LeaderLease | None) -> None:
        """End what this process does. If another control plane stands by, all that runs is left to that one."""
        leadership = self.leadership
        hands_over = leadership is not None and bool(leadership.others())
        leads = leadership is None or leadership.leads
        with self._changing:
            self._is_ending, duty = True, self._duty
            if duty is not None:
                duty.end(hands_over=hands_over)
        self._stop.set()
        (self.state_dir / SERVER_FILE).unlink(missing_ok=True)
        if leads and not hands_over:
            try:
                (duty.cluster if isinstance(duty, Leading) else self.cluster).release_stores(RELEASE_SECONDS)
            except OnebasisError as error:
                log.warning("a store stays this service's: %s", error)
        if leadership is not None and self._looking is not None:
            self._looking.join(timeout=RELEASE_SECONDS)  # it would take the lease again
            try:
                leadership.leave()
            except OnebasisError as error:
                log.warning("the lease ends by itself: %s", error)
        self.cluster.stop(actors=leads and not hands_over and self.settings.ray.address != "local")
        if lease is not None:
            lease.close()

    def _ray(self) -> tuple[str, Path]:
        ray = self.settings.ray
        if ray.address != "local":
            token_path = Path(ray.auth_token_path or "")
            if not token_path.is_file():  # a new one would be made there, and the cluster would not know it
                raise InvalidInput(
                    f"{ray.auth_token_path!r} is no file, and the cluster at {ray.address} wants its token",
                    "ray.auth_token_path",
                    "copy the token file of the cluster's head there (RAY_AUTH_TOKEN_PATH)",
                )
            return ray.address, token_path
        file, until = self.state_dir / ADDRESS_FILE, time.monotonic() + RAY_SECONDS
        while not file.exists():
            if time.monotonic() > until:
                raise Unavailable("the local Ray did not start", str(self.state_dir / "logs/ray.log"))
            time.sleep(0.05)
        return json.loads(file.read_text())["address"], self.state_dir / TOKEN_FILE

    def _announce(self, url: str) -> None:
        facts = {"url": url, "token": self.token, "pid": os.getpid()}
        if self.settings.server.tls is not None:
            facts["cert_file"] = self.settings.server.tls.cert_file  # it is made out for another name than 127.0.0.1
        new = self.state_dir / f"{SERVER_FILE}.new"
        with open_private(new, "w") as file:
            json.dump(facts, file)
        new.rename(self.state_dir / SERVER_FILE)

    def health(self) -> dict[str, Any]:
        """What this process is, and which others there are."""
        facts: dict[str, Any] = {"pid": os.getpid(), "up_seconds": time.time() - self._started_at}
        if self.leadership is not None:
            facts["leadership"] = self.leadership.as_dict()
        return facts


class StandingBy:
    """Answers what only reads, while another control plane leads."""

    def __init__(self, process: ControlPlane) -> None:
        self._stop = threading.Event()
        settings, leadership = process.settings, process.leadership
        assert leadership is not None
        self._queue = TaskQueue(settings.database_url, settings.failures, NOBODY)
        self.service = Service(
            settings, self._queue, process.storages, health=process.health, stands_by=leadership.stands_by
        )
        look = Pulse(self.service.look, LOOK_EVERY_SECONDS)
        threading.Thread(target=look.run, args=(self._stop,), name="look", daemon=True).start()

    def end(self, hands_over: bool = False) -> None:
        """Give the connections back; requests that are under way keep theirs."""
        self._stop.set()
        self._queue.close()


class Leading:
    """The loop and all around it, from the moment at which this control plane leads until it no longer does."""

    def __init__(self, process: ControlPlane, fence: int | None) -> None:
        settings, state_dir, self._stop = process.settings, process.state_dir, threading.Event()
        self._queue = queue = TaskQueue(settings.database_url, settings.failures, fence)
        self.cluster = cluster = process.cluster
        if fence is not None and process.leadership is not None:
            self.cluster = cluster = cluster.led(fence, partial(process.leadership.check, fence))
        cluster.start()
        stores = {
            name: SubspaceReader.open(place, settings=settings.subspace) for name, place in process.storages.items()
        }
        self._mirror = mirror = Mirror(settings, queue)
        self._deployment = Deployment(namespace(settings.storage, process.identity), process.token, process.url)
        self._controller = controller = Controller(
            settings,
            queue,
            stores,
            cluster,
            process.identity,
            changed=mirror.wake,
            answering=lambda: self._deployment.facts(self.service.settings),
        )
        self._checker = Checker()
        self.service = Service(
            settings,
            queue,
            process.storages,
            controller,
            cluster,
            lambda: process.health() | self._health(),
            self._checker.check,
            agree=process.agree,
            deployment=self._deployment,
        )
        mirror.follow(lambda: self.service.settings)
        self._webhooks = Webhooks(
            self.service.sources.outbox,
            lambda: self.service.settings,
            lambda: {name: subspace.store for name, subspace in controller.subspaces.items()},
            controller.alarms,
        )
        self.service.sources.send_soon = self._webhooks.wake
        self._traces = Traces(queue, lambda: self.service.settings, process.identity.name)
        self._loop = threading.Thread(target=controller.run, args=(self._stop,), name="controller", daemon=True)
        is_local = settings.ray.address == "local"
        gcs = Pulse(cluster.probe)
        trouble = partial(ray_trouble, state_dir) if is_local else str
        watch = Watch(controller.alarms, controller, mirror, self._traces, trouble, gcs)
        store_and_database = Pulse(self.service.look, LOOK_EVERY_SECONDS)
        for name, run in (
            ("watch", watch.run),
            ("gcs", gcs.run),
            ("look", store_and_database.run),
            ("webhooks", self._webhooks.run),
        ):
            threading.Thread(target=run, args=(self._stop,), name=name, daemon=True).start()
        self._reporter = threading.Thread(target=mirror.run, args=(self._stop,), name="mlflow", daemon=True)
        self._tracer = threading.Thread(target=self._traces.run, args=(self._stop,), name="traces", daemon=True)
        self._loop.start()
        self._reporter.start()
        self._tracer.start()
        threading.Thread(target=self._checker.start, name="checker", daemon=True).start()
        if settings.serving is not None:
            now = (lambda: self.service.settings, self._stop)
            threading.Thread(target=self._deployment.begin, args=now, name="serving", daemon=True).start()

    def end(self, hands_over: bool = False) -> None:
        """Stop the loop. hands_over: Another control plane goes on with what runs, else it writes checkpoints."""
        self._checker.close()
        self._webhooks.wake()
        self._controller.hands_over = hands_over
        self._stop.set()
        self._loop.join(timeout=HAND_OVER_SECONDS if hands_over else PREEMPT_SECONDS + 10)
        if not hands_over:
            self._reporter.join(timeout=60)
            self._tracer.join(timeout=TRACES_SECONDS)
            self._deployment.end()
        self._queue.close()

    def _health(self) -> dict[str, Any]:
        controller, mirror = self._controller, self._mirror
        return {
            "loop_seconds_ago": time.time() - controller.healthy_at,
            "heard_seconds_ago": time.time() - controller.heard_at,
            "workers": controller.describe_workers(),
            "workers_ready": controller.ready_workers,
            "load_errors": {name: error.as_dict() for name, error in controller.load_errors.items()},
            "store_is_open": controller.stores_are_open,
            "store_error": controller.store_error.as_dict() if controller.store_error else None,
            "mlflow_behind": mirror.behind,
            "mlflow_error": mirror.error,
            "traces_behind": self._traces.behind,
            "traces_error": self._traces.error,
        }
