"""What was measured, for people: tables inside docs/quality.md, plots beside it, and summary.json. Measures nothing."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.streams.ways import TITLES

REFERENCE = "separate"
SUMMARISED = {
    "minilm": (("ten",), "auto"),
    "smollm2": (("superni", "superni-3"), "auto"),
    "hundred_adapters": (("hundred",), "ours-lora"),
}
"""Key in summary.json to the row of default settings, and the streams of which the first that was measured is taken."""
FIGURES = {
    "minilm": ("mean_loss_points", "learnt_loss_points", "worst_loss_points", "forgetting_points"),
    "smollm2": ("mean_loss_points", "forgetting_points"),
    "hundred_adapters": ("forgetting_points",),
}

POINTS = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5)
"""Ticks of the plot of losses."""

Figures = dict[str, Any]


def write(results: Path, docs: Path) -> None:
    """Write all of it anew from the streams' files in a folder."""
    streams = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    streams = {name: found for name, found in streams.items() if "rows" in found}
    if not streams:
        return
    (results / "summary.json").write_text(json.dumps(summary(streams), indent=1) + "\n")
    page = docs / "quality.md"
    if page.is_file():
        page.write_text(filled(page.read_text(), streams))
    docs.mkdir(parents=True, exist_ok=True)
    bytes_plot(streams, docs / "quality-bytes.png")
    tasks_plot(streams, docs / "quality-tasks.png")


def summary(streams: Mapping[str, Figures]) -> Figures:
    """The figures of the default settings; a model or stream that was not measured is not there."""
    found: Figures = {}
    for key, (names, row) in SUMMARISED.items():
        measured = [streams[name] for name in names if row in streams.get(name, {}).get("rows", {})]
        if not measured:
            continue
        of, seeds = measured[0], measured[0]["rows"][row]
        found[key] = {name: round(_column(seeds, name), 4) + 0.0 for name in FIGURES[key]}
        found[key] |= {
            "stream": of["stream"],
            "row": row,
            "tasks": len(of["tasks"]),
            "seeds": sorted(int(seed) for seed in seeds),
            "date": of["date"],
            "hardware": of["hardware"],
        }
    return found


def _column(seeds: Mapping[str, Figures], name: str) -> float:
    """A figure over seeds: the mean; of `worst_loss_points` the worst task's, each task's loss being the mean."""
    if name == "worst_loss_points":
        tasks = next(iter(seeds.values()))["loss_points"]
        return min(statistics.fmean(found["loss_points"][task] for found in seeds.values()) for task in tasks)
    return statistics.fmean(found[name] for found in seeds.values() if found[name] is not None)


