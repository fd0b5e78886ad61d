"""The two factors of a LoRA layer, A and B, where a method computes them from other numbers.

PEFT's layer stays: only the `nn.Linear` in `lora_A["default"]` or `lora_B["default"]` is replaced. So the cost per
token is LoRA's, and Trainer, checkpoints and DeepSpeed see modules with parameters and nothing else. Not
`torch.nn.utils.parametrize`: PEFT reads `lora_A.weight.dtype` before every use, which would form the matrix twice,
and under ZeRO-3 gather it twice. Here `weight` is therefore a plain parameter, from which the factor is computed.

Axes: N length of the factor's columns (outputs for B, inputs for A), K directions of the basis, C columns beside it,
J = K + C, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from subspace_store.formats.peft import PREFIX
from subspace_store.merging.basis import ModuleBasis

ADAPTER = "default"
"""PEFT's name for the one adapter in a model."""


class SpannedFactor(nn.Module):
    """A factor inside the span of a frozen basis and of trainable columns beside it: reach·[basis, columns]·weight.

    `reach` = √(N/J) makes a coefficient of size s a factor whose entries have size s. Adam moves every number by about
    the learning rate, so without it the same rate would move the factor √(N/J) times slower than LoRA's own.

    Args:
        basis_NK: Orthonormal, float32; never copied, never changed.
        columns_NC: Trained; may have no columns.
        weight_JR: Coefficients.
        inward: Whether it is A, whose rows are the combinations, or B, whose columns are.
        frozen: Whether the coefficients stay what they are.
    """

    basis_NK: Tensor

    def __init__(
        self,
        basis_NK: Tensor,
        columns_NC: Tensor,
        weight_JR: Tensor,
        inward: bool,
        device: Any,
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.inward = inward
        self.reach = reach(len(basis_NK), len(weight_JR))
        # A buffer, which DeepSpeed neither partitions nor optimises. The one on the host, as leased, is kept too.
        self.register_buffer("basis_NK", basis_NK.to(device), persistent=False)
        self._exact_NK = basis_NK
        self.columns_NC = _parameter(columns_NC, device) if columns_NC.shape[1] else None
        self.weight = _parameter(weight_JR, device).requires_grad_(not frozen)

    @classmethod
    def holding(cls, factor_NR: Tensor, basis_NK: Tensor, inward: bool, device: Any) -> SpannedFactor:
        """The factor's orthogonal projection on the basis, and no columns beside it.

        Args:
            factor_NR: B, or Aᵀ.
        """
        scale = reach(len(basis_NK), basis_NK.shape[1])
        weight_KR = (basis_NK.double().T @ factor_NR.double() / scale).float()
        return cls(basis_NK, basis_NK.new_empty(len(basis_NK), 0), weight_KR, inward, device)

    def forward(self, x: Tensor) -> Tensor:
        # Formed in the basis' precision, then cast like LoRA's weight. DeepSpeed's bf16 mode rounds parameters and no
        # buffers, so that the two differ there.
        exact = self.basis_NK.dtype
        columns_NC = None if self.columns_NC is None else self.columns_NC.to(exact)
        with torch.autocast(x.device.type, enabled=False):
            factor = self._form(self.basis_NK, columns_NC, self.weight.to(exact))
        return functional.linear(x, factor.to(x.dtype))

    def exact(self) -> Tensor:
        """lora_A's or lora_B's weight in float64, from the basis as it was leased."""
        columns_NC = None if self.columns_NC is None else self.columns_NC.detach().double().cpu()
        return self._form(self._exact_NK.double(), columns_NC, self.weight.detach().double().cpu())

    def _form(self, basis_NK: Tensor, columns_NC: Tensor | None, weight_JR: Tensor) -> Tensor:
        count_K = basis_NK.shape[1]
        weight_JR = self.reach * weight_JR  # scaled here, not at the end: it has fewer numbers than the factor
        factor_NR = basis_NK @ weight_JR[:count_K]
        if columns_NC is not None:
            factor_NR = torch.addmm(factor_NR, columns_NC, weight_JR[count_K:])
        return factor_NR.T if self.inward else factor_NR


def reach(size: int, directions: int) -> float:
    """√(N/J), see `SpannedFactor`."""
    return math.sqrt(size / directions)


class GatedFactor(nn.Module):
    """lora_A with one gate per row: diag(gates)·weight."""

    def __init__(self, weight_RD: Tensor, gates_R: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_RD)
        self.gates_R = nn.Parameter(gates_R.to(weight_RD))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.gates_R[:, None] * self.weight)

    @property
    def open_R(self) -> Tensor:
        """Which gates are not zero."""
        return self.gates_R.detach().cpu() != 0

    def exact(self) -> Tensor:
        """lora_A's weight without the rows whose gate is zero, float64."""
        rows = self.open_R
        return self.gates_R.detach().double().cpu()[rows, None] * self.weight.detach().double().cpu()[rows]


def _parameter(values: Tensor, device: Any) -> nn.Parameter:
    # DeepSpeed broadcasts rows of bytes, and one column of a QR has a stride that only a copy sets right.
    return nn.Parameter(values.to(device).clone(memory_format=torch.contiguous_format))


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """PEFT's layers by the name of the adapted module, in the model's order."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


def factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """(B, A) as PEFT would hold them, on the CPU, without ranks whose gate is zero. Whole parameters are expected."""
    b, a = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    b_NR, a_RD = (part.weight.detach().cpu() if isinstance(part, nn.Linear) else part.exact() for part in (b, a))
    return (b_NR[:, a.open_R] if isinstance(a, GatedFactor) else b_NR), a_RD


def spanned(basis: Mapping[str, ModuleBasis], name: str) -> ModuleBasis | None:
    """The basis of a module, if it has a direction on both sides."""
    found = basis.get(name)
    return found if found is not None and min(found.ranks) else None


def trainable_numbers(model: Any) -> dict[str, int]:
    """Adapted module to how many numbers of its update are trained; the head is not counted."""
    return {
        name: sum(
            getattr(parameter, "ds_numel", parameter.numel())  # partitioned parameters look empty
            for part, parameter in layer.named_parameters()
            if part.startswith("lora_") and parameter.requires_grad
        )
        for name, layer in lora_layers(model).items()
    }


def describe(model: Any, method: str, rank: int) -> str:
    """`share: 512 trained numbers per module in 24 modules; LoRA r 8 would have 12,288 (24×)`."""
    numbers = trainable_numbers(model)
    plain = {name: rank * (layer.in_features + layer.out_features) for name, layer in lora_layers(model).items()}
    ratio = sum(plain.values()) / max(1, sum(numbers.values()))
    modules = f"{len(numbers)} module{'s' * (len(numbers) > 1)}"
    said = f"{method}: {_per_module(numbers)} trained numbers per module in {modules}"
    return said if numbers == plain else f"{said}; LoRA r {rank} would have {_per_module(plain)} ({ratio:.3g}×)"


def _per_module(numbers: Mapping[str, int]) -> str:
    low, high = min(numbers.values()), max(numbers.values())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
