"""One LoRA trained on several tasks in turns, each with its own head: what a stream gives up by coming in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import get_linear_schedule_with_warmup

from benchmarks.real_streams import Case
from benchmarks.streams.kept import Made
from workers.base_model import BaseModel
from workers.batches import Batches, schedule
from workers.features import collator
from workers.methods import lora
from workers.methods.factors import ADAPTER, lora_layers
from workers.orders import Rank
from workers.trainer import _start_at_the_mean


def jointly(base: BaseModel, cases: Sequence[Case]) -> dict[str, Made]:
    """Task to its adapter, whose update is the same for all, and the numbers of that update. The tasks take turns, each
    with as many steps as by itself."""
    models = [lora.prepare(base, case.spec) for case in cases]
    first = lora_layers(models[0])
    for model, case in zip(models, cases, strict=True):
        for name, layer in lora_layers(model).items():
            for side in ("lora_A", "lora_B"):
                getattr(layer, side)[ADAPTER].weight = getattr(first[name], side)[ADAPTER].weight
        if case.spec.kind == "sequence_regression":
            _start_at_the_mean(model, case.train)
        model.train()
    training = cases[0].spec.training
    trained = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)
    steps = training.max_steps * len(cases)
    pace = get_linear_schedule_with_warmup(optimizer, int(training.warmup_steps * steps), steps)
    batches = [
        iter(Batches(schedule(c.spec.training, len(c.train), Rank()), c.train, collator(base, c.spec))) for c in cases
    ]
    torch.manual_seed(training.seed)
    for step in range(steps):
        place = step % len(cases)
        loss = models[place](**next(batches[place])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
    found = {c.spec.name: lora.finish(m, base, c.spec) for c, m in zip(cases, models, strict=True)}
    return {task: Made(adapter, adapter.parameter_count) for task, adapter in found.items()}
