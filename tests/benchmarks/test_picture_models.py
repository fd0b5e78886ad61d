"""Models that see, pretrained for a few steps: on which pictures, and on from where a run was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import picture_models, picture_sets
from benchmarks.picture_models import Pretraining, caption_tokenizer, gathered, make_clip, make_vit, moved
from tests.benchmarks.picture_builders import save_picture_sets
from tests.workers.worker_builders import tiny_settings
from workers.base_model import load_base_model
from workers.rows.task_data import input_digest
from workers.weights import weights_digest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_picture_sets(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def seen(data: Path, monkeypatch: pytest.MonkeyPatch) -> Pretraining:
    """What is pretrained on, by tiny models, two steps between checkpoints."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(picture_models, "SIZES", sizes)
    monkeypatch.setattr(picture_models, "ROWS_PER_STEP", 8)
    monkeypatch.setattr(picture_models, "CHECKPOINT_STEPS", 2)
    return gathered(data)


def test_no_picture_is_pretrained_on_and_in_a_task(data: Path, seen: Pretraining) -> None:
    pretrained = {input_digest(row) for row in seen.rows}
    for name in picture_sets.GROUPS:
        train, test = (picture_sets.rows(data, name, part) for part in ("train", "test"))
        assert test
        assert not pretrained & {input_digest(row) for row in (*train, *test)}
    # Of 20 pictures of each digit 13 are for pretraining (0.65), 7 are left; of 5 digits that is 35.
    assert len(picture_sets.rows(data, "digits-first", "pretraining")) == 5 * 13
    assert len(picture_sets.rows(data, "digits-first", "train")) == 5 * 7
    assert len(picture_sets.rows(data, "digits-second", "train", 11)) == 11


def test_every_class_that_is_pretrained_on_has_a_caption_of_its_own(seen: Pretraining) -> None:
    assert len(set(seen.captions)) == 76  # 5 of CIFAR, 5 digits, 40 and 26 characters
    assert {*seen.classes} == {*range(76)}
    assert sum(seen.weights) == pytest.approx(1)
    assert "the digit three." in seen.captions
    assert "a drawing of the Latin character 7." in seen.captions
    read = caption_tokenizer(seen.captions)(list(seen.captions))["input_ids"]
    assert len({tuple(ids) for ids in read}) == 76
    assert {ids[-1] for ids in read} == {1}  # the end, by which CLIP reads a text


@pytest.mark.parametrize(("make", "kind"), [(make_clip, "image_text"), (make_vit, "image_classification")])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    make: Any, kind: str, seen: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(seen, tmp_path / "whole", 5)
    keep = picture_models._keep

    def killed(*asked: Any) -> None:
        keep(*asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(picture_models, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        make(seen, tmp_path / "killed", 5)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(picture_models, "_keep", keep)
    make(seen, tmp_path / "killed", 5)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == []
    assert weights_digest(tmp_path / "killed") == weights_digest(tmp_path / "whole")
    assert kind in load_base_model(tiny_settings(str(tmp_path / "whole"))).kinds


def test_a_picture_is_moved_by_at_most_four_pixels_and_a_character_never_mirrored() -> None:
    pixels = torch.zeros(640, 1, 16, 16)
    pixels[:, :, 8, 6] = 1
    found = moved(pixels, torch.arange(640) < 320, torch.Generator().manual_seed(0))
    places = found.flatten(1).argmax(1)
    rows, columns = places // 16, places % 16
    assert found.sum((1, 2, 3)).tolist() == [1.0] * 640
    assert (rows.min(), rows.max()) == (4, 12)
    assert (columns[320:].min(), columns[320:].max()) == (2, 10)
    assert columns[:320].max() > 10  # 15 − 6 + 4 = 13 at most
