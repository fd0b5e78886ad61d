"""The units: their lines are systemd's, what they start is the program's, and a stop lets tasks write checkpoints.

Whether systemd itself takes them, `make check-deploy` asks it.
"""

from __future__ import annotations

import re
import shlex

import pytest

from configs.errors import Exit
from tests.configs.deploy.files import DEPLOY, END_SECONDS
from tests.docs import command_lines

FOLDER = DEPLOY / "systemd"
UNITS = ("onebasis.service", "onebasis-ray.service")
Unit = dict[str, list[str]]


def unit(name: str) -> Unit:
    """Each key of a unit to its values; those that belong to one section stand in it."""
    found: Unit = {}
    for line in (FOLDER / name).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def variables(name: str) -> dict[str, str]:
    """What an environment file sets."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc]


@pytest.mark.parametrize("name", UNITS)
def test_each_line_is_a_section_a_key_or_a_comment(name: str) -> None:
    sections = []
    for line in (FOLDER / name).read_text().splitlines():
        assert re.fullmatch(r"|#.*|\[\w+\]|[A-Z][A-Za-z]+=.*", line), line
        assert line == line.rstrip()
        sections += re.findall(r"^\[(\w+)\]$", line)
    assert sections == ["Unit", "Service", "Install"]
    twice = {key: values for key, values in unit(name).items() if len(values) > 1}
    assert not twice


def test_it_starts_and_reloads_what_the_program_has() -> None:
    found = unit("onebasis.service")
    text = "\n".join((*found["ExecStart"], *found["ExecReload"]))
    (up, *options), (reload, *_) = command_lines.onebasis(text)
    assert (up, "--stay" in options, reload) == ("up", True, "reload")
    environment = dict(part.split("=", 1) for part in shlex.split(found["Environment"][0]))
    assert environment["ONEBASIS_STATE_DIR"] == f"/var/lib/{found['StateDirectory'][0]}/state"
    assert environment["HF_HOME"].startswith(f"/var/cache/{found['CacheDirectory'][0]}/")
    template = (DEPLOY.parent / "cluster.yaml").read_text()
    assert f"state_dir: {environment['ONEBASIS_STATE_DIR']}\n" in template
    assert f"auth_token_path: {variables('ray.env')['RAY_AUTH_TOKEN_PATH']}\n" in template


def test_a_stop_lets_running_tasks_write_checkpoints() -> None:
    found = unit("onebasis.service")
    assert found["KillMode"] == ["mixed"]  # not to the workers: they would end before they wrote any
    assert found["KillSignal"] == ["SIGTERM"]
    assert int(found["TimeoutStopSec"][0]) >= END_SECONDS
    assert found["UMask"] == ["0077"]


def test_it_starts_again_unless_that_mends_nothing() -> None:
    found = unit("onebasis.service")
    assert found["Restart"] == ["on-failure"]
    final = {Exit(int(code)) for code in found["RestartPreventExitStatus"][0].split()}
    assert final == {Exit.INPUT, Exit.CONFLICT, Exit.CORRUPT}


def test_both_see_the_same_folder_of_rays_sockets() -> None:
    for name in UNITS:
        assert "PrivateTmp" not in unit(name)
    assert unit("onebasis.service")["ReadWritePaths"] == ["/tmp"]
    assert "onebasis-ray.service" in unit("onebasis.service")["After"][0]


def test_ray_is_started_as_one_of_the_machines_that_its_file_shows() -> None:
    (start,) = unit("onebasis-ray.service")["ExecStart"]
    text = (FOLDER / "ray.env").read_text()
    shown = re.findall(r"^#   .*?(--.*)$", text, flags=re.MULTILINE)
    assert len(shown) == 3
    head, trains, joined = (
        command_lines.ray(next(command_lines.of_program("ray", start.replace("$RAY_START", one)))) for one in shown
    )
    assert (head["head"], head["num_cpus"], head["block"]) == (True, 0, True)
    assert trains["address"] == joined["address"] == f"ray-head.internal:{head['port']}"
    assert (trains["num_cpus"], joined["num_cpus"], joined["num_gpus"]) == (None, 0, 0)
    assert variables("ray.env")["RAY_START"] in shown
    assert f"address: {trains['address']}\n" in (DEPLOY.parent / "cluster.yaml").read_text()
