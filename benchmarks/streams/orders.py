"""Which real tasks come in which order, with their rows. Reads the folder of sets that `--data` names: of texts, or of
pictures (`benchmarks/picture_sets.py`)."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import picture_sets
from benchmarks.picture_models import CLIP, VIT
from benchmarks.real_adapters import read, text_task
from benchmarks.real_streams import Case
from benchmarks.streams.kept import Made
from configs.task_spec import DataSpec, Kind, LoraSpec, Metric, TaskSpec, TrainingSpec

TEN = ("trec6", "cola", "sst2", "stsb", "mrpc", "banking77", "ag_news", "qnli", "mnli", "rte")
SUPERNI = (
    "task363_sst2_polarity_classification",
    "task1687_sentiment140_classification",
    "task591_sciq_answer_generation",
    "task1510_evalution_relation_extraction",
    "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task1729_personachat_generate_next",
    "task1572_samsum_summary",
)
PICTURES = ("greek", "digits-second", "cifar-second", "balinese", "digits-first", "aramaic", "cifar-first")
"""Groups of `picture_sets.py`. Of two of them, far from the first, the pretrained models know the classes: there is
something that the tasks before them can spoil."""
ORDERS: Mapping[str, tuple[str, ...]] = {
    "ten": TEN,
    "glue": ("cola", "mrpc", "rte", "stsb", "qnli", "sst2"),
    "four": ("rte", "mrpc", "cola", "sst2"),
    "superni": SUPERNI,
    "superni-3": SUPERNI[:3],
    "images": PICTURES,
    "image-text": PICTURES,
    **{f"random-{seed}": tuple(random.Random(seed).sample(TEN, len(TEN))) for seed in (1, 2, 3)},
}
"""`glue` is the order of Share's Table 1 (arXiv:2602.06043), `four` that of arXiv:2603.27707."""
GRIDS: Mapping[str, tuple[str, ...]] = {
    "minilm": ("trec6", "sst2", "stsb"),
    "smollm2": SUPERNI[:1],
    VIT: ("greek", "cifar-second", "balinese"),
    CLIP: ("greek", "cifar-second", "balinese"),
}
"""Base model to the tasks by which learning rates are chosen: of each kind one that it learns fast; of those that see
two alphabets, since at a rate that suits digits and photos trainings on many classes collapsed."""
METRICS: Mapping[str, Metric] = {"cola": "matthews_correlation", "stsb": "pearson"}
"""The field's own, where it is not accuracy."""
PICTURE_KINDS: Mapping[str, Kind] = {VIT: "image_classification", CLIP: "image_text"}
"""Kind of task, by base model."""
ATTENTION_AND_MLP: Mapping[str, tuple[str, ...]] = {
    VIT: ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    CLIP: ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
"""Layers that take a LoRA, by base model that sees; of a CLIP those of both towers."""
ANSWER: Mapping[str, int] = {"exact_match": 12, "rouge_l": 32}
"""Longest answer in tokens, by metric."""


@dataclass(frozen=True)
class Length:
    """How long each task is trained, and how much of it is read."""

    steps: int = 60
    train_rows: int = 1200
    test_rows: int = 200
    max_length: int = 32
    rows_per_step: int = 16


LENGTHS: Mapping[str, Length] = {
    "minilm": Length(),
    "smollm2": Length(steps=20, train_rows=160, test_rows=20, max_length=128, rows_per_step=4),
    VIT: Length(train_rows=600, test_rows=400, rows_per_step=32),
    CLIP: Length(steps=100, train_rows=600, test_rows=400, rows_per_step=32),
}


def base_of(order: str) -> str:
    """Name of the base model that learns a stream."""
    named = {"images": VIT, "image-text": CLIP}
    return named.get(order, "smollm2" if order.startswith("superni") else "minilm")


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they come."""

    name: str
    cases: tuple[Case, ...]
    at_once: int = 1
    """Tasks of one merge."""
    loras: Mapping[str, Made] = field(default_factory=dict)
    """Task to its LoRA, where adapters come and no rows."""

    @property
    def counts(self) -> tuple[int, ...]:
        """How many tasks are there after each merge."""
        return (*range(self.at_once, len(self.cases), self.at_once), len(self.cases))


def of_order(data: Path, order: str, seed: int, length: Length) -> Stream:
    """A stream of `ORDERS`."""
    return stream(data, order, base_of(order), ORDERS[order], seed, length)


def stream(data: Path, name: str, of: str, tasks: Sequence[str], seed: int, length: Length) -> Stream:
    """Some sets of a folder, in this order, each learnt with this seed by one base model."""
    case = functools.partial(_picture_case, of) if of in PICTURE_KINDS else _text_case
    return Stream(name, tuple(case(data, task, seed, length) for task in tasks))


def _text_case(data: Path, name: str, seed: int, length: Length) -> Case:
    """A text set with its first rows. The learning rate is still to be set."""
    meta, file = data / name / "meta.json", data / name / "train.jsonl.gz"
    if not meta.is_file():
        raise SystemExit(f"{data} has no folder {name} with meta.json: name the folder of the sets")
    known = json.loads(meta.read_text())
    spec = chat_task(known, file) if known["kind"] == "causal_lm" else text_task(known, file)
    training = _training(seed, length)
    of_data = spec.data.model_copy(update={"max_length": length.max_length})
    spec = spec.model_copy(update={"training": training, "data": of_data, "metric": METRICS.get(name, spec.metric)})
    train, test = spec.data.train_file, spec.data.eval_file
    return Case(spec, read(spec, train, length.train_rows), read(spec, test, length.test_rows))


def _picture_case(of: str, data: Path, name: str, seed: int, length: Length) -> Case:
    """A group of pictures with its first rows, which no pretraining has seen."""
    group = picture_sets.GROUPS[name]
    file = str(data / f"{group.file}.npz")
    # Which of the file's pictures are trained on and which are scored is in the rows, not in the name.
    of_data = DataSpec(
        train_file=file,
        eval_fraction=0.5,
        label_names=picture_sets.label_names(data, name),
        prompt_template=group.prompt,
    )
    lora = LoraSpec(r=8, lora_alpha=16, target_modules=ATTENTION_AND_MLP[of])
    spec = TaskSpec(
        team="bench",
        name=name,
        base_model=of,
        kind=PICTURE_KINDS[of],
        data=of_data,
        training=_training(seed, length),
        lora=lora,
    )
    train = picture_sets.rows(data, name, "train", length.train_rows)
    return Case(spec, train, picture_sets.rows(data, name, "test", length.test_rows))


def _training(seed: int, length: Length) -> TrainingSpec:
    return TrainingSpec(
        max_steps=length.steps, per_device_train_batch_size=length.rows_per_step, warmup_steps=0.1, seed=seed
    )


def chat_task(meta: Mapping[str, Any], file: Path) -> TaskSpec:
    """A task whose rows are conversations."""
    return TaskSpec(
        team="bench",
        name=meta["name"].partition("_")[0],
        base_model="smollm2",
        kind="causal_lm",
        metric=meta["metric"],
        data=DataSpec(
            train_file=str(file),
            eval_file=str(file.with_name("test.jsonl.gz")),
            messages_column="messages",
            max_new_tokens=ANSWER[meta["metric"]],
        ),
        lora=LoraSpec(r=8, lora_alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    )
