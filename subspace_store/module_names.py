"""The names that a module's bases go by in files and in memory: its own for the first one, marked for the renewed one.

A module has its first basis, which its first tasks made, under its own name (`layer.0.query`), and may have a renewed
one beside it (`layer.0.query@2`, see merging/renewal.py). Private parts are under the module's own name. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable

MARK = "@"
"""Character that no adapter's module may have in its name."""
_RENEWED = f"{MARK}2"


def renewed(name: str) -> str:
    """The name of a module's renewed basis."""
    return name + _RENEWED


def is_renewed(basis: str) -> bool:
    """Whether the name is that of a renewed basis."""
    return basis.endswith(_RENEWED)


def plain(basis: str) -> str:
    """The module that a basis is of."""
    return basis.removesuffix(_RENEWED)


def newest(bases: Iterable[str]) -> dict[str, str]:
    """Module to the name of its newest basis: the renewed one where there is one."""
    return {plain(name): name for name in sorted(bases)}  # a module's own name is before its marked one
