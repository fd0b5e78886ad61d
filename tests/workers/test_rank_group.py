"""Two processes train one task: what they see and what comes out is what one process would have made of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, adapter_from_bytes
from subspace_store.storage.local import LocalStorage
from tests.workers.test_deepspeed_engine import zero
from tests.workers.test_training import Desk
from tests.workers.worker_builders import sentiment_rows, sentiment_task
from workers import rank_group
from workers.base_model import BaseModel
from workers.orders import Point, Rank, RankLost
from workers.rank_group import joined, listen

in_processes = pytest.mark.acceptance  # six runs in processes of their own: half a minute

TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"max_steps": 6, "learning_rate": 0.02}
KINDS: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
}


ROWS = {
    "sequence_classification": sentiment_rows(24, seed=1),
    # Answers of one word and of many: ranks hold different numbers of tokens, and each token must count the same.
    "causal_lm": "\n".join(
        json.dumps({"prompt": f"say {n}", "completion": "yes " * (1 + 7 * (n % 2) + n % 3)}) for n in range(12)
    ).encode(),
}
ANSWERING = {"kind": "causal_lm", "metric": "log_likelihood", "data": {"label_names": []}, "lora": TARGETS}
ANSWERS: dict[str, dict[str, Any] | None] = {"answers-ddp": None, "answers-zero2": zero(2)}


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory, tiny_source: Callable[[str], str]) -> Path:
    """The folder in which two ranks have trained each task: 2 × 4 rows a step, and one task in two attempts."""
    folder = tmp_path_factory.mktemp("gang")
    storage = LocalStorage(str(folder / "store"))
    for kind, rows in ROWS.items():
        storage.write(f"data/{kind}", rows)
    orders = []
    for name, config in ANSWERS.items():
        training = TRAINING | {"per_device_train_batch_size": 2} | ({"deepspeed": config} if config else {})
        orders.append({"name": name, "spec": ANSWERING | {"training": training}})
    for name, config in KINDS.items():
        training = TRAINING | {"per_device_train_batch_size": 4} | ({"deepspeed": config} if config else {})
        spec = {"training": training, "lora": TARGETS}
        orders.append({"name": name, "spec": spec})
        if name in ("ddp", "zero3"):
            first = {"name": f"{name}-first", "task": f"{name}-resumed", "spec": spec}
            orders += [first | {"preempt_at": 3}, first | {"name": f"{name}-second"}]
            # Before the others: what is left of a cancelled step would be seen in them.
            slow = {"training": training | {"gradient_accumulation_steps": 20, "max_steps": 1}, "lora": TARGETS}
            orders.insert(len(ANSWERS), {"name": f"{name}-cancelled", "spec": slow, "cancel_at_layer": 5})
    (folder / "orders.json").write_text(json.dumps(orders))
    command = [sys.executable, "-m", "tests.workers.rank_process"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ranks = [
        subprocess.Popen(
            [*command, str(index), "2", str(folder), tiny_source("llama-lm")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(tiny: Callable[[str], BaseModel]) -> tuple[Adapter, dict[int, float], tuple[float, float]]:
    """The same 8 rows a step in one process, its losses by step, and its scores with and without the adapter."""
    return one_process(
        tiny("llama-lm"), sentiment_task(training=TRAINING | {"per_device_train_batch_size": 8}, lora=TARGETS)
    )


def one_process(base: BaseModel, spec: TaskSpec) -> tuple[Adapter, dict[int, float], tuple[float, float]]:
    desk = Desk(f"alone {spec.kind}")
    desk.storage.write("data/train", ROWS[spec.kind])
    desk.storage.write("data/eval", ROWS[spec.kind])
    trained = desk.train(base, spec)
    points = [line for beat in desk.heartbeats for line in beat.log_lines if isinstance(line, Point)]
    scores = trained.local_score, trained.base_score
    return desk.staged(trained), {point.step: point.loss for point in points}, scores


def told(gang: Path, name: str, index: int = 0) -> dict[str, Any]:
    return dict(json.loads((gang / f"{name}-{index}.json").read_text()))


def adapter(gang: Path, name: str) -> Adapter:
    return adapter_from_bytes(LocalStorage(str(gang / "store")).read(told(gang, name)["staging_key"]))


@in_processes
@pytest.mark.parametrize("name", KINDS)
def test_the_loss_curve_is_the_single_processs(name: str, gang: Path, alone: tuple[Adapter, dict[int, float]]) -> None:
    losses = dict(told(gang, name)["losses"])
    assert losses.keys() == alone[1].keys() == {1, 2, 3, 4, 5, 6}
    assert all(abs(losses[step] - alone[1][step]) < 1e-4 for step in losses)
    assert losses[6] < losses[1]


@in_processes
@pytest.mark.parametrize("name", KINDS)
def test_so_are_the_adapter_and_its_scores_and_rank_0_alone_stages_it(
    name: str, gang: Path, alone: tuple[Adapter, dict[int, float], tuple[float, float]]
) -> None:
    for module, update in adapter(gang, name).modules.items():
        expected = alone[0].modules[module].delta()
        assert torch.linalg.norm(update.delta() - expected) < 1e-3 * torch.linalg.norm(expected)
    assert (told(gang, name)["score"], told(gang, name)["base_score"]) == alone[2]
    assert told(gang, name, 1)["staging_key"] == ""
    assert told(gang, name, 1)["losses"] == []


@in_processes
@pytest.mark.parametrize("name", KINDS)
def test_ranks_of_one_machine_share_the_pages_of_the_base_weights(name: str, gang: Path) -> None:
    assert [told(gang, name, index)["copied_kilobytes"] for index in range(2)] == [0, 0]


@in_processes
def test_a_process_imports_deepspeed_for_the_first_task_that_uses_it(gang: Path) -> None:
    assert [told(gang, name)["imported_deepspeed"] for name in ANSWERS] == [False, True]


@in_processes
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_a_preempted_gang_goes_on_bit_for_bit(name: str, gang: Path) -> None:
    first = told(gang, f"{name}-first", 1)
    assert (first["preempted"], first["losses"]) == (True, [])
    assert told(gang, f"{name}-second")["resumed_from"] == 3
    again, whole = adapter(gang, f"{name}-second"), adapter(gang, name)
    for module, update in whole.modules.items():
        assert torch.equal(again.modules[module].delta(), update.delta())


@in_processes
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_all_ranks_stop_at_one_layer_of_a_long_step_once_any_of_them_is_cancelled(name: str, gang: Path) -> None:
    stopped = [told(gang, f"{name}-cancelled", index) for index in range(2)]
    assert [(one["cancelled_in_step"], one["layers"]) for one in stopped] == [(1, 5), (1, 5)]


@in_processes
@pytest.mark.parametrize("name", ANSWERS)
def test_every_token_of_an_answer_counts_the_same_whichever_rank_holds_it(
    name: str, gang: Path, tiny: Callable[[str], BaseModel]
) -> None:
    training = TRAINING | {"per_device_train_batch_size": 4}
    expected, losses, _ = one_process(tiny("llama-lm"), sentiment_task(**ANSWERING | {"training": training}))
    found = dict(told(gang, name)["losses"])
    assert all(abs(found[step] - losses[step]) < 1e-4 for step in losses)
    for module, update in adapter(gang, name).modules.items():
        delta = expected.modules[module].delta()
        assert torch.linalg.norm(update.delta() - delta) < 1e-3 * torch.linalg.norm(delta)


def test_nobody_else_can_take_the_port_at_which_rank_0_waits() -> None:
    port = listen("127.0.0.1")
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(("127.0.0.1", port))
    assert listen("127.0.0.1") != port
    socket.create_server(("127.0.0.1", port)).close()  # the group before has no use for it any more


def test_ranks_that_do_not_meet_are_lost_with_the_place_and_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "JOIN", timedelta(seconds=0.3))
    before, port = dict(os.environ), listen("127.0.0.1")
    lost = pytest.raises(RankLost, match="could not join the others within 0")
    with lost as caught, joined(Rank(index=0, size=2, master_address="127.0.0.1", master_port=port), None):
        pass
    assert caught.value.where == f"127.0.0.1:{port}"
    assert "firewall" in caught.value.todo
    assert "GLOO_SOCKET_IFNAME" in caught.value.todo
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_a_rank_that_failed_says_so_although_nobody_answers_its_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's goodbye waits for the others, who wait in a collective operation for this rank. Here it does not end."""

    def alone(rank: Rank) -> None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    others = threading.Event()
    monkeypatch.setattr(rank_group, "_formed", alone)
    monkeypatch.setattr(rank_group, "LEAVE_SECONDS", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", others.wait)
        with pytest.raises(ZeroDivisionError), joined(Rank(index=0, size=2), None):
            raise ZeroDivisionError("on this rank alone")
        assert dist.is_initialized()
        others.set()
    monkeypatch.undo()
    port = listen("127.0.0.1")
    with (
        pytest.raises(RankLost, match="twice"),
        joined(Rank(index=0, size=2, master_address="127.0.0.1", master_port=port), None),
    ):
        pass  # should it get another order before it is ended
    assert not dist.is_initialized()
