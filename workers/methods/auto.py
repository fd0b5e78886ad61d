"""Method `auto`: train the task in each of a few ways, and keep the fewest numbers that are shown to lose nothing.

Some of the training rows are set aside and not trained on: they are the validation rows. Each candidate is trained to
its end on the others: which is better differs from task to task (subspace_store/foundation.py has figures). Then each
candidate is cut to smaller and smaller forms. Taken is the form with the fewest numbers whose loss against the best
candidate, row by row on the validation rows, is at most `method.loss_max` (less where there is less to lose,
`acceptable`): what its candidate loses against the best one, and what the cut loses against its candidate, this with
one standard error: what some hundred rows cannot show is not assumed of a cut, which can only lose. Of two candidates
neither is the one to doubt: with a standard error on that loss as well, `share` was kept in 15 of 25 races against
`lora` (of tasks as below), without it in 18, whose probability of the right label on test rows was 1.1 points above
their LoRAs'; of the three alone 0.3 below, 1.4 at most.

A candidate is then cut much further and what is left of it is trained on (`recovery`): the directions that are left
take over most of what the others held. Of trec6 (200 steps; 1,500 rows that nothing was trained on) the right label has
the probability 0.852 with the LoRA of rank 8 and 0.840 after a cut to a quarter of its directions. Cut to an eighth and
trained on for 60 and 120 steps it has 0.842 and 0.871; a LoRA of rank 1, which has as many numbers, 0.682. Such a form
is a candidate like the others, and the smallest that is good enough is kept.

Unless the validation rows are few among all, what was chosen is made once more with all rows. The rows that scores are
reported on are never looked at.

Forms of a classifier are compared by the probability that they give to the right label, whatever metric the task is
scored by; its mean over the labels where the metric counts rare ones as much as frequent ones (`EVEN`). Of four tasks
with 70 validation rows (eleven intents of BANKING77 each), the rule kept 0.63 of LoRA's numbers and lost 0.2 points of
accuracy on test rows, 0.7 at most. Compared by accuracy, with one standard error in favour of the smaller form, a rule
kept 0.16 on six such tasks and lost 3.3 points, 7.7 at most (on 17 intents with 721 rows 13.6); without one, 0.35, 2.0
and 4.9.

A form keeps the largest singular values of all modules together, so that a module which does little has few directions
or none. Its cost is what it takes to store it: 2·K·R numbers in a basis or in the foundation, (N+D)·R elsewhere. The
store takes nothing from a form (`SIZED`): it has no more than its score needs. Cutting by the energy that reaches a
module's output (the second moments of its inputs known) took 12 to 15 % fewer numbers for the same probability where
much was cut, and 3 % where the rule cuts, which is not worth another pass over the rows.

Source: the rule for cuts is one-sided: a form passes when a test for a loss above the limit, at one standard error,
rejects it; the other way round from the one-standard-error rule of Breiman, Friedman, Olshen and Stone, Classification
and Regression Trees (1984), section 3.4.3, which takes the smallest that cannot be told from the best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from configs.task_spec import CLASSIFICATION_KINDS, Metric, TaskSpec
from subspace_store.adapter import SIZED, Adapter
from workers.orders import LogLine, Progress
from workers.trainer import Report

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Shares of an update's energy that its forms keep."""
DOUBT = 1.0
"""Standard errors of the paired difference that are added to what a cut loses."""
RECOVERED = ("share", "lora")
"""Methods whose candidates are trained on after a cut."""
SIZES = (1 / 16, 1 / 8, 1 / 4)
"""Shares of a candidate's directions that are kept and trained on alone, smallest first."""
TRIES = len(SIZES).bit_length()
"""Most of these that are tried, by bisection."""
RECOVERY = 0.5
"""Share of the task's steps for which a cut is trained on."""
EVEN: tuple[Metric, ...] = ("f1_macro", "matthews_correlation", "probability_macro")
"""Metrics in which a label weighs as much whatever its share of the rows is. Of the plain mean of probabilities a task
with 70 % of one label loses next to nothing when it gives that one always, and its correlation falls to 0."""


