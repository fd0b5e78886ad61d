"""Writes the golden store of this format: `python -m tests.subspace_store.golden`.

Run it once when FORMAT_NUMBER grows; the folders of older formats stay as they are, for ever. What a format learns to
say later has a folder of its own, whose name says what it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspace_store import Adapter, SubspaceStore, merge_writer
from subspace_store.log import version_log
from subspace_store.log.store_format import FORMAT_NUMBER
from subspace_store.log.version import TaskScore
from subspace_store.storage.local import LocalStorage
from tests.subspace_store.builders import (
    SHAPES,
    deltas,
    foundation_adapter,
    in_the_basis,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    trained_in,
)

GOLDEN = Path(__file__).parents[1] / "data" / "stores"
SETTINGS = {"energy_ratio_min": 0.9, "rank_max": 6, "beyond_rank_max": "drop"}


def write(folder: Path) -> None:
    """A small store in which everything that a log can say was said once."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 16
    store = opened(LocalStorage(str(folder / "store")), writer="first", **SETTINGS)
    for number in (1, 2):
        merged(store, {f"t{number}": random_adapter(number)})
        store.record_scores(
            number,
            [TaskScore(task_id=f"t{number}", score=0.5 + number / 10, count=100)],
            op_key=f"s{number}",
            actor="eve",
        )
        store.publish(number, op_key=f"p{number}", actor="eve")
    merged(
        store, {"wide": random_adapter(3, rank=2, shapes={**SHAPES, "layer.1.new": (9, 7)}), "t4": random_adapter(4)}
    )
    store.publish(3, op_key="p3", actor="eve")
    merged(store, {"bad": random_adapter(5)})
    store.reject(4, "too low", op_key="j4", actor="gate")
    store.quarantine("bad", "its data is wrong", actor="ann")
    store = opened(LocalStorage(str(folder / "store")), writer="second", **SETTINGS)
    one_module = {"layer.0.query": SHAPES["layer.0.query"]}
    merged(store, {"narrow": random_adapter(6, rank=3, shapes=one_module)})
    store.publish(5, op_key="p5", actor="eve")
    store.tag("gold", 3, actor="ann")
    store.pin(2, "audit", 2e9, actor="ann")
    store.remove("t2", op_key="r", actor="ann", reason="licence", publish=True)
    store.rollback(3, op_key="b", actor="ann", reason="look", hold=True)
    store.rollback(7, op_key="b2", actor="ann")
    store.release(actor="ann")
    store.drop_adapters(["t1"], actor="ann")
    store.expire([1, 4], actor="ann")
    opened(LocalStorage(str(folder / "store")), writer="third", **SETTINGS).collect()
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def write_refined(folder: Path) -> None:
    """A small store with refinements: of one of a group, of a task that was refined before, and one made again."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 4
    store = opened(LocalStorage(str(folder / "store")), writer="first", **SETTINGS)
    merged(store, {"t1": random_adapter(1), "t2": random_adapter(2)})
    for number, task in enumerate(("t2", "t2", "t1"), 2):
        refined(store, {task: in_the_basis(store, number, version=store.state.refs["candidate"])}, f"refine {number}")
        version = merged(store, {f"later-{number}": random_adapter(10 + number)})
        store.publish(version.number, op_key=f"p{number}", actor="gate")
    store.remove("later-2", op_key="r", actor="ann", reason="licence", publish=True)
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def write_private(folder: Path) -> None:
    """A small store with private parts: of most tasks, in every module or in one, refined once, and made again."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 4
    settings = {**SETTINGS, "beyond_rank_max": "private"}
    store = opened(LocalStorage(str(folder / "store")), writer="first", **settings)
    for number in range(1, 6):
        version = merged(store, {f"t{number}": random_adapter(number)})
        store.publish(version.number, op_key=f"p{number}", actor="gate")
    served = store.adapter("t5", 5)
    halved = {name: replace(update, sigma_R=update.sigma_R / 2) for name, update in served.modules.items()}
    version = refined(store, {"t5": replace(served, modules=halved)}, "refine 5")
    store.publish(version.number, op_key="p6", actor="gate")
    store.remove("t4", op_key="r", actor="ann", reason="licence", publish=True)
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def write_foundation(folder: Path) -> None:
    """A small store of tasks in the foundation: alone, in a group, in one module of two, refined, removed."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 4
    store = opened(LocalStorage(str(folder / "store")), writer="first", **{**SETTINGS, "beyond_rank_max": "private"})
    mixed = foundation_adapter(4)
    mixed = replace(mixed, modules=dict(mixed.modules) | {"layer.0.value": random_adapter(4).modules["layer.0.value"]})
    groups: list[dict[str, Adapter]] = [
        {"t1": foundation_adapter(1)},
        {"t2": random_adapter(2), "t3": foundation_adapter(3, directions=30)},
        {"t4": mixed},
        {"t5": foundation_adapter(5)},
    ]
    for number, group in enumerate(groups, start=1):
        store.publish(merged(store, group).number, op_key=f"p{number}", actor="gate")
    store.publish(refined(store, {"t3": foundation_adapter(6)}, "refine 3").number, op_key="p5", actor="gate")
    store.remove("t5", op_key="r", actor="ann", reason="licence", publish=True)
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def write_renewed(folder: Path) -> None:
    """A small store with renewed bases: tasks in them, one of them refined, beside them, and one made again."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 4
    settings = {"share": "if-it-pays", "seed_directions": 4, "renew_tasks": 3, "renew_directions": 5}
    store = opened(LocalStorage(str(folder / "store")), writer="first", **settings)
    for number in range(1, 4):
        store.publish(merged(store, {f"t{number}": random_adapter(number)}).number, op_key=f"p{number}", actor="gate")
    inside = {f"in-{number}": trained_in(store.training_basis(3), number) for number in (1, 2)}
    store.publish(merged(store, {**inside, "t4": random_adapter(4)}).number, op_key="p4", actor="gate")
    again = trained_in(store.basis_of("in-1", 4), 3)
    store.publish(refined(store, {"in-1": again}, "refine in-1").number, op_key="p5", actor="gate")
    store.remove("t2", op_key="r", actor="ann", reason="licence", publish=True)
    store.compact(op_key="c", actor="ann", publish=True)
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def write_revised(folder: Path) -> None:
    """A small store with revisions: of one of a group, of a task that was refined, put back, and made again."""
    shutil.rmtree(folder, ignore_errors=True)
    merge_writer.SNAPSHOT_EVERY, version_log.CHECKPOINT_EVERY = 3, 4
    settings = {**SETTINGS, "beyond_rank_max": "private"}
    store = opened(LocalStorage(str(folder / "store")), writer="first", **settings)
    merged(store, {"t1": random_adapter(1), "t2": random_adapter(2)})
    merged(store, {"t3": random_adapter(3)})
    merged(store, {"t1@2": random_adapter(4), "t4": random_adapter(5)}, replaces={"t1@2": "t1"})
    refined(store, {"t3": in_the_basis(store, 6, version=3)}, "refine 3")
    merged(store, {"t3@2": random_adapter(7)}, replaces={"t3@2": "t3"})
    store.publish(5, op_key="p5", actor="gate")
    store.restore_revision("t1", op_key="back", actor="ann", publish=True)
    merged(store, {"t5": random_adapter(8)})
    store.publish(7, op_key="p7", actor="gate")
    store.remove("t4", op_key="r", actor="ann", reason="licence", publish=True)
    store.expire([1, 2], actor="ann")
    opened(LocalStorage(str(folder / "store")), writer="second", **settings).collect()
    (folder / "expected.json").write_text(json.dumps(facts(reading(store.storage)), indent=1) + "\n")


