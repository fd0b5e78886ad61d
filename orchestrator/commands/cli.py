"""The command `onebasis`. Each command calls one method of the service and shows what it returned.

Heavy libraries are imported where they are needed: `onebasis --help` answers at once.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.document import check_document
from configs.errors import Conflict, Exit, InvalidInput, NotFound, OnebasisError, error_from_dict
from configs.places import home, located
from configs.task_spec import TaskSpec
from configs.uploads import is_upload
from orchestrator.api.client import Client, server_facts
from orchestrator.api.requests import (
    FLIPPED,
    FLIPPED_MAX,
    MOVES,
    PAGE,
    PAGE_MAX,
    Branch,
    BranchesAt,
    Cancel,
    Change,
    ChangeMany,
    Diff,
    DrainWorker,
    Export,
    Health,
    ListTasks,
    ListVersions,
    Pause,
    Preempt,
    PreviewRemove,
    PreviewRestore,
    PreviewRollback,
    ReadEvents,
    RejectVersion,
    Reload,
    Resume,
    Retry,
    ShowCapacity,
    ShowFlipped,
    ShowHistory,
    ShowScores,
    ShowTask,
    ShowVersion,
    Status,
    Way,
    Which,
)
from orchestrator.commands import (
    accounts,
    contexts,
    display,
    moments,
    prediction,
    score_texts,
    submission,
    upkeep,
    version_tables,
    webhooks,
)
from orchestrator.commands.attention import LOOK_SECONDS, WATCH_SECONDS, Attention, UntilNews
from orchestrator.commands.contexts import anywhere
from orchestrator.commands.submission import ENDS
from orchestrator.tasks.task_record import TaskState
from subspace_store.commands.state_folder import keep_source, settings_source
from subspace_store.commands.terminal import (
    EXIT_CODES,
    STATE_DIR,
    AsJson,
    OfBaseModel,
    OpKey,
    StateDir,
    command_of,
    counted,
    error,
    me,
    new_app,
    note,
    show,
    telling,
)
from subspace_store.log.version import CANDIDATE, MAIN, number_in
from subspace_store.requests import Remove, RestoreRevision, Rollback, StoreRequest

app = new_app("onebasis", "One shared low-rank subspace for every team's tasks: submit, watch, roll back, export.")
INTERRUPTED = (
    "interrupted; the tasks are not. `onebasis status` shows whether the service runs, `onebasis tasks` where it is"
)
command_here = command_of(app, INTERRUPTED)
command = anywhere(command_here)
starting_command = command_of(app, "interrupted; `onebasis status` shows what runs, `onebasis up` starts the rest")
ending_command = command_of(app, "interrupted; `onebasis status` shows what still runs, `onebasis down` ends it")
draining_command = anywhere(
    command_of(
        app,
        "interrupted; what was drained stays drained. `onebasis workers` shows what is left; `--undo` takes it back",
    )
)
waiting_command = anywhere(command_of(app, INTERRUPTED, epilog=EXIT_CODES))

VERSION = "Number, tag or branch; `onebasis versions` lists them."
AtVersion = Annotated[str | None, typer.Option("--version", metavar="V", help=f"Default: what `main` holds. {VERSION}")]
NAMES = "Id, beginning of an id, team/name, or team/name@2: its second revision."
WHEN = "2026-11-30, '2026-11-30 14:05', with an offset from UTC if you like, or '2h ago'; else this machine's time."
At = Annotated[str | None, typer.Option("--at", metavar="TIME", help=f"What was so then: {WHEN}")]
Reference = Annotated[str, typer.Argument(metavar="ID", help=NAMES)]
OneTask = Annotated[str | None, typer.Argument(metavar="[ID]", help=NAMES)]
OfTeam = Annotated[str | None, typer.Option("--team", help="Of this team.")]
InState = Annotated[str | None, typer.Option("--state", help="Those in this state.")]
OnBaseModel = Annotated[str | None, typer.Option("--base-model", metavar="NAME", help="Those of this base model.")]
TheirFiles = Annotated[
    bool, typer.Option("--their-files", help="Files that the tasks name are where the service runs, at these paths.")
]
RAW = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Arguments are handed on as they are."""


