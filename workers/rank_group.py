"""The processes that train one task together, and what they send each other beside gradients.

One rank is a group too: then everything here is free. Nothing is pickled on the way: numbers and JSON only.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.orders import ALONE, Rank, RankLost

JOIN = timedelta(seconds=60)
"""Longest wait for the other ranks. Warm ranks are given an order in the same second; a rank that is late cannot reach
the others. The supervisor then tries again, so it is better too short than too long."""
TIMEOUT = timedelta(minutes=10)
"""Longest collective: one that takes longer has lost a rank. Reading a 70B model's shards from disk takes less."""
LEAVE_SECONDS = 5.0
"""NCCL waits for the others when it is told to leave. Ranks that were left in a collective operation will not come:
they are ended once this rank has said why it failed."""

_listening: Any = None
"""Store where the other ranks meet, if this will be rank 0 of the next group."""


def listen(address: str, port: int = 0) -> int:
    """Listen for the other ranks of the next group at an address of this machine, until the next call.

    Returns:
        The port, which no other process can take in between; if none is given, a free one.
    """
    global _listening
    _listening = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False, timeout=JOIN
    )
    return int(_listening.port)


class RankGroup:
    """Ranks of one task. Make it with `joined`.

    Every method but `rank` is a collective: each rank must call it, in the same order.
    """

    def __init__(self, rank: Rank, words: Any = None) -> None:
        """
        Args:
            words: Process group that communicates on the CPU; None: the only group that there is.
        """
        self.rank = rank
        self._words = words

    def agree(self, value: Any) -> Any:
        """Rank 0's value, after a round trip through JSON; the others' values are ignored."""
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
        RankLost: The others did not come, or cannot be reached.
    """
    if rank.size == 1 and deepspeed is None:
        yield RankGroup(rank)
        return
    with contextlib.ExitStack() as undo:
        undo.enter_context(_environment(rank))
        undo.push(_leave)
        words = _formed(rank)
        if deepspeed is not None:
            from workers.deepspeed_engine import deepspeed_process

            undo.enter_context(deepspeed_process())
        yield RankGroup(rank, words)


@contextlib.contextmanager
def _environment(rank: Rank) -> Iterator[None]:
    """Environment variables that tell accelerate and DeepSpeed about a rank."""
    before = dict(os.environ)
    os.environ.pop("LOCAL_SIZE", None)  # with it DeepSpeed leaves 66 MiB per rank in /dev/shm for ever
    os.environ |= {
        "RANK": str(rank.index),
        "LOCAL_RANK": "0",  # Ray shows each rank its own GPUs only
        "WORLD_SIZE": str(rank.size),
        "MASTER_ADDR": rank.master_address,
        "MASTER_PORT": str(rank.master_port),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # else accelerate takes all cores of the machine
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _formed(rank: Rank) -> Any:
    """Form the process group. Returns the group that communicates on the CPU; None: the same one."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if rank.size == 1:
        alone = dist.HashStore()  # type: ignore[attr-defined]  # in memory: no port, nobody else
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=TIMEOUT)
        return None
    try:
        store = dist.TCPStore(rank.master_address, rank.master_port, timeout=JOIN)  # type: ignore[attr-defined]
        # gloo connects every rank to every other at once, NCCL when it is first used: so gloo finds out which rank
        # cannot be reached. Beside NCCL it is needed anyway: the exchange after every step must not make the GPUs wait
        # for the host.
        dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.size, timeout=JOIN)
        words = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=JOIN)
        for group in {None, words}:
            dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
        store.set_timeout(TIMEOUT)
    except (RuntimeError, ValueError) as error:  # a ValueError if the group before was never left
        raise RankLost(
            f"it could not join the others within {JOIN.total_seconds():.0f} s: {str(error).splitlines()[0][:300]}",
            f"{rank.master_address}:{rank.master_port}",
            "does a firewall let the machines reach each other on every port? do GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, where they are set, name the network between them?",
        ) from error
    return words


def _leave(failure: type[BaseException] | None, *_: Any) -> None:
    from accelerate.state import AcceleratorState

    if dist.is_initialized():
        goodbye = threading.Thread(target=dist.destroy_process_group, daemon=True)
        goodbye.start()
        goodbye.join(LEAVE_SECONDS if failure else None)
    AcceleratorState._reset_state(reset_partial_state=True)
