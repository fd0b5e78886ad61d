"""The deployment files as data, and what in them has to be what the product says of itself."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.settings import Settings, read_settings
from orchestrator.commands.processes import QUICK_SECONDS, STOP_SECONDS
from tests.configs.deploy.chart import RENDERED
from tests.docs.pages import ROOT

DEPLOY = ROOT / "configs/deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELEASE: str = PROJECT["project"]["version"]
END_SECONDS = STOP_SECONDS + 2 * QUICK_SECONDS
"""How long a service may take to end in order: the control plane, then Ray, and what is left."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    name: str
    rest: str
    stage: str


def dockerfile() -> list[Instruction]:
    """The instructions, comments and continued lines aside."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            stage = rest.rpartition(" AS ")[2] if name == "FROM" else stage
            found.append(Instruction(name, rest.strip(), stage))
    return found


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found is not None, package
    return found[1]


def compose() -> dict[str, Any]:
    """compose.yaml, merged keys resolved."""
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


def manifests() -> list[dict[str, Any]]:
    """The documents of the rendered chart."""
    return list(yaml.safe_load_all(RENDERED.read_text()))


def manifest(kind: str) -> dict[str, Any]:
    """The one document of a kind."""
    (found,) = [one for one in manifests() if one["kind"] == kind]
    return found


def settings_from(text: str, folder: Path) -> Settings:
    """What the service itself reads of a settings file."""
    file = folder / "settings.yaml"
    file.write_text(text)
    return read_settings(file)
