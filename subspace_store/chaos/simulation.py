"""A fault simulation of the store: the real code, many seeds, and a model that says what must hold.

```python
run = simulate(seed=7)
assert run.violation is None, "\n".join(run.trace)
```

One run: up to three machines open the same subspace for writing, again and again, and fence each other. Each carries
out requests, mostly merges, and repeats a request until it is answered, even if another machine began it. One more
machine only reads; another one is a second thread in the processes of the others and collects garbage. At the end
there are no more faults: a last writer carries out all open requests and collects, and a reader reads every live
version. world.py decides which machine runs and what fails at each storage call (storage.py), requests.py makes the
requests, model.py says what must hold.

Not simulated are damaged bytes, a storage that breaks its two promises (create-if-absent; a list shows what was
written), and threads that interleave between two storage calls.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import torch
from torch import Tensor

from configs.errors import Conflict, InvalidInput, NotFound, NotWritten, Unavailable
from configs.settings import SubspaceSettings
from subspace_store.chaos.model import Model, Told
from subspace_store.chaos.requests import BASE, SHAPES, Request, Requests, dense
from subspace_store.chaos.storage import ChaosStorage
from subspace_store.chaos.world import FAULTS, Crash, Machine, Violation, World
from subspace_store.digests import digest
from subspace_store.files.tensor_file import TensorFile
from subspace_store.files.version_heads import TRANSPORT
from subspace_store.log.version import MAIN, SubspaceState
from subspace_store.module_names import plain
from subspace_store.subspace_reader import SubspaceReader
from subspace_store.subspace_store import SubspaceStore

EXACT = SubspaceSettings(rank_fixed=max(max(shape) for shape in SHAPES.values()))
"""Settings under which nothing is truncated, so that a version must hold exactly what was delivered."""
CAPPED = SubspaceSettings(energy_ratio_min=1.0, rank_max=2, renew_tasks=2, renew_directions=2)
"""Settings under which the same holds because private parts keep what the basis has no room for. Two tasks make the
renewed bases."""
LOSSY = SubspaceSettings(energy_ratio_min=0.5, rank_max=3, beyond_rank_max="drop")
"""Settings under which merges take from earlier tasks, so that there are drifts and errors to be told."""
WRITERS_MAX = 3
ACTIONS_MAX = 24
"""Most actions of all writing machines together, in one run."""
REST_STEPS = 60
"""Longest pause of the reader and of the collecting thread between two actions; a machine restarts within four."""


@dataclass(frozen=True)
class Run:
    """The result of one seed.

    Args:
        seed: Seed of the run; it gives the same run again.
        violation: The promise that was not kept; None if all were.
        counts: Kind of event to how often it happened; faults by their names.
        trace: What happened, in order: one line for each storage call.
        trace_sha256: Digest of the whole trace; the same for the same seed, on any machine.
    """

    seed: int
    violation: str | None
    counts: Counter[str]
    trace: tuple[str, ...]
    trace_sha256: str


@dataclass
class ChaosReport:
    """The results of several seeds together.

    Args:
        faults: Kind of fault to how often it happened.
        events: Kind of event in the store to how often it happened; shows that operations were really tried.
        violations: Seed to the promise that was not kept.
        trace_sha256: Digest of all traces, in order.
    """

    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    violations: dict[int, str] = field(default_factory=dict)
    trace_sha256: str = ""

    def add(self, run: Run) -> None:
        """Add a run."""
        self.runs += 1
        for what, count in run.counts.items():
            (self.faults if what in FAULTS else self.events)[what] += count
        if run.violation:
            self.violations[run.seed] = run.violation
        self.trace_sha256 = digest((self.trace_sha256 + run.trace_sha256).encode())


def simulate(seed: int) -> Run:
    """Run one seed. Needs the whole process for itself: see `World.simulated`.

    Cost:
        About 20 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    simulation = _Simulation(seed)
    with simulation.world.simulated():
        simulation.run()
    torch.set_num_threads(threads)
    world = simulation.world
    return Run(seed, world.violation, world.counts, tuple(world.trace), digest("\n".join(world.trace).encode()))


def simulate_many(seeds: Sequence[int], jobs: int) -> Iterator[Run]:
    """Run seeds in `jobs` processes, in the order of the seeds. Runs without a violation come without a trace."""
    if jobs == 1:
        yield from map(_briefly, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_briefly, seeds, chunksize=20)


