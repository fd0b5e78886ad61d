"""Tensor files: parts that are written, read and checked alone."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load

from configs.errors import Corrupt
from subspace_store.files.tensor_file import Part, TensorFile, pack, write_tensors
from subspace_store.log.version import BlobRef
from subspace_store.storage.memory import MemoryStorage
from tests.subspace_store.builders import fresh_storage

TENSORS = {
    "layer.0.query": {"lam": torch.rand(3, dtype=torch.float64), "p": torch.rand(7, 3)},
    "layer.1.value": {"lam": torch.zeros(0, dtype=torch.float64), "p": torch.zeros(7, 0)},
    "ends/with/slashes": {"lam": torch.rand(1, dtype=torch.float64), "p": torch.rand(1, 5)},
}


class Counting(MemoryStorage):
    """Counts the bytes that are read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.bytes_read = 0

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        found = super().view(key, start, size)
        self.bytes_read += len(found)
        return found


def packed() -> list[Part]:
    return [pack(name, tensors) for name, tensors in TENSORS.items()]


def written(storage: MemoryStorage, parts: list[Part] | None = None) -> BlobRef:
    names = {name: tuple(tensors) for name, tensors in TENSORS.items()}
    return write_tensors(storage, 7, "test", {"b": 2, "a": [1]}, names, packed() if parts is None else parts)


def test_every_part_comes_back_as_it_was() -> None:
    storage = fresh_storage()
    file = TensorFile(storage, written(storage), "test")
    assert file.parts == tuple(TENSORS)
    assert file.info == {"b": 2, "a": [1]}
    for name, tensors in file.all().items():
        assert tensors.keys() == TENSORS[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, TENSORS[name][key])
            assert tensor.dtype == TENSORS[name][key].dtype
    assert file.shapes("layer.1.value") == {"lam": (0,), "p": (7, 0)}


def test_any_safetensors_reader_opens_it() -> None:
    storage = fresh_storage()
    content = storage.read(written(storage).key)
    found = load(content)
    assert set(found) == {f"{name}/{key}" for name, tensors in TENSORS.items() for key in tensors}
    assert torch.equal(found["layer.0.query/p"], TENSORS["layer.0.query"]["p"])


def test_one_part_is_read_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.files.tensor_file.SMALL_BYTES", 0)
    storage = Counting(fresh_storage().name)
    ref = written(storage)
    storage.bytes_read = 0
    file = TensorFile(storage, ref, "test")
    assert torch.equal(file.part("layer.0.query")["p"], TENSORS["layer.0.query"]["p"])
    assert storage.bytes_read == ref.head_bytes + 3 * 8 + 21 * 4


@pytest.mark.parametrize("small", [0, 2**20])
@pytest.mark.parametrize("place", [lambda ref: 9, lambda ref: ref.head_bytes, lambda ref: ref.size_bytes - 1])
def test_a_changed_byte_is_found(small: int, place: Callable[[BlobRef], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.files.tensor_file.SMALL_BYTES", small)
    storage = fresh_storage()
    ref = written(storage)
    content = bytearray(storage.read(ref.key))
    content[place(ref)] ^= 1
    storage.write(ref.key, bytes(content))
    with pytest.raises(Corrupt):
        TensorFile(storage, ref, "test").check()


@pytest.mark.parametrize("small", [0, 2**20])
@pytest.mark.parametrize("change", [lambda content: content + b"x", lambda content: content[:-1], lambda content: b""])
def test_another_length_is_found(small: int, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.files.tensor_file.SMALL_BYTES", small)
    storage = fresh_storage()
    ref = written(storage)
    storage.write(ref.key, change(storage.read(ref.key)))
    with pytest.raises(Corrupt):
        TensorFile(storage, ref, "test").check()


@pytest.mark.parametrize("place", [0, -1], ids=["head", "part"])
def test_what_was_restored_from_a_backup_is_read_by_whoever_had_the_damaged_file_open(place: int) -> None:
    storage = fresh_storage()
    ref = written(storage)
    whole = storage.read(ref.key)
    damaged = bytearray(whole)
    damaged[place] ^= 1
    storage.write(ref.key, bytes(damaged))
    file = TensorFile(storage, ref, "test")
    with pytest.raises(Corrupt):
        file.check()
    storage.write(ref.key, whole)
    file.check()


def test_a_file_of_another_kind_and_one_that_is_gone_are_named() -> None:
    storage = fresh_storage()
    ref = written(storage)
    with pytest.raises(Corrupt, match="'test'"):
        TensorFile(storage, ref, "basis").all()
    storage.delete(ref.key)
    with pytest.raises(Corrupt, match="gone"):
        TensorFile(storage, ref, "test")


def test_what_the_storage_damages_is_caught_while_writing() -> None:
    class Damaging(MemoryStorage):
        def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
            return memoryview(bytes(super().view(key, start, size)[:-1]) + b"\x7e")

    with pytest.raises(Corrupt, match="is not what was written"):
        written(Damaging(fresh_storage().name))


def test_the_same_tensors_give_the_same_bytes_under_another_name() -> None:
    storage = fresh_storage()
    one, other = written(storage), written(storage)
    assert one.key != other.key
    assert (one.sha256, storage.read(one.key)) == (other.sha256, storage.read(other.key))


def test_the_head_says_what_the_parts_hash_to() -> None:
    storage = fresh_storage()
    content = storage.read(written(storage).key)
    size = int.from_bytes(content[:8], "little")
    head = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["onebasis"])
    assert head["parts"] == {part.name: part.sha256 for part in packed()}
