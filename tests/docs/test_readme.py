"""The README and the map of the code are true: their commands run, their files exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import Exit

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGES = ("configs", "subspace_store", "workers", "orchestrator")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """What the README types at a `$`, without comments."""
    typed = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [re.split(r"\s+#\s", line)[0].strip() for line in typed]


def tracked() -> list[str]:
    """The files of the project, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_first_lines_of_code_are_the_two_commands_that_a_newcomer_needs() -> None:
    assert commands()[:2] == ["make demo", "make test"]
    assert README.splitlines().index("```console") < 10
    makefile = (ROOT / "Makefile").read_text()
    for command in commands()[:2]:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)


def test_make_test_says_what_it_leaves_out_and_runs_all_else() -> None:
    from tests.servers.server import KNOWN

    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    run = set(re.findall(r"ONEBASIS_S3_SERVERS=(\w+) \$\(BIN\)/pytest", recipe[1]))
    told = " ".join(line for line in recipe[1].splitlines() if line.startswith("\t@echo")).lower()
    assert {name for name in KNOWN if name in told} == set(KNOWN) - run
    assert "make test-s3" in told
    # Every test has its turn: by marker, those of the other pytest lines are the rest.
    assert re.findall(r'pytest -m "?([\w ]+)', recipe[1]) == ["not acceptance and not s3", "acceptance", "s3 tests"]
    listed = [line for line in README.splitlines() if line.startswith("$ make test ")]
    assert all(name in listed[0].lower() for name in set(KNOWN) - run)
    assert "make test-s3" in listed[0]


def test_the_readme_lists_every_command_and_no_other() -> None:
    from orchestrator.commands.cli import app

    listed = re.search(r"All of them: (.*?)\. ", README, flags=re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r"`(\w+)`", listed[1])) == sorted(str(c.name) for c in app.registered_commands)


def test_the_readme_lists_every_exit_code_and_no_other() -> None:
    listed = re.search(r"Exit codes: (.*?)\.\n", README, flags=re.DOTALL)
    assert listed is not None
    assert re.findall(r"\d+", listed[1]) == [str(int(code)) for code in Exit]


def test_the_map_names_every_module_by_its_whole_path_and_no_other() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|yaml|json|md))`", ARCHITECTURE))
    assert named <= set(tracked()), "not there"
    modules = {path for path in tracked() if path.endswith(".py") and path.split("/")[0] in PACKAGES}
    assert {path for path in modules if not path.endswith("__init__.py")} - named == set(), "not on the map"


def test_every_link_in_the_pages_leads_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")):
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def test_nothing_in_the_project_names_this_machine_or_a_registry() -> None:
    forbidden = re.compile(r"/(?:root|work)/|/opt/(?:wheels|pypi)|extra-index-url|pypi\.org/simple")
    for name in tracked():
        path = ROOT / name
        if path.suffix not in (".gz", ".png", ".safetensors") and path != Path(__file__) and path.exists():
            assert not forbidden.search(path.read_text()), name


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_the_commands_and_the_code_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    onebasis = str(Path(sys.executable).with_name("onebasis"))
    typed = [shlex.split(command) for command in commands() if command.startswith("onebasis ")]
    assert typed[0] == ["onebasis", "up"]
    assert ["onebasis", "down"] in typed
    try:
        for command in typed:
            done = subprocess.run([onebasis, *command[1:]], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    finally:
        subprocess.run([onebasis, "down"], cwd=tmp_path, capture_output=True)
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("payments/charges ")
