"""The service from outside: over HTTP when it runs, in this process when it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from configs.errors import OnebasisError, Unavailable, error_from_dict
from orchestrator.api.routes import ROUTES
from subspace_store.commands.state_folder import SERVER_FILE, service_settings

TIMEOUT_SECONDS = 150.0
SUBMIT_TIMEOUT_SECONDS = 7200.0
"""A gigabyte of rows takes minutes to check."""


class Client:
    """Calls methods of the service by name; `call("task", reference="team/name")`."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._service: Any = None
        # One for all calls: each new one reads the machine's certificates. No proxy from the environment: the service
        # is on this machine or this network.
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call one method.

        Raises:
            OnebasisError: What the service raised, as itself; Unavailable when it went away meanwhile.
        """
        server = server_facts(self._state_dir)
        if server is not None:
            try:
                return _over_http(self._http, server, method, arguments)
            except httpx.ConnectError:
                pass  # it was killed and left its address behind: read without it
            except httpx.HTTPError as error:
                raise Unavailable(
                    f"the service did not answer: {error}", server["url"], "see the log in the state folder"
                ) from error
        return getattr(self._local(), method)(**arguments)

    def _local(self) -> Any:
        if self._service is None:
            from orchestrator.api.service import Service
            from orchestrator.tasks.task_queue import TaskQueue
            from subspace_store import open_storage

            settings = service_settings(self._state_dir)
            storage = open_storage(settings.storage, settings.base_model.name)
            self._service = Service(settings, TaskQueue(settings.database_url, settings.failures), storage)
        return self._service


def server_facts(state_dir: Path) -> dict[str, Any] | None:
    """Address, token and process id of the running control plane; None when none announced itself."""
    try:
        return dict(json.loads((state_dir / SERVER_FILE).read_text()))
    except (OSError, ValueError):
        return None


def _over_http(http: httpx.Client, server: dict[str, Any], method: str, arguments: dict[str, Any]) -> Any:
    verb, path = ROUTES[method]
    in_path = set(re.findall(r"{(\w+)", path))
    # Dots too: `..` in a reference would be taken for a way to another route.
    url = re.sub(r"{(\w+)(?::path)?}", lambda found: quote(str(arguments[found.group(1)])).replace(".", "%2E"), path)
    rest = {name: value for name, value in arguments.items() if name not in in_path and value is not None}
    body = next((value for value in rest.values() if isinstance(value, dict)), None)
    query = {name: value for name, value in rest.items() if not isinstance(value, dict)}
    answer = http.request(
        verb,
        server["url"] + url,
        params=query,
        json=body,
        headers={"authorization": f"Bearer {server['token']}"},
        timeout=SUBMIT_TIMEOUT_SECONDS if method == "submit" else TIMEOUT_SECONDS,
    )
    if answer.is_success:
        return answer.content if answer.headers.get("content-type") == "application/zip" else answer.json()
    raise _error(answer)


def _error(answer: httpx.Response) -> OnebasisError:
    try:
        facts = answer.json()
    except ValueError:
        facts = {}
    if "what" in facts:
        return error_from_dict(facts)
    if isinstance(facts.get("detail"), list):  # FastAPI's own check of a path or query parameter
        problems = "; ".join(f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg']}" for p in facts["detail"])
        return error_from_dict({"kind": "invalid-input", "what": problems})
    return OnebasisError(f"HTTP {answer.status_code} from the service", str(answer.url), "see its log")
