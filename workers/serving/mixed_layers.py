"""Layers that serve every row of a batch with the update of its own task.

y = W·x + P·E_i·F_iᵀ·Qᵀ·x + B_i·A_i·x, with task i of the row: the bases P and Q are the same for all rows, E_i, F_i and
the private part B_i·A_i are thin. In a batch this is done in one of two orders, whichever takes fewer operations:

* *projected*: Qᵀx of all tokens first, then the thin products, then P·: for few tokens and large ranks;
* *contracted*: A_i = (Q·F_i)ᵀ and B_i = P·E_i of the tasks that the batch has, once, then as LoRAs: where a row has
  more tokens than its task has ranks. Then a batch costs hardly more than with one LoRA. What was contracted serves
  all passes of a generation, until a row of another task joins.

Nothing of a task but E, F, A and B is ever kept, so that a thousand tasks fit where a few dozen LoRAs would.

Axes: S rows of a batch, T tokens of each, U tasks in a batch, N outputs, D inputs, K directions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from subspace_store.merging.basis import ModuleBasis
from subspace_store.module_names import plain


@dataclass(frozen=True)
class TaskFactors:
    """What one task adds to one module."""

    e_RK: Tensor
    """Coefficients of the output side in the module's directions, Eᵀ; no rows where the basis holds nothing of it."""
    f_RK: Tensor
    b_RN: Tensor
    """The private part's outputs, Bᵀ; no rows where there is none."""
    a_RD: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.e_RK, self.f_RK, self.b_RN, self.a_RD))


@dataclass(frozen=True)
class Directions:
    """All directions of one module: of its first basis and, beside them, of the renewed one."""

    p_NK: Tensor
    q_DK: Tensor
    starts: Mapping[str, tuple[int, int]]
    """Basis by its name to the number of directions before its own, outputs and inputs."""

    @staticmethod
    def of(bases: Mapping[str, ModuleBasis], device: Any, dtype: torch.dtype) -> Directions:
        """bases: Of one module, by their names."""
        starts, out, inward = {}, 0, 0
        for name, basis in bases.items():
            starts[name] = (out, inward)
            out, inward = out + basis.ranks[0], inward + basis.ranks[1]
        p_NK = torch.cat([basis.p_NK for basis in bases.values()], dim=1)
        q_DK = torch.cat([basis.q_DK for basis in bases.values()], dim=1)
        return Directions(p_NK.to(device, dtype), q_DK.to(device, dtype), starts)


@dataclass(frozen=True)
class Product:
    """Two thin matrices of each task in a batch, filled up with zeros to the same rank."""

    out_URN: Tensor
    in_URD: Tensor
    is_projected: bool
    """Whether they are E and F (U×R×K each), between the bases, instead of B and A."""


@dataclass
class Batch:
    """The tasks of the rows that go through the model now.

    Args:
        tasks: Of the batch, each module name to factors; some may have no row any more.
        task_S: Place in `tasks` of each row's task.
    """

    tasks: Sequence[Mapping[str, TaskFactors]]
    task_S: Tensor
    products: dict[str, Product] = field(default_factory=dict)
    """Module to what all passes of the batch share, once it was made."""

    @property
    def rows(self) -> int:
        return len(self.task_S)


class Current:
    """The batch that goes through the model now; the layers of one model share it."""

    def __init__(self) -> None:
        self.batch: Batch | None = None


