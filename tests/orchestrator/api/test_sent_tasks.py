"""A task file that is sent to be read: what it says, and which files it needs."""

from __future__ import annotations

import pytest
import yaml

from configs.errors import InvalidInput
from orchestrator.api.requests import ReadTask
from tests.builders import changed, task_document
from tests.orchestrator.site import Site


def lines(**changes: object) -> tuple[str, ...]:
    document = task_document("red/sent", data={"train_file": "rows/train.csv", "eval_file": "eval.csv"})
    return tuple(yaml.safe_dump(changed(document, changes)).split("\n"))


def test_what_a_task_file_says_is_told_with_the_files_that_have_to_be_sent(site: Site) -> None:
    found = site.client.ask(ReadTask(lines=lines()))
    assert found["title"] == "red/sent"
    assert found["task"]["data"]["label_names"] == ["no", "yes"]
    assert [(one["key"], one["place"], one["folder"], one["only"]) for one in found["files"]] == [
        ("data.train_file", "rows/train.csv", "train", []),
        ("data.eval_file", "eval.csv", "eval", []),
    ]


def test_of_a_folder_the_files_are_named_that_are_read_and_what_is_elsewhere_is_not_asked_for(site: Site) -> None:
    upload = f"upload:{'0' * 64}/eval/x.csv"
    asked = lines(method={"name": "import", "adapter": "legal-adapter"}, data={"train_file": None, "eval_file": upload})
    (adapter,) = site.client.ask(ReadTask(lines=asked))["files"]
    assert (adapter["key"], adapter["place"], adapter["folder"]) == ("method.adapter", "legal-adapter", "adapter")
    names = ["adapter_config.json", "adapter_model.safetensors", "config.json", "pytorch_lora_weights.safetensors"]
    assert adapter["only"] == names
    asked = lines(method={"name": "import", "adapter": "style.safetensors"}, data={"train_file": None})
    files = {one["key"]: one["only"] for one in site.client.ask(ReadTask(lines=asked))["files"]}
    assert files["method.adapter"] == []  # a file, and not what is in a folder
    bucket = lines(data={"train_file": "s3://rows/train.csv", "eval_file": "s3://rows/eval.csv"})
    assert site.client.ask(ReadTask(lines=bucket))["files"] == []


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("team: red", "name: [x"), "is not valid YAML: .*line"),
        ((*lines(), "lorra: {}"), "unknown key 'lorra'"),
        (lines(training={"deepspeed": "ds.json"}), "names a file, which is not sent"),
        (("- team",), "must be a mapping"),
        (("team: red\ud800",), "lines"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_mistakes(site: Site, asked: tuple[str, ...], told: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?s){told}"):
        site.client.ask(ReadTask(lines=asked))
