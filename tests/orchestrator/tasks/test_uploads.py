"""Files that teams sent, as they lie on disk: pieces in order, whole by their digest, in sets, and gone when unused."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Conflict, InvalidInput, TooLarge, Unavailable
from configs.settings import Settings
from configs.uploads import SentFile, check_names, upload_id, upload_named
from orchestrator.tasks import uploads
from orchestrator.tasks.admission import Readable
from orchestrator.tasks.uploads import UNUSED_SECONDS, Uploads, team_folder
from tests.builders import settings

CONTENT = bytes(range(256)) * 40


def facts(content: bytes) -> SentFile:
    return SentFile(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


class Place:
    """Uploads in a folder, and what teams send to them."""

    def __init__(self, folder: Path, **server: int) -> None:
        self.settings: Settings = settings(folder, server=server)
        self.uploads = Uploads(lambda: self.settings)
        self.red = team_folder(self.settings, "red")

    def send(self, content: bytes, start: int = 0, end: int | None = None, of: SentFile | None = None) -> Any:
        piece = self.uploads.piece("red", of or facts(content), start)
        try:
            piece.write(content[start:end])
            return piece.end()
        finally:
            piece.close()

    def keep(self, **contents: bytes) -> str:
        for content in contents.values():
            self.send(content)
        return str(self.uploads.keep("red", {name: facts(content) for name, content in contents.items()})["upload_id"])

    def come(self, content: bytes) -> int:
        (one,) = self.uploads.missing("red", {"x": facts(content)})["missing"]
        return int(one["from"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- pieces ------------------------------------------------------------------------------------------------------


def test_pieces_come_in_order_and_may_be_repeated_or_overlap(place: Place) -> None:
    assert place.come(CONTENT) == 0
    assert place.send(CONTENT, 0, 4000) == {"from": 4000, "is_whole": False}
    assert place.send(CONTENT, 0, 4000) == {"from": 4000, "is_whole": False}
    assert place.send(CONTENT, 9000) == {"from": 4000, "is_whole": False}  # a gap is not left
    assert place.send(CONTENT, 3000, 6000) == {"from": 6000, "is_whole": False}
    assert place.come(CONTENT) == 6000
    assert place.send(CONTENT, 6000) == {"from": len(CONTENT), "is_whole": True}
    assert (place.red.whole / facts(CONTENT).sha256).read_bytes() == CONTENT
    assert place.send(CONTENT, 0, 10) == {"from": len(CONTENT), "is_whole": True}
    assert place.uploads.missing("red", {"x": facts(CONTENT)})["missing"] == []


def test_what_a_killed_process_left_is_gone_on_from(place: Place) -> None:
    place.send(CONTENT, 0, 4000)
    part = next(place.red.parts.iterdir())
    with part.open("ab") as file:  # killed in the middle of a piece
        file.write(CONTENT[4000:4321])
    again = Uploads(lambda: place.settings)
    (one,) = again.missing("red", {"x": facts(CONTENT)})["missing"]
    assert one["from"] == 4321
    assert place.send(CONTENT, 4000)["is_whole"]
    # Killed between the last byte and its digest: an empty piece has it checked.
    other = CONTENT[::-1]
    (place.red.parts / f"{facts(other).sha256}.{len(other)}").write_bytes(other)
    assert place.come(other) == len(other)
    assert place.send(other, len(other)) == {"from": len(other), "is_whole": True}


def test_an_empty_file_is_sent_as_an_empty_piece(place: Place) -> None:
    assert place.send(b"") == {"from": 0, "is_whole": True}
    assert place.keep(empty=b"")


def test_a_file_that_is_not_what_its_digest_says_is_refused_and_deleted(place: Place) -> None:
    wrong = CONTENT[:-1] + b"!"
    with pytest.raises(InvalidInput, match=f"what came has the digest {facts(wrong).sha256}"):
        place.send(wrong, of=facts(CONTENT))
    assert list(place.red.parts.iterdir()) == list(place.red.whole.iterdir()) == []
    assert place.come(CONTENT) == 0
    assert place.send(CONTENT)["is_whole"]


def test_more_than_was_said_is_refused_and_nothing_of_it_kept(place: Place) -> None:
    with pytest.raises(TooLarge, match="more has come than the 10 bytes that were said"):
        place.send(CONTENT, of=SentFile(sha256=facts(CONTENT).sha256, bytes=10))
    assert list(place.red.parts.iterdir()) == []


def test_the_same_file_from_many_at_once_is_whole_once(place: Place) -> None:
    step, errors = 512, []

    def send() -> None:
        at = 0
        try:
            while not (told := place.send(CONTENT, at, at + step))["is_whole"]:
                at = told["from"]
        except Exception as error:  # a thread's own
            errors.append(error)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.read_bytes() for path in place.red.whole.iterdir()] == [CONTENT]
    assert list(place.red.parts.iterdir()) == []


def test_limits_of_a_file_and_of_a_team_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    place = Place(tmp_path, upload_bytes_max=20_000, upload_team_bytes_max=30_000)
    with pytest.raises(TooLarge, match=r"big: has 20,001 bytes, and a file that is sent may have 20,000"):
        place.uploads.missing("red", {"big": SentFile(sha256="ab" * 32, bytes=20_001)})
    with pytest.raises(TooLarge):
        place.send(b"x", of=SentFile(sha256="ab" * 32, bytes=20_001))
    place.keep(one=CONTENT)
    second = SentFile(sha256="ab" * 32, bytes=19_761)
    assert second.bytes == 30_000 - len(CONTENT) + 1
    with pytest.raises(TooLarge, match="team red has 10,240 bytes of files here, and would have 30,001"):
        place.uploads.missing("red", {"two": second})
    assert place.uploads.missing("blue", {"two": second})["missing"]  # which another team's files do not count for
    place.send(CONTENT[::-1])
    with pytest.raises(TooLarge, match="would have 30,720"):
        place.send(bytes(10_240))


def test_the_disk_is_not_filled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "FREE_BYTES_MIN", shutil.disk_usage(place.settings.state_dir).total)
    with pytest.raises(Unavailable, match="the disk of the service is nearly full"):
        place.send(CONTENT)


def test_nobody_but_the_owner_may_look(place: Place) -> None:
    place.keep(one=CONTENT)
    for folder in (place.red.path.parent, place.red.path, place.red.whole, place.red.sets, *place.red.sets.iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(next(place.red.whole.iterdir()).stat().st_mode) == 0o400


# --- sets --------------------------------------------------------------------------------------------------------


def test_an_upload_is_its_files_under_their_names(place: Place) -> None:
    place.send(CONTENT)
    files = {"train/a.jsonl": facts(CONTENT), "eval/b.jsonl": facts(CONTENT), "c": facts(b"c")}
    with pytest.raises(Conflict, match="1 of its files are not here"):
        place.uploads.keep("red", files)
    assert os.listdir(place.red.sets) == []
    place.send(b"c")
    kept = place.uploads.keep("red", files)
    assert kept == {"upload_id": upload_id(files), "files": 3, "bytes": 2 * len(CONTENT) + 1, "is_new": True}
    assert place.uploads.keep("red", files)["is_new"] is False
    assert place.uploads.missing("red", files) == {"upload_id": upload_id(files), "is_kept": True, "missing": []}
    found = place.red.find(upload_named(f"upload:{upload_id(files)}/train"), "data.train_file")
    assert (found / "a.jsonl").read_bytes() == CONTENT
    assert upload_id(files) != upload_id({**files, "c": facts(b"d")}) != upload_id({"c": facts(b"d")})


def test_a_size_that_is_not_the_files_is_refused(place: Place) -> None:
    place.send(CONTENT)
    wrong = SentFile(sha256=facts(CONTENT).sha256, bytes=7)
    with pytest.raises(InvalidInput, match="x: has not 7 bytes"):
        place.uploads.keep("red", {"x": wrong})


def test_what_is_not_used_for_a_day_is_deleted_and_the_rest_stays(place: Place) -> None:
    old, used = place.keep(one=CONTENT, two=b"old alone"), place.keep(one=CONTENT, two=b"new")
    place.send(b"half of it", 0, 4)
    (place.red.sets / f".{'a' * 64}.1234").mkdir()  # a killed process was making it
    (place.red.brought / "killed").mkdir()
    long_ago = time.time() - UNUSED_SECONDS - 60
    red = place.red
    for path in (path for folder in (red.sets, red.whole, red.parts, red.brought) for path in folder.iterdir()):
        os.utime(path, (long_ago, long_ago))
    (place.red.brought / "of-now").mkdir()
    place.red.find(upload_named(f"upload:{used}/one"), "data.train_file")  # a use
    place.uploads.delete_unused(time.time())
    assert os.listdir(place.red.sets) == [used]
    assert {path.read_bytes() for path in place.red.whole.iterdir()} == {CONTENT, b"new"}
    assert list(place.red.parts.iterdir()) == []
    assert os.listdir(place.red.brought) == ["of-now"]
    with pytest.raises(InvalidInput, match=r"there is no upload .* not used for 24 hours"):
        place.red.find(upload_named(f"upload:{old}/one"), "data.train_file")


def test_what_is_about_to_be_kept_is_not_deleted(place: Place) -> None:
    place.send(CONTENT)
    whole = next(place.red.whole.iterdir())
    os.utime(whole, (0, 0))
    place.uploads.missing("red", {"x": facts(CONTENT)})
    place.uploads.delete_unused(time.time())
    assert place.uploads.keep("red", {"x": facts(CONTENT)})["is_new"]


# --- names -------------------------------------------------------------------------------------------------------

WRONG_NAMES = (
    "", "/etc/passwd", "..", "../x", "a/../b", "a/./b", "a//b", "a/", "./a", "a\0b", "a\nb", "a\\b", "\ud800",
    "x" * 256, "/".join("abcdefghi"), "a\u202eb", "C:\\x",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NAMES, ids=ascii)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name of a file here|more than 8 parts"):
        check_names([name])
    if name:
        with pytest.raises(InvalidInput):
            upload_named(f"upload:{'a' * 64}/{name}")


@pytest.mark.parametrize(
    "names", [("a", "A"), ("d/x", "D/x"), ("d/x", "D/y"), ("a", "a/b"), ("A", "a/b"), ("e\u0301", "\xe9"), ("ß", "SS")]
)
def test_names_that_are_one_on_some_machine_are_refused(names: tuple[str, str]) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(ValueError, match=r"the same name on some machines|is a file and a folder"):
            check_names(order)


def test_names_of_all_scripts_pass() -> None:
    check_names(["rows.jsonl", "d/x", "d/y", "Ünïcode/行.csv", ".hidden", "a b", "...", "C:x"])


@pytest.mark.parametrize(
    "wrong", ["upload:", "upload:abc", f"upload:{'A' * 64}", f"upload:{'a' * 64}/", f"upload:{'a' * 65}"]
)
def test_what_names_no_upload_is_no_path_either(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="names no upload"):
        upload_named(wrong)


# --- who reads what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["id", "path", "link", "above"])
def test_no_team_reads_what_another_has_sent(place: Place, tmp_path: Path, how: str) -> None:
    upload = place.keep(one=CONTENT)
    mine, theirs = (Readable.of(place.settings, team) for team in ("red", "blue"))
    path = place.red.sets / upload / "one"
    (tmp_path / "link").symlink_to(path)
    named = {
        "id": f"upload:{upload}/one",
        "path": str(path),
        "link": str(tmp_path / "link"),
        "above": str(tmp_path / "x/../uploads/red/whole" / facts(CONTENT).sha256),
    }[how]
    refused: list[str] = []
    for readable, place_named in ((theirs, named), (theirs, named.replace(upload, "f" * 64))):
        with pytest.raises(InvalidInput) as error:
            readable.rows(place_named, "data.train_file")
        refused.append(str(error.value).replace(upload, "X").replace("f" * 64, "X"))
    if how == "id":
        assert refused[0] == refused[1]  # as one that does not exist
        with mine.opener("data")(mine.rows(named, "data.train_file")) as file:
            assert file.read() == CONTENT
    with pytest.raises(InvalidInput, match="was changed, while it was read"):
        theirs.opener("data")(path)


def test_parts_and_files_without_a_name_are_nobodys_to_read(place: Place) -> None:
    place.send(CONTENT, 0, 100)
    (part,) = place.red.parts.iterdir()
    with pytest.raises(InvalidInput, match="outside the folders"):
        Readable.of(place.settings, "red").rows(str(part), "data.train_file")
