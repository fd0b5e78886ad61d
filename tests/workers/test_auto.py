"""Method `auto`: what it tries out, what it makes of it, and that nothing of it is left."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.task_spec import TaskSpec
from subspace_store.log.version import StagedAdapter
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.protocol import Storage
from subspace_store.subspace_store import SubspaceStore
from tests.workers.method_builders import leased
from tests.workers.test_deepspeed_engine import zero
from tests.workers.test_rank_group import free_port
from tests.workers.worker_builders import task_of_kind
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, auto, lora
from workers.rows.task_data import CompletionRow, Row
from workers.trainer import Surroundings, fit

Tiny = Callable[[str], BaseModel]
ALONE = Surroundings()
MERGED, OTHER = "green card", "late money"
"""What a language model that knows nothing is to answer, whatever it is asked: one direction in its last layers."""


def task(**training: Any) -> TaskSpec:
    values = {"learning_rate": 0.01, "max_steps": 4 * auto.STEPS_MIN, "per_device_train_batch_size": 4} | training
    lora = {"r": 4, "target_modules": ("down_proj",)}
    method = {"name": "auto", "temporary_columns": 0}
    return task_of_kind("causal_lm", (), training=values, lora=lora, method=method)


def rows(answer: str, seed: int = 1) -> Sequence[Row]:
    draw = random.Random(seed)
    asked = [" ".join(draw.choices(["bank", "money", "never", "please"], k=3)) for _ in range(100)]
    return [CompletionRow((("user", words), ("assistant", answer)), False) for words in asked]


@pytest.fixture(scope="module")
def given(tiny: Tiny) -> Given:
    store, version = merge(tiny("llama-lm"), MemoryStorage("auto"))
    return Given(version=version, basis=store.basis(version))


def merge(base: BaseModel, storage: Storage) -> tuple[SubspaceStore, int]:
    """Publish a LoRA that learnt one answer to other questions, started from another A."""
    spec = task(seed=7)
    model = lora.prepare(base, spec)
    fit(model, base, rows(MERGED, seed=2), spec, ALONE)
    store = SubspaceStore.open(storage, writer="test", base_model=base.name, base_sha256=base.sha256)
    staged = store.stage("staging/a/1/adapter.safetensors", lora.finish(model, base, spec))
    version = store.merge(
        [StagedAdapter(task_id="a", name="t/a", key=staged.key, sha256=staged.sha256)], op_key="1", actor="test"
    ).number
    store.publish(version, op_key="2", actor="test")
    return store, version


@pytest.mark.parametrize("seed", [7, 42])  # A starts where the merged one did, and elsewhere
def test_a_basis_that_holds_the_tasks_twin_means_share_and_lora_where_it_holds_another_task(
    seed: int, given: Given, tiny: Tiny
) -> None:
    name, why = auto.choose(tiny("llama-lm"), task(seed=seed), given, rows(MERGED), ALONE)
    assert name == "share", why
    name, why = auto.choose(tiny("llama-lm"), task(seed=seed), given, rows(OTHER), ALONE)
    assert name == "lora", why


def test_the_answer_is_the_same_whatever_the_process_did_before(given: Given, tiny: Tiny) -> None:
    base = tiny("llama-lm")
    first = auto.choose(base, task(), given, rows(MERGED), ALONE)
    torch.rand(3)
    assert auto.choose(base, task(), given, rows(MERGED), ALONE) == first


def test_nothing_of_it_is_left_on_the_base_model(given: Given, tiny: Tiny) -> None:
    def looks(model: Any) -> list[tuple[str, bool, float]]:
        return [(name, part.requires_grad, float(part.double().sum())) for name, part in model.named_parameters()]

    base = tiny("llama-lm")
    before = looks(base.task_model(task()))
    auto.choose(base, task(), given, rows(MERGED), ALONE)
    assert looks(base.task_model(task())) == before


def test_a_task_that_runs_out_of_memory_when_it_is_tried_out_is_left_to_lora(
    given: Given, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(tiny("llama-lm").task_model(task()).__class__, "forward", full)
    name, why = auto.choose(tiny("llama-lm"), task(), given, rows(MERGED), ALONE)
    assert name == "lora"
    assert why.startswith("auto: lora, because trying the task out failed: ")
    assert "memory ran out with 4 rows at once" in why


def test_a_module_that_the_basis_lacks_means_lora_without_trying(tiny: Tiny) -> None:
    found = auto.choose(tiny("llama-lm"), task(), NOTHING, (), ALONE)
    assert found == ("lora", "auto: lora, because the basis lacks 2 of the modules")


def test_a_base_model_that_one_process_may_not_hold_is_not_tried_out(tiny: Tiny) -> None:
    given = leased(tiny("llama-lm"), ("down_proj",))
    name, why = auto.choose(tiny("llama-lm"), task(deepspeed=zero(3)), given, (), ALONE)
    assert name == "lora"
    assert "ZeRO stage 3" in why


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((1.0, 1.08), "share"), ((1.05, 1.15), "lora"), ((1.2, 1.2), "lora"), ((0.9, 0.9), "share")],
)
def test_share_may_lack_a_tenth_of_loras_fall_a_standard_error_included(
    ends: tuple[float, float], expected: str
) -> None:
    # LoRA falls from 2 to 1, so 0.1 is allowed: 0.04 ± 0.04 is less, 0.1 ± 0.05 is not surely so.
    with_lora = [2.0, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 1.0]
    name, why = auto.verdict(with_lora, [2.0] * 6 + list(ends))
    assert name == expected
    assert why.startswith(f"auto: {expected}, because after 8 steps share's loss was 0.")
    assert f" {'below' if ends[0] < 1 else 'above'} lora's of 1; up to 0.1" in why


def test_where_neither_learns_anything_that_is_more_than_chance_it_is_lora() -> None:
    name, why = auto.verdict([0.69, 0.71] * 4, [0.7, 0.69] * 4)
    assert (name, why) == ("lora", "auto: lora, because 8 steps taught neither more than chance: loss 0.7 ± 0.01")


def test_where_only_share_learns_it_is_share() -> None:
    assert auto.verdict([0.69, 0.71] * 4, [0.69, 0.71, 0.65, 0.6, 0.5, 0.45, 0.4, 0.38])[0] == "share"


@pytest.mark.acceptance  # two ranks in processes of their own
@pytest.mark.parametrize("deepspeed", [None, zero(2)], ids=["ddp", "zero2"])
def test_the_ranks_of_a_gang_try_the_task_out_together(
    deepspeed: dict[str, Any] | None, tiny: Tiny, tiny_source: Callable[[str], str], tmp_path: Path
) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    merge(tiny("llama-lm"), storage)
    lines = [json.dumps({"prompt": row.turns[0][1], "completion": row.completion}) for row in rows(MERGED)]
    storage.write("data/causal_lm", "\n".join(lines).encode())
    spec = task(deepspeed=deepspeed, per_device_train_batch_size=2).model_dump(
        mode="json", include={"kind", "metric", "training", "lora", "method"}
    )
    orders = [{"name": "twin", "port": free_port(), "spec": spec | {"data": {"label_names": []}}}]
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    command = [sys.executable, "-m", "tests.workers.rank_process"]
    ranks = [
        subprocess.Popen([*command, str(index), "2", str(tmp_path), tiny_source("llama-lm")]) for index in range(2)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    told = json.loads((tmp_path / "twin-0.json").read_text())
    assert (told["method"], told["steps"]) == ("share", 4 * auto.STEPS_MIN)
