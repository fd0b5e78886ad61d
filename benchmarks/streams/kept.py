"""What is trained and scored once, in a folder outside the repository: a run that was killed goes on where it was.

Files are named after all that their content depends on (settings, rows, what training started from), so that nothing
old is taken for something else. Each is written whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_streams import Case, keep
from configs.task_spec import TaskSpec
from subspace_store import Adapter, adapter_from_bytes, adapter_to_bytes
from subspace_store.digests import digest
from workers.rows.task_data import ImageRow, Row, input_digest


@dataclass(frozen=True)
class Made:
    """An adapter, and what making it took."""

    adapter: Adapter
    numbers: int
    """Numbers of the update that were trained, the head's apart."""
    seconds: float = 0.0
    """0: as long as making it took, see `Kept.made`."""
    note: str = ""


class Kept:
    """The folder."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self._say = folder, say
        self._scores_file = folder / "scores.jsonl"
        self._scores = dict(_lines(self._scores_file))

    def made(self, case: Case, what: str, of: str, make: Callable[[], Made]) -> Made:
        """An adapter of a task, from the folder or made now.

        Args:
            what: How it is made, a word for the file's name.
            of: All else that it depends on, beside the task's own settings and rows.
            make: Makes it.
        """
        name = f"{case.spec.name}-{what}-{digest_of(identity(case), of)[:12]}"
        file, told = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if not told.is_file():
            started = time.perf_counter()
            made = make()
            seconds = made.seconds or time.perf_counter() - started
            keep(file, adapter_to_bytes(made.adapter))
            keep(told, json.dumps({"numbers": made.numbers, "seconds": seconds, "note": made.note}).encode())
            self._say(f"  made {name} in {time.perf_counter() - started:.0f} s")
        return Made(adapter_from_bytes(file.read_bytes(), str(file)), **json.loads(told.read_text()))

    def score(self, adapter: Adapter, case: Case, rows: str, measure: Callable[[], float]) -> float:
        """A score of an adapter, known or measured now.

        Args:
            rows: Which of the case's rows, and how.
        """
        key = digest_of(digest(adapter_to_bytes(adapter)), identity(case), rows)
        if key not in self._scores:
            self._scores[key] = measure()
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._scores_file.open("a") as file:
                file.write(json.dumps([key, self._scores[key]]) + "\n")
        return self._scores[key]


def digest_of(*parts: str) -> str:
    """Digest of some texts."""
    return digest("\n".join(parts).encode())


def identity(case: Case) -> str:
    """A task's settings and rows, whatever folder they come from."""
    return digest_of(_settings(case.spec), _told(case.train), _told(case.test))


def _told(rows: Sequence[Row]) -> str:
    """Rows as a text. Of a picture it is a digest: numpy writes large arrays with dots in their middle."""
    told = (f"{row.label} {input_digest(row).hex()}" if isinstance(row, ImageRow) else row for row in rows)
    return repr(tuple(told))


def _settings(spec: TaskSpec) -> str:
    return spec.model_dump_json(exclude={"data": {"train_file", "eval_file"}})


def _lines(file: Path) -> Mapping[str, float]:
    """Scores of a file, whose last line may be cut off."""
    found = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            key, score = json.loads(line)
        except ValueError:  # the end of a run that was killed
            continue
        found[key] = score
    return found
