"""Score a model on frozen rows.

The same rows, model and machine give the same score: rows are put into batches by length, in a fixed order, and
nothing is drawn. A score after training and the score of a version come from the same function on the same kind of
model, so that their difference is what merging cost and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from configs.errors import InvalidInput
from configs.task_spec import REGRESSION_KINDS, TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.formats.peft import to_peft
from subspace_store.storage.protocol import Storage
from workers import metrics
from workers.base_model import BaseModel
from workers.deepspeed_engine import parted
from workers.features import IGNORED, collator
from workers.metrics import GENERATED, Measure
from workers.orders import Evaluate, Rank, Train
from workers.peft_model import TASK_TYPES, put_tensors, with_lora
from workers.results import Results, write_results
from workers.rows.frozen_rows import EvaluationRows
from workers.rows.task_data import CompletionRow, Row
from workers.tokens import encode_prompt, lengths
from workers.truncation import check_answers, losses, losses_of_generation

ROWS_PER_BATCH = 64  # rows of similar length; on one CPU core 32 to 128 are equally fast for MiniLM
TOKENS_PER_BATCH = 8192  # padding counted; with a cache of half a megabyte per token (7B, bfloat16) that is 4 GB
LOGITS_PER_BATCH = 2**28  # of a language model: 1 GiB in float32
MeasuredOn = Callable[[slice], dict[str, Measure]]
"""All metrics over some of the rows, from a model's answers to all of them."""


Keep = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Score:
    """What a model got right."""

    value: float
    """Value of the task's own metric."""
    metrics: Mapping[str, float]
    """All metrics of the kind by name; those in `GENERATED` only if the task is judged by one of them."""
    per_row: tuple[float, ...]
    """Each row's share in the value, in the order of the rows: for paired comparisons, see `workers/metrics.py`."""
    of_rows: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Where several revisions brought the rows: id of each to the value on its rows alone, and their number."""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the score doubtful."""

    @property
    def count(self) -> int:
        return len(self.per_row)


def score_adapter(
    base: BaseModel,
    adapter: Adapter,
    rows: Sequence[Row],
    spec: TaskSpec,
    between_batches: Callable[[], None] = lambda: None,
    with_update: bool = True,
) -> Score:
    """Score an adapter, or the base model under the adapter's head.

    Args:
        between_batches: Called before every batch, and before every token of a generated answer; may raise to stop.
        with_update: False leaves ΔW out and keeps the head.

    Raises:
        InvalidInput: The adapter does not fit the base model or the task's labels; or see `score_rows`.
    """
    with parted(adapted_model(base, adapter, spec, with_update), spec.training.deepspeed) as model:
        return score_rows(model, base, rows, spec, between_batches)


def score_served(
    base: BaseModel, served: Adapter, rows: Sequence[Row], spec: TaskSpec, between_batches: Callable[[], None]
) -> Score:
    """Score what a version serves of the revision before this one on this one's rows: a label that it does not know is
    an answer that it never gives. Raises as `score_adapter`."""
    with parted(adapted_model(base, served, spec_of(served, spec)), spec.training.deepspeed) as model:
        return score_rows(model, base, rows, spec, between_batches)


def spec_of(served: Adapter, spec: TaskSpec) -> TaskSpec:
    """A revision's task with the labels of the revision before it: a first part of its own."""
    if not served.label_names:
        return spec
    data = spec.data.model_copy(update={"label_names": served.label_names})
    return spec.model_copy(update={"data": data})


def score_and_keep(
    order: Train | Evaluate,
    base: BaseModel,
    adapter: Adapter,
    rows: EvaluationRows,
    storage: Storage,
    between_batches: Callable[[], None],
    rank: Rank,
    keep: Keep = lambda write: write(),
) -> Score:
    """As `score_adapter`; also keep each row's result under the order's `results_key`, if it has one.

    Args:
        keep: Calls the function that it is given, which writes; see `workers/patience.py`.
    """
    score = score_adapter(base, adapter, rows, order.spec, between_batches)
    if rank.leads:
        keep_results(order, score, rows, storage, keep)
    return score


