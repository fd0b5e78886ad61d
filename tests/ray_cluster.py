"""A Ray cluster that several services or control planes share, for tests: on loopback, on a port of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.ray_head import ray_environment
from tests.moto_server import free_port

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class RayCluster:
    """A running head with one machine."""

    address: str
    token: Path
    process: subprocess.Popen[bytes]
    dashboard: str | None
    """Its address, where jobs are submitted; None where it was not asked for."""

    def processes(self, title: str) -> list[int]:
        """Process ids whose title or name begins like this."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title) or process.name() == title:
                    found.append(process.pid)
        return found


@contextlib.contextmanager
def ray_cluster(cpus: int, has_dashboard: bool = False) -> Iterator[RayCluster]:
    """A cluster without anything on it; all its processes are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="onebasis-"))  # short: the paths of sockets are
    port, dashboard = free_port(), free_port()
    options = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=80000000"]
    options.append(f"--include-dashboard={str(has_dashboard).lower()}")
    if has_dashboard:  # else its agent listens where that of another Ray on this machine may
        options += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    token = folder / "token"
    with (folder / "ray.out").open("wb") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", *options, f"--temp-dir={folder}", "--block"],
            env={**os.environ, **ray_environment(token)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{dashboard}" if has_dashboard else None
        yield RayCluster(f"127.0.0.1:{port}", token, process, url)
    finally:
        for below in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(below.pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
