"""The quantile of Student's t that every interval uses."""

from __future__ import annotations

import pytest
from scipy.special import stdtrit

from orchestrator.judging.student_t import EXACT_MAX, quantile_975


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, EXACT_MAX, EXACT_MAX + 1, 1000, 10**6])
def test_it_is_what_scipy_says(freedom: int) -> None:
    assert quantile_975(freedom) == pytest.approx(float(stdtrit(freedom, 0.975)), rel=1e-10)
