"""The requests of OpenAI's API that a task can answer, and their replies.

What would change an answer and is not known here is refused, never ignored.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import InvalidInput
from workers.serving.question import Answer, Question, Writing

WITHOUT_EFFECT = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields that say nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}
"""Fields that are known, and the values at which they ask for nothing."""

READ_OF_MESSAGE = ("role", "content")


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(frozen=True, extra="allow")
    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    """Default: 0, the likeliest token, by which scores are measured."""
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | tuple[str, ...] | None = None
    user: str | None = None
    """Key of the request, as the header `x-onebasis-key`: whose requests are to be answered by one version."""
    stream: bool | None = None
    stream_options: _Options | None = None

    @property
    def writing(self) -> Writing:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return Writing(
            new_tokens=self.longest,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(filter(None, stop)),
        )

    @property
    def longest(self) -> int | None:
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether the end of a stream is to tell the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def question(self) -> Question:
        for number, message in enumerate(self.messages, start=1):
            if others := [key for key in message if key not in READ_OF_MESSAGE and message[key] not in (None, "", [])]:
                what = f"message {number} has {others[0]!r:.100}, which is not read"
                raise InvalidInput(what, "messages", "write what the task is to know into content")
        messages = [{"role": message.get("role"), "content": _text(message)} for message in self.messages]
        if messages[-1]["role"] == "assistant":
            raise InvalidInput("the last message is the assistant's", "messages", "end with the message to be answered")
        return Question(self.model, {"messages": messages}, is_chat=True, writing=self.writing)


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | tuple[str, ...]
    suffix: Literal[None] = None

    @property
    def questions(self) -> list[Question]:
        prompts = (self.prompt,) if isinstance(self.prompt, str) else self.prompt
        return [Question(self.model, {"prompt": text}, is_chat=False, writing=self.writing) for text in prompts]


def read(record: type[_Asked], body: bytes) -> Any:
    """A request of this kind.

    Raises:
        InvalidInput: It is none, or asks for something that no task here can do.
    """
    try:
        asked = record.model_validate_json(body)
    except ValidationError as error:
        raise misread(error) from None
    for name, value in (asked.model_extra or {}).items():
        if value is None or name in WITHOUT_EFFECT or any(_is_same(value, one) for one in NEUTRAL.get(name, ())):
            continue
        raise InvalidInput(f"{name!r:.100} is not supported", name, "leave it out; docs/serving.md lists what is read")
    return asked


def _is_same(value: Any, neutral: Any) -> bool:
    """Whether a value is one that asks for nothing: to Python False is 0, which asks completions for a probability."""
    return isinstance(value, bool) is isinstance(neutral, bool) and bool(value == neutral)


def misread(error: ValidationError) -> InvalidInput:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False)[0]
    return InvalidInput(first["msg"], ".".join(map(str, first["loc"])) or "body", "see docs/serving.md")


def _text(message: dict[str, Any]) -> Any:
    """The content of a message; parts of text are joined."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


def usage(answers: list[Answer]) -> dict[str, int]:
    """Tokens that were read and written."""
    read_, wrote = sum(answer.prompt_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read_, "completion_tokens": wrote, "total_tokens": read_ + wrote}


def _warned(answer: Answer) -> dict[str, str]:
    """What of the prompt was not read: a field of ours, which OpenAI's clients hand on."""
    return {"warning": answer.warning} if answer.warning else {}


class Reply:
    """The frame of one reply.

    Args:
        is_chat: Whether it is one of chat completions.
        model: As it was asked for.
    """

    def __init__(self, is_chat: bool, model: str) -> None:
        self._is_chat, self._model, self._at = is_chat, model, int(time.time())
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The answer at once."""
        choices: list[dict[str, Any]] = [
            {"index": index, "finish_reason": answer.ended or "stop", "logprobs": None}
            | ({"message": {"role": "assistant", "content": answer.text}} if self._is_chat else {"text": answer.text})
            | _warned(answer)
            for index, answer in enumerate(answers)
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._frame(kind, choices, answers[0].version) | {"usage": usage(answers)}

    def piece(self, text: str, version: int, is_first: bool) -> dict[str, Any]:
        """A part of a stream."""
        return self._chunk(
            {"role": "assistant", "content": text} if is_first else {"content": text}, text, None, version
        )

    def last(self, answer: Answer) -> dict[str, Any]:
        """The end of a stream: why it ends."""
        chunk = self._chunk({}, "", answer.ended or "stop", answer.version)
        chunk["choices"][0] |= _warned(answer)
        return chunk

    def used(self, answer: Answer) -> dict[str, Any]:
        """After the end, where it was asked for: the number of tokens."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._frame(kind, [], answer.version) | {"usage": usage([answer])}

    def _chunk(self, delta: dict[str, Any], text: str, ended: str | None, version: int) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": text}
        choices = [{"index": 0, "finish_reason": ended, "logprobs": None} | said]
        return self._frame("chat.completion.chunk" if self._is_chat else "text_completion", choices, version)

    def _frame(self, kind: str, choices: list[dict[str, Any]], version: int) -> dict[str, Any]:
        named = {"system_fingerprint": f"version {version}"}
        return {"id": self._id, "object": kind, "created": self._at, "model": self._model, "choices": choices} | named
