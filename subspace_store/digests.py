"""The digest by which contents are named and compared."""

from __future__ import annotations

import hashlib


def digest(content: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
