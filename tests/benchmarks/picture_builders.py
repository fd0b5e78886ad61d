"""A folder of pictures in the form of the real sets: a class is a bright quarter, the same for every fourth class."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ALPHABETS = {"Balinese": 24, "Early_Aramaic": 22, "Greek": 24, "Korean": 40, "Latin": 26}


def save_picture_sets(folder: Path, digits: int = 20, others: int = 3) -> Path:
    """So many training pictures of each class, and a third as many to test."""
    characters = [f"{name}/character{n:02}" for name, count in ALPHABETS.items() for n in range(1, count + 1)]
    _save(folder, "mnist", list("0123456789"), digits, 28)
    _save(folder, "omniglot_a", characters, others, 28)
    _save(folder, "cifar10_jpeg", [f"thing-{n}" for n in range(10)], others, 32)
    return folder


def _save(folder: Path, name: str, label_names: list[str], of_each: int, side: int) -> None:
    draw, arrays = np.random.default_rng(len(label_names)), dict[str, Any]()
    for part, count in (("train", of_each), ("test", max(1, of_each // 3))):
        labels = draw.permutation(np.repeat(np.arange(len(label_names)), count))
        shown = draw.integers(0, 90, (len(labels), side, side), dtype=np.uint8)
        for picture, label in zip(shown, labels, strict=True):
            down, right = side // 2 * (label % 2), side // 2 * (label // 2 % 2)
            picture[down : down + side // 2, right : right + side // 2] += 160
        arrays[f"y_{part}"] = labels
        if name != "cifar10_jpeg":
            arrays[f"x_{part}"] = shown
            continue
        files = [_jpeg(picture) for picture in shown]
        arrays[f"jpeg_{part}"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"offset_{part}"] = np.cumsum([0, *map(len, files)])
    np.savez(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.meta.json").write_text(json.dumps({"label_names": label_names}))


def _jpeg(picture: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()
