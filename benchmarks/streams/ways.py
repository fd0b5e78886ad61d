"""The rows of the table: ways to learn a stream of tasks, each a function from a stream to what it serves afterwards.

Adapters of one seed are trained once: every way that only merges starts from those of `separate`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.forms import compressed
from benchmarks.real_streams import Case, name_of, race
from benchmarks.streams import serial
from benchmarks.streams.joint import jointly
from benchmarks.streams.kept import Made, digest_of, identity
from benchmarks.streams.orders import Stream
from benchmarks.streams.workshop import Workshop, at_rate
from configs.settings import SubspaceSettings
from configs.task_spec import MethodSpec
from subspace_store import Adapter, ModuleUpdate, SubspaceStore, adapter_to_bytes
from subspace_store.digests import digest
from subspace_store.merging.variants import Variant, merge_all
from tests.subspace_store.builders import fresh_storage, merged
from workers.methods import NOTHING, Given
from workers.methods.auto import recovery
from workers.methods.factors import lora_layers
from workers.rows.task_data import Row

RANK = 8

Modules = Mapping[str, ModuleUpdate]
Served = Mapping[int, Mapping[str, Adapter]]
"""Version, counted from 1 as tasks come, to task to the adapter that serves it."""


@dataclass(frozen=True)
class Learned:
    """What a way serves, and what it took."""

    served: Served
    delivered: Mapping[str, Adapter]
    """Task to its adapter before merging; empty where nothing is merged."""
    trained_numbers: float
    """Numbers of the update that a task's training moves, mean over tasks."""
    shared_numbers: int
    """Stored for all tasks together: a basis, or one adapter."""
    own_numbers: int
    """Stored for single tasks, heads apart."""
    seconds: float
    """Training and merging, one core, scores apart."""
    notes: tuple[str, ...] = ()
    common: bool = False
    """Whether one update answers every task, also those that are still to come."""


def separate(shop: Workshop, stream: Stream) -> Learned:
    """A LoRA for each task: the reference."""
    found = _loras(shop, stream)
    return _apart(stream, found)


def longer(shop: Workshop, stream: Stream) -> Learned:
    """A LoRA for each task, trained on as `auto` trains on what a cut leaves, but whole."""
    found = {}
    for case, whole in zip(stream.cases, _loras(shop, stream).values(), strict=True):
        spec = recovery(_by(at_rate(case, _lora_rate(shop)), "lora").spec, whole.adapter)
        given = Given(start=whole.adapter)
        made = shop.train(replace(case, spec=spec), "longer", of=name_of(given), given=given)
        # What it is called after is the rank that it was trained with, of which nothing was cut.
        made = replace(
            made, adapter=replace(made.adapter, info={**made.adapter.info, "lora": whole.adapter.info["lora"]})
        )
        found[case.spec.name] = replace(made, numbers=whole.numbers, seconds=whole.seconds + made.seconds)
    return _apart(stream, found)


def truncated(rank: int) -> Way:
    """A LoRA for each task, each by itself cut to its leading directions."""

    def way(shop: Workshop, stream: Stream) -> Learned:
        found = {}
        for task, made in _loras(shop, stream).items():
            cut = {name: update.leading(rank) for name, update in made.adapter.modules.items()}
            found[task] = replace(made, adapter=replace(made.adapter, modules=cut))
        return _apart(stream, found)

    return way


def heads(shop: Workshop, stream: Stream) -> Learned:
    """The base model as it is, with a trained head for each task."""

    def learn(cases: Iterable[Case]) -> dict[str, Made]:
        return {case.spec.name: shop.train(case, "head", change=_freeze) for case in cases}

    rate = shop.rate("head", lambda cases: _adapters(learn(cases)))
    return _apart(stream, learn(at_rate(case, rate) for case in stream.cases))


def serially(name: str, step: serial.Step, serve: serial.Serve) -> Way:
    """Tasks learnt one after another, each from what those before it have left; each keeps its head."""

    def way(shop: Workshop, stream: Stream) -> Learned:
        rate = shop.rate(name, lambda cases: _at_end(_chain(shop, cases, name, step), serve))
        return _served(_chain(shop, [at_rate(case, rate) for case in stream.cases], name, step), stream, serve)

    return way


def consolidated(shop: Workshop, stream: Stream) -> Learned:
    """EWC: one LoRA trained on task after task, at the rate of sequential training, held by what earlier tasks need."""

    def learn(strength: float, cases: Sequence[Case]) -> dict[str, Made]:
        return _chain(shop, cases, f"ewc-{strength:g}", serial.Consolidating(shop.base, strength))

    go_on, newest = serial.go_on, serial.newest
    rate = shop.rate("sequential", lambda cases: _at_end(_chain(shop, cases, "sequential", go_on), newest))
    strength = shop.choose(
        "ewc",
        serial.STRENGTHS,
        lambda value, cases: _at_end(learn(value, [at_rate(case, rate) for case in cases]), newest),
    )
    return _served(learn(strength, [at_rate(case, rate) for case in stream.cases]), stream, newest)


