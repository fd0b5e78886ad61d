"""The demo as a newcomer runs it, and its numbers recomputed without the code that made them."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.settings import StorageSettings, SubspaceSettings
from subspace_store import SubspaceReader, SubspaceStore, open_storage
from subspace_store.merging.basis import reconstruct
from subspace_store.merging.merge import merge_adapters
from tests.acceptance.conftest import ONEBASIS, ROOT, Site

pytestmark = pytest.mark.timeout(1200)

TOLD = "demo.txt"
"""Where what the demo printed is kept."""
DOWN = 10
"""Exit code of `onebasis status` where no service runs."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The state that `make demo` leaves behind, with one task of `auto` instead of two and half the steps for what is
    learnt fast, which saves minutes."""
    site = Site(tmp_path_factory.mktemp("demo"))
    examples = shutil.copytree(ROOT / "examples", site.folder / "examples")
    shorter = {"contradiction": ("method: {name: auto}", "method: {name: lora}")}
    shorter |= dict.fromkeys(("card-orders", "charges"), ("max_steps: 130", "max_steps: 65"))
    shorter |= dict.fromkeys(("account",), ("max_steps: 140", "max_steps: 70"))
    for name, (as_it_is, changed) in shorter.items():
        task = examples / f"tasks/{name}.yaml"
        assert as_it_is in task.read_text()
        task.write_text(task.read_text().replace(as_it_is, changed))
    done = subprocess.run([sys.executable, "examples/demo.py"], cwd=site.folder, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    (site.folder / TOLD).write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr + site.log()
    # `up` ends with the address of the web page, and so does the demo.
    (address,) = set(re.findall(r"the web page: (\S+) ", done.stderr))
    assert f"address of the web page (in this run: {address})" in " ".join(done.stdout.split())
    return site


@pytest.fixture(scope="module")
def store(demo: Site) -> SubspaceStore:
    """The demo's subspace, opened as a library."""
    settings = yaml.safe_load((demo.folder / ".onebasis/settings.yaml").read_text())
    return SubspaceReader.open(open_storage(StorageSettings(**settings["storage"]), "minilm"))


def test_six_tasks_of_three_teams_are_published(demo: Site) -> None:
    tasks = demo.ask("tasks")
    assert len(tasks) == 6
    assert {task["state"] for task in tasks} == {"published"}
    assert len({task["team"] for task in tasks}) == 3


def test_every_task_learnt_something(demo: Site) -> None:
    for task in demo.ask("tasks"):
        assert task["local_score"] > task["base_score"] + 0.02, task["title"]


def test_earlier_tasks_lose_at_most_a_hundredth_on_average(demo: Site) -> None:
    bwt = demo.ask("scores")["by_version"][-1]["backward_transfer"]
    print("mean change of every earlier task's score since birth:", bwt)
    assert bwt["n"] >= 3
    assert bwt["value"] >= -0.01


def test_a_task_tells_what_became_of_it(demo: Site) -> None:
    scores = demo.ask("scores")
    for column, task in enumerate(scores["tasks"]):
        birth = scores["versions"].index(task["birth"])
        result = demo.ask("task", task["title"])["result"]
        assert result["version"] == task["birth"]
        assert result["score_at_birth"] == scores["matrix"][birth][column]["score"]
        assert result["score_under_main"] == scores["matrix"][-1][column]["score"]


SCORE_ALL = """
import json, runpy, sys
from pathlib import Path
score = runpy.run_path(sys.argv[1])["main"]
for folder, rows, length in json.loads(sys.argv[2]):
    score(Path(folder), Path(rows), length)
ours = {"configs", "subspace_store", "workers", "orchestrator"} & {name.partition(".")[0] for name in sys.modules}
assert not ours, ours
"""
"""Calls the example for each exported adapter, in one process: to import PEFT takes longer than to score."""


