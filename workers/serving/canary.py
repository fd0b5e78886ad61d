"""A share of the requests is answered by another version than `main`'s, and both are compared on what is really asked.

Who is in the share is decided by a request's key alone, so that whoever was in it stays in it, whichever replica
answers, and also when the share grows. Nothing here answers anything.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.settings import CanarySettings
from workers.serving.question import Answer

LATENCIES_KEPT = 1000
"""Requests of each side, the last ones, of which the latency is told."""
COUNTED = ("requests", "rows", "agreed")
"""What is counted of each task: requests that the canary answered, rows that both answered, and those alike."""
VALUES_ALIKE = 0.01
"""Largest difference of two numbers that agree, relative to the larger where that is above 1."""


def is_in(key: str, share: float) -> bool:
    """Whether a key is in the share. Of the keys of a larger share, all those of a smaller one are in it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def agree(one: Answer, other: Answer) -> bool:
    """Whether two versions say the same of a row: the same label, the same text, or nearly the same number."""
    if one.value is not None and other.value is not None:
        return _are_alike(one.value, other.value)
    if one.values is not None and other.values is not None:
        named = {*one.values} | {*other.values}
        return all(_are_alike(one.values.get(n, math.nan), other.values.get(n, math.nan)) for n in named)
    return (one.label, one.text) == (other.label, other.text)


def _are_alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0.0, abs_tol=VALUES_ALIKE * max(1.0, abs(one), abs(other)))


@dataclass
class _Side:
    requests: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def as_dict(self) -> dict[str, Any]:
        known = sorted(self.seconds)
        return {
            "requests": self.requests,
            "p50_seconds": statistics.median(known) if known else None,
            "p99_seconds": known[min(len(known) - 1, int(0.99 * len(known)))] if known else None,
        }


class Comparison:
    """How two versions answered what was asked since they stand beside each other. May be called from any thread."""

    def __init__(self, main: int, canary: int) -> None:
        self.versions = (main, canary)
        self._lock = threading.Lock()
        self._sides = {main: _Side(), canary: _Side()}
        self._tasks: dict[str, dict[str, int]] = {}
        self._failed = self._dropped = 0

    def took(self, version: int, seconds: float, tasks: Collection[str] = ()) -> None:
        """A request was answered by a version, so long after it came. tasks: Names of those that answered."""
        with self._lock:
            if (side := self._sides.get(version)) is not None:
                side.requests += 1
                side.seconds.append(seconds)
            for task in {*tasks} if version == self.versions[1] else ():
                self._of(task)["requests"] += 1

    def _of(self, task: str) -> dict[str, int]:
        return self._tasks.setdefault(task, dict.fromkeys(COUNTED, 0))

    def failed(self) -> None:
        """The canary could not answer a request, and `main`'s version did."""
        with self._lock:
            self._failed += 1

    def dropped(self) -> None:
        """A request of the canary's was not compared, because others waited."""
        with self._lock:
            self._dropped += 1

    def both(self, task: str, main: Answer, canary: Answer) -> None:
        """Both answered a row of a task, given by its name."""
        with self._lock:
            counts = self._of(task)
            counts["rows"] += 1
            counts["agreed"] += agree(main, canary)

    def as_dict(self) -> dict[str, Any]:
        """Numbers of the replica; `summed` makes one of several replicas'."""
        with self._lock:
            main, canary = self.versions
            return {
                "main_version": main,
                "version": canary,
                "main": self._sides[main].as_dict(),
                "canary": self._sides[canary].as_dict(),
                "failed": self._failed,
                "not_compared": self._dropped,
                "tasks": {task: dict(counts) for task, counts in self._tasks.items()},
            }


def summed(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the replicas' comparisons say together, of those that compare the newest pair of versions: counts are sums,
    latencies those of the slowest replica. None where none compares.

    Args:
        replicas: Facts of each, with `canary`.
    """
    told = [replica["canary"] for replica in replicas if replica.get("canary")]
    if not told:
        return None
    newest = max((one["main_version"], one["version"]) for one in told)
    told = [one for one in told if (one["main_version"], one["version"]) == newest]
    tasks: dict[str, dict[str, int]] = {}
    for one in told:
        for task, counts in one["tasks"].items():
            known = tasks.setdefault(task, dict.fromkeys(COUNTED, 0))
            tasks[task] = {name: known[name] + counts[name] for name in known}

    def side(name: str) -> dict[str, Any]:
        sides, told_of = [one[name] for one in told], ("p50_seconds", "p99_seconds")
        slowest = {key: max((s[key] for s in sides if s[key] is not None), default=None) for key in told_of}
        return {"requests": sum(s["requests"] for s in sides)} | slowest

    counts = {name: sum(one[name] for one in told) for name in ("failed", "not_compared")}
    both = {"main": side("main"), "canary": side("canary")}
    return {"main_version": newest[0], "version": newest[1], **both, **counts, "tasks": tasks}


@dataclass(frozen=True)
class Chosen:
    """The canary that a replica goes by now.

    Args:
        version: As the settings' `version` says, now.
    """

    settings: CanarySettings
    version: int
    comparison: Comparison

    def takes(self, key: str) -> bool:
        """Whether a request is the canary's."""
        return is_in(key, self.settings.share)

    def is_shadowed(self, key: str) -> bool:
        """Whether `main`'s version answers a request of the canary's, too."""
        return is_in(f"shadow {key}", self.settings.shadow)


def number_of(settings: CanarySettings, refs: Mapping[str, int]) -> int:
    """The version that the settings mean, now."""
    return refs[settings.version] if isinstance(settings.version, str) else settings.version
