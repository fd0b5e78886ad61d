"""A task file that somebody sends to have it read: what it says, and which files have to come with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.places import is_in_bucket
from configs.task_spec import FILE_KEYS, task_spec_of
from configs.uploads import is_upload
from subspace_store.formats.adapter_files import READ_FILES


def read_task(lines: Sequence[str]) -> dict[str, Any]:
    """The task document with the paths as they are written, and what of it is neither sent yet nor in a bucket.

    Raises:
        InvalidInput: The file is no task file; names each mistake by its key.
    """
    spec = task_spec_of("\n".join(lines).encode())
    files = []
    for (section, key), folder in FILE_KEYS.items():
        place = getattr(getattr(spec, section), key)
        if place and not is_upload(place) and not is_in_bucket(place):
            is_file = place.endswith(".safetensors")  # a LoRA of diffusers, by any name
            only = READ_FILES if folder == "adapter" and not is_file else ()
            files.append({"key": f"{section}.{key}", "place": place, "folder": folder, "only": list(only)})
    return {"title": f"{spec.team}/{spec.name}", "task": spec.model_dump(mode="json"), "files": files}
