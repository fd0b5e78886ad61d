"""Commands that write to a store's log: tags, holds, quarantines and pins, giving things up, removing a task."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import count
from typing import Annotated

import typer

from configs.errors import Conflict, InvalidInput, NotFound
from subspace_store.commands.place import (
    Force,
    Place,
    Reference,
    TaskId,
    Url,
    change,
    command,
    done_before,
    is_served,
    place_of,
    reader_at,
    task_id_of,
    until_text,
    write,
    writer_at,
)
from subspace_store.commands.terminal import (
    STATE_DIR,
    AsJson,
    OfBaseModel,
    OpKey,
    StateDir,
    console,
    counted,
    decimals,
    me,
    note,
    show,
    telling,
)
from subspace_store.log import retention
from subspace_store.log.removal import revisions_along
from subspace_store.log.retention import droppable, expirable
from subspace_store.log.retention import expire as judge_expiry
from subspace_store.log.version import CANDIDATE, SubspaceState
from subspace_store.refs import SECONDS_A_DAY
from subspace_store.requests import (
    Compact,
    DropAdapters,
    Expire,
    Hold,
    Pin,
    Quarantine,
    Release,
    Remove,
    RestoreRevision,
    Tag,
    Unpin,
    Unquarantine,
    Withdraw,
)


@command
def tag(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name for the version.")],
    version: Reference,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Name a version for ever; it never expires then."""
    place = place_of(store, state_dir, base_model)
    number = reader_at(place).resolve(version)
    change(
        place, force, as_json, f"{name} is version {number}", Tag(name=name, version=number, op_key=op_key, actor=me())
    )