def keep_results(order: Train | Evaluate, score: Score, rows: EvaluationRows, storage: Storage, keep: Keep) -> None:
    """Keep each row's result under the order's `results_key`, if it has one. keep: As in `score_and_keep`."""
    if order.results_key:
        version = order.version if isinstance(order, Evaluate) else 0
        results = Results(
            task_id=order.task_id,
            version=version,
            metric=order.spec.metric,
            eval_sha256=rows.sha256,
            per_row=score.per_row,
        )
        keep(lambda: write_results(storage, order.results_key, results))


def score_rows(
    model: Any,
    base: BaseModel,
    rows: Sequence[Row],
    spec: TaskSpec,
    between_batches: Callable[[], None] = lambda: None,
) -> Score:
    """Let a task's model answer every row, and compare.

    Args:
        base: Base model whose tokenizer or image processor reads the rows.
        between_batches: See `score_adapter`.

    Returns:
        The score by the definitions in `workers/metrics.py`, a finite number.

    Raises:
        InvalidInput: The model's output for a row is NaN or infinite: a broken model has no score rather than a bad
            one, which could be as bad as the one before merging and pass the gate. Or the completions have no tokens.
    """
    model.eval()
    reading = Reading.of(base, rows, spec)
    with torch.inference_mode():
        if spec.kind == "causal_lm":
            measured_on = _likelihood(model, base, rows, reading.counts, spec, between_batches)
        else:
            found = Predictions(len(rows), spec)
            predict(model, base, rows, batches_by_length(reading.counts), found, between_batches)
            measured_on = found.measured_on()
    return scored(measured_on, rows, spec, reading)


@dataclass(frozen=True)
class Reading:
    """What a model reads of the rows that it is scored on."""

    counts: tuple[int, ...]
    """Tokens of each row."""
    warnings: tuple[str, ...]
    """Sentences on what is not read."""

    @staticmethod
    def of(base: BaseModel, rows: Sequence[Row], spec: TaskSpec) -> Reading:
        """Raises InvalidInput where the completions have no tokens."""
        measured = lengths(base.tokenizer, spec, rows)
        check_answers(measured, spec, base.name, "evaluation rows", each=False)
        warnings = (*losses(measured, spec, "evaluation rows"), *losses_of_generation(measured, spec, base.length_max))
        return Reading(tuple(length.read(spec.data.max_length) for length in measured), warnings)


def scored(measured_on: MeasuredOn, rows: Sequence[Row], spec: TaskSpec, reading: Reading) -> Score:
    """The score of a task whose rows are all answered."""
    measures = measured_on(slice(None))
    chosen = measures[spec.metric]
    parts = rows.of_revisions if isinstance(rows, EvaluationRows) else {}
    of_rows = {
        brought_by: (measured_on(places)[spec.metric].value, places.stop - places.start)
        for brought_by, places in parts.items()
    }
    return Score(chosen.value, metrics.values(measures), tuple(chosen.per_row.tolist()), of_rows, reading.warnings)


