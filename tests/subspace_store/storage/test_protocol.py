"""Addresses of storages, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InvalidInput
from configs.settings import StorageSettings
from subspace_store import open_storage


def test_an_address_opens_its_kind_of_storage_with_the_folder_appended(tmp_path: Path) -> None:
    assert open_storage(StorageSettings(url=f"file:{tmp_path}/"), "minilm").url == f"file:{tmp_path}/minilm"
    assert open_storage(StorageSettings(url=f"file://{tmp_path}"), "minilm").url == f"file:{tmp_path}/minilm"
    assert open_storage(StorageSettings(url="memory:x"), "minilm").url == "memory:x/minilm"
    assert open_storage(StorageSettings(url="s3://bucket/deep/er"), "minilm").url == "s3://bucket/deep/er/minilm"
    assert open_storage(StorageSettings(url="s3://bucket")).url == "s3://bucket"


@pytest.mark.parametrize("url", ["gs://bucket/x", "store", "file:", "s3://", ""])
def test_another_address_is_refused_with_the_kinds_there_are(url: str) -> None:
    with pytest.raises(InvalidInput, match="file:FOLDER, s3://BUCKET/PREFIX or memory:NAME"):
        open_storage(StorageSettings(url=url))


def test_importing_the_library_loads_neither_ray_nor_boto3() -> None:
    code = "import sys, subspace_store; sys.exit(bool({'ray', 'boto3', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
