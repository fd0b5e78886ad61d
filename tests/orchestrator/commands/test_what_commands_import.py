"""A command that only reads answers at once: it imports none of the libraries that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.orchestrator.plant import Plant
from tests.orchestrator.site import Site

READING = (
    "tasks",
    "task red/alpha",
    "scores",
    "capacity",
    "versions",
    "version 2",
    "diff 1 2",
    "status",
    "rollback 1 --preview",
)
HEAVY = {"torch", "ray", "transformers", "peft", "scipy", "sklearn", "matplotlib", "mlflow", "boto3", "datasets"}
CODE = """
import json, sys
from orchestrator.commands.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a service left: three tasks in two versions on disk, one that waits, and no process."""
    folder = tmp_path_factory.mktemp("state")
    plant = Plant(folder, storage={"url": f"file:{folder}/store"})
    for titles in (("red/alpha",), ("blue/beta", "blue/gamma")):
        plant.submit(*titles)
        plant.run()
    plant.submit("red/delta")
    plant.queue.close()
    (folder / "settings.yaml").write_text(yaml.safe_dump(plant.settings.model_dump(mode="json")))
    return folder


def imported_by(command: str, folder: Path) -> set[str]:
    """Top-level modules of a process that runs a command and says something."""
    typed = [sys.executable, "-c", CODE, *command.split(), "--json", "--state-dir", str(folder)]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", READING)
def test_while_the_service_is_down_no_model_library_is_imported(state_folder: Path, command: str) -> None:
    assert imported_by(command, state_folder) & HEAVY == set()


@pytest.mark.parametrize("command", ["versions", "diff 1 2"])
def test_who_asks_about_versions_alone_opens_no_database(state_folder: Path, command: str) -> None:
    assert "sqlalchemy" not in imported_by(command, state_folder)


@pytest.mark.parametrize("command", READING)
def test_while_the_service_is_up_its_client_imports_neither_its_libraries_nor_numbers(site: Site, command: str) -> None:
    assert imported_by(command, site.folder) & (HEAVY | {"sqlalchemy", "numpy"}) == set()
