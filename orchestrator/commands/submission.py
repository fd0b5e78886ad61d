"""`onebasis submit` and `import`: one task or many, with what became of each and the exit code for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from configs.errors import Exit, InvalidInput, OnebasisError, QueueFull, Unavailable
from configs.task_spec import TaskSpec, read_task_spec
from orchestrator.api.client import Client
from orchestrator.api.requests import ReadEvents, ShowTask
from orchestrator.commands import display
from orchestrator.commands.attention import Attention, UntilNews
from orchestrator.commands.sending import Sent, with_its_files
from subspace_store.commands.terminal import errors, show

Json = dict[str, Any]

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


def submit(client: Client, task: TaskSpec, wait: bool, dry_run: bool, as_json: bool, their_files: bool = False) -> Exit:
    """Submit one task, and with `wait` stay until it has ended. The exit code says how.

    Args:
        their_files: As for `with_its_files`.
    """
    answer = with_its_files(client, task, their_files, as_json).ask(client, dry_run=dry_run)
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
    results, sent = _checked(client, files, their_files, revise, as_json)
    is_fine = not any("error" in result for result in results)
    if is_fine and not dry_run:
        results = _submitted(client, *_in_turn(files, sent))
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
    client: Client, files: Sequence[Path], their_files: bool, revise: bool, as_json: bool
) -> tuple[list[Json], list[Sent]]:
    """The service's answer to each file, without submitting it, and the tasks of those that are fine."""
    results: dict[Path, Json] = {}
    specs: dict[Path, TaskSpec] = {}
    named: dict[str, Path] = {}
    for file in files:
        try:
            spec = read(file, revise)
            if (other := named.setdefault(_title(spec), file)) != file:
                raise InvalidInput(
                    f"is {_title(spec)}, and so is {other}", str(file), "give each task a name of its own"
                )
            specs[file] = spec
        except OnebasisError as error:
            results[file] = _failed(file, error)
    sent = []
    for file, spec in specs.items():
        try:
            _refuse_circle(spec, {_title(other): other.after for other in specs.values()})
            beside = tuple(title for title in spec.after if title in named)
            task = with_its_files(client, spec, their_files, as_json)
            results[file] = _of(file, task.ask(client, dry_run=True, beside=beside))
            sent.append(task)
        except Unavailable:
            raise
        except OnebasisError as error:
            results[file] = _failed(file, error)
    return [results[file] for file in files], sent


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


def _in_turn(files: Sequence[Path], sent: Sequence[Sent]) -> tuple[list[Path], list[Sent]]:
    """The files and their tasks, each behind those that it comes after; else in the order that they had."""
    by_title = {_title(task.spec): (file, task) for file, task in zip(files, sent, strict=True)}
    order = TopologicalSorter({title: task.spec.after for title, (_, task) in by_title.items()}).static_order()
    found = [by_title[title] for title in order if title in by_title]
    return [file for file, _ in found], [spec for _, spec in found]


def _submitted(client: Client, files: Sequence[Path], sent: Sequence[Sent]) -> list[Json]:
    """The result of each. Once the service is away it is not asked for the rest."""
    results: list[Json] = []
    away: OnebasisError | None = None
    for file, task in zip(files, sent, strict=True):
        if away is not None:
            results.append(_failed(file, away))
            continue
        try:
            results.append(_of(file, task.ask(client)))
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

    asked = ReadEvents(reference=task_ids[0] if len(task_ids) == 1 else None)
    (display.follow_quietly if as_json else display.follow)(ask, UntilNews(client, asked, task_ids))
    return ask()


def _nothing(_: Any) -> None:
    """Show nothing: all has been shown."""
