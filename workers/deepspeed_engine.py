"""DeepSpeed inside a worker: what it needs before, and what must be cleared after, so that the next task can run.

One rank per worker today. The configuration is the task's own and is passed through; here is only the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deepspeed_process(config: dict[str, Any] | None) -> Iterator[None]:
    """Make this process a DeepSpeed group of one rank, and leave nothing of it behind. Nothing without a config.

    Without the clearing a second task fails with `Group … is not registered`, and one without DeepSpeed would find
    accelerate still set up for it.
    """
    if config is None:
        yield
        return
    before = dict(os.environ)
    os.environ.update(_environment())
    os.environ.pop("LOCAL_SIZE", None)  # with it, 66 MiB per rank stay in /dev/shm for ever
    try:
        _join_group()
        yield
    finally:
        _leave_group()
        os.environ.clear()
        os.environ.update(before)


def gathered(parameters: list[Any]) -> Any:
    """All partitions of these parameters, for reading."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else accelerate takes all cores of the machine
    } | accelerator


def _join_group() -> None:
    import deepspeed

    if not torch.cuda.is_available():
        # Else it is compiled first, for 32 seconds; between one rank there is nothing to share.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )


def _leave_group() -> None:
    import deepspeed
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    AcceleratorState._reset_state(reset_partial_state=True)
