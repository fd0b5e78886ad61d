"""Taking a checkpoint out of a Trainer between two steps, and putting one back before its first.

Works the same with a plain torch optimizer and with DeepSpeed's; `deepspeed_engine.py` knows the difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers import deepspeed_engine as engines
from workers.checkpoint import Checkpoint
from workers.rank_group import RankGroup


def take(
    trainer: Any, group: RankGroup, *, step: int, run: str, method: str, basis_version: int, loss_sum: float
) -> Checkpoint:
    """The state after a step. Every rank must call it; every rank gets the same."""
    base = _torch_optimizer(trainer)
    named = trained_parameters(trainer.model)
    if trainer.is_deepspeed_enabled:
        parameters = {name: engines.whole_state(trainer.model_wrapped, p) for name, p in named.items()}
    else:
        parameters = {name: engines.whole_state_of(base, p) for name, p in named.items()}
    mine = _generator_states()
    gathered = {name: group.gather(state) for name, state in mine.items()}
    return Checkpoint(
        step=step,
        run=run,
        method=method,
        basis_version=basis_version,
        loss_sum=loss_sum,
        optimizer_step=engines.steps_taken(base),
        scheduler=json.loads(json.dumps(trainer.lr_scheduler.state_dict(), default=_plain)),
        parameters=parameters,
        generators=tuple({name: states[rank] for name, states in gathered.items()} for rank in range(group.rank.size)),
    )


def put_values(model: Any, checkpoint: Checkpoint) -> None:
    """Put the trained numbers into a model that was just prepared, before DeepSpeed partitions it."""
    for name, parameter in trained_parameters(model).items():
        with torch.no_grad():
            parameter.copy_(checkpoint.parameters[name]["value"])


def put_back(trainer: Any, group: RankGroup, checkpoint: Checkpoint) -> None:
    """Restore everything else, once the Trainer has made its optimizer and schedule and before the first step."""
    states: dict[Any, Mapping[str, Tensor]] = {
        parameter: checkpoint.parameters[name] for name, parameter in trained_parameters(trainer.model).items()
    }
    if trainer.is_deepspeed_enabled:
        engines.restore_states(trainer.model_wrapped, states, checkpoint.optimizer_step)
    else:
        engines.restore_states_of(_torch_optimizer(trainer), states, checkpoint.optimizer_step)
    trainer.lr_scheduler.load_state_dict(dict(checkpoint.scheduler))
    for group_options, rate in zip(
        trainer.optimizer.param_groups, checkpoint.scheduler.get("_last_lr", ()), strict=False
    ):
        group_options["lr"] = rate
    if len(checkpoint.generators) == group.rank.size:  # another size of gang draws other numbers anyway
        _restore_generators(checkpoint.generators[group.rank.index])


def fits(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has just the parameters that a model trains, in their shapes."""
    mine = {name: _shape(parameter) for name, parameter in trained_parameters(model).items()}
    return mine == {name: tuple(parts["value"].shape) for name, parts in checkpoint.parameters.items()}


def trained_parameters(model: Any) -> dict[str, Any]:
    """Name to parameter, for those with a gradient, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _torch_optimizer(trainer: Any) -> Any:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, then DeepSpeed's
        optimizer = optimizer.optimizer
    return optimizer


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _plain(value: Any) -> Any:
    """Turn numbers that json does not know (numpy's, one-element tensors) into Python's."""
    return value.item() if hasattr(value, "item") else None
