"""The picture of A[version][task]: its size, and that what is born later has no cell before."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure

from orchestrator.judging.score_table import score_table
from orchestrator.reports.heat_map import COLOURS, LEAST_RANGE, draw_heat_map
from orchestrator.web.pages import SOURCE
from tests.orchestrator.tables import state, version


def drawn(path: Path, count: int) -> tuple[int, int]:
    """Draw `count` versions of one new task each; (width, height) in pixels, read from the file's own header."""
    ids = [f"t{n}" for n in range(1, count + 1)]
    versions = [version(n, n - 1, [f"t{n}"], dict.fromkeys(ids[: n - 1], 1.0)) for n in range(1, count + 1)]
    scores = {n: {f"t{m}": 0.9 - 0.01 * (n - m) for m in range(1, n + 1)} for n in range(1, count + 1)}
    draw_heat_map(score_table(state(versions, scores), count, 0.1), {t: f"red/{t}" for t in ids}, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_the_picture_and_the_web_page_have_the_same_colours_which_all_can_tell_apart() -> None:
    palette = (SOURCE / "palette.ts").read_text()
    listed = re.search(r"ANCHORS = \[(.*?)\] as const", palette, flags=re.DOTALL)
    assert listed is not None
    anchors = [[int(n) for n in one.split(",")] for one in re.findall(r"\[([\d, ]+)\]", listed[1])]
    # matplotlib keeps 256 colours, of which the nearest is up to two steps beside the anchor.
    pictured = [[255 * part for part in colormaps[COLOURS](step / 10)[:3]] for step in range(11)]
    assert anchors == [pytest.approx(colour, abs=2.1) for colour in pictured]
    assert f"LEAST_RANGE = {LEAST_RANGE}\n" in palette
    # Red loses, blue gains; where they differ, blue does: nobody has to tell red from green.
    loss, gain = anchors[1], anchors[-2]
    assert loss[0] > loss[2]
    assert gain[2] > gain[0]
    assert abs(loss[1] - gain[1]) < abs(loss[2] - gain[2])


@pytest.mark.parametrize("count", [1, 3])
def test_the_picture_grows_with_versions_and_tasks(tmp_path: Path, count: int) -> None:
    # (2.5 + 1.15·columns) × (1.8 + 0.45·rows) inches at 130 dots each.
    size = drawn(tmp_path / "scores.png", count)
    assert size == (int((2.5 + 1.15 * count) * 130), int((1.8 + 0.45 * count) * 130))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]


def test_every_score_is_written_into_its_cell_and_a_carried_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.write_bytes(b"")))
    log = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.01})], {1: {"a": 0.8}, 2: {"b": 0.6}})
    draw_heat_map(score_table(log, 2, 0.1), {"a": "red/a", "b": "blue/b"}, tmp_path / "x.png")
    axes = figures[0].axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "0.800"),
        ((0, 1), "0.800\n(not measured again)"),
        ((1, 1), "0.600"),
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["red/\na", "blue/\nb"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["version 1", "version 2"]


def test_a_picture_of_many_tasks_is_no_larger_than_one_of_a_few_dozen(tmp_path: Path) -> None:
    # At 1.15 inches a column 500 tasks would be 75,000 pixels wide: matplotlib refuses that, and half of it takes 4 GB.
    width, height = drawn(tmp_path / "scores.png", 120)
    assert (width, height) == drawn(tmp_path / "scores.png", 60) == (3913, 2574)


def test_tasks_without_a_score_have_no_column_and_without_any_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    versions = [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.0})]
    assert not draw_heat_map(score_table(state(versions, {}), 2, 0.1), {"a": "red/a", "b": "blue/b"}, path)
    assert not path.exists()
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.write_bytes(b"")))
    assert draw_heat_map(score_table(state(versions, {2: {"b": 0.5}}), 2, 0.1), {"a": "red/a", "b": "blue/b"}, path)
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == ["blue/\nb"]
