"""Parts `unrelated`, `related` and `directions` of capacity.py: what `auto` keeps of real tasks, and what they store.

The tasks come one after another, as to a service: each is trained once per candidate, on its training rows without the
validation rows (`share` in the basis that the tasks before it have left), then on all of them with the method that was
chosen, and merged. `lora` on all rows is what the result is compared with. The adapters are kept in a folder outside
the repository, so that a second run only measures. Reported scores are on the tasks' test rows, which nothing else is
chosen by.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_adapters import TRAIN_ROWS, read
from benchmarks.real_adapters import tasks as text_tasks
from configs.settings import SubspaceSettings, read_settings
from configs.task_spec import TaskSpec, TrainingSpec, read_task_spec
from subspace_store import Adapter, SubspaceReader, SubspaceStore, adapter_from_bytes, adapter_to_bytes
from subspace_store.digests import digest
from subspace_store.merging.basis import ModuleBasis
from tests.subspace_store.builders import fresh_storage, merged
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import score_adapter
from workers.methods import NOTHING, Given, Method, auto, codyra, lora, refine, share
from workers.rows.task_data import Row
from workers.rows.validation import needs_all_rows, not_compared, set_aside
from workers.trainer import Surroundings, fit

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = SubspaceSettings()
METHODS: Mapping[str, Method] = {"share": share, "lora": lora, "codyra": codyra, "refine": refine}
TEST_ROWS = 500
ALL_ROWS = 10**6
ALL = "-all"
"""Mark of adapters that were trained on the validation rows as well."""
TEXT_STEPS = 120
"""Steps of a text set's task: a minute or two on one core."""
LABELS = 11
"""Labels of each related task."""
BASES = ((5, 32), (7, 24), (8, 24), (12, 24), (16, 24), (20, 16), (20, 24), (20, 32))
"""(tasks that make a basis, directions that it has) of `directions`."""
NEW_TASKS = range(30, 33)
"""Numbers of the related tasks that are trained in them."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A task with its rows."""

    spec: TaskSpec
    train: tuple[Row, ...]
    test: tuple[Row, ...]


def unrelated(data: Path | None) -> Iterator[Case]:
    """The six tasks of examples/, and of the text sets those that this base model learns."""
    for path in sorted((ROOT / "examples/tasks").glob("*.yaml")):
        spec = read_task_spec(path)
        yield Case(spec, read(spec, spec.data.train_file, TRAIN_ROWS), read(spec, spec.data.eval_file, TEST_ROWS))
    for name in ("trec6", "ag_news", "sst2", "mrpc") if data else ():
        assert data is not None
        spec = _text_task(data, name)
        yield Case(spec, read(spec, spec.data.train_file, TRAIN_ROWS), read(spec, spec.data.eval_file, TEST_ROWS))


def related(data: Path | None, count: int) -> Iterator[Case]:
    """Tasks of one kind: eleven of BANKING77's 77 intents each, drawn anew every time."""
    assert data is not None, "the related tasks are cut from BANKING77: give --data"
    whole = _text_task(data, "banking77")
    names = whole.data.label_names
    train, test = (read(whole, file, ALL_ROWS) for file in (whole.data.train_file, whole.data.eval_file))
    for number in range(count):
        draw = random.Random(number)
        chosen = draw.sample(range(len(names)), LABELS)
        spec = whole.model_copy(
            update={
                "name": f"banking-{number}",
                "data": whole.data.model_copy(
                    update={"label_names": tuple(names[i] for i in chosen), "max_length": 24}
                ),
                "training": TrainingSpec(
                    learning_rate=0.008, max_steps=100, per_device_train_batch_size=16, warmup_steps=0.1, seed=number
                ),
            }
        )
        yield Case(spec, _cut(train, chosen), _cut(test, chosen))


