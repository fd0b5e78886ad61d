"""Version logs written by hand, for tests of tables, forgetting and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from subspace_store import BlobRef, MergedTask, SubspaceState, TaskScore, Version

BLOB = BlobRef(key="blobs/x", size_bytes=1, sha256="00" * 32)


Drifts = tuple[Version, Mapping[str, float]]


def version(number: int, parent: int, added: Sequence[str], drift: Mapping[str, float] | None = None) -> Drifts:
    """A version that brought some tasks, and by how much it moved others."""
    tasks = tuple(
        MergedTask(
            task_id=t,
            name=f"red/{t}",
            version=number,
            adapter=BLOB,
            coefficients=BLOB,
            delivered_energy=1.0,
            rank_total=2,
            error_at_birth=0.01,
        )
        for t in added
    )
    return Version(
        number=number,
        parent=parent,
        created_at=1000.0 + number,
        added=tasks,
        basis=BLOB,
        transport=BLOB,
        module_count=1,
        rank_max=2,
    ), drift or {}


def state(
    versions: Sequence[Drifts], scores: Mapping[int, Mapping[str, float]], main: int | None = None
) -> SubspaceState:
    """What a log says that holds these versions and measured scores."""
    newest = max((v.number for v, _ in versions), default=0)
    bare = SubspaceState(versions={v.number: v for v, _ in versions})
    moved = {
        v.number: tuple(drift.get(task, 0.0) for task in bare.tasks_at(v.parent) if task not in v.left)
        for v, drift in versions
    }
    return SubspaceState(
        versions={number: replace(v, drift=moved[number]) for number, v in bare.versions.items()},
        scores={
            n: {t: TaskScore(task_id=t, score=score, count=100) for t, score in row.items()}
            for n, row in scores.items()
        },
        refs={"main": newest if main is None else main, "candidate": newest if main is None else main},
    )