def _chain(shop: Workshop, cases: Sequence[Case], name: str, step: serial.Step) -> dict[str, Made]:
    """Train one task after another."""
    found: dict[str, Made] = {}
    before: Adapter | None = None
    for case in cases:
        fitted, change = step(case, before, len(found))
        made = shop.train(fitted, name, of=_digest(before), change=change)
        # The step's model has the earlier ranks too where they are frozen in it.
        share = case.spec.lora.r / fitted.spec.lora.r
        found[case.spec.name] = replace(made, numbers=round(share * made.numbers))
        before = made.adapter
    return found


def _at_end(found: Mapping[str, Made], serve: serial.Serve) -> dict[str, Adapter]:
    """What serves each task when all are learnt."""
    last = serve([made.adapter.modules for made in found.values()])
    return {task: replace(made.adapter, modules=last) for task, made in found.items()}


def _served(found: Mapping[str, Made], stream: Stream, serve: serial.Serve) -> Learned:
    updates = [made.adapter.modules for made in found.values()]
    return _one(stream, found, [serve(updates[:count]) for count in stream.counts])


def joint(shop: Workshop, stream: Stream) -> Learned:
    """One LoRA that is trained on all tasks at once, in turns: no stream, a reference."""
    cases = [at_rate(case, _lora_rate(shop)) for case in stream.cases]
    train = functools.cache(lambda: jointly(shop.base, cases))
    of = digest_of(*sorted(identity(case) for case in cases))
    found = {
        case.spec.name: shop.kept.made(case, "joint", of, lambda name=case.spec.name: train()[name]) for case in cases
    }
    whole = _adapters(found)
    numbers = next(iter(whole.values())).parameter_count
    seconds = sum(made.seconds for made in found.values())
    return Learned({len(cases): whole}, {}, numbers, numbers, 0, seconds)


def one_for_all(variant: Variant) -> Way:
    """One adapter for all tasks, made of theirs whenever one comes; each keeps its head."""

    def way(shop: Workshop, stream: Stream) -> Learned:
        found, started = _loras(shop, stream), time.perf_counter()
        settings, adapters, versions = SubspaceSettings(rank_fixed=RANK), _adapters(found), []
        for count in stream.counts:
            some = dict(list(adapters.items())[:count])
            versions.append(next(iter(merge_all(some, variant, settings).updates.values())))
        learned = _one(stream, found, versions)
        return replace(learned, delivered=adapters, seconds=learned.seconds + time.perf_counter() - started)

    return way


def merged_loras(**settings: Any) -> Way:
    """Separate LoRAs, merged into the subspace as they come."""

    def way(shop: Workshop, stream: Stream) -> Learned:
        found, store = _loras(shop, stream), _store(shop, SubspaceSettings.model_validate(settings))
        return _in_store(store, stream, lambda case: found[case.spec.name])

    return way


def jointly_compressed(directions: int) -> Way:
    """Compress-then-Serve: bases fitted anew to all adapters that are there, and a full core for each."""

    def way(shop: Workshop, stream: Stream) -> Learned:
        found, started, served, numbers = _loras(shop, stream), time.perf_counter(), {}, 0
        for version, count in enumerate(stream.counts, start=1):
            some = dict(list(_adapters(found).items())[:count])
            numbers, updates = compressed(some, directions)
            served[version] = {task: replace(adapter, modules=updates[task]) for task, adapter in some.items()}
        cores = len(found) * sum(directions**2 for _ in next(iter(_adapters(found).values())).modules)
        trained, seconds = _took(found)
        seconds += time.perf_counter() - started
        return Learned(served, _adapters(found), trained, numbers - cores, cores, seconds)

    return way


def gated(start: str) -> Way:
    """CoDyRA's adapters, merged into the subspace under default settings.

    Args:
        start: Of the gates: `ones`, or `normal` as published.
    """
    name = f"codyra-{start}"

    def learn(shop: Workshop, cases: Iterable[Case]) -> dict[str, Made]:
        asked = (_by(case, "codyra", gate_start=start) for case in cases)
        return {case.spec.name: shop.train(case, name, method="codyra") for case in asked}

    def way(shop: Workshop, stream: Stream) -> Learned:
        rate = shop.rate(name, lambda cases: _adapters(learn(shop, cases)))
        found = learn(shop, [at_rate(case, rate) for case in stream.cases])
        return _in_store(_store(shop, SubspaceSettings()), stream, lambda case: found[case.spec.name])

    return way


