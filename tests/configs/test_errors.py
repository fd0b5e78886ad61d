"""Errors cross processes by pickle and HTTP as dictionaries: they arrive as what they were."""

from __future__ import annotations

import pickle

import pytest

from configs.errors import LEAVES, OnebasisError, error_from_dict

every_leaf = pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)


@every_leaf
def test_a_pickled_error_is_the_same_leaf_with_the_same_facts(leaf: type[OnebasisError]) -> None:
    again = pickle.loads(pickle.dumps(leaf("what", "where", "todo")))
    assert type(again) is leaf
    assert again.args == (again.what, again.where, again.todo) == ("what", "where", "todo")
    assert str(again) == "where: what\n  → todo"


@every_leaf
def test_an_error_sent_as_a_dictionary_is_the_same_leaf_with_the_same_text(leaf: type[OnebasisError]) -> None:
    error = leaf("what", "where", "todo")
    assert error.as_dict() == {"kind": leaf.kind, "what": "what", "where": "where", "todo": "todo"}
    again = error_from_dict(error.as_dict())
    assert type(again) is leaf
    assert str(again) == str(error)


def test_every_leaf_can_be_told_from_the_others_by_kind_and_exit_code() -> None:
    assert len({leaf.kind for leaf in LEAVES}) == len(LEAVES)
    assert sorted(leaf.exit_code for leaf in LEAVES) == [2, 3, 4, 5, 6, 7]


def test_an_error_of_a_newer_service_is_still_an_error_with_its_text() -> None:
    again = error_from_dict({"kind": "never-heard-of", "what": "something", "where": "there"})
    assert type(again) is OnebasisError
    assert str(again) == "there: something"


def test_empty_facts_leave_no_trace_in_the_text() -> None:
    assert str(LEAVES[0]("what")) == "what"
    assert str(LEAVES[0]("what", todo="do this")) == "what\n  → do this"


def test_the_drawing_in_the_docstring_names_every_leaf() -> None:
    import configs.errors

    assert all(f"── {leaf.__name__}" in str(configs.errors.__doc__) for leaf in LEAVES)