@starting_command
def up(
    config: Annotated[
        Path | None,
        typer.Option(help="Settings (YAML); default: those of the last `up` here, else configs/local.yaml."),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Take the store over from the service that it belongs to, which then stops."),
    ] = False,
    remove_base_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A base model that may leave the service though it has tasks, which wait."),
    ] = None,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay", help="Stay until the service ends, for systemd or a container; SIGTERM ends it in order."
        ),
    ] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Start the service: Ray, the store, the workers, the control plane. Safe to repeat."""
    from orchestrator.commands import processes

    settings = processes.settings_to_run_with(config, state_dir)
    status = processes.up(settings, note if not as_json else _silent, take_over, config, remove_base_model or ())
    show(status, display.status, as_json)
    if not as_json and (made := accounts.first_token(Client(state_dir))) is not None:
        note(
            "for the web page, and for people on other machines (`onebasis login`); commands of who may read the state "
            "folder need no token"
        )
        accounts.secret(made)
    if not as_json and (facts := server_facts(state_dir)) is not None:
        note(f"the web page: {facts['url']}/ (log in with a token: `onebasis token create --help`)")
    if stay:
        processes.stay(state_dir.resolve(), note if not as_json else _silent)


@command_here
def reload(
    config: Annotated[
        Path | None, typer.Option(help="Settings (YAML); default: the file that the last `up` or `reload` named.")
    ] = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Read the settings again: a running service takes further base models and pools, new sizes of pools, teams,
    data_roots, data_buckets, the gate, who may what (main, oidc), webhooks, tracing and serving.

    Anything else that is different is refused by name, and nothing is taken then.
    """
    from configs.settings import read_settings

    if config is not None:
        settings = read_settings(config)
    elif (noted := settings_source(state_dir)) is not None:
        settings = read_settings(*noted)
    else:
        raise InvalidInput("no settings file was ever named here", "onebasis reload", "add --config FILE")
    show(Client(state_dir).ask(Reload(settings=settings, by=me())), display.reloaded, as_json)
    if config is not None:
        keep_source(state_dir, config)


@ending_command
def down(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """End the service. Running tasks write a checkpoint and go on from it at the next `up`."""
    from orchestrator.commands import processes

    ended = processes.down(state_dir.resolve(), note if not as_json else _silent)
    show({"was_running": ended}, lambda _: note("down" if ended else "nothing was running"), as_json)


@command
def status(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Show whether the service is up, what its workers do, and how many tasks are in which state. Exit code 10: it is
    down."""
    answer = Client(state_dir).ask(Status())
    show(answer, display.status, as_json)
    if not answer["running"]:
        raise typer.Exit(Exit.DOWN)


@waiting_command
def submit(
    tasks: Annotated[
        list[Path], typer.Argument(metavar="TASK.yaml...", help="Task files, or folders of them; see configs/tasks/.")
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the tasks have ended; show progress.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, submit nothing.")] = False,
    revise: Annotated[
        bool, typer.Option("--revise", help="The rows are new ones for published tasks: their next revisions.")
    ] = False,
    their_files: TheirFiles = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Submit tasks. Submitting the same file again is the same task.

    With --revise, or `revises: true` in the file, a published task goes on learning from the file's rows alone: its
    next revision takes its place if the gate lets it.

    Of several files, or a folder, all are checked before the first is submitted: if one is wrong, none is. The exit
    code is the highest of theirs, and --json prints a list.
    """
    client, files = Client(state_dir), submission.task_files(tasks)
    if files == tasks and len(files) == 1:
        spec = submission.read(files[0], revise)
        raise typer.Exit(submission.submit(client, spec, wait, dry_run, as_json, their_files))
    raise typer.Exit(submission.submit_all(client, files, wait, dry_run, as_json, their_files, revise))


@waiting_command
def import_(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE",
            help="PEFT folder (adapter_config.json and safetensors), or a LoRA file that diffusers saved.",
        ),
    ],
    team: Annotated[str, typer.Option(help="Team that the task belongs to.")],
    name: Annotated[str, typer.Option(help="Name of the task.")],
    base_model: OfBaseModel = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of the task; default: text_to_image for diffusers, else sequence_classification."),
    ] = None,
    eval_file: Annotated[str | None, typer.Option(help="Rows to score it on; without them it has no score.")] = None,
    label_names: Annotated[str, typer.Option(help="Label names in the order of the outputs, comma-separated.")] = "",
    text_column: Annotated[str, typer.Option(help="Key of the text in each row.")] = "text",
    text_pair_column: Annotated[str | None, typer.Option(help="Key of the second text, if there is one.")] = None,
    label_column: Annotated[str, typer.Option(help="Key of the label in each row.")] = "label",
    max_length: Annotated[int, typer.Option(help="Longest input in tokens.")] = 128,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the task has ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, submit nothing.")] = False,
    their_files: TheirFiles = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Submit an adapter that was trained elsewhere as a task."""
    from subspace_store.formats.adapter_files import is_diffusers

    if kind is None and not (their_files or is_upload(adapter) or "://" in adapter):
        kind = "text_to_image" if is_diffusers(home(adapter)) else None
    data = {
        "eval_file": eval_file or None,
        "label_names": [label.strip() for label in label_names.split(",")] if label_names else [],
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "max_length": max_length,
    }
    document = {
        "team": team,
        "name": name,
        "base_model": base_model or _only_base_model(Client(state_dir)),
        "method": {"name": "import", "adapter": adapter},
        "data": data,
    } | ({"kind": kind} if kind else {})
    spec = located(check_document(document, TaskSpec, "task"), Path.cwd())  # as text: a Path makes https:/ of a URL
    raise typer.Exit(submission.submit(Client(state_dir), spec, wait, dry_run, as_json, their_files))


@command
def tasks(
    team: Annotated[str | None, typer.Option(help="Only tasks of this team.")] = None,
    state: Annotated[str | None, typer.Option(help="Only tasks in this state.")] = None,
    limit: Annotated[int, typer.Option(help="Number of tasks, the newest ones.", min=1, max=PAGE_MAX)] = PAGE,
    base_model: Annotated[str | None, typer.Option(metavar="NAME", help="Only tasks of this base model.")] = None,
    before: Annotated[str, typer.Option(metavar="ID", help="Only tasks older than this one: the page before.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Follow until every task that is listed has ended.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """List tasks with their state, place in the queue and scores."""
    client = Client(state_dir)
    asked = ListTasks(team=team, state=_state(state), base_model=base_model, cursor=before, limit=limit)
    service = Attention(client)

    def ask() -> list[display.Json]:
        service.look()
        return client.ask(asked)

    if watch:
        (display.follow_quietly if as_json else display.follow)(ask, UntilNews(client, ReadEvents(team=team)))
    rows = client.ask(asked)
    show(rows, display.tasks, as_json)
    if not rows and not as_json:
        for base in client.ask(Status())["base_models"]:
            if unknown := base["not_in_database"]:
                note(display.unknown_tasks(unknown, base))
    if len(rows) == limit:
        newest = f"the newest {counted(limit, 'task')}"
        note(f"{newest}; `--before {rows[0]['task_id']}` lists older ones, `--limit` more at once")


@command
def task(reference: Reference, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Show one task: state and why, place, progress, result, events."""
    show(Client(state_dir).ask(ShowTask(reference=reference)), display.task, as_json)


