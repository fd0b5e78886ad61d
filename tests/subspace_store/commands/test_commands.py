"""`onebasis store …` as a person or a script uses it, on a store in a folder."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from configs.errors import InvalidInput, Unavailable
from configs.settings import SubspaceSettings
from subspace_store import SubspaceStore, canonical_update
from subspace_store.adapter import SIZED
from subspace_store.commands import terminal
from subspace_store.commands.app import SERVICE, app
from subspace_store.commands.state_folder import SERVER_MODULE, running_server
from subspace_store.commands.terminal import me
from subspace_store.formats.peft import write_peft_folder
from subspace_store.log.version import TaskScore
from subspace_store.merging.reorder import reorder
from subspace_store.merging.variants import VARIANTS, merge_all
from subspace_store.requests import Tag
from subspace_store.storage.local import LocalStorage
from tests.builders import settings
from tests.subspace_store.builders import merged, opened, random_adapter, reading

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
Command = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path) -> SubspaceStore:
    """Three published versions in a folder."""
    store = opened(LocalStorage(str(tmp_path / "place")))
    for number in (1, 2, 3):
        merged(store, {f"t{number}": random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="test")
    return store


@pytest.fixture
def run(store: SubspaceStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command on the store of the fixture, by its address."""
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(terminal.console, "width", 200)
    return lambda *arguments, **options: CliRunner().invoke(
        app, [*arguments, "--store", store.storage.url], **options, prog_name="store"
    )


def with_doubles(store: SubspaceStore) -> None:
    """Eight tasks more, all of the same adapter, that came one by one: merged at once they take less."""
    writer = opened(store.storage, share="if-it-pays", seed_directions=0)
    for number in range(4, 12):
        merged(writer, {f"t{number}": random_adapter(7)})
        writer.publish(number, op_key=f"publish {number}", actor="test")
    store.refresh()


