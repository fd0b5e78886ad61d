"""Log lines: one object each, or a text that is safe to show; with the ids of what is being done."""

from __future__ import annotations

import io
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest

from configs.log_lines import busy_with, formatter, ids, trace_id_of, warnings_told

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What a logger of its own writes, in the form that the test names."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(request.param))
    logger = logging.getLogger("onebasis.tried")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def objects(lines: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_a_line_is_an_object_with_the_ids_of_what_is_being_done(lines: io.StringIO) -> None:
    log = logging.getLogger("onebasis.tried")
    log.warning("nobody knows %s", "why")
    with busy_with(request_id="r-1", traceparent=TRACEPARENT):
        log.warning("asked")
        with busy_with(task_id="t-1"):
            log.warning("a text\nof two lines and a \x1b[31mcolour")
        log.warning("asked on")
    log.warning("over")
    plain, asked, task, on, over = objects(lines)
    assert plain.pop("time").endswith("+00:00")
    assert plain == {"level": "WARNING", "logger": "onebasis.tried", "message": "nobody knows why"}
    caller = TRACEPARENT.split("-")[1]
    assert {name: asked[name] for name in ("request_id", "trace_id")} == {"request_id": "r-1", "trace_id": caller}
    assert (task["request_id"], task["task_id"], task["trace_id"]) == ("r-1", "t-1", f"{trace_id_of('t-1'):032x}")
    assert task["message"] == "a text\nof two lines and a \x1b[31mcolour"
    assert "task_id" not in on
    assert over.keys() == {"time", *plain}
    assert "\x1b" not in lines.getvalue()


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_a_failure_is_one_line_with_its_traceback(lines: io.StringIO) -> None:
    try:
        raise ValueError("of ours")
    except ValueError:
        logging.getLogger("onebasis.tried").exception("it failed")
    (line,) = objects(lines)
    assert line["message"] == "it failed"
    assert line["exception"].startswith("Traceback")
    assert "ValueError: of ours" in line["exception"]


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_a_text_moves_no_cursor(lines: io.StringIO) -> None:
    logging.getLogger("onebasis.tried").warning("a \x1b[31mcolour")
    assert lines.getvalue().endswith("WARNING onebasis.tried: a \\x1b[31mcolour\n")


def test_ids_go_where_the_work_goes() -> None:
    seen = []
    with busy_with(task_id="t-1"):
        thread = threading.Thread(target=copy_context().run, args=(lambda: seen.append(ids()["task_id"]),))
    thread.start()
    thread.join()
    assert seen == ["t-1"]
    assert ids() == {}


def test_what_is_warned_of_while_something_is_done_is_told_once_and_without_passwords() -> None:
    told: list[str] = []
    log = logging.getLogger("a.library")
    with busy_with(task_id="t-1"), warnings_told(told.append, most=3):
        log.info("no warning")
        for _ in range(3):
            log.warning("s3://key:secret@host is slow")
        other = threading.Thread(target=log.error, args=("of somebody else",))
        other.start()
        other.join()
        logging.captureWarnings(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("a tensor was copied", stacklevel=1)
        finally:
            logging.captureWarnings(False)
        for number in range(9):
            log.error("number %d", number)
    log.warning("after it")
    assert told[0] == "warning: s3://key:***@host is slow"
    assert "a tensor was copied" in told[1]
    assert told[2:] == ["error: number 0"]
