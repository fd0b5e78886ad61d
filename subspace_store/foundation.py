"""The foundation: directions of each module that no task made, that never change and that cost no bytes.

A task that is trained as coefficients on them is kept exactly, whatever is merged before or after it: no merge moves
it, no order matters, and no lease can be stale.

Column j of a side holds the signs of the bits of SHAKE-256(module, side, j), made orthogonal to the columns before it.
So every process, machine and release has the same foundation without asking, and a smaller one is the beginning of a
larger one.

Random directions or the leading singular directions of the base weights, which would have to be stored: accuracy of
coefficients in 64 of either, r 8, on the tasks of examples/ (one seed, 200 to 250 rows: 2 points are chance), beside a
LoRA of rank 8, which has six times as many numbers, and of rank 2, which has one and a half times as many:

                     random    of the weights    LoRA r 8    LoRA r 2
    account          0.828     0.842             0.891       0.878
    card-orders      0.808     0.808             0.856       0.817
    charges          0.824     0.805             0.873       0.787
    contradiction    0.684     0.696             0.680       –
    relevance        0.796     0.836             0.945       0.886
    top-ups          0.879     0.860             0.836       0.845

Axes: N outputs, D inputs, K directions.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

SOURCE = "signs-1"
"""Name of this way to make a foundation, kept with everything that is written in it."""


def foundation(module: str, shape: tuple[int, int], directions: int) -> tuple[Tensor, Tensor]:
    """The first directions of both sides of a module's foundation: P (N×K) and Q (D×K), orthonormal, float32.

    Args:
        module: Full name in the base model.
        shape: (N, D) of its weight.
        directions: K; of a side that is smaller, all that it has.

    Cost:
        O((N+D)·K²).
    """
    sides = zip(("out", "in"), shape, foundation_ranks(shape, directions), strict=True)
    p_NK, q_DK = (_columns(f"{module}/{side}", size, count) for side, size, count in sides)
    return p_NK, q_DK


def foundation_ranks(shape: tuple[int, int], directions: int) -> tuple[int, int]:
    """How many directions each side has, outputs first."""
    return min(directions, shape[0]), min(directions, shape[1])


def _columns(seed: str, size: int, count: int) -> Tensor:
    bits = [hashlib.shake_256(f"{SOURCE}/{seed}/{j}".encode()).digest((size + 7) // 8) for j in range(count)]
    packed = np.frombuffer(b"".join(bits), dtype=np.uint8).reshape(count, -1)
    signs_KN = 2.0 * np.unpackbits(packed, axis=1)[:, :size] - 1.0
    # Q of a QR is known but for the signs of its columns; with those of R's diagonal it is Gram-Schmidt's.
    q_NK, r_KK = torch.linalg.qr(torch.from_numpy(signs_KN.T.copy()))
    columns_NK: Tensor = q_NK * r_KK.diagonal().sign()
    return columns_NK.float().contiguous()
