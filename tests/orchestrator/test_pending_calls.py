"""What the loop has under way and what wakes it."""

from __future__ import annotations

import threading
from pathlib import Path

from orchestrator.pending_calls import PendingCalls
from subspace_store import open_storage
from tests.builders import BASE, settings
from tests.orchestrator.stand_in_cluster import StandInCluster


class SetMeanwhile(threading.Event):
    """Another thread sets it right after it was first looked at."""

    def is_set(self) -> bool:
        before = super().is_set()
        self.set()
        return before


def test_a_wake_that_comes_while_the_loop_looks_is_seen_at_its_next_look(tmp_path: Path) -> None:
    chosen = settings(tmp_path, storage={"url": "memory:pending_calls"})
    pending_calls = PendingCalls(StandInCluster(chosen, {BASE: open_storage(chosen.storage, BASE)}))
    pending_calls._awake = SetMeanwhile()
    assert [pending_calls.woken(), pending_calls.woken()] == [False, True]
