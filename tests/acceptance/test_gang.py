"""A gang on two machines with addresses of their own: it trains as one process would, and survives what happens."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from configs.errors import Unavailable
from configs.settings import BaseModelSettings, Settings
from orchestrator.cluster import MachineLost, RayCluster, wait_for
from orchestrator.ray_head import ray_environment
from subspace_store import Storage, adapter_from_bytes, open_storage
from tests.builders import settings
from tests.network import TwoMachines, two_machines, why_not
from tests.workers.worker_builders import sentiment_rows, sentiment_task, tiny_settings
from workers.orders import Failed, Point, Progress, Train, Trained

GANG = "worker-0"
STEPS = 12
LONG = {"max_steps": 300, "save_steps": 10}
CONFIGS = Path(__file__).resolve().parents[2] / "configs/deepspeed"


@dataclass
class Site:
    """Two machines with one gang of two ranks on them, and a storage that both reach."""

    machines: TwoMachines
    cluster: RayCluster
    settings: Settings
    storage: Storage

    def answer(self, flight: Any, seconds: float = 120) -> Any:
        assert self.cluster.landed([flight], seconds), f"no answer within {seconds} s\n{self.machines.log()}"
        return self.cluster.result(flight)

    def warm(self) -> None:
        wait_for(self.cluster, lambda: self.cluster.warm(GANG), 120)

    def progress(self) -> Progress:
        progress: Progress = self.answer(self.cluster.progress(GANG))
        return progress

    def pids(self) -> list[int]:
        """Process id of each rank, as this machine counts them."""
        import ray

        gang = ray.get_actor(GANG)
        return [
            pid if node == self.machines.head else self.machines.pid_of(node, pid)
            for node, pid in ray.get(gang.pids.remote())
        ]

    def begin(self, order: Train, step: int) -> Any:
        """The flight of an order, once its training has done so many steps."""
        flight = self.cluster.run(GANG, order)
        until(lambda: self.progress().step >= step, 60)
        return flight


def order(task: str, attempt: int = 1, **training: Any) -> Train:
    """Training over `sentiment_rows`; two ranks take 8 rows a step, unless `training` says otherwise."""
    values = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    spec = sentiment_task(training=values | training, lora={"target_modules": ("q_proj", "v_proj")})
    token = f"{task}-{attempt}"
    return Train(
        token, task, attempt, spec, "data/train", "data/eval", f"staging/{task}/{attempt}-{token}/adapter.safetensors"
    )


def losses(lines: tuple[Any, ...]) -> dict[int, float]:
    """Step to loss, of the points among a task's log lines."""
    return {line.step: line.loss for line in lines if isinstance(line, Point)}


