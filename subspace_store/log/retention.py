"""Which blobs a subspace must keep, and which requests about its names are allowed: pure functions of the state.

Each function that is named like an operation judges a request: it gives the `Change` to be written, or raises. Nothing
here reads a clock, a blob or the log; garbage.py deletes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from configs.document import NAME_PATTERN
from configs.errors import Conflict, Held, InvalidInput, NotFound, RefusedAdapters
from subspace_store.log import fold
from subspace_store.log.version import (
    CANDIDATE,
    MAIN,
    BlobRef,
    MergedTask,
    SubspaceState,
    Version,
    gone_before,
    still_held,
)


@dataclass(frozen=True)
class Change:
    """A record that is to be written: its operation and body."""

    op: str
    body: Mapping[str, Any]
    alters: bool = True
    """Whether the state is another one afterwards; if not, the record is only there to remember the request's key."""


def tag(state: SubspaceState, name: str, version: int) -> Change:
    """Name a version for ever."""
    if not re.fullmatch(NAME_PATTERN, name) or name in state.refs or re.fullmatch("v?[0-9]+", name):
        raise InvalidInput(
            f"{name!r} cannot be a tag",
            todo="use up to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit; no branch, and no "
            "number, with or without the v of the tables",
        )
    check_usable(state, version)
    if state.tags.get(name, version) != version:
        raise Conflict(f"tag {name!r} is version {state.tags[name]}, for ever", todo="choose another name")
    return Change(fold.TAG, {"name": name, "version": version}, name not in state.tags)


def hold(state: SubspaceState, reason: str, actor: str) -> Change:
    """Keep `main` where it is."""
    if state.held is not None and (state.held.actor, state.held.reason) != (actor, reason):
        raise _held(state)
    return Change(fold.HOLD, {"reason": reason}, state.held is None)


def release(state: SubspaceState) -> Change:
    """Let publishing move `main` again."""
    return Change(fold.RELEASE, {}, state.held is not None)


def quarantine(state: SubspaceState, task_id: str, reason: str) -> Change:
    """Keep a task from being merged."""
    if not task_id or not reason:
        raise InvalidInput("a quarantine needs a task and a reason")
    return Change(fold.QUARANTINE, {"task_id": task_id, "reason": reason}, state.quarantined.get(task_id) != reason)


def unquarantine(state: SubspaceState, task_id: str) -> Change:
    """Let a task be merged again."""
    return Change(fold.UNQUARANTINE, {"task_id": task_id}, task_id in state.quarantined)


def check_task_is_known(state: SubspaceState, task_id: str) -> None:
    """Refuse to let a task out of quarantine that is not in it, and was never merged: its id is mistyped.

    Raises:
        NotFound: With the ids that are like it.
    """
    known = state.names()
    if task_id not in state.quarantined and task_id not in known:
        near = get_close_matches(task_id, [*state.quarantined, *known], n=3) or [*state.quarantined][:3]
        meant = ", ".join(f"{name} ({known[name]})" if name in known else name for name in near)
        todo = f"did you mean {meant}?" if meant else "no task is in quarantine"
        raise NotFound("no task of this id is in quarantine, and none was merged", task_id, todo)


def pin(state: SubspaceState, version: int, owner: str, until: float | None, asked: float | str | None) -> Change:
    """Keep a version from expiring, for an owner; a second pin of the same owner moves the end.

    Args:
        asked: The end as it was asked for; see `fold.IDENTITY`.
    """
    if not owner:
        raise InvalidInput("a pin needs an owner", todo="say who needs the version")
    if until is not None and not math.isfinite(until):
        raise InvalidInput(f"a pin cannot last until {until}", todo="give Unix seconds, or nothing for ever")
    check_alive(state, version)
    owners = state.pins.get(version, {})
    alters = owner not in owners or owners[owner] != until
    return Change(fold.PIN, {"version": version, "owner": owner, "until": until, "asked": asked}, alters)


