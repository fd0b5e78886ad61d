"""Requests as OpenAI's clients send them: what is read, what is refused by its name, what replies look like."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from configs.errors import InvalidInput
from orchestrator.serving.openai_records import ChatRequest, CompletionRequest, Reply, read
from workers.serving.question import Answer, Writing

CHAT = {"model": "support/replies", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "support/replies", "prompt": "hi"}
ANSWER = Answer("t1", 7, text="hello", tokens=2, prompt_tokens=3, ended="length")


def chat(**changes: Any) -> ChatRequest:
    return read(ChatRequest, json.dumps(CHAT | changes).encode())  # type: ignore[no-any-return]


def test_a_chat_is_a_question_and_greedy_unless_it_says_otherwise() -> None:
    asked = chat()
    assert asked.question.task == "support/replies"
    assert asked.question.inputs == {"messages": CHAT["messages"]}
    assert (asked.question.is_chat, asked.question.writing) == (True, Writing())
    hot = chat(temperature=0.7, top_p=0.9, seed=3, stop=["\n", ""], max_tokens=5, max_completion_tokens=9)
    assert hot.question.writing == Writing(new_tokens=9, temperature=0.7, top_p=0.9, seed=3, stop=("\n",))
    assert chat(stop="END").question.writing.stop == ("END",)


def test_prompts_are_questions() -> None:
    one: CompletionRequest = read(CompletionRequest, json.dumps(PROMPT).encode())
    two: CompletionRequest = read(
        CompletionRequest, json.dumps(PROMPT | {"prompt": ["a", "b"], "max_tokens": 4}).encode()
    )
    assert [question.inputs for question in (*one.questions, *two.questions)] == [
        {"prompt": p} for p in ("hi", "a", "b")
    ]
    assert {question.is_chat for question in two.questions} == {False}
    assert two.questions[0].writing.new_tokens == 4


def test_parts_of_text_are_joined_and_a_picture_is_not_read_as_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).question.inputs == {
        "messages": [{"role": "user", "content": "ab"}]
    }
    picture = [{"type": "image_url", "image_url": {"url": "data:"}}]
    (message,) = chat(messages=[{"role": "user", "content": picture}]).question.inputs["messages"]  # type: ignore[index]
    assert message["content"] == picture  # which the task then refuses: it is no string


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "ann"},
        {"n": 1},
        {"tools": []},
        {"logprobs": False},
        {"frequency_penalty": 0.0},
        {"response_format": {"type": "text"}},
        {"stop": None},
    ],
)
def test_what_asks_for_nothing_is_taken(changes: dict[str, Any]) -> None:
    assert chat(**changes).question == chat().question


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"n": True}, "n"),
        ({"a_later_field": 1}, "a_later_field"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
    ],
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused_by_its_name(
    changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        chat(**changes)
    assert refused.value.where == where


def test_a_chat_that_ends_with_the_assistant_asks_nothing() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "hello"}]
    with pytest.raises(InvalidInput, match="the last message is the assistant's"):
        _ = chat(messages=messages).question


@pytest.mark.parametrize("key", ["tool_calls", "name", "function_call", "audio"])
def test_what_of_a_message_is_not_read_is_refused_by_its_name(key: str) -> None:
    messages = [{"role": "user", "content": "hi", key: ["x"]}]
    with pytest.raises(InvalidInput, match=f"message 1 has '{key}', which is not read"):
        _ = chat(messages=messages).question
    assert chat(messages=[{"role": "user", "content": "hi", key: None}]).question == chat().question


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Invalid JSON"):
        read(ChatRequest, b"{")


def test_replies_have_openais_form_and_name_the_version() -> None:
    whole = Reply(True, "support/replies").whole([ANSWER])
    assert whole["object"] == "chat.completion"
    assert whole["system_fingerprint"] == "version 7"
    assert whole["choices"] == [
        {
            "index": 0,
            "finish_reason": "length",
            "logprobs": None,
            "message": {"role": "assistant", "content": "hello"},
        }
    ]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    text = Reply(False, "support/replies").whole([ANSWER, ANSWER])
    assert [(choice["index"], choice["text"]) for choice in text["choices"]] == [(0, "hello"), (1, "hello")]
    assert text["usage"]["total_tokens"] == 10


def test_pieces_of_one_stream_have_one_id() -> None:
    reply = Reply(True, "support/replies")
    pieces = [reply.piece("he", None, True), reply.piece("llo", None, False), reply.last(ANSWER), reply.used(ANSWER)]
    assert len({piece["id"] for piece in pieces}) == 1
    assert [piece["choices"][0]["delta"] for piece in pieces[:3]] == [
        {"role": "assistant", "content": "he"},
        {"content": "llo"},
        {},
    ]
    assert pieces[2]["choices"][0]["finish_reason"] == "length"
    assert (pieces[3]["choices"], pieces[3]["usage"]["total_tokens"]) == ([], 5)


def test_what_of_a_prompt_was_not_read_is_told_in_the_choice() -> None:
    reply, cut = Reply(True, "support/replies"), replace(ANSWER, warning="its last 16 tokens are read")
    for told in (reply.whole([ANSWER, cut]), reply.whole([cut]), reply.last(cut)):
        assert told["choices"][-1]["warning"] == cut.warning
    for told in (reply.whole([cut, ANSWER]), reply.last(ANSWER)):
        assert "warning" not in told["choices"][-1]
