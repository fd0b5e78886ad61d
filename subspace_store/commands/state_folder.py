"""The folder of a service's own files: which settings it runs with, and whether it runs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from configs.errors import Unavailable

if TYPE_CHECKING:
    from configs.settings import Settings
    from subspace_store.log.version import Identity

SETTINGS_FILE = "settings.yaml"
SOURCE_FILE = "settings_source.json"
SERVER_FILE = "server.json"
LOCK_FILE = "server.lock"
"""Locked by the control plane for as long as its process lives."""
SERVICE_FILE = "service_id"
RESTORE_FILE = "restoring.json"
"""Says which backup is being restored here: there while it is not all there."""
MEMBER_FILE = "control_plane_id"
SERVER_MODULE = "orchestrator.api.server"


def service_settings(state_dir: Path) -> Settings:
    """The settings of the service that this folder belongs to.

    Raises:
        Unavailable: No service has run here, or the folder was moved.
    """
    from configs.settings import read_settings  # not needed by a command that asks a running service

    file = state_dir / SETTINGS_FILE
    if not file.exists():
        raise never_ran(state_dir)
    settings = read_settings(file)
    if Path(settings.state_dir).resolve() != state_dir.resolve():
        # Its database and store are named by their full paths: another service's may be there by now.
        raise Unavailable(
            f"this folder was moved: its service belongs in {settings.state_dir}",
            str(state_dir.resolve()),
            "move it back to look at it",
        )
    return settings


def settings_text(settings: Settings) -> str:
    """The settings as the state folder keeps them."""
    import yaml

    return "# Written by `onebasis up`.\n" + yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def keep_settings(settings: Settings, state_dir: Path) -> None:
    """Write the settings beside what they made, so that later commands need no option. A process that is killed
    meanwhile leaves the ones of before."""
    new = state_dir / f"{SETTINGS_FILE}.{os.getpid()}"
    with open_private(new, "w") as kept:
        kept.write(settings_text(settings))
    new.replace(state_dir / SETTINGS_FILE)


def keep_source(state_dir: Path, config: Path) -> None:
    """Note the file that the settings came from, and the folder that its relative paths start from, for `reload`."""
    with open_private(state_dir / SOURCE_FILE, "w") as kept:
        json.dump({"file": str(config.resolve()), "root": str(Path.cwd())}, kept)


def settings_source(state_dir: Path) -> tuple[Path, Path] | None:
    """What `keep_source` noted: file and folder; None where no file was named."""
    try:
        facts = json.loads((state_dir / SOURCE_FILE).read_text())
        return Path(facts["file"]), Path(facts["root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def never_ran(state_dir: Path) -> Unavailable:
    """The error for a command in a folder where there is nothing to ask."""
    what = f"no onebasis service has run here ({state_dir})"
    return Unavailable(what, todo="start one with `onebasis up`, or go to the folder where one is")


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter; rights that an older release gave to others are taken away."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder, *folder.iterdir()):
        with contextlib.suppress(OSError):  # of another user, or gone since
            if path is folder or (path.is_file() and not path.is_symlink()):
                path.chmod(path.stat().st_mode & 0o7700)


def open_private(file: Path, mode: Literal["a", "w"]) -> TextIO:
    """Open a file that its owner alone may read, to write to it or to add to it."""
    how = os.O_APPEND if mode == "a" else os.O_TRUNC
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | how, 0o600)
    os.fchmod(handle, 0o600)  # it may be there, from an older release
    return os.fdopen(handle, mode, encoding="utf-8")


def service_identity(state_dir: Path) -> Identity:
    """The identity of the service that this folder belongs to: a random id that is made once, and where it runs.

    The folder is the service: a copy of it is the same service, and must not run beside it.
    """
    from subspace_store.log.version import Identity

    file = state_dir / SERVICE_FILE
    if not file.exists():
        _make_once(file, secrets.token_hex(16))
    return Identity(file.read_text(), f"{socket.gethostname()}:{state_dir.resolve()}")


def member_id(state_dir: Path) -> str:
    """Id of this folder's control plane among several of one service: with the machine's name in it, since a folder may
    be copied to another machine."""
    file = state_dir / MEMBER_FILE
    if not file.exists():
        _make_once(file, secrets.token_hex(8))
    return f"{socket.gethostname()[:60]}:{file.read_text()}"


def join_service(state_dir: Path, service_id: str) -> None:
    """Let this folder be one of a service that has others, on other machines."""
    with open_private(state_dir / SERVICE_FILE, "w") as file:
        file.write(service_id)


def _make_once(file: Path, text: str) -> None:
    """Make a file, unless another command makes it at the same moment."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    with open_private(new, "w") as made:
        made.write(text)
    with contextlib.suppress(FileExistsError):
        os.link(new, file)
    new.unlink()


def running_server(state_dir: Path) -> int | None:
    """Process id of the running control plane."""
    return process_of(state_dir / SERVER_FILE, SERVER_MODULE)


def process_of(file: Path, module: str) -> int | None:
    """The process id that a file names, if that process lives and is what it should be: a program of this folder,
    however the folder is named there and here."""
    try:
        pid = int(json.loads(file.read_text())["pid"])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, KeyError):
        return None
    is_ours = module.encode() in command and any(_is_same(argument, file.parent) for argument in command)
    return pid if is_ours else None


def _is_same(argument: bytes, folder: Path) -> bool:
    """Whether an argument of a command names a folder, by its whole path."""
    with contextlib.suppress(OSError, ValueError):
        return argument.startswith(b"/") and os.path.samefile(argument, folder)
    return False
