"""Gets the S3 servers that `make test-s3` tests against: `python -m tests.servers.install`.

Ceph comes from Debian's packages, ministack from PyPI and s3rver from npm, the last two into folders of the virtual
environment. What is there is not asked for again. A server that cannot be had is an error, never a skipped test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.servers.server import KNOWN, wanted

UV = str(Path(sys.executable).with_name("uv"))
CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool", "setpriv")
CEPH_PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common", "util-linux")
# In an environment of its own: it demands one exact botocore, older than ours. Its last release that does not, 1.4.21,
# stores half an upload whose sender died as if it were whole.
MINISTACK_FOLDER = Path(sys.prefix) / "ministack"
MINISTACK = MINISTACK_FOLDER / "bin/ministack"
MINISTACK_PACKAGE = "ministack==1.5.33"
S3RVER_FOLDER = Path(sys.prefix) / "s3rver"
S3RVER = S3RVER_FOLDER / "node_modules/.bin/s3rver"
S3RVER_PACKAGE = "s3rver@3.7.1"


def is_installed(server: str) -> bool:
    """Whether it can be started."""
    if server == "ceph":
        return all(shutil.which(program) for program in CEPH_PROGRAMS)
    return {"ministack": MINISTACK, "s3rver": S3RVER}[server].exists()


def install_ceph() -> None:
    """Debian's packages."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        _give_up("ceph", f"this is not root with apt-get, who alone can install {' '.join(CEPH_PACKAGES)}")
    _run("ceph", ["apt-get", "update", "--quiet=2"])
    quietly = ["--quiet=2", "--yes", "--no-install-recommends"]
    _run("ceph", ["apt-get", "install", *quietly, *CEPH_PACKAGES], DEBIAN_FRONTEND="noninteractive")


def install_ministack() -> None:
    """One PyPI package, in an environment inside ours."""
    _run("ministack", [UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(MINISTACK_FOLDER)])
    into = ["--python", str(MINISTACK_FOLDER / "bin/python")]
    _run("ministack", [UV, "pip", "install", "--quiet", *into, MINISTACK_PACKAGE])


def install_s3rver() -> None:
    """One npm package, in a folder of the virtual environment."""
    if not shutil.which("npm"):
        _give_up("s3rver", "npm is missing")
    quietly = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    _run("s3rver", ["npm", "install", "--prefix", str(S3RVER_FOLDER), *quietly, S3RVER_PACKAGE])


def _run(server: str, command: Sequence[str], **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        _give_up(server, f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _give_up(server: str, why: str) -> NoReturn:
    others = ",".join(name for name in KNOWN if name != server)
    raise SystemExit(
        f"make test-s3: the server {server} cannot be had: {why}\n"
        f"  → install it, or test against the others: ONEBASIS_S3_SERVERS={others} make test-s3"
    )


if __name__ == "__main__":
    INSTALL = {"ceph": install_ceph, "ministack": install_ministack, "s3rver": install_s3rver}
    for name in wanted():
        if not is_installed(name):
            print(f"installing the S3 server {name}", flush=True)
            INSTALL[name]()
