"""Commands that read a store and change nothing in it: doctor, verify, log, tags, pins, forecast, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from configs.errors import Corrupt, InvalidInput, row_of
from subspace_store.commands.place import (
    FixedRank,
    OnVersion,
    Url,
    clock,
    command,
    place_of,
    print_table,
    reader_at,
    task_id_of,
    until_text,
)
from subspace_store.commands.terminal import (
    STATE_DIR,
    AsJson,
    OfBaseModel,
    StateDir,
    console,
    counted,
    decimals,
    note,
    show,
    shown,
    telling,
)
from subspace_store.log.version import CANDIDATE, MAIN

if TYPE_CHECKING:
    from subspace_store.export import Exported

NAMED = 5
"""Most tasks that a line names."""


@command
def doctor(
    store: Url = None, base_model: OfBaseModel = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """Test whether a folder or bucket keeps the promises that a store needs. No object of a store is changed."""
    from subspace_store.doctor import examine

    storage = place_of(store, state_dir, base_model).storage
    with telling(f"examining {storage.url}"):
        checks = examine(storage)

    def as_text(_: object) -> None:
        for check in checks:
            mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
            console.print(f"{mark} {check.name}: {shown(check.what)}", soft_wrap=True)
            if check.todo:
                console.print(f"     → {shown(check.todo)}", soft_wrap=True)

    show([asdict(check) for check in checks], as_text, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(InvalidInput.exit_code)  # another place has to be named


ROWS_NOT_CHECKED = (
    "not checked: the rows of the tasks (data/), which the log does not name; the service tells of one that is gone "
    "when it is needed"
)


@command
def verify(
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and measure every task again.")] = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Check that the store holds what its log says: the chain and every object's size, or with --deep everything.

    The tasks' rows are not checked: the log does not name them.
    """
    from subspace_store.verify import verify as check

    reader = reader_at(place_of(store, state_dir, base_model))
    with telling(f"checking what is at {reader.storage.url}"):
        findings = check(reader, deep=deep)

    def as_text(_: object) -> None:
        for finding in findings:
            of = f" ({shown(finding.of)})" if finding.of else ""
            console.print(f"[red]{shown(finding.where)}[/red]{of}: {shown(finding.what)}", soft_wrap=True)
        if findings:
            more = "" if deep else "find all that is damaged with --deep, "
            note(f"  → change nothing, {more}restore what is named from a backup, then run this again")
            note(f"  see {row_of(Corrupt.kind)}")
        elif deep:
            console.print(f"{reader.storage.url} is as its log says: every byte was read", soft_wrap=True)
        else:
            console.print(
                f"{reader.storage.url}: the log and the sizes of all objects are right; --deep reads their bytes too",
                soft_wrap=True,
            )
        console.print(ROWS_NOT_CHECKED, soft_wrap=True)

    show([asdict(finding) for finding in findings], as_text, as_json)
    if findings:
        raise typer.Exit(Corrupt.exit_code)


