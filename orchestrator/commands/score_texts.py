"""The matrix of scores as text for other programs and for papers: CSV and LaTeX. The web page copies the same forms.

A row is a task, a column a version, so that rows keep their length while tasks come. Decides nothing.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from orchestrator.commands.display import Json

FACTS = ("task", "born in", "base", "own adapter")
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def csv_text(answer: Json) -> str:
    """Comma-separated values with a line of names; every score with all its digits, an empty field where there is none.

    `pandas.read_csv(…, float_precision="round_trip")` reads the same numbers.
    """
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow([*FACTS, *(f"version {number}" for number in answer["versions"])])
    for column, cells in _tasks(answer):
        facts = (column["title"], column["birth"], column["base"], column["local"])
        lines.writerow([*facts, *(cell["score"] for cell in cells)])
    return written.getvalue()


def latex_text(answer: Json) -> str:
    """A table for `booktabs`, four digits; of each task the best score in bold, where its scores differ. A prime marks
    what was carried over."""
    versions = answer["versions"]
    head = ["task", "base", "own", *(f"v{number}" for number in versions)]
    lines = [
        f"% scores of {escaped(answer['base_model'])} up to version {answer['version']}; \\usepackage{{booktabs}}",
        "% base: the head on the bare base model; own: the task's own adapter before merging; --: not measured",
        "% bold: the task's best; a prime: carried over, since the task hardly moved",
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        f"{' & '.join(head)} \\\\",
        "\\midrule",
    ]
    for column, cells in _tasks(answer):
        known = {cell["score"] for cell in cells} - {None}
        best = max(known) if len(known) > 1 else None
        told = [
            _cell(cell["score"], cell["score"] == best, cell["measured_at"] != number)
            for number, cell in zip(versions, cells, strict=True)
        ]
        row = [escaped(column["title"]), _cell(column["base"]), _cell(column["local"]), *told]
        lines.append(f"{' & '.join(row)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _SPECIAL[found[0]], text)


def _tasks(answer: Json) -> Iterator[tuple[Json, list[Json]]]:
    """Each task with its cells, one for each version; those of versions before its birth are empty."""
    for place, column in enumerate(answer["tasks"]):
        rows = zip(answer["versions"], answer["matrix"], strict=True)
        empty = {"score": None, "measured_at": None}
        yield column, [row[place] if number >= column["birth"] else empty for number, row in rows]


def _cell(score: float | None, is_best: bool = False, is_carried: bool = False) -> str:
    if score is None:
        return "--"
    digits = f"{score:.4f}"
    return (f"\\textbf{{{digits}}}" if is_best else digits) + ("$'$" if is_carried else "")
