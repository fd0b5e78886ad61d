"""What every row of the table is made with: a base model, the folder of what is there already, and learning rates.

A method's learning rate is the one of `GRID` whose adapters score best on the validation rows of a few tasks
(`orders.GRIDS`). These rows are a part of the training rows: nothing is chosen by those that scores are reported on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks import real_streams
from benchmarks.real_streams import Case
from benchmarks.streams.kept import Kept, Made
from benchmarks.streams.orders import Stream
from subspace_store import Adapter
from subspace_store.digests import digest
from workers.base_model import BaseModel
from workers.evaluation import score_adapter
from workers.general_loss import general_loss
from workers.methods import NOTHING, Given
from workers.methods.factors import trainable_numbers
from workers.rows.task_data import Row
from workers.rows.validation import set_aside

GRID = (0.001, 0.003, 0.008)
TIE = 0.01
"""Scores on some 700 validation rows that are nearer than this cannot be told apart: the smaller rate is taken."""
Change = Callable[[Any], None]
"""What is done to a prepared model before its first step."""


def nothing(model: Any) -> None:
    pass


@dataclass
class Workshop:
    """Trains and scores, each thing once."""

    base: BaseModel
    kept: Kept
    grid: Stream
    """Tasks by which learning rates are chosen."""
    say: Callable[[str], None]
    general_text: str = ""
    """Text by which it is measured what a language model loses; empty: it is not."""
    _rates: dict[str, dict[float, float]] = field(default_factory=dict)

    @property
    def rates(self) -> Mapping[str, Mapping[float, float]]:
        """Method to learning rate (or what else is chosen for it) to the score on the validation rows."""
        return self._rates

    def train(
        self,
        case: Case,
        what: str,
        rows: Sequence[Row] | None = None,
        *,
        method: str = "lora",
        of: str = "",
        given: Given = NOTHING,
        change: Change = nothing,
    ) -> Made:
        """The task's adapter.

        Args:
            what: Name of the way, see `Kept.made`.
            rows: Default: all training rows.
            of: What it depends on beside the task and its rows.
            change: See `real_streams.made`.
        """
        chosen = case if rows is None else replace(case, train=tuple(rows))
        numbers = 0

        def changed(model: Any) -> None:
            nonlocal numbers
            change(model)
            numbers = sum(trainable_numbers(model).values())

        def make() -> Made:
            adapter = real_streams.made(self.base, chosen, method, chosen.train, given, changed)
            return Made(adapter, numbers)

        return self.kept.made(chosen, what, of, make)

    def score(self, adapter: Adapter, case: Case) -> float:
        """In the task's own metric, on its test rows."""
        return self.kept.score(adapter, case, "test", lambda: real_streams.score(self.base, adapter, case))

    def untrained_score(self, adapter: Adapter, case: Case) -> float:
        """Of the base model alone on a task's test rows, with the adapter's head if the kind has one."""

        def measure() -> float:
            return score_adapter(self.base, adapter, case.test, case.spec, with_update=False).value

        return self.kept.score(replace(adapter, modules={}), case, "test", measure)

    def general_loss(self, adapter: Adapter, case: Case) -> float:
        """What the language model loses by a task, in nats for each token of general text."""

        def measure() -> float:
            return general_loss(self.base, adapter, case.spec, self.general_text, lambda: None)

        return self.kept.score(adapter, case, f"general text {digest(self.general_text.encode())}", measure)

    def on_validation(self, adapter: Adapter, case: Case) -> float:
        """In the task's own metric, on the validation rows that are set aside of its training rows."""
        rows = set_aside(case.train)[1]
        if not rows:
            raise SystemExit(f"{case.spec.name} has no rows to set aside: nothing can be chosen by it")
        return self.kept.score(
            adapter, case, "validation", lambda: score_adapter(self.base, adapter, rows, case.spec).value
        )

    def rate(self, name: str, learn: Callable[[Sequence[Case]], Mapping[str, Adapter]]) -> float:
        """The learning rate of a method.

        Args:
            learn: Learns tasks one after another, on the rows that it is given, and tells what serves each at the end.
        """
        return self.choose(name, GRID, lambda rate, cases: learn([at_rate(case, rate) for case in cases]))

    def choose(
        self,
        name: str,
        values: Sequence[float],
        learn: Callable[[float, Sequence[Case]], Mapping[str, Adapter]],
    ) -> float:
        """The smallest of some values whose mean score on the grid's validation rows is hardly below the best one."""
        if name not in self._rates:
            rest = [replace(case, train=tuple(set_aside(case.train)[0])) for case in self.grid.cases]
            found = {}
            for value in values:
                served = learn(value, rest)
                found[value] = statistics.fmean(
                    self.on_validation(served[case.spec.name], case) for case in self.grid.cases
                )
            self._rates[name] = found
            told = ", ".join(f"{value:g}: {score:.3f}" for value, score in found.items())
            self.say(f"chosen for {name}, mean score on validation rows: {told}")
        best = max(self._rates[name].values())
        return min(value for value, score in self._rates[name].items() if score >= best - TIE)


def at_rate(case: Case, rate: float) -> Case:
    """The task with a learning rate."""
    training = case.spec.training.model_copy(update={"learning_rate": rate})
    return replace(case, spec=case.spec.model_copy(update={"training": training}))
