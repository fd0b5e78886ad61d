"""The text by which it is measured what a language model loses by its tasks: read once, when its subspace is opened."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings

CHARACTERS = 40_000
"""As many are read: more than the tokens that are measured (`workers/general_loss.py`) in any language."""
LEAST = 2_000
"""Fewer are some hundred tokens, and what a model loses on these says little."""


def general_text(base: BaseModelSettings) -> str:
    """The beginning of `base_model.general_text`; empty where the settings name none.

    Raises:
        InvalidInput: There is no such file, it is no UTF-8 text, or it is too short to measure anything by.
    """
    if base.general_text is None:
        return ""
    file = Path(base.general_text)
    todo = "name a text file in UTF-8, plain or .gz, that no task is trained on, or take the setting out"
    try:
        found = beginning_of(file)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"byte {error.start:,} of it is no UTF-8 text", _key(base), todo) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{file} cannot be read: {error}", _key(base), todo) from error
    if len(found.strip()) < LEAST:
        what = f"{file} has {len(found.strip()):,} characters, too few to measure by"
        raise InvalidInput(what, _key(base), f"name one of at least {LEAST:,}; the first {CHARACTERS:,} are read")
    return found


def beginning_of(file: Path) -> str:
    """As much of a text as is read. Raises OSError, EOFError, zlib.error, UnicodeDecodeError."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as text:
        return text.read(CHARACTERS)


def _key(base: BaseModelSettings) -> str:
    return f"general_text of the base model {base.name}"
