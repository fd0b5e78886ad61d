"""How a base model's tokenizer writes a chat as one text: one renderer for training, scoring and admission.

A template may refuse a chat (two turns of one role, a system message). Admission renders every row, so that a person
reads file and row of a refusal before anything is trained. For that the control plane needs only the template and the
tokenizer's special tokens, which a worker sends it: neither tokenizer nor weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import InvalidInput
from workers.rows.task_data import CompletionRow, Row, Turn

ROLES_SHOWN = 12
"""Number of a chat's roles that an error message shows."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may name."""

    text: str
    """Source of the template, in Jinja; run by transformers in its sandbox."""
    marks: Mapping[str, str]
    """The tokenizer's special tokens by name: bos_token, eos_token, …"""

    def render(self, turns: Sequence[Turn]) -> tuple[str, str]:
        """The text before the last answer, and the answer with the special tokens at its end.

        Raises:
            InvalidInput: The template refuses the chat.

        Cost:
            About ten microseconds for each turn.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            given, whole = self._written(messages[:-1], True), self._written(messages, False)
        except Exception as error:  # a template is a program, and may fail in any way, by recursion too
            raise _misfit(str(error) or type(error).__name__, turns) from error
        # Some templates do not refuse what they have no place for: it would be missing, and nobody would be told.
        if unplaced := [role for role, content in turns if role == "system" and content.strip() not in whole]:
            raise _misfit(f"it leaves out the {unplaced[0]} message", turns)
        # A template may render a chat differently once it has the answer: then that is learnt as the row has it.
        answer = whole[len(given) :] if whole.startswith(given) else turns[-1][1]
        if not answer.strip():
            raise _misfit("it leaves out the last answer", turns)
        return given, answer

    def complaint(self, row: Row) -> str:
        """Why the template refuses a row; empty where it takes it, or where the row is no chat."""
        if not isinstance(row, CompletionRow) or not row.is_chat:
            return ""
        try:
            self.render(row.turns)
        except InvalidInput as error:
            return error.what
        return ""

    def _written(self, messages: list[dict[str, str]], is_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), _ = render_jinja_template(
            [messages], chat_template=self.text, add_generation_prompt=is_prompt, **self.marks
        )
        return str(text)


def _misfit(why: str, turns: Sequence[Turn]) -> InvalidInput:
    roles = [role for role, _ in turns[:ROLES_SHOWN]] + ["…"] * (len(turns) > ROLES_SHOWN)
    return InvalidInput(
        f"the messages do not fit the chat template of the base model's tokenizer: {why}; their roles are "
        f"{', '.join(roles)}",
        "data.messages_column",
        "write the messages as the template wants them, or drop the row",
    )


def template_of(tokenizer: Any) -> ChatTemplate | None:
    """The template of a transformers tokenizer; None where it has none, or several and none of them is the default."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    except ValueError:
        return None
