"""Tensors in one immutable object, written part by part and readable part by part.

A file is a safetensors file that any reader of that format opens. Its head also names the sha256 of every part, and
the record in the log names the sha256 of the head: so a part that was fetched alone can be checked alone, and neither
writing nor reading needs the whole file in memory. A name is never used twice, so a file needs no lock.

Heads are read without torch and without numpy: both are imported only where tensors are read or written.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from configs.errors import Corrupt, NotFound
from subspace_store.log.version import BlobRef
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.protocol import Storage

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

TYPES = {"float64": "F64", "float32": "F32"}
"""Name of a type in numpy to its name in safetensors."""
DTYPES = {name: dtype for dtype, name in TYPES.items()}
ITEM_BYTES = {"F64": 8, "F32": 4}
WIDEST = 10**15
"""Placeholder for numbers in the head that are not known yet: no offset or length has more digits."""

SMALL_BYTES = 2**20
"""Size of a file below which one request for all parts is faster than one for each."""


@dataclass(frozen=True)
class Part:
    """Some tensors that are read together, as they will be stored."""

    name: str
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(tensor, type, shape) in the order of the bytes."""
    content: bytes
    sha256: str


def pack(name: str, tensors: Mapping[str, Tensor]) -> Part:
    """Tensors as bytes; hashed here, so that the caller may do it in threads. Float64 and float32 only."""
    arrays = [(key, tensor.contiguous().numpy()) for key, tensor in tensors.items()]
    content = b"".join(array.tobytes() for _, array in arrays)
    layout = tuple((key, TYPES[array.dtype.name], tuple(array.shape)) for key, array in arrays)
    return Part(name, layout, content, hashlib.sha256(content).hexdigest())


def blob_key(epoch: int) -> str:
    """A name for a new blob of a writer. Names sort by time; 8 random bytes distinguish two of the same nanosecond."""
    return f"blobs/{epoch:010d}/{time.time_ns():016x}{secrets.token_hex(8)}.safetensors"


def write_tensors(
    storage: Storage,
    epoch: int,
    kind: str,
    info: Mapping[str, Any],
    tensors: Mapping[str, Sequence[str]],
    parts: Iterable[Part],
) -> BlobRef:
    """Write parts as they come, read everything back and compare.

    Args:
        kind: Name of the content's format; a reader must ask for the same one.
        info: Values for the head, of types that JSON knows; read again after the last part, when it may have less.
        tensors: Part name to the names of its tensors, for all parts that may come, in their order: the size of the
            head depends on it.
        parts: The parts, in that order.

    Raises:
        Corrupt: The storage gave back other bytes than it took.

    Cost:
        Memory for one part beside what the storage buffers.
    """
    # With two dimensions, the widest numbers and types of three letters: the real head is never longer.
    room = len(
        _head(
            kind,
            info,
            [(n, [(t, "F64", (WIDEST,) * 2) for t in names], "0" * 64) for n, names in tensors.items()],
            WIDEST,
        )
    )
    key, written, body_size = blob_key(epoch), [], 0
    with storage.stream(key, room) as out:
        for part in parts:
            out.append(part.content)
            written.append((part.name, part.layout, part.sha256))
            body_size += len(part.content)
        head = _head(kind, info, written, 0, room)
        out.finish(head)
    ref = BlobRef(key=key, size_bytes=room + body_size, sha256=hashlib.sha256(head).hexdigest(), head_bytes=room)
    TensorFile(storage, ref, kind).check()
    return ref


