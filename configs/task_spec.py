"""The schema of a task file: data, score and training, in the field's own terms.

`training` uses the names of transformers.TrainingArguments, `lora` those of peft.LoraConfig. A task file holds
values only: no code, no pickles, no dataset scripts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from configs.document import NAME_PATTERN, Name, Section, Title, check_document, read_json
from configs.errors import InvalidInput
from configs.limits import read_bytes
from configs.places import Located, located, real
from configs.yaml_file import read_yaml, yaml_of

Kind = Literal[
    "sequence_classification",
    "sequence_regression",
    "causal_lm",
    "image_classification",
    "image_regression",
    "image_text",
    "text_to_image",
]
Metric = Literal[
    "accuracy",
    "f1_macro",
    "matthews_correlation",
    "probability",
    "probability_macro",
    "pearson",
    "spearman",
    "pck",
    "neg_mean_absolute_error",
    "log_likelihood",
    "exact_match",
    "rouge_l",
    "none",
]
_CLASSIFICATION: tuple[Metric, ...] = (
    "accuracy",
    "f1_macro",
    "matthews_correlation",
    "probability",
    "probability_macro",
)
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "sequence_classification": _CLASSIFICATION,
    "sequence_regression": ("pearson", "spearman"),
    "causal_lm": ("log_likelihood", "exact_match", "rouge_l"),
    "image_classification": _CLASSIFICATION,
    "image_regression": ("neg_mean_absolute_error", "pck"),
    "image_text": _CLASSIFICATION,
    "text_to_image": ("none",),
}
"""Metrics of each kind of task, the default first. For all of them a larger value is better. `none` is that of tasks
that nothing here can score."""
SCORE_MAX: dict[Metric, float] = dict.fromkeys(get_args(Metric), 1.0) | {
    "log_likelihood": 0.0,
    "neg_mean_absolute_error": 0.0,
}
"""The score that cannot be surpassed, by metric."""
CLASSIFICATION_KINDS: tuple[Kind, ...] = ("sequence_classification", "image_classification", "image_text")
REGRESSION_KINDS: tuple[Kind, ...] = ("sequence_regression", "image_regression")
IMAGE_KINDS: tuple[Kind, ...] = ("image_classification", "image_regression", "image_text")
HEADLESS_KINDS: tuple[Kind, ...] = ("causal_lm", "image_text")
"""Kinds whose answers come from the checkpoint's own layers: their tasks have an update and nothing else."""
BROUGHT_KINDS: tuple[Kind, ...] = ("text_to_image",)
"""Kinds whose tasks are only imported: nothing here trains them, scores them or answers by them."""
_WRITES_FILES = re.compile("(_path|_file|_dir)$|^(tensorboard|csv_monitor|wandb|comet|autotuning|nebula)$")
"""Keys of DeepSpeed that make it write files, most of them at a place that the task chooses."""


def _written_out(moment: Any) -> Any:
    """Refuse numbers, which would be read as seconds since 1970: 20261201 as a day of that year."""
    if isinstance(moment, int | float) or (isinstance(moment, str) and re.fullmatch(r"\s*[-+]?[\d._]+\s*", moment)):
        raise ValueError("has to be a moment like 2026-12-01T08:00:00+01:00, not a number")
    try:
        read = _DATETIME.validate_python(moment, strict=False)  # text, also where requests are read strictly
    except ValidationError:
        return moment  # the field's own type says what is wrong
    if read.tzinfo is None:
        raise ValueError("has no offset from UTC: write it as in 2026-12-01T08:00:00+01:00")
    return read


_DATETIME = TypeAdapter(datetime)
Moment = Annotated[AwareDatetime, BeforeValidator(_written_out)]
"""A moment with its offset from UTC."""


