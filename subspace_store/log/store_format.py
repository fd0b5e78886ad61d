"""The object FORMAT in a store's folder: the number of the format, and the base model that the store belongs to."""

from __future__ import annotations

import json

from configs.errors import Corrupt, InvalidInput, NotFound
from subspace_store.storage.protocol import Storage

FORMAT_NUMBER = 2
"""Of everything below the store's folder. tests/data/stores has a store of each format that is read."""


def check_format(storage: Storage, base_model: str = "", base_sha256: str = "") -> tuple[str, str]:
    """(base model, sha256) of the folder, or the caller's where the folder does not say; empty is unknown.

    Raises:
        InvalidInput: The folder belongs to another base model, or has a form that is read no more.
        Corrupt: A newer format, or no FORMAT at all.
    """
    where = f"{storage.url}/FORMAT"
    try:
        found = json.loads(storage.read("FORMAT"))
        number, theirs = int(found["format"]), (str(found["base_model"]), str(found["base_sha256"]))
    except NotFound:
        return base_model, base_sha256
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"is no FORMAT of a subspace: {error}", where) from error
    if number > FORMAT_NUMBER:
        raise Corrupt(f"has format {number}, this code reads up to {FORMAT_NUMBER}", where, "use a newer onebasis")
    if number < FORMAT_NUMBER:
        raise InvalidInput(
            f"has format {number}, which onebasis 0.1 wrote and this code does not read",
            where,
            "export its tasks with the version that wrote it, and import them here; or choose another storage.url",
        )
    for what, stored, ours in zip(("name", "sha256"), theirs, (base_model, base_sha256), strict=True):
        if stored and ours and stored != ours:
            raise InvalidInput(
                f"this subspace belongs to the base model with {what} {stored!r}, not {ours!r}",
                where,
                "choose another storage.url, or the base model it was made for",
            )
    return theirs[0] or base_model, theirs[1] or base_sha256
