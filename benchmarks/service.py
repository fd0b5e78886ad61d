"""What the service does for many at once: `make bench-service`; one part: make bench-service BENCH=clients.

Prints and writes benchmarks/results/service.json, where a part that was not run keeps its figures. Parts: `clients`,
`uploads` and `observability`, against a real `onebasis up` in a temporary folder, and `matrix`, against a control plane
whose workers are stand-ins.

clients        200 clients with a token each ask as fast as they are answered, 60 seconds long, and 50 streams listen to
               all events: requests a second, their times, errors, memory, and what each stream missed. One request in
               ten writes: it pauses or resumes a task that waits
uploads        megabytes a second of a file that is sent in pieces of 8 MiB and checked by its digest, in turns with a
               plain HTTP server that writes what it gets to a file
observability  processor seconds of the control plane for each request, with traces sent to a collector and metrics read
               once a slice, and without, in turns; here one request in ten submits a task, or cancels it. On a
               machine that does other things two slices of one kind differ by more than what is measured: hence
               the mean over slices with its standard error, and what making traces takes by itself
matrix         the page of 1,000 tasks under 500 versions in Chromium: from the answer's last byte until it is drawn;
               and the answer itself

The clients run in this process, and the service beside it on the same machine: on two cores, each has one.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests/

from benchmarks.queue_service import service, spec_of  # noqa: E402
from configs.settings import Settings, TracingSettings  # noqa: E402
from orchestrator.api.client import Client  # noqa: E402
from orchestrator.api.requests import (  # noqa: E402
    CreateToken,
    Pause,
    ShowMatrix,
    Submit,
)
from orchestrator.reports.prometheus import Meter  # noqa: E402
from orchestrator.reports.traces import Traces  # noqa: E402
from orchestrator.tasks.audit_log import AuditLog  # noqa: E402
from orchestrator.tasks.task_queue import TaskQueue  # noqa: E402
from orchestrator.tasks.trace_book import REQUESTS, TraceBook  # noqa: E402
from orchestrator.tasks.uploads import PIECE_BYTES_MAX  # noqa: E402
from tests.acceptance.conftest import Site  # noqa: E402
from tests.browser.install import CHROMIUM, install_playwright  # noqa: E402
from tests.orchestrator.receiver import Receiver  # noqa: E402

OUT = ROOT / "benchmarks/results/service.json"
CLIENTS, STREAMS, SECONDS = 200, 50, 60.0
PUBLISHED, WAITING = 3, 100
WRITES = 0.1
READS = {
    "/v1/tasks?limit=50": 30,
    "/v1/tasks/payments/{waiting}": 25,
    "/v1/status": 15,
    "/v1/scores": 10,
    "/v1/versions": 5,
    "/v1/teams": 5,
}
"""Paths to how often they are asked, relative to each other."""
FILE_BYTES = 256 * 2**20
TURNS = 3
SLICES, SLICE_SECONDS = 9, 6.0
"""Slices with, and one more without, each so long."""
FEW_CLIENTS, FEW_STREAMS = 20, 5
"""In those slices: the processor is busy, but nobody waits long."""
SCRAPE_SECONDS = 15.0
TARGETS = {"errors": 0, "matrix_1000x500_seconds": 1.0, "observability_cost": 0.02}


class Bench:
    """A service with some history, and tokens for all clients."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.client = Client(site.folder / ".onebasis")
        facts = json.loads((site.folder / ".onebasis/server.json").read_text())
        self.url, self.process = facts["url"], psutil.Process(facts["pid"])
        self.first = first = spec_of(site, "task-0")
        for number in range(PUBLISHED):
            self.client.ask(Submit(task=first.model_copy(update={"name": f"task-{number}"}), by="bench"))
        for number in range(PUBLISHED):
            site.wait_for_state(f"payments/task-{number}", "published")
        self.client.ask(Pause(reason="benchmark", by="bench"))
        self.waiting = [f"waits-{number}" for number in range(WAITING)]
        for name in self.waiting:
            self.client.ask(Submit(task=first.model_copy(update={"name": name}), by="bench"))
        print(f"{PUBLISHED} published tasks, {WAITING} that wait", flush=True)

    def tokens(self, count: int, prefix: str) -> list[str]:
        asked = (CreateToken(name=f"{prefix}-{n}", role="maintainer", team="payments") for n in range(count))
        return [self.client.ask(one)["token"] for one in asked]


