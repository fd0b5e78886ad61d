"""Ceph's object gateway on this machine: one monitor, one OSD in memory, one RGW, all on loopback.

The only server of these tests that checks signatures. Contents are lost when it stops. Needs the Debian packages
of install.py; no cephadm, no systemd, no manager daemon.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.moto_server import free_port
from tests.servers.server import CREDENTIALS, Server, start, stop, wait_for_port, with_bucket

# One copy of everything, no placement rules, and none of the waits by which monitors collect changes (14 s to start
# instead of 1) and TCP small packets (45 ms for a read instead of 1).
CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
admin socket =
log file = {folder}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.01
auth allow insecure global id reclaim = false
[mon.a]
mon data = {folder}/mon
[osd.0]
osd objectstore = memstore
osd data = {folder}/osd
memstore device bytes = 4294967296
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable usage log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw run sync thread = false
"""


@contextlib.contextmanager
def ceph_server(folder: Path) -> Iterator[Server]:
    """The running gateway; all of it is killed at the end.

    Cost:
        1 s to start, 0.15 GB.
    """
    port, mon_port, fsid = free_port(), free_port(), str(uuid.uuid4())
    log = folder / "output.log"
    config = folder / "ceph.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, mon_port=mon_port, fsid=fsid))

    environment = {**os.environ, "CEPH_CONF": str(config)}

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    with contextlib.ExitStack() as running:

        def daemon(*command: str) -> subprocess.Popen[bytes]:
            process = start([*command, "-f"], log, CEPH_CONF=str(config))
            running.callback(stop, process)
            return process

        for name in ("mon", "osd"):
            (folder / name).mkdir()
        ring = str(folder / "keyring")
        run("ceph-authtool", "--create-keyring", ring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw", "osd.0"):
            caps = [word for daemon in ("mon", "osd", "mgr") for word in ("--cap", daemon, "allow *")]
            run("ceph-authtool", ring, "--gen-key", "-n", name, *caps)
        monmap = str(folder / "monmap")
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        run("ceph-mon", "-i", "a", "--mkfs", "--keyring", ring, "--monmap", monmap)
        wait_for_port(daemon("ceph-mon", "-i", "a"), mon_port, log)
        osd = str(uuid.uuid4())
        run("ceph", "osd", "new", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        daemon("ceph-osd", "-i", "0")
        wait_for_port(daemon("radosgw", "-n", "client.rgw"), port, log)
        keys = ["--access-key", CREDENTIALS["AWS_ACCESS_KEY_ID"], "--secret-key", CREDENTIALS["AWS_SECRET_ACCESS_KEY"]]
        run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        yield with_bucket("ceph", f"http://127.0.0.1:{port}")
