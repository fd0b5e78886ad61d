"""May a version become main: the borders, to the digit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from configs.settings import GateSettings
from orchestrator.judging.gate import Decision, PairedDifference, Rule, judge, paired_difference
from orchestrator.judging.score_table import score_table
from orchestrator.tasks.task_record import EarlierRows, TaskRecord
from subspace_store.log.version import RowsScore, TaskScore
from tests.builders import task_record
from tests.orchestrator.tables import state, version

GATE = GateSettings(drop_max=0.03, merge_gap_max=0.05)


def record(task_id: str, local: float | None = None, min_score: float | None = None) -> TaskRecord:
    return task_record(f"red/{task_id}", {"gate": {"min_score": min_score}}, task_id=task_id, local_score=local)


def decided(
    birth: float,
    now: float,
    new: float = 0.9,
    *records: TaskRecord,
    gate: GateSettings = GATE,
    paired: Mapping[str, PairedDifference] | None = None,
) -> Decision:
    """Task a was born in version 1 with `birth` and scores `now` in version 2, where b is born with `new`."""
    log = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 1.0})], {1: {"a": birth}, 2: {"a": now, "b": new}})
    known = {r.task_id: r for r in (record("a"), record("b"), *records)}
    return judge(score_table(log, 2, 0.1), 2, known, gate, paired or {})


@pytest.mark.parametrize(
    ("birth", "now", "passed"),
    [
        (0.83, 0.80, True),  # 0.83 − 0.80 is 0.030000000000000027 in binary: it counts as exactly 0.03
        (0.9, 0.87, True),
        (0.8301, 0.80, False),
        (0.80, 0.85, True),  # better than at birth
    ],
)
def test_an_earlier_task_may_lose_drop_max_and_not_a_row_more(birth: float, now: float, passed: bool) -> None:
    decision = decided(birth, now)
    assert decision.passed is passed
    if not passed:
        assert tuple(map(str, decision.broken)) == (
            f"red/a would fall from {birth:.4f} at birth to {now:.4f}, more than gate.drop_max 0.03",
        )


def test_with_drop_max_zero_an_equal_score_passes() -> None:
    gate = GateSettings(drop_max=0.0)
    assert decided(0.8, 0.8, gate=gate).passed
    assert not decided(0.8, 0.799, gate=gate).passed


@pytest.mark.parametrize(("local", "passed"), [(0.95, True), (0.951, False), (0.5, True), (None, True)])
def test_a_new_task_may_lose_merge_gap_max_against_its_own_adapter(local: float | None, passed: bool) -> None:
    decision = decided(0.8, 0.8, 0.9, record("b", local))
    assert decision.passed is passed
    if not passed:
        assert "red/b scores 0.9000 after merging and 0.9510 with its own adapter" in decision.summary


@pytest.mark.parametrize(("min_score", "passed"), [(0.9, True), (0.91, False), (None, True)])
def test_a_new_task_must_reach_its_own_min_score(min_score: float | None, passed: bool) -> None:
    decision = decided(0.8, 0.8, 0.9, record("b", None, min_score))
    assert decision.passed is passed
    if not passed:
        assert tuple(map(str, decision.broken)) == ("red/b scores 0.9000, below its own gate.min_score 0.91",)


def test_min_score_is_asked_of_a_task_at_birth_only() -> None:
    # a has 0.80 now and would ask for 0.85 at birth; later only drop_max protects it.
    assert decided(0.82, 0.80, 0.9, record("a", None, 0.85)).passed


@pytest.mark.parametrize(("error", "passed"), [(0.25, True), (0.2501, False)])
def test_a_new_task_that_nobody_can_score_is_judged_by_its_error(error: float, passed: bool) -> None:
    log = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 1.0})], {1: {"a": 0.9}, 2: {"a": 0.9}})
    records = {"a": record("a"), "b": record("b")}
    decision = judge(score_table(log, 2, 0.1), 2, records, GATE, errors={"b": error})
    assert decision.passed is passed
    if not passed:
        assert decision.codes == ("error-at-birth",)
        assert decision.summary == (
            "red/b would be held with an error of 0.250 of its norm, more than gate.error_max 0.25, and has no score"
        )


def test_a_score_decides_where_there_is_one_whatever_the_error() -> None:
    log = state([version(1, 0, ["a"])], {1: {"a": 0.9}})
    assert judge(score_table(log, 1, 0.1), 1, {"a": record("a")}, GATE, errors={"a": 0.9}).passed


@pytest.mark.parametrize(
    ("base", "constant", "passed"), [(0.85, 0.2, True), (0.86, 0.2, False), (0.2, 0.86, False), (None, None, True)]
)
def test_a_new_task_must_gain_min_gain_where_the_settings_ask_for_it(
    base: float | None, constant: float | None, passed: bool
) -> None:
    new = task_record("red/b", task_id="b", base_score=base, constant_score=constant)
    asked, unasked = GATE.model_copy(update={"min_gain": 0.05}), GATE
    assert decided(0.8, 0.8, 0.9, new, gate=unasked).passed
    decision = decided(0.8, 0.8, 0.9, new, gate=asked)
    assert decision.passed is passed
    if not passed:
        assert decision.summary == (
            "red/b scores 0.9000, and 0.8600 is reached without it: a gain below gate.min_gain 0.05"
        )


def test_every_broken_rule_is_told() -> None:
    decision = decided(0.9, 0.8, 0.5, record("b", 0.9, 0.8))
    assert [(rule.task_id, rule.rule, rule.score, rule.against, rule.limit) for rule in decision.broken] == [
        ("a", Rule.DROP, 0.8, 0.9, 0.03),
        ("b", Rule.MERGE_GAP, 0.5, 0.9, 0.05),
        ("b", Rule.MIN_SCORE, 0.5, 0.8, 0.8),
    ]
    assert decision.summary == "; ".join(map(str, decision.broken))


def test_the_drop_is_measured_from_birth_so_that_small_losses_do_not_add_up_unseen() -> None:
    # 0.90 → 0.88 → 0.86: each step is 0.02, together 0.04 > 0.03.
    log = state(
        [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 1.0}), version(3, 2, ["c"], {"a": 1.0})],
        {1: {"a": 0.90}, 2: {"a": 0.88, "b": 0.9}, 3: {"a": 0.86, "b": 0.9, "c": 0.9}},
    )
    records = {i: record(i) for i in "abc"}
    assert judge(score_table(log, 2, 0.1), 2, records, GATE).passed
    assert not judge(score_table(log, 3, 0.1), 3, records, GATE).passed


@pytest.mark.parametrize(("birth", "now"), [(math.nan, 0.1), (0.9, math.nan)])
def test_what_was_not_measured_breaks_no_rule(birth: float, now: float) -> None:
    assert decided(birth, now).passed


def test_a_version_whose_tasks_the_database_does_not_know_passes_with_a_sentence() -> None:
    log = state([version(1, 0, ["a"])], {1: {"a": 0.1}})
    decision = judge(score_table(log, 1, 0.1), 1, {}, GATE)
    assert decision == Decision(())
    assert decision.summary == "every task kept its score"


def test_a_paired_difference_is_students_on_the_differences_row_by_row() -> None:
    # Differences −1, 0, 0, 0, −1: mean −0.4, variance 1.2/4 = 0.3, t(4, 97.5 %) = 2.776.
    difference = paired_difference([1, 1, 0, 1, 1], [0, 1, 0, 1, 0])
    assert (difference.mean, difference.count) == (pytest.approx(-0.4), 5)
    half = 2.776445 * math.sqrt(0.3 / 5)
    assert (difference.low, difference.high) == (pytest.approx(-0.4 - half), pytest.approx(-0.4 + half))


def test_rows_that_both_got_right_make_the_interval_narrow() -> None:
    before = [1.0] * 380 + [0.0] * 20
    after = [0.0] * 12 + before[12:]
    difference = paired_difference(before, after)
    # 12 of 400 rows were lost. Two samples of 400 rows would be told apart to ±0.03, these to ±0.017.
    assert str(difference) == "0.0300 lower on the same 400 rows, 95 % interval 0.0132 to 0.0468"


def test_a_difference_upwards_is_told_as_one() -> None:
    assert str(paired_difference([0, 0, 1, 1], [1, 0, 1, 1])).startswith("0.2500 higher on the same 4 rows")
    assert str(paired_difference([1, 1], [1, 1])) == "0.0000 lower on the same 2 rows, 95 % interval 0.0000 to 0.0000"


def test_what_is_not_row_by_row_is_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1, 0], [1])
    assert math.isnan(paired_difference([1], [0]).low)


def test_reasons_tell_how_sure_the_drop_is_and_the_decision_does_not_wait_for_it() -> None:
    sure, unsure = (
        PairedDifference(mean=-0.06, low=-0.08, high=-0.04, count=400),
        PairedDifference(mean=-0.06, low=-0.14, high=0.02, count=20),
    )
    for difference in (sure, unsure):
        decision = decided(0.86, 0.80, 0.9, record("b", 0.96), paired={"a": difference, "b": difference})
        assert len(decision.broken) == 2
        assert all(str(rule).endswith(f"({difference})") for rule in decision.broken)
    assert decided(0.82, 0.80, paired={"a": sure}).passed


# --- a revision, judged on each revision's rows ------------------------------------------------------------------


def revised(
    first: float,
    old: float,
    new: float,
    before: Mapping[str, float],
    metric: str = "accuracy",
    spec: Mapping[str, Any] | None = None,
) -> Decision:
    """Task a was born in version 1 with `first`; b takes its place in version 2, with `old` on its rows and `new` on
    its own. before: What `main` answered when b was trained."""
    taken, drift = version(2, 1, ["b"])
    replacing = replace(taken, added=(replace(taken.added[0], replaces="a"),))
    log = state([version(1, 0, ["a"]), (replacing, drift)], {1: {"a": first}})
    parts = [RowsScore(task_id=task_id, score=score, count=50) for task_id, score in (("a", old), ("b", new))]
    score = TaskScore(task_id="b", score=(old + new) / 2, count=100, of_rows=tuple(parts))
    log = replace(log, scores={**log.scores, 2: {"b": score}})
    earlier = EarlierRows(task_id="a", number=1, eval_key="k", eval_count=50, eval_sha256="")
    revision = task_record(
        "red/b",
        {"metric": metric, **(spec or {})},
        task_id="b",
        number=2,
        revises="a",
        earlier_rows=(earlier,),
        main_scores_of_rows=before,
    )
    return judge(score_table(log, 2, 0.1), 2, {"b": revision}, GATE)


@pytest.mark.parametrize(
    ("first", "old", "new", "before", "broken"),
    [
        (0.9, 0.87, 0.8, {"a": 0.9, "b": 0.7}, []),
        (0.9, 0.8699, 0.8, {"a": 0.8699, "b": 0.7}, [Rule.EARLIER_ROWS]),  # against the first score, not today's
        (math.nan, 0.87, 0.8, {"a": 0.9, "b": 0.7}, []),
        (math.nan, 0.86, 0.8, {"a": 0.9, "b": 0.7}, [Rule.EARLIER_ROWS]),  # nobody measured it: then today's
        (math.nan, 0.86, 0.8, {"b": 0.7}, []),  # nor that: nothing to compare with
        (0.9, 0.9, 0.7, {"a": 0.9, "b": 0.7}, [Rule.NEW_ROWS]),
        (0.9, 0.9, 0.7000000001, {"a": 0.9, "b": 0.7}, [Rule.NEW_ROWS]),
        (0.9, 0.9, 0.7001, {"a": 0.9, "b": 0.7}, []),
        (0.9, 0.9, 1.0, {"a": 0.9, "b": 1.0}, []),  # nothing can be gained
        (0.9, 0.8, 0.6, {"a": 0.9, "b": 0.7}, [Rule.EARLIER_ROWS, Rule.NEW_ROWS]),
    ],
)
def test_a_revision_keeps_the_earlier_rows_and_gains_on_its_own(
    first: float, old: float, new: float, before: Mapping[str, float], broken: list[Rule]
) -> None:
    decision = revised(first, old, new, before)
    assert [one.rule for one in decision.broken] == broken
    assert decision.codes == tuple(map(str, broken))


def test_the_gate_says_which_revisions_rows_it_speaks_of() -> None:
    assert revised(0.9, 0.8, 0.6, {"b": 0.7}).summary == (
        "red/b would fall from 0.9000 to 0.8000 on the rows of revision 1, more than gate.drop_max 0.03; "
        "red/b scores 0.6000 on the new rows, those of revision 2, where main scored 0.7000 without it: nothing is "
        "gained"
    )


def test_what_is_best_depends_on_the_metric() -> None:
    """Zero is the best log-likelihood, and nothing in accuracy."""
    assert revised(0.5, 0.5, 0.0, {"b": 0.0}).codes == (str(Rule.NEW_ROWS),)
    spec = {"kind": "causal_lm", "data": {"label_names": None}}
    assert revised(-0.5, -0.5, 0.0, {"b": 0.0}, metric="log_likelihood", spec=spec).passed
