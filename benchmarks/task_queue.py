"""What the task queue costs, and how the scheduler serves: `make bench-queue`; one part: make bench-queue BENCH=claims.

Prints and writes benchmarks/results/queue.json, where a part that was not run keeps its figures. Parts: `history` and
`schedule`, `claims`, and what needs real services, `submissions`, `memory`, `first-step` and `failover`
(queue_service.py).

`history`: two services side by side, on SQLite files, both with a real control loop, a real store and workers that need
no time: one with 100 tasks that wait and 100 that ended, one with 100,000 and 100,000. In turns each does the same:

    step        one step of the loop, in which a worker comes back with a checkpoint and gets its next task
    submission  one task checked, its rows frozen, its row and event written
    claim       the next task chosen by fair share, and claimed
    page        100 tasks listed, from the middle

The ratio of the medians is what a long history costs; 1.5 is the target for the first three, of the time on the clock
and of the processor's alone (on a slow disk the waits for it hide what the processor does). Tasks that ended are
cancelled, rejected and parked ones: published ones cost what the store's own state costs, see benchmarks/store.py.

`claims`: the next task chosen and claimed with 100, 1,000, 10,000 and 100,000 that wait, in turns: median and 99th
percentile on the clock.

`schedule`: what the scheduler does with weeks of arrivals, by simulation: how evenly teams of equal demand are served
while there is too little for all, how many starts fall into the interval that was told at arrival, and how wide that is
over how long they waited. Of these only `weeks_a_second`, of the processor's time, depends on the machine.

The file is not named queue.py: scripts in its folder would import it in place of Python's own module.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests/

import torch  # noqa: E402
from sqlalchemy import insert  # noqa: E402

from configs.settings import DEFAULT_POOL  # noqa: E402
from orchestrator.controller import Controller  # noqa: E402
from orchestrator.scheduling.fair_share import Use, running_order  # noqa: E402
from orchestrator.scheduling.simulation import report, simulate  # noqa: E402
from orchestrator.tasks import tables  # noqa: E402
from orchestrator.tasks.admission import admit, check_submission  # noqa: E402
from orchestrator.tasks.task_events import Claimed, TrainingFailed  # noqa: E402
from orchestrator.tasks.task_queue import TaskQueue  # noqa: E402
from orchestrator.tasks.task_record import TaskState, new_task_id  # noqa: E402
from orchestrator.tasks.task_rows import columns_of  # noqa: E402
from subspace_store import SubspaceReader, open_storage  # noqa: E402
from tests.builders import BASE, LAYOUT, fixed, rows, settings, task_record, task_spec, write_rows  # noqa: E402
from tests.orchestrator.scheduling.invented import weeks  # noqa: E402
from tests.orchestrator.stand_in_cluster import StandInCluster  # noqa: E402
from workers.orders import Train  # noqa: E402

SIZES = {"short": (100, 100), "long": (100_000, 100_000)}
"""Name to tasks that wait, and tasks that ended."""
WAITING = (100, 1_000, 10_000, 100_000)
"""Tasks that wait, for `claims`."""
TEAMS = 8
WORKERS = 4
TURNS = 200
TARGET = 1.5
ENDED = (TaskState.CANCELLED, TaskState.REJECTED, TaskState.PARKED)
TEMPLATE = task_record()
"""Copied, not checked: checking 110,000 documents would take longer than all that is measured."""
OUT = ROOT / "benchmarks" / "results" / "queue.json"


Took = tuple[float, float]
"""Seconds on the clock, and of the processor."""


class Rig:
    """A service with a history, whose workers are all at work."""

    def __init__(self, folder: Path, waiting: int, ended: int) -> None:
        folder.mkdir()
        self._folder = folder
        teams = {f"team-{n}": {"queued_max": 1_000_000} for n in range(TEAMS)}
        self.settings = settings(folder, teams=teams, workers={"count": WORKERS})
        self.queue = TaskQueue(self.settings.database_url)
        self._fill(waiting, ended)
        storage = open_storage(self.settings.storage, BASE)
        self.cluster = StandInCluster(self.settings, {BASE: storage})
        self.cluster.hold = lambda order: True
        self.storage = storage
        stores = {BASE: SubspaceReader.open(storage)}
        self.controller = Controller(self.settings, self.queue, stores, self.cluster)
        while len(self.cluster.held) < WORKERS:
            self.controller.step()
        self._turn = 0
        write_rows(folder / "data/train.jsonl", rows(4))
        write_rows(folder / "data/eval.jsonl", rows(4, label="no"))

    def _fill(self, waiting: int, ended: int) -> None:
        """By whole pages, without a commit for each: minutes become seconds."""
        now, total = time.time(), waiting + ended
        with self.queue._database.writing() as connection:
            for start in range(0, total, 2000):
                page = range(start, min(start + 2000, total))
                found = [self._row(n, n >= ended, now - total + n) for n in page]
                connection.execute(insert(tables.tasks), found)
                if total // 2 in page:
                    self._middle = found[total // 2 - start]["task_id"]
                connection.execute(
                    insert(tables.events),
                    [
                        {"task_id": row["task_id"], "at": now, "kind": kind, "text": kind}
                        for row in found
                        for kind in (("submitted",) if row["state"] == "queued" else ("submitted", "Claimed", "Ended"))
                    ],
                )
                connection.execute(
                    insert(tables.uses),
                    [
                        {"task_id": row["task_id"], "token": "t", "team": row["team"], "what": "train"}
                        | {"seconds": 1.0, "ended_at": now}
                        for row in found
                    ],
                )
        for team in range(TEAMS):
            use = Use(team=f"team-{team}", seconds=1.0, ended_at=now)
            self.queue.charge("filled", use, token=f"{team}", what="train")

    def _row(self, number: int, waits: bool, at: float) -> dict[str, Any]:
        task_id = new_task_id(at)
        team, name = f"team-{number % TEAMS}", f"task-{number}"
        record = TEMPLATE.model_copy(
            update={
                "task_id": task_id,
                "team": team,
                "name": name,
                "client_key": f"key-{task_id}",
                "spec": TEMPLATE.spec.model_copy(update={"team": team, "name": name, "priority": number % 3}),
                "state": TaskState.QUEUED if waits else ENDED[number % 3],
                "submitted_at": at,
                "content_sha256": f"{number:064x}",
                "pool": DEFAULT_POOL,
                "train_key": f"data/{task_id}/train.arrow",
                "eval_key": f"data/{task_id}/eval.arrow",
            }
        )
        return {"task_id": task_id, **columns_of(record)}

    def close(self) -> None:
        self.queue.close()

    # --- what is measured: each leaves as many tasks waiting as it found -----------------------------------------

    def step(self) -> Took:
        order = next(order for order in self.cluster.held if isinstance(order, Train))
        worker = self.queue.get(order.task_id).worker
        self.cluster.preempt(worker, order.token)
        self.controller.wake()
        seconds = timed(self.controller.step)
        assert len(self.cluster.held) == WORKERS, "the worker got nothing"
        return seconds

    def submission(self) -> Took:
        self._turn += 1
        files = {f"{side}_file": str(self._folder / f"data/{side}.jsonl") for side in ("train", "eval")}
        data = files | {"eval_is_train": True}  # the same texts
        spec = task_spec(f"team-{self._turn % TEAMS}/new-{self._turn}", data=data, priority=-100)

        def submit() -> None:
            draft = check_submission(spec, self.settings, LAYOUT)
            admit(draft, self.settings, self.queue, self.storage, "bench")
            draft.close()

        return timed(submit)

    def claim(self) -> Took:
        found: list[str] = []

        def claim() -> None:
            now = time.time()
            order = running_order(self.queue.waiting({DEFAULT_POOL: 1}), self.queue.use_of_teams(now), now=now, limit=1)
            found.append(self.queue.apply(order[0], Claimed(token="bench", worker="worker-x", at=now)).task_id)

        seconds = timed(claim)
        self.queue.apply(
            found[0],
            TrainingFailed(
                token="bench", fault="preempted", message="the benchmark goes on", at=time.time(), seconds=0.0
            ),
        )
        return seconds

    def page(self) -> Took:
        return timed(lambda: self.queue.page(before=self._middle, limit=100))


def timed(work: Callable[[], Any]) -> Took:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def main(parts: list[str]) -> None:
    torch.set_num_threads(1)
    known = ("history", "claims", "schedule", "submissions", "memory", "first-step", "failover")
    if unknown := set(parts) - set(known):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"
    for part in parts or known:
        told = run_part(part)
        facts = json.loads(OUT.read_text()) if OUT.exists() else {}
        ran = {"date": datetime.now(UTC).date().isoformat(), "load": os.getloadavg()[0]}
        facts |= {"machine": machine, "parts": {**facts.get("parts", {}), part: ran}, **told}
        OUT.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written to {OUT.relative_to(ROOT)}")


def run_part(part: str) -> dict[str, Any]:
    """Its figures, by their names in the file."""
    if part == "schedule":
        return scheduled()
    if part in ("history", "claims"):
        folder = Path(tempfile.mkdtemp(prefix="onebasis-bench-queue-"))
        try:
            return history(folder) if part == "history" else claims(folder)
        finally:
            shutil.rmtree(folder)
    from benchmarks import queue_service  # Ray and a real service's modules: for these parts alone

    if part == "failover":
        return queue_service.failover()
    with queue_service.service() as site:
        if part == "submissions":
            return {"submissions_a_second": queue_service.submissions(site)}
        if part == "memory":
            return {"control_plane_mib": queue_service.memory(site)}
        return {"first_step": queue_service.first_step(site)}


def history(folder: Path) -> dict[str, Any]:
    rigs = {name: made(folder / name, *counts) for name, counts in SIZES.items()}
    results = [measured(what, rigs) for what in ("step", "submission", "claim", "page")]
    for rig in rigs.values():
        rig.close()
    return {"turns": TURNS, "sizes": SIZES, "ratios": ratios(results), "rows": results}


def claims(folder: Path) -> dict[str, Any]:
    """Milliseconds of one claim, by the number of tasks that wait."""
    rigs = {waiting: made(folder / str(waiting), waiting, 100) for waiting in WAITING}
    took: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    for turn in range(TURNS + 10):
        for waiting, rig in rigs.items():
            seconds, _ = rig.claim()
            if turn >= 10:  # the first ones find cold caches
                took[waiting].append(1000 * seconds)
    found = {}
    for waiting, rig in rigs.items():
        rig.close()
        ordered = sorted(took[waiting])
        p50, p99 = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
        found[str(waiting)] = {"p50": p50, "p99": p99}
        print(f"claim with {waiting:7,} waiting: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
    return {"claim_ms": found}


def made(folder: Path, waiting: int, ended: int) -> Rig:
    started = time.perf_counter()
    rig = Rig(folder, waiting, ended)
    print(f"{waiting:,} waiting and {ended:,} ended, made in {time.perf_counter() - started:.1f} s", flush=True)
    return rig


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of each the larger of the two ratios, on the clock and of the processor."""
    names = {"step": "loop_step", "submission": "submit", "claim": "claim"}
    return {
        f"{names[row['what']]}_100000_over_100": max(row["clock_ratio"], row["processor_ratio"])
        for row in results
        if row["what"] in names
    }


