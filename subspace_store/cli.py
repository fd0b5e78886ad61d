"""The commands `onebasis store …`, also `python -m subspace_store …`: a store is looked at and tended.

What a command writes goes through the service that runs here, if one does; else this process opens the store as its
writer.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from configs.errors import Conflict, InvalidInput, NotFound, OnebasisError, Unavailable
from configs.settings import Settings, StorageSettings, SubspaceSettings
from configs.state_folder import running_server, service_settings
from configs.terminal import STATE_DIR, AsJson, StateDir, command_of, console, errors, me, new_app, note, show
from subspace_store.adapter import Adapter
from subspace_store.retention import droppable, expirable
from subspace_store.retention import expire as judge_expiry
from subspace_store.storage import Storage, open_storage
from subspace_store.subspace_store import SubspaceStore
from subspace_store.version import CANDIDATE, MAIN

app = new_app("store", "A store of versions: check it, tag, hold, quarantine, pin, expire, collect.")
command = command_of(app, "interrupted; what was begun can be asked for again")

Url = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="The folder that FORMAT is in: file:…, s3://…; default: the service's."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="With --store: write although a service does, which has to open it anew then.")
]
FixedRank = Annotated[
    int | None, typer.Option("--rank", help="Exactly so many directions; default: as the store merges.", min=1)
]
AtVersion = Annotated[str, typer.Argument(metavar="[VERSION]", help="A branch, a tag or a number.")]
OnVersion = Annotated[str, typer.Option("--version", metavar="VERSION", help="A branch, a tag or a number.")]
Reference = Annotated[str, typer.Argument(metavar="VERSION", help="A branch, a tag or a number.")]
TaskId = Annotated[str, typer.Argument(metavar="TASK", help="Id of a task, or team/name of one that was merged.")]

SECONDS_A_DAY = 86400
TRACE_LINES = 40
"""Of a simulated run that broke a promise; `--trace` shows all."""
SERVICE: ContextVar[Callable[[Path, str, dict[str, Any]], Any] | None] = ContextVar("service", default=None)
"""How to have a running service write: state folder, operation, arguments. Set by `onebasis`; this package has no
client."""


@dataclass(frozen=True)
class Place:
    """Where the store is, and whose it is."""

    storage: Storage
    state_dir: Path
    settings: Settings | None
    """Of the service here; None where none has run."""
    is_named: bool
    """Whether the person gave the address."""

    @property
    def subspace(self) -> SubspaceSettings:
        """How merges are done: as the service here does them."""
        return self.settings.subspace if self.settings else SubspaceSettings()

    @property
    def is_served(self) -> bool:
        """Whether a service that runs here writes to this store."""
        if self.settings is None or running_server(Path(self.settings.state_dir)) is None:
            return False
        return open_storage(self.settings.storage, self.settings.base_model.name).url == self.storage.url


@command
def doctor(store: Url = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Try out whether a folder or bucket keeps the promises that a store needs. Nothing of a store is touched."""
    from subspace_store.doctor import examine

    checks = examine(_place(store, state_dir).storage)

    def as_text(_: object) -> None:
        for check in checks:
            mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
            console.print(f"{mark} {check.name}: {escape(check.what)}", soft_wrap=True)
            if check.todo:
                console.print(f"     → {escape(check.todo)}", soft_wrap=True)

    show([asdict(check) for check in checks], as_text, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(InvalidInput.exit_code)  # another place has to be named


@command
def verify(
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and measure every task again.")] = False,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Check that the store holds what its log says: the chain and every object's size, or with --deep everything."""
    from configs.errors import Corrupt
    from subspace_store.verify import verify as check

    reader = _reader(_place(store, state_dir))
    findings = check(reader, deep=deep)

    def as_text(_: object) -> None:
        for finding in findings:
            console.print(f"[red]{escape(finding.where)}[/red]: {escape(finding.what)}", soft_wrap=True)
        if not findings:
            console.print(f"{reader.storage.url} is as its log says", soft_wrap=True)

    show([asdict(finding) for finding in findings], as_text, as_json)
    if findings:
        raise typer.Exit(Corrupt.exit_code)


@command
def log(
    last: Annotated[int | None, typer.Option(help="Only so many of the newest records.", min=1)] = None,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show the version log, oldest record first."""
    entries = _reader(_place(store, state_dir)).history()[-last if last else None :]

    def as_text(_: object) -> None:
        rows = [(str(e.seq), _clock(e.time), str(e.epoch), e.op, e.actor, e.summary) for e in entries]
        _print_table(("seq", "time", "epoch", "operation", "by", ""), rows, "the log is empty")

    show([asdict(entry) for entry in entries], as_text, as_json)


@command
def tag(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the version is called from now on.")],
    version: Reference,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Name a version for ever; it never expires then."""
    place = _place(store, state_dir)
    number = _reader(place).resolve(version)
    _change(place, force, as_json, f"{name} is version {number}", "tag", name=name, version=number)


@command
def tags(store: Url = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """List tags and the versions they name."""
    found = _reader(_place(store, state_dir)).state.tags

    def as_text(_: object) -> None:
        rows = [(name, str(number)) for name, number in sorted(found.items(), key=lambda item: (item[1], item[0]))]
        _print_table(("tag", "version"), rows, "no tags")

    show(dict(found), as_text, as_json)


@command
def hold(
    reason: Annotated[str, typer.Argument(metavar="REASON", help="Shown to everybody who wonders.")],
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep `main` where it is: what passes the gate waits until `release`."""
    _change(_place(store, state_dir), force, as_json, "main is held", "hold", reason=reason)


@command
def release(store: Url = None, force: Force = False, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Let `main` move again after `hold` or `rollback --hold`."""
    _change(_place(store, state_dir), force, as_json, "main may move", "release")


@command
def quarantine(
    task: TaskId,
    reason: Annotated[str, typer.Argument(metavar="REASON", help="Shown to whoever tries to merge it.")],
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep a task from being merged again. Versions that hold it stay as they are."""
    place = _place(store, state_dir)
    task_id = _task_id(_reader(place), task)
    done = f"task {task_id} will not be merged"
    _change(place, force, as_json, done, "quarantine", task_id=task_id, reason=reason)


@command
def unquarantine(
    task: TaskId, store: Url = None, force: Force = False, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """Let a quarantined task be merged again."""
    place = _place(store, state_dir)
    task_id = _task_id(_reader(place), task)
    _change(place, force, as_json, f"task {task_id} may be merged", "unquarantine", task_id=task_id)


@command
def pin(
    version: Reference,
    owner: Annotated[str, typer.Option(help="Who needs it; default: you.")] = "",
    days: Annotated[float | None, typer.Option(help="For how long; default: until `unpin`.", min=0, max=36500)] = None,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep a version from expiring; again with other --days moves the end."""
    place = _place(store, state_dir)
    number, until = _reader(place).resolve(version), None if days is None else time.time() + days * SECONDS_A_DAY
    done = f"version {number} is kept for {owner or me()} " + ("until unpinned" if until is None else _until(until))
    _change(place, force, as_json, done, "pin", version=number, owner=owner or me(), until=until)


@command
def unpin(
    version: Reference,
    owner: Annotated[str, typer.Option(help="Whose pin; default: yours.")] = "",
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give a pin up."""
    place = _place(store, state_dir)
    number = _reader(place).resolve(version)
    done = f"{owner or me()} does not keep version {number}"
    _change(place, force, as_json, done, "unpin", version=number, owner=owner or me())


@command
def pins(store: Url = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """List pinned versions, for whom, and until when."""
    state = _reader(_place(store, state_dir)).state
    found = [(number, owner, until) for number, owners in sorted(state.pins.items()) for owner, until in owners.items()]

    def as_text(_: object) -> None:
        rows = [(str(n), owner, "until unpinned" if until is None else _until(until)) for n, owner, until in found]
        _print_table(("version", "for", ""), rows, "no pins")

    show([dict(zip(("version", "owner", "until"), row, strict=True)) for row in found], as_text, as_json)


@command
def expire(
    versions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERSION...]", help="These; without any, what --keep-last leaves over."),
    ] = None,
    keep_last: Annotated[int | None, typer.Option(help="How many of the newest versions of `main` stay.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would expire.")] = False,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give old and rejected versions up for ever. What a branch, a tag or a pin names stays."""
    place, now = _place(store, state_dir), time.time()
    state = _reader(place).state
    if bool(versions) == (keep_last is not None):
        raise InvalidInput("name the versions, or say with --keep-last how many stay")
    numbers = expirable(state, keep_last, now) if keep_last is not None else [*map(state.resolve, versions or ())]
    change = judge_expiry(state, numbers, now)
    listed = ", ".join(map(str, numbers))
    if yes and change:
        _change(place, force, as_json, f"expired: versions {listed}", "expire", versions=numbers, now=now)
    else:
        text = f"would expire: versions {listed} (--yes does it)" if change else "nothing can expire"
        show({"versions": numbers, "expired": False}, lambda _: note(text), as_json)


@command
def drop_adapters(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Ids, or team/name; published ones.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would be let go.")] = False,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Let go of tasks' adapters as they were delivered, for ever; `collect` deletes them. Heads and versions stay."""
    place = _place(store, state_dir)
    reader = _reader(place)
    task_ids = [_task_id(reader, task) for task in tasks]
    found = droppable(reader.state, task_ids)
    size = sum(task.adapter.size_bytes for task in found.values())
    what = f"{len(found)} adapters, {size / 1e6:.1f} MB"
    if yes and found:
        _change(place, force, as_json, f"let go: {what}", "drop_adapters", task_ids=task_ids)
    else:
        text = f"would let go of {what} (--yes does it)" if found else "nothing to let go"
        show({"task_ids": task_ids, "dropped": False}, lambda _: note(text), as_json)


@command
def collect(
    really: Annotated[bool, typer.Option("--really", help="Delete; otherwise only show what would be.")] = False,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Find objects that no version needs any more, and with --really delete them."""
    place = _place(store, state_dir)
    if really and place.is_served and not (force and place.is_named):
        raise _is_served(place)
    found = (_writer(place) if really else _reader(place)).collect(really=really)

    def as_text(_: object) -> None:
        for key in found.keys:
            console.print(key, soft_wrap=True, markup=False)
        verb = "deleted" if found.deleted else "would delete"
        end = "" if found.deleted or not found.keys else " (--really does it)"
        note(f"{verb} {len(found.keys)} objects, {found.size_bytes / 1e6:.1f} MB that the log knows of{end}")
        if found.abandoned:
            note(f"gave up {found.abandoned} writes that were begun and never finished")

    show(asdict(found), as_text, as_json)


@command
def forecast(
    adapters: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="PEFT folders or diffusers LoRA files.")],
    version: OnVersion = CANDIDATE,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Tell what merging adapters would cost every task, without doing it and without data."""
    from subspace_store.adapter_formats import read_adapter

    place = _place(store, state_dir)
    reader = _reader(place)
    news = {str(path): read_adapter(path, reader.base_model) for path in adapters}
    found = reader.forecast(news, reader.resolve(version))
    names = {task.task_id: task.name for task in reader.state.tasks_at(found.parent).values()}

    def as_text(_: object) -> None:
        arriving = [
            (name, f"{error:.4f}", f"{found.spanned[name]:.1%}") for name, error in found.error_at_birth.items()
        ]
        _print_table(("would arrive", "error at birth", "energy in the basis already"), arriving, "")
        console.print()
        held = [
            (names[task], f"{drift:.4f}", f"{found.error_bound[task]:.4f}")
            for task, drift in sorted(found.drift.items(), key=lambda item: -item[1])
        ]
        _print_table(("is there", "would drift", "error at most"), held, f"version {found.parent} holds no tasks")

    show(asdict(found), as_text, as_json)


@command
def remove(
    task: TaskId,
    reason: Annotated[str, typer.Option(help="Kept in the log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would be made again.")] = False,
    candidate_only: Annotated[
        bool, typer.Option("--candidate-only", help="Leave `main` where it is; not while a service runs.")
    ] = False,
    store: Url = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make every version since a task's birth again without it, and move `main` there. No gate is asked."""
    place = _place(store, state_dir)
    reader = _reader(place)
    state, task_id = reader.state, _task_id(reader, task)
    held = state.tasks_at(state.refs[CANDIDATE])
    if task_id not in held:
        raise NotFound(f"the candidate, version {state.refs[CANDIDATE]}, does not hold {task}", place.storage.url)
    again = [v for v in state.lineage(state.refs[CANDIDATE]) if v.number >= held[task_id].version]
    if not yes:
        text = f"would make {len(again)} versions again, from {again[0].number} on (--yes does it)"
        show(
            {"task_id": task_id, "versions": [v.number for v in again], "removed": False}, lambda _: note(text), as_json
        )
        return
    # The same task of the same candidate is the same request: interrupted, the command goes on. A request that was
    # done, and the task is there again, was rolled back.
    asked = f"remove {task_id} from {state.refs[CANDIDATE]}"
    op_key = next(key for n in count(1) if (key := f"{asked}, time {n}") not in state.op_keys)
    service = _service(place, force)
    if service is None:
        _writer(place).remove(task_id, op_key=op_key, actor=me(), reason=reason, publish=not candidate_only)
    elif candidate_only:
        raise Conflict(
            "the service rejects a candidate that no task waits for",
            place.storage.url,
            "leave --candidate-only out, or end the service with `onebasis down`",
        )
    else:
        service("remove", {"task_id": task_id, "reason": reason, "publish": True, "op_key": op_key})
    after = _reader(place).state
    number = after.op_keys[op_key]
    remade = [v for v in after.lineage(number) if task_id in v.removed]
    approximate = [task for version in remade for task in version.approximate]
    answer = {"task_id": task_id, "version": number, "approximate": approximate, "removed": True}
    text = f"version {number} is as if {held[task_id].name} had never been merged"
    if approximate:
        text += f", but approximate: merged from their coefficients were {', '.join(approximate)}"
    show(answer, lambda _: note(text), as_json)


@command
def export(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Made if it is not there.")],
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK...]", help="Default: all.")] = None,
    version: OnVersion = MAIN,
    base: Annotated[
        str | None, typer.Option("--base", metavar="SOURCE", help="Where servers load the base model from.")
    ] = None,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Write tasks as adapter folders, TEAM+TASK@vN each, as PEFT, vLLM and LoRAX load them."""
    from subspace_store.export import export_tasks

    place = _place(store, state_dir)
    reader = _reader(place)
    source = base or (place.settings.base_model.source if place.settings else reader.base_model)
    found = export_tasks(reader, output, reader.resolve(version), tasks, base_source=source)
    text = f"{len(found)} adapters in {output}; {output / 'adapters.json'} lists them"
    show([asdict(one) for one in found], lambda _: note(text), as_json)


@command
def compare(
    version: AtVersion = MAIN,
    rank: FixedRank = None,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Merge a version's tasks in every known way, in memory. Shows what is lost of their updates and what is stored."""
    from subspace_store.variants import VARIANTS, Merged, merge_all

    adapters, settings = _as_delivered(_place(store, state_dir), version, rank)
    found: dict[str, Merged] = {}
    for variant in VARIANTS:
        try:
            found[variant] = merge_all(adapters, variant, settings)
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
            (variant, f"{statistics.fmean(its):.4f}", f"{max(its):.4f}", f"{found[variant].stored_numbers:,}")
            for variant, its in errors_of.items()
        ]
        _print_table(columns, rows, "")

    show(answer, as_text, as_json)


@command
def reorder(
    version: AtVersion = MAIN,
    orders: Annotated[int, typer.Option(help="How many random orders to try.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="The same seed tries the same orders.")] = 0,
    rank: FixedRank = None,
    store: Url = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Merge a version's tasks again one by one in other orders, in memory. Shows how far their errors depend on it."""
    from subspace_store.reorder import Spread
    from subspace_store.reorder import reorder as tried

    adapters, settings = _as_delivered(_place(store, state_dir), version, rank)
    report = tried(adapters, settings, orders, seed)
    lines = [(task, report.given[task], report.of_task(task), report.at_once[task]) for task in adapters]
    means = [statistics.fmean(errors.values()) for errors in (report.given, report.at_once)]
    lines.append(("mean", means[0], report.of_mean, means[1]))

    def as_text(_: object) -> None:
        def row(name: str, given: float, over: Spread, at_once: float) -> tuple[str, ...]:
            return name, *(f"{error:.4f}" for error in (given, over.low, over.median, over.high, at_once))

        columns = ("error of", "one by one", "least", "median", "most", "all at once")
        _print_table(columns, [row(*line) for line in lines], "")

    keys = ("task_id", "given", "orders", "at_once")
    found = [dict(zip(keys, (name, given, asdict(over), once), strict=True)) for name, given, over, once in lines]
    show({"tasks": found[:-1], "mean": found[-1]}, as_text, as_json)


@command
def chaos(
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    runs: Annotated[int, typer.Option(help="How many seeds from there on.", min=1)] = 1000,
    jobs: Annotated[int, typer.Option(help="Processes; 0 is one for each processor.", min=0)] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Print every storage call of every run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate faults: the store's code against crashes, lost replies, delays and rival writers. Uses no real store."""
    from rich.progress import track

    from subspace_store.chaos import ChaosReport, simulate, simulate_many

    seeds = range(seed, seed + runs)
    done = map(simulate, seeds) if trace else simulate_many(seeds, min(jobs or os.cpu_count() or 1, runs))
    report = ChaosReport()
    for run in track(done, "simulating", runs, console=errors, transient=True, disable=not errors.is_terminal):
        report.add(run)
        if run.trace:
            lines = run.trace if trace else run.trace[-TRACE_LINES:]
            errors.print("\n".join(lines), markup=False, soft_wrap=True)
        if run.violation:
            errors.print(f"[red]seed {run.seed}:[/red] {escape(run.violation)}", soft_wrap=True)
            note(f"again: onebasis store chaos --seed {run.seed} --runs 1 --trace")

    def as_text(_: object) -> None:
        _print_table(("faults", ""), [(kind, f"{count:,}") for kind, count in sorted(report.faults.items())], "none")
        _print_table(("events", ""), [(what, f"{count:,}") for what, count in sorted(report.events.items())], "none")
        broken = len(report.violations)
        verdict = f"[red]{broken} broke a promise[/red]" if broken else "no promise was broken"
        console.print(f"{report.runs:,} runs from seed {seed}: {verdict}")

    show({"seed": seed, **vars(report)}, as_text, as_json)
    if report.violations:
        raise typer.Exit(OnebasisError.exit_code)


def _as_delivered(place: Place, version: str, rank: int | None) -> tuple[dict[str, Adapter], SubspaceSettings]:
    """A version's adapters, first merged first, and how the service merges, or with exactly `rank` directions."""
    reader = _reader(place)
    tasks = reader.state.tasks_at(reader.resolve(version))
    if not tasks:
        raise InvalidInput(f"version {version} holds no tasks", place.storage.url)
    return {task: reader.delivered(task) for task in tasks}, reader.settings.model_copy(
        update={} if rank is None else {"rank_fixed": rank}
    )


# Where the store is, and who writes to it


def _place(url: str | None, state_dir: Path) -> Place:
    try:
        settings = service_settings(state_dir)
    except Unavailable as error:
        if url is None:
            raise Unavailable(error.what, error.where, f"{error.todo}, or name a store with --store URL") from None
        settings = None
    if url is None:
        assert settings is not None
        return Place(open_storage(settings.storage, settings.base_model.name), state_dir, settings, False)
    how = settings.storage.model_copy(update={"url": url}) if settings else StorageSettings(url=url)
    return Place(open_storage(how), state_dir, settings, True)


def _reader(place: Place) -> SubspaceStore:
    try:
        place.storage.read("FORMAT")
    except NotFound:
        raise NotFound("no store is here", place.storage.url, "name the folder that FORMAT is in") from None
    return SubspaceStore.open(place.storage, settings=place.subspace)


def _writer(place: Place) -> SubspaceStore:
    reader = _reader(place)
    writer = f"command line of {me()}"
    return SubspaceStore.open(place.storage, settings=place.subspace, base_model=reader.base_model, writer=writer)


def _change(place: Place, force: bool, as_json: bool, done: str, operation: str, **arguments: Any) -> None:
    """Write one record: through the running service, or as the writer."""
    service = _service(place, force)
    if service is None:
        getattr(_writer(place), operation)(**arguments, actor=me())
    else:
        service(operation, arguments)
    show({"operation": operation, **arguments}, lambda _: note(done), as_json)


def _service(place: Place, force: bool) -> Callable[[str, dict[str, Any]], Any] | None:
    """How to have the running service write; None: this process is to write."""
    if not place.is_served or (force and place.is_named):
        return None
    ask = SERVICE.get()
    if ask is None or place.is_named:
        raise _is_served(place)
    return partial(ask, place.state_dir)


def _is_served(place: Place) -> Conflict:
    return Conflict(
        "a running service writes to this store",
        place.storage.url,
        "end it with `onebasis down`; or take over with --store URL --force, and it opens the store anew",
    )


def _task_id(reader: SubspaceStore, reference: str) -> str:
    tasks = {task for version in reader.state.versions.values() for task in version.added}
    found = sorted({task.task_id for task in tasks if reference in (task.name, task.task_id)})
    if len(found) > 1:
        raise InvalidInput(f"{reference} was merged as several tasks", todo=f"name one of {', '.join(found)}")
    if not found and "/" in reference:
        raise NotFound(f"no task {reference} was ever merged", reader.storage.url, "name its id")
    return found[0] if found else reference


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], nothing: str) -> None:
    if not rows:
        console.print(nothing)
        return
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=bool(name))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _until(at: float) -> str:
    return f"until {_clock(at)}"
