"""The picture of a task's curves: which points count after a resume, and that it is drawn as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from orchestrator.reports.loss_plot import attempts, draw_loss_plot, plot_file
from tests.builders import task_record
from workers.orders import Point


def points(*steps: int, resumed_from: int = 0) -> list[Point]:
    return [
        Point(at=0.0, step=step, loss=1 / step, learning_rate=1e-3, steps=100, resumed_from=resumed_from)
        for step in steps
    ]


def steps(found: list[tuple[list[Point], list[Point]]]) -> list[tuple[list[int], list[int]]]:
    return [([point.step for point in kept], [point.step for point in lost]) for kept, lost in found]


def test_one_attempt_counts_whole() -> None:
    assert steps(attempts(points(1, 10, 20))) == [([1, 10, 20], [])]


def test_what_a_later_attempt_made_again_does_not_count() -> None:
    told = points(1, 10, 20, 30) + points(11, 20, 30, resumed_from=10) + points(40, resumed_from=30)
    assert steps(attempts(told)) == [([1, 10], [20, 30]), ([11, 20, 30], []), ([40], [])]


def test_an_attempt_from_an_older_checkpoint_undoes_two() -> None:
    told = points(1, 10, 20) + points(15, 20, resumed_from=10) + points(10, resumed_from=5)
    assert steps(attempts(told)) == [([1], [10, 20]), ([], [15, 20]), ([10], [])]


def test_an_attempt_from_the_start_undoes_all() -> None:
    assert steps(attempts(points(1, 10) + points(1, 10, 20))) == [([], [1, 10]), ([1, 10, 20], [])]


def test_loss_and_rate_are_lines_and_each_resume_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda me, *args, **kwargs: (figures.append(me), save(me, *args, **kwargs)))
    path = plot_file(str(tmp_path), task_record("red/alpha", task_id="t1"))
    draw_loss_plot(points(1, 10, 20) + points(11, 20, resumed_from=10), "red/alpha", path)
    assert [found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("*.png")] == ["plots/red/alpha-t1.png"]
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    loss, rate = figures[0].axes
    assert loss.get_title() == "red/alpha: loss 0.05 at step 20"
    drawn = [(list(line.get_xdata()), line.get_alpha()) for line in loss.lines]
    assert drawn == [([10, 20], 0.3), ([1, 10], None), ([20], 0.3), ([11, 20], None), ([10, 10], None)]
    assert [text.get_text() for text in loss.texts] == ["resumed from step 10"]
    assert [list(line.get_ydata()) for line in rate.lines] == [[1e-3, 1e-3], [1e-3, 1e-3]]
    assert loss.get_xlim() == (0, 100)  # of 100 steps, 20 are done


def test_each_training_of_auto_is_a_curve_with_its_name_and_none_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda me, path, **_: (figures.append(me), path.touch()))
    told = [replace(point, candidate=name) for name in ("share", "lora") for point in points(1, 10, 20)]
    told += [replace(point, candidate="lora on all rows") for point in points(1, 10) + points(6, 10, resumed_from=5)]
    draw_loss_plot(told, "red/alpha", tmp_path / "x.png")
    loss, _ = figures[0].axes
    assert loss.get_title() == "red/alpha: loss 0.1 at step 10 of lora on all rows"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["share", "lora", "lora on all rows"]
    assert [text.get_text() for text in loss.texts] == ["resumed from step 5"]
    named = {line.get_label(): line.get_color() for line in loss.lines if not str(line.get_label()).startswith("_")}
    assert len(set(named.values())) == len(named) == 3


def test_a_single_point_is_a_picture_too(tmp_path: Path) -> None:
    draw_loss_plot(points(1), "red/alpha", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
