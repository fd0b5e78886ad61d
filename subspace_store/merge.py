"""Merging adapters into the subspace: a pure step from one state to the next.

Nothing here reads or writes storage, and nothing depends on how many tasks were merged before except two small
products over all their coefficients. Axes: N outputs, D inputs, K directions, S coefficient columns of all tasks
side by side, T tasks, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.subspace_math import (
    canonical_in_basis,
    choose_ranks,
    extend_basis,
    kept_energy,
    orthonormalise,
    update_energy,
)


@dataclass(frozen=True)
class ModuleBasis:
    """Two orthonormal bases and the energy of everything merged in each direction, strongest first."""

    p_NK: Tensor
    """Outputs, float32."""
    q_DK: Tensor
    """Inputs, float32."""
    lam_out_K: Tensor
    """Squared singular values of the weighted updates, float64."""
    lam_in_K: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the module's weight."""
        return int(self.p_NK.shape[0]), int(self.q_DK.shape[0])

    @property
    def ranks(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return int(self.p_NK.shape[1]), int(self.q_DK.shape[1])


@dataclass(frozen=True)
class Transport:
    """Writes coefficients of one basis in the next: R_out = P'ᵀP, R_in = Q'ᵀQ, float64."""

    out: Tensor
    inward: Tensor


@dataclass(frozen=True)
class ModuleTasks:
    """The coefficients of all tasks that adapt one module, side by side, oldest task first."""

    task_ids: tuple[str, ...]
    ranks: tuple[int, ...]
    e_KS: Tensor
    """Outputs, float64 (float32 when it was written, at birth)."""
    f_KS: Tensor
    sigma_S: Tensor
    """Singular values as delivered, float32."""
    weight_T: Tensor
    """w of the merge, float64."""
    delivered_T: Tensor
    """‖ΔW‖²_F as delivered, float64."""

    def moved(self, transport: Transport) -> ModuleTasks:
        """The same tasks in the next basis: one product per side for all tasks together."""
        return self._with(transport.out @ self.e_KS, transport.inward @ self.f_KS)

    def joined(self, other: ModuleTasks) -> ModuleTasks:
        """These tasks, then the others, in the same basis."""
        return ModuleTasks(
            self.task_ids + other.task_ids,
            self.ranks + other.ranks,
            torch.cat([self.e_KS, other.e_KS], dim=1),
            torch.cat([self.f_KS, other.f_KS], dim=1),
            torch.cat([self.sigma_S, other.sigma_S]),
            torch.cat([self.weight_T, other.weight_T]),
            torch.cat([self.delivered_T, other.delivered_T]),
        )

    def rounded(self) -> ModuleTasks:
        """What a reader finds in the blob: coefficients through float32."""
        return self._with(self.e_KS.float().double(), self.f_KS.float().double())

    def kept(self) -> Tensor:
        """‖E_i·F_iᵀ‖²_F per task."""
        return kept_energy(self.e_KS, self.f_KS, self.ranks)

    def only(self, task_id: str) -> ModuleTasks:
        """One task alone."""
        index = self.task_ids.index(task_id)
        start = sum(self.ranks[:index])
        columns, row = slice(start, start + self.ranks[index]), slice(index, index + 1)
        return ModuleTasks(
            (task_id,),
            (self.ranks[index],),
            self.e_KS[:, columns],
            self.f_KS[:, columns],
            self.sigma_S[columns],
            self.weight_T[row],
            self.delivered_T[row],
        )

    def _with(self, e_KS: Tensor, f_KS: Tensor) -> ModuleTasks:
        return ModuleTasks(self.task_ids, self.ranks, e_KS, f_KS, self.sigma_S, self.weight_T, self.delivered_T)


@dataclass(frozen=True)
class ModuleSubspace:
    """One module of the subspace at one version."""

    basis: ModuleBasis
    tasks: ModuleTasks


@dataclass(frozen=True)
class Merge:
    """What one merge made.

    Args:
        modules: The state after, modules that nobody touched included.
        transports: For every module that was open before and changed.
        arrivals: Task id to its coefficients per module, as they are to be written.
        drift: Task id to ‖ΔŴ_before − ΔŴ_after‖_F / ‖ΔW‖_F, for every task that was there before.
        error_at_birth: Task id to ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F, for every task that arrived.
        delivered_energy: Task id to Σ over modules of ‖ΔW‖²_F, for every task that arrived.
    """

    modules: Mapping[str, ModuleSubspace]
    transports: Mapping[str, Transport]
    arrivals: Mapping[str, Mapping[str, ModuleTasks]]
    drift: Mapping[str, float]
    error_at_birth: Mapping[str, float]
    delivered_energy: Mapping[str, float]


@dataclass(frozen=True)
class ModuleMerge:
    """What one merge made of one module. `lost_T` belongs to the tasks before, `missed_T` to those that arrived."""

    after: ModuleSubspace
    transport: Transport
    arrivals: ModuleTasks
    lost_T: Tensor
    missed_T: Tensor


def merge_adapters(
    modules: Mapping[str, ModuleSubspace], adapters: Mapping[str, Adapter], settings: SubspaceSettings
) -> Merge:
    """Merge adapters that waited together in one step.

    Args:
        modules: The subspace before; empty for the first merge.
        adapters: Task id to adapter, checked, shapes fitting the modules that are open.

    Returns:
        The subspace after. Every old task's update is the orthogonal projection of what it was, as a full SVD of
        all reconstructions and the new adapters would leave it, to float32 rounding of the basis.

    Cost:
        Per touched module O((N+D)·(K+C)² + (K+C)³) for the basis and O(T·K²·R) for all old coefficients, with C
        the ranks that arrive.

    Source:
        Share (arXiv:2602.06043) for the subspace; weighted bases instead of all reconstructions after Ross et al.,
        Incremental learning for robust visual tracking (2008).
    """
    results: dict[str, ModuleMerge] = {}
    for name in sorted({name for adapter in adapters.values() for name in adapter.modules}):
        incoming = {task: adapter.modules[name] for task, adapter in adapters.items() if name in adapter.modules}
        before = modules.get(name) or empty_module(next(iter(incoming.values())).shape)
        results[name] = merge_module(before, incoming, settings)
    arrivals = {
        task: {name: result.arrivals.only(task) for name, result in results.items() if name in adapter.modules}
        for task, adapter in adapters.items()
    }
    return Merge(
        modules={**modules, **{name: result.after for name, result in results.items()}},
        transports={name: result.transport for name, result in results.items() if name in modules},
        arrivals=arrivals,
        drift=_drift(modules, results),
        error_at_birth={task: _error_at_birth(task, results) for task in adapters},
        delivered_energy={
            task: sum(float(part.delivered_T[0]) for part in parts.values()) for task, parts in arrivals.items()
        },
    )


def merge_module(
    before: ModuleSubspace, incoming: Mapping[str, ModuleUpdate], settings: SubspaceSettings
) -> ModuleMerge:
    """Merge the updates of one module: see `merge_adapters`."""
    p_NK, q_DK = orthonormalise(before.basis.p_NK), orthonormalise(before.basis.q_DK)
    weights = {task: _weight(update, settings) for task, update in incoming.items()}
    x_out = torch.cat([weights[t] * (u.u_NR.double() * u.sigma_R.double()) for t, u in incoming.items()], dim=1)
    x_in = torch.cat([weights[t] * (u.v_DR.double() * u.sigma_R.double()) for t, u in incoming.items()], dim=1)
    full_out, lam_out = extend_basis(p_NK, before.basis.lam_out_K, x_out)
    full_in, lam_in = extend_basis(q_DK, before.basis.lam_in_K, x_in)
    everyone = before.tasks.moved(Transport(full_out.T @ p_NK, full_in.T @ q_DK)).joined(
        _coefficients(incoming, weights, full_out, full_in)
    )
    k_out, k_in = _ranks(everyone, before.basis.shape, settings)
    # Rounded first: from here on the bases are what a reader will find, and everything refers to them.
    basis = ModuleBasis(
        full_out[:, :k_out].float().contiguous(),
        full_in[:, :k_in].float().contiguous(),
        lam_out[:k_out].clone(),
        lam_in[:k_in].clone(),
    )
    new_p, new_q = orthonormalise(basis.p_NK), orthonormalise(basis.q_DK)
    transport = Transport((new_p.T @ p_NK).contiguous(), (new_q.T @ q_DK).contiguous())
    moved = before.tasks.moved(transport)
    exact = _coefficients(incoming, weights, new_p, new_q)
    arrivals = exact.rounded()
    return ModuleMerge(
        after=ModuleSubspace(basis, moved.joined(arrivals)),
        transport=transport,
        arrivals=arrivals,
        # Orthogonal projection: what was lost is the difference of the energies. Rounding may make it negative.
        lost_T=(before.tasks.kept() - moved.kept()).clamp(min=0),
        missed_T=(exact.delivered_T - exact.kept()).clamp(min=0),
    )


def reconstruct(modules: Mapping[str, ModuleSubspace], task_id: str) -> dict[str, ModuleUpdate]:
    """One task's update as the subspace holds it, in canonical form, per module it adapts.

    Cost:
        O((N+D)·K·(K+R)) per module.
    """
    updates = {}
    for name, module in modules.items():
        if task_id in module.tasks.task_ids:
            one = module.tasks.only(task_id)
            p_NK, q_DK = orthonormalise(module.basis.p_NK), orthonormalise(module.basis.q_DK)
            updates[name] = canonical_in_basis(p_NK, q_DK, one.e_KS, one.f_KS)
    return updates


def empty_module(shape: tuple[int, int]) -> ModuleSubspace:
    """A module that no adapter has touched yet: no directions, no tasks."""
    none = torch.zeros(0, dtype=torch.float64)
    basis = ModuleBasis(torch.zeros(shape[0], 0), torch.zeros(shape[1], 0), none, none)
    return ModuleSubspace(basis, no_tasks(basis.ranks))


def no_tasks(ranks: tuple[int, int] = (0, 0)) -> ModuleTasks:
    """No tasks in bases of these ranks."""
    none = torch.zeros(0, dtype=torch.float64)
    e_KS, f_KS = (torch.zeros(rank, 0, dtype=torch.float64) for rank in ranks)
    return ModuleTasks((), (), e_KS, f_KS, torch.zeros(0), none, none)


def _weight(update: ModuleUpdate, settings: SubspaceSettings) -> float:
    """w of the stack; a zero update has no direction to protect."""
    energy = update_energy(update)
    if settings.weighting == "energy" or energy == 0:
        return 1.0
    return 1 / math.sqrt(energy)


def _coefficients(
    incoming: Mapping[str, ModuleUpdate], weights: Mapping[str, float], p_NK: Tensor, q_DK: Tensor
) -> ModuleTasks:
    """E = Pᵀ·U·diag(σ) and F = Qᵀ·V of each update, float64."""
    updates: Sequence[ModuleUpdate] = list(incoming.values())
    return ModuleTasks(
        tuple(incoming),
        tuple(update.rank for update in updates),
        p_NK.T @ torch.cat([u.u_NR.double() * u.sigma_R.double() for u in updates], dim=1),
        q_DK.T @ torch.cat([u.v_DR.double() for u in updates], dim=1),
        torch.cat([u.sigma_R for u in updates]),
        torch.tensor([weights[task] for task in incoming], dtype=torch.float64),
        torch.tensor([update_energy(u) for u in updates], dtype=torch.float64),
    )


def _ranks(everyone: ModuleTasks, shape: tuple[int, int], settings: SubspaceSettings) -> tuple[int, int]:
    if settings.rank_fixed is not None:
        return min(settings.rank_fixed, len(everyone.e_KS)), min(settings.rank_fixed, len(everyone.f_KS))
    return choose_ranks(
        everyone.e_KS,
        everyone.f_KS,
        everyone.ranks,
        everyone.delivered_T,
        energy_ratio_min=settings.energy_ratio_min,
        rank_max=settings.rank_max,
        cost=shape,
    )


def _drift(modules: Mapping[str, ModuleSubspace], results: Mapping[str, ModuleMerge]) -> dict[str, float]:
    lost: dict[str, float] = {}
    delivered: dict[str, float] = {}
    for name, module in modules.items():
        losses = results[name].lost_T.tolist() if name in results else [0.0] * len(module.tasks.task_ids)
        for task, loss, energy in zip(module.tasks.task_ids, losses, module.tasks.delivered_T.tolist(), strict=True):
            lost[task] = lost.get(task, 0.0) + loss
            delivered[task] = delivered.get(task, 0.0) + energy
    return {task: math.sqrt(lost[task] / delivered[task]) if delivered[task] else 0.0 for task in lost}


def _error_at_birth(task_id: str, results: Mapping[str, ModuleMerge]) -> float:
    missed = delivered = 0.0
    for result in results.values():
        if task_id in result.arrivals.task_ids:
            index = result.arrivals.task_ids.index(task_id)
            missed += float(result.missed_T[index])
            delivered += float(result.arrivals.delivered_T[index])
    return math.sqrt(missed / delivered) if delivered else 0.0
