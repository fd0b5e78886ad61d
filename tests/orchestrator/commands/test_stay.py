"""`up --stay` ends with the service, and the service with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import Unavailable
from orchestrator.commands import processes
from subspace_store.commands.state_folder import running_server

SERVER = "import time; time.sleep(60)"
STAY = """
import sys
from pathlib import Path
from orchestrator.commands.processes import stay
print("stays", flush=True)
stay(Path(sys.argv[1]), lambda line: print(line, flush=True))
"""


@pytest.fixture
def server(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that looks like the control plane of this state folder."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/control-plane.log").write_text("the last line\n")
    process = subprocess.Popen([sys.executable, "-c", SERVER, "orchestrator.api.server", str(tmp_path)])
    facts = {"url": "http://127.0.0.1:1", "token": "", "pid": process.pid}
    (tmp_path / "server.json").write_text(json.dumps(facts))
    while running_server(tmp_path) is None:  # a new process has no command line for a moment
        pass
    return process


def test_a_control_plane_that_ends_by_itself_is_an_error_that_a_supervisor_sees(
    tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    server.kill()
    server.wait()
    with pytest.raises(Unavailable, match="the last line"):
        processes.stay(tmp_path, lambda _: None)


def test_sigterm_ends_the_service(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    staying = subprocess.Popen([sys.executable, "-c", STAY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert staying.stdout is not None
    assert staying.stdout.readline() == "stays\n"
    # It may not have its handler yet: then the signal would end it alone, with another exit code.
    while not os.waitid(os.P_PID, staying.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if _handles(staying.pid, signal.SIGTERM):
            break
    staying.terminate()
    assert staying.wait(30) == 0
    assert server.wait(10) != 0
    assert not (tmp_path / "server.json").exists()


def _handles(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
