"""Part `replicas` of serving.py: a real service whose replicas become two, on two Ray nodes, and one again.

Clients ask one request after another, for two tasks in turn, and look whether each reply is that of the version that
it names. Meanwhile: Ray Serve starts a second replica, which has room on the other node alone; `main` moves, and both
follow; the other node is killed, with all its processes, and comes back; and when nobody asks any more, one replica is
given back. Ray Serve's own delays (30 seconds of load before a replica comes, ten minutes without before it goes) are
part of the times. Both nodes are on this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.serving_service import TASKS, client
from configs.errors import Unavailable
from orchestrator.ray_head import ray_environment
from subspace_store.requests import Rollback
from tests.acceptance.conftest import Site
from tests.moto_server import free_port
from tests.ray_cluster import RAY, RayCluster, ray_cluster

CLIENTS, ROWS_MAX = 6, 2
MOVES = 6
TEXTS = ("Why was I charged twice for this payment?", "what is the exchange rate?", "my card has not arrived")
VERSIONS = (2, 3)
"""Those that hold both tasks."""
ALIKE = 1e-5
"""Largest difference of a probability to that of the same version, asked alone."""
PATIENCE_SECONDS = 1200.0

Expected = dict[tuple[str, int, str], list[float]]


def measure() -> dict[str, Any]:
    """Start a cluster, a service and its load; end them."""
    with ray_cluster(cpus=2) as cluster, tempfile.TemporaryDirectory(prefix="onebasis-bench-replicas-") as folder:
        site, port = Site(Path(folder)), free_port()
        (site.folder / "settings.yaml").write_text(yaml.safe_dump(settings(cluster, port)))
        try:
            site.run("up", "--config", "settings.yaml")
            for title in (*TASKS, "payments/third"):
                site.run("submit", str(site.task_file(title.partition("/")[2])), "--wait")
            with other_node(cluster) as node:
                return {"replicas": measured(site, port, node)}
        finally:
            site.run("down")


def settings(cluster: RayCluster, port: int) -> dict[str, Any]:
    """A worker and a replica fill the head; the other node has room for one replica."""
    known = yaml.safe_load((Path(__file__).resolve().parents[1] / "configs/local.yaml").read_text())
    answers = {"port": port, "proxies": "HeadOnly", "replicas_max": 2, "cpus": 1, "rows_max": ROWS_MAX}
    ray = {"address": cluster.address, "auth_token_path": str(cluster.token)}
    return {"base_model": known["base_model"], "teams": {"payments": {}}, "ray": ray, "serving": answers} | {
        "workers": {"count": 1, "cpus": 1}
    }


class Node:
    """The other Ray node."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [RAY, "start", f"--address={self._cluster.address}", "--num-cpus=1", "--block"],
            env={**os.environ, **ray_environment(self._cluster.token)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def keep(self) -> None:
        """Start it again where it has ended by itself: Ray gives up a node that a crowded machine lets wait."""
        if self._process.poll() is not None:
            self.start()

    def has(self, pid: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return pid in {one.pid for one in psutil.Process(self._process.pid).children(recursive=True)}
        return False

    def kill(self) -> None:
        """As a power cut would."""
        for one in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        self._process.wait(10)


@contextlib.contextmanager
def other_node(cluster: RayCluster) -> Iterator[Node]:
    node = Node(cluster)
    try:
        yield node
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            node.kill()


class Load:
    """Clients that ask until the load is ended."""

    def __init__(self, site: Site, port: int, expected: Expected) -> None:
        self._site, self._port, self._expected = site, port, expected
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.right: list[float] = []
        """When each right reply came."""
        self.refused = 0
        """Replies that said to ask again."""
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with client(self._site, self._port) as http:
            turn = number
            while not self._stop.is_set():
                turn += 1
                task, text = TASKS[turn % len(TASKS)], TEXTS[turn % len(TEXTS)]
                try:
                    version, said, problem = asked(http, task, text)
                except httpx.HTTPError as error:
                    version, said, problem = 0, [], repr(error)
                with self._lock:
                    if problem == "503":
                        self.refused += 1
                    elif problem or not alike(said, self._expected[task, version, text]):
                        self.wrong.append(problem or f"{task} by version {version}: {said}")
                    else:
                        self.right.append(time.monotonic())
                if problem:
                    time.sleep(0.1)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def longest_gap(self, since: float) -> float:
        """Seconds without any right reply."""
        times = [since, *sorted(at for at in self.right if at > since)]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def asked(http: httpx.Client, task: str, text: str, version: int | None = None) -> tuple[int, list[float], str]:
    """The version that answered, its probabilities, and what was wrong: a status, or nothing."""
    body = {"task": task, "inputs": text} | ({"version": version} if version else {})
    reply = http.post("/v1/predict", json=body)
    if reply.status_code != 200:
        return 0, [], "503" if reply.status_code == 503 else reply.text
    found = reply.json()
    return int(found["version"]), list(found["answers"][0]["probabilities"].values()), ""


def alike(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= ALIKE for a, b in zip(one, other, strict=True))


def measured(site: Site, port: int, node: Node) -> dict[str, Any]:
    """The times; a reply that is wrong fails it."""
    with client(site, port) as http:
        expected = {
            (task, v, text): asked(http, task, text, v)[1] for task in TASKS for v in VERSIONS for text in TEXTS
        }
    load, began = Load(site, port, expected), time.monotonic()
    try:
        waited(lambda: len(replicas(site)) == 2, node.keep)
        came = told("a second replica answers", began)
        assert sum(node.has(one["pid"]) for one in replicas(site)) == 1
        moves = [moved(site, VERSIONS[turn % 2]) for turn in range(MOVES)]
        refused, killed = load.refused, time.monotonic()
        node.kill()
        waited(lambda: sum(at > killed for at in load.right) > 20 * CLIENTS)
        told("right replies since the other node was killed", killed)
        gap, refused = load.longest_gap(killed), load.refused - refused
        node.start()
        began = time.monotonic()
        waited(lambda: any(node.has(one["pid"]) for one in replicas(site)), node.keep)
        back = told("a replica answers on it again", began)
    finally:
        load.end()
    quiet = time.monotonic()
    waited(lambda: len(replicas(site)) == 1)
    assert not load.wrong, load.wrong[:3]
    return {
        "clients": CLIENTS,
        "rows_max": ROWS_MAX,
        "right_replies": len(load.right),
        "wrong_replies": len(load.wrong),
        "second_replica_seconds": came,
        "both_follow_seconds": statistics.median(moves),
        "both_follow_seconds_most": max(moves),
        "node_lost": {"longest_gap_seconds": gap, "told_to_ask_again": refused, "replica_back_seconds": back},
        "given_back_seconds": told("one replica is given back", quiet),
    }


def replicas(site: Site) -> list[dict[str, Any]]:
    """What the replicas that answer say of themselves; nothing while the control plane of a crowded machine is late."""
    try:
        found = site.status()["serving"].get("base_models", {}).get("minilm", [])
    except Unavailable:
        return []
    return [one for one in found if "pid" in one]


def moved(site: Site, version: int) -> float:
    """Seconds from where `main` moved until both replicas answer by it."""
    site.look(Rollback(version=version))
    began = time.monotonic()
    waited(lambda: [one["version"] for one in replicas(site)] == [version] * 2)
    return told(f"both replicas answer by version {version}", began)


def told(what: str, began: float) -> float:
    """Seconds since then, said at once: the whole takes a quarter of an hour."""
    seconds = time.monotonic() - began
    print(f"{seconds:9.1f}  s: {what}", flush=True)
    return seconds


def waited(is_true: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait for something to become true."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        if time.monotonic() > until:
            raise SystemExit("the service did not come to what was waited for")
        meanwhile()
        time.sleep(0.1)
