"""Every path that a person may write, in a file or on the command line: `~` is the home folder, everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from configs.document import Section
from configs.errors import InvalidInput
from configs.places import Located, absolute, database, database_or_folder, real, storage, unless_address
from configs.settings import Settings, read_settings
from configs.task_spec import TaskSpec, read_task_spec
from orchestrator.commands.cli import app
from subspace_store.commands import app as store
from subspace_store.commands import terminal
from tests.builders import SHA256

NAMES_A_PLACE = re.compile(r"(^|_)(dirs?|paths?|files?|folders?|roots?|urls?|uri|source|location|adapter)$")
NO_PLACE = {
    ("storage", "endpoint_url"),
    ("data_buckets", "endpoint_url"),
    ("data_buckets", "url"),
    ("webhooks", "url"),
    ("http", "url"),
}
"""Of servers, always."""


def sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in an annotation such as `Section | None` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from sections(inner)


def fields(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every field with the keys that lead to it, inner ones too."""
    for name, field in section.model_fields.items():
        yield (*path, name), field
        for inner in sections(field.annotation):
            yield from fields(inner, (*path, name))


def is_marked(field: Any) -> bool:
    return any(isinstance(mark, Located) for mark in field.metadata)


PLACES = {kind: [path for path, field in fields(kind) if is_marked(field)] for kind in (Settings, TaskSpec)}


def value_for(path: tuple[str, ...]) -> Any:
    """A place below the home folder, as this field writes it."""
    forms = {
        "storage.url": "file:~/x",
        "database_url": "sqlite:///~/x",
        "data_roots": ["~/x"],
        "teams.data_roots": ["~/x"],
    }
    return forms.get(".".join(path), "~/x")


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return dict(value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("kind", [Settings, TaskSpec])
def test_every_field_that_names_a_place_is_marked_as_one(kind: type[Section]) -> None:
    named = {path for path, _ in fields(kind) if NAMES_A_PLACE.search(path[-1]) and path[-2:] not in NO_PLACE}
    assert named <= set(PLACES[kind])


@pytest.mark.parametrize("path", PLACES[Settings], ids=".".join)
def test_a_setting_may_begin_with_the_home_folder(path: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "base_model": {"name": "tiny", "source": "hub/model", "weights_sha256": SHA256},
        "teams": {"red": {}},
    }
    written = nested(path, value_for(path))
    if "webhooks" in path or "http" in path:
        address = {"url": "https://example.org/x", path[-1]: "~/x"}
        named = {"one": address | {"events": ["ended"]}}
        written = nested(path[:-1], named if "webhooks" in path else address)
    if path[:2] == ("server", "tls"):
        written["server"]["tls"] = {"cert_file": "c.pem", "key_file": "k.pem"} | written["server"]["tls"]
    if path[0] == "teams":
        written = {"teams": {"red": written["teams"]}}
    for name, value in written.items():
        document[name] = document.get(name, {}) | value if isinstance(value, dict) else value
    if path[0] == "base_models":
        document["base_models"] = [document.pop("base_model") | document["base_models"]]
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(document))
    got: Any = read_settings(file)
    for name in path:
        got = getattr(got, name)
        got = got[0] if path[0] == name == "base_models" else got
        got = got["red"] if path[0] == name == "teams" else got
        got = got["one"] if name == "webhooks" else got
    assert f"{home}/x" in str(got)
    assert "~" not in str(got)


@pytest.mark.parametrize("path", PLACES[TaskSpec], ids=".".join)
def test_a_task_file_may_name_places_below_the_home_folder(path: tuple[str, ...], home: Path, tmp_path: Path) -> None:
    brought = {"data": {"train_file": "t.jsonl", "eval_file": "e.jsonl", "label_names": ["a", "b"]}}
    document: dict[str, Any] = {"team": "red", "name": "a", "base_model": "tiny", **brought}
    for name, value in nested(path, "~/x").items():
        document[name] = document.get(name, {}) | value
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(document))
    got: Any = read_task_spec(file)
    for name in path:
        got = getattr(got, name)
    assert got == f"{home}/x"


def test_a_task_files_deepspeed_file_may_lie_below_the_home_folder(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (home / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    brought = {"data": {"train_file": "t.jsonl", "eval_file": "e.jsonl", "label_names": ["a", "b"]}}
    document = {"team": "red", "name": "a", "base_model": "tiny", **brought, "training": {"deepspeed": "~/zero.json"}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(document))
    assert read_task_spec(tmp_path / "task.yaml").training.deepspeed == {"zero_optimization": {"stage": 2}}


def test_every_path_on_the_command_line_may_begin_with_the_home_folder(home: Path) -> None:
    got: dict[str, Any] = {}
    group = terminal.new_app("try", "Try.")

    @terminal.command_of(group, "interrupted")
    def one(**options: Any) -> None:
        got.update(options)

    one(folder=Path("~/x"), several=[Path("~/x"), Path("y")], text="~/x", nothing=None)
    assert got == {"folder": home / "x", "several": [home / "x", Path("y")], "text": "~/x", "nothing": None}
    # All commands of both programs are made by that decorator.
    for program in (app, store.app):
        waiting: list[Any] = [get_command(program)]
        while waiting:
            inner = getattr(waiting[-1], "commands", None)
            command = waiting.pop()
            waiting += inner.values() if inner else []
            assert inner or hasattr(command.callback, "__wrapped__"), command.name


def test_addresses_and_paths_that_are_absolute_stay() -> None:
    root = Path("/root-folder")
    for same in ("s3://bucket/~/x", "memory:x", "file:/a", "file:"):
        assert storage(same, root) == same
    assert storage("file:///a/b", root) == "file:/a/b"
    for same in ("sqlite://", "sqlite:///:memory:", "sqlite:////a", "postgresql+psycopg://u:p@h/~x"):
        assert database(same, root) == same
    for same in ("http://127.0.0.1:5000", "databricks", "sqlite:////a"):
        assert database_or_folder(same, root) == same
    assert database_or_folder("mlruns", root) == "/root-folder/mlruns"
    assert unless_address("s3://plots", root) == "s3://plots"


def test_the_home_of_nobody_is_named_with_what_to_write_instead() -> None:
    with pytest.raises(InvalidInput, match=r"(?s)~nobody-of-this-name/x: there is no home.*\./"):
        absolute("~nobody-of-this-name/x", Path("/"))


@pytest.mark.parametrize("url", ["https://example.org/a.jsonl", "gs://bucket/a.jsonl", "hf://datasets/imdb"])
def test_a_url_is_no_path(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is a URL, and only files, folders and s3:// are read") as caught:
        real(url, tmp_path)
    assert caught.value.where == url  # as it was written
