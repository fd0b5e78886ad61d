"""Commands for who keeps a service running: examine it, back it up, restore it, upgrade it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import Exit, OnebasisError
from orchestrator.commands.processes import settings_to_run_with
from subspace_store.commands.terminal import STATE_DIR, AsJson, StateDir, console, counted, note, show, shown

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Settings (YAML); default: those of the last `up` here, else local.yaml."),
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
