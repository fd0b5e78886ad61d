"""What must hold in the fault simulation: a plain-Python model that reads the raw records as they reach the disk.

It shares no code with the store. It is told of every effect on the disk and of every answer that the store gave, and
raises Violation at the first that breaks a promise:

* acknowledged: a request that was answered stands in the log once, with that version and those tasks;
* asked for: nothing is done later by itself. A request is done while a writer is asked for it, or by a write that was
  on its way when its outcome was reported as unknown; one that was reported as failed only if it is asked for again;
* immutable: no record and no blob is ever written over; a version reads the same to everybody, for ever, and its tasks
  are those that were delivered, or refined since;
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
from typing import Any

from torch import Tensor

from subspace_store.chaos.world import Violation

TOLERANCE = 1e-4
"""Largest entry of the difference between a delivered update and what a version holds of it; entries are about 1."""

Plain = Mapping[str, Any]
Updates = Mapping[str, Mapping[str, Tensor]]
"""Task id to module to its dense update."""


class Model:
    """The promises of one run."""

    def __init__(self) -> None:
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
        self.asked: dict[str, tuple[str, ...]] = {}
        """op_key of every merge that was asked for to its tasks."""
        self.delivered: dict[str, Mapping[str, Tensor]] = {}
        """Task id to its dense updates and head, as handed over."""
        self.refined: dict[str, Mapping[str, Tensor]] = {}
        """sha256 of every adapter that was handed over for a refinement to its dense updates and head."""
        self.candidates: dict[str, int] = {}
        """op_key of every refinement that was asked for to the candidate that it was made on."""
        self.expected: dict[int, dict[str, Mapping[str, Tensor]]] = {0: {}}
        """Version to task id to the updates that it must hold of the task."""
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
        tasks = set(self.asked.get(op_key, ()))
        if tasks:
            held = {*self._tasks_at(self.refs["candidate"])}
            self._must(bool(tasks & (held | self.quarantined)), f"acknowledged: {op_key} is refused: {why}")
        if self.candidates.get(op_key) == self.refs["candidate"]:
            self._must(bool(self.quarantined), f"acknowledged: {op_key} is refused: {why}")

    def observed(self, seq: int, state: Mapping[str, object]) -> None:
        """A reader or writer has folded the log up to a record."""
        if self.states[seq] != state:
            raise Violation(f"immutable: record {seq} leads to {self.states[seq]}, somebody folded {state}")

    def read(self, version: int, updates: Updates) -> None:
        """A reader or writer has read a whole version."""
        tasks = {*self._tasks_at(version)}
        self._must(updates.keys() == tasks, f"version {version} has the tasks {tasks}, somebody read {set(updates)}")
        first = self.seen.setdefault(version, updates)
        for task in tasks:
            for name, delta in self.expected[version][task].items():
                for other in (delta, first[task][name]):
                    same = float((updates[task][name] - other).abs().max()) <= TOLERANCE
                    self._must(same, f"immutable: task {task} is not what it was in version {version}")

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
            line = self.lineage(number)
            keys |= {self.heads.get(key, key) for before in line for key in self._adapters(before).values()}
            keys |= {ref["key"] for before in line for ref in self._private(before)}
            for before in line:
                if before["snapshot"]:
                    refs.append(before["snapshot"])
                    break
                refs += [before["transport"]] if before["transport"] else []
                refs += [task["coefficients"] for task in self._brought(before)]
        return keys | {ref["key"] for ref in refs}

    @staticmethod
    def _adapters(version: Plain) -> dict[str, str]:
        return {task["task_id"]: task["adapter"]["key"] for task in Model._brought(version)}

    @staticmethod
    def _private(version: Plain) -> list[Plain]:
        return [task["private"] for task in Model._brought(version) if task["private"]]

    @staticmethod
    def _brought(version: Plain) -> list[Plain]:
        return [*version["added"], *version["refined"]]

    def _tasks_at(self, number: int) -> list[str]:
        return [task for version in self.lineage(number) for task in self._added(version)]

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
            self._must(record["refs"] == moves, f"{what} moves {record['refs']}")
        self.refs.update(record["refs"])
        self.published.add(self.refs["main"])
        self.seq, self.head_sha256 = record["seq"], hashlib.sha256(content).hexdigest()
        self.states.append(self._state())

    def _moves(self, op: str, record: Plain) -> dict[str, int]:
        """The refs that an operation moves."""
        body = record["body"]
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
        self._must(op == _plain(op) + kind, f"{what} does not say whether it has private parts or renewed bases")
        self._must(number == max(self.versions, default=0) + 1, f"{what} uses the number {number}")
        self.versions[number] = version
        tasks = self._tasks_at(number)
        self._must(len(tasks) == len(set(tasks)), f"acknowledged: {what} has a task twice: {tasks}")
        if version["remakes"]:
            others = set(self._tasks_at(version["remakes"])) - set(version["removed"])
            self._must(set(tasks) == others, f"acknowledged: {what} has {tasks} instead of {others}")
        else:
            self._must(version["parent"] == self.refs["candidate"], f"{what} is not on the candidate")
        # A task that is made again is as it is on the candidate now; one that is merged is as it was delivered.
        known = self.expected[self.refs["candidate"]] if version["remakes"] else self.delivered
        self.expected[number] = self.expected[version["parent"]] | {task: known[task] for task in self._added(version)}
        gone = self.needed() - self.present()
        self._must(not gone, f"reachable: {what} needs {sorted(gone)}, which are not there")
        return number

    def _refine(self, body: Plain, what: str) -> int:
        version = body["version"]
        parent = self.versions[version["parent"]]
        same = ("basis", "basis_versions", "module_count", "renewed_count", "rank_max")
        self._must([version[name] for name in same] == [parent[name] for name in same], f"{what} has another basis")
        self._must(not version["added"] and version["transport"] is None, f"{what} is a merge")
        self._must({task["task_id"] for task in version["refined"]} <= {*self._tasks_at(version["parent"])}, what)
        number = self._merge(body, what)
        self.expected[number] |= {t["task_id"]: self.refined[t["adapter"]["sha256"]] for t in version["refined"]}
        return number

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
        others = set(self._tasks_at(self.refs["candidate"])) - {body["task_id"]}
        self._must(set(self._tasks_at(body["version"])) == others, f"acknowledged: {what} loses more than its task")
        self._must(body["version"] not in self.expired, f"{what}: it has expired")

    def _compact(self, body: Plain, what: str) -> None:
        tasks = set(self._tasks_at(self.refs["candidate"]))
        self._must(set(self._tasks_at(body["version"])) == tasks, f"acknowledged: {what} holds other tasks")
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
    return op.removesuffix("-private").removesuffix("-renewed")
