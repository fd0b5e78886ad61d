"""What people see in a terminal: tables and messages made from the service's JSON values. Decides nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from configs.errors import row_of
from subspace_store.commands.terminal import console, errors

Json = dict[str, Any]

COLOURS = {
    "queued": "cyan", "training": "yellow", "merging": "yellow", "refining": "yellow",
    "evaluating": "yellow", "published": "green",
    "rejected": "red", "parked": "red", "cancelled": "dim", "candidate": "yellow", "rolled back": "dim",
    "expired": "dim",
}  # fmt: skip
AT_WORK = ("training", "refining")
ENDED = ("published", "rejected", "parked", "cancelled")
DROPPED_FIRST = ("id", "MB", "rows/s", "version", "tokens/s", "score", "loss")
"""Columns of the tasks' table in the order in which a narrow terminal goes without them: `team/name` is a name too."""
NOTE_WIDTH = 24
"""Room that the last column is given at least, if it has so much to say."""


def status(answer: Json) -> None:
    """`onebasis status` and the end of `onebasis up`."""
    state = "[green]up[/green]" if answer["running"] else "[red]down[/red] (`onebasis up` starts it)"
    counted = ", ".join(f"{count} {name}" for name, count in answer["tasks"].items()) or "none yet"
    console.print(f"onebasis is {state}: base model {answer['base_model']}, main is version {answer['main']}")
    if (held := answer["held"]) is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(held["time"]))
        reason = escape(held["reason"] or "no reason given")
        console.print(
            f"  [yellow]main is held[/yellow] by {escape(held['actor'])} since {since}: {reason}"
            " (`onebasis store release` lets it move)",
            soft_wrap=True,
        )
        _print_rows("held")
    console.print(f"  tasks    {counted}")
    console.print(f"  store    {escape(answer['storage'])}", soft_wrap=True)
    console.print(f"  mlflow   {escape(answer['mlflow'])}", soft_wrap=True)
    for worker, what in answer.get("workers", {}).items():
        console.print(f"  {worker} {escape(what)}", soft_wrap=True)
    if answer.get("alarm"):
        console.print(f"  [red]ALARM[/red] {escape(answer['alarm'])}", soft_wrap=True)
    for told in answer.get("unreadable_tasks", ()):
        console.print(f"  [red]ALARM[/red] {escape(told)}", soft_wrap=True)
    if answer.get("mlflow_error"):
        console.print(f"  [yellow]MLflow is behind:[/yellow] {escape(answer['mlflow_error'])}")


def submitted(answer: Json) -> None:
    """`onebasis submit`."""
    for warning in answer["warnings"]:
        errors.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    if answer.get("dry_run"):
        console.print(
            f"{answer['title']} is fine: {answer['train_rows']} training rows, {answer['eval_rows']} evaluation rows"
        )
        return
    known = "" if answer["is_new"] else " (known already: nothing was submitted twice)"
    console.print(f"{answer['title']} is task {answer['task_id']}, {coloured(answer['state'])}{known}")


def tasks(answer: Sequence[Json]) -> None:
    """`onebasis tasks`."""
    console.print(_task_table(answer) if answer else "no tasks yet; `onebasis submit TASK.yaml`")


def task(answer: Json) -> None:
    """`onebasis task`."""
    console.print(f"[bold]{answer['title']}[/bold]  {answer['task_id']}  {coloured(answer['state'])}")
    console.print(f"  {escape(answer['why'])}", soft_wrap=True)
    _print_rows(*answer["trouble"])
    if answer["progress"]:
        console.print(f"  progress   {_progress(answer)}")
    if answer["local_score"] is not None:
        own, base = score_text(answer["local_score"]), score_text(answer["base_score"])
        rows = f"{answer['eval_rows']} rows"
        console.print(f"  {answer['metric']:10} {own} own adapter · {base} same head without adapter · {rows}")
    if others := [f"{name} {value:.4f}" for name, value in answer["metrics"].items() if name != answer["metric"]]:
        console.print(f"  also       {' · '.join(others)} own adapter", soft_wrap=True)
    if (result := answer["result"]) is not None:
        console.print(
            f"  in main    {score_text(result['score_under_main'])} now (version {result['main']}) · "
            f"{score_text(result['score_at_birth'])} at birth (version {result['version']})"
        )
    _print_training(answer["training"])
    for event in answer["events"]:
        console.print(f"  {_clock(event['at'])}  {event['kind']:16} {escape(event['text'])}", soft_wrap=True)


def log_lines(events: Sequence[Json]) -> None:
    """`onebasis logs`."""
    for event in events:
        if event["kind"] == "progress":
            text = _point(json.loads(event["text"]))
        else:
            text = event["text"] if event["kind"] == "log" else f"{event['kind']}: {event['text']}"
        console.print(f"{_clock(event['at'])}  {escape(text)}", soft_wrap=True)


