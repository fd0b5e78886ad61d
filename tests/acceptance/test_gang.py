"""A gang on two machines with addresses of their own: it trains as one process would, and survives what happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from subspace_store.log.version import Identity
from tests.builders import settings
from tests.network import TwoMachines, two_machines, why_not
from tests.workers.worker_builders import sentiment_rows, sentiment_task, tiny_settings
from workers.orders import Failed, Point, Progress, Train, Trained

GANG = "worker-0"
STEPS = 12
LONG = {"max_steps": 150, "save_steps": 10}
ROWS = 128
"""Of a micro-batch that needs some 450 MiB more than an idle rank has; half of it needs 230."""
MEAGRE = 340 * 2**20
CONFIGS = Path(__file__).resolve().parents[2] / "configs/deepspeed"


@dataclass
class Site:
    """Two machines with one gang of two ranks on them, and a storage that both reach."""

    machines: TwoMachines
    cluster: RayCluster
    settings: Settings
    storage: Storage
    token: Path

    def answer(self, call: Any, seconds: float = 240) -> Any:
        assert self.cluster.landed([call], seconds), f"no answer within {seconds} s\n{self.machines.log()}"
        return self.cluster.result(call)

    def warm(self) -> None:
        wait_for(self.cluster, lambda: self.cluster.warm(GANG), 240)

    def progress(self) -> Progress:
        """Of an idle gang while it is being formed."""
        try:
            progress: Progress = self.answer(self.cluster.progress(GANG))
        except Unavailable:
            return Progress()
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
        """The call of an order, once its training has done so many steps."""
        call = self.cluster.run(GANG, order)
        until(lambda: self.progress().step >= step, 60)
        return call


def order(task: str, attempt: int = 1, **training: Any) -> Train:
    """Training over `sentiment_rows`; two ranks take 8 rows a step, unless `training` says otherwise."""
    values = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    spec = sentiment_task(training=values | training, lora={"target_modules": ("q_proj", "v_proj")})
    token = f"{task}-{attempt}"
    return Train(
        token=token,
        task_id=task,
        attempt=attempt,
        spec=spec,
        train_key="data/train",
        eval_key="data/eval",
        staging_key=f"staging/{task}/{attempt}-{token}/adapter.safetensors",
    )


def losses(lines: tuple[Any, ...]) -> dict[int, float]:
    """Step to loss, of the points among a task's log lines."""
    return {line.step: line.loss for line in lines if isinstance(line, Point)}