class Predictions:
    """What a task predicts of each of its rows, which may come in any batches; what comes again takes the place.

    Args:
        count: Number of rows.
    """

    def __init__(self, count: int, spec: TaskSpec) -> None:
        self.spec = spec
        self._expected: list[Any] = [0] * count
        self._predicted: list[Any] = [0] * count
        self._of_right = [0.0] * count
        self._is_number = [True] * count

    def take(self, chosen: Sequence[int], labels: Sequence[Any], logits_SL: Tensor) -> None:
        """Take the outputs for the rows `chosen`, whose labels are given."""
        regression, spec = self.spec.kind in REGRESSION_KINDS, self.spec
        said_S = logits_SL.squeeze(-1) if spec.kind == "sequence_regression" else logits_SL
        answers = said_S if regression else logits_SL.argmax(dim=-1)
        numbers = logits_SL.isfinite().all(dim=-1).tolist()
        for index, label, answer, is_number in zip(chosen, labels, answers.tolist(), numbers, strict=True):
            self._expected[index], self._predicted[index], self._is_number[index] = label, answer, is_number
        if regression:
            return
        if (unknown := len(spec.data.label_names) - logits_SL.shape[-1]) > 0:  # labels that this model never gives
            logits_SL = torch.nn.functional.pad(logits_SL, (0, unknown), value=-torch.inf)
        of_label = logits_SL.float().softmax(dim=-1).gather(1, torch.tensor(labels, device=logits_SL.device)[:, None])
        for index, value in zip(chosen, of_label.squeeze(-1).tolist(), strict=True):
            self._of_right[index] = value

    def measured_on(self) -> MeasuredOn:
        """Raises InvalidInput where an output is no number."""
        expected, predicted, of_right, spec = self._expected, self._predicted, self._of_right, self.spec
        broken = [index for index, is_number in enumerate(self._is_number) if not is_number]
        _check_numbers(broken, len(expected), spec)
        if spec.kind == "sequence_regression":
            return lambda part: metrics.regression(expected[part], predicted[part])
        if spec.kind == "image_regression":
            return lambda part: metrics.vectors(expected[part], predicted[part], spec.data.pck_distance)
        labels_count = len(spec.data.label_names)
        return lambda part: metrics.classification(expected[part], predicted[part], of_right[part], labels_count)


def predict(
    model: Any,
    base: BaseModel,
    rows: Sequence[Row],
    batches: Iterable[Sequence[int]],
    found: Predictions,
    between_batches: Callable[[], None],
) -> None:
    """Let a task's own model answer some batches of its rows, given by their places."""
    collate = collator(base, found.spec)
    for chosen in batches:
        between_batches()
        batch = collate(rows[index] for index in chosen)
        labels = batch.pop("labels").tolist()
        found.take(chosen, labels, model(**on_device(model.device, batch)).logits)


def _likelihood(
    model: Any,
    base: BaseModel,
    rows: Sequence[Any],
    counts: Sequence[int],
    spec: TaskSpec,
    between_batches: Callable[[], None],
) -> MeasuredOn:
    collate = collator(base, spec)
    sums, scored_counts = [0.0] * len(rows), [0] * len(rows)
    tokens_max = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // len(base.tokenizer))
    for chosen in batches_by_length(counts, tokens_max):
        between_batches()
        batch = on_device(model.device, collate(rows[index] for index in chosen))
        labels_RT = batch.pop("labels")[:, 1:]
        logits_RTV = model(**batch).logits[:, :-1]
        for index, logits_TV, labels_T in zip(chosen, logits_RTV, labels_RT, strict=True):  # one row in float32 at once
            scored = labels_T != IGNORED
            sums[index] = _log_probability(logits_TV[scored], labels_T[scored])
            scored_counts[index] = int(scored.sum())
    _check_numbers([index for index, value in enumerate(sums) if value != value], len(rows), spec)
    if spec.metric not in GENERATED:
        return lambda part: metrics.likelihood(sums[part], scored_counts[part])
    completions = [row.completion for row in rows if isinstance(row, CompletionRow)]
    texts = generate(model, base, rows, spec, between_batches)
    return lambda part: (
        metrics.likelihood(sums[part], scored_counts[part]) | metrics.answers(completions[part], texts[part])
    )


def _log_probability(logits_TV: Tensor, labels_T: Tensor) -> float:
    """Log-probability of all labels, each at least `metrics.LOG_PROBABILITY_MIN`; NaN where an output is no number."""
    of_labels_T = logits_TV.float().log_softmax(dim=-1).gather(1, labels_T[:, None])
    return float(of_labels_T.clamp(min=metrics.LOG_PROBABILITY_MIN).double().sum())


