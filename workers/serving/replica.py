"""One base model that answers for all tasks of its subspace, and follows `main`.

A store is all that it needs: what a task's rows are read by is in the task's adapter. It goes on answering while the
control plane is away, and by the version it has while the storage is.
"""

from __future__ import annotations

import base64
import binascii
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs.errors import InvalidInput, NotFound, OnebasisError
from configs.settings import CanarySettings
from configs.task_spec import TaskSpec
from subspace_store.files.presence import check_files
from subspace_store.log.version import MAIN
from subspace_store.subspace_reader import SubspaceReader
from workers.base_model import BaseModel
from workers.evaluation import ROWS_PER_BATCH
from workers.rows.reading import canonical
from workers.rows.task_data import Row, inputs_of, question
from workers.serving.canary import Chosen, Comparison, number_of
from workers.serving.held import Held
from workers.serving.mixed_batch import Asked, MixedBatch, Said
from workers.serving.question import AUTO, Answer, Question
from workers.serving.routers import Routed, Routers

log = logging.getLogger("onebasis.serving")

VERSIONS_KEPT = 2
"""Versions beside `main` that stay ready: those that were asked for last by their numbers."""
FETCH_SECONDS = 1.0
"""Longest time for which tasks of a new version are read before it answers; that the others are there is looked at, and
they are read when asked for."""


