"""Which inputs of a task recur: in both of its files, or with several labels.

Rows are told apart by 8 bytes of a digest. Nothing is decided here; numpy is imported where it is used.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

COMPARED_ROWS_MAX = 2**20
"""Rows of a file that are compared with each other: 16 bytes of memory for each. What recurs in a larger file recurs
in its beginning as well."""


class Met:
    """Finds evaluation rows that are also training rows."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._met = bytearray()

    def add(self, number: int) -> None:
        """Note an evaluation row."""
        self._numbers.append(number)

    def close(self) -> None:
        """End the notes of `add`, before the first `meet`."""
        import numpy as np

        np.frombuffer(self._numbers, np.uint64).sort()
        self._met = bytearray(len(self._numbers))

    def meet(self, number: int) -> None:
        """Look for a training row."""
        at = bisect_left(self._numbers, number)
        if at < len(self._numbers) and self._numbers[at] == number:
            self._met[at] = 1

    @property
    def count(self) -> int:
        """How many evaluation rows were met, equal ones counted each."""
        import numpy as np

        if not any(self._met):
            return 0
        numbers = np.frombuffer(self._numbers, np.uint64)
        firsts = numbers[np.frombuffer(self._met, np.bool_)]
        return int((np.searchsorted(numbers, firsts, "right") - np.searchsorted(numbers, firsts, "left")).sum())


class Labelled:
    """The inputs of one file with their labels: the first `COMPARED_ROWS_MAX` rows."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._labels = array("q")

    def add(self, number: int, label: int) -> None:
        """Note a row. label: An index; the same one where rows have none."""
        if len(self._numbers) < COMPARED_ROWS_MAX:
            self._numbers.append(number)
            self._labels.append(label)

    def counts(self) -> tuple[int, int]:
        """Number of different inputs, and of those among them that have several labels."""
        import numpy as np

        numbers, labels = np.frombuffer(self._numbers, np.uint64), np.frombuffer(self._labels, np.int64)
        if not len(numbers):
            return 0, 0
        order = np.lexsort((labels, numbers))
        numbers, labels = numbers[order], labels[order]
        is_again = numbers[1:] == numbers[:-1]
        contradicted = numbers[1:][is_again & (labels[1:] != labels[:-1])]
        return int((~is_again).sum()) + 1, len(np.unique(contradicted))
