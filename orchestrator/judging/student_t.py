"""The half width of a 95 % interval in standard errors: the 0.975 quantile of Student's t.

scipy has it, but importing scipy would add half a second to every command that shows a mean.
"""

from __future__ import annotations

import math
from functools import cache

NORMAL = 1.959963984540054
"""The 0.975 quantile of the normal distribution, which Student's t becomes with many degrees of freedom."""
EXACT_MAX = 200
"""Above this many degrees of freedom the series in 1/ν is exact to 1e-10."""


@cache
def quantile_975(freedom: int) -> float:
    """t with P(T ≤ t) = 0.975.

    Args:
        freedom: ν ≥ 1, degrees of freedom.

    Source:
        Abramowitz & Stegun, Handbook of Mathematical Functions (1964): 26.7.3 and 26.7.4 for few degrees of freedom,
        26.7.5 for many.
    """
    if freedom > EXACT_MAX:
        return _series(freedom)
    # P(|T| ≤ √ν·tan θ) grows with θ from 0 to 1.
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        low, high = (angle, high) if _within(angle, freedom) < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| ≤ √ν·tan θ)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2 == 1
    term = total = (cosine if is_odd else 1.0) * (freedom > 1)
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def _series(freedom: int) -> float:
    x = NORMAL
    return (
        x
        + (x**3 + x) / 4 / freedom
        + (5 * x**5 + 16 * x**3 + 3 * x) / 96 / freedom**2
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384 / freedom**3
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160 / freedom**4
    )
