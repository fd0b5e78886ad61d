"""`onebasis submit` and `import`: one task or many, with what became of each and the exit code for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from configs.errors import Exit, InvalidInput, OnebasisError, QueueFull, Unavailable
from configs.task_spec import TaskSpec, read_task_spec
from orchestrator.api.client import REMOTE, Client
from orchestrator.api.requests import ShowTask, Submit
from orchestrator.commands import display
from orchestrator.commands.attention import Attention
from subspace_store.commands.terminal import errors, me, show

Json = dict[str, Any]

WATCH_SECONDS = 0.5
ENDS = {
    "published": Exit.DONE,
    "replaced": Exit.DONE,
    "rejected": Exit.REJECTED,
    "parked": Exit.PARKED,
    "cancelled": Exit.CANCELLED,
}
"""Exit codes of `submit --wait`, by the state in which the task ended."""


def task_files(paths: Sequence[Path]) -> list[Path]:
    """The files that were named, and each YAML file of a named folder, by name; inner folders are not read.

    Raises:
        InvalidInput: A folder without any.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml") and not file.is_dir())
        if not found:
            raise InvalidInput("no task file is in this folder", str(path), "name a folder with files *.yaml")
        files += found
    return list(dict.fromkeys(files))


def read(file: Path, revise: bool) -> TaskSpec:
    """The task in a file; with `revise` it is a revision, whether the file says so or not. Raises InvalidInput."""
    spec = read_task_spec(file)
    return spec.model_copy(update={"revises": True}) if revise else spec


def check_files(task: TaskSpec, their_files: bool) -> None:
    """Refuse a task that names files of this machine, which a service on another one cannot read.

    Args:
        their_files: The files are there, at these paths: the person says so.

    Raises:
        InvalidInput: With the keys.
    """
    remote = REMOTE.get()
    if remote is None or their_files:
        return
    named = {
        "data.train_file": task.data.train_file,
        "data.eval_file": task.data.eval_file,
        "method.adapter": task.method.adapter,
    }
    if own := [key for key, path in named.items() if path]:
        raise InvalidInput(
            f"names files on this machine, which the service at {remote.url} cannot read; files are not sent yet",
            ", ".join(own),
            "put them where the service runs, below one of its data_roots, write their absolute paths there, and add "
            "--their-files",
        )


def submit(client: Client, task: TaskSpec, wait: bool, dry_run: bool, as_json: bool, their_files: bool = False) -> Exit:
    """Submit one task, and with `wait` stay until it has ended. The exit code says how.

    Args:
        their_files: As for `check_files`.
    """
    check_files(task, their_files)
    answer = client.ask(Submit(task=task, dry_run=dry_run, by=me()))
    if dry_run or not wait:
        show(answer, display.submitted, as_json)
        return Exit.DONE
    if not as_json:
        display.submitted(answer)
    (found,) = _ended(client, [answer["task_id"]], as_json)
    show(found, display.task, as_json)
    return ENDS[found["state"]]


def submit_all(
    client: Client,
    files: Sequence[Path],
    wait: bool,
    dry_run: bool,
    as_json: bool,
    their_files: bool = False,
    revise: bool = False,
) -> Exit:
    """Check the tasks in all files, and if none is wrong submit them. The exit code is the highest of theirs.

    Raises:
        Unavailable: The service is away: nothing was submitted. If it goes away later, that is the result of the rest;
            when the command is repeated, those that were taken in before are the same tasks.
    """
    results, specs = _checked(client, files, their_files, revise)
    is_fine = not any("error" in result for result in results)
    if is_fine and not dry_run:
        results = _submitted(client, *_in_turn(files, specs))
    if not as_json:
        for result in results:
            display.submitted_file(result)
        if not is_fine and not dry_run:
            errors.print("nothing was submitted: mend the files above, then submit them all again")
    codes = [result["error"]["exit_code"] if "error" in result else Exit.DONE for result in results]
    if wait and not dry_run and is_fine:
        taken = [result for result in results if "task_id" in result]
        for result, found in zip(taken, _ended(client, [one["task_id"] for one in taken], as_json), strict=True):
            result |= found
            codes.append(ENDS[found["state"]])
        if not as_json:
            display.tasks(taken)
    show(results, _nothing, as_json)
    return max(code for code in Exit if code in codes)


