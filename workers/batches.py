"""Which rows are in which step, for every rank: a pure function of seed, step and sizes.

Rows are drawn without replacement, epoch after epoch, as one endless sequence; each step takes the next ones. So every
step is full, a gang sees in one step the same rows as one process would, a smaller micro-batch changes nothing but
memory, and step 500 can be computed without the steps before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configs.task_spec import TrainingSpec
from workers.orders import Rank
from workers.rows.task_data import Row

EPOCH_SEED = 1_000_003  # a prime, so that epoch 1 of seed 0 is not epoch 0 of seed 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run is cut into steps and micro-batches."""

    row_count: int
    steps: int
    rows_per_micro_batch: int
    """Rows of one rank in one micro-batch."""
    accumulation: int
    rank: Rank
    seed: int

    @property
    def rows_per_step(self) -> int:
        """Rows of all ranks in one step."""
        return self.rows_per_micro_batch * self.accumulation * self.rank.size

    def rows_of(self, step: int) -> list[list[int]]:
        """This rank's micro-batches of a step, counted from 0: indices of rows."""
        first, size = step * self.rows_per_step, self.rows_per_micro_batch
        order = [self._row(first + place) for place in range(self.rows_per_step)]
        starts = range(self.rank.index * size, self.rows_per_step, size * self.rank.size)
        return [order[start : start + size] for start in starts]

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, self.row_count)
        return int(_permutation(self.row_count, self.seed + EPOCH_SEED * epoch)[within])


def schedule(training: TrainingSpec, row_count: int, rank: Rank, halvings: int = 0) -> Schedule:
    """Cut a run into steps.

    Args:
        halvings: How often the micro-batch was halved and accumulation doubled.

    Returns:
        A schedule of `TrainingSpec.steps` steps.
    """
    return Schedule(
        row_count=row_count,
        steps=training.steps(row_count, rank.size),
        rows_per_micro_batch=training.per_device_train_batch_size >> halvings,
        accumulation=training.gradient_accumulation_steps << halvings,
        rank=rank,
        seed=training.seed,
    )


@dataclass(frozen=True)
class Batches:
    """A run's micro-batches from a step on, as tensors: what the Trainer uses as a data loader."""

    schedule: Schedule
    rows: Sequence[Row]
    collate: Callable[[Iterable[Row]], dict[str, Any]]
    first_step: int = 0

    def __len__(self) -> int:
        return (self.schedule.steps - self.first_step) * self.schedule.accumulation

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.first_step, self.schedule.steps):
            for indices in self.schedule.rows_of(step):
                yield self.collate(self.rows[index] for index in indices)


@functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def _permutation(count: int, seed: int) -> Any:
    """The order of the rows in one epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
