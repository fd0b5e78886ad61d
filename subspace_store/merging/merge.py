"""Merging adapters into the subspace: a pure step from one state to the next, module by module.

Nothing here reads or writes storage, and the cost hardly depends on how many tasks were merged before (coefficients.py
says why). Axes: N outputs, D inputs, K directions, S coefficient columns of all tasks side by side, T tasks, R rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.basis import ModuleBasis, ModuleSubspace, empty_module
from subspace_store.merging.coefficients import ModuleTasks, TaskBlock, Transport
from subspace_store.merging.private_part import ROUNDED, Frame, divided, rank_needed
from subspace_store.merging.renewal import renewed_basis, routed
from subspace_store.merging.subspace_math import (
    SLACK,
    choose_ranks,
    extend_basis,
    kept_energy,
    orthonormalise,
    update_energy,
    weight,
)
from subspace_store.module_names import is_renewed, plain, renewed
from subspace_store.parallel import in_order

TIGHTEST = 8
"""Number of tasks that ranks are chosen for first: those nearest to the energy promised to them. It changes the cost,
not the result."""
NEWEST = 8
"""Number of tasks that are asked first whether a merge takes something from them. It changes the cost, not the
result."""
NOTHING = 1e-6
"""Share of an update's energy below which it counts as lost altogether: Gram matrices in memory are float32."""
MOST_THREADS = 8
"""Most modules that are merged at the same time: more would need a good part of a second basis in memory."""
WIDE = 2**12
"""Rows of all changed modules above which modules are merged in threads; starting threads costs a millisecond."""


@dataclass(frozen=True)
class Placed:
    """New tasks in one module, in a chosen basis.

    Args:
        arrivals: Their coefficients, as they are to be written. A task whose private part is its whole update has none.
        private: Their private parts, by task id.
        task_ids: All of them.
        delivered_T: ‖ΔW‖²_F of each.
        missed_T: ‖ΔW − ΔŴ‖²_F of each.
    """

    arrivals: TaskBlock
    private: Mapping[str, ModuleUpdate]
    task_ids: tuple[str, ...]
    delivered_T: Tensor
    missed_T: Tensor


@dataclass(frozen=True)
class ModuleMerge:
    """The result of one merge for one module.

    Args:
        transport: Writes old coefficients in the new basis.
        dropped: Writes old coefficients in the directions that the new basis lacks.
        new: The new tasks in the new basis.
        before: The tasks that were merged before.
        stays: Whether the basis is the one that was there before, to the bit.
    """

    basis: ModuleBasis
    transport: Transport
    dropped: Transport
    new: Placed
    before: ModuleTasks
    stays: bool = False

    @property
    def numbers(self) -> int:
        """Numbers that the module takes afterwards: basis, all coefficients, and the new tasks' private parts."""
        (n, d), (k_out, k_in) = self.basis.shape, self.basis.ranks
        columns = sum(self.before.ranks) + sum(self.new.arrivals.ranks)
        private = sum(update.numbers for update in self.new.private.values())
        return n * k_out + d * k_in + (k_out + k_in) * columns + private

    def settle(self) -> tuple[ModuleTasks, Tensor]:
        """All tasks in the new basis, and the energy that each earlier task lost.

        This is the only part whose cost grows with the number of tasks. The new basis does not depend on it, so a
        caller may do it while the basis is being written.
        """
        moved, lost_T = self.before.truncated(self.transport, self.dropped)
        return moved.joined(self.new.arrivals) if self.new.arrivals.task_ids else moved, lost_T


