"""Checking submissions in processes that can be ended: `python -m orchestrator.tasks.checking`.

A submission's files are read by libraries in C, which may hold the interpreter or crash, whatever Python does: a check
in a thread could not be ended, and would stop the control plane with it. So each runs in a process of its own. To
import what a check needs takes seconds; therefore one process imports it, does nothing else, and forks for each check,
which takes milliseconds. Forking it is safe, as its libraries have no threads but jemalloc's, which expects forks;
forking the control plane, full of threads, would not be.

The control plane and a check talk over a pair of sockets. Whatever closes the control plane's end (the deadline passed,
it was killed), the kernel ends the check by a signal, in the middle of C code too.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from configs.errors import InvalidInput, OnebasisError, TooSlow, Unavailable
from configs.settings import Settings
from configs.task_spec import TaskSpec
from orchestrator.tasks.admission import Draft, FrozenAdapter, check_submission
from workers.orders import BaseLayout
from workers.rows.frozen_rows import FrozenRows

CHECK_SECONDS = 1800.0
"""Longest check: ten gigabytes of rows, at 100,000 rows a second."""
GRACE_SECONDS = 5.0
"""Time after the deadline, at which the control plane ends a check and says why, until the check ends without that."""
START_SECONDS = 60.0
"""Longest wait until the forking process takes a check: on a busy machine its imports take ten seconds."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"} | {
    "TOKENIZERS_PARALLELISM": "false"
}
"""Environment in which numpy, torch and pyarrow start no thread when they are imported: a fork would lose it."""
Part = TypeVar("Part", FrozenRows, FrozenAdapter)
FILES_MAX = 3
"""Files of a draft: rows to train on, rows to evaluate on, an adapter."""
_LENGTH = struct.Struct("!Q")


class Checker:
    """Checks submissions, each in a process of its own. Safe for several threads.

    Args:
        seconds: Deadline of a check.
        module: Module that the forking process runs.
    """

    def __init__(self, seconds: float = CHECK_SECONDS, module: str = __spec__.name) -> None:
        self._seconds = seconds
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def start(self) -> None:
        """Start the forking process, if it does not run. A check does so itself; calling this before saves the first
        check the wait."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._end()
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", self._module]
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=os.environ | _ONE_THREAD
                )
            self._requests = ours

    def close(self) -> None:
        """End the forking process; a check that runs is answered as `Unavailable`."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._requests = None

    def check(self, spec: TaskSpec, settings: Settings, layout: BaseLayout) -> Draft:
        """`check_submission` in a process of its own.

        Raises:
            InvalidInput: As `check_submission`; or the process died while it read the files.
            TooSlow: The check took longer than it may.
            Unavailable: No process could be started.
        """
        with self._connected() as check:
            _send(check, (spec, settings, layout, self._seconds))
            check.settimeout(self._seconds)
            try:
                answer, files = _receive(check)
            except TimeoutError:
                raise TooSlow(
                    f"checking the files of {spec.team}/{spec.name} took longer than {self._seconds:.0f} s",
                    "data",
                    "bring fewer rows, or files that are not packed",
                    self._seconds,
                ) from None
            except (EOFError, OSError) as error:
                raise InvalidInput(
                    f"the process that checked {spec.team}/{spec.name} ended without an answer: its files need more"
                    " memory than there is, or a library crashed on them",
                    "data",
                    "bring fewer rows, or the same in another format",
                ) from error
        match answer:
            case Draft():
                return _with_files(answer, files)
            case OnebasisError():
                raise answer
        raise RuntimeError(f"checking {spec.team}/{spec.name} failed:\n{answer}")

    @contextlib.contextmanager
    def _connected(self) -> Any:
        """A connection to a new process, which is ended with it."""
        self.start()
        ours, theirs = socket.socketpair()
        with ours:
            try:
                with theirs, self._lock:
                    if self._requests is None:
                        raise EOFError
                    self._requests.settimeout(START_SECONDS)
                    socket.send_fds(self._requests, [b"."], [theirs.fileno()])
                ours.settimeout(START_SECONDS)
                _exactly(ours, 1)
            except (EOFError, OSError) as error:  # it was killed or stopped
                self.close()
                raise Unavailable("no process could be started to check the files", todo="submit again") from error
            yield ours


