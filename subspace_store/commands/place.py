"""What the commands of a store share: where the store is, who writes to it, the options that they have in common.

A command writes through the service that runs here, if there is one; else this process opens the store as its writer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from configs.errors import Conflict, InvalidInput, NotFound, Unavailable
from configs.places import storage as storage_place
from configs.settings import Settings, StorageSettings, SubspaceSettings
from subspace_store import SubspaceReader
from subspace_store.commands.in_doubt import noted
from subspace_store.commands.state_folder import running_server, service_identity, service_settings
from subspace_store.commands.terminal import command_of, console, me, new_app, note, show, shown, telling
from subspace_store.log.version import CANDIDATE, number_in
from subspace_store.requests import StoreRequest
from subspace_store.storage.opening import open_storage
from subspace_store.storage.protocol import Storage
from subspace_store.subspace_store import SubspaceStore

app = new_app("store", "A store of versions: check it, tag, hold, quarantine, pin, expire, collect.")
command = command_of(app, "interrupted; what was begun can be asked for again")

Url = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="The folder that FORMAT is in: file:…, s3://…; default: the service's."
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="With --store: write although a service writes there; the service must then reopen."),
]
FixedRank = Annotated[
    int | None, typer.Option("--rank", help="Exact number of directions; default: as the store merges.", min=1)
]
AtVersion = Annotated[str, typer.Argument(metavar="[VERSION]", help="A branch, a tag or a number.")]
OnVersion = Annotated[str, typer.Option("--version", metavar="VERSION", help="A branch, a tag or a number.")]
Reference = Annotated[str, typer.Argument(metavar="VERSION", help="A branch, a tag or a number.")]
TaskId = Annotated[str, typer.Argument(metavar="TASK", help="Id of a task, or team/name of one that was merged.")]


SERVICE: ContextVar[Callable[[Path, StoreRequest[Any]], Any] | None] = ContextVar("service", default=None)
"""Function that sends a request to a running service, given state folder and request. Set by `onebasis`: this package
has no client."""


ELSEWHERE: ContextVar[str] = ContextVar("elsewhere", default="")
"""Address of a service on another machine that SERVICE asks: its storage cannot be read here. Empty: none is meant."""


class Unread:
    """Stands for the storage, and for the reader, of a store on another machine: what needs to read it is refused."""

    def __init__(self, url: str) -> None:
        self.url = url

    def resolve(self, reference: str) -> int:
        """The version that a number names; a tag or a branch would have to be looked up."""
        if (number := number_in(reference)) is None:
            raise InvalidInput(
                f"'{reference}' is no number", "version", "`onebasis versions` shows which version it names"
            )
        return number

    def __getattr__(self, name: str) -> Any:
        what = f"the context is {self.url}, and this command reads the storage itself"
        raise InvalidInput(what, "onebasis store", "use it where the service runs; or add --store URL, or --state-dir")


@dataclass(frozen=True)
class Place:
    """A store that a command works on."""

    storage: Storage
    state_dir: Path
    settings: Settings | None
    """Settings of the service in this folder; None if none has run here."""
    is_named: bool
    """Whether the person gave the address."""
    base_model: str | None = None
    """Name of the base model of the service here whose store it is; None where the person gave the address."""

    @property
    def base_source(self) -> str:
        """From where the base model is loaded; empty where that is not known."""
        bases = self.settings.bases if self.settings else ()
        names = (self.base_model, *([] if len(bases) != 1 else [bases[0].name]))
        return next((base.source for base in bases if base.name in names), "")

    @property
    def subspace(self) -> SubspaceSettings:
        """Settings of merges: those of the service here, or the defaults."""
        return self.settings.subspace if self.settings else SubspaceSettings()

    @property
    def is_served(self) -> bool:
        """Whether a service that runs here writes to this store."""
        if self.settings is None or running_server(Path(self.settings.state_dir)) is None:
            return False
        storage = self.settings.storage
        return any(open_storage(storage, name).url == self.storage.url for name in self.settings.base_names)


def place_of(url: str | None, state_dir: Path, base_model: str | None = None) -> Place:
    """The store that a command works on.

    Args:
        base_model: Base model of the service here; None: the only one.

    Raises:
        InvalidInput: The service has several base models, and neither one of them nor an address is named.
    """
    if url is None and (service := ELSEWHERE.get()):
        return Place(cast("Storage", Unread(service)), state_dir, None, False, base_model)
    if url is not None and base_model is not None:
        raise InvalidInput("--store and --base-model both name a store", "--base-model", "leave one of them out")
    try:
        settings = service_settings(state_dir)
    except Unavailable as error:
        if url is None:
            raise Unavailable(error.what, error.where, f"{error.todo}, or name a store with --store URL") from None
        settings = None
    if url is None:
        assert settings is not None
        name = settings.base(base_model).name
        return Place(open_storage(settings.storage, name), state_dir, settings, False, name)
    url = storage_place(url, Path.cwd())
    how = settings.storage.model_copy(update={"url": url}) if settings else StorageSettings(url=url)
    return Place(open_storage(how), state_dir, settings, True)


def reader_at(place: Place) -> SubspaceReader:
    if isinstance(place.storage, Unread):
        return cast("SubspaceReader", place.storage)
    with telling(f"reading the store at {place.storage.url}"):
        try:
            place.storage.read("FORMAT")
        except NotFound:
            todo = "name the folder that FORMAT is in"
            if inner := _store_below(place.storage.url):
                todo += f": --store {inner}"
            raise NotFound("no store is here", place.storage.url, todo) from None
        return SubspaceReader.open(place.storage, settings=place.subspace)


def _store_below(url: str) -> str:
    """Address of a store in one of a folder's own folders; empty without one."""
    kind, _, folder = url.partition(":")
    found = sorted(Path(folder).glob("*/FORMAT")) if kind == "file" else []
    return f"file:{found[0].parent}" if found else ""


