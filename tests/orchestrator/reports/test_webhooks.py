"""Others are told over HTTP of what happens: each of it, none of it lost, whoever hangs, refuses or is killed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.errors import NotFound
from configs.settings import Settings
from orchestrator import signed_post
from orchestrator.alarms import AlarmCode
from orchestrator.api.access import Caller, Role
from orchestrator.api.requests import ListWebhooks, Reload, ShowSettings, TryWebhook
from orchestrator.commands.cli import app
from orchestrator.reports import webhooks as module
from orchestrator.reports.webhooks import Webhooks
from orchestrator.tasks.happenings import WAITS_SECONDS, Happening
from orchestrator.tasks.outbox import KEPT_SECONDS, Outbox
from tests.builders import settings
from tests.orchestrator.plant import Plant
from tests.orchestrator.receiver import SECRET, VARIABLE, Receiver
from tests.orchestrator.site import Site

ALL = ["ended", "rolled-back", "held"]


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)


@pytest.fixture
def receiver() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def make(*answers: Any) -> Receiver:
        made.append(Receiver(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Teller:
    """The webhooks of a plant, which look when they are told to."""

    def __init__(self, plant: Plant, settings: Settings | None = None) -> None:
        self.plant, self.settings = plant, settings or plant.settings
        self.outbox = Outbox(plant.queue.database)
        self.stop = threading.Event()
        stores = lambda: {name: one.store for name, one in plant.controller.subspaces.items()}  # noqa: E731
        self.webhooks = Webhooks(self.outbox, lambda: self.settings, stores, plant.controller.alarms)
        for subspace in plant.controller.subspaces.values():
            subspace.store.refresh()
        self.webhooks.look(self.stop)

    def look(self) -> None:
        """Look, and wait until all that was begun is sent or has failed."""
        for subspace in self.plant.controller.subspaces.values():
            subspace.store.refresh()
        self.webhooks.look(self.stop)
        self.wait()

    def wait(self) -> None:
        for thread in list(self.webhooks._sending.values()):
            thread.join(10)


def test_each_team_is_told_of_its_own_and_the_service_of_all(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver]
) -> None:
    of_all, of_red, of_ends = receiver(), receiver(), receiver()
    plant = make_plant(
        webhooks={"all": {**of_all.hook, "events": [*ALL, "alarm"]}},
        teams={
            "red": {"webhooks": {"mine": {**of_red.hook, "events": ALL}}},
            "blue": {"webhooks": {"ends": {**of_ends.hook, "events": ["parked", "rejected"]}}},
        },
    )
    teller = Teller(plant)
    plant.submit("red/alpha", "blue/beta")
    plant.run()
    teller.look()
    assert sorted(one["task"]["title"] for one in of_all.messages) == ["blue/beta", "red/alpha"]
    (told,) = of_red.messages
    record = plant.get("red/alpha")
    (headers, _) = of_red.came[0]
    assert headers["webhook-id"] == told["id"]
    assert told == {
        "id": f"evt_task_{record.task_id}_{record.revision}",
        "time": told["time"],
        "kind": "published",
        "team": "red",
        "task": {"id": record.task_id, "title": "red/alpha"},
        "base_model": "tiny",
        "version": record.version,
        "sentence": f"red/alpha is published in version {record.version}",
    }
    assert abs(datetime.fromisoformat(told["time"]).timestamp() - time.time()) < 60
    assert of_ends.came == []
    plant.open_store().rollback(0, op_key="r", actor="ann", reason="blue/beta smells", hold=True)
    plant.controller.wake(log_moved=True)
    plant.run(lambda: plant.states() == {"red/alpha": "parked", "blue/beta": "parked"})
    teller.look()
    assert sorted(one["kind"] for one in of_red.messages[1:]) == ["held", "parked", "rolled-back"]
    back = next(one for one in of_all.messages if one["kind"] == "rolled-back")
    assert (back["team"], back["task"], back["version"]) == (None, None, 0)
    assert back["sentence"] == f"ann moved main of tiny from version {record.version} to version 0: blue/beta smells"
    assert "beta" not in json.dumps(of_red.messages)
    assert [one["task"]["title"] for one in of_ends.messages] == ["blue/beta"]
    plant.controller.alarms.ring(AlarmCode.STORE_AWAY, "somewhere", "it is away")
    teller.look()
    assert of_all.messages[-1]["kind"] == "alarm"
    assert "store-away: it is away" in of_all.messages[-1]["sentence"]
    # Whoever begins anew, as after a restart, tells nothing twice.
    counts = [len(one.came) for one in (of_all, of_red, of_ends)]
    plant.kill()
    Teller(plant).look()
    assert [len(one.came) for one in (of_all, of_red, of_ends)] == counts
    assert {one.status for one in Outbox(plant.queue.database).newest(list(plant.settings.hooks), 100)} == {"taken"}


def test_what_happens_while_nobody_leads_is_told_by_the_next(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver]
) -> None:
    one = receiver()
    plant = make_plant(webhooks={"all": {**one.hook, "events": ALL}})
    Teller(plant)
    plant.submit("red/alpha")
    plant.run()
    plant.open_store().rollback(0, op_key="r", actor="ann")
    plant.kill()
    Teller(plant).look()
    assert sorted(message["kind"] for message in one.messages) == ["published", "rolled-back"]


def test_a_past_that_nobody_was_told_of_is_no_news(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver]
) -> None:
    one = receiver()
    plant = make_plant(webhooks={"all": {**one.hook, "events": ALL}})
    plant.submit("red/alpha")
    plant.run()
    plant.open_store().rollback(0, op_key="r", actor="ann")
    Teller(plant).look()
    assert [message["kind"] for message in one.messages] == ["published"]  # the queue's own, kept from the start on


KILLED = """
import os, sys, threading
from configs.settings import read_settings
from pathlib import Path
from orchestrator.alarms import Alarms
from orchestrator.reports.webhooks import Webhooks
from orchestrator.tasks.outbox import Outbox
from orchestrator.tasks.task_queue import TaskQueue
settings = read_settings(Path(sys.argv[1]))
Outbox.taken = lambda *_: os.kill(os.getpid(), 9)
webhooks = Webhooks(Outbox(TaskQueue(settings.database_url).database), lambda: settings, dict, Alarms())
webhooks.run(threading.Event())
"""


def test_a_sender_that_is_killed_between_sending_and_noting_it_sends_it_again_under_the_same_id(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver], tmp_path: Path
) -> None:
    one = receiver()
    plant = make_plant(webhooks={"all": {**one.hook, "events": ALL}})
    plant.submit("red/alpha")
    plant.run()
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(plant.settings.model_dump(mode="json", exclude={"workers"})))
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], timeout=60, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert len(one.came) == 1
    outbox = Outbox(plant.queue.database)
    (waits,) = outbox.newest(["all"], 10)
    assert (waits.status, waits.tries) == ("waiting", 1)
    assert waits.due_at == pytest.approx(waits.tried_at + WAITS_SECONDS[0])
    assert outbox.take("all", waits.due_at - 0.1) is None
    teller = Teller(plant)
    again = outbox.take("all", waits.due_at)
    assert again is not None
    assert teller.webhooks._send(again)
    first, second = one.messages
    assert first == second
    assert [headers["webhook-id"] for headers, _ in one.came] == [first["id"]] * 2
    assert outbox.newest(["all"], 10)[0].status == "taken"
    teller.look()
    assert len(one.came) == 2


def test_one_that_hangs_and_one_that_refuses_delay_no_other_and_are_tried_again(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, refuses, well = receiver(), receiver(lambda number: (500 if number < 2 else 200, b"")), receiver()
    hangs.hangs.set()
    hooks = {"hangs": hangs, "refuses": refuses, "well": well}
    plant = make_plant(webhooks={name: {**one.hook, "events": ALL} for name, one in hooks.items()})
    teller = Teller(plant)
    plant.submit("red/alpha")
    plant.run()
    teller.webhooks.look(teller.stop)
    hangs.wait_for(1)
    plant.submit("red/beta")
    plant.run()
    teller.webhooks._sending["well"].join(10)
    teller.webhooks.look(teller.stop)  # while the first one still hangs
    assert [one["task"]["title"] for one in well.wait_for(2)] == ["red/alpha", "red/beta"]
    assert len(hangs.came) == 1
    teller.webhooks._sending["refuses"].join(10)
    failed = next(one for one in reversed(teller.outbox.newest(["refuses"], 10)) if one.tries)
    assert (failed.status, failed.answer) == ("waiting", "status 500")
    assert failed.due_at == pytest.approx(failed.tried_at + 5)
    later = time.time() + 6
    monkeypatch.setattr(module.time, "time", lambda: later)
    teller.webhooks.look(teller.stop)
    teller.webhooks._sending["refuses"].join(10)
    assert [one.status for one in teller.outbox.newest(["refuses"], 10)] == ["taken", "taken"]
    assert sorted({one["task"]["title"] for one in refuses.messages}) == ["red/alpha", "red/beta"]
    hangs.close()


def test_attempts_go_on_for_hours_and_end(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant()
    outbox, now = Outbox(plant.queue.database), 1000.0
    outbox.test(Happening(key="test:1", kind="test", at=now, sentence="words"), "one")
    waits = []
    while (delivery := outbox.take("one", now)) is not None:
        outbox.failed(delivery, "status 500")
        (kept,) = outbox.newest(["one"], 1)
        if kept.due_at is None:
            break
        assert outbox.take("one", kept.due_at - 1) is None
        waits.append(kept.due_at - now)
        now = kept.due_at
    assert waits == list(WAITS_SECONDS)
    assert 12 * 3600 < sum(waits) < 24 * 3600
    assert (kept.status, kept.tries, outbox.waiting()) == ("given up", len(WAITS_SECONDS) + 1, {})
    outbox.forget(["one"], 1000.0 + KEPT_SECONDS + 1)
    assert outbox.newest(["one"], 1) == []


def answered(plant: Plant, one: Receiver, **changes: Any) -> str:
    """What came of a test with changed settings of the webhook."""
    hook = {**one.hook, "events": ALL} | changes
    teller = Teller(plant, settings(plant.settings.state_dir, webhooks={"one": hook}))
    happening = Happening(key=f"test:{time.time()}", kind="test", at=time.time(), sentence="words")
    teller.outbox.test(happening, "one")
    teller.look()
    return teller.outbox.of("one", happening.key).answer


def test_what_may_not_be_is_not_sent_and_says_why(
    make_plant: Callable[..., Plant], receiver: Callable[..., Receiver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, one = make_plant(), receiver(lambda number: (302, b""))
    assert answered(plant, one) == "status 302: redirects are not followed"
    assert len(one.came) == 1
    monkeypatch.setattr(signed_post, "HTTPSConnection", signed_post.HTTPConnection)  # a public name that leads inside
    inside = one.url.replace("http://127.0.0.1", "https://localhost")
    said = answered(plant, one, url=inside, private=False)
    assert said == "is an address of this machine or of a private network, and nothing was sent there"
    for secret, why in (("hunter2-magpie", "does not hold a secret"), ("whsec_YQ==", "does not hold a secret")):
        monkeypatch.setenv(VARIABLE, secret)
        said = answered(plant, one)
        assert why in said
        assert secret not in said
    monkeypatch.delenv(VARIABLE)
    assert "is not set where the control plane runs" in answered(plant, one)
    missing = {"secret_env": None, "secret_file": str(tmp_path / "secret")}
    assert "cannot be read: FileNotFoundError" in answered(plant, one, **missing)
    assert len(one.came) == 1
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    assert "is no address" in answered(plant, one, url="http://127.0.0.1:99999/x", **missing)
    assert answered(plant, one, **missing) == "status 302: redirects are not followed"
    assert len(one.messages) == 2


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        ({"url": "http://example.org/x"}, "has to begin with https, or private"),
        ({"url": "https://u:p@example.org/x"}, "url"),
        ({"url": "ftp://example.org/x"}, "url"),
        ({"secret_env": None}, "exactly one of secret_env and secret_file"),
        ({"secret_file": "/x"}, "exactly one of secret_env and secret_file"),
        ({"events": []}, "events"),
        ({"events": ["finished"]}, "events"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(hook: dict[str, Any], why: str) -> None:
    well = {"url": "https://example.org/x", "secret_env": VARIABLE, "events": ["ended"]}
    settings(webhooks={"one": well})
    with pytest.raises(ValueError, match=why):
        settings(webhooks={"one": well | hook})
    with pytest.raises(ValueError, match="alarms are the service's"):
        settings(teams={"red": {"webhooks": {"one": well | {"events": ["alarm"]}}}})


# --- what people ask -----------------------------------------------------------------------------------------------


@pytest.mark.changes
def test_webhooks_are_listed_tested_and_reloaded_and_nothing_secret_is_shown(
    site: Site, receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "onebasis")
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    one, refuses = receiver(), receiver(lambda number: (500, b"magpie"))
    fresh = settings(
        site.folder,
        storage=site.plant.settings.storage.model_dump(),
        workers={"count": 2},
        webhooks={"all": {**one.hook, "events": ALL}},
        teams={
            "red": {"webhooks": {"mine": {**refuses.hook, "events": ["ended"]}}},
            "blue": {"webhooks": {"theirs": {**one.hook, "events": ["ended"]}}},
        },
    )
    assert set(site.client.ask(Reload(settings=fresh))["taken"]) == {"teams", "webhooks"}
    sources, stop = site.service.sources, threading.Event()
    stores = lambda: {name: sub.store for name, sub in site.plant.controller.subspaces.items()}  # noqa: E731
    webhooks = Webhooks(sources.outbox, lambda: sources.settings, stores, sources.alarms)
    sources.send_soon = webhooks.wake
    thread = threading.Thread(target=webhooks.run, args=(stop,))
    thread.start()
    try:
        taken = CliRunner().invoke(app, ["webhooks", "test", "all"])
        assert taken.exit_code == 0, taken.output
        assert "took it: status 200" in taken.output
        assert [m["sentence"] for m in one.messages if m["kind"] == "test"] == ["ann tests the webhook all"]
        refused = CliRunner().invoke(app, ["webhooks", "test", "red/mine"])
        assert refused.exit_code == 5
        assert "did not take it: status 500; it is tried again" in refused.output
        with pytest.raises(NotFound, match="there is no webhook 'red/all'"):
            site.client.ask(TryWebhook(name="all", team="red"))
        site.publish("red/third")
        one.wait_for(2)
    finally:
        stop.set()
        webhooks.wake()
        thread.join(10)
    whole = CliRunner().invoke(app, ["webhooks", "list"]).output
    for words in (
        "all",
        "red/mine",
        "blue/theirs",
        one.url.removeprefix("http://"),
        "test taken: status 200",
        "status 500",
    ):
        assert words in whole
    mine = site.guard.answer(ListWebhooks(), Caller("rita", "k", {"red": Role.VIEWER}))
    assert [hook["webhook"] for hook in mine["webhooks"]] == ["red/mine"]
    assert {row["webhook"] for row in mine["deliveries"]} == {"red/mine"}
    shown = json.dumps([site.client.ask(ListWebhooks()), site.client.ask(ShowSettings()), mine])
    for text in (shown, whole, caplog.text):
        assert "path-that-is-secret" not in text
        assert "magpie" not in text
        assert SECRET not in text
