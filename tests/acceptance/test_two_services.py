"""Two real services and one store: one has it; the other is told, and may take it over deliberately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from configs.settings import StorageSettings
from subspace_store import SubspaceReader, open_storage
from tests.acceptance.conftest import ROOT, Site


def made(folder: Path, place: Path) -> Site:
    folder.mkdir()
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    settings["gate"] = {"drop_max": 1.0, "merge_gap_max": 1.0}
    settings["workers"] |= {"count": 1, "heartbeat_seconds": 0.3}
    settings["storage"] = {"url": f"file:{place}"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return Site(folder)


def test_a_store_has_one_service_until_another_takes_it_over(tmp_path: Path) -> None:
    place = tmp_path / "place"
    one, two = made(tmp_path / "one", place), made(tmp_path / "two", place)
    reader = SubspaceReader.open(open_storage(StorageSettings(url=f"file:{place}"), "minilm"))
    try:
        one.run("up", "--config", "settings.yaml")
        one.run("submit", str(one.task_file("first")), "--wait")
        refused = two.run("up", "--config", "settings.yaml", expect=4)
        assert "belongs to the service" in refused
        assert str(tmp_path / "one") in refused
        assert "onebasis up --take-over" in refused
        assert not (tmp_path / "two/.onebasis/ray.json").exists()  # nothing was started for it
        before = reader.refresh()

        two.run("up", "--config", "settings.yaml", "--take-over")
        two.run("submit", str(two.task_file("second")), "--wait")
        assert [task.name for task in reader.refresh().tasks_at(reader.state.refs["main"]).values()] == [
            "payments/first",
            "payments/second",
        ]
        assert set(before.versions) < set(reader.state.versions)

        # The first finds out when it writes, and stops for good: it writes nothing and takes nothing back.
        assert "belongs to the service" in one.run("store", "tag", "gold", "1", expect=4)
        one.wait("the first to stop", lambda: "has stopped" in str(one.status()["alarms"]))
        assert "ALARM" in one.run("status")
        assert "belongs to the service" in one.run("submit", str(one.task_file("third")), expect=4)
        assert "belongs to the service" in one.run("up", expect=4)  # at once, and not after minutes
        names = [task.name for task in reader.refresh().tasks_at(reader.state.refs["main"]).values()]
        assert "payments/third" not in names

        # Ended in order, a service gives the store up.
        two.run("down")
        assert reader.refresh().owner is None
    finally:
        one.run("down")
        two.run("down")
