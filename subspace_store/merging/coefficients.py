"""The coefficients of a module's tasks, and what a change of basis does to them.

A merge must not cost more because many tasks were merged before. So old coefficients stay in the basis that they were
last written in, and the product of all transports since is kept beside them. A merge has to know only how much energy
of each task the dropped directions held, and thin products give that. From time to time neighbouring blocks of similar
size are rewritten as one block, so that there are few blocks and each column is rewritten about log(T) times.

Axes: K directions of a basis, J of the next, D directions that are dropped, S coefficient columns of all tasks side by
side, T tasks, R rank (filled up with zeros where ranks differ).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from subspace_store.merging.subspace_math import by_task

SIMILAR = 8
"""Largest ratio of the sizes of two neighbouring blocks (older to newer) at which they are joined into one."""
SMALLEST_ENERGY = 1e-74
"""Smallest ‖ΔW‖² whose root a float32 can be divided by."""


@dataclass(frozen=True)
class Transport:
    """The matrices that write coefficients of one basis in the next, one per side: R_out = P'ᵀP (J×K), float64."""

    out: Tensor
    inward: Tensor

    def split(self, k_out: int, k_in: int) -> tuple[Transport, Transport]:
        """Two transports: to the first k directions of each side, and to all directions after them."""
        first = Transport(self.out[:k_out].contiguous(), self.inward[:k_in].contiguous())
        return first, Transport(self.out[k_out:], self.inward[k_in:])

    def after(self, earlier: Transport | None) -> Transport:
        """The product of two transports: first the earlier one, then this one."""
        return self if earlier is None else Transport(self.out @ earlier.out, self.inward @ earlier.inward)


@dataclass(frozen=True)
class TaskBlock:
    """Coefficients of some tasks in one basis, side by side."""

    task_ids: tuple[str, ...]
    ranks: tuple[int, ...]
    e_KS: Tensor
    """Coefficients of the output side: float64 during a computation, float32 in memory and in files."""
    f_KS: Tensor
    sigma_S: Tensor
    """Singular values as delivered, float32."""
    weight_T: Tensor
    """Weight w of each task in the merge, float64."""
    delivered_T: Tensor
    """‖ΔW‖²_F as delivered, float64."""

    @staticmethod
    def joined(blocks: Sequence[TaskBlock]) -> TaskBlock:
        """All tasks of blocks that are in the same basis, in their order. At least one block."""
        return TaskBlock(
            tuple(task for block in blocks for task in block.task_ids),
            tuple(rank for block in blocks for rank in block.ranks),
            torch.cat([block.e_KS for block in blocks], dim=1),
            torch.cat([block.f_KS for block in blocks], dim=1),
            torch.cat([block.sigma_S for block in blocks]),
            torch.cat([block.weight_T for block in blocks]),
            torch.cat([block.delivered_T for block in blocks]),
        )

    def moved(self, transport: Transport | None) -> TaskBlock:
        """The same tasks, written in the next basis, float64."""
        e_KS, f_KS = self.e_KS.double(), self.f_KS.double()
        return (
            self._with(e_KS, f_KS) if transport is None else self._with(transport.out @ e_KS, transport.inward @ f_KS)
        )

    def first(self, k_out: int, k_in: int) -> TaskBlock:
        """The coefficients in the first k directions of each side."""
        return self._with(self.e_KS[:k_out], self.f_KS[:k_in])

    def rounded(self) -> TaskBlock:
        """The coefficients as a file holds them: float32."""
        return self._with(self.e_KS.float(), self.f_KS.float())

    def kept(self) -> Tensor:
        """‖E_i·F_iᵀ‖²_F per task."""
        return (_grams(self.e_KS, self.ranks) * _grams(self.f_KS, self.ranks)).sum(dim=(1, 2))

    def only(self, task_ids: Collection[str]) -> TaskBlock:
        """Some of the tasks, in this block's order."""
        chosen = sorted(self._places[task] for task in task_ids if task in self._places)
        columns = torch.tensor(
            [c for i in chosen for c in range(self._starts[i], self._starts[i + 1])], dtype=torch.long
        )
        rows = torch.tensor(chosen, dtype=torch.long)
        return TaskBlock(
            tuple(self.task_ids[i] for i in chosen),
            tuple(self.ranks[i] for i in chosen),
            self.e_KS[:, columns],
            self.f_KS[:, columns],
            self.sigma_S[columns],
            self.weight_T[rows],
            self.delivered_T[rows],
        )

    def has(self, task_id: str) -> bool:
        """Whether a task is in this block."""
        return task_id in self._places

    def each(self) -> Iterator[tuple[str, TaskBlock]]:
        """Each task in a block of its own."""
        column = 0
        for index, (task, rank) in enumerate(zip(self.task_ids, self.ranks, strict=True)):
            columns, row = slice(column, column + rank), slice(index, index + 1)
            yield (
                task,
                TaskBlock(
                    (task,),
                    (rank,),
                    self.e_KS[:, columns],
                    self.f_KS[:, columns],
                    self.sigma_S[columns],
                    self.weight_T[row],
                    self.delivered_T[row],
                ),
            )
            column += rank

    @cached_property
    def _places(self) -> dict[str, int]:
        return {task: place for place, task in enumerate(self.task_ids)}

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.ranks, initial=0))

    def _with(self, e_KS: Tensor, f_KS: Tensor) -> TaskBlock:
        return TaskBlock(self.task_ids, self.ranks, e_KS, f_KS, self.sigma_S, self.weight_T, self.delivered_T)


