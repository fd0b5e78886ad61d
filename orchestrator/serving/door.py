"""The HTTP side of answering: reads a request, finds the base model of the task, and hands the question on.

It needs the storage alone: which tasks there are it reads from the log of each store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from anyio import to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from configs.errors import InvalidInput, NotFound, OnebasisError, TooLarge, Unavailable
from configs.limits import BYTES_MAX, short_text
from configs.settings import StorageSettings
from orchestrator.api.answers import answer_json
from orchestrator.api.exchange import ALIVE_PATH
from orchestrator.serving import openai_records
from orchestrator.serving.answering import FOLLOW_SECONDS
from orchestrator.serving.lodge import Lodge, Lodger
from orchestrator.serving.openai_records import ChatRequest, CompletionRequest, Reply
from subspace_store.log.version import MAIN
from subspace_store.storage.opening import open_storage
from subspace_store.subspace_reader import SubspaceReader
from workers.serving.held import Held
from workers.serving.question import AUTO, Answer, Piece, Question

if TYPE_CHECKING:
    from workers.serving.batcher import Said

log = logging.getLogger("onebasis.serving")

T = TypeVar("T")

REPLICAS_TRIED = 2
"""Replicas that are asked before a caller is told that nobody could answer."""
INPUTS_MAX = 1024
"""Most rows of one request."""
DIED = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""What Ray says of a replica that is gone: it died or is out of reach, was ended as memory ran out, or its machine is
gone, or its answer with that."""
KEY_HEADER = "x-onebasis-key"
"""Header with the key of a request: requests with the same one are answered by the same version."""
ONE_MODEL = "/v1/models/"
OPENAI = ("/v1/chat/", "/v1/completions", "/v1/models")
"""Beginnings of the paths whose errors are told as OpenAI's clients read them."""


Teams = frozenset[str] | None
"""Teams whose tasks somebody may ask; None: all."""


