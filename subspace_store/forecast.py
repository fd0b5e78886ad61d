"""What merging adapters would cost, before doing it and without any data.

The same mathematics as the merge, module by module, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.files.version_tensors import VersionTensors, without
from subspace_store.log.version import SubspaceState
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace
from subspace_store.merging.coefficients import ModuleTasks
from subspace_store.merging.merge import Tally, apart, merge_modules
from subspace_store.merging.renewal import routed
from subspace_store.merging.subspace_math import orthonormalise, update_energy


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a merge onto a version would do. Errors and drifts are relative to ‖ΔW‖_F, as in a `Version`."""

    parent: int
    error_at_birth: Mapping[str, float]
    """Error at birth of each new adapter, by id."""
    spanned: Mapping[str, float]
    """Share of each new adapter's energy, 0 to 1, that foundation and basis span already: one near 1 needs no new
    directions."""
    drift: Mapping[str, float]
    """Drift of each earlier task through this merge, by id."""
    error: Mapping[str, float]
    """Error of each earlier task afterwards, by id; see `SubspaceState.errors`."""
    ranks: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    """Changed basis, named as by `SubspaceReader.ranks`, to (k_out, k_in) before and after. A merge that makes renewed
    bases takes nothing from any task by that, and they are not among these."""


def forecast(
    tensors: VersionTensors,
    state: SubspaceState,
    parent: int,
    adapters: Mapping[str, Adapter],
    settings: SubspaceSettings,
    left: Collection[str] = (),
) -> Forecast:
    """The effect that merging these adapters with `write_version` would have.

    Args:
        adapters: Id to adapter, with shapes that fit.
        left: Ids of the parent's tasks that would leave.

    Cost:
        As `merge_adapters`; reads the bases of the changed modules.
    """
    homes, tasks = tensors.homes(parent), without(tensors.tasks(parent), left)
    known = {id_: task for id_, task in state.tasks_at(parent).items() if id_ not in left}
    sized = {task.task_id for task in known.values() if task.is_sized}
    tally, ranks = Tally({task.task_id: task.delivered_energy for task in known.values()}), {}
    spanned, none = dict.fromkeys(adapters, 0.0), ModuleTasks()  # none: a module whose tasks are all private

    def read(name: str) -> ModuleSubspace | None:
        return ModuleSubspace(tensors.module_basis(parent, name), tasks.get(name, none)) if name in homes else None

    left, exact = apart(adapters, settings)
    rest = routed(lambda name: tensors.module_basis(parent, name) if name in homes else None, left)
    tally.add_exact(exact)
    for id_, updates in exact.items():
        for name, update in updates.items():
            if update.foundation:
                spanned[id_] += update_energy(update)
            elif name in homes:
                spanned[id_] += spanned_energy(tensors.module_basis(parent, name), update)
    for name, merge in merge_modules(read, rest, settings, sized):
        tally.add(merge, merge.settle()[1])
        before = (0, 0)
        if name in homes:
            basis = tensors.module_basis(parent, name)
            before = basis.ranks
            for id_, adapter in rest.items():
                if name in adapter.modules:
                    spanned[id_] += spanned_energy(basis, adapter.modules[name])
        ranks[name] = before, merge.basis.ranks
    for name in homes.keys() - ranks.keys():
        tally.add_untouched(tasks.get(name, none))
    drift = tally.drift
    energy = {id_: sum(update_energy(update) for update in a.modules.values()) for id_, a in adapters.items()}
    return Forecast(
        parent=parent,
        error_at_birth=tally.error_at_birth,
        spanned={id_: min(1.0, share / energy[id_]) if energy[id_] else 1.0 for id_, share in spanned.items()},
        drift=drift,
        error={id_: math.hypot(error, drift[id_]) for id_, error in state.errors(parent).items() if id_ in known},
        ranks=ranks,
    )


def spanned_energy(basis: ModuleBasis, update: ModuleUpdate) -> float:
    """‖P·Pᵀ·ΔW·Q·Qᵀ‖²_F: the energy of an update that a basis holds without a new direction."""
    e_KR = orthonormalise(basis.p_NK).T @ (update.u_NR.double() * update.sigma_R.double())
    f_KR = orthonormalise(basis.q_DK).T @ update.v_DR.double()
    return float(((e_KR.T @ e_KR) * (f_KR.T @ f_KR)).sum())
