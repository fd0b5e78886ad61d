"""Pictures told apart by texts: CLIP's own logits, a loss of both directions, labels that nobody was trained on."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoTokenizer, CLIPForImageClassification, CLIPModel

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from subspace_store.formats.peft import write_peft_folder
from tests.subspace_store.builders import random_adapter
from tests.workers.test_kinds import trained
from tests.workers.tiny_bases import save_clip
from tests.workers.worker_builders import task_of_kind, tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import adapted_model, score_adapter
from workers.rows.task_data import ImageRow
from workers.two_towers import contrastive_loss

NAMES = ("grass", "Paris", "France")
TOWERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base_model(tiny_settings(str(folder)))


def pictures(count: int = 5) -> list[np.ndarray[Any, Any]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (20, 16, 3), dtype=np.uint8) for _ in range(count)]


def as_transformers_says(model: Any, folder: Path, names: tuple[str, ...], template: str = "a photo of a {}.") -> Any:
    """Logits as a user of CLIP would compute them."""
    prompts = AutoTokenizer.from_pretrained(folder)([template.format(name) for name in names], padding=True)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=pictures(), return_tensors="pt")
    batch = {name: torch.tensor(value) for name, value in prompts.items()} | dict(pixels)
    with torch.inference_mode():
        return model.eval()(**batch).logits_per_image


def ours(base: BaseModel, model: Any) -> torch.Tensor:
    pixels = base.image_processor(images=pictures(), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(pixel_values=pixels).logits
    return found


def test_logits_are_clips_own(base: BaseModel, folder: Path) -> None:
    plain = CLIPModel.from_pretrained(folder)
    expected = as_transformers_says(plain, folder, NAMES)
    assert expected.std() > 0.1
    assert torch.allclose(ours(base, base.task_model(task_of_kind("image_text", NAMES))), expected, atol=1e-5)
    other = task_of_kind("image_text", NAMES)
    other = other.model_copy(update={"data": other.data.model_copy(update={"prompt_template": "{} of France"})})
    expected = as_transformers_says(plain, folder, NAMES, "{} of France")
    assert torch.allclose(ours(base, base.task_model(other)), expected, atol=1e-5)


def test_an_exported_adapter_says_the_same_in_peft_and_plain_clip(
    base: BaseModel, folder: Path, tmp_path: Path
) -> None:
    spec = task_of_kind("image_text", NAMES)
    shapes = base.module_shapes("image_text")
    chosen = {name: shape for name, shape in shapes.items() if name.endswith(("q_proj", "fc1", "projection"))}
    assert {name.partition(".")[0] for name in chosen} == {
        "text_model",
        "vision_model",
        "text_projection",
        "visual_projection",
    }
    adapter = replace(random_adapter(1, 2, chosen, 0.5), head={})
    write_peft_folder(tmp_path / "adapter", adapter, str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path / "adapter")
    found = ours(base, adapted_model(base, adapter, spec))
    assert torch.allclose(found, as_transformers_says(model, folder, NAMES), atol=1e-5)
    assert not torch.allclose(found, ours(base, base.task_model(spec)), atol=0.1)


def test_the_loss_goes_both_ways() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    right = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    # Pictures 0 and 2 have label 0 and share its target; picture 1 alone has label 1.
    first = -(2 + 3) / 2 + math.log(math.exp(2) + math.exp(0) + math.exp(3))
    second = -1 + math.log(math.exp(0) + math.exp(1) + math.exp(0))
    expected = (sum(right) / 3 + (2 * first + second) / 3) / 2
    assert contrastive_loss(logits, torch.tensor([0, 1, 0])) == pytest.approx(expected, abs=1e-6)


def bright(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    shown = draw.integers(0, 100, (32, 20, 20), dtype=np.uint8)
    shown[::2, :10] += 120
    shown[1::2, 10:] += 120
    np.savez(tmp_path / "rows.npz", image=shown, label=np.arange(32) % 2)
    return tmp_path / "rows.npz"


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_each_tower_learns(base: BaseModel, tower: str, tmp_path: Path) -> None:
    layers = [name for name in base.module_shapes("image_text") if name.startswith(tower)]
    done, results = trained(
        base,
        bright(tmp_path),
        kind="image_text",
        data={"label_names": ("grass", "Paris")},
        training={"learning_rate": 1e-2, "max_steps": 60, "per_device_train_batch_size": 16},
        lora={"r": 8, "target_modules": layers},
        method={"name": "lora"},
    )
    assert done.base_score < 0.4 < 0.85 < done.local_score == done.metrics["accuracy"]
    assert len(results.per_row) == 32


def test_auto_keeps_a_small_part_of_what_it_trained(base: BaseModel, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    shown = draw.integers(0, 100, (160, 16, 16), dtype=np.uint8)
    shown[::2, :8] += 120
    shown[1::2, 8:] += 120
    np.savez(tmp_path / "rows.npz", image=shown, label=np.arange(160) % 2)
    done, _ = trained(
        base,
        tmp_path / "rows.npz",
        kind="image_text",
        data={"label_names": ("grass", "Paris")},
        training={"learning_rate": 1e-2, "max_steps": 60, "per_device_train_batch_size": 16},
        lora={"r": 4, "target_modules": TOWERS},
    )
    whole = 4 * sum(sum(s) for n, s in base.module_shapes("image_text").items() if n.endswith(TOWERS))
    assert done.base_score + 0.25 < done.local_score
    assert 0 < done.adapter_parameters < whole / 4


def test_a_label_that_nobody_was_trained_on_can_be_asked_for(base: BaseModel) -> None:
    shapes = {name: shape for name, shape in base.module_shapes().items() if "q_proj" in name}
    adapter = replace(random_adapter(2, 2, shapes), head={})
    rows = [ImageRow(picture, place % 4) for place, picture in enumerate(pictures(8))]
    score = score_adapter(base, adapter, rows, task_of_kind("image_text", (*NAMES, "green")))
    assert 0 <= score.value <= 1
    assert score.count == 8


def test_a_tower_of_another_kind_shares_the_layers(base: BaseModel) -> None:
    assert base.kinds == ("image_classification", "image_regression", "image_text")
    of_pictures, of_both = (base.module_shapes(kind) for kind in ("image_classification", "image_text"))
    assert of_pictures.items() <= of_both.items()
    assert all(name.startswith("vision_model.") for name in of_pictures)
    models = [base.task_model(task_of_kind(kind)) for kind in ("image_classification", "image_text")]
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    first, second = (model.get_parameter(name) for model in models)
    assert first.data_ptr() == second.data_ptr()


def test_a_checkpoint_of_one_tower_is_no_base_for_texts(folder: Path, tmp_path: Path) -> None:
    CLIPForImageClassification.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path)
    for file in folder.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert load_base_model(tiny_settings(str(tmp_path))).kinds == ("image_classification", "image_regression")


def named(*names: str, template: str = "a photo of a {}.") -> TaskSpec:
    spec = task_of_kind("image_text")
    return spec.model_copy(
        update={"data": spec.data.model_copy(update={"label_names": names, "prompt_template": template})}
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (named("grass", "x" * 40), "'x.*' has 5[0-9] tokens, and the base model 'tiny' reads 24"),
        (named("grass", "the grass", template="{} of the capital of France, which is Paris, a city."), "reads 24"),
        (named(), "names no labels"),
    ],
)
def test_what_the_text_tower_cannot_read_is_refused(base: BaseModel, spec: TaskSpec, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as raised:
        base.task_model(spec)
    assert raised.value.where == "data.label_names"


def test_labels_that_are_the_same_to_the_tokenizer_are_refused(tmp_path: Path) -> None:
    from tokenizers.normalizers import Lowercase

    tokenizer = AutoTokenizer.from_pretrained(save_clip(tmp_path))
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(tmp_path)
    base = load_base_model(tiny_settings(str(tmp_path)))
    with pytest.raises(InvalidInput, match="'Paris' and 'paris' are the same"):
        base.task_model(task_of_kind("image_text", ("Paris", "paris")))


def test_quantised_towers_are_refused_and_not_taken_for_whole_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.base_model.check_quantization", lambda *_: None)  # as on a machine with a GPU
    monkeypatch.setattr("workers.weights._quantization_options", lambda _: {})
    settings = tiny_settings(str(folder)).model_copy(update={"quantization": "nf4"})
    with pytest.raises(InvalidInput, match="a clip model is not read with nf4"):
        load_base_model(settings)


def test_in_bfloat16_similarities_are_not_rounded(folder: Path) -> None:
    settings = tiny_settings(str(folder)).model_copy(update={"dtype": "bfloat16"})
    half = load_base_model(settings)
    found = ours(half, half.task_model(task_of_kind("image_text", NAMES)))
    assert found.dtype == torch.float32
    expected = as_transformers_says(CLIPModel.from_pretrained(folder), folder, NAMES)
    assert (found - expected).abs().max() < 0.3
