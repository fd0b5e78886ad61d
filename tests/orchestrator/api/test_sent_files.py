"""Files sent over HTTP: who may, cut connections, limits, and a task of what was sent."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from configs.task_spec import TaskSpec
from configs.uploads import SentFile, upload_id
from orchestrator.api.requests import CreateToken, ReadAudit, Submit
from orchestrator.api.routes import PREFIX
from orchestrator.tasks.uploads import PIECE_BYTES_MAX, UNUSED_SECONDS, team_folder
from tests.builders import rows
from tests.orchestrator.site import Site

pytestmark = pytest.mark.changes

TRAIN = "".join(json.dumps(row) + "\n" for row in rows(6)).encode()
EVAL = (json.dumps({"text": "other", "label": "no"}) + "\n").encode()


def facts(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


class Sender:
    """Somebody with a token, over HTTP as it is."""

    def __init__(self, site: Site, role: str = "submitter", team: str | None = "red") -> None:
        self.site = site
        self.token = site.client.ask(CreateToken(name=f"{role}-{team}", role=role, team=team))["token"]  # type: ignore[arg-type]
        headers = {"authorization": f"Bearer {self.token}", "x-request-id": "the-one"}
        self.http = httpx.Client(base_url=site.url + PREFIX, headers=headers, trust_env=False)

    def ask(self, path: str, team: str = "red", **contents: bytes) -> httpx.Response:
        files = {name.replace("__", "/").replace("_", "."): facts(content) for name, content in contents.items()}
        return self.http.post(path, json={"team": team, "files": files})

    def put(self, content: bytes, start: int = 0, end: int | None = None, team: str = "red", **said: Any) -> Any:
        of = {**facts(content), **said}
        where = {"bytes": of["bytes"], "offset": start}
        return self.http.put(f"/uploads/{team}/{of['sha256']}", params=where, content=content[start:end])

    def upload(self, team: str = "red", **contents: bytes) -> str:
        for content in contents.values():
            assert self.put(content, team=team).json()["is_whole"]
        answer = self.ask("/uploads", team, **contents)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["upload_id"])

    def submit(self, title: str, train: str, evaluation: str, **fields: Any) -> httpx.Response:
        document = self.site.document(title)
        document["data"] |= {"train_file": train, "eval_file": evaluation}
        return self.http.post("/tasks", json={"task": {**document, **fields}})


@pytest.fixture
def red(site: Site) -> Iterator[Sender]:
    sender = Sender(site)
    yield sender
    sender.http.close()


def test_a_task_of_what_was_sent_is_trained_and_published(site: Site, red: Sender) -> None:
    asked = red.ask("/uploads/missing", train__rows_jsonl=TRAIN, eval__rows_jsonl=EVAL).json()
    assert asked == {
        "upload_id": asked["upload_id"],
        "is_kept": False,
        "missing": [{**facts(TRAIN), "from": 0}, {**facts(EVAL), "from": 0}],
    }
    upload = red.upload(train__rows_jsonl=TRAIN, eval__rows_jsonl=EVAL)
    assert upload == asked["upload_id"]
    assert red.ask("/uploads/missing", train__rows_jsonl=TRAIN, eval__rows_jsonl=EVAL).json()["is_kept"]
    answer = red.submit("red/sent", f"upload:{upload}/train/rows.jsonl", f"upload:{upload}/eval/rows.jsonl")
    assert answer.status_code == 200, answer.text
    record = site.plant.get("red/sent")
    assert (record.train_count, record.eval_count, record.submitted_by) == (6, 1, "submitter-red")
    assert site.wait_for("red/sent", "published")["spec"]["data"]["train_file"] == f"upload:{upload}/train/rows.jsonl"
    # The same rows from files of the service are the same submission: it matters what is in them, not how they came.
    again = site.client.ask(Submit(task=TaskSpec.model_validate(site.document("red/sent")), by="ann"))
    assert (again["task_id"], again["is_new"]) == (answer.json()["task_id"], False)


def test_a_connection_that_is_cut_leaves_what_came_in_whole_pieces(site: Site, red: Sender) -> None:
    content = bytes(range(256)) * 4096
    assert red.put(content, 0, 600_000).json() == {"from": 600_000, "is_whole": False}
    place = urlsplit(site.url)
    of = facts(content)
    with socket.create_connection((place.hostname, place.port)) as cut:
        head = f"PUT /uploads/red/{of['sha256']}?bytes={of['bytes']}&offset=600000 HTTP/1.1\r\nHost: x\r\n"
        head += f"Authorization: Bearer {red.token}\r\nContent-Length: 400000\r\n\r\n"
        cut.sendall(head.encode() + content[600_000:700_000])
    (missing,) = red.ask("/uploads/missing", x=content).json()["missing"]
    assert missing["from"] == 600_000
    assert red.put(content, 600_000).json()["is_whole"]
    kept = team_folder(site.plant.settings, "red").whole / of["sha256"]
    assert kept.read_bytes() == content


def test_a_piece_that_is_too_long_or_of_another_file_is_refused(site: Site, red: Sender) -> None:
    long = bytes(PIECE_BYTES_MAX + 1)
    refused = red.put(long)
    assert (refused.status_code, refused.json()["code"]) == (413, "too-large")
    assert f"more than {PIECE_BYTES_MAX:,} bytes" in refused.json()["what"]
    wrong = red.put(TRAIN, sha256="ab" * 32)
    assert (wrong.status_code, wrong.json()["kind"]) == (422, "invalid-input")
    assert facts(TRAIN)["sha256"] in wrong.json()["what"]
    folder = team_folder(site.plant.settings, "red")
    assert list(folder.parts.iterdir()) == list(folder.whole.iterdir()) == []


def test_a_file_is_as_large_as_the_settings_let_it_be(site: Site, red: Sender) -> None:
    server = site.plant.settings.server.model_copy(update={"upload_bytes_max": 100, "upload_team_bytes_max": 150})
    site.service.sources.settings = site.plant.settings.model_copy(update={"server": server})
    for answer in (red.ask("/uploads/missing", x=bytes(101)), red.put(bytes(101))):
        assert (answer.status_code, answer.json()["limit"]) == (413, 100)
    red.upload(x=bytes(100))
    for answer in (red.ask("/uploads/missing", y=bytes(51)), red.put(b"x" * 51)):
        assert (answer.status_code, answer.json()["limit"]) == (413, 150)
    assert red.put(b"x" * 50).json()["is_whole"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0", "a//b", "a\\b", ".."])
def test_no_name_leads_elsewhere(site: Site, red: Sender, name: str) -> None:
    red.put(TRAIN)
    for path in ("/uploads/missing", "/uploads"):
        answer = red.http.post(path, json={"team": "red", "files": {name: facts(TRAIN)}})
        assert (answer.status_code, answer.json()["kind"]) == (422, "invalid-input"), answer.text
    two = {"rows.jsonl": facts(TRAIN), "ROWS.jsonl": facts(TRAIN)}
    assert red.http.post("/uploads", json={"team": "red", "files": two}).status_code == 422
    upload = red.upload(rows_jsonl=TRAIN)
    refused = red.submit("red/out", f"upload:{upload}/{name}", f"upload:{upload}/rows.jsonl")
    assert refused.status_code == 422, refused.text
    assert "root" not in refused.text
    digest = red.http.put("/uploads/red/..%2F..%2Fx?bytes=1&offset=0", content=b"x")
    assert digest.status_code in (404, 422)


def test_what_another_team_sent_is_not_there(site: Site, red: Sender) -> None:
    blue = Sender(site, team="blue")
    theirs = blue.upload(team="blue", rows_jsonl=TRAIN)
    nothing = upload_id({"x": SentFile(**facts(b"nothing"))})
    answers = []
    for upload in (theirs, nothing):
        answer = red.submit("red/theft", f"upload:{upload}/rows.jsonl", f"upload:{upload}/rows.jsonl")
        answers.append((answer.status_code, answer.text.replace(upload, "X")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 422
    # Nor does it show whether another team has a file: red has to send it, too.
    assert red.ask("/uploads/missing", rows_jsonl=TRAIN).json()["missing"] == [{**facts(TRAIN), "from": 0}]
    # By its path no file of any team can be named, though the folder lies below data_roots here.
    path = str(team_folder(site.plant.settings, "blue").sets / theirs / "rows.jsonl")
    assert Path(path).exists()
    refused = red.submit("red/theft", path, path)
    assert (refused.status_code, "outside the folders" in refused.text) == (422, True)
    asked = [red.ask(path, "blue", x=TRAIN) for path in ("/uploads", "/uploads/missing")]
    for answer in (*asked, red.put(TRAIN, team="blue")):
        assert (answer.status_code, answer.json()["what"]) == (404, "there is no team 'blue'")
    blue.http.close()


def test_a_viewer_sends_nothing(site: Site) -> None:
    viewer = Sender(site, "viewer")
    for answer in (viewer.put(bytes(2**20)), viewer.ask("/uploads", x=TRAIN), viewer.ask("/uploads/missing", x=TRAIN)):
        assert (answer.status_code, answer.json()["code"]) == (403, "not-allowed")
    assert not team_folder(site.plant.settings, "red").path.exists()
    viewer.http.close()


def test_the_audit_log_has_an_upload_and_none_of_its_pieces(site: Site, red: Sender) -> None:
    before = len(site.client.ask(ReadAudit(limit=10_000)))
    for start in range(0, 100, 10):
        red.put(bytes(100), start, start + 10)
    red.ask("/uploads/missing", x=bytes(100))
    assert len(site.client.ask(ReadAudit(limit=10_000))) == before
    upload = red.ask("/uploads", x=bytes(100)).json()["upload_id"]
    asked, ended = site.client.ask(ReadAudit(limit=10_000))[before:]
    assert (asked["name"], asked["request"], asked["outcome"]) == ("submitter-red", "upload", "asked")
    files = {"upload_id": upload, "count": 1, "bytes": 100}
    assert json.loads(asked["about"]) == {"team": "red", "files": files, "request_id": "the-one"}
    assert (ended["of"], ended["outcome"]) == (asked["seq"], "done")


def test_a_retry_whose_files_are_gone_says_so(site: Site, red: Sender) -> None:
    upload = red.upload(rows_jsonl=TRAIN, eval_jsonl=EVAL)
    document = {"not_before": "2999-01-01T00:00:00+00:00"}
    taken = red.submit("red/late", f"upload:{upload}/rows.jsonl", f"upload:{upload}/eval.jsonl", **document)
    assert taken.status_code == 200, taken.text
    assert red.http.post("/cancel/red/late", json={}).status_code == 200
    site.wait_for("red/late", "cancelled")
    retried = red.http.post("/retry/red/late", json={})
    assert retried.status_code == 200, retried.text
    red.http.post("/cancel/red/late", json={})
    site.wait_for("red/late", "cancelled")
    site.service.uploads.delete_unused(time.time() + UNUSED_SECONDS + 60)
    gone = red.http.post("/retry/red/late", json={})
    assert gone.status_code == 422
    assert gone.json()["what"].startswith(f"there is no upload {upload}: it was never complete, or is deleted")
    assert gone.json()["where"] == "data.eval_file"
    assert "they are sent with it" in gone.json()["todo"]


def test_a_mistake_in_a_row_is_told_by_the_name_that_was_sent(red: Sender, site: Site) -> None:
    upload = red.upload(rows_jsonl=b'{"text": "x"}\n', eval_jsonl=EVAL)
    refused = red.submit("red/wrong", f"upload:{upload}/rows.jsonl", f"upload:{upload}/eval.jsonl")
    assert refused.status_code == 422
    assert f"upload:{upload}/rows.jsonl, row 1" in refused.text
    assert str(site.folder) not in refused.text