def _checked(
    client: Client, files: Sequence[Path], their_files: bool, revise: bool
) -> tuple[list[Json], list[TaskSpec]]:
    """The service's answer to each file, without submitting it, and the documents of those that can be read."""
    results: dict[Path, Json] = {}
    specs: dict[Path, TaskSpec] = {}
    named: dict[str, Path] = {}
    for file in files:
        try:
            spec = read(file, revise)
            check_files(spec, their_files)
            if (other := named.setdefault(_title(spec), file)) != file:
                raise InvalidInput(
                    f"is {_title(spec)}, and so is {other}", str(file), "give each task a name of its own"
                )
            specs[file] = spec
        except OnebasisError as error:
            results[file] = _failed(file, error)
    for file, spec in specs.items():
        try:
            _refuse_circle(spec, {_title(other): other.after for other in specs.values()})
            beside = tuple(title for title in spec.after if title in named)
            results[file] = _of(file, client.ask(Submit(task=spec, dry_run=True, beside=beside, by=me())))
        except Unavailable:
            raise
        except OnebasisError as error:
            results[file] = _failed(file, error)
    return [results[file] for file in files], list(specs.values())


def _title(spec: TaskSpec) -> str:
    return f"{spec.team}/{spec.name}"


def _refuse_circle(spec: TaskSpec, after: Mapping[str, Sequence[str]]) -> None:
    """Raise InvalidInput where a task comes, by way of others that are submitted with it, after itself."""
    line, seen = [_title(spec)], set[str]()
    while line:
        title = line.pop()
        for before in after.get(title, ()):
            if before == _title(spec):
                raise InvalidInput(f"comes after {title}, which comes after it", "after", "take it out of one of them")
            if before not in seen:
                seen.add(before)
                line.append(before)


def _in_turn(files: Sequence[Path], specs: Sequence[TaskSpec]) -> tuple[list[Path], list[TaskSpec]]:
    """The files and their documents, each behind those that it comes after; else in the order that they had."""
    by_title = {_title(spec): (file, spec) for file, spec in zip(files, specs, strict=True)}
    order = TopologicalSorter({title: spec.after for title, (_, spec) in by_title.items()}).static_order()
    found = [by_title[title] for title in order if title in by_title]
    return [file for file, _ in found], [spec for _, spec in found]


def _submitted(client: Client, files: Sequence[Path], specs: Sequence[TaskSpec]) -> list[Json]:
    """The result of each. Once the service is away it is not asked for the rest."""
    results: list[Json] = []
    away: OnebasisError | None = None
    for file, spec in zip(files, specs, strict=True):
        if away is not None:
            results.append(_failed(file, away))
            continue
        try:
            results.append(_of(file, client.ask(Submit(task=spec, by=me()))))
        except OnebasisError as error:
            results.append(_failed(file, error))
            if isinstance(error, Unavailable) and not isinstance(error, QueueFull):
                away = error
    return results


def _of(file: Path, answer: Json) -> Json:
    return {"file": str(file), **answer}


def _failed(file: Path, error: OnebasisError) -> Json:
    return {"file": str(file), "error": {**error.as_dict(), "exit_code": int(error.exit_code), "text": str(error)}}


def _ended(client: Client, task_ids: Sequence[str], as_json: bool) -> list[Json]:
    """The tasks once they have ended; meanwhile their progress is shown."""

    service = Attention(client)

    def ask() -> list[Json]:
        service.look()
        return [client.ask(ShowTask(reference=task_id)) for task_id in task_ids]

    (display.follow_quietly if as_json else display.follow)(ask, WATCH_SECONDS)
    return ask()


def _nothing(_: Any) -> None:
    """Show nothing: all has been shown."""
