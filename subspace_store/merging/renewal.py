"""The renewed basis of a module: the leading directions of many tasks, beside the basis that the first tasks made.

The first four or five tasks make a module's basis, and later ones are trained in it. Once there are a dozen tasks or
more, the leading directions of all of them are a better basis to train in, and a smaller one. Tasks that have
coefficients in the first basis must not move, so the first basis stays, and the renewed one is made once and stands
beside it, under a name of its own (module_names.py). Of a task's update it holds all or nothing.

The probability of the right label on 60 to 69 validation rows, of three tasks of eleven BANKING77 intents each (one
seed), and the numbers that C takes; LoRA r 8 has 73,728:

    LoRA r 8                          0.885    0.906    0.902
    32 directions of the first 5      0.877    0.923    0.903    a LoRA was kept (31,488), 10,112, 7,552
    24 leading ones of 8 tasks        0.871    0.937    0.905    a LoRA was kept (31,488), 6,000, 5,952
    24 leading ones of 12 tasks       0.886    0.935    0.908    5,808, 6,000, 5,904
    24 leading ones of 16 tasks       0.894    0.935    0.906    5,808, 4,656, 5,856
    24 leading ones of 20 tasks       0.892    0.935    0.905    4,560, 6,000, 7,632
    32 leading ones of 20 tasks       0.904    0.945    0.926    about 10,100 each
    16 leading ones of 20 tasks       0.870    0.900    0.882

Axes: N outputs of a module, D inputs, K directions, C columns of all updates side by side, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
from subspace_store.merging.coefficients import ModuleTasks
from subspace_store.merging.private_part import ROUNDED, with_private
from subspace_store.merging.subspace_math import (
    ROUNDING,
    canonical_in_basis,
    kept_energy,
    orthonormalise,
    update_energy,
    weight,
)
from subspace_store.module_names import is_renewed, renewed
from subspace_store.parallel import in_order

FOLDED_AT = 2
"""Columns beside each other, relative to their length, at which they are replaced by as few: memory does not grow with
the number of tasks."""


def most_directions(settings: SubspaceSettings) -> int:
    """How many directions a renewed basis has on each side."""
    return min(settings.renew_directions, settings.rank_max)


def renewed_basis(module: ModuleSubspace, settings: SubspaceSettings) -> ModuleBasis | None:
    """The leading directions of all tasks of a module.

    Args:
        module: Its first basis with all tasks, and their private parts.

    Returns:
        The first left singular vectors, as many as `most_directions` says, of [w₁·U₁·σ₁ … w_T·U_T·σ_T] and of the
        same with V, ΔW_t = U_t·diag(σ_t)·V_tᵀ being what the module holds of task t; None where the tasks have fewer
        directions.

    Cost:
        O(N·C·min(N, C)) for N×C columns.
    """
    count = most_directions(settings)
    if count > min(module.basis.shape):
        return None
    updates = [(weight(update, settings.weighting), update) for update in _updates(module)]
    out = _leading((w * (u.u_NR.double() * u.sigma_R.double()) for w, u in updates), count)
    inward = _leading((w * (u.v_DR.double() * u.sigma_R.double()) for w, u in updates), count)
    if out is None or inward is None:
        return None
    return ModuleBasis(out[0], inward[0], out[1], inward[1])


def without_tasks(bases: Mapping[str, ModuleBasis]) -> dict[str, ModuleSubspace]:
    """The renewed ones of these bases, as modules that hold no task yet: what a subspace that is made again keeps of
    the one before. They are directions of many tasks, and no task's coefficients."""
    return {name: ModuleSubspace(basis, ModuleTasks()) for name, basis in bases.items() if is_renewed(name)}


def routed(
    read: Callable[[str], ModuleBasis | None], adapters: Mapping[str, Adapter], at_once: int = 1
) -> dict[str, Adapter]:
    """The same adapters, with every update that lies in its module's renewed basis under that basis' name.

    An update lies there if all of it but rounding does (`ROUNDED`): pure geometry, whatever it was trained in.

    Args:
        read: Gives a basis by its name, None where there is none. Called from threads, if several `at_once`.
    """
    names = sorted({name for adapter in adapters.values() for name in adapter.modules})

    def inside(name: str) -> list[str]:
        """The tasks whose updates of a module lie in its renewed basis."""
        if (basis := read(renewed(name))) is None:
            return []
        p_NK, q_DK = orthonormalise(basis.p_NK), orthonormalise(basis.q_DK)
        some = {task: adapter.modules[name] for task, adapter in adapters.items() if name in adapter.modules}
        return [task for task, update in some.items() if _lies_in(p_NK, q_DK, update)]

    found = dict(zip(names, in_order(inside, names, at_once), strict=True))
    return {
        task: under_renewed(adapter, [name for name in adapter.modules if task in found[name]])
        for task, adapter in adapters.items()
    }


def under_renewed(adapter: Adapter, names: Iterable[str]) -> Adapter:
    """The same adapter, with its updates of these modules under the names of their renewed bases."""
    chosen = set(names)
    modules = {renewed(name) if name in chosen else name: update for name, update in adapter.modules.items()}
    return replace(adapter, modules=modules) if chosen else adapter


def _lies_in(p_NK: Tensor, q_DK: Tensor, update: ModuleUpdate) -> bool:
    left_NR, right_DR, rank = update.u_NR.double() * update.sigma_R.double(), update.v_DR.double(), (update.rank,)
    e_KR, f_KR = p_NK.T @ left_NR, q_DK.T @ right_DR
    # L·Rᵀ − P·E·(Q·F)ᵀ = L⊥·Rᵀ + P·E·R⊥ᵀ, orthogonal to each other: two sums of squares, so nothing cancels.
    missed = kept_energy(left_NR - p_NK @ e_KR, right_DR, rank) + kept_energy(e_KR, right_DR - q_DK @ f_KR, rank)
    return float(missed) <= ROUNDED * update_energy(update)


def _updates(module: ModuleSubspace) -> Iterator[ModuleUpdate]:
    """What the module holds of each task, in canonical form."""
    p_NK, q_DK = orthonormalise(module.basis.p_NK), orthonormalise(module.basis.q_DK)
    shared = {
        task: canonical_in_basis(p_NK, q_DK, one.e_KS, one.f_KS)
        for task, one in (module.tasks.settled.each() if module.tasks.task_ids else ())
    }
    for task in dict.fromkeys((*shared, *module.private)):
        yield with_private(shared.get(task), module.private.get(task))


def _leading(parts: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor] | None:
    """The first left singular vectors (float32) of columns side by side and the squares of their singular values
    (float64); None if there are fewer above rounding."""
    stack_NC: Tensor | None = None
    for columns_NR in parts:
        stack_NC = columns_NR if stack_NC is None else torch.cat([stack_NC, columns_NR], dim=1)
        if stack_NC.shape[1] > FOLDED_AT * len(stack_NC):
            u_NJ, sigma_J, _ = torch.linalg.svd(stack_NC, full_matrices=False)
            stack_NC = u_NJ * sigma_J  # the same left singular vectors and values
    if stack_NC is None or stack_NC.shape[1] < count:
        return None
    u_NJ, sigma_J, _ = torch.linalg.svd(stack_NC, full_matrices=False)
    if not bool(sigma_J[count - 1] > ROUNDING * sigma_J[0]):
        return None
    return u_NJ[:, :count].float().contiguous(), sigma_J[:count].square()
