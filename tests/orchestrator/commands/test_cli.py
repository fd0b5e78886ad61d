"""The command `onebasis` as a person or a script uses it, against a service over HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

from configs.errors import LEAVES, Exit, InvalidInput, NotFound, OnebasisError
from configs.task_spec import TaskSpec
from orchestrator.api.client import Client
from orchestrator.api.requests import DrainWorker, Health, ListTasks, ShowTask, ShowVersion, Submit
from orchestrator.commands import attention, cli, display
from orchestrator.commands.cli import ENDS, app
from subspace_store.formats.peft import read_peft_folder, write_peft_folder
from subspace_store.requests import Quarantine, Remove, Tag, Unquarantine
from tests.builders import LAYOUT, adapter
from tests.orchestrator.site import Site

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
Onebasis = Callable[..., Result]


@pytest.fixture
def onebasis(site: Site, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    """Run a command; wide enough that no table breaks a line."""
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(display.console, "width", 200)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return run


def task_file(site: Site, title: str, **changes: Any) -> str:
    path = site.folder / f"{title.replace('/', '-')}.yaml"
    path.write_text(yaml.safe_dump(site.document(title, **changes)))
    return str(path)


def test_the_commands_are_these() -> None:
    running = {"up", "down", "reload", "status", "doctor", "backup", "restore", "upgrade"}
    of_tasks = {
        "submit",
        "import",
        "tasks",
        "task",
        "cancel",
        "retry",
        "pause",
        "resume",
        "preempt",
        "logs",
        "simulate",
        "drain",
        "workers",
    }
    of_answers = {"predict", "which", "serve"}
    of_versions = {
        "versions",
        "version",
        "history",
        "diff",
        "rollback",
        "rollback-task",
        "reject",
        "remove",
        "export",
        "scores",
        "flipped",
        "capacity",
    }
    of_people = {"whoami", "audit", "login", "token", "context"}
    assert set(COMMANDS) == running | of_tasks | of_answers | of_versions | of_people | {"store", "webhooks", "mlflow"}
    assert set(INNER) == {f"token {name}" for name in ("create", "list", "rotate", "revoke")} | {
        "context list",
        "context use",
        "webhooks list",
        "webhooks test",
        "mlflow rebuild",
    }


GROUPS = ("token", "context", "webhooks", "mlflow")
INNER = [f"{group} {name}" for group in GROUPS for name in get_command(app).commands[group].commands]  # type: ignore[attr-defined]
HERE = {"up", "down", "reload", "simulate", "serve", "doctor", "backup", "restore", "upgrade", "mlflow rebuild"}
"""Commands that are about this machine, whatever service others ask."""


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name not in ("store", *GROUPS)), *INNER])
def test_every_command_has_help_with_a_sentence_and_its_options(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Usage: onebasis {command}" in result.output.replace("root", "onebasis")
    described: Any = get_command(app)
    for name in command.split():
        described = described.commands[name]
    assert "." in described.help
    assert "--json" in result.output
    asks_nobody_here = command == "login" or command.startswith("context")
    assert ("--state-dir" in result.output) is not asks_nobody_here
    assert ("--context" in result.output) is (command not in HERE and not asks_nobody_here)
    assert all(getattr(option, "help", "x") for option in described.params)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["status"], ["onebasis is up", "base model tiny, main is version 2", "2 published"]),
        (["tasks"], ["red/alpha", "blue/beta", "published", "v2", "0.9000"]),
        (["task", "red/alpha"], ["main holds it since version 1", "10 steps in 2.0 s", "Judged"]),
        (["logs", "red/alpha"], ["submitted", "TrainingDone: now merging"]),
        (["versions"], ["red/alpha", "blue/beta", "← main"]),
        (["version", "2"], ["red/alpha", "v1", "0.9000", "as separate LoRAs", "merge gap"]),
        (["diff", "1", "2"], ["+ blue/beta", "red/alpha"]),
        (["capacity"], ["What the tasks of version 2 store", "red/alpha", "separate LoRAs", "in the store"]),
        (["scores"], ["version 1", "version 2", "0.9000", "BWT", "n = 1 task)"]),
        (["rollback", "1", "--preview"], ["main would move from version 2 to version 1", "blue/beta vanishes"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_shows_what_the_service_says(onebasis: Onebasis, command: list[str], shown: list[str]) -> None:
    result = onebasis(*command)
    assert result.exit_code == 0, result.output
    for text in shown:
        assert text in result.output
    as_json = onebasis(*command, "--json")
    assert as_json.exit_code == 0
    assert json.loads(as_json.stdout)


def test_json_is_exactly_what_the_service_answered(site: Site, onebasis: Onebasis) -> None:
    assert json.loads(onebasis("version", "2", "--json").stdout) == site.client.ask(ShowVersion(version=2))
    assert json.loads(onebasis("tasks", "--team", "blue", "--json").stdout) == site.client.ask(ListTasks(team="blue"))


@pytest.mark.changes
def test_a_version_is_named_by_its_number_a_branch_or_a_tag(site: Site, onebasis: Onebasis) -> None:
    wanted = site.client.ask(ShowVersion(version=2))
    for name in ("2", "v2", "main", "candidate"):
        assert json.loads(onebasis("version", name, "--json").stdout) == wanted
    site.client.ask(Tag(name="gold", version=2, actor="ann"))
    assert json.loads(onebasis("version", "gold", "--json").stdout) == wanted | {"tags": ["gold"]}
    assert onebasis("scores", "--version", "main", "--json").stdout == onebasis("scores", "--json").stdout
    assert "main would move from version 2 to version 0" in onebasis("rollback", "0", "--preview").stdout
    empty = json.loads(onebasis("version", "0", "--json").stdout)  # which every command knows
    assert (empty["version"], empty["status"], empty["tasks"], empty["footprint"]["tasks"]) == (0, "empty", [], 0)
    assert "empty" in onebasis("version", "0").stdout
    for command in (["scores", "--version", "0"], ["capacity", "--version", "0"], ["diff", "0", "2"]):
        assert onebasis(*command).exit_code == 0
    refused = onebasis("export", "red/alpha", "--version", "0", "-o", "nowhere")
    assert (refused.exit_code, "version 0 has no task 'red/alpha'" in refused.stderr) == (3, True)
    assert "versions go from 0 to 2" in onebasis("version", "9").stderr
    assert onebasis("scores", "--version", "").exit_code == 3  # an unset variable is not main
    result = onebasis("diff", "1", "nothing")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "there is no version, tag or branch 'nothing'" in result.stderr


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_unknown_version_is_exit_code_3_with_the_next_step_on_stderr(onebasis: Onebasis) -> None:
    result = onebasis("version", "99")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "error: there is no version 99" in result.stderr
    assert "→ versions go from 0 to 2" in result.stderr


def test_an_error_with_json_is_json_on_stdout(onebasis: Onebasis) -> None:
    result = onebasis("version", "99", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "error": {
            "kind": "not-found",
            "code": "not-found",
            "what": "there is no version 99",
            "where": "",
            "todo": "versions go from 0 to 2; `onebasis versions` lists them",
        }
    }


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["task", "red/nobody"], 3),
        (["tasks", "--state", "asleep"], 2),
        (["cancel", "red/alpha"], 4),
        (["submit", "/nowhere.yaml"], 2),
        (["versions", "--state-dir", "/nowhere"], 5),
        (["rollback", "99"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_script_can_tell_errors_apart_by_the_exit_code(onebasis: Onebasis, command: list[str], code: int) -> None:
    result = onebasis(*command)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")


def test_a_number_with_brackets_is_shown_as_it_is_and_not_as_colour(onebasis: Onebasis) -> None:
    assert "[red]x[/red]" in onebasis("task", "[red]x[/red]").stderr


# --- submitting --------------------------------------------------------------------------------------------------


def test_a_dry_run_checks_everything_and_submits_nothing(site: Site, onebasis: Onebasis) -> None:
    before = site.client.ask(ListTasks())
    result = onebasis("submit", "--dry-run", task_file(site, "red/dry"))
    first, pool, now, end, cost = result.stdout.splitlines()
    assert (result.exit_code, first) == (0, "red/dry is fine: 6 training rows, 1 evaluation row")
    assert pool == "  pool       default"
    assert now.startswith("  now        is about to start; place 1, 0 before it; starts at once")
    assert end == "  trained    between 2 s and 17 s from now, in four of five cases"
    assert cost == "  cost       about 2 place-seconds: 2 s long"
    assert site.client.ask(ListTasks()) == before


def test_a_dry_run_of_a_wrong_task_names_the_key(site: Site, onebasis: Onebasis) -> None:
    result = onebasis("submit", "--dry-run", task_file(site, "red/dry", lora={"target_module": ["query"]}))
    assert result.exit_code == 2
    assert "unknown key 'lora.target_module' (did you mean 'target_modules'?)" in result.stderr


@pytest.fixture
def many(site: Site) -> Path:
    """A folder with two tasks, and what is none."""
    folder = site.folder / "many"
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    for name, end in (("one", "yaml"), ("two", "yml")):
        (folder / f"{name}.{end}").write_text(yaml.safe_dump(site.document(f"red/{name}")))
    (folder / "notes.txt").write_text("not a task")
    (folder / "inner" / "three.yaml").write_text("not one of this folder")
    return folder


@pytest.mark.changes
def test_a_folder_and_files_are_submitted_together(site: Site, onebasis: Onebasis, many: Path) -> None:
    result = onebasis("submit", str(many), task_file(site, "red/alpha"), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [(Path(one["file"]).name, one["title"], one["is_new"]) for one in told] == [
        ("one.yaml", "red/one", True),
        ("two.yml", "red/two", True),
        ("red-alpha.yaml", "red/alpha", False),
    ]
    result = onebasis("submit", str(many), "--wait")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("published") >= 2


@pytest.mark.changes
def test_files_are_submitted_behind_those_that_they_come_after(site: Site, onebasis: Onebasis, many: Path) -> None:
    (many / "a-last.yaml").write_text(yaml.safe_dump(site.document("red/last", after=["red/one", "red/alpha"])))
    told = json.loads(onebasis("submit", str(many), "--json").stdout)
    titles = [one["title"] for one in told]
    assert titles.index("red/last") > titles.index("red/one")
    assert sorted(titles) == ["red/last", "red/one", "red/two"]
    site.wait_for("red/last", "published")


def test_tasks_that_come_after_each_other_in_a_circle_are_refused(site: Site, onebasis: Onebasis, many: Path) -> None:
    for name, before in (("egg", "hen"), ("hen", "cock"), ("cock", "egg")):
        (many / f"{name}.yaml").write_text(yaml.safe_dump(site.document(f"blue/{name}", after=[f"blue/{before}"])))
    result = onebasis("submit", str(many), "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.count("comes after blue/") == 3
    assert "comes after blue/cock, which comes after it" in result.stderr


def test_arrivals_are_simulated_under_the_settings_of_the_service(onebasis: Onebasis, tmp_path: Path) -> None:
    table = tmp_path / "arrivals.csv"
    table.write_text("at_seconds,team,seconds\n0,red,100\n0,red,100\n30,blue,50\n")
    found = json.loads(onebasis("simulate", str(table), "--json").stdout)
    assert found["waits"][0] == {"team": "blue", "pool": "default", "ranks": 1, "tasks": 1} | dict.fromkeys(
        ("mean_seconds", "p50_seconds", "p90_seconds", "max_seconds"), 70.0
    )
    shown = onebasis("simulate", str(table), "--load-seconds", "90").stdout
    assert "never started" in shown
    assert "a worker loads for 90 s (--load-seconds), a checkpoint takes 30 s" in shown
    marked = tmp_path / "marked.csv"
    marked.write_text(table.read_text(), encoding="utf-8-sig")  # as Excel writes UTF-8
    assert json.loads(onebasis("simulate", str(marked), "--json").stdout) == found
    on_two = json.loads(onebasis("simulate", str(table), "--machines", "2", "--cpus", "1", "--json").stdout)
    assert on_two == found | {"machines": 2}  # a machine for each of the pool's workers
    small = onebasis("simulate", str(table), "--cpus", "0.5")
    assert (small.exit_code, "room for 0 workers of pool 'default'" in small.stderr) == (2, True)
    assert "add --cpus" in onebasis("simulate", str(table), "--gpus", "1").stderr
    table.write_text("at_seconds,team,seconds\n0,green,100\n")
    refused = onebasis("simulate", str(table))
    assert (refused.exit_code, "there is no team 'green'" in refused.stderr) == (2, True)


@pytest.mark.changes
def test_pausing_names_what_is_paused_and_never_everything_by_default(site: Site, onebasis: Onebasis) -> None:
    for nothing in ("pause", "resume"):
        refused = onebasis(nothing)
        assert (refused.exit_code, "names not exactly one of" in refused.stderr) == (2, True)
    assert onebasis("pause", "--service", "--reason", "audit").exit_code == 0
    status = onebasis("status").stdout
    assert "the service is paused by ann for" in status
    assert "(`onebasis resume --service` lets it go on)" in status
    resumed = onebasis("resume", "--service", "--json")
    assert json.loads(resumed.stdout) == {"team": None, "is_new": True, "paused": None}
    assert "paused" not in onebasis("status").stdout
    assert "the service: was not paused" in onebasis("resume", "--service").stderr
    assert onebasis("pause", "--team", "red").exit_code == 0
    assert "(`onebasis resume --team red` lets it go on)" in onebasis("status").stdout
    assert "team red: no longer paused" in onebasis("resume", "--team", "red").stderr
    assert json.loads(onebasis("cancel", "--team", "red", "--json").stdout)["done"] == []
    many = onebasis("cancel", "--team", "red", "--state", "published")
    assert many.exit_code == 4
    assert "not red/alpha: " in many.stderr
    assert many.stderr.splitlines()[-1] == "refused: 1"
    assert onebasis("cancel", "red/alpha", "--team", "red").exit_code == 2
    assert "is published" in onebasis("retry", "red/alpha").stderr


@pytest.mark.changes
def test_of_several_files_none_is_submitted_if_one_is_wrong(site: Site, onebasis: Onebasis, many: Path) -> None:
    before = site.client.ask(ListTasks())
    (many / "zwei.yaml").write_text(yaml.safe_dump(site.document("red/zwei", lora={"rank": 3})))
    (many / "drei.yaml").write_text(yaml.safe_dump(site.document("red/one")))
    (many / "taken.yaml").write_text(yaml.safe_dump(site.document("red/alpha", priority=3)))
    result = onebasis("submit", str(many))
    assert result.exit_code == Exit.CONFLICT  # of 0, 2 and 4 the highest
    assert re.search(r"zwei.yaml: unknown key 'lora.rank'", result.stderr)
    assert re.search(r"one.yaml: is red/one, and so is .*drei.yaml", result.stderr)
    assert "taken.yaml: red/alpha: task" in result.stderr
    assert "or take the old task out first: `onebasis store remove red/alpha`" in result.stderr
    assert result.stderr.count("see docs/trouble.md#") == 3  # each error its own row
    assert "see docs/trouble.md#name-taken" in result.stderr
    assert "red/two is fine: 6 training rows, 1 evaluation row" in result.stdout
    assert "nothing was submitted" in result.stderr
    told = json.loads(onebasis("submit", str(many), "--json").stdout)
    assert [(Path(one["file"]).name, one.get("error", {}).get("exit_code")) for one in told] == [
        ("drei.yaml", None), ("one.yaml", 2), ("taken.yaml", 4), ("two.yml", None), ("zwei.yaml", 2),
    ]  # fmt: skip
    assert site.client.ask(ListTasks()) == before


@pytest.mark.changes
def test_the_exit_code_of_several_is_the_worst_of_their_ends(site: Site, onebasis: Onebasis, many: Path) -> None:
    site.plant.cluster.training_faults = {"red/two": ["input"]}
    result = onebasis("submit", str(many), "--wait", "--json")
    assert result.exit_code == Exit.PARKED
    assert [one["state"] for one in json.loads(result.stdout)] == ["published", "parked"]


def test_a_folder_without_tasks_is_refused(onebasis: Onebasis, tmp_path: Path) -> None:
    result = onebasis("submit", str(tmp_path))
    assert result.exit_code == 2
    assert "no task file is in this folder" in result.stderr


@pytest.mark.changes
def test_submitting_with_wait_ends_with_the_tasks_own_exit_code(site: Site, onebasis: Onebasis) -> None:
    site.plant.cluster.training_faults = {"red/wrong": ["input"]}
    result = onebasis("submit", "--wait", task_file(site, "red/wrong"))
    assert result.exit_code == ENDS["parked"] == 8
    assert "fault of kind input" in result.stdout


def test_every_end_of_a_task_has_an_exit_code_that_no_error_has_but_rejected() -> None:
    assert set(ENDS) == set(display.ENDED)
    assert len(set(ENDS.values())) == len(ENDS) - 1
    assert ENDS["replaced"] == ENDS["published"]  # it was, and did what it was asked for
    assert {ENDS["parked"], ENDS["cancelled"]} & {leaf.exit_code for leaf in (OnebasisError, *LEAVES)} == set()


@pytest.mark.parametrize("command", [[], ["submit"], ["import"]])
def test_the_help_lists_every_exit_code_and_what_it_means(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"]).output
    listed = re.findall(r"^ +(\d+)  (\S.*)$", shown[shown.index("Exit codes:") :], flags=re.MULTILINE)
    assert listed == [(str(int(code)), code.meaning) for code in Exit]


@pytest.mark.changes
def test_an_adapter_is_imported_and_exported_again(site: Site, onebasis: Onebasis, tmp_path: Path) -> None:
    folder = site.folder / "data" / "peft"
    write_peft_folder(folder, adapter(5), "tiny-source")
    result = onebasis("import", str(folder), "--team", "blue", "--name", "brought", "--wait", "--json")
    assert result.exit_code == 0, result.output
    version = json.loads(result.stdout)["version"]
    out = tmp_path / "out"
    result = onebasis("export", "blue/brought", "-o", str(out))
    assert result.exit_code == 0, result.output
    taken = read_peft_folder(out, "tiny", LAYOUT.sha256)
    for name, update in adapter(5).modules.items():
        assert float((taken.modules[name].delta() - update.delta()).norm() / update.delta().norm()) < 1e-4
    again = onebasis("export", "blue/brought", "-o", str(out))
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    assert onebasis("rollback", str(version - 1), "--preview").stdout.count("blue/brought vanishes") == 1


# --- up and down, as far as they start nothing -------------------------------------------------------------------


def test_up_with_a_state_folder_other_than_the_commands_says_which_option_to_add(site: Site, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["up", "--config", str(site.folder / "settings.yaml"), "--state-dir", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert f"add --state-dir {site.folder}" in result.stderr


def test_down_where_nothing_runs_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["down", "--state-dir", str(tmp_path), "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"was_running": False})


def test_export_to_where_nothing_can_be_written_is_told(site: Site) -> None:
    site.publish("red/alpha")
    result = CliRunner().invoke(
        app, ["export", "red/alpha", "-o", "/proc/nowhere", "--state-dir", str(site.folder), "--json"]
    )
    assert result.exit_code == 2
    assert "cannot write there" in json.loads(result.stdout)["error"]["what"]


def test_watching_with_json_prints_json_and_nothing_else(site: Site) -> None:
    site.publish("red/alpha")
    result = CliRunner().invoke(app, ["tasks", "--watch", "--json", "--state-dir", str(site.folder)])
    states = {task["title"]: task["state"] for task in json.loads(result.stdout)}
    assert states["red/alpha"] == "published"
    assert not set(states.values()) & {"queued", "training", "merging", "evaluating"}


# --- the store ---------------------------------------------------------------------------------------------------


@pytest.mark.changes
def test_store_lists_its_own_commands_and_looks_into_the_services_store(onebasis: Onebasis, site: Site) -> None:
    assert "Usage: onebasis store" in onebasis("store", "--help").output
    assert "quarantine" in onebasis("store", "--help").output
    newest = json.loads(onebasis("store", "log", "--json").stdout)[-1]
    assert newest["seq"] == site.plant.state.seq
    assert onebasis("store", "tag", "gold", "silver").exit_code == 3


@pytest.mark.changes
def test_main_is_held_after_a_rollback_what_passes_waits_and_goes_on_after_release(
    onebasis: Onebasis, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspace_store.commands.place.running_server", lambda state_dir: 1)  # the site is no process
    assert "main is held there" in onebasis("rollback", "1", "--hold", "--reason", "worse").stdout
    assert "main is held by ann" in onebasis("status").stdout
    assert json.loads(onebasis("status", "--json").stdout)["held"]["reason"] == "worse"
    epoch, version = site.plant.state.epoch, max(site.plant.state.versions) + 1
    site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/gamma")), by="ann"))
    waiting = site.wait_for("red/gamma", "evaluating")
    assert f"version {version} waits: main is held by ann: worse" in waiting["why"]
    until = time.monotonic() + 10
    while version not in site.plant.state.scores:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert onebasis("store", "release").exit_code == 0
    site.wait_for("red/gamma", "published")
    assert site.plant.state.epoch == epoch  # nobody was fenced on the way
    assert site.plant.state.refs["main"] == version
    assert "held" not in onebasis("status").stdout
    again = onebasis("rollback", str(version), "--hold").stdout
    assert "already" in again
    assert "main is held there" in again
    assert onebasis("store", "release").exit_code == 0


@pytest.mark.changes
def test_a_task_is_removed_through_the_running_service_and_everything_can_still_be_asked(
    onebasis: Onebasis, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspace_store.commands.place.running_server", lambda state_dir: 1)  # the site is no process
    for title in ("red/going", "blue/staying"):
        site.publish(title)
    before, epoch = site.plant.state.refs["main"], site.plant.state.epoch
    refused = onebasis("store", "remove", "red/going", "--yes", "--candidate-only")
    assert (refused.exit_code, "leave --candidate-only out" in refused.stderr) == (4, True)
    assert site.plant.state.refs["main"] == before
    done = json.loads(onebasis("store", "remove", "red/going", "--yes", "--reason", "licence", "--json").stdout)
    main = before + 1
    assert (done["version"], done["approximate"]) == (main, [])
    assert site.plant.state.refs == {"candidate": main, "main": main}
    assert site.plant.state.epoch == epoch  # nobody was fenced on the way
    assert f"version {main} was made again without it" in site.wait_for("red/going", "parked")["why"]
    until = time.monotonic() + 10
    while site.client.ask(ShowTask(reference="blue/staying"))["version"] != main:
        assert time.monotonic() < until
        time.sleep(0.01)
    row = json.loads(onebasis("versions", "--json").stdout)[-1]
    assert (row["remakes"], row["removed"], row["status"]) == (before, ["red/going"], "published")
    assert f"version {main} is version {before} without red/going" in onebasis("versions").stdout
    assert f"main holds it since version {main}" in onebasis("task", "blue/staying").stdout
    for command in (["version", str(main)], ["scores"], ["tasks"], ["diff", str(before), str(main)], ["status"]):
        shown = onebasis(*command)
        assert shown.exit_code == 0, shown.output
    columns = json.loads(onebasis("scores", "--json").stdout)["tasks"]
    assert {"title": "blue/staying", "birth": main}.items() <= columns[-1].items()
    assert "red/going" not in [column["title"] for column in columns]


def test_a_service_removes_nothing_that_it_would_reject_at_once(site: Site) -> None:
    task_id = site.client.ask(ShowTask(reference="red/alpha"))["task_id"]
    with pytest.raises(InvalidInput, match="publish has to be true"):
        site.client.ask(Remove(task_id=task_id))
    with pytest.raises(InvalidInput, match="op_key: has to begin with remove"):
        Remove(task_id=task_id, publish=True, op_key="publish:9")


def test_an_argument_that_is_wrong_is_named_with_what_would_be_right(site: Site, onebasis: Onebasis) -> None:
    said = onebasis("task", "").stderr
    assert "reference: is empty" in said
    assert "→ reference is an id, the beginning of one, team/name, or team/name@2" in said
    with pytest.raises(
        InvalidInput, match=r"(?s)version: has to be 0 or more \(got -1\).*version is the number of a vers"
    ):
        ShowVersion(version=-1)
    said = onebasis("rollback", "0", "--op-key", "monday").stderr
    assert "op_key: has to begin with rollback, the name of the request, as in rollback:monday (got 'monday')" in said
    assert "configs/" not in said


def test_a_team_that_is_not_there_is_not_answered_with_an_empty_list(site: Site, onebasis: Onebasis) -> None:
    result = onebasis("tasks", "--team", "redd")
    assert result.exit_code == 2
    assert "there is no team 'redd'" in result.stderr
    assert "teams of this service: blue, red" in result.stderr


@pytest.mark.changes
def test_a_followed_log_tells_when_the_task_moves_in_the_queue(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, places = Client.ask, iter([2, 1, 4, None])

    def moving(self: Client, request: Any) -> Any:
        answer = ask(self, request)
        return answer | {"place": next(places)} if isinstance(request, ShowTask) else answer

    site.plant.cluster.hold = lambda order: True
    assert onebasis("submit", task_file(site, "blue/late")).exit_code == 0
    monkeypatch.setattr(Client, "ask", moving)
    monkeypatch.setattr(cli, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(cli, "ENDS", {})
    result = onebasis("logs", "blue/late", "--follow")  # ends with the places
    assert "place in the queue 2 → 1\n" in result.stdout
    assert "place in the queue 1 → 4: tasks of higher priority" in result.stdout


@pytest.mark.changes
@pytest.mark.parametrize("command", ["tasks --watch", "tasks --watch --json", "logs blue/late --follow", "submit"])
def test_a_command_that_waits_ends_when_the_service_stays_down(
    site: Site, onebasis: Onebasis, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.plant.cluster.hold = lambda order: True
    file = task_file(site, "blue/late")
    assert onebasis("submit", file).exit_code == 0
    ask = Client.ask

    def down(self: Client, request: Any) -> Any:
        return {"running": False, "alarms": []} if isinstance(request, Health) else ask(self, request)

    monkeypatch.setattr(Client, "ask", down)
    monkeypatch.setattr(attention, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(attention, "DOWN_SECONDS", 0.1)
    arguments = ["submit", file, "--wait"] if command == "submit" else command.split()
    result = onebasis(*arguments)
    assert result.exit_code == 5
    assert "the service has been down for" in result.output + result.stderr


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        (["statsu", "--json"], "No such command 'statsu'", "onebasis"),
        (["--json"], "No such option: --json", "onebasis"),
        (["scores", "payments/charges", "--json"], "unexpected extra argument", "onebasis scores"),
        (["task", "--json"], "Missing argument 'ID'", "onebasis task"),
        (["tasks", "--limit", "many", "--json"], "Invalid value for '--limit'", "onebasis tasks"),
        (["tasks", "--json", "--nothing"], "No such option: --nothing", "onebasis tasks"),
        (["store", "verfy", "--json"], "No such command 'verfy'", "onebasis store"),
        (["store", "tag", "--json"], "Missing argument", "onebasis store tag"),
    ],
)
def test_an_error_of_usage_is_json_like_any_other(arguments: list[str], what: str, where: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="onebasis")
    assert (result.exit_code, result.stderr) == (2, "")
    error = json.loads(result.stdout)["error"]
    assert what in error["what"]
    assert (error["where"], error["kind"], error["code"]) == (where, "invalid-input", "invalid-input")
    assert error["todo"] == f"`{where} --help` shows what it takes"


def test_without_json_an_error_of_usage_is_text() -> None:
    result = CliRunner().invoke(app, ["statsu"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Did you mean 'status'" in result.stderr


def test_with_json_a_command_ends_with_the_same_codes(onebasis: Onebasis) -> None:
    assert onebasis("status", "--json").exit_code == 0
    assert onebasis("task", "nope", "--json").exit_code == onebasis("task", "nope").exit_code == 3
    assert onebasis("task", "--json", "--help").exit_code == 0


def test_a_task_that_is_named_without_its_team_is_answered_with_the_whole_name(onebasis: Onebasis) -> None:
    result = onebasis("task", "alpha")
    assert result.exit_code == 3
    assert "did you mean 'red/alpha'?" in result.stderr
    assert "`onebasis tasks` lists ids and names" in onebasis("task", "nobody").stderr


@pytest.mark.changes
def test_rolling_back_to_where_main_is_writes_nothing(onebasis: Onebasis, site: Site) -> None:
    before = len(site.plant.storage.keys("log/"))
    for _ in range(2):
        assert "main is version 2 already" in onebasis("rollback", "2").stdout
    assert json.loads(onebasis("rollback", "2", "--json").stdout)["preview"] is False
    assert len(site.plant.storage.keys("log/")) == before
    assert "main moved from version 2 to version 1" in onebasis("rollback", "1").stdout


def test_a_task_that_nobody_knows_cannot_be_let_out_of_quarantine(onebasis: Onebasis) -> None:
    result = onebasis("store", "unquarantine", "nope")
    assert result.exit_code == 3
    assert "no task of this id is in quarantine, and none was merged" in result.stderr


@pytest.mark.changes
def test_nor_over_http_and_the_ids_that_are_like_it_are_named(site: Site) -> None:
    task_id = site.client.ask(ShowTask(reference="red/alpha"))["task_id"]
    site.client.ask(Quarantine(task_id=task_id, reason="leaks", actor="ann"))
    before = site.plant.state.seq
    with pytest.raises(NotFound, match=rf"did you mean {task_id} \(red/alpha\)"):
        site.client.ask(Unquarantine(task_id=task_id[:-1] + "x", actor="ann"))
    state = site.service.versions().refresh()
    assert state.seq == site.plant.state.seq == before
    for _ in range(2):  # asked twice, it is done once and no error
        site.client.ask(Unquarantine(task_id=task_id, op_key="unquarantine of monday", actor="ann"))
    assert site.service.versions().refresh().quarantined == {}


def test_the_title_of_the_scores_is_one_line(onebasis: Onebasis) -> None:
    assert onebasis("scores").stdout.splitlines()[0] == "Score of each task under each version up to v2"


def test_a_lora_file_of_diffusers_is_taken_for_one(onebasis: Onebasis, site: Site) -> None:
    factors = {f"unet.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(factors, site.folder / "data" / "style.safetensors")
    options = ("--team", "red", "--name", "x", "--base-model", "tiny", "--dry-run")
    result = onebasis("import", str(site.folder / "data" / "style.safetensors"), *options)
    assert "the adapter changes 'unet.to_q', which the base model 'tiny' does not have" in result.output
    result = onebasis("import", str(site.folder / "data" / "style.safetensors"), *options, "--kind", "causal_lm")
    assert "is a LoRA of diffusers, and 'causal_lm' is no kind of a pipeline" in result.output
    assert "there is no such folder or file" in onebasis("import", "/gone.safetensors", *options).output


def test_an_adapter_at_a_url_is_refused_by_that_url(onebasis: Onebasis) -> None:
    result = onebasis("import", "https://hub/a", "--team", "red", "--name", "x", "--base-model", "tiny")
    assert result.exit_code == 2
    assert "https://hub/a" in result.output
    assert "is a URL, and only files, folders and s3:// are read" in result.output


@pytest.mark.changes
def test_a_worker_is_drained_and_taken_back_and_shown_by_its_pool(site: Site, onebasis: Onebasis) -> None:
    shown = onebasis("workers").stdout
    assert "default  2 warm (of 2)" in shown
    assert "worker-0  free  on 10.0.0.1" in shown
    for nothing in ((), ("worker-0", "--node", "10.0.0.1")):
        refused = onebasis("drain", *nothing)
        assert (refused.exit_code, "names not exactly one of" in refused.stderr) == (2, True)
    assert "there is no worker of that name" in onebasis("drain", "worker-7").stderr
    assert "--undo stands beside" in onebasis("drain", "worker-0", "--undo", "--wait").stderr
    drained = onebasis("drain", "worker-0", "--reason", "new kernel", "--wait", "--json")
    answer = json.loads(drained.stdout)
    assert (answer["drain"]["reason"], answer["given_back"], answer["workers"]) == ("new kernel", True, {})
    assert "worker-0" not in json.loads(onebasis("workers", "--json").stdout)["pools"]["default"]["workers"]
    status = onebasis("status").stdout
    assert "pool     default: 1 warm (of 2)" in status
    assert "worker-0 is drained by ann for" in status
    assert "`onebasis drain --undo worker-0` takes it back" in status
    assert "tasks are given there again" in onebasis("drain", "worker-0", "--undo").stderr


@pytest.mark.changes
def test_drain_with_wait_stays_until_what_trains_has_ended_and_tells_how_it_gets_on(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.train("red/one", "red/two")
    looks = []

    def released(seconds: float) -> None:
        looks.append(site.client.ask(ShowTask(reference="red/one"))["state"])
        if len(looks) == 3:
            site.plant.cluster.release()

    monkeypatch.setattr(cli.time, "sleep", released)
    done = onebasis("drain", "--node", "10.0.0.1", "--let-end", "--wait")
    assert done.exit_code == 0
    assert looks[:3] == ["training"] * 3
    assert "10.0.0.1 is drained; waiting until its places are given back" in done.stderr
    assert re.search(r"worker-0: .*training \w+; the machine 10.0.0.1 is drained by", done.stderr)
    assert "worker-1: its places are given back" in done.stderr
    assert done.stderr.splitlines()[-1] == "machine 10.0.0.1: all its places are given back"
    assert onebasis("drain", "--node", "10.0.0.1", "--undo").exit_code == 0  # there is no other to score them on
    assert [site.wait_for(f"red/{name}", "published")["attempt"] for name in ("one", "two")] == [1, 1]


@pytest.mark.changes
def test_drain_with_wait_ends_when_somebody_takes_the_drain_back_or_types_ctrl_c(
    site: Site, onebasis: Onebasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.train("red/one", "red/two")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", interrupted)
    stopped = onebasis("drain", "worker-0", "--let-end", "--wait")
    assert (stopped.exit_code, "what was drained stays drained" in stopped.stderr) == (130, True)
    assert [drain.what for drain in site.plant.queue.drains()] == ["worker-0"]
    undone = DrainWorker(what="worker-0", undo=True, by="bob")
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: site.client.ask(undone))
    refused = onebasis("drain", "worker-0", "--let-end", "--wait")
    assert refused.exit_code == 4
    assert "somebody took the drain of worker-0 back" in refused.stderr
    site.plant.cluster.release()


def test_a_warning_of_a_task_is_shown_once_and_not_again_in_its_events(site: Site, onebasis: Onebasis) -> None:
    shown = onebasis("task", "red/alpha").stdout
    few = "the score rests on one evaluation row"
    assert (shown.count(few), "submitted        submitted" in shown) == (1, True)
    assert few in onebasis("logs", "red/alpha").stdout
