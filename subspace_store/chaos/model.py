"""What must hold in the fault simulation: a plain-Python model that reads the raw records as they reach the disk.

It shares no code with the store. It is told of every effect on the disk and of every answer that the store gave, and
raises Violation at the first that breaks a promise:

* acknowledged: a request that was answered stands in the log once, with that version and those tasks;
* asked for: nothing is done later by itself. A request is done while a writer is asked for it, or by a write that was
  on its way when its outcome was reported as unknown; one that was reported as failed only if it is asked for again;
* immutable: no record and no blob is ever written over; a version reads the same to everybody, for ever, and its tasks
  are those that were delivered, or refined since;
* revised: a revision takes the place of the one before it, of which the version holds nothing any more; one that is put
  back is what it was; a removal leaves no revision of its task, on any version that is made again;
* told: a task's birth, its drift and its error are those of that very task, measured from the tensors; where the basis
  stays, no other task changes by a bit;
* fenced: only the writer that took the newest epoch adds records, and each follows from the state before it;
* reachable: every object that a live version needs exists as long as the version lives;
* collected: after a last collection no other object exists;
* no false alarm: the store never reports damage, because nothing here damages it (in simulation.py `Corrupt` counts as
  a violation).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspace_store.chaos.world import Violation

TOLERANCE = 1e-4
"""Largest entry of the difference between a delivered update and what a version holds of it; entries are about 1."""

HEAD = "head"
"""Name of the one tensor of a head, beside those of modules."""
SMALL = 1e-4
"""Largest difference between a share of a task's energy that is told and the one that is measured."""

Plain = Mapping[str, Any]
Updates = Mapping[str, Mapping[str, Tensor]]
"""Task id to module to its dense update."""


@dataclass(frozen=True)
class Told:
    """What the store says of a version beside its tensors."""

    births: Mapping[str, int]
    drift: Mapping[str, float]
    errors: Mapping[str, float]
    held: Set[str]
    """Tasks of which it has coefficients or private parts."""
    moved: Set[str]
    """Modules whose coefficients were moved from the parent's basis to another."""


