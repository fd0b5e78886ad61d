"""How busy this machine is: the figures that MLflow calls system metrics, under its names.

MLflow's own monitor logs from the process that has the run; ours are written by the control plane, which need not be
on this machine. So a worker measures, and its figures travel with the points of its loss curve.
"""

from __future__ import annotations

import psutil
import torch

MEGABYTE = 1e6


def machine_figures() -> dict[str, float]:
    """CPU use since the call before, memory, and the use of this process's GPU by all processes."""
    memory = psutil.virtual_memory()
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(device)
        figures |= {
            f"gpu_{device}_memory_usage_megabytes": (total - free) / MEGABYTE,
            f"gpu_{device}_memory_usage_percentage": 100 * (total - free) / total,
        }
    return figures
