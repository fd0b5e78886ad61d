"""A training run between two steps, as one safetensors file on the object storage: no pickle on the way in or out.

Each parameter is kept whole, so a gang of another size or ZeRO stage can go on from it. The same gang goes on from the
same bits, and gets the same result where the machine computes the same way twice: a CPU does; a GPU's attention adds up
its gradients in no fixed order. Only trained parameters are in it (adapter and head), never the base model.

Files lie beside the attempt's adapter, `staging/<task>/<attempt>-<token>/checkpoint-<step>-<digest>.safetensors`. The
digest in the name shows whether a file is intact: a damaged one is skipped, and the one before it is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import NotFound
from configs.task_spec import TaskSpec, TrainingSpec
from subspace_store.digests import digest
from subspace_store.storage.protocol import Storage

FORMAT = "onebasis-checkpoint-1"
KEPT = 2
"""Checkpoints kept of one attempt: the newest, and the one before in case the newest is damaged."""
_NAME = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{64})\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that the next step depends on."""

    step: int
    """Steps done."""
    run: str
    """Digest of the run, see `run_digest`: no run goes on from a checkpoint of another one."""
    method: str
    """Method that `auto` chose, else the task's own."""
    basis_version: int
    """Version whose basis was leased; 0: none."""
    loss_sum: float
    """Sum of the losses of all steps so far, for the mean."""
    optimizer_step: float
    """Adam's own count of steps."""
    scheduler: Mapping[str, Any]
    """The learning-rate schedule's state: plain numbers."""
    parameters: Mapping[str, Mapping[str, Tensor]]
    """Parameter name to its value (`value`) and optimizer moments (`exp_avg`, `exp_avg_sq`), whole, float32."""
    generators: tuple[Mapping[str, Tensor], ...]
    """Per rank: the states of torch's random number generators, `cpu` and `cuda`."""


def run_digest(spec: TaskSpec, base_sha256: str, train_key: str, refine_version: int = 0) -> str:
    """Digest of what defines a run: the task file without keys that do not affect training, base model and rows."""
    skipped = {"gate": True, "priority": True, "client_key": True, "training": {"save_steps", "auto_find_batch_size"}}
    content = spec.model_dump_json(exclude=skipped)  # type: ignore[arg-type]
    return digest(f"{content} {base_sha256} {train_key} {refine_version}".encode())


def in_steps_of(checkpoint: Checkpoint, training: TrainingSpec, rank_count: int) -> Checkpoint:
    """The checkpoint with its step as a gang of this size counts it (the same rows), if the run lasts epochs."""
    if training.max_steps > 0 or len(checkpoint.generators) == rank_count:
        return checkpoint
    step = math.ceil(checkpoint.step * len(checkpoint.generators) / rank_count)
    return replace(
        checkpoint,
        step=step,
        loss_sum=checkpoint.loss_sum * step / checkpoint.step,
        scheduler={**checkpoint.scheduler, "last_epoch": step},
    )


def save_checkpoint(storage: Storage, folder: str, checkpoint: Checkpoint) -> str:
    """Write it and delete older ones of the same attempt.

    Args:
        folder: The attempt's folder, without a slash at its end.

    Returns:
        Its key.
    """
    content = checkpoint_to_bytes(checkpoint)
    key = f"{folder}/checkpoint-{checkpoint.step:09d}-{digest(content)}.safetensors"
    storage.write(key, content)
    mine = [found for found in storage.keys(f"{folder}/checkpoint-") if _NAME.search(found)]
    for old in mine[:-KEPT]:
        storage.delete(old)
    return key


def newest_checkpoint(storage: Storage, prefix: str, run: str) -> tuple[str, Checkpoint] | None:
    """The furthest intact checkpoint of a run that any attempt left.

    Args:
        prefix: Prefix of the task's keys, `staging/<task>/`.
        run: See `run_digest`.

    Returns:
        Its key and the checkpoint; None when there is none: then training starts at the beginning.
    """
    found = [(match[1], key) for key in storage.keys(prefix) if (match := _NAME.search(key))]
    for _, key in sorted(found, reverse=True):
        checkpoint = read_checkpoint(storage, key)
        if checkpoint is not None and checkpoint.run == run:
            return key, checkpoint
    return None


def read_checkpoint(storage: Storage, key: str) -> Checkpoint | None:
    """The checkpoint at a key; None when it is gone or damaged."""
    match = _NAME.search(key)
    try:
        content = storage.read(key)
    except NotFound:  # its attempt was still deleting older ones
        return None
    return checkpoint_from_bytes(content) if match and digest(content) == match[2] else None


def checkpoint_to_bytes(checkpoint: Checkpoint) -> bytes:
    """Serialise; the same state gives the same bytes."""
    tensors = {
        f"parameters/{name}/{part}": tensor.contiguous()
        for name, parts in sorted(checkpoint.parameters.items())
        for part, tensor in sorted(parts.items())
    }
    for rank, states in enumerate(checkpoint.generators):
        tensors |= {f"generators/{rank}/{name}": tensor.contiguous() for name, tensor in sorted(states.items())}
    facts = {name: value for name, value in vars(checkpoint).items() if name not in ("parameters", "generators")}
    # One header value: safetensors writes several in hash order, which differs from process to process.
    header = {"onebasis": json.dumps({"format": FORMAT, **facts}, sort_keys=True)}
    return bytes(save_safetensors({name: tensor.clone() for name, tensor in tensors.items()}, header))


def checkpoint_from_bytes(content: bytes) -> Checkpoint | None:
    """Read what `checkpoint_to_bytes` wrote; None for a file of another kind or format."""
    try:
        tensors = load_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["onebasis"])
        if facts.pop("format") != FORMAT:
            return None
        parameters: dict[str, dict[str, Tensor]] = {}
        generators: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name, part = key.split("/")
            if kind == "parameters":
                parameters.setdefault(name, {})[part] = tensor
            else:
                generators.setdefault(int(name), {})[part] = tensor
        states = tuple(generators[rank] for rank in sorted(generators))
        return Checkpoint(**facts, parameters=parameters, generators=states)
    except (SafetensorError, KeyError, ValueError, TypeError, UnicodeDecodeError):
        return None
