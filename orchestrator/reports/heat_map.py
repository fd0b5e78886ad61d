"""A[version][task] as a picture: what every merge did to every task, at one look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from orchestrator.judging.score_table import ScoreTable

LEAST_RANGE = 0.02
"""Colours span at least ±this change, so that noise of one row in hundreds does not look like a disaster."""


def draw_heat_map(table: ScoreTable, titles: Mapping[str, str], path: Path) -> None:
    """Draw the table: each cell holds its score, its colour the change since the task's birth.

    Args:
        titles: Task id to what people call it.
        path: A .png, replaced.
    """
    # The object interface, not pyplot: pyplot keeps global state and is not for threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(table.versions), len(table.tasks)
    change_VT = [
        [table.score(v, t) - table.score(table.birth[t], t) if v >= table.birth[t] else math.nan for t in table.tasks]
        for v in table.versions
    ]
    largest = max((abs(c) for row in change_VT for c in row if not math.isnan(c)), default=0.0)
    limit = max(LEAST_RANGE, largest)
    figure = Figure(figsize=(2.5 + 1.15 * columns, 1.8 + 0.45 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(change_VT, cmap="RdYlGn", vmin=-limit, vmax=limit, aspect="auto")
    for y, version in enumerate(table.versions):
        for x, task_id in enumerate(table.tasks):
            cell = table.cells[version].get(task_id)
            if cell is not None:
                carried = "" if cell.measured_at == version else "\n(not measured again)"
                axes.text(x, y, f"{cell.score:.3f}{carried}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(columns), [titles.get(t, t).replace("/", "/\n") for t in table.tasks], fontsize=8)
    axes.set_yticks(range(rows), [f"version {v}" for v in table.versions], fontsize=8)
    axes.set_title("Score of each task under each version", fontsize=10)
    figure.colorbar(picture, label="change since birth")
    written = path.with_suffix(".new.png")
    figure.savefig(written, dpi=130)
    written.replace(path)