@command
def log(
    last: Annotated[
        int | None, typer.Option(help="Number of records to show, the newest; default: all.", min=1)
    ] = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show the version log, oldest record first."""
    reader = reader_at(place_of(store, state_dir, base_model))
    with telling(f"reading the log at {reader.storage.url}"):
        entries = reader.history()[-last if last else None :]

    def as_text(_: object) -> None:
        rows = [(str(e.seq), clock(e.time), str(e.epoch), e.op, e.actor, e.summary) for e in entries]
        print_table(("seq", "time", "epoch", "operation", "by", ""), rows, "the log is empty")

    show([asdict(entry) for entry in entries], as_text, as_json)


@command
def tags(
    store: Url = None, base_model: OfBaseModel = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """List tags and the versions they name."""
    found = reader_at(place_of(store, state_dir, base_model)).state.tags

    def as_text(_: object) -> None:
        rows = [(name, str(number)) for name, number in sorted(found.items(), key=lambda item: (item[1], item[0]))]
        print_table(("tag", "version"), rows, "no tags")

    show(dict(found), as_text, as_json)


@command
def pins(
    store: Url = None, base_model: OfBaseModel = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """List pinned versions, with the owner and the end of each pin."""
    state = reader_at(place_of(store, state_dir, base_model)).state
    found = [(number, owner, until) for number, owners in sorted(state.pins.items()) for owner, until in owners.items()]

    def as_text(_: object) -> None:
        rows = [(str(n), owner, "until unpinned" if until is None else until_text(until)) for n, owner, until in found]
        print_table(("version", "for", ""), rows, "no pins")

    show([dict(zip(("version", "owner", "until"), row, strict=True)) for row in found], as_text, as_json)


@command
def forecast(
    adapters: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="PEFT folders or diffusers LoRA files.")],
    version: OnVersion = CANDIDATE,
    replaces: Annotated[
        str | None, typer.Option(metavar="TASK", help="Task whose next revision the one adapter would be.")
    ] = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show what merging adapters would cost every task, without merging them and without data."""
    from subspace_store.formats.adapters import read_adapter

    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    if replaces is not None and len(adapters) != 1:
        raise InvalidInput("one adapter takes the place of a task", "--replaces", "name one FOLDER")
    left = {} if replaces is None else {str(adapters[0]): task_id_of(reader, replaces)}
    with telling("computing what a merge would cost"):
        news = {str(path): read_adapter(path, reader.base_model) for path in adapters}
        found = reader.forecast(news, reader.resolve(version), left)
    names = {task.task_id: task.name for task in reader.state.tasks_at(found.parent).values()}

    def as_text(_: object) -> None:
        arriving = [
            (name, decimals(error), f"{found.spanned[name]:.1%}") for name, error in found.error_at_birth.items()
        ]
        print_table(("would arrive", "error at birth", "energy in the basis already"), arriving, "")
        console.print()
        held = [
            (names[task], decimals(drift), decimals(found.error[task]))
            for task, drift in sorted(found.drift.items(), key=lambda item: -item[1])
        ]
        print_table(("is there", "would drift", "error then"), held, f"version {found.parent} holds no tasks")

    show(asdict(found), as_text, as_json)


@command
def export(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="Folder to write to; created if it does not exist.")
    ],
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK...]", help="Tasks to export; default: all.")
    ] = None,
    version: OnVersion = MAIN,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="SOURCE", help="Path or hub id from which servers load the base model."),
    ] = None,
    one: Annotated[
        str | None,
        typer.Option(metavar="WAY", help="Write one adapter for all of them instead: mean, ties, dare, tsv, iso_c …"),
    ] = None,
    rank: FixedRank = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Write each task as a PEFT adapter folder, TEAM+TASK@vN, and show which of them vLLM and LoRAX can load: those
    without a head of their own."""
    from subspace_store.export import export_one, export_tasks

    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    source = base or (place.base_source if place.base_source else reader.base_model)
    if one is not None:
        most = rank or reader.settings.rank_fixed or reader.settings.rank_max
        number = reader.resolve(version)
        with telling(f"writing to {output}"):
            single = export_one(reader, output, number, tasks, way=one, rank=most, base_source=source)
        show(single.as_facts(), lambda _: _told_of_one(single, output), as_json)
        return
    if rank is not None:
        raise InvalidInput("is the rank of one adapter for all", "--rank", "add --one, or leave it out")
    with telling(f"writing to {output}"):
        found = export_tasks(reader, output, reader.resolve(version), tasks, base_source=source)

    def as_text(_: object) -> None:
        note(f"{counted(len(found), 'adapter')} in {output}; {output / 'adapters.json'} lists what is there")
        # A file for diffusers was a LoRA of diffusers, and nobody expects a language model's server to load it.
        reasons = [(loader, why) for one in found if one.format == "peft" for loader, why in one.refused_by.items()]
        for loader, why in dict.fromkeys(reason for reason in reasons if reason[0] != "diffusers"):
            refused = [one.task for one in found if one.refused_by.get(loader) == why]
            some = ", ".join(refused[:NAMED]) + (f" and {len(refused) - NAMED} more" if len(refused) > NAMED else "")
            note(f"not for {loader}: {some} ({why})")

    show([one.as_facts() for one in found], as_text, as_json)


def _told_of_one(one: Exported, folder: Path) -> None:
    size = sum((folder / one.name / file).stat().st_size for file in one.files)
    note(f"{folder / one.name}: one adapter for {counted(len(one.of_tasks), 'task')}, rank {one.rank}, {size:,} bytes")
    rows = [(task, decimals(error)) for task, error in sorted(one.errors.items(), key=lambda item: -item[1])]
    print_table(("task", "error of its update"), rows, "")
    if one.left_out:
        note(f"it has not {one.left_out}")