class Replica:
    """Answers questions. `begin`, `step` and `answer` are called from one thread, `follow` from another.

    Args:
        base: The base model, loaded.
        store: A reader of its own.
        rows_max: Rows whose texts one version writes at once.
    """

    def __init__(self, base: BaseModel, store: SubspaceReader, rows_max: int = ROWS_PER_BATCH) -> None:
        self.base, self._store, self._held = base, store, Held(store)
        self._version = store.state.refs[MAIN]
        self._batches: OrderedDict[int, MixedBatch] = OrderedDict()
        self._writing: list[MixedBatch] = []
        """Those that have begun texts; a version may have been replaced meanwhile."""
        self._rows_max = rows_max
        self._lock = threading.Lock()
        self._routers = Routers(base, store.storage)
        self.trouble = ""
        """Why it does not answer by what `main` names now; empty where it does."""
        self._canary_settings: CanarySettings | None = None
        self.canary: Chosen | None = None
        """Which other version answers a share of the requests, now."""
        self.canary_trouble = ""
        """Why it does not, though it should."""

    @property
    def version(self) -> int:
        """The version that answers unless another is asked for."""
        return self._version

    def follow(self) -> bool:
        """Look whether `main` has moved, and answer by what it names from then on; returns whether it had.

        What goes wrong is told in `trouble`, and the version before goes on answering.
        """
        try:
            number = self._store.refresh().refs[MAIN]
            if number == self._version:
                self._batch(number)  # one that has just started has not read it yet
                self.trouble = ""
                self._look_at_canary()
                return False
            self._prepare(number)
        except Exception as error:  # whatever it is: those who ask are answered by the version before
            told = error.sentence if isinstance(error, OnebasisError) else f"{type(error).__name__}: {error}"
            if told != self.trouble:
                log.error("has version %d, and cannot answer by what main names: %s", self._version, told)
            self.trouble = told
            return False
        self._version, self.trouble = number, ""
        self._look_at_canary()
        return True

    def set_canary(self, settings: CanarySettings | None) -> None:
        """Have another version answer a share of the requests from the next look on, or none."""
        self._canary_settings = settings

    def _look_at_canary(self) -> None:
        """Read the version that is to answer a share; until then, and where it cannot be read, `main`'s answers all."""
        settings, now = self._canary_settings, self.canary
        try:
            number = 0 if settings is None else number_of(settings, self._store.state.refs)
            if settings is None or number == self._version:
                self.canary, self.canary_trouble = None, ""
                return
            versions = (self._version, number)
            if now is not None and now.settings == settings and now.comparison.versions == versions:
                return
            self._store.resolve(number)
            self._batch(number)
        except Exception as error:  # whatever it is: those who ask are answered by main's version
            told = error.sentence if isinstance(error, OnebasisError) else f"{type(error).__name__}: {error}"
            if told != self.canary_trouble:
                log.error("no canary answers: %s", told)
            self.canary, self.canary_trouble = None, told
            return
        same = now is not None and now.comparison.versions == versions
        comparison = now.comparison if now is not None and same else Comparison(*versions)
        self.canary, self.canary_trouble = Chosen(settings, number, comparison), ""

    def answer(self, questions: Sequence[Question]) -> list[Answer | OnebasisError]:
        """Answers in the order of the questions, once all are there; what cannot be answered has its error in its
        place. As `begin`, and raises what is no error of ours."""
        found: dict[int, Said] = {}
        self.begin(questions, found.__setitem__)
        while self.step():
            pass
        answers = []
        for place in range(len(questions)):
            said = found[place]
            if not isinstance(said, Answer | OnebasisError):
                raise said
            answers.append(said)
        return answers

    def name_of(self, answer: Answer) -> str:
        """The name of the task that gave an answer, however it was asked for."""
        known = self._held.find(answer.task_id, answer.version)
        return answer.task_id if known is None else known[0]

    def begin(self, questions: Sequence[Question], done: Callable[[int, Said], None]) -> None:
        """Answer questions, each as soon as it can be: texts are written by `step`, beside those that are written
        already.

        All that ask for no version are answered by the same one. Those who ask for an answer piece by piece may have
        had a part of it before an error.

        Args:
            done: Called once with the place of each question, and its answer or what went wrong.
        """
        now, canary = self._version, self.canary
        questions, routed, unrouted = self._routed(questions, now)

        def said(place: int, answer: Said) -> None:
            if isinstance(answer, Answer) and (route := routed.get(place)) is not None:
                answer = replace(answer, routed=route.scores, routed_by=route.by)
            done(place, answer)

        mine = {p: one for p, one in enumerate(questions) if canary and p not in unrouted and _is_of(canary, one)}
        by_version: dict[int, list[tuple[int, Asked]]] = {}
        failed: dict[int, Exception] = {**unrouted}
        for place, one in enumerate(questions):
            if place in failed or place in mine:
                continue
            number = now if one.version is None else one.version
            try:
                by_version.setdefault(number, []).append((place, self._asked(one, number)))
            except Exception as error:
                failed[place] = error
        for place, went_wrong in failed.items():
            done(place, went_wrong)
        if canary is not None and mine:
            self._begin_by_canary(canary, mine, said)
        for number, rows in by_version.items():
            if rows:
                self._begin(self._batch(number), rows, said)

    def step(self) -> bool:
        """Write a token of every text that was begun; returns whether any is still to be written."""
        for batch in self._writing:
            batch.step()
        self._writing = [batch for batch in self._writing if batch.is_writing]
        return bool(self._writing)

    def _routed(
        self, questions: Sequence[Question], now: int
    ) -> tuple[Sequence[Question], dict[int, Routed], dict[int, Exception]]:
        """The questions, each of a task; how those of no task by name came to theirs; and those that came to none."""
        groups: dict[tuple[int, tuple[str, ...] | None, str, bool | None], list[int]] = {}
        texts, asked, routed, unrouted = dict[int, str](), list(questions), dict[int, Routed](), dict[int, Exception]()
        for place, one in enumerate(questions):
            if one.task != AUTO:
                continue
            try:
                texts[place] = _one_text(one)
            except InvalidInput as error:
                unrouted[place] = error
            else:
                is_chat = True if _has_messages(one) else one.is_chat
                groups.setdefault((one.version or now, one.among, one.by, is_chat), []).append(place)
        for (number, among, by, is_chat), places in groups.items():
            try:
                self._store.resolve(number)
                held = {name: t for name, t in self._held.at(number).items() if among is None or name in among}
                batch = self._batch(number)
                if is_chat is not None:  # of those that can be asked so
                    held = {name: t for name, t in held.items() if _is_chat(batch.spec(t)) is is_chat}
                found = self._routers.of(batch, held).route([texts[place] for place in places], by)
            except Exception as error:
                unrouted |= dict.fromkeys(places, error)
                continue
            for place, route in zip(places, found, strict=True):
                one = questions[place]
                inputs = one.inputs if _has_messages(one) else texts[place]
                asked[place] = replace(one, task=next(iter(route.scores)), inputs=inputs)
                routed[place] = route
        return asked, routed, unrouted

    def _begin_by_canary(
        self, canary: Chosen, questions: Mapping[int, Question], done: Callable[[int, Said], None]
    ) -> None:
        """Have the canary answer, by the questions' places. A request of which it cannot answer every row is not its
        own: all of it is answered by one version, `main`'s, which says what is wrong with it."""
        places = list(questions)
        requests = {place: (one.request, one.key) for place, one in questions.items()}
        missing = Counter(requests.values())
        found: dict[tuple[int, str], dict[int, Said]] = {request: {} for request in missing}

        def said(index: int, answer: Said) -> None:
            place = places[index]
            of_request = found[requests[place]]
            of_request[place] = answer
            if len(of_request) < missing[requests[place]]:
                return
            if all(isinstance(answer, Answer) for answer in of_request.values()):
                for place, answer in of_request.items():
                    done(place, answer)
                return
            self._begin_by_main(canary, {place: questions[place] for place in of_request}, done)

        self.begin([replace(one, version=canary.version, key="") for one in questions.values()], said)

    def _begin_by_main(
        self, canary: Chosen, questions: Mapping[int, Question], done: Callable[[int, Said], None]
    ) -> None:
        """Have `main`'s version answer a request that the canary could not answer whole."""
        places, answers = list(questions), list[Said]()

        def said(index: int, answer: Said) -> None:
            answers.append(answer)
            if len(answers) == len(places) and all(isinstance(one, Answer) for one in answers):
                canary.comparison.failed()  # else it was asked wrongly, of whichever version
            done(places[index], answer)

        self.begin([replace(one, key="") for one in questions.values()], said)

    def _begin(self, batch: MixedBatch, rows: Sequence[tuple[int, Asked]], done: Callable[[int, Said], None]) -> None:
        places = [place for place, _ in rows]
        batch.begin([asked for _, asked in rows], lambda index, answer: done(places[index], answer))
        if batch.is_writing and batch not in self._writing:
            self._writing.append(batch)

    def _asked(self, one: Question, number: int) -> Asked:
        self._store.resolve(number)
        if (known := self._held.find(one.task, number)) is None:
            what = f"version {number} of {self.base.name} holds no such task"
            raise NotFound(what, one.task, "`onebasis tasks` lists them")
        _, task_id = known
        spec = canonical(self._batch(number).spec(task_id))
        is_chat = spec.data.messages_column is not None
        if one.is_chat is not None and (spec.kind != "causal_lm" or one.is_chat is not is_chat):
            learnt, todo = str(spec.kind), "ask /v1/predict"
            if spec.kind == "causal_lm":
                learnt = "chats" if is_chat else "prompts and completions"
                todo = "ask chat completions" if is_chat else "ask completions"
            raise InvalidInput(f"has learnt from {learnt}, and is asked for something else", one.task, todo)
        row = _row(one, inputs_of(spec), lambda values: question(values, spec, one.task))
        return Asked(task_id, row, one.writing, one.wrote, one.wanted)

    def _batch(self, number: int) -> MixedBatch:
        with self._lock:
            if number not in self._batches:
                self._batches[number] = self._made(number)
                self._store.let_go()  # the batch has its own
            self._batches.move_to_end(number)
            kept = (self._version, number, self.canary.version if self.canary is not None else number)
            others = [old for old in self._batches if old not in kept]
            for old in others[: max(0, len(others) - VERSIONS_KEPT + 1)]:
                del self._batches[old]
            return self._batches[number]

    def _made(self, number: int) -> MixedBatch:
        return MixedBatch(self.base, self._store, number, rows_max=self._rows_max)

    def _prepare(self, number: int) -> None:
        """Read a version: all that it needs must be there, and `_read_first` as far as there is time.

        Raises:
            Corrupt: Something is gone, or is not what was written.
            Unavailable: The storage was away.
        """
        check_files(self._store.storage, self._store.state, number, self._version)
        made, until = self._made(number), time.monotonic() + FETCH_SECONDS
        for task_id in self._read_first(number):
            if time.monotonic() > until:
                break
            made.fetch(task_id)
        self._store.let_go()
        with self._lock:
            self._batches[number] = made

    def _read_first(self, number: int) -> list[str]:
        """Ids of a version's tasks: those whose names the version before has been asked for, the last ones first,
        whichever revision of them it holds; then those that the version before does not hold."""
        before, held, now = self._batches.get(self._version), self._held.at(self._version), self._held.at(number)
        names = {task_id: name for name, task_id in held.items()}
        asked = [names[task_id] for task_id in reversed(before.tasks if before is not None else ()) if task_id in names]
        new = [name for name, task_id in now.items() if held.get(name) != task_id]
        return [now[name] for name in dict.fromkeys([*asked, *new]) if name in now]


