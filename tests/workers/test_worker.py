"""A worker: one order at a time, each done once, and nothing but Unavailable raised."""

from __future__ import annotations

import logging
import pickle
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import Corrupt, InvalidInput, NotFound, Unavailable, WorkersBusy
from configs.log_lines import ids
from configs.settings import BaseModelSettings, StorageSettings
from subspace_store.adapter import adapter_from_bytes
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.opening import open_storage
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import sentiment_rows, sentiment_task, task_of_kind, tiny_settings
from workers import worker as worker_module
from workers.base_model import BaseModel
from workers.order_book import OUTCOMES_KEPT
from workers.orders import (
    Evaluate,
    Evaluated,
    EvaluatedTogether,
    EvaluateTogether,
    Failed,
    Point,
    Progress,
    Train,
    Trained,
)
from workers.results import read_results
from workers.rows.reading import read_as
from workers.rows.task_data import CompletionRow
from workers.serving.question import Question
from workers.tokens import lengths, unpacked
from workers.trainer import Cancelled, Preempted
from workers.truncation import Length
from workers.worker import Worker

STORAGE = StorageSettings(url="memory:worker-tests")


@pytest.fixture(scope="module")
def settings(tiny_source: Callable[[str], str]) -> BaseModelSettings:
    return tiny_settings(tiny_source("bert"))


@pytest.fixture(scope="module")
def worker(settings: BaseModelSettings) -> Worker:
    storage = open_storage(STORAGE, "tiny")
    storage.write("data/train", sentiment_rows(24, seed=1))
    storage.write("data/eval", sentiment_rows(10, seed=2))
    warm = Worker(settings, STORAGE, "tiny")
    layout = warm.warm()
    assert layout.sha256 == settings.weights_sha256
    assert layout.length_max == 64
    assert layout.module_shapes["bert.encoder.layer.0.attention.self.query"] == (32, 32)
    return warm


def train(token: str, **changes: Any) -> Train:
    spec = sentiment_task(**changes)
    return Train(
        token=token,
        task_id=f"task-{token}",
        attempt=1,
        spec=spec,
        train_key="data/train",
        eval_key="data/eval",
        staging_key=f"staging/task-{token}/1/adapter.safetensors",
    )


class Gate:
    """Holds orders until it is opened, and counts those that began."""

    def __init__(self) -> None:
        self.opened, self.began, self.orders = threading.Event(), threading.Event(), 0

    def __call__(self, order: Train, *_: Any, **__: Any) -> Trained:
        self.orders += 1
        self.began.set()
        assert self.opened.wait(10)
        return Trained(
            token=order.token,
            staging_key=order.staging_key,
            adapter_sha256="",
            adapter_parameters=0,
            score_count=0,
            local_score=0.0,
            base_score=0.0,
            steps=self.orders,
            train_loss=0.0,
            seconds=0.0,
            first_step_at=0.0,
        )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(worker_module, "train_task", gate)
    yield gate
    gate.opened.set()


@pytest.mark.parametrize("architecture", ["vit", "gpt2"])
def test_a_worker_rehearses_a_kind_that_its_base_model_has_and_says_which_those_are(
    architecture: str, tiny: Callable[[str], BaseModel], tiny_source: Callable[[str], str]
) -> None:
    cold = Worker(tiny_settings(tiny_source(architecture)), STORAGE, "tiny")
    assert cold.warm().kinds == tiny(architecture).kinds


def test_a_worker_tells_how_its_base_model_writes_a_chat_and_how_long_it_is(tmp_path: Path) -> None:
    layout = Worker(tiny_settings(save_llama(tmp_path / "chat", chat=True)), STORAGE, "tiny").warm()
    template = pickle.loads(pickle.dumps(layout)).chat_template
    turns = (("user", "grass?"), ("assistant", "green"))
    assert template.render(turns) == ("<|user|>grass?</s>\n<|assistant|>", "green</s>\n")
    assert "only user and assistant" in template.complaint(CompletionRow((("system", "x"), *turns), is_chat=True))
    row = CompletionRow((("user", "zz"), ("assistant", "xyz")), is_chat=False)  # `<s>zz` and `xyz</s>`, byte by byte
    assert lengths(unpacked(layout.tokenizer), task_of_kind("causal_lm"), [row]) == [Length(3, 4)]
    silent = Worker(tiny_settings(save_llama(tmp_path / "plain")), STORAGE, "tiny").warm()
    assert silent.chat_template is None


