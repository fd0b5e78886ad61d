"""Ways to merge LoRAs into a shared subspace, for benchmarks/store.py to compare: ours, Share as it is written, the
best fixed subspace, and the library vlora. One module each; all start empty and take one adapter at a time.

Axes: N outputs, D inputs, K directions, R rank, C columns of several tasks side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.settings import SubspaceSettings
from subspace_store import ModuleUpdate, canonical_update
from subspace_store.merging.basis import ModuleSubspace, empty_module, reconstruct
from subspace_store.merging.merge import merge_module
from subspace_store.merging.variants import relative_error


@dataclass(frozen=True)
class Factors:
    """One task's LoRA in one module, as trained: ΔW = B·A."""

    b_NR: Tensor
    a_RD: Tensor


class Contestant(Protocol):
    """Takes adapters one by one, gives back what is left of each."""

    def absorb(self, factors: Factors) -> None: ...

    def factors(self, task: int) -> Factors: ...

    @property
    def stored_numbers(self) -> int: ...


class Ours:
    """The mathematics of a merge as the store does it, from raw factors."""

    def __init__(self, shape: tuple[int, int], rank: int, **settings: Any) -> None:
        self.settings = SubspaceSettings(rank_fixed=rank, **settings)
        self.module: ModuleSubspace = empty_module(shape)

    def absorb(self, factors: Factors) -> None:
        name = str(len(self.module.tasks.task_ids))
        incoming = {name: canonical_update(factors.b_NR, factors.a_RD, 1.0)}
        merge = merge_module(self.module, incoming, self.settings)
        self.module = ModuleSubspace(merge.basis, merge.settle()[0])

    def factors(self, task: int) -> Factors:
        update = reconstruct({"": self.module}, str(task))[""]
        return Factors(update.u_NR * update.sigma_R, update.v_DR.T)

    @property
    def stored_numbers(self) -> int:
        (n, d), (k_out, k_in) = self.module.basis.shape, self.module.basis.ranks
        return n * k_out + d * k_in + sum(self.module.tasks.ranks) * (k_out + k_in)


def leading_by_svd(stack_NC: Tensor, rank: int) -> Tensor:
    """Left singular vectors from the thin SVD of the stack."""
    result: Tensor = torch.linalg.svd(stack_NC, full_matrices=False).U[:, :rank]
    return result


def leading_by_gram(stack_NC: Tensor, rank: int) -> Tensor:
    """The same from the eigenvectors of the N×N Gram matrix: cheaper, and exact to √ε only."""
    result: Tensor = torch.linalg.eigh(stack_NC @ stack_NC.T).eigenvectors[:, -rank:].flip(1)
    return result


class FullSvd:
    """Share's merge as it is written: rebuild every task, stack them beside the new one, SVD of each side, project.

    The columns are ours (U·diag(σ), weighted `equal`), so that what is compared is the cost of the same result.
    """

    def __init__(self, rank: int, leading: Callable[[Tensor, int], Tensor] = leading_by_svd) -> None:
        self.rank, self.leading = rank, leading
        self.p_NK = self.q_DK = torch.zeros(0, 0, dtype=torch.float64)
        self.coefficients: list[tuple[Tensor, Tensor]] = []
        self.sigmas: list[Tensor] = []

    def absorb(self, factors: Factors) -> None:
        update = canonical_update(factors.b_NR, factors.a_RD, 1.0)
        self.sigmas.append(update.sigma_R.double())
        left = [self.p_NK @ e_KR for e_KR, _ in self.coefficients] + [update.u_NR.double() * self.sigmas[-1]]
        right = [self.q_DK @ f_KR for _, f_KR in self.coefficients] + [update.v_DR.double()]
        norms = [sigma_R.norm() for sigma_R in self.sigmas]
        self.p_NK = self.leading(torch.cat([x / w for x, w in zip(left, norms, strict=True)], dim=1), self.rank)
        weighted = [y * (s / w) for y, s, w in zip(right, self.sigmas, norms, strict=True)]
        self.q_DK = self.leading(torch.cat(weighted, dim=1), self.rank)
        self.coefficients = [(self.p_NK.T @ x, self.q_DK.T @ y) for x, y in zip(left, right, strict=True)]

    def factors(self, task: int) -> Factors:
        e_KR, f_KR = self.coefficients[task]
        return Factors(self.p_NK @ e_KR, (self.q_DK @ f_KR).T)

    def take_over(self, ours: Ours) -> None:
        """The state after many merges without making them: ours is the same to rounding."""
        tasks, basis = ours.module.tasks.settled, ours.module.basis
        self.p_NK, self.q_DK = basis.p_NK.double(), basis.q_DK.double()
        self.sigmas = list(tasks.sigma_S.double().split(list(tasks.ranks)))
        sides = (side.split(list(tasks.ranks), dim=1) for side in (tasks.e_KS, tasks.f_KS))
        self.coefficients = list(zip(*sides, strict=True))

    @property
    def stored_numbers(self) -> int:
        return self.p_NK.numel() + self.q_DK.numel() + sum(e.numel() + f.numel() for e, f in self.coefficients)


