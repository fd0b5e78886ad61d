"""Rows are put into as few lanes as have room."""

from __future__ import annotations

import pytest

from workers.serving.lane import lanes_of


@pytest.mark.parametrize(
    ("lengths", "room", "lanes"),
    [
        ([], 10, []),
        ([3, 5, 4], 15, [[1, 2, 0]]),  # 3 x 5
        ([3, 5, 3], 14, [[1], [0, 2]]),  # 5 + 2 x 3
        ([100, 2, 2, 2], 106, [[0], [1, 2, 3]]),
        ([100, 50, 2, 2], 154, [[0], [1], [2, 3]]),
        ([100, 50, 2, 2], 10, [[0], [1], [2, 3]]),  # no more lanes, though they have no room
        ([7, 7, 7], 10, [[0, 1, 2]]),  # nothing is saved
        ([7], 3, [[0]]),
    ],
)
def test_long_rows_leave_as_soon_as_there_is_no_room_otherwise(
    lengths: list[int], room: int, lanes: list[list[int]]
) -> None:
    assert lanes_of(lengths, room) == lanes
