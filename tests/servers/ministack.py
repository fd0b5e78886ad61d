"""ministack on this machine: an S3 server whose objects are on disk, so that it can be killed and started again."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.moto_server import free_port
from tests.servers.install import MINISTACK
from tests.servers.server import Server, start, stop, wait_for_port, with_bucket


class Ministack:
    """One server on one port and one folder, that may be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it on what it stored before. About a second."""
        log = self._folder / "output.log"
        self._process = start(
            [str(MINISTACK)],
            log,
            BIND_HOST="127.0.0.1",
            GATEWAY_PORT=str(self.port),
            S3_PERSIST="1",
            S3_DATA_DIR=str(self._folder / "objects"),
            TMPDIR=str(self._folder),
        )
        wait_for_port(self._process, self.port, log)

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        if self._process is not None:
            stop(self._process)


@contextlib.contextmanager
def ministack_server(folder: Path) -> Iterator[tuple[Server, Ministack]]:
    """The running server, and the handle that kills and starts it."""
    process = Ministack(folder)
    try:
        process.start()
        yield with_bucket("ministack", process.endpoint_url), process
    finally:
        process.kill()
