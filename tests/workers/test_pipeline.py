"""A pipeline of diffusers as a base model: only layers and their shapes are read, and nothing answers by it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings, StorageSettings
from configs.task_spec import TaskSpec
from tests.stable_diffusion import save_pipeline, text_layers, unet_layers
from workers.base_model import Pipeline, load_base_model
from workers.pipeline_folder import weight_files
from workers.weights import weights_digest
from workers.worker import Worker


def settings_of(folder: Path, **changes: str) -> BaseModelSettings:
    values = {"name": "sd15", "source": str(folder), "weights_sha256": weights_digest(folder)}
    return BaseModelSettings.model_validate(values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_pipeline(tmp_path / "sd15"))


def test_each_layer_of_the_parts_that_take_a_lora_is_known_by_diffusers_name_for_it(folder: Path) -> None:
    base = load_base_model(settings_of(folder))
    assert isinstance(base, Pipeline)
    ours = base.module_shapes("text_to_image")
    wanted = {f"unet.{name}": shape for name, shape in unet_layers().items()}
    wanted |= {f"text_encoder.{name}": shape for name, shape in text_layers().items()}
    assert ours == wanted  # and nothing of the vae
    assert len(unet_layers()) == 128
    assert (base.kinds, base.tokenizer, base.is_quantized) == (("text_to_image",), None, False)


def test_shards_and_layers_that_are_no_matrices(folder: Path) -> None:
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    shards = {"conv_in": torch.zeros(4, 4, 3, 3), "proj": torch.zeros(3, 5), "norm": torch.zeros(4)}
    for name, tensor in shards.items():
        save_file({f"{name}.weight": tensor, f"{name}.bias": torch.zeros(4)}, unet / f"{name}.safetensors")
    index = {"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in shards}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    shapes = load_base_model(settings_of(folder)).module_shapes()
    assert {name: shape for name, shape in shapes.items() if name.startswith("unet.")} == {"unet.proj": (3, 5)}


def test_the_digest_is_of_all_weights_that_take_a_lora(folder: Path) -> None:
    files = weight_files(folder)
    assert [*files] == ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    each = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values())
    before = weights_digest(folder)
    assert before == hashlib.sha256(each.encode()).hexdigest()
    for file in files.values():
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"\x01")
        after = weights_digest(folder)
        assert after != before
        before = after


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("no part", "has no part that takes a LoRA"),
        ("a part is missing", "has no text_encoder, which model_index.json names"),
        ("a variant", "has only diffusion_pytorch_model.fp16.safetensors"),
        ("a shard is missing", "has no weights"),
        ("half a file", "cannot be read"),
        ("half an index", "cannot be read"),
    ],
)
def test_a_pipeline_that_is_not_whole_is_refused(folder: Path, broken: str, told: str) -> None:
    unet, weights = folder / "unet", folder / "unet/diffusion_pytorch_model.safetensors"
    if broken == "no part":
        (folder / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    elif broken == "a part is missing":
        (folder / "text_encoder").rename(folder / "elsewhere")
    elif broken == "a variant":
        weights.rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    elif broken == "a shard is missing":
        weights.unlink()
        index = {"weight_map": {"a.weight": "a.safetensors"}}
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    elif broken == "half a file":
        os.truncate(weights, 400)
    else:
        (folder / "model_index.json").write_text('{"unet": [')
    with pytest.raises(InvalidInput, match=told):
        load_base_model(settings_of(folder))


def test_a_part_that_a_pipeline_does_without_is_not_missed(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    assert [name.partition("/")[0] for name in weight_files(folder)] == ["text_encoder", "unet"]


def test_it_is_not_quantised_and_nothing_is_trained_or_answered_by_it(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="no weights are held"):
        Pipeline(settings_of(folder, quantization="nf4"), {}, ())
    base = load_base_model(settings_of(folder))
    document = {"team": "art", "name": "style", "base_model": "sd15", "kind": "text_to_image", "data": {}}
    spec = TaskSpec.model_validate(document | {"method": {"name": "import", "adapter": "style.safetensors"}})
    with pytest.raises(InvalidInput, match="nothing is trained, scored or answered by 'sd15'"):
        base.task_model(spec)


@pytest.mark.parametrize("more", [{"method": {"name": "lora"}}, {"data": {"train_file": "a", "eval_file": "b"}}])
def test_a_task_for_it_is_imported_and_has_no_rows(more: dict[str, object]) -> None:
    document = {"team": "art", "name": "style", "base_model": "sd15", "kind": "text_to_image", "data": {}}
    document |= {"method": {"name": "import", "adapter": "style.safetensors"}}
    with pytest.raises(ValueError, match="neither trained nor scored here"):
        TaskSpec.model_validate(document | more)


def test_a_worker_is_ready_for_it_without_a_rehearsal(folder: Path, tmp_path: Path) -> None:
    worker = Worker(settings_of(folder), StorageSettings(url=f"file:{tmp_path}/store"), "sd15")
    layout = worker.warm()
    assert layout.kinds == ("text_to_image",)
    assert len(layout.module_shapes) == 128 + 48
    assert layout.tokenizer == b""