@command
def hold(
    reason: Annotated[
        str, typer.Argument(metavar="REASON", help="Shown in `status`, and with requests that wait for it.")
    ],
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep `main` where it is: what passes the gate waits until `release`."""
    change(
        place_of(store, state_dir, base_model),
        force,
        as_json,
        "main is held",
        Hold(reason=reason, op_key=op_key, actor=me()),
    )


@command
def release(
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Let `main` move again after `hold` or `rollback --hold`."""
    change(place_of(store, state_dir, base_model), force, as_json, "main may move", Release(op_key=op_key, actor=me()))


@command
def quarantine(
    task: TaskId,
    reason: Annotated[str, typer.Argument(metavar="REASON", help="Shown when somebody tries to merge the task.")],
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep a task from being merged again. Versions that hold it stay as they are."""
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    task_id = task_id_of(reader, task)
    done = f"task {task_id} will not be merged"
    if not any(task_id == known.task_id for version in reader.state.versions.values() for known in version.added):
        done += "; no task of this id was merged here yet: compare it with the ids in `onebasis tasks`"
    change(place, force, as_json, done, Quarantine(task_id=task_id, reason=reason, op_key=op_key, actor=me()))


@command
def unquarantine(
    task: TaskId,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Let a quarantined task be merged again."""
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    task_id = task_id_of(reader, task)
    if op_key not in reader.state.op_keys:
        retention.check_task_is_known(reader.state, task_id)
    change(
        place, force, as_json, f"task {task_id} may be merged", Unquarantine(task_id=task_id, op_key=op_key, actor=me())
    )


@command
def pin(
    version: Reference,
    owner: Annotated[str, typer.Option(help="Owner of the pin; default: you.")] = "",
    days: Annotated[
        float | None, typer.Option(help="Days until it ends; default: until `unpin`.", min=0, max=36500)
    ] = None,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Keep a version from expiring. A second pin of the same owner moves the end."""
    place = place_of(store, state_dir, base_model)
    number = reader_at(place).resolve(version)
    end = "until unpinned" if days is None else until_text(time.time() + days * SECONDS_A_DAY)
    done = f"version {number} is kept for {owner or me()} {end}"
    change(place, force, as_json, done, Pin(version=number, owner=owner or me(), days=days, op_key=op_key, actor=me()))


@command
def unpin(
    version: Reference,
    owner: Annotated[str, typer.Option(help="Owner of the pin; default: you.")] = "",
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give a pin up."""
    place = place_of(store, state_dir, base_model)
    number = reader_at(place).resolve(version)
    done = f"{owner or me()} does not keep version {number}"
    change(place, force, as_json, done, Unpin(version=number, owner=owner or me(), op_key=op_key, actor=me()))


@command
def expire(
    versions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERSION...]", help="Versions; without any, those that --keep-last does not keep."),
    ] = None,
    keep_last: Annotated[int | None, typer.Option(help="Number of `main`'s newest versions to keep.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would expire.")] = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give old and rejected versions up for ever. What a branch, a tag or a pin names stays."""
    place, now = place_of(store, state_dir, base_model), time.time()
    state = reader_at(place).state
    if bool(versions) == (keep_last is not None):
        raise InvalidInput("name the versions, or say with --keep-last how many stay")
    numbers = expirable(state, keep_last, now) if keep_last is not None else [*map(state.resolve, versions or ())]
    judged = judge_expiry(state, numbers, now)
    named = f"version{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
    if yes and (judged.alters or op_key):
        change(
            place,
            force,
            as_json,
            f"expired: {named}",
            Expire(versions=tuple(numbers), op_key=op_key, actor=me()),
        )
    else:
        text = f"would expire: {named} (--yes does it)" if judged.alters else "nothing can expire"
        show({"versions": numbers, "expired": False}, lambda _: note(text), as_json)


@command
def drop_adapters(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Ids, or team/name; published ones.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would be let go.")] = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Give up tasks' adapters as they were delivered, for ever; `collect` deletes them. Heads and versions stay."""
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    task_ids = [task_id_of(reader, task) for task in tasks]
    found = droppable(reader.state, task_ids)
    size = sum(task.adapter.size_bytes for task in found.values())
    what = f"{counted(len(found), 'adapter')}, {size / 1e6:.1f} MB"
    if yes and (found or op_key):
        change(
            place, force, as_json, f"let go: {what}", DropAdapters(task_ids=tuple(task_ids), op_key=op_key, actor=me())
        )
    else:
        text = f"would let go of {what} (--yes does it)" if found else "nothing to let go"
        show({"task_ids": task_ids, "dropped": False}, lambda _: note(text), as_json)


@command
def withdraw(
    request: Annotated[str, typer.Argument(metavar="KEY", help="The op_key that the message named.")],
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make sure that a request whose outcome is unknown is not done any more; says so if it was done."""
    place = place_of(store, state_dir, base_model)
    done = f"{request} was not done, and will not be unless somebody asks for it again"
    change(place, force, as_json, done, Withdraw(request_key=request, actor=me()))


@command
def collect(
    really: Annotated[bool, typer.Option("--really", help="Delete; otherwise only show what would be.")] = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Find objects that no version needs any more, and with --really delete them."""
    place = place_of(store, state_dir, base_model)
    if really and place.is_served and not (force and place.is_named):
        raise is_served(place)
    with telling(f"looking for objects to delete at {place.storage.url}"):
        found = writer_at(place, force).collect() if really else reader_at(place).collectable()

    def as_text(_: object) -> None:
        for key in found.keys:
            console.print(key, soft_wrap=True, markup=False)
        verb = "deleted" if found.deleted else "would delete"
        end = "" if found.deleted or not found.keys else " (--really does it)"
        note(f"{verb} {counted(len(found.keys), 'object')}, {found.size_bytes / 1e6:.1f} MB that the log knows of{end}")
        if found.abandoned:
            note(f"gave up {counted(found.abandoned, 'unfinished write')}")

    show(asdict(found), as_text, as_json)


CandidateOnly = Annotated[
    bool, typer.Option("--candidate-only", help="Leave `main` where it is; not while a service runs.")
]


def _next_key(asked: str, state: SubspaceState) -> str:
    """A key under which this was not done yet: an interrupted command that is typed again goes on under it."""
    return next(key for n in count(1) if (key := f"{asked}, time {n}") not in state.op_keys)


def _refuse_an_orphan(place: Place, candidate_only: bool, force: bool) -> None:
    if candidate_only and place.is_served and not (force and place.is_named):
        raise Conflict(
            "the service rejects a candidate that no task waits for",
            place.storage.url,
            "leave --candidate-only out, or end the service with `onebasis down`",
        )


@command
def remove(
    task: TaskId,
    reason: Annotated[str, typer.Option(help="Kept in the log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what would be made again.")] = False,
    candidate_only: CandidateOnly = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make every version since a task's birth again without it, and move `main` there. The gate does not judge it.

    All its revisions go."""
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    state, task_id = reader.state, task_id_of(reader, task)
    candidate = state.refs[CANDIDATE]
    held = state.tasks_at(candidate)
    repeated = op_key in state.op_keys
    revisions: tuple[str, ...] = ()
    if not repeated:
        if task_id not in held:
            others = [id_ for id_ in state.revisions(task_id) if id_ in held]
            todo = (
                f"it holds another revision of that task, {others[0]}: with that one all revisions go" if others else ""
            )
            raise NotFound(f"the candidate, version {candidate}, does not hold {task}", place.storage.url, todo)
        revisions = revisions_along(state, task_id, candidate)
        if not yes:
            with telling(f"merging without {task}, in memory"):
                found = reader.preview_remove(task_id)
            what = (
                f"make {counted(len(found.versions), 'version')} again: {', '.join(map(str, found.versions))}"
                if found.versions
                else "make none again"
            )
            size = _growth(found.numbers_before, found.numbers_after)
            text = f"would go back to version {found.start} and {what} (--yes does it); all tasks would take {size}"
            if len(found.revisions) > 1:
                text = f"all {len(found.revisions)} revisions go: {', '.join(found.revisions)}\n{text}"
            show({"task_id": task_id, **asdict(found), "removed": False}, lambda _: note(text), as_json)
            return
        # The same task of the same candidate is the same request, so that an interrupted command goes on. If that
        # request was done and the task is there again, there was a rollback: it is a new request.
        op_key = op_key or _next_key(f"remove {task_id} from {candidate}", state)
    _refuse_an_orphan(place, candidate_only, force)
    numbers = {} if repeated else {"numbers_before": reader.footprint(candidate).total_numbers}
    request = Remove(task_id=task_id, reason=reason, publish=not candidate_only, op_key=op_key, actor=me())
    write(place, force, request)
    reader = reader_at(place)
    after = reader.state
    number = after.op_keys[op_key]
    remade = [v for v in after.lineage(number) if task_id in v.removed]
    approximate = [task for version in remade for task in version.approximate]
    answer = {
        "task_id": task_id,
        "version": number,
        "approximate": approximate,
        "removed": not repeated,
        "repeated": repeated,
        "op_key": op_key,
    }
    text = f"version {number} is as if {task} had never been merged"
    if len(revisions) > 1:
        text += f", nor any of its revisions: {', '.join(revisions)}"
    if repeated:
        text = f"version {number}: {done_before(op_key)}"
    else:
        numbers["numbers_after"] = reader.footprint(number).total_numbers
        if approximate:
            text += f", but approximate: merged from their coefficients were {', '.join(approximate)}"
        text += f"; all tasks take {_growth(**numbers)}"
    show(answer | numbers, lambda _: note(text), as_json)


@command
def restore_revision(
    task: Annotated[str, typer.Argument(metavar="TASK_ID", help="Id of the earlier revision.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what it would be.")] = False,
    candidate_only: CandidateOnly = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Put an earlier revision of a task back, in today's basis, and move `main` there. The gate does not judge it.

    No other task moves."""
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    state = reader.state
    repeated = op_key in state.op_keys
    if not repeated:
        found = reader.preview_restore(task)
        name = found.restored.name
        if not yes:
            text = (
                f"{name}: {task} would take the place of {found.leaving.task_id} in version {found.version}, with an "
                f"error of {decimals(found.error)} (--yes does it)"
            )
            if found.is_approximate:
                text += "; its adapter as delivered was let go, so it would be what a version holds of it"
            facts = {"task_id": task, "leaving": found.leaving.task_id, "version": found.version, "error": found.error}
            facts |= {"approximate": found.is_approximate, "restored": False}
            show(facts, lambda _: note(text), as_json)
            return
        op_key = op_key or _next_key(f"restore-revision {task} in {found.version}", state)
    _refuse_an_orphan(place, candidate_only, force)
    write(place, force, RestoreRevision(task_id=task, publish=not candidate_only, op_key=op_key, actor=me()))
    after = reader_at(place).state
    number = after.op_keys[op_key]
    entry = after.tasks_at(number)[task]
    answer = {
        "task_id": task,
        "leaving": entry.replaces,
        "version": number,
        "error": entry.error_at_birth,
        "approximate": bool(after.versions[number].approximate),
        "restored": not repeated,
        "repeated": repeated,
        "op_key": op_key,
    }
    error = decimals(entry.error_at_birth)
    text = f"version {number}: {entry.name}: revision replaced, {task} is back with an error of {error}"
    if repeated:
        text = f"version {number}: {done_before(op_key)}"
    show(answer, lambda _: note(text), as_json)


def _growth(numbers_before: int, numbers_after: int) -> str:
    """What a version takes after a removal, and what to do where that is more."""
    said = f"{numbers_after:,} numbers instead of {numbers_before:,}"
    if numbers_after <= numbers_before:
        return said
    return (
        f"{said}, {numbers_after - numbers_before:,} more: without it they share less → afterwards `onebasis store "
        "compact` shows what merging all of them at once would save"
    )


@command
def compact(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; otherwise only show what it would save.")] = False,
    candidate_only: CandidateOnly = False,
    store: Url = None,
    base_model: OfBaseModel = None,
    force: Force = False,
    op_key: OpKey = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Merge all tasks at once, for the basis that stores them in the fewest numbers, and move `main` there.

    No task moves: what the version before held of it is held to the last number, so its scores stay valid. `onebasis
    rollback` goes back.
    """
    place = place_of(store, state_dir, base_model)
    reader = reader_at(place)
    state = reader.state
    candidate = state.refs[CANDIDATE]
    repeated = op_key in state.op_keys
    if not repeated:
        if not candidate:
            raise NotFound("there are no tasks yet", place.storage.url, "merge tasks first")
        with telling(f"merging the tasks of version {candidate} at once, in memory"):
            found = reader.preview_compact()
        saved = found.numbers_before - found.numbers_after
        if not yes or saved <= 0:
            text = (
                f"{counted(found.tasks, 'task')} of version {candidate} would take {found.numbers_after:,} numbers "
                f"instead of {found.numbers_before:,}, with at most {found.rank_max} directions in a module"
            )
            text += f": {saved:,} less (--yes does it)" if saved > 0 else ": nothing is gained, and nothing is done"
            show(asdict(found) | {"compacted": False}, lambda _: note(text), as_json)
            return
        op_key = op_key or _next_key(f"compact {candidate}", state)
    _refuse_an_orphan(place, candidate_only, force)
    with telling(f"merging the tasks of version {candidate} at once"):
        write(place, force, Compact(publish=not candidate_only, op_key=op_key, actor=me()))
    after = reader_at(place)
    number = after.state.op_keys[op_key]
    foot = after.footprint(number)
    answer = {
        "version": number,
        "numbers": foot.total_numbers,
        "compacted": not repeated,
        "repeated": repeated,
        "op_key": op_key,
    }
    text = f"version {number} holds {counted(foot.tasks, 'task')} in {foot.total_numbers:,} numbers"
    if repeated:
        text = f"version {number}: {done_before(op_key)}"
    show(answer, lambda _: note(text), as_json)
