"""A task that takes its worker down each time is parked with the true cause, and everybody else's tasks go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.acceptance import poison
from tests.acceptance.conftest import ROOT, Site, merged_once

DEATHS = 2
LIMIT_BYTES = 1536 << 20
"""A warm worker takes half of it."""


def started(folder: Path, patch: pytest.MonkeyPatch, workers: int, deaths: int = DEATHS) -> Site:
    """A service in whose workers the names of tasks come true, and that parks a task after so many deaths."""
    site = Site(folder)
    settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    settings["workers"] |= {"count": workers, "heartbeat_seconds": 0.3}
    settings["failures"] = {"worker_deaths_max": deaths - 1}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    patch.setenv("PYTHONPATH", str(poison.written(folder / "path")))
    site.run("up", "--config", "settings.yaml")
    return site


@pytest.fixture(scope="module")
def cgroup() -> Iterator[Path | None]:
    """A memory cgroup with a limit; None where this user may not make one."""
    for parent, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(parent) / f"onebasis-test-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / name).write_text(str(LIMIT_BYTES))
        except OSError:
            if folder.exists():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    yield None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cgroup: Path | None) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        if cgroup is not None:
            patch.setenv(poison.CGROUP, str(cgroup))
        site = started(tmp_path_factory.mktemp("poison"), patch, workers=2)
        yield site
        site.run("down")


CAUSES = {
    "exits": "it ended itself with exit code 3",
    "kills-itself": "it was ended by signal 9 (SIGKILL)",
    "eats-memory": "memory ran out: the kernel's out-of-memory killer ended it",
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_task_that_kills_its_worker_is_parked_with_the_cause_and_others_go_on(
    site: Site, cgroup: Path | None, name: str
) -> None:
    if name == "eats-memory" and cgroup is None:
        pytest.skip("this user may not make a memory cgroup")
    title, healthy = f"payments/{name}", f"cards/beside-{name}"
    site.run("submit", str(site.task_file(name, steps=2000)))
    site.run("submit", str(site.task_file(f"beside-{name}", team="cards", steps=60)))

    task = site.wait_for_state(title, "parked", "published")
    assert (task["state"], task["trouble"]) == ("parked", ["worker-died"])
    assert f"gave up after {DEATHS} workers that died while they did it; last: worker-" in task["reason"]
    assert CAUSES[name] in task["reason"]
    assert task["reason"] == task["why"]
    told = task["training"]
    assert (told["worker_deaths"], told["lost_machines"], told["own_bugs"], task["attempt"]) == (DEATHS, 0, 0, DEATHS)
    events = [event["text"] for event in task["events"] if event["kind"] == "TrainingFailed"]
    assert len(events) == DEATHS
    assert all("fault died" in text and CAUSES[name] in text for text in events)
    if name == "eats-memory":
        assert f"GiB of the {LIMIT_BYTES / 2**30:.2f} GiB of its cgroup" in task["reason"]

    other = site.wait_for_state(healthy, "published", "parked", "rejected")
    told = other["training"]
    assert (other["state"], other["attempt"]) == ("published", 1)
    assert (told["worker_deaths"], told["lost_machines"], told["own_bugs"]) == (0, 0, 0)
    assert merged_once(site, healthy)
    site.wait("both workers to be warm again", lambda: site.status()["workers_ready"] == 2)


def test_what_rays_memory_monitor_ends_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (4 << 30)) / memory.total
    if threshold > 0.94:
        pytest.skip("not enough memory is free to set a limit within it")
    monkeypatch.delenv(poison.CGROUP, raising=False)
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    site = started(tmp_path, monkeypatch, workers=1, deaths=1)
    try:
        site.run("submit", str(site.task_file("eats-memory", steps=2000)))
        task = site.wait_for_state("payments/eats-memory", "parked", "published", seconds=400)
        assert (task["state"], task["training"]["worker_deaths"]) == ("parked", 1)
        assert "memory ran out: Ray's memory monitor ended it (Memory usage " in task["reason"]
        assert "exceeded threshold of" in task["reason"]
        assert "; it used " in task["reason"]
    finally:
        site.run("down")
