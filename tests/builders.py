"""Task files, records, adapters and settings with good defaults: a test names only what it is about."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from configs.settings import DEFAULT_POOL, PoolSettings, Settings
from configs.task_spec import Kind, TaskSpec
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store import Adapter, canonical_update
from workers.heads import HeadLayout
from workers.orders import BaseLayout, Trained

BASE = "tiny"
SHA256 = "ab" * 32
SHAPES = {"layer.0.query": (12, 10), "layer.0.value": (8, 10)}
CLASSIFIER = ("classifier.weight",)
LAYOUT = BaseLayout(
    sha256=SHA256,
    module_shapes=SHAPES,
    length_max=64,
    kinds=get_args(Kind),
    heads={
        kind: HeadLayout(
            shapes={"classifier.weight": (1, 4), "pooler.weight": (4, 4)},
            outputs=CLASSIFIER,
            missing=CLASSIFIER,
            trained=("classifier",),
        )
        if kind != "causal_lm"
        else HeadLayout(shapes={}, shared=("lm_head.weight",))
        for kind in get_args(Kind)
    },
)
LABELS = ("no", "yes")
TEAMS = ("red", "blue")


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some replaced; `None` in `changes` takes a key away."""
    result = dict(values)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = changed(result[key], value)
        else:
            result[key] = value
    return result


def task_document(title: str = "red/alpha", **changes: Any) -> dict[str, Any]:
    """What a team writes into its task file."""
    team, _, name = title.partition("/")
    values = {
        "team": team,
        "name": name,
        "base_model": BASE,
        "data": {"train_file": "/train.jsonl", "eval_file": "/eval.jsonl", "label_names": list(LABELS)},
    }
    return changed(values | {"data": dict(values["data"]) | {"max_length": 32}}, changes)  # type: ignore[call-overload]


def task_spec(title: str = "red/alpha", **changes: Any) -> TaskSpec:
    """A checked task file."""
    return TaskSpec.model_validate(task_document(title, **changes))


def task_record(title: str = "red/alpha", spec: Mapping[str, Any] | None = None, **fields: Any) -> TaskRecord:
    """A task that was just submitted, or one with some fields changed."""
    team, _, name = title.partition("/")
    task_id = fields.pop("task_id", f"t-{team}-{name}")
    values: dict[str, Any] = {
        "client_key": f"key-{task_id}",
        "submitted_at": 1000.0,
        "train_key": f"data/{task_id}/train.jsonl.gz",
        "train_count": 4,
        "eval_key": f"data/{task_id}/eval.jsonl.gz",
        "eval_count": 100,
        "eval_sha256": "cd" * 32,
        "pool": "default",
    }
    parts = {"task_id": task_id, "team": team, "name": name, "spec": task_spec(title, **(spec or {}))}
    return TaskRecord(**parts, **values | fields)


def trained(token: str, local_score: float = 0.9, **changes: Any) -> Trained:
    """What a worker says after training."""
    values: dict[str, Any] = {
        "staging_key": f"staging/x/{token}/adapter.safetensors",
        "adapter_sha256": "ef" * 32,
        "adapter_parameters": 160,
        "score_count": 100,
        "base_score": 0.5,
        "steps": 10,
        "train_loss": 0.25,
        "seconds": 2.0,
        "first_step_at": 1003.0,
    }
    return Trained(token=token, local_score=local_score, **values | changes)


def published(title: str, version: int, local_score: float | None = 0.9, **fields: Any) -> TaskRecord:
    """A task that main holds."""
    return task_record(title, state=TaskState.PUBLISHED, version=version, local_score=local_score, **fields)


def adapter(seed: int, rank: int = 2, shapes: Mapping[str, tuple[int, int]] = SHAPES, base: str = BASE) -> Adapter:
    """A random update of every module, and a head for two labels."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: canonical_update(
            torch.randn(n, rank, generator=generator), torch.randn(rank, d, generator=generator), scale=0.5
        )
        for name, (n, d) in shapes.items()
    }
    return Adapter(base, SHA256, modules, {"classifier.weight": torch.randn(2, 4, generator=generator)}, {})


def settings(folder: Path | str = "/nowhere", **changes: Any) -> Settings:
    """Settings of a service whose files are all in one folder."""
    values: dict[str, Any] = {
        "state_dir": str(folder),
        "base_model": {"name": BASE, "source": "tiny-source", "weights_sha256": SHA256},
        "teams": {team: {} for team in TEAMS},
        "data_roots": [f"{folder}/data"],
        "database_url": f"sqlite:///{folder}/tasks.db",
        "storage": {"url": f"file:{folder}/store"},
        "mlflow": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        # Rank enough that nothing is lost in these tests, unless they ask for it.
        "subspace": {"energy_ratio_min": 1.0, "rank_max": 64, "share": "always"},
    }
    return Settings.model_validate(changed(values, changes))


def with_pools(settings: Settings, **changes: Any) -> Settings:
    """The settings with all pools changed in the same way."""
    pools = {name: pool.model_copy(update=changes) for name, pool in settings.pools.items()}
    return settings.model_copy(update={"pools": pools})


def fixed(count: int, ranks: int = 1) -> dict[str, PoolSettings]:
    """One pool, named `default`, of so many workers."""
    return {DEFAULT_POOL: PoolSettings(min=count, max=count, ranks=ranks)}


def rows(count: int = 4, label: Any = None) -> list[dict[str, Any]]:
    """Labelled examples, labels in turn."""
    return [{"text": f"text {i}", "label": LABELS[i % 2] if label is None else label} for i in range(count)]


def write_rows(path: Path, examples: Sequence[Any]) -> Path:
    """JSON lines, packed where the name says so."""
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in examples).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path
