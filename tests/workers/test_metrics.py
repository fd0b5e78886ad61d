"""Metrics: values by hand, and shares whose mean is the value and whose spread is the value's own."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from workers.metrics import Measure, answers, classification, constant_score, likelihood, regression, values, vectors

Draw = np.random.Generator


def test_the_classification_scores_are_what_the_hand_computes() -> None:
    two, three = (classification([0, 0, 1, 1], [0, 1, 1, 1], [0.5, 0.1, 0.7, 0.9], count) for count in (2, 3))
    assert two["probability"].value == pytest.approx((0.5 + 0.1 + 0.7 + 0.9) / 4)
    uneven = classification([0, 1, 1, 1], [1, 1, 1, 1], [0.1, 0.6, 0.8, 0.7], 3)["probability_macro"]
    assert uneven.value == pytest.approx((0.1 + (0.6 + 0.8 + 0.7) / 3) / 2)  # a label without rows has no part in it
    assert two["accuracy"].value == 0.75
    # F1 of 0: precision 1, recall 1/2: 2/3; of 1: precision 2/3, recall 1: 4/5; a third label without rows: 0.
    assert two["f1_macro"].value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert three["f1_macro"].value == pytest.approx((2 / 3 + 4 / 5) / 3)
    # (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2·1 − 1·0) / √(3·2·2·1)
    assert two["matthews_correlation"].value == pytest.approx(2 / 12**0.5)


def test_correlations_are_what_the_hand_computes() -> None:
    measured = regression([1, 2, 3], [1, 4, 9])
    # Deviations −1, 0, 1 and −11/3, −2/3, 13/3: 8 / √(2 · 98/3).
    assert measured["pearson"].value == pytest.approx(8 / (2 * 98 / 3) ** 0.5)
    assert measured["spearman"].value == pytest.approx(1.0)  # the order is the same


def test_errors_of_points_are_what_the_hand_computes() -> None:
    # Two points a row: in the first row one is right and one is 5 away, in the second both are 1 away, which is just
    # near enough.
    given, said = [[0, 0, 3, 4], [1, 1, 2, 2]], [[0, 0, 0, 0], [1, 2, 3, 2]]
    measured = vectors(given, said, pck_distance=1.0)
    assert measured["pck"].per_row.tolist() == [0.5, 1.0]
    assert measured["pck"].value == 0.75
    assert measured["neg_mean_absolute_error"].per_row.tolist() == [-7 / 4, -2 / 4]
    assert measured["neg_mean_absolute_error"].value == -9 / 8
    assert vectors([[1.0]], [[3.0]], 0.1).keys() == {"neg_mean_absolute_error"}  # one number is no point


def test_log_likelihood_is_a_mean_over_tokens_and_not_over_rows() -> None:
    # One token of probability 1/2 and three of 1/8: (−1 − 9)/4 · ln 2, and 2 to the 2.5 choices per token.
    measured = likelihood([-math.log(2), -9 * math.log(2)], [1, 3])
    assert measured["log_likelihood"].value == pytest.approx(-2.5 * math.log(2))
    assert values(measured)["perplexity"] == pytest.approx(2**2.5)


def test_exact_match_minds_every_character_but_those_around_and_rouge_counts_words_in_order() -> None:
    measured = answers(["the cat sat", "the cat sat", "Yes", ""], [" the cat sat\n", "a cat now sat", "yes", ""])
    assert measured["exact_match"].per_row.tolist() == [1, 0, 0, 1]
    # "cat sat" in order: precision 2/4, recall 2/3, F 4/7. rouge-score lowers letters; no words at all are 0.
    assert measured["rouge_l"].per_row.tolist() == pytest.approx([1, 4 / 7, 1, 0])
    assert measured["exact_match"].value == 0.5


def test_rouge_counts_the_words_of_every_script_and_english_ones_as_rouge_score_does() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"])
    draw, alphabet = random.Random(0), "ab1 -_.'A\n"
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(20))) for _ in range(100)]
    expected = [theirs.score(left, right)["rougeL"].fmeasure for left, right in itertools.pairwise(texts)]
    assert answers(texts[:-1], texts[1:])["rouge_l"].per_row.tolist() == expected
    assert answers(["το μικρό σπίτι"], ["το σπίτι"])["rouge_l"].value == pytest.approx(0.8)  # precision 1, recall 2/3


@pytest.mark.parametrize(("expected", "predicted"), [([1, 2, 3], [2, 2, 2]), ([2, 2, 2], [1, 2, 3])])
def test_a_correlation_that_is_not_defined_is_0_and_not_missing(expected: list[float], predicted: list[float]) -> None:
    for measure in regression(expected, predicted).values():
        assert measure.value == 0.0
        assert measure.per_row.tolist() == [0, 0, 0]


@pytest.mark.parametrize("expected", [[0, 1, 1], [1, 1, 1]])
def test_answers_that_are_all_the_same_have_no_matthews_correlation(expected: list[int]) -> None:
    measure = classification(expected, [1, 1, 1], [0.5] * 3, 2)["matthews_correlation"]
    assert (measure.value, measure.per_row.tolist()) == (0.0, [0, 0, 0])


def labels(draw: Draw, count: int) -> dict[str, Measure]:
    given = draw.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])  # the fifth label is in no row
    said = np.where(draw.random(count) < 0.6, given, draw.integers(0, 4, count))
    return classification(given.tolist(), said.tolist(), draw.random(count).tolist(), 5)


def numbers(draw: Draw, count: int) -> dict[str, Measure]:
    given = draw.normal(size=count)
    return regression(np.round(given, 1).tolist(), (given + draw.normal(size=count)).tolist())


def tokens(draw: Draw, count: int) -> dict[str, Measure]:
    counts = draw.integers(1, 9, count)
    return likelihood((-counts * draw.exponential(size=count)).tolist(), counts.tolist())


def points(draw: Draw, count: int) -> dict[str, Measure]:
    given = draw.random((count, 4))
    return vectors(given.tolist(), (given + 0.1 * draw.normal(size=(count, 4))).tolist(), 0.1)


@pytest.mark.parametrize("make", [labels, numbers, tokens, points])
def test_the_mean_of_the_shares_is_the_score(make: Callable[[Draw, int], dict[str, Measure]]) -> None:
    for measure in make(np.random.default_rng(0), 50).values():
        assert measure.per_row.mean() == pytest.approx(measure.value, abs=1e-12)


@pytest.mark.parametrize("make", [labels, numbers, tokens, points])
def test_the_spread_of_the_shares_is_that_of_the_score(make: Callable[[Draw, int], dict[str, Measure]]) -> None:
    # 200 samples of 200 rows: what the scores spread, against what each sample's shares say they spread. The standard
    # deviation of 200 draws is known to 1/√400 = 5 %.
    draw, count = np.random.default_rng(1), 200
    samples = [make(draw, count) for _ in range(200)]
    for name in samples[0]:
        seen = np.std([sample[name].value for sample in samples])
        told = np.mean([sample[name].per_row.std() for sample in samples]) / count**0.5
        assert told == pytest.approx(seen, rel=0.15), name


@pytest.mark.parametrize("counts", [(3, 5, 2), (1, 0), (4, 4), (0, 0, 7, 1)])
def test_always_giving_the_most_frequent_label_scores_what_the_metrics_say(counts: tuple[int, ...]) -> None:
    expected = [label for label, count in enumerate(counts) for _ in range(count)]
    most = counts.index(max(counts))
    measures = classification(expected, [most] * len(expected), [1.0] * len(expected), len(counts))
    for name in ("accuracy", "f1_macro", "matthews_correlation"):
        assert constant_score(name, counts) == pytest.approx(measures[name].value)  # type: ignore[arg-type]


def test_a_constant_answer_correlates_with_nothing_and_texts_have_no_such_answer() -> None:
    assert regression([1.0, 2.0, 3.0], [5.0] * 3)["pearson"].value == constant_score("pearson", ())
    assert constant_score("exact_match", ()) is constant_score("accuracy", ()) is None
