"""What answers is tried again where Ray Serve does not start, and says why meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray.serve
from ray.exceptions import ActorDiedError

from configs.errors import Unavailable
from configs.settings import Settings
from orchestrator.serving import deployment
from orchestrator.serving.deployment import Deployment


@pytest.fixture
def settings() -> Settings:
    base = {"name": "tiny", "source": "tiny", "weights_sha256": "0" * 64}
    return Settings.model_validate({"base_model": base, "teams": {"red": {}}, "serving": {"port": 1}})


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """On a machine on which the process that listens does not start in time."""

    def start(**_: Any) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(ray.serve, "start", start)
    monkeypatch.setattr(Deployment, "_known", lambda self: {})
    monkeypatch.setattr(Deployment, "_listener", lambda self, url: "nobody")
    return Deployment("onebasis-1", "token", "http://127.0.0.1:2")


def test_ray_serve_that_does_not_start_is_told(crowded: Deployment, settings: Settings) -> None:
    assert crowded.facts(settings)["message"] == "it does not run"
    with pytest.raises(Unavailable, match="Ray Serve could not be started: ActorDiedError"):
        crowded.follow(settings)
    facts = crowded.facts(settings)
    assert facts["state"] == "down"
    assert "Ray Serve could not be started: ActorDiedError" in facts["message"]


def test_what_could_not_be_started_with_the_service_is_tried_again_by_the_settings_of_then(
    crowded: Deployment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "AGAIN_SECONDS", 0.0)
    tried: list[int] = []

    def ports() -> Settings:
        tried.append(len(tried))
        if len(tried) < 3:
            return settings
        return settings.model_copy(update={"serving": None})  # somebody has ended it meanwhile

    crowded.begin(ports, threading.Event())
    assert len(tried) == 3
    assert crowded.facts(settings)["message"] == "it does not run"


def test_it_is_not_tried_again_once_the_service_ends(crowded: Deployment, settings: Settings) -> None:
    stop = threading.Event()
    stop.set()
    crowded.begin(lambda: settings, stop)
