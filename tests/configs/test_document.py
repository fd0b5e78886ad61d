"""What a person mistyped is named by its path, all of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.document import check_document, read_document
from configs.errors import InvalidInput
from configs.settings import Settings
from configs.task_spec import TaskSpec
from tests.builders import settings, task_document


def complaint(kind: Any, values: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_document(values, kind, "file.yaml")
    return str(caught.value)


def test_a_misspelt_key_is_named_with_its_path_and_the_nearest_right_one() -> None:
    values = task_document(training={"learning_rat": 0.1})
    assert "unknown key 'training.learning_rat' (did you mean 'learning_rate'?)" in complaint(TaskSpec, values)


def test_a_misspelt_key_at_the_top_is_named() -> None:
    assert "unknown key 'metrics' (did you mean 'metric'?)" in complaint(TaskSpec, task_document(metrics="accuracy"))


def test_a_misspelt_key_inside_a_mapping_of_sections_is_named() -> None:
    values = settings().model_dump(mode="json")
    values["teams"]["red"] = {"wieght": 2}
    assert "unknown key 'teams.red.wieght' (did you mean 'weight'?)" in complaint(Settings, values)


def test_a_key_like_no_other_is_answered_with_all_that_are_known() -> None:
    text = complaint(TaskSpec, task_document(gate={"zzz": 1}))
    assert "unknown key 'gate.zzz' (known keys: min_score)" in text


def test_several_mistakes_are_reported_at_once_each_on_its_line() -> None:
    values = task_document(
        training={"learning_rat": 0.1, "seed": -1}, lora={"r": 0}, metric="acuracy", data={"eval_file": 3}
    )
    lines = complaint(TaskSpec, values).splitlines()
    for start in ("metric:", "data.eval_file:", "unknown key 'training.learning_rat'", "training.seed:", "lora.r:"):
        assert sum(line.strip().startswith(start) for line in lines) == 1, start
    assert any("lora.r: Input should be greater than or equal to 1 (got 0)" in line for line in lines)


def test_a_rule_between_keys_is_told_in_its_own_words() -> None:
    text = complaint(TaskSpec, task_document(data={"label_names": ["one"]}))
    assert "data.label_names must list at least two labels" in text
    assert "Value error" not in text


@pytest.mark.parametrize(("values", "kind"), [([1], "list"), (None, "NoneType"), ("text", "str")])
def test_a_document_that_is_no_mapping_is_refused(values: Any, kind: str) -> None:
    assert f"must be a mapping of keys to values, not {kind}" in complaint(TaskSpec, values)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.yaml: cannot read the file"):
        read_document(tmp_path / "absent.yaml", TaskSpec)


def test_broken_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("team: red\nname: [\n")
    with pytest.raises(InvalidInput, match=r"(?s)broken\.yaml: is not valid YAML.*line 3"):
        read_document(path, TaskSpec)


def test_yaml_makes_no_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("team: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InvalidInput, match="python/object/apply"):
        read_document(path, TaskSpec)


def test_a_key_that_stands_twice_is_a_mistake_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("team: red\nmetric: accuracy\nmetric: f1_macro\n")
    with pytest.raises(InvalidInput, match="the key 'metric' stands twice"):
        read_document(tmp_path / "task.yaml", TaskSpec)


def test_a_number_that_is_none_is_refused_with_its_path() -> None:
    assert "lora.lora_alpha" in complaint(TaskSpec, task_document(lora={"lora_alpha": float("inf")}))
    assert "gate.min_score" in complaint(TaskSpec, task_document(gate={"min_score": float("nan")}))
