"""The measurements that are lent a GPU now and then, run small on the CPU: a script that rots is found out too late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import training_gpu


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # the bare loop's PEFT
def test_the_gpu_part_runs_from_its_model_to_its_merges() -> None:
    said, shown = list[str](), list[Any]()
    found = training_gpu.measure(training_gpu.TINY, torch.device("cpu"), said.append, shown.append)
    assert "bfloat16" in found["shape"]
    assert {row["what"] for row in found["training"]} == set(training_gpu.WAYS), found["training"]
    assert all(row["step_seconds"] > 0 and row["trained_numbers"] > 0 for row in found["training"])
    assert [(row["tensors_on"], row["modules"]) for row in found["merging"]] == [("cpu", 14)]
    assert len(shown) == 2
