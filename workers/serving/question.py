"""What is asked of tasks, and what they answer: records that travel between processes, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Ended = Literal["", "stop", "length"]


@dataclass(frozen=True)
class Writing:
    """How a row is to be written. The default is what scores are measured with: always the likeliest token."""

    new_tokens: int | None = None
    """Most tokens of the answer; None: the task's own data.max_new_tokens."""
    temperature: float = 0.0
    """0: the likeliest token. Else tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set that has this probability."""
    seed: int | None = None
    """The same seed draws the same answer on the same machine, whoever else is in the batch; None: a new one."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends; they are not part of it."""


GREEDY = Writing()
Wanted = Callable[[], bool]


def always() -> bool:
    return True


@dataclass(frozen=True)
class Piece:
    """A part of a text that is being written."""

    text: str
    version: int
    """The version that writes it."""


AUTO = "auto"
"""In the place of a task: whichever the text is for."""


@dataclass(frozen=True)
class Question:
    """One row for one task."""

    task: str
    """`team/task`, or the task's id."""
    inputs: Mapping[str, Any] | str
    """Values by their canonical names (`text`, `text_pair`, `prompt`, `messages`, `image` as base64 or bytes); a text
    alone where the task reads one text, a chat's first message among them."""
    version: int | None = None
    """Version that is to answer; None: the one that `main` names."""
    among: tuple[str, ...] | None = None
    """With `AUTO` in the place of the task: names of the tasks of which one is to answer; None: any."""
    by: str = ""
    """How that one is found, `features` or `energy`; empty: by features where there are any."""
    key: str = ""
    """Key by which a request is the canary's or is not; all rows of a request have the same. Empty: it never is."""
    request: int = 0
    """Number of the request that it is a row of: one version answers all of a request."""
    is_chat: bool | None = None
    """Whether the task must have learnt from chats, or must not have; None: either."""
    writing: Writing = GREEDY
    wrote: Callable[[Piece], None] | None = field(default=None, compare=False)
    """As in `Asked`."""
    wanted: Wanted = field(default=always, compare=False)
    """As in `Asked`."""


@dataclass(frozen=True)
class Answer:
    """What a task says of one row."""

    task_id: str
    version: int
    """The version that answered."""
    label: str | None = None
    """The likeliest label, of a classification."""
    probabilities: Mapping[str, float] | None = None
    """Of all labels, in the task's order."""
    value: float | None = None
    """Of a regression."""
    values: Mapping[str, float] | None = None
    """Of a regression of several numbers, by their names, in the task's order."""
    text: str | None = None
    """Of a language model."""
    tokens: int = 0
    """Tokens that it wrote."""
    prompt_tokens: int = 0
    """Tokens of the prompt that it read."""
    ended: Ended = ""
    """Whether it came to its end (`stop`) or to its longest answer (`length`); empty where nobody wanted more."""
    routed: Mapping[str, float] | None = None
    """Of a row that was asked of no task by name: the likeliest tasks and their scores; the first of them answered."""
    routed_by: str = ""
    """How they were found: `features` or `energy`."""
    warning: str = ""
    """What of the row was not read."""
