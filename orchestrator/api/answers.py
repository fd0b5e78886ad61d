"""Answers of published tasks: by a worker that is free, or by this process where no service runs."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from configs.errors import NotFound, OnebasisError, Unavailable, WorkersBusy
from orchestrator.api import requests
from orchestrator.api.requests import Json
from orchestrator.api.sources import Sources
from subspace_store.log.version import MAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from orchestrator.api.versions import Versions
    from orchestrator.cluster import Cluster
    from workers.serving.question import Answer, Question
    from workers.serving.replica import Replica

ANSWER_SECONDS = 120.0
"""Longest wait for a worker's answers."""


class Answers:
    """See the module. What needs torch is imported where it is used."""

    def __init__(self, sources: Sources, versions: Callable[[str], Versions]) -> None:
        """versions: Base model to the versions of its subspace."""
        self._sources, self._versions = sources, versions
        self._replicas: dict[str, Replica] = {}
        """Base model to what answers for it in this process."""
        self._lock = Lock()

    def predict(self, request: requests.Predict) -> Json:
        """Have a task answer rows.

        Returns:
            Task, version that answered, and one answer for each row; of a row that cannot be answered its error.

        Raises:
            NotFound: There is no such task, or the version does not hold it.
            WorkersBusy: The service runs, and no worker of one rank is free.
        """
        several, name = len(self._sources.settings.base_names) > 1, request.base_model
        if several and name is None:
            name = self._sources.queue.find(request.reference).base_model
        base = self._sources.settings.base(name).name
        number, task = self._versions(base).held(request.reference, request.version)
        from workers.serving.question import Question

        questions = [Question(task.name, row, number) for row in request.inputs]
        answers = self._answered(base, questions)
        return {
            "task": task.name,
            "base_model": base,
            "version": number,
            "answers": [answer_json(answer) for answer in answers],
        }

    def which(self, request: requests.Which, of_teams: Collection[str] | None) -> Json:
        """Find the task that each text is for, and have it answer.

        Args:
            of_teams: Teams whose tasks there are for who asks; None: all.

        Raises:
            NotFound: The version holds no task of these teams.
            WorkersBusy: As `predict`.
        """
        from workers.serving.question import AUTO, Question

        base = self._sources.settings.base(request.base_model).name
        versions = self._versions(base)
        state = versions.refresh()
        number = state.refs[MAIN] if request.version is None else request.version
        if number and number not in state.versions:
            raise NotFound(f"there is no version {number}", base, "`onebasis versions` lists them")
        names = (held.name for held in state.tasks_at(number).values())
        among = tuple(name for name in names if of_teams is None or name.partition("/")[0] in of_teams)
        questions = [Question(AUTO, text, number, among=among, by=request.way or "") for text in request.texts]
        answers = self._answered(base, questions)
        return {"base_model": base, "version": number, "answers": [answer_json(answer) for answer in answers]}

    def _answered(self, base: str, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
        """Raises what is wrong where nothing could be answered."""
        if self._sources.controller is None:
            with self._lock:
                answers: Sequence[Answer | OnebasisError] = self._here(base).answer(questions)
        else:
            answers = self._by_a_worker(base, questions)
        if all(isinstance(answer, OnebasisError) for answer in answers):
            raise next(answer for answer in answers if isinstance(answer, OnebasisError))
        return answers

    def _by_a_worker(self, base_model: str, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
        controller, cluster = self._sources.running("predict"), self._sources.cluster
        pools = {
            name
            for name, pool in self._sources.settings.pools.items()
            if pool.base_model == base_model and pool.ranks == 1
        }
        workers = sorted(controller.workers, key=lambda worker: worker.idle_since)
        for worker in workers if cluster is not None else ():
            if worker.pool in pools and worker.is_free:
                assert cluster is not None
                try:
                    return _asked(cluster, worker.name, questions)
                except WorkersBusy:
                    continue  # it has just been given something else
        alone = "" if pools else " (its pools are of several ranks, which do not answer)"
        raise WorkersBusy(f"no worker of {base_model} is free to answer{alone}", "", "ask again when one is")

    def _here(self, base_model: str) -> Replica:
        """A replica in this process, which takes as long to make as the base model to load."""
        if base_model not in self._replicas:
            from subspace_store.storage.opening import open_storage
            from subspace_store.subspace_reader import SubspaceReader
            from workers.base_model import load_base_model
            from workers.serving.replica import Replica

            settings = self._sources.settings
            store = SubspaceReader.open(open_storage(settings.storage, base_model))
            self._replicas[base_model] = Replica(load_base_model(settings.base(base_model)), store)
        self._replicas[base_model].follow()
        return self._replicas[base_model]


def _asked(cluster: Cluster, worker: str, questions: Sequence[Question]) -> Sequence[Answer | OnebasisError]:
    call = cluster.answer(worker, questions)
    if not cluster.landed([call], ANSWER_SECONDS):
        raise Unavailable(f"{worker} has not answered within {ANSWER_SECONDS:.0f} s", "", "ask for fewer rows at once")
    found: Sequence[Answer | OnebasisError] = cluster.result(call)
    return found


def answer_json(answer: Answer | OnebasisError) -> Json:
    """One answer as JSON values: what its kind of task says, and a warning where a part of the row was not read."""
    if isinstance(answer, OnebasisError):
        return {"error": answer.as_dict()}
    if answer.text is not None:
        said: Json = {name: getattr(answer, name) for name in ("text", "tokens", "prompt_tokens", "ended")}
    elif answer.value is not None:
        said = {"value": answer.value}
    elif answer.values is not None:
        said = {"values": dict(answer.values)}
    else:
        said = {"label": answer.label, "probabilities": dict(answer.probabilities or {})}
    if answer.routed is not None:
        told = {"task": next(iter(answer.routed)), "routed": dict(answer.routed), "routed_by": answer.routed_by}
        said = told | said
    return said | ({"warning": answer.warning} if answer.warning else {})
