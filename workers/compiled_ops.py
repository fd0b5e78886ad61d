"""Compiles parts of DeepSpeed before their first use on a machine, in a process of its own, and reports on it.

If they were compiled on first use, in the middle of a task, the task would be silent for minutes and could not be
cancelled. And a process that is killed meanwhile leaves torch's lock file behind, for which the next one waits for
ever. Here the lock is one of the operating system's, which ends with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

POLL_SECONDS = 0.5
TOLD_EVERY_SECONDS = 30.0
OUTPUT_CHARACTERS = 2000  # the end of a compiler's output


@dataclass(frozen=True)
class Watch:
    """Callbacks of a compilation: one takes its messages, the other may end it."""

    say: Callable[[str], None]
    """Takes lines for the task's log."""
    stop: Callable[[], None]
    """Called now and then; raises what the control plane asked for."""


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


class Interrupted(Exception):
    """A compilation was ended because its task was; `__cause__` is the exception that ended the task."""


class CompilationFailed(RuntimeError):
    """A compiler failed; the message has the end of its output."""


@contextlib.contextmanager
def watched(say: Callable[[str], None], stop: Callable[[], None]) -> Iterator[None]:
    """Report on what is compiled inside the block, and end it when `stop` raises."""
    token = _WATCH.set(Watch(say, stop))
    try:
        yield
    finally:
        _WATCH.reset(token)


def interruption(error: BaseException) -> BaseException | None:
    """The exception that ended a task and its compilation, if it is behind this error; DeepSpeed wraps every error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, Interrupted):
        found = found.__cause__ or found.__context__
    return None if found is None else found.__cause__


def compile_first(name: str, folder: Path, stamp: str, command: Sequence[str]) -> None:
    """Compile a part, unless that was done on this machine.

    Args:
        name: Name of the part, for people.
        folder: Where torch builds it, shared by the processes of the machine.
        stamp: Text of all that the result depends on; with another stamp the part is compiled again.
        command: Command that compiles it, in a process of its own.

    Raises:
        Interrupted: The task was told to stop; the compiler has ended.
        CompilationFailed: The compiler failed.
    """
    watch = _WATCH.get() or Watch(say=lambda line: None, stop=lambda: None)
    done = folder / "onebasis-compiled"
    folder.mkdir(parents=True, exist_ok=True)
    if _is_stamped(done, stamp):
        return
    started = time.monotonic()
    with (folder / "onebasis-lock").open("wb") as lock:
        if not _take(lock):
            watch.say(f"waits for another process of this machine that compiles DeepSpeed's {name}")
            while not _take(lock):
                _pause(watch)
        if _is_stamped(done, stamp):
            return
        # No other caller of this function compiles now: torch's lock file, if no process has it open, is a leftover.
        if not _is_open(folder / "lock"):
            (folder / "lock").unlink(missing_ok=True)
        watch.say(f"compiles DeepSpeed's {name}, once on this machine; this takes minutes")
        _run(name, command, lock, watch, started)
        done.write_text(stamp, encoding="utf-8")
        watch.say(f"compiled DeepSpeed's {name} in {time.monotonic() - started:.0f} s")


def _run(name: str, command: Sequence[str], lock: BinaryIO, watch: Watch, started: float) -> None:
    with tempfile.TemporaryFile() as output:
        # It inherits the lock: while it outlives a worker that was killed, the next caller waits for it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, pass_fds=(lock.fileno(),)
        )
        told = started
        try:
            while process.poll() is None:
                _pause(watch)
                if time.monotonic() - told >= TOLD_EVERY_SECONDS:
                    told = time.monotonic()
                    watch.say(f"still compiles DeepSpeed's {name}, for {told - started:.0f} s now")
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")[-OUTPUT_CHARACTERS:]
            raise CompilationFailed(f"Error building extension {name!r}: {said}")


def _pause(watch: Watch) -> None:
    time.sleep(POLL_SECONDS)
    try:
        watch.stop()
    except Exception as error:
        raise Interrupted from error


def _take(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_stamped(file: Path, stamp: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == stamp
    except OSError:
        return False


def _is_open(file: Path) -> bool:
    """Whether a process has it open. torch's lock is a file that its holder keeps open."""
    wanted = str(file.resolve())
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) == wanted:
                return True
    return False


def python(statement: str) -> list[str]:
    """A command that runs a statement in this Python."""
    return [sys.executable, "-c", statement]