WORTH_TRAINING_IN = 24
"""Fewest directions, per side, of a basis that is trained in. Of tasks of eleven BANKING77 intents each, `share` was
kept in 2 of 7 while the basis had 13 to 28 directions, one of them 2.8 points below LoRA; with 30 in 5 of 6, on average
1.0 points above it. Half as many make the races begin three tasks earlier, and end the same for all of the first 20."""


@dataclass(frozen=True)
class Form:
    """A candidate, cut to some share of its energy."""

    method: str
    share: float
    """Share of its energy, one of `SHARES`."""
    adapter: Adapter
    numbers: int
    """Numbers that it takes to store it."""
    per_row: tuple[float, ...]
    """Each validation row's share in the score."""
    directions: int = 0
    """Above 0: it was cut to so many directions, of all modules together, and those were trained on."""

    @property
    def score(self) -> float:
        """Its score on the validation rows."""
        return statistics.fmean(self.per_row)

    def loss(self, best: Form) -> tuple[float, float]:
        """What it loses against another form, and one standard error of that."""
        losses = [theirs - ours for theirs, ours in zip(best.per_row, self.per_row, strict=True)]
        return statistics.fmean(losses), statistics.stdev(losses) / math.sqrt(len(losses))

    def is_as_good_as(self, whole: Form, best: Form, loss_max: float) -> bool:
        """Whether it loses no more than is allowed.

        Args:
            whole: Its candidate, before it was cut.
            best: The best candidate.
        """
        between, _ = whole.loss(best)
        loss, error = self.loss(whole)
        return between + loss + DOUBT * error <= loss_max


def among(report: Report, name: str, before: int, size: float, after: float) -> Report:
    """A report in which one run's steps are a part of the steps of all. Its points and lines name it.

    Args:
        name: Of the run, see `Point.candidate`.
        before: Steps of the runs that are done.
        size: Of this run, in units of the task's own training.
        after: Of the runs that follow, at most, in these units; a step of theirs takes as long as one of this run.
    """
    seconds_per_step = 0.0

    def named(line: LogLine) -> LogLine:
        return f"{name}: {line.removeprefix(f'{name}: ')}" if isinstance(line, str) else replace(line, candidate=name)

    def told(progress: Progress) -> None:
        nonlocal seconds_per_step
        steps = progress.steps
        if progress.step < steps and not math.isnan(progress.seconds_left):
            seconds_per_step = progress.seconds_left / (steps - progress.step)
        later = round(steps * after / size)
        report(
            replace(
                progress,
                candidate=name,
                step=before + progress.step,
                steps=before + steps + later,
                seconds_left=progress.seconds_left + seconds_per_step * later,
                log_lines=tuple(map(named, progress.log_lines)),
            )
        )

    return told


def validation_spec(spec: TaskSpec) -> TaskSpec:
    """The task with the metric that forms are compared by: for classes the probability of the right one (where the
    task's own metric counts rare labels as much as frequent ones, its mean over the labels), for texts the likelihood
    of the right one (written answers cost a pass for every token), for several numbers their error, which moves before
    a point is right or wrong, else the task's own."""
    of_classes = "probability_macro" if spec.metric in EVEN else "probability"
    metrics = dict.fromkeys(CLASSIFICATION_KINDS, of_classes)
    metrics |= {"causal_lm": "log_likelihood", "image_regression": "neg_mean_absolute_error"}
    return spec.model_copy(update={"metric": metrics.get(spec.kind, spec.metric)})


def acceptable(loss_max: float, metric: Metric, best: float) -> float:
    """The loss that is accepted beside the best candidate, in units of the metric that forms are compared by.

    A probability below one half is that of a task with many classes or hardly learnt, where half a hundredth of it is
    much: of 77 intents that were right with 5 %, a cut that lost 0.005 lost 4 points of accuracy. An error has the
    units of the labels. Of both a share is meant; a difference of log-likelihoods is one already.

    Args:
        best: Score of the best candidate on the validation rows.
    """
    if metric == "log_likelihood":
        return loss_max
    size = abs(best)
    return loss_max * (size if metric == "neg_mean_absolute_error" else min(1.0, 2 * size))


