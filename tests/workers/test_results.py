"""The file of what each row contributed to a score."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from configs.errors import Corrupt
from subspace_store.storage.memory import MemoryStorage
from workers.results import Results, read_results, write_results

RESULTS = Results(task_id="t-1", version=3, metric="accuracy", eval_sha256="ab" * 32, per_row=(1.0, 0.0, 0.25))


def test_results_come_back_as_they_were_written_and_the_same_ones_are_the_same_bytes() -> None:
    storage = MemoryStorage("results")
    write_results(storage, "results/t-1/3", RESULTS)
    write_results(storage, "results/t-1/again", RESULTS)
    assert read_results(storage, "results/t-1/3") == RESULTS
    assert storage.read("results/t-1/3") == storage.read("results/t-1/again")


def test_only_the_same_metric_on_the_same_rows_can_be_compared_row_by_row() -> None:
    assert RESULTS.comparable(replace(RESULTS, version=9, per_row=(0.0, 0.0, 0.0)))
    others = [replace(RESULTS, metric="f1_macro"), replace(RESULTS, eval_sha256="cd" * 32)]
    assert not any(RESULTS.comparable(other) for other in [*others, replace(RESULTS, per_row=(1.0, 0.0))])


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_damaged_file_is_told_from_an_empty_one(place: int) -> None:
    storage = MemoryStorage("damaged")
    write_results(storage, "key", RESULTS)
    content = storage.read("key")
    storage.write("key", content[:place] if place else b"")
    with pytest.raises(Corrupt, match="is not a results file"):
        read_results(storage, "key")


def test_the_control_plane_reads_them_without_the_model_libraries() -> None:
    code = "import sys, workers.results; print({'transformers', 'peft', 'scipy', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