@contextmanager
def bench() -> Iterator[Bench]:
    with service() as site:
        yield Bench(site)


# --- many clients ------------------------------------------------------------------------------------------------


class Load:
    """Clients and streams, and what came of them."""

    def __init__(self, bench: Bench, tokens: list[str], lives: str = "") -> None:
        """lives: What writes submits tasks whose names begin so, and cancels them; empty: it pauses and resumes."""
        self.bench, self.tokens, self.lives = bench, tokens, lives
        self.seconds: dict[str, list[float]] = {}
        self.errors: Counter[str] = Counter()
        self.heard: list[list[int]] = []
        self._until = 0.0

    @property
    def count(self) -> int:
        return sum(map(len, self.seconds.values()))

    def run(self, clients: int, streams: int, seconds: float) -> None:
        asyncio.run(self._run(clients, streams, seconds))

    async def _run(self, clients: int, streams: int, seconds: float) -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(
            self.bench.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout
        ) as session:
            self.heard = [[] for _ in range(streams)]
            listening = [
                asyncio.create_task(self._listen(session, self.tokens[n], heard)) for n, heard in enumerate(self.heard)
            ]
            await asyncio.sleep(1.0)  # until all of them listen
            self._until = time.monotonic() + seconds
            await asyncio.gather(*(self._ask(session, n, self.tokens[n]) for n in range(clients)))
            await asyncio.sleep(3.0)  # until the last event has come
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)

    async def _ask(self, session: aiohttp.ClientSession, number: int, token: str) -> None:
        chance, headers = random.Random(number), {"authorization": f"Bearer {token}"}
        paths, weights = list(READS), list(READS.values())
        writes = self._writes(number)
        while time.monotonic() < self._until:
            body: dict[str, Any] | None
            if chance.random() < WRITES:
                name, path, body = next(writes)
            else:
                (path,) = chance.choices(paths, weights)
                body, name = None, "task" if "waiting" in path else path.split("/")[2].split("?")[0]
                path = path.replace("{waiting}", chance.choice(self.bench.waiting))
            began = time.perf_counter()
            try:
                async with session.request(
                    "GET" if body is None else "POST", path, json=body, headers=headers
                ) as answer:
                    await answer.read()
                    if answer.status != 200:
                        self.errors[f"{name} {answer.status}"] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.errors[f"{name} {type(error).__name__}"] += 1
            self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def _writes(self, number: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Name, path and body of what a client writes, one after another."""
        waiting = {"reference": f"payments/{self.bench.waiting[number % WAITING]}"}
        for turn in itertools.count():
            if not self.lives:
                yield "pause", "/v1/pause", waiting
                yield "resume", "/v1/resume", waiting
                continue
            task = self.bench.first.model_copy(update={"name": f"{self.lives}-{number}-{turn}"})
            yield "submit", "/v1/tasks", {"task": task.model_dump(mode="json", exclude_defaults=True)}
            yield "cancel", f"/v1/cancel/payments/{task.name}", {}

    async def _listen(self, session: aiohttp.ClientSession, token: str, heard: list[int]) -> None:
        headers = {"authorization": f"Bearer {token}", "accept": "text/event-stream"}
        try:
            async with session.get("/v1/events", headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as answer:
                if answer.status != 200:
                    self.errors[f"stream {answer.status}"] += 1
                last = 0
                async for line in answer.content:
                    if line.startswith(b"id:"):
                        last = int(line[3:])
                    elif line.startswith(b"data:"):
                        heard.append(last)
            self.errors["stream ended"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.errors[f"stream {type(error).__name__}"] += 1


def clients(bench: Bench) -> dict[str, Any]:
    load = Load(bench, bench.tokens(CLIENTS, "client"))
    process, stop = bench.process, threading.Event()
    peaks = {"memory_mib": 0.0, "threads": 0.0, "files": 0.0}

    def watch() -> None:
        while not stop.wait(0.5):
            seen = {"memory_mib": _mib(process), "threads": process.num_threads(), "files": process.num_fds()}
            peaks.update({name: max(peaks[name], value) for name, value in seen.items()})

    before, watcher, spent = _mib(process), threading.Thread(target=watch), process.cpu_times()
    watcher.start()
    load.run(CLIENTS, STREAMS, SECONDS)
    stop.set()
    watcher.join()
    after = process.cpu_times()
    every = sorted(one for some in load.seconds.values() for one in some)
    all_events = sorted({event for heard in load.heard for event in heard})
    # The first event that each has heard is the first after it began to listen.
    missed = sum(len([one for one in all_events if heard and one >= heard[0]]) - len(heard) for heard in load.heard)
    found = {
        "requests": load.count,
        "requests_per_second": load.count / SECONDS,
        **_times(every),
        "by_route": {name: {"count": len(some), **_times(sorted(some))} for name, some in sorted(load.seconds.items())},
        "cpu_milliseconds_per_request": 1000 * (after.user + after.system - spent.user - spent.system) / load.count,
        "errors_told": dict(load.errors),
        "events": len(all_events),
        "events_missed_or_doubled": missed,
        "memory_mib_before": before,
        "memory_mib_after": _mib(process),
        **{f"{name}_most": value for name, value in peaks.items()},
    }
    return {"errors": load.errors.total() + abs(missed), "clients": found}


def _times(ordered: list[float]) -> dict[str, float]:
    return {
        "p50_seconds": ordered[len(ordered) // 2],
        "p99_seconds": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "most_seconds": ordered[-1],
    }


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


# --- files -------------------------------------------------------------------------------------------------------


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """A server that writes the body of each PUT behind the ones before it, in a process of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            left = int(self.headers["content-length"])
            with (folder / "plain").open("ab") as file:
                while left:
                    chunk = self.rfile.read(min(left, 2**18))
                    left -= len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    child = os.fork()
    if not child:
        server.serve_forever()
    server.socket.close()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def uploads(bench: Bench) -> dict[str, Any]:
    """Megabytes a second, in turns."""
    (token,) = bench.tokens(1, "sender")
    found: dict[str, list[float]] = {"service": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="onebasis-bench-") as folder, plain_server(Path(folder)) as plain:
        for _ in range(TURNS):
            content = os.urandom(FILE_BYTES)
            digest = hashlib.sha256(content).hexdigest()
            for name, url in (("plain", f"{plain}/"), ("service", f"{bench.url}/v1/uploads/payments/{digest}")):
                found[name].append(asyncio.run(_send(url, token, content)))
            (Path(folder) / "plain").unlink()
    medians = {name: statistics.median(some) for name, some in found.items()}
    named = {f"{name}_megabytes_per_second": value for name, value in medians.items()}
    return {"uploads": {"file_bytes": FILE_BYTES, **named, "over_plain": medians["service"] / medians["plain"]}}


async def _send(url: str, token: str, content: bytes) -> float:
    headers = {"authorization": f"Bearer {token}", "content-type": "application/octet-stream"}
    async with aiohttp.ClientSession(headers=headers) as session:
        began = time.perf_counter()
        for offset in range(0, len(content), PIECE_BYTES_MAX):
            query = {"bytes": str(len(content)), "offset": str(offset)}
            piece = content[offset : offset + PIECE_BYTES_MAX]
            async with session.put(url, params=query, data=piece) as answer:
                told = await answer.read()
                assert answer.status == 200, told
        return len(content) / 1e6 / (time.perf_counter() - began)


# --- traces and metrics ------------------------------------------------------------------------------------------


def observability(bench: Bench) -> dict[str, Any]:
    """Processor seconds of the control plane for each request, over those without traces and metrics, less one."""
    collector = Receiver()
    tokens, (viewer,) = bench.tokens(FEW_CLIENTS, "some"), [
        bench.client.ask(CreateToken(name="prometheus", role="viewer", kind="service"))["token"]
    ]  # fmt: skip
    found: dict[str, list[float]] = {"on": [], "off": []}
    for turn in range(2 * SLICES + 2):  # off, which warms up, then off, on, off, on, …, off
        how = "on" if turn and not turn % 2 else "off"
        _trace_to(bench, collector.url if how == "on" else None)
        load = Load(bench, tokens, f"slice-{turn}")
        with _scraped(bench.url, viewer) if how == "on" else nullcontext():
            before = bench.process.cpu_times()
            load.run(FEW_CLIENTS, FEW_STREAMS, SLICE_SECONDS)
            after = bench.process.cpu_times()
        assert not load.errors, load.errors
        if turn:
            spent = after.user + after.system - before.user - before.system
            found[how].append(spent / load.count)
    _trace_to(bench, None)
    told_of, off = len(collector.came), found["off"]
    ratios = [on / statistics.mean(around) for on, around in zip(found["on"], itertools.pairwise(off), strict=True)]
    noise = [
        one / statistics.mean(around)
        for one, around in zip(off[1:-1], zip(off, off[2:], strict=False), strict=False)
    ]  # fmt: skip
    facts = {
        "cpu_milliseconds_per_request": {how: 1000 * statistics.median(some) for how, some in found.items()},
        "each_slice_with_over_those_around_it": ratios,
        "each_slice_without_over_those_around_it": noise,
        "counting_microseconds_per_request": 1e6 * _counting(),
        "trace_milliseconds_per_task": 1000 * _tracing(bench, collector),
        "messages_to_the_collector": told_of,
    }
    collector.close()
    logs = [math.log(ratio) for ratio in ratios]
    facts["standard_error"] = statistics.stdev(logs) / math.sqrt(len(logs))
    return {"observability_cost": math.exp(statistics.mean(logs)) - 1, "observability": facts}


def _counting() -> float:
    """Seconds that metrics take to count a request, which cannot be turned off."""
    meter, began, times = Meter(), time.perf_counter(), 10_000
    for _ in range(times):
        meter.count("tasks", 200, 0.01)
    return (time.perf_counter() - began) / times


def _tracing(bench: Bench, collector: Receiver) -> float:
    """Processor seconds of this thread to make and send the trace of a task: of all, from a copy of the database."""
    with tempfile.TemporaryDirectory(prefix="onebasis-bench-") as folder:
        source = sqlite3.connect(bench.site.folder / ".onebasis/tasks.db")
        copy = sqlite3.connect(Path(folder) / "tasks.db")
        source.backup(copy)
        source.close()
        copy.close()
        queue = TaskQueue(f"sqlite:///{folder}/tasks.db")
        settings = Settings.model_validate(yaml.safe_load((bench.site.folder / "settings.yaml").read_text()))
        traces = Traces(queue, lambda: settings.model_copy(update={"tracing": TracingSettings(endpoint=collector.url)}))
        TraceBook(queue.database).told(0)
        began = time.thread_time()
        while traces.look():
            pass
        seconds = time.thread_time() - began
        count = sum(queue.counts().values())
        queue.close()
    return seconds / count


def _trace_to(bench: Bench, endpoint: str | None) -> None:
    """Turn traces on from the present moment, or off: what happened while they were off is no cost of what follows."""
    if endpoint is not None:
        queue = TaskQueue(f"sqlite:///{bench.site.folder}/.onebasis/tasks.db")
        book, (last, *_) = TraceBook(queue.database), AuditLog(queue.database).newest(1)
        book.told(book.newest())
        book.told(last.seq, REQUESTS)
        queue.close()
    path = bench.site.folder / "settings.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"tracing": {"endpoint": endpoint}}))
    bench.site.run("reload", "--config", "settings.yaml")


@contextmanager
def _scraped(url: str, token: str) -> Iterator[None]:
    """Metrics are read again and again."""
    stop = threading.Event()

    def scrape() -> None:
        with httpx.Client(headers={"authorization": f"Bearer {token}"}) as client:
            while True:
                assert client.get(f"{url}/metrics").status_code == 200
                if stop.wait(SCRAPE_SECONDS):
                    return

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    stop.set()
    thread.join()


# --- the matrix --------------------------------------------------------------------------------------------------

DRAWN = """
new MutationObserver(() => {
  if (window.told || !document.body || !document.body.textContent.includes("1,000 tasks × 500 versions")) return;
  window.told = true;
  requestAnimationFrame(() => requestAnimationFrame(() => { window.drawnAt = performance.now(); }));
}).observe(document, {subtree: true, childList: true, characterData: true});
"""
ANSWERED = """
() => performance.getEntriesByType("resource").filter(one => one.name.includes("/v1/matrix")).at(-1)?.responseEnd
"""


def matrix() -> dict[str, Any]:
    from tests.browser.conftest import Visit
    from tests.browser.test_web_page import many_versions
    from tests.orchestrator.site import Site as Here

    program = shutil.which(CHROMIUM)
    if program is None:
        raise SystemExit("the matrix is drawn by Chromium: make test-web installs it")
    if importlib.util.find_spec("playwright") is None:
        install_playwright()
    from playwright.sync_api import sync_playwright

    state = many_versions()
    with tempfile.TemporaryDirectory(prefix="onebasis-bench-") as folder:
        site = Here(Path(folder), server={"requests_per_second": None})
        try:
            versions = site.service.versions()
            with patch.object(versions._store, "refresh", lambda: state):
                answers = []
                for _ in range(TURNS + 2):
                    began = time.perf_counter()
                    size = len(json.dumps(site.client.ask(ShowMatrix()), separators=(",", ":")))
                    answers.append(time.perf_counter() - began)
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
                    drawn, loaded, whole = [], [], []
                    for _ in range(TURNS + 2):
                        page = browser.new_page(viewport={"width": 1300, "height": 900})
                        page.add_init_script(DRAWN)
                        Visit(site, page).log_in("viewer")
                        page.goto(f"{site.url}/#/matrix")
                        page.reload()
                        page.wait_for_function("() => window.drawnAt !== undefined")
                        at = page.evaluate("() => window.drawnAt")
                        drawn.append((at - page.evaluate(ANSWERED)) / 1000)
                        whole.append(at / 1000)
                        timing = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"
                        loaded.append(page.evaluate(timing) / 1000)
                        page.close()
                    browser.close()
        finally:
            site.close()
    return {
        "matrix_1000x500_seconds": statistics.median(drawn),
        "matrix": {
            "page_loaded_seconds": statistics.median(loaded),
            "from_navigation_to_drawn_seconds": statistics.median(whole),
            "drawn_after_the_answer_seconds": drawn,
            "answer_seconds": statistics.median(answers),
            "answer_bytes": size,
        },
    }


IN_A_SERVICE: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "clients": clients,
    "uploads": uploads,
    "observability": observability,
}


def main() -> None:
    """Measure, print and write; a part that was not run keeps its figures."""
    parts = sys.argv[1:] or [*IN_A_SERVICE, "matrix"]
    if unknown := {*parts} - {*IN_A_SERVICE, "matrix"}:
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}\n{__doc__}")
    if "matrix" in parts:
        told(matrix())
    if some := [part for part in parts if part in IN_A_SERVICE]:
        with bench() as made:
            for part in some:
                told(IN_A_SERVICE[part](made))


def told(found: dict[str, Any]) -> None:
    print(json.dumps(found, indent=1), flush=True)
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    machine = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}
    OUT.write_text(json.dumps(known | machine | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
