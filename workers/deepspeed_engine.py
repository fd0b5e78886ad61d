"""DeepSpeed inside a worker: what it needs before, what must be cleared after, and access to its engine's state.

The configuration is the task's own and is passed through untouched; transformers fills its `auto` values.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec, zero_stage
from workers.compiled_ops import compile_first, interruption, python


@contextlib.contextmanager
def deepspeed_process() -> Iterator[None]:
    """Let DeepSpeed use the existing process group, and leave nothing of DeepSpeed behind.

    Without the clearing a second task fails with `Group … is not registered`, and one without DeepSpeed would find
    accelerate still set up for it. The caller restores the environment and destroys the process group.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    linear = torch.nn.functional.linear
    _compile_beside()
    if not torch.cuda.is_available():
        # Else it is compiled first, for 32 seconds, and gains little: gradients of adapters are small.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
        yield
    finally:
        from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
        from deepspeed.utils import groups

        torch.nn.functional.linear = linear  # stage 3 replaces it by its own, for all models
        # At stage 3 these two would keep every task's model for ever.
        parameter_offload.FWD_MODULE_STACK.clear()
        for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None


def _compile_beside() -> None:
    """Compile each part that DeepSpeed would compile inside this process in another process beforehand."""
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder
    from torch.utils.cpp_extension import _get_build_directory

    inside_this_process = OpBuilder.jit_load
    if hasattr(inside_this_process, "__wrapped__"):
        return

    @functools.wraps(inside_this_process)
    def jit_load(builder: Any, verbose: bool = True) -> Any:
        kind = type(builder)
        compile_first(
            builder.name,
            Path(_get_build_directory(builder.name, False)),
            f"deepspeed {deepspeed.__version__}, torch {torch.__version__}",
            python(f"from {kind.__module__} import {kind.__name__}; {kind.__name__}().load()"),
        )
        return inside_this_process(builder, verbose)

    OpBuilder.jit_load = jit_load


REFUSALS = ("DeepSpeed", "train_batch_size", "untested ZeRO", "ZeRORuntimeException", "unsupported mix")
NOT_BUILT = ("JIT load", "failed to build", "compile CUDA op", "Error building extension", "CUDA version", "CUDA_HOME")
"""Words of the errors when one of DeepSpeed's own optimizers, compiled before first use, could not be compiled."""


