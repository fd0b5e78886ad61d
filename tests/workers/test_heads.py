"""Heads of many families: what the checkpoint has is kept, what the adapter brings is taken, nothing is made up.

The truth is what transformers makes of the checkpoint and PEFT of the adapter's folder, loaded by themselves.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, BertConfig

from configs.errors import InvalidInput
from configs.task_spec import Kind, TaskSpec
from subspace_store.adapter import Adapter, adapter_from_bytes, adapter_to_bytes
from subspace_store.formats.peft import read_peft_folder, write_peft_folder
from tests.workers.families import FAMILIES, Saved, logits, reloaded, save, trained_elsewhere
from tests.workers.method_builders import train_by_chance
from tests.workers.worker_builders import task_of_kind, tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.compatibility import with_full_names
from workers.evaluation import adapted_model
from workers.heads import check_head, doubtful_labels, told
from workers.methods import lora
from workers.training import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]
LABELS = ("l0", "l1", "l2")
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Without transformers' report of what a checkpoint lacks: these tests are about it."""
    caplog.set_level(logging.ERROR, logger="transformers")


@dataclass
class Case:
    """A checkpoint of a family, loaded as a base model."""

    family: str
    source: str
    folder: Path

    def __post_init__(self) -> None:
        self.base: BaseModel = load_base_model(tiny_settings(self.source))
        self.kind: Kind = "image_classification" if self.family == "vit" else "sequence_classification"

    def spec(self, labels: tuple[str, ...] = LABELS, **changes: Any) -> TaskSpec:
        lora_of = {"r": 2, "target_modules": FAMILIES[self.family].targets}
        return task_of_kind(self.kind, labels, **{"lora": lora_of, **changes})

    def imported(self, folder: Path, spec: TaskSpec) -> Adapter:
        """As the control plane takes a folder in and a worker gets it."""
        layout = self.base.heads[self.kind]
        read = read_peft_folder(folder, "tiny", self.base.sha256)
        named = with_full_names(read, self.base.module_shapes(), layout, str(folder))
        check_head(named, spec, layout)
        return adapter_from_bytes(adapter_to_bytes(named))

    def assert_as_peft_has_it(self, folder: Path, spec: TaskSpec) -> Adapter:
        """An adapter's logits are PEFT's own; and again after it went in, and out in our export."""
        count = len(spec.data.label_names)
        expected = logits(self.family, reloaded(self.family, self.source, count, folder))
        adapter = self.imported(folder, spec)
        assert torch.allclose(logits(self.family, adapted_model(self.base, adapter, spec)), expected, atol=1e-4)
        assert (expected - logits(self.family, adapted_model(self.base, adapter, spec, False))).abs().max() > 1e-2
        write_peft_folder(self.folder / "out", adapter, self.source)
        again = reloaded(self.family, self.source, count, self.folder / "out")
        assert torch.allclose(logits(self.family, again), expected, atol=1e-4)
        return adapter


def case(family: str, what: Saved, tmp_path: Path, **options: Any) -> Case:
    return Case(family, save(family, what, tmp_path / "model", **options), tmp_path)


# What an adapter's training elsewhere drew at random and did not save, by family and what its checkpoint was.
LOST = {
    ("bert", "language model"): "bert.pooler.dense",
    ("deberta", "language model"): "pooler.dense",
    ("deberta-v2", "language model"): "pooler.dense",
    ("deberta-v2", "backbone"): "pooler.dense",
    ("modernbert", "backbone"): "head.dense",
}
CHECKPOINTS: list[tuple[str, Saved]] = [
    *((family, "classifier") for family in FAMILIES),
    *((family, "language model") for family in FAMILIES if family != "vit"),  # type: ignore[list-item]
    ("vit", "backbone"),
    ("modernbert", "backbone"),
    ("deberta-v2", "backbone"),
]


@pytest.mark.parametrize(("family", "what"), CHECKPOINTS)
def test_an_adapter_from_elsewhere_has_the_logits_that_peft_gives_it_or_names_what_was_lost(
    family: str, what: Saved, tmp_path: Path
) -> None:
    made = case(family, what, tmp_path)
    folder = trained_elsewhere(family, made.source, 2, tmp_path / "in")
    if lost := LOST.get((family, what)):
        with pytest.raises(InvalidInput, match=f"head is not whole: .*{lost}") as caught:
            made.imported(folder, made.spec(("a", "b")))
        assert f"'{lost}'" in caught.value.todo
        parts = ["pooler"] if "pooler" in lost else ["head.dense", "head.norm"]
        folder = trained_elsewhere(family, made.source, 2, tmp_path / "whole", modules_to_save=parts)
    made.assert_as_peft_has_it(folder, made.spec(("a", "b")))


