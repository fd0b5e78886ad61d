"""`onebasis predict` where no worker is free."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from configs.errors import InvalidInput, OnebasisError, WorkersBusy
from orchestrator.api.client import REMOTE, Client, Remote
from orchestrator.api.requests import Json
from orchestrator.commands.prediction import LOADS, inputs, predict, show_which
from tests.orchestrator.site import TOKEN, Site


def asked(client: Client) -> Json:
    return next(predict(client, "red/alpha", ["a text"], None, None))


@pytest.fixture
def busy(site: Site) -> Site:
    """A service whose two workers train."""
    site.train("red/one", "red/two")
    return site


@pytest.mark.changes
def test_a_service_here_is_helped_out_by_the_process_that_asks(busy: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OnebasisError) as failed:  # the base model of these tests is no folder of weights
        asked(busy.client)
    assert not isinstance(failed.value, WorkersBusy)
    assert f"no worker of tiny is free to answer: {LOADS}" in capsys.readouterr().err.replace("\n", " ")
    busy.plant.cluster.release()


@pytest.mark.changes
def test_a_service_elsewhere_is_not_answered_for_from_the_folder_here(
    busy: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    token = REMOTE.set(Remote(busy.url, TOKEN))
    try:
        with pytest.raises(WorkersBusy, match="no worker of tiny is free to answer"):
            asked(busy.client)
    finally:
        REMOTE.reset(token)
    assert LOADS not in capsys.readouterr().err.replace("\n", " ")
    busy.plant.cluster.release()


def test_a_picture_is_asked_about_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cat = tmp_path / "cat.png"
    cat.write_bytes(b"\x89PNG")
    (asked,) = inputs(Client(tmp_path), "red/pets", (), (), (cat,), None)
    assert base64.b64decode(asked["image"]) == b"\x89PNG"
    with pytest.raises(InvalidInput, match=r"dog.png: cannot be read: No such file"):
        inputs(Client(tmp_path), "red/pets", (), (), (tmp_path / "dog.png",), None)
    for texts, pictures, rows in (((), (), None), (("a",), (cat,), None), ((), (cat,), cat)):
        with pytest.raises(InvalidInput, match="give one of --text, --image and --rows"):
            inputs(Client(tmp_path), "red/pets", texts, (), pictures, rows)


def test_which_shows_what_each_task_said_and_nothing_where_it_wrote_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[Json] = [{"label": "green"}, {"value": 0.5}, {"text": ""}, {"text": "Paris"}]
    found = [{"task": "red/alpha", "routed": {"red/alpha": 1.0}, "routed_by": "features"} | one for one in said]
    show_which({"answers": found, "version": 3, "base_model": "tiny"}, ["a", "b", "c", "d"])
    lines = capsys.readouterr().out.splitlines()[::2]
    assert lines == ["red/alpha  green  a", "red/alpha  0.5000  b", "red/alpha    c", "red/alpha  Paris  d"]