@contextlib.contextmanager
def refusals_named(config: dict[str, Any] | None) -> Iterator[None]:
    """Turn errors of DeepSpeed and transformers about a configuration into InvalidInput: the team's mistake, no bug."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        if (told := interruption(error)) is not None:
            raise told from None
        said = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        if config is None:
            raise
        if any(words in said for words in NOT_BUILT):
            raise InvalidInput(
                f"DeepSpeed could not compile its own optimizer here: {said[:500]}",
                "training.deepspeed",
                "set optimizer.params.torch_adam: true and zero_force_ds_cpu_optimizer: false, which need no compiler; "
                "or install ninja, a C++ compiler and torch's version of CUDA on every machine with workers",
            ) from error
        if not any(words in said for words in REFUSALS):
            raise
        todo = "correct it, or set what it shares with section training to auto"
        raise InvalidInput(f"DeepSpeed refuses the configuration: {error}", "training.deepspeed", todo) from error


def is_parted(spec: TaskSpec) -> bool:
    """Whether no rank holds the whole base model (ZeRO-3): then all of them score together, else rank 0 alone."""
    return zero_stage(spec.training.deepspeed) == 3


def check_config(config: dict[str, Any] | None, bf16: bool, quantized: bool) -> None:
    """Refuse configurations that DeepSpeed would accept at first and fail on later.

    Raises:
        InvalidInput: Names the setting to change.
    """
    if config is None:
        return
    if quantized and zero_stage(config) == 3:
        raise InvalidInput(
            "stage 3 would part quantised weights from their scales, and they belong to all tasks",
            "training.deepspeed",
            "set zero_optimization.stage to 2 or less; every GPU holds the whole quantised base model anyway",
        )
    if bf16 and zero_stage(config) == 0:
        raise InvalidInput(
            "stage 0 in bf16 steps from float32 numbers that checkpoints cannot reach",
            "training.deepspeed",
            "set zero_optimization.stage to 1, which computes the same, or leave training.deepspeed out",
        )


@contextlib.contextmanager
def parted(model: Any, config: dict[str, Any] | None) -> Iterator[Any]:
    """A model to score with: its weights partitioned over the ranks where training does so, see `is_parted`.

    Every rank must then run the same batches: each forward gathers from all.
    """
    if config is None or zero_stage(config) < 3 or not torch.distributed.is_initialized():
        # Weights that are kept on the host (base_model.device: cpu) are scored where they are trained.
        yield model.to("cuda") if torch.cuda.is_available() and model.device.type == "cpu" else model
        return
    import deepspeed

    part(model, config)
    try:
        engine, *_ = deepspeed.initialize(model=model, config=_without_training(config))
        try:
            yield engine.module
        finally:
            release(engine)
    finally:
        let_go(model)


def part(model: Any, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Replace every parameter by this rank's partition of it (stage 3), copied from where the parameter lies.

    DeepSpeed by itself moves the whole model to each GPU first, and has rank 0 send each parameter to all. Here a rank
    reads its slices of the mapped files and nothing else: a machine's ranks read them once together, no GPU has to hold
    the whole model, and no rank has a copy of its own. All ranks have the same numbers: files of one digest, one seed.

    Args:
        config: The task's DeepSpeed configuration.
        dtype: Dtype that DeepSpeed computes in; None: each parameter's own.
    """
    import deepspeed

    class Parting(deepspeed.zero.Init):  # type: ignore[misc]
        def _convert_to_zero_parameters(self, param_list: Any) -> None:
            for parameter in param_list:
                if dtype is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()
                parameter.data = parameter.data.to(self.local_device)  # empty: gathered there from now on

    held = dtype or next(model.parameters()).dtype
    parting = Parting(model, config_dict_or_path=_without_training(config), dtype=held)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(parting.local_device)


def _without_training(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says how weights are partitioned."""
    zero = {
        name: value
        for name, value in config["zero_optimization"].items()
        if name != "offload_optimizer" and value != "auto"
    }
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}


def release(engine: Any) -> None:
    """Free an engine and the weights that it partitioned, once they have been read.

    At stage 3 parameters carry methods that hold the engine, in cycles through C++ that Python's collector cannot see:
    each task would leave its share of the base model and its optimizer behind. So what they hold is emptied.
    """
    engine.destroy()
    optimizer = engine.optimizer
    let_go(engine.module)
    for holder in (getattr(optimizer, "parameter_offload", None), optimizer, engine):
        if holder is not None:
            vars(holder).clear()


def let_go(model: Any) -> None:
    """Empty a task's parameters that are trained or were partitioned. Others may be shared: quantised layers are."""
    for parameter in model.parameters():
        if parameter.requires_grad or hasattr(parameter, "ds_id"):
            vars(parameter).clear()
            parameter.data = torch.empty(0)


def gathered(parameters: list[Any]) -> Any:
    """All partitions of these parameters, for reading."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


# A training state is kept per parameter and whole, not per rank and flat as the engine has it: so it does not depend on
# the stage or on how many ranks there were. Trained parameters are adapters and heads: gathering them is cheap.


def whole_state(engine: Any, parameter: Any) -> dict[str, Tensor]:
    """A parameter's float32 value (`value`) and its moments (`exp_avg`, …), whole, on the CPU. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):  # stage 0
        return whole_state_of(_base_optimizer(engine), parameter)
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None and not mapping.optim_fragment:  # DeepSpeed links all when its first group has stepped
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    value = safe_get_full_fp32_param(parameter)
    moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _moments(engine)}
    return {name: tensor.detach().cpu().clone() for name, tensor in ({"value": value} | moments).items()}


