"""Rows that a language model writes together, and whose number changes between two tokens.

A row that comes reads its prompt in a pass of its own, and is joined to the others from its second token on; a row that
has ended leaves at once. So nobody waits for a neighbour's long answer. A row's tokens are those that it would have
alone: all rows end at the right, what is before a shorter one is masked, and positions count a row's own tokens.

Axes: S rows, T tokens that the cache holds of the longest row, H heads, V words of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from workers.evaluation import ROWS_PER_BATCH, TOKENS_PER_BATCH, left_padded
from workers.serving.writing import Pen

JOINED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that rows can be joined in: each token has a column of its own. A state that many tokens made has
none, and its rows are begun together."""


class Writer(Protocol):
    """A model that writes, each row by its own task."""

    model: Any

    def together(self, tasks: Sequence[Any], before: Any) -> Any:
        """What `serving` takes for rows of these tasks. before: What it was for rows before them, or None."""

    def serving(self, batch: Any) -> Any:
        """While this lasts, the rows that go through the model are those of `batch`."""


class RunningBatch:
    """The rows that one model writes now, and those that wait for room.

    Args:
        between_tokens: Called before every token; may raise to stop.
        rows_max: Rows that are written at once.
    """

    def __init__(
        self, writer: Writer, pad_id: int, between_tokens: Callable[[], None], rows_max: int = ROWS_PER_BATCH
    ) -> None:
        self._writer, self._pad_id, self._between, self._rows_max = writer, pad_id, between_tokens, rows_max
        model = writer.model.get_base_model() if hasattr(writer.model, "get_base_model") else writer.model
        self._model, self._taken = model, frozenset(inspect.signature(model.forward).parameters)
        self._waiting: deque[Pen] = deque()
        self._pens: list[Pen] = []
        self._open: dict[Pen, None] = {}
        """All rows that have not ended, those that wait among them."""
        self._cache: Any = None
        self._mask_ST: Tensor = torch.zeros(0, 0, dtype=torch.long)
        self._batch: Any = None

    @property
    def pens(self) -> list[Pen]:
        """The rows that are still to be written."""
        return list(self._open)

    def add(self, pens: Sequence[Pen]) -> None:
        """Rows that are to be written, too: from the next step on, or as soon as there is room."""
        self._waiting.extend(pens)
        self._open |= dict.fromkeys(pens)

    def step(self) -> dict[Pen, Exception | None]:
        """Write a token of every row.

        Returns:
            The rows that are written no further, each with what went wrong, or None. Prompts that cannot be read cost
            the rows that are written already nothing; whatever else goes wrong costs all of them.

        Cost:
            A pass over one token of each row, and where rows begin, one over their prompts.
        """
        over: dict[Pen, Exception | None] = {}
        try:
            self._between()
            with torch.inference_mode():
                if self._pens:
                    over |= dict.fromkeys(self._go_on())
                if begun := self._admitted():
                    over |= self._begin(begun)
        except Exception as error:
            over = {pen: over.get(pen, error) for pen in self._open}
            self._waiting.clear()
            self._pens, self._cache, self._batch = [], None, None
        for pen in over:
            del self._open[pen]
        return over

    def _go_on(self) -> list[Pen]:
        ids_S1 = torch.tensor([[pen.last] for pen in self._pens], device=self._model.device)
        self._mask_ST = pad(self._mask_ST, (0, 1), value=1)
        over = _taken(self._pens, self._pass(ids_S1, self._mask_ST, self._cache, self._batch))
        self._keep([place for place, pen in enumerate(self._pens) if pen not in over])
        return over

    def _begin(self, pens: list[Pen]) -> dict[Pen, Exception | None]:
        try:
            ids_ST, mask_ST = left_padded([pen.prompt for pen in pens], self._pad_id, self._model.device)
            batch = self._writer.together([pen.task for pen in pens], None)
            cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
            over = _taken(pens, self._pass(ids_ST, mask_ST, cache, batch))
        except Exception as error:
            return dict.fromkeys(pens, error)
        if self._pens:
            width = max(mask_ST.shape[1], self._mask_ST.shape[1])
            both = [pad(mask_ST, (width - mask_ST.shape[1], 0)) for mask_ST in (self._mask_ST, mask_ST)]
            self._mask_ST, self._pens = torch.cat(both), [*self._pens, *pens]
            _join(self._cache, cache)
            self._batch = self._writer.together([pen.task for pen in self._pens], self._batch)
        else:
            self._pens, self._mask_ST, self._cache, self._batch = pens, mask_ST, cache, batch
        self._keep([place for place, pen in enumerate(self._pens) if pen not in over])
        return dict.fromkeys(over)

    def _admitted(self) -> list[Pen]:
        """Those of the waiting rows that there is room for, in their order."""
        if self._pens and not self._is_joined:
            return []
        rows, longest, found = len(self._pens), max((pen.longest for pen in self._pens), default=0), list[Pen]()
        while self._waiting and rows < self._rows_max:
            longest = max(longest, self._waiting[0].longest)
            if rows and (rows + 1) * longest > TOKENS_PER_BATCH:
                break
            found.append(self._waiting.popleft())
            rows += 1
        return found

    @property
    def _is_joined(self) -> bool:
        """Whether rows may be joined to those that are written. Chunks of attention begin at columns, not at tokens."""
        config = self._model.config.get_text_config(decoder=True)
        return getattr(config, "attention_chunk_size", None) is None and all(
            type(layer) in JOINED for layer in self._cache.layers
        )

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

    def _keep(self, places: Sequence[int]) -> None:
        """Let the other rows go, and the columns that none of those that stay needs."""
        if len(places) == len(self._pens):
            return
        self._pens = [self._pens[place] for place in places]
        if not self._pens:
            self._cache = self._batch = None
            return
        places_S = torch.tensor(places, device=self._mask_ST.device)
        self._cache.reorder_cache(places_S)
        self._mask_ST = self._mask_ST[places_S]
        if self._is_joined:
            length = int(self._mask_ST.sum(dim=1).max())
            self._mask_ST = self._mask_ST[:, -length:]
            _shorten(self._cache, length)
        self._batch = self._writer.together([pen.task for pen in self._pens], self._batch)


def _taken(pens: Sequence[Pen], logits_SV: Tensor) -> list[Pen]:
    """Give each row its next token; returns those that end with it."""
    for pen, logits_V in zip(pens, logits_SV, strict=True):
        pen.draw(logits_V)
    return [pen for pen, token in zip(pens, logits_SV.argmax(dim=-1).tolist(), strict=True) if pen.take(token)]


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
