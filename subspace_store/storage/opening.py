"""Opening the storage that a settings file names. One kind is imported, not all."""

from __future__ import annotations

from configs.errors import InvalidInput
from configs.settings import StorageSettings
from subspace_store.storage.protocol import Storage


def open_storage(settings: StorageSettings, folder: str = "") -> Storage:
    """Open the storage that a settings file names.

    Args:
        settings: `file:FOLDER`, `s3://BUCKET/PREFIX` or `memory:NAME`.
        folder: Appended to the address: the subspace's name.

    Raises:
        InvalidInput: Another kind of address.
    """
    url = f"{settings.url.rstrip('/')}/{folder}" if folder else settings.url
    kind, _, rest = url.partition(":")
    if not rest.strip("/") and kind in ("file", "s3", "memory"):
        raise InvalidInput("the address names no place", url, "write file:FOLDER, s3://BUCKET/PREFIX or memory:NAME")
    # One kind is imported, not all: a reader of a folder needs no boto3.
    if kind == "file":
        from subspace_store.storage.local import LocalStorage

        return LocalStorage(rest.removeprefix("//") if rest.startswith("///") else rest)
    if kind == "memory":
        from subspace_store.storage.memory import MemoryStorage

        return MemoryStorage(rest)
    if kind == "s3":
        from subspace_store.storage.s3 import S3Storage

        return S3Storage(
            url,
            endpoint_url=settings.endpoint_url,
            region=settings.region,
            path_style=settings.path_style,
            sse=settings.sse,
            sse_kms_key_id=settings.sse_kms_key_id,
        )
    raise InvalidInput(
        f"storage of kind {kind!r} is not known", url, "write file:FOLDER, s3://BUCKET/PREFIX or memory:NAME"
    )