class PredictRequest(BaseModel):
    """POST /v1/predict."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    task: str
    inputs: list[dict[str, Any] | str] | dict[str, Any] | str
    version: int | None = Field(None, ge=1)
    base_model: str | None = None


class Door:
    """One process of the HTTP side.

    Args:
        name: Of the application: tells this door from those of other services.
        replicas: Base model to a handle of its deployment.
        lodge: How it finds out whose a token is.
    """

    def __init__(self, name: str, storage: StorageSettings, lodge: Lodge, replicas: Mapping[str, Any]) -> None:
        self._name = name
        self._replicas, self._lodger = dict(replicas), Lodger(lodge)
        self._stores = {name: SubspaceReader.open(open_storage(storage, name)) for name in replicas}
        self._held = {name: Held(store) for name, store in self._stores.items()}
        self._routes: dict[tuple[str, str], Callable[[Request, Teams], Awaitable[Response]]] = {
            ("GET", ALIVE_PATH): self._alive,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/predict"): self._predict,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._complete,
        }
        threading.Thread(target=self._follow, name="follow", daemon=True).start()

    def base_model_of(self, task: str, teams: Teams, named: str | None = None, version: int | None = None) -> str:
        """The base model whose version, default `main`, holds a task.

        Args:
            task: `team/name`, or an id.
            teams: Those whose tasks may be asked: one of another team is told as one that does not exist.

        Raises:
            NotFound: None does, or there is no such base model.
            InvalidInput: Several do.
        """
        if named is not None and named not in self._stores:
            raise NotFound(f"there is no base model '{named}'", todo=f"there are: {', '.join(self._stores)}")
        if task == AUTO and (named is not None or len(self._stores) == 1):
            return named or next(iter(self._stores))
        if task == AUTO:
            raise InvalidInput("a task is found among those of one base model", task, "name the base_model")
        found = []
        for name in [named] if named else self._stores:
            number = self._main(name) if version is None else version
            known = self._held[name].find(task, number)
            if known is not None and _sees(teams, known[0]):
                found.append(name)
        if len(found) > 1:
            raise InvalidInput(f"is a task of several base models: {', '.join(found)}", task, "name the base_model")
        if not found:
            where = "main holds no such task" if version is None else f"version {version} holds no such task"
            raise NotFound(where, task, "GET /v1/models lists them")
        return found[0]

    def _among(self, base_model: str, task: str, teams: Teams, version: int | None) -> tuple[str, ...] | None:
        """The tasks of which one is to be found, where none is named."""
        if task != AUTO:
            return None
        number = self._main(base_model) if version is None else version
        return tuple(name for name in self._held[base_model].at(number) if _sees(teams, name))

    async def answer(self, base_model: str, questions: Sequence[Question]) -> Sequence[Said]:
        """By any replica of the base model."""
        asked = list(questions)
        found: Sequence[Said] = await _tried(lambda: self._replicas[base_model].answer.remote(asked))
        return found

    async def stream(self, base_model: str, question: Question) -> tuple[Any, Any]:
        """The first piece of an answer, and what follows it: more pieces, then all of it, or its error."""

        async def begun() -> tuple[Any, Any]:
            pieces = self._replicas[base_model].options(stream=True).stream.remote(question)
            return await anext(pieces), pieces

        return await _tried(begun)

    def _follow(self) -> None:
        wait = threading.Event()
        while not wait.wait(FOLLOW_SECONDS):
            for name, store in self._stores.items():
                try:
                    store.refresh()
                except OnebasisError as error:  # what was read last still counts
                    log.warning("the store of %s cannot be read: %s", name, error.sentence)

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request, or say in the caller's own format why not."""
        path, is_openai = request.url.path, request.url.path.startswith(OPENAI)
        route = self._routes.get((request.method, path))
        if route is None and request.method == "GET" and path.startswith(ONE_MODEL):
            route = self._model
        try:
            if route is None:
                known = ", ".join(f"{verb} {at}" for verb, at in self._routes)
                raise NotFound(f"there is no {request.method} {short_text(path)}", todo=f"there are: {known}")
            scheme, _, secret = request.headers.get("authorization", "").partition(" ")
            teams: Teams = frozenset()
            if path != ALIVE_PATH:
                teams = await to_thread.run_sync(self._lodger.teams_of, secret if scheme.lower() == "bearer" else "")
            return await route(request, teams)
        except OnebasisError as error:
            told = error
        except (RayError, RayServeException) as error:
            log.warning("%s: nobody could answer: %s", path, error)
            told = _nobody_answers(error)
        except Exception as error:
            log.error("%s failed", path, exc_info=error)
            told = OnebasisError(f"internal error: {type(error).__name__}", todo="the log of the door has the rest")
        status = told.http_status
        if is_openai:  # whose clients retry nothing that is 400
            return JSONResponse({"error": _as_openai(told)}, 400 if status == 422 else status)
        return JSONResponse(told.as_dict(), status)

    async def _alive(self, request: Request, teams: Teams) -> Response:
        return JSONResponse({"alive": True, "door": self._name})

    async def _models(self, request: Request, teams: Teams) -> Response:
        return JSONResponse({"object": "list", "data": self._listed(teams)})

    async def _model(self, request: Request, teams: Teams) -> Response:
        name = unquote(request.url.path.removeprefix(ONE_MODEL))  # clients write a slash as %2F
        for model in self._listed(teams):
            if model["id"] == name:
                return JSONResponse(model)
        raise NotFound("main holds no such task", name, "GET /v1/models lists them")

    def _listed(self, teams: Teams) -> list[dict[str, Any]]:
        """The tasks of `main` that somebody may ask, as OpenAI's clients read them."""
        mains = {base_model: self._main(base_model) for base_model in self._stores}
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}
            | {"base_model": base_model, "version": version}
            for base_model, version in mains.items()
            for name in self._held[base_model].at(version)
            if _sees(teams, name)
        ]

    def _main(self, base_model: str) -> int:
        return self._stores[base_model].state.refs[MAIN]

    async def _predict(self, request: Request, teams: Teams) -> Response:
        try:
            asked = PredictRequest.model_validate_json(await _body(request))
        except ValidationError as error:
            raise openai_records.misread(error) from None
        inputs = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        if not 1 <= len(inputs) <= INPUTS_MAX:
            raise InvalidInput(f"has {len(inputs)} inputs", "inputs", f"give 1 to {INPUTS_MAX} at once")
        base_model = self.base_model_of(asked.task, teams, asked.base_model, asked.version)
        key = _key(request, asked.task, inputs)
        among = self._among(base_model, asked.task, teams, asked.version)
        questions = [Question(asked.task, row, asked.version, among=among, key=key) for row in inputs]
        answers = await self.answer(base_model, questions)
        said = [answer for answer in answers if isinstance(answer, Answer)]
        if not said:
            raise next(answer for answer in answers if isinstance(answer, OnebasisError))
        told = {"task": asked.task, "base_model": base_model, "version": said[0].version}
        return _with_version(told | {"answers": [answer_json(answer) for answer in answers]}, said[0].version)

    async def _chat(self, request: Request, teams: Teams) -> Response:
        asked: ChatRequest = openai_records.read(ChatRequest, await _body(request))
        key = asked.user or _key(request, asked.model, asked.messages)
        return await self._completed(asked, teams, [replace(asked.question, key=key)], Reply(True, asked.model))

    async def _complete(self, request: Request, teams: Teams) -> Response:
        asked: CompletionRequest = openai_records.read(CompletionRequest, await _body(request))
        key = asked.user or _key(request, asked.model, asked.prompt)
        questions = [replace(one, key=key) for one in asked.questions]
        return await self._completed(asked, teams, questions, Reply(False, asked.model))

    async def _completed(self, asked: Any, teams: Teams, questions: Sequence[Question], reply: Reply) -> Response:
        base_model = self.base_model_of(asked.model, teams)
        among = self._among(base_model, asked.model, teams, None)
        questions = [replace(one, among=among) for one in questions]
        if asked.stream:
            if len(questions) != 1:
                raise InvalidInput("a stream answers one prompt", "prompt", "give one, or no stream")
            first, pieces = await self.stream(base_model, questions[0])
            if isinstance(first, OnebasisError):
                raise first
            events = _events(first, pieces, reply, asked.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=_naming(first.version))
        answers = await self.answer(base_model, questions)
        for answer in answers:
            if isinstance(answer, OnebasisError):
                raise answer
        said = [answer for answer in answers if isinstance(answer, Answer)]
        return _with_version(reply.whole(said), said[0].version)


