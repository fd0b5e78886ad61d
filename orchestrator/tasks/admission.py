"""From a task document to a task in the queue: everything that can be wrong is found here, before any worker.

A task's data is copied and frozen under the task's id on the object storage, so that a file that changes later
changes no score, and workers on other machines can read it.

What reads adapters is imported where a submission is checked, in a process of its own (checking.py): the control plane,
which imports this module too, needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from configs import log_lines
from configs.errors import Conflict, InvalidInput, OnebasisError, QueueFull, renamed
from configs.places import OpenFile, OutsideError, is_below, is_in_bucket, open_below
from configs.settings import DEFAULT_POOL, BaseModelSettings, Settings
from configs.task_spec import BROUGHT_KINDS, CLASSIFICATION_KINDS, IMAGE_KINDS, SCORE_MAX, TaskSpec
from configs.uploads import UPLOAD, is_upload, upload_named
from orchestrator.scheduling.pools import chosen_pool, pools_of
from orchestrator.tasks.bucket_files import BucketFiles
from orchestrator.tasks.doubtful_settings import doubtful_settings, few_rows
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState, new_task_id
from orchestrator.tasks.uploads import TeamFolder, team_folder
from subspace_store import Storage
from subspace_store.digests import digest
from workers.orders import BaseLayout
from workers.rows.columns import shown
from workers.rows.frozen_rows import FrozenRows, FrozenTask, freeze, upload
from workers.rows.labels import check_names, counted_from_1, two_readings
from workers.rows.task_data import Complaint, Row
from workers.rows.validation import INPUTS_ENOUGH, not_compared, set_aside

if TYPE_CHECKING:
    from subspace_store.adapter import Adapter

_PLACES: Any = {"client_key": True, "data": {"train_file", "eval_file"}, "method": {"adapter"}}


@dataclass(frozen=True)
class FrozenAdapter:
    """An adapter to import, in canonical form, on its way to the storage. A file: it may have gigabytes."""

    file: IO[bytes]
    sha256: str


@dataclass(frozen=True)
class Draft:
    """A checked submission, not yet taken in."""

    spec: TaskSpec
    rows: FrozenTask
    adapter: FrozenAdapter | None
    """What an import brings."""
    warnings: tuple[str, ...]
    pool: str = DEFAULT_POOL
    """Pool that will train it."""

    @property
    def train_count(self) -> int:
        return self.rows.train.count if self.rows.train else 0

    @property
    def eval_count(self) -> int:
        return self.rows.evaluation.count if self.rows.evaluation else 0

    @property
    def eval_sha256(self) -> str:
        return self.rows.evaluation.sha256 if self.rows.evaluation else ""

    @property
    def content_sha256(self) -> str:
        """Digest that is equal for the same submission: see `content_sha256`."""
        return content_sha256(self.spec, self.brought_sha256, self.eval_sha256)

    @property
    def brought_sha256(self) -> str:
        """Digest of what the training rows say, or of the adapter to import."""
        brought = self.rows.train or self.adapter
        return brought.sha256 if brought else ""

    def close(self) -> None:
        """Delete the temporary files."""
        self.rows.close()
        if self.adapter:
            self.adapter.file.close()


def content_sha256(spec: TaskSpec, brought_sha256: str, eval_sha256: str) -> str:
    """The one definition of "the same submission": a digest of the document and what its files say, wherever they lie.

    Args:
        brought_sha256: Digest of what the training rows say, or of the adapter in canonical form.
        eval_sha256: Digest of what the evaluation rows say; empty without any.
    """
    return digest(f"{_document(spec)}\n{brought_sha256}\n{eval_sha256}".encode())


def _document(spec: TaskSpec) -> str:
    """A task document without the places of its files, and without the key that its owner may have given it."""
    # Without defaults, so that a key that a later release adds changes no earlier document.
    return json.dumps(spec.model_dump(mode="json", exclude=_PLACES, exclude_defaults=True), sort_keys=True)


def check_submission(spec: TaskSpec, settings: Settings, layout: BaseLayout) -> Draft:
    """Check everything about a submission without keeping anything.

    No file outside `data_roots`, `data_buckets` and the team's own uploads is read, even if names are made to lead
    elsewhere meanwhile.

    Raises:
        InvalidInput: The team, the base model, a path, a row, the target modules or the adapter to
            import; names the key, file and row.
    """
    buckets = BucketFiles(settings.of_team(spec.team), team_folder(settings, spec.team))
    # A file is told by the name that whoever sent or named it can know.
    names = {f"{team_folder(settings, spec.team).sets}/": UPLOAD}
    try:
        draft = _checked(spec, settings, layout, buckets)
    except OnebasisError as error:
        told = error.renamed(names | buckets.places)
        if told is error:
            raise
        raise told from None
    finally:
        buckets.close()
    return replace(draft, warnings=tuple(renamed(warning, names | buckets.places) for warning in draft.warnings))


def _checked(spec: TaskSpec, settings: Settings, layout: BaseLayout, buckets: BucketFiles) -> Draft:
    from workers.compatibility import check_lengths, check_template, chosen_modules

    if spec.team not in settings.teams:
        raise InvalidInput(
            f"there is no team '{spec.team}'", "team", f"teams of this service: {', '.join(sorted(settings.teams))}"
        )
    settings, may_read = settings.of_team(spec.team), Readable.of(settings, spec.team, buckets)
    base_model_of(spec, settings)
    pool = chosen_pool(pools_of(settings.pools, spec.base_model), spec.pool, spec.resources)
    ranks = settings.pools[pool].ranks
    if spec.kind not in layout.kinds:
        raise InvalidInput(f"the base model has no '{spec.kind}'", "kind", f"it has: {', '.join(layout.kinds)}")
    _check_least_score(spec)
    check_names(spec.data.label_names)  # not in the task's own checks: as above
    if settings.subspace.variant == "paper" and spec.method.name == "auto":
        raise InvalidInput(
            "auto cuts what it trains, and subspace.variant paper merges B and A as they were trained",
            "method.name",
            "write lora, or another method",
        )
    check_lengths(spec, layout.length_max)
    check_template(spec, layout.chat_template is not None)
    complaint = layout.chat_template.complaint if layout.chat_template and spec.data.messages_column else _no_complaint
    evaluation = may_read.rows(spec.data.eval_file, "data.eval_file") if spec.data.eval_file else None
    if spec.method.name == "import":
        return replace(_imported(spec, settings, may_read, layout, evaluation, complaint, ranks), pool=pool)
    chosen_modules(spec.lora.target_modules, layout.module_shapes, spec.base_model)
    train = may_read.rows(spec.data.train_file or "", "data.train_file")
    rows = freeze(spec, train, evaluation, may_read.opener("data"), complaint)
    doubt = _not_compared(spec, rows.train) if spec.method.name == "auto" and rows.train else ""
    row_count = rows.train.count if rows.train else 0
    doubts = (*filter(None, [doubt]), *doubtful_settings(spec, row_count, ranks))
    return Draft(spec, rows, None, (*_warnings(rows), *doubts, *_cut(spec, rows, layout)), pool)


def _imported(
    spec: TaskSpec,
    settings: Settings,
    may_read: Readable,
    layout: BaseLayout,
    evaluation: Path | None,
    complaint: Complaint,
    ranks: int,
) -> Draft:
    """Check the adapter to import and the rows to score it on."""
    from subspace_store.formats.adapter_files import READ_FILES
    from subspace_store.formats.adapters import read_adapter
    from subspace_store.formats.peft import SAVED
    from workers.compatibility import incomplete, not_understood, trained_elsewhere, with_full_names, without_effect
    from workers.heads import check_head, check_whole, doubtful_labels

    if spec.data.train_file:  # here and not in the task's own checks: tasks of earlier releases may have one
        raise InvalidInput("an import trains nothing, so these rows have no use", "data.train_file", "leave it out")
    place, head = may_read.real(spec.method.adapter or "", "method.adapter", READ_FILES), layout.heads[spec.kind]
    for file in (place,) if place.is_file() else (place / name for name in READ_FILES):  # each may be a link elsewhere
        may_read.file(str(file), "method.adapter")
    base = base_model_of(spec, settings)
    brought = read_adapter(place, base.name, layout.sha256, may_read.opener("method.adapter"))
    _check_form(brought, spec)
    named = with_full_names(brought, layout.module_shapes, head, str(place))
    check_whole(named, head, named.info.get(SAVED, "[]"), str(place))
    check_head(named, spec, head, is_scored=evaluation is not None)
    doubts = (
        trained_elsewhere(named, layout.called or (base.source,)),
        not_understood(named),
        _other_type(named, spec),
        incomplete(named, layout.module_shapes),
        without_effect(named, layout.rounding),
        doubtful_labels(named, spec, head),
        _not_scored(spec),
        *doubtful_settings(spec, 0, ranks),
    )
    rows = freeze(spec, None, evaluation, may_read.opener("data.eval_file"), complaint)
    return Draft(spec, rows, _frozen(named), (*filter(None, doubts), *_warnings(rows), *_cut(spec, rows, layout)))


def _check_form(adapter: Adapter, spec: TaskSpec) -> None:
    """Refuse a LoRA of diffusers for a model that is no pipeline, and one of PEFT for a pipeline."""
    from subspace_store.formats.diffusers import FORMAT

    is_diffusers = adapter.info.get("format") == FORMAT
    if is_diffusers and spec.kind not in BROUGHT_KINDS:
        raise InvalidInput(
            f"is a LoRA of diffusers, and '{spec.kind}' is no kind of a pipeline that makes pictures",
            "method.adapter",
            "set kind: text_to_image, for a base model that is such a pipeline",
        )
    if not is_diffusers and spec.kind in BROUGHT_KINDS:
        raise InvalidInput(
            "is a PEFT folder, which names no component of a pipeline",
            "method.adapter",
            "save it with the pipeline's save_lora_weights",
        )


def _other_type(adapter: Adapter, spec: TaskSpec) -> str:
    """A warning where an adapter says that it is a language model's and is taken for something else, or the other way
    round; else empty."""
    said = adapter.info.get("task_type", "")
    if not said or (said == "CAUSAL_LM") == (spec.kind == "causal_lm"):
        return ""
    return (
        f"adapter_config.json says task_type {said}, and it is taken for a {spec.kind}: it would answer as one → set "
        "kind, or import's option --kind"
    )


def _not_scored(spec: TaskSpec) -> str:
    """What an import without rows gives up; else empty."""
    if spec.data.eval_file:
        return ""
    if spec.kind in BROUGHT_KINDS:
        return (
            f"nothing here scores a {spec.kind} task: the gate judges it by the error of its merge alone, never by "
            "whether it works"
        )
    own = f"; gate.min_score, {spec.gate.min_score:g}, has no effect" if spec.gate.min_score is not None else ""
    return (
        "there are no evaluation rows: the task will have no score, under this version or a later one, and the gate "
        f"can judge it by the error of its merge alone, never by whether it works{own} → give data.eval_file"
    )


def _check_least_score(spec: TaskSpec) -> None:
    """Refuse a task that would be trained and then rejected for certain. Here and not in the task's own checks: a task
    of an earlier release may have such a rule, and is to stay readable."""
    least, best = spec.gate.min_score, SCORE_MAX[spec.metric]
    if least is not None and least > best:
        raise InvalidInput(
            f"{least:g} is more than {spec.metric} can be, which is {best:g} at most: the task would be rejected",
            "gate.min_score",
            "lower it, or leave it out",
        )


def _frozen(adapter: Adapter) -> FrozenAdapter:
    from subspace_store.adapter import adapter_to_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        adapter_to_file(adapter, path)
        file = path.open("rb")  # is there as long as it is open
    return FrozenAdapter(file, hashlib.file_digest(file, "sha256").hexdigest())


def _no_complaint(row: Row) -> str:
    return ""


def _not_compared(spec: TaskSpec, train: FrozenRows) -> str:
    """The sentence that `auto` will say if it finds too little to compare by; looked for where that can be."""
    return "" if train.inputs > INPUTS_ENOUGH else not_compared(spec, set_aside(train.rows(spec.kind))[1])


def _cut(spec: TaskSpec, rows: FrozenTask, layout: BaseLayout) -> Iterator[str]:
    """The sentences on rows longer than the model reads that training and scoring say.

    Raises:
        InvalidInput: They would be refused there, since answers have no token, or labels cannot be read.
    """
    from workers.tokens import check_prompts, evaluation_losses, training_losses, unpacked

    if not layout.tokenizer:
        return
    if spec.kind == "image_text" and spec.data.label_names:
        check_prompts(unpacked(layout.tokenizer), spec, layout.length_max)
    if spec.kind in IMAGE_KINDS:
        return
    tokenizer = unpacked(layout.tokenizer)
    if rows.train:
        yield from training_losses(tokenizer, spec, rows.train.rows(spec.kind), spec.base_model)
    if rows.evaluation:
        held = rows.evaluation.rows(spec.kind)
        yield from evaluation_losses(tokenizer, spec, held, spec.base_model, layout.length_max)


def _warnings(rows: FrozenTask) -> Iterator[str]:
    yield from rows.unread
    trained, evaluated = (side.per_label if side else {} for side in (rows.train, rows.evaluation))
    if unseen := [name for name, count in trained.items() if not count]:
        have = "has" if len(unseen) == 1 else "have"
        yield f"{len(unseen)} of {len(trained)} labels {have} no training row: {shown(unseen)}"
    if evaluated and rows.evaluation and 1 < rows.evaluation.count == max(evaluated.values()):
        yield f"all {rows.evaluation.count} evaluation rows have the same label: always giving it is right each time"
    if rows.evaluation and (few := few_rows(rows.evaluation.count)):
        yield few
    both = {name: trained.get(name, 0) + evaluated.get(name, 0) for name in trained or evaluated}
    if doubt := two_readings(both) or (counted_from_1(both) if rows.numbered_labels else ""):
        yield doubt
    if rows.shared_rows and rows.evaluation:
        yield (
            f"{rows.shared_rows} of {rows.evaluation.count} evaluation rows are also training rows: the scores flatter "
            "the task"
        )
    if rows.evaluation and (more := rows.alike_rows - rows.shared_rows) > 0:
        of = "others of the" if rows.shared_rows else "of"
        yield (
            f"{more} {of} {rows.evaluation.count} evaluation rows differ from training rows in capital letters, white "
            "space or Unicode's form alone: the scores flatter the task"
        )
    for name, side in (("training", rows.train), ("evaluation", rows.evaluation)):
        if side and side.inputs == 1 < side.count:
            yield f"all {side.count} {name} rows have the same input"
        elif side and side.contradicted:
            inputs = "1 input has" if side.contradicted == 1 else f"{side.contradicted} inputs have"
            yield f"{inputs} several labels in the {name} rows: no answer is right for all of them"


def base_model_of(spec: TaskSpec, settings: Settings) -> BaseModelSettings:
    """The base model that a task names, whose subspace it will belong to. Raises InvalidInput for one that is not
    here."""
    found = next((base for base in settings.bases if base.name == spec.base_model), None)
    if found is None:
        served = ", ".join(f"'{name}'" for name in settings.base_names)
        raise InvalidInput(f"'{spec.base_model}' is not allowed here", "base_model", f"this service serves {served}")
    return found


def admit(
    draft: Draft,
    settings: Settings,
    queue: TaskQueue,
    storage: Storage,
    submitted_by: str,
    under_way: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
) -> tuple[TaskRecord, bool]:
    """Take a checked submission in: freeze its data, then write its row.

    Args:
        under_way: Makes a context from the task's id. It lasts from before the task's first file until the task has a
            row, or will never have one.

    Returns:
        The task and True; or the task that the same submission made before, and False. After this the task is
        acknowledged and survives anything.

    Raises:
        QueueFull: The team has as many tasks waiting as it may.
        NameTaken: Another task of that name is alive or published.
        Conflict: The client key belongs to another submission.
    """
    record, is_new = would_admit(draft, settings, queue, submitted_by)
    if not is_new:
        return record, False
    rows, limit = draft.rows, settings.teams[record.team].queued_max
    with under_way(record.task_id):
        if rows.train:
            rows.train.write(storage, record.train_key)
        elif draft.adapter:
            upload(draft.adapter.file, storage, record.train_key)
        if rows.evaluation:
            rows.evaluation.write(storage, record.eval_key)
        try:
            taken, is_new = queue.add(record, "; ".join(("submitted", *draft.warnings)), limit)
        except (
            Conflict,
            QueueFull,
            InvalidInput,
        ):  # of any other error the outcome is unknown, and then nothing is deleted
            _delete_data(record, storage)
            raise
        if not is_new:
            _delete_data(record, storage)
    return (taken, True) if is_new else (_same(taken, draft, record.client_key), False)


def would_admit(
    draft: Draft, settings: Settings, queue: TaskQueue, submitted_by: str, beside: Collection[str] = ()
) -> tuple[TaskRecord, bool]:
    """What `admit` would return for a submission now. Nothing is kept, and nothing reserved.

    Args:
        beside: Tasks (`team/name`) that are submitted before it and are not there yet.

    Returns, Raises:
        As `admit`.
    """
    spec, content = draft.spec, draft.content_sha256
    if spec.client_key:
        client_key, known = spec.client_key, queue.by_client_key(spec.team, spec.client_key)
    else:
        before = queue.same_content(spec.team, content)
        # One that ended without a result may be submitted again, and its key belongs to it for ever.
        client_key, known = f"auto-{content[:24]}{f'.{before.count}' if before.count else ''}", before.alive
    if known is not None:
        return _same(known, draft, client_key), False
    now = time.time()
    if spec.deadline and spec.deadline.timestamp() <= now:
        raise InvalidInput("has passed already", "deadline", "name a later moment, or leave it out")
    task_id = new_task_id()
    rows, folder = draft.rows, f"data/{task_id}"
    record = TaskRecord(
        task_id=task_id,
        team=spec.team,
        name=spec.name,
        client_key=client_key,
        spec=spec,
        submitted_at=now,
        not_due=spec.not_before is not None and spec.not_before.timestamp() > now,
        submitted_by=submitted_by,
        traceparent=log_lines.now().traceparent,
        train_key=rows.train.key(folder, "train") if rows.train else f"{folder}/adapter.safetensors",
        train_count=draft.train_count,
        eval_key=rows.evaluation.key(folder, "eval") if rows.evaluation else "",
        eval_count=draft.eval_count,
        eval_sha256=draft.eval_sha256,
        constant_score=rows.evaluation.constant_score if rows.evaluation else None,
        content_sha256=content,
        brought_sha256=draft.brought_sha256,
        warnings=draft.warnings,
        pool=draft.pool,
    )
    if spec.revises:
        record = record.model_copy(update=_as_revision(record, draft, queue))
    awaits = queue.check(record, settings.teams[spec.team].queued_max, beside)
    return record.model_copy(update={"awaits": awaits}), True


def _as_revision(record: TaskRecord, draft: Draft, queue: TaskQueue) -> dict[str, Any]:
    """What a record says that is the next revision of the published task of its name.

    Raises:
        InvalidInput: There is none; it is of another kind, another metric, another base model or has other labels; or
            these are rows that a revision of it brought already.
    """
    spec, living = record.spec, queue.living_of_names([record.title]).get(record.title, [])
    published = next((one for one in living if one.state is TaskState.PUBLISHED), None)
    if published is None:
        what = f"{record.title} is {living[0].state if living else 'not there'}, and only a published task is revised"
        todo = "wait until it is published" if living else "leave revises or --revise out: then it is a new task"
        raise InvalidInput(what, "revises", todo)
    before = published.spec
    for key, theirs, ours in (
        ("base_model", before.base_model, spec.base_model),
        ("kind", before.kind, spec.kind),
        ("metric", before.metric, spec.metric),
        ("data.prompt_template", before.data.prompt_template, spec.data.prompt_template),
    ):
        if theirs != ours:
            what = f"is '{ours}', and '{theirs}' in {published.exact_title}, whose next revision this is"
            raise InvalidInput(what, key, f"write {theirs}, or give the task another name")
    known, asked = before.data.label_names, spec.data.label_names
    may_grow = spec.kind in CLASSIFICATION_KINDS  # rows with fewer numbers than outputs could not be scored
    if known and (asked[: len(known)] if may_grow else asked) != known:
        raise InvalidInput(
            f"{published.exact_title} has {list(known)!r:.300}, and this revision {list(asked)!r:.300}",
            "data.label_names",
            "list its labels first, in their order, and new ones after them" if may_grow else "list the same names",
        )
    revisions = queue.revisions(published)
    _refuse_known_rows(draft, [one for one in revisions if one.came_to_something])
    earlier = (*published.earlier_rows, *((published.own_rows,) if published.eval_key else ()))
    return {
        "revises": published.task_id,
        "number": 1 + max(one.number for one in revisions if one.came_to_something),
        "earlier_rows": earlier,
        # Of the new rows alone: the score is on the earlier ones too.
        "constant_score": None if earlier else record.constant_score,
    }


def _refuse_known_rows(draft: Draft, revisions: Collection[TaskRecord]) -> None:
    for one in revisions:
        known = one.content_sha256 and content_sha256(one.spec, draft.brought_sha256, draft.eval_sha256)
        if draft.brought_sha256 == one.brought_sha256 or known == one.content_sha256:  # older records have only this
            what = "the adapter" if draft.adapter else "the training rows"
            raise InvalidInput(
                f"{what} of {one.exact_title} once more: nothing is new",
                "method.adapter" if draft.adapter else "data.train_file",
                f"give new rows; `onebasis rollback-task {one.title} --to {one.number}` brings that revision back",
            )
        if draft.eval_sha256 and draft.eval_sha256 == one.eval_sha256:
            raise InvalidInput(
                f"the evaluation rows of {one.exact_title} once more, on which it is scored anyway: nothing would show "
                "what the new training rows are good for",
                "data.eval_file",
                "give rows like the new ones, or data.eval_fraction",
            )


def _same(known: TaskRecord, draft: Draft, client_key: str) -> TaskRecord:
    """The task that has this client key, if it came from the same submission. Raises Conflict."""
    if known.content_sha256:
        same = known.content_sha256 == draft.content_sha256
    else:  # release 0.3 kept no digest of the training rows
        same = (_document(known.spec), known.eval_sha256) == (_document(draft.spec), draft.eval_sha256)
    if not same:
        raise Conflict(
            f"client_key '{client_key}' was used for {known.title} ({known.task_id}), and this submission differs",
            f"{draft.spec.team}/{draft.spec.name}",
            "leave client_key out, or choose a new one for a new task",
        )
    return known


def _delete_data(record: TaskRecord, storage: Storage) -> None:
    for key in (record.train_key, record.eval_key):
        if key:
            storage.delete(key)


@dataclass(frozen=True)
class Readable:
    """What the submissions of one team may read."""

    roots: tuple[str, ...]
    """Folders whose files they may name."""
    uploads: TeamFolder
    """What the team has sent."""
    closed: tuple[Path, ...]
    """The state folder, where the owner's token is, and in it all teams' uploads: nobody names a file there by its
    path, unless a root of its own lies in it."""
    buckets: BucketFiles
    """What is brought from buckets."""

    @classmethod
    def of(cls, settings: Settings, team: str, buckets: BucketFiles | None = None) -> Readable:
        """What the settings let a team read."""
        folder = team_folder(settings, team)
        buckets = buckets or BucketFiles(settings.of_team(team), folder)
        uploads = folder.path.parent
        return cls(settings.of_team(team).data_roots, folder, (uploads.parent, uploads), buckets)

    @property
    def brought(self) -> tuple[Path, ...]:
        """Folders of what was sent, or brought from a bucket."""
        return self.uploads.sets, *map(Path, self.buckets.places)

    def opener(self, key: str) -> OpenFile:
        """A function that opens a task's files. A name that was found to lie below an allowed folder may be made to
        lead elsewhere before it is opened, so the opened file is checked again."""
        roots = [*map(Path, self.roots), self.uploads.sets, self.buckets.folder]

        def open_allowed(path: Path) -> BinaryIO:
            try:
                return open_below(path, roots, self.closed)
            except OutsideError as error:
                what = f"{path} was changed, while it was read, into what this service does not read"
                raise InvalidInput(what, key, "submit it again") from error

        return open_allowed

    def real(self, place: str, key: str, only: Sequence[str] = ()) -> Path:
        """The real path of a place, links resolved, if it may be read. only: As for `BucketFiles.find`."""
        if is_upload(place):
            return self.uploads.find(upload_named(place, key), key)
        if is_in_bucket(place):
            return self.buckets.find(place, key, only)
        try:
            real = Path(place).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name with a zero byte
            raise InvalidInput(f"{place!r} is no path: {error}", key, "correct the path") from error
        # Of what was found in an upload, a file is asked for by its path.
        if not is_below(real, (*map(Path, self.roots), *self.brought), self.closed):
            own = self.closed[0]
            if real.is_relative_to(own) and is_below(real, map(Path, self.roots)):
                what = f"{place} is outside the folders that this service reads: {own} is its own"
                raise InvalidInput(what, key, "put it anywhere beside that folder")
            there = f"put it below one of: {', '.join(self.roots)}" if self.roots else "send it with `onebasis login`"
            raise InvalidInput(
                f"{place} is outside the folders that this service reads",
                key,
                f"{there}; or add its folder to `data_roots:` in a settings"
                " file, then `onebasis down` and `onebasis up --config FILE`",
            )
        return real

    def file(self, place: str, key: str) -> Path:
        """As `real`, for a regular file only: a pipe or a device would be waited for, or read for ever."""
        real = self.real(place, key)
        try:
            is_plain = real.is_file() or not real.exists()
        except OSError as error:
            raise _unseen(place, key, error) from error
        if not is_plain:
            raise InvalidInput(f"{place} is not a plain file", key, "name a file")
        return real

    def rows(self, place: str, key: str) -> Path:
        """As `file`, or a folder of such files."""
        real = self.real(place, key)
        try:
            parts = sorted(real.iterdir()) if real.is_dir() else [real]
        except OSError as error:
            raise _unseen(place, key, error) from error
        for part in parts:
            self.file(str(part), key)
        return real


def _unseen(path: str, key: str, error: OSError) -> InvalidInput:
    """The refusal of a path that cannot be looked at: in a folder that the service may not enter, or too long."""
    return InvalidInput(f"cannot look at {path}: {error.strerror}", key, "correct the path or its rights")
