"""Task files of each kind and files of rows: a test of data names only what it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.task_spec import Kind, TaskSpec


def spec_of(kind: Kind = "sequence_classification", **data: Any) -> TaskSpec:
    """A task of this kind with this section `data`; two labels where the kind has labels."""
    labels = {} if kind in ("sequence_regression", "causal_lm") else {"label_names": ("no", "yes")}
    files = {"train_file": "/train.jsonl"} | ({} if "eval_fraction" in data else {"eval_file": "/eval.jsonl"})
    return TaskSpec.model_validate(
        {"team": "red", "name": "alpha", "base_model": "tiny", "kind": kind, "data": files | labels | data}
    )


def written(path: Path, *rows: Any) -> Path:
    """A file of JSON lines; strings are lines as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
