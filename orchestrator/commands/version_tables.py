"""Tables of versions and scores in a terminal, made from the service's answers. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.measure import Measurement
from rich.table import Table

from orchestrator.commands import moments
from orchestrator.commands.display import Json, canary, coloured, score_text, size_text
from subspace_store.commands.terminal import console, counted, decimals, shown

WIDE = 100_000
"""Characters of a terminal on which everything fits."""


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
        refs += [f"({shown(tag)})" for tag in row["tags"]]
        brought = shown(", ".join([*row["added"], *(f"{name} refined" for name in row["refined"])]))
        table.add_row(
            str(row["version"]), str(row["parent"]), " ".join([coloured(row["status"]), *refs]),
            brought, str(row["task_count"]), str(row["rank_max"]),
            size_text(row["bytes_written"]), f"{row['merge_seconds']:.2f} s",
        )  # fmt: skip
    console.print(table)
    for row in answer:
        if row["reason"]:
            console.print(f"version {row['version']} was rejected: {shown(row['reason'])}", soft_wrap=True)
        if row["remakes"]:
            without = shown(", ".join(row["removed"]))
            how = f"without {without}" if without else "with all tasks merged at once"
            console.print(f"version {row['version']} is version {row['remakes']} {how}", soft_wrap=True)


def branches_at(answer: Json) -> None:
    """`onebasis versions --at`."""
    console.print(f"at {moments.shown(answer['at'])}")
    for name, number in answer["branches"].items():
        console.print(f"  {name} named " + (f"version {number}" if number else "version 0, the empty one"))
    main = answer["branches"]["main"]
    held = ", ".join(answer["tasks"])
    console.print(f"  main held {shown(held) or 'no task'}{_not_shown(answer)}", soft_wrap=True)
    if answer["expired"]:
        console.print(f"  version {main} has expired since: what it held cannot be read or exported any more")


def history(answer: Json) -> None:
    """`onebasis history`."""
    if not answer["moves"]:
        console.print(f"{answer['branch']} has not moved" + (" before that" if answer["before"] else ""))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("record", "when", "who", "what", "from", "to", "tasks", "those that stayed", "why"):
        wraps = name in ("tasks", "why")
        table.add_column(name, justify="right" if name in ("record", "from", "to") else "left", no_wrap=not wraps)
    for move in answer["moves"]:
        table.add_row(
            str(move["seq"]), moments.shown(move["time"]), shown(move["actor"]),
            move["how"] + (" and held" if move["holds"] and move["how"] != "held" else ""),
            f"v{move['from']}", f"v{move['to']}" + (" (expired)" if move["expired"] else ""),
            _tasks_of(move), _stayed(move["stayed"]), shown(move["reason"]) or "–",
        )  # fmt: skip
    console.print(table)
    console.print("[dim]+ came, - left, ↻ replaced by another revision, ~ refined or merged anew[/dim]", soft_wrap=True)


def _tasks_of(move: Json) -> str:
    """What a move did to tasks, with the scores of those that were measured."""
    told = []
    for sign, kind in (("+", "came"), ("-", "left"), ("↻", "replaced"), ("~", "changed")):
        told += [f"{sign}{shown(name)}{_pair(move['scores'].get(name))}" for name in move[kind]]
    return ", ".join(told) + _not_shown(move) or "–"


def _pair(scores: Sequence[float | None] | None) -> str:
    before, after = scores or (None, None)
    if before is None and after is None:
        return ""
    if before is None or after is None:
        return f" {score_text(before if after is None else after)}"
    return f" {score_text(before)} → {score_text(after)}"


def _stayed(stayed: Json) -> str:
    """The mean score of the tasks that were there before and stayed."""
    if not stayed["measured"]:
        return "–"
    before, after = (score_text(stayed[name]) for name in ("before", "after"))
    of = f"{stayed['measured']} of " if stayed["measured"] < stayed["tasks"] else ""
    return f"{before if before == after else f'{before} → {after}'} (n = {of}{stayed['tasks']})"


def _not_shown(answer: Json) -> str:
    count = max(answer.get("hidden", {}).values(), default=0)
    return f" (and {counted(count, 'task')} of other teams)" if count else ""


def version(answer: Json) -> None:
    """`onebasis version`."""
    versions([answer])
    table = Table(box=None, pad_edge=False)
    for name in ("task", "since", "score", "rows", "measured at", "error at birth", "error now"):
        table.add_column(name)
    for row in answer["tasks"]:
        refined = f", refined v{row['made_in']}" if row["made_in"] > row["birth"] else ""
        table.add_row(
            shown(row["title"]), f"v{row['birth']}{refined}", score_text(row["score"]), str(row["rows"] or "–"),
            f"v{row['measured_at']}" if row["measured_at"] else "–",
            decimals(row["error_at_birth"]), decimals(row["error"]),
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
        console.print(f"{sign} {shown(name)}" + (" (refined, or merged anew)" if sign == "~" else ""))
    table = Table(box=None, pad_edge=False)
    for name in ("task", "score before", "score after", "drift (at most)"):
        table.add_column(name)
    drift = {titles.get(task_id, task_id): value for task_id, value in answer["drift_bound"].items()}
    for title, (before, after) in sorted(answer["scores"].items()):
        moved = drift.get(title)
        table.add_row(shown(title), score_text(before), score_text(after), "–" if moved is None else decimals(moved, 5))
    console.print(table)


def rollback(answer: Json) -> None:
    """`onebasis rollback`."""
    if answer.get("repeated"):
        console.print(
            f"this rollback, to version {answer['to_version']}, was done before under {answer['op_key']!r}: nothing "
            f"was changed now, and main is version {answer['main']}",
            soft_wrap=True,
        )
        return
    if answer["from_version"] == answer["to_version"]:
        console.print(f"main is version {answer['to_version']} already")
    else:
        verb = "would move" if answer["preview"] else "moved"
        console.print(f"main {verb} from version {answer['from_version']} to version {answer['to_version']}")
        for name, words in (("vanishing", "vanishes"), ("returning", "returns")):
            for title in answer[name]:
                console.print(f"  {shown(title)} {words}")
        if not answer["vanishing"] and not answer["returning"]:
            console.print("  no task vanishes or returns")
        if not answer["preview"]:
            console.print(f"nothing is lost: `onebasis rollback {answer['from_version']}` undoes this")
    if answer.get("refused"):
        console.print(f"it would be refused now: {shown(answer['refused'])}", soft_wrap=True)
    if answer["held"]:
        console.print("main is held there: `onebasis store release` lets what passes the gate move it again")


def rejected(answer: Json) -> None:
    """`onebasis reject`."""
    version, tasks = answer["version"], answer["tasks"]
    said = f"version {version} was rejected before, and nothing was done now"
    if not answer["repeated"]:
        said = f"version {version} is rejected, and main stays version {answer['main']}: {', '.join(tasks)}"
        said += "; each is merged again by itself, and waits again" if len(tasks) > 1 else ""
    console.print(shown(said), soft_wrap=True)


def removed(answer: Json) -> None:
    """`onebasis remove`."""
    title = answer["title"]
    if not answer["preview"]:
        said = f"{title} is removed: main is as if it had never been there; `onebasis history` shows the move"
    else:
        made = counted(len(answer["versions"]), "version")
        numbers = ", ".join(map(str, answer["versions"]))
        again = f"make {made} again: {numbers}" if answer["versions"] else "make none again"
        going = f"all {len(answer['revisions'])} revisions of {title} go; it" if answer["revisions"][1:] else "it"
        said = f"{going} would go back to version {answer['start']} and {again} (--yes does it); all tasks would take "
        said += f"{answer['numbers_after']:,} numbers instead of {answer['numbers_before']:,}"
    console.print(shown(said), soft_wrap=True)
    if answer.get("refused"):
        console.print(f"it would be refused now: {shown(answer['refused'])}", soft_wrap=True)


def restored(answer: Json) -> None:
    """`onebasis rollback-task`."""
    name, error = f"{answer['title']}@{answer['revision']}", decimals(answer["error"])
    if answer.get("repeated"):
        said = f"version {answer['version']}: this was done before under {answer['op_key']!r}, and nothing was done now"
    elif answer["preview"]:
        said = f"{name} would take the place of {answer['leaving']} in version {answer['version']}, with an error of "
        said += error
    else:
        said = f"version {answer['version']}: {name} is back in the place of {answer['leaving']}, with an error of "
        said += f"{error}; `onebasis rollback-task` of the other revision, or `onebasis rollback`, undoes this"
    if answer["approximate"]:
        said += "; its adapter as delivered was let go, so it is what a version holds of it"
    if answer["others_move"]:
        said += "; it is merged as a new task is, and others may move"
    console.print(shown(said), soft_wrap=True)
    if answer.get("refused"):
        console.print(f"it would be refused now: {shown(answer['refused'])}", soft_wrap=True)


def scores(answer: Json) -> None:
    """`onebasis scores`."""
    if not answer["versions"]:
        console.print(f"no scores: version {answer['version']} holds no task")
        return
    across = _across(answer)
    fits = Measurement.get(console, console.options.update(max_width=WIDE), across).maximum <= console.width
    # Not the table's title, which would be broken at the table's width.
    up_to = "each version up to v" if fits else "version "
    console.print(f"[italic]Score of each task under {up_to}{answer['version']}[/italic]", soft_wrap=True)
    console.print(across if fits else _down(answer))
    carried = any(
        cell["measured_at"] not in (None, number)
        for number, row in zip(answer["versions"], answer["matrix"], strict=True)
        for cell in row
    )
    mark = " · ' carried over, the task hardly moved" if carried else ""
    console.print(f"[dim]base: the task's head on the bare base model{mark}[/dim]", soft_wrap=True)
    for column in answer["tasks"]:
        _print_rows_of_revisions(column, answer["versions"])
    _print_general_losses(answer)
    if full := [column["title"] for column in answer["tasks"] if column["share_full"]]:
        console.print(
            f"[dim]not strict, may be trained again on their own rows (share_full): {shown(', '.join(full))}[/dim]"
        )
    if one := answer.get("canary"):
        console.print(canary(one), soft_wrap=True)
    console.print()
    _print_figures(answer["by_version"][-1])
    _print_footprint(answer["footprint"])


def flipped(answer: Json) -> None:
    """`onebasis flipped`."""
    at, now = answer["measured_at"], answer["version"]
    under = f"version {now}" + (f", as measured under version {at}" if at != now else "")
    against = f"version {answer['against']}" if answer["against"] else "its own adapter"
    counts = f"{answer['worse']} of {counted(answer['rows'], 'row')} worse, {answer['better']} better"
    mean = f"{answer['mean']:+.4f} in the mean of {answer['metric']}"
    if answer["low"] is not None:
        mean += f", 95 % interval {answer['low']:+.4f} to {answer['high']:+.4f}"
    console.print(f"{shown(answer['title'])} under {under}, against {against}: {counts}; {mean}", soft_wrap=True)
    if not answer["flipped"]:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("row", "before", "here", "expected", "it says"):
        table.add_column(name, justify="left" if name in ("expected", "it says") else "right")
    for one in answer["flipped"]:
        said = "not kept as text" if one["inputs"] is None else _said_in(one["inputs"])
        before, after = score_text(one["before"]), score_text(one["after"])
        table.add_row(str(one["row"] + 1), before, after, shown(one["expected"] or "–"), shown(said))
    console.print(table)
    if (more := answer["worse"] + answer["better"] - len(answer["flipped"])) > 0:
        console.print(f"[dim]{counted(more, 'row')} that changed less: --limit lists more[/dim]")


def _said_in(inputs: Json) -> str:
    """A row's inputs in one line."""
    if "messages" in inputs:
        said = " ".join(f"{turn['role']}: {turn['content']}" for turn in inputs["messages"])
    else:
        said = inputs.get("prompt") or " / ".join(
            text for text in (inputs.get("text"), inputs.get("text_pair")) if text
        )
    return " ".join(said.split())