class TensorFile:
    """Reads one file.

    Args:
        ref: Key, size and digest, from the log.
        kind: Format that the file must have; empty for any.

    Raises:
        Corrupt: The file is missing, damaged, or of another kind; raised by any method that reads.
    """

    def __init__(self, storage: Storage, ref: BlobRef, kind: str) -> None:
        self.storage, self.ref, self.kind = storage, ref, kind
        self._whole: memoryview | None = None
        """All of it, where it is small; not kept where it is damaged, for it may be restored while this is open."""
        if ref.size_bytes <= SMALL_BYTES:
            self._whole = self._view(0, ref.size_bytes)

    @property
    def where(self) -> str:
        return f"{self.storage.url}/{self.ref.key}"

    @property
    def info(self) -> dict[str, Any]:
        """Values that the writer put into the head."""
        found: dict[str, Any] = self._head["info"]
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, in the order of the bytes."""
        return tuple(self._head["parts"])

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape, from the head alone."""
        return {name: shape for name, (_, shape, _) in self._layout[part].items()}

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, checked, in memory of their own. One request.

        Raises:
            Corrupt: The bytes are not those that were written.
        """
        import torch

        return {tensor: torch.from_numpy(array) for tensor, array in self.arrays(name).items()}

    def arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The same as `part`, as numpy arrays, for a reader that does not load torch."""
        import numpy as np

        content, start = self._checked(name)
        # Copied: memory of its own is aligned, can be written to, and outlives the file.
        return {
            tensor: np.frombuffer(bytearray(content[a - start : b - start]), DTYPES[dtype]).reshape(shape)
            for tensor, (dtype, shape, (a, b)) in self._layout[name].items()
        }

    def all(self) -> dict[str, dict[str, Tensor]]:
        """Every part."""
        return dict(zip(self.parts, self._each(self.part), strict=True))

    def check(self) -> None:
        """Compare every part with its digest.

        Raises:
            Corrupt: A part differs, or the object has another length than the log says.
        """
        self._each(lambda name: self._checked(name)[1])
        spans = [span[1] for layout in self._layout.values() for _, _, span in layout.values()]
        end = self.ref.head_bytes + max(spans, default=0)
        if end != self.ref.size_bytes or len(self._view(end, 1)):
            raise Corrupt(
                f"has another length than {self.ref.size_bytes} bytes", self.where, "restore it from a backup"
            )

    def _each(self, function: Callable[[str], T]) -> list[T]:
        """One result for every part; in threads where each part is a request of its own."""
        return list(in_order(function, self.parts, AT_ONCE if self._whole is None else 1))

    @cached_property
    def _head(self) -> dict[str, Any]:
        content = self._view(0, self.ref.head_bytes)
        found = hashlib.sha256(content).hexdigest()
        if found != self.ref.sha256:
            self._whole = None
            raise Corrupt(
                f"its head has sha256 {found[:12]}…, the log says {self.ref.sha256[:12]}…",
                self.where,
                "restore the object from a backup; nothing was changed",
            )
        names: dict[str, Any] = json.loads(bytes(content[8:]))
        head: dict[str, Any] = json.loads(names.pop("__metadata__")["onebasis"])
        if self.kind and head["format"] != self.kind:
            raise Corrupt(f"has format {head['format']!r}, this code reads {self.kind!r}", self.where)
        return head | {"tensors": names}

    @cached_property
    def _layout(self) -> dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]]:
        layout: dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]] = {name: {} for name in self.parts}
        for key, item in self._head["tensors"].items():
            name, _, tensor = key.rpartition("/")
            layout[name][tensor] = (item["dtype"], tuple(item["shape"]), tuple(item["data_offsets"]))
        return layout

    def _checked(self, name: str) -> tuple[memoryview, int]:
        """The bytes of a part, and its offset after the head."""
        spans = [span for _, _, span in self._layout[name].values()]
        start, stop = min(first for first, _ in spans), max(last for _, last in spans)
        content = self._view(self.ref.head_bytes + start, stop - start)
        if hashlib.sha256(content).hexdigest() != self._head["parts"][name]:
            self._whole = None
            raise Corrupt(f"the part {name} is not what was written", self.where, "restore the object from a backup")
        return content, start

    def _view(self, start: int, size: int) -> memoryview:
        if self._whole is not None and start + size <= self.ref.size_bytes:
            return self._whole[start : start + size]
        try:
            return self.storage.view(self.ref.key, start, size)
        except NotFound as error:
            raise Corrupt("the object that the log names is gone", self.where, "restore it from a backup") from error


def _head(
    kind: str,
    info: Mapping[str, Any],
    parts: Sequence[tuple[str, Sequence[tuple[str, str, Sequence[int]]], str]],
    offset: int,
    size: int | None = None,
) -> bytes:
    """The head of a safetensors file: 8 bytes of length, then JSON, filled with spaces up to `size`."""
    ours = {"format": kind, "info": info, "parts": {name: sha256 for name, _, sha256 in parts}}
    # One metadata value: other programs pass it on unchanged.
    names: dict[str, Any] = {"__metadata__": {"onebasis": json.dumps(ours, separators=(",", ":"))}}
    for name, layout, _ in parts:
        for tensor, dtype, shape in layout:
            end = offset + math.prod(shape) * ITEM_BYTES[dtype] if offset < WIDEST else offset
            names[f"{name}/{tensor}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(names, separators=(",", ":")).encode()
    size = 8 + (len(text) + 7) // 8 * 8 if size is None else size
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
