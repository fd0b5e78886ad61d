"""Which task is a text for? Told by the frozen base model alone, so that no task need be asked.

In two ways. By *features*: the base model's own mean output over a text's tokens, and a regularised least-squares
classifier of tasks on it. Of each task two sums over its evaluation rows are kept, which no order changes and which add
up to those of all tasks exactly; no row can be read off them. By *energy*, where no task has such sums: the task whose
update changes the text's layers most, ‖ΔW_i·x‖ relative to ‖ΔW_i‖ in the common basis, for which no row is needed.

Axes: S texts, T tokens, H numbers of a hidden state, K features, I tasks.

Source:
    Features: Tong et al., Analytic Subspace Routing (2025); recursive least squares as in ACIL (NeurIPS 2022).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from configs.errors import Corrupt, NotFound
from subspace_store.storage.protocol import Storage
from workers.base_model import BaseModel
from workers.evaluation import batches_by_length, on_device
from workers.rows.task_data import CompletionRow, Row, TextRow

FEATURES_MAX = 256
"""Features of a text; a wider hidden state is projected on so many fixed random directions."""
ROWS_MAX = 512
"""Most rows of a task that are summed: the first ones. Of MiniLM they take four seconds of a core."""
TOKENS_MAX = 128
"""Most tokens of a text that are looked at."""
RIDGE = 1e-2
"""Regularisation, relative to the mean of the features' second moments."""
FORMAT = "onebasis-features-1"


def text_of(row: Row) -> str | None:
    """What a caller would give to be answered, as one text; None where that is no single text."""
    if isinstance(row, TextRow):
        return row.text if row.text_pair is None else None
    if isinstance(row, CompletionRow):
        return row.turns[-2][1]
    return None


@dataclass(frozen=True)
class Sums:
    """Of the features of one task's rows."""

    count: int
    second_KK: Tensor
    """Σ φ·φᵀ, float64."""
    first_K: Tensor
    """Σ φ."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.second_KK + other.second_KK, self.first_K + other.first_K)


def sums_of(features_SK: Tensor) -> Sums:
    """The sums over some texts."""
    features_SK = features_SK.double()
    return Sums(len(features_SK), features_SK.T @ features_SK, features_SK.sum(dim=0))


def features(base: BaseModel, backbone: Any, texts: Sequence[str]) -> Tensor:
    """S×K: the mean hidden state over a text's tokens, of length 1, and a constant.

    Args:
        backbone: The base model without a head and without any task's update.
    """
    tokenizer, length_max = base.tokenizer, min(TOKENS_MAX, base.length_max)
    encoded = tokenizer(list(texts), truncation=True, max_length=length_max)
    rows = [{name: values[place] for name, values in encoded.items()} for place in range(len(texts))]
    found: dict[int, Tensor] = {}
    for chosen in batches_by_length([len(row["input_ids"]) for row in rows]):
        batch = dict(tokenizer.pad([rows[place] for place in chosen], padding_side="right", return_tensors="pt"))
        with torch.inference_mode():
            hidden_STH = backbone(**on_device(backbone.device, batch)).last_hidden_state.float().cpu()
        mask_ST1 = batch["attention_mask"].unsqueeze(-1).float()
        mean_SH = (hidden_STH * mask_ST1).sum(dim=1) / mask_ST1.sum(dim=1).clamp(min=1)
        found |= dict(zip(chosen, mean_SH, strict=True))
    mean_SH = torch.stack([found[place] for place in range(len(texts))])
    if (wide := mean_SH.shape[1]) > FEATURES_MAX:
        draw = torch.Generator().manual_seed(wide)
        mean_SH = mean_SH @ torch.randn(wide, FEATURES_MAX, generator=draw)
    return torch.cat([torch.nn.functional.normalize(mean_SH, dim=1), torch.ones(len(texts), 1)], dim=1)


class Router:
    """Tells tasks apart by the sums of their features.

    Args:
        sums: Task to sums; every task counts as much as every other, however many rows it has.
    """

    def __init__(self, sums: Mapping[str, Sums]) -> None:
        self.tasks = tuple(sums)
        second_KK = sum((one.second_KK / one.count for one in sums.values()), torch.zeros(()).double())
        second_KK = second_KK + RIDGE * second_KK.diagonal().mean() * torch.eye(len(second_KK)).double()
        first_KI = torch.stack([one.first_K / one.count for one in sums.values()], dim=1)
        self._weights_KI = torch.linalg.solve(second_KK, first_KI)

    def scores(self, features_SK: Tensor) -> Tensor:
        """S×I, the larger the likelier."""
        found: Tensor = features_SK.double() @ self._weights_KI
        return found


def features_key(task_id: str) -> str:
    """Storage key of a task's sums: with its results, and deleted with them."""
    return f"results/{task_id}/features.safetensors"


def write_sums(storage: Storage, task_id: str, sums: Sums) -> None:
    """Keep a task's sums: half a megabyte at most."""
    tensors = {"second": sums.second_KK.numpy(), "first": sums.first_K.numpy()}
    header = json.dumps({"format": FORMAT, "count": sums.count})
    storage.write(features_key(task_id), bytes(save(tensors, {"onebasis": header})))


def read_sums(storage: Storage, task_id: str) -> Sums | None:
    """A task's sums; None where it has none.

    Raises:
        Corrupt: What is there is something else.
    """
    try:
        content = storage.read(key := features_key(task_id))
    except NotFound:
        return None
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["onebasis"])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in load(content).items()}
        return Sums(int(header["count"]), tensors["second"], tensors["first"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"is not a file of features: {error}", key) from error


def keep_sums(storage: Storage, base: BaseModel, backbone: Any, task_id: str, rows: Sequence[Row]) -> bool:
    """Sum up a task's rows, unless that was done. Returns whether there are sums now: not of pairs, and of pictures."""
    if len(rows) == 0 or text_of(rows[0]) is None:
        return False
    if not storage.keys(features_key(task_id)):
        texts = [text for place in range(min(len(rows), ROWS_MAX)) if (text := text_of(rows[place])) is not None]
        write_sums(storage, task_id, sums_of(features(base, backbone, texts)))
    return True
