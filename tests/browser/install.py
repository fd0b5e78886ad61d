"""Gets what `make test-web` looks at the web page with: `python -m tests.browser.install`.

Chromium comes from Debian's packages, Playwright from PyPI, axe-core from npm into a folder of the virtual environment.
What is there is not asked for again. What cannot be had is an error, never a skipped test.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
UV = str(Path(sys.executable).with_name("uv"))
CHROMIUM = "chromium"
PLAYWRIGHT_PACKAGE = "playwright==1.65.2"
AXE_FOLDER = Path(sys.prefix) / "axe"
AXE = AXE_FOLDER / "node_modules/axe-core/axe.min.js"
AXE_PACKAGE = "axe-core@4.14.1"


def install_chromium() -> None:
    """Debian's package."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        _give_up("chromium", "this is not root with apt-get, who alone can install it")
    _run("chromium", ["apt-get", "update", "--quiet=2"])
    quietly = ["--quiet=2", "--yes", "--no-install-recommends"]
    _run("chromium", ["apt-get", "install", *quietly, CHROMIUM], DEBIAN_FRONTEND="noninteractive")


def install_playwright() -> None:
    """One PyPI package beside those of the project, which it leaves as they are; its own browsers are not needed."""
    into = ["--python", sys.executable, "--constraint", str(ROOT / "constraints.txt")]
    _run("playwright", [UV, "pip", "install", "--quiet", *into, PLAYWRIGHT_PACKAGE])


def install_axe() -> None:
    """One npm package."""
    if not shutil.which("npm"):
        _give_up("axe-core", "npm is missing")
    quietly = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    _run("axe-core", ["npm", "install", "--prefix", str(AXE_FOLDER), *quietly, AXE_PACKAGE])


def _run(name: str, command: Sequence[str], **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        _give_up(name, f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _give_up(name: str, why: str) -> NoReturn:
    raise SystemExit(f"make test-web: {name} cannot be had: {why}\n  → install it, then make test-web")


if __name__ == "__main__":
    NEEDED = (
        ("chromium", shutil.which(CHROMIUM) is not None, install_chromium),
        ("playwright", importlib.util.find_spec("playwright") is not None, install_playwright),
        ("axe-core", AXE.exists(), install_axe),
    )
    for name, is_there, install in NEEDED:
        if not is_there:
            print(f"installing {name}", flush=True)
            install()
