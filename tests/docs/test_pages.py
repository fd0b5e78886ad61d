"""README, docs and the map of the code are true: commands are the program's, files and links exist, figures agree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.document import check_document
from configs.settings import Settings, read_settings
from configs.task_spec import TaskSpec, read_task_spec
from orchestrator.commands import display, version_tables
from orchestrator.commands.cli import app
from tests.docs.command_lines import parse
from tests.docs.pages import BOOK, DOCS, NOT_RUN, README, ROOT, Block, anchors, blocks, links, tracked

PAGES = (README, *DOCS)
LINKED = (*sorted(ROOT.glob("*.md")), *DOCS, *sorted(ROOT.glob("examples/**/*.md")))
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGES = ("configs", "subspace_store", "workers", "orchestrator")
OTHER_PROGRAMS = ("source", "tar", "mv", "mlflow")
MAKEFILE = (ROOT / "Makefile").read_text()


def every_block(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{block.page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language), 1)
    ]


# --- commands ----------------------------------------------------------------------------------------------------


def test_the_first_lines_of_code_are_the_two_commands_that_a_newcomer_needs() -> None:
    first = blocks(README, "console")[0].commands
    assert first == ("make demo", "make test")
    assert README.read_text().splitlines().index("```console") < 10


def test_make_test_says_what_it_leaves_out_and_runs_all_else() -> None:
    from tests.servers.server import KNOWN

    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert recipe is not None
    run = set(re.findall(r"ONEBASIS_S3_SERVERS=(\w+) \$\(BIN\)/pytest", recipe[1]))
    told = " ".join(line for line in recipe[1].splitlines() if line.startswith("\t@echo")).lower()
    assert {name for name in KNOWN if name in told} == set(KNOWN) - run
    assert "make test-s3" in told
    assert "make test-kills" in told
    assert "make test-web" in told
    assert "make check-deploy" in told
    # Every other test has its turn: by marker, those of the other pytest lines are the rest.
    markers = ["not acceptance and not s3 and not browser", "s3 or acceptance and not stops"]
    assert re.findall(r'pytest -m "?([\w ]+)', recipe[1]) == markers
    # Tests of real services and servers are looked for in these places alone, and are in no other.
    places = re.search(r"^SERVICES := (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert places is not None
    marked = {file for file in tracked() if re.fullmatch(r"tests/.*\.py", file) and is_marked(ROOT / file)}
    assert [file for file in marked if not file.startswith(tuple(places[1].split()))] == []
    listed = [line for line in README.read_text().splitlines() if line.startswith("$ make test ")]
    assert "make test-s3" in listed[0]
    assert "make test-kills" in listed[0]


def is_marked(file: Path) -> bool:
    """Whether tests of real services or servers are in a file, or come from it."""
    return re.search(r"\bpytest\.mark\.(acceptance|s3)\b", file.read_text()) is not None


@pytest.mark.parametrize("block", every_block("console"))
def test_every_command_on_a_page_is_one_with_the_options_that_it_has(block: Block) -> None:
    assert block.commands, "a console block shows commands at a $"
    for command in block.commands:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", MAKEFILE, flags=re.MULTILINE), command
        elif program == "onebasis":
            parse(arguments)
        else:
            assert program in OTHER_PROGRAMS, command


def test_a_page_that_names_a_command_that_is_not_there_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["rollback", "0", "--no-such-option"])
    with pytest.raises(AssertionError, match="no command"):
        parse(["store", "no-such-command"])


def test_what_is_not_run_says_so_and_why_and_is_little() -> None:
    silent = [block for page in PAGES for block in blocks(page, "console") if not block.is_run]
    assert [block.commands[0].split()[0] for block in silent] == [
        "onebasis",
        "onebasis",
        "onebasis",
        "onebasis",
        "mlflow",
    ]
    told = sum(page.read_text().count(f"\n{NOT_RUN}") for page in PAGES)
    assert told == len(silent)


def test_the_pages_list_every_command_and_no_other() -> None:
    listed = re.search(r"All of them: (.*?)\.\s", (ROOT / "docs/operating.md").read_text(), flags=re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r"`([\w-]+)`", listed[1])) == sorted(str(c.name) for c in app.registered_commands)


# --- settings and tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", every_block("yaml"))
def test_every_yaml_on_a_page_is_a_part_of_a_task_or_of_the_settings(block: Block) -> None:
    part: dict[str, Any] = yaml.safe_load(block.text)
    if part.keys() <= TaskSpec.model_fields.keys() and not isinstance(part.get("base_model"), dict):
        whole = read_task_spec(ROOT / "examples/tasks/charges.yaml").model_dump(mode="json")
        check_document(part if "team" in part else whole | part, TaskSpec, str(block.page))
    else:
        whole = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
        instead = {"base_models": "base_model", "pools": "workers"}
        whole = {key: value for key, value in whole.items() if key not in {instead.get(name) for name in part}}
        check_document(whole | part, Settings, str(block.page))


def test_the_template_for_a_cluster_is_valid() -> None:
    read_settings(ROOT / "configs/cluster.yaml")


# --- figures -------------------------------------------------------------------------------------------------------


def table_rows(text: str) -> Iterator[tuple[str, ...]]:
    for line in text.splitlines():
        if line.startswith("| "):
            yield tuple(cell.strip() for cell in line.strip("|").split(" | "))


def test_the_figures_of_the_readme_are_few_and_those_of_the_measurements() -> None:
    section = README.read_text().split("## Measured")[1].split("\n## ")[0]
    figures = list(table_rows(section))[1:]
    assert 5 <= len(figures) <= 10
    measured = {row[:2] for row in table_rows((ROOT / "docs/measurements.md").read_text())}
    assert {row[:2] for row in figures} <= measured


def test_every_measurement_names_the_command_that_makes_it_again() -> None:
    rows = list(table_rows((ROOT / "docs/measurements.md").read_text()))[1:]
    assert len(rows) > 25
    for row in rows:
        program, *rest = row[2].strip("`| ").split()
        assert program == "onebasis" or re.search(rf"^{rest[0]}:", MAKEFILE, flags=re.MULTILINE), row


def test_the_picture_of_the_scores_is_what_the_program_prints_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (picture,) = blocks(README, "text")
    title, teams, names, *lines = picture.text.splitlines()
    tasks = [f"{team}{name}" for team, name in zip(teams.split(), names.split(), strict=True)]
    cells = {line[:13].strip(): line[13:].split() for line in lines}
    numbers = {label: [float(cell.rstrip("'")) for cell in row] for label, row in cells.items()}
    is_carried = {label: [cell.endswith("'") for cell in row] for label, row in cells.items()}
    versions = [label for label in numbers if label.startswith("version")]
    birth = [next(n for n, label in enumerate(versions, 1) if len(numbers[label]) > t) for t in range(len(tasks))]
    columns = [
        {
            "title": name,
            "birth": birth[t],
            "rows": int(numbers["rows"][t]),
            "base": numbers["base"][t],
            "local": numbers["own adapter"][t],
            "share_full": False,
            "of_rows": [],
        }
        for t, name in enumerate(tasks)
    ]
    empty = {"value": None, "n": 0, "half_width_95": None}
    answer = {
        "version": int(title.rpartition(" v")[2]),
        "versions": [*range(1, len(versions) + 1)],
        "tasks": columns,
        "matrix": [
            [
                {
                    "score": numbers[label][t] if t < len(numbers[label]) else None,
                    "measured_at": number - (t < len(numbers[label]) and is_carried[label][t]),
                }
                for t in range(len(tasks))
            ]
            for number, label in enumerate(versions, 1)
        ],
        "by_version": [dict.fromkeys(("average_accuracy", "backward_transfer", "forgetting", "merge_gap"), empty)],
        "footprint": dict.fromkeys(
            (
                "basis_numbers",
                "coefficient_numbers",
                "private_numbers",
                "stored_bytes",
                "head_numbers",
                "separate_numbers",
            ),
            0,
        ),
    }
    monkeypatch.setattr(display.console, "width", 160)
    with display.console.capture() as captured:
        version_tables.scores(answer)
    printed = [line.rstrip() for line in captured.get().splitlines()]
    assert printed[: len(lines) + 3] == [line.rstrip() for line in picture.text.splitlines()]


# --- the map, and links ------------------------------------------------------------------------------------------


def test_the_map_names_every_module_by_its_whole_path_and_no_other() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|yaml|json|md))`", ARCHITECTURE))
    assert named <= set(tracked()), "not there"
    modules = {path for path in tracked() if path.endswith(".py") and path.split("/")[0] in PACKAGES}
    assert {path for path in modules if not path.endswith("__init__.py")} - named == set(), "not on the map"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_of_the_project_and_to_a_heading_of_it(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(ROOT), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        there = [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
        waiting += [path for path in there if path.suffix == ".md" and path not in reached]
    assert {*DOCS, BOOK} <= reached


def test_nothing_in_the_project_names_this_machine_or_a_registry() -> None:
    forbidden = re.compile(r"/(?:root|work)/|/opt/(?:wheels|pypi)|extra-index-url|pypi\.org/simple")
    for name in tracked():
        path = ROOT / name
        if path.suffix not in (".gz", ".png", ".safetensors") and path != Path(__file__) and path.exists():
            assert not forbidden.search(path.read_text()), name
