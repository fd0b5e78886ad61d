"""Pools in the loop: they grow while tasks wait, give back what is idle, do not block each other, are drained."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from orchestrator import worker_pool
from orchestrator.api.requests import Cancel, DrainWorker, ListTasks, ShowTask
from orchestrator.api.service import Service
from orchestrator.scheduling.fair_share import Waiting
from orchestrator.scheduling.pools import pool_of
from orchestrator.scheduling.reasons import WaitCode
from orchestrator.tasks.task_record import Drain, TaskState
from tests.builders import BASE, LAYOUT
from tests.orchestrator.plant import Plant
from workers.orders import Phase, Train
from workers.process_monitor import ProcessEnd

MakePlant = Callable[..., Plant]
TWO = {
    "single": {"min": 1, "max": 3, "idle_seconds": 0},
    "gang": {"max": 1, "ranks": 4, "idle_seconds": 0},
}


def at_work(plant: Plant) -> dict[str, str]:
    """Title of each task that trains to its worker."""
    return {record.title: record.worker for record in plant.queue.tasks((TaskState.TRAINING,))}


def service(plant: Plant) -> Service:
    return Service(plant.settings, plant.queue, plant.storages, plant.controller, plant.cluster)


def trains(order: Any) -> bool:
    return isinstance(order, Train)


@pytest.fixture
def plant(make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.0)
    made = make_plant(pools=TWO)
    made.cluster.hold = trains
    return made


def test_a_pool_grows_to_its_most_while_tasks_wait_and_keeps_its_least_afterwards(plant: Plant) -> None:
    plant.step(3)
    assert plant.cluster.workers == ("single-0",)
    tasks = [f"red/{name}" for name in "abcde"]
    plant.submit(*tasks, pool="single")
    plant.run(lambda: len(at_work(plant)) == 3)
    plant.step(5)
    assert sorted(at_work(plant).values()) == ["single-0", "single-1", "single-2"]  # three of five
    assert plant.controller.describe_pools()["single"].count("busy") == 3
    plant.cluster.release()
    plant.run()
    plant.run(lambda: len(plant.cluster.workers) == 1)  # idle for no time at all: only the least is left
    assert sorted(plant.cluster.ended) == sorted({"single-0", "single-1", "single-2"} - {*plant.cluster.workers})
    assert plant.states() == dict.fromkeys(tasks, "published")


def test_an_idle_worker_stays_for_as_long_as_the_settings_say(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant(pools={"one": {"max": 2, "idle_seconds": 300}})
    plant.submit("red/a", pool="one")
    plant.run()
    plant.step(5)
    (worker,) = plant.controller._pool.workers.values()
    now = time.time()
    monkeypatch.setattr(worker_pool.time, "time", lambda: now + 290)
    plant.controller.wake()
    plant.step(3)
    assert plant.cluster.workers == (worker.name,)
    monkeypatch.setattr(worker_pool.time, "time", lambda: now + 310)
    plant.step(3)  # nothing else wakes the loop
    assert plant.cluster.workers == ()


def test_two_pools_do_not_block_each_other_and_a_gang_is_charged_for_all_its_places(plant: Plant) -> None:
    singles = plant.submit(*(f"red/{n}" for n in range(20)), pool="single")
    plant.submit("red/large", pool="gang")
    plant.run(lambda: len(at_work(plant)) == 4)
    assert at_work(plant)["red/large"] == "gang-0"
    assert (plant.get("red/large").places, plant.get("red/0").places) == (4, 1)
    last = plant.get(singles[-1].title)
    wait = plant.controller.wait_in_line(last)
    assert (wait.code, wait.pool) == (WaitCode.NO_FREE_PLACE, "single")
    asked = service(plant).tasks
    assert "all places of pool single are in use" in asked.one(ShowTask(reference=last.title))["why"]
    rows = asked.page(ListTasks(limit=30))
    assert [row["place"] for row in rows if row["state"] == "queued"] == list(range(1, 18))
    assert [row["pool"] for row in rows[-2:]] == ["single", "gang"]
    token = plant.get("red/large").token
    plant.cluster.release()
    plant.run(lambda: plant.get("red/large").state is TaskState.PUBLISHED)
    (spent, *_) = [one for one in plant.queue.spent(plant.get("red/large").task_id) if one.token == token]
    assert (spent.seconds, spent.places) == (2.5, 4)


class OneMachine:
    """A machine with so many CPUs, on which Ray places workers as long as there is room."""

    def __init__(self, plant: Plant, cpus: float) -> None:
        self._plant, self._cpus = plant, cpus
        self.there: list[str] = []
        plant.cluster.machine_of = self.machine_of
        plant.cluster.free = self  # type: ignore[assignment]

    def items(self) -> list[tuple[str, dict[str, float]]]:
        return [("10.0.0.1", {"CPU": self._left()})]

    def machine_of(self, worker: str) -> str:
        if worker not in self.there and self._left() >= self._takes(worker):
            self.there.append(worker)
        return "10.0.0.1" if worker in self.there else ""

    def _takes(self, worker: str) -> float:
        pool = self._plant.settings.pools[pool_of(worker)]
        return pool.ranks * pool.cpus

    def _left(self) -> float:
        self.there = [worker for worker in self.there if worker in self._plant.cluster.workers]
        return self._cpus - sum(map(self._takes, self.there))


def test_pools_on_one_machine_make_room_for_each_other_and_no_stream_of_small_tasks_starves_a_gang(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker_pool, "PLACE_SECONDS", 0.0)
    plant = make_plant(pools={"small": {"max": 3}, "gang": {"max": 1, "ranks": 2}})
    machine = OneMachine(plant, cpus=2.0)
    plant.cluster.hold = trains
    plant.submit(*(f"red/{n}" for n in range(6)), pool="small")
    plant.run(lambda: len(at_work(plant)) == 2)
    (large,) = plant.submit("blue/large", pool="gang")
    plant.run(lambda: plant.controller.decision.reserved == {"gang": large.task_id})
    # What a task had before a restart is never taken back; what else waits for room may be.
    waiting = [one.name for one in plant.controller._pool.on_machines((), ()) if not one.machines]
    assert "gang-0" in waiting
    assert "gang-0" not in [one.name for one in plant.controller._pool.on_machines((), {"gang-0"})]
    asked = service(plant).tasks
    held_back = asked.one(ShowTask(reference="red/5"))
    assert held_back["wait"]["code"] == "reserved-for"
    assert "free places are kept for blue/large" in held_back["why"]
    assert asked.one(ShowTask(reference="blue/large"))["wait"]["code"] == "gang-incomplete"

    # Both small ones end, and a gang takes their room before red's other tasks get it.
    plant.cluster.release()
    plant.cluster.hold = trains
    plant.run(lambda: at_work(plant) == {"blue/large": "gang-0"})
    assert machine.there == ["gang-0"]
    plant.cluster.release()
    plant.run()  # the gang, idle for less than its idle_seconds, makes room in its turn
    assert set(plant.states().values()) == {"published"}
    assert "gang-0" in plant.cluster.ended


def test_where_an_autoscaler_adds_machines_nothing_is_reserved(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker_pool, "PLACE_SECONDS", 0.0)
    plant = make_plant(pools={"small": {"max": 2}, "gang": {"max": 1, "ranks": 2}}, ray={"adds_machines": True})
    OneMachine(plant, cpus=2.0)
    plant.cluster.hold = trains
    plant.submit(*(f"red/{n}" for n in range(4)), pool="small")
    plant.run(lambda: len(at_work(plant)) == 2)
    plant.submit("blue/large", pool="gang")
    plant.run(lambda: "gang-0" in plant.cluster.workers)
    plant.cluster.release()
    plant.cluster.hold = trains
    plant.run(lambda: len(at_work(plant)) == 2)
    assert set(at_work(plant).values()) == {"small-0", "small-1"}
    assert plant.controller.decision.reserved == {}


def test_a_service_whose_pools_are_all_empty_loads_the_base_model_once_and_gives_the_worker_back(
    make_plant: MakePlant,
) -> None:
    plant = make_plant(
        pools={"large": {"max": 1, "cpus": 2, "idle_seconds": 0}, "small": {"max": 1, "idle_seconds": 0}}
    )
    plant.run(lambda: plant.controller.layout_of(BASE) is not None and not plant.cluster.workers)
    assert plant.cluster.ended == ["small-0"]


def test_a_task_whose_pool_was_taken_out_of_the_settings_says_so_and_others_get_another_pool(plant: Plant) -> None:
    plant.submit("red/named", pool="old", spec={"pool": "old"})
    plant.submit("red/any", pool="old")
    plant.submit("red/large", pool="", spec={"resources": {"ranks": 2}})  # as a release without pools took it in
    plant.run(lambda: len(at_work(plant)) == 2)
    assert at_work(plant) == {"red/any": "single-0", "red/large": "gang-0"}
    assert plant.controller.wait_in_line(plant.get("red/named")).code is WaitCode.NEVER_FITS
    asked = service(plant).tasks
    assert asked.one(ShowTask(reference="red/named"))["why"] == (
        "its pool 'old' is no longer in the settings; there are: 'single', 1 rank with 0 GPUs each; 'gang', 4 ranks "
        "with 0 GPUs each"
    )
    assert service(plant).status.status()["waiting"] == {"red": {"never-fits": 1}}


def test_a_grown_worker_is_found_again_after_a_restart_and_its_task_goes_on(plant: Plant) -> None:
    plant.submit("red/a", "red/b", pool="single")
    plant.run(lambda: len(at_work(plant)) == 2)
    tokens = {order.token for order in plant.cluster.held}
    plant.kill()
    plant.step(5)
    assert {order.token for order in plant.cluster.held} == tokens
    plant.cluster.release()
    plant.run()
    assert [plant.get(title).attempt for title in ("red/a", "red/b")] == [1, 1]


def test_a_grown_worker_that_is_gone_after_a_restart_is_started_again_for_its_task(plant: Plant) -> None:
    plant.submit("red/a", "red/b", pool="single")
    plant.run(lambda: len(at_work(plant)) == 2)
    plant.cluster.machine_dies()
    plant.cluster._dying = set()
    plant.cluster._memory = {}  # Ray was started anew
    plant.kill()
    plant.cluster.release()
    plant.run()
    assert [(task.attempt, task.lost_machines) for task in map(plant.get, ("red/a", "red/b"))] == [(1, 0), (1, 0)]


def test_a_worker_that_waits_for_a_machine_rings_no_alarm_and_tells_what_it_waits_for(plant: Plant) -> None:
    plant.cluster.machine_of = lambda worker: "10.0.0.1" if worker == "single-0" else ""
    plant.submit("red/a", "red/b", pool="single")
    plant.submit("red/large", pool="gang")
    plant.run(lambda: "gang-0" in plant.cluster.workers and "single-1" in plant.cluster.workers)
    plant.step(5)
    assert at_work(plant) == {"red/a": "single-0"}
    assert plant.controller.describe_workers()["single-1"].startswith("waiting for a place for")
    wait = plant.controller.wait_in_line(plant.get("red/large"))
    assert (wait.code, wait.pool) == (WaitCode.GANG_INCOMPLETE, "gang")
    assert not list(plant.controller.alarms)
    plant.cluster.machine_of = lambda worker: "10.0.0.2"  # an autoscaler brought a machine
    plant.run(lambda: len(at_work(plant)) == 3)


# --- drain -------------------------------------------------------------------------------------------------------


def drain(plant: Plant, what: str, **changes: Any) -> dict[str, Any]:
    return service(plant).tasks.drain(DrainWorker(what=what, by="ann", **{"reason": "new kernel"} | changes))


def test_what_trains_on_a_drained_worker_goes_on_elsewhere_from_its_checkpoint(plant: Plant) -> None:
    plant.submit("red/a", pool="single")
    plant.run(lambda: at_work(plant) == {"red/a": "single-0"})
    assert drain(plant, "single-0")["is_new"]
    plant.run(lambda: at_work(plant) == {"red/a": "single-1"})
    plant.run(lambda: "single-0" not in plant.cluster.workers)
    task = plant.get("red/a")
    assert (task.attempt, task.preemptions, task.lost_machines, task.own_bugs) == (2, 1, 0, 0)
    told = [event.text for event in plant.queue.events(task.task_id) if event.kind == "TrainingFailed"]
    assert told == [
        "now queued · fault preempted · single-0 is drained by ann: new kernel; it goes on from its last checkpoint"
    ]
    (order,) = [order for order in plant.cluster.held if isinstance(order, Train)]
    assert order.attempt == 2  # its worker looks for the checkpoint of the attempt before
    plant.submit(*(f"red/{n}" for n in range(5)), pool="single")
    plant.step(10)
    assert sorted(at_work(plant).values()) == ["single-1", "single-2"]  # of three one is out
    plant.kill()  # it is a fact in the database
    plant.step(10)
    assert "single-0" not in plant.cluster.workers
    assert service(plant).status.health()["drains"][0]["what"] == "single-0"
    assert not drain(plant, "single-0", undo=True)["drain"]
    plant.run(lambda: len(at_work(plant)) == 3)


def test_with_let_end_a_drained_worker_ends_its_task_first_and_gets_nothing_new(plant: Plant) -> None:
    plant.submit("red/a", pool="single")
    plant.run(lambda: at_work(plant) == {"red/a": "single-0"})
    drain(plant, "single-0", let_end=True)
    plant.step(5)
    assert at_work(plant) == {"red/a": "single-0"}
    assert plant.controller.describe_workers()["single-0"].endswith("; single-0 is drained by ann: new kernel")
    plant.cluster.release()
    plant.run()
    plant.run(lambda: "single-0" not in plant.cluster.workers)
    assert (plant.get("red/a").attempt, plant.get("red/a").preemptions) == (1, 0)


def test_a_worker_that_is_lost_while_it_is_drained_counts_as_no_lost_machine(plant: Plant) -> None:
    plant.submit("red/a", pool="single")
    plant.run(lambda: at_work(plant) == {"red/a": "single-0"})
    drain(plant, "single-0", let_end=True)
    plant.step(2)
    plant.cluster.machine_dies()  # somebody was quicker than the training
    plant.run(lambda: plant.get("red/a").preemptions == 1)
    assert plant.get("red/a").lost_machines == 0


def test_a_drained_machine_empties_and_its_workers_are_made_up_for_on_others(plant: Plant) -> None:
    placed: dict[str, str] = {}
    plant.cluster.machine_of = lambda worker: placed.setdefault(
        worker, "10.0.0.9" if "10.0.0.1" in plant.cluster.avoided else "10.0.0.1"
    )
    plant.submit("red/a", "red/b", pool="single")
    plant.submit("red/large", pool="gang")
    plant.run(lambda: len(at_work(plant)) == 3)
    answer = drain(plant, "10.0.0.1", is_node=True)
    assert sorted(answer["workers"]) == ["gang-0", "single-0", "single-1"]
    plant.run(lambda: len(at_work(plant)) == 3 and not {*at_work(plant).values()} & {*answer["workers"]})
    assert sorted(at_work(plant).values()) == ["gang-1", "single-2", "single-3"]
    assert {placed[worker] for worker in plant.cluster.workers} == {"10.0.0.9"}
    assert plant.get("red/large").lost_machines == 0


def test_what_is_not_there_cannot_be_drained(plant: Plant) -> None:
    plant.step(3)
    for what, is_node, known in (("single-7", False, "single-0"), ("10.9.9.9", True, "10.0.0.1")):
        with pytest.raises(Exception, match=f"there is no .*\n.*there are: {known}"):
            drain(plant, what, is_node=is_node)


def test_drains_are_kept_and_taken_back(plant: Plant) -> None:
    asked = Drain(what="single-0", by="ann", reason="r", at=5.0)
    assert plant.queue.set_drain("single-0", False, asked) is None
    assert plant.queue.set_drain("single-0", False, asked.model_copy(update={"lets_end": True})) == asked
    assert [one.lets_end for one in plant.queue.drains()] == [True]
    assert plant.queue.set_drain("single-0", True, None) is None  # a machine of that address is another thing
    assert plant.queue.set_drain("single-0", False, None) is not None
    assert plant.queue.drains() == []


def why(plant: Plant, title: str) -> tuple[str, str]:
    """Code of the reason why a task waits, and the sentence."""
    shown = service(plant).tasks.one(ShowTask(reference=title))
    return shown["wait"]["code"], shown["why"]


@pytest.mark.parametrize("pool", ["single", "gang"])
@pytest.mark.parametrize("restarted", [False, True], ids=["", "the control plane restarts meanwhile"])
def test_a_pool_lives_again_when_the_drain_of_its_only_machine_is_taken_back(
    plant: Plant, pool: str, restarted: bool
) -> None:
    plant.step(3)
    drain(plant, "10.0.0.1", is_node=True)
    plant.run(lambda: "single-0" in plant.cluster.ended)
    plant.submit("red/a", pool=pool)
    plant.run(lambda: any(worker.startswith(pool) for worker in plant.cluster.workers))
    plant.step(5)
    assert at_work(plant) == {}
    code, sentence = why(plant, "red/a")
    assert code == WaitCode.DRAINED
    of = f"no worker of pool {pool} is left: the machine 10.0.0.1 is drained by ann since 2"
    assert sentence.startswith(of)
    assert "new kernel (`onebasis drain --undo --node 10.0.0.1` takes it back)" in sentence
    if restarted:
        plant.kill()
        plant.step(5)
    drain(plant, "10.0.0.1", is_node=True, undo=True)
    plant.run(lambda: at_work(plant).get("red/a", "").startswith(pool))
    assert plant.get("red/a").attempt == 1


def test_what_waits_for_a_place_is_asked_for_anew_whenever_other_machines_are_drained(plant: Plant) -> None:
    plant.cluster.machine_of = lambda worker: "10.0.0.1" if worker == "single-0" else ""
    plant.submit("red/a", "red/b", pool="single")
    plant.run(lambda: "single-1" in plant.cluster.workers and at_work(plant) == {"red/a": "single-0"})
    plant.step(3)
    assert plant.cluster.keeps_away["single-1"] == frozenset()
    plant.queue.set_drain("10.0.0.2", True, Drain(what="10.0.0.2", is_node=True, by="ann", at=5.0))
    plant.controller.wake()
    plant.run(lambda: plant.cluster.keeps_away.get("single-1") == {"10.0.0.2"})
    asked = list(plant.cluster.ended)
    plant.controller.wake()
    plant.step(3)
    assert plant.cluster.ended == asked  # once
    assert at_work(plant) == {"red/a": "single-0"}


def test_a_gang_that_lost_its_places_while_a_machine_was_drained_is_asked_for_anew_and_its_task_goes_on(
    plant: Plant,
) -> None:
    plant.cluster.machine_of = lambda worker: "10.0.0.2"
    plant.queue.set_drain("10.0.0.1", True, Drain(what="10.0.0.1", is_node=True, by="ann", at=5.0))
    plant.submit("red/large", pool="gang")
    plant.run(lambda: at_work(plant) == {"red/large": "gang-0"})
    plant.cluster.placeless_orders, before = {"gang-0"}, plant.get("red/large")
    plant.controller._pool._pools["gang"] = plant.settings.pools["gang"].model_copy(update={"heartbeat_seconds": 1e-9})
    plant.run(lambda: plant.controller._pool.workers["gang-0"].waits)
    plant.cluster.placeless_orders = set()
    drain(plant, "10.0.0.1", is_node=True, undo=True)
    plant.run(lambda: plant.get("red/large").attempt == 2 and bool(at_work(plant)))
    task = plant.get("red/large")
    assert (task.lost_machines, task.worker_deaths, task.own_bugs) == (0, 0, 0)
    (use,) = plant.queue.spent(before.task_id)
    assert (use.token, use.seconds) == (before.token, 0.0)
    assert plant.cluster.keeps_away["gang-0"] == frozenset()


@pytest.mark.parametrize("restarted", [True, False], ids=["found after a restart", "drains change meanwhile"])
def test_a_gang_whose_places_go_with_its_process_is_asked_first_how_it_died(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """A supervisor that is made anew gives back the places of the one before it, while the end of that is asked for."""
    plant.submit("red/large", pool="gang")
    plant.run(lambda: at_work(plant) == {"red/large": "gang-0"})
    if restarted:
        plant.kill()
        plant.run(lambda: bool(plant.controller._pool.workers["gang-0"].order))
    told: Future[Any] = Future()
    monkeypatch.setattr(plant.cluster, "end_of", lambda worker: told)
    plant.cluster.machine_of = lambda worker: "" if worker == "gang-0" else "10.0.0.1"
    plant.cluster.machine_dies()
    if not restarted:
        plant.queue.set_drain("10.0.0.2", True, Drain(what="10.0.0.2", is_node=True, by="ann", at=5.0))
    plant.controller.wake()
    plant.run(lambda: plant.controller._pool.workers["gang-0"].machines == ())
    plant.step(5)
    assert at_work(plant) == {"red/large": "gang-0"}
    told.set_result(ProcessEnd(pid=8, signal=9))
    plant.run(lambda: at_work(plant) == {})
    task = plant.get("red/large")
    assert (task.worker_deaths, task.preemptions, task.lost_machines) == (1, 0, 0)


def test_a_pool_all_of_whose_workers_are_drained_by_name_says_so_also_before_a_task_is_submitted(plant: Plant) -> None:
    plant.run(lambda: plant.controller.layout_of(BASE) is not None)
    for number in range(3):
        plant.queue.set_drain(f"single-{number}", False, Drain(what=f"single-{number}", by="ann", reason="r", at=5.0))
    plant.submit("red/a", "red/b", pool="single")
    plant.run(lambda: "single-0" not in plant.cluster.workers)
    plant.step(3)
    code, sentence = why(plant, "red/a")
    assert code == WaitCode.DRAINED
    assert "single-2 is drained by ann since" in sentence
    assert "`onebasis drain --undo single-2` takes it back" in sentence
    assert plant.controller.wait_in_line(plant.get("red/a")).since == 5.0
    assert service(plant).status.status()["waiting"] == {"red": {"drained": 2}}
    another = Waiting(task_id="x", team="red", priority=0, submitted_at=1.0, pool="single")
    told = plant.controller.wait_of_another(another)
    assert told is not None
    assert told.code is WaitCode.DRAINED
    assert plant.controller.seconds_until_free("single") == []
    plant.queue.set_drain("single-1", False, None)
    plant.controller.wake()
    plant.run(lambda: at_work(plant) == {"red/a": "single-1"})


def test_a_machine_that_is_too_small_for_a_worker_is_not_why_its_pool_waits(plant: Plant) -> None:
    plant.cluster.machine_of = lambda worker: "10.0.0.1" if worker.startswith("single") else ""
    plant.cluster.sizes = lambda pool, machine: pool == "single"
    plant.submit("red/large", pool="gang")
    plant.step(3)
    plant.queue.set_drain("10.0.0.3", True, Drain(what="10.0.0.3", is_node=True, by="ann", at=5.0))
    plant.controller.wake()
    plant.run(lambda: "gang-0" in plant.cluster.workers)
    plant.step(5)
    assert why(plant, "red/large")[0] == WaitCode.GANG_INCOMPLETE


def test_a_single_worker_without_a_machine_is_not_told_to_be_loading(make_plant: MakePlant) -> None:
    plant = make_plant(pools={"one": {"max": 1}})
    plant.cluster.machine_of = lambda worker: ""
    plant.submit("red/a", pool="one")
    plant.run(lambda: "one-0" in plant.cluster.workers)
    plant.step(5)
    code, sentence = why(plant, "red/a")
    assert code == WaitCode.NO_MACHINE
    assert sentence.startswith("no machine has room for a worker of pool one: waiting for a place for")
    assert service(plant).tasks.one(ShowTask(reference="red/a"))["wait"]["who"] == "platform"


def test_a_worker_that_loads_is_not_ended_as_idle_however_long_it_takes(
    make_plant: MakePlant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant(pools={"one": {"max": 1, "idle_seconds": 10}})
    warm, loading = plant.cluster.warm, Future[Any]()
    monkeypatch.setattr(plant.cluster, "warm", lambda worker: loading)
    plant.submit("red/a", pool="one")
    plant.run(lambda: "one-0" in plant.cluster.workers)
    plant.step(3)
    service(plant).tasks.cancel(Cancel(reference="red/a"))  # nobody waits for it any more
    plant.controller._pool.layouts[BASE] = LAYOUT
    now = time.time()
    monkeypatch.setattr(worker_pool.time, "time", lambda: now + 100)
    plant.controller.wake()
    plant.step(3)
    assert plant.cluster.workers == ("one-0",)
    loading.set_result(warm("one-0").result())
    plant.step(3)
    assert plant.cluster.workers == ("one-0",)  # idle since now
    monkeypatch.setattr(worker_pool.time, "time", lambda: now + 111)
    plant.step(3)
    assert plant.cluster.workers == ()


def test_a_worker_that_scores_what_it_has_trained_says_so(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.controller._pool._pools["single"] = plant.settings.pools["single"].model_copy(
        update={"heartbeat_seconds": 1e-9}
    )
    plant.submit("red/a", pool="single")
    plant.run(lambda: at_work(plant) == {"red/a": "single-0"})
    task_id, progress = plant.get("red/a").task_id, plant.cluster.progress

    def scoring(worker: str) -> Any:
        found: Future[Any] = Future()
        found.set_result(replace(progress(worker).result(), phase=Phase.SCORING))
        return found

    plant.run(lambda: plant.controller.describe_workers()["single-0"] == f"training {task_id}")
    monkeypatch.setattr(plant.cluster, "progress", scoring)
    plant.run(lambda: plant.controller.describe_workers()["single-0"] == f"scoring the own adapter of {task_id}")
