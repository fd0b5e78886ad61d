"""What all commands share: where they print, how they end, the options that each of them has.

Which commands there are is in orchestrator/commands/cli.py and subspace_store/commands/app.py. What is printed may come
from anywhere (a reason, a file's name, a line of a worker's log): both consoles show a character that would move the
cursor or change colours as an escape, so that no command has to do it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from typer.core import TyperGroup

from configs.errors import Exit, InvalidInput, OnebasisError, row_of
from configs.places import home
from configs.plain_text import escaped

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
StateDir = Annotated[
    Path, typer.Option("--state-dir", envvar="ONEBASIS_STATE_DIR", help="Folder of the service's own files.")
]
STATE_DIR = Path(".onebasis")
FIRST_SECONDS = 6.0
"""Longest silence, from the last word or from the command's start, before people are told what it waits for."""
TELL_SECONDS = 8.0
"""Interval at which they are told that it takes longer: nobody looks at a silent terminal for longer than ten
seconds."""
OpKey = Annotated[
    str,
    typer.Option(
        "--op-key",
        metavar="KEY",
        help="Key of this request, beginning with the command's name. Repeated under the same key, it is done once.",
    ),
]


class PlainConsole(Console):
    """Shows each character that is no plain text as an escape. The commands' own colours are styles, not characters,
    and stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


# A pipe or a log file has no width: tables there are as wide as they need.
console = PlainConsole(highlight=False, width=None if sys.stdout.isatty() else 160)
errors = PlainConsole(stderr=True, highlight=False)


OfBaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="NAME", help="Base model, needed where the service has several."),
]


def shown(text: str) -> str:
    """Foreign text, escaped so that it can stand between our own words and colours, and a table knows its width."""
    return escape(escaped(text))


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 adapter`, `2 adapters`, `3,000 copies`. plural: The plural, if it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def decimals(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with this many decimals, never as −0: a number that rounds to 0 gets no minus sign."""
    return format(value, f"{'+' if sign else ''}z.{digits}f")


EXIT_CODES = "\b\nExit codes:\n" + "\n".join(f"{code:5}  {code.meaning}" for code in Exit)
"""The end of a help text; \\b keeps its lines apart."""


_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of unknown commands and options, missing and superfluous arguments. Typer names only this class below it."""


class Commands(TyperGroup):
    """A group of commands whose errors of usage are JSON as well, where --json is among the arguments."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        is_json = standalone_mode and "--json" in (sys.argv[1:] if args is None else args)
        try:
            code = super().main(
                args,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=standalone_mode and not is_json,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except _UsageError as wrong:
            if not is_json:
                raise
            of = getattr(wrong, "ctx", None)
            where = of.command_path if of else prog_name or self.name or ""
            what = wrong.format_message().strip()  # type: ignore[attr-defined]
            problem = InvalidInput(what, where, f"`{where} --help` shows what it takes")
            print(json.dumps({"error": problem.as_dict()}))
            sys.exit(problem.exit_code)
        return sys.exit(code or 0) if is_json else code  # the code of typer.Exit, else None


def new_app(name: str, help: str) -> typer.Typer:
    """A group of commands. Its help ends with the exit codes."""
    return typer.Typer(
        cls=Commands,
        name=name,
        help=help,
        epilog=EXIT_CODES,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def command_of(
    app: typer.Typer, interrupted: str, epilog: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that registers commands by the names of their functions; our errors become a message, or JSON, and
    an exit code that a script can tell apart.

    Args:
        interrupted: What to say after Ctrl-C.
        epilog: The end of these commands' help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> None:
            _break_silence()
            try:
                if options.get("base_model") and not options.get("as_json"):
                    note(f"base model {options['base_model']}")
                function(*args, **{name: _with_home(value) for name, value in options.items()})
            except OnebasisError as problem:
                if options.get("as_json"):
                    print(json.dumps({"error": problem.as_dict()}))
                else:
                    error(problem)
                raise typer.Exit(problem.exit_code) from None
            except KeyboardInterrupt:
                note(interrupted)
                raise typer.Exit(Exit.INTERRUPTED) from None
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

        app.command(name=function.__name__.strip("_").replace("_", "-"), epilog=epilog)(run)
        return run

    return register


def _with_home(value: Any) -> Any:
    """Paths with `~`, which no shell expands in --option=~/path or in the environment."""
    if isinstance(value, Path):
        return home(str(value))
    return [_with_home(item) for item in value] if isinstance(value, list) else value


def show(answer: Any, as_text: Callable[[Any], None], as_json: bool) -> None:
    """Print a command's answer."""
    if as_json:
        print(json.dumps(answer, allow_nan=False))
    else:
        as_text(answer)


_noted_at: float | None = None


def note(text: str) -> None:
    """A line on what happens now; on stderr, so that output can be piped."""
    errors.print(escape(text), soft_wrap=True)
    _break_silence()


def _break_silence() -> None:
    global _noted_at
    _noted_at = time.monotonic()


def silent_seconds() -> float:
    """Seconds since the last note of this command, or since it began; 0 in a program that runs none."""
    return 0.0 if _noted_at is None else time.monotonic() - _noted_at


@contextlib.contextmanager
def telling(what: str, say: Callable[[str], None] = note) -> Iterator[None]:
    """Tell people what is going on in the block, if it takes longer than a few seconds. Several short blocks without a
    word are one silence: a block is told sooner if there was none for a while."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = max(FIRST_SECONDS / 4, FIRST_SECONDS - silent_seconds())
        while not done.wait(pause):
            say(f"still {what}, for {time.monotonic() - began:.0f} s")
            pause = TELL_SECONDS

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def error(problem: OnebasisError) -> None:
    """What was wrong, where, what to do, and where to read more."""
    errors.print(f"[red]error:[/red] {escape(str(problem))}", soft_wrap=True)
    errors.print(f"  see {row_of(problem.row)}", style="dim", markup=False, soft_wrap=True)


def me() -> str:
    """Name of the person who types, for records that keep it."""
    return escaped(os.environ.get("USER", "")) or f"uid {os.getuid()}"