class Tally:
    """Sums over all modules what a merge costs each task. Energies are squared Frobenius norms.

    Args:
        known: ‖ΔW‖²_F of earlier tasks. Where it is missing, it is summed over the modules in which they have
            coefficients.
    """

    def __init__(self, known: Mapping[str, float] = MappingProxyType({})) -> None:
        self._known = known
        # Most modules have the same tasks: their sums stay tensors until they are needed.
        self._lost: dict[tuple[str, ...], Tensor] = {}
        self._missed: dict[tuple[str, ...], Tensor] = {}
        self._delivered: dict[tuple[str, ...], Tensor] = {}

    def add(self, merge: ModuleMerge, lost_T: Tensor) -> None:
        """Add a module that the merge changes, with the losses of the earlier tasks from `settle`."""
        _add(self._lost, merge.before.task_ids, lost_T)
        _add(self._delivered, merge.before.task_ids, merge.before.delivered_T)
        _add(self._missed, merge.new.task_ids, merge.new.missed_T)
        _add(self._delivered, merge.new.task_ids, merge.new.delivered_T)

    def add_untouched(self, tasks: ModuleTasks) -> None:
        """Add a module that the merge does not change."""
        _add(self._lost, tasks.task_ids, torch.zeros_like(tasks.delivered_T))
        _add(self._delivered, tasks.task_ids, tasks.delivered_T)

    def add_exact(self, private: Mapping[str, Mapping[str, ModuleUpdate]]) -> None:
        """Add what is kept as it was delivered: task id to its updates, see `apart`."""
        for task, updates in private.items():
            energy = torch.tensor([sum(map(update_energy, updates.values()))], dtype=torch.float64)
            _add(self._missed, (task,), torch.zeros_like(energy))
            _add(self._delivered, (task,), energy)

    @property
    def delivered(self) -> dict[str, float]:
        """Task id to Σ over modules of ‖ΔW‖²_F."""
        return {**_by_task(self._delivered), **self._known}

    @property
    def drift(self) -> dict[str, float]:
        """Task id to ‖ΔŴ_before − ΔŴ_after‖_F / ‖ΔW‖_F, for every earlier task. A private part does not move."""
        return {**dict.fromkeys(self._known, 0.0), **self._relative(self._lost)}

    @property
    def error_at_birth(self) -> dict[str, float]:
        """Task id to ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F, for every new task."""
        return self._relative(self._missed)

    def _relative(self, energies: Mapping[tuple[str, ...], Tensor]) -> dict[str, float]:
        delivered = self.delivered
        return {t: math.sqrt(e / delivered[t]) if delivered[t] else 0.0 for t, e in _by_task(energies).items()}


@dataclass(frozen=True)
class Merge:
    """The result of one merge, all modules in memory.

    Args:
        modules: The state after the merge, unchanged modules included.
        transports: Transports of every module that had a basis before and was changed.
        arrivals: Module name to the coefficients of the new tasks, as they are to be written.
        tally: Cost of the merge for each task.
    """

    modules: Mapping[str, ModuleSubspace]
    transports: Mapping[str, Transport]
    arrivals: Mapping[str, TaskBlock]
    tally: Tally


def merge_adapters(
    modules: Mapping[str, ModuleSubspace],
    adapters: Mapping[str, Adapter],
    settings: SubspaceSettings,
    sized: Collection[str] = (),
) -> Merge:
    """Merge one adapter, or several in one step, in memory.

    Args:
        modules: The subspace before, renewed bases among it; empty for the first merge.
        adapters: Task id to adapter, checked, with shapes that fit the modules that have a basis.
        sized: Ids of earlier tasks whose adapters are sized: they lose nothing.

    Returns:
        The subspace after. Every old task's update is the orthogonal projection of what it was, as a full SVD of
        all reconstructions and the new adapters would leave it, to float32 rounding of the basis. Where rank_max would
        then break a promise, the basis stays as it is and the new tasks have private parts. What lies in a renewed
        basis is placed there; the renewed bases are made if this is the merge for it (`renews`).

    Cost:
        Per changed module O((N+D)·(K+C)² + (K+C)³) for the basis, with C the sum of the new adapters' ranks, and
        O(D·K·S) for what the D dropped directions take from the earlier tasks.

    Source:
        Share (arXiv:2602.06043) for the subspace; weighted bases instead of all reconstructions after Ross et al.,
        Incremental learning for robust visual tracking (2008).
    """
    tally, after = Tally(), dict(modules)
    held = {task for module in modules.values() for task in (*module.tasks.task_ids, *module.private)}
    is_renewing = renews(modules, len(sized_among(adapters) | held.intersection(sized)), settings)
    rest, exact = apart(adapters, settings)
    tally.add_exact(exact)
    adapters = routed(lambda name: modules[name].basis if name in modules else None, rest)
    transports: dict[str, Transport] = {}
    arrivals: dict[str, TaskBlock] = {}
    for name, merge in merge_modules(modules.get, adapters, settings, sized):
        tasks, lost_T = merge.settle()
        tally.add(merge, lost_T)
        known = modules[name].private if name in modules else {}
        after[name] = ModuleSubspace(merge.basis, tasks, {**known, **merge.new.private})
        arrivals[name] = merge.new.arrivals
        if name in modules:
            transports[name] = merge.transport
    for name in modules.keys() - arrivals.keys():
        tally.add_untouched(modules[name].tasks)
    for task, updates in exact.items():
        for name, update in updates.items():
            module = after.get(name) or empty_module(update.shape)
            after[name] = replace(module, private={**module.private, task: update})
    for name, module in list(after.items()):
        if plain(name) not in after:  # all that it holds of the module is in the renewed basis
            after[plain(name)] = empty_module(module.basis.shape)
        elif is_renewing and (basis := renewed_basis(module, settings)) is not None:
            after[renewed(name)] = ModuleSubspace(basis, ModuleTasks())
    return Merge(after, transports, arrivals, tally)