class Model:
    """The promises of one run.

    Args:
        exact: Whether no merge takes anything from a task, so that a version holds what was delivered.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.present: Callable[[], Set[str]] = set
        """The keys on the disk."""
        self.lands_late: Callable[[], bool] = lambda: False
        """Whether the present effect on the disk is of a write that nobody waits for any more."""
        self.in_work: Counter[str] = Counter()
        """op_key to the number of writers that are asked for it now."""
        self.failed: set[str] = set()
        """op_key of every request that was reported as failed, and not asked for again."""
        self.seq = 0
        self.head_sha256 = ""
        self.epoch = 0
        self.owner = ""
        self.refs = {"candidate": 0, "main": 0}
        self.versions: dict[int, Plain] = {}
        self.published = {0}
        self.rejected: set[int] = set()
        self.done: dict[str, int] = {}
        """op_key to the version it made or concerned."""
        self.tags: dict[str, int] = {}
        self.pins: dict[tuple[int, str], float | None] = {}
        """(version, owner) to the time when it ends; None: never."""
        self.held = False
        self.quarantined: set[str] = set()
        self.expired: set[int] = set()
        self.heads: dict[str, str] = {}
        """Key of an adapter that was given up to the key of its head."""
        self.asked: dict[str, dict[str, str | None]] = {}
        """op_key of every merge that was asked for to its tasks, each with the task whose place it takes."""
        self.restoring: dict[str, tuple[str, bool]] = {}
        """op_key of every request to put a revision back to the revision, and whether `main` should move."""
        self.delivered: dict[str, Mapping[str, Tensor]] = {}
        """Task id to its dense updates and head, as handed over."""
        self.refined: dict[str, Mapping[str, Tensor]] = {}
        """sha256 of every adapter that was handed over for a refinement to its dense updates and head."""
        self.candidates: dict[str, int] = {}
        """op_key of every refinement that was asked for to the candidate that it was made on."""
        self.contents: dict[str, Mapping[str, Tensor] | None] = {}
        """Key of an adapter in the log to its dense updates and head. None: it was made from what a version held of the
        task, after merges that take from tasks."""
        self.expected: dict[int, dict[str, Mapping[str, Tensor] | None]] = {0: {}}
        """Version to task id to the adapter that it holds the task by."""
        self.acknowledged: dict[str, int] = {}
        self.seen: dict[int, Updates] = {}
        self.states = [self._state()]
        """State of the log after each sequence number."""

    # Effects on the disk

    def created(self, key: str, content: bytes) -> None:
        if key.startswith("log/"):
            self._record(key, content)
        elif key != "FORMAT" and not key.startswith("doctor/"):
            raise Violation(f"{key} was created with a condition; only the log needs one")

    def written(self, key: str, before: bytes | None, content: bytes) -> None:
        if key == "FORMAT" or (key.startswith("log/") and key != "log/_hint"):
            raise Violation(f"immutable: {key} was written without a condition")
        if key.startswith("blobs/") and before is not None and before != content:
            raise Violation(f"immutable: {key} was written over")

    def deleted(self, key: str) -> None:
        if key.startswith("log/") or key == "FORMAT":
            raise Violation(f"immutable: {key} was deleted")
        if key in self.needed():
            raise Violation(f"reachable: {key} was deleted, but a version that lives needs it")

    # What the store is asked, and answered

    def begun(self, op_key: str) -> None:
        """A writer is asked for a request."""
        self.failed.discard(op_key)
        self.in_work[op_key] += 1

    def ended(self, op_key: str) -> None:
        """A writer is no longer asked for a request, whatever it answered."""
        self.in_work[op_key] -= 1

    def not_written(self, op_key: str) -> None:
        """A writer that was not fenced said that a request has failed, and nobody else was asked for it."""
        self._must(op_key not in self.done, f"asked for: {op_key} was told as failed, and was done")
        self.failed.add(op_key)

    def answered(self, op_key: str, version: int) -> None:
        """The store said that a request is done. It has a record, even if it changed nothing: its key is remembered."""
        self._must(op_key in self.done, f"acknowledged: {op_key} was answered, and no record says it")
        self._must(self.done[op_key] == version, f"acknowledged: {op_key} made {self.done[op_key]}, not {version}")
        self.acknowledged[op_key] = version

    def refused(self, op_key: str, why: object) -> None:
        """A writer that was not fenced said that a request cannot be done."""
        self._must(op_key not in self.done, f"acknowledged: {op_key} was done, and is refused now: {why}")
        held = self._tasks_at(self.refs["candidate"])
        names = {task["name"]: id_ for id_, task in held.items()}
        if asked := self.asked.get(op_key):
            is_stopped = any(id_ in held or id_ in self.quarantined for id_ in asked)
            is_late = any(names.get(self._name(id_)) != old for id_, old in asked.items())
            self._must(is_stopped or is_late, f"acknowledged: {op_key} is refused: {why}")
        if op_key in self.restoring:
            back, publish = self.restoring[op_key]
            is_possible = self._name(back) in names and self._are_revisions(back, names[self._name(back)])
            is_possible = is_possible and back not in {*held, *self.quarantined} and bool(self._living(back))
            may_move = not publish or (not self.held and self.refs["main"] == self.refs["candidate"])
            self._must(not (is_possible and may_move), f"revised: {op_key} of {back} is refused: {why}")

    def observed(self, seq: int, state: Mapping[str, object]) -> None:
        """A reader or writer has folded the log up to a record."""
        if self.states[seq] != state:
            raise Violation(f"immutable: record {seq} leads to {self.states[seq]}, somebody folded {state}")

    def read(self, version: int, updates: Updates, told: Told) -> None:
        """A reader or writer has read a whole version."""
        tasks = list(self._tasks_at(version))
        self._must(list(updates) == tasks, f"version {version} has the tasks {tasks}, somebody read {list(updates)}")
        self._must(told.held <= {*tasks}, f"revised: version {version} has coefficients of {told.held - {*tasks}}")
        first = self.seen.setdefault(version, updates)
        for task in tasks:
            delivered = self.expected[version][task]
            for name, delta in updates[task].items():
                others = [first[task][name], *([delivered[name]] if self.exact and delivered else [])]
                same = all(float((delta - other).abs().max()) <= TOLERANCE for other in others)
                self._must(same, f"immutable: task {task} is not what it was in version {version}")
        self._check_what_is_told(version, updates, told)

    def _check_what_is_told(self, number: int, updates: Updates, told: Told) -> None:
        version, before = self.versions[number], self.seen.get(self.versions[number]["parent"], {})
        refined = {task["task_id"] for task in version["refined"]}
        for task in updates:
            births, known = self._births(number, task), told.births[task]
            self._must(known in births or not births, f"told: {task} was born in {births}, not {known}")
            energy = _energy(self.expected[number][task])
            if energy:
                lost = 1 - _energy(updates[task]) / energy
                same = abs(lost - told.errors[task] ** 2) <= SMALL
                self._must(same, f"told: version {number} lacks {lost:.2e} of {task}, not {told.errors[task] ** 2:.2e}")
            if task in before and task in told.drift and task not in refined:
                both = updates[task], before[task]
                moved = {name: both[0][name] - both[1][name] for name in both[0] if name != HEAD}
                if energy:
                    share, drift = _energy(moved) / energy, told.drift[task] ** 2
                    what = f"told: version {number} moved {task} by {share:.2e}, not {drift:.2e}"
                    self._must(abs(share - drift) <= SMALL, what)
                if not version["snapshot"]:  # which rounds coefficients
                    still = [name for name in moved if name not in told.moved]
                    same = all(both[0][name].equal(both[1][name]) for name in still)
                    self._must(same, f"told: {task} is not what it was to the bit in version {number}: {still}")
        stayed = [task for task in self._tasks_at(version["parent"]) if task not in _left(version)]
        self._must(list(told.drift) == stayed, f"told: version {number} has drifts of {list(told.drift)}, not {stayed}")

    def finished(self) -> None:
        """Every request was repeated until it was answered, and a last collection is over."""
        for op_key, version in self.acknowledged.items():
            self._must(self.done[op_key] == version, f"acknowledged: {op_key} is {self.done[op_key]} now")
        present = self.present()
        self._must(self.needed() <= present, f"reachable: {self.needed() - present} are gone")
        named = {ref["key"] for number in self.alive() for ref in self._refs(self.versions[number])}
        left = {key for key in present if key.startswith(("blobs/", "staging/"))} - self.needed() - named
        self._must(not left, f"collected: {sorted(left)} were left")

    # The fold

    def alive(self) -> list[int]:
        """Versions that anybody may read, beside the empty one."""
        return [number for number in self.versions if number not in self.expired]

    def lineage(self, number: int) -> list[Plain]:
        """The versions from this one down to the first."""
        line = []
        while number:
            line.append(self.versions[number])
            number = line[-1]["parent"]
        return line

    def needed(self) -> set[str]:
        """Keys without which a version that is alive could not be read."""
        refs: list[Plain] = []
        keys: set[str] = set()
        for number in self.alive():
            version = self.versions[number]
            refs += [version["basis"], *(self.versions[home]["basis"] for home in version["basis_versions"])]
            line = self._still_held(number)
            tasks = [task for _, held in line for task in held]
            keys |= {self.heads.get(key, key) for key in (task["adapter"]["key"] for task in tasks)}
            keys |= {task["private"]["key"] for task in tasks if task["private"]}
            for before, held in line:
                if before["snapshot"]:
                    refs.append(before["snapshot"])
                    break
                refs += [before["transport"]] if before["transport"] else []
                refs += [task["coefficients"] for task in held]
        return keys | {ref["key"] for ref in refs}

    def _still_held(self, number: int) -> list[tuple[Plain, list[Plain]]]:
        """The versions from this one down, each with the entries of tasks that it brought and that never left since."""
        found, gone = [], set[str]()
        for version in self.lineage(number):
            found.append((version, [task for task in self._brought(version) if task["task_id"] not in gone]))
            gone = gone - {*self._added(version)} | _left(version)
        return found

    @staticmethod
    def _adapters(version: Plain) -> dict[str, str]:
        return {task["task_id"]: task["adapter"]["key"] for task in Model._brought(version)}

    @staticmethod
    def _private(version: Plain) -> list[Plain]:
        return [task["private"] for task in Model._brought(version) if task["private"]]

    @staticmethod
    def _brought(version: Plain) -> list[Plain]:
        return [*version["added"], *version["refined"]]

    def _tasks_at(self, number: int) -> dict[str, Plain]:
        """Task id to the entry of the log that it is held by, in the order in which they joined."""
        tasks: dict[str, Plain] = {}
        for version in reversed(self.lineage(number)):
            tasks = {id_: task for id_, task in tasks.items() if id_ not in _left(version)}
            tasks |= {task["task_id"]: task for task in self._brought(version)}
        return tasks

    def _name(self, task: str) -> str:
        """A task's name; empty for one that was never merged."""
        added = (one for version in self.versions.values() for one in version["added"])
        return str(next((one["name"] for one in added if one["task_id"] == task), ""))

    def _are_revisions(self, one: str, other: str) -> bool:
        """Whether one took the place of the other at some time, perhaps with others between."""
        links = [
            {task["task_id"], task["replaces"]}
            for version in self.versions.values()
            for task in version["added"]
            if task["replaces"]
        ]
        known = {one}
        for _ in links:
            known |= {id_ for link in links if known & link for id_ in link}
        return other in known

    def _living(self, task: str) -> list[Plain]:
        """The entries of a task that some version holds, or held and changed, that lives and was not rejected."""
        lines = [self._still_held(number) for number in self.alive() if number not in self.rejected]
        return [entry for line in lines for _, held in line for entry in held if entry["task_id"] == task]

    def _births(self, number: int, task: str) -> set[int]:
        """The version by which a task that is held joined last, and a refinement of that version, which counts as its
        birth where nobody scored it before; empty where a compaction was made again without another task."""
        line = self.lineage(number)
        birth = next(version for version in line if task in self._added(version))
        if birth["remakes"] and not birth["parent"]:
            # A compaction, before which it was the same task.
            return set() if birth["removed"] else self._births(birth["remakes"], task)
        return {
            birth["number"],
            *(one["number"] for one in line if one["refined"] and one["parent"] == birth["number"]),
        }

    @staticmethod
    def _added(version: Plain) -> list[str]:
        return [task["task_id"] for task in version["added"]]

    def _refs(self, version: Plain) -> list[Plain]:
        tasks = [task[name] for task in self._brought(version) for name in ("adapter", "coefficients")]
        return [
            version["basis"],
            *tasks,
            *self._private(version),
            *(version[name] for name in ("transport", "snapshot") if version[name]),
        ]

    def _record(self, key: str, content: bytes) -> None:
        record = json.loads(content)
        op, body = record["op"], record["body"]
        what = f"record {record['seq']} ({op} by {record['writer']})"
        self._must(record["seq"] == self.seq + 1 and key == f"log/{record['seq']:020d}.json", f"{what} leaves a hole")
        self._must(record["prev_sha256"] == self.head_sha256, f"{what} does not follow from the one before")
        if op == "acquire":
            self._must(record["epoch"] == self.epoch + 1, f"{what} has epoch {record['epoch']} after {self.epoch}")
            self.epoch, self.owner = record["epoch"], record["writer"]
        else:
            mine = (record["epoch"], record["writer"]) == (self.epoch, self.owner)
            self._must(mine, f"fenced: {what} of epoch {record['epoch']} after {self.owner} took {self.epoch}")
            self._must(record["op_key"] not in self.done, f"acknowledged: {record['op_key']} was done twice")
            request = record["op_key"].split(" ")[0]  # a version made again has a key of its own, after a space
            unasked = self.lands_late() and request not in self.failed
            # Made again once more, because what it made the first time has expired, such a version has no key.
            makes_again = any(count and key.startswith(("remove", "compact")) for key, count in self.in_work.items())
            is_step = not request and makes_again
            is_asked = bool(self.in_work[request]) or is_step
            self._must(is_asked or unasked, f"asked for: {what} does {request} by itself")
            moves = self._moves(op, record)
            plain = _plain(op).replace("-", "_")
            concerned = int(getattr(self, f"_{plain}")(body, what) or body.get("version", 0))
            if record["op_key"]:
                self.done[record["op_key"]] = concerned
            added = {task["task_id"]: task["replaces"] for task in body["version"]["added"]} if plain == "merge" else {}
            if request in self.asked:
                self._must(
                    added == self.asked[request], f"revised: {what} brings {added}, asked was {self.asked[request]}"
                )
            if request in self.restoring:
                back, _ = self.restoring[request]
                self._must([*added] == [back] and all(added.values()), f"revised: {what} puts {added} back, not {back}")
            self._must(record["refs"] == moves, f"{what} moves {record['refs']}")
        self.refs.update(record["refs"])
        self.published.add(self.refs["main"])
        self.seq, self.head_sha256 = record["seq"], hashlib.sha256(content).hexdigest()
        self.states.append(self._state())

    def _moves(self, op: str, record: Plain) -> dict[str, int]:
        """The refs that an operation moves."""
        body = record["body"]
        if self.restoring.get(record["op_key"], ("", False))[1]:
            self._must(not self.held and self.refs["main"] == self.refs["candidate"], f"{op} moves main, which is held")
            return dict.fromkeys(("main", "candidate"), body["version"]["number"])
        if _plain(op) in ("merge", "refine"):
            return {} if body["version"]["remakes"] else {"candidate": body["version"]["number"]}
        if op == "publish":
            return {"main": body["version"]}
        if op == "reject":
            return {"candidate": self.refs["main"]}
        makes_again = op in ("remove", "compact")
        if op == "rollback" or (makes_again and "main" in record["refs"]):
            return {"main": body["version"], "candidate": body["version"]}
        return {"candidate": body["version"]} if makes_again else {}

    def _state(self) -> dict[str, object]:
        """The state that every reader must have that has folded the log up to here."""
        return {
            "refs": dict(self.refs),
            "published": {*self.published},
            "rejected": {*self.rejected},
            "tags": dict(self.tags),
            "pins": dict(self.pins),
            "held": self.held,
            "quarantined": {*self.quarantined},
            "expired": {*self.expired},
        }

    # Operations: each checks its record and applies it. A merge returns its version's number.

    def _merge(self, body: Plain, what: str) -> int:
        version = body["version"]
        number = int(version["number"])
        op = what.split("(")[1].split(" ")[0]
        is_private = bool(self._private(version)) or any(task["is_sized"] for task in self._brought(version))
        kind = "-renewed" if version["renewed_count"] else "-private" if is_private else ""
        kind = "-replacing" if _left(version) else kind
        self._must(op == _plain(op) + kind, f"{what} does not say whether it has private parts or renewed bases")
        self._must(number == max(self.versions, default=0) + 1, f"{what} uses the number {number}")
        before = self._tasks_at(version["parent"])
        for task in version["added"]:
            old = before.get(task["replaces"]) if task["replaces"] else None
            fits = not task["replaces"] or (old is not None and old["name"] == task["name"])
            self._must(fits, f"revised: {what} replaces {task['replaces']}, which is not there")
        self.versions[number] = version
        tasks = self._tasks_at(number)
        joined = {id_ for id_ in before if id_ not in _left(version)} & {*self._added(version)}
        names = [task["name"] for task in tasks.values()]
        self._must(not joined and len(names) == len({*names}), f"acknowledged: {what} has a task twice: {names}")
        if version["remakes"]:
            self._check_remake(version, what)
        else:
            self._must(version["parent"] == self.refs["candidate"], f"{what} is not on the candidate")
        self.expected[number] = {
            id_: delta for id_, delta in self.expected[version["parent"]].items() if id_ not in _left(version)
        } | {task["task_id"]: self._content(version, task) for task in self._brought(version)}
        gone = self.needed() - self.present()
        self._must(not gone, f"reachable: {what} needs {sorted(gone)}, which are not there")
        return number

    def _check_remake(self, version: Plain, what: str) -> None:
        """A version that is made again holds what it held, but for what is removed, and for earlier revisions that
        nobody has any more."""
        held, again = self._tasks_at(version["remakes"]), self._tasks_at(version["number"])
        others = {id_: task for id_, task in held.items() if id_ not in version["removed"]}
        lost = [id_ for id_ in others if id_ not in again]
        extra = {again[id_]["name"] for id_ in again if id_ not in others}
        self._must(
            extra <= {others[id_]["name"] for id_ in lost}, f"revised: {what} has {list(again)}, not {list(others)}"
        )
        for id_ in lost:
            newest = self._newest_of_stay(version["remakes"], id_)
            self._must(newest not in self._entries_alive(), f"acknowledged: {what} lost {id_}, which is there")

    def _newest_of_stay(self, number: int, task: str) -> Plain:
        """The entry of a task, held by a version of the candidate's lineage, by which it was refined last before it
        left."""
        newest = self._tasks_at(number)[task]
        line = [version for version in reversed(self.lineage(self.refs["candidate"])) if version["number"] > number]
        for version in line:
            if task in _left(version):
                break
            newest = next((one for one in version["refined"] if one["task_id"] == task), newest)
        return newest

    def _entries_alive(self) -> list[Plain]:
        return [task for number in self.alive() for _, held in self._still_held(number) for task in held]

    def _content(self, version: Plain, task: Plain) -> Mapping[str, Tensor] | None:
        """The dense updates of the adapter that a version brought a task by."""
        id_, key = task["task_id"], task["adapter"]["key"]
        if key not in self.contents:
            if id_ in version["approximate"]:
                remade = version["remakes"] or self.refs["candidate"]
                at = remade if id_ in self._tasks_at(remade) else None
                before = [entry for entry in self._living(id_) if entry["version"] != version["number"]]
                known = [self._newest_of_stay(at, id_)] if at else before
                newest = max(known, key=lambda entry: int(entry["version"]))
                self.contents[key] = self.contents[newest["adapter"]["key"]] if self.exact else None
            else:
                refined = self.refined.get(task["adapter"]["sha256"])
                self.contents[key] = self.delivered[id_] if task in version["added"] else refined
        return self.contents[key]

    def _refine(self, body: Plain, what: str) -> int:
        version = body["version"]
        parent = self.versions[version["parent"]]
        same = ("basis", "basis_versions", "module_count", "renewed_count", "rank_max")
        self._must([version[name] for name in same] == [parent[name] for name in same], f"{what} has another basis")
        self._must(not version["added"] and version["transport"] is None, f"{what} is a merge")
        self._must({task["task_id"] for task in version["refined"]} <= {*self._tasks_at(version["parent"])}, what)
        return self._merge(body, what)

    def _publish(self, body: Plain, what: str) -> None:
        self._must(body["version"] == self.refs["candidate"], f"{what}: the candidate is {self.refs['candidate']}")
        self._must(not self.held, f"{what}: main is held")

    def _reject(self, body: Plain, what: str) -> None:
        self._must(body["version"] == self.refs["candidate"], f"{what}: the candidate is {self.refs['candidate']}")
        self.rejected.add(body["version"])

    def _rollback(self, body: Plain, what: str) -> None:
        allowed = self.published - self.rejected - self.expired
        self._must(body["version"] in allowed, f"{what}: {body['version']} is not one of {allowed}")
        self.held = self.held or bool(body.get("hold"))

    def _remove(self, body: Plain, what: str) -> None:
        held = self._tasks_at(self.refs["candidate"])
        name = held[body["task_id"]]["name"]
        after = {*self._tasks_at(body["version"])}
        self._must(after == {*held} - {body["task_id"]}, f"acknowledged: {what} loses more than its task")
        line = [self._tasks_at(version["number"]).values() for version in self.lineage(body["version"])]
        has_name = any(task["name"] == name for tasks in line for task in tasks)
        self._must(not has_name, f"revised: {what} leaves a revision of {name}")
        self._must(body["version"] not in self.expired, f"{what}: it has expired")

    def _compact(self, body: Plain, what: str) -> None:
        tasks = {*self._tasks_at(self.refs["candidate"])}
        self._must({*self._tasks_at(body["version"])} == tasks, f"acknowledged: {what} holds other tasks")
        self._must(body["version"] not in self.expired, f"{what}: it has expired")

    def _scores(self, body: Plain, what: str) -> None:
        self._must(body["version"] in self.versions, f"{what}: no such version")

    def _tag(self, body: Plain, what: str) -> None:
        now = self.tags.get(body["name"], body["version"])
        self._must(now == body["version"], f"immutable: {what} moves the tag {body['name']}")
        self._must(body["version"] not in self.expired | self.rejected, f"{what}: it is gone")
        self.tags[body["name"]] = body["version"]

    def _pin(self, body: Plain, what: str) -> None:
        self._must(body["version"] not in self.expired, f"{what}: it has expired")
        self.pins[body["version"], body["owner"]] = body["until"]

    def _unpin(self, body: Plain, what: str) -> None:
        self.pins.pop((body["version"], body["owner"]), None)

    def _hold(self, body: Plain, what: str) -> None:
        self.held = True

    def _release(self, body: Plain, what: str) -> None:
        self.held = False

    def _quarantine(self, body: Plain, what: str) -> None:
        self.quarantined.add(body["task_id"])

    def _unquarantine(self, body: Plain, what: str) -> None:
        self.quarantined.discard(body["task_id"])

    def _drop_adapters(self, body: Plain, what: str) -> None:
        published = {
            key for n in self.published for before in self.lineage(n) for key in self._adapters(before).values()
        }
        self._must(body["heads"].keys() <= published, f"reachable: {what}: a task that was not published loses its own")
        self.heads |= {key: head["key"] for key, head in body["heads"].items()}
        gone = self.needed() - self.present()
        self._must(not gone, f"reachable: {what} needs {sorted(gone)}, which are not there")

    def _expire(self, body: Plain, what: str) -> None:
        pinned = {version for (version, _), until in self.pins.items() if until is None or until > body["now"]}
        kept = {*self.refs.values(), *self.tags.values(), *pinned} & {*body["versions"]}
        self._must(not kept, f"reachable: {what}: {kept} are named")
        self.expired |= {*body["versions"]}
        self.pins = {key: until for key, until in self.pins.items() if key[0] not in self.expired}

    @staticmethod
    def _must(holds: bool, otherwise: str) -> None:
        if not holds:
            raise Violation(otherwise)


def _plain(op: str) -> str:
    """An operation without what its name says of the version that it makes."""
    return op.removesuffix("-private").removesuffix("-renewed").removesuffix("-replacing")


def _left(version: Plain) -> set[str]:
    """Tasks of the parent that a version does not hold any more."""
    return {task["replaces"] for task in version["added"] if task["replaces"]}


def _energy(updates: Mapping[str, Tensor] | None) -> float:
    """‖ΔW‖²_F over all modules; 0 where it is not known."""
    return sum(float(delta.square().sum()) for name, delta in (updates or {}).items() if name != HEAD)
