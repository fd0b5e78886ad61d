"""Real pictures for benchmarks: CIFAR-10, MNIST, five Omniglot alphabets, from a folder outside the repository.

`--data FOLDER` names it; each set is an .npz file with a .meta.json beside it. The classes are in groups, each a task.
Of some groups a first part of the training pictures is for pretraining (`picture_models.py`); what is trained on
afterwards comes after that part, so no picture is in both, and test pictures are the sets' own.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workers.rows.task_data import ImageRow, decode_picture

Part = Literal["pretraining", "train", "test"]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Group:
    """Classes of one set that are told apart among themselves."""

    file: str
    """Name of the set."""
    classes: range
    """Their indices among the set's classes."""
    prompt: str
    """Text for a picture, with the name of its class in the place of {}."""
    pretrained_share: float = 0.0
    """Share of each class's training pictures, the first ones, that pretraining sees."""


PHOTO, DIGIT, DRAWING = "a photo of a {}.", "the digit {}.", "a drawing of the {}."
GROUPS: Mapping[str, Group] = {
    "cifar-first": Group("cifar10_jpeg", range(5), PHOTO, 0.8),
    "cifar-second": Group("cifar10_jpeg", range(5, 10), PHOTO),
    "digits-first": Group("mnist", range(5), DIGIT, 0.65),
    "digits-second": Group("mnist", range(5, 10), DIGIT),
    "balinese": Group("omniglot_a", range(24), DRAWING),
    "aramaic": Group("omniglot_a", range(24, 46), DRAWING),
    "greek": Group("omniglot_a", range(46, 70), DRAWING),
    "korean": Group("omniglot_a", range(70, 110), DRAWING, 1.0),
    "latin": Group("omniglot_a", range(110, 136), DRAWING, 1.0),
}


def label_names(data: Path, name: str) -> tuple[str, ...]:
    """Names of a group's classes, as they stand in a prompt."""
    group = GROUPS[name]
    known = _meta(data, group.file)["label_names"]
    return tuple(_as_said(group.file, known[index]) for index in group.classes)


def rows(data: Path, name: str, part: Part, limit: int | None = None) -> tuple[ImageRow, ...]:
    """The first rows of one part of a group, in the set's order, which is a shuffled one."""
    return tuple(row for row, _ in zip(_rows(data, GROUPS[name], part), range(limit or 10**9), strict=False))


def _rows(data: Path, group: Group, part: Part) -> Iterator[ImageRow]:
    of_set = _arrays(data, group.file)
    side = "test" if part == "test" else "train"
    labels = of_set[f"y_{side}"].tolist()
    counts, met = Counter(labels), Counter[int]()
    for place, label in enumerate(labels):
        if label not in group.classes:
            continue
        is_for_pretraining = met[label] < round(group.pretrained_share * counts[label])
        met[label] += 1
        if part == "test" or is_for_pretraining == (part == "pretraining"):
            yield ImageRow(_picture(of_set, side, place, group.file), label - group.classes.start)


def _picture(of_set: Mapping[str, Any], side: str, place: int, name: str) -> Any:
    """Pixels, H×W×C."""
    if f"x_{side}" in of_set:
        return of_set[f"x_{side}"][place][:, :, None]
    start, end = of_set[f"offset_{side}"][place : place + 2]
    return decode_picture(of_set[f"jpeg_{side}"][start:end].tobytes(), f"{name}, picture {place}")


def _as_said(file: str, name: str) -> str:
    if file == "mnist":
        return DIGITS[int(name)]
    alphabet, _, character = name.partition("/character")
    return f"{alphabet.replace('_', ' ')} character {int(character)}" if character else name


@functools.cache
def _arrays(data: Path, name: str) -> Mapping[str, Any]:
    if not (data / f"{name}.npz").is_file():
        raise SystemExit(f"{data} has no file {name}.npz: name the folder of the pictures with --data")
    with np.load(data / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@functools.cache
def _meta(data: Path, name: str) -> Any:
    return json.loads((data / f"{name}.meta.json").read_text())
