"""Stores that were written once are read by all later code. The folders in tests/data/stores never change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Corrupt, InvalidInput
from subspace_store import SubspaceReader
from subspace_store.log.store_format import FORMAT_NUMBER
from subspace_store.storage.local import LocalStorage
from subspace_store.verify import verify
from tests.subspace_store.builders import fresh_storage, merged, opened, random_adapter, reading
from tests.subspace_store.golden import GOLDEN, SETTINGS, facts

FORMATS = sorted(GOLDEN.iterdir())


def same(found: Any, expected: Any, where: str = "") -> None:
    """Equal, numbers to 1e-6: another machine's BLAS may round in another order."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, item in enumerate(expected):
            same(found[index], item, f"{where}/{index}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_store_of_this_format_says_what_it_said_when_it_was_written(folder: Path) -> None:
    reader = SubspaceReader.open(LocalStorage(str(folder / "store")))
    same(json.loads(json.dumps(facts(reader))), json.loads((folder / "expected.json").read_text()))
    assert verify(reader, deep=True) == []


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_store_of_this_format_goes_on(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    store = opened(LocalStorage(str(tmp_path / "store")), **SETTINGS)
    before = set(store.state.tasks_at(store.state.refs["main"]))
    version = merged(store, {"later": random_adapter(70)})
    store.publish(version.number, op_key="later", actor="me")
    assert set(store.state.tasks_at(version.number)) == {*before, "later"}
    assert verify(reading(store.storage), deep=True) == []


def test_there_is_a_golden_store_of_the_format_that_this_code_writes() -> None:
    assert f"format-{FORMAT_NUMBER}" in [folder.name for folder in FORMATS]


@pytest.mark.parametrize(("number", "error", "text"), [(FORMAT_NUMBER + 1, Corrupt, "newer"), (1, InvalidInput, "0.1")])
def test_formats_that_this_code_does_not_read_are_refused_by_number(
    number: int, error: type[Exception], text: str
) -> None:
    storage = fresh_storage()
    storage.write("FORMAT", json.dumps({"format": number, "base_model": "b", "base_sha256": ""}).encode())
    with pytest.raises(error, match=text):
        SubspaceReader.open(storage)
