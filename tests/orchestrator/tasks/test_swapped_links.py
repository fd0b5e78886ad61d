"""A name that was checked is swapped for a link before it is opened: what lies outside is never read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from configs.places import OutsideError, open_below
from orchestrator.tasks import admission
from subspace_store.formats import adapters
from tests.builders import LABELS, rows, write_rows
from tests.orchestrator.tasks.test_admission import Desk

_read: list[Path] | None = None


def _note_what_is_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """Every file that Python opens to read, by what its name leads to then."""
    if event == "open" and _read is not None and not (arguments[2] or 0) & os.O_PATH:
        path = arguments[0]
        _read.append(Path(os.path.realpath(f"/proc/self/fd/{path}" if isinstance(path, int) else path)))


sys.addaudithook(_note_what_is_opened)  # for good, but it only listens while a test here runs


@pytest.fixture
def read() -> Iterator[list[Path]]:
    global _read
    _read = []
    yield _read
    _read = None


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.queue.close()


def swap(path: Path, outside: Path) -> Path:
    """Move a file or folder out of what the service may read, and let its name lead there."""
    path.rename(outside)
    path.symlink_to(outside)
    return outside


def table(folder: Path, name: str) -> Path:
    """Six rows in a file of this name, or in a folder of `datasets`."""
    texts, labels = [f"text {i}" for i in range(6)], [LABELS[i % 2] for i in range(6)]
    columns = pa.table({"text": texts, "label": labels})
    path = folder / name
    match path.suffix:
        case ".jsonl":
            write_rows(path, rows(6))
        case ".csv" | ".tsv":
            sign = "," if path.suffix == ".csv" else "\t"
            lines = [f"{text}{sign}{label}" for text, label in zip(texts, labels, strict=True)]
            path.write_text("\n".join([f"text{sign}label", *lines]))
        case ".parquet":
            pq.write_table(columns, path)
        case ".npz":
            np.savez(path, text=np.array(texts), label=np.array(labels))
        case _:
            path.mkdir()
            with pa.OSFile(str(path / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, columns.schema) as out:
                out.write_table(columns)
            (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return path


def refused_without_reading(
    desk: Desk, document: dict[str, Any], read: list[Path], swapped: Callable[[], Path], step: str, monkeypatch: Any
) -> None:
    """Swap right before `step` begins to read; the submission is refused, and nothing outside was opened."""
    module = admission if step == "freeze" else adapters
    real, outside = getattr(module, step), []

    def after_the_swap(*arguments: Any) -> Any:
        if not outside:
            outside.append(swapped())
            read.clear()
        return real(*arguments)

    monkeypatch.setattr(module, step, after_the_swap)
    said = desk.refuse(document)
    assert "does not read" in said
    assert outside
    assert [path for path in read if path.is_relative_to(outside[0])] == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet"])
@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_file_of_rows_is_not_read_through_a_link_that_came_later(
    desk: Desk, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    path = table(desk.data, name)
    document = desk.document(data={key: str(path)})
    refused_without_reading(
        desk, document, read, lambda: swap(path, tmp_path / f"secret{path.suffix}"), "freeze", monkeypatch
    )


@pytest.mark.parametrize("part", ["", "data.arrow", "state.json"])
def test_a_folder_of_rows_is_not_read_through_a_link_that_came_later(
    desk: Desk, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = table(desk.data, "saved")
    document = desk.document(data={"train_file": str(folder)})
    refused_without_reading(
        desk, document, read, lambda: swap(folder / part, tmp_path / "secret"), "freeze", monkeypatch
    )


def test_a_folder_above_a_file_may_not_be_swapped_either(
    desk: Desk, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.data / "deep/er").mkdir(parents=True)
    path = table(desk.data / "deep/er", "t.jsonl")
    document = desk.document(data={"train_file": str(path)})
    refused_without_reading(
        desk, document, read, lambda: swap(desk.data / "deep", tmp_path / "secret"), "freeze", monkeypatch
    )


@pytest.mark.parametrize("part", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_not_read_through_a_link_that_came_later(
    desk: Desk, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = desk.peft()
    refused_without_reading(
        desk, desk.imported(), read, lambda: swap(folder / part, tmp_path / "secret"), "read_adapter", monkeypatch
    )


@pytest.mark.parametrize("part", ["", "pytorch_lora_weights.safetensors"])
def test_a_lora_of_diffusers_is_not_read_through_a_link_that_came_later(
    desk: Desk, tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = desk.data / "style"
    folder.mkdir()
    save_file({"unet.to_q.lora_A.weight": torch.ones(1, 2)}, folder / "pytorch_lora_weights.safetensors")
    document = desk.imported(method={"name": "import", "adapter": str(folder)})
    refused_without_reading(
        desk, document, read, lambda: swap(folder / part, tmp_path / "secret"), "read_adapter", monkeypatch
    )


def test_a_link_that_stays_inside_is_followed(desk: Desk, read: list[Path]) -> None:
    table(desk.data, "t.parquet").rename(desk.data / "real.parquet")
    (desk.data / "t.parquet").symlink_to(desk.data / "real.parquet")
    record, _ = desk.submit(desk.document(data={"train_file": str(desk.data / "t.parquet")}))
    assert record.train_count == 6
    assert desk.data / "real.parquet" in read  # so the listener listens


def test_pictures_in_an_archive_are_opened_by_the_same_rule(tmp_path: Path) -> None:
    outside = table(tmp_path, "t.npz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/t.npz").symlink_to(outside)
    from workers.rows.row_files import read_file

    def opener(path: Path) -> Any:
        return open_below(path, [tmp_path / "data"])

    with pytest.raises(OutsideError):
        list(read_file(tmp_path / "data/t.npz", {"text_column": "text", "label_column": "label"}, opener))
    assert len(list(read_file(outside, {"text_column": "text", "label_column": "label"}))) == 6


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(
    desk: Desk, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(desk.data, "t.jsonl")

    def pipe() -> Path:
        path.unlink()
        os.mkfifo(path)
        return path

    document = desk.document(data={"train_file": str(path)})
    refused_without_reading(desk, document, read, pipe, "freeze", monkeypatch)


def test_a_file_is_opened_below_a_folder_that_is_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("inside")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    with open_below(tmp_path / "root/file", [tmp_path / "root"]) as file:
        assert file.read() == b"inside"
    with pytest.raises(OutsideError):
        open_below(tmp_path / "real", [tmp_path / "root"])  # a folder
