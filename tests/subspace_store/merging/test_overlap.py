"""The share of one basis that another spans."""

from __future__ import annotations

import numpy as np
import pytest

from subspace_store.merging.overlap import overlap


def test_overlap_counts_the_share_of_old_directions_that_stay() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((10, 4)))[0]
    assert overlap(basis, basis) == pytest.approx(1)
    assert overlap(basis, basis[:, :1]) == pytest.approx(1 / 4)
    assert overlap(basis[:, :0], basis) == 1


def test_overlap_is_computed_in_float64_whatever_is_stored() -> None:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((500, 40)))[0].astype(np.float32)
    squares = (basis.astype(np.float64).T @ basis.astype(np.float64)) ** 2
    assert overlap(basis, basis) == squares.sum() / 40
