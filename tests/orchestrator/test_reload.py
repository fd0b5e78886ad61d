"""Which settings a running service takes, and which need a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Conflict, InvalidInput, Unavailable
from configs.settings import Settings
from orchestrator.api.control_plane import ControlPlane
from orchestrator.api.requests import ListVersions, Reload, Status
from orchestrator.cluster import RayCluster
from orchestrator.reload import refuse_lost_teams, taken_without_restart
from subspace_store.commands.state_folder import service_settings
from tests.builders import settings
from tests.orchestrator.plant import Plant
from tests.orchestrator.test_base_models import LARGE, SMALL, THIRD, base, service_of, submit

ELSEWHERE = {"address": "head:6379", "auth_token_path": "/token"}
"""A Ray cluster of other machines."""


def two(**changes: Any) -> Settings:
    return settings(base_model=None, base_models=[base(SMALL), base(LARGE)], **changes)


def three(**changes: Any) -> Settings:
    return settings(base_model=None, base_models=[base(SMALL), base(LARGE), base(THIRD)], **changes)


def taken(before: Settings, after: Settings, cpus: int = 64) -> list[str]:
    return taken_without_restart(before, after, cpus)


def test_a_further_base_model_is_taken_with_its_workers_and_so_are_teams_folders_and_the_gate() -> None:
    assert taken(two(), two()) == []
    assert taken(two(), three()) == ["base_models.third", "pools.third"]
    changed = two(
        teams={"red": {"weight": 2}},
        data_roots=["/other"],
        data_buckets=[{"url": "s3://rows/red"}],
        gate={"drop_max": 0.5},
        main={"hold": {"role": "admin"}},
    )
    assert taken(two(), changed) == ["teams", "data_roots", "data_buckets", "gate", "main"]


def test_base_model_alone_and_a_list_of_it_are_the_same_settings() -> None:
    alone, listed = settings(base_model=base(SMALL)), settings(base_model=None, base_models=[base(SMALL)])
    assert taken(alone, listed) == []
    assert taken(alone, two()) == ["base_models.large", "pools.large"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"storage": {"url": "file:/elsewhere"}}, "storage.url"),
        ({"subspace": {"rank_max": 8}}, "subspace.rank_max"),
        ({"workers": {"cpus": 2}}, "pools.default.cpus, pools.large.cpus"),
        ({"database_url": "sqlite:////other.db", "gate": {"drop_max": 0.5}}, "database_url"),
    ],
)
def test_anything_else_is_refused_by_its_name_and_nothing_is_taken(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Conflict, match=f"cannot change {named}; nothing was taken"):
        taken(two(), two(**changes))


def test_a_pool_changes_its_size_and_a_further_one_is_taken_but_none_leaves() -> None:
    small = {"a": {"base_model": SMALL, "max": 1}, "b": {"base_model": LARGE, "max": 1}}
    more = {"a": {"base_model": SMALL, "min": 1, "max": 3}, "b": small["b"], "c": {"base_model": LARGE, "max": 1}}
    assert taken(two(pools=small), two(pools=more)) == ["pools.a", "pools.c"]
    with pytest.raises(Conflict, match=r"cannot change pools.c; nothing was taken"):
        taken(two(pools=more), two(pools=small))


def test_more_cpus_than_a_local_ray_was_started_with_are_refused() -> None:
    small = {"a": {"base_model": SMALL, "max": 1}, "b": {"base_model": LARGE, "max": 1}}
    more = {"a": {"base_model": SMALL, "max": 3}, "b": {"base_model": LARGE, "max": 1}}
    assert taken(two(pools=small), two(pools=more), 4) == ["pools.a"]
    with pytest.raises(Conflict, match="could take 4 CPUs, and the local Ray was started with 3"):
        taken(two(pools=small), two(pools=more), 3)
    assert taken(two(pools=small, ray=ELSEWHERE), two(pools=more, ray=ELSEWHERE), 3) == ["pools.a"]


def test_a_base_model_that_changes_or_leaves_is_refused_and_the_way_to_do_it_is_told() -> None:
    other = settings(base_model=None, base_models=[base(SMALL), base(LARGE) | {"source": "other"}])
    with pytest.raises(Conflict, match=r"cannot change base_models.large.source"):
        taken(two(), other)
    with pytest.raises(Conflict, match="no longer have the base model large") as refused:
        taken(two(), settings(base_model=base(SMALL)))
    assert "`onebasis up --config FILE --remove-base-model large`" in refused.value.todo
    swapped = settings(base_model=None, base_models=[base(LARGE), base(SMALL)])
    with pytest.raises(Conflict, match="have to come first, in their order: small, large"):
        taken(two(), swapped)


def test_a_running_service_takes_a_third_base_model_and_goes_on(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(workers=1, base_model=None, base_models=[base(SMALL), base(LARGE)], ray=ELSEWHERE)
    plant.cluster.hold = lambda order: True
    submit(plant, SMALL, "red/alpha")
    plant.run(lambda: len(plant.cluster.held) == 1)  # it trains meanwhile
    service = service_of(plant)
    after = plant.settings.model_dump(mode="json") | {"pools": {}}
    after["base_models"].append(base(THIRD))
    asked = Reload(settings=Settings.model_validate(after), by="ann")
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(service.answer(asked)))
    asking.start()
    plant.run(lambda: not asking.is_alive())
    assert answers == [
        {"taken": ["base_models.third", "pools.third"], "base_models": [SMALL, LARGE, THIRD], "serving": None}
    ]
    assert service.answer(ListVersions(base_model=THIRD)) == []
    assert [one["base_model"] for one in service.answer(Status())["base_models"]] == [SMALL, LARGE, THIRD]
    assert service_settings(Path(plant.settings.state_dir)).base_names == (SMALL, LARGE, THIRD)  # for the next `up`
    assert len(plant.cluster.held) == 1
    plant.storages |= {THIRD: plant.controller.subspaces[THIRD].storage}
    plant.cluster.release()
    submit(plant, THIRD, "red/third")
    plant.run()
    assert plant.states() == {"red/alpha": "published", "red/third": "published"}
    assert (plant.held(base_model=SMALL), plant.held(base_model=THIRD)) == (["red/alpha"], ["red/third"])
    with pytest.raises(InvalidInput, match="has several base models"):
        service.answer(ListVersions())


def test_settings_that_ray_could_not_take_are_taken_in_the_next_step(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(workers=1, base_model=None, base_models=[base(SMALL), base(LARGE)])
    after = Settings.model_validate(plant.settings.model_dump(mode="json") | {"teams": {"red": {"weight": 2}}})
    follow, failures = plant.cluster.follow, [Unavailable("the GCS does not answer")]

    def following(settings: Settings) -> None:
        if failures:
            raise failures.pop()
        follow(settings)

    plant.cluster.follow = following  # type: ignore[method-assign]
    asking = threading.Thread(target=lambda: plant.controller.grow(after, {}, 30))
    asking.start()
    with pytest.raises(Unavailable):
        plant.run(lambda: not asking.is_alive())
    plant.run(lambda: not asking.is_alive())
    assert plant.controller._settings == after


def test_who_leads_again_goes_on_with_the_settings_of_the_last_reload(tmp_path: Path) -> None:
    before, after = settings(tmp_path), settings(tmp_path, teams={"red": {"weight": 2}})
    process = ControlPlane(before, tmp_path)
    process.cluster = RayCluster.__new__(RayCluster)
    process.cluster.settings = before
    process.agree(after)
    assert process.cluster.settings is after
    assert process.settings is after


def test_a_team_with_tasks_that_have_not_ended_does_not_leave_a_running_service(make_plant: Any) -> None:
    plant = make_plant(teams={"red": {}, "blue": {}, "green": {}})
    plant.step(3)
    plant.cluster.hold = lambda order: True
    plant.submit("red/a", "red/b", "blue/c")
    service = service_of(plant)
    fewer = plant.settings.model_copy(update={"teams": {"green": plant.settings.teams["green"]}})
    told = r"tasks have not ended: red \(2 tasks\), blue \(1 task\)\n.*`onebasis cancel --team red`"
    with pytest.raises(Conflict, match=told):
        service.answer(Reload(settings=fewer))
    without = plant.settings.model_copy(
        update={"teams": {team: plant.settings.teams[team] for team in ("red", "blue")}}
    )
    refuse_lost_teams(plant.settings, without, plant.queue.alive_of_teams())  # green has none
    assert plant.queue.alive_of_teams() == {"red": 2, "blue": 1}
