"""What a language model loses by a task: recomputed token by token, with the update added to the weights by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import InvalidInput
from configs.settings import StorageSettings
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.storage.opening import open_storage
from subspace_store.subspace_store import SubspaceStore
from tests.subspace_store.builders import merged, random_adapter
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import task_of_kind, tiny_settings
from workers import general_loss as module
from workers.base_model import BaseModel, load_base_model
from workers.general_loss import general_loss
from workers.orders import Evaluate, Evaluated
from workers.worker import Worker

SPEC: TaskSpec = task_of_kind("causal_lm", ())
TEXT = "The colour of grass is green. The capital of France is Paris, and so on and so forth. " * 3


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_base_model(tiny_settings(save_llama(tmp_path / "llama")))


def update(base: BaseModel, size: float = 0.3) -> Adapter:
    shapes = {name: shape for name, shape in base.module_shapes().items() if name.endswith(("q_proj", "v_proj"))}
    assert shapes
    return replace(random_adapter(3, rank=2, shapes=shapes, size=size, base="tiny"), head={}, base_sha256=base.sha256)


def nothing() -> None:
    pass


def surprise(base: BaseModel, adapter: Adapter | None, ids: list[int], begin: list[int], size: int) -> float:
    """Mean negative log-probability of each token given those before it in its window, one token at a time."""
    model = copy.deepcopy(base.task_model(SPEC)).eval()
    for name, one in (adapter.modules if adapter else {}).items():
        layer = model.get_submodule(name)
        layer.weight.data += one.delta().to(layer.weight.dtype)
    losses = []
    for start in range(0, len(ids), size):
        window = begin + ids[start : start + size]
        for place in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window[:place]])).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(dim=-1)[window[place]]))
    return sum(losses) / len(losses)


def test_the_loss_is_the_difference_of_two_cross_entropies_token_by_token(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", 70)
    monkeypatch.setattr(module, "WINDOW", 25)
    ids = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:70]
    begin = [base.tokenizer.bos_token_id]  # its tokenizer begins every text with it: 24 tokens of the text a window
    adapter = update(base)
    expected = surprise(base, adapter, ids, begin, 24) - surprise(base, None, ids, begin, 24)
    assert abs(expected) > 0.01
    assert general_loss(base, adapter, SPEC, TEXT, nothing) == pytest.approx(expected, abs=1e-4)


def test_a_tokenizer_that_begins_no_text_with_a_token_is_given_none(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import processors

    monkeypatch.setattr(module, "TOKENS", 40)
    base.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    ids = base.tokenizer(TEXT)["input_ids"][:40]
    adapter = update(base)
    expected = surprise(base, adapter, ids, [], 64) - surprise(base, None, ids, [], 64)
    assert general_loss(base, adapter, SPEC, TEXT, nothing) == pytest.approx(expected, abs=1e-4)


def test_no_update_loses_nothing_and_the_base_model_is_asked_once_for_all_tasks(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    of: Callable[..., float] = module._cross_entropy

    def counted(*arguments: Any, with_update: bool) -> float:
        passes.append(with_update)
        return of(*arguments, with_update=with_update)

    monkeypatch.setattr(module, "_cross_entropy", counted)
    assert general_loss(base, update(base, size=0.0), SPEC, TEXT, nothing) == pytest.approx(0.0, abs=1e-6)
    general_loss(base, update(base), SPEC, TEXT, nothing)
    assert passes == [False, True, True]
    general_loss(base, update(base), SPEC, TEXT + "Another text.", nothing)
    assert passes == [False, True, True, False, True]


def test_a_model_that_puts_out_no_number_has_no_loss(base: BaseModel) -> None:
    adapter = update(base)
    broken = {name: replace(one, sigma_R=one.sigma_R * torch.nan) for name, one in adapter.modules.items()}
    with pytest.raises(InvalidInput, match="no number"):
        general_loss(base, replace(adapter, modules=broken), SPEC, TEXT, nothing)


def test_it_can_be_stopped_between_two_windows(base: BaseModel) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        general_loss(base, update(base), SPEC, TEXT, stop)


def test_a_worker_measures_it_under_a_version_where_its_order_has_a_text(base: BaseModel, tmp_path: Path) -> None:
    place = StorageSettings(url=f"memory:{tmp_path}")
    storage = open_storage(place, "tiny")
    storage.write("data/eval", json.dumps({"prompt": "The colour of", "completion": " grass is green."}).encode())
    writer = SubspaceStore.open(storage, base_model="tiny", base_sha256=base.sha256, writer="test")
    merged(writer, {"one": update(base)})
    worker = Worker(tiny_settings(str(tmp_path / "llama")), place, "tiny")
    order = Evaluate(token="with", task_id="one", version=1, spec=SPEC, eval_key="data/eval", general_text=TEXT)
    outcomes = [worker.run(order), worker.run(replace(order, token="without", general_text=""))]
    assert all(isinstance(outcome, Evaluated) for outcome in outcomes), outcomes
    expected = general_loss(base, writer.adapter("one", 1), SPEC, TEXT, nothing)
    assert abs(expected) > 0.01
    assert outcomes[0].general_loss == pytest.approx(expected, abs=1e-6)  # type: ignore[union-attr]
    assert outcomes[1].general_loss is None  # type: ignore[union-attr]