@pytest.mark.parametrize(("family", "what"), CHECKPOINTS)
def test_our_training_starts_from_the_heads_parts_in_the_checkpoint_and_its_export_needs_nothing_else(
    family: str, what: Saved, tmp_path: Path
) -> None:
    made = case(family, what, tmp_path, **NAMED)
    spec = made.spec()
    if what == "classifier":
        start = logits(family, made.base.task_model(spec, seed=5))
        assert torch.allclose(start, logits(family, reloaded(family, made.source, 3)), atol=1e-4)
    model = lora.prepare(made.base, spec)
    drawn = {
        name for name in made.base.heads[made.kind].missing if not name.startswith(made.base.head_modules(made.kind))
    }
    assert not drawn  # what the checkpoint lacks is trained
    train_by_chance(model)
    trained = logits(family, model)
    adapter = lora.finish(model, made.base, spec)
    assert torch.allclose(logits(family, adapted_model(made.base, adapter, spec)), trained, atol=1e-4)
    write_peft_folder(tmp_path / "out", adapter, made.source)
    assert torch.allclose(logits(family, reloaded(family, made.source, 3, tmp_path / "out")), trained, atol=1e-4)


@pytest.mark.parametrize("family", ["modernbert", "distilbert", "roberta", "bert"])
def test_an_output_layer_for_other_labels_is_drawn_anew_and_the_rest_of_the_head_is_kept(
    family: str, tmp_path: Path
) -> None:
    made = case(family, "classifier", tmp_path, **NAMED)
    model, theirs = made.base.task_model(made.spec(("x", "y"))), reloaded(family, made.source, 3)
    outputs = made.base.heads[made.kind].outputs
    kept = {name for name, _ in model.named_parameters()} - {*outputs}
    for name in kept:
        assert torch.equal(model.get_parameter(name), theirs.get_parameter(name)), name
    assert {model.get_parameter(name).shape[0] for name in outputs} == {2}
    others = made.base.task_model(made.spec(("x", "y", "z")))
    for name in (name for name in outputs if name.endswith("weight")):
        assert not torch.allclose(others.get_parameter(name), theirs.get_parameter(name))


def test_a_checkpoints_output_layer_is_sorted_by_the_tasks_labels(tmp_path: Path) -> None:
    made = case("bert", "classifier", tmp_path, **NAMED)
    theirs = logits("bert", reloaded("bert", made.source, 3))
    turned = logits("bert", made.base.task_model(made.spec(("l2", "l0", "l1"))))
    assert torch.allclose(turned, theirs[:, [2, 0, 1]], atol=1e-5)


def test_an_output_layer_whose_labels_nobody_named_is_kept_if_it_has_as_many(tmp_path: Path) -> None:
    made = case("bert", "classifier", tmp_path)
    theirs = logits("bert", reloaded("bert", made.source, 3))
    assert torch.allclose(logits("bert", made.base.task_model(made.spec(("x", "y", "z")))), theirs, atol=1e-5)


def test_what_labels_tokens_is_no_head_for_texts(tmp_path: Path) -> None:
    source = save("bert", "classifier", tmp_path / "model", **NAMED)
    config = BertConfig.from_pretrained(source)
    AutoModelForTokenClassification.from_config(config).save_pretrained(source)
    made = Case("bert", source, tmp_path)
    assert {"classifier.bias", "classifier.weight"} <= {*made.base.heads["sequence_classification"].missing}


def test_a_regressor_goes_on_from_a_regressor(tmp_path: Path) -> None:
    made = case("roberta", "classifier", tmp_path, labels=1)
    theirs = logits("roberta", reloaded("roberta", made.source, 1))
    mine = logits("roberta", made.base.task_model(task_of_kind("sequence_regression")))
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_log_says_what_of_a_head_is_drawn_and_what_is_the_checkpoints(tmp_path: Path) -> None:
    made = case("roberta", "classifier", tmp_path, **NAMED)
    layout = made.base.heads["sequence_classification"]
    assert told(layout, made.spec()) == "head: trained are classifier from the checkpoint"
    other = told(layout, made.spec(("x", "y")))
    assert other == "head: trained are classifier.out_proj drawn from the seed; classifier from the checkpoint"
    assert told(case("bert", "backbone", tmp_path / "other").base.heads["sequence_classification"], made.spec()) == (
        "head: trained are classifier drawn from the seed"
    )