class MixedLayer(nn.Module):
    """A frozen linear layer, and each row's update beside it."""

    def __init__(self, inner: nn.Module, name: str, directions: Directions | None, current: Current) -> None:
        super().__init__()
        self.inner = inner
        self._name = name
        self._directions = directions
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        batch = self._current.batch
        if batch is None or all(self._name not in task for task in batch.tasks):
            return y
        x_STD = x.reshape(batch.rows, -1, x.shape[-1])  # some models lay all tokens side by side
        made = batch.products.get(self._name)
        if made is None:
            factors = [task.get(self._name) for task in batch.tasks]
            is_projected = self._is_projected(factors, batch.rows * x_STD.shape[1])
            both = self._stack(factors) if is_projected else self._contract(factors)
            made = batch.products[self._name] = Product(*both, is_projected)
        x_STD = x_STD.to(made.in_URD.dtype)  # a quantised layer computes in another
        if made.is_projected:
            assert self._directions is not None
            added_STN = _through(x_STD @ self._directions.q_DK, made, batch) @ self._directions.p_NK.T
        else:
            added_STN = _through(x_STD, made, batch)
        return y + added_STN.reshape(y.shape).to(y.dtype)

    def _is_projected(self, factors: Sequence[TaskFactors | None], tokens: int) -> bool:
        """Whether projecting every token takes fewer operations than making B and A of every task. Where a task has a
        private part, which would be a product of its own, they are made.

        Args:
            tokens: Of all rows.
        """
        directions = self._directions
        if directions is None or any(one is not None and len(one.a_RD) for one in factors):
            return False
        k_out, k_in = directions.p_NK.shape[1], directions.q_DK.shape[1]
        ends, rank = len(directions.p_NK) * k_out + len(directions.q_DK) * k_in, _largest(factors)
        size = len(directions.p_NK) + len(directions.q_DK)
        return tokens * (ends + rank * (k_out + k_in)) < len(factors) * rank * ends + tokens * rank * size

    def _stack(self, factors: Sequence[TaskFactors | None]) -> tuple[Tensor, Tensor]:
        """E and F of each task, padded with zeros to the same rank."""
        known = next(one for one in factors if one is not None)
        none = known.e_RK[:0], known.f_RK[:0]
        return (
            _stacked([none[0] if one is None else one.e_RK for one in factors]),
            _stacked([none[1] if one is None else one.f_RK for one in factors]),
        )

    def _contract(self, factors: Sequence[TaskFactors | None]) -> tuple[Tensor, Tensor]:
        """B and A of each task, padded with zeros to the same rank."""
        known = next(one for one in factors if one is not None)
        none_RN, none_RD = known.b_RN[:0], known.a_RD[:0]
        b_URN = _stacked([none_RN if one is None else one.b_RN for one in factors])
        a_URD = _stacked([none_RD if one is None else one.a_RD for one in factors])
        if self._directions is None or not any(one is not None and len(one.e_RK) for one in factors):
            return b_URN, a_URD
        p_NK, q_DK = self._directions.p_NK, self._directions.q_DK
        e_URK, f_URK = self._stack(factors)
        return torch.cat([e_URK @ p_NK.T, b_URN], dim=1), torch.cat([f_URK @ q_DK.T, a_URD], dim=1)


def _through(x_STD: Tensor, made: Product, batch: Batch) -> Tensor:
    """out_iᵀ·in_i·x of each row's task i."""
    if len(made.out_URN) == 1:
        return (x_STD @ made.in_URD[0].T) @ made.out_URN[0]
    return torch.bmm(torch.bmm(x_STD, made.in_URD[batch.task_S].transpose(1, 2)), made.out_URN[batch.task_S])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of different numbers of rows as one tensor, filled up with zeros."""
    return parts[0][None] if len(parts) == 1 else pad_sequence(list(parts), batch_first=True)


def _largest(factors: Sequence[TaskFactors | None]) -> int:
    return max((len(one.e_RK) for one in factors if one is not None), default=0)


class MixedLayers:
    """A model whose layers serve each row with its own task.

    Args:
        model: A transformers model without adapters; its linear layers are wrapped, their weights stay shared.
        names: Full names of the layers that tasks may adapt.
        bases: Of a version, by the names of bases.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], bases: Mapping[str, ModuleBasis]) -> None:
        self._current = Current()
        self.directions: dict[str, Directions] = {}
        for name in names:
            inner = model.get_submodule(name)
            weight: Any = inner.weight
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32  # a quantised layer's is integers
            of_module = {key: basis for key, basis in bases.items() if plain(key) == name and max(basis.ranks)}
            if of_module:
                self.directions[name] = Directions.of(of_module, weight.device, dtype)
            model.set_submodule(name, MixedLayer(inner, name, self.directions.get(name), self._current))

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """While this lasts, row i of what goes through the model is one of task batch.tasks[batch.task_S[i]]."""
        self._current.batch = batch
        try:
            yield
        finally:
            self._current.batch = None