def until(is_true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def ranks_by_machine(group: Any) -> list[int]:
    """How many places a placement group has on each machine, by the machines' ids."""
    from ray.util import placement_group_table

    return sorted(Counter(placement_group_table(group)["bundles_to_node_id"].values()).values())


def nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModelSettings:
    """A random Llama of two layers, without dropout. Its 30,522 words make the logits of a token large."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.workers.worker_builders import MINILM
    from workers.weights import resolve_source

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(MINILM.source))
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    small = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes, **small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny_settings(str(folder))


@pytest.fixture(scope="module")
def site(base_model: BaseModelSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := why_not():
        pytest.skip(f"two machines cannot be made here: {reason}")
    folder = tmp_path_factory.mktemp("gang")
    ours = settings(folder, base_model=base_model.model_dump(), workers={"count": 1, "ranks": 2, "placement": "SPREAD"})
    storage = open_storage(ours.storage, ours.bases[0].name)
    storage.write("data/train", sentiment_rows(16, seed=1))
    storage.write("data/eval", sentiment_rows(10, seed=2))
    answers = ({"prompt": f"say {n}", "completion": "yes " * (1 + 5 * (n % 2) + n % 3)} for n in range(16))
    storage.write("data/answers", "\n".join(json.dumps(row) for row in answers).encode())
    from ray._private.authentication_test_utils import reset_auth_token_state

    before = dict(os.environ)
    try:
        with two_machines(ray_environment(folder / "token")) as machines:
            machines.start_head(cpus=2)
            os.environ.update(ray_environment(folder / "token"))
            reset_auth_token_state()  # a test before this one may have joined another cluster from this process
            cluster = joined(ours, machines, folder / "token")
            machines.start_other(cpus=2)
            until(lambda: nodes() == 2, 120)
            cluster.start()
            site = Site(machines, cluster, ours, storage, folder / "token")
            site.warm()
            yield site
            site.cluster.stop(actors=False)
    finally:
        os.environ.clear()
        os.environ.update(before)


def joined(ours: Settings, machines: TwoMachines, token: Path) -> RayCluster:
    end = time.monotonic() + 180
    while True:
        try:
            return RayCluster(ours, machines.address, token, Identity("gang", "here"))
        except Unavailable:
            assert time.monotonic() < end, machines.log()


@pytest.fixture(scope="module")
def worker(site: Site, base_model: BaseModelSettings) -> Any:
    """One process beside the gang."""
    from workers.worker import Worker

    return Worker(base_model, site.settings.storage, site.settings.bases[0].name)


@pytest.fixture(scope="module")
def alone(worker: Any) -> dict[int, float]:
    """Step to loss of one process with the same global batch, without DeepSpeed."""
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


def answering(task: str, attempt: int = 1, **training: Any) -> Train:
    """Two steps of 2 × ROWS answers."""
    values = {"max_steps": 2, "per_device_train_batch_size": ROWS, "learning_rate": 0.01}
    changes = {"data": {"label_names": ()}, "training": values | training, "lora": {"target_modules": ("q_proj",)}}
    spec = sentiment_task(kind="causal_lm", metric="log_likelihood", **changes)
    return replace(order(task, attempt), spec=spec, train_key="data/answers", eval_key="")


@contextlib.contextmanager
def meagre(site: Site) -> Iterator[None]:
    """Rank 1 gets MEAGRE more memory than it has, really: it is the kernel that refuses."""
    site.warm()
    process = psutil.Process(site.pids()[1])
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + MEAGRE, before[1]))
    yield
    with contextlib.suppress(psutil.NoSuchProcess):  # ended, if rank 0 was still busy with its share
        process.rlimit(psutil.RLIMIT_AS, before)


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_of_all_or_is_told(site: Site, worker: Any) -> None:
    with meagre(site):
        told = site.answer(site.cluster.run(GANG, answering("told")))
    with meagre(site):
        halved = site.answer(site.cluster.run(GANG, answering("halved", auto_find_batch_size=True)))
    again = site.answer(site.cluster.run(GANG, answering("halved", 2, auto_find_batch_size=True)))
    assert isinstance(told, Failed), told
    assert isinstance(halved, Failed), halved
    assert (told.fault, halved.fault) == ("input", "preempted"), (told, halved)
    assert f"memory ran out with {ROWS} rows at once; this process took" in told.message
    assert "training.auto_find_batch_size: true" in told.message
    assert halved.message == f"memory ran out with {ROWS} rows at once: goes on with {ROWS // 2}, accumulated"
    assert isinstance(again, Trained), again
    one = worker.run(answering("one", per_device_train_batch_size=ROWS // 2, gradient_accumulation_steps=4))
    assert losses(again.log_lines) == pytest.approx(losses(one.log_lines), abs=1e-4)
    assert sorted(losses(again.log_lines)) == [1, 2]


def test_a_killed_rank_ends_the_gang_and_the_next_attempt_goes_on_from_the_checkpoint(site: Site) -> None:
    old = site.pids()
    call = site.begin(order("killed", **LONG), step=15)
    os.kill(old[1], signal.SIGKILL)
    outcome = site.answer(call, 30)
    assert isinstance(outcome, Failed)
    assert outcome.fault == "died"
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
    call = site.begin(order("moved", **LONG), step=15)
    site.machines.end(site.machines.other)
    outcome = site.answer(call, 60)
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
    call = site.cluster.run(GANG, order("unsupervised", **LONG))
    os.kill(ray.get(ray.get_actor(GANG).pid.remote()), signal.SIGKILL)
    with pytest.raises(MachineLost):
        site.answer(call, 30)
    until(lambda: not any(psutil.pid_exists(pid) for pid in old), 20)
    site.warm()
    assert groups() == 1

    old = site.pids()
    site.cluster.replace(GANG)
    until(lambda: not any(psutil.pid_exists(pid) for pid in old), 20)
    assert groups() == 0


@pytest.fixture(scope="module")
def both(site: Site) -> Site:
    """The second machine is there, and nothing runs."""
    if site.machines.other in site.machines.up:
        site.cluster.replace(GANG)
    else:  # the tests above have ended both
        site.machines.start_other(cpus=2)
        until(lambda: nodes() == 2, 120)
    return site


@pytest.mark.parametrize(
    ("placement", "ranks", "by_machine"),
    [("PACK", 2, [2]), ("SPREAD", 2, [1, 1]), ("PACK", 4, [2, 2]), ("SPREAD", 4, [2, 2])],
)
def test_ranks_are_packed_or_spread(both: Site, placement: str, ranks: int, by_machine: list[int]) -> None:
    import ray

    from workers.gang_actor import end_ranks, places

    until(lambda: ray.available_resources().get("CPU") == 4, 30)  # what is being given back is not packed or spread on
    workers = both.settings.workers.model_copy(update={"placement": placement, "ranks": ranks})
    group = places(f"{placement}-{ranks}", workers)
    assert group.wait(30)
    assert ranks_by_machine(group) == by_machine
    end_ranks(f"{placement}-{ranks}")


@pytest.fixture(scope="module")
def four(both: Site) -> Site:
    """The same machines, with a gang of four in the place of the gang of two."""
    both.cluster.stop(actors=False)
    asked = both.settings.model_dump(mode="json", exclude={"pools", "base_models"})
    both.settings = Settings.model_validate(asked | {"workers": asked["workers"] | {"ranks": 4, "placement": "PACK"}})
    both.cluster = joined(both.settings, both.machines, both.token)
    both.warm()
    return both


def test_four_ranks_train_along_the_loss_curve_of_one_process(four: Site, alone: dict[int, float]) -> None:
    from workers.gang_actor import places

    outcome = four.answer(four.cluster.run(GANG, order("four", per_device_train_batch_size=2)))
    assert isinstance(outcome, Trained), outcome
    assert losses(outcome.log_lines) == pytest.approx(alone, abs=1e-4)
    assert ranks_by_machine(places(GANG, four.settings.workers)) == [2, 2]
    assert str(outcome.log_lines[0]).count("2 on 10.") == 2


def test_a_gang_waits_for_a_machine_that_went_away_and_goes_on_when_it_is_back(four: Site) -> None:
    call = four.begin(order("returned", **LONG), step=15)
    four.machines.end(four.machines.other)
    outcome = four.answer(call, 60)
    assert isinstance(outcome, Failed)
    assert outcome.fault == "lost"

    call = four.cluster.run(GANG, order("returned", 2, **LONG))
    waits = (
        "waits: no place for 4 ranks with 1 CPUs and 0 GPUs each: the 1 machines that are up "
        f"({four.machines.other} went away) have room for 2"
    )
    until(lambda: waits in four.progress().log_lines, 60)  # not the first line if Ray has not noticed it yet
    assert four.progress().phase == "waiting"
    four.machines.start_other(cpus=2)
    again = four.answer(call)
    assert isinstance(again, Trained), again
    assert again.resumed_from >= 10
    assert again.steps == LONG["max_steps"]
