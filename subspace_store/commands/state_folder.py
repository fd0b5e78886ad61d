"""The folder of a service's own files: which settings it runs with, and whether it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import Unavailable

if TYPE_CHECKING:
    from configs.settings import Settings

SETTINGS_FILE = "settings.yaml"
SERVER_FILE = "server.json"
SERVER_MODULE = "orchestrator.api.server"


def service_settings(state_dir: Path) -> Settings:
    """The settings of the service that this folder belongs to.

    Raises:
        Unavailable: No service has run here, or the folder was moved.
    """
    from configs.settings import read_settings  # not needed by a command that asks a running service

    file = state_dir / SETTINGS_FILE
    if not file.exists():
        raise Unavailable(f"no onebasis service has run here ({state_dir})", todo="start one with `onebasis up`")
    settings = read_settings(file)
    if Path(settings.state_dir) != state_dir.resolve():
        # Its database and store are named by their full paths: another service's may be there by now.
        raise Unavailable(
            f"this folder was moved: its service belongs in {settings.state_dir}",
            str(state_dir.resolve()),
            "move it back to look at it",
        )
    return settings


def running_server(state_dir: Path) -> int | None:
    """Process id of the running control plane."""
    return process_of(state_dir / SERVER_FILE, SERVER_MODULE)


def process_of(file: Path, module: str) -> int | None:
    """The process id that a file names, if that process lives and is what it should be."""
    try:
        pid = int(json.loads(file.read_text())["pid"])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, KeyError):
        return None
    return pid if module.encode() in command and str(file.parent).encode() in command else None
