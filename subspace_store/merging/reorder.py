"""How much the order of merging matters: the same adapters merged again in other orders, in memory.

Every merge projects all earlier tasks, so a task that is merged early is projected more often than one that is merged
late. The reference is to merge all adapters at once, which has no order. Nothing is written, no version is changed.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter
from subspace_store.merging.basis import ModuleSubspace, reconstruct
from subspace_store.merging.merge import merge_adapters, sized_among
from subspace_store.merging.variants import merge_all, relative_error


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some errors."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class ReorderReport:
    """Errors ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F of every task after all merges, for every order tried."""

    given: Mapping[str, float]
    """Task id to error in the order as given."""
    others: tuple[Mapping[str, float], ...]
    """The same for each of the random orders."""
    at_once: Mapping[str, float]
    """The same with all adapters merged as one group."""

    def of_task(self, task_id: str) -> Spread:
        """The task's error over all orders, the given one included."""
        return Spread.of([errors[task_id] for errors in (self.given, *self.others)])

    @property
    def of_mean(self) -> Spread:
        """The mean error of the tasks, over all orders."""
        return Spread.of([statistics.fmean(errors.values()) for errors in (self.given, *self.others)])


def reorder(
    adapters: Mapping[str, Adapter],
    settings: SubspaceSettings,
    orders: int = 10,
    seed: int = 0,
    start: Mapping[str, ModuleSubspace] = MappingProxyType({}),
) -> ReorderReport:
    """Merge adapters one by one, in the order given and in random ones.

    Args:
        adapters: Task id to adapter as delivered, first merged first. At least one.
        settings: How to merge.
        orders: Random orders to try.
        seed: The same seed tries the same orders.
        start: Renewed bases that are there from the start, see `merge_all`.

    Cost:
        (orders + 1)·T merges in memory; one state is held at a time.
    """
    chance = random.Random(seed)
    tried = [chance.sample(list(adapters), len(adapters)) for _ in range(orders)]
    return ReorderReport(
        given=_one_by_one(adapters, list(adapters), settings, start),
        others=tuple(_one_by_one(adapters, order, settings, start) for order in tried),
        at_once=merge_all(adapters, settings.variant, settings, start).error,
    )


def _one_by_one(
    adapters: Mapping[str, Adapter],
    order: Sequence[str],
    settings: SubspaceSettings,
    modules: Mapping[str, ModuleSubspace],
) -> dict[str, float]:
    sized = sized_among(adapters)
    for task in order:
        modules = merge_adapters(modules, {task: adapters[task]}, settings, sized).modules
    return {task: relative_error(adapters[task].modules, reconstruct(modules, task)) for task in adapters}
