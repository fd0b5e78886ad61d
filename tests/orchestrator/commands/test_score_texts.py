"""Scores as CSV that pandas reads back equal, and as LaTeX that a paper takes."""

from __future__ import annotations

import io
import math

import pandas
import pytest
from typer.testing import CliRunner

from orchestrator.api.requests import ShowScores
from orchestrator.commands.cli import app
from orchestrator.commands.display import Json
from orchestrator.commands.score_texts import csv_text, escaped, latex_text
from tests.orchestrator.site import Site


def cell(score: float | None, measured_at: int | None) -> Json:
    return {"score": score, "measured_at": measured_at, "rows": 7}


ANSWER: Json = {
    "base_model": "tiny_model",
    "version": 2,
    "versions": [1, 2],
    "tasks": [
        {"title": "red/al_pha", "birth": 1, "base": 1 / 3, "local": 0.9},
        {"title": "blue/beta", "birth": 2, "base": None, "local": 2 / 3},
        {"title": "blue/same", "birth": 1, "base": 0.5, "local": None},
    ],
    "matrix": [
        [cell(0.1 + 0.2, 1), cell(0.4, 1), cell(0.5, 1)],
        [cell(0.25, 2), cell(6 / 7, 2), cell(0.5, 1)],
    ],
}


def test_pandas_reads_back_every_number_as_it_was() -> None:
    read = pandas.read_csv(io.StringIO(csv_text(ANSWER)), float_precision="round_trip").set_index("task")
    assert list(read.columns) == ["born in", "base", "own adapter", "version 1", "version 2"]
    assert list(read.loc["red/al_pha"]) == [1, 1 / 3, 0.9, 0.1 + 0.2, 0.25]
    assert list(read["born in"]) == [1, 2, 1]
    beta = read.loc["blue/beta"]
    assert math.isnan(beta["base"])
    assert math.isnan(beta["version 1"])  # before its birth, whatever a cell says
    assert beta["version 2"] == 6 / 7


def test_a_latex_table_has_escaped_names_the_best_in_bold_and_what_was_carried_over_marked() -> None:
    lines = latex_text(ANSWER).splitlines()
    assert "scores of tiny\\_model up to version 2" in lines[0]
    assert lines[3:] == [
        "\\begin{tabular}{lrrrr}",
        "\\toprule",
        "task & base & own & v1 & v2 \\\\",
        "\\midrule",
        "red/al\\_pha & 0.3333 & 0.9000 & \\textbf{0.3000} & 0.2500 \\\\",
        "blue/beta & -- & 0.6667 & -- & 0.8571 \\\\",  # of a single score none is the best
        "blue/same & 0.5000 & -- & 0.5000 & 0.5000$'$ \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a_b", r"a\_b"),
        ("50%&$#", r"50\%\&\$\#"),
        ("{~^\\}", r"\{\textasciitilde{}\textasciicircum{}\textbackslash{}\}"),
    ],
)
def test_signs_that_latex_reads_are_escaped(text: str, printed: str) -> None:
    assert escaped(text) == printed


def test_the_command_prints_them_and_nothing_else(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASIS_STATE_DIR", str(site.folder))
    answer = site.client.ask(ShowScores())
    for form, text in (("csv", csv_text(answer)), ("latex", latex_text(answer))):
        assert CliRunner().invoke(app, ["scores", "--format", form]).stdout == text
    frame = pandas.read_csv(io.StringIO(csv_text(answer)), index_col="task")
    assert frame.loc["red/alpha", "version 1"] == answer["matrix"][0][0]["score"]
    both = CliRunner().invoke(app, ["scores", "--format", "csv", "--json"])
    assert both.exit_code > 0
    assert "leave one of them out" in both.output
