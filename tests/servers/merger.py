"""A store's writer as a process of its own that can be killed, stopped and continued by its pid.

It is forked from a server process that has imported everything, so that a life begins in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from configs.errors import OnebasisError, Unavailable
from configs.settings import StorageSettings
from subspace_store import SubspaceStore, merge_writer, open_storage
from subspace_store.log import version_log
from tests.servers.merges import merge, open_writer
from tests.servers.server import CREDENTIALS

EVERY = 8
"""Records between checkpoints, and versions between snapshots, instead of 64: kills shall meet these too."""
ANSWER_SECONDS = 30
PAUSE_SECONDS = 0.05
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.servers.merger", "subspace_store.storage.s3", "subspace_store.storage.local"])


@dataclass(frozen=True)
class Opened:
    """The writer has its epoch."""

    epoch: int


@dataclass(frozen=True)
class Merged:
    """Acknowledged."""

    number: int
    version: int


@dataclass(frozen=True)
class Unknown:
    """The outcome of a merge is unknown; the writer asks again."""

    what: str


@dataclass(frozen=True)
class Stopped:
    """The writer ended with an error."""

    kind: str
    what: str


Answer = Opened | Merged | Unknown | Stopped


def live(answers: Connection, settings: StorageSettings, name: str, first: int, last: int) -> None:
    """Open, then merge number first … last − 1, saying what happened after each step; `Unavailable` is asked again."""
    for module, constant in ((version_log, "CHECKPOINT_EVERY"), (merge_writer, "SNAPSHOT_EVERY")):
        assert hasattr(module, constant)
        setattr(module, constant, EVERY)
    os.environ.update(CREDENTIALS)
    torch.set_num_threads(1)
    store: SubspaceStore | None = None
    number = first
    while number < last:
        try:
            if store is None:
                store = open_writer(open_storage(settings), name)
                answers.send(Opened(store.state.epoch))
            version = merge(store, number)
        except Unavailable as error:
            answers.send(Unknown(str(error)))
            time.sleep(PAUSE_SECONDS)
        except OnebasisError as error:
            answers.send(Stopped(error.kind, str(error)))
            sys.exit(error.exit_code)
        else:
            answers.send(Merged(number, version.number))
            number += 1


class Writer:
    """The handle on one such process. `answers` is what it has said so far."""

    def __init__(self, settings: StorageSettings, name: str, first: int, last: int = sys.maxsize) -> None:
        self.answers: list[Answer] = []
        self._pipe, theirs = _processes.Pipe(duplex=False)
        self._process = _processes.Process(target=live, args=(theirs, settings, name, first, last), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def merged(self) -> dict[int, int]:
        """Merge to version, as acknowledged."""
        return {answer.number: answer.version for answer in self.answers if isinstance(answer, Merged)}

    def wait_for(self, merges: int) -> None:
        """Wait until it has opened the store and acknowledged so many merges."""
        while len(self.merged) < merges or not any(isinstance(answer, Opened) for answer in self.answers):
            assert self._hear(ANSWER_SECONDS), f"it ended: {self.answers[-3:]}"

    def signal(self, number: signal.Signals) -> None:
        """Kill, stop or continue it; what it had said by then is in `answers`."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        if number == signal.SIGSTOP:
            # Stopping is not instantaneous: wait until the kernel says so.
            while _state(self._process.pid) != "T":
                time.sleep(0.001)
            while self._pipe.poll() and self._hear(0):
                pass

    def end(self) -> int:
        """Wait for its end; its exit code."""
        until = time.monotonic() + ANSWER_SECONDS
        while self._hear(ANSWER_SECONDS):
            assert time.monotonic() < until, f"it goes on: {self.answers[-3:]}"
        self._process.join(ANSWER_SECONDS)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """kill -9 and wait; what it had said by then is in `answers`."""
        self.signal(signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, f"it had ended: {self.answers[-3:]}"

    def _hear(self, seconds: float) -> bool:
        """Wait for one answer; False when it has ended."""
        assert self._pipe.poll(seconds), f"nothing heard for {seconds} s after {self.answers[-3:]}"
        try:
            self.answers.append(self._pipe.recv())
        except EOFError:
            return False
        return True


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