def whole_state_of(optimizer: Any, parameter: Any) -> dict[str, Tensor]:
    """As `whole_state`, from an ordinary torch optimizer."""
    state = optimizer.state.get(parameter, {})
    moments = {name: value for name, value in state.items() if value.shape == parameter.shape}
    return {name: tensor.detach().cpu().clone() for name, tensor in ({"value": parameter} | moments).items()}


def _counted(optimizer: Any, step: float, device: torch.device) -> Any:
    """The count of steps in the optimizer's own type: a number for DeepSpeed's optimizers, a tensor for torch's, which
    must lie on the GPU where one kernel reads it (`fused`)."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(step)
    reads_there = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=device if reads_there else "cpu")


def steps_taken(optimizer: Any) -> float:
    """How many steps a torch optimizer has taken; Adam's bias correction depends on it."""
    return max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0.0)


def restore_states(engine: Any, states: Mapping[Any, Mapping[str, Tensor]], step: float) -> None:
    """Give the engine back what `whole_state` took from it, or from an engine of another stage or size."""
    base = _base_optimizer(engine)
    flats = _flat_partitions(engine)
    if not flats:
        restore_states_of(base, states, step)
        return
    names = {name for state in states.values() for name in state} - {"value"}
    for flat in flats:
        base.state[flat] = {"step": _counted(base, step, flat.device)} | {
            name: torch.zeros_like(flat) for name in names
        }
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for parameter, state in states.items():
        for name, tensor in state.items():
            _put(parameter, tensor, None if name == "value" else name)


def restore_states_of(optimizer: Any, states: Mapping[Any, Mapping[str, Tensor]], step: float) -> None:
    """As `restore_states`, into an ordinary torch optimizer."""
    for parameter, state in states.items():
        with torch.no_grad():
            parameter.copy_(state["value"])
        moments = {name: tensor.to(parameter.device) for name, tensor in state.items() if name != "value"}
        if moments:
            optimizer.state[parameter] = {"step": _counted(optimizer, step, parameter.device)} | moments


def rewrite(parameters: Sequence[Any], change: Callable[[Tensor], Tensor]) -> None:
    """Change parameters between two steps, the engine's float32 copies with them. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    for parameter in parameters:
        _put(parameter, change(safe_get_full_fp32_param(parameter).detach()).cpu(), None)


def _put(parameter: Any, whole: Tensor, name: str | None) -> None:
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if name is None:
            with torch.no_grad():
                parameter.copy_(whole)
            utils.safe_set_full_fp32_param(parameter, whole.to(parameter.device))
        else:
            utils.safe_set_full_optimizer_state(parameter, whole.to(parameter.device), name)
        return
    # Stage 3. `safe_set_full_…` fails where a parameter cannot be divided evenly, so the slice is cut here.
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    padded = torch.zeros(size * torch.distributed.get_world_size(parameter.ds_process_group))
    padded[: whole.numel()] = whole.flatten()
    mine = padded[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device)
    if name is None:
        parameter.ds_tensor.data.copy_(mine)
        if parameter.data.shape == whole.shape:  # kept whole on every rank below the persistence threshold
            parameter.data.copy_(whole)
        utils.safe_set_local_fp32_param(parameter, mine)
    else:
        utils.safe_set_local_optimizer_state(parameter, mine, name)


def _base_optimizer(engine: Any) -> Any:
    """The torch optimizer at the bottom of the engine's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_partitions(engine: Any) -> list[Tensor]:
    """This rank's float32 master copies, one flat tensor a group; none below stage 1."""
    if not engine.zero_optimization_stage():
        return []
    # By their names at stage 3, at 1 and 2, and at 1 where gradients are added up in float32.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return list(next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name)))


def _moments(engine: Any) -> list[str]:
    base = _base_optimizer(engine)
    found = {
        name
        for flat in _flat_partitions(engine)
        for name, value in base.state.get(flat, {}).items()
        if torch.is_tensor(value) and value.shape == flat.shape
    }
    return sorted(found)
