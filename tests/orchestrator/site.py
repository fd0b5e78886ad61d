"""A plant that listens: the real HTTP server on a loopback port, the loop in a thread, a state folder for clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from configs.settings import TlsSettings
from configs.task_spec import TaskSpec
from orchestrator.api.callers import Callers
from orchestrator.api.client import Client
from orchestrator.api.requests import ShowTask, Submit
from orchestrator.api.server import api, http_server
from orchestrator.api.service import Service
from tests.builders import rows, task_document, write_rows
from tests.orchestrator.checked_guard import CheckedGuard
from tests.orchestrator.plant import Plant
from workers.orders import Train

TOKEN = "the-token"


class Site:
    """Everything that `onebasis up` starts, in this process and without Ray and MLflow."""

    def __init__(self, folder: Path, tls: TlsSettings | None = None, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.plant = Plant(folder, **changes)
        self._stop = threading.Event()
        controller = self.plant.controller
        self._loop = threading.Thread(target=controller.run, args=(self._stop,))
        self._loop.start()
        self.service = Service(
            self.plant.settings,
            self.plant.queue,
            self.plant.storages,
            controller,
            self.plant.cluster,
            lambda: {"workers_ready": controller.ready_workers, "workers": controller.describe_workers()},
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        self.guard = CheckedGuard(self.service)
        callers = Callers(TOKEN, "ann", lambda: self.service.sources, lambda: self.service.settings)
        self._server = http_server(api(lambda: self.guard, callers), tls)
        self._http = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._http.start()
        (folder / "settings.yaml").write_text(yaml.safe_dump(self.plant.settings.model_dump(mode="json")))
        facts = {"url": self.url, "token": TOKEN, "pid": 0} | ({"cert_file": tls.cert_file} if tls else {})
        (folder / "server.json").write_text(json.dumps(facts))
        self.client = Client(folder)
        while not controller.ready_workers:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        self._stop.set()
        self._http.join(10)
        self._loop.join(10)
        self.plant.queue.close()

    def facts(self) -> tuple[Any, ...]:
        """Whatever of it a test could change for the next one."""
        plant = self.plant
        stood_in = (plant.cluster.hold, plant.cluster.local, plant.cluster.score, list(plant.cluster.replaced))
        return plant.state, {task.task_id: task for task in plant.queue.tasks()}, *stood_in

    def document(self, title: str, **changes: Any) -> dict[str, Any]:
        """A task document whose files are there."""
        train = write_rows(self.folder / "data" / "train.jsonl", rows(6))
        evaluation = write_rows(self.folder / "data" / "eval.jsonl", [{"text": "other", "label": "no"}])
        files = {"train_file": str(train), "eval_file": str(evaluation)}
        defaults = {"method": {"name": "lora"}, "training": {"per_device_train_batch_size": 2}}
        return task_document(title, **{**defaults, **changes, "data": files})

    def publish(self, title: str) -> dict[str, Any]:
        """Submit a task and wait until main holds it."""
        self.client.ask(Submit(task=TaskSpec.model_validate(self.document(title)), by="ann"))
        return self.wait_for(title, "published")

    def train(self, *titles: str) -> None:
        """Submit tasks and wait until they train, which they do until they are let go on."""
        self.plant.cluster.hold = lambda order: isinstance(order, Train)
        for title in titles:
            before = len(self.plant.cluster.held)
            self.client.ask(Submit(task=TaskSpec.model_validate(self.document(title)), by="ann"))
            self.wait_for(title, "training")
            while len(self.plant.cluster.held) == before:  # a task counts as training before its worker has the order
                time.sleep(0.01)

    def wait_for(self, title: str, state: str, attempt: int = 0) -> dict[str, Any]:
        until = time.monotonic() + 10
        while (task := self.client.ask(ShowTask(reference=title)))["state"] != state or task["attempt"] < attempt:
            assert time.monotonic() < until, task
            time.sleep(0.01)
        return dict(task)
