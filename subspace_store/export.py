"""Tasks of a version as folders that PEFT loads and, where they can, vLLM and LoRAX; or as files of diffusers.

One folder per task and version, `<team>+<task>@v<N>`, and beside them `adapters.json`, the list of all of them. The
content under a name never changes: a folder that exists is left alone if it holds this task of this version, and
refused if not. Folders appear whole (a killed export leaves at most a `.partial-…`, which may be deleted). Nothing is
read from the network here, and no model is loaded.

Which programs load an export is in loaders.py, and noted in every export: a task with a head of its own, as every
classifier has, is for PEFT alone. Servers take one alpha/r for all modules: so every export has one rank and scale 1.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound
from subspace_store.adapter import Adapter
from subspace_store.digests import digest
from subspace_store.formats import diffusers
from subspace_store.formats.adapters import write_adapter
from subspace_store.formats.loaders import LOADERS, refusals, vllm_max_rank
from subspace_store.formats.peft import export_rank, write_peft_folder
from subspace_store.log.version import MAIN, MergedTask
from subspace_store.subspace_reader import SubspaceReader

FACTS_FILE = "onebasis.json"  # in every exported folder: what it is
INDEX_FILE = "adapters.json"  # beside the folders: all of them


@dataclass(frozen=True)
class Exported:
    """One task of one version as a folder. Written as `onebasis.json` into it.

    Args:
        name: Name of the folder, and of the adapter in servers.
        task: `team/task`.
        version: The version it was read from.
        base_model: Source from which others load the base model.
        sources: sha256 of the adapter as delivered and of the version's basis, which determine the content.
        format: `peft` or `diffusers`.
        rank: Rank of every module.
        has_head: Whether it has a head of its own.
        files: Name of each file to its sha256.
        refused_by: Loader to the reason why it does not load this, or not all of it: see loaders.py.
        label_names: The label of each output, in order; empty where it has none or they are not known.
        base_sha256: sha256 of the base model's weights; empty where it is not known.
    """

    name: str
    task_id: str
    task: str
    version: int
    base_model: str
    sources: tuple[str, str]
    format: str
    rank: int
    has_head: bool
    files: dict[str, str]
    refused_by: dict[str, str]
    label_names: tuple[str, ...] = ()
    base_sha256: str = ""
    one_for_all: str = ""
    """How one update was made of those of `of_tasks`; empty where it is a task's own."""
    of_tasks: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    """Of one for all: task to ‖ΔW − ΔŴ‖ / ‖ΔW‖, by how much it is not that task's own."""
    left_out: str = ""
    """What these tasks have and it has not."""

    @property
    def loads_in(self) -> tuple[str, ...]:
        """The programs that load it, if they know the base model."""
        return tuple(loader for loader in LOADERS if loader not in self.refused_by)

    def as_facts(self) -> dict[str, Any]:
        """These facts as plain values, for `onebasis.json`, `adapters.json` and `--json`."""
        return asdict(self) | {"loads_in": list(self.loads_in), "vllm_max_lora_rank": self._vllm_rank}

    @property
    def _vllm_rank(self) -> int | None:
        return vllm_max_rank(self.rank) if "vllm" in self.loads_in else None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Exported:
        """The export with facts that `as_facts` wrote, or onebasis 0.3, which wrote no `refused_by`.

        Raises:
            TypeError, KeyError: The facts are not of this form.
        """
        values = {name: value for name, value in facts.items() if name not in ("loads_in", "vllm_max_lora_rank")}
        if "refused_by" not in values:
            kind, rank, has_head = values["format"], values["rank"], values["has_head"]
            values["refused_by"] = refusals(kind, rank=rank, has_head=has_head, modules=())
        texts = {name: tuple(values.get(name, ())) for name in ("sources", "label_names", "of_tasks")}
        return cls(**values | texts)


def export_name(task: str, version: int) -> str:
    """The name of the folder that a task of a version is exported to, `team+task@v3`.

    No name of a team or task has a `+` or `@` in it (`__` is possible), and any character but letters, digits and
    `_.-~` is written as %XX, so two tasks never share a name. vLLM's `name=path` and a shell need no quotes around it.
    """
    return "+".join(quote(part, safe="") for part in task.split("/")) + f"@v{version}"


