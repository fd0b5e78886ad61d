"""Scores from answers: each value by the library that the field uses, and each row's share in it. Pure, on the CPU.

A score is a number, or there is none and an error says why: at admission where the rows decide it (`CORRELATIONS`), in
evaluation.py where the model's outputs are no numbers. It is never NaN, which means "not measured".

Shares make two versions comparable row by row whatever the metric is. Their mean is the value, exactly, and their
spread is the value's own: where a value is a mean over rows a share is what the row got (right or not, its ROUGE),
elsewhere it is the value plus the row's influence on it (the delta method, also called infinitesimal jackknife). So the
mean of paired differences of shares is the difference of the two scores, and Student's t on them its interval.

Source:
    B. Efron, "The jackknife, the bootstrap and other resampling plans", SIAM 1982, chapter 6 (influence functions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.task_spec import Metric

Floats = NDArray[np.float64]

CORRELATIONS: tuple[Metric, ...] = ("matthews_correlation", "pearson", "spearman")
"""Metrics that are not defined where all labels are the same, whatever the answers: admission refuses such rows."""
GENERATED: tuple[Metric, ...] = ("exact_match", "rouge_l")
"""Metrics that need answers. A token of an answer costs a pass through the model, so other tasks do without."""
LOG_PROBABILITY_MIN = -100.0
"""Least logarithm of one token's probability. float32 cannot tell a smaller probability from 0, and one token must not
outweigh all others."""


@dataclass(frozen=True)
class Measure:
    """One metric over some rows."""

    value: float
    per_row: Floats
    """Each row's share, in the order of the rows; the mean is the value."""


def classification(
    expected: Sequence[int], predicted: Sequence[int], of_right: Sequence[float], label_count: int
) -> dict[str, Measure]:
    """`accuracy`, `f1_macro` (mean over all labels, one never seen or predicted counts 0), `matthews_correlation`, and
    `probability`, the mean probability of the right label: it moves long before an answer does, so that a hundred rows
    tell two models apart that answer alike. `probability_macro` is the mean of that over the labels that occur, so that
    a rare label counts as much as a frequent one: always giving the most frequent one earns 1/C, as with a correlation.

    Args:
        expected, predicted: Indices below label_count, one per row.
        of_right: Probability that the model gives to each row's label.

    Returns:
        Values by scikit-learn's definitions; Matthews correlation is 0 when all answers are the same.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    given, said = np.asarray(expected), np.asarray(predicted)
    right = (given == said).astype(np.float64)
    f1_C = f1_score(given, said, labels=range(label_count), average=None, zero_division=0)
    given_C, said_C = (np.bincount(labels, minlength=label_count) / len(given) for labels in (given, said))
    # F1 of a label is the ratio of two means over rows, 2·[given and said] and [given] + [said].
    per_rate_C = np.divide(1.0, given_C + said_C, out=np.zeros(label_count), where=given_C + said_C > 0)
    influence = 2 * right * per_rate_C[given] - (f1_C * per_rate_C)[given] - (f1_C * per_rate_C)[said]
    sure = np.asarray(of_right, dtype=np.float64)
    sure_C = np.bincount(given, weights=sure / len(given), minlength=label_count)
    sure_C = np.divide(sure_C, given_C, out=np.zeros(label_count), where=given_C > 0)
    of_labels, even = np.count_nonzero(given_C), sure_C[given_C > 0].mean()
    # Matthews correlation is the correlation of two 0/1 vectors over the labels, here by their inner products.
    products = right - said_C[given] - given_C[said] + given_C @ said_C
    squares = (1 - 2 * rate_C[labels] + rate_C @ rate_C for labels, rate_C in ((given, given_C), (said, said_C)))
    # scikit-learn answers 0 as well where one side does not vary, but warns if both do not.
    matthews = matthews_corrcoef(given, said) if np.ptp(given) and np.ptp(said) else 0.0
    return {
        "accuracy": Measure(float(accuracy_score(given, said)), right),
        "f1_macro": Measure(float(f1_C.mean()), f1_C.mean() + influence / label_count),
        "matthews_correlation": Measure(float(matthews), _correlation_shares(products, *squares)),
        "probability": Measure(float(sure.mean()), sure),
        "probability_macro": Measure(float(even), even + (sure - sure_C[given]) / given_C[given] / of_labels),
    }


def regression(expected: Sequence[float], predicted: Sequence[float]) -> dict[str, Measure]:
    """`pearson` and `spearman` correlation, by scipy.

    Args:
        predicted: Finite; `workers.evaluation` refuses what a model puts out that is no number.

    Returns:
        0 where all answers are the same, as scikit-learn has it (`r_regression(force_finite=True)`): it is what answers
        without any relation to the labels get. 0 as well where all labels are the same, or there is one row: an earlier
        release admitted such rows.
    """
    from scipy.stats import pearsonr, rankdata, spearmanr

    given, said = np.asarray(expected, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if np.ptp(given) == 0 or np.ptp(said) == 0:
        return {name: Measure(0.0, np.zeros(len(given))) for name in ("pearson", "spearman")}
    return {
        "pearson": Measure(float(pearsonr(given, said).statistic), _pearson_shares(given, said)),
        # A row's influence through other rows' ranks is left out.
        "spearman": Measure(float(spearmanr(given, said).statistic), _pearson_shares(rankdata(given), rankdata(said))),
    }


def vectors(
    expected: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]], pck_distance: float
) -> dict[str, Measure]:
    """`neg_mean_absolute_error`, over all numbers of all rows, as scikit-learn's scorer of that name has it; and, where
    a row is an even count of numbers, `pck`: the share of its points (x, y) that are said to be no further than
    pck_distance from where they are.

    Source:
        Y. Yang, D. Ramanan, "Articulated human detection with flexible mixtures of parts", TPAMI 2013: the percentage
        of correct keypoints, with a distance that is the same for all rows.
    """
    given, said = np.asarray(expected, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    shares = -np.abs(given - said).mean(axis=1)
    found = {"neg_mean_absolute_error": Measure(float(shares.mean()), shares)}
    if given.shape[1] % 2 == 0:
        away = np.linalg.norm((given - said).reshape(len(given), -1, 2), axis=2)
        right = (away <= pck_distance).mean(axis=1)
        found = {"pck": Measure(float(right.mean()), right)} | found
    return found


def likelihood(log_probabilities: Sequence[float], token_counts: Sequence[int]) -> dict[str, Measure]:
    """`log_likelihood`: the mean natural logarithm of a completion token's probability, over all rows' tokens.

    Args:
        log_probabilities: Sum over a row's completion tokens, the end token among them.
        token_counts: Number of those tokens, at least 1.
    """
    sums, counts = np.asarray(log_probabilities, dtype=np.float64), np.asarray(token_counts, dtype=np.float64)
    value = sums.sum() / counts.sum()
    return {"log_likelihood": Measure(float(value), value + (sums - value * counts) / counts.mean())}


def answers(expected: Sequence[str], generated: Sequence[str]) -> dict[str, Measure]:
    """`exact_match` (the same text but for white space around it) and `rouge_l` (F-measure of the longest common
    subsequence of words, by rouge-score, without stemming; 0 where either has no word).

    Words are runs of letters and digits of any script, in lower case. On English that is rouge-score's own rule; its
    own would take é for a gap between words, and score every answer in Greek or Chinese with 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = list(zip(expected, generated, strict=True))
    same = np.array([given.strip() == said.strip() for given, said in pairs], dtype=np.float64)
    rouge = np.array([scorer.score(given, said)["rougeL"].fmeasure for given, said in pairs], dtype=np.float64)
    return {"exact_match": Measure(float(same.mean()), same), "rouge_l": Measure(float(rouge.mean()), rouge)}


