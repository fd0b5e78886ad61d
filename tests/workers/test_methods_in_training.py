"""The methods inside a whole training order: leased bases, DeepSpeed's partitions, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.settings import SubspaceSettings
from subspace_store import SubspaceReader
from subspace_store.log.version import StagedAdapter
from subspace_store.subspace_store import SubspaceStore
from tests.workers.test_deepspeed_engine import zero
from tests.workers.test_share import outside
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_task
from workers.base_model import BaseModel
from workers.methods import codyra
from workers.methods.factors import GatedFactor
from workers.orders import Trained
from workers.trainer import Preempted

Tiny = Callable[[str], BaseModel]

pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.* is deprecated:FutureWarning")
GATES = {"name": "codyra", "gate_start": "normal", "dense_fraction": 0.0, "kappa_max": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "start_of_a": "basis"},
    "share": {"name": "share", "directions": "learned", "temporary_columns": 1},
    "codyra": GATES,
}


@pytest.fixture
def desk(request: pytest.FixtureRequest, tiny: Tiny) -> Desk:
    """With one published version, of one task."""
    desk = Desk(request.node.name)
    trained = desk.train(tiny("bert"), sentiment_task(lora={"r": 4}, training={"learning_rate": 0.05}))
    base = tiny("bert")
    store = SubspaceStore.open(
        desk.storage,
        settings=SubspaceSettings(energy_ratio_min=1.0),
        writer="test",
        base_model=base.name,
        base_sha256=base.sha256,
    )
    first = StagedAdapter(task_id="task-1", name="team-a/first", key=trained.staging_key, sha256=trained.adapter_sha256)
    version = store.merge([first], op_key="merge", actor="test")
    store.publish(version.number, op_key="publish", actor="test")
    desk.heartbeats.clear()
    return desk


def train(desk: Desk, base: BaseModel, method: str, deepspeed: dict[str, Any] | None = None, **order: Any) -> Trained:
    training = {"learning_rate": 0.02, "max_steps": 6, "save_steps": 2, "deepspeed": deepspeed}
    return desk.train(base, sentiment_task(method=METHODS[method], lora={"r": 4}, training=training), **order)


@pytest.mark.parametrize(("method", "version"), [("lora", 1), ("share", 1), ("codyra", 0)])
def test_a_method_trains_in_the_published_basis_and_says_what_it_trains(
    method: str, version: int, desk: Desk, tiny: Tiny
) -> None:
    trained = train(desk, tiny("bert"), method)
    assert (trained.method, trained.basis_version) == (method, version)
    lines = [line for beat in desk.heartbeats for line in beat.log_lines]
    # Bases of 4 directions and one column beside them: (4 + 1)² + 2·32 = 89; LoRA: 4·64.
    expected = {"lora": "lora: 256", "share": "share: 89", "codyra": "codyra: 260"}[method]
    assert any(line.startswith(f"{expected} trained numbers per module in 4 modules") for line in lines)
    assert all(update.energy > 0 for update in desk.staged(trained).modules.values())


@pytest.mark.parametrize(("method", "stage"), [("share", 3), ("codyra", 2), ("codyra", 3)])
def test_deepspeed_trains_the_same_adapter(method: str, stage: int, desk: Desk, tiny: Tiny) -> None:
    plain = desk.staged(train(desk, tiny("bert"), method))
    partitioned = desk.staged(train(desk, tiny("bert"), method, zero(stage)))
    assert {name: update.rank for name, update in partitioned.modules.items()} == {
        name: update.rank for name, update in plain.modules.items()
    }
    for name, update in plain.modules.items():
        assert torch.allclose(partitioned.modules[name].delta(), update.delta(), atol=1e-5)


def test_thresholds_reach_the_float32_copy_that_deepspeed_steps_from(
    desk: Desk, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold put into the bf16 weights alone would be undone by the next step."""
    seen: list[torch.Tensor] = []
    after_step = codyra.after_step

    def spy(prepared: Any, *arguments: Any) -> None:
        after_step(prepared, *arguments)
        gated = [module for module in prepared.modules() if isinstance(module, GatedFactor)]
        seen.append(torch.cat([module.gates_R.detach().float().clone() for module in gated]))

    monkeypatch.setattr(codyra, "after_step", spy)
    config = zero(2) | {"bf16": {"enabled": True}}
    training = {"learning_rate": 1e-4, "max_steps": 3, "deepspeed": config, "bf16": True}
    adapter = desk.staged(desk.train(tiny("bert"), sentiment_task(method=GATES, lora={"r": 4}, training=training)))
    # κ is 17/49, 34/49 and 49/49 of 0.3; the optimizer adds or takes about 1e-4.
    for now, was, kappa in zip(seen[1:], seen, (0.3 * 34 / 49, 0.3), strict=False):
        assert torch.allclose(now, torch.nn.functional.softshrink(was, kappa), atol=1e-2)  # bf16 tells 1.89 from 1.88
    assert sum(update.rank for update in adapter.modules.values()) == int((seen[-1] != 0).sum()) < 16


