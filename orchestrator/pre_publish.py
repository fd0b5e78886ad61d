"""Asks what the settings name whether a version that passed the gate may be published: a program, or an address.

It is asked in a thread of its own: the loop goes on, and is woken by the answer. The answer is kept in SQL, so that of
each version it is asked once; only a control plane that dies before the answer has come asks again, under the same id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from configs.errors import InvalidInput, Unavailable
from configs.settings import PrePublishSettings
from orchestrator.judging.gate import Decision
from orchestrator.judging.score_table import ScoreTable
from orchestrator.signed_post import post
from orchestrator.tasks.task_events import Reason
from orchestrator.tasks.task_record import TaskRecord
from orchestrator.tasks.verdict_book import Verdict, VerdictBook

log = logging.getLogger("onebasis.controller")

REFUSED = 3
"""Exit code of a program that refuses. Not 1, which is that of many a program that failed."""
OUTPUT_MAX = 65_536
"""Bytes of a program's output that are read."""
REASON_MAX = 1000
GRACE_SECONDS = 2.0
"""How long after its timeout an answer is waited for at the most: a server that sends byte after byte has no end."""


class _FailedError(Exception):
    """There was no answer, and why."""


class PrePublish:
    """What is asked before the versions of one base model are published.

    Args:
        book: Where answers are kept.
        wake: Called when an answer has come, from any thread.
    """

    def __init__(self, base_model: str, book: VerdictBook, wake: Callable[[], None]) -> None:
        self._base_model, self._book, self._wake = base_model, book, wake
        self._asking: _Asking | None = None

    def verdict(
        self, version: int, settings: PrePublishSettings, question: Callable[[], dict[str, Any]]
    ) -> Verdict | None:
        """What was answered, and is from then on; None: it is being asked. Never waits.

        Args:
            question: Makes the document that is handed over.
        """
        kept = self._book.get(self._base_model, version)
        if kept is not None:
            return kept
        if self._asking is None or self._asking.version != version:
            log.info("version %d of %s passed the gate; asking pre_publish", version, self._base_model)
            document = {"id": self.asked_as(version), "base_model": self._base_model, **question()}
            self._asking = _Asking(version, settings, self.asked_as(version), document, self._wake)
        found = self._asking.found(time.monotonic())
        if found is not None:
            self._book.keep(self._base_model, version, found)
            self._asking = None
            log.info("pre_publish on version %d: %s", version, "publish" if found.is_passed else found.reason)
        return found

    def told(self, version: int) -> str:
        """What was said of a version, for people; empty where nothing was."""
        kept = self._book.get(self._base_model, version)
        return kept.reason if kept is not None else ""

    def asked_as(self, version: int) -> str:
        """The id under which a version is asked about, each time."""
        return f"pre-publish_{self._base_model}_{version}"


class _Asking:
    """One question under way."""

    def __init__(
        self,
        version: int,
        settings: PrePublishSettings,
        question_id: str,
        document: dict[str, Any],
        wake: Callable[[], None],
    ) -> None:
        self.version = version
        self._settings = settings
        self._until = time.monotonic() + settings.timeout_seconds + GRACE_SECONDS
        self._found: Verdict | None = None

        def ask() -> None:
            self._found = answer(settings, question_id, document)
            wake()

        threading.Thread(target=ask, name="pre_publish", daemon=True).start()

    def found(self, now: float) -> Verdict | None:
        if self._found is None and now > self._until:
            return failed(self._settings, f"no whole answer for {self._settings.timeout_seconds:g} s")
        return self._found


def question_of(
    version: int,
    main: int,
    table: ScoreTable,
    records: Mapping[str, TaskRecord],
    decision: Decision,
    canary: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What is handed over: the version, the gate's verdict, how its canary has answered, and the tasks with their
    scores. null: not measured."""
    tasks = []
    for task_id in table.tasks:
        cell, record = table.cells[version].get(task_id), records.get(task_id)
        tasks.append(
            {
                "id": task_id,
                "title": record.title if record else None,
                "birth": table.birth[task_id],
                "is_new": table.birth[task_id] == version,
                "score": _known(table.score(version, task_id)),
                "rows": cell.count if cell else None,
                "measured_at": cell.measured_at if cell else None,
                "score_at_birth": _known(table.score(table.birth[task_id], task_id)),
                "own_adapter": record.local_score if record else None,
                "base": record.base_score if record else None,
            }
        )
    verdict = {"passed": decision.passed, "reason": decision.summary}
    return {"version": version, "main": main, "verdict": verdict, "canary": canary, "tasks": tasks}


def answer(settings: PrePublishSettings, question_id: str, document: dict[str, Any]) -> Verdict:
    """Ask once, and wait for the answer; where there is none, what the settings say."""
    try:
        if settings.http is not None:
            replied = post(settings.http, question_id, document, settings.timeout_seconds)
            said = _read(replied.content)
            if not replied.is_success or said is None:
                raise _FailedError(f"status {replied.status}" + ("" if said else ", and no JSON that says publish"))
            return said
        return _run(settings.command or (), document, settings.timeout_seconds)
    except (InvalidInput, Unavailable) as error:
        return failed(settings, error.what)
    except (_FailedError, OSError, ValueError) as error:
        return failed(settings, str(error))


def failed(settings: PrePublishSettings, why: str) -> Verdict:
    """The verdict where there was no answer."""
    told = f"pre_publish gave no answer ({why}), and gate.pre_publish.on_failure says {settings.on_failure}"
    log.warning("%s", told)
    is_passed = settings.on_failure == "publish"
    return Verdict(is_passed, told[:REASON_MAX], "" if is_passed else str(Reason.PRE_PUBLISH_FAILED))


def _run(command: tuple[str, ...], document: dict[str, Any], timeout_seconds: float) -> Verdict:
    """Run a program, in a session of its own: what it has started ends with it."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(json.dumps(document).encode())
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it was not waited for to its end, so the number is still its own
            process.wait()
            raise _FailedError(f"not within {timeout_seconds:g} s") from None
        printed, complaint = _output(out), _last_line(_output(err))
    said = _read(printed)
    if code not in (0, REFUSED):
        ended = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
        raise _FailedError(ended + (f": {complaint}" if complaint else ""))
    if code == REFUSED and said is not None and said.is_passed:
        raise _FailedError(f"exit code {code}, and JSON that says publish")
    if said is not None:
        return said
    return Verdict(True, "") if code == 0 else _refused(complaint or _last_line(printed))


def _read(content: bytes) -> Verdict | None:
    """The verdict in JSON: all of an answer, or its last line. None: it holds none."""
    lines = content.decode(errors="replace").strip().splitlines()
    for text in (content, lines[-1] if lines else ""):
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(text)
            if isinstance(said, dict) and isinstance(said.get("publish"), bool):
                reason = str(said.get("reason") or "")
                return Verdict(True, "") if said["publish"] else _refused(reason)
    return None


def _refused(reason: str) -> Verdict:
    told = " ".join(reason.split())[:REASON_MAX] or "no reason given"
    return Verdict(False, f"pre_publish refused it: {told}", str(Reason.PRE_PUBLISH))


def _output(file: BinaryIO) -> bytes:
    """The end of a program's output."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OUTPUT_MAX))
    return file.read()


def _last_line(content: bytes) -> str:
    lines = content.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:REASON_MAX] if lines else ""


def _known(score: float) -> float | None:
    return score if score == score else None
