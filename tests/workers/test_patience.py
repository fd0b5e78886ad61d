"""What is finished waits for a storage that does not take it; nothing is trained twice for a full disk."""

from __future__ import annotations

import pytest

from configs.errors import StoreFull, Unavailable
from tests.workers.test_training import Desk, Tiny
from tests.workers.worker_builders import sentiment_task
from workers import patience
from workers.orders import Phase, Progress
from workers.patience import Patience
from workers.trainer import Cancelled, Preempted


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(patience, "LOOK_SECONDS", 0.001)


def refusing(times: int, error: Unavailable) -> object:
    left = [error] * times

    def write() -> str:
        if left:
            raise left.pop()
        return "written"

    return write


def test_a_write_is_tried_until_it_succeeds_and_each_cause_is_one_line_of_the_log() -> None:
    told: list[Progress] = []
    keep = Patience("token", told.append, lambda: "")
    full = StoreFull("no space left on device", "/store")
    assert keep(refusing(3, full)) == "written"  # type: ignore[arg-type]
    assert [(beat.phase, beat.trouble) for beat in told] == [(Phase.SAVING, full)] * 3
    assert [line for beat in told for line in beat.log_lines] == [
        "finished, and waits for the storage: no space left on device"
    ]


@pytest.mark.parametrize(("wanted", "raised"), [("cancel", Cancelled), ("preempt", Preempted)])
def test_who_wants_the_worker_for_something_else_gets_it(wanted: str, raised: type[Exception]) -> None:
    keep = Patience("token", lambda progress: None, lambda: wanted)  # type: ignore[arg-type,return-value]
    with pytest.raises(raised):
        keep(refusing(10**6, StoreFull("full")))  # type: ignore[arg-type]


def test_a_task_that_is_trained_when_the_store_is_full_is_trained_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    desk = Desk(request.node.name)
    really, refused = desk.storage.write, [3]

    def write(key: str, content: bytes) -> None:
        if key.endswith(("/adapter.safetensors", "/local-1.safetensors")) and refused[0]:
            refused[0] -= 1
            raise StoreFull("no space left on device", key)
        really(key, content)

    monkeypatch.setattr(desk.storage, "write", write)
    trained = desk.train(tiny("bert"), sentiment_task(), results_key="results/task-1/local-1.safetensors")
    assert desk.staged(trained).parameter_count == trained.adapter_parameters
    assert desk.storage.read("results/task-1/local-1.safetensors")
    assert sum(beat.trouble is not None for beat in desk.heartbeats) == 3
    steps = [beat.step for beat in desk.heartbeats if beat.phase == "training"]
    assert steps == sorted(steps)  # it went through them once
    assert set(steps) == {0, 1, 2, 3}
