"""Ways to make an adapter, one file each, with the same names in each: see `Method`.

All of them train an ordinary PEFT LoRA model, so that Trainer, DeepSpeed, checkpoints and evaluation know nothing of
methods, and all hand over an adapter in canonical form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.merging.basis import ModuleBasis
from workers.base_model import BaseModel


@dataclass(frozen=True)
class Given:
    """Data that a method may start from beside the base model."""

    frozen: bytes = b""
    """For `import`: the adapter in canonical form, as admission froze it."""
    version: int = 0
    """Version whose basis was leased; 0: none."""
    basis: Mapping[str, ModuleBasis] = field(default_factory=dict)
    """Module to its basis in that version."""
    adapter: Adapter | None = None
    """For a refinement: the task's adapter as that version serves it."""
    start: Adapter | None = None
    """For a revision: the revision before it as `main` serves it, with a head for this one's labels. For a LoRA that is
    trained on after `auto` has cut it: what is left of it. None: training starts from the base model."""


NOTHING = Given()


class Method(Protocol):
    """One file of this package."""

    TRAINS: bool
    """Whether there are optimisation steps between `prepare` and `finish`."""

    def needs_basis(self, spec: TaskSpec) -> bool:
        """Whether `prepare` wants a leased basis."""
        ...

    def prepare(self, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Any:
        """A PEFT model whose trainable parameters are what the method trains and the head; for `import` the adapter."""
        ...

    def after_step(self, prepared: Any, spec: TaskSpec, step: int, steps: int) -> None:
        """Called after optimisation step `step` of `steps`, counted from 1, on every rank."""
        ...

    def finish(self, prepared: Any, base: BaseModel, spec: TaskSpec, given: Given = NOTHING) -> Adapter:
        """The adapter in canonical form. Called on every rank; DeepSpeed's stage 3 gathers here.

        Args:
            given: What `prepare` got.
        """
        ...
