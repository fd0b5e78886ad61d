"""The optimisation steps: transformers.Trainer, with our rows, our heartbeats and our checkpoints around it.

Trainer does forward, backward, accumulation, clipping, the schedule, mixed precision, and DeepSpeed through accelerate.
It saves, logs and evaluates nothing here. No Ray, no storage.
"""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from configs.errors import InvalidInput
from configs.task_spec import REGRESSION_KINDS, TaskSpec, TrainingSpec, zero_stage
from workers import training_state
from workers.base_model import BaseModel
from workers.batches import Batches, Schedule, schedule
from workers.checkpoint import Checkpoint, in_steps_of
from workers.deepspeed_engine import check_config, let_go, part, release
from workers.features import collator
from workers.machine import machine_figures, ran_out_of_memory
from workers.orders import Phase, Point, Progress
from workers.rank_group import NOBODY_ELSE, RankGroup
from workers.rows.task_data import Row, label_of

OUTPUT_DIR = str(Path(tempfile.gettempdir()) / "onebasis-trainer")
"""Folder that the Trainer makes; nothing is ever written there, so all processes share it."""
LOG_LINES_PER_TASK = 50
MEAN_ROWS = 10_000
"""Labels that are enough to estimate the mean of any number of them."""
LONG_STEP_SECONDS = 1.0
"""Of a gang's step that is longer, every layer asks all ranks whether the outcome is still wanted."""
SAVE_SECONDS = 300.0
"""Longest time between checkpoints: what a lost machine costs, however slow the steps are."""

Report = Callable[[Progress], None]
Asked = Literal["", "cancel", "preempt"]
ASKED: tuple[Asked, ...] = ("", "preempt", "cancel")
"""In order of precedence, the highest last: a gang does what any of its ranks was asked."""


class Cancelled(Exception):
    """The control plane no longer wants the outcome."""


class Preempted(Exception):
    """The run was stopped, to be continued later; no failure. A checkpoint was handed to `Surroundings.save`."""


class OutOfMemory(InvalidInput):
    """A micro-batch did not fit into memory."""


@dataclass(frozen=True)
class Surroundings:
    """What `fit` needs beside a model and rows; the defaults are for a run that nobody watches."""

    token: str = ""
    group: RankGroup = NOBODY_ELSE
    report: Report = lambda progress: None
    """Takes heartbeats: every step, and with a log line now and then. Called on every rank."""
    asked: Callable[[], Asked] = lambda: ""
    """Request of the control plane; called after every step, and before every layer."""
    after_step: Callable[[int, int], None] = lambda step, steps: None
    """The method's own work after a step; see `workers.methods.Method`."""
    checkpoint: Checkpoint | None = None
    """Checkpoint to go on from."""
    save: Callable[[Checkpoint], None] | None = None
    """Takes checkpoints; called on rank 0 only. None, on every rank: no checkpoints are made."""
    run: str = ""
    method: str = ""
    basis_version: int = 0
    """Run, method and basis version that checkpoints record."""
    halvings: int = 0
    """How often the micro-batch was halved because memory ran out."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Results of the optimisation steps, beside the weights."""

    steps: int = 0
    train_loss: float = math.nan
    """Mean over all steps."""
    first_step_at: float = 0.0
    resumed_from: int = 0
    """Step of the checkpoint it went on from."""
    engine: Any = None
    """DeepSpeed's engine, to be destroyed once the weights are read."""


