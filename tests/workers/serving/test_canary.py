"""A share of the requests is another version's: the same ones always, and what both say of them is compared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from configs.settings import CanarySettings
from tests.workers.serving.sites import TEXTS, Site, site
from tests.workers.serving.test_replica import publish, replica, said, title
from workers.base_model import BaseModel
from workers.serving.batcher import Batcher, Said
from workers.serving.canary import Comparison, agree, is_in, summed
from workers.serving.question import Answer, Question, Writing
from workers.serving.replica import Replica

KEYS = [f"caller-{n}" for n in range(400)]


def test_a_share_is_always_the_same_callers_and_a_larger_one_keeps_them() -> None:
    small, large = ({key for key in KEYS if is_in(key, share)} for share in (0.05, 0.5))
    assert 8 <= len(small) <= 36  # 20 of 400, four standard deviations
    assert 160 <= len(large) <= 240
    assert small < large
    assert not any(is_in(key, 0.0) for key in KEYS)
    assert all(is_in(key, 1.0) for key in KEYS)


def test_what_agrees() -> None:
    def answer(**said: object) -> Answer:
        return Answer("t", 1, **said)  # type: ignore[arg-type]

    assert agree(answer(label="a", probabilities={"a": 0.9}), answer(label="a", probabilities={"a": 0.6}))
    assert not agree(answer(label="a"), answer(label="b"))
    assert not agree(answer(text="yes"), answer(text="yes."))
    assert agree(answer(value=100.0), answer(value=100.9))
    assert not agree(answer(value=0.5), answer(value=0.52))
    assert agree(answer(values={"x": 1.0, "y": 100.0}), answer(values={"x": 1.0, "y": 100.9}))
    assert not agree(answer(values={"x": 0.5, "y": 100.0}), answer(values={"x": 0.52, "y": 100.0}))
    assert not agree(answer(values={"x": 0.5}), answer(values={"x": 0.5, "y": 0.5}))


def test_several_replicas_are_summed_and_one_that_compares_an_older_pair_is_left_out() -> None:
    replicas = [Comparison(3, 4), Comparison(3, 4), Comparison(2, 3)]
    for number, one in enumerate(replicas):
        one.took(one.versions[1], 0.1 * (number + 1), ["team/a", "team/a"])  # two rows of one request
        one.took(one.versions[0], 0.5, ["team/a"])
        one.both("team/a", Answer("t", 3, label="x"), Answer("t", 4, label="xy"[number % 2]))
    replicas[0].failed()
    found = summed([{"canary": one.as_dict()} for one in replicas] + [{"canary": None}])
    assert found is not None
    assert (found["main_version"], found["version"], found["failed"]) == (3, 4, 1)
    assert found["tasks"] == {"team/a": {"requests": 2, "rows": 2, "agreed": 1}}
    assert found["canary"] == {"requests": 2, "p50_seconds": 0.2, "p99_seconds": 0.2}  # the slower replica's
    assert summed([{"canary": None}]) is None


@pytest.fixture
def beside(tiny: Callable[[str], BaseModel]) -> tuple[Site, Replica]:
    """Main is one version behind: the candidate holds one task more."""
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made, made.version - 1)
    one.set_canary(CanarySettings(version=made.version, share=0.5))
    one.follow()
    return made, one


def test_callers_in_the_share_are_answered_by_the_canary_and_say_so(beside: tuple[Site, Replica]) -> None:
    made, one = beside
    task, main = title(made, "seed-0"), made.version - 1
    asked = [Question(task, text, key=key) for key in KEYS[:20] for text in TEXTS[:2]]
    found = said(one.answer(asked))
    for question, answer in zip(asked, found, strict=True):
        assert answer.version == (made.version if is_in(question.key, 0.5) else main)
        expected = one.answer([Question(task, question.inputs, answer.version)])[0]
        assert isinstance(expected, Answer)
        assert list((answer.probabilities or {}).values()) == pytest.approx(
            list((expected.probabilities or {}).values()), abs=1e-5
        )
    assert len({answer.version for answer in found}) == 2
    (named,) = said(one.answer([Question(task, TEXTS[0], main, key=next(k for k in KEYS if is_in(k, 0.5)))]))
    assert named.version == main  # who names a version gets it
    (keyless,) = said(one.answer([Question(task, TEXTS[0])]))
    assert keyless.version == main


def test_a_request_that_the_canary_cannot_answer_whole_is_mains(beside: tuple[Site, Replica]) -> None:
    made, one = beside
    key = next(key for key in KEYS if is_in(key, 0.5))
    task = title(made, "seed-0")
    good, bad = one.answer([Question(task, TEXTS[0], key=key), Question(task, {"txt": "a"}, key=key)])
    assert isinstance(good, Answer)
    assert good.version == made.version - 1
    assert not isinstance(bad, Answer)
    assert one.canary is not None
    assert one.canary.comparison.as_dict()["failed"] == 0  # it was asked wrongly, of whichever version


def test_a_request_that_only_main_can_answer_is_counted(beside: tuple[Site, Replica]) -> None:
    made, one = beside
    one.set_canary(CanarySettings(version=1, share=1.0))  # a version before the task was there
    one.follow()
    (answer,) = said(one.answer([Question(title(made, "seed-1"), TEXTS[0], key="anybody")]))
    assert answer.version == made.version - 1
    assert one.canary is not None
    assert one.canary.comparison.as_dict()["failed"] == 1


def compared(one: Replica, batcher: Batcher, *requests: list[Question]) -> tuple[list[list[Said]], dict[str, Any]]:
    """Answers to requests that come at the same time, and what was counted once all was compared."""

    async def ask() -> list[list[Said]]:
        found = await asyncio.gather(*(batcher.answer(questions) for questions in requests))
        while batcher._comparing:
            await asyncio.wait(batcher._comparing)
        return [list(answers) for answers in found]

    found = asyncio.run(ask())
    assert one.canary is not None
    return found, one.canary.comparison.as_dict()


def test_a_neighbour_that_asks_wrongly_takes_no_request_of_the_same_key_from_the_canary(
    beside: tuple[Site, Replica],
) -> None:
    made, one = beside
    task, key = title(made, "seed-0"), next(key for key in KEYS if is_in(key, 0.5))
    good, bad = [Question(task, TEXTS[0], key=key)], [Question("team/nobodys", "a", key=key)]
    (answers, refused), counted = compared(one, Batcher(one, 16), good, bad)
    assert [answer.version for answer in said(answers)] == [made.version]
    assert not isinstance(refused[0], Answer)
    assert (counted["failed"], counted["canary"]["requests"], counted["main"]["requests"]) == (0, 1, 0)


def test_only_what_its_key_gave_to_one_of_the_two_is_compared(beside: tuple[Site, Replica]) -> None:
    made, one = beside
    task, main = title(made, "seed-0"), made.version - 1
    mine, other = (next(key for key in KEYS if is_in(key, 0.5) is inside) for inside in (True, False))
    by_id = Question("seed-0", TEXTS[0], key=mine)
    _, counted = compared(one, Batcher(one, 16), [by_id])
    assert counted["tasks"] == {task: {"requests": 1, "rows": 1, "agreed": counted["tasks"][task]["agreed"]}}
    streamed = replace(Question(task, TEXTS[0], key=other), wrote=lambda piece: None)
    drawn = Question(task, TEXTS[0], key=mine, writing=Writing(temperature=1.0))
    for question, canarys in ((Question(task, TEXTS[0], main, key=other), 1), (streamed, 1), (drawn, 2)):
        _, counted = compared(one, Batcher(one, 16), [question])
        assert (counted["canary"]["requests"], counted["main"]["requests"]) == (canarys, 0)
        assert counted["tasks"][task]["rows"] == 1


def test_both_are_compared_after_the_caller_has_the_answer_unless_others_wait(beside: tuple[Site, Replica]) -> None:
    made, one = beside
    task = title(made, "seed-0")
    batcher = Batcher(one, 16)
    mine = [key for key in KEYS if is_in(key, 0.5)][:6]
    others = [key for key in KEYS if not is_in(key, 0.5)][:4]

    async def ask(together: bool) -> None:
        calls = [batcher.answer([Question(task, TEXTS[n % 5], key=key)]) for n, key in enumerate([*mine, *others])]
        if together:
            await asyncio.gather(*calls)
        else:
            for call in calls:
                await call
        while batcher._comparing:
            await asyncio.wait(batcher._comparing)

    asyncio.run(ask(together=False))
    assert one.canary is not None
    found = one.canary.comparison.as_dict()
    assert (found["canary"]["requests"], found["main"]["requests"], found["not_compared"]) == (6, 4, 0)
    assert found["tasks"][task]["rows"] == 6
    texts = [TEXTS[n % 5] for n in range(6)]
    versions = one.canary.comparison.versions
    both = [said(one.answer([Question(task, text, version) for text in texts])) for version in versions]
    assert found["tasks"][task]["agreed"] == sum(a.label == b.label for a, b in zip(*both, strict=True))
    assert found["canary"]["p50_seconds"] > 0


def test_the_canary_ends_when_main_gets_there_and_one_that_is_not_there_leaves_main_to_answer_all(
    beside: tuple[Site, Replica],
) -> None:
    made, one = beside
    publish(made, made.version)
    one.follow()
    assert (one.version, one.canary) == (made.version, None)
    one.set_canary(CanarySettings(version=99, share=1.0))
    one.follow()
    assert one.canary is None
    assert "99" in one.canary_trouble
    (answer,) = said(one.answer([Question(title(made, "seed-0"), TEXTS[0], key="anybody")]))
    assert answer.version == made.version
    one.set_canary(CanarySettings(version="candidate", share=1.0))
    one.follow()
    assert (one.canary, one.canary_trouble) == (None, "")  # candidate is where main is
