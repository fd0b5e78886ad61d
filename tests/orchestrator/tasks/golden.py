"""Writes the golden task database of a release: `python -m tests.orchestrator.tasks.golden release-0.4`.

Run it once with the code of a release, when that release changed the tables or the records; those of earlier releases
stay as they are, for ever. Release 0.3, whose modules lay elsewhere, was written by this file in a checkout of its tag.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.builders import task_record, trained
from workers.orders import Point

try:
    from orchestrator.tasks import task_events as events
    from orchestrator.tasks.task_queue import TaskQueue
    from orchestrator.tasks.task_record import TaskRecord
except ModuleNotFoundError:  # release 0.3
    from orchestrator.task_queue import TaskQueue  # type: ignore[no-redef,import-not-found]
    from orchestrator.task_record import TaskRecord  # type: ignore[no-redef,import-not-found]

    from orchestrator import task_lifecycle as events  # type: ignore[no-redef,attr-defined]

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "databases"
REFINE = {"method": {"refine_epochs": 1}}


def lives() -> dict[str, tuple[TaskRecord, list[Any]]]:
    """Title to a task and what happens to it: every state, and every number that a record can hold."""
    claimed = events.Claimed(token="tok", worker="worker-0", at=1010.0)
    done = events.TrainingDone(trained("tok", seconds=100.0, metrics={"f1_macro": 0.5}), 1120.0)
    refined = events.TrainingDone(trained("ref", seconds=20.0), 1200.0)
    merged = [claimed, done, events.MergeBegun("merge:1"), events.Merged(3)]
    passed = events.Judged(True, "fine", 1300.0)
    found = {
        "red/queued": [],
        "red/urgent": [],
        "red/again": [
            claimed,
            events.TrainingFailed(token="tok", fault="lost", message="worker-0 was lost", at=1020.0),
        ],
        "red/training": [claimed],
        "blue/merging": [claimed, done],
        "blue/refining": [*merged, events.Claimed(token="ref", worker="worker-1", at=1150.0)],
        "blue/evaluating": merged,
        "blue/published": [*merged, passed],
        "blue/refined": [
            *merged,
            events.Claimed(token="ref", worker="worker-1", at=1150.0),
            refined,
            events.Refined(4),
            passed,
            events.RefinedAgain(message="refined again", token="6-again", seconds=30.0, at=1400.0),
        ],
        "red/rejected": [*merged, events.Judged(False, "worse", 1300.0)],
        "red/rolled-back": [*merged, passed, events.RolledBack("main is version 2", 1350.0)],
        "red/parked": [claimed, events.TrainingFailed(token="tok", fault="input", message="row 3", at=1030.0)],
        "red/cancelled": [events.CancelRequested("ann", 1005.0)],
    }
    tasks = {}
    for number, (title, steps) in enumerate(found.items()):
        spec: dict[str, Any] = {"priority": 7} if title == "red/urgent" else {}
        if "refin" in title:
            spec |= REFINE
        tasks[title] = (task_record(title, spec, submitted_at=1000.0 + number), steps)
    return tasks


def write(name: str) -> None:
    """The database, packed, and beside it what any later code must read out of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.db"
        queue = TaskQueue(f"sqlite:///{file}")
        for record, steps in lives().values():
            queue.add(record)
            for step in steps:
                queue.apply(record.task_id, step)
        queue.heartbeat("t-red-training", "tok", 1070.0, {"step": 3, "loss": 0.5})
        queue.append_log(
            "t-red-training", ["a line", Point(at=1015.0, step=3, loss=0.5, learning_rate=0.001, machine={"cpu": 50.0})]
        )
        (GOLDEN / f"{name}.json").write_text(json.dumps(facts(queue), indent=1) + "\n")
        queue.close()
        (GOLDEN / f"{name}.db.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))


def unpacked(release: str, folder: Path) -> str:
    """A copy of a release's database."""
    file = folder / "tasks.db"
    file.write_bytes(gzip.decompress((GOLDEN / f"{release}.db.gz").read_bytes()))
    return f"sqlite:///{file}"


def facts(queue: TaskQueue) -> dict[str, Any]:
    """What is asked of every release's database."""
    return {
        record.title: {
            "task_id": record.task_id,
            "state": str(record.state),
            "attempt": record.attempt,
            "version": record.version,
            "priority": record.spec.priority,
            "token": record.token,
            "local_score": record.local_score,
            "refined_seconds": record.refined_seconds,
            "events": [[event.kind, event.text] for event in queue.events(record.task_id)],
            "progress": queue.progress(record.task_id),
        }
        for record in queue.tasks()
    }


if __name__ == "__main__":
    write(sys.argv[1])
