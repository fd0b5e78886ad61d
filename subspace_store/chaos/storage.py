"""The simulation's disk as one process sees it: at every call the turn may pass on, and the call may fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from configs.errors import StoreFull, Unavailable
from subspace_store.chaos.world import (
    COMMIT_TIMES,
    CRASH_AFTER,
    CRASH_BEFORE,
    CRASH_LATE,
    CUT,
    CUT_CALLS,
    FAULTS,
    FULL,
    FULL_CALLS,
    LATE,
    LOST_REPLY,
    LOST_REQUEST,
    ON_READS,
    STALL,
    STALL_STEPS,
    TWICE,
    Crash,
    T,
    World,
)
from subspace_store.storage.protocol import ObjectStream, check_head


class ChaosStorage:
    """The disk as one process sees it.

    Args:
        process: Name of the process in the trace.
    """

    def __init__(self, world: World, process: str) -> None:
        self.world = world
        self.process = process
        self.dead = False
        self.cut_calls = 0
        self.full_calls = 0

    @property
    def url(self) -> str:
        return "chaos:"

    def read(self, key: str) -> bytes:
        return self._look(f"read {key}", lambda: self.world.disk.read(key))

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        return self._look(f"view {key} {start} {size}", lambda: self.world.disk.view(key, start, size))

    def keys(self, prefix: str, after: str = "") -> list[str]:
        return self._look(f"list {prefix} {after}".rstrip(), lambda: self.world.disk.keys(prefix, after))

    def create(self, key: str, content: bytes) -> bool:
        mine = bytes(content)
        return self._change(f"create {key}", lambda: self.world.create(key, mine), needs_space=True)

    def write(self, key: str, content: bytes) -> None:
        mine = bytes(content)
        self._change(f"write {key}", lambda: self.world.write(key, mine), needs_space=True)

    def delete(self, key: str) -> None:
        self._change(f"delete {key}", lambda: self.world.delete(key))

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        return self.world.disk.abandon(prefix, idle_seconds)  # the disk never holds a part of an object

    def stream(self, key: str, head_size: int) -> AbstractContextManager[ObjectStream]:
        return contextlib.nullcontext(_ChaosStream(self, key, head_size))

    def _look(self, what: str, look: Callable[[], T]) -> T:
        self._begin(what, ON_READS)
        return look()

    def _change(self, what: str, effect: Callable[[], T], needs_space: bool = False) -> T:
        fault = self._begin(what, FAULTS)
        if fault == FULL:
            self.full_calls = self.world.random.randint(1, FULL_CALLS)
        if needs_space and self.full_calls:
            self.full_calls -= 1
            raise StoreFull("no space left", what)
        if fault in (LATE, CRASH_LATE):
            self.world.later(what, effect)
            raise self._crash() if fault == CRASH_LATE else Unavailable("timed out", what)
        result = effect()
        if fault == CRASH_AFTER:
            raise self._crash()
        if fault in (LOST_REPLY, CUT):
            raise Unavailable("connection lost after the request", what)
        if fault == TWICE:
            # A client library sent it again: its second answer is the one that arrives, or its first request is still
            # on its way when the second was answered.
            if self.world.random.random() < 0.5:
                return effect()
            self.world.later(what, effect)
        return result

    def _begin(self, what: str, kinds: tuple[str, ...]) -> str | None:
        """Let other machines run; raise a fault that comes before the effect, return one that comes after it."""
        if self.dead:
            raise Crash
        world, machine = self.world, self.world.running
        world.counts["storage calls"] += 1
        if machine is None:
            world.note(self.process, what)
            return None
        # More faults at the commit point: only there an outcome can be in doubt.
        fault = world.fault(kinds, COMMIT_TIMES if what.startswith("create log/") else 1)
        if fault == STALL:
            machine.sleeps_until = world.step + world.random.randint(1, STALL_STEPS)
        world.switch(machine)
        cut = self.cut_calls > 0
        world.note(self.process, what + (f"  [{fault}]" if fault else "") + ("  [still cut off]" if cut else ""))
        if fault == CRASH_BEFORE:
            raise self._crash()
        if cut or fault == LOST_REQUEST:
            self.cut_calls -= cut
            raise Unavailable("connection lost before the request", what)
        if fault == CUT:
            self.cut_calls = world.random.randint(1, CUT_CALLS)
            if kinds == ON_READS:
                raise Unavailable("connection lost", what)
        return fault

    def _crash(self) -> Crash:
        self.dead = True
        return Crash()


class _ChaosStream:
    """Parts are not stored before the head comes, as in every storage; a crash between them leaves nothing."""

    def __init__(self, storage: ChaosStorage, key: str, head_size: int) -> None:
        self.storage, self.key, self.head_size = storage, key, head_size
        self.content = bytearray()

    def append(self, content: bytes | memoryview) -> None:
        self.content += content

    def finish(self, head: bytes) -> None:
        self.storage.write(self.key, check_head(head, self.head_size) + self.content)