def fit(model: Any, base: BaseModel, rows: Sequence[Row], spec: TaskSpec, around: Surroundings) -> TrainingRun:
    """Train a prepared PEFT model in place. All ranks of the group must call it.

    Raises:
        InvalidInput: The loss is no longer a number. Or this base model, this GPU or DeepSpeed cannot train with these
            settings.
        OutOfMemory: The message has the numbers and the settings to change.
        Cancelled: Between two layers of a step; on several ranks between two steps where these are short.
        Preempted: Between two steps.
    """
    group, begun, config = around.group, around.checkpoint, spec.training.deepspeed
    check_config(config, spec.training.bf16, base.is_quantized)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the task before may have taken more
    plan = schedule(spec.training, len(rows), group.rank, around.halvings)
    if spec.kind in REGRESSION_KINDS:
        _start_at_the_mean(model, rows)
    if begun is not None:
        begun = in_steps_of(begun, spec.training, group.rank.size)
        around = replace(around, checkpoint=begun)
        training_state.put_values(model, begun)
        if begun.step >= plan.steps:  # the interruption came after its last step
            return TrainingRun(
                steps=begun.step,
                train_loss=begun.loss_sum / begun.step,
                first_step_at=time.time(),
                resumed_from=begun.step,
            )
    steps = _Steps(plan, spec, around)
    try:
        if zero_stage(config) == 3:
            part(model, config or {}, torch.bfloat16 if spec.training.bf16 else None)
        trainer = _Trainer(
            model=model,
            args=training_arguments(spec.training, plan),
            batches=Batches(plan, rows, collator(base, spec), begun.step if begun else 0),
            counts_tokens=spec.kind == "causal_lm",
            callbacks=[steps],
        )
        steps.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        with _heard_inside_a_step(model, around, steps):
            _run(trainer, plan)
        if steps.ended:
            raise Cancelled if steps.ended == "cancel" else Preempted
    except BaseException:
        engine = getattr(steps.trainer, "model_wrapped", None)
        if hasattr(engine, "destroy"):
            release(engine)
        elif zero_stage(config) == 3:
            let_go(model)
        raise
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
    done = begun.step if begun else 0
    return TrainingRun(
        steps=plan.steps,
        train_loss=steps.loss_sum / plan.steps,
        first_step_at=steps.first_step_at,
        resumed_from=done,
        engine=engine,
    )


