"""One worker: a warm base model and one thread that does one order at a time.

A plain class, tested without Ray. `run` is idempotent by the order's token: an order that is running or was done is
waited for and answered, not done again. So a control plane that lost its memory gives its orders again.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.errors import Corrupt, InvalidInput, NotFound, OnebasisError, Unavailable, WorkersBusy
from configs.log_lines import busy_with, warnings_told
from configs.settings import BaseModelSettings, StorageSettings
from configs.task_spec import (
    BROUGHT_KINDS,
    CLASSIFICATION_KINDS,
    IMAGE_KINDS,
    DataSpec,
    Kind,
    LoraSpec,
    TaskSpec,
    TrainingSpec,
)
from subspace_store.adapter import adapter_to_bytes
from subspace_store.digests import digest
from subspace_store.storage.opening import open_storage
from subspace_store.storage.protocol import Storage
from subspace_store.subspace_reader import SubspaceReader
from workers.base_model import BaseModel, load_base_model
from workers.chat_template import template_of
from workers.compatibility import check_lengths
from workers.deepspeed_engine import is_parted
from workers.evaluation import Score, keep_results, score_adapter, score_and_keep
from workers.general_loss import general_loss
from workers.methods import lora
from workers.order_book import OrderBook
from workers.orders import (
    ALONE,
    BaseLayout,
    DoneAt,
    Evaluate,
    Evaluated,
    EvaluatedTogether,
    EvaluateTogether,
    Failed,
    LogLine,
    Order,
    Outcome,
    Phase,
    PhaseTime,
    Progress,
    Rank,
    RowsDamaged,
    Train,
)
from workers.patience import Patience
from workers.rank_group import NOBODY_ELSE, joined
from workers.rows.frozen_rows import EvaluationRows, open_evaluation_rows
from workers.rows.task_data import CompletionRow, ImageRow, Row, TextRow
from workers.tokens import packed
from workers.trainer import Asked, Cancelled, Preempted, Surroundings, fit
from workers.training import stopper, train_task

if TYPE_CHECKING:
    from workers.serving.question import Answer, Question
    from workers.serving.replica import Replica

log = logging.getLogger("onebasis.worker")

LOG_LINES_KEPT = 1000  # between two heartbeats; older lines are dropped first
PHASES_KEPT = 100
"""Phases of one order: a training has four, `auto` some more for each candidate."""
REHEARSED: dict[Kind, tuple[Row, ...]] = {
    "sequence_classification": (TextRow("one", None, 0), TextRow("two", None, 1)),
    "image_classification": tuple(ImageRow(np.zeros((8, 8, 3), np.uint8), label) for label in (0, 1)),
    "causal_lm": (CompletionRow((("user", "one"), ("assistant", "two")), False),) * 2,
}
"""Two rows for each kind that can be the first kind of a base model."""


class Worker:
    """Does orders. Make it, then call `warm` once.

    Args:
        base_model: What to load.
        storage: Where rows, adapters and versions are.
        folder: The subspace's name, see `subspace_store.storage.protocol.open_storage`.
        cpus: Threads for torch.
    """

    def __init__(self, base_model: BaseModelSettings, storage: StorageSettings, folder: str, cpus: float = 1) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take CPUs that belong to other workers
        torch.set_num_threads(max(1, int(cpus)))
        self._settings = base_model
        self._storage: Storage = open_storage(storage, folder)
        self._store: SubspaceReader | None = None
        self._replica: Replica | None = None
        """What answers between two orders, once it was asked for."""
        self._base: BaseModel | None = None
        self._book = OrderBook()
        self._lock = threading.Lock()
        self._wanted: dict[str, Asked] = {}
        """Token to what the control plane asked for."""
        self._progress = Progress()
        self._phases: list[PhaseTime] = []
        """What was done of the order under way, up to the phase before the one that `_progress` tells."""
        self._phase_began = 0.0
        self._log_lines: list[LogLine] = []

    def warm(self) -> BaseLayout:
        """Load the base model, take one tiny training step and score one row, so that no task pays for first use.

        Returns:
            What the control plane needs to know of the base model; a second call returns at once.

        Raises:
            InvalidInput, Unavailable: See `load_base_model`.
        """
        # Answered while an order is under way: a restarted control plane waits for this before it asks for the order.
        base = self._book.between(self._base_model).result() if self._base is None else self._base
        return BaseLayout(
            sha256=base.sha256,
            module_shapes=base.module_shapes(),
            length_max=base.length_max,
            kinds=base.kinds,
            heads=base.heads,
            called=base.called,
            chat_template=template_of(base.tokenizer),
            tokenizer=packed(base.tokenizer),
            rounding=base.rounding(),
        )

    def run(self, order: Order, rank: Rank = ALONE) -> Outcome:
        """Do an order, or wait for the one with the same token.

        Args:
            rank: This process's place in its gang; every rank of the gang must get the order.

        Returns:
            `Trained`, `Evaluated` or `Failed`. The user's mistakes and our bugs are outcomes, not exceptions.

        Raises:
            Unavailable: The storage was away; nothing is remembered, and the order may be given again.
            Corrupt: Stored bytes are not what was written, which is no task's fault; nothing is remembered either.
        """

        def work() -> Outcome:  # in the work thread
            with busy_with(task_id="" if isinstance(order, EvaluateTogether) else order.task_id):
                return self._outcome(order, rank)

        return self._book.run(order.token, work)

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
        """Have published tasks answer rows, in the thread of the orders: two threads must not make models at once.

        Raises:
            WorkersBusy: It does an order, or has not loaded its base model.
        """
        if self._base is None or self._book.is_busy:
            raise WorkersBusy("this worker has something else to do")
        return self._book.between(lambda: self._answered(questions)).result()

    def _answered(self, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
        if self._replica is None:
            from workers.serving.replica import Replica

            self._replica = Replica(self._base_model(), SubspaceReader.open(self._storage))
        self._replica.follow()
        return self._replica.answer(questions)

    def progress(self) -> Progress:
        """What the worker is doing, with the log lines since the call before."""
        with self._lock:
            lines, self._log_lines = tuple(self._log_lines), []
            return replace(self._progress, log_lines=lines)

    def cancel(self, token: str) -> bool:
        """Stop an order at the next layer of a step; its outcome is then `Failed` with fault `cancelled`.

        Returns:
            False when it is done or was never given; then nothing happens.
        """
        if not self._book.is_open(token):
            return False
        with self._lock:
            self._wanted[token] = "cancel"
        return True

    def preempt(self, token: str) -> bool:
        """Stop an order after its current step, with a checkpoint; its outcome is then `Failed` with fault `preempted`.

        Returns:
            False when it is done or was never given; then nothing happens.
        """
        if not self._book.is_open(token):
            return False
        with self._lock:
            self._wanted.setdefault(token, "preempt")
        return True

    def pid(self) -> int:
        """Process id, for people and for tests that kill it."""
        return os.getpid()

    def _outcome(self, order: Order, rank: Rank) -> Outcome:
        """In the work thread: do the order and turn what goes wrong into an outcome."""
        outcome: Outcome
        started = time.monotonic()
        log.info("order %s begins: %s", order.token, type(order).__name__)
        try:
            with warnings_told(self._warn):
                outcome = self._do(order, rank)
        except Cancelled:
            outcome = Failed(token=order.token, fault="cancelled", message="cancelled while it was running")
        except Preempted as error:
            outcome = Failed(token=order.token, fault="preempted", message=str(error) or "its worker was taken from it")
        except RowsDamaged as error:
            outcome = Failed(token=order.token, fault="rows", message=str(error))
        except (Unavailable, Corrupt):
            raise
        except torch.OutOfMemoryError as error:  # while scoring; `fit` raises its own
            told = InvalidInput(
                f"memory ran out while scoring: {str(error).splitlines()[0][:300]}", "data.max_length", "lower it"
            )
            outcome = Failed(token=order.token, fault="input", message=str(told))
        except Exception as error:
            outcome = _failed(order.token, error)
        finally:
            # The lines that are left go with the outcome: a later heartbeat would give them to the next task.
            lines = self.progress().log_lines
            self._report(Progress())
            with self._lock:
                self._wanted.pop(order.token, None)
                phases, self._phases = tuple(self._phases), []
        seconds, done_at = time.monotonic() - started, DoneAt(node=platform.node(), phases=phases)
        how = f"{outcome.fault}: {outcome.message}" if isinstance(outcome, Failed) else type(outcome).__name__
        log.info("order %s ended after %.1f s: %s", order.token, seconds, how)
        if isinstance(outcome, Evaluated | EvaluatedTogether):
            return replace(outcome, worker_seconds=seconds, done_at=done_at)
        return replace(outcome, worker_seconds=seconds, done_at=done_at, log_lines=lines)

    def _do(self, order: Order, rank: Rank) -> Outcome:
        def asked() -> Asked:
            return self._wanted.get(order.token, "")

        if wanted := asked():
            raise Cancelled if wanted == "cancel" else Preempted
        self._report(Progress(token=order.token, phase=Phase.LOADING))
        base, store = self._loaded_base_model(), self._opened_store()
        if isinstance(order, Train):
            return train_task(order, base, self._storage, store, self._report, asked, rank)
        store.refresh()
        if isinstance(order, EvaluateTogether):
            return evaluate_together(order, base, self._storage, store, self._report, asked, rank)
        return evaluate_version(order, base, self._storage, store, self._report, asked, rank)

    def _opened_store(self) -> SubspaceReader:
        """A reader. Opened here and not in the constructor: an actor that cannot be made is harder to wait for."""
        if self._store is None:
            self._store = SubspaceReader.open(self._storage)
        return self._store

    def _loaded_base_model(self) -> BaseModel:
        try:
            return self._base_model()
        except InvalidInput as error:  # the settings are wrong, not the task
            raise RuntimeError(f"this worker cannot load its base model: {error}") from error

    def _base_model(self) -> BaseModel:
        if self._base is None:
            base = load_base_model(self._settings)
            warm_up(base)
            self._base = base
        return self._base

    def _report(self, progress: Progress) -> None:
        with self._lock:
            self._note_phase(progress)
            self._log_lines = [*self._log_lines, *progress.log_lines][-LOG_LINES_KEPT:]
            self._progress = replace(progress, log_lines=())

    def _warn(self, line: str) -> None:
        """Keep a warning with the task: a machine's own log may be gone with it."""
        with self._lock:
            self._log_lines = [*self._log_lines, line][-LOG_LINES_KEPT:]

    def _note_phase(self, progress: Progress) -> None:
        """Where a phase ends, with the next one's first report, keep when it was."""
        before, now = self._progress, time.time()
        if (before.phase, before.candidate) == (progress.phase, progress.candidate):
            return
        if before.phase is not Phase.IDLE and len(self._phases) < PHASES_KEPT:
            ended = PhaseTime(phase=before.phase, candidate=before.candidate, began=self._phase_began, ended=now)
            self._phases.append(ended)
        self._phase_began = now


