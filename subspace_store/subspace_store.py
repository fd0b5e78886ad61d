"""The subspace of one base model: opened, merged into, published, rolled back, read. A plain class, no Ray.

One writer at a time, any number of readers, on one folder of object storage. What a merge does is in merge.py, what
makes it durable in version_log.py; here the two meet, in the order things happen.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound
from configs.settings import SubspaceSettings
from subspace_store import blobs, garbage, retention, version_log
from subspace_store.adapter import Adapter, adapter_from_bytes, adapter_to_bytes, check_adapter, digest
from subspace_store.forecast import Forecast, forecast
from subspace_store.merge_writer import Arrival, Draft, Written, write_refinement, write_version
from subspace_store.storage import Storage
from subspace_store.subspace_reader import SubspaceReader
from subspace_store.version import (
    CANDIDATE,
    MAIN,
    BlobRef,
    MergedTask,
    StagedAdapter,
    SubspaceState,
    TaskScore,
    Version,
)
from subspace_store.version_log import VersionLog

FORMAT_NUMBER = 2
"""Of everything below the store's folder. tests/data/stores has a store of each format that is read."""
DEFAULTS = SubspaceSettings()

Shapes = tuple[tuple[int, int], tuple[int, int]]
"""((N, D), (k_out, k_in)) of a module."""


@dataclass(frozen=True)
class RollbackPreview:
    """What moving `main` would do."""

    from_version: int
    to_version: int
    vanishing: tuple[MergedTask, ...]
    """Tasks that `main` holds now and would not hold."""
    returning: tuple[MergedTask, ...]
    """Tasks that `main` does not hold now and would hold again."""


