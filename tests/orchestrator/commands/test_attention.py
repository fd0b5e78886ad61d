"""A command that waits says within seconds that the service is down, or what is wrong with it."""

from typing import Any

import pytest

from configs.errors import Unavailable
from orchestrator.commands import attention
from orchestrator.commands.attention import Attention


class StandInClient:
    """Answers with the health that it was given."""

    def __init__(self) -> None:
        self.health: dict[str, Any] = {"running": True, "alarms": []}

    def ask(self, request: object) -> dict[str, Any]:
        return self.health


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [100.0]
    monkeypatch.setattr(attention.time, "monotonic", lambda: now[0])
    return now


def test_a_service_that_is_down_is_told_at_once_waited_for_and_given_up(clock: list[float]) -> None:
    client, said = StandInClient(), list[str]()
    service = Attention(client, said.append)  # type: ignore[arg-type]
    service.look()
    client.health = {"running": False, "alarms": []}
    clock[0] += attention.LOOK_SECONDS
    service.look()
    assert said == ["the service is down, and nothing goes on until `onebasis up`; waiting 60 s for it"]
    clock[0] += 30
    client.health = {"running": True, "alarms": []}
    service.look()
    assert said[1:] == ["the service is up again"]
    client.health = {"running": False, "alarms": []}
    for _ in range(20):
        clock[0] += attention.LOOK_SECONDS
        service.look()
    clock[0] += attention.LOOK_SECONDS
    with pytest.raises(Unavailable, match="has been down for 60 s; the tasks stay as they are"):
        service.look()
    assert len(said) == 3


def test_an_alarm_is_told_once_and_between_two_looks_nothing_is_asked(clock: list[float]) -> None:
    client, said = StandInClient(), list[str]()
    service = Attention(client, said.append)  # type: ignore[arg-type]
    client.health["alarms"] = [{"text": "store-full: no space"}]
    for _ in range(3):
        service.look()
        clock[0] += attention.LOOK_SECONDS
    client.health["alarms"].append({"text": "ray-down: gone"})
    clock[0] -= 1  # just after a look
    service._next_look = clock[0] + 1
    service.look()
    assert said == ["ALARM store-full: no space"]
    clock[0] += 2
    service.look()
    assert said == ["ALARM store-full: no space", "ALARM ray-down: gone"]


def test_a_hold_is_told_once_with_whose_it_is_and_so_is_its_end(clock: list[float]) -> None:
    client, said = StandInClient(), list[str]()
    service = Attention(client, said.append)  # type: ignore[arg-type]
    service.look()
    for held in ({"actor": "ann", "reason": "audit", "time": 1.0},) * 3 + (None,) * 2:
        client.health["held"] = held
        clock[0] += attention.LOOK_SECONDS
        service.look()
    assert said == [
        "main is held by ann: audit; new versions wait until `onebasis store release` lets it move",
        "main is no longer held",
    ]
    client.health["held"] = {"actor": "bob", "reason": "", "time": 2.0}
    clock[0] += attention.LOOK_SECONDS
    service.look()
    del client.health["held"]  # it was started anew, and has not read the log yet: nobody knows
    clock[0] += attention.LOOK_SECONDS
    service.look()
    assert said[2:] == [
        "main is held by bob: no reason given; new versions wait until `onebasis store release` lets it move"
    ]
