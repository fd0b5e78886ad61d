"""Numbered merges of small random adapters, and the proof that each of them was done exactly once.

Merge number 3 is always the same adapters under the same op_key, whoever asks for it and however often.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from configs.errors import Unavailable
from configs.settings import StorageSettings
from subspace_store import Adapter, Storage, SubspaceStore, Version, digest, open_storage
from subspace_store.log.fold import Record
from subspace_store.log.version_log import VersionLog
from subspace_store.verify import verify
from tests.servers.cutting_proxy import OWN, CuttingProxy
from tests.subspace_store.builders import (
    deltas,
    fresh_storage,
    merged,
    opened,
    random_adapter,
    reading,
    relative_distance,
)

RANK_MAX = 12
"""Below the full rank of the test's modules: later merges truncate, so their order and number leave a trace."""


def op_key(number: int) -> str:
    return f"m{number}"


def adapters(number: int) -> dict[str, Adapter]:
    """The adapters of one merge: every third is a group of two."""
    names = ("a", "b") if number % 3 == 2 else ("a",)
    return {f"t{number}{name}": random_adapter(10 * number + at) for at, name in enumerate(names)}


def open_writer(storage: Storage, writer: str) -> SubspaceStore:
    return opened(storage, writer=writer, rank_max=RANK_MAX, beyond_rank_max="drop")


def merge(store: SubspaceStore, number: int) -> Version:
    """Upload and merge."""
    return merged(store, adapters(number), op_key(number))


def merge_through(proxy: CuttingProxy, place: StorageSettings, count: int) -> tuple[dict[int, int], int, int]:
    """Merge 0, 1, 2 … through a proxy, asking again with the same op_key after every `Unavailable`.

    Args:
        count: At least so many; more until a record was in doubt once and a retry met its own record once.

    Returns:
        Merge to version; how often a request was answered by `Unavailable`; how often of those a record was in doubt.
    """
    storage = open_storage(place.model_copy(update={"endpoint_url": proxy.endpoint_url}))
    heard: dict[int, int] = {}
    unavailable = doubts = 0
    store = None
    while len(heard) < count or not doubts or not proxy.counts[OWN]:
        assert len(heard) < 20 * count, "the plan is too kind"
        try:
            store = store or open_writer(storage, "writer")
            heard[len(heard)] = merge(store, len(heard)).number
        except Unavailable as error:
            unavailable += 1
            doubts += error.what.startswith("the outcome of merge is unknown")
    return heard, unavailable, doubts


def records(storage: Storage) -> list[Record]:
    """The whole log."""
    log = VersionLog(storage)
    log.open()
    return list(log.records())


def log_digests(storage: Storage) -> dict[str, str]:
    """Every record's key and what its bytes hash to."""
    return {key: digest(storage.read(key)) for key in storage.keys("log/") if key.endswith(".json")}


def prove(storage: Storage, heard: Mapping[int, int]) -> None:
    """A new reader finds every acknowledged merge once, as it was acknowledged, and the tasks as they should be.

    Args:
        heard: Merge to the version that was acknowledged. One more may be in the log: the last, unheard.
    """
    reader = reading(storage)
    made = {record.op_key: record.body["version"]["number"] for record in records(storage) if record.op == "merge"}
    assert {op_key(number): version for number, version in heard.items()}.items() <= made.items()
    # Merges were asked for in order, so merge n is version n + 1, and nothing is there twice.
    assert made == {op_key(number): number + 1 for number in range(len(made))}
    assert len(made) - len(heard) in (0, 1)
    assert sorted(reader.state.versions) == list(range(1, len(made) + 1))
    assert [record.op for record in records(storage)].count("merge") == len(made)
    for version in reader.state.versions.values():
        assert {task.task_id for task in version.added} == adapters(version.number - 1).keys()
        assert version.parent == version.number - 1
    assert verify(reader) == []
    _prove_tasks(reader, len(made))


def _prove_tasks(reader: SubspaceStore, count: int) -> None:
    """Every task is what a store that nothing ever happened to makes of it."""
    calm = open_writer(fresh_storage(), "calm")
    for number in range(count):
        merge(calm, number)
    for task_id in reader.state.tasks_at(count):
        found, expected = (deltas(store.adapter(task_id, count)) for store in (reader, calm))
        assert all(bool(torch.isfinite(delta).all()) for delta in found.values())
        assert relative_distance(found, expected, expected) < 1e-5


def seconds_per_merge(settings: StorageSettings) -> float:
    """How long one merge takes here, to aim kills at its inside."""
    store = open_writer(open_storage(settings), "clock")
    merge(store, 0)
    started = time.perf_counter()
    merge(store, 1)
    return time.perf_counter() - started
