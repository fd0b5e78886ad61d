"""The two bases of a module, the coefficients of its tasks, and how a task's update is computed from them.

Axes: N outputs, D inputs, K directions, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subspace_store.adapter import ModuleUpdate
from subspace_store.foundation import foundation
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock
from subspace_store.merging.private_part import with_private
from subspace_store.merging.subspace_math import canonical_in_basis, orthonormalise
from subspace_store.module_names import plain


@dataclass(frozen=True)
class ModuleBasis:
    """Two orthonormal bases and the energy in each direction of everything that moved them, strongest first. A merge
    that leaves the basis as it is adds nothing to the energies."""

    p_NK: Tensor
    """Basis of the output side, float32."""
    q_DK: Tensor
    """Basis of the input side, float32."""
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
class ModuleSubspace:
    """One module of the subspace at one version."""

    basis: ModuleBasis
    tasks: ModuleTasks
    private: Mapping[str, ModuleUpdate] = field(default_factory=dict)
    """Task id to its private part; none for a task whose update the basis holds."""

    @property
    def numbers(self) -> int:
        """Numbers in both bases, in every task's coefficients, and in private parts."""
        (n, d), ranks = self.basis.shape, self.basis.ranks
        own = sum(update.numbers for update in self.private.values())
        return n * ranks[0] + d * ranks[1] + sum(self.tasks.ranks) * sum(ranks) + own

    def without(self, task_ids: Collection[str]) -> ModuleSubspace:
        """The same basis with all tasks but these."""
        private = {task: update for task, update in self.private.items() if task not in task_ids}
        return replace(self, tasks=self.tasks.without(task_ids), private=private)


def reconstruct(modules: Mapping[str, ModuleSubspace], task_id: str) -> dict[str, ModuleUpdate]:
    """One task's update as the subspace holds it, in canonical form, per module it adapts.

    Args:
        modules: By the names of their bases; a task has coefficients in one basis of a module at most.

    Cost:
        O((N+D)·K·(K+R)) per module.
    """
    shared: dict[str, ModuleUpdate] = {}
    private: dict[str, ModuleUpdate] = {}
    for name, module in modules.items():
        if (one := module.tasks.only((task_id,))) is not None:
            shared[plain(name)] = reconstruct_module(module.basis, one)
        if task_id in module.private:
            private[plain(name)] = module.private[task_id]
    names = dict.fromkeys(map(plain, modules))
    return {
        name: with_private(shared.get(name), private.get(name)) for name in names if name in shared or name in private
    }


def reconstruct_module(basis: ModuleBasis, task: TaskBlock) -> ModuleUpdate:
    """P·E·Fᵀ·Qᵀ of one task in canonical form."""
    return canonical_in_basis(orthonormalise(basis.p_NK), orthonormalise(basis.q_DK), task.e_KS, task.f_KS)


def foundation_basis(module: str, shape: tuple[int, int], directions: int) -> ModuleBasis:
    """The foundation's first directions as a basis; nothing has moved them, so their energies are 0."""
    p_NK, q_DK = foundation(module, shape, directions)
    nothing = (torch.zeros(columns.shape[1], dtype=torch.float64) for columns in (p_NK, q_DK))
    return ModuleBasis(p_NK, q_DK, *nothing)


def empty_module(shape: tuple[int, int]) -> ModuleSubspace:
    """A module that no adapter has changed yet: no directions, no tasks."""
    none = torch.zeros(0, dtype=torch.float64)
    return ModuleSubspace(ModuleBasis(torch.zeros(shape[0], 0), torch.zeros(shape[1], 0), none, none), ModuleTasks())