def _check_numbers(broken: Sequence[int], count: int, spec: TaskSpec) -> None:
    """Refuse a model that put out NaN or infinity for these rows."""
    if broken:
        raise InvalidInput(
            f"{spec.metric} cannot be computed: for {len(broken)} of {count} evaluation rows, one of them row "
            f"{min(broken) + 1}, the model's output is no number",
            "training.learning_rate",
            "lower it, or set training.bf16 to false; if it came with merging, see what it was merged with",
        )


def generate(
    model: Any,
    base: BaseModel,
    rows: Sequence[Any],
    spec: TaskSpec,
    between_batches: Callable[[], None] = lambda: None,
) -> list[str]:
    """A language model's answer to each row's prompt, by greedy decoding: always the likeliest token.

    Args:
        between_batches: Called before every token.

    Returns:
        Texts without the end token, in the order of the rows; of at most data.max_new_tokens tokens.

    Cost:
        One pass over each prompt, then one per token over the rows of a batch.
    """
    new_max = spec.data.max_new_tokens
    prompt_max = min(spec.data.max_length, base.length_max - new_max)  # both need positions
    prompts = [encode_prompt(base.tokenizer, row, prompt_max) for row in rows]
    texts = [""] * len(rows)
    for chosen in batches_by_length([len(prompt) + new_max for prompt in prompts]):
        answers = _written(model, base.tokenizer, [prompts[index] for index in chosen], new_max, between_batches)
        for index, text in zip(chosen, base.tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[index] = text
    return texts


def _written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_max: int,
    between_tokens: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens that a language model writes after each prompt, all prompts in one batch: always the likeliest token.

    Args:
        new_max: Most tokens of an answer.
        between_tokens: Called before every token; may raise to stop.

    Returns:
        Token ids, the end token and padding after it among them.
    """
    from transformers import GenerationConfig

    # The checkpoint's own generation settings may sample, or penalise repetition; and training switched the cache off.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_max,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    width = max(map(len, prompts))

    def over(token_ids: Tensor, _: Any) -> Tensor:
        between_tokens()
        return torch.zeros(len(token_ids), dtype=torch.bool, device=token_ids.device)

    prompts_ST, mask_ST = left_padded(prompts, tokenizer.pad_token_id, model.device)
    with torch.inference_mode():
        ids_ST = model.generate(input_ids=prompts_ST, attention_mask=mask_ST, stopping_criteria=[over])
    answers: list[list[int]] = ids_ST[:, width:].tolist()
    return answers


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of prompts that all end at the right, S×T, and the mask of those that are their own."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batches_by_length(counts: Sequence[int], tokens_max: int = TOKENS_PER_BATCH) -> list[list[int]]:
    """Indices of rows, short rows first, in batches of at most `ROWS_PER_BATCH` rows and `tokens_max` tokens.

    Args:
        counts: Tokens per row. A row with more than tokens_max is a batch by itself.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(counts)), key=lambda place: (counts[place], place)):
        rows = len(batches[-1]) if batches else ROWS_PER_BATCH
        if rows == ROWS_PER_BATCH or (rows + 1) * counts[index] > tokens_max:
            batches.append([])
        batches[-1].append(index)
    return batches


def on_device(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch where a model is."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def adapted_model(base: BaseModel, adapter: Adapter, spec: TaskSpec, with_update: bool = True) -> Any:
    """A task model with an adapter and its head in it.

    Args:
        with_update: False leaves ΔW out and keeps the head: the base model's score under the task's own head.

    Raises:
        InvalidInput: A module does not fit the base model: its name is in the message. Or see `heads.check_head`.
    """
    model = base.task_model(spec, adapter=adapter)
    if not with_update:
        return model
    config, tensors = to_peft(replace(adapter, head={}))  # the head is in the model: PEFT need not copy it
    task_type = TASK_TYPES[spec.kind] if spec.kind == "causal_lm" else None  # SEQ_CLS would save a head all the same
    model = with_lora(model, LoraConfig(**config | {"task_type": task_type}))
    put_tensors(model, tensors)
    return model
