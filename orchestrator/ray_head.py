"""A Ray cluster on this machine, held by a process of its own: `python -m orchestrator.ray_head STATE_DIR CPUS`.

It outlives the control plane, so that a control plane that was killed finds its workers again, and it ends with
one signal. Ray holds no truth: losing it costs running training, nothing that was acknowledged.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from pathlib import Path

ADDRESS_FILE = "ray.json"
TOKEN_FILE = "ray_token"


def main(state_dir: Path, cpus: int) -> None:
    """Start Ray, write its address beside the token, wait for SIGTERM."""
    import ray

    ray.init(
        address="local",  # never join a cluster that a stale address file names
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    # After ray.init, which puts its own handler there: that one prints a stack trace and dies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    address = ray.get_runtime_context().gcs_address
    written = state_dir / f"{ADDRESS_FILE}.new"
    written.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    written.rename(state_dir / ADDRESS_FILE)
    signal.pause()


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
        "RAY_AUTH_TOKEN_PATH": str(token_path.resolve()),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A killed worker is noticed and replaced in a second or two, not in fifteen.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
