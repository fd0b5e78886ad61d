"""The processes that train one task together, and what they say to each other beside gradients.

One rank is a group too: then everything here is free. Nothing is pickled on the way: numbers and JSON only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import Unavailable
from workers.orders import ALONE, Rank

TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer has lost a rank. Reading a 70B model's shards from disk takes less."""


class RankGroup:
    """Ranks of one task. Make it with `joined`.

    Every method but `rank` is a collective: each rank must call it, in the same order.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        # Beside NCCL, not through it: a word after every step must not make the GPUs wait for the host.
        self._words = dist.new_group(backend="gloo") if rank.size > 1 and dist.get_backend() != "gloo" else None

    def agree(self, value: Any) -> Any:
        """What rank 0 says, as JSON gives it back; the others' value is not looked at."""
        if self.rank.size == 1:
            return value
        content = torch.tensor(list(json.dumps(value).encode()) if self.rank.leads else [], dtype=torch.uint8)
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self._words)
        buffer = content if self.rank.leads else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self._words)
        return json.loads(bytes(buffer.tolist()))

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Element by element over the ranks, in float64."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def max(self, numbers: Sequence[float]) -> list[float]:
        """Element by element over the ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; all must have one shape and type. On the CPU."""
        if self.rank.size == 1:
            return [tensor.cpu()]
        parts = [torch.empty_like(tensor, device="cpu") for _ in range(self.rank.size)]
        dist.all_gather(parts, tensor.cpu(), group=self._words)
        return parts

    def _reduced(self, numbers: Sequence[float], how: Any) -> list[float]:
        if self.rank.size == 1:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self._words)
        return [float(number) for number in tensor.tolist()]


NOBODY_ELSE = RankGroup(ALONE)


@contextlib.contextmanager
def joined(rank: Rank, deepspeed: dict[str, Any] | None) -> Iterator[RankGroup]:
    """Form the group, set up DeepSpeed when there is a configuration for it, and leave nothing behind of either.

    Raises:
        Unavailable: The others did not come.
    """
    if rank.size == 1 and deepspeed is None:
        yield RankGroup(rank)
        return
    before = dict(os.environ)
    os.environ.update(_environment(rank))
    os.environ.pop("LOCAL_SIZE", None)  # with it DeepSpeed leaves 66 MiB per rank in /dev/shm for ever
    try:
        _form(rank)
        if deepspeed is not None:
            from workers.deepspeed_engine import deepspeed_process

            with deepspeed_process():
                yield RankGroup(rank)
        else:
            yield RankGroup(rank)
    finally:
        _leave()
        os.environ.clear()
        os.environ.update(before)


def _environment(rank: Rank) -> dict[str, str]:
    return {
        "RANK": str(rank.index),
        "LOCAL_RANK": "0",  # Ray shows each rank its own GPUs only
        "WORLD_SIZE": str(rank.size),
        "MASTER_ADDR": rank.master_address,
        "MASTER_PORT": str(rank.master_port),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else accelerate takes all cores of the machine
    }


def _form(rank: Rank) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        if rank.size == 1:
            alone = dist.HashStore()  # type: ignore[attr-defined]  # in memory: no port, nobody else
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=TIMEOUT)
        else:
            address = f"tcp://{rank.master_address}:{rank.master_port}"
            dist.init_process_group(
                backend, init_method=address, rank=rank.index, world_size=rank.size, timeout=TIMEOUT
            )
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        raise Unavailable(
            f"rank {rank.index} of {rank.size} could not join the others: {error}",
            f"{rank.master_address}:{rank.master_port}",
            "can the machines reach each other on every port?",
        ) from error


def _leave() -> None:
    from accelerate.state import AcceleratorState

    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