def unpin(state: SubspaceState, version: int, owner: str) -> Change:
    """Give a pin up."""
    return Change(fold.UNPIN, {"version": version, "owner": owner}, owner in state.pins.get(version, {}))


def expire(state: SubspaceState, versions: Collection[int], now: float) -> Change:
    """Give versions up for ever."""
    dying = sorted({*versions} - {*state.expired})
    for number in dying:
        if number == 0:
            raise InvalidInput("version 0 is the empty subspace: it cannot expire")
        check_alive(state, number)
        if names := named_by(state, number, now):
            raise Conflict(f"version {number} is needed: {', '.join(names)}", todo="expire only what nothing names")
    return Change(fold.EXPIRE, {"versions": dying, "now": now, "asked": sorted({*versions})}, bool(dying))


def droppable(state: SubspaceState, task_ids: Collection[str]) -> dict[str, MergedTask]:
    """The delivered adapters of tasks, by the key of their blob, without those that were given up before and those that
    the gate rejected.

    Raises:
        NotFound: A task that no version holds.
        Conflict: A task that `main` never held.
    """
    published = {task for number in state.published for v in state.lineage(number) for task in v.brought}
    held = tasks_alive(state, but=state.rejected)
    found: dict[str, MergedTask] = {}
    for task_id in task_ids:
        births = sorted((task for task in held if task.task_id == task_id), key=lambda task: task.version)
        if not births:
            raise NotFound(f"no version holds the task {task_id}")
        if waiting := [task for task in births if task not in published]:
            raise Conflict(
                f"version {waiting[0].version} is not published: its adapters may be merged again",
                f"task {waiting[0].name} ({task_id})",
                "wait until it is published, or expire the version",
            )
        found |= {task.adapter.key: task for task in births if task.adapter.key not in state.heads}
    return found


def drop(heads: Mapping[str, BlobRef], task_ids: Collection[str]) -> Change:
    """Give up delivered adapters. `heads`: key of an adapter's blob to the blob that keeps its head."""
    return Change(fold.DROP_ADAPTERS, {"heads": heads, "asked": sorted({*task_ids})}, bool(heads))


def check_alive(state: SubspaceState, version: int) -> None:
    """Refuse a version that has expired or never existed."""
    if state.resolve(version) in state.expired:
        raise InvalidInput(f"version {version} has expired: it is gone for ever", todo="name another version")


def check_usable(state: SubspaceState, version: int) -> None:
    """Refuse a version that has expired, never existed, or failed the gate."""
    check_alive(state, version)
    if version in state.rejected:
        raise InvalidInput(f"version {version} was rejected: {state.rejected[version]}", todo="name another version")


def check_not_held(state: SubspaceState) -> None:
    """Refuse to publish while `main` is held."""
    if state.held is not None:
        raise _held(state)


def check_judged(state: SubspaceState) -> None:
    """Refuse while a candidate waits for its verdict."""
    if state.refs[CANDIDATE] != state.refs[MAIN]:
        raise Conflict(
            f"version {state.refs[CANDIDATE]}, the candidate, is not judged yet",
            todo="wait until it is, or publish or reject it first",
        )


def check_mergeable(state: SubspaceState, tasks: Mapping[str, str]) -> None:
    """Refuse a quarantined task. `tasks`: id to name."""
    if refused := [task_id for task_id in tasks if task_id in state.quarantined]:
        raise RefusedAdapters(
            "is quarantined: " + "; ".join(state.quarantined[task_id] for task_id in refused),
            ", ".join(f"task {tasks[task_id]} ({task_id})" for task_id in refused),
            "`unquarantine` it first",
            tuple(refused),
        )


def named_by(state: SubspaceState, version: int, now: float) -> list[str]:
    """The reasons why a version cannot expire, for people; pins that ended before `now` do not count."""
    names = [f"it is {ref}" for ref, number in state.refs.items() if number == version]
    names += [f"it is tagged {name}" for name, number in state.tags.items() if number == version]
    pins = state.pins.get(version, {})
    return names + [f"{owner} pinned it" for owner, until in pins.items() if until is None or until > now]


