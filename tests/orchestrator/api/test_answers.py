"""What a published task answers: by a worker that is free, for whom it may, and never by one that is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.errors import InvalidInput, NotFound, WorkersBusy
from orchestrator.api.answers import answer_json
from orchestrator.api.requests import Predict, Which
from orchestrator.api.service import Service
from tests.orchestrator.plant import Plant
from tests.orchestrator.test_base_models import service_of
from workers.serving.question import Answer


@pytest.fixture
def published(make_plant: Callable[..., Plant]) -> Plant:
    plant = make_plant(workers=1)
    plant.submit("red/alpha")
    plant.run()
    return plant


def ask(service: Service, reference: str, **changes: Any) -> Any:
    return service.answer(Predict(reference=reference, inputs=("a", {"text": "b"}), **changes))


def test_a_free_worker_answers_by_the_version_that_main_names(published: Plant) -> None:
    service = service_of(published)
    yes = {"label": "yes", "probabilities": {"yes": 1.0}}
    found = ask(service, "red/alpha")
    assert found["answers"] == [yes, yes]
    assert (found["task"], found["version"]) == ("red/alpha", 1)
    assert ask(service, published.get("red/alpha").task_id)["task"] == "red/alpha"


def test_what_main_does_not_hold_is_refused(published: Plant) -> None:
    service = service_of(published)
    for reference, changes in (("red/beta", {}), ("red/alpha", {"version": 9})):
        with pytest.raises(NotFound):
            ask(service, reference, **changes)


def test_where_no_task_is_named_it_is_found_among_those_of_the_callers_teams(published: Plant) -> None:
    published.submit("blue/beta")
    published.run()
    service = service_of(published)
    for teams, task in ((None, "red/alpha"), ({"blue"}, "blue/beta")):
        found = service.answer(Which(texts=("a",), way="energy"), teams)
        (said,) = found["answers"]
        assert (said["task"], said["routed_by"], said["label"]) == (task, "energy", "yes")
        assert found["version"] == 2
    with pytest.raises(NotFound, match="there is no version 9"):
        service.answer(Which(texts=("a",), version=9))


def test_while_all_workers_are_at_work_nobody_is_kept_waiting(published: Plant) -> None:
    published.cluster.hold = lambda order: True
    published.submit("red/beta")
    published.run(lambda: bool(published.cluster.held))
    with pytest.raises(WorkersBusy, match="is free to answer"):
        ask(service_of(published), "red/alpha")
    published.cluster.release()
    published.run()
    assert ask(service_of(published), "red/alpha")["version"] == 2


def test_a_gang_does_not_answer(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(workers=None, pools={"pair": {"ranks": 2, "min": 1, "max": 1}})
    plant.submit("red/alpha")
    plant.run()
    with pytest.raises(WorkersBusy, match="its pools are of several ranks, which do not answer"):
        ask(service_of(plant), "red/alpha")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer("t", 1, "a", {"a": 0.75, "b": 0.25}), {"label": "a", "probabilities": {"a": 0.75, "b": 0.25}}),
        (Answer("t", 1, value=0.0), {"value": 0.0}),
        (Answer("t", 1, values={"x": 0.0, "y": 1.5}), {"values": {"x": 0.0, "y": 1.5}}),
        (
            Answer("t", 1, text="", tokens=0, prompt_tokens=4, ended="stop", warning="cut"),
            {"text": "", "tokens": 0, "prompt_tokens": 4, "ended": "stop", "warning": "cut"},
        ),
        (
            InvalidInput("is empty", "red/alpha", "fill it in"),
            {"error": InvalidInput("is empty", "red/alpha", "fill it in").as_dict()},
        ),
    ],
)
def test_an_answer_says_what_its_kind_says_also_when_that_is_nothing(answer: Any, said: dict[str, Any]) -> None:
    assert answer_json(answer) == said