@pytest.mark.parametrize("method", ["share", "codyra"])
def test_a_method_goes_on_from_a_checkpoint_to_the_same_bytes(method: str, desk: Desk, tiny: Tiny) -> None:
    whole = train(desk, tiny("bert"), method, staging_key="staging/task-2/1-a/adapter.safetensors")
    desk.preempt_at_step = 4
    desk.heartbeats.clear()
    with pytest.raises(Preempted):
        train(desk, tiny("bert"), method, staging_key="staging/task-3/1-a/adapter.safetensors")
    desk.preempt_at_step = 10**9
    desk.heartbeats.clear()
    resumed = train(desk, tiny("bert"), method, staging_key="staging/task-3/2-b/adapter.safetensors")
    assert resumed.resumed_from > 0
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_a_run_whose_basis_has_expired_starts_anew_and_keeps_what_it_does_from_then_on(desk: Desk, tiny: Tiny) -> None:
    def attempt(number: int, preempt_at_step: float) -> Trained:
        desk.preempt_at_step = preempt_at_step
        desk.heartbeats.clear()
        return train(desk, tiny("bert"), "share", staging_key=f"staging/task-3/{number}-a/adapter.safetensors")

    with pytest.raises(Preempted):
        attempt(1, 4)
    second = desk.train(tiny("bert"), sentiment_task(lora={"r": 4}), staging_key="staging/task-2/1-a/adapter")
    store = SubspaceStore.open(desk.storage, settings=SubspaceSettings(), writer="test")
    staged = StagedAdapter(task_id="task-2", name="team-a/second", key=second.staging_key, sha256=second.adapter_sha256)
    version = store.merge([staged], op_key="again", actor="test")
    store.publish(version.number, op_key="publish again", actor="test")
    store.expire([1], actor="test")
    with pytest.raises(Preempted):
        attempt(2, 2)
    resumed = attempt(3, 10**9)
    assert (resumed.resumed_from, resumed.basis_version) == (2, version.number)


@pytest.mark.parametrize("deepspeed", [None, zero(3)])
def test_a_refinement_stays_in_the_span_of_its_version(
    deepspeed: dict[str, Any] | None, desk: Desk, tiny: Tiny
) -> None:
    trained = train(desk, tiny("bert"), "codyra", deepspeed, refine_version=1)
    assert (trained.method, trained.basis_version) == ("refine", 1)
    basis = SubspaceReader.open(desk.storage).basis(1)
    served = SubspaceReader.open(desk.storage).adapter("task-1", 1)
    refined = desk.staged(trained)
    for name, update in refined.modules.items():
        assert outside(update.delta(), basis[name]) < 1e-6
        assert not torch.allclose(update.delta(), served.modules[name].delta(), atol=1e-3)