def writer_at(place: Place, force: bool = False) -> SubspaceStore:
    """A writer for this command. It writes on behalf of the service here, and does not change the store's owner.

    Args:
        force: Write although another service owns the store.
    """
    reader = reader_at(place)
    return SubspaceStore.open(
        place.storage,
        settings=place.subspace,
        base_model=reader.base_model,
        writer=f"command line of {me()}",
        service=service_identity(Path(place.settings.state_dir)) if place.settings else None,
        force=force and place.is_named,
    )


def change(place: Place, force: bool, as_json: bool, done: str, request: StoreRequest[Any]) -> None:
    """Write one record, through the running service or as the writer, and print the request with its key."""
    is_read = not isinstance(place.storage, Unread)
    repeated = is_read and bool(request.op_key) and request.op_key in reader_at(place).state.op_keys
    request = request.named()
    write(place, force, request)
    facts = request.model_dump(mode="json", exclude={"actor"}, exclude_none=True)
    facts |= {"base_model": place.base_model} if place.base_model else {}
    said = done_before(request.op_key) if repeated else done
    show({"operation": request.operation, "repeated": repeated, **facts}, lambda _: note(said), as_json)


def done_before(op_key: str) -> str:
    """The sentence for a request that is repeated under its key."""
    return f"this was done before under {op_key!r}, and nothing was changed now"


def write(place: Place, force: bool, request: StoreRequest[Any]) -> None:
    """Carry a request out: through the running service, or as the writer.

    Raises:
        OutcomeUnknown: Nobody knows whether it was done; the error names the key to ask again under.
        NotWritten: It was not done.
    """
    request = request.model_copy(update={"base_model": place.base_model})
    service = service_of(place, force)
    if service is not None:
        service(request)
        return
    with telling(f"writing to the store at {place.storage.url}"):
        writer = writer_at(place, force)  # if this fails, the request was certainly not done
        ours = place.settings is not None and not place.is_named
        with noted(place.state_dir, request) if ours else contextlib.nullcontext(), request.told_with_its_key():
            request.on(writer)


def service_of(place: Place, force: bool) -> Callable[[StoreRequest[Any]], Any] | None:
    """Function that sends a request to the running service; None: this process writes itself."""
    ask = SERVICE.get()
    if isinstance(place.storage, Unread) and ask is not None:
        return partial(ask, place.state_dir)
    if not place.is_served or (force and place.is_named):
        return None
    if ask is None or place.is_named:
        raise is_served(place)
    return partial(ask, place.state_dir)


def is_served(place: Place) -> Conflict:
    return Conflict(
        "a running service writes to this store",
        place.storage.url,
        "end it with `onebasis down`; or take over with --store URL --force, and it opens the store anew",
    )


def task_id_of(reader: SubspaceReader, reference: str) -> str:
    """The id that a person means: of several tasks of a name the one that the candidate holds."""
    tasks = {task for version in reader.state.versions.values() for task in version.added}
    found = sorted({task.task_id for task in tasks if reference in (task.name, task.task_id)})
    if len(found) > 1:
        held = reader.state.tasks_at(reader.state.refs[CANDIDATE])
        found = [task_id for task_id in found if task_id in held] or found
    if len(found) > 1:
        raise InvalidInput(f"{reference} was merged as several tasks", todo=f"name one of {', '.join(found)}")
    if not found and "/" in reference:
        raise NotFound(f"no task {reference} was ever merged", reader.storage.url, "name its id")
    return found[0] if found else reference


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], nothing: str) -> None:
    if not rows:
        console.print(nothing)
        return
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=bool(name))
    for row in rows:
        table.add_row(*map(shown, row))
    console.print(table)


def clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def until_text(at: float) -> str:
    return f"until {clock(at)}"
