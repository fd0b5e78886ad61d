"""DeepSpeed in a worker's own process: it trains the same, and the next task does not notice."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.deepspeed_engine import check_config, let_go, refusals_named, restore_states_of
from workers.trainer import Preempted

Tiny = Callable[[str], BaseModel]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.distributed.* is deprecated:FutureWarning"
)  # DeepSpeed asks by old names


OFFLOAD_OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_BOTH = OFFLOAD_OPTIMIZER | {"offload_param": {"device": "cpu"}}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    # Without the threshold DeepSpeed keeps small parameters whole, and reading them ungathered would look right.
    partitioned = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage} | partitioned | options,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam is compiled first
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto", "weight_decay": "auto"}},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


@pytest.mark.parametrize(("stage", "options"), [(2, {}), (3, {}), (2, OFFLOAD_OPTIMIZER), (3, OFFLOAD_BOTH)], ids=str)
def test_a_task_with_deepspeed_trains_like_one_without_and_leaves_nothing_behind(
    stage: int, options: dict[str, Any], request: pytest.FixtureRequest, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    desk, stages, linear = Desk(request.node.name), [], torch.nn.functional.linear
    initialize = deepspeed.initialize

    def spy(*args: Any, **options: Any) -> Any:
        made = initialize(*args, **options)
        stages.append(made[0].zero_optimization_stage())
        return made

    monkeypatch.setattr(deepspeed, "initialize", spy)
    plain = desk.train(tiny("bert"), sentiment_task())
    expected = desk.staged(plain)
    environment = dict(os.environ)
    partitioned = desk.staged(desk.train(tiny("bert"), sentiment_task(training={"deepspeed": zero(stage, **options)})))
    again = desk.train(tiny("bert"), sentiment_task())

    # At stage 3 the scores with and without the adapter come from parted weights too.
    assert stages == ([3, 3, 3] if stage == 3 else [stage])
    for name, update in expected.modules.items():
        assert torch.allclose(partitioned.modules[name].delta(), update.delta(), atol=1e-5)
    assert torch.allclose(partitioned.head["classifier.weight"], expected.head["classifier.weight"], atol=1e-5)
    assert again.adapter_sha256 == plain.adapter_sha256
    assert torch.nn.functional.linear is linear  # stage 3 has one of its own
    assert dict(os.environ) == environment


@pytest.mark.parametrize("stage", [2, 3])
def test_a_configuration_without_an_optimizer_takes_the_trainers_also_from_a_checkpoint(
    stage: int, request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    desk = Desk(request.node.name)
    expected = desk.staged(desk.train(tiny("bert"), sentiment_task()))
    config = {name: value for name, value in zero(stage).items() if name != "optimizer"}
    spec = sentiment_task(training={"deepspeed": config})
    desk.preempt_at_step = 2
    with pytest.raises(Preempted):
        desk.train(tiny("bert"), spec)
    desk.preempt_at_step = math.inf
    trained = desk.train(tiny("bert"), spec)
    assert trained.resumed_from == 2
    for name, update in expected.modules.items():
        assert torch.allclose(desk.staged(trained).modules[name].delta(), update.delta(), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4 vs hf per_device_train_batch_size=8"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True"),  # so there is no loss scale that a checkpoint would need
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu needs to be provided"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "reduce_bucket_size"),
    ],
    ids=["batch", "bf16", "fp16", "no batch", "zero"],
)
def test_a_configuration_that_deepspeed_refuses_is_the_teams_mistake(
    changes: dict[str, Any], text: str, request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    with pytest.raises(InvalidInput, match=text) as caught:
        Desk(request.node.name).train(tiny("bert"), sentiment_task(training={"deepspeed": zero(2) | changes}))
    assert caught.value.where == "training.deepspeed"


def test_an_optimizer_that_cannot_be_compiled_is_told_with_what_needs_no_compiler() -> None:
    with pytest.raises(InvalidInput, match="cpu_adam op, which failed") as caught, refusals_named(zero(2)):
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op, which failed to build/load.")
    assert "torch_adam: true" in caught.value.todo
    with pytest.raises(RuntimeError, match="shape"), refusals_named(zero(2)):
        raise RuntimeError("a bug: shape")


@pytest.mark.parametrize(("stage", "bf16", "quantized"), [(3, False, True), (0, True, False)])
def test_what_would_begin_and_not_end_well_is_refused_with_another_stage(
    stage: int, bf16: bool, quantized: bool
) -> None:
    with pytest.raises(InvalidInput, match=r"training\.deepspeed") as caught:
        check_config(zero(stage), bf16, quantized)
    assert "zero_optimization.stage to" in caught.value.todo
    check_config(zero(2), bf16, quantized)
    check_config(None, bf16, quantized)


def test_only_a_tasks_own_parameters_are_emptied_after_it() -> None:
    """A quantised layer belongs to all tasks, and its parameter carries the scales."""
    model = torch.nn.Linear(2, 3)
    model.weight.requires_grad_(False).quant_state = "scales"  # type: ignore[attr-defined]
    let_go(model)
    assert (model.weight.numel(), model.weight.quant_state, model.bias.numel()) == (6, "scales", 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_restored_count_of_steps_lies_where_the_optimizer_reads_it(device: str) -> None:
    """With `fused`, transformers' default, that is the parameter's device: on a GPU a count on the host fails."""
    parameter = torch.nn.Parameter(torch.zeros(3, device=device))
    states = {parameter: {"value": torch.ones(3), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}

    class DeepSpeeds(torch.optim.SGD):
        """Not of torch's own modules: counts in a number, as DeepSpeed's Adams do."""

    counts = {}
    for optimizer in (
        torch.optim.AdamW([parameter], fused=True),
        torch.optim.AdamW([parameter]),
        DeepSpeeds([parameter]),
    ):
        restore_states_of(optimizer, states, 7.0)
        counts[type(optimizer).__name__, bool(optimizer.defaults["fused"])] = optimizer.state[parameter]["step"]
    assert counts["AdamW", True].device.type == device
    assert counts["AdamW", False] == torch.tensor(7.0)
    assert (counts["DeepSpeeds", False], type(counts["DeepSpeeds", False])) == (7, int)


@pytest.mark.parametrize("preempted", [False, True])
def test_a_task_leaves_none_of_its_tensors_behind(preempted: bool, request: pytest.FixtureRequest, tiny: Tiny) -> None:
    """Stage 3 parts the base model's weights: a warm rank must not keep a part of them for each task it has done."""
    import gc

    def held() -> int:
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if isinstance(one, torch.Tensor))

    counts = []
    for number in range(4):
        spec = sentiment_task(training={"deepspeed": zero(3)})
        desk = Desk(f"{request.node.name}{number}")
        desk.preempt_at_step = 2 if preempted else math.inf
        with pytest.raises(Preempted) if preempted else contextlib.nullcontext():
            desk.train(tiny("bert"), spec)
        counts.append(held())
    base = sum(parameter.numel() for parameter in tiny("bert").task_model(spec).parameters())
    assert counts[3] - counts[1] < base / 100