def facts(reader: SubspaceStore) -> dict[str, Any]:
    """What any later code must read out of the store."""
    state = reader.state
    alive = [number for number in state.versions if number not in state.expired]
    return {
        "refs": dict(state.refs),
        "tags": dict(state.tags),
        "expired": list(state.expired),
        "published": list(state.published),
        "rejected": {str(number): why for number, why in state.rejected.items()},
        "quarantined": dict(state.quarantined),
        "scores": {str(n): {t: s.score for t, s in row.items()} for n, row in state.scores.items()},
        "removed": {str(n): list(v.removed) for n, v in state.versions.items() if v.removed},
        "history": [[entry.op, entry.actor, entry.summary] for entry in reader.history()],
        "versions": {
            str(number): {
                "parent": state.versions[number].parent,
                "ranks": {name: list(ranks) for name, ranks in reader.ranks(number).items()},
                "error_bounds": {
                    task: merged.error_at_birth + state.drift_bound(task, merged.version, number)
                    for task, merged in state.tasks_at(number).items()
                },
                "tasks": {
                    task: {
                        name: delta.flatten()[:5].tolist()
                        for name, delta in deltas(reader.adapter(task, number)).items()
                    }
                    for task in state.tasks_at(number)
                },
            }
            for number in alive
        },
    }


if __name__ == "__main__":
    write(GOLDEN / f"format-{FORMAT_NUMBER}")
    write_refined(GOLDEN / f"format-{FORMAT_NUMBER}-refined")
    write_private(GOLDEN / f"format-{FORMAT_NUMBER}-private")
    write_foundation(GOLDEN / f"format-{FORMAT_NUMBER}-foundation")
    write_renewed(GOLDEN / f"format-{FORMAT_NUMBER}-renewed")
    write_revised(GOLDEN / f"format-{FORMAT_NUMBER}-revised")