def filled(page: str, streams: Mapping[str, Figures]) -> str:
    """The page with its tables made anew. A table stands between `<!-- table NAME -->` and `<!-- end -->`."""

    def table(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        made = (
            {"table": _main_table, "scores": _score_table, "mtil": _transfer_table}[kind](streams[name])
            if name in streams
            else "Not measured."
        )
        return f"<!-- {kind} {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (?P<kind>table|scores|mtil) (?P<name>\S+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _main_table(stream: Figures) -> str:
    rows = stream["rows"]
    whole = _bytes(rows[REFERENCE])
    heads = _mean(rows[REFERENCE], "bytes_heads")
    lines = [
        "| row | average | loss | of what was learnt | worst task | BWT | forgetting | merge gap | normalised "
        "| KB shared + own | × fewer, with basis / own alone / with heads | trained numbers | base loses | seconds "
        "| seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in _order(rows):
        seeds = rows[name]
        shared, own = _mean(seeds, "bytes_shared"), _mean(seeds, "bytes_own")
        cells = [
            TITLES[name],
            _spread(seeds, "average", 100),
            _spread(seeds, "mean_loss_points"),
            _spread(seeds, "learnt_loss_points"),
            _signed(_column(seeds, "worst_loss_points"), 1),
            _spread(seeds, "backward_transfer_points"),
            _spread(seeds, "forgetting_points"),
            _spread(seeds, "merge_gap_points"),
            f"{_mean(seeds, 'normalised'):.3f}" if _known(seeds, "normalised") else "–",
            f"{shared / 1000:,.0f} + {own / 1000:,.0f}",
            " / ".join(_times(whole, part) for part in (shared + own, own))
            + f" / {_times(whole + heads, shared + own + heads)}",
            f"{_mean(seeds, 'trained_numbers'):,.0f}",
            _spread(seeds, "mean_general_loss"),
            f"{_mean(seeds, 'seconds'):,.0f}",
            str(len(seeds)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _score_table(stream: Figures) -> str:
    tasks, rows = stream["tasks"], stream["rows"]
    lines = [f"| row | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    lines += [
        f"| {TITLES[name]} | "
        + " | ".join(f"{100 * statistics.fmean(s['scores'][task] for s in rows[name].values()):.1f}" for task in tasks)
        + " |"
        for name in _order(rows)
    ]
    return "\n".join(lines)


def _transfer_table(stream: Figures) -> str:
    """MTIL's figures (`orchestrator/judging/transfer.py`), and each task's score right before its birth."""
    tasks, rows = stream["tasks"], stream["rows"]
    measured = {name: rows[name] for name in _order(rows) if all(found["untrained"] for found in rows[name].values())}
    if not measured:
        return "Not measured."
    later = tasks[1:]
    lines = [
        f"| row | transfer | average | last | FWT | {' | '.join(f'{task} before' for task in later)} |",
        "|---|---|---|---|---|" + "---|" * len(later),
    ]
    bare = [found["untrained"] for found in next(iter(measured.values())).values()]  # the same in every row
    of_bare = [100 * statistics.fmean(found[task] for found in bare) for task in tasks]
    mean = statistics.fmean(of_bare[1:])
    whole = f"{statistics.fmean(of_bare):.1f}"
    lines.append(f"| base model | {mean:.1f} | {whole} | {whole} | – | {' | '.join(f'{s:.1f}' for s in of_bare[1:])} |")
    for name, seeds in measured.items():
        mtil = [
            _spread({seed: found["mtil"] for seed, found in seeds.items()}, key, 100)
            for key in ("transfer", "average", "last")
        ]
        ahead = _spread(seeds, "forward_transfer_points")
        before = [
            f"{100 * statistics.fmean(found['by_version'][str(place)][task] for found in seeds.values()):.1f}"
            for place, task in enumerate(later, start=1)
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(mtil)} | {ahead} | {' | '.join(before)} |")
    return "\n".join(lines)


def bytes_plot(streams: Mapping[str, Figures], path: Path) -> None:
    """Loss beside separate LoRAs against stored bytes over theirs, a mark for each row, a panel for each stream."""
    shown = sorted(streams, key=lambda name: len(streams[name]["tasks"]))
    figure, panels = _panels(len(shown), 4.4)
    for axes, name in zip(panels, shown, strict=True):
        rows = streams[name]["rows"]
        whole = _bytes(rows[REFERENCE])
        for row in (row for row in _order(rows) if _bytes(rows[row])):
            axes.plot(_bytes(rows[row]) / whole, _mean(rows[row], "mean_loss_points"), linestyle="none", **_look(row))
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks(POINTS, [f"{tick:g}" for tick in POINTS], minor=False)
        axes.set_ylim(min(POINTS), max(POINTS))
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(
            xscale="log",
            xlim=(0.05, 1.3),
            title=f"{name}: {len(streams[name]['tasks'])} tasks",
            xlabel="bytes, heads apart, over LoRAs'",
        )
        axes.legend(fontsize=6)
    panels[0].set_ylabel("points beside separate LoRAs, mean over tasks")
    figure.savefig(path, dpi=110)


def tasks_plot(streams: Mapping[str, Figures], path: Path) -> None:
    """Loss beside separate LoRAs against the number of tasks of a stream; and what an early task loses of it."""
    figure, (left, right) = _panels(2, 4.4)
    names = [row for row in TITLES if row != REFERENCE and sum(row in s["rows"] for s in streams.values()) > 1]
    for row in names:
        points = sorted(
            (len(stream["tasks"]), _mean(stream["rows"][row], "mean_loss_points"))
            for stream in streams.values()
            if row in stream["rows"]
        )
        left.plot([x for x, _ in points], [y for _, y in points], **_look(row))
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xscale="log", xlabel="tasks in the stream", ylabel="points beside separate LoRAs, mean over tasks")
    if names:
        left.legend(fontsize=6)
    if "hundred" in streams:
        stream = streams["hundred"]
        for row in (r for r in _order(stream["rows"]) if r != REFERENCE):
            found = next(iter(stream["rows"][row].values()))
            change = [100 * (found["scores"][task] - found["at_birth"][task]) for task in stream["tasks"]]
            means = _by_ten(change)
            right.plot(range(1, len(means) + 1), means, **_look(row))
        right.axhline(0, color="grey", linewidth=0.8)
        right.set(xlabel="batch of ten adapters, in the order they came", ylabel="points at the end beside birth")
        right.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(count, 1), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def _by_ten(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[start : start + 10]) for start in range(0, len(values), 10)]


def _look(row: str) -> Figures:
    """Mark, colour and name of a row: the same in every plot."""
    place = list(TITLES).index(row)
    own = {"marker": "*", "color": "black", "markersize": 13}
    other = {"marker": "os^vDP<>Xdhp"[place % 12], "color": f"C{place % 10}", "markersize": 6}
    return (own if row == "auto" else other) | {"label": TITLES[row].strip("*")}


def _order(rows: Iterable[str]) -> list[str]:
    return [name for name in TITLES if name in set(rows)]


def _mean(seeds: Mapping[str, Figures], key: str) -> float:
    return statistics.fmean(found[key] for found in seeds.values())


def _bytes(seeds: Mapping[str, Figures]) -> float:
    return _mean(seeds, "bytes_shared") + _mean(seeds, "bytes_own")


def _times(whole: float, part: float) -> str:
    return f"{whole / part:.1f}" if part else "–"


def _known(seeds: Mapping[str, Figures], key: str) -> bool:
    return all(found[key] is not None for found in seeds.values())


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # 0.0 added: −0.0 would be shown as such


def _spread(seeds: Mapping[str, Figures], key: str, factor: float = 1.0) -> str:
    """Mean, and ± the standard deviation over seeds where there are several; a dash where it has no meaning."""
    values = [factor * found[key] for found in seeds.values() if found.get(key) is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}" if factor > 1 else _signed(statistics.fmean(values), 2)
    return f"{mean} ±{statistics.stdev(values):.1f}" if len(values) > 1 else mean
