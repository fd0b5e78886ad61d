"""How the processes of this machine that do orders end: with which exit code, by which signal, with how much memory.

Only a parent is told how its child ended, and the parent of a Ray worker is the raylet, which ignores it (2.60: SIGCHLD
is ignored, so the kernel forgets the process at once). But Linux since 6.15 tells it to whoever holds a pidfd. On an
older kernel it is known that the process ended while its machine went on, how much memory it had, and whether the
kernel or Ray's memory monitor ended it for that; the exit code and the signal are not. Linux only: elsewhere nothing is
known, and a worker that is gone is a lost machine.

The most memory that a process had is what the last look before its end found, four times a second: it had at least
that.

A plain class that reads /proc, tested without Ray; the actor around it is `process_monitor_actor.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 0.25
"""Interval between two looks at the memory of the processes."""
OOM_SECONDS = 10.0
"""Time from the kernel's decision to end a process for its memory until the process is gone: it has to give back all of
it first."""
KEPT = 200
"""Number of ends that are remembered."""
LOG_BYTES = 256 * 1024
"""Length of the end of the raylet's log in which its memory monitor's verdict is looked for: it is written before the
process is ended."""
PIDFD_GET_INFO, PIDFD_INFO_EXIT, EXIT_CODE_AT = 0xC040FF0B, 1 << 3, 60
"""Request, mask and offset in its 64 bytes, of linux/pidfd.h."""
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """How a process ended, with the memory figures."""

    pid: int
    exit_code: int | None = None
    """Exit code; None where a signal ended it, or where the kernel does not say."""
    signal: int | None = None
    """Number of the signal that ended it."""
    peak_bytes: int = 0
    """Most memory that it had when it was looked at; 0: it was not."""
    limit_bytes: int = 0
    """Memory that it could have had; 0: not known."""
    limit_of: str = ""
    """What has that limit: its cgroup or the machine."""
    out_of_memory: str = ""
    """Who ended it because memory ran out, and why; empty where that is not known to be the cause."""
    is_largest: bool = True
    """Whether none of the other processes that are watched here had more memory."""

    @property
    def is_its_own(self) -> bool:
        """Whether it is put down to what the process did: its machine went on, since that is where this was seen. Not
        so where it was ended for memory although another process had more."""
        return self.is_largest or not self.out_of_memory

    def __str__(self) -> str:
        memory = f"it had at least {self.peak_bytes / GIB:.2f} GiB" if self.peak_bytes else ""
        if memory and self.limit_bytes:
            memory += f" of the {self.limit_bytes / GIB:.2f} GiB of {self.limit_of}"
        if self.out_of_memory:
            larger = "" if self.is_largest else "another worker of the machine had more"
            return "; ".join(filter(None, (f"memory ran out: {self.out_of_memory}", memory, larger)))
        if self.signal is not None:
            ended = f"it was ended by signal {self.signal} ({_signal_name(self.signal)})"
        elif self.exit_code is not None:
            ended = f"it ended itself with exit code {self.exit_code}"
        else:
            ended = "its exit code or signal is not known (Linux tells it since 6.15)"
        return "; ".join(filter(None, (ended, memory)))


@dataclass
class _Watched:
    """A process that is there."""

    pid: int
    fd: int
    limit: tuple[int, str]
    oom: Path | None
    """File that counts the processes of its cgroup that the kernel has ended for memory."""
    peak_bytes: int = 0
    now_bytes: int = 0


class ProcessMonitor:
    """Watches processes of this machine, of this user. Thread-safe.

    Args:
        raylet_log: What the raylet of this machine writes; None: it is not looked at.
    """

    def __init__(self, raylet_log: Path | None = None) -> None:
        self._raylet_log = raylet_log
        self._changed = threading.Condition()
        self._watched: dict[int, _Watched] = {}
        self._ends: dict[int, ProcessEnd] = {}
        self._killed: deque[tuple[float, Path | None, int]] = deque()
        """When and where it was read how many processes the kernel had ended for memory."""
        threading.Thread(target=self._look_for_ever, name="process monitor", daemon=True).start()

    def watch(self, pid: int) -> None:
        """Watch a process from now on. One that is watched already stays so."""
        with self._changed:
            if pid in self._watched or not hasattr(os, "pidfd_open"):
                return
            with contextlib.suppress(OSError):  # gone already, or a kernel before 5.3
                found = _Watched(pid, os.pidfd_open(pid), memory_limit(pid), _oom_file(pid))
                self._ends.pop(pid, None)  # of an earlier process with this number
                self._watched[pid] = found
                self._changed.notify_all()

    def end_of(self, pid: int, wait_seconds: float) -> ProcessEnd | None:
        """How a process ended, after waiting at most this long for its end; None: it lives.

        Of one that is gone and was not watched (the monitor was itself ended, and started anew) no more is known than
        what Ray wrote of it.
        """
        until = time.monotonic() + wait_seconds
        with self._changed:
            while pid in self._watched and time.monotonic() < until:
                self._changed.wait(max(0.0, until - time.monotonic()))
            if (end := self._ends.get(pid)) or (PROC / str(pid)).exists():
                return end
        verdict, is_largest = ray_verdict(self._raylet_log, pid)
        return ProcessEnd(pid=pid, out_of_memory=verdict, is_largest=is_largest)

    def _look_for_ever(self) -> None:
        while True:
            with self._changed:
                while not self._watched:
                    self._changed.wait()
                watched = list(self._watched.values())
            poll = select.poll()
            by_fd = {one.fd: one for one in watched}
            for fd in by_fd:
                poll.register(fd, select.POLLIN)
            ended = [(by_fd[fd], _status(by_fd[fd])) for fd, _ in poll.poll(1000 * LOOK_SECONDS)]
            for one, status in ended:
                end = self._end(one, status)
                with self._changed:
                    os.close(self._watched.pop(one.pid).fd)
                    self._ends[one.pid] = end
                    for old in list(self._ends)[:-KEPT]:
                        del self._ends[old]
                    self._changed.notify_all()
            self._look(watched)

    def _look(self, watched: list[_Watched]) -> None:
        for one in watched:
            limit, oom = memory_limit(one.pid), _oom_file(one.pid)
            peak, now = _memory(one.pid)
            if now:  # it may have been moved to another cgroup; one that ends is in none any more
                one.limit, one.oom = limit, oom
            one.peak_bytes, one.now_bytes = max(one.peak_bytes, peak, now), now or one.now_bytes
        at = time.monotonic()
        for file in {one.oom for one in watched}:
            self._killed.append((at, file, _oom_kills(file)))
        while self._killed and at - self._killed[0][0] > OOM_SECONDS:
            self._killed.popleft()

    def _end(self, one: _Watched, status: int | None) -> ProcessEnd:
        number = status & 0x7F if status is not None else 0
        with self._changed:
            others = [other.now_bytes for other in self._watched.values() if other is not one]
        limit_bytes, limit_of = one.limit
        verdict, is_largest = ray_verdict(self._raylet_log, one.pid)
        return ProcessEnd(
            pid=one.pid,
            exit_code=None if status is None or number else status >> 8 & 0xFF,
            signal=number or None,
            peak_bytes=one.peak_bytes,
            limit_bytes=limit_bytes,
            limit_of=limit_of,
            out_of_memory=verdict or self._kernels_verdict(one, status),
            is_largest=is_largest and one.now_bytes >= max(others, default=0),
        )

    def _kernels_verdict(self, one: _Watched, status: int | None) -> str:
        before = next((count for _, file, count in self._killed if file == one.oom), None)
        is_killed = status is None or status & 0x7F == signal.SIGKILL
        if is_killed and before is not None and _oom_kills(one.oom) > before:
            return "the kernel's out-of-memory killer ended it"
        return ""


def ray_verdict(raylet_log: Path | None, pid: int) -> tuple[str, bool]:
    """What Ray's memory monitor wrote of a process that it ended, empty where it wrote nothing; and whether no process
    that it considered had more memory."""
    if raylet_log is None:
        return "", True
    try:
        with raylet_log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "", True
    for part in reversed(text.split("OOM kill reason: ")[1:]):
        if re.search(rf"^Selected to kill: .*\bpid={pid},", part, re.MULTILINE):
            used = dict(re.findall(r"\bpid=(\d+), actual memory used=([\d.]+)GB", part))
            own = float(used.get(str(pid), 0))
            told = f"Ray's memory monitor ended it ({part.splitlines()[0].strip()}; it used {own:g} GB)"
            return told, own >= max(map(float, used.values()), default=0.0)
    return "", True


def memory_limit(pid: int) -> tuple[int, str]:
    """Most bytes that a process may have, and what sets that limit: its cgroups, or the machine; (0, "") if unknown."""
    found = [(limit, "its cgroup") for limit in _cgroup_limits(pid)]
    with contextlib.suppress(OSError, AttributeError, ValueError):
        total = re.search(r"^MemTotal:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE)
        found.append((1024 * int(total[1]), "the machine") if total else (0, ""))
    return min(found, default=(0, ""), key=lambda one: one[0] or float("inf"))


def _cgroup_limits(pid: int) -> Iterator[int]:
    for folder in _cgroups(pid):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max": none
                yield int((folder / name).read_text())


def _oom_file(pid: int) -> Path | None:
    """File that counts the kernel's memory kills of a process's cgroup; None: only the whole machine's are counted."""
    for folder in _cgroups(pid):
        for name in ("memory.events", "memory.oom_control"):
            if (folder / name).exists():
                return folder / name
    return None


