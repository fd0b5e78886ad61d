"""The Ray side of the process monitor: one detached actor on each machine that has a worker, found by its machine.

Detached like the workers, and without any library of theirs: it outlives what it watches.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.process_monitor import ProcessEnd, ProcessMonitor

PREFIX = "@process-monitor-"
WAIT_SECONDS = 15.0
"""Longest wait for the end of a process whose calls have failed: Ray gives up a process before it has ended it, and one
with much memory takes seconds to give it back."""
ANSWER_SECONDS = 3.0
"""Time beyond it for an answer over the network."""

Watched = tuple[str, int]
"""Name of the monitor of a process's machine, and the process id there."""


@ray.remote
class ProcessMonitorActor:
    """Makes one ProcessMonitor and forwards to it."""

    def __init__(self) -> None:
        # What the raylet writes, wherever it is: the parent of every Ray process of this machine.
        self._does = ProcessMonitor(Path(f"/proc/{os.getppid()}/fd/1"))

    def watch(self, pid: int) -> None:
        self._does.watch(pid)

    def end_of(self, pid: int) -> ProcessEnd | None:
        return self._does.end_of(pid, WAIT_SECONDS)


def watched() -> Watched:
    """Who watches this process, an actor's."""
    return f"{PREFIX}{ray.get_runtime_context().get_node_id()}", os.getpid()


def watch_this_process() -> None:
    """Have this process, an actor's, watched by the monitor of its machine, which is started where there is none.

    Where that fails (the monitor is being started anew) nothing more is known of its end than that it ended.
    """
    context, (name, pid) = ray.get_runtime_context(), watched()
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        monitor = ProcessMonitorActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace=context.namespace,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=64,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
        ).remote()
        monitor.watch.remote(pid)


def ask_for_end(told: Any, namespace: str) -> Any:
    """Ask how a process ended.

    Args:
        told: Pending answer of its actor to `watched`, asked for while it lived.

    Returns:
        A pending call whose result is a ProcessEnd or None; it may fail, or never come back, if the machine is gone.
        None where it is not known who watched the process.
    """
    if not ray.wait([told], timeout=0)[0]:
        return None
    try:
        name, pid = ray.get(told)
        return ray.get_actor(name, namespace).end_of.remote(pid)
    except (ray.exceptions.RayError, ValueError):
        return None


def end_monitors(namespace: str) -> None:
    """End the monitors of a service's namespace, on all machines."""
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == namespace and found["name"].startswith(PREFIX):
            ray.kill(ray.get_actor(found["name"], namespace), no_restart=True)