def trained_in_basis(method: str, columns: int = 0, **settings: Any) -> Way:
    """Each task trained by one method in the basis that those before it have left, and merged; at LoRA's rate.

    Args:
        columns: Temporary columns, where a quarter of every module's basis is as many.
    """

    def way(shop: Workshop, stream: Stream) -> Learned:
        store, rate = _store(shop, SubspaceSettings()), _lora_rate(shop)

        def learn(case: Case) -> Made:
            version = store.state.refs["candidate"]
            given = Given(version=version, basis=store.training_basis(version))
            most = min((min(basis.ranks) // 4 for basis in given.basis.values()), default=0)
            asked = settings | ({"temporary_columns": min(columns, most)} if method == "share" else {})
            chosen = _by(at_rate(case, rate), method, **asked)
            return shop.train(chosen, method, method=method, of=name_of(given) if version else "", given=given)

        return _in_store(store, stream, learn)

    return way


def auto(shop: Workshop, stream: Stream) -> Learned:
    """The default settings: each task is raced in the basis that those before it have left, and merged."""
    store, rate = _store(shop, SubspaceSettings()), _lora_rate(shop)
    notes: list[str] = []

    def learn(case: Case) -> Made:
        case, version = at_rate(case, rate), store.state.refs["candidate"]
        basis = name_of(Given(version=version, basis=store.training_basis(version)))
        made = shop.kept.made(case, "auto", basis, lambda: _raced(shop, case, store))
        notes.append(f"{case.spec.name}: {made.note}")
        return made

    return replace(_in_store(store, stream, learn), notes=tuple(notes))


def _raced(shop: Workshop, case: Case, store: SubspaceStore) -> Made:
    """What `auto` makes of a task; trainings that are there already count as long as they took."""
    started, waited, trained, numbers = time.perf_counter(), 0.0, 0.0, {}

    def train(case: Case, method: str, rows: Sequence[Row], which: str, given: Given) -> Adapter:
        nonlocal waited, trained
        before = time.perf_counter()
        of = "" if given is NOTHING else name_of(given)
        made = shop.train(case, method, rows, method=method, of=of, given=given)
        waited += time.perf_counter() - before
        trained += made.seconds
        numbers.setdefault(method, made.numbers)
        return made.adapter

    found = race(shop.base, case, store, train)
    seconds = trained + time.perf_counter() - started - waited
    kept = f"cut to {found.form.directions} and trained on" if found.form.directions else f"at {found.form.share:g}"
    note = f"{found.form.method} {kept} of {' and '.join(found.compared)}"
    return Made(found.adapter, numbers[found.form.method], seconds, note)


Way = Callable[[Workshop, Stream], Learned]
WAYS: Mapping[str, Way] = {
    "separate": separate,
    "longer": longer,
    "heads": heads,
    "truncated-4": truncated(4),
    "truncated-2": truncated(2),
    "truncated-1": truncated(1),
    "mean": one_for_all("mean"),
    "ties": one_for_all("ties"),
    "paper-8": merged_loras(variant="paper", rank_fixed=8),
    "paper-16": merged_loras(variant="paper", rank_fixed=16),
    "paper-32": merged_loras(variant="paper", rank_fixed=32),
    "canonical-8": merged_loras(rank_fixed=8),
    "canonical-16": merged_loras(rank_fixed=16),
    "canonical-32": merged_loras(rank_fixed=32),
    "ours-lora": merged_loras(),
    "auto": auto,
    "sequential": serially("sequential", serial.go_on, serial.newest),
    "ewc": consolidated,
    "o-lora": serially("o-lora", serial.beside, serial.newest),
    "slao": serially("slao", serial.from_orthogonal, serial.averaged),
    "joint": joint,
    "share-0": trained_in_basis("share"),
    "share-2": trained_in_basis("share", 2),
    "share-8": trained_in_basis("share", 8),
    "start-in-basis": trained_in_basis("lora", start_of_a="basis"),
    "codyra-ones": gated("ones"),
    "codyra-normal": gated("normal"),
    "compressed-16": jointly_compressed(16),
}
"""Name of a row to how it is made."""
TITLES: Mapping[str, str] = {
    "separate": "separate LoRA of rank 8 (reference)",
    "truncated-4": "separate LoRAs, each cut to rank 4",
    "truncated-2": "separate LoRAs, each cut to rank 2",
    "truncated-1": "separate LoRAs, each cut to rank 1",
    "longer": "separate LoRA of rank 8, trained on for half as many steps",
    "heads": "base model, trained heads",
    "mean": "mean of all adapters",
    "ties": "TIES of all adapters",
    "paper-8": "Share, the paper's form, k = 8",
    "paper-16": "Share, the paper's form, k = 16",
    "paper-32": "Share, the paper's form, k = 32",
    "canonical-8": "onebasis, LoRAs merged, fixed k = 8",
    "canonical-16": "onebasis, LoRAs merged, fixed k = 16",
    "canonical-32": "onebasis, LoRAs merged, fixed k = 32",
    "ours-lora": "onebasis, LoRAs merged, default promise",
    "auto": "**onebasis, default settings**",
    "sequential": "one LoRA, task after task",
    "ewc": "EWC",
    "o-lora": "O-LoRA",
    "slao": "SLAO",
    "joint": "one LoRA, all tasks at once (reference)",
    "share-0": "onebasis, `share` alone, φ = 0",
    "share-2": "onebasis, `share` alone, φ = 2",
    "share-8": "onebasis, `share` alone, φ = 8",
    "start-in-basis": "onebasis, LoRAs whose A starts in the basis",
    "codyra-ones": "onebasis, CoDyRA's adapters, gates from 1",
    "codyra-normal": "onebasis, CoDyRA's adapters, gates as published",
    "compressed-16": "Compress-then-Serve, k = 16",
}


def _by(case: Case, method: str, **settings: Any) -> Case:
    """The task, to be trained by a method."""
    asked = MethodSpec.model_validate({"name": method, **settings})
    return replace(case, spec=case.spec.model_copy(update={"method": asked}))


def _lora_rate(shop: Workshop) -> float:
    return shop.rate("lora", lambda cases: {c.spec.name: shop.train(c, "lora").adapter for c in cases})


def _loras(shop: Workshop, stream: Stream) -> dict[str, Made]:
    if stream.loras:
        return dict(stream.loras)
    rate = _lora_rate(shop)
    return {case.spec.name: shop.train(at_rate(case, rate), "lora") for case in stream.cases}


def _adapters(found: Mapping[str, Made]) -> dict[str, Adapter]:
    return {task: made.adapter for task, made in found.items()}


def _apart(stream: Stream, found: Mapping[str, Made]) -> Learned:
    """Adapters that nothing changes."""
    adapters = _adapters(found)
    served = {v: dict(list(adapters.items())[:count]) for v, count in enumerate(stream.counts, start=1)}
    own = sum(a.parameter_count for a in adapters.values() if any(u.energy for u in a.modules.values()))
    numbers, seconds = _took(found)
    return Learned(served, {}, numbers, 0, own, seconds)


def _one(stream: Stream, found: Mapping[str, Made], versions: Sequence[Modules]) -> Learned:
    """One update for all tasks that are there, version by version."""
    adapters = _adapters(found)
    served = {
        v: {task: replace(adapter, modules=modules) for task, adapter in list(adapters.items())[:count]}
        for v, (count, modules) in enumerate(zip(stream.counts, versions, strict=True), start=1)
    }
    numbers, seconds = _took(found)
    shared = sum(update.numbers for update in versions[-1].values())
    return Learned(served, {}, numbers, shared, 0, seconds, common=True)


def _in_store(store: SubspaceStore, stream: Stream, learn: Callable[[Case], Made]) -> Learned:
    """Learn and merge the tasks as they come."""
    found: dict[str, Made] = {}
    served: dict[int, dict[str, Adapter]] = {}
    merging = 0.0
    for version, count in enumerate(stream.counts, start=1):
        fresh = {case.spec.name: learn(case) for case in stream.cases[len(found) : count]}
        started = time.perf_counter()
        merged(store, _adapters(fresh), op_key=f"merge {version}")
        merging += time.perf_counter() - started
        found |= fresh
        served[version] = {task: store.adapter(task, version) for task in found}
    foot = store.footprint(len(stream.counts))
    numbers, seconds = _took(found)
    own = foot.coefficient_numbers + foot.private_numbers
    return Learned(served, _adapters(found), numbers, foot.basis_numbers, own, seconds + merging)


def _took(found: Mapping[str, Made]) -> tuple[float, float]:
    """Numbers that were trained for a task, mean, and the seconds of all trainings."""
    return sum(made.numbers for made in found.values()) / len(found), sum(made.seconds for made in found.values())


def _store(shop: Workshop, settings: SubspaceSettings) -> SubspaceStore:
    return SubspaceStore.open(fresh_storage(), settings=settings, base_model=shop.base.name, writer="benchmark")


def _digest(adapter: Adapter | None) -> str:
    return digest(adapter_to_bytes(adapter)) if adapter else ""


def _freeze(model: Any) -> None:
    for layer in lora_layers(model).values():
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
