"""The web page's files: which one answers which path, with which headers.

They are built from `source/` by `make web` and kept in `built/`, so that a service needs no node. The page speaks to
the HTTP API alone, with the token of whoever looks at it: the files hold nothing of a service and need none. All are
read when the process starts; a path is looked up among them and never opened.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import Corrupt

HERE = Path(__file__).resolve().parent
BUILT, SOURCE = HERE / "built", HERE / "source"
MANIFEST = "manifest.json"
"""File in `built/` that says from which sources it was built, and what each file is."""
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
NOT_SOURCES = ("node_modules",)

POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)  # fmt: skip
"""Content security policy: nothing from elsewhere, no script or style that stands in the page itself, in no frame."""
ALWAYS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
ASK_AGAIN = "no-cache"
"""For the page itself: kept, and asked for again each time."""
FOR_EVER = "public, max-age=31536000, immutable"
"""For the rest: a file with another content has another name."""
GZIP_LEAST = 512
"""Bytes from which compressing is worth its headers."""


@dataclass(frozen=True)
class Answer:
    """What is sent for one path."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class File:
    """One built file."""

    content: bytes
    zipped: bytes | None
    """The same in gzip; None where it is no shorter."""
    media_type: str
    etag: str
    cache: str

    def answer(self, accept_encoding: str, if_none_match: str) -> Answer:
        """What is sent to a browser that says these two things of itself."""
        headers = {**ALWAYS, "cache-control": self.cache, "etag": self.etag, "vary": "Accept-Encoding"}
        known = {one.strip().removeprefix("W/") for one in if_none_match.split(",")}
        if self.etag in known or "*" in known:
            return Answer(304, headers, b"")
        headers["content-type"] = self.media_type
        if self.zipped is not None and _takes_gzip(accept_encoding):
            return Answer(200, {**headers, "content-encoding": "gzip"}, self.zipped)
        return Answer(200, headers, self.content)


def read_pages(folder: Path = BUILT) -> dict[str, File]:
    """Name to file, of all that were built.

    Raises:
        Corrupt: One is not what was built, or is missing.
    """
    return {name: _read(folder, name, digest) for name, digest in read_manifest(folder)["files"].items()}


def read_manifest(folder: Path = BUILT) -> dict[str, dict[str, str]]:
    """`files`: name to SHA-256 of what was built; `sources`: the same of what it was built from.

    Raises:
        Corrupt: It is missing.
    """
    found: dict[str, dict[str, str]] = json.loads(_content(folder, MANIFEST))
    return found


def digests_of_sources(folder: Path = SOURCE) -> dict[str, str]:
    """Name to SHA-256 of all sources; what npm put there is none."""
    return {path.relative_to(folder).as_posix(): _digest(path.read_bytes()) for path in _sources(folder)}


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {*path.relative_to(folder).parts} & {*NOT_SOURCES}:
            yield path


def _read(folder: Path, name: str, digest: str) -> File:
    content = _content(folder, name)
    if _digest(content) != digest:
        raise Corrupt("a file of the web page is not what was built", str(folder / name), "install onebasis anew")
    zipped = gzip.compress(content, 9, mtime=0) if len(content) >= GZIP_LEAST else content
    return File(
        content=content,
        zipped=zipped if len(zipped) < len(content) else None,
        media_type=MEDIA_TYPES[Path(name).suffix],
        etag=f'"{digest[:32]}"',
        cache=ASK_AGAIN if name == INDEX else FOR_EVER,
    )


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise Corrupt("a file of the web page is missing", str(folder / name), "install onebasis anew") from None


def _takes_gzip(accept_encoding: str) -> bool:
    for one in accept_encoding.lower().split(","):
        name, _, weight = one.partition(";")
        if name.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