def is_large_enough(ranks: Mapping[str, tuple[int, int]], adapted: Sequence[str]) -> bool:
    """Whether a basis has directions to train a task in, in at least one of the layers that it adapts.

    Args:
        ranks: Module to (k_out, k_in).
    """
    return any(min(ranks.get(name, (0, 0))) >= WORTH_TRAINING_IN for name in adapted)


def numbers(adapter: Adapter, leased: Mapping[str, tuple[int, int]]) -> int:
    """Numbers that it takes to store an adapter.

    Args:
        leased: Module to (k_out, k_in) of the basis that it was trained in; there a rank costs K_out + K_in.
    """
    return sum(
        update.rank * sum(leased[name]) if min(leased.get(name, (0, 0))) else update.numbers
        for name, update in adapter.modules.items()
    )


def chosen(
    candidates: Mapping[str, Adapter],
    score: Callable[[Adapter], Sequence[float]],
    loss_max: float,
    numbers: Callable[[str, Adapter], int] = lambda method, adapter: adapter.numbers,
    metric: Metric = "probability",
    train_on: Callable[[str, Adapter], Adapter | None] = lambda method, cut: None,
) -> tuple[Form, tuple[str, ...]]:
    """The form to keep, and why, in lines.

    First the smallest cut that is good enough is found. Then, of the candidates that are good enough, the one with the
    fewest numbers first, the smallest cut that takes fewer numbers still and is good enough after it was trained on.

    Args:
        candidates: Method to trained adapter, at least one.
        score: Each validation row's share in the score of an adapter; higher is better.
        loss_max: Of the task, see `acceptable`.
        numbers: Numbers that it takes to store an adapter of a method.
        metric: That of `score`.
        train_on: Trains a cut of a method's candidate on, see `recovery`; None where that failed.

    Cost:
        For each candidate at most 1 + log2(`SHARES`) scores: a form that keeps more is taken to score no worse. At most
        `TRIES` trainings of those in `RECOVERED`.
    """

    def form(method: str, share: float, adapter: Adapter) -> Form:
        return Form(method, share, adapter, numbers(method, adapter), tuple(score(adapter)))

    whole = {method: form(method, 1.0, adapter) for method, adapter in candidates.items()}
    best = max(whole.values(), key=lambda one: one.score)
    accepted = acceptable(loss_max, metric, best.score)
    fits = partial(Form.is_as_good_as, best=best, loss_max=accepted)
    smallest = [_smallest(one, form, partial(fits, whole=one)) for one in whole.values() if fits(one, whole=one)]
    kept = min(smallest, key=lambda one: (one.numbers, -one.score))
    lines = []
    for one in whole.values():
        said = f"auto: {one.method} scores {one.score:.4f} on the validation rows with {one.numbers:,} numbers"
        if one is not best:
            loss, error = one.loss(best)
            said += f"; it loses {loss:.4f} ±{error:.4f}, and at most {accepted:.2g} may be lost in all"
        lines.append(said)
    lines.append(f"auto: {kept.method}, cut to {kept.numbers:,} numbers, scores {kept.score:.4f} there")

    def trained_on(one: Form, cuts: Sequence[tuple[int, Adapter]], place: int) -> Form | None:
        """It had a training of its own, and is compared as candidates are, without a standard error."""
        count, cut = cuts[place]
        if (adapter := train_on(one.method, cut)) is None:
            return None
        found = replace(form(one.method, 1.0, adapter), directions=count)
        is_kept = found.loss(best)[0] <= accepted
        lines.append(
            f"auto: {one.method}, cut to {found.numbers:,} numbers and trained on, scores {found.score:.4f} there"
            f"{'' if is_kept else ', too little'}"
        )
        return found if is_kept else None

    for one in sorted(whole.values(), key=lambda one: one.numbers):
        if one.method not in RECOVERED or not fits(one, whole=one):
            continue
        counts = [max(1, round(size * one.adapter.directions)) for size in SIZES]
        all_cuts = [(count, leading(one.adapter, count)) for count in counts]
        cuts = [(count, cut) for count, cut in all_cuts if numbers(one.method, cut) < kept.numbers]
        kept = _first(partial(trained_on, one, cuts), len(cuts)) or kept
    return kept, tuple(lines)


