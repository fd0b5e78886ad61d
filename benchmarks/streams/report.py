"""Tables."""

from pathlib import Path


def write(results: Path) -> None:
    """Nothing yet."""
