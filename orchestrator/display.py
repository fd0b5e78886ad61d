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

from configs.terminal import console, errors

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
    console.print(f"  tasks    {counted}")
    console.print(f"  store    {escape(answer['storage'])}", soft_wrap=True)
    console.print(f"  mlflow   {escape(answer['mlflow'])}", soft_wrap=True)
    for worker, what in answer.get("workers", {}).items():
        console.print(f"  {worker} {escape(what)}", soft_wrap=True)
    if answer.get("alarm"):
        console.print(f"  [red]ALARM[/red] the store is damaged: {escape(answer['alarm'])}", soft_wrap=True)
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
    console.print(f"{answer['title']} is task {answer['task_id']}, {_coloured(answer['state'])}{known}")


def tasks(answer: Sequence[Json]) -> None:
    """`onebasis tasks`."""
    console.print(_task_table(answer) if answer else "no tasks yet; `onebasis submit TASK.yaml`")


def task(answer: Json) -> None:
    """`onebasis task`."""
    console.print(f"[bold]{answer['title']}[/bold]  {answer['task_id']}  {_coloured(answer['state'])}")
    console.print(f"  {escape(answer['why'])}", soft_wrap=True)
    if answer["progress"]:
        console.print(f"  progress   {_progress(answer)}")
    if answer["local_score"] is not None:
        console.print(
            f"  {answer['metric']:10} {_score(answer['local_score'])} own adapter · {_score(answer['base_score'])} "
            f"same head without adapter · {answer['eval_rows']} rows"
        )
    if others := [f"{name} {value:.4f}" for name, value in answer["metrics"].items() if name != answer["metric"]]:
        console.print(f"  also       {' · '.join(others)} own adapter", soft_wrap=True)
    if (result := answer["result"]) is not None:
        console.print(
            f"  in main    {_score(result['score_under_main'])} now (version {result['main']}) · "
            f"{_score(result['score_at_birth'])} at birth (version {result['version']})"
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


def versions(answer: Sequence[Json]) -> None:
    """`onebasis versions`."""
    if not answer:
        console.print("no versions yet; the first task that is trained makes one")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("version", "on", "status", "added", "tasks", "rank", "written", "merged in"):
        table.add_column(name, justify="left" if name in ("status", "added") else "right", no_wrap=name != "added")
    for row in answer:
        refs = [f"← {name}" for name in row["refs"] if name == "main" or "main" not in row["refs"]]
        brought = ", ".join([*row["added"], *(f"{name} refined" for name in row["refined"])])
        table.add_row(
            str(row["version"]), str(row["parent"]), " ".join([_coloured(row["status"]), *refs]),
            brought, str(row["task_count"]), str(row["rank_max"]),
            _bytes(row["bytes_written"]), f"{row['merge_seconds']:.2f} s",
        )  # fmt: skip
    console.print(table)
    for row in answer:
        if row["reason"]:
            console.print(f"version {row['version']} was rejected: {escape(row['reason'])}", soft_wrap=True)
        if row["remakes"]:
            without = escape(", ".join(row["removed"]))
            console.print(f"version {row['version']} is version {row['remakes']} without {without}", soft_wrap=True)


def version(answer: Json) -> None:
    """`onebasis version`."""
    versions([answer])
    table = Table(box=None, pad_edge=False)
    for name in ("task", "since", "score", "rows", "measured at", "error at birth", "drift since (at most)"):
        table.add_column(name)
    for row in answer["tasks"]:
        refined = f", refined v{row['made_in']}" if row["made_in"] > row["birth"] else ""
        table.add_row(
            row["title"], f"v{row['birth']}{refined}", _score(row["score"]), str(row["rows"] or "–"),
            f"v{row['measured_at']}" if row["measured_at"] else "–",
            f"{row['error_at_birth']:.4f}", f"{row['drift_bound']:.4f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print()
    _print_figures(answer)
    _print_footprint(answer["footprint"])


def diff(answer: Json) -> None:
    """`onebasis diff`."""
    titles = answer["titles"]
    added, removed = ([item["name"] for item in answer[name]] for name in ("added", "removed"))
    for name in dict.fromkeys([*added, *removed]):
        sign = "~" if name in added and name in removed else "+" if name in added else "-"
        console.print(f"{sign} {name}" + (" (refined, or merged anew)" if sign == "~" else ""))
    table = Table(box=None, pad_edge=False)
    for name in ("task", "score before", "score after", "drift (at most)"):
        table.add_column(name)
    drift = {titles.get(task_id, task_id): value for task_id, value in answer["drift_bound"].items()}
    for title, (before, after) in sorted(answer["scores"].items()):
        moved = drift.get(title)
        table.add_row(title, _score(before), _score(after), "–" if moved is None else f"{moved:.5f}")
    console.print(table)


def rollback(answer: Json) -> None:
    """`onebasis rollback`."""
    if answer["from_version"] == answer["to_version"]:
        console.print(f"main is version {answer['to_version']} already")
    else:
        verb = "would move" if answer["preview"] else "moved"
        console.print(f"main {verb} from version {answer['from_version']} to version {answer['to_version']}")
        for name, words in (("vanishing", "vanishes"), ("returning", "returns")):
            for title in answer[name]:
                console.print(f"  {title} {words}")
        if not answer["vanishing"] and not answer["returning"]:
            console.print("  no task vanishes or returns")
        if not answer["preview"]:
            console.print(f"nothing is lost: `onebasis rollback {answer['from_version']}` undoes this")
    if answer["held"]:
        console.print("main is held there: `onebasis store release` lets what passes the gate move it again")


def scores(answer: Json) -> None:
    """`onebasis scores`."""
    if not answer["versions"]:
        console.print("no scores yet: main is empty")
        return
    table = Table(
        box=None, pad_edge=False, title=f"Score of each task under each version of main (v{answer['version']})"
    )
    table.add_column("")
    for column in answer["tasks"]:
        team, _, name = column["title"].partition("/")
        table.add_column(f"{team}/\n{name}", justify="right")
    for label, key in (("base", "base"), ("own adapter", "local")):
        table.add_row(f"[dim]{label}[/dim]", *(f"[dim]{_score(column[key])}[/dim]" for column in answer["tasks"]))
    for number, row in zip(answer["versions"], answer["matrix"], strict=True):
        cells = [
            "" if number < column["birth"] else _cell(cell, number)
            for column, cell in zip(answer["tasks"], row, strict=True)
        ]
        table.add_row(f"version {number}", *cells)
    table.add_row("[dim]rows[/dim]", *(f"[dim]{column['rows'] or '–'}[/dim]" for column in answer["tasks"]))
    console.print(table)
    carried = any(
        cell["measured_at"] not in (None, number)
        for number, row in zip(answer["versions"], answer["matrix"], strict=True)
        for cell in row
    )
    mark = " · ' carried over, the task hardly moved" if carried else ""
    console.print(f"[dim]base: the task's head on the bare base model{mark}[/dim]", soft_wrap=True)
    if full := [column["title"] for column in answer["tasks"] if column["share_full"]]:
        console.print(f"[dim]not strict, may be trained again on their own rows (share_full): {', '.join(full)}[/dim]")
    console.print()
    _print_figures(answer["by_version"][-1])
    _print_footprint(answer["footprint"])


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
        "score": [_score(row["local_score"]) for row in rows],
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
        table.add_row(*(_coloured(text) if name == "state" else text for name, text in texts.items()))
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
    if (last := training["last_point"]) is not None:
        console.print(f"  last told  {_point(last)}", soft_wrap=True)
    if training["plot"]:
        console.print(f"  loss plot  {escape(training['plot'])}", soft_wrap=True)


def _print_figures(figures: Json) -> None:
    meanings = {
        "average_accuracy": "mean score of the tasks",
        "backward_transfer": "BWT (Lopez-Paz & Ranzato 2017): mean of score now − score at birth",
        "forgetting": "forgetting (Chaudhry et al. 2018): mean of best earlier score − score now",
        "merge_gap": "merge gap: mean of own adapter's score − score at birth",
    }
    for key, meaning in meanings.items():
        mean = figures[key]
        if mean["value"] is None:
            console.print(f"{'–':>17}  {meaning} (nothing to compare yet)", soft_wrap=True)
            continue
        width = f" ±{mean['half_width_95']:.4f}" if mean["half_width_95"] is not None else ""
        console.print(f"{mean['value']:+.4f}{width:9}  {meaning} (n = {mean['n']} tasks)", soft_wrap=True)


def _print_footprint(footprint: Json) -> None:
    basis, coefficients = footprint["basis_numbers"] * 4, footprint["coefficient_numbers"] * 4
    heads, separate = footprint["head_numbers"] * 4, footprint["separate_numbers"] * 4
    together = basis + coefficients
    console.print()
    console.print(
        f"stored (float32, heads of {_bytes(heads)} aside): coefficients {_bytes(coefficients)} + basis {_bytes(basis)}"
        f" = {_bytes(together)}; as separate LoRAs {_bytes(separate)}"
    )
    if together:
        console.print(
            f"  {separate / coefficients:.1f}× smaller counting coefficients only,"
            f" {separate / together:.2f}× with the basis, which is paid once"
        )


def _cell(cell: Json, number: int) -> str:
    if cell["score"] is None:
        return "–"
    return _score(cell["score"]) + ("" if cell["measured_at"] == number else "'")


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
    memory = [_bytes(told["memory_bytes"])] if told.get("memory_bytes") else []
    left = [f"{_duration(told['seconds_left'])} left"] if told.get("seconds_left") is not None else []
    return " · ".join([f"step {told['step']}{steps}", *parts, *memory, *left])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _share(row: Json) -> float:
    progress = row.get("progress") or {}
    return progress["step"] / progress["steps"] if progress.get("steps") else 0.0


def _coloured(state: str) -> str:
    colour = COLOURS.get(state)
    return f"[{colour}]{state}[/{colour}]" if colour else state


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
