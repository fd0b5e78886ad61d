"""Commands for who keeps a service running: examine it, back it up, restore it, upgrade it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import Exit, InvalidInput, NotFound, OnebasisError
from configs.places import storage as storage_place
from orchestrator.commands.display import print_rows
from orchestrator.commands.processes import settings_to_run_with
from subspace_store.commands.state_folder import service_settings
from subspace_store.commands.terminal import (
    STATE_DIR,
    AsJson,
    StateDir,
    command_of,
    console,
    counted,
    new_app,
    note,
    show,
    shown,
    telling,
)

mlflow_app = new_app("mlflow", "The mirror in MLflow.")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Settings (YAML); default: those of the last `up` here, else local.yaml."),
]
Address = Annotated[str, typer.Argument(metavar="PLACE", help="A folder, or s3://BUCKET/PREFIX.")]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url", metavar="URL", help="S3 server of the backups; default: that of the service's storage."
    ),
]
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(config: ConfigFile = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Examine everything that a service needs: versions, disk, database, storage, Ray, MLflow, clocks, ports.

    Works before the first `up`, while the service runs and when it is down. Exit code 1: something failed.
    """
    from orchestrator.doctor import Finding, Verdict, examine_service

    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            _print_finding(asdict(finding))

    try:
        settings = settings_to_run_with(config, state_dir)
    except OnebasisError as error:
        tell(Finding("settings", Verdict.FAILED, error.sentence, error.todo))
    else:
        where = config or state_dir / "settings.yaml"
        source = where if where.exists() else "configs/local.yaml, as no service has run here"
        tell(Finding("settings", Verdict.OK, f"{source}: {counted(len(settings.bases), 'base model')}"))
        for finding in examine_service(settings, state_dir):
            tell(finding)
    show([asdict(finding) for finding in found], _print_verdict, as_json)
    if any(finding.verdict is Verdict.FAILED for finding in found):
        raise typer.Exit(Exit.INTERNAL)


def _print_finding(finding: dict[str, Any]) -> None:
    verdict = str(finding["verdict"])
    mark = f"[{COLOURS[verdict]}]{verdict:<7}[/{COLOURS[verdict]}]"
    console.print(f"{mark} {shown(finding['about'])}: {shown(finding['what'])}", soft_wrap=True)
    if finding["todo"]:
        console.print(f"        → {shown(finding['todo'])}", soft_wrap=True)


def _print_verdict(found: list[dict[str, Any]]) -> None:
    counts = Counter(str(finding["verdict"]) for finding in found)
    failed, warned = counts["failed"], counts["warning"]
    note(f"{counted(len(found), 'check')}: {counted(warned, 'warning')}, {failed} failed")


