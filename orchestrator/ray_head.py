"""A Ray cluster on this machine, held by a process of its own: `python -m orchestrator.ray_head STATE_DIR CPUS`.

It outlives the control plane, so that a control plane that was killed finds its workers again, and it ends with
one signal. Ray holds no truth: losing it costs running training, nothing that was acknowledged. A Ray that has lost
its raylet or its GCS is of no use to anybody and does not mend itself, so the head ends when one of them does.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADDRESS_FILE = "ray.json"
MODULE = "orchestrator.ray_head"
PARTS = ("gcs_server", "raylet")
"""Ray's own processes without which nothing works."""
TOKEN_FILE = "ray_token"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"
LOOK_SECONDS = 0.5


def main(state_dir: Path, cpus: int) -> None:
    """Start Ray, write its address beside the token; wait for SIGTERM, or for the end of a part."""
    import ray

    from orchestrator.signs_of_life import Life, children, end_now, life_of

    ray.init(
        address="local",  # never join a cluster that a stale address file names
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    # After ray.init, which puts its own handler there: that one prints a stack trace and dies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    below = children()
    parts = {name: process.pid for process in below if (name := process.name()) in PARTS}
    facts = {"address": ray.get_runtime_context().gcs_address, "pid": os.getpid(), "parts": parts}
    _announce(state_dir, facts)
    while not (gone := [name for name, pid in parts.items() if life_of(pid) is Life.GONE]):
        time.sleep(LOOK_SECONDS)
    cause = f"its {gone[0]} (pid {parts[gone[0]]}) is gone"
    print(f"Ray ends: {cause}", file=sys.stderr, flush=True)
    _announce(state_dir, facts | {"ended": cause})
    end_now(below)
    os._exit(1)  # Ray's own shutdown asks processes that are gone


def _announce(state_dir: Path, facts: Mapping[str, Any]) -> None:
    written = state_dir / f"{ADDRESS_FILE}.new"
    written.write_text(json.dumps(facts))
    written.rename(state_dir / ADDRESS_FILE)


def ray_environment(token_path: Path) -> dict[str, str]:
    """Environment for every process that speaks to the cluster.

    Ray listens on all interfaces, so its token authentication is always on. The mode is always named: left open, a
    local ray.init turns it on and writes a token into the home folder.
    """
    if not token_path.exists():
        token_path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        TOKEN_VARIABLE: str(token_path.resolve()),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A killed worker is noticed and replaced in a second or two, not in fifteen.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
