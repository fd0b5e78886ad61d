"""s3rver on this machine: an S3 server that ignores `If-None-Match` and overwrites. The doctor must refuse it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.moto_server import free_port
from tests.servers.install import S3RVER
from tests.servers.server import BUCKET, Server, start, stop, wait_for_port

OWN_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER"}
"""The only ones it takes."""


@contextlib.contextmanager
def s3rver_server(folder: Path) -> Iterator[Server]:
    """The running server."""
    port, log = free_port(), folder / "output.log"
    where = ["--directory", str(folder / "objects"), "--configure-bucket", BUCKET]
    process = start([str(S3RVER), "--address", "127.0.0.1", "--port", str(port), *where], log)
    try:
        wait_for_port(process, port, log)
        yield Server("s3rver", f"http://127.0.0.1:{port}")
    finally:
        stop(process)
