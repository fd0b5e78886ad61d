"""CPU seconds (user + system, of the whole process) of the commands that only read, while the service is up and down.

    make bench-commands            both; three tasks in a store on disk
    make bench-commands BENCH=9    medians of so many runs; default 5

Targets: at most 1.0 s while it is down, 0.6 s while it is up. Another program on the same cores adds to these figures:
the first row is what the interpreter alone takes.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.errors import Exit  # noqa: E402
from tests.orchestrator.site import Site  # noqa: E402

COMMANDS = ("tasks", "scores", "versions", "version 2", "diff 1 2", "status")
TARGETS = {"down": 1.0, "up": 0.6}


def cpu_seconds(command: list[str]) -> float:
    """Of one process and those that it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode in (Exit.DONE, Exit.DOWN), command  # `status` says by its code that the service is down
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(runs: int) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = Site(folder, storage={"url": f"file:{folder}/store"})
        try:
            for title in ("red/alpha", "blue/beta", "blue/gamma"):
                site.publish(title)
            up = medians(folder, runs)
        finally:
            site.close()
        (folder / "server.json").unlink()
        down = medians(folder, runs)
    interpreter = statistics.median(cpu_seconds([sys.executable, "-c", "pass"]) for _ in range(runs))
    print(f"{'CPU seconds, median of ' + str(runs):30}{'up':>8}{'down':>8}")
    print(f"{'(python alone)':30}{interpreter:8.2f}{interpreter:8.2f}")
    for command in COMMANDS:
        print(f"{command:30}{up[command]:8.2f}{down[command]:8.2f}")
    print(f"{'target':30}{TARGETS['up']:8.2f}{TARGETS['down']:8.2f}")


def medians(folder: Path, runs: int) -> dict[str, float]:
    """Command to its median."""
    typed = [sys.executable, "-m", "orchestrator.commands.cli"]
    return {
        command: statistics.median(
            cpu_seconds([*typed, *command.split(), "--state-dir", str(folder)]) for _ in range(runs)
        )
        for command in COMMANDS
    }


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