def scheduled() -> dict[str, Any]:
    """What simulations say of the scheduler: six teams of equal demand, two weeks, three seeds each."""
    started, simulated = time.process_time(), 0.0
    jain, inside, widths, waits = [], [], [], []
    for seed in range(3):
        # Of six places: half as much again is asked for as there is, and about seven tenths.
        for hours, found in ((5.0, jain), (2.4, None)):
            simulation = simulate(weeks(seed, hours=hours), {}, fixed(6))
            done = report(simulation)
            simulated += done["weeks"]
            if found is not None:
                told = [one for one in simulation.courses if one.told is not None]
                widths += [one.told.latest - one.told.earliest for one in told]
                waits += [one.wait_seconds for one in told]
            inside.append(done["start_in_stated_interval"])
            if found is not None:
                found.append(done["jain"])
    facts = {
        "jain_equal_demand": min(jain),
        "start_in_stated_interval": statistics.fmean(inside),
        "start_in_stated_interval_least": min(inside),
        "interval_over_wait_overloaded": statistics.median(widths) / statistics.median(waits),
        "weeks_a_second": simulated / (time.process_time() - started),
    }
    print(", ".join(f"{name} {value:.3f}" for name, value in facts.items()), flush=True)
    return facts


def measured(what: str, rigs: dict[str, Rig]) -> dict[str, Any]:
    """The same on both, in turns: whatever else the machine does, it does to both."""
    took: dict[str, list[Took]] = {name: [] for name in rigs}
    for turn in range(TURNS + 10):
        for name, rig in rigs.items():
            one = getattr(rig, what)()
            if turn >= 10:  # the first ones find cold caches
                took[name].append(one)
    row: dict[str, Any] = {"what": what}
    for place, kind in enumerate(("clock", "processor")):
        medians = {name: statistics.median(one[place] for one in found) for name, found in took.items()}
        row |= {f"{name}_{kind}_ms": 1000 * median for name, median in medians.items()}
        row[f"{kind}_ratio"] = medians["long"] / medians["short"]
    above = what != "page" and max(row["clock_ratio"], row["processor_ratio"]) > TARGET
    print(
        f"{what:11} short {row['short_clock_ms']:6.2f} ms, long {row['long_clock_ms']:6.2f} ms, ratio "
        f"{row['clock_ratio']:.2f}; of the processor {row['short_processor_ms']:6.2f} and "
        f"{row['long_processor_ms']:6.2f} ms, ratio {row['processor_ratio']:.2f}{f'  ABOVE {TARGET}' if above else ''}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
