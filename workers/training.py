"""One training order, from frozen rows to an adapter in staging.

The page reads in the order things happen: read the rows, prepare the model, train, take the adapter out, score it,
stage it. transformers.Trainer does the steps; here is what goes in and what comes out. No Ray.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec, TrainingSpec
from subspace_store.adapter import Adapter
from subspace_store.storage import Storage
from subspace_store.version import BlobRef
from workers.base_model import BaseModel
from workers.deepspeed_engine import deepspeed_process
from workers.evaluation import Score, adapted_classifier, score_rows
from workers.features import collator
from workers.methods import Given, Method, import_adapter, lora
from workers.orders import Progress, Train, Trained
from workers.task_data import TextRow, read_rows

METHODS: dict[str, Method] = {"lora": lora, "import": import_adapter}
LOG_LINES_PER_TASK = 50

Report = Callable[[Progress], None]
Stage = Callable[[str, Adapter], BlobRef]


class Cancelled(Exception):
    """The control plane no longer wants the outcome."""


@dataclass(frozen=True)
class TrainingRun:
    """What the optimisation steps left behind beside the weights."""

    steps: int = 0
    train_loss: float = math.nan
    first_step_at: float = 0.0


def train_task(
    order: Train, base: BaseModel, storage: Storage, stage: Stage, report: Report, cancelled: Callable[[], bool]
) -> Trained:
    """Do the order.

    Args:
        stage: Writes an adapter under a key, reads it back and says what is there (`SubspaceStore.stage`).
        report: Takes heartbeats: in every step, and with a log line now and then.
        cancelled: Asked between steps and between batches.

    Returns:
        Where the adapter is and how it scores before merging. The same order, seed and machine give the same bytes.

    Raises:
        InvalidInput: The rows, the target modules, the adapter to import or the learning rate are wrong.
        Unavailable: The storage was away; the order may be given again.
        Cancelled: Asked for in between.
        Corrupt: The staged bytes are not what was written.
    """
    started = time.monotonic()
    spec = order.spec
    method = METHODS[spec.method.name]
    check_lengths(base, spec)
    run = TrainingRun()
    with deepspeed_process(spec.training.deepspeed):
        report(Progress(order.token, "loading", log_lines=(f"task {order.task_id}: method {spec.method.name}",)))
        frozen = storage.read(order.train_key) if order.train_key else b""
        prepared = method.prepare(base, spec, Given(frozen=frozen))
        if method.TRAINS:
            rows = read_rows(frozen, spec.data, "training rows")
            run = fit(prepared, base, rows, spec, order.token, report, cancelled)
        adapter = method.finish(prepared, base, spec)
    del prepared
    count, local, alone = _scores(order, adapter, base, storage, report, cancelled)
    report(Progress(order.token, "saving", run.steps, run.steps, run.train_loss, first_step_at=run.first_step_at))
    staged = stage(order.staging_key, adapter)
    return Trained(
        order.token,
        order.staging_key,
        staged.sha256,
        adapter.parameter_count,
        count,
        local,
        alone,
        run.steps,
        run.train_loss,
        time.monotonic() - started,
        run.first_step_at,
    )


def check_lengths(base: BaseModel, spec: TaskSpec) -> None:
    """Refuse inputs longer than the base model has positions for."""
    if spec.data.max_length > base.length_max:
        raise InvalidInput(
            f"{spec.data.max_length} tokens are more than the base model {base.name!r} reads",
            "data.max_length",
            f"set it to {base.length_max} or less",
        )


def fit(
    model: Any,
    base: BaseModel,
    rows: tuple[TextRow, ...],
    spec: TaskSpec,
    token: str,
    report: Report,
    cancelled: Callable[[], bool],
) -> TrainingRun:
    """Train a prepared PEFT model in place.

    Raises:
        InvalidInput: The loss is no longer a number, or the machine's memory is too small for the batch.
        Cancelled: Between two steps.
    """

    heartbeat = _Heartbeat(token, spec.training, report, cancelled)
    with tempfile.TemporaryDirectory(prefix="onebasis-trainer-") as folder:  # stays empty: nothing is saved
        trainer = Trainer(
            model=model,
            args=training_arguments(spec.training, folder),
            train_dataset=list(rows),
            data_collator=collator(base, spec),
            callbacks=[heartbeat],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            result = trainer.train()
        except torch.OutOfMemoryError as error:
            raise InvalidInput(
                f"the batch does not fit into memory: {error}",
                "training.per_device_train_batch_size",
                "halve it and double training.gradient_accumulation_steps",
            ) from error
    if cancelled():
        raise Cancelled
    return TrainingRun(result.global_step, float(result.training_loss), heartbeat.first_step_at)


def training_arguments(training: TrainingSpec, folder: str) -> TrainingArguments:
    """The task's values under their own names, and what is ours to decide: no saving, no reporting, no evaluation."""
    on_gpu = torch.cuda.is_available()
    values = training.model_dump(exclude={"gradient_checkpointing", "auto_find_batch_size", "save_steps"})
    if training.gradient_checkpointing:  # transformers 5 warns of the old name and drops it in 6
        values |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=folder,
        **values,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=1 / LOG_LINES_PER_TASK,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would replace a NaN by the mean of the steps before
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=0,  # tokenising a batch takes 1 ms, starting a process more than the first step
    )


