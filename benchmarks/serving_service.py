"""Part `http` of serving.py: a real service with MiniLM-L6 that answers over HTTP by Ray Serve.

Latency of `/v1/predict` with one row a request, with 1, 16 and 64 clients that each ask one request after another, for
two tasks in turn; and the time from a rollback that was acknowledged until a reply names the version that `main` is at
then, ten times, while 4 clients ask.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from subspace_store.requests import Rollback
from tests.acceptance.conftest import Site
from tests.moto_server import free_port

CLIENTS = (1, 16, 64)
SECONDS = 15.0
MOVES = 10
TEXT = "Why was I charged twice for this payment?"
TASKS = ("payments/first", "payments/second")


def measure() -> dict[str, Any]:
    """Start a service, ask, move `main`, end it."""
    with tempfile.TemporaryDirectory(prefix="onebasis-bench-serving-") as folder:
        site = Site(Path(folder))
        try:
            site.run("up")
            for title in TASKS:
                site.run("submit", str(site.task_file(title.partition("/")[2])), "--wait")
            port = free_port()
            site.run("serve", "--port", str(port))
            return {"http": latencies(site, port), **moves(site, port)}
        finally:
            site.run("down")


def client(site: Site, port: int) -> httpx.Client:
    token = json.loads((site.folder / ".onebasis/server.json").read_text())["token"]
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60)


def ask(http: httpx.Client, task: str) -> int:
    """The version that answered."""
    reply = http.post("/v1/predict", json={"task": task, "inputs": TEXT})
    reply.raise_for_status()
    return int(reply.json()["version"])


def latencies(site: Site, port: int) -> dict[str, Any]:
    found = {}
    for count in CLIENTS:
        seconds: list[float] = []
        until = time.perf_counter() + SECONDS

        def work(seconds: list[float] = seconds, until: float = until) -> None:
            with client(site, port) as http:
                for turn in range(10**6):
                    began = time.perf_counter()
                    ask(http, TASKS[turn % len(TASKS)])
                    now = time.perf_counter()
                    seconds.append(now - began)
                    if now > until:
                        return

        together(work, count)
        ordered = sorted(seconds)
        found[f"{count} clients"] = {
            "p50_ms": 1000 * statistics.median(ordered),
            "p99_ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))],
            "requests_per_second": len(ordered) / SECONDS,
        }
    return found


def moves(site: Site, port: int) -> dict[str, Any]:
    """Seconds from a rollback until a reply names its version, while others ask."""
    stop, found = threading.Event(), []

    def load() -> None:
        with client(site, port) as http:
            while not stop.is_set():
                ask(http, TASKS[0])

    others = [threading.Thread(target=load) for _ in range(4)]
    for thread in others:
        thread.start()
    try:
        with client(site, port) as http:
            for move in range(MOVES):
                version = 1 + move % 2
                site.look(Rollback(version=version))
                began = time.perf_counter()
                while ask(http, TASKS[0]) != version:
                    pass
                found.append(time.perf_counter() - began)
    finally:
        stop.set()
        for thread in others:
            thread.join()
    return {"publish_to_served_seconds": statistics.median(found), "publish_to_served_seconds_most": max(found)}


def together(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
