"""A cluster without machines: workers that make small random adapters, and a real SubspaceStore as the writer.

What is asked for is done at once, on the caller's thread, and lands when the controller looks: so a test says
exactly what happened when. `hold` keeps orders under way until they are released. Like detached Ray actors, it
outlives the control plane that uses it, and an order given twice under one token is done once.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any

import torch

from configs.errors import Corrupt, NotWritten, OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.cluster import MachineLost
from subspace_store import Adapter, Storage, SubspaceReader, SubspaceStore, adapter_from_bytes, adapter_to_bytes, digest
from subspace_store.log.garbage import Collected
from subspace_store.log.store_format import read_format
from subspace_store.log.version import Identity
from subspace_store.requests import StoreRequest
from subspace_store.storage.opening import open_storage
from tests.builders import LAYOUT, adapter
from workers.orders import (
    DoneAt,
    Evaluate,
    Evaluated,
    EvaluatedTogether,
    EvaluateTogether,
    Failed,
    Order,
    Outcome,
    Phase,
    PhaseTime,
    Point,
    Progress,
    Train,
    Trained,
)
from workers.process_monitor import ProcessEnd
from workers.serving.question import Answer, Question

RowCount = 100
"""Evaluation rows that every score pretends to be measured on."""


class StandInCluster:
    """Implements orchestrator.cluster.Cluster.

    Args:
        storages: Base model to where its store and its workers read and write.
    """

    def __init__(self, settings: Settings, storages: Mapping[str, Storage], service: Identity | None = None) -> None:
        self._service = service
        self._settings = settings
        self._storages = dict(storages)
        self._memory: dict[str, dict[str, Future[Any]]] = {}
        self.machine_of: Callable[[str], str] = lambda worker: "10.0.0.1"
        """Worker to the address of its machine; empty while it waits for a place."""
        self.avoided: frozenset[str] = frozenset()
        """Machines on which nothing new is placed."""
        self.keeps_away: dict[str, frozenset[str]] = {}
        """Worker to the machines that were avoided when it was asked for: Ray never places it there."""
        self.free: dict[str, dict[str, float]] = {}
        """Machine to what is free there, as Ray says it."""
        self.sizes: Callable[[str, str], bool] = lambda pool, machine: True
        """Whether a worker of a pool has room on a machine with nothing else on it."""
        self._placeless: list[tuple[str, Future[Any]]] = []
        """Workers that load the base model once they have a machine."""
        self.ended: list[str] = []
        """Workers that were ended, in their order."""
        self._lock = threading.RLock()
        self._stores: dict[str, SubspaceStore] = {}
        self.load_error: Exception | None = None
        """Why no worker can load the base model."""
        for name in self._storages:
            self._find_store(name)
        self.local: Callable[[str], float] = lambda title: 0.9
        """Title to the score of its own adapter."""
        self.score: Callable[[str, frozenset[str]], float] = lambda title, held: 0.9
        """Title and all titles in the version to the score under that version."""
        self.general_loss: Callable[[str, frozenset[str]], float] = lambda title, held: 0.0
        """The same to what the language model loses by it, where there is a text to measure by."""
        self.general_texts: dict[str, str] = {}
        """Title to the text that came with its last evaluation."""
        self.on_rows: Callable[[str, str], float] = lambda task_id, brought_by: 0.9
        """Ids of a revision and of the one that brought evaluation rows to the score on them, before merging and
        after."""
        self.main_on_rows: Callable[[str, str], float] = lambda task_id, brought_by: 0.8
        """The same of what `main` answers before that revision is merged."""
        self.training_faults: dict[str, list[str]] = {}
        """Title to what goes wrong with its next trainings: `lost`, `away`, `damaged`, `input`, `bug`, `nan`,
        `crash`, and
        `outside`: its refinement left the span of the basis. An empty one goes well."""
        self.training_warnings: tuple[str, ...] = ()
        """Warnings of every training."""
        self.evaluation_faults: dict[str, list[str]] = {}
        """Title to what goes wrong with its next evaluations: `lost`, `rank lost`, `away`, `damaged`, `bug`."""
        self.store_faults: list[tuple[str, str]] = []
        """(method, `before` or `after`): the next such call's answer is lost, before or after it was done."""
        self.hold: Callable[[Order], bool] = lambda order: False
        """Which orders stay under way until `release`."""
        self.trouble: OnebasisError | None = None
        """What keeps the workers from going on, as they say it in each heartbeat."""
        self.ends: dict[str, list[ProcessEnd]] = {}
        """Worker to how its process ended, the next times that this is asked; else nobody knows."""
        self.placeless_orders: set[str] = set()
        """Gangs whose order waits for places for some of their ranks."""
        self.silent: set[str] = set()
        """Workers that do not answer when asked what they do."""
        self.trainings: list[str] = []
        """Titles, in the order in which their training began."""
        self.evaluations: list[tuple[int, str]] = []
        """(version, title), in the order in which they were scored."""
        self.together: list[int] = []
        """Numbers of tasks of the orders to score several."""
        self.store_calls: list[str] = []
        self.replaced: list[str] = []
        self.lost_orders = 0
        """Number of orders that ended with the machine they were on."""
        self._dying: set[str] = set()
        self._dead_at = 0.0
        self._held: list[tuple[str, Order, Future[Any]]] = []

    def _find_store(self, base_model: str) -> None:
        """As the actor's constructor."""
        with contextlib.suppress(OnebasisError):
            if read_format(self._storages[base_model]) is not None:
                self._stores[base_model] = self._open_store(base_model)

    # --- Cluster ---------------------------------------------------------------------------------------------

    def follow(self, settings: Settings) -> None:
        self._settings = settings
        for name in set(settings.base_names) - self._storages.keys():
            self._storages[name] = open_storage(settings.storage, name)
            self._find_store(name)

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(self._memory)

    def start_worker(self, worker: str) -> None:
        self._memory.setdefault(worker, {})
        self.keeps_away.setdefault(worker, self.avoided)

    def end_worker(self, worker: str) -> None:
        self.ended.append(worker)
        del self._memory[worker]
        self.keeps_away.pop(worker, None)
        for name, order, future in list(self._held):
            if name == worker:
                self._held.remove((name, order, future))
                future.set_exception(MachineLost(f"{worker} is gone"))

    def machines_of(self, worker: str) -> tuple[str, ...]:
        machine = self._place(worker)
        return (machine,) if machine and worker in self._memory else ()

    @property
    def machines(self) -> tuple[str, ...]:
        return tuple(sorted({self.machine_of(worker) for worker in self._memory} - {""}))

    def avoid(self, machines: Collection[str]) -> None:
        self.avoided = frozenset(machines)

    def large_enough(self, pool: str, machines: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(machine for machine in machines if self.sizes(pool, machine)))

    def room(self) -> dict[str, dict[str, float]]:
        return {machine: dict(room) for machine, room in self.free.items() if machine not in self.avoided}

    def _place(self, worker: str) -> str:
        """The machine that a worker is on; empty while it waits for one, as it is not placed where it must not be."""
        machine = self.machine_of(worker)
        return "" if machine in self.keeps_away.get(worker, ()) else machine

    def answer(self, worker: str, questions: Sequence[Question]) -> Future[Any]:
        """Every task answers `yes`; where none is named, the first of those that may be."""
        assert worker in self._memory
        future = Future[Any]()
        routed = [dict.fromkeys((q.among or ())[:1], 1.0) or None for q in questions]
        future.set_result(
            [
                Answer(
                    q.task,
                    q.version or 0,
                    "yes",
                    {"yes": 1.0},
                    routed=route,
                    routed_by=(q.by or "features") if route else "",
                )
                for q, route in zip(questions, routed, strict=True)
            ]
        )
        return future

    def run(self, worker: str, order: Order) -> Future[Any]:
        with self._lock:
            if worker in self._dying:
                self.lost_orders += 1
                return _lost(worker)
            future = self._memory[worker].get(order.token)
            if future is None:
                future = self._memory[worker][order.token] = Future()
                if self.hold(order):
                    self._held.append((worker, order, future))
                else:
                    self._do(worker, order, future)
            return _another(future)

    def warm(self, worker: str) -> Future[Any]:
        if not self._place(worker):
            self._placeless.append((worker, future := Future()))
            return future
        if self._has_died(worker):
            return _lost(worker)
        return _landed(LAYOUT) if self.load_error is None else _failed(self.load_error)

    def progress(self, worker: str) -> Future[Any]:
        if worker in self.silent:
            return Future()
        if self._has_died(worker):
            return _lost(worker)
        held = next((order for name, order, _ in self._held if name == worker), None)
        if held is None:
            return _landed(Progress())
        lines = ("a line of the log", Point(at=1007.0, step=3, loss=0.5, learning_rate=0.001, steps=10))
        return _landed(
            Progress(
                token=held.token,
                phase=Phase.WAITING if worker in self.placeless_orders else Phase.TRAINING,
                trouble=self.trouble,
                step=3,
                steps=10,
                loss=0.5,
                learning_rate=0.001,
                log_lines=lines,
            )
        )

    def end_of(self, worker: str) -> Future[Any] | None:
        return _landed(self.ends[worker].pop(0)) if self.ends.get(worker) else None

    def cancel(self, worker: str, token: str) -> None:
        self._stop(worker, token, "cancelled", "cancelled while it was running")

    def preempt(self, worker: str, token: str) -> None:
        self._stop(worker, token, "preempted", "preempted at step 3")

    def _stop(self, worker: str, token: str, fault: str, message: str) -> None:
        for name, order, future in list(self._held):
            if name == worker and order.token == token:
                self._held.remove((name, order, future))
                if fault == "preempted" and isinstance(order, Train):
                    key = order.staging_key.replace("adapter.safetensors", "step-3/state")
                    self._storages[order.spec.base_model].write(key, b"checkpoint")
                future.set_result(Failed(token=token, fault=fault, message=message))

    def replace(self, worker: str) -> None:
        with self._lock:
            self.replaced.append(worker)
            self.silent.discard(worker)
            self._memory[worker] = {}
            self.keeps_away[worker] = self.avoided
            for name, order, future in list(self._held):
                if name == worker:
                    self._held.remove((name, order, future))
                    future.set_exception(MachineLost(f"{worker} is gone"))

    def write(self, base_model: str, request: StoreRequest[Any]) -> Future[Any]:
        with self._lock:
            method = request.operation
            self.store_calls.append(method)
            fault = next((fault for fault in self.store_faults if fault[0] == method), ("", ""))
            if fault[0]:
                self.store_faults.remove(fault)
            if fault[1] == "before":
                return _lost("store")
            try:
                result = request.on(self._opened(base_model))
            except Exception as error:
                return _failed(error)
            return _lost("store") if fault[1] == "after" else _landed(result)

    def open_store(self, base_model: str, base_sha256: str) -> Future[Any]:
        assert base_sha256 == LAYOUT.sha256
        with self._lock:
            try:
                if base_model not in self._stores:
                    self._stores[base_model] = self._open_store(base_model)
            except Exception as error:
                return _failed(error)
            return _landed(None)

    def store_sign(self, base_model: str) -> Future[Any]:
        return Future() if "store" in self.silent else _landed(1)

    def collect(self) -> Collected:
        """What `onebasis store collect --really` does."""
        return self._opened(self._settings.base_names[0]).collect()

    def replace_store(self, base_model: str) -> None:
        self.replaced.append("store")
        self.silent.discard("store")
        self._stores.pop(base_model, None)

    def landed(self, calls: Sequence[Future[Any]], timeout_seconds: float) -> list[Future[Any]]:
        for worker, future in [one for one in self._placeless if one[0] in self._memory and self._place(one[0])]:
            self._placeless.remove((worker, future))
            future.set_result(LAYOUT)
        done = wait(calls, timeout_seconds, FIRST_COMPLETED).done
        return [call for call in calls if call in done]

    def result(self, call: Future[Any]) -> Any:
        return call.result(0)

    # --- what tests do to it ---------------------------------------------------------------------------------

    @property
    def held(self) -> list[Order]:
        """Orders under way."""
        return [order for _, order, _ in self._held]

    def release(self) -> None:
        """Do what was held, and hold nothing from now on."""
        self.hold = lambda order: False
        held, self._held = self._held, []
        for worker, order, future in held:
            self._do(worker, order, future)

    def machine_dies(self) -> None:
        """One machine held all workers. Who works is lost at once; the others answer for a moment more, as processes do
        that look once a second whether their raylet lives, and then it takes a call to notice. Fresh ones follow."""
        self._dying, self._dead_at = set(self._memory), time.monotonic() + 0.1
        held, self._held = self._held, []
        for worker, _, future in held:
            self.lost_orders += 1
            self._memory[worker] = {}
            future.set_exception(MachineLost(f"{worker} is gone"))

    def _has_died(self, worker: str) -> bool:
        """Whether the process that is asked is gone; the next one takes its place."""
        died = worker in self._dying and time.monotonic() > self._dead_at
        self._dying -= {worker} if died else set()
        return died

    # --- workers ---------------------------------------------------------------------------------------------

    def _do(self, worker: str, order: Order, future: Future[Any]) -> None:
        if isinstance(order, EvaluateTogether):
            self._do_together(worker, order, future)
        else:
            self._do_one(worker, order, future)

    def _do_together(self, worker: str, order: EvaluateTogether, future: Future[Any]) -> None:
        """Each as alone; what is not one task's outcome is that of all."""
        self.together.append(len(order.orders))
        outcomes = []
        for one in order.orders:
            alone: Future[Any] = Future()
            self._memory[worker][one.token] = alone
            self._do_one(worker, one, alone)
            self._memory[worker].pop(one.token, None)
            if (error := alone.exception()) is not None:
                self._memory[worker].pop(order.token, None)
                future.set_exception(error)
                return
            outcomes.append(alone.result())
        future.set_result(EvaluatedTogether(token=order.token, outcomes=tuple(outcomes), seconds=0.1, worker_seconds=2))

    def _do_one(self, worker: str, order: Train | Evaluate, future: Future[Any]) -> None:
        title = f"{order.spec.team}/{order.spec.name}"
        faults = self.training_faults if isinstance(order, Train) else self.evaluation_faults
        fault = faults[title].pop(0) if faults.get(title) else ""
        if isinstance(order, Train):
            self.trainings.append(title)
        else:
            self.evaluations.append((order.version, title))
        if fault == "lost":
            self._memory[worker] = {}
            future.set_exception(MachineLost(f"{worker} is gone"))
        elif fault == "away":
            del self._memory[worker][order.token]
            future.set_exception(Unavailable("the storage is away"))
        elif fault == "damaged":
            del self._memory[worker][order.token]
            future.set_exception(Corrupt("the object that the log names is gone", "blobs/1"))
        elif fault == "crash":
            future.set_exception(RuntimeError("outside the worker's own handling"))
        elif fault == "rank lost":  # as a gang answers, which remembers it
            future.set_result(Failed(token=order.token, fault="lost", message="rank 1 of 2 was lost"))
        elif fault in ("input", "bug"):
            future.set_result(
                Failed(
                    token=order.token, fault=fault, message=f"fault of kind {fault}", detail="traceback\nof two lines"
                )
            )
        else:
            future.set_result(self._train(order, title, fault) if isinstance(order, Train) else self._evaluate(order))

    def _train(self, order: Train, title: str, fault: str) -> Outcome:
        storage, base = self._storages[order.spec.base_model], order.spec.base_model
        content = storage.read(order.train_key)  # NotFound if it was deleted too early
        if order.refine_version:
            # Twice what the version serves: in the span of its basis, whatever that is.
            served = SubspaceReader.open(storage).adapter(order.task_id, order.refine_version)
            twice = {name: replace(update, sigma_R=2 * update.sigma_R) for name, update in served.modules.items()}
            made = replace(served, modules=twice)
            if fault == "outside":
                made = adapter(zlib.crc32(title.encode()) + 1, base=base)
        elif order.spec.method.name == "import":
            made = adapter_from_bytes(content)
        else:
            state = SubspaceReader.open(storage).state
            if order.revises and order.revises not in state.tasks_at(state.refs["main"]):
                return Failed(token=order.token, fault="input", message=f"main does not hold {order.revises}")
            made = adapter(zlib.crc32(f"{title}{order.revises}".encode()), base=base)
        if fault == "nan":
            made = _with_nan(made)
        packed = adapter_to_bytes(made)
        storage.write(order.staging_key, packed)
        score = self.local(title) if order.eval_key else float("nan")
        brought_by = [*order.earlier_rows, order.task_id] if order.revises else []
        for key in order.earlier_rows.values():
            storage.read(key)  # NotFound if they were deleted too early
        return Trained(
            token=order.token,
            staging_key=order.staging_key,
            adapter_sha256=digest(packed),
            adapter_parameters=made.parameter_count,
            score_count=RowCount if order.eval_key else 0,
            local_score=score,
            warnings=self.training_warnings,
            base_score=0.5,
            steps=10,
            train_loss=0.25,
            seconds=2.0,
            first_step_at=0.0,
            log_lines=("the last line of the log",),
            method=order.spec.method.name,
            trainable_parameters=96,
            metrics={"f1_macro": 0.75},
            scores_of_rows={one: self.on_rows(order.task_id, one) for one in brought_by},
            main_scores_of_rows={one: self.main_on_rows(order.task_id, one) for one in brought_by},
            worker_seconds=2.5,
            done_at=_done_at(Phase.LOADING, Phase.TRAINING, Phase.SCORING, Phase.SAVING),
        )

    def _evaluate(self, order: Evaluate) -> Outcome:
        storage = self._storages[order.spec.base_model]
        reader = SubspaceReader.open(storage)
        reader.adapter(order.task_id, order.version)  # NotFound if the version does not hold it
        for key in (order.eval_key, *order.earlier_rows.values()):
            storage.read(key)
        brought_by = [*order.earlier_rows, order.task_id] if order.earlier_rows else []
        of_rows = {one: (self.on_rows(order.task_id, one), RowCount) for one in brought_by}
        title = f"{order.spec.team}/{order.spec.name}"
        held = frozenset(task.name for task in reader.state.tasks_at(order.version).values())
        self.general_texts[title] = order.general_text
        return Evaluated(
            token=order.token,
            score=self.score(title, held),
            general_loss=self.general_loss(title, held) if order.general_text else None,
            count=RowCount * max(1, len(brought_by)),
            seconds=0.1,
            of_rows=of_rows,
            worker_seconds=0.5,
            done_at=_done_at(Phase.LOADING, Phase.SCORING),
        )

    def _opened(self, base_model: str) -> SubspaceStore:
        """As the actor's, whose store is made when a worker has loaded the base model: here that takes no time."""
        if base_model not in self._stores:
            if self.load_error is not None and read_format(self._storages[base_model]) is None:
                raise NotWritten("there is no store yet")
            self._stores[base_model] = self._open_store(base_model)
        return self._stores[base_model]

    def _open_store(self, base_model: str) -> SubspaceStore:
        base = self._settings.base(base_model)
        return SubspaceStore.open(
            self._storages[base_model],
            settings=self._settings.subspace,
            base_model=base.name,
            base_sha256=base.weights_sha256,
            writer="stand-in",
            service=self._service,
            claim=self._service is not None,
        )


def _with_nan(made: Adapter) -> Adapter:
    name, update = next(iter(made.modules.items()))
    return replace(made, modules=dict(made.modules) | {name: replace(update, sigma_R=update.sigma_R * torch.nan)})


def _landed(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _lost(who: str) -> Future[Any]:
    return _failed(MachineLost(f"{who} is gone"))


def _another(future: Future[Any]) -> Future[Any]:
    """A second call to the same outcome, as a second remote call is."""
    mine: Future[Any] = Future()

    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            mine.set_result(done.result())
        else:
            mine.set_exception(error)

    future.add_done_callback(copy)
    return mine


def _done_at(*phases: Phase) -> DoneAt:
    """A machine called `node-a`, where each phase took 0.1 s and the last has just ended."""
    began = time.time() - 0.1 * len(phases)
    times = ((phase, began + 0.1 * number) for number, phase in enumerate(phases))
    return DoneAt(node="node-a", phases=tuple(PhaseTime(phase=p, began=at, ended=at + 0.1) for p, at in times))
