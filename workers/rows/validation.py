"""The validation rows of method `auto`: which training rows it sets aside, and whether they are enough to compare by.

Light, as all of this folder: the control plane tells at submission that nothing will be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from configs.task_spec import TaskSpec, zero_stage
from workers.rows.frozen_rows import SomeRows
from workers.rows.task_data import Label, Row, input_digest, label_of

ONE_IN = 4
"""One of so many rows is set aside."""
LEAST_IN = 3
"""Never more than one of so many, however often equal rows recur."""
ROWS_MIN, ROWS_MAX = 24, 256
"""Fewest validation rows that are worth a comparison, and the most: scoring them has to stay cheap beside training."""
INPUTS_ENOUGH = 10 * ONE_IN * ROWS_MIN
"""Of more different inputs than these too few are hardly ever set aside."""
FEW = 0.05
"""Share of the rows that a task can do without."""


def not_compared(spec: TaskSpec, validation: Sequence[Row]) -> str:
    """A sentence on why `auto` compares nothing and trains a plain `lora`; empty where it compares."""
    if zero_stage(spec.training.deepspeed) == 3:
        why, todo = "with ZeRO stage 3 a task is trained once", ""
    elif len(validation) < ROWS_MIN:
        why = f"the training rows to compare by would be {len(validation)}, and fewer than {ROWS_MIN} are too few"
        todo = f" → give some {ONE_IN * ROWS_MIN} training rows or more, if that matters"
    else:
        return ""
    return f"auto compares nothing and trains a lora of rank {spec.lora.r}: {why}{todo}"


def set_aside(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows to train on, and the validation rows: each row is one of the two, and the split is the same every time.

    A digest of each input decides, so that equal inputs are on one side. What would take the last row of a label from
    training is trained on, and so are inputs that recur so often that setting them aside would leave too little.

    Cost:
        Reads every row once.
    """
    left: Counter[int] = Counter()
    candidates: dict[bytes, list[tuple[int, Label | None]]] = {}
    for place, row in enumerate(rows):
        digest, label = input_digest(row), label_of(row)
        if isinstance(label, int):
            left[label] += 1
        if int.from_bytes(digest[:8], "big") % ONE_IN == 0:
            candidates.setdefault(digest, []).append((place, label))
    room, aside = min(ROWS_MAX, len(rows) // LEAST_IN), set[int]()
    for digest in sorted(candidates):
        equal = candidates[digest]
        taken = Counter(label for _, label in equal if isinstance(label, int))
        if len(aside) + len(equal) <= room and all(left[label] > count for label, count in taken.items()):
            aside |= {place for place, _ in equal}
            left.subtract(taken)
    trained = [place for place in range(len(rows)) if place not in aside]
    return SomeRows(rows, trained), SomeRows(rows, sorted(aside))


def needs_all_rows(rest: Sequence[Row], validation: Sequence[Row]) -> bool:
    """Whether what is chosen is trained once more, on all rows: whether those set aside are more than a few."""
    return len(validation) > FEW * (len(rest) + len(validation))