def _is_of(canary: Chosen, one: Question) -> bool:
    """Whether a question is the canary's."""
    return bool(one.key) and one.version is None and one.wrote is None and canary.takes(one.key)


def _is_chat(spec: TaskSpec) -> bool | None:
    """Whether a task has learnt from chats; None: it writes no texts."""
    return spec.data.messages_column is not None if spec.kind == "causal_lm" else None


def _has_messages(one: Question) -> bool:
    return isinstance(one.inputs, Mapping) and [*one.inputs] == ["messages"]


def _one_text(one: Question) -> str:
    """The text by which a question finds its task; of a chat its last message."""
    values: Any = one.inputs
    if isinstance(values, Mapping) and len(values) == 1:
        (values,) = values.values()
    if _has_messages(one):
        last = values[-1] if isinstance(values, list | tuple) and values else None
        values = last.get("content") if isinstance(last, Mapping) else None
    if not isinstance(values, str):
        raise InvalidInput("only a single text finds its task by itself", AUTO, "name the task, or give one text")
    return values


def _row(one: Question, columns: Mapping[str, str], read: Callable[[Mapping[str, Any]], Row]) -> Row:
    names = sorted(columns.values())
    values: Any = one.inputs
    if isinstance(values, str) and len(names) == 1:
        (name,) = names
        values = {name: [{"role": "user", "content": values}] if name == "messages" else values}
    if not isinstance(values, Mapping):
        raise InvalidInput(
            f"an input must be an object, not {type(values).__name__}", one.task, f"give {' and '.join(names)}"
        )
    if isinstance(encoded := values.get("image"), str):
        try:
            values = {**values, "image": base64.b64decode(encoded, validate=True)}
        except binascii.Error as error:
            raise InvalidInput(f"image is not base64: {error}", one.task, "encode the picture's file") from None
    return read(values)
