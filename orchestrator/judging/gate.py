"""May a version become `main`? A pure decision with its reasons.

Scores are compared on the same frozen rows, so a difference is one of predictions, not of samples. Its uncertainty is
reported beside it and does not decide: a gate that waits for certainty lets small losses through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from configs.settings import GateSettings
from configs.task_spec import SCORE_MAX
from orchestrator.judging.forgetting import mean
from orchestrator.judging.score_table import ScoreTable
from orchestrator.tasks.task_record import TaskRecord, results_key

ROUNDING = 1e-9
"""Scores are quotients of integers: 0.83 − 0.80 must count as 0.03, not as 0.030000000000000027."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How two scores on the same rows differ."""

    mean: float
    """Score after − score before; negative: worse."""
    low: float
    high: float
    """95 % interval of what the difference would be on other rows of the same kind; NaN below two rows."""
    count: int

    def __str__(self) -> str:
        word, sign = ("higher", 1) if self.mean > 0 else ("lower", -1)
        low, high = sorted((sign * self.low + 0.0, sign * self.high + 0.0))  # 0.0 added: −0.0 would be shown as such
        return f"{abs(self.mean):.4f} {word} on the same {self.count} rows, 95 % interval {low:.4f} to {high:.4f}"


class Rule(StrEnum):
    """What the gate asks of a task's score."""

    DROP = "drop"
    """An earlier task may lose at most `gate.drop_max` against its score at birth."""
    MERGE_GAP = "merge-gap"
    """A new task may lose at most `gate.merge_gap_max` against its own adapter."""
    MIN_SCORE = "min-score"
    """A new task reaches its own `gate.min_score`."""
    MIN_GAIN = "min-gain"
    """A new task scores more than the base model alone by `gate.min_gain`."""
    GENERAL_LOSS = "general-loss"
    """By a task the language model loses at most `gate.general_loss_max` on general text."""
    EARLIER_ROWS = "earlier-rows"
    """On the evaluation rows of an earlier revision, a new one may lose at most `gate.drop_max` against the first score
    on them."""
    NEW_ROWS = "new-rows"
    """On its own evaluation rows a new revision scores more than what `main` answered on them."""
    ERROR = "error-at-birth"
    """The error of a new task without a score is at most `gate.error_max`."""


@dataclass(frozen=True, kw_only=True)
class BrokenRule:
    """One rule that the score of one task broke."""

    task_id: str
    title: str
    """`team/task`, for people."""
    rule: Rule
    score: float
    """Score under the version that is judged; of the rule `error-at-birth`, the error; of `general-loss`, the loss."""
    against: float
    """Number that it is compared with: the score at birth, of its own adapter, of the base model alone, or the limit
    itself."""
    limit: float
    """Limit that the rule sets."""
    paired: PairedDifference | None = None
    """The comparison row by row, where both were kept."""
    rows: str = ""
    """Which revision's rows it is about, of the two rules that are about them: `revision 1`."""

    def __str__(self) -> str:
        told = f" ({self.paired})" if self.paired else ""
        if self.rule is Rule.DROP:
            fall = f"would fall from {self.against:.4f} at birth to {self.score:.4f}"
            return f"{self.title} {fall}, more than gate.drop_max {self.limit}{told}"
        if self.rule is Rule.MERGE_GAP:
            gap = f"scores {self.score:.4f} after merging and {self.against:.4f} with its own adapter"
            return f"{self.title} {gap}, a gap above gate.merge_gap_max {self.limit}{told}"
        if self.rule is Rule.EARLIER_ROWS:
            fall = f"would fall from {self.against:.4f} to {self.score:.4f} on the rows of {self.rows}"
            return f"{self.title} {fall}, more than gate.drop_max {self.limit}"
        if self.rule is Rule.NEW_ROWS:
            return (
                f"{self.title} scores {self.score:.4f} on the new rows, those of {self.rows}, where main scored "
                f"{self.against:.4f} without it: nothing is gained"
            )
        if self.rule is Rule.MIN_GAIN:
            gain = f"scores {self.score:.4f}, and {self.against:.4f} is reached without it"
            return f"{self.title} {gain}: a gain below gate.min_gain {self.limit}"
        if self.rule is Rule.GENERAL_LOSS:
            lost = f"makes the base model lose {self.score:.3f} nats for each token of general text"
            return f"{self.title} {lost}, more than gate.general_loss_max {self.limit}"
        if self.rule is Rule.ERROR:
            lost = f"would be held with an error of {self.score:.3f} of its norm"
            return f"{self.title} {lost}, more than gate.error_max {self.limit}, and has no score"
        return f"{self.title} scores {self.score:.4f}, below its own gate.min_score {self.limit}"


@dataclass(frozen=True)
class Decision:
    """The gate's answer."""

    broken: tuple[BrokenRule, ...]
    """Empty when passed."""

    @property
    def passed(self) -> bool:
        return not self.broken

    @property
    def codes(self) -> tuple[str, ...]:
        """The rules that were broken, each once."""
        return tuple(dict.fromkeys(str(one.rule) for one in self.broken))

    @property
    def summary(self) -> str:
        """For people: a sentence with numbers for each rule that was broken."""
        return "; ".join(map(str, self.broken)) if self.broken else "every task kept its score"


def paired_difference(before: Sequence[float], after: Sequence[float]) -> PairedDifference:
    """Compare two scores row by row: the mean of the differences and its Student t interval.

    Args:
        before, after: Each row's share in the two scores, row i of one being row i of the other (`workers.results`).

    Returns:
        Rows that both got right, or both wrong, add nothing to the interval's width: it is narrower than that of two
        independent samples. Where not one row differs it has no width, which few rows do not justify.

    Source:
        The paired t-test (Student 1908); on right and wrong answers the Wald form of McNemar's comparison.
    """
    differences = mean([late - early for early, late in zip(before, after, strict=True)])
    low, high = (differences.value + sign * differences.half_width for sign in (-1, 1))
    return PairedDifference(mean=differences.value, low=low, high=high, count=differences.count)