@command
def cancel(
    reference: OneTask = None,
    team: OfTeam = None,
    state: InState = None,
    base_model: OnBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Stop a task that is not part of a version yet; or those of a team, or in a state."""
    client = Client(state_dir)
    if reference is None:
        _change_many("cancel", client, team, state, base_model, as_json)
        return
    _refuse_both(team, state, base_model)
    answer = client.ask(Cancel(reference=reference, by=me()))
    show(answer, lambda a: note(f"{a['title']}: {a['state']}, stopping" if a["state"] == "training"
          else f"{a['title']}: {a['state']}"), as_json)  # fmt: skip


@command
def retry(
    reference: OneTask = None,
    team: OfTeam = None,
    state: InState = None,
    base_model: OnBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Submit a task again that is parked, rejected or cancelled, its files as they are now; or those of a team."""
    client = Client(state_dir)
    if reference is None:
        _change_many("retry", client, team, state, base_model, as_json)
        return
    _refuse_both(team, state, base_model)
    show(client.ask(Retry(reference=reference, by=me())), display.submitted, as_json)


@command
def pause(
    reference: OneTask = None,
    team: OfTeam = None,
    state: InState = None,
    base_model: OnBaseModel = None,
    service: Annotated[bool, typer.Option("--service", help="Pause the whole service.")] = False,
    reason: Annotated[str, typer.Option(help="Reason, shown to all who wait.")] = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Start a task no more, or nothing of a team, or, with --service, nothing at all; what runs in a paused team goes
    on, a paused task writes a checkpoint. With --state: each of these tasks."""
    client = Client(state_dir)
    if state is not None and reference is None and not service:
        _change_many("pause", client, team, state, base_model, as_json, reason)
        return
    _refuse_all_but_one(reference, team, service, state, base_model)
    asked = Pause(reference=reference, team=team, reason=reason, by=me())
    show(client.ask(asked), display.paused, as_json)


@command
def resume(
    reference: OneTask = None,
    team: OfTeam = None,
    state: InState = None,
    base_model: OnBaseModel = None,
    service: Annotated[bool, typer.Option("--service", help="Resume the whole service.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Take a pause back: of a task, a team or, with --service, the service. With --state: of each of these tasks."""
    client = Client(state_dir)
    if state is not None and reference is None and not service:
        _change_many("resume", client, team, state, base_model, as_json)
        return
    _refuse_all_but_one(reference, team, service, state, base_model)
    show(client.ask(Resume(reference=reference, team=team, by=me())), display.resumed, as_json)


@draining_command
def drain(
    worker: Annotated[
        str | None, typer.Argument(metavar="[WORKER]", help="Name of a worker; `onebasis workers` lists them.")
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="ADDRESS", help="All workers on the machine of this address.")
    ] = None,
    let_end: Annotated[bool, typer.Option("--let-end", help="Let what trains there end first.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the workers have ended and their places are given back.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back: tasks are given there again.")] = False,
    reason: Annotated[str, typer.Option(help="Reason, shown to those whose tasks wait again.")] = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give a worker nothing new before maintenance: what trains there writes a checkpoint and waits in the queue again,
    or ends first, with --let-end; then the worker ends, which --wait waits for. Kept over restarts."""
    if (worker is None) == (node is None):
        raise InvalidInput("names not exactly one of a worker and a machine", "drain", "name a worker, or add --node")
    if undo and (wait or let_end):
        raise InvalidInput("--undo stands beside --wait or --let-end", "drain", "leave one of them out")
    asked = DrainWorker(
        what=worker or node or "", is_node=node is not None, let_end=let_end, undo=undo, reason=reason, by=me()
    )
    client = Client(state_dir)
    answer = client.ask(asked)
    if wait:
        answer |= _given_back(client, answer, note if not as_json else _silent)
    show(answer, display.drained, as_json)


def _given_back(client: Client, answer: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Wait until all drained workers have ended. A worker of a drained machine counts also while it is not known where
    it is.

    Raises:
        Conflict: Somebody took the drain back meanwhile.
    """
    what, service, said = answer["what"], Attention(client), dict[str, str]()
    say(f"{what} is drained; waiting until its places are given back (Ctrl-C leaves the drain as it is)")
    while True:
        service.look()
        health = client.ask(Health())
        drains = health.get("drains")
        if drains is not None and (what, answer["is_node"]) in [(one["what"], one["is_node"]) for one in drains]:
            left = {
                name: one["does"]
                for pool in health["pools"].values()
                for name, one in pool["workers"].items()
                if name == what
                or what in one["machines"]
                or (answer["is_node"] and one["state"] in ("busy", "warm") and not one["machines"])
            }
            for name in [name for name in said if name not in left]:
                del said[name]
                say(f"  {name}: its places are given back")
            for name, does in left.items():
                if said.get(name) != does:
                    said[name] = does
                    say(f"  {name}: {does}")
            if not left:
                return {"workers": {}, "given_back": True}
        elif drains is not None and said:
            todo = "`onebasis status` shows what is drained"
            raise Conflict(
                f"somebody took the drain of {what} back, and not all of its places are given back", todo=todo
            )
        time.sleep(WATCH_SECONDS)


@command
def workers(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """List the workers by pool, with what each of them does and where it is. Exit code 10: the service is down."""
    answer = Client(state_dir).ask(Health())
    show(answer, display.workers, as_json)
    if not answer["running"]:
        raise typer.Exit(Exit.DOWN)


@command
def preempt(reference: Reference, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Take the worker from a running task, which keeps its place and goes on from its checkpoint."""
    show(Client(state_dir).ask(Preempt(reference=reference, by=me())), display.preempted, as_json)


@command
def logs(
    reference: Reference,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show a task's log: its events and the lines of its training."""
    client = Client(state_dir)
    lines = []
    for event in _followed(client, reference, as_json) if follow else client.pages(ReadEvents(reference=reference)):
        lines.append(event)
        if not as_json:
            display.log_lines([event])
    if as_json:
        print(json.dumps(lines))


def _followed(client: Client, reference: str, as_json: bool) -> Iterator[dict[str, Any]]:
    """A task's events until it has ended; meanwhile, what is new about its place and the service is said."""
    service, places, last, looked = Attention(client), display.Places(), 0, 0.0
    for event in client.follow(ReadEvents(reference=reference, after=0)):
        if event is not None:
            last = event["event_id"]
            yield event
            pause = LOOK_SECONDS if event["kind"] in display.TOLD_WHILE_TRAINING else WATCH_SECONDS
            if time.monotonic() - looked < pause:
                continue
        looked = time.monotonic()
        service.look()
        now = client.ask(ShowTask(reference=reference))
        if said := places.moved(now):
            (note if as_json else display.log_line)(said)
        if now["state"] in ENDS:
            yield from client.pages(ReadEvents(reference=reference, after=last))
            return


@command_here
def simulate(
    arrivals: Annotated[
        Path,
        typer.Argument(
            metavar="ARRIVALS.csv",
            help="Columns at_seconds, team, seconds; pool, base_model, ranks, gpus, priority, max_run_seconds.",
        ),
    ],
    settings: Annotated[
        Path | None,
        typer.Option(help="Settings (YAML), for `teams` and `pools`; default: those of the last `up` here."),
    ] = None,
    load_seconds: Annotated[
        float, typer.Option(min=0.0, help="Time that a worker takes until it is ready, once it was asked for.")
    ] = 60.0,
    machines: Annotated[
        int, typer.Option(min=1, help="Machines that the pools share, each with --cpus, --gpus and --memory-gb.")
    ] = 1,
    cpus: Annotated[
        float | None, typer.Option(min=0.0, help="CPUs of each machine; default: there is room for all pools.")
    ] = None,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each.")] = 0.0,
    memory_gb: Annotated[float, typer.Option(min=0.0, help="Memory of each, in 10⁹ bytes.")] = 0.0,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show what these arrivals would wait for under some settings: the real scheduler, weeks in seconds.

    at_seconds is when a task is submitted, seconds how long it runs. Nothing is started and no service is asked.
    """
    from configs.settings import read_settings
    from orchestrator.scheduling import simulation
    from orchestrator.scheduling.arrivals import read_arrivals
    from orchestrator.scheduling.fair_share import shares_of

    read = read_settings(settings or state_dir / "settings.yaml")
    try:
        lines = arrivals.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot be read: {error}", str(arrivals), "name a CSV file") from error
    found = read_arrivals(lines, read.pools, str(arrivals))
    if strangers := sorted({one.team for one in found} - read.teams.keys()):
        teams = ", ".join(sorted(read.teams))
        raise InvalidInput(f"there is no team '{strangers[0]}'", str(arrivals), f"teams of these settings: {teams}")
    if cpus is None and (machines > 1 or gpus or memory_gb):
        raise InvalidInput("says something of the machines, and not their CPUs", "machines", "add --cpus")
    there = () if cpus is None else simulation.machines_alike(read.pools, machines, cpus, gpus, memory_gb)
    with telling("simulating"):
        done = simulation.simulate(found, shares_of(read.teams), read.pools, load_seconds=load_seconds, machines=there)
    show(simulation.report(done), display.simulation, as_json)


@command
def versions(
    at: At = None, base_model: OfBaseModel = None, state_dir: StateDir = STATE_DIR, as_json: AsJson = False
) -> None:
    """List the subspace's versions; with --at, say which ones the branches named at a moment."""
    client = Client(state_dir)
    if at is None:
        show(client.ask(ListVersions(base_model=base_model)), version_tables.versions, as_json)
    else:
        show(client.ask(BranchesAt(at=moments.moment(at), base_model=base_model)), version_tables.branches_at, as_json)


@command
def history(
    branch: Annotated[Branch, typer.Argument(help="The branch.")] = "main",
    limit: Annotated[int, typer.Option(help="Number of moves, the newest ones.", min=1, max=PAGE_MAX)] = MOVES,
    before: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only moves before record N: the page before.")
    ] = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show every move of a branch: when, who, why, from which version to which, which tasks came, left or changed, and
    their scores before and after."""
    answer = Client(state_dir).ask(ShowHistory(branch=branch, before=before, limit=limit, base_model=base_model))
    show(answer, version_tables.history, as_json)
    if answer["before"] is not None:
        note(f"the newest {counted(limit, 'move')}; `--before {answer['before']}` lists older ones, `--limit` more")


@command
def version(
    number: Annotated[str, typer.Argument(metavar="V", help=VERSION)],
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show one version: its tasks with scores and drift, ranks, what is stored."""
    client = Client(state_dir)
    asked = ShowVersion(base_model=base_model, version=_version(client, number, base_model))
    show(client.ask(asked), version_tables.version, as_json)


@command
def diff(
    old: Annotated[str, typer.Argument(metavar="V", help=f"The version before; 0 is empty. {VERSION}")],
    new: Annotated[str, typer.Argument(metavar="W", help="The version after.")],
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show what changed between two versions."""
    client = Client(state_dir)
    asked = Diff(base_model=base_model, old=_version(client, old, base_model), new=_version(client, new, base_model))
    show(client.ask(asked), version_tables.diff, as_json)


@command
def rollback(
    number: Annotated[str, typer.Argument(metavar="V", help=f"Version to move `main` to; 0: the empty one. {VERSION}")],
    preview: Annotated[bool, typer.Option("--preview", help="Only show which tasks vanish or return.")] = False,
    reason: Annotated[str, typer.Option(help="Reason, kept in the version log.")] = "",
    hold: Annotated[bool, typer.Option("--hold", help="Keep `main` there until `onebasis store release`.")] = False,
    op_key: OpKey = "",
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Move `main` to a version, backward or forward. Nothing is copied and nothing is lost."""
    client = Client(state_dir)
    to = _version(client, number, base_model)
    if preview:
        answer = client.ask(PreviewRollback(base_model=base_model, version=to))
    elif not hold and not op_key and _both_are_at(client, to, base_model):  # nothing to write down
        answer = client.ask(PreviewRollback(base_model=base_model, version=to)) | {"preview": False}
    else:
        answer = client.ask(
            Rollback(base_model=base_model, version=to, reason=reason, hold=hold, op_key=op_key, actor=me())
        )
    show(answer, version_tables.rollback, as_json)


@command
def reject(
    number: Annotated[str, typer.Argument(metavar="V", help=f"The version that waits. {VERSION}")],
    reason: Annotated[str, typer.Option(help="Why; the version log keeps it, and its tasks say so.")],
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Refuse a version before it is published, while it waits for its canary, for a check, or since `main` is held.

    Its task is rejected; of several, each is merged again by itself and waits again. For who may roll back.
    """
    client = Client(state_dir)
    asked = RejectVersion(version=_version(client, number, base_model), reason=reason, base_model=base_model, by=me())
    show(client.ask(asked), version_tables.rejected, as_json)


@command
def rollback_task(
    reference: Reference,
    to: Annotated[int, typer.Option("--to", metavar="N", help="Number of the revision; `onebasis task` lists them.")],
    preview: Annotated[bool, typer.Option("--preview", help="Only show the error that it would have.")] = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Put an earlier revision of a task back, in today's basis, and move `main` there. No other task moves, and the
    gate does not judge it."""
    client = Client(state_dir)
    title = client.ask(ShowTask(reference=reference))["title"]
    found = client.ask(ShowTask(reference=f"{title}@{to}"))
    task_id, base_model = found["task_id"], found["base_model"]
    if preview:
        answer = client.ask(PreviewRestore(task_id=task_id, base_model=base_model))
    else:
        asked = RestoreRevision(task_id=task_id, publish=True, base_model=base_model, op_key=op_key, actor=me())
        answer = client.ask(asked)
    show(answer | {"revision": to}, version_tables.restored, as_json)


@command
def remove(
    reference: Reference,
    reason: Annotated[str, typer.Option(help="Kept in the version log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would be made again.")] = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make every version since a task's birth again without it, and move `main` there. The gate does not judge it.

    All its revisions go. Of a service on another machine too; `onebasis store remove` works on a store by itself.
    """
    client = Client(state_dir)
    task = client.ask(ShowTask(reference=reference))
    task_id, base_model = task["task_id"], task["base_model"]
    with telling(f"merging without {task['title']}"):
        if yes:
            asked = Remove(
                task_id=task_id, reason=reason, publish=True, base_model=base_model, op_key=op_key, actor=me()
            )
            answer = client.ask(asked) | {"preview": False, "title": task["title"]}
        else:
            answer = client.ask(PreviewRemove(task_id=task_id, base_model=base_model))
    show(answer, version_tables.removed, as_json)


@command
def export(
    reference: Reference,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; must be new or empty.")
    ],
    number: AtVersion = None,
    at: At = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Write one task as a PEFT adapter that peft.PeftModel.from_pretrained loads; a LoRA of diffusers as its file."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidInput("is not empty", str(output), "name a new folder")
    if at is not None and number is not None:
        raise InvalidInput("names a version and a moment", "--version, --at", "leave one of them out")
    client = Client(state_dir)
    version = _version_or_main(client, number, base_model) if at is None else _main_at(client, at, base_model)
    packed = client.ask(Export(base_model=base_model, reference=reference, version=version))
    try:
        output.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            archive.extractall(output)
            names = archive.namelist()
    except OSError as error:
        raise InvalidInput(
            f"cannot write there: {error}", str(output), "name a folder that you may write to"
        ) from error
    show(
        {"output": str(output), "files": names} | ({"at": at, "version": version} if at is not None else {}),
        lambda a: note(f"wrote {', '.join(names)} to {output}"),
        as_json,
    )


@starting_command
def serve(
    port: Annotated[int | None, typer.Option(help="TCP port; default: that of the settings, else 8001.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the interface; 0.0.0.0 for all.")] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Most processes that answer for each base model; the least is in the settings.")
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION", help="`candidate`, or a number, answers a share of the requests; `none`: no longer."
        ),
    ] = None,
    share: Annotated[float | None, typer.Option(help="Share of the requests for the canary; default: 0.05.")] = None,
    end: Annotated[bool, typer.Option("--end", help="Answer no more.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP for all published tasks, in the background, until `--end` or `onebasis down`.

    /v1/predict takes rows; /v1/chat/completions and /v1/completions are OpenAI's, with `model` = team/task. Replicas
    follow `main`. The rest of `serving:` is in the settings.
    """
    from configs.document import check_document
    from configs.settings import ServingSettings
    from subspace_store.commands.state_folder import service_settings

    settings = service_settings(state_dir)
    named = {"port": port, "host": host, "replicas_max": replicas}
    chosen = (settings.serving or ServingSettings()).model_dump() | {k: v for k, v in named.items() if v is not None}
    chosen["canary"] = _canary(chosen["canary"], canary, share)
    serving = None if end else check_document(chosen, ServingSettings, "serve")
    with telling("loading the base model for the replicas"):
        answer = Client(state_dir).ask(Reload(settings=settings.model_copy(update={"serving": serving}), by=me()))
    show(answer, display.serving, as_json)


def _canary(before: dict[str, Any] | None, version: str | None, share: float | None) -> dict[str, Any] | None:
    """The canary's settings after a command; a share that is not named stays."""
    if version == "none":
        return None
    if version is None and share is not None and before is None:
        raise InvalidInput("there is no canary to have a share", "--share", "name its version: `--canary candidate`")
    named = {"version": int(version) if version is not None and version.isdecimal() else version, "share": share}
    given = {name: value for name, value in named.items() if value is not None}
    return (before or {}) | given if before or given else None


@waiting_command
def predict(
    reference: Reference,
    text: Annotated[
        list[str] | None, typer.Option(help="A text, a prompt, or the first message of a chat. May be repeated.")
    ] = None,
    pair: Annotated[list[str] | None, typer.Option(help="The second text, where the task reads two.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture, as PNG or JPEG. May be repeated.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows as the task file names them; labels need not be there.")
    ] = None,
    number: AtVersion = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Have a published task answer rows.

    A worker that is free answers; if none is, or no service runs, this process loads the base model. The exit code is
    that of the first row that could not be answered.
    """
    client = Client(state_dir)
    asked = prediction.inputs(client, reference, text or (), pair or (), image or (), rows)
    version = _version_or_main(client, number, base_model)
    answer = prediction.joined(list(prediction.predict(client, reference, asked, version, base_model)))
    named = [str(file) for file in image] if image else asked
    show(answer, lambda a: prediction.show_answers(a, named), as_json)
    wrong = [error_from_dict(said["error"]) for said in answer["answers"] if "error" in said]
    if wrong:
        raise typer.Exit(wrong[0].exit_code)


@waiting_command
def which(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What somebody would ask.")],
    by: Annotated[
        Way | None,
        typer.Option(help="`features` of each task's evaluation rows, or `energy` of its update."),
    ] = None,
    number: AtVersion = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Find the task that a text is for, and have it answer. Shows the likeliest tasks, and how they were found."""
    client = Client(state_dir)
    version = _version_or_main(client, number, base_model)
    asked = Which(texts=tuple(texts), way=by, version=version, base_model=base_model)
    show(prediction.which(client, asked), lambda a: prediction.show_which(a, texts), as_json)


@command
def scores(
    number: AtVersion = None,
    form: Annotated[
        Literal["table", "csv", "latex"],
        typer.Option("--format", help="A table to read, CSV with all digits, or a LaTeX table (booktabs)."),
    ] = "table",
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show the score of every task under every version, and what was forgotten."""
    if as_json and form != "table":
        raise InvalidInput("names two forms", "--json, --format", "leave one of them out")
    client = Client(state_dir)
    answer = client.ask(ShowScores(base_model=base_model, version=_version_or_main(client, number, base_model)))
    if form == "table":
        show(answer, version_tables.scores, as_json)
    else:
        print(score_texts.csv_text(answer) if form == "csv" else score_texts.latex_text(answer), end="")


@command
def flipped(
    reference: Reference,
    number: AtVersion = None,
    limit: Annotated[int, typer.Option(min=1, max=FLIPPED_MAX, help="Rows that are listed, at most.")] = FLIPPED,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show the evaluation rows of a task that a version answers otherwise than at the task's birth, the worst first."""
    client = Client(state_dir)
    asked = ShowFlipped(reference=reference, version=_version_or_main(client, number, base_model), limit=limit)
    show(client.ask(asked), version_tables.flipped, as_json)


@command
def capacity(
    number: AtVersion = None,
    base_model: OfBaseModel = None,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Show what the tasks store, shared and each for itself, against separate adapters."""
    client = Client(state_dir)
    asked = ShowCapacity(base_model=base_model, version=_version_or_main(client, number, base_model))
    show(client.ask(asked), version_tables.capacity, as_json)


@app.command("store", context_settings=RAW, add_help_option=False)
def store(context: typer.Context) -> None:
    """The version log and its storage: check, tag, hold, pin, expire, collect. `onebasis store --help` lists it all."""
    try:
        remote, arguments = contexts.of_arguments(context.args)
    except OnebasisError as problem:
        error(problem)
        raise typer.Exit(problem.exit_code) from None
    with telling("loading the program"):  # from a cold disk, or on a busy machine
        from subspace_store.commands import app as store_cli
        from subspace_store.commands.place import ELSEWHERE

    def ask(state_dir: Path, request: StoreRequest[Any]) -> dict[str, Any]:
        return Client(state_dir).ask(request)

    tokens = store_cli.SERVICE.set(ask), ELSEWHERE.set(remote.url if remote else "")
    try:
        with contexts.asking(remote, "--json" in arguments):
            store_cli.app(arguments, prog_name="onebasis store")
    finally:
        store_cli.SERVICE.reset(tokens[0])
        ELSEWHERE.reset(tokens[1])


def _only_base_model(client: Client) -> str:
    """The service's base model, where it has one alone. Raises InvalidInput where it has several."""
    names = [base["base_model"] for base in client.ask(Health())["base_models"]]
    if len(names) > 1:
        todo = f"add --base-model: one of {', '.join(names)}"
        raise InvalidInput("this service has several base models", "base_model", todo)
    return str(names[0])


def _version_or_main(client: Client, name: str | None, base_model: str | None) -> int | None:
    return None if name is None else _version(client, name, base_model)


def _version(client: Client, name: str, base_model: str | None) -> int:
    """The version that a number, a tag or a branch names now."""
    number = number_in(name)
    if number is not None and not name.startswith("v"):
        return number  # no tag is a number: there is no need to ask for them
    for row in client.ask(ListVersions(base_model=base_model)):
        if name in (*row["refs"], *row["tags"]):
            return int(row["version"])
    if name in (MAIN, CANDIDATE):  # no version has it: it is the empty one
        return 0
    if number is not None:  # and no tag of an earlier release is called so
        return number
    raise NotFound(f"there is no version, tag or branch '{name}'", todo="`onebasis versions` lists them")


def _main_at(client: Client, at: str, base_model: str | None) -> int:
    """The version that `main` named at a moment.

    Raises:
        NotFound: It has expired.
    """
    moment = moments.moment(at)
    found = client.ask(BranchesAt(at=moment, base_model=base_model))
    version = int(found["branches"][MAIN])
    if found["expired"]:
        raise NotFound(
            f"main named version {version} at {moments.shown(moment)}, and that version has expired",
            "--at",
            "`onebasis history main` lists what it named before and afterwards, for --version; `onebasis store tag` or "
            "`pin` keeps a version from expiring",
        )
    note(f"main named version {version} at {moments.shown(moment)}")
    return version


def _both_are_at(client: Client, number: int, base_model: str | None) -> bool:
    """Whether `main` and the candidate name this version."""
    at = {name: row["version"] for row in client.ask(ListVersions(base_model=base_model)) for name in row["refs"]}
    return bool(at.get(MAIN, 0) == at.get(CANDIDATE, 0) == number)


def _state(name: str | None) -> TaskState | None:
    if name is not None and name not in list(TaskState):
        raise InvalidInput(f"there is no state '{name}'", "state", f"states: {', '.join(TaskState)}")
    return TaskState(name) if name else None


def _change_many(
    change: Change,
    client: Client,
    team: str | None,
    state: str | None,
    base_model: str | None,
    as_json: bool,
    reason: str = "",
) -> None:
    """Change the tasks of a team, in a state, or of a base model, and show what was done to which. The exit code is
    the highest of those that were refused."""
    asked = ChangeMany(change=change, team=team, state=_state(state), base_model=base_model, reason=reason, by=me())
    answer = client.ask(asked)
    show(answer, display.changed, as_json)
    if refused := [one["error"]["exit_code"] for one in answer["refused"]]:
        raise typer.Exit(max(refused))


def _refuse_both(team: str | None, state: str | None, base_model: str | None) -> None:
    if not team is state is base_model is None:
        where = "--team, --state, --base-model"
        raise InvalidInput("a task is named, and a team, a state or a base model", where, "name the task, or those")


def _refuse_all_but_one(
    reference: str | None, team: str | None, service: bool, state: str | None, base_model: str | None
) -> None:
    """Nothing is meant by default: a forgotten name must not pause everybody."""
    if [reference is not None, team is not None, service].count(True) != 1 or not state is base_model is None:
        what = "names not exactly one of a task, --team and --service"
        todo = "name one of them; --state stands alone or beside --team, --base-model beside --state"
        raise InvalidInput(what, "onebasis", todo)


def _silent(_: str) -> None:
    """With --json only JSON is printed."""


for function in (accounts.whoami, accounts.audit):
    command(function)
command_here(accounts.login)
for kept in (upkeep.doctor, upkeep.backup, upkeep.restore, upkeep.upgrade):
    command_here(kept)
app.add_typer(accounts.token_app, name="token")
app.add_typer(contexts.context_app, name="context")
app.add_typer(upkeep.mlflow_app, name="mlflow")
app.add_typer(webhooks.webhooks_app, name="webhooks")


def main() -> None:
    """Entry point of the command `onebasis`."""
    app()


if __name__ == "__main__":
    main()