@dataclass(frozen=True)
class _Moving:
    """A block in the basis that it was last written in, float32, and the transport from there to the present basis.

    `known_grams` are the Gram matrices in the present basis, where a merge has kept them; else they are computed when
    they are first needed.
    """

    block: TaskBlock
    transport: Transport | None = None
    known_grams: tuple[Tensor, Tensor] | None = None

    def only(self, task_ids: Collection[str]) -> _Moving:
        """Some of the tasks, with their Gram matrices where they are known: the leaving of a task computes none."""
        block = self.block.only(task_ids)
        grams = self.__dict__.get("grams", self.known_grams)
        if grams is not None:
            rows = torch.tensor([i for i, task in enumerate(self.block.task_ids) if block.has(task)], dtype=torch.long)
            rank = max(block.ranks)
            grams = grams[0][rows, :rank, :rank], grams[1][rows, :rank, :rank]
        return _Moving(block, self.transport, grams)

    @cached_property
    def settled(self) -> TaskBlock:
        """The block in the present basis."""
        return self.block.moved(self.transport)

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """EᵀE / ‖ΔW‖² and FᵀF of each task in the present basis, T×R×R, float32: enough for losses to six digits."""
        if self.known_grams is not None:
            return self.known_grams
        now = self.block if self.transport is None else self.settled.rounded()
        return _grams(now.e_KS * self._scale_S, now.ranks), _grams(now.f_KS, now.ranks)

    @cached_property
    def _scale_S(self) -> Tensor:
        """1/‖ΔW‖ for each column: the square of an update of 1e-25 would be 0 in float32, and no loss of it seen."""
        scale_T = self.block.delivered_T.clamp(min=SMALLEST_ENERGY).rsqrt().float()
        return scale_T.repeat_interleave(torch.tensor(self.block.ranks))

    def kept(self) -> Tensor:
        """‖E·Fᵀ‖²_F of each task in the present basis, float64."""
        return self._energy_T * (self.grams[0] * self.grams[1]).sum(dim=(1, 2))

    @property
    def _energy_T(self) -> Tensor:
        return self.block.delivered_T.clamp(min=SMALLEST_ENERGY)

    def without(self, dropped: Transport) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of ‖E·Fᵀ‖²_F of each task without these directions, float64, and the remaining Gram matrices;
        O(D·K·S)."""
        way, ranks = dropped.after(self.transport), self.block.ranks
        less_out = _grams(way.out.float() @ (self.block.e_KS * self._scale_S), ranks)
        less_in = _grams(way.inward.float() @ self.block.f_KS, ranks)
        rest = (self.grams[0] - less_out, self.grams[1] - less_in)
        # ‖E·Fᵀ‖² − ‖E'·F'ᵀ‖² = ‖E_d·Fᵀ‖² + ‖E'·F_dᵀ‖²: sums of squares, so nothing cancels. Rounding can make a
        # square of 0 negative.
        lost_T = (less_out * self.grams[1]).sum(dim=(1, 2)) + (rest[0] * less_in).sum(dim=(1, 2))
        return self._energy_T * lost_T.clamp(min=0), rest


@dataclass(frozen=True)
class ModuleTasks:
    """The coefficients of all tasks that adapt one module, oldest task first.

    Example: tasks a, b, c were merged one after another, with the transports R2 and R3 between their bases. The blocks
    may then be (a in P1, transport R3·R2), (b in P2, transport R3), (c in P3). The next merge multiplies R4 to each of
    the three transports and changes no coefficient; `settled` is all tasks written in the present basis; `joined` makes
    one block of neighbours.
    """

    blocks: tuple[_Moving, ...] = ()

    @staticmethod
    def of(block: TaskBlock) -> ModuleTasks:
        """Tasks that are all in the present basis."""
        return ModuleTasks((_Moving(block.rounded()),))

    @cached_property
    def task_ids(self) -> tuple[str, ...]:
        return tuple(chain.from_iterable(moving.block.task_ids for moving in self.blocks))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(moving.block.ranks for moving in self.blocks))

    @cached_property
    def delivered_T(self) -> Tensor:
        return torch.cat([m.block.delivered_T for m in self.blocks]) if self.blocks else _nothing()

    @cached_property
    def settled(self) -> TaskBlock:
        """All tasks in the present basis; needs at least one task. O(K²·S) for those that are not in it yet."""
        return TaskBlock.joined([moving.settled for moving in self.blocks])

    def only(self, task_ids: Collection[str]) -> TaskBlock | None:
        """Some of the tasks in the present basis; None if none of them is here."""
        found = [
            moving.block.only(task_ids).moved(moving.transport)
            for moving in self.blocks
            if any(moving.block.has(task) for task in task_ids)
        ]
        return TaskBlock.joined(found) if found else None

    def without(self, task_ids: Collection[str]) -> ModuleTasks:
        """All tasks but these; the coefficients of the others stay as they are."""
        blocks = []
        for moving in self.blocks:
            rest = [task for task in moving.block.task_ids if task not in task_ids]
            if len(rest) == len(moving.block.task_ids):
                blocks.append(moving)
            elif rest:
                blocks.append(moving.only(rest))
        return ModuleTasks(tuple(blocks))

    def kept(self) -> Tensor:
        """‖E_i·F_iᵀ‖²_F per task, in the present basis."""
        return _each(moving.kept() for moving in self.blocks)

    def lost(self, dropped: Transport) -> Tensor:
        """The loss of ‖E_i·F_iᵀ‖²_F of each task if these directions were dropped.

        Args:
            dropped: The D directions of each side, written in the present basis: D_out×K_out and D_in×K_in.

        Cost:
            O(D·K·S) and R×R products per task.
        """
        return _each(moving.without(dropped)[0] for moving in self.blocks)

    def moved(self, transport: Transport) -> ModuleTasks:
        """The same tasks in the next basis; no coefficient is rewritten."""
        return ModuleTasks(tuple(_Moving(m.block, transport.after(m.transport)) for m in self.blocks))

    def truncated(self, transport: Transport, dropped: Transport) -> tuple[ModuleTasks, Tensor]:
        """`moved` and `lost` together, for a caller that knows which directions the next basis lacks."""
        if not len(dropped.out) and not len(dropped.inward):
            # Nothing is dropped, so the Gram matrices stay what they are, where they are known.
            moved = (
                _Moving(m.block, transport.after(m.transport), m.__dict__.get("grams", m.known_grams))
                for m in self.blocks
            )
            return ModuleTasks(tuple(moved)), torch.zeros_like(self.delivered_T)
        blocks, losses = [], []
        for moving in self.blocks:
            lost_T, rest = moving.without(dropped)
            losses.append(lost_T)
            blocks.append(_Moving(moving.block, transport.after(moving.transport), rest))
        return ModuleTasks(tuple(blocks)), _each(iter(losses))

    def joined(self, arrivals: TaskBlock) -> ModuleTasks:
        """These tasks followed by new ones (`arrivals`), which are in the present basis."""
        blocks = [*self.blocks, _Moving(arrivals.rounded())]
        while len(blocks) > 1 and len(blocks[-2].block.sigma_S) <= SIMILAR * len(blocks[-1].block.sigma_S):
            last, before = blocks.pop(), blocks.pop()
            blocks.append(_Moving(TaskBlock.joined([before.settled, last.settled]).rounded()))
        return ModuleTasks(tuple(blocks))


def _grams(columns_KS: Tensor, ranks: Sequence[int]) -> Tensor:
    columns_TRK = by_task(columns_KS, ranks)
    return columns_TRK @ columns_TRK.mT


def _each(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat([_nothing(), *(part.double() for part in parts)])


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)