class Vlora:
    """vlora's subspace, by `absorb` or `absorb_incremental`. Its directions are whole flattened LoRAs.

    Its own number of directions stays what the first adapters allowed (one for one adapter), so it is raised to ours
    before every call: otherwise it would keep a single direction for ever.
    """

    def __init__(self, rank: int, method: str) -> None:
        self.rank, self.method = rank, method
        self.subspace: Any = None

    def absorb(self, factors: Factors) -> None:
        from vlora import LoRAWeights, SharedSubspace

        adapter = LoRAWeights(["m"], {"m": factors.a_RD}, {"m": factors.b_NR}, len(factors.a_RD))
        if self.subspace is None:
            self.subspace = SharedSubspace.from_adapters([adapter], ["0"], num_components=self.rank)
            return
        self.subspace.num_components = self.rank
        getattr(self.subspace, self.method)(adapter, str(len(self.subspace.tasks)))

    def factors(self, task: int) -> Factors:
        weights = self.subspace.reconstruct(str(task))
        return Factors(weights.lora_b["m"], weights.lora_a["m"])

    @property
    def stored_numbers(self) -> int:
        s = self.subspace
        loadings = [v for task in s.tasks.values() for v in (task.loadings_a["m"], task.loadings_b["m"])]
        tensors = [s.components_a["m"], s.components_b["m"], s.means_a["m"], s.means_b["m"], *loadings]
        return sum(tensor.numel() for tensor in tensors)


def copied(contestant: Contestant) -> Contestant:
    """Its state once more, to absorb the same adapter again."""
    return copy.deepcopy(contestant)


def errors(contestant: Contestant, originals: Sequence[Factors]) -> list[float]:
    """‖ΔW − ΔŴ‖_F / ‖ΔW‖_F of every task."""
    return [distance(original, contestant.factors(task)) for task, original in enumerate(originals)]


def distance(original: Factors, found: Factors) -> float:
    one, other = (canonical_update(f.b_NR, f.a_RD, 1.0) for f in (original, found))
    return relative_error({"": one}, {"": other})


def best_fixed_subspace(originals: Sequence[Factors], rank: int, iterations: int) -> list[float]:
    """Errors of every task in `fixed_bases`."""
    updates = [canonical_update(f.b_NR, f.a_RD, 1.0) for f in originals]
    p_NK, q_DK = fixed_bases(updates, rank, iterations)
    sides = [(u.u_NR.double() * u.sigma_R.double(), u.v_DR.double(), u.energy) for u in updates]
    kept = [float(((p_NK.T @ x) @ (y.T @ q_DK)).square().sum()) / energy for x, y, energy in sides]
    return [math.sqrt(max(0.0, 1 - share)) for share in kept]


def fixed_bases(updates: Sequence[ModuleUpdate], rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """One pair of bases fitted to all updates at once, each counting the same: P (N×K) and Q (D×K), float64.

    Args:
        iterations: 0 is the truncated HOSVD. Each further one fits each side to what the other side keeps (HOOI), which
            lowers the sum of squared errors towards a local optimum.

    Source:
        De Lathauwer et al., On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors (2000).
    """
    left = [u.u_NR.double() * (u.sigma_R.double() / math.sqrt(u.energy)) for u in updates]
    right = [u.v_DR.double() for u in updates]
    scaled = [y * (u.sigma_R.double() / math.sqrt(u.energy)) for u, y in zip(updates, right, strict=True)]
    p_NK = leading_by_gram(torch.cat(left, dim=1), rank)
    q_DK = leading_by_gram(torch.cat(scaled, dim=1), rank)
    for _ in range(iterations):
        p_NK = leading_by_gram(torch.cat([x @ (y.T @ q_DK) for x, y in zip(left, right, strict=True)], dim=1), rank)
        q_DK = leading_by_gram(torch.cat([y @ (x.T @ p_NK) for x, y in zip(left, right, strict=True)], dim=1), rank)
    return p_NK, q_DK
