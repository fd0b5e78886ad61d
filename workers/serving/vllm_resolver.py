"""A resolver for vLLM: `model: payments/charges` is answered by what `main` holds of that task.

vLLM asks its resolvers for a model that it does not know, and then keeps what it was given. So each version's adapter
is written to a folder of its own, and when `main` has moved, vLLM is told through its own API to take the new one in
the old one's place, or to let it go: a publish, a rollback, a removal. What did not change is left alone, and so are
the prefixes that vLLM has cached for it.

vLLM calls `register` in each of its processes (its plugin `onebasis`); without ONEBASIS_STORE nothing is registered.

Source: `vllm.lora.resolver.LoRAResolver` and `vllm.entrypoints.openai.models.serving` of vLLM 0.33.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from configs.errors import InvalidInput, OnebasisError, Unavailable
from configs.places import storage as storage_place
from configs.settings import StorageSettings
from subspace_store.export import export_tasks
from subspace_store.formats.adapter_files import WEIGHTS_FILE
from subspace_store.log.version import MAIN
from subspace_store.storage.opening import open_storage
from subspace_store.subspace_reader import SubspaceReader
from workers.serving.held import Held
from workers.weights import resolve_source, weights_digest

log = logging.getLogger("onebasis.serving")

STORE = "ONEBASIS_STORE"
"""Address of a base model's store, as `onebasis store --store` takes it: file:…, s3://…"""
SERVER = "ONEBASIS_VLLM_URL"
"""Where this vLLM listens; default DEFAULT_SERVER."""
DEFAULT_SERVER = "http://127.0.0.1:8000"
KEY = "VLLM_API_KEY"
"""vLLM's own: what its API asks for, if anything."""
FOLDER = "ONEBASIS_VLLM_FOLDER"
"""Where adapters are written; default a temporary folder. Engines on other machines must see it under this path."""
FOLLOW_SECONDS = 1.0
ANSWER_SECONDS = 60.0
"""Longest wait until vLLM has loaded an adapter."""


