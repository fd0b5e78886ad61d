"""One training order from rows to a staged adapter, on tiny models and once on the real one."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput, Unavailable
from configs.task_spec import TaskSpec
from subspace_store import SubspaceReader
from subspace_store.adapter import Adapter, adapter_from_bytes, adapter_to_bytes
from subspace_store.digests import digest
from subspace_store.formats.peft import read_peft_folder
from subspace_store.storage.memory import MemoryStorage
from tests.workers.worker_builders import MINILM, sentiment_rows, sentiment_task, task_of_kind
from workers import tokens
from workers.base_model import BaseModel, load_base_model
from workers.orders import Point, Progress, Train, Trained
from workers.rows.task_data import TextRow
from workers.trainer import Asked, Cancelled, OutOfMemory, _start_at_the_mean
from workers.training import train_task
from workers.truncation import Length

Tiny = Callable[[str], BaseModel]


class Desk:
    """A storage with frozen rows, and somebody who gives orders and reads the heartbeats."""

    def __init__(self, name: str, train_count: int = 24, eval_count: int = 10) -> None:
        self.storage = MemoryStorage(name)
        self.storage.write("data/train", sentiment_rows(train_count, seed=1))
        self.storage.write("data/eval", sentiment_rows(eval_count, seed=2))
        self.heartbeats: list[Progress] = []
        self.cancel_at_step = math.inf
        self.preempt_at_step = math.inf

    def order(self, spec: TaskSpec, **changes: Any) -> Train:
        order = Train(
            token="token",
            task_id="task-1",
            attempt=1,
            spec=spec,
            train_key="data/train",
            eval_key="data/eval",
            staging_key="staging/task-1/1-token/adapter.safetensors",
        )
        return replace(order, **changes)

    def train(self, base: BaseModel, spec: TaskSpec, **changes: Any) -> Trained:
        store = SubspaceReader.open(self.storage)
        return train_task(self.order(spec, **changes), base, self.storage, store, self.heartbeats.append, self._asked)

    def staged(self, trained: Trained) -> Adapter:
        return adapter_from_bytes(self.storage.read(trained.staging_key))

    def _asked(self) -> Asked:
        step = self.heartbeats[-1].step + 1 if self.heartbeats else 0  # asked before it is reported
        return "cancel" if step >= self.cancel_at_step else "preempt" if step >= self.preempt_at_step else ""


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Desk:
    return Desk(request.node.name)


def weights_of(base: BaseModel) -> str:
    model = base.task_model(task_of_kind("sequence_classification"))
    return digest(b"".join(p.numpy().tobytes() for n, p in model.named_parameters() if not p.requires_grad))


def test_a_task_becomes_an_adapter_in_staging_with_its_scores(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), sentiment_task())
    adapter = desk.staged(trained)
    assert trained.adapter_sha256 == digest(desk.storage.read(trained.staging_key))
    assert trained.adapter_parameters == adapter.parameter_count == 4 * 2 * (32 + 32)  # modules × rank × (N + D)
    assert sorted(adapter.head) == ["classifier.bias", "classifier.weight"]
    assert trained.steps == 3
    assert trained.score_count == 10
    assert 0 <= trained.local_score <= 1
    assert 0 <= trained.base_score <= 1
    assert math.isfinite(trained.train_loss)


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("bert", ("dense",))]
)
def test_every_architecture_trains_all_of_its_target_modules(
    architecture: str, targets: tuple[str, ...], desk: Desk, tiny: Tiny
) -> None:
    spec = sentiment_task(lora={"target_modules": targets}, training={"learning_rate": 0.1})
    adapter = desk.staged(desk.train(tiny(architecture), spec))
    shapes = tiny(architecture).module_shapes()
    assert set(adapter.modules) == {name for name in shapes if name.endswith(targets)}
    assert all(update.energy > 0 and update.shape == shapes[name] for name, update in adapter.modules.items())


def test_the_same_order_gives_the_same_bytes_whatever_the_worker_did_before(desk: Desk, tiny: Tiny) -> None:
    spec = sentiment_task()
    first = desk.train(tiny("bert"), spec)
    desk.train(tiny("bert"), sentiment_task(training={"seed": 7}, lora={"r": 5}))
    torch.rand(3)
    again = desk.train(tiny("bert"), spec)
    assert again.adapter_sha256 == first.adapter_sha256
    assert (again.local_score, again.base_score) == (first.local_score, first.base_score)


def test_another_seed_gives_another_adapter(desk: Desk, tiny: Tiny) -> None:
    digests = {desk.train(tiny("bert"), sentiment_task(training={"seed": seed})).adapter_sha256 for seed in (1, 2)}
    assert len(digests) == 2


def test_training_leaves_the_base_model_as_it_was(desk: Desk, tiny: Tiny) -> None:
    before = weights_of(tiny("bert"))
    desk.train(tiny("bert"), sentiment_task(training={"learning_rate": 0.5, "weight_decay": 0.1}))
    assert weights_of(tiny("bert")) == before


def test_heartbeats_tell_phase_step_loss_and_when_the_first_step_began(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), sentiment_task())
    phases = list(dict.fromkeys(beat.phase for beat in desk.heartbeats))
    assert phases == ["loading", "training", "scoring", "saving"]
    steps = [beat for beat in desk.heartbeats if beat.phase == "training"]
    assert (steps[0].step, steps[0].steps, steps[0].first_step_at) == (0, 3, trained.first_step_at)
    assert steps[-1].step == 3
    assert math.isfinite(steps[-1].loss)
    assert math.isfinite(steps[-1].learning_rate)
    assert steps[-1].samples_per_second > 0
    assert steps[-1].seconds_left == 0
    points = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, Point)]
    assert [(point.step, point.steps) for point in points] == [(1, 3), (2, 3), (3, 3)]
    assert points[-1].loss == steps[-1].loss
    assert points[0].samples_per_second > 0
    assert points[0].at <= points[-1].at <= time.time()
    assert points[-1].machine.keys() >= {"cpu_utilization_percentage", "system_memory_usage_megabytes"}


def test_training_rows_that_are_read_in_part_are_told_before_the_first_step_and_with_the_result(tiny: Tiny) -> None:
    desk = Desk("long", train_count=24)  # rows of 8 tokens with their two marks
    trained = desk.train(tiny("bert"), sentiment_task(data={"max_length": 7}))
    said = "24 of 24 training rows have more tokens than data.max_length, 7: their end is not read → "
    assert [line.startswith(said) for line in trained.warnings if "training rows" in line] == [True]
    before = list(itertools.takewhile(lambda beat: beat.phase == "loading", desk.heartbeats))
    assert any(str(line).startswith(f"warning: {said}") for beat in before for line in beat.log_lines)
    assert not any("training rows" in line for line in desk.train(tiny("bert"), sentiment_task()).warnings)


def test_a_training_that_changes_nothing_says_so_with_its_result(tiny: Tiny) -> None:
    idle = Desk("idle").train(tiny("bert"), sentiment_task(training={"learning_rate": 1e-30}))
    assert any(
        line.startswith("the adapter changes nothing: in every module its update is less") for line in idle.warnings
    )
    moved = Desk("moved").train(tiny("bert"), sentiment_task())
    assert not any("changes nothing" in line for line in moved.warnings)


def test_of_many_training_rows_the_first_are_measured_and_the_warning_says_so(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MEASURED_CHARACTERS", 1000)
    trained = Desk("many", train_count=24).train(tiny("bert"), sentiment_task(data={"max_length": 7}))
    assert any(line.startswith("8 of 8 first training rows have more tokens") for line in trained.warnings)


def test_a_row_without_a_token_of_an_answer_is_refused_before_training_and_named(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk("mute")
    rows = [json.dumps({"prompt": f"say {i}", "completion": "x"}) for i in range(4)]
    desk.storage.write("data/chat", "\n".join(rows).encode())
    found = [Length(3, 2), Length(3, 2), Length(3), Length(3)]
    monkeypatch.setattr(tokens, "lengths", lambda tokenizer, spec, rows: found)
    with pytest.raises(InvalidInput, match="no token of the answer of 2 of 4 training rows, the first of them row 3"):
        desk.train(tiny("llama-lm"), task_of_kind("causal_lm"), train_key="data/chat")


def test_a_loss_that_is_no_number_tells_to_lower_the_learning_rate(desk: Desk, tiny: Tiny) -> None:
    spec = sentiment_task(training={"learning_rate": 1.0, "max_steps": 40, "max_grad_norm": 0})
    model = tiny("bert").task_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny("bert"), "task_model", lambda *arguments: _exploding(model(*arguments)))
        with pytest.raises(InvalidInput, match="the loss is nan at step") as caught:
            desk.train(tiny("bert"), spec)
    assert caught.value.where == "training.learning_rate"
    assert "lower it (it is 1)" in caught.value.todo
    assert not desk.storage.keys("staging/")


def _exploding(model: Any) -> Any:
    model.classifier.weight.data.fill_(float("inf"))
    return model


def test_an_unknown_target_module_is_the_users_mistake(desk: Desk, tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match="no linear layer 'q_proj'"):
        desk.train(tiny("bert"), sentiment_task(lora={"target_modules": ("q_proj",)}))


def test_inputs_longer_than_the_base_model_reads_are_refused_before_training(desk: Desk, tiny: Tiny) -> None:
    with pytest.raises(InvalidInput, match="65 tokens are more than") as caught:
        desk.train(tiny("bert"), sentiment_task(data={"max_length": 65}))
    assert caught.value.todo == "set it to 64 or less"


def test_a_cancelled_order_stops_in_the_step_under_way_and_stages_nothing(desk: Desk, tiny: Tiny) -> None:
    desk.cancel_at_step = 2
    with pytest.raises(Cancelled):
        desk.train(tiny("bert"), sentiment_task(training={"max_steps": 50}))
    assert max(beat.step for beat in desk.heartbeats) == 1  # the second did not come to its end
    assert not desk.storage.keys("staging/")


def test_a_storage_that_is_away_is_not_turned_into_a_failure_of_the_task(desk: Desk, tiny: Tiny) -> None:
    def away(key: str) -> bytes:
        raise Unavailable("the network is down", key)

    desk.storage.read = away  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        desk.train(tiny("bert"), sentiment_task())


def test_without_evaluation_rows_scores_are_nan_and_not_zero(desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), sentiment_task(), eval_key="")
    assert trained.score_count == 0
    assert math.isnan(trained.local_score)
    assert math.isnan(trained.base_score)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_import_is_staged_without_a_step(
    frozen: bool, desk: Desk, tiny: Tiny, peft_folder: Callable[..., str]
) -> None:
    from pathlib import Path

    folder = peft_folder(tiny("bert"), target_modules=["query"])
    brought = read_peft_folder(Path(folder), "tiny", tiny("bert").sha256)
    desk.storage.write("data/adapter", adapter_to_bytes(brought))
    spec = sentiment_task(method={"name": "import", "adapter": folder if not frozen else "/gone"})
    trained = desk.train(tiny("bert"), spec, train_key="data/adapter" if frozen else "")
    assert (trained.steps, trained.first_step_at, trained.score_count) == (0, 0, 10)
    adapter = desk.staged(trained)
    assert {n: u.energy for n, u in adapter.modules.items()} == {n: u.energy for n, u in brought.modules.items()}


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"label_smoothing_factor": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 0.5},
        {"max_steps": -1, "num_train_epochs": 1.5},
    ],
)
def test_training_values_reach_the_trainer_and_work(training: dict[str, Any], desk: Desk, tiny: Tiny) -> None:
    trained = desk.train(tiny("bert"), sentiment_task(training=training))
    assert trained.steps == (5 if "num_train_epochs" in training else 3)  # 1.5 epochs of 24 rows / 8 a step, rounded up


def test_gradient_checkpointing_changes_nothing_but_memory(desk: Desk, tiny: Tiny) -> None:
    plain = desk.staged(desk.train(tiny("bert"), sentiment_task()))
    saving = desk.staged(desk.train(tiny("bert"), sentiment_task(training={"gradient_checkpointing": True})))
    for name, update in plain.modules.items():
        assert torch.allclose(saving.modules[name].delta(), update.delta(), atol=1e-6)


def test_minilm_learns_sentiment_from_sixty_rows(request: pytest.FixtureRequest) -> None:
    desk = Desk(request.node.name, train_count=60, eval_count=40)
    spec = sentiment_task(
        training={"max_steps": 16, "per_device_train_batch_size": 16, "learning_rate": 5e-3}, lora={"r": 8}
    )
    base = load_base_model(MINILM)
    desk.train(base, sentiment_task(training={"max_steps": 1}))  # pays for first use
    given = time.time()
    trained = desk.train(base, spec)
    assert trained.local_score >= 0.9
    assert trained.local_score > trained.base_score
    assert trained.first_step_at >= given  # how soon: `make bench-training`


class Meager:
    """A base model on a machine whose memory holds only so many rows at once."""

    def __init__(self, base: BaseModel, rows_max: int) -> None:
        self.rows_max, self.tried = rows_max, list[int]()
        make = base.task_model

        def task_model(*arguments: Any, **named: Any) -> Any:
            model = make(*arguments, **named)
            model.register_forward_pre_hook(self._allocate, with_kwargs=True)
            return model

        self.task_model = task_model

    def _allocate(self, model: Any, arguments: Any, options: Any) -> None:
        rows = len(options["input_ids"])
        if model.training:
            self.tried.append(rows)
        if model.training and rows > self.rows_max:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
        "NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'",
    ],
)
def test_memory_that_runs_out_is_known_by_any_of_its_names(
    said: str, desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "OutOfMemoryError", lambda _: RuntimeError(said))  # what `Meager` raises
    monkeypatch.setattr(tiny("bert"), "task_model", Meager(tiny("bert"), 4).task_model)
    with pytest.raises(OutOfMemory, match="memory ran out with 8 rows at once"):
        desk.train(tiny("bert"), sentiment_task())


def test_out_of_memory_tells_the_numbers_and_the_settings(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny("bert"), "task_model", Meager(tiny("bert"), 4).task_model)
    with pytest.raises(InvalidInput, match=r"memory ran out with 8 rows at once; .* GiB .*2\.00 GiB") as caught:
        desk.train(tiny("bert"), sentiment_task())
    assert caught.value.where == "training.per_device_train_batch_size"
    assert "training.auto_find_batch_size: true" in caught.value.todo


def test_when_allowed_the_micro_batch_is_halved_and_a_step_sees_the_same_rows(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sentiment_task(training={"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 2})
    meager = Meager(tiny("bert"), 2)
    monkeypatch.setattr(tiny("bert"), "task_model", meager.task_model)
    trained = desk.train(tiny("bert"), spec)
    assert meager.tried == [8, 4, *[2] * 8]  # two steps of four micro-batches
    assert trained.steps == 2
    said = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, str)]
    assert "memory ran out with 4 rows at once: goes on with 2, accumulated" in said

    desk.train(tiny("bert"), spec, attempt=2, staging_key="staging/task-1/2-x/adapter.safetensors")
    assert len(meager.tried) == 10  # it goes on from the last checkpoint, with nothing left to do


def test_one_row_that_does_not_fit_is_refused_even_then(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = sentiment_task(training={"auto_find_batch_size": True, "per_device_train_batch_size": 2})
    monkeypatch.setattr(tiny("bert"), "task_model", Meager(tiny("bert"), 0).task_model)
    with pytest.raises(InvalidInput, match="memory ran out with 1 rows at once"):
        desk.train(tiny("bert"), spec)


def test_a_regression_starts_at_the_mean_of_its_labels_and_a_refinement_where_it_was(desk: Desk, tiny: Tiny) -> None:
    labels = [3.0, 4.5, 4.5]
    desk.storage.write("data/train", "\n".join(json.dumps({"text": "x", "label": n}) for n in labels).encode())
    spec = sentiment_task(
        kind="sequence_regression", metric="pearson", data={"label_names": ()}, training={"learning_rate": 1e-9}
    )
    staged = desk.staged(desk.train(tiny("bert"), spec, eval_key=""))
    assert float(staged.head["classifier.bias"]) == pytest.approx(4.0, abs=1e-6)
    model = tiny("bert").task_model(spec)
    model.classifier.bias.data.fill_(0.25)  # trained before
    model.requires_grad_(False)
    model.classifier.bias.requires_grad_(True)
    _start_at_the_mean(model, [TextRow("x", None, label) for label in labels])
    assert float(model.classifier.bias.detach()) == 0.25