def until(is_true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModelSettings:
    """A random Llama of two layers, without dropout."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from tests.workers.worker_builders import MINILM
    from workers.weights import resolve_source

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(MINILM.source))
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    small = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64}
    LlamaModel(LlamaConfig(num_key_value_heads=2, **sizes, **small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny_settings(str(folder))


@pytest.fixture(scope="module")
def site(base_model: BaseModelSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := why_not():
        pytest.skip(f"two machines cannot be made here: {reason}")
    folder = tmp_path_factory.mktemp("gang")
    ours = settings(folder, base_model=base_model.model_dump(), workers={"count": 1, "ranks": 2, "placement": "SPREAD"})
    storage = open_storage(ours.storage, ours.base_model.name)
    storage.write("data/train", sentiment_rows(16, seed=1))
    storage.write("data/eval", sentiment_rows(10, seed=2))
    before = dict(os.environ)
    try:
        with two_machines(ray_environment(folder / "token")) as machines:
            machines.start_head(cpus=2)
            cluster = joined(ours, machines, folder / "token")
            machines.start_other(cpus=2)
            until(lambda: nodes() == 2, 60)
            cluster.start()
            site = Site(machines, cluster, ours, storage)
            site.warm()
            yield site
            cluster.stop(actors=False)
    finally:
        os.environ.clear()
        os.environ.update(before)


def joined(ours: Settings, machines: TwoMachines, token: Path) -> RayCluster:
    end = time.monotonic() + 60
    while True:
        try:
            return RayCluster(ours, machines.address, token)
        except Unavailable:
            assert time.monotonic() < end, machines.log()


@pytest.fixture(scope="module")
def alone(site: Site, base_model: BaseModelSettings) -> dict[int, float]:
    """Step to loss of one process with the same global batch, without DeepSpeed."""
    from workers.worker import Worker

    worker = Worker(base_model, site.settings.storage, site.settings.base_model.name)
    outcome = worker.run(order("alone", per_device_train_batch_size=8))
    assert isinstance(outcome, Trained), outcome
    return losses(outcome.log_lines)


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_two_machines_train_along_the_loss_curve_of_one_process(
    site: Site, alone: dict[int, float], stage: int | None
) -> None:
    assert len(set(site.pids())) == 2  # each found on its own machine
    config = None if stage is None else yaml.safe_load((CONFIGS / f"zero{stage}.json").read_text())
    outcome = site.answer(site.cluster.run(GANG, order(f"stage-{stage}", deepspeed=config)))
    assert isinstance(outcome, Trained), outcome
    assert outcome.log_lines[0] in (
        f"2 ranks: 1 on {site.machines.head}, 1 on {site.machines.other}",
        f"2 ranks: 1 on {site.machines.other}, 1 on {site.machines.head}",
    )
    assert losses(outcome.log_lines) == pytest.approx(alone, abs=1e-4)
    assert sorted(alone) == list(range(1, STEPS + 1))
    assert alone[STEPS] < 0.7 * alone[1]  # it learned something: equal curves of nothing prove little
    staged = [key for key in site.storage.keys(f"staging/stage-{stage}/") if "checkpoint" not in key]
    assert staged == [outcome.staging_key]
    adapter = adapter_from_bytes(site.storage.read(outcome.staging_key))
    assert adapter.parameter_count == outcome.adapter_parameters


def test_a_killed_rank_ends_the_gang_and_the_next_attempt_goes_on_from_the_checkpoint(site: Site) -> None:
    old = site.pids()
    flight = site.begin(order("killed", **LONG), step=15)
    os.kill(old[1], signal.SIGKILL)
    outcome = site.answer(flight, 30)
    assert isinstance(outcome, Failed)
    assert outcome.fault == "lost"
    assert "rank 1 of 2 on 10." in outcome.message
    until(lambda: not any(psutil.pid_exists(pid) for pid in old), 5)

    again = site.answer(site.cluster.run(GANG, order("killed", 2, **LONG)))
    assert isinstance(again, Trained), again
    assert again.resumed_from >= 10
    assert again.steps == LONG["max_steps"]
    adapter = adapter_from_bytes(site.storage.read(again.staging_key))
    assert adapter.parameter_count == again.adapter_parameters
    assert not set(site.pids()) & set(old)


def test_a_lost_machine_is_done_without_where_there_is_room(site: Site) -> None:
    flight = site.begin(order("moved", **LONG), step=15)
    site.machines.end(site.machines.other)
    outcome = site.answer(flight, 60)
    assert isinstance(outcome, Failed)
    assert outcome.fault == "lost"
    assert site.machines.other in outcome.message

    again = site.answer(site.cluster.run(GANG, order("moved", 2, **LONG)))
    assert isinstance(again, Trained), again
    assert again.log_lines[0] == f"2 ranks: 2 on {site.machines.head}"
    assert again.resumed_from >= 10


def test_a_gang_whose_supervisor_dies_or_is_replaced_leaves_nothing_behind(site: Site) -> None:
    import ray
    from ray.util import placement_group_table

    def groups() -> int:
        return [group["state"] for group in placement_group_table().values()].count("CREATED")

    old = site.pids()
    flight = site.cluster.run(GANG, order("unsupervised", **LONG))
    os.kill(ray.get(ray.get_actor(GANG).pid.remote()), signal.SIGKILL)
    with pytest.raises(MachineLost):
        site.answer(flight, 30)
    until(lambda: not any(psutil.pid_exists(pid) for pid in old), 20)
    site.warm()
    assert groups() == 1

    old = site.pids()
    site.cluster.replace(GANG)
    until(lambda: not any(psutil.pid_exists(pid) for pid in old), 20)
    assert groups() == 0
