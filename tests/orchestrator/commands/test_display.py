"""What a terminal of any width shows of tasks: values of the service in, lines out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from configs.errors import InvalidInput
from configs.plain_text import odd_character
from orchestrator.commands import display, version_tables
from subspace_store.commands.terminal import counted, decimals, error, note

TASK: dict[str, Any] = {
    "task_id": "t0691b2c3ddeadbeef1234", "title": "red/card-orders", "exact_title": "red/card-orders",
    "base_model": "minilm", "state": "training",
    "reason": "", "place": None, "worker": "worker-0", "version": None, "local_score": None,
    "progress": {
        "phase": "training", "step": 120, "steps": 1500, "loss": 0.5432, "learning_rate": 9.2e-4,
        "samples_per_second": 35.4, "tokens_per_second": 1320.0, "memory_bytes": 512_000_000, "seconds_left": 3900.0,
    },
}  # fmt: skip
WAITING = TASK | {
    "title": "red/next",
    "exact_title": "red/next",
    "state": "queued",
    "place": 1,
    "starts_in_seconds": 120.0,
    "worker": "",
    "progress": {},
}
DONE = TASK | {
    "title": "blue/done",
    "exact_title": "blue/done",
    "state": "published",
    "version": 3,
    "local_score": 0.9123,
    "main_score": 0.8,
    "progress": {},
}


def lines(rows: list[dict[str, Any]], width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(display.console, "width", width)
    with display.console.capture() as captured:
        display.tasks(rows)
    *table, legend = [line.rstrip() for line in captured.get().splitlines()]
    if any(row["local_score"] is not None for row in rows):
        assert legend == "own: score with the own adapter, before merging; in main: score in main now"
        return table
    return [*table, legend]


def test_a_wide_terminal_shows_everything_in_one_line_per_task(monkeypatch: pytest.MonkeyPatch) -> None:
    head, training, waiting, done = lines([TASK, WAITING, DONE], 200, monkeypatch)
    assert head.split() == [
        "id",
        "task",
        "state",
        "step",
        "loss",
        "rows/s",
        "tokens/s",
        "MB",
        "left",
        "starts",
        "in",
        "own",
        "in",
        "main",
        "version",
    ]
    assert training.split() == [
        "t0691b2c3ddeadbeef1234", "red/card-orders", "training", "120/1500", "0.543", "35", "1,320", "512", "65", "min",
        "–", "–", "–", "worker-0",
    ]  # fmt: skip
    assert waiting.split()[1:] == [
        "red/next", "queued", "2", "min", "–", "–", "–", "place", "1",
    ]  # fmt: skip
    assert done.split()[1:] == ["blue/done", "published", "0.9123", "0.8000", "v3"]


def test_80_columns_hold_step_loss_speed_and_end_and_no_line_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines([TASK, WAITING, DONE], 80, monkeypatch)
    assert len(found) == 4
    assert max(map(len, found)) <= 80
    assert found[0].split() == ["task", "state", "step", "loss", "tokens/s", "left", "own"]
    assert found[1].split() == [
        "red/card-orders",
        "training",
        "120/1500",
        "0.543",
        "1,320",
        "65",
        "min",
        "–",
        "worker-0",
    ]


def test_columns_that_nobody_fills_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = lines([DONE], 80, monkeypatch)
    assert head.split() == ["id", "task", "state", "own", "in", "main", "version"]


def test_a_published_task_that_main_lost_while_nothing_ran_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "main no longer holds it" in lines([DONE | {"gone_from_main": True}], 200, monkeypatch)[1]
    answer = {
        "running": False, "tasks": {"published": 3}, "gone_from_main": 2, "main": 1, "base_model": "tiny", "held": None,
        "storage": "file:store", "mlflow": "sqlite:///m.db",
    }  # fmt: skip
    with display.console.capture() as captured:
        display.status(answer)
    assert "3 published (2 of the published ones main no longer holds; the next `onebasis up`" in captured.get()


def test_a_task_that_waits_since_main_is_held_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = TASK | {"state": "evaluating", "progress": {}, "held": "main is held by ann: audit"}
    assert lines([waits], 200, monkeypatch)[1].endswith("main is held by ann: audit")


def test_a_long_reason_breaks_its_own_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parked = TASK | {"state": "parked", "reason": "the loss is nan at step 3 of 40 " * 3, "progress": {}}
    found = lines([parked], 80, monkeypatch)
    assert max(map(len, found)) <= 80
    assert found[1].startswith("red/card-orders  parked")
    assert all(line.startswith(" " * 20) for line in found[2:])


def test_brackets_in_a_reason_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    parked = TASK | {"state": "parked", "reason": "row [red]3[/red] is bad", "progress": {}}
    assert "row [red]3[/red] is bad" in lines([parked], 200, monkeypatch)[1]


def test_followed_without_a_terminal_each_change_is_one_line_of_at_most_80_columns() -> None:
    scoring = TASK | {"progress": {"phase": "scoring"}}
    asked = iter(
        [
            [TASK],
            [TASK],
            [scoring],
            [DONE | {"task_id": TASK["task_id"], "title": TASK["title"], "exact_title": TASK["title"]}],
        ]
    )
    with display.console.capture() as captured:
        display.follow(lambda: next(asked), lambda: None)
    found = captured.get().splitlines()
    assert [line[10:].split() for line in found] == [
        ["red/card-orders", "training", "120/1500", "·", "loss", "0.543", "·", "65", "min", "left"],
        ["red/card-orders", "training", "scoring"],
        ["red/card-orders", "published"],
    ]
    assert max(map(len, found)) <= 80


def test_a_task_that_is_overtaken_in_the_queue_is_told_of_and_one_that_moves_on_is_not() -> None:
    places = (2, 1, 3, 3, None)
    asked = iter([*([WAITING | {"place": place}] for place in places[:-1]), [DONE | {"task_id": WAITING["task_id"]}]])
    with display.console.capture() as captured:
        display.follow(lambda: next(asked), lambda: None)
    waits, overtaken, ended = (line[10:] for line in captured.get().splitlines())
    assert waits.split()[:2] == ["red/next", "queued"]
    assert "place in the queue 1 → 3: tasks of higher priority, or of teams that have used" in overtaken
    assert ended.split() == ["blue/done", "published"]
    asked = iter([[WAITING | {"place": 1}], [WAITING | {"place": 3}], [DONE | {"task_id": WAITING["task_id"]}]])
    with display.console.capture() as captured, display.errors.capture() as told_beside:
        display.follow_quietly(lambda: next(asked), lambda: None)  # stdout is for JSON
    assert (captured.get(), told_beside.get()[:34]) == ("", "red/next: place in the queue 1 → 3")
    one = display.Places()  # as `logs --follow` tells of one task
    told = [one.moved(WAITING | {"place": place}).partition(":")[0] for place in places]
    assert told == ["", "place in the queue 2 → 1", "place in the queue 1 → 3", "", ""]


def test_a_point_of_the_curves_is_a_line_of_the_log() -> None:
    point = {"step": 12, "steps": 50, "loss": 0.5, "learning_rate": 0.001, "samples_per_second": 35.4}
    told = {"at": 0.0, "kind": "progress", "text": json.dumps(point)}
    of_old = {"at": 0.0, "kind": "progress", "text": '{"step": 5, "loss": 0.5, "learning_rate": 0.001}'}
    with display.console.capture() as captured:
        display.log_lines([told, of_old, {"at": 0.0, "kind": "log", "text": "task t1: method lora"}])
    new, old, line = captured.get().splitlines()
    assert new.endswith("step 12/50 · loss 0.5000 · learning rate 1.00e-03 · 35.4 rows/s")
    assert old.endswith("step 5 · loss 0.5000 · learning rate 1.00e-03")
    assert line.endswith("task t1: method lora")


def test_a_point_and_the_table_name_the_training_of_auto_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    point = {"step": 3, "steps": 12, "loss": 0.5, "learning_rate": 0.001, "candidate": "lora on all rows"}
    with display.console.capture() as captured:
        display.log_lines([{"at": 0.0, "kind": "progress", "text": json.dumps(point)}])
    assert "  lora on all rows: step 3/12 · loss" in captured.get()
    row = TASK | {"progress": TASK["progress"] | {"candidate": "share"}}
    assert lines([row], 200, monkeypatch)[1].endswith("worker-0 · share")


@pytest.mark.parametrize(
    ("compared", "method", "trainings"),
    [
        (["share", "lora"], "lora, by auto, which compared share and lora · ", "36 steps of all trainings in 2.0 s"),
        ([], "lora, by auto, which compared nothing · ", "36 steps in 2.0 s"),
        (None, "lora, by auto · ", "36 steps in 2.0 s"),
    ],
)
def test_what_auto_compared_is_told_of_a_trained_task(compared: list[str] | None, method: str, trainings: str) -> None:
    training = {
        "steps": 36, "seconds": 2.0, "submit_to_first_step_seconds": None, "resumed_from": 0, "method": "lora",
        "asked_method": "auto", "compared": compared, "basis_version": 0, "trainable_parameters": 96,
        "refined_seconds": None, "share_full": False, "unrefined": "", "last_point": None, "plot": None,
    }  # fmt: skip
    with display.console.capture() as captured:
        display._print_training(training)
    first, second = captured.get().splitlines()
    assert first.split(maxsplit=1)[1] == trainings
    assert second.split(maxsplit=1)[1].startswith(method)


@pytest.mark.parametrize(
    ("state", "progress", "said"),
    [
        ("training", {"phase": "training"}, "training: it stops after this step and writes a checkpoint"),
        ("refining", {"phase": "training"}, "refining: it stops after this step and writes a checkpoint"),
        ("training", {}, "training: it stops after its next step and writes a checkpoint"),
        (
            "training",
            {"phase": "scoring"},
            "training: it is being scored, stops after this batch and writes no checkpoint",
        ),
        (
            "training",
            {"phase": "saving"},
            "training: it is trained and scored, its adapter is being stored, and it does ",
        ),
        ("queued", {}, "queued"),
    ],
)
def test_what_becomes_of_a_preempted_task_depends_on_what_it_does(
    state: str, progress: dict[str, Any], said: str
) -> None:
    with display.errors.capture() as captured:
        display.preempted(TASK | {"state": state, "progress": progress})
    assert captured.get().startswith(f"red/card-orders: {said}")


# --- what came from somebody else --------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;title\x07[red]\u202edone\udc80[/bold]"


def printed(call: Callable[[], Any]) -> str:
    """What a command prints, on both consoles, to a terminal with colours."""
    with display.console.capture() as captured, display.errors.capture() as told:
        call()
    return captured.get() + told.get()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_character_of_somebody_else_moves_a_terminals_cursor(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(display.console, "_force_terminal", is_terminal)
    row = TASK | {
        "title": EVIL,
        "exact_title": EVIL,
        "state": "parked",
        "reason": EVIL,
        "worker": EVIL,
        "main_score_problem": EVIL,
    }
    told = {"at": 0.0, "kind": "log", "text": EVIL}
    status = {
        "running": True, "base_model": EVIL, "main": 1, "tasks": {}, "storage": EVIL, "mlflow": EVIL,
        "held": {"time": 0.0, "actor": EVIL, "reason": EVIL}, "workers": {EVIL: EVIL}, "alarm": EVIL,
        "unreadable_tasks": [EVIL], "mlflow_error": EVIL,
    }  # fmt: skip
    version = {
        "version": 1, "parent": 0, "status": "rejected", "refs": [], "reason": EVIL, "added": [EVIL], "refined": [EVIL],
        "tags": [EVIL], "remakes": 1, "removed": [EVIL],
        "task_count": 1, "rank_max": 1, "bytes_written": 1, "merge_seconds": 0.1,
    }  # fmt: skip
    fine = {
        "warnings": [EVIL],
        "dry_run": True,
        "is_new": True,
        "title": EVIL,
        "exact_title": EVIL,
        "train_rows": 1,
        "eval_rows": 1,
    }
    text = printed(lambda: (
        display.tasks([row | {"local_score": 1.0}]), display.log_lines([told, told | {"kind": "progress"}]),
        display.status(status), display.submitted(fine), version_tables.versions([version]), note(EVIL),
        error(InvalidInput(EVIL, EVIL, EVIL)), display.follow(lambda: [row], lambda: None),
        version_tables.rollback({"from_version": 1, "to_version": 2, "preview": True, "held": False,
                                 "vanishing": [EVIL], "returning": [EVIL]}),
        version_tables.restored({"title": EVIL, "revision": 1, "error": 0.1, "preview": True, "leaving": EVIL,
                                 "version": 1, "approximate": True, "others_move": True, "refused": EVIL}),
    ))  # fmt: skip
    assert text.count("\\x1b]0;title") > 10
    own = re.sub(r"\x1b\[[0-9;?]*[mhlAK]|\r", "", text)  # colours, and what a live table needs
    assert odd_character(own.replace("\n", "")) is None
    assert "\x1b[2J" not in text
    assert "[red]" in own


def test_what_rounds_to_nothing_has_no_sign_and_one_is_no_plural() -> None:
    assert (decimals(-0.00001), decimals(-0.00001, sign=True), decimals(-0.5, sign=True)) == (
        "0.0000",
        "+0.0000",
        "-0.5000",
    )
    assert (counted(1, "adapter"), counted(0, "adapter"), counted(3000, "copy", "copies")) == (
        "1 adapter", "0 adapters", "3,000 copies",
    )  # fmt: skip


def test_a_control_plane_that_stands_by_says_who_knows_the_workers(capsys: pytest.CaptureFixture[str]) -> None:
    leader = {"name": "host:/a", "url": "http://host:1", "since": 0.0, "number": 3}
    display.workers({"running": True, "leadership": {"role": "stands by", "leader": leader, "standing_by": []}})
    said = capsys.readouterr()
    assert "the one that leads knows what the workers do" in said.err + said.out
    assert "host:/a" in said.out


def test_tasks_of_several_base_models_say_which(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = DONE | {"base_model": "minilm"}, WAITING | {"base_model": "llama"}
    display.tasks([one, one])
    assert "base model" not in capsys.readouterr().out
    display.tasks([one, other])
    found = capsys.readouterr().out.splitlines()
    assert "base model" in found[0]
    assert ["minilm" in found[1], "llama" in found[2]] == [True, True]


def test_the_status_says_in_a_line_what_is_stored() -> None:
    sizes = {"basis_numbers": 1000, "coefficient_numbers": 500, "private_numbers": 250, "separate_numbers": 3500}
    answer = {
        "running": True, "base_model": "m", "main": 2, "held": None, "tasks": {}, "storage": "s", "mlflow": "f",
        "footprint": {**sizes, "tasks": 2},
    }  # fmt: skip
    text = printed(lambda: display.status(answer))
    assert "stored   7.00 KB for 2 tasks; as separate LoRAs 14.00 KB (`onebasis capacity`)" in text


def test_the_capacity_tells_which_tasks_have_private_parts_and_counts_them_in_the_sum() -> None:
    sizes = {"basis_numbers": 1000, "coefficient_numbers": 500, "private_numbers": 250, "separate_numbers": 3500}
    footprint = {**sizes, "version": 2, "tasks": 2, "head_numbers": 0, "stored_bytes": 123_000}
    task = {
        "task_id": "t", "separate_numbers": 1000, "error_at_birth": 0.1, "error": 0.1, "foundation_numbers": 0,
        "coefficient_numbers": 75,
    }  # fmt: skip
    answer = {
        "version": 2, "rank_max": 4, "footprint": footprint, "trend": [footprint],
        "tasks": [{**task, "title": "red/a", "private_numbers": 250}, {**task, "title": EVIL, "private_numbers": 0}],
    }  # fmt: skip
    text = printed(lambda: version_tables.capacity(answer))
    assert "1.00 KB (25%)" in text
    assert "300 B (8%)" in text
    assert "what the basis (at most rank_max 4 directions) does not hold of 1 task is in private parts" in text
    assert "+ private parts 1.00 KB = 7.00 KB; as separate LoRAs 14.00 KB" in text
    assert "2.00× smaller with the basis" in text
    assert "in the store 123.00 KB" in text
    assert "\x1b]0;" not in text


def test_with_more_tasks_than_columns_fit_each_task_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [
        {
            "title": f"team/task-{n}",
            "exact_title": f"team/task-{n}",
            "birth": 1,
            "rows": 100 + n,
            "base": 0.25,
            "local": 0.75,
            "share_full": False,
            "of_rows": [],
        }
        for n in range(45)
    ]
    matrix = [[{"score": 0.5 + n / 1000, "measured_at": 1} for n in range(45)] for _ in range(2)]
    matrix[1][44] = {"score": 0.25, "measured_at": 2}
    figures = {key: {"value": None} for key in ("average_accuracy", "backward_transfer", "forgetting", "merge_gap")}
    footprint = dict.fromkeys(("basis", "coefficient", "private", "head", "separate"), 0)
    answer = {
        "version": 2,
        "versions": [1, 2],
        "tasks": tasks,
        "matrix": matrix,
        "by_version": [figures],
        "footprint": {f"{name}_numbers": value for name, value in footprint.items()} | {"stored_bytes": 0},
    }
    version_tables.scores(answer)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("team/")}
    assert len(rows) == 45
    assert rows["team/task-7"] == ["107", "0.2500", "0.7500", "version", "1", "0.5070", "0.5070'", "+0.0000"]
    assert rows["team/task-44"] == ["144", "0.2500", "0.7500", "version", "1", "0.5440", "0.2500", "-0.2940"]
    version_tables.scores(answer | {"tasks": tasks[:3], "matrix": [row[:3] for row in matrix]})
    out = capsys.readouterr().out
    assert re.search("version 2 +0.5000' +0.5010' +0.5020'", out)
    assert "loses" not in out
    losses = (None, -0.01, 0.2)
    lost = [[cell | {"general_loss": loss} for cell, loss in zip(row[:3], losses, strict=True)] for row in matrix]
    lost[1][2] |= {"general_loss": 0.25}
    version_tables.scores(answer | {"tasks": tasks[:3], "matrix": lost})
    told = capsys.readouterr().out.partition("What the base model loses")[2]
    assert re.search(r"team/task-2 +\+0.2000 +\+0.2500 *\nteam/task-1 +-0.0100 +-0.0100", told)
    assert "team/task-0 " not in told
