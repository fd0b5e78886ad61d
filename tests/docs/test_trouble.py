"""The book of trouble has one row for each code that the program can name, and no other."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import Exit, OnebasisError, StoreFull, row_of
from orchestrator.alarms import AlarmCode
from orchestrator.commands import display
from orchestrator.judging.gate import Rule
from orchestrator.scheduling.reasons import WaitCode
from orchestrator.tasks.task_events import Reason
from orchestrator.tasks.task_record import ENDED_WITHOUT_RESULT
from subspace_store.commands import terminal
from tests.docs.pages import BOOK, ROOT, anchors

TEXT = BOOK.read_text()
PARTS = ("You see", "It means", "Do")


def rows() -> dict[str, str]:
    """Code to the text of its row."""
    found = re.split(r"^### (.+)\n", TEXT, flags=re.MULTILINE)[1:]
    return {code: text.split("\n## ")[0] for code, text in zip(found[::2], found[1::2], strict=True)}


def leaves() -> Iterator[type[OnebasisError]]:
    """Every class of error in the program, wherever it is."""
    for package in ("configs", "subspace_store", "workers", "orchestrator"):
        folder = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(folder, f"{package}."):
            if "migrations" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    waiting: list[type[OnebasisError]] = [OnebasisError]
    while waiting:
        yield (leaf := waiting.pop())
        waiting += leaf.__subclasses__()


def codes() -> set[str]:
    """Every code that a message, an alarm or a task can name."""
    of_errors = {leaf.code or leaf.kind for leaf in leaves() if leaf.__module__.split(".")[0] != "tests"}
    of_tasks = {*map(str, Reason), *map(str, Rule), *map(str, ENDED_WITHOUT_RESULT)}
    return of_errors | of_tasks | {*map(str, AlarmCode), *map(str, WaitCode)}


def test_every_code_has_a_row_and_every_row_a_code() -> None:
    assert codes() - set(rows()) == set(), "no row"
    assert set(rows()) - codes() == set(), "a row that nothing names"
    assert len(re.findall("^### ", TEXT, flags=re.MULTILINE)) == len(rows()), "two rows of one code"


@pytest.mark.parametrize("code", sorted(rows()))
def test_a_row_tells_what_is_seen_what_it_means_and_what_to_do(code: str) -> None:
    parts = re.findall(r"^\* \*\*([\w ]+):\*\* (\S.*)$", rows()[code], flags=re.MULTILINE)
    assert [name for name, _ in parts] == [*PARTS]


def test_what_the_program_prints_is_a_heading_of_the_book() -> None:
    for code in codes():
        page, _, anchor = row_of(code).partition("#")
        assert anchor in anchors(ROOT / page), code


def test_the_table_of_exit_codes_is_that_of_the_program() -> None:
    table = re.findall(r"^\| (\d+) \| (.*?) \| (?:\[[\w-]+\]\(#([\w-]+)\) )?\|$", TEXT, flags=re.MULTILINE)
    assert [(int(number), meaning) for number, meaning, _ in table] == [(int(code), code.meaning) for code in Exit]
    assert {row for _, _, row in table if row} <= set(rows())
    assert all(row for number, _, row in table if int(number) not in (Exit.DONE, Exit.INTERRUPTED))


def test_an_error_on_the_terminal_ends_with_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.errors.capture() as captured:
        terminal.error(StoreFull("no space left for 12 bytes", "file:store", "make room"))
    assert captured.get().splitlines()[-1] == "  see docs/trouble.md#store-full"


def test_a_parked_task_names_the_row_of_its_reason(task_answer: dict[str, object]) -> None:
    with display.console.capture() as captured:
        display.task({**task_answer, "state": "parked", "why": "main was rolled back", "trouble": ["rolled-back"]})
    assert captured.get().splitlines()[1:3] == ["  main was rolled back", "  see docs/trouble.md#rolled-back"]


@pytest.fixture
def task_answer() -> dict[str, object]:
    """As little as `onebasis task` shows of a task."""
    training = {
        "seconds": None, "method": "", "refined_seconds": None, "share_full": False, "unrefined": "",
        "last_point": None, "plot": None,
    }  # fmt: skip
    return {
        "title": "red/alpha", "exact_title": "red/alpha", "revisions": [], "scores_of_rows": [], "task_id": "t1",
        "progress": {}, "local_score": None, "metrics": {}, "metric": "accuracy",
        "result": None, "training": training, "events": [], "warnings": [], "alarms": [],
    }  # fmt: skip


def test_the_book_is_a_page_of_the_project() -> None:
    assert Path(row_of("x").partition("#")[0]) == BOOK.relative_to(ROOT)
