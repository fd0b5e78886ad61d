"""How far one basis spans another. Uses numpy alone, so that comparing two versions loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def overlap(old_basis_NK: np.ndarray[Any, Any], new_basis_NJ: np.ndarray[Any, Any]) -> float:
    """‖P'ᵀP‖²_F / K: the share of the old directions that the new basis still spans; 1 for an empty old basis.

    Args:
        old_basis_NK, new_basis_NJ: Orthonormal columns; computed in float64.

    Cost:
        2NKJ.
    """
    count = old_basis_NK.shape[1]
    within_JK = new_basis_NJ.T.astype("float64") @ old_basis_NK.astype("float64")
    return float((within_JK**2).sum()) / count if count else 1.0
