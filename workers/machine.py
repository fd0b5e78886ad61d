"""How busy this machine is: the figures that MLflow calls system metrics, under its names. And that its memory ran out.

MLflow's own monitor logs from the process that has the run; ours are written by the control plane, which need not be
on this machine. So a worker measures, and its figures travel with the points of its loss curve.
"""

from __future__ import annotations

import psutil
import torch

MEGABYTE = 1e6
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""Words of torch's errors, which have no class of their own everywhere: a GPU's (also through NCCL), a CPU's, and a
GPU's with no room left for cuBLAS or cuDNN."""


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


def ran_out_of_memory(error: Exception) -> bool:
    """Whether something failed because it needed more memory than there is."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)
