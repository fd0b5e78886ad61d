"""Task files: those that ship are valid, names are safe, paths start at the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.document import check_document
from configs.errors import InvalidInput
from configs.task_spec import CLASSIFICATION_KINDS, TaskSpec, read_task_spec
from tests.builders import task_document

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "examples/tasks").glob("*.yaml")), *sorted((ROOT / "configs/tasks").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_shipped_task_files_are_valid(path: Path) -> None:
    spec = read_task_spec(path)
    has_labels = spec.kind in CLASSIFICATION_KINDS and spec.method.name != "import"
    assert len(spec.data.label_names) >= (2 if has_labels else 0)


def test_there_are_example_tasks_of_several_teams() -> None:
    specs = [read_task_spec(path) for path in sorted((ROOT / "examples/tasks").glob("*.yaml"))]
    assert len({(spec.team, spec.name) for spec in specs}) == len(specs) >= 3
    assert len({spec.team for spec in specs}) >= 2


def test_paths_start_at_the_task_file_not_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks/t.yaml"
    path.write_text(yaml.safe_dump(task_document(data={"train_file": "../data/train.jsonl", "eval_file": "e.jsonl"})))
    monkeypatch.chdir("/")
    spec = read_task_spec(path)
    assert spec.data.train_file == str(tmp_path / "data/train.jsonl")
    assert spec.data.eval_file == str(tmp_path / "tasks/e.jsonl")


def test_the_folder_of_an_import_starts_at_the_task_file(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    values = task_document(method={"name": "import", "adapter": "mine"}, data={"train_file": None})
    path.write_text(yaml.safe_dump(values))
    assert read_task_spec(path).method.adapter == str(tmp_path / "mine")


@pytest.mark.parametrize("key", ["team", "name", "client_key"])
@pytest.mark.parametrize("value", ["../x", "a/b", "Upper", ".x", "a b", "", "x" * 64, "tab\t", "line\n"])
def test_a_name_that_is_unsafe_in_a_path_is_refused(key: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{key}: (has to be lower-case letters, digits|must be one line)"):
        check_document(task_document() | {key: value}, TaskSpec, "task")


@pytest.mark.parametrize("value", ["a", "0", "a.b-c_d", "x" * 63])
def test_a_safe_name_is_taken(value: str) -> None:
    assert check_document(task_document(name=value), TaskSpec, "task").name == value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": {"train_file": None}}, "method.name 'auto' needs data.train_file and data.eval_file"),
        ({"data": {"eval_file": None}}, "method.name 'auto' needs data.train_file and data.eval_file"),
        ({"data": {"label_names": ["a"]}}, "data.label_names must list at least two labels"),
        ({"data": {"label_names": ["a", "b", "a"]}}, "data.label_names has duplicates"),
        (
            {"kind": "image_regression", "metric": "pck", "data": {"label_names": []}},
            "data.label_names must name each number of a label, in their order",
        ),
        (
            {"kind": "image_regression", "metric": "pck", "data": {"label_names": ["x", "y", "z"]}},
            "metric pck is about points, two numbers each, and data.label_names are 3",
        ),
        ({"kind": "image_text", "data": {"label_names": ["a"]}}, "data.label_names must list at least two labels"),
        (
            {"kind": "image_text", "training": {"label_smoothing_factor": 0.1}},
            "kind 'image_text' compares both ways, which transformers' label smoothing does not do",
        ),
        (
            {"kind": "image_text", "data": {"prompt_template": "a photo"}},
            "needs {} once, in the place of a label's name",
        ),
        (
            {"kind": "image_text", "data": {"prompt_template": "{} or {}"}},
            "needs {} once, in the place of a label's name",
        ),
        ({"method": {"candidates": ["lora", "lora"]}}, "method.candidates has duplicates"),
        ({"data": {"eval_fraction": 0.1}}, "data.eval_file and data.eval_fraction exclude each other"),
        ({"pool": "small", "resources": {"ranks": 2}}, "pool and resources exclude each other"),
        ({"data": {"eval_is_train": True, "eval_file": None, "eval_fraction": 0.1}}, "data.eval_is_train is about"),
        ({"method": {"name": "import"}}, "method.name 'import' needs method.adapter, a PEFT folder or diffusers' file"),
        (
            {"method": {"name": "import", "adapter": "a"}, "data": {"eval_file": None, "eval_fraction": 0.1}},
            "method.name 'import' has no training rows: data.eval_fraction has no meaning",
        ),
        (
            {"method": {"name": "import", "adapter": "a", "refine_epochs": 1}, "data": {"train_file": None}},
            "method.name 'import' has no training rows: method.refine_epochs has no meaning",
        ),
        (
            {
                "kind": "sequence_regression",
                "metric": "pearson",
                "data": {"label_names": []},
                "training": {"label_smoothing_factor": 0.1},
            },
            "kind 'sequence_regression' has no labels to smooth: training.label_smoothing_factor has no meaning",
        ),
        ({"training": {"gradient_accumulation_steps": 10**9}}, "training.gradient_accumulation_steps"),
        ({"training": {"deepspeed": {}}}, "training.deepspeed: needs zero_optimization with a stage from 0 to 3"),
        ({"training": {"deepspeed": {"zero_optimization": "on"}}}, "needs zero_optimization"),
        ({"training": {"deepspeed": {"zero_optimization": {"stage": 4}}}}, "with a stage from 0 to 3"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
    ],
)
def test_parts_that_do_not_fit_together_are_told(changes: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_document(task_document(**changes), TaskSpec, "task")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/etc"}}}, "nvme_path"),
        ({"csv_monitor": {"enabled": True, "output_path": "/etc"}}, "csv_monitor"),
        ({"tensorboard": {"enabled": True}}, "tensorboard"),
        ({"flops_profiler": {"enabled": True, "output_file": "/etc/x"}}, "output_file"),
    ],
    ids=["nvme", "csv", "tensorboard", "profiler"],
)
def test_a_deepspeed_document_that_makes_workers_write_files_is_refused(section: dict[str, object], key: str) -> None:
    deepspeed = {"zero_optimization": {"stage": 2}} | section
    with pytest.raises(InvalidInput, match=f"training.deepspeed: '{key}' would write files on the workers"):
        check_document(task_document(training={"deepspeed": deepspeed}), TaskSpec, "task")


def test_a_deepspeed_document_is_passed_through_untouched() -> None:
    deepspeed = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    spec = check_document(task_document(training={"deepspeed": deepspeed}), TaskSpec, "task")
    assert spec.training.deepspeed == deepspeed


def test_a_default_that_follows_a_wrong_field_is_no_mistake_of_its_own() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_document(task_document("red/Alpha", kind="sequence_classification"), TaskSpec, "task")
    assert "name:" in str(caught.value)
    assert "metric" not in str(caught.value)
    assert "default factory" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key"), [("training", "max_steps"), ("training", "learning_rate"), ("lora", "r"), ("", "priority")]
)
def test_true_is_no_number(section: str, key: str) -> None:
    values: dict[str, Any] = {key: True} if not section else {section: {key: True}}
    with pytest.raises(InvalidInput, match="has to be a number, not true") as caught:
        check_document(task_document(**values), TaskSpec, "task.yaml")
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lora": {"target_modules": "all-linear"}},
            "lora.target_modules: has to be a list, written as [all-linear] (got",
        ),
        ({"lora": {"target_modules": []}}, "lora.target_modules: needs 1 or more of a list"),
        ({"gate": None}, "gate: is empty: write its keys below it, or take it out"),
        ({"gate": 3}, "gate: has to be a mapping of keys"),
        ({"name": "Charges!"}, "name: has to be lower-case letters, digits"),
        (
            {"metric": "acc"},
            "metric: is none of kind 'sequence_classification': accuracy, f1_macro, matthews_correlation",
        ),
        ({"data": {"label_names": ["a", "b"]}}, "task: method.name 'auto' needs data.train_file"),
    ],
)
def test_a_mistake_is_told_in_words_of_the_task_file(changes: dict[str, Any], said: str) -> None:
    document = {
        "team": "red", "name": "alpha", "base_model": "tiny",
        "data": {"train_file": "/a.jsonl", "eval_file": "/b.jsonl", "label_names": ["a", "b"]},
    } | changes  # fmt: skip
    with pytest.raises(InvalidInput) as caught:
        check_document(document, TaskSpec, "task")
    text = str(caught.value)
    assert said in text
    for jargon in ("Input should", "tuple", "instance of", "pattern", "(document)", "pearson"):
        assert jargon not in text


@pytest.mark.parametrize("key", ["not_before", "deadline"])
@pytest.mark.parametrize("value", [20261201, "20261201", 12.5, True])
def test_a_number_is_no_moment(key: str, value: object) -> None:
    # Read as seconds since 1970, the task would start at once.
    with pytest.raises(InvalidInput, match="has to be a moment like 2026-12-01T08:00:00\\+01:00"):
        check_document(task_document() | {key: value}, TaskSpec, "task")


def test_a_moment_needs_its_offset_and_is_read_from_text() -> None:
    with pytest.raises(InvalidInput, match="has no offset from UTC"):
        check_document(task_document() | {"deadline": "2026-12-01 08:00"}, TaskSpec, "task")
    spec = check_document(task_document() | {"deadline": "2026-12-01T08:00:00+01:00"}, TaskSpec, "task")
    assert spec.deadline is not None
    assert spec.deadline.isoformat() == "2026-12-01T08:00:00+01:00"
