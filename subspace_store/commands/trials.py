"""Commands that try something out in memory, on a store's tasks or on none: compare, reorder, chaos."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from configs.errors import InvalidInput, OnebasisError
from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter
from subspace_store.commands.place import (
    AtVersion,
    FixedRank,
    Place,
    Url,
    command,
    place_of,
    print_table,
    reader_at,
)
from subspace_store.commands.terminal import (
    STATE_DIR,
    AsJson,
    OfBaseModel,
    StateDir,
    console,
    decimals,
    errors,
    note,
    show,
    telling,
)
from subspace_store.log.version import MAIN
from subspace_store.subspace_reader import without_renewal

if TYPE_CHECKING:
    from subspace_store.merging.basis import ModuleSubspace

TRACE_LINES = 40
"""Number of lines that are shown of a simulated run that broke a promise; `--trace` shows all."""


@command
def compare(
    version: AtVersion = MAIN,
    rank: FixedRank = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Merge a version's tasks in every known way, in memory. Shows what each way loses and how much it stores."""
    from subspace_store.merging.variants import VARIANTS, Merged, merge_all

    adapters, settings, start = _as_delivered(place_of(store, state_dir, base_model), version, rank)
    found: dict[str, Merged] = {}
    for variant in VARIANTS:
        try:
            with telling(f"merging all tasks as {variant}"):
                found[variant] = merge_all(adapters, variant, settings, start)
        except InvalidInput as error:
            note(f"left out: {variant}: {error}")
    errors_of = {variant: tuple(merged.error.values()) for variant, merged in found.items()}
    answer = {
        variant: {
            "mean_error": statistics.fmean(errors_of[variant]),
            "worst_error": max(errors_of[variant]),
            "stored_numbers": merged.stored_numbers,
            "error": dict(merged.error),
        }
        for variant, merged in found.items()
    }

    def as_text(_: object) -> None:
        columns = ("", "mean error", "worst", "numbers stored")
        rows = [
            (variant, decimals(statistics.fmean(its)), decimals(max(its)), f"{found[variant].stored_numbers:,}")
            for variant, its in errors_of.items()
        ]
        print_table(columns, rows, "")

    show(answer, as_text, as_json)


@command
def reorder(
    version: AtVersion = MAIN,
    orders: Annotated[int, typer.Option(help="Number of random orders to try.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the random orders; the same seed gives the same orders.")] = 0,
    rank: FixedRank = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Merge a version's tasks again one by one in other orders, in memory. Shows how much their errors depend on it."""
    from subspace_store.merging.reorder import Spread
    from subspace_store.merging.reorder import reorder as tried

    adapters, settings, start = _as_delivered(place_of(store, state_dir, base_model), version, rank)
    with telling(f"merging all tasks in {orders} other orders"):
        report = tried(adapters, settings, orders, seed, start)
    lines = [(task, report.given[task], report.of_task(task), report.at_once[task]) for task in adapters]
    means = [statistics.fmean(errors.values()) for errors in (report.given, report.at_once)]
    lines.append(("mean", means[0], report.of_mean, means[1]))

    def as_text(_: object) -> None:
        def row(name: str, given: float, over: Spread, at_once: float) -> tuple[str, ...]:
            return name, *(decimals(error) for error in (given, over.low, over.median, over.high, at_once))

        columns = ("error of", "one by one", "least", "median", "most", "all at once")
        print_table(columns, [row(*line) for line in lines], "")

    keys = ("task_id", "given", "orders", "at_once")
    found = [dict(zip(keys, (name, given, asdict(over), once), strict=True)) for name, given, over, once in lines]
    show({"tasks": found[:-1], "mean": found[-1]}, as_text, as_json)


@command
def chaos(
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    runs: Annotated[int, typer.Option(help="Number of runs; each has the next seed.", min=1)] = 1000,
    jobs: Annotated[int, typer.Option(help="Number of processes; 0: one for each processor.", min=0)] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Print every storage call of every run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate faults: the store's code against crashes, lost replies, delays and rival writers. Uses no real store."""
    from rich.progress import track

    from subspace_store.chaos.simulation import ChaosReport, simulate, simulate_many

    seeds = range(seed, seed + runs)
    done = map(simulate, seeds) if trace else simulate_many(seeds, min(jobs or os.cpu_count() or 1, runs))
    report = ChaosReport()
    with telling(f"simulating {runs:,} runs") if not errors.is_terminal else contextlib.nullcontext():
        for run in track(done, "simulating", runs, console=errors, transient=True, disable=not errors.is_terminal):
            report.add(run)
            if run.trace:
                lines = run.trace if trace else run.trace[-TRACE_LINES:]
                errors.print("\n".join(lines), markup=False, soft_wrap=True)
            if run.violation:
                errors.print(f"[red]seed {run.seed}:[/red] {escape(run.violation)}", soft_wrap=True)
                note(f"again: onebasis store chaos --seed {run.seed} --runs 1 --trace")

    def as_text(_: object) -> None:
        print_table(("faults", ""), [(kind, f"{count:,}") for kind, count in sorted(report.faults.items())], "none")
        print_table(("events", ""), [(what, f"{count:,}") for what, count in sorted(report.events.items())], "none")
        broken = len(report.violations)
        verdict = f"[red]{broken} broke a promise[/red]" if broken else "no promise was broken"
        console.print(f"{report.runs:,} runs from seed {seed}: {verdict}")

    show({"seed": seed, **vars(report)}, as_text, as_json)
    if report.violations:
        raise typer.Exit(OnebasisError.exit_code)


def _as_delivered(
    place: Place, version: str, rank: int | None
) -> tuple[dict[str, Adapter], SubspaceSettings, Mapping[str, ModuleSubspace]]:
    """A version's adapters in the order of merging; the merge settings, the service's or exactly `rank` directions, by
    which no renewed basis is made; and the version's own renewed bases."""
    reader = reader_at(place)
    number = reader.resolve(version)
    tasks = reader.state.tasks_at(number)
    if not tasks:
        raise InvalidInput(f"version {version} holds no tasks", place.storage.url)
    with telling(f"reading the adapters at {place.storage.url}"):
        adapters = {task: reader.delivered(task) for task in tasks}
    settings = without_renewal(reader.settings)
    settings = settings.model_copy(update={} if rank is None else {"rank_fixed": rank})
    return adapters, settings, reader.renewed(number)