def forms(adapter: Adapter) -> Iterator[Adapter]:
    """The adapter cut to each of `SHARES` of its energy, smallest first; the last is the adapter itself."""
    return (cut(adapter, share) for share in SHARES)


def sized(adapter: Adapter, share: float) -> Adapter:
    """The adapter cut to a share of its energy that its score was found to need; no merge takes anything from it."""
    kept = cut(adapter, share)
    return replace(kept, info=dict(kept.info) | {SIZED: "score"})


def cut(adapter: Adapter, share: float) -> Adapter:
    """The adapter with its largest singular values, of all modules together, that hold a share of its energy."""
    if share == 1.0:
        return adapter
    whole_C, _ = _energies(adapter).sort(descending=True)
    return leading(adapter, int((whole_C.cumsum(0) < share * whole_C.sum()).sum()) + 1)


def leading(adapter: Adapter, count: int) -> Adapter:
    """The adapter with so many singular values, the largest of all modules together."""
    names = list(adapter.modules)
    of_module = torch.cat([torch.full((adapter.modules[name].rank,), place) for place, name in enumerate(names)])
    order = _energies(adapter).sort(descending=True).indices
    ranks = torch.bincount(of_module[order[:count]], minlength=len(names)).tolist()
    modules = {name: adapter.modules[name].leading(rank) for name, rank in zip(names, ranks, strict=True) if rank}
    return replace(adapter, modules=modules)


def recovery(spec: TaskSpec, cut: Adapter) -> TaskSpec:
    """How a cut of a candidate is trained on: its own directions alone, with steps of the size that they had.

    Args:
        spec: With the candidate's method. A LoRA's layers keep the rank that each has left; in a basis the largest says
            how many are kept.
    """
    training = spec.training
    changes: dict[str, float] = {"num_train_epochs": RECOVERY * training.num_train_epochs}
    if training.max_steps > 0:
        changes["max_steps"] = math.ceil(RECOVERY * training.max_steps)
    if training.warmup_steps >= 1:
        changes["warmup_steps"] = max(1.0, RECOVERY * training.warmup_steps)  # below 1 it is a share of all steps
    rank = 1 if spec.method.name == "lora" else max(update.rank for update in cut.modules.values())
    left = {"r": rank, "lora_alpha": spec.lora.alpha_of(rank), "target_modules": tuple(cut.modules)}
    lora = spec.lora.model_copy(update=left)
    return spec.model_copy(update={"training": training.model_copy(update=changes), "lora": lora})


def _energies(adapter: Adapter) -> torch.Tensor:
    """σ² of all directions, module by module."""
    return torch.cat([update.sigma_R.double().square() for update in adapter.modules.values()])


def _smallest(whole: Form, form: Callable[[str, float, Adapter], Form], fits: Callable[[Form], bool]) -> Form:
    """The smallest form of a candidate that is good enough."""
    sizes = list(forms(whole.adapter))

    def good_enough(place: int) -> Form | None:
        smaller = form(whole.method, SHARES[place], sizes[place])
        return smaller if fits(smaller) else None

    return _first(good_enough, len(sizes) - 1) or whole


def _first(found: Callable[[int], Form | None], count: int) -> Form | None:
    """The first of so many forms, smallest first, that is good enough, by bisection; None where none is found.

    Args:
        found: The form at a place if it is good enough.
    """
    best, low, high = None, 0, count
    while low < high:
        middle = (low + high) // 2
        if (form := found(middle)) is not None:
            best, high = form, middle
        else:
            low = middle + 1
    return best
