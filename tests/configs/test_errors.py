"""Errors cross processes by pickle and HTTP as dictionaries: they arrive as what they were."""

from __future__ import annotations

import json
import pickle

import pytest

from configs.errors import LEAVES, Conflict, OnebasisError, error_from_dict

every_leaf = pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)


def made(leaf: type[OnebasisError]) -> OnebasisError:
    """One with a value for each of its facts."""
    return leaf("what", "where", "todo", *((name, "another") for name in leaf.facts))


@every_leaf
def test_a_pickled_error_is_the_same_leaf_with_the_same_facts(leaf: type[OnebasisError]) -> None:
    again = pickle.loads(pickle.dumps(made(leaf)))
    assert type(again) is leaf
    assert again.args[:3] == (again.what, again.where, again.todo) == ("what", "where", "todo")
    assert vars(again) == vars(made(leaf))
    assert str(again) == "where: what\n  → todo"


@every_leaf
def test_an_error_sent_as_json_is_the_same_leaf_with_the_same_facts(leaf: type[OnebasisError]) -> None:
    error = made(leaf)
    sent = json.loads(json.dumps(error.as_dict()))
    assert {"kind": leaf.kind, "what": "what", "where": "where", "todo": "todo"}.items() <= sent.items()
    again = error_from_dict(sent)
    assert type(again) is leaf
    assert vars(again) == vars(error)


def test_every_kind_has_an_exit_code_and_every_class_a_code_of_its_own() -> None:
    assert len({leaf.code or leaf.kind for leaf in LEAVES}) == len(LEAVES)
    codes = {leaf.kind: leaf.exit_code for leaf in LEAVES}
    assert sorted(codes.values()) == [2, 3, 4, 5, 6, 7]
    assert all(codes[leaf.kind] == leaf.exit_code for leaf in LEAVES)


def test_every_class_arrives_as_itself() -> None:
    def below(kind: type[OnebasisError]) -> set[type[OnebasisError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {one for one in below(OnebasisError) if one.__module__ == OnebasisError.__module__}
    assert ours - {OnebasisError} == set(LEAVES)


def test_a_class_that_an_older_client_does_not_know_is_its_kind() -> None:
    again = error_from_dict({"kind": "conflict", "code": "of-a-newer-release", "what": "something", "detail": 3})
    assert type(again) is Conflict


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