def measure(
    cases: Iterator[Case], folder: Path, say: Callable[[str], None], merging: SubspaceSettings = DEFAULTS
) -> Figures:
    """What is kept of each task, and what a subspace of all of them stores, merged under some settings."""
    base = base_model()
    store = SubspaceStore.open(fresh_storage(), settings=merging, base_model=base.name, writer="benchmark")
    rows, delivered, held, wholes = [], {}, {}, {}
    train = partial(_trained_by, base, folder)
    for case in cases:
        if why := not_compared(case.spec, set_aside(case.train)[1]):
            say(f"{case.spec.name}: left out, {why}")
            continue
        version = store.state.refs["candidate"]
        raced = race(base, case, store, train)
        adapter, separate = raced.adapter, race(base, case, store, train, only_lora=True).adapter
        whole = trained(base, case, "lora", case.train, folder, ALL)
        before = store.footprint(version).total_numbers if version else 0
        merged(store, {case.spec.name: adapter})
        row: Figures = {
            "task": case.spec.name,
            "kept": raced.form.method,
            "compared": list(raced.compared),
            "share_of_energy": raced.form.share,
            "numbers": store.footprint(store.state.refs["candidate"]).total_numbers - before,
            "numbers_alone": separate.numbers,
            "numbers_trained": whole.parameter_count,
            "rows": len(case.test),
            "score": score(base, adapter, case),
            "score_lora": score(base, whole, case),
            "score_alone": score(base, separate, case),
        }
        rows.append(row)
        delivered[case.spec.name], held[case.spec.name], wholes[case.spec.name] = adapter, case, whole
        say(json.dumps(row))
        for line in raced.said:
            say(line)
    return {"tasks": rows} | _stored(base, store, rows, delivered, held) | {"trained_apart": _apart(base, wholes)}


@dataclass(frozen=True)
class Raced:
    """What `auto` makes of a task."""

    adapter: Adapter
    form: auto.Form
    """Form that won on the validation rows."""
    compared: tuple[str, ...]
    said: tuple[str, ...]


Train = Callable[[Case, str, Sequence[Row], str, Given], Adapter]
"""Trains a case by a method on some rows; `which` tells those of one method apart."""


def race(base: BaseModel, case: Case, store: SubspaceStore, train: Train, only_lora: bool = False) -> Raced:
    """`auto` as a worker does it: candidates on the training rows without the validation rows, `share` in the basis of
    `candidate`, then the winner on all rows."""
    rest, validation = set_aside(case.train)
    version = store.state.refs["candidate"]
    ranks = store.training_ranks(version)
    leased = Given(version=version, basis=store.training_basis(version))
    found = {"lora": train(case, "lora", rest, "", NOTHING)}
    if not only_lora and auto.is_large_enough(ranks, lora.target_modules(base, case.spec.lora, case.spec.kind)):
        found["share"] = train(case, "share", rest, "", leased)
    in_basis = {"lora": {}, "share": ranks}

    judged = auto.validation_spec(case.spec)
    kept, said = auto.chosen(
        found,
        lambda adapter: score_adapter(base, adapter, validation, judged).per_row,
        case.spec.method.loss_max,
        lambda name, adapter: auto.numbers(adapter, in_basis[name]),
        judged.metric,
        partial(trained_on, case, leased, rest, train),
    )
    if not needs_all_rows(rest, validation):
        return Raced(auto.sized(kept.adapter, 1.0), kept, tuple(found), said)
    if kept.directions:
        cut = auto.leading(found[kept.method], kept.directions)
        final = trained_on(case, leased, case.train, train, kept.method, cut, ALL)
    else:
        final = train(case, kept.method, case.train, ALL, NOTHING if kept.method == "lora" else leased)
    return Raced(auto.sized(final, kept.share), kept, tuple(found), said)


def trained_on(
    case: Case, leased: Given, rows: Sequence[Row], train: Train, method: str, cut: Adapter, which: str = ""
) -> Adapter:
    """What a cut has left of a candidate, trained on: a LoRA by itself, coefficients in the basis that is leased."""
    spec = case.spec.model_copy(update={"method": case.spec.method.model_copy(update={"name": method})})
    left = replace(case, spec=auto.recovery(spec, cut))
    if method == "lora":
        return train(left, "lora", rows, f"{which}-left", Given(start=cut))
    return train(left, "refine", rows, f"{which}-left", replace(leased, adapter=cut))