def test_an_order_is_trained_and_the_worker_is_idle_again(worker: Worker) -> None:
    outcome = worker.run(train("one"))
    assert isinstance(outcome, Trained)
    assert (outcome.token, outcome.steps, outcome.score_count) == ("one", 3, 10)
    assert worker.progress().phase == "idle"


def test_the_same_token_while_running_waits_for_the_one_run(worker: Worker, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as callers:
        answers = [callers.submit(worker.run, train("twice")) for _ in range(2)]
        assert gate.began.wait(10)
        gate.opened.set()
        first, second = (answer.result(10) for answer in answers)
    assert gate.orders == 1
    assert first == second


def test_a_warm_worker_says_so_at_once_also_while_an_order_is_running(worker: Worker, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as callers:
        running = callers.submit(worker.run, train("long"))
        assert gate.began.wait(10)
        assert callers.submit(worker.warm).result(10).length_max == 64
        gate.opened.set()
        assert running.result(10).token == "long"


def test_the_same_token_afterwards_is_answered_without_doing_it_again(worker: Worker, gate: Gate) -> None:
    gate.opened.set()
    assert worker.run(train("again")) == worker.run(train("again"))
    assert gate.orders == 1


def test_orders_are_done_one_after_another(worker: Worker, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(worker.run, train("first"))
        assert gate.began.wait(10)
        second = callers.submit(worker.run, train("second"))
        time.sleep(0.05)
        assert gate.orders == 1
        gate.opened.set()
        assert [first.result(10).token, second.result(10).token] == ["first", "second"]


def test_the_oldest_outcomes_are_forgotten_but_not_the_newest(worker: Worker, gate: Gate) -> None:
    gate.opened.set()
    for number in range(OUTCOMES_KEPT + 1):
        worker.run(train(f"many-{number}"))
    before = gate.orders
    worker.run(train(f"many-{OUTCOMES_KEPT}"))
    worker.run(train("many-2"))
    assert gate.orders == before
    worker.run(train("many-0"))
    assert gate.orders == before + 1


def test_a_users_mistake_is_an_outcome_with_what_to_do(worker: Worker) -> None:
    outcome = worker.run(train("mistake", lora={"target_modules": ("q_proj",)}))
    assert isinstance(outcome, Failed)
    assert outcome.fault == "input"
    assert "it has: dense, key, query, value" in outcome.message
    assert outcome.detail == ""


def test_a_bug_is_an_outcome_with_its_traceback(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of our making")

    monkeypatch.setattr(worker_module, "train_task", broken)
    outcome = worker.run(train("bug"))
    assert isinstance(outcome, Failed)
    assert (outcome.fault, outcome.message) == ("bug", "ZeroDivisionError: of our making")
    assert "in broken" in outcome.detail


@pytest.mark.parametrize("damage", ["gone", "cut short"])
@pytest.mark.parametrize("key", ["train_key", "eval_key"])
def test_rows_of_the_services_own_that_are_damaged_are_told_as_that(worker: Worker, damage: str, key: str) -> None:
    storage = open_storage(STORAGE, "tiny")
    named = f"data/{damage.replace(' ', '-')}-{key}-{'0' * 64}.arrow"
    if damage == "cut short":
        storage.write(named, b"half of what was written")
    outcome = worker.run(replace(train(f"{damage} {key}"), **{key: named}))
    assert isinstance(outcome, Failed)
    assert outcome.fault == "rows"
    assert "the service's own copy of its rows, made when it was submitted, is damaged: " in outcome.message
    assert named in outcome.message
    assert "`onebasis retry TEAM/TASK` freezes them anew" in outcome.message


def test_memory_that_runs_out_while_scoring_is_told_with_the_setting_to_change(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meager(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(worker_module, "evaluate_version", meager)
    outcome = worker.run(
        Evaluate(token="score", task_id="task-1", version=1, spec=sentiment_task(), eval_key="data/eval")
    )
    assert isinstance(outcome, Failed)
    assert outcome.fault == "input"
    assert "data.max_length: memory ran out while scoring: CUDA out of memory" in outcome.message


def test_a_storage_that_was_away_is_raised_and_the_order_may_be_given_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def away(*_: Any) -> None:
            raise Unavailable("the network is down")

        patch.setattr(worker_module, "train_task", away)
        with pytest.raises(Unavailable):
            worker.run(train("retried"))
    assert isinstance(worker.run(train("retried")), Trained)


def test_what_the_store_has_lost_is_raised_as_damage_and_is_no_outcome_of_the_order(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Evaluate(token="gone", task_id="task-1", version=1, spec=sentiment_task(), eval_key="data/task-1/eval")
    for _ in range(2):  # nothing is remembered: a control plane that starts anew asks under the same token
        with pytest.raises(
            Corrupt, match=r"data/task-1/eval: the evaluation rows of team-a/sentiment \(task-1\).* are gone"
        ):
            worker.run(order)
    with monkeypatch.context() as patch:

        def damaged(*_: Any) -> None:
            raise Corrupt("the object that the log names is gone", "blobs/1")

        patch.setattr(worker_module, "train_task", damaged)
        with pytest.raises(Corrupt):
            worker.run(train("again"))
    assert isinstance(worker.run(train("again")), Trained)


def test_a_running_order_can_be_cancelled_between_two_steps(worker: Worker) -> None:
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(worker.run, train("stopped", training={"max_steps": 100000}))
        while worker.progress().step < 2:
            time.sleep(0.01)
        assert worker.cancel("stopped")
        outcome = answer.result(20)
    assert isinstance(outcome, Failed)
    assert outcome.fault == "cancelled"
    assert not worker.cancel("stopped")
    assert not worker.cancel("never given")


def test_a_cancel_is_heard_inside_a_step_at_the_next_layer(worker: Worker) -> None:
    layers: list[str] = []

    def passed(module: Any, *_: Any) -> None:
        if type(module).__name__ == "BertLayer":
            layers.append("passed")
            assert worker.cancel("inside")

    handle = torch.nn.modules.module.register_module_forward_hook(passed)
    try:
        outcome = worker.run(train("inside", training={"max_steps": 100000}))
    finally:
        handle.remove()
    assert isinstance(outcome, Failed)
    assert (outcome.fault, worker.progress().step, layers) == ("cancelled", 0, ["passed"])
    assert isinstance(worker.run(train("next")), Trained)  # nothing of it is left in the base model


def test_every_outcome_says_how_long_the_order_had_the_worker(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*_: Any) -> Any:
        time.sleep(0.05)
        raise fault

    monkeypatch.setattr("workers.worker.train_task", slowly)
    for fault in (InvalidInput("of the user"), RuntimeError("of ours"), Cancelled(), Preempted()):
        outcome = worker.run(train(f"one that ends with {type(fault).__name__}"))
        assert outcome.worker_seconds is not None
        assert 0.05 <= outcome.worker_seconds < 5.0
    scored = worker.run(
        Evaluate(token="how long", task_id="task-1", version=1, spec=sentiment_task(), eval_key="data/eval")
    )
    assert isinstance(scored, Evaluated | Failed)
    assert scored.worker_seconds is not None


def test_what_an_order_was_warned_of_goes_with_its_task(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: Any) -> Any:
        assert ids()["task_id"] == "task-warned of"
        logging.getLogger("a.library").warning("something is doubtful")
        raise InvalidInput("of the user")

    monkeypatch.setattr("workers.worker.train_task", warned)
    outcome = worker.run(train("warned of"))
    assert isinstance(outcome, Failed)
    assert outcome.log_lines == ("warning: something is doubtful",)


def test_every_outcome_says_where_and_when_its_parts_were_done(worker: Worker) -> None:
    began = time.time()
    outcomes = [worker.run(train("in parts")), worker.run(train("none", data={"label_column": "nothing"}))]
    for outcome, parts in zip(outcomes, (["loading", "training", "scoring", "saving"], ["loading"]), strict=True):
        phases = outcome.done_at.phases
        assert [str(one.phase) for one in phases] == parts
        assert outcome.done_at.node == platform.node()
        assert began <= phases[0].began
        assert all(one.ended == following.began for one, following in pairwise(phases))
        assert phases[-1].ended <= time.time()
        assert outcome.worker_seconds == pytest.approx(phases[-1].ended - phases[0].began, abs=0.5)
        began = phases[-1].ended


def test_an_order_that_waits_can_be_cancelled_before_it_begins(worker: Worker, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as callers:
        callers.submit(worker.run, train("before"))
        assert gate.began.wait(10)
        waiting = callers.submit(worker.run, train("waiting"))
        while not worker.cancel("waiting"):
            time.sleep(0.01)
        gate.opened.set()
        assert waiting.result(10) == Failed(
            token="waiting", fault="cancelled", message="cancelled while it was running"
        )
    assert gate.orders == 1


def test_progress_can_be_asked_while_an_order_runs_and_gives_each_log_line_once(worker: Worker) -> None:
    worker.progress()
    seen: list[Progress] = []
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(worker.run, train("watched", training={"max_steps": 30}))
        while not answer.done():
            seen.append(worker.progress())
            time.sleep(0.005)
    seen.append(worker.progress())
    trained = answer.result()
    assert isinstance(trained, Trained)
    lines = [*(line for progress in seen for line in progress.log_lines), *trained.log_lines]
    assert sum(isinstance(line, Point) and line.step == 30 for line in lines) == 1
    assert {"training", "idle"} <= {progress.phase for progress in seen}
    assert all(progress.token == "watched" for progress in seen if progress.phase == "training")


def test_no_log_line_of_a_task_is_left_for_the_next_one(worker: Worker) -> None:
    for name in ("first", "second"):
        trained = worker.run(train(name, training={"max_steps": 2}))
        assert isinstance(trained, Trained)
        words = [line for line in trained.log_lines if isinstance(line, str)]
        assert [line.split(":")[0] for line in words if line.startswith("task ")] == [f"task task-{name}"]
        assert isinstance(last := trained.log_lines[-1], Point)
        assert (last.step, last.steps) == (2, 2)
        assert worker.progress().log_lines == ()


def test_a_task_is_scored_under_a_version(worker: Worker) -> None:
    from subspace_store.subspace_store import SubspaceStore

    storage = open_storage(STORAGE, "tiny")
    order = train("merged", training={"max_steps": 10, "learning_rate": 0.01})
    order = replace(order, results_key="results/merged/local")
    trained = worker.run(order)
    assert isinstance(trained, Trained)
    writer = SubspaceStore.open(storage, base_model="tiny", writer="test")
    version = _merge(writer, order, trained)
    evaluate = Evaluate(
        token="scored",
        task_id=order.task_id,
        version=version,
        spec=order.spec,
        eval_key="data/eval",
        results_key="results/merged/1",
    )
    outcome = worker.run(evaluate)
    # One task in an empty subspace: nothing is lost but rounding.
    assert isinstance(outcome, Evaluated)
    assert (outcome.score, outcome.count) == (trained.local_score, 10)
    assert outcome.metrics == trained.metrics
    assert outcome.metrics["accuracy"] == outcome.score
    before, after = (read_results(storage, f"results/merged/{name}") for name in ("local", "1"))
    assert before.comparable(after)
    assert (before.version, after.version, before.per_row) == (0, version, after.per_row)
    assert sum(after.per_row) / 10 == outcome.score
    missing = worker.run(replace(evaluate, token="no such task", task_id="nobody"))
    assert isinstance(missing, Failed)
    assert missing.fault == "bug"


def test_tasks_that_are_scored_together_each_have_the_outcome_of_their_own_order(worker: Worker) -> None:
    from subspace_store.subspace_store import SubspaceStore

    storage = open_storage(STORAGE, "tiny")
    base = SubspaceStore.open(storage, base_model="tiny", writer="test")
    for name in ("one", "two"):
        order = train(name, training={"max_steps": 10, "learning_rate": 0.01})
        trained = worker.run(order)
        assert isinstance(trained, Trained)
        version = _merge(base, order, trained)
    orders = tuple(
        Evaluate(
            token=f"scored {name}",
            task_id=f"task-{name}",
            version=version,
            spec=sentiment_task(data={"max_length": 4096} if name == "too long" else {}),
            eval_key="data/eval",
            results_key=f"results/{name}",
        )
        for name in ("one", "too long", "two")
    )
    found = worker.run(EvaluateTogether(token="together", version=version, orders=orders))
    assert isinstance(found, EvaluatedTogether)
    assert found.worker_seconds is not None
    first, failed, last = found.outcomes
    assert isinstance(failed, Failed)
    assert (failed.token, failed.fault) == ("scored too long", "input")
    for order_of_one, together in ((orders[0], first), (orders[2], last)):
        kept = read_results(storage, order_of_one.results_key)
        alone = worker.run(replace(order_of_one, token=f"{order_of_one.token} alone"))
        assert isinstance(alone, Evaluated)
        assert isinstance(together, Evaluated)
        assert (together.score, together.count) == (alone.score, 10)
        assert read_results(storage, order_of_one.results_key) == kept
    gone = replace(orders[0], eval_key="data/gone")
    with pytest.raises(Corrupt, match="data/gone: the evaluation rows"):
        worker.run(EvaluateTogether(token="rows are gone", version=version, orders=(gone, orders[2])))


def _merge(writer: Any, order: Train, trained: Trained) -> int:
    from subspace_store.log.version import StagedAdapter

    staged = StagedAdapter(
        task_id=order.task_id, name=f"team-a/{order.task_id}", key=trained.staging_key, sha256=trained.adapter_sha256
    )
    return int(writer.merge([staged], op_key=f"merge-{order.task_id}", actor="test").number)


def test_a_published_task_answers_between_two_orders_and_never_beside_one(worker: Worker, gate: Gate) -> None:
    with pytest.raises(WorkersBusy, match="something else to do"):
        Worker(worker._settings, STORAGE, "tiny").answer([Question("red/sentiment", "good")])  # loads its base model
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(worker.run, train("held"))
        assert gate.began.wait(10)
        with pytest.raises(WorkersBusy, match="something else to do"):
            worker.answer([Question("red/sentiment", "good")])
        gate.opened.set()
        running.result()
    (answer,) = worker.answer([Question("nobody/nothing", "good")])
    assert isinstance(answer, NotFound)


def test_a_trained_adapter_says_how_its_rows_are_read(worker: Worker) -> None:
    order = train("reading")
    trained = worker.run(order)
    assert isinstance(trained, Trained)
    adapter = adapter_from_bytes(open_storage(STORAGE, "tiny").read(trained.staging_key), "staged")
    read = read_as(adapter.info, "tiny", "red/sentiment")
    assert (read.kind, read.data.label_names) == (order.spec.kind, order.spec.data.label_names)
    assert read.data.max_length == order.spec.data.max_length


def test_a_base_model_that_cannot_be_loaded_is_not_the_tasks_fault(settings: BaseModelSettings) -> None:
    MemoryStorage("cold").write("data/train", b"")
    cold = Worker(settings.model_copy(update={"weights_sha256": "0" * 64}), StorageSettings(url="memory:cold"), "")
    outcome = cold.run(train("cold"))
    assert isinstance(outcome, Failed)
    assert outcome.fault == "bug"
    assert "0" * 64 in outcome.message


def test_what_makes_a_worker_and_what_it_answers_can_be_sent_between_processes(
    worker: Worker, settings: BaseModelSettings
) -> None:
    sent = (settings, STORAGE, train("sent"), worker.warm(), worker.run(train("one")), worker.progress())
    assert repr(pickle.loads(pickle.dumps(sent))) == repr(sent)
