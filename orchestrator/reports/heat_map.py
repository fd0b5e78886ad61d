"""A[version][task] as a picture: what every merge did to every task, at one look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.judging.score_table import ScoreTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = "RdBu"
"""Red for a loss, blue for a gain; not red and green, which one man in twelve cannot tell apart. The web page has the
same (palette.ts)."""
LEAST_RANGE = 0.02
"""Colours span at least ±this change, so that noise of one row in hundreds does not look like a disaster."""
MOST_TASKS, MOST_VERSIONS = 24, 40
"""Most columns and rows whose cells are large enough for their scores. Of more, colours alone are shown, in a picture
that grows no further: one of 120 tasks and 120 versions would take a gigabyte to draw."""
NEWEST = 500
"""Versions that are shown at most, the newest."""
MOST_LABELS = 50
"""Labels along one side that can be read."""


def draw_heat_map(table: ScoreTable, titles: Mapping[str, str], path: Path) -> bool:
    """Draw the table: each cell holds its score, its colour the change since the task's birth.

    Args:
        titles: Task id to what people call it.
        path: A .png, replaced.

    Returns:
        Whether there was anything to draw: tasks without a score have no column, and where none has one, nothing is
        written.

    Cost:
        O(tasks·versions) for the newest versions, and some 60 MB at most.
    """
    # The object interface, not pyplot: pyplot keeps global state and is not for threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    versions = table.versions[-NEWEST:]
    scored = set[str]().union(*(table.cells[version] for version in versions))
    tasks = [task for task in table.tasks if task in scored]
    if not tasks:
        return False
    rows, columns = len(versions), len(tasks)
    change_VT = [
        [table.score(v, t) - table.score(table.birth[t], t) if v >= table.birth[t] else math.nan for t in tasks]
        for v in versions
    ]
    largest = max((abs(c) for row in change_VT for c in row if not math.isnan(c)), default=0.0)
    limit = max(LEAST_RANGE, largest)
    size = 2.5 + 1.15 * min(columns, MOST_TASKS), 1.8 + 0.45 * min(rows, MOST_VERSIONS)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(change_VT, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    if columns <= MOST_TASKS and rows <= MOST_VERSIONS:
        _write_scores(axes, table, versions, tasks)
    shown = range(0, columns, -(-columns // MOST_LABELS))
    names = [titles.get(tasks[x], tasks[x]) for x in shown]
    if columns <= MOST_TASKS:
        axes.set_xticks(shown, [name.replace("/", "/\n") for name in names], fontsize=8)
    else:
        axes.set_xticks(shown, names, fontsize=8, rotation=90)
    shown = range(0, rows, -(-rows // MOST_LABELS))
    axes.set_yticks(shown, [f"version {versions[y]}" for y in shown], fontsize=8)
    which = f"each of the newest {NEWEST} versions" if len(table.versions) > NEWEST else "each version"
    axes.set_title(f"Score of each task under {which}", fontsize=10)
    figure.colorbar(picture, label="change since birth")
    written = path.with_suffix(".new.png")
    figure.savefig(written, dpi=130)
    written.replace(path)
    return True


def _write_scores(axes: Axes, table: ScoreTable, versions: Sequence[int], tasks: Sequence[str]) -> None:
    for y, version in enumerate(versions):
        for x, task_id in enumerate(tasks):
            cell = table.cells[version].get(task_id)
            if cell is not None:
                carried = "" if cell.measured_at == version else "\n(not measured again)"
                axes.text(x, y, f"{cell.score:.3f}{carried}", ha="center", va="center", fontsize=8)