class _Words:
    """The tokenizer that rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def constant_score(metric: Metric, rows_per_label: Sequence[int]) -> float | None:
    """Score of always giving the most frequent label: a model that scores no more has learnt nothing that shows.

    Args:
        rows_per_label: One number for each label; empty for regression.

    Returns:
        For a correlation 0, as `classification` and `regression` have it. None where answers are texts, or
        probabilities, of which a constant answer may have any.
    """
    if metric in CORRELATIONS:
        return 0.0
    if not sum(rows_per_label) or metric not in ("accuracy", "f1_macro"):
        return None
    share = max(rows_per_label) / sum(rows_per_label)
    # F1 of the label that is always given: its precision is its share, its recall 1. The others' is 0.
    return share if metric == "accuracy" else 2 * share / (1 + share) / len(rows_per_label)


def values(measures: Mapping[str, Measure]) -> dict[str, float]:
    """All metrics by name, and `perplexity` = exp(−log_likelihood) beside a log_likelihood."""
    named = {name: measure.value for name, measure in measures.items()}
    if "log_likelihood" in named:
        named["perplexity"] = float(np.exp(-named["log_likelihood"]))
    return named


def _pearson_shares(left: Floats, right: Floats) -> Floats:
    x, y = left - left.mean(), right - right.mean()
    return _correlation_shares(x * y, x * x, y * y)


def _correlation_shares(products: Floats, squares_left: Floats, squares_right: Floats) -> Floats:
    """Shares in r = mean(xy) / √(mean(xx)·mean(yy)); 0 where a side does not vary."""
    norm = np.sqrt(squares_left.mean() * squares_right.mean())
    if norm == 0:
        return np.zeros(len(products))
    value = products.mean() / norm
    relative = squares_left / squares_left.mean() + squares_right / squares_right.mean()
    return np.asarray(value + products / norm - value * relative / 2)