def apart(
    adapters: Mapping[str, Adapter], settings: SubspaceSettings
) -> tuple[dict[str, Adapter], dict[str, dict[str, ModuleUpdate]]]:
    """Divide adapters into what is to be merged and what is kept exactly, so that no merge needs to know of it.

    Kept exactly are updates in the foundation; and where earlier tasks may lose a share of their energy (`share:
    always`), adapters whose size was found by what their score needs.

    Returns:
        Task id to the adapter that is left, without tasks of which nothing is; and task id to the updates that are kept
        exactly, by module.
    """
    if not keeps_promises(settings):
        return dict(adapters), {}
    left, exact = {}, {}
    for task, adapter in adapters.items():
        is_exact = adapter.is_sized and settings.share == "always"
        kept = {name: update for name, update in adapter.modules.items() if update.foundation or is_exact}
        if kept:
            exact[task] = kept
        if rest := {name: update for name, update in adapter.modules.items() if name not in kept}:
            left[task] = replace(adapter, modules=rest) if kept else adapter
    return left, exact


def merge_modules(
    read: Callable[[str], ModuleSubspace | None],
    adapters: Mapping[str, Adapter],
    settings: SubspaceSettings,
    sized: Collection[str] = (),
) -> Iterator[tuple[str, ModuleMerge]]:
    """Merge the changed modules, in the order of their names; a few at the same time, never all.

    Args:
        read: Gives a module as it was before, None if it has no basis yet. Called from threads.
        adapters: Their updates by the names of bases, see `routed`.
        sized: Ids of earlier tasks whose adapters are sized: they lose nothing.
    """

    def merge(name: str) -> ModuleMerge:
        incoming = {task: adapter.modules[name] for task, adapter in adapters.items() if name in adapter.modules}
        before = read(name) or empty_module(next(iter(incoming.values())).shape)
        if is_renewed(name):  # they lie in it
            return _in_place(before, place_in_basis(before.basis, incoming, settings))
        return merge_module(before, incoming, settings, sized)

    sized = sized_among(adapters).union(sized)
    shapes = {name: update.shape for adapter in adapters.values() for name, update in adapter.modules.items()}
    names = sorted(shapes)
    yield from zip(names, in_order(merge, names, threads(sum(map(sum, shapes.values())))), strict=True)


def threads(rows: int) -> int:
    """How many modules to merge at the same time, for modules that have so many rows (N + D) in all."""
    return min(os.cpu_count() or 1, MOST_THREADS) if rows > WIDE else 1


def sized_among(adapters: Mapping[str, Adapter]) -> frozenset[str]:
    """Ids of the tasks whose adapters have no more numbers than their scores need."""
    return frozenset(task for task, adapter in adapters.items() if adapter.is_sized)


