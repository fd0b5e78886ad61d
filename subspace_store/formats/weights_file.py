"""Safetensors files: the header of a foreign one is checked before anything is loaded; ours get facts in the header.

The library refuses offsets that overlap or lie outside the file. It does not limit how large a header may be or how
many tensors it may name, and it fails in several ways on types that torch does not have; both are handled here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere

FILE_BYTES_MAX = 8 * 2**30  # an adapter of this size is a full fine-tune under another name
HEADER_BYTES_MAX = 16 * 2**20
TENSORS_MAX = 100_000  # a LoRA of every expert of a mixture with 60 layers of 128 experts has 46,080
_LENGTH_BYTES = 8  # size of the number in front of the header: the header's length


def read_weights(
    file: Path, todo: str, open_file: OpenFile = open_anywhere
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the facts in its header.

    Args:
        todo: What to do if the file cannot be opened.

    Raises:
        InvalidInput: The file is missing, larger than the limits above, or not what its header says.
    """
    try:
        with open_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > FILE_BYTES_MAX:
                raise InvalidInput(f"has {size:,} bytes, more than the {FILE_BYTES_MAX:,} that are read", str(file))
            start = opened.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if length > min(HEADER_BYTES_MAX, size - _LENGTH_BYTES):
                raise _broken(
                    file, f"its header would have {length:,} bytes; the file has {size:,}, and {HEADER_BYTES_MAX:,} "
                    "is the most that is read"
                )  # fmt: skip
            header = _header(opened.read(length), file)
            content = start + header[1] + opened.read(size)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(file), todo) from error
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise _broken(file, str(error)) from error
    except KeyError as error:
        raise _broken(file, f"it has a tensor of type {error}, which is not read") from error
    except (AssertionError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _broken(file, f"a tensor is not what the header says: {error}") from error
    return tensors, header[0]


def weights_with_facts(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """A safetensors file with facts in its header; the same content gives the same bytes.

    safetensors writes several facts in the order of their hashes, which differs from process to process, so the header
    is written again here, sorted.
    """
    content = save_safetensors(dict(tensors))
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:end]) | {"__metadata__": {"format": "pt", **facts}}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + bytes(content[end:])


def _header(text: bytes, file: Path) -> tuple[dict[str, str], bytes]:
    """The facts in a header, and the header as it was read."""
    try:
        header: Any = json.loads(text)
        names = header.keys() - {"__metadata__"}
        facts = header.get("__metadata__") or {}
        known = {str(name): value for name, value in facts.items() if isinstance(value, str)}
    except (ValueError, RecursionError, AttributeError) as error:
        raise _broken(file, f"its header is not readable: {error}") from error
    if len(names) > TENSORS_MAX:
        raise _broken(file, f"it names {len(names):,} tensors, and {TENSORS_MAX:,} is the most that is read")
    return known, text


def _broken(file: Path, why: str) -> InvalidInput:
    return InvalidInput(f"is not a safetensors file that can be read: {why}", str(file), "copy or save it again")