def evaluate_version(
    order: Evaluate,
    base: BaseModel,
    storage: Storage,
    store: SubspaceReader,
    report: Callable[[Progress], None],
    asked: Callable[[], Asked],
    rank: Rank = ALONE,
) -> Evaluated:
    """Score one task under one version: A[version][task]. From ranks above 0 only the token is used.

    Raises:
        NotFound: The version does not have the task.
        Corrupt: What it reads is gone, or is not what was written.
        Unavailable, Cancelled: As for training.
    """
    started, parted = time.monotonic(), is_parted(order.spec)
    if not parted and not rank.leads:
        return Evaluated(token=order.token, score=math.nan, count=0, seconds=0.0)
    report(Progress(token=order.token, phase=Phase.SCORING))
    rows = _rows(order, base, storage)
    adapter = store.adapter(order.task_id, order.version)
    with joined(rank, order.spec.training.deepspeed) if parted else contextlib.nullcontext(NOBODY_ELSE) as group:
        stop = stopper(lambda: group.agree(asked()))
        keep = Patience(order.token, report, asked)
        score = score_and_keep(order, base, adapter, rows, storage, stop, rank, keep)
        if not parted:
            _keep_features(order, base, storage, rows, keep)
        lost = general_loss(base, adapter, order.spec, order.general_text, stop) if order.general_text else None
    return replace(_evaluated(order, score, time.monotonic() - started), general_loss=lost)