def merge_module(
    before: ModuleSubspace,
    incoming: Mapping[str, ModuleUpdate],
    settings: SubspaceSettings,
    sized: Collection[str] = (),
) -> ModuleMerge:
    """Merge the updates of one module: see `merge_adapters`.

    Args:
        sized: Ids of tasks, new and earlier, that are promised all their energy.
    """
    p_NK, q_DK = orthonormalise(before.basis.p_NK), orthonormalise(before.basis.q_DK)
    factors = _Factors.of(incoming, settings)
    # A sized task needs all its directions. Among them, others would keep more than they were promised.
    stays = any(task in sized for task in before.tasks.task_ids)
    out = extend_basis(p_NK, before.basis.lam_out_K, *factors.stack_out(), stays=stays)
    inward = extend_basis(q_DK, before.basis.lam_in_K, *factors.stack_in(), stays=stays)
    to_full = Transport(out.transport_JK, inward.transport_JK)
    arriving = factors.coefficients(out.directions_NJ, inward.directions_NJ)
    share_T = _promised(arriving, settings, sized)
    cap = settings.rank_max
    is_full = keeps_promises(settings) and max(len(arriving.e_KS), len(arriving.f_KS)) > cap
    frame = Frame(out.directions_NJ, inward.directions_NJ)
    if is_full and _loses(before.tasks, to_full.split(cap, cap)[1]):
        return _merge_in_place(before, to_full, arriving, frame, settings, share_T)
    if _misses_everybody(before.tasks, to_full, arriving, settings):
        inward = inward.ordered(_partners(before.tasks, to_full, arriving, settings))
        to_full = Transport(out.transport_JK, inward.transport_JK)
        arriving = factors.coefficients(out.directions_NJ, inward.directions_NJ)
        frame = Frame(out.directions_NJ, inward.directions_NJ)

    def extended(most: int) -> ModuleMerge:
        k_out, k_in = _ranks(before.tasks, to_full, arriving, before.basis.shape, settings, share_T, sized, most)
        # A reader finds the bases rounded to float32 and orthonormalised again: off by 6e-8, whatever is done here.
        basis = ModuleBasis(
            out.directions_NJ[:, :k_out].float().contiguous(),
            inward.directions_NJ[:, :k_in].float().contiguous(),
            out.energy_J[:k_out].clone(),
            inward.energy_J[:k_in].clone(),
        )
        spans = _first_directions(arriving, k_out, k_in)
        new = _new_tasks(frame, arriving, arriving.first(k_out, k_in), spans, settings, share_T)
        return ModuleMerge(basis, *to_full.split(k_out, k_in), new, before.tasks)

    chooses = shares_if_it_pays(settings)
    if chooses and not any(before.basis.ranks) and len(incoming) > 1:
        tried = [_seeded(before, incoming, settings, sized), *map(extended, _sizes(settings))]
        return min(tried, key=lambda merge: merge.numbers)
    largest = extended(cap)
    ranks = largest.basis.ranks
    if is_full and _loses(before.tasks, to_full.split(*ranks)[1]):
        return _merge_in_place(before, to_full, arriving, frame, settings, share_T)
    if not chooses or not before.tasks.task_ids:
        return largest
    same = _merge_in_place(before, to_full, arriving, frame, settings, share_T)
    grows = ranks != before.basis.ranks and max(before.basis.ranks) < settings.seed_directions
    return largest if grows or largest.numbers < same.numbers else same


