"""A task's loss and learning rate over its steps as a picture, with the places where it was interrupted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.tasks.task_record import TaskRecord
from workers.orders import Point

LOSS, RATE, RESUMED = ("tab:blue", "tab:green", "tab:purple", "tab:brown"), "tab:orange", "tab:red"
"""Colours; of the loss, one for each training of `auto`."""
MARKED_MAX = 30
"""Number of points below which a curve marks each point."""


def draw_loss_plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw all attempts: what a later one trained again is pale, and a line marks where each went on. Each training of
    `auto` is a curve of its own.

    Args:
        points: In the order in which they were reported; at least one.
        path: A .png, replaced; its folder is made.
    """
    # The object interface, not pyplot: pyplot keeps global state and is not for threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = axes.twinx()
    # The loss matters most: it is in front of the learning rate, and its background must not hide that.
    axes.set_zorder(rates.get_zorder() + 1)
    axes.patch.set_visible(False)
    marker = "." if len(points) < MARKED_MAX else ""
    curves = trainings(points)
    for (candidate, own), colour in zip(curves.items(), itertools.cycle(LOSS)):
        for number, (kept, lost) in enumerate(attempts(own)):
            rates.plot(*_line(kept, "learning_rate"), color=RATE, linewidth=1, linestyle="--")
            axes.plot(*_line(kept[-1:] + lost, "loss"), color=colour, alpha=0.3)
            axes.plot(*_line(kept, "loss"), color=colour, marker=marker, label="" if number else candidate)
            if number:
                begun = (kept + lost)[0].resumed_from
                axes.axvline(begun, color=RESUMED, linewidth=1, linestyle=":")
                words = f"resumed from step {begun}" if begun else "begun again"
                axes.annotate(
                    words, (begun, 0.98), (4, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                    color=RESUMED, fontsize=8, va="top", rotation=90,
                )  # fmt: skip
    if any(curves):
        axes.legend()
    last = points[-1]
    of = f" of {last.candidate}" if last.candidate else ""
    axes.set_title(f"{title}: loss {last.loss:.4g} at step {last.step:,}{of}", fontsize=11)
    axes.set_xlabel(f"step of {last.steps:,}" if last.steps else "step")
    axes.set_ylabel("loss", color=LOSS[0])
    axes.set_xlim(0, max(last.steps, *(point.step for point in points), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    rates.set_ylabel("learning rate", color=RATE)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new.png")
    figure.savefig(written, dpi=130)
    written.replace(path)


def plot_file(state_dir: str, record: TaskRecord) -> Path:
    """Where a task's plot is, once there is one: a name may be used again when its task has failed."""
    return Path(state_dir) / "plots" / record.team / f"{record.name}-{record.task_id}.png"


def trainings(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each training of `auto`, by its name, in the order in which they began; else all under no name."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.candidate, []).append(point)
    return found


def attempts(points: Sequence[Point]) -> list[tuple[list[Point], list[Point]]]:
    """The points of each attempt at one training: (those that count, those of steps that a later attempt made again).

    Another attempt begins where steps go back, or come from another checkpoint.
    """
    found = [list(points[:1])]
    for before, point in itertools.pairwise(points):
        if point.step <= before.step or point.resumed_from != before.resumed_from:
            found.append([])
        found[-1].append(point)
    split = []
    for number, attempt in enumerate(found, start=1):
        until = min((later[0].resumed_from for later in found[number:]), default=math.inf)
        kept = [point for point in attempt if point.step <= until]
        split.append((kept, attempt[len(kept) :]))
    return split


def _line(points: Sequence[Point], name: str) -> tuple[list[int], list[Any]]:
    return [point.step for point in points], [getattr(point, name) for point in points]
