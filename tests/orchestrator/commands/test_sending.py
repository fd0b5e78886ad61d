"""Task files and adapters of another machine, submitted to a service that cannot read them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import Exit, Unavailable
from orchestrator.api.client import Client
from orchestrator.api.requests import SendPiece
from orchestrator.commands import sending
from orchestrator.tasks.uploads import team_folder
from subspace_store.formats.peft import write_peft_folder
from tests.builders import adapter, rows, write_rows
from tests.orchestrator.commands.test_accounts import Onebasis, elsewhere, token_of
from tests.orchestrator.site import Site

__all__ = ["elsewhere"]
pytestmark = pytest.mark.changes


@pytest.fixture
def laptop(elsewhere: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    """Commands of a submitter of red, in a folder that the service may not read."""
    monkeypatch.setattr(sending, "WAIT_SECONDS", 0.0)
    assert elsewhere("login", site.url, "--name", "prod", given=token_of(site, "submitter")).exit_code == 0
    return elsewhere


def task_on_laptop(site: Site, folder: Path, title: str = "red/afar", train: list[Any] | None = None) -> str:
    write_rows(folder / "train.jsonl", train or rows(6))
    write_rows(folder / "eval.jsonl", [{"text": "other", "label": "no"}])
    document = site.document(title)
    document["data"] |= {"train_file": "train.jsonl", "eval_file": "eval.jsonl"}
    path = folder / f"{title.replace('/', '-')}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def sent_pieces(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[SendPiece], None] = lambda piece: None
) -> list[SendPiece]:
    """The pieces that are sent from now on. before: Is called first, and may raise."""
    pieces: list[SendPiece] = []
    real = Client.send

    def send(self: Client, piece: SendPiece, content: bytes) -> Any:
        before(piece)
        pieces.append(piece)
        return real(self, piece, content)

    monkeypatch.setattr(Client, "send", send)
    return pieces


def test_a_task_is_submitted_with_its_files_and_the_second_time_sends_nothing(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pieces = task_on_laptop(site, tmp_path), sent_pieces(monkeypatch)
    tried = laptop("submit", file, "--dry-run")
    assert tried.exit_code == 0, tried.output
    assert "red/afar is fine: 6 training rows, 1 evaluation row" in tried.stdout
    assert "sent 2 files, 0.0 MB" in tried.stderr
    assert len(pieces) == 2
    done = laptop("submit", file, "--wait", "--json")
    assert done.exit_code == 0, done.output
    assert "sent" not in done.stderr
    assert json.loads(done.stdout)["state"] == "published"
    again = laptop("submit", file)
    assert "known already: nothing was submitted twice" in again.stdout
    assert len(pieces) == 2
    assert site.plant.get("red/afar").train_count == 6
    kept = team_folder(site.plant.settings, "red").whole
    sent = {(tmp_path / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")}
    assert {path.read_bytes() for path in kept.iterdir()} == sent


def test_of_several_task_files_each_file_is_sent_once(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [task_on_laptop(site, tmp_path, title) for title in ("red/one", "red/two")]
    pieces = sent_pieces(monkeypatch)
    done = laptop("submit", *files, "--wait")
    assert done.exit_code == 0, done.output
    assert len(pieces) == 2
    assert {site.plant.get(title).state for title in ("red/one", "red/two")} == {"published"}


def test_a_mistake_is_told_by_the_file_of_this_machine(laptop: Onebasis, site: Site, tmp_path: Path) -> None:
    file = task_on_laptop(site, tmp_path, train=[*rows(3), {"text": "x"}])
    for command in (("submit", file), ("submit", file, file.replace("afar", "afar"), "--dry-run")):
        refused = laptop(*command)
        assert refused.exit_code == Exit.INPUT
        assert f"{tmp_path / 'train.jsonl'}, row 4" in refused.output
        assert "upload:" not in refused.output
    (tmp_path / "train.jsonl").unlink()
    refused = laptop("submit", file)
    assert refused.exit_code == Exit.INPUT
    assert f"data.train_file: {tmp_path / 'train.jsonl'}: there is no such file" in refused.output
    os.mkfifo(tmp_path / "train.jsonl")
    assert "is no plain file" in laptop("submit", file).output


def test_sending_goes_on_after_cuts_and_after_ctrl_c(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PIECE_BYTES", 100)
    monkeypatch.setattr(sending, "PIECE_BYTES_MAX", 100)
    monkeypatch.setattr(sending, "PIECE_BYTES_MIN", 100)
    file = task_on_laptop(site, tmp_path, train=rows(40))
    size = (tmp_path / "train.jsonl").stat().st_size
    assert size > 1000
    seen: list[int] = []

    def cut(piece: SendPiece) -> None:
        seen.append(piece.offset)
        if len(seen) in (3, 4):
            raise Unavailable("cut")
        if len(seen) == 8:
            raise KeyboardInterrupt

    pieces = sent_pieces(monkeypatch, cut)
    ended = laptop("submit", file)
    assert ended.exit_code == Exit.INTERRUPTED
    assert "the same command goes on from it" in ended.stderr
    assert [piece.offset for piece in pieces] == [0, 100, 200, 300, 400]
    done = laptop("submit", file, "--wait")
    assert done.exit_code == 0, done.output
    assert pieces[5].offset == 500  # where it was
    of_training = [piece for piece in pieces if piece.bytes == size]
    assert len(of_training) == -(-size // 100)


def test_a_service_that_stays_away_is_told_with_what_to_do(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(piece: SendPiece) -> None:
        raise Unavailable("nobody answers there")

    sent_pieces(monkeypatch, cut)
    ended = laptop("submit", task_on_laptop(site, tmp_path))
    assert ended.exit_code == Exit.UNAVAILABLE
    assert "the same command goes on from what has come" in ended.output


def test_a_file_that_changes_while_it_is_sent_is_told(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = task_on_laptop(site, tmp_path)

    facts, changed = sending._facts, threading.Event()

    def facts_then_change(path: Path) -> Any:
        found = facts(path)
        if path.name == "train.jsonl" and not changed.is_set():
            changed.set()
            path.write_bytes(b"x" * found.bytes)
        return found

    monkeypatch.setattr(sending, "_facts", facts_then_change)
    refused = laptop("submit", file)
    assert refused.exit_code == Exit.INPUT
    assert f"{tmp_path / 'train.jsonl'}: was written while it was sent" in refused.output


def test_an_adapter_is_imported_with_what_is_read_of_its_folder(
    laptop: Onebasis, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pieces = tmp_path / "brought", sent_pieces(monkeypatch)
    write_peft_folder(folder, adapter(7), "tiny-source")
    (folder / "optimizer.pt").write_bytes(bytes(10_000))
    done = laptop("import", "brought", "--team", "red", "--name", "brought", "--wait", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["state"] == "published"
    assert {piece.bytes for piece in pieces} == {
        (folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused = laptop("import", "brought", "--team", "red", "--name", "pickled")
    assert refused.exit_code == Exit.INPUT
    assert "a pickle, which can run code and is never read" in refused.output
    (folder / "adapter_model.bin").unlink()
    refused = laptop("import", "brought", "--team", "red", "--name", "half")
    assert refused.exit_code == Exit.INPUT
    assert f"{folder}/adapter_model.safetensors" in refused.output


def test_files_of_another_team_are_not_sent(laptop: Onebasis, site: Site, tmp_path: Path) -> None:
    refused = laptop("submit", task_on_laptop(site, tmp_path, "blue/mine"))
    assert refused.exit_code == Exit.NOT_FOUND
    assert "there is no team 'blue'" in refused.output
    assert not team_folder(site.plant.settings, "blue").path.exists()


def test_a_task_file_may_name_an_upload(laptop: Onebasis, site: Site, tmp_path: Path) -> None:
    assert laptop("submit", task_on_laptop(site, tmp_path)).exit_code == 0
    document = site.document("red/named")
    of_first = site.plant.get("red/afar").spec.data
    document["data"] |= {"train_file": of_first.train_file, "eval_file": of_first.eval_file}
    assert document["data"]["train_file"].startswith("upload:")
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(document))
    done = laptop("submit", str(tmp_path / "named.yaml"), "--wait")
    assert done.exit_code == 0, done.output


def test_pieces_are_as_long_as_the_line_is_fast() -> None:
    assert sending.next_size(2**20, 0.1) == 2**21
    assert sending.next_size(8 * 2**20, 0.1) == 8 * 2**20
    assert sending.next_size(2**20, 5.0) == 2**20
    assert sending.next_size(2**20, 30.0) == 2**19
    assert sending.next_size(2**16, 30.0) == 2**16