def evaluate_together(
    order: EvaluateTogether,
    base: BaseModel,
    storage: Storage,
    store: SubspaceReader,
    report: Callable[[Progress], None],
    asked: Callable[[], Asked],
    rank: Rank = ALONE,
) -> EvaluatedTogether:
    """Score several tasks under one version: each the same as `evaluate_version` does. From ranks above 0 only the
    token is used.

    Raises:
        Corrupt, Unavailable, Cancelled: As there. What is wrong with one of the tasks is its own outcome.
    """
    from workers.mixed_scoring import Scored, score_together

    started = time.monotonic()
    if not rank.leads:
        return EvaluatedTogether(token=order.token, outcomes=(), seconds=0.0)
    report(Progress(token=order.token, phase=Phase.SCORING))
    stop, outcomes, rows = stopper(asked), dict[str, Evaluated | Failed](), dict[str, EvaluationRows]()
    for one in order.orders:
        stop()
        try:
            rows[one.task_id] = _rows(one, base, storage)
        except InvalidInput as error:
            outcomes[one.task_id] = _failed(one.token, error)
    tasks = [Scored(one.task_id, one.spec, rows[one.task_id]) for one in order.orders if one.task_id in rows]
    scores = score_together(base, store, order.version, tasks, stop)
    keep = Patience(order.token, report, asked)
    seconds = (time.monotonic() - started) / len(order.orders)
    for one in order.orders:
        score = scores.get(one.task_id)
        if isinstance(score, Exception):
            outcomes[one.task_id] = _failed(one.token, score)
        elif score is not None:
            keep_results(one, score, rows[one.task_id], storage, keep)
            _keep_features(one, base, storage, rows[one.task_id], keep)
            outcomes[one.task_id] = _evaluated(one, score, seconds)
    in_order = tuple(outcomes[one.task_id] for one in order.orders)
    return EvaluatedTogether(token=order.token, outcomes=in_order, seconds=time.monotonic() - started)


