"""Leased bases and trained numbers for the methods' tests."""

from __future__ import annotations

from typing import Any

import torch

from subspace_store.merging.basis import ModuleBasis
from workers.base_model import BaseModel
from workers.methods import Given
from workers.methods.factors import lora_layers

ROW = {"input_ids": torch.tensor([[101, 2307, 3185, 102]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def random_basis(shape: tuple[int, int], ranks: tuple[int, int], seed: int = 0) -> ModuleBasis:
    """Two random orthonormal bases as a store would hand them out: float32."""
    draw = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(n, k, generator=draw, dtype=torch.float64))[0]
        for n, k in zip(shape, ranks, strict=True)
    ]
    return ModuleBasis(*(side.float() for side in sides), *(torch.ones(k, dtype=torch.float64) for k in ranks))


def leased(base: BaseModel, ends: tuple[str, ...], ranks: tuple[int, int] = (12, 8)) -> Given:
    """A version's bases for the modules with these names, other ones in each module."""
    shapes = {name: shape for name, shape in base.module_shapes().items() if name.endswith(ends)}
    return Given(version=3, basis={name: random_basis(shapes[name], ranks, n) for n, name in enumerate(sorted(shapes))})


def train_by_chance(model: Any, seed: int = 2) -> None:
    """Give all trainable parameters other values, as training would."""
    torch.manual_seed(seed)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**ROW).logits  # type: ignore[no-any-return]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Squared norm of a loss's gradient by parameter (`lora_A.weight`, …), all modules added up."""
    model.train()
    model(**ROW, labels=torch.tensor([1])).loss.backward()
    found: dict[str, torch.Tensor] = {}
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_") and parameter.grad is not None:
                short = name.replace(".default", "")
                found[short] = found.get(short, torch.zeros(())) + parameter.grad.square().sum()
    return found
