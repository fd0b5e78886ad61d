"""The subspace of one base model: opened, merged into, published, rolled back, read. A plain class, no Ray.

One writer at a time, any number of readers, on one folder of object storage. What a merge does is in merge.py, what
makes it durable in version_log.py; here the two meet, in the order things happen. What is done with versions that are
there, publishing, rolling back, keeping, is in refs.py; reading in subspace_reader.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from configs.document import Line
from configs.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    MissingAdapters,
    NameTaken,
    NotFound,
    NotWritten,
    OutcomeUnknown,
    RefusedAdapters,
)
from configs.settings import SubspaceSettings
from subspace_store.adapter import Adapter, adapter_from_bytes, adapter_to_bytes
from subspace_store.digests import digest
from subspace_store.files import blobs
from subspace_store.log import fold, removal, retention
from subspace_store.log.store_format import make_store
from subspace_store.log.version import CANDIDATE, MAIN, BlobRef, Identity, MergedTask, StagedAdapter, Version
from subspace_store.log.version_log import VersionLog
from subspace_store.merge_writer import Arrival, Draft, Written, write_refinement, write_restored, write_version
from subspace_store.refs import Refs, another_request
from subspace_store.storage.protocol import Storage
from subspace_store.strict import TaskId, strict
from subspace_store.subspace_reader import DEFAULTS, without_renewal


class SubspaceStore(Refs):
    """The one writer of a base model's subspace, which it reads as well. Make one with `open`."""

    @classmethod
    @strict
    def open(  # type: ignore[override]  # nobody writes without saying who
        cls,
        storage: Storage,
        *,
        writer: Line,
        settings: SubspaceSettings = DEFAULTS,
        base_model: Line = "",
        base_sha256: Line = "",
        service: Identity | None = None,
        claim: bool = False,
        force: bool = False,
    ) -> SubspaceStore:
        """Open a subspace to write it; `SubspaceReader.open` reads one.

        Args:
            storage: Its folder; an empty one is an empty subspace.
            writer: Name of the writing process, for people. Every older writer is fenced.
            settings: How merges are done from now on; versions that exist do not change.
            base_model, base_sha256: Checked against the folder where both are known; empty is unknown.
            service: The service on whose behalf it writes.
            claim: The store belongs to that service from now on, until it is released.
            force: Write although the store belongs to another service.

        Raises:
            OtherBaseModel: The folder belongs to another base model.
            UnsafeStorage: The storage lets both of two writers win; found out before anything is written.
            OwnedByAnother: The folder belongs to another service.
            Corrupt: A newer format, or a log that is not whole.
        """
        base = make_store(storage, base_model, base_sha256)
        log = VersionLog(storage, writer)
        log.open()
        log.acquire(writer, service, claim=claim, force=force)
        return cls(storage, log, base, settings)

    # Writing

    @strict
    def release_ownership(self, service: Identity, *, actor: Line) -> None:
        """Give the store up: any service may open it from now on. See `VersionLog.release`."""
        with self._lock:
            self._log.release(actor, service)

    @strict
    def stage(self, key: Line, adapter: Adapter) -> BlobRef:
        """Upload an adapter for a later merge; see `blobs.stage`."""
        return blobs.stage(self.storage, key, adapter)

    @strict
    def merge(self, adapters: Sequence[StagedAdapter], *, op_key: Line, actor: Line) -> Version:
        """Merge staged adapters in one step into one version on `candidate`.

        One that `replaces` a task of its name is a revision of it: the earlier one leaves with all that the version
        stores for it, and the versions before keep it. The other tasks move as in any merge. Directions that only the
        earlier one needed stay in the basis until a compaction.

        Args:
            op_key: Names this request: asked again, it answers with the version it made.

        Raises:
            RefusedAdapters: Those that cannot be merged here, or that replace what is not there. Nothing was written.
            MissingAdapters: Those whose uploads are not there.
            Conflict: A task that the candidate holds already; or this writer is fenced.
            NameTaken: The candidate holds another task of an adapter's name, and not the one that it replaces.
            NotWritten: The storage was away, is full or refuses writes: nothing was done.
            OutcomeUnknown: Ask again with the same op_key.
        """
        with self._writing():
            if (known := self._made(op_key, fold.MERGE, adapters)) is not None:
                return known
            parent = self.state.refs[CANDIDATE]
            self._refuse_doubles(adapters, parent)
            arrivals = self._arrivals(adapters, parent)
            written = write_version(self._draft(parent, arrivals))
            return self._commit(fold.MERGE, written, op_key, actor, {CANDIDATE: written.version.number})

    @strict
    def refine(self, adapters: Sequence[StagedAdapter], *, op_key: Line, actor: Line) -> Version:
        """Put refined adapters in the place of tasks that the candidate holds, as one version on `candidate`.

        Its basis is the candidate's and no other task moves, not by a bit. From it on a refined adapter is the task's
        adapter as delivered; the versions before keep what the task was.

        Args:
            adapters: Each in the span of the candidate's basis, as coefficients trained in it are.
            op_key: Names this request: asked again, it answers with the version it made.

        Raises:
            RefusedAdapters: Those that are not in that span, or cannot be served here. Nothing was written.
            MissingAdapters: Those whose tasks the candidate does not hold, or whose uploads are not there.
            Conflict: This writer is fenced.
            NotWritten: The storage was away, is full or refuses writes: nothing was done.
            OutcomeUnknown: Ask again with the same op_key.

        Source:
            Share (arXiv:2602.06043), the coefficients' finetuning after merging.
        """
        with self._writing():
            if (known := self._made(op_key, fold.REFINE, adapters)) is not None:
                return known
            parent = self.state.refs[CANDIDATE]
            self._refuse_twice(adapters)
            self._refuse_strangers(adapters, parent)
            retention.check_mergeable(self.state, {staged.task_id: staged.name for staged in adapters})
            arrivals = self._arrivals(adapters, parent)
            written = write_refinement(self._draft(parent, arrivals))
            return self._commit(fold.REFINE, written, op_key, actor, {CANDIDATE: written.version.number})

    @strict
    def restore_revision(self, task_id: TaskId, *, op_key: Line, actor: Line, publish: bool = False) -> Version:
        """Put an earlier revision of a task in the place of the one that the candidate holds, as one version on
        `candidate`, which is judged like any other.

        Its basis is the candidate's and no other task moves, not by a bit. The revision is placed in it from its
        adapter as delivered, and what the basis lacks is its private part. `preview_restore` shows the error that it
        will have. Where that is not possible (`merge_writer.is_in_place`), it is an ordinary merge. If the adapter was
        let go, the revision is placed as the newest version that holds it has it (`Version.approximate`).

        Args:
            task_id: Of the earlier revision.
            op_key: Names this request: asked again, it answers with the version it made.
            publish: Move `main` as well, in the same record: a person's decision, no gate is asked. Only while `main`
                is the candidate: what no gate has judged yet does not come along.

        Raises:
            NotFound: No version that has not expired, or been rejected, holds that revision; or the candidate holds no
                revision of the task.
            Conflict: The candidate holds that very revision; or `main` should move, and is held or is not the
                candidate.
            RefusedAdapters: It is quarantined.

        Cost:
            Reads the bases of the modules that it adapts; writes its coefficients and private part.
        """
        with self._writing():
            done = self._done(op_key, fold.asked(fold.MERGE))
            if done is not None:
                made = self.state.versions.get(done)
                is_it = made is not None and [task.task_id for task in made.added] == [task_id] and bool(made.left)
                if made is None or not is_it or (publish and done not in self.state.published):
                    raise another_request(op_key, "merge")
                return made
            if publish:
                retention.check_not_held(self.state)
                retention.check_judged(self.state)
            parent = self.state.refs[CANDIDATE]
            earlier, present = self._restorable(task_id)
            arrival = replace(self._again(earlier, parent), replaces=present.task_id)
            written = write_restored(self._draft(parent, [arrival]), earlier)
            number = written.version.number
            refs = {CANDIDATE: number, **({MAIN: number} if publish else {})}
            return self._commit(fold.MERGE, written, op_key, actor, refs)

    @strict
    def remove(
        self, task_id: TaskId, *, op_key: Line, actor: Line, reason: Line = "", publish: bool = False
    ) -> Version | None:
        """Make the candidate again without a task and without its earlier revisions: every version since the first of
        them was merged, one after another, from the adapters as they were delivered and in the groups they were merged
        in. Revisions of other tasks take each other's places as they did.

        The outcome is what a store would hold that never saw the task, if `settings` are what they were. The renewed
        bases are the exception: they are carried over as they are, since tasks that were trained in them would lose
        theirs; they are directions of many tasks, and no task's coefficients. If the versions right before the birth
        have expired, it begins after the newest one that has not. Where an adapter as delivered is gone, the task is
        merged as its coefficients have it now, and the version names it in `approximate`. A task that was refined after
        the birth was trained in a basis that the removed one had helped to make: it is merged as refined. The versions
        that hold the removed task stay until they expire.

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
            done = self._done(op_key, fold.asked(fold.REMOVE, task_id=task_id, publish=publish))
            if done is None:
                before = self.state.refs[CANDIDATE]
                task = self._find(task_id, before)
                if publish:
                    retention.check_not_held(self.state)
                    retention.check_judged(self.state)
                done = self._remake_without(task, op_key, actor)
                body = {"version": done, "from": before, "task": task.name, "task_id": task_id, "reason": reason}
                refs = {CANDIDATE: done, **({MAIN: done} if publish else {})}
                self._log.commit(fold.REMOVE, op_key=op_key, actor=actor, refs=refs, body=body)
            return self.state.versions.get(done)

    @strict
    def compact(self, *, op_key: Line, actor: Line, publish: bool = False) -> Version:
        """Merge all tasks of the candidate at once: the cheapest basis for them together, in place of the one that grew
        task by task. It becomes the candidate.

        Renewed bases are carried over as they are, and what lies in them is placed there; the first bases are found for
        the rest.

        No task moves: each is held to the last number as the candidate held it, so its scores and its error stay what
        they are, and no later merge takes anything from it. The versions before stay until they expire.

        Args:
            publish: Move `main` as well, in the same record: a person's decision, no gate is asked. Only while `main`
                is the candidate: what no gate has judged yet does not come along.

        Raises:
            InvalidInput: The candidate is the empty subspace; or merges are made under settings that take from tasks.
            Conflict: `main` should move, and is held or is not the candidate.

        Cost:
            One merge of all tasks: O(N·(T·R)²) per module of width N where T·R < N. Memory: all adapters.
        """
        with self._writing():
            done = self._done(op_key, fold.asked(fold.COMPACT, publish=publish))
            if done is None:
                before = self.state.refs[CANDIDATE]
                if not before:
                    raise InvalidInput("the candidate is the empty subspace", "compact", "merge tasks first")
                if publish:
                    retention.check_not_held(self.state)
                    retention.check_judged(self.state)
                done = self._made_at_once(before, op_key, actor)
                refs = {CANDIDATE: done, **({MAIN: done} if publish else {})}
                body = {"version": done, "from": before}
                self._log.commit(fold.COMPACT, op_key=op_key, actor=actor, refs=refs, body=body)
            return self.state.versions[done]

    # One merge, step by step

    def _made_at_once(self, candidate: int, op_key: str, actor: str) -> int:
        """A version of all tasks of the candidate, with a record of its own that no branch names yet."""
        step_key = f"{op_key} {candidate}"
        known = self._done(step_key, fold.asked(fold.MERGE))
        if known is not None and known not in self.state.expired:
            return known
        held, errors = self.state.tasks_at(candidate), self.state.errors(candidate)
        adapters = self._held(candidate)
        arrivals = [Arrival(id_, task.name, adapters[id_], task.adapter) for id_, task in held.items()]
        settings = without_renewal(self.settings)
        draft = replace(self._draft(0, arrivals), remakes=candidate, renewed_of=candidate, settings=settings)
        written = write_version(draft)
        added = [
            replace(
                task,
                delivered_energy=held[task.task_id].delivered_energy,
                error_at_birth=errors[task.task_id],
                rank_total=held[task.task_id].rank_total,
                parameter_count=held[task.task_id].parameter_count,
            )
            for task in written.version.added
        ]
        written = replace(written, version=replace(written.version, added=tuple(added)))
        return self._step(written, step_key if known is None else "", actor)

    def _step(self, written: Written, key: str, actor: str) -> int:
        """Commit one version of a request that makes several; no branch names it yet.

        Args:
            key: Of this step; empty if a version that has expired has it already.
        """
        try:
            return self._commit(fold.MERGE, written, key, actor, {}).number
        except OutcomeUnknown as error:  # of this step; the request itself is not done
            what = f"version {written.version.remakes} was not made again for certain: {error.what}"
            raise NotWritten(what, error.where, "ask again under the same key: it goes on from there") from error

    def _remake_without(self, task: MergedTask, op_key: str, actor: str) -> int:
        """The newest of the versions made again, each with a record of its own that no branch names yet."""
        candidate = self.state.refs[CANDIDATE]
        gone = removal.revisions_along(self.state, task.task_id, candidate)
        parent = removal.start_of_remakes(self.state, task.task_id, candidate)
        for remake in removal.remakes(self.state, task.task_id, candidate):
            version, others = remake.version, remake.tasks
            # Whatever has the name there leaves; not all earlier revisions need be there again.
            there = {one.name: one.task_id for one in self.state.tasks_at(parent).values()}
            arrivals = [replace(self._again(one, candidate), replaces=there.get(one.name)) for one in others]
            refined = [f" {one.version}" for one in others if one.version != version.number]
            step_key = f"{op_key} {version.number}{''.join(refined)}"
            known = self._done(step_key, fold.asked(fold.MERGE))
            if known is not None and known not in self.state.expired and self.state.versions[known].parent == parent:
                parent = known
                continue
            draft = replace(self._draft(parent, arrivals), remakes=version.number, renewed_of=candidate)
            written = write_version(replace(draft, removed=(*version.removed, *gone)))
            # A key names one version, and that one has expired.
            parent = self._step(written, step_key if known is None else "", actor)
        return parent

    def _again(self, task: MergedTask, candidate: int) -> Arrival:
        """A task that was merged before, or an earlier revision of one, see `_to_merge_again`."""
        adapter = self._to_merge_again(task, candidate)
        if task.adapter.key not in self.state.heads:
            return Arrival(task.task_id, task.name, adapter, task.adapter)
        return Arrival(task.task_id, task.name, adapter, adapter_to_bytes(adapter), approximate=True)

    def _refuse_doubles(self, adapters: Sequence[StagedAdapter], parent: int) -> None:
        self._refuse_twice(adapters)
        retention.check_mergeable(self.state, {staged.task_id: staged.name for staged in adapters})
        held = self.state.tasks_at(parent)
        names = {task.name: task_id for task_id, task in held.items()}
        for staged in adapters:
            who, there = f"task {staged.name} ({staged.task_id})", names.get(staged.name)
            if staged.task_id in held:
                raise Conflict(f"was merged as version {held[staged.task_id].version}", who)
            if there is not None and there != staged.replaces:
                what = f"version {parent} holds another task of this name, {there}"
                todo = f"submit it under another name, or `onebasis store remove {there}` first"
                if staged.replaces is not None:
                    what = (
                        f"version {parent} holds {there} under this name, not {staged.replaces}, which it would replace"
                    )
                    todo = f"train it again as a revision of {there}"
                raise NameTaken(what, who, todo, staged.task_id, there)
            if staged.replaces is not None and there is None:
                other = held.get(staged.replaces)
                holds = f"{staged.replaces} is {other.name} there" if other else "no task of this name is there"
                what = f"would replace {staged.replaces} in version {parent}, and {holds}"
                raise RefusedAdapters(what, who, "submit it as a task of its own", (staged.task_id,))
            names[staged.name] = staged.task_id

    @staticmethod
    def _refuse_twice(adapters: Sequence[StagedAdapter]) -> None:
        if not adapters:
            raise InvalidInput("a merge needs at least one adapter")
        ids = [staged.task_id for staged in adapters]
        if twice := {staged.task_id: staged for staged in adapters if ids.count(staged.task_id) > 1}:
            raise RefusedAdapters("is named twice in one merge", _who(twice.values()), "", tuple(twice))

    def _refuse_strangers(self, adapters: Sequence[StagedAdapter], parent: int) -> None:
        """Refuse what would not take the place of a task of this name."""
        held = self.state.tasks_at(parent)
        if missing := [staged for staged in adapters if staged.task_id not in held]:
            what, ids = f"version {parent} does not hold it", tuple(staged.task_id for staged in missing)
            raise MissingAdapters(what, _who(missing), "", ids)
        if renamed := [staged for staged in adapters if staged.name != held[staged.task_id].name]:
            what = "is called otherwise: " + ", ".join(held[staged.task_id].name for staged in renamed)
            raise RefusedAdapters(what, _who(renamed), "", tuple(staged.task_id for staged in renamed))
        if replacing := [staged for staged in adapters if staged.replaces is not None]:
            what = "is refined, and stays the task that it is: it replaces none"
            raise RefusedAdapters(what, _who(replacing), "merge it", tuple(staged.task_id for staged in replacing))

    def _arrivals(self, adapters: Sequence[StagedAdapter], parent: int) -> list[Arrival]:
        """The uploads, checked. All are looked at, so that those that are refused are told of at once."""
        shapes = self._heads.module_shapes(parent)
        arrivals: list[Arrival] = []
        refusals: dict[str, InvalidInput] = {}
        missing: list[StagedAdapter] = []
        for staged in adapters:
            try:
                arrivals.append(arrival := self._arrival(staged, shapes))
            except NotFound:
                missing.append(staged)
            except InvalidInput as error:
                refusals[staged.task_id] = error
            else:
                # What it opens, the others of its merge have to fit.
                shapes |= {name: update.shape for name, update in arrival.adapter.modules.items()}
        if refusals:
            raise _refused([staged for staged in adapters if staged.task_id in refusals], refusals)
        if missing:
            keys = ", ".join(staged.key for staged in missing)
            ids = tuple(staged.task_id for staged in missing)
            raise MissingAdapters(f"the upload {keys} is not there", _who(missing), "train the task again", ids)
        return arrivals

    def _arrival(self, staged: StagedAdapter, shapes: Mapping[str, tuple[int, int]]) -> Arrival:
        """One upload, checked.

        Raises:
            NotFound: It is not there.
            InvalidInput: It cannot be merged here; says where in it and why.
        """
        try:
            content = self.storage.read(staged.key)
            if digest(content) != staged.sha256:
                raise InvalidInput(
                    f"{staged.key} has sha256 {digest(content)[:12]}…, the task says {staged.sha256[:12]}…",
                    todo="upload the adapter again",
                )
            adapter = adapter_from_bytes(content, staged.key)
            self._check(adapter, shapes)
        except Corrupt as error:  # an upload is no part of the subspace: nothing of that is damaged
            raise InvalidInput(error.what, error.where, error.todo or "upload the adapter again") from error
        return Arrival(staged.task_id, staged.name, adapter, content, replaces=staged.replaces)

    def _draft(self, parent: int, arrivals: Sequence[Arrival]) -> Draft:
        return Draft(self.storage, self._log.epoch, self._tensors, self.state, parent, arrivals, self.settings)

    def _commit(self, op: str, written: Written, op_key: str, actor: str, refs: Mapping[str, int]) -> Version:
        version = written.version
        body = {"version": version}
        self._log.commit(fold.making(op, version), op_key=op_key, actor=actor, refs=refs, body=body)
        self._tensors.keep(version.number, written.bases, written.tasks)
        return self.state.versions[version.number]

    def _made(self, op_key: str, operation: str, adapters: Sequence[StagedAdapter]) -> Version | None:
        """The version that this request made, if it was done.

        Raises:
            Conflict: Under this key another operation was done, or one of other adapters. A version that holds more
                than is asked for answers too: a task may have been cancelled since.
        """
        done = self._done(op_key, fold.asked(operation))
        if done is None:
            return None
        version = self.state.versions.get(done)
        brought = version.brought if version else ()
        made = {(task.task_id, task.replaces) for task in brought}
        if version is None or not {(staged.task_id, staged.replaces) for staged in adapters} <= made:
            raise another_request(op_key, f"{operation} of {', '.join(task.name for task in brought) or 'nothing'}")
        return version


def _who(adapters: Iterable[StagedAdapter]) -> str:
    return ", ".join(f"task {staged.name} ({staged.task_id})" for staged in adapters)


def _refused(adapters: Sequence[StagedAdapter], why: Mapping[str, InvalidInput]) -> RefusedAdapters:
    """why: Task id to what is wrong with its adapter."""
    whats = [error.sentence for error in why.values()]
    if len(adapters) == 1:
        (error,) = why.values()
        return RefusedAdapters(whats[0], _who(adapters), error.todo, tuple(why))
    lines = [f"\n  {_who([staged])}: {what}" for staged, what in zip(adapters, whats, strict=True)]
    todo = "; ".join(dict.fromkeys(error.todo for error in why.values() if error.todo))
    return RefusedAdapters(f"{len(adapters)} adapters cannot be merged:{''.join(lines)}", "", todo, tuple(why))