def backup(
    place: Address, endpoint_url: Endpoint = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """Copy the task database, the stores and the service's identity to a folder or bucket, while the service runs.

    What is there from earlier backups is not copied again. The last thing written is the list of all that belongs to
    the backup, so that one that was cut off is none. Keep it as private as the state folder.
    """
    from orchestrator.backup import archive_at, make_backup

    settings = service_settings(state_dir)
    archive = archive_at(storage_place(_as_url(place), Path.cwd()), settings.storage, endpoint_url)
    if cut := archive.cut_off():
        note(f"an earlier backup, {cut[-1]}, was cut off: what it copied is used")
    with telling("copying"):
        made, new = make_backup(settings, state_dir, archive, _say(as_json))
    answer = {
        "backup": made.name,
        "place": archive.storage.url,
        "objects": made.objects,
        "bytes": made.size_bytes,
        "new_objects": new.objects,
        "new_bytes": new.size_bytes,
    }

    def as_text(_: object) -> None:
        kept = f"{counted(made.objects, 'object')}, {made.size_bytes / 1e6:.1f} MB"
        fresh = f"{new.objects:,} of them new, {new.size_bytes / 1e6:.1f} MB"
        console.print(f"backup {made.name} at {archive.storage.url}: {kept}; {fresh}", soft_wrap=True)

    show(answer, as_text, as_json)


def restore(
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="A folder, s3://BUCKET/PREFIX, or a file of `upgrade`.")
    ],
    name: Annotated[str | None, typer.Option("--backup", metavar="NAME", help="Default: the newest.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only show which backups there are.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings (YAML) with other places; default: those of the backup.")
    ] = None,
    endpoint_url: Endpoint = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a service of a backup, where nothing is yet; then read every byte of its stores, measure each task again.

    `onebasis up` goes on with it. The service that the backup was made of must not run any more: this is the same one.
    A file that `onebasis upgrade` kept fills an empty task database alone.
    """
    from configs.settings import read_settings
    from orchestrator import backup as backups

    if Path(place).is_file():
        settings = read_settings(config) if config is not None else service_settings(state_dir)
        rows = backups.restore_database(settings, Path(place))
        show({"rows": rows}, lambda _: note(f"filled the task database: {counted(rows, 'row')}"), as_json)
        return
    chosen = read_settings(config) if config is not None else None
    url = storage_place(_as_url(place), Path.cwd())
    if url.startswith("file:") and not Path(url.removeprefix("file:")).is_dir():
        raise NotFound("no backup is here", url, "name the place that `onebasis backup` wrote to")
    archive = backups.archive_at(url, chosen.storage if chosen else None, endpoint_url)
    if list_only:
        listed = [backups.read_backup(archive, one) for one in archive.noted()]
        rows_ = [
            {"backup": one.name, "service": one.service_name, "objects": one.objects, "bytes": one.size_bytes}
            for one in listed
        ]
        columns = ("backup", "service", "objects", "MB")
        told = [(one.name, one.service_name, f"{one.objects:,}", f"{one.size_bytes / 1e6:.1f}") for one in listed]
        show(rows_, lambda _: print_rows(columns, told, "no whole backup"), as_json)
        return
    found = backups.read_backup(archive, name)
    settings = chosen or backups.kept_settings(found)
    if Path(settings.state_dir).resolve() != state_dir.resolve():
        raise InvalidInput(
            f"the backup is of a service in {settings.state_dir}, and this command restores to {state_dir.resolve()}",
            "--state-dir",
            f"add --state-dir {settings.state_dir}; or --config SETTINGS.yaml with the places that it shall have here",
        )
    with telling("restoring"):
        objects = backups.restore(found, archive, settings, _say(as_json))
    answer = {"backup": found.name, "state_dir": settings.state_dir, "objects": objects, "findings": 0}
    told_ = f"restored {found.name}: {counted(objects, 'object')}, all as the logs say. `onebasis up` goes on"
    show(answer, lambda _: console.print(told_, soft_wrap=True), as_json)


def upgrade(
    stay_down: Annotated[bool, typer.Option("--stay-down", help="Do not start the service afterwards.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Go on under the release that is installed now: end the service, bring the task database up to date, start.

    What trains writes a checkpoint first and goes on from it. The database of before is kept in a file, which `onebasis
    restore` takes. Going back to an earlier release is refused where it could not read what is there.
    """
    from orchestrator import upgrade as upgrades
    from orchestrator.commands import processes

    settings, say = service_settings(state_dir), _say(as_json)
    was = upgrades.check_readable(settings)
    upgrades.check_alone(settings, state_dir)
    processes.down(state_dir.resolve(), say)
    kept = upgrades.bring_up_to_date(settings, state_dir.resolve())
    if not stay_down:
        processes.up(settings, say)
    facts = {"revision_before": was, "database_before": str(kept) if kept else None, "is_up": not stay_down}
    told = (
        f"the task database was of revision {was}; a copy is {kept}" if kept else "the task database is as it has to be"
    )
    show(facts, lambda _: console.print(told, soft_wrap=True), as_json)


@command_of(mlflow_app, "interrupted; repeat it, or `onebasis up`, which mirrors what is missing")
def rebuild(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Make all that MLflow shows anew, from the task database and the logs. The service has to be down."""
    from orchestrator.api.mirror import rebuild_mirror

    with telling("mirroring all tasks and versions"):
        before = rebuild_mirror(service_settings(state_dir), state_dir)
    told = f"MLflow was made anew; what it showed before is its deleted experiment '{before}'"
    show({"experiment_before": before}, lambda _: console.print(told, soft_wrap=True), as_json)


def _say(as_json: bool) -> Callable[[str], None]:
    return (lambda _: None) if as_json else note


def _as_url(place: str) -> str:
    """A folder is typed as one, and is an address of storages with `file:` before it."""
    return place if place.startswith(("s3://", "file:", "memory:")) else f"file:{place}"
