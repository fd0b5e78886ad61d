"""A first `up` with a wrong digest of the weights leaves nothing running, nor in the way of the corrected one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import yaml

from tests.acceptance.conftest import ONEBASIS, ROOT, Site


def test_a_failed_up_leaves_nothing_running_and_a_corrected_digest_is_all_that_it_takes(tmp_path: Path) -> None:
    site, right = Site(tmp_path), yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    right["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    right["workers"]["count"] = 1
    wrong = {**right, "base_model": {**right["base_model"], "weights_sha256": 64 * "0"}}
    for name, values in (("wrong.yaml", wrong), ("right.yaml", right)):
        (tmp_path / name).write_text(yaml.safe_dump(values))
    try:
        said = _fails(site, "up", "--config", "wrong.yaml", code=5)
        assert right["base_model"]["weights_sha256"] in said  # what it should be
        assert not list((tmp_path / ".onebasis/store").rglob("FORMAT"))
        assert [p.info for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])] == []
        assert not (tmp_path / ".onebasis/ray.json").exists()
        site.run("up", "--config", "right.yaml")
        site.run("submit", str(site.task_file("first")))
        site.wait_for_state("payments/first", "published")
        site.run("down")
        said = _fails(site, "up", "--config", "wrong.yaml", code=2)  # now there is a store: told before anything starts
        assert "correct base_model.weights_sha256" in said
        assert not (tmp_path / ".onebasis/ray.json").exists()
    finally:
        site.run("down")


def _fails(site: Site, *arguments: str, code: int) -> str:
    done = subprocess.run([ONEBASIS, *arguments], cwd=site.folder, capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    return done.stdout + done.stderr