def _keep_features(
    order: Evaluate, base: BaseModel, storage: Storage, rows: EvaluationRows, keep: Callable[[Callable[[], bool]], bool]
) -> None:
    """Once for each task: what later tells which task a text is for."""
    from workers.serving.routing import keep_sums

    if order.spec.kind not in IMAGE_KINDS and order.results_key:
        backbone = getattr(base.task_model(order.spec).eval(), base.prefix)
        keep(lambda: keep_sums(storage, base, backbone, order.task_id, rows))


def _rows(order: Evaluate, base: BaseModel, storage: Storage) -> EvaluationRows:
    """What a task is scored on."""
    check_lengths(order.spec, base.length_max)
    try:
        return open_evaluation_rows(storage, order.task_id, order.eval_key, order.earlier_rows, order.spec)
    except NotFound as error:
        title = f"{order.spec.team}/{order.spec.name} ({order.task_id})"
        what = f"the evaluation rows of {title}, by which it is scored, are gone"
        raise Corrupt(what, f"{storage.url}/{order.eval_key}", "restore them from a backup") from error


def _evaluated(order: Evaluate, score: Score, seconds: float) -> Evaluated:
    return Evaluated(
        token=order.token,
        score=score.value,
        count=score.count,
        seconds=seconds,
        metrics=score.metrics,
        of_rows=score.of_rows,
    )


def _failed(token: str, error: Exception) -> Failed:
    """The outcome of an order that met an error which is the task's fault, or ours."""
    if isinstance(error, InvalidInput):
        return Failed(token=token, fault="input", message=str(error))
    detail = "".join(traceback.format_exception(error))
    return Failed(token=token, fault="bug", message=f"{type(error).__name__}: {error}", detail=detail)


def warm_up(base: BaseModel) -> None:
    """Make this process ready for the tasks of a base model that it has just loaded."""
    # Weights that stay on the host, so that each rank's GPU takes its part, are too large for one process.
    is_trained = not {*base.kinds} <= {*BROUGHT_KINDS}
    if is_trained and (base.device.type == "cuda" or not torch.cuda.is_available()):
        _rehearse(base)
    # Trainer collects garbage before its first step: 0.3 s over the libraries' objects, 0.02 s without them.
    gc.collect()
    gc.freeze()


def _rehearse(base: BaseModel) -> None:
    """Train and score two rows, for the imports, kernels and caches that a first use costs (4 s for MiniLM)."""
    kind = base.kinds[0]
    rows, label_names = REHEARSED[kind], ("one", "two") if kind in CLASSIFICATION_KINDS else ()
    spec = TaskSpec(
        team="rehearsal",
        name="rehearsal",
        base_model=base.name,
        kind=kind,
        data=DataSpec(train_file="-", eval_file="-", label_names=label_names, max_length=8),
        training=TrainingSpec(max_steps=1, per_device_train_batch_size=2),
        lora=LoraSpec(r=1, target_modules=tuple(base.module_shapes())[:1]),
    )
    model = lora.prepare(base, spec)
    fit(model, base, rows, spec, Surroundings())
    adapter = lora.finish(model, base, spec)
    score_adapter(base, adapter, rows, spec)
    digest(adapter_to_bytes(adapter))