def in_the_span_of_one(store: SubspaceStore) -> None:
    """A task that makes sixty directions of a module, and after it eight that need a mixture of them each, of rank 16:
    they cost little. Without it the first two of them would make 32 directions, of which the others have no use."""
    draw = torch.Generator().manual_seed(0)
    update = canonical_update(torch.randn(400, 60, generator=draw), torch.randn(60, 300, generator=draw), 1.0)
    wide = replace(random_adapter(8), modules={"wide": update}, info={})
    tasks = {"wide": replace(wide, info={SIZED: "held"})}  # all its directions are kept
    for number in range(8):
        b_NR, a_DR = (columns @ torch.randn(60, 16, generator=draw) for columns in (update.u_NR, update.v_DR))
        tasks[f"narrow-{number}"] = replace(wide, modules={"wide": canonical_update(b_NR, a_DR.T, 1.0)})
    for number, (task, adapter) in enumerate(tasks.items(), start=4):
        writer = opened(store.storage, share="if-it-pays", seed_directions=64 if task == "wide" else 32)
        merged(writer, {task: adapter})
        writer.publish(number, op_key=f"publish {number}", actor="test")
    store.refresh()


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_one_sentence_and_the_options_that_all_have(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    described = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert "." in described.help
    assert all(getattr(option, "help", "x") for option in described.params)
    for option in ("--json",) if command == "chaos" else ("--store", "--state-dir", "--json"):
        assert option in result.output


SLOW = {
    "hold": ["why"],
    "withdraw": ["hold:1"],
    "remove": ["t3", "--yes"],
    "compact": ["--yes"],
    "pin": ["3", "--owner", "ann"],
    "collect": ["--really"],
    "verify": [],
    "log": [],
    "compare": [],
    "doctor": [],
}


@pytest.mark.parametrize("command", SLOW)
def test_a_command_that_waits_for_a_slow_store_says_so(
    run: Command, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(terminal, "TELL_SECONDS", 0.02)
    really = LocalStorage.read

    def slow(self: LocalStorage, key: str) -> bytes:
        time.sleep(0.05)
        return really(self, key)

    monkeypatch.setattr(LocalStorage, "read", slow)
    result = run(command, *SLOW[command])
    assert result.exit_code == 0, result.output
    assert re.search(r"still (reading|writing|looking|checking|examining) .*, for 0 s", result.stderr)


def test_short_blocks_without_a_word_are_one_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FIRST_SECONDS", 0.4)
    said: list[str] = []
    terminal.note("begins")
    for _ in range(3):
        with terminal.telling("waiting", said.append):
            time.sleep(0.35)  # each alone is shorter than what is told
    assert said
    assert terminal.silent_seconds() >= 3 * 0.35


def test_a_version_is_tagged_by_any_of_its_names_and_the_tag_is_one_from_then_on(
    run: Command, store: SubspaceStore
) -> None:
    assert answer(run("tags", "--json")) == {}
    told = answer(run("tag", "gold", "main", "--json"))
    assert told == {"operation": "tag", "repeated": False, "name": "gold", "version": 3, "op_key": told["op_key"]}
    assert told["op_key"] in store.refresh().op_keys
    assert run("tag", "same", "gold").stderr == "same is version 3\n"
    assert run("tag", "old", "1").exit_code == 0
    assert answer(run("tags", "--json")) == {"old": 1, "gold": 3, "same": 3}
    assert [line.split() for line in run("tags").stdout.splitlines()[1:]] == [
        ["old", "1"],
        ["gold", "3"],
        ["same", "3"],
    ]
    assert store.refresh().epoch == 4
    refused = run("tag", "gold", "2")
    assert (refused.exit_code, "tag 'gold' is version 3, for ever" in refused.stderr) == (4, True)
    assert run("tag", "x", "silver").exit_code == 3


def test_main_is_held_with_a_reason_and_released(run: Command, store: SubspaceStore) -> None:
    assert run("hold", "customers complain").exit_code == 0
    held = store.refresh().held
    assert held is not None
    assert (held.actor, held.reason) == ("ann", "customers complain")
    assert run("release").exit_code == 0
    assert store.refresh().held is None


def test_a_task_is_quarantined_by_id_or_by_the_name_it_was_merged_under(run: Command, store: SubspaceStore) -> None:
    assert run("quarantine", "team/t2", "poisoned").exit_code == 0
    assert run("quarantine", "unborn", "poisoned too").exit_code == 0
    assert store.refresh().quarantined == {"t2": "poisoned", "unborn": "poisoned too"}
    assert run("unquarantine", "t2").exit_code == 0
    assert store.refresh().quarantined == {"unborn": "poisoned too"}
    assert run("quarantine", "team/unborn", "why").exit_code == 3


def test_pins_have_an_owner_and_an_end(run: Command, store: SubspaceStore) -> None:
    answer(run("pin", "1", "--json"))
    assert answer(run("pin", "2", "--owner", "serving", "--days", "2", "--json"))["days"] == 2
    listed = answer(run("pins", "--json"))
    until = listed[-1]["until"]
    assert listed == [
        {"version": 1, "owner": "ann", "until": None},
        {"version": 2, "owner": "serving", "until": until},
    ]
    assert until - store.refresh().versions[1].created_at == pytest.approx(2 * 86400, abs=600)
    assert re.search(r"1 +ann +until unpinned", run("pins").stdout)
    assert run("unpin", "1").exit_code == 0
    assert list(store.refresh().pins) == [2]
    assert {run("pin", "1", "--days", days).exit_code for days in ("nan", "inf", "-1")} == {2}


def test_variants_are_compared_on_the_adapters_of_a_version_as_they_were_delivered(
    run: Command, store: SubspaceStore
) -> None:
    adapters = {f"t{number}": random_adapter(number) for number in (1, 2, 3)}
    found = answer(run("compare", "--rank", "6", "--json"))
    assert tuple(found) == VARIANTS
    for variant in VARIANTS:
        merged = merge_all(adapters, variant, SubspaceSettings(rank_fixed=6))
        assert found[variant]["error"] == pytest.approx(merged.error)
        assert found[variant]["mean_error"] == pytest.approx(sum(merged.error.values()) / 3)
        assert found[variant]["stored_numbers"] == merged.stored_numbers
    assert list(answer(run("compare", "1", "--json"))["mean"]["error"]) == ["t1"]
    assert re.search(r"separate +0.0000 +0.0000 +960 *\n", run("compare").stdout)  # 3 tasks · 4 · (24 + 20 + 16 + 20)
    assert run("compare", "0").exit_code == 2


def test_a_variant_that_the_adapters_cannot_be_merged_in_is_named(run: Command, store: SubspaceStore) -> None:
    adapter = random_adapter(4)
    bare = {n: replace(u, gauge_out_RR=None, gauge_in_RR=None) for n, u in adapter.modules.items()}
    merged(store, {"t4": replace(adapter, modules=bare)})
    result = run("compare", "candidate", "--json")
    assert set(answer(result)) == set(VARIANTS) - {"paper"}
    assert "left out: paper: the factors B and A it was trained as are not known" in result.stderr


def test_other_merge_orders_are_tried_on_the_adapters_of_a_version(run: Command, store: SubspaceStore) -> None:
    adapters = {f"t{number}": random_adapter(number) for number in (1, 2, 3)}
    report = reorder(adapters, SubspaceSettings(rank_fixed=6), orders=4, seed=9)
    found = answer(run("reorder", "--rank", "6", "--orders", "4", "--seed", "9", "--json"))
    assert [row["task_id"] for row in found["tasks"]] == list(adapters)
    for row in found["tasks"]:
        spread = report.of_task(row["task_id"])
        assert row["orders"] == pytest.approx({"low": spread.low, "median": spread.median, "high": spread.high})
        assert row["given"] == pytest.approx(report.given[row["task_id"]])
        assert row["at_once"] == pytest.approx(report.at_once[row["task_id"]])
    assert found["mean"]["orders"]["median"] == pytest.approx(report.of_mean.median)
    assert f"{report.of_mean.high:.4f}" in run("reorder", "--rank", "6", "--orders", "4", "--seed", "9").stdout
    assert store.refresh().refs["main"] == 3


def test_nothing_expires_and_nothing_is_deleted_unless_it_is_said_twice(run: Command, store: SubspaceStore) -> None:
    everything = store.storage.keys("")
    assert answer(run("expire", "--keep-last", "1", "--json")) == {"versions": [1, 2], "expired": False}
    assert "would expire: versions 1, 2 (--yes does it)" in run("expire", "--keep-last", "1").stderr
    assert answer(run("collect", "--json"))["deleted"] is False
    assert store.storage.keys("") == everything
    run("expire", "--keep-last", "1", "--yes")
    assert store.refresh().expired == (1, 2)
    would = answer(run("collect", "--json"))
    assert would["blobs"]
    assert set(would["blobs"]) < set(store.storage.keys("blobs/"))
    assert answer(run("collect", "--really", "--json")) == would | {"deleted": True}
    assert not set(would["blobs"]) & set(store.storage.keys("blobs/"))
    assert answer(run("verify", "--deep", "--json")) == []
    assert "nothing can expire" in run("expire", "--keep-last", "1", "--yes").stderr


def test_versions_expire_by_name_unless_something_needs_them(run: Command, store: SubspaceStore) -> None:
    run("pin", "1")
    needed = run("expire", "1", "2", "--yes")
    assert (needed.exit_code, "version 1 is needed: ann pinned it" in needed.stderr) == (4, True)
    run("unpin", "1")
    assert run("expire", "2", "1").stderr == "would expire: versions 2, 1 (--yes does it)\n"
    assert run("expire", "1", "2", "--yes").exit_code == 0
    assert store.refresh().expired == (1, 2)
    for wrong in ([], ["1", "--keep-last", "1"], ["--keep-last", "0"]):
        assert run("expire", *wrong).exit_code == 2


def test_adapters_are_let_go_of_by_name_and_then_collected(run: Command, store: SubspaceStore) -> None:
    adapters = [task.adapter for number in (1, 2) for task in store.state.versions[number].added]
    size = sum(ref.size_bytes for ref in adapters) / 1e6
    would = run("drop-adapters", "team/t1", "t2")
    assert would.stderr == f"would let go of 2 adapters, {size:.1f} MB (--yes does it)\n"
    assert store.refresh().heads == {}
    assert run("drop-adapters", "team/t1", "t2", "--yes").exit_code == 0
    assert set(store.refresh().heads) == {ref.key for ref in adapters}
    assert set(answer(run("collect", "--json"))["blobs"]) == {ref.key for ref in adapters}
    assert run("drop-adapters", "team/t1", "--yes").stderr == "nothing to let go\n"


def test_the_log_is_shown_whole_or_its_end(run: Command, store: SubspaceStore) -> None:
    store.record_scores(3, [TaskScore(task_id="t3", score=0.5, count=1)], op_key="scores 3", actor="test")
    run("hold", "[red]why[/red]")
    entries = answer(run("log", "--json"))
    assert [entry["op"] for entry in entries] == ["acquire", *["merge", "publish"] * 3, "scores", "acquire", "hold"]
    assert answer(run("log", "--last", "2", "--json")) == entries[-2:]
    assert run("log", "--last", "0").exit_code == 2
    shown = run("log").stdout
    assert "version 1: team/t1" in shown
    assert re.search(r"version 3: 1 score$", shown, re.MULTILINE)
    assert "[red]why[/red]" in shown


def test_verify_finds_a_lost_object_at_once_and_a_changed_one_with_deep(run: Command, store: SubspaceStore) -> None:
    assert "the log and the sizes of all objects are right; --deep reads their bytes too" in run("verify").stdout
    assert "is as its log says: every byte was read" in run("verify", "--deep").stdout
    for how in ((), ("--deep",)):  # what it cannot know, it says
        assert "not checked: the rows of the tasks (data/), which the log does not name" in run("verify", *how).stdout
    version = store.state.versions[2]
    content = store.storage.read(version.basis.key)
    store.storage.write(version.basis.key, content[:-1] + bytes([content[-1] ^ 1]))
    assert run("verify").exit_code == 0
    deep = run("verify", "--deep", "--json")
    assert deep.exit_code == 7
    (told,) = json.loads(deep.stdout)  # once, though version 3 needs it as well
    assert told["where"].endswith(version.basis.key)
    assert told["of"] == "the bases of version 2"
    said = run("verify", "--deep")
    assert f"{version.basis.key} (the bases of version 2): " in said.stdout
    assert "restore what is named from a backup" in said.stderr
    assert "docs/trouble.md#corrupt" in said.stderr
    store.storage.write(version.basis.key, content + b"x")
    assert run("verify").exit_code == 7
    store.storage.delete(version.basis.key)
    lost = run("verify")
    assert (lost.exit_code, "gone" in lost.stdout) == (7, True)


def test_the_doctor_says_what_it_tried(run: Command, store: SubspaceStore) -> None:
    before = store.storage.keys("")
    checks = answer(run("doctor", "--json"))
    assert checks
    assert all(check["ok"] for check in checks)
    assert run("doctor").stdout.count("ok") >= len(checks)
    assert store.storage.keys("") == before


def test_reading_commands_fence_nobody(run: Command, store: SubspaceStore) -> None:
    for command in (["tags"], ["pins"], ["log"], ["verify"], ["collect"], ["expire", "--keep-last", "1"]):
        assert run(*command).exit_code == 0
    assert store.refresh().epoch == 1


def test_an_address_without_a_store_is_told_and_nothing_is_made_there(tmp_path: Path) -> None:
    for command in (["tags"], ["hold", "why"], ["collect", "--really"]):
        result = CliRunner().invoke(app, [*command, "--store", f"file:{tmp_path}/typo", "--state-dir", str(tmp_path)])
        assert result.exit_code == 3
        assert "no store is here" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_service_and_an_address_the_command_says_what_to_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tags", "--state-dir", str(tmp_path), "--json"])
    assert result.exit_code == 5
    assert "--store URL" in json.loads(result.stdout)["error"]["todo"]


WRITES = {
    "tag": ["gold", "2"],
    "hold": ["why"],
    "release": [],
    "quarantine": ["t1", "poisoned"],
    "unquarantine": ["t1"],
    "pin": ["2", "--owner", "me"],
    "unpin": ["2", "--owner", "me"],
    "expire": ["1", "--yes"],
    "drop-adapters": ["t1", "--yes"],
    "remove": ["t1", "--yes"],
    "compact": ["--yes"],
    "restore-revision": ["t1", "--yes"],
}
"""A command to arguments with which it writes a record."""


@pytest.mark.parametrize("command", WRITES)
def test_a_command_that_is_asked_again_under_its_key_is_done_once(
    run: Command, store: SubspaceStore, command: str
) -> None:
    if command == "release":
        store.hold("audit", actor="ann")
    elif command == "unquarantine":
        store.quarantine("t1", "why", actor="ann")
    elif command == "unpin":
        store.pin(2, "me", actor="ann")
    elif command == "compact":
        with_doubles(store)
    elif command == "restore-revision":
        merged(store, {"t1@2": random_adapter(9)}, replaces={"t1@2": "t1"})
        store.publish(4, op_key="publish 4", actor="test")
    first = answer(run(command, *WRITES[command], "--op-key", f"{command} of monday", "--json"))
    assert first["op_key"] == f"{command} of monday"
    store.refresh()
    done = [entry.op for entry in store.history()]
    again = run(command, *WRITES[command], "--op-key", f"{command} of monday")
    assert again.exit_code == 0
    store.refresh()
    assert [entry.op for entry in store.history() if entry.op != "acquire"] == [op for op in done if op != "acquire"]


def test_a_key_begins_with_what_it_is_a_key_of(run: Command, store: SubspaceStore) -> None:
    refused = run("tag", "gold", "2", "--op-key", "release of monday")
    assert (refused.exit_code, "op_key: has to begin with tag" in refused.stderr) == (2, True)
    assert store.refresh().tags == {}


def test_every_command_that_writes_takes_a_key() -> None:
    with_key = {
        name
        for name, described in get_command(app).commands.items()  # type: ignore[attr-defined]
        if any("--op-key" in option.opts for option in described.params)
    }
    assert with_key == WRITES.keys()
    assert with_key | {"collect", "withdraw"} == {  # these two may be repeated as they are
        name
        for name, described in get_command(app).commands.items()  # type: ignore[attr-defined]
        if any("--force" in option.opts for option in described.params)
    }


def test_when_nobody_knows_whether_it_was_done_the_key_to_ask_again_is_told(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: object, *args: object, **keys: object) -> None:
        raise Unavailable("the storage is away", "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(SubspaceStore, "hold", away)
        result = run("hold", "why", "--json")
    error = json.loads(result.stdout)["error"]
    (key,) = re.findall(r"--op-key (hold:[0-9a-f]+):", error["todo"])
    assert (result.exit_code, error["code"], error["op_key"]) == (5, "outcome-unknown", key)
    assert error["what"] == "the outcome of hold is unknown: the storage is away"
    assert answer(run("hold", "why", "--op-key", key, "--json"))["op_key"] == key


def test_a_request_is_withdrawn_or_said_to_be_done(run: Command, store: SubspaceStore) -> None:
    assert run("tag", "gold", "2", "--op-key", "tag of monday").exit_code == 0
    done = run("withdraw", "tag of monday")
    assert (done.exit_code, "'tag of monday' was done, it made or concerns version 2" in done.stderr) == (4, True)
    assert run("withdraw", "tag of tuesday").stderr == (
        "tag of tuesday was not done, and will not be unless somebody asks for it again\n"
    )


def test_a_request_that_was_done_before_is_not_told_as_if_it_were_done_now(run: Command, store: SubspaceStore) -> None:
    assert run("hold", "an audit", "--op-key", "hold:1").stderr == "main is held\n"
    assert run("release").stderr == "main may move\n"
    again = run("hold", "an audit", "--op-key", "hold:1")
    assert (again.exit_code, again.stderr) == (
        0,
        "this was done before under 'hold:1', and nothing was changed now\n",
    )
    assert answer(run("hold", "an audit", "--op-key", "hold:1", "--json"))["repeated"] is True
    assert store.refresh().held is None


def test_a_quarantine_of_an_id_that_was_never_merged_says_so(run: Command, store: SubspaceStore) -> None:
    assert "no task of this id was merged here yet" in run("quarantine", "typo", "bad").stderr
    known = next(iter(store.state.tasks_at(3)))
    assert "no task of this id" not in run("quarantine", known, "bad").stderr


# Beside a service


@pytest.fixture
def served(store: SubspaceStore, tmp_path: Path) -> Path:
    """A state folder whose service writes to the store, as far as anybody can see."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    chosen = settings(state_dir, storage={"url": f"file:{tmp_path}"}, base_model=_base("place"))
    (state_dir / "settings.yaml").write_text(json.dumps(chosen.model_dump(mode="json")))
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()", SERVER_MODULE, str(state_dir)]
    with subprocess.Popen(sleeper, stdin=subprocess.PIPE) as server:
        (state_dir / "server.json").write_text(json.dumps({"pid": server.pid}))
        while running_server(state_dir) is None:  # a new process has no command line for a moment
            time.sleep(0.01)
        yield state_dir
        server.communicate()


def _base(name: str) -> dict[str, str]:
    return {"name": name, "source": "nowhere", "weights_sha256": "0" * 64}


def test_while_a_service_writes_a_command_does_not_unless_it_is_forced_by_address(
    store: SubspaceStore, served: Path
) -> None:
    runner = CliRunner()
    here = ["--state-dir", str(served)]
    for command in (["hold", "why"], ["collect", "--really"], ["hold", "why", "--force"]):
        for where in (here, [*here, "--store", store.storage.url]):
            if "--force" in command and "--store" in where:
                continue
            refused = runner.invoke(app, [*command, *where])
            assert (refused.exit_code, "onebasis down" in refused.stderr) == (4, True), (command, where)
    assert store.refresh().epoch == 1
    assert runner.invoke(app, ["tags", *here]).exit_code == 0
    assert runner.invoke(app, ["hold", "why", *here, "--store", store.storage.url, "--force"]).exit_code == 0
    assert store.refresh().held is not None


def test_what_is_written_through_the_running_service_fences_nobody(
    store: SubspaceStore, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    token = SERVICE.set(lambda *request: asked.append(request))
    monkeypatch.chdir(served.parent)  # the service was started with a full path, a person seldom types one
    result = CliRunner().invoke(app, ["tag", "gold", "main", "--state-dir", served.name])
    SERVICE.reset(token)
    assert result.exit_code == 0
    ((state_dir, request),) = asked
    assert (state_dir, request) == (
        Path(served.name),
        Tag(base_model="place", name="gold", version=3, op_key=request.op_key, actor=me()),
    )
    assert store.refresh().epoch == 1


def test_another_store_than_the_services_is_written_to_beside_it(served: Path, tmp_path: Path) -> None:
    other = opened(LocalStorage(str(tmp_path / "other")))
    result = CliRunner().invoke(app, ["hold", "why", "--state-dir", str(served), "--store", other.storage.url])
    assert result.exit_code == 0
    assert other.refresh().held is not None


def test_the_service_here_is_the_default_once_it_is_down(store: SubspaceStore, served: Path) -> None:
    (served / "server.json").write_text('{"pid": 0}')
    assert CliRunner().invoke(app, ["tag", "gold", "2", "--state-dir", str(served)]).exit_code == 0
    assert store.refresh().tags == {"gold": 2}


def test_the_package_itself_is_the_command(
    store: SubspaceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["subspace_store", "pins", "--store", store.storage.url, "--json"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("subspace_store", run_name="__main__")  # as `python -m` does
    assert (end.value.code, json.loads(capsys.readouterr().out)) == (0, [])


def test_a_forecast_reads_adapter_folders_and_tells_what_merging_would_cost(
    run: Command, store: SubspaceStore, tmp_path: Path
) -> None:
    write_peft_folder(tmp_path / "new", random_adapter(9), "tiny")
    found = answer(run("forecast", str(tmp_path / "new"), "--json"))
    expected = reading(store.storage, share="if-it-pays").forecast({"x": random_adapter(9)})  # the command's default
    assert found["parent"] == 3
    assert list(found["error_at_birth"].values()) == pytest.approx([expected.error_at_birth["x"]], rel=1e-4)
    assert found["drift"] == pytest.approx(expected.drift, abs=1e-6)
    text = run("forecast", str(tmp_path / "new")).stdout
    assert "team/t1" in text
    assert "energy in the basis already" in text
    assert "no such folder" in run("forecast", str(tmp_path / "gone")).output


def test_a_task_is_removed_only_with_yes_and_main_follows(run: Command, store: SubspaceStore) -> None:
    before, told = store.footprint(3).total_numbers, answer(run("remove", "team/t2", "--json"))
    after = told.pop("numbers_after")
    assert told == {
        "task_id": "t2", "revisions": ["t2"], "start": 1, "versions": [3], "numbers_before": before, "removed": False,
    }  # fmt: skip
    assert f"all tasks would take {after:,} numbers instead of {before:,}\n" in run("remove", "team/t2").stderr
    assert "would go back to version 1 and make 1 version again: 3 " in run("remove", "team/t2").stderr
    assert "would go back to version 2 and make none again " in run("remove", "team/t3").stderr
    assert store.refresh().refs["main"] == 3
    done = answer(run("remove", "team/t2", "--yes", "--reason", "licence", "--json"))
    key = "remove t2 from 3, time 1"
    assert done == {
        "task_id": "t2", "version": 4, "approximate": [], "removed": True, "repeated": False, "op_key": key,
        "numbers_before": before, "numbers_after": after,
    }  # fmt: skip
    reader = reading(store.storage)
    assert reader.footprint(4).total_numbers == after < before
    assert reader.state.refs == {"candidate": 4, "main": 4}
    assert list(reader.state.tasks_at(4)) == ["t1", "t3"]
    assert "team/t2: version 3 → 4: licence" in run("log").stdout
    assert "does not hold team/t2" in run("remove", "team/t2", "--yes").output
    opened(store.storage).rollback(3, op_key="back", actor="test")
    again = answer(run("remove", "team/t2", "--yes", "--op-key", key, "--json"))
    assert (again["repeated"], again["removed"]) == (True, False)
    assert "was done before under" in run("remove", "team/t2", "--yes", "--op-key", key).stderr
    assert "t2" in store.refresh().tasks_at(store.state.refs["main"])
    assert answer(run("remove", "team/t2", "--yes", "--json"))["version"] == 5
    assert list(store.refresh().tasks_at(store.state.refs["main"])) == ["t1", "t3"]


def test_tasks_are_merged_at_once_only_with_yes_and_only_if_that_takes_less(run: Command, store: SubspaceStore) -> None:
    assert "nothing is gained, and nothing is done" in run("compact", "--yes").stderr
    assert max(store.refresh().versions) == 3
    with_doubles(store)
    tasks = list(store.state.tasks_at(11))
    shown = answer(run("compact", "--json"))
    assert (shown["version"], shown["tasks"], shown["compacted"]) == (11, 11, False)
    assert shown["numbers_before"] == store.footprint(11).total_numbers
    assert f"{shown['numbers_after']:,} numbers instead of {shown['numbers_before']:,}" in run("compact").stderr
    assert store.refresh().refs["main"] == 11
    done = answer(run("compact", "--yes", "--json"))
    key = "compact 11, time 1"
    assert done == {
        "version": 12, "numbers": shown["numbers_after"], "compacted": True, "repeated": False, "op_key": key,
    }  # fmt: skip
    assert store.refresh().refs == {"candidate": 12, "main": 12}
    assert store.footprint(12).total_numbers == shown["numbers_after"] < shown["numbers_before"]
    assert list(store.state.tasks_at(12)) == tasks
    assert "version 11 → 12: all tasks at once" in run("log").stdout
    again = answer(run("compact", "--yes", "--op-key", key, "--json"))
    assert (again["version"], again["repeated"], again["compacted"]) == (12, True, False)
    assert "was done before under" in run("compact", "--op-key", key).stderr
    assert "would expire: versions 1, 2" in (said := run("expire", "--keep-last", "10").stderr)  # of all that main was
    assert "3" not in said.partition("versions")[2].partition("(")[0]


def test_removing_tells_of_every_task_that_was_merged_from_its_coefficients(run: Command, store: SubspaceStore) -> None:
    store.drop_adapters(["t2"], actor="me")
    done = answer(run("remove", "t1", "--yes", "--json"))
    assert (done["version"], done["approximate"]) == (5, ["t2"])  # by version 4, on the way
    opened(store.storage).rollback(3, op_key="back", actor="me")
    told = run("remove", "t1", "--yes").stderr
    assert "version 7 is as if t1 had never been merged, but approximate" in told
    assert "from their coefficients were t2; all tasks take " in told


def test_a_removal_that_makes_the_rest_larger_is_told_with_what_helps(run: Command, store: SubspaceStore) -> None:
    in_the_span_of_one(store)
    before = store.footprint(store.state.refs["candidate"]).total_numbers
    told = run("remove", "wide").stderr
    after = answer(run("remove", "wide", "--json"))["numbers_after"]
    assert after > before
    more = f"{after:,} numbers instead of {before:,}, {after - before:,} more: "
    assert f"all tasks would take {more}" in told
    assert "`onebasis store compact`" in told
    done = run("remove", "wide", "--yes").stderr
    assert f"all tasks take {more}" in done
    assert "`onebasis store compact`" in done


def test_one_adapter_for_all_tasks_tells_its_size_and_what_it_is_worth_to_each(run: Command, tmp_path: Path) -> None:
    said = run("export", "-o", str(tmp_path / "out"), "--one", "iso_c", "--rank", "6", "--base", "hub/base")
    assert said.exit_code == 0, said.output
    assert re.search(r"one=iso_c@v\d+: one adapter for \d tasks, rank 6, [\d,]+ bytes", said.output.replace("\n", ""))
    assert re.search(r"team/t1 +\d\.\d{4}", said.output)
    assert run("export", "-o", str(tmp_path / "out"), "--rank", "6").exit_code == 2


def test_all_tasks_of_a_version_are_exported_and_listed(run: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = answer(run("export", "-o", str(out), "--base", "hub/base", "--json"))
    assert [one["name"] for one in found] == ["team+t1@v3", "team+t2@v3", "team+t3@v3"]
    assert run("export", "team/t1", "-o", str(out), "--version", "2", "--base", "hub/base").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapters.json", "team+t1@v2", "team+t1@v3", "team+t2@v3", "team+t3@v3",
    ]  # fmt: skip
    assert len(json.loads((out / "adapters.json").read_text())) == 4


def test_a_folder_above_a_store_is_answered_with_the_stores_own(store: SubspaceStore, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "--store", f"file:{tmp_path}"])
    assert result.exit_code == 3
    assert f"name the folder that FORMAT is in: --store file:{tmp_path}/place" in result.stderr.replace("\n", " ")


def test_what_was_quarantined_before_it_was_merged_is_let_out_again_and_the_unknown_is_not(run: Command) -> None:
    assert run("unquarantine", "later").exit_code == 3
    assert run("quarantine", "later", "broken").exit_code == 0
    assert run("unquarantine", "later", "--op-key", "unquarantine:1").exit_code == 0
    assert "done before" in run("unquarantine", "later", "--op-key", "unquarantine:1").stderr
    assert run("unquarantine", "later").exit_code == 3


# Revisions


@pytest.fixture
def revised(store: SubspaceStore) -> SubspaceStore:
    """The store of the fixture, and a fourth version with a second revision of team/t1, published."""
    merged(store, {"t1@2": random_adapter(9)}, replaces={"t1@2": "t1"})
    store.publish(4, op_key="publish 4", actor="test")
    return store


def test_the_log_says_that_a_revision_was_replaced(run: Command, revised: SubspaceStore) -> None:
    assert "version 4: team/t1 (revision replaced)" in run("log").stdout
    assert answer(run("log", "--json"))[-2]["op"] == "merge-replacing"


def test_a_revision_is_put_back_only_with_yes_and_main_follows(run: Command, revised: SubspaceStore) -> None:
    told = answer(run("restore-revision", "t1", "--json"))
    error = told.pop("error")
    assert told == {"task_id": "t1", "leaving": "t1@2", "version": 4, "approximate": False, "restored": False}
    text = run("restore-revision", "t1").stderr
    assert "team/t1: t1 would take the place of t1@2 in version 4, with an error of" in text
    assert "(--yes does it)" in text
    assert revised.refresh().refs == {"candidate": 4, "main": 4}
    done = answer(run("restore-revision", "t1", "--yes", "--json"))
    key = "restore-revision t1 in 4, time 1"
    assert done == {
        "task_id": "t1", "leaving": "t1@2", "version": 5, "error": pytest.approx(error, abs=1e-6), "approximate": False,
        "restored": True, "repeated": False, "op_key": key,
    }  # fmt: skip
    state = reading(revised.storage).state
    assert (state.refs, 5 in state.published) == ({"candidate": 5, "main": 5}, True)
    assert list(state.tasks_at(5)) == ["t2", "t3", "t1"]
    again = answer(run("restore-revision", "t1", "--yes", "--op-key", key, "--json"))
    assert (again["version"], again["repeated"], again["restored"]) == (5, True, False)
    assert "version 5, the candidate, holds it" in run("restore-revision", "t1", "--yes").output
    said = run("restore-revision", "t1@2", "--yes", "--candidate-only").stderr
    assert "version 6: team/t1: revision replaced, t1@2 is back with an error of" in said
    assert revised.refresh().refs == {"candidate": 6, "main": 5}
    assert "version 6, the candidate, is not judged yet" in run("restore-revision", "t1", "--yes").output


def test_the_name_of_a_task_means_the_revision_that_is_there(run: Command, revised: SubspaceStore) -> None:
    text = run("remove", "team/t1").stderr
    assert "all 2 revisions go: t1, t1@2\n" in text
    assert "it holds another revision of that task, t1@2" in run("remove", "t1", "--yes").output
    done = run("remove", "team/t1", "--yes")
    assert "had never been merged, nor any of its revisions: t1, t1@2" in done.stderr.replace("\n", " ")
    assert list(reading(revised.storage).state.tasks_at(revised.refresh().refs["main"])) == ["t2", "t3"]


def test_a_forecast_is_told_what_an_adapter_would_replace(run: Command, store: SubspaceStore, tmp_path: Path) -> None:
    write_peft_folder(tmp_path / "new", random_adapter(9), "tiny")
    found = answer(run("forecast", str(tmp_path / "new"), "--replaces", "team/t1", "--json"))
    assert set(found["drift"]) == set(found["error"]) == {"t2", "t3"}
    assert "team/t1" not in run("forecast", str(tmp_path / "new"), "--replaces", "t1").stdout
    both = run("forecast", str(tmp_path / "new"), str(tmp_path / "new"), "--replaces", "t1")
    assert (both.exit_code, "one adapter takes the place of a task" in both.output) == (InvalidInput.exit_code, True)
