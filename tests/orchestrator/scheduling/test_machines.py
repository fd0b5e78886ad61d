"""Room on machines that pools share: who has to go, and who may come meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling.machines import Clearing, Shape, Worker, cleared, growth, ranks_on

SHAPES = {
    "small": Shape(needs={"CPU": 1.0}),
    "gang": Shape(ranks=4, needs={"CPU": 1.0, "GPU": 1.0}),
    "kept": Shape(needs={"CPU": 1.0, "GPU": 0.5}, min=1),
}


def on(name: str, *machines: str, **fields: object) -> Worker:
    return Worker(name=name, pool=name.split("-")[0], machines=machines, **fields)  # type: ignore[arg-type]


def names(clearing: Clearing | None) -> list[str]:
    assert clearing is not None
    return [worker.name for worker in clearing.workers]


def test_a_machine_has_room_for_as_many_ranks_as_its_scarcest_resource() -> None:
    assert ranks_on({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert ranks_on({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0
    assert ranks_on({"CPU": 0.8999999}, {"CPU": 0.3}) == 3  # Ray's numbers are sums of such


def test_what_is_done_first_goes_and_no_more_than_is_needed() -> None:
    machines = {"a": {"CPU": 1.0, "GPU": 4.0}}
    workers = [
        on("small-0", "a", ends_in=900.0),
        on("small-1", "a", ends_in=300.0),
        on("small-2", "a", is_idle=True),
        on("small-3", "a", ends_in=100.0),
    ]
    found = cleared("gang", SHAPES, machines, workers)  # four CPUs: one is free, three come back by 300 s
    assert names(found) == ["small-2", "small-3", "small-1"]
    assert found is not None
    assert (found.gap_seconds, found.is_idle) == (300.0, False)


def test_what_does_not_make_room_where_it_is_needed_stays() -> None:
    # On `a` the GPUs are: idle workers on `b` have to stay, though they are done first.
    machines = {"a": {"CPU": 2.0, "GPU": 4.0}, "b": {"CPU": 0.0}}
    workers = [on("small-0", "b", is_idle=True), on("small-1", "a", ends_in=50.0), on("small-2", "a", ends_in=60.0)]
    found = cleared("gang", SHAPES, machines, workers)
    assert names(found) == ["small-1", "small-2"]
    assert found is not None
    assert found.machines == {"a"}


def test_what_fits_needs_nobody_to_go_and_what_never_fits_sends_nobody_away() -> None:
    assert cleared("gang", SHAPES, {"a": {"CPU": 4.0, "GPU": 4.0}}, []) == Clearing((), frozenset({"a"}))
    assert cleared("gang", SHAPES, {"a": {"CPU": 0.0, "GPU": 3.0}}, [on("small-0", "a", is_idle=True)]) is None


def test_a_pool_keeps_its_least_and_a_gangs_own_pool_gives_nothing() -> None:
    machines = {"a": {"CPU": 3.0, "GPU": 3.5}}
    one, two = on("kept-0", "a", is_idle=True), on("kept-1", "a", ends_in=70.0)
    assert cleared("gang", SHAPES, machines, [one]) is None
    assert names(cleared("gang", SHAPES, machines, [one, two])) == ["kept-0"]
    assert cleared("gang", SHAPES, machines, [on("gang-0", "a", is_idle=True)]) is None


def test_an_end_that_is_not_known_is_the_last_and_leaves_no_gap() -> None:
    machines = {"a": {"CPU": 2.0, "GPU": 4.0}}
    found = cleared("gang", SHAPES, machines, [on("small-0", "a"), on("small-1", "a", ends_in=800.0)])
    assert names(found) == ["small-1", "small-0"]
    assert found is not None
    assert found.gap_seconds == 0.0


@pytest.mark.parametrize(("free", "may"), [(0.0, 3), (1.0, 0)])
def test_others_grow_only_where_they_cannot_get_into_the_room(free: float, may: int) -> None:
    machines = {"a": {"CPU": free, "GPU": 4.0}, "b": {"CPU": 3.0}}
    found = Clearing((), frozenset({"a"}))
    assert growth(found, "gang", SHAPES, machines)["small"] == may


rooms = st.fixed_dictionaries({"CPU": st.integers(0, 6).map(float), "GPU": st.integers(0, 4).map(float)})
workers = st.lists(
    st.builds(
        lambda number, machine, idle, left: on(f"small-{number}", machine, is_idle=idle, ends_in=left),
        st.integers(0, 99),
        st.sampled_from("ab"),
        st.booleans(),
        st.none() | st.floats(0, 900),
    ),
    max_size=8,
    unique_by=lambda worker: worker.name,
)


@given(st.fixed_dictionaries({"a": rooms, "b": rooms}), workers)
def test_it_fits_when_they_have_gone_and_not_if_any_of_them_stayed(
    machines: dict[str, dict[str, float]], there: list[Worker]
) -> None:
    def fits(gone: list[Worker]) -> bool:
        left = {name: room | {"CPU": room["CPU"] + sum(name in one.machines for one in gone)} for name, room in
                machines.items()}  # fmt: skip
        return sum(ranks_on(room, SHAPES["gang"].needs) for room in left.values()) >= 4

    found = cleared("gang", SHAPES, machines, there)
    assert (found is not None) == fits(there)
    if found is not None:
        gone = list(found.workers)
        assert fits(gone)
        assert not any(fits([one for one in gone if one is not other]) for other in gone)