def directions(data: Path | None, folder: Path, say: Callable[[str], None]) -> Figures:
    """What a basis is worth to the tasks after it, by how many tasks made it and how many directions it has: related
    tasks are trained in it (`share`) and raced against their LoRAs, on the validation rows."""
    base = base_model()
    cases = list(related(data, NEW_TASKS.stop))
    made_of = [trained(base, case, "lora", set_aside(case.train)[0], folder) for case in cases[: max(BASES)[0]]]
    found: list[Figures] = []
    train = partial(_trained_by, base, folder)
    for case in (cases[number] for number in NEW_TASKS):
        rest, validation = set_aside(case.train)
        whole = trained(base, case, "lora", rest, folder)
        row: Figures = {"task": case.spec.name, "rows": len(validation)}

        def judge(adapter: Adapter, case: Case = case, validation: Any = validation) -> tuple[float, ...]:
            return score_adapter(base, adapter, validation, auto.validation_spec(case.spec)).per_row

        row["lora"] = {"score": statistics.fmean(judge(whole)), "numbers": whole.numbers}
        for tasks, count in BASES:
            leased = Given(version=1, basis=leading_basis(made_of[:tasks], count))
            ranks = {name: basis.ranks for name, basis in leased.basis.items()}
            adapter = trained(base, case, "share", rest, folder, f"-in-{name_of(leased)}", leased)
            kept, _ = auto.chosen(
                {"lora": whole, "share": adapter},
                judge,
                case.spec.method.loss_max,
                lambda name, form, of=ranks: auto.numbers(form, {"lora": {}, "share": of}[name]),
                train_on=partial(trained_on, case, leased, rest, train),
            )
            scored = {
                "score": statistics.fmean(judge(adapter)),
                "kept": kept.method,
                "numbers": kept.numbers,
                "kept_score": kept.score,
            }
            row[f"{count} of {tasks}"] = scored
        found.append(row)
        say(json.dumps(row))
    return {"new_tasks": found}


def leading_basis(adapters: Sequence[Adapter], count: int) -> dict[str, ModuleBasis]:
    """The leading directions of each module's updates, each divided by its norm, side by side."""
    bases = {}
    for name in adapters[0].modules:
        updates = [adapter.modules[name] for adapter in adapters]
        scales = [u.sigma_R.double() / math.sqrt(u.energy) for u in updates]
        sides = []
        for factors in ([u.u_NR for u in updates], [u.v_DR for u in updates]):
            stack = torch.cat([factor.double() * scale for factor, scale in zip(factors, scales, strict=True)], dim=1)
            columns, sigma, _ = torch.linalg.svd(stack, full_matrices=False)
            sides.append((columns[:, :count].float().contiguous(), sigma[:count].square()))
        (p_NK, lam_out_K), (q_DK, lam_in_K) = sides
        bases[name] = ModuleBasis(p_NK, q_DK, lam_out_K, lam_in_K)
    return bases


def base_model() -> BaseModel:
    """The base model of the examples, on the CPU."""
    settings = read_settings(ROOT / "configs/local.yaml").bases[0]
    return load_base_model(settings.model_copy(update={"device": "cpu"}))


def _apart(base: BaseModel, adapters: Mapping[str, Adapter]) -> Figures:
    """Numbers of the LoRAs as they were trained, merged, over each truncated alone to the same promise."""
    found = {}
    for when in ("if-it-pays", "always"):
        settings = SubspaceSettings.model_validate({"share": when})
        alone = sum(truncated_alone(adapter, settings.energy_ratio_min) for adapter in adapters.values())
        store = _store(base, adapters, settings)
        found[when] = store.footprint(store.state.refs["candidate"]).total_numbers / alone
    return found


def truncated_alone(adapter: Adapter, energy_ratio_min: float) -> int:
    """Numbers of the smallest truncation of every module that keeps the same promise."""
    numbers = 0
    for update in adapter.modules.values():
        energy_R = update.sigma_R.double().square()
        tail_R = energy_R.flip(0).cumsum(0).flip(0)
        numbers += int((tail_R > (1 - energy_ratio_min) * energy_R.sum()).sum()) * sum(update.shape)
    return numbers


def _store(base: BaseModel, adapters: Mapping[str, Adapter], settings: SubspaceSettings) -> SubspaceStore:
    """A store in memory into which the adapters were merged one by one."""
    store = SubspaceStore.open(fresh_storage(), settings=settings, base_model=base.name, writer="benchmark")
    for name, adapter in adapters.items():
        merged(store, {name: adapter})
    return store


