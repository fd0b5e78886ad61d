"""Real services for the acceptance tests: started with the public command, in a folder of their own."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api.client import Client
from orchestrator.api.requests import Answer, ListVersions, ServiceRequest, ShowTask, Status

ROOT = Path(__file__).resolve().parents[2]
ONEBASIS = str(Path(sys.executable).with_name("onebasis"))


class Site:
    """A folder in which somebody runs onebasis."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str, expect: int = 0) -> str:
        """Type a command; its output, or a failure that shows all it said."""
        done = subprocess.run([ONEBASIS, *arguments], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == expect, f"onebasis {' '.join(arguments)}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout + done.stderr

    def ask(self, *arguments: str, expect: int = 0) -> Any:
        """The JSON answer of a command."""
        done = subprocess.run([ONEBASIS, *arguments, "--json"], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == expect, f"onebasis {' '.join(arguments)}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return json.loads(done.stdout)

    def look(self, request: ServiceRequest[Answer]) -> Answer:
        """Ask the service as a command would, from this process: to start Python takes longer than most answers."""
        return Client(self.folder / ".onebasis").ask(request)

    def status(self) -> dict[str, Any]:
        """What `onebasis status` is told."""
        return self.look(Status())

    def task(self, title: str) -> dict[str, Any]:
        """What `onebasis task` is told."""
        return self.look(ShowTask(reference=title))

    def log(self) -> str:
        """The end of the control plane's log."""
        log = self.folder / ".onebasis/logs/control-plane.log"
        return "\n".join(log.read_text().splitlines()[-60:]) if log.exists() else ""

    def wait(self, what: str, is_true: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something to become true. What takes long is asked for less often: each look takes CPU time."""
        begun = time.monotonic()
        while not is_true():
            waited = time.monotonic() - begun
            assert waited < seconds, f"not within {seconds} s: {what}\n{self.ask('tasks')}\n{self.log()}"
            time.sleep(0.1 if waited < 2 else 0.3)

    def wait_for_state(self, title: str, *states: str, seconds: float = 180) -> dict[str, Any]:
        """Wait until a task is in one of the states; the task."""
        self.wait(f"{title} to be {states}", lambda: self.task(title)["state"] in states, seconds)
        return self.task(title)

    def processes(self, title: str) -> list[int]:
        """Process ids below this site's Ray head whose title begins like this."""
        head = json.loads((self.folder / ".onebasis/ray.json").read_text())["pid"]
        return [pid for pid in _descendants(head) if _title(pid).startswith(title)]

    def control_plane(self) -> int:
        """Its process id."""
        return int(json.loads((self.folder / ".onebasis/server.json").read_text())["pid"])

    def kill_control_plane(self) -> None:
        """kill -9, as a power cut would."""
        os.kill(self.control_plane(), signal.SIGKILL)

    def task_file(self, name: str, team: str = "payments", steps: int = 6, rows: int = 120, **changes: Any) -> Path:
        """A small real task: three intents of BANKING77."""
        labels = _make_rows(self.folder, rows)
        document = {
            "team": team,
            "name": name,
            "base_model": "minilm",
            "data": {
                "train_file": "train.jsonl",
                "eval_file": "eval.jsonl",
                "label_names": labels,
                "max_length": 24,
            },
            "training": {"learning_rate": 0.005, "max_steps": steps, "per_device_train_batch_size": 8},
            "lora": {"r": 4, "lora_alpha": 8},
        }
        document.update(changes)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path


def _make_rows(folder: Path, count: int) -> list[str]:
    """The first rows of the first three labels of a shipped task."""
    tasks = sorted((ROOT / "examples/data").glob("banking_*.train.jsonl.gz"))
    kept: dict[int, list[dict[str, Any]]] = {}
    with gzip.open(tasks[0], "rt") as file:
        for line in file:
            row = json.loads(line)
            kept.setdefault(row["label"], []).append(row)
    chosen = sorted(kept)[:3]
    rows = [{"text": row["text"], "label": new} for new, old in enumerate(chosen) for row in kept[old]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count:2]))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:count:2]))
    return [f"intent_{number}" for number in range(3)]


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (below := children.get(waiting.pop(), []))
        found += below
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a real service."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.acceptance)


def merged_once(site: Site, *titles: str) -> bool:
    """Whether each title is in exactly one version of main."""
    added = [
        title for version in site.look(ListVersions()) if version["status"] == "published" for title in version["added"]
    ]
    return all(added.count(title) == 1 for title in titles)