def compared_with(record: TaskRecord, table: ScoreTable, version: int) -> tuple[int, str]:
    """What the gate compares a task's score under a version with: the version (0: its own adapter, before merging), and
    the storage key of each row's result.

    Args:
        version: One that the score was measured under.
    """
    if table.birth[record.task_id] == version:
        return 0, record.local_results_key
    # Nobody measured it at birth if it was merged again without some task: then its first score since counts.
    first = next(
        table.cells[v][record.task_id].measured_at for v, s in table.column(record.task_id) if not math.isnan(s)
    )
    return first, results_key(record.task_id, first)


def judge(
    table: ScoreTable,
    version: int,
    records: Mapping[str, TaskRecord],
    settings: GateSettings,
    paired: Mapping[str, PairedDifference] = MappingProxyType({}),
    errors: Mapping[str, float] = MappingProxyType({}),
) -> Decision:
    """Judge one version by the scores of all its tasks.

    Args:
        table: The lineage up to `version`, with every due evaluation in it.
        records: Task id to record, for local scores, names and the task's own rule.
        paired: Task id to how its score differs from the one it is compared with (at birth; of a new task: with its own
            adapter), where both were kept row by row. Reported only; it changes no decision.
        errors: Task id to error at birth, of all tasks of the version.
    """
    broken: list[BrokenRule] = []
    for task_id in table.tasks:
        record = records.get(task_id)
        score = table.score(version, task_id)
        if record is None:
            continue  # a task from a database that was lost: nothing to compare
        if math.isnan(score):
            error = errors.get(task_id, 0.0)
            if table.birth[task_id] == version and error > settings.error_max + ROUNDING:
                broken.append(_broken(record, Rule.ERROR, error, settings.error_max, settings.error_max))
            continue
        if table.birth[task_id] == version:
            broken += _of_a_new_task(record, score, settings, paired.get(task_id))
            broken += _of_a_revision(record, table, version, settings)
        else:
            # Nobody measured it at birth if it was merged again without some task: then its first score since counts.
            known = [s for v, s in table.column(task_id) if v < version and not math.isnan(s)]
            birth, limit = known[0] if known else math.nan, settings.drop_max
            if birth - score > limit + ROUNDING:
                broken.append(_broken(record, Rule.DROP, score, birth, limit, paired.get(task_id)))
        broken += _of_the_base_model(record, table, version, settings)
    return Decision(tuple(broken))


def _of_a_new_task(
    record: TaskRecord, score: float, settings: GateSettings, paired: PairedDifference | None
) -> list[BrokenRule]:
    broken = []
    own, limit, least = record.local_score, settings.merge_gap_max, record.spec.gate.min_score
    if own is not None and own - score > limit + ROUNDING:
        broken.append(_broken(record, Rule.MERGE_GAP, score, own, limit, paired))
    if least is not None and score < least - ROUNDING:
        broken.append(_broken(record, Rule.MIN_SCORE, score, least, least))
    without = [known for known in (record.base_score, record.constant_score) if known is not None]
    if settings.min_gain is not None and without and score - max(without) < settings.min_gain - ROUNDING:
        broken.append(_broken(record, Rule.MIN_GAIN, score, max(without), settings.min_gain))
    return broken


def _of_the_base_model(
    record: TaskRecord, table: ScoreTable, version: int, settings: GateSettings
) -> Iterator[BrokenRule]:
    """What the language model loses by the task, where the settings ask for it."""
    limit, task_id = settings.general_loss_max, record.task_id
    if limit is None or not table.general_loss(version, task_id) > limit + ROUNDING:
        return
    earlier = (table.general_loss(before, task_id) for before in table.versions if before < version)
    first = next((loss for loss in earlier if not math.isnan(loss)), math.nan)
    if first > limit + ROUNDING:
        return  # so it was published, by other settings: a merge is not at fault
    yield _broken(record, Rule.GENERAL_LOSS, table.general_loss(version, task_id), limit, limit)


def _of_a_revision(record: TaskRecord, table: ScoreTable, version: int, settings: GateSettings) -> Iterator[BrokenRule]:
    """What its rows and those of the revisions before it say, each by themselves."""
    drop_max = settings.drop_max
    for rows in record.earlier_rows:
        now, first = table.on_rows(version, rows.task_id), table.first_on_rows(version, rows.task_id)
        # Where no version that is left has a score on them, what `main` answered counts.
        before = record.main_scores_of_rows.get(rows.task_id, math.nan) if math.isnan(first) else first
        if before - now > drop_max + ROUNDING:  # not where one of them is NaN
            name = f"revision {rows.number}"
            yield _broken(record, Rule.EARLIER_ROWS, now, before, drop_max, rows=name)
    now, before = table.on_rows(version, record.task_id), record.main_scores_of_rows.get(record.task_id, math.nan)
    is_best = now >= SCORE_MAX[record.spec.metric] - ROUNDING
    if record.revises and now - before <= ROUNDING and not is_best:
        yield _broken(record, Rule.NEW_ROWS, now, before, before, rows=f"revision {record.number}")


def _broken(
    record: TaskRecord,
    rule: Rule,
    score: float,
    against: float,
    limit: float,
    paired: PairedDifference | None = None,
    rows: str = "",
) -> BrokenRule:
    return BrokenRule(
        task_id=record.task_id,
        title=record.title,
        rule=rule,
        score=score,
        against=against,
        limit=limit,
        paired=paired,
        rows=rows,
    )
