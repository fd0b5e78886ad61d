"""Task files of each kind and files of rows: a test of data names only what it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.task_spec import CLASSIFICATION_KINDS, Kind, TaskSpec


def spec_of(kind: Kind = "sequence_classification", sections: Mapping[str, Any] | None = None, **data: Any) -> TaskSpec:
    """A task of this kind with this section `data`, and other sections; two labels where the kind has labels."""
    labels = {"label_names": ("no", "yes")} if kind in CLASSIFICATION_KINDS else {}
    files = {"train_file": "/train.jsonl"} | ({} if "eval_fraction" in data else {"eval_file": "/eval.jsonl"})
    title = {"team": "red", "name": "alpha", "base_model": "tiny", "kind": kind}
    return TaskSpec.model_validate(title | {"data": files | labels | data} | dict(sections or {}))


def written(path: Path, *rows: Any) -> Path:
    """A file of JSON lines; strings are lines as they are."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