def _seeded(
    before: ModuleSubspace, incoming: Mapping[str, ModuleUpdate], settings: SubspaceSettings, sized: Collection[str]
) -> ModuleMerge:
    """A group of tasks in a basis of the first ones alone, until it has `seed_directions`: what they would find that
    came one by one and have nothing in common.

    Args:
        before: A module without a basis.
    """
    first: dict[str, ModuleUpdate] = {}
    for task, update in incoming.items():
        rank = update.rank if task in sized else rank_needed(update.sigma_R.double(), settings.energy_ratio_min)
        total = sum(one.rank for one in first.values())
        if total < settings.seed_directions and total + rank <= settings.rank_max:
            first[task] = update.leading(rank)
    p_NK, q_DK = (torch.zeros(size, 0, dtype=torch.float64) for size in before.basis.shape)
    none = torch.zeros(0, dtype=torch.float64)
    basis = empty_module(before.basis.shape).basis
    if first:
        factors = _Factors.of(first, settings)
        out, inward = (
            extend_basis(p_NK, none, *factors.stack_out()),
            extend_basis(q_DK, none, *factors.stack_in()),
        )
        basis = ModuleBasis(
            out.directions_NJ.float().contiguous(),
            inward.directions_NJ.float().contiguous(),
            out.energy_J,
            inward.energy_J,
        )
    transport = Transport(*(torch.zeros(k, 0, dtype=torch.float64) for k in basis.ranks))
    new = place_in_basis(basis, incoming, settings, tuple(incoming), sized)
    return ModuleMerge(basis, transport, Transport(none[:, None], none[:, None]), new, before.tasks)


def _sizes(settings: SubspaceSettings) -> list[int]:
    """The sizes of a basis that are tried for a group of tasks at once: doubled from the smallest that is wanted."""
    sizes = [min(settings.seed_directions, settings.rank_max)]
    while sizes[-1] < settings.rank_max:
        sizes.append(min(2 * max(1, sizes[-1]), settings.rank_max))
    return sizes


def _loses(tasks: ModuleTasks, dropped: Transport) -> bool:
    """Whether some task loses anything but rounding if these directions are dropped."""
    if not (len(dropped.out) or len(dropped.inward)) or not tasks.task_ids:
        return False
    newest = tasks.only(tasks.task_ids[-NEWEST:])  # a full basis holds no direction that nobody needs: they tell
    assert newest is not None
    some_T = ModuleTasks.of(newest).lost(dropped)
    if bool((some_T > ROUNDED * newest.delivered_T).any()):
        return True
    return bool((tasks.lost(dropped) > ROUNDED * tasks.delivered_T).any())


def keeps_promises(settings: SubspaceSettings) -> bool:
    """Whether private parts keep what the basis has no room for."""
    return settings.beyond_rank_max == "private" and settings.variant == "canonical" and settings.rank_fixed is None


def shares_if_it_pays(settings: SubspaceSettings) -> bool:
    """Whether a direction joins the basis only where that stores fewer numbers."""
    return keeps_promises(settings) and settings.share == "if-it-pays"


def renews(bases: Collection[str], sized: int, settings: SubspaceSettings) -> bool:
    """Whether a merge makes the renewed bases.

    Args:
        bases: Names of the bases before it.
        sized: Number of sized tasks after it. Who imports adapters trains nothing in a basis, and unrelated ones would
            pay for it: only tasks whose sizes `auto` found are a reason to make one.
    """
    if not settings.renew_tasks or not shares_if_it_pays(settings):
        return False
    return sized >= settings.renew_tasks and not any(map(is_renewed, bases))


def _promised(arriving: TaskBlock, settings: SubspaceSettings, sized: Collection[str]) -> Tensor:
    """Share of its energy that each new task is promised."""
    shares = [1.0 if task in sized else settings.energy_ratio_min for task in arriving.task_ids]
    return torch.tensor(shares, dtype=torch.float64)


def _merge_in_place(
    before: ModuleSubspace,
    to_full: Transport,
    arriving: TaskBlock,
    frame: Frame,
    settings: SubspaceSettings,
    share_T: Tensor,
) -> ModuleMerge:
    """The merge where the basis stays as it is, so that no earlier task pays for it.

    The new tasks have what the basis holds of them, and private parts.

    Args:
        to_full: The basis in the frame.
        arriving: The new tasks in the frame.
        share_T: Share of its energy that each of them is promised.
    """
    held = arriving.moved(Transport(to_full.out.T, to_full.inward.T))
    return _in_place(before, _new_tasks(frame, arriving, held, (to_full.out, to_full.inward), settings, share_T))


def _in_place(before: ModuleSubspace, new: Placed) -> ModuleMerge:
    """New tasks in the basis as it is."""
    same = Transport(*(torch.eye(k, dtype=torch.float64) for k in before.basis.ranks))
    none = Transport(*(torch.zeros(0, k, dtype=torch.float64) for k in before.basis.ranks))
    return ModuleMerge(before.basis, same, none, new, before.tasks, stays=True)


