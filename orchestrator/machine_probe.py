"""What torch and Ray see of the machines, as one line of JSON: `python -m orchestrator.machine_probe [ADDRESS]`.

A process of its own, for the doctor: a GPU's driver may end it, a cluster may never answer, and both must only be a
finding. Without an address a Ray of this machine is started for a moment, which is the proof that one starts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

STORE_BYTES = 80 * 2**20
"""Memory for Ray's objects while it is tried out; Ray takes no less than 75 MiB."""


def main(address: str) -> None:
    """Print `torch_gpus`, then what Ray has: `nodes`, `resources` by name, its `version`; or `error` where it ends."""
    seen: dict[str, Any] = {}
    try:
        import torch

        seen["torch_gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        import ray

        seen["version"] = ray.__version__
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local", num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False,
                _node_ip_address="127.0.0.1", **quiet,
            )  # fmt: skip
        seen["nodes"] = sum(bool(node["Alive"]) for node in ray.nodes())
        seen["resources"] = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU", "memory")}
        ray.shutdown()
    except Exception as error:  # whatever torch or Ray raises is what the doctor has to tell
        seen["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main("".join(sys.argv[1:2]))