def _stored(
    base: BaseModel,
    store: SubspaceStore,
    rows: list[Figures],
    delivered: Mapping[str, Adapter],
    cases: Mapping[str, Case],
) -> Figures:
    """Measure the last version, read anew from its files."""
    settings = store.settings
    last = store.state.refs["candidate"]
    reader = SubspaceReader.open(store.storage, settings=settings, base_model=base.name)
    shares, points = {}, {}
    for row in rows:
        name = row["task"]
        served = reader.adapter(name, last)
        whole = delivered[name].modules
        shares[name] = min(served.modules[n].energy / u.energy for n, u in whole.items() if u.energy)
        points[name] = 100 * (score(base, served, cases[name]) - row["score_lora"])
    foot = reader.footprint(last)
    whole, alone = (sum(row[key] for row in rows) for key in ("numbers_trained", "numbers_alone"))
    losses = [100 * (row["score_alone"] - row["score_lora"]) for row in rows]
    return {
        "broken_promises": sum(
            share < (1.0 if delivered[name].is_sized else settings.energy_ratio_min) - 1e-6
            for name, share in shares.items()
        ),
        "loss_points": {"mean": statistics.fmean(points.values()), "worst": min(points.values())},
        "loss_points_alone": {"mean": statistics.fmean(losses), "worst": min(losses)},
        "numbers_over_trained_lora": foot.total_numbers / whole,
        "numbers_over_best_separate": foot.total_numbers / alone,
        "over_offline_optimum": foot.total_numbers / reader.preview_compact().numbers_after,
        "numbers": {
            "basis": foot.basis_numbers,
            "coefficients": foot.coefficient_numbers,
            "private": foot.private_numbers,
            "alone": alone,
            "trained": whole,
        },
    }


def trained(
    base: BaseModel, case: Case, name: str, rows: Any, folder: Path, which: str = "", given: Given = NOTHING
) -> Adapter:
    """The case's adapter by a method, from the folder or trained now and put there.

    Args:
        which: Tells adapters of one method apart, by the rows, the basis or the rank.
    """
    file = folder / f"{case.spec.name}-{name}{which}.safetensors"
    if not file.is_file():
        keep(file, adapter_to_bytes(made(base, case, name, rows, given)))
    return adapter_from_bytes(file.read_bytes(), str(file))


def _trained_by(
    base: BaseModel, folder: Path, case: Case, name: str, rows: Sequence[Row], which: str, given: Given
) -> Adapter:
    """A `Train` that keeps its adapters in a folder."""
    where = which if given is NOTHING else f"{which}-in-{name_of(given)}"
    return trained(base, case, name, rows, folder, where, given)


def made(
    base: BaseModel,
    case: Case,
    name: str,
    rows: Any,
    given: Given = NOTHING,
    change: Callable[[Any], None] = lambda model: None,
) -> Adapter:
    """The case's adapter by a method, trained now; by `share` without temporary columns, as `auto` has it, unless the
    case asks for `share` itself.

    Args:
        change: Called with the model that the method has prepared, before its first step.
    """
    method = METHODS[name]
    spec = case.spec
    if spec.method.name != "share":
        spec = spec.model_copy(update={"method": spec.method.model_copy(update={"temporary_columns": 0})})
    model = method.prepare(base, spec, given)
    change(model)
    after_step = partial(method.after_step, model, spec)
    fit(model, base, rows, spec, Surroundings(after_step=after_step))
    return method.finish(model, base, spec, given)


def keep(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(content)
    part.replace(file)


def name_of(given: Given) -> str:
    """Tells bases, and adapters that are trained on, apart."""
    adapters = [adapter_to_bytes(adapter) for adapter in (given.adapter, given.start) if adapter is not None]
    return digest(b"".join([*(basis.p_NK.numpy().tobytes() for basis in given.basis.values()), *adapters]))[:12]


def score(base: BaseModel, adapter: Adapter, case: Case) -> float:
    """Its score on the test rows, in the task's own metric."""
    return score_adapter(base, adapter, case.test, case.spec).value


def _text_task(data: Path, name: str) -> TaskSpec:
    known = text_tasks(data)
    if name not in known:
        raise SystemExit(f"{data} has no folder {name} with meta.json: name the folder of the text sets")
    spec = known[name]
    training = TrainingSpec(learning_rate=0.003, max_steps=TEXT_STEPS, per_device_train_batch_size=16, warmup_steps=0.1)
    return spec.model_copy(update={"training": training})


def _cut(rows: tuple[Row, ...], labels: list[int]) -> tuple[Row, ...]:
    """The rows of some labels, with those labels counted anew."""
    new = {old: place for place, old in enumerate(labels)}
    kept = [row for row in rows if row.label in new]  # type: ignore[union-attr]
    return tuple(type(row)(**{**vars(row), "label": new[row.label]}) for row in kept)  # type: ignore[union-attr]
