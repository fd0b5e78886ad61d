"""Every block of commands and of code on a page runs as it stands, in one folder with one service.

The README is typed first, as a newcomer would, from `onebasis up` to `onebasis down`; the other pages find what it
left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, README, ROOT, Block, blocks

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
ELSEWHERE = ("make", "source")
"""What the tests of this folder cannot type: it makes the environment that they run in."""


def run(command: str, folder: Path) -> str:
    """Type a line; what it printed."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def type_all(page: Path, folder: Path) -> str:
    """Run a page's blocks one after another; what the code in them printed."""
    printed = ""
    for block in blocks(page):
        for command in typed(block):
            run(command, folder)
        if block.language == "python":
            printed += run_code(block, folder)
    return printed


def typed(block: Block) -> list[str]:
    """The commands of a block that are run here."""
    commands = block.commands if block.language == "console" and block.is_run else ()
    return [command for command in commands if command.split()[0] not in ELSEWHERE]


def run_code(block: Block, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.text}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A newcomer's folder in which the README was typed from top to bottom."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "examples", folder / "examples")
    try:
        type_all(README, folder)
        yield folder
    finally:
        subprocess.run([str(Path(sys.executable).with_name("onebasis")), "down"], cwd=folder, capture_output=True)


def test_the_readme_runs_from_up_to_down(folder: Path) -> None:
    commands = [command for block in blocks(README) for command in typed(block)]
    assert (commands[0], commands[-1]) == ("onebasis up", "onebasis down")
    assert (folder / "exported/adapter_config.json").exists()


RUN = [page for page in DOCS if any(typed(block) or block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_as_they_stand(folder: Path, page: Path) -> None:
    run("onebasis up", folder)
    printed = type_all(page, folder)
    assert not blocks(page, "python") or printed.startswith("payments/charges ")
