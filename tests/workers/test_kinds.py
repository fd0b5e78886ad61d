"""One order of each kind of task, from files to an adapter that does what its rows ask, and a score of each row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from configs.task_spec import TaskSpec
from subspace_store import SubspaceReader
from subspace_store.storage.memory import MemoryStorage
from tests.workers.tiny_bases import save_llama, save_vit
from tests.workers.worker_builders import tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.orders import Train, Trained
from workers.results import Results, read_results
from workers.rows.frozen_rows import freeze
from workers.training import train_task

ALL_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TALK = {"initializer_range": 0.3}  # large numbers, so that a frozen output layer can be sure of an answer


def trained(base: BaseModel, file: Path, **sections: Any) -> tuple[Trained, Results]:
    """Train on a file's rows and score on the same: what is asked for is that a task can be learnt at all."""
    data = {"train_file": str(file), "eval_file": str(file), "eval_is_train": True} | sections.pop("data", {})
    spec = TaskSpec.model_validate({"team": "t", "name": "n", "base_model": "tiny", "data": data} | sections)
    storage = MemoryStorage(str(file))
    frozen = freeze(spec, file, file)
    keys = []
    for rows, name in ((frozen.train, "train"), (frozen.evaluation, "eval")):
        assert rows is not None
        keys.append(rows.key("data", name))
        rows.write(storage, keys[-1])
    frozen.close()
    order = Train(
        token="token",
        task_id="task-1",
        attempt=1,
        spec=spec,
        train_key=keys[0],
        eval_key=keys[1],
        staging_key="staging/task-1/1-token/adapter.safetensors",
        results_key="results/local",
    )
    done = train_task(order, base, storage, SubspaceReader.open(storage), lambda progress: None, lambda: "")
    return done, read_results(storage, "results/local")


def json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_language_model_learns_to_answer(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path / "base", **TALK)))
    answers = {
        "France": "Paris",
        "grass": "green",
        "colour": "grass",
        "capital": "France",
        "The": "is",
        "of": "capital",
    }
    rows = [{"prompt": f"{asked} ->", "completion": f" {answer}."} for asked, answer in answers.items()]
    done, results = trained(
        base,
        json_lines(tmp_path / "rows.jsonl", rows),
        kind="causal_lm",
        metric="exact_match",
        data={"max_length": 24, "max_new_tokens": 6},
        training={"learning_rate": 5e-3, "max_steps": 60, "per_device_train_batch_size": 6},
        lora={"r": 8, "target_modules": ALL_LAYERS},
    )
    assert (done.base_score, done.local_score) == (0.0, 1.0)
    assert done.metrics["rouge_l"] == 1.0
    assert 1.0 < done.metrics["perplexity"] < 2.0
    assert (results.metric, results.version, results.per_row) == ("exact_match", 0, (1.0,) * 6)


def test_a_chat_model_learns_from_messages(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path / "base", chat=True, **TALK)))
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in [("France?", "Paris."), ("grass?", "green")]
    ]
    done, _ = trained(
        base,
        json_lines(tmp_path / "rows.jsonl", rows),
        kind="causal_lm",
        data={"max_length": 24, "messages_column": "messages"},
        training={"learning_rate": 5e-3, "max_steps": 30, "per_device_train_batch_size": 2},
        lora={"r": 8, "target_modules": ALL_LAYERS},
    )
    # A token of a random model's answer has one chance in some 300: ln 300 = 5.7.
    assert done.base_score < -4 < -0.5 < done.local_score
    assert done.local_score == done.metrics["log_likelihood"]


def test_a_regression_learns_numbers_of_pairs(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path / "base")))
    rows = [
        {"a": "grass " * (1 + place % 5), "b": "The capital " * (1 + place % 3), "y": (place % 5) / 2}
        for place in range(30)
    ]
    done, results = trained(
        base,
        json_lines(tmp_path / "rows.jsonl", rows),
        kind="sequence_regression",
        metric="spearman",
        data={"max_length": 32, "text_column": "a", "text_pair_column": "b", "label_column": "y"},
        training={"learning_rate": 5e-3, "max_steps": 40, "per_device_train_batch_size": 15},
        lora={"r": 8, "target_modules": ALL_LAYERS},
    )
    assert done.local_score == done.metrics["spearman"] > 0.9
    assert sum(results.per_row) / 30 == pytest.approx(done.local_score, abs=1e-6)