def _across(answer: Json) -> Table:
    """The matrix: a row for each version, a column for each task."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in answer["tasks"]:
        team, _, name = shown(column["title"]).partition("/")
        table.add_column(f"{team}/\n{name}", justify="right")
    for label, key in (("base", "base"), ("own adapter", "local")):
        table.add_row(f"[dim]{label}[/dim]", *(f"[dim]{score_text(column[key])}[/dim]" for column in answer["tasks"]))
    for number, row in zip(answer["versions"], answer["matrix"], strict=True):
        cells = [
            "" if number < column["birth"] else _cell(cell, number)
            for column, cell in zip(answer["tasks"], row, strict=True)
        ]
        table.add_row(f"version {number}", *cells)
    table.add_row("[dim]rows[/dim]", *(f"[dim]{column['rows'] or '–'}[/dim]" for column in answer["tasks"]))
    return table


def _down(answer: Json) -> Table:
    """A row for each task, where a column for each would be too narrow to read."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "rows", "base", "own adapter", "born in", "at birth", "now", "change"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=name != "task")
    rows = dict(zip(answer["versions"], answer["matrix"], strict=True))
    for place, column in enumerate(answer["tasks"]):
        born, now = rows[column["birth"]][place], rows[answer["version"]][place]
        known = born["score"] is not None and now["score"] is not None
        table.add_row(
            shown(column["title"]), str(column["rows"] or "–"), score_text(column["base"]), score_text(column["local"]),
            f"version {column['birth']}", score_text(born["score"]), _cell(now, answer["version"]),
            decimals(now["score"] - born["score"], sign=True) if known else "–",
        )  # fmt: skip
    table.caption = "the score under each version: `onebasis scores --json`, or scores.png in the state folder"
    return table


