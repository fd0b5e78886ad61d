"""Contexts: the services that this user has logged in to, by name, and which of them a command asks.

They lie in the user's own configuration folder, in a file that its owner alone may read, since the tokens are in it. A
context is chosen by --context, else by ONEBASIS_CONTEXT, else by `onebasis context use`; where a folder is named by
--state-dir or ONEBASIS_STATE_DIR, its service is meant. `local` is the service of the folder where the command runs: if
there is one, and the last `context use` names another service, both could be meant, and the command is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from configs.errors import InvalidInput, NotFound
from orchestrator.api.client import REMOTE, Remote
from orchestrator.commands.display import print_rows
from subspace_store.commands.state_folder import SETTINGS_FILE, make_private, open_private
from subspace_store.commands.terminal import STATE_DIR, AsJson, command_of, new_app, note, show

context_app = new_app("context", "Services that `onebasis login` knows, and which of them commands ask.")
command = command_of(context_app, "interrupted")
LOCAL = "local"
"""Name of the service that is no remote one."""
FILE = "contexts.json"

InContext = Annotated[
    str | None,
    typer.Option("--context", metavar="NAME", help="A service that `onebasis login` knows; `local`: the one here."),
]


@dataclass(frozen=True)
class Contexts:
    """What the file holds."""

    current: str
    known: dict[str, Remote]

    def named(self, name: str) -> Remote | None:
        """The service of a context; None: the local one. Raises NotFound."""
        if name == LOCAL:
            return None
        if name not in self.known:
            there_are = ", ".join((LOCAL, *sorted(self.known)))
            raise NotFound(f"there is no context '{name}'", str(contexts_file()), f"there are: {there_are}")
        return self.known[name]


def contexts_file() -> Path:
    """Where the contexts of this user are."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base, "onebasis", FILE)


def read_contexts() -> Contexts:
    """The contexts of this user; none where there is no file.

    Raises:
        InvalidInput: The file is damaged.
    """
    file = contexts_file()
    try:
        found = json.loads(file.read_text())
        known = {name: Remote(**facts, name=name) for name, facts in found["known"].items()}
        return Contexts(str(found["current"]), known)
    except FileNotFoundError:
        return Contexts(LOCAL, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        todo = "delete it, and `onebasis login` again"
        raise InvalidInput(f"cannot be read: {type(error).__name__}", str(file), todo) from error


def keep_contexts(contexts: Contexts) -> None:
    """Write them down, for their owner alone."""
    file = contexts_file()
    make_private(file.parent)
    known = {name: asdict(remote) for name, remote in contexts.known.items()}
    for facts in known.values():
        facts.pop("name")
    new = file.with_name(f"{FILE}.{os.getpid()}")
    with open_private(new, "w") as written:
        json.dump({"current": contexts.current, "known": known}, written)
    new.replace(file)


def chosen(named: str | None, state_dir: Path) -> Remote | None:
    """The service that a command asks; None: that of its state folder.

    Args:
        named: What --context says.

    Raises:
        InvalidInput: A context and a state folder are named, or one of them was, and the other is here.
        NotFound: There is no such context.
    """
    is_elsewhere = state_dir != STATE_DIR
    if named is not None:
        if is_elsewhere and named != LOCAL:
            raise InvalidInput("--context and --state-dir both name a service", "--context", "leave one of them out")
        return read_contexts().named(named)
    if is_elsewhere:
        return None
    contexts = read_contexts()
    if named_here := os.environ.get("ONEBASIS_CONTEXT"):
        return contexts.named(named_here)
    remote = contexts.named(contexts.current)
    if remote is not None and (state_dir / SETTINGS_FILE).exists():
        raise InvalidInput(
            f"the service of this folder could be meant, and the context {remote.name}, {remote.url}",
            str(state_dir),
            f"add --context {LOCAL} or --context {remote.name}; or `onebasis context use {LOCAL}`",
        )
    return remote


def of_arguments(arguments: Sequence[str]) -> tuple[Remote | None, list[str]]:
    """The service that a command line of `onebasis store` asks, and the command line without --context."""
    rest, named = list(arguments), None
    for place, argument in enumerate(arguments):
        option, is_joined, value = argument.partition("=")
        if option == "--context":
            named = value if is_joined else "".join(rest[place + 1 : place + 2])
            del rest[place : place + (1 if is_joined else 2)]
            break
    options = {argument.partition("=")[0] for argument in rest}
    if named is None and options & {"--store", "--state-dir", "--help"}:
        return None, rest
    is_elsewhere = os.environ.get("ONEBASIS_STATE_DIR") or STATE_DIR
    return chosen(named, Path(is_elsewhere)), rest


@contextlib.contextmanager
def asking(remote: Remote | None, as_json: bool) -> Iterator[None]:
    """A context in which commands ask this service. It is said which, so that nobody takes one for another."""
    if remote is not None and not as_json:
        note(f"context {remote.name}: {remote.url}")
    token = REMOTE.set(remote)
    try:
        yield
    finally:
        REMOTE.reset(token)


Register = Callable[[Callable[..., None]], Callable[..., None]]


def anywhere(register: Register) -> Register:
    """A decorator as `register`, for commands that ask a remote service as well: they take --context, too."""

    def with_context(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, context: str | None = None, **options: Any) -> None:
            with asking(chosen(context, options["state_dir"]), options["as_json"]):
                function(*args, **options)

        # Typer reads the types from the signature, which therefore has them as types and not as text.
        types = get_type_hints(function, include_extras=True)
        own = [one.replace(annotation=types[name]) for name, one in inspect.signature(function).parameters.items()]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=InContext)
        run.__signature__ = inspect.Signature([*own, context])  # type: ignore[attr-defined]
        run.__annotations__ = {**types, "context": InContext}
        return register(run)

    return with_context


# --- the commands ------------------------------------------------------------------------------------------------


@command
def list_(as_json: AsJson = False) -> None:
    """List the services that you have logged in to."""
    contexts = read_contexts()
    rows: list[dict[str, Any]] = [{"context": LOCAL, "url": "", "is_current": contexts.current == LOCAL}]
    rows += [
        {"context": name, "url": remote.url, "is_current": contexts.current == name}
        for name, remote in sorted(contexts.known.items())
    ]
    show(rows, _print_contexts, as_json)


@command
def use(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"A context; `{LOCAL}`: the service in the folder here.")],
    as_json: AsJson = False,
) -> None:
    """Let commands ask this service from now on."""
    contexts = read_contexts()
    remote = contexts.named(name)
    keep_contexts(Contexts(name, contexts.known))
    where = remote.url if remote else "the service of the folder where they run"
    show({"context": name, "url": remote.url if remote else ""}, lambda _: note(f"commands ask {where}"), as_json)


def _print_contexts(rows: list[dict[str, Any]]) -> None:
    told = [("*" if row["is_current"] else "", row["context"], row["url"]) for row in rows]
    print_rows(("", "context", "url"), told, "")
    note(f"kept in {contexts_file()}")