class SubspaceStore(SubspaceReader):
    """The versions of one base model's subspace, read and written. Make one with `open`."""

    def __init__(self, storage: Storage, log: VersionLog, settings: SubspaceSettings, base: tuple[str, str]) -> None:
        super().__init__(storage, log)
        self.settings = settings
        self.base_model, self.base_sha256 = base

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        settings: SubspaceSettings = DEFAULTS,
        base_model: str = "",
        base_sha256: str = "",
        writer: str | None = None,
    ) -> SubspaceStore:
        """Open a subspace.

        Args:
            storage: Its folder; an empty one is an empty subspace.
            settings: How merges are done from now on; versions that exist do not change.
            base_model, base_sha256: Checked against the folder where both are known; empty is unknown.
            writer: Who writes. Every older writer is fenced. None reads only and never writes anything.

        Raises:
            InvalidInput: The folder belongs to another base model.
            Corrupt: A newer format, or a log that is not whole.
        """
        mine = {"format": FORMAT_NUMBER, "base_model": base_model, "base_sha256": base_sha256}
        if writer is not None:
            # Losing this race is fine: whose FORMAT it is, is checked next.
            storage.create("FORMAT", json.dumps(mine, sort_keys=True).encode())
        base = _check_format(storage, base_model, base_sha256)
        log = VersionLog(storage, writer)
        log.open()
        if writer is not None:
            log.acquire(actor=writer)
        return cls(storage, log, settings, base)

    # Writing

    def stage(self, key: str, adapter: Adapter) -> BlobRef:
        """Upload an adapter for a later merge. Outside the log: readers may, and it expires.

        Args:
            key: Below `staging/`, with the task and the attempt in it.
        """
        if not key.startswith("staging/"):
            raise InvalidInput("an upload belongs below staging/", key, "use staging/TASK/ATTEMPT/adapter.safetensors")
        return blobs.write_content(self.storage, key, adapter_to_bytes(adapter))

    def merge(self, adapters: Sequence[StagedAdapter], *, op_key: str, actor: str) -> Version:
        """Merge staged adapters in one step into one version on `candidate`.

        Args:
            op_key: Names this request: asked again, it answers with the version it made.

        Raises:
            InvalidInput: An adapter that cannot be merged here; names the task. Nothing was written.
            NotFound: An upload that is not there.
            Conflict: A task that the candidate holds already; or this writer is fenced.
            Unavailable: The outcome is unknown; ask again with the same op_key.
        """
        with self._writing():
            if (known := self._made(op_key)) is not None:
                return known
            parent = self.state.refs[CANDIDATE]
            self._refuse_doubles(adapters, parent)
            arrivals = [self._arrival(staged, self._tensors.shapes(parent)) for staged in adapters]
            written = write_version(self._draft(parent, arrivals))
            refs, body = {CANDIDATE: written.version.number}, {"version": written.version}
            self._log.commit(version_log.MERGE, op_key=op_key, actor=actor, refs=refs, body=body)
            return self._committed(written)

    def refine(self, adapters: Sequence[StagedAdapter], *, op_key: str, actor: str) -> Version:
        """Put refined adapters in the place of tasks that the candidate holds, as one version on `candidate`.

        Its basis is the candidate's and no other task moves, not by a bit. From it on a refined adapter is the task's
        adapter as delivered; the versions before keep what the task was.

        Args:
            adapters: Each in the span of the candidate's basis, as coefficients trained in it are.
            op_key: Names this request: asked again, it answers with the version it made.

        Raises:
            InvalidInput: An adapter that is not in that span, or cannot be served here; names the task. Nothing was
                written.
            NotFound: A task that the candidate does not hold, or an upload that is not there.
            Conflict: This writer is fenced.
            Unavailable: The outcome is unknown; ask again with the same op_key.

        Source:
            Share (arXiv:2602.06043), the coefficients' finetuning after merging.
        """
        with self._writing():
            if (known := self._made(op_key)) is not None:
                return known
            parent = self.state.refs[CANDIDATE]
            self._refuse_twice(adapters)
            for staged in adapters:
                self._find(staged.task_id, parent)
            retention.check_mergeable(self.state, {staged.task_id: staged.name for staged in adapters})
            arrivals = [self._arrival(staged, self._tensors.shapes(parent)) for staged in adapters]
            written = write_refinement(self._draft(parent, arrivals))
            refs, body = {CANDIDATE: written.version.number}, {"version": written.version}
            self._log.commit(version_log.REFINE, op_key=op_key, actor=actor, refs=refs, body=body)
            return self._committed(written)

    def forecast(self, adapters: Mapping[str, Adapter], version: int | None = None) -> Forecast:
        """What merging adapters would cost each task, before doing it and without data. Changes nothing.

        Args:
            adapters: Any id but those of the version's tasks to adapter.
            version: To merge onto; default the candidate.

        Raises:
            InvalidInput: An adapter that could not be merged here, or an id that is taken.
        """
        parent = self.state.refs[CANDIDATE] if version is None else self._known(version)
        with self._reading(parent):
            for id_, adapter in adapters.items():
                if id_ in self.state.tasks_at(parent):
                    raise InvalidInput("is a task that this version holds already", id_, "choose another id")
                check_adapter(adapter)
                self._check(adapter, self._tensors.shapes(parent))
            return forecast(self._tensors, self.state, parent, adapters, self.settings)

    def remove(
        self, task_id: str, *, op_key: str, actor: str, reason: str = "", publish: bool = False
    ) -> Version | None:
        """Make the candidate again without a task: every version from the task's birth on, one after another, from
        the adapters as they were delivered and in the groups they were merged in.

        The outcome is what a store would hold that never saw the task, if `settings` are what they were. If the
        versions right before the birth have expired, it begins after the newest one that has not. Where an
        adapter as delivered is gone, the task is merged as its coefficients have it now, and the version names it in
        `approximate`. The versions that hold the removed task stay until they expire.

        Args:
            publish: Move `main` as well, in the same record: a person's decision, no gate is asked. Only while `main`
                is the candidate: what no gate has judged yet does not come along.

        Returns:
            The new candidate; None if it is the empty subspace.

        Raises:
            NotFound: The candidate does not hold the task.
            Conflict: `main` should move, and is held or is not the candidate.

        Cost:
            One merge per version since the birth, and one record for each: interrupted, the same op_key goes on.
        """
        with self._writing():
            done = self._done(op_key)
            if done is None:
                before = self.state.refs[CANDIDATE]
                task = self._find(task_id, before)
                if publish:
                    retention.check_not_held(self.state)
                    retention.check_judged(self.state)
                done = self._remake_without(task, op_key, actor)
                body = {"version": done, "from": before, "task": task.name, "task_id": task_id, "reason": reason}
                refs = {CANDIDATE: done, **({MAIN: done} if publish else {})}
                self._log.commit(version_log.REMOVE, op_key=op_key, actor=actor, refs=refs, body=body)
            return self.state.versions.get(done)

    def record_scores(self, version: int, scores: Sequence[TaskScore], *, op_key: str, actor: str) -> None:
        """Write measured scores of a version; a task's later score replaces its earlier one. NaN is kept.

        Raises:
            NotFound: No such version, or a task that it does not hold.
            InvalidInput: An infinite score.
        """
        with self._writing():
            if self._done(op_key) is not None:
                return
            held = self.state.tasks_at(self._known(version))
            for score in scores:
                if score.task_id not in held:
                    raise NotFound(f"version {version} holds no task {score.task_id}")
                if math.isinf(score.score):
                    raise InvalidInput("a score cannot be infinite", score.task_id, "write NaN if it was not measured")
            body = {"version": version, "scores": tuple(scores)}
            self._log.commit(version_log.SCORES, op_key=op_key, actor=actor, body=body)

    def publish(self, version: int, *, op_key: str, actor: str) -> None:
        """Move `main` to the candidate.

        Raises:
            Conflict: `version` is not the candidate any more, or `main` is held.
        """
        with self._writing():
            if self._done(op_key) is None:
                self._require_candidate(version)
                retention.check_not_held(self.state)
                body = {"version": version}
                self._log.commit(version_log.PUBLISH, op_key=op_key, actor=actor, refs={MAIN: version}, body=body)

    def reject(self, version: int, reason: str, *, op_key: str, actor: str) -> None:
        """Mark the candidate as rejected and move `candidate` back to `main`. The version stays readable.

        Raises:
            Conflict: `version` is not the candidate any more, or is published already.
        """
        with self._writing():
            if self._done(op_key) is None:
                self._require_candidate(version)
                main = self.state.refs[MAIN]
                if version == main:
                    raise Conflict(f"version {version} is published", todo="roll back instead")
                body = {"version": version, "reason": reason}
                self._log.commit(version_log.REJECT, op_key=op_key, actor=actor, refs={CANDIDATE: main}, body=body)

    def preview_rollback(self, version: int) -> RollbackPreview:
        """What `rollback` would do; changes nothing.

        Raises:
            NotFound: No such version. 0 is the empty subspace.
            InvalidInput: A version that was rejected or has expired, or that no gate has let pass yet.
        """
        return _preview(self.state, self.state.refs[MAIN], self._allowed(version))

    def rollback(
        self, version: int, *, op_key: str, actor: str, reason: str = "", hold: bool = False
    ) -> RollbackPreview:
        """Move `main` and `candidate` to a version, backwards or forwards again, in one record.

        Args:
            hold: Hold `main` there as well, in the same record; see `hold`.

        Cost:
            One record. Nothing is copied or deleted.

        Raises: As `preview_rollback`.
        """
        with self._writing():
            if self._done(op_key) is not None:
                return self._rollback_done(op_key)
            preview = self.preview_rollback(version)
            body = {"version": version, "from": preview.from_version, "reason": reason, "hold": hold}
            refs = {MAIN: version, CANDIDATE: version}
            self._log.commit(version_log.ROLLBACK, op_key=op_key, actor=actor, refs=refs, body=body)
            return preview

    # Names, and what they keep. Each is one record; asked for what is so already, none.

    def tag(self, name: str, version: int, *, actor: str, op_key: str = "") -> None:
        """Name a version for ever. A tagged version never expires.

        Raises:
            InvalidInput: A name that a branch or a version has or could have; a rejected or expired version.
            NotFound: No such version.
            Conflict: The tag names another version.
        """
        self._change(lambda state: retention.tag(state, name, version), actor, op_key)

    def hold(self, reason: str, *, actor: str, op_key: str = "") -> None:
        """Keep `main` where it is: publishing is refused, merging and rolling back go on.

        Raises:
            Conflict: Somebody holds it already, or for another reason.
        """
        self._change(lambda state: retention.hold(state, reason, actor), actor, op_key)

    def release(self, *, actor: str, op_key: str = "") -> None:
        """Let publishing move `main` again."""
        self._change(retention.release, actor, op_key)

    def quarantine(self, task_id: str, reason: str, *, actor: str, op_key: str = "") -> None:
        """Keep a task from being merged. Versions that hold it stay as they are."""
        self._change(lambda state: retention.quarantine(state, task_id, reason), actor, op_key)

    def unquarantine(self, task_id: str, *, actor: str, op_key: str = "") -> None:
        """Let a task be merged again."""
        self._change(lambda state: retention.unquarantine(state, task_id), actor, op_key)

    def pin(self, version: int, owner: str, until: float | None = None, *, actor: str, op_key: str = "") -> None:
        """Keep a version from expiring; the same owner again moves the end.

        Args:
            until: Unix seconds; None: until `unpin`.

        Raises:
            InvalidInput: An expired version, or no owner.
            NotFound: No such version.
        """
        self._change(lambda state: retention.pin(state, version, owner, until), actor, op_key)

    def unpin(self, version: int, owner: str, *, actor: str, op_key: str = "") -> None:
        """Give a pin up."""
        self._change(lambda state: retention.unpin(state, version, owner), actor, op_key)

    def expire(self, versions: Iterable[int], *, now: float, actor: str, op_key: str = "") -> None:
        """Give versions up for ever; `collect` deletes what only they needed. See `retention.expirable`.

        Args:
            now: Unix seconds: pins that ended before do not count.

        Raises:
            Conflict: A branch, a tag or a pin names one of them. None has expired then.
            NotFound: No such version.
        """
        wanted = tuple(versions)
        self._change(lambda state: retention.expire(state, wanted, now), actor, op_key)

    def drop_adapters(self, task_ids: Collection[str], *, actor: str, op_key: str = "") -> None:
        """Let go of adapters as they were delivered; heads and what the subspace holds of the tasks stay.

        For ever: `delivered` has nothing to give then, and when another task is removed these are merged again
        approximately.

        Raises:
            NotFound: A task that no live version holds.
            Conflict: A task that is not published yet.
        """
        with self._writing():
            if self._done(op_key) is not None:
                return
            heads = {
                key: blobs.write_blob(
                    self.storage, self._log.epoch, adapter_to_bytes(replace(self._read_delivered(task), modules={}))
                )
                for key, task in retention.droppable(self.state, task_ids).items()
            }
            self._change(lambda _: retention.drop(heads), actor, op_key)

    def collect(
        self, *, uploads_in_use: Callable[[], Collection[str]] | None = None, really: bool = False
    ) -> garbage.Collected:
        """Find what no live version needs, and with `really` delete it; see `garbage.collect`.

        Does not wait for a merge that is under way: another thread may call it.
        """
        return garbage.collect(self._log, uploads_in_use=uploads_in_use, really=really)

    def _change(self, judge: Callable[[SubspaceState], retention.Change | None], actor: str, op_key: str) -> None:
        with self._writing():
            if self._done(op_key) is not None:
                return
            change = judge(self.state)
            if change is not None:
                self._log.commit(change.op, op_key=op_key, actor=actor, body=change.body)
            else:
                # No record will tell us that a newer writer has changed it since: look.
                self._log.refresh()
                self._log.finish_pending()

    # One merge, step by step

    def _remake_without(self, task: MergedTask, op_key: str, actor: str) -> int:
        """The newest of the versions made again, each with a record of its own that no branch names yet."""
        candidate = self.state.refs[CANDIDATE]
        line, newest = self.state.lineage(candidate), self.state.tasks_at(candidate)
        start = parent = self._start_of_remake(task.task_id, line)
        for version in line:
            if version.number <= start:
                continue
            others = [old.task_id for old in version.added if old.task_id != task.task_id]
            arrivals = [self._again(newest[id_], candidate) for id_ in others]
            if not arrivals:
                continue
            refined = [f" {newest[id_].version}" for id_ in others if newest[id_].version != version.number]
            step_key = f"{op_key} {version.number}{''.join(refined)}"
            known = self._done(step_key)
            if known is not None and known not in self.state.expired and self.state.versions[known].parent == parent:
                parent = known
                continue
            removed = (*version.removed, task.task_id)
            written = write_version(replace(self._draft(parent, arrivals), remakes=version.number, removed=removed))
            key = step_key if known is None else ""  # a key names one version, and that one has expired
            self._log.commit(version_log.MERGE, op_key=key, actor=actor, body={"version": written.version})
            parent = self._committed(written).number
        return parent

    def _start_of_remake(self, task_id: str, line: Sequence[Version]) -> int:
        """The version that is right before all that must be made again without a task."""
        births = {task.task_id: version.number for version in line for task in version.added}
        first = births[task_id]
        while True:
            # Not onto an expired version: what it was may be gone, or about to be deleted (garbage.py).
            alive = (v.number for v in line if v.number < first and v.number not in self.state.expired)
            start = max(alive, default=0)
            # A refinement in a basis that will not be again: its task is merged anew, as it is now.
            older = [births[t.task_id] for v in line if v.number > start for t in v.refined]
            if not older or min(older) > start:
                return start
            first = min(older)

    def _again(self, task: MergedTask, candidate: int) -> Arrival:
        """A task that was merged before: as it was delivered, or else as the candidate has it."""
        if task.adapter.key not in self.state.heads:
            return Arrival(task.task_id, task.name, self._read_delivered(task), task.adapter)
        adapter = self.adapter(task.task_id, candidate)
        return Arrival(task.task_id, task.name, adapter, adapter_to_bytes(adapter), approximate=True)

    def _refuse_doubles(self, adapters: Sequence[StagedAdapter], parent: int) -> None:
        self._refuse_twice(adapters)
        retention.check_mergeable(self.state, {staged.task_id: staged.name for staged in adapters})
        held = self.state.tasks_at(parent)
        for staged in adapters:
            if staged.task_id in held:
                raise Conflict(
                    f"was merged as version {held[staged.task_id].version}", f"task {staged.name} ({staged.task_id})"
                )

    @staticmethod
    def _refuse_twice(adapters: Sequence[StagedAdapter]) -> None:
        if not adapters:
            raise InvalidInput("a merge needs at least one adapter")
        ids = [staged.task_id for staged in adapters]
        for staged in adapters:
            if ids.count(staged.task_id) > 1:
                raise InvalidInput("is named twice in one merge", f"task {staged.name} ({staged.task_id})")

    def _arrival(self, staged: StagedAdapter, shapes: Mapping[str, Shapes]) -> Arrival:
        """One upload, checked. Every complaint names the task."""
        who = f"task {staged.name} ({staged.task_id})"
        try:
            content = self.storage.read(staged.key)
            if digest(content) != staged.sha256:
                raise InvalidInput(
                    f"{staged.key} has sha256 {digest(content)[:12]}…, the task says {staged.sha256[:12]}…",
                    todo="upload the adapter again",
                )
            adapter = adapter_from_bytes(content, staged.key)
            self._check(adapter, shapes)
        except NotFound as error:
            raise NotFound(f"the upload {staged.key} is not there", who, "train the task again") from error
        except (InvalidInput, Corrupt) as error:
            inside = f"{error.where}: {error.what}" if error.where else error.what
            raise InvalidInput(inside, who, error.todo) from error
        return Arrival(staged.task_id, staged.name, adapter, content)

    def _check(self, adapter: Adapter, shapes: Mapping[str, Shapes]) -> None:
        """That an adapter can be merged here."""
        self._check_base(adapter)
        for name, update in adapter.modules.items():
            if name in shapes and shapes[name][0] != update.shape:
                raise InvalidInput(f"has shape {update.shape}, the subspace has {shapes[name][0]}", name)
        if self.settings.variant == "paper":
            for update in adapter.modules.values():
                update.raw()

    def _check_base(self, adapter: Adapter) -> None:
        for what, theirs, ours in (
            ("base model", adapter.base_model, self.base_model),
            ("base model's sha256", adapter.base_sha256, self.base_sha256),
        ):
            # A name is always known to an adapter; a digest may be unknown to either.
            if ours and theirs != ours and (theirs or what == "base model"):
                raise InvalidInput(
                    f"the {what} is {theirs!r}, this subspace has {ours!r}", todo="train on this subspace's base model"
                )

    def _draft(self, parent: int, arrivals: Sequence[Arrival]) -> Draft:
        return Draft(self.storage, self._log.epoch, self._tensors, self.state, parent, arrivals, self.settings)

    def _committed(self, written: Written) -> Version:
        self._tensors.keep(written.version.number, written.bases, written.tasks)
        return self.state.versions[written.version.number]

    # Looking things up

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One request. What is gone for a fenced writer is not damaged: a newer one has collected it."""
        with self._lock:
            try:
                yield
            except (Corrupt, NotFound):
                self._log.refresh()
                self._log.finish_pending()
                raise

    def _done(self, op_key: str) -> int | None:
        """The version that this request made or concerned, if it was done; after any unknown outcome is settled."""
        self._log.finish_pending()
        return self.state.op_keys.get(op_key) if op_key else None

    def _made(self, op_key: str) -> Version | None:
        """The version that this request made, if it was done."""
        done = self._done(op_key)
        if done is not None and done not in self.state.versions:
            raise Conflict(f"op_key {op_key!r} names an operation that made no version", todo="choose another")
        return None if done is None else self.state.versions[done]

    def _rollback_done(self, op_key: str) -> RollbackPreview:
        body = next(record.body for record in self._log.records(newest_first=True) if record.op_key == op_key)
        return _preview(self.state, int(body.get("from", body["version"])), int(body["version"]))

    def _allowed(self, version: int) -> int:
        retention.check_usable(self.state, version)
        if version not in self.state.published:
            raise InvalidInput(
                f"version {version} never passed the gate", self.storage.url, "name a version that `main` was before"
            )
        return version

    def _require_candidate(self, version: int) -> None:
        candidate = self.state.refs[CANDIDATE]
        if self._known(version) != candidate:
            raise Conflict(f"the candidate is version {candidate}, not {version}", self.storage.url, "judge that one")


def _check_format(storage: Storage, base_model: str, base_sha256: str) -> tuple[str, str]:
    """(base model, sha256) of the folder, or the caller's where the folder does not say."""
    where = f"{storage.url}/FORMAT"
    try:
        found = json.loads(storage.read("FORMAT"))
        number, theirs = int(found["format"]), (str(found["base_model"]), str(found["base_sha256"]))
    except NotFound:
        return base_model, base_sha256
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"is no FORMAT of a subspace: {error}", where) from error
    if number > FORMAT_NUMBER:
        raise Corrupt(f"has format {number}, this code reads up to {FORMAT_NUMBER}", where, "use a newer onebasis")
    if number < FORMAT_NUMBER:
        raise InvalidInput(
            f"has format {number}, which onebasis 0.1 wrote and this code does not read",
            where,
            "export its tasks with the version that wrote it, and import them here; or choose another storage.url",
        )
    for what, stored, ours in zip(("name", "sha256"), theirs, (base_model, base_sha256), strict=True):
        if stored and ours and stored != ours:
            raise InvalidInput(
                f"this subspace belongs to the base model with {what} {stored!r}, not {ours!r}",
                where,
                "choose another storage.url, or the base model it was made for",
            )
    return theirs[0] or base_model, theirs[1] or base_sha256


def _preview(state: SubspaceState, old: int, new: int) -> RollbackPreview:
    before, after = state.tasks_at(old), state.tasks_at(new)
    return RollbackPreview(
        old,
        new,
        tuple(merged for task, merged in before.items() if task not in after),
        tuple(merged for task, merged in after.items() if task not in before),
    )
