"""A chat is rendered as the tokenizer itself would, and what its template refuses is found without the tokenizer."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from configs.errors import InvalidInput
from tests.workers.tiny_bases import talking_tokenizer
from workers.chat_template import ChatTemplate, template_of
from workers.rows.task_data import CompletionRow, TextRow, Turn

TURNS: tuple[Turn, ...] = (("user", "grass?"), ("assistant", "green"), ("user", "France?"), ("assistant", "Paris."))
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '[' + message.role + ']' + message.content | trim + eos_token }}{% endfor %}"
)
BROKEN = "{% for message in messages %}{{ message.content + 1 }}{% endfor %}"
ENDLESS = "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}"
DEAF = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
WITHOUT_SYSTEM = "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"


def template(text: str) -> ChatTemplate:
    tokenizer = talking_tokenizer()
    tokenizer.chat_template = text
    found = template_of(tokenizer)
    assert found is not None
    return pickle.loads(pickle.dumps(found))  # as a worker hands it over  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", [None, ALTERNATING])
def test_it_renders_as_the_tokenizer_does(text: str | None) -> None:
    tokenizer: Any = talking_tokenizer(chat=True)
    tokenizer.chat_template = text or tokenizer.chat_template
    found = template_of(tokenizer)
    assert found is not None
    messages = [{"role": role, "content": content} for role, content in TURNS]
    given, answer = found.render(TURNS)
    assert given == tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert given + answer == whole
    assert "Paris." in answer


@pytest.mark.parametrize(
    ("text", "turns", "said"),
    [
        (
            ALTERNATING,
            TURNS[:2] + TURNS[1:],
            "roles must alternate user/assistant; their roles are user, assistant, as",
        ),
        (ALTERNATING, (("system", "be brief"), *TURNS), "their roles are system, user, assistant, user, assistant"),
        (ALTERNATING, (("system", "x"), *TURNS * 5), "user, assistant, user, …"),
        (BROKEN, TURNS, "do not fit the chat template"),  # a template's own mistake is no crash of ours
        (ENDLESS, TURNS, "maximum recursion depth exceeded"),
        (DEAF, TURNS, "it leaves out the last answer"),
        (WITHOUT_SYSTEM, (("system", "be brief"), *TURNS), "it leaves out the system message; their roles are system,"),
    ],
)
def test_what_the_template_refuses_is_said(text: str, turns: tuple[Turn, ...], said: str) -> None:
    found = template(text)
    assert said in found.complaint(CompletionRow(turns, is_chat=True))
    with pytest.raises(InvalidInput, match="do not fit the chat template"):
        found.render(turns)


def test_what_it_takes_and_what_is_no_chat_is_not_complained_of() -> None:
    found = template(ALTERNATING)
    assert found.complaint(CompletionRow(TURNS, is_chat=True)) == ""
    assert found.complaint(CompletionRow(TURNS[1:], is_chat=False)) == ""
    assert found.complaint(TextRow("x", None, 0)) == ""


def test_a_tokenizer_without_a_template_or_with_several_has_none() -> None:
    tokenizer: Any = talking_tokenizer()
    assert template_of(tokenizer) is None
    tokenizer.chat_template = {"rag": ALTERNATING, "tool_use": ALTERNATING}
    assert template_of(tokenizer) is None
    tokenizer.chat_template = {"default": ALTERNATING, "tool_use": BROKEN}
    assert template_of(tokenizer) == template(ALTERNATING)
    assert template_of(None) is None