def _cgroups(pid: int) -> Iterator[Path]:
    """Folders of a process's memory cgroup and of those around it, the innermost first."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = CGROUPS / kinds
        folder = root / place.lstrip("/")
        for inner in (folder, *folder.parents):
            if inner.is_relative_to(root):
                yield inner


def _oom_kills(file: Path | None) -> int:
    """Number of processes that the kernel has ended for memory: of a cgroup, or of the machine."""
    try:
        found = re.search(r"^oom_kill (\d+)", (file or PROC / "vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _memory(pid: int) -> tuple[int, int]:
    """Most bytes that a process had in memory so far, and how many it has now; zeros once it is gone."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB", text, re.MULTILINE))
    return 1024 * int(sizes.get("VmHWM", 0)), 1024 * int(sizes.get("VmRSS", 0))


def _status(one: _Watched, is_last: bool = False) -> int | None:
    """Status of a process that has ended, as waitpid gives it; None: its parent alone was told."""
    info = bytearray(struct.pack("Q", PIDFD_INFO_EXIT).ljust(64, b"\0"))
    with contextlib.suppress(OSError):
        fcntl.ioctl(one.fd, PIDFD_GET_INFO, info)
        if struct.unpack_from("Q", info)[0] & PIDFD_INFO_EXIT:
            return int(struct.unpack_from("i", info, EXIT_CODE_AT)[0])
    with contextlib.suppress(OSError):  # its parent has not asked yet
        fields = (PROC / str(one.pid) / "stat").read_text().rpartition(")")[2].split()
        return int(fields[-1]) if fields[0] in "ZX" else None
    return None if is_last else _status(one, is_last=True)  # it asked between the two


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
