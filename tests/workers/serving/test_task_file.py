"""Tensors come back from a mapped file bit for bit, and take no memory of the process until they are looked at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from workers.serving import task_file
from workers.serving.task_file import TaskFile

MIB = 2**20


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {
        "layer/e_RK": torch.randn(3, 4, generator=draw),
        "layer/b_RN": torch.zeros(0, 5),
        "/bias": torch.randn(7, generator=draw).bfloat16(),
        "/scale": torch.randn((), generator=draw, dtype=torch.float64),
        "/turned": torch.randn(4, 3, generator=draw).T,
    }


def memory_of_the_process() -> int:
    """Bytes that no file stands for: what the system cannot take back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def test_what_was_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    file = TaskFile(str(tmp_path), segment_bytes=4096)
    for number in range(20):
        file.write(f"t{number}", ("facts", number), tensors_of(number))
    assert file.bytes > 4096  # of several segments
    for number in reversed(range(20)):
        found = file.read(f"t{number}")
        assert found is not None
        facts, tensors = found
        assert facts == ("facts", number)
        assert tensors.keys() == tensors_of(number).keys()
        for name, tensor in tensors_of(number).items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    assert file.read("t20") is None


def test_nothing_of_it_stays_in_the_folder_and_a_task_may_be_larger_than_a_segment(tmp_path: Path) -> None:
    file, large = TaskFile(str(tmp_path), segment_bytes=4096), torch.arange(10_000)
    file.write("large", None, {"x": large})
    file.write("small", None, {"x": large[:3]})
    assert [*tmp_path.iterdir()] == []
    for name, expected in ("large", large), ("small", large[:3]):
        found = file.read(name)
        assert found is not None
        assert torch.equal(found[1]["x"], expected)


def test_a_disk_without_room_costs_that_task_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TaskFile(str(tmp_path), segment_bytes=4096)
    file.write("first", 1, tensors_of(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(task_file, "_segment", full)
        with pytest.raises(OSError, match="No space left"):
            file.write("large", 2, {"x": torch.zeros(9000)})
    assert file.read("large") is None
    file.write("third", 3, tensors_of(3))
    for name, number in ("first", 1), ("third", 3):
        found = file.read(name)
        assert found is not None
        assert found[0] == number
        assert torch.equal(found[1]["layer/e_RK"], tensors_of(number)["layer/e_RK"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory a process has of its own")
def test_a_hundred_megabytes_of_tasks_take_no_memory_of_the_process(tmp_path: Path) -> None:
    file, one = TaskFile(str(tmp_path)), torch.ones(MIB // 4)
    before = memory_of_the_process()
    for number in range(100):
        file.write(f"t{number}", None, {"x": one * number})
    kept = [file.read(f"t{number}") for number in range(100)]
    assert [float(found[1]["x"].mean()) for found in kept if found is not None] == [float(n) for n in range(100)]
    assert file.bytes >= 100 * MIB
    assert memory_of_the_process() - before < 20 * MIB
