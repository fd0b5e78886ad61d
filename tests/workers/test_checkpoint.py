"""Checkpoints: what is written comes back, damage is passed over, and an interrupted run ends bit for bit the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.task_spec import TrainingSpec
from subspace_store.storage.memory import MemoryStorage
from tests.workers.test_deepspeed_engine import OFFLOAD_BOTH, OFFLOAD_OPTIMIZER, zero
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.checkpoint import (
    Checkpoint,
    checkpoint_from_bytes,
    checkpoint_to_bytes,
    in_steps_of,
    newest_checkpoint,
    run_digest,
    save_checkpoint,
)
from workers.trainer import Preempted

Tiny = Callable[[str], BaseModel]

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.* is deprecated:FutureWarning")

RUN = "a" * 64
FOLDER = "staging/task-1/1-token"


def checkpoint(step: int, run: str = RUN) -> Checkpoint:
    torch.manual_seed(step)
    parameters = {"lora_A.weight": {"value": torch.randn(2, 3), "exp_avg": torch.randn(2, 3)}}
    generators = ({"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state() + 1})
    return Checkpoint(
        step=step,
        run=run,
        method="lora",
        basis_version=7,
        loss_sum=1.5,
        optimizer_step=float(step),
        scheduler={"last_epoch": step},
        parameters=parameters,
        generators=generators,
    )


def test_what_is_written_comes_back_bit_for_bit() -> None:
    content = checkpoint_to_bytes(checkpoint(3))
    back = checkpoint_from_bytes(content)
    assert back is not None
    assert (back.step, back.run, back.method, back.basis_version, back.loss_sum) == (3, RUN, "lora", 7, 1.5)
    assert back.scheduler == {"last_epoch": 3}
    assert torch.equal(back.generators[1]["cpu"], checkpoint(3).generators[1]["cpu"])
    assert checkpoint_to_bytes(back) == content == checkpoint_to_bytes(checkpoint(3))


def test_a_file_that_is_no_checkpoint_is_none_and_nothing_is_unpickled() -> None:
    import pickle

    for content in (b"", b"x" * 100, pickle.dumps({"step": 3})):
        assert checkpoint_from_bytes(content) is None


def test_the_furthest_checkpoint_of_any_attempt_is_found_and_only_two_of_an_attempt_are_kept() -> None:
    storage = MemoryStorage("furthest")
    for step in (5, 10, 15):
        save_checkpoint(storage, FOLDER, checkpoint(step))
    save_checkpoint(storage, "staging/task-1/2-other", checkpoint(12))
    assert len(storage.keys(FOLDER)) == 2
    found = newest_checkpoint(storage, "staging/task-1/", RUN)
    assert found is not None
    assert found[1].step == 15


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before() -> None:
    storage = MemoryStorage("damaged")
    save_checkpoint(storage, FOLDER, checkpoint(5))
    key = save_checkpoint(storage, FOLDER, checkpoint(10))
    content = bytearray(storage.read(key))
    content[-1] ^= 1
    storage.write(key, bytes(content))
    found = newest_checkpoint(storage, "staging/task-1/", RUN)
    assert found is not None
    assert found[1].step == 5


def test_a_checkpoint_of_another_run_is_not_gone_on_from() -> None:
    storage = MemoryStorage("another")
    save_checkpoint(storage, FOLDER, checkpoint(5))
    assert newest_checkpoint(storage, "staging/task-1/", "b" * 64) is None


def test_what_changes_training_changes_the_run_and_what_does_not_does_not() -> None:
    def run(**changes: Any) -> str:
        return run_digest(sentiment_task(**changes), "base", "data/train")

    assert run(training={"save_steps": 5}, priority=3, gate={"min_score": 0.1}) == run()
    assert run(training={"learning_rate": 0.5}) != run()
    assert run(data={"max_length": 12}) != run()
    assert run_digest(sentiment_task(), "other", "data/train") != run()


DROPOUT = {"training": {"max_steps": 6, "learning_rate": 0.02, "warmup_steps": 2}, "lora": {"lora_dropout": 0.3}}


def interrupted(desk: Desk, base: BaseModel, spec: Any, at_step: int) -> Any:
    """Trained with a preemption after a step, then again as another attempt."""
    desk.preempt_at_step = at_step
    with pytest.raises(Preempted):
        desk.train(base, spec)
    desk.preempt_at_step = math.inf
    desk.heartbeats.clear()
    return desk.train(base, spec, attempt=2, token="later", staging_key="staging/task-1/2-later/adapter.safetensors")


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_preempted_run_goes_on_from_its_checkpoint_and_ends_bit_for_bit_the_same(
    architecture: str, request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    base = tiny(architecture)  # bert drops units out itself
    spec = sentiment_task(**DROPOUT)
    if architecture == "llama":
        spec = spec.model_copy(update={"lora": spec.lora.model_copy(update={"target_modules": ("q_proj",)})})
    whole = Desk(request.node.name).train(base, spec)
    resumed = interrupted(Desk(f"{request.node.name} again"), base, spec, 4)
    assert resumed.resumed_from == 4
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert resumed.train_loss == pytest.approx(whole.train_loss, abs=1e-12)
    assert resumed.steps == whole.steps == 6


# Without a GPU DeepSpeed trains in bf16 at stages 2 and 3 only.
@pytest.mark.parametrize(
    ("stage", "bf16", "options"),
    [
        (0, False, {}),
        (1, False, {}),
        (2, False, OFFLOAD_OPTIMIZER),
        (3, False, {}),
        (2, True, {}),
        (3, True, OFFLOAD_BOTH),
    ],
    ids=str,
)
def test_so_does_one_with_deepspeed(
    stage: int, bf16: bool, options: dict[str, Any], request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    config = zero(stage, **options) | ({"bf16": {"enabled": "auto"}} if bf16 else {})
    spec = sentiment_task(**DROPOUT)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"deepspeed": config, "bf16": bf16})})
    whole = Desk(request.node.name).train(tiny("bert"), spec)
    resumed = interrupted(Desk(f"{request.node.name} again"), tiny("bert"), spec, 4)
    assert resumed.resumed_from == 4
    assert resumed.adapter_sha256 == whole.adapter_sha256


@pytest.mark.parametrize(("ranks_before", "step", "expected"), [(2, 2, 4), (1, 4, 4)])
def test_a_run_in_epochs_goes_on_from_the_same_rows_in_a_gang_of_another_size(
    ranks_before: int, step: int, expected: int, request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    desk, spec = Desk(request.node.name), sentiment_task(training={"max_steps": -1, "num_train_epochs": 2})
    desk.preempt_at_step = step
    with pytest.raises(Preempted):
        desk.train(tiny("bert"), spec)
    desk.preempt_at_step = math.inf
    (key,) = desk.storage.keys("staging/task-1/1-token/checkpoint-")
    left = checkpoint_from_bytes(desk.storage.read(key))
    assert left is not None
    desk.storage.delete(key)
    save_checkpoint(desk.storage, FOLDER, replace(left, generators=left.generators * ranks_before))
    trained = desk.train(tiny("bert"), spec)
    assert (trained.resumed_from, trained.steps) == (expected, 6)  # two ranks would have made 3 steps of these rows


def test_steps_are_counted_anew_where_a_step_takes_more_rows() -> None:
    assert in_steps_of(checkpoint(60), TrainingSpec(), 2).step == 60  # two ranks left it
    fewer = in_steps_of(checkpoint(60), TrainingSpec(), 4)
    assert (fewer.step, fewer.loss_sum, fewer.scheduler) == (30, 0.75, {"last_epoch": 30})
    assert in_steps_of(checkpoint(60), TrainingSpec(max_steps=100), 4).step == 60


def test_a_checkpoint_with_other_parameters_is_not_gone_on_from(request: pytest.FixtureRequest, tiny: Tiny) -> None:
    """As another release may have left it."""
    desk = Desk(request.node.name)
    run = run_digest(sentiment_task(), tiny("bert").sha256, "data/train")
    key = save_checkpoint(desk.storage, "staging/task-1/1-old", replace(checkpoint(2, run), basis_version=0))
    trained = desk.train(tiny("bert"), sentiment_task())
    assert (trained.resumed_from, trained.steps) == (0, 3)
    assert key not in desk.storage.keys("staging/task-1/")


def test_a_run_that_was_lost_after_its_last_step_is_not_trained_again(
    request: pytest.FixtureRequest, tiny: Tiny
) -> None:
    desk = Desk(request.node.name)
    first = desk.train(tiny("bert"), sentiment_task())
    desk.storage.delete(first.staging_key)
    desk.heartbeats.clear()
    again = desk.train(tiny("bert"), sentiment_task(), attempt=2, staging_key="staging/task-1/2-x/adapter.safetensors")
    assert again.resumed_from == again.steps == 3
    assert again.adapter_sha256 == first.adapter_sha256
    assert not [beat for beat in desk.heartbeats if beat.phase == "training"]


@pytest.mark.parametrize(("seconds", "expected"), [(1e9, [3, 6, 8]), (-1.0, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_checkpoints_are_written_on_the_schedule_and_when_steps_are_slow(
    seconds: float,
    expected: list[int],
    request: pytest.FixtureRequest,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.trainer.SAVE_SECONDS", seconds)
    desk, steps = Desk(request.node.name), []
    write = desk.storage.write

    def spy(key: str, content: bytes) -> None:
        if "checkpoint-" in key:
            steps.append(int(key.split("checkpoint-")[1][:9]))
        write(key, content)

    desk.storage.write = spy  # type: ignore[method-assign]
    desk.train(tiny("bert"), sentiment_task(training={"max_steps": 8, "save_steps": 3}))
    assert steps == expected


def test_a_storage_that_is_away_costs_a_checkpoint_and_not_the_run(request: pytest.FixtureRequest, tiny: Tiny) -> None:
    from configs.errors import Unavailable

    desk = Desk(request.node.name)
    write = desk.storage.write

    def away(key: str, content: bytes) -> None:
        if "checkpoint-" in key:
            raise Unavailable("the network is down", key)
        write(key, content)

    desk.storage.write = away  # type: ignore[method-assign]
    trained = desk.train(tiny("bert"), sentiment_task(training={"save_steps": 1}))
    assert trained.steps == 3
    said = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, str)]
    assert any("could not be written, training goes on" in line for line in said)


def test_a_smaller_micro_batch_changes_nothing_but_memory(request: pytest.FixtureRequest, tiny: Tiny) -> None:
    spec = sentiment_task(training={"max_steps": 4})
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    smaller = spec.model_copy(update={"training": spec.training.model_copy(update=halves)})
    desk, other = Desk(request.node.name), Desk(f"{request.node.name} other")
    whole, halved = desk.staged(desk.train(tiny("llama"), llama(spec))), other.train(tiny("llama"), llama(smaller))
    for name, update in other.staged(halved).modules.items():
        assert torch.allclose(update.delta(), whole.modules[name].delta(), atol=1e-6)


def llama(spec: Any) -> Any:
    return replace_targets(spec, ("q_proj",))


def replace_targets(spec: Any, targets: tuple[str, ...]) -> Any:
    return spec.model_copy(update={"lora": spec.lora.model_copy(update={"target_modules": targets})})