class DataSpec(Section):
    """Examples in files; they are copied and frozen at submission."""

    train_file: Annotated[str | None, Located(real)] = None
    """Training rows, relative to the task file: .jsonl, .csv or .tsv, each also .gz; .parquet; .npz (images); or a
    folder written by `datasets.Dataset.save_to_disk`. Frozen in one form, gone when the task is trained."""
    eval_file: Annotated[str | None, Located(real)] = None
    """Evaluation rows, kept while the task lives: every later version is scored on exactly these rows."""
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows, approximately, that is kept for evaluation and not trained on; instead of eval_file.
    A digest of each row without its label decides: so the choice stays the same when other rows are added, and equal
    rows are on the same side."""
    eval_is_train: bool = False
    """Permission to evaluate on the rows that were trained on. Without it such an eval_file is refused: the score would
    say how well the rows were memorised, and nothing about new ones."""
    text_column: str = "text"
    """Key, or column, of the text in each row. Other columns are not read."""
    text_pair_column: str | None = None
    """Key of the second text, for pairs."""
    label_column: str = "label"
    """Key of the label in each row: a name from label_names, or its index from 0 where no name is a number (see
    workers/rows/labels.py); for sequence_regression a number; for image_regression a list of numbers, one for each of
    label_names, or of points [x, y]."""
    prompt_column: str = "prompt"
    """Key of the prompt, the text that the model is given; for causal_lm."""
    completion_column: str = "completion"
    """Key of the completion, the text that the model should answer; for causal_lm. The loss is on it alone. Prompt and
    completion are joined as they are, without a chat template."""
    messages_column: str | None = None
    """Key of a list of messages {role, content}, for causal_lm, instead of prompt and completion. The tokenizer's chat
    template renders them; roles are system, user and assistant, and the last message, the assistant's, is the
    completion."""
    image_column: str = "image"
    """Key of the image, for kinds of images: H×W, H×W×1 or H×W×3 numbers from 0 to 255, or the bytes of an encoded
    picture, alone or as {bytes: …}. In an .npz, image_column and label_column are names of arrays."""
    label_names: tuple[str, ...] = ()
    """The label set, in the order of the classifier's outputs. Names that are numbers are written in quotes; numbers in
    the rows then mean these names, in every format alike. For image_regression the names of a label's numbers, in their
    order: nose_x, nose_y, …"""
    prompt_template: str = "a photo of a {}."
    """Text that stands for a label, its name in the place of {}; for image_text. A picture is given the label whose
    text is most like it."""
    pck_distance: float = Field(0.1, gt=0)
    """For pck: how far from its true place a point may be said to be, in the unit of the labels. The default is a tenth
    of the picture's side where labels are shares of it."""
    max_length: int = Field(128, ge=4, le=131072)
    """Longest input in tokens; longer rows are cut."""
    max_new_tokens: int = Field(64, ge=1, le=4096)
    """Longest answer, in tokens, that a causal_lm may generate: for exact_match and rouge_l, and when it is
    asked to answer and nobody says how long."""

    @field_validator("prompt_template")
    @classmethod
    def _has_one_place(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("needs {} once, in the place of a label's name: a photo of a {}.")
        return template


class TrainingSpec(Section):
    """How to train; the names and defaults are those of transformers.TrainingArguments unless said otherwise."""

    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate. The default suits LoRA; the library's 5e-5 is meant for full fine-tuning."""
    num_train_epochs: float = Field(3.0, gt=0, le=1000)
    max_steps: int = Field(-1, ge=-1)
    """Number of steps; if positive, it is used instead of num_train_epochs."""
    per_device_train_batch_size: int = Field(16, ge=1, le=4096)
    """Rows per rank and micro-batch. All ranks and gradient_accumulation_steps together are one step."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=65536)
    auto_find_batch_size: bool = False
    """Whether to halve the micro-batch and double the accumulation when memory runs out; a step then sees the same
    rows."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps, as in transformers 5."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = Field(1.0, ge=0)
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(42, ge=0, lt=2**32)
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: float = Field(500, gt=0)
    """Number of steps between two checkpoints; below 1 it is a share of all steps."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed configuration, or in a task file the path of its JSON file; passed on unchanged, with its `auto` values
    (see configs/deepspeed/). Offloading goes to the CPU: no key may name a place for files."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_stays_in_memory(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config is not None:
            zero = config.get("zero_optimization")
            if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
                raise ValueError("needs zero_optimization with a stage from 0 to 3")
            if writing := next((key for key in _keys(config) if _WRITES_FILES.search(key)), None):
                raise ValueError(f"'{writing}' would write files on the workers; leave it out")
        return config

    def rows_per_step(self, ranks: int) -> int:
        """Rows that all ranks together take in one step; every step is full."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks

    def steps(self, row_count: int, ranks: int) -> int:
        """`max_steps`, or as many steps as `num_train_epochs` epochs take, rounded up; at least one."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * row_count / self.rows_per_step(ranks)))


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for; 0 without one."""
    return int(((config or {}).get("zero_optimization") or {}).get("stage", 0))


def _keys(value: Any) -> Iterator[str]:
    """All keys of a JSON document, inner ones too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


ALL_LINEAR = "all-linear"


class LoraSpec(Section):
    """The adapter; the names are those of peft.LoraConfig."""

    r: int = Field(8, ge=1, le=256)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    target_modules: tuple[str, ...] = Field(("query", "value"), min_length=1)
    """Names of linear layers, whole or their ends; or [all-linear], PEFT's name of all of them but the head's."""

    def alpha_of(self, rank: int) -> float:
        """The lora_alpha with which a layer of another rank has this one's scale."""
        share = rank / self.r
        return self.lora_alpha * (math.sqrt(share) if self.use_rslora else share)


class MethodSpec(Section):
    """How the adapter is made."""

    name: Literal["lora", "share", "codyra", "auto", "import"] = "auto"
    """Method: `lora` trains a PEFT LoRA; `share` coefficients in frozen directions; `codyra` a LoRA with gates that
    choose the rank of each module; `auto` trains the task with each of `candidates` and keeps the fewest numbers that
    its score needs; `import` takes the adapter in `adapter` as it is."""
    candidates: tuple[Literal["share", "lora", "codyra"], ...] = Field(("share", "lora"), min_length=1)
    """Methods that `auto` trains the task with, each to its end. With one of them it only finds the size."""
    loss_max: float = Field(0.005, ge=0)
    """Largest loss that `auto` accepts for fewer numbers, with one standard error, on rows that are set aside for it: a
    loss of the right label's probability or of a correlation (in proportion less where that is below one half), of a
    token's log-likelihood, or a share of the mean error of several numbers."""
    adapter: Annotated[str | None, Located(real)] = None
    """Folder with adapter_config.json and adapter_model.safetensors, or a LoRA file of diffusers, for `import`."""
    start_of_a: Literal["random", "basis"] = "random"
    """Start of A, for `lora`. `basis`: inside the span of the subspace's basis, which merges with less error."""
    directions: Literal["learned", "foundation"] = "learned"
    """Directions in which `share` trains coefficients. `learned`: those of the subspace's basis, and temporary columns
    beside them; `foundation`: those that no task made, so that nothing moves them."""
    foundation: int = Field(64, ge=1, le=4096)
    """Number of the foundation's directions, per module and side. A task stores 2·foundation·lora.r numbers per module,
    where a LoRA has lora.r·(outputs + inputs)."""
    temporary_columns: int | None = Field(None, ge=0)
    """Number of trainable directions beside the basis, per module and side (φ), for `share` with learned directions; 0
    trains coefficients alone. Default: a quarter of the basis, at most lora.r; as a candidate of `auto` none."""
    kappa_max: float = Field(0.005, ge=0)
    """Threshold κ at the end of its ramp, for `codyra`; it is applied after every step."""
    dense_fraction: float = Field(0.5, ge=0, lt=1)
    """Share of the steps before the threshold is applied to gates, for `codyra`."""
    gate_start: Literal["ones", "normal"] = "ones"
    """Start of the gates, for `codyra`: 1, or as published from N(0, 1), which alone drops half of them."""
    refine_epochs: float = Field(0.0, ge=0, le=100)
    """Epochs for which the task's coefficients are trained once more after merging, on its own rows, the basis
    frozen."""
    share_full: bool = False
    """Whether the training rows are kept while the task lives, and its coefficients trained again, for refine_epochs,
    in every later version whose merge moved it: the paper's Share-full, which is not strict continual learning."""

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Settings that another method has and this one does not read; a value that is the default is none."""
        names = (self.name, *(self.candidates if self.name == "auto" else ()))
        read = {setting for name in names for setting in SETTINGS_OF[name]}
        others = {setting for settings in SETTINGS_OF.values() for setting in settings} - read
        return tuple(
            setting
            for setting, field in type(self).model_fields.items()
            if setting in others and getattr(self, setting) != field.get_default()
        )


SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "lora": ("start_of_a",),
    "share": ("directions", "foundation", "temporary_columns"),
    "codyra": ("kappa_max", "dense_fraction", "gate_start"),
    "auto": ("candidates", "loss_max"),
    "import": ("adapter",),
}
"""The settings that belong to each method; the others belong to all that train."""


class GateSpec(Section):
    """Rules of the task for the gate, in addition to those of the service."""

    min_score: float | None = None
    """Least score of the task right after its merge; below it the version is not published. No more than the metric can
    be: 1, for log_likelihood 0."""


def _first_metric(values: dict[str, Any]) -> Metric:
    """values: The fields before `metric`; without `kind` if that is wrong."""
    return METRICS[values["kind"]][0] if "kind" in values else _CLASSIFICATION[0]


class ResourceSpec(Section):
    """What a task needs of its workers, where it names no pool: it gets the smallest that has as much."""

    ranks: int = Field(1, ge=1, le=1024)
    """Fewest processes that train it together. The pool may have more: a step then takes more rows."""
    gpus: float = Field(0, ge=0, le=1)
    """Least share of a GPU for each of them; 1: a whole one."""


class TaskSpec(Section):
    """One task file."""

    team: Name
    name: Name
    base_model: str
    """Name of the base model in the settings of the service."""
    kind: Kind = "sequence_classification"
    metric: Metric = Field(default_factory=_first_metric)
    """Metric that the gate compares; the kind's other metrics are reported beside it. Default: the kind's first."""
    data: DataSpec
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    lora: LoraSpec = Field(default_factory=LoraSpec)
    method: MethodSpec = Field(default_factory=MethodSpec)
    gate: GateSpec = Field(default_factory=GateSpec)
    priority: int = Field(0, ge=-100, le=100)
    """Priority inside the team, higher first; between teams fair share decides."""
    pool: Name | None = None
    """Pool of workers that trains it. Default: the smallest that fits `resources`."""
    resources: ResourceSpec | None = None
    """What it needs, instead of `pool`. Default: any pool of its base model will do."""
    revises: bool = False
    """Whether these are new rows for the published task of this name: they make its next revision, which takes its
    place. Not given, a name that is taken is refused."""
    start: Literal["main", "base"] = "main"
    """From where a revision is trained: from what `main` serves of the task, or anew from the base model. The head goes
    on from the old one only with `main`."""
    after: tuple[Title, ...] = Field((), max_length=100)
    """Tasks, each `team/name`, that have to be published before this one starts; if one of them ends otherwise, this
    one is parked. They are submitted before it."""
    not_before: Moment | None = None
    """Moment before which it does not start, with its offset from UTC: 2026-12-01T08:00:00+01:00."""
    deadline: Moment | None = None
    """Moment by which it should be trained, with its offset from UTC. Nothing is given up for it: you are told when it
    cannot be met."""
    max_run_seconds: float | None = Field(None, gt=0)
    """Longest time, all attempts together, that workers may have it; then it is stopped and parked."""
    client_key: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Key of the submission: a second one with the same key is the same task. Default: a digest of document and
    data."""

    @field_validator("metric", mode="before")
    @classmethod
    def _metric_of_kind(cls, metric: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        if kind and isinstance(metric, str) and metric not in METRICS[kind]:
            raise ValueError(f"is none of kind '{kind}': {', '.join(METRICS[kind])}")
        return metric

    @model_validator(mode="after")
    def _is_text(self) -> TaskSpec:
        try:
            self.model_dump_json()
        except ValueError as error:  # YAML can write half of a character, and no database keeps it
            raise ValueError(f"holds what is no Unicode text: {error}; write characters, not surrogates") from error
        return self

    @model_validator(mode="after")
    def _one_pool(self) -> TaskSpec:
        if self.pool and self.resources:
            raise ValueError("pool and resources exclude each other: name the pool, or say what the task needs")
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> TaskSpec:
        if self.start != "main" and not self.revises:
            raise ValueError("start is about a revision of a published task: set revises: true, or leave it out")
        return self

    @model_validator(mode="after")
    def _times_fit(self) -> TaskSpec:
        if f"{self.team}/{self.name}" in self.after:
            raise ValueError("after names the task itself")
        if len(set(self.after)) != len(self.after):
            raise ValueError("after has duplicates")
        if self.not_before and self.deadline and self.deadline <= self.not_before:
            raise ValueError("deadline is not later than not_before")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> TaskSpec:
        data, method = self.data, self.method
        if self.kind in BROUGHT_KINDS and (method.name != "import" or data.eval_file):
            raise ValueError(
                f"kind '{self.kind}' is neither trained nor scored here: it takes method.name 'import', and no rows"
            )
        least_labels = {"image_regression": 1}.get(self.kind, 2 if self.kind in CLASSIFICATION_KINDS else 0)
        if data.eval_file and data.eval_fraction:
            raise ValueError("data.eval_file and data.eval_fraction exclude each other")
        if data.eval_is_train and not (data.train_file and data.eval_file):
            raise ValueError("data.eval_is_train is about data.train_file and data.eval_file: it needs both")
        if method.temporary_columns is not None and method.directions != "learned":
            raise ValueError(
                "method.temporary_columns are columns beside learned directions: set method.directions: learned"
            )
        if method.share_full and not method.refine_epochs:
            raise ValueError("method.share_full needs method.refine_epochs, how long to train each time")
        if method.name == "import":
            if not method.adapter:
                raise ValueError("method.name 'import' needs method.adapter, a PEFT folder or diffusers' file")
            if data.eval_fraction:
                raise ValueError("method.name 'import' has no training rows: data.eval_fraction has no meaning")
            if method.refine_epochs:
                raise ValueError("method.name 'import' has no training rows: method.refine_epochs has no meaning")
            if data.eval_file and len(data.label_names) < least_labels:
                raise ValueError("data.eval_file of an import needs data.label_names, in the order of the outputs")
        elif not data.train_file or not (data.eval_file or data.eval_fraction):
            raise ValueError(
                f"method.name '{method.name}' needs data.train_file and data.eval_file (or data.eval_fraction)"
            )
        elif len(data.label_names) < least_labels:
            is_one = least_labels == 1
            what = "name each number of a label, in their order" if is_one else "list at least two labels"
            raise ValueError(f"data.label_names must {what}")
        if not least_labels and data.label_names:
            raise ValueError(f"kind '{self.kind}' has no data.label_names")
        if self.metric == "pck" and len(data.label_names) % 2:
            raise ValueError(
                f"metric pck is about points, two numbers each, and data.label_names are {len(data.label_names)}: "
                "leave metric out, or name both numbers of each point"
            )
        if self.kind in REGRESSION_KINDS and self.training.label_smoothing_factor:
            raise ValueError(
                f"kind '{self.kind}' has no labels to smooth: training.label_smoothing_factor has no meaning"
            )
        if self.kind == "image_text" and self.training.label_smoothing_factor:
            raise ValueError(
                "kind 'image_text' compares both ways, which transformers' label smoothing does not do: "
                "training.label_smoothing_factor has no meaning"
            )
        if len(set(self.method.candidates)) != len(self.method.candidates):
            raise ValueError("method.candidates has duplicates")
        if len(set(data.label_names)) != len(data.label_names):
            raise ValueError("data.label_names has duplicates")
        return self


FILE_KEYS: Mapping[tuple[str, str], str] = {
    ("data", "train_file"): "train",
    ("data", "eval_file"): "eval",
    ("method", "adapter"): "adapter",
}
"""Keys that name what a task is made of, to the folder of an upload in which these files are."""


def read_task_spec(path: Path) -> TaskSpec:
    """Read a task file and make its paths absolute, relative to the file's own folder.

    Raises:
        InvalidInput: See `configs.document.read_document`.
    """
    folder = path.resolve().parent
    file = read_yaml(path)
    values = file.values
    training = values.get("training") if isinstance(values, dict) else None
    if isinstance(training, dict) and isinstance(training.get("deepspeed"), str):
        training["deepspeed"] = _read_json(Path(real(training["deepspeed"], folder)))
    return located(check_document(values, TaskSpec, str(path), file.words), folder)


def task_spec_of(content: bytes) -> TaskSpec:
    """What a task file says that lies on another machine: its paths stay as they are written.

    Raises:
        InvalidInput: As `read_task_spec`; or it names a file with settings of DeepSpeed, which is not here.
    """
    file = yaml_of(content, "the task file")
    training = file.values.get("training") if isinstance(file.values, dict) else None
    if isinstance(training, dict) and isinstance(training.get("deepspeed"), str):
        todo = "write what that file says into the task file, or submit it with `onebasis submit`"
        raise InvalidInput("names a file, which is not sent", "training.deepspeed", todo)
    return check_document(file.values, TaskSpec, "the task file", file.words)


def _read_json(path: Path) -> Any:
    try:
        return read_json(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}", "training.deepspeed", "name a JSON file") from error
