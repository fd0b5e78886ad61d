"""A real S3 server as the tests see it: an address and places in its bucket. Which are wanted; how they start and stop.

ceph.py, ministack.py and s3rver.py start one each, on loopback; install.py gets what they need.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import boto3

from configs.settings import StorageSettings

BUCKET = "versions"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "testsecret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of the person who runs the tests is used, and nothing is asked of a cloud's metadata service.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
KNOWN = ("ceph", "ministack", "s3rver")
START_SECONDS = 60
_prefixes = itertools.count()


def wanted() -> tuple[str, ...]:
    """The servers to test against: all, or those that ONEBASIS_S3_SERVERS names, separated by commas."""
    names = tuple(name for name in os.environ.get("ONEBASIS_S3_SERVERS", ",".join(KNOWN)).split(",") if name)
    if not names or set(names) - set(KNOWN):
        raise SystemExit(f"ONEBASIS_S3_SERVERS={','.join(names)}: name some of {','.join(KNOWN)}")
    return names


@dataclass(frozen=True)
class Server:
    """A running server with one empty bucket."""

    name: str
    endpoint_url: str

    def place(self, what: str = "test") -> StorageSettings:
        """A folder of the bucket that no other test uses."""
        return StorageSettings(url=f"s3://{BUCKET}/{what}/{next(_prefixes)}", endpoint_url=self.endpoint_url)


def with_bucket(name: str, endpoint_url: str) -> Server:
    """The server, with its bucket made."""
    key, secret = CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    session = boto3.session.Session(key, secret, region_name=CREDENTIALS["AWS_DEFAULT_REGION"])
    session.client("s3", endpoint_url=endpoint_url).create_bucket(Bucket=BUCKET)
    return Server(name, endpoint_url)


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a server's process. It dies with the process that started it, however that one ends."""
    with log.open("ab") as file:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
        )


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when the process listens; raise with the end of its log when it ended or took too long."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    stop(process)
    raise RuntimeError(f"{process.args} does not listen on port {port}:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """kill -9, and wait until it is gone."""
    process.kill()
    process.wait(10)
