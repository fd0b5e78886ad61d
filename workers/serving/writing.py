"""What language models write for several rows at once: each row with its own length, temperature and ends.

Axes: S rows of a batch, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.evaluation import written
from workers.serving.question import Ended, Writing

UNFINISHED = "\ufffd"
"""What a tokenizer gives for a token that is the beginning of a character."""


class Pen:
    """One row while it is written.

    Args:
        limit: Most tokens of the answer.
        wrote: Takes every further piece of the text, as soon as it is certain. Returns False when nobody wants more.
    """

    def __init__(
        self, tokenizer: Any, writing: Writing, limit: int, wrote: Callable[[str], bool] | None = None
    ) -> None:
        self.ids: list[int] = []
        """Tokens written, without the one that ends the text."""
        self.text = ""
        """The answer so far: at its end as the tokenizer decodes all of it at once."""
        self.ended: Ended = ""
        self.writing, self.limit = writing, limit
        self._tokenizer, self._wrote = tokenizer, wrote
        self._held = max(map(len, writing.stop), default=1) - 1
        """Characters at the end that may become the beginning of a stop text."""
        self._is_cut = False
        self._said = 0
        self._from = self._to = 0

    def take(self, token: int) -> bool:
        """Take the next token; returns whether the row is to be written no further."""
        if token == self._tokenizer.eos_token_id:
            self.ended = "stop"
        else:
            self.ids.append(token)
            self._read()
            if not self.ended and len(self.ids) >= self.limit:
                self.ended = "length"
        if self.ended and not self._is_cut:
            self.text = self._decoded(0, len(self.ids))
        return not self._say() or bool(self.ended)

    def _read(self) -> None:
        """Decode the tokens since the last whole character, after those before it: some tokenizers put a space between
        two tokens and none before the first."""
        if not (self.writing.stop or self._wrote):
            return
        before, after = self._decoded(self._from, self._to), self._decoded(self._from, len(self.ids))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return
        self.text += after[len(before) :]
        self._from, self._to = self._to, len(self.ids)
        if stops := [place for text in self.writing.stop if (place := self.text.find(text)) >= 0]:
            self.text = self.text[: min(stops)]
            self._is_cut, self.ended = True, "stop"

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _say(self) -> bool:
        """Hand on what is certain; returns whether more is wanted."""
        certain = len(self.text) if self.ended else max(self._said, len(self.text) - self._held)
        piece, self._said = self.text[self._said : certain], certain
        return self._wrote is None or self._wrote(piece)


class Draw:
    """Chooses tokens: adds to the logits of rows with a temperature what makes the largest of them a draw from their
    distribution (Gumbel noise). Rows without one are left as they are."""

    def __init__(self, writings: Sequence[Writing]) -> None:
        self._rows = [(place, writing, _source(writing.seed)) for place, writing in enumerate(writings)]

    def __call__(self, _: Tensor, logits_SV: Tensor) -> Tensor:
        for place, writing, source in self._rows:
            if writing.temperature > 0:
                logits_V = logits_SV[place].float() / writing.temperature
                if writing.top_p < 1:
                    logits_V = _likeliest(logits_V, writing.top_p)
                uniform_V = torch.rand(len(logits_V), generator=source).clamp_(1e-20, 1 - 1e-7)
                logits_SV[place] = logits_V - uniform_V.to(logits_V.device).log().neg().log()
        return logits_SV


def _source(seed: int | None) -> torch.Generator:
    source = torch.Generator()
    if seed is None:
        source.seed()
    else:
        source.manual_seed(seed)
    return source


def _likeliest(logits_V: Tensor, top_p: float) -> Tensor:
    """Only the smallest set of words that has this probability, at least one; the others at -inf."""
    ordered_V, order_V = logits_V.softmax(dim=-1).sort(descending=True)
    before_V = ordered_V.cumsum(dim=-1) - ordered_V
    return logits_V.index_fill(0, order_V[before_V >= top_p], float("-inf"))


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    pens: Sequence[Pen],
    between_tokens: Callable[[], None] = lambda: None,
) -> None:
    """Write all rows, in one batch, each until it has ended.

    Args:
        prompts: Token ids of each row's prompt.
        between_tokens: Called before every token; may raise to stop.
    """
    over = [False] * len(pens)

    def ends(ids_ST: Tensor) -> Tensor:
        for place, token in enumerate(ids_ST[:, -1].tolist()):
            over[place] = over[place] or pens[place].take(token)
        return torch.tensor(over, device=ids_ST.device)

    draws = any(pen.writing.temperature > 0 for pen in pens)
    choose = [Draw([pen.writing for pen in pens])] if draws else []
    written(model, tokenizer, prompts, max(pen.limit for pen in pens), between_tokens, ends, choose)