class _Heartbeat(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's events into progress, and a loss that is no number into an error."""

    def __init__(self, token: str, training: TrainingSpec, report: Report, cancelled: Callable[[], bool]) -> None:
        self.first_step_at = 0.0
        self._rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        self._report = report
        self._cancelled = cancelled
        self._progress = Progress(token, "training")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.first_step_at:
            self.first_step_at = time.time()
            self._progress = replace(self._progress, steps=state.max_steps, first_step_at=self.first_step_at)
            self._report(self._progress)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self._cancelled()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = max(time.time() - self.first_step_at, 1e-9)
        self._progress = replace(
            self._progress,
            step=state.global_step,
            samples_per_second=state.global_step * self._rows_per_step / seconds,
            seconds_left=seconds / state.global_step * (state.max_steps - state.global_step),
        )
        self._report(self._progress)
        control.should_training_stop |= self._cancelled()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss, rate = float(logs["loss"]), float(logs.get("learning_rate", math.nan))
        if not math.isfinite(loss):
            raise InvalidInput(
                f"the loss is {loss} at step {state.global_step} of {state.max_steps}",
                "training.learning_rate",
                f"lower it (it is {args.learning_rate:g}), or set training.max_grad_norm",
            )
        self._progress = replace(self._progress, loss=loss, learning_rate=rate)
        line = f"step {state.global_step}/{state.max_steps} loss {loss:.4f} learning rate {rate:.2e}"
        self._report(replace(self._progress, log_lines=(line,)))


def _scores(
    order: Train,
    adapter: Adapter,
    base: BaseModel,
    storage: Storage,
    report: Report,
    cancelled: Callable[[], bool],
) -> tuple[int, float, float]:
    """(rows, local score, base score); NaN when the order has no evaluation rows."""
    if not order.eval_key:
        return 0, math.nan, math.nan
    report(Progress(order.token, "scoring"))
    rows = read_rows(storage.read(order.eval_key), order.spec.data, "evaluation rows")
    local = score_adapter(base, adapter, rows, order.spec, cancelled)
    alone = score_adapter(base, adapter, rows, order.spec, cancelled, with_update=False)
    return local.count, local.value, alone.value


def score_adapter(
    base: BaseModel,
    adapter: Adapter,
    rows: tuple[TextRow, ...],
    spec: TaskSpec,
    cancelled: Callable[[], bool],
    with_update: bool = True,
) -> Score:
    """Score an adapter, or the base model under the adapter's head.

    Raises:
        Cancelled: Between two batches.
        InvalidInput: The adapter's head does not fit the task's labels.
    """

    def stop_if_cancelled() -> None:
        if cancelled():
            raise Cancelled

    model = adapted_classifier(base, adapter, spec.data.label_names, with_update)
    return score_rows(model, base.tokenizer, rows, spec.data, spec.metric, stop_if_cancelled)
