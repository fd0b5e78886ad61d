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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere

FILE_BYTES_MAX = 2 * 2**30
"""Largest file that is read. It is mapped, but all that it says is in memory once, as float32 in canonical form: up to
twice as much. A LoRA of rank 64 on every layer of a 70B model has 1.7 GB in bfloat16."""
HEADER_BYTES_MAX = 16 * 2**20
TENSORS_MAX = 100_000  # a LoRA of every expert of a mixture with 60 layers of 128 experts has 46,080
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8  # size of the number in front of the header: the header's length


def read_weights(
    file: Path, todo: str, open_file: OpenFile = open_anywhere
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the facts in its header.

    The tensors are views of the file: their numbers are read when they are used, and are those of the file for as long
    as nobody changes it.

    Args:
        todo: What to do if the file cannot be opened.

    Raises:
        InvalidInput: The file is missing, larger than the limits above, or not what its header says.
    """
    try:
        with open_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > FILE_BYTES_MAX:
                raise InvalidInput(
                    f"has {size:,} bytes, more than the {FILE_BYTES_MAX:,} that are read",
                    str(file),
                    "save it in bfloat16, or with a smaller rank",
                )
            start = opened.read(_LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if length > min(HEADER_BYTES_MAX, size - _LENGTH_BYTES):
                raise _broken(
                    file, f"its header would have {length:,} bytes; the file has {size:,}, and {HEADER_BYTES_MAX:,} "
                    "is the most that is read"
                )  # fmt: skip
            header, facts = _header(opened.read(length), file)
            place = f"/proc/self/fd/{opened.fileno()}"  # the file that was opened, whatever its name means by now
            with safe_open(place, "pt"):  # checks that the header is true
                tensors = _mapped(place, size, _LENGTH_BYTES + length, header)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(file), todo) from error
    except SafetensorError as error:
        raise _broken(file, str(error)) from error
    except KeyError as error:
        raise _broken(file, f"it has a tensor of type {error}, which is not read") from error
    except (AssertionError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _broken(file, f"a tensor is not what the header says: {error}") from error
    return tensors, facts


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


def _mapped(place: str, size: int, start: int, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """Views of a file, one for each tensor of a header that is true. start: Where the tensors begin."""
    whole: Any = torch.UntypedStorage.from_file(place, False, size)
    content = torch.empty(0, dtype=torch.uint8).set_(whole)
    found: dict[str, Tensor] = {}
    for name, about in header.items():
        first, end = (start + offset for offset in about["data_offsets"])
        kind = _TYPES[about["dtype"]]
        part = content[first:end]
        found[name] = (part.clone() if first % kind.itemsize else part).view(kind).reshape(about["shape"])
    return found


def _header(text: bytes, file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors that a header names, and the facts in it."""
    try:
        header: Any = json.loads(text)
        facts = header.pop("__metadata__", None) or {}
        known = {str(name): value for name, value in facts.items() if isinstance(value, str)}
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise _broken(file, f"its header is not readable: {error}") from error
    if len(header) > TENSORS_MAX:
        raise _broken(file, f"it names {len(header):,} tensors, and {TENSORS_MAX:,} is the most that is read")
    return header, known


def _broken(file: Path, why: str) -> InvalidInput:
    return InvalidInput(f"is not a safetensors file that can be read: {why}", str(file), "copy or save it again")
