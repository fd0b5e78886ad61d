"""What each evaluation row contributed to a score: a small file beside the score, for paired comparisons.

Light on purpose (no model libraries): the control plane reads them. A file is written before its score is reported, so
if a score names a file, the file exists.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from configs.errors import Corrupt
from subspace_store.storage.protocol import Storage

FORMAT = "onebasis-results-1"


@dataclass(frozen=True, kw_only=True)
class Results:
    """One score, row by row."""

    task_id: str
    version: int
    """0: the task's own adapter, before merging."""
    metric: str
    eval_sha256: str
    """Digest of the frozen rows' file: results are compared only where this and `metric` are the same."""
    per_row: tuple[float, ...]
    """Each row's share in the score, in the order of the file; see `workers/metrics.py`. float32."""

    def comparable(self, other: Results) -> bool:
        """Whether row i of one is row i of the other."""
        mine, theirs = ((r.metric, r.eval_sha256, len(r.per_row)) for r in (self, other))
        return mine == theirs


def write_results(storage: Storage, key: str, results: Results) -> None:
    """Write; writing twice does no harm, since the same score gives the same bytes.

    Cost:
        4 bytes per row.
    """
    facts = {name: getattr(results, name) for name in ("task_id", "version", "metric", "eval_sha256")}
    # One header value: safetensors writes several in hash order, which differs from process to process.
    header = json.dumps({"format": FORMAT} | facts, sort_keys=True)
    tensors = {"per_row": np.asarray(results.per_row, dtype=np.float32)}
    storage.write(key, bytes(save_safetensors(tensors, {"onebasis": header})))


def read_results(storage: Storage, key: str) -> Results:
    """Read what `write_results` wrote.

    Raises:
        NotFound: There is no such object.
        Corrupt: It is no results file.
    """
    content = storage.read(key)
    try:
        per_row = load_safetensors(content)["per_row"]
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["onebasis"])
        if header.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return Results(**header, per_row=tuple(per_row.astype(float).tolist()))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"is not a results file: {error}", key) from error
