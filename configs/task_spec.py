"""A team's task file: what data, what score, how to train, as the field names these things.

`training` uses the names of transformers.TrainingArguments, `lora` those of peft.LoraConfig. A task file holds
values only: no code, no pickles, no dataset scripts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.document import NAME_PATTERN, Section, check_document, read_yaml
from configs.errors import InvalidInput

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Metric = Literal["accuracy", "f1_macro", "matthews_correlation"]


class DataSpec(Section):
    """Labelled examples as JSON lines; both files are copied and frozen at submission."""

    train_file: str | None = None
    """Training rows (.jsonl or .jsonl.gz), relative to the task file. Read once; gone when the task is trained."""
    eval_file: str | None = None
    """Evaluation rows, kept while the task lives: every later version is scored on exactly these rows."""
    text_column: str = "text"
    """Key of the text in each row."""
    text_pair_column: str | None = None
    """Key of the second text for pair classification."""
    label_column: str = "label"
    """Key of the label in each row."""
    label_names: tuple[str, ...] = ()
    """The label set, in the order of the classifier's outputs. Rows may hold the name or its index."""
    max_length: int = Field(128, ge=4, le=8192)
    """Longest input in tokens; longer rows are cut."""


class TrainingSpec(Section):
    """How to train; the names and defaults are those of transformers.TrainingArguments unless said otherwise."""

    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate. Default for LoRA, not the library's 5e-5 for full fine-tuning."""
    num_train_epochs: float = Field(3.0, gt=0, le=1000)
    max_steps: int = Field(-1, ge=-1)
    """Overrides num_train_epochs when positive."""
    per_device_train_batch_size: int = Field(16, ge=1, le=4096)
    gradient_accumulation_steps: int = Field(1, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps, as in transformers 5."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: float = Field(1.0, ge=0)
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(42, ge=0, lt=2**32)
    bf16: bool = False
    gradient_checkpointing: bool = False
    deepspeed: dict[str, Any] | None = None
    """A DeepSpeed configuration, or in a task file the path of its JSON file; passed through untouched with its
    `auto` values (see configs/deepspeed/)."""


class LoraSpec(Section):
    """The adapter; the names are those of peft.LoraConfig."""

    r: int = Field(8, ge=1, le=256)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    target_modules: tuple[str, ...] = Field(("query", "value"), min_length=1)


class MethodSpec(Section):
    """How the adapter comes about."""

    name: Literal["lora", "import"] = "lora"
    """`lora` trains a PEFT LoRA; `import` takes the PEFT folder in `adapter` as it is."""
    adapter: str | None = None
    """Folder with adapter_config.json and adapter_model.safetensors, for `import`."""


class GateSpec(Section):
    """When a merged version may not be published because of this task; tighter than the platform's gate only."""

    min_score: float | None = None
    """The task's own score right after its merge must reach this."""


class TaskSpec(Section):
    """One task file."""

    team: Name
    name: Name
    base_model: str
    """Name of the base model in the settings of the service."""
    kind: Literal["sequence_classification"] = "sequence_classification"
    metric: Metric = "accuracy"
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    lora: LoraSpec = LoraSpec()
    method: MethodSpec = MethodSpec()
    gate: GateSpec = GateSpec()
    priority: int = Field(0, ge=-100, le=100)
    """Higher goes first inside the team; between teams fair share decides."""
    client_key: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Submitting again with the same key is the same task. Default: a digest of this document and its data."""

    @model_validator(mode="after")
    def _parts_fit(self) -> TaskSpec:
        if self.method.name == "import":
            if not self.method.adapter:
                raise ValueError("method.name 'import' needs method.adapter, the PEFT folder")
            if self.data.eval_file and len(self.data.label_names) < 2:
                raise ValueError("data.eval_file of an import needs data.label_names, in the order of the outputs")
        elif not self.data.train_file or not self.data.eval_file:
            raise ValueError(f"method.name '{self.method.name}' needs data.train_file and data.eval_file")
        elif len(self.data.label_names) < 2:
            raise ValueError("data.label_names must list at least two labels")
        if len(set(self.data.label_names)) != len(self.data.label_names):
            raise ValueError("data.label_names has duplicates")
        return self


def read_task_spec(path: Path) -> TaskSpec:
    """Read a task file and make its paths absolute, relative to the file's own folder.

    Raises:
        InvalidInput: See `configs.document.read_document`.
    """
    folder = path.resolve().parent
    values = read_yaml(path)
    training = values.get("training") if isinstance(values, dict) else None
    if isinstance(training, dict) and isinstance(training.get("deepspeed"), str):
        training["deepspeed"] = _read_json(folder / training["deepspeed"])
    spec = check_document(values, TaskSpec, str(path))
    data = {
        key: str((folder / value).resolve())
        for key in ("train_file", "eval_file")
        if (value := getattr(spec.data, key))
    }
    method = {"adapter": str((folder / spec.method.adapter).resolve())} if spec.method.adapter else {}
    return spec.model_copy(
        update={"data": spec.data.model_copy(update=data), "method": spec.method.model_copy(update=method)}
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {path}: {error}", "training.deepspeed", "name a JSON file") from error