def _with_files(draft: Draft, files: list[int]) -> Draft:
    """The draft with the temporary files that the check wrote, in the order of `_without_files`."""
    opened = (open(handle, "rb") for handle in files)  # noqa: SIM115 (Draft.close)
    return _replaced(draft, lambda _: next(opened))


def _without_files(draft: Draft) -> tuple[Draft, list[int]]:
    handles: list[int] = []

    def taken_out(file: Any) -> Any:
        with contextlib.suppress(AttributeError):
            file.rollover()  # what is in memory has no descriptor
        file.flush()
        handles.append(os.dup(file.fileno()))  # the file itself is closed with its last name

    return _replaced(draft, taken_out), handles


def _replaced(draft: Draft, other: Callable[[Any], Any]) -> Draft:
    """The draft with other files: of its training rows, its evaluation rows, its adapter, as far as it has them."""

    def with_other(part: Part | None) -> Part | None:
        return replace(part, file=other(part.file)) if part else None

    train, evaluation = with_other(draft.rows.train), with_other(draft.rows.evaluation)
    adapter = with_other(draft.adapter)
    return replace(draft, rows=replace(draft.rows, train=train, evaluation=evaluation), adapter=adapter)


# --- what both sides say -----------------------------------------------------------------------------------------


def _send(to: socket.socket, value: Any, files: list[int] | None = None) -> None:
    content = pickle.dumps(value)
    socket.send_fds(to, [_LENGTH.pack(len(content))], files or [])
    to.sendall(content)


def _receive(source: socket.socket) -> tuple[Any, list[int]]:
    head, files, _, _ = socket.recv_fds(source, _LENGTH.size, FILES_MAX)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(_exactly(source, *_LENGTH.unpack(head))), list(files)


def _exactly(source: socket.socket, count: int) -> bytearray:
    content = bytearray(count)
    view = memoryview(content)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return content


# --- the processes -----------------------------------------------------------------------------------------------


def import_beforehand() -> None:
    """Import what a check would import itself, every time: pandas by pyarrow, transformers to write chats with and to
    count tokens."""
    ours = ("subspace_store.formats.peft", "workers.compatibility", "workers.heads", "workers.tokens")
    chats, tokens = "transformers.utils.chat_template_utils", "transformers.tokenization_utils_fast"
    # transformers.models looks through its hundreds of folders: ten times what reading a tokenizer takes after that.
    for name in (*ours, "numpy", "pyarrow", "pandas", "jinja2.sandbox", chats, tokens, "transformers.models"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    """Fork for each connection that comes in by stdin, until the control plane is gone."""
    import_beforehand()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps checks that ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=0) as requests:
        while True:
            _, handles, _, _ = socket.recv_fds(requests, 1, 1)
            if not handles:
                return
            if os.fork() == 0:
                requests.detach()
                _check_one(handles[0])
            os.close(handles[0])


def _check_one(handle: int) -> None:
    """One check, from the request to the answer; ends the process."""
    try:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, this process is killed, and not the control plane
        with socket.socket(fileno=handle) as control_plane:
            control_plane.sendall(b".")
            (spec, settings, layout, seconds), _ = _receive(control_plane)
            with _ended_with(control_plane, seconds):
                answer, files = _answer(spec, settings, layout)
            _send(control_plane, answer, files)
    except (EOFError, OSError):
        pass  # no caller waits for the answer any more
    finally:
        os._exit(0)


@contextlib.contextmanager
def _ended_with(control_plane: socket.socket, seconds: float) -> Any:
    """The kernel ends this process when the other end is closed (SIGIO), and some time after the
    deadline in any case."""
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
    handle = control_plane.fileno()
    fcntl.fcntl(handle, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_ASYNC)
    yield
    fcntl.fcntl(handle, fcntl.F_SETFL, flags)  # the answer being read is a signal too


def _answer(spec: TaskSpec, settings: Settings, layout: BaseLayout) -> tuple[Any, list[int]]:
    try:
        return _without_files(check_submission(spec, settings, layout))
    except OnebasisError as error:
        return error, []
    except Exception:
        return traceback.format_exc(), []


if __name__ == "__main__":
    main()