def test_exported_adapters_reproduce_every_score_with_transformers_and_peft_alone(demo: Site, tmp_path: Path) -> None:
    scores = demo.ask("scores")
    cells, wanted = scores["matrix"][-1], []
    for task, cell in zip(scores["tasks"], cells, strict=True):
        folder = tmp_path / task["title"].replace("/", "-")
        # A carried score belongs to the version it was measured under.
        demo.run("export", task["title"], "--version", str(cell["measured_at"]), "-o", str(folder))
        spec = demo.ask("task", task["title"])["spec"]["data"]
        wanted.append([str(folder), spec["eval_file"], spec["max_length"]])
    command = [sys.executable, "-c", SCORE_ALL, str(ROOT / "examples/score_adapter.py"), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for cell, line in zip(cells, done.stdout.splitlines(), strict=True):
        outside = json.loads(line)
        assert outside["rows"] == cell["rows"]
        # Batches of another size round differently: one row may fall on the other side of a near tie.
        assert outside["accuracy"] == pytest.approx(cell["score"], abs=1.01 / cell["rows"])


def test_every_task_is_held_as_promised_and_costs_no_more_than_alone(store: SubspaceStore) -> None:
    """Recomputed from dense matrices of what was delivered and of what `main` serves."""
    state, alone = store.state, 0
    for task_id, merged in state.tasks_at(state.refs["main"]).items():
        delivered = store.delivered(task_id)
        whole, held = delivered.modules, store.adapter(task_id).modules
        missed = energy = 0.0
        for name, update in whole.items():
            exact = update.delta()
            kept = float(held[name].delta().square().sum() / exact.square().sum()) if name in held else 0.0
            assert kept >= (1.0 if delivered.is_sized else 0.98) - 1e-6, (merged.name, name)
            missed += float((held[name].delta() - exact).square().sum())
            energy += float(exact.square().sum())
            sigma_R = torch.linalg.svdvals(exact)
            kept_R = sigma_R.square().cumsum(0) / sigma_R.square().sum()
            rank = int((kept_R < 0.98 - 1e-9).sum()) + 1
            alone += update.numbers if update.foundation or delivered.is_sized else rank * sum(update.shape)
        assert (missed / energy) ** 0.5 == pytest.approx(state.errors(state.refs["main"])[task_id], abs=0.02)
    foot = store.footprint()
    assert foot.basis_numbers + foot.private_numbers <= 1.02 * alone
    # The first tasks' coefficients are a constant, paid once: here at most six tasks of rank 8 in 40 directions, 3,840
    # numbers a module, where the tasks that it holds alone take some 16,000.
    assert foot.total_numbers <= 1.25 * alone


def test_the_merged_updates_equal_the_full_svd_of_all_reconstructions(store: SubspaceStore) -> None:
    """Share's merge as the paper writes it, redone from the delivered adapters: no bases, no transports kept."""
    state = store.state
    lineage = state.lineage(state.refs["main"])
    delivered = {t.task_id: store.delivered(t.task_id) for v in lineage for t in v.added}
    delivered = {t: a for t, a in delivered.items() if not a.is_sized}  # nothing is taken from those
    settings = SubspaceSettings(share="always")
    merges = [merge_adapters({}, {}, settings)]
    for task_id, adapter in delivered.items():
        merges.append(merge_adapters(merges[-1].modules, {task_id: adapter}, settings))
    for module in next(iter(delivered.values())).modules:
        sides: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # task → reconstructed w·U·diag(σ) and w·V·diag(σ)
        for (task_id, adapter), merge in zip(delivered.items(), merges[1:], strict=True):
            if module in adapter.modules:
                update = adapter.modules[module]
                u, s, v = update.u_NR.double(), update.sigma_R.double(), update.v_DR.double()
                weight = 1 / s.norm()
                sides[task_id] = (weight * u * s, weight * v * s)
            ranks = merge.modules[module].basis.ranks
            bases = [
                torch.linalg.svd(torch.cat([pair[side] for pair in sides.values()], dim=1), full_matrices=False)[0]
                for side in (0, 1)
            ]
            out, inn = bases[0][:, : ranks[0]], bases[1][:, : ranks[1]]
            sides = {t: (out @ (out.T @ x), inn @ (inn.T @ y)) for t, (x, y) in sides.items()}
        for task_id, (x, y) in sides.items():
            s = delivered[task_id].modules[module].sigma_R.double()
            expected = (x * s.norm()) @ (y * (s.norm() / s)).T  # U·diag(σ)·Vᵀ: σ is in both sides, divide it out once
            merged = reconstruct({module: merges[-1].modules[module]}, task_id)[module].delta()
            assert (merged - expected).norm() / expected.norm() < 1e-6, (module, task_id)


def test_mlflow_shows_what_the_log_says(demo: Site) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{demo.folder}/.onebasis/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'onebasis'")
    runs = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    scores = demo.ask("scores")
    titles = [task["title"] for task in scores["tasks"]]
    assert sorted(by_name) == sorted([*titles, "subspace minilm"])
    subspace = by_name["subspace minilm"].info.run_id
    for column, title in enumerate(titles):
        history = {m.step: m.value for m in client.get_metric_history(subspace, f"score.{title}")}
        expected = {
            version: row[column]["score"]
            for version, row in zip(scores["versions"], scores["matrix"], strict=True)
            if row[column]["score"] is not None
        }
        assert history == pytest.approx(expected)
    for ours, theirs in (("average_accuracy",) * 2, ("backward_transfer",) * 2, ("forgetting",) * 2):
        history = {m.step: m.value for m in client.get_metric_history(subspace, theirs)}
        for figures in scores["by_version"]:
            if figures[ours]["value"] is not None:
                assert history[figures["version"]] == pytest.approx(figures[ours]["value"])
    assert client.get_model_version_by_alias("minilm", "main").tags["onebasis.version"] == str(scores["version"])
    assert [a.path for a in client.list_artifacts(subspace)].count("scores.png") == 1


def test_what_a_merge_writes_does_not_grow_with_the_tasks_before_it(demo: Site) -> None:
    # What is new in a version is its tasks and its basis: bytes per direction of the basis and per merged task.
    versions = [v for v in demo.ask("versions") if v["status"] == "published"]
    print([(v["version"], v["task_count"], len(v["added"]), v["bytes_written"]) for v in versions])
    details = [demo.ask("version", str(v["version"])) for v in versions]
    for version in details:
        basis = 4 * version["footprint"]["basis_numbers"]
        assert version["bytes_written"] <= 1.6 * basis + len(version["added"]) * 2_000_000


def test_a_rolled_back_version_is_previewed_done_and_undone(demo: Site) -> None:
    newest = demo.ask("status", expect=DOWN)["main"]
    parent = next(v["parent"] for v in demo.ask("versions") if v["version"] == newest)
    added = next(v["added"] for v in demo.ask("versions") if v["version"] == newest)
    preview = demo.ask("rollback", str(parent), "--preview")
    assert preview["vanishing"] == added
    assert demo.ask("status", expect=DOWN)["main"] == newest  # a preview changes nothing
    demo.run("rollback", str(parent))
    assert demo.ask("status", expect=DOWN)["main"] == parent
    held = {task["title"] for task in demo.ask("scores")["tasks"]}
    assert held.isdisjoint(added)
    demo.run("rollback", str(newest))
    assert demo.ask("status", expect=DOWN)["main"] == newest


def test_it_ends_with_a_rollback_that_changes_an_answer(demo: Site) -> None:
    lines = (demo.folder / TOLD).read_text().splitlines()
    (first, second) = (place for place, line in enumerate(lines) if line.startswith("$ onebasis predict "))
    assert lines[first] == lines[second]
    (back,) = (line.split()[-1] for line in lines[first:second] if re.fullmatch(r"\$ onebasis rollback \d+", line))
    asked = shlex.split(lines[first])[3:]
    # What was shown is what both versions answer, and what is said of it is so.
    before, after = (demo.run("predict", *asked, *at).splitlines()[0] for at in ((), ("--version", back)))
    assert (lines[first + 1], lines[second + 1]) == (before, after)
    said = lines[second + 2]
    assert said == example("what_changed")(before, after, int(back))
    differ = example("answered_otherwise")(demo.ask("scores")) is not None
    assert differ, "no merge moved a task: the demo has nothing to show"
    print(said)
    undone = lines.index(f"$ onebasis rollback {demo.ask('status', expect=DOWN)['main']}")
    assert undone > second
    assert [line for line in lines[undone + 1 :] if line.startswith("$ ")] == ["$ onebasis down"]


def example(name: str) -> Any:
    """A function of the demo."""
    return runpy.run_path(str(ROOT / "examples/demo.py"))[name]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("fee  0.91  Why?", "cash  0.55  Why?", "The answer changed: fee (0.91) before, cash (0.55) by version 2."),
        (
            "fee  0.91  Why?",
            "fee  0.83  Why?",
            "The answer is fee still, and by version 2 its probability is 0.83 instead of 0.91.",
        ),
        ("fee  0.91  Why?", "fee  0.91  Why?", "Version 2 gives the same answer, to the digits that are shown."),
        ("fee  0.91  Why?", "", "Version 2 does not hold this task: after the rollback nobody answers."),
    ],
)
def test_what_is_said_of_two_answers_is_so(before: str, after: str, said: str) -> None:
    assert example("what_changed")(before, after, 2) == said