def expirable(state: SubspaceState, keep_last: int, now: float) -> list[int]:
    """Versions that may expire: rejected ones, and those older than the newest `keep_last` of `main`'s history, unless
    a branch, a tag or a pin names them.

    Args:
        keep_last: At least 1.
        now: Unix seconds, for pins.
    """
    if keep_last < 1:
        raise InvalidInput(f"keep_last is {keep_last}", todo="keep at least one version")
    kept = state.history(state.refs[MAIN])[-keep_last:]
    oldest = kept[0].number if kept else 0
    old = (n for n in sorted(state.versions) if n < oldest or n in state.rejected)
    return [n for n in old if n not in state.expired and not named_by(state, n, now)]


def alive(state: SubspaceState) -> list[Version]:
    """The versions that have not expired, oldest first."""
    dead = {*state.expired}
    return [version for number, version in sorted(state.versions.items()) if number not in dead]


def tasks_alive(state: SubspaceState, but: Collection[int] = ()) -> set[MergedTask]:
    """Every task that some live version holds, with an entry for each time it was merged or refined until it left.
    `but`: versions to leave out."""
    found: set[MergedTask] = set()
    # Version to the ids of its parent's tasks that no version alive holds any more, among it and those after it.
    gone: dict[int, set[str]] = {version.number: set() for version in alive(state) if version.number not in but}
    for number in sorted(state.versions, reverse=True):  # a parent has a lower number
        if number in gone:
            version = state.versions[number]
            found |= {task for task in version.brought if task.task_id not in gone[number]}
            before = gone_before(version, gone[number])
            gone[version.parent] = gone[version.parent] & before if version.parent in gone else before
    return found


def needed(state: SubspaceState) -> dict[str, BlobRef]:
    """All blobs that the live versions need, by key.

    A version needs the blobs that its own record names; the bases of modules that it took over unchanged; the
    coefficients of its tasks, that is the nearest snapshot in its lineage with everything after it, or everything from
    the first version on, but for coefficients of tasks that have left; every task's private part; and its adapter as
    delivered, or its head where the adapter was given up.
    """
    return _by_key(state, alive(state), tasks_alive(state))


def needed_by(state: SubspaceState, version: int) -> dict[str, BlobRef]:
    """The blobs that one version needs, by key; none for version 0."""
    versions = [state.versions[version]] if version else []
    return _by_key(state, versions, state.tasks_at(version).values())


def _by_key(state: SubspaceState, versions: Iterable[Version], tasks: Iterable[MergedTask]) -> dict[str, BlobRef]:
    refs: set[BlobRef | None] = set()
    for version in versions:
        refs |= {version.basis, version.transport}
        refs |= {state.versions[number].basis for number in version.basis_versions}
        refs |= {task.coefficients for task in version.brought}
        line = [*_since_snapshot(state, version)][::-1]
        for before, held in zip(line, still_held(line), strict=True):
            if before.snapshot is not None:
                refs.add(before.snapshot)
            else:
                refs |= {before.transport, *(task.coefficients for task in held)}
    for task in tasks:
        refs |= {state.heads.get(task.adapter.key, task.adapter), task.private}
    return {ref.key: ref for ref in refs if ref is not None}


def _since_snapshot(state: SubspaceState, version: Version) -> Iterator[Version]:
    """The versions from this one back to the nearest one with a snapshot, both included."""
    while True:
        yield version
        if version.snapshot is not None or version.parent == 0:
            return
        version = state.versions[version.parent]


def _held(state: SubspaceState) -> Held:
    assert state.held is not None
    by, reason = state.held.actor, state.held.reason
    what = f"main is held by {by}: {reason or 'no reason given'}"
    return Held(what, "", "`onebasis store release` lets it move again", by, reason)
