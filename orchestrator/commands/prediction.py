"""`onebasis predict`: what it asks for, and how the answers are shown."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InvalidInput, WorkersBusy, error_from_dict
from configs.task_spec import TaskSpec
from orchestrator.api.client import REMOTE, Client
from orchestrator.api.requests import PREDICTIONS_MAX, Json, Predict, ShowTask, Which
from subspace_store.commands.terminal import console, counted, decimals, errors, note, shown, telling

TEXT_WIDTH = 60
"""Characters of a row that are shown beside its answer."""
LOADS = "loading the base model and answering in this process"


def inputs(
    client: Client,
    reference: str,
    texts: Sequence[str],
    pairs: Sequence[str],
    pictures: Sequence[Path],
    rows: Path | None,
) -> list[Any]:
    """The rows to be answered, in the form of `Predict.inputs`.

    Raises:
        InvalidInput: Nothing is asked, or two things at once, or a file cannot be read as the task reads rows.
    """
    if [bool(texts), bool(pictures), rows is not None].count(True) != 1:
        what = "give one of --text, --image and --rows"
        raise InvalidInput(what, "onebasis predict", "--text TEXT, --image FILE, or --rows FILE")
    if pictures:
        return [{"image": base64.b64encode(_read(picture)).decode()} for picture in pictures]
    if pairs and len(pairs) != len(texts):
        raise InvalidInput(
            f"has {counted(len(texts), 'text')} and {counted(len(pairs), 'second text')}", "--pair", "give one for each"
        )
    if rows is None:
        return [{"text": a, "text_pair": b} for a, b in zip(texts, pairs, strict=True)] if pairs else list(texts)
    from workers.rows.task_data import question_of, questions_in

    spec = TaskSpec.model_validate(client.ask(ShowTask(reference=reference))["spec"])
    return [question_of(row) for row in questions_in(rows, spec)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", str(file), "name a picture's file") from error


def predict(
    client: Client, reference: str, rows: Sequence[Any], version: int | None, base_model: str | None
) -> Iterator[Json]:
    """The answers, part by part. Where all workers are at work, the base model is loaded in this process.

    Raises:
        WorkersBusy: They are, of a service on another machine, whose store is not to be read from here.
    """
    here = False
    for start in range(0, len(rows), PREDICTIONS_MAX):
        part = tuple(rows[start : start + PREDICTIONS_MAX])
        some = Predict(reference=reference, inputs=part, version=version, base_model=base_model)
        if not here:
            try:
                yield client.ask(some)
                continue
            except WorkersBusy as error:
                if REMOTE.get() is not None:  # whatever is in the folder here is another service's
                    raise
                note(f"{error.what}: {LOADS}")
                here = True
        with telling(LOADS):
            yield client.ask_here(some)


def which(client: Client, asked: Which) -> Json:
    """The tasks and their answers; where all workers are at work, as `predict`."""
    try:
        return client.ask(asked)
    except WorkersBusy as error:
        if REMOTE.get() is not None:
            raise
        note(f"{error.what}: {LOADS}")
    with telling(LOADS):
        return client.ask_here(asked)


def show_which(answer: Json, texts: Sequence[str]) -> None:
    """For each text a line with its answer, and one with the likeliest tasks."""
    for text, said in zip(texts, answer["answers"], strict=True):
        if "error" in said:
            errors.print(
                f"[red]error[/red]  {shown(str(error_from_dict(said['error'])))}  {shown(text)}", soft_wrap=True
            )
            continue
        result = decimals(said["value"]) if "value" in said else said.get("label", said.get("text"))
        console.print(f"{shown(said['task'])}  {shown(str(result))}  {shown(_short(text))}", soft_wrap=True)
        others = " · ".join(f"{shown(task)} {decimals(score, 2)}" for task, score in said["routed"].items())
        console.print(f"  by {said['routed_by']}: {others}", style="dim", soft_wrap=True)
    note(f"version {answer['version']} of {answer['base_model']}")


def joined(parts: Sequence[Json]) -> Json:
    """All parts as one answer."""
    versions = sorted({part["version"] for part in parts})
    if len(versions) > 1:
        note(f"main moved meanwhile: answered by the versions {', '.join(map(str, versions))}")
    answers = [{**answer, "version": part["version"]} for part in parts for answer in part["answers"]]
    return {**parts[0], "version": versions[-1], "answers": answers}


def show_answers(answer: Json, rows: Sequence[Any]) -> None:
    """A line for each row: its answer, how sure it is, and what was asked."""
    for row, said in zip(rows, answer["answers"], strict=True):
        asked = shown(_short(row))
        if "error" in said:
            errors.print(f"[red]error[/red]  {shown(str(error_from_dict(said['error'])))}  {asked}", soft_wrap=True)
        elif "text" in said:
            console.print(shown(said["text"]), soft_wrap=True)
        elif "value" in said:
            console.print(f"{decimals(said['value'])}  {asked}", soft_wrap=True)
        elif "values" in said:
            numbers = " ".join(f"{shown(name)} {decimals(value)}" for name, value in said["values"].items())
            console.print(f"{numbers}  {asked}", soft_wrap=True)
        else:
            likely = decimals(said["probabilities"][said["label"]], 2)
            console.print(f"{shown(said['label'])}  {likely}  {asked}", soft_wrap=True)
        if said.get("warning"):
            note(f"warning: {said['warning']}")
    note(f"{answer['task']}, version {answer['version']} of {answer['base_model']}")


def _short(row: Any) -> str:
    texts = [row] if isinstance(row, str) else [str(text) for name, text in row.items() if name != "image"]
    text = " | ".join(" ".join(text.split()) for text in texts)
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…"
