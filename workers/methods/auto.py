"""Method `auto`: `share` where the basis already spans such tasks, else `lora`.

What share of an update the basis spans, the store's forecast says, and it needs the update. So a short LoRA run goes
first, its A started inside the basis, and is thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from configs.task_spec import TaskSpec
from subspace_store.adapter import Adapter
from subspace_store.forecast import spanned_energy
from workers.base_model import BaseModel
from workers.deepspeed_engine import is_parted
from workers.features import collator
from workers.methods import Given, lora
from workers.methods.factors import spanned
from workers.task_data import Row

PROBE_STEPS = 16
SPANNED_MIN = 0.5
"""Share of the probe's ΔW inside the basis from which on `share` is chosen: most of it. Cautious, not tuned.

After four merges on MiniLM (17 of 384 directions), coefficients alone kept up with LoRA on tasks like the merged ones
(accuracy −0.5, −4 and +2 points) and not on others (−6 and −9). No probe told the two apart: 16 steps gave 0.12, 0.09
and 0.14 for the first and 0.14 and 0.12 for the others, a sketch of the gradients 0.01 to 0.02 for all. So only a basis
that holds most of any update means `share`, and `lora` is what is never wrong."""


def choose(base: BaseModel, spec: TaskSpec, given: Given, rows: Sequence[Row]) -> tuple[str, str]:
    """The method to train with, and why, in a line. Draws from spec.training.seed: the same answer every time.

    For one rank alone; the others take its answer.

    Args:
        given: With the leased basis.

    Raises:
        InvalidInput: The run did not stay finite.

    Cost:
        `PROBE_STEPS` micro-batches, forward and backward, in this process. Not with ZeRO stage 3, whose base model one
        process may not hold.
    """
    missing = [name for name in lora.target_modules(base, spec.lora) if spanned(given.basis, name) is None]
    if missing:
        return "lora", f"auto: lora, because the basis lacks {len(missing)} of the modules"
    if is_parted(spec):
        return "lora", "auto: lora, because with ZeRO stage 3 the task is not tried out first"
    try:
        inside = spanned_share(_probe(base, spec, given, rows), given)
    except (torch.OutOfMemoryError, MemoryError):
        return "lora", "auto: lora, because memory ran out when the task was tried out"
    name, sign = ("share", "at least") if inside >= SPANNED_MIN else ("lora", "less than")
    return name, f"auto: {name}, because the basis spans {inside:.0%} of such an update, {sign} {SPANNED_MIN:.0%}"


def spanned_share(adapter: Adapter, given: Given) -> float:
    """Share of an adapter's energy that the leased basis spans: `Forecast.spanned`, of bases already read."""
    energy = sum(update.energy for update in adapter.modules.values())
    inside = sum(spanned_energy(given.basis[name], update) for name, update in adapter.modules.items())
    return min(1.0, inside / energy) if energy else 0.0


def _probe(base: BaseModel, spec: TaskSpec, given: Given, rows: Sequence[Row]) -> Adapter:
    """What a LoRA, started inside the basis, has learnt after a few steps."""
    training = spec.training
    model = lora.prepare(base, spec, given).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    collate, size = collator(base, spec), training.per_device_train_batch_size
    draw = torch.Generator().manual_seed(training.seed)
    for _ in range(PROBE_STEPS):
        chosen = [rows[index] for index in torch.randint(len(rows), (size,), generator=draw).tolist()]
        batch = {name: tensor.to(base.device) for name, tensor in collate(chosen).items()}
        with _precision(base, training.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    return lora.finish(model, base, spec, given)


def _precision(base: BaseModel, bf16: bool) -> Any:
    return torch.autocast(base.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
