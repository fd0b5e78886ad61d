"""The image: its linter has nothing to say, what it copies is there, what it installs and runs is the project's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tests.configs.deploy.files import DOCKERFILE, PROJECT, RELEASE, ROOT, compose, dockerfile, manifest
from tests.docs.command_lines import parse
from tests.servers.install import MINISTACK_PACKAGE

INSTRUCTIONS = dockerfile()


def of(name: str, stage: str = "onebasis") -> list[str]:
    return [one.rest for one in INSTRUCTIONS if one.name == name and one.stage == stage]


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    broken = DOCKERFILE.read_text().replace("--no-install-recommends", "", 1)
    refused = subprocess.run([hadolint, "--no-color", "-"], input=broken, capture_output=True, text=True)
    assert "DL3015" in refused.stdout


def test_what_is_copied_is_there_and_is_sent_to_the_build() -> None:
    text = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text()
    ignore = [line for line in text.splitlines() if not line.startswith("#")]
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = [path for rest in of("COPY", "build") for path in rest.split()[:-1]]
    assert set(copied) == sent
    for path in copied:
        assert (ROOT / path).exists(), path
    assert {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]} <= set(copied)
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(copied)
    left_out = [line for line in ignore if not line.startswith("!") and line != "*"]
    packaged = [path.relative_to(ROOT).as_posix() for path in (ROOT / "orchestrator/web/built").iterdir()]
    assert not [path for path in packaged for line in left_out if fnmatch(path, line)]


def test_what_is_installed_is_the_project_with_its_tested_versions() -> None:
    install, models = [rest for rest in of("RUN", "build") if "uv pip install" in rest]
    assert install.endswith("--constraint constraints.txt .")
    extras = re.findall(r"\.\[([\w,]+)\]", install)
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    assert "--no-deps" in models
    (python,) = [one.rest for one in INSTRUCTIONS if one.name == "ARG" and one.rest.startswith("PYTHON=")]
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python.removeprefix("PYTHON=") + ".0")
    assert MINISTACK_PACKAGE in " ".join(of("RUN", "s3"))
    bases = {one.rest.split(" AS ")[0] for one in INSTRUCTIONS if one.name == "FROM"}
    assert bases == {"python:${PYTHON}-slim-bookworm"}


def test_it_runs_the_service_as_a_user_of_its_own() -> None:
    (command,) = of("CMD")
    (entrypoint,) = of("ENTRYPOINT")
    program, *arguments = json.loads(command)
    assert program == "onebasis"
    parse(arguments)
    assert json.loads(entrypoint) == ["tini", "--"]
    linked = " ".join(of("RUN"))
    for name in ("onebasis", "ray", "mlflow"):
        assert f"/opt/onebasis/bin/{name} " in linked
    (user,) = of("USER")
    security = manifest("Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert int(user) == security["runAsUser"] == security["fsGroup"]
    assert f"--uid {user} " in linked


def test_a_release_has_one_number() -> None:
    assert f"-t onebasis:{RELEASE} " in DOCKERFILE.read_text()
    images = {service["image"] for service in compose()["services"].values() if "build" in service}
    assert images == {f"onebasis:{RELEASE}", f"onebasis-s3:{RELEASE}"}
    containers = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    assert {one["image"].rpartition(":")[2] for one in containers} == {RELEASE}


def test_the_state_folder_of_the_image_is_that_of_the_settings() -> None:
    environment = dict(part.split("=", 1) for rest in of("ENV") for part in rest.split())
    assert environment["ONEBASIS_STATE_DIR"] == "/var/lib/onebasis/state"
    for name in ("compose/settings.yaml", "kubernetes/onebasis.yaml"):
        assert f"state_dir: {environment['ONEBASIS_STATE_DIR']}" in (DOCKERFILE.parent / name).read_text()
    assert environment["ONEBASIS_STATE_DIR"].startswith(of("VOLUME")[0])
