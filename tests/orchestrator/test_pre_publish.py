"""What the settings name is asked before a version is published, once, and may refuse it; nothing waits for it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.settings import PrePublishSettings
from orchestrator import pre_publish
from orchestrator.tasks.task_record import TaskState
from orchestrator.tasks.verdict_book import VerdictBook
from tests.orchestrator.plant import Plant
from tests.orchestrator.receiver import SECRET, VARIABLE, Receiver

Plants = Callable[..., Plant]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings by which a shell script is asked; it has what it was handed in its variable `given`, and keeps it."""

    def script(text: str, **more: Any) -> dict[str, Any]:
        file = tmp_path / "ask.sh"
        file.write_text(f'given=$(cat); echo "$given" >> {tmp_path}/given\n{text}\n')
        return {"gate": {"pre_publish": {"command": ["/bin/sh", str(file)], **more}}}

    return script


def given(tmp_path: Path) -> list[dict[str, Any]]:
    """What was handed over, each time."""
    file = tmp_path / "given"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_version_is_published_when_it_is_let_pass_and_what_is_asked_knows_its_tasks_and_scores(
    make_plant: Plants, asked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plant = make_plant(**asked("exit 0"))
    plant.submit("red/alpha")
    plant.run()
    plant.submit("blue/beta")
    plant.run()
    assert plant.held() == ["blue/beta", "red/alpha"]
    first, second = given(tmp_path)
    assert (first["id"], first["base_model"], first["version"], first["main"]) == ("pre-publish_tiny_1", "tiny", 1, 0)
    assert (first["canary"], second["canary"]) == (None, None)
    assert second["verdict"] == {"passed": True, "reason": "every task kept its score"}
    alpha, beta = second["tasks"]
    ids = {title: plant.get(title).task_id for title in ("red/alpha", "blue/beta")}
    assert alpha == {
        "id": ids["red/alpha"], "title": "red/alpha", "birth": 1, "is_new": False, "score": 0.9, "rows": alpha["rows"],
        "measured_at": alpha["measured_at"], "score_at_birth": 0.9, "own_adapter": 0.9, "base": 0.5,
    }  # fmt: skip
    assert (beta["id"], beta["is_new"], beta["score"]) == (ids["blue/beta"], True, 0.9)


def test_a_refusal_rejects_the_task_with_its_reason_and_main_stays(
    make_plant: Plants, asked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plant = make_plant(**asked("""case "$given" in *blue/beta*) echo 'beta is not wanted' >&2; exit 3;; esac"""))
    plant.submit("red/alpha")
    plant.run()
    plant.submit("blue/beta", "red/gamma")  # one version: then one by one, which shows the task at fault
    plant.run()
    assert plant.states() == {"red/alpha": "published", "blue/beta": "rejected", "red/gamma": "published"}
    record = plant.get("blue/beta")
    assert record.reason == "pre_publish refused it: beta is not wanted"
    assert record.reason_codes == ("pre-publish",)
    assert plant.held() == ["red/alpha", "red/gamma"]
    versions = [one["version"] for one in given(tmp_path)]
    assert len(versions) == len(set(versions))


@pytest.mark.parametrize(
    ("text", "why", "code"),
    [
        ("""echo a log line; echo '{"publish": false, "reason": "too  slow"}'""", "refused it: too slow", ""),
        ("exit 3", "refused it: no reason given", ""),
        ("echo oops >&2; exit 1", "gave no answer (exit code 1: oops), and gate.pre_publish.on_failure", "-failed"),
        ("kill -9 $$", "gave no answer (ended by signal 9)", "-failed"),
        ("""echo '{"publish": true}'; exit 3""", "gave no answer (exit code 3, and JSON that says publish)", "-failed"),
        ("sleep 60 & sleep 60", "gave no answer (not within 0.3 s)", "-failed"),
    ],
)  # fmt: skip
def test_what_it_says_or_does_not_say_is_the_reason(
    make_plant: Plants, asked: Callable[..., dict[str, Any]], text: str, why: str, code: str
) -> None:
    plant = make_plant(**asked(text, timeout_seconds=0.3 if "sleep" in text else 30))
    plant.submit("red/alpha")
    plant.run(limit_seconds=40)
    record = plant.get("red/alpha")
    assert record.state is TaskState.REJECTED
    assert f"pre_publish {why}" in record.reason
    assert record.reason_codes == (f"pre-publish{code}",)
    assert plant.held() == []


def test_where_the_settings_say_so_a_version_is_published_without_an_answer_and_its_task_says_that(
    make_plant: Plants,
) -> None:
    plant = make_plant(gate={"pre_publish": {"command": ["/no/such/program"], "on_failure": "publish"}})
    plant.submit("red/alpha")
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    record = plant.get("red/alpha")
    assert "pre_publish gave no answer" in record.reason
    assert "/no/such/program" in record.reason


def asking() -> bool:
    return any(thread.name == "pre_publish" for thread in threading.enumerate())


def test_tasks_are_trained_while_it_is_asked(make_plant: Plants, tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    plant = make_plant(gate={"pre_publish": {"command": [sys.executable, "-S", "-c", wait]}})
    plant.submit("red/alpha")
    plant.run(asking)
    plant.submit("red/beta")
    plant.run(lambda: plant.states()["red/beta"] == "merging")  # trained, and it waits for the version before it
    assert plant.states()["red/alpha"] == "evaluating"
    go.touch()
    plant.run(limit_seconds=20)
    assert plant.held() == ["red/alpha", "red/beta"]


def test_a_control_plane_that_is_killed_after_the_answer_does_not_ask_again(
    make_plant: Plants, asked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    plant = make_plant(**asked("exit 0"))
    plant.submit("red/alpha")
    write, killed = plant.cluster.write, []

    def killing(base_model: str, request: Any) -> Any:
        if request.operation == "publish" and not killed:
            killed.append(request)
            raise KeyboardInterrupt  # between the answer and its publishing
        return write(base_model, request)

    plant.cluster.write = killing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        plant.run()
    assert len(given(tmp_path)) == 1
    kept = VerdictBook(plant.queue.database).get("tiny", 1)
    assert kept is not None
    assert kept.is_passed
    plant.kill()
    plant.run()
    assert plant.states() == {"red/alpha": "published"}
    assert len(given(tmp_path)) == 1


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Receiver]]:
    monkeypatch.setenv(VARIABLE, SECRET)
    made: list[Receiver] = []

    def make(status: int, body: bytes) -> Receiver:
        made.append(Receiver(lambda number: (status, body)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("status", "body", "passed", "why"),
    [
        (200, b'{"publish": true}', True, ""),
        (200, b'{"publish": false, "reason": "no budget"}', False, "refused it: no budget"),
        (200, b"fine", False, "status 200, and no JSON that says publish"),
        (200, b'{"publish": "false"}', False, "status 200, and no JSON that says publish"),
        (500, b'{"publish": true}', False, "gave no answer (status 500)"),
        (302, b"", False, "status 302"),
    ],
)
def test_an_address_is_asked_the_same_and_signed(
    receivers: Callable[..., Receiver], status: int, body: bytes, passed: bool, why: str
) -> None:
    one = receivers(status, body)
    settings = PrePublishSettings.model_validate({"http": one.hook, "timeout_seconds": 20})
    found = pre_publish.answer(settings, "pre-publish_tiny_1", {"id": "pre-publish_tiny_1", "version": 1})
    assert found.is_passed is passed
    assert why in found.reason
    assert one.messages == [{"id": "pre-publish_tiny_1", "version": 1}]
    assert one.came[0][0]["webhook-id"] == "pre-publish_tiny_1"


def test_an_address_that_hangs_refuses_when_its_time_is_over(
    make_plant: Plants, receivers: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = receivers(200, b"")
    one.hangs.set()
    plant = make_plant(gate={"pre_publish": {"http": one.hook, "timeout_seconds": 0.3}})
    plant.submit("red/alpha")
    plant.run()
    assert "gave no answer (no answer for 0 s)" in plant.get("red/alpha").reason
    # And one that never comes to the end of its answer.
    settings = plant.settings.gate.pre_publish
    assert settings is not None
    monkeypatch.setattr(pre_publish, "answer", lambda *_: time.sleep(1.0))
    slow = pre_publish._Asking(2, settings, "id", {}, lambda: None)
    assert slow.found(time.monotonic()) is None
    found = slow.found(time.monotonic() + 10)
    assert found is not None
    assert "no whole answer for 0.3 s" in found.reason


def test_settings_name_one_of_both() -> None:
    for wrong in ({}, {"command": ["x"], "http": {"url": "https://example.org", "secret_env": "X"}}, {"command": []}):
        with pytest.raises(ValueError, match=r"exactly one of command and http|at least 1 item"):
            PrePublishSettings.model_validate(wrong)
