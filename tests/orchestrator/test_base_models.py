"""Several base models in one service: each has a subspace of its own, and what goes wrong with one stops no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from configs.errors import InvalidInput, NotFound, Unavailable
from configs.settings import Settings
from orchestrator.alarms import AlarmCode
from orchestrator.api.requests import Export, ListTasks, ListVersions, ShowScores, ShowTask, Status
from orchestrator.api.service import Service
from orchestrator.commands import display
from subspace_store import SubspaceReader
from subspace_store.requests import Hold, Rollback, Tag
from tests.builders import SHA256
from tests.orchestrator.plant import Plant
from tests.orchestrator.stand_in_cluster import StandInCluster

SMALL, LARGE, THIRD = "small", "large", "third"
OF_LARGE = {"base_model": LARGE}


def base(name: str) -> dict[str, str]:
    return {"name": name, "source": f"{name}-source", "weights_sha256": SHA256}


@pytest.fixture
def two(make_plant: Callable[..., Plant]) -> Plant:
    """A service with two base models, and one worker for each."""
    return make_plant(workers=1, base_model=None, base_models=[base(SMALL), base(LARGE)])


def service_of(plant: Plant) -> Service:
    return Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)


def submit(plant: Plant, base_model: str, *titles: str, **spec: Any) -> None:
    pool = {SMALL: "default"}.get(base_model, base_model)
    plant.submit(*titles, spec={"base_model": base_model, **spec}, pool=pool)


def test_a_task_is_trained_merged_and_published_in_the_subspace_that_it_names(two: Plant) -> None:
    submit(two, SMALL, "red/alpha", "blue/beta")
    submit(two, LARGE, "red/gamma")
    two.run()
    assert set(two.states().values()) == {"published"}
    assert (two.held(base_model=SMALL), two.held(base_model=LARGE)) == (["blue/beta", "red/alpha"], ["red/gamma"])
    claims = {
        title: next(event.text for event in two.queue.events(two.get(title).task_id) if event.kind == "Claimed")
        for title in ("red/alpha", "blue/beta", "red/gamma")
    }
    workers = {title: text.rpartition("worker ")[2] for title, text in claims.items()}
    assert workers == {"red/alpha": "worker-0", "blue/beta": "worker-0", "red/gamma": f"{LARGE}-0"}
    assert SubspaceReader.open(two.storages[LARGE]).base_model == LARGE


def test_a_rollback_of_one_leaves_the_main_and_the_tasks_of_the_other_alone(two: Plant) -> None:
    for title in ("red/alpha", "red/beta"):
        submit(two, SMALL, title)
        submit(two, LARGE, f"{title}-large")
        two.run()
    assert (two.state_of(SMALL).refs["main"], two.state_of(LARGE).refs["main"]) == (2, 2)
    before = two.state_of(LARGE)
    service = service_of(two)
    answer = service.answer(Rollback(version=1, actor="ann", base_model=SMALL))
    assert (answer["base_model"], answer["main"]) == (SMALL, 1)
    two.run(lambda: two.states()["red/beta"] == "parked")
    assert two.state_of(LARGE) == before
    assert [two.states()[f"red/{name}-large"] for name in ("alpha", "beta")] == ["published", "published"]


def test_scores_and_versions_are_those_of_the_base_model_that_is_named(two: Plant) -> None:
    two.cluster.score = lambda title, held: 0.7 if title.endswith("large") else 0.9
    two.cluster.local = lambda title: 0.7 if title.endswith("large") else 0.9
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run()
    service = service_of(two)
    tables = {name: service.answer(ShowScores(base_model=name)) for name in (SMALL, LARGE)}
    assert {name: table["base_model"] for name, table in tables.items()} == {SMALL: SMALL, LARGE: LARGE}
    assert [tables[name]["matrix"][0][0]["score"] for name in (SMALL, LARGE)] == [0.9, 0.7]
    assert [[task["title"] for task in tables[name]["tasks"]] for name in (SMALL, LARGE)] == [
        ["red/alpha"],
        ["red/large"],
    ]
    assert service.answer(ShowTask(reference="red/large"))["main_score"] == 0.7  # a task names its base model
    rows = service.answer(ListTasks(base_model=LARGE))
    assert [(row["title"], row["main_score"]) for row in rows] == [("red/large", 0.7)]


def test_what_needs_a_base_model_and_names_none_is_refused_with_the_names_and_nothing_is_guessed(two: Plant) -> None:
    service = service_of(two)
    with pytest.raises(InvalidInput, match="has several base models") as refused:
        service.answer(ListVersions())
    assert refused.value.todo == "add --base-model: one of small, large"
    with pytest.raises(InvalidInput, match="has several base models"):
        service.answer(Hold(reason="audit", actor="ann"))
    with pytest.raises(NotFound, match="there is no base model 'medium'") as unknown:
        service.answer(ListVersions(base_model="medium"))
    assert unknown.value.todo == "base models of this service: small, large"
    assert all(state.held is None for state in map(two.state_of, (SMALL, LARGE)))


def test_with_a_single_base_model_none_has_to_be_named(plant: Plant) -> None:
    plant.submit("red/alpha")
    plant.run()
    service = service_of(plant)
    assert [row["version"] for row in service.answer(ListVersions())] == [1]
    assert service.answer(Tag(name="gold", version=1, actor="ann"))["base_model"] == "tiny"
    told = service.answer(Status())
    assert (told["base_model"], told["main"], len(told["base_models"])) == ("tiny", 1, 1)


def test_a_damaged_store_stops_its_own_base_model_and_no_other(two: Plant) -> None:
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run()
    two.cluster.training_faults["red/beta"] = ["damaged"]
    submit(two, SMALL, "red/beta", "red/gamma")
    submit(two, LARGE, "red/more")
    two.run(lambda: two.states()["red/more"] == "published")
    two.run(lambda: two.states()["red/gamma"] == "merging")
    two.step(20)
    assert [(a.code, a.base_model) for a in two.controller.alarms] == [(AlarmCode.STORE_DAMAGED, SMALL)]
    assert "base model small: the store is damaged" in str(next(iter(two.controller.alarms)))
    assert two.states()["red/gamma"] == "merging"  # trained, and waits for a person
    assert (two.state_of(SMALL).refs["main"], two.state_of(LARGE).refs["main"]) == (1, 2)
    wait = service_of(two).answer(ShowTask(reference="red/gamma"))["wait"]
    assert wait["code"] == "store-alarm"
    assert service_of(two).answer(ShowTask(reference="red/more"))["alarms"] == []


def test_a_store_that_is_away_keeps_no_other_base_model_waiting(two: Plant) -> None:
    store = two.controller.subspaces[SMALL].store
    is_away = True
    refresh = store.refresh

    def away() -> Any:
        if is_away:
            raise Unavailable("the storage is away")
        return refresh()

    store.refresh = away  # type: ignore[method-assign]
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run(lambda: two.states()["red/large"] == "published")
    assert two.states()["red/alpha"] != "published"
    assert [(a.code, a.base_model) for a in two.controller.alarms] == [(AlarmCode.STORE_AWAY, SMALL)]
    is_away = False
    two.run()
    assert two.states()["red/alpha"] == "published"
    assert not list(two.controller.alarms)


def test_what_a_team_used_counts_over_all_base_models(two: Plant) -> None:
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run()
    spent = [two.queue.spent(two.get(title).task_id) for title in ("red/alpha", "red/large")]
    # Each was trained for 2.5 s and scored for 0.5 s, as the stand-in's workers say.
    assert [sum(use.seconds for use in uses) for uses in spent] == [3.0, 3.0]
    newest = max(use.ended_at for uses in spent for use in uses)
    assert two.queue.use_of_teams(newest)["red"] == pytest.approx(6.0, rel=1e-3)


def test_a_quota_is_of_all_base_models_together(make_plant: Callable[..., Plant]) -> None:
    two = make_plant(
        workers=1,
        base_model=None,
        base_models=[base(SMALL), base(LARGE)],
        teams={"red": {"places": 1}, "blue": {"places": 1}},
    )
    two.cluster.hold = lambda order: True
    submit(two, SMALL, "red/one")
    submit(two, LARGE, "red/two")
    two.run(lambda: len(two.cluster.held) == 2)  # red borrows the second place, which nobody wants
    submit(two, LARGE, "blue/wants")
    two.run(lambda: two.states()["blue/wants"] == "training")
    assert two.states()["red/two"] == "queued"
    assert two.states()["red/one"] == "training"


def test_a_name_is_one_task_of_the_service_whatever_its_base_model(two: Plant) -> None:
    submit(two, SMALL, "red/alpha")
    with pytest.raises(Exception, match="of that name is queued"):
        two.submit("red/alpha", spec=OF_LARGE, task_id="t-another", client_key="another")


def test_a_hold_of_one_main_keeps_only_its_own_tasks_waiting(two: Plant) -> None:
    submit(two, SMALL, "red/first")
    two.run()
    service = service_of(two)
    service.answer(Hold(reason="audit", actor="ann", base_model=SMALL))
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run(lambda: two.states() == {"red/first": "published", "red/alpha": "evaluating", "red/large": "published"})
    two.step(10)
    status = service.answer(Status())
    assert {one["base_model"]: (one["held"] is not None, one["main"]) for one in status["base_models"]} == {
        SMALL: (True, 1),
        LARGE: (False, 1),
    }
    assert (status["base_model"], status["main"]) == (None, None)


def test_of_all_base_models_at_most_one_has_its_bases_in_memory(two: Plant) -> None:
    submit(two, SMALL, "red/alpha")
    submit(two, LARGE, "red/large")
    two.run()
    service = service_of(two)

    def in_memory() -> list[str]:
        return [name for name, versions in service._of_each.items() if "_tensors" in versions._store.__dict__]

    service.answer(Export(reference="red/alpha", base_model=SMALL))
    assert in_memory() == [SMALL]
    service.answer(Export(reference="red/large", base_model=LARGE))
    assert in_memory() == [LARGE]
    assert not any("_tensors" in subspace.store.__dict__ for subspace in two.controller.subspaces.values())


@pytest.mark.parametrize(("left", "stays"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_the_tasks_of_a_base_model_that_left_on_purpose_wait_and_go_on_when_it_is_back(
    two: Plant, left: str, stays: str, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(two, left, "red/first")
    two.run()
    submit(two, left, "red/second")
    submit(two, stays, "red/alpha")
    both = two.settings
    alone = both.model_dump(mode="json") | {"base_models": [base(stays)], "pools": {}}  # its pool is `default` now
    two.settings = Settings.model_validate(alone)
    two.kill()
    two.cluster = StandInCluster(two.settings, two.storages, two.service)
    two.run(lambda: two.states()["red/alpha"] == "published")
    two.step(10)
    assert two.states() == {"red/first": "published", "red/second": "queued", "red/alpha": "published"}
    service = service_of(two)
    told = service.answer(ShowTask(reference="red/second"))
    assert told["wait"]["code"] == "never-fits"
    status = service.answer(Status())
    assert (status["left_base_models"], status["waiting"]) == ({left: 2}, {"red": {"never-fits": 1}})
    display.status(status)
    assert f"{left} is no longer among the base models: 2 tasks of it stay as they are" in capsys.readouterr().out
    assert {row["title"] for row in service.answer(ListTasks())} == {"red/first", "red/second", "red/alpha"}
    two.settings = both
    two.kill()
    two.cluster = StandInCluster(two.settings, two.storages, two.service)
    two.run()
    assert set(two.states().values()) == {"published"}
    assert two.held(base_model=left) == ["red/first", "red/second"]


def test_a_task_at_work_in_a_pool_that_was_given_to_another_base_model_goes_on_in_another(
    make_plant: Callable[..., Plant],
) -> None:
    pools = {"a": {"base_model": SMALL, "max": 1}, "b": {"base_model": LARGE, "max": 1}}
    plant = make_plant(workers=None, base_model=None, base_models=[base(SMALL), base(LARGE)], pools=pools)
    plant.cluster.hold = lambda order: True
    plant.submit("red/alpha", spec={"base_model": SMALL}, pool="a")
    plant.run(lambda: len(plant.cluster.held) == 1)
    plant.kill()
    swapped = {"a": pools["a"] | {"base_model": LARGE}, "b": pools["b"] | {"base_model": SMALL}}
    plant.settings = Settings.model_validate(plant.settings.model_dump(mode="json") | {"pools": swapped})
    plant.cluster = StandInCluster(plant.settings, plant.storages, plant.service)
    plant.run()
    record = plant.get("red/alpha")
    assert (str(record.state), record.pool) == ("published", "b")
    claims = [event.text for event in plant.queue.events(record.task_id) if event.kind == "Claimed"]
    assert [text.rpartition("worker ")[2] for text in claims] == ["a-0", "b-0"]
    assert (record.attempt, record.lost_machines, record.preemptions) == (2, 0, 1)
    assert plant.held(base_model=SMALL) == ["red/alpha"]
