"""The part `gpu` of benchmarks/training.py: a 7B Llama of random numbers in bfloat16, without a hub.

Plain PEFT is the bare loop of training_runs.py; `lora`, `share` and `codyra` are our worker's. All share one base model
in the GPU's memory. Then one merge of an adapter of such a model, with the store's mathematics on the GPU's tensors and
on the CPU's. Under eight minutes on one H200. Of what the project needs, this part does without Ray, DeepSpeed, MLflow,
boto3, datasets and the demo's base model.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import training_runs as runs
from configs.settings import BaseModelSettings, SubspaceSettings
from subspace_store.adapter import Adapter, ModuleUpdate
from subspace_store.merging.merge import merge_adapters
from workers.base_model import BaseModel
from workers.weights import Loaded

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MERGES = 3


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    sizes: Mapping[str, int]
    rows: int
    """A step's."""
    length: int
    """Tokens in each."""
    rank: int
    k: int
    steps: int
    rounds: int
    merge_rank: int = 16
    merge_k: int = 64


LLAMA_7B = Shape(
    {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "vocab_size": 32000,
    },
    rows=8, length=512, rank=16, k=64, steps=22, rounds=3,
)  # fmt: skip
TINY = Shape(
    {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 64,
    },
    rows=2, length=32, rank=4, k=8, steps=4, rounds=1, merge_rank=2, merge_k=8,
)  # fmt: skip
WAYS: dict[str, Mapping[str, Any]] = {
    "plain PEFT": {},
    "lora": {"name": "lora"},
    "share, φ = 0": {"name": "share", "temporary_columns": 0},
    "share, default φ": {"name": "share"},
    "codyra": {"name": "codyra"},
}


def measure(
    shape: Shape, device: torch.device, say: Callable[[str], None], show: Callable[[Sequence[dict[str, Any]]], None]
) -> dict[str, Any]:
    """Train, then merge."""
    if device.type == "cuda":
        torch.set_num_threads(os.cpu_count() or 1)
    started = time.perf_counter()
    base = random_base(shape, device)
    parameters = sum(parameter.numel() for parameter in base._shared.values())
    say(f"{parameters / 1e9:.2f} billion parameters made on {device} in {time.perf_counter() - started:.0f} s")
    training = train(base, shape)
    show(training)
    shapes = base.module_shapes()
    del base
    runs.reset_gpu()
    merging = merge(shapes, shape, device, say)
    show(merging)
    words = (
        f"{parameters / 1e9:.2f} billion parameters, bfloat16, all linear layers, r {shape.rank}, k {shape.k}, "
        f"{shape.rows} rows of {shape.length} tokens, {shape.rounds} rounds of {shape.steps - runs.WARM_STEPS} steps"
    )
    return {"shape": words, "training": training, "merging": merging}


def random_base(shape: Shape, device: torch.device) -> BaseModel:
    """A base model as load_base_model makes one, but of random numbers drawn where they stay."""
    tokenizer = words_tokenizer()
    config = runs.llama_config(tokenizer, **shape.sizes)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(kept)
    model.config.use_cache = False
    settings = BaseModelSettings(name="random", source="random", weights_sha256="0" * 64, dtype="bfloat16")
    return BaseModel(settings, Loaded(model, frozenset(), has_more=False), {}, {}, ("causal_lm",), tokenizer, None)


def words_tokenizer() -> Any:
    """A token for each word of the rows."""
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[END]", *runs.WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def train(base: BaseModel, shape: Shape) -> list[dict[str, Any]]:
    """Every way once a round."""
    basis = runs.random_basis(base, TARGETS, shape.k)
    rows = runs.completion_rows(4 * shape.rows, shape.length)
    found: dict[str, list[runs.Run]] = {name: [] for name in WAYS}
    for _ in range(shape.rounds):
        for name, way in WAYS.items():
            spec = runs.task(
                base, "causal_lm", TARGETS, data={"max_length": shape.length}, lora={"r": shape.rank}, method=way,
                training={"max_steps": shape.steps, "per_device_train_batch_size": shape.rows, "bf16": True},
            )  # fmt: skip
            case = runs.Case(base, spec, rows, basis)
            contestant = runs.ours if way else runs.bare
            found[name].append(contestant(case, runs.Clock(shape.steps)))
    plain = found["plain PEFT"]
    lora = found["lora"]
    table = []
    for name, all_runs in found.items():
        seconds = [run.step_seconds for run in all_runs]
        table.append(
            {
                "what": name,
                "step_seconds": statistics.median(seconds),
                "tokens_per_second": shape.rows * shape.length / statistics.median(seconds),
                "times_plain": _ratio(seconds, plain),
                "times_lora": _ratio(seconds, lora),
                "peak_gpu_gb": max(run.gpu_bytes for run in all_runs) / 1e9,
                "trained_numbers": sum(all_runs[0].trained.values()),
            }
        )
    return table


def _ratio(seconds: Sequence[float], others: Sequence[runs.Run]) -> float:
    return statistics.median(mine / other.step_seconds for mine, other in zip(seconds, others, strict=True))


def merge(
    shapes: Mapping[str, tuple[int, int]], shape: Shape, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One more adapter into a full subspace, with all tensors on each device."""
    settings = SubspaceSettings(rank_fixed=shape.merge_k)
    count = shape.merge_k // shape.merge_rank + 1
    *group, one = (random_adapter(shapes, shape.merge_rank, seed, device) for seed in range(count))
    table = []
    for place in dict.fromkeys((device.type, "cpu")):
        try:
            first = merge_adapters({}, {f"t{n}": on(adapter, place) for n, adapter in enumerate(group)}, settings)
            seconds = []
            for _ in range(MERGES):
                arriving = on(one, place)
                _wait(place)
                started = time.perf_counter()
                merge_adapters(first.modules, {"one": arriving}, settings)
                _wait(place)
                seconds.append(time.perf_counter() - started)
        except (RuntimeError, TypeError) as error:
            say(f"the store's mathematics does not take tensors on {place}: {str(error).splitlines()[0]}")
            continue
        row = {"tensors_on": place, "modules": len(shapes), "merge_seconds": statistics.median(seconds)}
        table.append(row | {"threads": torch.get_num_threads()})
    return table


def random_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: torch.device) -> Adapter:
    draw = torch.Generator(device).manual_seed(seed)
    modules = {}
    for name, shape in shapes.items():
        u, v = (torch.linalg.qr(torch.randn(n, rank, generator=draw, device=device)).Q.contiguous() for n in shape)
        modules[name] = ModuleUpdate(u, torch.logspace(0, -0.5, rank, device=device), v)
    return Adapter("random", "", modules)


def on(record: Any, place: str) -> Any:
    """A record with all its tensors on a device."""
    if torch.is_tensor(record):
        return record.to(place)
    if is_dataclass(record):
        return replace(record, **{field.name: on(getattr(record, field.name), place) for field in fields(record)})
    return {name: on(value, place) for name, value in record.items()} if isinstance(record, Mapping) else record


def _wait(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()