def follow(ask: Callable[[], Sequence[Json]], every_seconds: float) -> None:
    """Show tasks until all have ended: a live table in a terminal, else one line for each thing that changes."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                rows = ask()
                live.update(_task_table(rows))
                if all(row["state"] in ENDED for row in rows):
                    return
                time.sleep(every_seconds)
    seen: dict[str, str] = {}
    while True:
        rows = ask()
        for row in rows:
            now = f"{row['state']} {row['progress'].get('phase', '')} {10 * _share(row) // 1:.0f}"
            if seen.get(row["task_id"]) != now:
                seen[row["task_id"]] = now
                line = f"{_clock(time.time())}  {row['title']:23} {row['state']:10} {_brief(row)}"
                console.print(line.rstrip(), markup=False, soft_wrap=True)
        if all(row["state"] in ENDED for row in rows):
            return
        time.sleep(every_seconds)


def _task_table(rows: Sequence[Json]) -> Table:
    """What fits into the terminal; the last column alone may break its lines."""
    cells: dict[str, list[str]] = {
        "id": [row["task_id"] for row in rows],
        "task": [row["title"] for row in rows],
        "state": [row["state"] for row in rows],
        "step": [_step(row) for row in rows],
        "loss": [_told(row, "loss", ".3f") for row in rows],
        "rows/s": [_told(row, "samples_per_second", ",.0f") for row in rows],
        "tokens/s": [_told(row, "tokens_per_second", ",.0f") for row in rows],
        "MB": [f"{row['progress']['memory_bytes'] / 1e6:,.0f}" if _told(row, "memory_bytes") else "" for row in rows],
        "left": [_left(row) for row in rows],
        "score": [score_text(row["local_score"]) for row in rows],
        "version": [f"v{row['version']}" if row["version"] else "–" for row in rows],
        "": [_note(row) for row in rows],
    }
    widths = {name: max(map(cell_len, (name, *column))) for name, column in cells.items() if any(column)}
    widths |= {"": min(widths[""], NOTE_WIDTH)} if "" in widths else {}
    for name in DROPPED_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) > console.width:
            widths.pop(name, None)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in widths:
        table.add_column(name, no_wrap=bool(name), justify="left" if name in ("id", "task", "state", "") else "right")
    for index in range(len(rows)):
        texts = {name: escape(cells[name][index]) for name in widths}
        table.add_row(*(coloured(text) if name == "state" else text for name, text in texts.items()))
    return table


def _step(row: Json) -> str:
    return f"{row['progress']['step']}/{row['progress']['steps']}" if _told(row, "steps") else ""


def _left(row: Json) -> str:
    return _duration(row["progress"]["seconds_left"]) if _told(row, "seconds_left") else ""


def _brief(row: Json) -> str:
    """A task's progress in the 32 columns behind its name and state."""
    loss, left = _told(row, "loss", ".3f"), _left(row)
    parts = (_step(row) or _note(row), loss and f"loss {loss}", left and f"{left} left")
    return " · ".join(part for part in parts if part) if row["state"] == "training" else ""


def _told(row: Json, name: str, form: str = "") -> str:
    """One figure of a task's progress; empty where it does not train, or has not told."""
    value = row["progress"].get(name) if row["state"] in AT_WORK else None
    return format(value, form) if value else ""


def _note(row: Json) -> str:
    """Where it stands in the queue, what it does beside its steps, or why it is where it is."""
    if row["state"] in AT_WORK:
        phase = row["progress"].get("phase", "")
        return str(row["worker"] if phase in ("", "training") else phase)
    place = f"place {row['place']}" if row["place"] else ""
    reason = row["reason"].split("\n")[0] if row["state"] in ("queued", "rejected", "parked", "cancelled") else ""
    return " · ".join(part for part in (place, reason) if part)


def _print_training(training: Json) -> None:
    if training["seconds"] is not None:
        start = training["submit_to_first_step_seconds"]
        resumed = f", resumed from step {training['resumed_from']}" if training["resumed_from"] else ""
        console.print(
            f"  training   {training['steps']} steps in {training['seconds']:.1f} s"
            + (f", first step {start:.2f} s after submission" if start is not None else "")
            + resumed
        )
    if training["method"]:
        basis = f" in the basis of version {training['basis_version']}" if training["basis_version"] else ""
        trained = training["trainable_parameters"]
        console.print(
            f"  method     {training['method']}{basis}"
            + (f" · {trained:,} numbers trained beside the head" if trained else "")
        )
    if training["refined_seconds"] is not None:
        console.print(f"  refined    its coefficients, after merging, in {training['refined_seconds']:.1f} s")
    if training["share_full"]:
        console.print("  share-full its rows are kept, to refine it again when a merge moves it: not strict")
    if training["unrefined"]:
        console.print(f"  unrefined  {escape(training['unrefined'])}", soft_wrap=True)
        _print_rows("unrefined")
    if (last := training["last_point"]) is not None:
        console.print(f"  last told  {_point(last)}", soft_wrap=True)
    if training["plot"]:
        console.print(f"  loss plot  {escape(training['plot'])}", soft_wrap=True)


def _progress(row: Json) -> str:
    progress = row.get("progress") or {}
    if row["state"] not in AT_WORK or not progress:
        return row["worker"] if row["state"] in AT_WORK else ""
    if not progress.get("steps"):
        return str(progress.get("phase", ""))
    return f"{progress['phase']} {_point(progress)}"


def _point(told: Json) -> str:
    """Step, loss, learning rate, speed, memory, end: what of them was told."""
    steps = f"/{told['steps']}" if told.get("steps") else ""
    forms = (
        ("loss", "loss {:.4f}"), ("learning_rate", "learning rate {:.2e}"), ("samples_per_second", "{:,.1f} rows/s"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    )  # fmt: skip
    parts = [form.format(told[name]) for name, form in forms if told.get(name) is not None]
    memory = [size_text(told["memory_bytes"])] if told.get("memory_bytes") else []
    left = [f"{_duration(told['seconds_left'])} left"] if told.get("seconds_left") is not None else []
    return " · ".join([f"step {told['step']}{steps}", *parts, *memory, *left])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _share(row: Json) -> float:
    progress = row.get("progress") or {}
    return progress["step"] / progress["steps"] if progress.get("steps") else 0.0


def _print_rows(*codes: str) -> None:
    """Where to read what a trouble means and what to do."""
    if codes:
        console.print(f"  see {', '.join(map(row_of, codes))}", style="dim", markup=False, soft_wrap=True)


def coloured(state: str) -> str:
    colour = COLOURS.get(state)
    return f"[{colour}]{state}[/{colour}]" if colour else state


def score_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def size_text(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