def _briefly(seed: int) -> Run:
    run = simulate(seed)
    return run if run.violation else replace(run, trace=())


@dataclass
class _Process:
    """A store that is open for writing."""

    name: str
    store: SubspaceStore


class _Simulation:
    """One run: the world, the model, and what is asked for."""

    def __init__(self, seed: int) -> None:
        self.settings = (EXACT, CAPPED, LOSSY)[seed % 3]
        self.model = Model(exact=self.settings is not LOSSY)
        self.world = World(seed, self.model)
        self.model.present = lambda: set(self.world.disk.keys(""))
        self.model.lands_late = lambda: self.world.lands_late
        self.random = self.world.random
        self.waiting: list[Request] = []
        self.open: dict[Machine, _Process] = {}
        self.actions_left = self.random.randint(5, ACTIONS_MAX)
        self.requests = Requests(self.random, self.model, self.world.now)
        self.writing = self.random.randint(1, WRITERS_MAX)

    def run(self) -> None:
        writers = [(f"w{i}", self._write) for i in range(self.writing)]
        self.world.run([*writers, ("r", self._read), ("t", self._collect_in_a_thread)])
        try:
            if self.world.violation is None:
                self.world.settle()
                self._finish()
        except Violation as broken:
            self.world.violation = str(broken)
        except Exception:
            self.world.violation = f"unexpected: {traceback.format_exc()}"

    # Machines

    def _write(self, machine: Machine) -> None:
        """One writing process after another."""
        while self.actions_left > 0:
            self.actions_left -= 1
            name = self._process_name(machine)
            try:
                process = _Process(name, self._opened(name))
                self.world.counts["opened for writing"] += 1
                self.open[machine] = process
                self._serve(process)
            except Crash:
                self.world.counts["crashed"] += 1
            except Unavailable:
                self.world.counts["unavailable"] += 1
            except Conflict:
                if not self._fenced(name):
                    raise
                self.world.counts["fenced while opening"] += 1
            self.open.pop(machine, None)
            self._rest(machine, 4 * REST_STEPS)
        self.writing -= 1

    def _serve(self, process: _Process) -> None:
        """Act until the process is fenced, no actions are left, or, by chance, earlier."""
        while self.actions_left > 0 and self.random.random() < 0.95:
            self.actions_left -= 1
            if not self._guarded(process, functools.partial(self._act, process)):
                return

    def _read(self, machine: Machine) -> None:
        """Readers, one after another: each follows the log and reads versions."""
        while self.writing:
            self._rest(machine)
            name = self._process_name(machine)
            try:
                reader = self._opened_to_read(name)
                while self.writing and self.random.random() < 0.7:
                    reader.refresh()
                    self.model.observed(*_view(reader.state))
                    self._look(reader)
                    self._rest(machine)
            except Crash:
                self.world.counts["crashed"] += 1
            except Unavailable:
                self.world.counts["unavailable"] += 1

    def _collect_in_a_thread(self, machine: Machine) -> None:
        """A second thread in processes that write: a merge and a collection at the same time."""
        while self.writing:
            self._rest(machine)
            if self.open:
                process = self.random.choice(list(self.open.values()))
                try:
                    self._guarded(process, functools.partial(self._collect, process.store))
                except Crash:
                    self.world.note(machine.name, "died with its process")

    def _finish(self) -> None:
        """Without faults: carry out the requests that are left, collect, and read everything."""
        last = _Process("last", self._opened("last"))
        while self.waiting:
            self._ask(last, self.waiting[0])
        last.store.collect(uploads_in_use=tuple)
        reader = self._opened_to_read("end")
        self.model.observed(*_view(reader.state))
        for number in self.model.alive():
            self.model.read(number, *_whole(reader, number))
        self.model.finished()

    # Actions

    def _act(self, process: _Process) -> None:
        """One action of a writer: something new, or a request that waits for an answer."""
        if self.waiting and self.random.random() < 0.5:
            self._ask(process, self.random.choice(self.waiting))
            return
        kinds = {**self.requests.kinds(), self._collect: 4, self._look: 2}
        for action in self.random.choices(list(kinds), list(kinds.values()), k=3):
            new = action(process.store)
            if new is not None:
                self.waiting.append(new)
                self._ask(process, new)
                return

    def _ask(self, process: _Process, request: Request) -> None:
        self.world.note(process.name, f"is asked for {request.op_key}")
        kind = request.op_key.split("-")[0]
        self.model.begun(request.op_key)
        try:
            version = request.ask(process.store)
        except NotWritten:
            if not self._fenced(process.name) and self.model.in_work[request.op_key] == 1:
                self.model.not_written(request.op_key)
            raise
        except (Conflict, InvalidInput, NotFound) as error:
            if self._fenced(process.name):
                raise
            self.model.refused(request.op_key, error)
            self.world.counts[f"{kind} refused"] += 1
        else:
            self.model.answered(request.op_key, version)
            self.model.observed(*_view(process.store.state))
            self.world.counts[f"{kind} acknowledged"] += 1
        finally:
            self.model.ended(request.op_key)
        if request in self.waiting:
            self.waiting.remove(request)

    def _guarded(self, process: _Process, action: Callable[[], None]) -> bool:
        """Whether the process may go on after the action: it has not been fenced."""
        try:
            action()
        except Unavailable:
            self.world.counts["unavailable"] += 1
        except (Conflict, NotFound, InvalidInput) as error:
            # A fenced writer acts on an old state: what a newer writer gave up may be missing.
            if not self._fenced(process.name):
                raise
            self.world.note(process.name, f"is fenced: {type(error).__name__}")
            self.world.counts[f"fenced, told by {type(error).__name__}"] += 1
            return False
        return True

    def _fenced(self, name: str) -> bool:
        return self.model.owner != name

    def _collect(self, store: SubspaceStore) -> None:
        found = store.collect(uploads_in_use=lambda: {task for request in self.waiting for task in request.uploads_of})
        self.world.counts["collections"] += 1
        self.world.counts["blobs collected"] += len(found.blobs)

    def _look(self, store: SubspaceReader) -> None:
        """Read one version whole."""
        number = self.random.choice([*store.state.versions, store.state.refs[MAIN]])
        if number == 0:
            return
        try:
            updates, told = _whole(store, number)
        except NotFound:
            if number in self.model.alive():
                raise
            self.world.counts["read an expired version"] += 1
        else:
            self.model.read(number, updates, told)
            self.world.counts["versions read"] += 1

    def _opened(self, name: str) -> SubspaceStore:
        storage = ChaosStorage(self.world, name)
        return SubspaceStore.open(storage, settings=self.settings, base_model=BASE, writer=name)

    def _opened_to_read(self, name: str) -> SubspaceReader:
        return SubspaceReader.open(ChaosStorage(self.world, name), settings=self.settings, base_model=BASE)

    def _rest(self, machine: Machine, steps: int = REST_STEPS) -> None:
        machine.sleeps_until = self.world.step + self.random.randint(1, steps)
        self.world.switch(machine)

    def _process_name(self, machine: Machine) -> str:
        machine.processes += 1
        return f"{machine.name}.{machine.processes}"


def _view(state: SubspaceState) -> tuple[int, Mapping[str, object]]:
    """A folded state as the model keeps it."""
    return state.seq, {
        "refs": dict(state.refs),
        "published": {*state.published},
        "rejected": {*state.rejected},
        "tags": dict(state.tags),
        "pins": {(version, owner): until for version, pins in state.pins.items() for owner, until in pins.items()},
        "held": state.held is not None,
        "quarantined": {*state.quarantined},
        "expired": {*state.expired},
    }


def _whole(store: SubspaceReader, number: int) -> tuple[dict[str, dict[str, Tensor]], Told]:
    """Every task of a version, dense updates and head, and what is told of them."""
    state = store.state
    updates = {task: dense(store.adapter(task, number)) for task in state.tasks_at(number)}
    modules = store.subspace(number).values()
    transport = state.versions[number].transport
    told = Told(
        births=state.births(number),
        drift=state.drift(number),
        errors=state.errors(number),
        held={task for module in modules for task in (*module.tasks.task_ids, *module.private)},
        moved={*map(plain, TensorFile(store.storage, transport, TRANSPORT).parts)} if transport else set(),
    )
    return updates, told
