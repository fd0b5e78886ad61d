"""Rows that go through a language model together, their keys and values side by side in one cache.

The cache is a rectangle: every row of a lane takes as many columns as the longest. So a long row beside many short ones
is given a lane of its own as soon as there is no room otherwise. All rows end at the right, what is before a shorter
one is masked, and positions count a row's own tokens: each is written as it would be alone.

Axes: S rows, T tokens that the cache holds of the longest row, H heads, V words of the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from configs.errors import InvalidInput
from workers.evaluation import left_padded
from workers.serving.writing import Pen

JOINED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that rows can be joined in: each token has a column of its own. A state that many tokens made has
none, and its rows are begun together."""
LANES_MAX = 3
"""A pass of each lane reads all weights of the model again."""

Over = dict[Pen, Exception | None]
"""Rows that are written no further, each with what went wrong, or None."""


class Writer(Protocol):
    """A model that writes, each row by its own task."""

    model: Any

    def together(self, tasks: Sequence[Any], before: Any) -> Any:
        """What `serving` takes for rows of these tasks. before: What it was for rows before them, or None."""

    def serving(self, batch: Any) -> Any:
        """While this lasts, the rows that go through the model are those of `batch`."""


def lanes_of(lengths: Sequence[int], room: int, lanes_max: int = LANES_MAX) -> list[list[int]]:
    """Places of rows in as few lanes as have room together; where no number of lanes has, in `lanes_max`.

    Args:
        lengths: Columns that each row needs.
        room: Columns of all lanes: of each its rows times its longest one's.

    Returns:
        Long rows first; a lane is split where that saves most.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    lanes = [order] if order else []
    while sum(len(lane) * lengths[lane[0]] for lane in lanes) > room and len(lanes) < lanes_max:
        saved, number, cut = max(
            ((len(lane) - cut) * (lengths[lane[0]] - lengths[lane[cut]]), number, cut)
            for number, lane in enumerate(lanes)
            for cut in range(len(lane))
        )
        if not saved:
            break
        lanes[number : number + 1] = [lanes[number][:cut], lanes[number][cut:]]
    return lanes


class Lane:
    """Some rows, and what the model holds of their tokens; at first none."""

    def __init__(self, writer: Writer, pad_id: int) -> None:
        self._writer, self._pad_id = writer, pad_id
        model = writer.model.get_base_model() if hasattr(writer.model, "get_base_model") else writer.model
        self._model, self._taken = model, frozenset(inspect.signature(model.forward).parameters)
        config = model.config.get_text_config(decoder=True)
        self.is_joined = getattr(config, "attention_chunk_size", None) is None and all(
            type(layer) in JOINED for layer in DynamicCache(config=config).layers
        )
        """Whether rows may be joined to it. Chunks of attention begin at columns, not at tokens."""
        self.pens: list[Pen] = []
        self._cache: Any = None
        self._mask_ST: Tensor = torch.zeros(0, 0, dtype=torch.long)
        self._batch: Any = None

    @property
    def columns(self) -> int:
        """Columns that its rows have together."""
        return self._mask_ST.numel() if self.pens else 0

    def begin(self, pens: Sequence[Pen]) -> Over:
        """Read the prompts of its rows, and what was written after them before; write a token of each."""
        ids_ST, mask_ST = left_padded([[*pen.prompt, *pen.ids] for pen in pens], self._pad_id, self._model.device)
        batch = self._writer.together([pen.task for pen in pens], None)
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        logits_SV = self._pass(ids_ST, mask_ST, cache, batch)
        self.pens, self._mask_ST, self._cache, self._batch = [*pens], mask_ST, cache, batch
        return self._ended(taken(pens, logits_SV))

    def go_on(self) -> Over:
        """Write a token of every row. What it holds is of no use any more where this raises."""
        ids_S1 = torch.tensor([[pen.last] for pen in self.pens], device=self._model.device)
        self._mask_ST = pad(self._mask_ST, (0, 1), value=1)
        return self._ended(taken(self.pens, self._pass(ids_S1, self._mask_ST, self._cache, self._batch)))

    def join(self, other: Lane) -> None:
        """Take in the rows of another lane, which is of no use afterwards."""
        width = max(lane._mask_ST.shape[1] for lane in (self, other))
        both = [pad(lane._mask_ST, (width - lane._mask_ST.shape[1], 0)) for lane in (self, other)]
        self._mask_ST, self.pens = torch.cat(both), [*self.pens, *other.pens]
        _join(self._cache, other._cache)
        self._batch = self._writer.together([pen.task for pen in self.pens], self._batch)

    def only(self, pens: Collection[Pen]) -> Self:
        """These of its rows as a lane of their own."""
        if len(pens) == len(self.pens):
            return self
        lane = copy.copy(self)
        lane._cache = copy.copy(self._cache)
        lane._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        lane._keep([place for place, pen in enumerate(self.pens) if pen in pens])
        return lane

    def _ended(self, over: Over) -> Over:
        if over:
            self._keep([place for place, pen in enumerate(self.pens) if pen not in over])
        return over

    def _keep(self, places: Sequence[int]) -> None:
        """Let the other rows go, and the columns that none of those that stay needs."""
        self.pens = [self.pens[place] for place in places]
        if not self.pens:
            self._cache = self._batch = None
            return
        places_S = torch.tensor(places, device=self._mask_ST.device)
        self._cache.reorder_cache(places_S)
        self._mask_ST = self._mask_ST[places_S]
        if self.is_joined:
            length = int(self._mask_ST.sum(dim=1).max())
            self._mask_ST = self._mask_ST[:, -length:]
            _shorten(self._cache, length)
        self._batch = self._writer.together([pen.task for pen in self.pens], self._batch)

    def _pass(self, ids_ST: Tensor, mask_ST: Tensor, cache: Any, batch: Any) -> Tensor:
        """S×V: logits after the last token of each row, float32. The cache takes the tokens in."""
        positions_ST = (mask_ST.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_ST.shape[1] :]
        more = {"position_ids": positions_ST, "logits_to_keep": 1}
        name = "past_key_values" if "past_key_values" in self._taken else "cache_params"
        inputs = self._model.prepare_inputs_for_generation(
            ids_ST,
            attention_mask=mask_ST,
            is_first_iteration=ids_ST.shape == mask_ST.shape,
            use_cache=True,
            **{name: cache},
            **{name: value for name, value in more.items() if name in self._taken},
        )
        with self._writer.serving(batch):
            return self._model(**inputs, return_dict=True).logits[:, -1].float()  # type: ignore[no-any-return]


def taken(pens: Sequence[Pen], logits_SV: Tensor) -> Over:
    """Give each row its next token; returns those that end with it. What goes wrong with a row costs that row alone."""
    over: Over = {}
    for pen, logits_V in zip(pens, logits_SV, strict=True):
        try:
            pen.draw(logits_V)
        except Exception as error:
            over[pen] = error
    largest_S, tokens_S = logits_SV.max(dim=-1)
    for pen, largest, token in zip(pens, largest_S.tolist(), tokens_S.tolist(), strict=True):
        try:
            if pen in over:
                continue
            if not math.isfinite(largest):  # it is no number as soon as one of the row's logits is none
                raise InvalidInput("the model's output is no number", pen.where, "see how the task was trained")
            if pen.take(token):
                over[pen] = None
        except Exception as error:
            over[pen] = error
    return over


def _join(cache: Any, other: Any) -> None:
    """Put the rows of another cache behind those of this one. A sliding window's layer holds fewer columns than there
    are tokens: the last ones."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(mine, DummyLayer) or mine.keys is None:
            continue
        width = max(mine.keys.shape[-2], theirs.keys.shape[-2])
        for name in ("keys", "values"):
            both = [getattr(layer, name) for layer in (mine, theirs)]
            setattr(mine, name, torch.cat([pad(part, (0, 0, width - part.shape[-2], 0)) for part in both]))
        if mine.is_sliding:
            mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)


def _shorten(cache: Any, length: int) -> None:
    """Keep the last columns, so many as tokens are left."""
    for layer in cache.layers:
        if isinstance(layer, DummyLayer) or layer.keys is None:
            continue
        layer.keys, layer.values = layer.keys[..., -length:, :], layer.values[..., -length:, :]
        if layer.is_sliding:
            layer.cumulative_length = length