def _new_tasks(
    frame: Frame,
    arriving: TaskBlock,
    held: TaskBlock,
    spans: tuple[Tensor, Tensor],
    settings: SubspaceSettings,
    share_T: Tensor,
) -> Placed:
    """The new tasks in a chosen basis.

    Args:
        arriving: Their updates in the frame.
        held: Their coefficients in the basis.
        spans: The basis in the frame.
        share_T: Share of its energy that each is promised.
    """
    # Orthogonal projection: what was lost is the difference of the energies. Rounding may make it negative.
    missed_T = (held.delivered_T - held.kept()).clamp(min=0)
    return _placed(frame, arriving, held, missed_T, spans, share_T, held.task_ids if keeps_promises(settings) else ())


def place_in_basis(
    basis: ModuleBasis,
    incoming: Mapping[str, ModuleUpdate],
    settings: SubspaceSettings,
    may_be_private: Collection[str] = (),
    sized: Collection[str] = (),
) -> Placed:
    """Write updates of one module in an unchanged basis.

    Args:
        may_be_private: Tasks that may have private parts, for what lies outside the basis.
        sized: Tasks that are promised all their energy.
    """
    p_NK, q_DK = orthonormalise(basis.p_NK), orthonormalise(basis.q_DK)
    factors = _Factors.of(incoming, settings)
    block = factors.coefficients(p_NK, q_DK)
    # L·Rᵀ − P·E·(Q·F)ᵀ = L⊥·Rᵀ + P·E·R⊥ᵀ, orthogonal to each other: two sums of squares, so nothing cancels.
    left_NC, right_DC = factors.left_NC - p_NK @ block.e_KS, factors.right_DC - q_DK @ block.f_KS
    missed_T = kept_energy(left_NC, factors.right_DC, block.ranks) + kept_energy(block.e_KS, right_DC, block.ranks)
    if not may_be_private:  # nothing is divided, and no frame is needed
        return Placed(block.rounded(), {}, block.task_ids, block.delivered_T, missed_T)
    # [P, L⊥] and [Q, R⊥] span the basis and the updates.
    (fresh_NC, e_CS), (fresh_DC, f_CS) = torch.linalg.qr(left_NC), torch.linalg.qr(right_DC)
    frame = Frame(torch.cat([p_NK, fresh_NC], dim=1), torch.cat([q_DK, fresh_DC], dim=1))
    arriving = replace(block, e_KS=torch.cat([block.e_KS, e_CS]), f_KS=torch.cat([block.f_KS, f_CS]))
    spans, share_T = _first_directions(arriving, *basis.ranks), _promised(block, settings, sized)
    return _placed(frame, arriving, block, missed_T, spans, share_T, may_be_private)


def _first_directions(arriving: TaskBlock, k_out: int, k_in: int) -> tuple[Tensor, Tensor]:
    """The first k directions of each side of a frame, in the frame."""
    sides = zip((arriving.e_KS, arriving.f_KS), (k_out, k_in), strict=True)
    out, inward = (torch.eye(len(side), k, dtype=torch.float64) for side, k in sides)
    return out, inward


def _placed(
    frame: Frame,
    arriving: TaskBlock,
    held: TaskBlock,
    missed_T: Tensor,
    spans: tuple[Tensor, Tensor],
    share_T: Tensor,
    may_be_private: Collection[str],
) -> Placed:
    """Divide the updates between coefficients and private parts, so that the promises are kept.

    Args:
        arriving: The updates in the frame.
        held: Their coefficients in the basis, float64.
        missed_T: Energy of each update outside the basis.
        spans: The basis in the frame.
        share_T: Share of its energy that each is promised.
        may_be_private: Tasks that may have private parts.
    """
    private: dict[str, ModuleUpdate] = {}
    shared = list(held.task_ids)
    missed_T = missed_T.clone()
    allowed_T = (1 - share_T + ROUNDED) * held.delivered_T
    for place, ((task, whole), (_, one)) in enumerate(zip(arriving.each(), held.each(), strict=True)):
        if task in may_be_private and missed_T[place] > allowed_T[place]:
            update, coefficients = (whole.e_KS, whole.f_KS), (one.e_KS, one.f_KS)
            division = divided(frame, update, spans, coefficients, float(share_T[place]))
            missed_T[place] = division.missed
            if division.update is not None:
                private[task] = division.update
            if division.is_whole:
                shared.remove(task)
    arrivals = (held if len(shared) == len(held.task_ids) else held.only(shared)).rounded()
    return Placed(arrivals, private, held.task_ids, held.delivered_T, missed_T)