def test_an_image_classifier_learns_what_is_bright(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_vit(tmp_path / "base")))
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 100, (32, 20, 20), dtype=np.uint8)  # grey, and not of the model's size
    pictures[::2, :10] += 120
    pictures[1::2, 10:] += 120
    np.savez(tmp_path / "rows.npz", image=pictures, label=np.arange(32) % 2)
    done, results = trained(
        base,
        tmp_path / "rows.npz",
        kind="image_classification",
        metric="matthews_correlation",
        data={"label_names": ("above", "below")},
        training={"learning_rate": 1e-2, "max_steps": 30, "per_device_train_batch_size": 16},
        lora={"r": 8, "target_modules": ("q_proj", "v_proj")},
    )
    assert done.local_score == done.metrics["accuracy"] == 1.0
    assert done.base_score < 0.9  # the head alone
    assert results.per_row == (1.0,) * 32


def test_an_image_regression_learns_several_numbers_of_each_picture(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_vit(tmp_path / "base", initializer_range=0.2)))
    labels = np.array([[above / 5, below / 5] for above in range(6) for below in range(6)])
    pictures = np.repeat(np.repeat(255 * labels[:, :, None], 8, axis=1), 16, axis=2).astype(np.uint8)
    np.savez(tmp_path / "rows.npz", image=pictures, label=labels)
    done, results = trained(
        base,
        tmp_path / "rows.npz",
        kind="image_regression",
        metric="pck",
        data={"label_names": ("above", "below"), "pck_distance": 0.2},
        training={"learning_rate": 1e-2, "max_steps": 120, "per_device_train_batch_size": 18},
        lora={"r": 8, "target_modules": ("q_proj", "v_proj")},
        method={"name": "lora"},
    )
    assert done.base_score < 0.6 < 0.9 < done.local_score == done.metrics["pck"]
    assert -0.1 < done.metrics["neg_mean_absolute_error"] < 0
    assert sum(results.per_row) / 36 == pytest.approx(done.local_score, abs=1e-6)


@pytest.mark.parametrize("kind", ["sequence_classification", "sequence_regression", "causal_lm"])
def test_a_base_model_in_bfloat16_is_adapted_and_scored_like_any_other(kind: str, tmp_path: Path) -> None:
    settings = tiny_settings(save_llama(tmp_path / "base", **TALK))
    small = {"max_length": 16, "max_new_tokens": 4}
    base = load_base_model(BaseModelSettings.model_validate(settings.model_dump() | {"dtype": "bfloat16"}))
    rows = [
        {"text": "grass " * place, "prompt": "grass", "completion": " is green", "label": place % 2} for place in (1, 2)
    ]
    done, _ = trained(
        base,
        json_lines(tmp_path / "rows.jsonl", rows),
        kind=kind,
        metric={"causal_lm": "rouge_l", "sequence_regression": "pearson"}.get(kind, "accuracy"),
        data={"label_names": ("odd", "even") if kind == "sequence_classification" else ()} | small,
        training={"max_steps": 2, "per_device_train_batch_size": 2},
        lora={"target_modules": ("q_proj",)},
    )
    assert all(np.isfinite(value) for value in done.metrics.values())


def test_an_answer_that_leaves_no_room_for_its_prompt_is_refused_before_training(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path / "base")))
    file = json_lines(tmp_path / "rows.jsonl", [{"prompt": "grass", "completion": " is green"}])
    with pytest.raises(InvalidInput, match="64 positions") as raised:
        trained(base, file, kind="causal_lm", metric="rouge_l", data={"max_length": 16, "max_new_tokens": 64})
    assert raised.value.where == "data.max_new_tokens"
