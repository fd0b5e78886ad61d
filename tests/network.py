"""Two machines on this one, for tests: Ray nodes with different addresses and a wire between them that can be cut.

The first is this machine, at one end of a veth pair; the second is a network namespace at the other end, with
processes of its own that all die with the first of them. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379


class TwoMachines:
    """A Ray head at `head`, and a second node at `other` that can be taken away and given back."""

    def __init__(self, name: str, wire: str, subnet: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.head, self.other = f"{subnet}.1", f"{subnet}.2"
        self.address = f"{self.head}:{PORT}"
        self._name, self._wire = name, wire
        self._folder = folder
        self._environment = dict(os.environ) | environment
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def up(self) -> tuple[str, ...]:
        """Addresses of the machines that are there."""
        return tuple(self._processes)

    def start_head(self, cpus: int) -> None:
        folder = f"--temp-dir={self._folder}"
        self._start(self.head, ["--head", f"--port={PORT}", "--include-dashboard=false", folder], cpus, [])

    def start_other(self, cpus: int) -> None:
        inside = ["ip", "netns", "exec", self._name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(self.other, [f"--address={self.address}"], cpus, inside)

    def end(self, address: str) -> None:
        """kill -9 of all processes of a machine."""
        process = self._processes.pop(address)
        for below in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(below.pid, signal.SIGKILL)
        process.wait(10)

    def cut(self) -> None:
        """Take the wire away: what is sent from now on is lost, and nobody is told."""
        self._link("down")

    def mend(self) -> None:
        """Give the wire back."""
        self._link("up")

    def _link(self, how: str) -> None:
        subprocess.run(["ip", "link", "set", self._wire, how], check=True, capture_output=True)

    def end_all(self) -> None:
        for address in list(self._processes):
            self.end(address)

    def pid_of(self, address: str, pid: int) -> int:
        """The process id here of one that calls itself `pid` there."""
        for process in psutil.Process(self._processes[address].pid).children(recursive=True):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                (names,) = (line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
                if names[-1] == str(pid):
                    return process.pid
        raise AssertionError(f"no process {pid} on {address}")

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self._folder.glob("*.out"))

    def _start(self, address: str, options: list[str], cpus: int, inside: list[str]) -> None:
        common = [f"--node-ip-address={address}", f"--num-cpus={cpus}", "--object-store-memory=80000000", "--block"]
        with (self._folder / f"{address}.out").open("ab") as log:
            self._processes[address] = subprocess.Popen(
                [*inside, RAY, "start", *options, *common, "--disable-usage-stats"],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def why_not() -> str:
    """Why there can be no two machines here; empty when there can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed (apt-get install iproute2)"
    name = f"onebasis-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"it takes root: `ip netns add` says {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_machines(environment: Mapping[str, str]) -> Iterator[TwoMachines]:
    """The wire, with no Ray on it yet; all of it is gone at the end."""
    number = os.getpid() % 250
    name, here, there, subnet = f"onebasis-{os.getpid()}", f"ob{os.getpid()}", f"oc{os.getpid()}", f"10.213.{number}"
    folder = Path(tempfile.mkdtemp(prefix="onebasis-"))  # short: the paths of sockets are

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        ip(f"netns add {name}")
        undo.callback(ip, f"netns del {name}")  # takes the wire with it
        ip(f"link add {here} type veth peer name {there} netns {name}")
        ip(f"addr add {subnet}.1/24 dev {here}")
        ip(f"link set {here} up")
        ip(f"-n {name} addr add {subnet}.2/24 dev {there}")
        ip(f"-n {name} link set {there} up")
        ip(f"-n {name} link set lo up")
        machines = TwoMachines(name, here, subnet, folder, environment)
        undo.callback(machines.end_all)
        yield machines
