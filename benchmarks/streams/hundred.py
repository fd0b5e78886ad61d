"""The stream of adapters only: a hundred that were trained apart arrive ten at a time, and nothing is trained again.

The adapters are of tasks of eleven BANKING77 intents each, as `make bench-capacity BENCH="related --data FOLDER --tasks
50"` keeps them in a folder: of each task a LoRA of rank 8 of all its training rows, and one of those that are left when
validation rows are set aside. Where these are fewer than a hundred, adapters follow that were trained in other bases.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from benchmarks import real_streams
from benchmarks.real_streams import Case
from benchmarks.streams.kept import Made
from benchmarks.streams.orders import Stream
from subspace_store import adapter_from_bytes

ADAPTERS, AT_ONCE = 100, 10
ONE_IN = 2
"""One of so many test rows of each task is scored on: there are a hundred tasks."""
FILE = re.compile(r"banking-(?P<number>\d+)-(?P<kind>lora-all|lora|share-all|share)(-in-[0-9a-f]+)?")
KINDS = ("lora-all", "lora", "share-all", "share")


def hundred(data: Path, folder: Path, count: int = ADAPTERS, at_once: int = AT_ONCE) -> Stream:
    """The stream of the folder's adapters, LoRAs first."""
    named = {file.stem: match for file in folder.glob("*.safetensors") if (match := FILE.fullmatch(file.stem))}
    order = sorted(named, key=lambda stem: (KINDS.index(named[stem]["kind"]), int(named[stem]["number"])))[:count]
    if len(order) < count:
        raise SystemExit(
            f"{folder} has {len(order)} adapters of related tasks and {count} are needed: "
            f'make bench-capacity BENCH="related --data {data} --tasks {count // 2} --keep …" trains them'
        )
    tasks = list(real_streams.related(data, 1 + max(int(named[stem]["number"]) for stem in order)))
    cases = [_named(tasks[int(named[stem]["number"])], stem) for stem in order]
    read = {stem: adapter_from_bytes((folder / f"{stem}.safetensors").read_bytes(), stem) for stem in order}
    loras = {stem: Made(adapter, adapter.parameter_count, 0.0) for stem, adapter in read.items()}
    return Stream("hundred", tuple(cases), at_once, loras)


def _named(case: Case, name: str) -> Case:
    return replace(case, spec=case.spec.model_copy(update={"name": name}), test=case.test[::ONE_IN])
