"""What a language model writes for one row: with its own length, temperature and ends.

Axes: V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.serving.question import Ended, Wanted, Writing, always

UNFINISHED = "\ufffd"
"""What a tokenizer gives for a token that is the beginning of a character."""


class Pen:
    """One row while it is written.

    Args:
        prompt: Token ids.
        limit: Most tokens of the answer.
        done: Is to be called when it is written no further, with what went wrong or None.
        task: Whatever tells the model whose row it is.
        wrote: Takes every further piece of the text, as soon as it is certain.
        wanted: Whether anybody still wants the text.
        where: What errors name.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        writing: Writing,
        limit: int,
        done: Callable[[Exception | None], None] = lambda error: None,
        task: Any = None,
        wrote: Callable[[str], None] | None = None,
        wanted: Wanted = always,
        where: str = "",
    ) -> None:
        self.ids: list[int] = []
        """Tokens written, without the one that ends the text."""
        self.text = ""
        """The answer so far: at its end as the tokenizer decodes all of it at once."""
        self.ended: Ended = ""
        self.prompt, self.writing, self.limit = prompt, writing, limit
        self.done, self.task, self.where = done, task, where
        self._tokenizer, self._wrote, self._wanted = tokenizer, wrote, wanted
        self._source = _source(writing.seed) if writing.temperature > 0 else None
        self._held = max(map(len, writing.stop), default=1) - 1
        """Characters at the end that may become the beginning of a stop text."""
        self._is_cut = False
        self._said = 0
        self._from = self._to = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt) + self.limit

    @property
    def last(self) -> int:
        """The token that was written last."""
        return self.ids[-1]

    def draw(self, logits_V: Tensor) -> None:
        """Of a row with a temperature, add to the logits what makes the largest of them a draw from their distribution
        (Gumbel noise). Others are left as they are."""
        if self._source is None:
            return
        scaled_V = (logits_V - logits_V.max()) / self.writing.temperature  # no temperature is too low
        if self.writing.top_p < 1:
            scaled_V = _likeliest(scaled_V, self.writing.top_p)
        uniform_V = torch.rand(len(scaled_V), generator=self._source).clamp_(1e-20, 1 - 1e-7)
        logits_V.copy_(scaled_V - uniform_V.to(scaled_V.device).log().neg().log())

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
        self._say()
        return bool(self.ended) or not self._wanted()

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

    def _say(self) -> None:
        """Hand on what is certain."""
        certain = len(self.text) if self.ended else max(self._said, len(self.text) - self._held)
        piece, self._said = self.text[self._said : certain], certain
        if self._wrote is not None and piece:
            self._wrote(piece)


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