def export_tasks(
    reader: SubspaceReader,
    folder: Path,
    version: int | None = None,
    tasks: Collection[str] | None = None,
    *,
    base_source: str,
) -> list[Exported]:
    """Write tasks as a version holds them, and bring `adapters.json` up to date.

    An entry of `adapters.json` is the task's `Exported`, its `path`, `loads_in` and `refused_by` (which programs load
    it, and why others do not), `vllm`: the value that vLLM's `--lora-modules` takes as JSON, and `vllm_max_lora_rank`,
    the smallest `--max-lora-rank` for it; both null where vLLM refuses the adapter. An adapter that came from diffusers
    goes out as diffusers' file, all others as PEFT folders.

    Args:
        folder: Made if absent.
        version: Default `main`.
        tasks: Ids or names (`team/task`); default all.
        base_source: Source from which servers load the base model: a hub id or a folder.

    Returns:
        The exported tasks, oldest first, including those that were there already.

    Raises:
        NotFound: No such version, or a task that it does not hold.
        Conflict: A folder of that name holds something else. Those written before it stay.
        Corrupt: A stored object is damaged; names the task, and tells how many were written before it and stay.
        InvalidInput: The folder cannot be written to, or two tasks have one name.

    Cost:
        A folder that is there already costs reading it once.
    """
    number = reader.state.refs[MAIN] if version is None else version
    chosen = _chosen(reader, number, tasks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exported: list[Exported] = []
        try:
            for task in chosen:
                exported.append(_export(reader, folder, number, task, base_source))
            return exported
        except Corrupt as error:
            todo = (
                f"{len(exported)} of {len(chosen)} adapters were written to {folder} before it, and {INDEX_FILE} lists "
                f"what is whole; name tasks to export others than {chosen[len(exported)].name}"
            )
            raise Corrupt(error.what, error.where, "; ".join(filter(None, (error.todo, todo)))) from error
        finally:
            _write_index(folder)
    except OSError as error:
        raise InvalidInput(f"cannot write there: {error}", str(folder), "name a folder you may write to") from error


def export_one(
    reader: SubspaceReader,
    folder: Path,
    version: int | None = None,
    tasks: Collection[str] | None = None,
    *,
    way: str,
    rank: int,
    base_source: str,
) -> Exported:
    """Write one adapter for several tasks, made of what a version holds of them, as the folder `one=WAY@vN`.

    No head is in it: each task has its own, made for its own update, and `left_out` says so. Which task an input is for
    is not told to it.

    Args:
        tasks: Ids or names (`team/task`); default all.
        way: One of `subspace_store.merging.one_for_all.ONE_FOR_ALL`.
        rank: Most directions of a module.

    Raises:
        NotFound: No such version, or a task that it does not hold.
        InvalidInput: Fewer than two tasks, no such way, tasks whose weights lie the other way round, or that came from
            diffusers; or the folder cannot be written to.
        Conflict: A folder of that name holds something else.
    """
    from subspace_store.merging.one_for_all import ONE_FOR_ALL
    from subspace_store.merging.variants import one_for_all, relative_error

    number = reader.state.refs[MAIN] if version is None else version
    chosen = _chosen(reader, number, tasks)
    if way not in ONE_FOR_ALL:
        raise InvalidInput(f"there is no way '{way}' to make one of all", "--one", f"ways: {', '.join(ONE_FOR_ALL)}")
    if len(chosen) < 2:
        raise InvalidInput(f"version {number} holds {len(chosen)} of them", "--one", "name two tasks at least")
    adapters = {task.task_id: reader.adapter(task.task_id, number) for task in chosen}
    if len({adapter.info.get("fan_in_fan_out", "false") for adapter in adapters.values()}) > 1:
        raise InvalidInput("the weights of some lie the other way round", "--one", "name tasks that are alike")
    if any(adapter.info.get("format") == diffusers.FORMAT for adapter in adapters.values()):
        raise InvalidInput("LoRAs of diffusers are not made one", "--one", "export them one by one")
    common, first = one_for_all(adapters, way, rank), next(iter(adapters.values()))
    names = {task.task_id: task.name for task in chosen}
    errors = {names[task_id]: relative_error(adapter.modules, common) for task_id, adapter in adapters.items()}
    kinds = {adapter.info.get("task_type", "") for adapter in adapters.values()}
    info = {name: first.info[name] for name in ("fan_in_fan_out",) if name in first.info}
    info |= {"task_type": kinds.pop()} if len(kinds) == 1 else {}
    headed = sum(bool(adapter.head) for adapter in adapters.values())
    left_out = (
        f"the heads of {headed} of {len(chosen)} tasks: each has its own labels, and was trained with its own update"
        if headed
        else ""
    )
    one = Adapter(first.base_model, first.base_sha256, common, {}, info)
    delivered = digest(" ".join(task.adapter.sha256 for task in chosen).encode())
    sources = (delivered, reader.state.versions[number].basis.sha256)
    name = f"one={way}@v{number}"
    known = {
        "version": number,
        "base_model": base_source,
        "sources": list(sources),
        "one_for_all": way,
        "rank": export_rank(common.values()),
    }
    exported = Exported(
        name=name,
        task_id="",
        task="",
        version=number,
        base_model=base_source,
        sources=sources,
        format="peft",
        rank=export_rank(common.values()),
        has_head=False,
        files={},
        refused_by=refusals("peft", rank=export_rank(common.values()), has_head=False, modules=common),
        base_sha256=first.base_sha256,
        one_for_all=way,
        of_tasks=tuple(names.values()),
        errors=errors,
        left_out=left_out,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if (folder / name).exists():
                return _already_there(folder / name, known)
            return _written(folder, exported, lambda partial: write_peft_folder(partial, one, base_source), known)
        finally:
            _write_index(folder)
    except OSError as error:
        raise InvalidInput(f"cannot write there: {error}", str(folder), "name a folder you may write to") from error


def _chosen(reader: SubspaceReader, number: int, tasks: Collection[str] | None) -> list[MergedTask]:
    if number and number not in reader.state.versions:
        raise NotFound(f"there is no version {number}", reader.storage.url)
    held = list(reader.state.tasks_at(number).values())
    for wanted in tasks or ():
        if not any(wanted in (task.task_id, task.name) for task in held):
            raise NotFound(f"version {number} holds no task {wanted}", reader.storage.url)
    chosen = [task for task in held if tasks is None or task.task_id in tasks or task.name in tasks]
    for task in chosen:
        if [other.name for other in chosen].count(task.name) > 1:
            raise InvalidInput(f"version {number} holds several tasks named {task.name}", todo="name one by its id")
    return chosen


def _export(reader: SubspaceReader, folder: Path, number: int, task: MergedTask, base_source: str) -> Exported:
    name = export_name(task.name, number)
    sources = (task.adapter.sha256, reader.state.versions[number].basis.sha256)
    known = {"task_id": task.task_id, "version": number, "base_model": base_source, "sources": list(sources)}
    if (folder / name).exists():
        return _already_there(folder / name, known)
    adapter = reader.adapter(task.task_id, number)
    kind = adapter.info.get("format", "peft")
    rank = export_rank(adapter.modules.values())
    has_head = bool(adapter.head)
    exported = Exported(
        name=name,
        task_id=task.task_id,
        task=task.name,
        version=number,
        base_model=base_source,
        sources=sources,
        format=kind,
        rank=rank,
        has_head=has_head,
        files={},
        refused_by=refusals(kind, rank=rank, has_head=has_head, modules=adapter.modules),
        label_names=adapter.label_names,
        base_sha256=adapter.base_sha256,
    )

    return _written(folder, exported, lambda partial: write_adapter(partial, adapter, base_source), known)


def _written(folder: Path, exported: Exported, write: Callable[[Path], None], known: dict[str, Any]) -> Exported:
    """An export whose folder appears whole.

    Args:
        exported: Without its files.
        write: Writes them into a folder.
        known: As in `_already_there`.
    """
    partial = folder / f".partial-{secrets.token_hex(8)}"
    try:
        write(partial)
        files = {path.name: digest(path.read_bytes()) for path in sorted(partial.iterdir())}
        exported = replace(exported, files=files)
        (partial / FACTS_FILE).write_text(_json(exported.as_facts()), encoding="utf-8")
        _flush(*partial.iterdir(), partial)
        try:
            partial.rename(folder / exported.name)
        except OSError:
            # Another export was faster, or the disk refuses.
            if not (folder / exported.name).exists():
                raise
            return _already_there(folder / exported.name, known)
        return exported
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _already_there(place: Path, known: dict[str, Any]) -> Exported:
    """The result of an earlier export, if it is what this one would write and nobody has changed it since."""
    try:
        facts = json.loads((place / FACTS_FILE).read_text(encoding="utf-8"))
        is_same = {key: facts[key] for key in known} == known
        is_whole = all(digest((place / file).read_bytes()) == sha256 for file, sha256 in facts["files"].items())
        exported = Exported.from_facts(facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        is_same = is_whole = False
    if not (is_same and is_whole):
        todo = "a name never means two things: export to another folder, or remove this one"
        raise Conflict("holds something else than this task of this version", str(place), todo)
    return exported


def _write_index(folder: Path) -> None:
    """Write `adapters.json` from the folders alone, so that the next export repairs what an interrupted one left."""
    entries = []
    for path in sorted(folder.glob(f"[!.]*/{FACTS_FILE}")):
        try:
            exported = Exported.from_facts(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            continue  # edited by somebody: what it holds is not known any more
        place = {"path": str(path.parent.resolve())}
        served = {"name": exported.name, **place, "base_model_name": exported.base_model}
        entries.append(exported.as_facts() | place | {"vllm": served if "vllm" in exported.loads_in else None})
    temporary = folder / f".partial-{secrets.token_hex(8)}"
    temporary.write_text(_json(entries), encoding="utf-8")
    temporary.replace(folder / INDEX_FILE)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _flush(*paths: Path) -> None:
    """Flush files and folders to the disk, before a name points to them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