def _start_at_the_mean(model: Any, rows: Sequence[Row]) -> None:
    """Let a fresh regression head begin with the mean of the labels as its bias, where it has one: of each number.

    Else every layer learns the mean first and the pooler's tanh is saturated by then: STS-B (0 to 5, 200 steps, r 8,
    rate 1e-3) ended at Pearson -0.19, and 0.79 with this. A head that was trained before is left as it is.
    """
    some = rows[:: max(1, len(rows) // MEAN_ROWS)]
    labels = torch.tensor([label_of(row) for row in some], dtype=torch.float64)
    mean_L = labels.reshape(len(some), -1).mean(dim=0)
    for name, parameter in training_state.trained_parameters(model).items():
        is_bias = name.endswith("bias") and parameter.shape == mean_L.shape
        if is_bias and not parameter.any():
            parameter.data.copy_(mean_L)


@contextlib.contextmanager
def _heard_inside_a_step(model: Any, around: Surroundings, steps: _Steps) -> Iterator[None]:
    """Stop at the next layer when the outcome is no longer wanted: a step of a large model takes longer than anybody
    waits.

    Ranks stop at the same layer: one that stopped by itself would leave the others waiting for it in a collective. They
    ask each other in the first step and in those that follow a long one; there a message of a few bytes in each layer
    is nothing beside the layer.
    """
    group = around.group

    def look(*_: Any) -> None:
        wanted = around.asked() == "cancel"
        if group.rank.size > 1:
            wanted = steps.are_long and bool(group.max([wanted])[0])
        if wanted:
            raise Cancelled

    handles = [layer.register_forward_pre_hook(look) for layer in _layers(model, group)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any, group: RankGroup) -> list[Any]:
    """The layers of a model's encoders and decoders, through which each micro-batch goes in turn.

    Experts inside a layer are none of them: which of those a micro-batch visits differs from rank to rank. So do the
    layers themselves where some are left out by chance.
    """
    if group.rank.size > 1 and any(value for name, value in vars(model.config).items() if name.endswith("layerdrop")):
        return []
    lists = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    outermost = [part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [layer for part in outermost for layer in part]


def _run(trainer: Any, plan: Schedule) -> None:
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise _out_of_memory(error, plan) from error
    finally:
        unset_hf_deepspeed_config()  # at stage 3 the next model made in this process would be partitioned as it is made


def training_arguments(training: TrainingSpec, plan: Schedule) -> TrainingArguments:
    """The task's values under their own names, and what we decide: no saving, no reporting, no evaluation."""
    on_gpu = torch.cuda.is_available()
    if training.bf16 and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InvalidInput(
            f"this GPU does not compute in bfloat16: {torch.cuda.get_device_name()}", "training.bf16", "set it to false"
        )
    values = training.model_dump(exclude={"gradient_checkpointing", "auto_find_batch_size", "save_steps"})
    values |= {
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.rows_per_micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
    }
    if training.gradient_checkpointing:  # transformers 5 warns of the old name and drops it in 6
        values |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=OUTPUT_DIR,
        **values,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the GPU in every micro-batch; `_log` looks now and then
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # before every forward; every rank has the same ones, and a basis is large
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the model is copied to all GPUs that this process sees, each step
    return arguments


class _Trainer(Trainer):  # type: ignore[misc]
    """Takes its batches as they are, and keeps the sums that people want to see."""

    def __init__(self, *, batches: Batches, counts_tokens: bool, **options: Any) -> None:
        super().__init__(train_dataset=batches.rows, **options)
        # A step's loss is the mean over its completion tokens, else over its rows, however it is cut into
        # micro-batches. Trainer counts labels as if they were shifted tokens for classifiers of the Llama kind too.
        self.model_accepts_loss_kwargs = counts_tokens
        self._batches = batches
        self.loss_sum: Any = 0.0
        """Sum of this rank's losses since it was last set to 0; on the device, so that no step waits for it."""
        self.tokens = 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if not self.is_deepspeed_enabled:
            self.accelerator.unwrap_model = _without_wrappers

    def get_train_dataloader(self) -> Any:
        return self._batches

    def _prepare_input(self, data: Any) -> Any:
        if torch.is_tensor(data) and data.is_cpu and self.args.device.type == "cuda":
            # A plain copy waits until the GPU has done all it was given.
            data = data.pin_memory().to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        if "attention_mask" in inputs:
            self.tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_sum = self.loss_sum + loss
        return loss


def _without_wrappers(model: Any, *_: Any, **__: Any) -> Any:
    """The model that was handed in, for a run without DeepSpeed.

    accelerate's own imports DeepSpeed wherever it is installed, to look for its wrapper: two seconds of CPU in each
    process that trains.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


class _Steps(TrainerCallback):  # type: ignore[misc]
    """What happens around each step: resuming before the first, then the method's work, checkpoints, heartbeats."""

    def __init__(self, plan: Schedule, spec: TaskSpec, around: Surroundings) -> None:
        self.trainer: Any = None
        self.first_step_at = 0.0
        self.ended: Asked = ""
        self.are_long = True
        """Whether the step before took long on some rank; nobody knows it of the first."""
        self._began_at = 0.0
        self._plan = plan
        self._training = spec.training
        self._around = around
        self._begun_at = around.checkpoint.step if around.checkpoint else 0
        self.loss_sum = around.checkpoint.loss_sum if around.checkpoint else 0.0
        self._logged_at = self._begun_at
        self._progress = Progress(token=around.token, phase=Phase.TRAINING, step=self._begun_at, steps=plan.steps)
        self._save_every = _every(spec.training.save_steps, plan.steps)
        self._saved_at = time.monotonic()
        self._log_every = max(1, plan.steps // LOG_LINES_PER_TASK)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        group = self._around.group
        torch.manual_seed(self._training.seed + group.rank.index)  # ranks must not drop out the same units
        if self._around.checkpoint is not None:
            training_state.put_back(self.trainer, group, self._around.checkpoint)
            state.global_step = self._around.checkpoint.step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_at = time.monotonic()
        if not self.first_step_at:
            self.first_step_at = time.time()
            machine_figures()  # the use of the CPU is measured between two calls
            self._progress = replace(self._progress, first_step_at=self.first_step_at)
            self._around.report(self._progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, steps = state.global_step, self._plan.steps
        self._around.after_step(step, steps)
        wanted = ASKED.index(self._around.asked())
        now = time.monotonic()
        code, unsaved, took = self._around.group.max([wanted, now - self._saved_at, now - self._began_at])
        asked, overdue, self.are_long = ASKED[int(code)], unsaved > SAVE_SECONDS, took > LONG_STEP_SECONDS
        is_last = step >= steps
        seconds = max(time.time() - self.first_step_at, 1e-9)
        done = step - self._begun_at
        self._progress = replace(
            self._progress,
            step=step,
            samples_per_second=done * self._plan.rows_per_step / seconds,
            seconds_left=seconds / done * (steps - step),
        )
        if step == self._begun_at + 1 or step % self._log_every == 0 or is_last:
            self._log(step, args.learning_rate)
        if self._around.save and asked != "cancel" and (is_last or asked or overdue or step % self._save_every == 0):
            self._log(step, args.learning_rate)
            self._save(step)
        self._around.report(self._progress)
        if asked and not is_last:
            self.ended = asked
            control.should_training_stop = True

    def _log(self, step: int, peak: float) -> None:
        """Collect the sums from the device and the other ranks; report them, with a line for people."""
        if step == self._logged_at:
            return
        group, trainer = self._around.group, self.trainer
        loss, tokens = group.sum([float(trainer.loss_sum) / group.rank.size, trainer.tokens])
        memory = int(group.max([_memory_bytes()])[0])
        self.loss_sum += loss
        trainer.loss_sum = 0.0
        mean = loss / (step - self._logged_at)
        self._logged_at = step
        if not math.isfinite(mean):
            raise InvalidInput(
                f"the loss is {mean} at step {step} of {self._plan.steps}",
                "training.learning_rate",
                f"lower it (it is {peak:g}), or set training.max_grad_norm",
            )
        seconds = max(time.time() - self.first_step_at, 1e-9)
        rate = float(trainer.lr_scheduler.get_last_lr()[0])
        self._progress = replace(
            self._progress,
            loss=mean,
            learning_rate=rate,
            tokens_per_second=tokens / seconds if tokens else math.nan,
            memory_bytes=memory,
        )
        now = self._progress
        point = Point(
            at=time.time(),
            step=step,
            loss=mean,
            learning_rate=rate,
            steps=now.steps,
            samples_per_second=now.samples_per_second,
            tokens_per_second=now.tokens_per_second,
            memory_bytes=now.memory_bytes,
            resumed_from=self._begun_at,
            method=self._around.method,
            machine=machine_figures(),
        )
        self._around.report(replace(now, log_lines=(point,)))

    def _save(self, step: int) -> None:
        around = self._around
        taken = training_state.take(
            self.trainer,
            around.group,
            step=step,
            run=around.run,
            method=around.method,
            basis_version=around.basis_version,
            loss_sum=self.loss_sum,
        )
        if around.group.rank.leads and around.save:
            around.save(taken)
        self._saved_at = time.monotonic()


def _every(save_steps: float, steps: int) -> int:
    """TrainingArguments' meaning: below 1 it is a share of all steps."""
    return max(1, int(save_steps if save_steps >= 1 else save_steps * steps))


def free_memory() -> None:
    """Free what a run left in reference cycles (as its trainer), and GPU memory that torch keeps for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_bytes() -> float:
    """Most memory taken: the GPU's by this run, or this process's where there is no GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _out_of_memory(error: Exception, plan: Schedule) -> OutOfMemory:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        numbers = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU are free"
    else:
        numbers = f"this process took {_memory_bytes() / 2**30:.1f} GiB at most"
    said = (str(error) or type(error).__name__).splitlines()[0]  # Python's own MemoryError says nothing
    return OutOfMemory(
        f"memory ran out with {plan.rows_per_micro_batch} rows at once; {numbers}: {said[:300]}",
        "training.per_device_train_batch_size",
        "halve it and double training.gradient_accumulation_steps (training.auto_find_batch_size: true does so by "
        "itself), set training.gradient_checkpointing: true, or lower data.max_length",
    )
