"""The same service with its versions on S3: one line of settings, a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml

from tests.acceptance.conftest import ROOT, Site
from tests.moto_server import CREDENTIALS, moto_server

BUCKET = "team-bucket"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Credentials are in the environment, where boto3 and the processes of the service find them."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with moto_server(BUCKET) as url:
        yield url


def test_a_task_is_published_exported_and_rolled_back_with_everything_on_s3(endpoint: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    settings = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["storage"] = {"url": f"s3://{BUCKET}/onebasis", "endpoint_url": endpoint, "region": "us-east-1"}
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    settings["workers"]["count"] = 1
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    site.run("up", "--config", "settings.yaml")
    try:
        site.run("submit", str(site.task_file("on-s3")))
        task = site.wait_for_state("payments/on-s3", "published")
    finally:
        site.run("down")

    found = boto3.client("s3", endpoint_url=endpoint).list_objects_v2(Bucket=BUCKET, Prefix="onebasis/minilm/")
    keys = {entry["Key"].removeprefix("onebasis/minilm/") for entry in found["Contents"]}
    assert "FORMAT" in keys
    data = [key for key in keys if key.startswith(f"data/{task['task_id']}/")]
    assert [key.rpartition("/")[2].partition("-")[0] for key in data] == ["eval"]  # train-…: never read again
    assert {key.split("/")[0] for key in keys} >= {"log", "blobs", "data"}
    assert not list(tmp_path.glob(".onebasis/store"))
    # Reading, exporting and rolling back go straight to S3 while the service is down.
    assert site.ask("scores")["matrix"] == [
        [{"score": task_score(site), "measured_at": 1, "rows": 60, "general_loss": None}]
    ]
    site.run("export", "payments/on-s3", "-o", "exported")
    assert (tmp_path / "exported/adapter_model.safetensors").stat().st_size > 10_000
    assert site.ask("rollback", "0")["vanishing"] == ["payments/on-s3"]
    assert site.ask("status", expect=10)["main"] == 0


def task_score(site: Site) -> float:
    """The one measured score of version 1."""
    return float(site.ask("version", "1")["tasks"][0]["score"])
