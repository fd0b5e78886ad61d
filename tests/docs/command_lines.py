"""Command lines that stand in pages and in files of others, read by the programs' own parsers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from orchestrator.commands.cli import app
from subspace_store.commands.app import app as store_app

_ENDS = frozenset({"|", ">", "&&", ";", "2>&1"})
"""Words after which a shell's line is no longer about the same program."""
_NAMED = frozenset({"-n", "-g", "-o", "--namespace", "--name"})
"""Options of other programs whose value may be called as the program is."""


def parse(arguments: list[str]) -> None:
    """Raises what click raises of a command line that the program would refuse."""
    group: Any = get_command(store_app if arguments[0] == "store" else app)
    name, *rest = arguments[1:] if arguments[0] == "store" else arguments
    while hasattr(group.commands.get(name), "commands"):
        group = group.commands[name]
        name, *rest = rest
    command = group.commands.get(name)
    assert command is not None, f"no command {name}"
    command.make_context(name, rest)


def of_program(program: str, text: str) -> Iterator[list[str]]:
    """What a program is given wherever a shell's text runs it: by its name or its path, also through `exec`, another
    program's `--`, or as what a container runs."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for at, word in enumerate(words[:-1]):
            if word.rpartition("/")[2] == program and re.fullmatch(r"[a-z][a-z-]*", words[at + 1]):
                rest = words[at + 1 :]
                end = next((n for n, other in enumerate(rest) if other in _ENDS), len(rest))
                if rest[0] != program and (at == 0 or words[at - 1] not in _NAMED):
                    yield rest[:end]


def onebasis(text: str) -> list[list[str]]:
    """The arguments of each `onebasis` in a shell's text, all of which the program takes."""
    found = list(of_program("onebasis", text))
    for arguments in found:
        parse(arguments)
    return found


def ray(arguments: list[str]) -> dict[str, Any]:
    """What Ray's own command line makes of arguments. Raises what click raises of those that it would refuse."""
    from ray.scripts.scripts import cli

    command = cli.commands[arguments[0]]
    options: dict[str, Any] = command.make_context(arguments[0], list(arguments[1:])).params
    return options
