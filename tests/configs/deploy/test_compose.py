"""compose.yaml is what the Compose specification allows; its commands and settings are the product's; its parts know
each other by the right names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from compose_spec import PyCompose

from configs.errors import InvalidInput
from orchestrator.api.exchange import ALIVE_PATH
from tests.configs.deploy.files import COMPOSE, DEPLOY, END_SECONDS, ROOT, compose, dockerfile, settings_from
from tests.docs import command_lines

SETTINGS = (DEPLOY / "compose/settings.yaml").read_text()
SERVICES: dict[str, Any] = compose()["services"]


def script(name: str) -> str:
    """What a service runs, as a shell's text."""
    command = SERVICES[name]["command"]
    return command[-1].replace("$$", "$") if command[0] == "bash" else " ".join(command)


def test_it_is_what_the_compose_specification_allows() -> None:
    def check(document: Any) -> None:  # the library knows no merged keys
        PyCompose.from_yaml(yaml.safe_dump(document))

    check(compose())
    broken = compose()
    broken["services"]["onebasis"]["stop_grace_perod"] = "4m"
    with pytest.raises(ValueError, match="stop_grace_perod"):
        check(broken)


def test_its_settings_are_read_by_the_service_and_fit_the_other_parts(tmp_path: Path) -> None:
    settings = settings_from(SETTINGS, tmp_path)
    assert settings.production
    own = SERVICES["onebasis"]
    for address in (settings.database_url, settings.storage.endpoint_url, settings.mlflow.tracking_uri):
        assert urlsplit(str(address)).hostname in SERVICES, address
    ports = {name: str(urlsplit(url).port) for name, url in
             (("s3", settings.storage.endpoint_url), ("mlflow", settings.mlflow.tracking_uri))}  # fmt: skip
    assert f"--port={ports['mlflow']}" in SERVICES["mlflow"]["command"]
    (environment,) = [one.rest for one in dockerfile() if one.name == "ENV" and one.stage == "s3"]
    assert f"GATEWAY_PORT={ports['s3']}" in environment
    assert f"mlflow:{ports['mlflow']}," in script("mlflow")
    assert f"http://s3:{ports['s3']}" in script("bucket")
    assert f'"{urlsplit(settings.storage.url).netloc}"' in script("bucket")
    assert f"--address={settings.ray.address}" in script("onebasis")
    assert own["ports"] == [f"127.0.0.1:{settings.server.port}:{settings.server.port}"]
    assert f"http://127.0.0.1:{settings.server.port}{ALIVE_PATH}" in own["healthcheck"]["test"]
    assert settings.ray.auth_token_path == own["environment"]["RAY_AUTH_TOKEN_PATH"]
    user, database = urlsplit(settings.database_url).username, urlsplit(settings.database_url).path[1:]
    postgres = SERVICES["postgres"]["environment"]
    assert (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]) == (user, database)
    (worker,) = re.findall(r"--num-cpus=(\d+)", script("ray-worker"))
    assert settings.cpus_at_most <= int(worker)


def test_a_misspelt_key_of_the_settings_is_found(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="behind_proxie"):
        settings_from(SETTINGS.replace("behind_proxy", "behind_proxie"), tmp_path)


def test_its_commands_are_those_of_the_programs() -> None:
    ((_, *options),) = command_lines.onebasis(script("onebasis"))
    assert "--stay" in options
    (target,) = [one["target"] for one in SERVICES["onebasis"]["configs"]]
    assert options[options.index("--config") + 1] == target
    of_ray = ("ray-head", "ray-worker", "onebasis")
    head, worker, joined = (command_lines.ray(next(command_lines.of_program("ray", script(one)))) for one in of_ray)
    assert (head["head"], head["num_cpus"], head["block"]) == (True, 0, True)
    assert (worker["address"], worker["block"]) == (f"ray-head:{head['port']}", True)
    assert (joined["address"], joined["num_cpus"], joined["block"]) == (worker["address"], 0, False)
    for name in ("ray-head", "ray-worker"):
        _, program, *arguments = SERVICES[name]["healthcheck"]["test"]
        assert program == "ray"
        assert command_lines.ray(arguments)["address"] == worker["address"]
    with warnings.catch_warnings():  # about its own types
        warnings.simplefilter("ignore")
        from mlflow.cli import cli

    _, server, *arguments = SERVICES["mlflow"]["command"]
    assert cli.commands[server].make_context(server, list(arguments)).params["workers"] == "1"


def test_secrets_are_files_outside_the_repository_that_who_needs_them_gets() -> None:
    files = compose()["secrets"]
    ignored = (ROOT / ".gitignore").read_text()
    page = (ROOT / "docs/deployment.md").read_text()
    for name, secret in files.items():
        assert f"{(Path('configs/deploy') / secret['file']).parent}/\n" in ignored
        assert f"> {name}" in page, name
    for name, service in SERVICES.items():
        named = set(re.findall(r"/run/secrets/(\w+)", yaml.safe_dump(service)))
        assert named == set(service.get("secrets", ())), name
    assert "password" not in yaml.safe_dump({name: one.get("environment") for name, one in SERVICES.items()}).replace(
        "/run/secrets/postgres_password", ""
    )


def test_who_waits_for_whom_is_there_and_says_that_it_is_well() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other], (name, other)
    (minutes,) = re.findall(r"^(\d+)m$", SERVICES["onebasis"]["stop_grace_period"])
    assert 60 * int(minutes) >= END_SECONDS
    volumes = {one.partition(":")[0] for service in SERVICES.values() for one in service.get("volumes", ())}
    assert volumes == compose()["volumes"].keys()
    assert COMPOSE.read_text().count("127.0.0.1:") >= 2
