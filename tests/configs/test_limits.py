"""What no document may hold, whoever made it; and how odd characters are shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs.errors import InvalidInput
from configs.limits import DEPTH_MAX, KEYS_MAX, TEXT_MAX, VALUES_MAX, check_values, key_path, short
from configs.plain_text import escaped, odd_character


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"a": {"b": 10**400}}, "a.b: is a number of more than 19 digits"),
        ({"a": -(2**63) - 1}, "a: is a number of more than 19 digits"),
        ({"a": float("inf")}, "a: is no finite number: inf"),
        ({"a": [1, "\ud800"]}, r"a.1: must be one line of plain text, and holds \\ud800"),
        ({"a\x1b[2J": 1}, r"a\\x1b\[2J: the key must be one line of plain text"),
        ({"a": "x" * (TEXT_MAX + 1)}, "a: has 4,097 characters, more than 4,096"),
        ({"x" * (TEXT_MAX + 1): 1}, "the key has 4,097 characters"),
        ({str(n): 1 for n in range(KEYS_MAX + 1)}, "has 10,001 keys"),
        ([0] * (VALUES_MAX + 1), "has more than 250,000 values"),
        (nested(DEPTH_MAX + 1), "has more than 64 lists or mappings in each other"),
        (nested(10_000), "has more than 64 lists or mappings in each other"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_no_document_may_hold_is_refused_by_its_path(values: Any, what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        check_values(values, "here")


def test_what_people_write_is_taken() -> None:
    check_values({"a": ["größe", "日本語", "‏עברית‏", "👩‍👩‍👧", 2**63 - 1, -1.5, None, True, nested(50)]}, "here")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@given(ANY)
@example({"\t": None})
def test_whatever_comes_is_taken_or_refused_in_plain_words(values: Any) -> None:
    told = ""
    try:
        check_values(values, "here")
    except InvalidInput as error:
        told = str(error)
    assert odd_character(told.replace("\n", "")) is None
    assert len(told) < 1000
    assert len(short(values)) <= 120
    assert odd_character(short(values)) is None


@given(st.text(st.characters(codec=None)))
def test_text_that_is_shown_holds_no_odd_character_and_plain_text_stays(text: str) -> None:
    assert odd_character(escaped(text).replace("\n", "").replace("\t", "")) is None
    if odd_character(text) is None:
        assert escaped(text) == text


def test_odd_characters_are_shown_as_escapes() -> None:
    assert escaped("a\x1b]0;title\x07b\r\n\tc\udc80\u202e\x9b") == "a\\x1b]0;title\\x07b\\r\n\tc\\udc80\\u202e\\x9b"


def test_a_path_of_keys_is_short_and_plain() -> None:
    assert key_path(()) == "(document)"
    assert len(key_path(("\x1b" * 5000, 3) * 50)) <= 200
