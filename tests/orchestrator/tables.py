"""Version logs written by hand, for tests of tables, forgetting and the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from subspace_store import BlobRef, MergedTask, SubspaceState, TaskScore, Version

BLOB = BlobRef("blobs/x", 1, "00" * 32)


def version(number: int, parent: int, added: Sequence[str], drift: Mapping[str, float] | None = None) -> Version:
    """A version that brought some tasks and moved others."""
    tasks = tuple(MergedTask(t, f"red/{t}", number, BLOB, BLOB, 1.0, 2, 0.01) for t in added)
    return Version(number, parent, 1000.0 + number, tasks, BLOB, BLOB, {"m": (2, 2)}, drift or {})


def state(
    versions: Sequence[Version], scores: Mapping[int, Mapping[str, float]], main: int | None = None
) -> SubspaceState:
    """What a log says that holds these versions and measured scores."""
    newest = max((v.number for v in versions), default=0)
    return SubspaceState(
        versions={v.number: v for v in versions},
        scores={n: {t: TaskScore(t, score, 100) for t, score in row.items()} for n, row in scores.items()},
        refs={"main": newest if main is None else main, "candidate": newest if main is None else main},
    )