# --- parts that an adapter may have of its own -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"modules_to_save": ["pooler"]}),
        ("bert", {"modules_to_save": ["bert.encoder.layer.1.output.LayerNorm"]}),
        ("roberta", {"task_type": None, "modules_to_save": ["classifier.out_proj"]}),
        ("distilbert", {"task_type": None, "modules_to_save": ["pre_classifier"]}),
        ("modernbert", {"task_type": None, "modules_to_save": ["classifier", "head.norm"]}),
        ("modernbert", {"target_modules": "all-linear"}),
        ("modernbert", {"target_modules": ["dense", "Wo"]}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("bert", {"task_type": None}),
        ("gpt2", {"task_type": None}),
        ("distilbert", {"task_type": "FEATURE_EXTRACTION"}),
        ("vit", {"task_type": None, "modules_to_save": None}),
    ],
)
def test_any_part_of_a_model_that_an_adapter_brings_is_its_own_and_all_others_are_the_checkpoints(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = case(family, "classifier", tmp_path)
    folder = trained_elsewhere(family, made.source, 3, tmp_path / "in", **options)
    before = logits(family, made.base.task_model(made.spec()))
    adapter = made.assert_as_peft_has_it(folder, made.spec())
    assert torch.equal(logits(family, made.base.task_model(made.spec())), before)  # all tasks' layers stay as they are
    served = lora.model_with_lora(made.base, made.spec(), tuple(adapter.modules), adapter)  # as a refinement starts
    without = logits(family, adapted_model(made.base, adapter, made.spec(), with_update=False))
    assert torch.allclose(logits(family, served), without, atol=1e-4)
    if adapter.head:
        train_by_chance(served)
        refined = lora.finish(served, made.base, made.spec())
        assert adapter.head.keys() <= refined.head.keys()
        assert torch.allclose(
            logits(family, adapted_model(made.base, refined, made.spec())), logits(family, served), atol=1e-4
        )


def test_an_adapter_of_the_bare_backbone_brings_its_pooler_under_the_full_name(tmp_path: Path) -> None:
    made = case("bert", "classifier", tmp_path)
    folder = trained_elsewhere("bert", made.source, 3, tmp_path / "in", modules_to_save=["pooler"])
    file = folder / "adapter_model.safetensors"
    bare = {name.replace("model.bert.", "model."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file)
    assert "bert.pooler.dense.weight" in made.imported(folder, made.spec()).head


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("family", "what"), [("modernbert", "language model"), ("modernbert", "backbone")])
def test_a_head_of_32_bits_fits_between_parts_of_16(family: str, what: Saved, dtype: str, tmp_path: Path) -> None:
    source = save(family, what, tmp_path / "model")
    base = load_base_model(tiny_settings(source).model_copy(update={"dtype": dtype}))
    spec = task_of_kind("sequence_classification", LABELS, lora={"r": 2, "target_modules": ("Wo",)})
    model = lora.prepare(base, spec)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(family, model).dtype == torch.float32
    adapter = lora.finish(model, base, spec)
    assert torch.isfinite(logits(family, adapted_model(base, adapter, spec))).all()


# --- labels --------------------------------------------------------------------------------------------------------


def test_another_number_of_outputs_than_labels_is_refused_with_both(tmp_path: Path) -> None:
    made = case("bert", "backbone", tmp_path)
    folder = trained_elsewhere("bert", made.source, 3, tmp_path / "in")
    with pytest.raises(InvalidInput, match=r"shape \(3(, 16)?,?\); for 2 outputs the base model needs \(2") as caught:
        made.imported(folder, made.spec(("a", "b")))
    assert "data.label_names must list the labels" in caught.value.todo
    with pytest.raises(InvalidInput, match="for 1 outputs"):
        made.imported(folder, task_of_kind("sequence_regression"))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_that_are_not_the_tasks_labels_are_refused_whatever_the_family_and_whoever_names_them(
    family: str, tmp_path: Path
) -> None:
    made = case(family, "classifier", tmp_path, **NAMED)
    folder = trained_elsewhere(family, made.source, 3, tmp_path / "in")
    turned, others = LABELS[::-1], ("a", "b", "c")

    def doubts(labels: tuple[str, ...]) -> str:
        spec = made.spec(labels)
        return doubtful_labels(made.imported(folder, spec), spec, made.base.heads[made.kind])

    with pytest.raises(InvalidInput, match=r"for 2 outputs the base model needs \(2"):
        doubts(LABELS[:2])
    assert doubts(LABELS) == ""
    with pytest.raises(InvalidInput, match=r"config.json names the outputs \['l0', 'l1', 'l2'\], and data.*\['l2'"):
        doubts(turned)
    assert "output layer is taken to be for data.label_names" in doubts(others)

    names = json.dumps({"id2label": dict(enumerate(turned))})
    (folder / "config.json").write_text(names)  # as some programs save the model's own beside the adapter
    assert doubts(turned) == ""
    for labels in (LABELS, others):
        with pytest.raises(InvalidInput, match=r"the adapter's outputs are \['l2', 'l1', 'l0'\]; data.label_names are"):
            doubts(labels)
    (folder / "config.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | json.loads(names)))
    assert doubts(turned) == ""
    with pytest.raises(InvalidInput, match=r"the adapter's outputs are \['l2', 'l1', 'l0'\]; data.label_names are"):
        doubts(LABELS)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    with pytest.raises(InvalidInput, match=r"in two ways: adapter_config.json \['l2', .* and config.json \['l0', "):
        doubts(LABELS)


@pytest.mark.parametrize("labels", [("l1", "l0", "l2"), ("a", "b", "c"), ("l0", "l1")])
def test_an_adapter_that_uses_the_checkpoints_outputs_has_the_checkpoints_labels(
    labels: tuple[str, ...], tmp_path: Path
) -> None:
    made = case("bert", "classifier", tmp_path, **NAMED)
    folder = trained_elsewhere("bert", made.source, 3, tmp_path / "in", task_type=None)
    made.imported(folder, made.spec())
    with pytest.raises(InvalidInput, match=r"the checkpoint's outputs are \['l0', 'l1', 'l2'\]"):
        made.imported(folder, made.spec(labels))


def test_our_own_export_names_its_outputs_and_is_refused_under_other_names(tmp_path: Path) -> None:
    made = case("bert", "backbone", tmp_path)
    model = lora.prepare(made.base, made.spec())
    write_peft_folder(tmp_path / "out", lora.finish(model, made.base, made.spec()), made.source)
    assert json.loads(made.imported(tmp_path / "out", made.spec()).info["label_names"]) == list(LABELS)
    with pytest.raises(InvalidInput, match=r"the adapter's outputs are \['l0', 'l1', 'l2'\]; data.label_names are"):
        made.imported(tmp_path / "out", made.spec(("l2", "l1", "l0")))


def test_an_import_that_is_not_scored_needs_no_label_names_but_a_whole_head(tmp_path: Path) -> None:
    made = case("bert", "language model", tmp_path)
    values = {"name": "import", "adapter": "-"}
    spec = TaskSpec.model_validate({"team": "t", "name": "n", "base_model": "tiny", "data": {}, "method": values})
    layout = made.base.heads["sequence_classification"]
    whole = trained_elsewhere("bert", made.source, 3, tmp_path / "whole", modules_to_save=["pooler"])
    adapter = made.imported(whole, spec)
    assert METHODS["import"].finish(adapter, made.base, spec).head.keys() == adapter.head.keys()
    part = read_peft_folder(trained_elsewhere("bert", made.source, 3, tmp_path / "part"), "tiny", "")
    with pytest.raises(InvalidInput, match="head is not whole"):
        check_head(part, spec, layout, is_scored=False)
    check_head(Adapter("tiny", "", part.modules), spec, layout, is_scored=False)  # a LoRA and nothing else


# --- checkpoints that cannot be used -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["encoder.layer.1.", "embeddings.word_embeddings.", "encoder.layer.0.output.dense.b"])
def test_a_checkpoint_that_lacks_a_layer_is_refused_and_nothing_is_drawn_in_its_place(
    part: str, tmp_path: Path
) -> None:
    source = save("bert", "backbone", tmp_path / "model")
    file = Path(source, "model.safetensors")
    left = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(part)}
    save_file(left, file, {"format": "pt"})
    with pytest.raises(InvalidInput, match=f"weights lack .*bert.{part}"):
        load_base_model(tiny_settings(source))


@pytest.mark.parametrize(("family", "usable"), [("roberta", 63), ("mpnet", 62), ("bert", 64), ("electra", 64)])
def test_positions_that_padding_takes_cannot_be_used(family: str, usable: int, tmp_path: Path) -> None:
    made = case(family, "backbone", tmp_path)
    assert made.base.length_max == usable
    model = made.base.task_model(made.spec())
    ids = torch.full((1, usable), 30)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    longer = torch.full((1, usable + 1), 30)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_positions_are_counted_from_the_checkpoints_padding_token_whatever_the_tokenizer_pads_with(
    tmp_path: Path,
) -> None:
    made = case("roberta", "classifier", tmp_path, pad_token_id=4)
    assert made.base.length_max == 59
    theirs = reloaded("roberta", made.source, 3)
    theirs.config.pad_token_id = 4
    assert torch.allclose(logits("roberta", made.base.task_model(made.spec())), logits("roberta", theirs), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_padding_token_that_the_model_has_no_row_for_is_refused_when_it_is_loaded(
    family: str, tmp_path: Path
) -> None:
    source = save(family, "backbone", tmp_path / "model")
    path = Path(source, "tokenizer.json")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<more{number}>" for number in range(80)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(source)
    assert path.is_file()
    with pytest.raises(InvalidInput, match=r"padding token '<padding>' has the number \d+, and .* have 320 rows") as e:
        load_base_model(tiny_settings(source))
    assert "resize_token_embeddings" in e.value.todo


def test_a_tokenizer_that_cannot_pad_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = save("llama", "backbone", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(source)
    with pytest.raises(InvalidInput, match="neither a padding token nor an end token"):
        load_base_model(tiny_settings(source))