class StoreResolver:
    """Adapters of one store for one vLLM.

    Args:
        store: A reader of its own.
        folder: Made if absent.
        server: Address of vLLM's API.
        request: Makes vLLM's `LoRARequest` from its fields.
        api_key: Of vLLM's API; empty: it asks for none.
    """

    def __init__(
        self, store: SubspaceReader, folder: Path, server: str, request: Callable[..., Any], api_key: str = ""
    ) -> None:
        self._store, self._held, self._folder, self._request = store, Held(store), folder, request
        self._server = server.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._lock = threading.Lock()
        self._loaded: dict[str, Path] = {}
        """Name under which vLLM knows a task, to the folder that it was given."""
        self._before: dict[str, Path] = {}
        """The folder before it, of which requests that were under way may still be answered."""
        self._source = ""
        """Base model that was compared with the store's."""
        self._follower: threading.Thread | None = None
        self._told: dict[str, str] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """vLLM's question: the adapter of a task, or None where `main` holds no such task.

        Raises:
            ValueError: vLLM cannot load it, or it was trained on other weights; vLLM answers 400 with the reason.
        """
        try:
            folder = await asyncio.to_thread(self.adapter, base_model_name, lora_name)
        except OnebasisError as error:
            raise ValueError("; ".join(filter(None, (error.sentence, error.todo)))) from error
        # vLLM numbers it by itself.
        return None if folder is None else self._request(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))

    def adapter(self, base_model_name: str, task: str) -> Path | None:
        """The folder of a task as `main` holds it, written if need be; followed from now on.

        Raises:
            OnebasisError: See `resolve_lora`; or the store cannot be read.
        """
        with self._lock:
            number = self._store.refresh().refs[MAIN]
            if self._held.find(task, number) is None:
                return None
            self._check(base_model_name)
            folder = self._loaded[task] = self._written(task, number)
            if self._follower is None:
                self._follower = threading.Thread(target=self._follow_for_ever, name="onebasis-follow", daemon=True)
                self._follower.start()
            return folder

    def follow(self) -> None:
        """Look whether `main` has moved, and have vLLM take what it holds now."""
        with self._lock:
            number, loaded = self._store.refresh().refs[MAIN], dict(self._loaded)
        for task, folder in loaded.items():
            try:
                self._follow_one(task, folder, number)
                self._told.pop(task, None)
            except OnebasisError as error:
                self._tell(task, f"vLLM goes on answering for {task} by {folder.name}: {error}")

    def _follow_one(self, task: str, folder: Path, number: int) -> None:
        """vLLM is asked without the lock: for its answer it waits until nobody resolves the same name.

        Raises:
            OnebasisError: It is tried again at the next look.
        """
        if self._held.find(task, number) is None:
            log.warning("%s: main is version %d, which does not hold it; vLLM lets it go", task, number)
            self._ask("/v1/unload_lora_adapter", lora_name=task)
            with self._lock:
                self._loaded.pop(task, None)
            return
        with self._lock:
            new = self._written(task, number)
        if new == folder:
            return
        if (new / WEIGHTS_FILE).read_bytes() != (folder / WEIGHTS_FILE).read_bytes():
            self._ask("/v1/load_lora_adapter", lora_name=task, lora_path=str(new), load_inplace=True)
            log.info("%s: vLLM answers by version %d", task, number)
            if (old := self._before.pop(task, None)) is not None and old != new:
                shutil.rmtree(old, ignore_errors=True)
            with self._lock:
                self._loaded[task], self._before[task] = new, folder
        else:
            shutil.rmtree(new, ignore_errors=True)  # the same: what vLLM was given stays

    def _written(self, task: str, number: int) -> Path:
        """Raises: InvalidInput: vLLM cannot load it."""
        (one,) = export_tasks(self._store, self._folder, number, [task], base_source=self._source)
        if why := one.refused_by.get("vllm"):
            raise InvalidInput(f"vLLM cannot load it: {why}", task, "`onebasis serve` answers for it")
        return self._folder / one.name

    def _check(self, base_model_name: str) -> None:
        """Compare the weights that vLLM has with those that the tasks were trained on, once: adapters of other weights
        of the same shapes would be loaded, and answer nonsense.

        Cost:
            Reads the weights' files, 1 to 2 GB/s for each of at most four at a time.
        """
        if self._source == base_model_name:
            return
        expected = self._store.base_sha256
        found = weights_digest(resolve_source(base_model_name)) if expected else ""
        if found != expected:
            what = f"vLLM has other weights (sha256 {found[:16]}…) than the tasks were trained on ({expected[:16]}…)"
            raise InvalidInput(what, base_model_name, f"start vLLM with the base model of {self._store.storage.url}")
        self._source = base_model_name

    def _ask(self, path: str, **values: Any) -> None:
        """Raises: Unavailable: vLLM does not answer, or refuses."""
        headers = self._headers | {"Content-Type": "application/json"}
        asked = urllib.request.Request(self._server + path, json.dumps(values).encode(), headers)
        try:
            urllib.request.urlopen(asked, timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND and "unload" in path:
                return  # somebody else had it go
            todo = "is VLLM_ALLOW_RUNTIME_LORA_UPDATING set to true?" if error.code == HTTPStatus.NOT_FOUND else ""
            said = error.read(500).decode(errors="replace")
            raise Unavailable(f"answered {error.code}: {said}", asked.full_url, todo) from error
        except OSError as error:
            raise Unavailable(str(error), asked.full_url, f"say where this vLLM listens: {SERVER}") from error

    def _follow_for_ever(self) -> None:
        while True:
            time.sleep(FOLLOW_SECONDS)
            try:
                self.follow()
                self._told.pop("", None)
            except Exception as error:  # whatever it is: vLLM goes on answering
                self._tell("", f"cannot look whether main has moved: {error}")

    def _tell(self, task: str, what: str) -> None:
        """Once, not at every look."""
        if self._told.get(task) != what:
            self._told[task] = what
            log.error("%s", what)


def register() -> None:
    """Give vLLM the resolver, if the environment names a store. Called by vLLM, in each of its processes.

    Raises:
        OnebasisError: There is no store, or it cannot be read.
    """
    if not (url := os.environ.get(STORE)):
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    storage = open_storage(StorageSettings(url=storage_place(url, Path.cwd())))
    storage.read("FORMAT")  # a folder without a store would say of every task that it does not exist
    store = SubspaceReader.open(storage)
    if not (folder := os.environ.get(FOLDER)):
        folder = tempfile.mkdtemp(prefix="onebasis-vllm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server, key = os.environ.get(SERVER, DEFAULT_SERVER), os.environ.get(KEY, "")
    LoRAResolver.register(StoreResolver)
    LoRAResolverRegistry.register_resolver("onebasis", StoreResolver(store, Path(folder), server, LoRARequest, key))
