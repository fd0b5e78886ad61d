"""Tensors of tasks in a file of this machine, mapped into memory: what is asked for often stays in memory, what is not
is read from the disk in a moment, and the system takes the memory back whenever it needs it.

The file has no name, so nothing of it is left when the process ends, however it ends.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEGMENT_BYTES = 2**26
"""Bytes that are mapped at once; a larger task has a segment of its own."""
ALIGNED = 64
"""Bytes of which a tensor's place is a multiple."""


@dataclass(frozen=True)
class _Segment:
    descriptor: int
    bytes_B: Tensor
    """All of it, mapped: pages are read when they are looked at."""


class TaskFile:
    """Of one version. One caller at a time.

    Args:
        folder: Where the file is made; None: where temporary files are (`TMPDIR`).
    """

    def __init__(self, folder: str | None = None, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder, self._segment_bytes = folder, segment_bytes
        self._segments: list[_Segment] = []
        self._end = 0
        """Bytes of the last segment that are taken."""
        self._places: dict[str, tuple[int, int, int, int]] = {}
        """Task to its segment, its start there, the size of its tensors, and that of what says where they lie."""

    @property
    def bytes(self) -> int:
        """Bytes on the disk that hold tasks."""
        return sum(len(one.bytes_B) for one in self._segments[:-1]) + self._end

    def write(self, task_id: str, facts: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep a task's tensors, and facts that can be pickled.

        Raises:
            OSError: The disk has no room. Nothing of the task is kept then, and all others are.
        """
        places, size = dict[str, tuple[int, torch.dtype, torch.Size]](), 0
        for name, tensor in tensors.items():
            places[name] = size, tensor.dtype, tensor.shape
            size += _aligned(tensor.nbytes)
        head = pickle.dumps((facts, places))
        whole = bytearray(_aligned(len(head) + size))
        for tensor, (start, _, _) in zip(tensors.values(), places.values(), strict=True):
            whole[start : start + tensor.nbytes] = (
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        whole[size : size + len(head)] = head
        if not self._segments or self._end + len(whole) > len(self._segments[-1].bytes_B):
            self._segments.append(_segment(max(self._segment_bytes, len(whole)), self._folder))
            weakref.finalize(self, os.close, self._segments[-1].descriptor)
            self._end = 0
        written = 0
        while written < len(whole):  # a disk that is nearly full takes a part first
            rest = memoryview(whole)[written:]
            written += os.pwrite(self._segments[-1].descriptor, rest, self._end + written)
        self._places[task_id] = len(self._segments) - 1, self._end, size, len(head)
        self._end += len(whole)

    def read(self, task_id: str) -> tuple[Any, dict[str, Tensor]] | None:
        """A task's facts and tensors, which are read from the disk when they are looked at; None where they are not
        kept."""
        if task_id not in self._places:
            return None
        number, start, size, head = self._places[task_id]
        of_task_B = self._segments[number].bytes_B[start : start + size + head]
        facts, places = pickle.loads(of_task_B[size:].numpy().tobytes())  # our own, in a file that nobody can open
        tensors = {}
        for name, (at, dtype, shape) in places.items():
            tensors[name] = of_task_B[at : at + dtype.itemsize * shape.numel()].view(dtype).view(shape)
        return facts, tensors


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _segment(size: int, folder: str | None) -> _Segment:
    """A file that ends with the process: its name is gone as soon as it is mapped. Nothing is taken of the disk before
    it is written."""
    descriptor, path = tempfile.mkstemp(prefix="onebasis-tasks-", dir=folder)
    try:
        os.truncate(descriptor, size)
        # Shared: what is written later is seen through a private mapping on some systems only.
        return _Segment(descriptor, torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        os.unlink(path)
