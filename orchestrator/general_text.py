"""The text by which it is measured what a language model loses by its tasks: read once, when its subspace is opened."""

from __future__ import annotations

from pathlib import Path

from configs.errors import InvalidInput
from configs.settings import BaseModelSettings
from workers.rows.text_lines import GZIP_MAGIC, HEAD_BYTES, check_format, numbered_lines

CHARACTERS = 40_000
"""As many are read: more than the tokens that are measured (`workers/general_loss.py`) in any language."""
LEAST = 2_000
"""Fewer are some hundred tokens, and what a model loses on these says little."""


def general_text(base: BaseModelSettings) -> str:
    """The beginning of `base_model.general_text`; empty where the settings name none.

    Raises:
        InvalidInput: There is no such file, it is no text, or it is too short to measure anything by.
    """
    if base.general_text is None:
        return ""
    file, key = Path(base.general_text), f"general_text of the base model {base.name}"
    todo = "name a text file in UTF-8, plain or .gz, that no task is trained on, or take the setting out"
    try:
        found = beginning_of(file)
    except InvalidInput as error:
        raise InvalidInput(f"{file} cannot be read: {error.what}", key, todo) from error
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error}", key, todo) from error
    if len(found.strip()) < LEAST:
        what = f"{file} has {len(found.strip()):,} characters, too few to measure by"
        raise InvalidInput(what, key, f"name one of at least {LEAST:,}; the first {CHARACTERS:,} are read")
    return found


def beginning_of(file: Path) -> str:
    """As much of a text as is read. Raises OSError, and InvalidInput as `numbered_lines`."""
    found = ""
    with file.open("rb") as opened:
        if file.suffix == ".gz":
            check_format(opened.read(HEAD_BYTES), str(file), GZIP_MAGIC)
            opened.seek(0)
        for _, line in numbered_lines(opened, str(file)):
            found += line.replace("\r\n", "\n").replace("\r", "\n")
            if len(found) >= CHARACTERS:
                break
    return found[:CHARACTERS]
