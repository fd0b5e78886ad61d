"""Method `auto`: what it tries out, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from subspace_store.memory_storage import MemoryStorage
from subspace_store.subspace_store import SubspaceStore
from subspace_store.version import StagedAdapter
from tests.workers.method_builders import leased
from tests.workers.test_deepspeed_engine import zero
from tests.workers.worker_builders import sentiment_rows, sentiment_task
from workers.base_model import BaseModel
from workers.methods import NOTHING, Given, auto, lora
from workers.task_data import Row, read_rows

Tiny = Callable[[str], BaseModel]
SPEC = sentiment_task(method={"name": "auto"}, lora={"r": 4}, training={"learning_rate": 0.02})


@pytest.fixture(scope="module")
def rows() -> Sequence[Row]:
    return read_rows(sentiment_rows(24), SPEC, "rows")


def test_a_basis_that_spans_most_of_the_probe_means_share(tiny: Tiny, rows: Sequence[Row]) -> None:
    # 28 of 32 directions on the side of B, where a random update would have 28/32 inside; A starts inside.
    given = leased(tiny("bert"), ("query", "value"), ranks=(28, 28))
    name, why = auto.choose(tiny("bert"), SPEC, given, rows)
    assert name == "share"
    assert "auto: share, because the basis spans" in why


def test_a_basis_that_spans_little_of_it_means_lora(tiny: Tiny, rows: Sequence[Row]) -> None:
    given = leased(tiny("bert"), ("query", "value"), ranks=(2, 2))
    name, why = auto.choose(tiny("bert"), SPEC, given, rows)
    assert name == "lora"
    assert why.endswith("% of such an update, less than 50%")


def test_a_module_that_the_basis_lacks_means_lora_without_trying(tiny: Tiny) -> None:
    assert auto.choose(tiny("bert"), SPEC, NOTHING, ())[0] == "lora"
    name, why = auto.choose(tiny("bert"), SPEC, leased(tiny("bert"), ("query",)), ())
    assert (name, why) == ("lora", "auto: lora, because the basis lacks 2 of the modules")


def test_a_base_model_that_one_process_may_not_hold_is_not_tried_out(tiny: Tiny) -> None:
    spec = sentiment_task(training={"deepspeed": zero(3)})
    name, why = auto.choose(tiny("bert"), spec, leased(tiny("bert"), ("query", "value")), ())
    assert name == "lora"
    assert "ZeRO stage 3" in why


def test_the_same_task_gets_the_same_answer_to_the_last_digit(tiny: Tiny, rows: Sequence[Row]) -> None:
    given = leased(tiny("bert"), ("query", "value"))
    first, second = (auto._probe(tiny("bert"), SPEC, given, rows) for _ in range(2))
    torch.rand(3)
    assert auto.spanned_share(first, given) == auto.spanned_share(second, given)


def test_what_it_measures_is_what_the_stores_forecast_says(tiny: Tiny) -> None:
    base = tiny("bert")
    storage = MemoryStorage("auto-forecast")
    store = SubspaceStore.open(storage, writer="test", base_model=base.name, base_sha256=base.sha256)
    trained = []
    for seed in (1, 2):
        model = lora.prepare(base, SPEC)
        torch.manual_seed(seed)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.normal_()
        trained.append(lora.finish(model, base, SPEC))
    staged = store.stage("staging/a/1/adapter.safetensors", trained[0])
    version = store.merge([StagedAdapter("a", "t/a", staged.key, staged.sha256)], op_key="1", actor="test").number
    given = Given(version=version, basis=store.basis(version))
    expected = store.forecast({"b": trained[1]}, version).spanned["b"]
    assert 0 < expected < 0.5
    assert auto.spanned_share(trained[1], given) == pytest.approx(expected, rel=1e-6)
    assert auto.spanned_share(trained[0], given) > 0.95