def test_the_demo_rolls_back_to_where_a_score_was_another_one() -> None:
    def cell(score: float | None, measured_at: int | None) -> dict[str, Any]:
        return {"score": score, "measured_at": measured_at}

    none, tasks = cell(None, None), [{"title": "a/one"}, {"title": "b/two"}]
    scores: dict[str, Any] = {"tasks": tasks, "versions": [1, 2, 3, 4]}
    # one: another score under versions 1 and 2; two: moved by version 4, with the same score.
    scores["matrix"] = [
        [cell(0.8, 1), none],
        [cell(0.8, 2), none],
        [cell(0.9, 3), cell(0.7, 3)],
        [cell(0.9, 3), cell(0.7, 4)],
    ]
    find = example("answered_otherwise")
    assert find(scores) == ("a/one", 2)
    assert find({**scores, "versions": [3, 4], "matrix": scores["matrix"][2:]}) == ("b/two", 3)
    still = [[cell(0.8, 1), none], [cell(0.8, 1), cell(0.7, 2)]]
    assert find({"tasks": tasks, "versions": [1, 2], "matrix": still}) is None


def test_nothing_is_left_running(demo: Site) -> None:
    assert not (demo.folder / ".onebasis/server.json").exists()
    done = subprocess.run(["pgrep", "-f", str(demo.folder)], capture_output=True, text=True)
    assert done.stdout == ""


def test_a_typo_in_a_task_file_names_the_key_and_the_right_one(demo: Site, tmp_path: Path) -> None:
    text = (ROOT / "examples/tasks/relevance.yaml").read_text().replace("learning_rate:", "learnig_rate:")
    (tmp_path / "typo.yaml").write_text(text)
    done = subprocess.run([ONEBASIS, "submit", str(tmp_path / "typo.yaml")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "training.learnig_rate" in done.stderr
    assert "did you mean 'learning_rate'" in done.stderr
