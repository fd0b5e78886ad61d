"""One training order, from frozen rows to an adapter in staging.

The page reads in the order things happen: find the checkpoint, choose the method, prepare the model, train, take the
adapter out, score it, stage it. Every rank of a gang runs this page; rank 0 alone reports and writes. No Ray.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from configs.errors import Corrupt, InvalidInput, NotFound, Unavailable
from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter, adapter_from_bytes, adapter_to_bytes
from subspace_store.files import blobs
from subspace_store.log.version import MAIN
from subspace_store.merging.basis import ModuleBasis
from subspace_store.storage.protocol import Storage
from subspace_store.subspace_reader import SubspaceReader
from workers.base_model import BaseModel
from workers.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, run_digest, save_checkpoint
from workers.compatibility import check_lengths, without_effect
from workers.compiled_ops import watched
from workers.deepspeed_engine import is_parted, refusals_named, release
from workers.evaluation import Score, score_adapter, score_and_keep, score_served
from workers.heads import told
from workers.methods import Given, Method, auto, codyra, import_adapter, lora, refine, share
from workers.methods.factors import describe, trainable_numbers
from workers.methods.lora import target_modules
from workers.methods.start import with_head_of
from workers.orders import ALONE, Phase, Progress, Rank, RowsDamaged, Train, Trained
from workers.patience import Patience
from workers.rank_group import RankGroup, joined
from workers.rows.frozen_rows import open_evaluation_rows, open_rows
from workers.rows.reading import READING, reading_of
from workers.rows.recurrence import Met
from workers.rows.task_data import Row, input_digest, likenesses
from workers.rows.validation import needs_all_rows, not_compared, set_aside
from workers.tokens import training_losses
from workers.trainer import (
    Asked,
    Cancelled,
    OutOfMemory,
    Preempted,
    Report,
    Surroundings,
    TrainingRun,
    fit,
    free_memory,
)
from workers.training_state import fits

Frozen = TypeVar("Frozen")

METHODS: dict[str, Method] = {
    "lora": lora,
    "share": share,
    "codyra": codyra,
    "import": import_adapter,
    "refine": refine,
}


def train_task(
    order: Train,
    base: BaseModel,
    storage: Storage,
    store: SubspaceReader,
    report: Report,
    asked: Callable[[], Asked],
    rank: Rank = ALONE,
) -> Trained:
    """Do the order.

    Args:
        store: A reader, for leased bases; uploads go through its `stage`.
        report: Takes heartbeats: in every step, and with a point of the loss curve now and then.
        asked: Request of the control plane; called between steps and between batches.
        rank: This process's place in its gang.

    Returns:
        Where the adapter is and how it scores before merging. On a CPU the same order, seed and machine give the same
        bytes, also when the run was interrupted and went on from a checkpoint; on a GPU the same
        numbers to rounding. From ranks above 0 only the token is used.

    Raises:
        InvalidInput: The rows, the target modules, the adapter to import or the learning rate are wrong; or memory ran
            out.
        Unavailable: The storage was away when something was read; the order may be given again. Finished work waits
            until the storage takes it.
        Cancelled, Preempted: Asked for in between; at a preemption a checkpoint was written.
        Corrupt: The staged bytes are not what was written.
    """
    started, spec = time.monotonic(), order.spec
    check_lengths(spec, base.length_max)
    report = report if rank.leads else _nobody
    keep = Patience(order.token, report, asked)
    report(Progress(token=order.token, phase=Phase.LOADING))

    def say(line: str) -> None:
        report(Progress(token=order.token, phase=Phase.LOADING, log_lines=(line,)))

    with joined(rank, spec.training.deepspeed) as group, watched(say, stopper(asked)):
        attempt = _Attempt(order, base, storage, store, report, asked, group)
        adapter, run = attempt.train()
        served = attempt.served()
        if is_parted(spec):
            stop = stopper(lambda: group.agree(asked()))
            local, alone, before = _scores(order, adapter, served, base, storage, report, stop, rank, keep)
    if not rank.leads:
        return Trained(
            token=order.token,
            staging_key="",
            adapter_sha256="",
            adapter_parameters=0,
            score_count=0,
            local_score=math.nan,
            base_score=math.nan,
            steps=run.steps,
            train_loss=math.nan,
            seconds=0.0,
            first_step_at=run.first_step_at,
        )
    if not is_parted(spec):
        stop = stopper(asked)
        local, alone, before = _scores(order, adapter, served, base, storage, report, stop, rank, keep)
    report(
        Progress(
            token=order.token,
            phase=Phase.SAVING,
            step=run.steps,
            steps=run.steps,
            loss=run.train_loss,
            first_step_at=run.first_step_at,
        )
    )
    told = replace(adapter, info=dict(adapter.info) | {READING: reading_of(spec)})
    staged = keep(lambda: blobs.stage(storage, order.staging_key, told))
    # What an import brings was looked at when it was submitted. Parted weights are not here to be compared with.
    is_trained = spec.method.name != "import"
    idle = without_effect(adapter, {} if is_parted(spec) else base.rounding()) if is_trained else ""
    return Trained(
        token=order.token,
        staging_key=order.staging_key,
        adapter_sha256=staged.sha256,
        adapter_parameters=adapter.parameter_count,
        score_count=local.count,
        local_score=local.value,
        base_score=alone,
        steps=run.steps,
        train_loss=run.train_loss,
        seconds=time.monotonic() - started + attempt.seconds_before,
        first_step_at=run.first_step_at,
        method=attempt.method_name,
        compared=attempt.compared,
        trainable_parameters=attempt.trained_numbers,
        basis_version=attempt.version if attempt.leased else 0,
        resumed_from=run.resumed_from,
        metrics=local.metrics,
        scores_of_rows=_of_revisions(local, order),
        main_scores_of_rows=_of_revisions(before, order),
        warnings=(*attempt.warnings, *filter(None, [idle]), *local.warnings),
    )


class _Attempt:
    """One try at a training order: the parts of `train_task` that share its data. `auto` has one more per candidate."""

    def __init__(
        self,
        order: Train,
        base: BaseModel,
        storage: Storage,
        store: SubspaceReader,
        report: Report,
        asked: Callable[[], Asked],
        group: RankGroup,
    ) -> None:
        self._order, self._base, self._storage, self._store = order, base, storage, store
        self._report, self._asked, self._group = report, asked, group
        self._run = run_digest(order.spec, base.sha256, order.train_key, order.refine_version)
        self._folder = order.staging_key.rpartition("/")[0]
        self._prefix = self._folder.rpartition("/")[0] + "/"
        """Prefix of the keys of all of the task's attempts."""
        self._checkpoint_key = ""
        self.method_name: str = order.spec.method.name
        self.version = 0
        """Version whose basis was leased, or that a revision was started from."""
        self.leased: dict[str, tuple[int, int]] = {}
        """Module to (k_out, k_in) of that basis."""
        self.trained_numbers = 0
        self.seconds_before = 0.0
        """Time that earlier attempts spent on trainings of `auto` that this one took over."""
        self._cut: Adapter | None = None
        """What is left of a candidate, to be trained on."""
        self._cut_in = 0
        """Version in whose basis it lies; 0: it is a LoRA."""
        self.compared: tuple[str, ...] | None = None
        """As in `Trained`."""
        self.warnings: tuple[str, ...] = ()
        """Sentences on what was not done as the task asks, for its owner."""

    def train(self) -> tuple[Adapter, TrainingRun]:
        """Prepare, train and read the adapter out; from a checkpoint where there is one."""
        order, spec = self._order, self._order.spec
        method = METHODS.get(spec.method.name)  # None for `auto`, which trains
        if method is not None and not method.TRAINS:
            self._say(f"task {order.task_id}: method {self.method_name}")
            frozen = frozen_copy(lambda: self._storage.read(order.train_key)) if order.train_key else b""
            return method.finish(method.prepare(self._base, spec, Given(frozen)), self._base, spec), TrainingRun()
        rows = frozen_copy(lambda: open_rows(self._storage, order.train_key, spec))
        if self._group.rank.leads and not order.refine_version:  # a refinement reads the same rows
            self.warnings = (*self._losses(rows), *self._evaluated_before(rows))
        if method is not None or order.refine_version:
            return self._trained(rows)
        return self._continued(rows) if self._starts_from_main else self._raced(rows)

    @property
    def _starts_from_main(self) -> bool:
        return bool(self._order.revises) and self._order.spec.start == "main"

    def served(self) -> Adapter | None:
        """What `main` serves of the revision before this one, in the version that training started from, or now; None
        where it revises none.

        Raises:
            InvalidInput: It is not there any more.
        """
        order = self._order
        if not order.revises:
            return None
        version = self.version or self._group.agree(self._store.refresh().refs[MAIN])
        try:
            return self._store.adapter(order.revises, version)
        except NotFound as error:
            raise InvalidInput(
                f"main (version {version}) does not hold the revision that it is to take the place of, {order.revises}",
                f"{order.spec.team}/{order.spec.name}",
                "`onebasis versions` shows what main holds; submit it again for what is there",
            ) from error

    def _evaluated_before(self, rows: Sequence[Row]) -> Iterator[str]:
        """A sentence where rows that earlier revisions are scored on are trained on now."""
        if not self._order.earlier_rows:
            return
        met = Met()
        for key in self._order.earlier_rows.values():
            for row in frozen_copy(partial(open_rows, self._storage, key, self._order.spec)):
                met.add(_number_of(row))
        met.close()
        for row in rows:
            met.meet(_number_of(row))
        if met.count:
            yield (
                f"{met.count} of the evaluation rows of earlier revisions are training rows of this one: the scores on "
                "them flatter it"
            )

    def _continued(self, rows: Sequence[Row]) -> tuple[Adapter, TrainingRun]:
        """A revision under `auto`: it goes on as a LoRA. What a cut loses on the earlier rows, the validation rows, a
        part of the new ones, could not show: so nothing is cut."""
        self._say("auto: goes on from what main serves, as a LoRA; nothing is compared or cut")
        self.compared = ()
        return self._adopt(alone := self._candidate("lora", self._report), alone._trained(rows))

    def _losses(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Sentences on training rows of which a part is not read; said in the log before the first step, too.

        Raises:
            InvalidInput: An answer has no token.
        """
        said = training_losses(self._base.tokenizer, self._order.spec, rows, self._base.name)
        for warning in said:
            self._say(f"warning: {warning}")
        return said

    def _raced(self, rows: Sequence[Row]) -> tuple[Adapter, TrainingRun]:
        """Train each candidate of `auto`, and keep the smallest form that the score needs."""
        rest, validation = set_aside(rows)
        if why := not_compared(self._order.spec, validation):
            self._say(why)
            self.warnings += (why,)
            self.compared = ()
            return self._adopt(alone := self._candidate("lora", self._report), alone._trained(rows))
        return _Race(self, rows, rest, validation).won()

    def _worth_a_race(self) -> tuple[str, ...]:
        """The candidates of `auto`, without `share` as long as the basis is too small to train a task in."""
        spec, group = self._order.spec, self._group
        names = spec.method.candidates
        if "share" not in names or not METHODS["share"].needs_basis(spec):
            return names
        self._store.refresh()
        adapted = target_modules(self._base, spec.lora, spec.kind)
        if group.agree(auto.is_large_enough(self._store.training_ranks(), adapted)):
            return names
        self._say("auto: no coefficients are trained, the basis of `main` has too few directions yet")
        return tuple(name for name in names if name != "share") or ("lora",)

    def _candidate(self, name: str, report: Report, rows: str = "") -> _Attempt:
        """The same order for one method of `auto`, with checkpoints of its own.

        Args:
            rows: Words that tell runs of one method on different rows apart.
        """
        spec = self._order.spec
        columns = spec.method.temporary_columns or 0  # each costs as many numbers as a rank of a LoRA
        method = spec.method.model_copy(update={"name": name, "temporary_columns": columns})
        order = replace(self._order, spec=spec.model_copy(update={"method": method}))
        candidate = _Attempt(order, self._base, self._storage, self._store, report, self._asked, self._group)
        candidate._run += rows
        return candidate

    def _recovery(self, trained: _Attempt, cut: Adapter, report: Report, rows: str = "") -> _Attempt:
        """A run that trains on what is left of a candidate: of one in a basis its coefficients there, as a refinement
        does."""
        candidate = self._candidate(trained.method_name, report, f"{rows} cut to {cut.directions}")
        candidate._order = replace(candidate._order, spec=auto.recovery(candidate._order.spec, cut))
        candidate._cut, candidate._cut_in = cut, trained.version if trained.leased else 0
        return candidate

    def _adopt(self, candidate: _Attempt, trained: tuple[Adapter, TrainingRun]) -> tuple[Adapter, TrainingRun]:
        self.method_name, self.version = candidate.method_name, candidate.version
        self.trained_numbers, self.leased = candidate.trained_numbers, candidate.leased
        return trained

    def _race(self, rows: Sequence[Row]) -> tuple[Adapter, TrainingRun]:
        """Train, and leave the result for later attempts at the same order."""
        started = time.monotonic()
        adapter, run = self._trained(rows)
        facts = {
            "steps": run.steps,
            "train_loss": run.train_loss,
            "resumed_from": run.resumed_from,
            "first_step_at": run.first_step_at,
            "version": self.version,
            "leased": self.leased,
            "trained_numbers": self.trained_numbers,
            "seconds": time.monotonic() - started,
        }
        content = adapter_to_bytes(replace(adapter, info=dict(adapter.info) | {"race": json.dumps(facts)}))
        if self._group.rank.leads:
            try:
                self._storage.write(self._raced_key, content)
            except Unavailable as error:
                self._say(f"the trained candidate could not be kept for a later attempt: {error.what}")
        self._delete_checkpoints()
        return self._from_race(content)[:2]  # read again, to be to the bit what a later attempt would read

    def _delete_checkpoints(self) -> None:
        """The next candidate's begin at step 1 again, and only those furthest on are kept."""
        for key in self._storage.keys(f"{self._folder}/checkpoint-") if self._group.rank.leads else ():
            self._storage.delete(key)

    def _raced_before(self) -> tuple[Adapter, TrainingRun] | None:
        """What an earlier attempt at this order made of this candidate. All ranks see what rank 0 sees."""
        found = self._storage.keys(self._raced_key) if self._group.rank.leads else []
        if not self._group.agree(bool(found)):
            return None
        self._say("was trained by an earlier attempt")
        adapter, run, self.seconds_before = self._from_race(self._storage.read(self._raced_key))
        return adapter, run

    def _from_race(self, content: bytes) -> tuple[Adapter, TrainingRun, float]:
        """What `_race` left: the adapter, its run, and how many seconds that took."""
        adapter = adapter_from_bytes(content, self._raced_key)
        facts = json.loads(adapter.info["race"])
        self.version, self.trained_numbers = facts.pop("version"), facts.pop("trained_numbers")
        self.leased = {name: (k_out, k_in) for name, (k_out, k_in) in facts.pop("leased", {}).items()}
        seconds = facts.pop("seconds", 0.0)  # a release of 2026-11 did not keep it
        info = {name: fact for name, fact in adapter.info.items() if name != "race"}
        return replace(adapter, info=info), TrainingRun(**facts), seconds

    @property
    def _raced_key(self) -> str:
        return f"{self._prefix}raced-{self._run}.safetensors"

    def _trained(self, rows: Sequence[Row]) -> tuple[Adapter, TrainingRun]:
        """Train in one way, with smaller micro-batches if memory runs out."""
        spec = self._order.spec
        while True:
            notes = self._storage.keys(f"{self._prefix}halved-") if self._group.rank.leads else []
            halvings = self._group.agree(len(notes))
            try:
                return self._train_from_here(rows, halvings)
            except OutOfMemory:
                size = spec.training.per_device_train_batch_size >> halvings
                if not spec.training.auto_find_batch_size or size % 2:
                    raise
                # A note for later attempts, and for the whole gang: its other ranks wait in a collective for this one,
                # so its supervisor ends them all and the task comes again.
                self._storage.write(f"{self._prefix}halved-{halvings + 1}", b"")
                said = f"memory ran out with {size} rows at once: goes on with {size // 2}, accumulated"
                if self._group.rank.size > 1:
                    raise Preempted(said) from None
            self._say(said)
            free_memory()

    def _train_from_here(self, rows: Sequence[Row], halvings: int) -> tuple[Adapter, TrainingRun]:
        spec, group = self._order.spec, self._group
        given, checkpoint = self._given(self._checkpoint())
        method = METHODS[self.method_name]
        prepared = method.prepare(self._base, spec, given)
        if checkpoint is not None and not fits(prepared, checkpoint):
            self._forget_checkpoint(checkpoint, "it has other parameters, of another release of onebasis")
            return self._train_from_here(rows, halvings)
        self.trained_numbers = sum(trainable_numbers(prepared).values())
        self._say(describe(prepared, self.method_name, spec.lora.r))
        if head := told(self._base.heads[spec.kind], spec):
            self._say(head)
        saver = _Saver(self._storage, self._folder, self._say)
        around = Surroundings(
            self._order.token,
            group,
            self._report,
            self._asked,
            lambda step, steps: method.after_step(prepared, spec, step, steps),
            checkpoint,
            saver.save,
            self._run,
            self.method_name,
            self.version,
            halvings,
        )
        try:
            with refusals_named(spec.training.deepspeed):
                run = fit(prepared, self._base, rows, spec, around)
        finally:
            saver.wait()
        adapter = method.finish(prepared, self._base, spec, given)
        if run.engine is not None:
            release(run.engine)
        return adapter, replace(run, engine=None)

    def _checkpoint(self) -> Checkpoint | None:
        """The furthest checkpoint of this run. Rank 0 chooses it, the others read the same one."""
        found = newest_checkpoint(self._storage, self._prefix, self._run) if self._group.rank.leads else None
        key = self._checkpoint_key = self._group.agree(found[0] if found else "")
        checkpoint = found[1] if found else read_checkpoint(self._storage, key) if key else None
        if key and checkpoint is None:
            raise Unavailable("rank 0 sees a checkpoint that this rank does not see", key, "try again")
        return checkpoint

    def _given(self, checkpoint: Checkpoint | None) -> tuple[Given, Checkpoint | None]:
        """What the method starts from: the same on every rank, and the same again after an interruption."""
        order = self._order
        self._store.refresh()
        if checkpoint is not None:
            self.method_name, self.version = checkpoint.method, checkpoint.basis_version
        elif order.refine_version:
            self.method_name, self.version = "refine", order.refine_version
        elif self._cut_in:
            self.method_name, self.version = "refine", self._cut_in
        else:
            main: int = self._group.agree(self._store.resolve(MAIN))
            self.version = main if METHODS[self.method_name].needs_basis(order.spec) or self._starts_from_main else 0
        is_leased = self.version and METHODS[self.method_name].needs_basis(order.spec)
        try:
            basis = self._basis() if is_leased else {}
            start = self.served() if self._starts_from_main and not order.refine_version else None
        except (NotFound, InvalidInput) as error:  # the version of the checkpoint may have expired meanwhile
            if checkpoint is None:
                raise
            self._forget_checkpoint(checkpoint, f"what it started from is gone ({error.what})")
            return self._given(self._checkpoint())
        self.leased = {name: one.ranks for name, one in basis.items()}
        served = self._store.adapter(order.task_id, self.version) if order.refine_version else None
        if self._cut is not None:
            served, start = (self._cut, None) if self._cut_in else (None, self._cut)
        basis_of = f", in the basis of version {self.version}" if is_leased else ""
        start_of = f", from what version {self.version} serves of {order.revises}" if start else ""
        if self._cut is not None:
            start_of = ", from what is left after a cut"
        self._say(f"task {order.task_id}: method {self.method_name}{basis_of}{start_of}")
        if checkpoint is not None:
            self._say(f"goes on from step {checkpoint.step}, where an earlier attempt left a checkpoint")
        start = with_head_of(self._base, start, order.spec) if start else None
        return Given(version=self.version, basis=basis, adapter=served, start=start), checkpoint

    def _basis(self) -> dict[str, ModuleBasis]:
        """The basis of the leased version that the task will be stored in, per module."""
        if self._order.refine_version:
            return self._store.basis_of(self._order.task_id, self.version)
        if self._starts_from_main and self.method_name == "share":  # where it lies, to the last number
            return self._store.basis_of(self._order.revises, self.version)
        if self.method_name in ("share", "refine") and share.stays_inside(self._order.spec):
            return self._store.training_basis(self.version)
        return self._store.basis(self.version)

    def _forget_checkpoint(self, checkpoint: Checkpoint, why: str) -> None:
        self._say(f"does not go on from the checkpoint of step {checkpoint.step}: {why}")
        if self._group.rank.leads:  # it would be found again, before those that this attempt will leave
            self._storage.delete(self._checkpoint_key)

    def _say(self, line: str) -> None:
        self._report(Progress(token=self._order.token, phase=Phase.LOADING, log_lines=(line,)))


class _Race:
    """The trainings of `auto` at one order, each a run of its own, and the choice between them.

    Every rank runs it; rank 0 scores, and the others hear of it, so that all choose alike.
    """

    def __init__(self, attempt: _Attempt, rows: Sequence[Row], rest: Sequence[Row], validation: Sequence[Row]) -> None:
        self._attempt, self._rows, self._rest, self._validation = attempt, rows, rest, validation
        self._spec, self._group = attempt._order.spec, attempt._group
        self._names = attempt._worth_a_race()
        self._tries_left = auto.TRIES * auto.RECOVERY * len({*self._names} & {*auto.RECOVERED})
        """Size of the recoveries that may follow, in units of the task's own training."""
        self._at_last = float(needs_all_rows(rest, validation))
        """Size of the training on all rows, at most; 0: there is none."""
        self._runs: list[tuple[_Attempt, TrainingRun]] = []

    def won(self) -> tuple[Adapter, TrainingRun]:
        """Train the candidates, and what cuts leave of them, without the validation rows; then what is kept once more,
        on all rows."""
        attempt, spec, finished = self._attempt, self._spec, self._candidates()
        judged = auto.validation_spec(spec)
        kept, lines = auto.chosen(
            {method: adapter for method, (_, adapter) in finished.items()},
            partial(self._score, judged),
            spec.method.loss_max,
            lambda method, adapter: auto.numbers(adapter, finished[method][0].leased),
            judged.metric,
            lambda method, cut: self._trained_on(finished[method][0], cut),
        )
        for line in lines:
            attempt._say(line)
        winner, adapter = finished[kept.method][0], kept.adapter
        if self._at_last:
            how = f"what is left of {kept.method} is trained on" if kept.directions else f"{kept.method} is trained"
            again = f"{how} once more"
            attempt._say(f"auto: {again}, on all {len(self._rows):,} rows")
            try:
                winner, adapter = self._on_all_rows(kept, *finished[kept.method])
            except InvalidInput as error:
                self._raise_in_a_gang(error)
                what = f"auto kept what was trained without the validation rows; with them: {error}"
                attempt.warnings += (what,)
        attempt._say(f"auto: {auto.numbers(adapter, winner.leased):,} numbers are kept")
        attempt.compared = tuple(finished)
        attempt.seconds_before = sum(before.seconds_before for before, _ in self._runs)
        began = min(run.first_step_at for _, run in self._runs)
        run = replace(self._runs[-1][1], first_step_at=began, steps=sum(run.steps for _, run in self._runs))
        return attempt._adopt(winner, (auto.sized(adapter, 1.0), run))

    def _candidates(self) -> dict[str, tuple[_Attempt, Adapter]]:
        """Method to what it made of the rows without the validation rows."""
        finished: dict[str, tuple[_Attempt, Adapter]] = {}
        failed: InvalidInput | None = None
        for place, name in enumerate(self._names):
            after = len(self._names) - 1 - place + self._tries_left + self._at_last
            candidate = self._attempt._candidate(name, self._among(name, 1.0, after))
            try:
                finished[name] = candidate, self._run(candidate, self._rest)
            except InvalidInput as error:
                self._raise_in_a_gang(error)
                self._attempt._say(f"auto: {name} cannot be trained: {error}")
                failed = error
                candidate._delete_checkpoints()
        if failed is not None and not finished:
            raise failed
        return finished

    def _score(self, judged: TaskSpec, adapter: Adapter) -> Sequence[float]:
        """Each validation row's share in an adapter's score."""
        found: list[float] = []
        if self._group.rank.leads:
            self._attempt._report(Progress(token=self._attempt._order.token, phase=Phase.SCORING))
            stop = stopper(self._attempt._asked)
            score = score_adapter(self._attempt._base, adapter, self._validation, judged, stop)
            found = [float(share) for share in score.per_row]
        shares: list[float] = self._group.agree(found)
        return shares

    def _trained_on(self, trained: _Attempt, cut: Adapter) -> Adapter | None:
        """What is left of a candidate, after its recovery; None where that failed, or it lies in no basis."""
        self._tries_left -= auto.RECOVERY
        if trained.method_name != "lora" and not trained.leased:
            return None
        after = self._tries_left + self._at_last
        name = f"{trained.method_name} cut to {cut.directions}"
        recovery = self._attempt._recovery(trained, cut, self._among(name, auto.RECOVERY, after))
        try:
            return self._run(recovery, self._rest)
        except InvalidInput as error:
            self._raise_in_a_gang(error)
            self._attempt._say(f"auto: what is left after a cut cannot be trained on: {error}")
            recovery._delete_checkpoints()
            return None

    def _on_all_rows(self, kept: auto.Form, trained: _Attempt, whole: Adapter) -> tuple[_Attempt, Adapter]:
        """The form that is kept, made once more: by the method's own training, or by training on what a cut has left of
        the candidate.

        Args:
            trained, whole: The candidate that the form was made of.

        Returns:
            What tells of the training, and the adapter.
        """
        name = f"{kept.method} on all rows"
        if kept.directions:
            report = self._among(name, auto.RECOVERY, 0.0)
            cut = auto.leading(whole, kept.directions)
            recovery = self._attempt._recovery(trained, cut, report, " all rows")
            return trained, self._run(recovery, self._rows)
        again = self._attempt._candidate(kept.method, self._among(name, 1.0, 0.0), " all rows")
        return again, auto.cut(self._run(again, self._rows), kept.share)

    def _run(self, attempt: _Attempt, rows: Sequence[Row]) -> Adapter:
        adapter, run = attempt._raced_before() or attempt._race(rows)
        self._runs.append((attempt, run))
        free_memory()
        # What was cut and trained on is of the LoRA that was asked for, and refined nothing that was merged.
        info = {name: fact for name, fact in adapter.info.items() if name != "refined_in"}
        return replace(adapter, info=info | {"lora": self._spec.lora.model_dump_json()})

    def _among(self, name: str, size: float, after: float) -> Report:
        return auto.among(self._attempt._report, name, sum(run.steps for _, run in self._runs), size, after)

    def _raise_in_a_gang(self, error: InvalidInput) -> None:
        """Memory that ran out on one rank: the others wait for it, and the gang is begun anew."""
        if isinstance(error, OutOfMemory) and self._group.rank.size > 1:
            raise error


class _Saver:
    """Uploads checkpoints beside training, one at a time. A storage that is away costs checkpoints, not the run."""

    def __init__(self, storage: Storage, folder: str, say: Callable[[str], None]) -> None:
        self._storage, self._folder, self._say = storage, folder, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onebasis-checkpoint")
        self._upload: Future[str] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        self.wait()
        self._upload = self._thread.submit(save_checkpoint, self._storage, self._folder, checkpoint)

    def wait(self) -> None:
        upload, self._upload = self._upload, None
        try:
            if upload is not None:
                upload.result()
        except Unavailable as error:
            self._say(f"a checkpoint could not be written, training goes on: {error.what}")


def _nobody(progress: Progress) -> None:
    """Drop a report: ranks above 0 send none."""


def _scores(
    order: Train,
    adapter: Adapter,
    served: Adapter | None,
    base: BaseModel,
    storage: Storage,
    report: Report,
    stop: Callable[[], None],
    rank: Rank,
    keep: Patience,
) -> tuple[Score, float, Score]:
    """The adapter's score before merging, the base model's score under its head, and the score of what `main` serves of
    the revision before it; NaN without rows."""
    nothing = Score(math.nan, {}, ())
    if not order.eval_key and not order.earlier_rows:
        return nothing, math.nan, nothing
    report(Progress(token=order.token, phase=Phase.SCORING))
    free_memory()
    rows = frozen_copy(
        lambda: open_evaluation_rows(storage, order.task_id, order.eval_key, order.earlier_rows, order.spec)
    )
    local = score_and_keep(order, base, adapter, rows, storage, stop, rank, keep)
    alone = score_adapter(base, adapter, rows, order.spec, stop, with_update=False)
    before = score_served(base, served, rows, order.spec, stop) if served is not None else nothing
    return local, alone.value, before


def _of_revisions(score: Score, order: Train) -> dict[str, float]:
    """Id of each revision that brought evaluation rows to the score on them; empty where it revises none."""
    if not order.revises or math.isnan(score.value):
        return {}
    return {task_id: value for task_id, (value, _) in score.of_rows.items()} or {order.task_id: score.value}


def _number_of(row: Row) -> int:
    """A number that rows have alike that are the same to a reader."""
    return int.from_bytes(likenesses(row, input_digest(row))[0][:8], "big")


def frozen_copy(read: Callable[[], Frozen]) -> Frozen:
    """What was frozen when the task was submitted.

    Raises:
        RowsDamaged: It is gone, or is not what was written.
    """
    try:
        return read()
    except (NotFound, Corrupt) as error:
        what = f"the service's own copy of its rows, made when it was submitted, is damaged: {error.what}"
        todo = "find out what deletes or changes files there, then `onebasis retry TEAM/TASK` freezes them anew"
        raise RowsDamaged(what, error.where, todo) from error


def stopper(asked: Callable[[], Asked]) -> Callable[[], None]:
    """A function to call between batches; raises what the control plane asked for."""

    def stop_if_asked() -> None:
        if wanted := asked():
            raise Cancelled if wanted == "cancel" else Preempted

    return stop_if_asked