def _print_rows_of_revisions(column: Json, versions: Sequence[int]) -> None:
    """The scores of one task on the rows of each of its revisions: what a revision gained, and what it lost."""
    if not column["of_rows"]:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{shown(column['title'])} on the rows of")
    for part in column["of_rows"]:
        table.add_column("?" if part["revision"] is None else f"@{part['revision']}", justify="right")
    for label, key in (("main before", "main_before"), ("own adapter", "local")):
        table.add_row(f"[dim]{label}[/dim]", *(f"[dim]{score_text(part[key])}[/dim]" for part in column["of_rows"]))
    for place, number in enumerate(versions):
        scores = [part["scores"][place] for part in column["of_rows"]]
        if any(score is not None for score in scores):
            table.add_row(f"version {number}", *map(score_text, scores))
    table.add_row("[dim]rows[/dim]", *(f"[dim]{part['rows']}[/dim]" for part in column["of_rows"]))
    console.print()
    console.print(table)


def _print_general_losses(answer: Json) -> None:
    """What the base model loses by each task, where it is measured: the most first."""
    rows = dict(zip(answer["versions"], answer["matrix"], strict=True))
    lost = [
        (now, rows[column["birth"]][place].get("general_loss"), column["title"])
        for place, column in enumerate(answer["tasks"])
        if (now := rows[answer["version"]][place].get("general_loss")) is not None
    ]
    if not lost:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("task", "at birth", "now"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for now, born, title in sorted(lost, key=lambda one: -one[0]):
        table.add_row(shown(title), "–" if born is None else decimals(born, sign=True), decimals(now, sign=True))
    console.print()
    console.print("[italic]What the base model loses by a task, on general text[/italic]", soft_wrap=True)
    console.print(table)
    scale = "nats for each token of base_model.general_text; 0.1: tokens have become 10 % less likely"
    console.print(f"[dim]{scale}[/dim]", soft_wrap=True)


def capacity(answer: Json) -> None:
    """`onebasis capacity`."""
    if not answer["tasks"]:
        console.print(f"version {answer['version']} holds no task: nothing is stored")
        return
    table = Table(box=None, pad_edge=False, title=f"What the tasks of version {answer['version']} store")
    columns = ("task", "as a separate LoRA", "coefficients", "in the foundation", "private part")
    for name in (*columns, "error at birth", "error now"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in answer["tasks"]:
        separate = task["separate_numbers"]
        own = (
            f"{size_text(4 * numbers)} ({numbers / separate:.0%})" if numbers and separate else "–"
            for numbers in (task[f"{name}_numbers"] for name in ("coefficient", "foundation", "private"))
        )
        table.add_row(
            shown(task["title"]), size_text(4 * separate), *own,
            decimals(task["error_at_birth"]), decimals(task["error"]),
        )  # fmt: skip
    console.print(table)
    if private := [task for task in answer["tasks"] if task["private_numbers"]]:
        console.print(
            f"what the basis (at most rank_max {answer['rank_max']} directions) does not hold of "
            f"{counted(len(private), 'task')} is in private parts",
            soft_wrap=True,
        )
    trend = Table(box=None, pad_edge=False)
    for name in ("version", "tasks", "basis", "coefficients", "private", "together", "separate LoRAs"):
        trend.add_column(name, justify="right")
    for row in answer["trend"]:
        parts = [row[f"{name}_numbers"] for name in ("basis", "coefficient", "private")]
        sizes = [size_text(4 * numbers) for numbers in (*parts, sum(parts), row["separate_numbers"])]
        trend.add_row(str(row["version"]), str(row["tasks"]), *sizes)
    console.print()
    console.print(trend)
    _print_footprint(answer["footprint"])


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
        width = f" ±{decimals(mean['half_width_95'])}" if mean["half_width_95"] is not None else ""
        console.print(
            f"{decimals(mean['value'], sign=True)}{width:9}  {meaning} (n = {counted(mean['n'], 'task')})",
            soft_wrap=True,
        )


def _print_footprint(footprint: Json) -> None:
    basis, coefficients = footprint["basis_numbers"] * 4, footprint["coefficient_numbers"] * 4
    private = footprint["private_numbers"] * 4
    heads, separate = footprint["head_numbers"] * 4, footprint["separate_numbers"] * 4
    together = basis + coefficients + private
    apart = f"+ private parts {size_text(private)} " if private else ""
    console.print()
    console.print(
        f"stored (float32, heads of {size_text(heads)} aside): coefficients {size_text(coefficients)} "
        f"+ basis {size_text(basis)} {apart}= {size_text(together)}; as separate LoRAs {size_text(separate)}"
    )
    console.print(
        f"  in the store {size_text(footprint['stored_bytes'])}: every living version's files, and all adapters as "
        "delivered, heads among them",
        soft_wrap=True,
    )
    if together and private:
        console.print(f"  {separate / together:.2f}× smaller with the basis, which is paid once")
    elif together:
        console.print(
            f"  {separate / coefficients:.1f}× smaller counting coefficients only,"
            f" {separate / together:.2f}× with the basis, which is paid once"
        )


def _cell(cell: Json, number: int) -> str:
    if cell["score"] is None:
        return "–"
    return score_text(cell["score"]) + ("" if cell["measured_at"] == number else "'")