def _key(request: Request, task: str, inputs: Any) -> str:
    """What decides whether a request is the canary's: the key that it brings, or else what it asks."""
    if key := request.headers.get(KEY_HEADER, ""):
        return key
    return hashlib.sha256(json.dumps([task, inputs], sort_keys=True).encode()).hexdigest()


def _sees(teams: Teams, title: str) -> bool:
    return teams is None or title.partition("/")[0] in teams


def _with_version(content: dict[str, Any], version: int) -> JSONResponse:
    return JSONResponse(content, headers=_naming(version))


def _naming(version: int) -> dict[str, str]:
    """The header with the version that answers."""
    return {"x-onebasis-version": str(version)}


async def _tried(ask: Callable[[], Awaitable[T]]) -> T:
    """What a replica answers, or another one where it dies first: to answer changes nothing. No more than so many, for
    a request may be what they die of."""
    died: Exception | None = None
    for _ in range(REPLICAS_TRIED):
        try:
            return await ask()
        except DIED as error:
            log.warning("a replica died before it had answered: %s", type(error).__name__)
            died = error
    what = f"{REPLICAS_TRIED} replicas ended before they had answered it"
    raise Unavailable(what, todo="ask again; if it happens each time, it is of what is asked") from died


async def _events(first: Any, pieces: Any, reply: Reply, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's clients read them; an error is the last of them."""
    piece, is_first = first, True
    while isinstance(piece, Piece):
        yield _event(reply.piece(piece.text, piece.version, is_first))
        is_first = False
        try:
            piece = await anext(pieces)
        except (RayError, RayServeException) as error:
            piece = _nobody_answers(error)
    if isinstance(piece, OnebasisError):
        yield _event({"error": _as_openai(piece)})
        return
    if is_first:
        yield _event(reply.piece("", piece.version, True))
    yield _event(reply.last(piece))
    if wants_usage:
        yield _event(reply.used(piece))
    yield "data: [DONE]\n\n"


def _nobody_answers(error: Exception) -> OnebasisError:
    if isinstance(error, BackPressureError):
        todo = "ask again in a moment; serving.waiting_max and replicas_max say how many may wait"
        return Unavailable("too many wait for an answer", todo=todo)
    return Unavailable(f"nobody could answer: {type(error).__name__}", todo="ask again")


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BYTES_MAX:
            raise TooLarge(f"the body has more than {BYTES_MAX:,} bytes", "", "ask for fewer rows", BYTES_MAX)
    return bytes(body)


def _as_openai(error: OnebasisError) -> dict[str, Any]:
    return {"message": str(error), "type": error.kind, "param": error.where or None, "code": error.row}
