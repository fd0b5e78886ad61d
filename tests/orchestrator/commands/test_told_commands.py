"""Whatever command a message names can be typed: each `onebasis …` in the sources is parsed by the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator.commands.cli import app
from subspace_store.commands.app import app as store_app

ROOT = Path(__file__).parents[3]
PACKAGES = ("configs", "subspace_store", "workers", "orchestrator")
TOLD = re.compile(r"`(onebasis(?: [^`]*)?)`")
PART = "\x00"
"""Stands for what a message puts into a command: a word, a number, or an option or nothing."""
STANDS_FOR_A_NUMBER = re.compile(r"\b[A-Z]+$")
COMMANDS: Any = typer.main.get_command(app)
STORE: Any = typer.main.get_command(store_app)
REFUSED: Any = typer.BadParameter.__mro__[1]
NEVER_ALONE = ("cancel", "retry", "pause", "resume", "drain")
"""Commands that refuse to mean everything: alone they do nothing, though all they take can be left out."""


def texts(tree: ast.AST) -> Iterator[str]:
    """What a module may say: its texts but for the docstrings, what is put into them replaced by `PART`."""
    passed: set[ast.AST] = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= set(node.values)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else PART for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed:
            yield node.value


def told() -> list[str]:
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for text in texts(ast.parse(path.read_text())):
                found |= {" ".join(one.split()) for one in TOLD.findall(text)}
    return sorted(found)


def refusal(line: str) -> str:
    """Why a command is refused; empty where it can be typed."""
    group, (name, *arguments) = COMMANDS, line.split()[1:] or ["--help"]
    if name == "store" and arguments:
        group, (name, *arguments) = STORE, arguments
    if name.startswith("-") or name == "store":
        return ""
    if (command := group.get_command(None, name)) is None:
        return f"there is no command {name}"
    if not arguments:  # the command itself is named, with what it says about itself
        return "it names nothing" if group is COMMANDS and name in NEVER_ALONE else ""
    try:
        command.make_context(name, arguments)
    except REFUSED as error:
        return str(error.format_message())
    except SystemExit:  # --help
        return ""
    return ""


def test_there_are_many_and_some_are_wrong() -> None:
    assert len(told()) > 30
    assert refusal("onebasis resume") == "it names nothing"
    assert refusal("onebasis resume --team red") == ""
    assert "No such option" in refusal("onebasis up --team red")
    assert refusal("onebasis store nothing") == "there is no command nothing"


@pytest.mark.parametrize("line", told())
def test_a_command_that_a_message_names_can_be_typed(line: str) -> None:
    lines = [line, STANDS_FOR_A_NUMBER.sub("3", line)]
    refusals = [refusal(one.replace(PART, what)) for one in lines for what in ("x", "3", " --json", "")]
    assert "" in refusals, refusals[0]