@dataclass(frozen=True)
class _Factors:
    """Factors L·Rᵀ = ΔW of the new updates, side by side; w·L·diag(s) and w·R·diag(s') are stacked."""

    incoming: Mapping[str, ModuleUpdate]
    weights: Mapping[str, float]
    left_NC: Tensor
    right_DC: Tensor
    scale_C: Tensor
    """Factor s' of the input side's columns: σ in canonical form, 1 in the paper's form."""
    parts: list[int]
    """Numbers of columns that share one rounding error. In canonical form all columns of an update do, since its small
    columns carry the rounding of its large ones; in the paper's form each column has its own, as it was trained."""

    @classmethod
    def of(cls, incoming: Mapping[str, ModuleUpdate], settings: SubspaceSettings) -> _Factors:
        if settings.variant == "paper":
            raw = [update.raw() for update in incoming.values()]
            left_NC, right_DC = torch.cat([b for b, _ in raw], dim=1), torch.cat([a.T for _, a in raw], dim=1)
            ones_C = torch.ones(left_NC.shape[1], dtype=torch.float64)
            return cls(incoming, dict.fromkeys(incoming, 1.0), left_NC, right_DC, ones_C, [1] * len(ones_C))
        updates = incoming.values()
        return cls(
            incoming,
            {task: weight(update, settings.weighting) for task, update in incoming.items()},
            torch.cat([u.u_NR.double() * u.sigma_R.double() for u in updates], dim=1),
            torch.cat([u.v_DR.double() for u in updates], dim=1),
            torch.cat([u.sigma_R.double() for u in updates]),
            [update.rank for update in updates],
        )

    def stack_out(self) -> tuple[Tensor, Tensor]:
        """The stacked columns, and for each the norm of the update that it belongs to."""
        return self._sized(self.left_NC * self._weight_C())

    def stack_in(self) -> tuple[Tensor, Tensor]:
        return self._sized(self.right_DC * (self._weight_C() * self.scale_C))

    def coefficients(self, p_NK: Tensor, q_DK: Tensor) -> TaskBlock:
        """E = PᵀL and F = QᵀR of each update, float64."""
        ranks = tuple(update.rank for update in self.incoming.values())
        return TaskBlock(
            tuple(self.incoming),
            ranks,
            (self.left_NC.T @ p_NK).T,
            (self.right_DC.T @ q_DK).T,
            torch.cat([update.sigma_R for update in self.incoming.values()]),
            torch.tensor([self.weights[task] for task in self.incoming], dtype=torch.float64),
            # The energy of the factors that are projected: in the paper's form they equal ΔW only to float32 rounding,
            # and the loss of a projection is the difference of two energies.
            kept_energy(self.left_NC, self.right_DC, ranks),
        )

    def _sized(self, stack_NC: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [part.norm() for part in torch.split(stack_NC, self.parts, dim=1)]
        return stack_NC, torch.cat([size.expand(count) for size, count in zip(sizes, self.parts, strict=True)])

    def _weight_C(self) -> Tensor:
        return torch.tensor([self.weights[t] for t, u in self.incoming.items() for _ in range(u.rank)]).double()


def _misses_everybody(tasks: ModuleTasks, to_full: Transport, arrivals: TaskBlock, settings: SubspaceSettings) -> bool:
    """Whether `rank_max` leaves nothing of any task.

    Each side chooses its strongest directions by itself. If few are allowed, the output directions may belong to one
    task and the input directions to another, and then no update has a part in both.
    """
    cap = settings.rank_fixed or settings.rank_max
    if cap >= len(arrivals.e_KS) and cap >= len(arrivals.f_KS):
        return False
    if bool((arrivals.first(cap, cap).kept() > NOTHING * arrivals.delivered_T).any()):
        return False
    kept_T = tasks.kept() - tasks.lost(to_full.split(cap, cap)[1])
    return not bool((kept_T > NOTHING * tasks.delivered_T).any())


def _partners(tasks: ModuleTasks, to_full: Transport, arrivals: TaskBlock, settings: SubspaceSettings) -> Tensor:
    """An order of the input directions: first those that hold most of what the leading output directions keep."""
    everyone = TaskBlock.joined([*([tasks.settled.moved(to_full)] if tasks.task_ids else []), arrivals])
    cap = settings.rank_fixed or settings.rank_max
    energy_J = torch.zeros(len(everyone.f_KS), dtype=torch.float64)
    for _, task in everyone.each():
        energy_J += task.weight_T.square() * (task.e_KS[:cap] @ task.f_KS.T).square().sum(dim=0)
    return energy_J.argsort(descending=True, stable=True)


def _ranks(
    tasks: ModuleTasks,
    to_full: Transport,
    arrivals: TaskBlock,
    shape: tuple[int, int],
    settings: SubspaceSettings,
    share_T: Tensor,
    sized: Collection[str],
    most: int,
) -> tuple[int, int]:
    """How many directions each side keeps: a fixed number, or the result of `choose_ranks` for all tasks.

    A task is promised `energy_ratio_min` of its energy, a sized one all that it has. `choose_ranks` is first run for
    the few tasks that are nearest to this limit. Tasks for which the result breaks the promise are added and it is run
    again, until it breaks none. This gives the same result as running it for all tasks.

    Args:
        most: Most directions of a side.
    """
    most_out, most_in = len(arrivals.e_KS), len(arrivals.f_KS)
    fixed = settings.rank_max if settings.variant == "paper" else None
    if (fixed := settings.rank_fixed or fixed) is not None:
        return min(fixed, most_out), min(fixed, most_in)
    cap_out, cap_in = min(most, most_out), min(most, most_in)
    promised_T = settings.energy_ratio_min * tasks.delivered_T
    if sized:
        promised_T[[task in sized for task in tasks.task_ids]] = torch.inf
    kept_T, at_cap_T = tasks.kept(), None
    asked = set((kept_T - promised_T).argsort()[:TIGHTEST].tolist())
    while True:
        some = sorted(asked)
        old = tasks.only([tasks.task_ids[place] for place in some])
        everyone = arrivals if old is None else TaskBlock.joined([old.moved(to_full), arrivals])
        k_out, k_in = choose_ranks(
            everyone.e_KS,
            everyone.f_KS,
            everyone.ranks,
            everyone.delivered_T,
            torch.cat([promised_T[some], share_T * arrivals.delivered_T]),
            rank_max=most,
            cost=shape,
        )
        if (k_out, k_in) == (cap_out, cap_in) or len(asked) == len(kept_T):
            return k_out, k_in
        if at_cap_T is None:
            at_cap_T = tasks.lost(to_full.split(cap_out, cap_in)[1])
        lost_T = tasks.lost(to_full.split(k_out, k_in)[1])
        required_T = torch.minimum(kept_T - at_cap_T, promised_T)
        failed_T = kept_T - lost_T < required_T - SLACK * tasks.delivered_T
        failed = set(failed_T.nonzero().flatten().tolist()) - asked
        if not failed:
            return k_out, k_in
        asked |= failed


def _add(sums: dict[tuple[str, ...], Tensor], tasks: tuple[str, ...], values_T: Tensor) -> None:
    sums[tasks] = sums[tasks] + values_T if tasks in sums else values_T


def _by_task(sums: Mapping[tuple[str, ...], Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    for tasks, values_T in sums.items():
        for task, value in zip(tasks, values_T.tolist(), strict=True):
            found[task] = found.get(task, 0.0) + value
    return found
